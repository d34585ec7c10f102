"""What no network is needed for: a logistic regression on counts of words, for the examples that the study trains on.

python experiments/text/baselines.py FOLDER sst2 [W of the study]

FOLDER is that of prepare.py. Counts are TF-IDF of words and pairs of words, of hotel reviews of 1 to 3 characters.
scikit-learn's defaults (C = 1) throughout: nothing is chosen. With W, the table has the study's cells too, and how much
better they are, text by text. Intervals are of the bootstrap over test texts, the lowest and highest of the seeds'.
"""

import pathlib
import sys

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from experiments.text.study import SHOTS
from tl_jax import tasks
from tl_jax.data import sources
from tl_jax.studies.report import results

SEEDS = (0, 1, 2)
COUNTS = {"hotel": {"analyzer": "char", "ngram_range": (1, 3)}}


def predict(folder: pathlib.Path, data: str, shots: int, seed: int) -> tasks.Predictions:
    train = sources.load(f"text:{folder / data}", "train", shots=shots, seed=seed)
    test = sources.load(f"text:{folder / data}", "test")
    counts = TfidfVectorizer(sublinear_tf=True, **COUNTS.get(data, {"ngram_range": (1, 2), "token_pattern": r"\S+"}))
    x = counts.fit_transform([row[0] for row in train.inputs.rows])
    model = LogisticRegression(max_iter=10_000).fit(x, train.labels)
    log_p = model.predict_log_proba(counts.transform([row[0] for row in test.inputs.rows]))
    spec = tasks.fit_spec("classification", train.labels, train.class_names)
    return tasks.make_predictions({"logits": log_p.astype(np.float32)}, test.labels, list(test.ids), spec)


def shown(rows: list[dict], sign: str = "") -> str:
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    return f"{np.mean([row['value'] for row in rows]):{sign}.3f} ({low:{sign}.3f} .. {high:{sign}.3f})"


def main(folder: pathlib.Path, data: str, workdir: pathlib.Path | None = None) -> None:
    cells: dict[tuple[str, str], list[tasks.Predictions]] = {}
    for shots in SHOTS[data]:
        seeds = SEEDS if shots else SEEDS[:1]  # all examples are the same ones
        cells["TF-IDF", str(shots or "all")] = [predict(folder, data, shots, seed) for seed in seeds]
    known = dict(cells)
    if workdir is not None:
        for cell, units in results.load(workdir).grid.items():
            folders = [run.folder for run in units.values() if run.state == "done"]
            if folders:
                cells[cell] = [tasks.load_predictions(path / "predictions.npz") for path in folders]
    columns = [str(shots or "all") for shots in SHOTS[data]]
    print(f"{data}, accuracy on test by examples of each class\n")
    print(f"| | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for arm in dict.fromkeys(arm for arm, _ in cells):
        found = [cells.get((arm, column), ()) for column in columns]
        texts = [shown([tasks.summarize(run)["accuracy"] for run in runs]) if runs else "" for runs in found]
        print(f"| {arm} | {' | '.join(texts)} |")
    print(f"\n| minus TF-IDF | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    for arm in dict.fromkeys(arm for arm, _ in cells if arm != "TF-IDF"):
        texts = []
        for column in columns:
            runs, references = cells.get((arm, column), ()), known["TF-IDF", column]
            pairs = zip(runs, references * (1 if len(references) > 1 else len(runs)), strict=False)
            rows = [tasks.paired_difference(run, reference, metric="accuracy") for run, reference in pairs]
            texts.append(shown(rows, "+") if rows else "")
        print(f"| {arm} | {' | '.join(texts)} |")


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4:
        sys.exit("usage: python experiments/text/baselines.py FOLDER sst2|trec|hotel [W]")
    main(pathlib.Path(sys.argv[1]), sys.argv[2], *map(pathlib.Path, sys.argv[3:]))
