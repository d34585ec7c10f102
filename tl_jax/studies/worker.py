"""Takes the runs of a planned study one after the other: python -m tl_jax.studies.worker W

Any number of workers, on any machines that share W, do each run once; a worker can be several processes. Exit codes: 0
nothing left to take (a run that failed is in its failed.json); 75 stopped with everything saved; 2 no study in W, or
it cannot be read or written: a disk that is full or faulty is no failure of a run, which goes on when it is started
again.
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

from tl_jax.core.console import show
from tl_jax.core.files import of_disk, read_json, writing
from tl_jax.runtime import distributed, preemption
from tl_jax.runtime.compile_cache import keep_compiled_programs
from tl_jax.runtime.malloc import keep_memory
from tl_jax.studies import store, together


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
    except (ValueError, OSError) as error:
        distributed.fail(error, 2)  # returns where there is one process
        show(f"error: {error}", stderr=True, erase=True)
        return 2
    except preemption.Preempted:
        return preemption.EXIT_CODE
    return 0


def work(workdir: pathlib.Path, only: Collection[str] = (), stop_requested: Callable[..., bool] = lambda *_: False):
    """Takes runs until none is left; raises Preempted soon after `stop_requested()` has become true."""
    known = {row["key"] for row in store.read_plan(workdir)["runs"]}
    if unknown := sorted({*only} - known):
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
            elif store.state(folder := store.run_folder(workdir, rows[0]["key"])) == "failed":  # for good, meanwhile
                log_run(workdir, rows[0], f"failed: {read_json(folder / 'failed.json', store.FAILED)['error']}")


def choose(workdir: pathlib.Path, only: Collection[str], claims: contextlib.ExitStack):
    """Claims the next run or set: its rows, which attempt each is (None: not to be had), the set's folder or ""."""
    with store.waiting_lock(workdir / ".take"):  # so that a set of runs is claimed by one worker
        rows = store.read_plan(workdir)["runs"]  # read again each time: another launcher may have added runs
        wanted = [row["key"] for row in rows if not only or row["key"] in only]
        found = (key for word in ("todo", "stale") for key in wanted  # those whose process died come last
                 if store.state(store.run_folder(workdir, key)) == word)  # fmt: skip
        if (key := next(found, None)) is None:
            return None
        keys, home = ([key], None) if jax.process_count() > 1 else together.members(workdir, key, only)
        rows = [row for row in rows if row["key"] in keys]
        folders = [store.run_folder(workdir, row["key"]) if row["key"] in wanted else None for row in rows]
        attempts = [folder and claims.enter_context(store.claim(folder, home)) for folder in folders]
        return rows, attempts, str(home or "")


def take(workdir: pathlib.Path, row: Mapping[str, Any], attempt: int, stop_requested: Callable[..., bool]) -> None:
    """Does one claimed run."""
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
        if of_disk(error):
            raise
        finish(workdir, row, error, attempt)
        distributed.fail(error, 1)  # several processes cannot know that they all failed: they end together
        return
    finish(workdir, row, result, attempt, f"{time.monotonic() - began:.1f} s")


def finish(workdir: pathlib.Path, row: Mapping[str, Any], result: Any, attempt: int, took: str = "") -> None:
    """Marks a run whose result is an exception as failed, and prints what became of it."""
    if isinstance(result, Exception):
        error = f"{type(result).__name__}: {result}"
        if distributed.is_first():
            store.fail(store.run_folder(workdir, row["key"]), error, attempt)
        log_run(workdir, row, f"failed: {error.partition(chr(10))[0]}")
        return
    value = store.score(result, metric := store.read_plan(workdir)["metrics"][0])
    log_run(workdir, row, f"{metric} {'undefined' if value is None else f'{value:.3f}'} ({took})")


def take_together(
    workdir: pathlib.Path, rows: Sequence[Mapping[str, Any]], attempts: Sequence[int | None], home: pathlib.Path,
    stop_requested: Callable[..., bool],
) -> None:  # fmt: skip
    """Does a set of runs, of which those with an attempt are claimed; where it cannot be, they are done one by one."""
    folders, began = [store.run_folder(workdir, row["key"]) for row in rows], time.monotonic()
    claimed = [folder if attempt else None for folder, attempt in zip(folders, attempts, strict=True)]
    if max(filter(None, attempts), default=0) >= store.ATTEMPTS:
        together.separate(home, "its process died")
    if not any(claimed) or read_json(home / "runs.json")["alone"]:
        return
    for folder in filter(None, claimed):
        with (folder / "log.txt").open("a") as file:
            file.write(f"trained together with {len(rows) - 1} other runs: {home / 'log.txt'}\n")
    first = next(row for row, folder in zip(rows, claimed, strict=True) if folder)
    others = f"and {len(rows) - 1} runs with it"
    try:
        with output_into(home / "log.txt"):
            results = train_runs(folders, claimed, home, stop_requested)
    except preemption.Preempted as stop:
        log_run(workdir, first, f"{others}: {stop}")
        raise
    except Exception as error:  # perhaps it is too large, or one run does not fit: each by itself says what is wrong
        if of_disk(error):  # one by one they would end in other bits
            raise
        together.separate(home, f"{type(error).__name__}: {error}")
        log_run(workdir, first, f"{others} are done one by one: {str(error).partition(chr(10))[0]}")
        return
    took = f"{len(rows)} runs together in {time.monotonic() - began:.1f} s"
    for row, result in zip(rows, results, strict=True):
        if result is not None:
            finish(workdir, row, result, 1, took)


def train_runs(folders, claimed, home: pathlib.Path, stop_requested: Callable[..., bool]):
    from tl_jax.training.train import train_together  # the imports that take seconds wait until there is work

    configs = [store.read_config(folder) for folder in folders]
    return train_together(configs, claimed, home, stop_requested=stop_requested)


def train_run(folder: pathlib.Path, stop_requested: Callable[..., bool]) -> dict[str, Any]:
    from tl_jax.training.train import train

    return train(store.read_config(folder), folder, verbose=False, stop_requested=stop_requested)


def log_run(workdir: pathlib.Path, row: Mapping[str, Any], text: str) -> None:
    """One line on the console: how many runs are over, which run this is, and what became of it."""
    if distributed.is_first():
        states = list(store.states(workdir).values())
        over = f"[{states.count('done') + states.count('failed')}/{len(states)}]"
        show(f"{over} {store.name_of(row)}: {text}", erase=True)


@contextlib.contextmanager
def output_into(path: pathlib.Path) -> Iterator[None]:
    """Appends all that this process prints to a file, compiled libraries and the traceback of an error included."""
    sys.stdout.flush(), sys.stderr.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    with writing(path), path.open("a", buffering=1) as file:
        for number in saved:
            os.dup2(file.fileno(), number)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        except Exception:
            with contextlib.suppress(OSError):  # the error may be that the disk is full
                traceback.print_exc(file=file)
            raise
        finally:
            for number, copy in saved.items():
                os.dup2(copy, number)
                os.close(copy)


if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
