"""Statistics of studies equal scipy, least squares and published numbers, and err as often as they say they do."""

import itertools
import json

import numpy as np
import pytest
from scipy import special, stats

from tl_jax.studies.report import statistics

DRAWS = 1000


def band(rate, draws=DRAWS):
    """The 99.9 % band of a proportion over simulated studies."""
    return tuple(edge / draws for edge in stats.binom.interval(0.999, draws, rate))


def rejected(p_values, level=0.05):
    return float(np.mean(np.asarray(p_values, float) <= level))


# Means and pairs


@pytest.mark.parametrize(("n", "level"), [(2, 0.95), (5, 0.9), (40, 0.99)])
def test_mean_interval_equals_scipy(n, level):
    values = np.random.default_rng(n).normal(0.8, 0.05, n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(level)
    got = statistics.mean_interval(values, level)
    np.testing.assert_allclose([got["mean"], got["low"], got["high"]], [values.mean(), *expected], rtol=1e-12)
    assert got["n"] == n


@pytest.mark.parametrize(("least", "most"), [(0, 1), (-1, 1)])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_between_two_ends_the_interval_of_a_mean_is_students_for_logits(n, least, most):
    values = least + (most - least) * np.random.default_rng(n).beta(20, 2, n)
    got = statistics.mean_interval(values, bounds=(least, most))
    share, error = (values.mean() - least) / (most - least), stats.sem(values) / (most - least)
    step = 1e-6  # the slope of the logit, by differences
    slope = (special.logit(share + step) - special.logit(share - step)) / (2 * step)
    low, high = special.expit(stats.t.interval(0.95, n - 1, special.logit(share), slope * error))
    expected = least + (most - least) * np.array([share, low, high])
    np.testing.assert_allclose([got["mean"], got["low"], got["high"]], expected, rtol=1e-6)
    assert least < got["low"] < got["mean"] < got["high"] < most


def test_an_interval_stays_on_its_scale_and_one_end_cuts_it():
    for values in ([0.9, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.999, 0.9999]):
        got = statistics.mean_interval(values, bounds=(0, 1))
        assert 0 <= got["low"] <= got["mean"] <= got["high"] <= 1
    values = [0.1, 0.9]
    plain, cut = statistics.mean_interval(values), statistics.mean_interval(values, bounds=(0, np.inf))
    assert plain["low"] < 0 and cut == {**plain, "low": 0}
    assert statistics.mean_interval([40.0, 50.0], bounds=(0, 1)) == {**statistics.mean_interval([40.0, 50.0])}
    assert statistics.within({"mean": 0.5, "low": -3.0, "high": 0.9}, -1, 1) == {"mean": 0.5, "low": -1, "high": 0.9}


@pytest.mark.thin(2)
@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_interval_of_accuracies_near_one_covers_as_often_as_it_says(n):
    """Seeds differ by 0.4 on the scale of logits; each is tested on 768 examples: docs/metrics.md has more cases."""
    rng, draws = np.random.default_rng(n), 3000
    mean = special.expit(special.logit(0.98) + 0.4 * np.random.default_rng(0).normal(size=10**6)).mean()
    seeds = rng.binomial(768, special.expit(special.logit(0.98) + 0.4 * rng.normal(size=(draws, n)))) / 768
    found = [statistics.mean_interval(values, bounds=(0, 1)) for values in seeds]
    low, high = band(0.95, draws)
    assert low < np.mean([row["low"] <= mean <= row["high"] for row in found]) < high


def test_mean_interval_leaves_out_what_is_missing():
    assert statistics.mean_interval([0.5, None, 0.7, float("nan")]) == statistics.mean_interval([0.5, 0.7])
    assert statistics.mean_interval([None, 0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}
    assert statistics.mean_interval([]) == {"mean": None, "low": None, "high": None, "n": 0}


def test_mean_interval_over_folds_is_wider_by_the_shared_training_examples():
    values = np.random.default_rng(0).normal(0.8, 0.05, 5)
    plain, folds = statistics.mean_interval(values), statistics.mean_interval(values, test_share=1 / 4)
    widths = [row["high"] - row["low"] for row in (folds, plain)]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt((1 / 5 + 1 / 4) / (1 / 5)))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_paired_equals_scipy(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.8, 0.05, n), rng.normal(0.75, 0.05, n)
    got, test = statistics.paired(a, b), stats.ttest_rel(a, b)
    low, high = stats.ttest_1samp(a - b, 0).confidence_interval(0.95)
    expected = {"mean": np.mean(a - b), "low": low, "high": high, "p": test.pvalue}
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-10), name
    assert got["effect"] == pytest.approx(test.statistic / np.sqrt(n))  # t = d_z sqrt(n)
    assert (got["wins"], got["losses"], got["ties"]) == (sum(a > b), sum(a < b), 0)
    mirrored = statistics.paired(b, a)
    assert (mirrored["mean"], mirrored["low"], mirrored["p"]) == (-got["mean"], -got["high"], got["p"])


