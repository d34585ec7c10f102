"""What is added to a network whose files know nothing of it: LoRA, adapters, prompts, SSF; stochastic normalisation.

`init` makes the parameters, `Adapted` computes with them in place of the model, `merge` folds what can be folded. An
interceptor around the calls of flax modules finds what is added to a module by its path, such as
`lora/backbone/block0/attn/qkv/a`. Initially all but prompts leave the network's function unchanged. MixStyle has no
parameters, and acts in training alone.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tl_jax.core import checks, messages, trees
from tl_jax.core.card import sides
from tl_jax.models import layers, mixstyle, text, transformer, vit
from tl_jax.models.variant import Model

Additions = Sequence[tuple[str, Mapping[str, Any]]]
REFUSED = "the added parameters cannot be made"
MODEL = ("backbone", "head")  # the keys of the model; further networks have their own (teacher, ...)
BRANCHES = {"both": ("attn", "mlp"), "mlp": ("mlp",)}
ATTENTION = r"backbone/.*/attn/(qkv|proj)/kernel"
Count = Annotated[int, checks.integer(1, 2**14)]
Regex = Annotated[str, checks.REGEX]
Positive = Annotated[float, checks.number(0, above=True)]


def check(additions: Additions) -> dict[str, dict[str, Any]]:
    """`{name: {parameter: value}}` with the defaults filled in; raises one ValueError for all that is invalid."""
    checks.refuse(REFUSED, checks.pairs_problems("addition", additions, MAKERS))
    signatures = {name: inspect.signature(MAKERS[name]).parameters for name, _ in additions}
    return {
        name: {key: given.get(key, signatures[name][key].default) for key in checks.parameters(MAKERS[name])}
        for name, given in additions
    }


def init(model: nn.Module, variables: Mapping[str, Any], additions: Additions, key: jax.Array) -> dict[str, Any]:
    """The initial added parameters, nested float32 {addition: ...}; raises one ValueError for all that does not fit."""
    params = trees.flatten(_network(variables)["params"])
    added, problems = {}, []
    for name, args in check(additions).items():
        leaves, wrong = MAKERS[name](model, params, **args)
        problems += wrong
        for path, (shape, initializer) in leaves.items():
            path = f"{name}/{path}"
            added[path] = initializer(jax.random.fold_in(key, zlib.crc32(path.encode())), shape, jnp.float32)
    checks.refuse(REFUSED, problems)
    return trees.unflatten(added)


def _uniform(bound: float) -> Callable:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _lora(model, params, rank: Count = 8, alpha: Positive = 16.0, targets: Regex = ""):
    """LoRA, y = W x + (alpha / rank) B A x (Hu et al. 2022, arXiv:2106.09685, equation 3).

    A is the layer itself (size, stride, groups) with `rank` outputs, B a matrix [rank, outputs], a pair for each group
    of a convolution. A starts uniform within 1 / sqrt(fan in), as in the authors' code, B at zero. targets: a regex of
    kernel paths; by default the attention kernels (qkv is one kernel), without any all 3x3 convolutions, or the
    1x1 ones of a network with depthwise convolutions, which have no rank to speak of, without any all dense layers
    of the backbone, as ConvNeXt's.
    """
    kernels = {path: leaf.shape for path, leaf in params.items() if path.endswith("/kernel")}
    chosen = [path for path in kernels if re.fullmatch(targets or ATTENTION, path)]
    groups = _groups(model) if any(len(shape) == 4 for shape in kernels.values()) else {}
    depthwise = any(kernels[f"{owner}/kernel"][-2] == 1 for owner, count in groups.items() if count > 1)
    for size in () if targets else ((1, 1) if depthwise else (3, 3), ()):
        chosen = chosen or [x for x, shape in kernels.items() if shape[:-2] == size and x.startswith("backbone/")]
    leaves, problems = {}, [] if chosen else [_no_match("lora", targets, kernels)]
    for path in chosen:
        owner, shape = path.removesuffix("/kernel"), kernels[path]
        count = groups.get(owner, 1)
        fan_in, fan_out = math.prod(shape[:-1]), shape[-1] // count
        if rank > min(fan_in, fan_out):
            per_group = " per group" if count > 1 else ""
            problems.append(f"lora rank = {rank}, but {path} has {fan_in} inputs and {fan_out} outputs{per_group}")
        leaves[f"{owner}/a"] = (*shape[:-1], count * rank), _uniform(fan_in**-0.5)
        leaves[f"{owner}/b"] = (rank, shape[-1]), nn.initializers.zeros
    return leaves, problems


def _adapter(model, params, bottleneck: Count = 16, where: Annotated[str, checks.one_of(*BRANCHES)] = "both"):
    """Adapters, y + up(gelu(down(y))) on a branch before its residual sum (Houlsby et al. 2019, section 2.1).

    arXiv:1902.00751. where: after attention and MLP of every block (both), or after the MLP alone (mlp).
    """
    if problems := _needs("adapter", "a transformer", (vit.ViT, text.Transformer), model):
        return {}, problems
    zeros, normal, width = nn.initializers.zeros, nn.initializers.truncated_normal(0.01), model.width
    own = {"down/kernel": ((width, bottleneck), normal), "down/bias": ((bottleneck,), zeros)}
    own |= {"up/kernel": ((bottleneck, width), zeros), "up/bias": ((width,), zeros)}
    places = [f"backbone/block{i}/{branch}" for i in range(model.depth) for branch in BRANCHES[where]]
    return {f"{place}/{leaf}": start for place in places for leaf, start in own.items()}, []


def _prompt(model, params, tokens: Count = 10, deep: Annotated[bool, checks.FLAG] = False):
    """Visual prompt tuning, learned tokens behind the class token (Jia et al. 2022, arXiv:2203.12119, section 3.2).

    Shallow prompts enter behind the stem, after the position embedding, and stay in the sequence; with `deep`, every
    later block reads fresh ones in their place. Without a class token they come first. Uniform within
    sqrt(6 / (3 patch^2 + width)), as in the paper.
    """
    if problems := _needs("prompt", "a ViT", vit.ViT, model):
        return {}, problems
    start = (1, tokens, model.width), _uniform(math.sqrt(6 / (3 * model.patch_size**2 + model.width)))
    places = ["stem", *(f"block{i}" for i in range(1, model.depth) if deep)]
    return {f"backbone/{place}/tokens": start for place in places}, []


def _ssf(model, params, targets: Regex = "backbone/.*/bias"):
    """Scaling and shifting of features, y * scale + shift (Lian et al. 2022, arXiv:2210.08823, section 3.2).

    After every layer whose bias matches `targets`. Scale and shift start at one and zero, in the paper with noise.
    """
    biases = {path: leaf.shape for path, leaf in params.items() if path.endswith("/bias")}
    own = {"scale": nn.initializers.ones, "shift": nn.initializers.zeros}
    chosen = {path.removesuffix("bias"): shape for path, shape in biases.items() if re.fullmatch(targets, path)}
    leaves = {owner + leaf: (shape, start) for owner, shape in chosen.items() for leaf, start in own.items()}
    return leaves, [] if leaves else [_no_match("ssf", targets, biases)]


def _mixstyle(
    model,
    params,
    p: Annotated[float, checks.number(0, 1)] = 0.5,
    alpha: Positive = 0.1,
    after: Annotated[tuple[str, ...], checks.TEXTS] = ("stage1", "stage2"),
    partner: Annotated[str, checks.one_of("random", "other_domain")] = "random",
):
    """MixStyle, in training and without parameters (Zhou et al. 2021, arXiv:2104.02008); see models/mixstyle.py.

    after: cuts whose output is mixed, the paper's on a ResNet by default. Defaults: the paper's.
    """
    if hasattr(model, "parts"):
        return {}, ["mixstyle mixes the maps of one network, and this is a fusion"]
    unknown = [cut for cut in after if cut not in model.cuts] if after else [after]
    return {}, [f"mixstyle after = {x!r}{messages.nearest(x, model.cuts)}: expected of {model.cuts}" for x in unknown]


# (model, flat params, parameters) -> ({path: (shape, initializer)}, problems)
MAKERS = {"lora": _lora, "adapter": _adapter, "prompt": _prompt, "ssf": _ssf, "mixstyle": _mixstyle}
FOLDED = ("lora", "ssf")  # in a plain network
ALONE = ("mixstyle",)  # without parameters; of no effect in evaluation


def _no_match(name: str, targets: str, paths: Mapping[str, Any]) -> str:
    kind = next(iter(paths)).rpartition("/")[2] if paths else "such"
    hint = messages.nearest(targets, paths) or f"; there are {list(paths)[:3]} ..."
    return f"{name} targets = {targets!r} match the whole path of none of the {len(paths)} {kind} parameters{hint}"


def _needs(name: str, what: str, kinds: Any, model: nn.Module) -> list[str]:
    problem = f"{name} needs {what}, and this is a {type(model).__name__}; lora and ssf serve every network"
    return [] if isinstance(model, kinds) else [problem]


def _groups(model: nn.Module) -> dict[str, int]:
    """The number of groups of each convolution, by path; the model reads images, or a part of it does."""
    for part in getattr(model, "parts", ()):
        if part.kind == "image":
            return {f"backbone/image/{path}": count for path, count in _groups(part.make(parent=None)).items()}
    groups = {}

    def record(next_fun, args, kwargs, context):
        module = context.module
        if isinstance(module, nn.Conv | layers.Conv):
            groups["/".join(module.path)] = getattr(module, "feature_group_count", getattr(module, "groups", 1))
        return next_fun(*args, **kwargs)

    height, width = sides(getattr(model, "image_size", 64))
    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32))
    return groups


def _network(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the model alone, without added parameters and further networks."""
    return {kind: {name: tree[name] for name in MODEL if name in tree} for kind, tree in variables.items()}


