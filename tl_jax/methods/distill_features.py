"""Distillation of features as terms: hints, attention maps, relations between examples, contrast with a memory."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax.core import checks
from tl_jax.core.fields import INDEX
from tl_jax.core.messages import nearest
from tl_jax.methods.distill import Streams, Strength, Temperature
from tl_jax.methods.precompute import linear
from tl_jax.methods.term import AVERAGE, MAIN, MODEL, Context, Network, Result, Start, Term

_NAME = checks.Check(lambda x: isinstance(x, str) and x != AVERAGE, "the name of a network of the config")
Name = Annotated[str, _NAME]
_PAIR = checks.sequence(checks.TEXT, "", 2)
Cuts = Annotated[tuple, checks.sequence(_PAIR, "pairs of cuts, ((the student's, the teacher's), ...)")]
READ = "pre_logits"
Pairs = Callable[[Any, Any], Sequence[tuple[str, str]]]  # of the modules of student and teacher: what is compared


def fitnet(strength: Strength = 100.0, teacher: Name = "teacher", cuts: Cuts = (), streams: Streams = (MAIN,)) -> Term:
    """Hints: strength * sum over cuts of mean (W student + b - teacher)^2 (Romero et al. 2015, arXiv:1412.6550, eq. 3).

    W [C_student, C_teacher] and b are a 1x1 convolution, the network `fitnet`, which trains in the group `fitnet`.
    cuts: of student and teacher, by default the last map of each; vectors [B, D] are maps of one place, the patches of
    a ViT a map of their grid; the larger of two maps is averaged over bins to the size of the smaller. The mean is over
    examples, places and channels. strength: that of Tian et al. 2020. streams: see `distill.kd`.
    """

    def pairs(student: Any, other: Any) -> Sequence[tuple[str, str]]:
        return cuts or ((student.cuts[-2], other.cuts[-2]),)

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        shapes = compared(start, teacher, pairs, "fitnet")
        keys, params = jax.random.split(start.key, len(shapes) or 1), {}
        for i, (student, other) in enumerate(shapes):
            kernel = jax.random.normal(keys[i], (student[-1], other[-1])) * student[-1] ** -0.5
            params[f"hint{i}"] = {"kernel": kernel, "bias": jnp.zeros(other[-1])}
        return {"fitnet": Network(None, None, {"params": params}, group="fitnet")} if shapes else {}, None

    def loss(context: Context) -> Result:
        regressors, value = context.params["fitnet"], 0.0
        for i, (student, other) in enumerate(maps(context, teacher, pairs, streams)):
            student, other = same_size(student, other)
            student = jnp.einsum("bhwc,cd->bhwd", student, regressors[f"hint{i}"]["kernel"])
            value += jnp.square(student + regressors[f"hint{i}"]["bias"].reshape(1, 1, 1, -1) - other).mean()
        return Result(strength * value)

    return Term(loss, on=tuple(streams), init=init, reads=(teacher,), takes=_taken(pairs))


def at(strength: Strength = 1000.0, teacher: Name = "teacher", cuts: Cuts = (), streams: Streams = (MAIN,)) -> Term:
    """Attention transfer: strength * sum over cuts of mean (Q_student - Q_teacher)^2 (Zagoruyko & Komodakis 2017).

    arXiv:1612.03928, equation 2: Q = A / |A| of each example, A the mean over channels of the squared map. cuts: by
    default the ends of all stages where both networks have equally many, else the last map of each; sizes as in
    `fitnet`. strength: that of Tian et al. 2020. streams: see `distill.kd`.
    """

    def pairs(student: Any, other: Any) -> Sequence[tuple[str, str]]:
        ends, others = stages(student), stages(other)
        last = ((student.cuts[-2], other.cuts[-2]),)
        return cuts or (tuple(zip(ends, others, strict=True)) if len(ends) == len(others) else last)

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        shapes = compared(start, teacher, pairs, "at")
        flat = [both for both in shapes if 1 in (math.prod(shape[1:3]) for shape in both)]
        checks.refuse("at compares places, and one map has a single one: name other cuts", map(str, flat))
        return {}, None

    def loss(context: Context) -> Result:
        value = 0.0
        for both in maps(context, teacher, pairs, streams):
            student, other = map(attention, same_size(*both))
            value += jnp.square(student - other).mean()
        return Result(strength * value)

    return Term(loss, on=tuple(streams), init=init, reads=(teacher,), takes=_taken(pairs))


def rkd(
    distance: Strength = 25.0, angle: Strength = 50.0, teacher: Name = "teacher", streams: Streams = (MAIN,)
) -> Term:
    """Relational distillation of pre_logits: distances and angles of examples (Park et al. 2019, arXiv:1904.05068).

    distance * mean l(d_student, d_teacher) over pairs, d the distance over the mean of all distances, equation 5, +
    angle * mean l(cos_student, cos_teacher) over triples (i, j, k), the cosine at j, equation 8; l is the Huber loss of
    threshold 1. Defaults: the authors'. Two equal examples have gradients of 0. Memory: B^2 (D + B) numbers.
    """

    def loss(context: Context) -> Result:
        both = [unit_distances(x) for x in features(context, teacher, streams)]
        far, turned = (huber(a - b).mean() for a, b in zip(*both, strict=True))
        return Result(distance * far + angle * turned, {"distance": far, "angle": turned})

    return Term(
        loss, on=tuple(streams), logs=("distance", "angle"), reads=(teacher,), takes=lambda *_: (READ,),
        needs=frozenset({"whole_batch"}),
    )  # fmt: skip


def crd(
    strength: Strength = 0.8,
    teacher: Name = "teacher",
    stream: Annotated[str, checks.TEXT] = MAIN,
    width: Annotated[int, checks.integer(1, 2**14)] = 128,
    negatives: Annotated[int, checks.integer(1, 2**20)] = 16384,
    temperature: Temperature = 0.07,
    momentum: Annotated[float, checks.number(0, 1)] = 0.5,
) -> Term:
    """Contrastive distillation: the two features of an example are told from those of others (Tian et al. 2020).

    arXiv:1910.10699, equations 11 to 18, as the authors compute it: pre_logits of both, projected to `width` and to
    length 1, meet memories [N, width] of the other's in noise-contrastive estimation, with Z fixed at its first value;
    an example's row is then momentum * row + (1 - momentum) * its feature. `negatives` rows are sampled in each step,
    for the whole batch at once and from all examples, so that an unlabelled stream serves. The projections are the
    network `crd`, which trains in the group `crd`. Defaults: the authors', for 50,000 examples.
    """

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        if teacher not in start.outputs or stream not in start.facts:
            return {}, None  # named by training/terms.py
        widths = {"student": start.shapes[READ][-1], "teacher": start.outputs[teacher][READ][-1]}
        params, memory, bound = {}, {"scale": jnp.zeros(2)}, (width / 3) ** -0.5
        for name, own in widths.items():
            draw, place = (jax.random.fold_in(start.key, 2 * len(params) + i) for i in (0, 1))
            params[name] = {"kernel": jax.random.normal(draw, (own, width)) * own**-0.5, "bias": jnp.zeros(width)}
            memory[name] = jax.random.uniform(place, (start.facts[stream].examples, width), minval=-bound, maxval=bound)
        return {"crd": Network(None, None, {"params": params}, group="crd")}, memory

    def loss(context: Context) -> Result:
        index, memory = context.batch[stream][INDEX], jax.lax.stop_gradient(context.memory)
        count = len(memory["student"])
        chosen = jax.random.randint(context.key, (negatives,), 0, count)
        own = dict(zip(("student", "teacher"), features(context, teacher, (stream,)), strict=True))
        own = {name: unit(linear(x, context.params["crd"][name])) for name, x in own.items()}
        value, scales, new = 0.0, [], {}
        for i, (name, other) in enumerate((("student", "teacher"), ("teacher", "student"))):
            same = jnp.exp((own[name] * memory[other][index]).sum(axis=-1, keepdims=True) / temperature)
            found = jnp.concatenate([same, jnp.exp(own[name] @ memory[other][chosen].T / temperature)], axis=1)
            first = jax.lax.stop_gradient(found.mean() * count)
            scales.append(jnp.where(memory["scale"][i] > 0, memory["scale"][i], first))
            value += contrast(found / scales[i], count)
            row = momentum * memory[name][index] + (1 - momentum) * jax.lax.stop_gradient(own[name])
            new[name] = memory[name].at[index].set(unit(row))
        return Result(strength * value, memory={**new, "scale": jnp.stack(scales)})

    return Term(
        loss, on=(stream,), init=init, reads=(teacher,), takes=lambda *_: (READ,), needs=frozenset({"whole_batch"})
    )


def contrast(p: jax.Array, count: int) -> jax.Array:
    """Noise-contrastive estimation of p [B, 1 + K], the example itself first, against uniform noise of `count`.

    -1/B sum (log(p_0 / (p_0 + K/N)) + sum_k log((K/N) / (p_k + K/N))), each denominator with 1e-7.
    """
    noise = (p.shape[1] - 1) / count
    same, others = p[:, 0], p[:, 1:]
    value = jnp.log(same / (same + noise + 1e-7)) + jnp.log(noise / (others + noise + 1e-7)).sum(axis=1)
    return -value.mean()


def unit(x: jax.Array) -> jax.Array:
    """x over its length along the last axis; zeros stay zeros, with a gradient of 0 through the length."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def unit_distances(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of examples x [B, D] the distances over their mean [B, B], and the cosines [B, B, B] at j of (j, i, k)."""
    apart = x[None] - x[:, None]
    squares = jnp.maximum(jnp.square(apart).sum(axis=-1), 1e-12)
    distances = jnp.where(jnp.eye(len(x), dtype=bool), 0.0, jnp.sqrt(squares))
    mean = distances.sum() / max(len(x) * (len(x) - 1), 1)
    directions = unit(apart)
    return distances / mean, jnp.einsum("jid,jkd->jik", directions, directions)


