"""Two classifiers that disagree on the target, and features of one size."""

import zlib
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from tl_jax.core import checks
from tl_jax.methods import schedules
from tl_jax.methods.domain.common import (
    CLASSES,
    HEAD_READS,
    WHOLE,
    Features,
    Reversal,
    Strength,
    Target,
    both,
    head_logits,
)  # fmt: skip
from tl_jax.methods.domain.consistency import imbalance
from tl_jax.methods.term import MAIN, MODEL, Context, Network, Result, Start, Term, reverse
from tl_jax.models import head

NONE = checks.Check(lambda value: value is None, "None, for those of model.head")
SECOND = "second_head"
LAYERS = checks.Check(lambda value: not head.problems(value), "layers as in model.head")
Layers = Annotated[Any, checks.either(LAYERS, NONE)]


def mcd(
    discrepancy: Strength = 1.0,
    strength: Reversal = 1.0,
    balance: Strength = 0.01,
    layers: Layers = None,
    target: Target = "target",
) -> Term:
    """MCD in one step: two heads that differ on the target, and features that let them not (Saito et al. 2018).

    CE(F_2(f_s)) + balance (b_1 + b_2) - discrepancy mean |p_1 - p_2| over the target and its classes, eq. 2-5 as one
    scalar for all players: p_i = softmax(F_i(reverse(f_t))), so that the heads raise the difference and the features
    lower it, `strength` times as much. b_i: the loss of `balance` of F_i. CE(F_1(f_s)) is the task's own term. F_1 is
    the model's head, and what is scored. F_2 is the network and group `second_head`; it has the same layers, or
    `layers`, and starts from other random numbers. BatchNorm in heads normalises as norm_batches says (TLLib: joint).

    Defaults: TLLib's; for digits discrepancy=0.3, balance=0.03. The paper's algorithm takes turns instead, with four
    steps of the features for one of the heads: `mcd_source` and `mcd_discrepancy`.
    """
    factor, source = schedules.make(strength), mcd_source(balance, layers, target)

    def loss(context: Context) -> Result:
        supervised, k = source.loss(context), factor(context.progress)
        turned = [reverse(f, k) for f in both(context, target, HEAD_READS)]
        one, two = (head_logits(context, network, turned, context.key)[0][1] for network in (MODEL, SECOND))
        difference = disagreement(one, two)
        logs = {"discrepancy": difference, **supervised.logs}
        return supervised._replace(loss=supervised.loss - discrepancy * difference, logs=logs)

    return source._replace(loss=loss, logs=("discrepancy", "second_accuracy"))


def mcd_source(balance: Strength = 0.01, layers: Layers = None, target: Target = "target") -> Term:
    """CE(F_2(f_s)) + balance (b_1 + b_2): the part of `mcd` that all players lower (Saito et al. 2018, step A)."""

    def loss(context: Context) -> Result:
        f = both(context, target, HEAD_READS)
        (second, on_target), statistics = head_logits(context, SECOND, f, context.key)
        supervised = context.task.loss({"logits": second}, context.encoded[MAIN]).sum() / context.total[MAIN]
        spread = imbalance(both(context, target, "logits")[1]) + imbalance(on_target)
        right = jnp.argmax(second, axis=-1) == jnp.argmax(context.encoded[MAIN], axis=-1)
        logs = {"second_accuracy": right.astype(jnp.float32).mean()}
        return Result(supervised + balance * spread, logs, batch_stats=statistics)

    init, needs = _with_second_head(layers), frozenset({CLASSES, WHOLE})
    return Term(loss, on=(MAIN, target), init=init, logs=("second_accuracy",), needs=needs)


def mcd_discrepancy(layers: Layers = None, target: Target = "target") -> Term:
    """mean |p_1 - p_2| over the target and its classes, for MCD in turns (Saito et al. 2018, steps B and C, eq. 2).

    turns = ((("backbone", "head", "second_head"), {"task": 1, "mcd_source": 1}),
             (("head", "second_head"), {"task": 1, "mcd_source": 1, "mcd_discrepancy": -1}),
             *4 * ((("backbone",), {"mcd_discrepancy": 1}),))
    """

    def loss(context: Context) -> Result:
        streams = list(context.outputs)  # as the model's own head normalises them
        f = [context.outputs[stream][HEAD_READS].astype(jnp.float32) for stream in streams]
        logits, statistics = head_logits(context, SECOND, f, context.key)
        one, two = context.outputs[target]["logits"].astype(jnp.float32), logits[streams.index(target)]
        return Result(disagreement(one, two), batch_stats=statistics)

    return Term(loss, on=(target,), init=_with_second_head(layers), needs=frozenset({CLASSES, "turns"}))


def _with_second_head(layers: Any) -> Callable:
    """`Term.init` that makes the second head."""
    return lambda start: ({SECOND: second_head(start, SECOND, HEAD_READS, layers)}, None)


