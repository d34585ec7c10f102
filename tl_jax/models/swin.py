"""Swin Transformer (Liu et al. 2021, arXiv:2103.14030)."""

import functools
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core.card import Card
from tl_jax.models import attention, conversion, layers
from tl_jax.models.conversion import Transform
from tl_jax.models.convnext import Stem
from tl_jax.models.transformer import INIT, Mlp
from tl_jax.models.variant import Model, Variant, with_flavours

EPS = 1e-5  # of every LayerNorm
FAR = -100.0  # what the authors add to the score of two pixels that are no neighbours


def relative_places(window: int) -> np.ndarray:
    """The row of the bias table for each pair of pixels of a window, [window^2, window^2]."""
    rows, columns = np.divmod(np.arange(window * window), window)
    down, right = (x[:, None] - x[None] + window - 1 for x in (rows, columns))
    return down * (2 * window - 1) + right


def shift_mask(sides: tuple[int, int], window: int, shifts: tuple[int, int]) -> np.ndarray:
    """FAR for two pixels of a window that rolling a map by `shifts` brought together, otherwise 0: [windows, n, n]."""

    def zones(side: int, shift: int) -> np.ndarray:
        return np.digitize(np.arange(side), [side - window, side - shift] if shift else [])

    rows, columns = map(zones, sides, shifts)
    zone = windows_of((3 * rows[:, None] + columns)[None, :, :, None], window)[0, ..., 0]
    return np.where(zone[:, :, None] == zone[:, None], 0.0, FAR).astype(np.float32)


def windows_of(x: Any, window: int) -> Any:
    """[B, H, W, C] -> [B, windows, window^2, C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels).swapaxes(2, 3)
    return x.reshape(batch, -1, window * window, channels)


def map_of(x: jax.Array, sides: tuple[int, int], window: int) -> jax.Array:
    """The inverse of `windows_of`, for a map of height and width `sides`."""
    rows, columns = (side // window for side in sides)
    x = x.reshape(x.shape[0], rows, columns, window, window, -1).swapaxes(2, 3)
    return x.reshape(x.shape[0], *sides, -1)


class Attention(nn.Module):
    """Self-attention within windows, with a learned bias for each relative place: [B, H, W, C] -> [B, H, W, C].

    Zeros below and at the right fill the last windows, and take part as they do in torchvision. Then the map is rolled
    by `shift` along each axis that has more than one window.
    """

    heads: int
    window: int
    shift: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        (height, width, channels), window = x.shape[1:], self.window
        dense = functools.partial(layers.Dense, kernel_init=INIT, dtype=self.dtype)
        table = self.param("bias_table", INIT, ((2 * window - 1) ** 2, self.heads), jnp.float32)
        x = jnp.pad(x, ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
        sides = x.shape[1:3]
        shifts = tuple(self.shift if side > window else 0 for side in sides)
        x = windows_of(jnp.roll(x, [-shift for shift in shifts], (1, 2)), window)
        bias = jnp.moveaxis(table[relative_places(window)], -1, 0)[None]
        bias = bias + shift_mask(sides, window, shifts)[:, None] if any(shifts) else bias
        qkv = jnp.split(dense(3 * channels, name="qkv")(x), 3, axis=-1)
        attend = jax.vmap(functools.partial(attention.attend, bias=bias))  # over the images of the batch
        x = attend(*(y.reshape(*y.shape[:3], self.heads, -1) for y in qkv))
        x = map_of(dense(channels, name="proj")(x.reshape(*x.shape[:3], channels)), sides, window)
        return jnp.roll(x, shifts, (1, 2))[:, :height, :width]


class Merge(nn.Module):
    """Four neighbours to one pixel of twice the channels: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2 C]."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        x = jnp.concatenate([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], axis=-1)
        x = nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name="norm")(x)
        return layers.Dense(x.shape[-1] // 2, use_bias=False, kernel_init=INIT, dtype=self.dtype, name="reduction")(x)


class Block(nn.Module):
    """Pre-norm block with attention in windows: [B, H, W, C] -> [B, H, W, C], behind a `Merge` where a stage begins."""

    heads: int
    window: int
    shift: int
    downsample: bool
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.downsample:
            x = Merge(self.dtype, name="downsample")(x)
        norm1, norm2 = (nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name=f"norm{i}") for i in (1, 2))
        y = Attention(self.heads, self.window, self.shift, self.dtype, name="attn")(norm1(x))
        x = x + layers.DropPath(self.drop_path)(y, train)
        return x + layers.DropPath(self.drop_path)(Mlp("gelu", self.dtype, name="mlp")(norm2(x)), train)


