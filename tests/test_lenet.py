"""Networks for small images of several domains: LeNet, and the perceptron of ColoredMNIST."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import close

from configs import smoke
from tl_jax import config as options
from tl_jax import models
from tl_jax.core import trees
from tl_jax.methods import rules
from tl_jax.models import conversion, mlp, peft
from tl_jax.models.kernels import convolve
from tl_jax.models.lenet import LeNet
from tl_jax.runtime import sharding
from tl_jax.training import build
from tl_jax.weights import formats, load

SMALL = functools.partial(LeNet, num_classes=3, widths=(4, 6, 10))


def images(size=28, batch=5, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, size, size, 3)).astype(np.float32)


def random_variables(model, size=28):
    flat = trees.flatten(jax.eval_shape(model.init, jax.random.key(0), images(size)))
    rng = np.random.default_rng(0)
    return trees.unflatten({path: 0.2 * rng.standard_normal(x.shape).astype(np.float32) for path, x in flat.items()})


# LeNet


@pytest.mark.parametrize(("name", "channels"), [("lenet", 3), ("lenet_grey", 1)])
def test_it_computes_what_torch_computes_from_tllibs_names_and_back(name, channels, tmp_path):
    torch = pytest.importorskip("torch_reference").torch
    nn, path = torch.nn, tmp_path / "w.pth"
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(channels, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(20, 50, 5), nn.Dropout2d(0.5),
        nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Dropout(0.5),
    ).eval()  # fmt: skip
    whole = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(500, 7)})
    x = np.repeat(images()[..., :1], 3, axis=3) if channels == 1 else images()
    with torch.no_grad():
        features = backbone(torch.tensor(x[..., :channels].transpose(0, 3, 1, 2)))
        expected = whole["head"](features).numpy()
    for state in (whole.state_dict(), backbone.state_dict()):
        torch.save(state, path)
        loaded = load.load(name, path, None if len(state) == 8 else 7)
        logits, out = loaded.model.apply(loaded.variables, x)
        close(out["pre_logits"], features.numpy())
        assert loaded.layout == "tllib" and loaded.card.num_classes == 7
        if len(state) == 8:
            close(logits, expected)
            load.export(loaded.variables, name, tmp_path / "w.safetensors", card=loaded.card, layout="tllib")
            tensors, _ = formats.read(tmp_path / "w.safetensors")
            assert tensors.keys() == state.keys()
            for key, value in state.items():
                np.testing.assert_array_equal(tensors[key], value.numpy())


@pytest.mark.parametrize("name", ["lenet", "lenet_grey"])
def test_every_layout_goes_out_and_comes_back_bit_equal(name, tmp_path):
    variables, card = random_variables(models.get(name).module(num_classes=10)), models.get(name).card
    for kind in models.get(name).layouts:
        load.export(variables, name, tmp_path / "w.safetensors", card=card, layout=kind)
        loaded = load.load(name, tmp_path / "w.safetensors")
        assert (loaded.layout, loaded.card) == (kind, card)
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, variables)
    assert (card.mean, card.std, card.input_size, card.crop) == ((0.5,) * 3, (0.5,) * 3, 28, 1.0)
    bias = conversion.sources_of(models.get(name).layouts["tllib"], "params/backbone/block0/conv/bias")[0]
    assert bias == ("backbone.3.bias",)


@pytest.mark.slow
def test_running_from_any_cut_gives_the_same_logits():
    model = SMALL()
    variables = random_variables(model)
    logits, out = model.apply(variables, images())
    assert tuple(out) == (*model.cuts, "embedding", "logits") and model.cuts == (
        "stem",
        "block0",
        "block1",
        "pre_logits",
    )
    assert [out[cut].shape[1:] for cut in model.cuts] == [(12, 12, 4), (4, 4, 6), (10,), (10,)]
    for cut in model.cuts:
        np.testing.assert_array_equal(model.apply(variables, out[cut], start=cut)[0], logits)
        np.testing.assert_array_equal(model.apply(variables, images(), stop=cut)[0], out[cut])
    assert SMALL().apply(random_variables(model, 33), images(33))[0].shape == (5, 3)  # odd sides lose their last row
    with pytest.raises(ValueError, match=r"drop_path=0\.1: LeNet has no residual branches"):
        SMALL(drop_path=0.1).init(jax.random.key(0), images())


@pytest.mark.slow
def test_whole_channels_and_features_are_dropped_in_training_behind_the_deterministic_cut():
    model = SMALL(widths=(4, 60, 400))
    variables = random_variables(model)
    (_, plain), (_, first), (_, again), (_, other) = (
        model.apply(variables, images(), train, rngs={"dropout": jax.random.key(seed)})
        for train, seed in ((False, 0), (True, 0), (True, 0), (True, 1))
    )
    assert model.deterministic_cuts == ("stem",) and SMALL(rate=0.0).deterministic_cuts == model.cuts
    np.testing.assert_array_equal(first["stem"], plain["stem"])
    np.testing.assert_array_equal(first["logits"], again["logits"])
    assert not np.array_equal(first["logits"], other["logits"])
    bias = variables["params"]["backbone"]["block0"]["conv"]["bias"]
    dropped = (np.asarray(first["block0"]) == 0).all(axis=(1, 2))  # a dropped channel is relu(0)
    assert 0.3 < dropped.mean() < 0.7 and bias.shape == (60,)
    active = np.asarray(first["block1"]) > 0
    kept = np.asarray(first["pre_logits"])[active] / np.asarray(first["block1"])[active]
    assert set(np.unique(kept.round(4))) == {0.0, 2.0} and abs(kept.mean() - 1) < 0.1


def test_the_grey_form_reads_the_mean_of_the_channels():
    model, x = SMALL(channels=1), images()
    variables = random_variables(model)
    assert variables["params"]["backbone"]["stem"]["conv"]["kernel"].shape == (5, 5, 1, 4)
    grey = np.repeat(x.mean(axis=3, keepdims=True), 3, axis=3)
    close(model.apply(variables, x)[0], model.apply(variables, grey)[0])


def test_new_layers_have_torchs_range_and_rules_know_the_parts():
    model = LeNet(num_classes=2)
    variables = model.init(jax.random.key(0), images())
    params = variables["params"]["backbone"]
    for (part, layer), fan_in in {("stem", "conv"): 75, ("block0", "conv"): 500, ("block1", "dense"): 800}.items():
        kernel = np.asarray(params[part][layer]["kernel"])
        assert 0.95 < np.abs(kernel).max() * np.sqrt(fan_in) <= 1 and not params[part][layer]["bias"].any()
        assert kernel.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)
    paths = list(trees.flatten(variables["params"]))
    matches = trees.match_rules(paths, rules.make_rules("last_k", paths, model.cuts, 1))
    assert {path.split("/")[1] for path, match in matches.items() if match.value != "frozen"} == {
        "block1",
        "kernel",
        "bias",
    }


@pytest.mark.slow
def test_low_rank_updates_of_its_convolutions_merge():
    model, addition = SMALL(rate=0.0), ("lora", {"rank": 2, "targets": "backbone/.*/kernel"})
    variables = random_variables(model)
    added = jax.tree.map(lambda x: x + 0.3, peft.init(model, variables, [addition], jax.random.key(0)))
    both = {**variables, "params": {**variables["params"], **added}}
    adapted = peft.Adapted(model, (addition,)).apply(both, images())[0]
    assert np.abs(adapted - model.apply(variables, images())[0]).max() > 0.1
    close(model.apply(peft.merge(both, (addition,)), images())[0], adapted)


def test_bfloat16_computes_near_float32():
    model = SMALL()
    variables = random_variables(model)
    logits, out = model.clone(dtype=jnp.bfloat16).apply(variables, images())
    assert out["block1"].dtype == jnp.bfloat16 and logits.dtype == out["pre_logits"].dtype == jnp.float32
    close(logits, model.apply(variables, images())[0], 0.05)


@pytest.mark.slow
def test_a_convolution_without_padding_by_patches_is_xlas(monkeypatch):
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 11, 9, 4), (5, 5, 4, 6)))

    def both(x, kernel):
        return jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(convolve.valid(*a))), (0, 1))(x, kernel)

    found = []
    for by_hand in (True, False):
        monkeypatch.setattr(convolve, "by_hand", lambda dtype, by_hand=by_hand: by_hand)
        found.append(both(x, kernel))
    assert convolve.valid(x, kernel).shape == (3, 7, 5, 6)
    jax.tree.map(close, *found)


def test_a_frozen_prefix_of_lenet_ends_before_what_is_random():
    config = options.override(smoke.get_config(), {"model.name": "lenet", "model.weights": "", "model.image_size": 0})
    (phase,) = build.build(config, sharding.make_parallel()).phases
    assert phase.plan.prefix.cut == "stem"


# The perceptron of ColoredMNIST


def test_the_perceptron_reads_red_and_green_in_the_order_of_pixels():
    variant = models.get("mlp_colored_mnist")
    model, x = variant.module(num_classes=1, head_init="xavier"), images(14)
    variables = model.init(jax.random.key(0), x)
    leaves = trees.flatten(variables["params"])
    # 392 inputs, twice 390, one output, as in the paper's code
    assert sum(leaf.size for leaf in leaves.values()) == 393 * 390 + 391 * 390 + 391
    y = x[..., :2].reshape(5, 392).astype(np.float64)
    for part in ("backbone/stem/dense", "backbone/block0/dense", "head"):
        kernel, bias = np.asarray(leaves[f"{part}/kernel"], np.float64), leaves[f"{part}/bias"]
        bound = np.sqrt(6 / sum(kernel.shape))
        assert 0.9 * bound < np.abs(kernel).max() <= bound * (1 + 1e-6) and not np.any(bias)
        y = y @ kernel
        y = y if part == "head" else np.maximum(y, 0)
    logits, out = model.apply(variables, x)
    close(logits, y)
    assert tuple(out) == ("stem", "block0", "pre_logits", "embedding", "logits") == (*model.cuts, "embedding", "logits")
    for cut in model.cuts:
        np.testing.assert_array_equal(model.apply(variables, out[cut], start=cut)[0], logits)
        np.testing.assert_array_equal(model.apply(variables, x, stop=cut)[0], out[cut])
    assert (variant.card.mean, variant.card.std, variant.card.input_size) == ((0.0,) * 3, (1.0,) * 3, 14)
    assert isinstance(model, mlp.MLP) and model.deterministic_cuts == model.cuts


def test_the_perceptron_goes_out_and_comes_back_bit_equal(tmp_path):
    made = load.load("mlp_colored_mnist", "", 2, head_init="xavier", seed=3)
    load.export(made.variables, "mlp_colored_mnist", tmp_path / "w.safetensors", card=made.card)
    loaded = load.load("mlp_colored_mnist", tmp_path / "w.safetensors")
    assert (loaded.card, loaded.layout) == (made.card, "native") and load.example_input(made.card).shape == (
        1,
        14,
        14,
        3,
    )
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, made.variables)
