"""Which networks a file's keys and shapes fit, the nearest of them where none fits, and what differs. Numpy only."""

import functools
import json
import lzma
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tl_jax import models
from tl_jax.core import messages, trees
from tl_jax.core.card import size_text
from tl_jax.models import conversion as tables

TABLE = pathlib.Path(__file__).parents[1] / "assets" / "shapes.xz"
LEAST = 0.1  # of all keys, those of the file and those of the network, that must agree in a match
SHOWN = 3  # matches that are equally near, and parts that may be missing on purpose
Tensors = Mapping[str, np.ndarray]


class Match(NamedTuple):
    """How a file fits a network: `fits` of `total` different keys agree in name and shape, which leaves out the head.

    name: of the model table; model: as it is loaded, perhaps a flavour. prefix: of the file's keys, without which they
    were compared. differs: the others by kind, as `conversion.listing` shows them; parts: the `partial` that excuses
    the missing ones. head: the keys of the file's classifier with their shapes.
    """

    name: str
    layout: str
    model: str
    prefix: str
    fits: int
    total: int
    differs: Mapping[str, list[str]]
    parts: tuple[str, ...]
    head: list[str]


@functools.cache
def known_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """{model: {leaf: shape}}, as written by tests/test_nearest.py: to trace all networks takes minutes."""
    found = json.loads(lzma.decompress(TABLE.read_bytes()))
    each = [{leaf: tuple(shape) for leaf, shape in table.items()} for table in found["tables"]]
    return {name: each[i] for name, i in found["names"].items()}


def cover(leaves: Collection[str], among: Iterable[str]) -> tuple[str, ...]:
    """The `partial` that excuses these leaves of a network's backbone and no other of `among`."""
    paths = {leaf: leaf.split("/", 2)[2] for leaf in among if leaf.split("/")[1] == "backbone"}
    short = [[path for leaf, path in paths.items() if (leaf in leaves) == wanted] for wanted in (True, False)]
    return tuple(trees.cover(*short))


def matches(tensors: Tensors, shapes_of: Callable[[str], tables.Shapes], prefix: str = "") -> Iterator[Match]:
    """One match of each (model, layout) whose table knows a key; flavours stand under the model of their layout."""
    related = {}
    for name, variant in models.MODELS.items():
        for layout, table in variant.layouts.items() if "." not in name else ():
            family = (variant.module.func, table)  # one member tells whether the family's table knows any key
            model = variant.flavours.get(layout, name)
            if family not in related:
                known = tables.may_know(table, tensors)
                related[family] = known and tables.coverage(table, shapes_of(model), tensors) > 0
            if related[family]:
                yield _match(tensors, shapes_of(model), table, (name, layout, model, prefix))


def _match(tensors: Tensors, shapes: tables.Shapes, table: tables.Layout, about: tuple) -> Match:
    """The match of a file with a network of these shapes; about: the first fields of a match."""
    native = tables.with_native_head(table)
    found, fits, missing = {tables.canonical(table, key): key for key in tensors}, 0, {}
    differs = {kind: [] for kind in ("missing keys", "unused keys", "other shapes")}
    head = [f"{key} {list(value.shape)}" for key, value in tensors.items() if tables.is_head(native, key)]
    for leaf, shape in shapes.items():
        if leaf.split("/")[1] != "backbone":
            continue
        keys, transform = tables.sources_of(table, leaf)
        for key, expected in zip(keys, tables.source_shapes(transform, shape), strict=True):
            own = found.pop(key, None)
            if own is None:
                differs["missing keys"].append(key)
                missing[leaf] = key
            elif tensors[own].shape == expected:
                fits += 1
            else:
                differs["other shapes"].append(f"{own} is {tensors[own].shape}, expected {expected}")
    unused = (key for key in found if not re.fullmatch(f"{native.head}|{native.ignore}", key))
    differs["unused keys"] = [found[key] for key in unused]
    differs = {kind: texts for kind, texts in differs.items() if texts}
    total = fits + sum(map(len, differs.values()))
    return Match(*about, fits, total, differs, cover(missing, shapes) if [*differs] == ["missing keys"] else (), head)


def nearest(tensors: Tensors, shapes_of: Callable[[str], tables.Shapes]) -> list[Match]:
    """The matches with the largest share of agreeing keys, all equal ones; a prefix of the keys may be dropped."""
    best, found = 0, []
    for prefix, own in _readings(tensors):
        if best < 0.5:  # else the keys are read as they are meant
            found += matches(own, shapes_of, prefix)
            best = max((each.fits / each.total for each in found), default=0)
    return [each for each in found if each.fits / each.total == best] if best > LEAST else []


def _readings(tensors: Tensors) -> Iterator[tuple[str, Tensors]]:
    """The keys as they are, and without each beginning that half of them share."""
    yield "", tensors
    heads = Counter(".".join(key.split(".")[:i]) + "." for key in tensors for i in range(1, key.count(".") + 1))
    for prefix in (prefix for prefix, count in heads.items() if 2 * count >= len(tensors)):
        yield prefix, {key.removeprefix(prefix): value for key, value in tensors.items()}


def describe(tensors: Tensors, shapes_of: Callable[[str], tables.Shapes]) -> list[str]:
    """One line for each network that a file fits, or that is nearest to it, with what differs."""
    found, lines = nearest(tensors, shapes_of), []
    for each in found:
        text = f"{each.name} (layout {each.layout})" + (f" behind the prefix {each.prefix!r}" if each.prefix else "")
        variant, head = models.get(each.model), f"head {', '.join(each.head)}" if each.head else "no head"
        flavour = f", loaded as {each.model}" if each.model != each.name else ""
        if not each.differs:
            card = variant.card.replace(**tables.pixels_of(variant.layouts[each.layout], tensors))
            pixels = f"{size_text(card.input_size)} px with mean {card.mean}, std {card.std}"
            if card.input == "text":
                pixels = f"texts of at most {card.max_length} tokens of {card.vocab:,}, pooling {card.pooling}"
            lines.append(f"fits {text}{flavour}: {pixels}; {head}")
            continue
        load = f"; partial={each.parts} loads it" if 0 < len(each.parts) <= SHOWN else ""
        differs = f"{each.fits} of {each.total} keys fit; {tables.listing(each.differs)}{load}; {head}"
        lines.append(f"nearest: {text}{flavour}: {differs}")
    if found and found[0].differs:
        lines = messages.shorten(lines, SHOWN)
    return lines or ["fits no known model, and none is near"]
