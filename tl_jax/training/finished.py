"""The result of a finished run, believed only where it is what the run wrote and what its predictions say."""

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from tl_jax import tasks
from tl_jax.core import files, manifest, messages

SAMPLED = {"low", "high", "level", "resamples", "seed"}  # of the bootstrap, which is not done again
CLOSE = {"rel_tol": 1e-4, "abs_tol": 1e-6}  # the same sums on another machine


def read(folder: pathlib.Path) -> dict[str, Any]:
    """result.json; one ValueError names all files that changed since, or all metrics that predictions contradict."""
    manifest.check(folder)
    result = files.read_json(folder / "result.json")
    summaries = {"": result["metrics"], **{f"-{name}": found for name, found in result["extra_eval"].items()}}
    wrong = []
    for suffix, summary in summaries.items():
        path = folder / f"predictions{suffix}.npz"
        found = tasks.summarize(tasks.load_predictions(path), resamples=1) if path.exists() else {}
        wrong += [f"{difference} by {path.name}" for difference in _differences("", summary, found)]
    if wrong:
        which = ", ".join(messages.shorten(wrong, 10))
        raise ValueError(f"{folder / 'result.json'}: {which}: one of the two was changed; restore it, or run again")
    return result


def _differences(name: str, there: Any, now: Any) -> Iterator[str]:
    if there == now or (isinstance(there, float) and isinstance(now, float) and math.isclose(there, now, **CLOSE)):
        return
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        for key in sorted(there.keys() - SAMPLED):
            yield from _differences(f"{name}.{key}".strip("."), there[key], now.get(key, "nothing"))
    elif isinstance(there, list) and isinstance(now, list) and len(there) == len(now):
        for i, pair in enumerate(zip(there, now, strict=True)):
            yield from _differences(f"{name}[{i}]", *pair)
    else:
        yield f"{name} is {there!r:.40}, expected {now!r:.40}"
