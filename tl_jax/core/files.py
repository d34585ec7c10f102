"""Files that are replaced as a whole, so that a reader sees the old or the new one; locks, JSON and rows of JSON."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


@contextlib.contextmanager
def atomic_write(path):
    """Opens a binary file that appears under its name only when it is complete and on disk; else nothing changes."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: pathlib.Path, busy: str):
    """Locks a file until the block or the process ends; ValueError `busy` where another process has the lock."""
    with path.open("w") as file:  # stays: removing it would let two in that opened it before and after
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(busy) from None
        yield


def sha256(path) -> str:
    """The file's SHA-256 as 64 lower-case hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads what `write_json` wrote; raises ValueError that names the file where it is something else."""
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError("no table in it")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move the file away, or take another workdir") from None
    return value


def as_tuples(value: Any) -> Any:
    """A value with a tuple for every list in it, as configs and cards have what JSON keeps in lists."""
    if isinstance(value, Mapping):
        return {key: as_tuples(inner) for key, inner in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; none where there is no file, and a last line that was cut short is left out."""
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]
