"""Duplicates among the examples of a run: equal inputs, and images that are copies of others in all but their pixels.

Of an image in greys, at 16 x 16 and at 32 x 32 pixels, the Laplacian is taken; two images are as similar as these
correlate. Copies that were re-encoded, resized or brightened correlate by 0.9 and more, different photographs by less
than 0.7. A copy that was cropped, turned or redrawn is not found. Small images are compared for equal pixels alone:
different digits of 28 pixels correlate as copies do.
"""

import contextlib
import hashlib
import io
import itertools
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tl_jax.core import console, files, npz
from tl_jax.core.checks import refuse
from tl_jax.core.messages import listed
from tl_jax.data import groups
from tl_jax.data.examples import EncodedImages, FileImages, JoinedImages, Source, originals
from tl_jax.data.image import decode
from tl_jax.data.several import Several, in_memory

FORMAT = 1  # of what is kept
SIDE = 32  # pixels of a thumbnail
SHORT = 64  # pixels of the short side from which on near duplicates are told
FLAT = 2.0  # grey levels: a thumbnail that deviates by less shows nothing
LIKELY, NEAR = 0.8, 0.7  # correlations, at 16 and at 32 pixels
WITHIN = 30_000  # examples up to which a set is searched for near duplicates within it
SEVERAL = 10  # pictures from which on it can be told what all have in common
PART = 10_000  # thumbnails made floats at a time
BLOCK = 2**26  # correlations in memory at a time
SHOWN = 100  # pairs that are named
FOLDER = pathlib.Path.home() / ".cache" / "tl_jax" / "duplicates"
KEPT = 2**30  # bytes there, beyond which the oldest go


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
    that differ in it, as far as labels are not sealed; "pairs": the first as [kind, "source: id", "source: id"], those
    across before the others.
    """
    first: dict[str, tuple[str, int]] = {}
    for name, source in sources.items():
        first |= {origin: (name, i) for i, origin in enumerate(originals(source)) if origin not in first}
    number = {origin: i for i, origin in enumerate(sorted(first))}  # whatever the cut, so that the looks are kept once
    examples = [first[origin] for origin in number]
    scored, trained = roles = np.zeros((2, len(first)), bool)
    for name, source in sources.items():
        roles[int(name in training), [number[origin] for origin in originals(source)]] = True
    looks = looks_of([(sources[name], row) for name, row in examples])
    member = _members(sources, examples)
    kinds: dict[tuple[int, int], str] = {}
    for a, b in ((scored, trained), (trained, trained), (scored, scored)):
        apart = member if a is not b else np.arange(len(first))
        for i, j, kind in _partners(looks, np.flatnonzero(a), np.flatnonzero(b), apart):
            kinds.setdefault((min(i, j), max(i, j)), kind)
    pairs, other_label = {"across": [], "within": []}, 0
    for (i, j), kind in kinds.items():
        across = member[i] != member[j] and ((scored[i] and trained[j]) or (trained[i] and scored[j]))
        i, j = (j, i) if trained[j] and not trained[i] else (i, j)
        (source, row), (other, other_row) = ((sources[name], place) for name, place in (examples[i], examples[j]))
        if not (source.sealed or other.sealed):
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


def _members(sources: Mapping[str, Source], examples: Sequence[tuple[str, int]]) -> np.ndarray:
    """The number of the group of each example, which no split and no fold cuts; without groups each is one."""
    if any(source.groups is None for source in sources.values()):
        return np.arange(len(examples))
    domains = any(source.domains is not None for source in sources.values())
    names = {name: groups.named(source, domains) for name, source in sources.items()}
    return groups.numbered(np.array([names[name][row] for name, row in examples]), len(examples))


def _partners(looks: Looks, a: np.ndarray, b: np.ndarray, apart: np.ndarray) -> Iterator[tuple[int, int, str]]:
    """(example of a, one of b, kind) for each of `a` that has a duplicate in `b` with another number `apart`."""
    members: dict[bytes, list[int]] = {}
    for j in b.tolist():
        members.setdefault(looks.hashes[j].tobytes(), []).append(j)
    found = set()
    for i in a.tolist():
        same = members.get(looks.hashes[i].tobytes(), ())
        if (other := next((j for j in same if apart[j] != apart[i]), None)) is not None:
            found.add(i)
            yield i, other, "exact"
    a, b = (rows[looks.telling[rows]] for rows in (a, b))
    if len(b) == 0 or (np.array_equal(a, b) and len(a) > WITHIN):
        return
    coarse = _vectors(looks, b, SIDE // 2)
    for kind, flip in (("near", 1), ("mirrored", -1)):
        left = np.array([i for i in a.tolist() if i not in found], int)
        for part in np.array_split(left, len(left) * len(b) // BLOCK + 1):
            similar = _vectors(looks, part, SIDE // 2, flip) @ coarse.T
            similar[apart[part][:, None] == apart[b]] = -1
            best = similar.argmax(axis=1)
            fine = _vectors(looks, part, SIDE, flip) * _vectors(looks, b[best], SIDE)
            alike = (similar.max(axis=1) > LIKELY) & (fine.sum(axis=1) > NEAR)
            found.update(part[alike].tolist())
            yield from ((i, j, kind) for i, j in zip(part[alike].tolist(), b[best][alike].tolist(), strict=True))


def _vectors(looks: Looks, rows: np.ndarray, side: int, flip: int = 1) -> np.ndarray:
    """The Laplacian of thumbnails at side x side pixels less what all have in common, of length 1: [rows, side * side].

    flip: -1 for the mirrored images. What all have in common, such as a frame or a round field of view, is the mean of
    the set and of the mirrored set, which are projected out.
    """
    vectors = _laplacians(looks.thumbnails[rows][:, :, ::flip], side)
    if len(rows) and looks.telling.sum() >= SEVERAL:
        some = looks.thumbnails[np.flatnonzero(looks.telling)[:: max(1, looks.telling.sum() // 1000)]]
        means = [_laplacians(each, side).mean(axis=0) for each in (some, some[:, :, ::-1])]
        basis = np.linalg.qr(np.stack(means, axis=1))[0]
        vectors -= vectors @ basis @ basis.T
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def _laplacians(thumbnails: np.ndarray, side: int) -> np.ndarray:
    """float32 [N, side * side], each without mean and of length 1."""
    if len(thumbnails) > PART:  # in parts, as floats take much more memory
        return np.concatenate([_laplacians(thumbnails[i : i + PART], side) for i in range(0, len(thumbnails), PART)])
    grey = thumbnails.astype(np.float32).reshape(len(thumbnails), side, SIDE // side, side, SIDE // side).mean((2, 4))
    edged = np.pad(grey, ((0, 0), (1, 1), (1, 1)), "edge")
    around = edged[:, 1:-1, 2:] + edged[:, 1:-1, :-2] + edged[:, 2:, 1:-1] + edged[:, :-2, 1:-1]
    flat = (4 * grey - around).reshape(len(grey), side * side)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def looks_of(examples: Sequence[tuple[Source, int]]) -> Looks:
    """The looks of examples, (source, index); kept on disk, where it takes more than memory to read them.

    Raises ValueError that names every image that cannot be read.
    """
    held, path = all(in_memory(source.inputs) for source, _ in examples), None
    if not held:
        digest = hashlib.sha256(f"{FORMAT} {len(examples)}".encode())
        for source, i in examples:
            digest.update(
                f"\n{source.ids[i]} {'' if source.form == decode.RGB else f'{source.form} '}".encode(
                    errors="surrogateescape"
                )
                + _stamp(source.inputs, i)
            )
        path = FOLDER / f"{digest.hexdigest()}.npz"
        if (kept := _read(path)) is not None and len(kept.hashes) == len(examples):
            return kept
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        looks = pool.map(lambda example: _look(*example), examples)
        each = list(console.counted("split audit", looks, len(examples)))
    damaged = [found for found in each if isinstance(found, str)]
    names = ", ".join(dict.fromkeys(source.name for source, _ in examples))
    refuse(f"{len(damaged)} of {len(examples)} images of {names} cannot be read", damaged)
    looks = Looks(*map(np.stack, zip(*each, strict=True)))
    if not held:
        with contextlib.suppress(OSError):  # no home to write to, or it is full: read them every time
            _write(path, looks)
    return looks


def _stamp(images: Any, i: int) -> bytes:
    """What is another when an image is: of a file its place and time, of one in memory its hash."""
    if isinstance(images, Several):  # the head holds what other inputs there are
        files = images.parts.get("image")
        return images.head(i) + (_stamp(files, i) if files is not None and images.present["image"][i] else b"")
    if isinstance(images, JoinedImages):
        return _stamp(images.containers[images.which[i]], images.position[i])
    if isinstance(images, FileImages):
        with contextlib.suppress(OSError):  # a missing file is named where it is read
            facts = os.stat(images.path(i))
            return f"{images.path(i)} {facts.st_size} {facts.st_mtime_ns} {facts.st_ino}".encode(
                errors="surrogateescape"
            )
    in_memory = isinstance(images, np.ndarray | EncodedImages)
    return hashlib.blake2b(images[i], digest_size=16).digest() if in_memory else images.head(i)


def _look(source: Source, index: int) -> tuple[np.ndarray, np.ndarray, bool] | str:
    """hash, thumbnail and whether it tells, of one example; the message of an image that cannot be read."""
    try:
        if isinstance(several := source.inputs, Several):
            return _look_at_several(source, several, index)
        example = source.inputs[index]
        if source.input == "text":
            digest = hashlib.blake2b(source.inputs.head(index), digest_size=16).digest()
            return np.frombuffer(digest, np.uint8), np.zeros((SIDE, SIDE), np.uint8), False
        if isinstance(example, np.ndarray) and (example.ndim == 1 or min(example.shape[:2]) < SHORT):
            return _hash(example), np.zeros((SIDE, SIDE), np.uint8), False
        with decode.reading(example, source.form) as image:
            pixels = np.asarray(image)
    except (OSError, ValueError) as error:
        return f"{source.ids[index]}: {error}"
    grey = decode.picture(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    thumbnail = np.asarray(grey)
    return _hash(pixels), thumbnail, min(pixels.shape[:2]) >= SHORT and thumbnail.std() >= FLAT


def _look_at_several(source: Source, several: Several, index: int) -> tuple[np.ndarray, np.ndarray, bool] | str:
    """As `_look`: the hash is that of all inputs together, the thumbnail that of the image.

    Without its image an example is nobody's duplicate: a short text and a few numbers may be equal by chance.
    """
    looks = {kind: _look(source.of_kind(kind), index) for kind in several.parts if several.present[kind][index]}
    if (bad := looks.get("image")) and isinstance(bad, str):
        return bad
    alone = source.ids[index] if "image" in several.parts and "image" not in looks else ""
    digest = hashlib.blake2b(repr((source.name, alone) if alone else tuple(looks)).encode(), digest_size=16)
    for hashed, _, _ in looks.values():
        digest.update(hashed)
    nothing = None, np.zeros((SIDE, SIDE), np.uint8), False
    return np.frombuffer(digest.digest(), np.uint8), *looks.get("image", nothing)[1:]


def _hash(example: np.ndarray) -> np.ndarray:
    digest = hashlib.blake2b(np.ascontiguousarray(example), digest_size=16, key=repr(example.shape).encode())
    return np.frombuffer(digest.digest(), np.uint8)


def _write(path: pathlib.Path, looks: Looks) -> None:
    text = io.BytesIO()
    np.savez(text, **looks._asdict())
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        file.write(hashlib.sha256(text.getvalue()).digest() + text.getvalue())
    newest = sorted(path.parent.glob("*.npz"), key=lambda other: -other.stat().st_mtime)
    for other, total in zip(newest, itertools.accumulate(other.stat().st_size for other in newest), strict=True):
        if total > KEPT:
            other.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> Looks | None:
    """What is kept there; None where nothing is, or not as it was written."""
    text = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(text[32:]).digest() != text[:32]:
        return None
    arrays = npz.read(io.BytesIO(text[32:]))
    return Looks(*(arrays[name] for name in Looks._fields)) if {*arrays} == {*Looks._fields} else None
