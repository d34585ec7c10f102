"""MobileNets and EfficientNets: counts, cards, parity with timm and torchvision, exports, training, genuine weights."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_models as common
from test_pretrained import CLASSES, close, random_variables

from tl_jax import models
from tl_jax.core import trees
from tl_jax.data.image import ops
from tl_jax.methods import rules
from tl_jax.models import conversion, efficientnet, mobilenet, peft
from tl_jax.models.mobile import MobileNet, Row
from tl_jax.weights import formats, load

# As timm and torchvision publish them; TensorFlow's forms (tf_) have the same.
COUNTS = {
    "mobilenetv1_025": 470072,
    "mobilenetv1_050": 1331592,
    "mobilenetv1_075": 2585560,
    "mobilenetv1_100": 4231976,
    "mobilenetv1_125": 6270840,
    "mobilenetv2_035": 1677128,
    "mobilenetv2_050": 1968680,
    "mobilenetv2_075": 2636424,
    "mobilenetv2_100": 3504872,
    "mobilenetv2_110d": 4516520,
    "mobilenetv2_120d": 5831144,
    "mobilenetv2_140": 6108776,
    "mobilenetv3_large_075": 3993528,
    "mobilenetv3_large_100": 5483032,
    "mobilenetv3_small_050": 1593224,
    "mobilenetv3_small_075": 2041872,
    "mobilenetv3_small_100": 2542856,
    "efficientnet_b0": 5288548,
    "efficientnet_b1": 7794184,
    "efficientnet_b2": 9109994,
    "efficientnet_b3": 12233232,
    "efficientnet_b4": 19341616,
    "efficientnet_b5": 30389784,
    "efficientnet_b6": 43040704,
    "efficientnet_b7": 66347960,
    "efficientnetv2_s": 21458488,
    "efficientnetv2_m": 54139356,
    "efficientnetv2_l": 118515272,
    "efficientnet_lite0": 4652008,
}
COUNTS |= {f"tf_{name}": count for name, count in COUNTS.items() if f"tf_{name}" in models.MODELS}
TORCHVISION = {  # our name: torchvision's
    "mobilenetv2_100": "mobilenet_v2",
    "mobilenetv3_large_100": "mobilenet_v3_large",
    "mobilenetv3_small_100": "mobilenet_v3_small",
    **{f"efficientnet_b{i}": f"efficientnet_b{i}" for i in range(8)},
    **{f"efficientnetv2_{size}": f"efficientnet_v2_{size}" for size in "sml"},
}
NOT_IN_TIMM = ("mobilenetv1_025", "mobilenetv1_050", "mobilenetv1_075")
NOW = ("mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0")
SOON = ("tf_mobilenetv3_small_100", "tf_efficientnet_lite0", "efficientnetv2_s", "tf_efficientnet_b0")


def some(names, now=NOW):
    """The names as cases: a few at once, some more are slow, the others are exhaustive."""
    slow, all_of_it = pytest.mark.slow, (pytest.mark.slow, pytest.mark.exhaustive)
    soon = {*NOW, *SOON}
    marks = {name: () if name in now else slow if name in soon else all_of_it for name in names}
    order = sorted(names, key=lambda name: (name not in now, name not in soon))
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in order])


@pytest.fixture
def reference():
    """The torch side; skips the test where torch is not installed."""
    return pytest.importorskip("torch_reference")


@pytest.fixture
def timm(reference):
    return pytest.importorskip("timm")


@pytest.fixture
def torchvision(reference):
    return pytest.importorskip("torchvision.models")


# One kind of block each, with and without expansion, squeeze and excite, a sum.
STAGES = (
    (Row("separable", 3, 1, 1, 8),),
    (Row("fused", 3, 1, 1, 8),),
    (Row("fused", 3, 2, 4, 16, 2),),
    (Row("inverted", 5, 2, 1.5, 24, 1, True, "relu"), Row("inverted", 3, 1, 3, 24, 1, True)),
)
SMALL = functools.partial(MobileNet, stages=STAGES, stem=8, final=40, dense=32, act="hard_swish", hard=True)


def test_the_last_convolution_is_a_cut_of_its_own_and_trains_with_the_last_block():
    model = SMALL(num_classes=5)
    variables = common.random_variables(model)
    _, out = jax.eval_shape(model.apply, variables, common.images())
    assert model.cuts == (
        "stem",
        "stage1",
        "stage2",
        "stage3/block0",
        "stage3",
        "stage4/block0",
        "stage4",
        "final",
        "pre_logits",
    )
    assert [out[cut].shape[1:] for cut in model.cuts[-3:]] == [(3, 3, 24), (3, 3, 40), (32,)]
    paths = list(trees.flatten(variables["params"]))
    last = [path for path in paths if re.match(rules.make_rules("last_k", paths, model.cuts, k=1)[1][0], path)]
    assert {path.split("/")[1] for path in last} == {"stage4", "final"} and "backbone/final/dense/kernel" in last
    assert {path.split("/")[2] for path in last if "stage4" in path} == {"block1"}
    factors = rules.layer_multipliers(paths, model.cuts, 0.5)
    places = (
        "stem/conv",
        "stage1/block0/conv2",
        "stage4/block0/se/reduce",
        "stage4/block1/conv3",
        "final/conv",
        "final/dense",
    )
    assert [factors[f"backbone/{place}/kernel"] for place in places] == [2.0**-7, 2.0**-6, 0.25, 0.5, 0.5, 0.5]
    assert "final" not in MobileNet(num_classes=5, stages=STAGES).cuts


def test_lora_goes_to_the_pointwise_convolutions_by_default():
    model = SMALL(num_classes=5)
    variables = common.random_variables(model)
    added = trees.flatten(peft.init(model, variables, (("lora", {}),), jax.random.key(0)))
    params = trees.flatten(variables["params"])
    expected = {path for path, leaf in params.items() if path.endswith("kernel") and leaf.shape[:-2] == (1, 1)}
    assert {re.sub("^lora/|/[ab]$", "", path) + "/kernel" for path in added} == expected
    assert "backbone/stage4/block0/conv1/kernel" in expected


def test_every_variant_is_counted():
    names = {name for family in (mobilenet, efficientnet) for name in family.VARIANTS if "." not in name}
    assert names == set(COUNTS)
    # The port has TensorFlow's numbers, which the network without its padding would not give.
    assert {name for name in names if "port" in models.get(name).layouts} == {"tf_efficientnet_lite0"}


@pytest.mark.thin(2)
@some(COUNTS)
def test_parameter_count_is_the_published_one(name):
    variant = models.get(name)
    tree = jax.eval_shape(variant.module(num_classes=1000).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) == COUNTS[name]


def test_cards_and_epsilons_are_timms(timm):
    for name in sorted(set(COUNTS) - set(NOT_IN_TIMM)):
        card, its = models.get(name).card, timm.get_pretrained_cfg(name)
        assert (card.mean, card.std, card.interpolation) == (its.mean, its.std, its.interpolation), name
        assert (card.crop, card.crop_mode, card.input_size) == (its.crop_pct, its.crop_mode, its.input_size[-1]), name
        model = models.get(name).module(num_classes=5)
        assert (model.same, model.norm_eps) == ((True, 1e-3) if name.startswith("tf_") else (False, 1e-5))
    for name in NOT_IN_TIMM:  # of the same preprocessing
        assert models.get(name).card == models.get("mobilenetv1_100").card.replace(model=name)


@pytest.mark.thin(5)
@some(TORCHVISION, now=TORCHVISION)
def test_card_epsilon_and_momentum_of_the_flavour_are_torchvisions(name, torchvision, reference):
    weights = next(iter(torchvision.get_model_weights(TORCHVISION[name])))  # the first that were published
    its, variant = weights.transforms(), models.get(f"{name}.tv")
    card, model = variant.card, variant.module(num_classes=5)
    assert (card.mean, card.std, card.interpolation) == (tuple(its.mean), tuple(its.std), its.interpolation.value)
    assert ([card.input_size], [int(card.input_size / card.crop)]) == (its.crop_size, its.resize_size)
    with reference.torch.device("meta"):
        norm = torchvision.get_model(TORCHVISION[name], weights=None).features[0][1]
    assert (model.norm_eps, model.norm_momentum) == pytest.approx((norm.eps, 1 - norm.momentum))


def depths(model):
    return [sum(row.repeats for row in rows) for rows in model.stages]


def timm_modules(theirs, ours):
    """The modules whose outputs are our cuts; MobileNetV3's last convolution is a stage of timm's."""
    count = len(ours.stages)
    stages = {f"stage{i}": theirs.blocks[i - 1] for i in range(1, count + 1)}
    behind = {"final": theirs.blocks[count] if len(theirs.blocks) > count else theirs.bn2} if ours.final else {}
    return {"stem": theirs.bn1, **stages, **behind}


def torchvision_modules(theirs, ours):
    """torchvision's MobileNets count the blocks through."""
    ends = np.cumsum(depths(ours)) if len(theirs.features) > len(ours.stages) + 2 else range(1, len(ours.stages) + 1)
    stages = {f"stage{i}": theirs.features[int(end)] for i, end in enumerate(ends, 1)}
    return {"stem": theirs.features[0], **stages, "final": theirs.features[-1]}


