"""A config as a flat table of options, and the check of every value by itself, before anything is loaded."""

import json
import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from ml_collections import ConfigDict

from tl_jax.core import messages

SPEED_ONLY = {"data.workers": 0, "cache_dir": "", "fsdp": 0}  # they change no number: a resumed run may have others
PHASED = ("total", "lr", "optimizer", "optimizer_args", "weight_decay", "decay", "clip", "groups", "layer_decay",
          "schedule.", "method.")  # options that a phase may change; a dot: all of the section  # fmt: skip
WHOLE = ("card", "groups", "args", "optimizer_args")  # sections that start empty: each is one value
CLOSED_FORMS = ("knn", "logistic", "ridge")  # methods without steps, fitted on features at once
REPLICABLE = ("lr", "weight_decay", "groups", "seed", "data.shots")  # options in which replicas may differ
OWN_FIELDS = ("input_size", "mean", "std", "interpolation", "crop", "licence")  # of the card, for data.card


def flatten(config: ConfigDict) -> dict[str, Any]:
    """`{dotted option: plain JSON value}` of a config; sections that start empty are values."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict) and key not in WHOLE:
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            plain = value.to_dict() if isinstance(value, ConfigDict) else value
            flat[key] = json.loads(json.dumps(plain, default=str))
    return flat


def identity(config: ConfigDict) -> dict[str, Any]:
    """The options that decide a run's numbers."""
    return {key: value for key, value in flatten(config).items() if key not in SPEED_ONLY}


def from_flat(flat: Mapping[str, Any]) -> ConfigDict:
    """The config of a flat table, such as a run's config.json: the inverse of `flatten`; speed aside, of `identity`."""
    config = ConfigDict()
    for key, value in {**SPEED_ONLY, **flat}.items():
        *sections, name = key.split(".")
        node = config
        for section in sections:
            if section not in node:
                node[section] = ConfigDict()
            node = node[section]
        node[name] = ConfigDict(value) if isinstance(value, dict) else _as_tuples(value)
    return config.lock()


