"""What every run leaves at its end, whatever way it went: predictions, audit, weights, and last of all result.json."""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax

from tl_jax import tasks
from tl_jax.core import files
from tl_jax.models import peft
from tl_jax.tasks import Predictions, Spec
from tl_jax.tasks.task import unchanged
from tl_jax.training import audit
from tl_jax.training.build import Run, scored_splits
from tl_jax.weights import delta, load

RATES = ("flops_per_second", "mfu", "roofline")


def note_cost(folder: pathlib.Path, run: Run, i: int, cost: dict[str, Any] | None = None, replicas: int = 1) -> None:
    """Writes cost.json: what a step of phase i costs as compiled, with what is known of the other phases.

    flops_per_step is the mean over the steps, memory_bytes the largest of the phases; seconds are those of training,
    compilation included, evaluation not, over all starts of the run; data_wait_seconds those in which the devices had
    no work for want of data; flops_per_second, mfu and roofline are medians of the rows of timing.jsonl. Of a run that
    was trained together with others, seconds and flops_per_step are its share and "replicas" says how many shared;
    memory_bytes is that of all together.
    """
    if jax.process_index():
        return
    path = folder / "cost.json"
    phases = files.read_json(path)["phases"] if path.exists() else []
    if len(phases) != len(run.phases):  # none yet, or those of a run that ended before its first checkpoint
        phases = [None] * len(run.phases)
    if cost:
        share = cost["flops_per_step"] and cost["flops_per_step"] / replicas
        phases[i] = {**cost, "flops_per_step": share, "steps": run.phases[i].length}
    flops = [phase["flops_per_step"] * phase["steps"] for phase in phases if phase and phase["flops_per_step"]]
    memory = [phase["memory_bytes"] for phase in phases if phase and phase["memory_bytes"]]
    rows = files.read_rows(folder / "timing.jsonl")
    rates = {name: [row[name] for row in rows if row.get(name)] for name in RATES}
    table = {
        "trainable_parameters": audit.totals([phase.audit for phase in run.phases])["trainable"],
        "flops_per_step": sum(flops) / run.total_steps if all(phases) and len(flops) == len(phases) else None,
        "memory_bytes": max(memory, default=None),
        **{name: statistics.median(values) if values else None for name, values in rates.items()},
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "data_wait_seconds": round(sum(row.get("data_wait_seconds", 0.0) for row in rows), 3),
        "steps": run.total_steps,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "phases": phases,
        **({"replicas": replicas} if replicas > 1 else {}),
    }
    files.write_json(path, table)


def facts(run: Run, spec: Spec) -> dict[str, Any]:
    """What was run and what it is scored on, for result.json."""
    split, data, shared = scored_splits(run)[0], run.settings.data, run.material.shared
    about = {
        "model": run.material.card.model,
        "method": run.settings.phases[0].method.name,
        "data": run.material.data[split].name,
        "split": split,
        "select": run.settings.loop.select,
    }
    if spec.name != "classification":
        about["task"] = spec.name
    if spec.threshold is not None:
        about["threshold"] = spec.threshold
    if data.transductive:
        about["transductive"] = [{"stream": s, "scored": name, "examples": n} for (s, name), n in shared.items()]
    return about


def calibrated(run: Run, predictions: Mapping[str, Predictions]) -> tuple[Spec, dict[str, Predictions]]:
    """The task's spec with what val decides (a threshold), and the predictions of what is scored under it."""
    spec = run.task.calibrate(predictions["val"]) if "val" in predictions else run.task.spec
    return spec, {name: predictions[name]._replace(spec=spec) for name in scored_splits(run)}


def wanted_splits(run: Run) -> list[str]:
    """The splits that are predicted at the end: those that are scored, and val where the task is calibrated on it."""
    calibrates = run.task.calibrate is not unchanged and "val" in run.material.data
    return list(dict.fromkeys([*scored_splits(run), *(["val"] if calibrates else [])]))


def finalize(
    run: Run,
    folder: pathlib.Path,
    variables: Mapping[str, Any],
    predictions: Mapping[str, Predictions],
    hashes: tuple[dict[str, str], dict[str, str]],
    *,
    step: int,
    last_step: int,
    verbose: bool,
    replicas: int = 1,
) -> dict[str, Any]:
    """Proves the audit by the hashes of what is frozen, (as loaded, at the end), and writes what a run leaves.

    predictions: of `wanted_splits`, at the selected step. step: that; last_step: the last that was trained.
    """
    spec, scored = calibrated(run, predictions)
    split, audits = scored_splits(run)[0], [phase.audit for phase in run.phases]
    report = audit.prove(audits, *hashes)
    chosen = run.settings.loop.select == "best_val" or spec != run.task.spec
    result = {
        **facts(run, spec),
        "chosen_on_scored_split": chosen and split == "val",
        "step": step,
        "total_steps": run.total_steps,
        **({"stopped_early_at": last_step} if last_step < run.total_steps else {}),
        "trainable_parameters": report["totals"]["trainable"],
        "frozen_sha256": report["proof"]["sha256"],
    }
    if jax.process_index() == 0:
        note_cost(folder, run, len(run.phases) - 1, replicas=replicas)
        write_weights(run, folder, variables, report, spec)
    return write(run, folder, scored, result, report, verbose)


def write_weights(run: Run, folder: pathlib.Path, variables: Any, report: Mapping[str, Any], spec: Spec) -> None:
    """trained.safetensors, and model.safetensors where one plain network can hold what was trained."""
    material, settings = run.material, run.settings
    card, additions = material.card.replace(**tasks.card_fields(spec)), material.model.additions
    delta.save(
        folder / "trained.safetensors", variables, report, card,
        model=settings.model.name, weights=material.base, seed=settings.loop.seed, additions=additions,
    )  # fmt: skip
    if peft.can_merge(additions):
        load.export(peft.merge(variables, additions), settings.model.name, folder / "model.safetensors", card=card)


def write(
    run: Run,
    folder: pathlib.Path,
    predictions: Mapping[str, Predictions],
    result: Mapping[str, Any],
    report: Mapping[str, Any],
    verbose: bool,
) -> dict[str, Any]:
    """Scores and writes; returns the result with its metrics.

    predictions: of result["split"], and of the sets of data.extra_eval by name. report: the proved audit. Figures are
    drawn where `verbose`. Process 0 writes; result.json comes last: where it lies, the run is complete.
    """
    resamples = run.settings.loop.resamples
    scores = {name: tasks.summarize(p, resamples=resamples) for name, p in predictions.items()}
    own = predictions[result["split"]]
    result = {**result, "metrics": scores.pop(result["split"]), "extra_eval": scores}
    if jax.process_index() == 0:
        for name, values in predictions.items():
            suffix = "" if values is own else f"-{name}"
            tasks.save_predictions(folder / f"predictions{suffix}.npz", values)
        files.write_json(folder / "audit.json", report)
        if verbose:
            draw(run, folder, own)
        files.write_json(folder / "result.json", result)
    return result


def draw(run: Run, folder: pathlib.Path, predictions: Predictions) -> None:
    """The figures of a run."""
    from tl_jax.tasks import figures  # here, as matplotlib takes its time
    from tl_jax.training import plots

    if rows := files.read_rows(folder / "metrics.jsonl"):  # a probe without gradient takes no steps
        plots.learning_curves(rows, run.task.spec, folder / "learning_curves.png")
    figures.draw(predictions, folder)
