"""What every run writes at its end: costs, weights, predictions, audit, their manifest, result.json; then figures."""

import contextlib
import math
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import jax

from tl_jax import tasks
from tl_jax.core import files, manifest
from tl_jax.data.examples import Source
from tl_jax.data.text import tokenizer
from tl_jax.models import peft
from tl_jax.runtime import events, wall
from tl_jax.runtime.log import log, tolerate
from tl_jax.tasks import Predictions, Spec
from tl_jax.tasks.task import unchanged
from tl_jax.training import audit, between, candidates, selection
from tl_jax.training.build import Run, scored_splits
from tl_jax.weights import delta, load


def note_cost(folder: pathlib.Path, run: Run, i: int, cost: dict[str, Any] | None = None, replicas: int = 1) -> None:
    """Writes cost.json: what a step of phase i costs as compiled, with what is known of the other phases.

    flops_per_step is the mean over the steps, of texts over those of the last start; flops those of all steps and of
    the features that training reads from a cache, whoever computed them; memory_bytes the largest of the phases;
    seconds are those of training over all starts of the run, with compilation, without evaluation; data_wait_seconds
    those in which the devices waited for data; flops_per_second, mfu and roofline are medians of the rows of
    timing.jsonl; wall_seconds as in `note_wall`. Of a run that was trained together with others, seconds and FLOPs of
    steps are its share and "replicas" says how many shared; memory_bytes is that of all together. What a damaged file
    would have told is None.
    """
    if jax.process_index():
        return
    path, phases = folder / "cost.json", _known_phases(folder / "cost.json", len(run.phases))
    rows, damaged = files.sound_rows(folder / "timing.jsonl")
    timed = [row for row in rows if all(_is_number(value) for value in row.values())]
    if lost := len(damaged) + len(rows) - len(timed):
        log(f"{folder / 'timing.jsonl'} is damaged, {lost} lines: the seconds of the run are not known")
    if cost:
        share = cost["flops_per_step"] and cost["flops_per_step"] / replicas
        phases[i] = {**cost, "flops_per_step": share, "steps": run.phases[i].length}
    flops = [phase["flops_per_step"] * phase["steps"] for phase in phases if phase and phase["flops_per_step"]]
    once = [phase.get("flops_of_features") for phase in phases if phase]
    memory = [phase["memory_bytes"] for phase in phases if phase and phase["memory_bytes"]]
    rates = {name: [row[name] for row in timed if row.get(name)] for name in ("flops_per_second", "mfu", "roofline")}
    sums = {name: round(sum(row.get(name) or 0.0 for row in timed), 3) for name in ("seconds", "data_wait_seconds")}
    table = {
        "trainable_parameters": audit.totals([phase.audit for phase in run.phases])["trainable"],
        "flops_per_step": sum(flops) / run.total_steps if len(flops) == len(phases) else None,
        "flops": sum(flops) + sum(once) if len(flops) == len(phases) and None not in once else None,
        "memory_bytes": max(memory, default=None),
        **{name: statistics.median(values) if values else None for name, values in rates.items()},
        **(dict.fromkeys(sums) if lost else sums),
        "wall_seconds": _known_wall(path),
        "steps": run.total_steps,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "phases": phases,
    }
    files.write_json(path, table | ({"replicas": replicas} if replicas > 1 else {}))


def note_wall(folder: pathlib.Path, replicas: int = 1) -> None:
    """Adds to wall_seconds of cost.json what this process has spent on the run, by kind of work.

    They hold all starts of a run but for what a start did after it last came here or was killed; of runs trained
    together each has its share. None where a damaged file would have told what earlier starts spent.
    """
    path, spent = folder / "cost.json", wall.of_run(folder)
    known = _known_wall(path)
    if known is not None:
        spent = {kind: known.get(kind, 0.0) + spent.get(kind, 0.0) / replicas for kind in {**known, **spent}}
        known = {kind: round(value, 3) for kind, value in spent.items() if value >= 0.001}
    with contextlib.suppress(OSError, ValueError):
        files.write_json(path, {**(files.read_json(path) if path.exists() else {}), "wall_seconds": known})


