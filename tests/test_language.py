"""Language modelling: labels of tokens, losses of transformers, runs that resume and that others begin with."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from walks import Crash, assert_same_training, crash_at, remains, variables_of, walk

import tl_jax
from tl_jax import config as options
from tl_jax import models, tasks
from tl_jax.core import trees
from tl_jax.data import sources
from tl_jax.data.pipeline import eval_batches, train_batches
from tl_jax.data.text import language, tokenizer
from tl_jax.data.views import View
from tl_jax.models import bert, gpt2
from tl_jax.tasks import decoding
from tl_jax.training import build
from tl_jax.training.train import train

WORDS = [f"w{i}" for i in range(20)]
NETWORKS = {"masked_lm": "bert_l2_h16_a2.mlm", "next_token": "gpt2_l2_h16_a2"}
TOKENIZERS = {"masked_lm": "wordpiece:60", "next_token": "bpe:300"}
EACH = pytest.mark.parametrize("task", NETWORKS)


@pytest.fixture(scope="module", name="texts")
def make_texts(tmp_path_factory):
    """texts.csv with two classes, which a word tells, and files.txt of its longest rows as one text."""
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    rows = [" ".join(rng.choice(WORDS, 3 + i % 21)) for i in range(80)]
    lines = [f"{i % 2},{row} {'ab'[i % 2]}" for i, row in enumerate(rows)]
    (folder / "texts.csv").write_text("label,text\n" + "\n".join(lines) + "\n")
    for split, count in {"train": 6, "val": 3}.items():
        (folder / "files" / split).mkdir(parents=True)
        for i in range(count):
            (folder / "files" / split / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 5 + 40 * i)))
    return folder


def config_of(task, texts, **changes):
    return options.override(options.make(), {
        "task": task, "model.name": NETWORKS.get(task, "bert_l2_h16_a2"), "data.source": f"text:{texts}/texts.csv",
        "model.tokenizer": TOKENIZERS.get(task, "wordpiece:60"), "model.max_length": 24, "data.train": "train[:60%]",
        "data.val": "train[60%:]", "method.name": "full", "optimizer": "sgd", "optimizer_args": {"momentum": 0.9},
        "lr": 0.1, "batch_size": 8, "total": (4.0, "steps"), "log_every": (1.0, "steps"),
        "eval_every": (2.0, "steps"), "resamples": 20, **changes,
    })  # fmt: skip


# Labels.


@functools.cache
def known(kind="wordpiece:60"):
    return tokenizer.train(kind, [" ".join(WORDS)])


def card_of(task, max_length=64):
    own = known(TOKENIZERS[task])
    card = models.get(NETWORKS[task]).card
    return card.replace(task=task, tokenizer=own.sha256, vocab=own.size, max_length=max_length)


def test_so_many_ordinary_tokens_are_chosen_and_replaced_in_these_shares():
    vocabulary, special = language.vocabulary(known()), set(language.specials(known()).values())
    lengths = (0, 1, 3, 7, 10, 30, 60)
    x = np.full((700, 64, 2), -1, np.int32)
    for i, row in enumerate(x):
        rng = np.random.default_rng(i)
        row[0, 0], row[: 2 + lengths[i % 7], 1] = 1, 0
        row[1 : 1 + lengths[i % 7], 0] = rng.choice(vocabulary.ordinary, lengths[i % 7])
        row[1 + lengths[i % 7], 0] = 2
    found, labels = language.masked(vocabulary, x, [(7, i) for i in range(700)])
    assert labels.shape == (700, max(1, round(0.15 * 64)), 2)
    kinds = np.zeros(3)
    for i, (before, after, own) in enumerate(zip(x, found, labels, strict=True)):
        n, own = lengths[i % 7], own[own[:, 1] >= 0]
        assert len(own) == (max(1, round(0.15 * n)) if n else 0) and len(set(own[:, 0].tolist())) == len(own)
        np.testing.assert_array_equal(before[own[:, 0], 0], own[:, 1])
        assert not special & set(own[:, 1].tolist())
        assert set(np.flatnonzero((before != after).any(axis=1)).tolist()) <= set(own[:, 0].tolist())
        now = after[own[:, 0], 0]
        masks, same = now == vocabulary.mask, now == own[:, 1]
        assert not special & set(now[~masks].tolist())
        kinds += [masks.sum(), (~masks & ~same).sum(), same.sum()]
    assert kinds.sum() == 1800
    np.testing.assert_allclose(kinds / kinds.sum(), (0.8, 0.1, 0.1), atol=0.03)


@EACH
def test_labels_are_pure_in_seed_and_step_and_those_of_an_evaluation_stay(task, texts):
    source, views = sources.load(f"text:{texts}/texts.csv", task=task), {"text": View(card_of(task))}
    batches = [train_batches(source, views, 8, seed) for seed in (0, 0, 1)]
    once, again, other = (batch[11] for batch in batches)
    for field in ("text", "label"):
        np.testing.assert_array_equal(once[field], again[field])
    np.testing.assert_array_equal(source.labels, -1)
    if task == "masked_lm":
        epochs = [labels_by_index(batches[0][s] for s in range(start, start + 10)) for start in (0, 10)]
        assert sum(epochs[0][i] != epochs[1][i] for i in epochs[0]) > 40 and (once["index"] != other["index"]).any()
    one, two = (labels_by_index(eval_batches(source, views, size)) for size in (8, 20))
    assert one == two and len(one) == 80


def labels_by_index(batches):
    """The positions and tokens of each example, whatever the length of its batch."""
    rows = (pair for batch in batches for pair in zip(batch["index"].tolist(), batch["label"], strict=True))
    return {i: labels[labels >= 0].tolist() for i, labels in rows if i >= 0}


def test_the_label_of_a_position_is_the_next_token(texts):
    source = sources.load(f"text:{texts}/texts.csv", task="next_token")
    batch = next(iter(eval_batches(source, {"text": View(card_of("next_token"))}, 80)))
    for x, labels, (text,) in zip(batch["text"], batch["label"], source.inputs.rows, strict=True):
        ids = known(TOKENIZERS["next_token"]).open(64).encode(text).ids
        assert x[: len(ids), 0].tolist() == ids and labels[labels >= 0].tolist() == ids[1:]


@pytest.mark.parametrize("kind", ["wordpiece:60", "bpe:300"])
@pytest.mark.parametrize("most", [4, 30])
def test_pieces_of_a_text_are_the_text_and_have_its_tokens(kind, most):
    rng = np.random.default_rng(0)
    text = "  ".join(rng.choice([*WORDS, "w1w2w3w4w5w6w7", "\n", "\U0001f600\U0001f600"], 80))
    own, found = known(kind), language.pieces(known(kind), text, most)
    assert "".join(found) == text and len(found) > 3
    encoded = [own.open().encode(piece).ids for piece in found]
    long = [piece for piece, ids in zip(found, encoded, strict=True) if len(ids) > most]
    assert set(long) <= ({"\U0001f600"} if most == 4 else set())  # one character of four bytes
    inner = [i for ids in encoded for i in ids[1:-1]]
    if (most, kind) == (30, "wordpiece:60"):  # words are not cut, and no space is put before a piece
        assert inner == own.open().encode(text).ids[1:-1]


# Losses and gradients.


def batch_of(task, lengths=(9, 5, 2), vocab=50):
    rng, x = np.random.default_rng(0), np.full((len(lengths), 9, 2), -1, np.int32)
    for row, n in zip(x, lengths, strict=True):
        row[:n, 0], row[:, 1] = rng.integers(5, vocab, n), 0
    if task == "next_token":
        return x, language.next_tokens(x)
    return language.masked(language.Vocabulary(4, np.arange(5, vocab)), x, [(0, i) for i in range(len(x))])


def twin(task, tmp_path, monkeypatch):
    """transformers' small network, and ours with its weights."""
    reference = pytest.importorskip("torch_reference")
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 50, "attn_implementation": "eager"}
    if task == "masked_lm":
        shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
        theirs = transformers.BertForMaskedLM(transformers.BertConfig(**shape, **size))
        name, variant = "small.mlm", bert.variants("small", "bert", (2, 24, 3), 50)["small.mlm"]
    else:
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=24, n_head=3, **ends, **size))
        name, variant = "small", gpt2.variant("small", (2, 24, 3))
    monkeypatch.setitem(models.MODELS, name, variant)
    return reference.randomize(theirs), tl_jax.load(name, reference.save(theirs, tmp_path / "w.pth"))


