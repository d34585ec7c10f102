"""The pure steps: TrainState, train_step (the only value_and_grad), eval_step."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tl_jax.core import trees
from tl_jax.methods import Method
from tl_jax.training import optim

NEVER = jnp.iinfo(jnp.int32).max


class TrainState(NamedTuple):
    """Everything that a step changes, and so everything that a checkpoint holds.

    params, batch_stats: the network's variables. opt_state: of the trainable part. ema: the moving average of all that
    moves, `{collection/path: leaf}`, empty where it is off. key: the run's random key; step s uses fold_in(key, s).
    sums: totals since the last log line; bad_step: the first step with a loss or gradient that is not finite, or NEVER.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: dict[str, jax.Array]
    key: jax.Array
    sums: dict[str, jax.Array]
    bad_step: jax.Array


SUMS = ("loss", "penalty", "accuracy", "examples", "grad_norm", "steps")


class Prefix(NamedTuple):
    """What is frozen in front of a network: all up to and including its output `cut`.

    model: computes it, perhaps in another type than the rest. cached: batches hold its outputs in place of images.
    """

    model: Any
    cut: str
    cached: bool = False


def init_state(
    variables: Mapping[str, Any],
    tx,
    labels: Mapping[str, str],
    seed: int,
    ema: bool,
    frozen_norms: Collection[str] = (),
) -> TrainState:
    """The state before step 0, from loaded variables."""
    trainable, _ = trees.split(variables["params"], labels)
    moving = _moving(variables["params"], variables.get("batch_stats", {}), labels, frozen_norms)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(trainable),
        ema={path: jnp.array(leaf) for path, leaf in moving.items()} if ema else {},
        key=jax.random.PRNGKey(seed),
        sums={name: jnp.zeros(()) for name in SUMS},
        bad_step=jnp.full((), NEVER, jnp.int32),
    )


def enter_phase(
    state: TrainState, tx, labels: Mapping[str, str], length: int, frozen_norms: Collection[str] = ()
) -> TrainState:
    """The state as the next phase begins: what goes on moving keeps its optimizer values and moving averages.

    tx, labels, frozen_norms: of the next phase. length: the steps of the phase that ends. What stops moving keeps the
    value that training gave it, not its average.
    """
    trainable, _ = trees.split(state.params, labels)
    moving = _moving(state.params, state.batch_stats, labels, frozen_norms)
    return state._replace(
        opt_state=optim.migrate(tx.init(trainable), state.opt_state, length),
        ema={path: state.ema.get(path, jnp.array(leaf)) for path, leaf in moving.items()} if state.ema else {},
    )


def eval_variables(state: TrainState) -> dict[str, Any]:
    """The variables that are evaluated and exported: with the moving average where there is one."""
    return trees.merge({"params": state.params, "batch_stats": state.batch_stats}, state.ema)


def _moving(params: Any, batch_stats: Any, labels: Mapping[str, str], frozen_norms: Collection[str]) -> dict[str, Any]:
    """What training moves, `{collection/path: leaf}`: averaged parameters need averaged statistics beside them."""
    trainable, _ = trees.split(params, labels)
    statistics = _moving_statistics(batch_stats, frozen_norms)
    return {f"params/{p}": x for p, x in trainable.items()} | {f"batch_stats/{p}": x for p, x in statistics.items()}


def _moving_statistics(batch_stats: Any, frozen_norms: Collection[str]) -> dict[str, jax.Array]:
    return {path: x for path, x in trees.flatten(batch_stats).items() if path.rpartition("/")[0] not in frozen_norms}


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Pixels 0..255 [B, H, W, C] to the network's range, `(x / 255 - mean) / std`, as the weight card says."""
    scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    return images.astype(jnp.float32) * scale.reshape(1, 1, 1, -1) - shift.reshape(1, 1, 1, -1)


