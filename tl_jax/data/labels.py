"""What labels each task takes: the check of a source against its task, and labels made from columns of text."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tl_jax.core.checks import refuse
from tl_jax.core.options import LANGUAGE
from tl_jax.data.examples import Source
from tl_jax.data.readers.folder import natural_key

KINDS = {"classification": "classes", "binary": "classes", "multilabel": "multilabel", "regression": "targets"}
KINDS |= dict.fromkeys(LANGUAGE, "tokens")
EXPECTED = {
    "classification": "one class for each example",
    "binary": "one of two classes for each example",
    "multilabel": "0 or 1 for each of several labels",
    "regression": "one or several numbers for each example",
    **dict.fromkeys(LANGUAGE, "texts, whose tokens are the labels"),
}
MISSING = ("", "nan", "na", "n/a", "null", "none")  # cells in place of a number, in any case


class Table(NamedTuple):
    """Columns of text. where: what messages call it; rows: the number of each row, counted as in a spreadsheet.

    classes: of columns whose classes and their order are known; of others they are what the column holds.
    """

    where: str
    columns: dict[str, Sequence[str]]
    rows: np.ndarray
    classes: Mapping[str, tuple[str, ...]] = {}

    def find(self, names: Sequence[str]) -> str | None:
        """The first column that has one of these names, in any case."""
        by_name = {column.lower(): column for column in reversed(self.columns)}
        return next((by_name[name] for name in names if name in by_name), None)


def check_fit(source: Source, task: str) -> None:
    """Raises ValueError where the labels of a source are not what the task takes."""
    kind, names = source.label_kind, source.class_names
    if not names:  # without labels
        return
    if KINDS[task] == kind and (task != "binary" or len(names) == 2):
        return
    word = {"classes": "classes", "multilabel": "labels of 0 or 1", "targets": "targets"}[kind]
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    fitting = next(name for name, other in KINDS.items() if other == kind)
    found = f"{source.name} does not fit the task {task!r}: it has {len(names)} {word} ({shown})"
    raise ValueError(f"{found}, expected {EXPECTED[task]}. Use the task {fitting!r}, or another source")


def parse_numbers(cells: Sequence[str]) -> np.ndarray:
    """Values float64 [N]: nan where a cell is missing, inf where it is no finite number."""
    return np.array([_parse_number(cell) for cell in cells], np.float64)


def _parse_number(cell: str) -> float:
    try:
        if math.isfinite(value := float(cell)):
            return value
    except ValueError:
        pass
    return math.nan if cell.lower() in MISSING else math.inf


def number_columns(
    table: Table, names: Sequence[str], chosen: np.ndarray, *, expected: str = "a number"
) -> tuple[np.ndarray, list[str]]:
    """(values float64 [len(chosen), len(names)], problems) of chosen rows; a problem names row, column and cell."""
    values, problems = np.empty((len(chosen), len(names))), []
    for j, name in enumerate(names):
        cells = [table.columns[name][i] for i in chosen]
        values[:, j] = parse_numbers(cells)
        good = np.isin(values[:, j], (0, 1)) if expected == "0 or 1" else np.isfinite(values[:, j])
        for i in np.flatnonzero(~good).tolist():
            found = "is missing" if np.isnan(values[i, j]) else f"is {cells[i]!r}, expected {expected}"
            problems.append(f"row {table.rows[chosen[i]]}: {name} {found}")
    return values, problems


def encode(task: str, table: Table, names: Sequence[str], chosen: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """(labels of the chosen examples, class names) from the named columns of a table.

    Classes are those of the whole column, in natural order, so that every split has the same. Raises ValueError that
    lists the cells that do not fit the task.
    """
    if KINDS[task] == "classes":
        return _encode_classes(task, table, names, chosen)
    whole = task == "multilabel"
    values, problems = number_columns(table, names, chosen, expected="0 or 1" if whole else "a number")
    fix = "fill in or remove these rows; a column of text is a class, not a target"
    if whole:
        fix = "a column of several values is a class: use the task 'classification' with that one column"
    _refuse(task, table, names, problems, fix)
    return values.astype(np.int32 if whole else np.float32), tuple(names)


def _encode_classes(task: str, table: Table, names: Sequence[str], chosen: np.ndarray):
    if len(names) != 1:
        found = f"the task {task!r} takes one label column, found {len(names)}: {', '.join(names)}"
        fix = "Name one with data.labels, or use the task 'multilabel' or 'regression'"
        raise ValueError(f"{table.where}: {found}. {fix}")
    (name,), cells = names, table.columns[names[0]]
    problems = [f"row {table.rows[i]}: {name} is missing" for i in chosen if not cells[i]]
    _refuse(task, table, names, problems, "fill in or remove these rows")
    class_names = table.classes.get(name) or _class_names(task, table, name)
    number = {class_name: i for i, class_name in enumerate(class_names)}
    return np.array([number[cells[i]] for i in chosen], np.int32), tuple(class_names)


def _class_names(task: str, table: Table, name: str) -> list[str]:
    """What a column holds, in natural order."""
    found = [cell for cell in dict.fromkeys(table.columns[name]) if cell]
    values = parse_numbers(found)
    numeric = np.isfinite(values).all()
    if numeric and (fractions := [found[i] for i in np.flatnonzero(values % 1)]):
        found = f"column {name!r} holds numbers with fractions, such as {', '.join(fractions[:3])}"
        fix = f"expected classes for the task {task!r}. Use the task 'regression', or another column"
        raise ValueError(f"{table.where}: {found}; {fix}")
    return [found[i] for i in np.argsort(values, kind="stable")] if numeric else sorted(found, key=natural_key)


def _refuse(task: str, table: Table, names: Sequence[str], problems: list[str], fix: str) -> None:
    cells = f"{table.where}: {len(problems)} cells of {', '.join(names)}"
    refuse(f"{cells} do not fit the task {task!r}, expected {EXPECTED[task]}; {fix}", problems)
