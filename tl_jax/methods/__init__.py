"""How to adapt a network: rules of what trains, one pure loss, and probes without gradient."""

from collections.abc import Callable
from typing import NamedTuple


class Method(NamedTuple):
    """The loss of one way of adapting a network.

    loss:  (params, batch_stats, batch, forward, key) -> (mean loss, (batch_stats, {name: sum over examples})), where
           forward(params, batch_stats, images, key, train=True) -> (logits [B, K], out, batch_stats) runs the network
           on images [B, H, W, C] in 0..255. The sums are loss, penalty and accuracy.
    """

    loss: Callable
