"""torch.save files without torch: a small interpreter that can build tensors and plain data, and nothing else.

Nothing here imports `pickle`. The interpreter knows the opcodes, storage classes and three rebuild functions that a
state dict needs; every other global is only ever a name in an error message. `formats.read` is the way in.
"""

import dataclasses
import io
import math
import pickletools
import warnings
import zipfile

import ml_dtypes
import numpy as np

_DTYPES = {
    **{"Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": ml_dtypes.bfloat16},
    **{"Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?"},
}
_STORAGES = {f"torch.{name}Storage": np.dtype(dtype) for name, dtype in _DTYPES.items()}
_REBUILDS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
_GLOBALS = {"collections.OrderedDict", *_STORAGES, *_REBUILDS}
WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")  # where programs put a state dict; two are refused
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    size: int  # elements


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple
    stride: tuple


_OPAQUE = object()  # stands for whatever a refused global would have made


class _Machine:
    """Interprets one pickle by its opcodes, building plain data and `_Tensor` descriptions and calling nothing.

    The standard unpickler with a filtered `find_class` still lets a file set attributes on what the filter returns,
    allocate by a number in the file, and recurse without limit in a hash. Values of the file are hashed, copied or
    printed only where they are known to be numbers or text: the text of a small nest of lists can fill the memory.
    """

    def __init__(self):
        self.stack, self.marks, self.memo, self.refused, self.storages = [], [], {}, set(), {}

    def run(self, stream):
        value = damage = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # strange escapes in a damaged file's names
                for opcode, argument, _ in pickletools.genops(stream):
                    if opcode.name not in _OPCODES:
                        raise ValueError(f"pickle opcode {opcode.name} has no place in a state dict")
                    _OPCODES[opcode.name](self, argument)
            value = self.stack.pop()
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            damage = f"damaged, cut short or no torch pickle ({error})"
        if self.refused:
            asks = f"the pickle asks for {', '.join(sorted(self.refused))}: neither tensors nor plain data"
            fix = "If you trust it, open it in torch and save the state dict alone with safetensors.torch.save_file"
            raise ValueError(f"{asks}, so the file was refused and nothing executed. {fix}")
        if damage:
            raise ValueError(damage)
        return value

    def take(self, start):
        if start < 0:
            raise ValueError("stack underflow")
        items, self.stack[start:] = self.stack[start:], []
        return items

    def pop(self, count):
        return self.take(len(self.stack) - count)

    def items(self):
        return self.take(self.marks.pop())

    def memoize(self, key):
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]

    def look_up(self, *names):
        if not all(isinstance(name, str) for name in names):
            raise ValueError("global without a name")
        name = ".".join(names)
        if name in _GLOBALS:
            return _Global(name)
        self.refused.add(name[:80])
        return _OPAQUE

    def call(self, function, arguments):
        if not isinstance(arguments, tuple) or len(arguments) > 8:
            raise ValueError("call with strange arguments")
        if function is _OPAQUE or any(argument is _OPAQUE for argument in arguments):
            return _OPAQUE
        if function == _Global("collections.OrderedDict"):
            return self.ordered_dict(*arguments)
        if function == _Global("torch._utils._rebuild_parameter"):
            return arguments[0]
        if not isinstance(function, _Global) or function.name not in _REBUILDS:
            raise ValueError("call of something that is no rebuild function")
        storage, offset, shape, stride = arguments[:4]
        if not isinstance(storage, _Storage) or max(len(shape), len(stride)) > 32:
            raise ValueError("tensor without a storage, or of more than 32 dimensions")
        if not all(type(number) is int and 0 <= number < 2**63 for number in (offset, *shape, *stride)):
            raise ValueError("tensor whose offset, shape or stride holds no integers in 0 .. 2**63 - 1")
        return _Tensor(storage, offset, tuple(shape), tuple(stride))

    def ordered_dict(self, pairs=None):
        """Empty, or from the list of pairs that Python 2 wrote; the list is moved, so that no file can multiply it."""
        result = {}
        while pairs:
            key, value = pairs.pop(0)
            self.set_items(result, [key, value])
        return result

    def storage(self, identity):
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise ValueError("persistent reference to something that is no storage")
        kind, key, size, view = identity[1], identity[2], identity[4], identity[5:]
        if kind is _OPAQUE:
            return _OPAQUE
        if not isinstance(kind, _Global) or kind.name not in _STORAGES or view not in ((), (None,)):
            raise ValueError("storage of an unknown type, or a view of another")
        if not isinstance(key, str) or type(size) is not int or size < 0:
            raise ValueError("storage without a name and a size")
        storage = _Storage(_STORAGES[kind.name], key, size)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key!r} is declared twice, differently")
        return storage

    def set_items(self, target, items):
        if target is _OPAQUE:
            return target
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | None) and key is not _OPAQUE:
                raise ValueError(f"dictionary key of type {type(key).__name__}")
            target[key] = value
        return target

    def extend(self, target, items):
        if target is not _OPAQUE:
            target.extend(items)

    def build(self, state):
        """Only an OrderedDict may have state, its `_metadata`, which is not needed."""
        if not isinstance(self.stack[-1], dict) and self.stack[-1] is not _OPAQUE:
            raise ValueError(f"state for {type(self.stack[-1]).__name__}")


