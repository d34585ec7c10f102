"""probe(config, run, ...): the run of a closed form: features once, a classifier on them, the score. No steps."""

import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from tl_jax.core import files, trees
from tl_jax.data import pipeline, resample
from tl_jax.data.examples import Source
from tl_jax.methods import probes
from tl_jax.runtime import sharding
from tl_jax.tasks import Predictions
from tl_jax.training import artifacts, audit, evaluate, feature_cache, steps
from tl_jax.training.build import Run
from tl_jax.weights import load


class Scored(NamedTuple):
    """What a closed form came to.

    predictions: of the scored split, first, and of every further set. head: of a linear form, else None.
    """

    predictions: dict[str, Predictions]
    head: probes.Head | None
    chosen: float
    tried: list[dict[str, Any]]


def probe(
    config: ConfigDict, run: Run, parallel: sharding.Parallel, folder: str | pathlib.Path, verbose: bool = True
) -> dict[str, Any]:
    """Fits config.method.name of closed_form.NAMES on the features of train, and scores it as `train` does.

    Of train every example is seen once, without augmentation. config.method.grid is searched on val; neighbours are by
    cosine similarity. A linear form is written as model.safetensors with its head in place. With config.data.resample
    "loo" test is the whole pool: each example is predicted by all others, with the one value of the grid, and there is
    no model to write.
    """
    began, folder = time.perf_counter(), pathlib.Path(folder)
    score = _leave_one_out if config.data.resample == "loo" else _hold_out
    audits = [run.phases[0].audit]
    frozen = audit.frozen_hashes(run.variables, audits)
    scored = score(config, run, parallel)
    head = scored.head or {}
    new = {f"params/head/{name}": leaf for name, leaf in head.items()}
    variables = trees.merge(jax.device_get(run.variables), new)
    report = audit.prove(audits, frozen, audit.frozen_hashes(variables, audits))
    split = next(iter(scored.predictions))
    result = {
        **artifacts.facts(config, run, split),
        "chosen_on_scored_split": split == "val" and len(scored.tried) > 1,
        "step": 0,
        "total_steps": 0,
        "trainable_parameters": sum(leaf.size for leaf in head.values()),
        "frozen_sha256": report["proof"]["sha256"],
        "chosen": scored.chosen,
        "tried": scored.tried,
    }
    if jax.process_index() == 0:
        if head:
            load.export(variables, config.model.name, folder / "model.safetensors", card=run.card)
        files.write_json(folder / "cost.json", _cost(result["trainable_parameters"], time.perf_counter() - began))
    return artifacts.leave(config, folder, scored.predictions, result, report, verbose)


def _hold_out(config: ConfigDict, run: Run, parallel: sharding.Parallel) -> Scored:
    different, index = _different(run.data["train"])
    size = next(iter(run.eval_batches.values())).batch_size  # so that one program serves all
    batches = pipeline.eval_batches(
        different, card=run.card, batch_size=size, num_workers=config.data.workers,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    seen = _predict(config, run, parallel, {**run.eval_batches, "train": batches})
    train, val = seen.pop("train"), seen.pop("val", None)
    fitted = probes.fit(
        config.method.name, (train.features[index], train.labels[index]), val and (val.features, val.labels),
        len(run.card.class_names), config.method.grid,
    )  # fmt: skip
    # The one time that test is read; where there is none, val is scored.
    split, predictions = ("test", seen.pop("test")) if "test" in seen else ("val", val)
    named = {split: predictions, **seen}
    logits = {name: other._replace(outputs={"logits": fitted.predict(other.features)}) for name, other in named.items()}
    return Scored(logits, fitted.head, fitted.chosen, fitted.tried)


def _leave_one_out(config: ConfigDict, run: Run, parallel: sharding.Parallel) -> Scored:
    grid, further = tuple(config.method.grid), sorted(set(run.eval_batches) - {"test"})
    if len(grid) != 1 or further:
        raise ValueError(
            f"data.resample='loo' with method.grid={grid} and the further sets {further}: it scores data.train itself, "
            "with one given value; set one value in method.grid, and leave data.val and data.also empty"
        )
    pool = _predict(config, run, parallel, run.eval_batches)["test"]
    splits = resample.splits(pool.labels, "loo", config.data.split_seed)
    (logits,) = probes.cross_predict(
        config.method.name, pool.features, pool.labels, splits, len(pool.spec.class_names), grid[0]
    )
    return Scored({"test": pool._replace(outputs={"logits": logits})}, None, grid[0], [])


def _predict(
    config: ConfigDict, run: Run, parallel: sharding.Parallel, batches: dict[str, pipeline.EvalBatches]
) -> dict[str, Any]:
    """The features of each set, as predictions with the logits of the network as it was loaded."""
    prefix, variables = run.phases[0].prefix, parallel.place(run.variables)
    eval_fn = parallel.evaluate(steps.make_eval_step(run.model, mean=run.card.mean, std=run.card.std, prefix=prefix))
    if prefix.cached:
        size = next(iter(run.eval_batches.values())).batch_size
        batches = feature_cache.hold(
            batches, prefix, variables, run.card, parallel, batch_size=size, folder=config.cache_dir
        )  # fmt: skip
    return {name: evaluate.predict(eval_fn, variables, some, parallel) for name, some in batches.items()}


def _different(source: Source) -> tuple[Source, np.ndarray]:
    """The source with each example once, and where each of its own examples is in it: a bootstrap draw repeats some."""
    _, first, index = np.unique(source.ids, return_index=True, return_inverse=True)
    return (source, np.arange(len(source))) if len(first) == len(source) else (source.select(first), index)


def _cost(trainable: int, seconds: float) -> dict[str, Any]:
    """As the cost.json of a trained run; there are no steps to count the work of."""
    return {
        "trainable_parameters": trainable,
        "flops_per_step": None,
        "memory_bytes": None,
        "seconds": seconds,
        "steps": 0,
        "device": jax.devices()[0].device_kind,
    }
