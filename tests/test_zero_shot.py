"""Heads made of the names of classes: predictions of transformers, the command line, and what begins with them."""

import functools
import json

import clip_files
import jax
import numpy as np
import pytest
from clip_files import torch_reference, transformers
from PIL import Image
from test_clip_text import renamed
from test_pretrained import close

import tl_jax
from tl_jax import __main__ as command
from tl_jax.weights import formats, load, zero_shot

torch = torch_reference.torch
EACH = pytest.mark.parametrize("kind", clip_files.KINDS)
CLASSES = ("one_zero", "seven", "eight")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}, in black and white!")


@pytest.fixture(autouse=True)
def names(monkeypatch):
    clip_files.add_names(monkeypatch)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    return functools.cache(lambda kind: clip_files.write(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with splits and classes of small images."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in {"train": 4, "val": 4, "test": 5}.items():
        for k, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3)) + 40 * k
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


def pixels_of(photos, split="test"):
    """Images as the network takes them, [N, 3, 32, 32], and their classes, in the order of the folder."""
    paths = [path for name in sorted(CLASSES) for path in sorted((photos / split / name).iterdir())]
    x = np.stack([np.asarray(Image.open(path), np.float32) / 255 for path in paths])
    mean, std = (np.array(values, np.float32) for values in (clip_files.clip.MEAN, clip_files.clip.STD))
    return torch.from_numpy(np.moveaxis((x - mean) / std, -1, 1).copy()), [path.parent.name for path in paths]


def by_transformers(kind, folder, pixels, classes, templates=TEMPLATES):
    """Logits of zero-shot classification by transformers' network and its own tokenizer class, float64."""
    model, longest = clip_files.whole(kind), clip_files.LONGEST[kind]
    read = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="</s>")
    with torch.no_grad():
        image = model.get_image_features(pixels)
        image = getattr(image, "pooler_output", image).double()
        weights = []
        for name in classes:
            prompts = [template.format(name.replace("_", " ")) for template in templates]
            ids = [read(prompt)["input_ids"] for prompt in prompts]
            padded = torch.tensor([row + [1] * (longest - len(row)) for row in ids])
            mask = {"attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])}
            text = model.get_text_features(input_ids=padded, **(mask if kind == "clip" else {}))
            text = getattr(text, "pooler_output", text).double()
            mean = (text / text.norm(dim=1, keepdim=True)).mean(dim=0)
            weights.append(mean / mean.norm())
        logits = model.logit_scale.double().exp() * image / image.norm(dim=1, keepdim=True) @ torch.stack(weights).T
        return (logits + (model.logit_bias.double() if kind == "siglip" else 0)).numpy()


@pytest.mark.slow
@EACH
def test_the_head_of_names_gives_the_logits_of_transformers(kind, file_of, photos):
    pixels, _ = pixels_of(photos)
    path = file_of(kind)
    model = tl_jax.zero_shot(f"small_{kind}", path, CLASSES, templates="|".join(TEMPLATES))
    assert model.card.class_names == CLASSES and "new" not in model.origins.values()
    files = [path for name in sorted(CLASSES) for path in sorted((photos / "test" / name).iterdir())]
    expected = by_transformers(kind, path.parent, pixels, CLASSES)
    close(tl_jax.outputs(model, files), expected, 1e-4)
    found = [row["class"] for row in tl_jax.predict(model, files)]
    assert found == [CLASSES[i] for i in expected.argmax(axis=1)] and len(set(found)) > 1


def arguments(kind, path, photos, folder, *more):
    splits = "--config.data.train=train", "--config.data.val=val", "--config.data.test=test"
    names = f"--config.model.head_init=names:{'|'.join(TEMPLATES)}"
    config = f"configs/transfer.py:model=small_{kind},weights={path},data=folder:{photos}"
    return ["train", config, *splits, names, "--config.resamples=20", "--workdir", str(folder), *more]


@pytest.fixture
def run_of(file_of, photos, tmp_path):
    """Runs the command line with a head of names; returns the folder."""

    def run(name, *more, kind="clip"):
        given = arguments(kind, file_of(kind), photos, tmp_path / name, *more)
        assert command.main(given) == 0
        return tmp_path / name

    return run


@pytest.mark.thin(1)
@EACH
def test_a_run_that_trains_nothing_predicts_as_transformers_and_its_file_too(kind, run_of, file_of, photos, capsys):
    folder = run_of("w", "--config.method.name=none", kind=kind)
    pixels, truth = pixels_of(photos)
    expected = by_transformers(kind, file_of(kind).parent, pixels, sorted(CLASSES))
    found = tl_jax.load_predictions(folder / "predictions.npz")
    close(found.values, expected, 1e-4)
    right = np.mean([sorted(CLASSES)[i] for i in expected.argmax(axis=1)] == np.array(truth))
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(right) and 0 < right < 1
    assert (result["trainable_parameters"], result["total_steps"]) == (0, 0) and "chosen" not in result
    audit = json.loads((folder / "audit.json").read_text())
    assert audit["totals"]["trainable"] == 0 == audit["totals"]["new"] and audit["proof"]["bit_equal"]
    origins = {row["path"]: row["origin"] for row in audit["phases"][0]["parameters"] if not row["trainable"]}
    assert origins["head/out/kernel"] == f"names: {'|'.join(TEMPLATES)}" and "backbone/stem/pos_embed" in origins
    shown = capsys.readouterr().out
    assert "none scores it as it was loaded: nothing is fitted" in " ".join(shown.split())
    assert command.main(["predict", str(folder), str(photos / "test")]) == 0
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[1] for row in rows] == [sorted(CLASSES)[i] for i in expected.argmax(axis=1)]
    again = load.load("", folder / "model.safetensors")
    assert again.card.class_names == tuple(sorted(CLASSES)) and not again.dropped


