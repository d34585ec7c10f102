"""Checkpoints: exact, verified, and never silently wrong."""

import gc
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import trees
from tl_jax.checkpoint import Checkpoints


def state(value: float):
    return {"params": {"a": jnp.full((64, 64), value), "b": jnp.arange(5)}, "step": jnp.asarray(int(value), jnp.int32)}


# orbax abandons its other reads when one fails; Python reports those when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect_here():
    """Has Python report them in the test that they belong to."""
    yield
    gc.collect()


@pytest.fixture
def folder(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"class_names": ["x"]}, keep={1})
    return tmp_path


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
    """A flip may hit bytes that carry no array; what is restored as step 3 must still be exactly step 3."""
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
    assert found > 5


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
