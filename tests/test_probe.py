"""The run of a probe without gradient, end to end on the embedded network, against the same steps by hand."""

import json

import jax
import numpy as np
import pytest
from counting import add_counted
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from configs import quickstart
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.data import pipeline, sources
from tl_jax.methods import probes
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.tasks import load_predictions
from tl_jax.training import audit as audits
from tl_jax.training import build, probe, steps
from tl_jax.weights import load

PARALLEL = sharding.make_parallel()


def make_config(name, grid=(), **changes):
    return options.override(quickstart.get_config(), {
        "method.name": name, "method.grid": grid, "method.k": 0, "groups": {}, "data.shots": 0, "resamples": 20,
        "data.train": "train[:20%]", "data.val": "train[90%:]", "data.test": "test[:20%]", **changes,
    })  # fmt: skip


def make_run(name, grid=(), **changes):
    return build.build(make_config(name, grid, **changes), PARALLEL)


def fit(run, folder, verbose=False, stop_requested=lambda step: False):
    folder.mkdir(exist_ok=True)
    return probe.probe(run, PARALLEL, folder, verbose, stop_requested)


def run_probe(name, folder, grid=(), **changes):
    run = make_run(name, grid, **changes)
    return fit(run, folder, verbose=True), run


def features(split, variables=None):
    """Labels, features and logits of the embedded network (or of other variables) without the code under test."""
    model, loaded, card, *_ = load.load("resnet8_cifar", "builtin:glyphs", 10, image_size=16)
    source = sources.load("digits", split)
    task = tasks.make(tasks.Spec(class_names=source.class_names))
    step = jax.jit(steps.make_eval_step(steps.Reader(model, card, "image"), task))
    batches = pipeline.eval_batches(source, {"image": pipeline.View(card)}, len(source))
    out = step(variables or loaded, batches[0]["image"])
    return source.labels, np.asarray(out["features"], np.float64), np.asarray(out["logits"])


@pytest.fixture(scope="module")
def by_hand():
    return {name: features(split) for name, split in
            {"train": "train[:20%]", "val": "train[90%:]", "test": "test[:20%]"}.items()}  # fmt: skip


@pytest.mark.figures
@pytest.mark.slow
@pytest.mark.thin(1)
def test_neighbours_give_the_accuracy_that_scikit_learn_gives_on_the_features(tmp_path, by_hand):
    result, built = run_probe("knn", tmp_path / "w", (1, 5, 9))
    (train_labels, train, _), (val_labels, val, _), (labels, test, _) = by_hand.values()
    models = {k: KNeighborsClassifier(k).fit(normalize(train), train_labels) for k in (1, 5, 9)}
    accuracies = {k: model.score(normalize(val), val_labels) for k, model in models.items()}
    assert {row["value"]: row["val/accuracy"] for row in result["tried"]} == pytest.approx(accuracies)
    assert accuracies[result["chosen"]] == max(accuracies.values())
    expected = models[result["chosen"]].score(normalize(test), labels)
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(expected)
    assert result["split"] == "test" and not result["chosen_on_scored_split"] and result["trainable_parameters"] == 0
    files = {"result.json", "MANIFEST.json", "predictions.npz", "audit.json", "cost.json",
             "confusion_matrix.png", "reliability.png", "feature_map.png", "mistakes.png", "svg"}  # fmt: skip
    assert {path.name for path in (tmp_path / "w").iterdir()} == files  # no network holds neighbours
    assert json.loads((tmp_path / "w" / "result.json").read_text()) == json.loads(json.dumps(result))
    saved = load_predictions(tmp_path / "w" / "predictions.npz")
    np.testing.assert_array_equal(saved.labels, labels)
    np.testing.assert_allclose(saved.features, test, atol=1e-4)
    np.testing.assert_array_equal(saved.ids, built.material.data["test"].ids)


