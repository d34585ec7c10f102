"""What an answer is worth: temperature, sets, out-of-distribution scores and abstention keep their promises."""

import csv
import importlib
import io
import json
import shutil
import time

import numpy as np
import pytest
import scipy
import sklearn.datasets
import sklearn.linear_model
import sklearn.neighbors

import tl_jax
from tl_jax import __main__ as command
from tl_jax import config as options
from tl_jax.api import calibration
from tl_jax.tasks import Spec, answers, make_predictions, outliers, trust
from tl_jax.training import train

DIGITS = sklearn.datasets.load_digits()
LABELS = DIGITS.target
TASKS = ("classification", "binary", "multilabel", "regression")


def make(task, count=300, seed=0, classes=4, width=6, noise=2.0):
    """Predictions of a network that is too sure of itself, with features that tell its classes apart."""
    rng = np.random.default_rng(seed)
    names = tuple("abcdefghij"[:classes])
    ids = [f"{seed}/{i}" for i in range(count)]
    if task == "regression":
        y = rng.normal(50, 10, (count, 2))
        out, spec = (
            {"values": y + rng.normal(0, [1, 4], (count, 2))},
            Spec(task, ("x", "y"), (50.0, 50.0), (10.0, 10.0)),
        )
    elif task == "multilabel":
        y = (rng.random((count, classes)) < 0.4).astype(int)
        out, spec = {"logits": 4 * (2 * y - 1) + noise * 3 * rng.normal(size=y.shape)}, Spec(task, names)
    elif task == "binary":
        y = rng.integers(2, size=count)
        out, spec = (
            {"logits": 3 * (2 * y - 1) + noise * 3 * rng.normal(size=count)},
            Spec(task, ("no", "yes"), threshold=0.4),
        )
    else:
        y = rng.integers(classes, size=count)
        out, spec = (
            {"logits": 6 * np.eye(classes)[y] + noise * 2 * rng.normal(size=(count, classes))},
            Spec(task, names),
        )
    first = np.reshape(y, (count, -1))[:, 0]
    features = rng.normal(size=(count, width)) @ np.diag(np.arange(1, width + 1)) + 5 * np.stack(
        [np.cos(first + k) for k in range(width)], 1
    )
    return make_predictions(out, y, ids, spec, features)


def fitted(task, **options):
    return trust.fit(make(task), make(task, 200, 1), **options)


def truth(p):
    """The names that a set has to hold, example by example."""
    names = p.spec.class_names
    if p.labels.ndim == 1:
        return [{names[y]} for y in p.labels]
    return [{name for name, y in zip(names, row, strict=True) if y} for row in p.labels]


@pytest.mark.parametrize("task", TASKS[:3])
def test_the_temperature_has_the_lowest_nll_by_an_independent_search(task):
    p = make(task)
    z, y = p.values.astype(np.float64), p.labels

    def nll(t):
        if task == "classification":
            return -scipy.special.log_softmax(z / t, axis=1)[np.arange(len(y)), y].mean()
        return -np.where(y == 1, scipy.special.log_expit(z / t), scipy.special.log_expit(-z / t)).mean()

    best = scipy.optimize.minimize_scalar(
        lambda log_t: nll(np.exp(log_t)), bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}
    )
    found = trust.fit_temperature(p)
    assert found == pytest.approx(np.exp(best.x), rel=1e-5) and found > 1.5
    assert nll(found) <= best.fun + 1e-12


def test_a_network_without_mistakes_keeps_its_temperature():
    p = make("classification", noise=0.1)
    assert trust.correct(p).all() and trust.fit_temperature(p) == 1
    backwards = p._replace(outputs={"logits": -p.values})
    assert trust.fit_temperature(backwards) == 1


