"""The networks by themselves: counts, cuts, norm policy, memory and precision options."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import models
from tl_jax.core import trees
from tl_jax.core.card import sides
from tl_jax.models.layers import DropPath, drop_path_rates, max_pool
from tl_jax.models.recurrent import NAMES as RECURRENT
from tl_jax.models.resnet import ResNet
from tl_jax.models.vit import ViT
from tl_jax.weights import published

# Published counts (torchvision's and timm's model pages; He et al. 2016, table 6, for CIFAR, in full digits).
COUNTS = {
    "resnet18": 11689512,
    "resnet34": 21797672,
    "resnet50": 25557032,
    "resnet101": 44549160,
    "resnet152": 60192808,
    "wide_resnet50_2": 68883240,
    "resnext50_32x4d": 25028904,
    "resnet8_cifar": 75290,
    "resnet14_cifar": 172506,
    "resnet20_cifar": 269722,
    "resnet32_cifar": 464154,
    "resnet44_cifar": 658586,
    "resnet56_cifar": 853018,
    "vit_tiny_patch16_224": 5717416,
    "vit_tiny_patch16_384": 5790376,
    "vit_small_patch16_224": 22050664,
    "vit_small_patch16_384": 22196584,
    "vit_small_patch32_224": 22878952,
    "vit_small_patch32_384": 22915432,
    "vit_base_patch16_224": 86567656,
    "vit_base_patch16_384": 86859496,
    "vit_base_patch32_224": 88224232,
    "vit_base_patch32_384": 88297192,
    "vit_large_patch16_224": 304326632,
    "vit_large_patch16_384": 304715752,
    "vit_large_patch32_224": 306535400,
    "vit_large_patch32_384": 306632680,
    "deit_tiny_patch16_224": 5717416,
    "deit_small_patch16_224": 22050664,
    "deit_base_patch16_224": 86567656,
    "deit_base_patch16_384": 86859496,
    "vgg11": 132863336,
    "vgg11_bn": 132868840,
    "vgg13": 133047848,
    "vgg13_bn": 133053736,
    "vgg16": 138357544,
    "vgg16_bn": 138365992,
    "vgg19": 143667240,
    "vgg19_bn": 143678248,
    "resnet18.stage3": 3039784,  # torchvision's, less layer4, and 1000 classes of 256 or 1024 channels
    "resnet34.stage3": 8427304,
    "resnet50.stage3": 9568296,
    "inception_v3": 23834568,
    "inception_v3.aux": 27161264,
    "inception_v3.gluon": 23834568,
    "densenet121": 7978856,
    "densenet169": 14149480,
    "densenet201": 20013928,
    "squeezenet1_0": 1248424,
    "squeezenet1_1": 1235496,
    # timm's, without the mask token (and position of the class token) that the flavours have, see test_vit_towers.py
    "vit_small_patch14_dinov2": 22056192,
    "vit_small_patch14_reg4_dinov2": 22057344,
    "vit_base_patch14_dinov2": 86579712,
    "vit_base_patch14_reg4_dinov2": 86582016,
    "vit_large_patch14_dinov2": 304367616,
    "vit_large_patch14_reg4_dinov2": 304370688,
    # with the projection, and the bias that timm adds to it
    "vit_base_patch32_clip_224": 87849728,
    "vit_base_patch32_clip_quickgelu_224": 87849728,
    "vit_base_patch16_clip_224": 86193152,
    "vit_base_patch16_clip_quickgelu_224": 86193152,
    "vit_large_patch14_clip_224": 303966976,
    "vit_large_patch14_clip_quickgelu_224": 303966976,
    "vit_base_patch16_siglip_224": 92884224,
    "swin_tiny_patch4_window7_224": 28288354,
    "swin_small_patch4_window7_224": 49606258,
    "convnext_atto": 3695520,
    "convnext_femto": 5217784,
    "convnext_pico": 9045672,
    "convnext_nano": 15593560,
    "convnext_tiny": 28589128,
    "convnext_small": 50223688,
    "convnext_base": 88591464,
    "convnext_large": 197767336,
    "lenet_grey": 431080,  # Caffe's LeNet, which it is
    "lenet": 432080,
}

RESNET = functools.partial(ResNet, depths=(1, 1), widths=(16, 32), bottleneck=True, groups=2)
CIFAR = functools.partial(ResNet, depths=(1, 1, 1), widths=(4, 8, 16), cifar=True)
VIT = functools.partial(ViT, patch_size=8, width=24, depth=2, heads=3, image_size=24)
FAMILIES = pytest.mark.parametrize("make", [RESNET, CIFAR, VIT], ids=["resnet", "cifar", "vit"])
ONE_NOW = pytest.mark.parametrize(
    "make",
    [CIFAR, *(pytest.param(make, marks=pytest.mark.slow) for make in (RESNET, VIT))],
    ids=["cifar", "resnet", "vit"],
)


def images(size=24, batch=4, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, *sides(size), 3)).astype(np.float32)


def random_variables(model, size=24, seed=0, x=None):
    """Random values for every leaf, so that nothing hides behind zeros and ones; x: in the place of images."""
    flat = trees.flatten(jax.eval_shape(model.init, jax.random.key(0), images(size) if x is None else x))
    rng = np.random.default_rng(seed)
    draw = {path: rng.standard_normal(leaf.shape).astype(np.float32) * 0.2 for path, leaf in flat.items()}
    return trees.unflatten(
        {path: 1 + np.abs(value) if path.endswith(("scale", "var")) else value for path, value in draw.items()}
    )


def close(actual, expected, tolerance=1e-5):
    """Equal to `tolerance` of the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def first_of_each_family(names):
    """The others are left to the slow tests."""
    family, seen = re.compile(r"(vit.*_(clip|siglip|dinov2)|[a-z]+(_v2)?)"), set()
    first = {name for name in names if not ((its := family.match(name).group()) in seen or seen.add(its))}
    return [name if name in first else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.thin(8)
@pytest.mark.parametrize("name", first_of_each_family(COUNTS))
def test_parameter_count_is_the_published_one(name):
    variant = models.get(name)
    size = variant.card.input_size
    model = variant.module(num_classes=variant.card.num_classes)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) == COUNTS[name]