def _pushes(make):
    return lambda machine, argument: machine.stack.append(make(machine, argument))


_ARGUMENT = (
    *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
_VALUES = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_VALUES |= {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_OPCODES = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(_ARGUMENT, _pushes(lambda _, argument: argument)),
    **{name: _pushes(lambda *_, make=make: make()) for name, make in _VALUES.items()},
    **{f"TUPLE{count}": _pushes(lambda machine, _, count=count: tuple(machine.pop(count))) for count in (1, 2, 3)},
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "TUPLE": _pushes(lambda machine, _: tuple(machine.items())),
    "LIST": _pushes(lambda machine, _: machine.items()),
    "DICT": _pushes(lambda machine, _: machine.set_items({}, machine.items())),
    "APPEND": lambda machine, _: machine.extend(items=machine.pop(1), target=machine.stack[-1]),
    "APPENDS": lambda machine, _: machine.extend(items=machine.items(), target=machine.stack[-1]),
    "SETITEM": lambda machine, _: machine.set_items(items=machine.pop(2), target=machine.stack[-1]),
    "SETITEMS": lambda machine, _: machine.set_items(items=machine.items(), target=machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), lambda machine, key: machine.memoize(key)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _pushes(lambda machine, key: machine.memo[key])),
    # A state dict has no instances: INST is here so that what it asks for is named.
    **dict.fromkeys(("GLOBAL", "INST"), _pushes(lambda machine, names: machine.look_up(*names.split(" ", 1)))),
    "STACK_GLOBAL": _pushes(lambda machine, _: machine.look_up(*machine.pop(2))),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _pushes(lambda machine, _: machine.call(*machine.pop(2)))),
    "BUILD": lambda machine, _: machine.build(machine.pop(1)),
    "BINPERSID": _pushes(lambda machine, _: machine.storage(*machine.pop(1))),
}


