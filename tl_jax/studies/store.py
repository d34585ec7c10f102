"""The runs of a study in files: what is planned, which state each run is in, and who works on it.

A run's folder W/runs/KEY is planned with its config.json, and from then on is
  done     result.json lies there;
  failed   failed.json does, with the error;
  running  a process holds the lock on `.claim`;
  stale    nobody holds it, but claim.json is left over: the process died;
  todo     none of these.
The lock goes with its process, however that ends, so no state can be left wrong by a crash.
"""

import collections
import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import IO, Any

from tl_jax import config
from tl_jax.core.files import read_json, write_json
from tl_jax.studies.study import RunSpec, Study, grid, metrics_of, title

ATTEMPTS = 3  # of a run whose process dies: more would be the same again
LINES = 20  # of a run's log that its failure keeps
STATES = ("done", "failed", "running", "stale", "todo")


def plan(workdir: pathlib.Path, name: str, question: str, study: Study) -> list[RunSpec]:
    """Writes W/study.json and the config.json of every run that is not done; finished runs stay finished.

    Raises ValueError for an invalid study (see `grid`), and where the workdir holds something else: a
    lone run, another study, or finished runs that this grid no longer has.
    """
    runs = grid(study)
    check_workdir(workdir, name, runs)
    for run in runs:
        run_folder(workdir, run.key).mkdir(parents=True, exist_ok=True)
    with waiting_lock(workdir / ".plan"):  # two launchers may start at once
        for run in runs:
            folder, flat = run_folder(workdir, run.key), config.flatten(run.config)
            path = folder / "config.json"
            if not path.exists() or (state(folder) != "done" and read_json(path) != flat):  # the speed may be another
                write_json(path, flat)
        write_json(workdir / "study.json", _table(name, question, study, runs))
    return runs


def _table(name: str, question: str, study: Study, runs: list[RunSpec]) -> dict[str, Any]:
    factors = {name: {level: dict(o) for level, o in levels.items()} for name, levels in study.factors.items()}
    plain = study._asdict() | {"factors": factors, "baseline": dict(study.baseline), "seeds": list(study.seeds)}
    rows = [{"key": run.key, "levels": run.levels, "seed": run.seed, "fold": run.fold} for run in runs]
    del plain["base"]
    return {"name": name, "question": question, **plain, "metrics": list(metrics_of(study)), "runs": rows}


def check_workdir(workdir: pathlib.Path, name: str, runs: list[RunSpec]) -> None:
    """Raises ValueError where this plan would lose sight of finished or running runs; says what differs."""
    path, advice = workdir / "study.json", "choose another --workdir"
    if not path.exists():
        if lone := [file for file in ("config.json", "result.json", "comparison.json") if (workdir / file).exists()]:
            raise ValueError(f"{workdir} holds a run by itself ({', '.join(lone)}), not a study; {advice}")
        return
    old = read_json(path)
    if old["name"] != name:
        raise ValueError(f"{workdir} holds the study {old['name']!r}, this is {name!r}; {advice}")
    planned = {run.key for run in runs}
    lost = [row for row in old["runs"] if row["key"] not in planned]
    lost = [row for row in lost if state(run_folder(workdir, row["key"])) in ("done", "running")]
    if not lost:
        return
    now = {title(run.levels, run.seed, run.fold): run for run in runs}
    lines: list[str] = []
    for row in lost:
        run = now.get(name := title(row["levels"], row["seed"], row["fold"]))
        if run is None:
            lines.append(f"  {name}: not in this grid")
        else:
            there = read_json(run_folder(workdir, row["key"]) / "config.json")
            lines += config.difference(there, config.flatten(run.config))
    lines = list(dict.fromkeys(lines))
    more = [f"  ... and {len(lines) - LINES} more"] if len(lines) > LINES else []
    raise ValueError(
        f"{workdir} has {len(lost)} finished or running run(s) that this grid has not; levels and seeds can be added, "
        f"not changed or dropped: {advice} (there -> now):\n" + "\n".join(lines[:LINES] + more)
    )


