"""Decoding: the bytes of an image file, or an array, as pixels in the form that a network reads."""

import contextlib
import io
import os
import re
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from tl_jax.core.card import Form

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")  # MPO is read as JPEG; Pillow has no reader by that name
NPY = b"\x93NUMPY"  # how the files of numpy begin
MAX_PIXELS = 2**26  # 64 megapixels are 192 MiB as RGB; a larger image is refused before it is decoded
JPEG_PIXELS = 1024  # of one byte: a JPEG takes at least a bit for each 8 x 8 pixels, so twice what is possible
RGB = Form()
DEEP = re.compile(r"\b(RGB[AXa]?|LA|CMYK);16")  # modes of files that Pillow reads with the upper 8 of 16 bits
GREY = (19595, 38470, 7471)  # shares of 2**16 of red, green and blue in Pillow's greys
_budget = threading.Condition()
_free = MAX_PIXELS  # of the pixels that the threads of this process may read at one time


class WrongForm(ValueError):
    """An image that is sound and holds other values or channels than the network reads."""


class Header(NamedTuple):
    """What can be told of an image before it is decoded. pixels: a type of numpy's, or what else the values are."""

    height: int
    width: int
    pixels: str
    channels: int
    encoded: bool  # in a format of FORMATS


def open_image(data: bytes | str) -> Image.Image:
    """Reads the header of encoded bytes, or of the file at a path; ValueError says why it is no image.

    The format is told from the content, never from the file name; only `FORMATS` up to `MAX_PIXELS` are read.
    """
    if not data:
        raise ValueError("not a readable image (it is empty)")
    try:
        image = Image.open(data if isinstance(data, str) else io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # on damaged headers Pillow raises almost any type
        raise ValueError(f"not a readable image ({_reason(error)}; formats read: {', '.join(FORMATS)})") from None
    try:
        _check_pixels(image.height, image.width)
    except ValueError:
        image.close()
        raise
    size = os.path.getsize(data) if isinstance(data, str) else len(data)
    if image.format in ("JPEG", "MPO") and image.width * image.height > JPEG_PIXELS * size:
        image.close()
        raise ValueError(f"damaged JPEG ({size:,} bytes cannot hold {image.width} x {image.height} pixels)")
    return image


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"image of {width} x {height} pixels; at most {MAX_PIXELS} are read")


def header_of(data: np.ndarray | bytes | str, form: Form = RGB) -> Header:
    """The header of an image, encoded bytes or the file at a path; ValueError where it has no such `form`."""
    if isinstance(data, np.ndarray):
        found = _array_header(data.shape, data.dtype)
    else:
        try:
            with open_image(data) as image:
                found = _header(image, form)
        except ValueError:
            if (stream := _open_array(data)) is None:
                raise
            with stream:
                found = _npy_header(stream)
    check(found, form)
    return found


def _open_array(data: bytes | str) -> io.BufferedIOBase | None:
    """The stream of a .npy file; None where it is none."""
    if isinstance(data, bytes):
        return io.BytesIO(data) if data.startswith(NPY) else None
    with contextlib.suppress(OSError):
        stream = open(data, "rb")  # noqa: SIM115
        if stream.peek(len(NPY)).startswith(NPY):
            return stream
        stream.close()
    return None


def _npy_header(stream: io.BufferedIOBase) -> Header:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # on damaged headers numpy raises almost any type
        raise ValueError(f"damaged .npy ({_reason(error)})") from None
    return _array_header(shape, dtype)


def _array_header(shape: tuple[int, ...], dtype: np.dtype) -> Header:
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"an array of shape {list(shape)}; an image is [H, W] or [H, W, C]")
    _check_pixels(*shape[:2])
    pixels = "float32" if dtype.kind == "f" else dtype.name
    return Header(*shape[:2], pixels, shape[2] if len(shape) == 3 else 1, encoded=False)


def _header(image: Image.Image, form: Form) -> Header:
    raw, mode = str(image.tile[0].args) if image.tile else "", image.mode
    if mode == "I":
        pixels = "int16" if re.search(r"I;16B?S", raw) else "int32"
    elif deep := DEEP.search(raw):
        pixels = f"16-bit {deep[1]}, of which 8 bits can be read here (save it as .npy, or each channel as a TIFF page)"
    else:
        pixels = "float32" if mode == "F" else "uint16" if mode.startswith("I;16") else "uint8"
    if mode == "P":
        return Header(image.height, image.width, pixels, 4 if "transparency" in image.info else 3, encoded=True)
    pages = 1 if is_photo(form) or len(image.getbands()) > 1 else _pages(image)
    return Header(image.height, image.width, pixels, len(image.getbands()) * pages, encoded=True)


