"""Adaptation while predicting, on corrupted images of CIFAR-10."""

import csv

from tl_jax.studies.ledger import Claim

COMMANDS = ((
    "experiments/tent_corruptions/run.py", "{material}/data/cifar10_jpeg",
    "{material}/weights/cifar10_resnet/resnet20-12fca82f.safetensors", "{out}",
),)  # fmt: skip
NEEDS = ("data/cifar10_jpeg", "weights/cifar10_resnet")
OURS = "ResNet-20, the first 5,000 test images, which were JPEG files before; Gaussian noise of severity 5"


def measure(out):
    """Accuracies in percent, and those of the other ways minus that of source on the same images."""
    with (out / "table.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file) if row["corruption"] == "gaussian_noise"}
    found = {}
    for method in ("source", "norm", "tent"):
        found[method] = tuple(100 - float(rows[method][key]) for key in ("error", "high", "low"))
        found[f"{method} - source"] = tuple(float(rows[method][key]) for key in ("gain", "gain_low", "gain_high"))
    return found


def claim(name, paper, says, *above):
    return Claim(name, paper, says, {}, 0.0, OURS, COMMANDS, NEEDS, measure, above)


CLAIMS = (
    claim("new_statistics", "Li et al. 2016 (AdaBN), as in Wang et al. 2021, table 2",
          "New statistics of BatchNorm are above the source's on corrupted images.", ("norm", "source")),
    claim("tent", "Wang et al. 2021, table 2", "Tent is above the source on corrupted images.", ("tent", "source")),
)  # fmt: skip
