"""Texts that errors are made of: the nearest known name, lists cut short, how two tables differ."""

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SHOWN = 200  # characters of a value


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint ` (did you mean 'x'?)` for an error message, or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def brief(value: Any) -> str:
    """A value as an error message shows it: on one line, of at most SHOWN characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list within a list within ...
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def shorten(offenders: Sequence[str], shown: int) -> list[str]:
    """The first offenders, and how many more there are."""
    more = [f"and {len(offenders) - shown} more"] if len(offenders) > shown else []
    return [*offenders[:shown], *more]


def listed(offenders: Sequence[str], shown: int = 10) -> str:
    """As `shorten`, one to a line."""
    return "\n".join(f"  {offender}" for offender in shorten(offenders, shown))


def unequal(wanted: Sequence[str], found: Sequence[str]) -> str:
    """Which of the wanted names are missing, which are additional, or their order; "" where all is as wanted."""
    names = {"missing": [x for x in wanted if x not in found], "additional": [x for x in found if x not in wanted]}
    texts = [f"{what} {', '.join(shorten(each, 10))}" for what, each in names.items() if each]
    ordered = "" if list(wanted) == list(found) else f"in another order: {', '.join(shorten(list(found), 10))}"
    return "; ".join(texts) or ordered


def fingerprint(table: Mapping[str, Any]) -> str:
    """sha256 of a flat table of plain values, independent of its order."""
    return hashlib.sha256("\n".join(f"{key}={table[key]}" for key in sorted(table)).encode()).hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any], limit: int = 20) -> list[str]:
    """The entries in which two flat tables differ, one readable line each."""
    pairs = {key: (old.get(key, "(absent)"), new.get(key, "(absent)")) for key in sorted({*old, *new})}
    lines = [f"{key}: {before!r} -> {after!r}" for key, (before, after) in pairs.items() if before != after]
    return [f"  {line}" for line in shorten(lines, limit)]
