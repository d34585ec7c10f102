"""Weight files in and out: parity with the libraries they come from, strictness, cards, new heads, command line."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import __main__ as command
from tl_jax import models
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.models import conversion, resnet, vit
from tl_jax.models.variant import Variant
from tl_jax.weights import formats, load, other_inputs

CLASSES = 7
TINY_VIT = functools.partial(vit.ViT, patch_size=16, width=24, depth=2, heads=3, image_size=48)


def add_variants(monkeypatch, variants):
    """Puts small relatives of a family into the model table, with the family's own conversion tables."""
    for name, variant in variants.items():
        monkeypatch.setitem(models.MODELS, name, variant._replace(card=variant.card.replace(num_classes=CLASSES)))
    return next(iter(variants))


@pytest.fixture
def small_resnet(monkeypatch):
    module = functools.partial(resnet.ResNet, depths=(1, 1, 1), widths=(4, 8, 16), cifar=True)
    return add_variants(
        monkeypatch, {"small_resnet": Variant(module, Card("small_resnet", CLASSES, 16), resnet.CIFAR_LAYOUTS, {})}
    )


@pytest.fixture
def small_vit(monkeypatch):
    return add_variants(monkeypatch, vit.vit_variants("small_vit", TINY_VIT, 3, 48))


@pytest.fixture
def small_files(small_resnet, small_vit, tmp_path):
    """One file of random weights per small model, in its first layout: {name: path}."""
    files = {}
    for name in (small_resnet, small_vit):
        card, files[name] = models.get(name).card, tmp_path / f"{name}.safetensors"
        load.export(random_variables(name), name, files[name], card=card)
        tensors, _ = formats.read(files[name])
        formats.write_safetensors(files[name], tensors, {})  # as a foreign file: no card
    return files


def random_variables(name, seed=0):
    rng = np.random.default_rng(seed)
    shapes = load.default_shapes(name)
    flat = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    return trees.unflatten({path: np.abs(x) if path.endswith("/var") else x for path, x in flat.items()})


def images(size, batch=2, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, size, size, 3)).astype(np.float32)


