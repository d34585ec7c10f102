"""VGG, Inception-v3, DenseNet and SqueezeNet: parity with torchvision, timm and the equations of Keras, both ways."""

import copy
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import COUNTS, random_variables
from test_pretrained import CLASSES, add_variants, close, images

from tl_jax import models
from tl_jax.core import trees
from tl_jax.models import conversion, densenet, inception, squeezenet, vgg
from tl_jax.weights import formats, load

SMALL_VGG = {"depths": (1, 2, 1, 1, 2), "widths": (4, 8, 8, 8, 12), "features": 24}
SMALL_DENSENET = {"depths": (2, 3, 1, 2), "growth": 8}
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)


@pytest.fixture
def reference():
    """The torch side; skips the test where torch is not installed."""
    return pytest.importorskip("torch_reference")


def add_vgg(monkeypatch, norm=False, **fields):
    return add_variants(monkeypatch, vgg.vgg_variants("small_vgg", {**SMALL_VGG, "norm": norm, **fields}, not norm))


def add_densenet(monkeypatch):
    variant = models.get("densenet121")
    module = functools.partial(densenet.DenseNet, **SMALL_DENSENET)
    return add_variants(
        monkeypatch,
        {"small_densenet": variant._replace(module=module, card=variant.card.replace(model="small_densenet"))},
    )


def small_torch_vgg(publisher, norm):
    """torchvision's or timm's VGG with the sizes of SMALL_VGG."""
    nn = pytest.importorskip("torch").nn
    sizes = [v for d, w in zip(SMALL_VGG["depths"], SMALL_VGG["widths"], strict=True) for v in (*[w] * d, "M")]
    if publisher == "timm":
        theirs = pytest.importorskip("timm.models.vgg")
        model = theirs.VGG(sizes, CLASSES, norm_layer=nn.BatchNorm2d if norm else None)
        model.pre_logits = theirs.ConvMlp(12, 24, 7, drop_rate=0.0)
        model.head = theirs.ClassifierHead(24, CLASSES, pool_type="avg")
        return model
    from torchvision.models import vgg as theirs

    model = theirs.VGG(theirs.make_layers(sizes, norm), CLASSES, dropout=0.0)
    model.classifier[0], model.classifier[3] = nn.Linear(12 * 49, 24), nn.Linear(24, 24)
    model.classifier[6] = nn.Linear(24, CLASSES)
    return model


def vgg_parts(model, norm=None):
    """The last layers of the stem and of the stages."""
    kinds = [type(layer).__name__ for layer in model.features]
    pools = [i for i, kind in enumerate(kinds) if kind == "MaxPool2d"]
    stem = model.features[kinds.index("ReLU")]
    return {"stem": stem, **{f"stage{i}": model.features[pool] for i, pool in enumerate(pools, 1)}}


def small_torch_densenet(publisher):
    theirs = pytest.importorskip("timm.models.densenet") if publisher == "timm" else None
    if theirs is None:
        from torchvision.models import densenet as theirs
    return theirs.DenseNet(
        8, SMALL_DENSENET["depths"], num_classes=CLASSES, **({} if publisher == "timm" else {"num_init_features": 16})
    )


def densenet_parts(model):
    stages = {f"stage{i}": getattr(model.features, f"denseblock{i}") for i in range(1, 5)}
    return {"stem": model.features.pool0, **stages}


def inception_parts(model):
    blocks = {f"stage{i}": [getattr(model, name) for name in stage] for i, stage in enumerate(inception.STAGES, 1)}
    parts = {f"{stage}/block{j}": block for stage, found in blocks.items() for j, block in enumerate(found[:-1])}
    stem = model.maxpool2 if hasattr(model, "maxpool2") else model.Pool2
    return {"stem": stem, **parts, **{stage: found[-1] for stage, found in blocks.items()}}


def squeezenet_parts(model):
    fires = [layer for layer in model.features if type(layer).__name__ == "Fire"]
    cuts = (
        models.get("squeezenet1_0" if model.features[0].kernel_size == (7, 7) else "squeezenet1_1")
        .module(num_classes=1)
        .cuts
    )
    return {"stem": model.features[2], **dict(zip(cuts[1:-1], fires, strict=True))}


