"""Durations, schedules, and parameter groups -> one optax transformation over the trainable parameters."""

import inspect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tl_jax.core import checks, messages
from tl_jax.core.trees import FROZEN

NonNegative = Annotated[float, checks.number(0)]
MOST_STEPS = 2**31 - 1  # what the counter of steps can hold
FRACTION = checks.number(0, 1, above=True, below=True)
Milestones = Annotated[Sequence[float], checks.sequence(FRACTION, "fractions between 0 and 1")]


def to_steps(duration: tuple[float, str], *, batch_size: int, train_size: int) -> int:
    """A duration such as (5, "epochs"), (300, "steps") or (20_000, "examples") in whole steps, rounded up: 1 at least.

    An epoch is `train_size` examples, whether or not `batch_size` divides it.
    """
    amount, unit = duration
    examples_each = {"steps": batch_size, "examples": 1, "epochs": train_size}
    if unit not in examples_each or not 0 <= amount < math.inf:
        raise ValueError(f"duration {duration!r}: expected (amount >= 0, one of {', '.join(examples_each)})")
    steps = float(amount) * examples_each[unit] / batch_size
    if steps > MOST_STEPS:
        raise ValueError(f"duration {duration!r} is {steps:.3g} steps of {batch_size} examples; at most {MOST_STEPS:,}")
    return max(math.ceil(steps - 1e-9), int(amount > 0))


def constant(peak: float, steps: int):
    """The peak rate throughout."""
    return lambda k: peak * jnp.ones_like(k)


def cosine(peak: float, steps: int, *, final: NonNegative = 0.0):
    """Half a cosine from the peak to `final * peak` (Loshchilov & Hutter 2017, eq. 5, one period)."""
    return lambda k: peak * (final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(k / steps, 1.0))))


def linear(peak: float, steps: int, *, final: NonNegative = 0.0):
    """A straight line from the peak to `final * peak`."""
    return lambda k: peak * (1 - (1 - final) * jnp.minimum(k / steps, 1.0))


def step(peak: float, steps: int, *, milestones: Milestones = (1 / 3, 2 / 3), factor: NonNegative = 0.1):
    """The peak times `factor` for every milestone passed; milestones are fractions of the time after warm-up."""
    return lambda k: peak * factor ** sum((k >= math.ceil(m * steps - 1e-9)).astype(jnp.float32) for m in milestones)


def inverse_sqrt(peak: float, steps: int, *, timescale: Annotated[float, checks.number(0, above=True)] = 1.0):
    """peak / sqrt(1 + (k - 1) / timescale) in the k-th step after warm-up, k = 1, 2, ...; 1/sqrt(k) at timescale 1."""
    return lambda k: peak / jnp.sqrt(1 + k / timescale)


def power(peak: float, steps: int, *, scale: NonNegative = 10.0, exponent: NonNegative = 0.75):
    """peak / (1 + scale * p)^exponent for the progress p from 0 to 1 (Ganin et al. 2016, section 5.2.2)."""
    return lambda k: peak / (1 + scale * k / steps) ** exponent


SCHEDULES = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "step": step,
    "inverse_sqrt": inverse_sqrt,
    "power": power,
}


def make_schedule(
    name: str, peak: float, *, total_steps: int, warmup_steps: int = 0, args: Mapping[str, Any] | None = None
):
    """The learning rate as a function of the step: a linear warm-up from 0, then the named shape over the rest.

    Step s of the warm-up has the rate `peak * (s + 1) / (warmup_steps + 1)`, so that no step is wasted at rate 0.
    """
    args = dict(args or {})
    checks.refuse("the schedule does not fit", checks.call_problems("schedule", name, args, SCHEDULES))
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warm-up of {warmup_steps} steps does not fit into {total_steps} steps in total")
    shape = SCHEDULES[name](peak, total_steps - warmup_steps, **args)

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        after = jnp.maximum(count - warmup_steps, 0.0)
        return jnp.where(count < warmup_steps, peak * (count + 1) / (warmup_steps + 1), shape(after))

    return schedule


