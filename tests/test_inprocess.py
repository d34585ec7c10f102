"""Studies of one factor in this process: which runs a config stands for, and what they leave."""

import numpy as np
import pytest
from scipy import stats

from configs import quickstart, smoke
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core.files import read_json
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import inprocess
from tl_jax.studies.report.statistics import mean_interval
from tl_jax.studies.study import grid


def test_every_arm_runs_with_every_seed_and_differs_only_as_the_baseline_says():
    runs = {(run.levels["arm"], run.seed): run.config for run in grid(inprocess.study_of(quickstart.get_config()))}
    assert sorted(runs) == [(arm, seed) for arm in ("baseline", "transfer") for seed in range(5)]
    transfer, baseline = runs["transfer", 3], runs["baseline", 3]
    assert transfer.seed == baseline.seed == 3 and transfer.seeds == transfer.baseline == ()
    assert (transfer.model.weights, baseline.model.weights) == ("builtin:glyphs", "")
    assert (transfer.groups.backbone.lr_mult, baseline.groups.backbone.lr_mult) == (0.1, 1.0)
    assert transfer.data.to_dict() == baseline.data.to_dict() and transfer.total == baseline.total


def test_replicas_are_a_study_of_one_factor_whose_levels_may_set_the_seed():
    changes = ((("seed", 1),), (("seed", 1), ("lr", 0.1)), (("data.shots", 2),))
    config = smoke.get_config()
    config.replicas = changes
    study = inprocess.study_of(config)
    runs = grid(study, free=("seed",))
    assert list(study.factors) == ["replica"] and study.seeds == (0,)
    assert [run.seed for run in runs] == [run.config.seed for run in runs] == [1, 1, 0]
    alone = [options.override(smoke.get_config(), dict(each)) for each in changes]
    assert [options.flatten(run.config) for run in runs] == [options.flatten(each) for each in alone]
    with pytest.raises(ValueError, match="replica=00-seed=1 sets seed, which the study decides"):
        grid(study)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_comparison_is_of_the_metric_that_the_task_monitors(tmp_path):
    """As comparison.json has it, from the predictions of each run."""
    arg = "task=regression,data=digits:ink,data.train=train[:10%],data.val=,data.test=test[:10%],total=(1,'steps')"
    config = smoke.get_config(f"{arg},data.shots=0,select=last,resamples=2,baseline=(('lr',1e-4),)")
    report = inprocess.run(config, tmp_path / "w")["comparison"]
    assert report == read_json(tmp_path / "w" / "comparison.json")
    metric = report["metric"]
    values = {}
    for arm, place in {"transfer": "", "baseline": "runs/baseline-seed0"}.items():
        values[arm] = read_json(tmp_path / "w" / place / "result.json")["metrics"][metric]["value"]
        assert report[metric][arm] == {"values": [values[arm]], **mean_interval([values[arm]])}
    assert report["difference"]["values"] == [values["transfer"] - values["baseline"]]
    assert metric == tasks.METRICS["regression"].monitor[0][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": (("model.weihgts", ""),)}, "'model.weihgts' does not exist .did you mean 'model.weights'"),
        ({"baseline": (("seed", 5),)}, "'seed', which every arm shares"),
        ({"baseline": (("lr", 1e-3),)}, "arm=transfer and arm=baseline are the same run"),
        ({"baseline": (("lr", "fast"),)}, "lr"),
        ({"baseline": (("lr", -1.0),)}, r"lr = -1.0"),
        ({"seeds": (1, 0)}, "a seed is named twice"),
    ],
)
def test_invalid_comparisons_are_refused(changes, message, tmp_path):
    config = smoke.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        inprocess.run(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_the_interval_of_the_mean_is_students():
    values = [0.91, 0.95, 0.93, 0.97]
    interval = mean_interval(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (interval["low"], interval["high"]) == pytest.approx(expected, rel=1e-12)
    assert mean_interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}


def test_a_request_to_stop_between_runs_starts_no_other(tmp_path):
    with pytest.raises(Preempted, match="before transfer, seed 0"):
        inprocess.run(smoke.get_config("seeds=(1,)"), tmp_path / "w", stop_requested=lambda step: True)
    assert not (tmp_path / "w").exists()