def _as_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_tuples(inner) for key, inner in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def fingerprint(config: ConfigDict) -> str:
    """sha256 of the options that decide a run's numbers: the name of the run in a study."""
    return messages.fingerprint({key: json.dumps(value, sort_keys=True) for key, value in identity(config).items()})


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with options set, `{dotted option: value}`; a value replaces the old one whole.

    Raises one ValueError that lists every option that does not exist and every value of another type.
    """
    config, problems = config.copy_and_resolve_references(), []
    for key, value in changes.items():
        *sections, name = key.split(".")
        node: Any = config
        for section in sections:
            node = node[section] if isinstance(node, ConfigDict) and section in node else None
        if not isinstance(node, ConfigDict) or name not in node:
            problems.append(f"{key!r} does not exist{messages.nearest(key, flatten(config))}")
            continue
        try:
            if isinstance(node[name], ConfigDict):
                if name not in WHOLE:
                    raise TypeError("a section, set its options one by one")
                with node.unlocked():
                    del node[name]
                    node[name] = ConfigDict(dict(value))
            else:
                node[name] = value
        except (TypeError, ValueError) as error:
            problems.append(f"{key!r} = {value!r}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return config


def replicas(config: ConfigDict) -> list[ConfigDict]:
    """The config of every replica, which is that of the same run by itself."""
    return [override(config, {**dict(changes), "replicas": ()}) for changes in config.replicas]


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
    if not flat["cache"] and (flat["views"] > 1 or flat["cache_dir"]):
        problems.append(
            f"  views = {flat['views']!r}, cache_dir = {flat['cache_dir']!r}: they belong to cache = 'features'"
        )
    problems += _phase_problems(flat["phases"]) + _replica_problems(flat)
    if not problems:
        problems = _method_problems(flat)
    if problems:
        raise ValueError("the config has options that cannot be meant:\n" + "\n".join(problems))


def _phase_problems(phases: Any) -> list[str]:
    if not isinstance(phases, list) or not all(map(_are_named, phases)):
        return [f"  phases = {phases!r}: expected phases, each pairs (dotted option, value)"]
    return [
        f"  phases[{i}] sets {key}, which cannot change during a run; what can: {', '.join(PHASED)}; not "
        "method.add and method.grid"
        for i, phase in enumerate(phases)
        for key, _ in phase
        if not any(key == option or (option.endswith(".") and key.startswith(option)) for option in PHASED)
        or key in ("method.add", "method.grid")
    ]


def _replica_problems(flat: Mapping[str, Any]) -> list[str]:
    replicas = flat["replicas"]
    if not isinstance(replicas, list) or not all(map(_are_named, replicas)):
        return [f"  replicas = {replicas!r}: expected replicas, each pairs (dotted option, value)"]
    alone = {"method.name": CLOSED_FORMS, "parallel": ("pmap",)}
    problems = [
        f"  {key} = {flat.get(key)!r} does not go with replicas"
        for key in ("seeds", "baseline", "fsdp", *alone)
        if replicas and (flat[key] in alone[key] if key in alone else flat.get(key))
    ]
    for i, replica in enumerate(replicas):
        if wrong := [key for key, _ in replica if key not in REPLICABLE and not key.startswith("groups.")]:
            problems.append(
                f"  replicas[{i}] sets {', '.join(wrong)}; replicas may differ in {', '.join(REPLICABLE)} alone"
            )
        if (first := replicas.index(replica)) < i:
            problems.append(f"  replicas[{i}] is replicas[{first}] again")
    return problems


def _method_problems(flat: Mapping[str, Any]) -> list[str]:
    """Options that the method cannot take, in a table whose values are each sound by themselves."""
    name, problems = flat["method.name"], []
    if name in CLOSED_FORMS:
        takes = {"phases": [], "method.add": [], "method.regularize": [], "method.auto_rgn": False, "select": "last"}
        takes |= {"views": 1}
        problems += [
            f"  {key} = {flat[key]!r}: method.name = {name!r} takes no steps, expected {value!r}"
            for key, value in takes.items()
            if flat[key] != value
        ]
        if any(policy == "update" for _, policy in flat["method.norm"]):
            problems.append(
                f"  method.norm = {flat['method.norm']!r}: method.name = {name!r} takes no steps and updates no "
                "statistics; expected the policy 'frozen' alone, or []"
            )
    else:
        only = f"belongs to {', '.join(CLOSED_FORMS)}; method.name = {name!r}"
        if flat["data.resample"] == "loo":
            problems.append(f"  data.resample = 'loo' {only} takes a fold, such as kfold:5:0")
        if flat["method.grid"]:
            problems.append(f"  method.grid = {flat['method.grid']!r} {only} has no grid, expected []")
    penalties = {penalty for penalty, _ in flat["method.regularize"]}
    if "r_drop" in penalties and not (flat["model.dropout"] or flat["model.drop_path"] or "stoch_norm" in penalties):
        problems.append("  method.regularize has r_drop, but its two passes are equal: set model.dropout or drop_path")
    return problems


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
    return lambda value: value in names, f"one of {', '.join(name or repr(name) for name in names)}"


def _duration(*, zero: bool = False) -> tuple[Callable, str]:
    amount = _number(0, above=not zero)[0]

    def good(value):
        return isinstance(value, list) and len(value) == 2 and amount(value[0]) and value[1] in UNITS

    return good, f"(amount {'>= 0' if zero else '> 0'}, one of {', '.join(UNITS)})"


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _are_texts(value: Any, size: int) -> bool:
    return isinstance(value, list) and all(_are_strings(entry) and len(entry) == size for entry in value)


def _are_named(value: Any, kind: type | tuple = object) -> bool:
    """Pairs (string, value of a kind), as JSON has them."""
    pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return pairs and all(isinstance(name, str) and isinstance(inner, kind) for name, inner in value)


UNITS = ("epochs", "steps", "examples")
PAIRS = (lambda value: _are_texts(value, 2), "pairs of strings, ((regex, name), ...)")
FLAG = (lambda value: isinstance(value, bool), "True or False")
NAMED = (lambda value: _are_named(value, dict), "pairs (name, {parameter: value})")
ALSO = "triples of strings (name, source, split), each name once"
RULES = {
    "seed": _integer(0, 2**32),
    "model.image_size": _integer(0),
    "model.keep_head": FLAG,
    "model.reinit": (_are_strings, "strings, (part, ...)"),
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.prefix_dtype": _one_of("", "float32", "bfloat16"),
    "model.remat": _one_of("", "block", "dots"),
    "model.attention": _one_of("xla", "cudnn"),
    "model.dropout": _number(0, 1),
    "model.drop_path": _number(0, 1),
    "data.shots": _integer(0),
    "data.split_seed": _integer(0),
    "data.workers": _integer(0),
    "data.also": (lambda value: _are_texts(value, 3) and len({name for name, *_ in value}) == len(value), ALSO),
    "method.k": _integer(0),
    "method.blocks": (_are_strings, "strings, (block, ...)"),
    "method.rules": PAIRS,
    "method.norm": PAIRS,
    "method.add": NAMED,
    "method.regularize": NAMED,
    "method.auto_rgn": FLAG,
    "method.grid": (lambda value: isinstance(value, list) and all(map(_number(0)[0], value)), "numbers, (value, ...)"),
    "layer_decay": _number(0, 1.0001, above=True),
    "method.label_smoothing": _number(0, 1),
    "method.mixup": _number(0),
    "method.cutmix": _number(0),
    "batch_size": _integer(1),
    "eval_batch_size": _integer(1),
    "accumulate": _integer(1),
    "cache": _one_of("", "features"),
    "views": _integer(1),
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
    "fsdp": _integer(0),
}
