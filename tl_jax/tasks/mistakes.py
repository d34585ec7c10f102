"""What a network said of each example, how sure it was, and whether it was wrong: for galleries."""

from typing import NamedTuple

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.core.plotting import short
from tl_jax.tasks import binary
from tl_jax.tasks.predictions import Predictions


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
