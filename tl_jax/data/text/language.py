"""Labels of tokens, for the tasks of language modelling: made of the tokens of a batch, of no column of a source."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from tl_jax.data.text.tokenizer import Tokenizer
from tl_jax.data.text.tokens import PADDING

MASKS = ("[MASK]", "<mask>")
ENDS = ("<|endoftext|>", "[SEP]", "</s>", "[EOS]", "<eos>")  # of a text
CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1  # shares: of the ordinary tokens; of those that are chosen


class Vocabulary(NamedTuple):
    """The number of the token that hides others, -1 where there is none, and the ordinary ones, rising."""

    mask: int
    ordinary: np.ndarray


@functools.lru_cache(maxsize=16)
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """What masking must know of a tokenizer."""
    special = specials(tokenizer)
    mask = next((special[name] for name in MASKS if name in special), -1)
    numbers = sorted(tokenizer.open().get_vocab().values())
    return Vocabulary(mask, np.setdiff1d(np.array(numbers, np.int32), np.array([*special.values()], np.int32)))


def specials(tokenizer: Tokenizer) -> dict[str, int]:
    """{token: number} of the special tokens, which stand for no piece of a text."""
    added = tokenizer.open().get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def end_of(tokenizer: Tokenizer) -> int:
    """The number of the token that ends a text; -1 where there is none."""
    special = specials(tokenizer)
    return next((special[name] for name in ENDS if name in special), -1)


def next_tokens(x: np.ndarray) -> np.ndarray:
    """Labels int32 [B, L] of tokens [B, L, 2]: the number of the token behind each, PADDING where there is none."""
    found = np.full(x.shape[:2], PADDING, np.int32)
    found[:, :-1] = np.where(x[:, :-1, 0] >= 0, x[:, 1:, 0], PADDING)
    return found


def most_masked(length: int) -> int:
    """How many of so many tokens are chosen."""
    return max(1, round(CHOSEN * length))


def masked(known: Vocabulary, x: np.ndarray, draws: Iterable[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, L, 2] with some replaced, and the labels int32 [B, P, 2]: position and token, PADDING behind them.

    Of n ordinary tokens of an example max(1, round(0.15 n)) are chosen. Of these 80 % become the mask token, 10 % a
    random ordinary one, 10 % stay (Devlin et al. 2019, section 3.1). draws: the key (seed, counter) of each example.
    P is `most_masked` of L.
    """
    x, most = x.copy(), most_masked(x.shape[1])
    labels = np.full((len(x), most, 2), PADDING, np.int32)
    is_ordinary = np.zeros(max(known.ordinary[-1], x[..., 0].max()) + 2, bool)  # the last is that of PADDING, -1
    is_ordinary[known.ordinary] = True
    for row, own, key in zip(x, labels, draws, strict=True):
        there = np.flatnonzero(is_ordinary[row[:, 0]])
        if not len(there):
            continue
        rng = np.random.Generator(np.random.Philox(key=key))
        chosen = np.sort(rng.choice(there, most_masked(len(there)), replace=False))
        own[: len(chosen)] = np.stack([chosen, row[chosen, 0]], axis=1)
        kind, other = rng.random(len(chosen)), rng.choice(known.ordinary, len(chosen))
        kept = np.where(kind < MASKED + RANDOM, other, row[chosen, 0])
        row[chosen, 0] = np.where(kind < MASKED, known.mask, kept)
    return x, labels


def labels_of(task: str, tokenizer: Tokenizer) -> Callable:
    """What makes (tokens, labels) of tokens [B, L, 2] and draws; ValueError where the tokenizer cannot mask."""
    if task == "next_token":
        return _with_next
    known = vocabulary(tokenizer)
    if known.mask < 0:
        raise ValueError(f"the tokenizer has none of the mask tokens {', '.join(MASKS)}: the task masked_lm needs one, "
                         "such as model.tokenizer = 'wordpiece:8000' makes")  # fmt: skip
    return functools.partial(masked, known)


def _with_next(x: np.ndarray, draws: object) -> tuple[np.ndarray, np.ndarray]:
    return x, next_tokens(x)


def pieces(tokenizer: Tokenizer, text: str, max_length: int) -> list[str]:
    """A text in pieces of at most `max_length` tokens, special ones included; their sum is the text.

    A piece ends with a word, unless that is longer than a piece.
    """
    opened = tokenizer.open()
    found = opened.encode(text.encode(errors="replace").decode(), add_special_tokens=False)
    room, words = max(1, max_length - opened.num_special_tokens_to_add(False)), found.word_ids
    made, first, start = [], 0, 0
    while first < len(words):
        stop = min(first + room, len(words))
        while True:
            stop = _word_start(words, first, stop)
            piece = text[start : found.offsets[stop - 1][1] if stop < len(words) else None]
            # By itself a piece may have another token, such as that of a space before the first word.
            if stop == first + 1 or len(opened.encode(piece).ids) <= max_length:
                break
            stop -= 1
        made += [piece] * bool(piece)  # the tokens of one character may be more than a piece has
        first, start = stop, start + len(piece)
    return made or [text]


def _word_start(words: list[int | None], first: int, stop: int) -> int:
    """The last place up to `stop` where a word begins, or all end; `stop`, where that is not behind `first`."""
    place = stop
    while first < place < len(words) and words[place] is not None and words[place] == words[place - 1]:
        place -= 1
    return place if place > first else stop
