"""A fusion gives what its parts give, joined as written down by hand; a missing input is a learned vector."""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_inputs
import walks
from several_inputs import OPTIONS, PARTS, write

import tl_jax
from tl_jax import config as options
from tl_jax import models
from tl_jax.api import explain
from tl_jax.core import trees
from tl_jax.data.text import tokenizer
from tl_jax.methods import rules
from tl_jax.models import peft
from tl_jax.training.train import train
from tl_jax.weights import load, parts
from tl_jax.weights.text_inputs import Text

ROOT = pathlib.Path(__file__).resolve().parents[1]
LATE = {"width": 6}
EARLY = {"kind": "early", "width": 8, "depth": 2, "heads": 2}
EMPTY = {(1, "photo"), (2, "title"), (3, "ink"), (3, "width")}
BOTH = pytest.mark.parametrize("fusion", [LATE, EARLY], ids=["late", "early"])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """small_vit in the table of models."""
    table = {}
    several_inputs.add_small(table)
    for name, variant in table.items():
        monkeypatch.setitem(models.MODELS, name, variant)


@functools.cache
def words():
    return tokenizer.train("words", ["a photo of the digit zero one two three"])


@functools.cache
def loaded(kind="late", **fields):
    fields = fields | ({"drop": dict(fields["drop"])} if "drop" in fields else {})
    fusion = {**(LATE if kind == "late" else EARLY), **fields}
    return parts.load(PARTS, fusion, 3, columns=("a", "b"), text=Text(words()), head_init="lecun")


def inputs(count=4, seed=0, length=8):
    """Normalised inputs of a batch, of which each input is missing in one example and the first has all."""
    rng, made = np.random.default_rng(seed), loaded()
    text = np.full((count, length, 2), 0, np.int32)
    text[..., 0] = rng.integers(1, words().size, (count, length))
    for i, size in enumerate(rng.integers(2, 7, count)):
        text[i, size:, 0] = -1
    x = {"image": rng.normal(size=(count, *made.card.cards["image"].shape)), "table": rng.normal(size=(count, 2))}
    x = {name: jnp.asarray(each, jnp.float32) for name, each in x.items()} | {"text": jnp.asarray(text)}
    there = {f"{kind}:present": np.arange(count) != i for i, kind in enumerate(PARTS, 1)}
    return x | {name: jnp.asarray(each) for name, each in there.items()}


def features_of(kind, made, x):
    """The pre_logits of a part, by the network itself with the parameters that the part has."""
    card = made.card.cards[kind]
    fields = {"vocab_size": card.vocab, "pooling": card.pooling} if kind == "text" else {}
    network = models.get(PARTS[kind]["name"]).module(num_classes=0, **fields)
    flat = {path: leaf for path, leaf in trees.flatten(made.variables).items() if f"/backbone/{kind}/" in path}
    mine = trees.unflatten({path.replace(f"/backbone/{kind}/", "/backbone/"): leaf for path, leaf in flat.items()})
    return np.asarray(jax.jit(network.apply)(mine, x[kind])[1]["pre_logits"], np.float64)


def project(leaves, x):
    mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    y = (x - mean) / np.sqrt(var + 1e-6) * leaves["norm"]["scale"] + leaves["norm"]["bias"]
    return y @ leaves["proj"]["kernel"] + leaves["proj"]["bias"]


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("merge", ["concat", "sum"])
def test_late_fusion_is_the_projected_features_of_the_parts_joined_under_the_head(merge):
    made, x = loaded(merge=merge), inputs()
    logits, out = jax.jit(lambda v, x: made.model.apply(v, x))(made.variables, x)
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), made.variables["params"])
    fuse, joined = tree["backbone"]["fuse"], []
    for kind in PARTS:
        features = features_of(kind, made, x)
        np.testing.assert_allclose(out[kind], features, atol=1e-5)
        y = project(fuse[kind], features)
        joined.append(np.where(np.asarray(x[f"{kind}:present"])[:, None], y, fuse[f"{kind}_missing"]))
    whole = sum(joined) if merge == "sum" else np.concatenate(joined, axis=1)
    np.testing.assert_allclose(out["pre_logits"], whole, atol=1e-5)
    np.testing.assert_allclose(logits, whole @ tree["head"]["kernel"] + tree["head"]["bias"], atol=1e-5)