class Swin(Model):
    """Swin Transformer on images [B, H, W, 3] of any size; see `Model` for what all networks share.

    The cuts: stem, stage1/block0, ..., stage1 (its last block), ... [B, h, w, C], pre_logits [B, D], the mean of all
    pixels, normalised before. Every second block is shifted. depths: blocks per stage. width: channels of the first,
    each stage doubles them. head_size: channels of a head. window: pixels of its side; since positions are relative
    within it, weights serve any image size. Maps of no whole number of windows are padded as in torchvision; timm rolls
    them before it pads, and makes the windows of small maps smaller. `attention` is without effect.
    """

    depths: tuple[int, ...]
    width: int = 96
    head_size: int = 32
    window: int = 7

    @property
    def cuts(self) -> tuple[str, ...]:
        return layers.stage_cuts(self.depths)

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        rates = iter(layers.drop_path_rates(self.drop_path, sum(self.depths)))
        block = functools.partial(layers.recomputed(Block, self.remat), window=self.window, dtype=self.dtype)

        def pre_logits(x):
            return layers.mean_of_pixels(nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name="norm")(x))

        def place(i, j):
            heads, shift = self.width * 2**i // self.head_size, j % 2 * (self.window // 2)
            return {"heads": heads, "shift": shift, "downsample": i > 0 and j == 0, "drop_path": next(rates)}

        stages = [[functools.partial(block, **place(i, j)) for j in range(n)] for i, n in enumerate(self.depths)]
        parts = [Stem(self.width, EPS, self.policy, name="stem"), *layers.stage_parts(stages, train), pre_logits]
        return layers.run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop)


