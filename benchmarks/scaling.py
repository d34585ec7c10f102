"""How the cost of a full training step grows with the batch, with the network and with the number of devices.

python benchmarks/scaling.py
python benchmarks/scaling.py --device gpu --dtype bfloat16 --batch_sizes 64,128,256 --steps 20

Each row is a run of benchmarks/step.py in a process of its own. On a CPU the devices are simulated and share its cores:
there the memory of one device and the FLOPs are what to look at, and a time says nothing. With --rounds 0, the default,
nothing is timed. Data enter through the batch alone: an epoch of N examples is N / batch steps.
"""

import json
import os
import pathlib
import subprocess
import sys

import matplotlib.pyplot as plt
from absl import app, flags

STEP = pathlib.Path(__file__).with_name("step.py")
MODELS = flags.DEFINE_list("models", ["resnet18", "vit_tiny_patch16_224", "vit_small_patch16_224"], "Small to large.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["8", "16", "32"], "Of the first model.")
DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8"], "How many; simulated on a CPU.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Where the network and the devices vary.")
FSDP = flags.DEFINE_integer("fsdp", 4096, "config.fsdp of the second row of each number of devices.")
ROUNDS = flags.DEFINE_integer("rounds", 0, "As in step.py.")
STEPS = flags.DEFINE_integer("steps", 1, "As in step.py.")
DTYPE = flags.DEFINE_string("dtype", "float32", "As in step.py.")
DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu", "tpu"], "Where to run.")
OUT = flags.DEFINE_string("out", "workdirs/benchmarks/scaling", "The folder of the rows and the picture.")


def run_step(folder: pathlib.Path, model: str, batch_size: int, devices: int = 1, fsdp: int = 0) -> dict:
    """The row of full training from one run of step.py."""
    environment = dict(os.environ)
    if DEVICE.value == "cpu":
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(devices)))
    command = [
        sys.executable, str(STEP), f"--models={model}", "--ways=full", f"--batch_size={batch_size}", f"--fsdp={fsdp}",
        f"--rounds={ROUNDS.value}", f"--steps={STEPS.value}", f"--dtype={DTYPE.value}", f"--device={DEVICE.value}",
        f"--out={folder}",
    ]  # fmt: skip
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    (row,) = json.loads((folder / "step.json").read_text())["rows"]
    return {**row, "batch_size": batch_size, "devices": devices, "fsdp": fsdp}


def draw(series: dict[str, list[dict]], path: pathlib.Path) -> None:
    """The memory of a device along each axis."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    first = series["batch"][0]["model"]
    panels[0].plot([row["batch_size"] for row in series["batch"]], _megabytes(series["batch"]), "o-")
    panels[0].set(title=first, xlabel="batch size", ylabel="memory of a device [MB]", ylim=0)
    panels[1].bar([row["model"] for row in series["model"]], _megabytes(series["model"]))
    panels[1].set(title=f"batch {BATCH_SIZE.value}")
    panels[1].tick_params(axis="x", rotation=20)
    for label, divided in (("whole on each", False), ("divided (fsdp)", True)):
        rows = [row for row in series["devices"] if bool(row["fsdp"]) == divided]
        panels[2].plot([row["devices"] for row in rows], _megabytes(rows), "o-", label=label)
    panels[2].set(title=f"{MODELS.value[-1]}, batch {BATCH_SIZE.value}", xlabel="devices", ylim=0)
    panels[2].legend()
    figure.savefig(path, dpi=120)


def _megabytes(rows: list[dict]) -> list[float]:
    return [row["memory_bytes"] / 1e6 for row in rows]


def main(argv: list[str]) -> None:
    del argv
    folder, models = pathlib.Path(OUT.value), MODELS.value
    series = {
        "batch": [run_step(folder, models[0], int(size)) for size in BATCH_SIZES.value],
        "model": [run_step(folder, model, BATCH_SIZE.value) for model in models],
        "devices": [
            run_step(folder, models[-1], BATCH_SIZE.value, int(count), fsdp)
            for count in DEVICES.value
            for fsdp in (0, FSDP.value)
        ],
    }
    head = f"{'':<9}{'model':<24}{'batch':>6}{'devices':>8}{'fsdp':>6}{'GFLOP':>9}{'temp MB':>9}{'all MB':>8}"
    print(head + f"{'images/s':>10}")
    for name, rows in series.items():
        for row in rows:
            line = f"{name:<9}{row['model']:<24}{row['batch_size']:>6}{row['devices']:>8}{row['fsdp']:>6}"
            line += f"{row['flops_per_step'] / 1e9:>9.1f}{row['temp_bytes'] / 1e6:>9.0f}"
            line += f"{row['memory_bytes'] / 1e6:>8.0f}"
            print(line + (f"{row['images_per_second'][1]:>10.1f}" if "images_per_second" in row else ""))
    (folder / "scaling.json").write_text(json.dumps(series, indent=1))
    draw(series, folder / "scaling.png")


if __name__ == "__main__":
    app.run(main)
