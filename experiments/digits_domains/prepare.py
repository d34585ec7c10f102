"""Makes the three domains of the study of digits from the arrays of DIGITS (mnist_10k, usps and mnist_m_9k, .npz):

python experiments/digits_domains/prepare.py DIGITS FOLDER

FOLDER/mnist.npz, usps.npz and mnist_m.npz, each with train (70 %), val (10 %) and test (20 %) of 28 x 28 pixels. The
images of MNIST-M are the first of these images of MNIST on other grounds, so both get the same cut: no digit whose
shape was trained on in one of the two is scored in the other.
"""

import io
import itertools
import pathlib
import sys

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tl_jax.data import sources

SIZE = 28
SHARES = {"train": 0.7, "val": 0.8, "test": 1.0}  # where each split ends


def split_of(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """The number of the split of each example [N], in which classes have nearly equal shares."""
    place = np.argsort(sources.stratified_order(labels, seed))
    return np.searchsorted([round(share * len(labels)) for share in SHARES.values()], place, side="right")


def resized(images: list[np.ndarray]) -> np.ndarray:
    """uint8 [N, SIZE, SIZE] or [N, SIZE, SIZE, 3], bilinear."""
    return np.stack([np.asarray(Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for x in images])


def decoded(data: np.ndarray, offsets: np.ndarray) -> list[np.ndarray]:
    files = (data[start:stop].tobytes() for start, stop in itertools.pairwise(offsets))
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]


def write(path: pathlib.Path, images: np.ndarray, labels: np.ndarray, split: np.ndarray) -> None:
    arrays = {f"{name}_image": images[split == i] for i, name in enumerate(SHARES)}
    arrays |= {f"{name}_label": labels[split == i].astype(np.int32) for i, name in enumerate(SHARES)}
    np.savez(path, **arrays, classes=np.array([str(digit) for digit in range(10)]))
    print(path, {name: int((split == i).sum()) for i, name in enumerate(SHARES)})


def main(digits: pathlib.Path, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mnist, usps, blended = (np.load(digits / f"{name}.npz") for name in ("mnist_10k", "usps", "mnist_m_9k"))
    labels, count = mnist["label"], len(blended["labels"])
    if not np.array_equal(blended["labels"], labels[:count]):
        raise ValueError(
            f"{digits}: the labels of mnist_m_9k are not the first {count} of mnist_10k, so are its images"
        )
    split = split_of(labels)
    write(folder / "mnist.npz", resized(mnist["image"]), labels, split)
    write(folder / "usps.npz", resized(usps["image"]), usps["label"], split_of(usps["label"]))
    images = resized(decoded(blended["bytes"], blended["offsets"]))
    write(folder / "mnist_m.npz", images, labels[:count], split[:count])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/digits_domains/prepare.py DIGITS FOLDER")
    main(*map(pathlib.Path, sys.argv[1:]))
