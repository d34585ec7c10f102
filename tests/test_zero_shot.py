"""Heads made of the names of classes: predictions of transformers, the command line, and what begins with such a head."""

import functools
import json

import clip_files
import numpy as np
import pytest
from clip_files import torch_reference, transformers
from PIL import Image
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
