"""The run of a probe without gradient: features once, a classifier on them, the score; no steps."""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from tl_jax.core import files, trees
from tl_jax.data import pipeline, resample
from tl_jax.data.examples import Source
from tl_jax.methods import probes, tip_adapter
from tl_jax.methods.term import MAIN, MODEL
from tl_jax.runtime import sharding, wall
from tl_jax.runtime.preemption import Stop, check
from tl_jax.tasks import Predictions
from tl_jax.training import artifacts, audit, evaluate, feature_cache, single, steps
from tl_jax.training.build import Run, scored_splits
from tl_jax.training.settings import naming
from tl_jax.weights import load


class Scored(NamedTuple):
    """predictions: of `scored_splits`; head: the leaves that were fitted, by their path in the head; layers: that the
    head has more; the rest as in `probes.Fitted`."""

    predictions: dict[str, Predictions]
    head: probes.Head
    chosen: float | list[float]
    tried: list[dict[str, Any]]
    layers: tuple = ()


def probe(
    run: Run, parallel: sharding.Parallel, folder: str | pathlib.Path, verbose: bool, stop_requested: Stop
) -> dict[str, Any]:
    """Fits method.name, one of probes.WITHOUT_STEPS, on the features of train, and scores it as training does.

    Every example of train is seen once, without augmentation. method.grid is searched on val. A linear classifier is
    written as model.safetensors with its head in place. With data.resample "loo" test is the whole pool: each example
    is predicted by all others, with the one value of the grid, and there is no model to write. "none" fits nothing, and
    writes the network as it was loaded.

    Raises Preempted soon after `stop_requested(0)` has become true: between two batches of features, or between two
    fits. Features computed so far are kept where cache is "features"; else the next run computes all again.
    """
    began, folder, material = time.perf_counter(), pathlib.Path(folder), run.material
    score = _leave_one_out if run.settings.data.resample == "loo" else _hold_out
    name = run.settings.phases[0].method.name
    score = {"none": _as_loaded, "tip_adapter": _with_cache}.get(name, score)
    predictions, head, chosen, tried, layers = score(run, parallel, stop_requested)
    variables = trees.merge(jax.device_get(material.variables), {f"params/head/{n}": x for n, x in head.items()})
    report = audit.prove([run.phases[0].audit], material.variables, variables)
    size = {"trainable_parameters": sum(leaf.size for leaf in head.values())}
    if jax.process_index() == 0:
        if head or name == "none":
            card = material.card.replace(head=(*material.card.head, *layers))
            load.export(variables, run.settings.model.name, folder / "model.safetensors", card=card)
        spent = {
            "flops": 0.0 if name == "none" else _flops(run),
            "memory_bytes": None,
            "seconds": round(time.perf_counter() - began, 3),
        }
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        files.write_json(folder / "cost.json", {**size, "flops_per_step": None, **spent, "steps": 0, "device": device})
    numbers = {"step": 0, "total_steps": 0, **size, "frozen_sha256": report["proof"]["sha256"]}
    numbers |= {} if name == "none" else {"chosen": chosen, "tried": tried}
    return artifacts.write(run, folder, predictions, report, numbers, len(tried) > 1, verbose)


def _flops(run: Run) -> float | None:
    """Those of the features that the probe is fitted on, as XLA counts them."""
    material, reader = run.material, run.material.readers[MODEL]
    x = feature_cache.example(material.streams[MAIN], reader.field)
    step = jax.jit(steps.make_eval_step(reader, run.task, None))
    counted = (step.lower(material.variables, x).cost_analysis() or {}).get("flops")
    return counted and counted * len(_distinct(material.data[MAIN])[0])


def _seen(run: Run, parallel: sharding.Parallel, stop_requested: Stop):
    """The predictions of each scored set, with features, and (features, labels) of train and of val, or None."""
    material, settings = run.material, run.settings
    distinct, index = _distinct(material.data[MAIN])
    views = {material.card.input: pipeline.View(material.card)}
    size = next(iter(material.eval_batches.values())).batch_size  # so that one program serves all
    where = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = pipeline.eval_batches(distinct, views, size, num_workers=settings.data.workers, **where)
    seen = predict(run, parallel, {**material.eval_batches, MAIN: batches}, stop_requested)
    train, val = seen.pop(MAIN), seen.get("val")
    return seen, (train.features[index], train.labels[index]), val and (val.features, val.labels)


