"""Files that are replaced as a whole, so that a reader sees the old or the new one; locks, JSON and rows of JSON."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import re
import secrets
from collections.abc import Mapping
from typing import Any, BinaryIO

from tl_jax.core.checks import Check
from tl_jax.core.messages import brief

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # full, over a quota, read-only, faulty
SEAL = re.compile(r'.{10}[0-9a-f]{64}", ')  # where _sealed puts it


@contextlib.contextmanager
def writing(path):
    """Gives an error of the block the file's name where the system leaves it out, or names a temporary one."""
    try:
        yield
    except OSError as error:
        if error.strerror and str(error.filename or ".tmp").endswith(".tmp"):
            error.filename = str(path)
        raise


def no_room(text: str) -> OSError:
    """What to raise before something is written that does not fit; its errno is ENOSPC, and it prints as `text`."""
    error = OSError(text)
    error.errno = errno.ENOSPC
    return error


def of_disk(error: BaseException) -> bool:
    """Whether an error is that of a disk, which fails whatever is asked of it."""
    return isinstance(error, OSError) and error.errno in DISK


@contextlib.contextmanager
def atomic_write(path):
    """Opens a binary file that appears under its name only when it is complete and on disk; else nothing changes.

    What processes left that were killed while they wrote the same file goes.
    """
    path = pathlib.Path(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever writes it has the lock
            leftover.unlink()
    with writing(path):
        file = _temporary(path)
    try:
        with writing(path), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
    finally:
        pathlib.Path(file.name).unlink(missing_ok=True)


def _temporary(path: pathlib.Path) -> BinaryIO:
    """A new file beside `path`, locked as long as it is open."""
    while True:
        file = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp").open("x+b")
        with contextlib.suppress(OSError):  # a file system without locks: nothing is ever removed there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process took it for a leftover before it was locked


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
    """Writes a table as JSON, with the sha256 of its text as first entry, "seal", which `read_json` checks."""
    text = json.dumps(value, indent=1) + "\n"
    write_text(path, _sealed(text) if text.startswith("{\n") else text)


def _sealed(text: str) -> str:
    return f'{{"seal": "{hashlib.sha256(text.encode()).hexdigest()}", {text[1:]}'


def write_text(path: pathlib.Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def read_json(path: pathlib.Path, fields: Mapping[str, Check] | None = None) -> dict[str, Any]:
    """Reads what `write_json` wrote; raises ValueError that names the file where one bit of it is another.

    A table that never had a seal, such as one written by hand, is read as it is. fields: those that the table must
    have, others may be there.
    """
    try:
        text = path.read_bytes().decode()
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("no table in it")
        # A flipped bit spoils the word or the hash, and not both.
        if (value.pop("seal", None) or SEAL.match(text)) and _sealed("{" + text[len(_sealed("{")) :]) != text:
            raise ValueError("its text is not that which was written")
        wrong = [name for name, check in (fields or {}).items() if name not in value or not check.fits(value[name])]
        if wrong:
            found = [f"{name} = {brief(value[name])}" if name in value else f"no {name}" for name in wrong]
            expected = (f"{name}: {fields[name].expected}" for name in wrong)
            raise ValueError(f"it has {', '.join(found)}; expected {', '.join(expected)}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore the file, or move it away") from None
    return value


def as_tuples(value: Any) -> Any:
    """A value with a tuple for every list in it, as configs and cards have what JSON keeps in lists."""
    if isinstance(value, Mapping):
        return {key: as_tuples(inner) for key, inner in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; none where there is no file, and a last line that was cut short is left out.

    Raises ValueError that names the file and its damaged lines.
    """
    rows, damaged = sound_rows(path)
    if damaged:
        where = ", ".join(map(str, damaged[:10]))
        raise ValueError(f"{path} is damaged: expected a table of JSON in each line, found none in {where}; restore it")
    return rows


def sound_rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[int]]:
    """As `read_rows`, and the numbers of the lines, from 1, that are no rows."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    rows, damaged = [], []
    for number, line in enumerate(lines[:-1], 1):
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        (rows if isinstance(row, dict) else damaged).append(row if isinstance(row, dict) else number)
    return rows, damaged
