"""Drift: each statistic against another implementation, verdicts, errors, the log, the monitor, and the command."""

import json
import math
import os
import pathlib
import re
import shlex
import shutil
import types

import numpy as np
import pytest
import scipy.stats
from PIL import Image, ImageFilter
from sklearn.linear_model import Ridge
from sklearn.metrics import confusion_matrix, roc_auc_score
from sklearn.metrics.pairwise import rbf_kernel

import tl_jax
from configs import smoke
from tl_jax import __main__ as command
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.api.model import observe
from tl_jax.serving import drift, drift_page
from tl_jax.serving import drift_monitor as monitor
from tl_jax.studies import inprocess
from tl_jax.studies.command import read_config

NAMES = ("ant", "bee", "<cat> & $dog$")
SPECS = {
    "classification": tasks.Spec("classification", NAMES),
    "binary": tasks.Spec("binary", ("no", "yes"), threshold=0.3),
    "multilabel": tasks.Spec("multilabel", NAMES),
    "regression": tasks.Spec("regression", ("age", "mass"), (1.0, 2.0), (3.0, 4.0)),
}


def make(task, count, seed=0, shift=0.0, width=6, share=(0.5, 0.3, 0.2)):
    """Predictions of a task: noisy outputs for known labels, features that `shift` moves. width 0: none of these."""
    rng, spec = np.random.default_rng(seed), SPECS[task]
    label = rng.choice(3, count, p=share)
    if task == "classification":
        values = 2 * np.eye(3)[label] + rng.normal(size=(count, 3))
    elif task == "binary":
        label = label % 2
        values = 2.0 * label - 1 + rng.normal(size=count)
    elif task == "multilabel":
        label = (rng.random((count, 3)) < share).astype(int)
        values = 2.0 * label - 1 + rng.normal(size=(count, 3))
    else:
        label = values = rng.normal(size=(count, 2)) * (1, 1000)
    features = rng.normal(size=(count, width)) + shift
    output = tasks.predictions.OUTPUT[task]
    values = values + shift * np.std(values, axis=0) * (1 if values.ndim == 1 else np.arange(values.shape[1]) > 0)
    return tasks.make_predictions({output: values}, label, np.arange(count), spec, features=features if width else None)


def ownership(n, m, permutations, rng):
    own = np.zeros((n + m, 1 + permutations), np.float32)
    own[:n] = 1
    own[:, 1:] = rng.permuted(own[:, 1:], axis=0)
    return own


def test_mmd_is_the_unbiased_estimate_with_the_p_value_of_its_permutations():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(25, 4)) + 0.3
    z, own = np.concatenate([x, y]).astype(np.float32), ownership(30, 25, 99, rng)
    square = scipy.spatial.distance.pdist(z.astype(np.float64), "sqeuclidean")

    def mmd2(a, b):
        aa, bb, ab = (rbf_kernel(*pair, gamma=1 / np.median(square)) for pair in ((a, a), (b, b), (a, b)))
        own_pairs = [(k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb)]
        return sum(own_pairs) - 2 * ab.mean()

    values = np.array([mmd2(z[column > 0].astype(float), z[column == 0].astype(float)) for column in own.T])
    found = drift.mmd(z, own)
    assert found.found["mmd2"] == pytest.approx(values[0], abs=1e-6)
    assert found.p == (1 + (values[1:] >= values[0]).sum()) / 100
    kernel = rbf_kernel(z.astype(float), gamma=1 / np.median(square))
    np.fill_diagonal(kernel, 0)
    is_x = own[:, 0] > 0
    witness = [
        row[is_x].sum() / (30 - own) - row[~is_x].sum() / (25 - 1 + own) for row, own in zip(kernel, is_x, strict=True)
    ]
    assert found.size == pytest.approx(roc_auc_score(is_x, witness), abs=1e-6)


