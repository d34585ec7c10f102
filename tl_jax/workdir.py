"""The folder of a run: whole files or none, one process at a time, one config for ever."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from tl_jax import trees


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the whole new one, never a part."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """As `write_json`, for any text."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads what `write_json` wrote; raises ValueError that names the file where it is something else."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move the file away, or take another workdir") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged (no table in it); move the file away, or take another workdir")
    return value


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; none where there is no file, and a last line that was cut short is left out."""
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


@contextlib.contextmanager
def lock(workdir: pathlib.Path):
    """Holds the workdir for this process; raises ValueError where another one holds it. A killed process lets go."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is running in {workdir}; wait for it, or choose another --workdir"
            ) from None
        yield


def check_options(workdir: pathlib.Path, options: Mapping[str, Any]) -> None:
    """Raises ValueError where the workdir has a result or checkpoints of a run with other options."""
    path = workdir / "config.json"
    if not path.exists() or not ((workdir / "result.json").exists() or any(workdir.glob("checkpoints/[0-9]*"))):
        return  # nothing to protect: a run that ended before its first checkpoint may be started with other options
    if changed := trees.difference(read_json(path), options):
        raise ValueError(
            f"{workdir} holds a run with other options; choose another --workdir (there -> now):\n" + "\n".join(changed)
        )
