"""Handing a command to a scheduler: what slurm.py and cloud.py share. Settings, what would be run, and running it."""

import pathlib
import re
import shlex
import subprocess
from collections.abc import Collection, Sequence
from typing import NamedTuple

from tl_jax.core import messages
from tl_jax.studies import store


class Plan(NamedTuple):
    """A command, as its arguments, and what it reads from its standard input."""

    command: list[str]
    stdin: str = ""

    def to_text(self) -> str:
        """The command as one can paste it into a shell."""
        line = shlex.join(self.command)
        return f"{line} <<'EOF'\n{self.stdin}\nEOF" if self.stdin else line


def carry_out(plan: Plan, submit: bool) -> int:
    """Prints the plan, and with `submit` runs it; returns the exit code. Raises ValueError where its program is not."""
    print(plan.to_text(), flush=True)
    if not submit:
        print("# not run: add --submit, or run it yourself", flush=True)
        return 0
    try:
        return subprocess.run(plan.command, input=plan.stdin or None, text=True).returncode
    except FileNotFoundError:
        raise ValueError(f"there is no program {plan.command[0]!r} here; run this where the scheduler is") from None


def parse_settings(text: str) -> dict[str, str]:
    """ "key=value,key=value" as a table; a comma that no `key=` follows belongs to the value.

    Raises ValueError that lists every part that is no key=value.
    """
    parts = [part for part in re.split(r",(?=[\w./-]+=)", text) if part]
    if wrong := [part for part in parts if not re.match(r"[\w./-]+=", part)]:
        raise ValueError(f"expected key=value,key=value; these are not: {wrong}")
    return dict(part.split("=", 1) for part in parts)


def check_settings(flag: str, settings: dict[str, str], needed: Collection[str], known: Collection[str]) -> None:
    """Raises one ValueError that names every setting that is missing, empty or unknown; known ones may end in `*`."""
    problems = [f"  {name} is missing" for name in needed if not settings.get(name)]
    prefixes = tuple(name[:-1] for name in known if name.endswith("*"))
    for name in settings:
        if name not in {*needed, *known} and not (prefixes and name.startswith(prefixes)):
            problems.append(f"  {name} is unknown{messages.nearest(name, {*needed, *known})}")
    if problems:
        expected = ", ".join(needed) + (f"; possible: {', '.join(known)}" if known else "")
        raise ValueError(f"{flag} does not fit:\n" + "\n".join(problems) + f"\nneeded: {expected}")


def open_runs(workdir: pathlib.Path) -> list[str]:
    """The keys of a study's runs that are still to be taken."""
    return [key for key, word in store.states(workdir).items() if word in ("todo", "stale")]


def worker_arguments(workdir: pathlib.Path) -> list[str]:
    """The arguments of python for a worker of the study; the keys of its runs come behind them."""
    return ["-m", "tl_jax.studies.worker", str(workdir.absolute()), "--only"]


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


HANDING_OVER = {"launcher": True, "slurm": True, "cloud": True, "submit": False}  # flags, and whether a value follows
