"""Numbers from saved predictions: point estimates by scikit-learn, intervals by one bootstrap shared by all metrics.

`python -m tl_jax.tasks.metrics W/predictions.npz` recomputes all numbers of a run without the run; docs/metrics.md has
the definitions.
"""

import argparse
import json
import sys
import zipfile
from typing import NamedTuple

import numpy as np
import rich.box
import rich.console
import rich.markup
import rich.table
import scipy  # loads its parts when they are used

from tl_jax.core import files

ECE_BINS = 15
CHUNK = 2**22  # weights held at a time: 16 MiB in float32


class Predictions(NamedTuple):
    """One model's outputs on one split, every example once."""

    logits: np.ndarray  # float32 [N, K]
    labels: np.ndarray  # int32 [N]
    ids: np.ndarray  # str [N]
    class_names: tuple[str, ...]  # K
    features: np.ndarray | None = None  # float32 [N, D]


def make_predictions(logits, labels, ids, class_names, features=None) -> Predictions:
    """Checks and types the arrays; raises one ValueError that lists everything wrong with them."""
    logits, labels, ids = np.asarray(logits, np.float32), np.asarray(labels), np.asarray(ids, str)
    features = None if features is None else np.asarray(features, np.float32)
    class_names = tuple(map(str, class_names))
    if logits.ndim != 2 or logits.shape[0] == 0 or logits.shape[1] < 2:
        raise ValueError(f"logits have shape {logits.shape}, expected [N >= 1, K >= 2]")
    count, classes = logits.shape
    wrong = []
    if not np.isfinite(logits).all():
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        wrong.append(f"{len(bad)} rows of logits are not finite, first {bad[:5].tolist()}; did the training diverge?")
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        wrong.append(f"labels are {labels.dtype} {labels.shape}, expected integers [{count}]")
    elif labels.min() < 0 or labels.max() >= classes:
        wrong.append(f"labels span {labels.min()}..{labels.max()}, expected 0..{classes - 1} for {classes} logits")
    if ids.shape != (count,) or len(np.unique(ids)) != count:
        wrong.append(f"{len(np.unique(ids))} different ids of shape {ids.shape}, expected {count}: each example once")
    if len(class_names) != classes:
        wrong.append(f"{len(class_names)} class names, expected {classes}")
    if features is not None and (features.ndim != 2 or len(features) != count):
        wrong.append(f"features have shape {features.shape}, expected [{count}, D]")
    if wrong:
        raise ValueError(f"predictions are inconsistent: {'; '.join(wrong)}")
    return Predictions(logits, labels.astype(np.int32), ids, class_names, features)


def save_predictions(path, logits, labels, ids, class_names, features=None) -> None:
    """Writes a checked predictions.npz atomically; see `make_predictions` for the arrays and errors."""
    predictions = make_predictions(logits, labels, ids, class_names, features)
    arrays = {name: np.asarray(value) for name, value in predictions._asdict().items() if value is not None}
    with files.atomic_write(path) as file:
        np.savez(file, **arrays)


def load_predictions(path) -> Predictions:
    """Reads and checks a predictions.npz; FileNotFoundError or ValueError name the file and what is wrong."""
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("not an .npz file, or cut short")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                if wrong := sorted(set(arrays.files).symmetric_difference(Predictions._fields) - {"features"}):
                    raise ValueError(
                        f"holds {arrays.files}, expected {Predictions._fields}; missing or unknown: {wrong}"
                    )
                return make_predictions(**arrays)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no sound predictions.npz ({error})") from None


def summarize(predictions: Predictions, *, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> dict:
    """Every metric with its interval, as plain JSON-able data (undefined numbers are None).

    Intervals are percentiles of the bootstrap over examples (Efron 1979), with the same resamples for all metrics.
    Scalars: accuracy, top5 (K > 5), precision/recall/f1 _macro and _micro, roc_auc_macro, nll (nats), ece, each
    {"value", "low", "high"}; also count, per_class (a list of K rows) and confusion (rows: true, columns: predicted).
    """
    _check(resamples, level)
    value = _point(predictions)
    chunks = [
        {**_weighted(predictions, weights), **_weighted_auc(predictions, weights)}
        for weights in _resample(len(predictions.labels), resamples, seed)
    ]
    samples = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in value}
    scalars = {name: _interval(value[name], samples[name], level) for name in value if np.ndim(value[name]) == 0}
    support = np.bincount(predictions.labels, minlength=len(predictions.class_names))
    rows = [{"class": name, "support": int(n)} for name, n in zip(predictions.class_names, support, strict=True)]
    for name in ("precision", "recall", "f1", "roc_auc"):
        for k, row in enumerate(rows):
            row[name] = _interval(value[name][k], samples[name][:, k], level)
    return {
        "count": len(predictions.labels),
        **scalars,
        "per_class": rows,
        "confusion": confusion(predictions).tolist(),
        "level": level,
        "resamples": resamples,
        "seed": seed,
    }


