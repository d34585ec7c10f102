"""Arrays in a folder: `leaves` has their bytes one after the other, `index` says what they are and hashes everything.

The first line of `index` is the sha256 of what follows it: JSON with the caller's meta data and, for each path, dtype,
shape, offset and the hash of `trees.leaf_hash`. So a flipped bit is found wherever it is.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tl_jax import trees

FLUSH = 2**26  # bytes after which the disk may begin: it then writes while later leaves are copied and hashed
THREADS = min(4, os.cpu_count() or 1)


class Index(NamedTuple):
    """What a folder says of itself: the caller's meta data, and per path {"dtype", "shape", "offset", "sha256"}."""

    meta: dict[str, Any]
    leaves: dict[str, dict[str, Any]]

    @property
    def hashes(self) -> dict[str, str]:
        """`{path: sha256}`, as `trees.leaf_hashes` gives them."""
        return {path: entry["sha256"] for path, entry in self.leaves.items()}


def write(folder: pathlib.Path, leaves: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Writes the files, and returns when they are on disk."""
    table, offset, flushed = {}, 0, 0
    with (
        open(folder / "leaves", "wb", buffering=0) as file,
        ThreadPoolExecutor(THREADS) as pool,
        ThreadPoolExecutor(1) as disk,
    ):
        hashes = {path: pool.submit(trees.leaf_hash, leaf) for path, leaf in leaves.items()}
        flushes = []
        try:
            for path, leaf in leaves.items():
                rest = memoryview(trees.as_bytes(leaf))
                table[path] = {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "offset": offset}
                offset += len(rest)
                while rest:  # a write may take a part only
                    rest = rest[file.write(rest[:FLUSH]) :]
                if offset - flushed >= FLUSH:
                    flushed = offset
                    flushes.append(disk.submit(os.fsync, file.fileno()))
            for flush in flushes:
                flush.result()
            os.fsync(file.fileno())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        for path, value in hashes.items():
            table[path]["sha256"] = value.result()
    text = json.dumps({"meta": meta, "leaves": table})
    with open(folder / "index", "w") as file:
        file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
        file.flush()
        os.fsync(file.fileno())


def read_index(folder: pathlib.Path) -> Index:
    """The index of a folder; raises OSError, or ValueError where it is not what was written."""
    sha256, _, text = (folder / "index").read_bytes().partition(b"\n")
    if hashlib.sha256(text).hexdigest() != sha256.decode(errors="replace"):
        raise ValueError("the index is not what was written")
    return Index(**json.loads(text))


def read(folder: pathlib.Path, index: Index) -> dict[str, np.ndarray]:
    """The arrays by path; raises ValueError that names those which are not what was written."""
    with open(folder / "leaves", "rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:

        def read_leaf(entry: Mapping[str, Any]) -> tuple[np.ndarray, bool]:
            leaf = np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
            rest, offset = memoryview(trees.as_bytes(leaf)), entry["offset"]
            while rest and (count := os.preadv(file.fileno(), [rest[:FLUSH]], offset)):
                rest, offset = rest[count:], offset + count
            return leaf, trees.leaf_hash(leaf) == entry["sha256"]

        found = dict(zip(index.leaves, pool.map(read_leaf, index.leaves.values()), strict=True))
    if changed := [path for path, (_, sound) in found.items() if not sound]:
        listing = "\n".join(f"  {path}" for path in changed[:3]) + (f"\n  ... {len(changed)}" if changed[3:] else "")
        raise ValueError(f"leaves differ from what was saved:\n{listing}")
    return {path: leaf for path, (leaf, _) in found.items()}