class Group(NamedTuple):
    """How the parameters of one group train.

    optimizer: a name from optax (adamw, sgd, lamb, ...); args: its further keyword arguments, as pairs. lr_mult: the
    factor on the schedule. weight_decay: applied to the paths that `decay` matches in full; decoupled where the
    optimizer has its own (adamw, lamb, lion), else an L2 term added to the gradient (sgd, adam).
    """

    optimizer: Annotated[str, checks.TEXT] = "adamw"
    args: Annotated[tuple[tuple[str, Any], ...], checks.TABLE] = ()
    lr_mult: NonNegative = 1.0
    weight_decay: NonNegative = 0.0
    decay: Annotated[str, checks.REGEX] = ".*/kernel"


def make_groups(labels: Mapping[str, str], default: Group, overrides: Mapping[str, Mapping]) -> dict[str, Group]:
    """The settings of every trainable group that `labels` uses: `default` with the group's overrides.

    Raises one ValueError for overrides of groups that no parameter is in, unknown fields, invalid values,
    optimizers that optax cannot run, and decay patterns that decay nothing.
    """
    what, used = "the optimizer groups do not fit", sorted(set(labels.values()) - {FROZEN})
    problems = [] if used else ["every parameter is frozen: nothing to train; give at least one path another group"]
    for name, fields in overrides.items():
        if name == FROZEN:
            problems.append("'frozen' takes no settings: its parameters are never trained")
        elif name not in used:
            hint = messages.nearest(name, used)
            problems.append(f"settings for group {name!r}, which no parameter is in{hint}; groups in use: {used}")
        else:
            problems += checks.table_problems(f"group {name!r}", fields, checks.parameters(Group))
    checks.refuse(what, problems)
    groups = {name: default._replace(**overrides.get(name, {})) for name in used}
    groups = {name: group._replace(args=tuple(sorted(dict(group.args).items()))) for name, group in groups.items()}
    problems = [f"group {name!r}: {problem}" for name, group in groups.items() for problem in _group_problems(group)]
    checks.refuse(what, problems or _dead_decays(labels, groups))
    return groups


COMMON = ("adafactor", "adam", "adamw", "lamb", "lars", "lion", "nadamw", "rmsprop", "sgd")
RESERVED = ("learning_rate", "weight_decay", "weight_decay_rate", "mask", "weight_decay_mask")  # no further arguments


def _group_problems(group: Group) -> list[str]:
    """What is wrong with one group by itself; the last check lets optax make and trace the optimizer."""
    name, args = group.optimizer, dict(group.args)
    if wrong := checks.table_problems("its settings", {**group._asdict(), "args": args}, checks.parameters(Group)):
        return wrong
    factory = getattr(optax, name, None)
    parameters = inspect.signature(factory).parameters if callable(factory) else ()
    if "learning_rate" not in parameters:
        return [f"optax has no optimizer {name!r}{messages.nearest(name, COMMON)}; common ones: {', '.join(COMMON)}"]
    known = {parameter: checks.ANY for parameter in parameters if parameter not in RESERVED}
    if wrong := checks.table_problems(f"optimizer {name!r}", args, known):
        return wrong
    try:
        tx = _group_transform(group, lambda count: 0.1 * jnp.ones_like(count))
        example = {"x/kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
        jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), example)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [f"optax cannot run {name!r} with {args}: {reason}"]
    return []


def _dead_decays(labels: Mapping[str, str], groups: Mapping[str, Group]) -> list[str]:
    """A pattern of decayed paths that decays nothing is as wrong as a rule that matches nothing."""
    patterns: dict[str, list[str]] = {}
    for path, label in labels.items():
        if label != FROZEN and groups[label].weight_decay:
            patterns.setdefault(groups[label].decay, []).append(path)
    return [
        f"weight_decay is on, but decay={pattern!r} matches none of the paths in full, such as {paths[0]!r}"
        for pattern, paths in patterns.items()
        if not any(re.fullmatch(pattern, path) for path in paths)
    ]


