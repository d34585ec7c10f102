"""Named ways of fine-tuning as rules over paths."""

import itertools
import re

import jax
import pytest

from tl_jax import models
from tl_jax.core import trees
from tl_jax.methods import rules
from tl_jax.models import conversion
from tl_jax.weights import load

RESNET = [f"backbone/stage{i}/block{j}/conv1/kernel" for i in (1, 2) for j in (0, 1)] + [
    "backbone/stem/conv/kernel",
    "head/kernel",
]
RESNET_CUTS = ("stem", "stage1/block0", "stage1", "stage2/block0", "stage2", "pre_logits")
VIT = [f"backbone/block{i}/mlp/fc1/kernel" for i in range(12)] + [
    "backbone/stem/cls_token",
    "backbone/norm/scale",
    "head/kernel",
]
VIT_CUTS = ("stem", *(f"block{i}" for i in range(12)), "pre_logits")


def trained(paths, cuts, *args):
    matches = trees.match_rules(paths, rules.make_rules(args[0], paths, cuts, *args[1:]))
    return [path for path in paths if matches[path].value != "frozen"]


def test_linear_probe_trains_the_head_and_full_everything():
    assert trained(RESNET, RESNET_CUTS, "linear_probe") == ["head/kernel"]
    assert trained(RESNET, RESNET_CUTS, "full") == RESNET


def test_last_k_counts_blocks_as_numbers_and_takes_the_final_norm():
    assert trained(VIT, VIT_CUTS, "last_k", 3) == [VIT[9], VIT[10], VIT[11], "backbone/norm/scale", "head/kernel"]
    assert trained(RESNET, RESNET_CUTS, "last_k", 3) == [*RESNET[1:4], "head/kernel"]
    assert trained(RESNET, RESNET_CUTS, "last_k", 4) == [*RESNET[:4], "head/kernel"]


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
        rules.make_rules(args[0], RESNET, RESNET_CUTS, *args[1:])


def paths_of(name):
    """The parameter paths of a network as it stands in the model table."""
    return [p.removeprefix("params/") for p in load.default_shapes(name) if p.startswith("params/")]


def cuts_of(name):
    return models.get(name).module(num_classes=3).cuts


NETWORKS = ("resnet18", "vit_tiny_patch16_224")
HEAD = ["head/bias", "head/kernel"]


def trained_of(name, *args):
    return sorted(trained(paths_of(name), cuts_of(name), *args))


def matching(name, pattern):
    """The head's paths and those that the regex matches in full: what should train."""
    return sorted([*HEAD, *(path for path in paths_of(name) if re.fullmatch(pattern, path))])


def test_first_k_trains_the_stem_and_the_first_blocks():
    assert trained_of("vit_tiny_patch16_224", "first_k", 2) == matching(
        "vit_tiny_patch16_224", "backbone/(stem|block0|block1)/.*"
    )
    assert trained_of("resnet18", "first_k", 3) == matching(
        "resnet18", "backbone/(stem|stage1/block0|stage1/block1|stage2/block0)/.*"
    )
    every_block = trained_of("vit_tiny_patch16_224", "first_k", 12)
    assert every_block == matching("vit_tiny_patch16_224", r"backbone/(stem|block\d+)/.*"), "without the final norm"


def test_first_k_and_last_k_of_all_blocks_share_the_blocks_between_them():
    for name in NETWORKS:
        count = len(rules.block_names(paths_of(name), cuts_of(name)))
        first, last = (set(trained_of(name, kind, k)) for kind, k in (("first_k", 1), ("last_k", count - 1)))
        assert first & last == set(HEAD) and first | last == set(paths_of(name))


def test_blocks_train_the_parts_that_are_named_and_no_longer_names():
    assert trained_of("resnet18", "blocks", 0, ("stem", "stage2/block1", "stage4")) == matching(
        "resnet18", "backbone/(stem|stage2/block1|stage4/block0|stage4/block1)/.*"
    )
    assert trained_of("vit_tiny_patch16_224", "blocks", 0, ("block1", "norm")) == matching(
        "vit_tiny_patch16_224", "backbone/(block1|norm)/.*"
    ), "block1 is not block10 or block11"
    with pytest.raises(ValueError, match=r"backbone/block12/.*'backbone'. decides no parameter"):
        trained_of("vit_tiny_patch16_224", "blocks", 0, ("block12",))


def test_bitfit_trains_every_bias_and_nothing_else():
    for name in NETWORKS:
        assert trained_of(name, "bitfit") == sorted(["head/kernel", *(p for p in paths_of(name) if p.endswith("bias"))])


def test_norm_only_trains_the_parameters_of_every_norm_layer_and_nothing_else():
    """Outside the head, a norm layer is what has a scale; its bias has the same owner."""
    for name, layers in (("resnet18", 20), ("vit_tiny_patch16_224", 25)):
        owners = [path.removesuffix("/scale") for path in paths_of(name) if path.endswith("/scale")]
        assert len(owners) == layers
        expected = [f"{owner}/{leaf}" for owner in owners for leaf in ("scale", "bias")]
        assert trained_of(name, "norm_only") == sorted([*HEAD, *expected])


