"""The transfer audit: one row per parameter and statistic, written at step 0, proved at the end."""

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tl_jax.core import messages, trees
from tl_jax.core.card import CASE, Card, size_text
from tl_jax.core.console import Table
from tl_jax.core.trees import FROZEN, Match
from tl_jax.methods.rules import places
from tl_jax.training import optim
from tl_jax.weights import load, sanity


def norm_policies(batch_stats: Any, labels: Mapping[str, str], rules: trees.Rules) -> dict[str, str]:
    """The policy, "frozen" or "update", of every layer with running statistics, by its path.

    rules: ordered (path regex, policy). Without rules a layer's statistics are frozen exactly when all parameters of
    its block are: a frozen block computes what it computed when it was loaded.
    """
    paths = trees.flatten(batch_stats)
    layers = sorted({path.rpartition("/")[0] for path in paths if path.endswith(("/mean", "/var"))})
    if not rules:
        inside = {layer: re.match(r"(?:.+/)?backbone/(?:stage\d+/)?[^/]+(?=/|$)", layer) for layer in layers}
        blocks = {layer: own[0] if own else layer.rpartition("/")[0] for layer, own in inside.items()}
        trained = [path for path, label in labels.items() if label != FROZEN]
        updated = {block for block in blocks.values() if any(path.startswith(f"{block}/") for path in trained)}
        return {layer: "update" if block in updated else FROZEN for layer, block in blocks.items()}
    if wrong := sorted({policy for _, policy in rules} - {FROZEN, "update"}):
        raise ValueError(f"unknown norm policies {wrong}; known: frozen, update")
    if not layers:
        raise ValueError(f"norm rules {list(rules)}, but the network has no running statistics; remove the rules")
    return {path: match.value for path, match in trees.match_rules(layers, rules, "norm layer").items()}


def make_audit(
    variables: Mapping[str, Any],
    origins: Mapping[str, str],
    matches: Mapping[str, Match],
    groups: Mapping[str, optim.Group],
    policies: Mapping[str, str],
    opt_state: Any,
    card: Card,
    data: Mapping[str, Any],
    multipliers: Mapping[str, float] | None = None,
    auxiliary: Collection[str] = (),
) -> dict[str, Any]:
    """The whole audit of a phase as plain JSON data.

    origins: `{collection/path: key in the weight file, "new", "missing" there, or "copy" of what was loaded}`.
    matches: the rule of each parameter path. policies: from `norm_policies`. data: facts of the data to show.
    multipliers: of layer-wise decay. auxiliary: the names of further networks, whose frozen parameters do not count in
    the totals.
    """
    moments, parameters, statistics = _moment_counts(opt_state, matches), [], []
    for path, leaf in trees.flatten(variables["params"]).items():
        group = matches[path].value
        settings = groups.get(group)
        parameters.append(
            {
                "path": path,
                "shape": list(np.shape(leaf)),
                "origin": origins[f"params/{path}"],
                "rule": matches[path].pattern,
                "group": group,
                "trainable": group != FROZEN,
                "lr_mult": settings.lr_mult * (multipliers or {}).get(path, 1.0) if settings else 0.0,
                "weight_decay": settings.weight_decay if settings and optim.decays(settings, path) else 0.0,
                "optimizer_values": moments[path],
            }
        )
    for path, leaf in trees.flatten(variables.get("batch_stats", {})).items():
        origin, policy = origins[f"batch_stats/{path}"], policies[path.rpartition("/")[0]]
        statistics.append({"path": path, "shape": list(np.shape(leaf)), "origin": origin, "policy": policy})
    counted = [row for row in parameters if row["trainable"] or row["path"].split("/")[0] not in auxiliary]
    whole, trainable = _size(counted), _size(row for row in counted if row["trainable"])
    return {
        "parameters": parameters,
        "statistics": statistics,
        "groups": {name: group._asdict() for name, group in groups.items()},
        "totals": {
            "parameters": whole,
            "trainable": trainable,
            "frozen": whole - trainable,
            "new": _size(row for row in counted if row["origin"] in load.RANDOM),
            "optimizer_values": sum(moments.values()),
        },
        "card": json.loads(card.to_json()),
        "data": dict(data),
    }


def _size(rows: Iterable[Mapping[str, Any]]) -> int:
    return sum(math.prod(row["shape"]) for row in rows)


def _moment_counts(opt_state: Any, paths: Iterable[str]) -> dict[str, int]:
    """The number of optimizer values (momentum, variance, ...) that each parameter path has."""
    counts = dict.fromkeys(paths, 0)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
        for key in keys:
            if isinstance(key, jax.tree_util.DictKey) and key.key in counts:
                counts[key.key] += math.prod(np.shape(leaf))
    return counts


