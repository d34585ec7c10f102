"""What a term of the loss is: a pure function of a `Context`, with the networks and the memory that it needs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.core.fields import WEIGHT
from tl_jax.core.trees import FROZEN
from tl_jax.tasks import Task

Batch = Mapping[str, Mapping[str, jax.Array]]  # {stream: {field: array}}; an unlabelled stream has no label field
Outputs = Mapping[str, jax.Array]  # logits, every cut, embeddings
MODEL, AVERAGE = "model", "average"  # networks that every run has: the one that is trained, and its moving average
TASK, MAIN = "task", "train"  # the task's own term, and the stream that it is on


class Network(NamedTuple):
    """A module with its own subtree of the parameters.

    module: `apply(variables, array, train, start, stop, ...)` -> (logits, outputs). card: what it takes; None where it
    reads the outputs of another network. variables: {"params", "batch_stats"}. group: what trains it, or "frozen".
    origin: where its leaves come from, for the audit. made_by: the terms whose `init` gave it.
    """

    module: Any
    card: Card | None
    variables: Mapping[str, Any]
    group: str = FROZEN
    origin: str = "new"
    made_by: tuple[str, ...] = ()


class StreamFacts(NamedTuple):
    """What is known of a stream before training: its number of examples, and of domains (1 where it has no names)."""

    examples: int
    domains: int


class Context(NamedTuple):
    """What a term may look at in one step.

    batch, encoded, count: by stream; encoded and count (of examples, [B], as the task counts) of labelled ones alone.
    With gradient accumulation a term sees one micro-batch at a time, and `total` is the count of the whole batch over
    the number of micro-batches, so that sum / total is right for unequal counts.
    outputs: by stream, of the one training pass of the model, for every stream that a term is on. facts: by stream.
    params, batch_stats: of all networks, nested. groups: the group of each parameter path. memory: this term's own.
    forward(network, of, *, train=False, start=None, stop=None, key=None, variables=None) -> (Outputs, batch_stats): one
    more pass of a network over a stream's inputs (`of` is its name), as the training pass got them, or over an array:
    of inputs, or of what the cut `start` gives. In train mode batch_stats holds {path: leaf} of the updated statistics,
    for `Result`. variables: {"params", "batch_stats"} in place of the network's own.
    step: of the run. progress: 0 .. 1 of the phase. key: folded by the term's name. joint: whether the training pass
    normalised its streams together. modules: of all networks, for the order of their cuts.
    """

    batch: Batch
    encoded: Mapping[str, Any]
    count: Mapping[str, jax.Array]
    total: Mapping[str, jax.Array]
    outputs: Mapping[str, Outputs]
    facts: Mapping[str, StreamFacts]
    params: Any
    batch_stats: Any
    groups: Mapping[str, str]
    memory: Any
    task: Task
    forward: Callable[..., tuple[Outputs, Mapping[str, jax.Array]]]
    step: jax.Array
    progress: jax.Array
    key: jax.Array
    joint: bool = True
    modules: Mapping[str, Any] = {}


class Result(NamedTuple):
    """A term's loss (a mean over examples), numbers to log, new memory (None: unchanged) and updated statistics."""

    loss: jax.Array
    logs: Mapping[str, jax.Array] = {}
    memory: Any = None
    batch_stats: Mapping[str, jax.Array] = {}


class Start(NamedTuple):
    """What a term may look at where a phase begins.

    memory, batches and loaded are None in `init`, which reads no data. variables: of all networks, as they are now.
    facts: by stream. batches(stream): every example once and in order, as for evaluation: pairs (what the model reads,
    labels); labels are None where the stream is unlabelled; stops on request.
    apply(network, variables, x, start=None, stop=None) -> Outputs in eval mode, of the model or of a network like it.
    batch_statistics(variables, x) -> {path: leaf}: mean and variance of a batch x at every BatchNorm layer of the
    model, each layer below normalising by its own.
    model: the module, for its cuts. shapes: of the model's outputs for one example, [1, ...]. source_head(): the weight
    file's own classifier {"kernel" [D, S], "bias" [S]}, or None. loaded: `variables` as training began.
    networks: the further ones of the config, by name; outputs: the shapes of theirs. numbered(network) -> int32 [N]:
    the number of the input that the model or a further network reads of each example of `train`; equal ones have one.
    """

    variables: Mapping[str, Any]
    memory: Any
    task: Task
    model: Any
    facts: Mapping[str, StreamFacts]
    shapes: Mapping[str, tuple[int, ...]]
    batches: Callable[[str], Iterator[tuple[Any, Any]]] | None
    apply: Callable
    batch_statistics: Callable
    source_head: Callable[[], Mapping[str, jax.Array] | None]
    key: jax.Array
    loaded: Mapping[str, Any] | None = None
    networks: Mapping[str, Network] = {}
    outputs: Mapping[str, Mapping[str, tuple[int, ...]]] = {}
    numbered: Callable[[str], Any] | None = None


