"""Views of an example: which network reads it, how it is augmented, and the pixels or rows that come of it."""

import contextlib
import itertools
import math
import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tl_jax.core import console
from tl_jax.core.card import Card
from tl_jax.core.checks import refuse
from tl_jax.core.fields import DOMAIN, INDEX, LABEL, MASK, WEIGHT
from tl_jax.core.messages import listed
from tl_jax.core.options import LANGUAGE
from tl_jax.data.examples import Source
from tl_jax.data.image import decode, ops
from tl_jax.data.image.augment import Preprocess, make_preprocess
from tl_jax.data.several import Several
from tl_jax.data.text import language, tokenizer
from tl_jax.data.text.tokens import Tokens

_local = threading.local()
IN_MEMORY = 2**28  # bytes of input pixels that may be made once and kept, where they do not change from epoch to epoch


class View(NamedTuple):
    """One rendering of an example, which is one field of the batch.

    card: of the network that reads it. augment: (op, parameters) pairs for training, see docs/data.md. draws: views
    with equal `draws` see the same random numbers, so equal crops and flips cut the same box; others draw their own.
    """

    card: Card
    augment: tuple = ()
    draws: str = ""


class Render(NamedTuple):
    preprocess: Preprocess
    draws: str


def _draws(seed: int, counter: int) -> np.random.Generator:
    """The stream keyed by (seed, counter), by one generator a thread: making one takes as long as cutting an image."""
    if not hasattr(_local, "rng"):
        _local.rng = np.random.Generator(np.random.Philox(key=(0, 0)))
        _local.start = _local.rng.bit_generator.state
    _local.start["state"]["key"][:] = seed, counter
    _local.rng.bit_generator.state = _local.start
    return _local.rng


def write_example(
    source: Source,
    renders: Mapping[str, Render],
    out: Mapping[str, np.ndarray],
    row: int,
    index: int,
    seeds: Mapping[str, int] | None = None,
    counter: int = 0,
) -> None:
    """Writes one example into a row of each view; seeds: of the draws of each view, where there are any."""
    name = f"{source.ids[index]} of {source.name}"
    images = source.inputs
    if isinstance(images, Several):
        if not images.present["image"][index]:
            for field in renders:
                out[field][row] = 0
            return
        images = images.parts["image"]
    with contextlib.ExitStack() as stack:
        try:
            image = stack.enter_context(decode.reading(images[index], source.form))
        except ValueError as error:
            raise ValueError(f"cannot read {name}: {error}; repair or remove it, or set on_error='skip'") from None
        except OSError as error:
            raise OSError(f"cannot read {name}: {error}") from None
        try:
            for field, render in renders.items():
                rng = _draws(seeds[field], counter) if seeds else None
                ops.put(out[field][row], render.preprocess(image, rng))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def make_views(
    source: Source, views: Mapping[str, View], *, augmented: bool
) -> tuple[dict[str, Render], dict[str, np.ndarray | Tokens]]:
    """(renders, prepared) of the views; raises one ValueError for all that do not fit the source."""
    problems = [] if views else ["there is none"]
    for field, (card, augment, _) in views.items():
        if field in (INDEX, LABEL, DOMAIN, MASK, WEIGHT):
            problems.append(f"{field!r} is the name of another field of the batch")
        if card.input not in source.kinds:
            found = " and ".join(map(repr, source.kinds))
            problems.append(f"{field}: the network {card.model} reads an input {card.input!r}, found {found}")
        elif card.columns != (columns := source.of_kind(card.input).columns):
            differ = listed([f"{a} -> {b}" for a, b in itertools.zip_longest(card.columns, columns) if a != b])
            problems.append(f"{field}: the columns of {card.model} are not those of the source:\n{differ}")
        if card.input == "image" and "image" in source.kinds and card.form != source.form:
            fix = "networks of one run read images in one form"
            problems.append(f"{field}: {card.model} reads {card.form}, the source was loaded as {source.form}; {fix}")
        if card.input != "image" and augment:
            what = "rows of a table" if card.input == "table" else "texts"
            problems.append(f"{field}: {what} have no augmentations, found {augment}")
    refuse(f"the views of {source.name} cannot be used", problems)
    renders, prepared = {}, {}
    for field, (card, augment, draws) in views.items():
        own = source.of_kind(card.input)
        if card.input == "table":
            prepared[field] = own.inputs[None]
            continue
        if card.input == "text":
            found = tokenizer.known(card).encode(own.inputs.rows, card.max_length, card.texts)
            found = found if own is source else found.without(~source.inputs.present["text"])
            if card.task in LANGUAGE:
                found = found._replace(labelled=language.labels_of(card.task, tokenizer.known(card)))
            prepared[field] = found
            continue
        preprocess = make_preprocess(card, augment if augmented else ())
        wanted = preprocess.short_side
        if small := [size for size, _ in source.made_smaller if size < wanted]:
            found = f"packed with --size {min(small)}, but the card resizes to a short side of {wanted}"
            raise ValueError(f"{source.name} was {found}: pack it with --size {wanted} or more, or take its files")
        renders[field] = Render(preprocess, draws)
        if (pixels := _prepare(own, renders[field])) is not None:
            prepared[field] = pixels[None]
    return renders, prepared


def _prepare(source: Source, render: Render) -> np.ndarray | None:
    """All input pixels at once [N, H, W, C], where they are the same in every epoch and small; else None."""
    preprocess, inputs = render.preprocess, source.inputs
    shape, dtype = (len(source), *preprocess.shape), np.dtype(preprocess.form.dtype)
    if not isinstance(inputs, np.ndarray) or preprocess.ops or math.prod(shape) * dtype.itemsize > IN_MEMORY:
        return None
    if inputs.dtype == dtype and preprocess.keeps(*inputs.shape[1:3]):
        return inputs
    pixels = np.empty(shape, dtype)
    for i in console.counted("preparing images", range(len(source)), len(source)):
        write_example(source, {"": render}, {"": pixels}, i, i)
    return pixels
