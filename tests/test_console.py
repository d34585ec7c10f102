"""What is printed fits its console: no number is cut, prose is broken at words alone, and a pipe gets no escapes."""

import io
import os
import pathlib
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.cells import cell_len

from tl_jax.core import console
from tl_jax.core.console import Table, fitted, plain, wrapped

ROOT = pathlib.Path(__file__).resolve().parents[1]


def random_table(rng):
    words = ["backbone/stage3/block0", "..", "frozen", "0-lr=0.1,weight_decay=1e-05", "ä" * 7, "漢字", "a"]
    text, numbers, rows = rng.integers(1, 4), rng.integers(0, 12), rng.integers(0, 6)
    cell = lambda: " ".join(rng.choice(words, rng.integers(0, 9)))  # noqa: E731
    number = lambda: f"{rng.normal() * 10.0 ** rng.integers(-3, 6):.{rng.integers(0, 5)}f} .. {rng.random():.4f}"  # noqa: E731
    made = [[*(cell() for _ in range(text)), *(number() for _ in range(numbers))] for _ in range(rows)]
    headers = [f"h{i} " * rng.integers(1, 4) for i in range(text + numbers)]
    return Table("many words as a caption " * 5, headers, made, int(text))


@pytest.mark.parametrize("width", [50, 80, console.WIDE])
def test_a_table_of_any_form_fits_and_keeps_every_number_whole_and_every_character_of_text(width):
    rng = np.random.default_rng(width)
    for _ in range(60):
        table = random_table(rng)
        shown = fitted(table, width)
        assert max(map(cell_len, shown.splitlines())) <= width
        for row in table.rows:
            for number in row[table.text_columns :]:
                assert number in shown
        characters = "".join(shown.split())
        texts = "".join("".join(cell for cell in row[: table.text_columns]) for row in (table.headers, *table.rows))
        assert all(characters.count(c) >= texts.count(c) for c in set("".join(texts.split())))


def test_a_table_is_set_as_simply_as_its_width_allows():
    table = Table("seeds", ("arm", "mean", "seed 0"), [("transfer", "0.9", "0.25"), ("baseline of all", "0.1", "-")])
    assert fitted(table, 80).splitlines() == [
        "seeds",
        "arm              mean  seed 0",
        "-----------------------------",
        "transfer          0.9    0.25",
        "baseline of all   0.1       -",
    ]
    assert fitted(table, 28).splitlines()[1:3] == ["arm             mean seed 0", "-" * 27]
    narrow = ["arm       mean", "transfer   0.9", "baseline   0.1", "of all", "arm       seed 0", "transfer    0.25"]
    assert {*narrow} <= {*fitted(table, 16).splitlines()}


def test_prose_is_broken_at_words_and_long_paths_stay_whole():
    path = "/a/very-long" * 9
    lines = wrapped(f"everything of this run: {path} and so on\n  exact: {'a word ' * 20}", 80).splitlines()
    assert path in lines and all(len(line) <= 80 for line in lines if line != path)
    assert lines[-1].startswith("    a word") or lines[-1].startswith("    word")
    assert wrapped("short", 80) == "short"


def test_names_that_are_no_text_are_escaped():
    assert plain("caf\udce9 \x1b[31m\tx\n") == "caf\\udce9 \\x1b[31m\\tx\n"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_command_at_80_columns_prints_whole_numbers_and_no_styles_without_colour(tmp_path, terminal, no_color):
    code = (
        "from tl_jax.core.console import *\n"
        "show(Table('c', ['name', *'abcdefghij'], [['n' * 30, *['0.123456'] * 10]] * 2))\n"
        "with bar('work', 3) as tick:\n"
        "    tick(1, 'loss 0.1', 'much text ' * 20)\n"
        "    show('words ' * 40)\n"
        "show('an alarm', style='bold red')\n"
    )
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    environment = {**environment, "NO_COLOR": no_color} if no_color else environment
    mine, theirs = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=environment)
    os.close(theirs)
    found = io.BytesIO()
    try:
        while block := os.read(mine, 1024):
            found.write(block)
    except OSError:  # how a terminal says that all is read
        pass
    assert process.wait() == 0
    text = found.getvalue().decode()
    styles = re.findall(r"\x1b\[[0-9;]*m", text)
    assert bool(styles) == (terminal and not no_color)
    assert ("work" in text) == terminal and ("\x1b" in text) == terminal
    bare = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    assert max(map(len, bare.splitlines())) <= 80 and bare.count("0.123456") == 20


def test_the_time_left_is_that_of_what_is_left_at_the_mean_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "shows_bar", lambda _: True)
    left = console._Left()
    with console.bar("work", 10, done=2) as tick:
        task = console._live.tasks[0]
        assert left.render(task).plain == "-:--:--"
        now[0] = 130.0
        tick(4, "words")  # 15 s each
        assert left.render(task).plain == "0:01:30" and task.fields["text"] == "words"
        now[0] = 140.0
        tick(4)
        assert left.render(task).plain == "0:01:20"
        now[0] = 1000.0
        assert left.render(task).plain == "0:00:00"
        assert list(console.counted("more", "ab", 2)) == ["a", "b"] and len(console._live.tasks) == 1
    assert console._live is None


@pytest.mark.parametrize("columns", ["0", "1", "", "many"])
def test_a_strange_width_is_taken_for_one_that_can_be_printed_in(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    console.show(Table("some words of a caption", ("name", "n"), [("a long name of it", "0.25")]))
    console.show("words " * 20)
    shown = capsys.readouterr().out
    assert "0.25" in shown and shown.count("words") == 21


def test_quiet_prints_nothing(capsys):
    with console.quiet():
        console.show("words")
        with console.quiet(False), console.bar("work", 2) as tick:
            tick(1)
    assert capsys.readouterr().out == ""
    console.show("words")
    assert capsys.readouterr().out == "words\n"
