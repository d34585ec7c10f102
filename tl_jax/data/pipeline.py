"""Batches indexed by step: `batches[step]` depends on the seed and the step alone; `iterate` makes them ahead."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from tl_jax.core.card import Card
from tl_jax.data import workers
from tl_jax.data.examples import Source
from tl_jax.data.image import ops
from tl_jax.data.image.augment import Preprocess, make_preprocess

log = logging.getLogger(__name__)
IN_MEMORY = 2**28  # bytes of input pixels that may be made once and kept, where they do not change from epoch to epoch
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class TrainBatches:
    """Training batches: `batches[step]` is {"image": uint8 [b, S, S, 3], "label": int32 [b]} for every step >= 0.

    b is batch_size / process_count and S the card's input size. The examples are numbered by a global counter c; the
    order is one shuffle per epoch of the source, epoch after epoch, so batches run on across epochs and a source
    smaller than a batch repeats. Step s holds c = s * batch_size ... (s + 1) * batch_size - 1, and process p the p-th
    run of b of them: the slices of all processes, concatenated, are the batch of a single one. Augmentation draws
    from a stream keyed by (seed, c).

    prepared: what is taken in place of the images [views, N, ...]: in epoch e the view e % views.
    """

    source: Source
    preprocess: Preprocess
    prepared: np.ndarray | None
    batch_size: int
    seed: int
    process_index: int
    process_count: int

    def __getitem__(self, step: int) -> Batch:
        return self.make(step)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of the images of one batch."""
        return _image_shape(self)

    def make(self, step: int, out: np.ndarray | None = None) -> Batch:
        """`batches[step]`; out: uint8 of `image_shape`, where the images are written."""
        if step < 0:
            raise IndexError(f"step must be at least 0, found {step}")
        local = self.batch_size // self.process_count
        first = step * self.batch_size + self.process_index * local
        counters = np.arange(first, first + local)
        indices = self.order(counters)
        if self.prepared is not None:
            images = self.prepared[counters // len(self.source) % len(self.prepared), indices]
        else:
            images = np.empty(self.image_shape, np.uint8) if out is None else out
            for row, (c, i) in enumerate(zip(counters.tolist(), indices.tolist(), strict=True)):
                ops.put(images[row], _pixels(self.source, self.preprocess, i, _draws(self.seed, c)))
        return {"image": images, "label": self.source.labels[indices]}

    def order(self, counters: np.ndarray) -> np.ndarray:
        """The indices of the examples that the counters stand for."""
        n = len(self.source)
        return np.array([_epoch_order(n, self.seed, c // n)[c % n] for c in counters.tolist()])

    def iterate(self, start: int, stop: int, num_workers: int = 0) -> Iterator[Batch]:
        """Yields the batches of steps start ... stop - 1, made ahead of time; see the function `iterate`."""
        return iterate(self, start, stop, num_workers)


def train_batches(
    source: Source,
    *,
    card: Card,
    augment: Sequence[tuple[str, Mapping]],
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Builds training batches; `augment` lists (op, parameters) pairs, see docs/data.md.

    Raises ValueError on unusable augmentations, a negative seed, or a batch size that the processes cannot share.
    """
    _check_sizes(batch_size, process_index, process_count)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2**63 - 1, found {seed}")
    preprocess = make_preprocess(card, augment)
    _check_large_enough(source, preprocess)
    prepared = _prepare(source, preprocess)
    prepared = None if prepared is None else prepared[None]
    return TrainBatches(source, preprocess, prepared, batch_size, seed, process_index, process_count)


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches:
    """Evaluation batches: every example once, in order, `len(batches)` batches on every process.

    `batches[i]` is {"image": uint8 [b, S, S, 3], "label": int32 [b], "mask": bool [b], "index": int32 [b]} with b the
    batch size over the processes. The last batch is padded: there the mask is False, the image and label 0, the index
    -1. Process p holds the p-th run of b rows of each global batch.
    """

    source: Source
    preprocess: Preprocess
    prepared: np.ndarray | None
    batch_size: int
    process_index: int
    process_count: int
    num_workers: int

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        return self.make(i)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of the images of one batch."""
        return _image_shape(self)

    def make(self, i: int, out: np.ndarray | None = None) -> Batch:
        """`batches[i]`; out: uint8 of `image_shape`, where the images are written."""
        if not 0 <= i < len(self):
            raise IndexError(f"batch must be 0 .. {len(self) - 1}, found {i}")
        local = self.batch_size // self.process_count
        first = i * self.batch_size + self.process_index * local
        real = np.arange(first, min(first + local, len(self.source)), dtype=np.int32)  # empty where all is padding
        blank = np.zeros(self.image_shape, np.uint8) if out is None else out
        if self.prepared is not None:
            blank = np.zeros((local, *self.prepared.shape[1:]), self.prepared.dtype)
        batch = {
            "image": blank,
            "label": np.zeros(local, np.int32),
            "mask": np.arange(local) < len(real),
            "index": np.full(local, -1, np.int32),
        }
        batch["index"][: len(real)], batch["label"][: len(real)] = real, self.source.labels[real]
        if self.prepared is not None:
            batch["image"][: len(real)] = self.prepared[real]
        else:
            for row, example in enumerate(real.tolist()):
                ops.put(batch["image"][row], _pixels(self.source, self.preprocess, example))
            batch["image"][len(real) :] = 0
        return batch

    def __iter__(self) -> Iterator[Batch]:
        worth = len(self.source) >= WORTH_WORKERS
        return iterate(self, 0, len(self), self.num_workers if worth else 0)


def eval_batches(
    source: Source,
    *,
    card: Card,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
) -> EvalBatches:
    """Builds evaluation batches with the card's preprocessing; raises ValueError if the processes cannot share one."""
    _check_sizes(batch_size, process_index, process_count)
    preprocess = make_preprocess(card)
    _check_large_enough(source, preprocess)
    own = preprocess.resize_size, preprocess.interpolation
    for packed in source.made_smaller:
        if packed != own:
            log.warning(
                "%s: images were resized to %d %s when packed, and are now to %d %s: their pixels differ a little from "
                "those of the files; packed with --size %d --interpolation %s they are equal",
                source.name, *packed, *own, *own,
            )  # fmt: skip
    prepared = _prepare(source, preprocess)
    return EvalBatches(source, preprocess, prepared, batch_size, process_index, process_count, num_workers)


def iterate(batches: TrainBatches | EvalBatches, start: int, stop: int, num_workers: int = 0) -> Iterator[Batch]:
    """Yields batches[start], ..., batches[stop - 1], made ahead of time by threads (0 workers) or worker processes.

    The batches are the same for every number of workers. The workers end when the iterator is exhausted, closed or
    collected, and when the main process dies. An error while making a batch is raised where that batch is due;
    RuntimeError if a worker was killed. Worker processes import the main module anew: guard its start with
    `if __name__ == "__main__"`.
    """
    in_processes = bool(num_workers) and batches.prepared is None  # prepared pixels are only indexed
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
SPARE = 3  # batches in shared memory beside those being made: with the consumer, on their way to the device
WORTH_WORKERS = 1024  # examples below which threads have made all batches before a worker process has started


@contextlib.contextmanager
def _in_threads(batches: TrainBatches | EvalBatches) -> Iterator[Callable]:
    """submit(step) -> due, a function that waits for the batch."""
    executor = ThreadPoolExecutor(THREADS, thread_name_prefix="batches")
    try:
        yield lambda step: executor.submit(batches.make, step).result
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _in_processes(batches: TrainBatches | EvalBatches, num_workers: int, ahead: int) -> Iterator[Callable]:
    """As `_in_threads`; the images come in shared memory."""
    slots = workers.Slots(ahead + SPARE, batches.image_shape)

    def due(future: Future) -> Batch:
        batch, slot = future.result()
        return batch if slot is None else {**batch, "image": slots.view(slot)}

    with workers.pool(num_workers, (batches, slots)) as pool:
        yield lambda step: functools.partial(due, pool.submit(workers.apply, _make, step, slots.take()))


def _make(state: tuple, step: int, slot: int | None) -> tuple[Batch, int | None]:
    batches, slots = state
    batch = batches.make(step, None if slot is None else slots.array(slot))
    if slot is not None:
        del batch["image"]
    return batch, slot


def _image_shape(batches: TrainBatches | EvalBatches) -> tuple[int, ...]:
    size = batches.preprocess.input_size
    return batches.batch_size // batches.process_count, size, size, 3


_local = threading.local()


def _draws(seed: int, counter: int) -> np.random.Generator:
    """The stream keyed by (seed, counter), which the next call in this thread ends.

    One generator is set anew for each example; making one each time takes as long as cutting a packed image.
    """
    if not hasattr(_local, "rng"):
        _local.rng = np.random.Generator(np.random.Philox(key=(0, 0)))
        _local.start = _local.rng.bit_generator.state
    _local.start["state"]["key"][:] = seed, counter
    _local.rng.bit_generator.state = _local.start
    return _local.rng


@functools.lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def _pixels(source: Source, preprocess: Preprocess, index: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """The input pixels of one example; an image that cannot be used is named in the error."""
    try:
        image = ops.as_rgb(source.images[index])
    except ValueError as error:
        raise ValueError(
            f"cannot read {source.ids[index]} of {source.name}: {error}; repair or remove it, or set on_error='skip'"
        ) from None
    try:
        return preprocess(image, rng)
    except ValueError as error:
        raise ValueError(f"{source.ids[index]} of {source.name}: {error}") from None


def _prepare(source: Source, preprocess: Preprocess) -> np.ndarray | None:
    """All input pixels at once [N, S, S, 3], where they are the same in every epoch and small; else None."""
    size = len(source) * preprocess.input_size**2 * 3
    if not isinstance(source.images, np.ndarray) or preprocess.ops or size > IN_MEMORY:
        return None
    if source.images.shape[1:3] == (preprocess.resize_size,) * 2 == (preprocess.input_size,) * 2:
        return source.images
    return np.stack([_pixels(source, preprocess, i) for i in range(len(source))])


def _check_large_enough(source: Source, preprocess: Preprocess) -> None:
    """Raises ValueError for images that were made smaller than the network is to see them."""
    if small := [size for size, _ in source.made_smaller if size < preprocess.resize_size]:
        raise ValueError(
            f"{source.name} was packed with --size {min(small)}, but the card (input {preprocess.input_size}) resizes "
            f"images to a short side of {preprocess.resize_size}: pack it again, with --size {preprocess.resize_size} "
            "or more, or take the images themselves"
        )


def _check_sizes(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            f"batch_size {batch_size} for process {process_index} of {process_count}: the batch size must be a "
            "positive multiple of the process count, and the process index below it"
        )
