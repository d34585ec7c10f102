"""What a teacher adds to labels."""

import functools

from tl_jax.studies.ledger import Claim, of_study

COMMANDS = (
    ("experiments/distil_cifar/prepare.py", "{material}/data/cifar10_jpeg",
     "{material}/weights/cifar10_resnet/resnet20-12fca82f.safetensors", "{out}/data"),
    ("launch.py", "--study", "experiments/distil_cifar:root={out}/data", "--workdir", "{out}/study"),
)  # fmt: skip
NEEDS = ("data/cifar10_jpeg", "weights/cifar10_resnet")
OURS = (
    "ResNet-20 to ResNet-8 on 5,000 JPEG images of CIFAR-10, 12 epochs, five seeds; the papers: CIFAR-100, 240 epochs"
)


def claim(name, paper, says, *above):
    arms = {arm: {"learned from": arm} for arm in dict.fromkeys(arm for pair in above for arm in pair)}
    measure = functools.partial(measured, arms=arms)
    return Claim(name, paper, says, {}, 0.0, OURS, COMMANDS, NEEDS, measure, above)


def measured(out, arms):
    return of_study(out / "study", arms)


CLAIMS = (
    claim("kd", "Hinton et al. 2015; Tian et al. 2020, table 1", "KD is above labels.", ("KD", "labels")),
    claim("dkd", "Zhao et al. 2022, Decoupled Knowledge Distillation", "DKD is above KD.", ("DKD", "KD")),
    claim(
        "features",
        "Tian et al. 2020, table 1",
        "KD is above FitNet, AT and RKD.",
        ("KD", "FitNet"),
        ("KD", "AT"),
        ("KD", "RKD"),
    ),
)
