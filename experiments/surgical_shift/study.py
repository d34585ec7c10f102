"""Which part of a network should be tuned, if its input has changed, and which, if its labels have?

A ResNet-8 that reads digits meets ten of each digit with inverted contrast and noise (a shift of the input), or with
the labels y -> 9 - y (a shift of the labels). It keeps its classifier, and one part of it is trained, or all. Lee et
al. (2023, surgical fine-tuning) found: the first block is best for shifts of the input, the last layers for shifts of
the labels, and either may beat training everything.
"""

from configs import transfer
from tl_jax.studies.study import Study

PARTS = {"first": "backbone/(stem|stage1)/.*", "middle": "backbone/stage2/.*", "last": "backbone/stage3/.*"}


def only(pattern: str) -> dict:
    """Trains the parameters of a pattern, and no other."""
    group = "head" if pattern.startswith("head") else "backbone"
    return {"method.name": "rules", "method.rules": ((pattern, group), (".*", "frozen"))}


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER, what prepare.py made, and further options."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root = given.pop("root", "surgical")
    base = transfer.get_config(f"model=resnet8_cifar,weights={root}/source/model.safetensors")
    with base.unlocked():
        base.model.image_size = 16
        base.model.keep_head = True
        base.data.train, base.data.val, base.data.test = "train", "", "test"  # nothing is chosen
        base.data.shots = 10
        base.batch_size = 50
        base.total = (100.0, "steps")
        base.log_every, base.eval_every = (25.0, "steps"), (100.0, "steps")
        base.resamples = 200
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={
            "shift": {shift: {"data.source": f"arrays:{root}/{shift}.npz"} for shift in ("input", "label")},
            "trained": {
                **{part: only(pattern) for part, pattern in PARTS.items()},
                "head": only("head/.*"),
                "all": {"method.name": "full"},
            },
            "rate": {text: {"lr": float(text)} for text in ("0.001", "0.01", "0.03")},
        },
        baseline={"trained": "all"},
        metrics=("accuracy", "nll"),
    )
