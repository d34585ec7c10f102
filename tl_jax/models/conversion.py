"""Conversion tables from our paths to the keys of a foreign file, for loading and exporting. Numpy only."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tl_jax.core.messages import shorten

SHOWN = 5  # offenders that a message names per kind
KINDS = ("unused keys", "unfilled leaves", "wrong shapes", "no floats", "non-finite values", "negative variances")
LEAVES = ("cls_token", "dist_token", "pos_embed", "mask_token", "register_tokens", "latent", "gamma", "bias_table")
Shapes = Mapping[str, tuple[int, ...]]  # per target path


class Transform(NamedTuple):
    """A pair of inverse functions: `load(*source arrays) -> target` and `export(target) -> tuple of source arrays`."""

    load: Callable[..., np.ndarray]
    export: Callable[[np.ndarray], tuple[np.ndarray, ...]]


class Rule(NamedTuple):
    """One row: the regex of a whole target path, the source keys, and the transform.

    sources: templates with the groups of the regex, or functions of its match that raise KeyError for what they lack.
    """

    target: str
    sources: tuple[str | Callable[[re.Match], str], ...]
    transform: Transform


class Layout(NamedTuple):
    """The table of one (family, file format) pair.

    rules: the first whose regex matches a whole path applies. head: regex of source keys of the classifier. ignore:
    regex of source keys that are no weights, which are not read, though a rule may write them behind the weight.
    aliases: arguments of re.sub from other spellings to the table's.
    modules: source keys without their last part, of all but the head, in the file's order, where the table lists them.
    pixels: for files that hold means and deviations of pixels, or a vocabulary: {field of a card: value} from the
    tensors by the table's keys ({} where there are none), and such tensors from a mean and a deviation. layers: names,
    of the publisher's head before its last dense layer, see models/head.py.
    """

    rules: tuple[Rule, ...]
    head: str
    ignore: str = r"(?!)"
    aliases: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = ()
    modules: tuple[str, ...] = ()
    pixels: Transform = Transform(lambda tensors: {}, lambda mean, std: {})
    layers: tuple[str, ...] = ()


SAME = Transform(lambda x: x, lambda x: (x,))
CONV = Transform(lambda w: w.transpose(2, 3, 1, 0), lambda w: (w.transpose(3, 2, 0, 1),))  # OIHW <-> HWIO
DENSE = Transform(lambda w: w.T, lambda w: (w.T,))  # [out, in] <-> [in, out]; a bias [out] stays as it is
POINTWISE = Transform(lambda w: w[:, :, 0, 0].T, lambda w: (w.T[:, :, None, None],))  # [O, I, 1, 1] <-> [in, out]
QKV = Transform(lambda *w: np.concatenate(w).T, lambda w: tuple(np.split(w.T, 3)))  # three of DENSE <-> one


def _refuse_values(w: np.ndarray) -> tuple[np.ndarray, ...]:
    if w.any():
        raise ValueError(
            "a leaf that must be zero in this layout is not, such as the bias of a projection: use another"
        )
    return ()


# Leaves without a key of their own: zeros when loaded. What is not zero any more cannot be exported, or is left out.
ABSENT, LEFT_OUT = Transform(lambda: np.zeros(0), _refuse_values), Transform(lambda: np.zeros(0), lambda w: ())


def conv(target: str, source: str) -> list[Rule]:
    """The rows of a torch convolution; that of the bias serves those that have one."""
    return affine(target, source, CONV)


def affine(target: str, source: str, transform: Transform, keys: Sequence[str] = (".weight", ".bias")) -> list[Rule]:
    """The rows of a kernel and its bias; keys: what follows the name of the layer in a file."""
    rows = zip(("kernel", "bias"), keys, (transform, SAME), strict=True)
    return [Rule(f"params/{target}/{leaf}", (f"{source}{key}",), way) for leaf, key, way in rows]


def dense(target: str, source: str) -> list[Rule]:
    """The rows of a torch linear layer."""
    return affine(target, source, DENSE)


def norm(target: str, source: str) -> list[Rule]:
    """The rows of a torch normalisation layer; the statistics' rows serve only BatchNorm."""
    params, stats = {"scale": "weight", "bias": "bias"}, {"mean": "running_mean", "var": "running_var"}
    rows = [Rule(f"params/{target}/{leaf}", (f"{source}.{key}",), SAME) for leaf, key in params.items()]
    return rows + [Rule(f"batch_stats/{target}/{leaf}", (f"{source}.{key}",), SAME) for leaf, key in stats.items()]


