"""ULMFiT's fine-tuning of a classifier of texts (Howard & Ruder 2018, section 3.3), for any network of blocks.

python launch.py --config configs/ulmfit.py:model=NAME,weights=FILE,data=text:PATH --workdir W

The head trains for an epoch, then one block more in each epoch, then all of it for `total`. The rate of a block is that
of the block above it over 2.6; the embeddings lie below the first block. Each phase has a slanted triangle: a tenth of
it up, then down to a 32nd.
"""

from ml_collections import ConfigDict

from tl_jax import models
from tl_jax.config import make, override, parse

BASE = {
    "model.name": "lstm_256x2", "lr": 0.01, "optimizer": "adam", "optimizer_args": {"b1": 0.7, "b2": 0.99},
    "layer_decay": 1 / 2.6, "schedule.name": "linear", "schedule.args": {"final": 1 / 32}, "batch_size": 64,
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    config = parse(override(make(), BASE), arg)
    blocks = sum(cut.startswith("block") for cut in models.get(config.model.name).module(num_classes=0).cuts)
    changes = [{"method.name": "linear_probe"}]
    changes += [{"method.name": "last_k", "method.k": k} for k in range(1, blocks + 1)]
    changes = [{**change, "total": (1.0, "epochs")} for change in changes]
    changes.append({"method.name": "full", "total": config.total})
    for change in changes:
        amount, unit = change["total"]
        change["schedule.warmup"] = (amount / 10, unit)
    return override(config, {"phases": tuple(tuple(change.items()) for change in changes)})
