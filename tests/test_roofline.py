"""MFU and the roofline, by hand."""

import jax
import pytest

from tl_jax import roofline
from tl_jax.roofline import Peak


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


def test_a_machine_measures_its_own_peak():
    found = roofline.measure(size=64, megabytes=1, rounds=1)
    assert found.float32 == found.bfloat16 > 0 and found.memory > 0
