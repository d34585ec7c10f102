"""How to adapt: each method is data (rules) plus one pure loss, so that all of them share the trainer."""

from collections.abc import Callable
from typing import NamedTuple

from tl_jax.core.trees import Rules


class Method(NamedTuple):
    """One way of adapting a network.

    rules: ordered (path regex, group); the group "frozen" is never trained.
    loss:  (params, batch_stats, batch, forward, key) -> (mean loss, (batch_stats, {name: sum over examples})), where
           forward(params, batch_stats, images, key, train=True) -> (logits [B, K], out, batch_stats) runs the network
           on images [B, H, W, C] in 0..255. The sums are loss, penalty and accuracy.
    """

    rules: Rules
    loss: Callable
