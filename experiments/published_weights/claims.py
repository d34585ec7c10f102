"""Published accuracies of the weights at hand."""

import csv
import json

import numpy as np

from tl_jax.studies.ledger import Claim

COMMANDS = (("experiments/published_weights/run.py", "{material}", "{out}"),)
NEEDS = ("data/imagenet_sample_250", "data/cifar10_jpeg", "weights/deit_tiny_patch16_224", "weights/mobilenet_v2",
         "weights/cifar10_resnet")  # fmt: skip
PHOTOS = "250 photos that look like training images: this proves the conversion; the tolerance is one photo"
JPEG = "the test images had been compressed as JPEG, which costs accuracy"


def of(network):
    """The accuracies of a network in percent, from accuracy.csv."""

    def measure(out):
        with (out / "accuracy.csv").open() as file:
            (row,) = (row for row in csv.DictReader(file) if row["network"] == network)
        return {k: tuple(100 * float(row[f"{k}{end}"]) for end in ("", "_low", "_high")) for k in ("top1", "top5")}

    return measure


CIFAR = {"ResNet-20": "resnet20_cifar", "ResNet-32": "resnet32_cifar"}


def exactly(network):
    """The same without intervals: of the same images, where PyTorch and this code must agree."""

    def measure(out):
        return {k: (value,) * 3 for k, (value, _, _) in of(network)(out).items()}

    return measure


def top1(out):
    """The accuracy that `evaluate --json` printed, in percent."""
    found = json.loads((out / "stdout.txt").read_text())["accuracy"]
    return {"top1": tuple(100 * found[end] for end in ("value", "low", "high"))}


def on_imagenet(name, title, paper, file, published):
    says = f"{title}: {published} % of ImageNet's validation images."
    command = ("-m", "tl_jax", "evaluate", "--model", name, "--weights", f"{{material}}/weights/{file}",
               "folder:{material}/data/imagenet_val", "--json")  # fmt: skip
    needs = ("data/imagenet_val", f"weights/{file}")
    return Claim(f"{name}_imagenet", paper, says, {"top1": published}, 0.1, "", (command,), needs, top1)


def on_photos(name, title, framework, published):
    paper, numbers = f"{framework} in PyTorch on the same photos", " and ".join(map(str, published.values()))
    says = f"{title}: {numbers} % of 250 photos."
    return Claim(f"{name}_photos", paper, says, published, 0.4, PHOTOS, COMMANDS, NEEDS, exactly(name))


def cifar(out):
    """The accuracies of both networks, and the difference on the same images, in percent."""
    found = {title: of(name)(out)["top1"] for title, name in CIFAR.items()}
    with np.load(out / "correct.npz") as arrays:
        small, large = (arrays[name].astype(float) for name in CIFAR.values())
    mean, spread = (large - small).mean(), 1.96 * (large - small).std() / len(small) ** 0.5
    return found | {"ResNet-32 - ResNet-20": tuple(100 * x for x in (mean, mean - spread, mean + spread))}


DEIT, MOBILENET = ("deit_tiny_patch16_224", "DeiT-tiny"), ("mobilenetv2_100", "MobileNetV2")
CLAIMS = (
    on_photos(*DEIT, "timm", {"top1": 80.0, "top5": 94.4}),
    on_photos(*MOBILENET, "torchvision", {"top1": 82.4, "top5": 96.4}),
    Claim("cifar_resnets", "The repository of these weights (Idelbayev)",
          "ResNet-20 and ResNet-32: 91.78 and 92.78 % of CIFAR-10's test images.",
          {"ResNet-32": 92.78, "ResNet-20": 91.78}, 0.1, JPEG, COMMANDS, NEEDS, cifar),
    on_imagenet(*DEIT, "Touvron et al. 2021", "deit_tiny_patch16_224/deit_tiny_patch16_224.safetensors", 72.2),
    on_imagenet(*MOBILENET, "torchvision, table of weights", "mobilenet_v2/mobilenet_v2-b0353104.pth", 71.878),
)  # fmt: skip