def check_both_ways(reference, tmp_path, model, parts, name, x, layout, again):
    """Our logits and stages are theirs; an export loads strictly into `again`, a new network, with the same logits."""
    expected, features = reference.record(reference.randomize(model), parts, x)
    loaded = load.load(name, reference.save(model, tmp_path / "w.pth"))
    assert loaded.layout == layout and "new" not in loaded.origins.values()
    logits, out = jax.jit(loaded.model.apply)(loaded.variables, x)
    close(logits, expected)
    assert set(features) == set(parts)
    for key, value in features.items():
        close(out[key], value)
    load.export(loaded.variables, name, tmp_path / "out.safetensors", card=loaded.card, layout=layout)
    state = pytest.importorskip("safetensors.torch").load_file(tmp_path / "out.safetensors")
    again.load_state_dict(state, strict=True)
    np.testing.assert_array_equal(reference.record(again.eval(), {}, x)[0], expected)
    return loaded


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("publisher", "norm"),
    [
        ("torchvision", True),
        ("timm", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("torchvision", False), ("timm", True))),
    ],
)
def test_small_vgg_is_theirs_both_ways(publisher, norm, reference, tmp_path, monkeypatch):
    name, make = add_vgg(monkeypatch, norm), functools.partial(small_torch_vgg, publisher, norm)
    model, x = make(), images(75, batch=1)  # 2x2 pixels are enlarged to 7x7
    loaded = check_both_ways(reference, tmp_path, model, vgg_parts(model), name, x, publisher, make())
    assert loaded.card.model == name
    if publisher == "torchvision":  # 9x8 pixels, none of them whole multiples of 7
        x = np.concatenate([images(288, batch=1)[:, :, :256]])
        close(jax.jit(loaded.model.apply)(loaded.variables, x)[0], reference.record(model, {}, x)[0])


