"""Sources from files that scikit-learn brings: its digits in several forms, and its diabetes table."""

import gzip
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tl_jax.data.examples import Source, check_split
from tl_jax.data.labels import Table
from tl_jax.data.readers.arrays import array_source
from tl_jax.data.readers.tables import table_source

# The digits' labels repeat about every 130 rows, most likely one writer's form; at row 1029 one such period ends.
DIGITS_TRAIN = 1029
CLASSES = tuple("0123456789")
DIABETES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")


def _add_noise(grey: np.ndarray, rng: np.random.Generator, levels: int) -> np.ndarray:
    return np.clip(grey + rng.integers(-levels, levels, grey.shape, endpoint=True), 0, 255).astype(np.uint8)


def _pair(grey: np.ndarray, digits: np.ndarray, rng: np.random.Generator):
    """Two digits side by side in a black 20 x 20 square, each digit once on either side; labels: which digits occur."""
    right, one_hot = rng.permutation(len(digits)), np.eye(10, dtype=np.int32)[digits]
    images = np.zeros((len(digits), 20, 20), np.uint8)
    images[:, 6:14, 2:-2] = np.concatenate([grey, grey[right]], axis=2)
    return images, np.maximum(one_hot, one_hot[right]), CLASSES


# (grey images uint8 [N, 8, 8], digits, rng) -> (grey images uint8 [N, H, W], labels, class names)
DIGITS = {
    "digits": lambda grey, digits, rng: (grey, digits, CLASSES),
    "digits:inverted": lambda grey, digits, rng: (_add_noise(255 - grey.astype(np.int64), rng, 32), digits, CLASSES),
    "digits:faded": lambda grey, digits, rng: (_add_noise(80 + grey * (175 / 255), rng, 48), digits, CLASSES),
    "digits:pairs": _pair,
    "digits:parity": lambda grey, digits, rng: (grey, digits % 2, ("even", "odd")),
    "digits:ink": lambda grey, digits, rng: (grey, (grey > 127).sum(axis=(1, 2))[:, None].astype(np.float32), ("ink",)),
}


def load_digits(name: str, split: str) -> Source:
    """scikit-learn's 8 x 8 handwritten digits in one of DIGITS, as uint8 RGB: train is rows 0 .. 1028, test the others.

    Counts 0 .. 16 of ink become 0 .. 255 (times 255 / 16, rounded). Neighbouring rows stay on one side of the cut.
    """
    rows = {"train": slice(0, DIGITS_TRAIN), "test": slice(DIGITS_TRAIN, None)}
    check_split("digits", split, rows)
    table = np.loadtxt(_read("digits.csv.gz"), delimiter=",", dtype=np.int64)[rows[split]]
    grey = np.rint(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rng = np.random.default_rng([*name.partition(":")[2].encode(), *split.encode()])
    grey, labels, class_names = DIGITS[name](grey, table[:, 64], rng)
    return array_source(name, split, np.repeat(grey[..., None], 3, axis=3), labels, class_names)


def load_diabetes(split: str, task: str, labels: Sequence[str] = (), group: str = "") -> Source:
    """scikit-learn's diabetes: ten measurements, unscaled, and `target`. Every fourth row is test, the others train."""
    data, target = _read("diabetes_data_raw.csv.gz"), _read("diabetes_target.csv.gz")
    columns = {name: cells for name, *cells in zip(DIABETES, *(line.split() for line in data), strict=True)}
    columns |= {"target": target, "split": ["test" if i % 4 == 3 else "train" for i in range(len(data))]}
    table = Table("table:diabetes", columns, np.arange(1, len(data) + 1))
    return table_source(f"table:diabetes {split}", table, split, task, labels, group)


def _read(name: str) -> list[str]:
    """The lines of a data file of scikit-learn's, past the package, whose import takes a second."""
    package = Path(find_spec("sklearn").submodule_search_locations[0])
    with gzip.open(package / "datasets" / "data" / name, "rt") as file:
        return file.read().splitlines()