def test_the_classifier_is_a_ridge_regression_that_has_not_seen_the_fold():
    rng = np.random.default_rng(1)
    z, own = rng.normal(size=(60, 7)).astype(np.float32), ownership(35, 25, 19, rng)
    z[:35] += 0.4
    found, folds = drift.classifier(z, own, np.random.default_rng(5)), np.random.default_rng(5).permutation(60)
    scaled = (z - z.mean(axis=0)) / z.std(axis=0)
    score = np.empty((60, 20))
    for fold in np.array_split(folds, drift.FOLDS):
        seen = np.setdiff1d(np.arange(60), fold)
        score[fold] = Ridge(alpha=0.7).fit(scaled[seen], own[seen]).predict(scaled[fold])
        score[fold] -= score[fold].mean(axis=0)
    assert found.size == pytest.approx(roc_auc_score(own[:, 0], score[:, 0]))
    gaps = [score[own[:, b] > 0, b].mean() - score[own[:, b] == 0, b].mean() for b in range(20)]
    assert found.p == (1 + sum(gap >= gaps[0] for gap in gaps[1:])) / 20


def test_distances_of_columns_are_those_of_scipy_with_ties_and_their_p_is_never_too_small():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(80, 5)), rng.normal(size=(50, 5)) * 1.5
    for each in (x, y):
        each[:, 1] = each[:, 1].round()
        each[:, 2], each[:, 3] = each[:, 2] > 1, 7.0
    p, ks, js, w1 = drift.marginals(x, y)
    for k in range(5):
        exact = scipy.stats.ks_2samp(x[:, k], y[:, k], method="exact")
        assert ks[k] == pytest.approx(exact.statistic) and p[k] >= exact.pvalue
        spread = x[:, k].std() or 1
        assert w1[k] == pytest.approx(scipy.stats.wasserstein_distance(x[:, k], y[:, k]) / spread)
    assert p[3] == 1 and ks[3] == js[3] == 0 and p[0] < 1
    edges = np.sort(np.concatenate([x[:, 0], y[:, 0]]))[np.arange(1, 10) * 13 - 1]
    shares = [np.bincount(np.searchsorted(edges, side[:, 0]), minlength=10) / len(side) for side in (x, y)]
    assert js[0] == pytest.approx(scipy.spatial.distance.jensenshannon(*shares, base=2))


@pytest.mark.parametrize(("n", "m"), [(20, 20), (20, 400), (200, 1000), (1000, 1000)])
def test_the_bound_of_the_kolmogorov_smirnov_test_holds_in_the_far_tail(n, m):
    for distance in np.arange(1, 20) / 20:
        x, y = np.arange(n) / n, (np.arange(m) + 0.5) / m + distance
        exact = scipy.stats.ks_2samp(x, y, method="exact")
        p, ks, *_ = drift.marginals(x[:, None], y[:, None])
        assert ks[0] == pytest.approx(exact.statistic) and p[0] >= exact.pvalue


@pytest.mark.parametrize("task", ["classification", "binary", "multilabel", "regression"])
def test_estimated_shares_are_the_true_ones_and_the_labels_of_new_are_not_read(task):
    reference, new = make(task, 2000), make(task, 1500, 1, share=(0.2, 0.2, 0.6))
    rows = drift.label_shift(reference, new._replace(labels=None), np.random.default_rng(0))
    if task == "regression":
        assert rows == []
        return
    assert [row["name"] for row in rows] == list(new.spec.class_names)
    counts = new.labels.mean(axis=0) if task == "multilabel" else np.bincount(new.labels) / 1500
    for row, true in zip(rows, counts, strict=True):
        assert row["low"] < true < row["high"] and row["high"] - row["low"] < 0.15
        assert row["weight"] == pytest.approx(row["share"] / row["reference"])
    if task == "classification":
        joint = confusion_matrix(reference.labels, reference.values.argmax(1)).T / 2000
        weights = np.linalg.solve(joint, np.bincount(new.values.argmax(1)) / 1500)
        np.testing.assert_allclose([row["weight"] for row in rows], weights)
        unseen = reference._replace(labels=np.minimum(reference.labels, 1))
        assert {row["share"] for row in drift.label_shift(unseen, new, np.random.default_rng(0))} == {None}


