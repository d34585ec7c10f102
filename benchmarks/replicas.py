"""What do K heads cost beside one? Step and epoch time of a live frozen backbone, and that all of them are right.

python benchmarks/replicas.py [--weights FILE] [--data folder:PATH] [--device gpu] [--out FOLDER]

Steps: K = 1 and K = 52 heads on the same images, alternated, in one process. Epochs (--data): whole runs with one head
and with 52, alternated. Equality (--check): 52 heads on digits against 52 runs by themselves.
"""

import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time

from absl import app, flags, logging

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

MODEL = flags.DEFINE_string("model", "deit_tiny_patch16_224", "The network; with random weights it costs the same.")
WEIGHTS = flags.DEFINE_string("weights", "", "A weight file of it.")
DATA = flags.DEFINE_string("data", "", "Images for whole epochs, such as folder:PATH; empty: steps alone.")
TRAIN = flags.DEFINE_string("train", "train", "The split to train on.")
VAL = flags.DEFINE_string("val", "val", "The split to score.")
BATCH_SIZE = flags.DEFINE_integer("batch-size", 32, "Images of a step.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements of each.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 2, "Steps of one measurement.", lower_bound=1)
EPOCHS = flags.DEFINE_integer("epochs", 2, "Length of the whole runs.", lower_bound=1)
COUNTS = flags.DEFINE_list("counts", ["1", "52"], "Numbers of heads; the first is what the others are compared with.")
CHECK = flags.DEFINE_bool("check", False, "Train 52 heads on digits together and one by one, and compare.")
DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu", "tpu"], "Where.")
OUT = flags.DEFINE_string("out", "workdirs/benchmarks/replicas", "Rows as JSON, and the figure.")


def make_config(count: int, **changes):
    from configs import probe_sweep
    from tl_jax import options

    config = probe_sweep.get_config()
    return options.override(config, {"replicas": config.replicas[:count], **changes})


def time_steps(counts: list[int]) -> list[dict]:
    """Seconds of a train step for each number of heads, on the same made-up images."""
    import jax
    import numpy as np

    from tl_jax import options, replicas, sharding

    folder = pathlib.Path(tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val"):
        arrays[f"{split}_image"] = rng.integers(0, 256, (BATCH_SIZE.value, 224, 224, 3)).astype(np.uint8)
        arrays[f"{split}_label"] = np.arange(BATCH_SIZE.value, dtype=np.int32) % 10
    np.savez(folder / "made_up.npz", **arrays)
    parallel, programs = sharding.make_parallel(devices=jax.devices()[:1]), {}
    for count in counts:
        config = make_config(count, **{
            "model.name": MODEL.value, "model.weights": WEIGHTS.value,
            "data.source": f"arrays:{folder / 'made_up.npz'}",
            "data.train": "train", "data.val": "val", "data.test": "", "batch_size": BATCH_SIZE.value,
            "total": (1000, "steps"),
        })  # fmt: skip
        group = replicas.build(options.replicas(config), parallel)
        state = replicas.initial_state(group, 0, parallel)
        batch = replicas.put_batches(group, [group.runs[0].batches[0]], parallel)
        streams = {**group.streams, "batch": batch}
        numbers = parallel.place(replicas.numbers_of(group, 0))
        inputs = {"shared": group.shared, "streams": streams, "numbers": numbers}
        step, cost = parallel.compile(replicas.make_train_step(group, 0, parallel), state, inputs)
        programs[count] = [step, state, inputs, cost]
    shutil.rmtree(folder)
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for round_ in range(ROUNDS.value + 1):  # the first warms up
        for count, (step, state, inputs, _) in programs.items():
            began = time.perf_counter()
            for _ in range(STEPS.value):
                state = step(state, inputs)
            jax.block_until_ready(state)
            programs[count][1] = state
            if round_:
                seconds[count].append((time.perf_counter() - began) / STEPS.value)
    costs = {count: program[-1] for count, program in programs.items()}
    return [{"what": "step", "heads": count, "seconds": seconds[count], **costs[count]} for count in counts]


def time_epochs(counts: list[int]) -> list[dict]:
    """Seconds of whole runs, from the config to the last file."""
    from tl_jax import sweep

    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for round_ in range(ROUNDS.value + 1):
        for count in counts:
            config = make_config(count, **{
                "model.name": MODEL.value, "model.weights": WEIGHTS.value, "data.source": DATA.value,
                "data.train": TRAIN.value, "data.val": VAL.value, "data.test": "", "batch_size": BATCH_SIZE.value,
                "total": (EPOCHS.value, "epochs"),
            })  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                sweep.sweep(config, pathlib.Path(folder) / "w", verbose=False)
                if round_:
                    seconds[count].append(time.perf_counter() - began)
    what = f"run of {EPOCHS.value} epochs"
    return [{"what": what, "heads": count, "seconds": seconds[count]} for count in counts]


def check_equality() -> dict:
    """The largest difference, relative to 1 + |value|, between 52 heads and 52 runs, in all that their files hold."""
    import numpy as np

    from tl_jax import formats, options, sweep, train, workdir

    largest, seconds = {"predictions": 0.0, "metrics.jsonl": 0.0, "trained": 0.0, "result": 0.0}, {}

    def note(kind, ours, alone):
        ours, alone = np.asarray(ours, np.float64), np.asarray(alone, np.float64)
        largest[kind] = max(largest[kind], float(np.max(np.abs(ours - alone) / (1 + np.abs(alone)), initial=0)))

    config = make_config(52, **{"total": (50, "steps"), "resamples": 20, "eval_every": (25, "steps")})
    with tempfile.TemporaryDirectory() as place:
        folder, began = pathlib.Path(place), time.perf_counter()
        table = sweep.sweep(config, folder / "w", verbose=False)
        seconds["together"], began = time.perf_counter() - began, time.perf_counter()
        for row, alone in zip(table["replicas"], options.replicas(config), strict=True):
            train.train(alone, folder / "alone" / row["name"], verbose=False)
        seconds["one by one"] = time.perf_counter() - began
        for row in table["replicas"]:
            pair = [folder / "w" / "replicas" / row["name"], folder / "alone" / row["name"]]
            rows = [workdir.read_rows(path / "metrics.jsonl") for path in pair]
            if [list(each) for each in rows[0]] != [list(each) for each in rows[1]]:
                raise AssertionError(f"{row['name']}: other columns in metrics.jsonl")
            note("metrics.jsonl", *([value for each in table for value in each.values()] for table in rows))
            note("predictions", *(np.load(path / "predictions.npz")["logits"] for path in pair))
            parts = [formats.read(path / "trained.safetensors")[0] for path in pair]
            for key in parts[1]:
                note("trained", parts[0][key], parts[1][key])
            results = [workdir.read_json(path / "result.json")["metrics"] for path in pair]
            note("result", *(each["accuracy"]["value"] for each in results))
    return {"what": "52 heads on digits against 52 runs", "largest": largest, "seconds": seconds}


def show(rows: list[dict], folder: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    print(f"{'what':<20}{'heads':>6}{'median s':>10}{'min':>9}{'max':>9}{'x first':>9}{'GFLOP':>8}")
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        for i, row in enumerate(mine):
            ratios = [a / b for a, b in zip(row["seconds"], mine[0]["seconds"], strict=True)]
            row["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            flops = f"{row['flops_per_step'] / 1e9:>8.1f}" if row.get("flops_per_step") else ""
            median = statistics.median(row["seconds"])
            line = f"{what:<20}{row['heads']:>6}{median:>10.3f}{min(row['seconds']):>9.3f}{max(row['seconds']):>9.3f}"
            print(f"{line}{row['ratio']['median']:>9.2f}{flops}")
            if i:
                low, high = (abs(row["ratio"][end] - row["ratio"]["median"]) for end in ("min", "max"))
                label = f"{what}, {row['heads']} heads"
                axes.errorbar([label], [row["ratio"]["median"]], [[low], [high]], fmt="o", capsize=4, color="C0")
    axes.axhline(1.3, linestyle="--", color="C3", label="1.3")
    axes.axhline(1.0, color="0.7")
    axes.set_ylabel(f"time, relative to {rows[0]['heads']} head")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "replicas.png", dpi=120)


def main(argv):
    del argv
    os.environ.setdefault("JAX_PLATFORMS", {"gpu": "cuda"}.get(DEVICE.value, DEVICE.value))
    logging.set_verbosity(logging.WARNING)
    import jax

    folder, counts = pathlib.Path(OUT.value), [int(count) for count in COUNTS.value]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{MODEL.value}, batch {BATCH_SIZE.value}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    if CHECK.value:
        rows = [check_equality()]
        print(json.dumps(rows[0], indent=1))
    else:
        rows = time_epochs(counts) if DATA.value else time_steps(counts)
        show(rows, folder)
    name = "check" if CHECK.value else "epochs" if DATA.value else "steps"
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
