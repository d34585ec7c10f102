"""Language modelling: the tokens that were masked, or the next token of every position, told from the others."""

import numpy as np

from tl_jax.tasks.predictions import Predictions
from tl_jax.tasks.task import Metrics


def scores(predictions: Predictions) -> dict[str, float]:
    """Negative log-likelihood of a token (natural log, the mean over all tokens), and its exponential, in float64."""
    values = _weighted(predictions, np.ones((len(predictions.values), 1)))
    return {"loss": float(values["nll"][0]), "perplexity": float(values["perplexity"][0])}


def _weighted(predictions, weights) -> dict:
    """Of all tokens of a resample together; undefined where there are none."""
    nll, tokens, correct = predictions.values.astype(np.float64).T @ weights
    counted = np.where(tokens > 0, tokens, np.nan)
    with np.errstate(over="ignore"):
        return {"perplexity": np.exp(nll / counted), "nll": nll / counted, "token_accuracy": correct / counted}


METRICS = Metrics(
    scalars=("perplexity", "nll", "token_accuracy"),
    less=("perplexity", "nll"),
    monitor=(("perplexity", "min"), ("loss", "min")),
    scores=scores,
    parts=(_weighted,),
    differ=lambda a, b: a.values[:, 2] != b.values[:, 2],  # other numbers of correct tokens
    loss_label="loss (nats per token)",
)
