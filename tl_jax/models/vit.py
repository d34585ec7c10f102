"""Vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929) and DeiT (Touvron et al. 2021, arXiv:2012.12877)."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core.card import Card
from tl_jax.models import conversion
from tl_jax.models.conversion import NATIVE, SAME, Layout, Rule, Transform, conv, dense, norm
from tl_jax.models.layers import Dense, DropPath, attend, drop_path_rates, gelu, recomputed, run_parts
from tl_jax.models.variant import Model, Variant, with_flavours

INIT = nn.initializers.truncated_normal(0.02)


class Stem(nn.Module):
    """Patches, class token and position embedding: [B, S, S, 3] -> [B, 1 + (S / patch)^2, D]."""

    patch_size: int
    width: int
    image_size: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size, patch = self.image_size, self.patch_size
        if size % patch:
            raise ValueError(f"image_size={size} is no multiple of patch_size={patch}")
        if images.shape[1:3] != (size, size):
            found = f"{images.shape[1]}x{images.shape[2]}, but the position embedding was made for {size}x{size}"
            raise ValueError(f"images are {found}: resize the images or load the weights with image_size=")
        patch_embed = nn.Conv(self.width, (patch, patch), (patch, patch), "VALID", dtype=self.dtype, name="patch_embed")
        x = patch_embed(images)
        x = x.reshape(x.shape[0], -1, self.width)
        cls_token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width), jnp.float32)
        pos_embed = self.param("pos_embed", INIT, (1, 1 + x.shape[1], self.width), jnp.float32)
        cls_token = jnp.broadcast_to(cls_token.astype(self.dtype), (x.shape[0], 1, self.width))
        return jnp.concatenate([cls_token, x], axis=1) + pos_embed.astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection; with `first`, of the first token alone, [B, 1, D]."""

    heads: int
    attention: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, first: bool = False) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = Dense(3 * width, kernel_init=INIT, dtype=self.dtype, name="qkv")(x)
        q, k, v = (y.reshape(batch, tokens, self.heads, -1) for y in jnp.split(qkv, 3, axis=-1))
        x = attend(q[:, :1], k, v) if first else attend(q, k, v, self.attention)
        return Dense(width, kernel_init=INIT, dtype=self.dtype, name="proj")(x.reshape(batch, -1, width))


class Mlp(nn.Module):
    """Two dense layers, four times the width between them."""

    gelu_tanh: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Dense(4 * x.shape[-1], kernel_init=INIT, dtype=self.dtype, name="fc1")(x)
        y = nn.gelu(y, approximate=True) if self.gelu_tanh else gelu(y)
        return Dense(x.shape[-1], kernel_init=INIT, dtype=self.dtype, name="fc2")(y)


class Block(nn.Module):
    """Pre-norm transformer block: [B, N, D] -> [B, N, D].

    With `last`, -> ([B, N, D], [B, 1, D]): the class token is also computed by itself. Where nothing reads the other
    tokens, XLA drops the first.
    """

    heads: int
    drop_path: float
    norm_eps: float
    gelu_tanh: bool
    attention: str
    dtype: Any
    last: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array | tuple[jax.Array, jax.Array]:
        norm1, norm2 = (nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name=f"norm{i}") for i in (1, 2))
        attn = Attention(self.heads, self.attention, self.dtype, name="attn")
        mlp = Mlp(self.gelu_tanh, self.dtype, name="mlp")
        y = norm1(x)
        tokens, branches = ((x, x[:, :1]), (attn(y), attn(y, first=True))) if self.last else ((x,), (attn(y),))
        tokens = jax.tree.map(jnp.add, tokens, DropPath(self.drop_path)(branches, train))
        branches = tuple(mlp(norm2(x)) for x in tokens)
        tokens = jax.tree.map(jnp.add, tokens, DropPath(self.drop_path)(branches, train))
        return tokens if self.last else tokens[0]


class ViT(Model):
    """Vision transformer on images [B, S, S, 3], S = image_size; see `Model` for what all networks share.

    The cuts: stem, block0, block1, ... [B, N, D] (class token first), pre_logits [B, D] (the class token, normalised).
    norm_eps: of every LayerNorm. gelu_tanh: GELU by its tanh approximation (JAX releases), not erf (PyTorch releases).
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    image_size: int = 224
    norm_eps: float = 1e-6
    gelu_tanh: bool = False

    @property
    def cuts(self) -> tuple[str, ...]:
        return ("stem", *(f"block{i}" for i in range(self.depth)), "pre_logits")

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        block_class, class_token = recomputed(Block, self.remat), []

        def block(i, rate, x):
            fields = (self.heads, rate, self.norm_eps, self.gelu_tanh, self.attention, self.dtype, i == self.depth - 1)
            x = block_class(*fields, name=f"block{i}")(x, train)
            if i == self.depth - 1:
                x, alone = x
                class_token.append(alone)
            return x

        def pre_logits(x):  # LayerNorm works token by token: the class token alone is enough
            x = class_token[0] if class_token else x
            return nn.LayerNorm(epsilon=self.norm_eps, dtype=jnp.float32, name="norm")(x[:, 0])

        rates = drop_path_rates(self.drop_path, self.depth)
        stem = Stem(self.patch_size, self.width, self.image_size, self.dtype, name="stem")
        parts = [stem, *(functools.partial(block, i, rate) for i, rate in enumerate(rates)), pre_logits]
        return run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop)


def is_other_grid(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether a position embedding of `shape` is one for another square grid than `target` [1, 1 + g*g, D]."""
    same_width = len(shape) == 3 and (shape[0], shape[2]) == (target[0], target[2])
    return same_width and shape != target and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1


