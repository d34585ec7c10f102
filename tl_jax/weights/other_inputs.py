"""Networks for another input than their weights were made for: other columns, channels or sides of images."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.core.card import Card, sides
from tl_jax.models import conversion as tables

STEM = "params/backbone/stem/"
POS_EMBED = f"{STEM}pos_embed"
Tensors = Mapping[str, np.ndarray]  # of a file, by its keys
Changed = dict[str, tuple[np.ndarray, str]]  # what stands in the place of some of them, and why


def fit_card(
    card: Card,
    path: str | pathlib.Path | None,
    image_size: int | tuple[int, int] | None,
    columns: Sequence[str],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Card:
    """The card for this input, which is that of `card` where an argument is empty; see `weights.load.load`."""
    card = _with_channels(with_columns(card, columns, path), channels, mean, std)
    size = sides(image_size or card.input_size)
    return card.replace(input_size=size[0] if size[0] == size[1] else size)


def with_columns(card: Card, columns: Sequence[str], path: str | pathlib.Path | None) -> Card:
    """The card with the columns that the network reads; means and deviations are 0 and 1 until data gives them."""
    columns = tuple(columns)
    given = f"given were {len(columns)} {columns[:5]}"
    if card.input != "table" and columns:
        raise ValueError(f"{card.model} reads an {card.input} and no columns; {given}")
    if card.input == "table" and not (columns or card.columns):
        raise ValueError(f"{card.model} reads a table: give its columns")
    if card.columns and columns not in ((), card.columns):
        own = f"{path} reads {len(card.columns)} columns {card.columns[:5]} according to its card"
        raise ValueError(f"{own}, {given}; they must be the same in the same order")
    if card.columns or not columns:
        return card
    return card.replace(columns=columns, mean=(0.0,) * len(columns), std=(1.0,) * len(columns))


def _with_channels(card: Card, channels: int, mean: Sequence[float], std: Sequence[float]) -> Card:
    """The card of a network for images of another number of channels; 0 for as many as the card has.

    Without `mean` or `std` one channel has the mean of the card's, and equal ones are repeated. ValueError for others.
    """
    if channels in (0, len(card.mean)):
        return card
    if card.input != "image":
        raise ValueError(f"channels={channels}: {card.model} reads a table, which has columns")
    found = {}
    for name, given, own in (("mean", mean, card.mean), ("std", std, card.std)):
        if given:
            found[name] = tuple(given)
        elif channels == 1 or len(set(own)) == 1:
            found[name] = (sum(own) / len(own),) * channels if len(set(own)) > 1 else own[:1] * channels
    wrong = [name for name in ("mean", "std") if len(found.get(name, ())) != channels]
    if wrong:
        known = f"the card of {card.model} has mean {card.mean} and std {card.std}, which say nothing of others"
        fix = f"give {' and '.join(wrong)} with {channels} numbers, such as those of the training images over the scale"
        raise ValueError(f"channels={channels}: {known}; {fix} (in a config: data.card)")
    return card.replace(**found)


def changed(
    table: tables.Layout, shapes: tables.Shapes, tensors: Tensors, model: Any, made_for: Card, resample: bool
) -> Changed:
    """What replaces the tensors of a file in `model`, whose leaves have `shapes`, for images of another kind.

    made_for: the card of the file. resample: position embeddings too, for another size.
    """
    found = _positions(table, tensors, model, made_for) if resample and POS_EMBED in shapes else {}
    return found | _stem(table, shapes, tensors) if len(made_for.mean) == 3 else found


def _positions(table: tables.Layout, tensors: Tensors, model: Any, made_for: Card) -> Changed:
    """The position embedding on the model's grid; {} where it needs no resampling."""
    (source,), transform = tables.sources_of(table, POS_EMBED)
    found = {}
    for key in (key for key in tensors if tables.canonical(table, key) == source):
        old = transform.load(tensors[key])
        new = model.resampled(old, made_for.input_size)
        if new is not old:
            (tensor,) = transform.export(new)
            found[key] = tensor, f"resampled from {tensors[key].shape[-2]} to {new.shape[1]} tokens"
    return found


def _stem(table: tables.Layout, shapes: tables.Shapes, tensors: Tensors) -> Changed:
    """The kernels that read images of three channels, for as many as the model's read; as timm's adapt_input_conv."""
    keys, found = {tables.canonical(table, key): key for key in tensors}, {}
    for leaf in (leaf for leaf, shape in shapes.items() if leaf.startswith(STEM) and len(shape) == 4):
        sources, transform = tables.sources_of(table, leaf)
        key, channels = keys.get(sources[0]), shapes[leaf][2]
        kernel = transform.load(tensors[key]) if key else np.zeros(shapes[leaf])
        if kernel.ndim == 4 and kernel.shape[2] == 3 != channels:
            kernel = kernel.astype(np.float32)
            repeated = np.tile(kernel, (1, 1, -(-channels // 3), 1))[:, :, :channels] * np.float32(3 / channels)
            (tensor,) = transform.export(kernel.sum(2, keepdims=True) if channels == 1 else repeated)
            found[key] = tensor, f"resampled from 3 to {channels} channels"
    return found
