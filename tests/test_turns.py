"""Steps in turns, optimizer values that start anew, a stream train without labels, statistics computed anew."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plans
import pytest

import tl_jax
from configs import smoke
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import trees
from tl_jax.data import pipeline
from tl_jax.methods import TERMS
from tl_jax.methods.domain import test_time
from tl_jax.methods.term import MAIN, Result, Term, make_task_term
from tl_jax.models.resnet import ResNet
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import inprocess
from tl_jax.training import optim, steps
from tl_jax.training.build import build
from tl_jax.training.plan import Turn
from tl_jax.training.train import train

GROUPS = {"backbone": optim.Group("adam"), "head": optim.Group("sgd", (("momentum", 0.9),), lr_mult=2.0)}
TURNS = (
    Turn(("backbone", "head"), {"task": 1.0, "size": 1.0}),
    Turn(("head",), {"task": 0.5}),
    Turn(("backbone",), {"size": -0.25, "task": 1.0}),
    Turn(("backbone",), {"size": -0.25, "task": 1.0}),
)


def size_of_logits():
    """A second term: half the mean squared logit."""
    return Term(lambda context: Result(jnp.mean(context.outputs[MAIN]["logits"] ** 2) / 2))


def small():
    model = ResNet(num_classes=3, depths=(1,), widths=(4,), cifar=True, head_init="lecun")
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3)).astype(np.float32)
    return (
        model,
        model.init(jax.random.key(0), images),
        {MAIN: {"image": images, "label": np.array([0, 1, 2, 0, 1, 2])}},
    )


@pytest.mark.slow
def test_the_random_numbers_of_a_turn_are_its_own():
    model, variables, batch = small()
    parallel = sharding.make_parallel("jit", jax.devices()[:1])
    losses = []
    for turns in ((), (Turn(("head",), {"task": 1.0}),) * 2):
        plan = plans.make_plan(model, variables, parallel, 3, "linear_probe", mixup=0.3)._replace(turns=turns)
        tx = plans.make_tx(plan, optim.Group("sgd", lr_mult=0.0))
        state = steps.init_state(plan, tx, variables, {}, 0)
        losses.append(float(jax.jit(steps.make_train_step(plan, tx))(state, batch).sums["loss"]))
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)  # that of the first turn, and the mean of both


@pytest.mark.slow
def test_turns_equal_a_loop_over_optimizers_of_their_own():
    """Every group has an optimizer by itself, which is called in its turns alone, at the learning rate of the step."""
    model, variables, batch = small()
    parallel = sharding.make_parallel("jit", jax.devices()[:1])
    terms = {"task": make_task_term(), "size": size_of_logits()}
    plan = plans.make_plan(model, variables, parallel, 3, terms=terms)._replace(turns=TURNS)
    schedule = lambda step: 0.05 / (1 + step)  # noqa: E731
    times = {"backbone": 3, "head": 2}
    tx = optim.make_optimizer(plan.labels, GROUPS, schedule, times=times)
    state = steps.init_state(plan, tx, variables, {}, 0)
    step = jax.jit(steps.make_train_step(plan, tx))

    params, batch_stats, _ = trees.flatten(variables["params"]), variables["batch_stats"], None
    own = {name: [path for path in params if plan.labels[path] == name] for name in GROUPS}
    make = {"backbone": lambda rate: optax.adam(rate), "head": lambda rate: optax.sgd(2 * rate, momentum=0.9)}
    states = {name: make[name](0.0).init({path: params[path] for path in own[name]}) for name in GROUPS}
    x = steps.normalise(batch[MAIN]["image"], plans.make_card(3))
    y = jax.nn.one_hot(batch[MAIN]["label"], 3)

    def loss(params, batch_stats, factors):
        tree = {"params": trees.unflatten(params), "batch_stats": batch_stats}
        (logits, _), updates = model.apply(tree, x, train=True, mutable=["batch_stats"])
        cross_entropy = -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=1))
        return factors.get("task", 0) * cross_entropy + factors.get("size", 0) * jnp.mean(logits**2) / 2, updates

    for count in range(2):
        state = step(state, batch)
        for turn in TURNS:
            grads, updates = jax.grad(loss, has_aux=True)(params, batch_stats, turn.terms)
            batch_stats = updates["batch_stats"]
            for name in turn.groups:
                mine = {path: params[path] for path in own[name]}
                tx_of = make[name](0.05 / (1 + count))
                change, states[name] = tx_of.update({path: grads[path] for path in mine}, states[name], mine)
                params = {**params, **optax.apply_updates(mine, change)}
    for path, leaf in trees.flatten(state.params).items():
        np.testing.assert_allclose(leaf, params[path], rtol=2e-5, atol=2e-6, err_msg=path)
    for path, leaf in trees.flatten(state.batch_stats).items():
        np.testing.assert_allclose(leaf, trees.flatten(batch_stats)[path], rtol=1e-5, atol=1e-6, err_msg=path)
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
    assert sorted(int(leaf) for leaf in counts) in ([4, 6, 6], [4, 6]) and int(state.step) == 2


@pytest.mark.slow
def test_what_has_no_turn_keeps_parameters_and_optimizer_values_bit_by_bit():
    model, variables, batch = small()
    parallel = sharding.make_parallel("jit", jax.devices()[:1])
    plan = plans.make_plan(model, variables, parallel, 3)._replace(turns=(Turn(("head",), {"task": 1.0}),))
    tx = optim.make_optimizer(plan.labels, GROUPS, optax.constant_schedule(0.1), clip=1.0)
    state = steps.init_state(plan, tx, variables, {}, 0)
    after = jax.jit(steps.make_train_step(plan, tx))(state, batch)
    changed = {p for p, leaf in trees.flatten(after.params).items() if np.any(leaf != trees.flatten(state.params)[p])}
    assert changed and all(path.startswith("head/") for path in changed)
    pairs = zip(jax.tree_util.tree_leaves_with_path(state.opt_state), jax.tree.leaves(after.opt_state), strict=True)
    for (keys, was), now in pairs:
        assert ("head" in jax.tree_util.keystr(keys)) or np.array_equal(was, now), keys


def make_config(**changes):
    return options.override(smoke.get_config(), {
        "model.image_size": 16, "model.head_init": "lecun", "data.train": "train[:5%]", "data.val": "train[97%:]",
        "data.test": "test[:8%]", "data.shots": 0, "batch_size": 8, "eval_batch_size": 64, "resamples": 10,
        "select": "last", "method.name": "full", "lr": 0.01, "clip": 0.0, **changes,
    })  # fmt: skip


def stopped_and_resumed(config, folder, at=(2,)):
    """Trains, stopped after each of these steps."""
    for step in at:
        with pytest.raises(Preempted):
            train(config, folder, verbose=False, stop_requested=lambda done, step=step: done == step)
    return train(config, folder, verbose=False)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_in_turns_resumes_bit_equal(tmp_path, monkeypatch):
    monkeypatch.setitem(TERMS, "size", size_of_logits)
    turns = ((("backbone", "head"), {"task": 1.0}), (("head",), {"size": 0.5}), (("backbone",), {"task": 0.1}))
    config = make_config(terms={"size": {}}, turns=turns, optimizer="adam")
    assert train(config, tmp_path / "a", verbose=False) == stopped_and_resumed(config, tmp_path / "b")
    for name in ("metrics.jsonl", "predictions.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (((("backbone",), {"task": 1.0}),), "no turn names the group 'head'"),
        (((("backbone", "haed"), {"task": 1.0}),), "there is no group 'haed'"),
        (((("backbone", "head"), {"tusk": 1.0}),), "there is no term 'tusk'"),
        ((("backbone", {"task": 1.0}),), r"expected pairs \(\(group, ...\), \{term: factor\}\)"),
    ],
)
def test_turns_that_do_not_fit_are_refused(turns, message):
    with pytest.raises(ValueError, match=f"(?s)turns.*{message}"):
        build(make_config(turns=turns), sharding.make_parallel())


def test_restart_begins_a_phase_with_new_optimizer_values():
    phase = (("total", (2.0, "steps")),)
    for restart, offsets in ((False, {2}), (True, {0})):
        config = make_config(phases=(phase, (*phase, ("restart", restart))))
        assert set(build(config, sharding.make_parallel()).phases[1].offsets.values()) == offsets


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(0.5, 2.0), [("linear", {"stop": 2.0}), ("linear", {"stop": 0.25})]])
def test_replicas_may_differ_in_the_weights_of_terms(tmp_path, monkeypatch, weights):
    monkeypatch.setitem(TERMS, "size", size_of_logits)
    replicas = tuple((("terms.size.weight", weight),) for weight in weights)
    config = make_config(terms={"size": {"weight": weights[0]}}, replicas=replicas, total=(2.0, "steps"))
    rows = inprocess.run(config, tmp_path / "all")["replicas"]["replicas"]
    ours = [tasks.load_predictions(tmp_path / "all/replicas" / row["name"] / "predictions.npz").values for row in rows]
    assert np.abs(ours[0] - ours[1]).max() > 1e-3
    train(
        options.override(config, {"terms.size.weight": weights[1], "replicas": ()}), tmp_path / "alone", verbose=False
    )
    alone = tasks.load_predictions(tmp_path / "alone/predictions.npz").values
    np.testing.assert_allclose(ours[1], alone, rtol=1e-5, atol=1e-5)


def test_weights_of_other_schedules_cannot_be_one_program(tmp_path, monkeypatch):
    monkeypatch.setitem(TERMS, "size", size_of_logits)
    replicas = tuple((("terms.size.weight", weight),) for weight in (0.5, ("linear", {"stop": 2.0})))
    with pytest.raises(ValueError, match=r"terms\.size"):
        inprocess.run(make_config(terms={"size": {}}, replicas=replicas), tmp_path)


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("size", [64, 7])
def test_statistics_computed_anew_are_those_of_the_whole_stream(tmp_path, monkeypatch, size):
    """Of the first layer, which has no others below it, in float64, whatever the batches of evaluation."""
    monkeypatch.setitem(TERMS, "adabn", test_time.adabn)
    config = make_config(**{
        "streams": {"target": {"source": "digits:inverted", "split": "train[:60]"}}, "total": (2.0, "steps"),
        "terms": {"task": {"weight": 0}, "adabn": {}}, "method.name": "rules", "method.rules": ((".*", "frozen"),),
        "eval_batch_size": size,
    })  # fmt: skip
    train(config, tmp_path, verbose=False)
    exported = tl_jax.load("resnet8_cifar", tmp_path / "model.safetensors")
    found = trees.flatten(exported.variables["batch_stats"])
    material = build(config, sharding.make_parallel()).material
    (batch,) = pipeline.eval_batches(material.data["target"], {"image": pipeline.View(material.card)}, 60)
    x = np.asarray(steps.normalise(batch["image"], material.card), np.float64)
    kernel = np.float64(trees.flatten(material.variables["params"])["backbone/stem/conv/kernel"])
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
    y = np.einsum("bhwcij,ijcf->bhwf", windows, kernel)
    np.testing.assert_allclose(found["backbone/stem/norm/mean"], y.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["backbone/stem/norm/var"], y.var((0, 1, 2)), rtol=1e-4, atol=1e-5)
