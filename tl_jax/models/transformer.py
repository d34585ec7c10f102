"""The parts of vision transformers: images to tokens, blocks, attention in place of a class token."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import sides
from tl_jax.models.attention import attend
from tl_jax.models.layers import Dense, DropPath, dropped, gelu, kept

INIT = nn.initializers.truncated_normal(0.02)
GELU = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # Hendrycks & Gimpel 2016, section 2
}


class Stem(nn.Module):
    """Patches, further tokens and position embedding: [B, H, W, 3] -> [B, T + H W / patch^2, D].

    The T tokens come first: of the class, of the distillation, then the registers. See `ViT` in vit.py for the fields.
    """

    patch_size: int
    width: int
    image_size: int | tuple[int, int]
    dtype: Any
    class_token: bool
    class_position: bool
    registers: int
    mask_token: bool
    pre_norm: bool
    norm_eps: float
    distilled: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        self.check(images.shape)
        patch, bias = (self.patch_size, self.patch_size), not self.pre_norm
        x = nn.Conv(self.width, patch, patch, "VALID", use_bias=bias, dtype=self.dtype, name="patch_embed")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        places = x.shape[1] + (self.class_token and self.class_position) + self.distilled
        if self.class_token:
            token = self.tokens("cls_token", nn.initializers.normal(1e-6), 1, x.shape[0])
        if self.distilled:
            token = jnp.concatenate([token, self.tokens("dist_token", INIT, 1, x.shape[0])], axis=1)
        pos_embed = self.tokens("pos_embed", INIT, places, 1)
        if self.mask_token:  # of the pretraining; no function reads it
            self.param("mask_token", nn.initializers.zeros, (1, self.width), jnp.float32)
        if not self.class_token:
            x = x + pos_embed
        elif self.class_position:
            x = jnp.concatenate([token, x], axis=1) + pos_embed
        else:
            x = jnp.concatenate([token, x + pos_embed], axis=1)
        if self.registers:
            registers = self.tokens("register_tokens", nn.initializers.normal(1e-6), self.registers, x.shape[0])
            x = jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
        return nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x) if self.pre_norm else x

    def tokens(self, name: str, init: Callable, count: int, batch: int) -> jax.Array:
        leaf = self.param(name, init, (1, count, self.width), jnp.float32)
        return jnp.broadcast_to(leaf.astype(self.dtype), (batch, count, self.width))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError where images of `shape` do not fit."""
        height, width = sides(self.image_size)
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image_size={self.image_size} is no multiple of patch_size={self.patch_size}")
        if shape[1:3] != (height, width):
            found = f"{shape[1]}x{shape[2]}, but the position embedding was made for {height}x{width}"
            raise ValueError(f"images are {found}: resize the images or load the weights with image_size=")


def first(x: jax.Array, count: int = 1) -> jax.Array:
    """The first tokens, [B, N, ...] -> [B, count, ...]."""
    return x[:, :count]


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection.

    only: takes some tokens of each example, [B, N, ...] -> [B, n, ...]; the result is of these alone, [B, n, D], which
    read the tokens from number `skip` on. mask, causal: the tokens that others may read, see `attend`. dropout: of the
    softmax and of the result.
    """

    heads: int
    attention: str
    dtype: Any
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: jax.Array, only: Callable | None = None, skip: int = 0, mask: Any = None, causal: bool = False
    ) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = Dense(3 * width, kernel_init=INIT, dtype=self.dtype, name="qkv")(x)
        q, k, v = (y.reshape(batch, tokens, self.heads, -1) for y in jnp.split(qkv, 3, axis=-1))
        some = None
        if self.dropout:
            shape = (batch, self.heads, tokens, tokens)
            some, v = kept(self.make_rng("dropout"), self.dropout, shape), v / (1 - self.dropout)
        if only:
            x = attend(only(q), k[:, skip:], v[:, skip:], mask=mask)
        else:
            x = attend(q, k, v, self.attention, mask=mask, causal=causal, kept=some)
        x = Dense(width, kernel_init=INIT, dtype=self.dtype, name="proj")(x.reshape(batch, -1, width))
        return dropped(self, self.dropout, x)


class Mlp(nn.Module):
    """Two dense layers, four times the width between them; act: a name of GELU. dropout: of the result."""

    act: str
    dtype: Any
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = GELU[self.act](Dense(4 * x.shape[-1], kernel_init=INIT, dtype=self.dtype, name="fc1")(x))
        y = Dense(x.shape[-1], kernel_init=INIT, dtype=self.dtype, name="fc2")(y)
        return dropped(self, self.dropout, y)


class LayerScale(nn.Module):
    """x gamma, [..., D] (Touvron et al. 2021, arXiv:2103.17239, section 2)."""

    initial: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.constant(self.initial), x.shape[-1:], jnp.float32)
        return x * gamma.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Block(nn.Module):
    """Pre-norm transformer block: [B, N, D] -> [B, N, D].

    With `last` = n, -> ([B, N, D], [B, n, D]): the first n tokens, of class and distillation, are also computed by
    themselves. Where nothing reads the other tokens, XLA drops the first. dropout: of attention and MLP.
    """

    heads: int
    drop_path: float
    norm_eps: float
    act: str
    layer_scale: float
    attention: str
    dtype: Any
    last: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array | tuple[jax.Array, jax.Array]:
        norm1, norm2 = (nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=f"norm{i}") for i in (1, 2))
        attn = Attention(self.heads, self.attention, self.dtype, self.dropout, name="attn")
        mlp = Mlp(self.act, self.dtype, self.dropout, name="mlp")
        y = norm1(x)
        own = functools.partial(first, count=self.last)
        tokens, branches = ((x, own(x)), (attn(y), attn(y, own))) if self.last else ((x,), (attn(y),))
        tokens = self.add(tokens, branches, train, "ls1")
        tokens = self.add(tokens, tuple(mlp(norm2(x)) for x in tokens), train, "ls2")
        return tokens if self.last else tokens[0]

    def add(self, tokens: tuple, branches: tuple, train: bool, name: str) -> tuple:
        if self.layer_scale:
            branches = tuple(map(LayerScale(self.layer_scale, name=name), branches))
        return jax.tree.map(jnp.add, tokens, DropPath(self.drop_path)(branches, train))


class AttentionPool(nn.Module):
    """A learned query reads all tokens, an MLP follows: [B, N, D] -> [B, D] (Zhai et al. 2022, arXiv:2106.04560)."""

    heads: int
    norm_eps: float
    act: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, _, width = x.shape
        latent = self.param("latent", nn.initializers.truncated_normal(width**-0.5), (1, 1, width), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(latent.astype(x.dtype), (batch, 1, width)), x], axis=1)
        y = Attention(self.heads, "xla", self.dtype, name="attn")(x, first, skip=1)
        z = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(y)
        return (y + Mlp(self.act, self.dtype, name="mlp")(z))[:, 0]
