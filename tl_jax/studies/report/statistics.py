"""The statistics of studies: arrays of scores in, plain data for JSON out.

A number that the data do not determine is None, with the reason in `why`. Missing scores are NaN or None and left out;
infinite ones are an error.

test_share: folds of one data set share training examples and are not independent. With it, n_test / n_train, the
variance of a mean is sd^2 (1/n + n_test/n_train), the corrected resampled t-test (Nadeau & Bengio 2003).
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import scipy  # loads its parts when they are used

UNBOUNDED = (-np.inf, np.inf)
ROUNDING = 64 * np.finfo(np.float64).eps  # relative to the largest score: differences below are arithmetic, not data


def mean_interval(
    values: Sequence, level: float = 0.95, test_share: float | None = None, bounds: tuple[float, float] = UNBOUNDED
) -> dict:
    """The mean over n seeds and its interval within `bounds`, the ends of the scale: {"mean", "low", "high", "n"}.

    Without ends Student's t: mean -+ t(n - 1) sd / sqrt(n), sd with n - 1 (Student 1908), of independent, normal
    values. Between two ends the same on the scale of logits, where the error of a mean m in 0 .. 1 is that of m over
    m (1 - m) (the delta method; Agresti 2013, Categorical Data Analysis, section 16.1). One end cuts the interval.
    """
    values = _numbers(values, "values")
    if values.ndim != 1:
        raise ValueError(f"values have shape {values.shape}, expected [seeds]")
    values = values[~np.isnan(values)]
    mean, low, high, error = _student(values, level, test_share)
    found = {"mean": mean, "low": low, "high": high, "n": len(values)}
    (least, most), whole = bounds, len(values) > 1 and bounds[0] < mean < bounds[1]
    if not whole or error == 0 or np.isinf(least) or np.isinf(most):
        return within(found, least, most)
    share = (mean - least) / (most - least)
    half = (high - mean) / ((most - least) * share * (1 - share))
    ends = scipy.special.expit(scipy.special.logit(share) + half * np.array([-1, 1]))
    return {**found, **dict(zip(("low", "high"), (least + (most - least) * ends).tolist(), strict=True))}


def within(found: dict, least: float, most: float) -> dict:
    """An interval without what lies beyond the ends of its scale."""
    if found["low"] is None or not least <= found["mean"] <= most:
        return found
    return {**found, "low": max(found["low"], least), "high": min(found["high"], most)}


def paired(a: Sequence, b: Sequence, level: float = 0.95, test_share: float | None = None) -> dict:
    """a minus b, position by position: {"mean", "low", "high", "p", "effect", "n", "wins", "losses", "ties", "why"}.

    Student's paired t-test, two-sided, on n - 1 degrees of freedom, with its interval. `effect` is Cohen's d_z = mean /
    sd (Cohen 1988). A win is a > b. Assumes independent pairs with normal differences. Differences that are all zero
    give p = 1 and effect 0; all equal but not zero, they have no spread to test against: both are None.
    """
    a, b = _numbers(a, "a"), _numbers(b, "b")
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape}, b {b.shape}: expected two of [pairs], position by position")
    complete = ~np.isnan(a - b)
    a, b = a[complete], b[complete]
    difference = _without_residue(a - b, a, b)
    n = len(difference)
    constant = n > 1 and not _without_residue(difference - difference[0], a, b).any()
    if constant:
        difference = np.full(n, difference.mean())
    mean, low, high, error = _student(difference, level, test_share)
    p = effect = why = None
    if n < 2:
        why = f"{n} complete pairs: a test needs two"
    elif not constant:
        p, effect = float(2 * scipy.stats.t.sf(abs(mean) / error, n - 1)), float(mean / difference.std(ddof=1))
    elif mean == 0:
        p, effect = 1.0, 0.0
    else:
        why = f"the difference is the same in all {n} pairs: no spread to test against"
    signs = {"wins": difference > 0, "losses": difference < 0, "ties": difference == 0}
    counts = {name: int(np.count_nonzero(which)) for name, which in signs.items()}
    return {"mean": mean, "low": low, "high": high, "p": p, "effect": effect, "n": n, **counts, "why": why}


def holm(p_values: Sequence) -> list[float | None]:
    """Adjusted p-values that keep the family-wise error under any dependence; None stays None and is not counted.

    With p_(1) <= ... <= p_(m), the i-th is max over j <= i of min(1, (m - j + 1) p_(j)) (Holm 1979).
    """
    p = _numbers(p_values, "p_values")
    if p.ndim != 1 or (p < 0).any() or (p > 1).any():
        raise ValueError(f"p_values={list(p_values)}: expected a list of numbers between 0 and 1, or None")
    order = np.argsort(p, kind="stable")[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    factors = np.arange(len(order), 0, -1)
    adjusted: list[float | None] = [None] * len(p)
    for index, value in zip(order, np.maximum.accumulate(np.minimum(1, factors * p[order])), strict=True):
        adjusted[index] = float(value)
    return adjusted


def anova(table: Sequence, factors: Sequence[str], test_share: float | None = None) -> list[dict] | str:
    """Repeated-measures analysis of variance of `table` [levels of factor 1, ..., of factor m, seeds].

    A row for each main effect and interaction of two factors: {"effect": ("blocks", "shots"), "ss", "df", "df_error",
    "F", "p", "eta2", "epsilon", "p_gg", "why"}, F = (SS_effect / df) / (SS_effect x seed / df_error), df_error =
    df (seeds - 1), eta2 = SS_effect / SS_total (Winer, Brown & Michels 1991). With `test_share`, F is divided by
    1 + n test_share: the corrected t-test if F = t^2. Returns the reason for a missing cell or fewer than two seeds.

    Each effect is tested against its own interaction with the seeds, which are random blocks: the residual pooled over
    all rejects too often where a lucky draw of shots matters more with fewer of them. Assumes normal errors and, for df
    > 1, equal variance of all contrasts over seeds; `p_gg` does not, df and df_error are times `epsilon` (Greenhouse &
    Geisser 1959). F is None where effect x seed is zero; p is then 1 if the effect is zero too.
    """
    table = _numbers(table, "table")
    _check(test_share=test_share)
    if table.ndim != len(factors) + 1 or not factors or not table.size:
        raise ValueError(f"table has shape {table.shape}, expected {len(factors)} factors {tuple(factors)}, then seeds")
    if missing := int(np.isnan(table).sum()):
        return f"{missing} of {table.size} runs have no score: the design is not balanced"
    if table.shape[-1] < 2:
        return "one seed: an effect has nothing to be tested against"
    varied = [axis for axis in range(len(factors)) if table.shape[axis] > 1]
    effects = [axes for order in (1, 2) for axes in itertools.combinations(varied, order)]
    total = float(np.sum(_without_residue(table - table.mean(), table) ** 2))
    return [
        {"effect": tuple(factors[axis] for axis in axes), **_test_effect(table, axes, total, test_share or 0.0)}
        for axes in effects
    ]


def _test_effect(table: np.ndarray, axes: tuple[int, ...], total: float, test_share: float) -> dict:
    """The row of the effect of `axes`: its share of each seed's scores, over seeds against between seeds."""
    part = table
    for axis in range(table.ndim - 1):  # orthogonal projection: deviations along its factors, means along the others
        mean = part.mean(axis=axis, keepdims=True)
        part = part - mean if axis in axes else mean
    seeds, cells = table.shape[-1], part[..., 0].size
    part = _without_residue(part.reshape(cells, seeds), table)
    effect = part.mean(axis=1, keepdims=True)
    noise = _without_residue(part - effect, table)
    copies = table[..., 0].size // cells  # cells of the table that one cell of the effect stands for
    ss, ss_error = float(copies * seeds * np.sum(effect**2)), float(copies * np.sum(noise**2))
    df = int(np.prod([table.shape[axis] - 1 for axis in axes]))
    df_error = df * (seeds - 1)
    row = {"ss": ss, "df": df, "df_error": df_error, "F": None, "p": None, "eta2": ss / total if total else None,
           "epsilon": None, "p_gg": None, "why": None}  # fmt: skip
    if ss_error == 0:
        same = "the effect is the same with every seed: no spread to test against"
        return row | ({"p": 1.0, "p_gg": 1.0} if ss == 0 else {"why": same})
    ratio = (ss / df) / (ss_error / df_error) / (1 + seeds * test_share)
    covariance = noise @ noise.T
    epsilon = float(np.trace(covariance) ** 2 / (df * np.sum(covariance**2)))
    p, p_gg = (float(scipy.stats.f.sf(ratio, e * df, e * df_error)) for e in (1.0, epsilon))
    return row | {"F": ratio, "p": p, "epsilon": epsilon, "p_gg": p_gg}


