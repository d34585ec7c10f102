"""Tip-Adapter (Zhang et al. 2022, arXiv:2207.09519): training examples as keys beside a head of normalised embeddings.

The logits of a normalised embedding f are f W + b + alpha exp(-beta (1 - f F^T)) L (equations 5 and 6), with the
embeddings F of the training examples, their one-hot labels L, and the head W, b that is there, such as one of names.
The result is a network: a layer `cache` with keys F^T, and a last dense layer with the rows of W and alpha L. Where
these keys train, it is Tip-Adapter-F.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.methods.probes import Examples, Fitted, score

ALPHAS = (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
BETAS = (0.5, 1.0, 2.0, 3.5, 5.5, 8.0)


def fit(
    head: Mapping[str, Any],
    train: Examples,
    val: Examples | None,
    grid: Sequence[float] = (),
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> Fitted:
    """Chooses alpha and beta on val, by accuracy, then nll, then the smaller ones; grid = (alpha, beta) gives them.

    head: the parameters of the zero-shot head. train, val: what that head reads [N, D], labels [N]. The value of a row
    of `tried` is [alpha, beta]. In `head` of the result are the leaves of the layer `cache`, the last one, and `out`.
    ValueError without val and values.
    """
    if (grid and len(grid) != 2) or any(not value > 0 for value in grid):
        raise ValueError(
            f"the grid of tip_adapter is {list(grid)}; expected alpha and beta, two numbers above 0, or ()"
        )
    if not grid and val is None:
        raise ValueError("tip_adapter chooses alpha and beta on val, and there is none; give a val split, or both")
    kernel, bias = (np.asarray(head["out"][leaf], np.float64) for leaf in ("kernel", "bias"))
    keys, labels = embedded(head, train[0]), np.eye(len(bias))[train[1]]

    def logits(x: np.ndarray, pairs: Sequence[tuple[float, float]]):
        plain, near = x @ kernel + bias, 1 - x @ keys.T
        votes = {beta: np.exp(-beta * near) @ labels for beta in {beta for _, beta in pairs}}
        return [plain + alpha * votes[beta] for alpha, beta in pairs]

    pairs = [tuple(map(float, grid))] if grid else list(itertools.product(ALPHAS, BETAS))
    tried = [{"value": [*pair], "val/accuracy": None, "val/nll": None, "converged": True} for pair in pairs]
    check_stop()
    if val is not None:
        for row, found in zip(tried, logits(embedded(head, val[0]), pairs), strict=True):
            row |= score(found, val[1])
    best = tried[0] if val is None else max(tried, key=_preference)
    alpha, beta = best["value"]

    def predict(features: np.ndarray) -> np.ndarray:
        return logits(embedded(head, features), [(alpha, beta)])[0].astype(np.float32)

    out = {"out/kernel": np.concatenate([kernel, alpha * labels]), "out/bias": bias}
    leaves = {"keys/kernel": keys.T, **out}
    return Fitted(predict, [alpha, beta], tried, {name: leaf.astype(np.float32) for name, leaf in leaves.items()})


def _preference(row: Mapping[str, Any]) -> tuple:
    alpha, beta = row["value"]
    return row["val/accuracy"], -row["val/nll"], -alpha, -beta


def embedded(head: Mapping[str, Any], features: np.ndarray) -> np.ndarray:
    """What the last dense layer of a zero-shot head reads, [N, D] -> [N, E] of length one, float64."""
    x = np.asarray(features, np.float64)
    if dense := head.get("dense0"):
        x = x @ np.asarray(dense["kernel"], np.float64) + np.asarray(dense["bias"], np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
