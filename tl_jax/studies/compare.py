"""Two arms, several seeds: the experiment against its baseline, paired by seed."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from rich import box
from rich.table import Table
from scipy import stats

from tl_jax import audit, metrics, plots, trees
from tl_jax.logging import say
from tl_jax.train import flat_options, train


def arms(config: ConfigDict) -> dict[str, dict[int, ConfigDict]]:
    """The configs to run, `{arm: {seed: config}}`; a config without seeds and baseline is its own only run.

    Raises ValueError for seeds named twice and for options of the baseline that do not exist.
    """
    known = flat_options(config)
    problems = [
        f"baseline option {key!r} does not exist{trees.nearest(key, known)}"
        for key, _ in config.baseline
        if key not in known
    ]
    if len({config.seed, *config.seeds}) <= len(config.seeds):
        problems.append(
            f"seed={config.seed} and seeds={tuple(config.seeds)} name a seed twice; seeds are those besides seed"
        )
    if problems:
        raise ValueError("; ".join(problems))
    names = {"transfer": {}} | ({"baseline": dict(config.baseline)} if config.baseline else {})
    runs = {}
    for arm, overrides in names.items():
        runs[arm] = {}
        for seed in (config.seed, *config.seeds):
            run = config.copy_and_resolve_references()
            with run.unlocked():
                run.seeds, run.baseline = (), ()
            run.update_from_flattened_dict(overrides)
            run.seed = seed
            runs[arm][seed] = run.lock()
    return runs


def compare(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs every arm with every seed and writes comparison.json and comparison.png.

    The first seed of the experiment itself lies in `workdir`, the others in `workdir/runs/ARM-seedN`; a run
    that has its result is not run again.
    """
    runs = arms(config)
    first = (next(iter(runs)), config.seed)
    results, folders = {}, {}
    for arm, seeds in runs.items():
        for seed, run in seeds.items():
            folder = workdir if (arm, seed) == first else workdir / "runs" / f"{arm}-seed{seed}"
            opens = seed == config.seed  # each arm shows its first run, the others are one line
            if opens and len(runs) * len(seeds) > 1:
                say(f"\n{arm}, seeds {list(seeds)}")
            results[arm, seed], folders[arm, seed] = train(run, folder, verbose=opens), folder
            say(f"{arm}, seed {seed}: accuracy {results[arm, seed]['metrics']['accuracy']['value']:.3f} in {folder}")
    table = {arm: [results[arm, seed]["metrics"]["accuracy"]["value"] for seed in seeds] for arm, seeds in runs.items()}
    report = {
        "split": results[first]["data"],
        "seeds": list(runs[first[0]]),
        "accuracy": {arm: {"values": values, **mean_interval(values)} for arm, values in table.items()},
    }
    if "baseline" in table:
        differences = [a - b for a, b in zip(table["transfer"], table["baseline"], strict=True)]
        report["difference"] = {"values": differences, **mean_interval(differences)}
        predictions = [metrics.load_predictions(folders[arm, config.seed] / "predictions.npz") for arm in runs]
        report["difference_on_these_examples"] = metrics.paired_difference(*predictions, resamples=config.resamples)
    if len(results) > 1:
        audit.write_json(workdir / "comparison.json", report)
        plots.comparison(table, workdir / "comparison.png")
    return report


def mean_interval(values: list[float], level: float = 0.95) -> dict[str, float | None]:
    """The mean over seeds and its Student-t interval, n - 1 degrees of freedom; no interval from one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf(0.5 + level / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def to_table(report: Mapping[str, Any]) -> Table:
    """The comparison for the console."""
    table = Table(title=f"accuracy on {report['split']}, seeds {report['seeds']}", box=box.SIMPLE_HEAD)
    for name in ("arm", "mean", "95 % interval", "each seed"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    rows = dict(report["accuracy"])
    if "difference" in report:
        rows["transfer - baseline"] = report["difference"]
    for name, row in rows.items():
        interval = f"{row['low']:.3f} .. {row['high']:.3f}" if row["low"] is not None else "-"
        table.add_row(name, f"{row['mean']:.3f}", interval, "  ".join(f"{value:.3f}" for value in row["values"]))
    return table
