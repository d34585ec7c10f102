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

from tl_jax import distributed, preemption
from tl_jax.compiled import keep_compiled_programs
from tl_jax.studies import store
from tl_jax.studies.study import title
from tl_jax.workdir import read_json


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
    while (row := distributed.from_first(lambda: next_run(workdir, only))) is not None:
        if distributed.from_first(lambda: bool(stop_requested())):
            raise preemption.Preempted("stopped between two runs")
        folder = store.run_folder(workdir, row["key"])
        with store.claim(folder) if distributed.is_first() else contextlib.nullcontext() as claimed:
            attempt = distributed.from_first(lambda claimed=claimed: claimed)
            if attempt is not None:
                take(workdir, row, attempt, agreed)
            elif distributed.is_first() and store.state(folder) == "failed":
                say(workdir, row, f"failed: {read_json(folder / 'failed.json')['error']}")


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
        say(workdir, row, f"attempt {attempt} of {store.ATTEMPTS}, its process died")
    try:
        with output_into(log):
            result = train_run(workdir, folder, stop_requested)
    except preemption.Preempted as stop:
        say(workdir, row, str(stop))
        raise
    except Exception as error:  # of any kind: the other runs do not depend on this one
        distributed.wait_for_cause(error)  # a run whose other process was killed has not failed
        if distributed.is_first():
            store.fail(folder, f"{type(error).__name__}: {error}", attempt)
        say(workdir, row, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        distributed.fail(error, 1)  # several processes cannot know that they all failed: they end together
        return
    metric = store.read_plan(workdir)["metrics"][0]
    value = store.score(result, metric)
    text = "undefined" if value is None else f"{value:.3f}"
    say(workdir, row, f"{metric} {text} ({time.monotonic() - began:.1f} s)")


def train_run(workdir: pathlib.Path, folder: pathlib.Path, stop_requested: Callable[..., bool]) -> dict[str, Any]:
    from tl_jax import options  # the imports that take seconds wait until there is something to do
    from tl_jax.train import train

    try:
        speed = store.read_plan(workdir)["speed"]
        config = options.from_flat({**speed, **read_json(folder / "config.json")})
        return train(config, folder, verbose=False, stop_requested=stop_requested)
    except Exception:
        traceback.print_exc()
        raise


def say(workdir: pathlib.Path, row: Mapping[str, Any], text: str) -> None:
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
    sys.exit(main())
