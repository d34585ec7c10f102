"""A network that was trained on clean images meets corrupted ones: source, new statistics, Tent and EATA.

python experiments/tent_corruptions/run.py CIFAR10 WEIGHTS OUT [IMAGES]

CIFAR10 is a folder whose test.npz holds the test images of CIFAR-10 as files (bytes, offsets, labels, classes), WEIGHTS
a file of resnet20_cifar. Of the first IMAGES (5,000) of them, OUT gets runs/, table.csv and table.md. What is finished
is not done again. source: nothing is changed; norm: AdaBN, the statistics of all images; tent, eata: one pass in
batches of 200, scored by what was answered before each update (Wang et al. 2021, section 4.1); "N passes": the last.
"""

import csv
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import tl_jax
from configs import transfer
from tl_jax.api.model import score
from tl_jax.training import between

CORRUPTIONS = ("gaussian_noise", "contrast", "brightness", "gaussian_blur", "jpeg")
DECAY = (("gaussian_noise", 5),)  # where Tent also goes on for PASSES
PASSES = (3, 10)
SCALES = ((r".*norm\d*/(scale|bias)", "norm"), (".*", "frozen"))
TERMS = {"norm": {"adabn": {"target": "train"}}, "tent": {"tent": {}}, "eata": {"eata": {}}}


def subset(cifar10: pathlib.Path, count: int, path: pathlib.Path) -> None:
    """Writes the first `count` test images as the split test of an .npz file."""
    arrays = np.load(cifar10 / "test.npz")
    offsets = arrays["offsets"][: count + 1]
    kept = {"bytes": arrays["bytes"][: offsets[-1]], "offsets": offsets, "labels": arrays["labels"][:count]}
    np.savez(path, **{f"test_{name}": values for name, values in kept.items()}, classes=arrays["classes"])


def make_config(method: str, source: str, weights: str, passes: int = 1):
    """One run of `norm`, `tent` or `eata`, which sees the images of the source without their labels."""
    config = transfer.get_config(f"model=resnet20_cifar,weights={weights},method=rules")
    with config.unlocked():
        config.data.source, config.data.labelled, config.data.transductive = source, False, True
        config.data.train, config.data.val, config.data.test = "test", "", "test"
        config.data.sampling, config.model.keep_head = "sequential", True
        config.method.rules = ((".*", "frozen"),) if method == "norm" else SCALES
        config.terms = TERMS[method]
        config.batch_size = config.eval_batch_size = 200  # of the paper
        config.optimizer, config.lr, config.clip, config.schedule.name = "adam", 1e-3, 0.0, "constant"
        config.total = (1.0, "steps") if method == "norm" else (float(passes), "epochs")
        config.eval_every = config.log_every = (float(passes), "epochs")
    return config.lock()


def measure(source: str, weights: str, folder: pathlib.Path, arms) -> dict[str, tl_jax.tasks.Predictions]:
    """{method: what it answered} on one corrupted set, for `source` and pairs (method, passes)."""
    path = folder / "predictions-source.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = score(tl_jax.load("resnet20_cifar", weights), source, "test", batch_size=200)
        tl_jax.tasks.save_predictions(path, found)
    rows = {"source": path}
    for method, passes in arms:
        name = method if passes == 1 else f"{method}, {passes} passes"
        home = folder / name.replace(", ", "_").replace(" ", "_")
        tl_jax.train(make_config(method, source, weights, passes), home, verbose=False)
        rows[name] = home / ("predictions.npz" if method == "norm" else f"predictions-{between.ONLINE}.npz")
    made = {name: tl_jax.load_predictions(path) for name, path in rows.items()}
    spec = next(x.spec for name, x in made.items() if name != "source")  # the weight file names no classes
    return {**made, "source": made["source"]._replace(spec=spec)}


def scores(found: dict) -> list[list]:
    """Rows of corruption, severity, method, error and its interval, points below source and their paired interval."""
    rows = []
    for (name, severity), answered in found.items():
        for method, predictions in answered.items():
            accuracy = tl_jax.summarize(predictions)["accuracy"]
            gain = tl_jax.paired_difference(predictions, answered["source"], metric="accuracy")
            error = [100 * (1 - accuracy[part]) for part in ("value", "high", "low")]
            rows.append([name, severity, method, *error, *(100 * gain[part] for part in ("value", "low", "high"))])
    return rows


def write(rows: list[list], out: pathlib.Path) -> None:
    lines = ["| corruption | severity | method | error | 95 % interval | points below source, paired |"]
    lines += ["| --- | --- | --- | ---: | --- | --- |"]
    for name, severity, method, error, low, high, *gain in rows:
        gained = "" if method == "source" else "{:+.1f} ({:+.1f} .. {:+.1f})".format(*gain)
        lines.append(f"| {name} | {severity} | {method} | {error:.1f} | {low:.1f} .. {high:.1f} | {gained} |")
    (out / "table.md").write_text("\n".join([*lines, ""]))
    with (out / "table.csv").open("w", newline="") as file:
        header = ["corruption", "severity", "method", "error", "low", "high", "gain", "gain_low", "gain_high"]
        csv.writer(file).writerows([header, *rows])


def main(cifar10: pathlib.Path, weights: str, out: pathlib.Path, count: int = 5000) -> None:
    out.mkdir(parents=True, exist_ok=True)
    images = out / f"first_{count}.npz"
    if not images.exists():
        subset(cifar10, count, images)
    once, further = [(method, 1) for method in TERMS], [("tent", passes) for passes in PASSES]
    todo = [(pair, once) for pair in (*((name, 5) for name in CORRUPTIONS), ("clean", 0))]
    todo += [(pair, [*once, *further]) for pair in DECAY]
    found, began = {}, time.monotonic()
    for (name, severity), arms in todo:
        source = f"arrays:{images}" if name == "clean" else f"corrupt:{name}:{severity}:arrays:{images}"
        found[name, severity] = measure(source, weights, out / "runs" / f"{name}_{severity}", arms)
        write(scores(found), out)
        print(f"{name} {severity}: {time.monotonic() - began:.0f} s", flush=True)
    print((out / "table.md").read_text())


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit("usage: python experiments/tent_corruptions/run.py CIFAR10 WEIGHTS OUT [IMAGES]")
    main(pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), *map(int, sys.argv[4:]))
