"""Divided parameters (FSDP): the numbers of data parallelism, in a part of the memory, and through every checkpoint."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plans import as_batch, make_plan, make_reader, make_tx

from configs import smoke
from tl_jax import config as options
from tl_jax import models, tasks
from tl_jax.core import trees
from tl_jax.models.vit import ViT
from tl_jax.runtime import sharding
from tl_jax.runtime.checkpoint import Checkpoints
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import optim, steps
from tl_jax.training.train import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
FSDP = 128
CLASSES = 8
TASK = tasks.make(tasks.Spec(class_names=tuple("abcdefgh")))
# Adam divides small gradients by their size: an epsilon above rounding errors keeps the comparison one of numbers.
ADAM = optim.Group("adamw", (("eps", 1e-3),), weight_decay=1e-2)


def make_vit(width=32, depth=1):
    return ViT(num_classes=CLASSES, patch_size=8, width=width, depth=depth, heads=2, image_size=16, head_init="lecun")


def make_resnet():
    return models.get("resnet8_cifar").module(num_classes=CLASSES, head_init="lecun")


def make_batch(size, seed):
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (size, 16, 16, 3)), rng.integers(0, CLASSES, size)
    return as_batch(images.astype(np.uint8), labels.astype(np.int32))


def setup(make, parallel, method="full", accumulate=1):
    """The train function of a network that trains whole or in part, its state, and what both are made of."""
    model = make()
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    plan = make_plan(model, variables, parallel, CLASSES, method, accumulate=accumulate, ema=0.9)
    tx = make_tx(plan, ADAM, 1e-2)
    state = steps.init_state(plan, tx, variables, {}, 0)
    return model, steps.make_train_step(plan, tx), parallel.place(jax.tree.map(jnp.array, state))


def run(make, devices, fsdp, count=3, **choices):
    """The state after some steps, what the step costs, and the logits of an evaluation with it."""
    parallel = sharding.make_parallel("jit", jax.devices()[:devices], fsdp)
    model, step, state = setup(make, parallel, **choices)
    train_fn, cost = parallel.compile(step, state, parallel.put_batch(make_batch(16, 0)))
    for seed in range(count):
        state = jax.block_until_ready(train_fn(state, parallel.put_batch(make_batch(16, seed))))
    evaluate = parallel.evaluate(steps.make_eval_step(make_reader(model, CLASSES), TASK))
    images = parallel.put_batch(make_batch(16, 9))["train"]["image"]
    return state, cost, jax.device_get(evaluate(steps.eval_variables(state), images))


def assert_close(left, right, rtol=1e-5, atol=1e-6):
    flat_left, flat_right = trees.flatten(left), trees.flatten(right)
    assert flat_left.keys() == flat_right.keys()
    for path, leaf in flat_left.items():
        np.testing.assert_allclose(leaf, flat_right[path], rtol=rtol, atol=atol, err_msg=path)


def check_divided(state, devices):
    """Every leaf that the rule divides lies on each device in its part alone, the others whole."""
    divided = {}
    for path, leaf in trees.flatten(state._replace(sums={}, key=jnp.zeros(2))).items():
        parts = {shard.data.size for shard in leaf.addressable_shards} if path != "key" else {2}
        cut = leaf.size >= FSDP and any(size % devices == 0 for size in leaf.shape)
        assert parts == {leaf.size // devices if cut else leaf.size}, path
        divided[path] = cut
    for beginning in ("params/", "opt_state/", "ema/"):
        assert sum(cut for path, cut in divided.items() if path.startswith(beginning)) >= 8, beginning
    return divided


def compare(make, others, rtol=1e-5, atol=1e-6, **choices):
    """FSDP against (devices, fsdp) in `others`: losses, parameters, moments, averages and logits."""
    divided, divided_cost, divided_logits = run(make, jax.device_count(), FSDP, **choices)
    for devices, fsdp in others:
        other, cost, logits = run(make, devices, fsdp, **choices)
        assert_close(other.sums, divided.sums, rtol=1e-5)
        assert_close(other._replace(sums={}), divided._replace(sums={}), rtol, atol)
        np.testing.assert_allclose(divided_logits["logits"], logits["logits"], rtol=1e-4, atol=1e-5)
        # The work of all devices; Adam's is done once where it is divided, and by every device where it is not.
        if devices == 1:
            assert divided_cost["flops_per_step"] == pytest.approx(cost["flops_per_step"], rel=0.1)
    return divided


def argument_bytes(make, devices, fsdp):
    parallel = sharding.make_parallel("jit", jax.devices()[:devices], fsdp)
    _, step, state = setup(make, parallel)
    compiled = parallel.train(step).lower(state, parallel.put_batch(make_batch(devices, 0))).compile()
    return compiled.memory_analysis().argument_size_in_bytes, compiled.as_text()


@pytest.mark.slow
def test_divided_parameters_give_the_numbers_of_one_device_and_lie_in_parts():
    check_divided(compare(make_vit, [(1, 0)], count=2), 4)


@pytest.mark.slow
@pytest.mark.parametrize("choices", [{"method": "bitfit"}, {"method": "linear_probe"}, {"accumulate": 2}])
def test_divided_parameters_give_the_same_numbers_in_every_kind_of_step(choices):
    compare(make_vit, [(1, 0)], **choices)


def eight_devices():
    """Run in a process of its own, as the number of simulated devices is fixed when jax starts."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 8
    check_divided(compare(make_vit, [(1, 0), (8, 0)]), 8)
    # BatchNorm divides by small variances, which makes rounding errors of gradients larger.
    compare(make_resnet, [(1, 0), (8, 0)], rtol=1e-3, atol=1e-5)
    jax.config.update("jax_disable_most_optimizations", False)
    large = functools.partial(make_vit, width=128, depth=2)
    (plain, _), (divided, text) = (argument_bytes(large, 8, fsdp) for fsdp in (0, FSDP))
    assert divided < 1.05 * plain / 8, (divided, plain)
    # What travels is parameters and their gradients, never activations of the whole batch: 8 images of 5 tokens.
    gathered = [line.split(" all-gather(")[0] for line in text.splitlines() if " all-gather(" in line]
    assert gathered and not any("[8,5," in line for line in gathered), gathered


