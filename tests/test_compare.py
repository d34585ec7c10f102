"""Arms and seeds: which runs a config stands for, and the interval of their mean."""

import numpy as np
import pytest
from scipy import stats

from configs import quickstart, smoke
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import compare


def test_every_arm_runs_with_every_seed_and_differs_only_as_the_baseline_says():
    runs = compare.arms(quickstart.get_config())
    assert {arm: list(seeds) for arm, seeds in runs.items()} == {
        "transfer": [0, 1, 2, 3, 4],
        "baseline": [0, 1, 2, 3, 4],
    }
    transfer, baseline = runs["transfer"][3], runs["baseline"][3]
    assert transfer.seed == baseline.seed == 3 and transfer.seeds == transfer.baseline == ()
    assert (transfer.model.weights, baseline.model.weights) == ("builtin:glyphs", "")
    assert (transfer.groups.backbone.lr_mult, baseline.groups.backbone.lr_mult) == (0.1, 1.0)
    assert transfer.data.to_dict() == baseline.data.to_dict() and transfer.total == baseline.total


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": (("model.weihgts", ""),)}, "'model.weihgts' does not exist .did you mean 'model.weights'"),
        ({"baseline": (("seed", 5),)}, "'seed', which every arm shares"),
        ({"baseline": (("lr", 1e-3),)}, "changes nothing"),
        ({"baseline": (("lr", "fast"),)}, "lr"),
        ({"baseline": (("lr", -1.0),)}, r"lr = -1.0"),
        ({"seeds": (1, 0)}, "a seed is named twice"),
    ],
)
def test_comparisons_that_cannot_be_meant_are_refused(changes, message):
    config = smoke.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        compare.arms(config)


def test_the_interval_of_the_mean_is_students():
    values = [0.91, 0.95, 0.93, 0.97]
    interval = compare.mean_interval(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (interval["low"], interval["high"]) == pytest.approx(expected, rel=1e-12)
    assert compare.mean_interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}


def test_a_request_to_stop_between_runs_starts_no_other(tmp_path):
    with pytest.raises(Preempted, match="before transfer, seed 0"):
        compare.compare(smoke.get_config("seeds=(1,)"), tmp_path / "w", stop_requested=lambda: True)
    assert not (tmp_path / "w").exists()
