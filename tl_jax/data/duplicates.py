"""Duplicates among the examples of a run: equal inputs, and images that are copies of others in all but their pixels.

Of an image in greys, at 16 x 16 and at 32 x 32 pixels, the Laplacian is taken; two images are as similar as these
correlate. Copies that were re-encoded, resized or brightened correlate by 0.9 and more, different photographs by less
than 0.8. A copy that was cropped, turned or redrawn is not found. Small images are compared for equal pixels alone:
different digits of 28 pixels correlate as copies do.
"""

import hashlib
import io
import os
import pathlib
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tl_jax.core import files
from tl_jax.core.checks import refuse
from tl_jax.core.messages import listed
from tl_jax.data.examples import Source, origins
from tl_jax.data.image import ops

SIDE = 32  # pixels of a thumbnail
SHORT = 64  # pixels of the short side from which on near duplicates are told
FLAT = 2.0  # grey levels: a thumbnail that deviates by less shows nothing
LIKELY, NEAR = 0.8, 0.85  # correlations, at 16 and at 32 pixels
WITHIN = 30_000  # examples up to which a set is searched for near duplicates within it
BLOCK = 2**26  # correlations in memory at a time
SHOWN = 100  # pairs that are named
FOLDER = pathlib.Path.home() / ".cache" / "tl_jax" / "duplicates"
KEPT = 2.0  # seconds of reading from which on the looks are kept there


class Looks(NamedTuple):
    """hashes: of the inputs, uint8 [N, 16]. thumbnails: uint8 [N, SIDE, SIDE]. telling: bool [N], whether these are."""

    hashes: np.ndarray
    thumbnails: np.ndarray
    telling: np.ndarray


