"""`python -m tl_jax drift`: reads what is compared, says the verdict in words, and draws it on one page."""

import argparse
import base64
import html
import pathlib
import shlex
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np

import tl_jax
from tl_jax.api.model import observe
from tl_jax.api.run import Run
from tl_jax.core import checks, console, files, manifest
from tl_jax.core.plotting import BLUE, GREY, VERMILION, figure_at, short
from tl_jax.serving.artefact import Exported, is_export, load, open_network
from tl_jax.serving.drift import CLASSES, EFFECTS, MOST, Table, compare, points, readable
from tl_jax.serving.drift_monitor import load_log
from tl_jax.tasks import Predictions, load_predictions

SHOWN, PANELS, BARS = 20, 6, 10  # rows of a table, parts of the figure, classes in one of them
SIDES, COLOURS = ("reference", "new"), (BLUE, VERMILION)
NAMES = {"mmd": "kernel test (MMD)", "outputs": "outputs (KS)", "classifier": "classifier"}
VERDICTS = {
    "drift": "DRIFT: the new examples differ from the reference, by {} (level of all tests: 5 %).",
    "small": "No drift that counts: the difference found by {} is small.",
    "none": "No drift found: nothing differs significantly (level of all tests: 5 %).",
}
CHANGES = {  # of a config, for data of one split
    "data.train": "train[:80%]", "data.val": "train[80%:]", "data.test": "", "data.resample": "", "data.group": "",
    "seeds": (), "baseline": (),
}  # fmt: skip
METHODS = (
    "The level of 5 % is the chance that any of the three tests is significant where nothing has changed: each p is "
    "multiplied by 3, of the outputs by their number too (Bonferroni). Drift is a significant test with an effect of "
    "at least AUC {AUC} or a Jensen-Shannon distance of {JS}. Examples must be independent: frames of one video are "
    "not.",
    "Kernel test: unbiased MMD with 999 permutations (Gretton et al. 2012). Outputs: a Kolmogorov-Smirnov test of each "
    "(Lipton et al. 2018; Rabanser et al. 2019). Classifier: can it tell new from reference, out of fold, with the "
    "same permutations (Lopez-Paz and Oquab 2017); its AUC is 0.5 where it cannot.",
    "Shares: black box shift estimation (Lipton et al. 2018) from predicted classes, right where the inputs of each "
    "class look as before. Intervals: 95 %, bootstrap. Labels of the new examples are never read.",
)


def run(args: argparse.Namespace) -> None:
    """The command; ValueError names all that cannot be read, or all that does not fit."""
    network, names = open_network(args.run) if args.run else None, (args.reference, args.new)
    sides, problems = [], []
    for path in names:
        try:
            sides.append(_read(path, network, args.batch_size))
        except (ValueError, OSError, FloatingPointError) as error:
            problems.append(str(error))
    checks.refuse("there is nothing to compare", problems)
    if args.last and not is_log(args.new):
        raise ValueError(f"--last {args.last}: {args.new} is no log, whose lines are in the order of time")
    if args.last:
        sides[1] = sides[1].select(np.arange(len(sides[1].values))[-args.last :])
    found = compare(*sides, args.on)
    command = retrain(network, args.new) if isinstance(network, Run) else ""
    for told in messages(found, sides[0], names):
        console.show(told)
    if args.out:
        files.write_text(pathlib.Path(args.out), page(found, *sides, names, command))
        console.show(f"wrote {args.out}")
    if command:
        print(f"to train the run again on the new examples, once they have labels:\n{command}")


def _read(path: str, network: Run | Exported | None, batch_size: int) -> Predictions:
    """Predictions of a run or a file, the log of a server, what an export has of its run, or inputs for the network."""
    file = pathlib.Path(path)
    if is_export(file):
        if (found := load(file).reference) is None:
            raise ValueError(f"{path} was exported from a weight file: it has no predictions of a run to compare with")
        return found
    if (file / "result.json").is_file():
        file = file / "predictions.npz"
    if is_log(file):
        return load_log(file)
    if file.suffix != ".npz":
        if network is None:
            raise ValueError(f"{path}: expected a .npz of predictions or the log of a server; inputs need --run")
        return observe(network, path, batch_size=batch_size)
    if (file.parent / manifest.NAME).exists() and file.match("predictions*.npz"):  # of a finished run
        manifest.check(file.parent, [file.name])
    return load_predictions(file)


