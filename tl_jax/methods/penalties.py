"""Penalties on fine-tuning as terms. The network as it was loaded is the further network `reference`, frozen."""

import re
from collections.abc import Iterable
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

    w0 are the weights as loaded; added parameters (LoRA) are free. Set the weight decay to 0, which would add to it.
    Defaults: those of TLLib. Memory: a second copy of the backbone's parameters.
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
    W (section 3.3) is a softmax over channels of how much the loss of a logistic regression on the loaded network's
    pre_logits rises when the channel is switched off. It sums to 1; the factor C keeps alpha independent of the width.

    The paper's temperature=1, standardize=False gives nearly uniform W. The defaults are TLLib's: increases
    standardised over the channels and divided by 5; strength 0.01 on the sum over a batch of 48, which is alpha = 0.48.

    cuts: names in `out`, default the last before pre_logits. Switching off needs C runs of what lies behind the cut for
    each of `examples` training examples. Memory: a second copy of all but the head; per step one more forward pass.
    """

    def loss(context: Context) -> Result:
        then, _ = context.forward(REFERENCE, MAIN, stop="pre_logits")
        distances = []
        for cut, weights in context.memory.items():
            now, start = context.outputs[MAIN][cut], jax.lax.stop_gradient(then[cut])
            squares = jnp.square(now.astype(jnp.float32) - start.astype(jnp.float32))
            per_channel = squares.reshape(-1, weights.size).mean(axis=0)
            distances.append(weights.size * jnp.dot(jax.lax.stop_gradient(weights), per_channel))
        return Result(alpha / 2 * sum(distances) + _decay(context, beta))

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        reference = _reference(start, [name for name in start.variables["params"] if name != "head"])
        widths = {cut: start.shapes[cut][-1] for cut in precompute.choose_cuts(start.model.cuts, cuts)}
        return {REFERENCE: reference}, {cut: jnp.full(width, 1 / width) for cut, width in widths.items()}

    def refresh(start: Start) -> dict[str, jax.Array]:
        without = precompute.losses_without(start, REFERENCE, tuple(start.memory), examples)
        return {cut: precompute.attention(loss, temperature, standardize) for cut, loss in without.items()}

    return Term(loss, init=init, refresh=refresh, reads=(REFERENCE,), needs=frozenset({"classes"}))


def bss(eta: Strength = 0.001, k: Count = 1) -> Term:
    """Batch spectral shrinkage: eta * sum of the k smallest squared singular values (Chen et al. 2019, eq. 5).

    Of the pre_logits [B, D] of the batch, or the micro-batch. Defaults: TLLib's. Memory: [min(B, D), D].
    """

    def loss(context: Context) -> Result:
        features = context.outputs[MAIN]["pre_logits"].astype(jnp.float32)
        if k > (count := min(features.shape)):
            raise ValueError(f"bss with k={k}: features {features.shape} have only {count} singular values")
        return Result(eta * squared_singular_values(features, slice(-k, None)))

    return Term(loss)


def co_tuning(
    strength: Strength = 2.3,
    approach: Annotated[str, checks.one_of("reverse", "direct")] = "reverse",
    temperature: Temperature = 1.0,
    examples: Count = 10_000,
) -> Term:
    """Co-Tuning: the source classifier is tuned too, towards the source classes of each target class (You et al. 2020).

    strength * mean cross-entropy between the source head on the current features and p(y_s | y_t), mixed by the targets
    (smoothed and mixed labels included). p(y_s | y_t) comes from the loaded network's probabilities on the training
    examples: approach "reverse" (the paper's algorithm 1) fits p(y_t | y_s) on at most `examples` by a logistic
    regression without intercept, its strength chosen by the log loss of up to 3 folds, and inverts it by Bayes' rule;
    "direct" averages the probabilities of each target class, as TLLib does. A class without example gets the average.

    temperature: divides the source logits; the paper calibrates it on held-out source data. Default strength: TLLib's.
    Memory: the source head, which trains, and [K, S] for S source classes; before step 0 the probabilities, [N, S].
    Raises ValueError in init where the weights have no classifier, or one for other features.
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
        seen, relationship = np.unique(labels), np.tile(probabilities.mean(0, np.float64), (start.task.outputs, 1))
        if approach == "direct":
            relationship[seen] = [probabilities[labels == label].mean(axis=0, dtype=np.float64) for label in seen]
        else:
            relationship[seen] = precompute.reverse(probabilities, labels, examples)
        return jnp.asarray(relationship, jnp.float32)

    return Term(loss, init=init, refresh=refresh, needs=frozenset({"classes"}))


def r_drop(alpha: Strength = 0.3) -> Term:
    """R-Drop: alpha * (KL(p || q) + KL(q || p)) / 2 of two passes with other dropout masks (Liang et al. 2021, eq. 2).

    Mean over the batch, with gradients through both passes. The cross-entropy is that of the first pass (in the paper
    of both, with the same expectation). BatchNorm normalises the second pass by itself; its statistics are discarded.
    Default: that of the authors' ViT code. Memory and time: a second forward and backward pass.
    """

    def loss(context: Context) -> Result:
        second, _ = context.forward(MODEL, MAIN, train=True, key=context.key)
        p, q = (jax.nn.log_softmax(out["logits"].astype(jnp.float32)) for out in (context.outputs[MAIN], second))
        return Result(alpha / 2 * jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1).mean())

    return Term(loss, needs=frozenset({"classes", "stochastic"}))


def l1(alpha: Strength = 1e-4, paths: Annotated[str, checks.REGEX] = "head/.*") -> Term:
    """L1: alpha * sum |w| over the parameters whose whole path matches `paths` (the lasso, Tibshirani 1996).

    Subgradient steps bring weights near 0, not to it. Raises ValueError in init where no path matches.
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


def squared_singular_values(x: jax.Array, which: slice) -> jax.Array:
    """The sum of those of x [B, D] that `which` takes of the falling order."""
    # sigma^2 = |F v|^2, whose gradient for constant v is exactly 2 sigma u v^T. The derivative of the SVD is infinite
    # where two singular values coincide.
    right = jnp.linalg.svd(jax.lax.stop_gradient(x), full_matrices=False)[2][which]
    return jnp.sum(jnp.matmul(x, right.T, precision=jax.lax.Precision.HIGHEST) ** 2)


def _reference(start: Start, names: Iterable[str], *, statistics: bool = True) -> Network:
    variables = {"params": {name: _copy(start.variables["params"][name]) for name in names}}
    if statistics and start.variables.get("batch_stats"):
        variables["batch_stats"] = _copy(start.variables["batch_stats"])
    return Network(start.model, None, variables, origin="copy")


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.array, tree)  # a train step that donates its state cannot take one buffer twice


def _sum_of_squares(leaves: Iterable[jax.Array]) -> jax.Array:
    return sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)


def _decay(context: Context, beta: float) -> jax.Array:
    return beta / 2 * _sum_of_squares(jax.tree.leaves(context.params["head"]))


PENALTIES = {term.__name__: term for term in (l2_sp, delta, bss, co_tuning, r_drop, l1)}
