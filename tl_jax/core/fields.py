"""The fields of a batch of one stream, apart from its views; reading a LABEL that is not there raises KeyError."""

LABEL = "label"  # [B] int32 classes, [B, K] int32 labels or [B, T] float32 targets; of tokens see text/language.py
INDEX = "index"  # [B] int32, the place of the example in its source; -1 where a batch is padded
MASK = "mask"  # [B] bool, whether the example is one; in evaluation
WEIGHT = "weight"  # [B] float32, of the examples, where data.weights gives them
DOMAIN = "domain"  # [B] int32, where a source has several domains
