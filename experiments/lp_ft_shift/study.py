"""Does fine-tuning distort pretrained features, so that a linear probe, or a probe before fine-tuning, does better under a shift?

DeiT-tiny learns seven classes from photographs and is scored on held-out photographs and on art, cartoons and sketches of
the same classes (PACS). Kumar et al. (2022) found: fine-tuning wins in distribution, loses out of distribution, and
LP-FT, fine-tuning from a probed head, wins both.
"""

from configs import methods, transfer
from tl_jax.studies.study import Study

STEPS = 60.0
SHIFTS = ("art_painting", "cartoon", "sketch")


def get_study(arg: str = "") -> Study:
    """The argument is the model's weights and root=FOLDER, the folder with the folders of the domains."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root = given.pop("root", "pacs")
    base = methods.get_config("linear_probe,model=deit_tiny_patch16_224")
    with base.unlocked():
        base.model.image_size = 96
        base.data.source = f"folder:{root}/photo"
        base.data.train, base.data.val, base.data.test = "train[:70%]", "", "train[70%:]"
        base.data.also = tuple((name, f"folder:{root}/{name}", "train") for name in SHIFTS)
        base.batch_size = 16
        base.total = (STEPS, "steps")
        base.log_every, base.eval_every = (10.0, "steps"), (STEPS, "steps")
        base.lr = 3e-3
        base.resamples = 200
    steep = {"method.name": "full", "groups": {"backbone": {"lr_mult": 0.1}}}
    full = {"method.name": "full", "groups": {"backbone": {"lr_mult": 0.03}}}
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={
            "method": {
                "linear probe": {},
                "full": full,
                "LP-FT": {"phases": methods.phases({}, full, total=STEPS, unit="steps")},
                "full, 3x rate": steep,
                "LP-FT, 3x rate": {"phases": methods.phases({}, steep, total=STEPS, unit="steps")},
            }
        },
        baseline={"method": "full"},
        metrics=("accuracy", *(f"{name}/accuracy" for name in SHIFTS)),
    )