def attention(block, x, read, heads):
    """One block of Early in float64: LayerNorm, attention over the tokens that are read, LayerNorm, MLP."""

    def norm(leaves, x):
        mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * leaves["scale"] + leaves["bias"]

    q, k, v = np.split(norm(block["norm1"], x) @ block["attn"]["qkv"]["kernel"] + block["attn"]["qkv"]["bias"], 3, -1)
    size, found = q.shape[-1] // heads, []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        scores = np.where(read, q[:, own] @ k[:, own].T / np.sqrt(size), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        found.append(weights / weights.sum(axis=-1, keepdims=True) @ v[:, own])
    x = x + np.concatenate(found, -1) @ block["attn"]["proj"]["kernel"] + block["attn"]["proj"]["bias"]
    y = norm(block["norm2"], x) @ block["mlp"]["fc1"]["kernel"] + block["mlp"]["fc1"]["bias"]
    erf = np.vectorize(math.erf)
    y = y * 0.5 * (1 + erf(y / np.sqrt(2)))
    return x + y @ block["mlp"]["fc2"]["kernel"] + block["mlp"]["fc2"]["bias"], norm


@pytest.mark.slow
@pytest.mark.exhaustive
def test_early_fusion_is_blocks_over_the_tokens_that_are_there():
    made, x = loaded("early"), inputs()
    out = jax.jit(lambda v, x: made.model.apply(v, x))(made.variables, x)[1]
    fuse = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), made.variables["params"]["backbone"]["fuse"])
    for i in range(4):
        tokens = [fuse["cls_token"][None]]
        for kind in PARTS:
            found = np.asarray(out[kind][i], np.float64)
            if kind == "text":  # only where there is a token
                found = found[found[:, -1] > 0, :-1]
            found = found.reshape(-1, found.shape[-1])
            there = bool(x[f"{kind}:present"][i])
            own = project(fuse[kind], found) + fuse[f"{kind}_embed"]
            tokens.append(own if there else fuse[f"{kind}_missing"][None])
        y = np.concatenate(tokens)
        for j in range(EARLY["depth"]):
            y, norm = attention(fuse[f"block{j}"], y, np.ones(len(y), bool), EARLY["heads"])
        np.testing.assert_allclose(out["pre_logits"][i], norm(fuse["norm"], y[:1])[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.thin(1)
@BOTH
def test_what_a_missing_input_holds_and_padding_change_nothing(fusion):
    made, x = loaded(fusion.get("kind", "late")), inputs()
    apply = jax.jit(lambda x: made.model.apply(made.variables, x)[0])
    logits, other = apply(x), inputs(seed=1)
    for kind in PARTS:  # of the examples that lack it, everything else of it
        gone = ~x[f"{kind}:present"]
        y = x | {kind: jnp.where(gone.reshape(-1, *[1] * (x[kind].ndim - 1)), other[kind], x[kind])}
        assert not np.array_equal(y[kind], x[kind])
        np.testing.assert_array_equal(apply(y), logits)
        there = apply(y | {f"{kind}:present": jnp.ones(4, bool)})
        assert np.abs(there - logits)[gone].max() > 1e-4  # so the input counts where it is there
    padded = jnp.concatenate([x["text"], jnp.full((4, 8, 2), -1).at[..., 1].set(0)], axis=1)
    np.testing.assert_allclose(apply(x | {"text": padded}), logits, atol=1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
@BOTH
def test_a_network_that_starts_at_a_cut_gives_the_same(fusion):
    made, x = loaded(fusion.get("kind", "late")), inputs()
    logits = made.model.apply(made.variables, x)[0]
    for cut in ("image/stem", "image", "text/block0" if fusion is LATE else "text/stem", "text", "table", "pre_logits"):
        found, out = made.model.apply(made.variables, x, stop=cut)
        np.testing.assert_allclose(made.model.apply(made.variables, found, start=cut)[0], logits, atol=1e-6)
        assert set(out) == set(made.model.cuts[: made.model.cuts.index(cut) + 1])


@pytest.mark.slow
def test_modality_dropout_leaves_out_one_input_at_its_rate_and_never_all():
    made, x = loaded(), inputs()
    dropping = made.model.clone(drop=(("image", 0.5), ("table", 0.9), ("text", 0.9)))
    model = dropping.bind(made.variables, rngs={"dropout": jax.random.key(0)})
    there = {kind: jnp.ones(4000, bool) for kind in PARTS}
    kept = {kind: np.asarray(x) for kind, x in model.left_out(there).items()}
    assert np.any(list(kept.values()), axis=0).all()
    whole = 0.5 * 0.9 * 0.9  # all would be left out
    for kind, rate in dict(dropping.drop).items():
        np.testing.assert_allclose(1 - kept[kind].mean(), rate - whole, atol=0.03)
    apply = jax.jit(dropping.apply, static_argnames="train")
    evaluated, plain = apply(made.variables, x, train=False)[0], jax.jit(made.model.apply)(made.variables, x)[0]
    np.testing.assert_array_equal(evaluated, plain)
    trained = apply(made.variables, x, train=True, rngs={"dropout": jax.random.key(1)})[0]
    assert np.abs(trained - plain).max() > 1e-4


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", ["early", "late"])
def test_the_file_of_a_fusion_gives_the_same_network_and_card(kind, tmp_path):
    made = loaded(kind, **({"drop": (("image", 0.5), ("table", 0.9), ("text", 0.9))} if kind == "late" else {}))
    words().save(tmp_path)
    load.export(made.variables, "fusion", tmp_path / "w.safetensors", card=made.card)
    back = load.load("", tmp_path / "w.safetensors")
    assert back.card == made.card and back.model.clone(head_init="lecun") == made.model
    ours, theirs = (trees.flatten(each.variables) for each in (made, back))
    assert ours.keys() == theirs.keys()
    for leaf, value in ours.items():
        np.testing.assert_array_equal(theirs[leaf], value)


@pytest.mark.slow
def test_layer_decay_counts_the_layers_of_each_part_as_of_the_network_alone():
    made = loaded()
    paths = list(trees.flatten(made.variables["params"]))
    found = rules.layer_multipliers(paths, made.model.cuts, 0.5, made.model.networks)
    for kind, own in made.model.networks.items():
        inner = {p: p.replace(f"backbone/{kind}/", "backbone/") for p in paths if p.startswith(f"backbone/{kind}/")}
        alone = rules.layer_multipliers(inner.values(), own, 0.5)
        assert {p: found[p] for p in inner} == {p: alone[q] for p, q in inner.items()}
        assert min(found[p] for p in inner) < 1
    assert {found[p] for p in paths if p.startswith(("head/", "backbone/fuse/"))} == {1.0}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_lora_is_added_to_the_parts_by_their_paths_and_folds_in():
    made, x = loaded(), inputs()
    paths = [path for path in trees.flatten(made.variables["params"]) if path.startswith("backbone/image/")]
    conv = next(path for path in paths if path.endswith("patch_embed/kernel"))
    add = (("lora", {"rank": 2, "targets": f"backbone/text/block0/attn/qkv/kernel|{conv}"}),)
    added = peft.init(made.model, made.variables, add, jax.random.key(0))
    added = jax.tree.map(lambda leaf: leaf + 0.1, added)
    variables = {**made.variables, "params": {**made.variables["params"], **added}}
    model = peft.Adapted(made.model, add)
    logits = model.apply(variables, x)[0]
    assert np.abs(logits - made.model.apply(made.variables, x)[0]).max() > 1e-3
    merged = peft.merge(variables, add)
    np.testing.assert_allclose(made.model.apply(merged, x)[0], logits, atol=1e-5)


def test_parts_that_do_not_fit_are_refused():
    for fusion, chosen, match in (
        ({**EARLY, "width": 7}, PARTS, "width = 7 is no multiple of heads = 2"),
        ({"order": ("text", "image")}, PARTS, "order names text, image, and the parts are"),
        ({"drop": {"sound": 0.1}}, PARTS, "drop names 'sound'"),
        (LATE, {**PARTS, "image": PARTS["text"]}, "the part 'image' is bert_l1_h16_a2, which reads an input 'text'"),
        ({"depth": 2}, PARTS, "depth belongs to kind = 'early'"),
    ):
        with pytest.raises(ValueError, match=match):
            parts.load(chosen, fusion, 3, columns=("a", "b"), text=Text(words()))
    for changes, match in (
        ({"model.name": "fusion"}, "model.parts is empty"),
        ({"model.parts": PARTS}, "belong to model.name = 'fusion'"),
        ({"model.name": "fusion", "model.parts": {**PARTS, "sound": {"name": "x"}}}, "model.parts has"),
        ({"model.name": "fusion", "model.parts": PARTS, "method.name": "knn"}, "a fusion begins with random layers"),
        ({"model.name": "fusion", "model.parts": PARTS, "replicas": ((("lr", 0.1),),)}, "a fusion does without"),
        ({"model.name": "fusion", "model.parts": PARTS, "model.fusion": {"kind": "middle"}}, "model.fusion"),
    ):
        with pytest.raises(ValueError, match=match):
            options.check(options.override(options.make(), changes))


# Runs.


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fusion"), 40, EMPTY)


CHEAP = {**PARTS, "text": {"name": "word_average_8_4d"}}


def config_of(path, **changes):
    base = {
        "data.source": f"several:{path}", **OPTIONS, "model.name": "fusion", "model.parts": CHEAP, "model.fusion": LATE,
        "model.tokenizer": "words", "model.head_init": "lecun", "method.name": "full", "batch_size": 8, "lr": 1e-2,
        "optimizer": "sgd", "total": (4.0, "steps"), "log_every": (1.0, "steps"), "eval_every": (2.0, "steps"),
        "resamples": 5,
    }  # fmt: skip
    return options.override(options.make(), base | changes)


@pytest.mark.slow
def test_frozen_parts_give_the_same_losses_with_and_without_the_cache_and_the_run_is_used(path, tmp_path):
    first = ("text", "table", "image")  # those that are frozen
    frozen = (("backbone/(text|table)/.*", "frozen"), (".*", "new"))
    change = {"method.name": "rules", "method.rules": frozen, "model.fusion": {**LATE, "order": first}}
    rows = {}
    for cache in ("", "features"):
        config = config_of(path, **change, cache=cache, cache_dir=str(tmp_path / "cache") if cache else "")
        train(config, tmp_path / f"w{cache}", verbose=False)
        rows[cache] = [json.loads(line) for line in (tmp_path / f"w{cache}" / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(*rows.values(), strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)
    kept = [json.loads(p.read_text())["key"]["cut"] for p in (tmp_path / "cache").glob("*/meta.json")]
    assert sorted(kept) == ["table", "table", "text", "text"]  # of train and val
    run = tl_jax.load_run(tmp_path / "w")
    answers = run.predict(path)
    saved = np.load(tmp_path / "w" / "predictions.npz")
    by_id = {row["file"]: row["probability"] for row in answers}
    for name, logits in zip(saved["ids"].tolist(), saved["logits"], strict=True):
        odds = np.exp(logits - logits.max())
        np.testing.assert_allclose(by_id[name], (odds / odds.sum()).max(), atol=1e-5)
    assert run.evaluate(path)["accuracy"]["value"] >= 0
    with pytest.raises(ValueError, match="several inputs, and exported programs read one"):
        tl_jax.export(run, tmp_path / "exported")
    with pytest.raises(ValueError, match="reads an input 'several'; maps are of images"):
        explain.explain(run, [])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_that_stopped_in_the_middle_ends_bit_equal(path, tmp_path):
    config = config_of(path, **{"model.fusion": {**EARLY, "drop": {"image": 0.3}}})
    train(config, tmp_path / "whole", verbose=False)
    with pytest.raises(walks.Crash):
        train(config, tmp_path / "stopped", verbose=False, stop_requested=walks.crash_at(1))
    train(config, tmp_path / "stopped", verbose=False)
    assert walks.remains(tmp_path / "stopped") == walks.remains(tmp_path / "whole")


def eight_devices():
    """Run in a process of its own, as the number of simulated devices is fixed when jax starts."""
    jax.config.update("jax_disable_most_optimizations", True)
    assert jax.device_count() == 8
    several_inputs.add_small()
    with tempfile.TemporaryDirectory() as folder:
        path = write(pathlib.Path(folder), 40, EMPTY)
        for fusion in (LATE, EARLY):
            config = config_of(path, **{"model.fusion": fusion, "total": (3.0, "steps")})
            one, many = (walks.take_walk(config, count, None) for count in (1, 8))
            for ours, theirs in zip(one.sums, many.sums, strict=True):
                assert theirs == pytest.approx(ours, rel=3e-5, abs=1e-5)
            for name, leaf in trees.flatten(one.after.params).items():
                theirs = trees.flatten(many.after.params)[name]
                np.testing.assert_allclose(theirs, leaf, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_eight_devices_train_as_one_does():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    code = "import sys; sys.path[:0] = ['tests', '.']; import test_fusion; test_fusion.eight_devices()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