def find(sources: Mapping[str, Source], training: Collection[str]) -> dict[str, Any]:
    """The duplicates within and across sources, by name, of which `training` are trained on and the others scored.

    Each example is named with one of its duplicates; one that several sources share is no duplicate of itself. Returns
    plain JSON data: "compared": {"exact", "near"}, the numbers of examples; "across", between what is trained on and
    what is scored, and "within", all others: {"exact", "near", "mirrored"}, the numbers of pairs; "other_label": those
    that differ in it; "pairs": the first as [kind, "source: id", "source: id"], those across before the others.
    """
    first: dict[str, tuple[str, int]] = {}
    for name, source in sources.items():
        first |= {origin: (name, i) for i, origin in enumerate(origins(source)) if origin not in first}
    number, examples = {origin: i for i, origin in enumerate(first)}, list(first.values())
    scored, trained = roles = np.zeros((2, len(first)), bool)
    for name, source in sources.items():
        roles[int(name in training), [number[origin] for origin in origins(source)]] = True
    own = {name: [i for source, i in examples if source == name] for name in sources}
    parts = [looks_of(sources[name], np.array(rows)) for name, rows in own.items() if rows]
    looks = Looks(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    kinds: dict[tuple[int, int], str] = {}
    for a, b in ((scored, trained), (trained, trained), (scored, scored)):
        for i, j, kind in _partners(looks, np.flatnonzero(a), np.flatnonzero(b)):
            kinds.setdefault((min(i, j), max(i, j)), kind)
    pairs, other_label = {"across": [], "within": []}, 0
    for (i, j), kind in kinds.items():
        (source, row), (other, other_row) = ((sources[name], place) for name, place in (examples[i], examples[j]))
        together = source.groups is not None and source.groups[row] == other.groups[other_row]  # no fold cuts them
        across = not together and ((scored[i] and trained[j]) or (trained[i] and scored[j]))
        other_label += not np.array_equal(source.labels[row], other.labels[other_row])
        names = f"{examples[i][0]}: {source.ids[row]}", f"{examples[j][0]}: {other.ids[other_row]}"
        pairs["across" if across else "within"].append([kind, *names])
    counts = {
        where: {kind: [row[0] for row in rows].count(kind) for kind in ("exact", "near", "mirrored")}
        for where, rows in pairs.items()
    }
    compared = {"exact": len(looks.hashes), "near": int(looks.telling.sum())}
    named = [*pairs["across"], *pairs["within"]][:SHOWN]
    return {"compared": compared, **counts, "other_label": other_label, "pairs": named}


def summary(table: Mapping[str, Any]) -> str:
    """What `find` returned, for the console: one line, and the first pairs."""
    compared, across = table["compared"], table["across"]
    line = f"split audit: {compared['exact']:,} examples compared, {compared['near']:,} of them for near copies too; "
    counts = [
        f"{count} {kind} {where}" for where in ("across", "within") for kind, count in table[where].items() if count
    ]
    if not counts:
        return line + "no duplicates"
    where = "across: one is trained on, the other is scored" if sum(across.values()) else "none is across"
    other = f"; {table['other_label']} differ in their label" if table["other_label"] else ""
    return f"{line}{', '.join(counts)} ({where}{other})\n" + listed(
        [f"{kind}: {a} = {b}" for kind, a, b in table["pairs"]]
    )


def _partners(looks: Looks, a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, int, str]]:
    """(example of a, another of b, kind) for each example of `a` that has a duplicate in `b`; both are indices."""
    members: dict[bytes, list[int]] = {}
    for j in b.tolist():
        members.setdefault(looks.hashes[j].tobytes(), []).append(j)
    found = set()
    for i in a.tolist():
        same = members.get(looks.hashes[i].tobytes(), ())
        if (other := next((j for j in same[:2] if j != i), None)) is not None:
            found.add(i)
            yield i, other, "exact"
    a, b = (rows[looks.telling[rows]] for rows in (a, b))
    if len(b) == 0 or (np.array_equal(a, b) and len(a) > WITHIN):
        return
    coarse = _vectors(looks.thumbnails[b], SIDE // 2)
    for kind, flip in (("near", 1), ("mirrored", -1)):
        left = np.array([i for i in a.tolist() if i not in found], int)
        for part in np.array_split(left, len(left) * len(b) // BLOCK + 1):
            seen = looks.thumbnails[part][:, :, ::flip]
            similar = _vectors(seen, SIDE // 2) @ coarse.T
            similar[part[:, None] == b] = -1  # itself
            best = similar.argmax(axis=1)
            others = looks.thumbnails[b[best]]
            alike = (similar.max(axis=1) > LIKELY) & (
                (_vectors(seen, SIDE) * _vectors(others, SIDE)).sum(axis=1) > NEAR
            )
            found.update(part[alike].tolist())
            yield from ((i, j, kind) for i, j in zip(part[alike].tolist(), b[best][alike].tolist(), strict=True))


def _vectors(thumbnails: np.ndarray, side: int) -> np.ndarray:
    """The Laplacian of each thumbnail at side x side pixels, without mean, of length 1: float32 [N, side * side]."""
    grey = thumbnails.astype(np.float32).reshape(len(thumbnails), side, SIDE // side, side, SIDE // side).mean((2, 4))
    edged = np.pad(grey, ((0, 0), (1, 1), (1, 1)), "edge")
    around = edged[:, 1:-1, 2:] + edged[:, 1:-1, :-2] + edged[:, 2:, 1:-1] + edged[:, :-2, 1:-1]
    flat = (4 * grey - around).reshape(len(grey), side * side)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def looks_of(source: Source, rows: np.ndarray) -> Looks:
    """The looks of some examples of a source; those that took long to read are kept on disk.

    Raises ValueError that names every image that cannot be read.
    """
    source = source if len(rows) == len(source) else source.select(rows)
    path, began = FOLDER / f"{source.fingerprint}.npz", time.perf_counter()
    if (kept := _read(path)) is not None and len(kept.hashes) == len(source):
        return kept
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        each = list(pool.map(lambda i: _look(source, i), range(len(source))))
    damaged = [found for found in each if isinstance(found, str)]
    refuse(f"{len(damaged)} of {len(source)} images of {source.name} cannot be read", damaged)
    looks = Looks(*map(np.stack, zip(*each, strict=True)))
    if time.perf_counter() - began > KEPT:
        text = io.BytesIO()
        np.savez(text, **looks._asdict())
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as file:
            file.write(hashlib.sha256(text.getvalue()).digest() + text.getvalue())
    return looks


def _look(source: Source, index: int) -> tuple[np.ndarray, np.ndarray, bool] | str:
    """hash, thumbnail and whether it tells, of one example; the message of an image that cannot be read."""
    try:
        example = source.inputs[index]
        if isinstance(example, np.ndarray) and (example.ndim == 1 or min(example.shape[:2]) < SHORT):
            return _hash(example), np.zeros((SIDE, SIDE), np.uint8), False
        with ops.reading(example) as image:
            pixels = np.asarray(image)
    except (OSError, ValueError) as error:
        return f"{source.ids[index]}: {error}"
    grey = Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    thumbnail = np.asarray(grey)
    return _hash(pixels), thumbnail, min(pixels.shape[:2]) >= SHORT and thumbnail.std() >= FLAT


def _hash(example: np.ndarray) -> np.ndarray:
    digest = hashlib.blake2b(np.ascontiguousarray(example), digest_size=16, key=repr(example.shape).encode())
    return np.frombuffer(digest.digest(), np.uint8)


def _read(path: pathlib.Path) -> Looks | None:
    """What is kept there; None where nothing is, or not as it was written."""
    text = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(text[32:]).digest() != text[:32]:
        return None
    with np.load(io.BytesIO(text[32:])) as arrays:
        return Looks(*(arrays[name] for name in Looks._fields))
