"""Multi-label: which digits are in an image of two; a head with a hidden layer on the pretrained network.

python launch.py --config configs/digit_pairs.py
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,weights=builtin:glyphs,data=digits:pairs,method=full")
    with config.unlocked():
        config.task, config.data.test = "multilabel", "test"
        config.model.image_size = 20
        config.model.head = (("flatten", {}), ("dense", {"features": 64}), ("batch_norm", {}), ("relu", {}))
        config.batch_size, config.total, config.lr = 64, (150.0, "steps"), 1e-2
        config.log_every, config.eval_every = (25.0, "steps"), (50.0, "steps")
    return transfer.parse(config, arg)
