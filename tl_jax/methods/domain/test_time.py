"""Adaptation at test time: from a trained network and the stream of its inputs, while it predicts them."""

import math
import re
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from tl_jax.core import checks, trees
from tl_jax.core.fields import INDEX
from tl_jax.methods.domain import outputs
from tl_jax.methods.term import MAIN, MODEL, Context, Network, Result, Start, Term

Stream = Annotated[str, checks.TEXT]
Share = Annotated[float, checks.number(0)]


def adabn(target: Stream = "target") -> Term:
    """AdaBN: every BatchNorm layer gets the statistics of the target (Li et al. 2016, arXiv:1603.04779, algorithm 1).

    Computed where the phase begins, over all of its examples, and kept for the phase; training moves them no more. The
    mean and the biased variance of a layer pool the moments of all batches, in each of which the layers below
    normalise by that batch's own; the batches are those of evaluation (`eval_batch_size`). Its loss is 0.
    """

    def loss(context: Context) -> Result:
        return Result(jnp.zeros(()))

    def statistics(start: Start) -> dict[str, Any]:
        of_batch, count, sums = jax.jit(start.batch_statistics), 0, {}
        for x, _ in start.batches(target):
            found = of_batch(start.variables, x)
            moments = {path: leaf + found[_mean(path)] ** 2 if _is_var(path) else leaf for path, leaf in found.items()}
            sums = {path: sums.get(path, 0.0) + len(x) * leaf for path, leaf in moments.items()}
            count += len(x)
        means = {path: leaf / count for path, leaf in sums.items()}
        return {path: leaf - means[_mean(path)] ** 2 if _is_var(path) else leaf for path, leaf in means.items()}

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        if not trees.flatten(start.variables["batch_stats"]):
            raise ValueError(
                "adabn: the network has no BatchNorm layer, expected one whose statistics are computed anew"
            )
        return {}, None

    return Term(loss, on=(target,), init=init, statistics=statistics)


def _is_var(path: str) -> bool:
    return path.endswith("/var")


def _mean(path: str) -> str:
    return f"{path.rpartition('/')[0]}/mean"


def tent(target: Stream = MAIN) -> Term:
    """Tent: the mean entropy of the predictions (Wang et al. 2021, arXiv:2006.10726, section 3).

    Train scale and bias of the BatchNorm layers alone, which makes these layers normalise by the batch. What is
    predicted in a step, before its update, is kept as the answer to its examples: the last one, where an example comes
    again. target: the unlabelled stream, the run's own by default; give it sampling = "sequential". Memory: [N, K].
    """

    def loss(context: Context) -> Result:
        logits = context.outputs[target]["logits"].astype(jnp.float32)
        return Result(outputs.entropy_of(logits).mean(), memory=_answered(context.memory, context, target, logits))

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        return {}, _blank(start, target)

    needs = frozenset({"classes", "whole_batch"})
    return Term(loss, on=(target,), init=init, answers=lambda memory: memory, needs=needs, trained=True)


