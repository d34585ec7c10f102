"""The embedded texts and word vectors: what they hold, that they hold nothing of each other, and that they transfer."""

import ast
import collections
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import tl_jax
from tl_jax.data import sources
from tl_jax.data.readers import docstrings
from tl_jax.weights import formats, hub

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_each_text_is_in_the_file_and_part_that_its_name_says_and_there_once():
    source = sources.load("docstrings", "train")
    assert source.class_names == docstrings.CLASSES and len(source) > 1000
    counts = collections.Counter(source.labels.tolist())
    assert len(counts) == 10 and min(counts.values()) >= 30
    texts = [row[0] for row in source.inputs.rows]
    assert len(set(texts)) == len(texts) == len(set(source.ids))
    import sklearn

    for i in range(0, len(source), 97):
        part, own, line = source.ids[i].split("/")[0], *source.ids[i].partition("/")[2].split(":")
        assert part == source.class_names[source.labels[i]] == own.split("/")[0]
        tree = ast.parse((pathlib.Path(sklearn.__file__).parent / own).read_text())
        node = next(n for n in ast.walk(tree) if getattr(n, "lineno", 0) == int(line) and hasattr(n, "body"))
        assert " ".join(ast.get_docstring(node).split()).startswith(texts[i][:20].rstrip())


def test_a_split_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"docstrings has no split 'test'; it has train\. Take a slice"):
        sources.load("docstrings", "test")


def test_the_vectors_are_small_known_and_read_as_float32():
    path = hub.resolve("builtin:docstrings")
    assert sum(file.stat().st_size for file in path.parent.iterdir()) < 2**20
    stored = next(iter(formats.read(path)[0].values()))
    model = tl_jax.load("", "builtin:docstrings", num_classes=0)
    table = model.variables["params"]["backbone"]["stem"]["tok_embed"]["embedding"]
    assert table.dtype == np.float32 and np.array_equal(table, stored.astype(np.float32)) and not table[0].any()
    text = "Compute the kernel matrix"
    words = tl_jax.data.text.tokenizer.known(model.card).open().encode(text).ids
    np.testing.assert_allclose(tl_jax.features(model, [text])[0], np.asarray(table)[words].mean(0), atol=1e-6)


@pytest.mark.slow
def test_five_examples_of_each_part_are_enough_to_beat_counting_words():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    every = sources.load("docstrings", "train")
    texts, place = [row[0] for row in every.inputs.rows], {name: i for i, name in enumerate(every.ids)}
    features = {
        "vectors": tl_jax.features(tl_jax.load("", "builtin:docstrings", num_classes=0), texts),
        "words": TfidfVectorizer(sublinear_tf=True).fit_transform(texts),
    }
    scores = collections.defaultdict(list)
    for seed in range(4):
        train = [place[name] for name in sources.load("docstrings", "train", shots=5, seed=seed).ids]
        test = np.setdiff1d(np.arange(len(every)), train)
        for name, x in features.items():
            fitted = LogisticRegression(C=0.1 if name == "vectors" else 10, max_iter=1000).fit(
                x[train], every.labels[train]
            )
            scores[name].append(fitted.score(x[test], every.labels[test]))
    assert np.mean(scores["vectors"]) > np.mean(scores["words"]) > 0.3


@pytest.mark.slow
def test_the_command_makes_the_vectors_that_are_embedded(tmp_path):
    command = [sys.executable, ROOT / "experiments/docstring_vectors/make.py", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    own = hub.resolve("builtin:docstrings")
    assert (tmp_path / "tokenizer.json").read_bytes() == (own.parent / "tokenizer.json").read_bytes()
    made, there = (next(iter(formats.read(file)[0].values())) for file in (tmp_path / "model.safetensors", own))
    np.testing.assert_allclose(made, there, atol=0.02)
