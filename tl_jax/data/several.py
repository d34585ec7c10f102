"""Several inputs of one example: an image, texts and the numbers of a row, of which some may be missing."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tl_jax.data.text.tokens import Texts


class Several(NamedTuple):
    """The inputs of N examples by kind, "image", "text" or "table", each as a source of that kind alone has them.

    present: by kind, bool [N], whether an example has it. What stands in the place of a missing one is never read.
    columns: by kind, the columns they come from, for messages; () where there are none.
    """

    parts: Mapping[str, Sequence]
    present: Mapping[str, np.ndarray]
    columns: Mapping[str, tuple[str, ...]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {kind: part[index] if self.present[kind][index] else None for kind, part in self.parts.items()}

    def select(self, indices: np.ndarray) -> "Several":
        parts = {kind: taken(part, indices) for kind, part in self.parts.items()}
        return self._replace(parts=parts, present={kind: there[indices] for kind, there in self.present.items()})

    def head(self, index: int) -> bytes:
        """What tells an example from others: of each input whether it is there, and its head or all of it."""
        told = b""
        for kind, part in self.parts.items():
            if not self.present[kind][index]:
                told += b"\0"
                continue
            told += b"\1" + (part[index].tobytes() if isinstance(part, np.ndarray) else part.head(index))
        return told

    def missing(self, kinds: Sequence[str]) -> dict[str, int]:
        """{kind: how many examples lack it}, of these kinds."""
        return {kind: count for kind in kinds if (count := int((~self.present[kind]).sum()))}


def taken(inputs: Any, indices: np.ndarray) -> Any:
    """The inputs at `indices`: of an array, or of a container of images or texts."""
    return inputs[indices] if isinstance(inputs, np.ndarray) else inputs.select(indices)


def in_memory(inputs: Any) -> bool:
    """Whether all of the inputs are arrays or texts."""
    every = inputs.parts.values() if isinstance(inputs, Several) else (inputs,)
    return all(isinstance(each, np.ndarray | Texts) for each in every)
