"""train(config, workdir): one run from the config to result.json; train_together: several as one program."""

import contextlib
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tl_jax.core import files, manifest
from tl_jax.data import duplicates
from tl_jax.methods import probes
from tl_jax.runtime import distributed, preemption, sharding, wall, workdir
from tl_jax.runtime.checkpoint import Checkpoints
from tl_jax.runtime.log import log
from tl_jax.training import artifacts, audit, between, candidates, finished, probe, replicas, retrieval
from tl_jax.training.build import Run, assemble, prepare, scored_splits
from tl_jax.training.loop import Ended, Loop, best_step, not_finite
from tl_jax.training.settings import Settings, read
from tl_jax.training.single import Program, Single, Stop

ResultOrError = dict[str, Any] | FloatingPointError


def never(step: int) -> bool:
    """A `stop_requested` that nobody asks."""
    return False


def train(
    config: Any, folder: str | pathlib.Path, *, verbose: bool = True, stop_requested: Stop = never
) -> dict[str, Any]:
    """Runs one experiment in its workdir, or resumes it, or returns the result that is there.

    Without `verbose` the audit and the progress stay in their files, and no plots are drawn. Raises ValueError for a
    config that does not fit its data, weights or workdir, before any training; FloatingPointError at a loss that is not
    finite; Preempted, with everything saved, soon after `stop_requested(steps done)` has become true.
    """
    began, settings, folder = wall.seconds(), read(config), pathlib.Path(folder)
    if result := distributed.from_first(lambda: known_result(settings, folder)):
        log(f"{folder} holds the finished run of these options: its result is shown, data and weights are not read")
        if verbose and distributed.is_first() and not any(folder.glob("*.png")):  # stopped while they were drawn
            artifacts.draw(folder, settings.loop.feature_map)
            artifacts.log_result(folder, settings.shown)
        return result
    if settings.table["replicas"]:
        raise ValueError("the config has replicas, which are runs of their own: see tl_jax.studies")
    parallel = sharding.make_parallel(settings.loop.parallel, fsdp=settings.loop.fsdp)
    with wall.timed("loading"):
        run = assemble(settings, prepare(settings, parallel), parallel)
    if verbose:
        _show(run)
    with contextlib.ExitStack() as stack:
        if distributed.is_first():
            stack.enter_context(_opened(run, folder, began))
        if settings.phases[0].method.name in probes.WITHOUT_STEPS:
            return probe.probe(run, parallel, folder, verbose, stop_requested)
        (result,) = _train(Single(run, parallel), {0: folder}, folder, parallel, verbose, stop_requested).values()
    if isinstance(result, FloatingPointError):
        raise result
    return result


def train_together(
    configs: Sequence[Any], folders: Sequence[pathlib.Path | None], home: pathlib.Path, *, verbose: bool = False,
    stop_requested: Stop = never,
) -> list[ResultOrError | None]:  # fmt: skip
    """Trains configs that differ in replicable options alone as one program, each into its folder.

    Their checkpoints are in `home`. Returns each result.json, the error of a replica that diverged, which stops no
    other, or None where the folder is None: such a replica is trained, as the checkpoint is of the whole set, but
    writes nothing. Raises as `train` does.
    """
    began, parallel = wall.seconds(), sharding.make_parallel("jit")
    settings = [read(config) for config in configs]
    with wall.timed("loading"):
        program = replicas.make(settings, parallel)
    known = {j: known_result(settings[j], folder) for j, folder in enumerate(folders) if folder}
    results: dict[int, ResultOrError] = {j: result for j, result in known.items() if result}
    with contextlib.ExitStack() as stack:
        left = {j: folders[j] for j in known if j not in results}
        for j, folder in left.items():
            stack.enter_context(_opened(program.runs[j], folder, began, len(configs)))
        results |= _train(program, left, home, parallel, verbose, stop_requested)
    return [results.get(j) if folder else None for j, folder in enumerate(folders)]


def known_result(settings: Settings, folder: pathlib.Path) -> dict[str, Any] | None:
    """The result that lies in a workdir, if any; ValueError where that is of other options, or was changed."""
    workdir.check_options(folder, settings.table)
    return finished.read(folder) if (folder / "result.json").exists() else None


