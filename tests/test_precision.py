"""What the layers compute, in which type, and what the backward pass keeps: attention, GELU, bfloat16, remat."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plans import as_batch, make_plan, make_tx
from scipy.special import erf

from tl_jax import models
from tl_jax.core import trees
from tl_jax.core.options import OPTIONS
from tl_jax.models import attention, layers
from tl_jax.models.vit import ViT
from tl_jax.runtime import roofline, sharding
from tl_jax.training import optim, steps

CLASSES = 7
VIT = functools.partial(ViT, num_classes=CLASSES, patch_size=8, width=32, depth=2, heads=2, image_size=16)
NAMES = ("resnet8_cifar", "resnet18", "resnet50")
RESNETS = [functools.partial(models.get(name).module, num_classes=CLASSES) for name in NAMES]


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_gelu_and_its_gradient_are_those_of_float64():
    x = np.linspace(-8, 8, 4001).astype(np.float32)
    exact = x.astype(np.float64)
    cumulative = 0.5 * (1 + erf(exact / math.sqrt(2)))
    np.testing.assert_allclose(layers.gelu(x), exact * cumulative, rtol=1e-5, atol=2e-6)
    slope = cumulative + exact * np.exp(-(exact**2) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(jax.vmap(jax.grad(layers.gelu))(x), slope, rtol=1e-5, atol=2e-6)
    assert layers.gelu(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("tokens", [5, 300])  # of 300 the scores are made in two parts
def test_attention_and_its_gradient_are_those_of_jax_and_of_float64(tokens):
    q, k, v = (random(2, tokens, 3, 8, seed=seed) for seed in range(3))
    bias = random(1, 3, tokens, tokens, seed=3)

    def value(attend, q, k, v, bias):
        return jnp.sum(jnp.sin(attend(q, k, v, bias=bias)))

    for its in (None, bias):
        grads = jax.grad(functools.partial(value, attention.attend), argnums=(0, 1, 2))(q, k, v, its)
        theirs = jax.grad(functools.partial(value, jax.nn.dot_product_attention), argnums=(0, 1, 2))(q, k, v, its)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), grads, theirs)
        scores = np.einsum("bqhd,bkhd->bhqk", *(np.asarray(x, np.float64) for x in (q, k))) / math.sqrt(8)
        weights = np.exp(scores + (0 if its is None else np.asarray(its, np.float64)))
        expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), np.asarray(v, np.float64))
        np.testing.assert_allclose(attention.attend(q, k, v, bias=its), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [16, 17])
def test_the_fused_attention_lowers_for_a_gpu_with_its_gradient(tokens, monkeypatch):
    """No GPU runs it here: this holds that jax accepts the call, and that cuDNN's kernels are what it asks for."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def loss(dtype, q, k, v):
        return jnp.sum(attention.attend(*(x.astype(dtype) for x in (q, k, v)), "cudnn").astype(jnp.float32))

    def trace(dtype):
        shape = jax.ShapeDtypeStruct((2, tokens, 3, 64), jnp.float32)
        return jax.jit(jax.grad(functools.partial(loss, dtype), argnums=(0, 1, 2))).trace(shape, shape, shape)

    fused, plain = trace(jnp.bfloat16), trace(jnp.float32)
    assert "__cudnn$fmhaSoftmaxBackward" in fused.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn" not in plain.lower(lowering_platforms=("cuda",)).as_text()
    one = 2 * 2 * 3 * (tokens + tokens % 2) ** 2 * 64  # it computes the scores again for the gradient
    assert roofline.work(fused.jaxpr) == 7 * one
    assert roofline.work(plain.jaxpr) == 6 * one * tokens**2 / (tokens + tokens % 2) ** 2


def test_why_there_is_no_fused_attention_is_said(monkeypatch):
    assert attention.unfused(jnp.bfloat16, 64) == "there is no GPU"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.unfused(jnp.bfloat16, 64) == ""
    assert "half precision" in attention.unfused(jnp.float32, 64)
    assert "132 values" in attention.unfused(jnp.bfloat16, 132) and "36 values" in attention.unfused(jnp.bfloat16, 36)
    for capability, reason in {"7.0": "this is 7.0", "gfx90a": "this is gfx90a", "9.0": "", "10.0": ""}.items():
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert attention.unfused(jnp.bfloat16, 64).rpartition(", ")[2] == reason


