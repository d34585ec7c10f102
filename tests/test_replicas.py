"""Replicas: each is the run by itself, in its numbers and in its files, whatever stops or diverges beside it."""

import json

import jax
import numpy as np
import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax.core import files
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import loop, replicas, sweep
from tl_jax.weights import formats

RATES = ((("lr", 1e-2),), (("lr", 3e-3), ("weight_decay", 0.1)), (("lr", 1e-3), ("weight_decay", 0.0)))


def make_config(changes=(), **more):
    return options.override(smoke.get_config(), {
        "model.image_size": 16, "data.train": "train[:20%]", "data.val": "train[95%:]", "data.test": "test[:8%]",
        "data.shots": 0, "batch_size": 8, "eval_batch_size": 64, "resamples": 10, "replicas": RATES,
        "weight_decay": 0.01, **dict(changes), **more,
    })  # fmt: skip


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


CASES["phases, cached features"] = {**CASES["phases"], "cache": "features", "select": "best_val"}
CASES["seeds, cached views"] = {**CASES["seeds"], "cache": "features", "views": 2, "method.mixup": 0.0}
FAST = ("shots, cached features",)


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_replica_is_the_run_by_itself(case, tmp_path):
    config = make_config(CASES[case], cache_dir=str(tmp_path / "features") if "cached" in case else "")
    table = sweep.sweep(config, tmp_path / "w", verbose=False)
    for row, alone in zip(table["replicas"], options.replicas(config), strict=True):
        loop.train(alone, tmp_path / "alone" / row["name"], verbose=False)
        assert_same_run(tmp_path / "w" / "replicas" / row["name"], tmp_path / "alone" / row["name"])
    assert table == json.loads((tmp_path / "w" / "replicas.json").read_text())


class Crash(Exception):
    pass


def remains(folder):
    """All that the seed determines, by file."""
    names = ("metrics.jsonl", "result.json", "audit.json", "trained.safetensors", "config.json")
    return {(run.name, name): (run / name).read_bytes() for run in sorted(folder.iterdir()) for name in names}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas") / "w"
    return folder, sweep.sweep(make_config(), folder, verbose=False)


def test_replicas_that_were_stopped_and_killed_end_bit_equal_to_unbroken_ones(unbroken, tmp_path, monkeypatch):
    with pytest.raises(Preempted, match="after step 1 of 4"):
        sweep.sweep(make_config(), tmp_path / "w", stop_requested=lambda step: True)
    left, real = [2], loop.leave

    def leave(*args, **kwargs):
        if not left[0]:
            raise Crash
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "leave", leave)
    with pytest.raises(Crash):
        sweep.sweep(make_config(), tmp_path / "w")
    left[0] = 1  # two of three are whole: one is left to write
    assert sweep.sweep(make_config(), tmp_path / "w") == unbroken[1]
    assert remains(tmp_path / "w" / "replicas") == remains(unbroken[0] / "replicas")
    monkeypatch.setattr(replicas, "build", None)
    assert sweep.sweep(make_config(), tmp_path / "w") == unbroken[1]  # shown again, nothing is built


def test_a_replica_that_diverges_stops_no_other(unbroken, tmp_path):
    config = make_config({"replicas": (RATES[0], (("lr", 1e38),), *RATES[1:])})
    table = sweep.sweep(config, tmp_path / "w", verbose=False)
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
        sweep.sweep(make_config({"replicas": ((("lr", 1e38),),)}), tmp_path / "bad", verbose=False)


def test_val_chooses_the_best_and_test_never_does(unbroken):
    _, table = unbroken
    best = max(table["replicas"], key=lambda row: (row["val"]["accuracy"], -row["val"]["loss"]))
    assert table["best"] == best["name"]
    assert "best by val" in str(list(sweep.to_table(table).columns[-1].cells))
    val = best["val"]
    assert 0 <= val["low"] < val["accuracy"] <= val["high"] <= 1 and val["count"] == 51
    assert sweep.best_of([{**best, "val": None}]) is None


def test_wilson_intervals_are_those_of_scipy():
    from scipy.stats import binomtest

    for hits, count in ((0, 7), (3, 7), (40, 41)):
        exact = binomtest(hits, count).proportion_ci(0.95, "wilson")
        np.testing.assert_allclose(sweep._wilson(hits / count, count), exact, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": ((("lr", 0.1),), (("lr", 0.1),))}, r"replicas\[1\] is replicas\[0\] again"),
        ({"replicas": ((("batch_size", 4),),)}, "replicas may differ in lr, weight_decay, groups, seed, data.shots"),
        ({"replicas": (("lr", 0.1),)}, "expected replicas, each pairs"),
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
        sweep.sweep(make_config(changes), tmp_path / "w")
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_train_takes_one_run_and_says_where_replicas_are_trained(tmp_path):
    with pytest.raises(ValueError, match=r"sweep\.sweep"):
        loop.train(make_config(), tmp_path / "w")


def test_what_is_frozen_is_computed_once_for_all_replicas():
    parallel, flops = sharding.make_parallel(), {}
    for count in (1, 8):
        rates = tuple((("lr", 1e-3 * (i + 1)),) for i in range(count))
        group = replicas.build(options.replicas(make_config({"replicas": rates})), parallel)
        state = replicas.initial_state(group, 0, parallel)
        batch = replicas.put_batches(group, [group.runs[0].batches[0]], parallel)
        inputs = {"shared": group.shared, "numbers": replicas.numbers_of(group, 0)}
        inputs["streams"] = {**group.streams, "batch": batch}
        step = replicas.make_train_step(group, 0, parallel)
        flops[count] = jax.jit(step).lower(state, inputs).cost_analysis()["flops"]
    assert flops[8] < 1.1 * flops[1]
