"""The table of models: `MODELS[name]` or `get(name)` gives the module, its card and its conversion tables."""

import difflib
from typing import Any

from tl_jax.models import (
    clip,
    convnext,
    densenet,
    dinov2,
    efficientnet,
    inception,
    lenet,
    mlp,
    mobilenet,
    resnet,
    squeezenet,
    vgg,
    vit,
)
from tl_jax.models.variant import Variant

_VISION = (resnet, vgg, inception, densenet, squeezenet, mobilenet, efficientnet, convnext, vit, dinov2, clip)
_FAMILIES = (*_VISION, mlp, lenet)
MODELS: dict[str, Variant] = {name: variant for family in _FAMILIES for name, variant in family.VARIANTS.items()}


def get(name: str) -> Variant:
    """Returns the named variant; raises ValueError with the nearest names where there is none."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5) or list(MODELS)
        raise ValueError(f"there is no model {name!r}; nearest: {', '.join(near)}")
    return MODELS[name]


def list_models(text: str = "") -> tuple[str, ...]:
    """The names of all models, or of those that contain a text."""
    return tuple(name for name in MODELS if text in name)


def deterministic_cuts(model: Any) -> tuple[str, ...]:
    """The cuts of a module whose output is not random in training; a frozen prefix may end at these."""
    if isinstance(model, mlp.MLP):
        return model.cuts[:1] if model.dropout else model.cuts
    if isinstance(model, lenet.LeNet):
        return model.cuts[:1] if model.rate else model.cuts
    if isinstance(model, vgg.VGG):
        return model.cuts[:-1] if model.dropout else model.cuts
    return model.cuts[:2] if model.drop_path and len(model.cuts) > 3 else model.cuts  # the first block's rate is 0


__all__ = ["MODELS", "Variant", "deterministic_cuts", "get", "list_models"]
