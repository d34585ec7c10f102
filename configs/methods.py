"""Every way of adapting a network as the few lines of config that it is. When to use which: docs/methods.md.

python launch.py --config configs/methods.py:METHOD,model=NAME,weights=FILE,data=folder:PATH --workdir W

tl_jax/methods/recipes.py holds what each changes in a linear probe.
"""

from tl_jax.config import HEAD_ALONE, make, override, parse
from tl_jax.core.messages import nearest
from tl_jax.methods.recipes import LR, METHODS, methods, phases

__all__ = ["METHODS", "get_config", "methods", "phases"]


def get_config(arg: str = ""):
    """The argument begins with a method's name; without one it is a linear probe."""
    name, _, rest = arg.partition(",")
    if "=" in name or not name:
        name, rest = "linear_probe", arg
    config = parse(override(make(), HEAD_ALONE if name == "linear_probe" else {"lr": LR}), rest)
    table = methods(*config.total)
    if name not in table:
        raise ValueError(f"there is no method {name!r}{nearest(name, table)}; known: {', '.join(table)}")
    return override(config, table[name])
