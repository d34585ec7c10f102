"""The teacher of configs/distill_digits.py: a ResNet-20 in CIFAR form, trained on digits from random weights.

python launch.py --config configs/teacher_digits.py --workdir workdirs/teacher
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet20_cifar,data=digits,method=full")
    with config.unlocked():
        config.model.image_size, config.model.head_init = 16, "lecun"
        config.data.test = "test"
        config.data.augment = (("translation", {"fraction": 0.1}), ("rotation", {"degrees": 10.0}))
        config.batch_size, config.total, config.lr = 64, (200.0, "steps"), 1e-2
        config.log_every, config.eval_every = (25.0, "steps"), (50.0, "steps")
    return transfer.parse(config, arg)
