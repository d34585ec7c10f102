"""The config of a run: made of the table of options, changed, checked, written to config.json and read again."""

import ast
import copy
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference

from tl_jax.core import checks, files, messages, synonyms
from tl_jax.core.options import (
    CARD,
    FUSION,
    LANGUAGE,
    NETWORK,
    OPTIONS,
    PART,
    SELECTORS,
    STREAM,
    TASK_ARGS,
    TASKS,
    WEIGHT,
)

WHOLE = tuple(name for name, option in OPTIONS.items() if isinstance(option.initial, dict))  # each is one value
REPLICABLE = tuple(name for name, option in OPTIONS.items() if option.replica)
DIFFERING = ", ".join("weights of terms" if name == "terms" else name for name in REPLICABLE)
PHASED = tuple(name for name, option in OPTIONS.items() if option.phase)
SEVERAL_TYPES = ("data.source", "model.image_size")  # a string or a number, or a tuple of them
ENTRIES = {  # options that hold tables by name: their fields, those that must be given, and names that are taken
    "streams": (STREAM, ("source", "split"), ("train", "val", "test")),
    "networks": (NETWORK, ("name", "weights"), ("backbone", "head")),
    "model.parts": (PART, ("name",), ()),
    "terms": (None, (), ()),  # other fields than "weight" are checked by who reads them
}
PROBES = ("knn", "logistic", "ridge")  # methods without gradient, fitted on features
WITHOUT_STEPS = (*PROBES, "tip_adapter", "none")
HEAD_ALONE = {"lr": 1e-2, "total": (20.0, "epochs")}  # of a linear probe, see experiments/probe_defaults
# What makes two passes differ.
RANDOM = ("model.dropout", "model.hidden_dropout", "model.drop_path", "method.stoch_norm")
SHORT = {"model": "model.name", "weights": "model.weights", "data": "data.source", "method": "method.name"}


def make() -> ConfigDict:
    """A config with the default of every option, not locked."""
    return _config({name: option.default for name, option in OPTIONS.items()})


def trains_head_alone(config: ConfigDict) -> bool:
    """Whether it is a linear probe, whose rate and length HEAD_ALONE says unless others are given."""
    return config.method.name == "linear_probe" and not config.method.add and not config.phases


def from_flat(flat: Mapping[str, Any]) -> ConfigDict:
    """The config of a flat table such as a config.json or an `identity`; an absent option has its initial value.

    Raises ValueError where an option stands in the place of a section, or inside of another.
    """
    wrong, above = [], None
    for key in sorted({*INITIAL, *flat}, key="{}.".format):  # so that a section stands before all that is inside of it
        if above is not None and f"{key}.".startswith(f"{above}."):
            wrong += [name for name in (above, key) if name not in INITIAL and name not in wrong]
        else:
            above = key
    if wrong or "" in flat:
        raise ValueError(f"{', '.join(map(repr, wrong or ['']))} cannot be an option; expected those of {len(INITIAL)}")
    return _config({**INITIAL, **flat}).lock()


def read(path: pathlib.Path) -> ConfigDict:
    """The config of a config.json; ValueError that names the file where it is none."""
    try:
        return from_flat(files.read_json(path))
    except (ValueError, RecursionError) as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from None


def _config(flat: Mapping[str, Any]) -> ConfigDict:
    config: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = functools.reduce(lambda node, section: node.setdefault(section, {}), sections, config)
        value = files.as_tuples(value)
        node[name] = FieldReference(value, field_type=object) if key in SEVERAL_TYPES else value
    return ConfigDict(config)


def flatten(config: ConfigDict, section: str = "") -> dict[str, Any]:
    """`{dotted option: plain JSON value}` of a config; an option that is a table is one value."""
    flat = {}
    for key, value in config.items():
        name = f"{section}{key}"
        if isinstance(value, ConfigDict) and name not in WHOLE:
            flat |= flatten(value, f"{name}.")
        else:
            try:
                flat[name] = _plain(value.to_dict() if isinstance(value, ConfigDict) else value)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"{name} = {messages.brief(value)}: expected what JSON can hold ({error})") from None
    return flat


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


INITIAL = {name: _plain(option.initial) for name, option in OPTIONS.items()}


def identity(config: ConfigDict) -> dict[str, Any]:
    """The options that decide a run's numbers, without those that have their initial value."""
    return {key: value for key, value in _deciding(flatten(config)).items() if value != INITIAL.get(key, ...)}