def is_log(path: str | pathlib.Path) -> bool:
    """Whether a file begins as a log does, whatever it is called: rotation renames it."""
    path = pathlib.Path(path)
    if path.suffix == ".jsonl" or not path.is_file():
        return path.is_file()
    with path.open("rb") as file:
        return file.read(7) == b'{"task"'


def retrain(network: Run, new: str) -> str:
    """The command that trains a run again, by its own config, on `new` with labels: class folders, or a .csv file."""
    old, path = network.options, pathlib.Path(new)
    kind = str(old["data.source"]).partition(":")[0]
    kind = kind if kind in ("csv", "table") else "folder" if old["task"] in ("classification", "binary") else "csv"
    fits = path.is_dir() if kind == "folder" else path.suffix == ".csv"
    changes = {"data.source": f"{kind}:{new if fits else 'NEW'}", **CHANGES}
    items = [
        f"--config.{name}={value if isinstance(old[name], str) else repr(value)}"
        for name, value in changes.items()
        if old[name] != (list(value) if isinstance(value, tuple) else value)
    ]
    command = ["python", "-m", "tl_jax", "train", str(network.folder / "config.json"), *items]
    return shlex.join([*command, "--workdir", f"{network.folder}-retrained"])


def messages(found: Table, reference: Predictions, names: Sequence[str]) -> list[str | console.Table]:
    """The short form for a console: the verdict, the tests and the shares that changed most."""
    sides = [[what, name, f"{n:,}"] for what, name, n in zip(SIDES, names, found["counts"], strict=True)]
    tables = _tables(found)
    shown = (tables[name] for name in ("tests", "shares") if name in tables)
    return [
        headline(found) + "\n",
        console.Table("what is compared", ["side", "file", "examples"], sides, 2),
        *(console.Table(caption, heads, rows[:5]) for caption, heads, *rows in shown),
        *_notes(found, reference),
    ]


def headline(found: Table) -> str:
    """The verdict as a sentence."""
    names = ", ".join(NAMES[row["name"]] for row in found["tests"] if row["verdict"] == found["verdict"])
    return VERDICTS[found["verdict"]].format(names)


def _notes(found: Table, reference: Predictions) -> list[str]:
    """What limits the comparison, a sentence each."""
    notes = [f"Kernel test and classifier look at the {found['space']}."]
    if reference.groups is not None:
        notes.append("The reference has groups, whose examples are not independent: every p is too small.")
    if not found["labels"]:
        notes.append(f"No shares are estimated: that needs labels of the reference, of at most {CLASSES} classes.")
    elif not _shares(found):
        notes.append("No shares are estimated: some class is never predicted, or not in the reference.")
    return notes


def _shares(found: Table) -> list[Table]:
    """The rows of `label_shift` that could be estimated, those that changed most first."""
    rows = [row for row in found["labels"] if row["share"] is not None]
    return sorted(rows, key=lambda row: -abs(row["share"] - row["reference"]))[:SHOWN]


def _tables(found: Table) -> dict[str, list]:
    """{name: [caption, heads, row, ...]}, cells as text, the first column words."""
    tests = [
        [NAMES[row["name"]], f"{row['p']:.2g}", f"{row['adjusted']:.2g}", f"{row['effect']} {row['size']:.3f}",
         f"{row['least']:g}", row["verdict"]]
        for row in found["tests"]
    ]  # fmt: skip
    outputs = sorted(found["outputs"], key=lambda row: -row["ks"])[:SHOWN]
    outputs = [[short(row["name"]), *(f"{row[x]:.2g}" for x in ("p", "ks", "js", "wasserstein"))] for row in outputs]
    shares = [
        [short(row["name"]), *(f"{row[x]:.3f}" for x in ("reference", "share", "low", "high")), f"{row['weight']:.2f}"]
        for row in _shares(found)
    ]
    heads = {
        "tests": ("the tests, at 5 % together", ["test", "p", "corrected", "effect", "least", "verdict"]),
        "outputs": ("outputs by their change; Wasserstein in standard deviations of the reference",
                    ["output", "corrected p", "Kolmogorov-Smirnov", "Jensen-Shannon", "Wasserstein"]),
        "shares": ("estimated shares, with 95 % interval, if the inputs of each class look as before",
                   ["class", "reference", "new", "low", "high", "weight"]),
    }  # fmt: skip
    rows = {"tests": tests, "outputs": outputs, "shares": shares}
    return {name: [*head, *rows[name]] for name, head in heads.items() if rows[name]}