# counted in test_mlp.py, test_mobile.py, test_text_encoders.py, test_clip_text.py and test_recurrent.py
TEXT = ("bert", "minilm", "distil", "roberta", "gpt2", "clip_text", "siglip_text", *RECURRENT)
ELSEWHERE = ("mlp", "mobilenet", "efficientnet", "tf_", *TEXT)


def test_every_model_is_counted_or_a_flavour_of_a_counted_one():
    flavours = {flavour for name in COUNTS for flavour in models.MODELS[name].flavours.values()}
    counted = {name for name in models.MODELS if not name.startswith(ELSEWHERE) and "_distilled_" not in name}
    assert counted == set(COUNTS) | flavours
    for name, variant in models.MODELS.items():
        assert variant.card.model == name
        assert set(variant.flavours) <= set(variant.layouts)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COUNTS if not re.search(r"cifar|lenet|squeezenet|\.", name)])
def test_parameter_count_is_timms(name):
    torch = pytest.importorskip("torch_reference").torch
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        reference = timm.create_model(name, num_classes=models.get(name).card.num_classes)
    assert COUNTS[name] == sum(parameter.numel() for parameter in reference.parameters())


@pytest.mark.parametrize("name", [name for name in COUNTS if re.match(r"(vit|deit)_[a-z]+_patch\d+_\d+", name)])
def test_preprocessing_of_the_card_is_timms(name):
    pytest.importorskip("torch_reference")
    timm = pytest.importorskip("timm")
    card, reference = models.get(name).card, timm.get_pretrained_cfg(name)
    assert (card.mean, card.std, card.interpolation) == (reference.mean, reference.std, reference.interpolation)
    assert (card.crop, card.input_size) == (reference.crop_pct, reference.input_size[-1])


