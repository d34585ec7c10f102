"""How many blocks of a pretrained network should be unfrozen, when there are 1, 5, 10 or 25 examples of each class?

A ResNet-8 pretrained on rendered letters meets handwritten digits. From training the new head alone to training
everything, each depth of unfreezing is compared with the head alone, at each number of shots.
"""

from configs import quickstart, transfer
from tl_jax.studies.study import Study


def get_study(arg: str = "") -> Study:
    base = quickstart.get_config()
    with base.unlocked():
        base.seeds, base.baseline = (), ()
        base.data.val = ""  # nothing is chosen, so nothing need be scored on the way
        base.total = (100.0, "steps")
        base.log_every, base.eval_every = (25.0, "steps"), (100.0, "steps")
        base.resamples = 200  # of the interval of each run; those of the report are over seeds
    gentle = {"backbone": {"lr_mult": 0.1}}  # what is pretrained learns ten times slower than the new head
    return Study(
        base=transfer.parse(base, arg),
        factors={
            "unfrozen": {
                "head": {"method.name": "linear_probe", "method.k": 0, "groups": {}},
                "1 block": {"method.name": "last_k", "method.k": 1, "groups": gentle},
                "2 blocks": {"method.name": "last_k", "method.k": 2, "groups": gentle},
                "3 blocks": {"method.name": "last_k", "method.k": 3, "groups": gentle},
                "all": {"method.name": "full", "method.k": 0, "groups": gentle},
            },
            "shots": {str(shots): {"data.shots": shots} for shots in (1, 5, 10, 25)},
        },
        baseline={"unfrozen": "head"},
        metrics=("accuracy", "nll"),
    )