def test_a_linear_probe_is_a_network_with_that_head_and_nothing_else_changed(tmp_path, by_hand):
    result, built = run_probe(
        "logistic", tmp_path / "w", (0.1,), **{"data.extra_eval": (("rest", "digits", "test[80%:]"),)}
    )
    (train_labels, train, _), _, (labels, test, _) = by_hand.values()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(train, train_labels)
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(model.score(test, labels))
    rest_labels, rest, _ = features("test[80%:]")
    assert result["extra_eval"]["rest"]["accuracy"]["value"] == pytest.approx(model.score(rest, rest_labels))
    assert (result["chosen"], result["trainable_parameters"], result["step"]) == (0.1, 650, 0)
    exported = load.load("resnet8_cifar", tmp_path / "w" / "model.safetensors")
    saved = load_predictions(tmp_path / "w" / "predictions.npz")
    np.testing.assert_allclose(features("test[:20%]", exported.variables)[2], saved.values, atol=1e-4)
    rest_saved = load_predictions(tmp_path / "w" / "predictions-rest.npz")
    assert (rest_saved.values.argmax(1) == rest_labels).mean() == result["extra_eval"]["rest"]["accuracy"]["value"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(exported.variables["params"]["backbone"]):
        loaded = built.material.variables["params"]["backbone"]
        for key in path:
            loaded = loaded[key.key]
        np.testing.assert_array_equal(leaf, loaded)
    audit = json.loads((tmp_path / "w" / "audit.json").read_text())
    assert audit["proof"]["bit_equal"] and audit["proof"]["sha256"] == result["frozen_sha256"]
    cost = json.loads((tmp_path / "w" / "cost.json").read_text())
    assert (cost["trainable_parameters"], cost["steps"], cost["flops_per_step"]) == (650, 0, None)
    assert cost["seconds"] > 0 and cost["flops"] > 2 * 74640 * len(train)


def test_the_console_says_that_nothing_trains_and_what_was_chosen_by_what(tmp_path, capsys):
    rows = {k: {"value": k, "val/accuracy": a, "val/nll": n, "converged": True} for k, a, n in
            ((1, 0.8, 0.9), (3, 0.9, 0.5), (5, 0.7, 0.4))}  # fmt: skip
    line = probes.choice_line("knn", 3, list(rows.values()))
    assert line.startswith("knn with k = 3, chosen of 3 by accuracy on val (accuracy 0.9000, nll 0.5000)")
    assert line.endswith("; by nll it would be k = 5 (accuracy 0.7000, nll 0.4000)")
    assert probes.choice_line("ridge", 3, [rows[1], rows[3]]).endswith("and nll agrees")
    assert probes.choice_line("logistic", 0.5, []) == "logistic with C = 0.5, as given"
    for name, parameters, told in (("knn", 74640, "knn compares"), ("ridge", 75290, "ridge fits the 650 numbers")):
        audit = make_run(name, (1,)).phases[0].audit
        assert audit["totals"]["parameters"] == parameters and audit["totals"]["optimizer_values"] == 0
        assert audit["totals"]["frozen"] == 74640 and audit["groups"] == {}
        assert not any(row["lr_mult"] or row["optimizer_values"] for row in audit["parameters"])
        first = audits.total_lines(audit)[0]
        assert first.startswith("nothing trains: the 74,640 parameters of the network are frozen") and told in first


def test_without_test_the_choice_is_said_to_be_made_on_the_scored_split(tmp_path):
    changes = {"data.test": ""}
    result = fit(make_run("ridge", **changes), tmp_path)
    assert result["split"] == "val" and result["chosen_on_scored_split"]
    row = next(row for row in result["tried"] if row["value"] == result["chosen"])
    assert row["val/accuracy"] == pytest.approx(result["metrics"]["accuracy"]["value"])
    assert row["val/nll"] == pytest.approx(result["metrics"]["nll"]["value"], rel=1e-5)
    result = fit(make_run("ridge", (1.0,), **changes), tmp_path)
    assert not result["chosen_on_scored_split"]


def test_a_bootstrap_draw_counts_its_repeated_examples(tmp_path, monkeypatch):
    reads = add_counted(monkeypatch)
    run = make_run("logistic", (1.0,), **{"data.source": "counted"})
    drawn = np.array([0, 0, 0, *range(1, 100), 50, 50])
    data = {**run.material.data, "train": run.material.data["train"].select(drawn)}
    reads.clear()
    fit(run._replace(material=run.material._replace(data=data)), tmp_path)
    assert len(reads) == len(set(reads)) == 100 + len(data["val"]) + len(data["test"])  # each image is shown once
    labels, train, _ = features("train[:20%]")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000)).fit(train[drawn], labels[drawn])
    _, test, _ = features("test[:20%]")
    saved = load_predictions(tmp_path / "predictions.npz")
    np.testing.assert_allclose(
        saved.values - saved.values.mean(1, keepdims=True), model.decision_function(test), atol=5e-3
    )


