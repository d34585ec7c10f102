"""Many runs in one program: replicas differ in learning rate, weight decay, seed or shots and share what is frozen."""

import contextlib
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from rich import box
from rich.table import Table

from tl_jax import audit, evaluate, options, sharding, steps, train, trees, workdir
from tl_jax.checkpoint import Checkpoints
from tl_jax.logging import RunLog, say
from tl_jax.metrics import make_predictions
from tl_jax.preemption import Preempted
from tl_jax.run import Run, assemble, check, prepare

IN_MEMORY = 2**30  # bytes of predictions that are held at once when the replicas are scored
Outcome = dict[str, Any] | FloatingPointError


class Group(NamedTuple):
    """Runs that are one program. Replicas of one seed and number of shots see the same batches: a stream.

    grid: the replica at each place, [M] where all are of one stream, else [D, M], a row a stream; places that are left
    over repeat a replica. own: what moves, `collection/path`, which every place has for itself. shared: the leaves
    that rest, equal for all. streams: the random key and the resting leaves that differ, [D, ...] where there are D.
    """

    configs: list[ConfigDict]
    runs: list[Run]
    grid: np.ndarray
    own: frozenset[str]
    shared: dict[str, jax.Array]
    streams: dict[str, Any]

    @property
    def places(self) -> list[int]:
        """Where each replica is in the flattened grid."""
        return [int(np.flatnonzero(self.grid == i)[0]) for i in range(len(self.runs))]

    def over(self, function: Callable, out_axes: Any = 0) -> Callable:
        """function(own, stream, numbers) at every place of the grid; what does not depend on a place is done once."""
        for in_axes in ((0, None, 0), (0, 0, 0))[: self.grid.ndim]:
            function = jax.vmap(function, in_axes, out_axes)
        return function


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
    group = build(configs, parallel)
    done = {i: train.finished(group.configs[i], folder) for i, folder in enumerate(folders) if folder}
    outcomes: dict[int, Outcome] = {i: result for i, result in done.items() if result}
    with contextlib.ExitStack() as stack:
        open_folders = {i: folders[i] for i in done if i not in outcomes}
        for i, folder in open_folders.items():
            stack.enter_context(workdir.lock(folder))
            workdir.write_json(folder / "config.json", options.identity(group.configs[i]))
            workdir.write_json(folder / "audit.json", audit.join([phase.audit for phase in group.runs[i].phases]))
        checkpoints = stack.enter_context(Checkpoints(home / "checkpoints"))
        state, rows, failed = _loop(group, open_folders, checkpoints, parallel, verbose, stop_requested)
        left = {i: folder for i, folder in open_folders.items() if i not in failed}
        outcomes |= failed | (_finish(group, state, rows, left, checkpoints, parallel) if left else {})
    return [outcomes.get(i) if folder else None for i, folder in enumerate(folders)]


def build(configs: Sequence[ConfigDict], parallel: sharding.Parallel) -> Group:
    """Loads each distinct stream once, assembles every run, and parts what moves from what rests.

    Raises ValueError for runs that cannot be one program, all differences in one message.
    """
    materials, runs, streams = {}, [], {}
    for i, config in enumerate(configs):
        stretches, stream = check(config, parallel), (config.seed, config.data.shots)
        if stream not in materials:
            materials[stream] = prepare(config, stretches, parallel)
        runs.append(assemble(config, stretches, materials[stream]))
        streams.setdefault(stream, []).append(i)
    _check_together(configs, runs)
    runs = [run._replace(eval_batches=runs[0].eval_batches) for run in runs]
    width = max(map(len, streams.values()))
    grid = np.array([(members + members[:1] * width)[:width] for members in streams.values()])
    first = [trees.flatten(runs[members[0]].variables) for members in streams.values()]
    own = frozenset().union(*(_moving(runs[0], i) for i in range(len(runs[0].phases))))
    rest = [path for path in first[0] if path not in own]
    shared = {path: first[0][path] for path in rest if all(_same(first[0][path], flat[path]) for flat in first[1:])}
    resting = {path: jnp.stack([flat[path] for flat in first]) for path in rest if path not in shared}
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed, _ in streams])
    if len(first) == 1:
        grid, keys = grid[0], keys[0]
    placed = parallel.replicate((shared, {"key": keys, "resting": resting}))
    return Group(list(configs), runs, grid, own, *placed)


