"""Replicas: each is the run by itself, in its numbers and in its files, whatever stops or diverges beside it."""

import json

import numpy as np
import pytest
from walks import kind_of, make_tables  # noqa: F401, a fixture

from configs import smoke
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import files
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import inprocess
from tl_jax.studies.report import sweep
from tl_jax.training import artifacts, replicas, settings
from tl_jax.training.train import train
from tl_jax.weights import formats

RATES = ((("lr", 1e-2),), (("lr", 3e-3), ("weight_decay", 0.1)), (("lr", 1e-3), ("weight_decay", 0.0)))


def make_config(changes=(), **more):
    return options.override(smoke.get_config(), {
        "model.image_size": 16, "data.train": "train[:20%]", "data.val": "train[95%:]", "data.test": "test[:8%]",
        "data.shots": 0, "batch_size": 8, "eval_batch_size": 64, "resamples": 10, "replicas": RATES,
        "weight_decay": 0.01, **dict(changes), **more,
    })  # fmt: skip


def each_alone(config):
    """The config of every replica, which is that of the same run by itself."""
    return [options.override(config, {**dict(changes), "replicas": ()}) for changes in config.replicas]


def run(config, folder, **arguments):
    """What is in replicas.json."""
    return inprocess.run(config, folder, **arguments)["replicas"]


def assert_close(ours, single):
    """Equal tables: the same keys, numbers to 1e-5, all else to the letter."""
    if isinstance(single, dict):
        assert ours.keys() == single.keys()
        for key in single:
            assert_close(ours[key], single[key])
    elif isinstance(single, list):
        assert len(ours) == len(single)
        for one, other in zip(ours, single, strict=True):
            assert_close(one, other)
    elif isinstance(single, float):
        np.testing.assert_allclose(ours, single, rtol=1e-5, atol=1e-5)
    else:
        assert ours == single


def assert_same_run(ours, single):
    """Two folders of runs: the same files, configs and audits, the same numbers to 1e-5."""
    own = {"learning_curves.png", "confusion_matrix.png", "reliability.png", "feature_map.png", "checkpoints"}
    assert {path.name for path in ours.iterdir()} == {path.name for path in single.iterdir()} - own
    for name in ("config.json", "audit.json", "result.json"):
        assert_close(*(files.read_json(folder / name) for folder in (ours, single)))
    assert_close(*(files.read_rows(folder / "metrics.jsonl") for folder in (ours, single)))
    costs = [files.read_json(folder / "cost.json") for folder in (ours, single)]
    assert costs[0].keys() == {*costs[1], "replicas"}
    with np.load(ours / "predictions.npz") as one, np.load(single / "predictions.npz") as other:
        assert one.files == other.files
        for name in other.files:
            if other[name].dtype.kind == "f":
                np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(one[name], other[name])
    for name in ("trained.safetensors", "model.safetensors"):
        if (single / name).exists():
            (one, about), (other, expected) = formats.read(ours / name), formats.read(single / name)
            assert one.keys() == other.keys() and about == expected
            for key in other:
                np.testing.assert_allclose(one[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)


LORA = {"method.add": (("lora", {"rank": 2}),), "groups": {"lora": {"lr_mult": 0.3}}}
LAST = {"method.name": "last_k", "method.k": 1, "groups": {"backbone": {"lr_mult": 0.1}}}
SGD = {"optimizer": "sgd", "optimizer_args": {"momentum": 0.9}, "clip": 0.1}
SEEDS = tuple((("seed", seed), ("lr", lr)) for seed in (0, 1) for lr in (1e-2, 1e-3))
GROUPS = tuple((("groups", {"lora": {"lr_mult": mult}}),) for mult in (0.3, 0.0, 1.0))
SHOTS = ((("data.shots", 2),), (("data.shots", 3), ("lr", 3e-3)), (("data.shots", 2), ("seed", 5)))
EVERYTHING = {
    "ema": 0.5, "method.mixup": 0.2, "model.dropout": 0.1, "data.augment": (("rotation", {"degrees": 20.0}),),
    "accumulate": 2,
}  # fmt: skip
CASES = {
    "head": {"select": "best_val"},
    "head, sgd, clip": {**SGD, "select": "last"},
    "seeds": {**EVERYTHING, "replicas": SEEDS, "select": "best_val"},
    "shots, cached features": {
        "replicas": SHOTS,
        "cache": "features",
        "model.head_init": "lecun",
        "eval_every": (2.0, "steps"),
    },
    "random networks": {"replicas": SEEDS, "model.weights": "", "model.head_init": "lecun"},  # zeros: ties
    "lora, groups": {**LORA, **SGD, "replicas": GROUPS},
    "last block with batch statistics": {**LAST, "ema": 0.5, "data.extra_eval": (("rest", "digits", "test[90%:]"),)},
    "phases": {"phases": ((("total", (2.0, "steps")),), (("total", (2.0, "steps")), *LAST.items()))},
}


# Terms whose memory is computed from the data where a phase begins; that of a later phase is each replica's own.
FULL = {**SGD, "method.name": "full", "data.train": "train[:5%]", "replicas": SEEDS[1:3]}
DELTA = {"delta": {"alpha": 0.5, "examples": 16}}
CASES["delta"] = {**FULL, "terms": DELTA}
CASES["co-tuning"] = {**FULL, "terms": {"co_tuning": {"strength": 1.0}}, "ema": 0.5}
CASES["delta, phases"] = {
    **FULL, "phases": ((("total", (2.0, "steps")),), (("total", (2.0, "steps")), ("terms", DELTA))),
    "terms": {"l2_sp": {}}, "select": "last",
}  # fmt: skip
CASES["phases, cached features"] = {**CASES["phases"], "cache": "features", "select": "best_val"}
CASES["seeds, cached views"] = {**CASES["seeds"], "cache": "features", "views": 2, "method.mixup": 0.0}
FAST = ("shots, cached features",)
COVERED = ("delta", "phases")  # each is part of a case with phases that CI runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        case
        if case in FAST
        else pytest.param(case, marks=[pytest.mark.slow, *([pytest.mark.exhaustive] if case in COVERED else [])])
        for case in CASES
    ],
)
def test_a_replica_is_the_run_by_itself(case, tmp_path):
    config = make_config(CASES[case], cache_dir=str(tmp_path / "features") if "cached" in case else "")
    table = run(config, tmp_path / "w")
    for row, alone in zip(table["replicas"], each_alone(config), strict=True):
        train(alone, tmp_path / "alone" / row["name"], verbose=False)
        assert_same_run(tmp_path / "w" / "replicas" / row["name"], tmp_path / "alone" / row["name"])
    assert table == json.loads((tmp_path / "w" / "replicas.json").read_text())


