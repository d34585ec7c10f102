"""Every kind of training on several devices, and in processes of its own that are killed: the same numbers."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from walks import (
    IMAGES,
    KINDS,
    assert_same_training,
    image_config,
    kind_of,
    make_tables,  # noqa: F401
    make_teacher,  # noqa: F401
    remains,
    walk,
)

from tl_jax import config as options
from tl_jax.core import files
from tl_jax.weights import formats

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("norm_batches", ["joint", pytest.param("per_stream", marks=pytest.mark.slow)])
def test_four_devices_adapt_as_one_does(norm_batches, tables):
    config = kind_of("adaptation", tables, norm_batches=norm_batches)
    assert_same_training(walk(config), walk(config, devices=4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
def test_four_devices_train_as_one_does(kind, tables, teacher):
    config = kind_of(kind, tables, teacher)
    assert_same_training(walk(config), walk(config, devices=4))


# The same in processes of their own, as users start them: with optimised programs, on other devices, and killed.
PROGRAM = """
import json, sys
from tl_jax import config
from tl_jax.training.train import train
train(config.from_flat(json.load(open(sys.argv[1]))), sys.argv[2], verbose=False)
"""


def start(config, folder, devices=1):
    """Begins a run in a process of its own."""
    path = folder.parent / f"{folder.name}.json"
    path.write_text(json.dumps(options.flatten(config)))
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(path), str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process):
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output


def evaluations(folder):
    """How many evaluations metrics.jsonl holds."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"val/loss"') if path.exists() else 0


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "kind", [kind if kind in KINDS[:2] else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in KINDS]
)
def test_a_run_killed_at_random_moments_ends_bit_equal_to_an_unbroken_one(kind, tables, teacher, tmp_path):
    config = kind_of(kind, tables, teacher, total=(60.0, "steps"), eval_every=(4.0, "steps"))
    finish(start(config, tmp_path / "whole"))
    folder, kills = tmp_path / "w", 0
    for rows in sorted(random.Random(0).sample(range(1, 10), 3)):  # evaluations, of 15, after which it is killed
        process = start(config, folder)
        while process.poll() is None and evaluations(folder) < rows:
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    finish(start(config, folder))
    assert kills and remains(folder) == remains(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("norm_batches", ["joint", pytest.param("per_stream", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", IMAGES)
def test_eight_devices_train_the_configs_as_one_does(name, norm_batches, tmp_path):
    if norm_batches == "per_stream" and name != "dann_digits":
        pytest.skip("one stream")
    config = image_config(name, norm_batches=norm_batches)
    folders = {devices: tmp_path / f"{devices}" for devices in (1, 8)}
    for devices, folder in folders.items():
        finish(start(config, folder, devices))
    rows = [files.read_rows(folder / "metrics.jsonl") for folder in folders.values()]
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    weights = [formats.read(folder / "trained.safetensors")[0] for folder in folders.values()]
    assert weights[0].keys() == weights[1].keys()
    for path, leaf in weights[0].items():
        np.testing.assert_allclose(leaf, weights[1][path], rtol=1e-5, atol=1e-5, err_msg=path)
    results = [files.read_json(folder / "result.json")["metrics"]["count"] for folder in folders.values()]
    assert results[0] == results[1]
