"""Multi-layer perceptrons for tables, features (a discriminator is an MLP with one output), and small images."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import conversion, layers
from tl_jax.models.head import HE, XAVIER
from tl_jax.models.variant import Model, Variant

ACTIVATIONS = {"relu": nn.relu, "gelu": layers.gelu}
INIT = {"he": HE, "xavier": XAVIER}


class Block(nn.Module):
    """A hidden layer: dropout, dense, BatchNorm where asked for, activation, [B, C] -> [B, width]."""

    width: int
    activation: str
    norm: bool
    dropout: float
    kernel_init: str
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.dropout, deterministic=not train)(x) if self.dropout else x
        x = nn.Dense(self.width, kernel_init=INIT[self.kernel_init], dtype=self.policy.dtype, name="dense")(x)
        x = layers.batch_norm(self, "norm", train)(x) if self.norm else x
        return ACTIVATIONS[self.activation](x)


class MLP(Model):
    """Multi-layer perceptron on x [B, F]; see `Model` for what all networks share.

    The cuts: stem (the first hidden layer), block0, block1, ... (the others), pre_logits (the last of them in float32),
    each [B, width]. widths: of the hidden layers, at least one. activation: "relu" or "gelu" (exact). norm: BatchNorm
    between each hidden dense layer and its activation. dropout: after every hidden layer. drop_path must be 0.
    kernel_init: of the hidden layers, "he" or "xavier". channels: above 0, x is images [B, H, W, 3], of which the first
    channels are read and flattened.
    """

    widths: tuple[int, ...]
    activation: str = "relu"
    norm: bool = False
    kernel_init: str = "he"
    channels: int = 0

    @property
    def cuts(self) -> tuple[str, ...]:
        return ("stem", *(f"block{i}" for i in range(len(self.widths) - 1)), "pre_logits")

    @property
    def deterministic_cuts(self) -> tuple[str, ...]:
        return self.cuts[:1] if self.dropout else self.cuts

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        layers.refuse_drop_path(self)
        make, parts = layers.recomputed(Block, self.remat), {}
        for name, width in zip(self.cuts[:-1], self.widths, strict=True):
            dropout = 0.0 if name == "stem" else self.dropout
            block = make(width, self.activation, self.norm, dropout, self.kernel_init, self.policy, name=name)
            parts[name] = functools.partial(lambda block, x: block(x, train), block)
        if self.channels:
            stem = parts["stem"]
            parts["stem"] = lambda x: stem(x[..., : self.channels].reshape(x.shape[0], -1))
        parts["pre_logits"] = lambda x: x.astype(jnp.float32)
        return layers.run_parts(parts, x, start, stop)


LAYOUTS = {"native": conversion.NATIVE}
# The columns, their means and deviations are those of the data, see weights/load.py.
_CARD = Card("", 2, mean=(), std=(), input="table")
VARIANTS: dict[str, Variant] = {
    name: Variant(functools.partial(MLP, widths=widths), _CARD.replace(model=name), LAYOUTS, {})
    for name, widths in {"mlp_small": (64, 64), "mlp_medium": (256, 256, 256)}.items()
}
# That of invariant risk minimisation on ColoredMNIST, whose images are red or green (Arjovsky et al. 2019); its last
# layer is model.head_init=xavier.
_COLOURED = Card("mlp_colored_mnist", 2, 14, (0.0,) * 3, (1.0,) * 3, interpolation="bilinear", crop=1.0)
_MODULE = functools.partial(MLP, widths=(390, 390), kernel_init="xavier", channels=2)
VARIANTS[_COLOURED.model] = Variant(_MODULE, _COLOURED, LAYOUTS, {})
