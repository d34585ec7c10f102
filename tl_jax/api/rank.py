"""Which network suits a task: transferability scores of several on the same labelled data, and how far they agree."""

import io
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy  # loads its parts when they are used

from tl_jax import tasks
from tl_jax.api import inputs, run
from tl_jax.api import model as models
from tl_jax.core import checks, console
from tl_jax.core.console import Table
from tl_jax.data import pipeline, resample, sources
from tl_jax.data.examples import Source
from tl_jax.methods import scores as transferability
from tl_jax.models import head as heads
from tl_jax.models import peft
from tl_jax.runtime import sharding, wall
from tl_jax.runtime.compile_cache import keep_compiled_programs
from tl_jax.tasks import answers
from tl_jax.training import feature_cache, frozen_columns, steps
from tl_jax.weights import load

METHODS = ("linear_probe", "full")  # of the short runs
FOLD = "kfold:5:0"  # of the split, on which they are scored
FEW = 5  # networks, below which an agreement tells little
BATCH = 64
Row = dict[str, Any]


class Candidate(NamedTuple):
    """A network that is ready to read its data. classifies: its own head gives classes from the features."""

    label: str
    network: models.Model
    source: Source
    batches: pipeline.EvalBatches
    classifies: bool


class Ranking(dict):
    """What `rank` returns, as plain JSON-able data; shown as tables.

    data, examples, scores (names), networks: rows {network, weights, features, cached, features_per_second, scores,
    ranks, mean_rank, verified}, the best first; agreement: {score: {score: weighted Kendall's tau}}; notes.
    """

    def __repr__(self) -> str:
        return "\n\n".join([*(console.fitted(table, console.WIDE) for table in self.tables), *self["notes"]])

    @property
    def tables(self) -> list[Table]:
        """The networks, and where there are several the agreement."""
        rows, names = self["networks"], [*self["scores"], *self["networks"][0]["verified"]]
        caption = f"{self['data']}, {self['examples']:,} examples: score (rank)"
        found = [Table(caption, ("network", *names, "mean rank", "features/s"), [_cells(row) for row in rows])]
        counts = {name: sum(name in row["ranks"] for row in rows) for name in names}
        several = [name for name in names if counts[name] > 1]
        if self["agreement"]:
            table = [(a, f"{counts[a]}", *(_tau_text(self["agreement"][a][b]) for b in several)) for a in several]
            caption = "agreement: weighted Kendall's tau over the n networks that have both"
            found.append(Table(caption, ("score", "n", *several), table))
        return found

    def write_csv(self, file: io.TextIOBase) -> None:
        """One row a network."""
        keys = ("network", "weights", "mean_rank", "features", "cached", "features_per_second")
        own = [{key: row[key] for key in keys} | row["scores"] | row["verified"] for row in self["networks"]]
        answers.write_csv(own, file)


def rank(
    data: Any,
    weights: Sequence[str | models.Model],
    *,
    split: str = "train",
    task: str = "classification",
    labels: Sequence[str] = (),
    text: Sequence[str] = (),
    image_size: int | tuple[int, int] = 0,
    shots: int = 0,
    seed: int = 0,
    scores: Sequence[str] = (),
    verify: int = 0,
    cache_dir: str = "",
) -> Ranking:
    """Ranks networks for a labelled task by what they make of it as they are; see docs/choosing.md.

    data: as for `fit`. weights: each "FILE" whose card names its network, "NAME=FILE", "NAME=" for random weights,
    what else `load` takes, or a network that it gave. image_size: of the networks that are named. split: the examples,
    never of test; shots: only so many of each class. seed: of these, of random weights and of the short runs.
    scores: of `methods.scores.SCORES`, all that fit the labels unless given. verify: so many steps for which a linear
    probe and the whole of each network are trained on four fifths of the split, and scored on the last fifth. The
    features are those that a linear probe with cache=features of the same examples reads. One ValueError for all that
    cannot be ranked, before any feature is computed.
    """
    asked = {"labels": tuple(labels), "text": tuple(text)}
    _check(data, weights, split, shots, verify)
    keep_compiled_programs()
    opened = _open_all(weights, data, split, task, asked, {"shots": shots, "seed": seed}, image_size)
    source, parallel, rows, notes = opened[0].source, sharding.make_parallel(), [], []
    names = transferability.names_for(source.label_kind, scores)
    held_out = resample.split(source.labels, FOLD, 0, source.groups)[1] if verify else ()  # raises, before any work
    for candidate in console.counted("networks", opened, len(opened)):
        rows.append(_score(candidate, names, parallel, cache_dir))
    if lacking := [row["network"] for row in rows if None in row["scores"].values()]:
        notes.append(f"{', '.join(lacking)}: no classifier of its own for classes, which leep and nce read")
    if verify:
        how = {"data.train": split, "total": (float(verify), "steps"), "seed": seed}
        how |= {f"data.{key}": value for key, value in asked.items() if value}
        for row, candidate in zip(rows, console.counted("runs", opened, len(opened)), strict=True):
            row["verified"] = _verify(candidate, data, task, how, cache_dir)
        metric, side = tasks.METRICS[task].monitor[0]
        told = f"{' and '.join(METHODS)}: {metric} on {len(held_out)} examples, after {verify} steps on the others"
        notes.append(told + ("; less is better" if side == "min" else ""))
    agreement = _rank_all(rows, METHODS if tasks.METRICS[task].monitor[0][1] == "min" else ())
    if 1 < len(rows) < FEW:
        notes.append(f"two random orders of {len(rows)} networks are the same with a probability of 1 in "
                     f"{math.factorial(len(rows))}: an agreement of so few means little")  # fmt: skip
    rows.sort(key=lambda row: row["mean_rank"])
    found = {"data": source.name, "examples": len(source), "scores": names, "networks": rows}
    return Ranking(found | {"agreement": agreement, "notes": notes})


