"""What the folders of experiments/ hold besides their grids works on a few made-up pictures."""

import csv

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from experiments.medical import baselines, prepare
from experiments.probe_defaults import run as probe_defaults
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.data import sources
from tl_jax.studies.study import grid, load
from tl_jax.training.train import train


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    """36 photos of 48 x 36 pixels: rows of red are the cells and three, a blue left edge is a platelet."""
    source, folder = tmp_path_factory.mktemp("bccd"), tmp_path_factory.mktemp("smears")
    (source / "images").mkdir()
    with (source / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "split", "red_cells", "white_cells", "platelets"))
        for i in range(36):
            image = np.full((36, 48, 3), 200, np.uint8)
            image[: 3 + i // 2, 12:36] = (180, 40, 40)
            image[:, :5, :2] = 200 - 150 * (i % 2)
            Image.fromarray(image).save(source / "images" / f"{i}.jpg", quality=95)
            table.writerow((f"images/{i}.jpg", ("train", "val", "test")[i // 2 % 3], i // 2, 1, 2 * (i % 2)))
    prepare.main(source, folder)
    return folder


def test_smears_have_the_published_splits(smears):
    for task, column in (("regression", "red_cells"), ("binary", "platelets")):
        source = sources.load(f"csv:{smears}/labels.csv", "test", task=task, labels=(column,))
        expected = [i // 2 if task == "regression" else i % 2 for i in range(36) if i // 2 % 3 == 2]
        assert source.labels.ravel().tolist() == expected


def test_a_baseline_of_colours_sees_what_colours_say(smears):
    count = {name: tasks.point(x) for name, x in baselines.baselines(smears, "count").items()}
    assert count["mean of train"]["rmse"] > 3 * count["colour histograms"]["rmse"]
    seen = {name: tasks.point(x) for name, x in baselines.baselines(smears, "platelets").items()}
    assert seen["majority of train"]["roc_auc"] == 0.5 and seen["colour histograms"]["roc_auc"] == 1


def test_heads_of_the_probe_study_come_to_what_logistic_regression_finds():
    """On classes that overlap, so that the optimum is finite; two rates and decays in one program."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = (rng.normal(size=(60, 4)) + np.eye(3, 4)[y]).astype(np.float32)
    whole = np.tile(np.arange(60), (3000, 1))
    heads = probe_defaults.train_heads(x, y, whole, np.array([0.03, 0.03]), np.array([0.0, 0.5]), 3)
    found = LogisticRegression(C=1e6, max_iter=1000).fit(x, y)
    ours = [
        x @ np.asarray(kernel) + np.asarray(bias) for kernel, bias in zip(heads["kernel"], heads["bias"], strict=True)
    ]
    best = probe_defaults.score(found.decision_function(x), y)
    np.testing.assert_allclose(probe_defaults.score(ours[0], y), best, atol=1e-3)
    assert best[1] < probe_defaults.score(ours[1], y)[1]
    assert np.linalg.norm(heads["kernel"][1]) < 0.99 * np.linalg.norm(heads["kernel"][0])  # decay holds it back
    few, test = probe_defaults.halves(y, 5, seed=0)
    assert np.bincount(y[few]).tolist() == [5, 5, 5] and not set(few) & set(test)


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["count", "platelets"])
@pytest.mark.exhaustive
def test_a_run_of_the_medical_study_is_scored_as_its_baselines_are(smears, tmp_path, ask):
    _, _, study = load(f"experiments/medical:root={smears},ask={ask},model.image_size=32")
    run = next(run for run in grid(study) if run.levels == {"network": "DeiT-tiny", "trained": "last block"})
    changes = {"model.weights": "", "total": (2.0, "steps"), "cache_dir": str(tmp_path)}
    result = train(options.override(run.config, changes), tmp_path / "w", verbose=False)
    assert result["split"] == "test" and set(study.metrics) <= set(result["metrics"])
    ours = tasks.load_predictions(tmp_path / "w" / "predictions.npz")
    for known in baselines.baselines(smears, ask).values():
        assert tasks.paired_difference(ours, known)["low"] is not None


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("trained", ["head", "all"])
def test_a_run_of_the_study_of_backbones_ends(tmp_path, trained):
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        folder = tmp_path / "data" / "pacs_40" / "sketch" / name
        folder.mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
    _, _, study = load(f"experiments/backbones:root={tmp_path},data=sketch,model.image_size=32")
    run = next(run for run in grid(study) if run.levels == {"network": "MobileNetV2", "trained": trained})
    cache = {"cache_dir": str(tmp_path)} if run.config.cache else {}
    config = options.override(run.config, {"model.weights": "", "total": (1.0, "steps"), **cache})
    assert train(config, tmp_path / "w", verbose=False)["metrics"]["count"] == 20
