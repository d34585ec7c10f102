"""One run as a program of the training loop; replicas.py is the other."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core import trees
from tl_jax.core.fields import LABEL, MASK, take
from tl_jax.data import pipeline
from tl_jax.data.text.tokens import TokenFeatures, Tokens
from tl_jax.methods.term import MAIN, MODEL, Start
from tl_jax.runtime import sharding, wall
from tl_jax.runtime.preemption import Stop, check
from tl_jax.training import audit, evaluate, feature_cache, frozen_columns, steps
from tl_jax.training.build import Phase, Run
from tl_jax.training.optim import to_steps
from tl_jax.training.steps import TrainState
from tl_jax.weights.load import RANDOM


class Line(NamedTuple):
    """A line of metrics as the devices have it: sums up to a step, the learning rate of that step, and bad_step."""

    step: int
    sums: dict[str, jax.Array]
    lr: jax.Array
    bad_step: jax.Array


class Program(Protocol):
    """What the loop trains: one run, or several that share a program; i is a phase, j a run of `runs`."""

    runs: Sequence[Run]

    def constant_hashes(self) -> dict[str, str]: ...  # of what checkpoints leave out
    def initial(self, i: int) -> TrainState: ...  # the state as if training began with phase i
    def enter(self, i: int, state: TrainState) -> TrainState: ...
    def refresh(
        self, i: int, state: TrainState, names: Sequence[str], stop: Stop
    ) -> TrainState: ...  # with the memory and the statistics of these terms computed anew
    def frozen_hashes(self, i: int, state: TrainState) -> dict[str, str]: ...
    def batches(self, i: int, state: TrainState, names: Sequence[str], stop: Stop) -> dict[str, Any]: ...
    def iterate(self, sets: Mapping[str, Any], start: int, stop: int) -> Iterator[Any]: ...
    def compile(self, i: int, state: TrainState, batch: Any) -> tuple[Callable, dict[str, Any]]: ...
    def take_line(self, i: int, state: TrainState, done: int) -> tuple[TrainState, Line]: ...
    def read_line(self, line: Line) -> dict[int, tuple[dict[str, float], float, int]]: ...
    def predict(self, i: int, state: TrainState, batches: Any, wanted: Sequence[int]) -> dict[int, Any]: ...
    def variables(self, state: TrainState, j: int) -> dict[str, Any]: ...  # as evaluated, on the host
    def memory(self, state: TrainState, j: int) -> dict[str, Any]: ...  # of the terms, on the host


class Single:
    """One run on all devices."""

    def __init__(self, run: Run, parallel: sharding.Parallel):
        self.runs, self._run, self._parallel = (run,), run, parallel
        self._field = run.material.readers[MODEL].field
        self._eval = functools.cache(self._make_eval)
        self._lr = functools.cache(lambda i: jax.jit(run.phases[i].schedule))

    def constant_hashes(self) -> dict[str, str]:
        """`{collection/path: sha256}` of what no phase trains and the weight file gives to every start bit by bit.

        Not what was sampled or computed on the device, which another kind of device may do with other roundings.
        """
        variables, origins = self._run.material.variables, self._run.material.origins
        frozen = audit.frozen_hashes(variables, [phase.audit for phase in self._run.phases])
        given = {p for p, origin in origins.items() if origin not in (*RANDOM, "copy") and "(resampled" not in origin}
        if any(origins[path] == "copy" for path in frozen):
            flat = trees.flatten(variables)
            values = set(trees.leaf_hashes({path: flat[path] for path in given}).values())
            given |= {path for path, sha256 in frozen.items() if sha256 in values}
        return {path: sha256 for path, sha256 in frozen.items() if path in given}

    def initial(self, i: int) -> TrainState:
        phase, material = self._run.phases[i], self._run.material

        def init(variables, memory):
            variables, memory = jax.tree.map(jnp.copy, (variables, memory))  # a step reuses the memory of its state
            return steps.init_state(phase.plan, phase.tx, variables, memory, self._run.settings.loop.seed)

        shapes = jax.eval_shape(init, material.variables, material.memory)
        placed = self._parallel.place((material.variables, material.memory))
        # One program: leaf by leaf each would be a program of its own.
        return jax.jit(init, out_shardings=self._parallel.shardings(shapes))(*placed)

    def enter(self, i: int, state: TrainState) -> TrainState:
        before, phase = self._run.phases[i - 1 : i + 1]
        return self._parallel.place(steps.enter_phase(phase.plan, phase.tx, state, before.length))

    def refresh(self, i: int, state: TrainState, names: Sequence[str], stop: Stop) -> TrainState:
        memory, statistics = refreshed(self._run, i, current_variables(state), state.memory, names, stop)
        batch_stats = trees.merge(state.batch_stats, self._parallel.place(statistics))
        return state._replace(memory=self._parallel.place(memory), batch_stats=batch_stats)

    def frozen_hashes(self, i: int, state: TrainState) -> dict[str, str]:
        return audit.frozen_hashes(current_variables(state), [self._run.phases[i].audit])

    def batches(self, i: int, state: TrainState, names: Sequence[str], stop: Stop) -> dict[str, Any]:
        sets = {**self._run.material.streams, **self._run.material.eval_batches}
        wanted = {name: sets[name] for name in names}
        return cached(self._run, self._run.phases[i], wanted, lambda: current_variables(state), self._parallel, stop)

    def iterate(self, sets: Mapping[str, Any], start: int, stop: int) -> Iterator[Any]:
        with contextlib.closing(streams_of(self._run, sets, start, stop)) as stream:
            for batch in stream:
                yield self._parallel.put_batch(batch)

    def compile(self, i: int, state: TrainState, batch: Any) -> tuple[Callable, dict[str, Any]]:
        phase = self._run.phases[i]
        return self._parallel.compile(steps.make_train_step(phase.plan, phase.tx), state, batch)

    def take_line(self, i: int, state: TrainState, done: int) -> tuple[TrainState, Line]:
        """Ends a line after `done` steps, and starts new sums; waits for nothing."""
        zeros = {name: np.zeros((), np.float32) for name in state.sums}
        lr = self._lr(i)(jax.device_put(np.int32(done - 1 - self._run.phases[i].start)))
        line = Line(done, state.sums, lr, jnp.copy(state.bad_step))
        return state._replace(sums=self._parallel.place(zeros)), line

    def read_line(self, line: Line) -> dict[int, tuple[dict[str, float], float, int]]:
        sums, lr, bad = jax.device_get((line.sums, line.lr, line.bad_step))
        return {0: ({name: float(value) for name, value in sums.items()}, float(lr), int(bad))}

    def predict(self, i: int, state: TrainState, batches: Any, wanted: Sequence[int]) -> dict[int, Any]:
        """{0: Predictions, or the FloatingPointError of a run that diverged}; one program serves all phases it can."""
        eval_fn, spec = self._eval(eval_prefix(self._run, i)), self._run.task.spec
        try:
            return {
                0: evaluate.predict(eval_fn, steps.eval_variables(state), batches, self._field, spec, self._parallel)
            }
        except FloatingPointError as error:
            return {0: error}

    def _make_eval(self, prefix: steps.Prefix | None) -> Callable:
        reader = self._run.material.readers[MODEL]
        return self._parallel.evaluate(steps.make_eval_step(reader, self._run.task, prefix))

    def variables(self, state: TrainState, j: int) -> dict[str, Any]:
        return trees.to_host(steps.eval_variables(state))

    def memory(self, state: TrainState, j: int) -> dict[str, Any]:
        return trees.to_host(state.memory)


def shapes_of(batch: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of the arrays of a batch, each of which takes a program of its own."""
    return tuple(x.shape for x in jax.tree.leaves(batch))


