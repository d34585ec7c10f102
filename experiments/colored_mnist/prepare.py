"""Makes ColoredMNIST (Arjovsky et al. 2019, section 5.2) from MNIST/mnist_10k.npz, 10,000 images:

python experiments/colored_mnist/prepare.py MNIST FOLDER

A digit below 5 is the class "0 to 4", which a quarter of all labels contradicts. The colour follows the label, but for
a share of the images: FOLDER/e10.npz and e20.npz (4,000 images each, of 10 and 20 %) have train (80 %) and val,
FOLDER/e90.npz (2,000 images, of 90 %, where colour says the opposite) val (20 %), which only an oracle chooses on, and
test. Every second pixel of every second row, 14 x 14; class "5 to 9" is red in most images of the first two.
"""

import pathlib
import sys

import numpy as np

NOISE = 0.25  # share of the labels that are wrong
ENVIRONMENTS = {"e10": (0.1, 4000), "e20": (0.2, 4000), "e90": (0.9, 2000)}  # share of other colours; images of 10,000
CUTS = {"e10": ("train", "val", 0.8), "e20": ("train", "val", 0.8), "e90": ("val", "test", 0.2)}


def colour(images: np.ndarray, digits: np.ndarray, share: float, rng: np.random.Generator):
    """(uint8 [N, 14, 14, 3], labels [N]) of one environment: blue is 0, and so is red where the colour is 1."""
    labels = (digits < 5) ^ (rng.random(len(digits)) < NOISE)
    green = labels ^ (rng.random(len(digits)) < share)
    coloured = np.zeros((len(images), 14, 14, 3), np.uint8)
    coloured[np.arange(len(images)), ..., green.astype(int)] = images[:, ::2, ::2]
    return coloured, labels.astype(np.int32)


def main(mnist: pathlib.Path, folder: pathlib.Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays, rng = np.load(mnist / "mnist_10k.npz"), np.random.default_rng(seed)
    order, start = rng.permutation(len(arrays["image"])), 0
    for name, (share, count) in ENVIRONMENTS.items():
        chosen = order[start : start + round(count / 10_000 * len(order))]
        start += len(chosen)
        images, labels = colour(arrays["image"][chosen], arrays["label"][chosen], share, rng)
        first, second, part = CUTS[name]
        cut, found = round(part * len(chosen)), {}
        for split, rows in ((first, slice(None, cut)), (second, slice(cut, None))):
            found |= {f"{split}_image": images[rows], f"{split}_label": labels[rows]}
        np.savez(folder / f"{name}.npz", **found, classes=np.array(["5 to 9", "0 to 4"]))
        print(folder / f"{name}.npz", {split: len(found[f"{split}_label"]) for split in (first, second)})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/colored_mnist/prepare.py MNIST FOLDER")
    main(*map(pathlib.Path, sys.argv[1:]))
