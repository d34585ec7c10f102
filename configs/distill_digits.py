"""A ResNet-8 learns 20 examples of each digit from labels and from a ResNet-20 that has seen many: distillation.

python launch.py --config configs/distill_digits.py        (after configs/teacher_digits.py)
"""

from configs import transfer


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,data=digits,method=full")
    with config.unlocked():
        config.model.image_size, config.model.head_init = 16, "lecun"
        config.data.test, config.data.shots = "test", 20
        config.networks.teacher = {"name": "resnet20_cifar", "weights": "workdirs/teacher", "cache": "features"}
        config.terms.task, config.terms.kd = {"weight": 0.1}, {"weight": 0.9, "temperature": 4.0}
        config.batch_size, config.total, config.lr = 40, (300.0, "steps"), 1e-2
        config.log_every, config.eval_every = (50.0, "steps"), (100.0, "steps")
    return transfer.parse(config, arg)
