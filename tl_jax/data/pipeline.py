"""Batches indexed by step: `batches[step]` depends on (seed, stream, step) alone; `iterate` makes them ahead."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from tl_jax.core.fields import DOMAIN, INDEX, LABEL, MASK
from tl_jax.core.messages import nearest
from tl_jax.data import order as orders
from tl_jax.data import workers
from tl_jax.data.examples import Source
from tl_jax.data.views import Render, View, draws_seed, make_views, write_example

log = logging.getLogger(__name__)
Batch = dict[str, np.ndarray]


class StreamFacts(NamedTuple):
    """What is known of a stream: its number of examples, which is an epoch, and of domains (1 where it has none)."""

    examples: int
    domains: int


class Rows(NamedTuple):
    """The examples of a batch: index (-1: padding), how often each came before, domain, counter in the domain."""

    index: np.ndarray
    epoch: np.ndarray
    domain: np.ndarray
    counter: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TrainBatches:
    """Training batches: `batches[step]` is {field: array} for every step >= 0, b = batch_size / process_count rows.

    Of each view, an image uint8 [b, S, S, 3] with the card's input size S, or rows float32 [b, F] of a table. "index"
    int32 [b]; "label", where the stream is labelled; "domain" int32 [b], where the source has domains.

    The examples are numbered by a counter c; the order is one shuffle per epoch of the source, epoch after epoch, so
    batches run on across epochs and a source smaller than a batch repeats. Step s has c = s * batch_size ...
    (s + 1) * batch_size - 1, and process p the p-th run of b of them: the slices of all processes, concatenated, are
    the batch of a single one. Augmentation draws from a stream keyed by (seed, c). With D domains each has its own
    seed, counter and epochs; a batch on every process is D equal parts, in the order of the domains.

    renders: of the views of images. prepared: by view, what is taken in place of rendering, [V, N, ...]: in its epoch e
    an example has row e % V. seed: of this stream.
    """

    source: Source
    renders: Mapping[str, Render]
    prepared: Mapping[str, np.ndarray]
    batch_size: int
    seed: int
    order: str = "shuffled"
    labelled: bool = True
    process_index: int = 0
    process_count: int = 1

    def __getitem__(self, step: int) -> Batch:
        return self.make(step)

    @property
    def facts(self) -> StreamFacts:
        return StreamFacts(len(self.source), len(self._orders))

    def steps_of(self, epochs: int) -> int:
        """The number of steps until every example has come at least `epochs` times."""
        return max(-(-order.counters_of(epochs) * len(self._orders) // self.batch_size) for order in self._orders)

    def make(self, step: int, out: Batch | None = None) -> Batch:
        """`batches[step]`; out: arrays of `shapes(batches)`, where the images are written."""
        return {**_render(self, step, out), **_known(self, step)}

    def rows(self, step: int) -> Rows:
        """The examples of a whole batch, process by process and within these domain by domain; each [batch_size]."""
        if step < 0:
            raise IndexError(f"step must be at least 0, found {step}")
        domains = len(self._orders)
        size = self.batch_size // domains
        counters = np.arange(step * size, (step + 1) * size)
        indices, epochs = zip(*(order(counters) for order in self._orders), strict=True)
        of_domain = [np.full(size, domain) for domain in range(domains)]
        share = (domains, self.process_count, -1)
        columns = (indices, epochs, of_domain, [counters] * domains)
        return Rows(*(np.stack(column).reshape(share).swapaxes(0, 1).reshape(-1) for column in columns))

    def iterate(self, start: int, stop: int, num_workers: int = 0) -> Iterator[Batch]:
        """Yields the batches of steps start ... stop - 1, made ahead of time; see the function `iterate`."""
        return iterate(self, start, stop, num_workers)

    @functools.cached_property
    def _orders(self) -> tuple[orders.Order, ...]:
        """Of each domain; each keeps its own permutations, so that streams do not evict those of others."""
        return orders.make_orders(self.source, self.order, self.seed)


def train_batches(
    source: Source,
    views: Mapping[str, View],
    batch_size: int,
    seed: int,
    *,
    name: str = "train",
    order: str = "shuffled",
    labelled: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Builds the training batches of one stream; the seed of a stream that is not "train" comes from (seed, name).

    order: "shuffled", or "class_balanced": every round of as many counters as there are classes visits each class once,
    and within a class the examples are shuffled epoch by epoch. Raises ValueError for everything that does not fit.
    """
    domains = 1 if source.domains is None else len(source.domain_names)
    _check_sizes(batch_size, process_index, process_count, domains)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, found {seed}")
    if order not in orders.ORDERS:
        raise ValueError(
            f"there is no order {order!r}{nearest(order, orders.ORDERS)}; known: {', '.join(orders.ORDERS)}"
        )
    if order == "class_balanced" and not (labelled and source.label_kind == "classes"):
        found = source.label_kind if labelled else "an unlabelled stream"
        raise ValueError(f"{source.name}: the order 'class_balanced' needs the classes of examples, found {found}")
    renders, prepared = make_views(source, views, augmented=True)
    seed = seed if name == "train" else orders.derive(seed, name)
    stream = (source, renders, prepared, batch_size, seed, order, labelled, process_index, process_count)
    batches = TrainBatches(*stream)
    batches.rows(0)  # raises where a class or a domain is empty
    return batches


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches:
    """Evaluation batches: every example once, in order, `len(batches)` batches on every process.

    `batches[i]` has the fields of `TrainBatches` and "mask" bool [b]. The last batch is padded: there the mask is
    False, the index -1, everything else 0. Process p has the p-th run of b rows of each global batch.
    """

    source: Source
    renders: Mapping[str, Render]
    prepared: Mapping[str, np.ndarray]
    batch_size: int
    labelled: bool
    process_index: int
    process_count: int
    num_workers: int

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        return self.make(i)

    def make(self, i: int, out: Batch | None = None) -> Batch:
        """`batches[i]`; out: arrays of `shapes(batches)`, where the images are written."""
        return {**_render(self, i, out), **_known(self, i)}

    def rows(self, i: int) -> Rows:
        """The examples of a whole batch, padded; each [batch_size]."""
        if not 0 <= i < len(self):
            raise IndexError(f"batch must be 0 .. {len(self) - 1}, found {i}")
        index, domains = np.arange(i * self.batch_size, (i + 1) * self.batch_size), self.source.domains
        index[index >= len(self.source)] = -1
        zeros = np.zeros_like(index)
        return Rows(index, zeros, zeros if domains is None else domains[index], zeros)

    def __iter__(self) -> Iterator[Batch]:
        worth = len(self.source) >= WORTH_WORKERS
        return iterate(self, 0, len(self), self.num_workers if worth else 0)


