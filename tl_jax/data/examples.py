"""What a source holds: images by index, labels, class names and ids, and the check that every image can be read."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from tl_jax.data.image import ops

HEAD = 2**14  # bytes of each encoded image that a fingerprint reads
SHOWN = 10  # offenders named in one message; the rest are counted


class FileImages(NamedTuple):
    """Encoded images in files: `images[i]` reads the bytes of `root/paths[i]`."""

    root: str
    paths: tuple[str, ...]

    def __getitem__(self, index: int) -> bytes:
        with open(os.path.join(self.root, self.paths[index]), "rb") as file:
            return file.read()

    def select(self, indices: np.ndarray) -> "FileImages":
        return FileImages(self.root, tuple(self.paths[i] for i in indices))

    def head(self, index: int) -> bytes:
        try:
            with open(os.path.join(self.root, self.paths[index]), "rb") as file:
                return file.read(HEAD)
        except OSError:
            return b""  # named where the image itself is read

    def check_header(self, index: int) -> None:
        ops.open_image(os.path.join(self.root, self.paths[index])).close()


class EncodedImages(NamedTuple):
    """Encoded images end to end in one uint8 array: `images[i]` is the bytes of `data[starts[i]:stops[i]]`."""

    data: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.starts[index] : self.stops[index]].tobytes()

    def select(self, indices: np.ndarray) -> "EncodedImages":
        return EncodedImages(self.data, self.starts[indices], self.stops[indices])

    def head(self, index: int) -> bytes:
        return self[index][:HEAD]

    def check_header(self, index: int) -> None:
        ops.open_image(self[index]).close()


class JoinedImages(NamedTuple):
    """Images of several containers: `images[i]` is `parts[part[i]][position[i]]`."""

    parts: tuple
    part: np.ndarray
    position: np.ndarray

    def __getitem__(self, index: int) -> np.ndarray | bytes:
        return self.parts[self.part[index]][self.position[index]]

    def select(self, indices: np.ndarray) -> "JoinedImages":
        return JoinedImages(self.parts, self.part[indices], self.position[indices])

    def head(self, index: int) -> bytes:
        part, position = self.parts[self.part[index]], self.position[index]
        return part[position].tobytes() if isinstance(part, np.ndarray) else part.head(position)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """N labelled images with random access: `source[i]` is {"image": uint8 [H, W, 3] or encoded bytes, "label": int}.

    `images` is indexed the same way and may be one uint8 array [N, H, W, 3]; `labels` is int32 [N] and counts into
    `class_names`; `ids` name the examples across runs (path below the root, or split/index); `sizes` is int64 [N], the
    bytes of each image; `skipped` says which examples were dropped as unreadable, and why. `made_smaller`
    holds the short side and interpolation to which images were resized before they came here. Sources pickle.
    """

    name: str
    images: Sequence
    labels: np.ndarray
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    sizes: np.ndarray
    skipped: tuple[str, ...] = ()
    made_smaller: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def select(self, indices: np.ndarray) -> "Source":
        """The source of the examples at `indices`, in that order."""
        array = isinstance(self.images, np.ndarray)
        return dataclasses.replace(
            self,
            images=self.images[indices] if array else self.images.select(indices),
            labels=self.labels[indices],
            ids=tuple(self.ids[i] for i in indices),
            sizes=self.sizes[indices],
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 by which a resumed run knows that it reads the same examples.

        It covers class names, ids, labels, sizes, and the pixels of arrays or the first HEAD bytes of every encoded
        image; tfds records, which have a version, are taken by their sizes.
        """
        digest = hashlib.sha256(json.dumps([self.class_names, self.ids]).encode())
        digest.update(self.labels.astype("<i4").tobytes())
        digest.update(self.sizes.astype("<i8").tobytes())
        if isinstance(self.images, np.ndarray):
            digest.update(np.ascontiguousarray(self.images))
        else:
            for index in range(len(self)):
                digest.update(self.images.head(index))
        return digest.hexdigest()


def join(sources: Sequence[Source]) -> Source:
    """One source with the examples of several, in order; they must agree on the class names and share no example."""
    first = sources[0]
    if any(source.class_names != first.class_names for source in sources):
        names = "\n".join(f"  {source.name}: {source.class_names}" for source in sources)
        raise ValueError(f"cannot join sources with different classes:\n{names}")
    ids = tuple(i for source in sources for i in source.ids)
    if len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids) - len(set(ids))} examples occur twice in {' + '.join(s.name for s in sources)}")
    lengths = [len(source) for source in sources]
    part, position = np.repeat(np.arange(len(sources)), lengths), np.concatenate([np.arange(n) for n in lengths])
    return Source(
        name=" + ".join(source.name for source in sources),
        images=JoinedImages(tuple(source.images for source in sources), part, position),
        labels=np.concatenate([source.labels for source in sources]),
        class_names=first.class_names,
        ids=ids,
        sizes=np.concatenate([source.sizes for source in sources]),
        skipped=tuple(text for source in sources for text in source.skipped),
        made_smaller=tuple(dict.fromkeys(pair for source in sources for pair in source.made_smaller)),
    )


def find_unreadable(source: Source, *, fully: bool) -> dict[int, str]:
    """The reason by index of each image that cannot be read: by its header, or by decoding it whole. Uses threads."""
    if isinstance(source.images, np.ndarray):
        return {}

    def problem(index: int) -> str:
        try:
            if not fully:
                source.images.check_header(index)
            elif isinstance(image := source.images[index], bytes):
                ops.decode(image)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        reasons = pool.map(problem, range(len(source)))
        return {index: reason for index, reason in enumerate(reasons) if reason}


def listed(offenders: Sequence[str], shown: int = SHOWN) -> str:
    """The first offenders one to a line, and how many more there are."""
    more = [f"  ... and {len(offenders) - shown} more"] if len(offenders) > shown else []
    return "\n".join([f"  {offender}" for offender in offenders[:shown]] + more)
