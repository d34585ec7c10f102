"""Arrays: .npz files of pixels, of encoded images, of texts, or of features, which are the rows of a table."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_jax.core import npz
from tl_jax.core.card import PIXEL_TYPES
from tl_jax.core.checks import refuse
from tl_jax.core.messages import shorten
from tl_jax.data import groups
from tl_jax.data.examples import EncodedImages, Source, check_split
from tl_jax.data.readers.folder import check_file
from tl_jax.data.several import Several
from tl_jax.data.text.tokens import Texts, part_texts

KINDS = {"i1": "classes", "u1": "classes", "i2": "multilabel", "u2": "multilabel", "f2": "targets"}  # by type and ndim
NDIM = {
    "image": (3, 4),
    "features": [2],
    "bytes": [1],
    "text": (1, 2),
    "offsets": [1],
    "label": (1, 2),
    "labels": (1, 2),
    "classes": [1],
}
SEVERAL = {"image": ("image",), "table": ("features",), "text": ("text", "offsets")}  # the keys of each kind of input
HAS = "has_"  # before the name of a kind: bool [N], whether an example has it, where some lack it
UNNAMED = 2**16  # classes that may go without names
log = logging.getLogger(__name__)


def array_source(
    name: str, split: str, inputs: Sequence, labels: np.ndarray, class_names: tuple[str, ...], sizes=None, columns=()
) -> Source:
    """A source over inputs in memory: images [N, H, W, C], a container of images whose sizes are given, or rows
    float32 [N, D] whose D `columns` are named."""
    twice = [repr(name) for name, count in Counter(class_names).items() if count > 1]
    refuse(f"{name} {split}: {len(twice)} class names occur more than once; give every class its own", twice)
    ids = tuple(f"{split}/{i}" for i in range(len(labels)))
    if sizes is None:
        sizes = np.full(len(labels), inputs[0].nbytes if len(labels) else 0, np.int64)
    labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int32)
    return Source(f"{name} {split}", inputs, labels, class_names, ids, sizes, columns=columns)


def load_arrays(path: str, split: str, group: str = "") -> Source:
    """Reads one split of an .npz file, or the file `{split}.npz` of a folder.

    Keys: `image` ([N, H, W] or [N, H, W, C] of one of PIXEL_TYPES), `bytes` (uint8) with `offsets` (int [N + 1]) for
    encoded images, `features` (numbers [N, D]) for the rows of a table, or `text` (text [N], or [N, 2] for pairs; or
    uint8 with offsets, see `join_texts`); `label` or `labels` (classes int [N] or
    [N, 1], from 0; labels of 0 and 1 [N, K > 1]; numbers float [N] or [N, T]); optionally `classes` (names), and the
    array that `group` names (int or text [N]). `images` is `image`. Several of image, features and text make a source
    of several inputs; `has_image`, `has_table` and `has_text` (bool [N]) say which examples have them. With a prefix
    (`train_image`, `train_label`, ...) one file holds several splits; without, it is the train split. Raises
    FileNotFoundError, or ValueError that says what is wrong.
    """
    root = Path(path).expanduser()
    file = root / f"{split}.npz" if root.is_dir() else root
    arrays = read_file(file, "an .npz of plain arrays (no objects)")
    arrays = {key[:-1] if key.endswith("_images") else key: array for key, array in arrays.items()}
    inputs = [key for key in arrays if key.endswith(("_image", "_bytes", "_features", "_text"))]
    prefixes = [key.rpartition("_")[0] for key in inputs if not key.endswith(tuple(f"{HAS}{kind}" for kind in SEVERAL))]
    prefixes = list(dict.fromkeys(prefixes))
    check_split(file, split, prefixes or ["train" if file == root else split])
    prefix = f"{split}_" if prefixes else ""
    keys = ("image", "features", "bytes", "text", "offsets", "label", "labels", *(f"{HAS}{kind}" for kind in SEVERAL))
    found = {key: arrays[prefix + key] for key in keys if prefix + key in arrays}
    source = check_arrays(file, f"arrays:{path}", split, found, arrays.get("classes"))
    if not group:
        return source
    named = arrays.get(prefix + group)
    if named is None or named.dtype.kind not in "iuU" or named.shape != (len(source),):
        is_there = f"it is {named.dtype} {list(named.shape)}" if named is not None else f"arrays: {', '.join(arrays)}"
        expected = f"data.group={group!r} to be the array {prefix + group!r}, integers or text [{len(source)}]"
        raise ValueError(f"{file}: expected {expected}; {is_there}")
    return groups.with_groups(source, named.astype(str).tolist())


def read_file(file: Path, expected: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz file; FileNotFoundError, or ValueError that says what is wrong and what was expected."""
    check_file(file, ".npz")
    try:
        return npz.read(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}; expected {expected}") from None


