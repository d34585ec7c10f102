"""Arrays in a folder: `leaves` has their bytes one after the other, `index` says what they are and hashes everything.

The first line of `index` is the sha256 of what follows it: JSON with the caller's meta data and, for each path, dtype,
shape, offset (null: kept elsewhere) and the hash of `trees.leaf_hash`. So a flipped bit is found wherever it is.
"""

import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tl_jax.core import files, messages, trees

CHUNK = 2**23  # bytes written or read at once
BLOCK = 4096  # past the system's cache, a disk takes multiples of this, from memory that begins at one
THREADS = min(4, os.cpu_count() or 1)


class Index(NamedTuple):
    """The caller's meta data, and per path {"dtype", "shape", "offset", "sha256"}; offset None: kept elsewhere."""

    meta: dict[str, Any]
    leaves: dict[str, dict[str, Any]]


def write(
    folder: pathlib.Path, leaves: Mapping[str, np.ndarray], meta: str, elsewhere: Mapping[str, Mapping] | None = None
) -> None:
    """Writes the files, to disk; meta: JSON; elsewhere: {"dtype", "shape", "sha256"} of arrays that are named only."""
    table: dict[str, dict[str, Any]] = {path: {**entry, "offset": None} for path, entry in (elsewhere or {}).items()}
    for path, offset in zip(leaves, itertools.accumulate((x.nbytes for x in leaves.values()), initial=0), strict=False):
        table[path] = {"dtype": leaves[path].dtype.name, "shape": list(leaves[path].shape), "offset": offset}
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = {path: pool.submit(trees.leaf_hash, leaf) for path, leaf in leaves.items()}
        try:
            with files.writing(folder / "leaves"):
                _write_to_disk(folder / "leaves", [trees.as_bytes(leaf) for leaf in leaves.values()])
        except BaseException:
            (folder / "leaves").unlink(missing_ok=True)  # perhaps the disk is full
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for path, value in hashes.items():
            table[path]["sha256"] = value.result()
    text = f'{{"meta": {meta}, "leaves": {json.dumps(table)}}}'
    with files.writing(folder / "index"), open(folder / "index", "w") as file:
        file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        file.flush()
        os.fsync(file.fileno())


def _write_to_disk(path: pathlib.Path, pieces: Sequence[np.ndarray]) -> None:
    """Writes bytes one after the other, past the system's cache where it can: half the processor time."""
    flags, chunk = os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mmap.mmap(-1, CHUNK)  # which begins at a page
    try:
        file = os.open(path, flags | getattr(os, "O_DIRECT", 0))
    except OSError:  # this file system only writes through the cache, or the next line fails as well
        file = os.open(path, flags)
    try:
        filled = 0
        for rest in pieces:
            while len(rest):
                some, rest = np.split(rest, [CHUNK - filled])
                chunk[filled : filled + len(some)] = some.data
                filled += len(some)
                if filled == CHUNK:
                    _write_whole(file, memoryview(chunk))
                    filled = 0
        _write_whole(file, memoryview(chunk)[: -(-filled // BLOCK) * BLOCK])
        os.ftruncate(file, sum(map(len, pieces)))
        os.fsync(file)
    finally:
        os.close(file)


def _write_whole(file: int, data: memoryview) -> None:
    direct = getattr(os, "O_DIRECT", 0)
    while data:
        try:
            data = data[os.write(file, data) :]  # a write may take only some of it
        except OSError as error:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & direct:
                raise
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~direct)


def read_index(folder: pathlib.Path) -> Index:
    """The index of a folder; raises OSError, or ValueError where it is not what was written."""
    sha256, _, text = (folder / "index").read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest() != sha256.decode(errors="replace"):
        raise ValueError("the index is not what was written")
    return Index(**json.loads(text))


def read(folder: pathlib.Path, index: Index) -> dict[str, np.ndarray]:
    """The arrays that are here, by path; raises ValueError that names those which are not what was written."""
    with open(folder / "leaves", "rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:

        def read_leaf(entry: Mapping[str, Any]) -> np.ndarray | None:
            leaf = np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
            rest, offset = memoryview(trees.as_bytes(leaf)), entry["offset"]
            while rest and (count := os.preadv(file.fileno(), [rest[:CHUNK]], offset)):
                rest, offset = rest[count:], offset + count
            return leaf if trees.leaf_hash(leaf) == entry["sha256"] else None

        here = {path: entry for path, entry in index.leaves.items() if entry["offset"] is not None}
        found = dict(zip(here, pool.map(read_leaf, here.values()), strict=True))
    if changed := [path for path, leaf in found.items() if leaf is None]:
        raise ValueError(f"leaves differ from what was saved:\n{messages.listed(changed, 3)}")
    return found
