"""Packing: every image of a split decoded and resized once, into the files that readers/packed.py reads."""

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core import console
from tl_jax.core.card import PIXEL_TYPES, Form
from tl_jax.core.checks import refuse
from tl_jax.core.files import atomic_write, locked, no_room, read_json, write_json, writing
from tl_jax.core.messages import listed
from tl_jax.data import workers
from tl_jax.data.examples import Source, header
from tl_jax.data.image import decode, ops
from tl_jax.data.readers.packed import FILES, FORMAT, checksum, padded
from tl_jax.data.sources import check_on_error, list_split, without

CHUNK = 32  # images per piece of work and line of the journal
THREADS = os.cpu_count() or 1
FLUSH = 10  # seconds between two times that pixels are forced to disk and entered in the journal


class Plan(NamedTuple):
    """What is packed where: image i takes `lengths[i]` bytes of `folder`/pixels.bin from `offsets[i]`; offsets [N + 1].

    smaller: bool [N], whether an image is made smaller. meta: the first entries of meta.json.
    """

    source: Source
    folder: Path
    offsets: np.ndarray
    lengths: np.ndarray
    smaller: np.ndarray
    meta: dict[str, Any]


def pack(
    source: str,
    folder: str,
    splits: Sequence[str] = ("train",),
    *,
    size: int = 256,
    interpolation: str = "bicubic",
    num_workers: int = 0,
    on_error: str = "fail",
    data_dir: str | None = None,
    form: Form = decode.RGB,
    report: Callable[[str], None] = print,
) -> None:
    """Packs whole splits into `folder`; one that is packed already is left as it is.

    An image whose short side is longer than `size` is resized to it, as a card's resize would; others keep their
    pixels. `form`: that of the card of the network that will read them. A call that was broken off continues where it
    was and ends with the same bytes. Raises ValueError that lists all images that cannot be decoded (on_error "skip"
    leaves them out), where the folder holds something else or is being packed, and OSError where the disk has no room.
    """
    if interpolation not in ops.RESAMPLE or size < 1:
        kinds = ", ".join(ops.RESAMPLE)
        raise ValueError(f"size={size}, interpolation={interpolation!r}; expected a positive size and one of {kinds}")
    if form.pixels not in PIXEL_TYPES or form.channels < 1:
        raise ValueError(f"found {form}; expected at least one channel of one of {', '.join(PIXEL_TYPES)}")
    check_on_error(on_error)
    rows = source.startswith("table:")
    wholes = {} if rows else {split: list_split(source, split, data_dir, form=form) for split in dict.fromkeys(splits)}
    if rows or any(whole.columns for whole in wholes.values()):
        raise ValueError(f"{source} holds rows of a table; only images are packed")
    if any(whole.made_smaller for whole in wholes.values()):
        raise ValueError(f"{source} is packed, its images were resized once; pack the source that it was packed from")
    root, plans = Path(folder).expanduser(), {}
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".lock", f"another process is packing into {root}; wait for it"):
        for split, whole in wholes.items():
            meta = {"format": FORMAT, "source": source, "split": split, "size": size, "interpolation": interpolation}
            meta |= {"source_sha256": whole.fingerprint} | ({} if form == decode.RGB else form._asdict())
            if (root / split).exists():
                _check_same(root / split / "meta.json", meta)
                report(f"{root / split} is packed already")
            else:
                plans[split] = _plan(whole, meta, root / f".{split}.partial", report)
        _check_room(plans.values(), root, report)
        results = {split: _decode_all(plan, num_workers, report) for split, plan in plans.items()}
        if on_error == "fail":
            _check_decoded(plans, results)
        for split, plan in plans.items():
            meta = _finish(plan, results[split])
            os.rename(plan.folder, root / split)  # readers see the whole split or none
            _sync(root)
            text = f"{meta['examples']:,} images, {meta['bytes'] / 1e9:.2f} GB, {meta['made_smaller']:,} made smaller"
            left_out = f"; {len(meta['skipped'])} left out:\n{listed(meta['skipped'])}" if meta["skipped"] else ""
            report(f"{root / split}: {text}{left_out}")