def abstract_step(model, size, accumulate=1, batch_size=4):
    """A full train step of a network with Adam and clipping, and the shapes of its state and batch."""
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    parallel = sharding.make_parallel("jit", jax.devices()[:1])
    plan = make_plan(model, variables, parallel, CLASSES, accumulate=accumulate, ema=0.9)
    tx, shape = make_tx(plan, optim.Group(), 1e-3), jax.ShapeDtypeStruct
    state = jax.eval_shape(lambda v: steps.init_state(plan, tx, v, {}, 0), variables)
    batch = as_batch(shape((batch_size, size, size, 3), jnp.uint8), shape((batch_size,), jnp.int32))
    return steps.make_train_step(plan, tx), state, batch


def equations(jaxpr):
    """All equations of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.slow
@pytest.mark.parametrize("make", [VIT, *RESNETS], ids=["vit", *NAMES])
def test_a_bfloat16_step_multiplies_in_bfloat16_but_for_the_head_and_keeps_everything_else_float32(make):
    step, state, batch = abstract_step(make(dtype=jnp.bfloat16), 16 if make is VIT else 32)
    jaxpr, out = jax.make_jaxpr(step, return_shape=True)(state, batch)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(out)} == {"float32", "int32", "uint32"}
    products = {"dot_general": 0, "conv_general_dilated": 0}
    for equation in equations(jaxpr.jaxpr):
        name, inputs = equation.primitive.name, [value.aval for value in equation.invars]
        if name in products:
            products[name] += 1
            if any(value.dtype == jnp.float32 for value in inputs):
                assert any(CLASSES in value.shape for value in inputs), equation
        if name in ("exp", "log", "rsqrt", "erf"):  # the loss, the softmax, norms and their statistics, GELU
            assert all(value.dtype != jnp.bfloat16 for value in inputs), equation
    assert sum(products.values()) > 20


def cost(model, size=16, **choices):
    """FLOPs and temporary bytes of a step as `Parallel` compiles it, and the bytes of one gradient."""
    step, state, batch = abstract_step(model, size, **choices)
    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    compiled = lowered.compile(compiler_options=sharding.OPTIONS["cpu"])
    gradient = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes, gradient


@pytest.fixture
def optimised():
    """Costs are those of programs as they are compiled outside the tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_each_remat_takes_less_memory_and_more_work(optimised):
    make = functools.partial(VIT, patch_size=2, width=64, depth=4)
    (work, memory, _), (dots_work, dots_memory, _), (block_work, block_memory, _) = (
        cost(make(remat=remat), batch_size=32) for remat in ("", "dots", "block")
    )
    assert work < dots_work < 1.1 * work < block_work < 1.35 * work
    assert block_memory < 0.8 * dots_memory < 0.54 * memory


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("make", [functools.partial(VIT, patch_size=2, width=64, depth=4), RESNETS[0]])
def test_a_step_in_parts_takes_the_memory_of_a_part_and_one_gradient(make, optimised):
    whole, part = (cost(make(), size=16, batch_size=size)[1] for size in (128, 32))
    _, parts, gradient = cost(make(), size=16, batch_size=128, accumulate=4)
    pixels = 128 * 16 * 16 * 3  # the batch itself is put in order
    assert parts < 1.02 * (part + gradient + pixels) < 0.6 * whole, (parts, part, gradient, whole)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(VIT, id="vit", marks=pytest.mark.slow),
        pytest.param(RESNETS[0], id="resnet", marks=pytest.mark.slow),
    ],
)
def test_every_remat_gives_the_same_gradient(make):
    variables = jax.jit(make(head_init="lecun").init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    images, rngs = random(4, 16, 16, 3), {"dropout": jax.random.key(1)}

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, remat):
        def loss(params):
            model, inputs = make(remat=remat, drop_path=0.5), {**variables, "params": params}
            (logits, _), _ = model.apply(inputs, images, train=True, mutable=["batch_stats"], rngs=rngs)
            return jnp.sum(jnp.sin(logits))

        return jax.grad(loss)(params)

    plain, scale = gradient(variables["params"], ""), {}
    for path, leaf in trees.flatten(plain).items():
        scale[path] = np.abs(leaf).max()
    for remat in ("block", "dots"):
        for path, leaf in trees.flatten(gradient(variables["params"], remat)).items():
            np.testing.assert_allclose(leaf, trees.flatten(plain)[path], rtol=1e-5, atol=1e-6 + 1e-6 * scale[path])
    with pytest.raises(ValueError, match="remat='blocks': expected one of '', block, dots"):
        layers.recomputed(ViT, "blocks")
    good = OPTIONS["model.remat"].check.fits
    assert all(map(good, ("", "block", "dots"))) and not good(True)