def rules_of(names: Mapping[str, str | tuple[tuple[str, ...], Transform]]) -> list[Rule]:
    """The rows of {regex of the path of our module: template of its name in a torch file}.

    The last part of a path says what the module is: conv* or patch_embed a convolution, norm* a normalisation, one of
    LEAVES a parameter by itself, any other a dense layer. What is stored otherwise has a path that ends in its leaf,
    and (keys, transform) in place of a name.
    """
    rules = []
    for path, name in names.items():
        last = path.rpartition("/")[2]
        if not isinstance(name, str):
            rules.append(Rule(f"params/{path}", *name))
        elif last in LEAVES:
            rules.append(Rule(f"params/{path}", (name,), SAME))
        elif last.startswith("norm"):
            rules += norm(path, name)
        else:
            rules += (conv if last.startswith(("conv", "patch_embed")) else dense)(path, name)
    return rules


def by_names(names: Mapping[str, str], head: str, ignore: str, pointwise: str = r"(?!)") -> Layout:
    """The table of torch modules from {our path: their name}, for names which no template gives.

    pointwise: regex of our dense layers that are convolutions there; every other layer conv* is one, the rest are
    dense or norms.
    """

    def key(leaf: str) -> Callable[[re.Match], str]:
        return lambda match: f"{names[match[1]]}.{leaf}"

    kernels = {r".+/conv\d*": CONV, pointwise: POINTWISE, r".+": DENSE}
    rules = [Rule(f"params/({path})/kernel", (key("weight"),), transform) for path, transform in kernels.items()]
    rules += [Rule(f"params/(.+)/{leaf}", (key(name),), SAME) for leaf, name in (("scale", "weight"), ("bias", "bias"))]
    rules += [Rule(f"batch_stats/(.+)/{leaf}", (key(f"running_{leaf}"),), SAME) for leaf in ("mean", "var")]
    modules = tuple(name for path, name in names.items() if not path.startswith("head"))
    return Layout(tuple(rules), head, ignore, modules=modules)


NATIVE_HEAD = r"(?:params|batch_stats)/head/.+"
NATIVE = Layout((Rule(r"((?:params|batch_stats)/.+)", (r"\1",), SAME),), head=NATIVE_HEAD)  # our own paths as keys


def with_native_head(layout: Layout) -> Layout:
    """The layout for a network whose head is not the publisher's: it is stored under our own paths.

    The head of masked tokens (text.TokenHead) is the publisher's in every network that has one.
    """
    own = Rule(rf"((?!params/head/(?:transform/|norm/|token_bias)){NATIVE_HEAD})", (r"\1",), SAME)
    return layout._replace(rules=(own, *layout.rules), head=f"{layout.head}|{NATIVE_HEAD}")


def for_head(layout: Layout, layers: Sequence, keys: Iterable[str] = ()) -> Layout:
    """The layout for a network whose head has these layers; keys: of its file, which may have our own paths."""
    own = tuple((name, {}) for name in layout.layers)
    native = any(re.fullmatch(NATIVE_HEAD, key) for key in keys)
    return layout if tuple(layers) == own and not native else with_native_head(layout)


def lacks_bias(layout: Layout, flat: Mapping[str, np.ndarray]) -> bool:
    """Whether files of the layout have no bias of the head, and these leaves have one that is not zero."""
    bias = flat.get("params/head/bias")
    return bias is not None and bias.any() and sources_of(layout, "params/head/bias")[1] is ABSENT


def sources_of(layout: Layout, path: str) -> tuple[tuple[str, ...], Transform]:
    """The source keys of a target path and their transform; KeyError where the table has no row for it."""
    for rule in layout.rules:
        if match := re.fullmatch(rule.target, path):
            keys = (source(match) if callable(source) else match.expand(source) for source in rule.sources)
            return tuple(keys), rule.transform
    raise KeyError(path)


def canonical(layout: Layout, key: str) -> str:
    """The table's spelling of a file's key."""
    return functools.reduce(lambda name, alias: re.sub(*alias, name), layout.aliases, key)


def vocabulary(key: str) -> Transform:
    """For Layout.pixels: the field `vocab` of a card, from the rows of the embedding of the tokens."""
    return Transform(lambda x: {"vocab": x[key].shape[0]} if key in x else {}, lambda mean, std: {})


def pixels_of(layout: Layout, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[float, ...]]:
    """The fields of a card that a file holds itself: {"mean": ..., "std": ...}, {"vocab": ...} or {}."""
    return layout.pixels.load({canonical(layout, key): value for key, value in tensors.items()})