def _check_same(path: Path, wanted: dict[str, Any]) -> None:
    found = read_json(path)
    changed = [f"{key}: {found.get(key)!r} -> {value!r}" for key, value in wanted.items() if found.get(key) != value]
    refuse(f"{path.parent} holds another packing; choose another folder or remove it (there -> now)", changed)


def _plan(source: Source, meta: dict[str, Any], folder: Path, report: Callable[[str], None]) -> Plan:
    """Reads the header of every image: the bytes it will take, and where."""
    folder.mkdir(exist_ok=True)
    if not (folder / "plan.json").exists():
        write_json(folder / "plan.json", meta)
    _check_same(folder / "plan.json", meta)

    def shape(index: int) -> tuple[int, int]:
        try:
            return header(source.inputs, index, source.form)[:2]
        except (ValueError, OSError):
            return 0, 0  # decoding it will say why

    report(f"{source.name}: reading the headers of {len(source):,} images")
    with ThreadPoolExecutor(min(16, 4 * THREADS)) as pool:
        shapes = list(console.counted("headers", pool.map(shape, range(len(source))), len(source)))
    size = meta["size"]
    targets = [ops.resized(*shape, min(size, *shape)) if all(shape) else shape for shape in shapes]
    values = source.form.channels * np.dtype(source.form.pixels).itemsize
    lengths = values * np.array(targets, np.int64).prod(axis=1)
    smaller = np.array([min(shape) > size for shape in shapes])
    return Plan(source, folder, np.append(0, np.cumsum(padded(lengths))), lengths, smaller, meta)


def _check_room(plans: Iterable[Plan], root: Path, report: Callable[[str], None]) -> None:
    """Says what the splits will take; raises OSError where that is more than is free."""
    free, needed = shutil.disk_usage(root).free, 0
    for plan in plans:
        path, size = plan.folder / "pixels.bin", int(plan.offsets[-1])
        needed += size + 1024 * len(plan.lengths)  # index, ids and journal, generously
        needed -= path.stat().st_blocks * 512 if path.exists() else 0
        report(f"{plan.source.name}: {len(plan.lengths):,} images take {size:,} bytes; {free:,} are free")
    if needed > free:
        fix = "free some, choose a smaller --size, or another disk"
        raise no_room(f"{root} has {free:,} bytes free, and {needed:,} more are needed; {fix}")


def _decode_all(plan: Plan, num_workers: int, report: Callable[[str], None]) -> list[list]:
    """[height, width, sha256, checksum] of every image, or [reason] of one that cannot be used."""
    journal, pixels = plan.folder / "journal", plan.folder / "pixels.bin"
    pieces, count = _read_journal(journal), len(plan.lengths)
    todo = [start for start in range(0, count, CHUNK) if start not in pieces]
    if pieces:
        report(f"{len(pieces) * CHUNK:,} of {count:,} images were packed before")
    with pixels.open("ab"):
        os.truncate(pixels, int(plan.offsets[-1]))
    began = flushed = time.perf_counter()
    fresh: dict[int, list] = {}
    known, bar = len(pieces), console.bar("packing", count, min(len(pieces) * CHUNK, count))
    with (
        workers.pool(num_workers, plan, THREADS) as submit,
        journal.open("a") as file,
        pixels.open("rb+") as data,
        bar as tick,
    ):
        packed = workers.ahead(lambda start: submit(_pack_piece, start).result, todo, 4 * (num_workers or THREADS))
        for number, start in enumerate(todo, 1):
            fresh[start] = next(packed)
            tick(min((known + number) * CHUNK, count))
            if time.perf_counter() - flushed < FLUSH and number < len(todo):
                continue
            os.fsync(data.fileno())  # pixels first: what the journal names is there, even after a power cut
            good = [piece for piece in fresh.items() if all(len(row) > 1 for row in piece[1])]  # others: tried again
            with writing(journal):
                file.writelines(_journal_line(json.dumps(piece)) for piece in good)
                file.flush()
                os.fsync(file.fileno())
            pieces |= fresh
            fresh, flushed = {}, time.perf_counter()
            rate = number * CHUNK / (flushed - began)
            report(f"{min(len(pieces) * CHUNK, count):,} of {count:,} images, {rate:,.0f} images/s")
    return [row for start in range(0, count, CHUNK) for row in pieces[start]]


