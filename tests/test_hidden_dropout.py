"""model.hidden_dropout: transformers' numbers and gradients under the same masks, and what must not change."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_families import FAMILIES, input_of, make, variables_of
from test_pretrained import close
from test_text_encoders import LENGTH, network, numbers, small, texts, twin, write  # noqa: F401

from configs import transfer
from tl_jax import config as options
from tl_jax import models
from tl_jax.core import trees
from tl_jax.models import attention, layers, peft, transformer, vit
from tl_jax.runtime import sharding
from tl_jax.training import build
from tl_jax.weights import load

torch_reference = pytest.importorskip("torch_reference")
transformers = pytest.importorskip("transformers")
torch = torch_reference.torch
RATE, INSIDE = 0.3, ("clip_text", "vit", "dinov2", "clip", "siglip", "siglip_text")
ONE_NOW = pytest.mark.parametrize(
    "family", ["clip_text", *(pytest.param(x, marks=pytest.mark.slow) for x in INSIDE[1:])]
)


def vision(monkeypatch):
    """transformers' small ViT and ours in the table of models as small_vit, and its input."""
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    theirs = torch_reference.randomize(transformers.ViTForImageClassification(
        transformers.ViTConfig(**shape, image_size=16, patch_size=8, num_labels=4)
    ))  # fmt: skip
    small_vit = functools.partial(vit.ViT, patch_size=8, width=24, depth=2, heads=3, image_size=16, norm_eps=1e-12)
    for name, variant in vit.vit_variants("small_vit", small_vit, 3, 16).items():
        monkeypatch.setitem(models.MODELS, name, variant)
    x = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)
    return theirs, x, {"pixel_values": torch.from_numpy(np.moveaxis(x, -1, 1).copy())}


