"""Stopping on request: SIGTERM and Ctrl-C let a run save and end; a second Ctrl-C ends it at once.

The main thread answers where it asks, after every step. Where it cannot ask for a while, as XLA compiles, a batch is
waited for or metrics are computed, a thread answers for it after GRACE seconds: it saves what `saved_by` says and ends
the process. Files are replaced as a whole, so nothing is half written.
"""

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from tl_jax.core import console

Stop = Callable[[int], bool]  # whether to stop after this many steps
EXIT_CODE = 75  # "try again": everything is saved, the same command goes on
GRACE = 1.0  # seconds that the main thread has to answer by itself
ALONE = [True]  # whether this is no process of several, which have to stop together
CLEANUPS: list[Callable[[], None]] = [console.close_bars]  # what is undone where the thread ends the process


class Preempted(Exception):
    """A stop was asked for; what was done is saved, and the same command goes on from there."""


def check(stop_requested: Stop, doing: str) -> None:
    """Raises Preempted where a stop was asked for outside of training steps."""
    if stop_requested(0):
        raise Preempted(f"stopped {doing}")


def nothing() -> None:
    """Saves nothing: what an end would lose is computed again."""


_lock = threading.RLock()
_save: Callable[[], object] | None = nothing


@contextlib.contextmanager
def saved_by(save: Callable[[], object] | None) -> Iterator[None]:
    """Says how the thread saves, within the block, what would be lost; None: the main thread alone can."""
    global _save
    with _lock:
        before, _save = _save, save
    try:
        yield
    finally:
        with _lock:
            _save = before


def watch() -> Callable[..., bool]:
    """Catches both signals from now on; the function that it returns says whether one has come. Main thread only."""
    came = []

    def request(number, _):
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request)
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)  # all is done: python would let it kill the process
    reader, writer = os.pipe()  # written to when a signal comes, which the main thread may hear of much later
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_answer, args=(reader,), daemon=True).start()
    return lambda step=0: bool(came)


def _answer(reader: int) -> None:
    while os.read(reader, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
        pass
    _tell("a stop was asked for: saving what is done")
    wait = GRACE
    while True:
        time.sleep(wait)
        wait = 0.05
        with _lock:  # until the process has ended: the main thread changes nothing meanwhile
            if not ALONE[0] or _save is None:
                continue
            try:
                _save()
            except Exception as error:  # the main thread meets it as well
                _tell(f"not saved yet: {error}")
                wait = GRACE
                continue
            for undo in CLEANUPS:
                undo()
            _tell("stopped; everything is saved, the same command goes on from there")
            os._exit(EXIT_CODE)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, f"{text}\n".encode())
