"""How far apart domains are, and what a discriminator's accuracy means."""

import numpy as np
import pytest

from tl_jax.methods.domain import measure
from tl_jax.training import plots


def domain(seed, shift, rows=400):
    return np.random.default_rng(seed).standard_normal((rows, 3)) + np.array([shift, 0, 0])


def test_the_distance_is_that_of_the_best_linear_classifier():
    """Of two normal distributions at a distance s it errs on the share Phi(-s / 2)."""
    found = measure.separation({"near": domain(0, 0.0), "far": domain(1, 9.0), "target": domain(2, 1.5, 700)})
    assert found.proxy_a_distance["far"] == 2.0
    assert found.proxy_a_distance["near"] == pytest.approx(2 * (1 - 2 * 0.2266), abs=0.2)
    assert found.domains == ("near", "far", "target") and found.confusion.shape == (3, 3)
    np.testing.assert_allclose(found.confusion.sum(axis=1), 1)
    assert found.confusion[1, 1] == 1 and 0.05 < found.confusion[0, 2] < 0.35


def test_domains_that_are_one_have_nearly_no_distance_and_constant_features_none():
    found = measure.separation({"source": domain(0, 0.0, 900), "target": domain(1, 0.0, 900)})
    assert 0 <= found.proxy_a_distance["source"] < 0.3
    constant = measure.separation({"source": np.ones((5, 2)), "target": np.ones((7, 2))})
    assert constant.proxy_a_distance == {"source": 0.0}


def test_fewer_than_four_examples_are_told_with_their_numbers():
    with pytest.raises(ValueError, match=r"{'source': 9, 'target': 3} examples; expected 4 or more"):
        measure.separation({"source": domain(0, 0.0, 9), "target": domain(1, 0.0, 3)})


@pytest.mark.parametrize(
    ("train", "held_out", "distance", "said"),
    [
        (0.95, 0.70, 0.1, "knows its training examples, not the domains"),
        (0.95, 0.93, 1.9, "the features are not aligned"),
        (0.55, 0.50, 1.8, "a linear classifier still tells domains apart"),
        (0.70, 0.65, 0.2, "aligned in part"),
        (0.20, 0.34, 1.0, "aligned in part"),  # a linear classifier has 3 of 4
        (0.52, 0.50, 0.1, "aligned as wholes"),
    ],
)
def test_a_diagnosis_goes_by_both_accuracies_and_the_linear_classifier(train, held_out, distance, said):
    line = measure.diagnosis("dann", train, held_out, distance)
    assert said in line and line.startswith(f"dann: accuracy {train:.2f} in training and {held_out:.2f} held out")


@pytest.mark.parametrize("labelled", [True, False])
def test_the_map_of_domains_is_drawn_by_answers_where_val_has_no_labels(labelled, tmp_path):
    arrays = {f"{name}_features": domain(k, k, 20) for k, name in enumerate(("source", "target"))}
    arrays |= {f"{name}_logits": np.eye(3)[np.arange(20) % 3] for name in ("source", "target")}
    arrays |= {"source_labels": np.arange(20) % 3} if labelled else {}
    plots.domain_map(arrays, arrays, ("a", "b", "c"), tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 1000
