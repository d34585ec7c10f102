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
from tl_jax.runtime.log import tolerate
from tl_jax.studies.report import charts
from tl_jax.tasks.task import Monitor
from tl_jax.training import build, evaluate, finished, inputs, steps
from tl_jax.training.settings import Settings, read
from tl_jax.weights import load as pretrained
from tl_jax.weights import zero_shot

START = "start"
NEEDED = ("config.json", "result.json", "predictions.npz", "model.safetensors")
OWN = ("data.augment", "data.shots", "data.workers", "data.on_error")  # options of data in which runs may differ
SHARED = (
    "model.name",
    "model.image_size",
    "model.channels",
    "model.dtype",
)  # options of the network in which they may not
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

    @property
    def monitor(self) -> Monitor:
        return tasks.METRICS[self.card.task].monitor


class Scorer(NamedTuple):
    predict: Callable[[Variables, str], tasks.Predictions]
    splits: tuple[str, ...]
    scored: str  # the split that the result is about


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

    Ingredients load(i), whose scores on val are alone[i], are tried from the best down by `monitor`, among equals as
    given; one is kept where the first metric of score(average with it) is not worse than without it.
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
    """Reads weights, options and predictions of a finished run; ValueError where a file is missing or was changed."""
    folder = pathlib.Path(folder)
    if missing := [name for name in NEEDED if not (folder / name).exists()]:
        plain = "one plain network (nearest neighbours, adapters and prompts write none)"
        raise ValueError(f"{folder} lacks {', '.join(missing)}; expected the folder of a finished run of {plain}")
    finished.read(folder)
    settings = read(options.read(folder / "config.json"))
    tasks.refuse_language(settings.loop.task, folder)
    loaded = pretrained.load(settings.model.name, folder / "model.safetensors")
    saved = tasks.load_predictions(folder / "predictions.npz")
    model, method = loaded.model.clone(dtype=jnp.dtype(settings.model.dtype)), settings.phases[0].method.name
    return Weights(str(folder), method, settings, model, loaded.variables, loaded.card, saved)


def load_start(end: Weights) -> Weights:
    """The network as a run began, with the random parts of model.reinit, and a head of names or that of its end."""
    if not end.settings.model.weights:
        raise ValueError(f"{end.name} began with random weights, to which no interpolation leads; give a run instead")
    build.check_hashes(end.settings)
    begun = build.load_model(end.settings, end.card.num_classes, end.card.class_names, end.card.columns)
    own = end.settings.model.head_init.startswith(zero_shot.WAYS)  # the zero-shot head, as the paper has it
    params = {**begun.variables["params"], **({} if own else {"head": end.variables["params"]["head"]})}
    return end._replace(name=START, method="", variables={**begun.variables, "params": params}, saved=None)


def check_same(runs: Sequence[Weights]) -> None:
    """Raises one ValueError that lists in what the runs differ: model, classes, preprocessing or data."""
    problems = []
    for other in runs[1:]:
        if lines := messages.difference(_facts(runs[0]), _facts(other)):
            problems += [f"{runs[0].name} -> {other.name}:", *lines]
    if problems:
        expected = "weights can be averaged between runs of the same model, classes and data alone; these differ"
        raise ValueError("\n".join([expected, *problems]))


def make_scorer(weights: Weights) -> Scorer:
    """The evaluation of the run's config on val, test (scored, where there is one) and data.extra_eval."""
    settings, card = weights.settings, weights.card
    if card.parts:
        raise ValueError(f"{weights.name} is a fusion of several networks, whose weights cannot be averaged yet")
    parallel = sharding.make_parallel(settings.loop.parallel, fsdp=settings.loop.fsdp)
    found = inputs.load_sources(settings, card.form)
    data = {name: found[name].opened() for name in inputs.scored_names(found, settings)}
    if any(source.class_names != card.class_names for source in data.values()):
        raise ValueError(f"the data of {weights.name} have other classes by now than when it ran: {card.class_names}")
    size = parallel.round_up(min(settings.loop.eval_batch_size, max(map(len, data.values()))))
    views, spec = {card.input: pipeline.View(card)}, tasks.spec_of(card)
    workers, reader = settings.data.workers, steps.Reader(weights.model, card, card.input)
    batches = {split: pipeline.eval_batches(data[split], views, size, num_workers=workers) for split in data}
    eval_fn = parallel.evaluate(steps.make_eval_step(reader, tasks.make(spec)))

    def predict(variables: Variables, split: str) -> tasks.Predictions:
        return evaluate.predict(eval_fn, parallel.place(variables), batches[split], card.input, spec, parallel)

    return Scorer(predict, tuple(data), "test" if "test" in data else "val")


