"""Files of rows: images with label columns (csv:FILE), rows of numbers (table:FILE), texts (readers/texts.py)."""

import collections
import csv
import dataclasses
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_jax.core.checks import refuse
from tl_jax.core.messages import nearest
from tl_jax.data import groups
from tl_jax.data.examples import Source, check_split, file_source
from tl_jax.data.labels import KINDS, Table, encode, number_columns, parse_numbers
from tl_jax.data.readers.folder import SPLITS, check_file

log = logging.getLogger(__name__)
IMAGE_COLUMNS = ("file", "image", "path", "filename")
LABEL_COLUMNS = ("label", "target", "y")  # of a table, where no column is named


def read_table(path: str) -> Table:
    """Reads a file with a header; raises FileNotFoundError, or ValueError that says what is wrong with it.

    Values are separated by tabs, and quotation marks mean nothing, where the name ends in .tsv; of a .jsonl file each
    line is an object {column: value}; in any other values are separated by commas.
    """
    file = Path(path).expanduser()
    check_file(file, file.suffix if file.suffix in (".tsv", ".jsonl") else ".csv")
    tabs = file.suffix == ".tsv"
    how = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    try:
        text = file.read_bytes().decode("utf-8-sig")
        if file.suffix == ".jsonl":
            return _objects(file, text)
        csv.field_size_limit(2**31 - 1)  # of a value; a long text has more than the usual 2^17 characters
        records = [[cell.strip() for cell in record] for record in csv.reader(io.StringIO(text, newline=""), **how)]
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file} is not UTF-8 text: byte {error.object[error.start]:#x} in line {line}; save it as "
                         "UTF-8, such as by iconv -f latin1 -t utf-8") from None  # fmt: skip
    except csv.Error as error:
        expected = f"values separated by {'tabs' if tabs else 'commas'}"
        raise ValueError(f"cannot read {file}: {error}; expected {expected}") from None
    numbered = [(number, record) for number, record in enumerate(records, 1) if any(record)]
    if len(numbered) < 2:
        raise ValueError(f"{file} has {len(numbered)} rows; expected a header and at least one row of values")
    header = numbered[0][1]
    if len(header) == 1 and (separator := next((s for s in ",;\t|" if s in header[0]), "")):
        expected = "tabs" if tabs else "commas"
        raise ValueError(
            f"{file} has the one column {header[0]!r}; expected {expected}, found {separator!r} between names"
        )
    problems = [f"column {i} has no name" for i, name in enumerate(header, 1) if not name]
    counts = collections.Counter(name for name in header if name)
    problems += [f"column {name!r} occurs {count} times" for name, count in counts.items() if count > 1]
    refuse(f"{file}: the header {header} cannot be used; rename the columns", problems)
    ragged = [f"row {n}: {len(record)} values" for n, record in numbered[1:] if len(record) != len(header)]
    fix = "a value holds no tab" if tabs else 'put a value that contains a comma in quotation marks, "a, b"'
    refuse(f"{file}: {len(ragged)} rows do not have the {len(header)} values of the header; {fix}", ragged)
    numbers, bodies = zip(*numbered[1:], strict=True)
    return Table(str(file), dict(zip(header, zip(*bodies, strict=True), strict=True)), np.array(numbers))


def _objects(file: Path, text: str) -> Table:
    """The table of a .jsonl file; every object must have the same names, and plain values."""
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or any(isinstance(x, dict | list) for x in row.values()):
            problems.append(f"line {number}: {line[:60]!r}")
            continue
        rows.append((number, row))
    refuse(f"{file}: {len(problems)} lines are no objects {{column: value}} of plain values", problems)
    if not rows:
        raise ValueError(f"{file} is empty; expected one object {{column: value}} a line")
    names = list(rows[0][1])
    other = [f"line {n}: {', '.join(row) or 'none'}" for n, row in rows if set(row) != set(names)]
    refuse(f"{file}: {len(other)} lines have other columns than the first, {', '.join(names)}", other)
    cells = {name: tuple(_cell(row[name]) for _, row in rows) for name in names}
    return Table(str(file), cells, np.array([number for number, _ in rows]))


def _cell(value: Any) -> str:
    return "" if value is None else value.strip() if isinstance(value, str) else json.dumps(value)


def load_csv(path: str, split: str, task: str, labels: Sequence[str] = (), group: str = "") -> Source:
    """The images that a file lists, with its label columns and the column of groups.

    The column `file`, `image`, `path` or `filename` holds paths relative to the folder of the file; the optional column
    `split` the names of splits, without it all is train. `labels` names the label columns; by default all others.
    """
    table = read_table(path)
    images = table.find(IMAGE_COLUMNS)
    if images is None:
        raise ValueError(
            f"{table.where} has no column of image files; found {', '.join(table.columns)}, expected one of "
            f"{', '.join(IMAGE_COLUMNS)}. Rename it, or use table:{path} for rows of numbers"
        )
    _check_group(table, group)
    others = [column for column in table.columns if column not in (images, group, table.find(("split",)))]
    names = _label_names(table, labels, others, default=others)
    chosen, paths = rows_of_split(table, split), table.columns[images]
    _check_paths(table, images)
    values, class_names = encode(task, table, names, chosen)
    picked = [paths[i] for i in chosen]
    found = file_source(f"csv:{path} {split}", str(Path(table.where).parent), picked, values, class_names)
    return _grouped(found, table, group, chosen)


