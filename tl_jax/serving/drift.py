"""Drift: are new inputs of a network still like those it was tested on? Arrays in, plain data out.

Three tests share one family-wise level (Rabanser, Guenther & Lipton 2019): the maximum mean discrepancy, a
Kolmogorov-Smirnov test of each output (BBSD), and a classifier that tells old from new. Each has an effect size too,
because with many examples a difference that harms nobody has a small p.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.core.checks import refuse
from tl_jax.core.messages import unequal
from tl_jax.tasks import METRICS, Predictions, Spec, refuse_language
from tl_jax.tasks.intervals import interval

LEVEL = 0.05  # of all tests of one comparison together
LEAST = 20  # examples of either side
MOST = 2000  # of either side in a matrix of all pairs; others are left out by chance
PERMUTATIONS, FOLDS, BINS, RESAMPLES = 999, 5, 10, 200
# Effects from which a significant difference counts. Two normals that are 0.2 deviations apart, Cohen's small effect,
# have an AUC of 0.556 and a Jensen-Shannon distance of 0.085.
EFFECTS = {"AUC": 0.56, "JS": 0.1}
CLASSES = 500  # at most, where their shares are estimated
VERDICTS = ("drift", "small", "none")  # the strongest first
SPACES = ("features", "outputs")
Table = dict[str, Any]


class Finding(NamedTuple):
    """Of a test. p: before it is corrected for the other tests. effect: a name of EFFECTS; size: of it."""

    name: str
    p: float
    effect: str
    size: float
    found: Table


def compare(reference: Predictions, new: Predictions, space: str = "", seed: int = 0) -> Table:
    """Compares outputs and features of one network on two sets of examples; the labels of `new` are not read.

    space: what MMD and classifier look at, one of SPACES; "" takes features where both have them. The level of 5 % is
    that of all tests together, by Bonferroni's correction. Returns {"verdict", "level", "space", "counts", "tests":
    rows, "outputs": rows, "labels": `label_shift`}. verdict, of each test and the strongest of all: one of VERDICTS,
    "small" where p is significant and the effect is not large enough. ValueError lists all that does not fit.
    """
    check(reference, new, space)
    both = reference.features is not None and new.features is not None
    space, rng = space or ("features" if both else "outputs"), np.random.default_rng(seed)
    x, y = (_sample(points(each, space), rng) for each in (reference, new))
    z, own = np.concatenate([x, y]), np.zeros((len(x) + len(y), 1 + PERMUTATIONS), np.float32)
    own[: len(x)] = 1  # which examples are of the reference: as found, then permuted
    own[:, 1:] = rng.permuted(own[:, 1:].T, axis=1).T
    p, ks, js, w1 = marginals(*(readable(each.spec, each.values) for each in (reference, new)))
    k = int(ks.argmax())
    together = Finding("outputs", min(1.0, len(p) * float(p[k])), "JS", float(js[k]), {"ks": float(ks[k]), "output": k})
    tests = [mmd(z, own), together, classifier(z, own, rng)]
    rows = []
    for test in tests:
        adjusted, least = min(1.0, len(tests) * test.p), EFFECTS[test.effect]
        verdict = "none" if adjusted > LEVEL else "drift" if test.size >= least else "small"
        rows.append({**test._asdict(), "adjusted": adjusted, "least": least, "verdict": verdict})
    columns = {"p": np.minimum(1, len(tests) * len(p) * p), "ks": ks, "js": js, "wasserstein": w1}
    names = new.spec.class_names[-len(p) :]  # of a binary task the positive one
    return {
        "verdict": next(each for each in VERDICTS if each in {"none", *(row["verdict"] for row in rows)}),
        "level": LEVEL, "space": space, "counts": [len(reference.values), len(new.values)], "tests": rows,
        "outputs": [{"name": name, **{c: float(v[i]) for c, v in columns.items()}} for i, name in enumerate(names)],
        "labels": label_shift(reference, new, rng),
    }  # fmt: skip


def check(reference: Predictions, new: Predictions, space: str = "") -> None:
    """Raises one ValueError for all reasons for which the two cannot be compared."""
    sides, spec = {"reference": reference, "new": new}, reference.spec
    refuse_language(spec.name, "the reference")
    problems = [f"the task of the reference is {spec.name}, of new {new.spec.name}"] * (spec.name != new.spec.name)
    if names := unequal(spec.class_names, new.spec.class_names):
        problems.append(f"the classes, labels or targets of new are not those of the reference: {names}")
    few = {name: len(each.values) for name, each in sides.items() if len(each.values) < LEAST}
    problems += [f"{name} has {count} examples, expected at least {LEAST}" for name, count in few.items()]
    widths = {name: each.features.shape[1] for name, each in sides.items() if each.features is not None}
    if len(set(widths.values())) == 2:
        problems.append(
            "features are [N, {reference}] of the reference, [N, {new}] of new: two networks?".format(**widths)
        )
    if space == "features":
        problems += [f"{name} has no features; expected some, or --on outputs" for name in sides if name not in widths]
    infinite = [name for name in widths if not np.isfinite(sides[name].features).all()]
    refuse("these cannot be compared", problems + [f"features of {name} are not all finite" for name in infinite])


def readable(spec: Spec, values: np.ndarray) -> np.ndarray:
    """Outputs as people read them, float64 [N, K]: probabilities (binary: of the positive class), or values."""
    values = np.asarray(values, np.float64)
    if spec.name == "classification":
        return scipy.special.softmax(values, axis=1)
    values = values.reshape(len(values), -1)
    return values if spec.name == "regression" else scipy.special.expit(values)


def mmd(z: np.ndarray, own: np.ndarray) -> Finding:
    """The unbiased squared maximum mean discrepancy between parts of z [N, D] (Gretton et al. 2012, equation 3).

    own [N, 1 + B] is 1 for the examples of the reference, in the first column as found, in the others permuted. The
    kernel is exp(-d^2 / median d^2); p = (1 + permutations that reach what was found) / (1 + B), from one matrix of all
    pairs. Effect: AUC of the witness function (their section 2.3) without the example itself, the difference between
    whose means is this discrepancy.
    """
    z = (z - z.mean(axis=0)).astype(np.float32)
    square, total = np.einsum("ij,ij->i", z, z), len(z)
    kernel = np.maximum(square[:, None] + square - 2 * z @ z.T, 0)
    np.fill_diagonal(kernel, 0)
    apart = kernel[:: -(-total // 500)]
    apart = apart[apart > 0]
    kernel = np.exp(kernel / -(np.median(apart) if len(apart) else np.float32(1)))
    kernel -= (kernel.sum(dtype=np.float64) - total) / (total * (total - 1))  # moves no difference, and rounds less
    np.fill_diagonal(kernel, 0)
    towards, rows = kernel @ own, kernel.sum(axis=1, dtype=np.float64)
    n = int(own[:, 0].sum())
    m, xx, x_all = total - n, np.einsum("ij,ij->j", towards, own, dtype=np.float64), rows @ own
    found = xx / (n * (n - 1)) + (rows.sum() - 2 * x_all + xx) / (m * (m - 1)) - 2 * (x_all - xx) / (n * m)
    witness = towards[:, 0] / (n - own[:, 0]) - (rows - towards[:, 0]) / (m - 1 + own[:, 0])
    return Finding("mmd", _p(found, 1e-8), "AUC", auc(witness, own[:, 0]), {"mmd2": float(found[0])})


def classifier(z: np.ndarray, own: np.ndarray, rng: np.random.Generator) -> Finding:
    """Can a classifier tell the reference from the rest of z [N, D], out of fold (Lopez-Paz & Oquab 2017)?

    A ridge regression on standardised features, whose score is linear in the labels: each permutation in own, see
    `mmd`, costs a column of a matrix product, with the folds from the one hat matrix H by (I - H_ff)^-1 (y - H y)_f. p
    is that of the permutations. The usual binomial test takes answers of one fold as independent: it rejected 7 % at
    5 %, and 3.5 % at 1.7 %.
    """
    z = z - z.mean(axis=0, dtype=np.float64)
    z = (z / np.maximum(z.std(axis=0), 1e-9)).astype(np.float32)
    y = own - own.mean(axis=0)
    gram = z.T @ z + np.float32(0.1 * z.shape[1]) * np.eye(z.shape[1], dtype=np.float32)
    half = _solve(gram, z.T).T
    rest, score = y - z @ (half.T @ y), np.empty_like(y)
    for fold in np.array_split(rng.permutation(len(z)), FOLDS):
        unseen = np.eye(len(fold), dtype=np.float32) - z[fold] @ half[fold].T - np.float32(1 / len(z))
        score[fold] = y[fold] - _solve(unseen, rest[fold])
        score[fold] -= score[fold].mean(axis=0)
    found = np.einsum("ij,ij->j", score, y, dtype=np.float64) / np.square(y[:, 0]).sum()
    return Finding("classifier", _p(found, 1e-6), "AUC", auc(score[:, 0], own[:, 0]), {})


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """matrix^-1 right, of a positive definite matrix: several times as fast as `scipy.linalg.solve`."""
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(matrix), right)


def _p(found: np.ndarray, rounding: float) -> float:
    """Of a statistic, as found and with permutations; what differs by rounding alone is equal."""
    return float((1 + np.count_nonzero(found[1:] >= found[0] - rounding)) / len(found))


def auc(score: np.ndarray, positive: np.ndarray) -> float:
    """The probability that a positive has the higher score, ties one half (Mann & Whitney 1947)."""
    count = positive.sum(dtype=np.float64)
    ranks = scipy.stats.rankdata(score)[positive > 0].sum()
    return float((ranks / count - (count + 1) / 2) / (len(score) - count))


def marginals(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Column by column of x [N, K], y [M, K]: p, Kolmogorov-Smirnov, Jensen-Shannon and Wasserstein distance.

    p = 2.17 exp(-2 D^2 N M / (N + M)) bounds that of D, also with ties and in the far tail: Wei & Dudley 2012 prove it
    for equal N and M, where 2 would be too small below 458, and conjecture that 2 does for others. JS: the root of the
    divergence in bits, between shares in BINS bins of equally many. Wasserstein: in deviations of x.
    """
    n, m, both = len(x), len(y), np.concatenate([x, y])
    order = both.argsort(axis=0, kind="stable")
    values = np.take_along_axis(both, order, axis=0)
    last = np.where(np.diff(values, axis=0, append=np.inf) > 0, np.arange(n + m)[:, None], n + m)
    last = np.minimum.accumulate(last[::-1], axis=0)[::-1]  # of each run of equal values
    f, g = (np.take_along_axis(part.cumsum(axis=0), last, axis=0) for part in (order < n, order >= n))
    f, g = f / n, g / m
    gap, cuts = np.abs(f - g), np.arange(1, BINS) * (n + m) // BINS - 1
    ks = gap.max(axis=0)
    p = np.minimum(1, 2.17 * np.exp(-2 * ks**2 * (n * m / (n + m))))
    shares = (np.diff(each[cuts], axis=0, prepend=0, append=1) for each in (f, g))
    js = scipy.spatial.distance.jensenshannon(*shares, base=2, axis=0)
    spread = np.maximum(x.std(axis=0), 1e-9 * np.abs(values).max(axis=0) + 1e-300)
    return p, ks, js, (gap[:-1] * np.diff(values, axis=0)).sum(axis=0) / spread


