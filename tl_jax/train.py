"""train(config, workdir): one run from the config to result.json. Loop and bookkeeping, top to bottom: fork it."""

import contextlib
import itertools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tl_jax import (
    audit,
    distributed,
    evaluate,
    metrics,
    options,
    outcome,
    part,
    pretrained,
    probe,
    sharding,
    steps,
    trees,
    workdir,
)
from tl_jax.checkpoint import Checkpoints
from tl_jax.logging import RunLog, say
from tl_jax.methods import closed_form
from tl_jax.models import adapt
from tl_jax.optim import to_steps
from tl_jax.preemption import Preempted
from tl_jax.run import Phase, Run, build


def train(
    config: ConfigDict,
    folder: str | pathlib.Path,
    *,
    verbose: bool = True,
    stop_requested: Callable[[int], bool] = lambda step: False,
) -> dict[str, Any]:
    """Runs one experiment in its workdir, or resumes it, or returns the result that is there.

    Without `verbose` the audit and the progress stay in their files, and no plots are drawn. Raises ValueError for a
    config that does not fit its data, weights or workdir, before any training; FloatingPointError at a loss that is not
    finite; Preempted, with everything saved, soon after `stop_requested(steps done)` has become true.
    """
    folder = pathlib.Path(folder)
    if result := distributed.from_first(lambda: finished(config, folder)):
        say(
            f"{folder} holds the finished run of these options: its result is shown, data and weights are not looked at"
        )
        return result
    parallel = sharding.make_parallel(config.parallel)
    run = build(config, parallel)
    audits = [phase.audit for phase in run.phases]
    for phase in run.phases if verbose else ():
        say(f"\nphase {phase.start} .. {phase.stop} of {run.total_steps} steps" if len(audits) > 1 else "")
        say(audit.to_table(phase.audit))

    def work():
        if config.method.name in closed_form.NAMES:
            return probe.probe(config, run, parallel, folder, verbose)
        return train_built(config, run, parallel, folder, verbose, stop_requested)

    if jax.process_index():
        return work()
    with workdir.lock(folder):
        workdir.write_json(folder / "config.json", options.identity(config))
        workdir.write_json(folder / "audit.json", audit.join(audits))
        return work()


def finished(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any] | None:
    """The result that lies in a workdir, if any; raises ValueError where the workdir is of other options."""
    workdir.check_options(folder, options.identity(config))
    path = folder / "result.json"
    return workdir.read_json(path) if path.exists() else None


def train_built(config: ConfigDict, run: Run, parallel: sharding.Parallel, folder, verbose, stop_requested):
    """The loop: steps, lines of metrics, evaluations and checkpoints, phase by phase, and at the end the score."""
    eval_fn = parallel.evaluate(steps.make_eval_step(run.model, mean=run.card.mean, std=run.card.std))

    def predict(state: steps.TrainState, split: str) -> metrics.Predictions:
        return evaluate.predict(eval_fn, steps.eval_variables(state), run.eval_batches[split], parallel)

    total, in_steps = run.total_steps, {"batch_size": config.batch_size, "train_size": len(run.data["train"])}
    log_every, eval_every = (to_steps(duration, **in_steps) for duration in (config.log_every, config.eval_every))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, rows, frozen = resume(checkpoints, config, run, parallel)
        start = int(state.step)
        first = run.phase_of(start)
        stream = run.batches.iterate(start, total, num_workers=config.data.workers)

        def idle() -> bool:
            return state.step.is_ready()

        with RunLog(folder, rows, start, total, verbose) as log, contextlib.closing(stream):
            for i in range(first, len(run.phases)):
                phase = run.phases[i]
                if i > first:
                    state, frozen = enter_phase(run, i, state, frozen, parallel)
                train_fn, so_far = None, max(start, phase.start)
                batches = map(parallel.put_batch, itertools.islice(stream, phase.stop - so_far))
                for done, batch in enumerate(log.feed(batches, idle), so_far + 1):
                    if train_fn is None:
                        train_fn, cost = compile_step(config, run, phase, parallel, state, batch)
                        note_cost(folder, run, i, cost)
                    state = train_fn(state, batch)
                    evaluates, stopping = done % eval_every == 0 or done == phase.stop, stop_requested(done)
                    if done % log_every == 0 or done == phase.stop:
                        check_finite(state, checkpoints)
                        state = log_training(log, state, phase)
                    if evaluates or stopping:
                        check_finite(state, checkpoints)
                        with log.untimed():
                            if evaluates and "val" in run.data:
                                log.evaluated(done, evaluate.scores(predict(state, "val")))
                            meta = {**run.identity, "rows": log.rows, "frozen": frozen}
                            checkpoints.save(done, state, meta, keep={best_step(log.rows)})
                    if stopping:
                        raise Preempted(f"stopped after step {done} of {total}")
        audit.check_frozen(frozen, audit.frozen_hashes(variables_of(state), [run.phases[-1].audit]))
        selected = best_step(log.rows) if config.select == "best_val" else total
        if selected != total:
            state = checkpoints.restore(selected, initial_state(config, run, run.phase_of(selected), parallel))
    return finish(config, run, folder, state, selected, predict, verbose)


