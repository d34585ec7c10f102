"""The public face: `import tl_jax`, the notebook flow, and `python -m tl_jax`, on digits in memory and in files."""

import csv
import inspect
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image
from test_pretrained import TINY_VIT, add_variants

import tl_jax
from tl_jax import __main__ as command
from tl_jax import tasks
from tl_jax.api import inputs
from tl_jax.api.model import match_labels
from tl_jax.data.readers.arrays import array_source
from tl_jax.models import vit
from tl_jax.tasks import answers
from tl_jax.weights import load

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIGITS = sklearn.datasets.load_digits()
IMAGES, LABELS = np.uint8(np.clip(DIGITS.images * 16, 0, 255)), DIGITS.target
QUICK = {"resamples": 20, "log_every": (1.0, "steps")}


@pytest.fixture(scope="module")
def model():
    return tl_jax.load("resnet8_cifar", "builtin:glyphs", image_size=16)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """The last block trained on 96 digits in memory, scored on 64 others."""
    splits = {name: (IMAGES[a:b], LABELS[a:b]) for name, a, b in (("train", 0, 96), ("test", 96, 160))}
    return tl_jax.fit(
        model,
        splits,
        method="last_k",
        epochs=2,
        workdir=tmp_path_factory.mktemp("fit") / "w",
        changes=QUICK,
        verbose=False,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of four digits and a file that is no image."""
    folder = tmp_path_factory.mktemp("digits")
    for i in range(4):
        Image.fromarray(IMAGES[i]).convert("RGB").save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_importing_the_package_is_cheap_and_loads_no_jax():
    code = "import time; began = time.perf_counter(); import tl_jax, sys; spent = time.perf_counter() - began; "
    code += "dir(tl_jax); print(spent, 'jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    spent, *heavy = done.stdout.split()
    assert float(spent) < 0.3 and heavy == ["False", "False"]


def test_every_public_name_is_there_with_a_docstring():
    assert 20 <= len(tl_jax.__all__) <= 32 and set(tl_jax.__all__) <= set(dir(tl_jax))
    undocumented = [name for name in tl_jax.__all__ if not inspect.getdoc(getattr(tl_jax, name))]
    assert not undocumented
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = tl_jax.fitt


@pytest.mark.figures
def test_fit_on_arrays_gives_metrics_with_intervals_curves_and_figures(run):
    value = run.metrics["accuracy"]
    assert value["low"] <= value["value"] <= value["high"] and run.metrics["count"] == 64
    assert f"{value['value']:.4f}" in repr(run) and "last_k" in repr(run)
    steps, losses = run.curves["train/loss"]
    assert steps[-1] == 5 and losses[-1] < losses[0] and "val/accuracy" in run.curves
    assert run.plot()._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="did you mean 'learning_curves'"):
        run.plot("learning_curve")


def test_evaluating_the_run_anew_gives_the_numbers_of_the_trainer(run):
    found = run.evaluate((IMAGES[96:160], LABELS[96:160]))
    for name in ("accuracy", "nll", "roc_auc_macro"):
        assert found[name]["value"] == pytest.approx(run.metrics[name]["value"], abs=1e-5)
    saved = tasks.load_predictions(run.folder / "predictions.npz")
    np.testing.assert_allclose(tl_jax.outputs(run, IMAGES[96:160]), saved.values, atol=1e-4)
    np.testing.assert_allclose(tl_jax.features(run, IMAGES[96:160], batch_size=24), saved.features, atol=1e-4)


def test_a_saved_run_and_a_saved_network_predict_as_the_run_does(run, tmp_path):
    rows = run.predict(IMAGES[:5])
    again = tl_jax.load_run(run.save(tmp_path / "copy"))
    assert again.predict(IMAGES[:5]) == rows and not (tmp_path / "copy" / "checkpoints").exists()
    alone = tl_jax.load("", run.save(tmp_path / "a" / "m.safetensors"))
    assert tl_jax.predict(alone, IMAGES[:5]) == rows
    logits = np.float64(tl_jax.outputs(run, IMAGES[:5]))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert [row["class"] for row in rows] == [str(k) for k in p.argmax(1)]
    assert [row["probability"] for row in rows] == pytest.approx(p.max(1))
    assert [[q for _, q in row["top5"]] for row in rows] == [pytest.approx(np.sort(x)[:-6:-1]) for x in p]


def test_the_same_call_again_returns_the_run_that_is_there_and_prints_nothing_if_so_asked(model, run, capfd):
    splits = {name: (IMAGES[a:b], LABELS[a:b]) for name, a, b in (("train", 0, 96), ("test", 96, 160))}
    before = (run.folder / "result.json").stat().st_mtime_ns
    again = tl_jax.fit(model, splits, method="last_k", epochs=2, workdir=run.folder, changes=QUICK, verbose=False)
    assert capfd.readouterr() == ("", "")
    assert again.result == run.result and (run.folder / "result.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds a run with other options"):
        tl_jax.fit(model, splits, method="full", epochs=2, workdir=run.folder, changes=QUICK, verbose=False)


def test_fit_takes_a_folder_and_a_temporary_workdir_that_goes_with_the_run(model, tmp_path, capfd):
    for i in range(40):
        path = tmp_path / f"class{LABELS[i] % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(IMAGES[i]).convert("RGB").save(path)
    found = tl_jax.fit(model, tmp_path, method="ridge", changes=QUICK, verbose=False)
    assert capfd.readouterr() == ("", "")
    assert found.metrics["count"] == 8 and found.model.card.class_names == ("class0", "class1")
    folder = found.folder
    assert folder.exists()
    del found
    assert not folder.exists()


@pytest.mark.slow
def test_numbers_as_labels_are_a_regression_in_their_unit(model):
    ink = (IMAGES > 127).sum(axis=(1, 2)) * 10.0
    found = tl_jax.fit(model, (IMAGES[:60], ink[:60]), epochs=1, changes=QUICK, verbose=False)
    assert found.result["task"] == "regression" and set(found.metrics) >= {"rmse", "r2"}
    values = [row["values"]["0"] for row in found.predict(IMAGES[60:64])]
    assert 50 < np.mean(values) < 500


def test_knn_on_features_counts_neighbours(model):
    features = tl_jax.features(model, IMAGES[:120])
    found = tl_jax.knn((features[:80], LABELS[:80]), (features[80:], LABELS[80:120]), k=1, resamples=10)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = (unit[80:] @ unit[:80].T).argmax(1)
    assert found["accuracy"]["value"] == pytest.approx((LABELS[:80][nearest] == LABELS[80:120]).mean())


def test_what_cannot_be_fitted_is_refused_by_name(model, tmp_path):
    with pytest.raises(ValueError, match=r"no method 'loora' \(did you mean 'lora'\?\)"):
        tl_jax.fit(model, (IMAGES, LABELS), method="loora")
    with pytest.raises(ValueError, match=r"'lrr' does not exist \(did you mean 'lr'\?\)"):
        tl_jax.fit(model, (IMAGES, LABELS), changes={"lrr": 1})
    with pytest.raises(ValueError, match="several runs"):
        tl_jax.fit(model, (IMAGES, LABELS), changes={"seeds": (1,)})
    with pytest.raises(ValueError, match="expected a source such as"):
        tl_jax.fit(model, [IMAGES])
    with pytest.raises(ValueError, match=r"integer labels \[1797\]"):
        tl_jax.fit(model, (IMAGES, LABELS[:5]))
    with pytest.raises(ValueError, match=r"no result\.json"):
        tl_jax.load_run(tmp_path)
    with pytest.raises(ValueError, match="expected a model"):
        tl_jax.predict("model.safetensors", IMAGES)


def test_labels_are_matched_by_name_else_by_position_with_a_note_else_refused(capsys):
    pixels, labels = np.zeros((3, 4, 4, 3), np.uint8), np.array([0, 1, 1])
    spec = tasks.Spec(class_names=("ant", "bee", "cat"))

    def matched(*names, named=True, spec=spec):
        return match_labels(array_source("x", "test", pixels, labels, names), spec, named).tolist()

    assert matched("ant", "bee", "cat") == [0, 1, 1] and matched("cat", "ant") == [2, 0, 0]
    assert capsys.readouterr().err == ""
    assert matched("0", "1", "2") == [0, 1, 1] and "the data name no classes" in capsys.readouterr().err
    numbers = tasks.Spec(class_names=("0", "1", "2"))
    assert matched("x", "y", "z", named=False, spec=numbers) == [0, 1, 1]
    assert "the card names no classes" in capsys.readouterr().err
    for names in [("ant", "wasp"), ("0", "1")]:
        with pytest.raises(ValueError, match="expected the same names"):
            matched(*names)


def test_a_data_set_is_written_and_read_back_as_it_was(tmp_path):
    folder = tmp_path / "photos"
    for i in range(6):
        path = folder / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[i]).save(path)
    source = tl_jax.load_data(f"folder:{folder}")
    inputs.write_arrays({"train": source}, tmp_path / "x.npz")
    again = tl_jax.load_data(f"arrays:{tmp_path}/x.npz")
    assert again.class_names == ("a", "b") and again.labels.tolist() == source.labels.tolist()
    assert [again.inputs[i] for i in range(6)] == [source.inputs[i] for i in range(6)]
    assert inputs.source_name(folder) == f"folder:{folder}" and inputs.source_name("digits") == "digits"
    assert inputs.source_name(tmp_path / "x.npz") == f"arrays:{tmp_path}/x.npz"


def test_answers_of_every_task_are_said_in_words():
    binary = tasks.Spec("binary", ("no", "yes"), threshold=0.9)
    found = answers.answers(binary, {"logits": np.array([2.0, 3.0])})
    assert [row["class"] for row in found] == ["no", "yes"] and {row["positive"] for row in found} == {"yes"}
    assert found[0]["probability"] == pytest.approx(1 / (1 + np.exp(-2)))
    multilabel = tasks.Spec("multilabel", ("sky", "sea"))
    (row,) = answers.answers(multilabel, {"logits": np.array([[1.0, -1.0]])})
    assert row["labels"] == ["sky"] and row["probabilities"]["sea"] == pytest.approx(1 / (1 + np.e))
    regression = tasks.Spec("regression", ("age",), (0.0,), (1.0,))
    assert answers.answers(regression, {"values": np.array([[3.5]])}) == [{"values": {"age": 3.5}}]


def test_predict_writes_csv_and_json_lines_and_counts_what_it_cannot_read(run, files, tmp_path, capsys):
    for suffix in ("csv", "jsonl"):
        out = tmp_path / f"a.{suffix}"
        assert command.main(["predict", str(run.folder), str(files), "--out", str(out), "--batch-size", "3"]) == 1
        error = capsys.readouterr().err
        assert "1 files cannot be read" in error and "notes.txt" in error
    with (tmp_path / "a.csv").open() as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert (
        [row["file"] for row in table] == [str(files / f"{i}.png") for i in range(4)] == [row["file"] for row in lines]
    )
    for row, line in zip(table, lines, strict=True):
        assert row["class"] == line["class"] and float(row["probability"]) == line["probability"]
        pairs = [[row[f"class_{k}"], float(row[f"probability_{k}"])] for k in range(2, 6)]
        assert line["top5"] == [[line["class"], line["probability"]], *pairs]
    assert [line["class"] for line in lines] == [row["class"] for row in run.predict(IMAGES[:4])]
    assert command.main(["predict", str(run.folder), *(str(files / f"{i}.png") for i in range(2))]) == 0
    assert capsys.readouterr().out.count("\n") == 3


@pytest.mark.parametrize("method", ["lora", pytest.param("prompt", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_predict_gives_what_a_run_with_added_parameters_scored(method, files, tmp_path, monkeypatch, capsys):
    """The file that the run began with has moved. LoRA is merged and needs it no more; adapters and prompts do."""
    add_variants(monkeypatch, vit.vit_variants("small_vit", TINY_VIT, 3, 48))
    base, moved = tmp_path / "base.safetensors", tmp_path / "moved.safetensors"
    began = tl_jax.load("small_vit", image_size=32, num_classes=0)
    tl_jax.save_weights(began.variables, "small_vit", base, card=began.card)
    model = tl_jax.load("small_vit", base, num_classes=0, image_size=32)
    splits = {"train": (IMAGES[4:36], LABELS[4:36]), "test": (IMAGES[:4], LABELS[:4])}
    both = {"method.add": (("prompt", {"tokens": 2}), ("adapter", {"bottleneck": 3}))} if method == "prompt" else {}
    changes = {**QUICK, **both, "lr": 1e-2}
    run = tl_jax.fit(model, splits, method=method, epochs=2, workdir=tmp_path / "w", changes=changes, verbose=False)
    base.rename(moved)
    pictures, out = [str(files / f"{i}.png") for i in range(4)], tmp_path / "a.jsonl"
    assert command.main(["predict", str(run.folder), *pictures, "--weights", str(moved), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    saved = tasks.load_predictions(run.folder / "predictions.npz")
    expected = answers.answers(saved.spec, saved.outputs)
    assert [row["class"] for row in rows] == [row["class"] for row in expected]
    assert [row["probability"] for row in rows] == pytest.approx([row["probability"] for row in expected], abs=1e-5)
    assert command.main(["predict", str(run.folder), *pictures]) == (0 if method == "lora" else 2)
    assert ("base.safetensors" in capsys.readouterr().err) == (method != "lora")


def test_evaluate_takes_a_run_or_a_weight_file_and_writes_predictions(run, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", test_image=IMAGES[96:160], test_label=LABELS[96:160])
    data, out = str(tmp_path / "x.npz"), tmp_path / "p.npz"
    assert command.main(["evaluate", str(run.folder), data, "--json", "--resamples", "5", "--out", str(out)]) == 0
    of_run = json.loads(capsys.readouterr().out)
    assert of_run["accuracy"]["value"] == pytest.approx(run.metrics["accuracy"]["value"])
    weights = ["--model", "resnet8_cifar", "--weights", str(run.folder / "model.safetensors")]
    assert command.main(["evaluate", *weights, data, "--split", "test", "--json", "--resamples", "5"]) == 0
    assert json.loads(capsys.readouterr().out) == of_run
    assert command.main(["metrics", str(out), "--json", "--resamples", "5"]) == 0
    assert json.loads(capsys.readouterr().out) == of_run


def test_evaluate_says_what_is_scored_and_that_every_parameter_is_frozen(run, capsys):
    sizes = [sum(x.size for x in jax.tree.leaves(run.model.variables["params"][part])) for part in ("backbone", "head")]
    assert command.main(["evaluate", str(run.folder), "digits", "--split", "test[:9%]", "--resamples", "2"]) == 0
    scored, network, *_ = capsys.readouterr().out.splitlines()
    assert scored == "scored: digits test[:9%], 69 examples; nothing trains"
    assert network.startswith(f"network: resnet8_cifar, {run.folder}; all {sum(sizes):,} parameters are frozen: ")
    assert network.endswith("backbone {:,} from the file, head {:,} from the file".format(*sizes))


@pytest.mark.parametrize("weights", ["", "builtin:glyphs"])
def test_a_head_that_nothing_trained_is_not_evaluated(weights):
    network = tl_jax.load("resnet8_cifar", weights, num_classes=10)
    with pytest.raises(ValueError, match="head of resnet8_cifar is untrained"):
        tl_jax.evaluate(network, "digits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nowhere", "x.png"], "no folder of a finished run"),
        (["predict", "RUN", "missing.png"], "do not exist"),
        (["predict", "RUN", "digits", "--out", "x.txt"], "expected a .csv or .jsonl file"),
        (["evaluate", "RUN"], "expected RUN DATA"),
        (["evaluate", "RUN", "folder:nowhere"], "no image folder"),
        (["evaluate", "RUN", "digits", "--split", "trian"], "has no split"),
        (["evaluate", "--model", "resnet21_cifar", "--weights", "builtin:glyphs", "digits"], "no model"),
        (["evaluate", "--weights", "builtin:glyphs", "digits"], "expected the same names"),
        (["train", "nowhere.py"], "there is no config nowhere.py"),
        (["verify", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(run, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([str(run.folder) if each == "RUN" else each for each in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in " ".join(error.split()) and "Traceback" not in error


@pytest.mark.slow
def test_train_runs_any_file_with_get_config(tmp_path):
    (tmp_path / "own.py").write_text(
        "from tl_jax import config\n\n\ndef get_config(arg=''):\n"
        "    return config.parse(config.make(), 'model=resnet8_cifar,weights=builtin:glyphs,method=knn,' + arg)\n"
    )
    options = ["--config.data.shots=4", "--config.resamples=10", "--config.model.image_size", "16"]
    done = subprocess.run(
        [sys.executable, "-m", "tl_jax", "train", "own.py:method.grid=(1,)", *options, "--workdir", "w"],
        cwd=tmp_path, env={"PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "w" / "config.json").read_text())["method.grid"] == [1]
    assert "accuracy" in done.stdout


def test_the_package_asks_for_ranges_that_hold_the_pinned_versions():
    ranges = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pins = re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    specifiers = pytest.importorskip("packaging.specifiers")
    table = {re.match(r"[\w-]+", text)[0]: text for text in ranges}
    assert table.keys() == dict(pins).keys()
    for name, version in pins:
        assert specifiers.SpecifierSet(table[name][len(name) :]).contains(version), (name, version)


@pytest.mark.slow
def test_genuine_cifar_weights_score_what_they_do_elsewhere(shared, tmp_path, capsys):
    """The first thousand test images; all ten thousand give 81.0 %."""
    with np.load(shared / "data" / "cifar10_jpeg" / "test.npz") as full:
        offsets = full["offsets"][:1001]
        arrays = {"bytes": full["bytes"][: offsets[-1]], "offsets": offsets, "labels": full["labels"][:1000]}
        np.savez(tmp_path / "test.npz", **{f"test_{k}": x for k, x in arrays.items()}, classes=full["classes"])
    weights = str(shared / "weights" / "cifar10_resnet" / "resnet20-12fca82f.th")
    given = ["--model", "resnet20_cifar", "--weights", weights, str(tmp_path / "test.npz"), "--json"]
    assert command.main(["evaluate", *given, "--resamples", "5"]) == 0
    printed = capsys.readouterr()
    assert "the card names no classes" in printed.err
    assert json.loads(printed.out)["accuracy"]["value"] == pytest.approx(0.81, abs=0.02)
    assert load.load("resnet20_cifar", weights).card.class_names == ()