def label_shift(reference: Predictions, new: Predictions, rng: np.random.Generator) -> list[Table]:
    """The shares of the classes in `new`, by black box shift estimation (Lipton, Wang & Smola 2018).

    C[i, j] is the share of the reference that is predicted as i and labelled j, mu the shares of predicted classes in
    `new`; C^-1 mu are the shares of true classes in `new`, relative to the reference. Right where the inputs of each
    class look as before. A row for each class, or label: {"name", "reference", "share", "low", "high", "weight"}, with
    the 95 % interval of a bootstrap over both sides; None where C has no inverse. No rows for a regression, without
    labels of the reference, or with more than CLASSES classes.
    """
    spec, labels = reference.spec, reference.labels
    if labels is None or spec.name == "regression" or len(spec.class_names) > CLASSES:
        return []
    if spec.name == "multilabel":  # each label is a question with two answers
        each = zip(labels.T, reference.values.T >= 0, new.values.T >= 0, strict=True)
        rows = [_shares(own, a.astype(int), b.astype(int), 2, rng)[1] for own, a, b in each]
    else:
        answer = METRICS[spec.name].answer
        new = new._replace(spec=spec)  # a threshold may be another
        rows = _shares(labels, answer(reference), answer(new), len(spec.class_names), rng)
    return [{"name": name, **row} for name, row in zip(spec.class_names, rows, strict=True)]


