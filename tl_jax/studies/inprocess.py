"""Studies of one factor in this process: further seeds and a baseline of a config, or replicas as one program."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import console, manifest
from tl_jax.core.console import Table
from tl_jax.core.files import read_json, read_rows, write_json
from tl_jax.methods import probes
from tl_jax.runtime import wall
from tl_jax.runtime import workdir as workdirs
from tl_jax.runtime.log import log, tolerate
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies.report import alarm, selection, sweep
from tl_jax.studies.report.statistics import mean_interval, within
from tl_jax.studies.study import RunSpec, Study, grid, metrics_of
from tl_jax.training.settings import naming
from tl_jax.training.train import Stop, never, train, train_together

ARM, TRANSFER, BASELINE, REPLICA = "arm", "transfer", "baseline", "replica"


def study_of(config: ConfigDict) -> Study:
    """What a config with seeds, baseline or replicas asks for; ValueError where that does not fit together."""
    options.check(config)
    base = options.override(config, {"seeds": (), "baseline": (), "replicas": ()})
    if config.replicas:
        levels = {name_of(i, dict(changes)): dict(changes) for i, changes in enumerate(config.replicas)}
        return Study(base, {REPLICA: levels}, seeds=(config.seed,), together="all")
    changes, seeds = dict(config.baseline), (config.seed, *config.seeds)
    shared = [key for key in ("seed", "seeds", "baseline") if key in changes]
    problems = [f"baseline sets {key!r}, which every arm shares" for key in shared]
    if len(set(seeds)) < len(seeds):
        problems.append(f"seed={seeds[0]}, seeds={seeds[1:]}: a seed is named twice; seeds are the further ones")
    if problems:
        raise ValueError("; ".join(problems))
    arms, against = ({TRANSFER: {}, BASELINE: changes}, {ARM: BASELINE}) if changes else ({TRANSFER: {}}, {})
    return Study(base, {ARM: arms}, against, seeds, together="none")


def run(
    config: ConfigDict, workdir: pathlib.Path, stop_requested: Stop = never, *, verbose: bool = True
) -> dict[str, Any]:
    """Runs a config in a workdir, with all its arms and seeds, or its replicas.

    Returns {"result": of the run itself, "comparison": comparison.json or None} or {"replicas": replicas.json}. Other
    arms and seeds lie in `workdir/runs/ARM-seedN`, replicas in `workdir/replicas/NAME`; what has its result is not run
    again. Raises FloatingPointError where all replicas diverged, Preempted as `train` does.
    """
    workdir, study = pathlib.Path(workdir), study_of(config)
    with naming(options.flatten(config), "replicas", "baseline", "seeds"):
        runs = grid(study, free=("seed",) if config.replicas else ())
    if config.replicas:
        return {"replicas": _run_replicas(config, runs, workdir, stop_requested, verbose)}
    runs = [run for arm in study.factors[ARM] for run in runs if run.levels[ARM] == arm]
    several, results, folders, metric = len(runs) > 1, {}, {}, metrics_of(study)[0]
    with console.bar("runs", len(runs), shown=several and verbose and jax.process_index() == 0) as tick:
        for i, spec in enumerate(runs):
            key = arm, seed = spec.levels[ARM], spec.seed
            if stop_requested(0):
                raise Preempted(f"stopped before {arm}, seed {seed}")
            opens = seed == config.seed  # each arm shows its first run, the others are one line
            if opens and several:
                log(f"\n{arm}, seeds {list(study.seeds)}")
            folders[key] = workdir / "runs" / f"{arm}-seed{seed}" if i else workdir
            with naming({}, *([BASELINE] if arm == BASELINE else [])):
                how = {"verbose": opens and verbose, "stop_requested": stop_requested}
                results[key] = train(spec.config, folders[key], **how)
            if several:
                value = results[key]["metrics"][metric]["value"]
                log(f"{arm}, seed {seed}: {metric} {value:.3f} in {folders[key]}")
            tick(i + 1)
    report = compare(config, study, results, folders, workdir) if several else None
    return {"result": results[TRANSFER, config.seed], "comparison": report}


def show(found: Mapping[str, Any], config: ConfigDict, workdir: pathlib.Path) -> None:
    if "replicas" in found:
        log(sweep.table(config.task, found["replicas"]["replicas"]))
        if "selection" in found["replicas"]:
            log(selection.table(found["replicas"]["selection"]))
        log(f"each replica is a run with a folder of its own: {(workdir / 'replicas').resolve()}")
        log(f"this took {wall.in_words(wall.seconds())}")
        return
    result = found["result"]
    log(tasks.format_table(result["metrics"], of=f"seed {config.seed}, {result['data']}"))
    if sets := result["extra_eval"]:
        log(tasks.format_sets(sets, tasks.METRICS[config.task].monitor[0][0]))
    if stopped := result.get("stopped_early_at"):
        log(f"stopped early after step {stopped} of {result['total_steps']}")
    if "chosen" in result:
        log(probes.choice_line(result["method"], result["chosen"], result["tried"]))
    elif result["select"] == "best_val":
        log(f"scored at step {result['step']}, the best on val")
    if "selection" in result:
        log(selection.table(result["selection"]))
    for line in result.get("domains", {}).get("diagnosis", ()):
        log(line)
    if "threshold" in result:
        log(f"positive from a probability of {result['threshold']:.3g}, chosen on val")
    if result["chosen_on_scored_split"]:
        log("The checkpoint was chosen on the split scored here: these numbers are optimistic (name a data.test)")
    if found["comparison"]:
        log(comparison_table(found["comparison"]))
        for line in alarm.sentences(TRANSFER, BASELINE, found["comparison"].get("negative_transfer", {})):
            log(line, "bold red")
    log(f"everything of this run: {workdir.resolve()}\nthis took {wall.in_words(wall.seconds())}")


def compare(config: ConfigDict, study: Study, results: Mapping, folders: Mapping, workdir: pathlib.Path) -> dict:
    """comparison.json: the monitored metric of each arm over the seeds, and their difference, paired by seed."""
    metric, data = metrics_of(study)[0], results[TRANSFER, config.seed]["data"]
    value_of = {key: result["metrics"][metric]["value"] for key, result in results.items()}
    table = {arm: [value_of[arm, seed] for seed in study.seeds] for arm in study.factors[ARM]}
    bounds = tasks.bounds(metric)
    arms = {arm: {"values": values, **mean_interval(values, bounds=bounds)} for arm, values in table.items()}
    report = {"data": data, "seeds": list(study.seeds), "metric": metric, metric: arms}
    if BASELINE in table:
        differences, by_seed = [a - b for a, b in zip(*table.values(), strict=True)], {}
        for seed in study.seeds:
            pair = (tasks.load_predictions(folders[arm, seed] / "predictions.npz") for arm in table)
            by_seed[str(seed)] = tasks.paired_difference(*pair, resamples=config.resamples)
        pairs = [tuple(folders[arm, seed] for arm in table) for seed in study.seeds]
        report["negative_transfer"] = alarm.of_folders(pairs, config.resamples)
        report["difference"] = {"values": differences, **within(mean_interval(differences), *tasks.span(metric))}
        report["difference_by_seed_over_examples"] = by_seed
    if jax.process_index() == 0:
        write_json(workdir / "comparison.json", report)
        with tolerate("comparison.png"):
            from tl_jax.studies.report import charts  # here, as matplotlib takes its time

            label = f"{metric} on {report['data']}, {len(study.seeds)} seeds"
            charts.comparison(workdir / "comparison", table, label, bounds, report.get("difference"))
    return report


def comparison_table(report: Mapping[str, Any]) -> Table:
    found = dict(report[report["metric"]])
    if "difference" in report:
        found[f"{TRANSFER} - {BASELINE}"] = report["difference"]
    rows = []
    for name, row in found.items():
        interval = "-" if row["low"] is None else f"{row['low']:.3f} .. {row['high']:.3f}"
        rows.append((name, f"{row['mean']:.3f}", interval, *(f"{value:.3f}" for value in row["values"])))
    seeds = (f"seed {seed}" for seed in report["seeds"])
    return Table(f"{report['metric']} on {report['data']}", ("arm", "mean", "95 % interval", *seeds), rows)


def _run_replicas(config: ConfigDict, runs: Sequence[RunSpec], workdir: pathlib.Path, stop: Stop, verbose: bool):
    """Trains config.replicas and returns replicas.json: a row each, and the best by val."""
    path = workdir / "replicas.json"
    workdirs.check_options(workdir, options.flatten(config))
    if path.exists():
        manifest.check(workdir)
        table = read_json(path)
        _draw(config.task, table["replicas"], workdir)
        return table
    folders, configs = [workdir / "replicas" / run.levels[REPLICA] for run in runs], [run.config for run in runs]
    with workdirs.lock(workdir):
        write_json(workdir / "config.json", options.flatten(config))
        results = train_together(configs, folders, workdir, verbose=verbose, stop_requested=stop)
        rows = [_row(config.task, *each) for each in zip(config.replicas, folders, results, strict=True)]
        if all(row["error"] for row in rows):
            raise FloatingPointError(
                "\n".join(["all replicas diverged:", *(f"{r['name']}: {r['error']}" for r in rows)])
            )
        table = {"replicas": rows, "best": best_of(config.task, rows)}
        if isinstance(panel := _panel_of(config, folders, rows), dict):
            table["selection"] = panel
        manifest.write(workdir, path.name, table)
    _draw(config.task, rows, workdir)
    return table


def _draw(task: str, rows: Sequence[Mapping[str, Any]], workdir: pathlib.Path) -> None:
    if jax.process_index() == 0 and not (workdir / "replicas.svg").exists():
        with tolerate("replicas.png"), wall.timed("figures"):
            sweep.draw(task, rows, workdir)


def _panel_of(config: ConfigDict, folders: Sequence[pathlib.Path], rows: Sequence[Mapping]) -> dict | str | None:
    """The selection panel over all replicas that ended, seed by seed; see `selection.over_runs`."""
    units: dict[str, list[tuple[str, pathlib.Path]]] = {}
    for changes, folder, row in zip(config.replicas, folders, rows, strict=True):
        own = dict(changes)
        unit = f"seed {own.pop('seed', config.seed)}"
        if not row["error"]:
            told = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in own.items())
            units.setdefault(unit, []).append((told, folder))
    return selection.over_runs(units, folders[0].parents[1], config.resamples)


def name_of(i: int, changes: Mapping[str, Any]) -> str:
    """The folder of a replica: its number and what it sets, such as 03-lr=0.1,weight_decay=0.0001."""
    text = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())
    return f"{i:02}-{re.sub(r'[^-+.,=_a-zA-Z0-9]+', '_', text)[:60]}".rstrip("-_.")


def _row(task: str, changes: Sequence, folder: pathlib.Path, result: dict | FloatingPointError) -> dict[str, Any]:
    """A line of replicas.json; val: the scores at the step that was selected, with the number of examples."""
    row = {"name": folder.name, "options": dict(changes), "error": None, "step": None, "val": None}
    if isinstance(result, FloatingPointError):
        write_json(folder / "failed.json", {"error": f"{type(result).__name__}: {result}"})
        return {**row, "error": str(result)}
    names = [name for name, _ in tasks.METRICS[task].monitor]
    scored = {r["step"]: r for r in read_rows(folder / "metrics.jsonl") if f"val/{names[0]}" in r}
    if at := scored.get(result["step"]):
        count = read_json(folder / "audit.json")["phases"][0]["data"]["val"]["examples"]
        interval = tasks.share_interval(task, at[f"val/{names[0]}"], count)
        row["val"] = {**{name: at[f"val/{name}"] for name in names}, **interval, "count": count}
    return {**row, "step": result["step"]}


def best_of(task: str, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of the replica that val prefers, the earliest among equals; None without val, never by test."""
    return next((row["name"] for row in sweep.ordered(task, rows) if row["val"]), None)
