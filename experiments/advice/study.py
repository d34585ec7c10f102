"""Was the advice good? Every candidate of a race trains for as long as any run of a race may.

Scored are val, as in the race, and the race's test, the set `unseen`.
"""

import pathlib

from tl_jax import config
from tl_jax.advice import race
from tl_jax.core import files
from tl_jax.studies.study import Study

TEST = "unseen"


def get_study(arg: str = "") -> Study:
    """The argument is race=W, the folder of a race that is over."""
    given = dict(item.partition("=")[::2] for item in arg.split(",") if item)
    if set(given) != {"race"}:
        raise ValueError(f"{arg!r}: expected race=W, the folder of a race that is over")
    folder = pathlib.Path(given["race"])
    state = files.read_json(folder / "advice.json")
    over = race.open_race(state["asked"], folder)
    levels = {name: over.options_of(name, race.LONGEST) for name in state["candidates"]}
    test = (TEST, over.base.data.source, state["splits"]["data.test"])
    base = config.override(over.base, {"data.extra_eval": (test,)})
    return Study(base, {"candidate": levels}, seeds=(base.seed,), together="cached")
