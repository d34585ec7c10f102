"""A report as sections {title: blocks}, and the same as Markdown, HTML and LaTeX.

A block is a paragraph, a list of items, a table or a picture.
"""

import base64
import csv
import hashlib
import html
import io
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rich.cells import cell_len

import tl_jax
from tl_jax.core.console import Table, layout

LATEX_COLUMNS = 72  # characters of \footnotesize in a line of LaTeX's article, 345 pt, with room for wide letters
LATEX_ROWS = 40


class Picture(NamedTuple):
    name: str  # of figures/NAME.png and .svg
    caption: str
    places: Sequence[tuple[float, float, str]] = ()  # its points: shares of the width and height, and what they are


class Alarm(str):
    """A paragraph that is to be seen: in red, bold where there is no colour."""


Block = str | list[str] | Table | Picture
Sections = Mapping[str, Sequence[Block]]


def scaled(value: float | None, base: int, unit: str = "") -> str:
    """Two to three digits and a prefix, k M G T P for powers of 1000 and Ki Mi Gi Ti Pi for powers of 1024."""
    if value is None:
        return "-"
    power = 0
    while abs(value) >= base and power < 5:
        value, power = value / base, power + 1
    digits = f"{value:.0f}" if power == 0 or value >= 100 else f"{value:.1f}"
    prefixes = ("", "Ki", "Mi", "Gi", "Ti", "Pi") if base == 1024 else ("", *"kMGTP")
    return f"{digits} {prefixes[power]}{unit}".strip()


def to_markdown(title: str, sections: Sections) -> str:
    """GitHub's Markdown; pictures are linked, relative to the report."""
    texts = [f"# {_md(title)}"]
    for heading, blocks in sections.items():
        texts += [f"## {_md(heading)}"] if heading else []
        texts += map(_markdown_block, blocks)
    return "\n\n".join(texts) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Alarm():
            return f"**{_md(block)}**"
        case str():
            return _md(block)
        case list():
            return "\n".join(f"- {_md(line)}" for line in block)
        case Table():
            head, *rows = ([_md(cell) for cell in row] for row in (block.headers, *block.rows))
            rules = ["---" if i < block.text_columns else "---:" for i in range(len(head))]
            return f"{_md(block.caption)}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in (head, rules, *rows))
        case Picture(name, caption):
            return f"![{name}](figures/{name}.png)\n\n*{_md(caption)}*"


def _md(text: str) -> str:
    """One line of Markdown that shows the text as it is; an underscore inside a word is no emphasis."""
    text = re.sub(r"([\\`*|]|<(?=[\w/!?])|\](?=[(\[]))", r"\\\1", " ".join(str(text).split()))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return re.sub(r"^([#+>-]|\d+\.)(?=\s)", r"\\\1", text)


LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}",
})  # fmt: skip


def to_latex(tables: Mapping[str, Table]) -> str:
    """booktabs tables to paste into a paper, {label: table}, in several where one would run off its page."""
    texts = [text for label, table in tables.items() for text in _latex_tables(label, table)]
    return "\n\n".join([r"% \usepackage{booktabs,array}", *texts]) + "\n"