@pytest.mark.slow
def test_replicas_whose_texts_differ_in_length_are_the_runs_by_themselves(tables, tmp_path):
    replicas = tuple((("seed", seed), ("lr", 1e-2)) for seed in range(3))
    config = kind_of("texts", tables, **{"batch_size": 4, "replicas": replicas})
    for row, alone in zip(run(config, tmp_path / "w")["replicas"], each_alone(config), strict=True):
        train(alone, tmp_path / "alone" / row["name"], verbose=False)
        folders = tmp_path / "w" / "replicas" / row["name"], tmp_path / "alone" / row["name"]
        assert_close(*(files.read_rows(folder / "metrics.jsonl") for folder in folders))


class Crash(Exception):
    pass


def remains(folder):
    """All that the seed determines, by file."""
    names = ("metrics.jsonl", "result.json", "audit.json", "trained.safetensors", "config.json")
    return {(run.name, name): (run / name).read_bytes() for run in sorted(folder.iterdir()) for name in names}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas") / "w"
    return folder, run(make_config(), folder)


@pytest.mark.slow
def test_replicas_that_were_stopped_and_killed_end_bit_equal_to_unbroken_ones(unbroken, tmp_path, monkeypatch):
    with pytest.raises(Preempted, match="after step 1 of 4"):
        run(make_config(), tmp_path / "w", stop_requested=lambda step: True)
    left, real = [2], artifacts.finalize

    def finalize(*args, **kwargs):
        if not left[0]:
            raise Crash
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(artifacts, "finalize", finalize)
    with pytest.raises(Crash):
        run(make_config(), tmp_path / "w")
    left[0] = 1  # two of three are whole: one is left to write
    assert run(make_config(), tmp_path / "w") == unbroken[1]
    assert remains(tmp_path / "w" / "replicas") == remains(unbroken[0] / "replicas")
    monkeypatch.setattr(replicas, "make", None)
    assert run(make_config(), tmp_path / "w") == unbroken[1]  # shown again, nothing is built


