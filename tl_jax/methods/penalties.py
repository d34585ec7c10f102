"""Penalties on fine-tuning, added to the mean loss: towards the start, towards good features, towards sparsity.

Each is a `Regularizer`: a pure penalty on one forward pass, and what it needs beside the network as extra parameters.
Whatever is computed before step 0 (a copy of the network as loaded, channel weights, a relationship of classes) lies
below "reference/" and is frozen, so that it is checkpointed and hashed like the rest.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core import messages, trees
from tl_jax.methods import precompute
from tl_jax.methods.precompute import Start
from tl_jax.tasks import losses


class Pass(NamedTuple):
    """One forward pass of the train step: what a penalty may look at.

    params: every parameter, nested, with "reference" and "source_head" where a penalty asked for them. images: after
    mixing, [B, H, W, C] float32 in 0..255; targets [B, K]; labels [B]; logits [B, K]; out: the named cuts.
    forward: (params, batch_stats, images, key, train=True) -> (logits, out, batch_stats), normalises by itself.
    """

    params: Any
    batch_stats: Any
    images: jax.Array
    targets: jax.Array
    labels: jax.Array
    logits: jax.Array
    out: Mapping[str, jax.Array]
    forward: Callable
    key: jax.Array


class Regularizer(NamedTuple):
    """One penalty: a scalar for the mean loss, and its extra parameters (nested, {} for none)."""

    penalty: Callable[[Pass], jax.Array]
    init: Callable[[Start], dict]


def l2_sp(alpha: float = 0.01, beta: float = 0.01) -> Regularizer:
    """L2-SP: alpha/2 ||w - w0||^2 over the backbone + beta/2 ||head||^2 (Li, Grandvalet & Davoine 2018, eq. 2-3).

    w0 are the weights as loaded. Frozen leaves are at their w0 and add nothing; added parameters (LoRA) are not held.
    The penalty replaces weight decay: set that to 0, or it pulls towards the origin at the same time. Defaults: those
    of TLLib.
    Memory: a second copy of the backbone's parameters, no optimizer arrays.
    """

    def penalty(run: Pass) -> jax.Array:
        now = trees.flatten(run.params["backbone"])
        start = trees.flatten(jax.lax.stop_gradient(run.params["reference"]["params"]["backbone"]))
        return alpha / 2 * _sum_of_squares(now[path] - leaf for path, leaf in start.items()) + _decay(run, beta)

    def init(start: Start) -> dict:
        return {"reference": {"params": {"backbone": _copy(start.params["backbone"])}}}

    return Regularizer(penalty, init)


def delta(
    alpha: float = 0.48,
    beta: float = 0.01,
    cuts: Sequence[str] = (),
    examples: int = 256,
    temperature: float = 5.0,
    standardize: bool = True,
) -> Regularizer:
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
    each of `examples` training examples (drawn at random in one pass over all): for the last cut that is a pooling or a
    norm, for an earlier one whole stages (stage3 of a ResNet-50: 1024 x 256 runs of stage4, 4e14 operations).
    Memory: a second copy of all but the head, statistics and added parameters (LoRA, prompts) included, because the
    reference runs through the same network; per step a forward pass more, without backward.
    """

    def penalty(run: Pass) -> jax.Array:
        reference = run.params["reference"]
        # The head is no part of the reference; its output is not read, so that XLA drops it.
        params = {**reference["params"], "head": run.params["head"]}
        params, batch_stats = jax.lax.stop_gradient((params, reference.get("batch_stats", {})))
        _, start, _ = run.forward(params, batch_stats, run.images, run.key, train=False)
        distances = [
            _channel_distance(run.out[cut], jax.lax.stop_gradient(start[cut]), weights)
            for cut, weights in reference["delta"].items()
            if not cuts or cut in cuts
        ]
        return alpha / 2 * sum(distances) + _decay(run, beta)

    def init(start: Start) -> dict:
        without = precompute.losses_without(start, cuts, examples)
        weights = {cut: precompute.attention(loss, temperature, standardize) for cut, loss in without.items()}
        network = {
            name: tree for name, tree in start.params.items() if name not in ("head", "source_head", "reference")
        }
        reference = {"params": _copy(network), "delta": weights}
        if start.batch_stats:
            reference["batch_stats"] = _copy(start.batch_stats)
        return {"reference": reference}

    return Regularizer(penalty, init)


