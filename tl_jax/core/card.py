"""The weight card: what a set of weights expects of its input, and where it comes from. Plain data, no jax."""

import dataclasses
import json
from collections.abc import Mapping
from numbers import Real
from typing import Any

PIXELS = ("input_size", "mean", "std", "interpolation", "crop", "colour")  # the fields that decide what weights see


@dataclasses.dataclass(frozen=True)
class Card:
    """What travels with a set of weights, from the conversion to the last checkpoint.

    Pixels enter the network as `(x / 255 - mean) / std`. Evaluation resizes the short side to
    `floor(input_size / crop)` pixels with `interpolation`, then cuts the centre `input_size` square.
    """

    model: str
    num_classes: int
    input_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: float = 0.875
    colour: str = "RGB"
    class_names: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    sha256: str = ""

    def __post_init__(self):
        numbers = [x for x in (*self.mean, *self.std, self.crop) if not isinstance(x, Real)]
        size = isinstance(self.input_size, int) and self.input_size > 0
        if numbers or not size or not len(self.mean) == len(self.std) == 3 or min(*self.std, self.crop) <= 0:
            raise ValueError(
                f"a weight card cannot have input_size={self.input_size!r}, mean={self.mean}, std={self.std}, "
                f"crop={self.crop!r}: expected a whole number of pixels, three means, three deviations > 0, a crop > 0"
            )
        if self.colour != "RGB":
            raise ValueError(
                f"a weight card with colour={self.colour!r}: images are RGB; swap the input channels instead"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """Reads `to_json`'s text back; raises ValueError on unknown or missing fields."""
        fields = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"weight card has unknown fields {unknown}; known: {sorted(known)}")
        if missing := sorted({"model", "num_classes"} - set(fields)):
            raise ValueError(f"weight card lacks {missing}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})

    def replace(self, **fields: Any) -> "Card":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **fields)

    def override(self, fields: Mapping[str, Any], allowed: bool) -> "Card":
        """A copy with other `fields`; ValueError where one of them is in PIXELS, differs, and `allowed` is False."""
        own = dataclasses.asdict(self)
        if unknown := sorted(set(fields) - set(own)):
            raise ValueError(f"a weight card has no {', '.join(unknown)}; its fields: {', '.join(own)}")
        fields = {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in fields.items()}
        clashes = [
            f"  {key}: the card says {own[key]!r}, the config {value!r}"
            for key, value in fields.items()
            if own[key] != value and key in PIXELS
        ]
        if clashes and not allowed:
            raise ValueError(
                f"the config contradicts the weight card of {self.model}: the weights would see pixels they were not "
                "trained on. Remove the options, or set data.override_card=True if it is meant:\n" + "\n".join(clashes)
            )
        return self.replace(**fields)