def make_optimizer(
    labels: Mapping[str, str],
    groups: Mapping[str, Group],
    schedule,
    clip: float = 0.0,
    *,
    multipliers: Mapping[str, float] | None = None,
    offsets: Mapping[str, int] | None = None,
    blocks: Mapping[str, str] | None = None,
    values: Mapping[str, Mapping[str, Any]] | None = None,
    apart: Collection[str] = (),
    times: Mapping[str, int] | None = None,
) -> optax.GradientTransformation:
    """One transformation of the flat trainable parameters: a clip of the norm (0: off), then each group's own.

    Frozen parameters never enter: they are not differentiated, so neither the clip nor a logged norm sees them, the
    backward pass that only they need is not compiled, and no optimizer array exists for them.

    multipliers: a further factor on the learning rate of each path. offsets: from `offsets_after`; paths of one offset
    share their counts. blocks: `{path: block}` for `scale_by_relative_gradient_norm`. values: `{group: {"lr_mult",
    "weight_decay"}}`, perhaps traced, in place of the groups' own numbers, which decide what decays at all. apart:
    networks, by their first folder, that are clipped by their own norm: a discriminator's gradient must not scale the
    backbone's. times: the updates of each group in a step, where it is not one.
    """
    times = times or {}
    trainable = {path: label for path, label in labels.items() if label != FROZEN}
    offsets = offsets or dict.fromkeys(trainable, 0)
    kinds = {path: f"{label}+{offsets[path]}" for path, label in trainable.items()}
    transforms = {
        kinds[path]: _group_transform(
            groups[label], schedule, offsets[path], times.get(label, 1), **(values or {}).get(label, {})
        )
        for path, label in trainable.items()
    }
    tx = optax.multi_transform(transforms, kinds)
    if multipliers:
        scale = optax.stateless(lambda updates, _: {path: multipliers[path] * x for path, x in updates.items()})
        tx = optax.chain(tx, scale)
    if blocks:
        tx = scale_by_relative_gradient_norm(tx, blocks)
    if not clip:
        return tx
    clip_norm = optax.clip_by_global_norm(clip)
    owners = {path: folder if (folder := path.split("/")[0]) in apart else "" for path in trainable}
    if len(names := sorted(set(owners.values()))) > 1:
        clip_norm = optax.multi_transform(dict.fromkeys(names, clip_norm), owners)
    return optax.chain(clip_norm, tx)


class RelativeGradientNorm(NamedTuple):
    """State: a running mean of the ratio of each block."""

    ratios: dict[str, jax.Array]
    inner: Any


def scale_by_relative_gradient_norm(
    inner: optax.GradientTransformation, blocks: Mapping[str, str], decay: float = 0.9
) -> optax.GradientTransformation:
    """Auto-RGN (Lee et al. 2023, "Surgical fine-tuning", section 4): a learning rate of its own for each block.

    The updates of block b are scaled by r_b / max r, r_b = |g_b| / |w_b|: the norm of the block's gradient over that of
    its parameters. The paper takes r anew once an epoch; here it is a running mean over steps. Paths that are not in
    `blocks` (a new head has no norm to speak of) keep their updates.
    """
    names = sorted(set(blocks.values()))

    def norms(tree):
        return {name: optax.tree.norm({p: x for p, x in tree.items() if blocks.get(p) == name}) for name in names}

    def init(params):
        return RelativeGradientNorm({name: jnp.zeros(()) for name in names}, inner.init(params))

    def update(grads, state, params):
        of_grads, of_params = norms(grads), norms(params)
        ratios = {
            name: decay * state.ratios[name] + (1 - decay) * of_grads[name] / jnp.maximum(of_params[name], 1e-12)
            for name in names
        }
        largest = jnp.maximum(jnp.max(jnp.stack(list(ratios.values()))), 1e-30)  # the debiasing cancels
        updates, inner_state = inner.update(grads, state.inner, params)
        updates = {p: u * (ratios[blocks[p]] / largest) if p in blocks else u for p, u in updates.items()}
        return updates, RelativeGradientNorm(ratios, inner_state)

    return optax.GradientTransformation(init, update)


