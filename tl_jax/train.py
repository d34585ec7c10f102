"""train(config, workdir): one run from the config to result.json. Wiring and loop, flat, top to bottom: fork it."""

import contextlib
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tl_jax import audit, evaluate, metrics, optim, plots, pretrained, sharding, steps, trees
from tl_jax.card import Card
from tl_jax.checkpoint import Checkpoints
from tl_jax.data import pipeline, sources
from tl_jax.logging import RunLog, say
from tl_jax.methods import Method, finetune
from tl_jax.preemption import Preempted

SPEED_ONLY = ("data.workers",)  # options that change no number, and so may differ when a run is resumed


class Run(NamedTuple):
    """What a config stands for, before the first step."""

    data: dict[str, sources.Source]  # train, and val or test or both
    model: Any
    variables: Any  # as loaded
    card: Card
    labels: dict[str, str]  # the group of each parameter path
    method: Method
    schedule: Any
    tx: Any
    total_steps: int
    audit: dict[str, Any]


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    verbose: bool = True,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs one experiment, or resumes it, or returns the result that is there.

    Without `verbose` the audit and the progress stay in their files, and no plots are drawn. Raises ValueError for a
    config that does not fit its data, weights or workdir, before any training; FloatingPointError at a loss that is not
    finite; Preempted, with everything saved, soon after `stop_requested()` has become true.
    """
    workdir, options = pathlib.Path(workdir), flat_options(config)
    check_workdir(workdir, options)
    if (workdir / "result.json").exists():
        say(f"{workdir} holds the finished run of this config; its result is shown")
        return json.loads((workdir / "result.json").read_text())

    parallel = sharding.make_parallel(config.parallel)
    run = build(config, parallel)
    if verbose:
        say(audit.to_table(run.audit))
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        audit.write_json(workdir / "config.json", options)
        audit.write_json(workdir / "audit.json", run.audit)

    image = {"mean": run.card.mean, "std": run.card.std}
    eval_fn = parallel.evaluate(steps.make_eval_step(run.model, **image))
    train_fn = parallel.train(
        steps.make_train_step(
            run.model, run.method, run.tx, run.labels, **image,
            accumulate=config.accumulate, ema=config.ema, axis_name=parallel.axis_name,
        )
    )  # fmt: skip
    batches = pipeline.train_batches(
        run.data["train"], card=run.card, augment=config.data.augment, batch_size=config.batch_size, seed=config.seed,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip

    # One size for val and test, so that one program serves both; it pads val, which is scored often, the least.
    count = len(run.data.get("val", run.data.get("test")))
    eval_size = parallel.round_up(-(-count // -(-count // config.eval_batch_size)))

    def predict(state: steps.TrainState, split: str) -> metrics.Predictions:
        variables = steps.eval_variables(state)
        return evaluate.predict(eval_fn, variables, run.data[split], parallel, card=run.card, batch_size=eval_size)

    total, in_steps = run.total_steps, {"batch_size": config.batch_size, "train_size": len(run.data["train"])}
    log_every, eval_every = (max(1, optim.to_steps(d, **in_steps)) for d in (config.log_every, config.eval_every))
    frozen, identity = audit.frozen_hashes(run.variables, run.audit), identify(run, options)
    state = parallel.replicate(steps.init_state(run.variables, run.tx, run.labels, config.seed, ema=config.ema > 0))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = resume(checkpoints, state, identity)
        start = int(state.step)
        stream = batches.iterate(start, total, num_workers=config.data.workers)
        with RunLog(workdir, start, total, verbose) as log, contextlib.closing(stream):
            for done, batch in enumerate(stream, start + 1):
                state = train_fn(state, parallel.put_batch(batch))
                if done % log_every == 0 or done == total:
                    check_finite(state, checkpoints)
                    state = log_training(log, state, run.schedule)
                evaluates, stopping = done % eval_every == 0 or done == total, stop_requested()
                if evaluates or stopping:
                    check_finite(state, checkpoints)
                    with log.untimed():
                        if evaluates and "val" in run.data:
                            log.evaluated(done, evaluate.scores(predict(state, "val")))
                        checkpoints.save(done, state, identity, keep={best_step(log.rows)})
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
        pretrained.export(variables, config.model.name, workdir / "model.safetensors", card=run.card)
        if verbose:
            plots.draw_run(log.rows, predictions, workdir)
        metrics.save_predictions(workdir / "predictions.npz", **predictions._asdict())
        audit.write_json(workdir / "audit.json", report)
        audit.write_json(workdir / "result.json", result)  # last: where it lies, the run is whole
    return result


def build(config: ConfigDict, parallel: sharding.Parallel) -> Run:
    """Data, network, rules and optimizer of a config; raises ValueError for what does not fit together."""
    sharding.check_batch_size(config.batch_size, config.accumulate, parallel.mesh.size)
    data = load_data(config)
    class_names = data["train"].class_names
    loaded = pretrained.load_with_origins(
        config.model.name, config.model.weights, len(class_names),
        image_size=config.model.image_size or None, head_init=config.model.head_init, seed=config.seed,
    )  # fmt: skip
    card = loaded.card.override(config.data.card.to_dict(), allowed=config.data.override_card)
    card = card.replace(class_names=class_names, source=f"{card.source or 'random weights'} -> {data['train'].name}")

    paths = list(trees.flatten(loaded.variables["params"]))
    rules = finetune.make_rules(config.method.name, paths, config.method.last_k, config.method.rules)
    matches = trees.match_rules(paths, rules)
    labels = {path: match.value for path, match in matches.items()}
    policies = audit.norm_policies(loaded.variables.get("batch_stats", {}), labels, config.method.norm)
    model = loaded.model.clone(
        dtype=jnp.dtype(config.model.dtype),
        dropout=config.model.dropout,
        drop_path=config.model.drop_path,
        remat=config.model.remat,
        frozen_norms=tuple(path for path, policy in policies.items() if policy == trees.FROZEN),
        axis_name=parallel.axis_name,
    )
    mixing = {name: config.method[name] for name in ("label_smoothing", "mixup", "cutmix")}
    method = finetune.make_method(rules, num_classes=len(class_names), **mixing)

    in_steps = {"batch_size": config.batch_size, "train_size": len(data["train"])}
    total_steps, warmup_steps = (optim.to_steps(d, **in_steps) for d in (config.total, config.schedule.warmup))
    schedule = optim.make_schedule(
        config.schedule.name, config.lr, total_steps=total_steps, warmup_steps=warmup_steps, args=config.schedule.args
    )
    default = optim.Group(
        config.optimizer, tuple(config.optimizer_args.items()), weight_decay=config.weight_decay, decay=config.decay
    )
    groups = optim.make_groups(labels, default, config.groups.to_dict())
    tx = optim.make_optimizer(labels, groups, schedule, config.clip)
    opt_state = jax.eval_shape(tx.init, trees.split(loaded.variables["params"], labels)[0])
    facts = {split: {"name": s.name, "examples": len(s), "fingerprint": s.fingerprint} for split, s in data.items()}
    report = audit.make_audit(loaded.variables, loaded.origins, matches, groups, policies, opt_state, card, facts)
    return Run(data, model, loaded.variables, card, labels, method, schedule, tx, total_steps, report)


def load_data(config: ConfigDict) -> dict[str, sources.Source]:
    """The sources that the config names, of train, val and test; raises ValueError where they do not fit together."""
    splits = {name: config.data[name] for name in ("train", "val", "test") if config.data[name]}
    if "train" not in splits or len(splits) < 2:
        raise ValueError(f"data names the splits {splits}: expected train, and val or test to score on")
    if config.select not in ("last", "best_val") or (config.select == "best_val" and "val" not in splits):
        raise ValueError(
            f"select={config.select!r} with the splits {splits}: expected last, or best_val with a val split"
        )
    data = {
        name: sources.load(
            config.data.source, split, shots=config.data.shots if name == "train" else 0, seed=config.seed,
            split_seed=config.data.split_seed, on_error=config.data.on_error, data_dir=config.data.data_dir or None,
        )
        for name, split in splits.items()
    }  # fmt: skip
    for name, source in data.items():
        if changed := trees.difference(dict(enumerate(data["train"].class_names)), dict(enumerate(source.class_names))):
            raise ValueError(f"the classes of train and {name} differ (train -> {name}):\n" + "\n".join(changed))
        if name != "train" and (shared := {*data["train"].ids} & {*source.ids}):
            raise ValueError(
                f"{len(shared)} of {len(source)} examples of {name} ({splits[name]!r}) are also in train "
                f"({splits['train']!r}), such as {min(shared)}; use splits that do not overlap"
            )
        if source.skipped:
            say(
                f"{source.name}: skipped {len(source.skipped)} unreadable images:\n  " + "\n  ".join(source.skipped[:5])
            )
    return data


def identify(run: Run, options: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for a checkpoint to be of this run, as flat tables of plain JSON data."""
    tables = {
        "options": {key: value for key, value in options.items() if key not in SPEED_ONLY},
        "labels": audit.labels_table(run.audit),
        "class_names": dict(enumerate(run.card.class_names)),
        "card": run.audit["card"],
        "data": {split: facts["fingerprint"] for split, facts in run.audit["data"].items()},
    }
    return json.loads(json.dumps(tables))


