"""The pure steps: what moves, what stays, and that parallelism and accumulation change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plans import as_batch, make_plan, make_reader, make_tx

from tl_jax import models, tasks
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.methods import term
from tl_jax.runtime import sharding
from tl_jax.training import optim, steps

TASK = tasks.make(tasks.Spec(class_names=tuple("abcd")))


def make_batch(size=8, side=16, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (size, side, side, 3)), rng.integers(0, classes, size)
    return as_batch(images.astype(np.uint8), labels.astype(np.int32))


@functools.cache
def initial_variables(name, classes, image_size):
    size = {"image_size": image_size, "depth": 2} if name.startswith("vit") else {}
    model = models.get(name).module(num_classes=classes, head_init="lecun", **size)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)))
    if "batch_stats" in variables:  # running statistics that differ from every batch, so that using them shows
        shifted = jax.tree.map(lambda x: x + 0.3, variables["batch_stats"])
        variables = {**variables, "batch_stats": shifted}
    return model, variables


def setup(
    method="full", name="resnet8_cifar", classes=4, image_size=16, clip=1.0, optimizer=None, mode="jit", devices=None,
    **choices,
):  # fmt: skip
    model, variables = initial_variables(name, classes, image_size)
    parallel = sharding.make_parallel(mode, devices)
    plan = make_plan(model, variables, parallel, classes, method, **choices)
    tx = make_tx(plan, optimizer or optim.Group("sgd", (("momentum", 0.9),), weight_decay=1e-3), clip=clip)
    step, state = steps.make_train_step(plan, tx), steps.init_state(plan, tx, variables, {}, 0)
    return jax.tree.map(jnp.array, state), parallel.train(step), parallel, plan.labels, step


def run(count, batches=None, **options):
    state, train, parallel, labels, _ = setup(**options)
    state = parallel.place(state)
    for s in range(count):
        state = train(state, parallel.put_batch(make_batch(seed=s) if batches is None else batches[s]))
        # Simulated devices share few threads: several steps in flight can starve each other's collectives.
        jax.block_until_ready(state)
    return jax.device_get(state), labels


def assert_close(left, right, rtol=1e-5, atol=1e-6):
    flat_left, flat_right = trees.flatten(left), trees.flatten(right)
    assert flat_left.keys() == flat_right.keys()
    for path, leaf in flat_left.items():
        np.testing.assert_allclose(leaf, flat_right[path], rtol=rtol, atol=atol, err_msg=path)


@pytest.mark.parametrize(("method", "last_k"), [pytest.param("linear_probe", 0, marks=pytest.mark.slow), ("last_k", 1)])
def test_frozen_parameters_and_statistics_are_bit_equal_after_100_steps(method, last_k):
    before, *_ = setup(method, last_k=last_k)
    after, labels = run(100, method=method, last_k=last_k)
    hashes = [trees.leaf_hashes({"params": s.params, "batch_stats": s.batch_stats}) for s in (before, after)]
    moved = {path for path in hashes[0] if hashes[0][path] != hashes[1][path]}
    trained = {f"params/{path}" for path, label in labels.items() if label != "frozen"}
    assert trained <= moved
    statistics = {path for path in hashes[0] if path.startswith("batch_stats/backbone/stage3/block0")}
    assert moved == trained | (statistics if last_k else set())


@pytest.mark.slow
def test_full_fine_tuning_moves_every_parameter_and_statistic():
    before, *_ = setup("full")
    after, _ = run(3, method="full")
    hashes = [trees.leaf_hashes({"params": s.params, "batch_stats": s.batch_stats}) for s in (before, after)]
    assert all(hashes[0][path] != hashes[1][path] for path in hashes[0])


def test_a_step_equals_optax_written_by_hand():
    """An independent step: plain jax.grad of a plain loss over all parameters, plain SGD."""
    state, train, _, _, _ = setup("full", clip=0.0, optimizer=optim.Group("sgd"))
    model, variables = initial_variables("resnet8_cifar", 4, 16)
    batch = make_batch()

    def loss(params):
        images = (batch["train"]["image"] / np.float32(255) - np.float32(0.5)) / np.float32(0.25)
        (logits, _), updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["train"]["label"])
        return losses.mean(), updates["batch_stats"]

    (value, batch_stats), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], grads)
    state = train(state, batch)
    assert_close(state.params, expected, rtol=1e-4)
    assert_close(state.batch_stats, batch_stats, rtol=1e-4)
    assert float(state.sums["loss"] / state.sums["examples"]) == pytest.approx(float(value), rel=1e-5)
    assert float(state.sums["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)


@pytest.mark.slow
def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
    # A ViT has no batch statistics, so that the parts must give exactly the whole.
    options = {"name": "vit_tiny_patch16_224", "method": "last_k", "last_k": 1, "image_size": 16, "clip": 0.5}
    whole, _ = run(2, **options)
    parts, _ = run(2, accumulate=4, devices=jax.devices()[:2], **options)
    assert_close(whole.params, parts.params)
    assert_close(whole.sums, parts.sums)


@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["linear_probe", "last_k", "full"])
def test_the_moving_average_follows_its_recurrence_over_all_that_moves_and_nothing_else(method):
    """Averaged parameters need averaged statistics: with raw ones beside them a network can be worse than either."""
    averages, last_k = None, int(method == "last_k")
    states = [run(count, method=method, last_k=last_k, ema=0.9)[0] for count in range(4)]
    flat = [trees.flatten({"params": s.params, "batch_stats": s.batch_stats}) for s in states]
    moving = {path for path in flat[0] if not np.array_equal(flat[0][path], flat[3][path])}
    for values in flat:
        averages = values if averages is None else {p: 0.9 * a + 0.1 * values[p] for p, a in averages.items()}
    assert states[3].ema.keys() == moving
    assert_close(states[3].ema, {path: averages[path] for path in moving})
    evaluated = trees.flatten(steps.eval_variables(states[3]))
    assert_close(evaluated, {path: averages[path] if path in moving else flat[0][path] for path in flat[0]})
    for path in evaluated.keys() - moving:
        np.testing.assert_array_equal(evaluated[path], flat[0][path])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"mode": "pmap"}, *(pytest.param(x, marks=pytest.mark.slow) for x in ({}, {"mode": "pmap", "accumulate": 2}))],
)
def test_devices_and_mode_do_not_change_losses_or_parameters(options):
    base = {"accumulate": options["accumulate"]} if "accumulate" in options else {}
    one, _ = run(4, devices=jax.devices()[:1], **base)
    many, _ = run(4, **options)
    assert_close(one.sums, many.sums, rtol=1e-5)
    assert_close(one.params, many.params, rtol=1e-3, atol=1e-5)
    assert_close(one.batch_stats, many.batch_stats, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_under_pmap_what_is_frozen_stays_bit_for_bit_on_a_number_of_devices_that_rounds_means():
    options = {"method": "linear_probe", "mode": "pmap", "devices": jax.devices()[:3]}
    before = setup(**options)[0]
    draw = np.random.default_rng(0)  # (x + x + x) / 3 is x for some numbers only
    statistics = jax.tree.map(lambda x: x + draw.uniform(0, 1, x.shape).astype(np.float32), before.batch_stats)
    state, train, parallel, *_ = setup(**options)
    state = parallel.place(state._replace(batch_stats=statistics))
    after = train(state, parallel.put_batch(make_batch(size=12)))
    assert trees.leaf_hashes(after.batch_stats) == trees.leaf_hashes(statistics)
    assert trees.leaf_hashes(after.params) != trees.leaf_hashes(before.params)


@pytest.mark.slow
def test_the_first_step_with_a_nan_is_remembered():
    state, train, parallel, *_ = setup("full", optimizer=optim.Group("sgd"), clip=0.0)
    state = parallel.place(state)
    for s in range(4):
        if s == 2:
            state = state._replace(params=trees.merge(state.params, {"head/bias": jnp.full(4, jnp.nan)}))
        state = train(state, parallel.put_batch(make_batch(seed=s)))
    assert int(state.bad_step) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixing",
    [
        {"mixup": 0.3, "cutmix": 1.0},
        *(pytest.param(x, marks=pytest.mark.slow) for x in ({"mixup": 0.3}, {"cutmix": 1.0})),
    ],
)
def test_mixing_changes_the_loss_and_is_a_function_of_seed_and_step(mixing):
    plain, _ = run(2, method="linear_probe")
    mixed, _ = run(2, method="linear_probe", **mixing)
    again, _ = run(2, method="linear_probe", **mixing)
    assert float(plain.sums["loss"]) != float(mixed.sums["loss"])
    assert trees.leaf_hashes(mixed) == trees.leaf_hashes(again)


def test_random_numbers_differ_from_step_to_step_and_from_device_to_device():
    still = {"method": "linear_probe", "optimizer": optim.Group("sgd", lr_mult=0.0), "mixup": 0.3}
    batch = make_batch(4)
    half = {"train": {name: values[:2] for name, values in batch["train"].items()}}
    twice = {"train": {name: np.concatenate([values, values]) for name, values in half["train"].items()}}
    one, two = (run(count, [batch] * count, **still)[0].sums["loss"] for count in (1, 2))
    assert two - one != pytest.approx(one, rel=1e-4)  # the same parameters and batch, other draws
    alone = run(1, [half], devices=jax.devices()[:1], **still)[0].sums["loss"]
    both = run(1, [twice], mode="pmap", devices=jax.devices()[:2], **still)[0].sums["loss"]
    assert both != pytest.approx(2 * alone, rel=1e-4)  # each device has the same two examples


def test_evaluation_does_not_depend_on_devices_or_mode():
    model, variables = initial_variables("resnet8_cifar", 4, 16)
    images = make_batch(8)["train"]["image"]
    outputs = []
    for mode, devices in [("jit", 1), ("jit", 4), ("pmap", 4)]:
        parallel = sharding.make_parallel(mode, jax.devices()[:devices])
        evaluate = parallel.evaluate(steps.make_eval_step(make_reader(model, 4), TASK))
        outputs.append(jax.device_get(evaluate(parallel.place(variables), parallel.put_batch(images))))
    assert outputs[0].keys() == {"logits", "features"}
    for found in outputs[1:]:
        for name, values in outputs[0].items():
            np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def compiled_cost(method, last_k=0):
    """Compiled FLOPs and temporary bytes of a ViT-B/16 training step with clipping and logging; nothing runs."""
    model = models.get("vit_base_patch16_224").module(num_classes=1000)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    plan = make_plan(model, variables, sharding.make_parallel("jit", jax.devices()[:1]), 1000, method, last_k)
    tx = make_tx(plan, optim.Group("adamw"), 1e-3)
    state = jax.eval_shape(lambda v: steps.init_state(plan, tx, v, {}, 0), variables)
    step, shape = steps.make_train_step(plan, tx), jax.ShapeDtypeStruct
    batch = as_batch(shape((2, 224, 224, 3), jnp.uint8), shape((2,), jnp.int32))
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


@pytest.fixture
def optimised():
    """Costs are those of programs as they are compiled outside the tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
