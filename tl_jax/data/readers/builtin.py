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
NOISE = 32  # grey levels, at most, of the noise on inverted digits
PAPER, GRAIN = 80, 48  # grey level of the paper of faded digits, and at most of its noise
MARGIN = 2  # black pixels beside a pair of digits, so that a centre crop of 0.875 cuts neither
CLASSES = tuple("0123456789")
DIABETES = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")

Form = tuple[np.ndarray, np.ndarray, tuple[str, ...]]  # grey images uint8 [N, H, W], labels, class names


def _plain(grey: np.ndarray, digits: np.ndarray, rng: np.random.Generator) -> Form:
    return grey, digits, CLASSES


def _inverted(grey: np.ndarray, digits: np.ndarray, rng: np.random.Generator) -> Form:
    """Another domain: 255 - image, with noise that is uniform and belongs to the example, and the same labels."""
    noise = rng.integers(-NOISE, NOISE, grey.shape, endpoint=True)
    return np.clip(255 - grey.astype(np.int64) + noise, 0, 255).astype(np.uint8), digits, CLASSES


def _faded(grey: np.ndarray, digits: np.ndarray, rng: np.random.Generator) -> Form:
    """A nearer domain: white ink on grey paper, with coarser noise, and the same labels."""
    noise = rng.integers(-GRAIN, GRAIN, grey.shape, endpoint=True)
    return np.clip(PAPER + grey * ((255 - PAPER) / 255) + noise, 0, 255).astype(np.uint8), digits, CLASSES


def _pairs(grey: np.ndarray, digits: np.ndarray, rng: np.random.Generator) -> Form:
    """Two digits side by side in the middle of a black 20 x 20 square; multi-label, which of the ten digits occur.

    Every digit is on the left once, and on the right once.
    """
    right = rng.permutation(len(digits))
    images = np.zeros((len(digits), 16 + 2 * MARGIN, 16 + 2 * MARGIN), np.uint8)
    images[:, 4 + MARGIN : 12 + MARGIN, MARGIN:-MARGIN] = np.concatenate([grey, grey[right]], axis=2)
    one_hot = np.eye(10, dtype=np.int32)[digits]
    return images, np.maximum(one_hot, one_hot[right]), CLASSES


def _parity(grey: np.ndarray, digits: np.ndarray, rng: np.random.Generator) -> Form:
    return grey, digits % 2, ("even", "odd")


def _ink(grey: np.ndarray, digits: np.ndarray, rng: np.random.Generator) -> Form:
    """A number to predict: of the pixels that are brighter than half."""
    return grey, (grey > 127).sum(axis=(1, 2))[:, None].astype(np.float32), ("ink",)


DIGITS = {
    "digits": _plain,
    "digits:inverted": _inverted,
    "digits:faded": _faded,
    "digits:pairs": _pairs,
    "digits:parity": _parity,
    "digits:ink": _ink,
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


def load_diabetes(split: str, task: str, labels: Sequence[str] = ()) -> Source:
    """scikit-learn's diabetes: ten measurements, unscaled, and `target`. Every fourth row is test, the others train."""
    data, target = _read("diabetes_data_raw.csv.gz"), _read("diabetes_target.csv.gz")
    columns = {name: cells for name, *cells in zip(DIABETES, *(line.split() for line in data), strict=True)}
    splits = ["test" if i % 4 == 3 else "train" for i in range(len(data))]
    table = Table("table:diabetes", columns | {"target": target, "split": splits}, np.arange(1, len(data) + 1))
    return table_source(f"table:diabetes {split}", table, split, task, labels)


def _read(name: str) -> list[str]:
    """The lines of a data file of scikit-learn's, past the package, whose import takes a second."""
    package = Path(find_spec("sklearn").submodule_search_locations[0])
    with gzip.open(package / "datasets" / "data" / name, "rt") as file:
        return file.read().splitlines()
