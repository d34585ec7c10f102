"""What a weight file holds, for people."""

import pathlib

from tl_jax import models
from tl_jax.core.card import CASE
from tl_jax.core.console import WIDE, Table, fitted
from tl_jax.data.text import tokenizer
from tl_jax.weights import formats, hub, nearest, published
from tl_jax.weights.load import CARD_KEY, default_shapes


def inspect(path: str | pathlib.Path, width: int = WIDE) -> str:
    """A table of a weight file's keys, its card, or else the models and layouts that it fits or those nearest to it.

    The tokenizer that lies beside the file has a line. "timm:" gives the names of all published files that are known.
    width: of a table, in columns.
    """
    if path == published.PREFIX:
        return published.listing(width)
    row, file = published.find(path), hub.resolve(path)
    tensors, metadata = formats.read(file)
    rows = [(key, str(value.dtype), str(list(value.shape))) for key, value in tensors.items()]
    lines = [fitted(Table("", ("tensor", "type", "shape"), rows, 3), width)]
    lines += [f"{len(tensors)} tensors, {sum(value.size for value in tensors.values()):,} numbers"]
    if own := tokenizer.find_for(file):
        lines.append(f"{tokenizer.FILE}: sha256 {own.sha256}, {own.size:,} tokens, {CASE[own.lowercase]}")
    if row:
        card = row.card(models.get(row.model).card).replace(source=row.source(file), sha256=formats.sha256(file))
        return "\n".join([*lines, f"card {card.to_json()}"])
    if CARD_KEY in metadata:
        return "\n".join([*lines, f"card {metadata[CARD_KEY]}"])
    return "\n".join([*lines, *nearest.describe(tensors, default_shapes), "no card"])
