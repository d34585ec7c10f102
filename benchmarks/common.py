"""What the benchmarks share: rounds in which the ways take turns, medians with intervals, a table, a chart, JSON.

    def main(argv):
        folder = common.start("NAME")                                  # --device, --out
        seconds = common.take_turns({"plain": plain, "fast": fast}, common.ROUNDS.value)
        rows = [{"way": name, **common.summary(times)} for name, times in seconds.items()]
        common.report(folder, rows, title="steps", bars=("way", "median", "seconds"))

A machine's mood changes within minutes, so what is compared runs in the same rounds, and the ratio is taken round by
round.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags, logging

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tl_jax.runtime import malloc  # noqa: E402 (the line above makes it findable)

DEVICE = flags.DEFINE_enum("device", "", ["", "cpu", "gpu", "tpu"], "Where to run; empty: what jax takes.")
OUT = flags.DEFINE_string("out", "", "The folder for table, chart and rows; default: workdirs/benchmarks/NAME.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed rounds; one more, untimed, warms up.", lower_bound=1)


def start(name: str) -> pathlib.Path:
    """Chooses the device, for this process and those it starts, before jax's first use; returns the folder to write.

    Memory is kept as under launch.py.
    """
    malloc.keep_memory()
    logging.set_verbosity(logging.WARNING)
    if DEVICE.value:
        platforms = {"gpu": "cuda", "tpu": "tpu,cpu", "cpu": "cpu"}[DEVICE.value]
        os.environ["JAX_PLATFORMS"] = platforms
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_platforms", platforms)
    if DEVICE.value in ("gpu", "tpu"):  # asked in another process, for whoever asks jax takes the device's memory
        asked = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], capture_output=True, text=True)
        if asked.returncode:
            said = asked.stderr.strip().splitlines()[-1].removeprefix("AssertionError").strip()
            sys.exit(
                f"error: jax finds no {DEVICE.value} here{f' ({said})' if said else ''}; for one that is there install "
                "jax[cuda12] or jax[tpu], else leave out --device"
            )
    folder = pathlib.Path(OUT.value or f"workdirs/benchmarks/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def plain_environment() -> dict[str, str]:
    """The environment of a program that is to start as anyone starts it."""
    return {name: value for name, value in os.environ.items() if name not in {"LD_PRELOAD", *malloc.SETTINGS}}


def make_plan(model: Any, card: Any, labels: Mapping[str, str], policies: Mapping[str, str]) -> Any:
    """What a training step of a classification computes; labels, policies: of parameters and of BatchNorm layers."""
    from tl_jax import tasks
    from tl_jax.core import trees
    from tl_jax.methods import schedules
    from tl_jax.methods.term import MODEL, TASK, Method, make_task_term
    from tl_jax.training import steps

    frozen_norms = tuple(path for path, policy in policies.items() if policy == trees.FROZEN)
    return steps.Plan(
        readers={MODEL: steps.Reader(model.clone(frozen_norms=frozen_norms), card, card.input)},
        method=Method({TASK: (schedules.make(1.0), make_task_term())}),
        task=tasks.make(tasks.Spec(class_names=tuple(map(str, range(card.num_classes))))),
        labels=labels, frozen_norms=frozen_norms, sums=(*steps.SUMS, "accuracy"),
    )  # fmt: skip


def import_timm():
    """(torch, timm); declares the operators without which some builds of torchvision cannot be imported."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # it is there already
            continue
    import_timm.kept = library  # the operators live as long as this
    import timm

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch, timm


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each call, way by way within every round; what a way returns is waited for."""
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(warm_up + rounds):
        for name, call in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            if round_ >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """The summary of values / reference, round by round."""
    return summary([value / other for value, other in zip(values, reference, strict=True)])


def machine() -> str:
    """Processor, cores, accelerator and versions, on one line."""
    import jax

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device, info = jax.devices()[0].device_kind, pathlib.Path("/proc/cpuinfo")
    if device == "cpu" and info.exists():
        named = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        device = (named or [device])[0]
    where = f"{jax.device_count()} x {device}, {cores} CPU cores"
    return f"{where}, Python {platform.python_version()}, jax {jax.__version__}, {time.strftime('%d %B %Y')}"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Rows as aligned text; numbers with four digits, missing cells as a dash."""
    columns = list(columns or dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        return "-" if value is None else str(value)

    lines = [columns, *([cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    words = [isinstance(rows[0].get(column), str) for column in columns]
    return "\n".join(
        "  ".join(
            text.ljust(width) if left else text.rjust(width)
            for text, width, left in zip(line, widths, words, strict=True)
        ).rstrip()
        for line in lines
    )


def report(
    folder: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    bars: tuple[str, str, str] | None = None,
    columns: Sequence[str] = (),
) -> None:
    """Prints the table and writes table.txt, rows.json and, with bars = (label column, value column, unit), bars.png.

    A row's "low" and "high" become the error bar of its value, if the value is its "median".
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{title}\n{machine()}\n\n{table(rows, columns)}\n"
    print(text, flush=True)
    command = " ".join(["python", *sys.argv])
    (folder / "table.txt").write_text(f"{text}\n{command}\n")
    facts = {"title": title, "machine": machine(), "command": command, "rows": list(rows)}
    (folder / "rows.json").write_text(json.dumps(facts, indent=1) + "\n")
    if bars:
        _draw(folder / "bars.png", rows, title, *bars)


def _draw(path: pathlib.Path, rows: Sequence[Mapping[str, Any]], title: str, label: str, value: str, unit: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    values = [row[value] for row in rows]
    ends = [[row[value] - row["low"], row["high"] - row[value]] for row in rows if value == "median" and "low" in row]
    axes.barh([str(row[label]) for row in rows], values, xerr=[*zip(*ends, strict=True)] or None, color="#4477aa")
    axes.bar_label(axes.containers[-1], fmt="%.3g", padding=4) if not ends else None
    axes.invert_yaxis()
    axes.set(xlabel=unit, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def measure_peak(dtype: str, size: int, megabytes: int = 256, rounds: int = 5) -> Any:
    """The `roofline.Peak` of the first device as the best of some matmuls of `size` and copies of `megabytes` reach it.

    Both FLOP/s are those of `dtype`. bytes/s count what is read and what is written.
    """
    import jax
    import jax.numpy as jnp

    from tl_jax.runtime.roofline import Peak

    def seconds(function: Callable, *arguments: Any) -> float:
        times = []
        for _ in range(rounds + 1):  # the first compiles
            began = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times.append(time.perf_counter() - began)
        return min(times[1:])

    side = jnp.ones((size, size), jnp.dtype(dtype))
    long = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
    flops = 2 * size**3 / seconds(jax.jit(jnp.dot), side, side)
    return Peak(flops, flops, 2 * long.nbytes / seconds(jax.jit(lambda x: x + 1), long))
