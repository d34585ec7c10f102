"""Keras' .h5 files: their forms and the names in them, hostile ones, exports, and the numbers of keras.applications."""

import os
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pretrained import close

from tl_jax import models
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.models import conversion, inception, layers, resnet
from tl_jax.weights import formats, inspection, load

h5py = pytest.importorskip("h5py", reason="h5py is in requirements-dev.txt")
ROOT = pathlib.Path(__file__).resolve().parents[1]
SLOW, EXHAUSTIVE = pytest.mark.slow, (pytest.mark.slow, pytest.mark.exhaustive)


def write(path, arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def test_the_three_forms_of_a_file_give_layer_and_name(tmp_path):
    places = {
        "conv1/conv/conv1/conv/kernel:0": "conv1/conv/kernel",
        "model_weights/dense/sequential/dense/kernel": "dense/kernel",
        "model_weights/vgg16/block1_conv1/bias:0": "block1_conv1/bias",
        "fc1/fc1_W_1:0": "fc1/fc1_W_1",
        "layers/conv2d_3/vars/0": "layers/conv2d_3/vars/0",
        "conv2d_95/conv2d_95/kernel:0": "conv2d_1/kernel",  # numbered by Keras: counted from 1
        "conv2d_102/conv2d_102/kernel:0": "conv2d_2/kernel",
        "batch_normalization/batch_normalization/beta": "batch_normalization_1/beta",
    }
    arrays = {place: np.full((2, i), i, ">f4") for i, place in enumerate(places, 1)}
    passed_over = ("optimizer_weights/m:0", "optimizer/vars/0", "model_weights/top_level_model_weights/x")
    write(tmp_path / "w.h5", {**arrays, **dict.fromkeys(passed_over, np.zeros(1))})
    with h5py.File(tmp_path / "w.h5", "a") as file:
        file.create_dataset("packed/kernel:0", data=np.ones((50, 50)), compression="gzip", shuffle=True)
    tensors, metadata = formats.read(tmp_path / "w.h5")
    assert set(tensors) == {*places.values(), "packed/kernel"} and metadata == {}
    assert all(np.array_equal(tensors[key], arrays[place]) for place, key in places.items())
    assert all(array.dtype.isnative and array.flags.writeable for array in tensors.values())


def test_a_file_without_h5py_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "w.h5", {"a/a/kernel:0": np.ones(1)})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"w\.h5: .* needs h5py, which is not installed: pip install h5py"):
        formats.read(tmp_path / "w.h5")
    with pytest.raises(ValueError, match="pip install h5py"):
        formats.write(tmp_path / "out.h5", {"a/kernel": np.ones(1)}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["w.h5"]


def virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(file.filename + ".other", "x", shape=(4,))
    file.create_virtual_dataset("a/kernel:0", layout)


def loop(file):
    file.create_group("a/b")
    file["a/b/c"] = file["a"]


def unallocated(file, **given):
    file.create_dataset("a/kernel:0", (2**20, 2**20), "f4", **given)


def compound(file):
    file["a/kernel:0"] = np.zeros(2, [("x", "f4"), ("y", "f4")])


def chunk(file):
    unallocated(file, chunks=(2**9, 2**9), compression="gzip")
    file["a/kernel:0"][0, 0] = 1


HOSTILE = {  # what is done to a file, and what the message says
    "external link": (
        lambda f: f.__setitem__("a/kernel:0", h5py.ExternalLink("/etc/passwd", "x")),
        "ExternalLink: link",
    ),
    "soft link to itself": (lambda f: f.__setitem__("a", h5py.SoftLink("/a")), "'a' is a SoftLink: links are not"),
    "loop of groups": (loop, "'a/b/c' is a loop"),
    "two names": (lambda f: (f.__setitem__("a", np.ones(3)), f.__setitem__("b", f["a"])), "a second name"),
    "deep": (lambda f: f.create_group("/".join("a" * 40)), "is a loop"),
    "virtual": (virtual, "lies in another file"),
    "elsewhere": (lambda f: f.create_dataset("a", (9,), "f4", external=[("/etc/passwd", 0, 36)]), "in another file"),
    "reference": (lambda f: f.create_dataset("a/kernel:0", (3,), h5py.ref_dtype), "element type object, expected numb"),
    "text": (lambda f: f.__setitem__("a/kernel:0", "x" * 99), "element type object"),
    "short text": (lambda f: f.__setitem__("a/kernel:0", np.array([b"x"])), r"element type \|S1, expected numbers"),
    "record": (compound, "expected numbers"),
    "complex": (lambda f: f.__setitem__("a/kernel:0", np.ones(2, "c16")), "expected numbers"),
    "nothing": (lambda f: f.__setitem__("a/kernel:0", h5py.Empty("f4")), "expected numbers"),
    "a type": (lambda f: f.__setitem__("a", np.dtype("f4")), "neither a group nor an array"),
    "absurd size": (unallocated, r"declares \(1048576, 1048576\) float32 but holds 0 bytes"),
    "absurd size in parts": (lambda f: unallocated(f, chunks=(64, 64)), "but holds 0 bytes"),
    "bomb": (chunk, "declares .* bytes of arrays in .*: refused"),
    "foreign filter": (
        lambda f: f.create_dataset("a", (8, 8), "f4", chunks=(8, 8), compression=32015, allow_unknown_filter=True),
        r"packed by filters \[32015\]",
    ),
    "one place twice": (
        lambda f: (f.__setitem__("a/a/kernel", np.ones(3)), f.__setitem__("a/kernel:0", np.ones(3))),
        "two arrays are 'a/kernel'",
    ),
    "empty": (lambda f: f.create_group("a"), "holds no tensors"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_one_error(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HDF5_PLUGIN_PATH", str(tmp_path))
    do, message = HOSTILE[kind]
    with h5py.File(tmp_path / "w.h5", "w") as file:
        do(file)
    with pytest.raises(ValueError, match=f"w.h5: .*{message}"):
        formats.read(tmp_path / "w.h5")


DAMAGE = """
import pathlib, random, re, resource, sys
import numpy as np
from tl_jax.weights import formats
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30,) * 2)
path, other = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1] + ".bad.h5")
data = path.read_bytes()
for seed in range(int(sys.argv[2])):
    draw = random.Random(seed)
    bad = bytearray(data[: draw.randrange(len(data))] if seed % 3 == 0 else data)
    for _ in range(draw.choice((1, 4)) if seed % 3 == 1 else 0):
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
    for _ in range(draw.choice((1, 4)) if seed % 3 == 2 else 0):
        place = draw.randrange(len(bad) - 8)
        bad[place : place + 8] = draw.choice((b"\\xff" * 8, bytes(8), draw.randbytes(8), (2**40).to_bytes(8, "little")))
    other.write_bytes(bad)
    try:
        formats.read(other)
    except ValueError as error:
        assert str(error).startswith(str(other)), error
# What getrusage says begins with the memory of the process that started this one.
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.parametrize("rounds", [300, pytest.param(1500, marks=SLOW), pytest.param(6000, marks=SLOW)])
def test_any_damage_is_one_error_in_bounded_memory_and_time(rounds, tmp_path):
    arrays = {f"layers/conv2d_{i}/vars/0": np.ones((3, 3, 4, 4), "f4") for i in range(9)}
    write(tmp_path / "w.h5", arrays | {f"x{i}/x{i}/bias:0": np.ones(4) for i in range(9)})
    with h5py.File(tmp_path / "w.h5", "a") as file:
        file["layers/conv2d_0/vars"].attrs["name"] = "of any length"
        file.create_dataset("packed", data=np.ones(99), compression="gzip")
    call = [sys.executable, "-c", DAMAGE, str(tmp_path / "w.h5"), str(rounds)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400 * 1024, f"{done.stdout} KB"


def test_a_file_written_here_is_read_back_and_has_the_order_of_its_arrays(tmp_path):
    names = [
        f"layer_of_a_very_long_name_{'x' * 200}_{i}" for i in range(300)
    ]  # over 64 KB: more than an attribute holds
    tensors = {f"{name}/{leaf}": np.float32([i]) for i, name in enumerate(names) for leaf in ("bias", "kernel")}
    formats.write(tmp_path / "w.h5", tensors, {"tl_jax.card": "{ü}" * 50_000})
    back, metadata = formats.read(tmp_path / "w.h5")
    assert metadata == {"tl_jax.card": "{ü}" * 50_000} and set(back) == set(tensors)
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)
    with h5py.File(tmp_path / "w.h5") as file:
        assert b"".join(np.concatenate([file.attrs[f"layer_names{i}"] for i in range(2)])) == "".join(names).encode()
        assert [x.rsplit(b"/")[-1] for x in file[names[0]].attrs["weight_names"]] == [b"kernel:0", b"bias:0"]
    before = (tmp_path / "w.h5").read_bytes()
    formats.write(tmp_path / "w.h5", tensors, {"tl_jax.card": "{ü}" * 50_000})
    assert (tmp_path / "w.h5").read_bytes() == before


def test_what_is_no_layout_of_keras_is_not_written_as_its_file(tmp_path):
    loaded = load.load("resnet8_cifar", "")
    for layout, message in ((None, "no layout 'keras'"), ("native", "would be a file of Keras")):
        with pytest.raises(ValueError, match=message):
            load.export(loaded.variables, "resnet8_cifar", tmp_path / "w.h5", card=loaded.card, layout=layout)
    with pytest.raises(ValueError, match=r"for resnet50: Keras' network is resnet50\.keras, which computes"):
        load.export({}, "resnet50", tmp_path / "w.h5", card=models.get("resnet50").card)


PUBLISHED = {  # spellings of the published files, and of Keras 3's .weights.h5, and ours
    "densenet121": [("conv1/bn/gamma", "conv1_bn/gamma"), ("fc1000/bias", "predictions/bias")],
    "resnet50": [("probs/kernel", "predictions/kernel"), ("layers/conv2d_4/vars/1", "conv2_block1_3_conv/bias")],
    "mobilenetv1_100": [
        ("conv_dw_1/depthwise_kernel", "conv_dw_1/kernel"),
        ("layers/conv2d_14/vars/1", "conv_preds/bias"),
        ("layers/functional/layers/depthwise_conv2d_12/vars/0", "conv_dw_13/kernel"),
        ("layers/conv2d_15/vars/1", "layers/conv2d_15/vars/1"),
    ],
    "mobilenetv2_100": [
        ("mobl0_conv_0_depthwise/depthwise_kernel", "expanded_conv_depthwise/kernel"),
        ("bn0_conv_0_bn_project/beta", "expanded_conv_project_BN/beta"),
        ("mobl16_conv_16_expand/kernel", "block_16_expand/kernel"),
        ("bn1_conv_1_bn_expand/moving_mean", "block_1_expand_BN/moving_mean"),
        ("bn_Conv1/gamma", "bn_Conv1/gamma"),
        ("Logits/kernel", "predictions/kernel"),
    ],
    "tf_mobilenetv3_large_100": [
        ("Conv/BatchNorm/beta", "conv_bn/beta"),
        ("expanded_conv/depthwise/BatchNorm/gamma", "expanded_conv_depthwise_bn/gamma"),
        ("expanded_conv_3/squeeze_excite/Conv_1/kernel", "expanded_conv_3_squeeze_excite_conv_1/kernel"),
        ("Conv_2/bias", "conv_2/bias"),
        ("Logits/bias", "logits/bias"),
        ("params/head/out/kernel", "params/head/out/kernel"),
    ],
    "inception_v3": [("layers/batch_normalization/vars/0", "batch_normalization_1/beta")],
    "tf_efficientnet_b0": [
        ("layers/normalization/vars/1", "normalization_1/variance"),
        ("probs/bias", "predictions/bias"),
    ],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_spellings_are_those_of_the_table(name):
    table = models.get(name).layouts["keras"]
    for theirs, ours in PUBLISHED[name]:
        assert conversion.canonical(table, theirs) == conversion.canonical(table, ours) == ours


COUNTS = {  # all numbers of a file with 1000 classes, as Keras' documentation has them
    "vgg16": 138_357_544,
    "resnet50": 25_636_712,
    "inception_v3": 23_851_784,
    "mobilenetv1_100": 4_253_864,
    "mobilenetv2_100": 3_538_984,
    "densenet121": 8_062_504,
    "tf_efficientnet_b0": 5_330_571,
    "vgg19": 143_667_240,
    "resnet101": 44_707_176,
    "resnet152": 60_419_944,
    "densenet169": 14_307_880,
    "densenet201": 20_242_984,
    "tf_efficientnet_b1": 7_856_239,
    "tf_efficientnet_b2": 9_177_569,
    "tf_efficientnet_b3": 12_320_535,
    "tf_efficientnet_b4": 19_466_823,
    "tf_efficientnet_b5": 30_562_527,
    "tf_efficientnet_b6": 43_265_143,
    "tf_efficientnet_b7": 66_658_687,
}
NOW = ("vgg16", "mobilenetv1_100")


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in NOW else SLOW) for x in COUNTS])
def test_a_file_has_the_numbers_that_keras_documents(name):
    variant = models.get(models.get(name).flavours.get("keras", name))
    network = variant.module(num_classes=1000)
    tree = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 96, 96, 3))))
    table, count = variant.layouts["keras"], 0
    for leaf, value in trees.flatten(tree).items():
        keys, transform = conversion.sources_of(table, leaf)
        count += sum(int(np.prod(shape)) for shape in conversion.source_shapes(transform, value.shape))
        assert {key.rpartition("/")[0] for key in keys} <= {*table.modules, "predictions", "conv_preds"}
    extra = table.pixels.export(variant.card.mean, variant.card.std)
    assert count + sum(array.size for array in extra.values()) == COUNTS[name]


def test_biases_before_norms_and_pixels_come_in_and_go_out():
    table = models.get("resnet50").layouts["keras"]
    keys, transform = conversion.sources_of(table, "batch_stats/backbone/stage1/block0/shortcut/norm/mean")
    assert keys == ("conv2_block1_0_bn/moving_mean", "conv2_block1_0_conv/bias")
    assert transform.load(np.float32([3]), np.float32([1])) == 2 and [x[0] for x in transform.export(np.ones(1))] == [
        1,
        0,
    ]
    pixels = models.get("tf_efficientnet_b0").layouts["keras"].pixels
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    published = {"normalization_1/mean": np.float32(mean), "normalization_1/variance": np.float32(std)}
    assert pixels.load(published) == pixels.load(pixels.export(mean, std)) == {"mean": mean, "std": std}
    own = {"normalization_1/mean": np.zeros(3), "normalization_1/variance": np.float32([4, 9, 1])}
    assert pixels.load(own) == {"mean": (0,) * 3, "std": (2, 3, 1)} and pixels.load({}) == {}


@pytest.mark.slow
def test_a_stride_in_the_first_convolution_reads_every_second_pixel():
    policy = resnet.ResNet(num_classes=0, depths=(1,)).policy
    make = {"width": 8, "drop_path": 0.0, "bottleneck": True, "groups": 1, "base_width": 64, "cifar": False}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 9, 4)), jnp.float32)
    first, none = (resnet.Block(**make, policy=policy, stride=stride, stride_first=stride == 2) for stride in (2, 1))
    variables = first.init(jax.random.key(0), x, False)
    close(first.apply(variables, x, False), none.apply(variables, x[:, ::2, ::2], False), 1e-6)


def test_pads_and_means_of_tensorflow():
    assert layers.pads_of("even", (3, 5), 2, (7, 8)) == ((0, 1), (1, 2))  # as for even sides, odd ones too
    assert layers.pads_of("same", (3, 5), 2, (7, 8)) == ((1, 1), (1, 2))
    assert layers.pads_of("even", (3, 3), 1, (7, 7)) == ((1, 1), (1, 1))
    branches, policy = ((("mean", (inception.Layer("one", 1, 1),), ()),), inception.Inception(num_classes=0).policy)
    for count, even in ((False, True), (True, False)):
        block = inception.Block(branches, count, policy)
        x = jnp.ones((1, 5, 5, 2))
        y = block.apply(jax.tree.map(jnp.ones_like, block.init(jax.random.key(0), x, False)), x, False)
        assert bool((abs(y - float(y[0, 2, 2, 0])) < 1e-6).all()) == even


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_norms_without_scales_are_norms_with_scales_of_one(train):
    small = {"depths": (1, 1), "widths": (8, 16), "num_classes": 3}
    with_, without = (resnet.ResNet(**small, norm_scale=scale) for scale in (True, False))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 16, 3)), jnp.float32)
    variables = jax.jit(without.init)(jax.random.key(0), x)
    flat = trees.flatten(variables)
    assert not any(path.endswith("/scale") for path in flat)
    ones = {path.replace("/bias", "/scale"): jnp.ones_like(x) for path, x in flat.items() if "/norm" in path}
    ones = {path: x for path, x in ones.items() if path.endswith("/scale")}
    (a, _), b = without.apply(variables, x, train, mutable=["batch_stats"])
    (c, _), d = with_.apply(trees.unflatten({**flat, **ones}), x, train, mutable=["batch_stats"])
    for own, other in zip(jax.tree.leaves((a, b)), jax.tree.leaves((c, d)), strict=True):
        np.testing.assert_array_equal(own, other)


# Of keras.applications: the model and its arguments, the layer of the last map, the side of the image.
CASES = {
    "mobilenetv1_025": ("MobileNet", {"alpha": 0.25}, "conv_pw_13_relu", 65),
    "mobilenetv1_050": ("MobileNet", {"alpha": 0.5}, "conv_pw_13_relu", 64),
    "mobilenetv2_035": ("MobileNetV2", {"alpha": 0.35}, "out_relu", 65),
    "mobilenetv2_140": ("MobileNetV2", {"alpha": 1.4}, "out_relu", 64),
    "tf_mobilenetv3_small_100": ("MobileNetV3Small", {"include_preprocessing": False}, "", 65),
    "tf_mobilenetv3_large_075": ("MobileNetV3Large", {"alpha": 0.75, "include_preprocessing": False}, "", 65),
    "resnet50": ("ResNet50", {}, "conv5_block3_out", 75),
    "densenet121": ("DenseNet121", {}, "relu", 65),
    "inception_v3": ("InceptionV3", {}, "mixed10", 97),
    "tf_efficientnet_b0": ("EfficientNetB0", {}, "top_activation", 65),
    "tf_efficientnet_b1": ("EfficientNetB1", {}, "top_activation", 65),
    "vgg16": ("VGG16", {}, "block5_pool", 225),  # which makes 7x7 pixels of the last map; 4 GB
    "vgg19": ("VGG19", {"include_top": False}, "block5_pool", 65),
}
PREPROCESSED = {
    "VGG16": "vgg16",
    "VGG19": "vgg19",
    "ResNet50": "resnet",
    "DenseNet121": "densenet",
    "EfficientNetB0": "efficientnet",
}
PREPROCESSED["EfficientNetB1"] = "efficientnet"


@pytest.fixture(scope="module")
def keras():
    """Keras 3 on jax; skips where it is not installed."""
    os.environ["KERAS_BACKEND"] = "jax"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("keras", reason="keras is in requirements-dev.txt")
    assert found.backend.backend() == "jax"
    return found


def randomize(model, seed):
    """Draws every weight and statistic anew, at a scale that keeps activations near one."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        noise, name = rng.standard_normal(weight.shape), weight.path.rpartition("/")[-1]
        depthwise = len(weight.shape) == 4 and weight.shape[-1] == 1
        if name in ("moving_variance", "variance"):
            weight.assign(0.5 + rng.random(weight.shape))
        elif name == "gamma":
            weight.assign(1 + 0.1 * noise)
        elif name != "count":
            fan_in = np.prod(weight.shape[: 2 if depthwise else -1]) if len(weight.shape) > 1 else 100
            weight.assign(noise / np.sqrt(fan_in))


def run(keras, model, last, pixels):
    """Logits and the map of the layer `last` in evaluation mode."""
    outputs = [model.output, model.get_layer(last).output if last else model.output]
    both = keras.Model(model.input, outputs)
    values = [[x.value for x in kind] for kind in (both.trainable_variables, both.non_trainable_variables)]
    return jax.jit(lambda values, x: both.stateless_call(*values, x, training=False)[0])(values, pixels)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW if name == "mobilenetv1_025" else EXHAUSTIVE) for name in CASES]
)
@pytest.mark.filterwarnings("ignore")
@jax.numpy_rank_promotion("allow")  # Keras relies on it
def test_keras_files_give_the_numbers_of_keras_and_go_back(name, keras, tmp_path):
    make, arguments, last, side = CASES[name]
    given = {"weights": None, "input_shape": (side, side, 3), "classes": 7, "classifier_activation": None}
    model = getattr(keras.applications, make)(**arguments, **given)
    randomize(model, 0)
    keras.src.legacy.saving.legacy_h5_format.save_model_to_hdf5(model, str(tmp_path / "w.h5"))
    model.save_weights(tmp_path / "other.weights.h5")
    top = arguments.get("include_top", True)
    loaded, other = (load.load(name, tmp_path / x, None if top else 0) for x in ("w.h5", "other.weights.h5"))
    for ours, theirs in zip(*(jax.tree.leaves(x.variables) for x in (loaded, other)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (loaded.layout, loaded.card.num_classes) == (("keras", 7) if top else ("keras_notop", 0))
    assert (other.layout, other.card.mean) == (loaded.layout, loaded.card.mean)
    tensors, _ = formats.read(tmp_path / "w.h5")
    assert load.candidates(tensors) == [(name, loaded.layout)]
    assert sum(array.size for array in tensors.values()) == model.count_params()

    pixels = np.random.default_rng(1).integers(0, 256, (2, side, side, 3)).astype(np.float32)
    prepare = getattr(keras.applications, PREPROCESSED.get(make, "mobilenet")).preprocess_input
    mean, std = np.float32(loaded.card.mean), np.float32(loaded.card.std)
    x = (pixels / 255 - mean) / std
    logits, features = run(keras, model, last, prepare(pixels.copy()))
    ours, out = jax.jit(loaded.model.apply)(loaded.variables, x)
    close(ours, logits if top else np.mean(features, (1, 2)))
    if last:
        close(out[loaded.model.cuts[-2]], features)

    changed = jax.tree.map(lambda leaf: leaf * 1.01, loaded.variables)  # as if fine-tuned
    load.export(changed, loaded.card.model, tmp_path / "out.h5", card=loaded.card)
    randomize(model, 1)
    model.load_weights(tmp_path / "out.h5")  # by order, names do not matter
    theirs = np.asarray(run(keras, model, "", prepare(pixels.copy()))[0])
    close(jax.jit(loaded.model.apply)(changed, x)[0], theirs if top else theirs.mean((1, 2)))
    again = load.load("", tmp_path / "out.h5")
    assert again.card == loaded.card
    for before, after in zip(*(jax.tree.leaves(x) for x in (changed, again.variables)), strict=True):
        close(before, after, 1e-6)


def test_inspect_names_the_model_and_what_it_needs(tmp_path, monkeypatch):
    variant = models.get("mobilenetv1_025.keras")
    shapes = jax.eval_shape(variant.module(num_classes=4).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    card = variant.card.replace(num_classes=4)
    load.export(variables, card.model, tmp_path / "own.h5", card=card)
    tensors, _ = formats.read(tmp_path / "own.h5")
    formats.write(tmp_path / "foreign.h5", tensors, {})
    with monkeypatch.context() as few:
        few.setattr(load.models, "MODELS", {name: models.get(name) for name in ("mobilenetv1_025", card.model)})
        text = inspection.inspect(tmp_path / "foreign.h5")
    assert "fits mobilenetv1_025 (layout keras), loaded as mobilenetv1_025.keras: 224 px with mean (0.5, 0.5" in text
    assert Card.from_json(inspection.inspect(tmp_path / "own.h5").rpartition("card ")[-1]) == card
    notop = {key: array for key, array in tensors.items() if not key.startswith("conv_preds")}
    formats.write(tmp_path / "notop.h5", notop, {})
    with pytest.raises(ValueError, match="the file has no head: give num_classes for a new one, or 0 for none"):
        load.load("mobilenetv1_025", tmp_path / "notop.h5")
    assert load.load("mobilenetv1_025", tmp_path / "notop.h5", 3).card.model == card.model
