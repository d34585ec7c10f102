"""Runs a planned study on this machine: several workers at once, each with its share of the cores or its GPU."""

import collections
import glob
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import tl_jax
from tl_jax import tasks
from tl_jax.core import machine
from tl_jax.core.console import bar, show
from tl_jax.core.files import read_json
from tl_jax.runtime import preemption
from tl_jax.studies import store, together

POLL, LOOK = 0.1, 1.0  # seconds between two looks at the workers, and at the states of all runs
EMPTY_HANDED = 3  # deaths without a run in hand after which a worker is not started again: it cannot start at all
MEMORY = 2 * 2**30  # bytes of this machine for each worker; one that trains a small network takes 0.6 GB


class Slot(NamedTuple):  # what one worker may use
    cores: tuple[int, ...]
    environment: Mapping[str, str]


def launch(workdir: pathlib.Path, *, jobs: int = 0, stop_requested: Callable[[], bool] = lambda: False) -> int:
    """Starts workers (jobs at once; 0 chooses) until no run is left to take, and writes the report.

    Returns 0: nothing failed; 1: a run failed, or workers could not run; 75: stopped, with everything saved.
    """
    began, plan, keys = time.monotonic(), store.read_plan(workdir), store.open_runs(workdir)
    programs = len(together.sets(workdir, keys, plan.get("together", "none")))
    slots = divide(min(jobs or default_jobs(), programs), os.environ)
    shape = f"{len(slots)} at once, logs in {workdir / 'runs'}/*/log.txt" if slots else "nothing to do"
    show(f"{len(plan['runs'])} runs, {len(keys)} to do: {shape}")

    def over() -> int:
        states = list(store.states(workdir).values())
        return states.count("done") + states.count("failed")

    shown = bar("runs", len(plan["runs"]), over(), shown=bool(slots))
    with preemption.saved_by(None), shown as tick:  # the workers save, and it asks ten times a second
        stopped = supervise(workdir, slots, stop_requested, lambda: tick(over()))
    counts = collections.Counter(store.states(workdir).values())
    text = ", ".join(f"{counts[state]} {state}" for state in store.STATES if counts[state])
    show(f"{text}; {time.monotonic() - began:.0f} s")
    if stopped:
        show("stopped; everything is saved, the same command goes on from there")
        return preemption.EXIT_CODE
    tell_failures(workdir)
    if counts["running"]:
        show(f"{counts['running']} run(s) are still in the hands of another launcher, which will report")
    if left := counts["todo"] + counts["stale"]:
        show(f"{left} run(s) are left; start the same command again")
    if counts["done"]:
        tell_answer(workdir)
    return 1 if counts["failed"] or left else 0


def supervise(
    workdir: pathlib.Path,
    slots: list[Slot],
    stop_requested: Callable[[], bool],
    look: Callable[[], None] = lambda: None,
) -> bool:
    """Keeps a worker in every slot while there are runs to take; True if it was stopped on request.

    look: called every LOOK seconds.
    """
    workers = {index: start_worker(workdir, slot) for index, slot in enumerate(slots)}
    deaths, stopping, stopped = dict.fromkeys(workers, 0), False, False
    looked = time.monotonic()
    try:
        while workers:
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                look()
            if stop_requested() and not stopping:
                stopping = True
                for process in workers.values():
                    process.terminate()
            for index in [index for index, process in workers.items() if process.poll() is not None]:
                process = workers.pop(index)
                stopped |= process.returncode == preemption.EXIT_CODE
                if stopping or process.returncode in (0, preemption.EXIT_CODE):
                    continue
                held = {store.read_claim(folder)["pid"]: row for row, folder in store.runs_in(workdir, "stale")}
                deaths[index] += process.pid not in held
                place = f" in {store.name_of(held[process.pid])}" if process.pid in held else ""
                show(f"a worker ended with code {process.returncode}{place}")
                told = process.returncode == 2  # what it needs and has printed, such as room on the disk
                if not told and deaths[index] < EMPTY_HANDED and store.open_runs(workdir):
                    workers[index] = start_worker(workdir, slots[index])
            time.sleep(POLL)
    finally:
        for process in workers.values():  # a second Ctrl-C, or an error here
            process.kill()
            process.wait()
    return stopping or stopped


