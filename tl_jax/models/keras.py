"""The networks of keras.applications in Keras' .h5 files: tables from our paths to its layers, and its preprocessing.

Layers are listed in the order of Keras' model, by which it reads weights: by their distance from the output, the
longest first, then by branch. Other spellings are those of the published files, of Keras 1 and 2.
"""

import collections
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.models.conversion import SAME, Layout, Rule, Transform

# Preprocessing. Caffe subtracts means from values of 0 to 255, in the order BGR: hence the swapped kernels below.
CAFFE = {"mean": (123.68 / 255, 116.779 / 255, 103.939 / 255), "std": (1 / 255,) * 3}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}

SWAPPED = Transform(lambda w: w[:, :, ::-1], lambda w: (w[:, :, ::-1],))  # RGB <-> BGR
DEPTHWISE = Transform(lambda w: w.transpose(0, 1, 3, 2), lambda w: (w.transpose(0, 1, 3, 2),))  # [h, w, C, 1] there
POINTWISE = Transform(lambda w: w[0, 0], lambda w: (w[None, None],))  # [1, 1, in, out] <-> [in, out]
# A convolution before a norm has a bias, which does the same as a running mean that is lower by it.
UNBIASED = Transform(lambda mean, bias: mean - bias, lambda mean: (mean, np.zeros_like(mean)))

_SPELLINGS = ((r"/depthwise_kernel$", "/kernel"), (r"^(?:fc1000|probs|Logits)/", "predictions/"))

_BY_CLASS = r"^(?:.+/)?layers/{}/vars/{}$"

Names = dict[str, str]  # {path of a module: its layer}


def make_layout(
    names: Names,
    head: str = "predictions",
    *,
    depthwise: str = r"(?!)",
    pointwise: str = r"(?!)",
    bgr: bool = False,
    biased: bool = False,
    scales: bool = True,
    spellings: Sequence[tuple[str, str]] = _SPELLINGS,
) -> Layout:
    """The table of the layers `names`, in Keras' order, and the classifier, the layer `head`.

    depthwise, pointwise: regex of the paths of depthwise convolutions, and of our dense layers that are convolutions
    there. bgr: the network reads BGR. biased: convolutions before a norm have a bias, see UNBIASED. scales: norms have
    scales.
    """
    names = {**names, "head": head}

    def key(name: str, of: Callable[[str], str] = lambda path: path) -> Callable[[re.Match], str]:
        return lambda match: f"{names[of(match[1])]}/{name}"

    kernels = {".*/stem/conv" if bgr else r"(?!)": SWAPPED, depthwise: DEPTHWISE, pointwise: POINTWISE, ".+": SAME}
    rules = [Rule(f"params/({path})/kernel", (key("kernel"),), transform) for path, transform in kernels.items()]
    for leaf, name in (("scale", "gamma"), ("bias", "beta")):
        rules.append(Rule(rf"params/(.+/norm\d*)/{leaf}", (key(name),), SAME))
    rules.append(Rule("params/(.+)/bias", (key("bias"),), SAME))
    mean = (key("moving_mean"), *([key("bias", lambda path: _swap_last(path, "norm", "conv"))] if biased else []))
    rules.append(Rule("batch_stats/(.+)/mean", mean, UNBIASED if biased else SAME))
    rules.append(Rule("batch_stats/(.+)/var", (key("moving_variance"),), SAME))
    modules = tuple(layer for path, layer in names.items() if path != "head")
    kinds = {r".+/norm\d*": "batch_normalization", depthwise: "depthwise_conv2d"}
    kinds |= {rf"{pointwise}|.+/conv\d*": "conv2d", ".+": "dense"}
    classes = [next(kind for regex, kind in kinds.items() if re.fullmatch(regex, path)) for path in names]
    aliases = (*spellings, _by_class(zip(classes, names.values(), strict=True), scales))
    return Layout(tuple(rules), f"{head}/.+", aliases=aliases, modules=modules)


def _by_class(layers: Iterable[tuple[str, str]], scales: bool) -> tuple[str, Callable[[re.Match], str]]:
    """The alias of paths in .weights.h5 of Keras 3, which numbers the layers of a class and the arrays of a layer.

    layers: class and name of each, in order.
    """
    numbered, counts = {}, collections.Counter()
    for kind, layer in layers:
        numbered[kind, counts[kind]] = layer
        counts[kind] += 1
    norm = ("gamma", "beta", "moving_mean", "moving_variance")[0 if scales else 1 :]

    def name(match: re.Match) -> str:
        kind, layer, i = match[1], numbered.get((match[1], int(match[2] or 0))), int(match[3])
        arrays = norm if kind == "batch_normalization" else ("kernel", "bias")
        return f"{layer}/{arrays[i]}" if layer and i < len(arrays) else match[0]

    return _BY_CLASS.format(r"([a-z0-9_]+?)(?:_(\d{1,6}))?", r"(\d)"), name


