"""Conversion parity: files of every family and layout give the logits and stages of the network they come from."""

import functools
import io
import re

import jax
import numpy as np
import pytest
from test_pretrained import CLASSES, TINY_VIT, add_variants, close, images

from tl_jax import models
from tl_jax.core.card import Card
from tl_jax.models import positions, resnet, vit
from tl_jax.models.variant import Variant
from tl_jax.weights import load

BIG = pytest.mark.slow
EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)  # CI runs one large variant of each family


@pytest.fixture
def reference():
    """The torch side; skips the test where torch is not installed."""
    return pytest.importorskip("torch_reference")


@pytest.fixture
def small_vit(monkeypatch):
    return add_variants(monkeypatch, vit.vit_variants("small_vit", TINY_VIT, 3, 48))


def check_parity(model, modules, name, path, size, expected_layout):
    """The file at `path` gives, in our network, the torch model's logits and the outputs of the named modules."""
    from torch_reference import record

    x = images(size)
    expected, features = record(model, modules, x)
    loaded = load.load(name, path)
    assert loaded.layout == expected_layout and "new" not in loaded.origins.values()
    logits, out = jax.jit(loaded.model.apply)(loaded.variables, x)
    close(logits, expected)
    assert set(features) == set(modules)
    for key, value in features.items():
        close(out[key], value)
    return loaded


def torchvision_stages(model):
    return {"stem": model.maxpool, **{f"stage{i}": getattr(model, f"layer{i}") for i in range(1, 5)}}


DEEP = ("resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2")
RESNETS = pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        pytest.param("resnext50_32x4d", marks=BIG),
        *(pytest.param(name, marks=EXHAUSTIVE) for name in DEEP),
    ],
)


@RESNETS
def test_torchvision_resnet_gives_the_same_logits_and_stages(name, reference, tmp_path):
    from torchvision.models import get_model

    model = reference.randomize(get_model(name, num_classes=CLASSES))
    check_parity(model, torchvision_stages(model), name, reference.save(model, tmp_path / "w.pth"), 64, "timm")


@RESNETS
def test_timm_resnet_gives_the_same_logits_and_stages(name, reference, tmp_path):
    timm = pytest.importorskip("timm")
    model = reference.randomize(timm.create_model(name, num_classes=CLASSES))
    check_parity(model, torchvision_stages(model), name, reference.save(model, tmp_path / "w.pth"), 64, "timm")


@pytest.mark.slow
@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "bottleneck, groups, base_width", [(False, 1, 64), (True, 1, 64), (True, 1, 128), (True, 32, 4)]
)
def test_every_kind_of_residual_block_is_torchvisions(bottleneck, groups, base_width, reference, tmp_path, monkeypatch):
    from torchvision.models import resnet as theirs

    block = theirs.Bottleneck if bottleneck else theirs.BasicBlock
    model = reference.randomize(theirs.ResNet(block, [1, 2, 1, 1], CLASSES, groups=groups, width_per_group=base_width))
    name = f"short_resnet_{bottleneck}_{groups}_{base_width}"
    module = functools.partial(
        resnet.ResNet, depths=(1, 2, 1, 1), bottleneck=bottleneck, groups=groups, base_width=base_width
    )
    add_variants(monkeypatch, {name: Variant(module, Card(name, CLASSES), resnet.LAYOUTS, {})})
    # 75 is odd at every stride: a padding placed as in SAME would show.
    check_parity(model, torchvision_stages(model), name, reference.save(model, tmp_path / "w.pth"), 75, "timm")