def source_shapes(transform: Transform, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that a file must have for a target of `shape`; allocates nothing."""
    return [array.shape for array in transform.export(np.broadcast_to(np.float32(0), shape))]


def is_head(layout: Layout, key: str) -> bool:
    return re.fullmatch(layout.head, canonical(layout, key)) is not None


def may_know(layout: Layout, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a file has any key of the form of the table's; needs no network, unlike `coverage`."""
    own = [rule.target for rule in layout.rules if rule.sources == (r"\1",)]
    templates = (x for rule in layout.rules for x in rule.sources if isinstance(x, str) and x != r"\1")
    own += {".+".join(map(re.escape, re.split(r"\\\d", template))) for template in templates}
    own += [re.escape(module) + r"[./]\w+" for module in layout.modules]
    pattern = re.compile("|".join(f"(?:{regex})" for regex in own))
    return any(pattern.fullmatch(canonical(layout, key)) for key in tensors)


def module_of(key: str) -> str:
    return re.sub(r"[./]\w+$", "", key)


def coverage(layout: Layout, leaves: Iterable[str], tensors: Mapping[str, np.ndarray]) -> int:
    """Counts the keys of a file which a model with these leaves would read through the layout."""
    wanted = {key for leaf in leaves for key in sources_of(layout, leaf)[0]}
    return sum(canonical(layout, key) in wanted for key in tensors)


def lacking(layout: Layout, leaves: Iterable[str], tensors: Mapping[str, np.ndarray]) -> set[str]:
    """The leaves of which a file has nothing; those that have no key in the layout are no such."""
    found = {canonical(layout, key) for key in tensors}
    return {leaf for leaf in leaves if (keys := sources_of(layout, leaf)[0]) and found.isdisjoint(keys)}


def fill(layout: Layout, shapes: Shapes, tensors: Mapping[str, np.ndarray]):
    """Fills every leaf from a file's tensors: (flat variables in float32, origin per leaf, offenders per kind)."""
    spelling = {canonical(layout, key): key for key in tensors}
    used, flat, origins = set(), {}, {}
    problems = {kind: [] for kind in KINDS}
    for leaf, shape in shapes.items():
        sources, transform = sources_of(layout, leaf)
        if not sources:
            flat[leaf], origins[leaf] = np.zeros(shape, np.float32), "zeros"
            continue
        sources = [source for source in sources if not re.fullmatch(layout.ignore, source)] or sources
        keys = [spelling[source] for source in sources if source in spelling]
        used.update(keys)
        if len(keys) < len(sources):
            problems["unfilled leaves"].append(f"{leaf} (no {', '.join(set(sources) - set(spelling))})")
            continue
        arrays = [tensors[key] for key in keys]
        expected = source_shapes(transform, shape)[: len(keys)]
        defects = [_defect(leaf, *each) for each in zip(keys, arrays, expected, strict=True)]
        for kind, text in filter(None, defects):
            problems[kind].append(text)
        if not any(defects):
            flat[leaf] = transform.load(*(array.astype(np.float32) for array in arrays))
            origins[leaf] = " + ".join(keys)
    unused = [key for key in tensors if key not in used]
    problems["unused keys"] = sorted(key for key in unused if not re.fullmatch(layout.ignore, canonical(layout, key)))
    return flat, origins, {kind: offenders for kind, offenders in problems.items() if offenders}


def _defect(leaf: str, key: str, array: np.ndarray, shape: tuple[int, ...]) -> tuple[str, str] | None:
    """What keeps an array of a file from filling its place in a leaf: (kind, description)."""
    if array.shape != shape:
        return "wrong shapes", f"{key} is {array.shape}, expected {shape}"
    if not np.issubdtype(array.dtype, np.floating):
        return "no floats", f"{key} is {array.dtype}"
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, which is what counts here
        bad = array.size - int(np.isfinite(array.astype(np.float32)).sum())
    if bad:
        return "non-finite values", f"{key} ({bad} of {array.size})"
    below = int((array < 0).sum()) if leaf.endswith("/var") else 0  # the mean of squares is never below zero
    return ("negative variances", f"{key} ({below} of {array.size})") if below else None


def listing(problems: Mapping[str, Sequence[str]]) -> str:
    """One line such as `2 unused keys [a, b]; 9 unfilled leaves [a, b, c, d, e, and 4 more]`."""
    found = {kind: texts for kind, texts in problems.items() if texts}
    return "; ".join(f"{len(texts)} {kind} [{', '.join(shorten(texts, SHOWN))}]" for kind, texts in found.items())