def close(actual, expected, tolerance=1e-4):
    """Equal to `tolerance` of the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(expected).all() and expected.std() > 0
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.slow
def test_image_size_rebuilds_the_model_for_another_grid_and_says_so(small_vit, small_files):
    loaded = load.load(small_vit, small_files[small_vit], image_size=80)
    assert loaded.card.input_size == loaded.model.image_size == 80
    assert loaded.origins[other_inputs.POS_EMBED] == "pos_embed (resampled from 10 to 26 tokens)"
    assert jax.jit(loaded.model.apply)(loaded.variables, images(80))[0].shape == (2, CLASSES)
    tensors, _ = formats.read(small_files[small_vit])
    resampled = trees.flatten(loaded.variables)[other_inputs.POS_EMBED]
    np.testing.assert_array_equal(resampled[:, 0], tensors["pos_embed"][:, 0])
    card = models.get(small_vit).card.replace(input_size=80)
    load.export(loaded.variables, small_vit, small_files[small_vit], card=card)
    again = load.load(small_vit, small_files[small_vit])
    assert again.model.image_size == 80, "the file's own card knows its size"
    with pytest.raises(ValueError, match="give image_size to resample"):
        formats.write_safetensors(small_files[small_vit], formats.read(small_files[small_vit])[0], {})
        load.load(small_vit, small_files[small_vit])


@pytest.mark.parametrize("kind", ["timm", "torchvision", "hf", "jax", "native"])
def test_every_vit_layout_goes_out_and_comes_back_bit_equal(kind, small_vit, tmp_path):
    variables, card = random_variables(small_vit), models.get(small_vit).card
    load.export(variables, small_vit, tmp_path / "w.safetensors", card=card, layout=kind)
    loaded = load.load(small_vit, tmp_path / "w.safetensors")
    assert (loaded.layout, loaded.card) == (kind, card)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "name, kind",
    [
        ("resnet18", "timm"),
        ("resnet18.hf", "hf"),
        pytest.param("resnet50", "hf", marks=pytest.mark.slow),
        pytest.param("resnet50", "native", marks=pytest.mark.slow),
        ("resnet8_cifar", "cifar"),
        ("resnet8_cifar", "native"),
    ],
)
def test_every_resnet_layout_goes_out_and_comes_back_bit_equal(name, kind, tmp_path):
    variables, card = random_variables(name), models.get(name).card
    load.export(variables, name, tmp_path / "w.safetensors", card=card, layout=kind)
    loaded = load.load(name, tmp_path / "w.safetensors")
    assert (loaded.layout, loaded.card) == (kind, card)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)


WHOLE = [name for name in models.MODELS if "." not in name]
FIRST = {(models.get(name).module.func, *models.get(name).layouts): name for name in reversed(WHOLE)}  # of its kind


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FIRST.values() else pytest.mark.slow) for name in WHOLE]
)
def test_every_table_is_one_to_one_over_every_leaf(name):
    for kind, table in models.get(name).layouts.items():
        leaves = load.default_shapes(load._flavour(name, kind))
        keys = [key for leaf in leaves for key in conversion.sources_of(table, leaf)[0]]
        assert len(set(keys)) == len(keys), kind
        assert all(conversion.canonical(table, key) == key for key in keys), kind
        body = [key for key in keys if not conversion.is_head(table, key)]
        assert all(conversion.may_know(table, {key: None}) for key in body[:: len(body) // 9 + 1]), kind
        assert not conversion.may_know(table, {"no.such": None})


def test_origins_name_the_key_behind_every_leaf(small_vit, small_files):
    loaded = load.load(small_vit, small_files[small_vit])
    assert set(loaded.origins) == set(trees.flatten(loaded.variables))
    assert loaded.origins["params/backbone/block1/attn/qkv/kernel"] == "blocks.1.attn.qkv.weight"
    assert loaded.dropped == ()


def test_new_head_replaces_the_files_head_and_is_reported(small_resnet, small_files):
    loaded = load.load(small_resnet, small_files[small_resnet], 3, head_init="lecun")
    new = {leaf for leaf, origin in loaded.origins.items() if origin == "new"}
    assert new == {"params/head/kernel", "params/head/bias"}
    assert loaded.dropped == ("linear.bias", "linear.weight")
    assert loaded.variables["params"]["head"]["kernel"].shape == (16, 3)
    assert (loaded.card.num_classes, loaded.card.class_names) == (3, ())
    zeros = load.load(small_resnet, small_files[small_resnet], 3)
    assert not zeros.variables["params"]["head"]["kernel"].any()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_head_from_scratch_and_from_a_file(small_vit, small_files):
    heads = [
        load.load(small_vit, path, 5, head_init="lecun", seed=seed).variables["params"]["head"]["kernel"]
        for path, seed in ((small_files[small_vit], 1), (small_files[small_vit], 2))
    ]
    scratch = load.load(small_vit, None, 5, head_init="lecun", seed=1)
    np.testing.assert_array_equal(heads[0], scratch.variables["params"]["head"]["kernel"])
    assert not np.array_equal(*heads)
    assert set(scratch.origins.values()) == {"new"} and scratch.card.num_classes == 5


def test_zero_classes_drop_the_head_and_a_headless_file_needs_a_number(small_resnet, small_files, tmp_path):
    bare = load.load(small_resnet, small_files[small_resnet], 0)
    assert "head" not in bare.variables["params"] and bare.card.num_classes == 0
    load.export(bare.variables, small_resnet, tmp_path / "bare.safetensors", card=bare.card)
    tensors, _ = formats.read(tmp_path / "bare.safetensors")
    assert not any(key.startswith("linear") for key in tensors)
    formats.write_safetensors(tmp_path / "bare.safetensors", tensors, {})
    assert load.load(small_resnet, tmp_path / "bare.safetensors", 4).card.num_classes == 4
    with pytest.raises(ValueError, match="the file has no head: give num_classes"):
        load.load(small_resnet, tmp_path / "bare.safetensors")


def test_every_offender_of_every_kind_is_in_one_error(small_resnet, small_files):
    tensors, _ = formats.read(small_files[small_resnet])
    tensors |= {"surplus.weight": np.ones(3, np.float32), "layer1.0.bn1.num_batches_tracked": np.array(3)}
    del tensors["layer1.0.bn1.weight"]
    tensors["layer2.0.conv1.weight"] = tensors["layer2.0.conv1.weight"][:, :-1]
    tensors["layer2.0.conv2.weight"] = tensors["layer2.0.conv2.weight"][0]
    tensors["bn1.running_var"][1] = np.nan
    tensors["bn1.bias"] = np.arange(4)
    tensors["linear.bias"] = np.full(CLASSES, 1e300)
    formats.write_safetensors(small_files[small_resnet], tensors, {})
    with pytest.raises(ValueError) as error:
        load.load(small_resnet, small_files[small_resnet])
    for text in (
        "1 unused keys [surplus.weight]",
        "1 unfilled leaves [params/backbone/stage1/block0/norm1/scale (no layer1.0.bn1.weight)]",
        "2 wrong shapes [layer2.0.conv1.weight is (8, 3, 3, 3), expected (8, 4, 3, 3), "
        "layer2.0.conv2.weight is (8, 3, 3), expected (8, 8, 3, 3)]",
        "1 no floats [bn1.bias is int64]",
        f"2 non-finite values [bn1.running_var (1 of 4), linear.bias ({CLASSES} of {CLASSES})]",
        "best layout: cifar",
    ):
        assert text in str(error.value)


def test_lists_in_an_error_are_capped_with_a_count():
    text = conversion.listing({"unused keys": [f"k{i}" for i in range(100)], "wrong shapes": []})
    assert text == "100 unused keys [k0, k1, k2, k3, k4, and 95 more]"


def test_two_spellings_of_one_key_are_an_error(small_vit, tmp_path):
    load.export(
        random_variables(small_vit),
        small_vit,
        tmp_path / "w.safetensors",
        layout="jax",
        card=models.get(small_vit).card,
    )
    tensors, _ = formats.read(tmp_path / "w.safetensors")
    formats.write_safetensors(tmp_path / "w.safetensors", {**tensors, "opt/target/cls": tensors["cls"]}, {})
    with pytest.raises(ValueError, match="1 unused keys"):
        load.load(small_vit, tmp_path / "w.safetensors")


def test_wrong_file_names_the_models_it_fits(tmp_path):
    card = models.get("resnet8_cifar").card
    load.export(random_variables("resnet8_cifar"), "resnet8_cifar", tmp_path / "w.safetensors", card=card)
    formats.write_safetensors(tmp_path / "w.safetensors", formats.read(tmp_path / "w.safetensors")[0], {})
    with pytest.raises(ValueError, match=r"does not fit resnet14_cifar .*looks like resnet8_cifar \(layout cifar\)"):
        load.load("resnet14_cifar", tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"no key that vit_tiny_patch16_224 knows .*looks like resnet8_cifar"):
        load.load("vit_tiny_patch16_224", tmp_path / "w.safetensors")


def test_half_precision_files_become_float32(small_resnet, small_files):
    tensors, _ = formats.read(small_files[small_resnet])
    half = {key: value.astype(np.float16) for key, value in tensors.items()}
    formats.write_safetensors(small_files[small_resnet], half, {})
    variables = load.load(small_resnet, small_files[small_resnet]).variables
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], half["linear.bias"].astype(np.float32))


def test_default_card_carries_source_and_hash_and_the_files_card_wins(small_resnet, small_files, tmp_path):
    path = small_files[small_resnet]
    loaded = load.load(small_resnet, str(path))
    assert loaded.card == models.get(small_resnet).card.replace(source=str(path), sha256=formats.sha256(path))
    own = loaded.card.replace(mean=(0.1, 0.2, 0.3), class_names=tuple("abcdefg"), licence="CC0")
    load.export(loaded.variables, small_resnet, tmp_path / "own.safetensors", card=own)
    assert load.load(small_resnet, tmp_path / "own.safetensors").card == own
    with pytest.raises(ValueError, match="holds weights of 'small_resnet' according to its card, asked for was 'resn"):
        load.load("resnet8_cifar", tmp_path / "own.safetensors")


def test_the_builtin_weights_have_their_own_card():
    card = load.load("resnet8_cifar", "builtin:glyphs").card
    assert (card.num_classes, len(card.class_names), card.class_names[0]) == (37, 37, "A")


@pytest.mark.slow
def test_flavour_of_a_file_survives_an_export_in_timm_names(tmp_path):
    name = "deit_tiny_patch16_224"
    variables = random_variables(name)
    load.export(variables, name, tmp_path / "hf.safetensors", card=models.get(name).card, layout="hf")
    formats.write_safetensors(tmp_path / "hf.safetensors", formats.read(tmp_path / "hf.safetensors")[0], {})
    first = load.load(name, tmp_path / "hf.safetensors")
    load.export(first.variables, name, tmp_path / "timm.safetensors", card=first.card)
    for asked in (name, f"{name}.hf"):
        again = load.load(asked, tmp_path / "timm.safetensors")
        assert again.card == first.card and again.card.model == f"{name}.hf" and again.model.norm_eps == 1e-12


def test_export_refuses_what_would_not_load_again(small_resnet, tmp_path):
    variables, card = random_variables(small_resnet), models.get(small_resnet).card
    flat = trees.flatten(variables)
    bad = {
        **flat,
        "params/adapter/kernel": np.ones(2),
        "params/head/kernel": flat["params/head/kernel"][:, 1:],
        "params/backbone/stem/norm/bias": np.full(4, np.inf, np.float32),
    }
    del bad["batch_stats/backbone/stem/norm/mean"]
    with pytest.raises(ValueError) as error:
        load.export(trees.unflatten(bad), small_resnet, tmp_path / "w.safetensors", card=card)
    for text in (
        "1 missing leaves [batch_stats/backbone/stem/norm/mean]",
        "1 surplus leaves [params/adapter/kernel]",
        "1 wrong shapes [params/head/kernel is (16, 6), expected (16, 7)]",
        "1 non-finite values [params/backbone/stem/norm/bias]",
    ):
        assert text in str(error.value)
    with pytest.raises(ValueError, match="card belongs to 'resnet18'"):
        load.export(variables, small_resnet, tmp_path / "w.safetensors", card=card.replace(model="resnet18"))
    with pytest.raises(ValueError, match="no layout 'hf'; it has cifar, native"):
        load.export(variables, small_resnet, tmp_path / "w.safetensors", card=card, layout="hf")
    assert list(tmp_path.iterdir()) == []


def test_command_line_converts_and_inspects(tmp_path, capsys):
    name, source, out = "resnet8_cifar", tmp_path / "a.npz", tmp_path / "b.safetensors"
    card = models.get(name).card
    np.savez(source, **trees.flatten(random_variables(name)))
    assert command.main(["convert", name, str(source), str(out)]) == 0
    assert command.main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "resnet8_cifar, 10 classes, 32 px",
        "layer1.0.conv1.weight",
        "[16, 16, 3, 3]",
        "float32",
        '"model": "resnet8_cifar"',
        formats.sha256(source),
    ):
        assert text in printed
    assert load.load(name, out).card == card.replace(source=str(source), sha256=formats.sha256(source))


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "resnet51", "x.pth", "y.safetensors"],
        ["convert", "resnet50", "missing.pth", "y.safetensors"],
        ["inspect", "missing.pth"],
    ],
)
def test_command_line_answers_bad_input_in_one_line_with_exit_code_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_unknown_head_init_lists_the_known():
    with pytest.raises(ValueError, match="head_init='glorot' is unknown; known: zeros, lecun, xavier"):
        load.load("resnet18", "any.pth", head_init="glorot")
