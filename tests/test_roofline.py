"""MFU and the roofline, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.runtime import roofline, sharding
from tl_jax.runtime.roofline import Peak


def test_rates_are_those_computed_by_hand():
    limit = Peak(bfloat16=1000.0, float32=400.0, memory=10.0)
    cost = {"flops_per_step": 200.0, "bytes_per_step": 10.0}
    # 3 steps/s are 600 FLOP/s; 20 FLOPs per byte allow 200 FLOP/s of each device, less than its peak of 1000.
    found = roofline.rates(3.0, cost, limit, "bfloat16", devices=4)
    assert found == pytest.approx({"flops_per_second": 600.0, "mfu": 600 / 4000, "roofline": 600 / 800})
    # 100 FLOPs per byte would allow 1000 FLOP/s of each device; the float32 peak is 400.
    found = roofline.rates(3.0, {**cost, "bytes_per_step": 2.0}, limit, "float32", devices=4)
    assert found == pytest.approx({"flops_per_second": 600.0, "mfu": 600 / 1600, "roofline": 600 / 1600})


def test_what_is_not_known_is_not_made_up():
    cost = {"flops_per_step": 200.0, "bytes_per_step": None}
    assert roofline.rates(2.0, cost, None) == {"flops_per_second": 400.0, "mfu": None, "roofline": None}
    assert roofline.rates(2.0, cost, Peak(1, 1, 1))["roofline"] is None
    assert roofline.rates(2.0, {"flops_per_step": None, "bytes_per_step": None}, None) == {}
    assert roofline.peak(jax.devices("cpu")[0].device_kind) is None and roofline.peak("Radeon") is None


def test_devices_are_known_by_the_names_that_jax_gives_them():
    bfloat16 = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA L4": 121e12,
        "NVIDIA A100-SXM4-40GB": 312e12, "Tesla V100-SXM2-16GB": 15.7e12, "TPU v2": 23e12, "TPU v3": 61.5e12,
        "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12,
    }  # fmt: skip
    assert {name: roofline.peak(name).bfloat16 for name in bfloat16} == bfloat16
    assert roofline.peak("NVIDIA A100-SXM4-80GB").memory > roofline.peak("NVIDIA A100-SXM4-40GB").memory


def work(function, *shapes, **options):
    return roofline.work(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)), **options)


def test_the_work_of_a_program_is_that_of_its_products_loops_included():
    assert work(lambda x, y: jnp.sin(x) @ y, (5, 7), (7, 3)) == 2 * 5 * 7 * 3
    assert work(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (4, 5, 7), (4, 7, 3)) == 2 * 4 * 5 * 7 * 3

    def loop(x, y):
        return jax.lax.scan(lambda carry, _: (jax.checkpoint(lambda x: x @ y)(carry), None), x, length=6)[0]

    assert work(loop, (5, 7), (7, 7)) == 6 * 2 * 5 * 7 * 7 == 6 * work(loop, (5, 7), (7, 7), looped=False)

    def branch(x, y):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: x @ y @ y)

    assert work(branch, (5, 7), (7, 7)) == 2 * 2 * 5 * 7 * 7


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 4)])
def test_a_convolution_and_each_of_its_gradients_are_the_same_work(stride, groups):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    def gradient(x, kernel):
        return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel))), argnums=(0, 1))(x, kernel)

    shapes = (2, 8, 8, 12), (3, 3, 12 // groups, 16)
    forward = 2 * 2 * (8 // stride) ** 2 * 16 * 9 * 12 / groups
    assert work(conv, *shapes) == forward
    assert work(gradient, *shapes) == 3 * forward


COMPILED = """
%fused (p: f32[8,4]) -> f32[8,4] {
  ROOT %e = f32[8,4]{1,0} exponential(%p)
}
ENTRY %main {
  %copy.1 = bf16[3,8,8,64]{3,2,1,0} copy(%p.0)
  %wrapped-transpose.2 = bf16[64,3,3,64]{3,2,1,0} fusion(%p.1), kind=kLoop, calls=%fused
  %cudnn-conv.3 = (bf16[3,8,8,64]{3,2,1,0}, u8[4096]{0}) custom-call(%copy.1, %wrapped-transpose.2), window={size=3x3 pad=1_1x1_1}, custom_call_target="__cudnn$convForward", backend_config={"a":[%copy.1]}
  %g = bf16[3,8,8,64]{3,2,1,0} get-tuple-element(%cudnn-conv.3), index=0
  ROOT %gemm = (f32[5,7]{1,0}, s8[100]{0}) custom-call(%g, /*index=1*/%copy.1), custom_call_target="__cublas$lt$matmul"
  %other = f32[100]{0} custom-call(%g), custom_call_target="Sharding"
}
"""  # noqa: E501


def test_bytes_of_library_calls_are_those_of_their_arguments_and_results():
    activations, kernel = 3 * 8 * 8 * 64 * 2, 64 * 3 * 3 * 64 * 2
    assert roofline.called_bytes(COMPILED) == (2 * activations + kernel) + (2 * activations + 5 * 7 * 4)


def test_on_a_gpu_what_libraries_do_is_counted_too():
    """A stand-in for a program compiled for a GPU, whose cost analysis counts what XLA's own kernels do."""

    class Compiled:
        cost_analysis = staticmethod(lambda: {"flops": 3.0, "bytes accessed": 1000.0})
        memory_analysis = staticmethod(lambda: None)
        as_text = staticmethod(lambda: COMPILED)

    class Device:
        platform = "gpu"

    parallel = sharding.make_parallel()
    jaxpr = jax.make_jaxpr(lambda x: x @ x)(jnp.zeros((5, 5)))
    here = parallel.cost(Compiled, jaxpr)
    assert here["flops_per_step"] == 4 * 3 and here["bytes_per_step"] == 4 * 1000
    gpu = parallel._replace(mesh=type("Mesh", (), {"size": 4, "devices": np.array([Device()])}))
    there = gpu.cost(Compiled, jaxpr)
    assert there["flops_per_step"] == 250
    assert there["bytes_per_step"] == 4 * (1000 + roofline.called_bytes(COMPILED))
