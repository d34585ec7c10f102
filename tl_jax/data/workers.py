"""Worker processes that start clean, end with the main process, and hand batches over in shared memory."""

import collections
import contextlib
import ctypes
import functools
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

import numpy as np

# A forked copy of a process in which XLA's threads run may hang; spawned workers start clean.
CONTEXT = multiprocessing.get_context("spawn")
HELD = {signal.SIGINT, signal.SIGTERM}
GRACE = 10  # seconds a worker lives on after SIGTERM
MEMORY = "/dev/shm"  # where shared memory lies on Linux; containers often give it little room


@contextlib.contextmanager
def pool(num_workers: int, state: Any, num_threads: int) -> Iterator[Callable[..., Future]]:
    """`submit(function, ...)`, the Future of `function(state, ...)` in a worker process or, with 0 workers, a thread.

    Processes receive the state once, start with the first submits, which `ahead` makes, and end with the context or the
    main process. Raises RuntimeError if one was killed.
    """
    if num_workers:
        executor = ProcessPoolExecutor(num_workers, CONTEXT, _start, (state,))
        submit = functools.partial(executor.submit, _apply)
    else:
        executor = ThreadPoolExecutor(num_threads)

        def submit(function: Callable, *arguments: Any) -> Future:
            return executor.submit(function, state, *arguments)

    try:
        yield submit
    except BrokenProcessPool:
        cause = "it was killed, perhaps for memory, or the main module cannot be imported by it (see above)"
        fix = "Fewer num_workers take less memory; 0 uses threads"
        raise RuntimeError(f"a data worker process died; {cause}. {fix}") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def ahead(submit: Callable[[Any], Callable[[], Any]], items: Iterable, count: int) -> Iterator:
    """Yields `submit(item)()` of each item in order; up to `count` items are submitted before they are due."""
    waiting = iter(items)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # workers inherit it: a signal waits until they can take it
    try:
        pending = collections.deque(submit(item) for item in itertools.islice(waiting, count))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    while pending:
        result = pending.popleft()()
        pending.extend(submit(item) for item in itertools.islice(waiting, 1))
        yield result


def _apply(function: Callable, *arguments: Any) -> Any:
    return function(_state, *arguments)


class Slots:
    """Arrays in memory that worker processes share with the main one: `wanted`, {name: (shape, type)}, `count` times.

    A slot is free again when the arrays of its `view` have been collected: nothing is copied, and nothing that is in
    use is overwritten. The memory has no name, so the system reclaims it however the processes end.
    """

    def __init__(self, count: int, wanted: Mapping[str, tuple[tuple[int, ...], str]]):
        self._places, stride = {}, 0
        for name, (shape, dtype) in wanted.items():
            size = math.prod(shape) * np.dtype(dtype).itemsize
            self._places[name] = shape, dtype, stride, stride + size
            stride += -(-size // 64) * 64
        self._stride = -(-stride // 4096) * 4096
        if os.path.isdir(MEMORY):
            count = min(count, shutil.disk_usage(MEMORY).free // 2 // self._stride)
        self._memory = CONTEXT.RawArray(ctypes.c_uint8, count * self._stride)
        self._free = list(range(count))

    def take(self) -> int | None:
        """The number of a free slot; None where all are in use, and the arrays must be sent otherwise."""
        return self._free.pop() if self._free else None

    def arrays(self, slot: int) -> dict[str, np.ndarray]:
        block = np.frombuffer(self._memory, np.uint8, self._stride, slot * self._stride)
        places = self._places.items()
        return {name: block[a:b].view(dtype).reshape(shape) for name, (shape, dtype, a, b) in places}

    def view(self, slot: int) -> dict[str, np.ndarray]:
        """The arrays of a slot, which becomes free when the last reference to any of them goes."""
        arrays = self.arrays(slot)
        block = next(iter(arrays.values())).base  # the same of all arrays and of every view of them
        weakref.finalize(block, self._free.append, slot).atexit = False
        return arrays


def _start(state: Any) -> None:
    """Runs once in each worker process: keeps the state and settles when the worker ends."""
    global _state
    _state = state
    # glibc gives memory back to the system, and faults every page in again, for each image: a third of the time. The
    # largest block freed so far decides from what size on it does, so one that is never used stops it.
    np.empty(2**24, np.uint8)
    # Ctrl-C and a scheduler's SIGTERM reach the whole group: the main process must be able to finish its step and save.
    terminated = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    threading.Thread(target=_end_after, args=(terminated.wait, GRACE), daemon=True).start()
    # A main process that is killed outright cannot stop its workers; they watch for its end.
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=_end_after, args=(functools.partial(wait, [parent]), 0), daemon=True).start()


def _end_after(wait_for: Callable[[], object], grace: float) -> None:
    wait_for()
    time.sleep(grace)
    os._exit(1)