@pytest.mark.thin(1)
@EACH
def test_loss_and_gradient_are_those_of_transformers(task, tmp_path, monkeypatch):
    theirs, own = twin(task, tmp_path, monkeypatch)
    torch = pytest.importorskip("torch")
    x, labels = batch_of(task)
    wanted = np.full(x.shape[:2], -100)
    for i, j in np.argwhere(labels[..., -1] >= 0) if task == "masked_lm" else ():
        wanted[i, labels[i, j, 0]] = labels[i, j, 1]
    if task == "next_token":  # which transformers shifts itself
        wanted[x[..., 0] >= 0] = x[..., 0][x[..., 0] >= 0]
    given = {"input_ids": np.maximum(x[..., 0], 0), "attention_mask": x[..., 0] >= 0, "labels": wanted}
    given["position_ids"] = np.arange(9)[None]  # its own are a buffer, which was randomized
    expected = theirs(**{name: torch.from_numpy(value.astype(np.int64)) for name, value in given.items()}).loss
    expected.backward()
    task_of = tasks.make(tasks.Spec(task))
    module = own.module.clone(decodes=True)

    def loss(params):
        _, out = module.apply({"params": params}, x, train=True)
        return task_of.loss(out, task_of.encode(labels)).sum() / task_of.count(labels).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(own.variables["params"])
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    gradient = trees.flatten(gradient)
    named = dict(theirs.named_parameters())
    stem = "bert.embeddings.word_embeddings" if task == "masked_lm" else "transformer.wte"
    pairs = {"backbone/stem/tok_embed/embedding": named[f"{stem}.weight"].grad.numpy()}
    if task == "masked_lm":
        pairs["head/token_bias"] = named["cls.predictions.bias"].grad.numpy()
        pairs["head/transform/kernel"] = named["cls.predictions.transform.dense.weight"].grad.numpy().T
        pairs["backbone/block0/mlp/fc1/kernel"] = named["bert.encoder.layer.0.intermediate.dense.weight"].grad.numpy().T
    else:
        pairs["backbone/block0/mlp/fc1/kernel"] = named["transformer.h.0.mlp.c_fc.weight"].grad.numpy()
        pairs["backbone/norm/scale"] = named["transformer.ln_f.weight"].grad.numpy()
    for path, right in pairs.items():
        assert np.abs(np.asarray(gradient[path]) - right).max() < 1e-4 * np.abs(right).max(), path


