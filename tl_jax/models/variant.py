"""What a name of the model table stands for."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tl_jax.core.card import Card
from tl_jax.models.conversion import Layout


class Variant(NamedTuple):
    """One named model.

    Attributes:
      module: makes the nn.Module from `num_classes` and whatever else of the module's fields is to change.
      card: the preprocessing its published weights expect, and their number of classes.
      layouts: the conversion tables of the files it is loaded from and exported to; the first is the export default.
      flavours: {layout: variant} where that layout's publisher computes or preprocesses differently.
    """

    module: Callable[..., Any]
    card: Card
    layouts: Mapping[str, Layout]
    flavours: Mapping[str, str]
