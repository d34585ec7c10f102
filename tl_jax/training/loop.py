"""train(config, workdir): one run from the config to result.json. Loop and bookkeeping, top to bottom: fork it."""

import contextlib
import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import files, messages, trees
from tl_jax.methods import probes
from tl_jax.models import peft
from tl_jax.runtime import distributed, roofline, sharding, workdir
from tl_jax.runtime.checkpoint import Checkpoints
from tl_jax.runtime.log import RunLog, feed, say
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import artifacts, audit, evaluate, feature_cache, probe, steps
from tl_jax.training.build import Phase, Run, build
from tl_jax.training.optim import to_steps
from tl_jax.weights import delta as part
from tl_jax.weights import load


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
    if config.replicas:
        raise ValueError("the config has replicas, which are runs of their own: train it with training.sweep.sweep")
    parallel = sharding.make_parallel(config.parallel, fsdp=config.fsdp)
    run = build(config, parallel)
    audits = [phase.audit for phase in run.phases]
    for phase in run.phases if verbose else ():
        say(f"\nphase {phase.start} .. {phase.stop} of {run.total_steps} steps" if len(audits) > 1 else "")
        say(audit.to_table(phase.audit))
        if phase.prefix:
            once = "its outputs are kept" if phase.prefix.cached else "cache='features' would compute it once"
            say(f"frozen in front, up to {phase.prefix.cut}: no gradient, no statistics; {once}\n")

    def work():
        if config.method.name in probes.NAMES:
            return probe.probe(config, run, parallel, folder, verbose)
        return train_built(config, run, parallel, folder, verbose, stop_requested)

    if jax.process_index():
        return work()
    with workdir.lock(folder):
        files.write_json(folder / "config.json", options.identity(config))
        files.write_json(folder / "audit.json", audit.join(audits))
        return work()


def finished(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any] | None:
    """The result that lies in a workdir, if any; raises ValueError where the workdir is of other options."""
    workdir.check_options(folder, options.identity(config))
    path = folder / "result.json"
    return files.read_json(path) if path.exists() else None


def train_built(config: ConfigDict, run: Run, parallel: sharding.Parallel, folder, verbose, stop_requested):
    """The loop: steps, lines of metrics, evaluations and checkpoints, phase by phase, and at the end the score."""
    total, (log_every, eval_every) = run.total_steps, intervals(config, run)
    with Checkpoints(folder / "checkpoints", resting_hashes(run)) as checkpoints:
        state, meta = resume(
            checkpoints, run.identity, lambda step: initial_state(config, run, run.phase_of(step), parallel)
        )
        start, rows = int(state.step), meta.get("rows", [])
        frozen = meta["frozen"] if meta else audit.frozen_hashes(run.variables, [run.phases[0].audit])
        first = run.phase_of(start)
        predict = make_predict(run, parallel)
        line = None  # of metrics, whose sums may still be on their way: the loop waits for nothing it can do without

        def idle() -> bool:
            return state.step.is_ready()

        with RunLog(folder, rows, start, total, verbose) as log, contextlib.ExitStack() as streams:
            for i in range(first, len(run.phases)):
                phase = run.phases[i]
                if i > first:
                    state, frozen = enter_phase(run, i, state, frozen, parallel)
                train_fn, so_far, lr_fn = None, max(start, phase.start), jax.jit(phase.schedule)
                splits = [split for split in ("train", "val") if split in run.data]
                batches = batches_of(config, run, phase, splits, state, parallel, stop_requested)
                stream = batches["train"].iterate(so_far, phase.stop, num_workers=config.data.workers)
                streams.callback(stream.close)
                for done, batch in enumerate(feed([log], map(parallel.put_batch, stream), idle), so_far + 1):
                    if train_fn is None:
                        train_fn, cost = compile_step(config, run, phase, parallel, state, batch)
                        note_cost(folder, run, i, cost)
                        log.rates = rates_of(config, parallel, cost)
                    state = train_fn(state, batch)
                    if done == so_far + 1:
                        checkpoints.prepare(state)  # while the device is busy
                    evaluates, stopping = done % eval_every == 0 or done == phase.stop, stop_requested(done)
                    if done % log_every == 0 or done == phase.stop:
                        write_line(line, log, state, checkpoints)
                        state, line = end_line(state, done, lr_fn, phase, parallel)
                    line = write_line(line, log, state, checkpoints, wait=evaluates or stopping)
                    if evaluates or stopping:
                        check_finite(state, checkpoints)
                        if stopping:  # a checkpoint leaves out what rests: prove it while it is there
                            audit.check_frozen(frozen, audit.frozen_hashes(variables_of(state), [phase.audit]))
                        with log.untimed():
                            if evaluates and "val" in run.data:
                                log.evaluated(done, tasks.scores(predict(phase, state, batches["val"])))
                            meta = {**run.identity, "rows": log.rows, "frozen": frozen}
                            checkpoints.save(done, state, meta, keep={best_step(log.rows)})
                    if stopping:
                        raise Preempted(f"stopped after step {done} of {total}")
        audit.check_frozen(frozen, audit.frozen_hashes(variables_of(state), [run.phases[-1].audit]))
        selected = best_step(log.rows) if config.select == "best_val" else total
        if selected != total:
            state = checkpoints.restore(selected, initial_state(config, run, run.phase_of(selected), parallel))
    splits, phase = scored(config, run), run.phases[run.phase_of(selected)]  # the one time that test is read
    batches = batches_of(config, run, phase, splits, state, parallel, stop_requested)
    predictions = {name: predict(phase, state, batches[name]) for name in splits}
    return finish(config, run, folder, state, selected, predictions, verbose)


