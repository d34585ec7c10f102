"""RandAugment's list of operations and their strengths, on Pillow images (Cubuk et al. 2020; torchvision's table)."""

import math

from PIL import Image, ImageEnhance, ImageOps

NAMES = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
ENHANCE = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate", *ENHANCE)


def strength(name: str, magnitude: int, size: tuple[int, int]) -> float:
    """What magnitude 0 .. 30 means for an operation; `size` is (width, height) in pixels, as in Pillow."""
    share = magnitude / 30
    if name.startswith("shear"):
        return 0.3 * share
    if name.startswith("translate"):
        return 150 / 331 * size[name.endswith("y")] * share
    if name == "rotate":
        return 30 * share
    if name in ENHANCE:
        return 0.9 * share
    if name == "posterize":
        return 8 - round(magnitude / 7.5)
    return 255 * (1 - share)  # solarize's threshold; the rest take no strength


def apply(image: Image.Image, name: str, strength: float) -> Image.Image:
    """Applies one operation; the geometric ones take the nearest pixel and fill with black, as torchvision's do."""
    if name in ENHANCE:
        return ENHANCE[name](image).enhance(1 + strength)
    if name == "posterize":
        return ImageOps.posterize(image, int(strength))
    if name == "solarize":
        return ImageOps.solarize(image, strength)
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    if name == "equalize":
        return ImageOps.equalize(image)
    if name == "identity":
        return image
    if name == "rotate":
        return image.rotate(strength, Image.Resampling.NEAREST)
    return image.transform(image.size, Image.Transform.AFFINE, _matrix(name, strength), Image.Resampling.NEAREST)


def _matrix(name: str, strength: float) -> tuple[float, ...]:
    """Output to input coordinates of a shear about the top left corner, or of a shift by whole pixels."""
    if name == "shear_x":
        return (1, strength, 0, 0, 1, 0)
    if name == "shear_y":
        return (1, 0, 0, strength, 1, 0)
    shift = -math.trunc(strength)
    return (1, 0, shift, 0, 1, 0) if name == "translate_x" else (1, 0, 0, 0, 1, shift)
