"""Checkpoints: exact, verified, and never silently wrong."""

import errno
import gc
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax.core import trees
from tl_jax.runtime import checkpoint, leaves, sharding
from tl_jax.runtime.checkpoint import Checkpoints
from tl_jax.runtime.preemption import Preempted
from tl_jax.training.build import build
from tl_jax.training.loop import Loop
from tl_jax.training.single import Single
from tl_jax.training.train import train


def state(value: float):
    return {"params": {"a": jnp.full((64, 64), value), "b": jnp.arange(5)}, "step": jnp.asarray(int(value), jnp.int32)}


# orbax abandons its other reads when one fails; Python reports those when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def collect_here():
    """Has Python report them here."""
    yield
    gc.collect()


@pytest.fixture
def folder(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"class_names": ["x"]}, keep={1})
    return tmp_path


def test_a_clock_that_jumps_during_a_save_ends_no_run(tmp_path, monkeypatch):
    now, write, years = time.time(), leaves.write, []
    monkeypatch.setattr(time, "time", lambda: now + 365 * 86400 * len(years))
    monkeypatch.setattr(leaves, "write", lambda *given: (years.append(1), write(*given)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1] and years


def test_a_checkpoint_comes_back_bit_equal(folder):
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore_latest(lambda step: state(0))
        assert restored.step == 3 and not restored.damaged
        assert trees.leaf_hashes(restored.state) == trees.leaf_hashes(state(3))
        assert checkpoints.meta(3)["class_names"] == ["x"]


def test_kept_and_newest_checkpoints_stay_and_others_go(folder):
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.save(4, state(4), {}, keep={1})
        checkpoints.save(5, state(5), {}, keep={1})
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [1, 4, 5]


def data_files(folder: pathlib.Path, step: int) -> list[pathlib.Path]:
    return sorted(p for p in (folder / str(step) / "state").rglob("*") if p.is_file() and p.stat().st_size)


def test_a_flipped_bit_is_found_or_harmless_in_every_file(folder):
    """Whatever it hits, leaves or what is said of them; what is restored as step 3 must be exactly step 3."""
    found = 0
    for path in data_files(folder, 3):
        whole = path.read_bytes()
        for position in np.linspace(0, len(whole) - 1, 4).astype(int):
            flipped = bytearray(whole)
            flipped[position] ^= 0x10
            path.write_bytes(flipped)
            with Checkpoints(folder) as checkpoints:
                try:
                    back = checkpoints.restore(3, state(0))
                except ValueError as error:
                    found += 1
                    assert "3" in str(error)
                else:
                    assert trees.leaf_hashes(back) == trees.leaf_hashes(state(3))
        path.write_bytes(whole)
    assert found == 8  # in all that is ours; orbax's own mark holds nothing


def damage(folder, step):
    for path in data_files(folder, step):
        path.write_bytes(b"\0" * path.stat().st_size)


def test_a_damaged_checkpoint_is_passed_over_and_named(folder):
    damage(folder, 3)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore_latest(lambda step: state(0))
        assert restored.step == 2 and len(restored.damaged) == 1 and "/3 " in restored.damaged[0]
        assert trees.leaf_hashes(restored.state) == trees.leaf_hashes(state(2))
        assert checkpoints.steps() == [1, 2]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_by_itself(folder):
    for step in (1, 2, 3):
        damage(folder, step)
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match=r"no checkpoint .* is intact"):
        checkpoints.restore_latest(lambda step: state(0))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(lambda step: state(0)) is None


def test_a_full_disk_is_an_error_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(OSError, match=r"no room for the checkpoint of step 4.*10 are free.*resumes from step 3"):
            checkpoints.save(4, state(4), {})
        assert checkpoints.steps() == [1, 2, 3]


