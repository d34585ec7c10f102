"""What a task is: what the outputs mean (Spec), how they are trained (Task) and how they are scored (Metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core.card import Card
from tl_jax.core.options import LANGUAGE

Monitor = tuple[tuple[str, str], ...]


class Spec(NamedTuple):
    """What the outputs of a network mean; it stands on the card and in predictions.npz."""

    name: str = "classification"  # one of `tl_jax.tasks.METRICS`
    class_names: tuple[str, ...] = ()  # of the classes (binary: negative, positive), labels or targets
    target_mean: tuple[float, ...] = ()  # of each target, in its unit; a network predicts the standardised target
    target_std: tuple[float, ...] = ()
    threshold: float | None = None  # probability from which a binary prediction is positive; None: 0.5


class Rows(NamedTuple):
    """The table "per_NOUN" of a summary, a row for each class, label or target."""

    noun: str
    metrics: tuple[str, ...]  # the columns, among `Metrics.parts`; NAME_each is shown as NAME
    support: Callable | None = None  # Predictions -> examples of each row [rows]


def unchanged(predictions: Any) -> Spec:
    """The calibration of a task that has nothing to calibrate."""
    return predictions.spec


class Metrics(NamedTuple):
    """How predictions of a task are scored, in numpy. None: the task has no such.

    parts: functions (Predictions, weights [N, B]) -> {name: [B] or [B, rows]}, NaN where undefined; the weights say how
    often each of B resamples holds an example.
    """

    scalars: tuple[str, ...]  # the metrics of one number, in the order of a summary
    less: tuple[str, ...]  # those of which less is better
    monitor: Monitor  # (name of a score, "max" | "min"): the first selects, the others break ties
    scores: Callable  # Predictions -> {"loss", monitored metric}, float64, for every evaluation on val
    parts: tuple[Callable, ...]
    differ: Callable  # two Predictions of the same examples -> whether their answers differ, bool [N]
    loss_label: str = "loss (nats)"
    rows: Rows | None = None
    answer: Callable | None = None  # Predictions -> the predicted class [N]
    reliability: tuple[Callable, tuple[str, str]] | None = None  # see `intervals.binned`; names of the two shares
    calibrate: Callable = unchanged  # Predictions on val -> Spec


class Task(NamedTuple):
    """What a head predicts, and how it is trained and scored (scores, monitor, calibrate: see `Metrics`)."""

    spec: Spec
    outputs: int  # size of the head
    encode: Callable  # labels -> what the loss takes, float32; batches are mixed after it
    loss: Callable  # (outputs of the network, encoded) -> [B] float32, whose plain mean over the examples is minimised
    running: Callable  # (outputs, labels) -> {name: [B]}, the training log
    keep: Callable  # outputs -> {name: [B, ...] float32}, what predictions hold; of LANGUAGE with the field LABEL
    count: Callable  # labels -> [B], the weight of an example in means
    scores: Callable
    monitor: Monitor
    calibrate: Callable


def refuse_language(task: str, what: Any) -> None:
    """Raises ValueError where `what` is of a task of language modelling, and answers for whole texts are asked for."""
    if task in LANGUAGE:
        uses = "model.weights begins another run with it, tl_jax.features reads texts, tl_jax.generate goes on with one"
        raise ValueError(f"{what} is of the task {task!r}, which tells tokens and has no answer for a text; {uses}")


def spec_of(card: Card) -> Spec:
    return Spec(card.task, card.class_names, card.target_mean, card.target_std, card.threshold)


def card_fields(spec: Spec) -> dict[str, Any]:
    """The fields of a card that hold a spec, for `Card.replace`."""
    return dict(zip(("task", *Spec._fields[1:]), spec, strict=True))


def spec_problems(spec: Spec) -> list[str]:
    """What is wrong with a spec of a known task."""
    names, problems = len(spec.class_names), []
    least = 0 if spec.name in LANGUAGE else 2 if spec.name in ("classification", "binary") else 1
    if names < least or (spec.name == "binary" and names != 2):
        expected = "2: the negative and the positive class" if spec.name == "binary" else f"{least} or more"
        problems.append(f"{names} class names for a {spec.name} task, expected {expected}")
    if spec.name == "regression":
        mean, std = np.asarray(spec.target_mean, float), np.asarray(spec.target_std, float)
        if not mean.shape == std.shape == (names,) or not np.isfinite([mean, std]).all() or (std <= 0).any():
            found = f"target_mean={spec.target_mean}, target_std={spec.target_std}"
            problems.append(f"{found}: expected a finite mean and a deviation above 0 for each of {names} targets")
    if spec.threshold is not None and not 0 < spec.threshold < 1:
        problems.append(f"threshold={spec.threshold}: expected a probability between 0 and 1")
    return problems


def preference(monitor: Monitor, scores: dict[str, float | None]) -> tuple[float, ...]:
    """A sort key of scores: the larger, the better; an undefined score (None, NaN) is the worst."""
    values = [(scores[name], 1 if side == "max" else -1) for name, side in monitor]
    return tuple(-np.inf if value is None or np.isnan(value) else sign * value for value, sign in values)
