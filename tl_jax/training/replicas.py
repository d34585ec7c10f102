"""Many runs in one program: replicas differ in learning rate, weight decay, seed or shots and share what is frozen."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tl_jax import config as options
from tl_jax.core import messages, trees
from tl_jax.data.text.tokens import stack
from tl_jax.methods import schedules
from tl_jax.methods.term import MAIN, MODEL
from tl_jax.runtime import sharding
from tl_jax.training import audit, evaluate, frozen_columns, single, steps, terms
from tl_jax.training.build import Run, assemble, intervals, prepare
from tl_jax.training.settings import Settings
from tl_jax.training.single import Line, Stop

FIELDS = ("lr_mult", "weight_decay")  # of a parameter group: the numbers in which replicas may differ
AXES = steps.TrainState(None, *(0,) * (len(steps.TrainState._fields) - 1))  # of a state of all replicas: one step


def make(settings: Sequence[Settings], parallel: sharding.Parallel) -> "Replicas":
    """Loads each distinct feed once, assembles every run, and separates what is trained from what is frozen.

    Raises ValueError for runs that cannot be one program, all differences in one message.
    """
    materials, runs, feeds = {}, [], {}
    for j, each in enumerate(settings):
        feed = (each.loop.seed, each.data.shots)
        if feed not in materials:
            materials[feed] = prepare(each, parallel)
        runs.append(assemble(each, materials[feed], parallel))
        feeds.setdefault(feed, []).append(j)
    _check_together(runs)
    eval_batches = runs[0].material.eval_batches
    runs = [run._replace(material=run.material._replace(eval_batches=eval_batches)) for run in runs]
    width = max(map(len, feeds.values()))
    grid = np.array([(members + members[:1] * width)[:width] for members in feeds.values()])
    first = [trees.flatten(runs[members[0]].material.variables) for members in feeds.values()]
    own = frozenset().union(*(_trained(runs[0], i) for i in range(len(runs[0].phases))))
    shared, differing = {}, {}
    for path, leaf in first[0].items():
        leaves = [flat[path] for flat in first]
        if path not in own and all(x is leaf or np.array_equal(x, leaf) for x in leaves):
            shared[path] = leaf
        elif path not in own:
            differing[path] = jnp.stack(leaves)
    _check_prefixes(runs[0], differing)
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed, _ in feeds])
    grid, keys = (grid[0], keys[0]) if len(feeds) == 1 else (grid, keys)
    return Replicas(runs, grid, own, *parallel.place((shared, {"key": keys, "frozen": differing})), parallel)


def _trained(run: Run, i: int) -> set[str]:
    """What phase i changes, `collection/path`."""
    plan = run.phases[i].plan
    statistics = steps.updated_statistics(run.material.variables["batch_stats"], plan.frozen_norms)
    trained = {f"params/{path}" for path, label in plan.labels.items() if label != trees.FROZEN}
    return trained | {f"batch_stats/{path}" for path in statistics}


def _check_together(runs: Sequence[Run]) -> None:
    problems: dict[str, list[int]] = {}
    expected = _form(runs[0])
    for j, run in enumerate(runs):
        for line in messages.difference(expected, _form(run)):
            problems.setdefault(line, []).append(j)
    if jax.process_count() > 1:
        problems["  replicas are trained in one process, this is one of several"] = []
    if any(term.statistics for phase in runs[0].phases for _, term in phase.plan.method.terms.values()):
        problems["  statistics that are computed anew (adabn) are of one run"] = []
    if runs[0].settings.loop.patience:
        problems["  patience stops one run: leave it out, and choose the step by select='best_val'"] = []
    if problems:
        lines = [f"{line}  (replicas 0 -> {', '.join(map(str, who))})" for line, who in problems.items()]
        raise ValueError(
            f"these replicas cannot be one program; they may differ in {options.DIFFERING}, with the same "
            "number of steps (with other shots: durations in steps) and the same kind of groups:\n" + "\n".join(lines)
        )


def _check_prefixes(run: Run, differing: Collection[str]) -> None:
    """Raises ValueError where features cannot be cached for all replicas alike; differing: leaves, at the start."""
    own = set(differing)
    for i, phase in enumerate(run.phases):
        prefix = phase.plan.prefix
        if prefix and prefix.cached:
            needed = frozen_columns.leaves_of(prefix, trees.flatten(run.material.variables), run.material.networks)
            if found := sorted(own & set(needed)):
                raise ValueError(
                    f"cache='features' keeps one set of features for all replicas; of what {prefix.cut} depends on, "
                    f"which phase {i} freezes, {len(found)} of {len(needed)} leaves are not one for all, such as "
                    f"{found[0]}; set model.weights, freeze no part behind a phase that trains it, or leave out cache"
                )
        own |= _trained(run, i)


def _form(run: Run) -> dict[str, Any]:
    """What must be equal for two runs to be one program."""
    same = {key for key in run.settings.identity if key not in options.REPLICABLE and not key.startswith("groups.")}
    table = {key: json.dumps(value) for key, value in run.settings.identity.items() if key in same}
    table |= dict(zip(("log_every in steps", "eval_every in steps"), intervals(run), strict=True))
    table |= {f"the data of {name}": s.fingerprint for name, s in run.material.data.items() if name != MAIN}
    for i, phase in enumerate(run.phases):
        forms = options.forms_of(run.settings.phases[i].terms)
        table |= {f"phase {i}: terms.{name}": json.dumps(form, sort_keys=True) for name, form in forms.items()}
        kinds = {name: group._replace(lr_mult=0.0, weight_decay=0.0) for name, group in phase.groups.items()}
        prints = {"labels": phase.plan.labels, "step offsets": phase.offsets}
        facts = {"steps": (phase.start, phase.stop), "warm-up steps": phase.warmup_steps, "groups": kinds}
        facts |= {name: messages.fingerprint(value) for name, value in prints.items()}
        table |= {f"phase {i}: {name}": str(value) for name, value in facts.items()}
    return table


def whole(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a run from flat tables of parts of them."""
    return {"batch_stats": {}, **trees.unflatten({path: leaf for part in parts for path, leaf in part.items()})}