def test_a_head_only_step_costs_at_most_034_of_the_full_step_with_clipping_and_logging(optimised):
    full, full_memory = compiled_cost("full")
    head, head_memory = compiled_cost("linear_probe")
    block, _ = compiled_cost("last_k", 1)
    assert head / full <= 0.34 and block / full <= 0.39, (head / full, block / full)
    assert head_memory <= 0.05 * full_memory


def test_the_weight_of_a_term_follows_the_progress_of_its_phase_not_of_the_run():
    model, variables = initial_variables("resnet8_cifar", 4, 16)
    plan = make_plan(model, variables, sharding.make_parallel(), 4, "linear_probe", start=10, length=20)
    plan = plan._replace(method=term.Method({term.TASK: (lambda progress: progress, term.make_task_term())}))
    tx = make_tx(plan, optim.Group("sgd"), clip=0.0)
    train, state = jax.jit(steps.make_train_step(plan, tx)), steps.init_state(plan, tx, variables, {}, 0)

    def moved(at):
        after = train(state._replace(step=jnp.int32(at)), make_batch())
        return np.asarray(after.params["head"]["kernel"] - state.params["head"]["kernel"])

    np.testing.assert_array_equal(moved(10), 0)
    np.testing.assert_allclose(4 * moved(15), moved(30), rtol=1e-3, atol=1e-6)
    assert np.abs(moved(30)).max() > 1e-4


def test_inputs_are_shifted_by_the_mean_and_scaled_by_the_deviation_of_the_card():
    card = Card("test", 4, 16, mean=(0.2, 0.5, 0.7), std=(0.1, 0.3, 2.0))
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype(np.uint8)
    expected = (images / 255.0 - np.array(card.mean)) / np.array(card.std)
    np.testing.assert_allclose(steps.normalise(jnp.asarray(images), card), expected, rtol=1e-5, atol=1e-5)


def test_batch_sizes_that_do_not_divide_are_refused_with_the_multiple_to_use():
    with pytest.raises(ValueError, match="use a multiple of 8"):
        sharding.check_batch_size(20, 2, 4)
    with pytest.raises(ValueError, match="unknown parallel mode 'pmapp'"):
        sharding.make_parallel("pmapp")
