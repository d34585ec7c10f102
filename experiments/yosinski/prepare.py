"""Makes what the study of Yosinski et al. needs, from the embedded letters alone:

python experiments/yosinski/prepare.py FOLDER

FOLDER/A.npz and B.npz, the letters of a random half of the classes each, with train and val, and
FOLDER/A/model.safetensors and FOLDER/B/model.safetensors, networks trained on them from random weights.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from configs import transfer
from tl_jax.data import sources
from tl_jax.training import train

SEED = 0  # of the split of the classes, and of the base networks


def split_classes(count: int) -> dict[str, np.ndarray]:
    """Two disjoint halves of the classes, in their order; A has the odd one."""
    order = np.random.default_rng(SEED).permutation(count)
    middle = (count + 1) // 2
    return {"A": np.sort(order[:middle]), "B": np.sort(order[middle:])}


def write(folder: pathlib.Path) -> dict[str, str]:
    """An .npz of each half, its classes counted from 0; returns the letters of each."""
    splits = {split: sources.load("glyphs", split) for split in ("train", "val")}
    names = np.array(splits["train"].class_names)
    halves = split_classes(len(names))
    for half, classes in halves.items():
        arrays = {"classes": names[classes]}
        for split, source in splits.items():
            kept = np.isin(source.labels, classes)
            arrays[f"{split}_image"] = source.inputs[kept]
            arrays[f"{split}_label"] = np.searchsorted(classes, source.labels[kept])
        np.savez_compressed(folder / f"{half}.npz", **arrays)
    return {half: " ".join(names[classes]) for half, classes in halves.items()}


def train_base(folder: pathlib.Path, half: str) -> float:
    """A base network on one half; its accuracy on val."""
    config = transfer.get_config("model=resnet8_cifar,method=full")
    with config.unlocked():
        config.seed = SEED
        config.model.head_init = "lecun"
        config.model.image_size = 8  # as they are
        config.data.source = f"arrays:{folder / half}.npz"
        config.data.train, config.data.val, config.data.test = "train", "", "val"
        config.batch_size = 64
        config.total = (300.0, "steps")  # as many as the networks of the study
        config.lr = 5e-3
        config.log_every, config.eval_every = (100.0, "steps"), (300.0, "steps")
    return train.train(config, folder / half, verbose=False)["metrics"]["accuracy"]["value"]


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for half, letters in write(folder).items():
        print(f"{half}: {letters}\n  base network, accuracy on val: {train_base(folder, half):.3f}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/yosinski/prepare.py FOLDER")
    main(pathlib.Path(sys.argv[1]))
