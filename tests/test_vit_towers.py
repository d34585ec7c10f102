"""DINOv2, CLIP and SigLIP: files of every publisher give their numbers, also at other sizes, and take exports back."""

import functools

import jax
import numpy as np
import pytest
from test_models import random_variables
from test_pretrained import CLASSES, add_variants, close

from tl_jax import models
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.models import clip, dinov2, peft, positions, vit
from tl_jax.weights import formats, load

torch_reference = pytest.importorskip("torch_reference")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
twins = pytest.importorskip("twins")

EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
SIZE = {"width": 24, "depth": 2, "heads": 3, "image_size": 42}
THEIRS = {"img_size": 42, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 3}
SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 42, "patch_size": 14}
X = twins.images(42)
WIDE = twins.images(56, 28)
SMALL = functools.partial(vit.ViT, patch_size=14, **SIZE)
REGISTERS = pytest.mark.parametrize("registers", [0, 4])


def small_dinov2(monkeypatch, registers):
    module = functools.partial(SMALL, layer_scale=1e-5, registers=registers, class_position=not registers)
    variants = dinov2.dinov2_variants("small_dinov2", module, bool(registers))
    for name, variant in variants.items():
        monkeypatch.setitem(models.MODELS, name, variant._replace(card=variant.card.replace(input_size=42)))
    return "small_dinov2"


