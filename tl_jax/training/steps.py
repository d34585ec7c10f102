"""The pure steps: TrainState, train_step (the only value_and_grad), eval_step."""

import functools
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.core.fields import DOMAIN, INDEX, LABEL, take
from tl_jax.core.options import LANGUAGE
from tl_jax.methods.term import AVERAGE, MAIN, MODEL, Context
from tl_jax.tasks import Task
from tl_jax.training import optim
from tl_jax.training.plan import Plan, Prefix, Reader, Turn

FEATURES = "features"
NEVER = jnp.iinfo(jnp.int32).max
SUMS = ("loss", "examples", "grad_norm", "steps")  # and those of the task and of the terms


_add = functools.partial(jax.tree.map, jnp.add)


class TrainState(NamedTuple):
    """Everything that a step changes, and so everything that a checkpoint holds.

    params, batch_stats: the variables of all networks. opt_state: of the trainable part. ema: the moving average of all
    that is trained, `{collection/path: leaf}`, empty where it is off. memory: of each term that has one, outside the
    average. key: the run's random key; step s uses fold_in(key, s). sums: totals since the last log line. bad_step: the
    first step with a loss or gradient that is not finite, or NEVER.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: dict[str, jax.Array]
    memory: dict[str, Any]
    key: jax.Array
    sums: dict[str, jax.Array]
    bad_step: jax.Array


def init_state(plan: Plan, tx: Any, variables: Mapping[str, Any], memory: Mapping[str, Any], seed: int) -> TrainState:
    """The state before step 0, from loaded variables and the first memory of the terms."""
    batch_stats = variables.get("batch_stats", {})
    trainable, _ = trees.split(variables["params"], plan.labels)
    averaged = _trained(variables["params"], batch_stats, plan) if plan.ema else {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=batch_stats,
        opt_state=tx.init(trainable),
        ema={path: jnp.array(leaf) for path, leaf in averaged.items()},
        memory=dict(memory),
        key=jax.random.PRNGKey(seed),
        sums={name: jnp.zeros(()) for name in plan.sums},
        bad_step=jnp.full((), NEVER, jnp.int32),
    )


def enter_phase(plan: Plan, tx: Any, state: TrainState, length: int) -> TrainState:
    """The state where the phase of `plan` begins: what goes on being trained keeps optimizer values and averages.

    length: the steps of the phase that ends. What is trained no more keeps the value that training gave it, not its
    average.
    """
    trainable, _ = trees.split(state.params, plan.labels)
    averaged = _trained(state.params, state.batch_stats, plan) if plan.ema else {}
    return state._replace(
        opt_state=optim.migrate(tx.init(trainable), state.opt_state, length),
        ema={path: state.ema.get(path, jnp.array(leaf)) for path, leaf in averaged.items()},
        sums={name: jnp.zeros(()) for name in plan.sums},
    )


def eval_variables(state: TrainState) -> dict[str, Any]:
    """The variables that are evaluated and exported: with the moving average where there is one."""
    return trees.merge({"params": state.params, "batch_stats": state.batch_stats}, state.ema)


def _trained(params: Any, batch_stats: Any, plan: Plan) -> dict[str, Any]:
    """What training changes, `{collection/path: leaf}`: averaged parameters need averaged statistics with them."""
    trainable, _ = trees.split(params, plan.labels)
    statistics = updated_statistics(batch_stats, plan.frozen_norms)
    return {f"params/{p}": x for p, x in trainable.items()} | {f"batch_stats/{p}": x for p, x in statistics.items()}


def updated_statistics(batch_stats: Any, frozen_norms: Collection[str]) -> dict[str, jax.Array]:
    """The statistics that training updates, `{path: leaf}`."""
    return {path: x for path, x in trees.flatten(batch_stats).items() if path.rpartition("/")[0] not in frozen_norms}


def normalise(x: Any, card: Card, cut: str | None = None) -> Any:
    """Inputs [B, ..., C] in the network's range, float32: `(x / scale - mean) / std`, as the card says; or tokens.

    Of several inputs, {field: array}, those that a network reads behind a cut.
    """
    if card.parts:
        unread = card.unread(cut)
        return {name: normalise(each, card.cards[name]) if name in unread else each for name, each in x.items()}
    if card.input == "text":
        return x
    mean, std = jnp.asarray(card.mean, jnp.float32), jnp.asarray(card.std, jnp.float32)
    scale, axes = 1.0 / (card.divisor * std), (1,) * (x.ndim - 1) + (-1,)
    return x.astype(jnp.float32) * scale.reshape(axes) - (mean / std).reshape(axes)


def subtree(variables: Mapping[str, Any], network: str) -> dict[str, Any]:
    """The variables of one network; the model finds its own among all."""
    if network in (MODEL, AVERAGE):
        return dict(variables)
    return {kind: tree.get(network, {}) for kind, tree in variables.items()}


def run_prefix(
    prefix: Prefix | None, variables: Any, x: Any, card: Card
) -> tuple[Any, str | None, dict[str, jax.Array]]:
    """What enters the rest of the network, the cut behind which that begins (None: all of it), and the outputs so far.

    x: what a stream holds for the network; outputs of the prefix where it is cached.
    """
    if prefix is None:
        return normalise(x, card), None, {}
    if prefix.cached and card.parts:
        return normalise(x, card, prefix.cut), prefix.cut, {}
    if prefix.cached:
        return x, prefix.cut, {prefix.cut: x}
    x, out = prefix.model.apply(variables, normalise(x, card), train=False, stop=prefix.cut)
    return jax.lax.stop_gradient(x), prefix.cut, out


def _gradients(plan: Plan, trainable, *others):
    """The gradient of the loss, and what `compute_loss` gives besides."""
    (_, rest), grads = jax.value_and_grad(lambda t: compute_loss(plan, t, *others), has_aux=True)(trainable)
    return grads, *rest


def _accumulated(plan: Plan, trainable, state: TrainState, batch_stats, memory, batch, total, key):
    """As `_gradients`, of one part of the batch after the other."""
    # Strided parts keep every part spread over all devices: example i goes to part i % accumulate.
    count = plan.accumulate
    parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)

    def of_piece(batch_stats, memory, piece, key):
        return _gradients(plan, trainable, state, batch_stats, memory, piece, total, key)

    def body(carry, piece_and_key):
        grads, batch_stats, memory, sums = carry
        found = of_piece(batch_stats, memory, *piece_and_key)
        return (_add(grads, found[0]), found[1], found[2], _add(sums, found[3])), None

    zeros = jax.tree.map(jnp.zeros_like, trainable)
    shapes = jax.eval_shape(of_piece, batch_stats, memory, jax.tree.map(lambda x: x[0], parts), key)[3]
    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    carry = (zeros, batch_stats, memory, sums)
    (grads, batch_stats, memory, sums), _ = jax.lax.scan(body, carry, (parts, jax.random.split(key, count)))
    return jax.tree.map(lambda g: g / count, grads), batch_stats, memory, sums


def make_train_step(plan: Plan, tx: optax.GradientTransformation) -> Callable:
    """train_step(state, batch) -> state, pure; batch: {stream: {field: array}}."""

    def train_step(state: TrainState, batch: Mapping[str, Mapping[str, jax.Array]]) -> TrainState:
        key = jax.random.fold_in(state.key, state.step)
        if plan.axis_name:
            key = jax.random.fold_in(key, jax.lax.axis_index(plan.axis_name))
        bad_step, found = state.bad_step, []
        for i, turn in enumerate(plan.turns or (None,)):
            state, sums = _update(plan, tx, turn, state, batch, jax.random.fold_in(key, i) if i else key)
            finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(sums["grad_norm"])
            bad_step = jnp.minimum(bad_step, jnp.where(finite, NEVER, state.step))
            found.append(sums)
        averaged = _trained(state.params, state.batch_stats, plan)
        return state._replace(
            step=state.step + 1,
            ema=optax.incremental_update(averaged, state.ema, 1 - plan.ema) if plan.ema else {},
            sums=_add(state.sums, {**_mean_of(found), "steps": jnp.ones(())}),
            bad_step=bad_step,
        )

    return train_step


def _update(plan: Plan, tx: optax.GradientTransformation, turn: Turn | None, state: TrainState, batch, key):
    """One update of parameters, statistics and memory: the new state, and the sums over the examples of the batch."""
    trainable, _ = trees.split(state.params, plan.labels)
    chosen = trainable
    if turn:
        terms = {
            name: (_scaled(plan.method.terms[name][0], f), plan.method.terms[name][1]) for name, f in turn.terms.items()
        }
        plan = plan._replace(method=plan.method._replace(terms=terms))
        chosen = {path: leaf for path, leaf in trainable.items() if plan.labels[path] in turn.groups}
    count = {name: plan.task.count(fields[LABEL]).sum() for name, fields in batch.items() if LABEL in fields}
    total = count if plan.accumulate == 1 else {name: n / plan.accumulate for name, n in count.items()}
    compute = _accumulated if plan.accumulate > 1 else _gradients
    grads, batch_stats, memory, sums = compute(plan, chosen, state, state.batch_stats, state.memory, batch, total, key)
    sums = {**sums, "examples": jnp.asarray(_examples(plan, batch, count), jnp.float32)}
    if plan.axis_name:
        statistics = updated_statistics(batch_stats, plan.frozen_norms)
        grads, statistics = jax.lax.pmean((grads, statistics), plan.axis_name)
        batch_stats = trees.merge(batch_stats, statistics)  # a mean of equal numbers may round: not the frozen ones
        sums = jax.lax.psum(sums, plan.axis_name)
    sums["grad_norm"] = optax.tree.norm(grads)
    others = {path: jnp.zeros_like(leaf) for path, leaf in trainable.items() if path not in chosen}
    updates, opt_state = tx.update({**grads, **others}, state.opt_state, trainable)
    chosen = optax.apply_updates(chosen, {path: updates[path] for path in chosen})
    opt_state = optim.select_groups(state.opt_state, opt_state, turn.groups) if turn else opt_state
    params = trees.merge(state.params, chosen)
    return state._replace(params=params, batch_stats=batch_stats, opt_state=opt_state, memory=memory), sums


def _scaled(weight: Callable, factor: float) -> Callable:
    return weight if factor == 1 else lambda progress: factor * weight(progress)


def _mean_of(found: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The sums of a step, the mean over the turns that have them."""
    if len(found) == 1:
        return found[0]
    names = dict.fromkeys(name for sums in found for name in sums)
    having = {name: [sums[name] for sums in found if name in sums] for name in names}
    return {name: sum(values) / len(values) for name, values in having.items()}


