"""What a value must be, stated once at the option or parameter: `alpha: Annotated[float, checks.number(0)] = 0.01`."""

import functools
import inspect
import math
import re
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from tl_jax.core.messages import brief, nearest, shorten

FLOAT32_MAX = 3.4028234663852886e38
LARGEST = 2**63 - 1  # integer that numpy and jax have a type for
UNITS = ("epochs", "steps", "examples")


class Check(NamedTuple):
    """fits(value): whether a value is valid; expected: what a valid one is, such as "a number of at least 0"."""

    fits: Callable[[Any], bool]
    expected: str


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False) -> Check:
    """A finite number from low to high; above, below: without that bound itself."""

    def fits(value: Any) -> bool:
        finite = isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX
        return finite and (low < value if above else low <= value) and (value < high if below else value <= high)

    bounds = [f"{'above' if above else 'of at least'} {low:g}"] if low > -math.inf else []
    bounds += [f"{'below' if below else 'at most'} {high:g}"] if high < math.inf else []
    return Check(fits, " ".join(["a number", " and ".join(bounds)]).strip())


def integer(low: int, high: int = LARGEST) -> Check:
    """A whole number from low to high."""
    real, bounds = number(low, high), f" of at least {low}" + (f" and at most {high}" if high < LARGEST else "")
    return Check(lambda value: isinstance(value, int) and real.fits(value), f"an integer{bounds}")


def one_of(*names: Any) -> Check:
    return Check(lambda value: value in names, f"one of {', '.join(str(name) or repr(name) for name in names)}")


def sequence(of: Check, expected: str, length: int | None = None) -> Check:
    """A list or tuple of values that each fit."""
    return Check(lambda x: _is_sequence(x, length) and all(map(of.fits, x)), expected)


def either(one: Check, other: Check) -> Check:
    return Check(lambda value: one.fits(value) or other.fits(value), f"{one.expected}, or {other.expected}")


def duration(*, zero: bool = False) -> Check:
    """(amount, unit) with a unit of UNITS."""
    amount = number(0, LARGEST, above=not zero)
    expected = f"(amount {'>= 0' if zero else '> 0'}, one of {', '.join(UNITS)})"
    return Check(lambda x: _is_sequence(x, 2) and amount.fits(x[0]) and x[1] in UNITS, expected)


def _is_sequence(value: Any, length: int | None = None) -> bool:
    return isinstance(value, list | tuple) and length in (None, len(value))


def _is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _are_pairs(value: Any, kind: type = object) -> bool:
    pairs = _is_sequence(value) and all(_is_sequence(pair, 2) for pair in value)
    return pairs and all(isinstance(name, str) and isinstance(inner, kind) for name, inner in value)


TEXT = Check(lambda value: isinstance(value, str), "a string")
FLAG = Check(lambda value: isinstance(value, bool), "True or False")
REGEX = Check(_is_regex, "a regular expression")
TEXTS = sequence(TEXT, "a sequence of strings, such as ('stage4',)")
REGEXES = sequence(REGEX, "a sequence of regular expressions, such as ('stage4/.*',)")
RULES = Check(lambda value: _are_pairs(value, str), "pairs of strings, ((regex, name), ...)")
NAMED = Check(lambda value: _are_pairs(value, Mapping), "pairs (name, {parameter: value})")
CHANGES = Check(_are_pairs, "pairs (dotted option, value)")
TABLE = Check(lambda value: isinstance(value, Mapping) and all(isinstance(k, str) for k in value), "{name: value}")
ANY = Check(lambda value: True, "any value")


@functools.cache
def parameters(function: Callable) -> dict[str, Check]:
    """The parameters of a function that are checked: those annotated with a Check."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {x: getattr(hints.get(x), "__metadata__", (None,))[0] for x in inspect.signature(function).parameters}
    return {name: check for name, check in found.items() if isinstance(check, Check)}


def table_problems(what: str, given: Any, known: Mapping[str, Check]) -> list[str]:
    """What is wrong with arguments {parameter: value}; one sentence for each."""
    if not isinstance(given, Mapping):
        return [f"{what}: {brief(given)} is not a table {{parameter: value}}"]
    problems = []
    for name, value in given.items():
        if name not in known:
            has = ", ".join(known) or "none"
            problems.append(f"{what} has no parameter {brief(name)}{nearest(str(name), known)}; it has: {has}")
        elif not known[name].fits(value):
            problems.append(f"{what}: {name} = {brief(value)}, expected {known[name].expected}")
    return problems


def call_problems(kind: str, name: Any, given: Any, registry: Mapping[str, Callable]) -> list[str]:
    """What is wrong with one entry (name, {parameter: value}) for a registry of functions with annotated parameters."""
    if name not in registry:
        return [f"there is no {kind} {brief(name)}{nearest(str(name), registry)}; known: {', '.join(registry)}"]
    return table_problems(name, given, parameters(registry[name]))


def pairs_problems(kind: str, pairs: Sequence, registry: Mapping[str, Callable]) -> list[str]:
    """The same for pairs, in which each name may occur once."""
    problems, counts = [], Counter()
    for pair in pairs:
        if _is_sequence(pair, 2) and isinstance(pair[0], str):
            problems += call_problems(kind, *pair, registry)
            counts[pair[0]] += 1
        else:
            problems.append(f"{brief(pair)} is not a pair (name, {{parameter: value}})")
    return problems + [f"{kind} {name!r} is given {count} times" for name, count in counts.items() if count > 1]


def refuse(what: str, problems: Iterable[str], shown: int = 20) -> None:
    """Raises one ValueError that lists the problems, if there are any."""
    if found := list(dict.fromkeys(problems)):
        raise ValueError("\n  ".join([f"{what}:", *shorten(found, shown)]))