FULL = "--config.method.name=full", "--config.lr=0.001", "--config.total=(2, 'steps')", "--config.batch_size=4"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_export_serves_it_and_weights_are_interpolated_with_a_fine_tuned_run(run_of, photos, tmp_path, capsys):
    before = run_of("zero", "--config.method.name=none")
    after = run_of("tuned", *FULL)
    for out, start in {"a": "start", "b": str(before)}.items():
        assert command.main(["wise_ft", start, str(after), "--out", str(tmp_path / out)]) == 0
    report, other = (json.loads((tmp_path / out / "curve.json").read_text()) for out in "ab")
    assert report["curves"] == other["curves"] and (tmp_path / "a" / "curve.png").exists()
    ends = [
        json.loads((folder / "result.json").read_text())["metrics"]["accuracy"]["value"] for folder in (before, after)
    ]
    assert [report["curves"]["test"]["accuracy"][i] for i in (0, -1)] == pytest.approx(ends)
    files = sorted((photos / "test").rglob("*.png"))
    tl_jax.export(tl_jax.load_run(before), tmp_path / "export")
    close(
        tl_jax.outputs(tl_jax.load_export(tmp_path / "export"), files), tl_jax.outputs(tl_jax.load_run(before), files)
    )


@pytest.mark.slow
def test_a_linear_probe_begins_with_the_head_of_names(file_of, photos, tmp_path):
    path = file_of("clip")
    model = tl_jax.zero_shot("small_clip", path, CLASSES, templates=TEMPLATES[0])
    changes = {"total": (1, "steps"), "lr": 1e-9, "resamples": 20, "cache": "features", "cache_dir": str(tmp_path)}
    run = tl_jax.fit(model, f"folder:{photos}", workdir=tmp_path / "w", changes=changes, verbose=False)
    expected = by_transformers("clip", path.parent, pixels_of(photos)[0], sorted(CLASSES), TEMPLATES[:1])
    close(tl_jax.load_predictions(run.folder / "predictions.npz").values, expected, 1e-4)
    rows = json.loads((run.folder / "audit.json").read_text())["phases"][0]["parameters"]
    assert {row["path"].split("/")[1] for row in rows if row["trainable"]} == {"dense0", "out"}


BAD = {
    "no {} at all": ("names:a photo", "expected one {} in each"),
    "two of them": ("names:{} {}", "expected one {} in each"),
    "an empty text": ("prompts:", "0 learned vectors"),
    "keep_head too": ("names:{}", "makes the whole head", "--config.model.keep_head=True"),
    "layers too": ("names:{}", "makes the whole head", "--config.model.head=(('relu', {}),)"),
    "no weights": ("names:{}", "without a weight file", "--config.model.weights="),
    "no text tower": ("names:{}", "has no text tower", "--config.model.name=resnet18"),
    "a linear probe by scikit-learn": ("names:{}", "fits a linear classifier", "--config.method.name=ridge"),
    "nothing to score": ("zeros", "its head is random", "--config.method.name=none"),
    "no head to add to": ("zeros", "adds to a head of normalised", "--config.method.name=tip_adapter"),
    "a grid of nothing": (
        "names:{}",
        "fits nothing, expected",
        "--config.method.name=none",
        "--config.method.grid=(1,)",
    ),
    "too many vectors": ("prompts:75", "75 learned vectors, and a text has 77 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_message(case, file_of, photos, tmp_path, capsys):
    head_init, message, *more = BAD[case]
    given = arguments("clip", file_of("clip"), photos, tmp_path / "w", f"--config.model.head_init={head_init}", *more)
    assert command.main(given) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_file_without_a_scale_and_one_without_texts_are_refused(file_of, tmp_path):
    tensors = formats.read(file_of("clip"))[0]
    for lacks, message in (("logit_scale", "has no number logit_scale"), ("text_", "has no key that clip_text")):
        left = {key: x for key, x in tensors.items() if not key.startswith(lacks)}
        formats.write_safetensors(tmp_path / "w.safetensors", left, {})
        (tmp_path / "tokenizer.json").write_text((file_of("clip").parent / "tokenizer.json").read_text())
        with pytest.raises(ValueError, match=message):
            zero_shot.load_zero_shot("small_clip", tmp_path / "w.safetensors", CLASSES)


@pytest.mark.slow
def test_a_file_of_open_clip_gives_the_same_towers(file_of, tmp_path):
    own = zero_shot.load_zero_shot("small_siglip", file_of("siglip"), CLASSES)
    image = load.load("small_siglip", file_of("siglip"))
    card = image.card.replace(model="small_siglip")
    load.export(image.variables, "small_siglip", tmp_path / "image.safetensors", card=card, layout="timm")
    tensors = formats.read(file_of("siglip"))[0]
    state = {f"visual.trunk.{key}": x for key, x in formats.read(tmp_path / "image.safetensors")[0].items()}
    state |= renamed("siglip", tensors) | {key: x for key, x in tensors.items() if key.startswith("logit_")}
    (tmp_path / "w").mkdir()
    formats.write_safetensors(tmp_path / "w" / "w.safetensors", state, {})
    (tmp_path / "w" / "tokenizer.json").write_text((file_of("siglip").parent / "tokenizer.json").read_text())
    other = zero_shot.load_zero_shot("small_siglip", tmp_path / "w" / "w.safetensors", CLASSES)
    assert (own.layout, other.layout) == ("hf", "timm")
    jax.tree.map(np.testing.assert_array_equal, own.variables, other.variables)
