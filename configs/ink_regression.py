"""Regression: how many pixels of a digit are inked, from its image; the errors are in pixels.

python launch.py --config configs/ink_regression.py
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,weights=builtin:glyphs,data=digits:ink,method=full")
    with config.unlocked():
        config.task, config.data.test = "regression", "test"
        config.batch_size, config.total, config.lr = 64, (200.0, "steps"), 3e-3
        config.log_every, config.eval_every = (50.0, "steps"), (50.0, "steps")
        config.patience, config.min_delta = 3, 0.01
    return transfer.parse(config, arg)