def test_further_networks_and_added_parameters_have_groups_of_their_own():
    paths = [*RESNET, "reference/backbone/stem/conv/kernel", "source_head/kernel", "lora/backbone/stem/conv/a"]
    auxiliary = rules.auxiliary(paths, {"reference": "frozen", "source_head": "head"})
    matches = trees.match_rules(paths, auxiliary + rules.make_rules("full", paths, RESNET_CUTS))
    assert [matches[path].value for path in paths[-3:]] == ["frozen", "head", "lora"]
    assert {matches[path].value for path in RESNET} == {"backbone", "head"}


# Their networks whose groups differ from ours, and how: see the docstring.
DECAY = {
    **dict.fromkeys(("resnet18", "resnet50", "mobilenetv1_100", "mobilenetv2_100", "efficientnet_b0"), "same"),
    **dict.fromkeys(("efficientnetv2_s", "tf_efficientnet_b0", "efficientnet_lite0", "vit_tiny_patch16_224"), "same"),
    **dict.fromkeys(("vit_small_patch14_reg4_dinov2", "vit_base_patch32_clip_quickgelu_224"), "same"),
    **dict.fromkeys(("convnext_atto", "vit_base_patch16_siglip_224"), "behind"),
    **dict.fromkeys(("vgg11", "vgg11_bn", "inception_v3", "densenet121", "mobilenetv3_small_100"), "order"),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(*row, marks=() if row[0] in ("resnet18", "vit_tiny_patch16_224") else pytest.mark.slow)
        for row in DECAY.items()
    ],
)
def test_layer_decay_is_timms(name, how):
    """Layers are blocks. timm's differ where it counts otherwise: "behind", what lies behind the last block is
    of the head; "order", each layer of VGG, the last convolution of MobileNetV3 or two parts of Inception's stem are
    blocks, a transition belongs to the block before it. Then the order is the same."""
    torch = pytest.importorskip("torch_reference").torch
    timm = pytest.importorskip("timm")
    from timm.optim._param_groups import param_groups_layer_decay

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=2)
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
    scales = {id(weight): group["lr_scale"] for group in groups for weight in group["params"]}
    theirs = {key: scales[id(weight)] for key, weight in model.named_parameters()}
    paths, table = paths_of(name), models.get(name).layouts["timm"]
    ours = rules.layer_multipliers(paths, cuts_of(name), 0.75)
    pairs = {
        path: (ours[path], theirs[key]) for path in paths for key in conversion.sources_of(table, f"params/{path}")[0]
    }
    if how != "order":
        behind = re.compile(r"backbone/(norm|final)/.*" if how == "behind" else r"(?!)")
        for path, (own, other) in pairs.items():
            assert own == pytest.approx(0.75 if behind.fullmatch(path) else other, rel=1e-9), path
    ranked = sorted(pairs.values())
    assert all(a[1] <= b[1] * (1 + 1e-9) for a, b in itertools.pairwise(ranked) if a[0] < b[0] * (1 - 1e-9))
    assert len({own for own, _ in ranked}) > 8


def test_added_parameters_have_the_multiplier_of_their_block():
    paths = [*VIT, "lora/backbone/block3/attn/qkv/a", "prompt/backbone/stem/tokens", "source_head/kernel"]
    ours = rules.layer_multipliers(paths, VIT_CUTS, 0.5)
    assert ours["lora/backbone/block3/attn/qkv/a"] == ours["backbone/block3/mlp/fc1/kernel"] == 0.5**9
    assert ours["prompt/backbone/stem/tokens"] == 0.5**13 and ours["source_head/kernel"] == ours["head/kernel"] == 1


@pytest.mark.parametrize("name", ["resnet101", "resnet20_cifar", "vit_tiny_patch16_224"])
def test_cuts_and_blocks_follow_the_order_in_which_the_network_computes_them(name):
    """On the genuine parameters, against the order in which a trace of the network reaches each output."""
    card = models.get(name).card
    model, ran = models.get(name).module(num_classes=3), []
    image = jax.ShapeDtypeStruct((1, card.input_size, card.input_size, 3), "float32")

    def init(key, image):
        (_, out), variables = model.init_with_output(key, image)
        ran.extend(out)
        return variables

    paths = list(trees.flatten(jax.eval_shape(init, jax.random.key(0), image)["params"]))
    assert tuple(ran) == (*model.cuts, "embedding", "logits")
    last = {block.rpartition("/")[0]: block for block in rules.block_names(paths, model.cuts)}
    inverse = {block: stage for stage, block in last.items() if stage}
    assert [inverse.get(b, b) for b in rules.block_names(paths, model.cuts)] == list(model.cuts[1:-1])
