"""config.replicas, or the runs of a study that differ as replicas do: trained together, each into its own folder."""

import contextlib
import functools
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich import box
from rich.table import Table

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import files
from tl_jax.runtime import sharding, workdir
from tl_jax.runtime.checkpoint import Checkpoints
from tl_jax.runtime.log import RunLog, feed, say
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import audit, loop, replicas, steps
from tl_jax.training.replicas import Group

Outcome = dict[str, Any] | FloatingPointError


def sweep(
    config: ConfigDict,
    folder: pathlib.Path,
    *,
    verbose: bool = True,
    stop_requested: Callable[[int], bool] = lambda step: False,
) -> dict[str, Any]:
    """Trains config.replicas, each into `folder`/replicas/NAME, and returns replicas.json: a row each, the best by val.

    As `train.train` it resumes, or returns what is there. Raises FloatingPointError where all replicas diverged.
    """
    folder, path = pathlib.Path(folder), pathlib.Path(folder) / "replicas.json"
    workdir.check_options(folder, options.identity(config))
    if path.exists():
        return files.read_json(path)
    options.check(config)
    configs = options.replicas(config)
    folders = [folder / "replicas" / name_of(i, dict(changes)) for i, changes in enumerate(config.replicas)]
    with workdir.lock(folder):
        files.write_json(folder / "config.json", options.identity(config))
        outcomes = train_together(configs, folders, folder, verbose=verbose, stop_requested=stop_requested)
        rows = [_row(*each) for each in zip(config.replicas, folders, outcomes, strict=True)]
        if all(row["error"] for row in rows):
            raise FloatingPointError("all replicas diverged:\n" + "\n".join(f"{r['name']}: {r['error']}" for r in rows))
        table = {"replicas": rows, "best": best_of(rows)}
        files.write_json(path, table)
    return table


def train_together(
    configs: Sequence[ConfigDict],
    folders: Sequence[pathlib.Path | None],
    home: pathlib.Path,
    *,
    verbose: bool = False,
    stop_requested: Callable[[int], bool] = lambda step: False,
) -> list[Outcome | None]:
    """Trains configs that differ in options.REPLICABLE alone, each into its folder; their checkpoints lie in `home`.

    Returns each result.json, the error of a replica that diverged, which stops no other, or None where the folder is
    None: such a replica is trained, so that a checkpoint of the same set of configs goes on, but leaves nothing. Raises
    ValueError for configs that do not fit together or anything, and Preempted as `train` does.
    """
    parallel = sharding.make_parallel("jit")
    group = replicas.build(configs, parallel)
    done = {i: loop.finished(group.configs[i], folder) for i, folder in enumerate(folders) if folder}
    outcomes: dict[int, Outcome] = {i: result for i, result in done.items() if result}
    with contextlib.ExitStack() as stack:
        open_folders = {i: folders[i] for i in done if i not in outcomes}
        for i, folder in open_folders.items():
            stack.enter_context(workdir.lock(folder))
            files.write_json(folder / "config.json", options.identity(group.configs[i]))
            files.write_json(folder / "audit.json", audit.join([phase.audit for phase in group.runs[i].phases]))
        checkpoints = stack.enter_context(Checkpoints(home / "checkpoints"))
        predict = replicas.make_predict(group, parallel)
        state, rows, failed = _loop(group, open_folders, checkpoints, parallel, predict, verbose, stop_requested)
        left = {i: folder for i, folder in open_folders.items() if i not in failed}
        if left:
            failed |= _finish(group, state, rows, left, checkpoints, parallel, predict, stop_requested)
        outcomes |= failed
    return [outcomes.get(i) if folder else None for i, folder in enumerate(folders)]