def initial_state(config: ConfigDict, run: Run, i: int, parallel: sharding.Parallel) -> steps.TrainState:
    """The state of phase i as if training began with it: its structure, and for the first phase its values too."""
    phase = run.phases[i]
    variables = jax.tree.map(jnp.array, run.variables)  # copies: a step reuses the memory of the state before it
    state = steps.init_state(variables, phase.tx, phase.labels, config.seed, config.ema > 0, phase.model.frozen_norms)
    return parallel.replicate(state)


def enter_phase(
    run: Run, i: int, state: steps.TrainState, frozen: dict[str, str], parallel: sharding.Parallel
) -> tuple[steps.TrainState, dict[str, str]]:
    """Checks what the phase before kept frozen, and moves into phase i: its state, and hashes of what it freezes."""
    before, phase = run.phases[i - 1], run.phases[i]
    audit.check_frozen(frozen, audit.frozen_hashes(variables_of(state), [before.audit]))
    state = steps.enter_phase(state, phase.tx, phase.labels, before.length, phase.model.frozen_norms)
    state = parallel.replicate(state)
    return state, audit.frozen_hashes(variables_of(state), [phase.audit])


def variables_of(state: steps.TrainState) -> dict[str, Any]:
    """The variables as training moves them, without the moving average."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def compile_step(config: ConfigDict, run: Run, phase: Phase, parallel: sharding.Parallel, state, batch):
    """The compiled train step of a phase, and what it costs."""
    train_step = steps.make_train_step(
        phase.model, phase.method, phase.tx, phase.labels, mean=run.card.mean, std=run.card.std,
        accumulate=config.accumulate, ema=config.ema, axis_name=parallel.axis_name,
    )  # fmt: skip
    return parallel.compile(train_step, state, batch)


def note_cost(folder: pathlib.Path, run: Run, i: int, cost: dict[str, Any] | None = None) -> None:
    """Writes cost.json: what a step of phase i costs as compiled, beside what is known of the other phases.

    flops_per_step is the mean over the steps, memory_bytes the largest of the phases; seconds are those of training,
    compilation included, evaluation not, over all starts of the run; data_wait_seconds those of waiting for data.
    """
    if jax.process_index():
        return
    path = folder / "cost.json"
    phases = workdir.read_json(path)["phases"] if path.exists() else []
    if len(phases) != len(run.phases):  # none yet, or those of a run that ended before its first checkpoint
        phases = [None] * len(run.phases)
    if cost:
        phases[i] = {**cost, "steps": run.phases[i].length}
    known = all(phases)
    flops = [phase["flops_per_step"] * phase["steps"] for phase in phases if phase and phase["flops_per_step"]]
    memory = [phase["memory_bytes"] for phase in phases if phase and phase["memory_bytes"]]
    times = workdir.read_rows(folder / "timing.jsonl")
    table = {
        "trainable_parameters": audit.totals([phase.audit for phase in run.phases])["trainable"],
        "flops_per_step": sum(flops) / run.total_steps if known and len(flops) == len(phases) else None,
        "memory_bytes": max(memory, default=None),
        "seconds": round(sum(row["seconds"] for row in times), 3),
        "data_wait_seconds": round(sum(row.get("data_wait_seconds", 0.0) for row in times), 3),
        "steps": run.total_steps,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "phases": phases,
    }
    workdir.write_json(path, table)


def finish(config: ConfigDict, run: Run, folder, state, selected: int, predict, verbose: bool) -> dict[str, Any]:
    """Scores the selected state once on every held-out set, proves the audit, and writes what a run leaves."""
    split = "test" if "test" in run.data else "val"  # the one time that test is read
    predictions = {name: predict(state, name) for name in (split, *(name for name, *_ in config.data.also))}
    variables, audits = jax.device_get(steps.eval_variables(state)), [phase.audit for phase in run.phases]
    report = audit.prove(audits, audit.frozen_hashes(run.variables, audits), audit.frozen_hashes(variables, audits))
    result = {
        **outcome.facts(config, run, split),
        "chosen_on_scored_split": config.select == "best_val" and split == "val",
        "step": selected,
        "total_steps": run.total_steps,
        "trainable_parameters": report["totals"]["trainable"],
        "frozen_sha256": report["proof"]["sha256"],
    }
    if jax.process_index() == 0:
        note_cost(folder, run, len(run.phases) - 1)
        part.save(
            folder / "trained.safetensors", variables, report, run.card,
            model=config.model.name, weights=run.base, seed=config.seed, additions=run.model.additions,
        )  # fmt: skip
        if adapt.can_merge(run.model.additions):
            merged = adapt.merge(variables, run.model.additions)
            pretrained.export(merged, config.model.name, folder / "model.safetensors", card=run.card)
    return outcome.leave(config, folder, predictions, result, report, verbose)


def resume(
    checkpoints: Checkpoints, config: ConfigDict, run: Run, parallel: sharding.Parallel
) -> tuple[steps.TrainState, list[dict], dict[str, str]]:
    """State, metric rows and hashes of what is frozen, of the newest intact checkpoint, or as the run begins.

    Raises ValueError where the checkpoints are of another run: other options, groups, classes, card, data or weights.
    """
    for step in checkpoints.steps():
        try:
            saved = checkpoints.meta(step)
        except ValueError:
            continue  # unreadable: restore_latest passes over it and says so
        changed = {part: trees.difference(saved.get(part, {}), new) for part, new in run.identity.items()}
        if listing := [
            line for part, lines in changed.items() if lines for line in (f"{part} (saved -> now):", *lines)
        ]:
            raise ValueError("the checkpoints are of another run; choose another workdir:\n" + "\n".join(listing))
    restored = checkpoints.restore_latest(lambda step: initial_state(config, run, run.phase_of(step), parallel))
    if restored is None:
        return initial_state(config, run, 0, parallel), [], audit.frozen_hashes(run.variables, [run.phases[0].audit])
    for message in restored.damaged:
        say(f"passed over: {message}")
    say(f"resumed after step {restored.step}")
    return restored.state, restored.meta["rows"], restored.meta["frozen"]


def log_training(log: RunLog, state: steps.TrainState, phase: Phase) -> steps.TrainState:
    """Writes the means since the last line, and starts new sums."""
    sums = {name: float(value) for name, value in jax.device_get(state.sums).items()}
    step = int(state.step)
    row = {
        "train/loss": sums["loss"] / sums["examples"],
        "train/accuracy": sums["accuracy"] / sums["examples"],
        "train/grad_norm": sums["grad_norm"] / sums["steps"],
        "train/lr": float(phase.schedule(step - 1 - phase.start)),
    }
    if sums["penalty"]:
        row["train/penalty"] = sums["penalty"] / sums["examples"]
    log.write(step, row)
    log.progress(step, row, sums["examples"])
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), state.sums)
    return state._replace(sums=zeros)


def check_finite(state: steps.TrainState, checkpoints: Checkpoints) -> None:
    """Raises FloatingPointError with the first step at which the loss or a gradient was not finite."""
    if int(state.bad_step) != steps.NEVER:
        sound = checkpoints.steps()
        raise FloatingPointError(
            f"the loss or its gradient was not finite at step {int(state.bad_step)} (counted from 0), seen after step "
            f"{int(state.step)}; the last sound checkpoint: {sound[-1] if sound else 'none'}. "
            "Likely: lr too high, no warm-up, or clip=0"
        )


def best_step(rows: list[dict[str, Any]]) -> int | None:
    """The step of the highest val accuracy; among equals the lowest val loss, then the earliest."""

    def order(row):
        return row["val/accuracy"], -math.inf if row["val/loss"] is None else -row["val/loss"]

    scored = [row for row in rows if "val/accuracy" in row]
    return max(scored, key=order)["step"] if scored else None
