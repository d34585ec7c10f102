"""The weight card: what a set of weights expects of its input, and where it comes from. Plain data, no jax."""

import dataclasses
import json
from collections.abc import Mapping
from numbers import Real
from typing import Any

from tl_jax.core import checks, files

INPUTS = ("image", "table")
# The fields that decide what the network reads.
PIXELS = ("input", "input_size", "mean", "std", "interpolation", "crop", "columns")
# Left out of the JSON at their defaults, so that a new field changes no card that exists.
LATER = ("input", "columns", "task", "target_mean", "target_std", "threshold", "head")


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of images of a size, which is that of a square or both."""
    return (size, size) if isinstance(size, int) else tuple(size)


@dataclasses.dataclass(frozen=True)
class Card:
    """What travels with a set of weights, from the conversion to the last checkpoint.

    Input "image": pixels enter the network as `(x / 255 - mean) / std`. Evaluation resizes the short side to
    `floor(input_size / crop)` pixels with `interpolation`, then cuts the centre `input_size` square. `input_size` may
    be (height, width) too: such images are not prepared from files, they are given as arrays.
    Input "table": the values of `columns` enter as `(x - mean) / std`, one mean and deviation a column.
    """

    model: str
    num_classes: int  # how many outputs there are
    input_size: int | tuple[int, int] = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: float = 0.875
    class_names: tuple[str, ...] = ()  # of the classes, labels or targets
    source: str = ""
    licence: str = ""
    sha256: str = ""
    input: str = "image"
    columns: tuple[str, ...] = ()
    task: str = "classification"  # what the outputs mean, a name of `tl_jax.tasks`
    target_mean: tuple[float, ...] = ()  # of a regression, whose outputs are standardised
    target_std: tuple[float, ...] = ()
    threshold: float | None = None  # of the probability of a binary task
    head: tuple = ()  # the layers before the last dense one, pairs (name, arguments)

    def __post_init__(self):
        channels = 3 if self.input == "image" else len(self.columns)
        given = self.input_size if isinstance(self.input_size, tuple) else (self.input_size,) * 2
        whole = len(given) == 2 and all(checks.integer(1).fits(side) for side in given)
        size = whole and len(self.mean) == len(self.std) == channels
        positive = all(isinstance(x, Real) and x > 0 for x in (*self.std, self.crop))
        if self.input not in INPUTS or not (size and positive and all(isinstance(x, Real) for x in self.mean)):
            found = {name: getattr(self, name) for name in ("input", "input_size", "mean", "std", "crop")}
            expected = f"a whole number of pixels, {channels} means, {channels} deviations > 0, a crop > 0"
            raise ValueError(f"invalid weight card: {found}; expected an input of {', '.join(INPUTS)}, {expected}")

    @property
    def scale(self) -> float:
        """What inputs are divided by before mean and deviation: the largest value of a pixel, 1 for a table."""
        return 255.0 if self.input == "image" else 1.0

    def to_json(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in LATER}
        table = dataclasses.asdict(self)
        return json.dumps({key: x for key, x in table.items() if defaults.get(key, ...) != x}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """Reads `to_json`'s text back; raises ValueError on unknown or missing fields."""
        fields, known = json.loads(text), sorted(field.name for field in dataclasses.fields(cls))
        if unknown := sorted(set(fields).difference(known)):
            raise ValueError(f"weight card has unknown fields {unknown}; known: {known}")
        if missing := sorted({"model", "num_classes"} - set(fields)):
            raise ValueError(f"weight card lacks {missing}")
        return cls(**files.as_tuples(fields))

    def replace(self, **fields: Any) -> "Card":
        return dataclasses.replace(self, **fields)

    def override(self, fields: Mapping[str, Any], allowed: bool) -> "Card":
        """A copy with other `fields`; ValueError where one of them is in PIXELS, differs, and `allowed` is False."""
        own = dataclasses.asdict(self)
        if unknown := sorted(set(fields) - set(own)):
            raise ValueError(f"a weight card has no {', '.join(unknown)}; its fields: {', '.join(own)}")
        fields = files.as_tuples(fields)
        clashes = [key for key, value in fields.items() if own[key] != value and key in PIXELS]
        if clashes and not allowed:
            lines = [f"  {key}: the card says {own[key]!r}, the config {fields[key]!r}" for key in clashes]
            wrong = f"the config contradicts the weight card of {self.model}: the weights expect other pixels"
            fix = "Remove the options, or set data.override_card=True if it is intended:"
            raise ValueError("\n".join([f"{wrong}. {fix}", *lines]))
        return self.replace(**fields)
