"""Takes the runs of a planned study one after the other: python -m tl_jax.studies.worker W

Any number of workers, on any number of machines that share W, do each run once. A worker can also be several processes
that do each of its runs together, see distributed.py; the first of them chooses the runs and writes their states. Exit
codes: 0 nothing left to take (a run that failed is in its failed.json); 75 stopped by SIGTERM or Ctrl-C with everything
saved; 2 no study in W.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax

from tl_jax.core.files import read_json
from tl_jax.runtime import distributed, preemption
from tl_jax.runtime.compile_cache import keep_compiled_programs
from tl_jax.runtime.malloc import keep_memory
from tl_jax.studies import store, together
from tl_jax.studies.study import title


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tl_jax.studies.worker", description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", default=(), metavar="KEY", help="take these runs and no others")
    parser.add_argument("--parent", type=int, default=0, help="stop, with everything saved, when this process ends")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, where several do each run together")
    parser.add_argument("--num-processes", type=int, help="how many these are")
    parser.add_argument("--process-id", type=int, help="which of them this is")
    arguments = parser.parse_args(argv)
    asked = preemption.watch()

    def stop_requested(*_: int) -> bool:
        return asked() or arguments.parent not in (0, os.getppid())

    keep_compiled_programs()
    try:
        distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
        work(arguments.workdir, arguments.only, stop_requested)
    except ValueError as error:
        distributed.fail(error, 2)  # returns where there is one process
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except preemption.Preempted:
        return preemption.EXIT_CODE
    return 0


def work(workdir: pathlib.Path, only: Collection[str] = (), stop_requested: Callable[..., bool] = lambda *_: False):
    """Takes runs until none is left to take. Raises Preempted soon after `stop_requested()` has become true."""
    known = {row["key"] for row in store.read_plan(workdir)["runs"]}
    if unknown := sorted(set(only) - known):
        raise ValueError(f"{workdir} has no run {', '.join(unknown)}; its study has {len(known)} runs, see study.json")
    agreed = distributed.agreed(stop_requested)
    while True:
        with contextlib.ExitStack() as claims:
            chosen = distributed.from_first(lambda claims=claims: choose(workdir, only, claims))
            if chosen is None:
                return
            if distributed.from_first(lambda: bool(stop_requested())):
                raise preemption.Preempted("stopped between two runs")
            rows, attempts, home = chosen
            if home:
                take_together(workdir, rows, attempts, pathlib.Path(home), agreed)
            elif attempts[0] is not None:
                take(workdir, rows[0], attempts[0], agreed)
            elif distributed.is_first():
                tell_if_failed(workdir, rows[0])


def tell_if_failed(workdir: pathlib.Path, row: Mapping[str, Any]) -> None:
    """A run that was not to be had may have failed for good."""
    folder = store.run_folder(workdir, row["key"])
    if store.state(folder) == "failed":
        log_run(workdir, row, f"failed: {read_json(folder / 'failed.json')['error']}")


def choose(workdir: pathlib.Path, only: Collection[str], claims: contextlib.ExitStack):
    """Claims the next run, or the next set of runs that are one program: their rows, which attempt each is, and the
    set's folder ("": a run by itself); None where nothing is left. A claim that is not to be had is None."""
    with store.taking(workdir):
        if (row := next_run(workdir, only)) is None:
            return None
        keys, home = ([row["key"]], None) if jax.process_count() > 1 else together.members(workdir, row["key"], only)
        rows = [row for row in store.read_plan(workdir)["runs"] if row["key"] in keys]
        held = [not only or row["key"] in only for row in rows]
        attempts = [
            claims.enter_context(store.claim(store.run_folder(workdir, row["key"]), home)) if wanted else None
            for row, wanted in zip(rows, held, strict=True)
        ]
        return rows, attempts, str(home or "")


def next_run(workdir: pathlib.Path, only: Collection[str] = ()) -> dict[str, Any] | None:
    """The next run that nobody works on, as its row of study.json: those whose process died come last."""
    stale = None
    for row in store.read_plan(workdir)["runs"]:  # read again each time: another launcher may have added runs
        if only and row["key"] not in only:
            continue
        word = store.state(store.run_folder(workdir, row["key"]))
        if word == "todo":
            return row
        stale = row if word == "stale" and stale is None else stale
    return stale


