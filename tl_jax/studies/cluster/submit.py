"""Handing a command to a scheduler: what slurm.py and cloud.py share. Settings, what would be run, and running it."""

import pathlib
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tl_jax.studies import store

HANDING_OVER = {"launcher": True, "slurm": True, "cloud": True, "submit": False}  # flags, and whether a value follows


class Plan(NamedTuple):
    """A command, as its arguments, and what it reads from its standard input."""

    command: list[str]
    stdin: str = ""


def launch(
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
    """ "key=value,key=value" as a table; a comma that no `key=` follows belongs to the value.

    Raises ValueError that lists every part that is no key=value.
    """
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
