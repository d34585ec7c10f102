"""A config as a flat table of options, and the check of every value by itself, before anything is loaded."""

import json
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from ml_collections import ConfigDict

SPEED_ONLY = ("data.workers",)  # options that change no number, and so may differ when a run is resumed
OWN_FIELDS = ("input_size", "mean", "std", "interpolation", "crop", "licence")  # of the card, for data.card


def flatten(config: ConfigDict) -> dict[str, Any]:
    """`{dotted option: plain JSON value}` of a config; sections that start empty are values."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict) and key not in ("card", "groups", "args", "optimizer_args"):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            plain = value.to_dict() if isinstance(value, ConfigDict) else value
            flat[key] = json.loads(json.dumps(plain, default=str))
    return flat


def identity(config: ConfigDict) -> dict[str, Any]:
    """The options that decide a run's numbers."""
    return {key: value for key, value in flatten(config).items() if key not in SPEED_ONLY}


def check(config: ConfigDict) -> None:
    """Raises one ValueError that lists every option whose value cannot be meant."""
    flat = flatten(config)
    problems = [
        f"  {key} = {flat[key]!r}: expected {expected}"
        for key, (good, expected) in RULES.items()
        if not good(flat[key])
    ]
    if unknown := sorted(set(flat["data.card"]) - set(OWN_FIELDS)):
        problems.append(f"  data.card sets {unknown}: of the card, only {', '.join(OWN_FIELDS)} can be set")
    if flat["data.data_dir"] and not flat["data.source"].startswith("tfds:"):
        problems.append(
            f"  data.data_dir = {flat['data.data_dir']!r} belongs to tfds sources; this is {flat['data.source']!r}"
        )
    if problems:
        raise ValueError("the config has options that cannot be meant:\n" + "\n".join(problems))


def _number(low: float, below: float = math.inf, *, above: bool = False) -> tuple[Callable, str]:
    def good(value):
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and (low < value if above else low <= value) and value < below

    bound = "" if below == math.inf else f" and below {below:g}"
    return good, f"a number {'above' if above else 'of at least'} {low:g}{bound}"


def _integer(low: int, below: float = math.inf) -> tuple[Callable, str]:
    number, expected = _number(low, below)
    return lambda value: isinstance(value, int) and number(value), expected.replace("a number", "an integer")


def _one_of(*names: str) -> tuple[Callable, str]:
    return lambda value: value in names, f"one of {', '.join(names)}"


def _duration(*, zero: bool = False) -> tuple[Callable, str]:
    amount = _number(0, above=not zero)[0]

    def good(value):
        return isinstance(value, list) and len(value) == 2 and amount(value[0]) and value[1] in UNITS

    return good, f"(amount {'>= 0' if zero else '> 0'}, one of {', '.join(UNITS)})"


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)


UNITS = ("epochs", "steps", "examples")
PAIRS = (lambda value: isinstance(value, list) and all(map(_is_pair, value)), "pairs of strings, ((regex, name), ...)")
RULES = {
    "seed": _integer(0, 2**32),
    "model.image_size": _integer(0),
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.dropout": _number(0, 1),
    "model.drop_path": _number(0, 1),
    "data.shots": _integer(0),
    "data.split_seed": _integer(0),
    "data.workers": _integer(0),
    "method.last_k": _integer(0),
    "method.rules": PAIRS,
    "method.norm": PAIRS,
    "method.label_smoothing": _number(0, 1),
    "method.mixup": _number(0),
    "method.cutmix": _number(0),
    "batch_size": _integer(1),
    "eval_batch_size": _integer(1),
    "accumulate": _integer(1),
    "total": _duration(),
    "log_every": _duration(),
    "eval_every": _duration(),
    "schedule.warmup": _duration(zero=True),
    "ema": _number(0, 1),
    "lr": _number(0, above=True),
    "weight_decay": _number(0),
    "clip": _number(0),
    "resamples": _integer(1),
    "select": _one_of("last", "best_val"),
    "parallel": _one_of("jit", "pmap"),
}