def mdd(
    gamma: Annotated[float, checks.number(0, above=True)] = 4.0,
    strength: Reversal = ("sigmoid", {"alpha": 10.0, "high": 0.1}),
    layers: Layers = None,
    target: Target = "target",
    features: Annotated[str, checks.one_of("pre_logits", "embedding")] = "pre_logits",
) -> Term:
    """MDD: a head that agrees with the model's on the source and not on the target (Zhang et al. 2019, eq. 27-30).

    gamma CE(h'(reverse(f_s)), y_s) - mean log(1 - p'(y_t) + 1e-6), p' = softmax(h'(reverse(f_t))) and y what the model
    answers, through which no gradient goes. gamma: exp of the margin. h' is the network and group `adversarial_head`.
    It reads what the model's head reads and has its layers, or `layers`; with features="embedding" it shares them, and
    is the last dense layer alone, or `layers` and one. BatchNorm in it normalises as norm_batches says (TLLib: joint).
    strength rises to the paper's 0.1; TLLib's rise over 1000 steps is alpha = steps / 1000.
    """
    name, factor = "adversarial_head", schedules.make(strength)

    def loss(context: Context) -> Result:
        k = factor(context.progress)
        turned = [reverse(f, k) for f in both(context, target, features)]
        adversary, statistics = head_logits(context, name, turned, context.key)
        answers = [jnp.argmax(z, axis=-1) for z in both(context, target, "logits")]
        agreement = jnp.mean(jnp.argmax(adversary[1], axis=-1) == answers[1])
        value = margin_disparity(*adversary, *answers, gamma)
        return Result(value, {"agreement": agreement, "strength": k}, batch_stats=statistics)

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        return {name: second_head(start, name, features, layers)}, None

    needs = frozenset({CLASSES, WHOLE})
    return Term(loss, on=(MAIN, target), init=init, logs=("agreement", "strength"), needs=needs)


def afn(
    strength: Strength = 0.05, delta: Strength = 1.0, target: Target = "target", features: Features = "embedding"
) -> Term:
    """AFN: features whose norms grow by `delta` a step in both domains (Xu et al. 2019, eq. 5, stepwise).

    strength * mean (|f| - r)^2 over source, and over target, with r = |f| + delta without gradient. Its value is always
    2 strength delta^2; see the logged norms. Defaults: TLLib's.
    """

    def loss(context: Context) -> Result:
        norms = [norms_of(f) for f in both(context, target, features)]
        gaps = [jnp.square(n - jax.lax.stop_gradient(n + delta)).mean() for n in norms]
        means = [n.mean() for n in norms]
        return Result(strength * sum(gaps), dict(zip(("source_norm", "target_norm"), means, strict=True)))

    return Term(loss, on=(MAIN, target), logs=("source_norm", "target_norm"))


def disagreement(one: jax.Array, two: jax.Array) -> jax.Array:
    """mean |softmax(one) - softmax(two)| over examples and classes."""
    return jnp.abs(jax.nn.softmax(one) - jax.nn.softmax(two)).mean()


def margin_disparity(
    source: jax.Array, target: jax.Array, source_answers: jax.Array, target_answers: jax.Array, gamma: float
) -> jax.Array:
    """The loss of `mdd` from the adversary's logits [S, K], [T, K] and the model's answers [S], [T]."""
    agree = -jnp.take_along_axis(jax.nn.log_softmax(source), source_answers[:, None], axis=-1).mean()
    others = jnp.sum(jax.nn.softmax(target) * (1 - jax.nn.one_hot(target_answers, target.shape[-1])), axis=-1)
    return gamma * agree - jnp.log(others + 1e-6).mean()


def norms_of(x: jax.Array) -> jax.Array:
    """The Euclidean norms of the rows of x [B, D], with the gradient 0 at a row of zeros."""
    squares = jnp.sum(jnp.square(x), axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def second_head(start: Start, name: str, features: str, layers: Any) -> Network:
    """A head on `features` with `layers`, or those of the model; ValueError where it reads the map.

    The model itself without its backbone, run from behind pre_logits.
    """
    model = start.model.model
    own = model.head if features == HEAD_READS else ()
    chosen = head.check(own if layers is None else layers)
    for what, given in {"model.head": model.head if features == HEAD_READS else (), "layers": chosen}.items():
        if given and given[0][0] in head.READS_MAP:
            expected = "expected layers on the pre_logits: leave it out, or use dense layers"
            raise ValueError(f"{what} begins with {given[0][0]!r}, which reads the feature map; {expected}")
    module = model.clone(head=chosen, head_init="lecun", frozen_norms=())
    shape = (1, start.shapes[features][-1])
    key = jax.random.fold_in(start.key, zlib.crc32(name.encode()))  # the model's own head is drawn from this seed too
    variables = jax.jit(lambda key: module.init(key, jnp.zeros(shape), start=HEAD_READS))(key)
    return Network(module, None, variables, group=name)
