"""The texts that a served network reads, as batches of tokens of a few lengths."""

from collections.abc import Sequence

import numpy as np

from tl_jax.core.card import Card
from tl_jax.data.text import tokenizer
from tl_jax.data.text.tokens import ragged

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Texts:
    """lengths: those that batches have, all of them compiled before the first request."""

    def __init__(self, card: Card):
        self.card, self.tokenizer = card, tokenizer.known(card)
        self.lengths = (*(length for length in LENGTHS if length < card.max_length), card.max_length)

    def read(self, item: tuple[str, ...]) -> list[np.ndarray]:
        """The tokens of one example: one row int32 [T, 2], or two where its texts are encoded each by itself."""
        found = self.tokenizer.encode([item], self.card.max_length, self.card.texts)
        return np.split(found.flat, found.starts[1:-1])

    def stack(self, examples: Sequence[list[np.ndarray]], size: int) -> np.ndarray:
        """int32 [size, texts * L, 2], with padding behind the tokens, and rows of zeros."""
        rows, every = [row for example in examples for row in example], np.arange(len(examples))
        tokens = ragged(rows, self.card.max_length, texts=self.card.texts)._replace(lengths=self.lengths)
        return tokens.batch(np.concatenate([every, np.full(size - len(every), -1)]), tokens.length_of(every))
