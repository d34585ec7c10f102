"""How much work a step is, how fast a device could be, and which part of that is reached: MFU and the roofline."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax


class Peak(NamedTuple):
    """The most that one device of jax can do: FLOP/s of dense matmuls of each type, and bytes/s of its memory."""

    bfloat16: float
    float32: float  # as XLA computes it by default: with TF32 on Ampere and newer, in one bfloat16 pass on a TPU
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

    mfu: FLOP/s over the peak of all devices. roofline: over min(peak, FLOPs per byte * bytes/s) (Williams et al. 2009);
    both None where the device's limit is not known. What is recomputed counts as work.
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


def mean(costs: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    """The cost of a step, from costs of `Parallel.compile` and how many steps had each; memory is the largest."""
    total, found = sum(count for _, count in costs), {}
    for name in costs[0][0]:
        values = [(cost[name], count) for cost, count in costs]
        if any(value is None for value, _ in values):
            found[name] = None
        elif name == "memory_bytes":
            found[name] = max(value for value, _ in values)
        else:
            found[name] = sum(value * count for value, count in values) / total
    return found


def work(jaxpr: Any, looped: bool = True) -> float:
    """FLOPs of the matmuls, convolutions and cuDNN's attention in a program before it is compiled, loops included.

    looped=False counts the body of a loop once, as XLA's cost analysis does; so does a loop of unknown length. Of
    several branches the dearest counts.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        parameters, name = equation.params, equation.primitive.name
        inner = [leaf for leaf in jax.tree.leaves(list(parameters.values()), is_leaf=_is_program) if _is_program(leaf)]
        inner = [work(program, looped) for program in inner]
        times = parameters["length"] if name == "scan" and looped else 1
        total += times * (max(inner, default=0.0) if name == "cond" else sum(inner)) + _flops(equation, name)
    return total


def _is_program(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def _flops(equation: Any, name: str) -> float:
    """Those of an equation that multiplies by itself, 0 for any other."""
    parameters = equation.params
    if name == "dot_general":
        ((contracted, _), _), left = parameters["dimension_numbers"], equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        each = kernel.size / kernel.shape[parameters["dimension_numbers"].rhs_spec[0]]
        # The zeros that a dilation puts between the rows of the input are multiplied by nobody.
        return 2.0 * equation.outvars[0].aval.size * each / math.prod(parameters["lhs_dilation"])
    if name.startswith("dot_product_attention_"):  # [B, T, H, D] and [B, S, H, D]: two products forward, five backward
        q, k = (value.aval.shape for value in equation.invars[:2])
        return 2.0 * (2 if "_fwd" in name else 5) * math.prod(q) * k[1]
    return 0.0


def called_bytes(text: str) -> float:
    """What library calls read and write, without scratch memory, in the text of a program compiled for a GPU."""
    sizes = {name: _bytes(kind, shape) for name, kind, shape in _ARRAY.findall(text)}
    total = 0.0
    for line in text.splitlines():
        result, call, arguments = line.partition(" custom-call(")
        if call and '_target="__cu' in arguments:
            total += sum(_bytes(kind, shape) for kind, shape in _SHAPE.findall(result) if kind not in ("u8", "s8"))
            total += sum(sizes.get(name, 0) for name in _NAME.findall(arguments.partition("), ")[0]))
    return total


_SHAPE = re.compile(r"([a-z]+\d+)[a-z0-9]*\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(f"{_NAME.pattern} = {_SHAPE.pattern}")


def _bytes(kind: str, shape: str) -> float:
    """Of an array as XLA writes it, such as bf16[8,3]."""
    return int(re.sub(r"\D", "", kind)) / 8 * math.prod(int(size) for size in shape.split(",") if size)