def _loop(
    group: Group, folders: Mapping[int, pathlib.Path], checkpoints, parallel, predict, verbose: bool, stop_requested
):
    """The loop of `train.train_built` for all replicas: the last state, all rows, and the errors of who diverged."""
    config, run, count = group.configs[0], group.runs[0], len(group.runs)
    total, (log_every, eval_every) = run.total_steps, loop.intervals(config, run)
    identity = _identity(group)
    state, meta = loop.resume(
        checkpoints, identity, lambda step: replicas.initial_state(group, run.phase_of(step), parallel)
    )
    start, rows = int(state["step"]), meta.get("rows") or [[] for _ in group.runs]
    frozen = meta["frozen"] if meta else replicas.frozen_hashes(group, state, 0)
    failed = {int(i): FloatingPointError(text) for i, text in meta.get("failed", {}).items()}
    first = run.phase_of(start)

    def idle() -> bool:
        return state["step"].is_ready()

    with contextlib.ExitStack() as stack:
        logs = {i: RunLog(folders.get(i), rows[i], start, total, False, count) for i in range(count)}
        for i in range(first, len(run.phases)):
            phase, step_fn, so_far = run.phases[i], None, max(start, run.phases[i].start)
            if i > first:
                audit.check_frozen(frozen, replicas.frozen_hashes(group, state, i - 1))
                state = replicas.enter_phase(group, i, state, parallel)
                frozen = replicas.frozen_hashes(group, state, i)
            numbers = parallel.place(replicas.numbers_of(group, i))
            splits = [split for split in ("train", "val") if split in run.data]
            sets = replicas.batches_of(group, i, splits, parallel, stop_requested)
            stream = replicas.streams(group, sets["train"], so_far, phase.stop, stack)
            put = functools.partial(replicas.put_batches, group, parallel=parallel)
            for done, batch in enumerate(feed(logs.values(), map(put, stream), idle), so_far + 1):
                inputs = {"shared": group.shared, "streams": {**group.streams, "batch": batch}, "numbers": numbers}
                if step_fn is None:
                    step_fn, cost = parallel.compile(replicas.make_train_step(group, i, parallel), state, inputs)
                    for j, folder in folders.items():
                        loop.note_cost(folder, group.runs[j], i, cost, count)
                state = step_fn(state, inputs)
                evaluates, stopping = done % eval_every == 0 or done == phase.stop, stop_requested(done)
                if done % log_every == 0 or done == phase.stop:
                    failed |= _diverged(group, state, failed)
                    state = _log_training(group, i, state, _going(logs, failed))
                if evaluates or stopping:
                    failed |= _diverged(group, state, failed)
                    with _untimed(logs):
                        if evaluates and "val" in run.data:
                            failed |= _evaluate(predict, i, state, sets["val"], _going(logs, failed), verbose)
                        best = {loop.best_step(log.rows) for log in _going(logs, failed).values()}
                        meta = {
                            **identity, "rows": [log.rows for log in logs.values()], "frozen": frozen,
                            "failed": {str(j): str(error) for j, error in failed.items()},
                        }  # fmt: skip
                        checkpoints.save(done, state, meta, keep=best if config.select == "best_val" else ())
                if len(failed) == count:
                    return state, rows, failed
                if stopping:
                    raise Preempted(f"stopped after step {done} of {total}")
    audit.check_frozen(frozen, replicas.frozen_hashes(group, state, -1))
    return state, [log.rows for log in logs.values()], failed


def _identity(group: Group) -> dict[str, Any]:
    """What must be the same for a checkpoint to be of this group."""
    return {
        **group.runs[0].identity,
        "replicas": {str(i): options.fingerprint(config) for i, config in enumerate(group.configs)},
        "data of replicas": {str(i): run.data["train"].fingerprint for i, run in enumerate(group.runs)},
    }


def _going(logs: Mapping[int, RunLog], failed: Mapping[int, Any]) -> dict[int, RunLog]:
    return {i: log for i, log in logs.items() if i not in failed}


@contextlib.contextmanager
def _untimed(logs: Mapping[int, RunLog]):
    with contextlib.ExitStack() as stack:
        for log in logs.values():
            stack.enter_context(log.untimed())
        yield


def _diverged(group: Group, state: Mapping[str, Any], known: Mapping[int, Any]) -> dict[int, FloatingPointError]:
    """The errors of the replicas that have met a number that is not finite and are not known yet."""
    bad, step = np.asarray(state["own"]["bad_step"]).ravel(), int(state["step"])
    steps_of = {i: int(bad[place]) for i, place in enumerate(group.places) if i not in known}
    return {
        i: loop.not_finite(bad_step, step, "the runs beside it go on")
        for i, bad_step in steps_of.items()
        if bad_step != steps.NEVER
    }


def _log_training(group: Group, i: int, state: Mapping[str, Any], logs: Mapping[int, RunLog]) -> dict[str, Any]:
    """A line for every replica that goes on; the state with new sums."""
    phase, places, step = group.runs[0].phases[i], group.places, int(state["step"])
    sums = {name: value.ravel() for name, value in jax.device_get(state["own"]["sums"]).items()}
    lr = replicas.numbers_of(group, i)["lr"].ravel()
    rates = np.asarray(jax.vmap(lambda lr: phase.make_schedule(lr)(step - 1 - phase.start))(lr))
    for j, log in logs.items():
        own = {name: value[places[j]] for name, value in sums.items()}
        loop.log_training(log, step, own, rates[places[j]])
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), state["own"]["sums"])
    return {**state, "own": {**state["own"], "sums": zeros}}


def _evaluate(
    predict: Callable, i: int, state: Mapping[str, Any], val: Any, logs: Mapping[int, RunLog], verbose: bool
) -> dict[int, FloatingPointError]:
    """Scores on val of every replica that goes on; the errors of those that cannot be scored."""
    found, step = predict(i, replicas.moved(state), val, logs), int(state["step"])
    failed = {j: each for j, each in found.items() if isinstance(each, FloatingPointError)}
    scores = {j: tasks.scores(predictions) for j, predictions in found.items() if j not in failed}
    for j, values in scores.items():
        logs[j].evaluated(step, values)
    if verbose and scores:
        best = max(scores, key=lambda j: scores[j]["accuracy"])
        say(f"step {step}  {len(scores)} replicas, best val accuracy {scores[best]['accuracy']:.4g} (replica {best})")
    return failed