@pytest.mark.parametrize("publisher", ["timm", pytest.param("torchvision", marks=pytest.mark.slow)])
def test_small_densenet_is_theirs_both_ways(publisher, reference, tmp_path, monkeypatch):
    name, model = add_densenet(monkeypatch), small_torch_densenet(publisher)
    parts = {**densenet_parts(model), "norm": model.features.norm5}
    if publisher == "torchvision":  # its norm5 goes without the ReLU
        del parts["norm"]
    again = small_torch_densenet(publisher)
    check_both_ways(reference, tmp_path, model, parts, name, images(75, batch=1), "timm", again)
    pattern = r"(denselayer\d+\.(?:norm|conv))([12])"
    old = {re.sub(pattern, r"\1.\2", key): value for key, value in model.state_dict().items()}
    assert "features.denseblock1.denselayer2.norm.2.weight" in old
    reference.torch.save(old, tmp_path / "old.pth")
    ours, theirs = (load.load(name, tmp_path / file).variables for file in ("old.pth", "w.pth"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def torchvision_inception(**fields):
    return pytest.importorskip("torchvision").models.Inception3(CLASSES, init_weights=False, **fields)


@pytest.mark.slow
def test_inception_is_torchvisions_with_and_without_its_auxiliary_head(reference, tmp_path, monkeypatch):
    variant = models.get("inception_v3.aux")
    module = functools.partial(inception.Inception, aux=CLASSES)
    kept = add_variants(monkeypatch, {"kept": variant._replace(module=module, card=variant.card.replace(model="kept"))})
    model, x = torchvision_inception(transform_input=True), images(107, batch=1)
    again = torchvision_inception(transform_input=True, aux_logits=True)
    ours = x * 0.5 + 0.5  # what the card of ours takes to x, that of torchvision's transform_input takes to:
    theirs = (ours - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    expected, features = reference.record(reference.randomize(model), inception_parts(model), theirs)
    loaded = load.load(kept, reference.save(model, tmp_path / "w.pth"))
    logits, out = jax.jit(loaded.model.apply)(loaded.variables, x)
    close(logits, expected)
    for key, value in features.items():
        close(out[key], value)
    assert set(features) == set(loaded.model.cuts) - {"pre_logits"} and "aux_logits" not in out, "the map is too small"
    maps = np.random.default_rng(1).standard_normal((2, 17, 17, 768)).astype(np.float32)
    aux = jax.jit(functools.partial(loaded.model.apply, start="stage2"))(loaded.variables, maps)[1]["aux_logits"]
    close(aux, reference.record(model.AuxLogits, {}, maps)[0])
    load.export(loaded.variables, kept, tmp_path / "kept.safetensors", card=loaded.card)
    load_file = pytest.importorskip("safetensors.torch").load_file
    again.load_state_dict(load_file(tmp_path / "kept.safetensors"), strict=True)
    np.testing.assert_array_equal(reference.record(again.eval(), {}, theirs)[0], expected)

    dropped = load.load("inception_v3", tmp_path / "w.pth")
    assert not any("final" in leaf for leaf in dropped.origins) and dropped.card.mean == (0.5, 0.5, 0.5)
    close(jax.jit(dropped.model.apply)(dropped.variables, x)[0], expected)
    load.export(dropped.variables, "inception_v3", tmp_path / "dropped.safetensors", card=dropped.card)
    again = torchvision_inception(transform_input=True, aux_logits=False)
    again.load_state_dict(load_file(tmp_path / "dropped.safetensors"), strict=True)
    np.testing.assert_array_equal(reference.record(again.eval(), {}, theirs)[0], expected)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_inception_is_timms_at_its_own_size(reference, tmp_path):
    make = functools.partial(pytest.importorskip("timm").create_model, "inception_v3", num_classes=CLASSES)
    model = make()
    parts = inception_parts(model)
    check_both_ways(reference, tmp_path, model, parts, "inception_v3", images(299, batch=1), "timm", make())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["squeezenet1_1", pytest.param("squeezenet1_0", marks=EXHAUSTIVE)])
def test_squeezenet_is_torchvisions_both_ways(name, reference, tmp_path):
    get_model = pytest.importorskip("torchvision.models").get_model
    model, again = (get_model(name, num_classes=CLASSES) for _ in range(2))
    x = images(75, batch=1)
    loaded = check_both_ways(reference, tmp_path, model, squeezenet_parts(model), name, x, "torchvision", again)
    assert loaded.card.head == loaded.model.head == squeezenet.BY_PIXEL
    for size in (41, 42, 43, 44):  # the windows that end outside are all met
        x = images(size)
        close(jax.jit(loaded.model.apply)(loaded.variables, x)[0], reference.record(model, {}, x)[0])


@pytest.mark.slow
def test_a_new_head_of_squeezenet_is_the_published_one_without_its_relu(tmp_path):
    name, path, x = "squeezenet1_1", tmp_path / "w.safetensors", images(64)
    published = models.get(name).module(num_classes=CLASSES, head=squeezenet.BY_PIXEL)
    variables = random_variables(published, 64)
    logits, out = jax.jit(published.apply)(variables, x)
    out_layer = variables["params"]["head"]["out"]
    by_pixel = np.float64(out["stage3"]) @ np.float64(out_layer["kernel"]) + out_layer["bias"]
    close(logits, np.maximum(by_pixel, 0).mean((1, 2)))
    close(out["embedding"], out["pre_logits"])
    card = models.get(name).card.replace(num_classes=CLASSES)
    load.export(variables, name, path, card=card)
    assert formats.read(path)[0]["classifier.1.weight"].shape == (CLASSES, 512, 1, 1)

    new = load.load(name, path, 3, head_init="lecun", seed=1)
    assert new.card.head == new.model.head == () and new.dropped == ("classifier.1.bias", "classifier.1.weight")
    plain = {**new.variables, "params": {**new.variables["params"], "head": out_layer}}
    close(jax.jit(published.clone(head=()).apply)(plain, x)[0], by_pixel.mean((1, 2)))  # mean and dense layer commute
    load.export(new.variables, name, tmp_path / "new.safetensors", card=new.card)
    assert not any(key.startswith("classifier") for key in formats.read(tmp_path / "new.safetensors")[0])
    again = load.load(name, tmp_path / "new.safetensors")
    assert again.card == new.card
    jax.tree.map(np.testing.assert_array_equal, again.variables, new.variables)


def test_a_head_by_pixel_of_zeros_learns():
    model = models.get("squeezenet1_1").module(num_classes=3, head=(("by_pixel", {}), ("dense", {"features": 4})))
    maps = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 512)), jnp.float32)
    variables = jax.jit(functools.partial(model.init, start="stage3"))(jax.random.key(0), maps)
    gradient = jax.jit(jax.grad(lambda v: model.apply(v, maps, start="stage3")[0][:, 0].sum()))(variables)
    assert np.abs(gradient["params"]["head"]["out"]["kernel"]).max() > 0
    with pytest.raises(ValueError, match=r"model\.head begins with by_pixel, but the backbone's output"):
        models.get("mlp_small").module(num_classes=3, head=squeezenet.BY_PIXEL).init(
            jax.random.key(0), jnp.zeros((1, 4))
        )


