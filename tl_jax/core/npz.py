"""Archives of arrays, .npz, read without trusting them: a shape has to account for every byte before it is built."""

import contextlib
import io
import math
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

NUMBERS, TEXTS = "fiub", "U"  # kinds of element types
LAST = 0x10FFFF  # of Unicode


def read(file: Any, kinds: str = NUMBERS + TEXTS, most: int = 0) -> dict[str, np.ndarray]:
    """{name: array} of a path or a binary file; ValueError says why it is none, or what is damaged.

    kinds: of numpy's element types that are read; bfloat16 is. most: bytes that it may unpack to, 0 for any number.
    Arrays are read-only views. OSError: the file cannot be opened.
    """
    try:
        with contextlib.nullcontext(file) if hasattr(file, "read") else open(file, "rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                raise ValueError("it is no .npz archive")
            archive = zipfile.ZipFile(stream)
            members = archive.infolist()
            stream.seek(-12 - len(archive.comment), 2)  # the count of members, which zipfile ignores
            if len(members) != int.from_bytes(stream.read(2), "little"):
                raise ValueError("its directory is damaged, members are missing")
            # The declared sizes are what zipfile will ever produce.
            if most and (declared := sum(member.file_size for member in members)) > most:
                raise ValueError(f"unpacks to {declared:,} bytes: refused as a zip bomb")
            if foreign := [member.filename for member in members if not member.filename.endswith(".npy")]:
                raise ValueError(f"holds members that are no arrays: {foreign}")
            return {m.filename.removesuffix(".npy"): _array(m.filename, archive.read(m), kinds) for m in members}
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError):
        raise
    except Exception as error:  # on damaged archives zipfile raises almost any type
        raise ValueError(f"damaged or cut short ({type(error).__name__}: {error})") from None


def _array(name: str, data: bytes, kinds: str) -> np.ndarray:
    try:
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        headers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = headers[version[0]](file)
    except Exception as error:  # numpy evaluates the header as Python
        raise ValueError(f"array {name!r} has a damaged header ({error})") from None
    if dtype == np.dtype("V2"):  # how numpy stores bfloat16
        dtype = np.dtype(ml_dtypes.bfloat16)
    elif dtype.hasobject:
        raise ValueError(f"array {name!r} has element type object: it holds Python objects")
    elif dtype.kind not in kinds:
        raise ValueError(f"array {name!r} has element type {dtype}, expected numbers{' or text' * (TEXTS in kinds)}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"array {name!r} declares {shape}")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"array {name!r} declares {shape} {dtype} but holds {len(data) - file.tell():,} bytes")
    if 0 in shape or not dtype.itemsize:
        return np.zeros(shape, dtype)
    array = np.frombuffer(data, dtype, offset=file.tell())
    if dtype.kind == TEXTS and (array.view(dtype.byteorder + "u4") > LAST).any():
        raise ValueError(f"array {name!r} holds characters that there are not")
    return array.reshape(shape, order="F" if fortran else "C")
