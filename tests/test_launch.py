"""The front door as a user meets it: a subprocess, its output and its exit code."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest
from test_train import remains

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMOKE = ["--config", "configs/smoke.py"]


def start(*args, devices=1):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    return subprocess.Popen(
        [sys.executable, "launch.py", *map(str, args)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def launch(*args, **kwargs):
    process = start(*args, **kwargs)
    output, _ = process.communicate()
    return process.returncode, output


def test_the_smoke_config_runs_and_prints_audit_progress_and_result(tmp_path):
    code, output = launch(*SMOKE, "--workdir", tmp_path / "w")
    assert code == 0, output
    for part in ("transfer audit", "650 of", "step 4/4", "val accuracy", "images/s", "seed 0, digits test[:20%]"):
        assert part in output
    assert "Warning" not in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "configs/smok.py"], "configs/smoke.py"),
        ([*SMOKE, "--config.lrr=1"], "did you mean"),
        (["--config", "configs/smoke.py:modle=x"], "did you mean 'model'"),
        ([*SMOKE, "--config.model.name=resnet21_cifar"], "resnet20_cifar"),
        ([*SMOKE, "--config.data.source=folder:/nowhere/at/all"], "/nowhere/at/all"),
        ([*SMOKE, "--config.batch_size=many"], "batch_size"),
        (["--config", "configs/smoke.py:batch_size=many"], "does not have the type"),
        ([], "give --config configs/NAME.py"),
        (["configs/smoke.py"], "give --config configs/NAME.py"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path, args, message):
    code, output = launch(*args, "--workdir", tmp_path / "w")
    assert code == 2 and message.lower() in output.lower(), output
    assert "Traceback" not in output and len(output.splitlines()) < 12, output


def test_arms_and_seeds_are_compared_in_pairs(tmp_path):
    arms = ["--config.seeds=(1,)", "--config.baseline=(('model.weights',''),)", "--config.model.image_size=16"]
    code, output = launch(*SMOKE, *arms, "--workdir", tmp_path / "w")
    assert code == 0, output
    report = json.loads((tmp_path / "w" / "comparison.json").read_text())
    assert (
        report["seeds"] == [0, 1]
        and report["data"] == "digits test[:20%]"
        and set(report["accuracy"]) == {"transfer", "baseline"}
    )
    for arm, folders in {
        "transfer": ["", "runs/transfer-seed1"],
        "baseline": ["runs/baseline-seed0", "runs/baseline-seed1"],
    }.items():
        results = [json.loads((tmp_path / "w" / folder / "result.json").read_text()) for folder in folders]
        assert report["accuracy"][arm]["values"] == [result["metrics"]["accuracy"]["value"] for result in results]
    pairs = zip(report["accuracy"]["transfer"]["values"], report["accuracy"]["baseline"]["values"], strict=True)
    assert report["difference"]["values"] == pytest.approx([a - b for a, b in pairs])
    assert (tmp_path / "w" / "comparison.png").exists() and "transfer - baseline" in output


@pytest.mark.slow
def test_eight_devices_and_pmap_give_the_losses_and_counts_of_one_device(tmp_path):
    options = [*SMOKE, "--config.method.name=full", "--config.data.test=test[:37]", "--config.eval_batch_size=10"]
    results, losses = {}, {}
    for name, devices, mode in [("one", 1, "jit"), ("eight", 8, "jit"), ("pmap", 8, "pmap")]:
        code, output = launch(*options, f"--config.parallel={mode}", "--workdir", tmp_path / name, devices=devices)
        assert code == 0, output
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row.get("train/loss", row.get("val/loss")) for row in rows]
    for name in ("eight", "pmap"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-5)
        assert results[name]["metrics"]["count"] == results["one"]["metrics"]["count"] == 37
        assert results[name]["metrics"]["confusion"] == results["one"]["metrics"]["confusion"]


@pytest.mark.slow
def test_runs_killed_at_20_random_moments_end_bit_equal_to_an_unbroken_one(tmp_path):
    """SIGKILL while importing, compiling, stepping, evaluating, saving or writing results; the same command goes on."""
    # Fine-tuning with many evaluations and saves, so that the kills meet all of them.
    options = [*SMOKE, "--config.method.name=full", "--config.total=(120,'steps')", "--config.eval_every=(4,'steps')"]
    options += ["--config.ema=0.9", "--config.method.mixup=0.2"]
    code, output = launch(*options, "--workdir", tmp_path / "whole")
    assert code == 0, output
    whole, draw, kills, finished = remains(tmp_path / "whole"), random.Random(0), 0, 0
    while kills < 20 or not finished:
        target = tmp_path / f"killed{finished}"
        process = start(*options, "--workdir", target)
        # A random number of lines into the run and a random part of a second on, so that any machine meets all phases.
        for _ in range(draw.randrange(80) if kills < 20 else 0):
            process.stdout.readline()
        try:
            output, _ = process.communicate(timeout=draw.uniform(0.0, 0.5) if kills < 20 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, output
        assert remains(target) == whole
        finished += 1


def test_sigterm_ends_with_code_75_and_the_same_command_finishes(tmp_path):
    process = start(
        *SMOKE, "--config.total=(2000,'steps')", "--config.log_every=(1,'steps')", "--workdir", tmp_path / "w"
    )
    for line in process.stdout:
        if "step 3/" in line:
            process.send_signal(signal.SIGTERM)
            break
    output, _ = process.communicate()
    assert process.returncode == 75 and "the same command goes on from there" in output, output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "logistic"])
def test_sigterm_ends_a_probe_without_gradient_and_its_rerun_has_the_result_of_an_unbroken_one(tmp_path, name):
    options = [*SMOKE, f"--config.method.name={name}", "--config.select=last", "--config.data.shots=0"]
    options += ["--config.eval_batch_size=2", "--config.cache=features"]

    def command(folder):
        return [*options, f"--config.cache_dir={tmp_path / folder / 'cache'}", "--workdir", tmp_path / folder / "w"]

    code, output = launch(*command("whole"))
    assert code == 0, output
    process = start(*command("killed"))
    for line in process.stdout:
        if "computing the features of train" in line:
            process.send_signal(signal.SIGTERM)
            break
    output, _ = process.communicate()
    assert process.returncode == 75 and "the same command goes on from there" in output, output
    assert not (tmp_path / "killed" / "w" / "result.json").exists()
    code, output = launch(*command("killed"))
    assert code == 0 and "computing the features of train" in output, output
    assert "computing the features of val" not in output  # kept, like the batches of train before the signal
    whole, rerun = (tmp_path / folder / "w" / "result.json" for folder in ("whole", "killed"))
    assert rerun.read_bytes() == whole.read_bytes()
