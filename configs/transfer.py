"""The base of every experiment: all options at their defaults, see tl_jax/core/options.py.

python launch.py --config configs/transfer.py:model=NAME,weights=PATH,data=SOURCE,method=NAME[,key=value...] --workdir W

The argument sets the options that most runs choose (model, weights, data, method); any other option is a flag,
such as --config.lr=0.01 or --config.schedule.name=linear.
"""

from ml_collections import ConfigDict

from tl_jax.config import make, parse


def get_config(arg: str = "") -> ConfigDict:
    return parse(make(), arg)
