"""Classic transfer from a labelled domain to an unlabelled one: several methods on the same features, in one table."""

import ast
import csv
import io
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax.core import checks, files
from tl_jax.core.console import Table
from tl_jax.core.messages import nearest
from tl_jax.data import sources
from tl_jax.data.examples import Source
from tl_jax.data.sealed import canonical
from tl_jax.methods import classic
from tl_jax.tasks.intervals import interval, resample

Row = dict[str, Any]


def read_arguments(given: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """{method: {argument: value}} of texts `argument=value`, for every method that has it, or `method.argument=value`.

    Raises one ValueError for all that is wrong.
    """
    found, problems = {name: {} for name in names}, []
    known = {name: checks.parameters(classic.METHODS[name]) if name in classic.METHODS else {} for name in names}
    for text in given:
        left, equals, right = text.partition("=")
        method, _, argument = left.rpartition(".")
        takers = [name for name in names if (name == method if method else argument in known[name])]
        if not (equals and takers):
            every = sorted({name for own in known.values() for name in own})
            problems.append(
                f"{text!r}: expected argument=value or METHOD.argument=value of the methods {', '.join(known)}, whose "
                f"arguments are {', '.join(every) or 'none'}{nearest(argument, every)}"
            )
        try:
            value = ast.literal_eval(right)
        except (ValueError, SyntaxError):
            value = right  # a word
        for name in takers:
            found[name][argument] = value
    checks.refuse("--arg", problems)
    return found


def check_methods(arguments: Mapping[str, Mapping[str, Any]], classifier: str, shots: int) -> None:
    """Raises one ValueError for methods, arguments and a classifier that do not fit, before any data is read."""
    problems = [text for name, given in arguments.items() for text in classic.call_problems(name, classifier, given)]
    if ("tradaboost" in arguments) != bool(shots):
        problems.append(f"--shots {shots}: tradaboost needs labelled target examples, and no other method reads one")
    checks.refuse("--method, --classifier", problems)


def load_domain(source: str, split: str, labels: Sequence[str] = (), *, sealed: bool = False) -> Source:
    """The examples of a domain; sealed: nobody reads a label until they are opened, and slices are not stratified."""
    found = sources.load(source, split, labels=tuple(labels), sealed={canonical(source)} if sealed else ())
    if found.label_kind != "classes":
        raise ValueError(f"{found.name} has {found.label_kind}, expected classes")
    return found


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """bool [N]: `shots` examples of each class, by seed. Raises ValueError where that leaves none to score."""
    drawn = np.zeros(len(labels), bool)
    for c in np.unique(labels) if shots else ():
        drawn[np.random.default_rng([seed, c]).permutation(np.flatnonzero(labels == c))[:shots]] = True
    if drawn.all():
        raise ValueError(f"--shots {shots}: all {len(labels)} target examples are labelled, none is left to score")
    return drawn


def same_classes(source: Source, target: Source) -> None:
    """Raises ValueError where one domain has classes that the other lacks."""
    ours, theirs = set(source.class_names), set(target.class_names)
    missing = [f"the target has no class {name!r} of the source" for name in sorted(ours - theirs)]
    missing += [f"the source has no class {name!r} of the target" for name in sorted(theirs - ours)]
    checks.refuse("partial and open label spaces are not handled; expected the same classes in both domains", missing)


def compare(
    source: tuple[np.ndarray, np.ndarray],
    target: np.ndarray,
    arguments: Mapping[str, Mapping[str, Any]],
    *,
    classifier: str = "1nn",
    shots: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, tuple[np.ndarray, classic.Adapted, float]]:
    """{method: (predicted labels [N_t], what it gives, seconds)} of source = (features, labels); `none` comes first.

    No label of the target is known here, so none can choose anything.
    """
    found = {}
    for name, given in {"none": {}, **arguments}.items():
        start = time.perf_counter()
        few = shots if name == "tradaboost" else None
        adapted = classic.adapt(name, *source, target, classifier=classifier, shots=few, **given)
        found[name] = adapted.predict(target), adapted, time.perf_counter() - start
    return found


def score(
    predicted: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Row]:
    """A row for each method: accuracy, and how much it is above `none`, paired, each {"value", "low", "high"}.

    All share the resamples of the bootstrap. "worse": the whole interval of the difference is below 0, negative
    transfer.
    """
    right = np.stack([np.float32(each == labels) for each in predicted.values()], axis=1)
    samples = np.concatenate([weights.T @ right for weights in resample(len(labels), resamples, seed)]) / len(labels)
    value, base, rows = right.mean(axis=0, dtype=np.float64), list(predicted).index("none"), []
    for i, name in enumerate(predicted):
        gain = interval(value[i] - value[base], samples[:, i] - samples[:, base], level)
        row = {"method": name, "accuracy": interval(value[i], samples[:, i], level), "against_none": gain}
        rows.append(row | {"worse": gain["high"] < 0})
    return rows


def write(folder: pathlib.Path, rows: Sequence[Row], facts: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """table.csv and result.json; weights: {file name: (ids, weight)} as `data.weights` of a config reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    text, parts = io.StringIO(), ("value", "low", "high")
    writer = csv.writer(text)
    pairs = [(key, part) for key in ("accuracy", "against_none") for part in parts]
    writer.writerow(["method", *(f"{key}_{part}".removesuffix("_value") for key, part in pairs), "worse", "seconds"])
    for row in rows:
        numbers = [f"{row[key][part]:.6f}" for key, part in pairs]
        writer.writerow([row["method"], *numbers, row["worse"], f"{row['seconds']:.2f}"])
    files.write_text(folder / "table.csv", text.getvalue())
    files.write_json(folder / "result.json", {**facts, "methods": list(rows)})
    for name, (ids, weight) in weights.items():
        with files.atomic_write(folder / name) as file:
            np.savez(file, ids=np.array(ids, str), weight=np.asarray(weight, np.float64))


def run(args: Any) -> list[Row]:
    """The command `classic`: reads both domains, adapts and predicts by every method, then scores."""
    names, classifier = list(dict.fromkeys(args.method.split(","))), args.classifier
    arguments = read_arguments(args.arg, names)
    check_methods(arguments, classifier, args.shots)
    steps, columns = tuple(filter(None, args.scale.split(","))), tuple(filter(None, args.labels.split(",")))
    classic.scale(np.ones((1, 1)), steps)
    source = load_domain(args.source, args.source_split, columns)
    target = load_domain(args.target, args.target_split, columns, sealed=True)
    same_classes(source, target)
    if common := sources.overlap(source, target):
        raise ValueError(f"{len(common)} examples, such as {common[0]}, are in both domains; expected other examples")
    ours, theirs = (classic.scale(x, steps) for x in read_features((source, target), args))
    order = np.array([source.class_names.index(name) for name in target.class_names])
    known, shots = np.zeros(len(target), bool), None
    if args.shots:
        truth = order[target.labels.open()]
        known = draw_shots(truth, args.shots, args.seed)
        shots = theirs[known], truth[known]
    found = compare((ours, source.labels), theirs[~known], arguments, classifier=classifier, shots=shots)
    truth = order[target.labels.open()][~known]
    rows = score({name: each[0] for name, each in found.items()}, truth, resamples=args.resamples)
    for row, (_, adapted, seconds) in zip(rows, found.values(), strict=True):
        row |= {"seconds": seconds, "arguments": arguments.get(row["method"], {}), "facts": dict(adapted.facts)}
    if args.out:
        weights = {f"weights_{x}.npz": (source.ids, found[x][1].weights) for x in names if x in classic.WEIGHTING}
        facts = {"source": source.name, "target": target.name, "classifier": classifier, "scale": list(steps)}
        write(pathlib.Path(args.out), rows, facts | {"count": len(truth), "shots": args.shots}, weights)
    return rows


def read_features(domains: Sequence[Source], args: Any) -> list[np.ndarray]:
    """The rows of the domains, or the features that a network computes from their images."""
    kinds, given = {each.input for each in domains}, bool(args.run or args.model or args.weights)
    if kinds == {"table"} and not given:
        return [each.inputs for each in domains]
    if kinds != {"image"} or not given or (args.run and (args.model or args.weights)):
        expected = "images with --run RUN or --model NAME --weights FILE, or rows of numbers without a network"
        raise ValueError(f"the domains are {' and '.join(sorted(kinds))} sources; expected {expected}")
    from tl_jax.api import model, run  # here, as a network needs jax

    network = run.load_run(args.run) if args.run else model.load(args.model, args.weights, num_classes=0)
    return [model.features(network, each) for each in domains]


def format_table(rows: Sequence[Row]) -> Table:
    """Accuracies in percent."""
    headers, lines = ("method", "accuracy", "95 % interval", "against none", "95 % interval", "seconds"), []
    for row in rows:
        values = [f"{100 * row[key][part]:.2f}" for key in ("accuracy", "against_none") for part in ("low", "high")]
        first, second = f"{values[0]} .. {values[1]}", f"{values[2]} .. {values[3]}"
        own, gain = 100 * row["accuracy"]["value"], 100 * row["against_none"]["value"]
        name = row["method"] + (" (worse than none)" if row["worse"] else "")
        lines.append((name, f"{own:.2f}", first, f"{gain:+.2f}", second, f"{row['seconds']:.1f}"))
    return Table("", headers, lines)
