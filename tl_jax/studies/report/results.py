"""What a study has left on disk, read back: its grid, and the state, numbers and cost of every run."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tl_jax import tasks
from tl_jax.core.files import read_json, read_rows
from tl_jax.core.messages import shorten
from tl_jax.runtime import wall
from tl_jax.studies import store
from tl_jax.studies.report import statistics
from tl_jax.training import finished

COSTS = ("trainable_parameters", "flops_per_step", "flops", "memory_bytes", "seconds", "wall_seconds")
WORDS = {"todo": "missing", "running": "missing (running)", "stale": "missing (its process died)"}
Cell = tuple[str, ...]  # one level of every factor
Unit = tuple[int, str]  # seed and fold: the same unit means the same data, so this is what runs are paired by


class Run(NamedTuple):
    """One run, in a state of store.STATES; scores and cost are empty unless it is done."""

    key: str
    cell: Cell
    unit: Unit
    state: str
    folder: pathlib.Path
    error: str = ""
    scores: Mapping[str, float | None] = {}
    cost: Mapping[str, float | None] = {}
    device: str = ""
    weights: tuple[str, str] = ("", "")  # file and sha256
    missing: tuple[str, ...] = ()  # what of the backbone that file lacks
    split: str = ""  # that is scored: test, or val where there is no test
    sets: Mapping[str, str] = {}  # all that is scored: {name: source and split}

    @property
    def word(self) -> str:
        return WORDS.get(self.state, self.state)


class Results(NamedTuple):
    """A study as it stands: `grid` holds {cell: {unit: run}} in the order of the plan."""

    name: str
    question: str
    factors: Mapping[str, Mapping[str, Mapping[str, Any]]]
    baseline: Mapping[str, str]
    seeds: Sequence[int]
    metrics: Sequence[str]
    design: str
    grid: Mapping[Cell, Mapping[Unit, Run]]

    def runs(self) -> Iterator[Run]:
        return (run for units in self.grid.values() for run in units.values())

    def count_states(self) -> dict[str, int]:
        states = [run.state for run in self.runs()]
        done, failed = states.count("done"), states.count("failed")
        return {"done": done, "failed": failed, "missing": len(states) - done - failed}

    def scores(self, cell: Cell, metric: str) -> dict[Unit, float]:
        found = {unit: run.scores.get(metric) for unit, run in self.grid.get(cell, {}).items()}
        return {unit: value for unit, value in found.items() if value is not None}

    def title(self, cell: Cell, without: Sequence[str] = ()) -> str:
        """A cell in words: its level in a study of one factor, "blocks=1, shots=5" in others."""
        pairs = [pair for pair in zip(self.factors, cell, strict=True) if pair[0] not in without]
        return ", ".join(pair[1] if len(self.factors) == 1 else "=".join(pair) for pair in pairs)

    @property
    def decides(self) -> str:
        """The name of the set of data.extra_eval that the first metric is of; "": the split that every run scores."""
        return self.metrics[0].rpartition("/")[0]

    @property
    def where(self) -> str:
        """The set that decides: one of data.extra_eval, or what runs score, test or val; "" before any result."""
        return self.decides or " or ".join(sorted({run.split for run in self.runs() if run.split}))

    def named(self, metric: str) -> str:
        """A metric with the split that it is of, "accuracy on test"; the name of another set is in it."""
        split = "" if "/" in metric else self._replace(metrics=[metric]).where
        return f"{metric} on {split}" if split else metric

    def level(self, cell: Cell, factor: str) -> str:
        return cell[list(self.factors).index(factor)]

    def with_level(self, cell: Cell, factor: str, level: str) -> Cell:
        return tuple(level if name == factor else own for name, own in zip(self.factors, cell, strict=True))

    def cells_where(self, fixed: Mapping[str, str]) -> list[Cell]:
        return [cell for cell in self.grid if all(self.level(cell, f) == level for f, level in fixed.items())]

    @property
    def test_share(self) -> float | None:
        """n_test / n_train of a resampling design, see `statistics`; None for independent values, as the one of loo."""
        name, _, argument = self.design.partition(":")
        if name == "kfold":  # tests on one fold; a bootstrap on 1/e of the examples
            return 1 / (int(argument.split("x")[0]) - 1)
        return math.exp(-1) / (1 - math.exp(-1)) if name == "bootstrap" else None

    def noun(self, count: int = 2) -> str:
        return ("seed" if self.test_share is None else "fold") + ("" if count == 1 else "s")

    def interval(self, values: Sequence[float], metric: str = "") -> dict:
        """Mean and 95 % interval of one value per unit, corrected where the units share training examples."""
        return statistics.mean_interval(list(values), test_share=self.test_share, bounds=tasks.bounds(metric))


def load(workdir: pathlib.Path) -> Results:
    """Reads W/study.json and W/runs/*; ValueError names the file that is not as planned."""
    plan = store.read_plan(workdir)
    grid: dict[Cell, dict[Unit, Run]] = {}
    for row in plan["runs"]:
        cell, unit = tuple(row["levels"][factor] for factor in plan["factors"]), (row["seed"], row["fold"])
        grid.setdefault(cell, {})[unit] = _load_run(workdir, row["key"], cell, unit)
    found = Results(*(plan[field] for field in Results._fields[:-1]), grid)
    _check_weights(found, workdir)
    return found


def _check_weights(results: Results, workdir: pathlib.Path) -> None:
    """Raises one ValueError for runs that name the same weight file and were trained on different bytes of it."""
    runs: dict[str, dict[str, list[str]]] = {}
    for run in results.runs():
        if all(run.weights):
            runs.setdefault(run.weights[0], {}).setdefault(run.weights[1], []).append(run.key)
    wrong = []
    for file, kinds in runs.items():
        texts = [f"sha256 {sha256[:12]} in {', '.join(shorten(keys, 5))}" for sha256, keys in kinds.items()]
        wrong += [f"{file}: {'; '.join(texts)}"] if len(kinds) > 1 else []
    if wrong:
        fix = "bring back the one file that was meant, remove the folders of the others in runs/, and train these again"
        what = f"{workdir} has runs that name the same weights and were trained on different bytes; {fix}:"
        raise ValueError("\n  ".join([what, *wrong]))


def _load_run(workdir: pathlib.Path, key: str, cell: Cell, unit: Unit) -> Run:
    folder = store.run_folder(workdir, key)
    run = Run(key, cell, unit, store.state(folder), folder)
    try:
        if run.state == "failed":
            return run._replace(error=last_line(read_json(folder / "failed.json", store.FAILED)["error"], workdir))
        if run.state != "done":
            return run
        config = store.read_config(folder)
        result = finished.read(folder)
        cost = read_json(folder / "cost.json") if (folder / "cost.json").exists() else {}
    except ValueError as error:  # a run whose numbers cannot be read is shown as failed, the others as they are
        return run._replace(state="failed", error=last_line(str(error), workdir))
    summaries = {"": result.get("metrics", {})}
    summaries |= {f"{name}/": summary for name, summary in result.get("extra_eval", {}).items()}
    scores = {f"{prefix}{metric}": _finite(entry["value"]) for prefix, summary in summaries.items()
              for metric, entry in summary.items() if isinstance(entry, dict)}  # fmt: skip
    known = {"trainable_parameters": result.get("trainable_parameters"), **cost, "wall_seconds": wall.whole(cost)}
    known_costs = {name: _finite(known.get(name)) for name in COSTS}
    weights = config.model.weights, result.get("weights_sha256", "")
    split = result.get("split", "")
    sets = {split: result["data"]} if split else {}
    sets |= {name: f"{source} {cut}" for name, source, cut in config.data.extra_eval}
    sets = {name: text.encode(errors="backslashreplace").decode() for name, text in sets.items()}
    known = {"weights": weights, "missing": tuple(result.get("missing_weights", ())), "split": split, "sets": sets}
    return run._replace(scores=scores, cost=known_costs, device=cost.get("device") or "", **known)


def last_line(error: str, workdir: pathlib.Path) -> str:
    """The last line of an error, without the path of the study."""
    text = (error.strip().splitlines() or ["no message"])[-1].strip()
    for place in (str(workdir.resolve()), str(workdir)):
        text = text.replace(f"{place}/", "") if len(place) > 1 else text
    return text


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


class Outputs(NamedTuple):
    """What the figures need of one run's predictions: sums over the examples of each bin, and recall by class."""

    count: np.ndarray
    observed: np.ndarray
    expected: np.ndarray
    axes: tuple[str, str]  # what the two before are called
    recall: np.ndarray  # NaN where no example is
    class_names: tuple[str, ...]


def predictions_file(results: Results) -> str:
    """The file of each run that holds the predictions of the set that decides."""
    return f"predictions-{results.decides}.npz" if results.decides else "predictions.npz"


def read_outputs(results: Results) -> tuple[dict[str, Outputs], list[str]]:
    """{key: Outputs} of the finished runs whose task predicts one class, and what could not be read, as sentences.

    They are of the set that decides.
    """
    found, problems = {}, []
    for run in results.runs():
        path = run.folder / predictions_file(results)
        if run.state != "done" or not path.exists():
            continue
        try:
            predictions = tasks.load_predictions(path)
        except ValueError as error:
            problems.append(last_line(str(error), run.folder.parents[1]))
            continue
        if measured := tasks.METRICS[predictions.spec.name].reliability:
            reliability, axes = measured
            count, *means = reliability(predictions)
            confusion = tasks.confusion(predictions)
            support = confusion.sum(axis=1)
            recall = np.where(support > 0, confusion.diagonal() / np.maximum(support, 1), np.nan)
            sums = (np.nan_to_num(count * mean) for mean in means)
            found[run.key] = Outputs(count, *sums, axes, recall, predictions.spec.class_names)
    return found, problems


def curve_column(results: Results) -> str:
    """The column of metrics.jsonl with the metric that selects; classification's where no run has one."""
    columns = [f"val/{metrics.monitor[0][0]}" for metrics in tasks.METRICS.values()]
    return next((name for run in results.runs() for name in columns if len(read_curve(run, name))), columns[0])


def read_curve(run: Run, name: str) -> np.ndarray:
    """Steps and values [points, 2] of a column of metrics.jsonl; empty where there are none."""
    rows = read_rows(run.folder / "metrics.jsonl") if run.state == "done" else []
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array(sorted(points), np.float64).reshape(-1, 2)
