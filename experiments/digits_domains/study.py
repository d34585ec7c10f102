"""Digits of one source with labels, of another without: which adaptation, and which way to choose among them, helps?

A LeNet from random numbers. task=SOURCE-TARGET of mnist, usps and mnist_m. Rates, batches and schedule are those of
TLLib's digits (Jiang et al. 2020), with 3,000 steps of 36 + 36 images in place of 50,000 of 128 + 128. The target's
three parts are disjoint: trained on without labels, judged on without labels, scored.
"""

import pathlib
import sys
from collections.abc import Collection

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from configs import transfer
from tl_jax.studies.study import Study

DOMAINS = ("mnist", "usps", "mnist_m")
STEPS = 3000
BATCH = 36  # of each domain
REST = {"method.name": "rules", "method.rules": (("head/.*", "frozen"), (".*", "backbone"))}
BOTTLENECK = (("dense", {"features": 500}), ("batch_norm", {}), ("relu", {}), ("dropout", {"rate": 0.5}))
METHODS = {
    "source only": {"streams": {}},
    "dann": {"terms": {"dann": {}}},
    "cdan": {"terms": {"cdan": {}}},
    "bsp": {"terms": {"dann": {}, "bsp": {"strength": 1e-4}}},
    "mmd": {"terms": {"mmd": {}}, "norm_batches": "per_stream"},
    "jan": {"terms": {"jan": {}}},
    "coral": {"terms": {"coral": {}}},
    "mcd": {"terms": {"mcd": {"discrepancy": 0.3, "balance": 0.03}}},
    "mdd": {"terms": {"mdd": {}}, "clip": 1.0},  # it diverges without a clip
    "afn": {"terms": {"afn": {}}, "norm_batches": "per_stream", "model.head": BOTTLENECK},  # so does it, without a norm
    "mcc": {"terms": {"mcc": {}}},
    "bnm": {"terms": {"bnm": {}}},
    "shot": {},  # its phases depend on the number of steps
}
ALL, FEW = "usps-mnist", ("source only", "dann", "mmd", "mcc")  # the task of all methods; those of the others


def levels(task: str, steps: int, names: Collection[str]) -> dict[str, dict]:
    """{method: its options}; SHOT trains two thirds of the steps on the source, then without it and a resting head."""
    first, second = float(2 * steps // 3), float(steps - 2 * steps // 3)
    adapt = {"terms": {"task": {"weight": 0.0}, "shot": {"target": "target"}}, **REST, "restart": True}
    shot = {"phases": ((("total", (first, "steps")),), (("total", (second, "steps")), *adapt.items()))}
    return {name: shot if name == "shot" else METHODS[name] for name in names}


def get_study(arg: str = "") -> Study:
    """The argument is root=FOLDER, what prepare.py made, task=SOURCE-TARGET, steps=N, methods=few or all; options."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    root, task = given.pop("root", "digits"), given.pop("task", "usps-mnist")
    steps, every = int(given.pop("steps", STEPS)), given.pop("methods", "all" if task == ALL else "few")
    if every not in ("all", "few"):
        raise ValueError(f"methods={every!r}: expected all or few")
    source, _, target = task.partition("-")
    if source == target or not {source, target} <= set(DOMAINS):
        raise ValueError(f"task={task!r}: expected SOURCE-TARGET, two of {', '.join(DOMAINS)}")
    theirs = f"arrays:{root}/{target}.npz"
    base = transfer.get_config(f"model={'lenet' if 'mnist_m' in task else 'lenet_grey'},method=full")
    with base.unlocked():
        base.model.head_init = "lecun"
        base.data.source = f"arrays:{root}/{source}.npz"
        base.data.train, base.data.val, base.data.test = "train", "val", "test"
        base.streams.target = {"source": theirs, "split": "train"}
        base.data.candidates = ("target_val", theirs, "val")
        base.data.extra_eval = (("target_test", theirs, "test"),)
        base.batch_size = BATCH
        base.optimizer, base.optimizer_args = "sgd", {"momentum": 0.9, "nesterov": True}
        base.lr, base.weight_decay, base.clip = 0.01, 1e-3, 0.0
        base.schedule.name, base.schedule.args = "power", {"scale": 3.0}
        base.total = (float(steps), "steps")
        base.log_every, base.eval_every = (100.0, "steps"), (max(1.0, steps // 6), "steps")
    return Study(
        base=transfer.parse(base, ",".join(f"{key}={value}" for key, value in given.items())),
        factors={"method": levels(task, steps, METHODS if every == "all" else FEW)},
        baseline={"method": "source only"},
        seeds=(0, 1, 2),
        metrics=("target_test/accuracy", "accuracy"),
    )