def check_arrays(file: Path | str, name: str, split: str, found: dict, classes: np.ndarray | None) -> Source:
    """A source of arrays with the keys of `load_arrays`; file: what messages call them."""
    labels = found.get("label", found.get("labels"))
    encoded = found["text"].dtype.kind != "U" if "text" in found else False
    kinds = ({"image"}, {"features"}, {"bytes", "offsets"}, {"text", "offsets"} if encoded else {"text"})
    inputs = [kind for kind in kinds if kind <= set(found)]
    if labels is not None and len({"image", "features", "text"} & set(found)) > 1 and "bytes" not in found:
        return _check_several(file, name, split, found, classes)
    if labels is None or len(inputs) != 1:
        expected = "label and one of image, features, text, or bytes with offsets"
        raise ValueError(f"{file} has {sorted(found)} for {split}; expected {expected}")
    ndim = {key: array.ndim for key, array in (found | {"classes": classes}).items() if array is not None}
    wrong = [f"{key} has {n} dimensions, expected {NDIM[key]}" for key, n in ndim.items() if n not in NDIM[key]]
    refuse(f"{file}: {len(wrong)} arrays cannot be what their names say", wrong)
    count = len(found["offsets"]) - 1 if "offsets" in inputs[0] else len(found[min(inputs[0])])
    labels = labels[:, None] if labels.dtype.kind == "f" and labels.ndim == 1 else labels
    labels = labels[:, 0] if labels.dtype.kind in "iu" and labels.shape[1:] == (1,) else labels  # a column of classes
    kind = KINDS.get(f"{labels.dtype.kind}{labels.ndim}")
    if kind is None or len(labels) != count or (kind == "multilabel" and labels.max(initial=0) > 1):
        expected = f"integer labels [{count}] or [{count}, 1], labels of 0 and 1 [{count}, K] or numbers [{count}, T]"
        raise ValueError(f"{file}: expected {expected}; found {labels.dtype} {labels.shape}")
    highest = int(labels.max(initial=0)) if kind == "classes" else labels.shape[1] - 1
    lowest = 0 if kind == "targets" else labels.min(initial=0)
    if classes is None and kind == "classes":
        _check_gaps(file, split, np.unique(labels[labels >= 0]).tolist())
    class_names = tuple(map(str, range(highest + 1)) if classes is None else classes.astype(str).tolist())
    if lowest < 0 or highest >= len(class_names):
        expected = f"0 .. {len(class_names) - 1} ({len(class_names)} classes); labels count from 0"
        raise ValueError(f"{file}: labels run from {lowest} to {highest}, outside {expected}")
    if "image" in found:
        return array_source(name, split, _as_images(file, found["image"]), labels, class_names)
    if "text" in found and not encoded:
        texts = Texts(tuple(map(tuple, found["text"].reshape(count, -1).tolist())))
        sizes = np.array([len(texts.head(i)) for i in range(count)], np.int64)
        return array_source(name, split, texts, labels, class_names, sizes)
    if "features" in found:
        rows = _as_rows(file, found["features"])
        columns = tuple(f"x{i}" for i in range(rows.shape[1]))
        return array_source(name, split, rows, labels, class_names, columns=columns)
    if found["offsets"].dtype.kind not in "iu":
        raise ValueError(f"{file}: offsets must be integers, found {found['offsets'].dtype}")
    offsets, data = found["offsets"].astype(np.int64), found["text" if encoded else "bytes"]
    empty = np.diff(offsets).min(initial=1) < (0 if encoded else 1)
    if data.dtype != np.uint8 or offsets[0] < 0 or offsets[-1] > data.size or empty:
        found = f"{offsets[0]} .. {offsets[-1]}, bytes of type {data.dtype}"
        raise ValueError(f"{file}: offsets must rise within the {data.size} bytes (uint8); found {found}")
    if encoded:
        try:
            texts = part_texts(data, offsets)
        except ValueError as error:
            raise ValueError(f"{file}: the texts are no UTF-8 ({error})") from None
        return array_source(name, split, texts, labels, class_names, np.diff(offsets))
    images = EncodedImages(data, offsets[:-1], offsets[1:])
    return array_source(name, split, images, labels, class_names, np.diff(offsets))