@pytest.mark.parametrize(
    "name, block, depths",
    [("resnet18", "basic", [2, 2, 2, 2]), pytest.param("resnet50", "bottleneck", [3, 4, 6, 3], marks=BIG)],
)
def test_transformers_resnet_gives_the_same_logits_and_stages(name, block, depths, reference, tmp_path):
    transformers = pytest.importorskip("transformers")
    widths = [64, 128, 256, 512] if block == "basic" else [256, 512, 1024, 2048]
    config = transformers.ResNetConfig(layer_type=block, depths=depths, hidden_sizes=widths, num_labels=CLASSES)
    model = reference.randomize(transformers.ResNetForImageClassification(config))
    stages = {"stem": model.resnet.embedder, **{f"stage{i + 1}": model.resnet.encoder.stages[i] for i in range(4)}}
    model.save_pretrained(tmp_path)
    loaded = check_parity(model, stages, name, tmp_path / "model.safetensors", 64, "hf")
    assert loaded.card.model == f"{name}.hf" and loaded.card.interpolation == "bicubic"


def cifar_resnet(torch, blocks):
    """A torch twin of the CIFAR ResNet under the names of the published files, written from He et al. 2016."""
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.stride = stride
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            if self.stride == 2:
                extra = (y.shape[1] - x.shape[1]) // 2
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
            return (x + y).relu()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
            for i, width in enumerate((16, 32, 64)):
                first = Block(16 if i == 0 else width // 2, width, 1 if i == 0 else 2)
                rest = [Block(width, width, 1) for _ in range(blocks - 1)]
                setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
            self.linear = nn.Linear(64, CLASSES)

        def forward(self, x):
            x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
            return self.linear(x.mean((2, 3)))

    return Net()


@pytest.mark.thin(1)
@pytest.mark.parametrize("size", [32, 37])
def test_cifar_resnet_gives_the_same_logits_and_stages(size, reference, tmp_path):
    model = reference.randomize(cifar_resnet(reference.torch, 3))
    stages = {f"stage{i}": getattr(model, f"layer{i}") for i in (1, 2, 3)}
    path = tmp_path / "w.th"
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    reference.torch.save({"state_dict": state, "best_prec1": 91.7}, path)
    check_parity(model, stages, "resnet20_cifar", path, size, "cifar")


def small_timm_vit(timm):
    return timm.models.VisionTransformer(48, 16, num_classes=CLASSES, embed_dim=24, depth=2, num_heads=3)


def timm_parts(model):
    return {"stem": model.norm_pre, **{f"block{i}": block for i, block in enumerate(model.blocks)}}


def test_timm_vit_gives_the_same_logits_and_blocks(small_vit, reference, tmp_path):
    model = reference.randomize(small_timm_vit(pytest.importorskip("timm")))
    check_parity(model, timm_parts(model), small_vit, reference.save(model, tmp_path / "w.pth"), 48, "timm")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vit_tiny_patch16_224", marks=BIG),
        pytest.param("deit_tiny_patch16_224", marks=EXHAUSTIVE),
        pytest.param("vit_small_patch32_384", marks=EXHAUSTIVE),
        pytest.param("vit_base_patch32_224", marks=EXHAUSTIVE),
        pytest.param("deit_base_patch16_384", marks=EXHAUSTIVE),
        pytest.param("vit_large_patch32_224", marks=EXHAUSTIVE),
    ],
)
def test_whole_timm_vit_gives_the_same_logits_and_blocks(name, reference, tmp_path):
    model = reference.randomize(pytest.importorskip("timm").create_model(name, num_classes=CLASSES))
    size, path = models.get(name).card.input_size, reference.save(model, tmp_path / "w.pth")
    check_parity(model, timm_parts(model), name, path, size, "timm")


def with_small_embeddings(model):
    """Makes the first LayerNorm's input tiny, so that a wrong epsilon shows."""
    for key, value in model.state_dict().items():
        if any(part in key for part in ("embedding", "conv_proj", "token")):
            value.mul_(1e-3)
    return model


