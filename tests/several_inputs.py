"""Examples of several inputs for tests: digits as files with a sentence and two numbers each."""

import functools

import numpy as np
from PIL import Image

from tl_jax import models
from tl_jax.core.card import Card
from tl_jax.data import sources
from tl_jax.models import conversion, vit
from tl_jax.models.variant import Variant

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPTIONS = {"data.image": "photo", "data.text": ("title",), "data.columns": ("ink", "width")}
PARTS = {"image": {"name": "small_vit"}, "text": {"name": "bert_l1_h16_a2"}, "table": {"name": "mlp_small"}}


def add_small(table=models.MODELS):
    """Puts small_vit into a table of models: ViT with one block on images of 14 pixels."""
    card = Card("small_vit", 2, 14, (0.5,) * 3, (0.5,) * 3, interpolation="bilinear", crop=1.0)
    module = functools.partial(vit.ViT, patch_size=7, width=12, depth=1, heads=2, image_size=14)
    table["small_vit"] = Variant(module, card, {"native": conversion.NATIVE}, {})


def write(folder, count=48, empty=(), classes=4):
    """products.csv and its images; empty: pairs (row, column) of cells without content. Returns its path."""
    digits = sources.load("digits", "train")
    digits = digits.select(np.flatnonzero(digits.labels < classes)[:count])
    lines = ["photo,title,ink,width,label"]
    for i, (image, label) in enumerate(zip(digits.inputs, digits.labels, strict=True)):
        Image.fromarray(np.asarray(image)).resize((14, 14)).save(folder / f"{i}.png")
        ink, width = image[..., 0].mean() / 255, float((image[..., 0].max(axis=0) > 99).sum())
        row = {"photo": f"{i}.png", "title": f"a photo of the digit {WORDS[label]}", "ink": ink, "width": width}
        cells = ["" if (i, name) in empty else str(value) for name, value in row.items()]
        lines.append(",".join([*cells, WORDS[label]]))
    path = folder / "products.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
