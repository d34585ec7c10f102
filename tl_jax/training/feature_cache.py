"""Cached outputs of frozen networks: memory-mapped columns on disk, read in every epoch by the same train step.

Each set has a folder named by a hash of all that its numbers depend on: the frozen weights, the network, the card, the
examples, the cut and the augmentation. Runs that agree in these share it.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from tl_jax.core import console, files, messages
from tl_jax.data.pipeline import Batches, TrainBatches
from tl_jax.data.text.tokens import Tokens
from tl_jax.data.views import IN_MEMORY
from tl_jax.runtime import distributed
from tl_jax.runtime.log import log
from tl_jax.runtime.preemption import Preempted, Stop, check, saved_by
from tl_jax.runtime.sharding import Parallel
from tl_jax.training.frozen_columns import Column

FOLDER = pathlib.Path.home() / ".cache" / "tl_jax" / "features"
SAVE_EVERY = 30.0  # seconds of computing that a kill may cost


class Cached(NamedTuple):
    """A set of features [views, examples, ...] on disk; `source` yields the examples they are computed from."""

    folder: pathlib.Path
    key: dict[str, Any]
    source: TrainBatches
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def file(self) -> pathlib.Path:
        return self.folder / "features.bin"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def open(self, mode: str) -> np.ndarray:
        return np.memmap(self.file, self.dtype, mode, shape=self.shape)


def fill(
    sets: Mapping[str, Batches],
    column: Column,
    variables: Mapping[str, Any],
    parallel: Parallel,
    *,
    batch_size: int,
    views: int = 1,
    folder: str = "",
    stop_requested: Stop = lambda step: False,
) -> dict[str, np.ndarray]:
    """The column of each set of batches, [views, N, ...], read from disk or computed now and kept there.

    sets: by name, for messages. variables: of all networks, placed on the devices. batch_size: of the computation.
    views: the number of epochs of augmented training batches that are kept: epoch e has the features of epoch
    e % views. folder: where the sets are kept; "" is FOLDER.

    A set, finished or not, whose bytes are not those that were written is computed anew. Raises OSError, before
    anything is computed, where the disk has no room for what is missing, and where it does not hold what was written;
    Preempted, with what was computed kept, soon after `stop_requested(0)` has become true.
    """
    root = pathlib.Path(folder or FOLDER).expanduser()
    found = {name: _describe(folder, column, batches, variables, batch_size, views) for name, batches in sets.items()}
    kept, predict = {}, parallel.evaluate(column.compute)
    first = {cached.folder: name for name, cached in reversed(found.items())}  # several may agree in all that counts
    distinct = {name: cached for name, cached in found.items() if first[cached.folder] == name}
    if jax.process_index() == 0:
        _make_room(root, {name: c for name, c in distinct.items() if not (c.folder / "meta.json").exists()})
    for name, cached in distinct.items():
        with _locked(cached, stop_requested):
            if not distributed.from_first(lambda cached=cached: _is_sound(cached, stop_requested)):
                log(f"computing the features of {name} {column.title}: {_size(cached)}")
                _compute(cached, column.view, lambda x: predict(variables, x), parallel, stop_requested)
        kept[cached.folder] = _read(cached)
    return {name: kept[cached.folder] for name, cached in found.items()}


def is_kept(column: Column, batches: Batches, variables: Mapping[str, Any], folder: str = "") -> bool:
    """Whether `fill` would find the column of these batches, without augmentation, on disk."""
    return (_describe(folder, column, batches, variables, 1, 1).folder / "meta.json").exists()


def example(batches: TrainBatches, view: str) -> jax.ShapeDtypeStruct:
    """The shape of one example of a view, [1, ...]."""
    known = batches.prepared.get(view)
    if isinstance(known, Tokens):
        return jax.ShapeDtypeStruct((1, known.texts * known.lengths[-1], 2), np.int32)
    shape, dtype = batches.shapes[view] if known is None else (known.shape[1:], known.dtype)
    return jax.ShapeDtypeStruct((1, *shape[1:]), dtype)


def _describe(root: str, column: Column, batches: Batches, variables: Any, size: int, views: int) -> Cached:
    """Where a set is kept, and what yields its examples, each once a view."""
    source, render, draws = batches.source, batches.renders.get(column.view), ""
    if isinstance(batches, TrainBatches) and render is not None and render.preprocess.ops:
        ops, draws, seed, order = list(render.preprocess.ops), render.draws, batches.seed, batches.order
        equal = source.num_domains * batches.process_count  # a batch has as many rows of each domain on each process
        size = max(size - size % equal, equal)
    else:  # in one order, whatever that of training is
        source, ops, seed, order, views = dataclasses.replace(source, domains=None), [], 0, "shuffled", 1
    renders, prepared = (
        {name: x for name, x in table.items() if name == column.view} for table in (batches.renders, batches.prepared)
    )
    prepared = {name: x.longest if isinstance(x, Tokens) else x for name, x in prepared.items()}
    how = {"process_index": batches.process_index, "process_count": batches.process_count, "labelled": False}
    inputs = TrainBatches(source, renders, prepared, size, seed=seed, order=order, **how)
    row = jax.eval_shape(column.compute, variables, example(inputs, column.view))
    key = {**column.key, "data": batches.source.fingerprint, "augment": ops, "seed": seed, "views": views}
    key |= {"order": order} if order != "shuffled" else {}
    key |= {"draws": draws} if draws else {}
    text = json.dumps(key, sort_keys=True)
    folder = pathlib.Path(root or FOLDER).expanduser() / hashlib.sha256(text.encode()).hexdigest()[:32]
    return Cached(folder, json.loads(text), inputs, (views, len(source), *row.shape[1:]), np.dtype(row.dtype))


def _make_room(root: pathlib.Path, missing: Mapping[str, Cached]) -> None:
    """Logs what will be written, and refuses it where the disk has no room for all of it."""
    if not missing:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise OSError(f"cache_dir = {messages.brief(str(root))} cannot be written: {error}; name another") from None
    listing = "\n".join(f"  {name}: {_size(cached)}" for name, cached in missing.items())
    there = sum(cached.file.stat().st_blocks * 512 for cached in missing.values() if cached.file.exists())
    needed, free = sum(cached.nbytes for cached in missing.values()) - there, shutil.disk_usage(root).free
    if needed + 2**20 > free:
        raise files.no_room(
            f"no room for the features in {root}: they need {needed:,} bytes, {free:,} are free, of which 1 MiB "
            f"stays free. Make room, set cache_dir to another disk, lower views, or run without cache:\n{listing}"
        )
    log(f"features of frozen networks go to {root}, {needed:,} bytes of {free:,} that are free:\n{listing}")


def _size(cached: Cached) -> str:
    views = f"{cached.shape[0]} views of " if cached.shape[0] > 1 else ""
    each = " x ".join(map(str, cached.shape[2:]))
    return f"{views}{cached.shape[1]:,} examples x {each}, {cached.dtype.name}, {cached.nbytes:,} bytes"


@contextlib.contextmanager
def _locked(cached: Cached, stop_requested: Stop):
    """Locks the set, on process 0; waits for another run that is computing it."""
    if jax.process_index():
        yield
        return
    cached.folder.mkdir(parents=True, exist_ok=True)
    with (cached.folder / ".lock").open("w") as file:
        for attempt in itertools.count():
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not attempt:
                log(f"waiting for another process, which computes the same features in {cached.folder}")
            if jax.process_count() == 1:
                check(stop_requested, "while another process computes the features")
            time.sleep(0.1)
        yield


def _is_sound(cached: Cached, stop_requested: Stop) -> bool:
    """Whether the set is there, whole, and has the bytes that were written."""
    path = cached.folder / "meta.json"
    if not path.exists():
        return False
    with contextlib.suppress(OSError, ValueError):
        meta = files.read_json(path)
        if (meta.get("key"), meta.get("sha256")) == (cached.key, _sha256(cached, stop_requested)):
            return True
    log(f"the features in {cached.folder} are damaged; they are computed anew")
    path.unlink(missing_ok=True)
    (cached.folder / "progress.json").unlink(missing_ok=True)
    return False


def _compute(cached: Cached, view: str, predict: Callable, parallel: Parallel, stop_requested: Stop) -> None:
    """Runs all examples through the network, from where an earlier process was stopped; process 0 writes."""
    source, (views, n), size = cached.source, cached.shape[:2], cached.source.batch_size
    progress, first, total = cached.folder / "progress.json", jax.process_index() == 0, source.steps_of(views)

    def begin() -> tuple[int, str]:
        finished = _finished(cached, total, stop_requested)
        # Mapped pages without room on the disk would kill the process.
        with files.writing(cached.file), cached.file.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, cached.nbytes)
            file.truncate(cached.nbytes)
        return finished

    (start, checksum), saved = distributed.from_first(begin), time.monotonic()
    values, checksum = cached.open("r+") if first else None, int(checksum, 16)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(contextlib.closing(source.iterate(start, total)))
        tick = stack.enter_context(console.bar("features", views * n, start * size, shown=first))
        for done, batch in enumerate(stream, start + 1):
            outputs = jax.device_get(predict(parallel.put_batch(batch[view])))
            if done == start + 1:  # what takes long, compiling, is over, and there is something to save
                stack.enter_context(saved_by(None))
            if first:
                rows = source.rows(done - 1)
                kept = rows.epoch < views
                values[rows.epoch[kept], rows.index[kept]] = outputs[kept]
                places = (rows.epoch * n + rows.index)[kept].tolist()
                checksum += sum(_row_hash(cached, *each) for each in zip(places, outputs[kept], strict=True))
            tick(min(done * size, views * n))
            stopping = stop_requested(0)
            if first and (stopping or done == total or time.monotonic() - saved > SAVE_EVERY):
                values.flush()
                files.write_json(progress, {"done": done, "batch_size": size, "rows": f"{checksum:x}"})
                saved = time.monotonic()
            if stopping:
                count = min(done * size, views * n)
                raise Preempted(f"stopped after the features of {count:,} of {views * n:,} examples")
    if first:
        _finish(cached, checksum, stop_requested)


def _finished(cached: Cached, total: int, stop_requested: Stop) -> tuple[int, str]:
    """The number of steps, of `total`, whose rows an earlier process has left as it wrote them, and their checksum."""
    path, size, views, n = cached.folder / "progress.json", cached.source.batch_size, *cached.shape[:2]
    if not path.exists():
        return 0, "0"
    try:
        known, length = files.read_json(path), cached.file.stat().st_size
        done = known.get("done")
        wrong = (known.get("batch_size"), length) != (size, cached.nbytes)
        if wrong or type(done) is not int or not 0 < done <= total:
            found = f"done = {done!r} batches of {known.get('batch_size')!r}, {length} bytes"
            expected = f"done = 1 .. {total} batches of {size}, {cached.nbytes} bytes"
            raise ValueError(f"{cached.folder} has {found}; expected {expected}")
        written = np.zeros((views + 1, n), bool)
        for step in range(done):
            rows = cached.source.rows(step)
            written[np.minimum(rows.epoch, views), rows.index] = True
        if (checksum := f"{_checksum(cached, written[:views], stop_requested):x}") == known.get("rows"):
            return done, checksum
        raise ValueError(f"{cached.file} has other rows than were written")
    except (OSError, ValueError) as error:
        log(f"unfinished features are computed anew: {error}")
        path.unlink()
        return 0, "0"


def _finish(cached: Cached, checksum: int, stop_requested: Stop) -> None:
    """Writes meta.json, which makes the set a finished one, if the disk holds what was computed."""
    progress = cached.folder / "progress.json"
    with cached.file.open("rb") as file:
        os.fsync(file.fileno())
    if _checksum(cached, np.ones(cached.shape[:2], bool), stop_requested) != checksum:
        progress.unlink()
        raise OSError(f"{cached.file} has other rows than were written; check the disk, then start again")
    meta = {"key": cached.key, "shape": cached.shape, "dtype": cached.dtype.name}
    files.write_json(cached.folder / "meta.json", meta | {"sha256": _sha256(cached, stop_requested)})
    progress.unlink()


def _row_hash(cached: Cached, place: int, row: Any) -> int:
    """Of a row at its place; a checksum is their sum: rows are computed in one order and read in another."""
    digest = hashlib.sha256(f"{cached.folder.name} {place} ".encode())
    digest.update(row if isinstance(row, bytes) else row.tobytes())
    return int.from_bytes(digest.digest(), "big")


def _checksum(cached: Cached, written: np.ndarray, stop_requested: Stop) -> int:
    """Of the rows on disk that are `written`, bool [views, N]."""
    length, total = cached.nbytes // written.size, 0
    with cached.file.open("rb") as file:
        for number, place in enumerate(np.flatnonzero(written).tolist()):
            if number % 256 == 0:
                _pause(stop_requested)
            file.seek(place * length)
            total += _row_hash(cached, place, file.read(length))
    return total


def _sha256(cached: Cached, stop_requested: Stop) -> str:
    digest = hashlib.sha256()
    with cached.file.open("rb") as file:
        while block := file.read(2**24):
            _pause(stop_requested)
            digest.update(block)
    return digest.hexdigest()


def _pause(stop_requested: Stop) -> None:
    if jax.process_count() == 1:  # several have to ask equally often
        check(stop_requested, "while the features on disk were checked")


def _read(cached: Cached) -> np.ndarray:
    """The features [views, N, ...]; small ones are in memory."""
    distributed.from_first(lambda: None)  # none reads before all is written
    if not cached.file.exists():
        raise ValueError(
            f"process {jax.process_index()} does not see {cached.folder}, which process 0 has written; set cache_dir "
            "to a folder that all hosts share"
        )
    values = cached.open("r")
    return np.array(values) if cached.nbytes <= IN_MEMORY else values