@pytest.mark.thin(4)
@pytest.mark.parametrize("width", [6, 0])
@pytest.mark.parametrize("task", SPECS)
def test_the_verdict_of_every_task_with_and_without_features(task, width):
    reference = make(task, 150, width=width)
    same = drift.compare(reference, make(task, 100, 2, width=width)._replace(labels=None))
    other = drift.compare(reference, make(task, 100, 2, 1.0, width)._replace(labels=None))
    assert (same["verdict"], other["verdict"]) == ("none", "drift")
    assert other["space"] == ("features" if width else "outputs") and json.dumps(other)
    columns = {"classification": 3, "binary": 1, "multilabel": 3, "regression": 2}[task]
    assert len(other["outputs"]) == columns and other["outputs"][-1]["name"] == SPECS[task].class_names[-1]
    p = [row["p"] for row in other["tests"]]
    assert [row["adjusted"] for row in other["tests"]] == [min(1, 3 * x) for x in p]
    assert p[1] == pytest.approx(min(1, columns * min(row["p"] for row in other["outputs"]) / 3 / columns), rel=1e-6)


def test_a_difference_of_many_examples_that_is_too_small_to_matter_is_no_drift(monkeypatch):
    monkeypatch.setattr(drift, "MOST", 400)
    found = drift.compare(make("regression", 9000, width=0), make("regression", 9000, 1, 0.1, width=0))
    assert found["verdict"] == "small"
    outputs = found["tests"][1]
    assert outputs["adjusted"] < 1e-4 and outputs["size"] < 0.1 and outputs["verdict"] == "small"


def test_constant_features_and_outputs_are_no_drift():
    reference, new = (make("binary", count) for count in (40, 30))
    flat = [each._replace(outputs={"logits": 0 * each.values}, features=0 * each.features) for each in (reference, new)]
    found = drift.compare(*flat)
    assert [row["p"] for row in found["tests"]] == [1, 1, 1] and found["verdict"] == "none"


@pytest.mark.slow
def test_a_few_null_splits_raise_few_false_alarms():
    verdicts = [
        drift.compare(make("classification", 30, 2 * i), make("classification", 25, 2 * i + 1), seed=i)["verdict"]
        for i in range(30)
    ]
    assert len(verdicts) - verdicts.count("none") <= 5  # of a binomial at 5 % this has the probability 0.997


def test_all_that_does_not_fit_is_said_at_once():
    reference, new = make("classification", 19), make("multilabel", 30, width=5)
    new = new._replace(spec=new.spec._replace(class_names=("ant", "wasp", "bee")))
    with pytest.raises(ValueError) as error:
        drift.compare(reference, new)
    for text in ("task", "missing <cat>", "additional wasp", "19 examples, expected at least 20", r"[N, 6]", r"[N, 5]"):
        assert text in str(error.value)
    with pytest.raises(ValueError, match=r"reference has no features.*\n.*new has no features"):
        drift.compare(make("binary", 30, width=0), make("binary", 30, width=0), "features")
    features = new.features.copy()
    features[3, 2] = np.nan
    with pytest.raises(ValueError, match="features of new are not all finite"):
        drift.compare(make("multilabel", 30, width=5), make("multilabel", 30, width=5)._replace(features=features))


@pytest.mark.parametrize("task", SPECS)
def test_a_log_gives_what_was_appended_and_survives_a_kill(tmp_path, task, capsys):
    path, rows = tmp_path / "requests.jsonl", make(task, 3)
    log = monitor.Log(path, rows.spec)
    log.append(rows.values[0], rows.features[0])
    with path.open("ab") as file:
        file.write(b'{"time": 1.0, "outp')  # a process that was killed
    again = monitor.Log(path, rows.spec)
    again.append(rows.values[1], rows.features[1])
    log.append(rows.values[2], rows.features[2])
    found = monitor.load_log(path)
    assert "1 lines are damaged" in capsys.readouterr().err
    assert found.spec == rows.spec and found.labels is None
    np.testing.assert_array_equal(found.values, rows.values)
    np.testing.assert_array_equal(found.features, rows.features)
    monitor.Log(path, rows.spec).append(rows.values[2])
    assert monitor.load_log(path).features is None
    with pytest.raises(ValueError, match="name another file"):
        monitor.Log(path, tasks.Spec("binary", ("a", "b")))


