"""Letters rendered from matplotlib's fonts in the manner of scikit-learn's digits: a source without any digit."""

import functools
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tl_jax.data.examples import Source, check_split
from tl_jax.data.readers.arrays import array_source

SPLITS = {"train": (20_000, 1), "val": (2_000, 2)}  # (examples, seed)
MERGED = "CIJKLMOPSUVWXYZ"  # letters whose two cases differ in size only (the merge of EMNIST, Cohen et al. 2017)
CLASSES = (
    *(letter + letter.lower() if letter in MERGED else letter for letter in ascii_uppercase),
    *(letter for letter in ascii_lowercase if letter.upper() not in MERGED),
)
FONTS = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    "cm": ("r10", "b10", "ss10", "ti10", "tt10"),
}
MASTER = 48  # pixels of the square on which each letter of each font is drawn once
BITMAP = 32  # pixels of the bitmap whose 4 x 4 blocks are counted
BATCH = 500  # letters warped at once, so that the work stays in the cache


def load_glyphs(split: str) -> Source:
    """37 classes of letters as uint8 RGB [N, 8, 8, 3]: 20,000 in train, 2,000 in val; rendered in a few seconds.

    As the makers of the digits did: a 32 x 32 bitmap filled by the letter, ink counted in 4 x 4 blocks, 0 .. 16 scaled
    to 0 .. 255. Font, slant, rotation, width, weight and a smooth wobble are random. The splits share the fonts.
    """
    check_split("glyphs", split, SPLITS)
    return array_source("glyphs", split, *_render(split), CLASSES)


@functools.cache
def _render(split: str) -> tuple[np.ndarray, np.ndarray]:
    (masters, owners), (size, seed) = _masters(), SPLITS[split]
    rng = np.random.default_rng([seed, 0x676C])
    labels = rng.permutation(np.arange(size) % len(CLASSES)).astype(np.int32)
    members = [np.flatnonzero(owners == c) for c in range(len(CLASSES))]
    draws = rng.random(len(labels))
    chosen = np.array([members[c][int(draw * len(members[c]))] for c, draw in zip(labels, draws, strict=True)])
    batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    ink = np.concatenate([_count_blocks(_warp(masters[batch], rng)) for batch in batches])
    return np.repeat(np.rint(ink * (255 / 16)).astype(np.uint8)[..., None], 3, axis=3), labels


@functools.cache
def _masters() -> tuple[np.ndarray, np.ndarray]:
    """Every letter in every font, its longer side 32 pixels, centred on [M, 48, 48] in 0 .. 1; and its class [M]."""
    import matplotlib  # here, for its data folder only

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masters, owners = [], []
    for name in (family + style for family, styles in FONTS.items() for style in styles):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 80)
        for owner, letters in enumerate(CLASSES):
            for letter in letters:
                canvas = Image.new("L", (160, 160))
                ImageDraw.Draw(canvas).text((40, 20), letter, 255, font)
                box = canvas.crop(canvas.getbbox())
                scale = 32 / max(box.size)
                box = box.resize([max(1, round(side * scale)) for side in box.size], Image.Resampling.BILINEAR)
                master = Image.new("L", (MASTER, MASTER))
                master.paste(box, ((MASTER - box.width) // 2, (MASTER - box.height) // 2))
                masters.append(np.asarray(master, np.float32) / 255)
                owners.append(owner)
    return np.stack(masters), np.array(owners)


def _warp(masters: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distorts masters [B, 48, 48] by a random affine map, a smooth wobble and a random weight: bool, same shape."""
    count = len(masters)
    masters = _weight(masters, rng)
    angle, slant = rng.normal(0, 0.12, (2, count, 1, 1)).astype(np.float32)
    width = np.exp(rng.normal(0, 0.15, (count, 1, 1))).astype(np.float32)
    y, x = (np.mgrid[:MASTER, :MASTER] - (MASTER - 1) / 2).astype(np.float32)
    u = (np.cos(angle) * x + (np.sin(angle) + slant) * y) * width
    v = -np.sin(angle) * x + np.cos(angle) * y
    for k in (1, 2):  # one and two waves across the letter, each way
        amplitude = rng.normal(0, 1.6 / k, (2, count, 1, 1)).astype(np.float32)
        phase = rng.uniform(0, 2 * np.pi, (2, count, 1, 1)).astype(np.float32)
        wave = 2 * np.pi * k / 38
        # The waves depend on one coordinate each, so they are evaluated along a line.
        u = u + amplitude[0] * np.sin(wave * y[:, :1] + phase[0])
        v = v + amplitude[1] * np.sin(wave * x[:1] + phase[1])
    centre = (MASTER - 1) / 2
    return _sample(masters, v + centre, u + centre) > 0.5


def _weight(masters: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Thickens a random part of each letter's stroke by 0, 1 or 2 pixels: the maximum over shifts."""
    radius = rng.integers(0, 3, len(masters))
    for step in (1, 2):
        shifts = [np.roll(masters, shift, axis) for axis in (1, 2) for shift in (-1, 1)]
        grown = functools.reduce(np.maximum, shifts, masters)
        masters = np.where((radius >= step)[:, None, None], grown, masters)
    return masters


def _sample(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear values of images [B, S, S] at coordinates [B, S, S]; outside is as the edge, which is blank."""
    last = images.shape[1] - 1
    y, x = np.clip(y, 0, last - 1e-3), np.clip(x, 0, last - 1e-3)
    top, left = y.astype(np.int32), x.astype(np.int32)
    fy, fx = y - top, x - left
    flat = images.reshape(-1)
    corner = np.arange(len(images), dtype=np.int32)[:, None, None] * images[0].size + top * (last + 1) + left
    upper = flat[corner] * (1 - fx) + flat[corner + 1] * fx
    lower = flat[corner + last + 1] * (1 - fx) + flat[corner + last + 2] * fx
    return upper * (1 - fy) + lower * fy


def _count_blocks(bitmaps: np.ndarray) -> np.ndarray:
    """Fits each letter to the height of a 32 x 32 bitmap, as the digits are, and counts its ink: [B, 8, 8], 0 .. 16."""
    counts = np.empty((len(bitmaps), BITMAP // 4, BITMAP // 4), np.int32)
    for i, bitmap in enumerate(bitmaps):
        box = Image.fromarray(bitmap.astype(np.uint8) * 255)
        box = box.crop(box.getbbox())
        # The widest digits take three quarters of the bitmap; narrow letters keep their proportions.
        width = min(round(BITMAP * box.width / box.height), BITMAP * 3 // 4)
        canvas = np.zeros((BITMAP, BITMAP), bool)
        left = (BITMAP - width) // 2
        canvas[:, left : left + width] = np.asarray(box.resize((width, BITMAP), Image.Resampling.BOX)) > 127
        counts[i] = canvas.reshape(8, 4, 8, 4).sum((1, 3))
    return counts
