"""How much the battery tries, and what became of it.

`pytest -m battery` tries many of everything; else a few. With BATTERY=FILE each outcome is a line of FILE, which
battery.py counts.
"""

import json
import os
from collections.abc import Collection

import pytest

many = False  # as conftest.py finds it


def amount(few: int, plenty: int) -> int:
    """How many to try."""
    return plenty if many else few


def of(names: Collection[str], quick: Collection[str] = ()) -> list:
    """Parameters: those that are not quick are slow, but with `-m battery`."""
    return [pytest.param(name, marks=() if many or name in quick else pytest.mark.slow) for name in names]


def tried(kind: str, outcome: str, count: int = 1) -> None:
    """Notes what became of something that was tried."""
    if path := os.environ.get("BATTERY"):
        with open(path, "a") as file:
            file.write(json.dumps({"class": kind, "outcome": outcome, "count": count}) + "\n")