@contextlib.contextmanager
def _opened(run: Run, folder: pathlib.Path, began: Mapping[str, float], replicas: int = 1):
    """Holds the workdir of a run for this process, with its options and its audit in it."""
    wall.begin_run(folder, began)
    with workdir.lock(folder):
        with wall.timed("writing"):
            (folder / manifest.NAME).unlink(missing_ok=True)  # of a process that died before result.json
            found = {"model.weights_sha256": run.material.base["sha256"]}  # so that this config asks for the same bytes
            files.write_json(folder / "config.json", {**run.settings.table, **found})
            run.material.ledger.begin(folder)
            files.write_json(folder / "audit.json", audit.join([phase.audit for phase in run.phases]))
        try:
            yield
        except preemption.Preempted:
            artifacts.note_wall(folder, replicas)
            raise


def _show(run: Run) -> None:
    """The audit of each phase, and what is cached, on the console."""
    for phase in run.phases:
        log(f"\nphase {phase.start} .. {phase.stop} of {run.total_steps} steps" if len(run.phases) > 1 else "")
        log(audit.to_table(phase.audit, run.material.model.cuts))
        told = audit.total_lines(phase.audit), audit.missing_lines(phase.audit), audit.sanity_lines(phase.audit)
        for line in itertools.chain(*told):
            log(line)
        prefix = phase.plan.prefix
        if prefix and (prefix.cached or "probe" not in phase.audit):
            once = "its outputs are cached" if prefix.cached else "cache='features' would compute it once"
            log(f"frozen prefix, up to {prefix.cut}: no gradient, no statistics; {once}")
    log(duplicates.summary(run.material.duplicates))
    for (stream, name), count in run.material.shared.items():
        log(f"transductive: {count} examples of {name}, which is scored, are in the training stream {stream!r}")


def _train(
    program: Program, folders: Mapping[int, pathlib.Path], home: pathlib.Path, parallel, verbose: bool, stop: Stop
) -> dict[int, ResultOrError]:
    """Trains a program and writes what its runs leave; the result or the error of each run that has a folder."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(preemption.saved_by(None))  # while the last checkpoint is written at the end
        checkpoints = stack.enter_context(Checkpoints(home / "checkpoints", program.constant_hashes()))
        stack.enter_context(preemption.saved_by(checkpoints.wait))
        loop = Loop(program, checkpoints, folders, parallel, verbose, stop)
        try:
            ended = loop.run()
        except FloatingPointError as error:  # of the only run, which ends at once
            return dict.fromkeys(folders, error)
        results: dict[int, ResultOrError] = {j: error for j, error in ended.failed.items() if j in folders}
        left = [j for j in folders if j not in results]
        # All wait for the choices: behind this line each process opens sealed labels.
        distributed.from_first(lambda: [candidates.choose(program.runs[j], folders[j], ended.rows[j]) for j in left])
        first = program.runs[0]
        last = first.settings.loop.select == "last"
        selected = {j: ended.step if last else best_step(first, ended.rows[j]) for j in left}
        for step in sorted(set(selected.values())):
            chosen = [j for j in left if selected[j] == step]
            results |= _finish(program, ended, step, chosen, folders, checkpoints, parallel, verbose, stop)
    return results


def _finish(
    program: Program,
    ended: Ended,
    step: int,
    chosen: Sequence[int],
    folders,
    checkpoints: Checkpoints,
    parallel,
    verbose,
    stop,
) -> dict[int, ResultOrError]:
    """Scores the runs whose selected step this is, and writes what they leave."""
    run, results, i = program.runs[0], {}, program.runs[0].phase_of(step)
    state = ended.state if step == ended.step else checkpoints.restore(step, program.initial(i))
    names = artifacts.wanted_splits(run)
    with wall.timed("evaluation"):
        sets = program.batches(i, state, names, stop)  # the one time that test is read
        predictions = {name: program.predict(i, state, sets[name], chosen) for name in names}
    for j in chosen:
        own = {name: found[j] for name, found in predictions.items()}
        if errors := [found for found in own.values() if isinstance(found, FloatingPointError)]:
            results[j] = not_finite(step - 1, step, f"its outputs are not: {errors[0]}")
            continue
        own = candidates.opened(program.runs[j], own, step)
        own |= between.answers(program.runs[j], i, program.memory(state, j), step)
        variables = program.variables(state, j)
        with wall.timed("evaluation"):
            further = retrieval.report(program.runs[j], i, variables, scored_splits(run), parallel, folders[j])
        results[j] = artifacts.finalize(
            program.runs[j], folders[j], variables, own, step=step, last_step=ended.step, further=further,
            verbose=verbose and len(program.runs) == 1, replicas=len(program.runs),
        )  # fmt: skip
    return results
