"""Keras' HDF5 weight files <-> flat dicts of numpy arrays, {"layer/name": array}; `formats` is the way in and out.

Three forms are read: weights in groups by layer (Keras 1 and 2, and `x.h5` of Keras 3), the same below `model_weights`
in a file with the whole model, and Keras 3's `x.weights.h5`, whose paths are kept: layers/conv2d_1/vars/0 counts the
layers of a class. The optimizer's arrays are passed over. A layer of a model inside of a model has its own name alone.
Attributes are not read: damaged text lets HDF5 2.0 allocate 4 GB, or hang. h5py is an optional requirement, imported
where a file needs it.
"""

import re

import numpy as np

METADATA = "tl_jax."  # arrays of bytes at the root whose names begin so are metadata; Keras does not look at them
# The arrays of a layer in Keras' order.
ORDER = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance", "mean", "variance", "count")
_PASSED_OVER = ("optimizer_weights", "optimizer", "top_level_model_weights")
_FILTERS = {
    1,
    2,
    3,
    32000,
}  # deflate, shuffle, fletcher32 and lzf, which h5py has built in; others are looked for on disk
_DEPTH, _OBJECTS = 24, 100_000
_NUMBERED = r"(conv2d|batch_normalization|normalization)(?:_(\d+))?"


def _h5py():
    try:
        import h5py
    except ImportError as error:
        need = "a Keras .h5 file needs h5py, which is not installed: pip install h5py"
        raise ValueError(f"{need} ({error})") from None
    return h5py


def read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays by layer, and this package's metadata. Links, references, text and arrays kept elsewhere are errors.

    Layers that Keras named and numbered by itself (conv2d_95) are numbered anew from 1, since it goes on counting over
    all models of a process. Memory is bounded by 100 times the size of the file. Raises ValueError, or what h5py raises
    for a damaged file.
    """
    h5py, tensors, metadata = _h5py(), {}, {}
    size = path.stat().st_size
    with h5py.File(path, "r", locking=False) as file:
        found = _datasets(h5py, file)
        declared = {place: _bytes(h5py, place, dataset) for place, dataset in found.items()}
        stored = sum(dataset.id.get_storage_size() for dataset in found.values())
        if stored > size or sum(declared.values()) > 64 * 2**20 + 100 * size:
            raise ValueError(f"declares {sum(declared.values()):,} bytes of arrays in {size:,}: refused")
        for place, dataset in found.items():
            if len(place) == 1 and place[0].startswith(METADATA):
                metadata[place[0]] = dataset[()].tobytes().decode()
                continue
            if (key := _key(place)) in tensors:
                raise ValueError(f"two arrays are {key!r} by layer and name; one is {'/'.join(place)!r}")
            tensors[key] = dataset[()]
    names = _renumbered({key.rpartition("/")[0] for key in tensors})
    return {_renamed(key, names): np.asarray(array) for key, array in tensors.items()}, metadata


def _datasets(h5py, file) -> dict:
    """{(group, ..., name): data set} of all that lies in a file itself and is no part of an optimizer."""
    found, seen, stack = {}, set(), [((), file)]
    while stack:
        place, item = stack.pop()
        info = h5py.h5o.get_info(item.id)
        if info.addr in seen or len(place) > _DEPTH or len(seen) > _OBJECTS:
            raise ValueError(f"{'/'.join(place)!r} is a loop, a second name of something, or one of too many objects")
        seen.add(info.addr)
        if isinstance(item, h5py.Dataset):
            found[place] = item
            continue
        if not isinstance(item, h5py.Group):
            raise ValueError(f"{'/'.join(place)!r} is neither a group nor an array")
        for name in item:
            link, where = item.get(name, getlink=True), (*place, name)
            if not isinstance(link, h5py.HardLink):
                kind = "damaged link" if link is None else type(link).__name__
                raise ValueError(f"{'/'.join(where)!r} is a {kind}: links are not followed, to this file or another")
            if name not in _PASSED_OVER:
                stack.append((where, item[name]))
    return found


def _bytes(h5py, place, dataset) -> int:
    """The size of an array that lies in the file itself and holds numbers; ValueError for any other."""
    plist, name = dataset.id.get_create_plist(), repr("/".join(place))
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise ValueError(f"{name} lies in another file, which is not opened")
    if dataset.dtype.kind not in "fiub" or dataset.dtype.itemsize > 8 or dataset.shape is None:
        raise ValueError(f"{name} has element type {dataset.dtype}, expected numbers; text and references are not read")
    filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
    if filters - _FILTERS:
        raise ValueError(f"{name} is packed by filters {sorted(filters - _FILTERS)}: save it without, or with gzip")
    size = int(np.prod(dataset.shape, dtype=object)) * dataset.dtype.itemsize
    chunk = int(np.prod(dataset.chunks or (), dtype=object)) * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()
    if (stored < size and not filters) or (size and not stored) or chunk > 2 * size + 2**20:
        raise ValueError(f"{name} declares {dataset.shape} {dataset.dtype} but holds {stored:,} bytes")
    return max(size, chunk)


def _key(place) -> str:
    """layer/name of an array from where it lies."""
    place = place[1:] if place[0] == "model_weights" else place
    if place[-2:-1] == ("vars",):
        return "/".join(place)  # of Keras 3
    *groups, name = place
    # A layer's group has its name, and so has what lies in it: conv1/bn/conv1/bn/gamma:0.
    twice = (n for n in range(1, len(groups)) if groups[-n:] == groups[:n])
    layer = groups[: next(twice, 0)] or groups[1:] or groups  # else a layer of the model that the first group is
    return "/".join((*layer, re.sub(r":0$", "", name)))


def _renumbered(layers) -> dict[str, str]:
    """New names of the layers that Keras named and numbered by itself."""
    numbers = {}
    for layer in layers:
        if match := re.fullmatch(_NUMBERED, layer):
            numbers.setdefault(match[1], []).append((int(match[2] or 0), layer))
    return {layer: f"{kind}_{i}" for kind, own in numbers.items() for i, (_, layer) in enumerate(sorted(own), 1)}


def _renamed(key: str, names: dict[str, str]) -> str:
    layer, slash, name = key.rpartition("/")
    return names.get(layer, layer) + slash + name


def write(file, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes `x.h5`, which `load_weights` of Keras 2 and 3 reads by order; the layers stand in the order of `tensors`.

    file: open for reading and writing. A layer's arrays are those of ORDER.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        layer, _, name = key.rpartition("/")
        layers.setdefault(layer, {})[name] = array
    with _h5py().File(file, "w") as out:
        _write_names(out, "layer_names", list(layers))
        # Keras 2 turns the kernels of a file around that says nothing of its version.
        out.attrs["backend"], out.attrs["keras_version"] = np.bytes_("tensorflow"), np.bytes_("2.15.0")
        for layer, arrays in layers.items():
            names = sorted(arrays, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
            group = out.create_group(layer)
            _write_names(group, "weight_names", [f"{layer}/{name}:0" for name in names])
            for name in names:
                group.create_dataset(f"{layer}/{name}:0", data=arrays[name])
        for name, text in metadata.items():
            out.create_dataset(name, data=np.frombuffer(text.encode(), np.uint8))


def _write_names(group, name: str, texts: list[str]) -> None:
    """An attribute, in parts where it is more than the 64 KB that HDF5 keeps in one."""
    names = np.array([text.encode() for text in texts])
    parts = np.array_split(names, names.nbytes // 60_000 + 1)
    for i, part in enumerate(parts):
        group.attrs[f"{name}{i if len(parts) > 1 else ''}"] = part
