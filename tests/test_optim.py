"""Durations, schedules and groups, against PyTorch, closed forms and hand-computed steps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tl_jax.training import optim
from tl_jax.training.optim import Group

IN_STEPS = {"batch_size": 32, "train_size": 100}


def test_durations_round_up_to_whole_steps():
    convert = lambda *duration: optim.to_steps(duration, **IN_STEPS)  # noqa: E731
    assert convert(7, "steps") == 7
    assert convert(96, "examples") == 3 and convert(97, "examples") == 4
    assert convert(8, "epochs") == 25 and convert(0.5, "epochs") == 2 and convert(0, "epochs") == 0


def test_a_duration_with_an_unknown_unit_names_the_known_ones():
    with pytest.raises(ValueError, match="steps, examples, epochs"):
        optim.to_steps((3, "hours"), **IN_STEPS)


def test_schedules_equal_their_formulas():
    steps = np.arange(100)
    k = np.maximum(steps - 10, 0)
    expected = {
        "constant": np.full(100, 0.4),
        "cosine": 0.4 * 0.5 * (1 + np.cos(np.pi * k / 90)),
        "linear": 0.4 * (1 - k / 90),
        "step": 0.4 * 0.1 ** ((k >= 30).astype(int) + (k >= 60)),
        "inverse_sqrt": 0.4 / np.sqrt(k + 1),
    }
    for name, after in expected.items():
        schedule = optim.make_schedule(name, 0.4, total_steps=100, warmup_steps=10)
        want = np.where(steps < 10, 0.4 * (steps + 1) / 11, after)
        np.testing.assert_allclose([schedule(s) for s in steps], want, rtol=2e-6, atol=1e-8, err_msg=name)


def test_cosine_without_warmup_equals_pytorch():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.03)
    schedule = optim.make_schedule("cosine", 0.3, total_steps=50, args={"final": 0.1})
    for step in range(50):
        assert float(schedule(step)) == pytest.approx(reference.get_last_lr()[0], rel=1e-5)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "cosin"}, "did you mean 'cosine'"),
        ({"name": "cosine", "args": {"finl": 1}}, "'finl' .did you mean 'final'"),
        ({"name": "step", "args": {"milestones": (0.5, 1.5)}}, "milestones = .*expected fractions between 0 and 1"),
        ({"name": "inverse_sqrt", "args": {"timescale": 0}}, "timescale = 0, expected a number above 0"),
        ({"name": "constant", "warmup_steps": 10}, "does not fit into 10 steps"),
    ],
)
def test_schedule_errors_teach(kwargs, message):
    with pytest.raises(ValueError, match=message):
        optim.make_schedule(**{"peak": 1.0, "total_steps": 10, **kwargs})


PARAMS = {"a/kernel": jnp.asarray([1.0, -2.0]), "a/bias": jnp.asarray([0.5]), "b/kernel": jnp.asarray([3.0])}
GRADS = {"a/kernel": jnp.asarray([0.3, 0.1]), "a/bias": jnp.asarray([-0.2]), "b/kernel": jnp.asarray([0.7])}
LABELS = {"a/kernel": "slow", "a/bias": "slow", "b/kernel": "fast", "c/kernel": "frozen"}


def run(default, overrides, steps=5, clip=0.0):
    tx = optim.make_optimizer(LABELS, optim.make_groups(LABELS, default, overrides), lambda k: 0.1 + 0.0 * k, clip)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("name", "args", "torch_args", "wd"),
    [
        ("sgd", (("momentum", 0.9),), {"momentum": 0.9}, 0.05),
        ("sgd", (("momentum", 0.9), ("nesterov", True)), {"momentum": 0.9, "nesterov": True}, 0.0),
        ("adamw", (), {}, 0.05),
        ("adam", (), {}, 0.05),
    ],
)
def test_groups_train_as_pytorch_parameter_groups(name, args, torch_args, wd):
    torch = pytest.importorskip("torch")
    leaves = {path: torch.nn.Parameter(torch.tensor(np.asarray(leaf))) for path, leaf in PARAMS.items()}

    def group(path, lr):
        return {"params": [leaves[path]], "lr": lr, "weight_decay": wd if path.endswith("kernel") else 0.0}

    reference = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](
        [group("a/kernel", 0.1), group("a/bias", 0.1), group("b/kernel", 1.0)], lr=0.1, **torch_args
    )
    for _ in range(5):
        for path, leaf in leaves.items():
            leaf.grad = torch.tensor(np.asarray(GRADS[path]))
        reference.step()
    params, _ = run(Group(name, args, weight_decay=wd), {"fast": {"lr_mult": 10.0}})
    for path, leaf in leaves.items():
        # optax computes Adam's bias correction 1 - 0.999^t in float32, PyTorch in float64: 2e-5 apart.
        np.testing.assert_allclose(params[path], leaf.detach().numpy(), rtol=3e-5, err_msg=path)


def test_a_group_may_have_an_optimizer_of_its_own():
    params, _ = run(Group("adamw"), {"fast": {"optimizer": "sgd", "args": {"momentum": 0.5}}}, steps=3)
    np.testing.assert_allclose(params["b/kernel"], 3.0 - 0.1 * 0.7 * (1 + 1.5 + 1.75), rtol=1e-6)
    np.testing.assert_array_equal(params["a/kernel"], run(Group("adamw"), {}, steps=3)[0]["a/kernel"])


def test_one_global_clip_stands_before_all_groups():
    params, _ = run(Group("sgd"), {}, steps=1, clip=0.1)
    norm = math.sqrt(0.3**2 + 0.1**2 + 0.2**2 + 0.7**2)
    np.testing.assert_allclose(params["b/kernel"], 3.0 - 0.1 * 0.7 * 0.1 / norm, rtol=1e-6)


def test_lamb_and_lion_take_decay_for_kernels_only():
    for name in ("lamb", "lion"):
        with_decay, without = (run(Group(name, weight_decay=wd), {})[0] for wd in (0.5, 0.0))
        np.testing.assert_array_equal(with_decay["a/bias"], without["a/bias"])
        assert not np.allclose(with_decay["a/kernel"], without["a/kernel"])


def test_no_optimizer_array_exists_for_frozen_leaves():
    _, state = run(Group("adamw"), {})
    paths = {
        key.key for keys, _ in jax.tree_util.tree_flatten_with_path(state)[0] for key in keys if hasattr(key, "key")
    }
    assert {"a/kernel", "a/bias", "b/kernel"} <= paths and "c/kernel" not in paths


def test_group_errors_come_together():
    with pytest.raises(ValueError) as error:
        optim.make_groups(LABELS, Group(), {"fsat": {"lr_mult": 2}, "slow": {"wd": 1}, "frozen": {}, "fast": 3})
    for part in (
        "'fsat'",
        "did you mean 'fast'",
        "no parameter 'wd'",
        "'frozen' takes no settings",
        "3 is not a table",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Group("adamm"), "no optimizer 'adamm'.*did you mean 'adamw?'"),
        (Group("sgd", (("momentun", 0.9),)), r"no parameter 'momentun' \(did you mean 'momentum'\?\)"),
        (Group("sgd", (("momentum", "x"),)), "optax cannot run 'sgd'"),
        (Group("adafactor", (("weight_decay_rate", 0.1),)), "no parameter 'weight_decay_rate'"),
        (Group("lbfgs"), "optax cannot run 'lbfgs'"),
        (Group(weight_decay=-0.1), "weight_decay = -0.1, expected a number of at least 0"),
        (Group(lr_mult="x"), "lr_mult = 'x', expected a number of at least 0"),
        (Group(decay="("), r"decay = '\(', expected a regular expression"),
        (Group(weight_decay=0.1, decay="kernel"), "matches none of the paths in full, such as 'a/kernel'"),
    ],
)
def test_groups_that_are_invalid_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        optim.make_groups(LABELS, group, {})


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        optim.make_groups({"a": "frozen"}, Group(), {})


def follow(tx, params, state, steps):
    """The trainable parameters after each of `steps` steps, with gradients that change, and the last state."""
    trail = []
    for step in steps:
        grads = {path: GRADS[path] * (1.0 + 0.3 * step) for path in params}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        trail.append(params)
    return trail, state


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb"])
def test_a_multiplier_is_a_learning_rate_of_its_own_weight_decay_included(name):
    default, labels = Group(name, weight_decay=0.3), {"a/kernel": "a", "a/bias": "b", "b/kernel": "c"}
    schedule = optim.make_schedule("cosine", 0.1, total_steps=6, warmup_steps=2)
    multipliers = {"a/kernel": 0.5, "a/bias": 0.125, "b/kernel": 1.0, "frozen/kernel": 7.0}
    plain = optim.make_groups(labels, default, {})
    own = optim.make_groups(labels, default, {label: {"lr_mult": multipliers[path]} for path, label in labels.items()})
    txs = (
        optim.make_optimizer(labels, plain, schedule, multipliers=multipliers),
        optim.make_optimizer(labels, own, schedule),
    )
    ours, expected = (follow(tx, PARAMS, tx.init(PARAMS), range(6))[0] for tx in txs)
    for left, right in zip(ours, expected, strict=True):  # powers of two: exact, whatever the order of the factors
        for path in PARAMS:
            np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def test_multipliers_and_group_rates_multiply():
    labels = dict.fromkeys(PARAMS, "all")
    groups = optim.make_groups(labels, Group("sgd"), {"all": {"lr_mult": 10.0}})
    tx = optim.make_optimizer(labels, groups, lambda k: 0.1, multipliers=dict.fromkeys(PARAMS, 0.3))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    for path, grad in GRADS.items():
        np.testing.assert_allclose(updates[path], -0.3 * np.asarray(grad), rtol=1e-6)


def test_auto_rgn_scales_each_block_by_its_relative_gradient_norm():
    """Three steps of SGD with momentum in float64: a running mean of |g| / |w| per block, over the largest."""
    blocks, labels = {"a/kernel": "a", "a/bias": "a", "b/kernel": "b"}, dict.fromkeys((*PARAMS, "head/kernel"), "all")
    params = {**PARAMS, "head/kernel": jnp.asarray([0.01])}
    groups = optim.make_groups(labels, Group("sgd", (("momentum", 0.5),)), {})
    tx = optim.make_optimizer(labels, groups, lambda k: 0.1 + 0.0 * k, blocks=blocks)
    w = {path: np.asarray(leaf, np.float64) for path, leaf in params.items()}
    velocity, ratios, state = dict.fromkeys(w, 0.0), {"a": 0.0, "b": 0.0}, tx.init(params)
    for step in range(3):
        g = {path: (step + 1.0) ** (1 if path[0] == "a" else -1) * np.cos(x) for path, x in w.items()}
        for name in ratios:
            members = [path for path in blocks if blocks[path] == name]
            norms = [np.sqrt(sum((tree[path] ** 2).sum() for path in members)) for tree in (g, w)]
            ratios[name] = 0.9 * ratios[name] + 0.1 * norms[0] / norms[1]
        updates, state = tx.update({p: jnp.asarray(x, jnp.float32) for p, x in g.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for path in w:
            velocity[path] = 0.5 * velocity[path] + g[path]
            factor = ratios[blocks[path]] / max(ratios.values()) if path in blocks else 1.0
            w[path] = w[path] - 0.1 * factor * velocity[path]
            np.testing.assert_allclose(params[path], w[path], rtol=2e-6, err_msg=f"{path}, step {step}")
        assert 0 < min(ratios.values()) < max(ratios.values()), "both blocks at full rate would prove nothing"


def make_phases(*phases, lengths):
    """(transformation, labels) of each phase as a run makes them; each is (labels, default group, schedule)."""
    before, made = None, []
    for (labels, default, schedule), length in zip(phases, lengths, strict=True):
        groups = optim.make_groups(labels, default, {})
        offsets = optim.offsets_after(before, labels, groups)
        made.append(optim.make_optimizer(labels, groups, schedule, offsets=offsets))
        before = labels, groups, offsets, length
    return made


def run_phases(*phases, lengths):
    """The parameters after every step of all phases, the optimizer state migrated between them."""
    params, old, trail, done = PARAMS, None, [], 0
    made = make_phases(*phases, lengths=lengths)
    for i, (tx, (labels, *_), length) in enumerate(zip(made, phases, lengths, strict=True)):
        trainable = {path: params[path] for path in labels if labels[path] != "frozen"}
        state = tx.init(trainable) if i == 0 else optim.migrate(tx.init(trainable), old, lengths[i - 1])
        steps, old = follow(tx, trainable, state, range(done, done + length))
        trail += [{**params, **step} for step in steps]
        params, done = trail[-1], done + length
    return trail


ADAMW, ALL = Group("adamw", weight_decay=0.1), dict.fromkeys(PARAMS, "all")
ONLY_A = {"a/kernel": "all", "a/bias": "all", "b/kernel": "frozen"}
ONLY_B = {"a/kernel": "frozen", "a/bias": "frozen", "b/kernel": "all"}
SCHEDULES = [
    optim.make_schedule("cosine", 0.1, total_steps=3),
    optim.make_schedule("linear", 0.02, total_steps=4, warmup_steps=1),
    optim.make_schedule("cosine", 0.05, total_steps=3),
]


def joined(count):
    """The schedules of three phases as one function of the step."""
    first, second = jnp.where(count < 3, SCHEDULES[0](count), SCHEDULES[1](count - 3)), SCHEDULES[2](count - 7)
    return jnp.where(count < 7, first, second)


@pytest.mark.parametrize("args", [Group("adamw", weight_decay=0.1), Group("sgd", (("momentum", 0.9),)), Group("lamb")])
def test_a_leaf_that_stays_trainable_goes_on_as_if_there_were_no_phases(args):
    """a/* train throughout, b/kernel comes in the second phase and goes in the third."""
    phases = [(labels, args, s) for labels, s in zip((ONLY_A, ALL, ONLY_A), SCHEDULES, strict=True)]
    trail = run_phases(*phases, lengths=(3, 4, 3))
    alone = {path: PARAMS[path] for path in ("a/kernel", "a/bias")}
    tx = optim.make_optimizer(ONLY_A, optim.make_groups(ONLY_A, args, {}), joined)
    unbroken, _ = follow(tx, alone, tx.init(alone), range(10))
    for step, (ours, expected) in enumerate(zip(trail, unbroken, strict=True)):
        for path in alone:
            np.testing.assert_array_equal(ours[path], expected[path], err_msg=f"{path}, step {step}")
    b = [np.asarray(params["b/kernel"]) for params in trail]
    assert (b[2] == PARAMS["b/kernel"]).all() and (b[6] != b[2]).all() and (b[9] == b[6]).all()


def test_a_leaf_that_becomes_trainable_has_fresh_moments_and_its_own_bias_correction():
    phases = [(labels, Group("adam"), s) for labels, s in zip((ONLY_A, ALL), SCHEDULES, strict=False)]
    trail = run_phases(*phases, lengths=(3, 4))
    first = np.asarray(trail[3]["b/kernel"]) - np.asarray(PARAMS["b/kernel"])
    np.testing.assert_allclose(np.abs(first), SCHEDULES[1](0), rtol=1e-5)
    tx = optim.make_optimizer(ONLY_B, optim.make_groups(ONLY_B, Group("adam"), {}), SCHEDULES[1])
    alone = {"b/kernel": PARAMS["b/kernel"]}
    fresh, _ = follow(tx, alone, tx.init(alone), range(3, 7))
    for ours, expected in zip(trail[3:], fresh, strict=True):
        np.testing.assert_array_equal(ours["b/kernel"], expected["b/kernel"])


def test_a_leaf_that_was_frozen_for_a_phase_starts_afresh():
    phases = [(labels, ADAMW, s) for labels, s in zip((ALL, ONLY_A, ALL), SCHEDULES, strict=True)]
    trail = run_phases(*phases, lengths=(3, 4, 3))
    tx = optim.make_optimizer(ONLY_B, optim.make_groups(ONLY_B, ADAMW, {}), SCHEDULES[2])
    alone = {"b/kernel": trail[6]["b/kernel"]}
    fresh, _ = follow(tx, alone, tx.init(alone), range(7, 10))
    np.testing.assert_array_equal(trail[9]["b/kernel"], fresh[-1]["b/kernel"])
    np.testing.assert_array_equal(trail[6]["b/kernel"], trail[2]["b/kernel"])


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        (Group("sgd", (("momentum", 0.9),)), False),
        (Group("adamw", (("b1", 0.8),), weight_decay=0.1), False),
        (Group("adamw"), False),
        (Group("adamw", weight_decay=0.7), True),
        (Group("adamw", weight_decay=0.1, lr_mult=3.0), True),
    ],
)
def test_optimizer_values_are_kept_under_the_same_optimizer_alone(second, kept):
    made = make_phases((ALL, ADAMW, SCHEDULES[0]), (ALL, second, SCHEDULES[1]), lengths=(3, 4))
    trail, old = follow(made[0], PARAMS, made[0].init(PARAMS), range(3))
    new = made[1].init(trail[-1])
    migrated = optim.migrate(new, old, 3)
    assert jax.tree.structure(migrated) == jax.tree.structure(new)
    before, values = ([np.asarray(x) for x in jax.tree.leaves(tree)] for tree in (old, migrated))
    if kept:
        for left, right in zip(before, values, strict=True):
            np.testing.assert_array_equal(left, right)
        assert any((x != 0).any() for x in values)
    else:
        assert all((x == 0).all() for x in values)


def test_no_two_migrated_values_are_one_array():
    """A step that donates its state cannot hold a buffer twice."""
    moved = {"a/kernel": "slow", "a/bias": "all", "b/kernel": "all"}
    made = make_phases((moved, ADAMW, SCHEDULES[0]), (moved, ADAMW, SCHEDULES[1]), lengths=(3, 4))
    _, old = follow(made[0], PARAMS, made[0].init(PARAMS), range(3))
    leaves = jax.tree.leaves(optim.migrate(made[1].init(PARAMS), old, 3))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_a_leaf_may_change_its_group_and_keep_its_values():
    moved = {"a/kernel": "slow", "a/bias": "all", "b/kernel": "all"}
    ours = run_phases((ALL, ADAMW, SCHEDULES[0]), (moved, ADAMW, SCHEDULES[1]), lengths=(3, 4))
    stayed = run_phases((ALL, ADAMW, SCHEDULES[0]), (ALL, ADAMW, SCHEDULES[1]), lengths=(3, 4))
    afresh = run_phases((ONLY_B, ADAMW, SCHEDULES[0]), (ALL, ADAMW, SCHEDULES[1]), lengths=(3, 4))
    for path in PARAMS:
        np.testing.assert_allclose(ours[-1][path], stayed[-1][path], rtol=3e-7)  # compiled apart: one rounding
    moved_by = [float(jnp.abs(trail[-1]["a/kernel"] - trail[2]["a/kernel"]).max()) for trail in (stayed, afresh)]
    assert abs(moved_by[0] - moved_by[1]) > 1e-4, "fresh values would have gone elsewhere"


def test_a_value_that_should_be_carried_over_and_is_not_there_is_an_error():
    _, tx = make_phases((ALL, ADAMW, SCHEDULES[0]), (ALL, ADAMW, SCHEDULES[1]), lengths=(3, 4))
    other = optim.make_optimizer(ONLY_A, optim.make_groups(ONLY_A, ADAMW, {}), SCHEDULES[0])
    new, old = tx.init(PARAMS), other.init({path: PARAMS[path] for path in ("a/kernel", "a/bias")})
    with pytest.raises(RuntimeError, match=r"b/kernel.* was not found in the phase before"):
        optim.migrate(new, old, 3)
