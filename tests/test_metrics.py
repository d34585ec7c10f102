"""Metrics equal scikit-learn and plain float64 numpy; the weighted bootstrap equals scikit-learn on resampled data."""

import json
import re

import numpy as np
import pytest
import sklearn.metrics as sk

from tl_jax import __main__ as command
from tl_jax import tasks
from tl_jax.core import files
from tl_jax.tasks import classification, intervals


def make(logits, labels, ids, class_names, features=None):
    """Checked predictions of a classification."""
    return tasks.make_predictions({"logits": logits}, labels, ids, tasks.Spec(class_names=tuple(class_names)), features)


def with_logits(predictions, logits):
    return predictions._replace(outputs={"logits": logits})


def draw(count=300, classes=4, seed=0, absent=(), ties=False):
    """Predictions that are right more often than not; some classes may have no examples, some scores be equal."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.setdiff1d(np.arange(classes), absent), size=count)
    logits = rng.normal(size=(count, classes)) * 2
    logits[np.arange(count), labels] += 2
    if ties:
        logits = logits[rng.integers(8, size=count)]  # few different rows: equal scores are equal to the last bit
    ids = [f"image{i}" for i in range(count)]
    return make(logits, labels, ids, [f"class{k}" for k in range(classes)])


def probabilities(predictions):
    logits = predictions.values.astype(np.float64)
    exponent = np.exp(logits - logits.max(1, keepdims=True))
    return exponent / exponent.sum(1, keepdims=True)


def reference_ece(labels, probability, bins=15):
    """Guo et al. 2017, equation 3, as a loop over bins (m/M, (m+1)/M]."""
    confidence, hit, error = probability.max(1), probability.argmax(1) == labels, 0.0
    for m in range(bins):
        inside = (confidence > m / bins) & (confidence <= (m + 1) / bins)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    return error


def reference(predictions, index):
    """All metrics of a physically resampled data set, by scikit-learn and loops."""
    labels, probability = predictions.labels[index], probabilities(predictions)[index]
    classes, predicted = range(probability.shape[1]), predictions.values.argmax(1)[index]
    present = np.unique(labels)
    macro = sk.precision_recall_fscore_support(labels, predicted, labels=present, average="macro", zero_division=0)
    micro = sk.precision_recall_fscore_support(labels, predicted, labels=classes, average="micro", zero_division=0)
    each = sk.precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0)
    names, result = ("precision", "recall", "f1"), {"accuracy": sk.accuracy_score(labels, predicted)}
    result |= {f"{name}_macro": value for name, value in zip(names, macro[:3], strict=True)}
    result |= {f"{name}_micro": value for name, value in zip(names, micro[:3], strict=True)}
    result |= {n: np.where(np.isin(classes, present), v, np.nan) for n, v in zip(names, each[:3], strict=True)}
    defined = [k for k in present if (labels != k).any()]
    auc = np.full(len(classes), np.nan)
    auc[defined] = [sk.roc_auc_score(labels == k, probability[:, k]) for k in defined]
    result |= {"roc_auc": auc, "roc_auc_macro": np.mean(auc[defined]) if defined else np.nan}
    result |= {"nll": sk.log_loss(labels, probability, labels=classes), "ece": reference_ece(labels, probability)}
    if len(classes) > 5:
        result["top5"] = sk.top_k_accuracy_score(labels, probability, k=5, labels=classes)
    return result


CASES = {
    "four": {},
    "two classes": {"classes": 2},
    "seven": {"classes": 7},
    "absent classes": {"classes": 6, "absent": (1, 4), "count": 40},
    "tied scores": {"classes": 3, "ties": True},
    "classes missing in resamples": {"classes": 5, "count": 12},
}


@pytest.mark.parametrize("groups", [None, np.array([0, 0, 1, 2, 2, 2])])
def test_every_example_is_drawn_as_often_as_any_other(groups):
    weights = np.concatenate([*intervals.resample(6, 5000, 0, groups)], axis=1)
    np.testing.assert_allclose(weights.mean(axis=1), 1, atol=0.07)  # five standard errors: sqrt(1 / 5000)
    np.testing.assert_allclose(weights.std(axis=1), np.sqrt(1 - 1 / (6 if groups is None else 3)), atol=0.07)


@pytest.mark.thin(1)
@pytest.mark.thin(3)
@pytest.mark.parametrize("case", CASES)
def test_weighted_metrics_equal_sklearn_on_physically_resampled_data(case):
    predictions = draw(**CASES[case])
    count = len(predictions.labels)
    weights = next(intervals.resample(count, 25, seed=1))
    got = classification._weighted(predictions, weights) | classification._weighted_auc(predictions, weights)
    for column in range(weights.shape[1]):
        index = np.repeat(np.arange(count), weights[:, column].astype(int))
        assert len(index) == count
        expected = reference(predictions, index)
        assert set(expected) == set(got)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name][column], value, rtol=1e-5, atol=1e-6, err_msg=f"{name}, {column}")


@pytest.mark.parametrize("case", CASES)
def test_point_estimates_equal_sklearn(case):
    predictions = draw(**CASES[case])
    summary = tasks.summarize(predictions, resamples=20)
    expected = reference(predictions, np.arange(len(predictions.labels)))
    for name, value in expected.items():
        if np.ndim(value) == 0:
            assert summary[name]["value"] == pytest.approx(value, rel=1e-9), name
        else:
            got = [np.nan if row[name]["value"] is None else row[name]["value"] for row in summary["per_class"]]
            np.testing.assert_allclose(got, value, rtol=1e-9, err_msg=name)
    assert summary["count"] == len(predictions.labels) == np.sum(summary["confusion"])
    matrix = sk.confusion_matrix(
        predictions.labels, predictions.values.argmax(1), labels=range(len(summary["confusion"]))
    )
    assert np.array_equal(summary["confusion"], matrix)
    assert [row["support"] for row in summary["per_class"]] == np.sum(summary["confusion"], axis=1).tolist()
    assert ("top5" in summary) == (len(summary["per_class"]) > 5)


def test_macro_auc_equals_sklearns_one_vs_rest():
    predictions = draw(classes=5)
    expected = sk.roc_auc_score(predictions.labels, probabilities(predictions), multi_class="ovr", average="macro")
    assert tasks.summarize(predictions, resamples=2)["roc_auc_macro"]["value"] == pytest.approx(expected, rel=1e-9)


def test_nll_and_auc_survive_saturated_probabilities():
    """Logits of +-1000: probabilities are 0 and 1 in floats, the log-likelihood is still the logit difference."""
    logits = np.array([[1000.0, -1000.0], [900.0, -900.0], [-1000.0, 1000.0]])
    predictions = make(logits, [0, 1, 1], list("abc"), "xy")
    summary = tasks.summarize(predictions, resamples=2)
    assert summary["nll"]["value"] == pytest.approx(1800 / 3)
    assert [row["roc_auc"]["value"] for row in summary["per_class"]] == [1.0, 1.0]


def test_accuracy_interval_agrees_with_the_binomial_one():
    predictions = draw(count=2000)
    entry = tasks.summarize(predictions, resamples=2000)["accuracy"]
    spread = 1.96 * np.sqrt(entry["value"] * (1 - entry["value"]) / 2000)
    assert entry["low"] == pytest.approx(entry["value"] - spread, abs=0.1 * spread)
    assert entry["high"] == pytest.approx(entry["value"] + spread, abs=0.1 * spread)


def test_interval_covers_the_truth_as_often_as_its_level_says():
    truth, covered = 0.7, 0
    rng = np.random.default_rng(0)
    for seed in range(200):
        hit = rng.random(100) < truth
        predictions = make(np.eye(2)[hit.astype(int)], np.ones(100, int), np.arange(100), "ab")
        samples = [classification._weighted(predictions, w)["accuracy"] for w in intervals.resample(100, 300, seed)]
        entry = intervals.interval(hit.mean(), np.concatenate(samples), 0.9)
        covered += entry["low"] <= truth <= entry["high"]
    assert 0.84 <= covered / 200 <= 0.95


def test_intervals_are_reproducible_and_change_with_the_seed_only():
    predictions = draw()
    first, again, other = (tasks.summarize(predictions, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert first == again and first["accuracy"]["value"] == other["accuracy"]["value"] and first["nll"] != other["nll"]


def test_chunks_do_not_change_the_intervals(monkeypatch):
    predictions = draw(count=101)
    whole = tasks.summarize(predictions, resamples=50)
    monkeypatch.setattr(intervals, "CHUNK", 700)
    chunked = tasks.summarize(predictions, resamples=50)
    for name, entry in whole.items():
        if isinstance(entry, dict):
            assert chunked[name] == pytest.approx(entry, rel=1e-9), name


def test_order_of_examples_does_not_change_the_point_estimates():
    predictions = draw(classes=7)
    order = np.random.default_rng(0).permutation(len(predictions.labels))
    shuffled = predictions._replace(labels=predictions.labels[order], ids=predictions.ids[order])
    shuffled = with_logits(shuffled, predictions.values[order])
    a, b = tasks.summarize(predictions, resamples=2), tasks.summarize(shuffled, resamples=2)
    assert all(a[k]["value"] == pytest.approx(b[k]["value"], rel=1e-12) for k in a if isinstance(a[k], dict))


def test_absent_classes_are_none_and_leave_the_macro_averages_alone():
    predictions = draw(classes=5, absent=(2,))
    summary = tasks.summarize(predictions, resamples=30)
    undefined = {"value": None, "low": None, "high": None}
    row = summary["per_class"][2]
    assert row["support"] == 0 and all(row[name] == undefined for name in ("precision", "recall", "f1", "roc_auc"))
    others = [row["f1"]["value"] for k, row in enumerate(summary["per_class"]) if k != 2]
    assert summary["f1_macro"]["value"] == pytest.approx(np.mean(others))


def test_a_single_class_has_no_auc_and_warns_nothing():
    predictions = make(np.eye(3), [1, 1, 1], list("abc"), "xyz")
    summary = tasks.summarize(predictions, resamples=10)
    assert summary["roc_auc_macro"]["value"] is None and summary["accuracy"]["value"] == pytest.approx(1 / 3)


def test_summary_is_plain_json():
    summary = tasks.summarize(draw(classes=6, absent=(0,)), resamples=10)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.thin(1)
@pytest.mark.parametrize("metric", ["accuracy", "nll", "f1_macro", "roc_auc_macro", "ece"])
def test_paired_difference_equals_resampling_both_runs_alike(metric):
    a, b = draw(count=60, seed=0), draw(count=60, seed=0)
    b = with_logits(b, b.values + np.random.default_rng(1).normal(size=b.values.shape).astype("f4"))
    got = tasks.paired_difference(a, b, metric=metric, resamples=40, seed=3)
    weights = next(intervals.resample(60, 40, 3))
    indices = [np.repeat(np.arange(60), column.astype(int)) for column in weights.T]
    samples = [reference(a, index)[metric] - reference(b, index)[metric] for index in indices]
    everything = np.arange(60)
    assert got["value"] == pytest.approx(reference(a, everything)[metric] - reference(b, everything)[metric], abs=1e-6)
    assert [got["low"], got["high"]] == pytest.approx(np.quantile(samples, [0.025, 0.975]), abs=1e-6)


def test_paired_difference_matches_examples_by_id():
    a, b = draw(seed=0), draw(seed=0)
    b = with_logits(b, b.values * np.float32(0.5))
    order = np.random.default_rng(0).permutation(len(b.labels))
    shuffled = with_logits(b, b.values[order])._replace(labels=b.labels[order], ids=b.ids[order])
    expected = tasks.paired_difference(a, b, metric="nll")
    assert tasks.paired_difference(a, shuffled, metric="nll") == expected
    assert tasks.paired_difference(a, a, metric="nll") == {"value": 0, "low": 0, "high": 0}


def test_paired_interval_is_narrower_than_the_unpaired_one_for_similar_models():
    a = draw(count=1000)
    b = with_logits(a, a.values + np.random.default_rng(1).normal(size=a.values.shape, scale=0.3).astype("f4"))
    paired = tasks.paired_difference(a, b)
    single = tasks.summarize(a, resamples=500)["accuracy"]
    assert paired["high"] - paired["low"] < 0.7 * (single["high"] - single["low"])


def test_paired_difference_refuses_other_examples_labels_or_metrics():
    a = draw()
    with pytest.raises(ValueError, match=r"same examples; 2 are in one: \['image0', 'other'\]"):
        tasks.paired_difference(a, a._replace(ids=np.array(["other", *a.ids[1:]])))
    with pytest.raises(ValueError, match="same classes and labels"):
        tasks.paired_difference(a, a._replace(labels=(a.labels + 1) % 4))
    with pytest.raises(ValueError, match=r"unknown metric 'acc' .*; known: .*accuracy.*roc_auc_macro"):
        tasks.paired_difference(a, a, metric="acc")
    with pytest.raises(ValueError, match="resamples=0"):
        tasks.summarize(a, resamples=0)


@pytest.mark.parametrize("features", [None, np.ones((300, 8))])
def test_predictions_round_trip_through_the_file(tmp_path, features):
    a = draw()
    path = tmp_path / "predictions.npz"
    a = a._replace(features=features)
    tasks.save_predictions(path, a)
    b = tasks.load_predictions(path)
    assert np.array_equal(a.values, b.values) and np.array_equal(a.labels, b.labels) and np.array_equal(a.ids, b.ids)
    assert a.spec == b.spec and (b.features is None) == (features is None)
    assert (b.values.dtype, b.labels.dtype, b.ids.dtype.kind) == (np.float32, np.int32, "U")
    with np.load(path) as file:
        expected = {"logits", "labels", "ids", "class_names", "task"} | (set() if features is None else {"features"})
        assert set(file.files) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.npz"]


def test_everything_wrong_with_predictions_comes_in_one_message():
    logits = np.zeros((4, 3))
    logits[1, 2] = np.nan
    with pytest.raises(ValueError) as error:
        make(logits, [0, 1, 2, 3], ["a", "a", "b", "c"], ["x", "y"], np.zeros((3, 2)))
    message = str(error.value)
    for part in ("1 rows of logits are not finite, first [1]", "span 0..3, expected 0..2", "3 different ids"):
        assert part in message
    assert "2 class names, expected 3" in message and "features have shape (3, 2), expected [4, D]" in message
    with pytest.raises(ValueError, match="float64"):
        make(np.zeros((2, 3)), [0.0, 1.0], list("ab"), "xyz")
    with pytest.raises(ValueError, match=re.escape("shape (0, 3)")):
        make(np.zeros((0, 3)), [], [], "xyz")


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 cut", b"hello", "npz"])
def test_file_that_holds_no_predictions_is_one_error_that_names_it(tmp_path, contents):
    path = tmp_path / "p.npz"
    if contents == "npz":
        with files.atomic_write(path) as file:
            np.savez(file, logits=np.zeros((2, 2)))
    else:
        path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"p\.npz: no sound predictions"):
        tasks.load_predictions(path)
    with pytest.raises(FileNotFoundError):
        tasks.load_predictions(tmp_path / "none.npz")


def test_command_prints_the_numbers_of_summarize(tmp_path, capsys):
    a, path = draw(classes=30), tmp_path / "predictions.npz"
    a = a._replace(spec=tasks.Spec(class_names=tuple(f"class [red{k}]" for k in range(30))))
    tasks.save_predictions(path, a)
    command.main(["metrics", str(path), "--resamples", "30", "--json"])
    summary = json.loads(capsys.readouterr().out)
    assert summary == tasks.summarize(a, resamples=30)
    command.main(["metrics", str(path), "--resamples", "30"])
    text = capsys.readouterr().out
    assert f"{summary['accuracy']['value']:.4f}" in text and "the 20 of 30 classes with the lowest F1" in text
    assert "class [red" in text  # not taken for a colour
    assert command.main(["metrics", str(tmp_path / "none.npz")]) == 2
    assert "none.npz" in capsys.readouterr().err


@pytest.mark.slow
def test_a_thousand_classes_stay_within_a_gibibyte():
    import tracemalloc

    predictions = draw(count=5000, classes=1000)
    tracemalloc.start()
    tasks.summarize(predictions, resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**30
