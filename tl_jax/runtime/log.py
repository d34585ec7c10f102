"""The log of a run: metrics.jsonl (bit-equal after a resume), timing.jsonl, and the console of process 0."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from tl_jax.core import console
from tl_jax.core.files import atomic_write, sound_rows, write_text, writing
from tl_jax.runtime import events

UNSHOWN, SHOWN = ("train/grad_norm", "train/lr"), 4  # of a line of metrics, on the console; at least so many
SHOWN_WAIT = 0.02  # share of the time from which on the wait for data is shown


def log(message: Any, style: str = "") -> None:
    """Prints a table or prose on process 0 and nowhere else."""
    if jax.process_index() == 0:
        console.show(message, style=style)


@contextlib.contextmanager
def tolerate(what: str) -> Iterator[None]:
    """Makes one line of the log of an error in the block, for what never stands between a run and its result."""
    try:
        yield
    except Exception as error:
        lines = f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode().split()
        log(f"{what}: left out ({' '.join(lines)}); everything else is written")


class RunLog:
    """Rows of one run and its progress bar.

    metrics.jsonl holds what the seed determines, and starts as `rows`, those of the checkpoint that a run resumes from;
    timing.jsonl holds the rest. Of runs that are trained together each takes its share of the seconds, one of
    `replicas`. Without a folder the rows are kept and not written. options: those that an event file of the rows names;
    None: there is none.
    """

    def __init__(
        self, folder: Path | None, rows: list[dict], start: int, total: int, verbose: bool = True, replicas: int = 1,
        options: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self._writes = jax.process_index() == 0 and folder is not None
        self._paths = {name: folder / f"{name}.jsonl" for name in ("metrics", "timing")} if folder else {}
        self.rows = list(rows)
        self._events = folder if self._writes and options is not None else None
        if self._events:
            events.begin(folder, options, self.rows)
        if self._writes:
            write_text(self._paths["metrics"], "".join(json.dumps(row) + "\n" for row in rows))
            self._begin_timing(start)
        self._clock = self._began = time.perf_counter()
        self._start, self._timed, self._total = start, start, total
        self._share, self.waited = 1 / replicas, 0.0
        # Further columns of timing.jsonl, from the number of steps since the last and their seconds.
        self.rates: Callable[[int, float], Mapping[str, Any]] = lambda steps, seconds: {}
        self._verbose = verbose and self._writes
        self._stack, self._tick = contextlib.ExitStack(), None

    def _begin_timing(self, start: int) -> None:
        """Keeps the whole lines of earlier starts; "null" stands for those that were lost: no sum is believed then."""
        path = self._paths["timing"]
        text = path.read_bytes() if start and path.exists() else b""
        with atomic_write(path) as file:
            file.write(text[: text.rfind(b"\n") + 1])
        known = {str(row.get("step")) for row in sound_rows(path)[0]}
        if any("train/lr" in row and str(row["step"]) not in known for row in self.rows):
            self._append("timing", None)

    def __enter__(self) -> "RunLog":
        if self._verbose and console.shows_bar(console.make_console()):
            self._tick = self._stack.enter_context(console.bar("train", self._total, self._start))
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one row of metrics.jsonl; a number that is not finite is written as null, which every reader knows."""
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in metrics.items()}}
        self.rows.append(row)
        if self._events:  # first: after a kill it has all that metrics.jsonl has
            events.add(self._events, row)
        self._append("metrics", row)

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Writes and shows what an evaluation on val gave."""
        self.write(step, {f"val/{name}": value for name, value in scores.items()})
        if self._verbose:
            log(f"step {step}/{self._total}  " + "  ".join(f"val {name} {value:.4g}" for name, value in scores.items()))

    def progress(self, step: int, metrics: Mapping[str, float], examples: float, what: str = "examples") -> None:
        """Shows the bar (or, without a terminal, a line) and times the steps since the last call.

        examples: since then, or what else `what` says that a mean is over.
        """
        now = time.perf_counter()
        seconds, self._clock = (now - self._clock) * self._share, now
        rate = examples / seconds
        waited, self.waited = self.waited * self._share, 0.0
        row = {"step": step, "seconds": round(seconds, 9), f"{what}_per_second": round(rate, 1)}
        row |= {"data_wait_seconds": round(waited, 6), "data_wait": round(waited / seconds, 4)}
        self._append("timing", {**row, **self.rates(step - self._timed, seconds)})
        self._timed = step
        shown = {name.removeprefix("train/"): value for name, value in metrics.items() if name not in UNSHOWN}
        names = sorted(shown, key=lambda name: "/" in name)  # the loss, the task's metric and all terms, then their own
        count = max(SHOWN, sum("/" not in name for name in names))
        texts = [f"{name} {shown[name]:.4g}" for name in names[:count]]
        texts += [f"waited {waited / seconds:.0%} for data"] * (waited > SHOWN_WAIT * seconds)
        texts += [f"{rate:,.0f} {what}/s"]
        if self._tick:
            self._tick(step, *texts)
        elif self._verbose:
            left = (self._total - step) * (now - self._began) / (step - self._start)  # evaluations included
            log("  ".join([f"step {step}/{self._total}", *texts, f"{left:,.0f} s left"]))

    @contextlib.contextmanager
    def untimed(self):
        """Leaves what happens inside out of the rate: evaluation and checkpoints are not training."""
        began = time.perf_counter()
        yield
        self._clock += time.perf_counter() - began

    def _append(self, name: str, row: Mapping[str, Any] | None) -> None:
        if self._writes:
            with writing(self._paths[name]), self._paths[name].open("a") as file:
                file.write(json.dumps(row) + "\n")


def feed(logs: Collection[RunLog], batches: Iterable, idle: Callable[[], bool]) -> Iterator:
    """The same batches; the time that each took while the devices had no work counts as wait for data in `logs`.

    idle: whether the last step is done; a step that ends during the wait counts as done.
    """
    began = time.perf_counter()
    for batch in batches:
        waited = (time.perf_counter() - began) * idle()
        for log in logs:
            log.waited += waited
        yield batch
        began = time.perf_counter()
