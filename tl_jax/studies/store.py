"""The runs of a study in files, W/runs/KEY: what is planned, which state each is in (docs/studies.md), who works on it.

A running one is locked; the lock goes with its process, however that ends, so that no crash leaves a wrong state.
"""

import contextlib
import fcntl
import functools
import os
import pathlib
import re
import socket
from collections.abc import Iterator, Mapping
from typing import IO, Any

from ml_collections import ConfigDict

from tl_jax import config
from tl_jax.core import checks, messages
from tl_jax.core.checks import TABLE, TEXT, TEXTS
from tl_jax.core.files import read_json, write_json
from tl_jax.core.options import SEED, TABLES
from tl_jax.data import resample
from tl_jax.runtime import preemption
from tl_jax.studies.study import KEY, RunSpec, Study, grid, metrics_of, title

ATTEMPTS = 3  # of a run whose process dies: more would be the same again
LINES = 20  # of a run's log that its failure keeps
FAILED = {"error": TEXT, "log": TEXTS, "attempts": checks.integer(0)}  # what failed.json has
ROW = {"key": TEXT, "levels": TABLE, "seed": SEED, "fold": TEXT}  # a run in study.json
PLAN = {  # what study.json has
    "name": TEXT, "question": TEXT,
    "factors": checks.Check(lambda x: TABLE.fits(x) and all(map(TABLES.fits, x.values())), "{factor: {level: {}}}"),
    "baseline": TABLE, "seeds": checks.sequence(SEED, "integers"),
    "metrics": checks.Check(lambda x: TEXTS.fits(x) and len(x) > 0, "names of metrics"),
    "design": checks.Check(lambda x: _is_design(x), f"one of {resample.DESIGNS}"),
    "runs": checks.Check(lambda x: isinstance(x, list) and all(map(_is_row, x)), f"rows of {', '.join(ROW)}"),
}  # fmt: skip
STATES = ("done", "failed", "running", "stale", "todo")


def _is_row(row: Any) -> bool:
    whole = isinstance(row, dict) and row.keys() >= ROW.keys() and all(ROW[name].fits(row[name]) for name in ROW)
    return whole and re.fullmatch(r"\w+", row["key"]) is not None


def _is_design(text: Any) -> bool:
    with contextlib.suppress(ValueError, TypeError):
        return bool(resample.folds(text))
    return False


def plan(workdir: pathlib.Path, name: str, question: str, study: Study) -> list[RunSpec]:
    """Writes W/study.json and the config.json of all runs that are not done; ValueError as `grid`, `check_workdir`."""
    runs = grid(study)
    check_workdir(workdir, name, runs)
    workdir.mkdir(parents=True, exist_ok=True)
    with waiting_lock(workdir / ".plan"):  # two launchers may start at once
        for run in runs:
            folder, flat = run_folder(workdir, run.key), config.flatten(run.config)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "config.json"
            # The speed may be another; the file of a run under way stays as its manifest will say.
            if not path.exists() or (state(folder) not in ("done", "running") and read_json(path) != flat):
                write_json(path, flat)
        factors = {name: {level: dict(o) for level, o in levels.items()} for name, levels in study.factors.items()}
        rows = [{key: getattr(run, key) for key in ("key", "levels", "seed", "fold")} for run in runs]
        table = {
            "name": name, "question": question, "factors": factors, "baseline": dict(study.baseline),
            "seeds": list(study.seeds), "metrics": metrics_of(study), "design": study.design,
            "together": study.together, "runs": rows,
        }  # fmt: skip
        write_json(workdir / "study.json", table)
    return runs


def check_workdir(workdir: pathlib.Path, name: str, runs: list[RunSpec]) -> None:
    """Raises ValueError where the workdir holds a lone run, another study, or runs that this grid no longer has."""
    path, advice = workdir / "study.json", "choose another --workdir"
    if not path.exists():
        if lone := [file for file in ("config.json", "result.json", "comparison.json") if (workdir / file).exists()]:
            raise ValueError(f"{workdir} holds a run by itself ({', '.join(lone)}), not a study; {advice}")
        return
    old = read_plan(workdir)
    if old["name"] != name:
        raise ValueError(f"{workdir} holds the study {old['name']!r}, this is {name!r}; {advice}")
    planned = {run.key for run in runs}
    lost = [(row, folder) for row, folder in runs_in(workdir, "done", "running") if row["key"] not in planned]
    now = {title(run.levels, run.seed, run.fold): config.flatten(run.config) for run in runs} if lost else {}
    lines: list[str] = []
    for row, folder in lost:
        flat, name = read_json(folder / "config.json"), name_of(row)
        lines += config.difference(flat, now[name]) if name in now else [f"  {name}: not in this grid"]
    if lost:
        what = f"{workdir} has {len(lost)} finished or running run(s) that this grid has not; levels and seeds can be"
        what += f" added, not changed or dropped: {advice} (there -> now):"
        raise ValueError("\n".join([what, *messages.shorten(list(dict.fromkeys(lines)), LINES)]))