def test_corrected_resampled_test_equals_nadeau_and_bengio_by_hand():
    # differences 1, 2, 3, 4 (n = 4, sd^2 = 5/3) of folds with 90 training and 10 test examples:
    # t = 2.5 / sqrt(5/3 (1/4 + 1/9)) = 2.5 / sqrt(65/108) = 3.222517
    got = statistics.paired([1, 2, 3, 4], [0, 0, 0, 0], test_share=10 / 90)
    t = 2.5 / np.sqrt(65 / 108)
    assert t == pytest.approx(3.222517, abs=1e-6)
    assert got["p"] == pytest.approx(2 * stats.t.sf(t, 3))
    assert got["high"] == pytest.approx(2.5 + 3.182446305 * np.sqrt(65 / 108))
    assert got["effect"] == pytest.approx(2.5 / np.sqrt(5 / 3))  # the correction is of the mean's variance alone


def test_paired_leaves_out_incomplete_pairs():
    a, b = [0.9, None, 0.7, 0.8, 0.6], [0.8, 0.7, float("nan"), 0.75, 0.65]
    got = statistics.paired(a, b)
    assert got == statistics.paired([0.9, 0.8, 0.6], [0.8, 0.75, 0.65])
    assert (got["n"], got["wins"], got["losses"]) == (3, 2, 1)


