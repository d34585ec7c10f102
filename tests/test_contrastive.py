"""Contrastive learning of two inputs: torch's losses and gradients, and the ranks that sorting by hand gives."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_inputs

import tl_jax
from tl_jax import config as options
from tl_jax import models
from tl_jax.data import sources
from tl_jax.data.text import tokenizer
from tl_jax.methods import contrastive
from tl_jax.methods.term import Context
from tl_jax.runtime import sharding
from tl_jax.tasks import intervals, retrieval
from tl_jax.training import build
from tl_jax.training.train import train
from tl_jax.weights import load
from tl_jax.weights.text_inputs import Text

torch = pytest.importorskip("torch_reference").torch


def pairs(count=6, ours=5, theirs=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, ours)).astype(np.float32), rng.normal(size=(count, theirs)).astype(np.float32)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_and_its_gradients_are_those_of_torch(loss):
    a, b = pairs()
    rng = np.random.default_rng(1)
    params = {"scale": np.float32(1.3), "bias": np.float32(-0.7), "model": {"kernel": rng.normal(size=(5, 3))}}
    params |= {"other": {"kernel": rng.normal(size=(4, 3))}}
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)

    def ours(params, a, b):
        u, v = contrastive.embeddings(params, a, b)
        s = jnp.exp(params["scale"]) * u @ v.T
        return contrastive.softmax_loss(s) if loss == "softmax" else contrastive.sigmoid_loss(s + params["bias"])

    value, grads = jax.value_and_grad(ours, argnums=(0, 1, 2))(jax.tree.map(jnp.asarray, params), a, b)
    leaves = [torch.tensor(x, requires_grad=True) for x in jax.tree.leaves((params, a, b))]
    bias, model, other, scale, x, y = leaves
    u, v = (torch.nn.functional.normalize(f @ w, dim=1) for f, w in ((x, model), (y, other)))
    s, own = scale.exp() * u @ v.T, torch.arange(len(a))
    if loss == "softmax":
        entropy = torch.nn.functional.cross_entropy
        theirs = (entropy(s, own) + entropy(s.T, own)) / 2
    else:
        z = 2 * torch.eye(len(a)) - 1
        theirs = -torch.nn.functional.logsigmoid(z * (s + bias)).sum() / len(a)
    theirs.backward()
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
    for grad, leaf in zip(jax.tree.leaves(grads), leaves, strict=True):
        expected = np.zeros_like(grad) if leaf.grad is None else leaf.grad.numpy()
        np.testing.assert_allclose(grad, expected, atol=1e-5)


def looped(loss, u, v, scale, bias, captions, photos):
    """The loss by loops over pairs in torch's float64; a pair with the photo or the caption of another is skipped."""
    (u, v), total = (x / x.norm(dim=1, keepdim=True) for x in (u, v)), 0.0
    for i in range(len(u)):
        told = [j for j in range(len(u)) if j == i or (captions[j] != captions[i] and photos[j] != photos[i])]
        if loss == "softmax":
            row, column = (torch.stack([scale * x[i] @ y[j] for j in told]) for x, y in ((u, v), (v, u)))
            total += (row.logsumexp(0) + column.logsumexp(0)) / 2 - scale * u[i] @ v[i]
        else:
            for j in told:
                s = scale * u[i] @ v[j] + bias
                total += torch.log1p(torch.exp(-s if i == j else s))
    return total / len(u)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_pairs_that_share_an_input_are_no_strangers_on_any_number_of_devices(loss):
    photos = np.array([0, 1, 2, 3, 3, 3, 4, 5])  # one photo has three captions
    captions = np.array([7, 0, 1, 2, 3, 0, 4, 4])  # two captions are of two photos each, one of which is that one
    a, b = pairs(8, 4, 4)
    index = np.array([3, 0, 7, 1, 6, 2, 5, 4])  # the batch, of the rows of the data
    term = contrastive.contrastive(loss=loss, bias=-1.5)
    params = {"scale": np.float32(1.1)} | ({"bias": np.float32(-1.5)} if loss == "sigmoid" else {})

    def ours(a, b, index):
        batch, none = {"train": {"index": index}}, [None] * 15
        context = Context(*none)._replace(
            batch=batch, outputs={"train": {"pre_logits": a}}, params={"contrastive": params},
            memory=jnp.stack([photos, captions], 1), forward=lambda *_: ({"pre_logits": b}, {}),
        )  # fmt: skip
        return term.loss(context).loss

    x, y = (torch.tensor(each[index], dtype=torch.float64, requires_grad=True) for each in (a, b))
    theirs = looped(loss, x, y, np.exp(np.float64(1.1)), -1.5, captions[index], photos[index])
    theirs.backward()
    apart = looped(loss, x, y, np.exp(np.float64(1.1)), -1.5, range(8), range(8))
    assert abs(theirs.item() - apart.item()) > 0.05
    for count in (1, len(jax.devices())):
        parallel = sharding.make_parallel("jit", jax.devices()[:count])
        given = parallel.put_batch((a[index], b[index], index))
        value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(*given)
        np.testing.assert_allclose(value, theirs.item(), rtol=1e-6)
        for grad, leaf in zip(grads, (x, y), strict=True):
            np.testing.assert_allclose(grad, leaf.grad.numpy(), atol=1e-6)


