"""`tl_jax.rank` and `python -m tl_jax rank`: the right numbers, from the sets that runs share, and one message else."""

import csv
import json

import numpy as np
import pytest
import scipy.special
import scipy.stats

import tl_jax
from tl_jax import __main__ as front
from tl_jax.api import inputs
from tl_jax.api import rank as ranking
from tl_jax.data import sources
from tl_jax.methods import scores
from tl_jax.weights import load

GLYPHS, SPLIT, MORE = "builtin:glyphs", "train[:80]", "train[:150]"


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A file of the network of builtin:glyphs with random weights, and a head that was not trained either."""
    made = load.load("resnet8_cifar", GLYPHS, None)
    random = load.load("resnet8_cifar", "", made.card.num_classes, seed=3, head_init="lecun")
    path = tmp_path_factory.mktemp("noise") / "noise.safetensors"
    load.export(random.variables, "resnet8_cifar", path, card=made.card.replace(source="random"))
    return str(path)


@pytest.fixture(scope="module")
def found(noise, tmp_path_factory):
    return tl_jax.rank("digits", [noise, GLYPHS], split=MORE, cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_a_network_whose_features_separate_is_before_one_of_noise_by_every_score(found, noise):
    first, second = found["networks"]
    assert (first["weights"], second["weights"]) == (GLYPHS, noise)
    assert found["scores"] == list(scores.SCORES)
    assert set(first["ranks"].values()) == {1} and first["mean_rank"] == 1.0 and second["mean_rank"] == 2.0
    assert first["network"] == f"resnet8_cifar {GLYPHS}" and first["network"] in repr(found)
    assert any("2 networks" in note and "1 in 2" in note for note in found["notes"])


def test_the_scores_are_those_of_the_features_and_answers_that_the_network_gives(found):
    network = tl_jax.load("resnet8_cifar", GLYPHS)
    source = sources.load("digits", MORE)
    p = scipy.special.softmax(np.float64(tl_jax.outputs(network, source)), axis=1)
    expected = scores.compute(scores.SCORES, tl_jax.features(network, source), p, source.labels)
    own = found["networks"][0]["scores"]
    stable = [name for name in own if name not in ("nleep", "transrate")]
    assert {x: own[x] for x in stable} == pytest.approx({x: expected[x] for x in stable}, abs=1e-4)
    assert own["transrate"] == pytest.approx(expected["transrate"], rel=1e-4)


@pytest.mark.slow
def test_agreement_is_the_weighted_tau_of_the_columns(tmp_path):
    given = [GLYPHS, "resnet8_cifar=", "lenet="]
    made = tl_jax.rank("digits", given, split=SPLIT, cache_dir=str(tmp_path), scores=["knn", "logme", "leep"])
    rows = made["networks"]
    knn, logme = ([row["scores"][name] for row in rows] for name in ("knn", "logme"))
    expected = scipy.stats.weightedtau(np.round(knn, 9), np.round(logme, 9)).statistic
    assert made["agreement"]["knn"]["logme"] == pytest.approx(expected) == made["agreement"]["logme"]["knn"]
    assert made["agreement"]["leep"]["knn"] is None  # one network has it
    lacking = next(note for note in made["notes"] if "no classifier" in note)
    assert "lenet (random)" in lacking and rows[0]["network"] in [row["network"] for row in rows]
    ranks = scipy.stats.rankdata(-np.array([knn, logme]), "min", axis=1)
    assert [row["mean_rank"] for row in rows] == pytest.approx(ranks.mean(axis=0))
    assert sorted(row["mean_rank"] for row in rows) == [row["mean_rank"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "given", "task"),
    [("digits", GLYPHS, "classification"), ("docstrings", "builtin:docstrings", "classification"),
     ("table:diabetes", "", "regression")],
)  # fmt: skip
def test_the_next_linear_probe_of_the_same_examples_starts_at_once(data, given, task, tmp_path, capfd):
    if not given:
        source = sources.load(data, SPLIT, task=task)
        made = load.load("mlp_small", "", 1, columns=source.columns, mean=(0.0,) * 10, std=(1.0,) * 10)
        card = made.card.replace(task="regression", target_mean=(0.0,), target_std=(1.0,), class_names=("progression",))
        load.export(made.variables, "mlp_small", given := tmp_path / "mlp.safetensors", card=card)
    kept = tmp_path / "cache"
    first = tl_jax.rank(data, [str(given)], split=SPLIT, task=task, cache_dir=str(kept))
    assert len([*kept.glob("*/meta.json")]) == 1 and not first["networks"][0]["cached"]
    assert first["networks"][0]["features_per_second"] > 0 and not first["agreement"]
    assert first["scores"] == (["logme", "probe"] if task == "regression" else list(scores.SCORES))
    capfd.readouterr()
    changes = {"data.train": SPLIT, "data.val": "train[80:100]", "cache": "features", "cache_dir": str(kept)}
    changes |= {"total": (1.0, "steps"), "resamples": 10}
    network = tl_jax.load("", given)
    tl_jax.fit(network, data, task=task, changes=changes, workdir=tmp_path / "run")
    told = capfd.readouterr().out
    assert "computing the features of val" in told and "computing the features of train" not in told
    again = tl_jax.rank(data, [str(given)], split=SPLIT, task=task, cache_dir=str(kept))["networks"][0]
    assert again["cached"] and again["features_per_second"] is None
    assert again["scores"] == first["networks"][0]["scores"]


@pytest.mark.slow
def test_labels_of_several_kinds_in_memory(tmp_path):
    digits = sources.load("digits", SPLIT)
    several = np.stack([digits.labels % 2, digits.labels > 4], axis=1).astype(np.int32)
    targets = np.float32(digits.labels)[:, None]
    for labels, task in ((several, "multilabel"), (targets, "regression")):
        made = tl_jax.rank((digits.inputs, labels), [GLYPHS], task=task, cache_dir=str(tmp_path))
        features = tl_jax.features(tl_jax.load("", GLYPHS), digits)
        expected = scores.compute(["logme", "probe"], features, None, labels)
        assert made["networks"][0]["scores"] == pytest.approx(expected, abs=1e-4)
    binary = sources.load("digits", SPLIT).labels % 2
    made = tl_jax.rank((digits.inputs, binary), [GLYPHS], shots=0, scores=["knn"], cache_dir=str(tmp_path))
    assert made["networks"][0]["scores"]["knn"] > 0.5


def test_shots_are_those_of_a_run(tmp_path):
    made = tl_jax.rank("digits", [GLYPHS], split=SPLIT, shots=3, seed=5, scores=["knn"], cache_dir=str(tmp_path))
    source = sources.load("digits", SPLIT, shots=3, seed=5)
    features = tl_jax.features(tl_jax.load("", GLYPHS), source)
    assert made["examples"] == 30
    assert made["networks"][0]["scores"]["knn"] == pytest.approx(scores.knn(np.float64(features), source.labels))


@pytest.mark.slow
def test_all_that_cannot_be_ranked_is_one_message_before_any_feature(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no weights at all")
    given = [GLYPHS, "resnet999=", f"{tmp_path}/none.pth", f"{tmp_path}/bad.safetensors", "builtin:docstrings",
             f"resnet18={GLYPHS}"]  # fmt: skip
    with pytest.raises(ValueError, match=r"^5 of 6 networks cannot be ranked") as error:
        tl_jax.rank("digits", given, cache_dir=str(tmp_path / "cache"))
    assert all(each in str(error.value) for each in given[1:]) and not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=f"2 of 2 networks cannot be ranked:\n  {GLYPHS}, lenet=: unknown source"):
        tl_jax.rank("digit", [GLYPHS, "lenet="])
    with pytest.raises(ValueError, match="test is for what comes after"):
        tl_jax.rank("digits", [GLYPHS], split="train+test")
    with pytest.raises(ValueError, match="named twice"):
        tl_jax.rank("digits", [GLYPHS, GLYPHS])
    with pytest.raises(ValueError, match="leave out shots, or verify"):
        tl_jax.rank("digits", [GLYPHS], shots=2, verify=10)
    with pytest.raises(ValueError, match=r"'logmi' \(did you mean 'logme'\?\)"):
        tl_jax.rank("digits", [GLYPHS], scores=["logmi"], cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="5 folds need at least 5 examples of every class: class 0 has 3"):
        tl_jax.rank("digits", [GLYPHS], split="train[:30]", verify=5, cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    by_leep = tl_jax.rank("digits", ["resnet8_cifar=", GLYPHS], split=SPLIT, scores=["leep"], cache_dir=str(tmp_path))
    assert [row["mean_rank"] for row in by_leep["networks"]] == [1.0, 2.0] and not by_leep["agreement"]["leep"]["leep"]


def test_names_of_files_may_have_an_equals_sign(tmp_path):
    path = tmp_path / "03-lr=0.1" / "model.safetensors"
    path.parent.mkdir()
    loaded = load.load("resnet8_cifar", GLYPHS, None)
    load.export(loaded.variables, "resnet8_cifar", path, card=loaded.card)
    made = tl_jax.rank("digits", [str(path)], split=SPLIT, scores=["leep"], cache_dir=str(tmp_path))
    named = tl_jax.rank("digits", [f"resnet8_cifar={path}"], split=SPLIT, scores=["leep"], cache_dir=str(tmp_path))
    assert made["networks"][0]["scores"] == named["networks"][0]["scores"] and named["networks"][0]["cached"]


@pytest.mark.slow
def test_a_projection_is_no_classifier(tmp_path, monkeypatch):
    clip_files = pytest.importorskip("clip_files")
    clip_files.add_names(monkeypatch)
    own = tl_jax.load("small_clip", clip_files.write("clip", tmp_path))
    assert own.card.num_classes == clip_files.EMBEDDING and not ranking._classifies(own)
    assert ranking._classifies(tl_jax.load("resnet8_cifar", GLYPHS))
    assert not ranking._classifies(tl_jax.load("resnet8_cifar", GLYPHS, num_classes=10))  # a new head


def test_a_network_that_load_gave_is_ranked_as_it_is(found, tmp_path):
    given = tl_jax.load("resnet8_cifar", GLYPHS)
    larger = tl_jax.load("resnet8_cifar", GLYPHS, image_size=40)
    own = found["networks"][0]["scores"]
    made = tl_jax.rank("digits", [larger, given], split=MORE, cache_dir=str(tmp_path), scores=["knn", "leep", "logme"])
    scores_of = {row["network"]: row["scores"] for row in made["networks"]}
    assert len(scores_of) == 2 and {name: own[name] for name in made["scores"]} in scores_of.values()
    assert len({values["logme"] for values in scores_of.values()}) == 2


@pytest.mark.slow
def test_the_command_fits_80_columns_and_writes_json_and_csv(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "table.csv"
    own = ["--data", "digits", "--weights", f"{GLYPHS},resnet8_cifar=", "--split", SPLIT]
    own += ["--cache_dir", str(tmp_path / "cache")]
    assert front.main(["rank", *own, "--out", str(out)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and any(line.startswith("agreement: weighted Kendall's tau") for line in lines)
    assert front.main(["rank", *own, "--json", "--scores", "leep,knn,logme"]) == 0
    read = json.loads(capfd.readouterr().out)
    assert [row["cached"] for row in read["networks"]] == [True] * 2 and read["examples"] == 80
    assert read["scores"] == ["leep", "knn", "logme"]
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == [row["network"] for row in read["networks"]]
    for row, other in zip(rows, read["networks"], strict=True):
        for name, value in other["scores"].items():
            assert row[name] == "" if value is None else float(row[name]) == pytest.approx(value, abs=1e-6)
    assert front.main(["rank", *own, "--scores", "lepp", "--out", str(tmp_path / "x.txt")]) == 2
    assert "--out" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "memory"])
def test_verify_compares_with_short_runs_on_held_out_examples_of_the_split(data, tmp_path):
    if data == "memory":
        source = sources.load("digits", "train[:150]")
        data, split = (source.inputs, source.labels), "train"
    else:
        split = "train[:150]"
    how = {"split": split, "cache_dir": str(tmp_path)}
    made = tl_jax.rank(data, [GLYPHS, "resnet8_cifar="], scores=["knn", "logme"], verify=30, **how)
    first = made["networks"][0]
    assert first["weights"] == GLYPHS and set(first["verified"]) == {"linear_probe", "full"}
    assert all(
        0.3 < value <= 1 and value * 30 == pytest.approx(round(value * 30)) for value in first["verified"].values()
    )
    assert made["agreement"]["knn"]["full"] == 1.0
    assert "accuracy on 30 examples, after 30 steps" in " ".join(made["notes"])


@pytest.mark.slow
def test_genuine_networks_are_before_random_and_foreign_ones(shared, tmp_path):
    weights = shared / "weights"
    deit = weights / "deit_tiny_patch16_224" / "deit_tiny_patch16_224.safetensors"
    given = [f"deit_tiny_patch16_224={deit}", GLYPHS, "deit_tiny_patch16_224="]
    data = f"folder:{shared}/data/hymenoptera_256"
    made = tl_jax.rank(data, given, split="train[:100]", cache_dir=str(tmp_path))
    assert made["networks"][0]["weights"] == str(deit) and made["networks"][0]["scores"]["probe"] > 0.9
    assert inputs.source_name(shared / "data" / "hymenoptera_256") == data