def friedman(scores: Sequence, level: float = 0.95) -> dict:
    """Ranks k treatments within N blocks: {"ranks", "statistic", "p", "critical_difference", "n"}; higher is better.

    `scores` [blocks, treatments]; ties share their mean rank. The statistic, corrected for ties (Friedman 1937), has p
    from chi-squared with k - 1 degrees of freedom (rough for N < 10). Mean ranks further apart than the critical
    difference q sqrt(k (k + 1) / (6 N)) differ by Nemenyi's test (Demsar 2006, section 3.2.2). Assumes independent
    blocks: data sets, not seeds of one. Blocks with a missing score do not count in n; all None where none is left.
    """
    scores = _numbers(scores, "scores")
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores have shape {scores.shape}, expected [blocks, treatments >= 2]")
    _check(level)
    scores = scores[~np.isnan(scores).any(axis=1)]
    n, k = scores.shape
    if n == 0:
        return {**dict.fromkeys(("ranks", "statistic", "p", "critical_difference")), "n": 0}
    ranks = scipy.stats.rankdata(-_without_rounding(scores), axis=1)
    tied = sum(float(t**3 - t) for row in ranks for t in np.unique(row, return_counts=True)[1])
    spread, correction = float(np.sum((ranks.mean(axis=0) - (k + 1) / 2) ** 2)), 1 - tied / (n * (k**3 - k))
    statistic = 12 * n / (k * (k + 1)) * spread / correction if correction > 0 else 0.0  # 0: every block is one tie
    return {
        "ranks": ranks.mean(axis=0).tolist(),
        "statistic": statistic,
        "p": float(scipy.stats.chi2.sf(statistic, k - 1)),
        "critical_difference": nemenyi_quantile(k, level) * float(np.sqrt(k * (k + 1) / (6 * n))),
        "n": n,
    }