@pytest.mark.thin(1)
@pytest.mark.parametrize("old_names", [False, True])
def test_torchvision_vit_gives_the_same_logits_and_blocks(old_names, small_vit, reference, tmp_path):
    from torchvision.models import VisionTransformer

    model = with_small_embeddings(reference.randomize(VisionTransformer(48, 16, 2, 3, 24, 96, num_classes=CLASSES)))
    state = model.state_dict()
    if old_names:
        state = {
            key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
            for key, value in state.items()
        }
    reference.torch.save(state, tmp_path / "w.pth")
    parts = {"stem": model.encoder.dropout, **{f"block{i}": block for i, block in enumerate(model.encoder.layers)}}
    loaded = check_parity(model, parts, small_vit, tmp_path / "w.pth", 48, "torchvision")
    assert loaded.card.model == "small_vit.tv" and loaded.card.mean == (0.485, 0.456, 0.406)


def transformers_vit(transformers, **geometry):
    config = transformers.ViTConfig(num_labels=CLASSES, num_attention_heads=3, **geometry)
    return transformers.ViTForImageClassification(config)


def transformers_parts(model):
    return {"stem": model.vit.embeddings, **{f"block{i}": block for i, block in enumerate(model.vit.layers)}}


@pytest.mark.thin(1)
@pytest.mark.parametrize("on_disk", [True, False])
def test_transformers_vit_gives_the_same_logits_and_blocks(on_disk, small_vit, reference, tmp_path):
    model = with_small_embeddings(
        reference.randomize(
            transformers_vit(
                pytest.importorskip("transformers"),
                hidden_size=24,
                num_hidden_layers=2,
                intermediate_size=96,
                image_size=48,
            )
        )
    )
    path = tmp_path / "model.safetensors"
    if on_disk:
        model.save_pretrained(tmp_path)
    else:
        path = reference.save(model, tmp_path / "w.pth")
    loaded = check_parity(model, transformers_parts(model), small_vit, path, 48, "hf")
    assert loaded.card.model == "small_vit.hf" and loaded.card.interpolation == "bilinear"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_whole_transformers_vit_gives_the_same_logits_and_blocks(reference, tmp_path):
    model = reference.randomize(
        transformers_vit(
            pytest.importorskip("transformers"), hidden_size=192, num_hidden_layers=12, intermediate_size=768
        )
    )
    model.save_pretrained(tmp_path)
    for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224"):
        loaded = check_parity(model, transformers_parts(model), name, tmp_path / "model.safetensors", 224, "hf")
        assert loaded.card.model == f"{name}.hf"