def held(jaxpr):
    """The sizes of all arrays of a program, those of its loops too."""
    for equation in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from held(inner)


def test_chunks_change_no_number_and_hold_no_logits_of_a_whole_batch(monkeypatch):
    rng = np.random.default_rng(0)
    hidden, table = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 50, 4), (90, 4)))
    bias, wanted = rng.standard_normal(90).astype(np.float32), rng.integers(-1, 90, (3, 50)).astype(np.int32)

    def loss(hidden, table, bias):
        return decoding.token_losses(hidden, table, bias, wanted)[0].sum()

    monkeypatch.setattr(decoding, "CHUNK", 21)
    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    value, found = jax.jit(gradient)(hidden, table, bias)
    logits = hidden.astype(np.float64) @ table.T.astype(np.float64) + bias
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    there, nll = wanted >= 0, -np.log(np.take_along_axis(p, np.maximum(wanted, 0)[..., None], -1)[..., 0])
    assert float(value) == pytest.approx(nll[there].sum(), rel=1e-5)
    slope = (p - np.eye(90)[np.maximum(wanted, 0)]) * there[..., None]
    expected = slope @ table, np.einsum("bpv,bpd->vd", slope, hidden), slope.sum((0, 1))
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)
    correct = decoding.token_losses(hidden, table, bias, wanted)[1]
    np.testing.assert_array_equal(correct, there & (logits.argmax(-1) == wanted))
    assert max(held(jax.make_jaxpr(gradient)(hidden, table, bias).jaxpr)) < 3 * 50 * 90 / 2


# Runs.


