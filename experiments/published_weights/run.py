"""The accuracy of published weights, without training, on the images at hand.

python experiments/published_weights/run.py MATERIAL OUT

MATERIAL has data/imagenet_sample_250 (photos whose names begin with the number of their class), data/cifar10_jpeg
(test.npz: bytes and offsets of image files, labels, classes) and the weights below. OUT gets accuracy.csv: network,
data, images, and top-1 and top-5 accuracy with their 95 % intervals (Wilson 1927); and correct.npz: for each network,
whether each image is right.
"""

import csv
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import tl_jax
from tl_jax import tasks
from tl_jax.data import sources

PHOTOS = {
    "deit_tiny_patch16_224": "deit_tiny_patch16_224/deit_tiny_patch16_224.safetensors",
    "mobilenetv2_100": "mobilenet_v2/mobilenet_v2-b0353104.pth",
}
CIFAR = {
    "resnet20_cifar": "cifar10_resnet/resnet20-12fca82f.th",
    "resnet32_cifar": "cifar10_resnet/resnet32-d509ac18.th",
}


def row(name: str, data: str, logits: np.ndarray, labels: np.ndarray, correct: dict[str, np.ndarray]) -> dict:
    """The accuracies of logits [N, K] for labels [N]; adds to `correct` which images are right."""
    found: dict = {"network": name, "data": data, "images": len(labels)}
    ranks = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(axis=1)
    correct[name] = ranks < 1
    for k in (1, 5):
        share = float((ranks < k).mean())
        interval = tasks.share_interval("classification", share, len(labels))
        found |= {f"top{k}": share, f"top{k}_low": interval["low"], f"top{k}_high": interval["high"]}
    return found


def main(material: pathlib.Path, out: pathlib.Path) -> None:
    rows, correct = [], {}
    photos = sorted((material / "data/imagenet_sample_250").glob("*.JPEG"))
    numbers = np.array([int(path.name.partition("_")[0]) for path in photos])
    for name, file in PHOTOS.items():
        model = tl_jax.load(name, material / "weights" / file)
        rows.append(row(name, "250 photos of ImageNet", tl_jax.outputs(model, photos), numbers, correct))
    arrays = np.load(material / "data/cifar10_jpeg/test.npz")
    own = {f"test_{key}": arrays[key] for key in ("bytes", "offsets", "labels")}
    np.savez(out / "cifar.npz", **own, classes=arrays["classes"])
    test = sources.load(f"arrays:{out / 'cifar.npz'}", "test")
    for name, file in CIFAR.items():
        model = tl_jax.load(name, material / "weights" / file)
        rows.append(row(name, "CIFAR-10 test, compressed as JPEG", tl_jax.outputs(model, test), test.labels, correct))
    with (out / "accuracy.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    np.savez(out / "correct.npz", **correct)
    for each in rows:
        print(f"{each['network']:24} {each['data']:36} {each['images']:6} {each['top1']:.4f} {each['top5']:.4f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/published_weights/run.py MATERIAL OUT")
    main(*map(pathlib.Path, sys.argv[1:]))