def read_plan(workdir: pathlib.Path) -> dict[str, Any]:
    """W/study.json; ValueError where no study is planned."""
    path = workdir / "study.json"
    if not path.exists():
        raise ValueError(f"there is no {path}: plan a study first, python launch.py --study NAME --workdir {workdir}")
    return read_json(path)


def run_folder(workdir: pathlib.Path, key: str) -> pathlib.Path:
    return workdir / "runs" / key


def states(workdir: pathlib.Path) -> dict[str, str]:
    """`{key: state}` of every planned run, in the order of the plan."""
    return {row["key"]: state(run_folder(workdir, row["key"])) for row in read_plan(workdir)["runs"]}


def state(folder: pathlib.Path) -> str:
    """One of STATES."""
    held = _is_held(folder)  # first: a run that ends meanwhile then has its result
    for name, word in (("result.json", "done"), ("failed.json", "failed")):
        if (folder / name).exists():
            return word
    return "running" if held else "stale" if (folder / "claim.json").exists() else "todo"


@contextlib.contextmanager
def claim(folder: pathlib.Path, home: pathlib.Path | None = None) -> Iterator[int | None]:
    """Claims a run for this process and yields which attempt this is, or None where the run is not to be had.

    An attempt counts when its process died without leaving a newer checkpoint (in `home`, for a run of a set); after
    ATTEMPTS of them the run is marked as failed instead. The claim ends with the block.
    """
    with (folder / ".claim").open("a+") as file:
        if not _take(file) or (folder / "result.json").exists() or (folder / "failed.json").exists():
            yield None
            return
        saved = [int(path.name) for path in (home or folder).glob("checkpoints/*") if path.name.isdigit()]
        path, step, attempts = folder / "claim.json", max(saved, default=-1), 1
        if path.exists():
            last = read_json(path)
            attempts = 1 if last["step"] < step else last["attempts"] + 1
        if attempts > ATTEMPTS:
            fail(folder, f"its process died {ATTEMPTS} times", ATTEMPTS)
            yield None
            return
        write_json(path, {"host": socket.gethostname(), "pid": os.getpid(), "attempts": attempts, "step": step})
        try:
            yield attempts
        finally:
            path.unlink(missing_ok=True)


def fail(folder: pathlib.Path, error: str, attempts: int) -> None:
    """Marks a run as failed, with the last lines of its log."""
    log, lines = folder / "log.txt", []
    if log.exists():
        with log.open(errors="replace") as file:
            lines = [line.rstrip("\n") for line in collections.deque(file, LINES)]
    write_json(folder / "failed.json", {"error": error, "log": lines, "attempts": attempts})
    (folder / "claim.json").unlink(missing_ok=True)


def retry(workdir: pathlib.Path) -> int:
    """Turns every failed run into one to do, and says how many; what it had saved it goes on from."""
    failed = runs_in(workdir, "failed")
    for _, folder in failed:
        (folder / "claim.json").unlink(missing_ok=True)
        (folder / "failed.json").unlink()
    return len(failed)


def runs_in(workdir: pathlib.Path, *words: str) -> list[tuple[dict[str, Any], pathlib.Path]]:
    """Row of study.json and folder of every planned run in one of these states."""
    found = [(row, run_folder(workdir, row["key"])) for row in read_plan(workdir)["runs"]]
    return [(row, folder) for row, folder in found if state(folder) in words]


def open_runs(workdir: pathlib.Path) -> list[str]:
    """The keys of the runs that are still to be taken."""
    return [row["key"] for row, _ in runs_in(workdir, "todo", "stale")]


def score(result: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a result.json, or NAME/METRIC of a set of data.extra_eval; None where it is undefined."""
    name, _, own = metric.rpartition("/")
    summary = result["extra_eval"][name] if name else result["metrics"]
    return summary[own]["value"]


def _is_held(folder: pathlib.Path) -> bool:
    try:
        with (folder / ".claim").open() as file:
            return not _try_lock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _take(file: IO) -> bool:
    """The lock of a run for this process. Whoever only looks whether it is locked shares it for a moment: try again."""
    while not (taken := _try_lock(file, fcntl.LOCK_EX)) and _try_lock(file, fcntl.LOCK_SH):
        pass
    return taken


def _try_lock(file: IO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def waiting_lock(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock file, for which others wait."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
