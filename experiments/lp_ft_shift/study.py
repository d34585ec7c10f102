"""Does fine-tuning distort pretrained features, so that a probe, or a probe before it, does better under a shift?

DeiT-tiny learns seven classes from photographs and is scored on held-out photographs and on art, cartoons and sketches
of the same classes (PACS). Kumar et al. (2022) found: fine-tuning wins in distribution, loses out of distribution, and
LP-FT, fine-tuning from a probed head, wins both.
"""

from configs import methods, transfer
from tl_jax.studies.study import Study

STEPS = 40.0  # of each run; LP-FT probes for the first half of them
SHIFTS = ("art_painting", "cartoon", "sketch")
RATES = (5e-5, 2e-4)  # of fine-tuning, one for head and backbone, as in the paper


def get_study(arg: str = "") -> Study:
    """The argument is the model's weights and root=FOLDER, the folder with the folders of the domains."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root = given.pop("root", "pacs")
    base = methods.get_config("linear_probe,model=deit_tiny_patch16_224")
    with base.unlocked():
        base.model.image_size = 128
        base.data.source = f"folder:{root}/photo"
        base.data.train, base.data.val, base.data.test = "train[:70%]", "", "train[70%:]"
        base.data.extra_eval = tuple((name, f"folder:{root}/{name}", "train[:50%]") for name in SHIFTS)
        base.batch_size = 16
        base.total = (STEPS, "steps")
        base.log_every, base.eval_every = (10.0, "steps"), (STEPS, "steps")
        base.lr = 1e-2  # of the probe
        base.resamples = 200
    ways: dict[str, dict] = {"linear probe": {}}
    for rate in RATES:
        full = {"method.name": "full", "lr": rate}
        ways[f"full, lr {rate:g}"] = full
        ways[f"LP-FT, lr {rate:g}"] = {"phases": methods.phases({}, full, total=STEPS, unit="steps")}
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={"method": ways},
        baseline={"method": f"full, lr {RATES[0]:g}"},
        metrics=("accuracy", *(f"{name}/accuracy" for name in SHIFTS)),
    )
