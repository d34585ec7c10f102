"""What a race chose against what a study of all its candidates would have chosen, and what each cost:

python experiments/advice/compare.py W V

W is the race, V the study of study.py. Prints a row for W and for two choices from V: the best on val, and the best on
test, which nobody could choose.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from experiments.advice.study import TEST
from tl_jax import tasks
from tl_jax.core import files
from tl_jax.studies.report import results
from tl_jax.tasks import METRICS


def runs_of(folder: pathlib.Path) -> dict[str, results.Run]:
    """{candidate: its run} of a study with one seed."""
    return {cell[0]: next(iter(units.values())) for cell, units in results.load(folder).grid.items()}


def predictions(run: results.Run, name: str = "predictions") -> tasks.Predictions:
    return tasks.load_predictions(run.folder / f"{name}.npz")


def costs(*folders: pathlib.Path) -> tuple[float, float]:
    """(seconds, floating-point operations) of all runs in folders, of their training and all around it."""
    found = [files.read_json(path) for folder in folders for path in folder.glob("runs/*/cost.json")]
    return sum(sum(row["wall_seconds"].values()) for row in found), sum(row["flops"] or 0.0 for row in found)


def main(race: pathlib.Path, study: pathlib.Path) -> None:
    state, every = files.read_json(race / "advice.json"), runs_of(study)
    own = predictions(runs_of(race / "final")[state["chosen"]])
    metric, side = METRICS[own.spec.name].monitor[0]
    sign, summary = 1 if side == "max" else -1, tasks.summarize(own)[metric]
    unseen = {name: predictions(run, f"predictions-{TEST}") for name, run in every.items()}
    values = {name: tasks.summarize(found)[metric]["value"] for name, found in unseen.items()}
    by_val = max(every, key=lambda name: sign * every[name].scores[metric])
    by_test = max(every, key=lambda name: sign * values[name])
    print(f"| choice | candidate | {metric} on test | the race minus it |\n| --- | --- | --- | --- |")
    print(f"| race | {state['chosen']} | {summary['value']:.3f} ({summary['low']:.3f} .. {summary['high']:.3f}) | |")
    for title, name in (("study, by val", by_val), ("study, by test", by_test)):
        gap = tasks.paired_difference(own, unseen[name], metric=metric)
        shown = f"{gap['value']:+.3f} ({gap['low']:+.3f} .. {gap['high']:+.3f})"
        print(f"| {title} | {name} | {values[name]:.3f} | {shown} |")
    seconds, flops = costs(*race.glob("round*"), race / "final")
    seconds += state["ranking"]["seconds"]
    all_seconds, all_flops = costs(study)
    print(f"\n{len(every)} candidates; the race took {seconds / 60:.1f} of {state['asked']['budget']} and "
          f"{flops / 1e12:.2f} TFLOP, the study {all_seconds / 60:.1f} min and {all_flops / 1e12:.2f} TFLOP: "
          f"{seconds / all_seconds:.2f} and {flops / all_flops:.2f} of it")  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/advice/compare.py W V")
    main(*map(pathlib.Path, sys.argv[1:]))
