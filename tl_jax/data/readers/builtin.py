"""Sources from files that scikit-learn brings: its digits in several forms, and its diabetes table."""

import gzip
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tl_jax.data.examples import Source
from tl_jax.data.readers.arrays import array_source
from tl_jax.data.readers.tables import Table, table_source

# The digits' labels repeat about every 130 rows, most likely one writer's form; at row 1029 one such period ends.
DIGITS_TRAIN = 1029
NOISE = 32  # grey levels, at most, of the noise on inverted digits
PAPER, GRAIN = 80, 48  # grey level of the paper of faded digits, and at most of its noise
MARGIN = 2  # black pixels beside a pair of digits, so that a centre crop of 0.875 cuts neither
DIABETES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")


def load_digits(split: str) -> Source:
    """scikit-learn's 8 x 8 handwritten digits as uint8 RGB: train is rows 0 .. 1028, test rows 1029 .. 1796.

    Counts 0 .. 16 of ink become 0 .. 255 (times 255 / 16, rounded). Neighbouring rows stay on one side of the cut.
    """
    grey, labels = _digits(split)
    return array_source("digits", split, _rgb(grey), labels, tuple(str(i) for i in range(10)))


def load_inverted(split: str) -> Source:
    """Another domain: 255 - image, with noise that is uniform and belongs to the example, and the same labels."""
    grey, labels = _digits(split)
    noise = _generator("inverted", split).integers(-NOISE, NOISE, grey.shape, endpoint=True)
    images = np.clip(255 - grey.astype(np.int64) + noise, 0, 255).astype(np.uint8)
    return array_source("digits:inverted", split, _rgb(images), labels, tuple(str(i) for i in range(10)))


def load_faded(split: str) -> Source:
    """A nearer domain: white ink on grey paper, with coarser noise, and the same labels."""
    grey, labels = _digits(split)
    noise = _generator("faded", split).integers(-GRAIN, GRAIN, grey.shape, endpoint=True)
    images = np.clip(PAPER + grey * ((255 - PAPER) / 255) + noise, 0, 255).astype(np.uint8)
    return array_source("digits:faded", split, _rgb(images), labels, tuple(str(i) for i in range(10)))


def load_pairs(split: str) -> Source:
    """Two digits side by side in the middle of a black 20 x 20 square; multi-label, which of the ten digits occur.

    Every digit is on the left once, and on the right once.
    """
    grey, labels = _digits(split)
    right = _generator("pairs", split).permutation(len(labels))
    images = np.zeros((len(labels), 16 + 2 * MARGIN, 16 + 2 * MARGIN), np.uint8)
    images[:, 4 + MARGIN : 12 + MARGIN, MARGIN:-MARGIN] = np.concatenate([grey, grey[right]], axis=2)
    occurs = np.maximum(np.eye(10, dtype=np.int32)[labels], np.eye(10, dtype=np.int32)[labels[right]])
    return array_source("digits:pairs", split, _rgb(images), occurs, tuple(str(i) for i in range(10)))


def load_parity(split: str) -> Source:
    """The digits in two classes, even and odd."""
    grey, labels = _digits(split)
    return array_source("digits:parity", split, _rgb(grey), labels % 2, ("even", "odd"))


def load_ink(split: str) -> Source:
    """The digits with a number to predict: of the pixels that are brighter than half."""
    grey, _ = _digits(split)
    count = (grey > 127).sum(axis=(1, 2))
    return array_source("digits:ink", split, _rgb(grey), count[:, None].astype(np.float32), ("ink",))


def load_diabetes(split: str, task: str, labels: Sequence[str] = ()) -> Source:
    """scikit-learn's diabetes: ten measurements, unscaled, and `target`. Every fourth row is test, the others train."""
    data, target = _file("diabetes_data_raw.csv.gz"), _file("diabetes_target.csv.gz")
    columns = {name: cells for name, *cells in zip(DIABETES, *(line.split() for line in data), strict=True)}
    parts = ["test" if i % 4 == 3 else "train" for i in range(len(data))]
    table = Table("table:diabetes", columns | {"target": target, "split": parts}, np.arange(1, len(data) + 1))
    return table_source(f"table:diabetes {split}", table, split, task, labels)


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, 8, 8], labels) of a split."""
    parts = {"train": slice(0, DIGITS_TRAIN), "test": slice(DIGITS_TRAIN, None)}
    if split not in parts:
        raise ValueError(f"digits has no split {split!r}; it has train, test. Take a part of one: 'train[80%:]'")
    rows = np.loadtxt(_file("digits.csv.gz"), delimiter=",", dtype=np.int64)[parts[split]]
    return np.rint(rows[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), rows[:, 64]


def _file(name: str) -> list[str]:
    """The lines of a data file of scikit-learn's, past the package, whose import takes a second."""
    package = Path(find_spec("sklearn").submodule_search_locations[0])
    with gzip.open(package / "datasets" / "data" / name, "rt") as file:
        return file.read().splitlines()


def _generator(name: str, split: str) -> np.random.Generator:
    return np.random.default_rng([*name.encode(), *split.encode()])


def _rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=3)
