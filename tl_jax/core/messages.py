"""Texts that errors are made of: the nearest known name, the entries in which two tables differ."""

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint ` (did you mean 'x'?)` for an error message, or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def fingerprint(table: Mapping[str, Any]) -> str:
    """sha256 of a flat table of plain values, independent of its order."""
    text = "\n".join(f"{key}={table[key]}" for key in sorted(table))
    return hashlib.sha256(text.encode()).hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 20) -> list[str]:
    """The entries in which two flat tables differ, one readable line each."""
    missing = "(absent)"
    lines = [
        f"  {key}: {old.get(key, missing)!r} -> {new.get(key, missing)!r}"
        for key in sorted({*old, *new})
        if old.get(key, missing) != new.get(key, missing)
    ]
    return lines if len(lines) <= limit else [*lines[:limit], f"  ... and {len(lines) - limit} more"]
