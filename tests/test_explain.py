"""Grad-CAM and attention rollout against plain float64 computations, galleries, and the command that draws them."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

import tl_jax
from tl_jax import __main__ as command
from tl_jax import tasks
from tl_jax.api import explain as explanation
from tl_jax.core import trees
from tl_jax.models import convnext, explain, peft, resnet, swin, vit
from tl_jax.tasks import mistakes

RNG = np.random.default_rng(0)
SMALL = functools.partial(vit.ViT, num_classes=3, patch_size=8, width=12, depth=2, heads=3, image_size=(16, 24))


def random_variables(model, x):
    flat = trees.flatten(jax.eval_shape(model.init, jax.random.key(0), x))
    sampled = {path: RNG.standard_normal(leaf.shape).astype(np.float32) * 0.2 for path, leaf in flat.items()}
    return trees.unflatten(
        {path: np.abs(x) + 0.5 if path.endswith(("scale", "var")) else x for path, x in sampled.items()}
    )


def images(height, width):
    return jnp.asarray(RNG.standard_normal((2, height, width, 3)), jnp.float32)


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    ("model", "size"),
    [
        (resnet.ResNet(num_classes=3, depths=(1, 1), widths=(8, 16)), (48, 64)),
        (swin.Swin(num_classes=3, depths=(1, 1), width=8, head_size=4, window=2), (32, 32)),
        (convnext.ConvNeXt(num_classes=3, depths=(1, 1), widths=(8, 16)), (32, 48)),
    ],
)
def test_grad_cam_is_that_of_torch_in_float64(model, size):
    """The head of all three is a mean over the map, with LayerNorm before it, behind it or none."""
    torch = pytest.importorskip("torch")
    x = images(*size)
    variables = random_variables(model, x)
    out = jax.jit(model.apply)(variables, x)[1]
    cut = explain.map_cut(model, variables, x)
    maps = torch.tensor(np.asarray(out[cut], np.float64), requires_grad=True)
    params = {
        path: torch.tensor(np.asarray(leaf, np.float64)) for path, leaf in trees.flatten(variables["params"]).items()
    }

    def norm(y):
        own = {name: params[f"backbone/norm/{name}"] for name in ("scale", "bias")}
        eps = 1e-6 if isinstance(model, convnext.ConvNeXt) else 1e-5
        return torch.nn.functional.layer_norm(y, y.shape[-1:], own["scale"], own["bias"], eps)

    pooled = norm(maps).mean((1, 2)) if isinstance(model, swin.Swin) else maps.mean((1, 2))
    pooled = norm(pooled) if isinstance(model, convnext.ConvNeXt) else pooled
    logits = pooled @ params["head/kernel"] + params["head/bias"]
    np.testing.assert_allclose(np.asarray(out["logits"]), logits.detach().numpy(), atol=1e-4)
    logits[:, 1].sum().backward()
    expected = torch.relu((maps.grad.mean((1, 2), keepdim=True) * maps).sum(-1)).detach().numpy()
    found = jax.jit(lambda v, x: explain.grad_cam(model, v, x, lambda out: out["logits"][:, 1]))(variables, x)
    assert found.shape == out[cut].shape[:3] and expected.max() > 0
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-5 * expected.max(), rtol=1e-4)


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def attention_by_hand(y, kernel, bias, heads):
    """[B, heads, N, N], number by number."""
    q, k, _ = np.split(y @ kernel + bias, 3, axis=-1)
    size = q.shape[-1] // heads
    found = np.zeros((len(y), heads, y.shape[1], y.shape[1]))
    for b in range(len(y)):
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            for i in range(y.shape[1]):
                found[b, h, i] = softmax(np.array([q[b, i, own] @ k[b, j, own] for j in range(y.shape[1])]) / size**0.5)
    return found


def layer_norm(y, params, eps):
    centred = y - y.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * params["scale"] + params["bias"]


@pytest.mark.thin(1)
@pytest.mark.parametrize("fields", [{}, {"registers": 2, "class_position": False}, {"pool": "map"}])
def test_attention_rollout_is_that_of_plain_loops(fields):
    model, x = SMALL(**fields), images(16, 24)
    variables = random_variables(model, x)
    out = jax.jit(model.apply)(variables, x)[1]
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["backbone"])
    before = [np.asarray(out[name], np.float64) for name in ("stem", "block0", "block1")]
    rolled = [np.eye(before[0].shape[1]) for _ in x]
    for i in range(2):
        block = own[f"block{i}"]
        qkv = block["attn"]["qkv"]
        weights = attention_by_hand(layer_norm(before[i], block["norm1"], 1e-6), qkv["kernel"], qkv["bias"], 3)
        for b in range(2):
            mean = sum(weights[b, h] for h in range(3)) / 3
            mixed = mean + np.eye(len(mean))
            rolled[b] = (mixed / mixed.sum(axis=1, keepdims=True)) @ rolled[b]
    if fields.get("pool") == "map":
        qkv, latent = own["final"]["attn"]["qkv"], own["final"]["latent"][0]
        tokens = layer_norm(before[2], own["norm"], 1e-6)
        joined = np.concatenate([np.broadcast_to(latent, (2, *latent.shape)), tokens], axis=1)
        rows = attention_by_hand(joined, qkv["kernel"], qkv["bias"], 3)[:, :, 0, 1:]
        rows = (rows / rows.sum(axis=-1, keepdims=True)).mean(axis=1)
        expected = [rows[b] @ rolled[b] for b in range(2)]
    else:
        expected = [rolled[b][0, 1 + fields.get("registers", 0) :] for b in range(2)]
    found = np.asarray(jax.jit(functools.partial(explain.rollout, model))(variables, x))
    assert found.shape == (2, 2, 3)
    np.testing.assert_allclose(found.reshape(2, -1), expected, atol=2e-6)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_attention_of_a_network_with_lora_is_that_of_the_merged_network():
    model, x, key = SMALL(), images(16, 24), jax.random.key(1)
    variables, added = random_variables(model, x), [("lora", {"rank": 2})]
    more = jax.tree.map(lambda leaf: 0.5 * jax.random.normal(key, leaf.shape), peft.init(model, variables, added, key))
    adapted = {**variables, "params": {**variables["params"], **more}}
    found = explain.attention_weights(peft.Adapted(model, added), adapted, x)
    merged = explain.attention_weights(model, peft.merge(adapted, added), x)
    plain = explain.attention_weights(model, variables, x)
    assert list(found) == list(merged) == [f"backbone/block{i}/attn" for i in range(2)]
    for path, weights in found.items():
        np.testing.assert_allclose(weights, merged[path], atol=1e-4)
        assert np.abs(weights - plain[path]).max() > 1e-3


def logit(p):
    return np.log(p) - np.log(1 - np.float64(p))


def made(kind, values, labels, names, **fields):
    output = "values" if kind == "regression" else "logits"
    spec = tasks.Spec(kind, names, **fields)
    return tasks.make_predictions({output: np.array(values)}, np.array(labels), np.arange(len(values)), spec)


def test_the_surest_mistakes_of_every_task():
    classes = made("classification", np.log([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]), [1, 1, 1], ("a", "b"))
    binary = made("binary", logit([0.3, 0.1, 0.9]), [0, 1, 1], ("no", "yes"), threshold=0.2)
    labels = made("multilabel", logit([[0.9, 0.3], [0.4, 0.7], [0.2, 0.1]]), [[0, 1], [0, 1], [1, 0]], ("u", "v"))
    fields = {"target_mean": (0.0, 0.0), "target_std": (1.0, 100.0)}
    numbers = made("regression", [[1.0, 50.0], [3.0, 0.0]], [[0.5, 0.0], [1.0, 100.0]], ("x", "y"), **fields)
    expected = {
        "classification": (classes, [1, 0], ["true b", "said a, p 0.900"]),
        "binary": (binary, [1, 0], ["true yes", "said no, p 0.900"]),
        "multilabel": (labels, [0, 2], ["u: no", "said yes, p 0.900"]),
        "regression": (numbers, [1, 0], ["x true 1", "predicted 3"]),
    }
    for kind, (predictions, order, words) in expected.items():
        found = mistakes.said(predictions)
        assert mistakes.worst(found, 9) == order and mistakes.worst(found, 1) == order[:1], kind
        assert mistakes.in_words(predictions, found, order[0]) == words
        alone = predictions._replace(labels=None)
        assert (
            not mistakes.worst(mistakes.said(alone), 9) and len(mistakes.in_words(alone, mistakes.said(alone), 0)) == 1
        )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Digits in class folders; one file has a name that is not UTF-8."""
    folder, digits = tmp_path_factory.mktemp("photos"), sklearn.datasets.load_digits()
    for i in range(60):
        path = folder / ("train", "val")[i % 2] / f"d{digits.target[i] % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(digits.images[i] * 15)).convert("RGB").resize((20, 16)).save(path)
    image = next((folder / "val" / "d1").iterdir())
    os.rename(image, os.fsencode(image.parent) + b"/\xff\xfe.png")
    return folder