def eval_batches(
    source: Source,
    views: Mapping[str, View],
    batch_size: int,
    *,
    labelled: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
) -> EvalBatches:
    """Builds evaluation batches, each view with its card's preprocessing alone; raises as `train_batches`."""
    _check_sizes(batch_size, process_index, process_count)
    renders, prepared = make_views(source, views, augmented=False)
    for preprocess in dict.fromkeys((r.preprocess.resize_size, r.preprocess.interpolation) for r in renders.values()):
        for packed in (packed for packed in source.made_smaller if packed != preprocess):
            log.warning(
                "%s: images were resized to %d %s when packed, and are now to %d %s: their pixels differ a little "
                "from those of the files; packed with --size %d --interpolation %s they are equal",
                source.name, *packed, *preprocess, *preprocess,
            )  # fmt: skip
    return EvalBatches(source, renders, prepared, batch_size, labelled, process_index, process_count, num_workers)


Batches = TrainBatches | EvalBatches


def _rows_here(batches: Batches, step: int) -> Rows:
    """The examples of this process."""
    size = batches.batch_size // batches.process_count
    here = slice(batches.process_index * size, (batches.process_index + 1) * size)
    return Rows(*(column[here] for column in batches.rows(step)))


def _render(batches: Batches, step: int, out: Batch | None = None) -> Batch:
    """The views of `batches[step]` that are not prepared."""
    todo = unprepared(batches)
    if not todo:
        return {}
    out = {field: np.empty(shape, dtype) for field, (shape, dtype) in shapes(batches).items()} if out is None else out
    seeds = orders.seeds_of(batches.source, batches.seed) if isinstance(batches, TrainBatches) else ()
    seeds = [{field: draws_seed(seed, render.draws) for field, render in todo.items()} for seed in seeds]
    rows = _rows_here(batches, step)
    columns = rows.index.tolist(), rows.domain.tolist(), rows.counter.tolist()
    for row, (index, domain, counter) in enumerate(zip(*columns, strict=True)):
        if index >= 0:
            write_example(batches.source, todo, out, row, index, seeds[domain] if seeds else None, counter)
    for images in out.values():
        images[rows.index < 0] = 0
    return out