def resample_pos_embed(pos_embed: np.ndarray, tokens: int) -> np.ndarray:
    """Resamples a position embedding [1, 1 + g*g, D] to [1, tokens, D], antialiased bicubic; the class token stays."""
    old, new = math.isqrt(pos_embed.shape[1] - 1), math.isqrt(tokens - 1)
    prefix, grid = np.split(pos_embed.astype(np.float32), [1], axis=1)
    grid = jax.image.resize(grid.reshape(old, old, -1), (new, new, grid.shape[-1]), "cubic")
    return np.concatenate([prefix, np.asarray(grid).reshape(1, new * new, -1)], axis=1)


_BLOCK = r"backbone/block(\d+)"
_TV, _HF = r"encoder.layers.encoder_layer_\1", r"vit.encoder.layer.\1"
# Our path: the keys of timm, torchvision and transformers. The fused qkv has rows of its own.
_KEYS = {
    "backbone/stem/cls_token": ("cls_token", "class_token", "vit.embeddings.cls_token"),
    "backbone/stem/pos_embed": ("pos_embed", "encoder.pos_embedding", "vit.embeddings.position_embeddings"),
    "backbone/stem/patch_embed": ("patch_embed.proj", "conv_proj", "vit.embeddings.patch_embeddings.projection"),
    f"{_BLOCK}/norm1": (r"blocks.\1.norm1", f"{_TV}.ln_1", f"{_HF}.layernorm_before"),
    f"{_BLOCK}/attn/proj": (r"blocks.\1.attn.proj", f"{_TV}.self_attention.out_proj", f"{_HF}.attention.output.dense"),
    f"{_BLOCK}/norm2": (r"blocks.\1.norm2", f"{_TV}.ln_2", f"{_HF}.layernorm_after"),
    f"{_BLOCK}/mlp/fc1": (r"blocks.\1.mlp.fc1", f"{_TV}.mlp.0", f"{_HF}.intermediate.dense"),
    f"{_BLOCK}/mlp/fc2": (r"blocks.\1.mlp.fc2", f"{_TV}.mlp.3", f"{_HF}.output.dense"),
    "backbone/norm": ("norm", "encoder.ln", "vit.layernorm"),
    "head": ("head", "heads.head", "classifier"),
}


def _torch_rules(column: int) -> list[Rule]:
    """The rows of a column of _KEYS."""
    rules = []
    for path, keys in _KEYS.items():
        leaf, key = path.rpartition("/")[2], keys[column]
        if leaf in ("cls_token", "pos_embed"):
            rules.append(Rule(f"params/{path}", (key,), SAME))
        elif leaf == "patch_embed":
            rules += [*conv(path, key), Rule(f"params/{path}/bias", (f"{key}.bias",), SAME)]
        else:
            rules += (norm if leaf.startswith("norm") else dense)(path, key)
    return rules


def _qkv(sources: Sequence[str], transform: Transform) -> list[Rule]:
    """The rows of the fused qkv; sources: of templates of keys."""
    keys = {leaf: tuple(key.format(name) for key in sources) for leaf, name in (("kernel", "weight"), ("bias", "bias"))}
    return [Rule(f"params/{_BLOCK}/attn/qkv/{leaf}", own, transform) for leaf, own in keys.items()]