def _finish(
    group: Group, state, rows, folders: Mapping[int, pathlib.Path], checkpoints, parallel, predict, stop_requested
) -> dict[int, Outcome]:
    """Chooses, scores and proves each replica, and writes what a run leaves."""
    config, run, total, places = group.configs[0], group.runs[0], group.runs[0].total_steps, group.places
    chosen = {i: loop.best_step(rows[i]) if config.select == "best_val" else total for i in folders}
    own = jax.device_get(replicas.moved(state))
    flat = {path: np.array(leaf).reshape(-1, *leaf.shape[group.grid.ndim :]) for path, leaf in own.items()}
    for step in sorted(set(chosen.values()) - {total}):
        then = replicas.moved(checkpoints.restore(step, replicas.initial_state(group, run.phase_of(step), parallel)))
        for path, leaf in jax.device_get(then).items():
            for i in (i for i in folders if chosen[i] == step):
                flat[path][places[i]] = leaf.reshape(flat[path].shape)[places[i]]
    selected = {path: leaf.reshape(*group.grid.shape, *leaf.shape[1:]) for path, leaf in flat.items()}
    placed = parallel.place(selected)
    predictions: dict[str, dict[int, Any]] = {name: {} for name in loop.scored(config, run)}
    for phase in sorted({run.phase_of(step) for step in chosen.values()}):
        wanted = [i for i, step in chosen.items() if run.phase_of(step) == phase]
        for name, batches in replicas.batches_of(group, phase, list(predictions), parallel, stop_requested).items():
            predictions[name] |= predict(phase, placed, batches, wanted)
    shared, resting = jax.device_get((group.shared, group.streams["resting"]))
    outcomes, proofs = {}, {}
    for i, folder in folders.items():
        row = places[i] // group.grid.shape[-1]
        rest = {**shared, **{path: leaf[row] if group.grid.ndim == 2 else leaf for path, leaf in resting.items()}}
        variables = replicas.whole(rest, {path: leaf[places[i]] for path, leaf in flat.items()})
        if row not in proofs:  # what rests is that of the stream
            audits = [phase.audit for phase in group.runs[i].phases]
            proofs[row] = [audit.frozen_hashes(tree, audits) for tree in (group.runs[i].variables, variables)]
        own_predictions = {name: made[i] for name, made in predictions.items()}
        if errors := [made for made in own_predictions.values() if isinstance(made, FloatingPointError)]:
            outcomes[i] = errors[0]
            continue
        outcomes[i] = loop.leave(
            group.configs[i], group.runs[i], folder, variables, own_predictions, proofs[row], chosen[i], False,
            len(group.runs),
        )  # fmt: skip
    return outcomes


def name_of(i: int, changes: Mapping[str, Any]) -> str:
    """The folder of a replica: its number and what it sets, such as 03-lr=0.1,weight_decay=0.0001."""
    text = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
    return f"{i:02}-{re.sub(r'[^-+.,=_a-zA-Z0-9]+', '_', text)[:60]}".rstrip("-_.")


def _row(changes: Sequence, folder: pathlib.Path, outcome: Outcome) -> dict[str, Any]:
    """A line of replicas.json; val: accuracy with its 95 % interval, and loss, at the step that was selected."""
    row = {"name": folder.name, "options": dict(changes), "error": None, "step": None, "val": None}
    if isinstance(outcome, FloatingPointError):
        files.write_json(folder / "failed.json", {"error": f"{type(outcome).__name__}: {outcome}"})
        return {**row, "error": str(outcome)}
    scored = {r["step"]: r for r in files.read_rows(folder / "metrics.jsonl") if "val/accuracy" in r}
    if at := scored.get(outcome["step"]):
        count = files.read_json(folder / "audit.json")["phases"][0]["data"]["val"]["examples"]
        low, high = _wilson(at["val/accuracy"], count)
        row["val"] = {
            "accuracy": at["val/accuracy"], "low": low, "high": high, "count": count, "loss": at["val/loss"]
        }  # fmt: skip
    return {**row, "step": outcome["step"]}


def _wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a share of `count` examples (Wilson 1927)."""
    centre, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)


def best_of(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of the replica that val prefers: by accuracy, then loss, then order; None without val, never by test."""
    scored = [row for row in rows if row["val"]]

    def order(row):
        loss = row["val"]["loss"]
        return row["val"]["accuracy"], -math.inf if loss is None else -loss

    return max(scored, key=order)["name"] if scored else None


def to_table(table: Mapping[str, Any]) -> Table:
    """replicas.json for the console."""
    shown = Table(title=f"{len(table['replicas'])} replicas", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("replica", "val accuracy", "95 % interval", "val loss", "step", ""):
        shown.add_column(name, justify="left" if name in ("replica", "") else "right", no_wrap=True)
    for row in table["replicas"]:
        mark = "diverged" if row["error"] else "best by val" if row["name"] == table["best"] else ""
        if val := row["val"]:
            loss = "-" if val["loss"] is None else f"{val['loss']:.4g}"
            cells = (f"{val['accuracy']:.4f}", f"{val['low']:.4f} .. {val['high']:.4f}", loss)
        else:
            cells = ("-", "-", "-")
        shown.add_row(row["name"], *cells, str(row["step"] or "-"), mark)
    return shown