def least_class_probability(p):
    """Of the true class or labels, from the plain outputs, in float64."""
    z = p.values.astype(np.float64)
    if p.spec.name == "classification":
        return scipy.special.softmax(z, axis=1)[np.arange(len(z)), p.labels]
    q = 1 / (1 + np.exp(-z))
    return np.where(p.labels == 1, q, 1 - q) if p.spec.name == "binary" else np.where(p.labels == 1, q, 1.0).min(axis=1)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("task", TASKS[:3])
def test_a_set_holds_the_answer_and_what_conforms_as_well_as_the_kth_example(task, coverage):
    val, new = make(task), make(task, 200, 2)
    k = next(k for k in range(1, 301) if k >= 301 * coverage - 1e-9)
    level = np.sort(1 - least_class_probability(val))[k - 1]
    z = new.values.astype(np.float64)
    q = scipy.special.softmax(z, axis=1) if task == "classification" else 1 / (1 + np.exp(-z))
    q = np.stack([1 - q, q], axis=1) if task == "binary" else q
    found = trust.judge(fitted(task, coverage=coverage), new.outputs, new.features, new.spec)
    said = answers.answers(new.spec, new.outputs)
    for p, row, answer in zip(q, found, said, strict=True):
        own = set(answer["labels"]) if task == "multilabel" else {answer["class"]}
        names = new.spec.class_names
        assert set(row["set"]) == own | {name for name, x in zip(names, p, strict=True) if 1 - x <= level + 1e-9}
        assert [names.index(name) for name in row["set"]] == sorted(
            (names.index(n) for n in row["set"]), key=lambda c: -p[c]
        )


def test_sets_of_aps_are_the_most_probable_classes_up_to_the_level():
    new, found = make("classification", 400, 2), fitted("classification", sets="aps")
    p = np.sort(scipy.special.softmax(new.values.astype(np.float64), axis=1))[:, ::-1]
    order = np.argsort(-new.values, axis=1)
    for row, mass, names in zip(trust.judge(found, new.outputs, new.features, new.spec), p, order, strict=True):
        size = len(row["set"])
        assert row["set"] == ["abcd"[k] for k in names[:size]]
        assert (
            mass[:size].sum() - mass[size - 1 : size].sum() <= found.quantile[0] + 1e-6
        )  # without the last, which is random
        assert mass[: size + 1].sum() >= found.quantile[0] - 1e-6  # with the next
    uniform = trust._uniform(np.random.default_rng(0).normal(size=(20_000, 10)))
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 0.01
    logits = 10 * np.random.default_rng(1).normal(size=(2000, 10))
    rounded = logits * (1 + 1e-7 * np.random.default_rng(2).normal(size=logits.shape))
    moved = np.abs(trust._uniform(rounded) - trust._uniform(logits))
    assert 0 < moved.max() < 0.02  # a draw that another machine rounds otherwise is nearly the same


