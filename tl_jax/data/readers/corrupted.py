"""Any source of images, corrupted: corrupt:NAME:SEVERITY:SOURCE, such as corrupt:contrast:5:folder:photos."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core.messages import nearest
from tl_jax.data.examples import Source
from tl_jax.data.image import decode
from tl_jax.data.image.corruptions import CORRUPTIONS, corrupt

FORM = "corrupt:NAME:SEVERITY:SOURCE"


class CorruptedImages(NamedTuple):
    """`images[i]` is clean[i] decoded and corrupted; what chance decides depends on the corruption and the id alone."""

    clean: Any
    ids: tuple[str, ...]
    name: str
    severity: int

    def __getitem__(self, index: int) -> np.ndarray:
        key = hashlib.sha256(f"{self.name} {self.ids[index]}".encode(errors="surrogateescape")).digest()
        with decode.reading(self.clean[index]) as image:
            return corrupt(image, self.name, self.severity, np.random.default_rng(int.from_bytes(key)))

    def select(self, indices: np.ndarray) -> "CorruptedImages":
        clean = self.clean[indices] if isinstance(self.clean, np.ndarray) else self.clean.select(indices)
        return self._replace(clean=clean, ids=tuple(self.ids[i] for i in indices))

    def head(self, index: int) -> bytes:
        clean = self.clean[index].tobytes() if isinstance(self.clean, np.ndarray) else self.clean.head(index)
        return f"{self.name} {self.severity} ".encode() + clean


def load_corrupted(argument: str, read: Callable[[str], Source]) -> Source:
    """The source NAME:SEVERITY:SOURCE; read: of the clean one. ValueError where it is none, or has no images."""
    name, severity, clean = [*argument.split(":", 2), "", ""][:3]
    if name not in CORRUPTIONS or severity not in tuple("12345") or not clean:
        known = f"{nearest(name, CORRUPTIONS)}; known: {', '.join(CORRUPTIONS)}"
        found = f"corrupt:{argument} has NAME {name!r}{known}; SEVERITY {severity!r}; SOURCE {clean!r}"
        raise ValueError(f"{found}. Expected {FORM} with one of these names and a severity from 1 to 5")
    source = read(clean)
    if source.input != "image":
        found = "rows of a table" if source.input == "table" else f"inputs of kind {' and '.join(source.kinds)}"
        raise ValueError(f"corrupt:{argument}: {clean} holds {found}; only images are corrupted")
    inputs = CorruptedImages(source.inputs, source.ids, name, int(severity))
    return dataclasses.replace(source, name=f"corrupt:{name}:{severity}:{source.name}", inputs=inputs)


def clean_images(inputs: Any) -> Any:
    """The images of a source before all corruptions."""
    while isinstance(inputs, CorruptedImages):
        inputs = inputs.clean
    return inputs
