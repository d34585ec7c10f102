"""The audit's own decisions: norm policies, what identifies a freeze, and a proof that can fail."""

import numpy as np
import pytest

from tl_jax.core import trees
from tl_jax.training import audit

BLOCK = "backbone/stage2/block0"
PARAMS = [
    "backbone/stem/conv/kernel",
    f"{BLOCK}/conv1/kernel",
    f"{BLOCK}/norm1/scale",
    f"{BLOCK}/shortcut/conv/kernel",
    f"{BLOCK}/shortcut/norm/scale",
    "head/kernel",
]
LAYERS = ["backbone/stem/norm", f"{BLOCK}/norm1", f"{BLOCK}/shortcut/norm"]
STATISTICS = trees.unflatten({f"{layer}/{name}": np.zeros(2) for layer in LAYERS for name in ("mean", "var")})


def policies(*trained, rules=()):
    return audit.norm_policies(STATISTICS, {path: "x" if path in trained else "frozen" for path in PARAMS}, rules)


def test_statistics_are_frozen_exactly_where_the_whole_block_is():
    assert set(policies("head/kernel").values()) == {"frozen"}
    one_kernel = policies("head/kernel", f"{BLOCK}/conv1/kernel")
    assert one_kernel == {LAYERS[0]: "frozen", LAYERS[1]: "update", LAYERS[2]: "update"}
    assert policies(f"{BLOCK}/shortcut/conv/kernel") == one_kernel
    assert policies("backbone/stem/conv/kernel") == {LAYERS[0]: "update", LAYERS[1]: "frozen", LAYERS[2]: "frozen"}


def test_norm_rules_decide_by_path_and_are_checked_as_rules():
    rules = [("backbone/stem/.*", "update"), (".*", "frozen")]
    assert list(policies("head/kernel", rules=rules).values()) == ["frozen", "frozen", "update"]
    with pytest.raises(ValueError, match="decides no norm layer"):
        policies(rules=[("backbone/stage9/.*", "update"), (".*", "frozen")])
    with pytest.raises(ValueError, match=r"unknown norm policies \['thaw'\]"):
        policies(rules=[(".*", "thaw")])
    with pytest.raises(ValueError, match="no running statistics"):
        audit.norm_policies({}, {}, [(".*", "update")])


def test_the_proof_fails_when_one_frozen_value_moved_by_a_bit():
    before = {"params": {"a": np.float32([1.0, 2.0]), "c": np.float32([0.0])}, "batch_stats": {"b": np.float32([3.0])}}
    frozen = {"path": "a", "trainable": False, "shape": [2]}
    rows = {"parameters": [frozen, {"path": "c", "trainable": True, "shape": [1]}], "totals": {"parameters": 3}}
    rows |= {"statistics": [{"path": "b", "policy": "frozen"}]}

    def prove(**changes):
        return audit.prove([rows], before, {**before, "params": {**before["params"], **changes}})

    assert prove(c=np.float32([5.0]))["proof"]["frozen_leaves"] == 2
    with pytest.raises(RuntimeError, match="frozen leaves changed during training"):
        prove(a=np.nextafter(before["params"]["a"], np.float32(9)))