def _known_wall(path: pathlib.Path) -> dict[str, float] | None:
    """What cost.json tells of earlier starts; None where it is damaged."""
    try:
        found = files.read_json(path).get("wall_seconds", {}) if path.exists() else {}
        return found if all(map(_is_number, found.values())) else None
    except (OSError, ValueError, AttributeError):
        return None


def _known_phases(path: pathlib.Path, count: int) -> list[dict[str, Any] | None]:
    """What cost.json tells of each phase: of none where there is none, it is damaged, or it is of other phases."""
    numbers, phases = ("flops_per_step", "memory_bytes", "steps"), []
    try:
        phases = files.read_json(path)["phases"] if path.exists() else []
        known = [phase for phase in phases if phase is not None]
        values = [phase[name] for phase in known for name in numbers]
        values += [phase.get("flops_of_features") for phase in known]  # which older files do not have
        if not all(map(_is_number, values)):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        log(f"{path} is damaged: what earlier starts noted in it is not known")
        phases = []
    return phases if len(phases) == count else [None] * count


def _is_number(value: Any) -> bool:
    """Whether a value of a table of costs is one; None: not known."""
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def _calibrated_on(run: Run) -> bool:
    """Whether there is a val whose labels may decide something."""
    return "val" in run.material.data and not run.material.data["val"].sealed


def wanted_splits(run: Run) -> list[str]:
    """The splits that are predicted at the end: those that are scored, and val where the task is calibrated on it."""
    calibrates = run.task.calibrate is not unchanged and _calibrated_on(run)
    return list(dict.fromkeys([*scored_splits(run), *(["val"] if calibrates else [])]))


