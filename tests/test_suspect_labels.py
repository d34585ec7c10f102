"""Suspect labels: confident learning against a plain rewrite of the paper, and planted errors found by the command."""

import csv
import json
import types

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from configs import quickstart
from tl_jax import __main__ as commands
from tl_jax import config as options
from tl_jax.api import labels
from tl_jax.core import manifest, plotting
from tl_jax.data import resample, sources
from tl_jax.methods import probes
from tl_jax.runtime import sharding
from tl_jax.training import feature_cache, train

PROBE = {"method.name": "logistic", "method.k": 0, "method.grid": (0.01,), "groups": {}, "resamples": 2,
         "data.shots": 0, "data.augment": (), "seeds": (), "baseline": ()}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "FOLDER", tmp_path / "features")


def train_run(folder, **changes):
    train.train(options.override(quickstart.get_config(), {**PROBE, **changes}), folder, verbose=False)
    return folder


def read(folder, name="labels.csv"):
    text = (folder / "labels" / name).read_text()
    return json.loads(text) if name.endswith("json") else list(csv.DictReader(text.splitlines()))


def plant(truth, classes, rng):
    """Labels of which 5 % are wrong, and which."""
    wrong = rng.choice(len(truth), round(0.05 * len(truth)), replace=False)
    given = truth.copy()
    given[wrong] = (given[wrong] + rng.integers(1, classes, len(wrong))) % classes
    return given, wrong


def write_digits(path, rng):
    """The train split of digits as an .npz file with planted errors; the ids of these."""
    source = sources.load("digits", "train")
    given, wrong = plant(source.labels, 10, rng)
    np.savez(path, image=source.inputs, label=given, classes=np.array(source.class_names))
    return {f"train/{i}" for i in wrong.tolist()}


def by_the_paper(given, p):
    """Northcutt et al. 2021, equations 1 to 3, example by example: (confident joint, joint distribution, suspects)."""
    n, k = p.shape
    thresholds = []
    for j in range(k):
        own = [float(p[x][j]) for x in range(n) if given[x] == j]
        thresholds.append(sum(own) / len(own) if own else None)
    joint, suspects = [[0] * k for _ in range(k)], []
    for x in range(n):
        reached = [j for j in range(k) if thresholds[j] is not None and p[x][j] >= thresholds[j] - 1e-9]
        if reached:
            best = max(reached, key=lambda j: (p[x][j], j == given[x]))
            joint[given[x]][best] += 1
            suspects += [x] if best != given[x] else []
    share = [[0.0] * k for _ in range(k)]
    for i in range(k):
        for j in range(k):
            if sum(joint[i]):
                share[i][j] = joint[i][j] / sum(joint[i]) * sum(given == i) / n
    return joint, share, suspects


@pytest.mark.parametrize(("n", "k", "sharp"), [(200, 2, 1.0), (400, 5, 3.0), (300, 9, 0.1), (60, 4, 0.0)])
def test_the_confident_joint_is_that_of_the_paper(n, k, sharp):
    rng = np.random.default_rng(n)
    truth = rng.choice(k, n, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())
    truth[truth == 1] = 0  # a class without examples
    scores = sharp * (rng.normal(size=(n, k)) + 2 * np.eye(k)[truth])
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    given, _ = plant(truth, k, rng)
    given[given == 1] = 0
    found = labels.confident(given, p)
    joint, share, suspects = by_the_paper(given, p)
    np.testing.assert_array_equal(found.joint, joint)
    np.testing.assert_allclose(found.share, share, atol=1e-15)
    assert found.share.sum() == pytest.approx(1) and np.flatnonzero(found.suspect).tolist() == suspects
    assert (found.suggested != given).all()
    if sharp == 0:  # all probabilities are equal: every example reaches the threshold of every class, its own too
        assert not suspects and (found.joint.diagonal() == np.bincount(given, minlength=k)).all()


def test_an_example_may_be_confident_of_a_class_that_is_not_its_most_probable_one():
    # Class 0 is predicted with 0.9 where it is given, class 1 with 0.3: 0.4 is much for class 1.
    p = np.array([[0.95, 0.05], [0.95, 0.05], [0.6, 0.4], [0.7, 0.3], [0.7, 0.3]])
    found = labels.confident(np.array([0, 0, 0, 1, 1]), p)
    assert found.suspect.tolist() == [False, False, True, False, False]
    assert found.joint.tolist() == [[2, 1], [0, 2]]