def _by_layer(params: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`{module path: {addition: its parameters}}`; raises ValueError where `params` has others than `names`."""
    found = [name for name in MAKERS if name in params]
    if set(found) != set(names) - set(ALONE):
        differ = f"the parameters hold the additions {found}, the model is built with {list(names)}"
        raise ValueError(f"{differ}: give the same additions to init and to the model")
    table: dict[str, dict[str, Any]] = {}
    for name in found:
        for path, leaf in trees.flatten(params[name]).items():
            owner, own = re.fullmatch(r"(.*?)/((?:down/|up/)?[^/]+)", path).groups()
            table.setdefault(owner, {}).setdefault(name, {})[own] = leaf
    return table


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A model with additions, as given to `init`; used in its place.

    variables["params"] has the network's parameters and those of `init`, and may have further networks. Prompts are
    part of out["stem"] and of every block's output, [B, 1 + P + N, D] with the class token first; with `start` the
    input must have them too. stoch_norm: in training, the probability that a channel of a BatchNorm layer that is not
    frozen uses the running statistics (Kou et al. 2020, StochNorm, section 3.2; the authors' p is 1 - stoch_norm).
    """

    model: Model
    additions: Additions = ()
    stoch_norm: float = 0.0

    frozen_norms = property(lambda self: self.model.frozen_norms)
    dtype = property(lambda self: self.model.dtype)
    cuts = property(lambda self: self.model.cuts)
    styled = property(lambda self: tuple(check(self.additions).get("mixstyle", {}).get("after", ())))  # cuts

    @property
    def mixes_domains(self) -> bool:
        """Whether `apply` reads the domain in training."""
        return check(self.additions).get("mixstyle", {}).get("partner") == "other_domain"

    def __post_init__(self):
        check(self.additions)
        if not checks.number(0, 1).fits(self.stoch_norm):
            raise ValueError(f"stoch_norm = {self.stoch_norm!r}: expected a probability, 0 (off) to 1")

    def clone(self, **fields: Any) -> "Adapted":
        return dataclasses.replace(self, model=self.model.clone(**fields))

    def apply(
        self,
        variables: Mapping[str, Any],
        x: jax.Array,
        train: bool = False,
        start: str | None = None,
        domain: jax.Array | None = None,
        **call: Any,
    ):
        """As `model.apply`; raises ValueError where parameters and additions, or prompts and `start`, do not fit.

        domain: of each example, int [B], for partners of MixStyle of another domain; None: there is one.
        """
        options, network = check(self.additions), _network(variables)
        table = _by_layer(variables["params"], tuple(options))
        if "prompt" in options and start is not None:
            _check_tokens(self.model, variables["params"]["prompt"], x, start)
        model, intercepted = self.model, contextlib.nullcontext()
        if table or self.stoch_norm:
            alpha = options.get("lora", {}).get("alpha", 0.0)
            behind = int(getattr(model, "class_token", False)) + int(getattr(model, "distilled", False))
            intercepted = nn.intercept_methods(functools.partial(_intercept, table, alpha, self.stoch_norm, behind))
            model = self.model.clone(fold=False)
        with intercepted:
            if train and "mixstyle" in options:
                return mixstyle.apply(model, network, x, options["mixstyle"], domain, start=start, **call)
            return model.apply(network, x, train=train, start=start, **call)


def _check_tokens(model: vit.ViT, prompt: Mapping[str, Any], x: jax.Array, start: str) -> None:
    """Raises ValueError where x was taken from the network without prompts."""
    patches, prompts = math.prod(model.grid), prompt["backbone"]["stem"]["tokens"].shape[1]
    if x.ndim == 3 and x.shape[1] != (wanted := model.tokens + prompts):
        more = {"the class token": model.class_token, f"{model.registers} registers": model.registers}
        tokens = "".join(f"{name}, " for name, there in more.items() if there)
        expected = f"expected {wanted}: {tokens}{prompts} prompts, {patches} patches"
        found = f"start={start!r} with {x.shape[1]} tokens"
        raise ValueError(f"{found}, {expected}; take the input from this adapted model, out[{start!r}]")


def _intercept(table, alpha, stoch_norm, behind, next_fun, args, kwargs, context):
    """One call of a module: stochastic normalisation, then LoRA, SSF, adapter and prompt, in this order.

    behind: the number of tokens that stand before the prompts.
    """
    module = context.module
    own = table.get("/".join(module.path), {}) if context.method_name == "__call__" else {}
    mixed = stoch_norm and isinstance(module, nn.BatchNorm) and not module.use_running_average
    if not own and not mixed:
        return next_fun(*args, **kwargs)
    x, *rest = args
    if "prompt" in own and isinstance(module, transformer.Block):
        x = _with_prompts(x, own["prompt"]["tokens"], behind, replaced=own["prompt"]["tokens"].shape[1])
    if mixed:  # before the call, which updates the statistics
        running = module.clone(use_running_average=True, parent=None, name=None).apply(module.variables, x)
    y = next_fun(x, *rest, **kwargs)
    if mixed:
        by_running = jax.random.bernoulli(module.make_rng("dropout"), stoch_norm, y.shape[-1:])
        y = jnp.where(_as_channels(by_running, y), running, y)
    if "lora" in own:
        y = y + _low_rank(module, x, own["lora"]["a"], own["lora"]["b"], alpha)
    if "ssf" in own:
        scale, shift = (_as_channels(own["ssf"][leaf].astype(y.dtype), y) for leaf in ("scale", "shift"))
        y = y * scale + shift
    if "adapter" in own:
        y = y + _dense(nn.gelu(_dense(y, own["adapter"], "down"), approximate=False), own["adapter"], "up")
    if "prompt" in own and isinstance(module, transformer.Stem):
        y = _with_prompts(y, own["prompt"]["tokens"], behind, replaced=0)
    return y


def _as_channels(vector: jax.Array, y: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (y.ndim - 1) + (-1,))


def _with_prompts(x: jax.Array, tokens: jax.Array, behind: int, replaced: int) -> jax.Array:
    """Puts `tokens` [1, P, D] after the first `behind` tokens of x [B, N, D], in place of the next `replaced` ones."""
    tokens = jnp.broadcast_to(tokens.astype(x.dtype), (x.shape[0], *tokens.shape[1:]))
    return jnp.concatenate([x[:, :behind], tokens, x[:, behind + replaced :]], axis=1)


def _dense(x: jax.Array, leaves: Mapping[str, jax.Array], name: str) -> jax.Array:
    variables = {"params": {"kernel": leaves[f"{name}/kernel"], "bias": leaves[f"{name}/bias"]}}
    return nn.Dense(leaves[f"{name}/bias"].shape[0], dtype=x.dtype, parent=None).apply(variables, x)


def _low_rank(module: nn.Module, x: jax.Array, a: jax.Array, b: jax.Array, alpha: float) -> jax.Array:
    """(alpha / rank) B A x, where A is `module` itself with other outputs, so that size, stride and dtype agree."""
    bias = {"use_bias": False} if hasattr(module, "use_bias") else {}
    low = module.clone(features=a.shape[-1], parent=None, name=None, **bias).apply({"params": {"kernel": a}}, x)
    return alpha / b.shape[0] * _up(low, b.astype(low.dtype))


def _up(low: jax.Array, b: jax.Array, precision: Any = None) -> jax.Array:
    """[..., groups * rank] by b [rank, F], each group by its own columns, to [..., F]."""
    rank = b.shape[0]
    groups = low.shape[-1] // rank
    low, b = low.reshape(*low.shape[:-1], groups, rank), b.reshape(rank, groups, -1)
    y = jnp.einsum("...gr,rgf->...gf", low, b, precision=precision)
    return y.reshape(*y.shape[:-2], -1)


def can_merge(additions: Additions) -> bool:
    """Whether a plain network can compute the same."""
    return set(check(additions)) <= {*FOLDED, *ALONE}


def merge(variables: Mapping[str, Any], additions: Additions) -> dict[str, Any]:
    """The variables of the plain network that computes the same: lora and ssf folded into its weights, in float32.

    LoRA: W + (alpha / rank) B A. SSF: the kernel or norm scale times scale, bias * scale + shift. Further networks are
    left out. Raises ValueError for adapter and prompt, and for parameters of another network.
    """
    options = check(additions)
    if kept := " and ".join(name for name in options if name not in (*FOLDED, *ALONE)):
        raise ValueError(f"{kept} cannot be merged: no plain network holds them; only lora and ssf fold in")
    table, network = _by_layer(variables["params"], tuple(options)), _network(variables)
    params = trees.flatten(network["params"])
    if strange := [path for path in table if not {f"{path}/kernel", f"{path}/scale"} & params.keys()]:
        raise ValueError(f"the network has no layers {strange} to merge into; these additions are of another network")
    for path, own in table.items():
        weight = f"{path}/kernel" if f"{path}/kernel" in params else f"{path}/scale"
        if "lora" in own:
            a, b = own["lora"]["a"], own["lora"]["b"]
            delta = _up(jnp.asarray(a), jnp.asarray(b), jax.lax.Precision.HIGHEST)
            params[weight] = params[weight] + options["lora"]["alpha"] / b.shape[0] * delta
        if "ssf" in own:
            scale = jnp.asarray(own["ssf"]["scale"])
            params[weight] = params[weight] * _as_channels(scale, params[weight])
            params[f"{path}/bias"] = params[f"{path}/bias"] * scale + own["ssf"]["shift"]
    return {**network, "params": trees.unflatten(params)}
