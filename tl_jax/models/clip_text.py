"""The text towers of CLIP (Radford et al. 2021, arXiv:2103.00020) and SigLIP (Zhai et al. 2023, arXiv:2303.15343).

`clip_text_l{L}_h{H}_a{A}` and `siglip_text_l{L}_h{H}_a{A}` have L blocks of width H with A heads; `variant_of` makes
them. As of the image towers, the projection to the embedding of image and text is the head that a file brings, and
`logits` are the embedding. CLIP's has no bias; ours, of zeros, is in no file. CLIP reads the last token, the end of the
text, which a truncated text keeps. SigLIP fills every text up to 64 tokens with the token 1, reads all of them, and
pools the last place. Files of CLIP do not tell which GELU is theirs: OpenAI's are those of NAME_quickgelu.
"""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core.card import Card
from tl_jax.models import tokens
from tl_jax.models.bert import STEM
from tl_jax.models.clip import hf_block, openai_block
from tl_jax.models.conversion import ABSENT, DENSE, NATIVE, QKV, SAME, Layout, rules_of, vocabulary
from tl_jax.models.text import Block as TextBlock
from tl_jax.models.text import Transformer
from tl_jax.models.variant import Variant
from tl_jax.models.vit import qkv_rules

_TREE, _RES = r"text_model.encoder.layers.\1", r"transformer.resblocks.\1"
_HF: dict[str, Any] = {
    f"{STEM}/tok_embed/embedding": (("text_model.embeddings.token_embedding.weight",), SAME),
    f"{STEM}/pos_embed": (("text_model.embeddings.position_embedding.weight",), SAME),
    **hf_block(_TREE),
    "backbone/norm": "text_model.final_layer_norm",
}
_OPENAI: dict[str, Any] = {
    f"{STEM}/tok_embed/embedding": (("token_embedding.weight",), SAME),
    f"{STEM}/pos_embed": (("positional_embedding",), SAME),
    **openai_block(_RES),
    "backbone/norm": "ln_final",
}
_HF_QKV = qkv_rules([f"{_TREE}.self_attn.{name}_proj.{{}}" for name in "qkv"], QKV)
_OPENAI_QKV = qkv_rules([f"{_RES}.attn.in_proj_{{}}"], DENSE)
# The image tower, the numbers of the places, and three numbers of OpenAI's archives.
_HF_IMAGE = r"vision_model\..+|visual_projection\..+|logit_(scale|bias)|text_model\.embeddings\.position_ids"
_OPENAI_IMAGE = r"visual\..+|logit_(scale|bias)|input_resolution|context_length|vocab_size"


class Prompts(nn.Module):
    """Logits of classes whose texts begin with learned vectors, [B, E] -> [B, K] (CoOp, Zhou et al. 2022,
    arXiv:2109.01134, section 3.2).

    x: normalised embeddings of images. tower: the name of a text tower. `classes` [K, length, D + 1] is what its stem
    gives of the texts, without the vectors of `context` tokens from place `first` on, which are the parameter
    `context`; block{i}/..., norm/... and head/... are the parts of the tower behind the stem.
    """

    tower: str
    num_classes: int
    context: int
    first: int
    length: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # The parts by themselves: flax would put the name scope of a network that is a submodule beside it.
        own = (VARIANTS.get(self.tower) or variant_of(self.tower)).module.keywords
        zeros, shape = nn.initializers.zeros, (self.num_classes, self.length, own["width"] + 1)
        classes = self.param("classes", zeros, shape, jnp.float32)
        context = self.param("context", nn.initializers.normal(0.02), (self.context, own["width"]), jnp.float32)
        scale, bias = (self.param(f"logit_{name}", zeros, (), jnp.float32) for name in ("scale", "bias"))
        behind = self.length - self.first - self.context
        y, mask = classes[..., :-1] + jnp.pad(context, ((self.first, behind), (0, 0)))[None], classes[..., -1] > 0
        causal = own.get("causal", False)
        for i in range(own["depth"]):
            how = (own["heads"], 0.0, own["norm_eps"], own["act"], True, causal, "xla", jnp.float32)
            y = TextBlock(*how, name=f"block{i}")(y, False, mask)
        y = tokens.pool(nn.LayerNorm(epsilon=own["norm_eps"], name="norm")(y), mask, own["pooling"])
        y = nn.Dense(x.shape[-1], name="head")(y)
        return jnp.exp(scale) * x @ (y / jnp.linalg.norm(y, axis=-1, keepdims=True)).T + bias


