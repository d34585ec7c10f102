"""Tokenizers, all as a tokenizer.json of the library `tokenizers`: read, or made from the texts of a source."""

import collections
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tl_jax.core import files
from tl_jax.core.card import Card
from tl_jax.data.text.tokens import Tokens, ragged

FILE = "tokenizer.json"
UNKNOWN = "[UNK]"
SPECIAL = (UNKNOWN, "[CLS]", "[SEP]", "[MASK]")  # of those that are trained
# Words as in the Penn Treebank, whose contractions GloVe knows: do n't, it 's.
RULES = {"words": r"\w+(?=n't)|n't|'(?:s|re|ve|ll|d|m)\b|\w+|[^\w\s]", "chars": r"\S"}
SIZES = {"words": 30_000, "chars": 8_000, "wordpiece": 8_000, "bpe": 8_000}
MADE = tuple(SIZES)
_known: dict[str, "Tokenizer"] = {}  # every one that was read or made, by its sha256


class Tokenizer(NamedTuple):
    """text: of the tokenizer.json. sha256: of that text, which weight cards hold. size: how many tokens it knows."""

    text: str
    sha256: str
    size: int

    @property
    def lowercase(self) -> bool:
        """Whether its normalizer, of any kind, turns upper case into lower case."""
        normalizer = self.open().normalizer
        return normalizer is not None and "A" not in normalizer.normalize_str("A")

    def open(self, max_length: int = 0) -> tokenizers.Tokenizer:
        """That of the library, without the padding that the file may ask for; it cuts to max_length, if above 0."""
        return _open(self.text, max_length)

    def encode(self, rows: Sequence[tuple[str, ...]], max_length: int, texts: int = 1) -> Tokens:
        """The tokens of texts or pairs, cut to `max_length` with special tokens kept, the longer of two texts first.

        texts: 2 where those of an example are encoded each by itself; ValueError where there are not two.
        """
        opened = self.open(max_length)
        if texts == 2:
            if wrong := sum(len(row) != 2 for row in rows):
                raise ValueError(f"{wrong:,} of {len(rows):,} examples have one text, and the head compares two: give "
                                 "pairs, of files of rows by data.text=(one column, the other)")  # fmt: skip
            rows = [(text,) for row in rows for text in row]
        # A lone surrogate, such as of a wrong decoding, is no text to the library.
        rows = [tuple(text.encode(errors="replace").decode() for text in row) for row in rows]
        found = opened.encode_batch([row[0] if len(row) == 1 else row for row in rows])
        pairs = [np.stack([each.ids, each.type_ids], 1).astype(np.int32).reshape(-1, 2) for each in found]
        return ragged(pairs, max_length, sum(bool(each.overflowing) for each in found), texts)

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.open().decode(list(numbers))

    def save(self, folder: pathlib.Path) -> None:
        with files.atomic_write(folder / FILE) as file:
            file.write(self.text.encode())


@functools.lru_cache(maxsize=16)
def _open(text: str, max_length: int) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer.from_str(text)
    found.no_padding()
    found.no_truncation() if not max_length else found.enable_truncation(max_length)
    return found


def known(card: Card) -> Tokenizer:
    """The tokenizer of a card, which was read or made in this process; ValueError where there was none."""
    if card.tokenizer not in _known:
        fix = f"put its {FILE} beside the weight file, or name it or a kind of tokenizer by model.tokenizer"
        raise ValueError(f"{card.model} has no tokenizer: {fix}")
    return _known[card.tokenizer]


def _keep(text: str) -> Tokenizer:
    size = tokenizers.Tokenizer.from_str(text).get_vocab_size()
    found = Tokenizer(text, hashlib.sha256(text.encode()).hexdigest(), size)
    return _known.setdefault(found.sha256, found)


def read(path: str | pathlib.Path) -> Tokenizer:
    """Reads a tokenizer.json, or that of a folder; FileNotFoundError, or ValueError for what is none."""
    path = pathlib.Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; expected a {FILE}")
    try:
        return _keep(path.read_bytes().decode())
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is no {FILE} of the library tokenizers: {str(error)[:200]}") from None


def find_for(weights: str | pathlib.Path) -> Tokenizer | None:
    """That in the folder of a weight file, or in the folder itself; None where there is none."""
    path = pathlib.Path(weights).expanduser()
    folder = path if path.is_dir() else path.parent
    return read(folder) if str(weights) and (folder / FILE).is_file() else None


