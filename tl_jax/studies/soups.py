"""Averages of the weights of finished runs: interpolation (WiSE-FT) and model soups, chosen on val.

python -m tl_jax wise_ft RUN_A RUN_B --out FOLDER    RUN_A may be `start`: the weights RUN_B began with
python -m tl_jax soup RUN RUN ... --out FOLDER
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import files, messages, plotting
from tl_jax.core.card import Card
from tl_jax.data import pipeline
from tl_jax.runtime import sharding
from tl_jax.studies.report import charts
from tl_jax.tasks.task import Monitor
from tl_jax.training import build, evaluate, inputs, steps
from tl_jax.training.settings import Settings, read
from tl_jax.weights import load as pretrained

START = "start"
NEEDED = ("config.json", "result.json", "predictions.npz", "model.safetensors")
OWN = ("data.augment", "data.shots", "data.workers", "data.on_error")  # options of data in which runs may differ
SHARED = ("model.name", "model.image_size", "model.dtype")  # options of the network in which they may not
CHANGED = 0.01  # the share of predicted classes that may change when a run is scored anew, on another device
UNTUNED = 0.5  # alpha where there is no val to choose it by, as Wortsman et al. 2022a recommend

Variables = dict[str, Any]


class Weights(NamedTuple):
    """A run's model.safetensors, options and predictions; name is its folder, or START, which has no predictions."""

    name: str
    method: str
    settings: Settings
    model: Any
    variables: Variables
    card: Card
    saved: tasks.Predictions | None


class Scorer(NamedTuple):
    """The evaluation that several weights share.

    predict: (variables, split) -> predictions. splits: those of val, test and data.extra_eval that there are. scored:
    the one that the result is about, test or else val.
    """

    predict: Callable[[Variables, str], tasks.Predictions]
    splits: tuple[str, ...]
    scored: str


def interpolate(a: Variables, b: Variables, alpha: float) -> Variables:
    """(1 - alpha) a + alpha b, of all collections, in float64 (Wortsman et al. 2022a, Robust fine-tuning, eq. 1)."""

    def between(x, y):
        mixed = (1 - alpha) * np.asarray(x, np.float64) + alpha * np.asarray(y, np.float64)
        return mixed.astype(np.asarray(x).dtype)

    return jax.tree.map(between, a, b)


def average(ingredients: Iterable[Variables]) -> Variables:
    """The mean of several variables, leaf by leaf, batch_stats too: the uniform soup (Wortsman et al. 2022b)."""
    soup: Variables = {}
    for count, variables in enumerate(ingredients, 1):
        soup = interpolate(soup, variables, 1 / count) if soup else variables
    return soup


def greedy(
    alone: Sequence[dict[str, float]], load: Callable[[int], Variables],
    score: Callable[[Variables], dict[str, float]], monitor: Monitor,
) -> tuple[list[int], Variables]:  # fmt: skip
    """The greedy soup (Wortsman et al. 2022b, Model soups, recipe 1): what went in, in order, and its variables.

    alone: the scores of each ingredient on val, whose variables are load(i). They are tried from the best down by
    `monitor`, among equals as given; one is kept where the first metric of score(average with it) is not worse than
    that of the soup without it.
    """
    first, *rest = sorted(range(len(alone)), key=lambda i: tasks.preference(monitor, alone[i]), reverse=True)
    kept, soup, best = [first], load(first), tasks.preference(monitor[:1], alone[first])
    for i in rest:
        candidate = interpolate(soup, load(i), 1 / (len(kept) + 1))
        value = tasks.preference(monitor[:1], score(candidate))
        if value >= best:
            kept, soup, best = [*kept, i], candidate, value
    return kept, soup


def load(folder: str | pathlib.Path) -> Weights:
    """Reads the weights, the options and the predictions of a finished run; ValueError where something is missing."""
    folder = pathlib.Path(folder)
    if missing := [name for name in NEEDED if not (folder / name).exists()]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}; expected the folder of a finished run whose result is one plain "
            "network (nearest neighbours, adapters and prompts write none)"
        )
    settings = read(options.from_flat(files.read_json(folder / "config.json")))
    loaded = pretrained.load(settings.model.name, folder / "model.safetensors")
    saved = tasks.load_predictions(folder / "predictions.npz")
    model, method = loaded.model.clone(dtype=jnp.dtype(settings.model.dtype)), settings.phases[0].method.name
    return Weights(str(folder), method, settings, model, loaded.variables, loaded.card, saved)


def load_start(end: Weights) -> Weights:
    """The network as a run began, with the random parts of model.reinit, under the head that the run ended with."""
    if not end.settings.model.weights:
        raise ValueError(f"{end.name} began with random weights, to which no interpolation leads; give a run instead")
    begun = build.load_model(end.settings, end.card.num_classes, end.card.class_names, end.card.columns)
    params = {**begun.variables["params"], "head": end.variables["params"]["head"]}
    return end._replace(name=START, method="", variables={**begun.variables, "params": params}, saved=None)


