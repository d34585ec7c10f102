"""Suspect labels of a finished run: confident learning on out-of-fold probabilities (Northcutt, Jiang & Chuang 2021).

A logistic regression on the features of the network as it was loaded, which has seen no label of this data, predicts
each example from the others. Where it is confidently of another class than the label, the label is a suspect.
"""

import io
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax import config as options
from tl_jax.api.run import load_run
from tl_jax.core import console, files
from tl_jax.core.checks import refuse
from tl_jax.core.console import Table, show
from tl_jax.data import pipeline, resample, sources
from tl_jax.data.examples import Source, join
from tl_jax.data.groups import per_class
from tl_jax.data.image import decode
from tl_jax.methods import probes
from tl_jax.runtime import sharding
from tl_jax.runtime.log import tolerate
from tl_jax.tasks import answers, load_predictions, refuse_language
from tl_jax.training import build, inputs, probe
from tl_jax.training.settings import read
from tl_jax.training.train import never

PICTURES = 64  # at most, on the sheet
LOOKALIKES = 20  # pairs across the splits
CLOSE = 1e-9  # a class whose examples all have one probability reaches its own mean
Row = dict[str, Any]


class Judged(NamedTuple):
    """What confident learning finds for N labels of K classes.

    joint: int [K, K], examples of the label i that are confidently of class j. share: float64 [K, K], the estimated
    joint distribution of label and true class. suspect: bool [N]. suggested: int [N], the class in place of the label.
    """

    joint: np.ndarray
    share: np.ndarray
    suspect: np.ndarray
    suggested: np.ndarray


def confident(labels: np.ndarray, probabilities: np.ndarray) -> Judged:
    """Confident learning for labels [N] and out-of-fold probabilities float64 [N, K].

    An example is confidently of the most probable of those classes that reach their threshold, the mean probability of
    the class over the examples that are labelled so (section 3.1, equations 1 and 2); each row of the joint is then
    scaled to the number of examples with its label (equation 3). Of equals the label itself counts. The suggestion for
    a suspect is its confident class, for others the most probable class besides the label.
    """
    rows, classes = np.arange(len(labels)), probabilities.shape[1]
    counts, given = np.bincount(labels, minlength=classes), probabilities[rows, labels]
    thresholds = np.bincount(labels, given, classes) / np.maximum(counts, 1) - CLOSE
    likely = np.where((probabilities >= thresholds) & (counts > 0), probabilities, -1.0)
    highest, joint = likely.max(axis=1), np.zeros((classes, classes), np.int64)
    sure, best = highest >= 0, np.where(likely[rows, labels] == highest, labels, likely.argmax(axis=1))
    np.add.at(joint, (labels[sure], best[sure]), 1)
    share = joint * (counts / np.maximum(joint.sum(axis=1), 1) / len(labels))[:, None]
    suspect, others = sure & (best != labels), probabilities.copy()
    others[rows, labels] = -1.0
    return Judged(joint, share, suspect, np.where(suspect, best, others.argmax(axis=1)))