def _same(one: Any, other: Any) -> bool:
    return one is other or np.array_equal(one, other)


def _moving(run: Run, i: int) -> set[str]:
    """What phase i moves, `collection/path`."""
    phase = run.phases[i]
    statistics = trees.flatten(run.variables.get("batch_stats", {}))
    trained = {f"params/{path}" for path, label in phase.labels.items() if label != trees.FROZEN}
    return trained | {f"batch_stats/{p}" for p in statistics if p.rpartition("/")[0] not in phase.model.frozen_norms}


def _check_together(configs: Sequence[ConfigDict], runs: Sequence[Run]) -> None:
    problems: dict[str, list[int]] = {}
    expected = _form(configs[0], runs[0])
    for i, (config, run) in enumerate(zip(configs, runs, strict=True)):
        for line in trees.difference(expected, _form(config, run)):
            problems.setdefault(line, []).append(i)
    if jax.process_count() > 1:
        problems["  replicas are trained in one process, this is one of several"] = []
    if problems:
        lines = [f"{line}  (replicas 0 -> {', '.join(map(str, who))})" for line, who in problems.items()]
        raise ValueError(
            f"these replicas cannot be one program; they may differ in {', '.join(options.REPLICABLE)}, with the same "
            "number of steps (with other shots: durations in steps) and the same kind of groups:\n" + "\n".join(lines)
        )


def _form(config: ConfigDict, run: Run) -> dict[str, Any]:
    """What must be equal for two runs to be one program."""
    flat = {key: value for key, value in options.identity(config).items() if not _differs(key)}
    table = {key: json.dumps(value) for key, value in flat.items()}
    table |= dict(zip(("log_every in steps", "eval_every in steps"), train.intervals(config, run), strict=True))
    table |= {f"the data of {name}": source.fingerprint for name, source in run.data.items() if name != "train"}
    for i, phase in enumerate(run.phases):
        kinds = {name: group._replace(lr_mult=0.0, weight_decay=0.0) for name, group in phase.groups.items()}
        facts = {
            "steps": (phase.start, phase.stop), "warm-up steps": phase.warmup_steps, "groups": kinds,
            "labels": trees.fingerprint(phase.labels), "steps kept by the optimizer": trees.fingerprint(phase.ages),
        }  # fmt: skip
        table |= {f"phase {i}: {name}": str(value) for name, value in facts.items()}
    return table


def _differs(key: str) -> bool:
    return key in options.REPLICABLE or key.startswith("groups.")


def _numbers(group: Group, i: int) -> dict[str, Any]:
    """The learning rates, factors and weight decays of phase i, at every place of the grid."""
    phases = [run.phases[i] for run in group.runs]

    def place(values):
        return np.array(list(values), np.float32)[group.grid]

    return {
        "lr": place(phase.lr for phase in phases),
        "values": {
            name: {field: place(getattr(phase.groups[name], field) for phase in phases) for field in FIELDS}
            for name in phases[0].groups
        },
    }


FIELDS = ("lr_mult", "weight_decay")


def _optimizer(group: Group, i: int, numbers: Mapping[str, Any]):
    """The optimizer of phase i for traced numbers; what decays in any replica decays in all, perhaps by 0."""
    tables = [run.phases[i].groups for run in group.runs]
    groups = {
        name: kind._replace(weight_decay=max(table[name].weight_decay for table in tables))
        for name, kind in tables[0].items()
    }
    phase = group.runs[0].phases[i]
    return phase.make_optimizer(phase.make_schedule(numbers["lr"]), groups, numbers["values"])


def _whole(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"batch_stats": {}, **trees.unflatten({path: leaf for part in parts for path, leaf in part.items()})}


