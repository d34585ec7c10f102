"""torch.save files read without torch: bit-equal tensors, every hostile file refused, nothing executed or allocated."""

import argparse
import collections
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from tl_jax.weights import formats


class Persistent(tuple):
    """A tuple that `dumps` writes as a storage reference, as torch does."""


class Name:
    """Pickles as the bare global `module.name`, whether it can be imported or not."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a global."""

    def __init__(self, module, name, *args):
        self.function, self.args = Name(module, name), args


class Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return tuple(value) if isinstance(value, Persistent) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Name):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.args)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def dumps(value):
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def tensor(key="0", size=6, offset=0, shape=(2, 3), stride=(3, 1), legacy=False):
    identity = Persistent(("storage", Name("torch", "FloatStorage"), key, "cpu", size, *([None] if legacy else [])))
    return Call("torch._utils", "_rebuild_tensor_v2", identity, offset, shape, stride, False, {})


def write_zip(path, data_pkl, storages, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        for key, value in storages.items():
            archive.writestr(f"archive/data/{key}", np.asarray(value, "<f4").tobytes())


def write_legacy(path, data_pkl, storages):
    head = [dumps(0x1950A86A20F9469CFC6C), dumps(1001), dumps({"little_endian": True}), data_pkl, dumps(list(storages))]
    body = [struct.pack("<q", len(v)) + np.asarray(v, "<f4").tobytes() for v in storages.values()]
    path.write_bytes(b"".join(head + body))


WRITERS = {"zip": write_zip, "legacy": write_legacy}


def awkward(torch):
    """Every element type and every memory layout a state dict may hold."""
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    state = {
        "plain": base,
        "transposed": base.permute(2, 0, 1),
        "sliced": base[1:, ::2, 1:4],
        "shared": base[0],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "bool": torch.tensor([True, False]),
    }
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, *integers):
        state[str(dtype)] = (torch.randn(5) * 50).abs().to(dtype)
    return collections.OrderedDict(state)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_ema"])