def _told(given: str | models.Model) -> str:
    return given if isinstance(given, str) else f"{given.name}={given.weights}"


def _check(data: Any, weights: Sequence[str | models.Model], split: str, shots: int, verify: int) -> None:
    named, told = not isinstance(data, str | os.PathLike), [_told(given) for given in weights]
    tested = [cut for cut in sources.parse_split(split) if cut.split == "test"]
    problems = {
        f"weights {told}: expected FILE, NAME=FILE or NAME=, one or several": not (weights and all(weights)),
        f"weights {told}: a network is named twice": len(set(weights)) < len(weights),
        f"split {split!r}: the choice of a network is part of the training, and test is for what comes after": tested,
        f"shots={shots} are drawn from a source by its name; select them from data in memory": shots and named,
        f"shots={shots}: short runs train on four fifths of the split; leave out shots, or verify": shots and verify,
    }
    checks.refuse("networks cannot be ranked so", [text for text, wrong in problems.items() if wrong])


def _open_all(
    weights: Sequence[str | models.Model],
    data: Any,
    split: str,
    task: str,
    asked: Mapping[str, Any],
    sampling: Mapping[str, int],
    image_size: int | tuple[int, int],
) -> list[Candidate]:
    """Every network with its data; one ValueError for all that cannot be loaded, or cannot read the data."""
    found, problems = [], {}
    for given in weights:
        try:
            network = _load(given, sampling["seed"], image_size) if isinstance(given, str) else given
            found.append(_open(network, data, split, task, asked, sampling))
        except (ValueError, OSError) as error:
            problems.setdefault(str(error), []).append(_told(given))
    texts = [f"{', '.join(names)}: {text}" for text, names in problems.items()]
    checks.refuse(f"{sum(map(len, problems.values()))} of {len(weights)} networks cannot be ranked", texts)
    labels = [each.label for each in found]
    several = [labels.count(label) > 1 for label in labels]
    return [each._replace(label=f"{each.label} {each.network.weights}") if twice else each
            for each, twice in zip(found, several, strict=True)]  # fmt: skip


def _open(
    network: models.Model, data: Any, split: str, task: str, asked: Mapping[str, Any], sampling: Mapping[str, int]
) -> Candidate:
    card = network.card
    if card.parts:
        raise ValueError(f"{card.model} reads several inputs, and the scores are of the features of one network")
    known = {inputs.source_name(data, card.input): sampling} if isinstance(data, str | os.PathLike) else {}
    source = inputs.load_labelled(data, split, card.replace(task=task), **asked, cuts=known)
    if asked["text"] and source.input != "text":
        raise ValueError(f"text={','.join(asked['text'])}: {source.name} has no texts, leave it out")
    if source.sealed or not source.class_names:
        raise ValueError(f"{source.name} has no labels, and every score reads them")
    batches = pipeline.eval_batches(source, {card.input: pipeline.View(card)}, BATCH)
    label = card.model + (f" at {network.image_size} pixels" if network.image_size else "")
    label += "" if network.weights else " (random)"
    return Candidate(label, network, source, batches, _classifies(network))


def _load(given: str, seed: int, image_size: int | tuple[int, int]) -> models.Model:
    """The network that a text names, with its own head where that classifies, else without one."""
    name, equals, weights = given.partition("=")
    if not equals or os.path.exists(given) or any(mark in name for mark in ":/"):
        name, weights = "", given
    has_head = load.load(name, weights, 0, seed=seed).dropped
    how = {"image_size": image_size, "seed": seed}
    network = models.load(name, weights, num_classes=None if has_head else 0, **how)
    return models.load(name, weights, num_classes=0, **how) if has_head and not _classifies(network) else network


def _classifies(own: models.Model) -> bool:
    """Whether its own head gives classes from the last cut: no projection, numbers, map reader or tokens."""
    model, biased = own.module, own.origins.get("params/head/bias") not in (*load.RANDOM, "zeros")
    reads_features = heads.reads(model) == model.cuts[-1] and not getattr(model, "token_head", False)
    return own.card.task in ("classification", "binary") and own.card.num_classes > 0 and biased and reads_features