@dataclasses.dataclass(eq=False)
class Replicas:
    """Several runs as a program of the training loop; all but `step` of its state has the axes of the grid.

    Replicas of one seed and number of shots see the same batches: a feed. grid: the replica at each place, [M] where
    all are of one feed, else [D, M], a row a feed; places that are left over repeat a replica. own: what is trained,
    `collection/path`, which every place has for itself. shared: the frozen leaves that are equal for all. feeds: the
    random key and the frozen leaves that differ, [D, ...] where there are D.
    """

    runs: list[Run]
    grid: np.ndarray
    own: frozenset[str]
    shared: dict[str, jax.Array]
    feeds: dict[str, Any]
    parallel: sharding.Parallel
    _rates: dict[int, Any] = dataclasses.field(default_factory=dict)
    _evals: dict[Any, tuple[bool, Callable]] = dataclasses.field(default_factory=dict)

    @property
    def _places(self) -> list[int]:
        """Where each replica is in the flattened grid."""
        return [int(np.flatnonzero(self.grid == j)[0]) for j in range(len(self.runs))]

    @property
    def _rows(self) -> list[int]:
        """The first replica of each feed."""
        return [int(row[0]) for row in (self.grid if self.grid.ndim == 2 else self.grid[None])]

    def _over(self, function: Callable, own_axes: Any = 0, out_axes: Any = 0) -> Callable:
        """function(own, feed, numbers) at every place of the grid; what does not depend on a place is done once."""
        for feed_axis in (None, 0)[: self.grid.ndim]:
            function = jax.vmap(function, (own_axes, feed_axis, 0), out_axes)
        return function

    def _flat(self, leaf: Any) -> Any:
        """An array of every place with one leading axis, that of the flattened grid."""
        return leaf.reshape(-1, *leaf.shape[self.grid.ndim :])

    def constant_hashes(self) -> dict[str, str]:
        return {}  # checkpoints hold what is trained, and nothing else

    def numbers(self, i: int) -> dict[str, Any]:
        """The rates, factors, weight decays and differing weights of terms of phase i, at every place of the grid."""
        phases = [run.phases[i] for run in self.runs]

        def place(values):
            return np.array(list(values), np.float32)[self.grid]

        weights = [terms.weights_of(run.settings.phases[i]) for run in self.runs]
        varied = [name for name in weights[0] if any(each[name] != weights[0][name] for each in weights)]
        return {
            "lr": place(phase.lr for phase in phases),
            "values": {
                name: {field: place(getattr(phase.groups[name], field) for phase in phases) for field in FIELDS}
                for name in phases[0].groups
            },
            "weights": {
                name: {field: place(each[name][1][field] for each in weights) for field in weights[0][name][1]}
                for name in varied
            },
        }

    def _plan(self, i: int, numbers: Mapping[str, Any]) -> steps.Plan:
        """What a step of phase i computes, for traced numbers."""
        phase, given = self.runs[0].phases[i], dict(self.runs[0].phases[i].plan.method.terms)
        for name, values in numbers["weights"].items():
            schedule, _ = terms.weights_of(self.runs[0].settings.phases[i])[name]
            given[name] = schedules.SCHEDULES[schedule](**values), given[name][1]
        return phase.plan._replace(method=phase.plan.method._replace(terms=given))

    def _optimizer(self, i: int, numbers: Mapping[str, Any]):
        """The optimizer of phase i for traced numbers; what decays in any replica decays in all, perhaps by 0."""
        tables = [run.phases[i].groups for run in self.runs]
        groups = {
            name: kind._replace(weight_decay=max(table[name].weight_decay for table in tables))
            for name, kind in tables[0].items()
        }
        phase = self.runs[0].phases[i]
        return phase.make_optimizer(phase.make_schedule(numbers["lr"]), groups, numbers["values"])

    def _join(self, state: steps.TrainState, key, *frozen: Mapping[str, Any]) -> steps.TrainState:
        """The state of one run, from what it has for itself and what is frozen."""
        return state._replace(key=key, **whole(*frozen, state.params))

    def _separate(self, state: steps.TrainState) -> steps.TrainState:
        """What a run has for itself of its state; its variables are a flat table."""
        flat = trees.flatten(single.current_variables(state))
        return state._replace(params={path: flat[path] for path in self.own}, batch_stats={}, key=None)

    def initial(self, i: int) -> steps.TrainState:
        plan = self.runs[0].phases[i].plan
        firsts = [self.runs[j].material for j in self.grid.flat]

        def stack(*leaves):
            return jnp.stack(leaves).reshape(*self.grid.shape, *jnp.shape(leaves[0]))

        flats = [trees.flatten(material.variables) for material in firsts]
        own = {path: stack(*(flat[path] for flat in flats)) for path in self.own}
        memory = jax.tree.map(stack, *(material.memory for material in firsts))

        def begin(own, memory, shared, feeds, numbers):
            def one(start, feed, numbers):
                variables, memory = start
                tree = whole(shared, feed["frozen"], variables)
                return self._separate(steps.init_state(plan, self._optimizer(i, numbers), tree, memory, 0))

            return self._over(one, out_axes=AXES)((own, memory), feeds, numbers)

        state = jax.jit(begin)(own, memory, self.shared, self.feeds, self.numbers(i))
        return self.parallel.place(state)

    def enter(self, i: int, state: steps.TrainState) -> steps.TrainState:
        before, phase = self.runs[0].phases[i - 1 : i + 1]

        def enter(state, shared, feeds, numbers):
            def one(own, feed, numbers):
                joined = self._join(own, feed["key"], shared, feed["frozen"])
                return self._separate(steps.enter_phase(phase.plan, self._optimizer(i, numbers), joined, before.length))

            return self._over(one, AXES, AXES)(state, feeds, numbers)

        return self.parallel.place(jax.jit(enter)(state, self.shared, self.feeds, self.numbers(i)))

    def refresh(self, i: int, state: steps.TrainState, names: Sequence[str], stop: Stop) -> steps.TrainState:
        params, memory = jax.device_get((state.params, state.memory))
        flat, found = jax.tree.map(lambda x: np.array(self._flat(x)), memory), {}
        for j, place in enumerate(self._places):
            own = jax.tree.map(lambda x, place=place: x[place], flat)
            refreshed, _ = single.refreshed(self.runs[j], i, self._variables_at(params, j), own, names, stop)
            found[j] = jax.device_get(refreshed)
        made = [found[j] for j in self.grid.flat]
        stacked = jax.tree.map(lambda *x: np.stack(x).reshape(*self.grid.shape, *x[0].shape), *made)
        return state._replace(memory=self.parallel.place(stacked))

    def frozen_hashes(self, i: int, state: steps.TrainState) -> dict[str, str]:
        """Hashes of what phase i keeps frozen, as it lies in the grid."""
        tree = whole(self.shared, self.feeds["frozen"], state.params)
        return audit.frozen_hashes(tree, [self.runs[0].phases[i].audit])

    def batches(self, i: int, state: Any, names: Sequence[str], stop: Stop) -> dict[str, Any]:
        """Of what is scored the batches; of a training stream a list, one for each feed."""
        training = [name for name in names if name in self.runs[0].material.streams]
        scored = [name for name in names if name not in training]
        found: dict[str, Any] = {name: [] for name in training}
        for d, j in enumerate(self._rows):
            run = self.runs[j]
            sets = {name: run.material.streams[name] for name in training}
            sets |= {name: run.material.eval_batches[name] for name in scored} if d == 0 else {}
            place = functools.partial(self.parallel.place, run.material.variables)
            for name, batches in single.cached(run, run.phases[i], sets, place, self.parallel, stop).items():
                found[name] = [*found[name], batches] if name in training else batches
        return found

    def iterate(self, sets: Mapping[str, Sequence[Any]], start: int, stop: int) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            made = [
                single.streams_of(self.runs[j], {name: each[d] for name, each in sets.items()}, start, stop)
                for d, j in enumerate(self._rows)
            ]
            for stream in made:
                stack.enter_context(contextlib.closing(stream))
            for batches in zip(*made, strict=True):
                yield self._put(batches)

    def _put(self, batches: Sequence[Mapping[str, Mapping[str, np.ndarray]]]) -> Any:
        """The batches of every feed to the devices, each divided over all of them."""
        if self.grid.ndim == 1:
            return self.parallel.put_batch(batches[0])
        sharded = NamedSharding(self.parallel.mesh, PartitionSpec(None, sharding.AXIS))
        return jax.tree.map(lambda *x: jax.device_put(stack(x, self.runs[0].material.card.texts), sharded), *batches)

    def compile(self, i: int, state: Any, batch: Any) -> tuple[Callable, dict[str, Any]]:
        numbers = self.parallel.place(self.numbers(i))

        def inputs(batch):
            return {"shared": self.shared, "feeds": {**self.feeds, "batch": batch}, "numbers": numbers}

        step, cost = self.parallel.compile(self.make_train_step(i), state, inputs(batch))
        return lambda state, batch: step(state, inputs(batch)), cost

    def make_train_step(self, i: int) -> Callable:
        """train_step(state, inputs) -> state of all places; inputs: {"shared", "feeds" with their batch, "numbers"}."""

        def train_step(state, inputs):
            def one(own, feed, numbers):
                joined = self._join(own, feed["key"], inputs["shared"], feed["frozen"])
                step = steps.make_train_step(self._plan(i, numbers), self._optimizer(i, numbers))
                return self._separate(step(joined, feed["batch"]))

            return self._over(one, AXES, AXES)(state, inputs["feeds"], inputs["numbers"])

        return train_step

    def take_line(self, i: int, state: steps.TrainState, done: int) -> tuple[steps.TrainState, Line]:
        phase = self.runs[0].phases[i]
        if i not in self._rates:
            rate = jax.vmap(lambda lr, step: phase.make_schedule(lr)(step), (0, None))
            self._rates[i] = jax.jit(rate), self.numbers(i)["lr"].ravel()
        rate, lr = self._rates[i]
        line = Line(done, state.sums, rate(lr, np.int32(done - 1 - phase.start)), jnp.copy(state.bad_step))
        return state._replace(sums=jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), state.sums)), line

    def read_line(self, line: Line) -> dict[int, tuple[dict[str, float], float, int]]:
        sums, lr, bad = jax.tree.map(np.ravel, jax.device_get((line.sums, line.lr, line.bad_step)))
        return {
            j: ({name: float(value[place]) for name, value in sums.items()}, float(lr[place]), int(bad[place]))
            for j, place in enumerate(self._places)
        }

    def predict(self, i: int, state: steps.TrainState, batches: Any, wanted: Sequence[int]) -> dict[int, Any]:
        """{replica: its Predictions, or the FloatingPointError of one that diverged}; equal features are one array."""
        run, prefix = self.runs[0], single.eval_prefix(self.runs[0], i)
        evaluated = {**state.params, **state.ema}
        variables, field = (self.shared, self.feeds["frozen"], evaluated), run.material.readers[MODEL].field
        if prefix not in self._evals:
            depends = _depend(self._make_eval(prefix, None), variables, batches[0][field])
            self._evals[prefix] = depends, self._make_eval(prefix, 0 if depends else None)
        depends, eval_fn = self._evals[prefix]
        names = [name for name in jax.eval_shape(eval_fn, variables, batches[0][field]) if name != steps.FEATURES]
        axes = {**dict.fromkeys(names, 1), steps.FEATURES: int(depends)}
        outputs = evaluate.collect(lambda x: eval_fn(variables, x), batches, field, self.parallel, axes)
        features, found = outputs.pop(steps.FEATURES), {}
        for j in wanted:
            place = self._places[j]
            own = {name: values[place] for name, values in outputs.items()}
            try:
                read = features[place] if depends else features
                found[j] = evaluate.join(own, batches.source, run.task.spec, read)
            except FloatingPointError as error:  # no reason for the others to stop
                found[j] = error
        return found

    def _make_eval(self, prefix: steps.Prefix | None, features_axis: int | None) -> Callable:
        step = steps.make_eval_step(self.runs[0].material.readers[MODEL], self.runs[0].task, prefix)

        def evaluate_all(variables, x):
            shared, frozen, own = variables

            def one(own, frozen, _):
                outputs = step(whole(shared, frozen, own), x)
                return outputs.pop(steps.FEATURES), outputs

            features, outputs = self._over(one, out_axes=(features_axis, 0))(own, frozen, jnp.zeros(self.grid.shape))
            return {
                **{name: self._flat(values) for name, values in outputs.items()},
                steps.FEATURES: features if features_axis is None else self._flat(features),
            }

        return self.parallel.evaluate(evaluate_all)

    def _variables_at(self, own: Mapping[str, np.ndarray], j: int) -> dict[str, Any]:
        """The variables of one replica, on the host."""
        place = self._places[j]
        shared, frozen = jax.device_get((self.shared, self.feeds["frozen"]))
        if self.grid.ndim == 2:
            frozen = {path: leaf[place // self.grid.shape[1]] for path, leaf in frozen.items()}
        return whole(shared, frozen, {path: self._flat(leaf)[place] for path, leaf in own.items()})

    def variables(self, state: steps.TrainState, j: int) -> dict[str, Any]:
        return self._variables_at(jax.device_get({**state.params, **state.ema}), j)

    def memory(self, state: steps.TrainState, j: int) -> dict[str, Any]:
        return jax.tree.map(lambda x: np.asarray(self._flat(x))[self._places[j]], jax.device_get(state.memory))


def _depend(eval_fn: Callable, variables: Any, x: np.ndarray) -> bool:
    """Whether the features differ from replica to replica: vmap refuses to leave out the axis of what does."""
    try:
        jax.eval_shape(eval_fn, variables, x)
    except ValueError:
        return True
    return False