def _shares(
    labels: np.ndarray, known: np.ndarray, new: np.ndarray, count: int, rng: np.random.Generator
) -> list[Table]:
    """known, new: the predicted classes of the reference, whose labels are `labels`, and of new; count: of classes."""

    def estimate(i, j) -> np.ndarray:
        joint = np.bincount(count * known[i] + labels[i], minlength=count**2).reshape(count, count) / len(labels)
        try:
            weights = np.linalg.solve(joint, np.bincount(new[j], minlength=count) / len(new))
        except np.linalg.LinAlgError:
            return np.full(count, np.nan)
        share = np.maximum(weights, 0) * joint.sum(axis=0)
        return share / share.sum()

    share, before = estimate(slice(None), slice(None)), np.bincount(labels, minlength=count) / len(labels)
    sizes = len(labels), len(new)
    drawn = range(RESAMPLES if np.isfinite(share).all() else 1)  # one, where there is nothing to estimate
    samples = np.stack([estimate(*(rng.integers(size, size=size) for size in sizes)) for _ in drawn])
    rows = [interval(share[k], samples[:, k], 0.95) for k in range(count)]
    return [
        {
            "reference": old, "share": row["value"], "low": row["low"], "high": row["high"],
            "weight": None if row["value"] is None else row["value"] / old,
        }
        for old, row in zip(before.tolist(), rows, strict=True)
    ]  # fmt: skip


def points(found: Predictions, space: str) -> np.ndarray:
    """Features, or outputs before softmax or sigmoid, [N, D]."""
    return found.features if space == "features" else found.values.reshape(len(found.values), -1)


def _sample(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return x if len(x) <= MOST else x[rng.choice(len(x), MOST, replace=False)]
