"""What a server keeps of its requests: a log, which `python -m tl_jax drift` reads, and a monitor with an alarm."""

import json
import math
import os
import pathlib
import sys
import threading
import time
from typing import Any

import numpy as np

from tl_jax.core import checks, files
from tl_jax.serving.drift import EFFECTS, LEAST, LEVEL, MOST, Table, marginals, readable
from tl_jax.tasks import Predictions, Spec, make_predictions

COMPONENTS = 16  # of the features, at most
CELLS = 200_000  # outputs of the reference, at most, unless that is less than twice the window
FIRST, SPENDING = 10, 0.444018133  # the sum over i >= FIRST of 1 / (i ln(i)^2)


class Log:
    """A .jsonl file: the task in its first line, then one line a request, {"time", "outputs", "features"}.

    Each request is one write at the end of the file, so that processes may share it and a kill costs one line at most.
    A file that was moved or emptied, as programs that rotate logs do, begins anew.
    """

    def __init__(self, path: str | os.PathLike, spec: Spec):
        """Goes on with a file that is there; ValueError where it is of another task or other classes."""
        self._path, self._head = path, json.dumps({"task": spec._asdict()}).encode() + b"\n"
        if not os.path.exists(path) or not os.path.getsize(path):
            self._write(b"")
        elif (found := _task(files.sound_rows(pathlib.Path(path))[0], path)) != spec:
            raise ValueError(f"{path} is the log of {found}, expected {spec}; name another file")

    def append(self, outputs: np.ndarray, features: np.ndarray | None = None) -> None:
        """One answered request: the outputs as in `Predictions`, [K] (binary: []), and the features [D]."""
        row = {"time": round(time.time(), 3), "outputs": _numbers(outputs)}
        row = row if features is None else {**row, "features": _numbers(features)}
        self._write(json.dumps(row).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        """Behind the task where the file has none, and behind a line that was cut short."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(file).st_size
            cut = size and os.pread(file, 1, size - 1) != b"\n"
            head = b"" if os.pread(file, 7, 0) == self._head[:7] else self._head
            os.write(file, b"\n" * bool(cut) + head + line)
        finally:
            os.close(file)


def _numbers(values: np.ndarray) -> Any:
    return np.vectorize(lambda x: float(f"{x:.9g}"), otypes=[float])(values).tolist()  # float32, exactly


def _task(rows: list[Table], path: str | os.PathLike) -> Spec:
    """What a log is of, mostly by its first line; ValueError for other files."""
    try:
        return Spec(**files.as_tuples(next(row["task"] for row in rows if "task" in row)))
    except (StopIteration, TypeError, AttributeError):
        raise ValueError(f"{path} is no log of a server: no line holds the task") from None


def load_log(path: str | os.PathLike) -> Predictions:
    """The requests of a log, without labels; features where every line has them.

    Lines that a kill cut short are left out, and named on the standard error. Raises ValueError that names the file.
    """
    with open(path, "rb"):  # FileNotFoundError
        rows, damaged = files.sound_rows(pathlib.Path(path))
    spec = _task(rows, path)
    rows = [row for row in rows if "outputs" in row]
    if damaged:
        print(f"{path}: {len(damaged)} lines are damaged and left out, first {damaged[:5]}", file=sys.stderr)
    try:
        features = [row["features"] for row in rows] if all("features" in row for row in rows) else None
        values = np.asarray([row["outputs"] for row in rows], np.float32)
        output = "values" if spec.name == "regression" else "logits"
        return make_predictions({output: values}, None, np.arange(len(rows)), spec, features)
    except (ValueError, TypeError, FloatingPointError) as error:
        raise ValueError(f"{path}: no sound log of a server ({error})") from None


class Monitor:
    """Watches the last `window` requests for drift from a fixed reference, with few false alarms however long it runs.

    Every `every` requests each output, and up to COMPONENTS principal components of the features, is compared by
    `drift.marginals`. The looks i = FIRST, FIRST + 1, ... have the levels LEVEL / (SPENDING i ln(i)^2), each column
    Bonferroni's share of it: over all looks together at most LEVEL, whatever their dependence. The components are those
    of one half of the reference, the other half is what is compared with. A look at ten outputs takes 5 ms, at a
    thousand, with fewer examples of the reference, 0.1 s; `state` does not wait for it. Threads may call `add`.
    """

    def __init__(self, reference: Predictions, window: int = 200, every: int = 50, seed: int = 0):
        """reference: predictions on examples that the network was not trained on; without features outputs alone count.

        ValueError lists all that does not fit.
        """
        whole, n = checks.integer(LEAST), len(reference.values)
        found = {f"window={window}: expected at least {LEAST}": not whole.fits(window),
                 f"every={every}: expected at least 1": not checks.integer(1).fits(every),
                 f"the reference has {n} examples, expected at least {2 * LEAST}": n < 2 * LEAST}  # fmt: skip
        checks.refuse("drift cannot be watched", [text for text, wrong in found.items() if wrong])
        self._spec, self._window, self._every, self._axes = reference.spec, window, every, None
        kept = np.random.default_rng(seed).permutation(n)[: 2 * MOST]
        columns = reference.values[0].size
        most = min(MOST, max(CELLS // columns, 2 * window))
        outputs = readable(reference.spec, reference.values[kept[:most]])
        self._parts, self._names = [outputs], [f"output {x}" for x in reference.spec.class_names[-outputs.shape[1] :]]
        if reference.features is not None:
            first, second = np.array_split(reference.features[kept], 2)
            self._mean = first.mean(axis=0)
            self._axes = np.linalg.svd(first - self._mean, full_matrices=False)[2][:COMPONENTS].T
            self._parts.append((second - self._mean) @ self._axes)
            self._names += [f"feature component {i + 1}" for i in range(self._axes.shape[1])]
        self._rows, self._lock = np.zeros((window, len(self._names))), threading.Lock()
        self._state: Table = {"requests": 0, "window": window, "looks": 0, "level": 0.0, "spent": 0.0, "p": 1.0,
                              "drifting": False, "alarm": False, "alarm_at": None, "columns": []}  # fmt: skip

    def add(self, outputs: np.ndarray, features: np.ndarray | None = None) -> bool:
        """One request, as in `Log.append`; returns whether an alarm was raised, now or before."""
        row = readable(self._spec, np.asarray(outputs)[None])[0]
        if self._axes is not None:
            row = np.concatenate([row, (features - self._mean) @ self._axes])
        with self._lock:
            state = self._state | {"requests": self._state["requests"] + 1}
            self._rows[state["requests"] % self._window] = row
            since = state["requests"] - self._window
            self._state = self._look(state) if since >= 0 and since % self._every == 0 else state
            return self._state["alarm"]

    def state(self) -> Table:
        """Plain numbers for a page or a table of metrics, as of the last look.

        p: the smallest, corrected for the number of columns; level: what it is compared with; spent: all levels so far;
        drifting: the last look was significant; alarm: one of them was, alarm_at: at which request; columns: rows
        {"name", "p", "ks", "js", "wasserstein"}.
        """
        return dict(self._state)  # which is replaced, never changed

    def _look(self, state: Table) -> Table:
        cuts = [self._parts[0].shape[1]]
        found = [marginals(*pair) for pair in zip(self._parts, np.split(self._rows, cuts, axis=1), strict=False)]
        p, ks, js, w1 = (np.concatenate(each).tolist() for each in zip(*found, strict=True))
        i = state["looks"] + FIRST
        level, p = LEVEL / (SPENDING * i * math.log(i) ** 2), [min(1.0, len(p) * x) for x in p]
        drifting = any(a <= level and b >= EFFECTS["JS"] for a, b in zip(p, js, strict=True))
        first = drifting and not state["alarm"]
        rows = zip(self._names, p, ks, js, w1, strict=True)
        return state | {
            "looks": state["looks"] + 1, "level": level, "spent": state["spent"] + level, "p": min(p),
            "drifting": drifting, "alarm": state["alarm"] or drifting,
            "alarm_at": state["requests"] if first else state["alarm_at"],
            "columns": [dict(zip(("name", "p", "ks", "js", "wasserstein"), row, strict=True)) for row in rows],
        }  # fmt: skip
