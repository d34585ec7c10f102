"""How fast a device could be, and which part of that a step reaches: MFU and the fraction of the roofline."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Peak(NamedTuple):
    """The most that one device of jax can do: FLOP/s of dense matmuls of each type, and bytes/s of its memory.

    float32 is meant as XLA computes it by default: with TF32 on Ampere and newer, in one bfloat16 pass on a TPU.
    """

    bfloat16: float
    float32: float
    memory: float


# From the makers' data sheets, without sparsity. The first key that begins the device's name (NVIDIA aside) decides.
# A TPU of v2 and v3 shows each of its two cores as a device. A V100 has no bfloat16 and computes it as float32.
PEAKS = {
    "H100 PCIe": Peak(756e12, 378e12, 2.0e12),
    "H100": Peak(989e12, 495e12, 3.35e12),
    "H200": Peak(989e12, 495e12, 4.8e12),
    "A100-SXM4-80GB": Peak(312e12, 156e12, 2.04e12),
    "A100 80GB": Peak(312e12, 156e12, 1.94e12),
    "A100": Peak(312e12, 156e12, 1.555e12),
    "V100": Peak(15.7e12, 15.7e12, 0.9e12),
    "L40": Peak(181e12, 90.5e12, 0.864e12),
    "L4": Peak(121e12, 60e12, 0.3e12),
    "TPU v2": Peak(23e12, 23e12, 0.35e12),
    "TPU v3": Peak(61.5e12, 61.5e12, 0.45e12),
    "TPU v4 lite": Peak(138e12, 138e12, 0.614e12),
    "TPU v4": Peak(275e12, 275e12, 1.228e12),
    "TPU v5 lite": Peak(197e12, 197e12, 0.819e12),
    "TPU v5e": Peak(197e12, 197e12, 0.819e12),
    "TPU v5": Peak(459e12, 459e12, 2.765e12),
    "TPU v6": Peak(918e12, 918e12, 1.64e12),
}


def peak(device_kind: str) -> Peak | None:
    """The peak of a device by `jax.Device.device_kind`; None for one that is not in PEAKS, such as a CPU."""
    name = device_kind.removeprefix("NVIDIA ").removeprefix("Tesla ")
    return next((value for start, value in PEAKS.items() if name.startswith(start)), None)


def rates(
    steps_per_second: float, cost: Mapping[str, Any], limit: Peak | None, dtype: str = "float32", devices: int = 1
) -> dict[str, float | None]:
    """flops_per_second, mfu and roofline of a step with a cost from `Parallel.compile`; {} where that has no FLOPs.

    mfu: FLOP/s over the peak of all devices. roofline: over min(peak, FLOPs per byte * bytes/s), what a step that reads
    and writes so much could reach (Williams et al. 2009); both None where the device's limit is not known. The FLOPs
    are those of the step as compiled, so recomputation counts as work, and kernels that XLA cannot look into do not.
    """
    if not cost.get("flops_per_step"):
        return {}
    achieved, found = cost["flops_per_step"] * steps_per_second, {"mfu": None, "roofline": None}
    if limit is not None:
        most = devices * getattr(limit, dtype)
        found["mfu"] = achieved / most
        if cost["bytes_per_step"]:
            intensity = cost["flops_per_step"] / cost["bytes_per_step"]
            found["roofline"] = achieved / min(most, intensity * devices * limit.memory)
    return {"flops_per_second": achieved, **found}


def measure(dtype: str = "float32", size: int = 4096, megabytes: int = 256, rounds: int = 5) -> Peak:
    """The peak of the first device as a square matmul of `size` and a copy of `megabytes` reach it, medians of rounds.

    Both FLOP/s are those of `dtype`. bytes/s count what is read and what is written.
    """
    side = jnp.ones((size, size), jnp.dtype(dtype))
    long = jnp.ones((megabytes * 2**20 // 4,), jnp.float32)
    flops = 2 * size**3 / _seconds(jax.jit(jnp.dot), (side, side), rounds)
    return Peak(flops, flops, 2 * long.nbytes / _seconds(jax.jit(lambda x: x + 1), (long,), rounds))


def _seconds(function: Callable, arguments: tuple, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
