"""Multi-layer perceptrons for tables, and for features: a discriminator is an MLP with one output."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import conversion, layers
from tl_jax.models.head import HE, classify
from tl_jax.models.variant import Variant

ACTIVATIONS = {"relu": nn.relu, "gelu": layers.gelu}


class Block(nn.Module):
    """A hidden layer: dropout, dense, BatchNorm where asked for, activation, [B, C] -> [B, width]."""

    width: int
    activation: str
    norm: bool
    dropout: float
    dtype: Any
    frozen_norms: tuple[str, ...]
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x
        x = nn.Dense(self.width, kernel_init=HE, dtype=self.dtype, name="dense")(x)
        x = layers.batch_norm(self, "norm", train)(x) if self.norm else x
        return ACTIVATIONS[self.activation](x)


class MLP(nn.Module):
    """Multi-layer perceptron: `logits, out = apply(variables, x, train, start, stop)`.

    Takes x [B, F] (normalised); F is set by the input at init. `out` holds stem (the first hidden layer), block0,
    block1, ... (the others) [B, width], pre_logits (the last of them in float32), embedding (what the last dense layer
    reads) and logits [B, K]. With `start=NAME` the input is out[NAME] and only the rest runs; with `stop=NAME` nothing
    behind out[NAME] runs, which is returned in place of the logits. Training needs mutable=["batch_stats"] with norm
    and rngs={"dropout": key} with dropout.

    Attributes:
      num_classes: size of the head; 0 for none, then logits are the pre_logits.
      widths: of the hidden layers, at least one.
      activation: "relu" or "gelu" (exact).
      norm: BatchNorm between each hidden dense layer and its activation.
      dtype: of the computation (float32 or bfloat16); parameters and statistics are float32.
      dropout: behind every hidden layer; that of the last one acts before the last dense layer of the head.
      drop_path: there are no residual branches here; anything but 0 is refused.
      remat: what the backward pass of a layer recomputes: "", "block" or "dots", see layers.recomputed.
      attention: there is none here; accepted so that every family is built alike.
      frozen_norms: paths of BatchNorm layers that keep their running statistics in training.
      axis_name: pmap axis over which BatchNorm averages.
      head_init: "zeros" or "lecun", of the last dense layer.
      head: the layers before the last dense one, see models/head.py.
    """

    num_classes: int
    widths: tuple[int, ...]
    activation: str = "relu"
    norm: bool = False
    dtype: Any = jnp.float32
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: str = ""
    attention: str = "xla"
    frozen_norms: tuple[str, ...] = ()
    axis_name: str | None = None
    head_init: str = "zeros"
    head: tuple = ()

    @property
    def cuts(self) -> tuple[str, ...]:
        """The outputs at which the network can be cut, in order."""
        return ("stem", *(f"block{i}" for i in range(len(self.widths) - 1)), "pre_logits")

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, start: str | None = None, stop: str | None = None):
        if self.drop_path:
            raise ValueError(f"drop_path={self.drop_path}: an MLP has no residual branches to drop; use dropout")
        y, out = self.backbone(x, train, start, stop)
        return (y, out) if stop is not None else classify(self, x, out, train, start)

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        policy = {"dtype": self.dtype, "frozen_norms": self.frozen_norms, "axis_name": self.axis_name}
        make = functools.partial(
            layers.recomputed(Block, self.remat), activation=self.activation, norm=self.norm, **policy
        )
        parts = {}
        for name, width in zip(self.cuts[:-1], self.widths, strict=True):
            block = make(width, dropout=0.0 if name == "stem" else self.dropout, name=name)
            parts[name] = functools.partial(lambda block, x: block(x, train), block)
        parts["pre_logits"] = lambda x: x.astype(jnp.float32)
        return layers.run_parts(parts, x, start, stop)


LAYOUTS = {"native": conversion.NATIVE}
# The columns, their means and deviations are those of the data, see weights/load.py.
_CARD = Card("", 2, mean=(), std=(), input="table")
VARIANTS: dict[str, Variant] = {
    name: Variant(functools.partial(MLP, widths=widths), _CARD.replace(model=name), LAYOUTS, {})
    for name, widths in {"mlp_small": (64, 64), "mlp_medium": (256, 256, 256)}.items()
}
