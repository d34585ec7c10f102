"""The base of every experiment: all options at their defaults, see tl_jax/core/options.py, a probe at HEAD_ALONE.

python launch.py --config configs/transfer.py:model=NAME,weights=PATH,data=SOURCE,method=NAME[,key=value...] --workdir W

The argument sets the options that most runs choose (model, weights, data, method); any other option is a flag,
such as --config.lr=0.01 or --config.schedule.name=linear. Name the method in the argument: its rate and length follow.
"""

from ml_collections import ConfigDict

from tl_jax.config import HEAD_ALONE, make, override, parse, trains_head_alone


def get_config(arg: str = "") -> ConfigDict:
    config = parse(make(), arg)
    return parse(override(make(), HEAD_ALONE), arg) if trains_head_alone(config) else config
