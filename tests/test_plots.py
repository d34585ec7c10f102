"""Figures are written whole, for any number of classes and missing curves, and show the numbers of the metrics."""

import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from tl_jax import tasks
from tl_jax.studies.report import charts
from tl_jax.tasks import figures
from tl_jax.training import plots

CURVES = {"loss": "loss (nats)", "accuracy": "accuracy"}


def draw(classes=5, count=200, features=8, name="class {}"):
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=count)
    logits = rng.normal(size=(count, classes)) + 2 * np.eye(classes)[labels]
    x = None if features is None else rng.normal(size=(count, features)) + labels[:, None]
    spec = tasks.Spec(class_names=tuple(name.format(k) for k in range(classes)))
    return tasks.make_predictions({"logits": logits}, labels, np.arange(count), spec, x)


def rows(count=20):
    return [
        {"step": 10 * i, "train/loss": 1 / (i + 1), "train/accuracy": i / count}
        | ({"val/loss": abs(i - 10) / 10 + 0.5, "val/accuracy": 1 - abs(i - 10) / 20} if i % 5 == 0 else {})
        for i in range(count)
    ]


DRAWINGS = {
    "learning_curves": lambda path: plots.learning_curves(rows(), path, CURVES),
    "confusion_matrix": lambda path: figures.confusion_matrix(draw(), path),
    "reliability": lambda path: figures.reliability(draw(), path),
    "feature_map": lambda path: figures.feature_map(draw(), path),
    "comparison": lambda path: charts.comparison(path, {"a": [0.8, 0.9], "b": [0.5]}, "accuracy"),
}


def svg_text(path):
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


@pytest.mark.thin(1)
@pytest.mark.parametrize("drawing", DRAWINGS)
def test_figure_is_a_png_of_150_dpi_with_something_on_it(tmp_path, drawing):
    before = dict(matplotlib.rcParams)
    path = tmp_path / "figure.png"
    DRAWINGS[drawing](path)
    with Image.open(path) as image:
        assert image.info["dpi"][0] == pytest.approx(150, abs=0.1) and min(image.size) > 150
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]
    assert dict(matplotlib.rcParams) == before  # a user's own figures look as before


def test_a_path_without_suffix_is_written_as_both(tmp_path):
    plots.learning_curves(rows(), tmp_path / "figure", CURVES)
    plots.learning_curves(rows(), tmp_path / "alone.svg", CURVES)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert files == {"figure.png", "svg/figure.svg", "alone.svg"}
    assert svg_text(tmp_path / "svg/figure.svg") == svg_text(tmp_path / "alone.svg")


@pytest.mark.thin(2)
@pytest.mark.parametrize("drawing", DRAWINGS)
def test_same_numbers_give_the_same_bytes(tmp_path, drawing):
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    DRAWINGS[drawing](first)
    DRAWINGS[drawing](second)
    assert first.read_bytes() == second.read_bytes()


def test_unknown_suffix_and_a_failing_plot_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        figures.reliability(draw(), tmp_path / "figure.jpeg")
    with pytest.raises(ValueError, match="no features"):
        figures.feature_map(draw(features=None), tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.thin(2)
@pytest.mark.parametrize("classes", [2, 20, 21, 60, 201])
def test_any_number_of_classes_can_be_drawn(tmp_path, classes):
    predictions = draw(classes=classes, count=3 * classes, name="a rather long class name $no. {}_$")
    figures.confusion_matrix(predictions, tmp_path / "confusion.svg")
    figures.feature_map(predictions, tmp_path / "features.png")
    text = " ".join(svg_text(tmp_path / "confusion.svg"))
    assert ("commonest confusions" in text) == (classes > 20) and ("blocks of 2 classes" in text) == (classes > 200)


def test_confusion_matrix_shows_every_count(tmp_path):
    predictions = draw(classes=3)
    figures.confusion_matrix(predictions, tmp_path / "figure.svg")
    text, counts = svg_text(tmp_path / "figure.svg"), tasks.confusion(predictions)
    for count in counts[counts > 0]:
        assert str(count) in text
    assert f"{counts.trace()} of 200 correct" in text


def test_pooled_shares_of_a_large_matrix_keep_the_counts():
    counts = np.random.default_rng(0).integers(0, 9, size=(1001, 1001))
    share, block = figures._share(counts)
    assert block == 6 and share.shape == (167, 167)
    np.testing.assert_allclose(share[3, 7], counts[18:24, 42:48].sum() / counts[18:24].sum(), rtol=1e-12)
    np.testing.assert_allclose(share.sum(axis=1), 1, rtol=1e-12)


def test_reliability_diagram_shows_the_ece_of_the_metrics(tmp_path):
    predictions = draw()
    figures.reliability(predictions, tmp_path / "figure.svg")
    ece = tasks.summarize(predictions, resamples=2)["ece"]["value"]
    text = svg_text(tmp_path / "figure.svg")
    assert f"ECE {ece:.4f} (15 bins)" in text
    logits = np.float64(predictions.values)
    sure = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).max(axis=1)
    counts = np.histogram(sure, np.linspace(0, 1, 16))[0]
    assert " ".join(map(str, counts)) in " ".join(part for part in text if part.isdigit())


