"""What all networks have in common, and what a name of the model table stands for."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models.conversion import Layout
from tl_jax.models.head import classify
from tl_jax.models.layers import Policy


class Model(nn.Module, kw_only=True):
    """A network: `logits, out = model.apply(variables, x, train, start, stop)`. A family adds `cuts` and `backbone`.

    x is normalised. `out` holds the output of every cut in order, embedding (what the last dense layer reads) and
    logits [B, K]; pre_logits and these two are float32. With `start=NAME` x is out[NAME] and only the layers behind it
    run. With `stop=NAME` nothing behind out[NAME] runs, which is returned in place of the logits. Training needs
    mutable=["batch_stats"] with BatchNorm, and rngs={"dropout": key} with a dropout or drop_path.

    Some fields are without effect in some networks. num_classes: of the head; 0 for none, then logits are the
    pre_logits. head: the layers before the last dense one, see models/head.py. head_init: "zeros", "lecun" or "xavier",
    of the last dense layer. dtype: of the computation (float32 or bfloat16); parameters and statistics are float32.
    dropout: before the last dense layer. hidden_dropout: of networks with `drops_inside`, of the embeddings, of the
    probabilities of attention, and behind the last dense layer of attention and MLP; transformers' hidden_dropout_prob
    and attention_probs_dropout_prob of BERT and ViT, and GPT-2's embd_pdrop, attn_pdrop and resid_pdrop. drop_path:
    stochastic depth at the last block, rising linearly from 0. remat: what the backward pass of a block recomputes, see
    layers.recomputed. attention: "xla" or "cudnn", see attention.py. frozen_norms: paths of BatchNorm layers that use
    their running statistics, unchanged, even in training. axis_name: pmap axis over which BatchNorm averages.
    norm_momentum: the share of its running statistics that an update keeps. fold: put a BatchNorm that uses its running
    statistics into the convolution before it, with the same numbers; must be off where calls of the two are
    intercepted, since they are not made. inner: this is a part of fusion.py, whose parameters lie where it stands,
    without "backbone/", and which has no head.
    """

    num_classes: int
    dtype: Any = jnp.float32
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    drop_path: float = 0.0
    remat: str = ""
    attention: str = "xla"
    frozen_norms: tuple[str, ...] = ()
    axis_name: str | None = None
    norm_momentum: float = 0.9
    head_init: str = "zeros"
    head: tuple = ()
    fold: bool = True
    inner: bool = False

    drops_inside = False

    def __post_init__(self):
        if self.inner:  # flax would make the scope of "backbone" a child of whatever the part stands in
            object.__setattr__(self, "_compact_name_scope_methods", ())
        super().__post_init__()

    @property
    def policy(self) -> Policy:
        return Policy(self.dtype, self.frozen_norms, self.axis_name, self.fold, self.norm_momentum)

    @property
    def deterministic_cuts(self) -> tuple[str, ...]:
        """The cuts whose output is not random in training; a frozen prefix may end at these."""
        if self.hidden_dropout:
            return ()
        return self.cuts[:2] if self.drop_path and len(self.cuts) > 3 else self.cuts  # the first block's rate is 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: str | None = None, stop: str | None = None):
        if self.hidden_dropout and not self.drops_inside:
            found = f"model.hidden_dropout={self.hidden_dropout}: {type(self).__name__} has no places for it"
            raise ValueError(f"{found}, as ViT and transformers of text have; use model.dropout")
        if self.inner:
            return type(self).backbone.inner_fun(self, x, train, start, stop)
        y, out = self.backbone(x, train, start, stop)
        return (y, out) if stop is not None else classify(self, x, out, train, start)


class ConvNet(Model, kw_only=True):
    """A network of convolutions and BatchNorm.

    norm_eps, norm_scale: of every BatchNorm of the backbone, its epsilon and whether it has a scale. same: convolutions
    are padded as in TensorFlow, see layers.pads_of.
    """

    norm_eps: float = 1e-5
    same: bool = False
    norm_scale: bool = True

    @property
    def policy(self) -> Policy:
        return super().policy._replace(norm_eps=self.norm_eps, same=self.same, norm_scale=self.norm_scale)


class Variant(NamedTuple):
    """One named model.

    module: makes the network from `num_classes` and whatever else of its fields is to change. card: the preprocessing
    its published weights expect. layouts: the conversion tables of its files; the first is the export default.
    flavours: {layout: variant} where that layout's publisher computes or preprocesses differently.
    """

    module: Callable[..., Model]
    card: Card
    layouts: Mapping[str, Layout]
    flavours: Mapping[str, str]


def with_flavours(
    module: Callable[..., Model],
    card: Card,
    layouts: Mapping[str, Layout],
    flavours: Mapping[str, tuple[str, Mapping[str, Any], Card]],
) -> dict[str, Variant]:
    """A variant and its flavours, {layout: (suffix of the name, fields of the module, card)}."""
    names = {layout: f"{card.model}.{suffix}" for layout, (suffix, _, _) in flavours.items()}
    variants = {card.model: Variant(module, card, layouts, names)}
    for layout, (_, fields, its_card) in flavours.items():
        name, its_layouts = names[layout], {key: layouts[key] for key in ("timm", layout, "native")}
        variants[name] = Variant(functools.partial(module, **fields), its_card.replace(model=name), its_layouts, {})
    return variants