def _check_several(file: Path | str, name: str, split: str, found: dict, classes: np.ndarray | None) -> Source:
    """A source of several inputs: each is checked as the arrays of a source of its kind."""
    label = {key: found[key] for key in ("label", "labels") if key in found}
    each = {kind: {key: found[key] for key in keys if key in found} for kind, keys in SEVERAL.items()}
    sources = {kind: check_arrays(file, name, split, given | label, classes) for kind, given in each.items() if given}
    first, count = next(iter(sources.values())), len(next(iter(label.values())))
    present = {kind: found.get(f"{HAS}{kind}", np.ones(count, bool)) for kind in sources}
    wrong = [f"{HAS}{k} is {x.dtype} {x.shape}" for k, x in present.items() if (x.dtype, x.shape) != (bool, (count,))]
    wrong += [f"{key} says nothing of an input that is there" for key in found if key.startswith(HAS)
              and key.removeprefix(HAS) not in sources]  # fmt: skip
    refuse(f"{file}: expected bool [{count}], one for each of {', '.join(sources)}", wrong)
    parts = {kind: source.inputs for kind, source in sources.items()}
    columns = sources["table"].columns if "table" in sources else ()
    inputs = Several(parts, present, dict.fromkeys(parts, ()))
    check_any(inputs, first.ids, str(file))
    sizes = sum(source.sizes for source in sources.values())
    return dataclasses.replace(first, inputs=inputs, columns=columns, sizes=sizes)


def check_any(inputs: Several, ids: Sequence[str], where: str) -> None:
    """Raises ValueError that names the examples that have no input at all."""
    empty = np.flatnonzero(~np.any(list(inputs.present.values()), axis=0)).tolist()
    kinds = ", ".join(inputs.parts)
    refuse(f"{where}: {len(empty)} examples have none of the inputs {kinds}; remove them", [ids[i] for i in empty])


def _check_gaps(file: Path | str, split: str, present: list[int]) -> None:
    """Refuses labels that leave out classes nobody has named; where it is not train, a few may have no example."""
    count = max(present, default=-1) + 1
    if count == len(present):
        return
    shown = ", ".join(shorten(list(map(str, present)), 10))
    found = f"{file}: {len(present)} different labels ({shown}) stand for {count} classes in {split}"
    if split == "train" or count > UNNAMED:
        raise ValueError(f"{found}; number them from 0 without gaps, or add `classes` with a name for each of {count}")
    log.warning("%s; the others have no example there", found)


def _as_images(file: Path | str, images: np.ndarray) -> np.ndarray:
    stack = images[..., None] if images.ndim == 3 else images
    if (stack.dtype.name not in PIXEL_TYPES and stack.dtype.kind != "f") or 0 in stack.shape[1:]:
        fix = "An image needs pixels" if 0 in stack.shape[1:] else f"Types that are read: {', '.join(PIXEL_TYPES)}"
        raise ValueError(f"{file}: image must be [N, H, W] or [N, H, W, C]; found {images.dtype} {images.shape}. {fix}")
    return stack


def _as_rows(file: Path | str, features: np.ndarray) -> np.ndarray:
    if features.dtype.kind not in "fiu" or not features.shape[1]:
        raise ValueError(f"{file}: features must be numbers [N, D]; found {features.dtype} {features.shape}")
    rows = features.astype(np.float32)
    bad = np.argwhere(~np.isfinite(rows))
    fix = "remove these rows or columns, or fill them in"
    refuse(
        f"{file}: {len(bad)} features are no finite float32 numbers; {fix}", (f"row {i}, column {j}" for i, j in bad)
    )
    return rows