def test_every_torch_file_reads_bit_equal_without_torch(tmp_path, zipped, protocol, wrap):
    torch = pytest.importorskip("torch")
    state = awkward(torch)
    path = tmp_path / "weights.pth"
    whole = (
        {wrap: state, "epoch": 3, "best": 0.5, "optimizer": {"lr": [0.1], "m": {0: torch.ones(2)}}} if wrap else state
    )
    torch.save(whole, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    tensors, metadata = formats.read(path)
    assert list(tensors) == list(state) and metadata == {}
    for name, value in state.items():
        expected = (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
        assert tensors[name].dtype == expected.dtype and tensors[name].shape == expected.shape, name
        assert tensors[name].tobytes() == expected.tobytes(), name
        assert tensors[name].flags.c_contiguous and tensors[name].flags.writeable and tensors[name].dtype.isnative


def test_a_modules_own_state_dict_with_its_metadata_reads(tmp_path):
    torch = pytest.importorskip("torch")
    module = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    tensors, _ = formats.read(tmp_path / "weights.pt")
    expected = module.module.state_dict()
    assert list(tensors) == list(expected)  # the "module." prefix of DataParallel is gone
    assert all(np.array_equal(tensors[name], expected[name].numpy()) for name in expected)


def test_safetensors_of_torch_read_bit_equal(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = {name: value.detach().clone().contiguous() for name, value in awkward(torch).items()}
    save_file(state, tmp_path / "w.safetensors")
    loaded, _ = formats.read(tmp_path / "w.safetensors")
    for name, value in state.items():
        expected = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        assert loaded[name].dtype == expected.dtype and loaded[name].tobytes() == expected.tobytes(), name


def test_files_of_the_first_torch_versions_and_of_python_2_read(tmp_path):
    """Then rebuild functions took four arguments, and ordered dicts their pairs."""
    first = tensor(legacy=True)
    first.function.name, first.args = "_rebuild_tensor", first.args[:4]
    state = Call("collections", "OrderedDict", [["w", first], ["v", first]])
    write_legacy(tmp_path / "w.pth", dumps({"state_dict": state}), {"0": range(6)})
    tensors, _ = formats.read(tmp_path / "w.pth")
    assert list(tensors) == ["w", "v"] and np.array_equal(tensors["w"], np.arange(6).reshape(2, 3))


@pytest.mark.slow
def test_deep_nests_among_the_storage_names_are_refused(tmp_path):
    """Hashing a deep tuple recurses in C until the stack is gone."""
    parts = [
        dumps(0x1950A86A20F9469CFC6C),
        dumps(1001),
        dumps({"little_endian": True}),
        dumps({"w": tensor(legacy=True)}),
    ]
    deep = b"\x80\x02])" + b"\x85" * 1_000_000 + b"a."
    (tmp_path / "w.pth").write_bytes(b"".join([*parts, deep]))
    with pytest.raises(ValueError, match="list of storages"):
        formats.read(tmp_path / "w.pth")


def test_genuine_legacy_file_equals_its_safetensors_twin(shared):
    folder = shared / "weights" / "cifar10_resnet"
    legacy, _ = formats.read(folder / "resnet20-12fca82f.th")
    twin, _ = formats.read(folder / "resnet20-12fca82f.safetensors")
    assert set(legacy) == set(twin) and all(legacy[name].tobytes() == twin[name].tobytes() for name in twin)
    assert formats.sha256(folder / "resnet20-12fca82f.th").startswith("12fca82f")


class Reduce:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def dotted(module, name):
    """A protocol-4 global with a dotted name, which the standard unpickler follows into attributes."""
    module, name = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + module + name + b"\x93."


def hostile(canary):
    """Pickles that would create the canary file if any part of them ran."""
    code = f"open({str(canary)!r}, 'w').close()"
    opened = f"c__builtin__\nopen\n(V{canary}\nVw\ntR."
    return {
        "posix.system": pickle.dumps(os_system(canary), 2),
        "builtins.eval": pickle.dumps({"w": Reduce(eval, code)}, 4),
        "__builtin__.exec": pickle.dumps({"state_dict": {"a": [1, (Reduce(exec, code),)]}}, 2),
        "__builtin__.open": b"\x80\x02" + opened.encode(),
        "os.system": b"\x80\x02(S'touch " + str(canary).encode() + b"'\nios\nsystem\n.",
        "torch.serialization.load": dumps(Call("torch.serialization", "load", str(canary))),
        "torch._utils._rebuild_tensor_v2.__globals__": dotted("torch._utils", "_rebuild_tensor_v2.__globals__"),
        "collections.OrderedDict.fromkeys": dotted("collections", "OrderedDict.fromkeys"),
    }


def os_system(canary):
    return {"w": Reduce(os.system, f"touch {canary}")}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("forbidden", list(hostile("x")))
def test_malicious_pickle_is_refused_by_name_and_executes_nothing(tmp_path, writer, forbidden):
    canary = tmp_path / "canary"
    WRITERS[writer](tmp_path / "evil.pth", hostile(canary)[forbidden], {})
    with pytest.raises(ValueError, match=r"refused and nothing executed.*safetensors") as error:
        formats.read(tmp_path / "evil.pth")
    assert forbidden in str(error.value) and str(tmp_path / "evil.pth") in str(error.value)
    assert not canary.exists()


def test_the_malicious_pickle_of_this_test_does_fire_in_the_standard_unpickler(tmp_path):
    pickle.loads(hostile(tmp_path / "canary")["posix.system"])
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("position", range(5))
def test_malice_in_any_pickle_of_the_legacy_stream_is_refused(tmp_path, position):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    state = dumps({"w": tensor(legacy=True)})
    parts = [dumps(0x1950A86A20F9469CFC6C), dumps(1001), dumps({"little_endian": True}), state, dumps(["0"])]
    parts[position] = hostile(canary)["posix.system"]
    path.write_bytes(b"".join(parts) + struct.pack("<q", 6) + bytes(24))
    with pytest.raises(ValueError, match=r"posix.system"):
        formats.read(path)
    assert not canary.exists()


def test_all_forbidden_globals_of_a_training_checkpoint_come_in_one_message(tmp_path):
    torch = pytest.importorskip("torch")
    checkpoint = {"state_dict": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)}
    torch.save(checkpoint, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"argparse\.Namespace.*numpy.*scalar.*save_file"):
        formats.read(tmp_path / "c.pth")


def test_pickle_cannot_change_what_a_global_means_for_the_next_file(tmp_path):
    """BUILD with slot state sets attributes on whatever a filtered find_class returned; here it must not."""
    poison = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b."
    write_zip(tmp_path / "poison.pth", poison, {})
    with pytest.raises(ValueError, match="state for"):
        formats.read(tmp_path / "poison.pth")


def laughs(last):
    """A file of a few hundred bytes around a list whose text has 10^12 parts."""
    nest = b"]" + b"K\x01a" * 10 + b"q\x00"
    for level in range(1, 13):
        nest += b"]" + b"h" + bytes([level - 1]) + b"a"
        nest += (b"h" + bytes([level - 1]) + b"a") * 9 + b"q" + bytes([level])
    return b"\x80\x02" + nest + last


@pytest.mark.parametrize(
    "bytes_",
    [
        pytest.param(b"\x80\x02N" + b"r\xff\xff\xff\xff" + b".", id="memo index 4 billion"),
        pytest.param(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", id="bytearray of a terabyte"),
        pytest.param(b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".", id="bytes of a terabyte"),
        pytest.param(b"\x80\x02}" + b")" + b"\x85" * 1_000_00 + b"Ns.", id="hash of a deep tuple"),
        pytest.param(b"\x80\x02]q\x00h\x00a.", id="list inside itself"),
        pytest.param(b"\x80\x02}.", id="empty dict"),
        pytest.param(b"\x80\x02t.", id="no mark"),
        pytest.param(b"\x80\x02h\x07.", id="unset memo"),
        pytest.param(b"\x80\x02}", id="no stop"),
        pytest.param(b"\x80\x02\x82\x01.", id="extension registry"),
        pytest.param(b"", id="empty"),
        pytest.param(laughs(b"h\x0c\x93."), id="nest as the name of a global"),
        pytest.param(laughs(b"h\x0cQ."), id="nest as a storage"),
        pytest.param(laughs(b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00h\x0ch\x0ctR."), id="nest as a shape"),
        pytest.param(laughs(b"ccollections\nOrderedDict\nh\x0c\x85R."), id="nest as pairs"),
        pytest.param(laughs(b"h\x0c."), id="nest as the state dict"),
    ],
)
def test_hostile_opcodes_end_in_one_value_error(tmp_path, bytes_):
    write_zip(tmp_path / "w.pth", bytes_, {})
    with pytest.raises(ValueError, match=r"w\.pth: "):
        formats.read(tmp_path / "w.pth")


BAD_TENSORS = {
    "past the end": {"shape": (2, 4), "stride": (4, 1)},
    "offset": {"offset": 3},
    "negative offset": {"offset": -1},
    "negative stride": {"stride": (3, -1)},
    "negative size": {"shape": (-2, -3)},
    "wide stride": {"stride": (2**40, 1)},
    "64-bit overflow": {"shape": (2**32, 2**32), "stride": (0, 0)},
    "unfolds to terabytes": {"shape": (2**20, 2**20), "stride": (0, 0)},
    "too few strides": {"stride": (1,)},
    "40 dimensions": {"shape": (1,) * 40, "stride": (1,) * 40},
    "float size": {"shape": (2.0, 3)},
    "text shape": {"shape": "ab"},
    "storage too large": {"size": 2**40},
    "storage too small": {"size": 5},
    "negative storage": {"size": -6},
    "unknown storage": {"key": "9"},
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensor_that_reaches_outside_its_storage_is_refused(tmp_path, writer, case):
    path, legacy = tmp_path / "w.pth", writer == "legacy"
    WRITERS[writer](path, dumps({"w": tensor(legacy=legacy)}), {"0": range(6)})
    assert np.array_equal(formats.read(path)[0]["w"], np.arange(6, dtype="f4").reshape(2, 3))
    WRITERS[writer](path, dumps({"w": tensor(legacy=legacy, **BAD_TENSORS[case])}), {"0": range(6)})
    with pytest.raises(ValueError, match=r"w\.pth: "):
        formats.read(path)


def test_all_tensors_that_do_not_fit_are_named_at_once(tmp_path):
    write_zip(tmp_path / "w.pth", dumps({"a": tensor(offset=1), "b": tensor(), "c": tensor(offset=2)}), {"0": range(6)})
    with pytest.raises(ValueError, match=r"a: offset 1.*c: offset 2") as error:
        formats.read(tmp_path / "w.pth")
    assert "b: " not in str(error.value)


def test_many_small_expansions_cannot_add_up_to_a_giant_allocation(tmp_path):
    state = {str(i): tensor(shape=(500_000,), stride=(0,)) for i in range(50)}
    write_zip(tmp_path / "w.pth", dumps(state), {"0": range(6)})
    with pytest.raises(ValueError, match="unfold to 100,000,000 bytes"):
        formats.read(tmp_path / "w.pth")


def test_compressed_members_are_refused_before_unpacking(tmp_path):
    zeros = np.zeros(2**21, "f4")
    write_zip(tmp_path / "w.pth", dumps({"w": tensor(size=2**21)}), {"0": zeros}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="torch never compresses"):
        formats.read(tmp_path / "w.pth")


def good_files(folder):
    arrays = {"a": np.arange(1000, dtype="f4"), "b": np.ones((3, 4), "f4")}
    state = {"a": tensor(size=1000, shape=(1000,), stride=(1,)), "b": tensor("1", size=12, shape=(3, 4), stride=(4, 1))}
    write_zip(folder / "w.pth", dumps(state), {"0": arrays["a"], "1": arrays["b"].ravel()})
    write_legacy(folder / "w.th", dumps(state), {"0": arrays["a"], "1": arrays["b"].ravel()})
    formats.write_safetensors(folder / "w.safetensors", arrays, {})
    np.savez(folder / "w.npz", **arrays)
    return arrays


FILES = ["w.pth", "w.th", "w.safetensors", "w.npz"]


@pytest.mark.parametrize("name", FILES)
def test_truncation_anywhere_is_one_value_error_that_names_the_file(tmp_path, name):
    arrays = good_files(tmp_path)
    whole, path = (tmp_path / name).read_bytes(), tmp_path / name
    assert all(np.array_equal(value, arrays[key]) for key, value in formats.read(path)[0].items())
    for length in [*range(1, 400, 7), *range(400, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{name}: "):
            formats.read(path)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", FILES)
def test_flipped_bytes_give_a_value_error_or_tensors_but_never_another_exception(tmp_path, name):
    good_files(tmp_path)
    whole, path = (tmp_path / name).read_bytes(), tmp_path / name
    rng = np.random.default_rng(0)
    for position in [*range(300), *range(len(whole) - 300, len(whole))]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ rng.integers(1, 256)]) + whole[position + 1 :])
        try:
            tensors, _ = formats.read(path)
        except ValueError as error:
            assert str(error).startswith(str(path))
        else:
            assert sum(value.nbytes for value in tensors.values()) < 2**20


def test_torch_file_without_a_state_dict_names_what_it_holds(tmp_path):
    write_zip(tmp_path / "w.pth", dumps({"net": {"w": tensor()}, "epoch": 3}), {"0": range(6)})
    with pytest.raises(ValueError, match=r"not tensors: \['net', 'epoch'\]"):
        formats.read(tmp_path / "w.pth")
    write_zip(tmp_path / "w.pth", dumps({"state_dict": {"w": tensor()}, "model": {"w": tensor()}}), {"0": range(6)})
    with pytest.raises(ValueError, match="holds 'state_dict' and 'model'; save the one"):
        formats.read(tmp_path / "w.pth")
