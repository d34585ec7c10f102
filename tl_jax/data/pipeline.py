"""Batches indexed by step: `batches[step]` depends on (seed, stream, step) alone; `iterate` makes them ahead."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core import machine
from tl_jax.core.fields import DOMAIN, INDEX, LABEL, MASK, PRESENT, WEIGHT
from tl_jax.core.messages import nearest
from tl_jax.data import order as orders
from tl_jax.data import workers
from tl_jax.data.examples import Source
from tl_jax.data.several import Several
from tl_jax.data.text.tokens import TokenFeatures, Tokens
from tl_jax.data.views import Render, View, make_views, write_example

log = logging.getLogger(__name__)
# Pillow decodes outside the interpreter's lock, so a few threads help; more only contend for it.
THREADS = min(4, os.cpu_count() or 1)
SPARE = 3  # batches in shared memory besides those being made: with the consumer, on their way to the device
WORTH_WORKERS = 1024  # examples below which threads have made all batches before a worker process has started
ROW = 64  # bytes of a row of a batch besides its views: index, label, and how they were found
Batch = dict[str, np.ndarray]


class Rows(NamedTuple):
    """The examples of a batch: index (-1: padding), how often each came before, domain, counter that it draws by."""

    index: np.ndarray
    epoch: np.ndarray
    domain: np.ndarray
    counter: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches of one stream: `batches[step]` is {field: array} of this process, b = batch_size / process_count rows.

    Of each view, images [b, H, W, C] of the card's input size and form, uint8 or float32, rows float32 [b, F] of a
    table, or tokens int32 [b, L, 2], whose L is that of the whole batch on every process. "index" int32 [b]; "label",
    where the stream is labelled; "domain" int32 [b] and "weight" float32 [b], where the source has domains or weights;
    "image:present", ... bool [b] of each of several inputs, where a missing one is zeros, or no token.

    renders: of the views of images. prepared: by view, what is taken in place of rendering, [V, N, ...]: in its epoch e
    an example has row e % V; or Tokens, or TokenFeatures. seed: of this stream; None where nothing is random.
    """

    source: Source
    renders: Mapping[str, Render]
    prepared: Mapping[str, np.ndarray | Tokens | TokenFeatures]
    batch_size: int
    _: dataclasses.KW_ONLY
    seed: int | None = None
    labelled: bool = True
    process_index: int = 0
    process_count: int = 1

    def rows(self, step: int) -> Rows:
        """The examples of a whole batch, process by process and within these domain by domain; each [batch_size]."""
        raise NotImplementedError

    def __getitem__(self, step: int) -> Batch:
        return {**self.render(step), **self.index(step)}

    @property
    def unprepared(self) -> dict[str, Render]:
        """The views that are rendered."""
        return {field: render for field, render in self.renders.items() if field not in self.prepared}

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """(shape, type) of the arrays of one batch that are rendered."""
        local = self.batch_size // self.process_count
        made = {field: render.preprocess for field, render in self.unprepared.items()}
        return {field: ((local, *preprocess.shape), preprocess.form.dtype) for field, preprocess in made.items()}

    def iterate(self, start: int, stop: int, num_workers: int = 0) -> Iterator[Batch]:
        """Yields batches[start], ..., batches[stop - 1], made ahead of time by threads (0 workers) or worker processes.

        Workers change no bit, and end with the iterator or the main process. An error while making a batch is raised
        where that batch is due; RuntimeError if a worker was killed. Worker processes import the main module anew:
        guard its start with `if __name__ == "__main__"`.
        """
        num_workers = num_workers if self.unprepared else 0  # what is prepared is only indexed
        count = 2 * num_workers + 1 if num_workers else THREADS + 1
        with _submitting(self, start, num_workers, count) as submit:
            yield from workers.ahead(submit, range(start, stop), count)

    def render(self, step: int, out: Batch | None = None) -> Batch:
        """The views of `batches[step]` that are not prepared; out: where they are written."""
        if not (todo := self.unprepared):
            return {}
        if out is None:
            out = {field: np.empty(shape, dtype) for field, (shape, dtype) in self.shapes.items()}
        seeds = [
            {field: orders.derive(seed, f"draws {r.draws}") if r.draws else seed for field, r in todo.items()}
            for seed in (() if self.seed is None else orders.seeds_of(self.source, self.seed))
        ]
        rows = self._local(self.rows(step))
        columns = rows.index.tolist(), rows.domain.tolist(), rows.counter.tolist()
        for row, (index, domain, counter) in enumerate(zip(*columns, strict=True)):
            if index >= 0:
                write_example(self.source, todo, out, row, index, seeds[domain] if seeds else None, counter)
        for images in out.values():
            images[rows.index < 0] = 0
        return out

    def index(self, step: int) -> Batch:
        """Everything of `batches[step]` that needs no rendering."""
        every, source = self.rows(step), self.source
        rows, batch = self._local(every), {}
        for field, values in self.prepared.items():
            if isinstance(values, Tokens):
                batch[field] = values.batch(rows.index, values.length_of(every.index))
                if self.labelled and values.labelled:
                    batch[field], batch[LABEL] = values.labelled(batch[field], self._draws(rows))
            elif isinstance(values, TokenFeatures):
                batch[field] = values.batch(rows.index, values.length_of(every.index), rows.epoch)
            else:
                batch[field] = values[rows.epoch % len(values), rows.index]
        if self.labelled and LABEL not in batch:
            batch[LABEL] = source.labels[rows.index]
        if isinstance(source.inputs, Several):
            batch |= {f"{kind}{PRESENT}": there[rows.index] for kind, there in source.inputs.present.items()}
        if source.domains is not None:
            batch[DOMAIN] = rows.domain.astype(np.int32)
        if source.weights is not None:
            batch[WEIGHT] = source.weights[rows.index]
        for values in batch.values():
            values[rows.index < 0] = 0
        return batch | {INDEX: rows.index.astype(np.int32)}

    def _draws(self, rows: Rows) -> list[tuple[int, int]]:
        """The key of the random numbers of each row: its domain's seed and counter; without a seed its index."""
        if self.seed is None:
            return [(0, max(index, 0)) for index in rows.index.tolist()]
        seeds = [orders.derive(seed, "tokens") for seed in orders.seeds_of(self.source, self.seed)]
        return [(seeds[d], counter) for d, counter in zip(rows.domain.tolist(), rows.counter.tolist(), strict=True)]

    def _local(self, rows: Rows) -> Rows:
        """Those of this process."""
        size = self.batch_size // self.process_count
        here = slice(self.process_index * size, (self.process_index + 1) * size)
        return Rows(*(column[here] for column in rows))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TrainBatches(Batches):
    """Training batches, for every step >= 0.

    The examples are numbered by a counter c; the order is one shuffle per epoch of the source, epoch after epoch (or
    another, see `train_batches`), so batches run on across epochs and a source smaller than a batch repeats. Step s has
    c = s * batch_size ... (s + 1) * batch_size - 1, and process p the p-th run of b of them: the slices of all
    processes, concatenated, are the batch of a single one. Augmentation draws from a stream keyed by (seed, c). With D
    domains each has its own seed, counter and epochs; a batch on every process is D equal slices, in the order of the
    domains. views: where above 0, an example looks in epoch e as it did in epoch e % views, of which a cache has what
    another network makes of it.
    """

    order: str = "shuffled"
    views: int = 0

    def steps_of(self, epochs: int) -> int:
        """The number of steps until every example has come at least `epochs` times."""
        counters = max(epochs * len(order.groups) * max(map(len, order.groups)) for order in self._orders)
        return -(-counters * len(self._orders) // self.batch_size)

    def rows(self, step: int) -> Rows:
        if step < 0:
            raise IndexError(f"step must be at least 0, found {step}")
        domains = len(self._orders)
        size = self.batch_size // domains
        counters = np.arange(step * size, (step + 1) * size)
        indices, epochs = zip(*(order(counters) for order in self._orders), strict=True)
        of_domain = [np.full(size, domain) for domain in range(domains)]
        share, drawn = (domains, self.process_count, -1), [counters] * domains
        if self.views and max(map(np.max, epochs)) >= self.views:
            found = zip(self._counters, epochs, indices, strict=True)
            drawn = [table[epoch % self.views, index] for table, epoch, index in found]
        columns = (indices, epochs, of_domain, drawn)
        return Rows(*(np.stack(column).reshape(share).swapaxes(0, 1).reshape(-1) for column in columns))

    @functools.cached_property
    def _counters(self) -> list[np.ndarray]:
        """Of each domain the counter at which an example came in an epoch, [views, N]."""
        tables = []
        for order in self._orders:
            longest = len(order.groups) * max(map(len, order.groups))
            counters, table = np.arange(self.views * longest), np.zeros((self.views, len(self.source)), np.int64)
            index, epoch = order(counters)
            kept = epoch < self.views
            table[epoch[kept], index[kept]] = counters[kept]
            tables.append(table)
        return tables

    @functools.cached_property
    def _orders(self) -> tuple[orders.Order, ...]:
        """Of each domain; each keeps its own permutations, so that streams do not evict those of others."""
        return orders.make_orders(self.source, self.order, self.seed, self.batch_size // self.source.num_domains)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EvalBatches(Batches):
    """Evaluation batches: every example once, in order, `len(batches)` batches on every process.

    Field "mask", bool [b], is False where the last batch is padded; there the index is -1, everything else 0. Process p
    has the p-th run of b rows of each global batch.
    """

    num_workers: int = 0

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.iterate(0, len(self), self.num_workers if len(self.source) >= WORTH_WORKERS else 0)

    def rows(self, step: int) -> Rows:
        if not 0 <= step < len(self):
            raise IndexError(f"batch must be 0 .. {len(self) - 1}, found {step}")
        index, domains = np.arange(step * self.batch_size, (step + 1) * self.batch_size), self.source.domains
        index[index >= len(self.source)] = -1
        zeros = np.zeros_like(index)
        return Rows(index, zeros, zeros if domains is None else domains[index], zeros)

    def index(self, step: int) -> Batch:
        batch = super().index(step)
        return batch | {MASK: batch[INDEX] >= 0}


def train_batches(
    source: Source,
    views: Mapping[str, View],
    batch_size: int,
    seed: int,
    *,
    name: str = "train",
    order: str = "shuffled",
    **options: Any,
) -> TrainBatches:
    """Builds the training batches of one stream; the seed of a stream that is not "train" comes from (seed, name).

    order: "shuffled"; "sequential", the source's own; "by_length", batches of texts of similar length; or
    "class_balanced": every round of as many counters as there are
    classes visits each class once, and within a class the examples are shuffled epoch by epoch. options: labelled,
    process_index, process_count, see `Batches`. Raises ValueError for everything that does not fit.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, found {seed}")
    if order not in (known := orders.ORDERS):
        raise ValueError(f"there is no order {order!r}{nearest(order, known)}; known: {', '.join(known)}")
    seed = seed if name == "train" else orders.derive(seed, name)
    made = make_views(source, views, augmented=True)
    batches = TrainBatches(source, *made, batch_size, seed=seed, order=order, **options)
    _check_sizes(batches, source.num_domains)
    if order == "class_balanced" and not (batches.labelled and source.label_kind == "classes"):
        found = source.label_kind if batches.labelled else "an unlabelled stream"
        raise ValueError(f"{source.name}: the order 'class_balanced' needs the classes of examples, found {found}")
    batches.rows(0)  # raises where a class or a domain is empty
    return batches


def eval_batches(source: Source, views: Mapping[str, View], batch_size: int, **options: Any) -> EvalBatches:
    """Builds evaluation batches, each view with its card's preprocessing alone; raises as `train_batches`.

    options: labelled (what is not sealed), process_index, process_count and num_workers, see `EvalBatches`.
    """
    made = make_views(source, views, augmented=False)
    batches = EvalBatches(source, *made, batch_size, **{"labelled": not source.sealed, **options})
    _check_sizes(batches)
    made = dict.fromkeys(render.preprocess for render in batches.renders.values())
    for preprocess, packed in itertools.product(made, source.made_smaller):
        best = preprocess.short_side, preprocess.interpolation
        equal = preprocess.crop_mode == "center" and len(set(preprocess.resize_size)) == 1
        if not equal or packed != best:
            fix = "; packed with --size {} --interpolation {} they are equal".format(*best) if equal else ""
            text = "%s: images were resized to %d %s when packed, and are resized again for %s: their pixels differ a "
            log.warning(text + "little from those of the files%s", source.name, *packed, preprocess.input_size, fix)
    return batches


@contextlib.contextmanager
def _submitting(batches: Batches, start: int, num_workers: int, count: int) -> Iterator[Callable]:
    """submit(step) -> a function that waits for the batch.

    From processes the images come in shared memory, the rest is added here, and the batch `start` is made here.
    """
    if not num_workers:
        with workers.pool(0, batches, THREADS) as submit:
            yield lambda step: submit(operator.getitem, step).result
        return
    slots = workers.Slots(count + SPARE, batches.shapes)
    lean = dataclasses.replace(batches, renders=batches.unprepared, prepared={})

    def wait(step: int, slot: int | None, images: Future) -> Batch:
        return {**(images.result() or slots.view(slot)), **batches.index(step)}

    def begin(step: int) -> Callable[[], Batch]:
        if step == start:
            return functools.partial(operator.getitem, batches, step)  # while the workers start
        slot = slots.take()
        return functools.partial(wait, step, slot, submit(_render, step, slot))

    with workers.pool(num_workers, (lean, slots), 0) as submit:
        yield begin


def _render(state: tuple[Batches, workers.Slots], step: int, slot: int | None) -> Batch | None:
    """Runs in a worker: the images, or None where they are in the slot."""
    batches, slots = state
    images = batches.render(step, None if slot is None else slots.arrays(slot))
    return images if slot is None else None


def _check_sizes(batches: Batches, domains: int = 1) -> None:
    size, index, count = batches.batch_size, batches.process_index, batches.process_count
    if size < 1 or size % (count * domains) or not 0 <= index < count:
        expected = f"a positive multiple of {count * domains}, an equal slice of each domain in each process"
        raise ValueError(f"batch_size {size} for {domains} domains in process {index} of {count}: expected {expected}")
    pixels = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in batches.shapes.values())
    rows = (
        size
        // count
        * sum(
            8 * values.lengths[-1] if isinstance(values, Tokens) else values[0, :1].nbytes
            for values in batches.prepared.values()
        )
    )
    needed = (THREADS + 1) * (pixels + rows + ROW * size)
    if needed > (there := machine.memory()):
        found = f"the {THREADS + 1} batches made ahead take {needed / 1e9:,.0f} GB of {there / 1e9:,.0f} GB of memory"
        raise ValueError(f"batch_size {size} of {batches.source.name}: {found}; choose a smaller one")