def check_same(runs: Sequence[Weights]) -> None:
    """Raises one ValueError that lists in what the runs differ: model, classes, preprocessing or data."""
    first, problems = _facts(runs[0]), []
    for other in runs[1:]:
        if lines := messages.difference(first, _facts(other)):
            problems.append("\n".join([f"{runs[0].name} -> {other.name}:", *lines]))
    if problems:
        expected = "weights can be averaged between runs of the same model, classes and data alone; these differ"
        raise ValueError("\n".join([expected, *problems]))


def make_scorer(weights: Weights) -> Scorer:
    """The evaluation of the run's config on val, test and data.extra_eval."""
    settings, card = weights.settings, weights.card
    parallel = sharding.make_parallel(settings.loop.parallel, fsdp=settings.loop.fsdp)
    found = inputs.load_sources(settings)
    data = {name: found[name] for name in inputs.scored_names(found, settings)}
    if any(source.class_names != card.class_names for source in data.values()):
        raise ValueError(f"the data of {weights.name} have other classes by now than when it ran: {card.class_names}")
    size = parallel.round_up(min(settings.loop.eval_batch_size, max(map(len, data.values()))))
    views, spec = {card.input: pipeline.View(card)}, tasks.spec_of(card)
    batches = {split: pipeline.eval_batches(source, views, size, num_workers=settings.data.workers)
               for split, source in data.items()}  # fmt: skip
    reader = steps.Reader(weights.model, card, card.input)
    eval_fn = parallel.evaluate(steps.make_eval_step(reader, tasks.make(spec)))

    def predict(variables: Variables, split: str) -> tasks.Predictions:
        return evaluate.predict(eval_fn, parallel.place(variables), batches[split], card.input, spec, parallel)

    return Scorer(predict, tuple(data), _scored(data))


def wise_ft(a: Weights, b: Weights, folder: str | pathlib.Path, alphas: int = 11) -> dict[str, Any]:
    """Scores `alphas` networks from a (alpha 0) to b (alpha 1) on every split, and writes the curve and the chosen one.

    Alpha is chosen on val as training selects, then by nearness to b; without val it is UNTUNED. Returns curve.json.
    """
    if alphas < 2:
        raise ValueError(f"alphas={alphas}: expected at least the two ends")
    check_same([a, b])
    scorer, values, monitor = make_scorer(b), np.linspace(0, 1, alphas).tolist(), monitor_of(b)
    curves: dict[str, dict[str, list]] = {split: {name: [] for name, _ in monitor} for split in scorer.splits}
    for alpha in values:
        variables = interpolate(a.variables, b.variables, alpha)
        for split in scorer.splits:
            predictions = scorer.predict(variables, split)
            if split == scorer.scored and alpha in (0, 1):
                _check_saved(b if alpha else a, predictions)
            for name, value in tasks.scores(predictions).items():
                curves[split][name].append(value)
    chosen = UNTUNED
    if "val" in curves:
        points = [dict(zip(curves["val"], point, strict=True)) for point in zip(*curves["val"].values(), strict=True)]
        preferences = [tasks.preference(monitor, point) for point in points]
        _, chosen = max(zip(preferences, values, strict=True))
    ends = {name: {"run": end.name, "method": end.method} for name, end in (("a", a), ("b", b))}
    report = {**ends, "alphas": values, "curves": curves, "chosen": chosen,
              "chosen_on_scored_split": scorer.scored == "val"}  # fmt: skip
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_curve(report, folder / "curve.png")
    report |= _write(scorer, interpolate(a.variables, b.variables, chosen), b, folder)
    files.write_json(folder / "curve.json", report)  # last: where it lies, the rest does
    return report


