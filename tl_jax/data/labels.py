"""What labels each task takes: the check of a source against its task, and labels made from columns of text."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tl_jax.core.messages import listed, nearest
from tl_jax.data.examples import Source
from tl_jax.data.readers.folder import natural_key

KINDS = {"classification": "classes", "binary": "classes", "multilabel": "multilabel", "regression": "targets"}
EXPECTED = {
    "classification": "one class for each example",
    "binary": "one of two classes for each example",
    "multilabel": "0 or 1 for each of several labels",
    "regression": "one or several numbers for each example",
}
MISSING = ("", "nan", "na", "n/a", "null", "none")  # cells in place of a number, in any case


def check_task(task: str) -> None:
    """Raises ValueError for a task that has no labels here."""
    if task not in KINDS:
        raise ValueError(f"there is no task {task!r}{nearest(task, KINDS)}; known: {', '.join(KINDS)}")


def check_fit(source: Source, task: str) -> None:
    """Raises ValueError where the labels of a source are not what the task takes."""
    kind, names = source.label_kind, source.class_names
    if KINDS[task] == kind and (task != "binary" or len(names) == 2):
        return
    word = {"classes": "classes", "multilabel": "labels of 0 or 1", "targets": "targets"}[kind]
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    fitting = next(name for name, other in KINDS.items() if other == kind)
    raise ValueError(
        f"{source.name} does not fit the task {task!r}: it has {len(names)} {word} ({shown}), expected "
        f"{EXPECTED[task]}. Use the task {fitting!r}, or another source"
    )


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
    columns: Mapping[str, Sequence[str]], chosen: np.ndarray, rows: np.ndarray, *, expected: str = "a number"
) -> tuple[np.ndarray, list[str]]:
    """(values float64 [len(chosen), columns], problems) of the chosen cells; a problem names row, column and cell."""
    values, problems = np.empty((len(chosen), len(columns))), []
    for j, (name, cells) in enumerate(columns.items()):
        values[:, j] = parse_numbers([cells[i] for i in chosen])
        good = np.isin(values[:, j], (0, 1)) if expected == "0 or 1" else np.isfinite(values[:, j])
        for i in np.flatnonzero(~good).tolist():
            found = "is missing" if np.isnan(values[i, j]) else f"is {cells[chosen[i]]!r}, expected {expected}"
            problems.append(f"row {rows[chosen[i]]}: {name} {found}")
    return values, problems


def encode(
    task: str, columns: Mapping[str, Sequence[str]], chosen: np.ndarray, rows: np.ndarray, where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """(labels of the chosen examples, class names) from columns of text [N].

    Classes are those of the whole column, in natural order, so that every split has the same. rows: int [N], the
    numbers of the rows in messages. Raises ValueError that lists the cells that do not fit the task.
    """
    if KINDS[task] == "classes":
        return _encode_classes(task, columns, chosen, rows, where)
    whole = task == "multilabel"
    values, problems = number_columns(columns, chosen, rows, expected="0 or 1" if whole else "a number")
    fix = "Fill in or remove these rows; a column of text is a class, not a target."
    if whole:
        fix = "A column of several values is a class: use the task 'classification' with that one column."
    _refuse(task, where, columns, problems, fix)
    return values.astype(np.int32 if whole else np.float32), tuple(columns)


def _encode_classes(task, columns, chosen, rows, where) -> tuple[np.ndarray, tuple[str, ...]]:
    if len(columns) != 1:
        raise ValueError(
            f"{where}: the task {task!r} takes one label column, found {len(columns)}: {', '.join(columns)}. Name one "
            "with data.labels, or use the task 'multilabel' or 'regression'"
        )
    ((name, cells),) = columns.items()
    problems = [f"row {rows[i]}: {name} is missing" for i in chosen.tolist() if not cells[i]]
    _refuse(task, where, columns, problems, "Fill in or remove these rows.")
    found = [cell for cell in dict.fromkeys(cells) if cell]
    values = parse_numbers(found)
    numeric = np.isfinite(values).all()
    if numeric and (fractions := [found[i] for i in np.flatnonzero(values % 1).tolist()]):
        raise ValueError(
            f"{where}: column {name!r} holds numbers with fractions, such as {', '.join(fractions[:3])}; expected "
            f"classes for the task {task!r}. Use the task 'regression', or another column"
        )
    class_names = [found[i] for i in np.argsort(values, kind="stable")] if numeric else sorted(found, key=natural_key)
    number = {class_name: i for i, class_name in enumerate(class_names)}
    return np.array([number[cells[i]] for i in chosen.tolist()], np.int32), tuple(class_names)


def _refuse(task: str, where: str, columns: Mapping, problems: list[str], fix: str) -> None:
    if problems:
        raise ValueError(
            f"{where}: {len(problems)} cells of {', '.join(columns)} do not fit the task {task!r}, expected "
            f"{EXPECTED[task]}:\n{listed(problems)}\n{fix}"
        )
