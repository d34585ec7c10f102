"""Makes what the study of distillation needs: CIFAR-10 as arrays of pixels, and a teacher that knows its JPEG form.

python experiments/distil_cifar/prepare.py CIFAR10 WEIGHTS FOLDER [EPOCHS]

CIFAR10 is a folder with train.npz and test.npz (bytes, offsets, labels, classes), WEIGHTS a file of resnet20_cifar.
FOLDER gets cifar10.npz and the run teacher/, which goes on with the file's own classes for EPOCHS (2) epochs of train.
"""

import io
import itertools
import pathlib
import sys

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import tl_jax
from configs import transfer

AUGMENT = (("random_crop", {"padding": 4}), ("flip", {}))


def decode(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Writes the images of both splits as pixels, which spares every run 100,000s of small JPEG files."""
    arrays = {}
    for split in ("train", "test"):
        found = np.load(folder / f"{split}.npz")
        stored, ends = found["bytes"].tobytes(), found["offsets"].tolist()
        images = (Image.open(io.BytesIO(stored[a:b]), formats=("JPEG",)) for a, b in itertools.pairwise(ends))
        arrays |= {f"{split}_image": np.stack([np.asarray(image) for image in images])}
        arrays |= {f"{split}_label": found["labels"].astype(np.int32), "classes": found["classes"]}
    np.savez(path, **arrays)


def teacher(source: str, weights: str, epochs: float):
    """The run that the teacher comes from."""
    config = transfer.get_config(f"model=resnet20_cifar,weights={weights},method=full")
    with config.unlocked():
        config.model.keep_head = True
        config.data.source, config.data.train, config.data.val, config.data.test = source, "train", "", "test"
        config.data.augment = AUGMENT
        config.optimizer, config.optimizer_args = "sgd", {"momentum": 0.9, "nesterov": True}
        config.lr, config.weight_decay, config.clip, config.batch_size = 0.01, 5e-4, 0.0, 128
        config.total, config.log_every, config.eval_every = (epochs, "epochs"), (100.0, "steps"), (epochs, "epochs")
    return config.lock()


def main(cifar10: pathlib.Path, weights: str, folder: pathlib.Path, epochs: float = 2.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cifar10.npz").exists():
        decode(cifar10, folder / "cifar10.npz")
    tl_jax.train(teacher(f"arrays:{folder}/cifar10.npz", weights, epochs), folder / "teacher")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit("usage: python experiments/distil_cifar/prepare.py CIFAR10 WEIGHTS FOLDER [EPOCHS]")
    main(pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), *map(float, sys.argv[4:]))
