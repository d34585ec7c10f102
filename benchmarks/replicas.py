"""What K heads cost against one: a step on a live frozen network, whole runs, and that all of them are right.

python benchmarks/replicas.py [--model NAME] [--weights FILE]           steps of 1 and of 52 heads, on the same images
python benchmarks/replicas.py --data folder:PATH [--epochs 2] [--cache features]      whole runs, to the last file
python benchmarks/replicas.py --check           52 heads on digits together and one by one: time, and largest difference
"""

import pathlib
import tempfile
import time

import common
from absl import app, flags

from tl_jax.core import files

MODEL = flags.DEFINE_string("model", "deit_tiny_patch16_224", "The network; with random weights it costs the same.")
WEIGHTS = flags.DEFINE_string("weights", "", "A weight file of it.")
DATA = flags.DEFINE_string("data", "", "Images for whole runs, such as folder:PATH; empty: steps alone.")
TRAIN = flags.DEFINE_string("train", "train", "The split to train on.")
VAL = flags.DEFINE_string("val", "val", "The split to score.")
CACHE = flags.DEFINE_enum("cache", "", ["", "features"], "config.cache of the whole runs.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images of a step.")
EPOCHS = flags.DEFINE_integer("epochs", 2, "Length of the whole runs.", lower_bound=1)
HEADS = flags.DEFINE_multi_integer(
    "heads", [1, 52], "Numbers of heads; the first is what the others are compared with."
)
CHECK = flags.DEFINE_bool("check", False, "Compare 52 heads with 52 runs.")


def make_config(heads: int, **changes):
    from configs import probe_sweep
    from tl_jax import config as options

    config = probe_sweep.get_config()
    return options.override(config, {
        "replicas": config.replicas[:heads], "model.name": MODEL.value, "model.weights": WEIGHTS.value,
        "batch_size": BATCH_SIZE.value, "data.test": "", "cache": CACHE.value, **changes,
    })  # fmt: skip


def each_alone(config):
    """The config of every replica, which is that of the same run by itself."""
    from tl_jax import config as options

    return [options.override(config, {**dict(changes), "replicas": ()}) for changes in config.replicas]


def make_step(heads: int, images: str):
    """A call that runs one train step, and the FLOPs of it."""
    import jax

    from tl_jax.runtime import sharding
    from tl_jax.training import replicas, settings

    parallel = sharding.make_parallel(devices=jax.devices()[:1])
    config = make_config(heads, **{
        "data.source": f"arrays:{images}", "data.train": "train", "data.val": "val", "total": (1000, "steps")
    })  # fmt: skip
    program = replicas.make([settings.read(each) for each in each_alone(config)], parallel)
    kept = [program.initial(0)]
    batch = next(program.iterate(program.batches(0, kept[0], ["train"], lambda step: False), 0, 1))
    step, cost = program.compile(0, kept[0], batch)

    def call():
        kept[0] = step(kept[0], batch)
        return kept[0]

    return call, cost["flops_per_step"]


def time_steps(folder: pathlib.Path) -> None:
    import numpy as np

    rng, arrays = np.random.default_rng(0), {}
    for split in ("train", "val"):
        arrays[f"{split}_image"] = rng.integers(0, 256, (BATCH_SIZE.value, 224, 224, 3)).astype(np.uint8)
        arrays[f"{split}_label"] = np.arange(BATCH_SIZE.value, dtype=np.int32) % 10
    with tempfile.TemporaryDirectory() as place:
        np.savez(f"{place}/made_up.npz", **arrays)
        made = {heads: make_step(heads, f"{place}/made_up.npz") for heads in HEADS.value}
    seconds = common.take_turns({heads: call for heads, (call, _) in made.items()}, common.ROUNDS.value)
    more = {heads: {"GFLOP": flops / 1e9 if flops else None} for heads, (_, flops) in made.items()}
    report(folder / "steps", f"{MODEL.value}, batch {BATCH_SIZE.value}: a train step, live", seconds, more)


def time_runs(folder: pathlib.Path) -> None:
    from tl_jax.studies import inprocess

    def run(heads):
        config = make_config(heads, **{
            "data.source": DATA.value, "data.train": TRAIN.value, "data.val": VAL.value,
            "total": (EPOCHS.value, "epochs"),
        })  # fmt: skip
        with tempfile.TemporaryDirectory() as place:
            inprocess.run(config, pathlib.Path(place) / "w")

    seconds = common.take_turns({heads: lambda heads=heads: run(heads) for heads in HEADS.value}, common.ROUNDS.value)
    how = "on cached features" if CACHE.value else "live"
    report(folder / "runs", f"{MODEL.value}: a run of {EPOCHS.value} epochs, {how}, all files written", seconds, {})


def report(folder: pathlib.Path, title: str, seconds: dict[int, list[float]], more: dict[int, dict]) -> None:
    first = seconds[HEADS.value[0]]
    rows = [
        {"heads": str(heads), "seconds": common.summary(times)["median"], **more.get(heads, {})}
        | common.ratios(times, first)
        for heads, times in seconds.items()
    ]
    common.report(folder, rows, title, bars=("heads", "median", f"time, of that with {HEADS.value[0]}"))


def check(folder: pathlib.Path) -> None:
    """The largest |difference| / (1 + |value|) between 52 heads and 52 runs, in all that their files hold."""
    import numpy as np

    from tl_jax import config as options
    from tl_jax.studies import inprocess
    from tl_jax.training.train import train
    from tl_jax.weights import formats

    largest: dict[str, float] = {}

    def note(kind, ours, alone):
        ours, alone = np.asarray(ours, np.float64), np.asarray(alone, np.float64)
        largest[kind] = max(
            largest.get(kind, 0.0), float(np.max(np.abs(ours - alone) / (1 + np.abs(alone)), initial=0))
        )

    from configs import probe_sweep

    config = options.override(probe_sweep.get_config(), {
        "total": (50, "steps"), "resamples": 20, "eval_every": (25, "steps"), "cache": CACHE.value
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        home, began = pathlib.Path(place), time.perf_counter()
        names = [row["name"] for row in inprocess.run(config, home / "w")["replicas"]["replicas"]]
        together, began = time.perf_counter() - began, time.perf_counter()
        for name, alone in zip(names, each_alone(config), strict=True):
            train(alone, home / "alone" / name, verbose=False)
        one_by_one = time.perf_counter() - began
        for name in names:
            pair = [home / "w" / "replicas" / name, home / "alone" / name]
            tables = [files.read_rows(path / "metrics.jsonl") for path in pair]
            if [list(row) for row in tables[0]] != [list(row) for row in tables[1]]:
                raise AssertionError(f"{name}: other columns in metrics.jsonl")
            note("metrics.jsonl", *([value for row in table for value in row.values()] for table in tables))
            note("logits", *(np.load(path / "predictions.npz")["logits"] for path in pair))
            parts = [formats.read(path / "trained.safetensors")[0] for path in pair]
            for key in parts[1]:
                note("trained parameters", parts[0][key], parts[1][key])
            results = [files.read_json(path / "result.json")["metrics"] for path in pair]
            note("accuracy", *(each["accuracy"]["value"] for each in results))
    row = {
        "heads": "52",
        "together s": together,
        "one by one s": one_by_one,
        "median": one_by_one / together,
        **largest,
    }
    common.report(
        folder / "check", [row], "52 heads on digits: together, one by one, times faster, largest differences"
    )


def main(argv: list[str]) -> None:
    del argv
    folder = common.start("replicas")
    work = check if CHECK.value else time_runs if DATA.value else time_steps
    work(folder)


if __name__ == "__main__":
    app.run(main)
