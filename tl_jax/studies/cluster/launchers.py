"""From the command line to a study under way; and what slurm.py and cloud.py share: settings, and running a command."""

import pathlib
import pkgutil
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tl_jax.studies import store
from tl_jax.studies import study as studies

# Each is a function (workdir, *, jobs, ...) -> exit code, imported when it is asked for. The local one also takes
# stop_requested; those that hand a study to a cluster take (settings, submit), and any command of ours instead.
LAUNCHERS = {
    "local": "tl_jax.studies.local:launch",
    "slurm": "tl_jax.studies.cluster.slurm:launch",
    "tpu": "tl_jax.studies.cluster.cloud:launch_tpu",
    "gke": "tl_jax.studies.cluster.cloud:launch_gke",
}
HANDING_OVER = {"launcher": True, "slurm": True, "cloud": True, "submit": False}  # flags, and whether a value follows


def start(
    text: str, workdir: str | pathlib.Path | None, *, launcher: str = "local", jobs: int = 0, settings: str = "",
    submit: bool = False, dry_run: bool = False, retry: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
) -> int:  # fmt: skip
    """Plans the study `experiments/NAME[:argument]` in its workdir (default: workdirs/NAME) and launches it.

    Returns the exit code; a dry run prints the grid and its cost, and writes nothing. ValueError for an invalid study,
    or a workdir that holds something else.
    """
    own = _cluster_options(launcher, settings, submit) or {"stop_requested": stop_requested}
    name, question, study = studies.load(text)
    workdir = pathlib.Path(workdir or f"workdirs/{name}")
    if dry_run:
        from tl_jax.studies import estimate

        runs = studies.grid(study)
        store.check_workdir(workdir, name, runs)
        estimate.show(workdir, name, study, runs, jobs)
        return 0
    store.plan(workdir, name, question, study)
    if retry and (count := store.retry(workdir)):
        print(f"{count} failed run(s) will be tried again", flush=True)
    return pkgutil.resolve_name(LAUNCHERS[launcher])(workdir, jobs=jobs, **own)


def hand_over(command: Sequence[str], workdir: str | pathlib.Path, launcher: str, settings: str, submit: bool) -> int:
    """Gives `python COMMAND...`, which works in `workdir`, to a launcher of a cluster; returns its exit code."""
    return pkgutil.resolve_name(LAUNCHERS[launcher])(
        pathlib.Path(workdir), command=command, **_cluster_options(launcher, settings, submit)
    )


def _cluster_options(launcher: str, settings: str, submit: bool) -> dict[str, Any]:
    """What a launcher takes besides its jobs; ValueError where the local one is given anything."""
    if launcher != "local":
        return {"settings": settings, "submit": submit}
    if settings or submit:
        raise ValueError("--submit, --slurm and --cloud are for a cluster: add --launcher slurm, tpu or gke")
    return {}


class Plan(NamedTuple):
    """A command, as its arguments, and what it reads from its standard input."""

    command: list[str]
    stdin: str = ""


def hand_out(
    plan: Callable[[Sequence[str], Sequence[str], str, pathlib.Path, int], Plan], workdir: pathlib.Path, *,
    command: Sequence[str] = (), settings: str = "", jobs: int = 0, submit: bool = False,
) -> int:  # fmt: skip
    """Prints the command that hands a planned study, or `python COMMAND...`, to a scheduler; runs it with `submit`.

    plan: (arguments of python, keys of runs that follow them, settings, workdir, jobs) -> Plan. The workdir is the same
    folder here and there. Returns the exit code. Raises ValueError for settings that do not fit or a missing program.
    """
    keys = [] if command else store.open_runs(workdir)
    report = f"python -m tl_jax report {workdir}"
    if not command and not keys:
        print(f"{workdir}: nothing to do, see {report}", flush=True)
        return 0
    worker = ["-m", "tl_jax.studies.worker", str(workdir.absolute()), "--only"]
    words, stdin = plan(command or worker, keys, settings, workdir, jobs)
    print(shlex.join(words) + (f" <<'EOF'\n{stdin}\nEOF" if stdin else ""), flush=True)
    code = 0
    if not submit:
        print("# not run: add --submit, or run it yourself", flush=True)
    else:
        try:
            code = subprocess.run(words, input=stdin or None, text=True).returncode
        except FileNotFoundError:
            raise ValueError(f"there is no program {words[0]!r} here; run this where the scheduler is") from None
    if keys:
        print(f"# afterwards: {report}", flush=True)
    return code


def parse_settings(text: str) -> dict[str, str]:
    """ "key=value,key=value" as a table; a value may hold commas. ValueError lists what is no key=value."""
    parts = [part for part in re.split(r",(?=[\w./-]+=)", text) if part]
    if wrong := [part for part in parts if not re.match(r"[\w./-]+=", part)]:
        raise ValueError(f"expected key=value,key=value; these are not: {wrong}")
    return dict(part.split("=", 1) for part in parts)


def own_arguments(argv: Sequence[str]) -> list[str]:
    """A command line without the flags that hand it to a launcher, `--flag=value` or `--flag value`."""
    kept, skip = [], False
    for argument in argv:
        name, equals, _ = argument.lstrip("-").partition("=")
        ours = argument.startswith("-") and name in HANDING_OVER
        if not skip and not ours:
            kept.append(argument)
        skip = not skip and ours and not equals and HANDING_OVER[name]
    return kept
