"""Many runs in one program: replicas differ in learning rate, weight decay, seed or shots and share what is frozen."""

import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tl_jax import config as options
from tl_jax.core import messages, trees
from tl_jax.runtime import sharding
from tl_jax.tasks import Spec, make_predictions
from tl_jax.training import audit, evaluate, loop, steps
from tl_jax.training import feature_cache as features
from tl_jax.training.build import Run, assemble, check, prepare

FIELDS = ("lr_mult", "weight_decay")  # of a parameter group: the numbers in which replicas may differ


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
    _check_fronts(runs[0], resting)
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed, _ in streams])
    if len(first) == 1:
        grid, keys = grid[0], keys[0]
    placed = parallel.place((shared, {"key": keys, "resting": resting}))
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
        for line in messages.difference(expected, _form(config, run)):
            problems.setdefault(line, []).append(i)
    if jax.process_count() > 1:
        problems["  replicas are trained in one process, this is one of several"] = []
    if problems:
        lines = [f"{line}  (replicas 0 -> {', '.join(map(str, who))})" for line, who in problems.items()]
        raise ValueError(
            f"these replicas cannot be one program; they may differ in {', '.join(options.REPLICABLE)}, with the same "
            "number of steps (with other shots: durations in steps) and the same kind of groups:\n" + "\n".join(lines)
        )


def _check_fronts(run: Run, resting: Collection[str]) -> None:
    """Raises ValueError where features cannot be cached for all replicas alike; resting: what differs at the start."""
    own = set(resting)
    for i, phase in enumerate(run.phases):
        if phase.prefix and phase.prefix.cached:
            front = features.leaves_of(phase.prefix, trees.flatten(run.variables))
            if found := sorted(own & set(front)):
                raise ValueError(
                    f"cache='features' keeps one set of features for all replicas, but in front of {phase.prefix.cut}, "
                    f"which phase {i} freezes, {len(found)} of {len(front)} leaves are not one for all, such as "
                    f"{found[0]}; set model.weights, freeze no part behind a phase that trains it, or leave "
                    "out cache"
                )
        own |= _moving(run, i)


def _form(config: ConfigDict, run: Run) -> dict[str, Any]:
    """What must be equal for two runs to be one program."""
    flat = {key: value for key, value in options.identity(config).items() if not _differs(key)}
    table = {key: json.dumps(value) for key, value in flat.items()}
    table |= dict(zip(("log_every in steps", "eval_every in steps"), loop.intervals(config, run), strict=True))
    table |= {f"the data of {name}": source.fingerprint for name, source in run.data.items() if name != "train"}
    for i, phase in enumerate(run.phases):
        kinds = {name: group._replace(lr_mult=0.0, weight_decay=0.0) for name, group in phase.groups.items()}
        facts = {
            "steps": (phase.start, phase.stop), "warm-up steps": phase.warmup_steps, "groups": kinds,
            "labels": messages.fingerprint(phase.labels),
            "steps kept by the optimizer": messages.fingerprint(phase.ages),
        }  # fmt: skip
        table |= {f"phase {i}: {name}": str(value) for name, value in facts.items()}
    return table


def _differs(key: str) -> bool:
    return key in options.REPLICABLE or key.startswith("groups.")


def numbers_of(group: Group, i: int) -> dict[str, Any]:
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


def _optimizer(group: Group, i: int, numbers: Mapping[str, Any]):
    """The optimizer of phase i for traced numbers; what decays in any replica decays in all, perhaps by 0."""
    tables = [run.phases[i].groups for run in group.runs]
    groups = {
        name: kind._replace(weight_decay=max(table[name].weight_decay for table in tables))
        for name, kind in tables[0].items()
    }
    phase = group.runs[0].phases[i]
    return phase.make_optimizer(phase.make_schedule(numbers["lr"]), groups, numbers["values"])


