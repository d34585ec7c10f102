"""Interpolations and soups: by hand on small trees, and between runs of the embedded network."""

import json

import jax
import numpy as np
import pytest
from counting import add_counted

from configs import quickstart
from tl_jax import __main__ as command
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import files, manifest, trees
from tl_jax.data import pipeline, sources
from tl_jax.methods import probes
from tl_jax.runtime import sharding
from tl_jax.studies import soups
from tl_jax.training import build, steps
from tl_jax.weights import load

SPLITS = {"val": "train[90%:]", "test": "test[:10%]", "rest": "test[90%:]"}
MODEL, LOADED, CARD, *_ = load.load("resnet8_cifar", "builtin:glyphs", 10, image_size=16)
SPEC = tasks.Spec(class_names=tuple("0123456789"))
STEP = jax.jit(steps.make_eval_step(steps.Reader(MODEL, CARD, "image"), tasks.make(SPEC)))


def forward(variables, split):
    """Predictions of the embedded network without the code under test."""
    source = sources.load("digits", split)
    batch = pipeline.eval_batches(source, {"image": pipeline.View(CARD)}, len(source))[0]
    found = STEP(jax.device_get(variables), batch["image"])
    return tasks.make_predictions({"logits": found["logits"]}, source.labels, source.ids, SPEC, found["features"])


@pytest.fixture(scope="module")
def head():
    train = forward(LOADED, "train[:20%]")
    return probes.fit("ridge", (train.features, train.labels), None, 10, (100.0,)).head


def with_head(head, factor=1.0, noise=0.0, seed=0):
    """Variables with `factor` times that head, and a backbone shaken by relative noise, batch_stats too."""
    rng = np.random.default_rng(seed)
    flat = {p: np.asarray(x) * (1 + noise * rng.uniform(-1, 1, x.shape)) for p, x in trees.flatten(LOADED).items()}
    flat |= {f"params/head/{name}": factor * leaf for name, leaf in head.items()}
    return trees.unflatten({path: leaf.astype(np.float32) for path, leaf in flat.items()})


def finish(folder, variables, scored="test", **changes):
    """The folder of a finished run that came to these variables."""
    config = quickstart.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({
            "data.train": "train[:20%]", "data.val": SPLITS["val"], "data.test": SPLITS["test"], "resamples": 20,
            "data.extra_eval": (("rest", "digits", SPLITS["rest"]),), **changes,
        })  # fmt: skip
    folder.mkdir()
    files.write_json(folder / "config.json", options.identity(config))
    names = sources.load("digits", "test").class_names
    load.export(variables, "resnet8_cifar", folder / "model.safetensors", card=CARD.replace(class_names=names))
    tasks.save_predictions(folder / "predictions.npz", forward(variables, SPLITS[scored]))
    manifest.write(folder, "result.json", {"metrics": {}, "extra_eval": {}})
    return folder


@pytest.fixture(scope="module")
def ends(tmp_path_factory, head):
    """Two finished runs: the loaded backbone with a head, and a shaken backbone with twice that head."""
    root = tmp_path_factory.mktemp("runs")
    a, b = with_head(head), with_head(head, 2.0, noise=0.4)
    return (finish(root / "a", a, **{"method.name": "linear_probe", "method.k": 0}), a), (finish(root / "b", b), b)


def small(*values):
    tree = {"params": {"w": np.float32(values)}, "batch_stats": {"mean": np.float32(values[0])}}
    return tree