@pytest.mark.slow
@pytest.mark.thin(1)
@EACH
def test_metrics_are_over_tokens_and_monitored_by_perplexity(task, texts, tmp_path):
    result = train(config_of(task, texts, **{"model.max_length": 8}), tmp_path / "w", verbose=False)
    saved = tl_jax.load_predictions(tmp_path / "w" / "predictions.npz")
    nll, count, correct = saved.outputs["tokens"].astype(np.float64).sum(axis=0)
    found = result["metrics"]
    assert found["nll"]["value"] == pytest.approx(nll / count, rel=1e-6)
    assert found["perplexity"]["value"] == pytest.approx(np.exp(nll / count), rel=1e-6)
    assert found["token_accuracy"]["value"] == pytest.approx(correct / count, rel=1e-6)
    assert found["perplexity"]["low"] <= found["perplexity"]["value"] <= found["perplexity"]["high"]
    assert 0 < nll / count < 1.2 * math.log(300)  # a random network knows nothing
    rows = tl_jax.load_run(tmp_path / "w").curves
    assert rows["val/perplexity"][1][-1] == pytest.approx(found["perplexity"]["value"], rel=1e-5)
    with pytest.raises(ValueError, match="tells tokens and has no answer"):
        tl_jax.predict(tl_jax.load_run(tmp_path / "w"), ["w1 w2"])


@pytest.mark.slow
@EACH
def test_a_run_that_crashed_twice_ends_bit_equal_to_an_unbroken_one(task, texts, tmp_path):
    config = config_of(task, texts, total=(5.0, "steps"))
    for step in (1, 3):
        with pytest.raises(Crash):
            train(config, tmp_path / "w", verbose=False, stop_requested=crash_at(step))
    train(config, tmp_path / "w", verbose=False)
    train(config, tmp_path / "whole", verbose=False)
    assert remains(tmp_path / "w") == remains(tmp_path / "whole")


@pytest.mark.slow
@EACH
def test_means_are_per_token_in_parts_of_a_batch_and_on_several_devices(task, texts):
    one = walk(config_of(task, texts))
    assert_same_training(one, walk(config_of(task, texts, accumulate=2)))
    assert_same_training(one, walk(config_of(task, texts), devices=4))