def whole(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a run from flat tables of parts of them."""
    return {"batch_stats": {}, **trees.unflatten({path: leaf for part in parts for path, leaf in part.items()})}


def _join(step, key, own: Mapping[str, Any], *rest: Mapping[str, Any]) -> steps.TrainState:
    """The state of one run, from its own part and what rests."""
    tree = whole(*rest, own["variables"])
    own = {name: part for name, part in own.items() if name != "variables"}
    return steps.TrainState(step=step, key=key, **tree, **own)


def _part(group: Group, state: steps.TrainState) -> dict[str, Any]:
    """What a run has for itself of its state."""
    flat = trees.flatten({"params": state.params, "batch_stats": state.batch_stats})
    names = ("opt_state", "ema", "sums", "bad_step")
    return {"variables": {p: flat[p] for p in group.own}, **{name: getattr(state, name) for name in names}}


def frozen_hashes(group: Group, state: Mapping[str, Any], i: int) -> dict[str, str]:
    """Hashes of what phase i keeps frozen, as it lies in the grid."""
    tree = whole(group.shared, group.streams["resting"], state["own"]["variables"])
    return audit.frozen_hashes(tree, [group.runs[0].phases[i].audit])


def initial_state(group: Group, i: int, parallel: sharding.Parallel) -> dict[str, Any]:
    """The state of phase i as if training began with it, {"step", "own": of every place}."""
    phase, firsts = group.runs[0].phases[i], [trees.flatten(group.runs[j].variables) for j in group.grid.flat]
    stacked = {path: jnp.stack([flat[path] for flat in firsts]) for path in group.own}
    variables = {path: leaf.reshape(*group.grid.shape, *leaf.shape[1:]) for path, leaf in stacked.items()}

    def begin(variables, shared, streams, numbers):
        def one(variables, stream, numbers):
            tree, tx = whole(shared, stream["resting"], variables), _optimizer(group, i, numbers)
            ema = group.configs[0].ema > 0
            return _part(group, steps.init_state(tree, tx, phase.labels, 0, ema, phase.model.frozen_norms))

        return {"step": jnp.zeros((), jnp.int32), "own": group.over(one)(variables, streams, numbers)}

    state = jax.jit(begin)(variables, group.shared, group.streams, numbers_of(group, i))
    return parallel.place(state)


def enter_phase(group: Group, i: int, state: dict[str, Any], parallel: sharding.Parallel) -> dict[str, Any]:
    before, phase = group.runs[0].phases[i - 1 : i + 1]

    def enter(state, shared, streams, numbers):
        def one(own, stream, numbers):
            whole = _join(state["step"], stream["key"], own, shared, stream["resting"])
            tx = _optimizer(group, i, numbers)
            return _part(group, steps.enter_phase(whole, tx, phase.labels, before.length, phase.model.frozen_norms))

        return {**state, "own": group.over(one)(state["own"], streams, numbers)}

    return parallel.place(jax.jit(enter)(state, group.shared, group.streams, numbers_of(group, i)))


def make_train_step(group: Group, i: int, parallel: sharding.Parallel) -> Callable:
    """train_step(state, inputs) -> state of all places; inputs: {"shared", "streams" with their "batch", "numbers"}."""
    config, run = group.configs[0], group.runs[0]

    def train_step(state, inputs):
        def one(own, stream, numbers):
            whole = _join(state["step"], stream["key"], own, inputs["shared"], stream["resting"])
            tx = _optimizer(group, i, numbers)
            step = loop.make_train_step(config, run, run.phases[i], parallel, tx, config.accumulate)
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


def batches_of(
    group: Group, i: int, splits: Sequence[str], parallel: sharding.Parallel, stop_requested: Callable[[int], bool]
) -> dict[str, Any]:
    """The batches of the splits as phase i reads them, as `train.batches_of`; of train a list, one for each stream."""
    rows = group.grid if group.grid.ndim == 2 else group.grid[None]
    run, names = group.runs[0], [f"train, stream {i}" if i else "train" for i in range(len(rows))]
    sets = {name: group.runs[row[0]].batches for name, row in zip(names, rows, strict=True)}
    wanted = {split: run.eval_batches[split] for split in splits if split != "train"}
    wanted |= sets if "train" in splits else {}
    held = loop.hold(
        group.configs[0], run, run.phases[i], wanted, lambda: parallel.place(run.variables), parallel, stop_requested
    )
    return {split: [held[name] for name in names] if split == "train" else held[split] for split in splits}


def streams(group: Group, batches: Sequence[Any], start: int, stop: int, stack: contextlib.ExitStack):
    """The batches of all streams for steps start .. stop, step by step."""
    workers = group.configs[0].data.workers
    made = [each.iterate(start, stop, num_workers=workers) for each in batches]
    return zip(*(stack.enter_context(contextlib.closing(stream)) for stream in made), strict=True)


def moved(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is evaluated of what moves: with the moving average where there is one."""
    return {**state["own"]["variables"], **state["own"]["ema"]}


def make_predict(group: Group, parallel: sharding.Parallel) -> Callable:
    """predict(i, moved, batches, wanted) -> {replica: its Predictions, or the FloatingPointError of one that diverged}.

    i: the phase. batches: of a split. wanted: the replicas. Features that all have alike are one array.
    """
    run = group.runs[0]

    def make(prefix, features_axis):
        step = loop.make_eval_step(run, prefix)

        def evaluate_all(variables, images):
            shared, resting, own = variables

            def one(own, resting, _):
                return step(whole(shared, resting, own), images)

            outputs = group.over(one, (0, features_axis))(own, resting, jnp.zeros(group.grid.shape))
            lead = (group.grid.ndim, group.grid.ndim if features_axis == 0 else 0)
            return [x.reshape(-1, *x.shape[n:]) if n else x for x, n in zip(outputs, lead, strict=True)]

        return parallel.evaluate(evaluate_all)

    compiled: dict[Any, Any] = {}

    def predict(i, moved, batches, wanted):
        prefix, variables = loop.eval_prefix(run, run.phases[i]), (group.shared, group.streams["resting"], moved)
        if prefix not in compiled:
            axis = 1 if _depend(make(prefix, None), variables, batches[0]["image"]) else 0
            compiled[prefix] = axis, make(prefix, 0 if axis else None)
        axis, eval_fn = compiled[prefix]
        (logits, features), labels = evaluate.collect(
            lambda images: eval_fn(variables, images), batches, parallel, (1, axis)
        )
        ids, places = list(batches.source.ids), group.places
        spec = Spec(class_names=tuple(batches.source.class_names))
        found: dict[int, Any] = {}
        for j in wanted:
            own = features[places[j]] if axis else features
            try:
                found[j] = make_predictions({"logits": logits[places[j]]}, labels, ids, spec, own)
            except FloatingPointError as error:  # it diverged since its last step: no reason for the others to stop
                found[j] = error
        return found

    return predict


def _depend(eval_fn: Callable, variables: Any, images: np.ndarray) -> bool:
    """Whether the features differ from replica to replica: vmap refuses to leave out the axis of what does."""
    try:
        jax.eval_shape(eval_fn, variables, images)
    except ValueError:
        return True
    return False
