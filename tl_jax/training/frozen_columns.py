"""What frozen networks compute of an example, as fields of a batch: the columns that feature_cache.py keeps on disk."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core import messages, trees
from tl_jax.core.card import PIXELS
from tl_jax.methods import rules
from tl_jax.methods.term import MODEL
from tl_jax.training import steps

UNSAID = {"crop_mode": "center", "pixels": "uint8", "scale": 0.0}  # fields that keys hold at other values alone
FORMAT = 1  # raised when the same key would mean other numbers


class Column(NamedTuple):
    """A field of batches that a frozen network computes from one of their views, or puts in its place (field == view).

    compute: (variables, x) -> [B, ...], pure. key: what its numbers depend on, besides the examples and their views.
    """

    field: str
    view: str
    compute: Callable
    key: Mapping[str, Any]
    title: str


def prefix_columns(
    prefix: steps.Prefix, reader: steps.Reader, variables: Any, networks: Collection[str]
) -> list[Column]:
    """The outputs of a frozen prefix in place of what the model reads; of several inputs those of each frozen part."""
    card, live, flat = reader.card, prefix._replace(cached=False), trees.flatten(variables)
    leaves = {path: flat[path] for path in leaves_of(prefix, flat, networks)}
    if not card.parts:

        def compute(variables, x):
            return steps.run_prefix(live, variables, x, card)[0]

        return [Column(reader.field, reader.field, compute, _key(prefix.model, reader, leaves, prefix.cut),
                       f"at {prefix.cut}")]  # fmt: skip
    found, unread = [], card.unread(prefix.cut)
    for kind in (kind for kind in card.cards if kind not in unread):
        own = {path: leaf for path, leaf in leaves.items() if f"backbone/{kind}/" in path}
        cut = prefix.cut if prefix.cut.partition("/")[0] == kind else kind

        def of_part(variables, x, kind=kind, cut=cut):
            part = live._replace(cut=cut)
            return steps.run_prefix(part, variables, {kind: x}, card)[0][kind]

        key = _key(prefix.model, reader._replace(card=card.cards[kind]), own, cut)
        found.append(Column(kind, kind, of_part, key | {"fusion": dict(card.fusion).get("kind", "")}, f"at {cut}"))
    return found


def output_column(name: str, output: str, reader: steps.Reader, variables: Any) -> Column:
    """An output of a frozen network, such as its logits, as a field of its own."""
    cut = output if output in reader.module.cuts else None

    def compute(variables, x):
        own = steps.subtree(variables, name)
        found = reader.module.apply(own, steps.normalise(x, reader.card), train=False, stop=cut)[0]
        return found if cut else found.astype("float32")

    key = _key(reader.module, reader, trees.flatten(steps.subtree(variables, name)), output)
    return Column(reader.columns[output], reader.field, compute, key, f"of {name}{f' at {cut}' if cut else ''}")


def _key(module: Any, reader: steps.Reader, leaves: Mapping[str, Any], cut: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": reader.card.model,
        "added": [list(pair) for pair in module.additions],
        "weights": messages.fingerprint(trees.leaf_hashes(leaves)),
        "computed_in": np.dtype(module.dtype).name,
        "card": {field: x for field in PIXELS if (x := getattr(reader.card, field)) != UNSAID.get(field)},
        "cut": cut,
    }


def columns_of(plan: steps.Plan, variables: Callable[[], Any], networks: Collection[str], training: bool = True):
    """The columns that a phase reads: of its frozen prefix, and in training the outputs of further networks."""
    readers = {name: reader for name, reader in plan.readers.items() if training}
    found = [output_column(name, x, reader, variables()) for name, reader in readers.items() for x in reader.columns]
    if plan.prefix and plan.prefix.cached:
        found = [*prefix_columns(plan.prefix, plan.readers[MODEL], variables(), networks), *found]
    return found


def leaves_of(prefix: steps.Prefix, paths: Iterable[str], networks: Collection[str]) -> list[str]:
    """Those of the paths, `collection/path`, on which the outputs of a prefix depend; networks: the further ones."""
    paths = [path for path in paths if path.split("/")[1] not in networks]
    last, places = prefix.model.cuts.index(prefix.cut), rules.places(paths, prefix.model.cuts)
    return [path for path in paths if places.get(path, last + 1) <= last]