def test_learning_curves_name_the_best_validation_value_and_bear_gaps(tmp_path):
    path = tmp_path / "figure.svg"
    plots.learning_curves(rows(), path, CURVES)
    assert {"val (best 0.5 at step 100)", "val (best 1 at step 100)"} <= set(svg_text(path))
    plots.learning_curves(rows(), path, CURVES, 1500)
    assert svg_text(path).count("scored: step 1,500") == 2
    plots.learning_curves([{"step": 1, "train/loss": None}, {"step": 2, "train/loss": 0.5, "epoch": 1}], path, CURVES)
    plots.learning_curves([], path, CURVES)
    assert "step" in svg_text(path)


def test_feature_map_names_the_classes_and_the_explained_variance(tmp_path):
    predictions = draw(classes=12)
    figures.feature_map(predictions, tmp_path / "figure.svg")
    centred = predictions.features.astype(np.float64) - predictions.features.mean(axis=0, dtype=np.float64)
    variance = np.linalg.svd(centred, compute_uv=False) ** 2
    text = " ".join(svg_text(tmp_path / "figure.svg"))
    assert f"component 1 ({variance[0] / variance.sum():.1%} of the variance)" in text and "class 3" in text


@pytest.mark.slow
def test_a_map_by_tsne_keeps_neighbours_together_and_says_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MAPPED", 60)
    predictions = draw(classes=2, count=80)
    apart = predictions._replace(features=predictions.features + 30 * predictions.labels[:, None])
    chosen, points, names = figures._plane(apart.features, "tsne")
    labels = apart.labels[chosen]
    assert len(chosen) == len(set(chosen)) == 60 and "perplexity 19.7" in names[0]
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag([np.inf] * 60)
    assert (labels[distance.argmin(axis=1)] == labels).all()
    figures.feature_map(apart, tmp_path / "figure.svg", "tsne")
    text = svg_text(tmp_path / "figure.svg")
    assert {"60 examples of 80 drawn", "class 0", "class 1", "misclassified"} <= set(text) and names[0] in text


def test_comparison_shows_students_interval_of_seeds_and_a_given_interval(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    seeds = [0.81, 0.83, 0.86]
    low, high = stats.ttest_1samp(seeds, 0).confidence_interval(0.95)
    named = {"seeds": seeds, "bootstrap": {"value": 0.7, "low": 0.65, "high": 0.74}, "single": [0.5]}
    charts.comparison(tmp_path / "figure.svg", named, label="top-1")
    text = " ".join(svg_text(tmp_path / "figure.svg"))
    for part in (f"{np.mean(seeds):.4f}  [{low:.4f}, {high:.4f}]", "0.7000  [0.6500, 0.7400]", "0.5000", "top-1"):
        assert part in text


def test_comparison_shows_the_paired_difference_beside_the_arms(tmp_path):
    arms, difference = {"ours": [0.8, 0.9], "theirs": [0.7, 0.75]}, {"mean": 0.125, "low": -0.19, "high": 0.44}
    charts.comparison(tmp_path / "figure.svg", arms, "top-1", difference={**difference, "values": [0.1, 0.15]})
    text = " ".join(svg_text(tmp_path / "figure.svg"))
    assert "0.1250  [-0.1900, 0.4400]" in text and "ours - theirs, paired, 95 % interval" in text


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({}, "nothing to compare"),
        ({"a": []}, "'a': expected a list of finite numbers"),
        ({"a": [0.5, float("nan")]}, "'a': expected a list of finite numbers"),
        ({"a": {"value": None, "low": None, "high": None}}, "'a': the metric is undefined"),
    ],
)
def test_comparison_refuses_what_it_cannot_draw(tmp_path, named, message):
    with pytest.raises(ValueError, match=message):
        charts.comparison(tmp_path / "figure.png", named, "accuracy")
    assert not list(tmp_path.iterdir())