def by_sorting(queries, found, hits):
    """Ranks by sorting the products of each query in float64, equal ones with what is no hit first."""
    places = []
    for q, own in zip(queries.astype(np.float64), hits, strict=True):
        rows = sorted((-float(q @ x), j in own) for j, x in enumerate(found.astype(np.float64)))
        places.append(1 + [hit for _, hit in rows].index(True))
    return places


def test_ranks_are_those_of_sorting_and_all_captions_of_an_image_are_hits():
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(n, 4)).astype(np.float32) for n in (9, 14))
    pairs = sorted({(int(i), int(j)) for i, j in rng.integers(0, (9, 14), (18, 2))} | {(i, i) for i in range(9)})
    pairs += [(3, j) for j in range(14) if j not in {j for _, j in pairs}]  # each text has an image
    i, j = (np.array(x) for x in zip(*rng.permutation(pairs), strict=True))
    found = retrieval.both(images[i], texts[j], np.char.add("a", i.astype(str)), np.char.mod("%03d", j))
    of_image, of_text = ([set(b[a == k].tolist()) for k in range(n)] for a, b, n in ((i, j, 9), (j, i, 14)))
    assert found["model_to_other"][0].tolist() == by_sorting(images, texts, of_image)
    assert found["other_to_model"][0].tolist() == by_sorting(texts, images, of_text)
    same = retrieval.both(np.ones((7, 2)), np.ones((7, 2)), np.arange(7), np.arange(7))
    assert set(same["model_to_other"][0]) == {7}  # equal vectors are no success


