"""Does everything fit together? Four steps of the embedded network on digits, a few seconds.

python launch.py --config configs/smoke.py
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,weights=builtin:glyphs,data=digits,method=linear_probe")
    with config.unlocked():
        config.data.shots = 4
        config.data.train, config.data.val, config.data.test = "train[:50%]", "train[90%:]", "test[:20%]"
        config.batch_size = 16
        config.lr = 1e-3
        config.total = (4.0, "steps")
        config.log_every = (1.0, "steps")
        config.eval_every = (2.0, "steps")
        config.select = "best_val"
        config.resamples = 100
    return transfer.parse(config, arg)