def check_kind(kind: str) -> tuple[str, int]:
    """(one of MADE, the number of tokens) of "words", "chars:5000", ...; ValueError."""
    name, colon, size = kind.partition(":")
    if name not in MADE or (colon and not (size.isdecimal() and int(size) > len(SPECIAL))):
        raise ValueError(
            f"there is no tokenizer {kind!r}; expected a {FILE}, or one of {', '.join(MADE)}, or words:5000"
        )
    return name, int(size) if colon else SIZES[name]


def train(kind: str, texts: Iterable[str], lowercase: bool = True) -> Tokenizer:
    """Makes a tokenizer from texts. kind: one of MADE, with ":" and the most tokens that it may have.

    words and chars know those that are frequent, and no special token but [UNK]. wordpiece (Schuster & Nakajima 2012)
    and bpe (Sennrich et al. 2016, of bytes) learn parts of words, and put [CLS] and [SEP] around them.
    """
    name, size = check_kind(kind)
    if name in RULES:
        return of_words(frequent(name, texts, lowercase)[: size - 1], name, lowercase)
    found = tokenizers.Tokenizer(models.BPE())
    options = {"vocab_size": size, "show_progress": False, "special_tokens": list(SPECIAL)}
    if name == "bpe":
        lower = [normalizers.Lowercase()] if lowercase else []
        found.normalizer = normalizers.Sequence([normalizers.NFC(), *lower])
        found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        found.train_from_iterator(texts, trainers.BpeTrainer(**options))
    else:
        found = _wordpiece(found, texts, options, lowercase)
    ends = [(each, found.token_to_id(each)) for each in ("[CLS]", "[SEP]")]
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return _keep(found.to_str(pretty=False))


def _wordpiece(
    learner: tokenizers.Tokenizer, texts: Iterable[str], options: dict[str, Any], lowercase: bool
) -> tokenizers.Tokenizer:
    """WordPiece whose pieces are those of a BPE that sees where words begin.

    The library's own trainer breaks ties by the order of a hash table, which is another in every process.
    """
    normalizer, words = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    start = "\u2581"  # what Metaspace puts before a word
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Metaspace(start, "always")])
    learner.train_from_iterator(texts, trainers.BpeTrainer(**options))
    numbers, size = learner.get_vocab(), options["vocab_size"]
    learned = [piece for piece in sorted(numbers, key=numbers.get) if piece not in (*SPECIAL, start)]
    pieces = [piece[1:] if piece.startswith(start) else f"##{piece}" for piece in learned]
    letters = [piece for piece in learned if len(piece) == 1]  # each may begin a word too
    vocabulary = {piece: i for i, piece in enumerate([*dict.fromkeys([*SPECIAL, *letters, *pieces])][:size])}
    found = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    found.normalizer, found.pre_tokenizer, found.decoder = normalizer, words, decoders.WordPiece()
    found.add_special_tokens(list(SPECIAL))
    return found


class _Rules(NamedTuple):
    normalizer: normalizers.Normalizer
    pre_tokenizer: pre_tokenizers.PreTokenizer

    def pieces(self, text: str) -> list[str]:
        text = self.normalizer.normalize_str(text)
        return [piece for piece, _ in self.pre_tokenizer.pre_tokenize_str(text)]


def _rules(kind: str, lowercase: bool) -> _Rules:
    rules = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    parts = [(RULES[kind], "isolated"), (r"\s+", "removed")]
    splits = [pre_tokenizers.Split(Regex(each), behaviour) for each, behaviour in parts]
    return _Rules(normalizers.Sequence(rules), pre_tokenizers.Sequence(splits))


def frequent(kind: str, texts: Iterable[str], lowercase: bool) -> list[str]:
    """The words or characters of texts, the most frequent first."""
    rules = _rules(kind, lowercase)
    counts = collections.Counter(piece for text in texts for piece in rules.pieces(text))
    return sorted(counts, key=lambda piece: (-counts[piece], piece))


def of_words(words: Sequence[str], kind: str = "words", lowercase: bool = True) -> Tokenizer:
    """A tokenizer that knows these words, or characters, by their place, from 1; 0 is [UNK]."""
    rules = _rules(kind, lowercase)
    numbers = {word: i for i, word in enumerate(dict.fromkeys([UNKNOWN, *words]))}
    found = tokenizers.Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
    found.normalizer, found.pre_tokenizer = rules
    return _keep(found.to_str(pretty=False))


def vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """{token: its number}, in the order of the numbers."""
    return dict(sorted(tokenizer.open().get_vocab().items(), key=lambda item: item[1]))
