"""Parameter trees as flat dictionaries `{path: leaf}`: match rules, split, merge, count, fingerprint.

A path reads `backbone/stage1/block0/conv1/kernel`. Freezing, optimizer groups, norm policy, audit and checkpoints
decide by these paths.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from tl_jax.core import messages

Rules = Sequence[tuple[str, str]]
FROZEN = "frozen"


class Match(NamedTuple):
    """The rule that a path fell under: its regex and the value it gives (a group, a norm policy)."""

    pattern: str
    value: str


def flatten(tree: Any) -> dict[str, Any]:
    """Nested dictionaries to `{path: leaf}`, in sorted path order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: leaf}` back to nested dictionaries; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def merge(tree: Any, flat: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the leaves named in `flat` replaced."""
    return unflatten({**flatten(tree), **flat})


def match_rules(paths: Iterable[str], rules: Rules, what: str = "parameter") -> dict[str, Match]:
    """Gives each path the first rule whose regex matches all of it; ValueError lists those without a match."""
    paths, problems, compiled = list(paths), [], {}
    for pattern, value in rules:
        try:
            compiled[Match(pattern, value)] = re.compile(pattern)
        except re.error as error:
            problems.append(f"{pattern!r} is not a regular expression: {error}")
    found = {path: next((m for m, regex in compiled.items() if regex.fullmatch(path)), None) for path in paths}
    matches = {path: match for path, match in found.items() if match}
    if not problems:
        problems = messages.shorten([f"no rule matches {what} {path!r}" for path in paths if path not in matches], 10)
        dead = [match for match in compiled if match not in matches.values()]
        problems += [f"rule {tuple(match)} decides no {what}{why_dead(match.pattern, paths)}" for match in dead]
    if problems:
        first = f"the rules do not fit the {what}s (a rule must match a whole path; the first match wins):"
        last = f"rules, in order: {[tuple(rule) for rule in rules]}"
        raise ValueError("\n".join([first, *(f"  {problem}" for problem in problems), last]))
    return matches


def why_dead(pattern: str, paths: Sequence[str]) -> str:
    """A hint on a regex that decides none of the paths."""
    if any(re.fullmatch(pattern, path) for path in paths):
        return ": an earlier rule takes every path that it matches"
    if prefixes := [path for path in paths if re.match(pattern, path)]:
        return f": it matches only the beginning of {prefixes[0]!r}; end it with '.*'"
    return messages.nearest(pattern, paths)


def cover(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """Regexes that match the paths and none of the others: a folder where all in it is meant, or one path."""

    def folders(path):
        return [path[:i] for i, letter in enumerate(path) if letter == "/"]

    needed = {folder for path in others for folder in folders(path)}
    return sorted({next((f"{x}/.*" for x in folders(path) if x not in needed), path) for path in paths})


def split(tree: Any, labels: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat `(trainable, frozen)` halves of a parameter tree, by the group of each path."""
    flat = flatten(tree)
    trainable = {path: leaf for path, leaf in flat.items() if labels[path] != FROZEN}
    return trainable, {path: leaf for path, leaf in flat.items() if path not in trainable}


def to_host(tree: Any) -> Any:
    """The leaves as numpy arrays; one that is divided between processes is collected, so all of them must call this."""

    def fetch(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def leaf_hashes(tree: Any) -> dict[str, str]:
    """`{path: sha256}` over dtype, shape and bytes of each leaf: equal exactly when the leaf is bit-equal."""
    flat = {path: to_host(leaf) for path, leaf in flatten(tree).items()}  # in order: processes may have to agree
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter's lock
        return dict(zip(flat, pool.map(leaf_hash, flat.values()), strict=True))


def leaf_hash(leaf: Any) -> str:
    """The sha256 of one leaf, see `leaf_hashes`."""
    array = np.asarray(leaf)
    digest = hashlib.sha256(f"{array.dtype.name}{array.shape}|".encode())
    digest.update(as_bytes(array))
    return digest.hexdigest()


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in C order, uint8 [n]; a view where it lies in that order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