def without_steps(audit: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The audit of a probe without gradient: it fits a head, or a part of it, or has none, as nearest neighbours."""
    none = {"group": name, "lr_mult": 0.0, "weight_decay": 0.0, "optimizer_values": 0}
    fits = {"knn": r"(?!)", "none": r"(?!)", "tip_adapter": "head/out/.*"}.get(name, ".*")
    head = [row for row in audit["parameters"] if row["trainable"]]
    fitted = [row for row in head if re.fullmatch(fits, row["path"])]
    frozen = [row for row in audit["parameters"] if not row["trainable"]]
    if name != "knn":
        frozen += [{**row, **none, "group": FROZEN, "trainable": False} for row in head if row not in fitted]
    whole, fit = _size(frozen), _size(fitted)
    totals = {"parameters": whole + fit, "trainable": fit, "frozen": whole, "optimizer_values": 0}
    totals["new"] = _size(row for row in (*frozen, *fitted) if row["origin"] in load.RANDOM)
    rows = [*frozen, *({**row, **none} for row in fitted)]
    return {**audit, "parameters": rows, "groups": {}, "totals": totals, "probe": name}


def labels_table(audit: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal for a checkpoint to fit: `{path: shape and group}` and `{path: shape and policy}`."""
    rows = {row["path"]: f"{row['shape']} {row['group']}" for row in audit["parameters"]}
    return rows | {row["path"]: f"{row['shape']} statistics {row['policy']}" for row in audit["statistics"]}


def frozen_hashes(variables: Mapping[str, Any], audits: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """`{collection/path: sha256}` of the parameters and statistics that are frozen in all of the phases."""

    def frozen(audit):
        rows = {f"params/{row['path']}" for row in audit["parameters"] if not row["trainable"]}
        return rows | {f"batch_stats/{row['path']}" for row in audit["statistics"] if row["policy"] == FROZEN}

    flat = trees.flatten(variables)
    return trees.leaf_hashes({path: flat[path] for path in sorted(set.intersection(*map(frozen, audits)))})


def check_frozen(start: Mapping[str, str], end: Mapping[str, str]) -> None:
    """Raises RuntimeError that names the frozen leaves whose sha256 has changed."""
    if changed := messages.difference(start, end):
        what = "frozen leaves changed during training, so this result must not be used:"
        raise RuntimeError("\n".join([what, *changed]))


def totals(audits: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The totals of a run: trainable is what trains in any phase, frozen what trains in none."""
    rows = {row["path"]: row for audit in audits for row in audit["parameters"] if row["trainable"]}
    trainable, whole = _size(rows.values()), audits[0]["totals"]
    return {**whole, "trainable": trainable, "frozen": whole["parameters"] - trainable}


def join(audits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The audit of a run, as in audit.json: its totals, and the audit of each phase."""
    return {"totals": totals(audits), "phases": list(audits)}


def prove(audits: Sequence[Mapping[str, Any]], loaded: Any, variables: Any) -> dict[str, Any]:
    """The audit of a run with its proof: each leaf that no phase trains has the sha256 that it was loaded with.

    Raises RuntimeError otherwise.
    """
    start, end = (frozen_hashes(tree, audits) for tree in (loaded, variables))
    check_frozen(start, end)
    proof = {"frozen_leaves": len(start), "bit_equal": True, "sha256": messages.fingerprint(end), "hashes": dict(end)}
    return {**join(audits), "proof": proof}


def to_table(audit: Mapping[str, Any], cuts: Sequence[str]) -> Table:
    """The audit for the console: parameters folded by block, in the order of the network's cuts."""
    policies, blocks, lines = defaultdict(set), defaultdict(list), []
    for row in audit["statistics"]:
        policies[_block_of(row["path"])].add(row["policy"])
    rows = {row["path"]: row for row in audit["parameters"]}
    order = places([path for path in rows if path.startswith("backbone/")], cuts)
    # The backbone as the data flow through it, then the rest by name.
    for path in sorted(rows, key=lambda path: (path not in order, order.get(path, 0), path)):
        blocks[_block_of(path)].append(rows[path])
    # Neighbours that differ in nothing but their size share a line.
    for cells, run in itertools.groupby(blocks, key=lambda name: _cells(blocks[name], policies.get(name, {"-"}))):
        names = list(run)
        values = _size(row for name in names for row in blocks[name])
        name = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1].removeprefix('backbone/')}"
        lines.append((name, *cells[:3], f"{values:,}", *cells[3:]))
    headers = ("part", "origin", "group", "statistics", "params", "lr x", "decay")
    return Table(f"transfer audit: {audit['card']['model']}", headers, lines, 4)


def total_lines(audit: Mapping[str, Any]) -> list[str]:
    """What the table adds up to, the input and the data, for the console under it."""
    totals, name = audit["totals"], audit.get("probe")
    share = 100 * totals["trainable"] / totals["parameters"]
    line = (
        f"{totals['trainable']:,} of {totals['parameters']:,} parameters train ({share:.2f} %), "
        f"{totals['new']:,} are new, the optimizer holds {totals['optimizer_values']:,} values"
    )
    if name:
        fits = f"fits the {totals['trainable']:,} numbers of a new head to its features, without a gradient step"
        does = {
            "knn": "compares its features with those of the training examples",
            "tip_adapter": "adds the embeddings of the training examples to the head that is there",
            "none": "scores it as it was loaded: nothing is fitted",
        }.get(name, fits)
        line = f"nothing trains: the {totals['frozen']:,} parameters of the network are frozen, and {name} {does}"
    resampled = [f"{row['path']}: {row['origin']}" for row in audit["parameters"] if "(resampled" in row["origin"]]
    data = ", ".join(f"{split} {_count(facts)}" for split, facts in audit["data"].items())
    return [line, _input(audit["card"]), *resampled, data]


def _count(facts: Mapping[str, Any]) -> str:
    grouped = f" in {facts['groups']:,} groups" if "groups" in facts else ""
    return f"{facts['examples']:,} examples{grouped}"


def sanity_lines(audit: Mapping[str, Any]) -> list[str]:
    """What the values of each weight file look like, for the console under the table; of the first phase alone."""
    return [f"weights of {name}: {sanity.line(found)}" for name, found in audit.get("sanity", {}).items()]


def missing_parts(audit: Mapping[str, Any], frozen: bool = False) -> list[str]:
    """What of the backbone the weight file lacks, or what of that is frozen, as regexes of whole paths."""
    rows = [(row, not row["trainable"]) for row in audit["parameters"]]
    rows += [(row, row["policy"] == FROZEN) for row in audit["statistics"]]
    own = {row["path"].removeprefix("backbone/"): row["origin"] == "missing" and fixed >= frozen for row, fixed in rows}
    return trees.cover([path for path, meant in own.items() if meant], [path for path, x in own.items() if not x])


def missing_lines(audit: Mapping[str, Any]) -> list[str]:
    """What of the backbone the weight file lacks, with a warning where that is frozen, for the console."""
    rows = [row for row in (*audit["parameters"], *audit["statistics"]) if row["origin"] == "missing"]
    if not rows:
        return []
    parts, frozen = (", ".join(messages.shorten(missing_parts(audit, frozen), 5)) for frozen in (False, True))
    lines = [f"missing in the weight file, so random: {len(rows)} leaves, {_size(rows):,} numbers [{parts}]"]
    why = "random numbers that never train; let them train, or leave them out of what is read"
    return lines + ([f"WARNING: frozen though missing in the weight file [{frozen}]: {why}"] if frozen else [])


def _input(card: Mapping[str, Any]) -> str:
    if card.get("parts"):
        return "\n".join(map(_input, card["parts"]))
    if card.get("input") == "text":
        known = f"tokenizer {card['tokenizer'][:12]}, {card['vocab']:,} tokens, {CASE[card.get('lowercase')]}"
        return f"input texts of at most {card['max_length']} tokens ({known}), pooling {card['pooling']}"
    if columns := card.get("columns"):
        return f"input {len(columns)} columns, standardised: {', '.join(columns[:10])}{', ...' * (len(columns) > 10)}"
    mode = f" ({card['crop_mode']})" if "crop_mode" in card else ""
    size = f"input {size_text(card['input_size'])} px, {card['interpolation']}, crop {card['crop']:g}{mode}"
    values = f", {card.get('pixels', 'uint8')} / {card['scale']:g}" if "scale" in card else ""
    return f"{size}{values}, mean {card['mean']}, std {card['std']}"


def _cells(rows: list[dict], policies: set[str]) -> tuple[str, ...]:
    origins = {row["origin"] if row["origin"] in (*load.RANDOM, "copy") else "file" for row in rows}
    rates, decays = ([f"{x:g}" for x in sorted({row[name] for row in rows})] for name in ("lr_mult", "weight_decay"))
    named = (origins, {row["group"] for row in rows}, policies)
    origin, group, policy = ("+".join(sorted(values)) for values in named)
    return origin, group, policy, "/".join(rates), "/".join(decays)


def _block_of(path: str) -> str:
    folders = path.split("/")[:-1]
    return "/".join(folders[: 3 if len(folders) > 2 and folders[1].startswith("stage") else 2])
