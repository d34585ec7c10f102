"""What caching the features of the frozen prefix saves: an epoch on them against an epoch through the whole network.

python benchmarks/cache.py [--model deit_tiny_patch16_224] [--weights FILE] [--data folder:PATH]
python benchmarks/cache.py --model minilm_l6 --data text:reviews.csv --train train --val val

Both epochs are those of training: batches made ahead, put on the device, the compiled step with clip and logging, from
the same state. The time to fill the cache is given too: it is paid once for all runs on the same images.
"""

import shutil
import tempfile
import time

import common
from absl import app, flags

MODEL = flags.DEFINE_string("model", "deit_tiny_patch16_224", "A name from tl_jax.models.MODELS.")
WEIGHTS = flags.DEFINE_string("weights", "", "A weight file; empty: random weights.")
DATA = flags.DEFINE_string("data", "digits", "The source; its split train is taken.")
TRAIN = flags.DEFINE_string("train", "train[:20%]", "The split that an epoch goes through.")
VAL = flags.DEFINE_string("val", "train[90%:]", "Another split of it, which a config must name; not used.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples per step.")
WAYS = {
    "head": {"method.name": "linear_probe"},
    "last block": {"method.name": "last_k", "method.k": 1},
    "last 4 blocks": {"method.name": "last_k", "method.k": 4},
}


def prepare(way: dict, cache_dir: str):
    """(epoch of training live or on cached features, the seconds it took to fill the cache, the bytes of it)."""
    import jax
    import numpy as np

    from configs import transfer
    from tl_jax import config as options
    from tl_jax.runtime import sharding
    from tl_jax.training.build import build
    from tl_jax.training.single import Single, shapes_of

    config = options.override(
        transfer.get_config(f"model={MODEL.value},weights={WEIGHTS.value},data={DATA.value}"),
        {"data.train": TRAIN.value, "data.val": VAL.value, "batch_size": BATCH_SIZE.value, **way}
        | ({"cache": "features", "cache_dir": cache_dir} if cache_dir else {}),
    )
    parallel = sharding.make_parallel()
    run = build(config, parallel)
    program = Single(run, parallel)
    kept = [program.initial(0)]
    began = time.perf_counter()
    sets = program.batches(0, kept[0], ["train"], lambda step: False)
    filled, steps = time.perf_counter() - began, -(-len(run.material.data["train"]) // config.batch_size)
    compiled = {}  # texts have batches of several lengths, each with a program

    def epoch():
        for batch in program.iterate(sets, 0, steps):
            shapes = shapes_of(batch)
            if shapes not in compiled:
                compiled[shapes], _ = program.compile(0, kept[0], batch)
            kept[0] = compiled[shapes](kept[0], batch)
        return jax.block_until_ready(kept[0])

    arrays = [getattr(each, "values", each) for each in sets["train"].prepared.values()]  # of tokens, or of examples
    size = sum(values.nbytes for values in arrays if isinstance(values, np.ndarray))
    return epoch, filled, size, steps * config.batch_size


def main(argv: list[str]) -> None:
    del argv
    folder, cache_dir, rows = common.start("cache"), tempfile.mkdtemp(), []
    try:
        for name, way in WAYS.items():
            live, _, _, images = prepare(way, "")
            cached, filled, size, _ = prepare(way, cache_dir)
            seconds = common.take_turns({"live": live, "cached": cached}, common.ROUNDS.value)
            ratio = common.ratios(seconds["live"], seconds["cached"])
            rows.append({
                "trained": name, "live images/s": images / common.summary(seconds["live"])["median"],
                "cached images/s": images / common.summary(seconds["cached"])["median"],
                "fill s": filled, "MB": size / 1e6, **ratio,
            })  # fmt: skip
    finally:
        shutil.rmtree(cache_dir)
    title = f"{MODEL.value}, batch {BATCH_SIZE.value}: seconds of a live epoch / seconds of a cached one"
    common.report(folder, rows, title, bars=("trained", "median", "times faster"))


if __name__ == "__main__":
    app.run(main)
