"""Binary: is a digit even or odd? One sigmoid output, whose threshold is chosen on val.

python launch.py --config configs/parity.py
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,weights=builtin:glyphs,data=digits:parity,method=last_k")
    with config.unlocked():
        config.task, config.method.k, config.data.test = "binary", 2, "test"
        config.batch_size, config.total, config.lr = 64, (200.0, "steps"), 3e-3
        config.log_every, config.eval_every = (50.0, "steps"), (50.0, "steps")
    return transfer.parse(config, arg)
