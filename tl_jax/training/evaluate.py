"""Exact evaluation: every example once, whatever the batch size and the number of devices."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tl_jax.data.pipeline import EvalBatches
from tl_jax.runtime.sharding import Parallel
from tl_jax.tasks import Predictions, Spec, make_predictions


def predict(eval_fn: Callable, variables: Mapping[str, Any], batches: EvalBatches, parallel: Parallel) -> Predictions:
    """Logits, labels and features of every example of the batches' source, in its order, on every process.

    eval_fn: from `Parallel.evaluate`. The last batch is padded and its padding dropped by a mask; raises RuntimeError
    unless each example was seen exactly once.
    """
    (logits, features), labels = collect(lambda images: eval_fn(variables, images), batches, parallel)
    spec = Spec(class_names=tuple(batches.source.class_names))
    return make_predictions({"logits": logits}, labels, list(batches.source.ids), spec, features)


def collect(
    eval_fn: Callable, batches: EvalBatches, parallel: Parallel, axes: tuple[int, ...] = (0, 0)
) -> tuple[list[np.ndarray], np.ndarray]:
    """The outputs of eval_fn(images) for every example once, in the order of the source, and the labels.

    axes: along which axis the examples lie, for each output. Raises RuntimeError unless each was seen exactly once.
    """
    source = batches.source
    columns: list[tuple] = []
    for batch in batches:
        batch = parallel.put_batch(batch)
        outputs = eval_fn(batch["image"])
        facts = parallel.gather((batch["index"], batch["label"], batch["mask"]))
        columns.append(jax.device_get((*facts, *outputs)))
    indices, labels, masks, *outputs = (
        np.concatenate(column, axis) for column, axis in zip(zip(*columns, strict=True), (0, 0, 0, *axes), strict=True)
    )
    seen = indices[masks]
    if not np.array_equal(np.sort(seen), np.arange(len(source))):
        raise RuntimeError(
            f"{source.name}: {len(seen)} of {len(source)} examples were scored; each must be, exactly once"
        )
    order = np.flatnonzero(masks)[np.argsort(seen)]
    return [output.take(order, axis) for output, axis in zip(outputs, axes, strict=True)], labels[order]