def fingerprint(config: ConfigDict) -> str:
    """sha256 of the identity: the name of the run in a study."""
    return messages.fingerprint({key: json.dumps(value, sort_keys=True) for key, value in identity(config).items()})


def forms_of(terms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The option `terms` with its weights as kinds of schedules: replicas may differ in their numbers alone."""
    weights = {name: table.get("weight", 1.0) for name, table in terms.items()}
    kinds = {name: [x[0], sorted(x[1])] if isinstance(x, list | tuple) else ["constant"] for name, x in weights.items()}
    return {name: {**table, "weight": kinds[name]} for name, table in terms.items()}


def difference(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The options in which two flat tables mean different numbers, one line each; absent: the initial value."""
    return messages.difference(_deciding(there), _deciding(now))


def _deciding(flat: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**INITIAL, **flat}.items() if key not in OPTIONS or OPTIONS[key].numbers}


def _owner(config: ConfigDict, key: str) -> ConfigDict | None:
    """The section that holds a dotted option; None where there is no such option."""
    *sections, name = key.split(".")
    node: Any = config
    for section in sections:
        node = node[section] if isinstance(node, ConfigDict) and section in node else None
    return node if isinstance(node, ConfigDict) and name in node else None


def override(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A copy with `{dotted option: value}` set, each whole; ValueError lists unknown options and misfitting values."""
    config, problems = copy.deepcopy(config), []
    for key, value in changes.items():
        node, name = _owner(config, key), key.rpartition(".")[2]
        if node is None:
            problems.append(f"{key!r} does not exist{synonyms.hint(key, flatten(config))}")
            continue
        try:
            if not isinstance(node[name], ConfigDict):
                node[name] = value
                continue
            if not _option_of(key):
                raise TypeError("a section, set its options one by one")
            table = ConfigDict(files.as_tuples(dict(value)))
            with node.unlocked():
                del node[name]
                node[name] = table
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            reason = _expected(key) if key in OPTIONS else str(error)[: 2 * messages.SHOWN]
            problems.append(f"{key!r} = {messages.brief(value)}: {reason}")
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _expected(key: str) -> str:
    """What a value of an option, or of an entry of a table, must be."""
    option = OPTIONS.get(key)
    return f"expected {option.check.expected}{synonyms.example(key)}" if option else "expected the type of the default"


def _option_of(key: str) -> str:
    """The option that a dotted key sets, itself or a value inside of it; "" where there is none."""
    return next((name for name in OPTIONS if key == name or (name in WHOLE and key.startswith(f"{name}."))), "")


def parse(config: ConfigDict, arg: str | Sequence[str]) -> ConfigDict:
    """A locked copy of the config with "key=value,key=value", or a sequence of such items, set.

    A key is one of SHORT or a dotted option. Raises ValueError that lists every unknown key and misfitting value.
    """
    changes, problems = {}, []
    for item in _items(arg) if isinstance(arg, str) else arg:
        key, equals, text = item.partition("=")
        name = SHORT.get(key, key)
        node = _owner(config, name)
        if not equals or node is None:
            hint = "" if node else synonyms.hint(key, [*SHORT, *flatten(config)])
            problems.append(f"{messages.brief(item)} is not key=value with a known key{hint}")
            continue
        value = node[name.rpartition(".")[2]]
        try:
            plain = isinstance(value, str) and not (name in SEVERAL_TYPES and text.startswith("("))
            text = text.capitalize() if isinstance(value, bool) else text
            changes[name] = text if plain else ast.literal_eval(text)
            override(config, {name: changes[name]})
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            problems.append(f"{messages.brief(item)} cannot be the value of {name}: {_expected(name)}")
    if problems:
        raise ValueError(f"options of the config: {'; '.join(problems)}; short keys: {', '.join(SHORT)}")
    return override(config, changes).lock()


def _items(arg: str) -> list[str]:
    """Cuts at the commas that stand outside brackets and quotes."""
    pieces, depth, quote = [""], 0, ""
    for character in arg:
        quote = "" if character == quote else quote or (character if character in "'\"" else "")
        depth += 0 if quote else (character in "([{") - (character in ")]}")
        if character == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece for piece in pieces if piece]


def check(config: ConfigDict) -> None:
    """Raises one ValueError that lists every invalid option."""
    flat = flatten(config)
    problems = [f"{key} does not exist{synonyms.hint(key, OPTIONS)}" for key in flat if key not in OPTIONS]
    problems += [f"{name} is missing" for name in OPTIONS if name not in flat]
    expected = {key: OPTIONS[key].check for key, x in flat.items() if key in OPTIONS and not OPTIONS[key].check.fits(x)}
    problems += [
        f"{name} = {messages.brief(flat[name])}: expected {check.expected}" for name, check in expected.items()
    ]
    # What follows looks into values and compares them, so that each must be valid by itself first.
    finders = _table_problems, _phase_problems, _replica_problems, _data_problems, _fusion_problems
    problems = problems or [problem for find in finders for problem in find(flat)]
    checks.refuse("invalid options", problems or _method_problems(flat))


def _table_problems(flat: Mapping[str, Any]) -> list[str]:
    """Options that are tables, field by field."""
    problems = checks.table_problems("data.card", flat["data.card"], CARD)
    task_args = {name: TASK_ARGS[name] for name in TASKS[flat["task"]]}
    problems += checks.table_problems(f"task_args of {flat['task']}", flat["task_args"], task_args)
    problems += checks.table_problems("model.fusion", flat["model.fusion"], FUSION)
    entries = [(section, name, entry) for section in ENTRIES for name, entry in flat[section].items()]
    for section, name, entry in entries:
        what, (fields, required, reserved) = f"{section}.{name}", ENTRIES[section]
        if name in reserved or not re.fullmatch(r"\w+", name):
            taken = f", not {', '.join(reserved)}" if reserved else ""
            problems.append(f"{what}: expected a name of letters, digits and _{taken}")
        problems += checks.table_problems(what, entry, fields or dict.fromkeys(entry, checks.ANY) | {"weight": WEIGHT})
        problems += [f"{what}: {field} is missing" for field in required if field not in entry]
    return problems


def _where(*rows: tuple[Any, str]) -> list[str]:
    """The texts of the rows (condition, text) whose condition is met."""
    return [text for condition, text in rows if condition]


def _phase_problems(flat: Mapping[str, Any]) -> list[str]:
    problems = []
    for i, key in ((i, key) for i, phase in enumerate(flat["phases"]) for key, _ in phase):
        if not _option_of(key):
            problems.append(f"phases[{i}]: {key!r} does not exist{synonyms.hint(key, PHASED)}")
        elif _option_of(key) not in PHASED:
            problems.append(f"phases[{i}] sets {key}, which cannot change during a run; what can: {', '.join(PHASED)}")
    if flat["patience"] and (count := len(flat["phases"])) > 1:
        problems.append(f"patience = {flat['patience']!r} would leave out some of the {count} phases; expected 0")
    return problems


def _replica_problems(flat: Mapping[str, Any]) -> list[str]:
    replicas = flat["replicas"]
    alone = {key: flat[key] for key in ("seeds", "baseline", "fsdp")}
    alone |= {"method.name": flat["method.name"] in WITHOUT_STEPS, "parallel": flat["parallel"] == "pmap"}
    alone["task"] = flat["task"] in LANGUAGE
    rows = ((given and replicas, f"{key} = {flat[key]!r} does not go with replicas") for key, given in alone.items())
    problems = _where(*rows)
    for i, replica in enumerate(replicas):
        if wrong := ", ".join(key for key, _ in replica if _option_of(key) not in REPLICABLE):
            problems.append(f"replicas[{i}] sets {wrong}; replicas may differ in {DIFFERING} alone")
        if (first := replicas.index(replica)) < i:
            problems.append(f"replicas[{i}] is replicas[{first}] again")
    return problems


def _data_problems(flat: Mapping[str, Any]) -> list[str]:
    source, data_dir, patience, min_delta = map(flat.get, ("data.source", "data.data_dir", "patience", "min_delta"))
    views, cache_dir = flat["views"], flat["cache_dir"]
    tfds = any("tfds:" in name for name in (source if isinstance(source, list) else [source]))
    cached = flat["cache"] or any(network.get("cache") for network in flat["networks"].values())
    unread, unscored = not cached and (views > 1 or cache_dir), patience and not flat["data.val"]
    candidates, select, val, task = map(flat.get, ("data.candidates", "select", "data.val", "task"))
    bare, judged = not flat["data.labelled"], f"data.candidates = {candidates!r}"
    balanced = flat["task_args"].get("class_weight") == "balanced"
    return _where(
        (bare and balanced, "task_args.class_weight = 'balanced' counts labels, and data.labelled = False leaves none"),
        (data_dir and not tfds, f"data.data_dir = {data_dir!r} belongs to tfds sources; this is {source!r}"),
        (unread, f"views = {views!r}, cache_dir = {cache_dir!r}: they belong to cache = 'features'"),
        (unscored, f"patience = {patience!r}: the score is that of val, and data.val is ''; name a split"),
        (bare and select == "best_val", "select = 'best_val': data.labelled = False leaves val without labels too"),
        (bare and patience, f"patience = {patience!r}: data.labelled = False leaves val without labels too"),
        (candidates and not val, f"{judged}: every evaluation on val writes one, and data.val is ''; name a split"),
        (
            candidates and task != "classification",
            f"{judged}: selectors read class probabilities, task = 'classification'; found {task!r}, leave it out",
        ),
        (select in SELECTORS and not candidates, f"select = {select!r} judges data.candidates, which is (); name it"),
        (select == "mixval" and flat["cache"], "select = 'mixval' mixes inputs, of which cache = 'features' has none"),
        (min_delta and not patience, f"min_delta = {min_delta!r} belongs to patience, which is 0"),
    )


def _fusion_problems(flat: Mapping[str, Any]) -> list[str]:
    """What a fusion of networks does not go with, and options of one where there is none."""
    name, parts, fusion = flat["model.name"], flat["model.parts"], flat["model.fusion"]
    if name != "fusion":
        text = f"model.parts and model.fusion belong to model.name = 'fusion'; found {name!r}"
        return _where((parts or fusion, text))
    kinds = ("image", "text", "table")
    expected = "expected at least two of image, text and table, or model.weights of a fusion"
    both = parts and flat["model.weights"]
    without = {"model.image_size": 0, "model.reinit": [], "model.partial": [], "model.drop_path": 0.0}
    without |= {"model.hidden_dropout": 0.0}
    without |= {"parallel": "jit", "method.auto_rgn": False, "model.vectors": "", "data.card": {}}
    without |= {"data.candidates": [], "streams": {}, "replicas": []}
    without |= {} if parts else {"model.fusion": {}, "model.tokenizer": "", "model.max_length": 0, "model.pooling": ""}
    found = [(flat[key] != value, f"{key} = {flat[key]!r}: a fusion does without") for key, value in without.items()]
    return _where(
        (not (parts or flat["model.weights"]), f"model.parts is empty: {expected}"),
        (parts and (len(parts) < 2 or set(parts) - set(kinds)), f"model.parts has {', '.join(parts)}: {expected}"),
        (both, "model.parts have weights of their own: leave out model.weights, or model.parts"),
        (parts and flat["model.keep_head"], "model.keep_head = True: the parts have no head; it is new"),
        (flat["method.name"] in PROBES, f"method.name = {flat['method.name']!r}: a fusion begins with random layers"),
        *found,
    )


def _method_problems(flat: Mapping[str, Any]) -> list[str]:
    """Options that the method cannot take, in a table whose values are each valid by themselves."""
    name, task, norm = flat["method.name"], flat["task"], flat["method.norm"]
    if name not in WITHOUT_STEPS:
        only, grid = f"belongs to {', '.join(PROBES)}; method.name = {name!r}", flat["method.grid"]
        equal = "r_drop" in flat["terms"] and not any(map(flat.get, RANDOM))
        return _where(
            (flat["data.resample"] == "loo", f"data.resample = 'loo' {only} takes a fold, such as kfold:5:0"),
            (grid, f"method.grid = {grid!r} {only} has no grid, expected []"),
            (equal, "terms has r_drop, but its two passes are equal: set model.dropout, hidden_dropout or drop_path"),
        )
    takes = {"phases": [], "method.add": [], "method.auto_rgn": False, "method.stoch_norm": 0.0, "terms": {}}
    takes |= {
        "data.labelled": True,
        "data.candidates": [],
        "streams": {},
        "networks": {},
        "select": "last",
        "patience": 0,
        "views": 1,
        "model.head": [],
        "data.weights": "",
    }
    steps = f"method.name = {name!r} takes no steps"
    updates = f"method.norm = {norm!r}: {steps} and updates no statistics; expected the policy 'frozen' alone, or []"
    return _where(
        *((flat[key] != value, f"{key} = {flat[key]!r}: {steps}, expected {value!r}") for key, value in takes.items()),
        (name == "none" and flat["method.grid"], "method.grid: method.name = 'none' fits nothing, expected []"),
        (
            name not in PROBES and flat["data.resample"] == "loo",
            f"data.resample = 'loo': method.name = {name!r} is not fitted anew for each example; take a fold",
        ),
        (task != "classification", f"task = {task!r}: method.name = {name!r} tells classes apart, as classification"),
        (any(policy == "update" for _, policy in norm), updates),
    )