def offsets_after(
    previous: tuple[Mapping[str, str], Mapping[str, Group], Mapping[str, int], int] | None,
    labels: Mapping[str, str],
    groups: Mapping[str, Group],
) -> dict[str, int]:
    """The step offset of each trainable path where a phase begins: for how many steps it has its optimizer values.

    previous: labels, groups, offsets and length of the phase that ends, None before the first. A path that stays
    trainable under the same kind of optimizer keeps its values and adds the length; any other starts anew at 0.
    """
    old_labels, old_groups, old_offsets, length = previous or ({}, {}, {}, 0)

    def kind(group: Group):
        return group.optimizer, tuple(sorted(dict(group.args).items())), group.weight_decay > 0

    return {
        path: old_offsets[path] + length
        if path in old_offsets and kind(old_groups[old_labels[path]]) == kind(groups[label])
        else 0
        for path, label in labels.items()
        if label != FROZEN
    }


def migrate(fresh: Any, old: Any, length: int) -> Any:
    """The optimizer state of a new phase: `fresh`, with the values of `old` for the paths that have an offset.

    length: the steps of the phase that ends. Raises RuntimeError if a value that must be carried over is not there.
    """
    kept = {_place(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(old)[0]}

    def carry(keys, leaf):
        offset, suffix = _place(keys)
        if not offset:
            return leaf
        value = kept.get((offset - length, suffix))
        if value is None or value.shape != leaf.shape:
            raise RuntimeError(f"the optimizer state {jax.tree_util.keystr(keys)} was not found in the phase before")
        # Groups of one offset share their count, and a step that donates its state cannot hold one buffer twice.
        return value if leaf.ndim else jnp.array(value)

    return jax.tree_util.tree_map_with_path(carry, fresh)


def select_groups(old: Any, new: Any, groups: Collection[str]) -> Any:
    """The optimizer state `new`, with the values of `old` for all groups but the named ones."""

    def choose(keys, previous, after):
        group = next((keys[i + 1].key for i, key in enumerate(keys) if _is_group(key)), "")
        return after if group.rpartition("+")[0] in groups else previous

    return jax.tree_util.tree_map_with_path(choose, old, new)


def _is_group(key: Any) -> bool:
    """Whether the next key of a path in an optimizer state names a group."""
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name == "inner_states"


def _place(keys: tuple) -> tuple[int | None, str]:
    """(offset, place inside its group's state) of an optimizer value; no offset where it belongs to no group."""
    for i, key in enumerate(keys):
        if _is_group(key):
            return int(keys[i + 1].key.rpartition("+")[2]), jax.tree_util.keystr(keys[i + 2 :])
    return None, jax.tree_util.keystr(keys)


def decays(group: Group, path: str) -> bool:
    """Whether weight decay acts on this path of the group."""
    return group.weight_decay > 0 and re.fullmatch(group.decay, path) is not None


def _group_transform(group: Group, schedule, offset: int = 0, times: int = 1, lr_mult=None, weight_decay=None):
    lr_mult = group.lr_mult if lr_mult is None else lr_mult
    weight_decay = group.weight_decay if weight_decay is None else weight_decay
    factory, args = getattr(optax, group.optimizer), dict(group.args)
    parameters = inspect.signature(factory).parameters

    def mask(params):
        return {path: jax.tree.map(lambda _, path=path: decays(group, path), leaf) for path, leaf in params.items()}

    def rate(count):
        steps = count - offset
        return lr_mult * schedule(steps // times if times > 1 else steps)

    mask_name = next((name for name in ("mask", "weight_decay_mask") if name in parameters), None)
    if "weight_decay" in parameters and mask_name:
        return factory(rate, weight_decay=weight_decay, **{mask_name: mask}, **args)
    if not group.weight_decay:
        return factory(rate, **args)
    return optax.chain(optax.add_decayed_weights(weight_decay, mask=mask), factory(rate, **args))
