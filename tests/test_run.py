"""What a config stands for: where the parts of the network come from, and what is train, test and extra_eval."""

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from configs import quickstart
from tl_jax import config as options
from tl_jax.core import trees
from tl_jax.data import sources
from tl_jax.runtime import sharding
from tl_jax.training import build as run
from tl_jax.training import inputs, settings
from tl_jax.training.train import train
from tl_jax.weights import load


def make_config(**changes):
    base = {"seeds": (), "baseline": (), "resamples": 20, "data.augment": (), "data.shots": 0, "data.val": ""}
    return options.override(quickstart.get_config(), {**base, **changes})


def build(**changes):
    return run.build(make_config(**changes), sharding.make_parallel())


def load_data(config):
    return inputs.load_sources(settings.read(config))


def test_parts_that_are_reinitialised_are_random_and_the_rest_is_the_files():
    built = build(**{"model.reinit": ("stage3",), "data.train": "train[:20%]"})
    _, file, *_ = load.load("resnet8_cifar", "builtin:glyphs", 10, image_size=16)
    _, other, *_ = load.load("resnet8_cifar", "", 10, image_size=16, seed=0)
    loaded, random = trees.flatten(file), trees.flatten(other)
    origins = {row["path"]: row["origin"] for row in built.phases[0].audit["parameters"]}
    for path, leaf in trees.flatten(built.material.variables).items():
        inside = "/stage3/" in path
        np.testing.assert_array_equal(leaf, (random if inside else loaded)[path])
        if path.startswith("params/backbone"):
            assert (origins[path.removeprefix("params/")] == "new") == inside


def test_a_part_that_the_network_lacks_cannot_be_reinitialised():
    with pytest.raises(ValueError, match="stage7"):
        build(**{"model.reinit": ("stage7",)})


def test_a_kept_head_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"knows 37 classes .* the data has 10"):
        build(**{"model.keep_head": True})


def test_a_fold_is_scikit_learns_and_no_example_is_on_both_sides():
    config = make_config(**{"data.train": "train", "data.test": "", "data.resample": "kfold:5:3"})
    data, pool = load_data(config), sources.load("digits", "train")
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(pool.labels, pool.labels)
    _, held_out = list(folds)[3]
    assert data["test"].ids == tuple(pool.ids[i] for i in held_out)
    assert set(data["train"].ids) | set(data["test"].ids) == set(pool.ids)
    assert len(data["train"]) + len(data["test"]) == len(pool)


@pytest.mark.parametrize("changes", [{"data.test": "test"}, {"data.test": "", "data.shots": 5}])
def test_a_fold_beside_a_test_split_or_shots_is_refused(changes):
    with pytest.raises(ValueError, match=r"expected data.test='' and data.shots=0"):
        load_data(make_config(**{"data.resample": "kfold:5:0", **changes}))


@pytest.mark.slow
def test_a_further_set_is_scored_and_may_share_no_example_with_train(tmp_path):
    further = {
        "data.extra_eval": (("rest", "digits", "test[50%:]"),),
        "data.test": "test[:50%]",
        "total": (2.0, "steps"),
    }
    result = train(make_config(**further, **{"data.shots": 5}), tmp_path / "w", verbose=False)
    count = len(sources.load("digits", "test[50%:]"))
    assert (
        result["extra_eval"]["rest"]["count"]
        == count
        == len(np.load(tmp_path / "w" / "predictions-rest.npz")["labels"])
    )
    with pytest.raises(ValueError, match="are also in train"):
        load_data(make_config(**{"data.extra_eval": (("rest", "digits", "train[70%:]"),)}))


def test_a_frozen_teacher_counts_in_no_total_of_the_audit():
    plain = build(**{"data.train": "train[:20%]"})
    teacher = {"networks": {"teacher": {"name": "resnet8_cifar", "weights": ""}}, "terms": {"kd": {}}}
    taught = build(**{"data.train": "train[:20%]", **teacher})
    reports = [run.phases[0].audit for run in (plain, taught)]
    assert reports[0]["totals"] == reports[1]["totals"]
    assert len(reports[0]["parameters"]) < len(reports[1]["parameters"])
