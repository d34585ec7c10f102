"""The names of what a batch of one stream holds, `{field: array}`; the inputs have the names of their views.

A stream without labels has no field LABEL, so that whatever reads one raises KeyError.
"""

LABEL = "label"  # [B] int32 classes, [B, K] int32 labels or [B, T] float32 targets
INDEX = "index"  # [B] int32, the place of the example in its source; -1 where a batch is padded
MASK = "mask"  # [B] bool, whether the example is one; in evaluation
DOMAIN = "domain"  # [B] int32, where a source has several domains
