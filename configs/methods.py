"""Every way of adapting a network as the few lines of config that it is. When to use which: docs/methods.md.

python launch.py --config configs/methods.py:METHOD,model=NAME,weights=FILE,data=folder:PATH --workdir W

METHODS holds what each changes in a linear probe. The new head learns at lr = 3e-3, a pretrained backbone a hundred
times slower, what is added to the network three times slower.
"""

from configs import transfer
from tl_jax.config import override

GENTLE = {"backbone": {"lr_mult": 0.01}}
PARTS = {"backbone": {"lr_mult": 0.3}}  # few numbers of the backbone move: they may move further
FULL = {"method.name": "full", "groups": GENTLE}


def phases(*changes: dict, total: float, unit: str) -> tuple:
    """Phases of equal length, `total` together, each {option: value}."""
    return tuple(tuple({"total": (total / len(changes), unit), **change}.items()) for change in changes)


def regularized(name: str, /, **args) -> dict:
    """Full fine-tuning with one penalty added to the loss."""
    return {**FULL, "terms": {name: {"weight": 1.0, **args}}}


def added(name: str, /, **args) -> dict:
    """A frozen network with added parameters; they and the head are trained."""
    return {"method.add": ((name, args),), "groups": {name: {"lr_mult": 0.3}}}


def methods(total: float, unit: str = "epochs") -> dict[str, dict]:
    """`{method: {dotted option: value}}` for runs of a length."""

    def last(k):
        return {"method.name": "last_k", "method.k": k, "groups": GENTLE}

    length = {"total": total, "unit": unit}
    return {
        "linear_probe": {},
        # which part of the network trains
        "full": FULL,
        "last_k": last(2),
        "first_k": {"method.name": "first_k", "method.k": 1, "groups": GENTLE},
        "bitfit": {"method.name": "bitfit", "groups": PARTS},
        "norm_only": {"method.name": "norm_only", "groups": PARTS},
        "layer_decay": {"method.name": "full", "groups": {"backbone": {"lr_mult": 0.03}}, "layer_decay": 0.75},
        "auto_rgn": {**FULL, "method.auto_rgn": True},
        # phases
        "lp_ft": {"phases": phases({}, FULL, **length)},
        "head_then_last": {"phases": phases({}, last(2), **length)},
        "gradual": {"phases": phases({}, last(1), last(2), FULL, **length)},
        # penalties
        "l2_sp": regularized("l2_sp"),
        "delta": regularized("delta"),
        "bss": regularized("bss"),
        "co_tuning": regularized("co_tuning"),
        "stoch_norm": {**FULL, "method.stoch_norm": 0.5},
        "r_drop": {**regularized("r_drop"), "model.drop_path": 0.1},
        "l1": regularized("l1", paths="head/kernel"),
        # added parameters
        "lora": added("lora"),
        "adapter": added("adapter"),
        "prompt": added("prompt"),
        "prompt_deep": added("prompt", deep=True),
        "ssf": added("ssf"),
        # without gradient
        "knn": {"method.name": "knn"},
        "logistic": {"method.name": "logistic"},
        "ridge": {"method.name": "ridge"},
    }


METHODS = tuple(methods(1.0))


def get_config(arg: str = ""):
    """The argument begins with a method's name; without one it is a linear probe."""
    name, _, rest = arg.partition(",")
    if "=" in name or not name:
        name, rest = "linear_probe", arg
    config = transfer.get_config()
    with config.unlocked():
        config.lr = 3e-3
    config = transfer.parse(config, rest)
    table = methods(*config.total)
    if name not in table:
        raise ValueError(f"there is no method {name!r}; known: {', '.join(table)}")
    return override(config, table[name])