@pytest.mark.parametrize("splits", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_sets_of_500_examples_hold_the_truth_as_often_as_they_say(splits):
    """Of a logistic regression on noisy digits, through `fit` and `judge`."""
    rng = np.random.default_rng(0)
    x = DIGITS.data + rng.normal(0, 8, DIGITS.data.shape)
    model = sklearn.linear_model.LogisticRegression(C=1e-3, max_iter=500).fit(x[:400], LABELS[:400])
    spec, logits = Spec(class_names=tuple(map(str, range(10)))), model.decision_function(x[400:]).astype(np.float32)
    pool = make_predictions({"logits": 2 * logits}, LABELS[400:], np.arange(len(logits)), spec)
    held = {("aps", 0.9): [], ("aps", 0.7): [], ("lac", 0.9): []}
    for _ in range(splits):
        order = rng.permutation(len(logits))
        val, new = pool.select(order[:500]), pool.select(order[500:])
        for (sets, coverage), found in held.items():
            rows = trust.judge(trust.fit(val, sets=sets, coverage=coverage, ood="none"), new.outputs, None, spec)
            found.append(np.mean([own <= set(row["set"]) for own, row in zip(truth(new), rows, strict=True)]))
    means = {key: 100 * (np.mean(found) - key[1]) for key, found in held.items()}
    print({key: f"{x:+.2f} points" for key, x in means.items()}, f"accuracy {trust.correct(pool).mean():.3f}")
    assert all(-0.5 <= x <= 1.5 for x in means.values())


def test_the_intervals_of_a_regression_hold_each_target_as_often_as_they_say():
    val, new = make("regression", 999), make("regression", 4000, 2)
    rows = trust.judge(trust.fit(val, ood="none", coverage=0.8), new.outputs, None, new.spec)
    k = 800  # of 999: ceil(1000 * 0.8)
    half = np.sort(np.abs(val.values.astype(np.float64) - val.labels), axis=0)[k - 1]
    for t, name in enumerate("xy"):
        ends = np.array([row["interval"][name] for row in rows])
        np.testing.assert_allclose(ends, new.values[:, t, None] + half[t] * np.array([-1, 1]), rtol=1e-6)
        assert np.mean((ends[:, 0] <= new.labels[:, t]) & (new.labels[:, t] <= ends[:, 1])) == pytest.approx(
            0.8, abs=0.03
        )
    assert set(rows[0]) == {"interval", "abstain"}


def shrunk(x):
    """Ledoit and Wolf 2004, equations of section 3.2, in plain float64."""
    n, d = x.shape
    s = x.T @ x / n
    mean = np.trace(s) / d
    spread = np.sum((s - mean * np.eye(d)) ** 2)
    error = min(spread, sum(np.sum((np.outer(row, row) - s) ** 2) for row in x) / n**2)
    return error / spread * mean * np.eye(d) + (1 - error / spread) * s


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_mahalanobis_is_that_of_plain_float64(task):
    train, new = make(task, 200, 1), make(task, 50, 2)
    x, z = (
        p.features.astype(np.float64) / np.linalg.norm(p.features.astype(np.float64), axis=1, keepdims=True)
        for p in (train, new)
    )
    group = train.labels if task == "classification" else np.zeros(200, int)
    means = {c: x[group == c].mean(axis=0) for c in set(group.tolist())}
    inverse = np.linalg.inv(shrunk(x - np.stack([means[c] for c in group.tolist()])))
    expected = [min((row - mean) @ inverse @ (row - mean) for mean in means.values()) for row in z]
    found = outliers.score(outliers.fit("mahalanobis", train), new.values, new.features)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_mahalanobis_of_many_examples_is_that_of_scikit_learn():
    from sklearn.covariance import EmpiricalCovariance

    train, new = make("regression", 20_000, 1), make("regression", 50, 2)
    x, z = (p.features / np.linalg.norm(p.features, axis=1, keepdims=True) for p in (train, new))
    found = outliers.score(outliers.fit("mahalanobis", train), new.values, new.features)
    np.testing.assert_allclose(found, EmpiricalCovariance().fit(x).mahalanobis(z), rtol=2e-2)


def test_knn_and_energy_are_those_of_the_references():
    train, new = make("classification", 700, 1), make("classification", 1500, 2)
    x, z = (p.features / np.linalg.norm(p.features, axis=1, keepdims=True) for p in (train, new))
    expected = (
        sklearn.neighbors.NearestNeighbors(n_neighbors=5)
        .fit(x.astype(np.float64))
        .kneighbors(z.astype(np.float64))[0][:, -1]
    )
    np.testing.assert_allclose(
        outliers.score(outliers.fit("knn", train), new.values, new.features), expected, atol=1e-6
    )
    expected = -np.log(np.exp(new.values.astype(np.float64)).sum(axis=1))
    np.testing.assert_allclose(outliers.score(outliers.fit("energy", None), new.values, None), expected, rtol=1e-6)


@pytest.mark.parametrize("ood", ["mahalanobis", "knn", "energy"])
def test_the_threshold_keeps_its_share_and_finds_what_is_far(ood):
    found, new = fitted("classification", ood=ood, keep=0.8), make("classification", 2000, 2)
    rows = trust.judge(found, new.outputs, new.features, new.spec)
    assert np.mean([row["ood"] for row in rows]) == pytest.approx(0.2, abs=0.05)
    far = trust.judge(found, {"logits": 0 * new.values}, np.ones_like(new.features) * [1, 0, 0, 0, 0, 0], new.spec)
    assert np.mean([row["ood"] for row in far]) > 0.9
    if ood != "energy":
        assert all(row["ood"] for row in trust.judge(found, new.outputs, np.nan * new.features, new.spec))


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_judged_alike_alone_in_a_batch_and_from_the_file(task, tmp_path):
    new, sets = make(task, 60, 2), "aps" if task in TASKS[:2] else "lac"
    found = fitted(task, sets=sets)
    trust.save(tmp_path / "trust.npz", found)
    rows = trust.judge(found, new.outputs, new.features, new.spec)
    again = trust.load(tmp_path / "trust.npz")
    assert json.loads(json.dumps(rows)) == rows == trust.judge(again, new.outputs, new.features, new.spec)
    assert trust.fit(make(task), make(task, 200, 1), sets=sets).threshold == found.threshold
    for i, row in enumerate(rows):
        one = {name: x[i : i + 1] for name, x in new.outputs.items()}
        (alone,) = trust.judge(again, one, new.features[i : i + 1], new.spec)
        assert alone.pop("ood_score") == pytest.approx(row.pop("ood_score"), rel=1e-4)
        assert alone == row


def test_abstaining_follows_the_reasons_that_were_chosen():
    new = make("classification", 400, 2)
    for reasons in ((), ("ood",), ("set",), ("ood", "set")):
        rows = trust.judge(fitted("classification", abstain=reasons), new.outputs, new.features, new.spec)
        expected = [("ood" in reasons and row["ood"]) or ("set" in reasons and len(row["set"]) > 1) for row in rows]
        assert [row["abstain"] for row in rows] == expected
        assert any(expected) == bool(reasons) and not all(expected)


def test_the_curve_is_the_accuracy_of_the_most_confident():
    p, found = make("classification"), fitted("classification")
    confidence = scipy.special.softmax(p.values / found.temperature, axis=1).max(axis=1)
    for share, accuracy in found.curve:
        kept = np.argsort(-confidence)[: int(np.ceil(share * 300))]
        assert accuracy == pytest.approx(np.mean(p.values[kept].argmax(axis=1) == p.labels[kept]))
    assert found.curve[0].tolist() == [1, trust.correct(p).mean()] and found.curve[-1, 1] > found.curve[0, 1]


def test_the_report_has_the_numbers_of_the_rows():
    for task in TASKS:
        new, found = make(task, 500, 2), fitted(task)
        rows, seen = trust.judge(found, new.outputs, new.features, new.spec), calibration.measure([(found, new)])
        assert seen["abstain"] == np.mean([row["abstain"] for row in rows])
        assert seen["ood"] == np.mean([row["ood"] for row in rows])
        if task == "regression":
            inside = [
                low <= y <= high
                for (low, high), y in zip([r["interval"]["y"] for r in rows], new.labels[:, 1], strict=True)
            ]
            assert seen["coverage"]["y"] == np.mean(inside)
            continue
        held = [own <= set(row["set"]) for own, row in zip(truth(new), rows, strict=True)]
        if task == "classification":
            summary = tl_jax.summarize(new, resamples=1)
            assert (seen["nll"][0], seen["ece"][0]) == pytest.approx((summary["nll"]["value"], summary["ece"]["value"]))
        assert seen["coverage"] == np.mean(held) and seen["size"] == np.mean([len(row["set"]) for row in rows])
        assert seen["nll"][1] < seen["nll"][0] and seen["ece"][1] < seen["ece"][0]


def test_folds_keep_groups_whole_and_are_none_where_they_would_be_too_small():
    found, val = fitted("classification"), make("classification")
    groups = np.repeat([f"g{i}" for i in range(60)], 5)
    pairs = calibration._folds(found, val._replace(groups=groups))
    ids = [set(groups[np.isin(val.ids, p.ids)]) for _, p in pairs]
    assert len(pairs) == 5 and sum(map(len, ids)) == len(set().union(*ids)) == 60
    assert sorted(np.concatenate([p.ids for _, p in pairs])) == sorted(val.ids)
    for each, p in pairs:  # nothing of a fold decides about it
        others = val.select(~np.isin(val.ids, p.ids))
        again = trust.fit(others, make("classification", 200, 1))
        assert (each.temperature, each.quantile, each.threshold) == (again.temperature, again.quantile, again.threshold)
    assert calibration._folds(found, val.select(np.arange(22))) == []


def test_training_features_need_no_labels():
    train = make("classification", 200, 1)._replace(labels=None)
    reference = outliers.fit("mahalanobis", train)
    assert reference.points.shape == (1, 6)


def test_rows_of_every_task_fit_a_table():
    names = {}
    for task in TASKS:
        new = make(task, 3, 2)
        rows = trust.judge(fitted(task), new.outputs, new.features, new.spec)
        text = io.StringIO()
        answers.write_csv([a | b for a, b in zip(answers.answers(new.spec, new.outputs), rows, strict=True)], text)
        names[task] = next(csv.reader(io.StringIO(text.getvalue())))
        assert len(set(names[task])) == len(names[task])
    assert names["regression"] == ["x", "y", "x_low", "x_high", "y_low", "y_high", "ood_score", "ood", "abstain"]
    assert names["binary"][-5:] == ["calibrated", "set", "ood_score", "ood", "abstain"]
    assert {"a", "a_calibrated"} <= set(names["multilabel"])


def test_what_cannot_be_fitted_or_judged_is_one_message_with_all_of_it():
    val, train = make("multilabel", 8), make("multilabel", 50, 1)
    with pytest.raises(ValueError) as error:
        trust.fit(val, train, coverage=1.5, sets="aps", ood="energy", abstain=("never",))
    for part in ("coverage=1.5", "sets='aps'", "ood='energy'", "abstain=('never',)", "8 examples, at least 19"):
        assert part in str(error.value)
    for count, coverage, enough in (
        (8, 0.9, False),
        (9, 0.9, True),
        (18, 0.95, False),
        (19, 0.95, True),
        (98, 0.99, False),
    ):
        if enough:
            trust.fit(make("binary", count), ood="none", coverage=coverage)
            continue
        with pytest.raises(ValueError, match=f"{count} examples, at least {count + 1} are needed"):
            trust.fit(make("binary", count), ood="none", coverage=coverage)
    val = make("classification")
    for wrong, text in (
        ((val, None), "features of train; found none"),
        ((val, train._replace(features=0 * train.features)), "all alike"),
        ((val._replace(features=None), train), "features \\[300, 6\\], found none"),
        ((val._replace(features=val.features[:, :5]), train), "found \\[300, 5\\]"),
        ((val._replace(labels=None), train), "sealed"),
    ):
        with pytest.raises(ValueError, match=text):
            trust.fit(*wrong)
    with pytest.raises(ValueError, match="trust was fitted for classification of a, b, c, d, found binary"):
        trust.judge(fitted("classification"), {"logits": np.zeros(1)}, None, make("binary").spec)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small network on the pixels of digits as a table: 96 rows to train on, 104 to choose, 100 to test."""
    folder = tmp_path_factory.mktemp("table")
    splits = np.repeat(["train", "val", "test"], [96, 104, 100])
    lines = [",".join([f"p{i}" for i in range(64)] + ["y", "split"])]
    lines += [
        ",".join([*map(str, x), f"d{y}", split]) for x, y, split in zip(DIGITS.data, LABELS, splits, strict=False)
    ]
    (folder / "digits.csv").write_text("\n".join(lines) + "\n")
    changes = {
        "model.name": "mlp_small", "model.head_init": "lecun", "data.source": f"table:{folder}/digits.csv",
        "data.labels": ("y",), "data.train": "train", "data.val": "val", "data.test": "test", "method.name": "logistic",
        "resamples": 5,
    }  # fmt: skip
    train.train(options.override(options.make(), changes), folder / "w", verbose=False)
    return tl_jax.load_run(folder / "w")


def test_a_run_is_calibrated_on_its_own_val_and_its_answers_say_so(run, capsys):
    rows = DIGITS.data[300:305].astype(np.float32)
    plain = run.predict(rows)
    assert command.main(["calibrate", str(run.folder), "--coverage", "0.8"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[:-1])) <= 80  # the last has the path
    assert "fitted on val, 104 examples" in text and "measured on test, 100 examples" in text
    assert "val chose the probe (method.grid)" in " ".join(text.split())
    for row, before in zip(run.predict(rows), plain, strict=True):
        assert {name: row[name] for name in before} == before
        assert list(row)[len(before) :] == ["calibrated", "set", "ood_score", "ood", "abstain"]
    assert run.trust.coverage == 0.8 and run.trust.count == 104
    report = run.calibrate(split="test", ood="knn")
    assert report["measured"]["on"] == "test, in 5 folds" and report["measured"]["count"] == 100
    np.savez(run.folder / "trust.npz", x=1)
    with pytest.raises(ValueError, match=r"trust\.npz: no sound trust\.npz"):
        run.predict(rows)
    trust.save(run.folder / "trust.npz", fitted("classification"))
    with pytest.raises(ValueError, match="other weights"):
        run.predict(rows)
    for arguments, part in (
        (["--split", "train"], "--split train: expected a labelled split that is not trained on: val, test"),
        (["--coverage", "0.995"], "104 examples, at least 199 are needed"),
        (["--abstain", "set,x"], "--abstain 'set,x'"),
    ):
        assert command.main(["calibrate", str(run.folder), *arguments]) == 2
        assert part in capsys.readouterr().err
    (run.folder / "trust.npz").unlink()
    assert run.trust is None


@pytest.mark.slow
def test_one_example_is_judged_within_a_millisecond():
    val, train = make("classification", 1000, width=512), make("classification", 10_000, 1, width=512)
    one = {"logits": val.values[:1]}
    for ood in ("mahalanobis", "knn"):
        found, seconds = trust.fit(val, train, ood=ood), []
        for _ in range(200):
            start = time.perf_counter()
            trust.judge(found, one, val.features[:1], val.spec)
            seconds.append(time.perf_counter() - start)
        print(ood, f"{1e3 * min(seconds):.3f} ms, median {1e3 * np.median(seconds):.3f} ms")
        assert min(seconds) < 1e-3  # what else runs on the machine does not count


@pytest.mark.slow
@pytest.mark.parametrize("config", ["parity", "digit_pairs", "ink_regression", "diabetes", "smoke"])
def test_runs_of_every_task_are_calibrated(config, tmp_path, capsys):
    changes = {"total": (20.0, "steps"), "resamples": 5, "select": "last", "patience": 0, "min_delta": 0.0}
    train.train(
        options.override(importlib.import_module(f"configs.{config}").get_config(), changes),
        tmp_path / "w",
        verbose=False,
    )
    run = tl_jax.load_run(tmp_path / "w")
    report = run.calibrate(coverage=0.8)
    assert all(len(line) <= 80 for line in calibration.format_report(report)[:-1])
    assert json.loads(json.dumps(report)) == report
    shutil.rmtree(tmp_path / "w")
