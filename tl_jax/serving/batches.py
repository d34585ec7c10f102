"""Requests that arrive together are answered together: one model, one thread, batches of a few fixed sizes."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Outputs = dict[str, np.ndarray]
WAIT = 0.005  # seconds that a batch waits for examples that are being read


class Busy(Exception):
    """More examples are waiting than the queue may hold."""


def padded(inputs: Sequence[np.ndarray], size: int) -> np.ndarray:
    """A batch of examples of one shape, zeros behind them."""
    batch = np.zeros((size, *inputs[0].shape), inputs[0].dtype)
    batch[: len(inputs)] = inputs
    return batch


class Batcher:
    """Answers single examples by batches of `sizes`, the next larger one with zeros in the rows that are left.

    A batch begins as soon as the model is free. It waits for others, WAIT at most, only while they are being read: an
    example that comes alone never waits. `space` examples may be on their way at a time.
    """

    def __init__(
        self, answer: Callable[[np.ndarray], Mapping[str, np.ndarray]], sizes: tuple[int, ...], space: int,
        stack: Callable[[Sequence[np.ndarray], int], np.ndarray] = padded,
    ):  # fmt: skip
        """stack: makes a batch of a size of examples."""
        self.stack = stack
        self.answer, self.sizes, self.space = answer, sizes, space
        self.pending = 0  # examples of requests that were admitted and are not yet answered
        self.coming = 0  # of these, those that are being read
        self.seen: Callable[[Outputs], Awaitable[None]] | None = None  # told of every batch; it may make others wait
        self._queue: asyncio.Queue = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1)

    @contextlib.contextmanager
    def admitted(self, count: int) -> Iterator[None]:
        """Takes room for `count` examples as long as the block runs; Busy where there is none."""
        if self.pending + count > self.space:
            raise Busy
        self.pending += count
        try:
            yield
        finally:
            self.pending -= count

    async def __call__(self, reading: Awaitable[np.ndarray]) -> Outputs:
        """The outputs of one example, which was admitted, when it is read."""
        self.coming += 1
        try:
            x = await reading
        finally:
            self.coming -= 1
        answered = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((x, answered))
        return await answered

    async def run(self) -> None:
        """Works for ever, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch, until = [await self._next()], loop.time() + WAIT
            while len(batch) < self.sizes[-1] and (self.coming or not self._queue.empty()):
                try:
                    async with asyncio.timeout_at(until):
                        batch.append(await self._next())
                except TimeoutError:
                    break
            inputs, answered = zip(*batch, strict=True)
            try:
                outputs = await loop.run_in_executor(self._thread, self._together, inputs)
            except Exception as error:  # whoever waits has to hear of it
                for future in answered:
                    if not future.done():
                        future.set_exception(error)
                continue
            for i, future in enumerate(answered):
                if not future.done():
                    future.set_result({name: x[i] for name, x in outputs.items()})
            if self.seen:
                await self.seen(outputs)

    async def _next(self) -> tuple[np.ndarray, asyncio.Future]:
        """An example that somebody still waits for."""
        while True:
            x, answered = await self._queue.get()
            if not answered.done():
                return x, answered

    def _together(self, inputs: tuple[np.ndarray, ...]) -> Outputs:
        size = next(size for size in self.sizes if size >= len(inputs))
        return {name: x[: len(inputs)] for name, x in self.answer(self.stack(inputs, size)).items()}
