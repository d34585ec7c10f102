"""Compares scores of features with measured fine-tuning, network by network and target by target:

python experiments/which_source/scores.py MATERIAL FOLDER W

FOLDER is that of prepare.py; W/TARGET has the study of each target. Prints tables, and writes W/scores.csv with every
number behind them.
"""

import csv
import pathlib
import sys

import numpy as np
import scipy

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import tl_jax
from experiments.which_source.study import NETWORKS, TARGETS, data_of, task_of, weights_of
from tl_jax.methods.scores import SCORES
from tl_jax.studies.report import results

MEASURED = "fine-tuned"
Columns = dict[str, np.ndarray]  # {score or MEASURED: a number of each network, nan where it has none}


def measured(folder: pathlib.Path) -> np.ndarray:
    """Accuracy of each network on test after fine-tuning: the mean over seeds at the better of its rates."""
    found = results.load(folder)
    means = {cell: np.mean([*found.scores(cell, "accuracy").values()]) for cell in found.grid}
    return np.array([max(x for cell, x in means.items() if cell[0] == network) for network in NETWORKS])


def scored(target: str, root: str, material: str) -> Columns:
    """The scores of each network for the examples that the study trains on."""
    data, networks = data_of(target, root, material), {}
    for title, (name, file, options) in NETWORKS.items():
        size = options.get("model.image_size", 0)
        networks[title] = tl_jax.load(
            name, weights_of(file, material), image_size=size, num_classes=None if file else 0
        )
    how = {"split": data["train"], "labels": data.get("labels", ()), "shots": data.get("shots", 0)}
    found = tl_jax.rank(data["source"], [*networks.values()], task=task_of(target), **how)
    rows = {(row["name"], row["weights"]): row["scores"] for row in found["networks"]}
    own = [rows[network.name, network.weights] for network in networks.values()]
    return {name: np.array([row[name] for row in own], float) for name in SCORES}


def tau(score: np.ndarray, accuracy: np.ndarray) -> float:
    """Weighted Kendall's tau (Vigna 2015) over the networks that have the score."""
    known = ~np.isnan(score)
    return float(scipy.stats.weightedtau(score[known].round(9), accuracy[known].round(9)).statistic)


def lost(score: np.ndarray, accuracy: np.ndarray) -> float:
    """Points of accuracy by which the network that the score puts first is below the best."""
    return 100 * float(accuracy.max() - accuracy[np.nanargmax(score)])


def table(head: list[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    return "\n".join(lines + [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()])


def main(material: str, root: str, folder: pathlib.Path) -> None:
    found = {x: {**scored(x, root, material), MEASURED: measured(folder / x)} for x in TARGETS}
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("target", "network", *SCORES, MEASURED))
        for target, columns in found.items():
            rows = zip(NETWORKS, *columns.values(), strict=True)
            writer.writerows((target, network, *(f"{x:.6g}" for x in values)) for network, *values in rows)
    accuracy = {target: columns[MEASURED] for target, columns in found.items()}
    print(table(["accuracy after fine-tuning", *TARGETS],
                {x: [f"{accuracy[t][i]:.3f}" for t in TARGETS] for i, x in enumerate(NETWORKS)}))  # fmt: skip
    for title, function, form in (("weighted tau", tau, ".2f"), ("points lost", lost, ".1f")):
        cells = {name: [function(found[t][name], accuracy[t]) for t in TARGETS] for name in SCORES}
        rows = {name: [f"{x:{form}}" for x in (*row, np.mean(row))] for name, row in cells.items()}
        print("\n" + table([title, *TARGETS, "mean"], rows))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python experiments/which_source/scores.py MATERIAL FOLDER W")
    main(sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3]))
