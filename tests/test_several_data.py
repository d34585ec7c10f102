"""Several inputs of one example come from a table of files or from memory, and an empty cell is a missing input."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from several_inputs import OPTIONS, WORDS, write

from tl_jax import models
from tl_jax.data import duplicates, pipeline, sources
from tl_jax.data.examples import join, join_domains
from tl_jax.data.sealed import SealedLabels
from tl_jax.data.several import Several
from tl_jax.data.text import tokenizer
from tl_jax.data.text.tokens import PADDING, Texts
from tl_jax.data.views import View

READ = {name.removeprefix("data."): value for name, value in OPTIONS.items()}
EMPTY = {(3, "photo"), (5, "title"), (7, "ink"), (7, "width")}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("several"), 24, EMPTY)


def read(path, split="train", **more):
    return sources.load(f"several:{path}", split, **{**READ, **more})


def views(source):
    cards = {"image": models.get("lenet").card.replace(input_size=14), "table": models.get("mlp_small").card}
    cards["table"] = cards["table"].replace(columns=source.columns, mean=(0.0,) * 2, std=(1.0,) * 2)
    found = tokenizer.train("words", [text for row in source.of_kind("text").inputs.rows for text in row])
    text = models.get("bert_l1_h16_a2").card
    cards["text"] = text.replace(tokenizer=found.sha256, vocab=found.size)
    return {kind: View(card) for kind, card in cards.items()}


def test_a_row_gives_the_pixels_the_text_and_the_numbers_that_stand_in_the_file(path):
    source, lines = read(path), [line.split(",") for line in path.read_text().splitlines()[1:]]
    assert (source.input, source.kinds, source.columns) == ("several", ("image", "text", "table"), ("ink", "width"))
    assert source.class_names == tuple(sorted(WORDS[:4])) and len(source) == len(lines) == 24
    made = views(source)
    batches = list(pipeline.eval_batches(source, made, 10))
    batch = {name: np.concatenate([b[name] for b in batches])[:24] for name in batches[0] if name != "text"}
    tokens = np.concatenate([np.pad(b["text"], ((0, 0), (0, 8 - b["text"].shape[1]), (0, 0))) for b in batches])[:24]
    known = tokenizer.known(made["text"].card)
    for i, (photo, title, ink, width, label) in enumerate(lines):
        image, text, table = ((i, name) not in EMPTY for name in ("photo", "title", "ink"))
        there = [batch[f"{kind}:present"][i] for kind in ("image", "text", "table")]
        assert there == [image, text, table] and source.class_names[batch["label"][i]] == label
        pixels = np.asarray(Image.open(path.parent / photo).convert("RGB")) if image else np.zeros((14, 14, 3))
        np.testing.assert_array_equal(batch["image"][i], pixels)
        words = tokens[i, :, 0][tokens[i, :, 0] != PADDING].tolist() if text else []
        assert known.decode(words) == title
        numbers = [float(ink), float(width)] if table else [0, 0]
        np.testing.assert_array_equal(batch["table"][i], np.array(numbers, np.float32))


def test_select_join_domains_and_slices_keep_the_inputs_of_an_example_together(path):
    source = read(path)
    parts = [read(path, split) for split in ("train[:50%]", "train[50%:]")]
    assert sorted(parts[0].ids + parts[1].ids) == sorted(source.ids)
    back = join(parts)
    order = np.argsort([source.ids.index(i) for i in back.ids])
    for other in (back.select(order), join_domains([source]).select(np.arange(24))):
        for i in range(24):
            a, b = source[i], other[i]
            assert a["label"] == b["label"]
            for kind in source.kinds:
                np.testing.assert_equal(a["several"][kind], b["several"][kind])
    assert back.select(order).fingerprint == source.fingerprint != parts[0].fingerprint
    changed = source.inputs.parts["table"].copy()
    changed[0] += 1
    other = dataclasses.replace(source, inputs=source.inputs._replace(parts={**source.inputs.parts, "table": changed}))
    assert other.fingerprint != source.fingerprint
    assert len(read(path, shots=2)) == 8
    sealed = read(path, sealed={f"several:{path}"})
    assert isinstance(sealed.labels, SealedLabels)


def test_a_duplicate_has_all_inputs_in_common(path):
    source = read(path)
    text, table = list(source.of_kind("text").inputs.rows), source.of_kind("table").inputs.copy()
    files = source.of_kind("image").inputs
    paths = list(files.paths)
    paths[1], text[1], table[1] = paths[0], text[0], table[0]  # a copy of row 0
    paths[2], table[2] = paths[0], table[0]  # with another text
    parts = {"image": files._replace(paths=tuple(paths)), "text": Texts(tuple(text)), "table": table}
    inputs = source.inputs._replace(parts=parts)
    other = dataclasses.replace(source, inputs=inputs).select(np.array([1, 2]))
    found = duplicates.find({"train": source.select(np.array([0])), "val": other}, ["train"])
    assert found["across"] == {"exact": 1, "near": 0, "mirrored": 0}
    gone = read(path).select(np.array([3, 3])).inputs.present["image"]
    assert not gone.any()  # equal but for the image, which both lack
    lacking = dataclasses.replace(source.select(np.array([3, 3])), ids=("a", "b"))
    assert duplicates.find({"train": lacking}, ["train"])["within"]["exact"] == 0
    assert found["pairs"] == [["exact", f"train: {source.ids[0]}", f"val: {source.ids[1]}"]]


def test_a_row_without_any_input_and_cells_that_cannot_be_read_are_named(tmp_path):
    path = write(tmp_path, 8)
    lines = path.read_text().splitlines()

    def refused(match, *changed, **more):
        rows = list(lines)
        for i, line in changed:
            rows[i] = line
        path.write_text("\n".join(rows) + "\n")
        with pytest.raises(ValueError, match=match):
            read(path, **more)

    refused(r"1 examples have none of the inputs image, text, table.*\n.*row 3", (2, ",,,,one"))
    refused(r"1 cells of data.columns are not numbers.*\n.*row 3: width is missing", (2, "1.png,a,1.5,,one"))
    refused(r"row 3: ink is 'much', expected a number", (2, "1.png,a,much,2,one"))
    refused(r"1 of 8 files .* not images.*\n.*row/3, column 'photo': ", (2, "products.csv,a,1,2,one"))
    refused(r"data.image: 'foto', nearest: photo|data.image: 'foto'", image="foto")
    refused(r"at least two of data.image, data.text and data.columns", text=(), columns=())
    refused(r"'ink' is named 2 times", columns=("ink",), text=("ink",))
    path.write_bytes("\n".join(lines).encode() + b"\n0.png,\xff,1,2,one\n")
    with pytest.raises(ValueError, match="is not UTF-8 text: byte 0xff in line 10"):
        read(path)
    with pytest.raises(ValueError, match=r"data.image='photo' names columns of several: sources; digits has none"):
        sources.load("digits", image="photo")


def test_arrays_in_memory_are_written_and_read_as_they_were(tmp_path, path):
    from tl_jax.api import inputs

    rng = np.random.default_rng(0)
    images = [None, *rng.integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)]
    texts, rows = ["a", "b", None, "d"], [*rng.normal(size=(3, 2)).astype(np.float32), None]
    pair = {"image": images, "text": texts, "table": rows}, np.array([0, 1, 1, 0])
    named = inputs.by_split(pair)
    inputs.write_arrays(named, tmp_path / "x.npz")
    read = sources.load(f"arrays:{tmp_path / 'x.npz'}")
    assert isinstance(read.inputs, Several) and read.fingerprint == named["train"].fingerprint
    for i in range(4):
        found = read[i]["several"]
        np.testing.assert_equal(found["image"], images[i])
        np.testing.assert_equal(found["table"], rows[i])
        assert found["text"] == (texts[i] if texts[i] is None else (texts[i],))
    with pytest.raises(ValueError, match="different numbers of examples"):
        inputs.by_split(({"image": images, "text": texts[:3]}, np.zeros(4, int)))
    with pytest.raises(ValueError, match="at least two of"):
        inputs.by_split(({"image": images, "sound": texts}, np.zeros(4, int)))
