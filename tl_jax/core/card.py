"""The weight card: what a set of weights expects of its input, and where it comes from. Plain data, no jax."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from tl_jax.core import checks, files
from tl_jax.core.fields import PRESENT

INPUTS = ("image", "table", "text", "several")
CROP_MODES = ("center", "squash", "border")
POOLINGS = ("cls", "mean", "last", "max")  # of tokens into one vector
CASE = {True: "lower case", False: "upper and lower case", None: "case not known"}  # of the field `lowercase`
COMPARING = ("cosine", "compare")  # head layers that take two texts, each encoded by itself
PIXEL_TYPES = ("uint8", "uint16", "int16", "float32")
# The fields that decide what the network reads.
PIXELS = (
    "input", "input_size", "mean", "std", "interpolation", "crop", "columns", "crop_mode", "pixels", "scale", "vocab",
    "tokenizer", "max_length", "pooling", "lowercase",
)  # fmt: skip
STORED = ("pixels", "scale")  # those of them that say how the files hold it: no weights contradict them
# Left out of the JSON at their defaults, so that a new field changes no card that exists.
LATER = (
    "input", "columns", "task", "target_mean", "target_std", "threshold", "head", "crop_mode", "pixels", "scale",
    "vocab", "tokenizer", "max_length", "pooling", "lowercase", "parts", "fusion",
)  # fmt: skip


def size_text(size: int | Sequence[int]) -> str:
    """A size for people: "224", or "192x256"."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