@pytest.mark.slow
def test_out_of_fold_probabilities_are_those_of_scikit_learn_with_the_strength_chosen_inside():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [30, 40, 7])
    features = (rng.normal(size=(77, 6)) + 1.5 * np.eye(6)[truth]).astype(np.float32)
    p = labels.out_of_fold(features, truth, 4, 3, 5)
    expected = np.zeros((77, 3))
    for seen, unseen in StratifiedKFold(3, shuffle=True, random_state=5).split(features, truth):
        x, y, nll = features[seen].astype(np.float64), truth[seen], {}
        a, b = next(StratifiedKFold(3, shuffle=True, random_state=5).split(x, y))
        for c in probes.GRIDS["logistic"]:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=10_000)).fit(x[a], y[a])
            nll[c] = -model.predict_log_proba(x[b])[np.arange(len(b)), y[b]].mean()
        model = make_pipeline(StandardScaler(), LogisticRegression(C=min(nll, key=nll.get), max_iter=10_000))
        expected[unseen] = model.fit(x, y).predict_proba(features[unseen].astype(np.float64))
    assert p[:, 3].max() < 0.1  # a class without examples
    np.testing.assert_allclose(p[:, :3] / p[:, :3].sum(axis=1, keepdims=True), expected, atol=2e-5)
    changed = features.copy()
    changed[4] += 100.0  # what an example is predicted does not depend on the others of its fold
    held_out = next(u for _, u in StratifiedKFold(3, shuffle=True, random_state=5).split(truth, truth) if 4 in u)
    others = held_out[held_out != 4]
    np.testing.assert_array_equal(labels.out_of_fold(changed, truth, 4, 3, 5)[others], p[others])


