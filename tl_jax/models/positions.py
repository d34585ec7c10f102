"""Position embeddings of patches, resampled to the grid of another image size. Numpy only."""

import math

import numpy as np

Grid = tuple[int, int]  # patches along height and width
HOW = ("antialias", "plain", "shifted")


def resample(pos_embed: np.ndarray, old: Grid, new: Grid, how: str = "antialias") -> np.ndarray:
    """Resamples [1, P + h w, D] from the grid `old` to `new` by cubic interpolation; the first P positions stay.

    how: "antialias" (timm, and DINOv2 with registers), a = -0.5, with a wider kernel where the grid becomes smaller;
    "plain" (transformers), a = -0.75, without; "shifted" (DINOv2's own code), as plain, but by the factor
    (new + 0.1) / old, which moves the positions that are read. All in float32.
    """
    if how not in HOW:
        raise ValueError(f"resampling={how!r}: expected one of {', '.join(HOW)}")
    prefix, patches = np.split(pos_embed.astype(np.float32), [pos_embed.shape[1] - math.prod(old)], axis=1)
    rows, columns = (_weights(a, b, how).astype(np.float32) for a, b in zip(old, new, strict=True))
    patches = np.einsum("yi,ijd->yjd", rows, patches.reshape(*old, -1))
    patches = np.einsum("xj,yjd->yxd", columns, patches)
    return np.concatenate([prefix, patches.reshape(1, math.prod(new), -1)], axis=1)


def grid_of(count: int, likely: Grid) -> Grid | None:
    """The grid of `count` patches: `likely` where it has as many, otherwise a square one; None: there is none."""
    side = math.isqrt(max(count, 0))
    return likely if math.prod(likely) == count else (side, side) if side > 0 and side * side == count else None


def _weights(old: int, new: int, how: str) -> np.ndarray:
    """What each of `new` positions takes of each of `old` ones, [new, old]."""
    factor = (new + 0.1) / old if how == "shifted" else new / old
    centre = ((np.arange(new) + 0.5) / factor - 0.5)[:, None]
    if how == "antialias":
        weights = _cubic((centre - np.arange(old)) * min(factor, 1), -0.5)
        return weights / weights.sum(1, keepdims=True)
    taps = np.floor(centre).astype(int) + np.arange(-1, 3)  # beyond the border its last value is read again
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], taps.clip(0, old - 1)), _cubic(centre - taps, -0.75))
    return weights


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The kernel of cubic convolution (Keys 1981, equation 4, which has a = -0.5)."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