TIMM = Layout((*_torch_rules(0), *dense(f"{_BLOCK}/attn/qkv", r"blocks.\1.attn.qkv")), head=r"head\..+")
TORCHVISION = Layout(
    (*_torch_rules(1), *_qkv((f"{_TV}.self_attention.in_proj_{{}}",), conversion.DENSE)),
    head=r"heads\..+",
    aliases=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),  # of early files
)
# A bare ViTModel has no prefix and may have a pooler. The other aliases serve a state dict of transformers 5 that was
# saved directly; its save_pretrained still writes the names of this table.
_HF_QKV = [f"{_HF}.attention.attention.{name}.{{}}" for name in ("query", "key", "value")]
HF = Layout(
    (*_torch_rules(2), *_qkv(_HF_QKV, conversion.QKV)),
    head=r"classifier\..+",
    ignore=r"vit\.pooler\..+|vit\.embeddings\.position_ids",
    aliases=(
        (r"^(embeddings|encoder|layers|layernorm|pooler)\.", r"vit.\1."),
        (r"^vit\.layers\.(\d+)\.", r"vit.encoder.layer.\1."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
)


def jax_layout(heads: int) -> Layout:
    """The .npz files of the original JAX release: [in, out] kernels, attention kernels [D, heads, D / heads]."""
    qkv = Transform(
        lambda *w: np.concatenate([x.reshape(*x.shape[:-2], -1) for x in w], axis=-1),
        lambda w: tuple(x.reshape(*x.shape[:-1], heads, -1) for x in np.split(w, 3, axis=-1)),
    )
    proj = Transform(lambda w: w.reshape(-1, w.shape[-1]), lambda w: (w.reshape(heads, -1, w.shape[-1]),))
    block = r"Transformer/encoderblock_\1"
    attention = f"{block}/MultiHeadDotProductAttention_1"
    same = {
        "backbone/stem/cls_token": "cls",
        "backbone/stem/pos_embed": "Transformer/posembed_input/pos_embedding",
        r"backbone/stem/patch_embed/(\w+)": r"embedding/\1",
        rf"{_BLOCK}/norm1/(\w+)": rf"{block}/LayerNorm_0/\2",
        rf"{_BLOCK}/attn/proj/bias": f"{attention}/out/bias",
        rf"{_BLOCK}/norm2/(\w+)": rf"{block}/LayerNorm_2/\2",
        rf"{_BLOCK}/mlp/fc1/(\w+)": rf"{block}/MlpBlock_3/Dense_0/\2",
        rf"{_BLOCK}/mlp/fc2/(\w+)": rf"{block}/MlpBlock_3/Dense_1/\2",
        r"backbone/norm/(\w+)": r"Transformer/encoder_norm/\1",
        r"head/(\w+)": r"head/\1",
    }
    rules = [Rule(f"params/{path}", (key,), SAME) for path, key in same.items()]
    rules.append(Rule(f"params/{_BLOCK}/attn/proj/kernel", (f"{attention}/out/kernel",), proj))
    three = tuple(rf"{attention}/{name}/\2" for name in ("query", "key", "value"))
    rules.append(Rule(rf"params/{_BLOCK}/attn/qkv/(\w+)", three, qkv))
    # The dense layer before the head in ImageNet-21k files belongs to it.
    return Layout(tuple(rules), r"(head|pre_logits)/.+", aliases=((r"^opt/target/", ""),))


def vit_variants(name: str, module: Callable[..., ViT], heads: int, image_size: int) -> dict[str, Variant]:
    """A ViT as timm has it, and its flavours: .hf (epsilon 1e-12), .jax (tanh GELU), .tv (other preprocessing)."""
    low = image_size <= 224  # timm and torchvision crop the centre at 224 only
    timm = Card(name, 1000, image_size, mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.9 if low else 1.0)
    whole = timm.replace(interpolation="bilinear", crop=1.0)
    its = {"interpolation": "bilinear", "crop": 0.875} if low else {"interpolation": "bicubic", "crop": 1.0}
    layouts = {"timm": TIMM, "torchvision": TORCHVISION, "hf": HF, "jax": jax_layout(heads), "native": NATIVE}
    flavours = {
        "hf": ("hf", {"norm_eps": 1e-12}, whole),
        "jax": ("jax", {"gelu_tanh": True}, whole),
        "torchvision": ("tv", {}, Card(name, 1000, image_size, **its)),
    }
    return with_flavours(module, timm, layouts, flavours)


def deit_variants(name: str, module: Callable[..., ViT], image_size: int) -> dict[str, Variant]:
    """A DeiT: a ViT with ImageNet's own mean and deviation; its .hf flavour has epsilon 1e-12 and a wider resize."""
    low, layouts = image_size <= 224, {"timm": TIMM, "hf": HF, "native": NATIVE}
    card = Card(name, 1000, image_size, crop=0.9 if low else 1.0)
    flavours = {"hf": ("hf", {"norm_eps": 1e-12}, card.replace(crop=0.875 if low else 1.0))}
    return with_flavours(module, card, layouts, flavours)


def _all_variants() -> dict[str, Variant]:
    geometry = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
    variants = {}
    for (size, (width, depth, heads)), patch, image_size in itertools.product(geometry.items(), (16, 32), (224, 384)):
        module = functools.partial(ViT, patch_size=patch, width=width, depth=depth, heads=heads, image_size=image_size)
        if (size, patch) != ("tiny", 32):
            variants |= vit_variants(f"vit_{size}_patch{patch}_{image_size}", module, heads, image_size)
        if patch == 16 and (image_size, size) in ((224, "tiny"), (224, "small"), (224, "base"), (384, "base")):
            variants |= deit_variants(f"deit_{size}_patch16_{image_size}", module, image_size)
    return variants


VARIANTS: dict[str, Variant] = _all_variants()
