"""Groups: no slice, no fold and no draw cuts one, and splits that do are refused."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

import tl_jax
from tests.test_run import load_data, make_config
from tl_jax import tasks
from tl_jax.data import resample, sources
from tl_jax.training.train import train

LABELS = np.random.default_rng(0).integers(0, 3, 240)
GROUPS = np.array([f"patient{i}" for i in np.random.default_rng(1).integers(0, 40, 240)])


def write(folder, form, task="classification"):
    """240 examples with their groups as a source of this form; returns the source and data.group."""
    rng, rows = np.random.default_rng(2), range(240)
    label = {"classification": LABELS, "regression": rng.normal(size=240), "multilabel": rng.integers(0, 2, 240)}[task]
    if form == "table":
        lines = [f"{rng.normal()},{label[i]},{GROUPS[i]}" for i in rows]
        (folder / "t.csv").write_text("\n".join(["x,label,who", *lines]) + "\n")
        return f"table:{folder / 't.csv'}", "who"
    images = rng.integers(0, 256, (240, 8, 8, 3), np.uint8)
    if form == "arrays":
        np.savez(folder / "a.npz", image=images, label=label, who=GROUPS)
        return f"arrays:{folder / 'a.npz'}", "who"
    names = [f"{LABELS[i] if form == 'folder' else 'all'}/{GROUPS[i]}_{i}.png" for i in rows]
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / name)
    if form == "folder":
        return f"folder:{folder}", r"/(patient\d+)_"
    lines = [f"{names[i]},{label[i]},{GROUPS[i]}" for i in rows]
    (folder / "labels.csv").write_text("\n".join(["file,label,who", *lines]) + "\n")
    return f"csv:{folder / 'labels.csv'}", "who"


@pytest.mark.parametrize("form", ["table", "arrays", "folder", "csv"])
def test_slices_keep_groups_whole_and_lose_nothing(tmp_path, form):
    source, group = write(tmp_path, form)
    whole = sources.load(source, "train", group=group)
    for seed in range(3):
        for bounds in (("", "80%", ""), ("", "30%", "55%", ""), ("", "100", "")):
            cuts = [f"train[{a}:{b}]" for a, b in itertools.pairwise(bounds)]
            parts = [sources.load(source, cut, group=group, split_seed=seed) for cut in cuts]
            assert sorted(i for part in parts for i in part.ids) == sorted(whole.ids)
            members = [set(part.groups) for part in parts]
            assert sum(map(len, members)) == len(set(whole.groups)) == 40
            assert abs(len(parts[0]) - (100 if bounds[1] == "100" else 2.4 * float(bounds[1][:-1]))) < 8
            for part in parts if len(parts) == 2 else ():
                share = np.bincount(part.labels, minlength=3) / len(part)
                assert np.abs(share - np.bincount(whole.labels) / 240).max() < 0.15  # by the classes of the groups


@pytest.mark.parametrize("task", ["regression", "multilabel"])
@pytest.mark.parametrize("form", ["table", "csv"])
def test_targets_and_several_labels_have_groups_too(tmp_path, task, form):
    source, group = write(tmp_path, form, task)
    parts = [sources.load(source, cut, task=task, group=group) for cut in ("train[:70%]", "train[70%:]")]
    assert not set(parts[0].groups) & set(parts[1].groups) and len(parts[0]) + len(parts[1]) == 240


def test_without_groups_slices_are_as_before():
    order = sources.stratified_order(sources.load("digits", "train").labels, 3)
    half = sources.load("digits", "train[:50%]", split_seed=3)
    assert list(half.ids) == [f"train/{i}" for i in np.sort(order[: round(len(order) / 2)])]


@pytest.mark.parametrize("design", ["kfold:5:0", "kfold:5:4", "bootstrap:0", "bootstrap:7"])
@pytest.mark.parametrize("labels", [LABELS, LABELS.astype(np.float32)[:, None]], ids=["classes", "targets"])
def test_folds_and_draws_are_of_whole_groups(design, labels):
    train_rows, held = resample.split(labels, design, 0, GROUPS)
    assert not set(GROUPS[train_rows]) & set(GROUPS[held])
    assert set(train_rows) | set(held) == set(range(240)) or design.startswith("kfold")
    for group in set(GROUPS[train_rows]):  # each as often as the others of its group
        assert len({int((train_rows == i).sum()) for i in np.flatnonzero(np.equal(GROUPS, group))}) == 1


def test_all_folds_hold_out_each_example_once():
    held = np.concatenate([resample.split(LABELS, f"kfold:4:{fold}", 1, GROUPS)[1] for fold in range(4)])
    assert sorted(held) == list(range(240))


def test_leave_one_out_leaves_out_a_group():
    splits = resample.leave_one_out(LABELS, GROUPS)
    assert len(splits) == 40 and sorted(i for _, held in splits for i in held) == list(range(240))
    for train_rows, held in splits:
        assert len(set(GROUPS[held])) == 1 and not set(GROUPS[held]) & set(GROUPS[train_rows])


def test_more_folds_than_groups_of_a_class_are_refused():
    with pytest.raises(ValueError, match="5 folds need at least 5 groups with examples of every class: class 0 has 2"):
        resample.split(np.repeat([0, 1], 30), "kfold:5:0", 0, np.repeat([f"g{i}" for i in range(4)], 15))


def test_splits_that_cut_a_group_are_refused(tmp_path):
    lines = [f"{i},{LABELS[i]},{GROUPS[i]},{'test' if i % 4 == 0 else 'train'}" for i in range(240)]
    (tmp_path / "t.csv").write_text("\n".join(["x,label,who,split", *lines]) + "\n")
    config = make_config(**{"data.source": f"table:{tmp_path / 't.csv'}", "data.train": "train", "data.test": "test",
                            "data.group": "who"})  # fmt: skip
    with pytest.raises(ValueError, match=r"(?s)data.group .*groups of train are in test too, such as .*patient"):
        load_data(config)


def test_domains_have_their_own_groups():
    both = sources.load(["digits", "digits:inverted"], "train", group=r"\d$")
    assert len(set(both.groups)) == 20
    one, rest = (
        sources.load(["digits", "digits:inverted"], cut, group=r"\d$") for cut in ("train[:50%]", "train[50%:]")
    )
    assert not set(one.groups) & set(rest.groups) and len(one) + len(rest) == len(both)


@pytest.mark.parametrize(
    ("form", "group", "message"),
    [
        ("table", "whom", r"no column data.group='whom' \(did you mean 'who'\?\); columns: x, label, who"),
        ("arrays", "whom", r"data.group='whom' to be the array 'whom', integers or text \[240\]; arrays: image, "),
        ("arrays", "image", r"it is uint8 \[240, 8, 8, 3\]"),
        ("folder", "nobody", r"data.group='nobody' is not found in 240 of 240 ids"),
        ("folder", "(", "data.group='\\(' is no regular expression"),
        ("folder", "(a)(b)", "has 2 "),
        ("folder", ".*", "each of the 240 examples of .* has a group of its own"),
        ("csv", "", None),
    ],
)
def test_a_group_that_is_not_there_is_named(tmp_path, form, group, message):
    source, _ = write(tmp_path, form)
    if message is None:
        assert sources.load(source, "train", labels=("label",)).groups is None
        return
    with pytest.raises(ValueError, match=message):
        sources.load(source, "train", group=group)


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("method", ["ridge", "linear_probe"])
def test_a_run_with_groups_says_how_many(tmp_path, method):
    changes = {"data.source": "digits", "data.group": r"\d$", "data.train": "train", "method.name": method}
    changes |= {"data.test": "", "data.resample": "kfold:5:0", "total": (1, "steps"), "method.k": 0, "groups": {}}
    train(make_config(**changes, **({"method.grid": (1.0,)} if method == "ridge" else {})), tmp_path)
    facts = json.loads((tmp_path / "audit.json").read_text())["phases"][0]["data"]
    assert (facts["train"]["groups"], facts["test"]["groups"]) == (8, 2)


def grouped_predictions(rng, groups=40, each=6):
    """Predictions whose examples are right or wrong a group at a time, mostly."""
    names = np.repeat([f"g{i:02}" for i in range(groups)], each)
    right = np.repeat(rng.random(groups) < 0.7, each) ^ (rng.random(groups * each) < 0.05)
    labels = rng.integers(0, 2, len(names))
    logits = np.eye(2)[np.where(right, labels, 1 - labels)]
    return tasks.make_predictions({"logits": logits}, labels, np.arange(len(names)), tasks.Spec(class_names=("a", "b")),
                                  groups=names)  # fmt: skip


def test_intervals_draw_groups_where_there_are_some(tmp_path):
    predictions = grouped_predictions(np.random.default_rng(0))
    tasks.save_predictions(tmp_path / "p.npz", predictions)
    saved = tasks.load_predictions(tmp_path / "p.npz")
    found, alone = (tasks.summarize(p, resamples=400, seed=3) for p in (saved, saved._replace(groups=None)))
    rng, right = np.random.default_rng(3), predictions.values.argmax(1) == predictions.labels
    per_group = right.reshape(40, 6)  # by numpy: the mean of groups drawn with replacement
    means = [per_group[drawn].mean() for drawn in rng.integers(40, size=(400, 40))]
    np.testing.assert_allclose(
        [found["accuracy"]["low"], found["accuracy"]["high"]], np.quantile(means, [0.025, 0.975]), atol=1e-6
    )
    widths = [x["accuracy"]["high"] - x["accuracy"]["low"] for x in (found, alone)]
    assert found["groups"] == 40 and "groups" not in alone and widths[0] > 1.8 * widths[1]
    assert found["accuracy"]["value"] == alone["accuracy"]["value"]


@pytest.mark.parametrize(("grouped", "low", "high"), [(True, 0.90, 0.99), (False, 0.0, 0.8)])
def test_intervals_of_groups_hold_the_true_accuracy_and_those_of_examples_do_not(grouped, low, high):
    rng, held = np.random.default_rng(1), 0
    for seed in range(120):
        predictions = grouped_predictions(rng)
        predictions = predictions if grouped else predictions._replace(groups=None)
        entry = tasks.summarize(predictions, resamples=200, seed=seed)["accuracy"]
        held += entry["low"] <= 0.7 * 0.95 + 0.3 * 0.05 <= entry["high"]
    assert low <= held / 120 <= high


def test_paired_differences_draw_groups_too():
    a, b = (grouped_predictions(np.random.default_rng(seed)) for seed in range(2))
    b = b._replace(labels=a.labels, outputs={"logits": np.eye(2, dtype=np.float32)[a.labels]})
    wide = tasks.paired_difference(a, b, resamples=300)
    narrow = tasks.paired_difference(a._replace(groups=None), b._replace(groups=None), resamples=300)
    assert wide["value"] == narrow["value"] and wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_one_group_has_no_interval():
    predictions = grouped_predictions(np.random.default_rng(0), groups=1)
    entry = tasks.summarize(predictions, resamples=20)["accuracy"]
    assert entry["value"] is not None and entry["low"] is entry["high"] is None


@pytest.mark.slow
def test_a_run_is_evaluated_with_the_groups_and_the_cut_of_its_own_data(tmp_path):
    changes = {"data.source": "digits", "data.group": r"\d$", "data.split_seed": 3, "data.train": "train[:50%]",
               "data.val": "train[50%:]", "data.test": "", "method.name": "linear_probe", "method.k": 0, "groups": {},
               "total": (1, "steps")}  # fmt: skip
    result = train(make_config(**changes), tmp_path / "w")
    found = tl_jax.evaluate(tl_jax.load_run(tmp_path / "w"), "digits", "train[50%:]", resamples=20)
    assert found["count"] == result["metrics"]["count"] and found["groups"] == result["metrics"]["groups"]
    assert found["accuracy"]["value"] == pytest.approx(result["metrics"]["accuracy"]["value"])


def test_groups_that_hold_a_whole_class_may_not_leave_it_out_of_training(tmp_path):
    lines = [f"{i},{'b' if i < 30 else 'a'},{'one' if i < 30 else f'g{i // 6}'}" for i in range(84)]
    (tmp_path / "t.csv").write_text("\n".join(["x,label,who", *lines]) + "\n")
    source, found = f"table:{tmp_path / 't.csv'}", 0
    for seed in range(6):
        changes = {"data.source": source, "data.group": "who", "data.split_seed": seed, "data.train": "train[:30%]"}
        config = make_config(**changes, **{"data.val": "train[30%:]", "data.test": ""})
        if "b" in sources.load(source, "train[:30%]", group="who", split_seed=seed).labels.astype(str).tolist():
            continue
        try:
            load_data(config)
        except ValueError as error:
            assert "has no example of 1 classes" in str(error) and "data.group" in str(error)
            found += 1
    assert found


def test_the_same_groups_in_two_files_are_refused(tmp_path):
    for name in ("a", "b"):
        lines = [f"{i + (name == 'b') / 2},{i % 2},p{i // 4}" for i in range(40)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["x,label,who", *lines]) + "\n")
    config = make_config(**{"data.source": f"table:{tmp_path}/a.csv", "data.group": "who", "data.train": "train[:60%]",
                            "data.val": "train[60%:]", "data.test": "",
                            "data.extra_eval": (("held", f"table:{tmp_path}/b.csv", "train"),)})  # fmt: skip
    with pytest.raises(ValueError, match="6 groups of train are in held too, such as 'p"):
        load_data(config)