@wall.timed("writing")
def finalize(
    run: Run,
    folder: pathlib.Path,
    variables: Mapping[str, Any],
    predictions: Mapping[str, Predictions],
    *,
    step: int,
    last_step: int,
    verbose: bool,
    replicas: int = 1,
    further: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Proves the audit by the hashes of what is frozen, and writes all files of a run.

    predictions: of `wanted_splits`, at the selected step. step: that; last_step: the last that was trained. further:
    what else the result says.
    """
    material, settings = run.material, run.settings
    has_val = _calibrated_on(run) and "val" in predictions
    spec = run.task.calibrate(predictions["val"]) if has_val else run.task.spec  # a threshold
    report = audit.prove([phase.audit for phase in run.phases], material.variables, variables)
    numbers = {
        "step": step,
        "total_steps": run.total_steps,
        **({"stopped_early_at": last_step} if last_step < run.total_steps else {}),
        "trainable_parameters": report["totals"]["trainable"],
        "frozen_sha256": report["proof"]["sha256"],
        **(further or {}),
    }
    if jax.process_index() == 0:
        note_cost(folder, run, len(run.phases) - 1, replicas=replicas)
        card, added = material.card.replace(**tasks.card_fields(spec)), material.model.additions
        about = {"model": settings.model.name, "weights": material.base, "seed": settings.loop.seed, "additions": added}
        about["partial"] = settings.model.partial
        delta.save(folder / "trained.safetensors", variables, report, card, **about)
        if text := card.cards.get("text"):
            tokenizer.known(text).save(folder)
        if peft.can_merge(added):  # one plain network can have what was trained
            load.export(peft.merge(variables, added), settings.model.name, folder / "model.safetensors", card=card)
    names = [*scored_splits(run), *(name for name in predictions if name == between.ONLINE)]
    scored = {name: predictions[name]._replace(spec=spec) for name in names}
    by_val = settings.loop.select == "best_val" or spec != run.task.spec
    return write(run, folder, scored, report, numbers, by_val, verbose, replicas)


@wall.timed("scoring")
def write(
    run: Run,
    folder: pathlib.Path,
    predictions: Mapping[str, Predictions],
    report: Mapping[str, Any],
    numbers: Mapping[str, Any],
    by_val: bool,
    verbose: bool,
    replicas: int = 1,
) -> dict[str, Any]:
    """Scores the predictions of `scored_splits` and writes them, the audit and the result, which it returns.

    report: the proved audit. numbers: of the training, for the result. by_val: whether val decided anything. Figures
    are drawn at last where `verbose`. Process 0 writes; where result.json is, the run is complete.
    """
    split, resamples = scored_splits(run)[0], run.settings.loop.resamples
    scores = {name: tasks.summarize(values, resamples=resamples) for name, values in predictions.items()}
    result = {**_facts(run, split, predictions[split].spec), "chosen_on_scored_split": by_val and split == "val"}
    result |= {**numbers, "metrics": scores.pop(split), "extra_eval": scores}
    if jax.process_index() == 0:
        result |= selection.of_run(run, folder, predictions, numbers["step"]) | between.report(
            run, folder, numbers["step"]
        )
        for name, values in predictions.items():
            tasks.save_predictions(folder / f"predictions{'' if name == split else f'-{name}'}.npz", values)
        files.write_json(folder / "audit.json", report)
        note_wall(folder, replicas)
        manifest.write(folder, "result.json", result)
        if verbose:
            draw(folder, run.settings.loop.feature_map, run.material.data[split])
        log_result(folder, run.settings.shown)
    return result


@wall.timed("figures")
def draw(folder: pathlib.Path, feature_map: str, source: Source | None = None) -> None:
    """Draws the figures of a finished run; a failure is one line of the log.

    feature_map: the option. source: the examples that were scored, for the gallery of mistakes, which needs it.
    """
    with tolerate("figures"):
        from tl_jax.training import plots  # here, as matplotlib takes its time

        saved = tasks.load_predictions(folder / "predictions.npz")
        result = files.read_json(folder / "result.json")
        scored, rows = f"{result['split']}: {result['data']}", files.read_rows(folder / "metrics.jsonl")
        plots.draw_run(rows, saved, folder, scored, result["step"], feature_map)
        start, steps = candidates.path_of(folder, 0), candidates.steps_of(folder)
        if start.exists() and steps and saved.spec.name == "classification":
            pair = (candidates.read(path) for path in (start, candidates.path_of(folder, steps[-1])))
            plots.domain_map(*pair, saved.spec.class_names, folder / "domain_map")
        if source is not None:
            plots.gallery(saved, source, folder / "mistakes", scored)


def log_result(folder: pathlib.Path, shown: Mapping[str, Any] | None) -> None:
    """Writes the event file of a finished run's scores and figures; shown: `Settings.shown`."""
    if shown is None:
        return
    with tolerate("event file of the result"):
        result = files.read_json(folder / "result.json")
        values = {name: x["value"] for name, x in result["metrics"].items() if isinstance(x, dict)}
        scores = {f"{result['split']}/{name}": value for name, value in values.items()}
        events.write_result(folder, shown, result["step"], scores, sorted(folder.glob("*.png")))


def _openness(run: Run) -> dict[str, Any]:
    """What is to be said of labels that an unlabelled stream must not have."""
    ledger, poison = run.material.ledger, run.settings.data.poison
    if not (ledger.sealed or ledger.unsealed):
        return {}
    told = "; ".join(f"{name}: {why}" for name, why in ledger.unsealed.items())
    found = {"setting": "transductive" if run.material.shared else "inductive", "leak_test": told or "not done"}
    return found | ({"poison": poison} if poison else {})


def _facts(run: Run, split: str, spec: Spec) -> dict[str, Any]:
    """What was run and what it is scored on."""
    shared = [{"stream": s, "scored": name, "examples": n} for (s, name), n in run.material.shared.items()]
    return {
        "model": run.material.card.model,
        "method": run.settings.phases[0].method.name,
        **({"weights_sha256": sha256} if (sha256 := run.material.base["sha256"]) else {}),
        **({"missing_weights": parts} if (parts := audit.missing_parts(run.phases[0].audit)) else {}),
        "data": run.material.data[split].name,
        "split": split,
        "select": run.settings.loop.select,
        **({"task": spec.name} if spec.name != "classification" else {}),
        **({"threshold": spec.threshold} if spec.threshold is not None else {}),
        **({"transductive": shared} if run.settings.data.transductive else {}),
        **_openness(run),
        "duplicates": run.material.duplicates,
    }
