"""What a run leaves is on the disk, not only in the system's memory, before it has its name: power may fail."""

import os

import pytest

from configs import smoke
from tl_jax import config
from tl_jax.core import files
from tl_jax.training.train import train

ORBAX = {"commit_success.txt", "_CHECKPOINT_METADATA"}  # which nothing here reads
GROWING = {"log.txt", "metrics.jsonl", "timing.jsonl", ".lock"}  # a line that is lost is in the checkpoint too


@pytest.fixture
def forced(monkeypatch):
    """{inode: its size when it was last forced to the disk}."""
    sizes, fsync = {}, os.fsync

    def note(file):
        fsync(file)
        facts = os.fstat(file)
        sizes[facts.st_ino] = facts.st_size

    monkeypatch.setattr(os, "fsync", note)
    return sizes


def lost(folder, forced):
    """The files of a folder whose contents a power cut could take."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in GROWING | ORBAX]
    facts = {path: path.stat() for path in paths}
    return sorted(str(path.relative_to(folder)) for path, x in facts.items() if forced.get(x.st_ino) != x.st_size)


def test_a_file_is_forced_to_the_disk_before_it_has_its_name(tmp_path, forced, monkeypatch):
    named, replace = [], os.replace

    def note(source, target):
        named.append(forced.get(os.stat(source).st_ino) == os.stat(source).st_size)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    files.write_json(tmp_path / "table.json", {"a": 1})
    assert named == [True] and not lost(tmp_path, forced)


def test_a_run_leaves_nothing_that_a_power_cut_could_take(tmp_path, forced):
    few = {"total": (2.0, "steps"), "eval_every": (2.0, "steps"), "log_every": (1.0, "steps"), "resamples": 2}
    train(config.override(smoke.get_config(), few), tmp_path, verbose=False)
    assert {"result.json", "trained.safetensors", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert [*tmp_path.glob("checkpoints/2/state/leaves")]
    assert not lost(tmp_path, forced)
