"""Packed sources: decoded images of one short side in a memory-mapped file, read without decoding anything.

FOLDER/SPLIT/pixels.bin   [height, width, channels] of each image, filled up with zeros to a multiple of 8 bytes
FOLDER/SPLIT/index.npz    offsets int64 [N], shapes int32 [N, 2], labels int32 [N], sha256 uint8 [N, 32] of the pixels,
                          sums uint64 [N] of their 64-bit words, compared whenever an image is read
FOLDER/SPLIT/meta.json    what was packed how, class names, ids, what was left out, the sha256 of the index
"""

import functools
import hashlib
import io
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core import files, npz
from tl_jax.core.card import Form
from tl_jax.core.checks import refuse
from tl_jax.data.examples import Source
from tl_jax.data.readers.folder import natural_key

FORMAT = "tl_jax packed 3"
FILES = ("pixels.bin", "index.npz", "meta.json")


class Store(NamedTuple):
    """A split of a packed source, opened: `pixels` is its memory-mapped file, read only."""

    pixels: np.ndarray
    offsets: np.ndarray
    shapes: np.ndarray
    labels: np.ndarray
    sha256: np.ndarray
    sums: np.ndarray
    meta: dict[str, Any]

    def image(self, index: int) -> np.ndarray:
        """[H, W, C], not copied; OSError where its checksum says that it changed."""
        height, width = self.shapes[index].tolist()
        start, size = int(self.offsets[index]), height * width * self.bytes_per_pixel
        if checksum(self.pixels[start : start + padded(size)]) != self.sums[index]:
            fix = "its packed pixels are not those that were packed; `python -m tl_jax verify` names all such images"
            raise OSError(f"{self.meta['ids'][index]}: {fix}. Copy the folder again or pack the source anew")
        return self.pixels[start : start + size].view(self.form.pixels).reshape(height, width, self.form.channels)

    @property
    def form(self) -> Form:
        return Form(self.meta.get("pixels", "uint8"), self.meta.get("channels", 3))

    @property
    def bytes_per_pixel(self) -> int:
        return self.form.channels * np.dtype(self.form.pixels).itemsize

    def is_sound(self, index: int) -> bool:
        try:
            return hashlib.sha256(self.image(index)).digest() == self.sha256[index].tobytes()
        except OSError:
            return False


def padded(size: Any) -> Any:
    """Numbers of bytes rounded up to whole words."""
    return -(-size // 8) * 8


def checksum(pixels: np.ndarray) -> int:
    """The sum of the 64-bit words of uint8 [8 n]: no single flipped bit leaves it as it was."""
    return int(pixels.view("<u8").sum(dtype=np.uint64))


class PackedImages(NamedTuple):
    """Images of a packed split: `images[i]` is image `indices[i]` of the split at `path`; pickles as these two."""

    path: str
    indices: np.ndarray

    def __getitem__(self, index: int) -> np.ndarray:
        return _opened(self.path).image(self.indices[index])

    @property
    def form(self) -> Form:
        return _opened(self.path).form

    def select(self, indices: np.ndarray) -> "PackedImages":
        return self._replace(indices=self.indices[indices])

    def head(self, index: int) -> bytes:
        return _opened(self.path).sha256[self.indices[index]].tobytes()  # stands for all pixels


def load_packed(path: str, split: str) -> Source:
    """One split of a packed folder, with the labels, ids, class names and left-out examples of what was packed.

    Raises FileNotFoundError on a missing folder or split, ValueError where the files do not fit each other.
    """
    root = Path(path).expanduser()
    found = _splits_in(root)
    if split not in found:
        begun = f"; {split} was begun, start its command again" if (root / f".{split}.partial").is_dir() else ""
        fix = f"{begun}. Pack one: python -m tl_jax pack SOURCE {path} --split {split}"
        raise FileNotFoundError(f"no packed split {split!r} in {root}; there: {', '.join(found) or 'none'}{fix}")
    folder = str((root / split).resolve())
    store = _opened(folder)
    return Source(
        name=f"packed:{path} {split}",
        inputs=PackedImages(folder, np.arange(len(store.labels))),
        labels=store.labels.copy(),
        class_names=tuple(store.meta["class_names"]),
        ids=tuple(store.meta["ids"]),
        sizes=store.shapes.astype(np.int64).prod(axis=1) * store.bytes_per_pixel,
        skipped=tuple(store.meta["skipped"]),
        made_smaller=((store.meta["size"], store.meta["interpolation"]),) if store.meta["made_smaller"] else (),
    )


def _splits_in(root: Path) -> list[str]:
    return sorted((meta.parent.name for meta in root.glob("*/meta.json")), key=natural_key)


@functools.lru_cache(maxsize=16)
def _opened(path: str) -> Store:
    return open_split(Path(path))


def open_split(folder: Path) -> Store:
    """Opens a packed split, without reading pixels; ValueError lists files that are missing or not as they were."""
    try:
        meta = files.read_json(folder / "meta.json")
        if meta.get("format") != FORMAT:
            raise ValueError(f"format {meta.get('format')!r}, expected {FORMAT!r}")
        index = (folder / "index.npz").read_bytes()
        if (sha256 := hashlib.sha256(index).hexdigest()) != meta["index_sha256"]:
            raise ValueError(f"index.npz: sha256 {sha256!r}, expected {meta['index_sha256']!r}")
        found = npz.read(io.BytesIO(index))
        arrays = {key: found[key] for key in ("offsets", "shapes", "labels", "sha256", "sums")}
        counted = {f"{key}: examples": (len(value), meta["examples"]) for key, value in arrays.items()}
        facts = {
            "pixels.bin: bytes": ((folder / "pixels.bin").stat().st_size, meta["bytes"]),
            "meta.json: ids": (len(meta["ids"]), meta["examples"]),
        }
        problems = [f"{what} {a!r}, expected {b!r}" for what, (a, b) in (facts | counted).items() if a != b]
    except (OSError, ValueError, KeyError) as error:
        problems = [f"{type(error).__name__}: {error}"]
    fix = "copy the folder again, or remove it and pack the source anew"
    refuse(f"the packed images in {folder} are damaged; {fix}", problems)
    with (folder / "pixels.bin").open("rb") as file:
        pixels = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return Store(pixels, **arrays, meta=meta)


def verify(folder: str) -> dict[str, int]:
    """Hashes every packed image; the number of sound ones per split. Raises ValueError that lists all that differ."""
    root = Path(folder).expanduser()
    if not (splits := _splits_in(root)):
        raise FileNotFoundError(f"nothing packed in {root}; expected {root}/SPLIT/meta.json")
    counts, problems = {}, []
    for split in splits:
        try:
            store = open_split(root / split)
        except ValueError as error:
            problems.append(str(error))
            continue
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            differ = [i for i, sound in enumerate(pool.map(store.is_sound, range(len(store.labels)))) if not sound]
        problems += [f"{split}: the pixels of {store.meta['ids'][i]} differ from those packed" for i in differ]
        counts[split] = len(store.labels)
    refuse(f"{len(problems)} problems in {root}; pack the source anew", problems)
    return counts
