"""Multi-layer perceptrons for tables, and for features: a discriminator is an MLP with one output."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import conversion, layers
from tl_jax.models.head import HE
from tl_jax.models.variant import Model, Variant

ACTIVATIONS = {"relu": nn.relu, "gelu": layers.gelu}


class Block(nn.Module):
    """A hidden layer: dropout, dense, BatchNorm where asked for, activation, [B, C] -> [B, width]."""

    width: int
    activation: str
    norm: bool
    dropout: float
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x
        x = nn.Dense(self.width, kernel_init=HE, dtype=self.policy.dtype, name="dense")(x)
        x = layers.batch_norm(self, "norm", train)(x) if self.norm else x
        return ACTIVATIONS[self.activation](x)


class MLP(Model):
    """Multi-layer perceptron on x [B, F]; see `Model` for what all networks share.

    The cuts: stem (the first hidden layer), block0, block1, ... (the others), pre_logits (the last of them in float32),
    each [B, width]. widths: of the hidden layers, at least one. activation: "relu" or "gelu" (exact). norm: BatchNorm
    between each hidden dense layer and its activation. dropout: after every hidden layer. drop_path must be 0.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    norm: bool = False

    @property
    def cuts(self) -> tuple[str, ...]:
        return ("stem", *(f"block{i}" for i in range(len(self.widths) - 1)), "pre_logits")

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        if self.drop_path:
            raise ValueError(f"drop_path={self.drop_path}: an MLP has no residual branches to drop; use dropout")
        make, parts = layers.recomputed(Block, self.remat), {}
        for name, width in zip(self.cuts[:-1], self.widths, strict=True):
            dropout = 0.0 if name == "stem" else self.dropout
            block = make(width, self.activation, self.norm, dropout, self.policy, name=name)
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
