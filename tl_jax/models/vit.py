"""Vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929) and DeiT (Touvron et al. 2021, arXiv:2012.12877)."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core.card import Card, sides
from tl_jax.models import conversion, positions
from tl_jax.models.conversion import NATIVE, SAME, Layout, Rule, Transform, rules_of
from tl_jax.models.layers import drop_path_rates, dropped, recomputed, run_parts
from tl_jax.models.transformer import AttentionPool, Block, Stem
from tl_jax.models.variant import Model, Variant, with_flavours

STEM = tuple(field.name for field in dataclasses.fields(Stem) if field.name not in ("parent", "name"))


class ViT(Model):
    """Vision transformer on images [B, H, W, 3]; see `Model` for what all networks share.

    The cuts: stem, block0, block1, ... [B, N, D] (class token first), pre_logits [B, D] (the class token, normalised).
    distilled: DeiT's second token, behind that of the class, and a head for each, see head.Heads; pre_logits [B, 2 D].
    image_size: H = W, or (H, W). norm_eps: of every LayerNorm. act: "gelu" (PyTorch releases), "gelu_tanh" (JAX
    releases) or "quick_gelu" (CLIP). class_position: the class token has a position too. registers: further tokens,
    without position. mask_token: keep that of the pretraining. layer_scale: its initial value, 0 for none. pre_norm:
    LayerNorm behind the stem and patches without bias. pool: "token", or "map" for attention in place of a class token.
    resampling: of the position embedding, see positions.resample.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    image_size: int | tuple[int, int] = 224
    norm_eps: float = 1e-6
    act: str = "gelu"
    class_position: bool = True
    registers: int = 0
    mask_token: bool = False
    layer_scale: float = 0.0
    pre_norm: bool = False
    pool: str = "token"
    distilled: bool = False
    resampling: str = "antialias"

    @property
    def cuts(self) -> tuple[str, ...]:
        return ("stem", *(f"block{i}" for i in range(self.depth)), "pre_logits")

    drops_inside = True
    class_token = property(lambda self: self.pool == "token")
    grid = property(lambda self: tuple(side // self.patch_size for side in sides(self.image_size)))
    tokens = property(lambda self: int(self.class_token) + self.distilled + self.registers + math.prod(self.grid))

    @nn.compact_name_scope
    def backbone(self, x: jax.Array, train: bool, start: str | None, stop: str | None):
        block_class, class_token = recomputed(Block, self.remat), []
        dropout = self.hidden_dropout if train else 0.0
        last = self.depth - 1 if self.class_token and not dropout else None  # both would have masks of their own
        read = 1 + self.distilled

        def block(i, rate, x):
            how = (self.norm_eps, self.act, self.layer_scale, self.attention, self.dtype)
            x = block_class(self.heads, rate, *how, read * (i == last), dropout, name=f"block{i}")(x, train)
            if i == last:
                x, alone = x
                class_token.append(alone)
            return x

        def stem(x):
            return dropped(self, dropout, Stem(**{name: getattr(self, name) for name in STEM}, name="stem")(x))

        def pre_logits(x):  # LayerNorm works token by token: those that are read are enough
            if not self.class_token:
                x = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(x)
                pool = AttentionPool(self.heads, self.norm_eps, self.act, self.dtype, name="final")
                return pool(x).astype(jnp.float32)
            x = class_token[0] if class_token else x
            x = nn.LayerNorm(epsilon=self.norm_eps, dtype=jnp.float32, name="norm")(x[:, :read])
            return x.reshape(x.shape[0], -1)

        rates = drop_path_rates(self.drop_path, self.depth)
        parts = [stem, *(functools.partial(block, i, rate) for i, rate in enumerate(rates)), pre_logits]
        return run_parts(dict(zip(self.cuts, parts, strict=True)), x, start, stop)

    def resampled(self, pos_embed: np.ndarray, likely: int | tuple[int, int]) -> np.ndarray:
        """A position embedding [1, P + h w, D] on this network's grid; unchanged where it has it, or none is found.

        likely: the image size it was made for; where that does not fit, its grid is taken to be square.
        """
        before = int(self.class_token and self.class_position) + self.distilled
        if pos_embed.ndim != 3 or pos_embed.shape[::2] != (1, self.width):
            return pos_embed
        old = positions.grid_of(pos_embed.shape[1] - before, tuple(side // self.patch_size for side in sides(likely)))
        return pos_embed if old in (None, self.grid) else positions.resample(pos_embed, old, self.grid, self.resampling)


BLOCK = r"backbone/block(\d+)"
_TV, _HF = r"encoder.layers.encoder_layer_\1", r"vit.encoder.layer.\1"
# Our path: the keys of timm, torchvision and transformers. The fused qkv has rows of its own.
_KEYS = {
    "backbone/stem/cls_token": ("cls_token", "class_token", "vit.embeddings.cls_token"),
    "backbone/stem/pos_embed": ("pos_embed", "encoder.pos_embedding", "vit.embeddings.position_embeddings"),
    "backbone/stem/patch_embed": ("patch_embed.proj", "conv_proj", "vit.embeddings.patch_embeddings.projection"),
    f"{BLOCK}/norm1": (r"blocks.\1.norm1", f"{_TV}.ln_1", f"{_HF}.layernorm_before"),
    f"{BLOCK}/attn/proj": (r"blocks.\1.attn.proj", f"{_TV}.self_attention.out_proj", f"{_HF}.attention.output.dense"),
    f"{BLOCK}/norm2": (r"blocks.\1.norm2", f"{_TV}.ln_2", f"{_HF}.layernorm_after"),
    f"{BLOCK}/mlp/fc1": (r"blocks.\1.mlp.fc1", f"{_TV}.mlp.0", f"{_HF}.intermediate.dense"),
    f"{BLOCK}/mlp/fc2": (r"blocks.\1.mlp.fc2", f"{_TV}.mlp.3", f"{_HF}.output.dense"),
    "backbone/norm": ("norm", "encoder.ln", "vit.layernorm"),
    "head": ("head", "heads.head", "classifier"),
}


def qkv_rules(sources: Sequence[str], transform: Transform, path: str = f"{BLOCK}/attn/qkv") -> list[Rule]:
    """The rows of a fused qkv; sources: of templates of keys."""
    keys = {leaf: tuple(key.format(name) for key in sources) for leaf, name in (("kernel", "weight"), ("bias", "bias"))}
    return [Rule(f"params/{path}/{leaf}", own, transform) for leaf, own in keys.items()]


# Our path: timm's key, without that of the head; the fused qkv has rows of its own.
TIMM_KEYS = {path: keys[0] for path, keys in _KEYS.items() if path != "head"} | {
    f"{BLOCK}/attn/qkv": r"blocks.\1.attn.qkv",
}
TIMM = Layout(tuple(rules_of(TIMM_KEYS | {"head": "head"})), head=r"head\..+")
DISTILLED = Layout(
    tuple(rules_of(TIMM_KEYS | {"backbone/stem/dist_token": "dist_token", "head/dist": "head_dist", "head": "head"})),
    head=r"head(_dist)?\..+",
)
TORCHVISION = Layout(
    (
        *rules_of({path: keys[1] for path, keys in _KEYS.items()}),
        *qkv_rules((f"{_TV}.self_attention.in_proj_{{}}",), conversion.DENSE),
    ),
    head=r"heads\..+",
    aliases=((r"\.mlp\.linear_1\.", ".mlp.0."), (r"\.mlp\.linear_2\.", ".mlp.3.")),  # of early files
)
# A bare ViTModel has no prefix and may have a pooler. The other aliases serve a state dict of transformers 5 that was
# saved directly; its save_pretrained still writes the names of this table.
_HF_QKV = [f"{_HF}.attention.attention.{name}.{{}}" for name in ("query", "key", "value")]
HF = Layout(
    (*rules_of({path: keys[2] for path, keys in _KEYS.items()}), *qkv_rules(_HF_QKV, conversion.QKV)),
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
        rf"{BLOCK}/norm1/(\w+)": rf"{block}/LayerNorm_0/\2",
        rf"{BLOCK}/attn/proj/bias": f"{attention}/out/bias",
        rf"{BLOCK}/norm2/(\w+)": rf"{block}/LayerNorm_2/\2",
        rf"{BLOCK}/mlp/fc1/(\w+)": rf"{block}/MlpBlock_3/Dense_0/\2",
        rf"{BLOCK}/mlp/fc2/(\w+)": rf"{block}/MlpBlock_3/Dense_1/\2",
        r"backbone/norm/(\w+)": r"Transformer/encoder_norm/\1",
        r"head/(\w+)": r"head/\1",
    }
    rules = [Rule(f"params/{path}", (key,), SAME) for path, key in same.items()]
    rules.append(Rule(f"params/{BLOCK}/attn/proj/kernel", (f"{attention}/out/kernel",), proj))
    three = tuple(rf"{attention}/{name}/\2" for name in ("query", "key", "value"))
    rules.append(Rule(rf"params/{BLOCK}/attn/qkv/(\w+)", three, qkv))
    # The dense layer before the head in ImageNet-21k files belongs to it.
    return Layout(tuple(rules), r"(head|pre_logits)/.+", aliases=((r"^opt/target/", ""),))


def vit_variants(name: str, module: Callable[..., ViT], heads: int, image_size: int) -> dict[str, Variant]:
    """A ViT as timm has it, and its flavours: .hf (epsilon 1e-12), .jax (tanh GELU), .tv (other preprocessing)."""
    low = image_size <= 224  # timm and torchvision crop the centre at 224 only
    timm = Card(name, 1000, image_size, mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.9 if low else 1.0)
    whole = timm.replace(interpolation="bilinear", crop=1.0, crop_mode="squash")
    its = {"interpolation": "bilinear", "crop": 0.875} if low else {"interpolation": "bicubic", "crop": 1.0}
    layouts = {"timm": TIMM, "torchvision": TORCHVISION, "hf": HF, "jax": jax_layout(heads), "native": NATIVE}
    flavours = {
        "hf": ("hf", {"norm_eps": 1e-12}, whole),
        "jax": ("jax", {"act": "gelu_tanh"}, whole),
        "torchvision": ("tv", {}, Card(name, 1000, image_size, **its)),
    }
    return with_flavours(module, timm, layouts, flavours)


def deit_variants(name: str, module: Callable[..., ViT], image_size: int) -> dict[str, Variant]:
    """A DeiT: a ViT with ImageNet's own mean and deviation; its .hf flavour has epsilon 1e-12 and a wider resize."""
    low, layouts = image_size <= 224, {"timm": TIMM, "hf": HF, "native": NATIVE}
    card = Card(name, 1000, image_size, crop=0.9 if low else 1.0)
    flavours = {"hf": ("hf", {"norm_eps": 1e-12}, card.replace(crop=0.875 if low else 1.0))}
    return with_flavours(module, card, layouts, flavours)


_ANY_SIZE = {"timm": TIMM, "native": NATIVE}


def _all_variants() -> dict[str, Variant]:
    geometry = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
    variants = {}
    for (size, (width, depth, heads)), patch, image_size in itertools.product(geometry.items(), (16, 32), (224, 384)):
        module = functools.partial(ViT, patch_size=patch, width=width, depth=depth, heads=heads, image_size=image_size)
        if (size, patch) != ("tiny", 32):
            variants |= vit_variants(f"vit_{size}_patch{patch}_{image_size}", module, heads, image_size)
        if patch == 16 and (image_size, size) in ((224, "tiny"), (224, "small"), (224, "base"), (384, "base")):
            variants |= deit_variants(f"deit_{size}_patch16_{image_size}", module, image_size)
            name = f"deit_{size}_distilled_patch16_{image_size}"
            card, layouts = variants[f"deit_{size}_patch16_{image_size}"].card, {"timm": DISTILLED, "native": NATIVE}
            module = functools.partial(module, distilled=True)
            variants[name] = Variant(module, card.replace(model=name), layouts, {})
    return variants


def variant_of(name: str) -> Variant | None:
    """That of a name such as vit_l4_h128_a2_p16_224: blocks, width, heads, patch, image; None for another name."""
    found = re.fullmatch(r"vit_l([1-9]\d*)_h([1-9]\d*)_a([1-9]\d*)_p([1-9]\d*)_([1-9]\d*)", name)
    if not found:
        return None
    depth, width, heads, patch, image_size = map(int, found.groups())
    fields = {"patch_size": patch, "width": width, "depth": depth, "heads": heads, "image_size": image_size}
    if width % heads or image_size % patch:
        raise ValueError(f"{name}: expected a width that {heads} heads divide and an image that patches of {patch} do")
    return Variant(functools.partial(ViT, **fields), Card(name, 1000, image_size, crop=0.9), _ANY_SIZE, {})


VARIANTS: dict[str, Variant] = _all_variants()
