"""train(config, workdir): one run from the config to result.json. Loop and bookkeeping, top to bottom: fork it."""

import contextlib
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tl_jax import audit, evaluate, metrics, options, plots, pretrained, sharding, steps, trees, workdir
from tl_jax.checkpoint import Checkpoints
from tl_jax.logging import RunLog, say
from tl_jax.optim import to_steps
from tl_jax.preemption import Preempted
from tl_jax.run import Run, build


def train(
    config: ConfigDict,
    folder: str | pathlib.Path,
    *,
    verbose: bool = True,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs one experiment in its workdir, or resumes it, or returns the result that is there.

    Without `verbose` the audit and the progress stay in their files, and no plots are drawn. Raises ValueError for a
    config that does not fit its data, weights or workdir, before any training; FloatingPointError at a loss that is not
    finite; Preempted, with everything saved, soon after `stop_requested()` has become true.
    """
    folder = pathlib.Path(folder)
    workdir.check_options(folder, options.identity(config))
    if (folder / "result.json").exists():
        say(
            f"{folder} holds the finished run of these options: its result is shown, data and weights are not looked at"
        )
        return workdir.read_json(folder / "result.json")
    parallel = sharding.make_parallel(config.parallel)
    run = build(config, parallel)
    if verbose:
        say(audit.to_table(run.audit))
    if jax.process_index():
        return train_built(config, run, parallel, folder, verbose, stop_requested)
    with workdir.lock(folder):
        workdir.write_json(folder / "config.json", options.identity(config))
        workdir.write_json(folder / "audit.json", run.audit)
        return train_built(config, run, parallel, folder, verbose, stop_requested)


def train_built(config: ConfigDict, run: Run, parallel: sharding.Parallel, folder, verbose, stop_requested):
    """The loop: steps, lines of metrics, evaluations and checkpoints, and at the end the score."""
    image = {"mean": run.card.mean, "std": run.card.std}
    eval_fn = parallel.evaluate(steps.make_eval_step(run.model, **image))
    train_step = steps.make_train_step(
        run.model, run.method, run.tx, run.labels, **image,
        accumulate=config.accumulate, ema=config.ema, axis_name=parallel.axis_name,
    )  # fmt: skip
    train_fn = parallel.train(train_step)

    def predict(state: steps.TrainState, split: str) -> metrics.Predictions:
        return evaluate.predict(eval_fn, steps.eval_variables(state), run.eval_batches[split], parallel)

    total, in_steps = run.total_steps, {"batch_size": config.batch_size, "train_size": len(run.data["train"])}
    log_every, eval_every = (to_steps(duration, **in_steps) for duration in (config.log_every, config.eval_every))
    frozen = audit.frozen_hashes(run.variables, run.audit)
    state = steps.init_state(run.variables, run.tx, run.labels, config.seed, config.ema > 0, run.model.frozen_norms)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state, rows = resume(checkpoints, parallel.replicate(state), run.identity)
        start = int(state.step)
        stream = run.batches.iterate(start, total, num_workers=config.data.workers)
        with RunLog(folder, rows, start, total, verbose) as log, contextlib.closing(stream):
            for done, batch in enumerate(stream, start + 1):
                state = train_fn(state, parallel.put_batch(batch))
                evaluates, stopping = done % eval_every == 0 or done == total, stop_requested()
                if done % log_every == 0 or done == total:
                    check_finite(state, checkpoints)
                    state = log_training(log, state, run.schedule)
                if evaluates or stopping:
                    check_finite(state, checkpoints)
                    with log.untimed():
                        if evaluates and "val" in run.data:
                            log.evaluated(done, evaluate.scores(predict(state, "val")))
                        meta = {**run.identity, "rows": log.rows}
                        checkpoints.save(done, state, meta, keep={best_step(log.rows)})
                if stopping:
                    raise Preempted(f"stopped after step {done} of {total}")
        selected = best_step(log.rows) if config.select == "best_val" else total
        if selected != total:
            state = checkpoints.restore(selected, state)

    split = "test" if "test" in run.data else "val"  # the one time that test is read
    predictions = predict(state, split)
    variables = jax.device_get(steps.eval_variables(state))
    report = audit.prove(run.audit, frozen, audit.frozen_hashes(variables, run.audit))
    result = {
        "model": run.card.model,
        "method": config.method.name,
        "data": run.data[split].name,
        "split": split,
        "select": config.select,
        "chosen_on_scored_split": config.select == "best_val" and split == "val",
        "step": selected,
        "total_steps": total,
        "trainable_parameters": report["totals"]["trainable"],
        "frozen_sha256": report["proof"]["sha256"],
        "metrics": metrics.summarize(predictions, resamples=config.resamples),
    }
    if jax.process_index() == 0:
        metrics.save_predictions(folder / "predictions.npz", **predictions._asdict())
        workdir.write_json(folder / "audit.json", report)
        pretrained.export(variables, config.model.name, folder / "model.safetensors", card=run.card)
        if verbose:
            plots.draw_run(log.rows, predictions, folder)
        workdir.write_json(folder / "result.json", result)  # last: where it lies, the run is whole
    return result


def resume(checkpoints: Checkpoints, state: steps.TrainState, identity: dict[str, Any]) -> tuple[Any, list[dict]]:
    """State and metric rows of the newest intact checkpoint, or `state` and none where there is no checkpoint.

    Raises ValueError where the checkpoints are of another run: other options, groups, classes, card, data or weights.
    """
    for step in checkpoints.steps():
        try:
            saved = checkpoints.meta(step)
        except ValueError:
            continue  # unreadable: restore_latest passes over it and says so
        changed = {part: trees.difference(saved.get(part, {}), new) for part, new in identity.items()}
        if listing := [
            line for part, lines in changed.items() if lines for line in (f"{part} (saved -> now):", *lines)
        ]:
            raise ValueError("the checkpoints are of another run; choose another workdir:\n" + "\n".join(listing))
    restored = checkpoints.restore_latest(state)
    if restored is None:
        return state, []
    for message in restored.damaged:
        say(f"passed over: {message}")
    say(f"resumed after step {restored.step}")
    return restored.state, restored.meta["rows"]


def log_training(log: RunLog, state: steps.TrainState, schedule) -> steps.TrainState:
    """Writes the means since the last line, and starts new sums."""
    sums = {name: float(value) for name, value in jax.device_get(state.sums).items()}
    step = int(state.step)
    row = {
        "train/loss": sums["loss"] / sums["examples"],
        "train/accuracy": sums["accuracy"] / sums["examples"],
        "train/grad_norm": sums["grad_norm"] / sums["steps"],
        "train/lr": float(schedule(step - 1)),
    }
    log.write(step, row)
    log.progress(step, row, sums["examples"])
    return state._replace(sums=jax.tree.map(jnp.zeros_like, state.sums))


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
