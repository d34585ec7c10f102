"""Few examples on top of a head of names: Tip-Adapter, its keys trained, and learned prompts, against other code."""

import json

import clip_files
import numpy as np
import pytest
from test_pretrained import close
from test_zero_shot import CLASSES, by_transformers, file_of, names, photos, pixels_of, run_of  # noqa: F401

import tl_jax
from tl_jax import __main__ as command
from tl_jax.methods import tip_adapter
from tl_jax.weights import load, zero_shot

torch, transformers = clip_files.torch_reference.torch, clip_files.transformers
ORDER = sorted(CLASSES)


def by_hand(zero, keys, labels, x, alpha, beta):
    """Equations 5 and 6, example by example."""
    found = np.array(zero, np.float64)
    for row, f in zip(found, x, strict=True):
        for key, label in zip(keys, labels, strict=True):
            row[label] += alpha * np.exp(-beta * (1 - float(f @ key)))
    return found


def test_tip_adapter_is_that_of_the_paper_and_its_values_are_the_best_of_the_grid_on_val():
    rng = np.random.default_rng(0)
    head = {
        "dense0": {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)},
        "out": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
    }

    def embedded(x):
        x = x @ head["dense0"]["kernel"] + head["dense0"]["bias"]
        return x / np.sqrt((x**2).sum(axis=1))[:, None]

    sets = {name: (rng.normal(size=(n, 6)), rng.integers(0, 3, n)) for name, n in {"train": 12, "val": 9, "test": 7}.items()}
    x = {name: embedded(features) for name, (features, _) in sets.items()}
    zero = {name: rows @ head["out"]["kernel"] + head["out"]["bias"] for name, rows in x.items()}
    fitted = tip_adapter.fit(head, sets["train"], sets["val"])
    scores = {}
    for row in fitted.tried:
        logits = by_hand(zero["val"], x["train"], sets["train"][1], x["val"], *row["value"])
        right = logits[np.arange(9), sets["val"][1]]
        nll = np.mean(np.log(np.exp(logits).sum(axis=1)) - right)
        assert row["val/accuracy"] == np.mean(logits.argmax(axis=1) == sets["val"][1])
        assert row["val/nll"] == pytest.approx(nll)
        scores[tuple(row["value"])] = row["val/accuracy"], -nll
    assert len(scores) == len(tip_adapter.ALPHAS) * len(tip_adapter.BETAS)
    assert scores[tuple(fitted.chosen)] == max(scores.values()) > min(scores.values())
    expected = by_hand(zero["test"], x["train"], sets["train"][1], x["test"], *fitted.chosen)
    close(fitted.predict(sets["test"][0]), expected, 1e-6)
    given = tip_adapter.fit(head, sets["train"], None, (2.0, 3.0))
    close(given.predict(sets["test"][0]), by_hand(zero["test"], x["train"], sets["train"][1], x["test"], 2, 3), 1e-6)
    for val, grid, message in ((None, (), "there is none"), (sets["val"], (1.0,), "two numbers above 0")):
        with pytest.raises(ValueError, match=message):
            tip_adapter.fit(head, sets["train"], val, grid)


def test_tip_adapter_runs_on_shots_and_is_a_network_whose_keys_may_train(run_of, file_of, photos, tmp_path, capsys):  # noqa: F811
    folder = run_of("tip", "--config.method.name=tip_adapter", "--config.data.shots=2")
    result = json.loads((folder / "result.json").read_text())
    assert "tip_adapter with alpha = " in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    source = tl_jax.load_data(f"folder:{photos}", "train")
    model = clip_files.whole("clip")

    def embed(pixels):
        with torch.no_grad():
            found = model.get_image_features(pixels)
            found = getattr(found, "pooler_output", found).double().numpy()
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    saved = load.load("", folder / "model.safetensors")
    keys = np.asarray(saved.variables["params"]["head"]["keys2"]["kernel"]).T
    labels = np.asarray(saved.variables["params"]["head"]["out"]["kernel"])[clip_files.EMBEDDING :].argmax(axis=1)
    every = embed(pixels_of(photos, "train")[0])
    near = keys @ every.T
    assert sorted(labels) == [0, 0, 1, 1, 2, 2] and np.abs(near.max(axis=1) - 1).max() < 1e-5
    assert (source.labels[near.argmax(axis=1)] == labels).all() and config["data.shots"] == 2
    pixels, _ = pixels_of(photos)
    zero = by_transformers("clip", file_of("clip").parent, pixels, ORDER)
    expected = by_hand(zero, keys, labels, embed(pixels), *result["chosen"])
    close(tl_jax.load_predictions(folder / "predictions.npz").values, expected, 1e-4)
    files = [path for name in ORDER for path in sorted((photos / "test" / name).iterdir())]
    close(tl_jax.outputs(tl_jax.load_run(folder), files), expected, 1e-4)
    rules = "--config.method.rules=(('head/keys.*', 'keys'), ('.*', 'frozen'))"
    train = [
        "train", f"configs/transfer.py:model=small_clip,weights={folder},data=folder:{photos},method=rules", rules,
        "--config.data.train=train", "--config.data.val=val", "--config.data.test=test", "--config.data.shots=2",
        "--config.model.keep_head=True", "--config.total=(3, 'steps')", "--config.workdir=x"[:0] or "--config.resamples=20",
        "--workdir", str(tmp_path / "f"),
    ]  # fmt: skip
    assert command.main(train) == 0
    after = load.load("", tmp_path / "f" / "model.safetensors").variables["params"]["head"]
    assert np.abs(np.asarray(after["keys2"]["kernel"]).T - keys).max() > 1e-4
    np.testing.assert_array_equal(after["out"]["kernel"], saved.variables["params"]["head"]["out"]["kernel"])
