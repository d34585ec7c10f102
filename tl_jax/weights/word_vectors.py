"""Word vectors: the text files of GloVe, word2vec and fastText, and the embedding table that they give a vocabulary.

A line is a word and its numbers (Pennington et al. 2014). word2vec and fastText begin with a line "count dim". A word
may hold spaces, as some of GloVe's do: the numbers are the last of a line.
"""

import os
import pathlib
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tl_jax.core import messages

BLOCK = 2**24  # bytes that are read at once
LONGEST = 2**22  # bytes of a line: more is no text of numbers
PADDING = ("<pad>", "[PAD]", "<PAD>")
_HEADER = re.compile(rb"\d{1,18}[ \t]+\d{1,9}\s*")


class Vectors(NamedTuple):
    """Words with their vectors.

    words: the row of each, in the order of the file; table: float32 [N, D]. repeated: words that the file has more than
    once, of which the first counts.
    """

    words: dict[str, int]
    table: np.ndarray
    repeated: tuple[str, ...]


class Coverage(NamedTuple):
    """How much of a vocabulary has a vector.

    found: words by their own spelling; lowered: by their lower-case form alone; unknown: the others, padding aside.
    words: the share of the vocabulary with a vector; tokens: that of its tokens, None where they were not counted.
    """

    found: int
    lowered: int
    unknown: tuple[str, ...]
    words: float
    tokens: float | None


def read(path: str | pathlib.Path, limit: int = 0, keep: Collection[str] = ()) -> Vectors:
    """Reads a text file of word vectors, UTF-8, lines that end with a line feed.

    limit: of the rows at the beginning of the file, 0 for all; the most frequent words come first in published files.
    keep: the words to keep, and their lower-case forms, which `table_for` takes where there is no other; () for all.
    The numbers of other words are counted and not read. Raises FileNotFoundError, or ValueError that names file and
    line for what is no such file: numbers missing, too many, none, NaN or infinite, no UTF-8, no word, no row, fewer or
    more rows than the first line says.
    """
    path = pathlib.Path(path)
    if limit < 0:
        raise ValueError(f"limit={limit}: expected a number of words, 0 for all")
    if not path.is_file():
        raise FileNotFoundError(f"no file of word vectors at {path}")
    _check_kind(path)
    try:
        return _Reader(path, limit, frozenset(keep) | {word.lower() for word in keep}).run()
    except _WrongLine as error:
        raise ValueError(f"{path}, line {error.line}: {error.text}") from None


class _WrongLine(Exception):
    """What is wrong with a line, counted from 1."""

    def __init__(self, line: int, text: str):
        super().__init__(line, text)
        self.line, self.text = line, text


def _check_kind(path: pathlib.Path) -> None:
    with path.open("rb") as file:
        head = file.read(64)
    if not head.strip():
        raise ValueError(f"{path}: the file is empty; download or copy it again")
    if zipfile.is_zipfile(path) or head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        raise ValueError(f"{path}: the file is compressed, expected text; unpack it first")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
        raise ValueError(f"{path}: a web page or a git-LFS pointer, not word vectors; download the file again")


