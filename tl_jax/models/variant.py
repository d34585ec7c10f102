"""What a name of the model table stands for, and what all networks have in common.

`logits, out = network.apply(variables, x, train, start, stop)`: x is normalised, `out` holds the output of every cut in
order, embedding (what the last dense layer reads) and logits [B, K]; pre_logits and these two are float32. With
`start=NAME` x is out[NAME] and only the rest runs; with `stop=NAME` nothing behind out[NAME] runs, which is returned in
place of the logits. Training needs mutable=["batch_stats"] with BatchNorm, and rngs={"dropout": key} with dropout or
drop_path. Fields of all networks, some of which are without effect in some:

num_classes: of the head; 0 for none, then logits are the pre_logits. head: the layers before the last dense one, see
models/head.py. head_init: "zeros" or "lecun", of the last dense layer. dtype: of the computation (float32 or bfloat16);
parameters and statistics are float32. dropout: before the last dense layer. drop_path: stochastic depth at the last
block, rising linearly from 0. remat: what the backward pass of a block recomputes, see layers.recomputed. attention:
"xla" or "cudnn", see layers.attend. frozen_norms: paths of BatchNorm layers that keep their running statistics in
training. axis_name: pmap axis over which BatchNorm averages.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tl_jax.core.card import Card
from tl_jax.models.conversion import Layout


class Variant(NamedTuple):
    """One named model.

    module: makes the network from `num_classes` and whatever else of its fields is to change. card: the preprocessing
    its published weights expect. layouts: the conversion tables of its files; the first is the export default.
    flavours: {layout: variant} where that layout's publisher computes or preprocesses differently.
    """

    module: Callable[..., Any]
    card: Card
    layouts: Mapping[str, Layout]
    flavours: Mapping[str, str]
