"""The alarm of negative transfer: where an arm is worse than its baseline, overall and by class."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import files, messages
from tl_jax.tasks import Predictions
from tl_jax.tasks.intervals import resampled_mean

LISTED = 5  # classes in one sentence
LEAST = 6  # examples that differ, below which a sign test cannot be below 0.05


def losses(predictions: Predictions) -> np.ndarray:
    """What is wrong with each example [N]: 1 for a wrong class, the share of wrong labels, or the squared error."""
    values, labels = predictions.values, predictions.labels
    if answer := tasks.METRICS[predictions.spec.name].answer:
        return (answer(predictions) != labels).astype(np.float64)
    if predictions.spec.name == "multilabel":
        return ((values >= 0) != labels).mean(1)
    return ((values.astype(np.float64) - labels) ** 2).mean(1)


def negative_transfer(pairs: Iterable[tuple[Predictions, Predictions]], resamples: int = 1000) -> dict[str, Any]:
    """How much more an arm is wrong than its baseline, of pairs (arm, baseline) with the same examples, one a seed.

    Returns {"value", "low", "high", "alarm", "classes": {name: the same}}: the mean over examples of the difference of
    their losses, averaged over seeds, with its paired 95 % interval by the bootstrap over examples, each interval by
    itself. alarm: whether the interval is above 0. A class is listed where it raises one.
    """
    sums: dict[str, list[float]] = {}
    classes: dict[str, int] = {}
    for arm, base in pairs:
        place = {i: row for row, i in enumerate(base.ids.tolist())}
        worse = losses(arm) - losses(base)[[place[i] for i in arm.ids.tolist()]]
        for i, value in zip(arm.ids.tolist(), worse.tolist(), strict=True):
            sums.setdefault(i, []).append(value)
        if tasks.METRICS[arm.spec.name].answer:
            classes |= dict(zip(arm.ids.tolist(), arm.labels.tolist(), strict=True))
        names = arm.spec.class_names
    worse = np.array([np.mean(values) for values in sums.values()])
    found = _judged(worse, resamples)
    label, rows = np.array([classes.get(i, -1) for i in sums]), {}
    for c in np.unique(label[label >= 0]).tolist():
        if (row := _judged(worse[label == c], resamples))["alarm"]:
            rows[names[c]] = row
    return {**found, "classes": rows}


def _judged(worse: np.ndarray, resamples: int) -> dict[str, Any]:
    row = resampled_mean(worse, resamples=resamples)
    return {**row, "alarm": bool(row["low"] > 0 and np.count_nonzero(worse) >= LEAST)}


def transfers(arm: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether an arm transfers what its baseline does not, by their flat options: an unlabelled domain, further terms,
    weights, or more than a probe of them.
    """
    a, b = ({**options.INITIAL, **table} for table in (arm, base))
    bare = [any(not s.get("labelled") for s in x["streams"].values()) or not x["data.labelled"] for x in (a, b)]
    probe = [x["method.name"] in (*options.PROBES, "linear_probe") for x in (a, b)]
    more = [bool(a[name]) and not b[name] for name in ("terms", "model.weights")]
    return bare > bare[::-1] or probe < probe[::-1] or any(more)


def of_folders(
    pairs: Sequence[tuple[pathlib.Path, pathlib.Path]], resamples: int = 1000
) -> dict[str, dict[str, Any] | None]:
    """{file of predictions: `negative_transfer`} of pairs of folders of finished runs (arm, baseline).

    {} where the arms transfer nothing that the baselines do not; None for sets of which a pair has other examples.
    """
    if not pairs or not transfers(*(files.read_json(folder / "config.json") for folder in pairs[0])):
        return {}
    shared = [{path.name for path in folder.glob("predictions*.npz")} for pair in pairs for folder in pair]
    load = tasks.load_predictions
    made = {name: [(load(a / name), load(b / name)) for a, b in pairs] for name in sorted(set.intersection(*shared))}
    return {name: negative_transfer(each, resamples) if all(map(_same, each)) else None for name, each in made.items()}


def _same(pair: tuple[Predictions, Predictions]) -> bool:
    """Whether both are of the same examples, with the same labels."""
    ordered = [each.labels[np.argsort(each.ids)] for each in pair]
    ids = [sorted(each.ids.tolist()) for each in pair]
    return ids[0] == ids[1] and pair[0].spec.class_names == pair[1].spec.class_names and np.array_equal(*ordered)


def sentences(arm: str, base: str, found: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """One line for each set of `of_folders` with an alarm, and for what cannot be compared."""
    lines = []
    for file, row in found.items():
        where = file.removeprefix("predictions").removesuffix(".npz").removeprefix("-") or "the scored split"
        if row is None:
            why = "as one arm seals its labels and the other does not: let both have the same data.candidates"
            lines.append(f"{arm} cannot be compared with {base} on {where}: the examples differ, perhaps {why}")
            continue
        told = [f"error {_span(row)}"] if row["alarm"] else []
        if classes := [f"{name} {_span(each)}" for name, each in row["classes"].items()]:
            told.append(f"in class {', '.join(messages.shorten(classes, LISTED))}")
        if told:
            lines.append(f"NEGATIVE TRANSFER: {arm} is worse than {base} on {where}: {'; '.join(told)}")
    return lines


def _span(row: Mapping[str, Any]) -> str:
    return f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
