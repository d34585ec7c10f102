"""What a run between domains shows besides its scores: held-out discriminators, how far apart the domains are, why."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tl_jax.core import files
from tl_jax.data import pipeline
from tl_jax.data.pipeline import TrainBatches
from tl_jax.methods.domain import measure
from tl_jax.methods.term import MAIN
from tl_jax.runtime import sharding
from tl_jax.tasks import Predictions, make_predictions
from tl_jax.training import candidates, inputs, single, steps
from tl_jax.training.build import Run

ACCURACY = "accuracy"  # the log of a term that is its discriminator's
MOST = 10  # batches that a held-out accuracy is the mean of
ONLINE = "online"  # the scored set of what a term answered while adapting


def discriminators(plan: steps.Plan) -> list[str]:
    """The terms of a step that have a discriminator."""
    return [name for name, (_, term) in plan.method.terms.items() if ACCURACY in term.logs]


class HeldOut:
    """The accuracy of discriminators in training mode on val and on the split that candidates are judged on."""

    def __init__(self, run: Run, i: int, parallel: sharding.Parallel, stop: Callable):
        self._plan, self._parallel = run.phases[i].plan, parallel
        self._names = discriminators(self._plan) if inputs.judged_on(run.settings.data) else []
        self._streams = {name: _held_out(run, name) for name in self._plan.fed} if self._names else {}
        sizes = [-(-len(stream.source) // stream.batch_size) for stream in self._streams.values()]
        self._count, self._fn = min(MOST, max(sizes, default=0)), None
        self._run, self._phase, self._stop = run, run.phases[i], stop

    def __call__(self, state: steps.TrainState) -> dict[str, float]:
        """{TERM/accuracy: mean} at a state, which it leaves alone."""
        if not self._names:
            return {}
        if self._fn is None:
            named, at = {f"held-out {name}": x for name, x in self._streams.items()}, single.current_variables(state)
            found = single.cached(self._run, self._phase, named, lambda: at, self._parallel, self._stop)
            self._streams = {name: found[f"held-out {name}"] for name in self._streams}
            self._fn = jax.jit(steps.make_logs(self._plan, self._names))
        rows = []
        for count in range(self._count):
            batch = self._parallel.put_batch({name: stream[count] for name, stream in self._streams.items()})
            rows.append(jax.device_get(self._fn(state, batch)))
        logs = [f"{name}/{ACCURACY}" for name in self._names]
        return {name: float(np.mean([row[name] for row in rows])) for name in logs}


def _held_out(run: Run, stream: str) -> TrainBatches:
    """The batches of a stream from the held-out examples of its domain, without augmentation."""
    material, settings, ours = run.material, run.settings, run.material.streams[stream]
    judged, *_ = inputs.judged_on(settings.data)[0]
    views = {reader.field: pipeline.View(reader.card) for reader in material.readers.values() if reader.card}
    views |= {field: pipeline.View(material.card) for field in ours.renders if field not in views}
    return pipeline.train_batches(
        material.data["val" if stream == MAIN else judged], views, ours.batch_size, settings.loop.seed,
        name=f"held-out {stream}", labelled=ours.labelled, process_index=ours.process_index,
        process_count=ours.process_count,
    )  # fmt: skip


def report(run: Run, folder: pathlib.Path, step: int) -> dict[str, Any]:
    """{"domains": ...} of result.json: the separation of the domains at a step, its discriminators, a diagnosis.

    Of the features on val and on the split that candidates are judged on; {} for a run without candidates.
    """
    path = candidates.path_of(folder, step)
    if not candidates.names(run) or not path.exists():
        return {}
    arrays = candidates.read(path)
    names, val = candidates.names(run), run.material.data["val"]
    which = arrays.get("source_domains", np.zeros(len(arrays["source_features"]), int))
    source = "source" if run.settings.data.labelled else "val"
    domains = val.domain_names if val.domains is not None else (source,)
    parts = {name: arrays["source_features"][which == d] for d, name in enumerate(domains)}
    try:
        found = measure.separation({**parts, names[0]: arrays["target_features"]})
    except ValueError as error:
        return {"domains": {"left_out": str(error)}}
    rows = files.read_rows(folder / "metrics.jsonl")
    accuracies = {
        name: {
            split: _last(rows, f"{key}/{name}/{ACCURACY}", step)
            for split, key in (("train", "train"), ("held_out", "val"))
        }
        for name in discriminators(run.phases[run.phase_of(step)].plan)
    }
    farthest = max(found.proxy_a_distance.values())
    said = []
    for name, pair in accuracies.items():
        lacking = " or ".join(split.replace("_", " ") for split, value in pair.items() if value is None)
        unknown = f"{name}: by this step its discriminator has no accuracy on {lacking} examples"
        said.append(unknown if lacking else measure.diagnosis(name, **pair, distance=farthest))
    confusion = {"domains": list(found.domains), "shares": found.confusion.round(6).tolist()}
    table = {"proxy_a_distance": found.proxy_a_distance, "confusion": confusion}
    return {"domains": {**table, "discriminators": accuracies, "diagnosis": said}}


def answers(run: Run, i: int, memory: Mapping[str, Any], step: int) -> dict[str, Predictions]:
    """{"online": what a term of phase i answered while adapting}, with labels that are opened now; {} without one."""
    for name, (_, term) in run.phases[i].plan.method.terms.items():
        if term.answers:
            source = run.material.data[stream := term.on[-1]]
            labels = run.material.ledger.open(stream, source, f"the score of {ONLINE}", "score", step)
            logits = {"logits": np.asarray(term.answers(memory[name]))}
            return {ONLINE: make_predictions(logits, labels, list(source.ids), run.task.spec, None, source.groups)}
    return {}


def _last(rows: list[Mapping[str, Any]], column: str, step: int) -> float | None:
    """The last value of a column of metrics.jsonl up to a step."""
    values = [row[column] for row in rows if row["step"] <= step and row.get(column) is not None]
    return values[-1] if values else None
