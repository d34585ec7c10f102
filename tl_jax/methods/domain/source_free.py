"""Adaptation without source data: a trained network and unlabelled examples of the target."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core import checks
from tl_jax.core.fields import INDEX
from tl_jax.methods.domain import outputs
from tl_jax.methods.term import MAIN, MODEL, Context, Network, Result, Start, Term
from tl_jax.tasks import losses

Weight = Annotated[float, checks.number(0)]


def shot(
    pseudo: Weight = 0.3,
    target: Annotated[str, checks.TEXT] = MAIN,
    features: Annotated[str, checks.one_of("embedding", "pre_logits")] = "embedding",
    every: Annotated[tuple[float, str], checks.duration()] = (1.0, "epochs"),
) -> Term:
    """SHOT: pseudo * cross-entropy with pseudo-labels + E H(p) - H(E p) (Liang et al. 2020, arXiv:2002.08546, eq. 3-6).

    Freeze the classifier by rules. The pseudo-labels of all examples come from `centroid_labels` of the `features`, at
    the start of the phase and `every` so often, in eval mode. target: the unlabelled stream, the run's own by default.
    Memory: the pseudo-labels, int32 [N].
    """

    def loss(context: Context) -> Result:
        logits = context.outputs[target]["logits"].astype(jnp.float32)
        labels = context.memory[context.batch[target][INDEX]]
        cross_entropy = losses.cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])).mean()
        agree = (logits.argmax(axis=-1) == labels).mean(dtype=jnp.float32)
        return Result(pseudo * cross_entropy + outputs.information(logits), {"agreement": agree})

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        return {}, jnp.zeros(start.facts[target].examples, jnp.int32)

    def refresh(start: Start) -> np.ndarray:
        forward = jax.jit(lambda variables, x: start.apply(MODEL, variables, x))
        outs = [jax.device_get(forward(start.variables, x)) for x, _ in start.batches(target)]
        z, f = (np.concatenate([out[name] for out in outs]).astype(np.float64) for name in ("logits", features))
        return centroid_labels(f, np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))).astype(np.int32)

    return Term(
        loss, on=(target,), init=init, refresh=refresh, refresh_every=every, logs=("agreement",),
        needs=frozenset({"classes", "whole_batch"}), trained=True,
    )  # fmt: skip


def centroid_labels(features: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The class of the nearest centroid, by cosine, of each example: int [N] (Liang et al. 2020, eq. 4-5).

    features [N, D], probabilities [N, K]; float64. A 1 is appended to every feature, as the authors' code does. The
    first centroids are weighted by the probabilities, the second by the first labels. A class that no example is
    predicted as has no centroid.
    """
    points = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    present = np.unique(probabilities.argmax(axis=1))
    labels = _nearest(points, probabilities[:, present])
    return present[_nearest(points, np.eye(len(present))[labels])]


def _nearest(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The centroid, of points [N, D] weighted by weights [N, K], that has the largest cosine with each point."""
    centroids = weights.T @ points / np.maximum(weights.sum(axis=0), 1e-12)[:, None]
    cosines = points @ (centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)).T
    empty = weights.sum(axis=0) == 0
    return np.where(empty, -np.inf, cosines).argmax(axis=1)