def _pages(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception as error:  # see open_image
        raise ValueError(f"damaged {image.format} ({_reason(error)})") from None


def is_photo(form: Form) -> bool:
    """Whether files of every mode are read, as grey or RGB of 8 bits."""
    return form.pixels == "uint8" and form.channels in (1, 3)


def check(found: Header, form: Form) -> None:
    """Raises WrongForm where an image does not have the form."""
    if found.pixels != form.pixels:
        raise WrongForm(f"an image whose pixels are {found.pixels}, expected {form.pixels}")
    fits = (1, 3) if is_photo(form) else (form.channels, 1 if form.channels == 3 else form.channels)
    if found.channels not in fits and not (found.encoded and is_photo(form)):
        raise WrongForm(f"an image of {found.channels} channels, expected {form.channels}")


def decode(data: bytes, form: Form = RGB) -> np.ndarray:
    """The pixels [H, W, C] of an encoded image, of the type `form.dtype`; see `decode_image`."""
    return np.asarray(decode_image(data, form))


def decode_image(data: bytes, form: Form = RGB) -> Image.Image | np.ndarray:
    """Decodes an encoded image: a Pillow image in mode RGB, in other forms [H, W, C]; ValueError says what is wrong.

    EXIF orientation is applied. As 8-bit grey or RGB every mode of 8 bits is read: transparent pixels are laid on
    white, CMYK, grey and palette images converted; of several frames the first is taken. In any other form the values
    are those of the file, and the pages of a TIFF of one channel each are the channels.
    """
    if data.startswith(NPY):
        return _load_array(data, form)
    return _load(open_image(data), form)


def _load(image: Image.Image, form: Form) -> Image.Image | np.ndarray:
    try:
        found = _header(image, form)
        if is_photo(form) and found.pixels == "uint8":
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            image = _to_rgb(image)
            return image if form.channels == 3 else np.asarray(image.convert("L"))[..., None]
        pixels = _bands(image) if found.pixels == form.pixels else None
    except Exception as error:  # see open_image
        raise ValueError(f"damaged {image.format or 'image'} ({_reason(error)})") from None
    check(found, form)
    return as_form(pixels, form)


def _bands(image: Image.Image) -> np.ndarray:
    """The values of a file [H, W, C] as they are; C pages of one band are C channels."""
    pages = []
    for page in range(_pages(image) if len(image.getbands()) == 1 else 1):
        image.seek(page)
        each, colours = ImageOps.exif_transpose(image), "RGBA" if "transparency" in image.info else "RGB"
        pages.append(np.asarray(each.convert("L" if each.mode == "1" else colours) if each.mode in "1P" else each))
    return np.stack(pages, axis=-1) if pages[0].ndim == 2 else pages[0]


def _load_array(data: bytes, form: Form) -> np.ndarray:
    header_of(data, form)
    try:
        image = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # as of headers
        raise ValueError(f"damaged .npy ({_reason(error)})") from None
    return as_form(image, form)


def as_form(image: np.ndarray, form: Form) -> np.ndarray:
    """An image [H, W] or [H, W, C] as [H, W, form.channels] of the type `form.dtype`; ValueError where it is another.

    Grey is repeated for RGB, and 8-bit RGB becomes grey as in Pillow. Floats must be finite.
    """
    check(_array_header(image.shape, image.dtype), form)
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError(f"{image.size - int(np.isfinite(image).sum()):,} of its pixel values are not finite")
    return in_channels(image if image.ndim == 3 else image[..., None], form.channels).astype(form.dtype, copy=False)


def in_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Images [..., C] with as many `channels`, where C is that or they are grey and RGB."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    return ((images.astype(np.uint32) * np.uint32(GREY)).sum(-1, keepdims=True) + 2**15 >> 16).astype(np.uint8)


def _reason(error: Exception) -> str:
    """The error's text without the repr of a memory stream, which names an address and no file."""
    return str(error).split(" <_io.")[0].strip() or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def reading(image: np.ndarray | bytes, form: Form = RGB) -> Iterator[np.ndarray | Image.Image]:
    """`as_form` of an array, `decode_image` of bytes, kept within the block; raises as these do.

    By their headers, the images that the threads of a process read at one time have at most `MAX_PIXELS`; others wait.
    """
    global _free
    if not isinstance(image, bytes):
        yield as_form(image, form)
        return
    array = image.startswith(NPY)
    header = header_of(image, form) if array else open_image(image)
    pixels = header.height * header.width
    with _budget:
        _budget.wait_for(lambda: _free >= pixels)
        _free -= pixels
    try:
        yield _load_array(image, form) if array else _load(header, form)
    finally:
        with _budget:
            _free += pixels
            _budget.notify_all()


def shape_of(image: np.ndarray | Image.Image) -> tuple[int, int]:
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def thumbnail(image: np.ndarray | bytes, form: Form = RGB, side: int = 200) -> Image.Image:
    """`picture` of an array or of encoded bytes, at most `side` pixels high and wide; raises as `reading` does."""
    with reading(image, form) as found:
        small = picture(found)
    small.thumbnail((side, side))
    return small


def picture(image: np.ndarray | Image.Image) -> Image.Image:
    """An image to look at, in mode RGB: of three channels of 8 bits itself.

    Of others the mean of the channels in greys from the lowest value of the image, black, to the highest, white.
    """
    pixels = np.asarray(image)
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        return Image.fromarray(in_channels(pixels, 3))
    grey = pixels.mean(axis=2, dtype=np.float64)
    grey -= grey.min()
    return Image.fromarray(np.rint(grey * (255 / (grey.max() or 1))).astype(np.uint8)).convert("RGB")