def _read_journal(journal: Path) -> dict[int, list]:
    """The pieces that are done; a line that was cut short or damaged is removed, and its piece done again."""
    found = journal.read_bytes().decode(errors="replace").split("\n") if journal.exists() else []
    good = [line for line in found if line and _journal_line(line[9:]) == line + "\n"]
    with atomic_write(journal) as file:
        file.writelines(line.encode() + b"\n" for line in good)
    return dict(json.loads(line[9:]) for line in good)


def _journal_line(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _pack_piece(plan: Plan, start: int) -> list[list]:
    with (plan.folder / "pixels.bin").open("rb+", buffering=0) as file:
        return [_pack_one(plan, i, file.fileno()) for i in range(start, min(start + CHUNK, len(plan.lengths)))]


def _pack_one(plan: Plan, index: int, file: int) -> list:
    try:
        with decode.reading(plan.source.inputs[index], plan.source.form) as image:
            size = min(plan.meta["size"], *decode.shape_of(image))
            image = ops.resize(image, size=size, interpolation=plan.meta["interpolation"])
            image = np.ascontiguousarray(_stored(image, np.dtype(plan.source.form.pixels)))
    except (ValueError, OSError) as error:
        return [str(error)]
    if image.nbytes != plan.lengths[index]:
        return [f"its header promises {plan.lengths[index]} bytes at this size, its pixels are {image.nbytes}"]
    pixels = np.zeros(padded(image.nbytes), np.uint8)
    pixels[: image.nbytes] = image.reshape(-1).view(np.uint8)
    data, at = memoryview(pixels), int(plan.offsets[index])
    while data:
        try:
            written = os.pwrite(file, data, at)
        except OSError as error:
            text = f"cannot write to {plan.folder}: {error.strerror}; the same command goes on from here"
            raise OSError(text) from None
        data, at = data[written:], at + written
    return [*image.shape[:2], hashlib.sha256(image).hexdigest(), checksum(pixels)]


def _stored(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The image in the type that its files have; where resizing left whole numbers, the nearest one."""
    if dtype.kind == "f" or image.dtype == dtype:
        return image.astype(dtype, copy=False)
    return np.rint(image).clip(np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)


def _check_decoded(plans: dict[str, Plan], results: dict[str, list[list]]) -> None:
    bad = [reason for split, plan in plans.items() for reason in _reasons(plan, results[split]).values()]
    folders = " and ".join(str(plan.folder) for plan in plans.values())
    what = f"{len(bad)} of {sum(map(len, results.values()))} images cannot be decoded; the others are packed"
    fix = f"leave these out with --on_error skip, which goes on from here, or repair them, remove {folders}"
    if any(" expected " in reason for reason in bad):
        fix = f"say with --pixels and --channels what the files hold; {fix}"
    refuse(f"{what}; {fix}, and start again", bad, len(bad))


def _reasons(plan: Plan, results: list[list]) -> dict[int, str]:
    return {i: f"{plan.source.ids[i]}: {row[0]}" for i, row in enumerate(results) if len(row) == 1}


def _finish(plan: Plan, results: list[list]) -> dict[str, Any]:
    """Writes the index and the meta data, and removes what only packing needs."""
    bad = _reasons(plan, results)
    source = without(plan.source, bad) if bad else plan.source
    good = [i for i in range(len(results)) if i not in bad]
    shapes = np.array([results[i][:2] for i in good], np.int32)
    sha256 = np.array([list(bytes.fromhex(results[i][2])) for i in good], np.uint8)
    index = {"offsets": plan.offsets[good], "shapes": shapes, "labels": source.labels.astype(np.int32)}
    sums = np.array([results[i][3] for i in good], np.uint64)
    with atomic_write(plan.folder / "index.npz") as file:
        np.savez(file, **index, sha256=sha256, sums=sums)
    meta = {
        **plan.meta,
        "examples": len(source),
        "made_smaller": int(plan.smaller[good].sum()),
        "bytes": int(plan.offsets[-1]),
        "index_sha256": hashlib.sha256((plan.folder / "index.npz").read_bytes()).hexdigest(),
        "class_names": source.class_names,
        "skipped": source.skipped,
        "ids": source.ids,
    }
    write_json(plan.folder / "meta.json", meta)
    for path in plan.folder.iterdir():
        if path.name not in FILES:
            path.unlink()
    _sync(plan.folder)
    return meta


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
