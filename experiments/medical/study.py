"""How well are red cells counted, and platelets noticed, in photos of blood smears, by networks that know ImageNet?

The BCCD photos, 320 x 240 pixels, with their published split: 205 to train on, 86 to choose on, 72 to test on.
ask=count is a regression; ask=platelets: are there any?
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from configs import transfer
from tl_jax.studies.study import Study

FROZEN = {"method.norm": ((".*", "frozen"),)}  # the statistics of BatchNorm
NETWORKS = {
    "DeiT-tiny": ("deit_tiny_patch16_224", "deit_tiny_patch16_224/deit_tiny_patch16_224.safetensors", {}),
    "MobileNetV2": ("mobilenetv2_100", "mobilenet_v2/mobilenet_v2-b0353104.pth", FROZEN),
    "EfficientNet-lite0": ("tf_efficientnet_lite0", "efficientnet_lite0/efficientnet-lite0-57934424.pth", FROZEN),
}
ASKED = {  # task, the column of its labels, metrics
    "count": ("regression", "red_cells", ("rmse", "mae")),
    "platelets": ("binary", "platelets", ("roc_auc", "accuracy", "f1")),
}
# The head and the last block, or all, these with a thirtieth of the head's rate.
GENTLE = {"groups": {"backbone": {"lr_mult": 0.03}}}
TRAINED = {
    "head": {"method.name": "linear_probe", "method.k": 0, "groups": {}},
    "last block": {"method.name": "last_k", "method.k": 1, **GENTLE},
    "all": {"method.name": "full", "method.k": 0, **GENTLE, "cache": ""},
}


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER of prepare.py, weights=FOLDER, ask=count or platelets, and further options."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root, weights = given.pop("root", "smears"), given.pop("weights", "../shared/weights")
    ask = given.pop("ask", "count")
    if ask not in ASKED:
        raise ValueError(f"ask={ask!r}: expected {' or '.join(ASKED)}")
    task, column, metrics = ASKED[ask]
    base = transfer.get_config(f"data=csv:{root}/labels.csv")
    with base.unlocked():
        base.task, base.data.labels = task, (column,)
        base.data.train, base.data.val, base.data.test = "train", "val", "test"
        base.model.image_size = (240, 320)
        base.data.card, base.data.override_card = {"crop": 1.0}, True  # the whole photo
        base.cache = "features"
        base.batch_size, base.total = 16, (150.0, "steps")
        base.log_every, base.eval_every = (50.0, "steps"), (150.0, "steps")
        base.lr = 3e-3
    networks = {
        title: {"model.name": model, "model.weights": f"{weights}/{file}", **more}
        for title, (model, file, more) in NETWORKS.items()
    }
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={"network": networks, "trained": TRAINED},
        baseline={"trained": "head"},
        seeds=(0, 1, 2),
        metrics=metrics,
    )