def huber(x: jax.Array) -> jax.Array:
    """x^2 / 2 where |x| < 1, else |x| - 1/2."""
    return jnp.where(jnp.abs(x) < 1, 0.5 * x * x, jnp.abs(x) - 0.5)


def attention(x: jax.Array) -> jax.Array:
    """The mean square over the channels of a map [B, h, w, C], of length 1 for each example, [B, h w]."""
    return unit(jnp.square(x).mean(axis=-1).reshape(x.shape[0], -1))


def stages(model: Any) -> list[str]:
    """The cuts that end a stage, in order; the blocks of a network without stages."""
    return [cut for cut in model.cuts[:-1] if "/" not in cut and cut != "stem"]


def features(context: Context, teacher: str, streams: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """The pre_logits of student and teacher, float32 [B, D] each, of all examples of the streams."""
    student = [context.outputs[stream][READ] for stream in streams]
    other = [context.forward(teacher, stream)[0][READ] for stream in streams]
    student, other = (jnp.concatenate(x).astype(jnp.float32) for x in (student, other))
    return student, jax.lax.stop_gradient(other)


def maps(context: Context, teacher: str, pairs: Pairs, streams: Sequence[str]) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The maps [B, h, w, C] of student and teacher at each pair of cuts, float32, of all examples of the streams."""
    modules = context.modules[MODEL], context.modules[teacher]
    others = [context.forward(teacher, stream)[0] for stream in streams]
    for own, other in pairs(*modules):
        if lacking := [stream for stream in streams if own not in context.outputs[stream]]:
            raise ValueError(f"the student's {own!r} on {lacking} lies inside of the cached prefix: leave out cache")
        student = jnp.concatenate([context.outputs[stream][own] for stream in streams])
        known = jax.lax.stop_gradient(jnp.concatenate([out[other] for out in others]))
        yield tuple(as_map(x, m).astype(jnp.float32) for x, m in zip((student, known), modules, strict=True))


def as_map(x: jax.Array, module: Any) -> jax.Array:
    """The output of a cut as a map [B, h, w, C]: vectors as one place; of a ViT the patches, which are its last tokens.

    Raises ValueError for the tokens of a text.
    """
    grid = getattr(getattr(module, "model", module), "grid", None)
    if x.ndim == 3 and grid:
        return x[:, -math.prod(grid) :].reshape(x.shape[0], *grid, x.shape[-1])
    if x.ndim not in (2, 4):
        raise ValueError(f"outputs {list(x.shape[1:])} of tokens of a text are no map: compare pre_logits")
    return x if x.ndim == 4 else x[:, None, None]


def same_size(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both maps with the smaller height and width of the two, by means over bins, as in torch's adaptive pooling."""
    height, width = (min(a.shape[axis], b.shape[axis]) for axis in (1, 2))
    return tuple(_pooled(_pooled(x, height, "bhwc,ih->biwc", 1), width, "bhwc,jw->bhjc", 2) for x in (a, b))


def _pooled(x: jax.Array, count: int, product: str, axis: int) -> jax.Array:
    return x if x.shape[axis] == count else jnp.einsum(product, x, _bins(x.shape[axis], count))


def _bins(size: int, count: int) -> np.ndarray:
    """[count, size], whose row i takes the mean from floor(i size / count) to ceil((i + 1) size / count)."""
    ends = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
    return np.array([[(low <= j < high) / (high - low) for j in range(size)] for low, high in ends], np.float32)


def compared(start: Start, teacher: str, pairs: Pairs, term: str) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes [1, h, w, C] of the maps that are compared; ValueError for what is no cut, or no map."""
    if teacher not in start.outputs:
        return []  # named by training/terms.py
    other, problems, found = start.networks[teacher].module, [], []
    sides = (("student", start.model, start.shapes), ("teacher", other, start.outputs[teacher]))
    for cuts in pairs(start.model, other):
        try:
            found.append(tuple(_shape(cut, *side) for cut, side in zip(cuts, sides, strict=True)))
        except ValueError as error:
            problems.append(str(error))
    checks.refuse(f"the cuts of {term} cannot be compared", problems)
    return found


def _shape(cut: str, whose: str, module: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if cut not in module.cuts:
        raise ValueError(f"the {whose} has no cut {cut!r}{nearest(cut, module.cuts)}; it has {', '.join(module.cuts)}")
    return jax.eval_shape(lambda x: as_map(x, module), jax.ShapeDtypeStruct(shapes[cut], jnp.float32)).shape


def _taken(pairs: Pairs) -> Callable[[Any, Any], tuple[str, ...]]:
    return lambda model, network: tuple(dict.fromkeys(other for _, other in pairs(model, network)))


TERMS = {term.__name__: term for term in (fitnet, at, rkd, crd)}
