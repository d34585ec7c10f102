"""The head as a list of layers: what torch computes, its place on the way of the data, its file."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import FAMILIES, RESNET, VIT, close, images, random_variables
from test_pretrained import CLASSES, add_variants
from test_pretrained import random_variables as pretrained_variables

from tl_jax import models
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.models import head, peft, resnet, vit
from tl_jax.models.variant import Variant
from tl_jax.weights import formats, inspection, load

LAYERS = (
    ("dense", {"features": 12}),
    ("batch_norm", {}),
    ("relu", {}),
    ("dropout", {"rate": 0.0}),
    ("dense", {"features": 7}),
    ("layer_norm", {}),
    ("gelu", {}),
)
BOTTLENECK = (("dense", {"features": 6}), ("batch_norm", {}), ("relu", {}), ("dropout", {"rate": 0.5}))
POOLED = (("pool", {}), ("dense", {"features": 6}), ("batch_norm", {}))
FLAT = (("flatten", {}), ("dense", {"features": 3}), ("relu", {}))


def torch_head(variables, inputs):
    """nn.Sequential of LAYERS and the last dense layer, with the weights of `variables`, in float64."""
    torch = pytest.importorskip("torch_reference").torch
    width = {0: (inputs, 12), 4: (12, 7), 7: (7, 5)}
    modules = [torch.nn.Linear(*width[0]), torch.nn.BatchNorm1d(12), torch.nn.ReLU(), torch.nn.Dropout(0.0)]
    modules += [torch.nn.Linear(*width[4]), torch.nn.LayerNorm(7), torch.nn.GELU(), torch.nn.Linear(*width[7])]
    params, stats = variables["params"]["head"], variables["batch_stats"]["head"]
    for i, name in {0: "dense0", 1: "norm1", 4: "dense4", 5: "norm5", 7: "out"}.items():
        tensors = {"bias": params[name]["bias"]}
        tensors["weight"] = params[name]["kernel"].T if "kernel" in params[name] else params[name]["scale"]
        if i == 1:
            tensors |= {"running_mean": stats[name]["mean"], "running_var": stats[name]["var"]}
        modules[i].load_state_dict({key: torch.tensor(np.array(x)) for key, x in tensors.items()}, strict=False)
    return torch.nn.Sequential(*modules).double()


@pytest.mark.thin(1)
@pytest.mark.parametrize("train", [False, True])
def test_layers_compute_what_torch_computes_and_move_its_statistics(train):
    model = RESNET(num_classes=5, head=LAYERS)
    variables = random_variables(model)
    features = np.random.default_rng(1).standard_normal((6, 128)).astype(np.float32)
    reference = torch_head(variables, 128).train(train)
    (logits, out), state = model.apply(variables, features, train, start="pre_logits", mutable=["batch_stats"])
    x = expected = next(reference.parameters()).new_tensor(features)
    for layer in reference:
        expected, x = layer(expected), expected
    close(logits, expected.detach())
    close(out["embedding"], x.detach())
    new, old = state["batch_stats"]["head"]["norm1"], variables["batch_stats"]["head"]["norm1"]
    close(new["mean"], reference[1].running_mean)
    # Of 6 examples; torch's running variance collects the unbiased one.
    unbiased = reference[1].running_var.numpy() - 0.9 * old["var"]
    close(new["var"], 0.9 * old["var"] + unbiased * 5 / 6 if train else old["var"])


@FAMILIES
def test_no_layers_are_the_dense_layer_on_pre_logits_bit_for_bit(make):
    model = make(num_classes=5, dropout=0.5)
    variables = random_variables(model)
    assert set(variables["params"]["head"]) == {"kernel", "bias"} and "head" not in variables.get("batch_stats", {})
    kernel = variables["params"]["head"]["kernel"]
    features = np.random.default_rng(1).standard_normal((4, len(kernel))).astype(np.float32)
    logits, out = model.apply(variables, features, start="pre_logits")
    np.testing.assert_array_equal(logits, nn.Dense(5).apply({"params": variables["params"]["head"]}, out["embedding"]))
    np.testing.assert_array_equal(out["embedding"], features)


@pytest.mark.parametrize(
    ("make", "cut"),
    [pytest.param(RESNET, "stage2", id="resnet"), pytest.param(VIT, "block1", id="vit", marks=pytest.mark.slow)],
)
def test_pool_and_flatten_read_the_last_cut_before_pre_logits(make, cut):
    flat, pooled = make(num_classes=5, head=FLAT), make(num_classes=5, head=(("pool", {}),))
    variables = random_variables(flat)
    _, out = flat.apply(variables, images())
    feature_map, params = np.float64(out[cut]), variables["params"]["head"]
    row = feature_map.reshape(4, -1) @ np.float64(params["dense1"]["kernel"]) + params["dense1"]["bias"]
    close(out["embedding"], np.maximum(row, 0))
    variables = random_variables(pooled)
    logits, out = pooled.apply(variables, images())
    mean, params = np.float64(out[cut]).reshape(4, -1, out[cut].shape[-1]).mean(1), variables["params"]["head"]["out"]
    close(out["embedding"], mean)
    close(logits, mean @ np.float64(params["kernel"]) + params["bias"])


@pytest.mark.thin(1)
@FAMILIES
@pytest.mark.parametrize("layers", [BOTTLENECK, POOLED], ids=["bottleneck", "pooled"])
def test_running_from_any_cut_that_the_head_can_read_gives_the_same_logits(make, layers):
    model = make(num_classes=5, head=layers)
    variables = random_variables(model)
    logits, out = model.apply(variables, images())
    assert tuple(out) == (*model.cuts, "embedding", "logits")
    readable = model.cuts[: model.cuts.index(head.reads(model)) + 1]
    assert readable == (model.cuts if layers == BOTTLENECK else model.cuts[:-1])
    for cut in readable:
        again, rest = model.apply(variables, out[cut], start=cut)
        close(again, logits, 1e-6)
        close(rest["embedding"], out["embedding"], 1e-6)


def test_a_start_behind_what_the_head_reads_is_refused():
    model = VIT(num_classes=5, head=POOLED)
    with pytest.raises(ValueError, match=r"start='pre_logits', but the head begins with pool, .* start at 'block1' or"):
        model.apply(random_variables(model), np.zeros((2, 24), np.float32), start="pre_logits")


def test_head_statistics_follow_the_policy_of_the_backbone():
    model = RESNET(num_classes=5, head=(("dense", {"features": 6}), ("batch_norm", {})))
    variables = random_variables(model)
    features = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)
    apply = functools.partial(model.clone(frozen_norms=("head/norm1",)).apply, start="pre_logits")
    (logits, _), state = apply(variables, features, True, mutable=["batch_stats"])
    np.testing.assert_array_equal(logits, apply(variables, features)[0])
    jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])
    if jax.device_count() > 1:
        whole = model.apply(variables, features, True, start="pre_logits", mutable=["batch_stats"])[0][0]
        synced = model.clone(axis_name="data")
        step = jax.pmap(
            lambda x: synced.apply(variables, x, True, start="pre_logits", mutable=["batch_stats"])[0][0],
            axis_name="data",
            devices=jax.devices()[:2],
        )
        close(step(features.reshape(2, 3, -1)).reshape(6, -1), whole)


def test_dropout_in_the_head_acts_in_training_only():
    model = VIT(num_classes=5, head=(("dropout", {"rate": 0.25}),))
    variables, ones = random_variables(model), np.ones((4000, 24), np.float32)
    apply = functools.partial(model.apply, variables, ones, start="pre_logits")
    np.testing.assert_array_equal(apply()[1]["embedding"], ones)
    dropped = np.asarray(apply(train=True, rngs={"dropout": jax.random.key(0)})[1]["embedding"])
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 0.01


@pytest.mark.slow
def test_head_init_is_of_the_last_dense_layer():
    make = functools.partial(RESNET, num_classes=5, head=LAYERS)
    for init in ("zeros", "lecun"):
        variables = make(head_init=init).init(jax.random.key(0), jnp.zeros((1, 64)), start="pre_logits")
        params = variables["params"]["head"]
        assert bool(params["out"]["kernel"].any()) == (init == "lecun") and params["dense0"]["kernel"].any()


def test_zero_classes_leave_the_layers_out():
    full, bare = RESNET(num_classes=5, head=POOLED), RESNET(num_classes=0, head=POOLED)
    variables = random_variables(full)
    del variables["params"]["head"], variables["batch_stats"]["head"]
    features, out = bare.apply(variables, images())
    np.testing.assert_array_equal(features, out["pre_logits"])
    np.testing.assert_array_equal(features, out["embedding"])


@pytest.mark.parametrize("layers", [BOTTLENECK, POOLED], ids=["bottleneck", "pooled"])
def test_the_head_computes_in_float32_behind_a_bfloat16_backbone(layers):
    model = RESNET(num_classes=5, head=layers, dtype=jnp.bfloat16)
    variables = random_variables(model)
    logits, out = jax.eval_shape(model.apply, variables, images())
    assert logits.dtype == out["embedding"].dtype == jnp.float32 and out["stage2"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_low_rank_updates_of_head_layers_merge():
    addition = ("lora", {"rank": 2, "targets": "head/(dense0|out)/kernel"})
    model = RESNET(num_classes=5, head=LAYERS)
    variables = random_variables(model)
    added = peft.init(model, variables, [addition], jax.random.key(0))
    assert set(trees.flatten(added)) == {f"lora/head/{layer}/{leaf}" for layer in ("dense0", "out") for leaf in "ab"}
    both = {**variables, "params": {**variables["params"], **jax.tree.map(lambda x: x + 0.3, added)}}
    adapted = peft.Adapted(model, (addition,)).apply(both, images())[0]
    close(model.apply(peft.merge(both, (addition,)), images())[0], adapted)


def test_all_that_is_wrong_with_a_head_is_in_one_error():
    layers = [
        ("dens", {}),
        ("dense", {"features": 0}),
        ("dropout", {"rate": 1.0}),
        ("relu", {"x": 1}),
        ("pool", {}),
        "relu",
    ]
    with pytest.raises(ValueError) as error:
        head.check(layers)
    for text in (
        "model.head is invalid",
        "no head layer 'dens' (did you mean 'dense'?)",
        "dense: features = 0, expected an integer of at least 1",
        "dropout: rate = 1.0, expected a number of at least 0 and below 1",
        "relu has no parameter 'x'",
        "pool is layer 4 of the head; it reads the backbone's feature map, so it must be the first layer",
        "'relu' is not a pair",
    ):
        assert text in str(error.value)
    assert head.check([["dense", {}], ["relu", {}], ["dense", {}]]) == (("dense", {}), ("relu", {}), ("dense", {}))


@pytest.fixture
def small(monkeypatch):
    """The names of a small ResNet and a small ViT in the model table."""
    module = functools.partial(resnet.ResNet, depths=(1, 1), widths=(4, 8), cifar=True)
    vits = vit.vit_variants("small_vit", functools.partial(VIT.func, **VIT.keywords), 3, 24)
    resnets = {"small_resnet": Variant(module, Card("small_resnet", CLASSES, 16), resnet.CIFAR_LAYOUTS, {})}
    return add_variants(monkeypatch, resnets), add_variants(monkeypatch, vits)


def moved(variables):
    """Other numbers in every leaf."""
    return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.25), variables)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [BOTTLENECK, POOLED, FLAT], ids=["bottleneck", "pooled", "flat"])
def test_a_head_goes_out_and_comes_back_bit_equal_with_its_card(small, layers, tmp_path):
    path = tmp_path / "w.safetensors"
    name = small[layers == POOLED]
    made = load.load(name, "", 3, head=layers)
    variables = moved(made.variables)
    for layout in ("native", None):
        load.export(variables, name, path, card=made.card, layout=layout)
        loaded = load.load(name, path)
        assert loaded.card == made.card and loaded.card.head == loaded.model.head == layers
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
        assert "new" not in loaded.origins.values() and loaded.dropped == ()
    keys = set(formats.read(path)[0])
    assert {key for key in keys if "/" in key} == {key for key in made.origins if "/head/" in key}, (
        "beside the family's"
    )
    listed = inspection.inspect(path)
    assert "params/head/out/kernel" in listed and '"head": [["' in listed
    assert load.source_head(name, path) is None, "its classifier does not read pre_logits"


def test_a_plain_head_has_the_familys_names_and_no_layers_on_its_card(small, tmp_path):
    for name, key in zip(small, ("linear.weight", "head.weight"), strict=True):
        load.export(pretrained_variables(name), name, tmp_path / "w.safetensors", card=models.get(name).card)
        tensors, metadata = formats.read(tmp_path / "w.safetensors")
        assert key in tensors and not any("/" in name for name in tensors)
        assert '"head"' not in metadata[load.CARD_KEY]


@pytest.mark.slow
def test_a_new_head_replaces_the_layers_of_a_file_and_has_the_numbers_of_its_seed(small, tmp_path):
    path, name = tmp_path / "w.safetensors", small[1]
    old = load.load(name, "", 4, head=FLAT)
    variables = moved(old.variables)
    load.export(variables, name, path, card=old.card)
    loaded = load.load(name, path, 3, head=POOLED, seed=5, head_init="lecun")
    scratch = load.load(name, "", 3, head=POOLED, seed=5, head_init="lecun")
    assert loaded.card.head == POOLED and set(loaded.dropped) == {
        f"params/head/{layer}/{leaf}" for layer in ("dense1", "out") for leaf in ("kernel", "bias")
    }
    for kind in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, loaded.variables[kind]["head"], scratch.variables[kind]["head"])
    backbones = (tree["params"]["backbone"] for tree in (loaded.variables, variables))
    jax.tree.map(np.testing.assert_array_equal, *backbones)
    assert {leaf for leaf, origin in loaded.origins.items() if origin == "new"} == {
        leaf for leaf in loaded.origins if "/head/" in leaf
    }
    bare = load.load(name, path, 0)
    assert "head" not in bare.variables["params"] and bare.card.head == ()
    with pytest.raises(ValueError, match=r"keeps its own head, whose layers are \(\('flatten', {}\), .* asked for"):
        load.load(name, path, head=POOLED)


@pytest.mark.slow
def test_flatten_makes_its_dense_layer_for_the_input_size(small):
    sizes = [load.load(small[0], "", 3, image_size=size, head=FLAT) for size in (16, 24)]
    shapes = [loaded.variables["params"]["head"]["dense1"]["kernel"].shape for loaded in sizes]
    assert shapes == [(8 * 8 * 8, 3), (12 * 12 * 8, 3)]


def test_a_head_that_cannot_be_built_is_refused_before_a_file_is_read():
    with pytest.raises(ValueError, match=r"model\.head is invalid[\s\S]*no head layer 'dens'"):
        load.load("resnet18", "nowhere.pth", 3, head=(("dens", {}),))


@pytest.mark.slow
def test_the_folder_of_a_run_is_its_whole_network_and_the_card_names_the_model(small, tmp_path):
    made = load.load(small[0], "", 3, head=BOTTLENECK)
    load.export(made.variables, small[0], tmp_path / "model.safetensors", card=made.card)
    for name in (small[0], ""):
        loaded = load.load(name, tmp_path)
        assert (loaded.card, loaded.sha256) == (made.card, formats.sha256(tmp_path / "model.safetensors"))
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, made.variables)
    assert '"small_resnet"' in inspection.inspect(tmp_path)
    tensors, _ = formats.read(tmp_path / "model.safetensors")
    formats.write_safetensors(tmp_path / "model.safetensors", tensors, {})
    with pytest.raises(ValueError, match="has no weight card that names its model: give the name"):
        load.load("", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(IsADirectoryError, match=r"weight files in it: \['other.safetensors'\]"):
        load.load(small[0], tmp_path)


def test_every_name_of_the_table_takes_layers():
    for name, variant in models.MODELS.items():
        assert variant.module(num_classes=2, head=BOTTLENECK).head == BOTTLENECK, name