@pytest.mark.slow
def test_planted_errors_of_digits_are_at_the_top_whatever_the_number_of_devices(tmp_path, monkeypatch, capsys):
    planted = write_digits(tmp_path / "digits.npz", np.random.default_rng(0))
    run = train_run(tmp_path / "run", **{"data.source": f"arrays:{tmp_path}/digits.npz", "data.test": ""})
    capsys.readouterr()
    assert commands.main(["labels", str(run)]) == 0
    shown = capsys.readouterr().out
    rows, summary = read(run), read(run, "labels.json")
    assert len({row["id"] for row in rows}) == len(rows) and {row["split"] for row in rows} == {"train", "val"}
    assert [int(row["rank"]) for row in rows[:50]] == list(range(1, 51))
    top = {row["id"] for row in rows if int(row["rank"]) <= len(planted)}
    assert len(planted) == 51 and len(top & planted) >= 38
    suspects = {row["id"] for row in rows if row["suspect"] == "yes"}
    assert summary["suspects"] == len(suspects) and len(suspects & planted) > 0.75 * len(suspects)
    assert 0.03 < summary["errors"] < 0.09 and summary["labels"] == 1029
    assert sum(pair["suspects"] for pair in summary["pairs"]) == len(suspects)
    for row in rows:
        given, suggested, margin = (float(row[n]) for n in ("probability_given", "probability_suggested", "margin"))
        assert row["given"] != row["suggested"] and margin == pytest.approx(suggested - given, abs=2e-4)
    assert (run / "labels" / "labels.png").stat().st_size > 10_000
    about = [line for line in shown.splitlines() if "features" not in line and str(run) not in line]
    assert max(map(len, about)) <= 80 and rows[9]["id"] in shown
    manifest.check(run)  # of the run nothing has changed
    one = sharding.make_parallel("jit", jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_parallel", lambda mode: one)
    monkeypatch.setattr(feature_cache, "FOLDER", tmp_path / "others")
    monkeypatch.setattr(plotting, "figure_at", None)  # a figure that fails is one line
    labels.suspects(run, tmp_path / "one" / "labels")
    assert "labels.png: left out (TypeError" in capsys.readouterr().out
    again = read(tmp_path / "one")
    assert [row["id"] for row in again] == [row["id"] for row in rows]
    for name in ("probability_given", "margin"):
        np.testing.assert_allclose(*([float(row[name]) for row in table] for table in (again, rows)), atol=2e-3)


def test_lookalikes_across_the_splits_are_those_of_centred_features():
    data = {name: sources.load("digits", cut) for name, cut in (("train", "train[:70]"), ("val", "train[70:100]"))}
    data["other"] = sources.load("digits", "test[:10]")
    x = np.random.default_rng(0).normal(3, 1, (110, 5)).astype(np.float32)
    x[83] = x[11] * 1.0001
    found = labels._lookalikes(data, x)
    z = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    cosines = z @ z.T / np.outer(np.linalg.norm(z, axis=1), np.linalg.norm(z, axis=1))
    best = np.sort(cosines[70:, :70].max(axis=1))[::-1]
    np.testing.assert_allclose([pair["cosine"] for pair in found], best[: len(found)], atol=1e-4)
    assert len(found) == labels.LOOKALIKES
    assert found[0]["train"] == data["train"].ids[11] and found[0]["scored"] == f"val: {data['val'].ids[13]}"
    assert labels._lookalikes({"train": data["train"]}, x) == labels._lookalikes({"val": data["val"]}, x) == []


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_splits_of_a_run_are_pooled_each_example_once(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_draw", lambda *_: None)
    told = []
    monkeypatch.setattr(labels, "out_of_fold", lambda x, y, k, *more: told.append(more) or np.full((len(y), k), 1 / k))
    small = {"data.train": "train[:20%]", "data.val": "", "data.test": ""}
    loo = train_run(tmp_path / "loo", **{**small, "data.resample": "loo", "method.name": "knn", "method.grid": (3.0,)})
    assert labels.suspects(loo)["splits"] == {"train": 206}  # no cut is made up
    extra = (("rest", "digits", "train[80%:]"), ("other", "digits:inverted", "test[:10%]"))
    drawn = {**small, "data.val": "train[80%:]", "data.resample": "bootstrap:1", "data.extra_eval": extra}
    found = labels.suspects(run := train_run(tmp_path / "drawn", **drawn))["splits"]
    assert list(found) == ["train", "val", "test", "other"]  # rest is val
    assert found["train"] + found["test"] == 206 and (found["val"], found["other"]) == (206, 77)
    assert labels.suspects(run, tmp_path / "only" / "labels", splits=["val"])["splits"] == {"val": 206}
    assert {row["split"] for row in read(tmp_path / "only")} == {"val"} and told[-1] == (5, 0, None)
    grouped = train_run(tmp_path / "grouped", **{"data.group": r"\d$", "data.train": "train[:50%]", "data.test": ""})
    labels.suspects(grouped, seed=3)
    assert told[-1][:2] == (5, 3) and len(set(told[-1][2])) == 7 and len(told[-1][2]) > 600


def test_no_fold_cuts_a_group(monkeypatch):
    rng = np.random.default_rng(0)
    groups, truth, calls = np.repeat(np.arange(24), 4).astype(str), rng.permuted(np.tile([0, 1], 48)), []

    def split(y, design, seed, groups):
        calls.append(found := resample.split(y, design, seed, groups))
        assert not {*groups[found[0]]} & {*groups[found[1]]}
        return found

    monkeypatch.setattr(labels, "resample", types.SimpleNamespace(split=split))
    p = labels.out_of_fold(rng.normal(size=(96, 3)), truth, 2, 4, 0, groups)
    assert len(calls) == 8 and p.shape == (96, 2) and p.sum(axis=1) == pytest.approx(1)


@pytest.mark.slow
def test_rows_of_a_table_are_judged_by_their_columns_and_small_classes_are_left_out(tmp_path, capsys):
    rng = np.random.default_rng(1)
    truth = np.repeat([0, 1], 60)
    x = rng.normal(size=(120, 3)) + 2.5 * truth[:, None]
    given, wrong = plant(truth, 2, rng)
    names = np.array(["low", "high"])[given].tolist() + ["odd"] * 3
    lines = [f"{a},{b},{c},{name}" for (a, b, c), name in zip([*x, *x[:3]], names, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,c,label", *lines]))
    run = train_run(tmp_path / "run", **{
        "data.source": f"table:{tmp_path}/t.csv", "model.name": "mlp_small", "model.weights": "", "data.test": "",
        "model.image_size": 0, "data.train": "train[:70%]", "data.val": "train[70%:]",
    })  # fmt: skip
    capsys.readouterr()
    summary = labels.suspects(run, top=len(wrong))
    assert "columns of the table" in summary["features"] and summary["too_few"] == ["odd (3)"]
    assert "left out, as fewer examples than folds: odd (3)" in capsys.readouterr().out
    top = {row["id"] for row in read(run) if int(row["rank"]) <= len(wrong)}
    assert len(top & {f"row/{i + 2}" for i in wrong}) >= 4 and len(wrong) == 6 and summary["labels"] == 120
    assert not (run / "labels" / "labels.png").exists()
    with pytest.raises(ValueError, match="expected two classes of 61"):
        labels.suspects(run, folds=61)


@pytest.mark.slow
def test_one_label_of_a_multilabel_task_at_a_time(tmp_path):
    few = {"total": (1.0, "steps"), "batch_size": 16, "eval_every": (1.0, "steps"), "log_every": (1.0, "steps")}
    run = train_run(tmp_path / "run", **{
        **few, "task": "multilabel", "data.source": "digits:pairs", "model.image_size": 20, "method.grid": (),
        "method.name": "linear_probe", "data.train": "train[:40%]", "data.val": "train[60%:80%]", "data.test": "",
    })  # fmt: skip
    with pytest.raises(ValueError, match="--label '': this task takes 0, 1, 2"):
        labels.suspects(run)
    summary = labels.suspects(run, label="0", top=4)
    assert summary["accuracy"] > 0.8
    assert {row["given"] for row in read(run)} | {row["suggested"] for row in read(run)} == {"0", "not 0"}


@pytest.mark.slow
def test_what_cannot_be_judged_is_refused_in_one_message(tmp_path, capsys):
    run = train_run(tmp_path / "run", **{"data.train": "train[:10%]", "data.val": "train[90%:]", "data.test": ""})
    with pytest.raises(ValueError, match="suspect labels cannot be looked for") as error:
        labels.suspects(run, folds=2, seed=-1, top=0, splits=("val", "tset"), label="7")
    for text in ("--folds 2: expected at least 3", "--seed -1: expected 0 .. 2**32 - 1", "--top 0: expected at least 1",
                 "--splits val,tset: expected some of train,val", "--label '7': this task takes none"):  # fmt: skip
        assert text in str(error.value)
    assert commands.main(["labels", str(tmp_path)]) == 2 and "no folder of a finished run" in capsys.readouterr().err
    (run / "predictions.npz").write_bytes(b"changed")
    assert commands.main(["labels", str(run)]) == 2 and "not as its run left it" in capsys.readouterr().err
    numbers = train_run(tmp_path / "numbers", **{
        "total": (1.0, "steps"), "eval_every": (1.0, "steps"), "method.name": "full", "method.grid": (),
        "task": "regression", "data.source": "table:diabetes", "model.name": "mlp_small", "model.weights": "",
        "model.image_size": 0,
    })  # fmt: skip
    assert commands.main(["labels", str(numbers)]) == 2 and "is a regression" in capsys.readouterr().err
    random = train_run(tmp_path / "random", **{"model.weights": "", "data.train": "train[:10%]"})
    assert commands.main(["labels", str(random)]) == 2
    assert "take a run that began with pretrained weights" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.exhaustive
def test_planted_errors_of_hymenoptera_are_at_the_top(shared, tmp_path):
    files = sorted((shared / "data" / "hymenoptera_256").glob("*/*/*.jpg"))
    weights = shared / "weights" / "deit_tiny_patch16_224" / "deit_tiny_patch16_224.safetensors"
    given, wrong = plant(
        np.array([path.parent.name == "bees" for path in files]).astype(int), 2, np.random.default_rng(0)
    )
    planted = set()
    for i, (path, label) in enumerate(zip(files, given, strict=True)):
        name = f"{path.parent.parent.name}/{('ants', 'bees')[label]}/{path.name}"
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).symlink_to(path)
        planted |= {name} if i in wrong else set()
    run = train_run(tmp_path / "run", **{
        "model.name": "deit_tiny_patch16_224", "model.weights": str(weights), "model.image_size": 0, "data.test": "",
        "data.source": f"folder:{tmp_path}/data", "data.train": "train", "data.val": "val", "cache": "features",
    })  # fmt: skip
    summary = labels.suspects(run)
    top = [row["id"] for row in read(run)[: len(planted)]]
    assert len(planted) == 20 and len(planted & set(top)) >= 15
    assert 0.03 < summary["errors"] < 0.09 and summary["splits"] == {"train": 244, "val": 153}
