"""A linear probe at 13 learning rates and 4 weight decays: 52 heads on features that are computed once.

python launch.py --config configs/probe_sweep.py:model=NAME,weights=FILE,data=folder:PATH --workdir W

The source's own splits are taken: its val, or a fifth of train; its test, or val is scored, which then chose the best.
Each head leaves the folder of a run in W/replicas, the table is W/replicas.json; val chooses the best, never test.
"""

import itertools

from configs import transfer
from tl_jax.api import inputs
from tl_jax.config import override

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
DECAYS = (0.0, 1e-3, 1e-2, 1e-1)


def get_config(arg: str = ""):
    config = transfer.get_config("model=resnet8_cifar,weights=builtin:glyphs,data=digits,method=linear_probe")
    with config.unlocked():
        config.cache = "features"
        config.replicas = tuple(
            (("lr", rate), ("weight_decay", decay)) for rate, decay in itertools.product(RATES, DECAYS)
        )
    given = transfer.parse(config, arg)
    return transfer.parse(
        override(config, inputs.default_splits(given.data.source, given.task, given.data.labels)), arg
    )
