"""Evaluation designs: the folds are scikit-learn's, a bootstrap keeps every class, bad designs are refused."""

import numpy as np
import pytest
from sklearn.model_selection import KFold, StratifiedKFold

from tl_jax.data import resample

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [9, 20, 31]))


@pytest.mark.parametrize("split_seed", [0, 7])
def test_folds_are_those_of_scikit_learn(split_seed):
    reference = StratifiedKFold(4, shuffle=True, random_state=split_seed).split(LABELS, LABELS)
    for fold, (train, held_out) in enumerate(reference):
        ours = resample.split(LABELS, f"kfold:4:{fold}", split_seed)
        np.testing.assert_array_equal(ours[0], train)
        np.testing.assert_array_equal(ours[1], held_out)


def test_folds_of_targets_and_of_several_labels_are_plain():
    for labels in (np.random.default_rng(0).normal(size=(60, 2)), np.eye(60, 3, dtype=np.int32)):
        folds = [resample.split(labels, f"kfold:4:{fold}", 1) for fold in range(4)]
        expected = {len(held) for _, held in KFold(4).split(labels)}
        assert {len(held) for _, held in folds} == expected
        assert sorted(i for _, held in folds for i in held) == list(range(60))
        assert len(resample.split(labels, "bootstrap:0", 1)[0]) == 60


def test_a_design_is_its_runs_and_every_repeat_holds_out_each_example_once():
    assert resample.folds("") == resample.folds("holdout") == [("", 0)]
    assert resample.folds("loo") == [("loo", 0)]
    assert resample.folds("bootstrap:2") == [("bootstrap:0", 0), ("bootstrap:1", 0)]
    assert resample.folds("kfold:3") == [(f"kfold:3:{fold}", 0) for fold in range(3)]
    assert resample.folds("kfold:3x2") == [(f"kfold:3:{fold}", repeat) for repeat in range(2) for fold in range(3)]
    splits = [resample.split(LABELS, fold, 5 + repeat) for fold, repeat in resample.folds("kfold:3x2")]
    repeats = [np.concatenate([held for _, held in splits[i : i + 3]]) for i in (0, 3)]
    for held_out in repeats:
        np.testing.assert_array_equal(np.sort(held_out), np.arange(60))
    assert not np.array_equal(*repeats)
    for i, (train, held_out) in enumerate(resample.leave_one_out(LABELS)):
        assert held_out.tolist() == [i] and train.tolist() == [j for j in range(60) if j != i]


def test_a_bootstrap_draws_with_replacement_and_scores_what_was_not_drawn():
    draws = [resample.split(LABELS, f"bootstrap:{number}", 3) for number in range(200)]
    for train, held_out in draws:
        assert len(train) == 60 and sorted({*train} | {*held_out}) == list(range(60)) and not {*train} & {*held_out}
        assert set(LABELS[train]) == {0, 1, 2}
    share = np.mean([len(held_out) / 60 for _, held_out in draws])
    assert abs(share - (1 - 1 / 60) ** 60) < 0.01  # several standard errors
    again = resample.split(LABELS, "bootstrap:7", 3)
    np.testing.assert_array_equal(again[0], draws[7][0])
    assert not np.array_equal(again[0], draws[8][0])
    assert not np.array_equal(again[0], resample.split(LABELS, "bootstrap:7", 4)[0])


def test_a_bootstrap_that_misses_a_class_is_drawn_again_the_same_way():
    labels = np.repeat(np.arange(8), 3)  # a plain draw holds all eight classes in fewer than seven of ten cases
    for number in range(40):
        train, held_out = resample.split(labels, f"bootstrap:{number}", 0)
        assert len(set(labels[train])) == 8 and len(held_out)
        np.testing.assert_array_equal(train, resample.split(labels, f"bootstrap:{number}", 0)[0])
    with pytest.raises(ValueError, match="none of 1000 draws of 800 examples held all 400 classes"):
        resample.split(np.repeat(np.arange(400), 2), "bootstrap:0", 0)


@pytest.mark.parametrize("design", ["kfold", "kfold:1", "kfold:5x0", "kfold:5:0", "bootstrap:0", "jackknife:3", "LOO"])
def test_unknown_designs_are_refused_with_the_known_ones(design):
    with pytest.raises(ValueError, match=r"unknown design .*known: holdout, kfold:K, kfold:KxR, bootstrap:N, loo"):
        resample.folds(design)


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        ("kfold:5", "unknown fold 'kfold:5'; known: kfold:K:FOLD, bootstrap:NUMBER"),
        ("loo", "loo has no single fold"),
        ("kfold:5:5", "a fold from 0 to 4"),
        ("kfold:10:0", "10 folds need at least 10 examples of every class: class 0 has 9;"),
    ],
)
def test_folds_that_cannot_be_cut_are_refused(fold, message):
    with pytest.raises(ValueError, match=message):
        resample.split(LABELS, fold, 0)


def test_a_class_with_one_example_cannot_be_left_out_and_known():
    labels = np.array([0, 0, 1, 1, 2])
    for design in (resample.leave_one_out, lambda labels: resample.split(labels, "bootstrap:1", 0)):
        with pytest.raises(ValueError, match="at least 2 examples of every class: class 2 has 1"):
            design(labels)
