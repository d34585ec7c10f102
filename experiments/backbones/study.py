"""Which network, and how much of it, should be trained on some 100 to 200 photos or sketches, and at what cost?

DeiT-tiny, MobileNetV2, EfficientNet-lite0 and a ResNet-18 without its last stage, with ImageNet weights, meet ants and
bees (photos, 2 classes) or the sketches of PACS (7 classes). Trained is the new head alone, the head with the last one
or two blocks, or everything.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from configs import transfer
from tl_jax.studies.study import Study

SHARED = "../shared"
# Statistics of BatchNorm rest: batches are small.
FROZEN = {"method.norm": ((".*", "frozen"),)}
NETWORKS = {
    "DeiT-tiny": ("deit_tiny_patch16_224", "deit_tiny_patch16_224/deit_tiny_patch16_224.safetensors", {}),
    "MobileNetV2": ("mobilenetv2_100", "mobilenet_v2/mobilenet_v2-b0353104.pth", FROZEN),
    "EfficientNet-lite0": ("tf_efficientnet_lite0", "efficientnet_lite0/efficientnet-lite0-57934424.pth", FROZEN),
    # A file without layer4, which begins at random.
    "ResNet-18 to layer3": (
        "resnet18",
        "resnet18_imagenet_to_layer3/resnet18_stem_to_layer3_folded_bn.safetensors",
        {**FROZEN, "model.partial": ("stage4/.*",)},
    ),
}
DATA = {  # source, train, val, test
    "hymenoptera": ("hymenoptera_256", "train[:80%]", "train[80%:]", "val"),
    "sketch": ("pacs_40/sketch", "train[:40%]", "train[40%:50%]", "train[50%:]"),
}


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER with weights/ and data/, data=hymenoptera or sketch, and further options."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root, name = given.pop("root", SHARED), given.pop("data", "hymenoptera")
    if name not in DATA:
        raise ValueError(f"data={name!r}: expected one of {', '.join(DATA)}")
    folder, *splits = DATA[name]
    base = transfer.get_config(f"data=folder:{root}/data/{folder}")
    with base.unlocked():
        base.data.train, base.data.val, base.data.test = splits
        base.model.image_size = 128
        base.cache = "features"
        base.batch_size, base.total = 16, (60.0, "steps")
        base.log_every, base.eval_every = (20.0, "steps"), (60.0, "steps")
        base.lr, base.weight_decay = 3e-3, 0.0
    gentle = {"backbone": {"lr_mult": 0.03}}
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={
            "network": {
                title: {"model.name": model, "model.weights": f"{root}/weights/{file}", **more}
                for title, (model, file, more) in NETWORKS.items()
            },
            "trained": {
                "head": {"method.name": "linear_probe", "method.k": 0, "groups": {}},
                "last block": {"method.name": "last_k", "method.k": 1, "groups": gentle},
                "last 2 blocks": {"method.name": "last_k", "method.k": 2, "groups": gentle},
                "all": {"method.name": "full", "method.k": 0, "groups": gentle, "cache": ""},
            },
        },
        baseline={"trained": "head"},
        seeds=(0, 1, 2),
        metrics=("accuracy", "nll"),
    )