class Form(NamedTuple):
    """How images are read: the type of the pixel values in the files, and the channels that the network takes."""

    pixels: str = "uint8"
    channels: int = 3

    @property
    def dtype(self) -> str:
        """Of images in memory: 16-bit values are float32, which holds them exactly."""
        return "uint8" if self.pixels == "uint8" else "float32"

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' * (self.channels > 1)} of {self.pixels}"


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of images of a size, which is that of a square or both."""
    return (size, size) if isinstance(size, int) else tuple(size)


@dataclasses.dataclass(frozen=True)
class Card:
    """What travels with a set of weights, from the conversion to the last checkpoint.

    Input "image": pixels enter the network as `(x / scale - mean) / std`, as many channels as `mean` has numbers.
    `pixels` is the type of the values in the files, `scale` what stands for 1: of uint8 255 unless given. Evaluation
    resizes with `interpolation` to `floor(input_size / crop)` pixels and cuts the centre of `input_size`, a side or
    (height, width). `crop_mode` is timm's: "center" keeps the aspect ratio and covers that size, "squash" takes exactly
    that size, "border" keeps the ratio within it and fills the rest with the mean.
    Input "table": the values of `columns` enter as `(x - mean) / std`, one mean and deviation a column.
    Input "text": the tokenizer.json of sha256 `tokenizer` gives at most `max_length` tokens, numbers below `vocab`,
    whose vectors are pooled by `pooling`, one of POOLINGS. `lowercase`: it reads upper case as lower case.
    Input "several": one of each kind of `parts`, the cards of the networks that read them; `fusion` says how these are
    joined, pairs (field of models.fusion.Fusion, value).
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
    crop_mode: str = "center"
    pixels: str = "uint8"
    scale: float = 0.0  # 0 stands for 255, and is for uint8 alone
    vocab: int = 0  # how many tokens the network knows
    tokenizer: str = ""  # "": not known yet
    max_length: int = 0  # tokens of an example, special ones included
    pooling: str = ""
    lowercase: bool | None = None  # None: not known yet
    parts: tuple["Card", ...] = ()
    fusion: tuple = ()

    def __post_init__(self):
        kinds = [part.input for part in self.parts]
        if kinds and (self.input != "several" or not 1 < len(kinds) == len(set(kinds)) or "several" in kinds):
            expected = "an input 'several' has two or three parts, of different kinds, and no other has any"
            raise ValueError(f"invalid weight card: input={self.input!r} with parts {kinds}; {expected}")
        if self.input == "text" and not (self.vocab > 0 and self.max_length > 0 and self.pooling in POOLINGS):
            found = f"vocab={self.vocab}, max_length={self.max_length}, pooling={self.pooling!r}"
            raise ValueError(f"invalid weight card: {found}; expected numbers above 0, one of {', '.join(POOLINGS)}")
        channels = max(len(self.mean), 1) if self.input == "image" else len(self.columns)
        given = self.input_size if isinstance(self.input_size, tuple) else (self.input_size,) * 2
        whole = len(given) == 2 and all(checks.integer(1).fits(side) for side in given)
        size = whole and len(self.mean) == len(self.std) == channels
        positive = all(isinstance(x, Real) and x > 0 for x in (*self.std, self.crop))
        known = self.input in INPUTS and self.crop_mode in CROP_MODES and self.pixels in PIXEL_TYPES
        if not (known and size and positive and all(isinstance(x, Real) for x in self.mean)):
            names = ("input", "input_size", "mean", "std", "crop", "crop_mode", "pixels")
            found = {name: getattr(self, name) for name in names}
            expected = f"a whole number of pixels, {channels} means, {channels} deviations > 0, a crop > 0"
            kinds = f"an input of {', '.join(INPUTS)}, a crop_mode of {', '.join(CROP_MODES)}"
            raise ValueError(
                f"invalid weight card: {found}; expected {kinds}, pixels of {', '.join(PIXEL_TYPES)}, {expected}"
            )
        if not (isinstance(self.scale, Real) and (self.scale > 0 or (self.scale == 0 and self.pixels == "uint8"))):
            usual = "65535 where uint16 uses all bits, 4095 where it uses 12, 1 for floats from 0 to 1"
            raise ValueError(
                f"the card says pixels {self.pixels!r} and scale {self.scale}: give the scale, the pixel value that "
                f"stands for 1, which no file tells: {usual}"
            )

    @property
    def cards(self) -> dict[str, "Card"]:
        """Of each kind of input, the card that says how it is read."""
        return {part.input: part for part in self.parts} or {self.input: self}

    @property
    def field(self) -> str | tuple[str, ...]:
        """What of a batch the network reads: one field, or those of several inputs, see fields.take."""
        return tuple(f"{kind}{end}" for end in ("", PRESENT) for kind in self.cards) if self.parts else self.input

    def unread(self, cut: str | None) -> tuple[str, ...]:
        """The kinds of several inputs that a network reads behind a cut, None: from the input on."""
        kinds, last = list(self.cards), (cut or "").partition("/")[0]
        return tuple(kinds[kinds.index(last) + 1 :] if last in kinds else () if cut else kinds)

    @property
    def divisor(self) -> float:
        """What pixels are divided by before mean and deviation; 1 of other inputs."""
        return (self.scale or 255.0) if self.input == "image" else 1.0

    @property
    def texts(self) -> int:
        """How many texts of an example are encoded each by itself, behind one another in the input."""
        return 2 if self.num_classes and self.head and self.head[0][0] in COMPARING else 1

    @property
    def form(self) -> Form:
        if "image" in self.cards and self.parts:
            return self.cards["image"].form
        return Form(self.pixels, len(self.mean))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input of the network: (height, width, channels), (columns,), or (tokens, 2), see models/tokens.py."""
        if self.input == "text":
            return self.texts * self.max_length, 2
        return (*sides(self.input_size), len(self.mean)) if self.input == "image" else (len(self.columns),)

    def to_json(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in LATER}
        table = dataclasses.asdict(self) | {"parts": tuple(json.loads(part.to_json()) for part in self.parts)}
        return json.dumps({key: x for key, x in table.items() if defaults.get(key, ...) != x}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """Reads `to_json`'s text back; raises ValueError on unknown or missing fields."""
        fields, known = json.loads(text), sorted(field.name for field in dataclasses.fields(cls))
        if unknown := sorted(set(fields).difference(known)):
            raise ValueError(f"weight card has unknown fields {unknown}; known: {known}")
        if missing := sorted({"model", "num_classes"} - set(fields)):
            raise ValueError(f"weight card lacks {missing}")
        parts = tuple(cls.from_json(json.dumps(part)) for part in fields.pop("parts", ()))
        return cls(**files.as_tuples(fields), **({"parts": parts} if parts else {}))

    def replace(self, **fields: Any) -> "Card":
        return dataclasses.replace(self, **fields)

    def override(self, fields: Mapping[str, Any], allowed: bool) -> "Card":
        """A copy with other `fields`; ValueError where one of them is in PIXELS, differs, and `allowed` is False."""
        own = dataclasses.asdict(self)
        if unknown := sorted(set(fields) - set(own)):
            raise ValueError(f"a weight card has no {', '.join(unknown)}; its fields: {', '.join(own)}")
        fields = files.as_tuples(fields)
        if len(fields.get("mean", self.mean)) != len(self.mean):
            found = f"{len(fields['mean'])} means, and the network reads {len(self.mean)} channels"
            raise ValueError(f"the card of {self.model} is given {found}; model.channels changes these")
        clashes = [key for key, value in fields.items() if own[key] != value and key in PIXELS and key not in STORED]
        if clashes and not allowed:
            lines = [f"  {key}: the card says {own[key]!r}, the config {fields[key]!r}" for key in clashes]
            wrong = f"the config contradicts the weight card of {self.model}: the weights expect other pixels"
            fix = "Remove the options, or set data.override_card=True if it is intended:"
            raise ValueError("\n".join([f"{wrong}. {fix}", *lines]))
        return self.replace(**fields)
