"""The selection panel: what each selector's choice is worth, with target labels that are opened after all choices."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core import files
from tl_jax.methods.selectors import SELECTORS, weighted_spearman
from tl_jax.methods.term import MAIN
from tl_jax.tasks import Predictions
from tl_jax.tasks.intervals import resampled_mean
from tl_jax.training import candidates
from tl_jax.training.build import Run

K = 3  # labels per class of the row that has some
LAST, RANDOM, FEW = "last", "random candidate", f"{K} labels per class"
LEFT_OUT = "leave-one-domain-out"  # the score of a run that others were trained for, each without a source domain
READS = {**{name: selector.reads for name, selector in SELECTORS.items()}, LEFT_OUT: "source"}
LAST_ORACLE, ORACLE = "oracle at the last step", "oracle: upper bound, never a result"


class Unit(NamedTuple):
    """The M candidates of one seed or fold.

    options [M], steps [M]: what a candidate is. scores: {selector: [M]}. hits: bool [M, N], which examples of the
    target's test it answers rightly. few, held_out [M]: its accuracy on K labels per class of the split that candidates
    are judged on, and on all of that split.
    """

    options: Sequence[str]
    steps: Sequence[int]
    scores: Mapping[str, Sequence[float]]
    hits: np.ndarray
    few: Sequence[float]
    held_out: Sequence[float]

    def last(self) -> np.ndarray:
        """Which candidates are the last of their options [M]."""
        ends = {option: max(s for o, s in zip(self.options, self.steps, strict=True) if o == option)
                for option in self.options}  # fmt: skip
        return np.array([ends[o] == s for o, s in zip(self.options, self.steps, strict=True)])


def panel(
    units: Sequence[Unit], groups: np.ndarray | None = None, *, resamples: int = 1000, several: bool = False
) -> list[dict[str, Any]]:
    """One row a selector, then the fixed rows, as plain JSON data; all units have the same N examples.

    A row: selector, reads (whose labels), chosen ({"options", "step"} of each unit), accuracy (mean over units),
    difference (to the row "last", {"value", "low", "high"} by the bootstrap over examples, or over their groups),
    regret (to the oracle), spearman (`weighted_spearman` of scores and accuracies, mean over units). "last" is the mean
    over all options of their last step; a random candidate the mean over all. several: domains to train on, which adds
    a rule of DomainBed's (Gulrajani and Lopez-Paz 2021).
    """
    last = [unit.last() / unit.last().sum() for unit in units]
    truth = [unit.hits.mean(1) for unit in units]
    own = [name for name in READS if all(name in unit.scores for unit in units)]
    table = {name: (READS[name], [unit.scores[name] for unit in units]) for name in own}
    table[FEW] = "target", [unit.few for unit in units]
    if several:
        at_end = [np.where(unit.last(), unit.held_out, -1.0) for unit in units]
        table[LAST_ORACLE] = "target", at_end
    table[ORACLE] = "its test", truth
    picks = {name: [np.eye(len(s))[int(np.argmax(s))] for s in scores] for name, (_, scores) in table.items()}
    fixed = {LAST: last, RANDOM: [np.full(len(unit.steps), 1 / len(unit.steps)) for unit in units]}
    best, rows = np.mean([t.max() for t in truth]), []
    for name in [*own, *fixed, *(name for name in picks if name not in own)]:
        weights = picks.get(name) or fixed[name]
        accuracy = float(np.mean([w @ t for w, t in zip(weights, truth, strict=True)]))
        gained = np.mean([(w - end) @ unit.hits for w, end, unit in zip(weights, last, units, strict=True)], axis=0)
        chosen = [_named(unit, w) for unit, w in zip(units, weights, strict=True)]
        orders = (
            [weighted_spearman(s, t) for s, t in zip(table[name][1], truth, strict=True)] if name in SELECTORS else []
        )
        known = [order for order in orders if order is not None]
        rows.append({
            "selector": name, "reads": table[name][0] if name in table else "none", "chosen": chosen,
            "accuracy": accuracy, "difference": resampled_mean(gained, resamples=resamples, groups=groups),
            "regret": float(best - accuracy), "spearman": float(np.mean(known)) if known else None,
        })  # fmt: skip
    return rows


def _named(unit: Unit, weights: np.ndarray) -> dict[str, Any]:
    """The candidate that has all of the weight; {} of a mean over several."""
    m = int(weights.argmax())
    return {"options": unit.options[m], "step": int(unit.steps[m])} if weights[m] == 1 else {}


def few_per_class(labels: np.ndarray, seed: int, k: int = K) -> np.ndarray:
    """Up to k examples of each class, sampled by the seed."""
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    return np.concatenate([np.random.default_rng([seed, c]).permutation(m)[:k] for c, m in enumerate(members)])


def of_run(run: Run, folder: pathlib.Path, predictions: Mapping[str, Predictions], step: int) -> dict[str, Any]:
    """{"selection": the panel of a run's candidates}, or {} where it has none, or nothing sealed is scored.

    predictions: of what is scored, with labels. The labels of the split that candidates are judged on are opened here.
    """
    test, data = candidates.tested(run), run.material.data
    if not candidates.names(run) or not test:
        return {}
    judged, choices = candidates.names(run)[0], files.read_json(folder / candidates.CHOICES)
    held_out = run.material.ledger.open(judged, data[judged], f"the panel: {FEW}, oracles", "selection", step)
    few, steps = few_per_class(held_out, run.settings.loop.seed), choices["steps"]
    hits, right = [], []
    for each in steps:
        arrays = candidates.read(candidates.path_of(folder, each))
        hits.append(arrays["test_logits"].argmax(1) == predictions[test].labels)
        right.append(arrays["target_logits"].argmax(1) == held_out)
    right, several = np.array(right), data[MAIN].num_domains > 1
    unit = Unit(
        [""] * len(steps), steps, {name: row["scores"] for name, row in choices["choices"].items()}, np.array(hits),
        right[:, few].mean(1).tolist(), right.mean(1).tolist(),
    )  # fmt: skip
    rows = panel([unit], predictions[test].groups, resamples=run.settings.loop.resamples, several=several)
    facts = {"test": test, "judged_on": judged, "several": several, "steps": steps}
    return {"selection": {**facts, "few": unit.few, "held_out": unit.held_out, "rows": rows}}
