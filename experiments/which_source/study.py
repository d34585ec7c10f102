"""Which of seven networks is best to fine-tune for a target, as measured? scores.py asks the same of their features.

Five targets of 140 to 300 training examples: ants and bees, sketches, digits, blood smears with or without platelets,
and small photos. All of a network trains, for 60 steps of 16, at two rates.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from configs import transfer
from tl_jax.methods import recipes
from tl_jax.studies.study import Study

FROZEN = {"method.norm": ((".*", "frozen"),)}  # the statistics of BatchNorm: batches are small
LARGE = {"model.image_size": 96}
NETWORKS = {  # name, file among the weights, options
    "DeiT-tiny": ("deit_tiny_patch16_224", "deit_tiny_patch16_224/deit_tiny_patch16_224.safetensors", LARGE),
    "MobileNetV2": ("mobilenetv2_100", "mobilenet_v2/mobilenet_v2-b0353104.pth", {**LARGE, **FROZEN}),
    "EfficientNet-lite0": (
        "tf_efficientnet_lite0",
        "efficientnet_lite0/efficientnet-lite0-57934424.pth",
        {**LARGE, **FROZEN},
    ),
    "ResNet-32 of CIFAR-10": ("resnet32_cifar", "cifar10_resnet/resnet32-d509ac18.th", FROZEN),
    "ResNet-20 of CIFAR-10": ("resnet20_cifar", "cifar10_resnet/resnet20-12fca82f.safetensors", FROZEN),
    "ResNet-8 of glyphs": ("resnet8_cifar", "builtin:glyphs", FROZEN),
    "DeiT-tiny, random": ("deit_tiny_patch16_224", "", LARGE),
}
TARGETS = {  # options of the data; {material} and {root} are the arguments
    "hymenoptera": {"source": "folder:{material}/data/hymenoptera_256", "train": "train", "test": "val"},
    "sketch": {"source": "folder:{material}/data/pacs_40/sketch", "train": "train[:50%]", "test": "train[50%:]"},
    "digits": {"source": "digits", "train": "train", "test": "test", "shots": 20},
    "platelets": {"source": "csv:{root}/labels.csv", "train": "train", "test": "val+test", "labels": ("platelets",)},
    "cifar10": {"source": "arrays:{root}/cifar10.npz", "train": "train", "test": "test[:2000]", "shots": 30},
}
RATES = (2e-3, 1e-2)  # of the head; the backbone has a hundredth of it


def task_of(target: str) -> str:
    return "binary" if target == "platelets" else "classification"


def weights_of(file: str, material: str) -> str:
    return f"{material}/weights/{file}" if file and not file.startswith("builtin:") else file


def data_of(target: str, root: str, material: str) -> dict:
    """The options of the data of a target."""
    found = TARGETS[target]
    return found | {"source": found["source"].format(root=root, material=material)}


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER of prepare.py, material=FOLDER with data/ and weights/, target=, further options."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root, material = given.pop("root", "which_source"), given.pop("material", "../shared")
    target = given.pop("target", "hymenoptera")
    if target not in TARGETS:
        raise ValueError(f"target={target!r}: expected one of {', '.join(TARGETS)}")
    base = transfer.get_config("method=full")
    with base.unlocked():
        base.task = task_of(target)
        base.data.val = ""
        for key, value in data_of(target, root, material).items():
            base.data[key] = value
        base.groups = recipes.GENTLE
        base.batch_size, base.total = 16, (60.0, "steps")
        base.log_every = base.eval_every = (60.0, "steps")
        base.resamples = 200
    networks = {
        title: {"model.name": name, "model.weights": weights_of(file, material), **more}
        for title, (name, file, more) in NETWORKS.items()
    }
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={"network": networks, "rate": {f"{rate:g}": {"lr": rate} for rate in RATES}},
        baseline={"network": "DeiT-tiny, random"},
        seeds=(0, 1),
        metrics=("accuracy",),
    )