def batches_of(
    config: ConfigDict, run: Run, phase: Phase, splits: Sequence[str], state: steps.TrainState, parallel, stop_requested
) -> dict[str, Any]:
    """The batches of the splits as a phase reads them: of images, or of the features of what is frozen in front."""
    sets = {"train": run.batches, **run.eval_batches}
    sets = {split: sets[split] for split in splits}
    return hold(config, run, phase, sets, lambda: variables_of(state), parallel, stop_requested)


def hold(config, run: Run, phase: Phase, sets: dict[str, Any], variables: Callable, parallel, stop_requested):
    """The sets as they are, or of the features of what a phase freezes in front, made by variables()."""
    if phase.prefix is None or not phase.prefix.cached:
        return sets
    epochs = -(-run.total_steps * config.batch_size // len(run.data["train"]))
    return feature_cache.hold(
        sets, phase.prefix, variables(), run.card, parallel, views=min(config.views, epochs),
        batch_size=config.batch_size, folder=config.cache_dir,
        stop_requested=stop_requested,
    )  # fmt: skip


def make_predict(run: Run, parallel: sharding.Parallel) -> Callable:
    """predict(phase, state, batches of a split) -> its predictions; one program serves all phases where it can."""

    @functools.cache
    def eval_fn(prefix):
        return parallel.evaluate(make_eval_step(run, prefix))

    def predict(phase: Phase, state: steps.TrainState, batches) -> tasks.Predictions:
        return evaluate.predict(eval_fn(eval_prefix(run, phase)), steps.eval_variables(state), batches, parallel)

    return predict


def initial_state(config: ConfigDict, run: Run, i: int, parallel: sharding.Parallel) -> steps.TrainState:
    """The state of phase i as if training began with it: its structure, and for the first phase its values too."""
    phase = run.phases[i]

    def init(variables):
        variables = jax.tree.map(jnp.copy, variables)  # a step reuses the memory of the state before it
        return steps.init_state(
            variables, phase.tx, phase.labels, config.seed, config.ema > 0, phase.model.frozen_norms
        )

    placed = parallel.shardings(jax.eval_shape(init, run.variables))
    # One program: leaf by leaf each would be a program of its own.
    return jax.jit(init, out_shardings=placed)(parallel.place(run.variables))


def enter_phase(
    run: Run, i: int, state: steps.TrainState, frozen: dict[str, str], parallel: sharding.Parallel
) -> tuple[steps.TrainState, dict[str, str]]:
    """Checks what the phase before kept frozen, and moves into phase i: its state, and hashes of what it freezes."""
    before, phase = run.phases[i - 1], run.phases[i]
    audit.check_frozen(frozen, audit.frozen_hashes(variables_of(state), [before.audit]))
    state = steps.enter_phase(state, phase.tx, phase.labels, before.length, phase.model.frozen_norms)
    state = parallel.place(state)
    return state, audit.frozen_hashes(variables_of(state), [phase.audit])


def resting_hashes(run: Run) -> dict[str, str]:
    """`{collection/path: sha256}` of what no phase moves and the weight file gives to every start bit by bit.

    Not what was drawn at random or computed on the device, which another kind of device may do with other roundings.
    """
    audits = [phase.audit for phase in run.phases]
    tables = {"params": audits[0]["parameters"], "batch_stats": audits[0]["statistics"]}
    origins = {f"{name}/{row['path']}": row["origin"] for name, rows in tables.items() for row in rows}
    frozen, variables = audit.frozen_hashes(run.variables, audits), trees.flatten(run.variables)
    given = {path for path, origin in origins.items() if origin not in ("new", "copy") and "(resampled" not in origin}
    if any(origins[path] == "copy" for path in frozen):  # where it is one, and not what a penalty has computed
        values = set(trees.leaf_hashes({path: variables[path] for path in given}).values())
        given |= {path for path, sha256 in frozen.items() if sha256 in values}
    return {path: sha256 for path, sha256 in frozen.items() if path in given}


def variables_of(state: steps.TrainState) -> dict[str, Any]:
    """The variables as training moves them, without the moving average."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def intervals(config: ConfigDict, run: Run) -> tuple[int, int]:
    """log_every and eval_every in steps."""
    in_steps = {"batch_size": config.batch_size, "train_size": len(run.data["train"])}
    return to_steps(config.log_every, **in_steps), to_steps(config.eval_every, **in_steps)


def make_train_step(
    config: ConfigDict, run: Run, phase: Phase, parallel: sharding.Parallel, tx: Any, accumulate: int
) -> Callable:
    """The train step of a phase, with its optimizer or another one of its form."""
    return steps.make_train_step(
        phase.model, phase.method, tx, phase.labels, mean=run.card.mean, std=run.card.std, accumulate=accumulate,
        ema=config.ema, prefix=phase.prefix, axis_name=parallel.axis_name, whole=parallel.whole,
    )  # fmt: skip


def compile_step(config: ConfigDict, run: Run, phase: Phase, parallel: sharding.Parallel, state, batch):
    """The compiled train step of a phase, and what it costs."""
    step = make_train_step(config, run, phase, parallel, phase.tx, config.accumulate)
    return parallel.compile(step, state, batch)


def rates_of(config: ConfigDict, parallel: sharding.Parallel, cost: dict[str, Any]) -> Callable:
    """(steps per second) -> what of the devices a step of this cost uses, for timing.jsonl."""
    limit = roofline.peak(parallel.mesh.devices.flat[0].device_kind)
    return functools.partial(
        roofline.rates, cost=cost, limit=limit, dtype=config.model.dtype, devices=parallel.mesh.size
    )


def eval_prefix(run: Run, phase: Phase) -> steps.Prefix | None:
    """The prefix that evaluation in a phase must know of: one that is cached, or computes in another type."""
    plain = phase.prefix is None or (not phase.prefix.cached and phase.prefix.model.dtype == run.model.dtype)
    return None if plain else phase.prefix


def make_eval_step(run: Run, prefix: steps.Prefix | None = None) -> Callable:
    """The step that evaluates a run."""
    return steps.make_eval_step(run.model, mean=run.card.mean, std=run.card.std, prefix=prefix)


def note_cost(folder: pathlib.Path, run: Run, i: int, cost: dict[str, Any] | None = None, replicas: int = 1) -> None:
    """Writes cost.json: what a step of phase i costs as compiled, beside what is known of the other phases.

    flops_per_step is the mean over the steps, memory_bytes the largest of the phases; seconds are those of training,
    compilation included, evaluation not, over all starts of the run; data_wait_seconds those in which the devices had
    no work for want of data; flops_per_second, mfu and roofline are medians of the rows of timing.jsonl. Of a run that
    was trained together with others, seconds and flops_per_step are its share and "replicas" says how many shared;
    memory_bytes is that of all together.
    """
    if jax.process_index():
        return
    path = folder / "cost.json"
    phases = files.read_json(path)["phases"] if path.exists() else []
    if len(phases) != len(run.phases):  # none yet, or those of a run that ended before its first checkpoint
        phases = [None] * len(run.phases)
    if cost:
        share = cost["flops_per_step"] and cost["flops_per_step"] / replicas
        phases[i] = {**cost, "flops_per_step": share, "steps": run.phases[i].length}
    known = all(phases)
    flops = [phase["flops_per_step"] * phase["steps"] for phase in phases if phase and phase["flops_per_step"]]
    memory = [phase["memory_bytes"] for phase in phases if phase and phase["memory_bytes"]]
    rows = files.read_rows(folder / "timing.jsonl")
    rates = {name: [row[name] for row in rows if row.get(name)] for name in ("flops_per_second", "mfu", "roofline")}
    table = {
        "trainable_parameters": audit.totals([phase.audit for phase in run.phases])["trainable"],
        "flops_per_step": sum(flops) / run.total_steps if known and len(flops) == len(phases) else None,
        "memory_bytes": max(memory, default=None),
        **{name: statistics.median(values) if values else None for name, values in rates.items()},
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "data_wait_seconds": round(sum(row.get("data_wait_seconds", 0.0) for row in rows), 3),
        "steps": run.total_steps,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "phases": phases,
        **({"replicas": replicas} if replicas > 1 else {}),
    }
    files.write_json(path, table)


def finish(
    config: ConfigDict,
    run: Run,
    folder: pathlib.Path,
    state: steps.TrainState,
    selected: int,
    predictions: dict[str, tasks.Predictions],
    verbose: bool,
) -> dict[str, Any]:
    """Proves the audit and writes what a run leaves; predictions: of the selected state, see `scored`."""
    variables, audits = trees.to_host(steps.eval_variables(state)), [phase.audit for phase in run.phases]
    before, after = (audit.frozen_hashes(tree, audits) for tree in (run.variables, variables))
    return leave(config, run, folder, variables, predictions, (before, after), selected, verbose)


def scored(config: ConfigDict, run: Run) -> list[str]:
    """The splits that are scored at the end: the run's own first, then those of data.also."""
    return ["test" if "test" in run.data else "val", *(name for name, *_ in config.data.also)]


def leave(
    config: ConfigDict, run: Run, folder, variables, predictions, hashes, selected: int, verbose: bool, replicas=1
) -> dict[str, Any]:
    """Proves the audit by the hashes of what is frozen, (as loaded, at the end), and writes what a run leaves."""
    split, audits = scored(config, run)[0], [phase.audit for phase in run.phases]  # the one time that test is read
    report = audit.prove(audits, *hashes)
    result = {
        **artifacts.facts(config, run, split),
        "chosen_on_scored_split": config.select == "best_val" and split == "val",
        "step": selected,
        "total_steps": run.total_steps,
        "trainable_parameters": report["totals"]["trainable"],
        "frozen_sha256": report["proof"]["sha256"],
    }
    if jax.process_index() == 0:
        note_cost(folder, run, len(run.phases) - 1, replicas=replicas)
        part.save(
            folder / "trained.safetensors", variables, report, run.card,
            model=config.model.name, weights=run.base, seed=config.seed, additions=run.model.additions,
        )  # fmt: skip
        if peft.can_merge(run.model.additions):
            merged = peft.merge(variables, run.model.additions)
            load.export(merged, config.model.name, folder / "model.safetensors", card=run.card)
    return artifacts.leave(config, folder, predictions, result, report, verbose)


def resume(
    checkpoints: Checkpoints, identity: dict[str, Any], initial: Callable[[int], Any]
) -> tuple[Any, dict[str, Any]]:
    """State and JSON data of the newest intact checkpoint; as the run begins, its state initial(0) and no data.

    initial(step) has the structure of the state after `step` steps. Raises ValueError where the checkpoints are of
    another run: other options, groups, classes, card, data or weights.
    """
    for step in checkpoints.steps():
        try:
            saved = checkpoints.meta(step)
        except ValueError:
            continue  # unreadable: restore_latest passes over it and says so
        changed = {part: messages.difference(saved.get(part, {}), new) for part, new in identity.items()}
        if listing := [
            line for part, lines in changed.items() if lines for line in (f"{part} (saved -> now):", *lines)
        ]:
            raise ValueError("the checkpoints are of another run; choose another workdir:\n" + "\n".join(listing))
    restored = checkpoints.restore_latest(initial)
    if restored is None:
        return initial(0), {}
    for message in restored.damaged:
        say(f"passed over: {message}")
    say(f"resumed after step {restored.step}")
    return restored.state, restored.meta


class Line(NamedTuple):
    """A line of metrics as the device has it: the sums up to a step, and the learning rate of that step."""

    step: int
    sums: dict[str, jax.Array]
    lr: jax.Array


def end_line(
    state: steps.TrainState, step: int, lr_fn: Callable, phase: Phase, parallel: sharding.Parallel
) -> tuple[steps.TrainState, Line]:
    """Ends a line after `step` steps, and starts new sums; waits for nothing."""
    zeros = {name: np.zeros((), np.float32) for name in state.sums}
    lr = lr_fn(jax.device_put(np.int32(step - 1 - phase.start)))
    return state._replace(sums=parallel.place(zeros)), Line(step, state.sums, lr)


def write_line(
    line: Line | None, log: RunLog, state: steps.TrainState, checkpoints: Checkpoints, wait: bool = True
) -> Line | None:
    """Writes a line, if there is one; where its sums are not there yet and need not be waited for, gives it back.

    Raises FloatingPointError, as `check_finite`, where a loss in it was not finite.
    """
    if line is None or not (wait or line.sums["loss"].is_ready()):
        return line
    sums, lr = jax.device_get((line.sums, line.lr))
    if not math.isfinite(float(sums["loss"] + sums["grad_norm"])):
        check_finite(state, checkpoints)
    log_training(log, line.step, sums, lr)
    return None


def log_training(log: RunLog, step: int, sums: dict[str, Any], lr: Any) -> None:
    """Writes the means since the last line."""
    sums = {name: float(value) for name, value in sums.items()}
    row = {
        "train/loss": sums["loss"] / sums["examples"],
        "train/accuracy": sums["accuracy"] / sums["examples"],
        "train/grad_norm": sums["grad_norm"] / sums["steps"],
        "train/lr": float(lr),
    }
    if sums["penalty"]:
        row["train/penalty"] = sums["penalty"] / sums["examples"]
    log.write(step, row)
    log.progress(step, row, sums["examples"])


def check_finite(state: steps.TrainState, checkpoints: Checkpoints) -> None:
    """Raises FloatingPointError with the first step at which the loss or a gradient was not finite."""
    bad_step, step = (int(value) for value in jax.device_get((state.bad_step, state.step)))
    if bad_step != steps.NEVER:
        sound = checkpoints.steps()
        raise not_finite(bad_step, step, f"the last sound checkpoint: {sound[-1] if sound else 'none'}")


def not_finite(bad_step: int, step: int, left: str) -> FloatingPointError:
    """What a run that diverged ends with; left: what is there of it."""
    return FloatingPointError(
        f"the loss or its gradient was not finite at step {bad_step} (counted from 0), seen after step {step}; {left}. "
        "Likely: lr too high, no warm-up, or clip=0"
    )


def best_step(rows: list[dict[str, Any]]) -> int | None:
    """The step of the highest val accuracy; among equals the lowest val loss, then the earliest."""

    def order(row):
        return row["val/accuracy"], -math.inf if row["val/loss"] is None else -row["val/loss"]

    scored = [row for row in rows if "val/accuracy" in row]
    return max(scored, key=order)["step"] if scored else None