def _join(step, key, own: Mapping[str, Any], *rest: Mapping[str, Any]) -> steps.TrainState:
    """The state of one run, from its own part and what rests."""
    tree = _whole(*rest, own["variables"])
    own = {name: part for name, part in own.items() if name != "variables"}
    return steps.TrainState(step=step, key=key, **tree, **own)


def _part(group: Group, state: steps.TrainState) -> dict[str, Any]:
    """What a run has for itself of its state."""
    flat = trees.flatten({"params": state.params, "batch_stats": state.batch_stats})
    names = ("opt_state", "ema", "sums", "bad_step")
    return {"variables": {p: flat[p] for p in group.own}, **{name: getattr(state, name) for name in names}}


def initial_state(group: Group, i: int, parallel: sharding.Parallel) -> dict[str, Any]:
    """The state of phase i as if training began with it, {"step", "own": of every place}."""
    phase, firsts = group.runs[0].phases[i], [trees.flatten(group.runs[j].variables) for j in group.grid.flat]
    stacked = {path: jnp.stack([flat[path] for flat in firsts]) for path in group.own}
    variables = {path: leaf.reshape(*group.grid.shape, *leaf.shape[1:]) for path, leaf in stacked.items()}

    def begin(variables, shared, streams, numbers):
        def one(variables, stream, numbers):
            tree, tx = _whole(shared, stream["resting"], variables), _optimizer(group, i, numbers)
            ema = group.configs[0].ema > 0
            return _part(group, steps.init_state(tree, tx, phase.labels, 0, ema, phase.model.frozen_norms))

        return {"step": jnp.zeros((), jnp.int32), "own": group.over(one)(variables, streams, numbers)}

    state = jax.jit(begin)(variables, group.shared, group.streams, _numbers(group, i))
    return parallel.replicate(state)


def _enter_phase(group: Group, i: int, state: dict[str, Any], parallel: sharding.Parallel) -> dict[str, Any]:
    before, phase = group.runs[0].phases[i - 1 : i + 1]

    def enter(state, shared, streams, numbers):
        def one(own, stream, numbers):
            whole = _join(state["step"], stream["key"], own, shared, stream["resting"])
            tx = _optimizer(group, i, numbers)
            return _part(group, steps.enter_phase(whole, tx, phase.labels, before.length, phase.model.frozen_norms))

        return {**state, "own": group.over(one)(state["own"], streams, numbers)}

    return parallel.replicate(jax.jit(enter)(state, group.shared, group.streams, _numbers(group, i)))


def make_train_step(group: Group, i: int, parallel: sharding.Parallel) -> Callable:
    """train_step(state, inputs) -> state of all places; inputs: {"shared", "streams" with their "batch", "numbers"}."""
    config, run = group.configs[0], group.runs[0]

    def train_step(state, inputs):
        def one(own, stream, numbers):
            whole = _join(state["step"], stream["key"], own, inputs["shared"], stream["resting"])
            tx = _optimizer(group, i, numbers)
            step = train.make_train_step(config, run, run.phases[i], parallel, tx)
            return _part(group, step(whole, stream["batch"]))

        own = group.over(one)(state["own"], inputs["streams"], inputs["numbers"])
        return {"step": state["step"] + 1, "own": own}

    return train_step


def put_batches(group: Group, batches: Sequence[Mapping[str, np.ndarray]], parallel: sharding.Parallel) -> Any:
    """The batches of every stream to the devices, each cut over all of them."""
    if group.grid.ndim == 1:
        return parallel.put_batch(batches[0])
    sharded = NamedSharding(parallel.mesh, PartitionSpec(None, sharding.AXIS))
    return {name: jax.device_put(np.stack([batch[name] for batch in batches]), sharded) for name in batches[0]}


