"""Weight files: bit-equal tensors from .safetensors and .npz, one clear message for every bad file."""

import io
import os
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tl_jax.core import files
from tl_jax.weights import formats


class Canary:
    """Touches a file when it is unpickled by something that executes pickles."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_module_prefix_stays_unless_all_names_have_it(tmp_path):
    formats.write_safetensors(tmp_path / "w.safetensors", {"module.a": np.ones(1), "b": np.ones(1)}, {})
    assert set(formats.read(tmp_path / "w.safetensors")[0]) == {"module.a", "b"}


@pytest.mark.parametrize("prefix", ["module.", "model.", "model.module.", "module._orig_mod.model."])
def test_prefixes_that_programs_put_before_all_names_are_dropped(tmp_path, prefix):
    tensors = {f"{prefix}a": np.ones(1), f"{prefix}b": np.ones(1), "n_averaged": np.array(3)}
    formats.write_safetensors(tmp_path / "w.safetensors", tensors, {})
    assert set(formats.read(tmp_path / "w.safetensors")[0]) == {"a", "b"}


def test_safetensors_round_trip_keeps_bits_strides_and_metadata(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "t": rng.normal(size=(3, 4)).astype("f4").T,
        "step": np.int64(3),
        "half": np.ones(3, "f2"),
        "flags": np.array([True]),
        "big": np.arange(3, dtype=">f4"),
        "empty": np.zeros((0, 2), "f4"),
        "bf": rng.normal(size=5).astype(ml_dtypes.bfloat16),
    }
    path = tmp_path / "w.safetensors"
    formats.write_safetensors(path, tensors, {"card": "{}"})
    loaded, metadata = formats.read(path)
    assert metadata == {"card": "{}"} and set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert loaded[name].shape == np.shape(value) and np.array_equal(loaded[name], value), name
    assert loaded["bf"].dtype == np.float32 and loaded["half"].dtype == np.float16
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_same_tensors_and_metadata_write_the_same_bytes(tmp_path):
    tensors = {name: np.full(3, i, "f4") for i, name in enumerate("edcba")}
    metadata = {f"naïve key {i}": str(i) for i in range(20)}
    for name in ("a", "b"):
        formats.write_safetensors(tmp_path / f"{name}.safetensors", tensors, metadata)
        tensors, metadata = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    assert formats.sha256(tmp_path / "a.safetensors") == formats.sha256(tmp_path / "b.safetensors")
    loaded, read_back = formats.read(tmp_path / "a.safetensors")
    assert read_back == metadata and all(np.array_equal(loaded[name], tensors[name]) for name in tensors)


def test_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), files.atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_reads_bit_equal(tmp_path, save):
    rng = np.random.default_rng(0)
    arrays = {
        "Transformer/encoder_norm/scale": rng.normal(size=(3, 4)).astype("f4"),
        "fortran": np.asfortranarray(rng.normal(size=(3, 4))),
        "scalar": np.array(2),
        "empty": np.zeros((0, 3), "f4"),
        "big_endian": np.arange(3, dtype=">i4"),
        "bf16": rng.normal(size=5).astype(ml_dtypes.bfloat16),
    }
    save(tmp_path / "w.npz", **arrays)
    loaded, metadata = formats.read(tmp_path / "w.npz")
    assert metadata == {} and list(loaded) == list(arrays)
    for name, value in arrays.items():
        assert loaded[name].shape == value.shape and np.array_equal(loaded[name], value), name
        assert loaded[name].flags.c_contiguous and loaded[name].dtype.isnative


def test_sha256_is_the_published_digest_of_abc(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert formats.sha256(tmp_path / "abc") == expected


def test_npz_bomb_is_refused_before_unpacking(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", a=np.zeros(40 * 2**20, "u1"), b=np.zeros(40 * 2**20, "u1"))
    with pytest.raises(ValueError, match="zip bomb"):
        formats.read(tmp_path / "w.npz")


def test_npz_header_that_declares_more_than_it_holds_is_refused(tmp_path):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    for header in (file.getvalue(), file.getvalue()[:30], b"\x93NUMPY\x09\x00", b""):
        with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
            archive.writestr("a.npy", header)
        with pytest.raises(ValueError, match=r"'a.npy'|no known format"):
            formats.read(tmp_path / "w.npz")


def test_npz_of_objects_is_refused_and_executes_nothing(tmp_path):
    canary = tmp_path / "canary"
    np.savez(tmp_path / "w.npz", allow_pickle=True, a=np.array([Canary(canary)], dtype=object))
    with pytest.raises(ValueError, match="element type object"):
        formats.read(tmp_path / "w.npz")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("w.safetensors", b"", "empty"),
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("w.safetensors", b"<!DOCTYPE html><html>", "web page"),
        ("w.bin", b"garbage in here", "no known format"),
        ("w.h5", b"\x89HDX\r\n\x1a\n", "no known format"),
    ],
)
def test_what_is_no_weight_file_is_called_what_it_is(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        formats.read(tmp_path / name)


def test_suffix_that_contradicts_the_contents_is_an_error_and_an_unknown_one_is_not(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.arange(10, dtype="f4"), b=np.ones(3, "f4"))
    shutil.copy(tmp_path / "w.npz", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"contents are npz, expected safetensors; rename"):
        formats.read(tmp_path / "x.safetensors")
    (tmp_path / "w.npz").rename(tmp_path / "blob")
    assert set(formats.read(tmp_path / "blob")[0]) == {"a", "b"}


def test_folders_and_missing_files_are_named(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.arange(10, dtype="f4"), b=np.ones(3, "f4"))
    with pytest.raises(IsADirectoryError, match=r"w\.npz"):
        formats.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        formats.read(tmp_path / "nothing.pth")


def test_metadata_must_be_text(tmp_path):
    with pytest.raises(ValueError, match="num_classes"):
        formats.write_safetensors(tmp_path / "w.safetensors", {"a": np.ones(1)}, {"num_classes": 3})