def test_interpolation_goes_along_the_straight_line_in_every_collection():
    a, b = small(1.0, 2.0), small(5.0, -2.0)
    for alpha, expected in ((0, (1.0, 2.0)), (0.25, (2.0, 1.0)), (1, (5.0, -2.0))):
        between = soups.interpolate(a, b, alpha)
        np.testing.assert_array_equal(between["params"]["w"], np.float32(expected))
        np.testing.assert_array_equal(between["batch_stats"]["mean"], np.float32(expected[0]))
        assert between["params"]["w"].dtype == np.float32
    mean = soups.average(iter([a, b, small(0.0, 3.0)]))
    np.testing.assert_allclose(mean["params"]["w"], [2.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(mean["batch_stats"]["mean"], 2.0, rtol=1e-6)


def test_the_greedy_soup_leaves_out_what_hurts_and_keeps_what_does_not():
    ingredients, tried = [small(-9.0), small(2.0), small(5.0), small(3.0)], []

    def score(variables):  # the nearer to 3, the better
        tried.append(float(variables["params"]["w"][0]))
        return {"accuracy": -abs(tried[-1] - 3), "loss": 0.0}

    alone = [{"accuracy": a, "loss": v} for a, v in ((-2.0, 0.0), (-1.0, 0.2), (-1.0, 0.1), (-3.0, 0.0))]
    monitor = (("accuracy", "max"), ("loss", "min"))
    kept, soup = soups.greedy(alone, lambda i: ingredients[i], score, monitor)
    assert tried == pytest.approx([3.5, -2 / 3, 10 / 3])  # 5 and 2, both with -9, both with 3
    assert kept == [2, 1, 3] and float(soup["params"]["w"][0]) == pytest.approx(10 / 3)
    kept, _ = soups.greedy(alone[1:2] * 3, lambda i: ingredients[3], lambda _: {"accuracy": -1.0, "loss": 9.0}, monitor)
    assert kept == [0, 1, 2]  # what changes nothing is kept


@pytest.mark.slow
@pytest.mark.thin(1)
def test_the_curve_between_two_runs_is_what_the_interpolated_networks_score(ends, tmp_path, monkeypatch):
    (a, first), (b, second) = ends
    panels, draw = [], soups.charts.lines

    def lines(path, found, *args, **style):
        panels.extend(found.values())
        draw(path, found, *args, **style)

    monkeypatch.setattr(soups.charts, "lines", lines)
    report = soups.wise_ft(soups.load(a), soups.load(b), tmp_path / "out", 5)
    assert report["alphas"] == [0, 0.25, 0.5, 0.75, 1] and list(report["curves"]) == list(SPLITS)
    for i, alpha in enumerate(report["alphas"]):
        flat = {p: (1 - alpha) * x + alpha * trees.flatten(second)[p] for p, x in trees.flatten(first).items()}
        for split, text in SPLITS.items():
            by_hand = tasks.scores(forward(trees.unflatten(flat), text))
            assert report["curves"][split]["accuracy"][i] == pytest.approx(by_hand["accuracy"])
            assert report["curves"][split]["loss"][i] == pytest.approx(by_hand["loss"], abs=1e-4)
    val = report["curves"]["val"]
    best = max(range(5), key=lambda i: (val["accuracy"][i], -val["loss"][i]))
    assert report["chosen"] == report["alphas"][best] and not report["chosen_on_scored_split"]
    assert report["metrics"]["accuracy"]["value"] == report["curves"]["test"]["accuracy"][best]
    assert report["extra_eval"]["rest"]["accuracy"]["value"] == report["curves"]["rest"]["accuracy"][best]
    assert len({*val["loss"]}) == 5 and report["a"]["method"] == "linear_probe"
    along, against = panels[:2]  # of the PNG; the SVG is the same
    assert list(along) == list(SPLITS) and list(against) == ["rest"]
    x, y = (report["curves"][split]["accuracy"] for split in ("test", "rest"))
    assert against["rest"] == {"x": x, "mean": y, "circle": [x[best], y[best]]}
    files = {"curve.json", "curve.png", "curve.svg", "model.safetensors", "predictions.npz", "predictions-rest.npz"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    table = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert table.pop("seal") and table == json.loads(json.dumps(report))
    written = load.load("resnet8_cifar", tmp_path / "out" / "model.safetensors").variables
    saved = tasks.load_predictions(tmp_path / "out" / "predictions.npz")
    np.testing.assert_allclose(forward(written, SPLITS["test"]).values, saved.values, atol=1e-4)


def test_the_start_of_a_run_is_its_weight_file_under_its_own_head(ends, tmp_path, capsys):
    (_, _), (b, second) = ends
    begun = soups.load_start(soups.load(b))
    flat, loaded, ended = map(trees.flatten, (begun.variables, LOADED, second))
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, (ended if path.startswith("params/head") else loaded)[path])
    assert command.main(["wise_ft", "start", str(b), "--out", str(tmp_path / "out"), "--alphas", "2"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    report = files.read_json(tmp_path / "out" / "curve.json")
    assert report["a"]["run"] == "start" and report["alphas"] == [0, 1]
    by_hand = tasks.scores(forward(begun.variables, SPLITS["test"]))["loss"]
    assert report["curves"]["test"]["loss"][0] == pytest.approx(by_hand, abs=1e-4)


def test_the_start_of_a_run_has_the_parts_that_it_drew_anew(head, tmp_path):
    """Against the network that the trainer builds from the same options before its first step."""
    changes = {"model.reinit": ("stage3", "stage2/block0"), "data.extra_eval": ()}
    end = soups.load(finish(tmp_path / "run", with_head(head), **changes))
    flat, loaded = trees.flatten(soups.load_start(end).variables), trees.flatten(LOADED)
    parallel = sharding.make_parallel()
    built = trees.flatten(build.prepare(end.settings, parallel).variables)
    kept = {path for path in flat if "/head/" not in path and not ("/stage3/" in path or "/stage2/" in path)}
    assert {path for path in flat if np.array_equal(flat[path], loaded[path])} >= kept
    kernels = [path for path in flat if path.endswith("kernel") and "/backbone/" in path]
    assert {path for path in kernels if not np.array_equal(flat[path], loaded[path])} == {*kernels} - kept
    for path in flat:
        expected = head[path.rpartition("/")[2]] if "/head/" in path else built[path]
        np.testing.assert_array_equal(flat[path], expected, err_msg=path)


def test_a_soup_is_chosen_on_val_and_read_on_test_when_nothing_is_left_to_choose(ends, head, tmp_path, monkeypatch):
    reads, (first, second, third) = add_counted(monkeypatch), (ends[0][1], with_head(head, 2.0), with_head(head, -9.0))
    a, b, bad = (
        finish(tmp_path / name, variables, **{"data.source": "counted"})
        for name, variables in (("a", first), ("b", second), ("bad", third))
    )
    reads.clear()
    assert command.main(["soup", str(bad), str(a), str(b), "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "soup.json").read_text())
    assert [(row["run"] == str(bad), row["kept"]) for row in report["ingredients"]] == [
        (False, True), (False, True), (True, False),
    ]  # fmt: skip
    assert report["val"]["greedy"]["accuracy"] >= report["val"]["best"]["accuracy"]
    assert report["val"]["uniform"]["accuracy"] < report["val"]["best"]["accuracy"]
    splits = [split for split, _ in reads]  # val is cut from train
    assert splits == ["train"] * splits.count("train") + ["test"] * 3 * 77 and splits.count("train")
    kept = [{str(a): first, str(b): second}[row["run"]] for row in report["ingredients"] if row["kept"]]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *kept)
    written = load.load("resnet8_cifar", tmp_path / "out" / "model.safetensors").variables
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), written, mean)
    files = {"soup.json", "soup.png", "soup.svg", "model.safetensors", "predictions.npz", "predictions-rest.npz"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert report["metrics"]["count"] == report["uniform"]["count"] == report["best"]["count"] == 77


def test_without_val_alpha_is_the_middle_and_a_soup_is_refused(head, tmp_path):
    a, b = (finish(tmp_path / name, with_head(head, k), **{"data.val": "", "data.extra_eval": ()}) for name, k in
            (("a", 1.0), ("b", 2.0)))  # fmt: skip
    report = soups.wise_ft(soups.load(a), soups.load(b), tmp_path / "out", 2)
    assert report["chosen"] == 0.5 and list(report["curves"]) == ["test"]
    with pytest.raises(ValueError, match="chosen on val, and these runs have none"):
        soups.soup([a, b], tmp_path / "soup")


def test_runs_that_cannot_be_averaged_are_refused_with_all_that_differs(ends, head, tmp_path, capsys):
    (a, variables), (b, _) = ends
    other = finish(tmp_path / "other", variables, **{"data.split_seed": 3, "data.train": "train[:30%]"})
    for form in (["wise_ft", str(a), str(other)], ["soup", str(b), str(a), str(other)]):
        assert command.main([*form, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "data.split_seed: 0 -> 3" in error and "data.train: 'train[:20%]' -> 'train[:30%]'" in error
    (other / "predictions.npz").unlink(), (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks predictions.npz, model.safetensors; expected the folder of"):
        soups.load(other)
    begun_at_random = finish(tmp_path / "random", variables, **{"model.weights": ""})
    with pytest.raises(ValueError, match="began with random weights"):
        soups.load_start(soups.load(begun_at_random))
    stale = finish(tmp_path / "stale", with_head(head, -1.0))
    (stale / "predictions.npz").write_bytes((a / "predictions.npz").read_bytes())
    manifest.write(stale)
    with pytest.raises(ValueError, match=r"predicts \d+ of \d+ examples otherwise than its predictions.npz"):
        soups.wise_ft(soups.load(a), soups.load(stale), tmp_path / "out", 2)
    with pytest.raises(ValueError, match="at least two runs, found 1"):
        soups.soup([a], tmp_path / "out")
