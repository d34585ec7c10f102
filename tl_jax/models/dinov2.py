"""DINOv2 (Oquab et al. 2023, arXiv:2304.07193) and DINOv2 with registers (Darcet et al. 2023, arXiv:2309.16588).

The files of Facebook and of transformers keep what timm leaves out: the mask token of the pretraining, and with
registers a position of the class token, which timm has added to that token. So their flavours have these leaves.
"""

import functools

from tl_jax.core.card import Card
from tl_jax.models.conversion import LEFT_OUT, NATIVE, QKV, Layout, rules_of
from tl_jax.models.variant import Variant, with_flavours
from tl_jax.models.vit import BLOCK, TIMM_KEYS, ViT, qkv_rules

_SCALES = {f"{BLOCK}/ls{i}/gamma": rf"blocks.\1.ls{i}.gamma" for i in (1, 2)}
_MASK, _REGISTERS = "backbone/stem/mask_token", "backbone/stem/register_tokens"
_HEAD = {"head": "head"}
_FACEBOOK_KEYS = {**TIMM_KEYS, **_SCALES, _MASK: "mask_token", _REGISTERS: "register_tokens", **_HEAD}
_LAYER = r"dinov2.encoder.layer.\1"
_HF_KEYS = {
    "backbone/stem/cls_token": "dinov2.embeddings.cls_token",
    "backbone/stem/pos_embed": "dinov2.embeddings.position_embeddings",
    _MASK: "dinov2.embeddings.mask_token",
    _REGISTERS: "dinov2.embeddings.register_tokens",
    "backbone/stem/patch_embed": "dinov2.embeddings.patch_embeddings.projection",
    **{f"{BLOCK}/norm{i}": f"{_LAYER}.norm{i}" for i in (1, 2)},
    f"{BLOCK}/attn/proj": f"{_LAYER}.attention.output.dense",
    **{f"{BLOCK}/mlp/fc{i}": f"{_LAYER}.mlp.fc{i}" for i in (1, 2)},
    **{f"{BLOCK}/ls{i}/gamma": f"{_LAYER}.layer_scale{i}.lambda1" for i in (1, 2)},
    "backbone/norm": "dinov2.layernorm",
    "head": "classifier",
}
TIMM = Layout(tuple(rules_of({**_FACEBOOK_KEYS, _REGISTERS: "reg_token", _MASK: ((), LEFT_OUT)})), head=r"head\..+")
FACEBOOK = Layout(tuple(rules_of(_FACEBOOK_KEYS)), head=r"head\..+")
# A bare model has no prefix, one with registers another; the others are of state dicts of transformers 5, see vit.py.
HF = Layout(
    (
        *rules_of(_HF_KEYS),
        *qkv_rules([f"{_LAYER}.attention.attention.{name}.{{}}" for name in ("query", "key", "value")], QKV),
    ),
    head=r"classifier\..+",
    aliases=(
        (r"^(embeddings|encoder|layernorm)\.", r"dinov2.\1."),
        (r"^dinov2_with_registers\.", "dinov2."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
    ),
)


def dinov2_variants(name: str, module, registers: bool) -> dict[str, Variant]:
    """A DINOv2 as timm has it, made by `module`, and its flavours .fb and .hf, whose leaves are those of their files.

    These resample positions without antialias where there are no registers, and resize to 8/7 of the crop.
    """
    card = Card(name, 0, 518, crop=1.0)
    layouts = {"timm": TIMM, "facebook": FACEBOOK, "hf": HF, "native": NATIVE}
    # 256 / 224, of Facebook's transform for evaluation and of the preprocessor_config.json of transformers' files
    wide, mask = card.replace(crop=0.875), {"mask_token": True}
    if registers:
        fields = {"facebook": mask | {"class_position": True}, "hf": mask | {"class_position": True}}
    else:
        fields = {"facebook": mask | {"resampling": "shifted"}, "hf": mask | {"resampling": "plain"}}
    flavours = {"facebook": ("fb", fields["facebook"], wide), "hf": ("hf", fields["hf"], wide)}
    variants = with_flavours(module, card, layouts, flavours)
    for layout, flavour in variants[name].flavours.items():
        # Their own first, which keeps every leaf; timm has no place for a position of the class token.
        kept = (layout, "native") if registers else (layout, "timm", "native")
        variants[flavour] = variants[flavour]._replace(layouts={key: layouts[key] for key in kept})
    return variants


def _all_variants() -> dict[str, Variant]:
    variants = {}
    for size, (width, depth, heads) in {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}.items():
        fields = {"patch_size": 14, "width": width, "depth": depth, "heads": heads, "image_size": 518}
        module = functools.partial(ViT, **fields, layer_scale=1e-5)
        variants |= dinov2_variants(f"vit_{size}_patch14_dinov2", module, False)
        module = functools.partial(module, registers=4, class_position=False)
        variants |= dinov2_variants(f"vit_{size}_patch14_reg4_dinov2", module, True)
    return variants


VARIANTS: dict[str, Variant] = _all_variants()
