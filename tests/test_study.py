"""The grid of a study: which runs there are, that cells are paired, and what is refused before anything runs."""

import itertools
import json
import pathlib
import re

import numpy as np
import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax.data import resample
from tl_jax.studies.study import Study, grid, load, metrics_of
from tl_jax.training import inputs, settings
from tl_jax.weights import load as pretrained

FACTORS = {
    "trained": {"head": {}, "last": {"method.name": "last_k", "method.k": 1, "groups": {"backbone": {"lr_mult": 0.1}}}},
    "shots": {"2": {"data.shots": 2}, "4": {}},
}


def make_study(base=None, **changes) -> Study:
    """Two factors of two levels and two seeds, of a config that trains four steps; `base` sets options of it."""
    config = options.override(smoke.get_config(), base or {})
    return Study(**{"base": config, "factors": FACTORS, "baseline": {"trained": "head"}, "seeds": (0, 1), **changes})


def test_the_grid_is_the_product_of_all_factors_and_seeds():
    study = make_study()
    runs = grid(study)
    expected = itertools.product((0, 1), ("head", "last"), ("2", "4"))
    assert [(run.seed, run.levels["trained"], run.levels["shots"]) for run in runs] == list(expected)
    before = options.flatten(study.base)
    for run in runs:
        changes = {
            "seed": run.seed,
            **FACTORS["trained"][run.levels["trained"]],
            **FACTORS["shots"][run.levels["shots"]],
        }
        assert options.flatten(run.config) == before | changes
    assert options.flatten(study.base) == before and study.base.seed == 0


def test_a_value_replaces_an_option_whole():
    config = options.override(smoke.get_config(), {"groups": {"head": {"lr_mult": 2.0}}})
    run = next(
        run for run in grid(make_study({"groups": {"head": {"lr_mult": 2.0}}})) if run.levels["trained"] == "last"
    )
    assert run.config.groups.to_dict() == {"backbone": {"lr_mult": 0.1}}
    assert config.groups.to_dict() == {"head": {"lr_mult": 2.0}}


def test_the_same_seed_gives_every_cell_the_same_split_shots_order_and_new_head():
    runs = grid(make_study({"model.head_init": "lecun"}))
    varied = {option for levels in FACTORS.values() for changes in levels.values() for option in changes}
    for seed in (0, 1):
        tables = [options.flatten(run.config) for run in runs if run.seed == seed]
        shared = [{key: value for key, value in table.items() if key not in varied} for table in tables]
        assert all(table == shared[0] for table in shared) and shared[0]["seed"] == seed
    sampled, heads = {}, {}
    for run in runs:
        data = inputs.load_sources(settings.read(run.config))
        sampled[tuple(run.levels.values()), run.seed] = set(data["train"].ids), data["test"].ids
        variables = pretrained.load(
            "resnet8_cifar", "builtin:glyphs", 10, head_init=run.config.model.head_init, seed=run.config.seed
        ).variables
        heads.setdefault(run.seed, []).append(np.asarray(variables["params"]["head"]["kernel"]))
    for seed in (0, 1):
        few, test = sampled[("head", "2"), seed]
        assert (
            sampled[("last", "2"), seed][0] == few < sampled[("head", "4"), seed][0] == sampled[("last", "4"), seed][0]
        )
        assert all(sampled[cell, seed][1] == test for cell, s in sampled if s == seed)
        assert all(np.array_equal(head, heads[seed][0]) for head in heads[seed])
    assert not np.array_equal(heads[0][0], heads[1][0]) and sampled[("head", "2"), 0][0] != sampled[("head", "2"), 1][0]


def test_the_key_of_a_run_is_decided_by_its_options_alone():
    keys = [run.key for run in grid(make_study())]
    assert len(set(keys)) == len(keys) and all(re.fullmatch("[0-9a-f]{12}", key) for key in keys)
    swapped = {factor: dict(reversed(levels.items())) for factor, levels in reversed(FACTORS.items())}
    assert {run.key for run in grid(make_study(factors=swapped, baseline={}, metrics=("nll",)))} == set(keys)
    assert [run.key for run in grid(make_study({"data.workers": 2}))] == keys  # changes the speed alone
    assert not {run.key for run in grid(make_study({"lr": 0.5}))} & set(keys)
    for run in grid(make_study()):
        stored = json.loads(json.dumps(options.identity(run.config)))
        assert options.fingerprint(options.from_flat(stored))[:12] == run.key


