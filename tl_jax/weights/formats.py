"""Weight files without their frameworks: .safetensors, .npz, torch.save, Keras' .h5 <-> flat dicts of numpy arrays."""

import functools
import hashlib
import json
import pathlib
import zipfile
import zlib

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from tl_jax.core import files, manifest, npz
from tl_jax.weights import keras_files, torch_files

TORCH, KERAS = (".pth", ".pt", ".th", ".bin"), (".h5", ".hdf5")
SUFFIXES = {
    ".safetensors": ("safetensors",),
    ".npz": ("npz",),
    **dict.fromkeys(TORCH, ("torch zip", "torch legacy")),
    **dict.fromkeys(KERAS, ("hdf5",)),
}
PREFIXES = ("module.", "_orig_mod.", "model.")  # of data parallel and of compiled modules, and of Lightning's
SEAL, UNSEALED = "tl_jax.sha256", "0" * 64
_SAFETENSORS_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
_DAMAGE = (safetensors.SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, MemoryError, OSError)


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a weight file into `(tensors, metadata)`, trusting nothing in it.

    The contents decide the format; a known suffix that contradicts them is an error. Tensors are native, contiguous and
    writable; bfloat16 becomes float32, every other type is kept. A torch state dict may be bare or lie under a key of
    `torch_files.WRAPPERS`; a prefix of PREFIXES that all names have is dropped. Names of Keras' arrays are
    `layer/name`, see keras_files. Only files written here have metadata, and other safetensors. Raises
    FileNotFoundError, IsADirectoryError, or ValueError for a damaged, foreign or unsafe file.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        raise IsADirectoryError(f"{path} is a folder, expected a weight file; weight files in it: {found or 'none'}")
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    manifest.check_weights(path)
    try:
        tensors, metadata = _READERS[_sniff(path)](path)
        if not tensors:
            raise ValueError("holds no tensors")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except PermissionError:
        raise
    except _DAMAGE as error:  # OSError: a seek to where a damaged archive points
        raise ValueError(f"{path}: damaged or cut short ({error}); download or copy the file again") from None
    for prefix in PREFIXES * 2:  # one may be inside of another
        names = [name for name in tensors if name != "n_averaged"]  # the count of torch's AveragedModel
        if names and all(name.startswith(prefix) for name in names):
            tensors = {name.removeprefix(prefix): tensors[name] for name in names}
    return tensors, metadata


def read_metadata(path) -> dict[str, str]:
    """The metadata of a safetensors file, without a look at its tensors; {} of other files, and of damaged ones."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError):
        return {}


sha256 = files.sha256


def write_safetensors(path, tensors: dict, metadata: dict[str, str]) -> None:
    """Writes arrays (any strides, numpy or jax) and string metadata; equal content gives equal bytes.

    The metadata gets the sha256 of the file with zeros in its place, which `read` checks.
    """
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    if wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        raise ValueError(f"safetensors metadata holds strings only; encode these first, e.g. with json.dumps: {wrong}")
    data = safetensors.numpy.save(arrays, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    # The library writes metadata in random order; sorted, the same weights have the same sha256.
    header["__metadata__"] = dict(sorted({**metadata, SEAL: UNSEALED}.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head, rest = len(text).to_bytes(8, "little") + text, memoryview(data)[end:]
    digest = hashlib.sha256(head)
    digest.update(rest)
    with files.atomic_write(path) as file:
        file.write(head.replace(UNSEALED.encode(), digest.hexdigest().encode(), 1))
        file.write(rest)


def write(path, tensors: dict, metadata: dict[str, str]) -> None:
    """Writes Keras' form where the name of the file ends in .h5 or .hdf5, otherwise safetensors."""
    if pathlib.Path(path).suffix.lower() not in KERAS:
        return write_safetensors(path, tensors, metadata)
    with files.atomic_write(path) as file:
        keras_files.write(file, tensors, metadata)


def _check_seal(path, seal: str) -> None:
    """Raises ValueError where a file is not the one that `write_safetensors` wrote."""
    with open(path, "rb") as file:
        size = file.read(8)
        head = size + file.read(int.from_bytes(size, "little"))
        digest = hashlib.sha256(head.replace(seal.encode(), UNSEALED.encode(), 1))
        while block := file.read(2**24):
            digest.update(block)
    if digest.hexdigest() != seal:
        found = f"its content has the sha256 {digest.hexdigest()[:12]}, expected {seal[:12]} by its metadata"
        raise ValueError(f"{found}: it was changed or damaged; copy the file again")


def _sniff(path) -> str:
    """The format by first bytes, checked against the suffix."""
    with open(path, "rb") as file:
        head = file.read(256)
    if not head:
        raise ValueError("the file is empty (0 bytes); download or copy it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("a git-LFS pointer, not the weights; fetch the real file with `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError("a web page, not weights; the download was answered by a login or error page")
    name_end = 30 + int.from_bytes(head[26:28], "little")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        kind = "safetensors"
    elif head.startswith(b"PK\x03\x04"):  # the name of the first member stands in its local header
        kind = "npz" if head[30:name_end].endswith(b".npy") else "torch zip"
    elif head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        kind = "torch legacy"
    elif head.startswith(b"\x89HDF\r\n\x1a\n"):
        kind = "hdf5"
    else:
        kind = f"no known format (first bytes {head[:8]!r})"
    expected = SUFFIXES.get(path.suffix.lower(), tuple(_READERS))
    if kind not in expected:
        fix = "rename it to match" if kind in _READERS else "it is damaged, cut short, or made by another framework"
        raise ValueError(f"contents are {kind}, expected {' or '.join(expected)}; {fix}")
    return kind


def _read_safetensors(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
        if wrong := {name: dtype for name, dtype in dtypes.items() if dtype not in _SAFETENSORS_DTYPES}:
            raise ValueError(f"element types without a numpy counterpart: {wrong}; convert them to float32 first")
        metadata = file.metadata() or {}
        if seal := metadata.pop(SEAL, ""):
            _check_seal(path, seal)
        return {name: _native(file.get_tensor(name)) for name in dtypes}, metadata


def _read_npz(path):
    # DEFLATE reaches 1000:1; real weights stay under 10:1.
    tensors = npz.read(path, npz.NUMBERS, most=64 * 2**20 + 100 * path.stat().st_size)
    return {name: _native(array) for name, array in tensors.items()}, {}


def _native(array):
    """A contiguous, writable copy in the machine's byte order; bfloat16 widens to float32, which holds it exactly."""
    dtype = np.float32 if array.dtype == ml_dtypes.bfloat16 else array.dtype.newbyteorder("=")
    return array.astype(dtype, order="C", copy=True)


def _read_hdf5(path):
    try:
        tensors, metadata = keras_files.read(path)
    except (KeyError, TypeError, UnicodeError) as error:  # h5py's for what is there and cannot be read
        raise OSError(f"{type(error).__name__} {str(error)[:200]}") from None
    return {name: _native(array) for name, array in tensors.items()}, metadata


def _read_torch(read, path):
    return {name: _native(tensor) for name, tensor in read(path).items()}, {}


_READERS = {
    "safetensors": _read_safetensors,
    "npz": _read_npz,
    "hdf5": _read_hdf5,
    "torch zip": functools.partial(_read_torch, torch_files.read_zip),
    "torch legacy": functools.partial(_read_torch, torch_files.read_legacy),
}
