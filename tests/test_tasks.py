"""Binary, multi-label and regression: losses as PyTorch's, metrics as scikit-learn's and scipy's on each resample."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as sk
from scipy import special, stats

from tl_jax import __main__ as command
from tl_jax import tasks
from tl_jax.core.card import Card
from tl_jax.tasks import figures, intervals, tables

NAMES = ("cat", "dog", "owl")


def binary(count=120, seed=0, ties=False, share=0.4, threshold=None):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < share).astype(int)
    logits = rng.normal(size=count) * 2 + 1.5 * labels - 1
    logits = np.round(logits) if ties else logits
    spec = tasks.Spec("binary", ("healthy", "ill"), threshold=threshold)
    return tasks.make_predictions({"logits": logits}, labels, np.arange(count), spec)


def multilabel(count=80, seed=0, shares=(0.5, 0.2, 0.05)):
    rng = np.random.default_rng(seed)
    labels = (rng.random((count, 3)) < shares).astype(int)
    logits = rng.normal(size=(count, 3)) + 2 * labels - 1
    return tasks.make_predictions({"logits": logits}, labels, np.arange(count), tasks.Spec("multilabel", NAMES))


def regression(count=90, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(count, 2)) * [3, 100] + [10, -500]
    labels = np.round(labels / [2, 100]) * [2, 100] if ties else labels
    values = labels + rng.normal(size=labels.shape) * [1, 60]
    spec = tasks.fit_spec("regression", labels, ("age", "height"))
    return tasks.make_predictions({"values": values}, labels, np.arange(count), spec)


def reference_ece(labels, p, bins=15):
    error = 0.0
    for m in range(bins):
        inside = (p > m / bins) & (p <= (m + 1) / bins)
        error += abs(labels[inside].sum() - p[inside].sum()) / len(p)
    return error


def of_binary(predictions, index):
    labels, logits = predictions.labels[index], predictions.values[index].astype(np.float64)
    p = special.expit(logits)
    guess = p >= (predictions.spec.threshold or 0.5)
    both = labels.min() < labels.max()
    return {
        "accuracy": sk.accuracy_score(labels, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, guess) if both else np.nan,
        "precision": sk.precision_score(labels, guess, zero_division=0) if labels.any() else np.nan,
        "recall": sk.recall_score(labels, guess) if labels.any() else np.nan,
        "specificity": sk.recall_score(labels, guess, pos_label=0) if not labels.all() else np.nan,
        "f1": sk.f1_score(labels, guess, zero_division=0) if labels.any() else np.nan,
        "roc_auc": sk.roc_auc_score(labels, logits) if both else np.nan,
        "average_precision": sk.average_precision_score(labels, logits) if labels.any() else np.nan,
        "nll": sk.log_loss(labels, p, labels=[0, 1]),
        "ece": reference_ece(labels, p),
    }


def of_multilabel(predictions, index):
    labels, logits = predictions.labels[index], predictions.values[index]
    guess, present = logits > 0, labels.any(axis=0)
    each = {
        "precision": sk.precision_score(labels, guess, average=None, zero_division=0),
        "recall": sk.recall_score(labels, guess, average=None, zero_division=0),
        "f1": sk.f1_score(labels, guess, average=None, zero_division=0),
        "average_precision": np.array(
            [sk.average_precision_score(y, x) if y.any() else np.nan for y, x in zip(labels.T, logits.T, strict=True)]
        ),
    }
    each = {name: np.where(present, values, np.nan) for name, values in each.items()}
    return each | {
        "f1_macro": np.nanmean(each["f1"]),
        "f1_micro": sk.f1_score(labels, guess, average="micro"),
        "subset_accuracy": sk.accuracy_score(labels, guess),
        "hamming_loss": sk.hamming_loss(labels, guess),
        "mean_average_precision": np.nanmean(each["average_precision"]),
    }


def of_regression(predictions, index):
    true, guess = predictions.labels[index].astype(np.float64), predictions.values[index].astype(np.float64)
    each = {
        "rmse": np.sqrt(((true - guess) ** 2).mean(axis=0)),
        "mae": np.abs(true - guess).mean(axis=0),
        "r2": sk.r2_score(true, guess, multioutput="raw_values"),
        "spearman": np.array([stats.spearmanr(y, x)[0] for y, x in zip(true.T, guess.T, strict=True)]),
    }
    return {f"{name}_each": values for name, values in each.items()} | {n: x.mean() for n, x in each.items()}


CASES = {
    "binary": (of_binary, binary()),
    "binary with its own threshold": (of_binary, binary(threshold=0.2)),
    "binary with ties": (of_binary, binary(ties=True)),
    "binary with few positives": (of_binary, binary(count=12, share=0.1, seed=3)),
    "multilabel": (of_multilabel, multilabel()),
    "multilabel, rare": (of_multilabel, multilabel(count=15)),
    "regression": (of_regression, regression()),
    "regression with ties": (of_regression, regression(ties=True)),
    "regression of six": (of_regression, regression(count=6)),
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning", "ignore:An input array is constant")
@pytest.mark.parametrize("case", CASES)
def test_metrics_of_a_resample_equal_the_reference_on_the_drawn_examples(case):
    reference, predictions = CASES[case]
    count, scoring = len(predictions.labels), tasks.METRICS[predictions.spec.name]
    weights = next(intervals.resample(count, 25, seed=1))
    got = {name: x for part in scoring.parts for name, x in part(predictions, weights).items()}
    for column in range(weights.shape[1]):
        index = np.repeat(np.arange(count), weights[:, column].astype(int))
        expected = reference(predictions, index)
        assert set(expected) == set(got)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name][column], value, rtol=1e-9, atol=1e-9, err_msg=f"{name}, {column}")


@pytest.mark.parametrize("case", CASES)
def test_summary_holds_the_reference_values_and_the_scalars_of_the_task(case):
    reference, predictions = CASES[case]
    summary = tasks.summarize(predictions, resamples=20)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    scalars = {name for name, entry in summary.items() if isinstance(entry, dict)}
    assert scalars == set(tasks.scalar_names(predictions.spec.name))
    rows = next((value for name, value in summary.items() if name.startswith("per_")), [])
    assert len(rows) == (0 if predictions.spec.name == "binary" else len(predictions.spec.class_names))
    for name, value in reference(predictions, np.arange(len(predictions.labels))).items():
        if np.ndim(value) == 0:
            assert summary[name]["value"] == pytest.approx(value, rel=1e-9), name
        else:
            got = [row[name.removesuffix("_each")]["value"] for row in rows]
            np.testing.assert_allclose([np.nan if x is None else x for x in got], value, rtol=1e-9, err_msg=name)
    if predictions.spec.name == "binary":
        guess = special.expit(predictions.values) >= (predictions.spec.threshold or 0.5)
        assert summary["confusion"] == sk.confusion_matrix(predictions.labels, guess).tolist()


def test_scalar_names_of_classification_are_those_of_a_summary_with_more_than_five_classes():
    spec = tasks.Spec(class_names=tuple("abcdef"))
    summary = tasks.summarize(tasks.make_predictions({"logits": np.eye(6)}, np.arange(6), range(6), spec), resamples=2)
    scalars = [name for name, entry in summary.items() if isinstance(entry, dict)]
    assert scalars == list(tasks.scalar_names("classification"))


@pytest.mark.thin(4)
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_summary_and_the_loss_of_training(case):
    _, predictions = CASES[case]
    task, spec = tasks.make(predictions.spec), predictions.spec
    scores, summary = task.scores(predictions), tasks.summarize(predictions, resamples=2)
    assert scores == tasks.scores(predictions)
    (first, side), (second, _) = task.monitor
    assert (second, set(scores)) == ("loss", {"loss", first})
    assert scores[first] == pytest.approx(summary[first]["value"], rel=1e-9)
    assert tasks.direction(first) == (1 if side == "max" else -1) == tasks.direction(f"rotated/{first}")
    logits = predictions.values
    if spec.name == "regression":
        logits = (logits - np.asarray(spec.target_mean)) / np.asarray(spec.target_std)
    losses = task.loss({"logits": jnp.asarray(logits, jnp.float32)}, task.encode(jnp.asarray(predictions.labels)))
    assert losses.shape == task.count(jnp.asarray(predictions.labels)).shape == (len(logits),)
    assert losses.dtype == jnp.float32 and float(losses.mean()) == pytest.approx(scores["loss"], rel=1e-5)


def test_undefined_binary_metrics_are_none():
    summary = tasks.summarize(binary(count=5, share=0.0), resamples=3)
    undefined = {name for name in tasks.scalar_names("binary") if summary[name]["value"] is None}
    assert undefined == {"balanced_accuracy", "precision", "recall", "f1", "roc_auc", "average_precision"}


def test_regression_metrics_are_undefined_where_all_drawn_targets_are_equal():
    predictions, weights = regression(count=2), np.array([[2.0, 1.0], [0.0, 1.0]], np.float32)
    parts = tasks.METRICS["regression"].parts
    got = {name: np.isnan(x).tolist() for part in parts for name, x in part(predictions, weights).items()}
    assert got["r2"] == got["spearman"] == [True, False] and got["rmse"] == got["mae"] == [False, False]


def test_class_weights_multiply_each_examples_loss():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels, weights = rng.normal(size=(6, 3)).astype(np.float32), np.array([0, 1, 2, 2, 1, 0]), (0.5, 2.0, 4.0)
    spec = tasks.Spec(class_names=NAMES)
    task = tasks.make(spec, class_weight=weights)
    ours = task.loss({"logits": jnp.asarray(logits)}, task.encode(jnp.asarray(labels)))
    reference = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), weight=torch.tensor(weights), reduction="none"
    )
    np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-5)
    smooth = tasks.make(spec, class_weight=weights, label_smoothing=0.3)
    targets = np.asarray(smooth.encode(jnp.asarray(labels)))
    ours = smooth.loss({"logits": jnp.asarray(logits)}, jnp.asarray(targets))
    by_hand = -(targets * special.log_softmax(logits.astype(np.float64), axis=1)).sum(axis=1) * (targets @ weights)
    np.testing.assert_allclose(ours, by_hand, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (7, 1)])
def test_binary_task_takes_logits_with_and_without_a_last_axis(shape):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=7).astype(np.float32), rng.integers(2, size=7)
    task = tasks.make(tasks.Spec("binary", ("n", "p"), threshold=0.7), pos_weight=(3.0,), label_smoothing=0.2)
    outputs = {"logits": jnp.asarray(logits.reshape(shape))}
    soft = torch.tensor(0.8 * labels + 0.1, dtype=torch.float32)
    reference = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), soft, pos_weight=torch.tensor([3.0]), reduction="none"
    )
    np.testing.assert_allclose(task.loss(outputs, task.encode(jnp.asarray(labels))), reference.numpy(), rtol=1e-5)
    assert task.keep(outputs)["logits"].shape == (7,) and task.outputs == 1
    right = (special.expit(logits) >= 0.7) == labels
    assert task.running(outputs, jnp.asarray(labels))["accuracy"].tolist() == right.tolist()


def test_multilabel_loss_is_the_mean_over_the_labels():
    torch = pytest.importorskip("torch")
    predictions = multilabel()
    task = tasks.make(predictions.spec, pos_weight=(1.0, 4.0, 9.0))
    outputs, labels = {"logits": jnp.asarray(predictions.values)}, predictions.labels
    reference = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(predictions.values), torch.tensor(labels, dtype=torch.float32),
        pos_weight=torch.tensor([1.0, 4.0, 9.0]), reduction="none",
    )  # fmt: skip
    ours = task.loss(outputs, task.encode(jnp.asarray(labels)))
    np.testing.assert_allclose(ours, reference.numpy().mean(axis=1), rtol=1e-5)
    wrong = float(task.running(outputs, jnp.asarray(labels))["hamming_loss"].mean())
    assert wrong == pytest.approx(sk.hamming_loss(labels, predictions.values > 0), rel=1e-6)


def test_regression_learns_standardised_targets_and_keeps_their_units():
    labels = np.array([[1.0, 100.0], [3.0, 500.0], [5.0, 300.0]])
    spec = tasks.fit_spec("regression", labels, ("a", "b"))
    np.testing.assert_allclose([spec.target_mean, spec.target_std], [labels.mean(axis=0), labels.std(axis=0)])
    task = tasks.make(spec)
    encoded = task.encode(jnp.asarray(labels, jnp.float32))
    np.testing.assert_allclose(encoded, stats.zscore(labels), rtol=1e-6)
    np.testing.assert_allclose(task.keep({"logits": encoded})["values"], labels, rtol=1e-6)
    half = {"logits": encoded + jnp.asarray([[0.5, 1.0]])}
    np.testing.assert_allclose(task.loss(half, encoded), [(0.25 + 1) / 2] * 3, rtol=1e-5)
    by_hand = (0.5 * spec.target_std[0] + spec.target_std[1]) / 2
    np.testing.assert_allclose(task.running(half, jnp.asarray(labels))["mae"], [by_hand] * 3, rtol=1e-5)
    single = tasks.make(tasks.fit_spec("regression", labels[:, 0], ("a",)))
    assert single.encode(jnp.asarray(labels[:, 0])).shape == (3, 1)


@pytest.mark.parametrize("ties", [False, True])
def test_calibrated_threshold_has_the_best_f1_of_all_thresholds(ties):
    predictions = binary(ties=ties, share=0.2)
    spec = tasks.make(predictions.spec).calibrate(predictions)
    precision, recall, _ = sk.precision_recall_curve(predictions.labels, predictions.values)
    best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
    summary = tasks.summarize(predictions._replace(spec=spec), resamples=2)
    assert summary["f1"]["value"] == pytest.approx(best, rel=1e-9)
    before = tasks.summarize(predictions, resamples=2)
    assert {n for n in ("nll", "ece", "roc_auc", "average_precision") if summary[n] != before[n]} == set()


def test_calibration_leaves_what_it_cannot_or_need_not_choose():
    for predictions in (binary(share=0.0), binary(share=1.0), multilabel(), regression()):
        assert tasks.make(predictions.spec).calibrate(predictions) == predictions.spec


@pytest.mark.parametrize("case", CASES)
def test_predictions_round_trip_with_their_spec(tmp_path, case):
    _, predictions = CASES[case]
    tasks.save_predictions(tmp_path / "p.npz", predictions)
    back = tasks.load_predictions(tmp_path / "p.npz")
    assert back.spec == predictions.spec and (back.ids == predictions.ids).all()
    assert np.array_equal(back.values, predictions.values) and np.array_equal(back.labels, predictions.labels)
    assert back.labels.dtype == (np.float32 if predictions.spec.name == "regression" else np.int32)


def test_predictions_without_a_task_are_of_a_classification(tmp_path):
    np.savez(tmp_path / "p.npz", logits=np.eye(2), labels=[0, 1], ids=["a", "b"], class_names=["x", "y"])
    assert tasks.load_predictions(tmp_path / "p.npz").spec == tasks.Spec("classification", ("x", "y"))


def test_outputs_that_are_not_finite_are_a_divergence_that_names_the_rows(tmp_path):
    logits = np.zeros(8)
    logits[[2, 5]] = np.nan, np.inf
    spec = tasks.Spec("binary", ("n", "p"))
    with pytest.raises(FloatingPointError, match=r"2 rows of logits are not finite, first \[2, 5\]"):
        tasks.make_predictions({"logits": logits}, np.ones(8, int), range(8), spec)
    np.savez(tmp_path / "p.npz", logits=[[0, np.nan]], labels=[0], ids=["a"], class_names=["x", "y"])
    with pytest.raises(ValueError, match=r"p\.npz: no sound predictions.npz \(1 rows of logits"):
        tasks.load_predictions(tmp_path / "p.npz")


WRONG = [
    (tasks.Spec("clasification", NAMES), {"logits": np.eye(3)}, [0, 1, 2], "did you mean 'classification'"),
    (tasks.Spec("regression", NAMES), {"logits": np.eye(3)}, np.eye(3), r"have the output values, found \['logits'\]"),
    (tasks.Spec("binary", NAMES), {"logits": np.zeros(3)}, [0, 1, 2], "expected 2: the negative.*span 0..2"),
    (tasks.Spec("binary", NAMES[:2]), {"logits": np.eye(3)}, [0, 1, 1], r"shape \(3, 3\), expected \[N >= 1\]"),
    (tasks.Spec("multilabel", NAMES), {"logits": np.eye(3)}, [0, 1, 1], r"labels are int64 \(3,\).*integers \[3, 3\]"),
    (tasks.Spec("regression", NAMES), {"values": np.eye(3)}, np.eye(3), r"target_mean=\(\), target_std=\(\): expected"),
    (tasks.Spec("regression", ("a",), (0.0,), (1.0,)), {"values": np.ones((3, 1))}, [0, np.inf, 1], "1 rows of labels"),
    (tasks.Spec("binary", NAMES[:2], threshold=1.5), {"logits": np.zeros(3)}, [0, 1, 1], "threshold=1.5: expected"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "outputs", "labels", "message"), WRONG)
def test_what_does_not_fit_the_task_is_named(spec, outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        tasks.make_predictions(outputs, np.asarray(labels), range(3), spec)


def test_options_that_do_not_fit_a_task_are_refused_together():
    with pytest.raises(ValueError, match=r"class_weight is of the tasks classification.*label_smoothing=0.1"):
        tasks.make(regression().spec, class_weight=(1.0, 1.0), label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"pos_weight=\(1.0, -1.0\): expected 1 numbers above 0"):
        tasks.make(binary().spec, pos_weight=(1.0, -1.0))
    with pytest.raises(ValueError, match=r"there is no task 'regresion'.*did you mean 'regression'"):
        tasks.fit_spec("regresion", np.zeros(3), ("a",))
    with pytest.raises(ValueError, match="training targets of b are all equal"):
        tasks.fit_spec("regression", np.array([[1.0, 2.0], [2.0, 2.0]]), ("a", "b"))


def test_spec_goes_to_the_card_and_back():
    spec = tasks.fit_spec("regression", np.arange(6.0), ("age",))
    assert tasks.spec_of(Card("resnet18", 1).replace(**tasks.card_fields(spec))) == spec
    assert tasks.fit_spec("binary", np.array([0, 1])).class_names == ("0", "1")


def test_preference_follows_the_monitor_and_puts_undefined_scores_last():
    monitor = (("rmse", "min"), ("loss", "min"))
    rows = [
        {"rmse": 2.0, "loss": 1.0},
        {"rmse": 1.0, "loss": 3.0},
        {"rmse": 1.0, "loss": 2.0},
        {"rmse": None, "loss": 0},
    ]
    order = sorted(range(4), key=lambda i: tasks.preference(monitor, rows[i]), reverse=True)
    assert order == [2, 1, 0, 3]


@pytest.mark.thin(1)
@pytest.mark.parametrize("make", [binary, multilabel, regression])
def test_paired_difference_is_on_the_monitored_metric_of_the_same_resamples(make):
    a = make()
    noise = np.random.default_rng(1).normal(size=a.values.shape).astype(np.float32)
    order = np.random.default_rng(2).permutation(len(a.labels))
    worse = {name: (x + noise)[order] for name, x in a.outputs.items()}
    b = a._replace(outputs=worse, labels=a.labels[order], ids=a.ids[order])
    metric = tasks.METRICS[a.spec.name].monitor[0][0]
    reference = {"binary": of_binary, "multilabel": of_multilabel, "regression": of_regression}[a.spec.name]
    straight = a._replace(outputs={name: x + noise for name, x in a.outputs.items()})
    weights = next(intervals.resample(len(order), 30, 5))
    drawn = [np.repeat(np.arange(len(order)), column.astype(int)) for column in weights.T]
    samples = [reference(a, index)[metric] - reference(straight, index)[metric] for index in drawn]
    got = tasks.paired_difference(a, b, resamples=30, seed=5)
    assert [got["low"], got["high"]] == pytest.approx(np.quantile(samples, [0.025, 0.975]), abs=1e-9)


def test_answers_that_differ_are_found():
    for make in (binary, multilabel, regression):
        a = make()
        other = {name: x.copy() for name, x in a.outputs.items()}
        for x in other.values():
            x[3] = -x[3]
        differ = tasks.METRICS[a.spec.name].differ(a, a._replace(outputs=other))
        assert np.flatnonzero(differ).tolist() == [3]


@pytest.mark.parametrize("make", [binary, multilabel, regression])
def test_figures_of_each_task_are_drawn_and_the_command_prints_them(tmp_path, capsys, make):
    predictions = make()
    figures.draw(predictions, tmp_path)
    for folder in (tmp_path, tmp_path / "svg"):
        assert {path.stem for path in folder.iterdir() if path.is_file()} == set(figures.FIGURES[predictions.spec.name])
    tasks.save_predictions(tmp_path / "p.npz", predictions)
    command.main(["metrics", str(tmp_path / "p.npz"), "--resamples", "5"])
    text = capsys.readouterr().out
    assert all(name in text for name in tasks.scalar_names(predictions.spec.name))
    assert (tables.format_classes(tasks.summarize(predictions, resamples=2)) is None) == (make is binary)


def test_tasks_can_be_compiled_and_differentiated():
    for make in (binary, multilabel, regression):
        predictions = make()
        task = tasks.make(predictions.spec)

        @jax.jit
        def gradient(logits, labels, task=task):
            return jax.grad(lambda x: task.loss({"logits": x}, task.encode(labels)).mean())(logits)

        logits = jnp.asarray(predictions.values.reshape(len(predictions.labels), -1))
        assert jnp.isfinite(gradient(logits, jnp.asarray(predictions.labels))).all()
