"""A full disk: each file that cannot be written is named, nothing half-written stays, and the same command goes on.

A limit on the size of files (EFBIG) stands for the full disk (ENOSPC): both come from the write itself.
"""

import contextlib
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

from tl_jax import tasks
from tl_jax.core import files
from tl_jax.core.card import Card
from tl_jax.data.readers import pack
from tl_jax.runtime import leaves
from tl_jax.runtime.log import RunLog
from tl_jax.studies import store, worker
from tl_jax.weights import formats

ROOT = pathlib.Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_predictions(folder):
    numbers = np.zeros((500, 2), np.float32)
    spec = tasks.Spec(class_names=("a", "b"))
    made = tasks.make_predictions({"logits": numbers}, np.zeros(500, int), list(map(str, range(500))), spec)
    tasks.save_predictions(folder / "predictions.npz", made)


def log_rows(folder):
    with RunLog(folder, [], 0, 10, verbose=False) as log:
        for step in range(200):
            log.write(step, {"train/loss": 1.0})


def write_to_log(folder):
    with worker.output_into(folder / "log.txt"):
        print("x" * 5000)


WRITERS = {
    "config.json": lambda folder: files.write_json(folder / "config.json", {"a": "x" * 5000}),
    "model.safetensors": lambda folder: formats.write_safetensors(
        folder / "model.safetensors", {"a": np.zeros(2000, np.float32)}, {"card": Card("resnet18", 2).to_json()}
    ),
    "predictions.npz": save_predictions,
    "leaves": lambda folder: leaves.write(folder, {"a": np.zeros(2000, np.float32)}, "{}"),
    "index": lambda folder: leaves.write(folder, {"a": np.zeros(2, np.float32)}, f'"{"x" * 5000}"'),
    "metrics.jsonl": log_rows,
    "log.txt": write_to_log,
    "failed.json": lambda folder: store.fail(folder, "x" * 5000, 1),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_written_is_named(tmp_path, name):
    with largest_file(4096), pytest.raises(OSError, match=r"File too large: '.*/" + name) as error:
        WRITERS[name](tmp_path)
    assert error.value.errno and "\n" not in str(error.value)
    kept = {"metrics.jsonl", "timing.jsonl", "log.txt"} | ({"index", "leaves"} if name == "index" else set())
    assert {path.name for path in tmp_path.iterdir()} <= kept
    WRITERS[name](tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    from test_probe import fit, make_run

    run = make_run("ridge", (1.0,), cache="features", cache_dir=str(tmp_path / "cache"))
    with largest_file(20_000), pytest.raises(OSError, match=r"File too large: '.*/features.bin'"):
        fit(run, tmp_path / "run")
    fit(run, tmp_path / "run")
    run = make_run("ridge", (1.0,), cache="features", cache_dir="/proc/x")
    with pytest.raises(OSError, match="cache_dir = '/proc/x' cannot be written"):
        fit(run, tmp_path / "other")


def test_a_pack_that_cannot_be_written_is_named_and_goes_on(tmp_path):
    with largest_file(100_000), pytest.raises(OSError, match=str(tmp_path / "packed")):
        pack.pack("digits", str(tmp_path / "packed"), ["test"], num_workers=0)
    pack.pack("digits", str(tmp_path / "packed"), ["test"], num_workers=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [20, pytest.param(150, marks=pytest.mark.exhaustive)])
def test_a_run_whose_disk_is_full_ends_in_one_line_and_the_same_command_finishes(tmp_path, size):
    """size: of the largest file, in KiB: the exported weights, or a checkpoint, which is written in the background."""
    options = ["--config", "configs/smoke.py", "--config.method.name=full", "--config.total=(8.0,'steps')"]
    options = options if size == 150 else options[:2]

    def launch(name, limit="unlimited"):
        command = [sys.executable, "launch.py", *options, "--workdir", str(tmp_path / name)]
        shell = ["bash", "-c", f'ulimit -f {limit} && exec "$@"', "bash", *command]
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        done = subprocess.run(shell, cwd=ROOT, env=environment, text=True, capture_output=True)
        return done.returncode, done.stdout + done.stderr

    assert launch("whole")[0] == 0
    code, output = launch("broken", size)
    assert code == 2 and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith("error: [Errno 27] File too large: '"), output
    assert launch("broken")[0] == 0
    names = ("result.json", "metrics.jsonl", "model.safetensors")
    whole, broken = ([(tmp_path / run / name).read_bytes() for name in names] for run in ("whole", "broken"))
    assert whole == broken
