"""`python -m tl_jax classic`: its table, its files, what it reads; and the published cells of Office-Caltech."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from test_classic import two_domains

from experiments.office_caltech import run as study
from tl_jax import __main__ as main
from tl_jax.api import classic as command
from tl_jax.data import sources
from tl_jax.methods import classic


@pytest.fixture
def domains(tmp_path):
    """Two csv domains with text classes, and the arrays behind them."""
    xs, ys, xt, yt = two_domains(n=48, m=36, d=5, classes=3, shift=2.0)
    names = {2: "ant", 5: "bee", 8: "cat"}
    for name, x, y in (("s", xs, ys), ("t", xt, yt)):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["a", "b", "c", "d", "e", "kind"])
            writer.writerows([*row, names[k]] for row, k in zip(x.tolist(), y.tolist(), strict=True))
    given = [
        "classic",
        "--source",
        f"table:{tmp_path}/s.csv",
        "--target",
        f"table:{tmp_path}/t.csv",
        "--labels",
        "kind",
    ]
    return given, (np.float32(xs), (ys - 2) // 3, np.float32(xt), (yt - 2) // 3)


def test_the_command_prints_and_writes_what_the_library_gives(domains, tmp_path, capsys):
    given, (xs, ys, xt, yt) = domains
    out = tmp_path / "out"
    asked = ["--method", "sa,jda", "--scale", "zscore", "--arg", "k=3", "--arg", "jda.rounds=2", "--out", str(out)]
    assert main.main([*given, *asked, "--resamples", "200"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[2].startswith("none") and max(map(len, printed.splitlines())) <= 100
    a, b = classic.scale(xs, ("zscore",)), classic.scale(xt, ("zscore",))
    result = json.loads((out / "result.json").read_text())
    rows = {row["method"]: row for row in result["methods"]}
    for name, arguments in (("none", {}), ("sa", {"k": 3}), ("jda", {"k": 3, "rounds": 2})):
        predicted = classic.adapt(name, a, ys, b, **arguments).predict(b)
        assert rows[name]["accuracy"]["value"] == pytest.approx((predicted == yt).mean())
        assert rows[name]["accuracy"]["low"] <= rows[name]["accuracy"]["value"] <= rows[name]["accuracy"]["high"]
        assert rows[name]["arguments"] == arguments
    gain = rows["jda"]["accuracy"]["value"] - rows["none"]["accuracy"]["value"]
    assert rows["jda"]["against_none"]["value"] == pytest.approx(gain)
    with (out / "table.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["none", "sa", "jda"]


@pytest.mark.parametrize("method", classic.WEIGHTING)
def test_weights_are_written_with_the_ids_of_the_source(domains, tmp_path, method):
    given, (xs, ys, xt, _) = domains
    out = tmp_path / "out"
    assert main.main([*given, "--method", method, "--classifier", "logistic", "--out", str(out)]) == 0
    with np.load(out / f"weights_{method}.npz", allow_pickle=False) as file:
        assert sorted(file) == ["ids", "weight"]
        ids, weight = file["ids"], file["weight"]
    source = sources.load(given[2], "train", labels=("kind",))
    assert ids.dtype.kind == "U" and ids.tolist() == list(source.ids)
    assert weight.dtype == np.float64 and weight.mean() == pytest.approx(1)
    np.testing.assert_allclose(weight, classic.adapt(method, xs, ys, xt, classifier="logistic").weights)


def test_tradaboost_reads_the_labels_of_its_shots_and_is_scored_on_the_others(domains, tmp_path, capsys):
    given, _ = domains
    out, asked = tmp_path / "out", ["--method", "tradaboost", "--classifier", "svm"]
    assert main.main([*given, *asked, "--shots", "2", "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["count"] == 36 - 3 * 2 and result["shots"] == 2
    assert main.main([*given, *asked, "--shots", "12"]) == 2
    assert "none is left to score" in capsys.readouterr().err
    assert main.main([*given, *asked]) == 2 and "tradaboost needs labelled" in capsys.readouterr().err


def test_the_labels_of_the_target_change_no_prediction(domains, tmp_path, monkeypatch):
    given, _ = domains
    predicted = []
    score = command.score
    monkeypatch.setattr(
        command, "score", lambda found, *rest, **more: predicted.append(found) or score(found, *rest, **more)
    )
    asked = ["--method", "jda,sa,gfk,ot_da", "--target-split", "train[:70%]"]
    assert main.main([*given, *asked]) == 0
    lines = (tmp_path / "t.csv").read_text().splitlines()
    kinds = [line.rpartition(",")[2] for line in lines[1:]]
    turned = [f"{line.rpartition(',')[0]},{kind}" for line, kind in zip(lines[1:], kinds[1:] + kinds[:1], strict=True)]
    (tmp_path / "t.csv").write_text("\n".join([lines[0], *turned, ""]))
    assert main.main([*given, *asked]) == 0
    for name, before in predicted[0].items():
        np.testing.assert_array_equal(before, predicted[1][name])


def test_no_method_can_read_the_sealed_labels_of_the_target(domains):
    target = command.load_domain(domains[0][4], "train", ("kind",), sealed=True)
    with pytest.raises(ValueError, match="read before they are opened"):
        classic.adapt("none", target.inputs, target.labels, target.inputs)


def test_images_are_compared_by_the_features_of_a_network(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for domain, ground in (("a", 40), ("b", 90)):
        for i in range(8):
            path = tmp_path / domain / ("dark", "light")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(rng.integers(ground, ground + 60, (16, 16, 3)) + 100 * (i % 2))).save(path)
    given = ["classic", "--source", f"folder:{tmp_path}/a", "--target", f"folder:{tmp_path}/b", "--method", "coral"]
    assert main.main([*given, "--model", "resnet8_cifar", "--weights", "builtin:glyphs"]) == 0
    assert "coral" in capsys.readouterr().out
    assert main.main(given) == 2 and "--run RUN or --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (["--method", "tka,kmm"], ["no classic method 'tka' (did you mean 'tca'?)", "kmm weights examples, which 1nn"]),
        (["--arg", "kk=3"], ["'kk=3': expected argument=value or METHOD", "(did you mean 'k'?)"]),
        (["--method", "tca", "--arg", "tca.k=many"], ["tca: k = 'many', expected an integer of at least 1"]),
        (["--scale", "z"], ["no scaling 'z'"]),
        (["--classifier", "2nn"], ["no classifier '2nn' (did you mean '1nn'?)"]),
        (["--target", "SOURCE"], ["48 examples, such as row/", "are in both domains"]),
        (["--run", "nowhere"], ["without a network"]),
    ],
)
def test_bad_input_is_one_message(domains, changes, messages, capsys):
    changes = [domains[0][2] if each == "SOURCE" else each for each in changes]
    assert main.main([*domains[0], *changes]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(text in error for text in messages), error


def test_domains_of_other_classes_are_refused_by_name(domains, tmp_path, capsys):
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace("cat", "dog"))
    assert main.main(domains[0]) == 2
    error = capsys.readouterr().err
    assert "no class 'cat' of the source" in error and "no class 'dog' of the target" in error


def test_a_method_that_is_surely_worse_is_said_to_be():
    truth = np.arange(200) % 4
    half = np.where(np.arange(200) < 60, truth, (truth + 1) % 4)
    better, worse, same = command.score({"x": truth, "y": half[::-1] * 0 + 9, "none": half}, truth)
    assert not better["worse"] and worse["worse"] and not same["worse"]
    assert same["against_none"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert better["against_none"]["value"] == pytest.approx(0.7) and worse["against_none"]["high"] == pytest.approx(
        -0.3, abs=0.1
    )


@pytest.fixture(scope="module")
def office():
    from conftest import SHARED

    if not (folder := SHARED / "data" / "office_caltech10_surf").is_dir():
        pytest.skip(f"acceptance material is not here: {folder}")
    return study.load(folder)


def cells(table, method):
    return next((found, tolerance) for (a, b, tolerance), found in study.PUBLISHED.items() if (a, b) == (table, method))


def accuracy(office, method, task):
    (xs, ys), (xt, yt) = office[task[0]], office[task[2]]
    return 100 * (classic.adapt(method, xs, ys, xt).predict(xt) == yt).mean()


@pytest.mark.parametrize(
    "method", ["gfk", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "pca", "tca", "jda"))]
)
def test_published_cells_of_office_caltech_are_reproduced(office, method):
    published, tolerance = cells("first", method)
    assert len(published) == (12 if method == "none" else 2)
    for task, value in published.items():
        assert round(accuracy(office, method, task), 2) == pytest.approx(value, abs=tolerance + 1e-9), task
