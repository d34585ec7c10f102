"""The words of the project are the field's own: retired private terms come back neither as names nor in prose."""

import ast
import pathlib
import re

from tl_jax.core.options import OPTIONS

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODE = [path for folder in ("tl_jax", "configs", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]
PROSE = [*CODE, ROOT / "README.md", ROOT / "launch.py", *sorted((ROOT / "docs").glob("*.md"))]

# name: the term in its place
NAMES = {
    "front": "prefix", "rest": "frozen", "rests": "frozen", "resting": "frozen", "moves": "trained",
    "moving": "trained", "stretch": "phase", "beside": "auxiliary", "hold": "cache", "held": "cached",
    "leave": "finalize", "leaves_behind": "artifacts", "outcome": "result", "outcomes": "results", "say": "log",
    "part": "piece, or delta for the file", "before": "precompute, or previous", "ages": "offsets",
    "cohort": "offset", "cohorts": "offsets", "drawn": "sampled", "also": "extra_eval", "closed_form": "probe",
}  # fmt: skip
PHRASES = re.compile(
    r"cannot be meant|closed[- ]forms?\b|\bgives? it back|whole files or none|\bfurther sets?\b|\bcohorts?\b|"
    r"\bstretch(es)?\b|data\.also|\b(trains|is trained) and rests\b|(?<!Pareto )\bfront\b(?!'s| door)",
    re.IGNORECASE,
)


def names(path):
    """Every name that a file gives to a module, function, class, argument or field, with its line."""
    yield 1, path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        if isinstance(node, ast.ClassDef):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield field.lineno, field.target.id


def test_no_name_is_a_retired_word():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name!r}, say {NAMES[name.strip('_')]}"
        for path in CODE
        for line, name in names(path)
        if name.strip("_") in NAMES
    ]
    found += [f"option {name}" for name in OPTIONS if NAMES.keys() & set(name.split("."))]
    assert not found, "\n".join(found)


def test_no_retired_phrase_is_in_code_or_docs():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}"
        for path in PROSE
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in PHRASES.finditer(line)
    ]
    assert not found, "\n".join(found)


def test_functions_and_files_are_short_enough_to_read():
    found = []
    for path in CODE:
        text = path.read_text()
        if (count := len(text.splitlines())) > 400:
            found.append(f"{path.relative_to(ROOT)} has {count} lines, at most 400")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (count := node.end_lineno - node.lineno + 1) > 60:
                found.append(f"{path.relative_to(ROOT)}: {node.name} has {count} lines, at most 60")
    assert not found, "\n".join(found)
