"""The table of models: `MODELS[name]` or `get(name)` gives the module, its card and its conversion tables."""

import difflib

from tl_jax.models import (
    bert,
    clip,
    clip_text,
    convnext,
    densenet,
    dinov2,
    efficientnet,
    fusion,
    gpt2,
    inception,
    lenet,
    mlp,
    mobilenet,
    recurrent,
    resnet,
    squeezenet,
    swin,
    vgg,
    vit,
)
from tl_jax.models.variant import Variant

_VISION = (resnet, vgg, inception, densenet, squeezenet, mobilenet, efficientnet, convnext, swin, vit, dinov2, clip)
_TEXT = (bert, gpt2, clip_text, recurrent)  # whose names tell sizes, so that the table has not all
_FAMILIES = (*_VISION, mlp, lenet, *_TEXT)
MODELS: dict[str, Variant] = {name: variant for family in _FAMILIES for name, variant in family.VARIANTS.items()}


def get(name: str) -> Variant:
    """Returns the named variant; raises ValueError with the nearest names where there is none."""
    for family in () if name in MODELS else (*_TEXT, vit, fusion):
        if made := family.variant_of(name):
            return made
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5) or list(MODELS)
        raise ValueError(f"there is no model {name!r}; nearest: {', '.join(near)}")
    return MODELS[name]


def list_models(text: str = "") -> tuple[str, ...]:
    """The names of all models, or of those that contain a text."""
    return tuple(name for name in MODELS if text in name)


__all__ = ["MODELS", "Variant", "get", "list_models"]
