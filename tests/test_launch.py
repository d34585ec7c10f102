"""The front door as a user meets it: a subprocess, its output and its exit code."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.special
from test_pretrained_parity import cifar_resnet
from test_train import remains

from configs import smoke
from tl_jax.config import override as options_of
from tl_jax.runtime import sharding
from tl_jax.training import build

ROOT = pathlib.Path(__file__).resolve().parents[1]
GLYPHS = "tl_jax/assets/glyphs.safetensors"
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


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_smoke_config_runs_and_prints_audit_progress_and_result(tmp_path):
    code, output = launch(*SMOKE, "--workdir", tmp_path / "w")
    assert code == 0, output
    for part in ("transfer audit", "650 of", "step 4/4", "val accuracy", "examples/s", "seed 0, digits test[:20%]"):
        assert part in output
    assert "Warning" not in output and "Traceback" not in output


@pytest.mark.thin(5)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "configs/smok.py"], "configs/smoke.py"),
        ([*SMOKE, "--config.lrr=1"], "did you mean"),
        (["--config", "configs/smoke.py:modle=x"], "did you mean 'model'"),
        pytest.param([*SMOKE, "--config.model.name=resnet21_cifar"], "resnet20_cifar", marks=pytest.mark.slow),
        ([*SMOKE, "--config.data.source=folder:/nowhere/at/all"], "/nowhere/at/all"),
        ([*SMOKE, "--config.batch_size=many"], "batch_size"),
        (
            ["--config", "configs/transfer.py", "--config.method.name=full"],
            "has chosen lr and total for a linear probe",
        ),
        (["--config", "configs/smoke.py:batch_size=many"], "cannot be the value of batch_size: expected an integer"),
        ([], "give --config configs/NAME.py"),
        (["configs/smoke.py"], "give --config configs/NAME.py"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path, args, message):
    code, output = launch(*args, "--workdir", tmp_path / "w")
    assert code == 2 and message.lower() in output.lower(), output
    assert "Traceback" not in output and len(output.splitlines()) < 12, output


@pytest.mark.slow
@pytest.mark.exhaustive
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
@pytest.mark.exhaustive
@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_runs_killed_at_random_moments_end_bit_equal_to_an_unbroken_one(tmp_path, times):
    """SIGKILL while importing, compiling, stepping, evaluating, saving or writing results; the same command goes on."""
    # Fine-tuning with many evaluations and saves, so that the kills meet all of them.
    options = [*SMOKE, "--config.method.name=full", "--config.total=(120,'steps')", "--config.eval_every=(4,'steps')"]
    options += ["--config.ema=0.9", "--config.method.mixup=0.2"]
    code, output = launch(*options, "--workdir", tmp_path / "whole")
    assert code == 0, output
    whole, draw, kills, finished = remains(tmp_path / "whole"), random.Random(0), 0, 0
    while kills < times or not finished:
        target = tmp_path / f"killed{finished}"
        process = start(*options, "--workdir", target)
        # A random number of lines into the run and a random part of a second on, so that any machine meets all phases.
        for _ in range(draw.randrange(80) if kills < times else 0):
            process.stdout.readline()
        try:
            output, _ = process.communicate(timeout=draw.uniform(0.0, 0.5) if kills < times else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, output
        assert remains(target) == whole
        finished += 1


@pytest.mark.slow
def test_the_program_of_one_device_with_all_optimisations_computes_what_numpy_and_torch_do(tmp_path):
    """The other tests turn XLA's optimisations off and simulate devices; this one sees what a user runs."""
    torch = pytest.importorskip("torch_reference").torch
    load_file = pytest.importorskip("safetensors.torch").load_file
    options = {"optimizer": "sgd", "clip": 0.0, "weight_decay": 0.0, "lr": 0.05, "total": (24.0, "steps")}
    options["select"] = "last"
    given = [f"--config.{name}={value}" for name, value in options.items()]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_"))}
    command = [sys.executable, "launch.py", *SMOKE, *given, "--workdir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env={**plain, "JAX_PLATFORMS": "cpu"}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "cost.json").read_text())["device"].startswith("1 x ")

    # The weights: the file's own bits, but for the head.
    exported, base = (load_file(path) for path in (tmp_path / "model.safetensors", ROOT / GLYPHS))
    moved = {name for name, tensor in exported.items() if not torch.equal(tensor, base[name])}
    assert exported.keys() == base.keys() and moved == {"linear.weight", "linear.bias"}

    # The predictions: a torch network that reads the exported file.
    material = build.build(options_of(smoke.get_config(), options), sharding.make_parallel()).material
    card = material.card
    network = cifar_resnet(torch, 1)
    network.linear = torch.nn.Linear(64, 10)
    network.load_state_dict(exported, strict=False)
    seen = []
    network.eval().linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numpy()))

    def see(images):
        """Logits and features by torch of images [B, H, W, C] in 0..255."""
        scaled = (images.astype(np.float32) / 255 - np.float32(card.mean)) / np.float32(card.std)
        with torch.no_grad():
            return network(torch.from_numpy(scaled.transpose(0, 3, 1, 2))).numpy(), seen[-1]

    with np.load(tmp_path / "predictions.npz") as saved:
        batches = list(material.eval_batches["test"])
        logits, features = map(np.concatenate, zip(*(see(b["image"][b["mask"]]) for b in batches), strict=True))
        np.testing.assert_allclose(saved["logits"], logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(saved["features"], features, rtol=1e-4, atol=1e-4)
        accuracy = (logits.argmax(1) == saved["labels"]).mean()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(accuracy) and accuracy > 0.4

    # The training: softmax regression by gradient descent in numpy, on torch's features of the same batches.
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    kernel, bias = np.zeros((64, 10)), np.zeros(10)
    for step, row in enumerate(rows):
        batch = material.streams["train"][step]
        x, onehot = np.float64(see(batch["image"])[1]), np.eye(10)[batch["label"]]
        log_p = scipy.special.log_softmax(x @ kernel + bias, axis=1)
        assert row["train/loss"] == pytest.approx(-(log_p * onehot).sum(1).mean(), rel=1e-4)
        slope = (np.exp(log_p) - onehot) / len(x)
        kernel, bias = kernel - row["train/lr"] * x.T @ slope, bias - row["train/lr"] * slope.sum(0)
    assert len(rows) == 24 and rows[-1]["train/loss"] + 0.1 < rows[0]["train/loss"] == pytest.approx(np.log(10))
    np.testing.assert_allclose(exported["linear.weight"].numpy().T, kernel, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(exported["linear.bias"].numpy(), bias, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
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
@pytest.mark.exhaustive
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
