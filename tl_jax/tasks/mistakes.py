"""What a network said of each example, how sure it was, and whether it was wrong: for galleries and tables."""

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.core.plotting import short
from tl_jax.tasks import binary
from tl_jax.tasks.predictions import Predictions

LONGEST = 1000  # characters of a text in a table
BREAKING = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories of characters that would break a line, or are none


class Said(NamedTuple):
    """The answer that each example is shown by, arrays [N].

    column: of the outputs: the class, the label or the target. sign: -1 where the answer is that it is not this one.
    size: the probability of the answer; of a regression the absolute error, in standard deviations of the target.
    wrong: whether it is; all of a regression are. Without labels nothing is wrong.
    """

    column: np.ndarray
    sign: np.ndarray
    size: np.ndarray
    wrong: np.ndarray


def said(predictions: Predictions) -> Said:
    """Of a multilabel task the worst label of an example: the most probable mistake, else the surest label it has."""
    values, labels, kind = predictions.values.astype(np.float64), predictions.labels, predictions.spec.name
    every, count = np.arange(len(values)), len(values)
    if kind == "regression":
        if labels is None:
            return Said(np.zeros(count, int), np.ones(count), np.zeros(count), np.zeros(count, bool))
        error = np.abs(values - labels) / np.array(predictions.spec.target_std)
        column = error.argmax(axis=1)
        return Said(column, np.ones(count), error[every, column], np.ones(count, bool))
    if kind == "classification":
        p, column = scipy.special.softmax(values, axis=1), values.argmax(axis=1)
        wrong = np.zeros(count, bool) if labels is None else column != labels
        return Said(column, np.ones(count), p[every, column], wrong)
    p = scipy.special.expit(values if kind == "multilabel" else values[:, None])
    yes = p >= (0.5 if kind == "multilabel" else binary.threshold_of(predictions.spec))
    sure = np.where(yes, p, 1 - p)
    there = np.zeros_like(yes) if labels is None else (labels.reshape(yes.shape) == 1) != yes
    column = np.where(there.any(axis=1), np.where(there, sure, -1).argmax(axis=1), p.argmax(axis=1))
    sign = np.where(yes[every, column], 1.0, -1.0)
    return Said(column, sign, sure[every, column], there[every, column])


def worst(found: Said, count: int) -> list[int]:
    """The surest mistakes, the surest first; of a regression the largest errors."""
    order = np.argsort(-found.size, kind="stable")
    return order[found.wrong[order]][:count].tolist()


def in_words(predictions: Predictions, found: Said, i: int) -> list[str]:
    """Lines of what is true of an example, where that is known, and of what was said."""
    spec, labels, k = predictions.spec, predictions.labels, int(found.column[i])
    names = spec.class_names
    if spec.name == "regression":
        of = f"{short(names[k], 12)} " if len(names) > 1 else ""
        lines = [] if labels is None else [f"{of}true {labels[i, k]:.4g}"]
        return [*lines, f"predicted {predictions.values[i, k]:.4g}"]
    size = f"p {found.size[i]:.3f}"
    if spec.name == "multilabel":
        answer, other = ("yes", "no") if found.sign[i] > 0 else ("no", "yes")
        truth = [] if labels is None else [f"{short(names[k], 18)}: {other if found.wrong[i] else answer}"]
        return [*truth, f"said {answer if truth else f'{short(names[k], 14)}: {answer}'}, {size}"]
    answer = k if spec.name == "classification" else int(found.sign[i] > 0)
    truth = [] if labels is None else [f"true {short(names[labels[i]], 20)}"]
    return [*truth, f"said {short(names[answer], 13)}, {size}"]


def to_tsv(predictions: Predictions, found: Said, chosen: Sequence[int], texts: Sequence[tuple[str, ...]]) -> str:
    """A table of chosen mistakes: id, text or text1 and text2, label, answer, and how sure it was.

    texts: one or two of each chosen example. The last column is the probability of the answer, of a regression the
    error in standard deviations of the target.
    """
    names = ["text"] if len(texts[0]) == 1 else [f"text{i + 1}" for i in range(len(texts[0]))]
    size = "deviations" if predictions.spec.name == "regression" else "probability"
    rows = [["id", *names, "label", "answer", size]]
    for i, row in zip(chosen, texts, strict=True):
        said = [*_label_and_answer(predictions, found, i), f"{found.size[i]:.3f}"]
        rows.append([in_line(str(predictions.ids[i])), *map(in_line, row), *map(in_line, said)])
    return "".join("\t".join(row) + "\n" for row in rows)


def in_line(text: str) -> str:
    """A text as one cell: its first LONGEST characters, with escapes for tabs, ends of lines and control characters."""
    kept = text[:LONGEST]
    cut = f"\N{HORIZONTAL ELLIPSIS} ({LONGEST:,} of {len(text):,} characters)" if len(text) > LONGEST else ""
    shown = (c.encode("unicode_escape").decode() if unicodedata.category(c) in BREAKING else c for c in kept)
    return "".join(shown) + cut


def _label_and_answer(predictions: Predictions, found: Said, i: int) -> tuple[str, str]:
    """What is true of a mistake and what was said, of several labels or targets with the name of the one meant."""
    spec, k = predictions.spec, int(found.column[i])
    names, labels = spec.class_names, predictions.labels
    if spec.name == "regression":
        pair = f"{labels[i, k]:.4g}", f"{predictions.values[i, k]:.4g}"
    elif spec.name == "multilabel":
        pair = ("no", "yes") if found.sign[i] > 0 else ("yes", "no")
    else:
        return names[labels[i]], names[k if spec.name == "classification" else int(found.sign[i] > 0)]
    return tuple(f"{names[k]}: {each}" if len(names) > 1 else each for each in pair)
