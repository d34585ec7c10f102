"""What a person reads on a console: prose wrapped at words, tables that fit its width, and how far something is.

The width is that of the terminal, or COLUMNS. In a pipe without COLUMNS a table has at most WIDE columns, and prose is
not wrapped. Colours and bold text are for a terminal without NO_COLOR; a progress bar is for a terminal, or a notebook.
"""

import contextlib
import itertools
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
from rich.text import Text

NARROW, WIDE = 20, 110
LEAST = 8  # columns to which a column of text may shrink, where its words have to be broken
BAR = 16
ERASE = "\r\x1b[2K"

_live: Progress | None = None
_quiet = 0


class Table(NamedTuple):
    """Cells are text; the first `text_columns` columns are set left, the others, numbers, right."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@contextlib.contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Within the block `show` prints nothing and there is no bar, if that is wanted."""
    global _quiet
    _quiet += wanted
    try:
        yield
    finally:
        _quiet -= wanted


def make_console(stderr: bool = False) -> Console:
    told = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    colours = None if os.environ.get("NO_COLOR") else "auto"
    width = None if told else WIDE
    console = Console(stderr=stderr, highlight=False, markup=False, width=width, color_system=colours)
    if console.width < NARROW:
        console.width = NARROW
    return console


def show(message: Any, *, stderr: bool = False, style: str = "", erase: bool = False) -> None:
    """Prints prose, or a table and an empty line.

    erase: of a line of the terminal that may hold the bar of another process, whose next one comes below.
    """
    if _quiet:
        return
    console = _live.console if _live and not stderr else make_console(stderr)
    if isinstance(message, Table):
        text = fitted(message, console.width) + "\n"
    else:
        wraps = console.is_terminal or "COLUMNS" in os.environ
        text = wrapped(plain(str(message)), console.width) if wraps else plain(str(message))
    if style or _live:
        console.print(Text(text, style), soft_wrap=True)
    else:
        print(f"{ERASE if erase and shows_bar(console) else ''}{text}", file=console.file, flush=True)


def plain(text: str) -> str:
    """Text with escapes for what is no character: names of files and classes may hold any byte."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def wrapped(text: str, width: int) -> str:
    """Lines of at most `width` columns, broken at spaces alone; a longer word stays whole, such as a path."""
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        style = {"subsequent_indent": indent and f"{indent}  ", "break_on_hyphens": False}
        lines += textwrap.wrap(line, width, break_long_words=False, **style) if cell_len(line) > width else [line]
    return "\n".join(lines)


class Layout(NamedTuple):
    """How a table is set: the widths of its columns, the space between them, and the columns of each of its blocks."""

    sizes: list[int]
    gap: int
    blocks: list[list[int]]


def layout(table: Table, width: int) -> Layout:
    """A table in `width` columns, unless one number is wider: where that is not enough, columns of text shrink.

    Columns of numbers that then find no room are in a further block, which has the same text.
    """
    count, cells = table.text_columns, [[plain(cell) for cell in row] for row in (table.headers, *table.rows)]
    natural = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    gap = 2 if sum(natural) + 2 * len(natural) - 2 <= width else 1
    texts, numbers = natural[:count], natural[count:]
    words = [max((cell_len(word) for row in cells for word in row[i].split()), default=0) for i in range(count)]
    room = width - gap * (len(natural) - 1) - sum(numbers)  # for text, with all numbers beside it
    if room < sum(map(min, words, itertools.repeat(2 * LEAST))):
        room = min(sum(texts), max(width // 2, width - gap * (2 * count - 1) - max(numbers, default=0)))
    texts = _shrink(_shrink(texts, words, room), [min(LEAST, size) for size in texts], room)
    blocks, used = [[*range(count)]], sum(texts) + gap * (count - 1)
    for i in range(count, len(natural)):
        if used + gap + natural[i] > width and len(blocks[-1]) > count:
            blocks.append([*range(count)])
            used = sum(texts) + gap * (count - 1)
        blocks[-1].append(i)
        used += gap + natural[i]
    return Layout([*texts, *numbers], gap, blocks)


def fitted(table: Table, width: int) -> str:
    """A table as lines of text, its blocks one below the other."""
    sizes, gap, blocks = layout(table, width)
    cells = [[plain(cell) for cell in row] for row in (table.headers, *table.rows)]
    texts = ["\n".join(_lines(cells, columns, sizes, table.text_columns, gap)) for columns in blocks]
    return "\n".join([*([wrapped(plain(table.caption), width)] if table.caption else []), "\n\n".join(texts)])


def _shrink(sizes: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Takes from the widest, as far as it may lose, until all find room."""
    sizes = list(sizes)
    while sum(sizes) > room and (may := [i for i, size in enumerate(sizes) if size > least[i]]):
        sizes[max(may, key=sizes.__getitem__)] -= 1
    return sizes