def test_paired_without_spread_says_what_it_cannot_know():
    nothing = statistics.paired([0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    assert (nothing["p"], nothing["effect"], nothing["ties"], nothing["why"]) == (1.0, 0.0, 3, None)
    same = statistics.paired([0.8, 0.9, 0.7], [0.7, 0.8, 0.6])  # 0.1 each, but for the last bits
    assert len(set(np.subtract([0.8, 0.9, 0.7], [0.7, 0.8, 0.6]))) > 1
    assert (same["p"], same["effect"], same["wins"]) == (None, None, 3)
    assert "same in all 3 pairs" in same["why"]
    assert statistics.paired([0.1 + 0.2], [0.3])["ties"] == 1
    lone = statistics.paired([0.9, None], [0.7, 0.5])
    assert (lone["n"], lone["p"], lone["low"]) == (1, None, None)
    assert lone["mean"] == pytest.approx(0.2)
    assert "1 complete pairs" in lone["why"]
    assert statistics.paired([], [])["mean"] is None


# Holm


def textbook_holm(p_values, alpha):
    """Which of the hypotheses the step-down procedure rejects."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    rejected = set()
    for step, (p, index) in enumerate(known):
        if p > alpha / (len(known) - step):
            break
        rejected.add(index)
    return rejected


def test_holm_rejects_what_the_step_down_procedure_rejects():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = [None if rng.random() < 0.2 else float(rng.beta(0.3, 2)) for _ in range(rng.integers(1, 9))]
        adjusted = statistics.holm(p)
        for alpha in (0.003, 0.01, 0.05, 0.2, 0.6):
            assert {i for i, q in enumerate(adjusted) if q is not None and q <= alpha} == textbook_holm(p, alpha)


def test_holm_keeps_order_is_monotone_capped_and_passes_none_through():
    assert statistics.holm([0.04, None, 0.01, 0.03, 0.9]) == pytest.approx([0.09, None, 0.04, 0.09, 0.9])
    assert statistics.holm([0.7, 0.6]) == [1.0, 1.0]
    assert statistics.holm([None, float("nan")]) == [None, None]
    assert statistics.holm([]) == []


# Analysis of variance


def indicators(index, levels, sum_to_zero):
    """A column per level [N, levels]; with `sum_to_zero` one fewer, each against the last (effect coding)."""
    columns = np.eye(levels)[index]
    return columns[:, :-1] - columns[:, -1:] if sum_to_zero else columns


def interact(*blocks):
    product = np.ones((len(blocks[0]), 1))
    for block in blocks:
        product = (product[:, :, None] * block[:, None, :]).reshape(len(block), -1)
    return product


def least_squares_anova(table):
    """{axes: (SS, F, df, df_error)}: each effect and its interaction with the seed by what its columns explain.

    Full design matrix, effect coding: the rise of the residual sum of squares without an effect's columns.
    """
    where = np.indices(table.shape).reshape(table.ndim, -1)
    codes = [indicators(index, levels, True) for index, levels in zip(where, table.shape, strict=True)]
    terms = {
        axes: interact(*(codes[axis] for axis in axes))
        for order in range(1, table.ndim + 1)
        for axes in itertools.combinations(range(table.ndim), order)
    }

    def explained(term):
        rest = np.hstack([np.ones((table.size, 1))] + [columns for axes, columns in terms.items() if axes != term])
        solution, *_ = np.linalg.lstsq(rest, table.ravel(), rcond=None)
        return float(np.sum((table.ravel() - rest @ solution) ** 2)), terms[term].shape[1]

    seed, result = table.ndim - 1, {}
    for axes in terms:
        if seed not in axes and len(axes) <= 2:
            (ss, df), (error, df_error) = explained(axes), explained((*axes, seed))
            result[axes] = ss, (ss / df) / (error / df_error), df, df_error
    return result


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (3, 2, 2, 3)])
def test_anova_equals_least_squares_on_design_matrices(shape):
    rng = np.random.default_rng(sum(shape))
    table = rng.normal(size=shape) + rng.normal(size=shape[-1]) + rng.normal(size=(shape[0], *[1] * (len(shape) - 1)))
    names = ["blocks", "shots", "rate"][: len(shape) - 1]
    rows, reference = statistics.anova(table, names), least_squares_anova(table)
    assert [row["effect"] for row in rows] == [tuple(names[axis] for axis in axes) for axes in reference]
    for row, (ss, ratio, df, df_error) in zip(rows, reference.values(), strict=True):
        assert (row["df"], row["df_error"]) == (df, df_error)
        assert row["ss"] == pytest.approx(ss)
        assert row["F"] == pytest.approx(ratio)
        assert row["p"] == pytest.approx(stats.f.sf(ratio, df, df_error))
        assert row["eta2"] == pytest.approx(ss / np.sum((table - table.mean()) ** 2))


def test_anova_equals_published_numbers():
    """Loftus & Masson 1994, table 2: words recalled by 10 subjects after three study times."""
    words = """10 13 13  6 8 8  11 14 14  22 23 25  16 18 20  15 17 17  1 1 4  12 15 17  9 12 12  8 9 12"""
    table = np.array(words.split(), float).reshape(10, 3).T
    (row,) = statistics.anova(table, ["exposure"])
    assert (row["df"], row["df_error"]) == (2, 18)
    assert row["ss"] == pytest.approx(52.27, abs=0.005)
    assert row["F"] == pytest.approx(42.51, abs=0.005)


@pytest.mark.parametrize("share", [None, 1 / 4])
def test_anova_of_two_levels_is_the_paired_test(share):
    table = np.random.default_rng(3).normal(size=(2, 2, 5))
    first, second, both = statistics.anova(table, ["a", "b"], test_share=share)
    pairs = [table.mean(axis=1), table.mean(axis=0), np.stack([table[0, 0] - table[0, 1], table[1, 0] - table[1, 1]])]
    for row, (x, y) in zip((first, second, both), pairs, strict=True):
        if share is None:
            test = stats.ttest_rel(x, y)
            assert row["F"] == pytest.approx(test.statistic**2)
            assert row["p"] == pytest.approx(test.pvalue)
        assert row["p"] == pytest.approx(row["p_gg"])
        assert row["p"] == pytest.approx(statistics.paired(x, y, test_share=share)["p"])


def test_anova_of_scores_without_seed_effect_is_one_way():
    """With equal seed means the seed takes no share of the residual: F differs from one-way by its degrees alone."""
    table = np.random.default_rng(4).normal(size=(4, 6))
    table -= table.mean(axis=0)
    (row,) = statistics.anova(table, ["a"])
    assert row["F"] / row["df_error"] == pytest.approx(stats.f_oneway(*table).statistic / (4 * 5))


def test_greenhouse_geisser_epsilon_spans_its_range():
    rng = np.random.default_rng(5)
    many = rng.normal(size=(4, 20_000))
    (even,) = statistics.anova(many, ["a"])
    assert even["epsilon"] == pytest.approx(1, abs=0.01)
    (one,) = statistics.anova(np.array([[1.0], [0], [0], [0]]) * many[0], ["a"])  # one contrast has all the variance
    assert one["epsilon"] == pytest.approx(1 / 3)
    # the covariance of orthonormal contrasts, from scratch
    table = rng.normal(size=(3, 6)) * [[1], [2], [4]]
    contrasts = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    eigenvalues = np.linalg.eigvalsh(np.cov(contrasts @ table))
    (row,) = statistics.anova(table, ["a"])
    assert row["epsilon"] == pytest.approx(eigenvalues.sum() ** 2 / (2 * np.sum(eigenvalues**2)))
    assert row["p_gg"] == pytest.approx(stats.f.sf(row["F"], 2 * row["epsilon"], 10 * row["epsilon"]))


def test_anova_without_anything_to_compute_gives_the_reason():
    table = np.random.default_rng(6).normal(size=(2, 3, 4))
    assert "one seed" in statistics.anova(table[..., :1], ["a", "b"])
    table[0, 1, 2] = np.nan
    assert "1 of 24 runs have no score" in statistics.anova(table, ["a", "b"])


def test_anova_without_spread_says_what_it_cannot_know():
    constant = np.array([0.7, 0.8, 0.9])[:, None] + np.array([0.01, 0.02, 0.05])  # levels + seeds: nothing else
    (row,) = statistics.anova(constant, ["a"])
    assert row["ss"] == pytest.approx(0.06)
    assert (row["F"], row["p"], row["p_gg"]) == (None, None, None)
    assert "same with every seed" in row["why"]
    (nothing,) = statistics.anova(np.full((3, 4), 0.1), ["a"])
    assert (nothing["ss"], nothing["p"], nothing["eta2"], nothing["why"]) == (0, 1.0, None, None)


def test_a_factor_of_one_level_has_no_row():
    table = np.random.default_rng(7).normal(size=(3, 1, 4))
    assert statistics.anova(table, ["a", "b"]) == statistics.anova(table[:, 0], ["a"])


# Friedman, Nemenyi, fronts


@pytest.mark.parametrize("ties", [False, True])
def test_friedman_equals_scipy(ties):
    scores = np.random.default_rng(0).normal(size=(9, 4)) + [0, 0.3, 0.6, 0.9]
    scores = np.round(scores, 0 if ties else 12)
    got, expected = statistics.friedman(scores), stats.friedmanchisquare(*scores.T)
    assert got["statistic"] == pytest.approx(expected.statistic)
    assert got["p"] == pytest.approx(expected.pvalue)
    assert got["ranks"] == pytest.approx((5 - stats.rankdata(scores, axis=1)).mean(axis=0))
    assert got["n"] == 9


def test_friedman_ranks_the_highest_first_and_ties_in_the_mean():
    assert statistics.friedman([[0.9, 0.8, 0.7], [0.9, 0.5, 0.5]])["ranks"] == [1.0, 2.25, 2.75]
    tied = statistics.friedman([[0.1 + 0.2, 0.3, 0.2], [3.0, 3.0, 3.0]])  # equal but for the last bit
    assert tied["ranks"] == [1.75, 1.75, 2.5]
    level = statistics.friedman(np.ones((4, 3)))
    assert (level["statistic"], level["p"]) == (0.0, 1.0)


def test_friedman_leaves_out_incomplete_blocks():
    scores = np.random.default_rng(1).normal(size=(6, 3))
    holes = np.vstack([scores, [[0.5, np.nan, 0.7]]])
    assert statistics.friedman(holes) == statistics.friedman(scores)
    assert statistics.friedman([[None, 0.5]])["statistic"] is None


@pytest.mark.parametrize(
    ("treatments", "five", "ten"),  # Demsar 2006, table 5 (a)
    [(2, 1.960, 1.645), (3, 2.343, 2.052), (4, 2.569, 2.291), (5, 2.728, 2.459), (10, 3.164, 2.920)],
)
def test_nemenyi_quantiles_equal_the_published_table(treatments, five, ten):
    assert statistics.nemenyi_quantile(treatments, 0.95) == pytest.approx(five, abs=1e-3)
    assert statistics.nemenyi_quantile(treatments, 0.90) == pytest.approx(ten, abs=1e-3)


def test_critical_difference_equals_the_published_example():
    """Demsar 2006, section 3.2.3: four classifiers on 14 data sets, 2.569 sqrt(4 * 5 / (6 * 14)) = 1.25."""
    scores = np.random.default_rng(0).normal(size=(14, 4))
    assert statistics.friedman(scores)["critical_difference"] == pytest.approx(1.25, abs=0.005)
    assert statistics.friedman(scores, level=0.9)["critical_difference"] == pytest.approx(1.12, abs=0.005)


def cliques(ranks, limit):
    """All sets of two or more whose pairs all lie closer than the limit, but those inside another such set."""
    sets = [
        set(group)
        for size in range(2, len(ranks) + 1)
        for group in itertools.combinations(range(len(ranks)), size)
        if all(abs(ranks[i] - ranks[j]) < limit for i, j in itertools.combinations(group, 2))
    ]
    return {frozenset(group) for group in sets if not any(group < other for other in sets)}


def test_groups_are_the_maximal_cliques_best_first():
    assert statistics.groups_not_different([3.1, 1.0, 2.0, 2.9], 1.25) == [(1, 2), (2, 3, 0)]
    assert statistics.groups_not_different([1.0, 2.0], 1.0) == []  # at the critical difference they differ
    rng = np.random.default_rng(0)
    for _ in range(100):
        ranks, limit = rng.integers(2, 14, size=rng.integers(1, 8)) / 2, float(rng.choice([0.75, 1.25, 2.25]))
        groups = statistics.groups_not_different(ranks, limit)
        assert {frozenset(group) for group in groups} == cliques(ranks, limit)
        assert len(groups) == len(set(groups))
        assert all(list(ranks[list(group)]) == sorted(ranks[list(group)]) for group in groups)


def test_pareto_equals_comparing_every_pair():
    rng = np.random.default_rng(0)
    for _ in range(100):
        cost, score = rng.integers(0, 6, size=(2, 12)).astype(float)
        score[rng.integers(12)] = cost[rng.integers(12)] = np.nan
        points = list(zip(cost, score, strict=True))
        expected = [
            i
            for i, (c, s) in enumerate(points)
            if not np.isnan(c + s) and not any((x <= c and y >= s) and (x < c or y > s) for x, y in points)
        ]
        front = statistics.pareto(cost, score)
        assert sorted(front) == expected
        assert list(cost[front]) == sorted(cost[front])


# Everything at once


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.mean_interval([[0.5]]), r"shape \(1, 1\), expected \[seeds\]"),
        (lambda: statistics.mean_interval([0.5, float("inf")]), "1 infinite"),
        (lambda: statistics.mean_interval([0.5], level=95), "level=95: expected a number between 0 and 1"),
        (lambda: statistics.paired([1, 2], [1]), "position by position"),
        (lambda: statistics.paired([1, 2], [1, 1], test_share=-0.1), "test_share=-0.1: expected n_test / n_train"),
        (lambda: statistics.holm([0.5, 1.5]), "between 0 and 1"),
        (lambda: statistics.anova(np.ones((2, 3, 4)), ["a"]), r"shape \(2, 3, 4\), expected 1 factors"),
        (lambda: statistics.friedman([[1.0], [2.0]]), r"expected \[blocks, treatments >= 2\]"),
        (lambda: statistics.pareto([1, 2], [1]), r"two of \[points\]"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_answer_is_plain_data():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3, 2, 4))
    answers = [
        statistics.mean_interval(table[0, 0]),
        statistics.paired(table[0, 0], table[0, 1]),
        statistics.holm(np.array([0.1, 0.2])),
        statistics.anova(table, ["a", "b"]),
        statistics.friedman(table[:, 0]),
        statistics.groups_not_different(np.array([1.0, 1.5]), np.float64(1)),
        statistics.pareto(table[0, 0], table[0, 1]),
    ]
    json.dumps(answers)


# How often they err: simulated studies of five seeds


def test_intervals_cover_a_known_effect_at_their_level():
    """Scores with a seed effect shared by both arms, a true difference of 0.03 and its own spread over seeds."""
    rng, covered, wider = np.random.default_rng(0), [], []
    for _ in range(DRAWS):
        seed, (own_a, own_b) = rng.normal(0, 0.05, 5), rng.normal(0, 0.01, (2, 5))
        a, b = 0.83 + seed + own_a, 0.80 + seed + own_b
        difference, mean = statistics.paired(a, b), statistics.mean_interval(a)
        covered.append((difference["low"] <= 0.03 <= difference["high"], mean["low"] <= 0.83 <= mean["high"]))
        wider.append(mean["high"] - mean["low"] > difference["high"] - difference["low"])
    low, high = band(0.95)
    for coverage in np.mean(covered, axis=0):
        assert low <= coverage <= high
    assert np.mean(wider) > 0.95  # what pairing is for


def test_paired_rejects_a_true_null_at_its_level():
    scores = np.random.default_rng(1).normal(0.8, 0.02, (DRAWS, 2, 5))
    low, high = band(0.05)
    assert low <= rejected([statistics.paired(a, b)["p"] for a, b in scores]) <= high


@pytest.mark.slow
def test_holm_keeps_the_family_wise_error_of_eight_true_nulls():
    """Against one shared baseline (dependent tests) at most, and over separate ones about, five per cent of studies."""
    rng, low_high = np.random.default_rng(2), band(0.05)
    scores, baselines = rng.normal(size=(DRAWS, 8, 5)), rng.normal(size=(DRAWS, 8, 5))
    apart, shared, uncorrected = 0, 0, 0
    for arms, against in zip(scores, baselines, strict=True):
        p = [statistics.paired(a, b)["p"] for a, b in zip(arms, against, strict=True)]
        apart += min(statistics.holm(p)) <= 0.05
        uncorrected += min(p) <= 0.05
        shared += min(statistics.holm([statistics.paired(a, against[0])["p"] for a in arms])) <= 0.05
    assert low_high[0] <= apart / DRAWS <= low_high[1]
    assert shared / DRAWS <= low_high[1]
    assert uncorrected / DRAWS > 0.25  # 1 - 0.95^8 = 0.34: what the correction is for


def test_anova_rejects_a_true_null_interaction_at_its_level():
    """Main effects, seed effects and seed x factor interactions are there; the interaction of the factors is not."""
    rng, p, main = np.random.default_rng(3), [], []
    for _ in range(DRAWS):
        table = np.array([0.0, 3.0])[:, None, None] + np.array([0.0, 1.0, 2.0])[None, :, None]
        table = table + rng.normal(size=5) + rng.normal(size=(2, 1, 5)) + rng.normal(size=(1, 3, 5))
        rows = statistics.anova(table + rng.normal(size=(2, 3, 5)), ["blocks", "shots"])
        p.append(rows[2]["p"])
        main.append(rows[0]["p"])
    low, high = band(0.05)
    assert low <= rejected(p) <= high
    assert rejected(main) > 0.5


def pooled_p(table):
    """A main effect of the first of two factors against the residual of the randomised-block design."""
    rest = table - table.mean(axis=(0, 1)) - table.mean(axis=2, keepdims=True) + table.mean()
    mean = table.mean(axis=(1, 2)) - table.mean()
    df, df_error = len(table) - 1, (table[..., 0].size - 1) * (table.shape[-1] - 1)
    ratio = (table[0].size * np.sum(mean**2) / df) / (np.sum(rest**2) / df_error)
    return stats.f.sf(ratio, df, df_error)


def test_own_error_is_nominal_where_seeds_and_levels_interact_and_the_pooled_residual_is_not():
    rng = np.random.default_rng(4)
    tables = rng.normal(size=(DRAWS, 2, 3, 5)) + rng.normal(size=(DRAWS, 2, 1, 5)) + rng.normal(size=(DRAWS, 1, 1, 5))
    low, high = band(0.05)
    assert low <= rejected([statistics.anova(table, ["blocks", "shots"])[0]["p"] for table in tables]) <= high
    assert rejected([pooled_p(table) for table in tables]) > 2 * high


def test_greenhouse_geisser_holds_where_one_level_scatters_more():
    tables = np.random.default_rng(5).normal(size=(DRAWS, 6, 8)) * np.array([6, 1, 1, 1, 1, 1])[:, None]
    rows = [statistics.anova(table, ["shots"])[0] for table in tables]
    high = band(0.05)[1]
    assert rejected([row["p"] for row in rows]) > high
    assert rejected([row["p_gg"] for row in rows]) <= high


def overlapping_resamples(rng, draws, examples=100, resamples=10, test=10):
    """Test errors [draws, resamples, 2] of two learners that are equally good on average, retrained on each resample.

    y = x1 + x2 + noise; one learner regresses on x1, the other on x2. Exchanging the two changes nothing, so the
    expected errors are equal; every resample leaves out `test` of the same examples at random.
    """
    x, noise = rng.normal(size=(draws, examples, 2)), rng.normal(size=(draws, examples, 1))
    y, errors = x.sum(axis=2, keepdims=True) + noise, []
    for _ in range(resamples):
        order = rng.permuted(np.tile(np.arange(examples), (draws, 1)), axis=1)[..., None]
        xs, ys = (np.take_along_axis(values, order, axis=1) for values in (x, y))
        slope = (xs[:, test:] * ys[:, test:]).sum(1, keepdims=True) / (xs[:, test:] ** 2).sum(1, keepdims=True)
        errors.append(((ys[:, :test] - slope * xs[:, :test]) ** 2).mean(axis=1))
    return np.stack(errors, axis=1)


def test_corrected_resampled_test_rejects_less_than_the_naive_one_on_overlapping_resamples():
    errors = overlapping_resamples(np.random.default_rng(6), DRAWS)
    naive = rejected([statistics.paired(*pair.T)["p"] for pair in errors])
    corrected = rejected([statistics.paired(*pair.T, test_share=10 / 90)["p"] for pair in errors])
    high = band(0.05)[1]
    assert naive > high + 0.05
    assert corrected <= high
    assert naive > 2 * corrected