def current_variables(state: TrainState) -> dict[str, Any]:
    """The variables as training moves them, without the moving average."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def eval_prefix(run: Run, i: int) -> steps.Prefix | None:
    """The prefix that evaluation in a phase must know of: one that is cached, or computes in another type."""
    prefix = run.phases[i].plan.prefix
    return prefix if prefix and (prefix.cached or prefix.model.dtype != run.material.model.dtype) else None


def streams_of(run: Run, sets: Mapping[str, Any], start: int, stop: int) -> Iterator[dict[str, Any]]:
    """The batches of all training streams, step by step, made ahead; each stream has epochs of its own."""
    workers = run.settings.data.workers
    made = {name: batches.iterate(start, stop, workers) for name, batches in sets.items()}
    try:
        for _ in range(start, stop):
            yield {name: next(stream) for name, stream in made.items()}
    finally:
        for stream in made.values():
            stream.close()


@wall.timed("features")
def cached(
    run: Run, phase: Phase, sets: dict[str, Any], variables: Callable[[], Any], parallel: sharding.Parallel, stop: Stop
) -> dict[str, Any]:
    """The sets, with the outputs of what is frozen in place of its inputs where the config says so."""
    loop, material = run.settings.loop, run.material
    training = {name: batches for name, batches in sets.items() if name in material.streams}
    how = {"views": _views(run), "batch_size": loop.batch_size, "folder": loop.cache_dir}
    found = dict(sets)
    for column in frozen_columns.columns_of(phase.plan, variables, material.networks, bool(training)):
        wanted = sets if column.field == column.view else training
        made = feature_cache.fill(wanted, column, variables(), parallel, **how, stop_requested=stop)
        for name, values in made.items():
            tokens = found[name].prepared.get(column.view)
            if isinstance(tokens, Tokens) and values.ndim == 4:  # of each token, not of a text
                values = TokenFeatures(tokens, values)
            found[name] = dataclasses.replace(found[name], prepared={**found[name].prepared, column.field: values})
            render = found[name].renders.get(column.view)
            if column.field != column.view and render is not None and render.preprocess.ops:
                found[name] = dataclasses.replace(found[name], views=values.shape[0])  # what is live sees these crops
    unread = _unread(phase)
    return {name: _without(found[name], unread) if unread and name in training else found[name] for name in found}


def _unread(phase: Phase) -> set[str]:
    """The views that no network of a phase reads but those whose outputs are cached."""
    readers = phase.plan.readers.values()
    live = {field for x in readers if not x.columns for field in ([x.field] if isinstance(x.field, str) else x.field)}
    return {x.field for x in readers if x.columns} - live


def _without(batches: pipeline.TrainBatches, fields: set[str]) -> pipeline.TrainBatches:
    """The batches without some views."""
    renders, prepared = (
        {field: x for field, x in table.items() if field not in fields} for table in (batches.renders, batches.prepared)
    )
    return dataclasses.replace(batches, renders=renders, prepared=prepared)


def flops_of_features(run: Run, i: int) -> dict[str, float]:
    """{stream: FLOPs of what a phase reads from the cache in place of one example}, as XLA counts them."""
    material, found = run.material, {}
    for column in frozen_columns.columns_of(run.phases[i].plan, lambda: material.variables, material.networks):
        for name, batches in material.streams.items():
            x = feature_cache.example(batches, column.view)
            counted = jax.jit(column.compute).lower(material.variables, x).cost_analysis() or {}
            found[name] = found.get(name, 0.0) + counted.get("flops", 0.0)
    return found


def kept(run: Run, stream: str) -> int:
    """How many examples of a stream a cache holds, one of every view."""
    batches, field = run.material.streams[stream], run.material.readers[MODEL].field
    render = batches.renders.get(field if isinstance(field, str) else "image")
    return len(batches.source) * (_views(run) if render is not None and render.preprocess.ops else 1)


def _views(run: Run) -> int:
    """Epochs of augmentation that the cache keeps."""
    loop = run.settings.loop
    return min(loop.views, -(-run.total_steps * loop.batch_size // len(run.material.data[MAIN])))


def refreshed(
    run: Run, i: int, variables: Any, memory: Mapping[str, Any], names: Iterable[str], stop: Stop
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The memory of all terms, that of the named ones computed anew from the data, and {path: leaf} of statistics."""
    material, phase, new = run.material, run.phases[i], dict(memory)
    field, size = phase.plan.readers[MODEL].field, run.settings.loop.eval_batch_size
    views = {kind: pipeline.View(card) for kind, card in material.card.cards.items()}

    def batches(stream: str) -> Iterator[tuple[Any, Any]]:
        source, labelled = material.data[stream], material.streams[stream].labelled
        for batch in pipeline.eval_batches(source, views, min(size, len(source)), labelled=labelled):
            check(stop, "while the memory of the terms is computed")
            real = batch[MASK]
            read = jax.tree.map(lambda x, real=real: x[real], take(batch, field))
            yield read, batch[LABEL][real] if labelled else None

    variables, memory = jax.device_get((variables, new))
    statistics: dict[str, Any] = {}
    for name in names:
        term = phase.plan.method.terms[name][1]
        start: Start = material.start._replace(
            variables=variables, loaded=material.variables, memory=memory.get(name), batches=batches
        )
        if term.refresh:
            new[name] = term.refresh(start)
        if term.statistics:
            statistics |= term.statistics(start)
    return new, statistics


def due(run: Run, i: int, step: int) -> list[str]:
    """The terms of a phase whose memory or statistics are computed anew before a step."""
    phase = run.phases[i]
    since, found = step - phase.start, []
    for name, (_, term) in phase.plan.method.terms.items():
        every = 0
        if term.refresh and term.refresh_every:
            stream = run.material.streams[term.on[-1]]
            every = to_steps(term.refresh_every, batch_size=stream.batch_size, train_size=len(stream.source))
        if (term.refresh or term.statistics) and (not since or (every and since % every == 0)):
            found.append(name)
    return found
