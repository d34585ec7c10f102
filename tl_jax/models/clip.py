"""The image towers of CLIP (Radford et al. 2021, arXiv:2103.00020) and SigLIP (Zhai et al. 2023, arXiv:2303.15343).

CLIP's projection to the embedding of image and text is the head that a file brings, as in timm: `logits` are the
embedding then, and pre_logits the features before it, which the authors' linear probes read (section 3.2) and on which
fine-tuned classifiers stand. A new head replaces the projection. It has no bias; ours, of zeros, is in no file but
timm's. SigLIP has no projection: its embedding is pre_logits.
"""

import functools

import numpy as np

from tl_jax.core.card import Card
from tl_jax.models.conversion import ABSENT, DENSE, NATIVE, QKV, SAME, Layout, Transform, rules_of
from tl_jax.models.variant import Variant, with_flavours
from tl_jax.models.vit import BLOCK, TIMM_KEYS, ViT, qkv_rules

TOKEN = Transform(lambda w: w.reshape(1, 1, -1), lambda w: (w.reshape(-1),))  # [D] <-> [1, 1, D]
TABLE = Transform(lambda w: w[None], lambda w: (w[0],))  # [N, D] <-> [1, N, D]
_STEM, _FINAL = "backbone/stem", "backbone/final"
CLIP_TIMM = Layout(tuple(rules_of({**TIMM_KEYS, f"{_STEM}/norm": "norm_pre", "head": "head"})), head=r"head\..+")


def openai_block(block: str) -> dict[str, str]:
    """The keys of a block named so, of either tower, but for those of qkv."""
    return {
        f"{BLOCK}/norm1": f"{block}.ln_1",
        f"{BLOCK}/attn/proj": f"{block}.attn.out_proj",
        f"{BLOCK}/norm2": f"{block}.ln_2",
        f"{BLOCK}/mlp/fc1": f"{block}.mlp.c_fc",
        f"{BLOCK}/mlp/fc2": f"{block}.mlp.c_proj",
    }


def hf_block(block: str) -> dict[str, str]:
    """As `openai_block`, in files of Hugging Face."""
    return {
        f"{BLOCK}/norm1": f"{block}.layer_norm1",
        f"{BLOCK}/attn/proj": f"{block}.self_attn.out_proj",
        f"{BLOCK}/norm2": f"{block}.layer_norm2",
        f"{BLOCK}/mlp/fc1": f"{block}.mlp.fc1",
        f"{BLOCK}/mlp/fc2": f"{block}.mlp.fc2",
    }


_RES = r"visual.transformer.resblocks.\1"
OPENAI = Layout(
    (
        *rules_of({
            f"{_STEM}/cls_token": (("visual.class_embedding",), TOKEN),
            f"{_STEM}/pos_embed": (("visual.positional_embedding",), TABLE),
            f"{_STEM}/patch_embed": "visual.conv1",
            f"{_STEM}/norm": "visual.ln_pre",
            **openai_block(_RES),
            "backbone/norm": "visual.ln_post",
            "head/kernel": (("visual.proj",), SAME),
            "head/bias": ((), ABSENT),
        }),
        *qkv_rules([f"{_RES}.attn.in_proj_{{}}"], DENSE),
    ),
    head=r"visual\.proj",
    # the text tower, and three numbers of OpenAI's archives
    ignore=r"transformer\..+|token_embedding\.weight|positional_embedding|ln_final\..+|text_projection|"
    r"logit_(scale|bias)|input_resolution|context_length|vocab_size",
)  # fmt: skip

_HF, _LAYER = "vision_model", r"vision_model.encoder.layers.\1"
_HF_KEYS = {
    f"{_STEM}/pos_embed": ((f"{_HF}.embeddings.position_embedding.weight",), TABLE),
    f"{_STEM}/patch_embed": f"{_HF}.embeddings.patch_embedding",
    **hf_block(_LAYER),
    "backbone/norm": f"{_HF}.post_layernorm",
}
_HF_QKV = qkv_rules([f"{_LAYER}.self_attn.{name}_proj.{{}}" for name in "qkv"], QKV)
_HF_TEXT = r"text_model\..+|text_projection\..+|logit_(scale|bias)|vision_model\.embeddings\.position_ids"
_BARE = ((r"^(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.", r"vision_model.\1."),)  # a tower by itself
CLIP_HF = Layout(
    (
        *rules_of({
            **_HF_KEYS,
            f"{_STEM}/cls_token": ((f"{_HF}.embeddings.class_embedding",), TOKEN),
            f"{_STEM}/norm": f"{_HF}.pre_layrnorm",  # their spelling
            "head/kernel": (("visual_projection.weight",), DENSE),
            "head/bias": ((), ABSENT),
        }),
        *_HF_QKV,
    ),
    head=r"visual_projection\..+",
    ignore=_HF_TEXT,
    aliases=_BARE,
)  # fmt: skip

