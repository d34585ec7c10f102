"""Examples of several inputs, several:FILE: each row of a table names an image file, texts and numbers, and its label.

data.image names the column of image files, data.text one or two columns of text, data.columns those of numbers.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_jax.core.checks import refuse
from tl_jax.core.messages import nearest
from tl_jax.data.examples import FileImages, Source, sizes_of
from tl_jax.data.labels import MISSING, Table, number_columns
from tl_jax.data.readers.arrays import check_any
from tl_jax.data.readers.tables import read_table, rows_of_split, with_labels
from tl_jax.data.readers.texts import LABELS, text_columns
from tl_jax.data.several import Several
from tl_jax.data.text.tokens import Texts


def load_several(
    path: str, split: str, task: str, labels: Sequence[str] = (), group: str = "", text: Sequence[str] = (),
    image: str = "", columns: Sequence[str] = (),
) -> Source:  # fmt: skip
    """One split of a .csv, .tsv or .jsonl file. labels: by default the one column of LABELS.

    An empty cell is a missing image; where all columns of text, or all of numbers, are empty, that input is missing.
    Paths are relative to the folder of the file. Raises ValueError for rows without any input, and for cells that are
    no numbers or, beside others that are, empty.
    """
    table = read_table(path)
    inputs, sizes = inputs_of(table, rows_of_split(table, split), image, text, columns)
    read = [name for names in inputs.columns.values() for name in names]
    found = with_labels(
        f"several:{path} {split}", table, rows_of_split(table, split), inputs, task, labels, group, read=read,
        known=LABELS, sizes=sizes,
    )  # fmt: skip
    return dataclasses.replace(found, columns=inputs.columns.get("table", ()))


def inputs_of(
    table: Table, chosen: np.ndarray, image: str, text: Sequence[str], columns: Sequence[str]
) -> tuple[Several, np.ndarray]:
    """The inputs of chosen rows, and the bytes of each; text: (column, ...), as the others."""
    named = {"image": (image,) if image else (), "text": tuple(text), "table": tuple(columns)}
    named = {kind: names for kind, names in named.items() if names}
    _check_columns(table, named)
    cells = {kind: [tuple(table.columns[name][i] for name in names) for i in chosen] for kind, names in named.items()}
    present = {kind: np.array([_there(kind, row) for row in rows], bool) for kind, rows in cells.items()}
    parts, sizes = {}, np.zeros(len(chosen), np.int64)
    if image:
        root, paths = str(Path(table.where).parent), tuple(cell for (cell,) in cells["image"])
        parts["image"] = FileImages(root, paths)
        there = np.flatnonzero(present["image"])
        sizes[there] += np.array(sizes_of([parts["image"].path(i) for i in there]), np.int64)
    if text:
        parts["text"] = Texts(tuple(cells["text"]))
        sizes += np.array([sum(len(cell.encode(errors="replace")) for cell in row) for row in cells["text"]], np.int64)
    if columns:
        parts["table"] = np.zeros((len(chosen), len(columns)), np.float32)
        whole = np.flatnonzero(present["table"])
        values, problems = number_columns(table, named["table"], chosen[whole])
        fix = "fill them in, or leave all of data.columns empty in a row that has no numbers"
        refuse(f"{table.where}: {len(problems)} cells of data.columns are not numbers; {fix}", problems)
        parts["table"][whole] = values
        sizes += 4 * len(columns)
    found = Several(parts, present, named)
    check_any(found, [f"row {table.rows[i]}" for i in chosen], table.where)
    return found, sizes


def _there(kind: str, row: tuple[str, ...]) -> bool:
    """Whether a row has an input; of numbers the usual words for a missing one count as empty."""
    return any(cell.lower() not in MISSING if kind == "table" else cell for cell in row)


def _check_columns(table: Table, named: dict[str, tuple[str, ...]]) -> None:
    """Raises ValueError where fewer than two kinds of input are named, or columns that are not there or named twice."""
    known = ", ".join(table.columns)
    if len(named) < 2:
        expected = "name the columns of at least two of data.image, data.text and data.columns"
        raise ValueError(f"{table.where} is a source of several inputs: {expected}; it has {known}")
    if "text" in named:
        text_columns(table, named["text"])
    options = {"image": "data.image", "text": "data.text", "table": "data.columns"}
    every = [(options[kind], name) for kind, names in named.items() for name in names]
    wrong = [f"{option}: {name!r}{nearest(name, table.columns)}" for option, name in every if name not in table.columns]
    names = [name for _, name in every]
    wrong += [f"{name!r} is named {names.count(name)} times" for name in dict.fromkeys(names) if names.count(name) > 1]
    refuse(f"{table.where} has the columns {known}; these are not what can be read", wrong)