class Term(NamedTuple):
    """One summand of the loss.

    loss: a pure function of the step. on: the streams whose outputs it reads; the training pass runs over the union.
    feeds: further streams that it reads by `forward` alone.
    init: its further networks and its memory, arrays of the final shapes; reads no data. refresh: its memory from the
    data, where a phase begins and every `refresh_every`, a duration in steps, or in examples or epochs of the last
    stream of `on` (None: only there); not when resuming in between. statistics: {path: leaf} of running statistics,
    computed anew where a phase begins. logs: the names of its `Result.logs`. reads: further networks that it runs on
    the inputs of streams. takes(model, network): the outputs that it reads of one of these, given both modules. needs:
    what it cannot do without, names of training.terms.NEEDS. answers(memory): logits [N, K] of the examples of its last
    stream in their order, as it predicted them while adapting. replaces_task: the task's own term is left out beside
    it, unless the config names that too. trained: it goes on with a network that answers already. pairs: the further
    network whose features it holds against the model's, so that either input finds the other: retrieval.
    """

    loss: Callable[[Context], Result]
    on: tuple[str, ...] = (MAIN,)
    feeds: tuple[str, ...] = ()
    init: Callable[[Start], tuple[dict[str, Network], Any]] = lambda start: ({}, None)
    refresh: Callable[[Start], Any] | None = None
    refresh_every: tuple[float, str] | None = None
    statistics: Callable[[Start], dict[str, Any]] | None = None
    logs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    takes: Callable[[Any, Any], tuple[str, ...]] = lambda model, network: ("logits",)
    needs: frozenset[str] = frozenset()
    answers: Callable[[Any], jax.Array] | None = None
    replaces_task: bool = False
    trained: bool = False
    pairs: str = ""


class Method(NamedTuple):
    """terms: {name: (weight of the phase's progress, term)}. mix: see mixing.make_mix."""

    terms: Mapping[str, tuple[Callable, Term]]
    mix: Callable | None = None


def task_losses(context: Context) -> jax.Array:
    """The task's loss of each example of the stream `train`, times its weight of data.weights, [B]."""
    per_example = context.task.loss(context.outputs[MAIN], context.encoded[MAIN])
    return per_example * context.batch[MAIN][WEIGHT] if WEIGHT in context.batch[MAIN] else per_example


def make_task_term() -> Term:
    """The task's own loss on the stream `train`: the mean over all that counts, each times its weight of data.weights.

    The sum of the weighted losses is divided by the number of examples: weights of mean 1 keep the scale.
    """

    def loss(context: Context) -> Result:
        return Result(task_losses(context).sum() / context.total[MAIN])

    return Term(loss)


def reverse(x: jax.Array, strength: jax.Array | float) -> jax.Array:
    """The identity, whose gradient is multiplied by `-strength` (Ganin & Lempitsky 2015, eq. 15-17)."""
    return _reverse(x, jnp.asarray(strength, jnp.float32))


@jax.custom_vjp
def _reverse(x: jax.Array, strength: jax.Array) -> jax.Array:
    return x


_reverse.defvjp(
    lambda x, strength: (x, strength),
    lambda strength, gradient: ((-strength * gradient).astype(gradient.dtype), jnp.zeros_like(strength)),
)


def only(context: Context, group: str) -> Any:
    """The parameters with a gradient for the leaves of one group alone: a player of a game between groups."""
    others = {path: x for path, x in trees.flatten(context.params).items() if context.groups[path] != group}
    return trees.merge(context.params, jax.lax.stop_gradient(others))
