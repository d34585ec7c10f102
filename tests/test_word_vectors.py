"""Word vectors: files of GloVe, word2vec and fastText, what is wrong with others, and the table of a vocabulary."""

import gzip
import os

import numpy as np
import pytest

from tl_jax.weights import word_vectors
from tl_jax.weights.word_vectors import read, table_for


def write(tmp_path, text, name="v.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture
def glove(shared):
    path = shared / "weights/glove_6b_50d/glove.6B.50d.first20000.txt"
    if not path.is_file():
        pytest.skip(f"the genuine word vectors are not here: {path}")
    return path


def test_genuine_vectors_are_those_of_a_plain_parse(glove):
    expected = {}
    for line in glove.read_text(encoding="utf-8").split("\n"):
        word, *numbers = line.split(" ")
        if numbers:
            expected.setdefault(word, np.array([float(x) for x in numbers], np.float32))
    found = read(glove)
    assert list(found.words) == list(expected) and list(found.words.values()) == list(range(len(expected)))
    assert found.table.dtype == np.float32 and found.table.flags.c_contiguous and found.repeated == ()
    np.testing.assert_array_equal(found.table, np.stack(list(expected.values())))
    first = read(glove, limit=100)
    assert list(first.words) == list(expected)[:100]
    np.testing.assert_array_equal(first.table, found.table[:100])
    few = read(glove, keep={"Paris", "the", "no such word"})
    assert list(few.words) == ["the", "paris"]
    np.testing.assert_array_equal(few.table, found.table[[found.words["the"], found.words["paris"]]])


@pytest.mark.parametrize(
    "text",
    [
        "a 1 2.5\nb -3e-2 4\n",  # GloVe
        "a 1 2.5\nb -3e-2 4",  # no line feed at the end
        "2 2\na 1 2.5 \nb -3e-2 4 \n",  # word2vec and fastText, with a blank behind the numbers
        "2 2\r\na 1 2.5\r\nb -3e-2 4\r\n\r\n",
        "\ufeffa 1 2.5\nb -3e-2 4\n",
        "2\t2\na\t1\t2.5\nb  -3e-2  4\n",
    ],
)
def test_the_forms_of_text_files_give_the_same(tmp_path, text, monkeypatch):
    path = write(tmp_path, text)
    for block in (2**24, 5):  # lines that lie in several blocks
        monkeypatch.setattr(word_vectors, "BLOCK", block)
        found = read(path)
        assert found.words == {"a": 0, "b": 1} and found.repeated == ()
        np.testing.assert_array_equal(found.table, np.array([[1, 2.5], [-3e-2, 4]], np.float32))


def test_words_of_any_kind_and_their_order(tmp_path):
    words = [
        "the",
        ". . .",
        "at name@domain.com",
        "naïve",
        "北京",
        "a\u00a0b",
        "x\u2028y",
        "#",
        '"',
        "</s>",
        "1.5",
        "nan",
    ]
    lines = [f"{word} {i} {i + 0.5}" for i, word in enumerate(words)]
    found = read(write(tmp_path, "\n".join(lines)))
    assert list(found.words) == words
    np.testing.assert_array_equal(found.table[:, 1], np.arange(len(words)) + 0.5)


def test_of_equal_words_the_first_counts_and_they_are_named(tmp_path):
    path = write(tmp_path, "a 1 2\nb 3 4\na 5 6\nb 7 8\na 9 10\nc 0 0\n")
    found = read(path)
    assert found.words == {"a": 0, "b": 1, "c": 2} and found.repeated == ("a", "b")
    np.testing.assert_array_equal(found.table, [[1, 2], [3, 4], [0, 0]])
    limited = read(path, limit=3)  # of rows
    assert list(limited.words) == ["a", "b"] and limited.repeated == ("a",)
    assert list(read(write(tmp_path, "4 1\na 1\nb 1\nc 1\nd 1\n"), limit=2).words) == ["a", "b"]
    assert list(read(write(tmp_path, "2 1\na 1\nb 1\n"), limit=9).words) == ["a", "b"]


WRONG = {
    "empty": (b"", r"the file is empty"),
    "blank": (b" \n\n", r"the file is empty"),
    "few": (b"a 1 2 3\nb 1 2\n", r"line 2: found 2 numbers behind 'b', expected 3 as before"),
    "many": (b"a 1 2 3\nb 1 2 3 4\n", r"line 2: found 4 numbers behind 'b', expected 3 as before"),
    "in turn": (b"a 1 2 3\nb 1 2\nc 1 2 3 4\n", r"line 2: found 2 numbers"),
    "word alone": (b"a 1 2\nb\n", r"line 2: found 0 numbers behind 'b', expected 2"),
    "no word": (b"a 1 2\n 1 2\n", r"line 2: found 2 numbers and no word, expected 2"),
    "no numbers": (b"once upon a time\n", r"line 1: found 'upon', expected 3 finite numbers"),
    "letters": (b"a 1 2\nb 1 x\n", r"line 2: found 'x', expected 2 finite numbers"),
    "comma": (b"a 1,5 2\n", r"line 1: found '1,5'"),
    "nan": (b"a 1 2\nb nan 1\n", r"line 2: found 'nan', expected 2 finite numbers"),
    "inf": (b"a 1 2\nb 1 -inf\n", r"line 2: found '-inf'"),
    "too large": (b"a 1 2\nb 1 1e39\n", r"line 2: found '1e39'"),
    "not UTF-8": (b"a 1 2\ncaf\xe9 1 2\n", r"line 2: found the byte 0xe9 in 'caf\\\\xe9', expected a word in UTF-8"),
    "other digits": ("a 1 2\nb 1 \u0662\n".encode(), r"line 2: found the byte 0xd9 .* expected numbers"),
    "binary": (
        b"2 2\na \x00\x00\x80?\x00\x00\x00@\nb \xff\xff\xff\xff\x00\x00\x80?\n",
        r"line 2: found a byte of zeros, expected text",
    ),
    "gap": (b"a 1 2\n\nb 1 2\n", r"line 2: found nothing, expected a word and 2 numbers"),
    "cut short": (b"3 2\na 1 2\nb 1 2\n", r"first line says 3 words, found are 2: cut short"),
    "more": (b"1 2\na 1 2\nb 1 2\n", r"line 3: found a row more than the 1 of the first line"),
    "header alone": (b"2 2\n", r"first line says 2 words, found are 0"),
    "no rows": (b"0 2\n", r"no word, expected lines"),
    "other size": (b"2 3\na 1 2\nb 1 2\n", r"line 2: found 2 numbers behind 'a', expected 3"),
    "huge": (b"999999999999999999 999999999\na 1\n", r"line 1: found vectors of 999,999,999 numbers, and the file has"),
    "many rows": (b"999999999999999999 1\na 1\n", r"says 999,999,999,999,999,999 words, found are 1"),
    "one word": (b"hello\n", r"line 1: found 'hello', expected a word and its numbers"),
    "zip": (b"PK\x05\x06" + bytes(18), r"compressed, expected text; unpack it first"),
    "gzip": (gzip.compress(b"a 1 2\n"), r"compressed, expected text; unpack it first"),
    "web page": (b"<!DOCTYPE html><html>", r"a web page or a git-LFS pointer"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("block", [2**24, 3])
def test_other_files_are_refused_with_their_line(kind, block, tmp_path, monkeypatch):
    data, told = WRONG[kind]
    monkeypatch.setattr(word_vectors, "BLOCK", block)
    path = write(tmp_path, data)
    with pytest.raises(ValueError, match=rf"{path}.*({told})"):
        read(path)


def test_other_refusals(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no file of word vectors at"):
        read(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match="no file of word vectors at"):
        read(tmp_path)
    with pytest.raises(ValueError, match="limit=-1: expected a number of words"):
        read(write(tmp_path, "a 1\n"), limit=-1)
    monkeypatch.setattr(word_vectors, "LONGEST", 20)
    monkeypatch.setattr(word_vectors, "BLOCK", 8)
    with pytest.raises(ValueError, match="a line of more than 20 bytes"):
        read(write(tmp_path, "a" * 100))


def test_what_is_not_kept_is_counted_and_not_read(tmp_path):
    path = write(tmp_path, "3 2\na x y\nB 1 2\nc 3 4\n")
    found = read(path, keep=["c", "B"])
    assert found.words == {"B": 0, "c": 1}
    np.testing.assert_array_equal(found.table, [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="line 2: found 'x'"):
        read(path)
    with pytest.raises(ValueError, match="line 3: found 1 numbers"):
        read(write(tmp_path, "a 1 2\nb 1 2\nc 1\n"), keep=["a"])


def vectors_of(words, dim=3):
    table = np.random.default_rng(0).standard_normal((len(words), dim)).astype(np.float32) * 0.3 + 0.1
    return word_vectors.Vectors({word: i for i, word in enumerate(words)}, table, ())


def test_a_table_has_the_vectors_of_the_vocabulary_and_says_what_lacks():
    vectors = vectors_of(["the", "paris", "Us", "us"])
    vocab = {"<pad>": 0, "The": 2, "us": 1, "Us": 3, "PARIS": 5, "zyx": 6}
    counts = {"<pad>": 1000, "The": 6, "us": 1, "Us": 1, "PARIS": 1, "zyx": 1}
    table, coverage = table_for(vocab, vectors, counts, seed=3)
    assert table.shape == (7, 3) and table.dtype == np.float32 and np.isfinite(table).all()
    for number, word in {2: "the", 1: "us", 3: "Us", 5: "paris"}.items():
        np.testing.assert_array_equal(table[number], vectors.table[vectors.words[word]])
    assert not table[0].any() and table[4].all() and table[6].all()
    assert coverage[:3] == (2, 2, ("zyx",)) and coverage.words == 4 / 5 and coverage.tokens == pytest.approx(9 / 10)
    np.testing.assert_array_equal(table_for(vocab, vectors, seed=3)[0], table)
    other, uncounted = table_for(vocab, vectors, seed=4, padding=(), size=9)
    assert uncounted.tokens is None and uncounted.unknown == ("<pad>", "zyx") and other.shape == (9, 3)
    assert other[0].all() and not np.array_equal(other[6], table[6])


def test_unknown_words_have_the_deviation_of_those_that_were_found():
    vectors = vectors_of([f"w{i}" for i in range(500)], 40)
    vocab = {f"w{i}": i for i in range(0, 4000)}
    table, coverage = table_for(vocab, vectors)
    assert coverage.found == 500 and coverage.words == 500 / 4000
    assert table[500:].std() == pytest.approx(table[:500].std(), rel=0.01)
    assert abs(table[500:].mean()) < 4 * 0.3 / np.sqrt(3500 * 40)


def test_vocabularies_that_make_no_table_are_refused():
    vectors = vectors_of(["a", "b"])
    for vocab in ({}, {"a": 0, "b": 0}, {"a": -1}):
        with pytest.raises(ValueError, match="gives each word a number of its own, 0 or more"):
            table_for(vocab, vectors)
    with pytest.raises(ValueError, match="size=2, but the largest number of the vocabulary is 2"):
        table_for({"a": 2}, vectors, size=2)
    with pytest.raises(ValueError, match=r"none of the 2 words .* begins \['x', '<pad>'\]; the vectors are of \['a'"):
        table_for({"x": 0, "<pad>": 1}, vectors)


@pytest.mark.slow
def test_a_large_file_takes_little_more_memory_than_its_table(tmp_path):
    tracemalloc = pytest.importorskip("tracemalloc")
    rng, path = np.random.default_rng(0), tmp_path / "large.txt"
    lines = [" ".join(f"{x:.4f}" for x in rng.standard_normal(100)) for _ in range(100)]
    with path.open("w") as file:
        file.writelines(f"w{i} {lines[i % 100]}\n" for i in range(40000))
    assert os.path.getsize(path) > 25e6
    tracemalloc.start()
    found = read(path)
    (now, peak), _ = tracemalloc.get_traced_memory(), tracemalloc.stop()
    assert found.table.nbytes == 16e6 and now < 1.5 * 16e6
    # The space that is asked for is that of the shortest numbers, and is used as far as there are words.
    assert peak < 2 * os.path.getsize(path) + 6 * word_vectors.BLOCK