class _Reader:
    """One pass over a file: rows go into a table that is made once, for as many as there can be."""

    def __init__(self, path: pathlib.Path, limit: int, keep: frozenset[str]):
        self.path, self.limit, self.keep = path, limit, keep
        self.words: dict[str, int] = {}
        self.repeated: dict[str, None] = {}
        self.rows = self.dim = self.blank = 0  # rows that were seen, numbers of a row, the first line without anything
        self.count: int | None = None  # that the header says

    def run(self) -> Vectors:
        table, line = np.zeros((0, 0), np.float32), 1
        for lines in self.blocks():
            if line == 1:
                lines = self.begin(lines)
                line, table = 2 if self.count is not None else 1, self.space()
            self.add(lines, line, table)
            line += len(lines)
            if self.limit and self.rows >= self.limit:
                break
        wanted = self.count if not self.limit else min(self.count or 0, self.limit)
        if self.count is not None and self.rows != wanted:
            told = f"its first line says {self.count:,} words, found are {self.rows:,}"
            raise ValueError(f"{self.path}: {told}: cut short or damaged; download or copy it again")
        if not self.rows:
            raise ValueError(f"{self.path}: no word, expected lines of a word and its numbers")
        # What was never written takes no memory, and is given back here.
        table.resize((len(self.words), self.dim), refcheck=False)
        return Vectors(self.words, table, tuple(self.repeated))

    def blocks(self) -> Iterator[list[bytes]]:
        """The lines of the file, some thousand at once."""
        rest = b""
        with self.path.open("rb") as file:
            while block := file.read(BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                if len(rest) > LONGEST:
                    raise ValueError(f"{self.path}: a line of more than {LONGEST:,} bytes; no text of word vectors")
                if lines:
                    yield lines
        if rest:
            yield [rest]

    def begin(self, lines: list[bytes]) -> list[bytes]:
        """Takes the size of a vector from the first line, and the line away where it is a header."""
        first = lines[0].removeprefix(b"\xef\xbb\xbf")  # a mark that some editors write
        if _HEADER.fullmatch(first):
            self.count, self.dim = map(int, first.split())
            lines = lines[1:]
        else:
            self.dim, lines = len(first.split()) - 1, [first, *lines[1:]]
        if self.dim < 1:
            raise _WrongLine(1, f"found {messages.brief(_shown(first))}, expected a word and its numbers, or count dim")
        if 2 * self.dim > (size := os.path.getsize(self.path)):
            raise _WrongLine(1, f"found vectors of {self.dim:,} numbers, and the file has {size:,} bytes")
        return lines

    def space(self) -> np.ndarray:
        """Uninitialised rows for all words that the file can hold: a number takes two bytes at least."""
        most = os.path.getsize(self.path) // (2 * self.dim) + 1
        limits = (x for x in (most, self.count, self.limit or None) if x is not None)
        return np.empty((min(limits), self.dim), np.float32)

    def add(self, lines: list[bytes], first: int, table: np.ndarray) -> None:
        """Puts the words of some lines into the table; first: the number of the first line."""
        texts, numbers, start = [], [], len(self.words)
        for number, line in enumerate(lines, first):
            if self.limit and self.rows == self.limit:
                break
            line = line.rstrip()
            if not line:  # one may stand at the end
                self.blank = self.blank or number
                continue
            if self.blank:
                raise _WrongLine(self.blank, f"found nothing, expected a word and {self.dim} numbers")
            word, text = self.split(line, number)
            self.rows += 1
            if self.count is not None and self.rows > self.count:
                raise _WrongLine(number, f"found a row more than the {self.count:,} of the first line")
            if self.keep and word not in self.keep:
                continue
            if word in self.words:
                self.repeated[word] = None
                continue
            self.words[word] = len(self.words)
            texts.append(text)
            numbers.append(number)
        if texts:
            table[start : len(self.words)] = self.parse(texts, numbers)

    def split(self, line: bytes, number: int) -> tuple[str, str]:
        """The word and the text of its numbers."""
        head, _, text = line.partition(b" ")
        if text.count(b" ") != self.dim - 1 or not (head and text):
            # Tabs, several blanks, a word with spaces, or what is no such line.
            if b"\0" in line:
                raise _WrongLine(number, "found a byte of zeros, expected text; binary files of word2vec are not read")
            fields = line.split()
            if len(fields) <= self.dim or (len(fields) > self.dim + 1 and _is_number(fields[-self.dim - 1])):
                found = f"found {len(fields) - 1} numbers behind {messages.brief(_shown(fields[0]))}"
                if len(fields) == self.dim and line[:1].isspace():
                    found = f"found {len(fields)} numbers and no word"
                raise _WrongLine(number, f"{found}, expected {self.dim} as before")
            head, text = b" ".join(fields[: -self.dim]), b" ".join(fields[-self.dim :])
        try:
            return head.decode(), text.decode("ascii")
        except UnicodeDecodeError as error:
            what = f"found the byte {error.object[error.start]:#04x} in {messages.brief(_shown(error.object[:40]))}"
            kind = "a word in UTF-8" if error.encoding != "ascii" else "numbers"
            raise _WrongLine(number, f"{what}, expected {kind}; binary files of word2vec are not read") from None

    def parse(self, texts: list[str], numbers: list[int]) -> np.ndarray:
        """The numbers of some lines, float32 [N, D], which are all finite."""
        try:
            rows = _numbers(texts)
        except ValueError:
            rows = None
        if rows is not None and rows.shape == (len(texts), self.dim) and np.isfinite(rows).all():
            return rows
        for number, text in zip(numbers, texts, strict=True):
            wrong = [field for field in text.split() if not _is_finite(field)]
            if wrong:
                raise _WrongLine(number, f"found {messages.brief(wrong[0])}, expected {self.dim} finite numbers")
        raise _WrongLine(numbers[0], f"found no {self.dim} numbers a line in the rows from here on")


def _numbers(texts: list[str]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.loadtxt(texts, np.float32, comments=None, delimiter=" ", ndmin=2)


def _is_number(field: bytes) -> bool:
    try:
        float(field)
        return True
    except ValueError:
        return False


def _is_finite(field: str) -> bool:
    try:
        return bool(np.isfinite(_numbers([field])).all())
    except ValueError:
        return False


def _shown(data: bytes) -> str:
    return data[:80].decode(errors="backslashreplace")


def table_for(
    vocab: Mapping[str, int],
    vectors: Vectors,
    counts: Mapping[str, int] | None = None,
    *,
    seed: int = 0,
    padding: Collection[str] = PADDING,
    size: int = 0,
) -> tuple[np.ndarray, Coverage]:
    """The embedding table of a vocabulary {word: number}, float32 [V, D], and how much of it has a vector.

    A word has the vector of its own spelling, or that of its lower-case form. The others, and numbers below V that no
    word has, are drawn from `seed`, normal with mean 0 and the deviation of all numbers that were found; words of
    `padding` have zeros. counts: of the tokens of each word. size: V, at least the largest number + 1, which is the
    default. Raises ValueError for numbers that are negative or equal, and where no word has a vector.
    """
    _check_vocabulary(vocab, size)
    rows, lowered, unknown = {}, 0, []
    for word, number in vocab.items():
        if word in padding:
            continue
        row = vectors.words.get(word)
        if row is None:
            row = vectors.words.get(word.lower())
            lowered += row is not None
        if row is None:
            unknown.append(word)
        else:
            rows[number] = row
    if not rows:
        words = f"{messages.brief(list(vocab)[:5])}; the vectors are of {messages.brief(list(vectors.words)[:5])}"
        raise ValueError(f"none of the {len(vocab):,} words of the vocabulary has a vector: it begins {words}")
    places = np.fromiter(rows, np.int64, len(rows))
    found = vectors.table[np.fromiter(rows.values(), np.int64, len(rows))]
    table = np.empty((size or max(vocab.values()) + 1, found.shape[1]), np.float32)
    others = np.ones(len(table), bool)
    others[places] = False
    draws = np.random.default_rng(seed).standard_normal((int(others.sum()), found.shape[1]), np.float32)
    table[others] = draws * found.std(dtype=np.float64).astype(np.float32)
    table[places] = found
    table[[vocab[word] for word in padding if word in vocab]] = 0
    return table, _coverage(vocab, counts, padding, unknown, lowered)


def _check_vocabulary(vocab: Mapping[str, int], size: int) -> None:
    numbers = list(vocab.values())
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ValueError("a vocabulary gives each word a number of its own, 0 or more; this one does not")
    if size and size <= max(numbers):
        raise ValueError(f"size={size}, but the largest number of the vocabulary is {max(numbers)}")


def _coverage(
    vocab: Mapping[str, int],
    counts: Mapping[str, int] | None,
    padding: Collection[str],
    unknown: list[str],
    lowered: int,
) -> Coverage:
    words = [word for word in vocab if word not in padding]
    found, tokens = len(words) - len(unknown), None
    if counts is not None:
        total = sum(counts.get(word, 0) for word in words)
        tokens = 1 - sum(counts.get(word, 0) for word in unknown) / total if total else 0.0
    return Coverage(found - lowered, lowered, tuple(unknown), found / len(words), tokens)
