"""All classic methods on the twelve tasks of Office-Caltech (SURF), and which published cells they reproduce:

python experiments/office_caltech/run.py FOLDER OUT

FOLDER has the files *_SURF_L10.mat with fts [N, 800] and labels 1 .. 10; OUT gets table.csv, table.md and published.md.
"""

import csv
import itertools
import pathlib
import sys

import numpy as np
import scipy.io

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tl_jax.api import classic as command
from tl_jax.methods import classic

FILES = {"C": "caltech", "A": "amazon", "W": "webcam", "D": "dslr"}
PAIRS = [(s, t) for s in "CAWD" for t in FILES if s != t]
GROUPS = {
    "1nn": ("pca", "tca", "jda", "sa", "gfk", "coral", "ot_da", "autoencoder"),
    "logistic": classic.WEIGHTING,
}
# (table, method, tolerance in points): {task: accuracy}
PUBLISHED = {
    ("first", "none", 0.01): {
        "C-A": 23.70, "C-W": 25.76, "C-D": 25.48, "A-C": 26.00, "A-W": 29.83, "A-D": 25.48,
        "W-C": 19.86, "W-A": 22.96, "W-D": 59.24, "D-C": 26.27, "D-A": 28.50, "D-W": 63.39,
    },
    ("first", "pca", 0.01): {"C-A": 36.95, "C-W": 32.54},
    ("first", "gfk", 0.01): {"C-A": 41.02, "C-W": 40.68},
    ("first", "tca", 0.15): {"C-A": 38.20, "C-W": 38.64},
    ("first", "jda", 0.15): {"C-A": 44.78, "C-W": 41.69},
    ("second", "pca", 0.15): {"C-A": 39.5, "C-W": 34.6},
    ("second", "tca", 0.15): {"C-A": 45.6, "C-W": 39.3},
    ("second", "gfk", 0.15): {"C-A": 46.0, "C-W": 37.0},
    ("second", "jda", 0.15): {"C-A": 43.1, "C-W": 39.3},
    ("second", "coral", 0.15): {"C-A": 52.1, "C-W": 46.4},
}  # fmt: skip


def load(folder: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{domain: (features, labels from 0)}: rows over their sum, then each domain's columns to mean 0, deviation 1."""
    found = {}
    for letter, name in FILES.items():
        arrays = scipy.io.loadmat(folder / f"{name}_SURF_L10.mat")
        found[letter] = classic.scale(arrays["fts"], ("row_sum", "zscore")), np.int64(arrays["labels"].ravel()) - 1
    return found


def measure(domains: dict) -> list[command.Row]:
    """A row for each task, classifier and method."""
    rows = []
    for (s, t), (classifier, names) in itertools.product(PAIRS, GROUPS.items()):
        found = command.compare(domains[s], domains[t][0], {name: {} for name in names}, classifier=classifier)
        for row in command.score({name: each[0] for name, each in found.items()}, domains[t][1]):
            seconds, facts = found[row["method"]][2], found[row["method"]][1].facts
            rows.append({"task": f"{s}-{t}", "classifier": classifier, **row, "seconds": seconds, "facts": facts})
        print(f"{s}-{t} {classifier}", flush=True)
    return rows


def published(rows: list[command.Row]) -> list[str]:
    """A line for each published cell: reproduced or not."""
    ours = {(r["method"], r["task"]): 100 * r["accuracy"]["value"] for r in rows if r["classifier"] == "1nn"}
    lines = [
        "| published table | method | task | published | here | reproduced |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for (table, method, tolerance), cells in PUBLISHED.items():
        for task, value in cells.items():
            own = ours[method, task]
            verdict = "yes" if abs(round(own, 2) - value) <= tolerance + 1e-9 else f"no ({own - value:+.2f})"
            lines.append(f"| {table} | {method} | {task} | {value:.2f} | {own:.2f} | {verdict} (within {tolerance}) |")
    return lines


def table(rows: list[command.Row]) -> list[str]:
    """Accuracy in percent by method and task; then a line for each case of negative transfer."""
    tasks = [f"{s}-{t}" for s, t in PAIRS]
    lines = [f"| method | classifier | {' | '.join(tasks)} | mean |", f"| --- | --- |{' ---: |' * 13}"]
    for classifier, names in GROUPS.items():
        for name in ("none", *names):
            own = [r for r in rows if (r["classifier"], r["method"]) == (classifier, name)]
            values = [100 * r["accuracy"]["value"] for r in own]
            cells = [f"{x:.2f}{'*' * r['worse']}" for x, r in zip(values, own, strict=True)]
            lines.append(f"| {name} | {classifier} | {' | '.join(cells)} | {np.mean(values):.2f} |")
    lines += [
        "",
        "Below the same classifier without adaptation (* negative transfer: the whole interval is below 0):",
        "",
    ]
    lines += [
        "| method | classifier | task | points against none | paired 95 % interval |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for r in rows:
        value, low, high = (100 * r["against_none"][part] for part in ("value", "low", "high"))
        if value < 0:
            name = r["method"] + "*" * r["worse"]
            lines.append(f"| {name} | {r['classifier']} | {r['task']} | {value:+.2f} | {low:+.2f} .. {high:+.2f} |")
    return lines


def main(folder: pathlib.Path, out: pathlib.Path) -> None:
    rows = measure(load(folder))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "table.csv").open("w", newline="") as file:
        writer, keys = csv.writer(file), ("accuracy", "against_none")
        parts = [f"{key}_{part}" for key in keys for part in ("value", "low", "high")]
        writer.writerow(["task", "classifier", "method", *parts, "worse", "seconds", "effective"])
        for r in rows:
            numbers = [f"{r[key][part]:.6f}" for key in keys for part in ("value", "low", "high")]
            last = f"{r['seconds']:.2f}", f"{r['facts'].get('effective', float('nan')):.1f}"
            writer.writerow([r["task"], r["classifier"], r["method"], *numbers, r["worse"], *last])
    for name, lines in (("table.md", table(rows)), ("published.md", published(rows))):
        (out / name).write_text("\n".join([*lines, ""]))
    print("\n".join(table(rows) + [""] + published(rows)))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/office_caltech/run.py FOLDER OUT")
    main(*map(pathlib.Path, sys.argv[1:]))