@pytest.mark.parametrize(
    ("design", "folds", "repeats"), [("kfold:3", 3, 1), ("kfold:2x3", 2, 3), ("bootstrap:4", 4, 1)]
)
def test_a_design_gives_every_cell_and_seed_the_same_folds(design, folds, repeats):
    rates = {"lr": {"1": {"lr": 1.0}, "2": {"lr": 2.0}}}
    study = make_study({"data.shots": 0, "data.test": ""}, design=design, factors=rates, baseline={})
    cells = {}
    for run in grid(study):
        fold = (run.fold, run.config.data.resample, run.config.data.split_seed)
        cells.setdefault((run.levels["lr"], run.seed), []).append(fold)
    first, *others = cells.values()
    assert len(cells) == 4 and all(cell == first for cell in others)
    assert len({name for name, *_ in first}) == len(set(first)) == folds * repeats
    assert sorted({seed for *_, seed in first}) == list(range(repeats))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": {}}, "factors: expected"),
        ({"factors": {"a": {}}}, "at least one level"),
        ({"factors": {"a": {1: {}}}, "baseline": {}}, "level 1 should be a string"),
        ({"factors": {"a": {"x": {"method.nam": "full"}}}, "baseline": {}}, r"did you mean 'method\.name'"),
        ({"factors": {"a": {"x": {"lr": "fast"}}}, "baseline": {}}, "a=x: 'lr' = 'fast'"),
        ({"factors": {"a": {"x": {"lr": -1.0}}}, "baseline": {}}, r"a=x: (.|\n)*lr = -1.0: expected a number above 0"),
        ({"factors": {"a": {"x": {"seed": 3}}}, "baseline": {}}, "sets seed, which the study decides"),
        ({"factors": {"a": {"x": {"lr": 0.1}}, "b": {"y": {"lr": 0.2}}}, "baseline": {}}, "one would overwrite"),
        ({"baseline": {"traned": "head"}}, "did you mean 'trained'"),
        ({"baseline": {"trained": "heads"}}, "did you mean 'head'"),
        ({"seeds": (0, 1, 0)}, "none twice"),
        ({"seeds": ()}, "at least one"),
        ({"metrics": ("acuracy",)}, "did you mean 'accuracy'"),
        ({"metrics": ("shifted/accuracy",)}, "data.extra_eval has no set 'shifted'"),
        ({"metrics": ("nll", "nll")}, "none twice"),
        ({"design": "kfold:1"}, "kfold:1"),
        ({"base": {"seeds": (1,)}}, "the base config sets seeds"),
        ({"base": {"phases": ((("lr", 0.1),), (("lr", 0.2),))}, "factors": {"a": {"x": {"lr": 0.5}}}, "baseline": {}},
         "every phase"),
    ],
)  # fmt: skip
def test_invalid_studies_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        grid(make_study(**changes))


def test_the_metric_is_by_default_the_one_that_the_task_monitors():
    assert metrics_of(make_study()) == ("accuracy",)
    assert metrics_of(make_study({"task": "regression"})) == ("rmse",)
    assert metrics_of(make_study(metrics=("nll", "ece"))) == ("nll", "ece")


def test_all_that_is_wrong_is_said_at_once():
    factors = {"a": {"x": {"lrr": 1.0}, "y": {"method.nam": "full"}}}
    with pytest.raises(ValueError) as error:
        grid(make_study(factors=factors, baseline={"b": "x"}, seeds=(1, 1), metrics=("acc",)))
    for part in ("a=x: 'lrr'", "a=y: 'method.nam'", "factor 'b'", "seeds=(1, 1)", "metric 'acc'"):
        assert part in str(error.value)


def test_two_cells_that_are_the_same_run_are_both_named():
    same = {"as it is": {}, "one": {"data.shots": 1}, "four": {"data.shots": 4}}
    with pytest.raises(ValueError, match="shots=as it is and shots=four are the same run"):
        grid(make_study(factors={"shots": same}, baseline={}))


def test_a_study_is_loaded_with_its_question_and_argument(tmp_path):
    folder = tmp_path / "depth"
    folder.mkdir()
    (folder / "study.py").write_text(
        '"""How deep?\n\nVery.\n"""\n'
        "from configs import smoke\nfrom tl_jax.studies.study import Study\n"
        "def get_study(arg=''):\n    return Study(smoke.get_config(arg), {'lr': {'1': {'lr': 1.0}}}, seeds=(0,))\n"
    )
    for place in (folder, folder / "study.py"):
        name, question, study = load(f"{place}:batch_size=8")
        assert (name, question, study.base.batch_size) == ("depth", "How deep?\n\nVery.", 8)
    with pytest.raises(ValueError, match=r"there is no study .*dept.study.py .did you mean .*depth"):
        load(str(tmp_path / "dept"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "lacks a docstring, which is the question and a function get_study"),
        ('"""Why?"""\nimport nothing_of_this_name', "ModuleNotFoundError"),
        ('"""Why?"""\ndef get_study(arg):\n    return {}', "gave a dict"),
    ],
)
def test_files_that_are_no_study_are_refused(tmp_path, text, message):
    (tmp_path / "study.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))


STUDIES = sorted(path.parent.name for path in pathlib.Path("experiments").glob("*/study.py"))


@pytest.mark.parametrize("folder", [name for name in STUDIES if name != "advice"])  # which test_advice.py has
def test_every_study_of_the_experiments_is_valid(folder):
    name, question, study = load(f"experiments/{folder}")
    runs = grid(study)
    assert name == folder and question
    cells = np.prod([len(levels) for levels in study.factors.values()])
    assert len(runs) == cells * len(study.seeds) * len(resample.folds(study.design))
