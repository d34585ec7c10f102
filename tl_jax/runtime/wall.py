"""Where the wall time of a thread goes: every second counts for one kind of work, so that the kinds add up to all."""

import contextlib
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Mapping

import jax

# What XLA reports of each program as it becomes ready, read from the cache of compiled programs too.
COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class _Clock(threading.local):
    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.kinds, self.last, self.runs = ["other"], time.perf_counter(), {}

    def count(self, kind: str = "", seconds: float = 0.0) -> None:
        """Counts the time since the last call for the kind of work under way, but `seconds` of it for another."""
        now, own = time.perf_counter(), self.kinds[-1]
        for name, value in ((own, now - self.last - seconds), (kind or own, seconds)):
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self.last = now


_clock = _Clock()


def _compiled(event: str, seconds: float, **_) -> None:
    if event in COMPILING:
        _clock.count("compiling", seconds)


jax.monitoring.register_event_duration_secs_listener(_compiled)


@contextlib.contextmanager
def timed(kind: str) -> Iterator[None]:
    """The time within the block is of this kind, less that of blocks within it, and less compiling."""
    _clock.count()
    _clock.kinds.append(kind)
    try:
        yield
    finally:
        _clock.count()
        _clock.kinds.pop()


def count_start() -> None:
    """Counts what this process took so far, such as imports, as "starting"; where the system tells it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        began = ticks / os.sysconf("SC_CLK_TCK")
        whole = time.clock_gettime(time.CLOCK_BOOTTIME) - began
        _clock.count()
        _clock.seconds = {"starting": whole}


def seconds() -> dict[str, float]:
    """{kind of work: seconds} of this thread so far."""
    _clock.count()
    return dict(_clock.seconds)


def begin_run(folder: pathlib.Path, began: Mapping[str, float]) -> None:
    """Says that the run in a folder began when `seconds` gave these."""
    _clock.runs[folder] = began


def of_run(folder: pathlib.Path) -> dict[str, float]:
    """{kind of work: seconds} since the run began, or since the last call for it."""
    now = seconds()
    before, _clock.runs[folder] = _clock.runs.get(folder, now), now
    return {kind: value - before.get(kind, 0.0) for kind, value in now.items()}


def whole(cost: Mapping) -> float | None:
    """The wall time that a cost.json tells; None where it does not."""
    found = cost.get("wall_seconds")
    return sum(found.values()) if isinstance(found, Mapping) and found else None


def in_words(found: Mapping[str, float]) -> str:
    """The whole and its kinds, the longest first."""
    shown = {kind: value for kind, value in found.items() if value >= 0.05}
    parts = (f"{kind} {shown[kind]:.1f}" for kind in sorted(shown, key=shown.get, reverse=True))
    return f"{sum(found.values()):.1f} s: {', '.join(parts)}"