def _projection(kernel: str, way: Any) -> dict[str, Any]:
    """The rows of a head without bias."""
    return {"head/kernel": ((kernel,), way), "head/bias": ((), ABSENT)}


def _hf(head: dict[str, Any], keys: str) -> Layout:
    return Layout(
        (*rules_of(_HF | head), *_HF_QKV),
        head=keys,
        ignore=_HF_IMAGE,
        aliases=((r"^(embeddings|encoder|final_layer_norm|head)\.", r"text_model.\1."),),  # a tower by itself
        pixels=vocabulary("text_model.embeddings.token_embedding.weight"),
    )


def _openai(head: dict[str, Any]) -> Layout:
    return Layout(
        (*rules_of(_OPENAI | head), *_OPENAI_QKV),
        head=r"text_projection(\..+)?",
        ignore=_OPENAI_IMAGE,
        aliases=((r"^text\.", ""),),  # of open_clip, where the tower is a module
        pixels=vocabulary("token_embedding.weight"),
    )


LAYOUTS = {
    "clip": {
        "hf": _hf(_projection("text_projection.weight", DENSE), r"text_projection\..+"),
        "openai": _openai(_projection("text_projection", SAME)),
        "native": NATIVE,
    },
    "siglip": {
        "hf": _hf({"head": "text_model.head"}, r"text_model\.head\..+"),
        "open_clip": _openai({"head": "text_projection"}),
        "native": NATIVE,
    },
}
FIELDS = {
    "clip": {"norm_eps": 1e-5, "act": "gelu", "causal": True, "positions": 77, "vocab_size": 49408, "tied": False},
    "siglip": {"norm_eps": 1e-6, "act": "gelu_tanh", "fill": 1, "positions": 64, "vocab_size": 32000, "tied": False},
}


def variant(name: str, kind: str, size: tuple[int, int, int], **fields: Any) -> Variant:
    """kind: "clip" or "siglip"; size: blocks, width, heads; fields: of the network where they are not those of kind."""
    geometry = dict(zip(("depth", "width", "heads"), size, strict=True))
    if geometry["width"] % geometry["heads"]:
        raise ValueError(f"{name}: a width of {size[1]} is no multiple of {size[2]} heads")
    fields = {**geometry, "pre_norm": True, "pooling": "last", **FIELDS[kind], **fields}
    text = {"vocab": fields["vocab_size"], "max_length": fields["positions"], "pooling": "last"}
    card = Card(name, geometry["width"], mean=(), std=(), input="text", **text)
    return Variant(functools.partial(Transformer, **fields), card, LAYOUTS[kind], {})


@functools.cache
def variant_of(name: str) -> Variant | None:
    """That of a name such as clip_text_l3_h192_a3, also with _quickgelu, or siglip_text_l3_h192_a3; None for others."""
    found = re.fullmatch(r"(siglip|clip)_text_l([1-9]\d*)_h([1-9]\d*)_a([1-9]\d*)(_quickgelu)?", name)
    if not found or (found[1] == "siglip" and found[5]):
        return None
    own = {"act": "quick_gelu"} if found[5] else {}
    return variant(name, found[1], tuple(map(int, found.group(2, 3, 4))), **own)


def _all_variants() -> dict[str, Variant]:
    made = {"siglip_text_base": variant("siglip_text_base", "siglip", (12, 768, 12))}
    for size, geometry in {"base": (12, 512, 8), "large": (12, 768, 12)}.items():
        for end, own in {"": {}, "_quickgelu": {"act": "quick_gelu"}}.items():
            made[f"clip_text_{size}{end}"] = variant(f"clip_text_{size}{end}", "clip", geometry, **own)
    return made


VARIANTS: dict[str, Variant] = _all_variants()
# The text tower that the file of an image tower holds.
_SIZES = {"base_patch32": "base", "base_patch16": "base", "large_patch14": "large"}
TOWERS = {"vit_base_patch16_siglip_224": "siglip_text_base"}
for _image, _text in _SIZES.items():
    TOWERS[f"vit_{_image}_clip_224"] = f"clip_text_{_text}"
    TOWERS[f"vit_{_image}_clip_quickgelu_224"] = f"clip_text_{_text}_quickgelu"