# Our path: the keys of timm, the authors, torchvision and transformers, or one for all. {b}: a block; {d}: a `Merge`,
# which the file of timm has before its stage and all others behind the one before.
_BLOCK = r"stage{n}/block(\d+)"
_KEYS = {
    "stem/conv": (
        "patch_embed.proj",
        "patch_embed.proj",
        "features.0.0",
        "swin.embeddings.patch_embeddings.projection",
    ),
    "stem/norm": ("patch_embed.norm", "patch_embed.norm", "features.0.2", "swin.embeddings.norm"),
    "stage{n}/block0/downsample/norm": "{d}.norm",
    "stage{n}/block0/downsample/reduction": "{d}.reduction",
    f"{_BLOCK}/norm1": (*("{b}.norm1",) * 3, "{b}.layernorm_before"),
    f"{_BLOCK}/norm2": (*("{b}.norm2",) * 3, "{b}.layernorm_after"),
    f"{_BLOCK}/attn/bias_table": (*("{b}.attn.{t}",) * 3, "{b}.attention.self.{t}"),
    f"{_BLOCK}/attn/qkv": (*("{b}.attn.qkv",) * 3, ""),
    f"{_BLOCK}/attn/proj": (*("{b}.attn.proj",) * 3, "{b}.attention.output.dense"),
    f"{_BLOCK}/mlp/fc1": (*("{b}.mlp.fc1",) * 2, "{b}.mlp.0", "{b}.intermediate.dense"),
    f"{_BLOCK}/mlp/fc2": (*("{b}.mlp.fc2",) * 2, "{b}.mlp.3", "{b}.output.dense"),
    "norm": (*("norm",) * 3, "swin.layernorm"),
}
_PLACES = (  # of the blocks of stage s, and of the `Merge` before it
    (r"layers.{s}.blocks.\1", "layers.{s}.downsample"),
    (r"layers.{s}.blocks.\1", "layers.{before}.downsample"),
    (r"features.{odd}.\1", "features.{even}"),
    (r"swin.encoder.layers.{s}.blocks.\1", "swin.encoder.layers.{before}.downsample"),
)
_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"
# torchvision's files also have the row of the table for each pair of pixels.
_WITH_INDEX = Transform(lambda w: w, lambda w: (w, relative_places((math.isqrt(len(w)) + 1) // 2).reshape(-1)))


def _layout(column: int, head: str, aliases: tuple[tuple[str, str], ...] = ()) -> conversion.Layout:
    """The table of a column of _KEYS."""
    names = {"head": head}
    for s in range(4):
        place = {"s": s, "before": s - 1, "even": 2 * s, "odd": 2 * s + 1}
        b, d = (text.format(**place) for text in _PLACES[column])
        for path, keys in _KEYS.items():
            key = keys if isinstance(keys, str) else keys[column]
            path, key = f"backbone/{path}".replace("{n}", str(s + 1)), key.format(b=b, d=d, t=_TABLE)
            if column == 2 and path.endswith("bias_table"):
                names[path] = (key, key.replace(_TABLE, _INDEX)), _WITH_INDEX
            elif column == 3 and path.endswith("qkv"):
                for leaf, its in (("kernel", "weight"), ("bias", "bias")):
                    three = tuple(f"{b}.attention.self.{name}.{its}" for name in ("query", "key", "value"))
                    names[f"{path}/{leaf}"] = three, conversion.QKV
            else:
                names[path] = key
    rules = tuple(conversion.rules_of(names))
    return conversion.Layout(rules, rf"{re.escape(head)}\..+", rf".+\.({_INDEX}|attn_mask)", aliases)


LAYOUTS = {
    "timm": _layout(0, "head.fc"),
    "microsoft": _layout(1, "head"),
    "torchvision": _layout(2, "head"),
    # A bare SwinModel has no prefix; the other aliases are of state dicts of transformers 5, see vit.py.
    "hf": _layout(
        3,
        "classifier",
        (
            (r"^(embeddings|encoder|layernorm)\.", r"swin.\1."),
            (r"\.attention\.q_proj\.", ".attention.self.query."),
            (r"\.attention\.k_proj\.", ".attention.self.key."),
            (r"\.attention\.v_proj\.", ".attention.self.value."),
            (r"\.attention\.o_proj\.", ".attention.output.dense."),
            (r"\.attention\.relative_position_bias\.", ".attention.self."),
            (r"\.mlp\.fc1\.", ".intermediate.dense."),
            (r"\.mlp\.fc2\.", ".output.dense."),
        ),
    ),
    "native": conversion.NATIVE,
}


def swin_variants(name: str, module, resize: int) -> dict[str, Variant]:
    """A Swin as timm has it, and its flavours: .tv (short side of `resize` pixels before the crop), .hf (squashed)."""
    card = Card(name, 1000, crop=0.9)
    flavours = {
        "torchvision": ("tv", {}, card.replace(crop=224 / resize)),
        "hf": ("hf", {}, card.replace(crop=1.0, crop_mode="squash")),
    }
    return with_flavours(module, card, LAYOUTS, flavours)


VARIANTS: dict[str, Variant] = {
    **swin_variants("swin_tiny_patch4_window7_224", functools.partial(Swin, depths=(2, 2, 6, 2)), 232),
    **swin_variants("swin_small_patch4_window7_224", functools.partial(Swin, depths=(2, 2, 18, 2)), 246),
}