def _swap_last(text: str, old: str, new: str) -> str:
    before, _, after = text.rpartition(old)
    return before + new + after


def both(path: str, conv: str, norm: str) -> Names:
    """The layers of a convolution and its norm; path: where they lie, with {} for "conv" and "norm"."""
    return {path.format("conv"): conv, path.format("norm"): norm}


def vgg(convs: Sequence[tuple[str, int, int]], dense: bool) -> Layout:
    """convs: path, block and number of every convolution; dense: the file has the dense layers behind them."""
    names = {f"backbone/{path}/conv": f"block{i}_conv{j}" for path, i, j in convs}
    names |= {f"backbone/final/{name}": name for name in ("fc1", "fc2")} if dense else {}
    first = ((r"^([^/]+)/\1_W(_1)?$", r"\1/kernel"), (r"^([^/]+)/\1_b(_1)?$", r"\1/bias"))  # of Keras 1
    return make_layout(names, bgr=True, spellings=first)


def resnet(depths: Sequence[int]) -> Layout:
    """Bottlenecks whose convolutions have biases; the first block of every stage has a shortcut."""
    order = [(1, "conv"), (1, "bn"), (2, "conv"), (2, "bn"), (0, "conv"), (3, "conv"), (0, "bn"), (3, "bn")]
    names = both("backbone/stem/{}", "conv1_conv", "conv1_bn")
    for i, depth in enumerate(depths, 1):
        for j in range(depth):
            path, layer = f"backbone/stage{i}/block{j}", f"conv{i + 1}_block{j + 1}"
            for k, kind in order:
                ours = kind.replace("bn", "norm")
                if k or j == 0:
                    names[f"{path}/{ours}{k}" if k else f"{path}/shortcut/{ours}"] = f"{layer}_{k}_{kind}"
    return make_layout(names, bgr=True, biased=True)


def densenet(depths: Sequence[int]) -> Layout:
    names = both("backbone/stem/{}", "conv1_conv", "conv1_bn")
    for i, depth in enumerate(depths, 1):
        first = f"backbone/stage{i}/block0/transition"
        names |= {f"{first}/norm": f"pool{i}_bn", f"{first}/conv": f"pool{i}_conv"} if i > 1 else {}
        for j in range(depth):
            path, layer = f"backbone/stage{i}/block{j}", f"conv{i + 1}_block{j + 1}"
            names |= {f"{path}/norm1": f"{layer}_0_bn", f"{path}/conv1": f"{layer}_1_conv"}
            names |= {f"{path}/norm2": f"{layer}_1_bn", f"{path}/conv2": f"{layer}_2_conv"}
    old = (r"^conv1/(?=\w+/)", "conv1_")
    return make_layout({**names, "backbone/norm": "bn"}, spellings=(*_SPELLINGS, old))


def inception(blocks: Sequence[Sequence[tuple[str, int]]]) -> Layout:
    """blocks: of each, the paths of its ConvNorms as Keras makes and numbers them, and how many layers of Keras lie
    between each and the end of the block: a ConvNorm is three, the activation too."""
    places, made = [], 0
    for b, block in enumerate(blocks):
        for path, behind in block:
            made += 1
            places += [(b, -behind - 3, made, f"{path}/conv", f"conv2d_{made}")]
            places += [(b, -behind - 2, made, f"{path}/norm", f"batch_normalization_{made}")]
    return make_layout({path: layer for *_, path, layer in sorted(places)}, scales=False)


def mobilenet_v1(blocks: Sequence[str]) -> Layout:
    """blocks: the paths of all."""
    names = both("backbone/stem/{}", "conv1", "conv1_bn")
    for n, path in enumerate(blocks, 1):
        for k, kind in ((2, "dw"), (3, "pw")):
            names |= both(f"{path}/{{}}{k}", f"conv_{kind}_{n}", f"conv_{kind}_{n}_bn")
    return make_layout(names, "conv_preds", depthwise=".+/conv2", pointwise="head")