def bss(eta: float = 0.001, k: int = 1) -> Regularizer:
    """Batch spectral shrinkage: eta * sum of the k smallest squared singular values (Chen et al. 2019, eq. 5).

    The matrix is the batch's pre_logits [B, D]; under pmap or gradient accumulation, of the part computed at once.
    Defaults: those of TLLib. Memory: its singular vectors, [min(B, D), D].
    """

    def penalty(run: Pass) -> jax.Array:
        features = run.out["pre_logits"].astype(jnp.float32)
        if k > min(features.shape):
            raise ValueError(
                f"bss with k={k}: features {features.shape} have only {min(features.shape)} singular values"
            )
        # sigma^2 = |F v|^2, and with v held constant its gradient is exactly 2 sigma u v^T: no derivative of the SVD,
        # which is infinite where two singular values coincide.
        right = jnp.linalg.svd(jax.lax.stop_gradient(features), full_matrices=False)[2][-k:]
        return eta * jnp.sum(jnp.matmul(features, right.T, precision=jax.lax.Precision.HIGHEST) ** 2)

    return Regularizer(penalty, lambda start: {})


def co_tuning(
    strength: float = 2.3, approach: str = "reverse", temperature: float = 1.0, examples: int = 10_000
) -> Regularizer:
    """Co-Tuning: the source classifier is tuned too, towards the source classes of each target class (You et al. 2020).

    strength * mean cross-entropy between the source head on the current features and p(y_s | y_t), mixed by the targets
    (so label smoothing and mixup reach it too). p(y_s | y_t) comes from the loaded network's probabilities on the
    training examples: approach "reverse" (the paper's algorithm 1) fits p(y_t | y_s) by a logistic regression without
    intercept, its strength chosen by the log loss of up to 3 folds, and inverts it by Bayes' rule; "direct" averages
    the probabilities of each target class, as TLLib does. A class without an example gets the average over all.

    temperature divides the source logits. The paper calibrates it on held-out source data, which a weight file does not
    bring, so it is 1 unless given. The regression takes at most `examples`, drawn at random. Default strength: TLLib's.
    Memory: the source head, which trains, and [K, S] for S source classes; before step 0 the probabilities, [N, S].
    Raises ValueError in init where the weights have no classifier, or one for other features.
    """

    def penalty(run: Pass) -> jax.Array:
        logits = precompute.linear(run.out["pre_logits"], run.params["source_head"])
        relationship = jax.lax.stop_gradient(run.params["reference"]["co_tuning"]["relationship"])
        return strength * losses.cross_entropy(logits, run.targets @ relationship).mean()

    def init(start: Start) -> dict:
        probabilities, labels = precompute.source_probabilities(start, temperature)
        if approach == "direct":
            rows = precompute.direct(probabilities, labels)
        else:
            rows = precompute.reverse(*precompute.subset(probabilities, labels, examples))
        relationship = np.tile(probabilities.mean(axis=0, dtype=np.float64), (start.num_classes, 1))
        relationship[np.unique(labels)] = rows
        return {
            "source_head": _copy(start.source_head),
            "reference": {"co_tuning": {"relationship": jnp.asarray(relationship, jnp.float32)}},
        }

    return Regularizer(penalty, init)


def r_drop(alpha: float = 0.3) -> Regularizer:
    """R-Drop: alpha * (KL(p || q) + KL(q || p)) / 2 of two passes with other dropout masks (Liang et al. 2021, eq. 2).

    Mean over the batch; gradients flow through both passes. The paper also takes the cross-entropy of both; here it is
    that of the first, which has the same expectation. Needs dropout or drop_path > 0: without, both passes are equal
    and the penalty is 0. BatchNorm normalises the second pass by itself and its statistics are discarded.
    Default: that of the authors' ViT code. Memory and time: a second forward and backward pass.
    """

    def penalty(run: Pass) -> jax.Array:
        logits, _, _ = run.forward(run.params, run.batch_stats, run.images, jax.random.fold_in(run.key, 1))
        p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (run.logits, logits))
        return alpha / 2 * jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), axis=-1).mean()

    return Regularizer(penalty, lambda start: {})


