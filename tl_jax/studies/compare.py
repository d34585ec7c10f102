"""Two arms, several seeds: the experiment against its baseline, paired by seed."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict
from rich import box
from rich.table import Table

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core.files import write_json
from tl_jax.runtime.log import say
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies.report.statistics import mean_interval
from tl_jax.training.loop import train


def arms(config: ConfigDict) -> dict[str, dict[int, ConfigDict]]:
    """The configs to run, `{arm: {seed: config}}`; a config without seeds and baseline is its own only run.

    Raises ValueError for seeds named twice and for options of the baseline that do not exist.
    """
    options.check(config)
    problems = [
        f"baseline sets {key!r}, which every arm shares"
        for key, _ in config.baseline
        if key in ("seed", "seeds", "baseline")
    ]
    if len({config.seed, *config.seeds}) <= len(config.seeds):
        problems.append(
            f"seed={config.seed}, seeds={tuple(config.seeds)}: a seed is named twice; seeds are the further ones"
        )
    if problems:
        raise ValueError("; ".join(problems))
    overrides = {"transfer": {}} | ({"baseline": dict(config.baseline)} if config.baseline else {})
    runs: dict[str, dict[int, ConfigDict]] = {arm: {} for arm in overrides}
    for arm, changes in overrides.items():
        for seed in (config.seed, *config.seeds):
            try:
                run = options.override(config, {**changes, "seed": seed, "seeds": (), "baseline": ()})
            except ValueError as error:
                raise ValueError(f"baseline={tuple(config.baseline)}, seeds={tuple(config.seeds)}: {error}") from None
            options.check(run)
            runs[arm][seed] = run
    if "baseline" in runs and options.flatten(runs["baseline"][config.seed]) == options.flatten(
        runs["transfer"][config.seed]
    ):
        raise ValueError(f"the baseline {tuple(config.baseline)} changes nothing: both arms would be the same run")
    return runs


def compare(
    config: ConfigDict, workdir: pathlib.Path, stop_requested: Callable[..., bool] = lambda step=0: False
) -> dict[str, Any]:
    """Runs every arm with every seed and returns {"result": of the first run, "comparison": None for a lone run}.

    The first seed of the experiment itself lies in `workdir`, the others in `workdir/runs/ARM-seedN`; a run that
    has its result is not run again. Several runs leave comparison.json and comparison.png.
    """
    runs, results, folders = arms(config), {}, {}
    metric = tasks.METRICS[config.get("task", tasks.Spec().name)].monitor[0][0]
    several = len(runs) * len(next(iter(runs.values()))) > 1
    for arm, seeds in runs.items():
        for seed, run in seeds.items():
            if stop_requested():
                raise Preempted(f"stopped before {arm}, seed {seed}")
            opens = seed == config.seed  # each arm shows its first run, the others are one line
            if opens and several:
                say(f"\n{arm}, seeds {list(seeds)}")
            folder = workdir if not results else workdir / "runs" / f"{arm}-seed{seed}"
            results[arm, seed] = train(run, folder, verbose=opens, stop_requested=stop_requested)
            folders[arm, seed] = folder
            if several:
                say(f"{arm}, seed {seed}: {metric} {results[arm, seed]['metrics'][metric]['value']:.3f} in {folder}")
    first = results["transfer", config.seed]
    if not several:
        return {"result": first, "comparison": None}

    table = {arm: [results[arm, seed]["metrics"][metric]["value"] for seed in seeds] for arm, seeds in runs.items()}
    report = {
        "data": first["data"],
        "seeds": list(runs["transfer"]),
        "metric": metric,
        metric: {arm: {"values": values, **mean_interval(values)} for arm, values in table.items()},
    }
    if "baseline" in table:
        differences = [a - b for a, b in zip(*table.values(), strict=True)]
        report["difference"] = {"values": differences, **mean_interval(differences)}
        report["difference_by_seed_over_examples"] = {
            str(seed): tasks.paired_difference(
                *(tasks.load_predictions(folders[arm, seed] / "predictions.npz") for arm in runs),
                resamples=config.resamples,
            )
            for seed in report["seeds"]
        }
    if jax.process_index() == 0:
        write_json(workdir / "comparison.json", report)
        from tl_jax.training import plots  # here, as matplotlib takes its time

        plots.comparison(
            table, workdir / "comparison.png", f"{metric} on {report['data']}, {len(report['seeds'])} seeds"
        )
    return {"result": first, "comparison": report}


def to_table(report: Mapping[str, Any]) -> Table:
    """The comparison for the console."""
    title = f"{report['metric']} on {report['data']}, seeds {report['seeds']}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("arm", "mean", "95 % interval", "each seed"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    rows = dict(report[report["metric"]])
    if "difference" in report:
        rows["transfer - baseline"] = report["difference"]
    for name, row in rows.items():
        interval = f"{row['low']:.3f} .. {row['high']:.3f}" if row["low"] is not None else "-"
        table.add_row(name, f"{row['mean']:.3f}", interval, "  ".join(f"{value:.3f}" for value in row["values"]))
    return table
