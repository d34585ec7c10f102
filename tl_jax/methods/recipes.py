"""Ways of adapting a network, each as the options it changes of a linear probe. When to use which: docs/methods.md."""

from typing import Any

Changes = dict[str, Any]  # {dotted option: value}

LR = 3e-3  # of the new head where more trains; of a head alone: config.HEAD_ALONE
GENTLE = {"backbone": {"lr_mult": 0.01}}
PARTS = {"backbone": {"lr_mult": 0.3}}  # few numbers of the backbone are trained: they may change more
FULL = {"method.name": "full", "groups": GENTLE}


def phases(*changes: Changes, total: float, unit: str) -> tuple:
    """Phases of equal length, `total` together, each {option: value}."""
    return tuple(tuple({"total": (total / len(changes), unit), **change}.items()) for change in changes)


def _penalised(name: str, /, **args: Any) -> Changes:
    return {**FULL, "terms": {name: {"weight": 1.0, **args}}}


def _added(name: str, /, **args: Any) -> Changes:
    return {"method.add": ((name, args),), "groups": {name: {"lr_mult": 0.3}}}


def _last(k: int) -> Changes:
    return {"method.name": "last_k", "method.k": k, "groups": GENTLE}


def methods(total: float, unit: str = "epochs") -> dict[str, Changes]:
    """`{method: {dotted option: value}}` for runs of a length."""
    length = {"total": total, "unit": unit}
    return {
        "linear_probe": {},
        # which part of the network trains
        "full": FULL,
        "last_k": _last(2),
        "first_k": {"method.name": "first_k", "method.k": 1, "groups": GENTLE},
        "bitfit": {"method.name": "bitfit", "groups": PARTS},
        "norm_only": {"method.name": "norm_only", "groups": PARTS},
        "layer_decay": {"method.name": "full", "groups": {"backbone": {"lr_mult": 0.03}}, "layer_decay": 0.75},
        "auto_rgn": {**FULL, "method.auto_rgn": True},
        # phases
        "lp_ft": {"phases": phases({}, FULL, **length)},
        "head_then_last": {"phases": phases({}, _last(2), **length)},
        "gradual": {"phases": phases({}, _last(1), _last(2), FULL, **length)},
        # penalties
        **{name: _penalised(name) for name in ("l2_sp", "delta", "bss", "co_tuning")},
        "stoch_norm": {**FULL, "method.stoch_norm": 0.5},
        "r_drop": {**_penalised("r_drop"), "model.drop_path": 0.1},
        "l1": _penalised("l1", paths="head/kernel"),
        # added parameters
        "lora": _added("lora"),
        "adapter": _added("adapter"),
        "prompt": _added("prompt"),
        "prompt_deep": _added("prompt", deep=True),
        "ssf": _added("ssf"),
        # without gradient
        **{name: {"method.name": name} for name in ("knn", "logistic", "ridge")},
    }


METHODS = tuple(methods(1.0))


def list_methods() -> tuple[str, ...]:
    """The names of all ways of adapting a network."""
    return METHODS