def _known(batches: Batches, step: int) -> Batch:
    """Everything of `batches[step]` that needs no rendering."""
    rows, source = _rows_here(batches, step), batches.source
    batch = {field: values[rows.epoch % len(values), rows.index] for field, values in batches.prepared.items()}
    if batches.labelled:
        batch[LABEL] = source.labels[rows.index]
    if source.domains is not None:
        batch[DOMAIN] = rows.domain.astype(np.int32)
    for values in batch.values():
        values[rows.index < 0] = 0
    batch[INDEX] = rows.index.astype(np.int32)
    return batch | {MASK: rows.index >= 0} if isinstance(batches, EvalBatches) else batch


def unprepared(batches: Batches) -> dict[str, Render]:
    """The views that are rendered."""
    return {field: render for field, render in batches.renders.items() if field not in batches.prepared}


def shapes(batches: Batches) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, type) of the arrays of one batch that are rendered."""
    local = batches.batch_size // batches.process_count
    sizes = {field: render.preprocess.input_size for field, render in unprepared(batches).items()}
    return {field: ((local, size, size, 3), "uint8") for field, size in sizes.items()}


def iterate(batches: Batches, start: int, stop: int, num_workers: int = 0) -> Iterator[Batch]:
    """Yields batches[start], ..., batches[stop - 1], made ahead of time by threads (0 workers) or worker processes.

    The batches are the same for every number of workers, which end with the iterator and the main process. An error
    while making a batch is raised where that batch is due; RuntimeError if a worker was killed. Worker processes import
    the main module anew: guard its start with `if __name__ == "__main__"`.
    """
    in_processes = bool(num_workers) and bool(unprepared(batches))  # what is prepared is only indexed
    steps = iter(range(start, stop))
    here = list(itertools.islice(steps, int(in_processes)))  # made here, while the workers start
    ahead = 2 * num_workers if in_processes else THREADS + 1
    with _in_processes(batches, num_workers, ahead) if in_processes else _in_threads(batches) as submit:
        with workers.signals_held():
            pending = collections.deque(submit(step) for step in itertools.islice(steps, ahead))
        for step in here:
            yield batches[step]
        while pending:
            batch = pending.popleft()()
            pending.extend(submit(step) for step in itertools.islice(steps, 1))
            yield batch


# Pillow decodes outside the interpreter's lock, so a few threads help; more only contend for it.
THREADS = min(4, os.cpu_count() or 1)
SPARE = 3  # batches in shared memory besides those being made: with the consumer, on their way to the device
WORTH_WORKERS = 1024  # examples below which threads have made all batches before a worker process has started


@contextlib.contextmanager
def _in_threads(batches: Batches) -> Iterator[Callable]:
    """submit(step) -> due, a function that waits for the batch."""
    executor = ThreadPoolExecutor(THREADS, thread_name_prefix="batches")
    try:
        yield lambda step: executor.submit(batches.make, step).result
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _in_processes(batches: Batches, num_workers: int, ahead: int) -> Iterator[Callable]:
    """As `_in_threads`; the images come in shared memory, and what needs no rendering is added here."""
    slots = workers.Slots(ahead + SPARE, shapes(batches))
    lean = dataclasses.replace(batches, renders=unprepared(batches), prepared={})

    def due(step: int, future: Future) -> Batch:
        images, slot = future.result()
        return {**(images if slot is None else slots.view(slot)), **_known(batches, step)}

    with workers.pool(num_workers, (lean, slots)) as pool:
        yield lambda step: functools.partial(due, step, pool.submit(workers.apply, _make, step, slots.take()))


def _make(state: tuple, step: int, slot: int | None) -> tuple[Batch | None, int | None]:
    batches, slots = state
    if slot is None:
        return _render(batches, step), None
    _render(batches, step, slots.arrays(slot))
    return None, slot


def _check_sizes(batch_size: int, process_index: int, process_count: int, domains: int = 1) -> None:
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size {batch_size} for process {process_index} of {process_count}: the batch size must be a "
            "positive multiple of the process count, and the process index below it"
        )
    if batch_size % (process_count * domains):
        raise ValueError(
            f"batch_size {batch_size} for {domains} domains and {process_count} processes: every process takes equal "
            f"parts of all domains, expected a multiple of {process_count * domains}"
        )
