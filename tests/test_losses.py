"""Losses and mixing, against PyTorch and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.methods import mixing
from tl_jax.tasks import losses


def test_cross_entropy_equals_pytorch_with_label_smoothing():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = 5 * rng.standard_normal((7, 4)).astype(np.float32), rng.integers(0, 4, 7)
    for smoothing in (0.0, 0.1):
        ours = losses.cross_entropy(jnp.asarray(logits), losses.smooth_labels(jnp.asarray(labels), 4, smoothing))
        reference = torch.nn.functional.cross_entropy(
            torch.tensor(logits), torch.tensor(labels), label_smoothing=smoothing, reduction="none"
        )
        np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-5, atol=1e-6)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
    logits = jnp.asarray([[100.0, 99.0, 3.0]], jnp.bfloat16)
    loss = losses.cross_entropy(logits, jax.nn.one_hot(jnp.asarray([1]), 3))
    exact = np.log(np.exp(np.float64(1.0)) + 1 + np.exp(np.float64(-96)))
    assert loss.dtype == jnp.float32 and float(loss[0]) == pytest.approx(exact, rel=1e-6)


def test_binary_cross_entropy_equals_pytorch_with_weights_of_the_positives():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, targets = 30 * rng.standard_normal((7, 3)).astype(np.float32), rng.random((7, 3)).astype(np.float32)
    for weight in (np.ones(3, np.float32), np.array([0.5, 2.0, 7.0], np.float32)):
        ours = losses.binary_cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(weight))
        reference = torch.nn.functional.binary_cross_entropy_with_logits(
            torch.tensor(logits), torch.tensor(targets), pos_weight=torch.tensor(weight), reduction="none"
        )
        np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-5, atol=1e-6)


def batch():
    images = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 8, 8, 3))
    return images, jax.nn.one_hot(jnp.arange(4), 4)


@pytest.mark.slow
def test_mixup_blends_images_and_targets_by_the_same_weight():
    images, targets = batch()
    mixed, mixed_targets = mixing.mixup(jax.random.key(1), images, targets, 0.4)
    weight = float(mixed_targets[0, 0])
    assert 0 < weight < 1
    np.testing.assert_allclose(mixed, weight * images + (1 - weight) * images[::-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixed_targets.sum(axis=1), 1.0, rtol=1e-6)


def test_cutmix_targets_are_the_pasted_area():
    images, targets = batch()
    weights = []
    for seed in range(20):
        mixed, mixed_targets = mixing.cutmix(jax.random.key(seed), images, targets, 1.0)
        own = float((mixed[0] == 0).mean())  # image 0 is all zeros, its partner all threes
        assert float(mixed_targets[0, 0]) == pytest.approx(own, abs=1e-6)
        assert set(np.unique(mixed[0])) <= {0.0, 3.0}
        weights.append(own)
    assert len(set(weights)) > 5


def test_mixup_weights_follow_the_beta_distribution():
    images, targets = batch()
    weights = [float(mixing.mixup(jax.random.key(s), images, targets, 0.5)[1][0, 0]) for s in range(300)]
    from scipy import stats

    assert stats.kstest(weights, stats.beta(0.5, 0.5).cdf).pvalue > 0.01
