"""Makes what the study of surgical fine-tuning needs, from the embedded digits and letters alone:

python experiments/surgical_shift/prepare.py FOLDER

FOLDER/source.npz, input.npz and label.npz, each with train and test, and FOLDER/source/model.safetensors, the network
trained on the source digits. Half of the digits' train split is the source, the other half the target.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from configs import transfer
from tl_jax.data import sources
from tl_jax.training import train

NOISE = 32.0  # standard deviation of the noise on the inverted digits, of 255


def invert(images: np.ndarray, seed: int) -> np.ndarray:
    """The shift of the input: dark strokes on a light ground, and noise; uint8 [N, 8, 8, 3], one noise for R, G, B."""
    noise = np.random.default_rng(seed).normal(0, NOISE, (*images.shape[:3], 1))
    return np.clip(np.rint(255 - images + noise), 0, 255).astype(np.uint8)


def write(folder: pathlib.Path) -> None:
    """The digits as they are, with another input, and with other labels: y becomes 9 - y."""
    source, target = sources.load("digits", "train[:50%]"), sources.load("digits", "train[50%:]")
    test = sources.load("digits", "test")

    def save(name, train, test_images, labels):
        np.savez_compressed(
            folder / f"{name}.npz", train_image=train[0], train_label=train[1], test_image=test_images,
            test_label=labels, classes=np.array(source.class_names),
        )  # fmt: skip

    save("source", (source.inputs, source.labels), test.inputs, test.labels)
    save("input", (invert(target.inputs, 0), target.labels), invert(test.inputs, 1), test.labels)
    save("label", (target.inputs, 9 - target.labels), test.inputs, 9 - test.labels)


def train_source(folder: pathlib.Path) -> dict:
    """The source network: the embedded one, trained whole on the source digits; its result, shifted sets included."""
    arrays = {name: f"arrays:{folder / name}.npz" for name in ("source", "input", "label")}
    config = transfer.get_config("model=resnet8_cifar,weights=builtin:glyphs,method=full")
    with config.unlocked():
        config.model.image_size = 16
        config.data.source = arrays["source"]
        config.data.train, config.data.val, config.data.test = "train", "", "test"
        config.data.extra_eval = tuple((f"{name} shift", arrays[name], "test") for name in ("input", "label"))
        config.data.augment = (("translation", {"fraction": 0.1}), ("rotation", {"degrees": 10.0}))
        config.batch_size = 48
        config.total = (400.0, "steps")
        config.log_every, config.eval_every = (50.0, "steps"), (400.0, "steps")
        config.lr = 3e-3
    return train.train(config, folder / "source", verbose=False)


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder)
    result = train_source(folder)
    print(f"source network, accuracy on test: {result['metrics']['accuracy']['value']:.3f}")
    for name, scores in result["extra_eval"].items():
        print(f"  with {name}: {scores['accuracy']['value']:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/surgical_shift/prepare.py FOLDER")
    main(pathlib.Path(sys.argv[1]))
