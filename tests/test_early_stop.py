"""Early stopping: at which evaluation, what the run leaves, and that a stop or a kill around it changes nothing."""

import json
import shutil

import numpy as np
import pytest
from test_train import remains

from configs import diabetes, transfer
from tl_jax import config as options
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.training.build import build
from tl_jax.training.loop import stopped_early
from tl_jax.training.train import train

SCORE = {"max": "accuracy", "min": "rmse"}
STOPS = {"max": {"patience": 3}, "min": {"patience": 3, "min_delta": 3.0}}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two classes that overlap, as rows of numbers."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "rows.csv"
    labels = np.arange(120) % 2
    rows = rng.normal(size=(120, 3)) + labels[:, None]
    split = ["train", "val", "test"]
    lines = [",".join([*map(str, row), "ab"[labels[i]], split[i // 40]]) for i, row in enumerate(rows)]
    path.write_text("\n".join(["first,second,third,label,split", *lines]))
    return path


def make_config(side, table, **changes):
    """A perceptron that is monitored by its accuracy ("max") or by its error ("min")."""
    splits = {"data.train": "train", "data.val": "val", "data.test": "test"}
    if side == "max":
        config = transfer.get_config(f"model=mlp_small,data=table:{table},method=full")
    else:
        config, splits = diabetes.get_config(), {}
    return options.override(config, {
        **splits, "data.shots": 0, "batch_size": 16, "total": (40.0, "steps"), "log_every": (1.0, "steps"),
        "eval_every": (2.0, "steps"), "lr": 0.1, "schedule.name": "constant", "resamples": 10, "ema": 0.5,
        "select": "last" if side == "max" else "best_val", "patience": 0, "min_delta": 0.0, **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def runs(table):
    return {side: build(make_config(side, table, patience=1), sharding.make_parallel()) for side in SCORE}


@pytest.mark.parametrize(
    ("side", "values", "patience", "min_delta", "stop"),
    [
        ("max", [0.5, 0.6, 0.6, 0.6, 0.9], 2, 0.0, 4),  # as good as the best is no improvement
        ("max", [0.5, 0.6, 0.5, 0.7, 0.6, 0.5, 0.9], 2, 0.0, 6),
        ("max", [0.5, 0.6, 0.5, 0.55, 0.58], 2, 0.0, 4),  # better than the one before, and worse than the best
        ("max", [0.0, 0.0], 1, 0.0, 2),
        ("max", [0.5, 0.6, 0.7], 1, 0.0, None),
        ("max", [0.5, 0.75, 1.0], 1, 0.25, 2),  # by min_delta is not by more than it
        ("max", [0.5, 0.52, 0.54, 0.56, 0.58, 0.60], 3, 0.05, None),  # slowly, but from the best on by more
        ("max", [0.5, 0.52, 0.54, 0.56], 2, 0.05, 3),
        ("max", [0.5, None, 0.5, None, 0.5], 2, 0.0, 5),  # a score that is not defined is no evaluation
        ("min", [9.0, 8.0, 8.0, 8.0], 2, 0.0, 4),
        ("min", [1.0, 2.0, 3.0], 2, 0.0, 3),
        ("min", [9.0, 8.0, 7.0, 6.0], 1, 0.0, None),
        ("min", [9.0, 8.5, 8.0, 7.5], 2, 0.75, None),
        ("min", [9.0, 8.5, 8.0, 7.5], 2, 1.5, 3),
        ("min", [1.0] * 9, 0, 0.0, None),
    ],
)
def test_a_run_stops_after_patience_evaluations_without_improvement(runs, side, values, patience, min_delta, stop):
    loop = runs[side].settings.loop._replace(patience=patience, min_delta=min_delta)
    run = runs[side]._replace(settings=runs[side].settings._replace(loop=loop))
    rows = [row for i, value in enumerate(values, 1) for row in ({"step": i}, {"step": i, f"val/{SCORE[side]}": value})]
    for count in range(len(values) + 1):
        assert stopped_early(run, rows[: 2 * count]) == (stop is not None and count >= stop), count


def first_stop(scores, patience, min_delta=0.0):
    """The evaluation, from 1, at which a run ends; scores: more is better."""
    better = []  # the evaluations that improved on all before
    for i, score in enumerate(scores):
        if not better or score > scores[better[-1]] + min_delta:
            better.append(i)
    return next(i + patience for i, j in zip(better, [*better[1:], len(scores)], strict=True) if j - i > patience) + 1


@pytest.fixture(scope="module", params=SCORE)
def stopped(request, table, tmp_path_factory):
    """(side, the step at which it should end, folder of a run that stopped early, folder of the same without)."""
    side, folder = request.param, tmp_path_factory.mktemp(request.param)
    train(make_config(side, table), folder / "whole", verbose=False)
    train(make_config(side, table, **STOPS[side]), folder / "stopped", verbose=False)
    rows = read_rows(folder / "whole")
    values = [row[key] for row in rows if (key := f"val/{SCORE[side]}") in row]
    stop = 2 * first_stop([value if side == "max" else -value for value in values], **STOPS[side])
    assert len(values) == 20 and 8 < stop < 40, values
    return side, stop, folder / "stopped", folder / "whole"


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.thin(1)
def test_a_run_that_stops_early_is_the_beginning_of_the_run_that_does_not(stopped):
    side, stop, folder, whole = stopped
    assert read_rows(folder) == [row for row in read_rows(whole) if row["step"] <= stop]
    result, other = (json.loads((path / "result.json").read_text()) for path in (folder, whole))
    assert result["stopped_early_at"] == stop and "stopped_early_at" not in other
    assert result["total_steps"] == other["total_steps"] == 40
    scores = {row["step"]: row[key] for row in read_rows(folder) if (key := f"val/{SCORE[side]}") in row}
    assert result["step"] == (stop if side == "max" else min(scores, key=scores.get))


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("ago", [1, *(pytest.param(ago, marks=pytest.mark.slow) for ago in (2, 0))])
def test_a_run_that_is_told_to_stop_before_or_at_the_end_goes_on_to_the_same_files(stopped, table, tmp_path, ago):
    side, stop, folder, _ = stopped
    config = make_config(side, table, **STOPS[side])
    with pytest.raises(Preempted, match=f"after step {stop - ago} of 40"):
        train(config, tmp_path / "w", verbose=False, stop_requested=lambda done: done == stop - ago)
    train(config, tmp_path / "w", verbose=False)
    ours, reference = remains(tmp_path / "w"), remains(folder)
    if ago == 1:  # between two evaluations there is one checkpoint more
        ours.pop("checkpoints"), reference.pop("checkpoints")
    assert ours == reference


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_is_killed_at_the_last_evaluation_goes_on_to_the_same_files(stopped, table, tmp_path):
    """Nothing is saved of the evaluation at which it would have stopped."""
    side, stop, folder, _ = stopped

    def kill(done):
        if done == stop:
            raise Killed
        return False

    config = make_config(side, table, **STOPS[side])
    with pytest.raises(Killed):
        train(config, tmp_path / "w", verbose=False, stop_requested=kill)
    train(config, tmp_path / "w", verbose=False, stop_requested=lambda done: done > stop)
    assert remains(tmp_path / "w") == remains(folder)


@pytest.mark.thin(1)
def test_a_run_that_is_killed_behind_the_last_evaluation_takes_no_further_step(stopped, table, tmp_path):
    side, _, folder, _ = stopped
    shutil.copytree(folder, tmp_path / "w")
    for name in ("result.json", "predictions.npz", "model.safetensors", "trained.safetensors", "metrics.jsonl"):
        (tmp_path / "w" / name).unlink()
    config = make_config(side, table, **STOPS[side])
    train(config, tmp_path / "w", verbose=False, stop_requested=lambda done: 1 / 0)
    assert remains(tmp_path / "w") == remains(folder)


def test_patience_with_several_phases_is_refused():
    config = transfer.get_config("data=digits")
    phases = ((("total", (2.0, "steps")),), (("total", (2.0, "steps")), ("method.name", "full")))
    options.check(options.override(config, {"patience": 2, "phases": phases[:1]}))
    with pytest.raises(ValueError, match=r"^invalid options:\n  patience = 2 would leave out some of the 2 phases"):
        options.check(options.override(config, {"patience": 2, "phases": phases}))