METHODS = {
    "last_k": {"method.name": "last_k", "method.k": 1},
    "lora": {"method.name": "rules", "method.rules": ((".*", "frozen"),), "method.add": (("lora", {"rank": 2}),)},
    "rules": {"method.name": "rules", "method.rules": ((".*tok_embed.*", "table"), (".*", "frozen"))},
    "probe": {"method.name": "linear_probe"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@EACH
def test_what_trains_moves_and_nothing_else(task, name, texts):
    config = config_of(task, texts, **METHODS[name])
    if (task, name) == ("next_token", "probe"):
        with pytest.raises(ValueError, match="nothing to train"):
            build.build(config, tl_jax.runtime.sharding.make_parallel())
        return
    run, before, after, _ = walk(config)
    hashes = [trees.leaf_hashes(variables_of(state)) for state in (before, after)]
    trained = {f"params/{row['path']}" for row in run.phases[0].audit["parameters"] if row["trainable"]}
    assert {path for path in hashes[0] if hashes[0][path] != hashes[1][path]} == trained


@pytest.mark.slow
@pytest.mark.parametrize("where", ["w", "w/model.safetensors"])
@EACH
def test_the_weights_of_a_run_begin_another_with_classes_and_one_with_tokens(task, where, texts, tmp_path):
    train(config_of(task, texts), tmp_path / "w", verbose=False)
    name = NETWORKS[task].removesuffix(".mlm")
    weights = {"model.weights": str(tmp_path / where), "model.tokenizer": ""}
    parallel = tl_jax.runtime.sharding.make_parallel()
    run = build.build(config_of("classification", texts, **weights, **{"model.name": name}), parallel)
    saved = trees.flatten(tl_jax.load_run(tmp_path / "w").model.variables["params"])
    begun = trees.flatten(run.material.variables["params"])
    assert run.material.card.model == name and {x for x in begun if x.startswith("head/")} == {
        "head/kernel",
        "head/bias",
    }
    for path in (x for x in begun if x.startswith("backbone/")):
        np.testing.assert_array_equal(begun[path], saved[path])
    on = build.build(config_of(task, texts, **weights), parallel).material
    assert trees.leaf_hashes(on.variables["params"]) == trees.leaf_hashes(trees.unflatten(saved))
    assert "new" not in on.origins.values()
    if where == "w":
        config = config_of("classification", texts, **weights, **{"model.name": name, "lr": 0.01})
        result, run = train(config, tmp_path / "c", verbose=False), tl_jax.load_run(tmp_path / "c")
        again = run.evaluate(f"text:{texts}/texts.csv", "train[60%:]")["nll"]["value"]
        assert again == pytest.approx(
            result["metrics"]["nll"]["value"], rel=1e-5
        )  # GPT-2's head of zeros has a bias now


def test_files_are_cut_into_pieces_which_are_groups(texts):
    config = config_of("next_token", texts, **{"data.source": f"text:{texts}/files", "data.train": "train",
                                               "data.val": "val"})  # fmt: skip
    data = build.build(config, tl_jax.runtime.sharding.make_parallel()).material.data
    whole = sources.load(f"text:{texts}/files", "train", task="next_token")
    assert len(whole) == 6 < len(data["train"])
    joined = ["".join(r[0] for r, g in zip(data["train"].inputs.rows, data["train"].groups, strict=True) if g == i)
              for i in whole.ids]  # fmt: skip
    assert joined == [row[0] for row in whole.inputs.rows] and data["val"].ids[1] == "val/1.txt#0"


def test_a_txt_file_is_its_paragraphs(tmp_path):
    (tmp_path / "book.txt").write_text("One line\nand another.\n\n  \nTwo.\n")
    source = sources.load(f"text:{tmp_path}/book.txt", task="masked_lm")
    assert source.inputs.rows == (("One line\nand another.",), ("Two.",)) and source.ids == (
        "paragraph/0",
        "paragraph/1",
    )


WRONG = {
    "cache keeps": {"cache": "features"},
    "use 'jit'": {"parallel": "pmap"},
    "needs classes": {"data.sampling": "class_balanced"},
    "terms r_drop": {"terms": {"r_drop": {}}, "model.drop_path": 0.1},
    "prompts are tokens": {"method.add": (("prompt", {"count": 2}),)},
    "tells classes apart": {"method.name": "knn"},
    "expected texts": {"data.source": "digits", "data.train": "train"},
    "streams and networks": {"streams": {"target": {"source": "digits", "split": "train"}}},
    "shots are examples of a class": {"data.shots": 2},
    "does not go with replicas": {"replicas": ((("lr", 0.1),), (("lr", 0.2),))},
    "bert_l2_h16_a2.mlm has the head": {"model.name": "bert_l2_h16_a2"},
    "can be trained as 'next_token'": {"model.name": "gpt2_l2_h16_a2"},
    "does not predict tokens": {"model.name": "word_average_16_8d", "model.tokenizer": "words"},
    "none of the mask tokens": {"model.tokenizer": "words"},
    "label_smoothing": {"method.label_smoothing": 0.1},
    "texts have neither": {"method.mixup": 0.2},
}


@pytest.mark.thin(10)
@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_work_is_one_message(message, texts):
    with pytest.raises(ValueError, match=message):
        build.build(config_of("masked_lm", texts, **WRONG[message]), tl_jax.runtime.sharding.make_parallel())


# Generation.


def gpt_with_words(tmp_path, monkeypatch, positions=1024):
    theirs, own = twin("next_token", tmp_path, monkeypatch)
    words = tokenizer.of_words([f"t{i}" for i in range(49)])
    module = own.module.clone(positions=positions)
    table = {**own.variables["params"]["backbone"]["stem"]}
    table["pos_embed"] = table["pos_embed"][:positions]
    params = {**own.variables["params"], "backbone": {**own.variables["params"]["backbone"], "stem": table}}
    card = own.card.replace(tokenizer=words.sha256)
    return theirs, dataclasses.replace(own, module=module, variables={"params": params}, card=card), words


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    theirs, own, words = gpt_with_words(tmp_path, monkeypatch)
    prompt = "t3 t17 t40"
    ids = torch.tensor([words.open().encode(prompt).ids])
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0, 3:]
    found = tl_jax.generate(own, prompt, tokens=20, temperature=0)
    assert found == words.decode(expected.tolist()) and len(set(found.split())) > 1


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_nucleus_is_that_of_a_plain_count_and_of_transformers(top_p, temperature):
    from tl_jax.api.generate import nucleus

    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = np.random.default_rng(0).normal(0, 2, 40)
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    total, kept, mass = math.fsum(weights.values()), [], 0.0
    for i in sorted(weights, key=weights.get, reverse=True):
        if mass >= top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    expected = [weights[i] / math.fsum(weights[j] for j in kept) if i in kept else 0 for i in range(40)]
    np.testing.assert_allclose(nucleus(logits, temperature, top_p), expected, atol=1e-12)
    given = torch.tensor(logits[None] / temperature)
    warped = transformers.TopPLogitsWarper(top_p)(None, given) if top_p < 1 else given
    np.testing.assert_allclose(nucleus(logits, temperature, top_p), warped.softmax(-1)[0].numpy(), atol=1e-12)


@pytest.mark.slow
def test_generation_is_of_its_seed_and_stops_at_the_end_token_and_the_last_position(tmp_path, monkeypatch, capsys):
    from tl_jax.api import generate as module

    _, own, words = gpt_with_words(tmp_path, monkeypatch, positions=12)
    texts = [tl_jax.generate(own, "t1 t2", tokens=9, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(tl_jax.generate(own, "t1 t2", tokens=50, temperature=0).split()) == 10
    assert "stopped after 10 of 50 tokens" in capsys.readouterr().out
    first = words.open().encode(tl_jax.generate(own, "t1 t2", tokens=1, temperature=0)).ids[0]
    monkeypatch.setattr(module.language, "end_of", lambda known: first)
    assert len(tl_jax.generate(own, "t1 t2", tokens=50, temperature=0).split()) == 1
    for wrong in ({"tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tl_jax.generate(own, "t1", **wrong)
    for prompt in ("", " ".join(["t1"] * 12)):
        with pytest.raises(ValueError, match="expected 1 to 11"):
            tl_jax.generate(own, prompt)


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", ["bert_l1_h8_a1", "clip_text_l1_h8_a1"])  # CLIP's tower is causal, and writes nothing
def test_networks_that_were_not_made_for_the_next_token_do_not_generate(name, texts):
    with pytest.raises(ValueError, match=f"{name} was not made to predict the next token; expected a network such as"):
        tl_jax.generate(tl_jax.load(name), "t1")
    config = config_of("next_token", texts, **{"model.name": name})
    with pytest.raises(ValueError, match=f"{name} does not predict tokens in this way"):
        build.build(config, tl_jax.runtime.sharding.make_parallel())


# ULMFiT.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm_8x2_8d", "bert_l2_h16_a2"])
def test_each_phase_of_ulmfit_trains_one_block_more_at_rates_that_fall_by_2_6(name, texts):
    from configs import ulmfit

    given = {"model.tokenizer": "words", "data.train": "train[:60%]", "data.val": "train[60%:]", "batch_size": 4}
    config = options.override(
        ulmfit.get_config(f"model={name},data=text:{texts}/texts.csv,total=(2.0,'epochs')"), given
    )
    run = build.build(config, tl_jax.runtime.sharding.make_parallel(devices=jax.devices()[:1]))
    order = ["head", "block1", "block0", "stem"]
    for i, phase in enumerate(run.phases):
        rates = {part: {row["lr_mult"] for row in phase.audit["parameters"] if f"{part}/" in f"{row['path']}/"}
                 for part in order}  # fmt: skip
        for depth, part in enumerate(order):
            assert list(rates[part]) == ([pytest.approx(2.6**-depth)] if depth <= i else [0.0]), (i, part)
        count = phase.length
        rate = np.array([float(phase.schedule(step)) for step in range(count)])
        assert count == (12, 12, 12, 24)[i] and rate.argmax() == -(-count // 10) and rate.max() == pytest.approx(0.01)
        assert 0.01 / 32 <= rate[-1] < 0.01 * (1 / 32 + 1.5 / count) and (np.diff(rate[rate.argmax() :]) < 0).all()