def test_a_log_that_is_moved_or_emptied_begins_anew(tmp_path):
    path, rows = tmp_path / "requests.jsonl", make("classification", 4)
    log = monitor.Log(path, rows.spec)
    log.append(rows.values[0])
    path.rename(tmp_path / "old.jsonl")
    log.append(rows.values[1])
    log.append(rows.values[2])
    found = [monitor.load_log(tmp_path / name).values for name in ("old.jsonl", "requests.jsonl")]
    np.testing.assert_array_equal(found[0], rows.values[:1])
    np.testing.assert_array_equal(found[1], rows.values[1:3])
    os.truncate(path, 0)
    log.append(rows.values[3])
    np.testing.assert_array_equal(monitor.load_log(path).values, rows.values[3:])


def test_a_log_without_its_folder_is_left_out_and_comes_back(tmp_path):
    folder, rows = tmp_path / "logs", make("classification", 3)
    folder.mkdir()
    log = monitor.Log(folder / "x.jsonl", rows.spec)
    log.append(rows.values[0])
    before = len(os.listdir("/proc/self/fd"))
    shutil.rmtree(folder)
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            log.append(rows.values[1])
    assert len(os.listdir("/proc/self/fd")) == before
    folder.mkdir()
    log.append(rows.values[2])
    path = (folder / "x.jsonl").rename(folder / "x.jsonl.1")
    np.testing.assert_array_equal(monitor.load_log(path).values, rows.values[2:])
    assert drift_page.is_log(path) and not drift_page.is_log(folder)


def test_what_is_no_log_is_refused_by_name(tmp_path):
    path = tmp_path / "x.jsonl"
    for text, message in {
        "": "no log of a server", '{"a": 1}\n': "no log of a server", '{"task": {"nope": 1}}\n': "no log of a server",
        '{"task": {"name": "binary", "class_names": ["a", "b"]}}\n': "no sound log",
        '{"task": {"name": "binary", "class_names": ["a", "b"]}}\n{"outputs": [1, [2]]}\n': "no sound log",
        '{"task": {"name": "binary", "class_names": ["a", "b"]}}\n{"outputs": NaN}\n': "no sound log",
    }.items():  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=f"x.jsonl.*{message}"):
            monitor.load_log(path)


@pytest.mark.parametrize("width", [6, 0])
def test_a_monitor_raises_an_alarm_after_a_shift_and_tells_when(width):
    watch = monitor.Monitor(make("classification", 300, width=width), window=60, every=20)
    old, new = make("classification", 400, 1, width=width), make("classification", 200, 2, 2.0, width)

    def feed(rows):
        features = [None] * len(rows.values) if rows.features is None else rows.features
        return [watch.add(*pair) for pair in zip(rows.values, features, strict=True)]

    assert not any(feed(old))
    quiet = watch.state()
    assert quiet["requests"] == 400 and quiet["looks"] == 18 and not quiet["alarm"] and quiet["alarm_at"] is None
    alarms = feed(new)
    state = watch.state()
    assert state["alarm"] and state["drifting"] and alarms[-1] and not alarms[0]
    assert state["alarm_at"] == 400 + 1 + alarms.index(True) <= 600
    assert len(state["columns"]) == 3 + width and json.loads(json.dumps(state)) == state
    assert state["p"] == min(row["p"] for row in state["columns"]) <= state["level"] < quiet["level"]


def test_the_looks_of_a_monitor_never_spend_more_than_its_level():
    i = np.arange(monitor.FIRST, 10**6, dtype=np.float64)
    levels = drift.LEVEL / (monitor.SPENDING * i * np.log(i) ** 2)
    rest = drift.LEVEL / monitor.SPENDING / math.log(i[-1] + 0.5)  # the integral over all later looks, to infinity
    assert levels.sum() + rest == pytest.approx(drift.LEVEL, rel=1e-6)
    watch = monitor.Monitor(make("binary", 40), window=20, every=1)
    for _ in range(22):
        watch.add(np.float32(0), np.zeros(6, np.float32))
    assert watch.state()["level"] == pytest.approx(levels[2]) and watch.state()["spent"] == pytest.approx(
        levels[:3].sum()
    )