def soup(folders: Sequence[str | pathlib.Path], folder: str | pathlib.Path) -> dict[str, Any]:
    """The greedy soup of finished runs, with the uniform one and the best single run; writes soup.json and returns it.

    Ingredients are tried and kept by val alone; then the three are scored on test, once. Memory: one run, and the soup.
    """
    runs = [load(path)._replace(variables=None) for path in folders]
    if len(runs) < 2:
        raise ValueError(f"a soup needs at least two runs, found {len(runs)}")
    check_same(runs)
    scorer = make_scorer(runs[0])
    if "val" not in scorer.splits:
        raise ValueError("a soup is chosen on val, and these runs have none; run them anew with a data.val")

    def load_variables(i: int) -> Variables:
        return load(runs[i].name).variables

    def score(variables: Variables) -> dict[str, float]:
        return tasks.scores(scorer.predict(variables, "val"))

    alone = [score(load_variables(i)) for i in range(len(runs))]
    kept, chosen = greedy(alone, load_variables, score, monitor_of(runs[0]))
    others = {"uniform": average(map(load_variables, range(len(runs)))), "best": load_variables(kept[0])}
    order = [*kept, *(i for i in range(len(runs)) if i not in kept)]
    report = {
        "ingredients": [{"run": runs[i].name, "val": alone[i], "kept": i in kept} for i in order],
        "val": {"greedy": score(chosen), "uniform": score(others["uniform"]), "best": alone[kept[0]]},
        "chosen_on_scored_split": scorer.scored == "val",
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report |= _write(scorer, chosen, runs[0], folder)
    predictions = {name: scorer.predict(variables, scorer.scored) for name, variables in others.items()}
    _check_saved(runs[kept[0]], predictions["best"])
    resamples, metric = runs[0].settings.loop.resamples, monitor_of(runs[0])[0][0]
    report |= {name: tasks.summarize(other, resamples=resamples) for name, other in predictions.items()}
    named = {"best run": "best", "uniform soup": "uniform", "greedy soup": "metrics"}
    rows = {name: report[key][metric] for name, key in named.items()}
    charts.comparison(folder / "soup.png", rows, f"{scorer.scored} {metric}")
    files.write_json(folder / "soup.json", report)
    return report


def draw_curve(report: dict[str, Any], path: pathlib.Path) -> None:
    """The first metric of every split against alpha; next to it that of data.extra_eval against that of the data."""
    alphas, curves = report["alphas"], report["curves"]
    metric = next(iter(next(iter(curves.values()))))
    scored, extra = _scored(curves), _extra(curves)
    columns, names = 1 + bool(extra), [_named(report[end]) for end in "ab"]
    with plotting.figure_at(path, (4.4 * columns, 3.4), columns=columns) as (_, axes):
        colours = {split: plotting.PALETTE[i % len(plotting.PALETTE)] for i, split in enumerate(curves)}
        for split, colour in colours.items():
            axes[0].plot(alphas, curves[split][metric], "o-", color=colour, markersize=3, label=split)
        axes[0].axvline(report["chosen"], color=plotting.GREY, linestyle=":", linewidth=1)
        axes[0].set(xlabel="alpha", ylabel=metric, title=f"chosen: alpha {report['chosen']:g}")
        axes[0].set_xticks([0, 0.5, 1], [f"0\n{names[0]}", "0.5", f"1\n{names[1]}"])
        axes[0].grid(True)
        axes[0].legend(loc="best")
        for split in extra:
            x, y = curves[scored][metric], curves[split][metric]
            axes[1].plot(x, y, "o-", color=colours[split], markersize=3, linewidth=1.2, label=split)
            for end, marker, name in ((0, "s", names[0]), (-1, "D", names[1])):
                axes[1].plot(x[end], y[end], marker, color=colours[split], markersize=6)
                axes[1].annotate(name, (x[end], y[end]), xytext=(4, 4), textcoords="offset points", fontsize=7)
        if extra:
            axes[1].set(xlabel=f"{metric}, {scored}", ylabel=f"{metric}, extra_eval", title="one point per alpha")
            axes[1].grid(True)
            axes[1].legend(loc="best")


def _named(end: dict[str, str]) -> str:
    return plotting.short(" ".join(filter(None, (end["method"], pathlib.Path(end["run"]).name))))


def _facts(weights: Weights) -> dict[str, Any]:
    """What two runs must share, as a flat table."""
    flat, card = weights.settings.table, dataclasses.asdict(weights.card.replace(source="", licence="", sha256=""))
    data = {key: value for key, value in flat.items() if key.startswith("data.") and key not in OWN}
    return {key: flat[key] for key in SHARED} | data | {f"card {key}": value for key, value in card.items()}


def _scored(splits: Iterable[str]) -> str:
    return "test" if "test" in splits else "val"


def _extra(splits: Iterable[str]) -> list[str]:
    """The names of data.extra_eval."""
    return [split for split in splits if split not in ("val", "test")]


def monitor_of(weights: Weights) -> Monitor:
    """What selects among networks of this task."""
    return tasks.METRICS[weights.card.task].monitor


def _check_saved(weights: Weights, predictions: tasks.Predictions) -> None:
    """Raises ValueError where a run's file predicts otherwise than the run did: it is not the whole of the network."""
    if (saved := weights.saved) is None:
        return
    same = saved.ids.shape == predictions.ids.shape and (saved.ids == predictions.ids).all()
    changed = int(tasks.METRICS[saved.spec.name].differ(saved, predictions).sum()) if same else len(saved.ids)
    if changed > max(1, CHANGED * len(saved.ids)):
        raise ValueError(
            f"model.safetensors of {weights.name} predicts {changed} of {len(saved.ids)} examples otherwise than its "
            "predictions.npz says: the file or the data have changed since the run, or the file is not all of its "
            "network"
        )


def _write(scorer: Scorer, variables: Variables, weights: Weights, folder: pathlib.Path) -> dict[str, Any]:
    """Scores the chosen network at last, and writes it with its predictions; returns the numbers."""
    summaries = {}
    for split in (scorer.scored, *_extra(scorer.splits)):
        predictions = scorer.predict(variables, split)
        suffix = "" if split == scorer.scored else f"-{split}"
        tasks.save_predictions(folder / f"predictions{suffix}.npz", predictions)
        summaries[split] = tasks.summarize(predictions, resamples=weights.settings.loop.resamples)
    pretrained.export(variables, weights.settings.model.name, folder / "model.safetensors", card=weights.card)
    return {"split": scorer.scored, "metrics": summaries.pop(scorer.scored), "extra_eval": summaries}