def keras_file(rng, depths=SMALL_VGG["depths"], widths=SMALL_VGG["widths"], features=SMALL_VGG["features"]):
    """Random arrays of a small VGG by layer, as Keras keeps them: {layer: (kernel, bias)}."""
    sizes = {}
    channels = 3
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
        for j in range(1, depth + 1):
            sizes[f"block{i}_conv{j}"], channels = (3, 3, channels, width), width
    sizes |= {"fc1": (49 * channels, features), "fc2": (features, features), "predictions": (features, CLASSES)}
    kernels = {name: rng.standard_normal(size) / np.sqrt(np.prod(size[:-1])) for name, size in sizes.items()}
    kernels["block1_conv1"] /= 100  # its input goes to 255
    return {name: (np.float32(w), np.float32(0.1 * rng.standard_normal(w.shape[-1]))) for name, w in kernels.items()}


def keras_forward(torch, layers, pixels):
    """Keras' VGG on RGB pixels of 0 to 255, in float64: the map before flatten and the logits."""
    run = torch.nn.functional
    bgr = np.float64(pixels)[..., ::-1] - np.float64([103.939, 116.779, 123.68])
    x = torch.tensor(np.moveaxis(bgr, -1, 1).copy())
    for name, (kernel, bias) in layers.items():
        kernel, bias = torch.tensor(np.float64(kernel)), torch.tensor(np.float64(bias))
        if "conv" in name:
            x = run.relu(run.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=1))
            block, number = name.removeprefix("block").split("_conv")
            x = run.max_pool2d(x, 2) if int(number) == SMALL_VGG["depths"][int(block) - 1] else x
        else:
            if name == "fc1":
                maps, x = x, x.permute(0, 2, 3, 1).flatten(1)
            x = x @ kernel + bias
            x = x if name == "predictions" else run.relu(x)
    return np.moveaxis(maps.numpy(), 1, -1), x.numpy()


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("spelling", "top"),
    [
        ("{0}/{0}_{2}_1:0", True),
        ("{0}/{0}/{1}:0", False),
        ("model_weights/{0}/{0}/{1}", True),
        ("model_weights/vgg16/{0}/{1}:0", False),
        ("by class", True),
    ],
    ids=["keras1", "keras2", "keras3", "inside", "by_class"],
)
def test_keras_vgg_gives_the_logits_of_its_equations(spelling, top, reference, tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    name, arrays = add_vgg(monkeypatch), keras_file(np.random.default_rng(0))
    for old, depths in {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}.items():
        assert models.get(old).module.keywords["depths"] == depths and models.get(f"{old}.keras").card.mean[0] > 0.48
    kept = {layer: pair for layer, pair in arrays.items() if top or "conv" in layer}
    convs, dense = [x for x in arrays if "conv" in x], ["fc1", "fc2", "predictions"]
    kinds = {
        x: f"{kind}{f'_{i}' * (i > 0)}" for kind, xs in (("conv2d", convs), ("dense", dense)) for i, x in enumerate(xs)
    }
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for layer, pair in kept.items():
            for i, (leaf, old) in enumerate((("kernel", "W"), ("bias", "b"))):
                path = spelling.format(layer, leaf, old)
                file[path if spelling != "by class" else f"layers/{kinds[layer]}/vars/{i}"] = pair[i]
        file["optimizer_weights/Adam/iterations:0"], file["model_weights/input_1/no"] = 3, np.zeros(0)
        del file["model_weights/input_1/no"]  # layers without weights are there, empty
    loaded = load.load(name, tmp_path / "w.h5", None if top else 0)
    flavour = "keras" if top else "keras_notop"
    assert (loaded.layout, loaded.card.model) == (flavour, f"small_vgg.{flavour}")
    pixels = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3))
    x = (np.float32(pixels) / np.float32(loaded.card.divisor) - np.float32(loaded.card.mean)) / np.float32(
        loaded.card.std
    )
    logits, out = jax.jit(loaded.model.apply)(loaded.variables, x)
    maps, expected = keras_forward(reference.torch, arrays, pixels)
    close(out["stage5"], maps)
    close(logits, expected if top else maps.mean((1, 2)))
    load.export(loaded.variables, name, tmp_path / "out.h5", card=loaded.card)
    with h5py.File(tmp_path / "out.h5") as file:
        assert list(file.attrs["layer_names"]) == [layer.encode() for layer in kept]
        for layer, pair in kept.items():
            names = file[layer].attrs["weight_names"]
            assert list(names) == [f"{layer}/{leaf}:0".encode() for leaf in ("kernel", "bias")]
            for path, array in zip(names, pair, strict=True):
                np.testing.assert_array_equal(file[layer][path], array)
    assert load.load("", tmp_path / "out.h5").card == loaded.card
    load.export(loaded.variables, name, tmp_path / "timm.safetensors", card=loaded.card)
    assert load.load(name, tmp_path / "timm.safetensors").card == loaded.card


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("densenet121", marks=pytest.mark.slow),
        pytest.param("vgg11_bn", marks=EXHAUSTIVE),
        *(
            pytest.param(name, marks=EXHAUSTIVE)
            for name in (*vgg.VARIANTS, *densenet.VARIANTS)
            if "." not in name and name not in ("vgg11_bn", "densenet121")
        ),
    ],
)
@pytest.mark.parametrize("publisher", ["torchvision", pytest.param("timm", marks=EXHAUSTIVE)])
def test_whole_networks_are_theirs_both_ways(name, publisher, reference, tmp_path):
    library = pytest.importorskip("timm" if publisher == "timm" else "torchvision.models")
    create = library.create_model if publisher == "timm" else library.get_model
    model, again = (create(name, num_classes=CLASSES) for _ in range(2))
    parts, layout = (vgg_parts(model), publisher) if "vgg" in name else (densenet_parts(model), "timm")
    check_both_ways(reference, tmp_path, model, parts, name, images(97, batch=1), layout, again)


