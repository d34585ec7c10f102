"""SIGTERM is answered within seconds whatever a process does, and the same command then ends in the same numbers."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
BOUND = 5.0  # seconds; a machine under load gets TRIES
TRIES = 3
SMALL = [
    "--config.data.train=train[:5%]", "--config.data.val=train[97%:]", "--config.data.test=test[:8%]",
    "--config.model.image_size=16", "--config.data.shots=0", "--config.batch_size=8", "--config.resamples=5",
]  # fmt: skip
RUN = ["--config", "configs/smoke.py", *SMALL, "--config.total=(8,'steps')", "--config.eval_every=(3,'steps')"]

# Runs a command line in which one function blocks for long, in code that lets no python signal handler run.
BLOCKED = """
import importlib, os, sys, zlib
from tl_jax.studies import command, worker

def block():
    print("NOW", flush=True)
    data = os.urandom(2**24)
    while True:
        zlib.compress(data * 8, 9)

place, name, number = sys.argv[1:4]
module, _, owner = place.partition(":")
owner = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
real, calls = getattr(owner, name), []

def patched(*args, **kwargs):
    calls.append(1)
    if len(calls) == int(number):
        block()
    return real(*args, **kwargs)

setattr(owner, name, patched)
sys.exit(command.main(sys.argv[4:]))
"""
# What a run may be at, in the order of a run; the third: which call of it, with steps that no checkpoint has yet.
MOMENTS = {
    "data are loaded": ("tl_jax.training.inputs", "load_sources", 1),
    "weights are loaded": ("tl_jax.training.build", "load_model", 1),
    "steps are compiled": ("tl_jax.runtime.sharding:Parallel", "compile", 1),
    "val is scored after steps": ("tl_jax.training.evaluate", "collect", 1),
    "a batch is waited for after steps": ("tl_jax.runtime.sharding:Parallel", "put_batch", 10),
    "test is scored": ("tl_jax.training.artifacts", "wanted_splits", 1),
    "metrics are computed": ("tl_jax.tasks", "summarize", 1),
    "weights are written": ("tl_jax.weights.load", "export", 1),
    "the result is written": ("tl_jax.core.manifest", "write", 1),
    "figures are drawn": ("tl_jax.training.plots", "draw_run", 1),
}


def start(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def stop(process):
    """The exit code, the seconds until the process had ended, and what it printed since."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    return process.returncode, time.monotonic() - began, output


