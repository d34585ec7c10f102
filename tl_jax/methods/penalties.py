"""Penalties on fine-tuning as terms: towards the start, towards good features, towards sparsity.

What is computed at the start of a phase (channel weights, a relationship of classes) is memory. A copy of the network
as it was loaded is a network of its own, `reference`, which nothing trains, so that it is checkpointed and hashed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core import checks, trees
from tl_jax.core.messages import nearest
from tl_jax.methods import precompute
from tl_jax.methods.term import MAIN, MODEL, Context, Network, Result, Start, Term
from tl_jax.tasks import losses

Strength = Annotated[float, checks.number(0)]
Count = Annotated[int, checks.integer(1)]
Temperature = Annotated[float, checks.number(0, above=True)]
REFERENCE = "reference"


def l2_sp(alpha: Strength = 0.01, beta: Strength = 0.01) -> Term:
    """L2-SP: alpha/2 ||w - w0||^2 over the backbone + beta/2 ||head||^2 (Li, Grandvalet & Davoine 2018, eq. 2-3).

    w0 are the weights as loaded. Frozen leaves are at their w0 and add nothing; added parameters (LoRA) are free.
    The penalty replaces weight decay: set that to 0, or it pulls towards the origin at the same time. Defaults: those
    of TLLib.
    Memory: a second copy of the backbone's parameters, no optimizer arrays.
    """

    def loss(context: Context) -> Result:
        now = trees.flatten(context.params["backbone"])
        start = trees.flatten(jax.lax.stop_gradient(context.params[REFERENCE]["backbone"]))
        distance = _sum_of_squares(now[path] - leaf for path, leaf in start.items())
        return Result(alpha / 2 * distance + _decay(context, beta))

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        return {REFERENCE: _reference(start, ("backbone",), statistics=False)}, None

    return Term(loss, init=init)


def delta(
    alpha: Strength = 0.48,
    beta: Strength = 0.01,
    cuts: Annotated[tuple[str, ...], checks.TEXTS] = (),
    examples: Count = 256,
    temperature: Temperature = 5.0,
    standardize: Annotated[bool, checks.FLAG] = True,
) -> Term:
    """DELTA: features stay near those of the loaded network, channel by channel (Li et al. 2019, section 3).

    alpha/2 * sum over cuts of mean over examples and positions of sum_j C W_j (f_j - f0_j)^2, + beta/2 ||head||^2, for
    the C channels of a cut (of tokens: their width). f0 comes from the loaded network in eval mode on the same images.
    W (section 3.3) is a softmax over channels of how much the loss rises when the channel is switched off; it sums to
    1, so the factor C keeps alpha independent of the width, as in TLLib. The loss is that of a logistic regression
    fitted on the loaded network's pre_logits.

    The paper takes the softmax of the increases as they are: temperature=1, standardize=False. They are so small that
    it is nearly uniform; the default, as in TLLib, standardises them over the channels and divides by 5. TLLib sums
    over its batch of 48 at a strength of 0.01, which is alpha = 0.48 for this mean.

    cuts: names in `out`, default the last before pre_logits. Switching off needs C runs of what lies behind the cut for
    each of `examples` training examples (sampled in one pass over all): for the last cut that is a pooling or a norm,
    for an earlier one whole stages (stage3 of a ResNet-50: 1024 x 256 runs of stage4, 4e14 operations).
    Memory: a second copy of all but the head, statistics and added parameters (LoRA, prompts) included, because the
    reference runs through the same network; per step a forward pass more, without backward.
    """

    def loss(context: Context) -> Result:
        now = context.outputs[MAIN]
        then, _ = context.forward(REFERENCE, MAIN, stop="pre_logits")
        distances = [
            _channel_distance(now[cut], jax.lax.stop_gradient(then[cut]), weights)
            for cut, weights in context.memory.items()
        ]
        return Result(alpha / 2 * sum(distances) + _decay(context, beta))

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        reference = _reference(start, [name for name in start.variables["params"] if name != "head"])
        widths = {cut: start.shapes[cut][-1] for cut in precompute.choose_cuts(start.model.cuts, cuts)}
        memory = {cut: jnp.full(width, 1 / width) for cut, width in widths.items()}
        return {REFERENCE: reference}, memory

    def refresh(start: Start) -> dict[str, jax.Array]:
        without = precompute.losses_without(start, REFERENCE, tuple(start.memory), examples)
        return {cut: precompute.attention(loss, temperature, standardize) for cut, loss in without.items()}

    return Term(loss, init=init, refresh=refresh, reads=(REFERENCE,), needs=frozenset({"classes"}))


def bss(eta: Strength = 0.001, k: Count = 1) -> Term:
    """Batch spectral shrinkage: eta * sum of the k smallest squared singular values (Chen et al. 2019, eq. 5).

    The matrix is the batch's pre_logits [B, D]; under pmap or gradient accumulation, of the part computed at once.
    Defaults: those of TLLib. Memory: its singular vectors, [min(B, D), D].
    """

    def loss(context: Context) -> Result:
        features = context.outputs[MAIN]["pre_logits"].astype(jnp.float32)
        if k > min(features.shape):
            raise ValueError(
                f"bss with k={k}: features {features.shape} have only {min(features.shape)} singular values"
            )
        # sigma^2 = |F v|^2, and with v held constant its gradient is exactly 2 sigma u v^T: no derivative of the SVD,
        # which is infinite where two singular values coincide.
        right = jnp.linalg.svd(jax.lax.stop_gradient(features), full_matrices=False)[2][-k:]
        return Result(eta * jnp.sum(jnp.matmul(features, right.T, precision=jax.lax.Precision.HIGHEST) ** 2))

    return Term(loss)


def co_tuning(
    strength: Strength = 2.3,
    approach: Annotated[str, checks.one_of("reverse", "direct")] = "reverse",
    temperature: Temperature = 1.0,
    examples: Count = 10_000,
) -> Term:
    """Co-Tuning: the source classifier is tuned too, towards the source classes of each target class (You et al. 2020).

    strength * mean cross-entropy between the source head on the current features and p(y_s | y_t), mixed by the targets
    (so label smoothing and mixup reach it too). p(y_s | y_t) comes from the loaded network's probabilities on the
    training examples: approach "reverse" (the paper's algorithm 1) fits p(y_t | y_s) by a logistic regression without
    intercept, its strength chosen by the log loss of up to 3 folds, and inverts it by Bayes' rule; "direct" averages
    the probabilities of each target class, as TLLib does. A class without an example gets the average over all.

    temperature divides the source logits. The paper calibrates it on held-out source data, which a weight file does not
    bring, so it is 1 unless given. The regression takes at most `examples`, sampled at random. Default strength:
    TLLib's. Memory: the source head, which trains, and [K, S] for S source classes; before step 0 the probabilities,
    [N, S]. Raises ValueError in init where the weights have no classifier, or one for other features.
    """
    name = "source_head"

    def loss(context: Context) -> Result:
        logits = precompute.linear(context.outputs[MAIN]["pre_logits"], context.params[name])
        relationship = jax.lax.stop_gradient(context.memory)
        per_example = losses.cross_entropy(logits, context.encoded[MAIN] @ relationship)
        return Result(strength * per_example.sum() / context.total[MAIN])

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        head = precompute.checked_source_head(start)
        relationship = jnp.zeros((start.task.outputs, head["bias"].size))
        return {name: Network(None, None, {"params": _copy(head)}, "head", "copy")}, relationship

    def refresh(start: Start) -> jax.Array:
        if np.any(start.memory):  # of the network as it was loaded, so never computed again
            return start.memory
        probabilities, labels = precompute.source_probabilities(start, start.loaded["params"][name], temperature)
        if approach == "direct":
            rows = precompute.direct(probabilities, labels)
        else:
            rows = precompute.reverse(*precompute.subset(probabilities, labels, examples))
        relationship = np.tile(probabilities.mean(axis=0, dtype=np.float64), (start.task.outputs, 1))
        relationship[np.unique(labels)] = rows
        return jnp.asarray(relationship, jnp.float32)

    return Term(loss, init=init, refresh=refresh, needs=frozenset({"classes"}))


def r_drop(alpha: Strength = 0.3) -> Term:
    """R-Drop: alpha * (KL(p || q) + KL(q || p)) / 2 of two passes with other dropout masks (Liang et al. 2021, eq. 2).

    Mean over the batch; gradients flow through both passes. The paper also takes the cross-entropy of both; here it is
    that of the first, which has the same expectation. Needs dropout or drop_path > 0: without, both passes are equal
    and the penalty is 0. BatchNorm normalises the second pass by itself and its statistics are discarded.
    Default: that of the authors' ViT code. Memory and time: a second forward and backward pass.
    """

    def loss(context: Context) -> Result:
        second, _ = context.forward(MODEL, MAIN, train=True, key=context.key)
        p, q = (jax.nn.log_softmax(out["logits"].astype(jnp.float32)) for out in (context.outputs[MAIN], second))
        return Result(alpha / 2 * jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1).mean())

    return Term(loss, needs=frozenset({"classes", "stochastic"}))


def l1(alpha: Strength = 1e-4, paths: Annotated[str, checks.REGEX] = "head/.*") -> Term:
    """L1: alpha * sum |w| over the parameters whose whole path matches `paths` (the lasso, Tibshirani 1996).

    Frozen ones among them add a constant and no gradient. Subgradient steps bring weights near 0, not to it.
    Memory: none. Raises ValueError in init where no path matches.
    """

    def own(params: Any) -> dict[str, Any]:
        return {path: x for path, x in trees.flatten(params).items() if not path.startswith(f"{REFERENCE}/")}

    def loss(context: Context) -> Result:
        chosen = [leaf for path, leaf in own(context.params).items() if re.fullmatch(paths, path)]
        return Result(alpha * sum(jnp.abs(leaf).sum() for leaf in chosen))

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        known = list(own(start.variables["params"]))
        if not any(re.fullmatch(paths, path) for path in known):
            raise ValueError(f"l1 with paths={paths!r} matches no parameter{nearest(paths, known)}")
        return {}, None

    return Term(loss, init=init)


def _reference(start: Start, names: Iterable[str], *, statistics: bool = True) -> Network:
    """The network as it was loaded; it computes what the model computes."""
    params = {name: _copy(start.variables["params"][name]) for name in names}
    variables = {"params": params}
    if statistics and start.variables.get("batch_stats"):
        variables["batch_stats"] = _copy(start.variables["batch_stats"])
    return Network(start.model, None, variables, origin="copy")


def _copy(tree: Any) -> Any:
    # A copy, because a train step that donates its state cannot hold one buffer twice.
    return jax.tree.map(jnp.array, tree)


def _sum_of_squares(leaves: Iterable[jax.Array]) -> jax.Array:
    return sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)


def _decay(context: Context, beta: float) -> jax.Array:
    return beta / 2 * _sum_of_squares(jax.tree.leaves(context.params["head"]))


def _channel_distance(now: jax.Array, then: jax.Array, weights: jax.Array) -> jax.Array:
    squares = jnp.square(now.astype(jnp.float32) - then.astype(jnp.float32))
    per_channel = squares.reshape(-1, weights.size).mean(axis=0)
    return weights.size * jnp.dot(jax.lax.stop_gradient(weights), per_channel)


PENALTIES: Mapping[str, Any] = {
    "l2_sp": l2_sp,
    "delta": delta,
    "bss": bss,
    "co_tuning": co_tuning,
    "r_drop": r_drop,
    "l1": l1,
}