def _lines(cells, columns: Sequence[int], sizes: Sequence[int], count: int, gap: int) -> list[str]:
    """The header, a rule and the rows of some columns; a text cell may take several lines."""
    found, console = [], Console(width=WIDE)
    for row in cells:
        high = [Text(row[i]).wrap(console, sizes[i], overflow="fold") if i < count else [row[i]] for i in columns]
        for line in itertools.zip_longest(*high, fillvalue=""):
            texts = [(i, str(cell).strip() if i < count else cell) for i, cell in zip(columns, line, strict=True)]
            pads = [" " * (sizes[i] - cell_len(text)) for i, text in texts]
            whole = [text + pad if i < count else pad + text for (i, text), pad in zip(texts, pads, strict=True)]
            found.append((" " * gap).join(whole).rstrip())
        if row is cells[0]:
            found.append("-" * (sum(sizes[i] for i in columns) + gap * (len(columns) - 1)))
    return found


def shows_bar(console: Console) -> bool:
    """Whether a progress bar can be drawn: on a terminal, and in a notebook that has ipywidgets."""
    terminal = console.is_terminal and not console.is_dumb_terminal
    return terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


class _Left(ProgressColumn):
    """The time that is left, at the mean speed so far."""

    def render(self, task: Task) -> Text:
        done, (began, start, ticked) = task.completed, task.fields["clock"]
        if done <= start or not task.total:
            return Text("-:--:--")
        left = (ticked - began) / (done - start) * (task.total - done) - (time.monotonic() - ticked)
        minutes, seconds = divmod(max(int(left + 0.5), 0), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02}")


@contextlib.contextmanager
def bar(title: str, total: int, done: int = 0, *, shown: bool = True, stderr: bool = False) -> Iterator[Callable]:
    """A line that says how far something is and how long it will take; bars within the block stand under it.

    Yields tick(done, *texts), with as many of the texts as find room. It is gone after the block.
    """
    global _live
    console, outer = _live.console if _live else make_console(stderr), _live
    if _quiet or not shown or not shows_bar(console):
        yield lambda done, *texts: None
        return
    if outer is None:
        columns = "{task.description}", BarColumn(BAR), MofNCompleteColumn(), _Left(), "{task.fields[text]}"
        _live = Progress(*columns, console=console, transient=True)
        _live.start()
    live, began = _live, time.monotonic()
    task = live.add_task(title, total=total, completed=done, text="", clock=(began, done, began))

    def tick(now: int, *texts: str) -> None:
        room = console.width - len(title) - BAR - 2 * len(str(total)) - len("  /  0:00:00  ")
        sizes = itertools.accumulate(len(text) + 2 for text in texts)
        text = "  ".join(text for text, size in zip(texts, sizes, strict=True) if size <= room)
        known = live.tasks[live.task_ids.index(task)]
        clock = known.fields["clock"] if now == known.completed else (began, done, time.monotonic())
        live.update(task, completed=now, text=text, clock=clock)

    try:
        yield tick
    finally:
        live.remove_task(task)
        if outer is None:
            close_bars()


def close_bars() -> None:
    """Gives the terminal back."""
    global _live
    live, _live = _live, None
    with contextlib.suppress(OSError):  # it may be gone
        if live:
            live.stop()


def counted(title: str, items: Iterable[Any], total: int, **how: Any) -> Iterator[Any]:
    """The items, with a bar that counts them."""
    with bar(title, total, **how) as tick:
        for number, item in enumerate(items, 1):
            yield item
            tick(number)