def finish(*words):
    process = start(*words)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def same(one, other):
    """Two workdirs, or what lies in them, with the same results bit by bit."""
    found = {path.relative_to(one): path.read_bytes() for path in one.rglob("result.json")}
    assert found and found == {path.relative_to(other): path.read_bytes() for path in other.rglob("result.json")}
    lines = {path.relative_to(one): path.read_bytes() for path in one.rglob("metrics.jsonl")}
    assert lines == {path.relative_to(other): path.read_bytes() for path in other.rglob("metrics.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of the run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "w"
    finish("launch.py", *RUN, "--workdir", folder)
    return folder


def stop_blocked(moment, *words):
    """Starts, and stops when it blocks."""
    for _ in range(TRIES):
        process = start("-c", BLOCKED, *MOMENTS[moment], *words)
        before = []
        for line in process.stdout:
            before.append(line)
            if line == "NOW\n":
                break
        code, seconds, output = stop(process)
        assert code == 75 and "the same command goes on from there" in output, "".join([*before, output])
        assert "a stop was asked for" in output
        if seconds < BOUND:
            return
    pytest.fail(f"SIGTERM while {moment} was answered after {seconds:.1f} s")


@pytest.mark.slow
def test_a_run_that_blocks_as_it_compiles_and_as_it_scores_is_stopped_and_goes_on_to_the_same_numbers(tmp_path, whole):
    for moment, saved in (("steps are compiled", []), ("val is scored after steps", ["3"])):
        stop_blocked(moment, *RUN, "--workdir", tmp_path / "w")
        steps = [path.name for path in (tmp_path / "w" / "checkpoints").iterdir() if path.name.isdigit()]
        assert steps == saved  # the steps before val was scored are not lost
    finish("launch.py", *RUN, "--workdir", tmp_path / "w")
    same(tmp_path / "w", whole)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_blocks_anywhere_is_stopped_and_goes_on_to_the_same_numbers(tmp_path, whole, moment):
    stop_blocked(moment, *RUN, "--workdir", tmp_path / "w")
    finish("launch.py", *RUN, "--workdir", tmp_path / "w")
    same(tmp_path / "w", whole)


STUDY = """
\"\"\"Which rate?\"\"\"
from configs import smoke
from tl_jax import config as options
from tl_jax.studies.study import Study

SMALL = {SMALL}

def get_study(arg):
    base = options.parse(smoke.get_config(), [word.removeprefix("--config.") for word in SMALL])
    rates = {{"low": {{"lr": 1e-3}}, "high": {{"lr": 1e-2}}, "last": {{"method.name": "last_k", "method.k": 1}}}}
    return Study(base, {{"rate": rates}}, seeds=(0, 1))
"""
PROBE = ["--config.select=last", "--config.method.name"]
PHASES = "--config.phases=((('total',(2,'steps')),),(('total',(6,'steps')),('method.name','last_k'),('method.k',1)))"
KINDS = {
    "a gradient training": [],
    "several phases": [PHASES],
    "cached features": ["--config.cache=features", "--config.cache_dir={folder}/cache"],
    "nearest neighbours": [*PROBE[:1], f"{PROBE[1]}=knn"],
    "a logistic probe": [*PROBE[:1], f"{PROBE[1]}=logistic"],
    "leave-one-out": [*PROBE[:1], f"{PROBE[1]}=ridge", "--config.method.grid=(1.0,)", "--config.data.resample=loo",
                      "--config.data.val=", "--config.data.test="],
    "replicas": ["--config.replicas=((('lr',1e-3),),(('lr',1e-2),))"],
    "arms and seeds": ["--config.seeds=(1,)", "--config.baseline=(('lr',0.5),)"],
    "a big test set": ["--config.data.test=test", "--config.eval_batch_size=4"],
    "many resamples": ["--config.resamples=20000"],
    "worker processes": ["--config.data.workers=1"],
    "a study": None,
}  # fmt: skip


def command_of(kind, folder):
    if KINDS[kind] is None:
        (folder / "study").mkdir(parents=True)
        (folder / "study" / "study.py").write_text(STUDY.format(SMALL=SMALL))
        return ["launch.py", "--study", folder / "study", "--jobs", "1", "--workdir", folder / "w"]
    given = [word.format(folder=folder) for word in KINDS[kind]]
    return ["launch.py", *RUN, *given, "--workdir", folder / "w"]


CI = ("several phases", "cached features", "a study", "predict")  # of those that follow


def each(names):
    return [pytest.param(name, marks=() if name in CI else pytest.mark.exhaustive) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("kind", each(KINDS))
def test_every_kind_of_run_is_stopped_at_random_moments_and_ends_in_the_same_numbers(tmp_path, kind):
    (tmp_path / "whole").mkdir(), (tmp_path / "stopped").mkdir()
    began = time.monotonic()
    finish(*command_of(kind, tmp_path / "whole"))
    took, draw = time.monotonic() - began, random.Random(kind)
    command, late = command_of(kind, tmp_path / "stopped"), []
    for _ in range(5):
        process = start(*command)
        time.sleep(draw.uniform(0.3, took))
        code, seconds, output = stop(process)
        assert code in (0, 75) or (code == -signal.SIGTERM and not output), output  # before it watches
        late += [seconds] if seconds >= BOUND else []
        if code == 0:
            break
    assert len(late) <= 1, f"answered after {late} s"  # one: machines under load
    finish(*command)
    same(tmp_path / "whole" / "w", tmp_path / "stopped" / "w")


@pytest.mark.slow
@pytest.mark.parametrize("name", each(["predict", "evaluate", "soup", "wise_ft", "pack", "report"]))
def test_every_other_command_ends_at_once_and_does_its_work_when_it_is_started_again(tmp_path, whole, name):
    """It has nothing to save: the signal ends it, as any program that does not ask for it."""
    out, photos = tmp_path / "out", tmp_path / "photos"
    for i in range(600):
        path = photos / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    if name == "report":
        finish(*command_of("a study", tmp_path))
    given = {
        "predict": [whole, photos, "--out", tmp_path / "rows.csv", "--batch-size", "4"],
        "evaluate": [whole, "digits", "--split", "test", "--batch-size", "4", "--out", tmp_path / "scored.npz"],
        "soup": [whole, whole, "--out", out],
        "wise_ft": [whole, whole, "--out", out],
        "pack": [f"folder:{photos}", out, "--size", "32", "--workers", "1"],
        "report": [tmp_path / "w"],
    }
    command = ["-m", "tl_jax", name, *given[name]]
    draw = random.Random(name)
    for _ in range(3):
        process = start(*command)
        time.sleep(draw.uniform(0.3, 8))
        code, seconds, output = stop(process)
        assert code in (0, -signal.SIGTERM) and seconds < BOUND, output
    finish(*command)
    left = list(tmp_path.rglob("*.tmp"))
    assert not left