def test_table_of_published_files_is_what_the_script_makes_of_the_installed_timm():
    make = pytest.importorskip("make_published")
    assert published.TABLE.read_text() == make.text(make.rows()), "run tests/make_published.py"
    assert list(published.table().values()) == make.rows()
    assert len(published.table()) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("share", [32, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_networks_of_published_files_have_the_keys_and_shapes_of_timms(share):
    make = pytest.importorskip("make_published")
    one_each = {row.model: row for row in published.table().values()}  # the script looks at all of them
    assert make.misfits(list(one_each.values())[::share]) == []


def test_unknown_model_names_its_nearest_neighbours():
    with pytest.raises(ValueError, match=r"no model 'resnet51'; nearest: .*resnet50"):
        models.get("resnet51")


@ONE_NOW
def test_running_from_any_cut_gives_the_same_logits(make):
    model = make(num_classes=5)
    variables = random_variables(model)
    logits, out = model.apply(variables, images())
    assert tuple(out) == (*model.cuts, "embedding", "logits")
    assert logits.dtype == out["pre_logits"].dtype == jnp.float32
    np.testing.assert_array_equal(out["embedding"], out["pre_logits"])
    np.testing.assert_array_equal(logits, out["logits"])
    for cut in model.cuts:
        again, rest = model.apply(variables, out[cut], start=cut)
        close(again, logits, 1e-6)  # a ViT computes the class token of its last block by itself
        assert list(rest) == list(out)[list(out).index(cut) + 1 :]
        output, before = model.apply(variables, images(), stop=cut)
        np.testing.assert_array_equal(output, out[cut])
        assert list(before) + list(rest) == list(out)


REMAT = [pytest.param("block", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["", *REMAT])
def test_the_class_token_by_itself_is_the_first_of_all_tokens_with_the_same_gradients(remat):
    model = VIT(num_classes=5, drop_path=0.5, remat=remat)
    variables, rngs = random_variables(model), {"dropout": jax.random.key(3)}

    def loss(params, alone):
        logits, out = model.apply({"params": params}, images(), True, rngs=rngs)
        if not alone:  # behind all tokens of the last block
            logits, _ = model.apply({"params": params}, out["block1"], True, start="block1")
        return jnp.sum(jnp.sin(logits))

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (value, gradient), (full, full_gradient) = step(variables["params"], True), step(variables["params"], False)
    close(value, full)
    jax.tree.map(close, gradient, full_gradient)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["", *REMAT])
def test_of_the_last_block_only_the_class_token_is_computed_where_nothing_else_is_read(remat):
    make = functools.partial(VIT, num_classes=5, depth=1, remat=remat)
    variables = random_variables(make())

    def flops(what):
        def loss(params):
            logits, out = make().apply({"params": params}, images(), True)
            return {"logits": logits, "block0": out["block0"]}[what].sum()

        return jax.jit(jax.grad(loss)).lower(variables["params"]).compile().cost_analysis()["flops"]

    assert flops("logits") < 0.6 * flops("block0")


@FAMILIES
def test_unknown_cut_lists_the_cuts(make):
    model = make(num_classes=5)
    with pytest.raises(ValueError, match=r"start='layer9' .* \['stem', .*'pre_logits'\]"):
        model.apply(random_variables(model), images(), start="layer9")


@ONE_NOW
def test_zero_classes_give_features_and_no_head(make):
    full, bare = make(num_classes=5), make(num_classes=0)
    variables = random_variables(full)
    del variables["params"]["head"]
    assert set(trees.flatten(jax.eval_shape(bare.init, jax.random.key(0), images()))) == set(trees.flatten(variables))
    features, out = bare.apply(variables, images())
    np.testing.assert_array_equal(features, out["pre_logits"])


@pytest.mark.slow
def test_cifar_resnet_takes_any_size():
    model = CIFAR(num_classes=3)
    variables = random_variables(model)
    for size in (8, 15, 32):
        assert model.apply(variables, images(size))[0].shape == (4, 3)


def test_vit_refuses_images_of_another_size():
    model = VIT(num_classes=3)
    with pytest.raises(ValueError, match="images are 32x32, but the position embedding was made for 24x24"):
        model.apply(random_variables(model), images(32))
    with pytest.raises(ValueError, match="image_size=25 is no multiple of patch_size=8"):
        VIT(num_classes=3, image_size=25).init(jax.random.key(0), images(25))


@pytest.mark.slow
@pytest.mark.thin(1)
@FAMILIES
def test_bfloat16_computes_near_float32_with_float32_parameters_statistics_and_logits(make):
    model = make(num_classes=5)
    half = model.clone(dtype=jnp.bfloat16)
    tree = jax.eval_shape(half.init, jax.random.key(0), images())
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    variables = random_variables(model)
    logits, out = jax.jit(half.apply)(variables, images())
    assert out["stem"].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    close(logits, model.apply(variables, images())[0], 0.05)
    _, state = jax.eval_shape(lambda x: half.apply(variables, x, True, mutable=["batch_stats"]), images())
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32")}


@pytest.mark.thin(1)
@pytest.mark.parametrize("make", [RESNET, CIFAR], ids=["resnet", "cifar"])
@pytest.mark.parametrize("remat", ["", pytest.param("block", marks=pytest.mark.slow)])
def test_frozen_norms_keep_their_statistics_and_use_them(make, remat):
    model = make(num_classes=5, remat=remat)
    variables = random_variables(model)
    layers = {path.rpartition("/")[0] for path in trees.flatten(variables["batch_stats"])}
    frozen = {"backbone/stem/norm", "backbone/stage2/block0/norm1"}
    assert frozen < layers

    def statistics(paths):
        frozen_model = model.clone(frozen_norms=tuple(paths))
        (logits, _), state = frozen_model.apply(variables, images(), True, mutable=["batch_stats"])
        return logits, trees.flatten(state["batch_stats"])

    before = trees.flatten(variables["batch_stats"])
    for path, value in statistics(frozen)[1].items():
        assert np.array_equal(value, before[path]) == (path.rpartition("/")[0] in frozen), path
    np.testing.assert_array_equal(statistics(layers)[0], model.apply(variables, images())[0])


def test_running_statistics_move_by_a_tenth_towards_the_batch():
    model = CIFAR(num_classes=0)
    variables = random_variables(model)
    kernel = variables["params"]["backbone"]["stem"]["conv"]["kernel"]
    padded = np.pad(images().astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    batch = np.einsum("bhwcij,ijcf->bhwf", patches, kernel)
    _, state = model.apply(variables, images(), True, mutable=["batch_stats"])
    old, new = (tree["batch_stats"]["backbone"]["stem"]["norm"] for tree in (variables, state))
    close(new["mean"], 0.9 * old["mean"] + 0.1 * batch.mean((0, 1, 2)))
    close(new["var"], 0.9 * old["var"] + 0.1 * batch.var((0, 1, 2)))


@pytest.mark.slow
def test_axis_name_gives_every_device_the_statistics_of_the_whole_batch():
    count = min(jax.device_count(), 2)
    if count < 2:
        pytest.skip("needs two devices")
    model = CIFAR(num_classes=5)
    variables, batch = random_variables(model), images(batch=8)
    (logits, _), state = model.apply(variables, batch, True, mutable=["batch_stats"])
    synced = model.clone(axis_name="data")

    def step(shard):
        (logits, _), state = synced.apply(variables, shard, True, mutable=["batch_stats"])
        return logits, state

    shards = batch.reshape(count, -1, *batch.shape[1:])
    parallel, states = jax.pmap(step, axis_name="data", devices=jax.devices()[:count])(shards)
    close(np.concatenate(parallel), logits)
    jax.tree.map(lambda many, one: close(many[1], one), states, state)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    ones = jnp.ones((4000, 3, 2))
    out = np.asarray(DropPath(0.25).apply({}, ones, True, rngs={"dropout": jax.random.key(0)}))
    assert np.all(out == out[:, :1, :1])
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert abs(out.mean() - 1.0) < 4 * np.sqrt(0.25 / 0.75 / 4000)
    np.testing.assert_array_equal(DropPath(0.25).apply({}, ones, False), ones)


@pytest.mark.thin(2)
@FAMILIES
def test_dropout_and_drop_path_act_in_training_only(make):
    model = make(num_classes=5, dropout=0.5, drop_path=0.5)
    variables = random_variables(model)
    norms = tuple({path.rpartition("/")[0] for path in trees.flatten(variables.get("batch_stats", {}))})
    model = model.clone(frozen_norms=norms)  # so that only the random part differs
    plain = make(num_classes=5)
    np.testing.assert_array_equal(model.apply(variables, images())[0], plain.apply(variables, images())[0])
    first, again, other = (
        model.apply(variables, images(), True, rngs={"dropout": jax.random.key(seed)})[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_max_pool_is_the_maximum_over_padded_windows():
    for size in (7, 8):
        x = -1.0 - np.abs(images(size))  # all negative: padding with zeros would show
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
        np.testing.assert_array_equal(max_pool(jnp.asarray(x)), windows.max((-1, -2)))


@FAMILIES
def test_head_starts_at_zero_or_lecun(make):
    zeros, lecun = (
        make(num_classes=50, head_init=init).init(jax.random.key(0), jnp.zeros((1, 64)), start="pre_logits")["params"]
        for init in ("zeros", "lecun")
    )
    assert set(zeros) == set(lecun) == {"head"} and not zeros["head"]["kernel"].any()
    assert float(lecun["head"]["kernel"].std()) == pytest.approx(64**-0.5, rel=0.1)