def start_worker(workdir: pathlib.Path, slot: Slot) -> subprocess.Popen:
    """A worker process in a session of its own, so that Ctrl-C reaches it once: through its launcher."""
    path = [str(pathlib.Path(tl_jax.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, **slot.environment, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, "-m", "tl_jax.studies.worker", str(workdir), "--parent", str(os.getpid())]
    own = machine.cores()
    try:
        _use_cores(slot.cores)  # a process starts with the cores of the thread that starts it
        return subprocess.Popen(command, env=environment, start_new_session=True)
    finally:
        _use_cores(own)


def tell_failures(workdir: pathlib.Path) -> None:
    """Prints each kind of error with its runs and the end of one log."""
    alike: dict[str, tuple[list[str], list[str]]] = {}
    for row, folder in store.runs_in(workdir, "failed"):
        found = read_json(folder / "failed.json", store.FAILED)
        runs, _ = alike.setdefault(found["error"], ([], found["log"]))
        runs.append(f"  {store.name_of(row)}: {folder / 'log.txt'}")
    for error, (runs, log) in alike.items():
        show("\n".join([f"\nfailed: {error}", *runs, *(f"    | {line}" for line in log)]))
    if alike:
        show("--retry tries again what failed")


def tell_answer(workdir: pathlib.Path) -> None:
    """Writes the report, and prints the mean of every cell, what the comparisons say, and where all of it lies."""
    from tl_jax.studies.report import report, selection, tables

    summary = report.write(workdir)
    metric, numbers = next(iter(summary["metrics"].items()))
    rows = []
    side = tasks.direction(metric)
    known, none = ([cell for cell in numbers["cells"] if (cell["mean"] is None) == empty] for empty in (False, True))
    for cell in [*sorted(known, key=lambda cell: -side * cell["mean"]), *none]:
        mean, low, high = ("-" if cell[name] is None else f"{cell[name]:.3f}" for name in ("mean", "low", "high"))
        rows.append((*cell["levels"].values(), mean, "-" if low == "-" else f"{low} .. {high}", str(cell["n"])))
    factors = numbers["cells"][0]["levels"]
    table = tables.Table(f"{metric}, the best first", (*factors, "mean", "95 % interval", "n"), rows, len(factors))
    show(table)
    show("\n".join(summary["reading"]))
    for line in summary["alarms"]:
        show(line, style="bold red")
    if isinstance(summary["selection"], dict):
        show(selection.table(summary["selection"]))
    show(f"the whole report: {workdir}/report.html, .md, .csv and .tex; the runs: {workdir}/runs")


def default_jobs() -> int:
    """One worker per GPU; one on a TPU, which a single process holds; else one per core, as far as memory goes."""
    if glob.glob("/dev/accel*"):
        return 1
    return len(gpus(os.environ)) or max(1, min(len(machine.cores()), machine.memory() // MEMORY))


def divide(jobs: int, environment: Mapping[str, str]) -> list[Slot]:
    """The cores and GPUs of this machine among `jobs` workers; workers on one GPU share its memory evenly."""
    cores, cards = machine.cores(), gpus(environment)
    slots = []
    for i in range(jobs):
        first, variables = i * len(cores) // jobs, {}
        if cards:
            variables["CUDA_VISIBLE_DEVICES"] = cards[i % len(cards)]
            if (sharing := len(range(i % len(cards), jobs, len(cards)))) > 1:
                variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / sharing:.3f}"
        slots.append(Slot(cores[first : max((i + 1) * len(cores) // jobs, first + 1)], variables))
    return slots


def _use_cores(cores: tuple[int, ...]) -> None:
    if hasattr(os, "sched_setaffinity"):  # macOS has none: there all workers share all cores
        os.sched_setaffinity(0, cores)


def gpus(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs for CUDA_VISIBLE_DEVICES, without starting jax on them: that would take their memory."""
    if environment.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i, line in enumerate(listing.splitlines()) if line.startswith("GPU")]