def page(found: Table, reference: Predictions, new: Predictions, names: Sequence[str], command: str = "") -> str:
    """The whole comparison as HTML that needs no other file."""
    css = (pathlib.Path(tl_jax.__file__).parent / "assets" / "report.css").read_text()
    counts = (f"{what}: {name}, {n:,} examples" for what, name, n in zip(SIDES, names, found["counts"], strict=True))
    with tempfile.TemporaryDirectory() as folder:
        _draw(pathlib.Path(folder, "drift.png"), found, reference, new)
        image = base64.b64encode(pathlib.Path(folder, "drift.png").read_bytes()).decode()
    alarm = "alarm" if found["verdict"] == "drift" else ""
    body = [
        f'<p class="{alarm}">{html.escape(headline(found))}</p>',
        _list([*counts, *_notes(found, reference)]),
        f'<figure><img alt="map, shares, outputs" src="data:image/png;base64,{image}"></figure>',
    ]
    for caption, heads, *rows in _tables(found).values():
        body += [f'<div class="table"><table><caption>{html.escape(caption)}</caption>', _row(heads, "th")]
        body += [*(_row(row, "td") for row in rows), "</table></div>"]
    if command:
        body.append(
            f"<h2>Train again</h2><p>On the new examples, once they have labels:</p><pre>{html.escape(command)}</pre>"
        )
    text = "\n".join([
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Drift</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{css} pre {{ white-space: pre-wrap; }}</style></head><body><main><h1>Drift</h1>",
        *body, "<h2>Methods</h2>", _list(text.format(**EFFECTS) for text in METHODS), "</main></body></html>\n",
    ])  # fmt: skip
    return text.encode(errors="backslashreplace").decode()  # names of files need not be UTF-8


def _list(texts: Iterable[str]) -> str:
    return "\n".join(["<ul>", *(f"<li>{html.escape(text)}</li>" for text in texts), "</ul>"])


def _row(cells: Sequence[str], tag: str) -> str:
    kinds = ["", *[' class="n"'] * (len(cells) - 1)]
    return f"<tr>{''.join(f'<{tag}{k}>{html.escape(c)}</{tag}>' for k, c in zip(kinds, cells, strict=True))}</tr>"


def _draw(path: pathlib.Path, found: Table, *sides: Predictions) -> None:
    """A map of the examples, the shares of the classes, and the distributions of the outputs that changed most."""
    rows, clouds = _shares(found)[:BARS], [points(side, found["space"])[:MOST] for side in sides]
    order = np.argsort([-row["ks"] for row in found["outputs"]], kind="stable")
    values = [readable(side.spec, side.values) for side in sides]
    flat = clouds[0].shape[1] > 1
    count = -(-min(PANELS, flat + bool(rows) + len(order)) // 3)
    with figure_at(path, (10, 0.4 + 2.8 * count), rows=count, columns=3) as (figure, axes):
        left = list(axes)
        if flat:
            axis, centre = left.pop(0), clouds[0].mean(axis=0)
            plane = np.linalg.svd(clouds[0] - centre, full_matrices=False)[2][:2].T
            for cloud, colour, marker in zip(clouds, COLOURS, "ox", strict=True):
                axis.scatter(
                    *((cloud - centre) @ plane).T, s=10, alpha=0.5, color=colour, marker=marker, linewidths=0.7
                )
            axis.set(title=found["space"], xlabel="component 1 of the reference", ylabel="component 2")
        if rows:
            axis, place = left.pop(0), np.arange(len(rows))
            old, share, low, high = (np.array([row[x] for row in rows]) for x in ("reference", "share", "low", "high"))
            axis.barh(place - 0.2, old, 0.38, color=BLUE)
            axis.barh(place + 0.2, share, 0.38, color=VERMILION)
            axis.errorbar(share, place + 0.2, xerr=np.maximum([share - low, high - share], 0), fmt="none", ecolor=GREY)
            axis.set_yticks(place, [short(row["name"], 14) for row in rows])
            axis.set(ylim=(len(rows) - 0.4, -0.6), title="shares (new: estimated)")
        for axis, k in zip(left, order, strict=False):
            bins = np.histogram_bin_edges(np.concatenate([side[:, k] for side in values]), 20)
            for side, what, colour in zip(values, SIDES, COLOURS, strict=True):
                weights = np.full(len(side), 1 / len(side))
                axis.hist(side[:, k], bins, color=colour, alpha=0.5, label=what, weights=weights)
            axis.set(title=f"output {short(found['outputs'][k]['name'], 14)}", yscale="log", ylabel="share")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        for axis in left[len(order) :]:
            axis.axis("off")
        figure.legend(*left[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