def take(workdir: pathlib.Path, row: Mapping[str, Any], attempt: int, stop_requested: Callable[..., bool]) -> None:
    """Does one claimed run: result.json or failed.json at the end, and a line on the console."""
    folder, began = store.run_folder(workdir, row["key"]), time.monotonic()
    log = folder / ("log.txt" if distributed.is_first() else f"log-{jax.process_index()}.txt")
    if attempt > 1:
        log_run(workdir, row, f"attempt {attempt} of {store.ATTEMPTS}, its process died")
    try:
        with output_into(log):
            result = train_run(folder, stop_requested)
    except preemption.Preempted as stop:
        log_run(workdir, row, str(stop))
        raise
    except Exception as error:  # of any kind: the other runs do not depend on this one
        distributed.wait_for_cause(error)  # a run whose other process was killed has not failed
        if distributed.is_first():
            store.fail(folder, f"{type(error).__name__}: {error}", attempt)
        log_run(workdir, row, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        distributed.fail(error, 1)  # several processes cannot know that they all failed: they end together
        return
    metric = store.read_plan(workdir)["metrics"][0]
    value = store.score(result, metric)
    text = "undefined" if value is None else f"{value:.3f}"
    log_run(workdir, row, f"{metric} {text} ({time.monotonic() - began:.1f} s)")


def take_together(
    workdir: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    attempts: Sequence[int | None],
    home: pathlib.Path,
    stop_requested: Callable[..., bool],
) -> None:
    """Does a set of runs, of which those with an attempt are claimed; where it cannot be, they are done one by one."""
    folders, began = [store.run_folder(workdir, row["key"]) for row in rows], time.monotonic()
    claimed = [(row, folder) for row, folder, attempt in zip(rows, folders, attempts, strict=True) if attempt]
    if max((attempt for attempt in attempts if attempt), default=0) >= store.ATTEMPTS:
        together.separate(home, "its process died")
    if not claimed or read_json(home / "runs.json")["alone"]:
        return
    for _, folder in claimed:
        with (folder / "log.txt").open("a") as file:
            file.write(f"trained together with {len(rows) - 1} other runs: {home / 'log.txt'}\n")
    try:
        with output_into(home / "log.txt"):
            wanted = [folder if attempt else None for folder, attempt in zip(folders, attempts, strict=True)]
            outcomes = train_runs(folders, wanted, home, stop_requested)
    except preemption.Preempted as stop:
        log_run(workdir, claimed[0][0], f"and {len(rows) - 1} runs with it: {stop}")
        raise
    except Exception as error:  # perhaps it is too large, or one run does not fit: each by itself says what is wrong
        together.separate(home, f"{type(error).__name__}: {error}")
        reason = str(error).partition(chr(10))[0]
        log_run(workdir, claimed[0][0], f"and {len(rows) - 1} runs with it are done one by one: {reason}")
        return
    metric = store.read_plan(workdir)["metrics"][0]
    for row, folder, outcome in zip(rows, folders, outcomes, strict=True):
        if isinstance(outcome, Exception):
            store.fail(folder, f"{type(outcome).__name__}: {outcome}", 1)
            log_run(workdir, row, f"failed: {type(outcome).__name__}: {str(outcome).partition(chr(10))[0]}")
        elif outcome is not None:
            value = store.score(outcome, metric)
            text = "undefined" if value is None else f"{value:.3f}"
            log_run(workdir, row, f"{metric} {text} ({len(rows)} runs together in {time.monotonic() - began:.1f} s)")


def train_runs(folders, wanted, home: pathlib.Path, stop_requested: Callable[..., bool]):
    from tl_jax.training.train import train_together

    try:
        configs = [read_config(folder) for folder in folders]
        return train_together(configs, wanted, home, stop_requested=stop_requested)
    except Exception:
        traceback.print_exc()
        raise


def read_config(folder: pathlib.Path):
    from tl_jax import config  # the imports that take seconds wait until there is something to do

    return config.from_flat(read_json(folder / "config.json"))


def train_run(folder: pathlib.Path, stop_requested: Callable[..., bool]) -> dict[str, Any]:
    from tl_jax.training.train import train

    try:
        return train(read_config(folder), folder, verbose=False, stop_requested=stop_requested)
    except Exception:
        traceback.print_exc()
        raise


def log_run(workdir: pathlib.Path, row: Mapping[str, Any], text: str) -> None:
    """One line on the console: how many runs are over, which run this is, and what became of it."""
    if not distributed.is_first():
        return
    words = store.states(workdir)
    over = sum(word in ("done", "failed") for word in words.values())
    print(f"[{over}/{len(words)}] {title(row['levels'], row['seed'], row['fold'])}: {text}", flush=True)


@contextlib.contextmanager
def output_into(path: pathlib.Path) -> Iterator[None]:
    """Appends all that this process prints to a file, compiled libraries included."""
    sys.stdout.flush(), sys.stderr.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    with path.open("a", buffering=1) as file:
        for number in saved:
            os.dup2(file.fileno(), number)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