def read_plan(workdir: pathlib.Path) -> dict[str, Any]:
    """W/study.json; ValueError where no study is planned, and where the file is no plan."""
    path = workdir / "study.json"
    if not path.exists():
        raise ValueError(f"there is no {path}: plan a study first, python launch.py --study NAME --workdir {workdir}")
    plan = read_json(path, PLAN)
    chosen = [plan["baseline"], *(row["levels"] for row in plan["runs"])]
    if any(level not in [*plan["factors"].get(name, ())] for each in chosen for name, level in each.items()) or any(
        row["levels"].keys() != plan["factors"].keys() for row in plan["runs"]
    ):
        raise ValueError(f"{path} is damaged: its runs or its baseline have other levels than its factors; restore it")
    return plan


def read_config(folder: pathlib.Path) -> ConfigDict:
    """The config of a planned run; ValueError where it is not the one that the folder's name is the hash of."""
    found = config.read(folder / "config.json")
    if (key := config.fingerprint(found)[:KEY]) != folder.name:
        wrong = f"its options have the hash {key}, expected that of the folder's name: it was changed"
        raise ValueError(
            f"{folder / 'config.json'}: {wrong}. Start the study again, which writes it anew, or restore it"
        )
    return found


def run_folder(workdir: pathlib.Path, key: str) -> pathlib.Path:
    return workdir / "runs" / key


def name_of(row: Mapping[str, Any]) -> str:
    """How messages name a run, a row of study.json."""
    return title(row["levels"], row["seed"], row["fold"])


def states(workdir: pathlib.Path) -> dict[str, str]:
    """`{key: state}` in the order of the plan."""
    return {row["key"]: state(run_folder(workdir, row["key"])) for row in read_plan(workdir)["runs"]}


def state(folder: pathlib.Path) -> str:
    """One of STATES."""
    try:  # first: a run that ends meanwhile then has its result
        with (folder / ".claim").open() as file:
            running = not _try_lock(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        running = False
    if (folder / "result.json").exists():
        return "done"
    if (folder / "failed.json").exists():
        return "failed"
    return "running" if running else "stale" if (folder / "claim.json").exists() else "todo"


@contextlib.contextmanager
def claim(folder: pathlib.Path, home: pathlib.Path | None = None) -> Iterator[int | None]:
    """Claims a run within the block and yields which attempt this is, or None where the run is not to be had.

    An attempt counts when its process died without leaving a newer checkpoint (in `home`, for a run of a set); after
    ATTEMPTS of them the run is marked as failed instead.
    """
    with (folder / ".claim").open("a+") as file:
        while not (taken := _try_lock(file, fcntl.LOCK_EX)) and _try_lock(file, fcntl.LOCK_SH):
            pass  # whoever only looks whether it is locked shares the lock for a moment
        if not taken or (folder / "result.json").exists() or (folder / "failed.json").exists():
            yield None
            return
        saved = [int(path.name) for path in (home or folder).glob("checkpoints/*") if path.name.isdigit()]
        path, step, attempts = folder / "claim.json", max(saved, default=-1), 1
        if path.exists():
            last = read_claim(folder)
            attempts = 1 if last["step"] < step else last["attempts"] + 1
        if attempts > ATTEMPTS:
            fail(folder, f"its process died {ATTEMPTS} times", ATTEMPTS)
            yield None
            return
        write_json(path, {"host": socket.gethostname(), "pid": os.getpid(), "attempts": attempts, "step": step})
        remove = functools.partial(path.unlink, missing_ok=True)
        preemption.CLEANUPS.append(remove)
        try:
            yield attempts
        finally:
            preemption.CLEANUPS.remove(remove)
            remove()


def read_claim(folder: pathlib.Path) -> dict[str, int]:
    """Process, attempts and step of the claim in a run's folder; of a damaged one as if none had been tried."""
    unknown = {"pid": -1, "attempts": 0, "step": -1}
    with contextlib.suppress(OSError, ValueError):
        known = read_json(folder / "claim.json")
        if all(type(known.get(name)) is int for name in unknown):
            return known
    return unknown


def fail(folder: pathlib.Path, error: str, attempts: int) -> None:
    """Marks a run as failed, with the last lines of its log."""
    log = folder / "log.txt"
    lines = log.read_text(errors="replace").splitlines()[-LINES:] if log.exists() else []
    write_json(folder / "failed.json", {"error": error, "log": lines, "attempts": attempts})
    (folder / "claim.json").unlink(missing_ok=True)


def retry(workdir: pathlib.Path) -> int:
    """Turns every failed run into one to do, which goes on from what it had saved; returns how many."""
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