def _latex_tables(label: str, table: Table) -> Iterator[str]:
    """A table as parts of at most LATEX_COLUMNS characters in \\footnotesize and LATEX_ROWS lines."""
    sizes, _, blocks = layout(table, LATEX_COLUMNS)
    whole = [max(cell_len(row[i]) for row in (table.headers, *table.rows)) for i in range(table.text_columns)]
    kinds = [rf">{{\raggedright\arraybackslash}}p{{{0.52 * size:.1f}em}}" if size < full else "l"
             for size, full in zip(sizes, whole, strict=False)]  # fmt: skip
    kinds += ["r"] * (len(sizes) - table.text_columns)
    lines = [
        max(-(-cell_len(cell) // size) for cell, size in zip(row, sizes, strict=True) if size) for row in table.rows
    ]
    pages = [count // LATEX_ROWS for count in itertools.accumulate(lines)]
    chunks = [[row for row, page in zip(table.rows, pages, strict=True) if page == k] for k in sorted({*pages})] or [[]]
    for number, (rows, columns) in enumerate(itertools.product(chunks, blocks)):
        head, *body = (" & ".join(latex(row[i]) for i in columns) + r" \\" for row in (table.headers, *rows))
        several = len(chunks) * len(blocks) > 1
        caption = f"{table.caption} (Part {number + 1} of {len(chunks) * len(blocks)})" if several else table.caption
        name = re.sub("[^a-z0-9]+", "-", label.lower()) + (f"-{number + 1}" if number else "")
        text = "".join(f"\n    {row}" for row in body)
        yield rf"""\begin{{table}}
  \centering
  \footnotesize
  \setlength{{\tabcolsep}}{{3pt}}
  \caption{{{latex(caption)}}}
  \label{{tab:{name}}}
  \begin{{tabular}}{{{"".join(kinds[i] for i in columns)}}}
    \toprule
    {head}
    \midrule{text}
    \bottomrule
  \end{{tabular}}
\end{{table}}"""


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped, and the signs of numbers as minus signs."""
    escaped = re.sub(r"(?<![\w.,-])-(?=\d)", r"$-$", " ".join(str(text).split()).translate(LATEX))
    return re.sub(r"^\[", "{[}", escaped)  # at the start of a row a bracket would be an argument of the row's end


def to_csv(table: Table) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table.headers, *table.rows])
    return file.getvalue()


def to_html(title: str, sections: Sections, images: Mapping[str, bytes]) -> str:
    """One page that needs nothing else: `images` {name: PNG bytes} are inlined.

    Its policy lets the browser load nothing, and run only the one script that it holds, known by its hash.
    """
    assets = pathlib.Path(tl_jax.__file__).parent / "assets"
    css, script = (f"\n{(assets / f'report.{suffix}').read_text().strip()}\n" for suffix in ("css", "js"))
    allowed = f"style-src {_hash(css)}; script-src {_hash(script)}; img-src data:"
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; {allowed}"
    links, body = "", []
    for heading, blocks in sections.items():
        if heading:
            anchor, text = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-"), html.escape(heading)
            links += f'<a href="#{anchor}">{text}</a>'
            body.append(f'<h2 id="{anchor}">{text}</h2>')
        body += [_html_block(block, images) for block in blocks]
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>',
        f"<style>{css}</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n<nav>{links}</nav>",
        *body, f"</main>\n<script>{script}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _html_block(block: Block, images: Mapping[str, bytes]) -> str:
    match block:
        case Alarm():
            return f'<p class="alarm">{html.escape(block)}</p>'
        case str():
            return f"<p>{html.escape(block)}</p>"
        case list():
            return "<ul>\n" + "\n".join(f"<li>{html.escape(line)}</li>" for line in block) + "\n</ul>"
        case Table():
            head, body = _html_row(block, block.headers, "th"), "\n".join(_html_row(block, row) for row in block.rows)
            caption = f'<div class="table"><table>\n<caption>{html.escape(block.caption)}</caption>'
            return f"{caption}\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
        case Picture(name, caption, places):
            data, text = base64.b64encode(images[name]).decode(), html.escape(caption)
            image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
            image = f'<div class="plot" data-places="{html.escape(json.dumps(places))}">{image}</div>'
            return f'<figure id="figure-{html.escape(name)}">\n{image}\n<figcaption>{text}</figcaption>\n</figure>'


def _html_row(table: Table, cells: Sequence[str], tag: str = "td") -> str:
    style = ["" if i < table.text_columns else ' class="n"' for i in range(len(cells))]
    return f"<tr>{''.join(f'<{tag}{s}>{html.escape(c)}</{tag}>' for c, s in zip(cells, style, strict=True))}</tr>"
