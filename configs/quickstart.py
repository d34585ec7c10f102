"""Letters to digits: a small ResNet pretrained on rendered letters, fine-tuned with 5 scikit-learn digits per class.

python launch.py --config configs/quickstart.py
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,weights=builtin:glyphs,data=digits,method=full")
    with config.unlocked():
        config.model.image_size = 16
        config.data.train = "train"
        config.data.val = ""
        config.data.test = "test"
        config.data.shots = 5
        config.data.augment = (("translation", {"fraction": 0.1}), ("rotation", {"degrees": 10.0}))
        config.batch_size = 48
        config.total = (200.0, "steps")
        config.lr = 1e-2
        config.log_every = (20.0, "steps")
        config.eval_every = (100.0, "steps")
        config.seeds = (1, 2)
        config.baseline = (("model.weights", ""),)  # the same network, data and steps from random weights
    return transfer.parse(config, arg)
