"""The fields of a batch of one stream, apart from its views; reading a LABEL that is not there raises KeyError."""

from collections.abc import Mapping
from typing import Any

LABEL = "label"  # [B] int32 classes, [B, K] int32 labels or [B, T] float32 targets; of tokens see text/language.py
INDEX = "index"  # [B] int32, the place of the example in its source; -1 where a batch is padded
MASK = "mask"  # [B] bool, whether the example is one; in evaluation
WEIGHT = "weight"  # [B] float32, of the examples, where data.weights gives them
DOMAIN = "domain"  # [B] int32, where a source has several domains
PRESENT = ":present"  # behind a kind of input: [B] bool, whether the examples have it, where they have several


def take(batch: Mapping[str, Any], field: str | tuple[str, ...]) -> Any:
    """What a network reads of a batch: one array, or of several inputs {field: array}."""
    return batch[field] if isinstance(field, str) else {name: batch[name] for name in field}
