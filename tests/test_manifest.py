"""What a finished run left is believed only as it left it: the manifest, the metrics, the study's configs; figures."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_study import make_study

import tl_jax
from configs import smoke
from tl_jax import config as options
from tl_jax.core import files, manifest, plotting
from tl_jax.core.files import read_json, write_json
from tl_jax.runtime.log import tolerate
from tl_jax.studies import inprocess, soups, store, worker
from tl_jax.studies.report import results
from tl_jax.training import finished, plots, train

LATER = {"MANIFEST.json", ".lock", "checkpoints"}  # what the manifest does not list, but for figures
EXTRA = {"data.extra_eval": (("rest", "digits", "test[80%:]"),), "resamples": 5, "total": (2.0, "steps")}


def make_config(**changes):
    return options.override(smoke.get_config(), {**EXTRA, **changes})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "w"
    return folder, train.train(make_config(), folder, verbose=False)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original[0], tmp_path / "w")


def edit(path, change):
    table = read_json(path)
    change(table)
    write_json(path, table)


def raise_accuracy(table):
    table["metrics"]["accuracy"]["value"] = 0.999


@pytest.mark.figures
def test_the_manifest_lists_every_file_but_those_that_change_later(original, tmp_path):
    hashes = read_json(original[0] / manifest.NAME)["sha256"]
    assert {path.name for path in original[0].iterdir()} - LATER == hashes.keys()
    assert all(files.sha256(original[0] / name) == sha256 for name, sha256 in hashes.items())
    manifest.check(original[0]), manifest.check(original[0], manifest.WEIGHTS)
    # Figures that are drawn anew, weights that were removed and files of others are no damage.
    copy = tl_jax.load_run(original[0]).save(tmp_path / "copy")
    tl_jax.load_run(copy).plot()
    (copy / "trained.safetensors").unlink(), (copy / "notes.txt").write_text("mine")
    assert tl_jax.load_run(copy).result == read_json(copy / "result.json")


LOADERS = {
    "the result of a finished run": lambda folder: train.train(make_config(), folder),
    "python -m tl_jax predict": tl_jax.load_run,
    "Run.result": lambda folder: tl_jax.Run(folder).result,
    "weight space": soups.load,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    "name", ["result.json", "predictions.npz", "predictions-rest.npz", "metrics.jsonl", "cost.json"]
)
def test_a_changed_file_is_named_wherever_a_finished_run_is_loaded(folder, name, load):
    path = folder / name
    if name == "result.json":
        edit(path, raise_accuracy)
    else:
        path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    (folder / "audit.json").unlink()
    both = rf"is not as its run left it.*audit.json \(found no file, expected .*{name} \(found .*restore them"
    with pytest.raises(ValueError, match=both):
        load(folder)


def test_a_run_without_manifest_is_refused_and_one_that_is_trusted_gets_it(folder):
    (folder / manifest.NAME).unlink()
    with pytest.raises(ValueError, match=r"has no MANIFEST.json.*older version.*manifest\.write"):
        tl_jax.load_run(folder)
    manifest.write(folder)
    assert tl_jax.load_run(folder).result == read_json(folder / "result.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (raise_accuracy, r"result.json: accuracy.value is 0.999, expected 0\.\d+ by predictions.npz"),
        (lambda t: t["extra_eval"]["rest"].update(count=9), r"count is 9, expected \d+ by predictions-rest.npz"),
        (lambda t: t["metrics"]["confusion"][0].__setitem__(1, 99), r"confusion\[0\]\[1\] is 99, expected \d+ by"),
        (lambda t: t["metrics"].update(luck={"value": 1.0}), r"luck is .*, expected 'nothing' by predictions.npz"),
        (lambda t: t["extra_eval"].update(new={"count": 3}), r"count is 3, expected 'nothing' by predictions-new.npz"),
    ],
)
def test_a_metric_that_the_predictions_contradict_is_named_with_its_file(folder, change, message):
    """Even where the manifest was made to fit."""
    edit(folder / "result.json", change)
    manifest.write(folder)
    with pytest.raises(ValueError, match=message):
        finished.read(folder)


def test_every_flipped_bit_of_what_a_run_leaves_is_seen(folder, original):
    rng, silent, names = np.random.default_rng(0), [], sorted({path.name for path in original[0].iterdir()} - {".lock"})
    names.remove("checkpoints")
    for i in range(150):
        path = folder / names[i % len(names)]
        content = path.read_bytes()
        bit = int(rng.integers(8 * len(content)))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            run = tl_jax.load_run(folder)
            manifest.check(
                folder, [name for name in manifest.WEIGHTS if name == path.name or path.name == manifest.NAME]
            )
            silent.append((path.name, bit, run))
        except ValueError as error:
            assert path.name in str(error) or manifest.NAME in str(error)
        path.write_bytes(content)
    assert not silent
    for name in manifest.WEIGHTS:  # checked where they are read
        content = bytearray((original[0] / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        read = tl_jax.weights.load.load if name == "model.safetensors" else tl_jax.weights.delta.load
        with pytest.raises(ValueError, match=rf"{name} \(found"):
            read("resnet8_cifar", folder / name) if name == "model.safetensors" else read(folder / name)


class Killed(BaseException):
    pass


def test_a_kill_between_manifest_and_result_loses_nothing(original, tmp_path, monkeypatch):
    real = files.write_text

    def write_text(path, text):
        if path.name == "result.json":
            raise Killed
        real(path, text)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(files, "write_text", write_text)
        train.train(make_config(), tmp_path / "w", verbose=False)
    assert (tmp_path / "w" / manifest.NAME).exists() and not (tmp_path / "w" / "result.json").exists()
    train.train(make_config(), tmp_path / "w", verbose=False)
    assert (tmp_path / "w" / "result.json").read_bytes() == (original[0] / "result.json").read_bytes()
    assert finished.read(tmp_path / "w") == read_json(original[0] / "result.json")


@pytest.mark.slow
def test_the_table_of_replicas_is_believed_as_it_was_written(tmp_path):
    config = make_config(replicas=((("lr", 1e-3),), (("lr", 1e-2),)))
    assert inprocess.run(config, tmp_path / "w") == inprocess.run(config, tmp_path / "w")
    edit(tmp_path / "w" / "replicas.json", lambda table: table.update(best=table["replicas"][0]["name"] + "x"))
    with pytest.raises(ValueError, match=r"replicas.json \(found"):
        inprocess.run(config, tmp_path / "w")


@pytest.mark.slow
def test_a_planned_run_trains_with_the_config_that_its_folder_names_or_not_at_all(tmp_path, capsys):
    study = make_study({"total": (1.0, "steps"), "resamples": 2}, together="none", seeds=(0,))
    changed, other, *_ = store.plan(tmp_path, "depth", "How deep?", study)
    path = store.run_folder(tmp_path, changed.key) / "config.json"
    edit(path, lambda table: table.update(lr=0.5))
    worker.work(tmp_path, only=[changed.key, other.key])
    found = {run.key: run for run in results.load(tmp_path).runs()}
    assert "the hash" in (error := found[changed.key].error) and "Start the study again" in error
    assert (found[changed.key].state, found[other.key].state) == ("failed", "done")
    # As the message says: planned again, and tried again.
    store.plan(tmp_path, "depth", "How deep?", study)
    assert store.retry(tmp_path) == 1
    worker.work(tmp_path, only=[changed.key])
    assert store.read_config(path.parent).lr == changed.config.lr and store.state(path.parent) == "done"
    # A finished run in the folder of another, and an accuracy written by hand, are no numbers of the report.
    shutil.rmtree(path.parent)
    shutil.copytree(store.run_folder(tmp_path, other.key), path.parent)
    edit(store.run_folder(tmp_path, other.key) / "result.json", raise_accuracy)
    found = {run.key: run for run in results.load(tmp_path).runs()}
    assert found[changed.key].scores == found[other.key].scores == {}
    assert "the hash" in found[changed.key].error and "result.json (found" in found[other.key].error


def test_a_set_that_is_trained_together_checks_its_configs_too(tmp_path):
    study = make_study(factors={"rate": {"low": {"lr": 1e-3}, "high": {"lr": 1e-2}}}, baseline={})
    runs = store.plan(tmp_path, "rates", "Which?", study)
    folders = [store.run_folder(tmp_path, run.key) for run in runs]
    edit(folders[1] / "config.json", lambda table: table.update(lr=0.5))
    with pytest.raises(ValueError, match=f"{runs[1].key}/config.json: its options have the hash"):
        worker.train_runs(folders, folders, tmp_path / "together" / "x", lambda step: False)


def test_the_plan_leaves_the_config_of_a_run_under_way(tmp_path):
    """Its manifest lists the file as it is when the run ends."""
    run = store.plan(tmp_path, "depth", "How deep?", make_study())[0]
    with store.claim(store.run_folder(tmp_path, run.key)):
        store.plan(tmp_path, "depth", "How deep?", make_study({"data.workers": 2}))
        assert store.read_config(store.run_folder(tmp_path, run.key)).data.workers == 0


@pytest.mark.slow
@pytest.mark.figures
def test_figures_never_stand_between_a_run_and_its_result(original, tmp_path, monkeypatch, capsys):
    def draw_run(rows, predictions, folder, *args):
        assert finished.read(folder)  # all of it is there before the first figure
        raise UnicodeError("no such\nglyph \udcff")

    with monkeypatch.context() as patched:
        patched.setattr(plots, "draw_run", draw_run)
        train.train(make_config(), tmp_path / "w")
    lines = [line for line in capsys.readouterr().out.splitlines() if "glyph" in line]
    assert lines == [r"figures: left out (UnicodeError: no such glyph \udcff); everything else is written"]
    assert (tmp_path / "w" / "result.json").read_bytes() == (original[0] / "result.json").read_bytes()
    train.train(make_config(), tmp_path / "w")  # as after a kill while they were drawn
    assert (tmp_path / "w" / "learning_curves.png").exists()
    with pytest.raises(KeyboardInterrupt), tolerate("figures"):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_the_figures_of_a_comparison_and_of_an_interpolation_do_not_stand_there_either(
    original, tmp_path, monkeypatch, capsys
):
    def fail(*args, **kwargs):
        raise RuntimeError("no figure")

    monkeypatch.setattr(plotting, "figure_at", fail)
    for name in ("comparison", "lines"):
        monkeypatch.setattr(soups.charts, name, fail)
    inprocess.run(make_config(seeds=(1,), total=(1.0, "steps")), tmp_path / "w")
    assert read_json(tmp_path / "w" / "comparison.json")["seeds"] == [0, 1]
    run = soups.load(original[0])
    soups.wise_ft(run, run, tmp_path / "out", 2)
    soups.soup([original[0], original[0]], tmp_path / "soup")
    assert (tmp_path / "out" / "curve.json").exists() and (tmp_path / "soup" / "soup.json").exists()
    text = capsys.readouterr().out
    assert all(f"{name}.png: left out (RuntimeError: no figure)" in text for name in ("comparison", "curve", "soup"))


@pytest.mark.figures
@pytest.mark.slow
def test_classes_whose_folders_are_not_utf_8_are_trained_on_and_drawn(tmp_path):
    rng = np.random.default_rng(0)
    for split, name in ((split, name) for split in ("train", "test") for name in (b"ant", b"bee\xff")):
        place = os.path.join(os.fsencode(tmp_path / "data" / split), name)
        os.makedirs(place)
        for i in range(4):
            with open(os.path.join(place, b"%d.png" % i), "wb") as file:
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(file, "png")
    data = {"data.source": f"folder:{tmp_path / 'data'}", "data.val": "", "data.train": "train", "data.test": "test"}
    config = make_config(**data, **{"data.extra_eval": (), "select": "last", "batch_size": 8, "data.shots": 0})
    inprocess.show(inprocess.run(config, tmp_path / "w"), config, tmp_path / "w")
    assert finished.read(tmp_path / "w")["metrics"]["count"] == 8
    assert (tmp_path / "w" / "confusion_matrix.png").exists()
    assert json.loads((tmp_path / "w" / "result.json").read_text())["metrics"]["per_class"][1]["class"] == "bee\udcff"
    image, out = os.fsencode(tmp_path / "data" / "test") + b"/bee\xff/0.png", tmp_path / "o.csv"
    command = [sys.executable, "-m", "tl_jax", "predict", str(tmp_path / "w"), image]
    assert subprocess.run([*command, "--out", str(out)], check=False).returncode == 0
    shown = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONUTF8": "1"}).stdout
    assert image in out.read_bytes() and b"bee\xff" in shown
    # Whoever reads the output may stop: no error, and no noise.
    head = " ".join(f"'{os.fsdecode(word)}'" for word in command) + f" '{tmp_path}/data/test' | head -n 1"
    found = subprocess.run(["bash", "-o", "pipefail", "-c", head], capture_output=True, check=True)
    assert found.stdout.startswith(b"file,class,") and not found.stderr
