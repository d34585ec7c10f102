"""Retrieval at the end of a run that holds two inputs against each other: embeddings of what is scored, and ranks."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tl_jax.core import files
from tl_jax.data import pipeline
from tl_jax.methods import contrastive
from tl_jax.methods.term import MODEL
from tl_jax.runtime import sharding
from tl_jax.runtime.log import log
from tl_jax.tasks import retrieval
from tl_jax.training import evaluate, inputs, steps
from tl_jax.training.build import Run


def paired(run: Run, i: int) -> str:
    """The further network that a term of a phase holds against the model; "" where none does."""
    return next((term.pairs for _, term in run.phases[i].plan.method.terms.values() if term.pairs), "")


def report(
    run: Run,
    i: int,
    variables: Mapping[str, Any],
    names: Sequence[str],
    parallel: sharding.Parallel,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """{"retrieval": {split: {"image_to_text": ...}}} of result.json; {} for a run without such a term.

    variables: of all networks, as they are scored. The vectors are in embeddings-SPLIT.npz: one array for each input,
    float32 [N, D] of length 1, and what is one input, see `inputs.identities`; ids.
    """
    network, found = paired(run, i), {}
    if not network:
        return {}
    material, resamples = run.material, run.settings.loop.resamples
    model, other = (material.readers[name] for name in (MODEL, network))
    kinds, views = (model.card.input, other.card.input), {x.field: pipeline.View(x.card) for x in (model, other)}
    predict = parallel.evaluate(_embed(model, other, network))
    placed = parallel.place(variables)
    for split in names:
        batches = material.eval_batches[split]
        made = pipeline.eval_batches(batches.source, views, batches.batch_size, process_index=batches.process_index,
                                     process_count=batches.process_count, num_workers=batches.num_workers)  # fmt: skip
        a, b = evaluate.collect(lambda x: predict(placed, x), made, tuple(views), parallel).values()
        identity = [np.array(inputs.identities(batches.source, kind), str) for kind in kinds]
        if jax.process_index() == 0:
            arrays = dict(zip((*kinds, *(f"{kind}_identity" for kind in kinds)), (a, b, *identity), strict=True))
            with files.atomic_write(folder / f"embeddings-{split}.npz") as file:
                np.savez(file, **arrays, ids=np.array(batches.source.ids, str))
        table = {}
        for direction, (places, partner) in retrieval.both(a, b, *identity).items():
            title = direction.replace("model", kinds[0]).replace("other", kinds[1])
            table[title] = retrieval.summarize(places, partner, resamples=resamples)
            shares = ", ".join(f"{name} {x['value']:.3f}" for name, x in table[title].items() if "recall" in name)
            log(f"{split}, {title.replace('_', ' ')}: {shares} of {len(places):,} queries")
        found[split] = table
    return {"retrieval": found}


def _embed(model: steps.Reader, other: steps.Reader, network: str) -> Callable:
    """(variables of all networks, fields of a batch) -> {"model", "other"}: vectors [B, D] of length 1."""

    def embed(variables: Mapping[str, Any], x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        features = []
        for reader, own in ((model, variables), (other, steps.subtree(variables, network))):
            given = steps.normalise(x[reader.field], reader.card)
            features.append(reader.module.apply(own, given, train=False)[1]["pre_logits"])
        a, b = contrastive.embeddings(variables["params"][contrastive.NAME], *features)
        return {"model": a, "other": b}

    return embed