def test_what_cannot_be_watched_is_refused_with_all_reasons():
    with pytest.raises(ValueError) as error:
        monitor.Monitor(make("binary", 39), window=19, every=0)
    assert all(text in str(error.value) for text in ("window=19", "every=0", "39 examples, expected at least 40"))


def test_the_command_compares_files_in_80_columns_and_writes_a_page_that_needs_nothing_else(
    tmp_path, capsysbinary, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    reference, new = make("classification", 120), make("classification", 90, 1, 1.0)
    odd = tmp_path / "caf\udce9"  # not UTF-8
    odd.mkdir()
    tasks.save_predictions(odd / "reference.npz", reference)
    log, page = monitor.Log(tmp_path / "new.jsonl", new.spec), tmp_path / "page.html"
    for pair in zip(new.values, new.features, strict=True):
        log.append(*pair)

    def read():
        return [each.decode(errors="surrogateescape") for each in capsysbinary.readouterr()]

    arguments = ["drift", str(odd / "reference.npz"), str(tmp_path / "new.jsonl")]
    assert command.main([*arguments, "--out", str(page)]) == 0
    shown, text = read()[0], page.read_text()
    assert shown.startswith("DRIFT") and r"caf\udce9/reference.npz" in shown
    assert all(len(line) <= 80 or " " not in line.removeprefix("wrote ") for line in shown.splitlines())  # a path
    for table in ("the tests", "estimated shares"):
        assert table in shown and table in text
    assert (
        "<script" not in text and not re.search(r'(src|href)="(?!data:image/png;base64,)', text) and "http" not in text
    )
    assert "&lt;cat&gt; &amp; $dog$" in text and "<cat>" not in text
    assert command.main([*arguments, "--on", "outputs"]) == 0 and "look at the outputs" in read()[0]
    assert command.main([*arguments, "--last", "30"]) == 0 and " 30\n" in read()[0]
    assert command.main([*arguments, "--last", "1000"]) == 0 and " 90\n" in read()[0]
    assert command.main([*arguments, "--last", "5"]) == 2 and "new has 5 examples" in read()[1]
    assert command.main(["drift", str(tmp_path / "no.npz"), str(tmp_path)]) == 2
    error = read()[1]
    assert "no.npz" in error and "inputs need --run" in " ".join(error.split())
    assert command.main([*arguments, "--out", str(tmp_path / "page.pdf")]) == 2


@pytest.mark.parametrize(
    ("given", "new", "source"),
    [
        ({"data.source": "digits", "data.test": "test", "seeds": (1, 2)}, "caf\udce9 1", "folder:caf\udce9 1"),
        ({"data.source": ("digits", "digits:faded"), "data.val": "train[90%:]"}, "it's", "folder:it's"),
        ({"data.source": "digits", "data.resample": "kfold:5:0"}, "x.npz", "folder:NEW"),
        ({"data.source": "digits:ink", "task": "regression"}, "x.csv", "csv:x.csv"),
        ({"data.source": "table:a.csv", "task": "regression", "data.group": "site"}, "x.csv", "table:x.csv"),
        ({"data.source": "csv:a.csv", "task": "multilabel"}, "x.npz", "csv:NEW"),
    ],
)
def test_the_command_that_trains_again_is_the_config_of_the_run_on_new_data(tmp_path, monkeypatch, given, new, source):
    monkeypatch.chdir(tmp_path)
    if "." not in new:
        pathlib.Path(new).mkdir()
    old = options.flatten(options.override(options.make(), given))
    pathlib.Path("config.json").write_text(json.dumps(old))
    command = shlex.split(drift_page.retrain(types.SimpleNamespace(options=old, folder=tmp_path), new))
    assert command[:4] == ["python", "-m", "tl_jax", "train"] and command[-1] == f"{tmp_path}-retrained"
    items = [item.removeprefix("--config.") for item in command if item.startswith("--config.")]
    plain = {name: list(x) if isinstance(x, tuple) else x for name, x in drift_page.CHANGES.items()}
    assert options.flatten(read_config(command[4], items)) == {**old, **plain, "data.source": source}


@pytest.mark.slow
def test_folders_are_answered_by_the_run_and_the_printed_command_trains_it_again(tmp_path, capsys):
    run = tmp_path / "run"
    inprocess.run(smoke.get_config(), run)
    digits = tl_jax.load_data("digits", "test")
    for name, blur in (("old", 0.0), ("new", 1.5)):
        for i in range(150):
            path = tmp_path / name / str(digits.labels[i]) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.inputs[i]).filter(ImageFilter.GaussianBlur(blur)).save(path)
    capsys.readouterr()
    assert command.main(["drift", str(tmp_path / "old"), str(tmp_path / "new"), "--run", str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("DRIFT") and "labels of the reference" in shown
    again = shlex.split(shown.splitlines()[-1])
    assert command.main(again[3:]) == 0 and (pathlib.Path(again[-1]) / "result.json").exists()


def load_digits(shared):
    """(MNIST, blurred MNIST, USPS) as a ResNet-8 that has seen letters alone answers them, all of 16 x 16 pixels."""
    network = tl_jax.load("resnet8_cifar", "builtin:glyphs", image_size=16)

    def read(name, blur=0.0):
        images = np.load(shared / "data" / "digits" / name)["image"][:6000]
        images = [Image.fromarray(x).filter(ImageFilter.GaussianBlur(blur)).resize((16, 16)) for x in images]
        return observe(network, np.stack([np.asarray(x.convert("RGB")) for x in images]))

    return read("mnist_10k.npz"), read("mnist_10k.npz", 1.0), read("usps.npz")


def take(found, rows):
    arrays = {name: x[rows] for name, x in found.outputs.items()}
    return found._replace(outputs=arrays, ids=found.ids[rows], features=found.features[rows])


@pytest.mark.slow
@pytest.mark.parametrize(("splits", "repeats"), [(60, 10), pytest.param(1000, 100, marks=pytest.mark.exhaustive)])
def test_false_alarms_and_power_on_mnist_usps_and_blur_at_200_examples(shared, splits, repeats):
    mnist, blurred, usps = load_digits(shared)
    p, verdicts = [], []
    for seed in range(splits):
        rows = np.random.default_rng(seed).permutation(6000)
        found = drift.compare(take(mnist, rows[:200]), take(mnist, rows[200:400]), seed=seed)
        p.append([row["p"] for row in found["tests"]])
        verdicts.append(found["verdict"])
    alarms = np.mean(np.array(verdicts) != "none")
    print(f"{splits} null splits: {alarms:.3f} alarms; p <= 5 %: {(np.array(p) <= 0.05).mean(axis=0)}")
    assert alarms <= 0.07
    if splits == 1000:
        assert 0.03 <= np.mean(np.array(p)[:, 0] <= 0.05) <= 0.07
    for name, other in (("USPS", usps), ("blur", blurred)):
        found = []
        for seed in range(repeats):
            rows = np.random.default_rng(seed).permutation(6000)
            found.append(drift.compare(take(mnist, rows[:200]), take(other, rows[200:400]), seed=seed))
        tests = np.mean([[row["verdict"] == "drift" for row in each["tests"]] for each in found], axis=0)
        power = np.mean([each["verdict"] == "drift" for each in found])
        print(f"{name}: power {power:.2f}; of each test {tests}")
        assert power >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("streams", "requests"), [(20, 3000), pytest.param(200, 20000, marks=pytest.mark.exhaustive)])
def test_a_monitor_of_long_streams_raises_few_false_alarms(streams, requests):
    alarms = 0
    for seed in range(streams):
        watch = monitor.Monitor(make("classification", 400, 2 * seed), window=100, every=50, seed=seed)
        stream = make("classification", requests, 2 * seed + 1)
        alarms += any(watch.add(*pair) for pair in zip(stream.values, stream.features, strict=True))
    print(f"{alarms} of {streams} streams of {requests} requests raised an alarm")
    assert alarms <= 0.05 * streams