def _answered(run: Run, seen: Mapping[str, Predictions], answer: Callable) -> dict[str, Predictions]:
    """What is scored, by a function of the features. The one time that test is read; where there is none, val is."""
    return {name: seen[name]._replace(outputs={"logits": answer(seen[name].features)}) for name in scored_splits(run)}


def _hold_out(run: Run, parallel: sharding.Parallel, stop_requested: Stop) -> Scored:
    settings, method = run.settings, run.settings.phases[0].method
    seen, *examples = _seen(run, parallel, stop_requested)
    check_stop = functools.partial(check, stop_requested, "between two fits")
    with naming(settings.table, "method.name", "method.grid", "data.val"), wall.timed("fitting"):
        fitted = probes.fit(method.name, *examples, run.task.outputs, method.grid, check_stop=check_stop)
    return Scored(_answered(run, seen, fitted.predict), fitted.head or {}, fitted.chosen, fitted.tried)


def _as_loaded(run: Run, parallel: sharding.Parallel, stop_requested: Stop) -> Scored:
    """The network's own outputs; train is not read."""
    sets = {name: run.material.eval_batches[name] for name in scored_splits(run)}
    return Scored(predict(run, parallel, sets, stop_requested), {}, 0.0, [])


def _with_cache(run: Run, parallel: sharding.Parallel, stop_requested: Stop) -> Scored:
    settings, own = run.settings, run.material.variables["params"]["head"]
    seen, *examples = _seen(run, parallel, stop_requested)
    check_stop = functools.partial(check, stop_requested, "between two fits")
    with naming(settings.table, "method.name", "method.grid", "data.val"), wall.timed("fitting"):
        fitted = tip_adapter.fit(own, *examples, settings.phases[0].method.grid, check_stop=check_stop)
    head = {**fitted.head}
    keys, place = head.pop("keys/kernel"), len(run.material.card.head)
    layer = ("cache", {"size": keys.shape[1], "beta": fitted.chosen[1]})
    head[f"keys{place}/kernel"] = keys
    return Scored(_answered(run, seen, fitted.predict), head, fitted.chosen, fitted.tried, (layer,))


def _leave_one_out(run: Run, parallel: sharding.Parallel, stop_requested: Stop) -> Scored:
    material, method = run.material, run.settings.phases[0].method
    grid, extra = tuple(method.grid), sorted(set(material.eval_batches) - {"test"})
    if len(grid) != 1 or extra:
        raise ValueError(
            f"data.resample='loo' with method.grid={grid} and the extra sets {extra}: it scores data.train itself, "
            "with one given value; set one value in method.grid, and leave data.val and data.extra_eval empty"
        )
    pool = predict(run, parallel, material.eval_batches, stop_requested)["test"]
    examples = pool.features, pool.labels, resample.leave_one_out(pool.labels, material.data["test"].groups)
    check_stop = functools.partial(check, stop_requested, "between two fits")
    with naming(run.settings.table, "method.name", "method.grid"), wall.timed("fitting"):
        (logits,) = probes.cross_predict(method.name, *examples, run.task.outputs, grid[0], check_stop=check_stop)
    return Scored({"test": pool._replace(outputs={"logits": logits})}, {}, grid[0], [])


@wall.timed("features")
def predict(
    run: Run, parallel: sharding.Parallel, sets: Mapping[str, pipeline.EvalBatches], stop_requested: Stop
) -> dict[str, Predictions]:
    """The features of each set, as predictions with the logits of the network as it was loaded."""
    card, spec, reader = run.material.card, run.task.spec, run.material.readers[MODEL]
    variables = parallel.place(run.material.variables)
    eval_fn = parallel.evaluate(steps.make_eval_step(reader, run.task, run.phases[0].plan.prefix))
    sets = single.cached(run, run.phases[0], dict(sets), lambda: variables, parallel, stop_requested)

    def stopping(variables, x):
        check(stop_requested, "while the features are computed")
        return eval_fn(variables, x)

    return {
        name: evaluate.predict(stopping, variables, batches, card.input, spec, parallel)
        for name, batches in sets.items()
    }


def _distinct(source: Source) -> tuple[Source, np.ndarray]:
    """The source with each example once, and where each of its own examples is in it: a bootstrap draw repeats some."""
    _, first, index = np.unique(source.ids, return_index=True, return_inverse=True)
    return (source, np.arange(len(source))) if len(first) == len(source) else (source.select(first), index)
