"""Calibration of a finished run on its own data: RUN/trust.npz, and what it is worth on examples it has not seen."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.api import model as models
from tl_jax.core import checks, files
from tl_jax.data import sources
from tl_jax.data.examples import Source
from tl_jax.methods.term import MAIN
from tl_jax.tasks import Predictions, intervals, outliers, trust
from tl_jax.training import inputs
from tl_jax.training.settings import read

FOLDS = 5  # of the split, where there is no test
READ = 10_000  # examples of train at most, as the reference of the out-of-distribution score
Pairs = Sequence[tuple[trust.Trust, Predictions]]


class Report(dict):
    """What `calibrate` found, as plain JSON data; shown as a table of at most 80 columns."""

    def __repr__(self) -> str:
        return "\n".join(format_report(self))


def calibrate(
    run: Any, *, split: str = "val", coverage: float = 0.9, sets: str = "lac", ood: str = "mahalanobis",
    keep: float = 0.95, abstain: Sequence[str] = trust.REASONS, batch_size: int = 128,
) -> Report:  # fmt: skip
    """Fits `tasks.trust.fit` on a split of a finished Run, predicted by its network, and writes RUN/trust.npz.

    split: val, test or the name of a set of data.extra_eval. The report is measured on test; where there is no other
    test, on the split itself in FOLDS folds, each judged by what the others fit. Raises ValueError for arguments that
    do not fit, a split that is not there, is sealed or was trained on, and a run without weights, as of knn.
    """
    tasks.refuse_language(run.options["task"], run.folder)
    choice = {"coverage": coverage, "sets": sets, "ood": ood, "keep": keep, "abstain": abstain}
    data = splits_of(run)
    names = [name for name, source in data.items() if name not in (MAIN, inputs.SPLITS[0]) and not source.sealed]
    if split not in names:
        raise ValueError(f"--split {split}: expected a labelled split that is not trained on: {', '.join(names)}")
    if shared := sources.overlap(data[MAIN], data[split]):
        raise ValueError(f"--split {split}: {len(shared)} of its examples are in train too, such as {shared[0]}")
    trust.check(run.model.spec, len(data[split]), **choice)
    fitted, val = _fit(run, data, split, choice, batch_size)
    fitted = fitted._replace(network=run.weights_sha256)
    trust.save(run.folder / trust.FILE, fitted)
    if split != "test" and "test" in names:
        where, pairs = "test", [(fitted, models.score(run, data["test"], batch_size=batch_size))]
    else:
        where, pairs = f"{split}, in {FOLDS} folds", _folds(fitted, val)
    measured = {"on": where, **measure(pairs)} if pairs else None
    return Report(
        file=str(run.folder / trust.FILE), split=split, count=fitted.count, task=fitted.task, coverage=coverage,
        sets=sets, ood=ood, keep=keep, temperature=fitted.temperature,
        threshold=None if ood == "none" else fitted.threshold,
        curve=fitted.curve.tolist(), measured=measured, notes=_notes(run, split, val, fitted, measured),
    )  # fmt: skip


def splits_of(run: Any) -> dict[str, Source]:
    """The data that a run was trained, chosen and scored by: {MAIN, "val", ...: source}; ValueError for other data."""
    card, settings = run.model.card, read(options.read(run.folder / "config.json"))
    data = inputs.load_sources(settings, card.form if "image" in card.cards else None)
    known = [MAIN, *inputs.SPLITS[1:], *(name for name, *_ in settings.data.extra_eval)]
    found = {name: data[name] for name in known if name in data}
    facts = files.read_json(run.folder / "audit.json")["phases"][0]["data"]
    other = [
        f"{name}: {len(source):,} examples of {source.name}, the run had {facts[name]['examples']:,}"
        for name, source in found.items()
        if source.fingerprint != facts[name]["fingerprint"]
    ]
    checks.refuse("the data is not what the run was trained and scored on; restore it, or train again", other)
    return found


def refit(run: Any, network: Any) -> trust.Trust:
    """What `calibrate` has left of the run, on the same data, of a network whose outputs are a little different."""
    old, data = run.trust, splits_of(run)
    if old.split not in data:
        raise ValueError(f"{run.folder / trust.FILE} does not say which examples it was fitted on; calibrate again")
    choice = {name: getattr(old, name) for name in ("coverage", "sets", "keep", "abstain")}
    return _fit(network, data, old.split, {**choice, "ood": old.reference.name}, 128)[0]


def _fit(
    network: Any, data: dict[str, Source], split: str, choice: dict[str, Any], batch_size: int
) -> tuple[trust.Trust, Predictions]:
    """The fitted Trust, and the predictions of the split that it was fitted on."""
    needed = choice["ood"] in ("mahalanobis", "knn")
    train = models.score(network, _reduced(data[MAIN]), batch_size=batch_size) if needed else None
    val = models.score(network, data[split], batch_size=batch_size)
    return trust.fit(val, train, **choice)._replace(split=split), val


def _reduced(source: Source) -> Source:
    """Each example once, as a bootstrap repeats some, and READ of them at most."""
    _, first = np.unique(source.ids, return_index=True)
    return source.select(np.sort(np.random.default_rng(0).permutation(first)[:READ]))


def _folds(fitted: trust.Trust, val: Predictions) -> Pairs:
    """Each fold of val with what the other folds fit; groups stay whole. None where these would be too few."""
    member = np.arange(len(val.values)) if val.groups is None else np.unique(val.groups, return_inverse=True)[1]
    fold = np.random.default_rng(0).permutation(member.max() + 1)[member] % FOLDS
    levels = (fitted.coverage, fitted.keep)[: 1 if fitted.reference.name == "none" else 2]
    scores, pairs = outliers.score(fitted.reference, val.values, val.features), []
    for k in range(FOLDS):
        ours, others = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        if not len(ours) or len(others) < max(map(trust.least_for, levels)):
            return []
        pairs.append((trust.fit_on(fitted, val.select(others), scores[others]), val.select(ours)))
    return pairs


def measure(pairs: Pairs) -> dict[str, Any]:
    """What each Trust is worth on predictions that it was not fitted on, over all of them together.

    nll and ece: [of the network as it is, at the temperature]. coverage, size: of the sets, or of the intervals by
    target, whose size is the width. alone, ood, abstain: shares of the examples. accuracy: [of all, of those that are
    answered].
    """
    spec, verdicts = pairs[0][1].spec, []
    for fitted, p in pairs:
        verdicts.append(trust.consider(fitted, p.values, outliers.score(fitted.reference, p.values, p.features), spec))
    p = Predictions(
        {name: np.concatenate([each.outputs[name] for _, each in pairs]) for name in pairs[0][1].outputs},
        *(np.concatenate([getattr(each, name) for _, each in pairs]) for name in ("labels", "ids")), spec,
    )  # fmt: skip
    member, abstain = (np.concatenate([getattr(each, name) for each in verdicts]) for name in ("member", "abstain"))
    found = {"count": len(p.values), "ood": float(np.concatenate([each.ood for each in verdicts]).mean())}
    found |= {"abstain": float(abstain.mean())}
    if spec.name == "regression":
        held, width = (member[..., 0] <= p.labels) & (p.labels <= member[..., 1]), member[..., 1] - member[..., 0]
        by = {"coverage": held.mean(axis=0), "size": width.mean(axis=0)}
        return found | {name: dict(zip(spec.class_names, x.tolist(), strict=True)) for name, x in by.items()}
    scale = np.concatenate([np.full(len(each.values), fitted.temperature) for fitted, each in pairs])
    cooled = {name: (x.T / scale).T for name, x in p.outputs.items()}
    right, both = trust.correct(p), [calibration_errors(each) for each in (p, p._replace(outputs=cooled))]
    answered = float(right[~abstain].mean()) if not abstain.all() else None
    return found | {
        "nll": [each[0] for each in both], "ece": [each[1] for each in both],
        "coverage": float((member | ~trust.truth_of(p)).all(axis=1).mean()), "size": float(member.sum(axis=1).mean()),
        "alone": float(np.concatenate([each.alone for each in verdicts]).mean()),
        "accuracy": [float(right.mean()), answered],
    }  # fmt: skip


def calibration_errors(p: Predictions) -> tuple[float, float]:
    """nll and ece as in docs/metrics.md; of a multilabel task over all labels of all examples."""
    found, truth = trust.probabilities(p.values, p.spec.name), trust.truth_of(p)
    if p.spec.name == "classification":
        observed, expected = truth[np.arange(len(found)), found.argmax(axis=1)], found.max(axis=1)
    else:
        columns = slice(1, None) if p.spec.name == "binary" else slice(None)
        observed, expected = truth[:, columns].ravel(), found[:, columns].ravel()
    ece = intervals.calibration_error(observed.astype(float), expected, np.ones((len(expected), 1)))
    return tasks.scores(p)["loss"], float(ece[0])


def _notes(run: Any, split: str, val: Predictions, fitted: trust.Trust, measured: dict[str, Any] | None) -> list[str]:
    """What weakens the promise, a sentence each."""
    flat, notes, counts = run.options, [], None
    chosen = {
        f"the checkpoint (select={flat['select']})": flat["select"] != "last",
        f"when training stopped (patience={flat['patience']})": flat["patience"] > 0,
        "the probe (method.grid)": len(run.result.get("tried", ())) > 1,
    }
    if split == "val" and any(chosen.values()):
        notes.append(
            f"val chose {' and '.join(text for text, so in chosen.items() if so)}: its examples are not exchangeable "
            "with new ones, and coverage may be below the stated one; --split with a set that chose nothing restores it"
        )
    if fitted.task != "regression":
        counts = trust.truth_of(val).sum(axis=0)
    if counts is not None and not counts.all():
        absent = [val.spec.class_names[k] for k in np.flatnonzero(counts == 0)]
        shown = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
        notes.append(f"{split} has no example of {len(absent)} classes or labels: nothing is known of {shown}")
    if val.groups is not None:
        notes.append(
            f"{split} has {len(np.unique(val.groups))} groups (data.group): coverage holds over the examples of new "
            "groups on average, and varies as that of so few examples would"
        )
    if fitted.task != "regression" and fitted.temperature == 1:
        notes.append(f"the temperature stays 1: {split} has no mistake, or its labels do not follow the outputs")
    if len(fitted.curve) and fitted.curve[0, 1] >= fitted.coverage and fitted.sets == "lac":
        notes.append(
            f"on {split} the answer is right in {fitted.curve[0, 1]:.1%}: sets tell more for a --coverage above that"
        )
    return [*notes, *_shifted(split, fitted, measured)]


def _shifted(split: str, fitted: trust.Trust, measured: dict[str, Any] | None) -> list[str]:
    """Whether the sets hold the truth less often than chance lets them, by three standard deviations."""
    if measured is None:
        return []
    seen = measured["coverage"]
    low, level = min(seen.values()) if isinstance(seen, dict) else seen, fitted.coverage
    spread = math.sqrt(level * (1 - level) * (1 / fitted.count + 1 / measured["count"]))
    where = measured["on"]
    return [f"{where} is not like {split}, so that the coverage does not hold there"] * (low < level - 3 * spread)


def format_report(report: dict[str, Any]) -> list[str]:
    """Lines of at most 80 columns."""
    found, rows, asked = report["measured"], {}, f"asked {report['coverage']:.1%}"
    lines = [f"fitted on {report['split']}, {report['count']:,} examples"]
    if found is None:
        lines.append("too few examples to measure what it is worth: give the run a test split")
    elif report["task"] == "regression":
        widths = found["size"].items()
        rows = {x: f"holds the truth in {found['coverage'][x]:.1%}, {asked}; width {width:.4g}" for x, width in widths}
    else:
        noun = "labels" if report["task"] == "multilabel" else "classes"
        before, after = zip(found["nll"], found["ece"], strict=True)
        rows = {
            f"temperature {report['temperature']:.4g}": "nll {:.4f}, calibration error {:.4f}".format(*after),
            "  as it is": "nll {:.4f}, calibration error {:.4f}".format(*before),
            f"sets ({report['sets']})": f"hold the truth in {found['coverage']:.1%}, {asked}",
            "": f"{found['size']:.2f} {noun} on average; the answer alone in {found['alone']:.1%}",
        }
    if found:
        lines.append(f"measured on {found['on']}, {found['count']:,} examples:")
        if report["ood"] != "none":
            above = f"({report['ood']} above {report['threshold']:.4g})"
            rows["out of distribution"] = f"{found['ood']:.1%}, {1 - report['keep']:.1%} expected {above}"
        rows["abstains"] = f"{found['abstain']:.1%}"
        if "accuracy" in found:
            every, rest = (100 * x if x is not None else "-" for x in found["accuracy"])
            rest = rest if rest == "-" else f"{rest:.1f}%"
            rows["abstains"] += f"; accuracy of the others {rest}, of all {every:.1f}%"
    lines += [f"  {name:.20}{'':{20 - len(name[:20])}}  {text}" for name, text in rows.items()]
    if report["curve"]:
        lines.append(f"if only the most confident were answered, on {report['split']}:")
        for name, column, form in (("share", 0, ".0%"), ("accuracy", 1, ".1%")):
            lines.append(f"  {name:20}  " + "".join(f"{row[column]:<9{form}}" for row in report["curve"]).rstrip())
    for note in report["notes"]:
        lines += textwrap.wrap(f"note: {note}", 80, subsequent_indent="  ")
    return [*lines, f"wrote {report['file']}"]