def mobilenet_v2(blocks: Mapping[str, Any]) -> Layout:
    """blocks: {path: row} of all, see mobile.Row. Published files have mobl1_conv_1_expand and bn1_conv_1_bn_expand."""
    names = both("backbone/stem/{}", "Conv1", "bn_Conv1")
    for n, (path, row) in enumerate(blocks.items()):
        for k in row.convs:
            layer = (f"block_{n}_" if n else "expanded_conv_") + _KINDS[k]
            names |= both(f"{path}/{{}}{k}", layer, f"{layer}_BN")
    names |= both("backbone/final/{}", "Conv_1", "Conv_1_bn")
    old = ((r"^mobl(\d+)_conv_\1_", r"block_\1_"), (r"^bn(\d+)_conv_\1_bn_(\w+)", r"block_\1_\2_BN"))
    old = (*_SPELLINGS, *old, (r"^block_0_", "expanded_conv_"))
    return make_layout(names, depthwise=".+/conv2", spellings=old)


def mobilenet_v3(blocks: Mapping[str, Any]) -> Layout:
    """The published files have the names of Keras 2: Conv/BatchNorm, expanded_conv_1/squeeze_excite/Conv."""
    names = both("backbone/stem/{}", "conv", "conv_bn")
    for n, (path, row) in enumerate(blocks.items()):
        prefix = f"expanded_conv_{n}_" if n else "expanded_conv_"
        for k in row.convs:
            if k == 3 and row.squeeze:
                gates = ("squeeze_excite_conv", "squeeze_excite_conv_1")
                names |= {f"{path}/se/{ours}": prefix + g for ours, g in zip(("reduce", "expand"), gates, strict=True)}
            names |= both(f"{path}/{{}}{k}", prefix + _KINDS[k], f"{prefix}{_KINDS[k]}_bn")
    names |= both("backbone/final/{}", "conv_1", "conv_1_bn") | {"backbone/final/dense": "conv_2"}
    old = (
        _SPELLINGS[0],
        (r"^(expanded_conv(?:_\d+)?)/(?=\w+/)", r"\1_"),
        (r"/BatchNorm/", "_bn/"),
        (r"excite/C(?=onv)", "excite_c"),
        (r"^C(?=onv)", "c"),
        (r"^Logits/", "logits/"),
    )
    return make_layout(names, "logits", depthwise=".+/conv2", pointwise=r".+/se/\w+|.+/final/dense|head", spellings=old)


_KINDS = {1: "expand", 2: "depthwise", 3: "project"}


def efficientnet(blocks: Mapping[str, tuple[int, int, Any]]) -> Layout:
    """blocks: {path: (stage from 1, block from 0, row)} of all. The first layer of the file normalises the pixels."""
    names = both("backbone/stem/{}", "stem_conv", "stem_bn")
    for path, (i, j, row) in blocks.items():
        prefix = f"block{i}{chr(ord('a') + j)}_"
        kinds = {1: ("expand_conv", "expand_bn"), 2: ("dwconv", "bn"), 3: ("project_conv", "project_bn")}
        for k in row.convs:
            if k == 3 and row.squeeze:
                names |= {f"{path}/se/{kind}": f"{prefix}se_{kind}" for kind in ("reduce", "expand")}
            names |= both(f"{path}/{{}}{k}", *(prefix + kind for kind in kinds[k]))
    names |= both("backbone/final/{}", "top_conv", "top_bn")
    layout = make_layout(names, depthwise=".+/conv2", pointwise=r".+/se/\w+")
    first, arrays = "normalization_1", ("mean", "variance", "count")
    own = tuple((_BY_CLASS.format("normalization", i), f"{first}/{name}") for i, name in enumerate(arrays))
    layout = layout._replace(aliases=(*own, *layout.aliases), modules=(first, *layout.modules))
    return layout._replace(ignore=f"{first}/.+", pixels=_normalization(first))


def _normalization(layer: str) -> Transform:
    """Means and deviations of a card from a Normalization layer behind a division by 255, and back.

    The published files have the deviations in place of the variances, for which a later layer of that network makes up
    that has no weights: they are known by their numbers.
    """

    def load(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[float, ...]]:
        mean, var = (np.ravel(tensors.get(f"{layer}/{name}", ())) for name in ("mean", "variance"))
        if mean.shape != (3,) or var.shape != (3,):
            return {}
        published = np.allclose(mean, (0.485, 0.456, 0.406)) and np.allclose(var, (0.229, 0.224, 0.225))
        std = var if published else np.sqrt(np.maximum(var, 1e-14))  # as Keras bounds deviations below
        return {"mean": tuple(round(float(x), 7) for x in mean), "std": tuple(round(float(x), 7) for x in std)}

    def export(mean: Sequence[float], std: Sequence[float]) -> dict[str, np.ndarray]:
        found = {"mean": np.float32(mean), "variance": np.square(np.float32(std)), "count": np.int32(0)}
        return {f"{layer}/{name}": array for name, array in found.items()}

    return Transform(load, export)
