"""A study before it runs: its grid, what is done of it, and what the rest would cost. Nothing is trained for it."""

import contextlib
import itertools
import os
import pathlib
import time
import timeit
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import config as options
from tl_jax.core import console
from tl_jax.core.console import Table
from tl_jax.core.files import read_json
from tl_jax.methods import probes
from tl_jax.methods.term import MAIN
from tl_jax.runtime import sharding, wall
from tl_jax.studies import local, store, together
from tl_jax.studies.report.tables import scaled
from tl_jax.studies.study import RunSpec, Study, title
from tl_jax.training import frozen_columns, steps
from tl_jax.training.build import Run, build

BUDGET = 120.0  # seconds for building and tracing cells; the rest is checked value by value only
SIDE = 1024  # of the matrices whose product measures the machine


class Work(NamedTuple):
    """What one run computes; flops: of all its steps as traced, None for a probe without gradient."""

    steps: int
    examples: int
    flops: float | None


def show(workdir: pathlib.Path, name: str, study: Study, runs: list[RunSpec], jobs: int = 0) -> None:
    """Prints the grid with the state of its runs, and the cost of what is left; ValueError names cells that fail."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # runs may be under way on the same GPU
    cells: dict[str, list[RunSpec]] = {}
    for run in runs:
        cells.setdefault(title(run.levels), []).append(run)
    works = trace_cells({cell: members[0] for cell, members in cells.items()})
    states = {run.key: store.state(store.run_folder(workdir, run.key)) for run in runs}
    seconds: dict[str, list[float]] = {}  # of the finished runs of each cell
    for run in runs:
        path = store.run_folder(workdir, run.key) / "cost.json"
        with contextlib.suppress(OSError, ValueError):  # none, or damaged: what it took is not known
            cost = read_json(path) if states[run.key] == "done" else {}
            if isinstance(value := wall.whole(cost) or cost.get("seconds"), int | float):
                seconds.setdefault(title(run.levels), []).append(value)
    present, rows = [state for state in store.STATES if state in states.values()], []
    for cell, members in cells.items():
        counts, work = [sum(states[run.key] == state for run in members) for state in present], works.get(cell)
        cost = ["-"] * 3 if work is None else [f"{work.steps:,}", f"{work.examples:,}", scaled(work.flops, 1000)]
        took = f"{np.mean(seconds[cell]):.1f}" if cell in seconds else "-"
        rows.append((*members[0].levels.values(), str(len(members)), *(str(n or "-") for n in counts), *cost, took))
    headers = (*study.factors, "runs", *present, "steps", "examples", "FLOPs", "s")
    caption = f"{name}: {len(runs)} runs in {len(cells)} cells"
    console.show(Table(caption, headers, rows, len(study.factors)))
    console.show("steps, examples to train on, FLOPs of all steps (as traced) and seconds (as measured) are of one run")
    if left_out := len(cells) - len(works):
        console.show(f"{left_out} cells were not built: {BUDGET:.0f} s were over; totals scale the others")
    sets = together.group({run.key: options.flatten(run.config) for run in runs}, study.together)
    if shared := [keys for keys in sets if len(keys) > 1]:
        console.show(
            f"{sum(map(len, shared))} runs are trained together in {len(shared)} programs, which compute what is "
            "frozen once: FLOPs and seconds of runs by themselves are more than they take"
        )
    left = {cell: sum(states[run.key] != "done" for run in members) for cell, members in cells.items()}
    console.show("\n".join(totals(left, works, seconds, jobs or local.default_jobs())))


def trace_cells(cells: Mapping[str, RunSpec]) -> dict[str, Work]:
    """Builds a run of each cell, as long as BUDGET lasts."""
    works, problems, end = {}, [], time.monotonic() + BUDGET
    in_time = itertools.takewhile(lambda _: time.monotonic() <= end, cells.items())
    for cell, run in console.counted("cells", in_time, len(cells)):
        try:
            works[cell] = trace(run.config)
        except (ValueError, OSError) as error:
            problems.append(f"{cell}: {error}")
    if problems:
        raise ValueError("these cells cannot run:\n  " + "\n  ".join(problems))
    return works


def trace(config) -> Work:
    """Builds a run and traces its steps, without compiling."""
    run = build(config, sharding.make_parallel("jit"))
    settings, material = run.settings, run.material
    if settings.phases[0].method.name in probes.WITHOUT_STEPS:
        return Work(0, len(material.data[MAIN]), None)
    flops: float | None = 0.0
    for phase in run.phases:
        plan = phase.plan._replace(accumulate=1)  # a loop's body would be counted once
        state = jax.eval_shape(
            lambda plan=plan, phase=phase: steps.init_state(plan, phase.tx, material.variables, material.memory, 0)
        )
        step = jax.jit(steps.make_train_step(plan, phase.tx))
        found = (step.lower(state, example_batch(run, plan)).cost_analysis() or {}).get("flops")
        flops = None if flops is None or found is None else flops + found * phase.length
    return Work(run.total_steps, run.total_steps * settings.loop.batch_size, flops)


def example_batch(run: Run, plan: steps.Plan) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of a batch, with cached columns, which take one run over the data and are often there already."""
    variables, found = run.material.variables, {}
    columns = frozen_columns.columns_of(plan, lambda: variables, run.material.networks)
    for stream in plan.streams:
        raw = {field: jax.ShapeDtypeStruct(x.shape, x.dtype) for field, x in run.material.streams[stream][0].items()}
        found[stream] = raw | {it.field: jax.eval_shape(it.compute, variables, raw[it.view]) for it in columns}
    return found


def totals(left: Mapping[str, int], works: Mapping[str, Work], seconds: Mapping[str, list], jobs: int) -> list[str]:
    """Sentences on the cost of the runs that are left, `{cell: runs}`."""
    if not (count := sum(left.values())):
        return ["all runs are done"]
    scale = count / max(sum(left[cell] for cell in works), 1)
    totals = (scale * sum(left[cell] * (work[i] or 0) for cell, work in works.items()) for i in range(3))
    steps, examples, flops = totals
    lines = [f"to do: {count} runs, {steps:,.0f} steps, {examples:,.0f} examples, {scaled(flops, 1000)} FLOPs"]
    if uncounted := sum(left[cell] for cell, work in works.items() if work.flops is None):
        lines.append(f"the FLOPs of {uncounted} of them cannot be counted")
    if seconds:
        every = [value for values in seconds.values() for value in values]
        whole = sum(runs * float(np.mean(seconds.get(cell, every))) for cell, runs in left.items())
        return [*lines, f"about {_clock(whole / jobs)} with {jobs} at once, by the {len(every)} finished runs here"]
    rate = matmul_rate()
    least = f"at least {_clock(flops / rate)}, at the {scaled(rate, 1000)} FLOP/s of a matrix product on all of this "
    return [*lines, f"{least}machine's devices; starting, compiling and evaluating come on top"]


def matmul_rate() -> float:
    """FLOP/s of float32 matrix products, on all devices of this machine together."""
    x = jnp.ones((SIDE, SIDE), jnp.float32)
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(x, x).block_until_ready()
    seconds = min(timeit.repeat(lambda: multiply(x, x).block_until_ready(), number=1, repeat=20))
    devices = 1 if jax.default_backend() == "cpu" else jax.local_device_count()
    return 2 * SIDE**3 / seconds * devices


def _clock(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
