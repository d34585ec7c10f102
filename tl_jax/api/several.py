"""Several inputs of one example in memory, or as the rows of a file without labels."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tl_jax.core.card import Card
from tl_jax.core.checks import refuse
from tl_jax.core.fields import MASK, take
from tl_jax.data import sources
from tl_jax.data.examples import Source, find_unreadable
from tl_jax.data.pipeline import View, eval_batches
from tl_jax.data.readers import arrays, several, tables
from tl_jax.data.text.tokens import join_texts

EXPECTED = "{'image': images, 'text': texts, 'table': rows}, of which one is None where an example lacks it"


def arrays_of(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `arrays.check_arrays` for inputs by kind; an item that is None is missing."""
    if not isinstance(inputs, Mapping) or set(inputs) - set(arrays.SEVERAL) or len(inputs) < 2:
        found = ", ".join(map(repr, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ValueError(f"found the inputs {found}; expected at least two of {EXPECTED}")
    sizes = {kind: len(items) for kind, items in inputs.items()}
    refuse("the inputs have different numbers of examples", [] if len(set(sizes.values())) == 1 else [str(sizes)])
    made = {}
    for kind, items in inputs.items():
        there = np.array([item is not None for item in items], bool)
        if not there.any():
            raise ValueError(f"no example has the input {kind!r}: leave it out")
        made[f"{arrays.HAS}{kind}"] = there
        if kind == "text":
            pair = next(item for item in items if item is not None)
            empty = ("",) * (1 if isinstance(pair, str) else len(pair))
            rows = [empty if item is None else (item,) if isinstance(item, str) else tuple(item) for item in items]
            made |= join_texts(rows)
            continue
        one = np.asarray(next(item for item in items if item is not None))
        whole = [np.zeros_like(one) if item is None else np.asarray(item) for item in items]
        shapes = {item.shape for item in whole}
        refuse(f"the inputs {kind!r} have different shapes", sorted(map(str, shapes)) if len(shapes) > 1 else [])
        made["image" if kind == "image" else "features"] = np.stack(whole)
    return made


def source_of(data: Any, card: Card, text: Sequence[str] = (), image: str = "", columns: Sequence[str] = ()) -> Source:
    """Examples without labels: a Dataset, a mapping as in EXPECTED, or a file, of which columns are named."""
    if isinstance(data, list | tuple) and len(data) == 1:  # of the command
        data = data[0]
    if isinstance(data, Source):
        source = data
    elif isinstance(data, Mapping):
        given = arrays_of(data)
        labels = np.zeros(len(next(iter(data.values()))), np.int32)
        source = arrays.check_arrays("the arrays", "arrays", "train", {**given, "label": labels}, None)
        named = card.cards["table"].columns if "table" in card.cards else ()
        named = named if len(named) == len(source.columns) else source.columns  # rows are in the network's order
        source = dataclasses.replace(source, ids=tuple(str(i) for i in range(len(source))), columns=named)
    elif isinstance(data, str | os.PathLike) and (text or image or columns):
        table = tables.read_table(os.fspath(data))
        every = np.arange(len(table.rows))
        inputs, sizes = several.inputs_of(table, every, image, tuple(text), tuple(columns))
        ids = tuple(f"row/{row}" for row in table.rows.tolist())
        own = inputs.columns.get("table", ())
        source = Source(os.fspath(data), inputs, np.zeros(len(every), np.int32), ("",), ids, sizes, columns=own)
    else:
        raise ValueError(f"{card.model} reads several inputs: expected {EXPECTED}, or of a run a file with its columns")
    source = sources.in_form(source, card.form) if "image" in card.cards else source
    refuse(f"images of {source.name} cannot be read", find_unreadable(source, fully=False).values())
    return source


def batches(model: Any, source: Source, batch_size: int) -> Iterator[tuple[list[tuple[str, None]], dict]]:
    """As `api.model._batches`, of the examples of a source."""
    parallel, variables, apply = model.compiled
    views = {kind: View(card) for kind, card in model.card.cards.items()}
    size = parallel.round_up(min(batch_size, len(source)))
    for step, batch in enumerate(eval_batches(source, views, size, labelled=False)):
        outputs = jax.device_get(apply(variables, parallel.put_batch(take(batch, model.card.field))))
        real, start = int(batch[MASK].sum()), step * size
        yield [(name, None) for name in source.ids[start : start + real]], {k: x[:real] for k, x in outputs.items()}