def l1(alpha: float = 1e-4, paths: str = "head/.*") -> Regularizer:
    """L1: alpha * sum |w| over the parameters whose whole path matches `paths` (the lasso, Tibshirani 1996).

    Frozen ones among them add a constant and no gradient. Subgradient steps bring weights near 0, not to it.
    Memory: none. Raises ValueError in init where no path matches.
    """

    def chosen(params: Any) -> dict[str, Any]:
        return {path: leaf for path, leaf in trees.flatten(params).items() if _own(path) and re.fullmatch(paths, path)}

    def penalty(run: Pass) -> jax.Array:
        return alpha * sum(jnp.abs(leaf).sum() for leaf in chosen(run.params).values())

    def init(start: Start) -> dict:
        if not chosen(start.params):
            known = list(filter(_own, trees.flatten(start.params)))
            raise ValueError(f"l1 with paths={paths!r} matches no parameter{messages.nearest(paths, known)}")
        return {}

    return Regularizer(penalty, init)


PENALTIES: dict[str, Callable[..., Regularizer]] = {
    "l2_sp": l2_sp,
    "delta": delta,
    "bss": bss,
    "co_tuning": co_tuning,
    "r_drop": r_drop,
    "l1": l1,
}


def make(pairs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Regularizer]:
    """The penalties of pairs (name, {parameter: value}); one ValueError for every name or value that does not fit."""
    problems, names = [], []
    for pair in pairs:
        if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str):
            problems += _problems(*pair)
            names.append(pair[0])
        else:
            problems.append(f"  {pair!r} is not a pair (name, {{parameter: value}})")
    problems += [f"  {name!r} is given {names.count(name)} times" for name in PENALTIES if names.count(name) > 1]
    if problems:
        raise ValueError("method.regularize does not fit:\n" + "\n".join(problems))
    return [PENALTIES[name](**parameters) for name, parameters in pairs]


def _problems(name: str, parameters: Mapping[str, Any]) -> list[str]:
    if name not in PENALTIES:
        return [f"  there is no penalty {name!r}{messages.nearest(name, PENALTIES)}; known: {', '.join(PENALTIES)}"]
    if not isinstance(parameters, Mapping):
        return [f"  {name}: {parameters!r} is not a dict {{parameter: value}}"]
    known = list(inspect.signature(PENALTIES[name]).parameters)
    problems = []
    for parameter, value in parameters.items():
        if parameter not in known:
            hint = messages.nearest(str(parameter), known)
            problems.append(f"  {name} has no parameter {parameter!r}{hint}; it has: {', '.join(known)}")
            continue
        fits, expected = CHECKS[parameter]
        if not fits(value):
            problems.append(f"  {name}: {parameter}={value!r} is not {expected}")
    return problems


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _regex(value: Any) -> bool:
    try:
        return bool(re.compile(value))
    except (re.error, TypeError):
        return False


_STRENGTH = (lambda value: _number(value) and value >= 0, "a number >= 0")
_COUNT = (lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1, "a whole number >= 1")
CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": _STRENGTH,
    "beta": _STRENGTH,
    "eta": _STRENGTH,
    "strength": _STRENGTH,
    "k": _COUNT,
    "examples": _COUNT,
    "temperature": (lambda value: _number(value) and value > 0, "a number > 0"),
    "standardize": (lambda value: isinstance(value, bool), "True or False"),
    "approach": (lambda value: value in ("reverse", "direct"), "'reverse' or 'direct'"),
    "paths": (_regex, "a regular expression"),
    "cuts": (
        lambda value: isinstance(value, list | tuple) and all(isinstance(cut, str) for cut in value),
        "a sequence of names of cuts, such as ('stage4',)",
    ),
}


def _own(path: str) -> bool:
    return not path.startswith("reference/")


def _copy(tree: Any) -> Any:
    # A copy, because a train step that donates its state cannot hold one buffer twice.
    return jax.tree.map(jnp.array, tree)


def _sum_of_squares(leaves: Iterable[jax.Array]) -> jax.Array:
    return sum(jnp.sum(jnp.square(leaf)) for leaf in leaves)


def _decay(run: Pass, beta: float) -> jax.Array:
    return beta / 2 * _sum_of_squares(jax.tree.leaves(run.params["head"]))


def _channel_distance(now: jax.Array, start: jax.Array, weights: jax.Array) -> jax.Array:
    squares = jnp.square(now.astype(jnp.float32) - start.astype(jnp.float32))
    per_channel = squares.reshape(-1, weights.size).mean(axis=0)
    return weights.size * jnp.dot(jax.lax.stop_gradient(weights), per_channel)
