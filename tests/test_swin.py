"""Swin gives the numbers of timm, Microsoft's names, torchvision and transformers, and exports to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import random_variables
from test_pretrained import CLASSES, add_variants, close

from tl_jax import models
from tl_jax.core import trees
from tl_jax.methods import rules
from tl_jax.models import peft, swin
from tl_jax.weights import formats, load

torch_reference = pytest.importorskip("torch_reference")
timm = pytest.importorskip("timm")
twins = pytest.importorskip("twins")

EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
DEPTHS, HEADS = (2, 1, 1), (1, 2, 4)
SMALL = functools.partial(swin.Swin, depths=DEPTHS, width=12, head_size=12, window=4)


@pytest.fixture
def small(monkeypatch):
    return add_variants(monkeypatch, swin.swin_variants("small_swin", SMALL, 232))


def small_timm():
    sizes = {"img_size": 64, "window_size": 4, "embed_dim": 12, "num_classes": CLASSES, "drop_path_rate": 0.0}
    return timm.models.SwinTransformer(depths=DEPTHS, num_heads=HEADS, **sizes)


def small_torchvision():
    from torchvision.models import SwinTransformer

    return SwinTransformer(
        [4, 4], 12, list(DEPTHS), list(HEADS), [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES
    )


def small_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 64, "embed_dim": 12, "depths": list(DEPTHS), "num_heads": list(HEADS), "window_size": 4}
    return transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, num_labels=CLASSES))


def randomized(model):
    """Random weights; the buffers, numbers of relative places and masks, stay as they are."""
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    torch_reference.randomize(model)
    for key, value in model.named_buffers():
        value.copy_(buffers[key])
    return model


def stages_of(model):
    return {"stem": model.patch_embed, **{f"stage{i}": stage for i, stage in enumerate(model.layers, 1)}}


def check_forward(model, parts, name, path, x, layout):
    """As `twins.check_forward`; torch's Swins have channels last, or [B, H W, C]."""
    out = {}

    def keep(name, module, inputs, result):
        out[name] = (result[0] if isinstance(result, tuple) else result).numpy()

    hooks = [part.register_forward_hook(functools.partial(keep, key)) for key, part in parts.items()]
    loaded = twins.check_forward(model, {}, name, path, x, layout)
    for hook in hooks:
        hook.remove()
    ours = jax.jit(loaded.model.apply)(loaded.variables, x)[1]
    assert set(out) == set(parts)
    for key, value in out.items():
        close(ours[key], value.reshape(ours[key].shape))
    return loaded


@pytest.mark.slow
def test_timm_gives_the_same_logits_and_stages_and_takes_the_export(small, tmp_path):
    model, x = randomized(small_timm()), twins.images(64)
    path = torch_reference.save(model, tmp_path / "w.pth")
    loaded = check_forward(model, stages_of(model), small, path, x, "timm")
    assert (loaded.card.model, loaded.card.crop) == (small, 0.9)
    twins.check_export(loaded, small_timm(), x, tmp_path)


@pytest.mark.slow
def test_microsofts_names_are_read_as_timm_reads_them(small, tmp_path):
    model, x = randomized(small_timm()), twins.images(64)
    state = {}
    for key, value in model.state_dict().items():
        for i in (1, 2):
            key = key.replace(f"layers.{i}.downsample", f"layers.{i - 1}.down")
        state[key.replace(".down.", ".downsample.").replace("head.fc.", "head.")] = value
    read = functools.partial(timm.models.swin_transformer.checkpoint_filter_fn, model=model)
    assert all((read(dict(state))[key] == value).all() for key, value in model.state_dict().items())
    more = {"layers.0.blocks.1.attn_mask": torch_reference.torch.zeros(4, 16, 16)}
    torch_reference.torch.save({"model": {**state, **more}}, tmp_path / "w.pth")
    loaded = check_forward(model, stages_of(model), small, tmp_path / "w.pth", x, "microsoft")
    twins.check_export(loaded, small_timm(), x, tmp_path, read)


@pytest.mark.slow
# Maps of 18x16, 9x8, 5x4 pixels, and of 5x16, 3x8, 2x4: no whole windows, one window, odd sides to merge.
@pytest.mark.parametrize("size", [(75, 66), pytest.param((20, 64), marks=pytest.mark.slow)])
def test_torchvision_gives_the_same_logits_stages_and_gradient_at_any_size_and_takes_the_export(size, small, tmp_path):
    model, x = randomized(small_torchvision()), twins.images(*size)
    parts = {"stem": model.features[0], **{f"stage{i}": model.features[2 * i - 1] for i in (1, 2, 3)}}
    path = torch_reference.save(model, tmp_path / "w.pth")
    loaded = check_forward(model, parts, small, path, x, "torchvision")
    assert loaded.card.model == f"{small}.tv" and int(224 / loaded.card.crop) == 232
    twins.check_export(loaded, small_torchvision(), x, tmp_path)
    twins.check_gradient(loaded, model, x)


