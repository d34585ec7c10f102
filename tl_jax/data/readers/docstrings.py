"""What scikit-learn's own source says of its classes and functions: texts of ten kinds that need no download."""

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tl_jax.data.examples import Source, check_split
from tl_jax.data.text.tokens import Texts

CLASSES = (
    "cluster", "datasets", "decomposition", "ensemble", "feature_selection", "gaussian_process", "linear_model",
    "metrics", "model_selection", "preprocessing",
)  # fmt: skip
WORDS = 5  # at least, of a text
_SECTION = re.compile(r"\n[^\n]+\n-{3,}\s*\n|\n\s*>>> ")  # a title that is underlined, and an example


def load_docstrings(split: str) -> Source:
    """Which of ten parts of scikit-learn a docstring is of: its prose, up to the list of parameters; split train alone.

    About 1,150 texts, of the version that is installed; a text of several parts, and a second one alike, are left out.
    """
    check_split("docstrings", split, ("train",))
    rows = _rows()
    labels = np.array([CLASSES.index(part) for part, _, _ in rows], np.int32)
    texts = Texts(tuple((text,) for _, _, text in rows))
    sizes = np.array([len(text) for _, _, text in rows], np.int64)
    return Source(
        f"docstrings {split}", texts, labels, CLASSES, tuple(f"{part}/{name}" for part, name, _ in rows), sizes
    )


@functools.cache
def _rows() -> tuple[tuple[str, str, str], ...]:
    """Triples (part, name, text)."""
    parts: dict[str, set[str]] = {}
    found = []
    for part, name, text in docstrings("sklearn"):
        prose = " ".join(p for p in paragraphs(_SECTION.split(text)[0]) if not p.startswith(".."))
        if part in CLASSES and len(prose.split()) >= WORDS:
            if prose not in parts:
                found.append((part, name, prose))
            parts.setdefault(prose, set()).add(part)
    return tuple(row for row in found if len(parts[row[2]]) == 1)


def docstrings(package: str) -> Iterator[tuple[str, str, str]]:
    """Triples (first folder in the package, file:line, text) of its classes and functions; nothing is imported."""
    root = Path(importlib.util.find_spec(package).origin).parent
    for file in sorted(root.rglob("*.py")):
        own = file.relative_to(root)
        if len(own.parts) > 1 and not {"tests", "externals"}.intersection(own.parts):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                    yield own.parts[0], f"{own.as_posix()}:{node.lineno}", text


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, each in one line."""
    return [line for part in re.split(r"\n\s*\n", text) if (line := " ".join(part.split()))]


def further_texts() -> list[str]:
    """Paragraphs of numpy, scipy and scikit-learn in which no text of `load_docstrings` stands, sorted: no labels."""
    held_out = {text for _, _, text in _rows()}
    found = {line for package in ("numpy", "scipy", "sklearn") for _, _, text in docstrings(package)
             for section in _SECTION.split(text)[package == "sklearn":] for line in paragraphs(section)}  # fmt: skip
    return sorted(found - held_out)