def out_of_fold(
    features: np.ndarray, labels: np.ndarray, classes: int, folds: int, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Probabilities float64 [N, classes] of each example by a logistic regression that has not seen its fold.

    features [N, D]; labels [N] with at least `folds` >= 3 examples of each class that occurs, or with as many groups
    [N], which no fold cuts. In each fold a part of the other folds chooses the strength of the penalty by its nll, and
    all of them are then fitted with it.
    """
    probabilities = np.empty((len(labels), classes))
    for fold in console.counted("folds", range(folds), folds):
        seen, unseen = resample.split(labels, f"kfold:{folds}:{fold}", seed, groups)
        own = None if groups is None else groups[seen]
        least = per_class(labels[seen], own, classes)
        inner = resample.split(labels[seen], f"kfold:{min(folds, least[least > 0].min())}:0", seed, own)
        fitted, val = ((features[seen[part]], labels[seen[part]]) for part in inner)
        chosen = best = math.inf
        for value in probes.GRIDS["logistic"]:  # from strong to weak, which takes longer, until the nll rises
            nll = probes.fit("logistic", fitted, val, classes, (value,)).tried[0]["val/nll"]
            if nll > best:
                break
            chosen, best = value, nll
        model = probes.fit("logistic", (features[seen], labels[seen]), None, classes, (chosen,))
        logits = model.predict(features[unseen]).astype(np.float64)
        probabilities[unseen] = scipy.special.softmax(logits, axis=1)
    return probabilities


def suspects(
    run: str | os.PathLike, out: str | os.PathLike = "", *, folds: int = 5, seed: int = 0, top: int = 50,
    splits: Sequence[str] = (), label: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Ranks the examples of a finished run by the out-of-fold probability of their label, the lowest first.

    out: a folder, RUN/labels unless given, for labels.csv (the `top` first, and every further suspect), labels.json
    (the table that is returned) and, of images, labels.png (of the `top` up to PICTURES); see docs/data.md. splits: of
    the run, all unless given. label: one of a multilabel task. Raises ValueError for a run that is not finished or was
    changed, and where its labels cannot be judged so.
    """
    found = load_run(run)
    flat, folder = found.options, pathlib.Path(out or found.folder / "labels")
    refuse_language(flat["task"], found.folder)
    known = _splits(flat)
    spec = load_predictions(found.folder / "predictions.npz").spec
    one_of = spec.class_names if spec.name == "multilabel" else ("",)
    problems = {
        f"--splits {','.join(splits)}: expected some of {','.join(known)}": not {*splits} <= {*known},
        f"--folds {folds}: expected at least 3, which leaves two, to fit and to choose by": folds < 3,
        f"--seed {seed}: expected 0 .. 2**32 - 1": not 0 <= seed < 2**32,
        f"--top {top}: expected at least 1": top < 1,
        f"--label {label!r}: this task takes {', '.join(one_of) or 'none'}": label not in one_of,
        f"{run} is a regression: its labels are numbers, expected classes": spec.name == "regression",
    }
    refuse("suspect labels cannot be looked for", [text for text, wrong in problems.items() if wrong])
    data, features, origin = _read(flat, [name for name in known if name in splits or not splits])
    alike = _lookalikes(data, features)
    places = [(split, source, k) for split, source in data.items() for k in range(len(source))]
    names, labels = places[0][1].class_names, np.concatenate([source.labels for source in data.values()])
    if label:
        names, labels = (f"not {label}", label), labels[:, names.index(label)]
    groups = None if places[0][1].groups is None else np.concatenate([source.groups for source in data.values()])
    counts = per_class(labels, groups, len(names))
    few = [f"{names[k]} ({counts[k]})" for k in np.flatnonzero((counts > 0) & (counts < folds))]
    if (counts >= folds).sum() < 2:
        raise ValueError(f"found {', '.join(few)} and too few others; expected two classes of {folds} (--folds) each")
    kept = np.flatnonzero(counts[labels] >= folds)
    labels, places = labels[kept], [places[k] for k in kept]
    p = out_of_fold(features[kept], labels, len(names), folds, seed, None if groups is None else groups[kept])
    judged, given = confident(labels, p), p[np.arange(len(labels)), labels]
    rows, chosen = _rank(names, labels, p, judged, places, top)
    summary = {
        "run": str(run), "splits": {split: len(source) for split, source in data.items()}, "features": origin,
        "folds": folds, "seed": seed, "too_few": few, "labels": len(labels), "suspects": int(judged.suspect.sum()),
        "accuracy": float((p.argmax(axis=1) == labels).mean()), "nll": float(-np.log(np.maximum(given, 1e-300)).mean()),
        "errors": float(judged.share.sum() - judged.share.trace()), "pairs": _pairs(names, judged), "lookalikes": alike,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    answers.write_csv(rows, text := io.StringIO())
    csv = text.getvalue().encode(errors="backslashreplace").decode()  # names of files need not be UTF-8
    files.write_text(folder / "labels.csv", csv)
    files.write_json(folder / "labels.json", summary)
    if places[0][1].input == "image":
        with tolerate(str(folder / "labels.png")):
            first = min(top, PICTURES)
            _draw(rows[:first], [places[i] for i in chosen[:first]], folder / "labels.png")
    _show(rows[:10], summary)
    show(f"wrote {', '.join(sorted(path.name for path in folder.glob('labels.*')))} to {folder}")
    return summary


def _splits(flat: Mapping[str, Any]) -> list[str]:
    """The names of the splits of a run; leave-one-out cuts none."""
    cut = flat["data.resample"] not in ("", "loo")
    own = [name for name in inputs.SPLITS if flat[f"data.{name}"] or (name == "test" and cut)]
    return [*own, *(name for name, *_ in flat["data.extra_eval"])]


def _read(flat: Mapping[str, Any], splits: Sequence[str]) -> tuple[dict[str, Source], np.ndarray, str]:
    """The splits, each example once; the features [N, D] of all of them in turn; what these are."""
    name, weights, parallel = flat["model.name"], flat["model.weights"], sharding.make_parallel("jit")
    if name == "fusion":
        raise ValueError("suspect labels are found on the features of one network, and this run is a fusion of several")
    several = parallel.mesh.size * (len(flat["data.source"]) if isinstance(flat["data.source"], list) else 1)
    kept = {name: x for name, x in flat.items() if name.startswith(("model.", "data.")) or name in ("task", "seed")}
    kept |= {"data.resample": "kfold:2:0"} if flat["data.resample"] == "loo" else {}  # any cut holds the whole
    config = options.from_flat({
        **kept, "data.augment": (), "data.sampling": "shuffled",
        "model.dropout": 0.0, "model.hidden_dropout": 0.0, "model.drop_path": 0.0,
        "model.head": (), "model.keep_head": False,
        "method.name": "linear_probe", "cache": "features", "cache_dir": flat["cache_dir"],
        "batch_size": math.ceil(32 / several) * several,
    })  # fmt: skip
    made = build.build(config, parallel) if weights else None
    there, data = made.material.data if made else inputs.load_sources(read(config)), {}
    if flat["data.resample"] == "loo":
        there = {**there, "train": join([there["train"], there["test"]])}
    for split in splits:
        seen = {i for other in data.values() for i in sources.overlap(there[split], other)}
        new = [k for k, i in enumerate(there[split].ids) if i not in seen and not seen.add(i)]
        if new:
            data[split] = there[split] if len(new) == len(there[split]) else there[split].select(np.array(new))
    if made:
        card, size = made.material.card, next(iter(made.material.eval_batches.values())).batch_size
        views, workers = {card.input: pipeline.View(card)}, flat["data.workers"]
        sets = {
            split: pipeline.eval_batches(source, views, size, num_workers=workers) for split, source in data.items()
        }
        found = probe.predict(made, parallel, sets, never)
        features, origin = [found[split].features for split in data], f"outputs of {name} before its head"
    elif there["train"].input == "table":
        features, origin = [source.inputs for source in data.values()], "columns of the table, as weights were random"
    else:
        fix = "take a run that began with pretrained weights; one by method.name=logistic is done in a minute"
        raise ValueError(f"the features of {name} with random weights tell nothing of photos; {fix}")
    return data, np.concatenate(features), origin


def _lookalikes(data: Mapping[str, Source], features: np.ndarray) -> list[Row]:
    """The scored examples that are most similar to one of train, each with that one: the cosine of centred features.

    No similarity makes two photos copies: the list is for the eye, and finds crops, which the split audit does not.
    """
    count, scored = (
        len(data.get("train", ())),
        [(split, i) for split in data if split != "train" for i in data[split].ids],
    )
    if not count or not scored:
        return []
    centred = features - features.mean(axis=0)
    centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    parts = np.array_split(centred[-len(scored) :], len(scored) * count // 2**26 + 1)
    best = [((similar := part @ centred[:count].T).argmax(axis=1), similar.max(axis=1)) for part in parts]
    nearest, cosine = (np.concatenate(each) for each in zip(*best, strict=True))
    return [
        {
            "cosine": round(float(cosine[i]), 4),
            "train": data["train"].ids[nearest[i]],
            "scored": "{}: {}".format(*scored[i]),
        }
        for i in np.argsort(-cosine, kind="stable")[:LOOKALIKES].tolist()
    ]


def _rank(names: Sequence[str], labels: np.ndarray, p: np.ndarray, judged: Judged, places: Sequence[tuple], top: int):
    """The rows of labels.csv, and which examples they are: the `top` first, and every further suspect."""
    every = np.arange(len(labels))
    given, suggested = p[every, labels], p[every, judged.suggested]
    order = np.argsort(given, kind="stable")
    ranks = np.flatnonzero(judged.suspect[order] | (every < top))
    rows = []
    for rank, i in zip(ranks.tolist(), order[ranks].tolist(), strict=True):
        split, source, k = places[i]
        numbers = {"given": given[i], "suggested": suggested[i]}
        rows.append({
            "rank": rank + 1, "id": source.ids[k], "split": split, "given": names[labels[i]],
            "suggested": names[judged.suggested[i]],
            **{f"probability_{name}": f"{x:.4g}" for name, x in numbers.items()},
            "margin": f"{suggested[i] - given[i]:.4g}", "suspect": "yes" if judged.suspect[i] else "no",
        })  # fmt: skip
    return rows, order[ranks].tolist()


def _pairs(names: Sequence[str], judged: Judged) -> list[Row]:
    """The pairs of classes that are confused, the commonest first; share: of the examples that have the label."""
    joint, share = judged.joint, judged.share
    found = [
        {"given": names[i], "suggested": names[j], "suspects": int(joint[i, j]), "share": share[i, j] / share[i].sum()}
        for i, j in np.argwhere(joint).tolist()
        if i != j
    ]
    return sorted(found, key=lambda pair: -pair["suspects"])


def _show(rows: Sequence[Row], summary: Mapping[str, Any]) -> None:
    """The summary and the first rows."""
    show(f"{summary['labels']:,} labels of {', '.join(summary['splits'])}")
    show(f"judged in {summary['folds']} folds by {summary['features']}")
    show(f"out of fold: accuracy {summary['accuracy']:.4f}, nll {summary['nll']:.4f}")
    if summary["too_few"]:
        show(f"left out, as fewer examples than folds: {', '.join(summary['too_few'])}")
    wrong = f"an estimated {summary['errors']:.1%} of the labels are wrong, or hard to tell"
    show(f"{summary['suspects']:,} suspects; {wrong}\n")
    pairs = [(x["given"], x["suggested"], f"{x['suspects']:,}", f"{x['share']:.1%}") for x in summary["pairs"][:10]]
    show(Table("classes in each other's place", ("given", "suggested", "suspects", "share of the label"), pairs, 2))
    alike = [(x["train"], x["scored"], f"{x['cosine']:.3f}") for x in summary["lookalikes"][:5]]
    show(Table("most alike across the splits, by features", ("train", "scored", "cosine"), alike, 2))
    first = [
        (f"{x['rank']}{'*' * (x['suspect'] == 'yes')}", x["given"], x["suggested"], x["split"], x["id"],
         f"{float(x['probability_given']):.4f}")
        for x in rows
    ]  # fmt: skip
    headers = ("rank", "given", "suggested", "split", "id", "p(given)")
    show(Table("the labels that are least likely right (*: suspect)", headers, first, 5))


def _draw(rows: Sequence[Row], places: Sequence[tuple], path: pathlib.Path) -> None:
    """A sheet of the pictures of the rows, with label, suggestion and the probability of the label."""
    from tl_jax.core.plotting import sheet, short  # here, as matplotlib takes its time

    pictures = [decode.thumbnail(source.inputs[k], source.form) for _, source, k in places]
    captions = []
    for row in rows:
        mark = "*" if row["suspect"] == "yes" else ""
        first = f"{row['rank']}{mark}. {short(row['given'], 14)} ({short(row['split'], 6)})"
        captions.append((first, f"-> {short(row['suggested'], 12)}, p {float(row['probability_given']):.2f}"))
    sheet(path, pictures, captions, columns=8)
