"""Named ways of fine-tuning as rules over paths."""

import pytest

from tl_jax import trees
from tl_jax.methods import finetune

RESNET = [f"backbone/stage{i}/block{j}/conv1/kernel" for i in (1, 2) for j in (0, 1)] + [
    "backbone/stem/conv/kernel",
    "head/kernel",
]
VIT = [f"backbone/block{i}/mlp/fc1/kernel" for i in range(12)] + [
    "backbone/stem/cls_token",
    "backbone/norm/scale",
    "head/kernel",
]


def trained(paths, *args):
    matches = trees.match_rules(paths, finetune.make_rules(args[0], paths, *args[1:]))
    return [path for path in paths if matches[path].value != "frozen"]


def test_linear_probe_trains_the_head_and_full_everything():
    assert trained(RESNET, "linear_probe") == ["head/kernel"]
    assert trained(RESNET, "full") == RESNET


def test_last_k_counts_blocks_as_numbers_and_takes_the_final_norm():
    assert trained(VIT, "last_k", 3) == [VIT[9], VIT[10], VIT[11], "backbone/norm/scale", "head/kernel"]
    assert trained(RESNET, "last_k", 3) == [*RESNET[1:4], "head/kernel"]
    assert trained(RESNET, "last_k", 4) == [*RESNET[:4], "head/kernel"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("linear_prob",), "known: linear_probe, full, last_k, first_k"),
        (("last_k", 5), "the network has 4 blocks"),
        (("last_k",), "k=0"),
        (("full", 2), "k=2"),
        (("rules",), "rules to rules"),
        (("full", 0, (), [("a", "b")]), "rules to rules"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        finetune.make_rules(args[0], RESNET, *args[1:])