NAMES = [name for family in (vgg, densenet, squeezenet) for name in family.VARIANTS if "." not in name]


@pytest.mark.parametrize("name", [*NAMES, "inception_v3"])
def test_card_and_parameters_are_those_of_torchvisions_weights(name, reference):
    weights = pytest.importorskip("torchvision.models").get_model_weights(name).IMAGENET1K_V1
    card, given = models.get(name).card, weights.transforms()
    assert (card.input_size, math.floor(card.input_size / card.crop)) == (given.crop_size[0], given.resize_size[0])
    assert card.interpolation == given.interpolation.value
    if name != "inception_v3":  # whose own transform_input follows
        assert (card.mean, card.std) == (tuple(given.mean), tuple(given.std))
    assert COUNTS["inception_v3.aux" if name == "inception_v3" else name] == weights.meta["num_params"]


@pytest.mark.parametrize(
    "name, tag",
    [
        *((name, "tv_in1k") for name in vgg.VARIANTS if "." not in name),
        ("inception_v3", "tv_in1k"),
        ("inception_v3.gluon", "gluon_in1k"),
    ],
)
def test_card_is_timms(name, tag, reference):
    card = models.get(name).card
    given = pytest.importorskip("timm").get_pretrained_cfg(f"{name.partition('.')[0]}.{tag}")
    assert (card.mean, card.std, card.input_size) == (given.mean, given.std, given.input_size[-1])
    if name != "inception_v3":  # timm resizes it bicubically and to 341 pixels, torchvision bilinearly and to 342
        assert (card.interpolation, card.crop) == (given.interpolation, given.crop_pct)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "vgg",
        pytest.param("densenet", marks=pytest.mark.slow),
        pytest.param("inception", marks=EXHAUSTIVE),
        pytest.param("squeezenet", marks=EXHAUSTIVE),
    ],
)
def test_a_training_steps_gradient_is_torchs(family, reference, tmp_path, monkeypatch):
    torch, size, name = reference.torch, 75, "inception_v3"
    if family == "vgg":
        name, model = add_vgg(monkeypatch, norm=True), small_torch_vgg("torchvision", norm=True)
    elif family == "densenet":
        name, model = add_densenet(monkeypatch), small_torch_densenet("torchvision")
    elif family == "squeezenet":
        name, model = (
            "squeezenet1_0",
            pytest.importorskip("torchvision").models.squeezenet1_0(num_classes=CLASSES, dropout=0.0),
        )
    else:
        model, size = torchvision_inception(aux_logits=False, dropout=0.0), 139
    reference.randomize(model).train()
    loaded, x = load.load(name, reference.save(model, tmp_path / "w.pth")), images(size, batch=4)

    def gradients(model, dtype):
        torch.sin(model(torch.tensor(np.moveaxis(x, -1, 1).copy(), dtype=dtype))).sum().backward()
        return {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}

    def loss(params):
        return jnp.sin(
            loaded.model.apply({**loaded.variables, "params": params}, x, True, mutable=["batch_stats"])[0][0]
        ).sum()

    params = loaded.variables["params"]
    shapes = {f"params/{path}": leaf.shape for path, leaf in trees.flatten(params).items()}
    exact = gradients(copy.deepcopy(model).double(), torch.float64)
    rounding = {key: np.abs(gradient - exact[key]) for key, gradient in gradients(model, torch.float32).items()}
    table = models.get(name).layouts[loaded.layout]
    (expected, _, problems), (noise, *_) = (conversion.fill(table, shapes, its) for its in (exact, rounding))
    assert not problems
    scale = max(np.abs(leaf).max() for leaf in expected.values())
    ratios = []
    for path, leaf in trees.flatten(jax.jit(jax.grad(loss))(params)).items():
        assert np.isfinite(leaf).all()
        # What BatchNorm cancels, such as the bias before it, has a gradient of rounding errors alone.
        error = np.abs(leaf - expected[f"params/{path}"]).max()
        bound = 1e-3 * max(np.abs(expected[f"params/{path}"]).max(), 1e-2 * scale)
        ratios.append(error / (bound + (noise[f"params/{path}"].max() if family == "inception" else 0)))
    if family == "inception":  # relus on few pixels flip by rounding, in torch as here
        assert np.median(ratios) <= 1 and np.mean(np.array(ratios) > 3) < 0.1
    else:
        assert max(ratios) <= 1


def test_heads_read_the_last_map_of_vgg_and_dropout_makes_its_features_random():
    model = models.get("vgg16").module(num_classes=3, head=(("flatten", {}), ("dense", {"features": 8})))
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert tree["params"]["head"]["dense1"]["kernel"].shape == (7 * 7 * 512, 8)
    assert model.deterministic_cuts == model.cuts
    assert model.clone(dropout=0.5).deterministic_cuts == model.cuts[:-1]
    small = vgg.VGG(num_classes=3, **SMALL_VGG, dropout=0.5)
    variables, maps = random_variables(small, 32), images(7)[..., :1] * np.ones(12, np.float32)
    apply = functools.partial(small.apply, variables, maps, True, start="stage5")
    first, second = (apply(rngs={"dropout": jax.random.key(seed)})[1]["pre_logits"] for seed in (0, 1))
    assert not np.array_equal(first, second)
    densely = models.get("densenet121").module(num_classes=3, head=(("pool", {}),))
    assert densely.cuts[-2:] == ("norm", "pre_logits")
