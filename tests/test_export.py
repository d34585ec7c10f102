"""Exported networks answer as the run did, on their own, for any batch; what is not as it was exported is refused."""

import io
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import test_families as families
from PIL import Image
from test_face import IMAGES, LABELS, QUICK
from test_pretrained import TINY_VIT, add_variants

import tl_jax
from tl_jax import __main__ as command
from tl_jax import tasks
from tl_jax.api.model import Model
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.models import inception, vit
from tl_jax.serving import artefact, onnx_file, program
from tl_jax.weights import formats, quantize


def fit(folder, labels=LABELS, task="", method="last_k", splits=None, **changes):
    model = tl_jax.load("resnet8_cifar", "builtin:glyphs", image_size=16)
    splits = splits or {"train": (IMAGES[:64], labels[:64]), "test": (IMAGES[64:128], labels[64:128])}
    how = {"workdir": folder, "task": task, "method": method, "epochs": 2}
    return tl_jax.fit(model, splits, **how, changes={**QUICK, **changes}, verbose=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("run") / "w")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return tl_jax.export(run, tmp_path_factory.mktemp("export") / "out")


def close(found, expected, limit=1e-6):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def test_an_export_answers_as_the_run_did_at_its_end(run, exported):
    saved = tasks.load_predictions(run.folder / "predictions.npz")
    network = tl_jax.load_export(exported)
    close(tl_jax.outputs(network, IMAGES[64:128], batch_size=32), saved.values)
    close(tl_jax.features(network, IMAGES[64:128], batch_size=7), saved.features)
    assert network.spec == saved.spec
    found, expected = (
        [(row["class"], row["probability"]) for row in tl_jax.predict(x, IMAGES[:3])] for x in (network, run)
    )
    assert found == [(name, pytest.approx(p, rel=1e-5)) for name, p in expected]
    expected = {name: row["value"] for name, row in run.metrics.items() if isinstance(row, dict) and "value" in row}
    found = tl_jax.evaluate(network, (IMAGES[64:128], LABELS[64:128]), resamples=5)
    assert {name: found[name]["value"] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_commands_take_an_export_as_they_take_a_run(run, exported, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", test_image=IMAGES[64:128], test_label=LABELS[64:128])
    answers = []
    for folder in (run.folder, exported):
        assert command.main(["evaluate", str(folder), str(tmp_path / "x.npz"), "--json", "--resamples", "5"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["accuracy"])
    assert answers[0] == answers[1]
    assert command.main(["export", str(run.folder), str(exported)]) == 2
    assert "exists" in capsys.readouterr().err
    assert command.main(["export", str(run.folder), str(tmp_path / "new"), "--precision", "int4"]) == 2
    assert "expected float32, bfloat16, int8" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_run_py_needs_jax_alone_and_refuses_a_changed_file(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); print(sorted(sys.modules))"
    once = [sys.executable, "-c", code, str(copy / "run.py")]
    done = subprocess.run(once, cwd=tmp_path, capture_output=True, text=True, check=True)
    report, modules = done.stdout.splitlines()[:-1], done.stdout.splitlines()[-1]
    assert len(report) == 2 and all(float(line.split()[-5]) <= 1e-6 for line in report)
    assert not [name for name in ("tl_jax", "flax", "safetensors", "scipy.stats", "PIL") if f"'{name}'" in modules]
    flip(copy / "weights.safetensors", -5)
    done = subprocess.run(once, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "weights.safetensors is not as it was exported" in done.stderr
    table = artefact.files.read_json(exported / "export.json")
    table["limits"]["cpu"] = -1.0  # what no output keeps
    flip(copy / "weights.safetensors", -5)
    artefact.files.write_json(copy / "export.json", table)
    done = subprocess.run(once, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "the outputs are not those of the export" in done.stderr


def flip(path, at, bit=3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_one_flipped_bit_in_any_file_is_refused(exported, tmp_path):
    copy, rng = shutil.copytree(exported, tmp_path / "copy"), np.random.default_rng(0)
    assert len(list(copy.iterdir())) == 7
    for path in sorted(copy.iterdir()):
        sound = path.read_bytes()
        for at in [0, len(sound) - 1, *rng.integers(0, len(sound), 30)]:
            flip(path, at, int(rng.integers(8)))
            with pytest.raises(ValueError, match=r"damaged|not as it was exported|no exported network"):
                tl_jax.load_export(copy)
            path.write_bytes(sound)
        path.unlink()
        with pytest.raises(ValueError, match=r"no file|there is no export\.json"):
            tl_jax.load_export(copy)
        path.write_bytes(sound)
    tl_jax.load_export(copy)


def test_other_outputs_than_at_export_are_refused(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    with np.load(copy / "golden.npz") as golden:
        arrays = dict(golden)
    np.savez(copy / "golden.npz", **{**arrays, "logits": arrays["logits"] + 0.01})
    table = artefact.files.read_json(copy / "export.json")
    table["sha256"]["golden.npz"] = artefact.files.sha256(copy / "golden.npz")
    artefact.files.write_json(copy / "export.json", table)
    with pytest.raises(ValueError, match="computes other outputs here"):
        tl_jax.load_export(copy)


CLASSES = {
    "binary": (LABELS % 2, {}),
    "multilabel": (np.stack([LABELS % 2, LABELS > 4, LABELS % 3 == 0], 1).astype(np.int32), {}),
    "regression": (np.stack([LABELS, LABELS**2], 1).astype(np.float32), {}),
    "half": (LABELS, {"model.dtype": "bfloat16"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regression", "binary", "multilabel", "half"])
def test_an_export_of_each_task_answers_as_its_run(kind, tmp_path):
    labels, changes = CLASSES[kind]
    run = fit(tmp_path / "w", labels, kind if kind in tasks.METRICS else "", **changes)
    network = tl_jax.load_export(tl_jax.export(run, tmp_path / "out"))
    saved = tasks.load_predictions(run.folder / "predictions.npz")
    close(tl_jax.outputs(network, IMAGES[64:128]), saved.values, 1e-2 if kind == "half" else 1e-6)
    assert network.spec == saved.spec


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_lora_is_merged_and_prompts_come_along(method, tmp_path, monkeypatch):
    add_variants(monkeypatch, vit.vit_variants("small_vit", TINY_VIT, 3, 48))
    base = tmp_path / "base.safetensors"
    began = tl_jax.load("small_vit", image_size=32, num_classes=0)
    tl_jax.save_weights(began.variables, "small_vit", base, card=began.card)
    splits = {"train": (IMAGES[4:36], LABELS[4:36]), "test": (IMAGES[:4], LABELS[:4])}
    model = tl_jax.load("small_vit", base, num_classes=0, image_size=32)
    how = {"method": method, "epochs": 2, "workdir": tmp_path / "w"}
    run = tl_jax.fit(model, splits, **how, changes={**QUICK, "lr": 1e-2}, verbose=False)
    network = tl_jax.load_export(tl_jax.export(run, tmp_path / "out"))
    close(tl_jax.outputs(network, IMAGES[:4]), tasks.load_predictions(run.folder / "predictions.npz").values, 1e-5)
    assert any("prompt" in path for path in network.variables) == (method == "prompt")


def small_network(family, monkeypatch):
    """A network of a family with random weights, and inputs [5, ...] for it."""
    monkeypatch.setattr(inception, "STAGES", families.SMALL_INCEPTION)
    module, size = families.make(family), families.FAMILIES[family][2]
    table = {"input": "table", "columns": ("a", "b", "c"), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    card = Card(family, families.CLASSES, size, **(table if family == "mlp" else {}))
    leaves = trees.flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), np.zeros((1, *card.shape), "f"))))
    rng = np.random.default_rng(0)
    flat = {path: np.float32(0.5 + 0.3 * rng.random(leaf.shape)) for path, leaf in leaves.items()}
    flat |= {path: np.float32(rng.normal(0, 0.2, x.shape)) for path, x in flat.items() if path.endswith("kernel")}
    x = rng.integers(0, 256, (5, *card.shape)).astype(program.input_type(card))
    return Model(family, "", module, trees.unflatten(flat), card), flat, x


# Those of texts are in test_text_data.py.
NAMES = ["vgg_bn", "swin", *sorted(set(families.IMAGES) - {"swin", "vgg_bn"})]


@pytest.mark.thin(1)
@pytest.mark.parametrize("family", NAMES)
def test_every_family_has_programs_for_any_batch_on_any_platform(family, monkeypatch):
    model, flat, inputs = small_network(family, monkeypatch)
    programs = program.trace(model)
    assert programs.keys() == program.PLATFORMS.keys() and all("any" in its for its in programs.values())
    call = program.compile_for(programs["cpu"], "cpu")
    for x in (inputs[:1], inputs):
        expected = jax.jit(model.answer)(model.variables, x)
        for name, found in call(flat, x).items():
            close(np.asarray(found), np.asarray(expected[name]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_onnx_runtime_answers_as_every_family(family, tmp_path, monkeypatch):
    pytest.importorskip("jax2onnx", reason="requirements-onnx.txt is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="requirements-onnx.txt is not installed")
    model, _, x = small_network(family, monkeypatch)
    expected = jax.device_get(jax.jit(model.answer)(model.variables, x))
    onnx_file.write(model, tmp_path / "x.onnx", x[:2], {name: y[:2] for name, y in expected.items()})
    session = runtime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    for name, found in zip(expected, session.run(list(expected), {"inputs": x}), strict=True):
        close(found, expected[name], 1e-5)


@pytest.mark.slow
def test_a_network_that_is_computed_in_chunks_has_programs_for_the_usual_batches():
    model = tl_jax.load("resnet18", image_size=64, num_classes=5)
    flat = {path: np.asarray(x) for path, x in trees.flatten(model.variables).items()}
    flat["params/head/kernel"] = np.random.default_rng(0).normal(size=(512, 5)).astype(np.float32)
    model = Model("resnet18", "", model.module, trees.unflatten(flat), model.card)
    programs = program.trace(model)
    assert {"any", "32"} <= programs["cpu"].keys() and programs["accelerator"].keys() == {"any"}
    x = np.random.default_rng(1).integers(0, 256, (32, 64, 64, 3), np.uint8)
    own = program.compile_for(programs["cpu"], "cpu")(flat, x)["logits"]
    for_any = program.compile_for({"any": programs["cpu"]["any"]}, "cpu")(flat, x)["logits"]
    close(np.asarray(own), np.asarray(for_any), 1e-5)


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize(("precision", "share", "limit"), [("int8", 0.28, 0.02), ("bfloat16", 0.505, 0.02)])
def test_fewer_bytes_change_the_outputs_little(precision, share, limit, run, exported, tmp_path):
    small = tl_jax.export(run, tmp_path / "small", precision=precision)
    sizes = [sum(x.nbytes for x in stored.values()) for stored in map(stored_arrays, (small, exported))]
    assert sizes[0] <= share * sizes[1]
    found = tl_jax.outputs(tl_jax.load_export(small), IMAGES[64:128])
    close(found, tl_jax.outputs(tl_jax.load_export(exported), IMAGES[64:128]), limit)


@pytest.mark.slow
def test_int8_takes_a_little_more_than_a_quarter_of_the_file(tmp_path):
    model = tl_jax.load("deit_tiny_patch16_224")
    flat = {path: np.zeros(x.shape, np.float32) for path, x in trees.flatten(model.variables).items()}
    for precision in quantize.PRECISIONS:
        formats.write_safetensors(tmp_path / precision, quantize.pack(flat, precision), {})
    full, half, small = ((tmp_path / name).stat().st_size for name in quantize.PRECISIONS)
    assert half <= 0.51 * full and small <= 0.27 * full


def stored_arrays(folder):
    flat = tl_jax.load_export(folder).variables
    return quantize.pack(flat, json.loads((folder / "export.json").read_text())["precision"])


@pytest.mark.slow
def test_trust_and_reference_of_fewer_bits_are_those_of_the_rounded_network(tmp_path):
    parts = {"train": slice(64), "val": slice(200, 300), "test": slice(64, 128)}
    run = fit(tmp_path / "w", splits={name: (IMAGES[part], LABELS[part]) for name, part in parts.items()})
    run.calibrate(coverage=0.8, sets="aps", ood="knn", abstain=("ood",))
    folder = tl_jax.export(run, tmp_path / "out", precision="int8", examples=10)
    network, old = tl_jax.load_export(folder), run.trust
    new = network.trust
    assert (new.coverage, new.sets, new.abstain, new.count, new.reference.name) == (
        0.8,
        "aps",
        ("ood",),
        old.count,
        "knn",
    )
    assert new.temperature != old.temperature and new.temperature == pytest.approx(old.temperature, rel=0.1)
    known = tasks.load_predictions(run.folder / "predictions.npz")
    assert not np.array_equal(network.reference.values, known.values)
    close(network.reference.values, tl_jax.outputs(network, IMAGES[64:128]), 1e-6)
    assert np.array_equal(network.reference.labels, known.labels)


def test_int8_rounds_each_channel_to_within_half_a_step():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 5)).astype(np.float32)
    kernel[..., 2] = 0
    found = quantize.unpack(quantize.pack({"params/a/kernel": kernel}, "int8"))["params/a/kernel"]
    step = np.abs(kernel).max((0, 1, 2)) / 127
    assert (np.abs(found - kernel) <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.slow
def test_an_onnx_file_that_answers_otherwise_is_not_written(run, tmp_path, monkeypatch):
    jax2onnx = pytest.importorskip("jax2onnx", reason="requirements-onnx.txt is not installed")
    sound = jax2onnx.to_onnx
    monkeypatch.setattr(
        jax2onnx,
        "to_onnx",
        lambda f, *args, **how: sound(lambda x: jax.tree.map(jax.numpy.negative, f(x)), *args, **how),
    )
    with pytest.raises(ValueError, match="ONNX Runtime answers otherwise"):
        tl_jax.export(run, tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(jax2onnx, "to_onnx", sound)
    folder = tl_jax.export(run, tmp_path / "out", onnx=True)
    assert "model.onnx" in json.loads((folder / "export.json").read_text())["sha256"]


def test_a_network_without_a_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without a head"):
        tl_jax.export(tl_jax.load("resnet8_cifar", num_classes=0), tmp_path / "out")
    with pytest.raises(ValueError, match="there is no folder"):
        tl_jax.export(tl_jax.load("resnet8_cifar"), tmp_path / "no" / "out")
    assert not list(pathlib.Path(tmp_path).iterdir())


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_genuine_weights_answer_as_exported_and_as_int8_lose_half_a_point_at_most(count, shared, tmp_path):
    weights = shared / "weights" / "cifar10_resnet" / "resnet20-12fca82f.th"
    with np.load(shared / "data" / "cifar10_jpeg" / "test.npz") as full:
        ends = full["offsets"][: count + 1]
        encoded = [full["bytes"][a:b].tobytes() for a, b in itertools.pairwise(ends)]
        images = np.stack([np.asarray(Image.open(io.BytesIO(each)).convert("RGB")) for each in encoded])
    model = tl_jax.load("resnet20_cifar", weights)
    expected = tl_jax.outputs(model, images)
    assert len(expected) == count
    network = tl_jax.load_export(tl_jax.export(model, tmp_path / "out"))
    found = tl_jax.outputs(network, images)
    close(found, expected)
    assert (found.argmax(1) == expected.argmax(1)).all()
    small = tl_jax.load_export(tl_jax.export(model, tmp_path / "small", precision="int8"))
    labels = np.load(shared / "data" / "cifar10_jpeg" / "test.npz")["labels"][:count]
    right = [(tl_jax.outputs(each, images).argmax(1) == labels).mean() for each in (network, small)]
    assert right[1] >= right[0] - 0.005
    sizes = [(tmp_path / name / "weights.safetensors").stat().st_size for name in ("small", "out")]
    assert sizes[0] <= 0.3 * sizes[1]  # of 1 MB the names of the tensors are 2 %
