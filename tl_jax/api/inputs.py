"""What users hand over as data: paths, sources by name, arrays, data sets."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.api import several
from tl_jax.core import files
from tl_jax.core.card import Card, Form
from tl_jax.core.messages import listed, nearest
from tl_jax.data import sources
from tl_jax.data.examples import Source, sizes_of
from tl_jax.data.labels import number_columns
from tl_jax.data.readers import arrays, folder, tables, texts
from tl_jax.data.text.tokens import join_texts

PATH = str | os.PathLike


def list_inputs(data: Any, card: Card, text: Sequence[str] = ()) -> tuple[Sequence[str], Any]:
    """(names, items) of unlabelled inputs: arrays, a Dataset, files, or folders, of which every visible file counts.

    Of a network of text an item is a tuple of one or two texts; text: the columns of files of rows.
    """
    if isinstance(data, Source):
        data = data.of_kind(card.input) if card.input in data.kinds else data  # of several
        return data.ids, data.inputs.rows if card.input == data.input == "text" else data.inputs
    if card.input == "text":
        return _list_texts(data, text)
    given = [data] if isinstance(data, PATH) else data
    if not all(isinstance(each, PATH) for each in given):
        names, found = [str(i) for i in range(len(given))], given
    elif card.input == "table":
        if len(given) != 1:
            raise ValueError(f"the network reads the rows of a table: expected one .csv file, found {len(given)} paths")
        names, found = _rows(os.fspath(given[0]), card)
    else:
        paths = [pathlib.Path(path).expanduser() for path in given]
        if missing := [str(path) for path in paths if not path.exists()]:
            raise FileNotFoundError(f"{len(missing)} of {len(paths)} paths do not exist:\n{listed(missing)}")
        names = [name for path in paths for name in (folder.list_files(path) if path.is_dir() else [str(path)])]
        sizes_of(names)
        found = [pathlib.Path(name) for name in names]
    if not len(found):
        raise ValueError(f"there is no input in {data if given is not data else 'what was given'}")
    return names, found


def _list_texts(data: Any, text: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """A path, or a sequence of texts, of pairs of texts or of pathlib.Path."""
    given = [pathlib.Path(data)] if isinstance(data, PATH) else list(data)
    wrong = [repr(each) for each in given if not (isinstance(each, PATH) or as_texts(each))]
    if wrong:
        raise ValueError(f"{len(wrong)} inputs are no text and no pair of texts:\n{listed(wrong)}")
    names, rows = [], []
    for i, each in enumerate(given):
        if not isinstance(each, os.PathLike):
            names.append(str(i))
            rows.append(as_texts(each))
            continue
        for name in folder.list_files(each) if (each := pathlib.Path(each).expanduser()).is_dir() else [str(each)]:
            if pathlib.Path(name).suffix in texts.KINDS:
                table = tables.read_table(name)
                columns = [table.columns[column] for column in texts.text_columns(table, text)]
                names += [f"{name}:{row}" for row in table.rows]
                rows += zip(*columns, strict=True)
                continue
            names.append(name)
            try:
                rows.append((pathlib.Path(name).read_bytes().decode("utf-8-sig").strip(),))
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not rows:
        raise ValueError(f"there is no input in {data}")
    return names, rows


def as_texts(item: Any) -> tuple[str, ...]:
    """One text, or two, as a tuple; () for what is neither."""
    if isinstance(item, str):
        return (item,)
    pair = isinstance(item, list | tuple | np.ndarray) and len(item) in (1, 2) and all(isinstance(x, str) for x in item)
    return tuple(item) if pair else ()


def _rows(path: str, card: Card) -> tuple[list[str], np.ndarray]:
    """The rows of a .csv file in the columns that a network reads."""
    table = tables.read_table(path)
    if lacking := [f"{name}{nearest(name, table.columns)}" for name in card.columns if name not in table.columns]:
        raise ValueError(f"{path} lacks {len(lacking)} columns that the network reads:\n{listed(lacking)}")
    values, problems = number_columns(table, card.columns, np.arange(len(table.rows)))
    if problems:
        raise ValueError(f"{path}: {len(problems)} cells are not numbers:\n{listed(problems)}")
    return [f"row/{row}" for row in table.rows], values


def source_name(data: PATH, input: str = "image") -> str:
    """The source that a text stands for: itself, or that of a path: a folder, an .npz file or a .csv file."""
    text, path = os.fspath(data), pathlib.Path(data).expanduser()
    if not path.exists() or text in sources.BUILTIN:
        return text
    if input == "text" and path.suffix != ".npz":
        return f"text:{text}"
    if input == "several" and path.suffix in texts.KINDS:
        return f"several:{text}"
    if path.is_dir():
        kind = "packed" if any(path.glob("*/meta.json")) else "arrays" if any(path.glob("*.npz")) else "folder"
        return f"{kind}:{text}"
    return f"{'csv' if path.suffix == '.csv' else 'arrays'}:{text}"


def splits_of(source: str, task: str, labels: Sequence[str] = (), **columns: Any) -> list[str]:
    """Which of train, val and test a source has; raises what `sources.load` raises where it has none.

    columns: text, image and columns, as `sources.load` has them.
    """
    read = functools.partial(sources.list_split, source, task=task, labels=tuple(labels), **columns, form=None)
    found = []
    for split in ("train", "val", "test"):
        # No error is kept: its traceback would keep what `fit` holds, as the temporary folder of a run.
        with contextlib.suppress(ValueError, OSError):
            read(split)
            found.append(split)
    if not found:
        read("train")  # says why
    return found


def options_of(splits: Collection[str]) -> dict[str, str]:
    """The options of the splits that data have: a fifth of train where there is no val; "" where there is no test."""
    train, val = ("train", "val") if "val" in splits else ("train[:80%]", "train[80%:]")
    return {"data.train": train, "data.val": val, "data.test": "test" if "test" in splits else ""}


def default_splits(source: str | Sequence[str], task: str, labels: Sequence[str] = ()) -> dict[str, str]:
    """`options_of` a source, or what several have in common; raises what `sources.load` raises."""
    names = [source] if isinstance(source, str) else source
    return options_of(set.intersection(*(set(splits_of(name, task, labels)) for name in names)))


def load_labelled(
    data: Any,
    split: str,
    card: Card,
    *,
    labels: Sequence[str] = (),
    text: Sequence[str] = (),
    columns: Mapping[str, Any] | None = None,
    cuts: Mapping[str, Mapping[str, Any]] | None = None,
) -> Source:
    """One labelled split of what a user hands over, for the network of a card.

    columns: of several inputs, as data.image and data.columns. cuts: {source: group and split_seed} of sources that are
    known.
    """
    task, form = card.task, card.form if "image" in card.cards else Form()
    if isinstance(data, PATH):
        name = source_name(data, card.input)
        read = {"labels": tuple(labels), "text": tuple(text) if name.startswith(("text:", "several:")) else ()}
        read |= (columns or {}) if name.startswith("several:") else {}
        split = split or splits_of(name, task, **read)[-1]
        return sources.load(name, split, task=task, **read, form=form, **(cuts or {}).get(name, {}))
    named = by_split(data)
    chosen = split or next(name for name in ("test", "val", "train", *named) if name in named)
    if chosen not in named:
        raise ValueError(f"there is no split {chosen!r}; given were {', '.join(named)}")
    return named[chosen]


def by_split(data: Any) -> dict[str, Source]:
    """Data in memory as `{split: Source}`; what has no split is train."""
    found = {}
    for split, each in (data if isinstance(data, Mapping) else {"train": data}).items():
        if isinstance(each, Source):
            found[split] = each
            continue
        if not isinstance(each, list | tuple) or len(each) not in (2, 3) or isinstance(each[0], str):
            pair = "a pair (images [N, H, W, C] or texts, labels), a Dataset, or a table {split: pair or Dataset}"
            expected = f"expected a source such as 'folder:PATH', a path, {pair}"
            raise ValueError(f"{split}: found {type(each).__name__}; {expected}")
        if isinstance(each[0], Mapping):
            inputs, (labels, *classes) = several.arrays_of(each[0]), map(np.asarray, each[1:])
        elif len(each[0]) and (found_texts := [as_texts(x) for x in each[0]])[0]:
            inputs, (labels, *classes) = join_texts(found_texts), map(np.asarray, each[1:])
        else:
            images, labels, *classes = map(np.asarray, each)
            inputs = {"image": images}
        given = {**inputs, "label": labels}
        found[split] = arrays.check_arrays("the arrays", "arrays", split, given, classes[0] if classes else None)
    return found


def write_arrays(named: Mapping[str, Source], path: pathlib.Path) -> None:
    """Writes data in memory as the .npz file that the source arrays:FILE reads, so that the trainer reads it."""
    kept, names = {}, {source.class_names for source in named.values()}
    if all(found == tuple(map(str, range(len(found)))) for found in names):  # numbered: the longest holds the others
        names = {max(names, key=len)}
    if len(names) != 1 or any(source.columns for source in named.values() if source.input == "table"):
        raise ValueError(f"splits with different classes, or rows of a table: {', '.join(named)}; expected images")
    for split, source in named.items():
        kept[f"{split}_label"] = source.labels
        if source.input == "several":
            kept |= {f"{split}_{key}": x for key, x in _several_arrays(source).items()}
            continue
        if source.input == "text":
            kept |= {f"{split}_{key}": x for key, x in join_texts(source.inputs.rows).items()}
            continue
        if isinstance(source.inputs, np.ndarray):
            kept[f"{split}_image"] = source.inputs
            continue
        encoded = [source.inputs[i] for i in range(len(source))]
        if not all(isinstance(each, bytes) for each in encoded):
            raise ValueError(f"{source.name} mixes files and arrays; give it as a source by name")
        kept[f"{split}_bytes"] = np.frombuffer(b"".join(encoded), np.uint8)
        kept[f"{split}_offsets"] = np.cumsum([0, *map(len, encoded)])
    with files.atomic_write(path) as file:
        np.savez(file, classes=np.array(names.pop()), **kept)


def _several_arrays(source: Source) -> dict[str, np.ndarray]:
    """The arrays of several inputs, as `arrays.load_arrays` reads them."""
    parts, present = source.inputs.parts, source.inputs.present
    kept = {f"{arrays.HAS}{kind}": there for kind, there in present.items()}
    if "image" in parts:
        if not isinstance(parts["image"], np.ndarray):
            raise ValueError(f"{source.name} has image files; give it as a source by name")
        kept["image"] = parts["image"]
    kept |= {"features": parts["table"]} if "table" in parts else {}
    return kept | (join_texts(parts["text"].rows) if "text" in parts else {})
