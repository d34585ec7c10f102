"""What every run leaves at its end, whatever way it went: predictions, audit, figures, and last of all result.json."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from tl_jax import tasks
from tl_jax.core import files
from tl_jax.training.build import Run


def facts(config: ConfigDict, run: Run, split: str) -> dict[str, Any]:
    """What was run and what it is scored on, for result.json."""
    return {
        "model": run.card.model,
        "method": config.method.name,
        "data": run.data[split].name,
        "split": split,
        "select": config.select,
    }


def leave(
    config: ConfigDict,
    folder: pathlib.Path,
    predictions: Mapping[str, tasks.Predictions],
    result: Mapping[str, Any],
    report: Mapping[str, Any],
    verbose: bool,
) -> dict[str, Any]:
    """Scores and writes; returns the result with its metrics.

    predictions: of result["split"], and of the sets of data.also by name. report: the proved audit. Figures are drawn
    where `verbose`. Process 0 writes; result.json comes last: where it lies, the run is whole.
    """
    scores = {name: tasks.summarize(p, resamples=config.resamples) for name, p in predictions.items()}
    own = predictions[result["split"]]
    result = {**result, "metrics": scores.pop(result["split"]), "also": scores}
    if jax.process_index() == 0:
        for name, values in predictions.items():
            suffix = "" if values is own else f"-{name}"
            tasks.save_predictions(folder / f"predictions{suffix}.npz", values)
        files.write_json(folder / "audit.json", report)
        if verbose:
            from tl_jax.training import plots  # here, as matplotlib takes its time

            plots.draw_run(files.read_rows(folder / "metrics.jsonl"), own, folder)
        files.write_json(folder / "result.json", result)
    return result
