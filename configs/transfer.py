"""The base of every experiment: all options at their defaults, see tl_jax/core/options.py, for a linear probe at PROBE.

python launch.py --config configs/transfer.py:model=NAME,weights=PATH,data=SOURCE,method=NAME[,key=value...] --workdir W

The argument sets the options that most runs choose (model, weights, data, method); any other option is a flag,
such as --config.lr=0.01 or --config.schedule.name=linear. Name the method in the argument: its rate and length follow.
"""

from ml_collections import ConfigDict

from tl_jax.config import make, override, parse
from tl_jax.methods.recipes import PROBE


def get_config(arg: str = "") -> ConfigDict:
    config = parse(make(), arg)
    return parse(override(make(), PROBE), arg) if config.method.name == "linear_probe" else config
