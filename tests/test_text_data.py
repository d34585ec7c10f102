"""Texts come from files as they lie there, get the same tokens everywhere, and a batch's length changes no number."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

import tl_jax
from tl_jax import __main__ as command
from tl_jax import config as options
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.data import pipeline, sources
from tl_jax.data.examples import Source
from tl_jax.data.text import tokenizer
from tl_jax.data.text.tokens import PADDING, Texts, describe, join_texts, part_texts, ragged, stack
from tl_jax.data.views import View
from tl_jax.runtime import sharding
from tl_jax.training import build, single, train

WORDS = [f"word{i}" for i in range(50)]


def sentences(count, seed=0):
    """Texts of 1 to 40 words, whose label is whether a good word is among them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    rows = [[*rng.choice(WORDS, rng.integers(0, 40)), "dull" if not y else "fine"] for y in labels]
    return [" ".join(rng.permutation(row)) for row in rows], labels


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same 60 training and 40 test examples in every form that is read."""
    folder = tmp_path_factory.mktemp("texts")
    parts = {"train": sentences(60), "test": sentences(40, 1)}
    rows = {name: list(zip(*part, strict=True)) for name, part in parts.items()}
    both = [(split, text, y) for split, each in rows.items() for text, y in each]
    (folder / "all.csv").write_text("split,text,label\n" + "".join(f'{s},"{t}",{y}\n' for s, t, y in both))
    for name, each in rows.items():
        split = "dev" if name == "test" else name
        for kind in ("tsv", "jsonl"):
            (folder / kind).mkdir(exist_ok=True)
        (folder / "tsv" / f"{split}.tsv").write_text("label\tsentence\n" + "".join(f"{y}\t{t}\n" for t, y in each))
        lines = [json.dumps({"review": t, "class": int(y)}) for t, y in each]
        (folder / "jsonl" / f"{split}.jsonl").write_text("\n".join(lines))
        for i, (t, y) in enumerate(each):
            place = folder / "txt" / name / str(y)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:03}.txt").write_text(t + "\n")
    return folder, parts


@pytest.mark.parametrize(("where", "split"), [("all.csv", "test"), ("tsv", "val"), ("jsonl", "val"), ("txt", "test")])
def test_every_form_of_files_gives_the_same_examples(files, where, split):
    folder, parts = files
    for name, known in (("train", "train"), (split, "test")):
        found = sources.load(f"text:{folder / where}", name)
        assert found.input == "text" and found.class_names == ("0", "1") and len(set(found.ids)) == len(found)
        pairs = [(row[0], int(y)) for row, y in zip(found.inputs.rows, found.labels, strict=True)]
        assert sorted(pairs) == sorted((t, int(y)) for t, y in zip(*parts[known], strict=True))
        assert found.fingerprint == sources.load(f"text:{folder / where}", name).fingerprint
    few = sources.load(f"text:{folder / where}", "train", shots=5)
    assert np.bincount(few.labels).tolist() == [5, 5]


def test_columns_are_chosen_by_name_and_pairs_keep_their_order(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('a\tb\tscore\tgenre\nx "y\tz, w\t1.5\tnews\np\tq\t0\tnews\n')
    found = sources.load(f"text:{path}", task="regression", text=("b", "a"), labels=("score",), group="genre")
    assert found.inputs.rows == (("z, w", 'x "y'), ("q", "p")) and found.labels.tolist() == [[1.5], [0.0]]
    assert set(found.groups) == {"news"}
    (tmp_path / "y.tsv").write_text("sentence1\tsentence2\tlabel\nu\tv\tyes\nw\tx\tno\n")
    assert sources.load(f"text:{tmp_path / 'y.tsv'}").inputs.rows == (("u", "v"), ("w", "x"))


@pytest.mark.parametrize(
    ("name", "data", "how", "message"),
    [
        ("x.csv", b"text,label\na,1\n\xff,2\n", {}, "byte 0xff in line 3"),
        ("x.tsv", b"text,label\na,1\n", {}, "expected tabs, found ',' between names"),
        ("x.tsv", b"text\tlabel\na\t1\t2\n", {}, "a value holds no tab"),
        ("x.csv", b"words,label\na,1\n", {}, "which hold texts? Name one or two by data.text"),
        ("x.csv", b"text,label\na,1\n", {"text": ("txet",)}, "no columns 'txet'"),
        ("x.csv", b"a,b,c,label\na,1,2,3\n", {"text": ("a", "b", "c")}, "expected one or two different ones"),
        ("x.csv", b"text,a,b\nx,1,2\n", {}, "has no label column"),
        ("x.jsonl", b'{"text": "a", "label": 1}\n[1]\n{"text": {}}\n', {}, "2 lines are no objects"),
        ("x.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', {}, "line 2: text"),
        ("x.jsonl", b"", {}, "is empty"),
    ],
)
def test_what_is_wrong_with_a_file_of_texts_is_said(tmp_path, name, data, how, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"(?s).*") as error:
        sources.load(f"text:{tmp_path / name}", **how)
    assert message in str(error.value)


def test_splits_of_files_must_agree_and_be_named_once(tmp_path):
    (tmp_path / "train.tsv").write_text("text\tlabel\na\t1\nb\t2\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\na\t1\n")
    with pytest.raises(ValueError, match="have other columns than"):
        sources.load(f"text:{tmp_path}")
    (tmp_path / "dev.tsv").write_text("text\tlabel\na\t1\n")
    assert sources.load(f"text:{tmp_path}", "val").class_names == ("1", "2")  # those of all files
    shutil.copy(tmp_path / "dev.tsv", tmp_path / "val.tsv")
    with pytest.raises(ValueError, match="names one split twice"):
        sources.load(f"text:{tmp_path}")
    folder = tmp_path / "c" / "pos"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"ok \xe9")
    with pytest.raises(ValueError, match=r"1 files of .* are not UTF-8 text"):
        sources.load(f"text:{tmp_path / 'c'}")


def test_empty_and_very_long_texts_are_named_and_read(tmp_path, caplog):
    long = "word " * 100_000
    (tmp_path / "x.csv").write_text(f'text,label\n"",a\n"{long}",b\n')
    found = sources.load(f"text:{tmp_path / 'x.csv'}")
    assert "1 of 2 examples have an empty text" in caplog.text and "row 2" in caplog.text
    made = tokenizer.train("words", ["word"])
    tokens = made.encode(found.inputs.rows, 16)
    assert tokens.counts.tolist() == [0, 16] and tokens.cut == 1 and "1 are cut" in describe(tokens, [np.arange(2)])


@pytest.mark.parametrize("kind", ["words", "chars", "wordpiece:300", "bpe:400"])
def test_a_tokenizer_is_the_same_each_time_it_is_made_and_round_trips_through_its_file(kind, tmp_path):
    texts, _ = sentences(50)
    texts += ["It's a \u00e9tude, don't you think?", "\u8fd9\u4e2a\u9152\u5e97 \u5f88\u597d"]
    made = [tokenizer.train(kind, texts) for _ in range(2)]
    assert made[0] == made[1] and made[0].lowercase and made[0].size <= int(kind.partition(":")[2] or 10_000)
    made[0].save(tmp_path)
    again = tokenizer.read(tmp_path)
    assert again == made[0] and tokenizer.find_for(tmp_path / "model.safetensors") == made[0]
    rows = [(text,) for text in texts]
    tokens = made[0].encode(rows, 512)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for i, (text,) in enumerate(rows):
        assert tokens.flat[tokens.starts[i] : tokens.starts[i + 1], 0].tolist() == theirs.encode(text).ids
    numbers = list(tokenizer.vocabulary(made[0]).values())
    assert numbers == list(range(made[0].size))
    upper = tokenizer.train(kind, texts, lowercase=False)
    assert not upper.lowercase


def test_words_are_split_as_those_of_glove():
    made = tokenizer.train("words", ["It's fine, don't worry; they've 2 dogs."])
    pieces = sorted(tokenizer.vocabulary(made), key=str)
    for piece in ("it", "'s", "do", "n't", "they", "'ve", ",", "2"):
        assert piece in pieces


def test_pairs_have_segments_and_are_cut_the_longer_first():
    made = tokenizer.train("wordpiece:200", ["one two three four five six seven"])
    tokens = made.encode([("one two", "three"), ("one two three four five six", "seven")], 8)
    first = tokens.flat[: tokens.starts[1]]
    assert first[0, 0] == 1 and (first[:, 0] == 2).sum() == 2  # [CLS] and two [SEP]
    assert first[:, 1].tolist() == [0] * (np.argmax(first[:, 0] == 2) + 1) + [1] * (
        len(first) - np.argmax(first[:, 0] == 2) - 1
    )
    assert tokens.counts[1] == 8 and tokens.cut == 1


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff", b'{"model": {"type": "WordLevel"}}'])
def test_what_is_no_tokenizer_is_refused_by_name(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"is no tokenizer\.json of the library"):
        tokenizer.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        tokenizer.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no tokenizer 'sylables'"):
        tokenizer.train("sylables", ["a"])


def test_texts_survive_the_arrays_they_are_kept_in():
    texts = Texts((("a", "b\u4e16"), ("", ""), ("c",), ("\ud800",)))
    found = part_texts(*join_texts(texts.rows).values())
    assert found == texts


def test_a_batch_has_the_next_length_and_padding_behind_its_tokens():
    rows = [np.stack([np.arange(n), np.zeros(n, int)], 1).astype(np.int32) for n in (3, 20, 0, 9)]
    tokens = ragged(rows, 100)
    assert tokens.lengths == (8, 16, 24) and tokens.longest.lengths == (24,)
    assert [tokens.length_of(np.array(x)) for x in ([0], [0, 3], [1], [2], [-1])] == [8, 16, 24, 8, 8]
    batch = tokens.batch(np.array([3, 2, -1]), 16)
    assert batch.shape == (3, 16, 2) and batch.dtype == np.int32
    assert batch[0, :9, 0].tolist() == list(range(9)) and (batch[0, 9:, 0] == PADDING).all()
    assert (batch[1, :, 0] == PADDING).all() and not batch[2].any()


@pytest.mark.parametrize(("form", "padding"), [(np.int32, [PADDING, 0]), (np.float32, [0, 0])])
def test_batches_of_several_lengths_are_stacked_with_padding_behind_each_text(form, padding):
    short, long = np.arange(16, dtype=form).reshape(2, 4, 2), np.arange(24, dtype=form).reshape(2, 6, 2)
    found = stack((short, long), 2)
    pad = np.array(padding, form)
    expected = [[[*row[:2], pad, *row[2:], pad] for row in short], long]
    np.testing.assert_array_equal(found, np.array(expected, form))
    assert found.dtype == form and stack((long, long), 2).shape == (2, 2, 6, 2)


def test_all_processes_have_batches_of_one_length(files):
    folder, _ = files
    source = sources.load(f"text:{folder / 'all.csv'}")
    made = tokenizer.train("words", (row[0] for row in source.inputs.rows))
    card = Card("x", 2, mean=(), std=(), input="text", vocab=made.size, max_length=64, pooling="mean",
                tokenizer=made.sha256)  # fmt: skip
    whole = pipeline.train_batches(source, {"text": View(card)}, 8, 0)
    parts = [
        pipeline.train_batches(source, {"text": View(card)}, 8, 0, process_index=i, process_count=4) for i in range(4)
    ]
    for step in range(10):
        np.testing.assert_array_equal(np.concatenate([part[step]["text"] for part in parts]), whole[step]["text"])
    for field in ("label", "index"):
        np.testing.assert_array_equal(np.concatenate([part[3][field] for part in parts]), whole[3][field])
    with pytest.raises(ValueError, match="has no tokenizer"):
        pipeline.train_batches(source, {"text": View(card.replace(tokenizer="0" * 64))}, 8, 0)


def test_batches_by_length_have_each_example_once_an_epoch_and_little_padding():
    rng = np.random.default_rng(0)
    texts = [" ".join(["w"] * n) for n in rng.integers(1, 60, 1003)]
    rows = Texts(tuple((text,) for text in texts))
    sizes = np.array([len(text) for text in texts])
    source = Source("x", rows, np.zeros(1003, np.int32), ("a", "b"), tuple(map(str, range(1003))), sizes)
    made = tokenizer.train("words", texts)
    card = Card("x", 2, mean=(), std=(), input="text", vocab=made.size, max_length=64, pooling="mean",
                tokenizer=made.sha256)  # fmt: skip
    views, shares, orders = {"text": View(card)}, {}, []
    for order in ("shuffled", "by_length"):
        batches = pipeline.train_batches(source, views, 16, 0, order=order)
        seen = np.concatenate([batches.rows(step).index for step in range(3 * 1003 // 16 + 1)])
        for epoch in range(3):
            assert np.array_equal(np.sort(seen[epoch * 1003 : (epoch + 1) * 1003]), np.arange(1003))
        orders.append(seen[:1003])
        found = [batches[step]["text"] for step in range(130, 188)]  # of the third epoch
        shares[order] = 1 - sum((x[..., 0] >= 0).sum() for x in found) / sum(x[..., 0].size for x in found)
        assert np.array_equal(found[0], pipeline.train_batches(source, views, 16, 0, order=order)[130]["text"])
    assert shares["shuffled"] > 0.4 and shares["by_length"] < 0.2
    assert not np.array_equal(np.diff(sizes[orders[1]]) >= 0, np.ones(1002, bool))


CHANGES = {
    "model.name": "word_average_16_8d", "model.tokenizer": "words", "method.name": "full", "lr": 0.1,
    "total": (8.0, "epochs"), "batch_size": 16, "resamples": 5, "data.val": "", "data.test": "test",
    "data.train": "train", "select": "last", "patience": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "w"
    changes = {**CHANGES, "data.source": f"text:{files[0] / 'all.csv'}"}
    train.train(options.override(options.make(), changes), folder, verbose=False)
    return tl_jax.load_run(folder)


def test_a_run_on_texts_predicts_whatever_the_length_of_the_batch(run, files, tmp_path):
    texts, labels = files[1]["test"]
    expected = tl_jax.outputs(run, texts)
    assert (expected.argmax(1) == labels).mean() > 0.7
    for size in (1, 3, 64):
        np.testing.assert_allclose(tl_jax.outputs(run, texts, batch_size=size), expected, atol=1e-5)
    alone = [tl_jax.outputs(run, [text])[0] for text in texts[:5]]
    np.testing.assert_allclose(alone, expected[:5], atol=1e-5)
    assert (
        tl_jax.evaluate(run, f"text:{files[0] / 'all.csv'}", "test", resamples=5)["accuracy"]["value"]
        == (run.metrics["accuracy"]["value"])
    )
    assert tl_jax.evaluate(run, (texts, labels), resamples=5)["accuracy"] == tl_jax.evaluate(
        run, files[0] / "all.csv", "test", resamples=5
    )["accuracy"]  # fmt: skip
    (tmp_path / "one.txt").write_text(texts[0])
    (row,) = run.predict(tmp_path / "one.txt")
    assert row["class"] == str(expected[0].argmax())
    with pytest.raises(ValueError, match="no text and no pair of texts"):
        run.predict([3])


def test_the_tokenizer_travels_with_the_weights_and_another_stops_the_run(run, files, tmp_path):
    assert run.model.card.tokenizer == tokenizer.read(run.folder).sha256
    changes = {**CHANGES, "data.source": f"text:{files[0] / 'all.csv'}", "model.weights": str(run.folder)}
    for wrong, message in (
        ({"model.tokenizer": "chars"}, "the weights know the tokens of theirs"),
        ({"model.tokenizer": "", "model.max_length": 100_000}, "max_length"),
    ):
        with pytest.raises(ValueError, match=message):
            train.train(options.override(options.make(), {**changes, **wrong}), tmp_path / "w", verbose=False)
    lost = shutil.copytree(run.folder, tmp_path / "lost")
    (lost / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        tl_jax.load_run(lost)
    with pytest.raises(ValueError, match="texts have neither"):
        train.train(options.override(options.make(), {**changes, "model.tokenizer": "", "method.mixup": 0.2}), tmp_path)
    images = {**changes, "data.source": "digits", "model.name": "resnet8_cifar", "model.weights": ""}
    with pytest.raises(ValueError, match="holds no texts"):
        train.train(options.override(options.make(), images), tmp_path / "w", verbose=False)


def test_an_export_answers_texts_of_any_length(run, files, tmp_path, capsys):
    out = tl_jax.export(run, tmp_path / "out")
    network = tl_jax.load_export(out)
    texts = [*files[1]["test"][0][:6], "", "fine " * 200]
    np.testing.assert_allclose(tl_jax.outputs(network, texts), tl_jax.outputs(run, texts), atol=1e-6)
    assert command.main(["predict", str(out), str(files[0] / "tsv" / "dev.tsv")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 41


PAIR = {"model.head": (("compare", {}),), "data.text": ("text", "other")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method.k": 1, **PAIR},
        {"method.k": 1},
        {"method.name": "linear_probe"},
    ],
)
def test_cached_features_of_texts_train_as_the_network_does_in_batches_of_the_same_lengths(changes, files, tmp_path):
    lines = (files[0] / "all.csv").read_text().splitlines()
    rows = [f"{line},short {i}" for i, line in enumerate(lines)]
    (tmp_path / "x.csv").write_text("\n".join([f"{lines[0]},other", *rows[1:]]) + "\n")
    base = {**CHANGES, "data.source": f"text:{tmp_path / 'x.csv'}", "data.text": ("text",), "batch_size": 4, "lr": 0.01}
    base |= {
        "model.name": "bert_l2_h16_a2", "model.max_length": 24, "method.name": "last_k", "total": (12.0, "steps"),
        "log_every": (1.0, "steps"), "data.sampling": "by_length",
    }  # fmt: skip
    found, lengths = [], []
    for cache in ("", "features"):
        own = {"cache": cache, "cache_dir": str(tmp_path / "cache")} if cache else {}
        config, folder = options.override(options.make(), {**base, **changes, **own}), tmp_path / f"w{cache}"
        train.train(config, folder, verbose=False)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([row["train/loss"] for row in rows if "train/loss" in row])
        parallel = sharding.make_parallel()
        program = single.Single(build.build(config, parallel), parallel)
        sets = program.batches(0, program.initial(0), ["train"], train.never)
        lengths.append([batch["train"]["text"].shape for batch in program.iterate(sets, 0, 12)])
    np.testing.assert_allclose(*found, rtol=1e-5)
    if "method.k" in changes:
        assert [x[:2] for x in lengths[0]] == [x[:2] for x in lengths[1]] and len(set(lengths[0])) > 2


@pytest.mark.slow
def test_the_cost_of_a_step_is_the_mean_over_the_lengths_of_its_batches(files, tmp_path):
    changes = {**CHANGES, "data.source": f"text:{files[0] / 'all.csv'}", "batch_size": 4}
    changes |= {"total": (12.0, "steps"), "log_every": (3.0, "steps"), "data.sampling": "by_length"}
    config, parallel = options.override(options.make(), changes), sharding.make_parallel()
    train.train(config, tmp_path / "w", verbose=False)
    program = single.Single(build.build(config, parallel), parallel)
    state, costs, each = program.initial(0), {}, []
    for batch in program.iterate(program.batches(0, state, ["train"], train.never), 0, 12):
        length = batch["train"]["text"].shape[1]
        if length not in costs:
            costs[length] = program.compile(0, state, batch)[1]
        each.append(costs[length])
    found = json.loads((tmp_path / "w" / "cost.json").read_text())
    assert found["flops_per_step"] == pytest.approx(np.mean([cost["flops_per_step"] for cost in each]))
    assert found["memory_bytes"] == max(cost["memory_bytes"] for cost in each) and len(costs) > 2
    rows = [json.loads(line) for line in (tmp_path / "w" / "timing.jsonl").read_text().splitlines()]
    assert [row["flops_per_second"] * row["seconds"] for row in rows] == pytest.approx(
        [sum(cost["flops_per_step"] for cost in each[i : i + 3]) for i in range(0, 12, 3)], rel=1e-4
    )


@pytest.mark.slow
def test_fit_takes_texts_in_memory(files):
    model = tl_jax.load("word_average_16_8d", tokenizer="words")
    run = tl_jax.fit(model, files[1], method="full", epochs=10, changes={"resamples": 5, "lr": 0.1}, verbose=False)
    assert run.metrics["accuracy"]["value"] > 0.5 and len(jax.devices()) == 4
    assert [row["class"] for row in run.predict([("fine",), "dull dull"])]


TRANSFORMERS = ("bert_l2_h32_a2", "gpt2_l2_h32_a2", "clip_text_l2_h32_a2", "siglip_text_l2_h32_a2")


def with_random_weights(name, folder):
    model = tl_jax.load(name, num_classes=3, tokenizer=folder / "tokenizer.json")
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(0, 0.1, x.shape).astype(np.float32) for path, x in trees.flatten(model.variables).items()}
    return dataclasses.replace(model, variables=trees.unflatten(flat))


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("name", [*TRANSFORMERS, "bigru_8_8d", "textcnn_8d"])
def test_an_export_of_every_kind_of_network_takes_any_number_of_tokens(name, run, tmp_path):
    model = with_random_weights(name, run.folder)
    network = tl_jax.load_export(tl_jax.export(model, tmp_path / "out"))
    texts = ["a fine film", "dull " * 40, "", "fine " * 300]
    found, expected = (tl_jax.outputs(each, texts) for each in (network, model))
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRANSFORMERS[:3], "bigru_8_8d", "word_average_16_8d"])
def test_onnx_runtime_answers_texts_of_any_length(name, run, tmp_path):
    pytest.importorskip("jax2onnx", reason="requirements-onnx.txt is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="requirements-onnx.txt is not installed")
    model = with_random_weights(name, run.folder)
    folder = tl_jax.export(model, tmp_path / "out", onnx=True)
    tokens = tokenizer.read(folder).encode([("a fine film",), ("dull " * 40,), ("",)], 512)
    x = tokens.batch(np.arange(3), 48)
    session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    expected = tl_jax.outputs(model, ["a fine film", "dull " * 40, ""])
    np.testing.assert_allclose(session.run(["logits"], {"inputs": x})[0], expected, atol=1e-5)
