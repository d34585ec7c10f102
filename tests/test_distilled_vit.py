"""DeiT with a distillation token: timm's numbers, both heads in files, rules and runs, and ViTs of any size by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_pretrained import CLASSES, TINY_VIT, add_variants, close, images
from torch_reference import randomize, save, torch

from configs import smoke
from tl_jax import config as options
from tl_jax import models
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.methods import rules
from tl_jax.models import peft, vit
from tl_jax.models.conversion import NATIVE
from tl_jax.models.variant import Variant
from tl_jax.runtime import sharding
from tl_jax.training import build
from tl_jax.weights import load

deit = pytest.importorskip("timm.models.deit")


@pytest.fixture
def small(monkeypatch):
    def module(**fields):
        return TINY_VIT(distilled=True, **fields)

    variant = Variant(module, Card("small_deit", 1000, 48), {"timm": vit.DISTILLED, "native": NATIVE}, {})
    return add_variants(monkeypatch, {"small_deit": variant})


def small_timm(classes=CLASSES, size=48):
    return deit.VisionTransformerDistilled(size, 16, num_classes=classes, embed_dim=24, depth=2, num_heads=3)


@pytest.fixture
def files(small, tmp_path):
    model = randomize(small_timm())
    return model, save(model, tmp_path / "w.pth")


def both_heads(model, x):
    """What timm's network answers for each of its tokens."""
    model.train().set_distilled_training(True)
    with torch.no_grad():
        found = model(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    model.eval()
    return [each.numpy() for each in found]


@pytest.mark.slow
def test_both_heads_and_their_mean_are_timms(small, files):
    model, path = files
    loaded, x = load.load(small, path), images(48)
    with torch.no_grad():
        expected = model(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    logits, out = jax.jit(loaded.model.apply)(loaded.variables, x)
    close(logits, expected)
    assert out["pre_logits"].shape == (len(x), 48) and loaded.card.num_classes == CLASSES
    training, out = jax.jit(lambda x: loaded.model.apply(loaded.variables, x, train=True))(x)
    for ours, theirs in zip((training, out["distilled_logits"]), both_heads(model, x), strict=True):
        close(ours, theirs)
    again, behind = loaded.model.apply(loaded.variables, out["block0"], train=True, start="block0")
    close(again, training)
    close(behind["distilled_logits"], out["distilled_logits"])


def test_timm_loads_the_export_strictly(small, files, tmp_path):
    from safetensors.torch import load_file

    model, path = files
    loaded = load.load(small, path)
    load.export(loaded.variables, small, tmp_path / "out.safetensors", card=loaded.card)
    tensors = load_file(tmp_path / "out.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(tensors[key], value.numpy(), err_msg=key)


def test_a_new_head_is_new_for_both_tokens_and_rules_know_both(small, files):
    loaded = load.load(small, files[1], 3, head_init="lecun")
    head = trees.flatten(loaded.variables["params"]["head"])
    assert {path: leaf.shape for path, leaf in head.items()} == {
        "kernel": (24, 3), "bias": (3,), "dist/kernel": (24, 3), "dist/bias": (3,)
    }  # fmt: skip
    assert sorted(loaded.dropped) == ["head.bias", "head.weight", "head_dist.bias", "head_dist.weight"]
    paths = list(trees.flatten(loaded.variables["params"]))
    found = trees.match_rules(paths, rules.make_rules("linear_probe", paths, loaded.model.cuts))
    assert {path for path in paths if found[path].value == "head"} == {f"head/{path}" for path in head}
    decays = rules.layer_multipliers(paths, loaded.model.cuts, 0.5)
    assert {decays[f"head/{path}"] for path in head} == {1.0}
    assert decays["backbone/stem/dist_token"] == decays["backbone/stem/cls_token"] == 0.5**3


@pytest.mark.slow
def test_positions_are_resampled_behind_both_tokens(small, files, tmp_path):
    model, path = files
    larger = randomize(small_timm(size=64))
    state = deit.checkpoint_filter_fn(model.state_dict(), larger)
    larger.load_state_dict(state)
    loaded, x = load.load(small, path, image_size=64), images(64)
    with torch.no_grad():
        close(jax.jit(loaded.model.apply)(loaded.variables, x)[0], larger(
            torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy())  # fmt: skip


@pytest.mark.slow
def test_prompts_stand_behind_both_tokens(small, files):
    loaded, x = load.load(small, files[1]), images(48)
    model = peft.Adapted(loaded.model, (("prompt", {"tokens": 2}),))
    added = peft.init(loaded.model, loaded.variables, model.additions, jax.random.key(0))
    out = model.apply({**loaded.variables, "params": {**loaded.variables["params"], **added}}, x)[1]
    plain = loaded.model.apply(loaded.variables, x, stop="stem")[0]
    np.testing.assert_array_equal(out["stem"][:, :2], plain[:, :2])
    np.testing.assert_array_equal(out["stem"][:, 4:], plain[:, 2:])


@pytest.mark.thin(1)
@pytest.mark.parametrize("size, count", [("tiny", 5_910_800), ("small", 22_436_432), ("base", 87_338_192)])
def test_parameter_counts_are_timms(size, count):
    variant = models.get(f"deit_{size}_distilled_patch16_224")
    tree = jax.eval_shape(lambda: variant.module(num_classes=1000).init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) == count


@pytest.mark.slow
def test_one_linear_classifier_cannot_take_the_place_of_two():
    config = options.override(smoke.get_config(), {
        "model.name": "deit_tiny_distilled_patch16_224", "model.image_size": 32, "model.weights": "",
        "method.name": "logistic", "method.k": 0, "select": "last",
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"fits one linear classifier, and deit_tiny_distilled.* set method\.name"):
        build.build(config, sharding.make_parallel("jit", jax.devices()[:1]))


@pytest.mark.slow
def test_cards_and_counts_are_those_of_timm():
    import timm

    for name in (x for x in models.MODELS if "distilled_patch" in x):
        theirs, card = timm.create_model(name), models.get(name).card
        ours = load.default_shapes(name)
        assert sum(map(np.prod, ours.values())) == sum(x.numel() for x in theirs.parameters())
        config = theirs.pretrained_cfg
        assert (card.input_size, card.crop, card.mean) == (config["input_size"][1], config["crop_pct"], config["mean"])
        assert (card.std, card.interpolation) == (config["std"], config["interpolation"])


@pytest.mark.slow
def test_a_vit_of_any_size_has_a_name_that_says_it():
    made = load.load("vit_l2_h48_a3_p8_16", "", 5)
    model = made.model
    assert (model.depth, model.width, model.heads, model.patch_size, made.card.input_size) == (2, 48, 3, 8, 16)
    assert model.apply(made.variables, images(16))[0].shape == (len(images(16)), 5)
    with pytest.raises(ValueError, match="a width that 5 heads divide"):
        models.get("vit_l2_h48_a5_p8_16")