def read_zip(path) -> dict[str, np.ndarray]:
    """Reads torch.save's format since 1.6: uncompressed members NAME/data.pkl and NAME/data/KEY, one per storage."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"a zip archive with {len(pickles)} members NAME/data.pkl, expected 1; not saved by torch")
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("members unpack to more bytes than the file has, and torch never compresses: refused")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("saved on a big-endian machine; re-save it as safetensors")
        state = _state_dict(_Machine().run(io.BytesIO(archive.read(pickles[0]))))
        keys = {tensor.storage.key for tensor in state.values()}
        if missing := sorted(key for key in keys if f"{root}data/{key}" not in members):
            raise ValueError(f"storages missing from the archive: {missing}")
        return _build(state, {key: archive.read(f"{root}data/{key}") for key in keys})


def read_legacy(path) -> dict[str, np.ndarray]:
    """Reads torch.save's format before 1.6: five pickles (magic, protocol, system, object, keys), then the storages."""
    data = path.read_bytes()
    stream = io.BytesIO(data)
    magic, protocol, system = (_Machine().run(stream) for _ in range(3))
    if magic != _LEGACY_MAGIC or protocol != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("a pickle, but no little-endian torch.save file of protocol 1001; re-save it as safetensors")
    machine = _Machine()
    state, keys, raw = _state_dict(machine.run(stream)), _Machine().run(stream), {}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != {*machine.storages}:
        raise ValueError("the list of storages does not match the pickle")
    start = stream.tell()
    for key in keys:
        storage, found = machine.storages[key], int.from_bytes(data[start : start + 8], "little")
        end = start + 8 + storage.size * storage.dtype.itemsize
        if found != storage.size or end > len(data):
            raise ValueError(f"storage {key!r} should have {storage.size:,} elements; damaged or cut short")
        raw[key], start = memoryview(data)[start + 8 : end], end
    return _build(state, raw)


def _state_dict(value) -> dict[str, _Tensor]:
    """The mapping of names to tensors, bare or under one of WRAPPERS."""
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__.strip('_')}, expected a state dict (names -> tensors)")
    wrapped = {key: value[key] for key in WRAPPERS if isinstance(value.get(key), dict)}
    if len(wrapped) > 1:
        raise ValueError(f"holds {' and '.join(map(repr, wrapped))}; save the one you mean alone")
    state = next(iter(wrapped.values()), value)
    foreign = [str(key)[:80] for key, item in state.items() if not (isinstance(key, str) and isinstance(item, _Tensor))]
    if foreign:
        more = f" and {len(foreign) - 10} more" if len(foreign) > 10 else ""
        raise ValueError(
            f"no state dict (bare, or under {' or '.join(map(repr, WRAPPERS))}): not tensors: {foreign[:10]}{more}"
        )
    return state


def _build(state, raw) -> dict[str, np.ndarray]:
    """Cuts the tensors out of their storages, once every index that they reach is known to lie inside."""
    faults = {name: _fault(tensor, len(raw[tensor.storage.key])) for name, tensor in state.items()}
    if wrong := [f"{name}: {fault}" for name, fault in faults.items() if fault]:
        raise ValueError(f"tensors that do not fit their storages (damaged or hostile file): {'; '.join(wrong)}")
    stored = sum(len(data) for data in raw.values())
    needed = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in state.values())
    if needed > 8 * stored + 2**20:  # overlapping views (stride 0, tied weights) may unfold a little, not without limit
        raise ValueError(f"tensors unfold to {needed:,} bytes from {stored:,} stored: refused")
    return {name: _cut(tensor, raw[tensor.storage.key]) for name, tensor in state.items()}


def _fault(tensor, stored) -> str:
    """What is wrong with a tensor of a storage of `stored` bytes; "" if nothing."""
    storage, shape = tensor.storage, tensor.shape
    if stored != storage.size * storage.dtype.itemsize:
        return f"storage has {stored:,} bytes, expected {storage.size:,} {storage.dtype}"
    if len(shape) != len(tensor.stride) or len(shape) > 32:
        return f"shape {shape} with stride {tensor.stride}"
    last = tensor.offset + sum((size - 1) * step for size, step in zip(shape, tensor.stride, strict=True))
    if 0 not in shape and last >= storage.size:
        return f"offset {tensor.offset}, shape {shape}, stride {tensor.stride} reach past {storage.size:,} elements"
    return ""


def _cut(tensor, data):
    dtype = tensor.storage.dtype
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    pairs = zip(tensor.shape, tensor.stride, strict=True)
    strides = [step * dtype.itemsize if size > 1 else 0 for size, step in pairs]  # along size 1 any stride is legal
    return np.ndarray(tensor.shape, dtype, data, tensor.offset * dtype.itemsize, strides)
