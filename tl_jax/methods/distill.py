"""Distillation of answers as terms: a student learns the class probabilities of frozen teachers, or of its average."""

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from tl_jax.core import checks
from tl_jax.core.messages import unequal
from tl_jax.methods.term import AVERAGE, MAIN, Context, Network, Result, Start, Term
from tl_jax.models.head import DISTILLED

Strength = Annotated[float, checks.number(0)]
Temperature = Annotated[float, checks.number(0, above=True)]
_SOME = checks.Check(lambda x: checks.TEXTS.fits(x) and 0 < len(x) == len(set(x)), "different names, ('one', 'other')")
Teacher = Annotated[Any, checks.either(checks.TEXT, _SOME)]
Streams = Annotated[tuple[str, ...], _SOME]
SHIFT = 1000.0  # what a logit is lowered by to leave its class out: exp(-1000) = 0, and every gradient is finite


def kd(temperature: Temperature = 4.0, teacher: Teacher = "teacher", streams: Streams = (MAIN,)) -> Term:
    """Knowledge distillation: T^2 KL(softmax(teacher / T) || softmax(student / T)) (Hinton et al. 2015, section 2).

    Mean over the batch. teacher: frozen networks of config.networks with the same classes in the same order, or
    "average"; of several the mean of their softened probabilities. streams: which the student learns on, labelled or
    not; a mean over all their examples.
    """

    def loss(context: Context) -> Result:
        p, q = answers(context, teacher, streams, temperature)
        return Result(temperature**2 * divergence(p, q).mean(), {"agreement": agreement(p, q)})

    return _term(loss, teacher, streams)


def dkd(
    alpha: Strength = 1.0, beta: Strength = 8.0, temperature: Temperature = 4.0, teacher: Teacher = "teacher"
) -> Term:
    """Decoupled distillation: T^2 (alpha TCKD + beta NCKD) (Zhao et al. 2022, arXiv:2203.08679, equation 7).

    TCKD = KL of (p_t, 1 - p_t), t the label; NCKD = KL of the probabilities of the other classes among themselves. With
    beta = 1 - p_t of the teacher it would be kd. Labels that are mixed or smoothed count as their largest class.
    Defaults: the authors', whose weight rises from 0 over the first 20 of 240 epochs. teacher: see `kd`.
    """

    def loss(context: Context) -> Result:
        p, q = answers(context, teacher, (MAIN,), temperature)
        label = jax.nn.one_hot(context.encoded[MAIN].argmax(axis=-1), p.shape[-1])
        others = [x - SHIFT * label for x in (p, q)]
        both = [
            jnp.stack([(label * x).sum(axis=-1), jax.nn.logsumexp(x - SHIFT * label, axis=-1)], axis=-1) for x in (p, q)
        ]
        target, rest = divergence(*both).mean(), divergence(*map(jax.nn.log_softmax, others)).mean()
        logs = {"target": target, "others": rest, "agreement": agreement(p, q)}
        return Result(temperature**2 * (alpha * target + beta * rest), logs)

    return _term(loss, teacher, (MAIN,))._replace(logs=("target", "others", "agreement"))


def dist(
    beta: Strength = 1.0,
    gamma: Strength = 1.0,
    temperature: Temperature = 1.0,
    teacher: Teacher = "teacher",
    streams: Streams = (MAIN,),
) -> Term:
    """DIST: T^2 (beta inter + gamma intra), 1 - Pearson's correlation of softened probabilities [B, K] of both.

    inter: of the classes of an example, the mean over examples; intra: of the examples of the batch for a class, the
    mean over classes (Huang et al. 2022, arXiv:2205.10536, equations 7 and 9). Defaults: the authors' code. teacher,
    streams: see `kd`.
    """

    def loss(context: Context) -> Result:
        p, q = answers(context, teacher, streams, temperature)
        inter, intra = uncorrelated(jnp.exp(p), jnp.exp(q)), uncorrelated(jnp.exp(p).T, jnp.exp(q).T)
        return Result(temperature**2 * (beta * inter + gamma * intra), {"agreement": agreement(p, q)})

    made = _term(loss, teacher, streams)
    return made._replace(needs=made.needs | {"whole_batch"})


def hard(teacher: Teacher = "teacher", streams: Streams = (MAIN,)) -> Term:
    """Hard distillation: the cross-entropy with the teacher's most probable class (Touvron et al. 2021, equation 3).

    Mean over the batch. A student with a distillation token learns it there, see `answers`; the paper's loss has the
    weight 0.5 for this term and for the task's. teacher, streams: see `kd`.
    """

    def loss(context: Context) -> Result:
        p, q = answers(context, teacher, streams, 1.0)
        chosen = jax.nn.one_hot(p.argmax(axis=-1), p.shape[-1])
        return Result(-(chosen * q).sum(axis=-1).mean(), {"agreement": agreement(p, q)})

    return _term(loss, teacher, streams)


def answers(
    context: Context, teacher: str | Sequence[str], streams: Sequence[str], temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Logarithms of the teachers' mean probabilities, without gradient, and of the student's, float32 [B, K] each.

    Of all examples of the streams. The student answers by its distillation token where it has one.
    """
    student = [context.outputs[stream].get(DISTILLED, context.outputs[stream]["logits"]) for stream in streams]
    found = []
    for name in names(teacher):
        logits = [context.forward(name, stream)[0]["logits"] for stream in streams]
        found.append(_log_softmax(logits, temperature))
    mean = jax.nn.logsumexp(jnp.stack(found), axis=0) - jnp.log(len(found))
    return jax.lax.stop_gradient(mean), _log_softmax(student, temperature)


def _log_softmax(logits: Sequence[jax.Array], temperature: float) -> jax.Array:
    return jax.nn.log_softmax(jnp.concatenate(logits).astype(jnp.float32) / temperature)


def divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(exp p || exp q) of each row, for logarithms of probabilities [B, K]."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def uncorrelated(a: jax.Array, b: jax.Array) -> jax.Array:
    """The mean over rows of 1 - Pearson's correlation of a and b, [N, M] each; rows of one value have correlation 0."""
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    lengths = (jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=1), 1e-24)) for x in (a, b))
    return 1 - jnp.mean((a * b).sum(axis=1) / (next(lengths) * next(lengths) + 1e-8))


def agreement(p: jax.Array, q: jax.Array) -> jax.Array:
    """The share of examples to which student and teacher give the same class."""
    return (p.argmax(axis=-1) == q.argmax(axis=-1)).mean(dtype=jnp.float32)


def names(teacher: str | Sequence[str]) -> tuple[str, ...]:
    return (teacher,) if isinstance(teacher, str) else tuple(teacher)


def _term(loss, teacher: str | Sequence[str], streams: Sequence[str]) -> Term:
    """A term on answers, which refuses teachers of other classes."""

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        problems = []
        for name in (name for name in names(teacher) if name in start.networks):
            own = start.task.spec.class_names
            width, known = start.outputs[name]["logits"][-1], start.networks[name].card.class_names
            if width != len(own):
                problems.append(f"{name!r} answers with {width} classes, the data has {len(own)}")
            elif known and (differ := unequal(own, known)):
                problems.append(f"{name!r} has other classes: {differ}")
        checks.refuse("a teacher needs the classes of the data in their order; train its head on them first", problems)
        return {}, None

    known = frozenset({"classes"} | ({"average"} if AVERAGE in names(teacher) else set()))
    read = tuple(name for name in names(teacher) if name != AVERAGE)
    return Term(loss, on=tuple(streams), init=init, logs=("agreement",), reads=read, needs=known)


TERMS = {term.__name__: term for term in (kd, dkd, dist, hard)}
