"""Two texts that are encoded each by itself: their cosine and its gradient, batches, exports, training, resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import tl_jax
from tl_jax.data.text import tokenizer
from tl_jax.models import head

WORDS = [f"word{i}" for i in range(40)]
NAME = "bert_l2_h16_a2"


def pairs(count, seed=0):
    """Pairs of texts of 0 to 30 words, with the share of words that they have in common."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        a, b = (rng.choice(WORDS, rng.integers(0, 30)).tolist() for _ in range(2))
        b += a[: rng.integers(0, 10)]
        rows.append((" ".join(a), " ".join(b), len(set(a) & set(b)) / max(len(set(a) | set(b)), 1)))
    return rows


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights with its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("weights")
    own = tokenizer.train("words", [text for row in pairs(50) for text in row[:2]])
    own.save(folder)
    model = tl_jax.load(NAME, tokenizer=folder / "tokenizer.json", num_classes=0)
    tl_jax.weights.load.export(model.variables, NAME, folder / "model.safetensors", card=model.card)
    return folder / "model.safetensors"


def cosine(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_similarity_is_the_cosine_of_the_features_of_each_text_alone(pooling, weights):
    rows = pairs(30)
    alone = tl_jax.load(NAME, weights, num_classes=0, pooling=pooling)
    expected = cosine(*(tl_jax.features(alone, [row[i] for row in rows], batch_size=1) for i in (0, 1)))
    model = tl_jax.load(NAME, weights, similarity=True, pooling=pooling)
    for size in (1, 7, 32):
        found = tl_jax.outputs(model, [row[:2] for row in rows], batch_size=size)
        np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)


def test_the_gradient_of_the_cosine_is_that_of_differences_and_finite_without_tokens():
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=(3, 10)), rng.normal(size=(3, 10))
    step = 1e-6
    expected = sum(
        sign * cosine(*np.split(x + sign * step * direction, 2, axis=1)).sum() for sign in (1, -1)
    ) / (2 * step)  # fmt: skip

    def total(x):
        return head.LAYERS["cosine"](None, 0, x, False).sum()

    found = (jax.grad(total)(jnp.asarray(x, jnp.float32)) * direction).sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.isfinite(jax.grad(total)(jnp.zeros((2, 10)))).all() and total(jnp.zeros((2, 10))) == 0


@pytest.mark.slow
def test_the_command_scores_pairs_by_a_weight_file(weights, tmp_path, capsys):
    rows = pairs(40)
    lines = "".join(f"{y}\t{a}\t{b}\n" for a, b, y in rows)
    (tmp_path / "test.tsv").write_text("closeness\tone\tother\n" + lines)
    (tmp_path / "train.tsv").write_text("closeness\tone\tother\n" + lines)
    argv = ["evaluate", "--model", NAME, "--weights", str(weights), str(tmp_path), "--text=one,other",
            "--labels=closeness", "--similarity", "--json"]  # fmt: skip
    from tl_jax import __main__ as command

    assert command.main(argv) == 0
    found = tl_jax.outputs(tl_jax.load(NAME, weights, similarity=True), [row[:2] for row in rows])[:, 0]
    expected = stats.spearmanr(found, [row[2] for row in rows]).statistic
    assert f'"value": {expected:.6f}'[:-1] in capsys.readouterr().out
    assert command.main([*argv[:5], str(tmp_path), "--text=one", "--labels=closeness", "--similarity"]) == 2
    assert "have one text, and the head compares two" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("layer", ["compare", "cosine"])
def test_what_is_trained_on_pairs_predicts_exports_and_is_loaded_again(layer, weights, tmp_path):
    rows = pairs(60)
    data = {name: ([row[:2] for row in part], np.array([row[2] for row in part], np.float32)[:, None])
            for name, part in {"train": rows[:40], "test": rows[40:]}.items()}  # fmt: skip
    changes = {"model.head": ((layer, {}),), "cache": "features" if layer == "compare" else ""}
    model, method = tl_jax.load(NAME, weights), "linear_probe" if layer == "compare" else "full"
    run = tl_jax.fit(model, data, method=method, epochs=2, batch_size=8, changes=changes, workdir=tmp_path / "run",
                     verbose=False)  # fmt: skip
    texts = [row[:2] for row in rows[40:]]
    found = tl_jax.outputs(run, texts, batch_size=3)
    kept = tl_jax.load_predictions(tmp_path / "run" / "predictions.npz")
    np.testing.assert_allclose(kept.values, found, atol=1e-5)
    tl_jax.export(run, tmp_path / "out")
    exported = tl_jax.load_export(tmp_path / "out")
    np.testing.assert_allclose(tl_jax.outputs(exported, texts, batch_size=5), found, atol=1e-5)
    swapped = tl_jax.outputs(run, [row[::-1] for row in texts])
    assert np.allclose(swapped, found, atol=1e-5) == (layer == "cosine")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_regression_begins_with_the_cosine_as_a_share_of_the_range_of_its_targets(weights, tmp_path):
    rows = [(a, b, 2 + 5 * share) for a, b, share in pairs(60)]
    data = {name: ([row[:2] for row in part], np.array([row[2] for row in part], np.float32)[:, None])
            for name, part in {"train": rows[:40], "test": rows[40:]}.items()}  # fmt: skip
    changes = {"model.head": (("cosine", {}),), "total": (1.0, "steps"), "lr": 1e-9}
    model = tl_jax.load(NAME, weights)
    run = tl_jax.fit(model, data, method="full", task="regression", workdir=tmp_path, changes=changes, verbose=False)
    expected = cosine(*(tl_jax.features(model, [row[i] for row in rows[40:]]) for i in (0, 1)))
    low, high = data["train"][1].min(), data["train"][1].max()
    np.testing.assert_allclose(tl_jax.outputs(run, data["test"][0])[:, 0], low + (high - low) * expected, atol=1e-5)


def test_one_text_and_networks_of_images_are_refused(weights):
    model = tl_jax.load(NAME, weights, similarity=True)
    with pytest.raises(ValueError, match="1 of 2 examples have one text, and the head compares two"):
        tl_jax.predict(model, [("a", "b"), "alone"])
    with pytest.raises(ValueError, match="compares two texts: this network has none"):
        tl_jax.load("resnet8_cifar", similarity=True)
    with pytest.raises(ValueError, match="num_classes=3: the similarity of two texts is one number"):
        tl_jax.load(NAME, weights, similarity=True, num_classes=3)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_minilm_has_the_published_correlations_on_sts_b(shared):
    model = tl_jax.load("minilm_l6", shared / "weights/all_minilm_l6_v2/model.safetensors", similarity=True)
    for split, expected in {"dev": 0.86716, "test": 0.82032}.items():
        lines = (shared / f"data/text/stsb-{split}.tsv").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        found = tl_jax.outputs(model, [(row[5], row[6]) for row in rows])[:, 0]
        assert abs(stats.spearmanr(found, [float(row[4]) for row in rows]).statistic - expected) < 5e-4
