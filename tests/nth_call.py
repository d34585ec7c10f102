"""What happens behind one call of a function: for programs that a test ends there."""

import functools
import importlib
import itertools
from collections.abc import Callable


def behind(place: str, number: int, act: Callable[[], object]) -> None:
    """Has act() follow the call of that number of a place, "module:function" or "module:Class.function"."""
    module, _, names = place.partition(":")
    *owners, name = names.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    real, calls = getattr(owner, name), itertools.count(1)

    def followed(*arguments, **named):
        found = real(*arguments, **named)
        if next(calls) == number:
            act()
        return found

    setattr(owner, name, followed)