def test_recalls_and_the_median_rank_have_the_intervals_of_resampled_queries():
    rng = np.random.default_rng(0)
    places, groups = rng.integers(1, 15, 41), np.arange(41) // 3
    found = retrieval.summarize(places, groups, resamples=300, seed=4)
    assert found["recall@5"]["value"] == np.mean(places <= 5) and found["queries"] == 41
    assert found["median_rank"]["value"] == np.median(places)
    medians = [
        np.median(np.repeat(places, w.astype(int))) for chunk in intervals.resample(41, 300, 4, groups) for w in chunk.T
    ]
    low, high = np.quantile(medians, [0.025, 0.975])
    np.testing.assert_allclose((found["median_rank"]["low"], found["median_rank"]["high"]), (low, high), rtol=1e-12)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Digits with one sentence each, and a network of text with its tokenizer."""
    table = {}
    several_inputs.add_small(table)
    monkeypatch.setitem(models.MODELS, "small_vit", table["small_vit"])
    path = several_inputs.write(tmp_path, 60, classes=10)
    words = tokenizer.train("words", [f"a photo of the digit {' '.join(several_inputs.WORDS)}"])
    made = load.load("word_average_16_8d", "", 0, text=Text(words))
    load.export(made.variables, "word_average_16_8d", tmp_path / "text.safetensors", card=made.card)
    words.save(tmp_path)
    return tmp_path, path


def config_of(files, **changes):
    folder, path = files
    text = {"name": "word_average_16_8d", "weights": f"{folder}/text.safetensors", "group": "text"}
    return options.override(options.make(), {
        "data.source": f"several:{path}", "data.image": "photo", "data.text": ("title",), "data.labels": ("label",),
        "model.name": "small_vit", "networks": {"text": text},
        "terms": {"task": {"weight": 0.0}, "contrastive": {}}, "method.name": "full", "lr": 1e-2, "batch_size": 8,
        "total": (40.0, "steps"), "eval_every": (40.0, "steps"), "log_every": (1.0, "steps"), "resamples": 20,
    } | changes)  # fmt: skip


@pytest.mark.slow
def test_both_networks_are_drawn_together_and_retrieval_is_told(files):
    folder = files[0] / "w"
    result = train(config_of(files), folder, verbose=False)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    paths = {row["path"]: row for row in json.loads((folder / "audit.json").read_text())["phases"][0]["parameters"]}
    assert paths["text/backbone/stem/tok_embed/embedding"]["group"] == "text"
    assert paths["contrastive/scale"]["group"] == "contrastive"
    with np.load(folder / "embeddings-val.npz") as saved:
        a, b, names, words = (saved[name] for name in ("image", "text", "image_identity", "text_identity"))
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1, atol=1e-5)
    rows = {text: np.flatnonzero(words == text) for text in np.unique(words)}  # a text belongs to several images
    one = b[[rows[text][0] for text in rows]]
    numbers = [list(rows).index(text) for text in words]
    for name, queries, found, hits in (
        ("image_to_text", a, one, [{number} for number in numbers]),
        ("text_to_image", one, a, [set(rows[text].tolist()) for text in rows]),
    ):
        places, told = np.array(by_sorting(queries, found, hits)), result["retrieval"]["val"][name]
        assert told["recall@5"]["value"] == np.mean(places <= 5) and told["queries"] == len(places)
        assert told["median_rank"]["value"] == np.median(places)
    assert len(set(names)) == len(names) == len(a)
    source = sources.load(f"several:{files[1]}", image="photo", text=("title",), labels=("label",))
    assert len(tl_jax.load_run(folder).predict(source)) == 60  # by the image alone


@pytest.mark.slow
def test_features_of_a_frozen_network_are_cached_and_give_the_same_losses(files, tmp_path):
    frozen = {"name": "word_average_16_8d", "weights": f"{files[0]}/text.safetensors"}
    losses = []
    for cache in ("", "features"):
        changes = {
            "networks": {"text": {**frozen, "cache": cache}},
            "total": (4.0, "steps"),
            "eval_every": (4.0, "steps"),
        }
        folder = tmp_path / f"w{cache}"
        train(config_of(files, **changes, **({"cache_dir": str(tmp_path)} if cache else {})), folder, verbose=False)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_one_photo_or_one_text_in_several_rows_has_one_number(files):
    rows = files[1].read_text().splitlines()
    again = [rows[1 + i].replace(rows[1 + i].split(",")[0], rows[1].split(",")[0], 1) for i in (4, 9)]
    again[0] = again[0].replace("a photo", "A Photo")  # one text to a tokenizer of lower case
    files[1].write_text("\n".join([*rows, *again]) + "\n")
    run = build.build(config_of(files), sharding.make_parallel("jit", jax.devices()[:1]))
    train, numbers = run.material.data["train"], np.asarray(run.material.memory["contrastive"])
    photos, texts = train.of_kind("image").inputs.paths, [row[0].lower() for row in train.of_kind("text").inputs.rows]
    for column, names in zip(numbers.T, (photos, texts), strict=True):
        same = np.array(names)[:, None] == np.array(names)
        np.testing.assert_array_equal(column[:, None] == column, same)
        assert same.sum() > len(names)


def test_what_contrastive_learning_cannot_do_without_is_refused(files):
    parallel = sharding.make_parallel("jit", jax.devices()[:1])
    for changes, match in (
        ({"accumulate": 2}, "contrastive needs the whole batch at once"),
        ({"networks": {}}, "add networks.text"),
        ({"cache": "features"}, "runs 'text' on the inputs, which cache replaces"),
    ):
        with pytest.raises(ValueError, match=match):
            build.build(config_of(files, **changes), parallel)
    lines = files[1].read_text().splitlines()
    lines[3] = lines[3].replace("2.png", "")
    files[1].write_text("\n".join(lines))
    with pytest.raises(ValueError, match="reads text and image, and examples lack it"):
        build.build(config_of(files), parallel)
