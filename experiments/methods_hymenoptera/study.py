"""Which way of adapting DeiT-tiny to 20 photos of ants and 20 of bees is best, and at what cost?

Every way of configs/methods.py that fits a vision transformer, with the same examples, order and number of steps, is
compared with a linear probe. The photos are reduced to 96 pixels, so that the pretrained features do not settle it.
"""

from configs import methods, transfer
from tl_jax.studies.study import Study

STEPS = 20.0


def get_study(arg: str = "") -> Study:
    base = methods.get_config("linear_probe,model=deit_tiny_patch16_224")
    with base.unlocked():
        base.model.image_size = 96
        base.data.train, base.data.val, base.data.test = "train", "", "val"  # nothing is chosen: val is the test
        base.data.shots = 20
        base.batch_size = 16
        base.lr = methods.LR  # of all ways
        base.total = (STEPS, "steps")
        base.log_every = base.eval_every = (STEPS, "steps")
        base.resamples = 200
    ways = methods.methods(STEPS, "steps")
    del ways["stoch_norm"]  # there is no BatchNorm in a transformer
    one_value = {"knn": 10.0, "logistic": 0.1, "ridge": 100.0}  # without val there is nothing to choose by
    for name, value in one_value.items():
        ways[name] = {**ways[name], "method.grid": (value,)}
    return Study(
        base=transfer.parse(base, arg),
        factors={"method": ways},
        baseline={"method": "linear_probe"},
        metrics=("accuracy", "nll"),
    )
