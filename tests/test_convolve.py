"""The forms for CPU give the numbers of the plain ones, and a folded network those of an unfolded one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.models import layers, resnet
from tl_jax.models.kernels import convolve


@pytest.fixture
def by_hand(monkeypatch):
    """The forms of one CPU device, here where four are simulated; in chunks of one image."""
    monkeypatch.setattr(convolve, "by_hand", lambda dtype: dtype == jnp.float32)
    monkeypatch.setattr(convolve, "CHUNK_BYTES", 1)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def reference(x, kernel, dy_of, stride, groups):
    """Output and both gradients in float64, one kernel position after the other; dy_of makes dy from the output."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    size, pad = len(kernel), len(kernel) // 2
    height, width, channels = x.shape[1:]
    high, wide = ((n - 1) // stride + 1 for n in (height, width))
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    dense = np.zeros((size, size, channels, kernel.shape[-1]))
    parts = [(slice(g * channels // groups, (g + 1) * channels // groups), g) for g in range(groups)]
    columns = kernel.shape[-1] // groups
    for rows, g in parts:
        dense[:, :, rows, g * columns : (g + 1) * columns] = kernel[..., g * columns : (g + 1) * columns]
    windows = {
        (i, j): (slice(None), slice(i, i + stride * high, stride), slice(j, j + stride * wide, stride))
        for i in range(size)
        for j in range(size)
    }
    y = sum(padded[window][:, :high, :wide] @ dense[place] for place, window in windows.items())
    dy, dx, dense_gradient = dy_of(y).astype(np.float64), np.zeros_like(padded), np.zeros_like(dense)
    for place, window in windows.items():
        dx[window] += dy @ dense[place].T
        dense_gradient[place] = np.einsum("bhwc,bhwf->cf", padded[window], dy)
    blocks = [dense_gradient[:, :, rows, g * columns : (g + 1) * columns] for rows, g in parts]
    return y, dx[:, pad : pad + height, pad : pad + width], np.concatenate(blocks, axis=-1)


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# batch, height, width, channels, features, size, stride, groups
SHAPES = {
    "winograd, odd sizes, prime batch": (3, 5, 7, 64, 80, 3, 1, 1),
    "few pixels, one alone": (1, 1, 1, 96, 64, 3, 1, 1),
    "few pixels": (2, 7, 5, 96, 128, 3, 1, 1),
    "winograd, one image, as few as are worth it": (1, 13, 5, 64, 64, 3, 1, 1),
    "few channels": (2, 5, 6, 16, 16, 3, 1, 1),
    "strided": (2, 6, 8, 16, 16, 3, 2, 1),
    "strided, odd sizes, prime batch": (3, 7, 5, 16, 24, 3, 2, 1),
    "strided, one image, one pixel": (1, 1, 1, 64, 64, 3, 2, 1),
    "stem": (2, 16, 12, 3, 16, 7, 2, 1),
    "stem, odd sizes, prime batch": (3, 9, 13, 3, 16, 7, 2, 1),
    "pointwise": (2, 5, 4, 8, 16, 1, 1, 1),
    "pointwise, strided, odd sizes": (3, 5, 7, 16, 8, 1, 2, 1),
    "pointwise, many pixels": (2, 120, 120, 4, 3, 1, 1, 1),
    "groups": (2, 5, 6, 64, 64, 3, 1, 4),
    "groups, strided": (2, 5, 6, 16, 32, 3, 2, 4),
    "depthwise 3, prime batch": (3, 9, 8, 24, 24, 3, 1, 24),
    "depthwise 3, strided": (2, 16, 15, 6, 6, 3, 2, 6),
    "depthwise 5, strided": (2, 7, 10, 6, 6, 5, 2, 6),
    "depthwise 7, smaller than its kernel": (2, 3, 2, 5, 5, 7, 1, 5),
    "depthwise 7": (1, 15, 8, 5, 5, 7, 1, 5),
}


@pytest.mark.thin(6)
@pytest.mark.parametrize("name", SHAPES)
def test_every_form_gives_the_numbers_of_float64_forward_and_backward(name, by_hand):
    batch, height, width, channels, features, size, stride, groups = SHAPES[name]
    x, kernel = draw(0, batch, height, width, channels), draw(1, size, size, channels // groups, features)
    y, dx, dkernel = reference(x, kernel, lambda y: draw(2, *y.shape), stride, groups)

    @jax.jit
    def run(x, kernel, dy):
        y, back = jax.vjp(lambda x, kernel: convolve.conv(x, kernel, stride, groups), x, kernel)
        return y, *back(dy)

    for found, expected in zip(run(x, kernel, draw(2, *y.shape)), (y, dx, dkernel), strict=True):
        close(found, expected)


@pytest.mark.thin(3)
@pytest.mark.parametrize("size, stride, height, width", [(3, 2, 8, 9), (5, 1, 9, 8), (5, 2, 9, 8), (7, 2, 16, 7)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_depthwise_convolution_with_any_border_is_that_of_xla(
    padding, size, stride, height, width, by_hand, monkeypatch
):
    x, kernel = draw(0, 2, height, width, 6), draw(1, size, size, 1, 6)
    pads = layers.pads_of(padding, (size, size), stride, x.shape[1:3])

    def run(x, kernel):
        y, back = jax.vjp(lambda x, kernel: convolve.conv(x, kernel, stride, 6, pads), x, kernel)
        return y, *back(jnp.sin(y))

    found = jax.jit(run)(x, kernel)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(run)(x, kernel))
    monkeypatch.setattr(convolve, "by_hand", lambda dtype: False)
    same(found, jax.jit(run)(x, kernel))


def test_a_depthwise_convolution_is_recomputed_and_exported_for_any_batch(by_hand):
    x, kernel = draw(0, 3, 8, 7, 6), draw(1, 3, 3, 1, 6)

    def loss(x, kernel):
        return jnp.sin(convolve.conv(x, kernel, 2, 6)).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    same(jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(x, kernel), gradient(x, kernel))
    (batch,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), jax.ShapeDtypeStruct(kernel.shape, x.dtype)]
    exported = jax.export.export(gradient)(*shapes)
    same(tuple(exported.call(x, kernel)), gradient(x, kernel))


def test_chunks_of_any_size_give_the_same(by_hand, monkeypatch):
    x, kernel = draw(0, 6, 4, 4, 64), draw(1, 3, 3, 64, 64)
    single = jax.jit(convolve.winograd)(x, kernel)
    for limit in (3 * 16 * 2 * 2 * 128 * 4, 2**24):  # three images at a time, all at once
        monkeypatch.setattr(convolve, "CHUNK_BYTES", limit)
        close(jax.jit(lambda x, kernel: convolve.winograd(x, kernel))(x, kernel), single, 1e-6)


def test_gradients_of_maxima_go_where_torch_sends_them(by_hand):
    torch = pytest.importorskip("torch")
    for height, width in ((8, 6), (7, 9), (1, 1)):
        x = np.random.default_rng(0).integers(-2, 2, (3, height, width, 5)).astype(np.float32)  # many equal maxima
        there = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
        expected = torch.nn.functional.max_pool2d(there, 3, stride=2, padding=1)
        dy = draw(1, *np.moveaxis(expected.detach().numpy(), 1, -1).shape)
        expected.backward(torch.tensor(np.moveaxis(dy, -1, 1)))
        y, back = jax.vjp(layers.max_pool, x)
        np.testing.assert_array_equal(y, np.moveaxis(expected.detach().numpy(), 1, -1))
        close(back(dy)[0], np.moveaxis(there.grad.numpy(), 1, -1), 1e-6)


@pytest.mark.parametrize("case", ["alone", "relu", "shortcut and relu"])
def test_a_norm_has_the_numbers_of_torch(case, by_hand):
    torch = pytest.importorskip("torch")
    relu, shortcut = "relu" in case, draw(3, 3, 5, 4, 6) if "shortcut" in case else None
    x, scale, bias, dy = draw(0, 3, 5, 4, 6) + 2, draw(1, 6), draw(2, 6), draw(4, 3, 5, 4, 6)
    given = (x, scale, bias) if shortcut is None else (x, scale, bias, shortcut)
    there = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in given]
    mean, var = there[0].mean((0, 1, 2)), there[0].var((0, 1, 2), correction=0)
    y = (there[0] - mean) * (var + 1e-5).rsqrt() * there[1] + there[2] + (there[3] if shortcut is not None else 0)
    y = y.relu() if relu else y
    y.backward(torch.tensor(dy, dtype=torch.float64))

    def ours(x, scale, bias, shortcut=None):
        y, *moments = convolve.norm(x, scale, bias, shortcut, relu, 1e-5)
        return y, moments

    found, back, moments = jax.vjp(ours, *given, has_aux=True)
    for a, b in zip((found, *moments), (y, mean, var), strict=True):
        close(a, b.detach().numpy())
    for a, b in zip(back(jnp.asarray(dy)), there, strict=True):
        close(a, b.grad.numpy())


def network(**fields):
    return resnet.ResNet(num_classes=5, depths=(1, 1), widths=(64, 64), head_init="lecun", **fields)


def drawn(model, images):
    """Variables with statistics and scales as a trained network has them."""
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    leaves, tree = jax.tree.flatten_with_path(variables)
    made = []
    for i, (path, leaf) in enumerate(leaves):
        values = draw(i, *leaf.shape) / (leaf.size // leaf.shape[-1]) ** 0.5
        flat = 1 + 0.2 * np.tanh(values) if path[-1].key in ("scale", "var") else 0.2 * values
        made.append(jnp.asarray(values if path[-1].key == "kernel" else flat))
    return jax.tree.unflatten(tree, made)


def step_of(model, images):
    """A jitted (loss, logits, statistics) and gradients of all parameters."""

    def loss(params, stats):
        (logits, _), moved = model.apply(
            {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
        )
        logits = logits.astype(jnp.float32)
        return -jax.nn.log_softmax(logits)[:, 1].mean(), (logits, moved)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def same(found, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: close(a, np.asarray(b), tolerance), found, expected)


@pytest.mark.slow
def test_a_step_by_hand_is_the_plain_step(monkeypatch):
    model, images = network(bottleneck=True), draw(0, 3, 34, 30, 3)
    variables = drawn(model, images)
    expected = step_of(model, images)(variables["params"], variables["batch_stats"])
    monkeypatch.setattr(convolve, "by_hand", lambda dtype: dtype == jnp.float32)
    same(step_of(model, images)(variables["params"], variables["batch_stats"]), expected)


def test_a_dense_layer_is_that_of_flax(by_hand):
    x, dy = draw(0, 3, 5, 24), draw(1, 3, 5, 8)
    found = []
    for module in (layers.Dense(8), nn.Dense(8)):
        variables = {"params": {"kernel": draw(2, 24, 8), "bias": draw(3, 8)}}
        y, back = jax.vjp(module.apply, variables, x)
        found.append((y, back(dy)))
    same(*found)


@pytest.mark.slow
def test_folded_norms_give_the_numbers_of_unfolded_ones_in_training():
    images, found = draw(0, 2, 32, 32, 3), []
    variables = drawn(network(), images)
    frozen = tuple(f"backbone/{norm}" for norm in ("stem/norm", "stage1/block0/norm1", "stage2/block0/shortcut/norm"))
    for fold in (True, False):
        step = step_of(network(fold=fold, frozen_norms=frozen), images)
        found.append(step(variables["params"], variables["batch_stats"]))
    same(*found)


def test_folding_rounds_no_more_than_bfloat16_does():
    images, logits = draw(0, 4, 32, 32, 3), {}
    variables = drawn(network(), images)
    for fold, dtype in ((True, jnp.bfloat16), (False, jnp.bfloat16), (False, jnp.float32)):
        model = network(fold=fold, dtype=dtype)
        logits[fold, dtype] = jax.jit(lambda images, model=model: model.apply(variables, images)[0])(images)
    exact = logits[False, jnp.float32]
    folded, unfolded = (jnp.linalg.norm(logits[fold, jnp.bfloat16] - exact) for fold in (True, False))
    assert 0 < folded < 2 * unfolded < 0.04 * jnp.linalg.norm(exact)


VMAPPED = {
    "winograd": (convolve.winograd, (2, 4, 4, 64), (3, 3, 64, 64)),
    "strided": (convolve.strided, (2, 4, 4, 8), (3, 3, 8, 8)),
    "stem": (convolve.strided, (2, 8, 8, 3), (7, 7, 3, 8)),
    "depthwise": (lambda x, kernel: convolve.conv(x, kernel, 2, 8), (2, 4, 4, 8), (3, 3, 1, 8)),
    "pointwise": (convolve.pointwise, (2, 4, 4, 8), (8, 4)),
    "norm": (lambda x, scale: convolve.norm(x, scale, scale, x, True, 1e-5)[0], (2, 4, 4, 8), (8,)),
    "max_pool": (lambda x, scale: convolve.max_pool(x) * scale, (2, 4, 4, 8), (1, 1, 1, 1)),
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("axes", [(0, None), (None, 0)], ids=["inputs", "weights"])
@pytest.mark.parametrize("name", VMAPPED)
def test_many_at_once_are_each_by_itself(name, axes, by_hand):
    function, *shapes = VMAPPED[name]
    given = [
        draw(i, *([2] if axis == 0 else []), *shape) for i, (axis, shape) in enumerate(zip(axes, shapes, strict=True))
    ]

    def run(x, weights):
        y, back = jax.vjp(function, x, weights)
        return y, *back(y)

    found = jax.jit(jax.vmap(run, in_axes=axes))(*given)
    for i in range(2):
        one = [a[i] if axis == 0 else a for a, axis in zip(given, axes, strict=True)]
        same(tuple(a[i] for a in found), jax.jit(run)(*one))


def test_other_devices_and_types_have_the_forms_of_xla(monkeypatch):
    assert not convolve.by_hand(jnp.float32)  # four simulated devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert convolve.by_hand(jnp.float32) and not convolve.by_hand(jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not convolve.by_hand(jnp.float32)
