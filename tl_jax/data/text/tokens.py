"""Texts of a source, and their tokens: ragged rows of which a batch takes the next larger of a few lengths."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

PADDING = -1  # in place of the number of a token
BETWEEN = b"\xff"  # a byte that UTF-8 never has
LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)


class Texts(NamedTuple):
    """The texts of N examples, each a tuple of one or two."""

    rows: tuple[tuple[str, ...], ...]

    def __getitem__(self, index: int) -> tuple[str, ...]:
        return self.rows[index]

    def select(self, indices: np.ndarray) -> "Texts":
        return Texts(tuple(self.rows[i] for i in indices))

    def head(self, index: int) -> bytes:
        """All of an example, which its hash reads."""
        return BETWEEN.join(text.encode(errors="surrogatepass") for text in self.rows[index])


def join_texts(rows: Sequence[tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The arrays "text" uint8, UTF-8 end to end with BETWEEN between texts of one example, and "offsets" [N + 1]."""
    encoded = [Texts((row,)).head(0) for row in rows]
    return {"text": np.frombuffer(b"".join(encoded), np.uint8), "offsets": np.cumsum([0, *map(len, encoded)])}


def part_texts(data: np.ndarray, offsets: np.ndarray) -> Texts:
    """What `join_texts` joined; UnicodeDecodeError is a ValueError."""
    whole = data.tobytes()
    rows = [whole[a:b].split(BETWEEN) for a, b in itertools.pairwise(offsets.tolist())]
    return Texts(tuple(tuple(text.decode(errors="surrogatepass") for text in row) for row in rows))


class Tokens(NamedTuple):
    """The tokens of N examples: `flat[starts[i]:starts[i + 1]]`, int32 [T, 2] of numbers and segments.

    cut: how many texts were longer than the network takes. texts: of an example, 2 where they are encoded each by
    itself; example i has the rows 2 i and 2 i + 1 then. labelled: of language modelling, what makes (tokens, labels) of
    the tokens of a batch, see language.py.
    """

    flat: np.ndarray
    starts: np.ndarray
    lengths: tuple[int, ...]  # that batches may have, rising
    cut: int = 0
    texts: int = 1
    labelled: Callable | None = None

    @property
    def counts(self) -> np.ndarray:
        """Tokens of each example, or of the longer of its texts, [N]."""
        return np.diff(self.starts).reshape(-1, self.texts).max(axis=1)

    @property
    def longest(self) -> "Tokens":
        """With batches of one length."""
        return self._replace(lengths=self.lengths[-1:])

    def length_of(self, rows: np.ndarray) -> int:
        """The length of a batch of these examples; -1 is none."""
        rows = rows[rows >= 0]
        most = int(self.counts[rows].max()) if len(rows) else 0
        return next(length for length in self.lengths if length >= most)

    def without(self, missing: np.ndarray) -> "Tokens":
        """With no token at all, not even special ones, where `missing`, bool [N]."""
        gone, counts = np.repeat(missing, self.texts), np.diff(self.starts)
        starts = np.concatenate([[0], np.where(gone, 0, counts).cumsum()])
        return self._replace(flat=self.flat[np.repeat(~gone, counts)], starts=starts)

    def batch(self, rows: np.ndarray, length: int) -> np.ndarray:
        """int32 [B, texts * length, 2] of examples, PADDING behind the tokens of each text; of -1 all zeros."""
        found = np.zeros((len(rows), self.texts, length, 2), np.int32)
        found[..., 0] = PADDING
        for x, i in zip(found, rows.tolist(), strict=True):
            if i < 0:
                x[:] = 0
                continue
            for k in range(self.texts):
                own = self.flat[slice(*self.starts[self.texts * i + k :][:2])]
                x[k, : len(own)] = own
        return found.reshape(len(rows), -1, 2)


class TokenFeatures(NamedTuple):
    """What a frozen network made of every token, in place of the tokens: values [V, N, texts * L, D].

    L is the largest of the tokens' lengths; a batch has that which it would have of the tokens. V: as in `Batches`.
    """

    tokens: Tokens
    values: np.ndarray

    @property
    def longest(self) -> "TokenFeatures":
        """With batches of one length."""
        return self._replace(tokens=self.tokens.longest)

    def length_of(self, rows: np.ndarray) -> int:
        return self.tokens.length_of(rows)

    def batch(self, rows: np.ndarray, length: int, epochs: np.ndarray) -> np.ndarray:
        """[B, texts * length, D] of examples, each as in its epoch; of -1 any."""
        views, count, places, size = self.values.shape
        apart = self.values.reshape(views, count, self.tokens.texts, places // self.tokens.texts, size)
        return apart[epochs % views, rows, :, :length].reshape(len(rows), -1, size)


def ragged(rows: Sequence[np.ndarray], most: int, cut: int = 0, texts: int = 1) -> Tokens:
    """Rows int32 [n, 2] of at most `most` tokens, with those of LENGTHS that batches of them may need; see `Tokens`."""
    counts = np.array([len(row) for row in rows], np.int64)
    longest = min(most, -(-int(counts.max(initial=1)) // 8) * 8)
    lengths = (*(length for length in LENGTHS if length < longest), longest)
    flat = np.concatenate([np.zeros((0, 2), np.int32), *rows])
    return Tokens(flat, np.concatenate([[0], counts.cumsum()]), lengths, cut, texts)


def stack(batches: Sequence[np.ndarray], texts: int) -> np.ndarray:
    """Arrays [B, ...] of n batches as one, [n, B, ...].

    Tokens, or their features, [B, texts * L, C] may have an L in each batch: they get the largest, with padding.
    """
    if len({batch.shape for batch in batches}) == 1:
        return np.stack(batches)
    longest, found = max(batch.shape[1] for batch in batches) // texts, []
    for batch in batches:
        apart = batch.reshape(len(batch), texts, -1, batch.shape[-1])
        rows = np.zeros((*apart.shape[:2], longest, batch.shape[-1]), batch.dtype)
        if batch.dtype == np.int32:  # features say in their last number that no token is there
            rows[..., 0] = PADDING
        rows[:, :, : apart.shape[2]] = apart
        found.append(rows.reshape(len(batch), -1, batch.shape[-1]))
    return np.stack(found)


def describe(tokens: Tokens, batches: Iterable[np.ndarray]) -> str:
    """How long the texts are, and the share of padding in batches of these examples."""
    counts, batches = np.diff(tokens.starts), list(batches)
    places = sum(len(rows) * tokens.texts * tokens.length_of(rows) for rows in batches)
    share = 1 - sum(int(counts.reshape(-1, tokens.texts)[rows].sum()) for rows in batches) / max(places, 1)
    cut = f", {tokens.cut:,} are cut" if tokens.cut else ""
    short, middle, long = counts.min(initial=counts.max(initial=0)), np.median(counts), counts.max(initial=0)
    return f"texts of {short} to {long} tokens, half of them up to {middle:.0f}{cut}; batches are padded by {share:.0%}"
