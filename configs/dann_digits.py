"""Digits to the same digits with inverted contrast and noise, whose labels are not used: DANN. Source only: ,dann=0

python launch.py --config configs/dann_digits.py
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,weights=builtin:glyphs,data=digits,method=full")
    with config.unlocked():
        config.data.test = "test"
        config.data.extra_eval = (("inverted", "digits:inverted", "test"),)
        config.streams.target = {"source": "digits:inverted", "split": "train", "batch_size": 64}
        config.terms.dann = {"weight": 1.0, "strength": ("sigmoid", {"alpha": 10.0})}
        config.batch_size, config.total, config.lr = 64, (400.0, "steps"), 3e-3
        config.log_every, config.eval_every = (50.0, "steps"), (100.0, "steps")
    return transfer.parse(config, arg)