@pytest.mark.slow
def test_a_replica_that_diverges_stops_no_other(unbroken, tmp_path):
    config = make_config({"replicas": (RATES[0], (("lr", 1e38),), *RATES[1:])})
    table = run(config, tmp_path / "w")
    bad = table["replicas"].pop(1)
    assert "not finite at step" in bad["error"] and bad["val"] is None
    folder = tmp_path / "w" / "replicas" / bad["name"]
    assert "FloatingPointError" in files.read_json(folder / "failed.json")["error"]
    assert not (folder / "result.json").exists()
    for row, other in zip(table["replicas"], unbroken[1]["replicas"], strict=True):
        pair = (tmp_path / "w" / "replicas" / row["name"], unbroken[0] / "replicas" / other["name"])
        assert_close(*(files.read_rows(path / "metrics.jsonl") for path in pair))
        assert_close(*(files.read_json(path / "result.json") for path in pair))
    with pytest.raises(FloatingPointError, match="all replicas diverged"):
        run(make_config({"replicas": ((("lr", 1e38),),)}), tmp_path / "bad")


def test_val_chooses_the_best_and_test_never_does(unbroken):
    _, table = unbroken
    best = max(table["replicas"], key=lambda row: (row["val"]["accuracy"], -row["val"]["loss"]))
    assert table["best"] == best["name"]
    shown = sweep.table("classification", table["replicas"])
    assert shown.rows[0][0] == best["name"].partition("-")[0] and "the best by val first" in shown.caption
    accuracies = [float(row[shown.headers.index("val accuracy")]) for row in shown.rows]
    assert accuracies == sorted(accuracies, reverse=True)
    val = best["val"]
    assert 0 <= val["low"] < val["accuracy"] <= val["high"] <= 1 and val["count"] == 51
    assert inprocess.best_of("classification", [{**best, "val": None}]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": ((("lr", 0.1),), (("lr", 0.1),))}, r"replicas\[1\] is replicas\[0\] again"),
        (
            {"replicas": ((("batch_size", 4),),)},
            "replicas may differ in seed, weights of terms, data.shots, lr, weight_decay, groups",
        ),
        ({"replicas": (("lr", 0.1),)}, "expected a sequence, each pairs"),
        ({"seeds": (1,)}, r"seeds = \[1\] does not go with replicas"),
        ({"parallel": "pmap"}, "parallel = 'pmap' does not go with replicas"),
        ({"method.name": "knn", "select": "last"}, "method.name = 'knn' does not go"),
        ({"replicas": ((("data.shots", 2),), (("data.shots", 3),)), "total": (1.0, "epochs")}, "phase 0: steps"),
        ({"replicas": SEEDS, "model.weights": "", "cache": "features"}, "7 of 35 leaves are not one for all"),
        ({"replicas": ((), (("groups", {"head": {"optimizer": "sgd"}}),))}, r"phase 0: groups.*replicas 0 -> 1"),
    ],
)
def test_replicas_that_cannot_be_one_program_are_refused_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(make_config(changes), tmp_path / "w")
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_the_interval_of_an_accuracy_is_that_of_wilson():
    from scipy.stats import binomtest

    for hits, count in ((0, 7), (3, 7), (40, 41)):
        exact = binomtest(hits, count).proportion_ci(0.95, "wilson")
        found = tasks.share_interval("classification", hits / count, count)
        np.testing.assert_allclose([found["low"], found["high"]], exact, atol=1e-6)


def test_train_takes_one_run_and_says_where_replicas_are_trained(tmp_path):
    with pytest.raises(ValueError, match="replicas, which are runs of their own"):
        train(make_config(), tmp_path / "w")


def test_what_is_frozen_is_computed_once_for_all_replicas():
    parallel, flops = sharding.make_parallel(), {}
    for count in (1, 8):
        rates = tuple((("lr", 1e-3 * (i + 1)),) for i in range(count))
        configs = each_alone(make_config({"replicas": rates}))
        program = replicas.make([settings.read(config) for config in configs], parallel)
        state = program.initial(0)
        sets = program.batches(0, state, ["train"], lambda step: False)
        batch = next(program.iterate(sets, 0, 1))
        _, cost = program.compile(0, state, batch)
        flops[count] = cost["flops_per_step"]
    assert flops[8] < 1.1 * flops[1]