def _score(candidate: Candidate, names: Sequence[str], parallel: sharding.Parallel, cache_dir: str) -> Row:
    """Its features, from the disk or computed now and kept there, and what the scores make of them."""
    network, source = candidate.network, candidate.source
    model, card, variables = peft.Adapted(network.module), network.card, parallel.place(network.variables)
    prefix, reader = steps.Prefix(model, model.cuts[-1], cached=True), steps.Reader(model, card, card.field)
    (column,) = frozen_columns.prefix_columns(prefix, reader, variables, ())
    kept, began = feature_cache.is_kept(column, candidate.batches, variables, cache_dir), wall.seconds()
    how = {"batch_size": parallel.round_up(BATCH), "folder": cache_dir}
    with wall.timed("features"):
        found = feature_cache.fill({candidate.label: candidate.batches}, column, variables, parallel, **how)
    spent = wall.seconds()["features"] - began.get("features", 0.0)
    features = found[candidate.label][0]
    probabilities = _probabilities(candidate, features) if candidate.classifies else None
    try:
        values = transferability.compute(names, features, probabilities, source.labels)
    except ValueError as error:
        raise ValueError(f"{candidate.label}: {error}") from None
    rate = None if kept else round(len(source) / spent, 1)
    row = {"network": candidate.label, "name": network.name, "weights": network.weights}
    row |= {"features": features.shape[1], "cached": kept}
    return row | {"features_per_second": rate, "scores": values, "verified": {}}


def _probabilities(candidate: Candidate, features: np.ndarray) -> np.ndarray:
    """What the file's own head says of the features, [N, classes]."""
    model, variables = candidate.network.module, candidate.network.variables
    answer = jax.jit(lambda variables, x: model.apply(variables, x, start=model.cuts[-1])[0])
    parts = [answer(variables, features[i : i + 4096]) for i in range(0, len(features), 4096)]
    logits = np.concatenate([np.asarray(part, np.float64) for part in parts])
    if candidate.network.card.task == "binary":
        positive = scipy.special.expit(logits.reshape(len(logits)))
        return np.stack([1 - positive, positive], axis=1)
    return scipy.special.softmax(logits, axis=1)


def _verify(candidate: Candidate, data: Any, task: str, how: Mapping[str, Any], cache_dir: str) -> dict[str, float]:
    """{method: the metric that selects} of short runs on all but one fold of the split, scored on that fold."""
    metric, found, network = tasks.METRICS[task].monitor[0][0], {}, candidate.network
    for method in METHODS:
        changes = {**how, "data.val": "", "data.test": "", "data.resample": FOLD}
        changes |= {"cache": "features", "cache_dir": cache_dir} if method == "linear_probe" else {}
        with tempfile.TemporaryDirectory(prefix="tl_jax-") as folder:
            made = run.fit(network, data, method=method, task=task, workdir=folder, changes=changes, verbose=False)
            found[method] = made.metrics[metric]["value"]
    return found


def _rank_all(rows: Sequence[Row], least: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Gives each row its ranks, and returns the agreement of each column with each; {} for one network.

    least: columns of which less is better. The mean rank is over the scores that every network has; where there is
    none, over all, and who has none is last.
    """
    table = [{**row["scores"], **row["verified"]} for row in rows]
    columns = {name: np.array([np.nan if row[name] is None else row[name] for row in table]) for name in table[0]}
    columns = {name: (-x if name in least else x).round(9) for name, x in columns.items()}  # equal but for rounding
    for row in rows:
        row["ranks"] = {}
    for name, values in columns.items():
        for i in np.flatnonzero(~np.isnan(values)).tolist():
            rows[i]["ranks"][name] = int(1 + (values > values[i]).sum())
    shared = [name for name in rows[0]["scores"] if not np.isnan(columns[name]).any()]
    for row in rows:
        row["mean_rank"] = float(np.mean([row["ranks"].get(name, len(rows)) for name in shared or row["scores"]]))
    return {a: {b: _tau(x, y) for b, y in columns.items()} for a, x in columns.items()} if len(rows) > 1 else {}


def _tau(x: np.ndarray, y: np.ndarray) -> float | None:
    """Weighted Kendall's tau (Vigna 2015) over the networks that have both; None where it is not defined."""
    both = ~(np.isnan(x) | np.isnan(y))
    if both.sum() < 2 or np.ptp(x[both]) == 0 or np.ptp(y[both]) == 0:
        return None
    return float(scipy.stats.weightedtau(x[both], y[both]).statistic)


def _tau_text(tau: float | None) -> str:
    return "-" if tau is None else f"{tau:.2f}"


def _cells(row: Row) -> tuple[str, ...]:
    values = {**row["scores"], **row["verified"]}
    cells = ["-" if x is None else f"{x:.3f} ({row['ranks'][name]})" for name, x in values.items()]
    rate = "cached" if row["cached"] else f"{row['features_per_second']:,.1f}"
    return row["network"], *cells, f"{row['mean_rank']:.1f}", rate
