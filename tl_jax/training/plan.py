"""What a step of a phase computes, as data."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from tl_jax.core.card import Card
from tl_jax.methods.term import MAIN, Method, StreamFacts
from tl_jax.tasks import Task


class Prefix(NamedTuple):
    """The frozen prefix of a network: all up to and including its output `cut`.

    model: computes it, perhaps in another type than the rest. cached: batches hold its outputs in place of inputs.
    """

    model: Any
    cut: str
    cached: bool = False


class Reader(NamedTuple):
    """A network as a step runs it.

    module, card: as in `Network`. field: what of a stream it reads, see fields.take. columns: {output: the field that
    holds it} of a network whose outputs are cached.
    """

    module: Any
    card: Card | None
    field: str | tuple[str, ...]
    columns: Mapping[str, str] = {}


class Turn(NamedTuple):
    """A part of a step that trains some groups on some terms: {name: factor on the term's weight}."""

    groups: tuple[str, ...]
    terms: Mapping[str, float]


class Plan(NamedTuple):
    """What a step of one phase computes.

    readers: every network, the model under MODEL. labels: the group of each parameter path. frozen_norms: the paths of
    BatchNorm layers that keep their statistics. prefix: of it nothing is differentiated or kept for a backward pass.
    joint: streams pass the model as one batch, else one by one. devices: over how many a batch is divided. start,
    length: of the phase, in steps. accumulate: the batch is cut into this many parts, one after the other. ema: the
    decay of the moving average (0: off). axis_name: under pmap, what gradients, statistics and sums are combined over.
    whole: what makes divided variables whole where a network is applied, `Parallel.whole`. facts: of the streams.
    turns: updates that follow one another on the same batch; (): one update of all groups on all terms.
    """

    readers: Mapping[str, Reader]
    method: Method
    task: Task
    labels: Mapping[str, str]
    frozen_norms: Collection[str]
    prefix: Prefix | None = None
    joint: bool = True
    devices: int = 1
    start: int = 0
    length: int = 1
    accumulate: int = 1
    ema: float = 0.0
    axis_name: str | None = None
    whole: Callable = lambda variables: variables
    sums: tuple[str, ...] = ()
    facts: Mapping[str, StreamFacts] = {}
    turns: tuple[Turn, ...] = ()

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that the training pass of the model runs over, `train` first."""
        on = dict.fromkeys(stream for _, term in self.method.terms.values() for stream in term.on)
        return tuple(sorted(on, key=lambda stream: stream != MAIN))

    @property
    def fed(self) -> tuple[str, ...]:
        """The streams whose batches a step takes."""
        further = (stream for _, term in self.method.terms.values() for stream in term.feeds)
        return tuple(dict.fromkeys([*self.streams, *further]))
