"""Domain adaptation: digits with labels, and digits on grey, noisy paper without, made alike by a discriminator (DANN).

python launch.py --config configs/dann_digits.py
python launch.py --config "configs/dann_digits.py:streams={},terms={}"        (without adaptation)

Accuracy on the grey paper: 0.92 with adaptation, 0.16 without, 0.32 with the target in the batches and no reversal.
DANN matches the domains as wholes, not class by class: of `digits:inverted` it matches the wrong classes, 0.20.
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,weights=builtin:glyphs,data=digits,method=full")
    with config.unlocked():
        config.data.test = "test"
        config.data.extra_eval = (("target_test", "digits:faded", "test"),)
        config.data.candidates = ("target_val", "digits:faded", "train[80%:]")
        config.streams.target = {"source": "digits:faded", "split": "train[:80%]"}
        config.terms.dann = {"width": 128}
        config.batch_size, config.total, config.lr = 32, (400.0, "steps"), 1e-3
        config.log_every, config.eval_every = (50.0, "steps"), (100.0, "steps")
    return transfer.parse(config, arg)