def check_both_ways(theirs, modules, name, layout, reference, folder, size=75):
    """Our network gives the logits and stages of theirs from a file, and theirs our logits from an export of ours."""
    x = np.random.default_rng(0).standard_normal((1, size, size - 8, 3)).astype(np.float32)
    loaded = load.load(name, reference.save(reference.randomize(theirs), folder / "w.pth"))
    assert loaded.layout == layout and "new" not in loaded.origins.values()
    expected, features = reference.record(theirs, modules(theirs, loaded.model), x)
    run = jax.jit(loaded.model.apply)
    logits, out = run(loaded.variables, x)
    close(logits, expected)
    for cut, value in features.items():
        close(out[cut], value)
    assert {cut for cut in loaded.model.cuts[:-1] if "/" not in cut} == set(features)
    changed = jax.tree.map(lambda leaf: leaf * 1.01, loaded.variables)  # as if fine-tuned
    load.export(changed, name, folder / "out.safetensors", card=loaded.card, layout=layout)
    state = {key: reference.torch.from_numpy(x) for key, x in formats.read(folder / "out.safetensors")[0].items()}
    counters = {key for key in theirs.state_dict() if key.endswith("num_batches_tracked")}
    found = theirs.load_state_dict(state, strict=False)
    assert set(found.missing_keys) <= counters and not found.unexpected_keys
    close(run(changed, x)[0], reference.record(theirs, {}, x)[0])
    return loaded