@pytest.mark.slow
@pytest.mark.exhaustive  # two processes, and eight devices of whole runs, are in CI
def test_on_eight_devices_the_numbers_are_the_same_and_a_device_holds_an_eighth():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    code = "import sys; sys.path[:0] = ['tests', '.']; import test_sharding; test_sharding.eight_devices()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_largest_axis_that_the_devices_divide_is_cut_and_small_leaves_stay_whole():
    parallel = sharding.make_parallel(fsdp=100)
    shapes = {
        (3, 3, 64, 128): (None, None, None, "data"), (128, 64): ("data",), (10, 64): (None, "data"),
        (64, 64): ("data",), (8, 12): (), (101, 7): (), (100,): ("data",), (): (),
    }  # fmt: skip
    for shape, axes in shapes.items():
        assert parallel.shardings(jax.ShapeDtypeStruct(shape, jnp.float32)).spec == jax.P(*axes), shape
    off = sharding.make_parallel()
    assert all(off.shardings(jax.ShapeDtypeStruct(shape, jnp.float32)).spec == jax.P() for shape in shapes)
    with pytest.raises(ValueError, match=r"fsdp=100 .* set parallel='jit' or fsdp=0"):
        sharding.make_parallel("pmap", fsdp=100)


@pytest.mark.slow
def test_a_checkpoint_of_divided_leaves_is_restored_on_other_devices_and_undivided(tmp_path):
    parallel = sharding.make_parallel(fsdp=FSDP)
    _, _, state = setup(make_vit, parallel)
    hashes = trees.leaf_hashes(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    for devices, fsdp in [(4, FSDP), (2, FSDP), (4, 0), (1, FSDP)]:
        other = sharding.make_parallel("jit", jax.devices()[:devices], fsdp)
        with Checkpoints(tmp_path) as checkpoints:
            restored = checkpoints.restore(1, other.place(jax.tree.map(jnp.zeros_like, state)))
        assert trees.leaf_hashes(restored) == hashes
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, restored, other.shardings(state)))


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_with_divided_parameters_is_the_run_without_and_resumes_bit_for_bit(tmp_path):
    """Through both phases, an interruption, the choice of a checkpoint, the proof and the files that it leaves."""
    changes = {
        "ema": 0.9,
        "method.name": "full",
        "phases": ((("total", (2, "steps")), ("method.name", "linear_probe")), (("total", (2, "steps")),)),
    }
    plain = options.override(smoke.get_config(), changes)
    divided = options.override(plain, {"fsdp": 256})
    results = [train(plain, tmp_path / "plain", verbose=False), train(divided, tmp_path / "divided", verbose=False)]
    assert results[0]["metrics"]["confusion"] == results[1]["metrics"]["confusion"]
    for row, other in zip(read(tmp_path / "plain"), read(tmp_path / "divided"), strict=True):
        assert other == pytest.approx(row, rel=1e-4)
    with pytest.raises(Preempted):
        train(divided, tmp_path / "broken", verbose=False, stop_requested=lambda step: step == 3)
    train(divided, tmp_path / "broken", verbose=False)
    for name in ("metrics.jsonl", "result.json", "audit.json", "trained.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "divided" / name).read_bytes(), name


LAST = {"method.name": "last_k", "method.k": 1, "total": (2.0, "steps"), "cache": "features"}
PLACED = {
    "pmap, cached features": ({"parallel": "pmap"}, LAST),
    "fsdp, cached features, average": ({"fsdp": 256}, {**LAST, "ema": 0.9}),
    "fsdp, remat, parts": ({"fsdp": 256, "model.remat": "block"}, {"method.name": "full", "accumulate": 2}),
}


@pytest.mark.parametrize(
    "name", [next(iter(PLACED)), *(pytest.param(x, marks=pytest.mark.slow) for x in [*PLACED][1:])]
)
@pytest.mark.slow
def test_where_things_lie_changes_no_number_of_a_run(tmp_path, name):
    placement, changes = PLACED[name]
    results = {}
    for folder, more in {"plain": {}, "placed": placement}.items():
        folders = {"cache_dir": str(tmp_path / folder / "cache")} if "cache" in changes else {}
        config = options.override(smoke.get_config(), {**changes, **folders, **more})
        results[folder] = train(config, tmp_path / folder, verbose=False)
    assert results["plain"]["metrics"]["confusion"] == results["placed"]["metrics"]["confusion"]
    for row, other in zip(*(read(tmp_path / folder) for folder in results), strict=True):
        assert other == pytest.approx(row, rel=1e-4)


@pytest.mark.slow
def test_the_cost_of_a_step_in_parts_is_that_of_all_its_parts():
    parallel = sharding.make_parallel("jit", jax.devices()[:1])
    (_, whole, state), (_, parts, _) = (setup(make_vit, parallel, accumulate=accumulate) for accumulate in (1, 4))
    batch = parallel.put_batch(make_batch(128, 0))
    (_, cost), (compiled, looped) = parallel.compile(whole, state, batch), parallel.compile(parts, state, batch)
    assert looped["flops_per_step"] == pytest.approx(cost["flops_per_step"], rel=0.05)
    assert compiled.cost_analysis()["flops"] < 0.5 * cost["flops_per_step"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_divide_parameters_between_them(tmp_path):
    from test_distributed import finish, launch, losses

    options_ = ["--config.method.name=full", "--config.eval_batch_size=10"]
    finish(launch(1, tmp_path / "one", *options_))
    finish(launch(2, tmp_path / "two", *options_, "--config.fsdp=256"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["metrics"]["confusion"] == results[1]["metrics"]["confusion"]
    assert (tmp_path / "two" / "trained.safetensors").exists()