def resume(checkpoints: Checkpoints, state: steps.TrainState, identity: dict[str, Any]) -> steps.TrainState:
    """The newest intact checkpoint's state, or `state` where there is none; ValueError where it is of another run."""
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
        return state
    for message in restored.damaged:
        say(f"passed over: {message}")
    say(f"resumed after step {restored.step}")
    return restored.state


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
    scored = [row for row in rows if "val/accuracy" in row]
    order = lambda row: (row["val/accuracy"], -math.inf if row["val/loss"] is None else -row["val/loss"])  # noqa: E731
    return max(scored, key=order)["step"] if scored else None


def flat_options(config: ConfigDict) -> dict[str, Any]:
    """A config as `{dotted option: plain JSON value}`."""
    flat = {}
    for key, value in config.items():
        flat |= (
            {f"{key}.{k}": v for k, v in flat_options(value).items()} if isinstance(value, ConfigDict) else {key: value}
        )
    return json.loads(json.dumps(flat))


def check_workdir(workdir: pathlib.Path, options: dict[str, Any]) -> None:
    """Raises ValueError where the workdir has results or checkpoints of a run with other options."""
    path = workdir / "config.json"
    if not path.exists() or not ((workdir / "result.json").exists() or any(workdir.glob("checkpoints/[0-9]*"))):
        return  # nothing to protect: a run that ended before its first checkpoint may be started with other options
    old, new = (
        {k: v for k, v in table.items() if k not in SPEED_ONLY} for table in (json.loads(path.read_text()), options)
    )
    if changed := trees.difference(old, new):
        raise ValueError(
            f"{workdir} holds a run with other options; choose another --workdir (there -> now):\n" + "\n".join(changed)
        )