def big_state(value: float):
    """More than fits one write, with an odd number of bytes, a scalar, an empty leaf and a type that numpy lacks."""
    return {
        "a": jnp.full((leaves.CHUNK // 4 + 1000,), value),
        "b": jnp.full((3, 5), value, jnp.bfloat16),
        "c": jnp.full((7,), int(value), jnp.uint8),
        "d": jnp.zeros((0, 4)),
        "step": jnp.asarray(int(value), jnp.int32),
    }


def test_every_type_and_size_comes_back_and_the_file_is_as_long_as_its_leaves(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, big_state(1), {})
        checkpoints.wait()
        restored = checkpoints.restore(1, big_state(0))
    assert trees.leaf_hashes(restored) == trees.leaf_hashes(big_state(1))
    assert (tmp_path / "1" / "state" / "leaves").stat().st_size == sum(x.nbytes for x in big_state(1).values())


@pytest.mark.slow
def test_what_is_saved_is_the_state_at_that_moment_though_steps_take_over_its_memory(tmp_path):
    def steps(state):
        return jax.tree.map(lambda x: x + 1, state)

    step, state = jax.jit(steps, donate_argnums=0), big_state(0)
    rows: list[dict] = []
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.prepare(state)
        for done in range(1, 5):
            state = step(state)
            checkpoints.save(done, state, {"rows": rows}, keep={1, 2, 3, 4})
            rows.append({"step": done})
            for _ in range(3):
                state = jax.tree.map(lambda x: x - 1, step(step(state)))
                state = jax.tree.map(lambda x: x - 1, state)
        checkpoints.wait()
        for done in range(1, 5):
            assert trees.leaf_hashes(checkpoints.restore(done, state)) == trees.leaf_hashes(big_state(done))
            assert checkpoints.meta(done)["rows"] == rows[: done - 1]


def test_saves_take_turns_in_the_same_memory(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.prepare(big_state(0))
        places = []
        for done in range(1, 4):
            checkpoints.save(done, big_state(done), {})
            places.append(checkpoints._copy["a"].unsafe_buffer_pointer())  # jax may place small ones anew
    assert places[0] == places[1] == places[2]


def test_a_device_without_room_for_the_copy_has_it_in_the_hosts_memory(tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(checkpoint, "_copy_fresh", full)
    with Checkpoints(tmp_path) as checkpoints:
        for done in (1, 2):
            checkpoints.save(done, state(done), {})
        checkpoints.wait()
        assert trees.leaf_hashes(checkpoints.restore(2, state(0))) == trees.leaf_hashes(state(2))


def test_leaves_that_lie_on_several_devices_are_saved_whole_and_come_back_to_them(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tree = {"cut": jax.device_put(np.arange(8.0), cut), "whole": jax.device_put(np.arange(8.0), whole)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        checkpoints.wait()
        restored = checkpoints.restore(1, tree)
    assert trees.leaf_hashes(restored) == trees.leaf_hashes(tree)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, tree)


def test_a_state_of_other_leaves_is_named(folder):
    other = {"params": {"a": jnp.zeros((64, 2)), "b": jnp.arange(5)}, "step": jnp.zeros((), jnp.int32)}
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(ValueError, match=r"params/a: 'int32\[64, 64\]' -> 'float32"),
    ):
        checkpoints.restore(3, other)


@pytest.mark.parametrize("when", ["open", "write"])
def test_a_file_system_that_must_use_its_cache_is_written_all_the_same(tmp_path, monkeypatch, when):
    refused, (opens, writes) = [], (os.open, os.write)

    def refuse(direct):
        if direct:
            refused.append(when)
            raise OSError(errno.EINVAL, "Invalid argument")

    def open_(path, flags, *rest, **kwargs):
        refuse(when == "open" and flags & os.O_DIRECT)
        return opens(path, flags, *rest, **kwargs)

    def write(file, data):
        refuse(when == "write" and not refused)
        return writes(file, data)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "write", write)
    arrays = {path: np.asarray(leaf) for path, leaf in big_state(1).items()}
    leaves.write(tmp_path, arrays, "{}")
    assert refused and trees.leaf_hashes(leaves.read(tmp_path, leaves.read_index(tmp_path))) == trees.leaf_hashes(
        arrays
    )


def test_an_error_in_the_background_is_raised_at_the_next_save_and_the_run_can_be_resumed(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = Checkpoints(folder)
    with monkeypatch.context() as patch:
        patch.setattr(leaves, "_write_whole", full)
        checkpoints.save(4, state(4), {})
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(5, state(5), {})
    checkpoints.close()
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore_latest(lambda step: state(0))
        assert restored.step == 3 and not restored.damaged
        checkpoints.save(4, state(4), {})
    assert sorted(path.name for path in folder.iterdir()) == ["3", "4"]  # and nothing temporary


CONSTANT = {"params/a": trees.leaf_hash(state(7)["params"]["a"])}


def with_constant(step, value=7):
    """The state of a step, of which a leaf is as it was when it began."""
    return {**state(step), "params": {**state(step)["params"], "a": state(value)["params"]["a"]}}


def test_what_is_constant_is_not_saved_and_comes_from_the_state_that_a_run_begins_with(tmp_path):
    with Checkpoints(tmp_path, CONSTANT) as checkpoints:
        checkpoints.prepare(with_constant(0))
        for step in (1, 2):
            checkpoints.save(step, with_constant(step), {})
        checkpoints.wait()
        restored = checkpoints.restore_latest(lambda step: with_constant(0))
        assert restored.step == 2 and trees.leaf_hashes(restored.state) == trees.leaf_hashes(with_constant(2))
        assert checkpoints.meta(2)["hashes"] == trees.leaf_hashes(with_constant(2))
    assert (tmp_path / "2" / "state" / "leaves").stat().st_size == 5 * 4 + 4
    with Checkpoints(tmp_path) as checkpoints:  # what the file says counts, not what this run would leave out
        assert trees.leaf_hashes(checkpoints.restore(2, with_constant(0))) == trees.leaf_hashes(with_constant(2))


def test_other_values_of_what_is_constant_are_named_and_no_damage_to_pass_over(tmp_path):
    with Checkpoints(tmp_path, CONSTANT) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, with_constant(step), {})
    found = trees.leaf_hash(state(8)["params"]["a"])
    with Checkpoints(tmp_path, CONSTANT) as checkpoints:
        with pytest.raises(checkpoint.OtherValues, match="/2 leaves out") as error:
            checkpoints.restore_latest(lambda step: with_constant(0, 8))
        assert f"params/a: '{CONSTANT['params/a']}' -> '{found}'" in str(error.value)
        assert checkpoints.steps() == [1, 2]


def test_a_checkpoint_that_holds_everything_is_read_by_a_run_that_would_leave_something_out(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, with_constant(1), {})
    with Checkpoints(tmp_path, CONSTANT) as checkpoints:
        back = checkpoints.restore(1, with_constant(0, 8))
    assert trees.leaf_hashes(back) == trees.leaf_hashes(with_constant(1))


def build_of(config):
    return build(config, sharding.make_parallel("jit"))


def constant(**changes):
    """The hashes of what checkpoints of a run leave out, and of all of its variables and memory."""
    run = build_of(options.override(smoke.get_config(), changes))
    hashes = Single(run, sharding.make_parallel("jit")).constant_hashes()
    return hashes, trees.leaf_hashes({**run.material.variables, "memory": run.material.memory})


def test_what_is_frozen_in_all_phases_and_is_in_the_file_is_left_out():
    left_out, everything = constant(**{"method.norm": (("backbone/stage1/.*", "update"), (".*", "frozen"))})
    moving = {path for path in everything if path.startswith(("params/head", "batch_stats/backbone/stage1"))}
    assert left_out == {path: sha256 for path, sha256 in everything.items() if path not in moving}
    last = {"method.name": "last_k", "method.k": 1}.items()
    both, _ = constant(phases=tuple((("total", (2.0, "steps")), *more) for more in ((), last)))
    assert both.keys() == {path for path in everything if "head" not in path and "stage3" not in path}
    assert constant(**{"model.weights": ""})[0] == {}  # sampled, perhaps otherwise on another device
    new, _ = constant(**{"model.reinit": ("stage3",)})
    assert new.keys() == both.keys()


def test_a_copy_that_a_penalty_keeps_of_the_file_is_left_out_and_what_it_computed_is_not():
    left_out, everything = constant(**{"method.name": "full", "terms": {"delta": {"examples": 4}}})
    reference = {path for path in everything if "/reference/" in path}
    computed = {path for path in everything if path.startswith("memory/delta/")}
    assert left_out.keys() == reference and left_out and computed


@pytest.mark.slow
def test_a_run_on_another_backbone_than_its_checkpoints_is_one_error(tmp_path):
    config = options.override(smoke.get_config(), {"method.name": "linear_probe", "resamples": 10})
    with pytest.raises(Preempted):
        train(config, tmp_path / "w", verbose=False, stop_requested=lambda done: done == 2)
    run = build_of(config)
    size = (tmp_path / "w" / "checkpoints" / "2" / "state" / "leaves").stat().st_size
    assert size < 10_000 < sum(leaf.nbytes for leaf in jax.tree.leaves(run.material.variables))

    kernel = "params/backbone/stem/conv/kernel"
    changed = {kernel: trees.flatten(run.material.variables)[kernel].at[0, 0, 0, 0].add(1e-3)}
    variables, parallel = trees.merge(run.material.variables, changed), sharding.make_parallel("jit")
    program = Single(run._replace(material=run.material._replace(variables=variables)), parallel)
    with Checkpoints(tmp_path / "w" / "checkpoints", program.constant_hashes()) as checkpoints:
        loop = Loop(program, checkpoints, {}, parallel, False, lambda done: False)
        with pytest.raises(
            checkpoint.OtherValues, match=r"/2 leaves out[\s\S]*stem/conv/kernel: '\w{64}' -> '\w{64}'\nLikely"
        ):
            loop.run()


KILLED = """
import pathlib, sys
import jax, jax.numpy as jnp
from tl_jax.runtime.checkpoint import Checkpoints

step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
state = {f"p{i}": jnp.zeros((1000, 1000)) for i in range(10)}
with Checkpoints(pathlib.Path(sys.argv[1])) as checkpoints:
    for done in range(1, 10_000):
        state = step(state)
        checkpoints.save(done, state, {})
        print(done, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_newest_committed_step_exact(tmp_path):
    like = {f"p{i}": jnp.zeros((1000, 1000)) for i in range(10)}
    root, rng = pathlib.Path(__file__).resolve().parents[1], np.random.default_rng(0)
    for attempt in range(6):
        command = [sys.executable, "-c", KILLED, str(tmp_path / str(attempt))]
        environment = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": ""}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            while int(process.stdout.readline()) < 3:
                pass
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            told = [int(line) for line in re.findall(r"\d+(?=\n)", process.stdout.read())] or [3]
        with Checkpoints(tmp_path / str(attempt)) as checkpoints:
            restored = checkpoints.restore_latest(lambda step: like)
        assert told[-1] - 1 <= restored.step <= told[-1] + 1 and not restored.damaged
        assert all((np.asarray(leaf) == restored.step).all() for leaf in restored.state.values())
