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

    def read(self, item: tuple[str, ...]) -> np.ndarray:
        """int32 [T, 2] of one text or pair."""
        return self.tokenizer.encode([item], self.card.max_length).flat

    def stack(self, rows: Sequence[np.ndarray], size: int) -> np.ndarray:
        """int32 [size, L, 2], with padding behind the tokens, and rows of zeros."""
        tokens = ragged(rows, self.card.max_length)._replace(lengths=self.lengths)
        every = np.arange(len(rows))
        return tokens.batch(np.concatenate([every, np.full(size - len(rows), -1)]), tokens.length_of(every))