def make_train_step(
    model,
    method: Method,
    tx: optax.GradientTransformation,
    labels: Mapping[str, str],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    accumulate: int = 1,
    ema: float = 0.0,
    prefix: Prefix | None = None,
    axis_name: str | None = None,
    whole: Callable = lambda variables: variables,
) -> Callable:
    """train_step(state, batch) -> state, pure; batch holds "image" [B, H, W, C] uint8 and "label" [B] int32.

    prefix: of it nothing is differentiated or kept for a backward pass; where it is cached, "image" holds its outputs.

    accumulate: the batch is cut into this many parts, run one after the other, and their gradients averaged.
    ema: the decay of the moving average of trainable parameters and moving statistics (0: off).
    axis_name: under pmap, the axis over which gradients, statistics and sums are combined; None under jit.
    whole: what makes divided variables whole where the network is applied, `Parallel.whole`.
    """

    def forward(params, batch_stats, images, key, train=True):
        variables = whole({"params": params, "batch_stats": batch_stats})
        x, start, before = _run_prefix(prefix, variables, images, mean, std)
        if not train:
            logits, out = model.apply(variables, x, train=False, start=start)
            return logits, before | out, batch_stats
        (logits, out), updates = model.apply(
            variables, x, train=True, start=start, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return logits, before | out, updates.get("batch_stats", batch_stats)

    def gradients(trainable, params, batch_stats, batch, key):
        def loss_fn(trainable):
            return method.loss(trees.merge(params, trainable), batch_stats, batch, forward, key)

        (_, (batch_stats, sums)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable)
        return grads, batch_stats, sums

    def accumulated(trainable, params, batch_stats, batch, key):
        # Strided parts keep every part spread over all devices: example i goes to part i % accumulate.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch)

        def body(carry, part_and_key):
            grads, batch_stats, sums = carry
            part_grads, batch_stats, part_sums = gradients(trainable, params, batch_stats, *part_and_key)
            return (_add(grads, part_grads), batch_stats, _add(sums, part_sums)), None

        zeros = jax.tree.map(jnp.zeros_like, trainable)
        first = jax.tree.map(lambda x: x[0], parts)
        no_sums = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(gradients, trainable, params, batch_stats, first, key)[2],
        )
        keys = jax.random.split(key, accumulate)
        (grads, batch_stats, sums), _ = jax.lax.scan(body, (zeros, batch_stats, no_sums), (parts, keys))
        return jax.tree.map(lambda g: g / accumulate, grads), batch_stats, sums

    def train_step(state: TrainState, batch: Mapping[str, jax.Array]) -> TrainState:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        trainable, _ = trees.split(state.params, labels)
        compute = accumulated if accumulate > 1 else gradients
        grads, batch_stats, sums = compute(trainable, state.params, state.batch_stats, batch, key)
        sums = {**sums, "examples": jnp.asarray(batch["label"].shape[0], jnp.float32)}
        if axis_name:
            grads, statistics = jax.lax.pmean((grads, _moving_statistics(batch_stats, model.frozen_norms)), axis_name)
            batch_stats = trees.merge(batch_stats, statistics)  # a mean of equal numbers may round: none of what rests
            sums = jax.lax.psum(sums, axis_name)

        updates, opt_state = tx.update(grads, state.opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        params = trees.merge(state.params, trainable)
        moving = _moving(params, batch_stats, labels, model.frozen_norms)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        return TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=optax.incremental_update(moving, state.ema, 1 - ema) if ema else {},
            key=state.key,
            sums=_add(state.sums, {**sums, "grad_norm": grad_norm, "steps": jnp.ones(())}),
            bad_step=jnp.minimum(state.bad_step, jnp.where(finite, NEVER, state.step)),
        )

    return train_step


def make_eval_step(model, *, mean: tuple[float, ...], std: tuple[float, ...], prefix: Prefix | None = None) -> Callable:
    """eval_step(variables, images [B, H, W, C] uint8) -> (logits [B, K], features [B, D]), float32, pure.

    prefix: as in `make_train_step`; where it is cached, `images` are its outputs.
    """

    def eval_step(variables: Mapping[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, start, before = _run_prefix(prefix, variables, images, mean, std)
        logits, out = model.apply(variables, x, train=False, start=start)
        return logits.astype(jnp.float32), (before | out)["pre_logits"].astype(jnp.float32)

    return eval_step


def make_prefix_step(prefix: Prefix, *, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable:
    """prefix_step(variables, images [B, H, W, C] uint8) -> the outputs of a prefix [B, ...], pure."""

    def prefix_step(variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
        return _run_prefix(prefix._replace(cached=False), variables, images, mean, std)[0]

    return prefix_step


def _run_prefix(prefix: Prefix | None, variables, images, mean, std) -> tuple[jax.Array, str | None, dict]:
    """What enters the rest of the network, the cut behind which that begins (None: all of it), and what is before."""
    if prefix is None:
        return normalise(images, mean, std), None, {}
    if prefix.cached:
        return images, prefix.cut, {prefix.cut: images}
    x, out = prefix.model.apply(variables, normalise(images, mean, std), train=False, stop=prefix.cut)
    return jax.lax.stop_gradient(x), prefix.cut, out


def _add(left, right):
    return jax.tree.map(jnp.add, left, right)