# timm has the query of the pool apart from keys and values
_Q_KV = Transform(lambda *w: np.concatenate(w).T, lambda w: tuple(np.split(w.T, [w.shape[-1] // 3])))
SIGLIP_TIMM = Layout(
    (
        *rules_of({
            **TIMM_KEYS,
            f"{_FINAL}/latent": "attn_pool.latent",
            f"{_FINAL}/attn/proj": "attn_pool.proj",
            f"{_FINAL}/norm": "attn_pool.norm",
            f"{_FINAL}/mlp/fc1": "attn_pool.mlp.fc1",
            f"{_FINAL}/mlp/fc2": "attn_pool.mlp.fc2",
            "head": "head",
        }),
        *qkv_rules(["attn_pool.q.{}", "attn_pool.kv.{}"], _Q_KV, f"{_FINAL}/attn/qkv"),
    ),
    head=r"head\..+",
    ignore=r"text\..+|logit_(scale|bias)",
    aliases=((r"^visual\.trunk\.", ""),),  # of open_clip, with a text tower
)  # fmt: skip
SIGLIP_HF = Layout(
    (
        *rules_of({
            **_HF_KEYS,
            f"{_FINAL}/latent": f"{_HF}.head.probe",
            f"{_FINAL}/attn/proj": f"{_HF}.head.attention.out_proj",
            f"{_FINAL}/norm": f"{_HF}.head.layernorm",
            f"{_FINAL}/mlp/fc1": f"{_HF}.head.mlp.fc1",
            f"{_FINAL}/mlp/fc2": f"{_HF}.head.mlp.fc2",
            "head": "classifier",
        }),
        *_HF_QKV,
        *qkv_rules([f"{_HF}.head.attention.in_proj_{{}}"], DENSE, f"{_FINAL}/attn/qkv"),
    ),
    head=r"classifier\..+",
    ignore=_HF_TEXT,
    aliases=_BARE,
)  # fmt: skip

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's
HALF = (0.5,) * 3


def clip_variants(module, card: Card, publisher: str) -> dict[str, Variant]:
    """A CLIP tower as timm has it, made by `module`, and its flavours, which differ in the crop alone.

    publisher: the layout with OpenAI's names. Its files do not tell which GELU is theirs: the name of the model does.
    """
    layouts = {"timm": CLIP_TIMM, publisher: OPENAI, "hf": CLIP_HF, "native": NATIVE}
    whole = card.replace(crop=1.0)
    return with_flavours(module, card, layouts, {publisher: (publisher, {}, whole), "hf": ("hf", {}, whole)})


def siglip_variants(module, card: Card) -> dict[str, Variant]:
    """A SigLIP tower as timm has it, which crops; its .hf flavour has tanh GELU and squashes, as the original."""
    layouts = {"timm": SIGLIP_TIMM, "hf": SIGLIP_HF, "native": NATIVE}
    return with_flavours(
        module, card, layouts, {"hf": ("hf", {"act": "gelu_tanh"}, card.replace(crop=1.0, crop_mode="squash"))}
    )


def _all_variants() -> dict[str, Variant]:
    # patch, width, depth, heads, size of the embedding; timm's crops of OpenAI's and LAION's files
    geometry = {
        "base_patch32": ((32, 768, 12, 12), 512, (0.9, 0.9)),
        "base_patch16": ((16, 768, 12, 12), 512, (0.9, 1.0)),
        "large_patch14": ((14, 1024, 24, 16), 768, (1.0, 1.0)),
    }
    names, variants = ("patch_size", "width", "depth", "heads"), {}
    for size, (shape, embedding, crops) in geometry.items():
        module = functools.partial(ViT, **dict(zip(names, shape, strict=True)), norm_eps=1e-5, pre_norm=True)
        card = Card(f"vit_{size}_clip_quickgelu_224", embedding, mean=MEAN, std=STD, crop=crops[0])
        variants |= clip_variants(functools.partial(module, act="quick_gelu"), card, "openai")
        means = {"mean": HALF, "std": HALF} if size == "large_patch14" else {}
        card = card.replace(model=f"vit_{size}_clip_224", crop=crops[1], **means)
        variants |= clip_variants(module, card, "open_clip")
    module = functools.partial(ViT, patch_size=16, width=768, depth=12, heads=12, pool="map")
    return variants | siglip_variants(module, Card("vit_base_patch16_siglip_224", 0, mean=HALF, std=HALF, crop=0.9))


VARIANTS: dict[str, Variant] = _all_variants()