def timm_dinov2(registers, num_classes=0, **fields):
    more = {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    settings = {"init_values": 1e-5, "num_classes": num_classes, **more, **THEIRS, **fields}
    return timm.models.VisionTransformer(**settings)


def parts_of(model):
    return {"stem": model.norm_pre, **{f"block{i}": block for i, block in enumerate(model.blocks)}, "pre_logits": model}


@pytest.mark.parametrize("registers", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_dinov2_of_timm_at_its_own_size_and_at_another(registers, monkeypatch, tmp_path):
    name, model = small_dinov2(monkeypatch, registers), torch_reference.randomize(timm_dinov2(registers))
    path = torch_reference.save(model, tmp_path / "w.pth")
    loaded = twins.check_forward(model, parts_of(model), name, path, X, "timm")
    assert (loaded.card.model, loaded.card.num_classes, loaded.card.crop) == (name, 0, 1.0)
    twins.check_export(loaded, timm_dinov2(registers), X, tmp_path)
    model.set_input_size((56, 28))  # timm resamples by itself
    wide = twins.check_forward(model, parts_of(model), name, path, WIDE, "timm", image_size=(56, 28))
    assert wide.card.input_size == (56, 28)


def of_facebook(model, registers):
    """The file that Facebook would have for a network of timm without registers, or one with some; random."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    noise = {"mask_token": (1, 24)}
    if registers:
        noise |= {"register_tokens": (1, registers, 24), "pos_embed": (1, 10, 24)}
        del state["reg_token"]
    generator = torch_reference.torch.Generator().manual_seed(1)
    draw = functools.partial(torch_reference.torch.randn, generator=generator)
    return state | {key: draw(*shape) for key, shape in noise.items()}


@REGISTERS
def test_dinov2_of_facebook_is_read_as_timm_reads_it(registers, monkeypatch, tmp_path):
    name, model = small_dinov2(monkeypatch, registers), torch_reference.randomize(timm_dinov2(registers))
    state = of_facebook(model, registers)
    read = functools.partial(timm.models.vision_transformer.checkpoint_filter_fn, model=model)
    model.load_state_dict(read(dict(state)))
    torch_reference.torch.save(state, tmp_path / "w.pth")
    loaded = twins.check_forward(model, parts_of(model), name, tmp_path / "w.pth", X, "facebook")
    assert (loaded.card.model, loaded.card.crop, loaded.layout) == (f"{name}.fb", 0.875, "facebook")
    twins.check_export(loaded, timm_dinov2(registers), X, tmp_path, read)
    load.export(loaded.variables, name, tmp_path / "again.safetensors", card=loaded.card)
    again, _ = formats.read(tmp_path / "again.safetensors")
    assert set(again) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(again[key], value.numpy())
    if not registers:
        load.export(loaded.variables, name, tmp_path / "timm.safetensors", card=loaded.card, layout="timm")
        assert set(formats.read(tmp_path / "timm.safetensors")[0]) == set(state) - {"mask_token"}


def test_dinov2_at_another_size_reads_positions_as_its_authors_do(monkeypatch, tmp_path):
    name, model = small_dinov2(monkeypatch, 0), torch_reference.randomize(timm_dinov2(0))
    state = of_facebook(model, 0)
    torch_reference.torch.save(state, tmp_path / "w.pth")
    loaded = load.load(name, tmp_path / "w.pth", image_size=(56, 28))
    grid = state["pos_embed"][:, 1:].reshape(1, 3, 3, 24).permute(0, 3, 1, 2)
    factors = {"scale_factor": ((4 + 0.1) / 3, (2 + 0.1) / 3), "mode": "bicubic"}
    expected = torch_reference.torch.nn.functional.interpolate(grid, **factors).permute(0, 2, 3, 1).reshape(1, 8, 24)
    found = loaded.variables["params"]["backbone"]["stem"]["pos_embed"]
    close(found[:, 1:], expected.numpy(), 1e-5)
    close(found[:, :1], state["pos_embed"][:, :1].numpy(), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("registers", [4, pytest.param(0, marks=pytest.mark.slow)])
def test_dinov2_of_transformers_at_its_own_size_and_at_another(registers, monkeypatch, tmp_path):
    name = small_dinov2(monkeypatch, registers)
    config = transformers.Dinov2WithRegistersConfig if registers else transformers.Dinov2Config
    kind = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    model = torch_reference.randomize(kind(config(**SHAPE)))
    model.save_pretrained(tmp_path)
    parts = {"stem": model.embeddings, **{f"block{i}": layer for i, layer in enumerate(model.encoder.layer)}}
    for x, size in ((X, None), (WIDE, (56, 28)), (twins.images(28), 28)):
        with torch_reference.torch.no_grad():
            pooled = model(torch_reference.torch.from_numpy(np.moveaxis(x, -1, 1).copy())).pooler_output.numpy()
        out = check_parts(model, parts, name, tmp_path / "model.safetensors", x, size)
        close(out["pre_logits"], pooled)
    loaded = load.load(name, tmp_path / "model.safetensors")
    assert (loaded.layout, loaded.card.model) == ("hf", f"{name}.hf")
    load.export(loaded.variables, name, tmp_path / "again.safetensors", card=loaded.card)
    state = {k.removeprefix("dinov2."): v for k, v in formats.read(tmp_path / "again.safetensors")[0].items()}
    expected, _ = formats.read(tmp_path / "model.safetensors")
    assert set(state) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(state[key], value)


def check_parts(model, parts, name, path, x, size):
    """The outputs of the torch modules, by cut, without those of the whole network; returns ours."""
    out = {}
    hooks = [
        part.register_forward_hook(lambda _, __, y, key=key: out.update({key: y[0] if isinstance(y, tuple) else y}))
        for key, part in parts.items()
    ]
    with torch_reference.torch.no_grad():
        model(torch_reference.torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    for hook in hooks:
        hook.remove()
    loaded = load.load(name, path, image_size=size)
    ours = jax.jit(loaded.model.apply)(loaded.variables, x)[1]
    for key, value in out.items():
        close(ours[key], value.numpy())
    return ours


@pytest.mark.slow
def test_dinov2_gradient_is_that_of_timm(monkeypatch, tmp_path):
    name, model = small_dinov2(monkeypatch, 4), torch_reference.randomize(timm_dinov2(4))
    loaded = load.load(name, torch_reference.save(model, tmp_path / "w.pth"))
    twins.check_gradient(loaded, model, twins.images(42, batch=2))


def with_places(tower):
    """Random weights; the numbers of the places, a buffer, stay as they are."""
    places = tower.embeddings.position_ids.clone()
    torch_reference.randomize(tower)
    tower.embeddings.position_ids.copy_(places)


def small_clip(monkeypatch, act="quick_gelu"):
    module = functools.partial(SMALL, norm_eps=1e-5, pre_norm=True, act=act)
    return add_variants(monkeypatch, clip.clip_variants(module, Card("small_clip", 0, 42), "openai"))


def timm_clip(act="quick_gelu"):
    norm = functools.partial(timm.layers.LayerNorm, eps=1e-5)
    settings = {"act_layer": act, "pre_norm": True, "norm_layer": norm, "num_classes": CLASSES, **THEIRS}
    return timm.models.VisionTransformer(**settings)


def to_openai(state):
    """OpenAI's names of timm's CLIP tower, of both a text tower and what else is in their files."""
    torch = torch_reference.torch
    names = {
        "cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre", "blocks": "transformer.resblocks", "norm1": "ln_1", "norm2": "ln_2",
        "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    found = {
        "text_projection": torch.ones(3, 3),
        "positional_embedding": torch.ones(7, 3),
        "logit_scale": torch.ones(()),
    }
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        key = "ln_post" + key.removeprefix("norm") if key.startswith("norm.") else key
        value = value.reshape(-1) if key == "class_embedding" else value[0] if key == "positional_embedding" else value
        if key != "head.bias":
            found["visual." + key.replace("head.weight", "proj")] = value.T if key == "head.weight" else value
    return found


@pytest.mark.parametrize("act", ["quick_gelu", pytest.param("gelu", marks=pytest.mark.slow)])
def test_clip_of_timm_has_the_projection_as_its_head(act, monkeypatch, tmp_path):
    name, model = small_clip(monkeypatch, act), torch_reference.randomize(timm_clip(act))
    path, parts = torch_reference.save(model, tmp_path / "w.pth"), parts_of(model)
    del parts["pre_logits"]
    loaded = twins.check_forward(model, {**parts, "pre_logits": model.head_drop}, name, path, X, "timm")
    twins.check_export(loaded, timm_clip(act), X, tmp_path)
    assert load.load(name, path, 3).dropped == ("head.bias", "head.weight")


def test_clip_of_openai_is_read_as_timm_reads_it(monkeypatch, tmp_path):
    name, model = small_clip(monkeypatch), torch_reference.randomize(timm_clip())
    with torch_reference.torch.no_grad():
        model.head.bias.zero_()
    read = functools.partial(timm.models.vision_transformer.checkpoint_filter_fn, model=model)
    state = to_openai(model.state_dict())
    assert all((read(dict(state))[key] == value).all() for key, value in model.state_dict().items())
    torch_reference.torch.save(state, tmp_path / "w.pth")
    parts = parts_of(model)
    del parts["pre_logits"]
    loaded = twins.check_forward(model, parts, name, tmp_path / "w.pth", X, "openai")
    assert (loaded.card.model, loaded.card.num_classes) == (f"{name}.openai", CLASSES)
    assert loaded.origins["params/head/bias"] == "zeros"
    twins.check_export(loaded, timm_clip(), X, tmp_path, read)
    tuned = trees.flatten(loaded.variables)
    tuned["params/head/bias"] = np.ones(CLASSES, np.float32)
    with pytest.raises(ValueError, match="must be zero in this layout"):
        load.export(trees.unflatten(tuned), name, tmp_path / "x.safetensors", card=loaded.card, layout="openai")
    assert load.load(name, tmp_path / "w.pth", 4, image_size=56).dropped == ("visual.proj",)


@pytest.mark.slow
def test_clip_of_transformers_gives_the_same_embedding(monkeypatch, tmp_path):
    name = small_clip(monkeypatch)
    config = transformers.CLIPVisionConfig(**SHAPE, intermediate_size=96, projection_dim=CLASSES)
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    tower = model.vision_model
    with_places(tower)
    model.save_pretrained(tmp_path)
    parts = {"stem": tower.pre_layrnorm, **{f"block{i}": layer for i, layer in enumerate(tower.encoder.layers)}}
    ours = check_parts(model, parts, name, tmp_path / "model.safetensors", X, None)
    with torch_reference.torch.no_grad():
        result = model(torch_reference.torch.from_numpy(np.moveaxis(X, -1, 1).copy()))
    close(ours["logits"], result.image_embeds.numpy())
    check_same_file(name, tmp_path, "hf")


def check_same_file(name, folder, layout, more=""):
    """Loading and exporting gives the file back, bit by bit."""
    loaded = load.load(name, folder / "model.safetensors")
    assert (loaded.layout, loaded.card.model) == (layout, f"{name}.{layout}")
    load.export(loaded.variables, name, folder / "again.safetensors", card=loaded.card, layout=layout)
    found = {k.removeprefix(more): v for k, v in formats.read(folder / "again.safetensors")[0].items()}
    expected, _ = formats.read(folder / "model.safetensors")
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


def small_siglip(monkeypatch):
    module = functools.partial(SMALL, pool="map")
    return add_variants(monkeypatch, clip.siglip_variants(module, Card("small_siglip", 0, 42)))


def timm_siglip():
    return timm.models.VisionTransformer(class_token=False, global_pool="map", num_classes=CLASSES, **THEIRS)


@pytest.mark.slow
def test_siglip_of_timm_pools_by_attention(monkeypatch, tmp_path):
    name, model = small_siglip(monkeypatch), torch_reference.randomize(timm_siglip())
    path, parts = torch_reference.save(model, tmp_path / "w.pth"), parts_of(model)
    del parts["pre_logits"]
    loaded = twins.check_forward(model, {**parts, "pre_logits": model.head_drop}, name, path, X, "timm")
    twins.check_export(loaded, timm_siglip(), X, tmp_path)
    twins.check_gradient(loaded, model, twins.images(42, batch=2))


def test_siglip_of_transformers_gives_the_same_embedding(monkeypatch, tmp_path):
    variants = clip.siglip_variants(functools.partial(SMALL, pool="map"), Card("small_siglip", 0, 42))
    for key, variant in variants.items():
        monkeypatch.setitem(models.MODELS, key, variant)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SHAPE, intermediate_size=96))
    tower = getattr(model, "vision_model", model)
    with_places(tower)
    model.eval().save_pretrained(tmp_path)
    parts = {"stem": tower.embeddings, **{f"block{i}": layer for i, layer in enumerate(tower.encoder.layers)}}
    ours = check_parts(model, parts, "small_siglip", tmp_path / "model.safetensors", X, None)
    with torch_reference.torch.no_grad():
        result = model(torch_reference.torch.from_numpy(np.moveaxis(X, -1, 1).copy()))
    close(ours["pre_logits"], result.pooler_output.numpy())
    check_same_file("small_siglip", tmp_path, "hf", "vision_model.")


@pytest.mark.parametrize("how", positions.HOW)
@pytest.mark.parametrize("old, new", [((37, 37), (16, 16)), ((7, 7), (4, 12)), ((2, 6), (9, 3))])
def test_positions_are_resampled_as_torch_does(how, old, new):
    torch = torch_reference.torch
    values = np.random.default_rng(0).standard_normal((1, 5 + old[0] * old[1], 8)).astype(np.float32)
    grid = torch.from_numpy(values[:, 5:]).reshape(1, *old, 8).permute(0, 3, 1, 2)
    factors = [(b + 0.1) / a for a, b in zip(old, new, strict=True)]
    given = {"scale_factor": factors} if how == "shifted" else {"size": new, "antialias": how == "antialias"}
    expected = torch.nn.functional.interpolate(grid, mode="bicubic", **given).permute(0, 2, 3, 1).reshape(1, -1, 8)
    found = positions.resample(values, old, new, how)
    close(found[:, 5:], expected.numpy(), 1e-5)
    np.testing.assert_array_equal(found[:, :5], values[:, :5])


@pytest.mark.slow
def test_any_vit_reads_images_that_are_no_squares_and_its_file_remembers_it(monkeypatch, tmp_path):
    name = add_variants(monkeypatch, vit.vit_variants("small_vit", SMALL, 3, 42))
    model = torch_reference.randomize(timm.models.VisionTransformer(num_classes=CLASSES, **THEIRS))
    path = torch_reference.save(model, tmp_path / "w.pth")
    model.set_input_size((28, 56))
    parts = {key: part for key, part in parts_of(model).items() if key != "pre_logits"}
    wide = twins.check_forward(model, parts, name, path, twins.images(28, 56), "timm", image_size=(28, 56))
    load.export(wide.variables, name, tmp_path / "wide.safetensors", card=wide.card)
    again = load.load("", tmp_path / "wide.safetensors")
    assert again.card.input_size == again.model.image_size == (28, 56)
    turned = load.load("", tmp_path / "wide.safetensors", image_size=(56, 28))  # as many patches, another grid
    pos_embed = [net.variables["params"]["backbone"]["stem"]["pos_embed"] for net in (again, turned)]
    close(pos_embed[1], positions.resample(np.asarray(pos_embed[0]), (2, 4), (4, 2)), 1e-9)
    assert load.load("", tmp_path / "wide.safetensors", image_size=(42, 42)).card.input_size == 42


def test_prompts_enter_behind_the_tokens_of_the_tower_and_features_must_have_them():
    model = SMALL(num_classes=3, registers=4, class_position=False)
    variables, addition = random_variables(model, 42), ("prompt", {"tokens": 2, "deep": True})
    added = peft.init(model, variables, [addition], jax.random.key(1))
    both = {**variables, "params": {**variables["params"], **added}}
    adapted = peft.Adapted(model, (addition,))
    out = jax.eval_shape(adapted.apply, both, twins.images(42))[1]
    assert [out[cut].shape for cut in ("stem", "block1")] == [(1, 1 + 4 + 2 + 9, 24)] * 2
    with pytest.raises(ValueError, match="with 14 tokens, expected 16: the class token, 4 registers, 2 prompts, 9 pat"):
        adapted.apply(both, np.zeros((1, 14, 24), np.float32), start="block0")


NAMES = [name for name in (*dinov2.VARIANTS, *clip.VARIANTS) if "." not in name]
# Of the facts: DINOv2 with its mask token, CLIP's towers with their projection.
FACTS = {
    "vit_small_patch14_dinov2.fb": 22056576,
    "vit_small_patch14_reg4_dinov2.fb": 22058112,
    "vit_base_patch14_dinov2.fb": 86580480,
    "vit_base_patch14_reg4_dinov2.fb": 86583552,
    "vit_large_patch14_dinov2.hf": 304368640,
    "vit_large_patch14_reg4_dinov2.hf": 304372736,
    "vit_base_patch32_clip_224": 87849216 + 512,  # the bias of our head
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", FACTS)
def test_parameter_count_is_the_published_one(name):
    variant = models.get(name)
    model, side = variant.module(num_classes=variant.card.num_classes), variant.card.input_size
    tree = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, side, side, 3), np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree["params"])) == FACTS[name]


TAGS = {"dinov2": "lvd142m", "quickgelu": "openai", "clip": "laion2b", "siglip": "webli"}


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_timms_of_the_published_towers(name):
    tag = next(tag for part, tag in TAGS.items() if part in name)
    card, theirs = models.get(name).card, timm.get_pretrained_cfg(f"{name}.{tag}")
    assert (card.mean, card.std, card.interpolation) == (theirs.mean, theirs.std, theirs.interpolation)
    assert (card.crop, card.crop_mode, card.input_size, card.num_classes) == (
        theirs.crop_pct,
        theirs.crop_mode,
        theirs.input_size[-1],
        theirs.num_classes,
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=EXHAUSTIVE) for name in NAMES])
def test_whole_tower_of_timm_gives_the_same_logits_and_blocks(name, tmp_path):
    size = 70 if "dinov2" in name else 224
    fields = {"num_classes": 0} if "dinov2" in name or "siglip" in name else {"num_classes": 512}
    model = torch_reference.randomize(timm.create_model(name, **fields))
    path = torch_reference.save(model, tmp_path / "w.pth")
    if "dinov2" in name:
        model.set_input_size((size, size))
    parts = {key: part for key, part in parts_of(model).items() if key != "pre_logits"}
    twins.check_forward(model, parts, name, path, twins.images(size), "timm", image_size=size)
