"""What a source holds: images or rows of a table, labels, names and ids, and the check that images can be read."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core import console
from tl_jax.core.card import Form
from tl_jax.core.checks import refuse
from tl_jax.core.messages import unequal
from tl_jax.data import sealed
from tl_jax.data.image import decode
from tl_jax.data.several import Several, in_memory, taken
from tl_jax.data.text.tokens import Texts

HEAD = 2**14  # bytes of each encoded image that a fingerprint reads


class FileImages(NamedTuple):
    """Encoded images in files: `images[i]` reads the bytes of `root/paths[i]`."""

    root: str
    paths: tuple[str, ...]

    def __getitem__(self, index: int) -> bytes:
        with open(self.path(index), "rb") as file:
            return file.read()

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def select(self, indices: np.ndarray) -> "FileImages":
        return FileImages(self.root, tuple(self.paths[i] for i in indices))

    def head(self, index: int) -> bytes:
        try:
            with open(self.path(index), "rb") as file:
                return file.read(HEAD)
        except OSError:
            return b""  # named where the image itself is read


class EncodedImages(NamedTuple):
    """Encoded images end to end in one uint8 array: `images[i]` is the bytes of `data[starts[i]:stops[i]]`."""

    data: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.starts[index] : self.stops[index]].tobytes()

    def select(self, indices: np.ndarray) -> "EncodedImages":
        return self._replace(starts=self.starts[indices], stops=self.stops[indices])

    def head(self, index: int) -> bytes:
        return self[index][:HEAD]


class JoinedImages(NamedTuple):
    """Images of several containers: `images[i]` is `containers[which[i]][position[i]]`."""

    containers: tuple
    which: np.ndarray
    position: np.ndarray

    def __getitem__(self, index: int) -> np.ndarray | bytes:
        return self.containers[self.which[index]][self.position[index]]

    def select(self, indices: np.ndarray) -> "JoinedImages":
        return JoinedImages(self.containers, self.which[indices], self.position[indices])

    def head(self, index: int) -> bytes:
        container, position = self.containers[self.which[index]], self.position[index]
        return container[position].tobytes() if isinstance(container, np.ndarray) else container.head(position)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """N labelled examples with random access. Sources pickle.

    inputs: images, indexed by example, each an array [H, W, C] or encoded bytes; they may be one array [N, H, W, C].
    form: how they are read. Or the rows of a table, float32 [N, F], whose names are `columns`. Or Texts. Or Several.
    labels: int32 [N] that count into `class_names`; int32 [N, K] of 0 and 1, one column a label of `class_names`; or
    float32 [N, T], one column a target of `class_names`. Or `SealedLabels`, which raise where one is read.
    ids name the examples across runs: the path below the root, split/index, or row/number.
    sizes: int64 [N], the bytes of each input. skipped: which examples were dropped as unreadable, and why.
    made_smaller: the short side and interpolation to which images were resized before they came here.
    domain_names: the sources as given to `load`. domains: int32 [N] that count into several domain_names.
    groups: text [N], the group of each example, which no slice and no fold cuts.
    weights: float32 [N], of the examples in the loss.
    """

    name: str
    inputs: Sequence
    labels: np.ndarray | sealed.SealedLabels
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    sizes: np.ndarray
    skipped: tuple[str, ...] = ()
    made_smaller: tuple[tuple[int, str], ...] = ()
    columns: tuple[str, ...] = ()
    domains: np.ndarray | None = None
    domain_names: tuple[str, ...] = ()
    groups: np.ndarray | None = None
    weights: np.ndarray | None = None
    form: Form = decode.RGB

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        label = self.labels[index] if self.labels.ndim > 1 else int(self.labels[index])
        return {self.input: self.inputs[index], "label": label}

    @property
    def num_domains(self) -> int:
        return 1 if self.domains is None else len(self.domain_names)

    @property
    def input(self) -> str:
        """ "image", "table", "text" or "several", as on the card of a network that reads them."""
        if isinstance(self.inputs, Several):
            return "several"
        return "text" if isinstance(self.inputs, Texts) else "table" if self.columns else "image"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of input that an example has: `input`, or each of several."""
        return tuple(self.inputs.parts) if isinstance(self.inputs, Several) else (self.input,)

    def of_kind(self, kind: str) -> "Source":
        """The same examples with their inputs of one kind alone."""
        if not isinstance(self.inputs, Several):
            return self
        columns = self.columns if kind == "table" else ()
        return dataclasses.replace(self, inputs=self.inputs.parts[kind], columns=columns)

    @property
    def label_kind(self) -> str:
        """ "classes", "multilabel" or "targets"."""
        return sealed.kind_of(self.labels)

    @property
    def sealed(self) -> bool:
        """Whether the labels are not to be read yet."""
        return isinstance(self.labels, sealed.SealedLabels)

    def opened(self) -> "Source":
        """With labels that are sealed no more; for what comes after the run has chosen."""
        return dataclasses.replace(self, labels=self.labels.open()) if self.sealed else self

    def select(self, indices: np.ndarray) -> "Source":
        """The source of the examples at `indices`, in that order."""
        return dataclasses.replace(
            self,
            inputs=taken(self.inputs, indices),
            labels=sealed.select(self.labels, indices),
            ids=tuple(self.ids[i] for i in indices),
            sizes=self.sizes[indices],
            domains=None if self.domains is None else self.domains[indices],
            groups=None if self.groups is None else self.groups[indices],
            weights=None if self.weights is None else self.weights[indices],
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 by which a resumed run knows that it reads the same examples.

        It covers class names, ids, labels that are not sealed, domains, weights, sizes, and arrays whole or the `head`
        of every encoded image.
        """
        domain_names = () if self.domains is None else self.domain_names
        further = self.columns or domain_names or self.label_kind != "classes"
        facts = [self.class_names, self.ids, *((self.label_kind, self.columns, domain_names) if further else ())]
        digest = hashlib.sha256(json.dumps(facts).encode())
        if not self.sealed:
            digest.update(self.labels.astype("<f4" if self.label_kind == "targets" else "<i4").tobytes())
        digest.update(self.sizes.astype("<i8").tobytes())
        if self.domains is not None:
            digest.update(self.domains.astype("<i4").tobytes())
        if self.weights is not None:
            digest.update(self.weights.astype("<f4").tobytes())
        if isinstance(self.inputs, np.ndarray):
            digest.update(np.ascontiguousarray(self.inputs))
        else:
            for index in range(len(self)):
                digest.update(self.inputs.head(index))
        return digest.hexdigest()


def file_source(name: str, root: str, paths: Sequence[str], labels: np.ndarray, class_names: Sequence[str]) -> Source:
    """A source of image files, named by their paths below root. A missing file is reported where it is read."""
    images = FileImages(root, tuple(paths))
    sizes = np.array(sizes_of([images.path(i) for i in range(len(paths))]), np.int64)
    return Source(name, images, labels, tuple(class_names), images.paths, sizes)


def sizes_of(files: Sequence[str]) -> list[int]:
    """The bytes of each file, 0 where it is missing; refuses pipes, sockets and devices, which hang or never end."""
    found = {file: os.stat(file) for file in files if os.path.exists(file)}
    special = [file for file, s in found.items() if not (stat.S_ISREG(s.st_mode) or stat.S_ISDIR(s.st_mode))]
    refuse(f"{len(special)} of {len(files)} files are pipes, sockets or devices, expected images; remove them", special)
    return [found[file].st_size if file in found else 0 for file in files]


def check_split(where: Any, split: str, known: Collection[str]) -> None:
    """Raises ValueError where a source has no such split."""
    if split not in known:
        raise ValueError(f"{where} has no split {split!r}; it has {', '.join(known)}. Take a slice: 'train[80%:]'")


def join(sources: Sequence[Source]) -> Source:
    """One source with the examples of several, in order.

    Raises ValueError where they differ in classes, columns or kinds of labels, or share an example.
    """
    first, name = sources[0], " + ".join(source.name for source in sources)
    same = {"class_names": "classes", "columns": "columns", "label_kind": "kinds of labels", "kinds": "inputs"}
    for what, words in same.items():
        own, others = getattr(first, what), {source.name: getattr(source, what) for source in sources}
        if differ := {name: other for name, other in others.items() if other != own}:
            lines = [f"{name}: {unequal(own, x) if isinstance(x, tuple) else x}" for name, x in differ.items()]
            refuse(f"cannot join sources with different {words}", [f"{first.name}: {own}", *lines])
    ids = tuple(i for source in sources for i in source.ids)
    if len(set(ids)) < len(ids):
        raise ValueError(f"{len(ids) - len(set(ids))} examples occur twice in {name}")
    return dataclasses.replace(
        first,
        name=name,
        inputs=_join_inputs(sources),
        labels=sealed.join([source.labels for source in sources]),
        ids=ids,
        sizes=np.concatenate([source.sizes for source in sources]),
        groups=None if first.groups is None else np.concatenate([source.groups for source in sources]),
        domains=None if first.domains is None else np.concatenate([source.domains for source in sources]),
        skipped=tuple(text for source in sources for text in source.skipped),
        made_smaller=tuple(dict.fromkeys(pair for source in sources for pair in source.made_smaller)),
    )


def _join_inputs(sources: Sequence[Source]) -> Any:
    """The inputs of sources of the same kinds, one after the other."""
    first = sources[0]
    if isinstance(first.inputs, Several):
        parts = {kind: _join_inputs([source.of_kind(kind) for source in sources]) for kind in first.kinds}
        present = {kind: np.concatenate([source.inputs.present[kind] for source in sources]) for kind in first.kinds}
        return first.inputs._replace(parts=parts, present=present)
    if first.input == "text":
        return Texts(tuple(row for source in sources for row in source.inputs.rows))
    if first.columns:
        return np.concatenate([source.inputs for source in sources])
    lengths = [len(source) for source in sources]
    which, position = np.repeat(np.arange(len(sources)), lengths), np.concatenate([np.arange(n) for n in lengths])
    return JoinedImages(tuple(source.inputs for source in sources), which, position)


def join_domains(sources: Sequence[Source]) -> Source:
    """One source with several sources as its domains; every id begins with the name of its domain and "/"."""
    names = tuple(name for source in sources for name in source.domain_names)
    if len(set(names)) < len(names):
        raise ValueError(f"several domains, but one source is given twice: {', '.join(names)}")
    renamed = [dataclasses.replace(source, ids=tuple(origins(source))) for source in sources]
    if sources[0].groups is not None:
        prefixed = [np.char.add(f"{uncorrupted(s.domain_names[0])}: ", s.groups) for s in sources]
        renamed = [dataclasses.replace(s, groups=groups) for s, groups in zip(renamed, prefixed, strict=True)]
    domains = np.repeat(np.arange(len(sources), dtype=np.int32), [len(source) for source in sources])
    return dataclasses.replace(join(renamed), domains=domains, domain_names=names)


def overlap(a: Source, b: Source) -> tuple[str, ...]:
    """The ids, as `a` has them, of the examples that two sources share: the same id of the same source or domain."""
    there = set(originals(b))
    return tuple(dict.fromkeys(i for i, origin in zip(a.ids, originals(a), strict=True) if origin in there))


def origins(source: Source) -> Sequence[str]:
    """The ids, each after the name of its source, as those of several domains are already."""
    return source.ids if source.domains is not None else [f"{''.join(source.domain_names)}/{i}" for i in source.ids]


def originals(source: Source) -> list[str]:
    """As `origins`, of a corrupted copy those of its original: it is the same example, in whatever it is scored."""
    return [uncorrupted(origin) for origin in origins(source)]


def uncorrupted(name: str) -> str:
    """The name of a source without corruptions, corrupt:NAME:SEVERITY: each."""
    return re.sub(r"^(corrupt:\w+:\d:)+", "", name)


def header(images: Sequence, index: int, form: Form) -> decode.Header:
    """Of an image, up to a turn by EXIF; of an encoded one by its header alone. ValueError, OSError."""
    return decode.header_of(images.path(index) if isinstance(images, FileImages) else images[index], form)


def find_unreadable(source: Source, *, fully: bool) -> dict[int, str]:
    """{index: id and reason} of the images that cannot be read: by their headers, or by decoding them. Uses threads."""
    whole, source = source.inputs, source.of_kind("image") if "image" in source.kinds else source
    if in_memory(source.inputs):
        return {}
    there = whole.present["image"] if isinstance(whole, Several) else np.ones(len(source), bool)
    column = "".join(f", column {name!r}" for name in whole.columns["image"]) if isinstance(whole, Several) else ""

    def problem(index: int) -> str:
        try:
            if not there[index]:
                return ""
            if not fully:
                header(source.inputs, index, source.form)
            elif isinstance(image := source.inputs[index], bytes):
                with decode.reading(image, source.form):
                    pass
        except (ValueError, OSError) as error:
            return f"{source.ids[index]}{column}: {error}"
        return ""

    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        problems = pool.map(problem, range(len(source)))
        read = console.counted("reading images", problems, len(source))
        return {index: text for index, text in enumerate(read) if text}