def _check_paths(table: Table, column: str) -> None:
    first, problems = {}, []
    for row, path in zip(table.rows.tolist(), table.columns[column], strict=True):
        if not path:
            problems.append(f"row {row}: {column} is missing")
        elif first.setdefault(path, row) != row:
            problems.append(f"row {row}: {path} was already in row {first[path]}")
    fix = "keep one row for each image, with one column for each label"
    refuse(f"{table.where}: {len(problems)} rows do not name an image of their own; {fix}", problems)


def load_table(path: str, split: str, task: str, labels: Sequence[str] = (), group: str = "") -> Source:
    """The rows of a file as inputs: all columns of numbers beside labels, group and `split`; see `table_source`."""
    table = read_table(path)
    images = table.find(IMAGE_COLUMNS)
    if images and np.isinf(parse_numbers(table.columns[images])).any():
        raise ValueError(f"{table.where} lists image files in {images!r}; use csv:{path}, or remove the column")
    return table_source(f"table:{path} {split}", table, split, task, labels, group)


def table_source(name: str, table: Table, split: str, task: str, labels: Sequence[str] = (), group: str = "") -> Source:
    """One split of a table as a source of float32 rows.

    labels: the label columns; by default the one column that is called label, target or y. Columns of text are left
    out, with a warning. Raises ValueError that lists every cell that is missing or no number.
    """
    known = [column for column in table.columns if column.lower() in LABEL_COLUMNS]
    _check_group(table, group)
    others = [column for column in table.columns if column not in (group, table.find(("split",)))]
    names = _label_names(table, labels, others, default=known if len(known) == 1 else [])
    chosen, inputs, text = rows_of_split(table, split), [], []
    for column in (column for column in others if column not in names):
        values = parse_numbers(table.columns[column])
        (text if np.isinf(values).any() and not np.isfinite(values).any() else inputs).append(column)
    if not inputs:
        found = f"no column of numbers beside the labels {', '.join(names)}; found {', '.join(others)}"
        raise ValueError(f"{table.where} has {found}")
    values, problems = number_columns(table, inputs, chosen)
    fix = "fill in or remove these rows, or remove the columns"
    refuse(f"{table.where}: {len(problems)} cells of the input columns are not numbers; {fix}", problems)
    if text:
        log.warning("%s: columns of text are not read: %s", table.where, ", ".join(text))
    targets, class_names = encode(task, table, names, chosen)
    sizes = np.full(len(chosen), 4 * len(inputs), np.int64)
    found = Source(name, values.astype(np.float32), targets, class_names, _row_ids(table, chosen), sizes)
    return _grouped(dataclasses.replace(found, columns=tuple(inputs)), table, group, chosen)


def with_labels(
    name: str, table: Table, chosen: np.ndarray, inputs: Any, task: str, labels: Sequence[str], group: str, *,
    read: Sequence[str], known: Sequence[str], sizes: np.ndarray,
) -> Source:  # fmt: skip
    """A source of chosen rows, whose inputs come from the columns `read`.

    labels: the label columns; by default the one column with a name of `known`. Language modelling reads none.
    """
    _check_group(table, group)
    if KINDS[task] == "tokens":
        found = Source(name, inputs, np.full(len(chosen), -1, np.int32), (), _row_ids(table, chosen), sizes)
        return _grouped(found, table, group, chosen)
    others = [x for x in table.columns if x not in (group, table.find(("split",)), *read)]
    likely = [column for column in others if column.lower() in known]
    names = _label_names(table, labels, others, default=likely if len(likely) == 1 else [])
    values, class_names = encode(task, table, names, chosen)
    found = Source(name, inputs, values, class_names, _row_ids(table, chosen), sizes)
    return _grouped(found, table, group, chosen)


def _row_ids(table: Table, chosen: np.ndarray) -> tuple[str, ...]:
    return tuple(f"row/{table.rows[i]}" for i in chosen.tolist())


def _check_group(table: Table, group: str) -> None:
    if group and group not in table.columns:
        known = f"{nearest(group, table.columns)}; columns: {', '.join(table.columns)}"
        raise ValueError(f"{table.where} has no column data.group={group!r}{known}")


def _grouped(source: Source, table: Table, group: str, chosen: np.ndarray) -> Source:
    return groups.with_groups(source, [table.columns[group][i] for i in chosen]) if group else source


def _label_names(table: Table, labels: Sequence[str], others: list[str], default: list[str]) -> list[str]:
    names = list(labels) or default
    problems = [f"{name!r}{nearest(name, others)}" for name in names if name not in others]
    if problems or not names or len(set(names)) < len(names):
        twice = names and not problems
        found = f"the label columns {', '.join(names)}" if twice else f"no label column {', '.join(problems)}".strip()
        expected = f"one or several different ones of {', '.join(others) or 'none'}, named with data.labels"
        raise ValueError(f"{table.where} has {found}; expected {expected}")
    return names


def rows_of_split(table: Table, split: str) -> np.ndarray:
    """The positions of the examples of a split; without a column `split` all are train."""
    column, count = table.find(("split",)), len(table.rows)
    names = ["train"] * count if column is None else [SPLITS.get(cell.lower()) for cell in table.columns[column]]
    unknown = [f"row {table.rows[i]}: {table.columns[column][i]!r}" for i in range(count) if names[i] is None]
    refuse(f"{table.where}: {len(unknown)} rows have no known split, expected one of {', '.join(SPLITS)}", unknown)
    check_split(table.where, split, list(dict.fromkeys(names)))
    return np.flatnonzero(np.array(names) == split)
