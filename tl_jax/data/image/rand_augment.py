"""RandAugment's list of operations and their strengths, on Pillow images (Cubuk et al. 2020; torchvision's table)."""

import math

from PIL import Image, ImageEnhance, ImageOps

ENHANCE = {name.lower(): getattr(ImageEnhance, name) for name in ("Brightness", "Color", "Contrast", "Sharpness")}
# Output to input coordinates of a shear about the top left corner, or of a shift by whole pixels.
MATRICES = {
    "shear_x": lambda strength: (1, strength, 0, 0, 1, 0),
    "shear_y": lambda strength: (1, 0, 0, strength, 1, 0),
    "translate_x": lambda strength: (1, 0, -math.trunc(strength), 0, 1, 0),
    "translate_y": lambda strength: (1, 0, 0, 0, 1, -math.trunc(strength)),
}
PLAIN = {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize}  # without a strength
GREATEST = {"shear_x": 0.3, "shear_y": 0.3, "rotate": 30, **dict.fromkeys(ENHANCE, 0.9)}  # strength at magnitude 30
SIGNED = (*MATRICES, "rotate", *ENHANCE)
NAMES = ("identity", *SIGNED, "posterize", "solarize", *PLAIN)


def strength(name: str, magnitude: int, size: tuple[int, int]) -> float:
    """What magnitude 0 .. 30 means for an operation; `size` is (width, height) in pixels, as in Pillow."""
    share = magnitude / 30
    if name in GREATEST:
        return GREATEST[name] * share
    if name.startswith("translate"):
        return 150 / 331 * size[name.endswith("y")] * share
    if name == "posterize":
        return 8 - round(magnitude / 7.5)
    return 255 * (1 - share)  # solarize's threshold; the rest take no strength


def apply(image: Image.Image, name: str, strength: float) -> Image.Image:
    """Applies one operation; the geometric ones take the nearest pixel and fill with black, as torchvision's do."""
    if name in MATRICES:
        matrix = MATRICES[name](strength)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    if name == "rotate":
        return image.rotate(strength, Image.Resampling.NEAREST)
    if name in ENHANCE:
        return ENHANCE[name](image).enhance(1 + strength)
    if name == "posterize":
        return ImageOps.posterize(image, int(strength))
    if name == "solarize":
        return ImageOps.solarize(image, strength)
    return PLAIN[name](image) if name in PLAIN else image