@pytest.mark.slow
@some([name for name in COUNTS if name not in NOT_IN_TIMM], now=("mobilenetv3_small_100",))
def test_timm_gives_the_same_logits_and_stages_both_ways(name, timm, reference, tmp_path):
    theirs = timm.create_model(name, num_classes=CLASSES)
    check_both_ways(theirs, timm_modules, name, "timm", reference, tmp_path)


@pytest.mark.slow
@some(TORCHVISION, now=("mobilenetv2_100",))
def test_torchvision_gives_the_same_logits_and_stages_both_ways(name, torchvision, reference, tmp_path):
    theirs = torchvision.get_model(TORCHVISION[name], weights=None, num_classes=CLASSES)
    loaded = check_both_ways(theirs, torchvision_modules, name, "torchvision", reference, tmp_path)
    assert loaded.card.model == f"{name}.tv"


@pytest.mark.slow
def test_narrow_mobilenet_v1_is_timms(timm, reference, tmp_path):
    make = pytest.importorskip("timm.models.efficientnet")._gen_mobilenet_v1
    theirs = make("mobilenetv1_100", 0.25, num_classes=CLASSES)
    check_both_ways(theirs, timm_modules, "mobilenetv1_025", "timm", reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_100.tv", "tf_efficientnet_lite0.port"])
def test_native_names_go_out_and_come_back_bit_equal(name, tmp_path):
    variables, card = random_variables(name), models.get(name).card
    load.export(variables, name, tmp_path / "w.safetensors", card=card, layout="native")
    loaded = load.load(name, tmp_path / "w.safetensors")
    assert loaded.layout == "native" and loaded.card == card
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)


