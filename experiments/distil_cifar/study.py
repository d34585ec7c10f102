"""Does a small network learn more from a teacher than from the labels alone, and from which of its outputs?

A ResNet-8 (0.08 M parameters) on 5,000 images of CIFAR-10, stored as JPEG, with and without a ResNet-20 that was
fine-tuned on them: labels, answers (KD, DKD), attention (AT), maps (FitNet), relations (RKD). Paired by seed: the arms
of a seed begin with the same weights and see the same crops in the same order.
"""

from configs import transfer
from tl_jax.studies.study import Study

# Weights: Tian et al. 2020 (arXiv:1910.10699, section 4); of DKD Zhao et al. 2022 (arXiv:2203.08679), risen at once.
TERMS = {
    "labels": {"kd": {"weight": 1e-9}},  # so that it sees the crops that are cached for the others; it learns nothing
    "KD": {"task": {"weight": 0.1}, "kd": {"weight": 0.9}},
    "DKD": {"dkd": {"weight": ("sigmoid", {"alpha": 40.0})}},
    "AT": {"at": {}},
    "FitNet": {"fitnet": {}},
    "RKD": {"rkd": {}},
}


LEVELS = {name: {"terms": terms} for name, terms in TERMS.items()}
LEVELS["FitNet"]["clip"] = 1.0  # without it one run of five overflowed at 0.05, and the others stayed at 0.25 +- 0.1


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER of prepare.py, seeds=5, and further options."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root, seeds = given.pop("root", "distil_cifar"), int(given.pop("seeds", 5))
    base = transfer.get_config(f"model=resnet8_cifar,method=full,data=arrays:{root}/cifar10.npz")
    with base.unlocked():
        base.model.head_init = "lecun"
        base.data.train, base.data.val, base.data.test = "train[:10%]", "", "test"
        base.data.augment = (("random_crop", {"padding": 4}), ("flip", {}))
        base.optimizer, base.optimizer_args = "sgd", {"momentum": 0.9}
        base.lr, base.weight_decay, base.clip, base.batch_size = 0.05, 5e-4, 0.0, 64
        base.total, base.eval_every, base.log_every = (12.0, "epochs"), (12.0, "epochs"), (100.0, "steps")
        base.eval_batch_size, base.resamples = 500, 200
        base.networks.teacher = {"name": "resnet20_cifar", "weights": f"{root}/teacher", "cache": "features"}
        base.views, base.cache_dir = 4, f"{root}/cache"  # the same four epochs of crops, three times
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={"learned from": LEVELS},
        baseline={"learned from": "labels"},
        seeds=tuple(range(seeds)),
        metrics=("accuracy", "nll"),
    )