def jax_release(rng, width, depth, heads, patch, tokens, classes):
    """Random weights under the names and shapes of the JAX release."""

    def normal(*shape):
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]) if len(shape) > 1 else 25)).astype(np.float32)

    flat = {
        "cls": normal(1, 1, width),
        "embedding/kernel": normal(patch, patch, 3, width),
        "embedding/bias": normal(width),
        "Transformer/posembed_input/pos_embedding": normal(1, tokens, width),
        "Transformer/encoder_norm/scale": 1 + normal(width),
        "Transformer/encoder_norm/bias": normal(width),
        "head/kernel": normal(width, classes),
        "head/bias": normal(classes),
    }
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            flat[f"{attention}/{name}/kernel"] = normal(width, heads, width // heads) * heads
            flat[f"{attention}/{name}/bias"] = normal(heads, width // heads)
        flat |= {
            f"{attention}/out/kernel": normal(heads, width // heads, width),
            f"{attention}/out/bias": normal(width),
        }
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            flat |= {f"{block}/{norm}/scale": 1 + normal(width), f"{block}/{norm}/bias": normal(width)}
        flat |= {
            f"{block}/MlpBlock_3/Dense_0/kernel": normal(width, 4 * width),
            f"{block}/MlpBlock_3/Dense_0/bias": normal(4 * width),
            f"{block}/MlpBlock_3/Dense_1/kernel": normal(4 * width, width),
            f"{block}/MlpBlock_3/Dense_1/bias": normal(width),
        }
    return flat


def jax_release_forward(flat, x, depth):
    """The JAX release's forward pass in numpy float64: logits and the output of every block."""
    w = {key: value.astype(np.float64) for key, value in flat.items()}

    def norm(x, key):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{key}/scale"] + w[f"{key}/bias"]

    patch = w["embedding/kernel"].shape[0]
    grid = x.shape[1] // patch
    patches = x.astype(np.float64).reshape(len(x), grid, patch, grid, patch, 3)
    x = np.einsum("bhiwjc,ijcd->bhwd", patches, w["embedding/kernel"]) + w["embedding/bias"]
    x = np.concatenate([np.repeat(w["cls"], len(x), 0), x.reshape(len(x), grid * grid, -1)], 1)
    x, out = x + w["Transformer/posembed_input/pos_embedding"], {}
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        y, attention = norm(x, f"{block}/LayerNorm_0"), f"{block}/MultiHeadDotProductAttention_1"
        q, k, v = (
            np.einsum("btd,dhe->bhte", y, w[f"{attention}/{name}/kernel"]) + w[f"{attention}/{name}/bias"][:, None]
            for name in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        x = x + np.einsum("bhte,hed->btd", mixed, w[f"{attention}/out/kernel"]) + w[f"{attention}/out/bias"]
        mlp = f"{block}/MlpBlock_3"
        y = norm(x, f"{block}/LayerNorm_2") @ w[f"{mlp}/Dense_0/kernel"] + w[f"{mlp}/Dense_0/bias"]
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = out[f"block{i}"] = x + y @ w[f"{mlp}/Dense_1/kernel"] + w[f"{mlp}/Dense_1/bias"]
    return norm(x, "Transformer/encoder_norm")[:, 0] @ w["head/kernel"] + w["head/bias"], out


@pytest.mark.thin(1)
@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_jax_release_gives_the_logits_and_blocks_of_its_equations(prefix, small_vit, tmp_path):
    flat = jax_release(np.random.default_rng(0), 24, 2, 3, 16, 10, CLASSES)
    np.savez(tmp_path / "w.npz", **{prefix + key: value for key, value in flat.items()})
    loaded = load.load(small_vit, tmp_path / "w.npz")
    assert (loaded.layout, loaded.card.model, loaded.card.mean) == ("jax", "small_vit.jax", (0.5, 0.5, 0.5))
    logits, out = jax.jit(loaded.model.apply)(loaded.variables, images(48))
    expected, blocks = jax_release_forward(flat, images(48), 2)
    close(logits, expected, 1e-5)
    for key, value in blocks.items():
        close(out[key], value, 1e-5)


def test_jax_release_is_read_as_timm_reads_it(small_vit, reference, tmp_path):
    model = small_timm_vit(pytest.importorskip("timm"))
    np.savez(tmp_path / "w.npz", **jax_release(np.random.default_rng(0), 24, 2, 3, 16, 10, CLASSES))
    model.load_pretrained(str(tmp_path / "w.npz"))
    reference.save(model, tmp_path / "w.pth")
    ours, theirs = (load.load(small_vit, tmp_path / name).variables for name in ("w.npz", "w.pth"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("old, new", [(14, 24), (14, 7), (24, 14), (7, 9)])
def test_position_embeddings_are_resampled_as_timm_does(old, new, reference):
    pos_embed = pytest.importorskip("timm.layers.pos_embed")
    values = np.random.default_rng(0).standard_normal((1, 1 + old * old, 16)).astype(np.float32)
    expected = pos_embed.resample_abs_pos_embed(reference.torch.from_numpy(values), [new, new]).numpy()
    close(positions.resample(values, (old, old), (new, new)), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(name, marks=BIG) for name in ("resnext50_32x4d", "vit_tiny_patch16_224"))]
)
def test_timm_loads_an_export_strictly_with_the_same_logits(name, reference, tmp_path):
    timm = pytest.importorskip("timm")
    load_file = pytest.importorskip("safetensors.torch").load_file
    source = reference.randomize(timm.create_model(name, num_classes=CLASSES), seed=1)
    model, variables, card, *_ = load.load(name, reference.save(source, tmp_path / "w.pth"))
    variables = jax.tree.map(lambda leaf: leaf * 1.01, variables)  # as if fine-tuned
    load.export(variables, name, tmp_path / "out.safetensors", card=card)
    theirs = timm.create_model(name, num_classes=CLASSES)
    theirs.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
    x = images(64 if name.startswith("res") else 224)
    close(jax.jit(model.apply)(variables, x)[0], reference.record(theirs.eval(), {}, x)[0])


def test_genuine_deit_tiny_reproduces_its_golden_inputs(shared):
    folder = shared / "weights" / "deit_tiny_patch16_224"
    model, variables, card, *_ = load.load("deit_tiny_patch16_224", folder / "deit_tiny_patch16_224.safetensors")
    x = np.concatenate([np.load(folder / "golden_inputs" / f"{i}.npy") for i in range(3)]).transpose(0, 2, 3, 1)
    logits = np.asarray(jax.jit(model.apply)(variables, x)[0])
    assert logits.argmax(-1).tolist() == [285, 207, 949]
    np.testing.assert_allclose(logits.max(-1), [8.570710, 10.047065, 8.893135], atol=1e-3, rtol=0)
    assert (card.mean, card.interpolation) == ((0.485, 0.456, 0.406), "bicubic")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_genuine_deit_tiny_classifies_the_photos_as_in_torch(shared):
    image = pytest.importorskip("PIL.Image")
    folder = shared / "weights" / "deit_tiny_patch16_224"
    model, variables, card, *_ = load.load("deit_tiny_patch16_224", folder / "deit_tiny_patch16_224.safetensors")
    files = sorted((shared / "data" / "imagenet_sample_250").rglob("*.JPEG"))
    labels = np.array([int(re.match(r"\d+", path.name)[0]) for path in files])

    def prepare(path):
        photo = image.open(path).convert("RGB")
        short, size = int(card.input_size / card.crop), card.input_size
        scale = short / min(photo.size)
        width, height = (short if side == min(photo.size) else int(side * scale) for side in photo.size)
        photo = photo.resize((width, height), image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        pixels = np.asarray(photo.crop((left, top, left + size, top + size)), np.float32) / 255
        return (pixels - np.float32(card.mean)) / np.float32(card.std)

    assert len(files) == 250 and int(card.input_size / card.crop) == 248
    predict = jax.jit(lambda x: jax.lax.top_k(model.apply(variables, x)[0], 5)[1])
    batches = (np.stack([prepare(path) for path in files[i : i + 50]]) for i in range(0, 250, 50))
    best = np.concatenate([predict(batch) for batch in batches])
    assert abs((best[:, 0] == labels).sum() - 200) <= 1
    assert abs((best == labels[:, None]).any(1).sum() - 236) <= 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_genuine_cifar_resnet_from_its_original_pickle_scores_81_percent(shared):
    image = pytest.importorskip("PIL.Image")
    folder = shared / "weights" / "cifar10_resnet"
    model, variables, card, *_ = load.load("resnet20_cifar", folder / "resnet20-12fca82f.th")
    assert card.sha256.startswith("12fca82f")
    twin = load.load("resnet20_cifar", folder / "resnet20-12fca82f.safetensors").variables
    jax.tree.map(np.testing.assert_array_equal, variables, twin)
    data = np.load(shared / "data" / "cifar10_jpeg" / "test.npz")
    blob, offsets, labels = data["bytes"].tobytes(), data["offsets"], data["labels"]
    predict = jax.jit(lambda x: model.apply(variables, x)[0].argmax(-1))
    right = 0
    assert len(labels) == 10000
    for start in range(0, 10000, 1000):
        jpegs = [blob[offsets[i] : offsets[i + 1]] for i in range(start, start + 1000)]
        pixels = np.stack([np.asarray(image.open(io.BytesIO(jpeg))) for jpeg in jpegs])
        x = (pixels.astype(np.float32) / 255 - np.float32(card.mean)) / np.float32(card.std)
        right += int((predict(x) == labels[start : start + 1000]).sum())
    assert 0.80 <= right / 10000 <= 0.82
