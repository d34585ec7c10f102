"""Exact evaluation: every example once, whatever the batch size and the number of devices."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tl_jax.core import console
from tl_jax.core.fields import INDEX, LABEL, MASK, take
from tl_jax.core.options import LANGUAGE
from tl_jax.data.examples import Source
from tl_jax.data.pipeline import EvalBatches
from tl_jax.runtime.sharding import Parallel
from tl_jax.tasks import Predictions, Spec, make_predictions
from tl_jax.training.steps import FEATURES


def predict(
    eval_fn: Callable,
    variables: Any,
    batches: EvalBatches,
    field: str | tuple[str, ...],
    spec: Spec,
    parallel: Parallel,
) -> Predictions:
    """The task's outputs, labels and features of every example of the source, in its order, on every process.

    The labels are those of the source, None where they are sealed: no batch need hold them.
    eval_fn: from `Parallel.evaluate`; field: of a batch, what it reads, see `take`. Raises as `collect`, and
    FloatingPointError for outputs that are not finite.
    """
    fields = (field, LABEL) if spec.name in LANGUAGE else field
    outputs = collect(lambda x: eval_fn(variables, x), batches, fields, parallel)
    features = outputs.pop(FEATURES)
    return join(outputs, batches.source, spec, features)


def join(outputs: Mapping[str, np.ndarray], source: Source, spec: Spec, features: np.ndarray | None) -> Predictions:
    """Outputs with the labels, ids and groups of their source."""
    labels = None if source.sealed else source.labels
    return make_predictions(outputs, labels, list(source.ids), spec, features, source.groups)


def collect(
    eval_fn: Callable,
    batches: EvalBatches,
    field: str | tuple[str, ...],
    parallel: Parallel,
    axes: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """The outputs {name: array} of eval_fn(inputs) for every example once, in the order of the source.

    field: or several, of which eval_fn gets a mapping. axes: the axis of the examples, where it is not the first.
    Padding is dropped by its mask; raises RuntimeError unless each example was seen exactly once.
    """
    source, columns = batches.source, []
    for batch in console.counted("outputs", batches, len(batches), shown=jax.process_index() == 0):
        batch = parallel.put_batch(batch)
        outputs = eval_fn(take(batch, field))
        facts = parallel.gather({name: batch[name] for name in (INDEX, MASK)})
        columns.append(jax.device_get((facts, outputs)))
    facts = {name: np.concatenate([facts[name] for facts, _ in columns]) for name in columns[0][0]}
    seen = facts[INDEX][facts[MASK]]
    if not np.array_equal(np.sort(seen), np.arange(len(source))):
        raise RuntimeError(f"{source.name}: {len(seen)} of {len(source)} examples were scored, not each exactly once")
    order = np.flatnonzero(facts[MASK])[np.argsort(seen)]
    joined = {}
    for name in columns[0][1]:
        axis = (axes or {}).get(name, 0)
        joined[name] = np.concatenate([outputs[name] for _, outputs in columns], axis).take(order, axis)
    return joined
