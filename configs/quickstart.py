"""Letters to digits: a small ResNet pretrained on rendered letters meets 5 handwritten digits of each class.

python launch.py --config configs/quickstart.py

The last block and a new head are trained, what lies before stays frozen. The baseline is the same network trained whole
from random weights, on the same examples, with the same augmentation and number of steps, at the rate that suits it.
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,weights=builtin:glyphs,data=digits,method=last_k")
    with config.unlocked():
        config.model.image_size = 16
        config.data.train = "train[:80%]"
        config.data.val = "train[80%:]"  # draws the curves; nothing is chosen by it
        config.data.test = "test"
        config.data.shots = 5
        config.data.augment = (("translation", {"fraction": 0.1}), ("rotation", {"degrees": 10.0}))
        config.method.k = 1
        config.groups = {"backbone": {"lr_mult": 0.1}}
        config.batch_size = 48
        config.total = (150.0, "steps")
        config.lr = 1e-2
        config.log_every = (25.0, "steps")
        config.eval_every = (25.0, "steps")
        config.seeds = (1, 2, 3, 4)
        config.baseline = (
            ("model.weights", ""),
            ("method.name", "full"),
            ("method.k", 0),
            ("groups.backbone.lr_mult", 1.0),
        )
    return transfer.parse(config, arg)
