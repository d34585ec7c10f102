"""What the values of a weight file say about themselves: range, zeros, norms, and tensors that look wrong. Numpy only.

Nothing is compared with numbers of a known network: a tensor is measured against the others of its file, and against
what an initialisation has. What no sound file has, such as negative variances, `load` refuses before.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.models import conversion as tables

FACTOR = 10.0  # between the RMS of a kernel and the median of those of its shape
# Log of the likelihood ratio that names a kernel; random numbers reach it less than once in 5,000 kernels.
DECISIVE = {"normed": 10.0, "attention": 20.0}
CONSTANTS = {"bias": (0,), "scale": (0, 1), "mean": (0,), "var": (1,)}  # initial values, and of a folded norm; 0: heads
ATTENTION = ("norm1/scale", "norm2/scale", "mlp/fc1/kernel", "mlp/fc2/kernel", "attn/qkv/kernel", "attn/proj/kernel")
Tensors = Mapping[str, np.ndarray]  # by our paths, {"params/backbone/...": float32}


def examine(flat: Tensors) -> dict[str, Any]:
    """The facts of `line` as plain JSON data, "suspicious": {kind: paths}; costs about four passes over the values."""
    found, norms = defaultdict(list), defaultdict(dict)
    ranges = {path: (float(np.min(x)), float(np.max(x))) for path, x in flat.items()}
    for path, x in flat.items():
        if kind := _defect(path, x, *ranges[path]):
            found[kind].append(path)
        elif path.endswith("/kernel") and any(ranges[path]):  # a head may be all zero
            norms[x.shape][path] = float(np.linalg.norm(x)) / math.sqrt(x.size)
    for same in norms.values():
        usual = float(np.median(list(same.values())))
        far = [path for path, norm in same.items() if not usual / FACTOR <= norm <= usual * FACTOR]
        found[f"norms over {FACTOR:g} times from those of equal shape"] += far if len(same) > 2 else []
    found["transposed square kernels"] += transposed(flat)
    (lows, highs), size = zip(*ranges.values(), strict=True), sum(x.size for x in flat.values())
    every = [norm for same in norms.values() for norm in same.values()]
    return {
        "values": size,
        "range": [min(lows), max(highs)],
        "zeros": 1 - sum(int(np.count_nonzero(x)) for x in flat.values()) / size,
        "kernel_rms": [min(every), max(every)] if every else [],
        "suspicious": {kind: sorted(paths) for kind, paths in found.items() if paths},
    }


def line(found: Mapping[str, Any]) -> str:
    """One line for people of what `examine` found."""
    (low, high), rms = found["range"], found["kernel_rms"]
    text = f"{found['values']:,} values from {low:.3g} to {high:.3g}, {100 * found['zeros']:.2g} % zeros"
    text += f", RMS of kernels {rms[0]:.2g} to {rms[1]:.2g}" if rms else ""
    wrong = tables.listing(found["suspicious"])
    return f"{text}; SUSPICIOUS: {wrong}" if wrong else f"{text}; nothing suspicious"


def _defect(path: str, x: np.ndarray, low: float, high: float) -> str:
    """What is wrong with one tensor by itself, x of any shape with values from low to high; "": nothing."""
    if low == high:
        known = (0,) if path.startswith("params/head/") else CONSTANTS.get(path.rpartition("/")[2], ())
        usual = x.size == 1 or any(abs(low - value) < 1e-3 for value in known)
        return "" if usual else "all zero" if low == 0 else "constant"
    if len(np.unique(x.ravel()[:100])) > 10:
        bits = np.ascontiguousarray(x).view(np.uint32).ravel()
        for name, unused in (("bfloat16", 0xFFFF), ("float16", 0x1FFF)):  # of the bits of a float32
            if not (bits[:100] & unused).any() and not (bits & unused).any():
                return f"of {name}'s precision"
    return ""


def transposed(flat: Tensors) -> list[str]:
    """The square kernels whose two channel axes are more likely the other way round.

    A convolution before BatchNorm: the mean of an output grows with the sum of its weights, as inputs behind ReLU are
    positive, and its variance with their norm. Attention: the channels of the residual stream have norms in common
    with fc1, fc2 and the scales, which cannot be transposed; and q agrees with k, as v with proj, on both axes.
    """
    found = []
    for path, kernel in flat.items():
        if match := re.fullmatch(r"params/(.*/)(conv|dense)(\d*)/kernel", path):
            if kernel.ndim in (2, 4) and kernel.shape[-1] == kernel.shape[-2]:
                into, out = (_normed_evidence(flat, "{}norm{}".format(*match.group(1, 3)), kernel, a) for a in (-2, -1))
                found += [path] if into - out > DECISIVE["normed"] else []
        elif path.endswith("/attn/qkv/kernel"):
            found += _transposed_in_attention(flat, path.removesuffix("attn/qkv/kernel"))
    return found


def _normed_evidence(flat: Tensors, norm: str, kernel: np.ndarray, axis: int) -> float:
    """How much an axis of a kernel has in common with the norm behind it; 0 where there is none."""
    leaves = ("batch_stats/{}/mean", "batch_stats/{}/var", "params/{}/bias")
    mean, var, bias = (flat.get(leaf.format(norm)) for leaf in leaves)
    if mean is None or bias is None:
        return 0.0
    if np.ptp(mean) == 0:  # folded into the kernel: the bias holds what was subtracted
        mean = -bias
    others = tuple(i for i in range(kernel.ndim) if i != kernel.ndim + axis)
    return _evidence(kernel.sum(others), [mean]) + _evidence(_norms(kernel, axis), [var])


def _transposed_in_attention(flat: Tensors, block: str) -> list[str]:
    """Of q, k, v and proj of a block, all with kernels [D, D]; each pair is judged together."""
    if any(f"{block}{name}" not in flat for name in ATTENTION):  # a part of the block was made new
        return []
    norm1, norm2, fc1, fc2, qkv, proj = (flat[f"{block}{name}"] for name in ATTENTION)
    stream = [np.abs(norm1), np.abs(norm2), _norms(fc1, 0), _norms(fc2, 1)]
    q, k, v = np.split(qkv, 3, axis=1)
    proj = proj.T  # as the others, the axis of the residual stream first
    kernels = {name: (_norms(x, 0), _norms(x, 1)) for name, x in (("q", q), ("k", k), ("v", v), ("proj", proj))}
    found = []
    for pair in (("q", "k"), ("v", "proj")):
        score = {}
        for turned in itertools.product((0, 1), repeat=2):
            ends = [kernels[name][:: -1 if turn else 1] for name, turn in zip(pair, turned, strict=True)]
            score[turned] = sum(_evidence(end[0], stream) for end in ends)
            score[turned] += sum(_evidence(a, [b]) for a, b in zip(*ends, strict=True))
        best = max(score, key=score.get)
        for i, name in enumerate(pair):
            if best[i] and score[best] - max(x for turned, x in score.items() if not turned[i]) > DECISIVE["attention"]:
                found.append(f"{block}attn/proj/kernel" if name == "proj" else f"{block}attn/qkv/kernel: {name}")
    return found


def _norms(kernel: np.ndarray, axis: int) -> np.ndarray:
    """The norm of each slice along an axis."""
    return np.sqrt(np.square(kernel).sum(tuple(i for i in range(kernel.ndim) if i != axis % kernel.ndim)))


def _evidence(y: np.ndarray, by: Sequence[np.ndarray]) -> float:
    """-n/2 log(1 - R^2) of the ranks of y [n], explained by those of `by`: the gain in log likelihood."""
    y, by = _ranks(y), np.stack([_ranks(x) for x in by], axis=1)
    if not (total := y @ y):
        return 0.0
    rest = y - by @ np.linalg.lstsq(by, y, rcond=None)[0]
    return -len(y) / 2 * math.log(max(rest @ rest / total, 1e-6))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Centred ranks, equal values sharing theirs: no outlier outweighs the rest."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - counts / 2)[inverse] - len(x) / 2
