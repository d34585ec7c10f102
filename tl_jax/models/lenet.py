"""LeNet (LeCun et al. 1998) as it is used for domains of digits: two convolutions, 500 features, dropout."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import conversion, layers
from tl_jax.models.kernels import convolve
from tl_jax.models.variant import Model, Variant

TORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default of every layer


class Conv(nn.Module):
    """5x5 convolution without padding: [B, h, w, C] -> [B, h - 4, w - 4, features]."""

    features: int
    dtype: Any
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", TORCH, (5, 5, x.shape[-1], self.features), jnp.float32)
        y = convolve.valid(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return y + jnp.expand_dims(bias, (0, 1, 2)).astype(self.dtype)


class Block(nn.Module):
    """Convolution, dropout of whole channels, 2x2 maximum, ReLU: [B, h, w, C] -> [B, h / 2 - 2, w / 2 - 2, width]."""

    width: int
    dropout: float
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = Conv(self.width, self.policy.dtype, name="conv")(x)
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x) if self.dropout else x
        height, width = (side // 2 for side in x.shape[1:3])
        pairs = x[:, : 2 * height, : 2 * width].reshape(x.shape[0], height, 2, width, 2, x.shape[3])
        return nn.relu(pairs.max(axis=(2, 4)))


class Features(nn.Module):
    """Dense layer and ReLU on all positions, flattened channel by channel: [B, h, w, C] -> [B, width]."""

    width: int
    policy: layers.Policy

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        flat = jnp.moveaxis(x, 3, 1).reshape(x.shape[0], -1)
        return nn.relu(nn.Dense(self.width, kernel_init=TORCH, dtype=self.policy.dtype, name="dense")(flat))


class LeNet(Model):
    """LeNet on images [B, H, W, 3], made for 28 x 28; see `Model` for what all networks share.

    The cuts: stem [B, 12, 12, 20], block0 [B, 4, 4, 50], block1 [B, 500], pre_logits (the same behind dropout). widths:
    of the two convolutions and the dense layer. channels: 1 for the mean of the three, which of a grey image is the
    image. rate: of the dropout of whole channels in block0 and of features in pre_logits, which is a part of the
    features, while `dropout` comes before the last dense layer as everywhere. drop_path must be 0.
    """

    widths: tuple[int, int, int] = (20, 50, 500)
    channels: int = 3
    rate: float = 0.5

    @property
    def cuts(self) -> tuple[str, ...]:
        return ("stem", "block0", "block1", "pre_logits")

    @property
    def deterministic_cuts(self) -> tuple[str, ...]:
        return self.cuts[:1] if self.rate else self.cuts

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        layers.refuse_drop_path(self)
        first, second, third = self.widths
        stem, block = Block(first, 0.0, self.policy, name="stem"), Block(second, self.rate, self.policy, name="block0")
        dropout = nn.Dropout(self.rate, deterministic=not train) if self.rate else lambda x: x
        parts = {
            "stem": lambda x: stem(x.mean(axis=3, keepdims=True) if self.channels == 1 else x, train),
            "block0": lambda x: block(x, train),
            "block1": Features(third, self.policy, name="block1"),
            "pre_logits": lambda x: dropout(x.astype(jnp.float32)),
        }
        return layers.run_parts(parts, x, start, stop)


# The names of TLLib's ImageClassifier; its LeNet by itself has no prefix.
TLLIB = conversion.Layout(
    (
        *conversion.affine("backbone/stem/conv", "backbone.0", conversion.CONV),
        *conversion.affine("backbone/block0/conv", "backbone.3", conversion.CONV),
        *conversion.dense("backbone/block1/dense", "backbone.8"),
        *conversion.dense("head", "head"),
    ),
    head=r"head\..+",
    aliases=((r"^(\d+\.)", r"backbone.\1"),),
)
LAYOUTS = {"tllib": TLLIB, "native": conversion.NATIVE}
_CARD = Card("", 10, input_size=28, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop=1.0)
VARIANTS: dict[str, Variant] = {
    name: Variant(functools.partial(LeNet, channels=channels), _CARD.replace(model=name), LAYOUTS, {})
    for name, channels in {"lenet": 3, "lenet_grey": 1}.items()
}
