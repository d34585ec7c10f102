"""A report as blocks (headings, text, lists, tables, pictures), and the same blocks as Markdown, HTML and LaTeX."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Heading(NamedTuple):
    text: str


class Text(NamedTuple):
    """Paragraphs, parted by blank lines."""

    text: str


class Items(NamedTuple):
    lines: Sequence[str]


class Table(NamedTuple):
    """Cells are text; the first `text_columns` columns are set left, the others, numbers, right."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


class Picture(NamedTuple):
    """figures/NAME.png and .svg of the report's folder."""

    name: str
    caption: str


Block = Heading | Text | Items | Table | Picture


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """GitHub's Markdown; pictures are linked, relative to the report."""
    parts = [f"# {_md(title)}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {_md(text)}")
            case Text(text):
                parts.append("\n\n".join(_md(paragraph) for paragraph in _paragraphs(text)))
            case Items(lines):
                parts.append("\n".join(f"- {_md(line)}" for line in lines))
            case Table():
                parts.append(_markdown_table(block))
            case Picture(name, caption):
                parts.append(f"![{name}](figures/{name}.png)\n\n*{_md(caption)}*")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    rules = ["---" if i < table.text_columns else "---:" for i in range(len(table.headers))]
    lines = [[_md(cell) for cell in row] for row in (table.headers, *table.rows)]
    lines.insert(1, rules)
    return f"{_md(table.caption)}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _md(text: str) -> str:
    """One line of Markdown that shows the text as it is; an underscore inside a word is no emphasis."""
    text = re.sub(r"([\\`*|]|<(?=[\w/!?])|\](?=[(\[]))", r"\\\1", " ".join(str(text).split()))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return re.sub(r"^([#+>-]|\d+\.)(?=\s)", r"\\\1", text)


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}",
}  # fmt: skip


def to_latex(tables: Mapping[str, Table]) -> str:
    """booktabs tables to paste into a paper, {label: table}."""
    parts = [r"% \usepackage{booktabs}", *(_latex_table(label, table) for label, table in tables.items())]
    return "\n\n".join(parts) + "\n"


def _latex_table(label: str, table: Table) -> str:
    columns = "".join("l" if i < table.text_columns else "r" for i in range(len(table.headers)))
    head, *rows = (" & ".join(latex(cell) for cell in row) + r" \\" for row in (table.headers, *table.rows))
    return "\n".join([
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex(table.caption)}}}",
        rf"  \label{{tab:{re.sub('[^a-z0-9]+', '-', label.lower())}}}",
        rf"  \begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        f"    {head}",
        r"    \midrule",
        *(f"    {row}" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ])  # fmt: skip


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped, and the signs of numbers as minus signs."""
    text = " ".join(str(text).split())
    escaped = "".join(LATEX.get(character, character) for character in text)
    escaped = re.sub(r"(?<![\w.,-])-(?=\d)", r"$-$", escaped)
    return re.sub(r"^\[", "{[}", escaped)  # at the start of a row a bracket would be an argument of the row's end


CSS = """
:root { --ink: #1d2329; --soft: #5d6873; --rule: #d9dee3; --wash: #f5f7f9; --mark: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: white; font: 16px/1.55 system-ui, "Segoe UI", Helvetica, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 2px solid var(--mark); }
p, li { max-width: 46rem; }
nav { color: var(--soft); font-size: .9rem; margin: 1.5rem 0; }
nav a { color: var(--mark); text-decoration: none; margin-right: 1.1rem; white-space: nowrap; }
.table { overflow-x: auto; margin: 1.25rem 0 1.75rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; }
th { text-align: left; font-weight: 600; border-bottom: 1.5px solid var(--ink); vertical-align: bottom; }
th, td { padding: .3rem .9rem .3rem 0; }
td { border-bottom: 1px solid var(--rule); vertical-align: top; }
.n { text-align: right; white-space: nowrap; padding-left: .6rem; }
tbody tr:hover { background: var(--wash); }
figure { margin: 1.75rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; margin-top: .4rem; }
@media print { nav { display: none; } main { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
""".strip()


def to_html(title: str, blocks: Sequence[Block], images: Mapping[str, bytes]) -> str:
    """One page that needs nothing else: `images` {name: PNG bytes} are inlined."""
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    links = "".join(f'<a href="#{_anchor(text)}">{html.escape(text)}</a>' for text in headings)
    body = "\n".join(_html_block(block, images) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>\n{CSS}\n</style>\n</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>\n<nav>{links}</nav>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _html_block(block: Block, images: Mapping[str, bytes]) -> str:
    match block:
        case Heading(text):
            return f'<h2 id="{_anchor(text)}">{html.escape(text)}</h2>'
        case Text(text):
            return "\n".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in _paragraphs(text))
        case Items(lines):
            return "<ul>\n" + "\n".join(f"<li>{html.escape(line)}</li>" for line in lines) + "\n</ul>"
        case Table():
            return _html_table(block)
        case Picture(name, caption):
            data, text = base64.b64encode(images[name]).decode(), html.escape(caption)
            return (
                f'<figure id="figure-{html.escape(name)}">\n<img alt="{text}" src="data:image/png;base64,{data}">\n'
                f"<figcaption>{text}</figcaption>\n</figure>"
            )


def _html_table(table: Table) -> str:
    def line(cells, tag):
        style = ["" if i < table.text_columns else ' class="n"' for i in range(len(cells))]
        return "".join(f"<{tag}{s}>{html.escape(c)}</{tag}>" for c, s in zip(cells, style, strict=True))

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in table.rows)
    return (
        f'<div class="table"><table>\n<caption>{html.escape(table.caption)}</caption>\n'
        f"<thead><tr>{line(table.headers, 'th')}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
