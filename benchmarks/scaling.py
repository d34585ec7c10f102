"""How the cost of a full training step grows with the data, with the network and with the number of devices.

python benchmarks/scaling.py
python benchmarks/scaling.py --device gpu --models resnet50,vit_base_patch16_224 --batch_sizes 64,128,256,512

Each row is a run of benchmarks/step.py in a process of its own. Data enter through the batch: an epoch of N examples is
N / batch steps, so its seconds grow as N, and are given for 10,000. The devices of a CPU are simulated and share its
cores: what more of them save there is memory, and the work of each; seconds do not fall. Each number of devices has two
rows, with parameters whole on each device and with parameters divided over them (config.fsdp).
"""

import json
import os
import pathlib
import subprocess
import sys

import common
from absl import app, flags

STEP = pathlib.Path(__file__).with_name("step.py")
MODELS = flags.DEFINE_list("models", ["vit_tiny_patch16_224", "vit_small_patch16_224", "resnet18"], "Networks.")
BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["4", "8", "16", "32"], "Of the first of --models.")
DEVICES = flags.DEFINE_list("devices", [], "How many; empty: 1, 2, 4 and 8, of which a GPU or TPU takes those it has.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Where the network and the devices vary.")
FSDP = flags.DEFINE_integer("fsdp", 4096, "config.fsdp of divided parameters.")
STEPS = flags.DEFINE_integer("steps", 0, "As in step.py.")
DTYPE = flags.DEFINE_string("dtype", "", "As in step.py.")


def run_step(folder: pathlib.Path, model: str, batch_size: int, devices: int = 1, fsdp: int = 0) -> dict | None:
    """The row of full training from one run of step.py; None where there are not so many devices."""
    device, environment = common.DEVICE.value, dict(os.environ)
    if device in ("", "cpu"):
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(devices)))
    command = [
        sys.executable, str(STEP), f"--models={model}", "--ways=full", f"--batch_size={batch_size}", f"--fsdp={fsdp}",
        f"--rounds={common.ROUNDS.value}", f"--steps={STEPS.value}", f"--dtype={DTYPE.value}",
        f"--device={device or 'cpu'}", f"--out={folder / 'last'}",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])}\n{done.stderr}")
    found = json.loads((folder / "last" / "rows.json").read_text())
    (row,) = found["rows"]
    if not found["machine"].startswith(f"{devices} x "):
        return None
    return {
        "model": model, "batch": batch_size, "devices": devices, "fsdp": fsdp,
        "GFLOP a device": row["flops_per_step"] / devices / 1e9,
        "GB a device": row["bytes_per_step"] and row["bytes_per_step"] / devices / 1e9,
        "state MB": row["state_bytes"] / 1e6, "temp MB": row["temp_bytes"] / 1e6,
        "all MB": row["memory_bytes"] / 1e6, "images/s": row["images_per_second"][1],
        "low": row["images_per_second"][0], "high": row["images_per_second"][2],
        "s for 10,000": 1e4 / row["images_per_second"][1],
    }  # fmt: skip


def draw(series: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Memory above, images/s below, along each of the three axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3)
    for panel, key in zip(panels, ("all MB", "images/s"), strict=True):
        for axes, (name, column) in zip(panel, (("data", "batch"), ("model", "model")), strict=False):
            _plot(axes, series[name], column, key, "bar" if name == "model" else "line", "#4477aa", None)
        for label, divided, colour in (("whole on each", False, "#4477aa"), ("divided (fsdp)", True, "#ee6677")):
            rows = [row for row in series["devices"] if bool(row["fsdp"]) == divided]
            _plot(panel[2], rows, "devices", key, "line", colour, label)
        panel[0].set_ylabel({"all MB": "memory of a device [MB]", "images/s": "images/s"}[key])
    panels[0][0].set_title(f"data: {series['data'][0]['model']}")
    panels[0][1].set_title(f"network: batch {series['model'][0]['batch']}")
    panels[0][2].set_title(f"devices: {series['devices'][0]['model']}, batch {series['devices'][0]['batch']}")
    panels[0][2].legend(frameon=False)
    if common.DEVICE.value in ("", "cpu"):
        panels[1][2].set_title("simulated, on the same cores", fontsize=9)
    figure.savefig(path, dpi=150)


def _plot(axes, rows: list[dict], column: str, key: str, kind: str, colour: str, label: str | None) -> None:
    places, values = [str(row[column]) for row in rows], [row[key] for row in rows]
    if key == "images/s":
        ends = [[row[key] - row["low"] for row in rows], [row["high"] - row[key] for row in rows]]
        axes.errorbar(places, values, yerr=ends, fmt="none", color="black", capsize=3, linewidth=1)
    axes.bar(places, values, color=colour) if kind == "bar" else axes.plot(
        places, values, "o-", color=colour, label=label
    )
    axes.set_ylim(0)
    axes.set_xlabel({"batch": "batch size", "devices": "devices"}.get(column, ""))
    axes.tick_params(axis="x", rotation=12 if kind == "bar" else 0)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: list[str]) -> None:
    del argv
    folder, models, known = common.start("scaling"), MODELS.value, {}

    def rows_of(name: str, cases: list[tuple]) -> list[dict]:
        for case in cases:
            if case not in known:
                known[case] = run_step(folder, *case)
                print(f"{name}: {', '.join(map(str, case[:3]))} device(s){', fsdp' if case[3] else ''}", flush=True)
        return [known[case] for case in cases if known[case]]

    counts = [int(count) for count in DEVICES.value or (1, 2, 4, 8)]
    batch_size = BATCH_SIZE.value
    series = {
        "data": rows_of("data", [(models[0], int(size), 1, 0) for size in BATCH_SIZES.value]),
        "model": rows_of("model", [(model, batch_size, 1, 0) for model in models]),
        "devices": rows_of("devices", [(models[0], batch_size, n, f) for n in counts for f in (0, FSDP.value)]),
    }
    rows = [{"grows": name, **row} for name, group in series.items() for row in group]
    simulated = "; the devices are simulated on one CPU" if common.DEVICE.value in ("", "cpu") else ""
    columns = [key for key in rows[0] if key not in ("low", "high")]
    common.report(folder, rows, f"Full training, a step{simulated}; memory is that of one device", columns=columns)
    draw(series, folder / "scaling.png")


if __name__ == "__main__":
    app.run(main)