def wise_ft(a: Weights, b: Weights, folder: str | pathlib.Path, alphas: int = 11) -> dict[str, Any]:
    """Scores `alphas` networks from a (alpha 0) to b (alpha 1) on every split, and writes the curve and the chosen one.

    Alpha is chosen on val as training selects, then by nearness to b; without val it is UNTUNED. Returns curve.json.
    """
    if alphas < 2:
        raise ValueError(f"alphas={alphas}: expected at least the two ends")
    check_same([a, b])
    scorer, values = make_scorer(b), np.linspace(0, 1, alphas).tolist()
    curves: dict[str, dict[str, list]] = {split: {name: [] for name, _ in b.monitor} for split in scorer.splits}
    chosen, best = UNTUNED, None
    for alpha in values:
        variables = interpolate(a.variables, b.variables, alpha)
        for split in scorer.splits:
            predictions = scorer.predict(variables, split)
            if split == scorer.scored and alpha in (0, 1):
                _check_saved(b if alpha else a, predictions)
            scores = tasks.scores(predictions)
            for name, value in scores.items():
                curves[split][name].append(value)
            if split == "val" and (best is None or tasks.preference(b.monitor, scores) >= best):
                chosen, best = alpha, tasks.preference(b.monitor, scores)
    report = {name: {"run": end.name, "method": end.method} for name, end in (("a", a), ("b", b))}
    report |= {"alphas": values, "curves": curves, "chosen": chosen, "chosen_on_scored_split": scorer.scored == "val"}
    folder = pathlib.Path(folder)
    report |= _write(scorer, interpolate(a.variables, b.variables, chosen), b, folder)
    files.write_json(folder / "curve.json", report)  # where it lies, the rest does, but for the figure
    with tolerate("curve.png"):
        for suffix in ("png", "svg"):
            _draw_curve(folder / f"curve.{suffix}", report, b.monitor[0][0])
    return report


def _draw_curve(path: pathlib.Path, report: dict[str, Any], metric: str) -> None:
    """The metric against alpha, and on data.extra_eval against the scored split (Wortsman et al. 2022a, figure 1)."""
    scored, extra = report["split"], report["extra_eval"]
    curves = {split: scores[metric] for split, scores in report["curves"].items()}
    names = (plotting.short(f"{report[end]['method']} {pathlib.Path(report[end]['run']).name}".strip()) for end in "ab")
    along = {split: {"x": report["alphas"], "mean": curve} for split, curve in curves.items()}
    against = {split: {"x": curves[scored], "mean": curves[split]} for split in extra}
    for split, line in against.items():
        line["circle"] = [summary[metric]["value"] for summary in (report["metrics"], extra[split])]
    panels = {f"chosen: alpha {report['chosen']:g}": along}
    panels |= {"extra_eval, chosen alpha circled": against} if extra else {}
    labels = ["alpha, from 0: {}\nto 1: {}".format(*names), f"{metric} on {scored}"]
    charts.lines(path, panels, labels[: len(panels)], metric, order=list(curves))