@pytest.mark.figures
@pytest.mark.slow
def test_a_run_leaves_a_gallery_and_explain_draws_its_images_and_others(photos, tmp_path, capsys, monkeypatch):
    model = tl_jax.load("resnet8_cifar", "builtin:glyphs", image_size=16)
    changes = {"data.train": "train", "data.val": "val", "resamples": 10}
    run = tl_jax.fit(model, f"folder:{photos}", epochs=1, workdir=tmp_path / "w", changes=changes)
    names = {path.stem for path in run.folder.glob("*.png")}
    assert names == {path.stem for path in run.folder.glob("svg/*.svg")} and {"mistakes", "feature_map"} <= names
    saved = tasks.load_predictions(run.folder / "predictions.npz")
    wrong = mistakes.worst(mistakes.said(saved), 3)
    text = (run.folder / "svg/mistakes.svg").read_text()
    assert len(wrong) == 3 and all(str(saved.ids[i]) in text for i in wrong if str(saved.ids[i]).isascii())
    capsys.readouterr()
    assert command.main(["explain", str(run.folder), "--count", "3"]) == 0
    assert capsys.readouterr().out == f"wrote {run.folder / 'explain.png'}\n"
    assert command.main(["explain", str(run.folder), str(photos / "val" / "d1"), "--out", str(tmp_path / "m.svg")]) == 0
    text = (tmp_path / "m.svg").read_text()
    assert "Grad-CAM" in text and "\\udcff\\udcfe.png" in text and "said d" in text and "true" not in text
    (tmp_path / "notes.txt").write_text("no image")
    assert command.main(["explain", str(run.folder), str(tmp_path / "notes.txt")]) == 2
    assert "1 of 1 images cannot be read" in capsys.readouterr().err
    monkeypatch.setattr(explanation, "MOST", 2)
    assert command.main(["explain", str(run.folder), str(photos)]) == 2
    assert "found 60 images, expected at most 2" in capsys.readouterr().err