def _streams(group: Group, start: int, stack: contextlib.ExitStack):
    """The batches of all streams, step by step."""
    rows = group.grid if group.grid.ndim == 2 else group.grid[None]
    batches = [group.runs[row[0]].batches for row in rows]
    workers, total = group.configs[0].data.workers, group.runs[0].total_steps
    made = [each.iterate(start, total, num_workers=workers) for each in batches]
    return zip(*(stack.enter_context(contextlib.closing(stream)) for stream in made), strict=True)


def _loop(group: Group, folders: Mapping[int, pathlib.Path], checkpoints, parallel, verbose: bool, stop_requested):
    """The loop of `train.train_built` for all replicas: the last state, all rows, and who diverged."""
    config, run, count = group.configs[0], group.runs[0], len(group.runs)
    total, (log_every, eval_every) = run.total_steps, train.intervals(config, run)
    members = {str(i): options.fingerprint(config) for i, config in enumerate(group.configs)}
    identity = {**run.identity, "replicas": members, "data of replicas": _train_data(group)}
    state, meta = train.resume(checkpoints, identity, lambda step: initial_state(group, run.phase_of(step), parallel))
    start, rows = int(state["step"]), meta.get("rows") or [[] for _ in group.runs]
    frozen, failed = meta.get("frozen") or _frozen_hashes(group, state, 0), {}
    predict = make_predict(group, parallel)
    with contextlib.ExitStack() as stack:
        logs = [RunLog(folders.get(i), rows[i], start, total, False, count) for i in range(count)]
        stream, first = _streams(group, start, stack), run.phase_of(start)
        for i in range(first, len(run.phases)):
            phase, step_fn, so_far = run.phases[i], None, max(start, run.phases[i].start)
            if i > first:
                audit.check_frozen(frozen, _frozen_hashes(group, state, i - 1))
                state = _enter_phase(group, i, state, parallel)
                frozen = _frozen_hashes(group, state, i)
            numbers = parallel.replicate(_numbers(group, i))
            for done, batches in enumerate(itertools.islice(stream, phase.stop - so_far), so_far + 1):
                streams = {**group.streams, "batch": put_batches(group, batches, parallel)}
                inputs = {"shared": group.shared, "streams": streams, "numbers": numbers}
                if step_fn is None:
                    step_fn, cost = parallel.compile(make_train_step(group, i, parallel), state, inputs)
                    for j, folder in folders.items():
                        train.note_cost(folder, group.runs[j], i, cost, count)
                state = step_fn(state, inputs)
                evaluates, stopping = done % eval_every == 0 or done == phase.stop, stop_requested(done)
                logs_now = done % log_every == 0 or done == phase.stop
                if logs_now or evaluates or stopping:
                    failed |= _diverged(group, state, done, failed)
                    if len(failed) == count:
                        return state, rows, failed
                alive = [j for j in range(count) if j not in failed]
                if logs_now:
                    state = _log_training(group, i, [(j, logs[j]) for j in alive], state, done)
                if evaluates or stopping:
                    with contextlib.ExitStack() as untimed:
                        for log in logs:
                            untimed.enter_context(log.untimed())
                        if evaluates and "val" in run.data:
                            _evaluate(predict, state, [(j, logs[j]) for j in alive], verbose)
                        best = {train.best_step(logs[j].rows) for j in alive} if config.select == "best_val" else ()
                        meta = {**identity, "rows": [log.rows for log in logs], "frozen": frozen}
                        checkpoints.save(done, state, meta, keep=best)
                if stopping:
                    raise Preempted(f"stopped after step {done} of {total}")
        failed |= _diverged(group, state, total, failed)  # of a run that was stopped behind its last step
        audit.check_frozen(frozen, _frozen_hashes(group, state, -1))
    return state, [log.rows for log in logs], failed


def _train_data(group: Group) -> dict[str, str]:
    return {str(i): run.data["train"].fingerprint for i, run in enumerate(group.runs)}


def _frozen_hashes(group: Group, state: Mapping[str, Any], i: int) -> dict[str, str]:
    """Hashes of what phase i keeps frozen, as it lies in the grid."""
    whole = _whole(group.shared, group.streams["resting"], state["own"]["variables"])
    return audit.frozen_hashes(whole, [group.runs[0].phases[i].audit])


