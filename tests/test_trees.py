"""Paths, rules, splits and fingerprints of parameter trees."""

import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax.core import messages, trees

TREE = {
    "backbone": {"stage1": {"block0": {"conv1": {"kernel": jnp.ones((2, 3))}}}},
    "head": {"kernel": jnp.ones(4), "bias": jnp.zeros(2)},
}
PATHS = ["backbone/stage1/block0/conv1/kernel", "head/bias", "head/kernel"]


def test_flatten_and_unflatten_are_inverse():
    flat = trees.flatten(TREE)
    assert sorted(flat) == PATHS
    assert trees.unflatten(flat).keys() == TREE.keys()
    assert trees.flatten(trees.unflatten(flat)).keys() == flat.keys()


def test_the_first_matching_rule_wins():
    matches = trees.match_rules(PATHS, [("head/bias", "a"), ("head/.*", "b"), (".*", "frozen")])
    assert [matches[path].value for path in PATHS] == ["frozen", "a", "b"]


def test_unmatched_paths_and_dead_rules_are_raised_together():
    with pytest.raises(ValueError) as error:
        trees.match_rules(PATHS, [("head", "x"), ("backbone/stage9/.*", "y")])
    message = str(error.value)
    assert all(f"no rule matches parameter {path!r}" in message for path in PATHS)
    assert "matches only the beginning of 'head/bias'" in message
    assert "backbone/stage9" in message


def test_a_shadowed_rule_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="an earlier rule takes every path"):
        trees.match_rules(PATHS, [(".*", "frozen"), ("head/.*", "head")])


def test_a_broken_regex_is_named():
    with pytest.raises(ValueError, match="not a regular expression"):
        trees.match_rules(PATHS, [("head/(", "x"), (".*", "y")])


def test_split_and_merge_restore_the_tree():
    labels = {path: "frozen" if path.startswith("backbone") else "head" for path in PATHS}
    trainable, frozen = trees.split(TREE, labels)
    assert sorted(trainable) == ["head/bias", "head/kernel"] and list(frozen) == [PATHS[0]]
    merged = trees.merge(TREE, {"head/bias": jnp.full(2, 7.0)})
    np.testing.assert_array_equal(merged["head"]["bias"], [7.0, 7.0])
    np.testing.assert_array_equal(merged["head"]["kernel"], TREE["head"]["kernel"])


def test_hashes_see_a_single_bit_a_shape_and_a_dtype():
    array = np.arange(6, dtype=np.float32)
    flipped = array.copy()
    flipped.view(np.uint32)[3] ^= 1
    variants = [array, flipped, array.reshape(2, 3), array.astype(np.float64), -0.0 * array]
    hashes = {trees.leaf_hashes({"x": variant})["x"] for variant in variants}
    assert len(hashes) == len(variants)
    assert trees.leaf_hashes({"x": array.copy()}) == trees.leaf_hashes({"x": jnp.asarray(array)})


def test_difference_names_what_changed_appeared_and_vanished():
    lines = messages.difference({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 4})
    assert lines == ["  b: 2 -> 5", "  c: 3 -> '(absent)'", "  d: '(absent)' -> 4"]
