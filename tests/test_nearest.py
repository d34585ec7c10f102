"""What `inspect` says of a file that fits no network: the nearest one of each family, whatever was done to its keys.

`python tests/test_nearest.py` writes tl_jax/assets/shapes.xz anew, which a new or changed network needs.
"""

import json
import lzma

import numpy as np
import pytest

from tl_jax import models
from tl_jax.models import conversion
from tl_jax.weights import inspection, load, nearest, other_inputs


def traced(name):
    """The shapes of a network, whatever the table says."""
    variant = models.get(name)
    card = other_inputs.with_columns(variant.card, ("x",), "") if variant.card.input == "table" else variant.card
    return load._network_shapes(variant.module, card.to_json())


def write():
    tables, names = [], {}
    for name in models.MODELS:
        shapes = traced(name)
        tables += [] if shapes in tables else [shapes]
        names[name] = tables.index(shapes)
    text = json.dumps({"names": names, "tables": tables}, separators=(",", ":"))
    nearest.TABLE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def keys_of(name, layout, without=()):
    """{key: zeros of its shape, without memory} of a file of a network in a layout, but for some parts."""
    table, found = models.get(name).layouts[layout], {}
    for leaf, shape in nearest.known_shapes()[models.get(name).flavours.get(layout, name)].items():
        if leaf.partition("/")[2].startswith(tuple(f"{part}/" for part in without)):
            continue
        keys, transform = conversion.sources_of(table, leaf)
        shapes = conversion.source_shapes(transform, shape)
        found |= {key: np.broadcast_to(np.float32(0), its) for key, its in zip(keys, shapes, strict=True)}
    return found


def describe(tensors):
    return nearest.describe(tensors, load.default_shapes)


def names_of(tensors):
    return [(each.name, each.layout) for each in nearest.nearest(tensors, load.default_shapes)]


def drop_the_end(tensors, name, layout):
    """Without the last part of the network that has parameters, and its head."""
    keys, cuts = keys_of(name, layout, without=("head",)), models.get(name).module(num_classes=0).cuts
    shorter = (keys_of(name, layout, without=("head", f"backbone/{cut}")) for cut in reversed(cuts))
    return next(found for found in shorter if len(found) < len(keys))


def rename_some(tensors, name, layout):
    return {f"my_{key}" if i % 7 == 0 else key: x for i, (key, x) in enumerate(tensors.items())}


def widen_some(tensors, name, layout):
    wider = {key: np.broadcast_to(np.float32(0), tuple(2 * side for side in x.shape)) for key, x in tensors.items()}
    return {key: wider[key] if i % 6 == 0 else x for i, (key, x) in enumerate(tensors.items())}


def wrap(tensors, name, layout):
    return {**{f"net.encoder.{key}": x for key, x in tensors.items()}, "loss.weight": np.zeros(10, np.float32)}


CHANGES = (drop_the_end, rename_some, widen_some, wrap)
FAMILIES = (
    "resnet20_cifar", "vgg13_bn", "inception_v3", "squeezenet1_1", "vit_small_patch32_224", "lenet",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "densenet169", "mobilenetv1_075", "mobilenetv2_120d", "mobilenetv3_small_050", "efficientnet_b3",
        "efficientnetv2_s", "convnext_small", "vit_base_patch14_dinov2", "vit_large_patch14_clip_224",
    )),
)  # fmt: skip


def test_the_table_of_shapes_names_the_networks_that_there_are_and_their_leaves():
    assert nearest.known_shapes().keys() == models.MODELS.keys(), "run python tests/test_nearest.py"
    for name in ("resnet18", "mobilenetv2_035", "lenet"):
        assert nearest.known_shapes()[name] == traced(name), "run python tests/test_nearest.py"


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", models.MODELS)
def test_the_table_of_shapes_is_that_of_the_networks(name):
    assert nearest.known_shapes()[name] == traced(name), "run python tests/test_nearest.py"


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_mutilated_file_is_nearest_to_what_it_was(name):
    layout = next(iter(models.get(name).layouts))
    whole = keys_of(name, layout)
    for change in CHANGES:
        tensors = change(whole, name, layout)
        (found, *equal) = nearest.nearest(tensors, load.default_shapes)
        assert (name, layout) in [(each.name, each.layout) for each in (found, *equal)], change
        assert len(equal) < 6 and 0.5 < found.fits / found.total < 1, change


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in models.MODELS if "." not in name])
def test_every_network_in_every_layout_is_found_whole_and_mutilated(name):
    for layout in models.get(name).layouts:
        whole = keys_of(name, layout)
        assert (name, layout) in load.candidates(whole)
        for change in CHANGES:
            assert (name, layout) in names_of(change(whole, name, layout)), (layout, change)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_is_told_of_files_that_people_have():
    resnet50 = keys_of("resnet50", "timm")
    ten = {**resnet50, "fc.weight": np.zeros((10, 2048), np.float32), "fc.bias": np.zeros(10, np.float32)}
    (line,) = describe(ten)
    assert line.startswith("fits resnet50 (layout timm): 224 px") and "fc.weight [10, 2048]" in line
    (line,) = describe({key: x for key, x in ten.items() if not key.startswith("fc.")})
    assert line.endswith("; no head")

    shallow = {key: x for key, x in resnet50.items() if not any(f".{i}." in key[6:9] for i in range(2, 6))}  # ResNet-26
    (line,) = describe(shallow)
    assert line.startswith("nearest: resnet50 (layout timm): 145 of 265 keys fit; 120 missing keys [layer1.2.")
    assert "partial" not in line

    stem = {**keys_of("resnet18", "timm"), "conv1.weight": np.zeros((64, 4, 7, 7), np.float32)}
    (line,) = describe(stem)
    told = "99 of 100 keys fit; 1 other shapes [conv1.weight is (64, 4, 7, 7), expected (64, 3, 7, 7)]"
    assert line.startswith(f"nearest: resnet18 (layout timm): {told}")

    wrapped = {f"model.{key}": x for key, x in ten.items()} | {"criterion.weight": np.zeros(10, np.float32)}
    (line,) = describe(wrapped)
    assert line.startswith(
        "nearest: resnet50 (layout timm) behind the prefix 'model.': 265 of 266 keys fit; 1 unused keys [crit"
    )

    part = {key: x for key, x in resnet50.items() if not key.startswith(("layer4.", "fc."))}
    (line,) = describe(part)
    assert "missing keys [layer4.0.bn1.running_mean" in line and line.endswith(
        "; partial=('stage4/.*',) loads it; no head"
    )

    (line, *_) = describe(keys_of("vit_tiny_patch16_224", "hf"))
    assert line.startswith("fits vit_tiny_patch16_224 (layout hf), loaded as vit_tiny_patch16_224.hf: 224 px")
    assert describe({"a.weight": np.zeros(3, np.float32)}) == ["fits no known model, and none is near"]


def test_inspect_of_the_resnet_to_layer3_says_how_it_loads(shared):
    path = shared / "weights/resnet18_imagenet_to_layer3/resnet18_stem_to_layer3_folded_bn.safetensors"
    assert "; partial=('stage4/.*',) loads it; no head\nno card" in inspection.inspect(path)


if __name__ == "__main__":
    write()
