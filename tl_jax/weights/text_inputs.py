"""Which tokenizer belongs to weights of text, and what else is asked of their input."""

import pathlib
from typing import NamedTuple

from tl_jax.core.card import CASE, Card
from tl_jax.data.text import tokenizer as tokenizers
from tl_jax.data.text.tokenizer import Tokenizer
from tl_jax.weights import hub

TABLE = "params/backbone/stem/tok_embed/embedding"


class Text(NamedTuple):
    """What is asked of a network of text; empty: as the weight card says."""

    tokenizer: Tokenizer | None = None
    max_length: int = 0
    pooling: str = ""


NO_TEXT = Text()


def fit_card(card: Card, text: Text, path: str | pathlib.Path | None) -> Card:
    """The card with the tokenizer that is asked for, else the one beside the weight file.

    path: of the weights, whose vocabulary the card has already. Raises ValueError for another tokenizer than the
    card's, another case, one with more tokens than the network, and lengths beyond its positions.
    """
    if card.input != "text":
        if given := [name for name, value in text._asdict().items() if value]:
            raise ValueError(f"{', '.join(given)}: {card.model} reads an input {card.input!r}, no text")
        return card
    file = hub.companion(path, tokenizers.FILE) if path else None
    there = tokenizers.read(file) if file else None
    asked, problems = text.tokenizer or there, []
    if text.tokenizer and there and text.tokenizer.sha256 != there.sha256:
        problems.append(f"the tokenizer that is asked for is {text.tokenizer.sha256[:12]}, that beside the weights "
                        f"{there.sha256[:12]}: the weights know the tokens of theirs")  # fmt: skip
    if asked and card.tokenizer and asked.sha256 != card.tokenizer:
        problems.append(f"the tokenizer is {asked.sha256[:12]}, the card says {card.tokenizer[:12]}")
    if asked and card.lowercase not in (None, asked.lowercase):
        problems.append(f"the tokenizer reads {CASE[asked.lowercase]}, the card says {CASE[card.lowercase]}")
    if asked and path and asked.size > card.vocab:
        problems.append(f"the tokenizer has {asked.size:,} tokens, the network's embedding {card.vocab:,}")
    if text.max_length > card.max_length:
        problems.append(f"max_length={text.max_length}, the card says {card.max_length} at most")
    if problems:
        raise ValueError(
            f"the texts of {path or card.model} would not be what the weights expect: {'; '.join(problems)}"
        )
    given = {"max_length": text.max_length, "pooling": text.pooling}
    changes = {name: value for name, value in given.items() if value}
    if asked:
        vocab = card.vocab if path else asked.size
        changes |= {"tokenizer": asked.sha256, "vocab": vocab, "lowercase": asked.lowercase}
    return card.replace(**changes)


def know_parts(card: Card, path: str | pathlib.Path) -> None:
    """Reads the tokenizer beside the weights of a fusion, whose card names it; ValueError for another one."""
    for part in card.parts:
        if part.input == "text":
            fit_card(part, NO_TEXT, path)