def soup(folders: Sequence[str | pathlib.Path], folder: str | pathlib.Path) -> dict[str, Any]:
    """The greedy soup of finished runs, with the uniform one and the best single run; writes soup.json and returns it.

    Ingredients are tried and kept by val alone; then the three are scored on test, once. Memory: one run, and the soup.
    """
    runs = [load(path)._replace(variables=None) for path in folders]
    if len(runs) < 2:
        raise ValueError(f"a soup needs at least two runs, found {len(runs)}")
    check_same(runs)
    scorer, monitor = make_scorer(runs[0]), runs[0].monitor
    if "val" not in scorer.splits:
        raise ValueError("a soup is chosen on val, and these runs have none; run them anew with a data.val")

    def load_variables(i: int) -> Variables:
        return pretrained.load(runs[i].settings.model.name, runs[i].name).variables

    def score(variables: Variables) -> dict[str, float]:
        return tasks.scores(scorer.predict(variables, "val"))

    alone = [score(load_variables(i)) for i in range(len(runs))]
    kept, chosen = greedy(alone, load_variables, score, monitor)
    others = {"uniform": average(map(load_variables, range(len(runs)))), "best": load_variables(kept[0])}
    order = dict.fromkeys([*kept, *range(len(runs))])
    report = {
        "ingredients": [{"run": runs[i].name, "val": alone[i], "kept": i in kept} for i in order],
        "val": {"greedy": score(chosen), "uniform": score(others["uniform"]), "best": alone[kept[0]]},
        "chosen_on_scored_split": scorer.scored == "val",
    }
    folder = pathlib.Path(folder)
    report |= _write(scorer, chosen, runs[0], folder)
    predictions = {name: scorer.predict(variables, scorer.scored) for name, variables in others.items()}
    _check_saved(runs[kept[0]], predictions["best"])
    resamples = runs[0].settings.loop.resamples
    report |= {name: tasks.summarize(other, resamples=resamples) for name, other in predictions.items()}
    named = {"best run": "best", "uniform soup": "uniform", "greedy soup": "metrics"}
    rows = {name: report[key][monitor[0][0]] for name, key in named.items()}
    files.write_json(folder / "soup.json", report)
    with tolerate("soup.png"):
        for suffix in ("png", "svg"):
            charts.comparison(folder / f"soup.{suffix}", rows, f"{scorer.scored} {monitor[0][0]}")
    return report


def _facts(weights: Weights) -> dict[str, Any]:
    """What two runs must share, as a flat table."""
    flat, card = weights.settings.table, dataclasses.asdict(weights.card.replace(source="", licence="", sha256=""))
    data = {key: value for key, value in flat.items() if key.startswith("data.") and key not in OWN}
    return {key: flat[key] for key in SHARED} | data | {f"card {key}": value for key, value in card.items()}


def _check_saved(weights: Weights, predictions: tasks.Predictions) -> None:
    """Raises ValueError where a run's file predicts otherwise than the run did: it is not the whole of the network."""
    if (saved := weights.saved) is None:
        return
    same = np.array_equal(saved.ids, predictions.ids)
    changed = int(tasks.METRICS[saved.spec.name].differ(saved, predictions).sum()) if same else len(saved.ids)
    if changed > max(1, CHANGED * len(saved.ids)):
        told = f"model.safetensors of {weights.name} predicts {changed} of {len(saved.ids)} examples otherwise than its"
        why = "the file or the data have changed, or the file is not all of its network"
        raise ValueError(f"{told} predictions.npz says: {why}")


def _write(scorer: Scorer, variables: Variables, weights: Weights, folder: pathlib.Path) -> dict[str, Any]:
    """Scores the chosen network at last, and writes it with its predictions; returns the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    summaries = {}
    for split in (scorer.scored, *(split for split in scorer.splits if split not in ("val", "test"))):
        predictions, suffix = scorer.predict(variables, split), "" if split == scorer.scored else f"-{split}"
        tasks.save_predictions(folder / f"predictions{suffix}.npz", predictions)
        summaries[split] = tasks.summarize(predictions, resamples=weights.settings.loop.resamples)
    pretrained.export(variables, weights.settings.model.name, folder / "model.safetensors", card=weights.card)
    return {"split": scorer.scored, "metrics": summaries.pop(scorer.scored), "extra_eval": summaries}
