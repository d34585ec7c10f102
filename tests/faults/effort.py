"""How much the battery tries, and what became of it.

`pytest -m battery` tries many of everything; else a few. With BATTERY=FILE each outcome is a line of FILE, which
battery.py counts.
"""

import json
import os
import sys
from collections.abc import Collection

import pytest

MANY = "battery"  # the mark, and the whole expression behind -m


def many() -> bool:
    """Whether pytest was given `-m battery`."""
    return any(a == "-m" and b == MANY for a, b in zip(sys.argv, sys.argv[1:], strict=False)) or bool(
        os.environ.get("BATTERY")
    )


def amount(few: int, plenty: int) -> int:
    """How many to try."""
    return plenty if many() else few


def of(names: Collection[str], quick: Collection[str] = ()) -> list:
    """Parameters: those that are not quick are slow, but with `-m battery`."""
    return [pytest.param(name, marks=() if many() or name in quick else pytest.mark.slow) for name in names]


def tried(kind: str, outcome: str, count: int = 1) -> None:
    """Notes what became of something that was tried."""
    if path := os.environ.get("BATTERY"):
        with open(path, "a") as file:
            file.write(json.dumps({"class": kind, "outcome": outcome, "count": count}) + "\n")