@pytest.mark.slow
def test_transformers_gives_the_same_logits_and_stages_and_takes_the_export(small, tmp_path):
    model, x = randomized(small_transformers()), twins.images(64)
    model.save_pretrained(tmp_path)
    blocks = {f"stage{i}": stage.blocks[-1] for i, stage in enumerate(model.swin.encoder.layers, 1)}
    loaded = check_forward(model, blocks, small, tmp_path / "model.safetensors", x, "hf")
    assert (loaded.card.model, loaded.card.crop) == (f"{small}.hf", 1.0)
    again = load.load(small, torch_reference.save(model, tmp_path / "w.pth"))  # transformers 5 calls them otherwise
    jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
    load.export(loaded.variables, loaded.card.model, tmp_path / "model.safetensors", card=loaded.card, layout="hf")
    tensors, metadata = formats.read(tmp_path / "model.safetensors")
    formats.write_safetensors(tmp_path / "model.safetensors", tensors, {**metadata, "format": "pt"})
    twin, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    np.testing.assert_array_equal(*(torch_reference.record(each.eval(), {}, x)[0] for each in (twin, model)))


NAMES = [name for name in swin.VARIANTS if "." not in name]


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_those_of_the_publishers(name):
    from torchvision.models import get_model_weights

    variant, theirs = models.get(name), timm.get_pretrained_cfg(f"{name}.ms_in1k")
    card = variant.card
    assert (card.mean, card.std, card.crop, card.interpolation) == (
        theirs.mean, theirs.std, theirs.crop_pct, theirs.interpolation,
    )  # fmt: skip
    card = models.get(variant.flavours["torchvision"]).card
    theirs = get_model_weights("swin_t" if "tiny" in name else "swin_s").DEFAULT.transforms()
    assert (int(card.input_size / card.crop), card.input_size) == (theirs.resize_size[0], theirs.crop_size[0])
    assert (card.interpolation, list(card.mean)) == (theirs.interpolation.value, theirs.mean)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_whole_network_of_timm_gives_the_same_logits_and_stages(name, tmp_path):
    model, x = randomized(timm.create_model(name, num_classes=CLASSES)), twins.images(224)
    path = torch_reference.save(model, tmp_path / "w.pth")
    check_forward(model, stages_of(model), name, path, x, "timm")


def test_names_say_what_trains_and_what_is_added():
    model = SMALL(num_classes=3)
    variables = random_variables(model, 40)
    paths = list(trees.flatten(variables["params"]))
    blocks = [f"stage{i}/block{j}" for i, depth in enumerate(DEPTHS, 1) for j in range(depth)]
    assert rules.block_names(paths, model.cuts) == blocks
    trained = trees.match_rules(paths, rules.make_rules("last_k", paths, model.cuts, k=1))
    parts = {path.split("/")[1] for path, rule in trained.items() if rule.value == "backbone"}
    assert parts == {"stage3", "norm"}
    decays = rules.layer_multipliers(paths, model.cuts, 0.5)
    ours = {path: decays[f"backbone/{path}/kernel"] for path in ("stem/conv", "stage3/block0/downsample/reduction")}
    assert ours == {"stem/conv": 0.5**5, "stage3/block0/downsample/reduction": 0.5}
    added = trees.flatten(peft.init(model, variables, [("lora", {"rank": 2})], jax.random.key(0)))
    assert {path.removeprefix("lora/backbone/").rpartition("/")[0] for path in added} == {
        f"{block}/attn/{name}" for block in blocks for name in ("qkv", "proj")
    }


@pytest.mark.slow
@pytest.mark.exhaustive
def test_options_of_every_network_act():
    model, x = SMALL(num_classes=3, drop_path=0.5), twins.images(40, 52, batch=2)
    variables, rngs = random_variables(model, 40), {"dropout": jax.random.key(1)}
    logits, out = jax.jit(model.apply)(variables, x)
    for cut in ("stem", "stage2"):
        close(jax.jit(functools.partial(model.apply, start=cut))(variables, out[cut])[0], logits, 1e-5)
    half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, x)[1]
    assert half["stage3"].dtype == jnp.bfloat16 and half["pre_logits"].dtype == jnp.float32
    close(half["pre_logits"], out["pre_logits"], 0.1)

    def gradient(remat):
        its = model.clone(remat=remat)
        return jax.jit(jax.value_and_grad(lambda v: jnp.sum(jnp.sin(its.apply(v, x, True, rngs=rngs)[0]))))(variables)

    plain, again = gradient(""), gradient("block")
    assert abs(plain[0] - jnp.sum(jnp.sin(logits))) > 1e-3, "stochastic depth acts"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, again)
