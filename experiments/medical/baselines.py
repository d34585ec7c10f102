"""What no network is needed for, and how much better the networks of a study are, photo by photo:

python experiments/medical/baselines.py FOLDER [W of ask=count] [W of ask=platelets]

FOLDER is that of prepare.py. The constant is the mean count of train, or its majority. The other is a ridge or logistic
regression on histograms of colours, whose penalty is chosen on val as the threshold of the runs is. All errors are on
the test photos, with the bootstrap over photos of tl_jax/tasks.
"""

import pathlib
import sys

import numpy as np
from PIL import Image
from sklearn import linear_model, pipeline, preprocessing

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from experiments.medical.study import ASKED
from tl_jax import tasks
from tl_jax.data import sources
from tl_jax.studies.report import results

SPLITS = ("train", "val", "test")
PENALTIES = 10.0 ** np.arange(-4, 5)


def histogram(path: pathlib.Path) -> np.ndarray:
    """The square roots of the shares of pixels in 64 boxes of the RGB cube and 16 levels of each channel, [112]."""
    with Image.open(path) as file:
        image = np.asarray(file.convert("RGB"))
    boxes = (image // 64).reshape(-1, 3) @ (16, 4, 1)
    levels = [np.bincount(image[..., channel].ravel() // 16, minlength=16) for channel in range(3)]
    return np.sqrt(np.concatenate([np.bincount(boxes, minlength=64), *levels]) / boxes.size)


def fit(make, x, y):
    return pipeline.make_pipeline(preprocessing.StandardScaler(), make).fit(x, y)


def candidates(task: str, x: np.ndarray, y: np.ndarray):
    """{name: functions from features to answers}, several where val has to choose."""
    y = y.ravel()
    if task == "regression":
        ridges = [fit(linear_model.Ridge(alpha=penalty), x, y) for penalty in PENALTIES]
        constant = float(y.mean())
        answers = [lambda x, model=model: model.predict(x)[:, None] for model in ridges]
        return {"mean of train": [lambda x: np.full((len(x), 1), constant)], "colour histograms": answers}
    models = [fit(linear_model.LogisticRegression(C=1 / penalty, max_iter=10_000), x, y) for penalty in PENALTIES]
    constant = float(np.log(y.mean() / (1 - y.mean())))
    answers = [lambda x, model=model: model.decision_function(x) for model in models]
    return {"majority of train": [lambda x: np.full(len(x), constant)], "colour histograms": answers}


def baselines(folder: pathlib.Path, ask: str) -> dict[str, tasks.Predictions]:
    """{name: predictions of the test photos}."""
    task, column, _ = ASKED[ask]
    table = folder / "labels.csv"
    data = {split: sources.load(f"csv:{table}", split, task=task, labels=(column,)) for split in SPLITS}
    x = {split: np.stack([histogram(table.parent / name) for name in source.ids]) for split, source in data.items()}
    spec = tasks.fit_spec(task, data["train"].labels, data["train"].class_names)
    output = "values" if task == "regression" else "logits"

    def predict(answer, split, spec=spec):
        source = data[split]
        return tasks.make_predictions({output: answer(x[split])}, source.labels, list(source.ids), spec)

    found = {}
    for title, answers in candidates(task, x["train"], data["train"].labels).items():
        best = min(answers, key=lambda answer: tasks.scores(predict(answer, "val"))["loss"])
        found[title] = predict(best, "test", tasks.METRICS[task].calibrate(predict(best, "val")))
    return found


def above_zero(predictions: tasks.Predictions) -> tasks.Predictions:
    """Those of the photos whose label is not 0."""
    kept = np.asarray(predictions.labels).reshape(len(predictions.labels), -1)[:, 0] > 0
    outputs = {name: values[kept] for name, values in predictions.outputs.items()}
    return predictions._replace(
        outputs=outputs, labels=predictions.labels[kept], ids=predictions.ids[kept], features=None
    )


def report(folder: pathlib.Path, ask: str, workdir: pathlib.Path | None) -> None:
    """Prints errors and differences; of counts also without the photos of 0, which nobody has counted."""
    known, cells = baselines(folder, ask), {}
    if workdir is not None:
        found = results.load(workdir)
        for cell, units in found.grid.items():
            folders = [run.folder for run in units.values() if run.state == "done"]
            if folders:
                cells[", ".join(cell)] = [tasks.load_predictions(path / "predictions.npz") for path in folders]
    tables = {"all": lambda predictions: predictions} | ({"count > 0": above_zero} if ask == "count" else {})
    for title, chosen in tables.items():
        compare(ask, title, {name: chosen(x) for name, x in known.items()},
                {name: list(map(chosen, runs)) for name, runs in cells.items()})  # fmt: skip


def compare(ask: str, title: str, known: dict, cells: dict[str, list]) -> None:
    metrics, (*_, reference) = ASKED[ask][2], known.values()
    print(f"\n{ask}, {len(reference.labels)} test photos ({title}), 95 % interval over photos\n")
    print(f"| | {' | '.join(metrics)} |\n| --- |{' --- |' * len(metrics)}")
    for name, predictions in known.items():
        summary = tasks.summarize(predictions)
        print(f"| {name} | {' | '.join(shown(summary[metric]) for metric in metrics)} |")
    for name, runs in cells.items():
        summaries = [tasks.summarize(run) for run in runs]
        texts = [over_seeds([summary[metric] for summary in summaries]) for metric in metrics]
        print(f"| {name} | {' | '.join(texts)} |")
    print(f"\n| minus colour histograms | {' | '.join(metrics)} |\n| --- |{' --- |' * len(metrics)}")
    for name, runs in cells.items():
        rows = {metric: [tasks.paired_difference(run, reference, metric=metric) for run in runs] for metric in metrics}
        print(f"| {name} | {' | '.join(over_seeds(rows[metric], '+') for metric in metrics)} |")


def over_seeds(rows: list[dict], sign: str = "") -> str:
    """The mean of the seeds, with the lowest and the highest end of their intervals."""
    ends = {"low": min(row["low"] for row in rows), "high": max(row["high"] for row in rows)}
    return shown({"value": np.mean([row["value"] for row in rows]), **ends}, sign)


def shown(row: dict, sign: str = "") -> str:
    return f"{row['value']:{sign}.3f} ({row['low']:{sign}.3f} .. {row['high']:{sign}.3f})"


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit("usage: python experiments/medical/baselines.py FOLDER [W of ask=count] [W of ask=platelets]")
    folder, *workdirs = map(pathlib.Path, sys.argv[1:])
    for ask, workdir in zip(ASKED, [*workdirs, None, None], strict=False):
        report(folder, ask, workdir)
