"""ConvNeXt gives the numbers of timm, Facebook's names, torchvision and transformers, and exports to them."""

import functools

import pytest
from test_pretrained import CLASSES, add_variants

from tl_jax import models
from tl_jax.models import convnext

torch_reference = pytest.importorskip("torch_reference")
timm = pytest.importorskip("timm")
twins = pytest.importorskip("twins")

EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
DEPTHS, WIDTHS = (1, 1, 2, 1), (8, 16, 24, 32)
SMALL = functools.partial(convnext.ConvNeXt, depths=DEPTHS, widths=WIDTHS)


@pytest.fixture
def small(monkeypatch):
    return add_variants(monkeypatch, convnext.convnext_variants("small_convnext", SMALL, 0.95, 236))


def small_timm(**fields):
    return timm.models.convnext.ConvNeXt(depths=DEPTHS, dims=WIDTHS, num_classes=CLASSES, **fields)


def stages_of(model):
    return {"stem": model.stem, **{f"stage{i}": stage for i, stage in enumerate(model.stages, 1)}}


def of_torchvision():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    places = zip(WIDTHS, (*WIDTHS[1:], None), DEPTHS, strict=True)
    return ConvNeXt([CNBlockConfig(*place) for place in places], num_classes=CLASSES)


def of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(depths=list(DEPTHS), hidden_sizes=list(WIDTHS), num_labels=CLASSES)
    return transformers.ConvNextForImageClassification(config)


@pytest.mark.slow
def test_timm_gives_the_same_logits_stages_and_gradient_and_takes_the_export(small, tmp_path):
    model, x = torch_reference.randomize(small_timm()), twins.images(75, 66)  # no multiple of 32: what is left over
    path = torch_reference.save(model, tmp_path / "w.pth")
    loaded = twins.check_forward(model, stages_of(model), small, path, x, "timm")
    twins.check_export(loaded, small_timm(), x, tmp_path)
    twins.check_gradient(loaded, model, twins.images(64, batch=2))


@pytest.mark.slow
def test_timms_small_networks_have_convolutions_where_ours_have_dense_layers(monkeypatch, tmp_path):
    name = add_variants(monkeypatch, convnext.convnext_variants("conv_convnext", SMALL, 0.95, 0))
    model, x = torch_reference.randomize(small_timm(conv_mlp=True)), twins.images(64)
    path = torch_reference.save(model, tmp_path / "w.pth")
    loaded = twins.check_forward(model, stages_of(model), name, path, x, "timm")
    twins.check_export(loaded, small_timm(conv_mlp=True), x, tmp_path)


def to_facebook(key):
    """Facebook's name of timm's key, by the places of its published files."""
    if key.startswith("stem."):
        return key.replace("stem.", "downsample_layers.0.")
    if ".downsample." in key:
        return key.replace("stages.", "downsample_layers.").replace(".downsample.", ".")
    if key.startswith("head."):
        return key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
    for theirs, its in {".blocks": "", "conv_dw": "dwconv", "mlp.fc": "pwconv"}.items():
        key = key.replace(theirs, its)
    return key


@pytest.mark.slow
def test_facebooks_names_are_read_as_timm_reads_them(small, tmp_path):
    model, x = torch_reference.randomize(small_timm()), twins.images(64)
    state = {to_facebook(key): value for key, value in model.state_dict().items()}
    read = functools.partial(timm.models.convnext.checkpoint_filter_fn, model=model)
    assert all((read(state)[key] == value).all() for key, value in model.state_dict().items())
    torch_reference.torch.save({"model": state}, tmp_path / "w.pth")
    loaded = twins.check_forward(model, stages_of(model), small, tmp_path / "w.pth", x, "facebook")
    assert (loaded.card.model, loaded.card.crop) == (f"{small}.fb", 0.875)
    twins.check_export(loaded, small_timm(), x, tmp_path, read)


@pytest.mark.slow
def test_torchvision_gives_the_same_logits_and_stages_and_takes_the_export(small, tmp_path):
    model, x = torch_reference.randomize(of_torchvision()), twins.images(75, 66)
    parts = {"stem": model.features[0], **{f"stage{i}": model.features[2 * i - 1] for i in range(1, 5)}}
    path = torch_reference.save(model, tmp_path / "w.pth")
    loaded = twins.check_forward(model, parts, small, path, x, "torchvision")
    assert (loaded.card.model, loaded.card.interpolation) == (f"{small}.tv", "bilinear")
    twins.check_export(loaded, of_torchvision(), x, tmp_path)


def test_transformers_gives_the_same_logits_and_stages_and_takes_the_export(small, tmp_path):
    model, x = torch_reference.randomize(of_transformers()), twins.images(64)
    with torch_reference.torch.no_grad():
        model.convnext.encoder.stages[-1].layers[-1].layer_scale_parameter *= 1e-3
    parts = {f"stage{i}": stage for i, stage in enumerate(model.convnext.encoder.stages, 1)}
    model.save_pretrained(tmp_path)
    parts |= {"stem": model.convnext.embeddings}
    loaded = twins.check_forward(model, parts, small, tmp_path / "model.safetensors", x, "hf")
    assert (loaded.card.model, loaded.model.last_eps) == (f"{small}.hf", 1e-12)
    twins.check_export(loaded, of_transformers(), x, tmp_path)


NAMES = [name for name in convnext.VARIANTS if "." not in name]


@pytest.mark.parametrize("name", [pytest.param(name, marks=EXHAUSTIVE) for name in NAMES])
def test_whole_network_of_timm_gives_the_same_logits_and_stages(name, tmp_path):
    model, x = torch_reference.randomize(timm.create_model(name, num_classes=CLASSES)), twins.images(64)
    path = torch_reference.save(model, tmp_path / "w.pth")
    twins.check_forward(model, stages_of(model), name, path, x, "timm")


@pytest.mark.parametrize("name", NAMES)
def test_cards_are_those_of_the_publishers(name):
    variant, theirs = models.get(name), timm.get_pretrained_cfg(name)
    assert (variant.card.mean, variant.card.std) == (theirs.mean, theirs.std)
    assert (variant.card.crop, variant.card.interpolation) == (theirs.crop_pct, theirs.interpolation)
    assert variant.card.input_size == theirs.input_size[-1]
    if "torchvision" not in variant.flavours:
        return
    from torchvision.models import get_model_weights

    card, theirs = models.get(variant.flavours["torchvision"]).card, get_model_weights(name).DEFAULT.transforms()
    assert (int(card.input_size / card.crop), card.input_size) == (theirs.resize_size[0], theirs.crop_size[0])
    assert card.interpolation == theirs.interpolation.value and card.mean == tuple(theirs.mean)
    card, theirs = models.get(variant.flavours["facebook"]).card, timm.get_pretrained_cfg(f"{name}.fb_in1k")
    assert (card.crop, card.mean, card.interpolation) == (theirs.crop_pct, theirs.mean, theirs.interpolation)
