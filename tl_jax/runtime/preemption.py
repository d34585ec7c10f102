"""Stopping on request: SIGTERM and Ctrl-C let a run save and end; a second Ctrl-C ends it at once."""

import signal
from collections.abc import Callable

Stop = Callable[[int], bool]  # whether to stop after this many steps
EXIT_CODE = 75  # "try again": everything is saved, the same command goes on


class Preempted(Exception):
    """A stop was asked for; what was done is saved, and the same command goes on from there."""


def check(stop_requested: Stop, doing: str) -> None:
    """Raises Preempted where a stop was asked for outside of training steps."""
    if stop_requested(0):
        raise Preempted(f"stopped {doing}")


def watch() -> Callable[..., bool]:
    """Catches both signals from now on; the function that it returns says whether one has come. Main thread only."""
    came = []

    def request(number, _):
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request)
    return lambda step=0: bool(came)