@pytest.mark.figures
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["binary", "multilabel", "regression"])
def test_every_task_of_images_has_a_gallery_and_maps(kind, photos, tmp_path):
    digits = sklearn.datasets.load_digits()
    x, y = np.uint8(digits.images * 15)[:120], digits.target[:120]
    labels = {
        "binary": y % 2, "multilabel": np.stack([y % 2, y > 4], 1).astype(np.int32),
        "regression": digits.images[:120].mean((1, 2)).astype(np.float32),
    }[kind]  # fmt: skip
    model = tl_jax.load("resnet8_cifar", "builtin:glyphs", image_size=16)
    data = {"train": (x[:80], labels[:80]), "test": (x[80:], labels[80:])}
    run = tl_jax.fit(model, data, task=kind, epochs=1, workdir=tmp_path / "w", changes={"resamples": 10})
    assert (run.folder / "mistakes.png").exists() and (run.folder / "svg/mistakes.svg").exists()
    assert command.main(["explain", str(run.folder), "--count", "5"]) == 0


@pytest.mark.slow
def test_a_table_has_no_maps(tmp_path, capsys):
    rows = "\n".join(f"{i % 7},{i % 5},{'ab'[i % 7 > 3]}" for i in range(60))
    (tmp_path / "t.csv").write_text(f"first,second,label\n{rows}\n")
    config = f"configs/transfer.py:model=mlp_small,method=full,data=table:{tmp_path / 't.csv'}"
    assert command.main(["train", config, "--config.total=(3, 'steps')", "--workdir", str(tmp_path / "w")]) == 0
    assert command.main(["explain", str(tmp_path / "w")]) == 2
    assert "reads an input 'table'" in capsys.readouterr().err and not (tmp_path / "w/mistakes.png").exists()
