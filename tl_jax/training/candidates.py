"""Candidates: what a run writes of itself at each evaluation without target labels, and what selectors choose of it."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.core import files, npz
from tl_jax.core.options import SELECTORS as SINGLE
from tl_jax.methods.selectors import SELECTORS, Candidate
from tl_jax.runtime import distributed
from tl_jax.tasks import Predictions, make_predictions
from tl_jax.training import inputs
from tl_jax.training.build import Run, scored_splits

FOLDER, CHOICES = "candidates", "choices.json"


def tested(run: Run) -> str:
    """The first scored set whose labels are sealed, "" where there is none."""
    return next((name for name in scored_splits(run) if run.material.data[name].sealed), "")


def names(run: Run) -> list[str]:
    """The sets besides val that are predicted at each evaluation: none without data.candidates."""
    judged = [name for name, *_ in inputs.judged_on(run.settings.data)]
    further = (inputs.SAMPLE, inputs.MIXED, tested(run)) if judged else ()
    return [*judged, *(name for name in further if name in run.material.eval_batches)]


def path_of(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / FOLDER / f"step_{step:06}.npz"


def steps_of(folder: pathlib.Path) -> list[int]:
    """The steps of the candidates; step 0, before training, is none."""
    found = sorted(int(path.stem.removeprefix("step_")) for path in (folder / FOLDER).glob("step_*.npz"))
    return [step for step in found if step]


def forget(folder: pathlib.Path, step: int) -> None:
    """Removes what an earlier start of the run wrote after the step from which this one goes on."""
    for later in steps_of(folder):
        if later > step and distributed.is_first():
            path_of(folder, later).unlink()


def write(folder: pathlib.Path | None, run: Run, step: int, found: Mapping[str, Predictions]) -> dict[str, float]:
    """Writes step_NNNNNN.npz with the outputs on val and `names`; {select: its score} where a selector chooses."""
    val, judged = found["val"], found[names(run)[0]]
    arrays = {"source_logits": val.values, "source_features": val.features, "source_labels": val.labels}
    arrays |= {"source_domains": run.material.data["val"].domains}
    arrays |= {"target_logits": judged.values, "target_features": judged.features}
    arrays["train_features"] = found[inputs.SAMPLE].features
    arrays |= {"mixed_logits": found[inputs.MIXED].values} if inputs.MIXED in found else {}
    arrays |= {"test_logits": found[tested(run)].values} if tested(run) else {}
    arrays = {name: values for name, values in arrays.items() if values is not None}
    if folder and distributed.is_first():
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path_of(folder, step)) as file:
            np.savez(file, **arrays)
    select = run.settings.loop.select
    if select not in SINGLE:
        return {}
    # Another host may round otherwise, and all must take one step.
    return distributed.from_first(lambda: {select: SELECTORS[select].scores([make(arrays)])[0]})


def make(arrays: Mapping[str, np.ndarray]) -> Candidate:
    """The candidate of such arrays, in float64."""

    def log_p(name):
        logits = arrays.get(f"{name}_logits")
        return None if logits is None else scipy.special.log_softmax(logits.astype(np.float64), axis=1)

    further = {name: arrays.get(name) for name in ("target_features", "source_features", "train_features")}
    further = {name: None if x is None else x.astype(np.float64) for name, x in further.items()}
    labels = {name: arrays.get(name) for name in ("source_labels", "source_domains")}
    return Candidate(**{f"log_{name}": log_p(name) for name in ("target", "mixed", "source")}, **further, **labels)


def read(path: pathlib.Path, sha256: str = "") -> dict[str, np.ndarray]:
    """The arrays of a candidate; ValueError names a file that cannot be read, or has not the sha256 that is given."""
    try:
        if sha256 and files.sha256(path) != sha256:
            raise ValueError(f"it is not what {CHOICES} tells of")
        return npz.read(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or run again") from None


def scores_of(paths: Sequence[pathlib.Path]) -> dict[str, list[float]]:
    """{selector: its score of each candidate}, of the selectors whose input all candidates have."""
    table: dict[str, list[float]] = {}
    pool = []
    for path in paths:
        candidate = make(read(path))
        for name, selector in SELECTORS.items():
            if not selector.pool and all(getattr(candidate, field) is not None for field in selector.fields):
                table.setdefault(name, []).append(selector.scores([candidate])[0])
        pool.append(Candidate(candidate.log_target, None))  # the rest need not be kept
    table |= {name: selector.scores(pool) for name, selector in SELECTORS.items() if selector.pool}
    return {name: table[name] for name in SELECTORS if len(table.get(name, ())) == len(paths)}


def choose(run: Run, folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the choice of every selector among the run's candidates, before any sealed label is opened.

    rows: of metrics.jsonl. choices.json has the steps, the sha256 of each candidate's file, and per selector what it
    reads, its scores and the step it chose: that of the highest score, the earliest among equals.
    """
    if not names(run):
        return
    steps, evaluated = steps_of(folder), sorted({row["step"] for row in rows if any("val/" in key for key in row)})
    if lacking := [step for step in evaluated if step not in steps]:
        raise ValueError(
            f"{folder / FOLDER} has no file of the evaluations after {lacking} steps, expected one for each; restore "
            "them, or run again in another workdir"
        )
    paths = [path_of(folder, step) for step in steps]
    choices = {
        name: {"reads": SELECTORS[name].reads, "step": steps[int(np.argmax(scores))], "scores": scores}
        for name, scores in scores_of(paths).items()
    }
    hashes = {path.name: files.sha256(path) for path in paths}
    files.write_json(folder / CHOICES, {"steps": steps, "sha256": hashes, "choices": choices})


def opened(run: Run, predictions: Mapping[str, Predictions], step: int) -> dict[str, Predictions]:
    """The predictions with labels: those that were sealed are opened now, and the ledger has it."""
    found = dict(predictions)
    for name, values in predictions.items():
        if values.labels is None:
            labels = run.material.ledger.open(name, run.material.data[name], "the score at the end", "score", step)
            found[name] = make_predictions(*values._replace(labels=labels))
    return found