@functools.cache
def nemenyi_quantile(treatments: int, level: float = 0.95) -> float:
    """q of Nemenyi's test: the quantile of the studentised range, infinite degrees, over sqrt(2) (Demsar, table 5)."""
    return float(scipy.stats.studentized_range.ppf(level, treatments, np.inf) / np.sqrt(2))


def groups_not_different(ranks: Sequence[float], critical_difference: float) -> list[tuple[int, ...]]:
    """The bars of a critical-difference diagram (Demsar 2006, figure 1): largest groups of positions in `ranks`."""
    order = np.argsort(ranks, kind="stable")
    ordered = np.asarray(ranks, np.float64)[order]
    groups, reached = [], 0
    for start in range(len(order)):
        end = int(np.searchsorted(ordered, ordered[start] + critical_difference, side="left"))
        if end > reached and end - start > 1:
            groups.append(tuple(order[start:end].tolist()))
        reached = max(reached, end)
    return groups


def pareto(cost: Sequence, score: Sequence) -> list[int]:
    """Positions of the points that no other beats in both, by rising cost; equal points stay, incomplete do not."""
    cost, score = _numbers(cost, "cost"), _numbers(score, "score")
    if cost.ndim != 1 or cost.shape != score.shape:
        raise ValueError(f"cost has shape {cost.shape}, score {score.shape}: expected two of [points]")
    kept: list[int] = []
    order = np.lexsort((-score, cost))
    for index in order[~np.isnan((cost + score)[order])].tolist():
        last = kept[-1] if kept else index
        if score[index] > score[last] or (cost[index], score[index]) == (cost[last], score[last]):
            kept.append(index)
    return kept


def _numbers(values, name: str) -> np.ndarray:
    """float64, None as NaN; ValueError for infinite entries, which no mean survives."""
    array = np.asarray(values, np.float64)
    if count := np.count_nonzero(np.isinf(array)):
        raise ValueError(f"{name} hold {count} infinite numbers, expected finite or missing ones; did a run diverge?")
    return array


def _check(level: float = 0.95, test_share: float | None = None) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: expected a number between 0 and 1, as 0.95")
    if test_share is not None and not test_share > 0:
        raise ValueError(f"test_share={test_share}: expected n_test / n_train, above 0, or None for independent values")


def _largest(*arrays: np.ndarray) -> float:
    return max(float(np.abs(array[~np.isnan(array)]).max(initial=0)) for array in arrays)


def _without_residue(deviations: np.ndarray, *scores: np.ndarray) -> np.ndarray:
    """Deviations with zeros for those that rounding alone leaves of equal scores of this size."""
    return np.where(np.abs(deviations) <= ROUNDING * _largest(*scores), 0.0, deviations)


def _student(values: np.ndarray, level: float, test_share: float | None) -> tuple:
    _check(level, test_share)
    n = len(values)
    if n < 2:
        return (float(values[0]) if n else None), None, None, 0.0
    error = float(values.std(ddof=1) * np.sqrt(1 / n + (test_share or 0.0)))
    mean, half = float(values.mean()), float(scipy.stats.t.ppf(0.5 + level / 2, n - 1)) * error
    return mean, mean - half, mean + half, error


def _without_rounding(scores: np.ndarray) -> np.ndarray:
    """Scores on a grid of 2^-40 of the largest: means of equal scores may differ in their last bits, and must tie."""
    step = 2.0 ** (np.frexp(_largest(scores))[1] - 40)
    return np.round(scores / step)