def eata(
    margin: Share = 0.4,
    similarity: Annotated[float, checks.number(-1, 1)] = 0.05,
    decay: Annotated[float, checks.number(0, 1)] = 0.9,
    anchor: Share = 2000.0,
    examples: Annotated[int, checks.integer(1)] = 2000,
    target: Stream = MAIN,
    anchored: Annotated[str, checks.REGEX] = r".*norm\d*/(scale|bias)",
) -> Term:
    """EATA: Tent on reliable and new examples, held near its start (Niu et al. 2022, arXiv:2204.02610, eq. 2-9).

    The mean of exp(E0 - H) H over the selected examples of a batch, + anchor * sum of F (w - w0)^2. Selected are those
    with H < E0 = margin ln K and |cos(p, m)| < similarity; m is the moving average of selected predictions, and the
    first batch has none to be similar to. F, the diagonal Fisher information, is the mean over the batches of the first
    `examples` of the squared gradient of the cross-entropy with the predicted classes, in eval mode, for the parameters
    that `anchored` matches; w0 is their value where the phase begins. target and answers are those of `tent`.
    """

    def loss(context: Context) -> Result:
        memory, logits = context.memory, context.outputs[target]["logits"].astype(jnp.float32)
        p, entropy = jax.nn.softmax(logits), outputs.entropy_of(logits)
        highest = margin * math.log(logits.shape[-1])
        average = memory["average"]
        lengths = jnp.linalg.norm(p, axis=-1) * jnp.maximum(jnp.linalg.norm(average), 1e-12)
        new = (jnp.abs(p @ average / lengths) < similarity) | ~memory["begun"]
        chosen = jax.lax.stop_gradient((entropy < highest) & new)
        weights = jnp.where(chosen, jnp.exp(highest - jax.lax.stop_gradient(entropy)), 0.0)
        now = trees.flatten(context.params)
        drift = sum((memory["fisher"][path] * (now[path] - w0) ** 2).sum() for path, w0 in memory["start"].items())
        count = chosen.sum()
        mean = jnp.where(chosen[:, None], p, 0.0).sum(axis=0) / jnp.maximum(count, 1)
        moved = jnp.where(memory["begun"], decay * average + (1 - decay) * mean, mean)
        kept = {
            "answers": _answered(memory["answers"], context, target, logits),
            "average": jax.lax.stop_gradient(jnp.where(count > 0, moved, average)),
            "begun": memory["begun"] | (count > 0),
        }
        value = (weights * entropy).sum() / jnp.maximum(count, 1) + anchor * drift
        return Result(value, {"chosen": chosen.mean(dtype=jnp.float32)}, {**memory, **kept})

    def init(start: Start) -> tuple[dict[str, Network], Any]:
        flat = trees.flatten(start.variables["params"])
        own = {path: jnp.asarray(leaf) for path, leaf in flat.items() if re.fullmatch(anchored, path)}
        if not own:
            raise ValueError(
                f"eata: anchored = {anchored!r} matches no parameter in full, such as {next(iter(flat))!r}"
            )
        memory = {"answers": _blank(start, target), "average": jnp.zeros(start.task.outputs)}
        memory |= {"begun": jnp.zeros((), bool), "fisher": jax.tree.map(jnp.zeros_like, own), "start": own}
        return {}, memory

    def refresh(start: Start) -> Any:
        flat = trees.flatten(start.variables["params"])
        own = {path: flat[path] for path in start.memory["start"]}
        return {**start.memory, "fisher": fisher(start, own, target, examples), "start": own}

    return Term(
        loss, on=(target,), init=init, refresh=refresh, logs=("chosen",), answers=lambda memory: memory["answers"],
        needs=frozenset({"classes", "whole_batch"}), trained=True,
    )  # fmt: skip


def fisher(start: Start, own: dict[str, Any], stream: str, examples: int) -> dict[str, Any]:
    """The mean over batches of the squared gradient of the cross-entropy with the predicted class, {path: leaf}."""
    params = start.variables["params"]

    @jax.jit
    def squares(own, x):
        def cross_entropy(own):
            out = start.apply(MODEL, {**start.variables, "params": trees.merge(params, own)}, x)
            return -jax.nn.log_softmax(out["logits"].astype(jnp.float32)).max(axis=-1).mean()

        return jax.tree.map(jnp.square, jax.grad(cross_entropy)(own))

    found, seen = [], 0
    for x, _ in start.batches(stream):
        if seen < examples:
            found.append(squares(own, x[: examples - seen]))
            seen += len(x)
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *found)


def _blank(start: Start, stream: str) -> jax.Array:
    """Answers [N, K] of a stream before any is given."""
    return jnp.zeros((start.facts[stream].examples, start.task.outputs))


def _answered(answers: jax.Array, context: Context, stream: str, logits: jax.Array) -> jax.Array:
    """The answers with those of a batch."""
    return answers.at[context.batch[stream][INDEX]].set(jax.lax.stop_gradient(logits))
