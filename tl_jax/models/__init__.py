"""The table of models: `MODELS[name]` or `get(name)` gives the module, its card and its conversion tables."""

import difflib

from tl_jax.models import resnet, vit
from tl_jax.models.variant import Variant

MODELS: dict[str, Variant] = {**resnet.VARIANTS, **vit.VARIANTS}


def get(name: str) -> Variant:
    """Returns the named variant; raises ValueError with the nearest names where there is none."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5) or list(MODELS)
        raise ValueError(f"there is no model {name!r}; nearest: {', '.join(near)}")
    return MODELS[name]


__all__ = ["MODELS", "Variant", "get"]
