"""Examples of several inputs for tests: digits as files with a sentence and two numbers each."""

import numpy as np
from PIL import Image

from tl_jax.data import sources

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPTIONS = {"data.image": "photo", "data.text": ("title",), "data.columns": ("ink", "width")}
PARTS = {"image": {"name": "lenet"}, "text": {"name": "bert_l1_h16_a2"}, "table": {"name": "mlp_small"}}


def write(folder, count=48, empty=(), classes=4):
    """products.csv and its images; empty: pairs (row, column) of cells without content. Returns its path."""
    digits = sources.load("digits", "train")
    digits = digits.select(np.flatnonzero(digits.labels < classes)[:count])
    lines = ["photo,title,ink,width,label"]
    for i, (image, label) in enumerate(zip(digits.inputs, digits.labels, strict=True)):
        Image.fromarray(np.asarray(image)).resize((28, 28)).save(folder / f"{i}.png")
        ink, width = image[..., 0].mean() / 255, float((image[..., 0].max(axis=0) > 99).sum())
        row = {"photo": f"{i}.png", "title": f"a photo of the digit {WORDS[label]}", "ink": ink, "width": width}
        cells = ["" if (i, name) in empty else str(value) for name, value in row.items()]
        lines.append(",".join([*cells, WORDS[label]]))
    path = folder / "products.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