def _examples(plan: Plan, batch: Mapping[str, Mapping[str, jax.Array]], total) -> jax.Array | int:
    """The weight of a batch in sums: the total of the stream `train`, else the rows of the first stream."""
    name = MAIN if MAIN in batch else plan.streams[0]
    return total[name] if LABEL in batch[name] else len(batch[name][INDEX])


def compute_loss(plan: Plan, trainable, state: TrainState, batch_stats, memory, batch, total, key):
    """The weighted sum of the terms, and (batch_stats, memory, sums over examples) after one pass over a batch."""
    mix_key, forward_key = jax.random.split(key)
    task, method = plan.task, plan.method
    encoded = {name: task.encode(fields[LABEL]) for name, fields in batch.items() if LABEL in fields}
    if method.mix and MAIN in encoded:
        given = _inputs(plan, batch[MAIN]), encoded[MAIN], batch[MAIN].get(DOMAIN)
        inputs, encoded[MAIN] = method.mix(mix_key, *given)
        batch = {**batch, MAIN: {**batch[MAIN], **inputs}}
    params = trees.merge(state.params, trainable)
    variables = plan.whole({"params": params, "batch_stats": batch_stats})
    outputs, entered, batch_stats = _pass(plan, variables, batch, forward_key)
    forward = _make_forward(plan, variables, state.ema, batch, entered)
    modules = {name: reader.module for name, reader in plan.readers.items()}
    count = {name: task.count(batch[name][LABEL]) for name in encoded}
    step = state.step
    progress = (step - plan.start) / plan.length
    examples = jnp.asarray(_examples(plan, batch, total), jnp.float32)
    loss, sums, memory = 0.0, {}, dict(memory)
    for name, (weight, term) in method.terms.items():
        context = Context(
            batch, encoded, count, total, outputs, plan.facts, params, batch_stats, plan.labels, memory.get(name), task,
            forward, step, progress, jax.random.fold_in(forward_key, zlib.crc32(name.encode())), plan.joint, modules,
        )  # fmt: skip
        result = term.loss(context)
        factor = weight(progress)
        loss = loss + (result.loss if isinstance(factor, float) and factor == 1.0 else factor * result.loss)
        batch_stats = trees.merge(batch_stats, result.batch_stats) if result.batch_stats else batch_stats
        memory |= {} if result.memory is None else {name: result.memory}
        numbers = {name: result.loss, **{f"{name}/{log}": value for log, value in result.logs.items()}}
        sums |= {key: jax.lax.stop_gradient(value) * examples for key, value in numbers.items() if key in plan.sums}
    if MAIN in outputs and MAIN in encoded:
        running = task.running(outputs[MAIN], batch[MAIN][LABEL])
        sums |= {name: values.sum(dtype=jnp.float32) for name, values in running.items()}
    sums["loss"] = jax.lax.stop_gradient(loss) * examples
    return loss, (batch_stats, memory, sums)


