"""Packing: every image of a split decoded and resized once, into the files that data/packed.py reads."""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tl_jax.data import ops, workers
from tl_jax.data.examples import FileImages, Source, listed
from tl_jax.data.packed import FORMAT
from tl_jax.data.sources import list_split, without

CHUNK = 32  # images per piece of work and line of the journal
FLUSH = 10  # seconds between two times that pixels are forced to disk and entered in the journal


class Plan(NamedTuple):
    """What is packed where: image i takes `lengths[i]` bytes of the file `pixels` from `offsets[i]` on."""

    source: Source
    size: int
    interpolation: str
    pixels: str
    offsets: np.ndarray
    lengths: np.ndarray


def pack(
    source: str,
    folder: str,
    split: str = "train",
    *,
    size: int = 256,
    interpolation: str = "bicubic",
    num_workers: int = 0,
    on_error: str = "fail",
    data_dir: str | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Packs one split and returns its folder; one that is packed already is left as it is.

    Each image is resized to a short side of `size`, as a card's resize would. A call that was broken off, by whatever,
    goes on where it was and ends with the same bytes. Raises ValueError that lists all images that cannot be decoded
    (on_error "skip" leaves them out), where the folder holds something else or is being packed, and OSError where the
    disk has no room.
    """
    if interpolation not in ops.RESAMPLE or size < 1:
        raise ValueError(f"size={size}, interpolation={interpolation!r}; expected a positive size and one of "
                         f"{', '.join(ops.RESAMPLE)}")  # fmt: skip
    if on_error not in ("fail", "skip"):
        raise ValueError(f"on_error must be 'fail' or 'skip', found {on_error!r}")
    whole = list_split(source, split, data_dir)
    root = Path(folder).expanduser()
    done, partial = root / split, root / f".{split}.partial"
    wanted = {"format": FORMAT, "source": source, "split": split, "size": size, "interpolation": interpolation}
    wanted |= {"source_sha256": whole.fingerprint}
    if done.exists():
        _check_same(done / "meta.json", wanted)
        report(f"{done} is packed already")
        return done
    partial.mkdir(parents=True, exist_ok=True)
    with _lock(partial / "lock"):
        _check_same(partial / "plan.json", wanted, write=True)
        plan = _plan(whole, size, interpolation, partial / "pixels.bin")
        _make_room(plan, root, report)
        results = _decode_all(plan, partial / "journal", num_workers, report)
        meta = _finish(plan, results, wanted, on_error, partial)
        for name in ("journal", "plan.json", "lock"):
            (partial / name).unlink()
        _sync(partial)
        os.rename(partial, done)  # readers see the whole split or none
    report(f"{done}: {meta['examples']:,} images, {meta['bytes'] / 1e9:.2f} GB" + _left_out(meta["skipped"]))
    return done


def _left_out(skipped: list[str]) -> str:
    return f"; {len(skipped)} left out:\n{listed(skipped)}" if skipped else ""


def _check_same(path: Path, wanted: dict[str, Any], *, write: bool = False) -> None:
    """Raises ValueError where a file says that something else was packed; with `write`, makes a missing one."""
    if write and not path.exists():
        _write(path, json.dumps(wanted))
    found = json.loads(path.read_text())
    if changed := [
        f"  {key}: {found.get(key)!r} -> {value!r}" for key, value in wanted.items() if found.get(key) != value
    ]:
        raise ValueError(
            f"{path.parent} holds another packing; choose another folder or remove it (there -> now):\n"
            + "\n".join(changed)
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is packing into {path.parent}; wait for it") from None
        yield


def _plan(source: Source, size: int, interpolation: str, pixels: Path) -> Plan:
    """Reads the header of every image: the bytes it will take, and where."""

    def length(index: int) -> int:
        try:
            height, width = ops.resized(*_shape(source.images, index), size)
        except (ValueError, OSError):
            return 0  # decoding it will say why
        return height * width * 3

    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        lengths = np.fromiter(pool.map(length, range(len(source))), np.int64, len(source))
    return Plan(source, size, interpolation, str(pixels), np.cumsum(lengths) - lengths, lengths)


def _shape(images: Any, index: int) -> tuple[int, int]:
    """Height and width, up to a turn by EXIF, which changes no length."""
    if isinstance(images, FileImages):
        image = ops.open_image(os.path.join(images.root, images.paths[index]))
    elif isinstance(image := images[index], bytes):
        image = ops.open_image(image)
    shape = ops.shape_of(image)
    if not isinstance(image, np.ndarray):
        image.close()
    return shape


def _make_room(plan: Plan, root: Path, report: Callable[[str], None]) -> None:
    """Says what the split will take; raises OSError where that is more than is free."""
    needed, path = int(plan.lengths.sum()), Path(plan.pixels)
    index = 1024 * len(plan.lengths)  # index, ids and journal, generously
    there = path.stat().st_blocks * 512 if path.exists() else 0
    free = shutil.disk_usage(root).free
    report(f"{plan.source.name}: {len(plan.lengths):,} images, {needed:,} bytes; {there:,} are there, {free:,} free")
    if needed + index - there > free:
        raise OSError(f"{root} has {free:,} bytes free, and {needed + index - there:,} more are needed; free some, "
                      "choose a smaller size, or another disk")  # fmt: skip
    with path.open("ab"):
        os.truncate(path, needed)


def _decode_all(plan: Plan, journal: Path, num_workers: int, report: Callable[[str], None]) -> list[list]:
    """[height, width, sha256] of every image, or [reason] of one that cannot be used."""
    pieces = _read_journal(journal)
    count = len(plan.lengths)
    todo = [start for start in range(0, count, CHUNK) if start not in pieces]
    ahead = 4 * (num_workers or os.cpu_count() or 1)
    began = time.perf_counter()
    with _pool(plan, num_workers) as submit, journal.open("a") as file, open(plan.pixels, "rb+") as pixels:
        fresh: dict[int, list] = {}
        flushed = began
        for number, (start, rows) in enumerate(_as_completed(submit, todo, ahead), 1):
            fresh[start] = rows
            if time.perf_counter() - flushed < FLUSH and number < len(todo):
                continue
            os.fsync(pixels.fileno())  # pixels first: what the journal names is there, even after a power cut
            file.writelines(json.dumps([start, rows]) + "\n" for start, rows in fresh.items())
            file.flush()
            os.fsync(file.fileno())
            pieces |= fresh
            fresh, flushed = {}, time.perf_counter()
            rate = number * CHUNK / (flushed - began)
            report(f"{min(len(pieces) * CHUNK, count):,} of {count:,} images, {rate:,.0f} images/s")
    return [row for start in range(0, count, CHUNK) for row in pieces[start]]


def _read_journal(journal: Path) -> dict[int, list]:
    """The pieces that are done; a last line that was cut short is removed."""
    text = journal.read_text() if journal.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(journal, len(whole.encode()))
    return dict(json.loads(line) for line in whole.splitlines())


def _as_completed(submit: Callable[[int], Future], todo: list[int], ahead: int) -> Iterator[tuple[int, list]]:
    """(start, result) of each piece as it is done, a few ahead of what was taken."""
    queue = iter(todo)
    with workers.signals_held():
        pending = {submit(start): start for start in itertools.islice(queue, ahead)}
    while pending:
        finished, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in finished:
            start = pending.pop(future)
            pending |= {submit(following): following for following in itertools.islice(queue, 1)}
            yield start, future.result()


@contextlib.contextmanager
def _pool(plan: Plan, num_workers: int) -> Iterator[Callable[[int], Future]]:
    """submit(start) of a piece, to worker processes or, with none, to threads."""
    if num_workers:
        with workers.pool(num_workers, plan) as pool:
            yield lambda start: pool.submit(workers.apply, _pack_piece, start)
        return
    threads = ThreadPoolExecutor(os.cpu_count())
    try:
        yield lambda start: threads.submit(_pack_piece, plan, start)
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _pack_piece(plan: Plan, start: int) -> list[list]:
    """Decodes, resizes and writes the images start ... start + CHUNK - 1."""
    with open(plan.pixels, "rb+", buffering=0) as file:
        return [_pack_one(plan, i, file.fileno()) for i in range(start, min(start + CHUNK, len(plan.lengths)))]


def _pack_one(plan: Plan, index: int, file: int) -> list:
    try:
        image = ops.as_rgb(plan.source.images[index])
        image = np.ascontiguousarray(ops.resize(image, size=plan.size, interpolation=plan.interpolation))
    except (ValueError, OSError) as error:
        return [str(error)]
    if image.nbytes != plan.lengths[index]:
        return [f"its header promises {plan.lengths[index]} bytes at this size, its pixels are {image.nbytes}"]
    data, at = memoryview(image).cast("B"), int(plan.offsets[index])
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written
    return [*image.shape[:2], hashlib.sha256(image).hexdigest()]


def _finish(plan: Plan, results: list[list], wanted: dict[str, Any], on_error: str, folder: Path) -> dict[str, Any]:
    """Writes the index and the meta data; raises ValueError that lists what cannot be decoded, unless it is skipped."""
    bad = [i for i, row in enumerate(results) if len(row) == 1]
    reasons = [f"{plan.source.ids[i]}: {results[i][0]}" for i in bad]
    if bad and on_error == "fail":
        raise ValueError(
            f"{len(bad)} of {len(results)} images of {plan.source.name} cannot be decoded:\n"
            f"{listed(reasons, len(bad))}\n"
            "The others are packed. Leave these out with --on_error skip, which goes on from here; or repair or remove "
            f"them, remove {folder}, and start again."
        )
    source = without(plan.source, bad, reasons) if bad else plan.source
    good = np.setdiff1d(np.arange(len(results)), bad)
    arrays = {
        "offsets": plan.offsets[good],
        "shapes": np.array([results[i][:2] for i in good], np.int32),
        "labels": source.labels.astype(np.int32),
        "sha256": np.array([list(bytes.fromhex(results[i][2])) for i in good], np.uint8),
    }
    with (folder / "index.npz").open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    meta = {
        **wanted,
        "examples": len(source),
        "bytes": int(plan.lengths.sum()),
        "index_sha256": hashlib.sha256((folder / "index.npz").read_bytes()).hexdigest(),
        "class_names": list(source.class_names),
        "skipped": list(source.skipped),
        "ids": list(source.ids),
    }
    _write(folder / "meta.json", json.dumps(meta))
    return meta


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
