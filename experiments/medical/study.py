"""How well are red cells counted, and platelets noticed, in photos of blood smears, by networks that know ImageNet?

The BCCD photos with their published split: 205 to train on, 86 to choose on, 72 to test on. ask=count is a regression;
ask=platelets: are there any? stage=prepare compares, on val alone, three ways of making the photos square.
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
WAYS = ("crop", "squeeze", "pad")  # of prepare.py


def trained(k: int) -> dict:
    """The head and the last k blocks, these with a thirtieth of its rate."""
    if not k:
        return {"method.name": "linear_probe", "method.k": 0, "groups": {}}
    return {"method.name": "last_k", "method.k": k, "groups": {"backbone": {"lr_mult": 0.03}}}


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER of prepare.py, weights=FOLDER, ask=count or platelets, way=NAME, stage=prepare."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root, weights = given.pop("root", "smears"), given.pop("weights", "../shared/weights")
    ask, way, stage = given.pop("ask", "count"), given.pop("way", "pad"), given.pop("stage", "")
    if ask not in ASKED or way not in WAYS or stage not in ("", "prepare"):
        known = f"ask={' or '.join(ASKED)}, way={', '.join(WAYS)}, stage=prepare or none"
        raise ValueError(f"ask={ask!r}, way={way!r}, stage={stage!r}: expected {known}")
    task, column, metrics = ASKED[ask]
    base = transfer.get_config(f"data=csv:{root}/{way}/labels.csv")
    with base.unlocked():
        base.task, base.data.labels = task, (column,)
        base.data.train, base.data.val, base.data.test = "train", "val", "" if stage else "test"
        base.model.image_size = 192
        base.data.card, base.data.override_card = {"crop": 1.0}, True  # the whole square
        base.cache = "features"
        base.batch_size, base.total = 16, (150.0, "steps")
        base.log_every, base.eval_every = (50.0, "steps"), (150.0, "steps")
        base.lr = 3e-3
    networks = {
        title: {"model.name": model, "model.weights": f"{weights}/{file}", **more}
        for title, (model, file, more) in NETWORKS.items()
    }
    two = {title: networks[title] for title in ("DeiT-tiny", "MobileNetV2")}
    ways = {name: {"data.source": f"csv:{root}/{name}/labels.csv"} for name in WAYS}
    depths = {"head": trained(0), "last block": trained(1), "last 4 blocks": trained(4)}
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={"prepared": ways, "network": two} if stage else {"network": networks, "trained": depths},
        baseline={"prepared": "crop"} if stage else {"trained": "head"},
        seeds=(0, 1, 2),
        metrics=metrics,
        together="all",
    )