def test_leave_one_out_scores_the_pool_by_all_others(tmp_path):
    changes = {"data.resample": "loo", "data.val": "", "data.test": "", "data.train": "train[:10%]"}
    run = make_run("knn", (3,), **changes)
    result = fit(run, tmp_path)
    labels, pool, _ = features("train[:10%]")
    expected = cross_val_predict(KNeighborsClassifier(3), normalize(pool), labels, cv=LeaveOneOut())
    assert result["metrics"]["accuracy"]["value"] == pytest.approx((expected == labels).mean())
    assert (result["split"], result["metrics"]["count"], result["chosen"]) == ("test", 103, 3)
    with pytest.raises(ValueError, match=r"method.grid=\(1, 3\)[\s\S]*set one value in method.grid"):
        fit(make_run("knn", (1, 3), **changes), tmp_path)
    with pytest.raises(ValueError, match=r"extra sets \['rest'\]"):
        fit(make_run("knn", (3,), **changes, **{"data.extra_eval": (("rest", "digits", "test[80%:]"),)}), tmp_path)


def stop_at(call=None):
    """A stop_requested that becomes true at that call, and the list of its calls."""
    calls = []

    def stop_requested(step):
        calls.append(step)
        return call is not None and len(calls) >= call

    return calls, stop_requested


def run_until(run, folder, call=None):
    """Runs a probe that is stopped at a call of stop_requested; the number of calls, and result.json."""
    calls, stop_requested = stop_at(call)
    stopped = ""
    try:
        fit(run, folder, stop_requested=stop_requested)
    except Preempted as stop:
        stopped = str(stop)
    result = folder / "result.json"
    assert result.exists() == (not stopped)
    return len(calls), stopped or result.read_bytes()


@pytest.mark.slow
def test_a_probe_stops_between_batches_and_between_fits_and_the_same_command_finishes(tmp_path):
    run = make_run("logistic", (0.01, 0.1, 1.0), eval_batch_size=64)
    count, whole = run_until(run, tmp_path / "whole")
    batches = sum(-(-len(run.material.data[name]) // 64) for name in ("train", "val", "test"))
    assert count >= batches + 3  # once for each batch and each value of the grid
    for call, message in (
        (1, "while the features are computed"),
        (4, "while the features are"),
        (count, "between two fits"),
    ):
        asked, stopped = run_until(run, tmp_path / "broken", call)
        assert asked == call and message in stopped
    assert run_until(run, tmp_path / "broken") == (count, whole)


def test_a_stopped_probe_keeps_the_features_that_it_has_computed(tmp_path):
    def cached(folder):
        changes = {"cache": "features", "cache_dir": str(folder), "eval_batch_size": 64}
        return make_run("ridge", (1.0, 10.0), **changes)

    run = cached(tmp_path / "other")
    count, whole = run_until(run, tmp_path / "whole")
    run = cached(tmp_path / "cache")
    asked, stopped = run_until(run, tmp_path / "broken", 3)
    assert asked == 3 and "after the features of" in stopped
    assert run_until(run, tmp_path / "broken") == (count - 3 + 1, whole)  # three batches fewer, one read back


def test_leave_one_out_stops_between_fits(tmp_path):
    changes = {"data.resample": "loo", "data.val": "", "data.test": "", "data.train": "train[:10%]"}
    run = make_run("ridge", (1.0,), **changes)
    batches = len(run.material.eval_batches["test"])
    asked, stopped = run_until(run, tmp_path / "w", batches + 4)
    assert asked == batches + 4 and "between two fits" in stopped


@pytest.mark.parametrize("name", ["knn", "logistic", "ridge"])
@pytest.mark.parametrize("updating", [".*", "backbone/stage3/.*"])
def test_a_probe_refuses_to_update_statistics_before_any_work(name, updating):
    rules = ((updating, "update"), *((("backbone/.*", "frozen"),) if updating != ".*" else ()))
    with pytest.raises(ValueError, match=f"method.norm = .*'{name}' takes no steps and updates no statistics"):
        make_run(name, **{"method.norm": rules, "data.source": "arrays:nowhere.npz"})
    options.check(make_config(name, **{"method.norm": ((".*", "frozen"),)}))
