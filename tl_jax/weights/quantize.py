"""Weights in fewer bytes: bfloat16, or int8 with one scale for each output channel. They are read back as float32."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

PRECISIONS = ("float32", "bfloat16", "int8")
SCALE = ":scale"  # behind the path of an int8 leaf: the path of its scales [C]


def pack(leaves: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """The leaves {path: float32 array} as they are stored in one of PRECISIONS.

    int8: every kernel [..., C] as round(w / s), with s = max|w| / 127 of each of its C output channels (Krishnamoorthi
    2018, arXiv:1806.08342, section 2.2: symmetric, per channel); all else as bfloat16.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: expected {', '.join(PRECISIONS)}")
    packed = {}
    for path, leaf in leaves.items():
        leaf = np.asarray(leaf, np.float32)
        if precision == "int8" and leaf.ndim >= 2 and path.endswith("/kernel"):
            scale = np.abs(leaf).max(axis=tuple(range(leaf.ndim - 1))) / 127
            scale = np.where(scale > 0, scale, 1).astype(np.float32)
            packed |= {path: np.rint(leaf / scale).astype(np.int8), path + SCALE: scale}
        else:
            packed[path] = leaf if precision == "float32" else leaf.astype(ml_dtypes.bfloat16)
    return packed


def unpack(packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The float32 leaves of what `pack` made."""
    leaves = {path: x.astype(np.float32) for path, x in packed.items() if not path.endswith(SCALE)}
    return {path: x * packed[path + SCALE] if path + SCALE in packed else x for path, x in leaves.items()}
