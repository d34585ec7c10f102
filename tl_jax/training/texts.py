"""The texts of a run: its tokenizer, read or made of the training texts, and vectors of its words."""

import collections
from collections.abc import Iterator

import jax.numpy as jnp

from tl_jax.core import trees
from tl_jax.data.examples import Source
from tl_jax.data.text import tokenizer
from tl_jax.data.text.tokenizer import Tokenizer
from tl_jax.runtime.log import log
from tl_jax.training.settings import ModelSettings
from tl_jax.weights import word_vectors
from tl_jax.weights.load import Loaded
from tl_jax.weights.text_inputs import TABLE, Text


def text_of(model: ModelSettings, train: Source) -> Text:
    """What the config says of texts; ValueError where the data has none, or where it contradicts itself."""
    if "text" not in train.kinds:
        if given := [f"model.{name}" for name in ("tokenizer", "vectors") if getattr(model, name)]:
            raise ValueError(f"{' and '.join(given)}: {train.name} holds no texts")
        return Text(None, model.max_length, model.pooling)
    kind = model.tokenizer.partition(":")[0]
    if model.vectors and (model.weights or kind not in ("", "words")):
        raise ValueError("model.vectors gives the words of a network without weights: leave out model.weights, and "
                         "model.tokenizer unless it is words:SIZE")  # fmt: skip
    found = None
    if model.vectors:
        found = _of_vectors(model, train)
    elif kind in tokenizer.MADE:
        found = tokenizer.train(model.tokenizer, _texts(train))
    elif kind:
        found = tokenizer.read(model.tokenizer)
    return Text(found, model.max_length, model.pooling)


def _texts(train: Source) -> Iterator[str]:
    return (text for row in train.of_kind("text").inputs.rows for text in row)


def _of_vectors(model: ModelSettings, train: Source) -> Tokenizer:
    """The most frequent words of the training texts, and those with which the file of vectors begins."""
    size = tokenizer.check_kind(model.tokenizer or "words")[1]
    first = list(word_vectors.read(model.vectors, limit=size).words)
    lowercase = all(word == word.lower() for word in first)
    words = tokenizer.frequent("words", _texts(train), lowercase)
    return tokenizer.of_words([*dict.fromkeys([*words[: size - 1], *first])][: size - 1], "words", lowercase)


def with_vectors(loaded: Loaded, path: str, train: Source, seed: int) -> Loaded:
    """The network with the vectors of a file in its embedding; ValueError where their size is another."""
    own = tokenizer.known(loaded.card)
    vocabulary = tokenizer.vocabulary(own)
    vectors = word_vectors.read(path, keep=vocabulary)
    counts = collections.Counter(own.encode(train.inputs.rows, loaded.card.max_length).flat[:, 0].tolist())
    table, coverage = word_vectors.table_for(
        vocabulary, vectors, {word: counts[i] for word, i in vocabulary.items()}, seed=seed, size=own.size
    )
    flat = trees.flatten(loaded.variables)
    if flat[TABLE].shape != table.shape:
        name = loaded.card.model
        raise ValueError(f"{path} has vectors of {table.shape[1]} numbers, {name} has {flat[TABLE].shape[1]}: "
                         f"name the network that takes them, such as bilstm_256_{table.shape[1]}d")  # fmt: skip
    log(f"{path}: vectors of {coverage.words:.1%} of {len(vocabulary):,} words, {coverage.tokens:.1%} of the training "
        f"texts; the others are random, such as {', '.join(coverage.unknown[:5])}")  # fmt: skip
    variables = trees.unflatten({**flat, TABLE: jnp.asarray(table)})
    return loaded._replace(variables=variables, origins={**loaded.origins, TABLE: f"vectors {path}"})