def test_a_table_lists_the_modules_of_its_files(timm, torchvision, reference):
    with reference.torch.device("meta"):
        theirs = {("timm", name): timm.create_model(name) for name in NOW}
        theirs |= {("torchvision", name): torchvision.get_model(TORCHVISION[name], weights=None) for name in NOW[1:]}
    for (layout, name), model in theirs.items():
        found = {key.rpartition(".")[0] for key in model.state_dict()}
        table = models.get(name).layouts[layout]
        behind = {module for module in found if re.match(table.head, f"{module}.weight")}
        assert set(table.modules) == found - behind, (layout, name)


@pytest.mark.slow
def test_a_file_is_known_by_its_names_and_shapes(torchvision, reference, tmp_path, monkeypatch):
    few = ("mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_small_075", "resnet18")
    few += ("mobilenetv2_100.tv", "mobilenetv3_small_100.tv")
    monkeypatch.setattr(models, "MODELS", {name: models.get(name) for name in few})
    theirs = torchvision.mobilenet_v3_small(num_classes=CLASSES)
    path = reference.save(reference.randomize(theirs), tmp_path / "w.pth")
    assert load.candidates(formats.read(path)[0]) == [("mobilenetv3_small_100", "torchvision")]
    with pytest.raises(ValueError, match=r"mobilenetv2_100 .*the file looks like mobilenetv3_small_100"):
        load.load("mobilenetv2_100", path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_100", pytest.param("mobilenetv2_100", marks=pytest.mark.exhaustive)]
)
def test_a_training_step_has_torchs_loss_gradients_and_statistics(name, torchvision, reference, tmp_path):
    torch = reference.torch
    theirs = reference.randomize(
        torchvision.get_model(TORCHVISION[name], weights=None, num_classes=CLASSES, dropout=0.0)
    )
    loaded = load.load(name, reference.save(theirs, tmp_path / "w.pth"))
    x = np.random.default_rng(0).standard_normal((8, 64, 64, 3)).astype(np.float32)
    labels = np.arange(8) % CLASSES
    loss = torch.nn.functional.cross_entropy(
        theirs.double().train()(torch.from_numpy(x).permute(0, 3, 1, 2).double()), torch.from_numpy(labels)
    )
    loss.backward()
    stats = loaded.variables["batch_stats"]

    def ours(params):
        variables = {"params": params, "batch_stats": stats}
        (logits, _), state = loaded.model.apply(variables, x, True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state

    (value, state), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(loaded.variables["params"])
    assert float(value) == pytest.approx(loss.item(), rel=1e-4)
    expected = {key: tensor.grad for key, tensor in theirs.named_parameters()}
    table = models.get(name).layouts["torchvision"]
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for path, grad in trees.flatten({"params": gradient}).items():
        (key,), transform = conversion.sources_of(table, path)
        found = transform.export(np.asarray(grad))[0]
        # A shift before a BatchNorm has no gradient but rounding.
        np.testing.assert_allclose(
            found,
            expected[key].numpy(),
            rtol=0,
            atol=1e-3 * max(float(expected[key].abs().max()), 1e-3 * largest),
            err_msg=key,
        )
    its = theirs.state_dict()
    for path, new in trees.flatten(state).items():
        if path.endswith("mean"):
            (key,), _ = conversion.sources_of(table, path)
            close(new, its[key].numpy(), 1e-4)


def photos(shared, card, folder="data/imagenet_sample_250"):
    """The photos as the card asks for, and their classes."""
    image = pytest.importorskip("PIL.Image")
    files = sorted((shared / folder).rglob("*.JPEG"))

    def prepare(path):
        pixels = np.asarray(image.open(path).convert("RGB"))
        pixels = ops.resize(pixels, size=int(card.input_size / card.crop), interpolation=card.interpolation)
        pixels = ops.centre_crop(pixels, card.input_size).astype(np.float32)
        return (pixels / 255 - np.float32(card.mean)) / np.float32(card.std)

    return prepare, files, np.array([int(re.match(r"\d+", path.name)[0]) for path in files])


def best_five(predict, prepare, files):
    batches = (np.stack([prepare(path) for path in files[i : i + 50]]) for i in range(0, len(files), 50))
    return np.concatenate([np.argsort(-np.asarray(predict(batch)))[:, :5] for batch in batches])


def hits(best, labels):
    return int((best[:, 0] == labels).sum()), int((best == labels[:, None]).any(1).sum())


V2_FILE = "weights/mobilenet_v2/mobilenet_v2-b0353104.pth"
LITE_FILE = "weights/efficientnet_lite0/efficientnet-lite0-57934424.pth"


def published_lite0(timm, torch, path):
    """timm's network with the tensors of the published file, which has them in the same order under other names."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    found = torch.load(path, map_location="cpu", weights_only=True)
    assert next(iter(found)) == "_conv_stem.weight"
    model.load_state_dict(dict(zip(model.state_dict(), found.values(), strict=True)), strict=True)
    return model


@pytest.mark.slow
def test_genuine_mobilenet_v2_has_torchvisions_maps(shared, torchvision, reference):
    theirs, x = torchvision.mobilenet_v2(), common.images(96, batch=2)
    theirs.load_state_dict(reference.torch.load(shared / V2_FILE, map_location="cpu", weights_only=True))
    loaded = load.load("mobilenetv2_100", shared / V2_FILE)
    assert loaded.card.model == "mobilenetv2_100.tv" and loaded.card.sha256.startswith("b0353104")
    expected, features = reference.record(theirs.eval(), torchvision_modules(theirs, loaded.model), x)
    logits, out = jax.jit(loaded.model.apply)(loaded.variables, x)
    close(logits, expected)
    assert len(features) == 9
    for cut, value in features.items():
        close(out[cut], value)


@pytest.mark.slow
def test_genuine_efficientnet_lite0_gives_the_logits_of_timms(shared, timm, reference):
    theirs, x = published_lite0(timm, reference.torch, shared / LITE_FILE), common.images(96, batch=2)
    loaded = load.load("tf_efficientnet_lite0", shared / LITE_FILE)
    assert (loaded.layout, loaded.card.model) == ("port", "tf_efficientnet_lite0.port")
    assert loaded.card.mean == (127 / 255,) * 3 and loaded.card.std == (128 / 255,) * 3
    close(jax.jit(loaded.model.apply)(loaded.variables, x)[0], reference.record(theirs, {}, x)[0])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_genuine_mobilenet_v2_classifies_the_photos_as_published(shared):
    loaded = load.load("mobilenetv2_100", shared / V2_FILE)
    prepare, files, labels = photos(shared, loaded.card)
    assert len(files) == 250
    best = best_five(jax.jit(lambda x: loaded.model.apply(loaded.variables, x)[0]), prepare, files)
    assert np.abs(np.subtract(hits(best, labels), (206, 241))).max() <= 1


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_genuine_efficientnet_lite0_classifies_the_photos_as_in_torch(shared, timm, reference, every):
    loaded = load.load("tf_efficientnet_lite0", shared / LITE_FILE)
    prepare, files, labels = photos(shared, loaded.card)
    files, labels = files[::every], labels[::every]
    theirs = published_lite0(timm, reference.torch, shared / LITE_FILE)
    expected = hits(best_five(lambda x: reference.record(theirs, {}, x)[0], prepare, files), labels)
    found = hits(best_five(jax.jit(lambda x: loaded.model.apply(loaded.variables, x)[0]), prepare, files), labels)
    assert found == expected and found[0] >= 0.88 * len(files)