def paired_difference(
    a: Predictions, b: Predictions, *, metric="accuracy", resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict:
    """A scalar metric of a minus that of b on the same examples (matched by id): {"value", "low", "high"}.

    Both models see the same resamples, so what makes an example hard for both cancels: the interval is narrower than
    two separate ones suggest. Raises ValueError for different examples, labels or classes, or an unknown metric.
    """
    _check(resamples, level)
    order = dict(zip(b.ids.tolist(), range(len(b.ids)), strict=True))
    if unmatched := sorted(set(order).symmetric_difference(a.ids.tolist())):
        raise ValueError(f"a paired comparison needs the same examples; {len(unmatched)} are in one: {unmatched[:5]}")
    order = [order[name] for name in a.ids.tolist()]
    if a.class_names != b.class_names or not np.array_equal(a.labels, b.labels[order]):
        raise ValueError("a paired comparison needs the same classes and labels; these two runs disagree about them")
    b = b._replace(logits=b.logits[order], labels=a.labels, ids=a.ids)
    measure = _weighted_auc if metric == "roc_auc_macro" else _weighted

    def difference(weights):
        of_a, of_b = measure(a, weights), measure(b, weights)
        if np.ndim(of_a.get(metric)) != 1:
            known = [name for name, value in of_a.items() if value.ndim == 1] + ["roc_auc_macro"]
            raise ValueError(f"unknown metric {metric!r}; known: {known}")
        return of_a[metric] - of_b[metric]

    samples = np.concatenate([difference(weights) for weights in _resample(len(order), resamples, seed)])
    return _interval(_point(a)[metric] - _point(b)[metric], samples, level)


def confusion(predictions: Predictions) -> np.ndarray:
    """Counts [K, K]; rows are true classes, columns predicted ones."""
    import sklearn.metrics  # here, as it takes half a second, which the first training step should not wait for

    classes = range(len(predictions.class_names))
    return sklearn.metrics.confusion_matrix(predictions.labels, predictions.logits.argmax(1), labels=classes)


def reliability(predictions: Predictions, bins: int = ECE_BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, accuracy and mean confidence [bins] of equal-width confidence bins (Guo et al. 2017); NaN where empty."""
    confidence, index = _confidence(predictions, bins)
    count = np.bincount(index, minlength=bins)
    correct = predictions.logits.argmax(1) == predictions.labels
    total = np.where(count, count, np.nan)
    accuracy = np.bincount(index, correct, minlength=bins) / total
    return count, accuracy, np.bincount(index, confidence, minlength=bins) / total


def _check(resamples, level):
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples={resamples}, level={level}: expected at least 1, and a level between 0 and 1")


def _log_probabilities(predictions):
    """Log-softmax in float64, unclipped: a confident mistake keeps its whole cost."""
    shifted = predictions.logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _log_odds(predictions):
    """Log p/(1-p) of each class [N, K]: ranks like the probability, but confident examples do not tie at 1."""
    log_p = _log_probabilities(predictions)
    rest = np.log1p(-np.minimum(np.exp(log_p), 0.9))  # exact up to 0.9; beyond, from the other classes' own sum:
    row, top = np.flatnonzero(log_p.max(axis=1) > np.log(0.9)), log_p.argmax(axis=1)
    others = log_p[row]
    others[np.arange(len(row)), top[row]] = -np.inf
    second = others.max(axis=1)
    rest[row, top[row]] = second + np.log(np.exp(others - second[:, None]).sum(axis=1))
    return log_p - rest


def _confidence(predictions, bins):
    confidence = np.exp(_log_probabilities(predictions).max(axis=1))
    return confidence, np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # bins (m/M, (m+1)/M]


def _point(predictions) -> dict:
    """Point estimates: scalars and [K] arrays; NaN where undefined (a class without examples, or without others)."""
    import sklearn.metrics

    labels, predicted, log_p = predictions.labels, predictions.logits.argmax(1), _log_probabilities(predictions)
    count, classes = log_p.shape
    rates, rate_names = sklearn.metrics.precision_recall_fscore_support, ("precision", "recall", "f1")
    support = np.bincount(labels, minlength=classes)
    accuracy = float(sklearn.metrics.accuracy_score(labels, predicted))
    value = {"accuracy": accuracy}
    if classes > 5:
        value["top5"] = float(_in_top(predictions, 5).mean())
    macro = rates(labels, predicted, labels=np.flatnonzero(support), average="macro", zero_division=0)
    value |= {f"{name}_macro": float(rate) for name, rate in zip(rate_names, macro[:3], strict=True)}
    value |= {f"{name}_micro": accuracy for name in rate_names}  # one label, one guess: all are the accuracy
    per_class = rates(labels, predicted, labels=range(classes), zero_division=0)
    value |= {name: np.where(support, rate, np.nan) for name, rate in zip(rate_names, per_class[:3], strict=True)}
    auc, score = np.full(classes, np.nan), _log_odds(predictions)
    for k in np.flatnonzero((support > 0) & (support < count)):
        auc[k] = sklearn.metrics.roc_auc_score(labels == k, score[:, k])
    value |= {"roc_auc": auc, "roc_auc_macro": np.nanmean(auc) if support.max() < count else np.nan}
    bins, hit, confidence = reliability(predictions)
    value["nll"] = float(-log_p[np.arange(count), labels].mean())
    value["ece"] = float(np.nansum(bins * np.abs(hit - confidence)) / count)
    return value


def _in_top(predictions, k):
    """Whether the label is among the k largest logits; ties go to the lower class, as in argmax."""
    logits, labels = predictions.logits, predictions.labels[:, None]
    own = np.take_along_axis(logits, labels, axis=1)
    ahead = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels))
    return ahead.sum(axis=1) < k


def _resample(count, resamples, seed):
    """Yields [N, B] float32: how often each example is drawn in B resamples of N, in chunks that fit the memory."""
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // count)
    for start in range(0, resamples, size):
        columns = min(size, resamples - start)
        drawn = rng.integers(count, size=(columns, count))
        flat = (drawn * columns + np.arange(columns)[:, None]).ravel()
        yield np.bincount(flat, minlength=count * columns).reshape(count, columns).astype(np.float32)


def _group_sum(index, groups, weights, columns=None, values=None):
    """Sums weights [N, B] (times values) by group: [groups, B]; example `columns[i]` is in group `index[i]`."""
    columns = np.arange(len(index)) if columns is None else columns
    values = np.ones(len(index), np.float32) if values is None else values
    return scipy.sparse.csr_matrix((values, (index, columns)), shape=(groups, len(weights))) @ weights


def _weighted(predictions, weights) -> dict:
    """All metrics but AUC on examples weighted by [N, B]: scalars [B] and per-class [B, K]; NaN where undefined."""
    labels, predicted, log_p = predictions.labels, predictions.logits.argmax(1), _log_probabilities(predictions)
    classes, total, hit = log_p.shape[1], weights.sum(axis=0), predicted == labels
    accuracy = hit.astype(np.float64) @ weights / total
    result = {"accuracy": accuracy, **{f"{name}_micro": accuracy for name in ("precision", "recall", "f1")}}
    if classes > 5:
        result["top5"] = _in_top(predictions, 5).astype(np.float64) @ weights / total
    true_positive = _group_sum(labels[hit], classes, weights, np.flatnonzero(hit)).astype(np.float64)
    support, guessed = _group_sum(labels, classes, weights), _group_sum(predicted, classes, weights)
    denominators = {"precision": guessed, "recall": support, "f1": (support + guessed) / 2}
    for name, denominator in denominators.items():  # nothing guessed means no true positive: precision 0
        rate = np.where(support > 0, true_positive / np.maximum(denominator, 0.5), np.nan)
        result[name], result[f"{name}_macro"] = rate.T, np.nanmean(rate, axis=0)
    result["nll"] = -log_p[np.arange(len(labels)), labels] @ weights / total
    confidence, bins = _confidence(predictions, ECE_BINS)
    result["ece"] = np.abs(_group_sum(bins, ECE_BINS, weights, values=hit - confidence)).sum(axis=0) / total
    return result


def _weighted_auc(predictions, weights) -> dict:
    """One-vs-rest AUC [B, K] on weighted examples and its mean over the classes where it is defined [B]."""
    score = _log_odds(predictions)
    auc = np.stack([_auc(score[:, k], predictions.labels == k, weights) for k in range(score.shape[1])], axis=1)
    defined = ~np.isnan(auc)
    with np.errstate(invalid="ignore"):  # 0 / 0: a resample of one class has no AUC
        return {"roc_auc": auc, "roc_auc_macro": np.where(defined, auc, 0).sum(axis=1) / defined.sum(axis=1)}


def _auc(score, positive, weights):
    """Weighted probability that a positive outscores a negative, ties one half (Mann-Whitney U / (P N)): [B].

    Negatives are summed between and on the m distinct scores of the positives (2 m + 1 groups), once for all resamples.
    """
    edges, rank = np.unique(score[positive], return_inverse=True)
    below = np.searchsorted(edges, score[~positive], "left") + np.searchsorted(edges, score[~positive], "right")
    negatives = _group_sum(below, 2 * len(edges) + 1, weights, np.flatnonzero(~positive)).astype(np.float64)
    positives = _group_sum(rank, len(edges), weights, np.flatnonzero(positive)).astype(np.float64)
    beaten = np.cumsum(negatives, axis=0)[:-1:2] + negatives[1::2] / 2
    pairs = positives.sum(axis=0) * negatives.sum(axis=0)
    return np.where(pairs > 0, (positives * beaten).sum(axis=0) / np.maximum(pairs, 1), np.nan)


def _interval(value, samples, level):
    """The point estimate and the percentiles of the resamples where it is defined; None for what is not."""
    samples = samples[~np.isnan(samples)]
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(samples, tails).tolist() if len(samples) else (None, None)
    return {"value": None if np.isnan(value) else float(value), "low": low, "high": high}


def format_table(summary: dict, of: str = "") -> rich.table.Table:
    """The scalar metrics with their intervals, for a rich console; `of` names the run and the data in the title."""
    title = f"{of}{': ' if of else ''}{summary['count']:,} examples, {summary['resamples']:,} resamples"
    table = rich.table.Table("metric", box=rich.box.SIMPLE_HEAD, title=title, title_justify="left")
    for header in ("value", f"{100 * summary['level']:g} % interval"):
        table.add_column(header, justify="right")
    for name, entry in summary.items():
        if isinstance(entry, dict):
            table.add_row(name, *_cells(entry))
    return table


def format_classes(summary: dict, limit: int = 20) -> rich.table.Table:
    """The per-class metrics; of more than `limit` classes those with the lowest F1."""
    rows = summary["per_class"]
    worst = sorted(rows, key=lambda row: row["f1"]["value"] if row["f1"]["value"] is not None else 2)[:limit]
    title = f"the {limit} of {len(rows)} classes with the lowest F1" if len(rows) > limit else "per class"
    table = rich.table.Table("class", box=rich.box.SIMPLE_HEAD, title=title, title_justify="left")
    for header in ("support", "precision", "recall", "F1", "interval", "AUC"):
        table.add_column(header, justify="right")
    for row in worst if len(rows) > limit else rows:
        precision, recall, auc = (_cells(row[name])[0] for name in ("precision", "recall", "roc_auc"))
        table.add_row(rich.markup.escape(row["class"]), str(row["support"]), precision, recall, *_cells(row["f1"]), auc)
    return table


def _cells(entry):
    numbers = [entry[name] for name in ("value", "low", "high")]
    value, low, high = ("-" if x is None else f"{x:.4f}" if abs(x) < 1e4 else f"{x:.4g}" for x in numbers)
    return value, f"{low} .. {high}"


def main(argv=None) -> None:
    """Prints the metrics of a predictions.npz; --json writes all of them."""
    parser = argparse.ArgumentParser(prog="python -m tl_jax.tasks.metrics", description=main.__doc__)
    parser.add_argument("path", help="predictions.npz of a run")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    try:
        predictions = load_predictions(options.path)
        summary = summarize(predictions, resamples=options.resamples, level=options.level, seed=options.seed)
    except FileNotFoundError:
        sys.exit(f"error: there is no {options.path}; a finished run leaves predictions.npz in its workdir")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        console = rich.console.Console()
        console.print(format_table(summary), format_classes(summary))


if __name__ == "__main__":
    main()