def _diverged(group: Group, state: Mapping[str, Any], step: int, known: Mapping[int, Any]) -> dict[int, Outcome]:
    """The errors of the replicas that have met a number that is not finite and are not known yet."""
    bad = np.asarray(state["own"]["bad_step"]).ravel()
    steps_of = {i: int(bad[place]) for i, place in enumerate(group.places) if i not in known}
    return {
        i: train.not_finite(bad_step, step, "the runs beside it go on")
        for i, bad_step in steps_of.items()
        if bad_step != steps.NEVER
    }


def _log_training(group: Group, i: int, logs: Sequence[tuple[int, RunLog]], state: dict[str, Any], done: int):
    """A line for every replica that goes on; the state with new sums."""
    sums = {name: value.ravel() for name, value in jax.device_get(state["own"]["sums"]).items()}
    count = done - 1 - group.runs[0].phases[i].start
    rates = jax.vmap(lambda lr: group.runs[0].phases[i].make_schedule(lr)(count))(_numbers(group, i)["lr"].ravel())
    rates, places = np.asarray(rates), group.places
    for j, log in logs:
        at = places[j]
        train.log_training(log, done, {name: value[at] for name, value in sums.items()}, rates[at])
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), state["own"]["sums"])
    return {**state, "own": {**state["own"], "sums": zeros}}


def _evaluate(predict: Callable, state: Mapping[str, Any], logs: Sequence[tuple[int, RunLog]], verbose: bool) -> None:
    """Scores on val of every replica that goes on."""
    scores = [evaluate.scores(predictions) for predictions in predict(moved(state), "val")]
    for j, log in logs:
        log.evaluated(int(state["step"]), scores[j])
    if verbose:
        best = max(logs, key=lambda pair: scores[pair[0]]["accuracy"])[0]
        say(
            f"step {int(state['step'])}  best val accuracy {scores[best]['accuracy']:.4g} (replica {best}), "
            f"{len(scores) - len(logs)} of {len(scores)} diverged"
        )


