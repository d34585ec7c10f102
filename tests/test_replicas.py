"""Replicas: each is the run by itself, in its numbers and in its files, whatever stops or diverges beside it."""

import json

import numpy as np
import pytest

from configs import smoke
from tl_jax import formats, options, replicas, train, workdir

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
        assert_close(*(workdir.read_json(folder / name) for folder in (ours, single)))
    assert_close(*(workdir.read_rows(folder / "metrics.jsonl") for folder in (ours, single)))
    costs = [workdir.read_json(folder / "cost.json") for folder in (ours, single)]
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
    "shots": {"replicas": SHOTS, "model.head_init": "lecun", "eval_every": (2.0, "steps")},
    "random networks": {"replicas": SEEDS, "model.weights": ""},
    "lora, groups": {**LORA, **SGD, "replicas": GROUPS},
    "last block with batch statistics": {**LAST, "ema": 0.5, "data.also": (("rest", "digits", "test[90%:]"),)},
    "phases": {"phases": ((("total", (2.0, "steps")),), (("total", (2.0, "steps")), *LAST.items()))},
}


@pytest.mark.parametrize("case", CASES)
def test_a_replica_is_the_run_by_itself(case, tmp_path):
    config = make_config(CASES[case])
    table = replicas.run_all(config, tmp_path / "w", verbose=False)
    for row, alone in zip(table["replicas"], options.replicas(config), strict=True):
        train.train(alone, tmp_path / "alone" / row["name"], verbose=False)
        assert_same_run(tmp_path / "w" / "replicas" / row["name"], tmp_path / "alone" / row["name"])
    assert table == json.loads((tmp_path / "w" / "replicas.json").read_text())
