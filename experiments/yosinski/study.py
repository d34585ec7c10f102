"""How transferable are the layers of a network, from the first to the last?

The letters are cut into two halves of the classes, A and B. Of a network trained on A or on B the first n parts (stem,
then blocks) are copied, those behind start from random numbers, and the whole learns B: the copied part frozen (AnB and
BnB in Yosinski et al. 2014) or trained with the rest (AnB+, BnB+). With n = 0 it is a network from random weights.
They found: the first layers are general; copies from A get worse with depth where they stay frozen, and so do those
from B in the middle, where layers had learnt together; trained further, copies are never worse, and even help.
"""

from configs import transfer
from tl_jax.studies.study import Study

PARTS = ("stem", "stage1", "stage2", "stage3")  # one block each


def first(n: int, frozen: bool) -> dict:
    """Keeps the first n parts of the weight file; they are frozen, or trained like what starts anew behind them."""
    if frozen and n == len(PARTS):
        return {"method.name": "linear_probe"}
    copied = ((f"backbone/({'|'.join(PARTS[:n])})/.*", "frozen"),) if frozen else ()
    rules = (*copied, ("head/.*", "head"), (".*", "backbone"))
    return {"model.reinit": PARTS[n:], "method.name": "rules", "method.rules": rules}


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER, what prepare.py made, and further options."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root = given.pop("root", "letters")
    base = transfer.get_config("model=resnet8_cifar")
    with base.unlocked():
        base.model.head_init = "lecun"
        base.model.image_size = 8
        base.data.source = f"arrays:{root}/B.npz"
        base.data.train, base.data.val, base.data.test = "train", "", "val"  # nothing is chosen: val is the test
        base.batch_size = 64
        base.total = (300.0, "steps")
        base.lr = 5e-3
        base.log_every, base.eval_every = (100.0, "steps"), (300.0, "steps")
        base.resamples = 200
    copied = {"0": first(0, frozen=False)}
    for n in range(1, len(PARTS) + 1):
        copied |= {f"{n} frozen": first(n, frozen=True), f"{n} trained": first(n, frozen=False)}
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={
            "copied": copied,
            "from": {half: {"model.weights": f"{root}/{half}/model.safetensors"} for half in "BA"},
        },
        baseline={"copied": "0", "from": "B"},
        metrics=("accuracy", "nll"),
    )