def make_logs(plan: Plan, names: Collection[str]) -> Callable:
    """(state, batch) -> {TERM/LOG: value} of some terms, in training mode, as a step would log them; pure."""
    terms = {name: plan.method.terms[name] for name in names}
    logs = [f"{name}/{log}" for name in names for log in terms[name][1].logs]
    plan = plan._replace(method=plan.method._replace(terms=terms, mix=None), sums=tuple(logs), turns=(), accumulate=1)

    def values(state: TrainState, batch: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
        total = {name: plan.task.count(fields[LABEL]).sum() for name, fields in batch.items() if LABEL in fields}
        key = jax.random.fold_in(state.key, state.step)
        _, (_, _, sums) = compute_loss(plan, {}, state, state.batch_stats, state.memory, batch, total, key)
        return {name: sums[name] / _examples(plan, batch, total) for name in logs}

    return values


def _inputs(plan: Plan, fields: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The fields of a stream that networks read, float32."""
    read = dict.fromkeys(reader.field for reader in plan.readers.values() if reader.field in fields)
    return {field: fields[field].astype(jnp.float32) for field in read}


def _pass(plan: Plan, variables: Any, batch, key: jax.Array):
    """The training pass of the model: its outputs by stream, what entered it behind the prefix, and its statistics."""
    reader, streams = plan.readers[MODEL], plan.streams
    entered, known = {}, {}
    for name in streams:
        x, cut, known[name] = run_prefix(plan.prefix, variables, take(batch[name], reader.field), reader.card)
        entered[name] = (x, cut)

    def apply(x, batch_stats, key, domain):
        (_, out), updates = reader.module.apply(
            {**variables, "batch_stats": batch_stats}, x, train=True, start=cut, mutable=["batch_stats"],
            rngs={"dropout": key}, **domain,
        )  # fmt: skip
        return out, {**batch_stats, **updates.get("batch_stats", {})}

    batch_stats, inputs = variables["batch_stats"], [entered[name][0] for name in streams]
    if len(streams) == 1:
        out, batch_stats = apply(inputs[0], batch_stats, key, _domain(reader, batch, streams, 1))
        outs = [out]
    elif plan.joint:
        domain = _domain(reader, batch, streams, plan.devices)
        out, batch_stats = apply(_join(inputs, plan.devices), batch_stats, key, domain)
        pieces = {name: _cut(x, [len(i) for i in inputs], plan.devices) for name, x in out.items()}
        outs = [{name: piece[i] for name, piece in pieces.items()} for i in range(len(streams))]
    else:
        outs = []
        for i, x in enumerate(inputs):
            domain = _domain(reader, batch, streams[i : i + 1], 1)
            out, batch_stats = apply(x, batch_stats, jax.random.fold_in(key, i), domain)
            outs.append(out)
    return {name: known[name] | out for name, out in zip(streams, outs, strict=True)}, entered, batch_stats


def _domain(reader: Reader, batch, streams: Sequence[str], devices: int) -> dict[str, jax.Array]:
    """{"domain": of each row of the joined streams, which have none in common}; {} where the network reads none."""
    if not getattr(reader.module, "mixes_domains", False):
        return {}
    of_streams = [
        batch[name].get(DOMAIN, jnp.zeros_like(batch[name][INDEX])) + (i << 16) for i, name in enumerate(streams)
    ]
    return {"domain": _join(of_streams, devices)}


def _join(arrays: list[jax.Array], devices: int) -> jax.Array:
    """Batches as one, such that every device keeps its own rows."""
    parts = [x.reshape(devices, -1, *x.shape[1:]) for x in arrays]
    joined = jnp.concatenate(parts, axis=1)
    return joined.reshape(-1, *joined.shape[2:])


def _cut(x: jax.Array, sizes: list[int], devices: int) -> list[jax.Array]:
    """The inverse of `_join`."""
    x = x.reshape(devices, -1, *x.shape[1:])
    ends = [sum(sizes[: i + 1]) // devices for i in range(len(sizes) - 1)]
    return [part.reshape(-1, *part.shape[2:]) for part in jnp.split(x, ends, axis=1)]


def _make_forward(plan: Plan, everything: Any, ema: Mapping[str, jax.Array], batch, entered) -> Callable:
    """`Context.forward`; see methods/term.py."""

    def forward(network, of, *, train=False, start=None, stop=None, key=None, variables=None):
        reader, own = plan.readers[MODEL if network == AVERAGE else network], subtree(everything, network)
        if isinstance(of, str) and reader.columns:
            return {output: batch[of][field] for output, field in reader.columns.items()}, {}
        if network == AVERAGE:
            own = trees.merge(own, ema)
        if variables is not None:
            own = plan.whole({**own, **variables})
        cut, x = start, of
        if isinstance(of, str) and network in (MODEL, AVERAGE):
            if of not in entered:
                entered[of] = run_prefix(plan.prefix, everything, take(batch[of], reader.field), reader.card)[:2]
            x, cut = entered[of]
        elif isinstance(of, str):
            x = normalise(take(batch[of], reader.field), reader.card)
        elif reader.card is not None and start is None:
            x = normalise(of, reader.card)
        arguments = {"train": train, "start": cut, "stop": stop}
        if not train:
            return reader.module.apply(own, x, **arguments)[1], {}
        if isinstance(of, str):
            arguments |= _domain(reader, batch, (of,), 1)
        (_, out), updates = reader.module.apply(own, x, **arguments, mutable=["batch_stats"], rngs={"dropout": key})
        prefix = "" if network in (MODEL, AVERAGE) else f"{network}/"
        return out, {f"{prefix}{path}": x for path, x in trees.flatten(updates.get("batch_stats", {})).items()}

    return forward


def make_eval_step(reader: Reader, task: Task, prefix: Prefix | None = None) -> Callable:
    """eval_step(variables, x) -> {name: [B, ...] float32} of the task's outputs, and "features" [B, D]; pure.

    x: what the network reads; outputs of the prefix where it is cached; of language modelling with the labels.
    """

    def eval_step(variables: Mapping[str, Any], x: jax.Array) -> dict[str, jax.Array]:
        x, labels = (x[reader.field], x[LABEL]) if task.spec.name in LANGUAGE else (x, None)
        x, start, known = run_prefix(prefix, variables, x, reader.card)
        _, out = reader.module.apply(variables, x, train=False, start=start)
        out = known | out | ({} if labels is None else {LABEL: labels})
        return {**task.keep(out), FEATURES: out["pre_logits"].astype(jnp.float32)}

    return eval_step