def moved(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is evaluated of what moves: with the moving average where there is one."""
    return {**state["own"]["variables"], **state["own"]["ema"]}


def make_predict(group: Group, parallel: sharding.Parallel) -> Callable:
    """predict(moved, split) -> the Predictions of every replica; features that all have alike are one array."""
    step = train.make_eval_step(group.runs[0])

    def make(features_axis):
        def evaluate_all(variables, images):
            shared, resting, own = variables

            def one(own, resting, _):
                return step(_whole(shared, resting, own), images)

            outputs = group.over(one, (0, features_axis))(own, resting, jnp.zeros(group.grid.shape))
            lead = (group.grid.ndim, group.grid.ndim if features_axis == 0 else 0)
            return [x.reshape(-1, *x.shape[n:]) if n else x for x, n in zip(outputs, lead, strict=True)]

        return parallel.evaluate(evaluate_all)

    compiled: dict[str, Any] = {}

    def predict(moved, split):
        batches, variables = group.runs[0].eval_batches[split], (group.shared, group.streams["resting"], moved)
        if not compiled:
            compiled["axis"] = 0 if _depend(make(None), variables, batches[0]["image"]) else None
            compiled["eval"] = make(compiled["axis"])
        axis = 0 if compiled["axis"] is None else 1
        (logits, features), labels = evaluate.collect(
            lambda images: compiled["eval"](variables, images), batches, parallel, (1, axis)
        )
        source = batches.source
        return [
            make_predictions(
                logits[place], labels, list(source.ids), source.class_names, features[place] if axis else features
            )
            for place in group.places
        ]

    return predict


def _depend(eval_fn: Callable, variables: Any, images: np.ndarray) -> bool:
    """Whether the features differ from replica to replica: vmap refuses to leave out the axis of what does."""
    try:
        jax.eval_shape(eval_fn, variables, images)
    except ValueError:
        return True
    return False


def _finish(
    group: Group, state, rows, folders: Mapping[int, pathlib.Path], checkpoints, parallel
) -> dict[int, Outcome]:
    """Chooses, scores and proves each replica, and writes what a run leaves."""
    config, run, total, places = group.configs[0], group.runs[0], group.runs[0].total_steps, group.places
    chosen = {i: train.best_step(rows[i]) if config.select == "best_val" else total for i in folders}
    own = jax.device_get(moved(state))
    flat = {path: np.array(leaf).reshape(-1, *leaf.shape[group.grid.ndim :]) for path, leaf in own.items()}
    for step in sorted(set(chosen.values()) - {total}):
        then = moved(checkpoints.restore(step, initial_state(group, run.phase_of(step), parallel)))
        for path, leaf in jax.device_get(then).items():
            for i in (i for i in folders if chosen[i] == step):
                flat[path][places[i]] = leaf.reshape(flat[path].shape)[places[i]]
    selected = {path: leaf.reshape(*group.grid.shape, *leaf.shape[1:]) for path, leaf in flat.items()}
    predict, placed = make_predict(group, parallel), parallel.replicate(selected)
    predictions = {name: predict(placed, name) for name in train.scored(config, run)}
    shared, resting = jax.device_get((group.shared, group.streams["resting"]))
    outcomes, proofs = {}, {}
    for i, folder in folders.items():
        row = places[i] // group.grid.shape[-1]
        rest = {**shared, **{path: leaf[row] if group.grid.ndim == 2 else leaf for path, leaf in resting.items()}}
        variables = _whole(rest, {path: leaf[places[i]] for path, leaf in flat.items()})
        if row not in proofs:  # what rests is that of the stream
            audits = [phase.audit for phase in group.runs[i].phases]
            proofs[row] = [audit.frozen_hashes(tree, audits) for tree in (group.runs[i].variables, variables)]
        own_predictions = {name: made[i] for name, made in predictions.items()}
        outcomes[i] = train.leave(
            group.configs[i], group.runs[i], folder, variables, own_predictions, proofs[row], chosen[i], False,
            len(group.runs),
        )  # fmt: skip
    return outcomes


def run_all(
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
        return workdir.read_json(path)
    options.check(config)
    configs = options.replicas(config)
    folders = [folder / "replicas" / name_of(i, dict(changes)) for i, changes in enumerate(config.replicas)]
    with workdir.lock(folder):
        workdir.write_json(folder / "config.json", options.identity(config))
        outcomes = train_together(configs, folders, folder, verbose=verbose, stop_requested=stop_requested)
        rows = [_row(*each) for each in zip(config.replicas, folders, outcomes, strict=True)]
        if all(row["error"] for row in rows):
            raise FloatingPointError("all replicas diverged:\n" + "\n".join(f"{r['name']}: {r['error']}" for r in rows))
        table = {"replicas": rows, "best": best_of(rows)}
        workdir.write_json(path, table)
    return table


def name_of(i: int, changes: Mapping[str, Any]) -> str:
    """The folder of a replica: its number and what it sets, such as 03-lr=0.1,weight_decay=0.0001."""
    text = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
    return f"{i:02}-{re.sub(r'[^-+.,=_a-zA-Z0-9]+', '_', text)[:60]}".rstrip("-_.")


def _row(changes: Sequence, folder: pathlib.Path, outcome: Outcome) -> dict[str, Any]:
    """A line of replicas.json; val: accuracy with its 95 % interval, and loss, at the step that was selected."""
    row = {"name": folder.name, "options": dict(changes), "error": None, "step": None, "val": None}
    if isinstance(outcome, FloatingPointError):
        workdir.write_json(folder / "failed.json", {"error": f"{type(outcome).__name__}: {outcome}"})
        return {**row, "error": str(outcome)}
    scored = {r["step"]: r for r in workdir.read_rows(folder / "metrics.jsonl") if "val/accuracy" in r}
    if at := scored.get(outcome["step"]):
        count = workdir.read_json(folder / "audit.json")["phases"][0]["data"]["val"]["examples"]
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