def same_masks(monkeypatch):
    """Both sides take their masks, in the order of the network, from generators of one seed; returns their shapes."""
    ours, their, shapes = np.random.default_rng(7), np.random.default_rng(7), {"ours": [], "theirs": []}

    def kept(key, rate, shape):
        shapes["ours"].append(tuple(shape))
        return jnp.asarray(ours.random(shape) >= rate)

    def dropout(input, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return input
        shapes["theirs"].append(tuple(input.shape))
        return input * torch.from_numpy(their.random(tuple(input.shape)) >= p) / (1 - p)

    monkeypatch.setattr(layers, "kept", kept)
    monkeypatch.setattr(transformer, "kept", kept)
    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    return shapes


def set_rates(model):
    """The rate of everything that drops within transformers' network; not before its last layer."""
    for name, module in model.named_modules():
        inside = name.split(".")[0] not in ("dropout", "classifier")
        if isinstance(module, torch.nn.Dropout):
            module.p = RATE if inside else 0.0
        if hasattr(module, "attention_dropout"):  # ViT's is a number
            module.attention_dropout = RATE


# DistilBERT's is absent: transformers drops nothing behind its attention.
@pytest.mark.parametrize(
    "kind", ["bert", *(pytest.param(x, marks=pytest.mark.slow) for x in ("roberta", "gpt2", "vit"))]
)
def test_numbers_and_gradients_are_those_of_transformers_under_the_same_masks(kind, monkeypatch, tmp_path):
    if kind == "vit":
        (theirs, x, given), name = vision(monkeypatch), "small_vit.hf"
    else:
        theirs, name, x = twin(kind, "ForSequenceClassification"), f"small_{kind}", texts([LENGTH, 5, LENGTH])
        x[..., 0] = np.where(x[..., 0] < 0, -1, np.maximum(x[..., 0], 2))  # 0 and 1 are their padding
        given = numbers(theirs, x)
    own, table = load.load(name, write(theirs, tmp_path / "w.pth")), models.get(name).layouts["hf"]
    theirs.set_attn_implementation("eager")
    set_rates(theirs)
    shapes = same_masks(monkeypatch)
    model = own.model.clone(hidden_dropout=RATE)

    def loss(params):
        logits, _ = model.apply({"params": params}, x, True, rngs={"dropout": jax.random.key(0)})
        return jnp.sin(logits).sum(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(own.variables["params"])
    theirs.train().zero_grad()
    expected = theirs(**given).logits
    expected.sin().sum().backward()
    theirs.eval()
    assert shapes["ours"] == shapes["theirs"] and len(shapes["ours"]) == 1 + 3 * model.depth
    close(logits, expected.detach().numpy(), 1e-5)
    named = {functools.reduce(lambda name, row: re.sub(*row, name), table.aliases, name): leaf
             for name, leaf in theirs.named_parameters()}  # fmt: skip
    for path, ours in trees.flatten(gradient).items():
        keys, transform = load.tables.sources_of(table, f"params/{path}")
        for key, value in zip(keys, transform.export(np.asarray(ours)) if keys else (), strict=True):
            wanted = named[key].grad.numpy()
            assert np.abs(value - wanted).max() < 1e-4 * max(np.abs(wanted).max(), 0.1), key


@pytest.mark.slow
def test_the_share_that_is_kept_and_the_mean_of_what_is_dropped():
    masks = {shape: np.asarray(layers.kept(jax.random.key(1), 0.1, shape)) for shape in ((400, 3, 101), (1000, 64))}
    for mask in masks.values():
        assert abs(mask.mean() - 0.9) < 4 * np.sqrt(0.09 / mask.size)
    halves = np.moveaxis(masks[1000, 64].reshape(1000, 32, 2), -1, 0)  # of one random number
    assert abs((halves[0] & halves[1]).mean() - 0.81) < 4 * np.sqrt(0.81 * 0.19 / halves[0].size)
    assert layers.kept(jax.random.key(0), 1 - 1e-7, (9, 9)).dtype == bool

    class Drops(layers.nn.Module):
        @layers.nn.compact
        def __call__(self, x):
            return layers.dropped(self, 0.25, x)

    x = jnp.asarray(np.random.default_rng(0).standard_normal(12), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 20000)
    many = np.asarray(jax.vmap(lambda key: Drops().apply({}, x, rngs={"dropout": key}))(keys))
    assert (np.isclose(many, 0) | np.isclose(many, x / 0.75)).all()
    np.testing.assert_array_less(np.abs(many.mean(0) - x), 5 * np.abs(x) * np.sqrt(0.25 / 0.75 / 20000))
    half = Drops().apply({}, x.astype(jnp.bfloat16), rngs={"dropout": jax.random.key(0)})
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("way", ["cpu", "xla", "cudnn"])
def test_probabilities_are_dropped_by_every_way_of_attention(way, monkeypatch):
    """Where cuDNN could be had, XLA computes them in its place."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 300, 2, 8)).astype(np.float32) for _ in range(3))
    mask, keep = np.arange(300) < np.array([[300], [211]]), rng.random((2, 2, 300, 300)) < 0.7
    monkeypatch.setattr(attention.convolve, "on_cpu", lambda: way == "cpu")  # in several parts of the keys there
    monkeypatch.setattr(attention, "unfused", lambda dtype, size: "")
    found = attention.attend(q, k, v, "cudnn" if way == "cudnn" else "xla", mask=mask, causal=True, kept=keep)
    scores = np.einsum("bqhd,bkhd->bhqk", q.astype(np.float64), k) / np.sqrt(8)
    scores = np.where(mask[:, None, None] & np.tri(300, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = np.where(keep, weights / weights.sum(-1, keepdims=True), 0)
    close(found, np.einsum("bhqk,bkhd->bqhd", weights, v), 1e-5)


@functools.cache
def drawn(family, **fields):
    """(logits, out) in training, and the gradient of a sum of the logits."""
    model, x = make(family, hidden_dropout=RATE, **fields), input_of(family)

    def loss(params):
        logits, out = model.apply({"params": params}, x, True, rngs={"dropout": jax.random.key(3)})
        return jnp.sin(logits).sum(), (logits, out)

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables_of(family, make(family))["params"])
    return *found, gradient


@pytest.mark.slow
@ONE_NOW
def test_nothing_is_dropped_out_of_training_or_at_rate_zero(family):
    model, x = make(family), input_of(family)
    variables = variables_of(family, model)
    plain, out = jax.jit(model.apply)(variables, x)
    still, same = jax.jit(model.clone(hidden_dropout=0.9).apply)(variables, x)  # and draws nothing: there is no key
    jax.tree.map(np.testing.assert_array_equal, (still, same), (plain, out))
    jax.eval_shape(functools.partial(model.apply, train=True), variables, x)
    logits, out, _ = drawn(family)
    assert np.isfinite(logits).all() and np.abs(logits - plain).max() > 1e-3
    # The map behind the last block is that whose class token or last token makes the features.
    again, _ = jax.jit(functools.partial(model.apply, start=model.cuts[-2]))(variables, out[model.cuts[-2]])
    close(again, logits, 1e-5)
    assert model.clone(hidden_dropout=0.9).deterministic_cuts == ()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", INSIDE)
def test_recomputed_blocks_and_half_precision_have_the_same_masks(family):
    logits, _, gradient = drawn(family)
    for remat in ("block", "dots"):
        again, _, other = drawn(family, remat=remat)
        close(again, logits, 1e-6)
        jax.tree.map(functools.partial(close, tolerance=1e-4), other, gradient)
    half, out, _ = drawn(family, dtype=jnp.bfloat16)
    close(half, logits, 0.1)
    assert out["stem"].dtype == out["block1"].dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("family", INSIDE)
def test_several_devices_draw_the_masks_of_one(family):
    model, x = make(family, hidden_dropout=RATE), input_of(family)
    x, variables = np.concatenate([x] * 4)[:8], variables_of(family, make(family))
    run = jax.jit(lambda variables, x: model.apply(variables, x, True, rngs={"dropout": jax.random.key(3)})[0])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    close(run(variables, spread), run(variables, x), 1e-6)


@pytest.mark.thin(2)
@pytest.mark.parametrize("family", [x for x in FAMILIES if x not in INSIDE])
def test_networks_without_places_for_it_refuse_it(family):
    model = make(family, hidden_dropout=0.1)
    with pytest.raises(ValueError, match=r"model\.hidden_dropout=0\.1: .* has no places for it, as ViT and trans"):
        jax.eval_shape(model.init, jax.random.key(0), input_of(family))


@pytest.mark.slow
def test_a_run_refuses_what_it_cannot_be_together_with(tmp_path):
    changes = {"model.name": "vit_tiny_patch16_224", "model.image_size": 32, "data.source": "digits"}
    changes |= {"model.hidden_dropout": 0.1, "cache": "features", "cache_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"its output is random \(model\.hidden_dropout\)"):  # no prefix is frozen
        build.build(options.override(transfer.get_config(), changes), sharding.make_parallel())
    parts = {"image": {"name": "vit_tiny_patch16_224"}, "text": {"name": "bert_tiny"}}
    fusion = {"model.name": "fusion", "model.parts": parts, "model.hidden_dropout": 0.1}
    with pytest.raises(ValueError, match=r"model\.hidden_dropout = 0\.1: a fusion does without"):
        options.check(options.override(transfer.get_config(), fusion))


def test_dropping_by_cudnn_is_said_in_the_log(monkeypatch, capsys):
    monkeypatch.setattr(build, "unfused", lambda dtype, size: "")
    changes = {"model.name": "vit_tiny_patch16_224", "model.image_size": 32, "model.attention": "cudnn"}
    settings = build.read(options.override(transfer.get_config(), {**changes, "model.hidden_dropout": 0.1}))
    found = build._configure(settings, types.SimpleNamespace(model=make("vit")), sharding.make_parallel())
    assert isinstance(found, peft.Adapted) and found.model.hidden_dropout == 0.1
    assert "in training XLA computes the attention in its place" in capsys.readouterr().out
