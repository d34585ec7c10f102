"""Texts, text:PATH: a .csv, .tsv or .jsonl file, one such file a split, folders of .txt files, or one .txt file.

Of rows, data.text names the one or two columns of text, and data.labels those of labels, which language modelling does
without.
"""

import dataclasses
import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_jax.core.checks import refuse
from tl_jax.core.messages import listed, nearest
from tl_jax.data.examples import Source, check_split
from tl_jax.data.labels import Table
from tl_jax.data.readers.folder import SPLITS, check_file, load_folder
from tl_jax.data.readers.tables import LABEL_COLUMNS, read_table, rows_of_split, with_labels
from tl_jax.data.text.tokens import Texts

log = logging.getLogger(__name__)
KINDS = (".csv", ".tsv", ".jsonl")
# Names of columns of text, where none is given; the first pair or column that is there.
TEXTS = (
    ("sentence1", "sentence2"), ("text1", "text2"), ("premise", "hypothesis"), ("question1", "question2"), ("text",),
    ("sentence",), ("review",), ("content",), ("comment",), ("message",),
)  # fmt: skip
LABELS = (*LABEL_COLUMNS, "class", "category", "score")


def load_texts(
    path: str, split: str, task: str, labels: Sequence[str] = (), group: str = "", text: Sequence[str] = ()
) -> Source:
    """One split of texts; ValueError and FileNotFoundError say what is wrong with the files.

    text: one or two columns; by default those of TEXTS. labels: by default the one column of LABELS.
    """
    root = Path(path).expanduser()
    if root.suffix == ".txt":
        return _of_paragraphs(root, path, split)
    if root.is_dir() and not (files := _split_files(root)):
        return _of_folders(path, split)
    return text_source(f"text:{path} {split}", _joined(root, files) if root.is_dir() else read_table(path), split, task,
                       labels, group, text)  # fmt: skip


def text_source(
    name: str, table: Table, split: str, task: str, labels: Sequence[str], group: str, text: Sequence[str]
) -> Source:
    """One split of a table with columns of text."""
    columns = text_columns(table, text)
    chosen = rows_of_split(table, split)
    rows = [tuple(table.columns[column][i] for column in columns) for i in chosen]
    empty = [f"row {table.rows[i]}" for i, row in zip(chosen, rows, strict=True) if not all(row)]
    if empty:
        log.warning("%s: %d of %d examples have an empty text:\n%s", name, len(empty), len(rows), listed(empty))
    return with_labels(
        name, table, chosen, Texts(tuple(rows)), task, labels, group, read=columns, known=LABELS, sizes=_sizes(rows)
    )


def _sizes(rows: Sequence[tuple[str, ...]]) -> np.ndarray:
    return np.array([sum(len(each.encode(errors="replace")) for each in row) for row in rows], np.int64)


def without_labels(source: Source) -> Source:
    """The texts alone: every label is -1, and there are no names of classes."""
    return dataclasses.replace(source, labels=np.full(len(source), -1, np.int32), class_names=())


def text_columns(table: Table, text: Sequence[str]) -> tuple[str, ...]:
    """The columns of text: those that are named, or the first of TEXTS that are there; ValueError."""
    by_name = {column.lower(): column for column in reversed(table.columns)}
    if not text:
        found = next((names for names in TEXTS if all(name in by_name for name in names)), ())
        if not found:
            known = ", ".join(table.columns)
            raise ValueError(f"{table.where} has the columns {known}; which hold texts? Name one or two by data.text")
        return tuple(by_name[name] for name in found)
    unknown = [f"{name!r}{nearest(name, table.columns)}" for name in text if name not in table.columns]
    if unknown or len(text) > 2 or len(set(text)) < len(text):
        fix = f"expected one or two different ones of {', '.join(table.columns)}"
        raise ValueError(f"data.text={tuple(text)}: no columns {', '.join(unknown)} in {table.where}; {fix}")
    return tuple(text)


def _split_files(root: Path) -> dict[str, Path]:
    """{split: file} of a folder that has a file for each split, such as train.tsv, dev.tsv and test.tsv."""
    there = [file for file in sorted(root.iterdir()) if file.suffix in KINDS and file.stem.lower() in SPLITS]
    found = {SPLITS[file.stem.lower()]: file for file in there}
    if len(found) < len(there):
        names = ", ".join(file.name for file in there)
        raise ValueError(f"{root} names one split twice: {names}; keep one file per split")
    return found


def _joined(root: Path, files: dict[str, Path]) -> Table:
    """One table of the files of all splits, so that each has the same classes."""
    tables = {split: read_table(str(file)) for split, file in files.items()}
    first = next(iter(tables.values()))
    other = [
        f"{each.where}: {', '.join(each.columns)}"
        for each in tables.values()
        if set(each.columns) != set(first.columns)
    ]
    refuse(f"the files of {root} have other columns than {first.where}, {', '.join(first.columns)}", other)
    columns = {
        name: tuple(itertools.chain.from_iterable(table.columns[name] for table in tables.values()))
        for name in first.columns
        if name.lower() != "split"
    }
    splits = [split for split, table in tables.items() for _ in table.rows]
    rows = [f"{files[split].name}:{row}" for split, table in tables.items() for row in table.rows]
    return Table(str(root), {**columns, "split": splits}, np.array(rows))


def _of_folders(path: str, split: str) -> Source:
    """Class folders of .txt files, one text each."""
    found = load_folder(path, split)
    texts, problems = [], []
    for i, name in enumerate(found.ids):
        try:
            texts.append((found.inputs[i].decode("utf-8-sig").strip(),))
        except UnicodeDecodeError as error:
            problems.append(f"{name}: byte {error.object[error.start]:#x} at {error.start}")
    refuse(f"{len(problems)} files of {path} are not UTF-8 text", problems)
    named = f"text:{path} {split}"
    empty = [name for name, row in zip(found.ids, texts, strict=True) if not row[0]]
    if empty:
        log.warning("%s: %d of %d files are empty:\n%s", named, len(empty), len(texts), listed(empty))
    return Source(named, Texts(tuple(texts)), found.labels, found.class_names, found.ids, found.sizes)


def _of_paragraphs(file: Path, path: str, split: str) -> Source:
    """The paragraphs of a .txt file, between empty lines; all are train."""
    check_file(file, ".txt")
    check_split(f"text:{path}", split, ["train"])
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    rows = [(each.strip(),) for each in re.split(r"\n\s*\n", text) if each.strip()]
    ids = tuple(f"paragraph/{i}" for i in range(len(rows)))
    return Source(f"text:{path} {split}", Texts(tuple(rows)), np.full(len(rows), -1, np.int32), (), ids, _sizes(rows))
