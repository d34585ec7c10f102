"""What the input pipeline gives: JPEGs, packed images, the way to the device, and the wait for data in a real run.

python benchmarks/input.py                                    (generated photos of 500 x 375)
python benchmarks/input.py --data folder:PATH --what train    (fine-tunes all of --model on them)

Every rate is that of a stream of training batches whose consumer takes them and does nothing else. Of JPEGs: decoded,
random-resized crop to 224, mirrored at random; in turns with torch's DataLoader and timm's transform, where these are
installed. With them what one core does of each piece alone, which bounds all of it. Of packed images (short side
256): random crop of 224, mirrored at random. The wait is that of timing.jsonl, without its first line, which compiles.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import common

from tl_jax.core.card import Card
from tl_jax.data import pipeline, sources
from tl_jax.data.image import decode, ops
from tl_jax.data.readers import pack

DATA = flags.DEFINE_string("data", "", "folder:PATH with a split named train; empty: photos are generated.")
IMAGES = flags.DEFINE_integer("images", 256, "How many photos to generate, 500 x 375.")
QUALITY = flags.DEFINE_integer("quality", 90, "JPEG quality of generated photos: 75 gives 67 kB each, 90 gives 108 kB.")
WORKERS = flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of worker processes; 0: threads.")
INTERPOLATION = flags.DEFINE_enum("interpolation", "bicubic", list(ops.RESAMPLE), "Of the random-resized crop.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "JPEGs per batch; large ones come too seldom to be timed well.")
PACKED_BATCH = flags.DEFINE_integer("packed_batch_size", 256, "Packed images per batch, and images to the device.")
SECONDS = flags.DEFINE_float("seconds", 1.5, "Seconds timed per round and way.")
WHAT = flags.DEFINE_list("what", ["jpeg", "packed", "device"], "What to measure of jpeg, packed, device, train.")
MODEL = flags.DEFINE_string("model", "deit_tiny_patch16_224", "What train fine-tunes.")
WEIGHTS = flags.DEFINE_string("weights", "", "Its weight file; empty: random weights, at the same speed.")
TRAIN_BATCH = flags.DEFINE_integer("train_batch_size", 32, "Examples per step of train.")

CARD = Card("benchmark", 2)
TARGETS = {"jpeg": 1_600, "packed": 50_000, "wait": 0.02}  # images/s, crops/s with 2 workers; share of the step
COLUMNS = ("what", "workers", "median", "low", "high", "target")


def photo(seed: int, height: int = 375, width: int = 500) -> bytes:
    """A JPEG whose spectrum falls as a photo's does (1 / frequency), with regions that have edges, in soft colours."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf

    def field(power: float) -> np.ndarray:
        waves = frequency**-power * np.exp(2j * np.pi * rng.random(frequency.shape))
        values = np.fft.irfft2(waves, (height, width))
        return values / values.std()

    light = 125 + 55 * field(1.1) + 40 * np.digitize(field(1.6), [-1, 0, 1]) - 50
    red, blue = 18 * field(1.5), 18 * field(1.5)
    pixels = np.stack([light + red, light - (red + blue) / 2, light + blue], axis=-1)
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY.value)
    return stream.getvalue()


def make_photos(folder: pathlib.Path) -> str:
    """Writes the photos and returns them as a source."""
    for i in range(IMAGES.value):
        path = folder / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(i))
    return f"folder:{folder}"


def rate_of(stream, warm_up: int) -> float:
    """Images per second of an iterator of batches, after the first ones."""
    for _ in range(warm_up):
        next(stream)
    count, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < SECONDS.value:
        batch = next(stream)
        count += len(batch["image"] if isinstance(batch, dict) else batch)
    return count / seconds


def ours(source: sources.Source, augment: list, batch_size: int, workers: int) -> float:
    batches = pipeline.train_batches(source, {"image": pipeline.View(CARD, augment)}, batch_size, 0)
    with contextlib.closing(batches.iterate(0, 10**9, workers)) as stream:
        return rate_of(stream, 3 + 2 * workers)


def alone(call, count: int) -> float:
    """Calls per second of `call(i)`, i = 0 ... count - 1 in turn, on one core."""
    np.empty(2**24, np.uint8)  # as the workers do, see data/workers.py
    done, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < SECONDS.value:
        call(done % count)
        done += 1
    return done / seconds


class Files:
    """The images of a source as a data set of torch's: timm's transform of each file, uint8."""

    def __init__(self, images, transform):
        self.paths, self.transform = [os.path.join(images.root, path) for path in images.paths], transform

    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        image = self.transform(Image.open(self.paths[index % len(self.paths)]).convert("RGB"))
        return image if isinstance(image, np.ndarray) else np.asarray(image)


@functools.cache
def import_torch():
    """(torch, timm's create_transform), None where they are not installed."""
    try:
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):  # some builds of torchvision lack them, and cannot be imported
            with contextlib.suppress(RuntimeError):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torch.kept = library  # the operators live as long as this
        from timm.data import create_transform
    except ImportError:
        return None
    return torch, create_transform


def torchs(source: sources.Source, workers: int) -> float:
    torch, create_transform = import_torch()
    transform = create_transform(
        CARD.input_size, is_training=True, use_prefetcher=True, color_jitter=None, interpolation=INTERPOLATION.value
    )
    loader = torch.utils.data.DataLoader(Files(source.inputs, transform), BATCH_SIZE.value, num_workers=workers)
    return rate_of(iter(loader), 1 + 2 * workers)


def measure(ways: dict) -> list[dict]:
    """A row of images per second for each way; keys are (what, workers, target)."""
    rates = {key: [] for key in ways}
    for _ in range(common.ROUNDS.value):
        for key, call in ways.items():
            rates[key].append(call())
    return [
        {
            "way": what if workers is None else f"{what}, {workers} workers",
            "what": what,
            "workers": workers,
            **common.summary(rates[what, workers, target]),
            "target": target,
        }
        for what, workers, target in ways
    ]


def jpeg_rows(source: sources.Source) -> list[dict]:
    encoded = [source.inputs[i] for i in range(min(len(source), 64))]
    decoded, rng = [decode.decode_image(data) for data in encoded], np.random.default_rng(0)
    crop = {"size": CARD.input_size, "interpolation": INTERPOLATION.value}
    ways = {
        ("decode alone, 1 core", None, None): lambda: alone(lambda i: decode.decode_image(encoded[i]), len(encoded)),
        ("crop and resize alone, 1 core", None, None): lambda: alone(
            lambda i: ops.random_resized_crop(decoded[i], rng, **crop), len(encoded)
        ),
    }
    augment = [("random_resized_crop", {"interpolation": INTERPOLATION.value}), ("flip", {})]
    for workers in map(int, WORKERS.value):
        target = TARGETS["jpeg"] if workers == 2 else None
        ways["tl_jax", workers, target] = functools.partial(ours, source, augment, BATCH_SIZE.value, workers)
        if import_torch():
            ways["torch and timm", workers, None] = functools.partial(torchs, source, workers)
    return measure(ways)


def packed_rows(source: sources.Source) -> list[dict]:
    size, order = CARD.input_size, np.random.default_rng(0).permutation(len(source))
    rows = np.empty((PACKED_BATCH.value, size, size, 3), np.uint8)

    def copy(i: int) -> None:
        rows[i % len(rows)] = source.inputs[order[i]][:size, :size]

    ways = {("copy of the pixels alone, 1 core", None, None): lambda: alone(copy, len(source))}
    for workers in map(int, WORKERS.value):
        target = TARGETS["packed"] if workers == 2 else None
        for what, augment in {
            "crop and mirror": [("random_crop", {}), ("flip", {})],
            "crop": [("random_crop", {})],
            "random-resized crop and mirror": [("random_resized_crop", {}), ("flip", {})],
        }.items():
            goal = target if what == "crop and mirror" else None
            ways[what, workers, goal] = functools.partial(ours, source, augment, PACKED_BATCH.value, workers)
    return sorted(measure(ways), key=lambda row: list(dict.fromkeys(way[0] for way in ways)).index(row["what"]))


def device_rows() -> list[dict]:
    """Images per second onto the device, until they are there: as uint8, and as float32 that the host normalised."""
    import jax

    images = np.random.default_rng(0).integers(0, 256, (PACKED_BATCH.value, 224, 224, 3), np.uint8)
    ways = {"uint8": images, "float32": images.astype(np.float32)}
    seconds = common.take_turns(
        {name: functools.partial(lambda array: jax.device_put(array).block_until_ready(), array)
         for name, array in ways.items()}, 4 * common.ROUNDS.value
    )  # fmt: skip
    return [
        {"what": name, **common.summary([PACKED_BATCH.value / s for s in times]),
         "GB/s": ways[name].nbytes / common.summary(times)["median"] / 1e9}
        for name, times in seconds.items()
    ]  # fmt: skip


def train_row(out: pathlib.Path, source: str, workers: int) -> dict:
    """Fine-tunes everything for twelve steps; the share of the time in which the device waited for data."""
    with tempfile.TemporaryDirectory(dir=out) as workdir:
        options = {"model": MODEL.value, "weights": WEIGHTS.value, "data": source, "method": "full",
                   "data.train": "train[:90%]", "data.val": "train[90%:]", "data.workers": workers, "lr": 1e-5,
                   "data.augment": (("random_resized_crop", {}), ("flip", {})), "batch_size": TRAIN_BATCH.value,
                   "total": (12.0, "steps"), "eval_every": (12.0, "steps"), "log_every": (2.0, "steps")}  # fmt: skip
        config = "configs/transfer.py:" + ",".join(f"{key}={value}" for key, value in options.items())
        command = [sys.executable, "launch.py", "--config", config, "--workdir", workdir]
        subprocess.run(command, cwd=common.ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (pathlib.Path(workdir) / "timing.jsonl").read_text().splitlines()][1:]
    waited, seconds = (sum(line[key] for line in lines) for key in ("data_wait_seconds", "seconds"))
    return {
        "what": source.partition(":")[0],
        "workers": workers,
        "wait of the time": waited / seconds,
        "highest of a line": max(line["data_wait"] for line in lines),
        "target": TARGETS["wait"],
        "images/s": float(np.median([line["examples_per_second"] for line in lines])),
    }


def main(argv: list[str]) -> None:
    del argv
    out, bars = common.start("input"), ("way", "median", "per second")
    with tempfile.TemporaryDirectory(dir=out) as folder:
        data = DATA.value or make_photos(pathlib.Path(folder) / "photos")
        source, packed = sources.load(data), f"packed:{folder}/packed"
        pack.pack(data, f"{folder}/packed", report=lambda text: None)
        size = f"{len(source)} images of {source.sizes.mean() / 1e3:.0f} kB, {INTERPOLATION.value}"
        if "jpeg" in WHAT.value:
            title = f"JPEG to 224 px, images/s: {size}"
            common.report(out / "jpeg", jpeg_rows(source), title, bars, COLUMNS)
        if "packed" in WHAT.value:
            title = "packed, short side 256, to 224 px: crops/s"
            common.report(out / "packed", packed_rows(sources.load(packed)), title, bars, COLUMNS)
        if "device" in WHAT.value:
            common.report(out / "device", device_rows(), "to the device, images/s", ("what", *bars[1:]))
        if "train" in WHAT.value:
            rows = [train_row(out, s, workers) for workers in map(int, WORKERS.value) for s in (data, packed)]
            common.report(out / "train", rows, f"{MODEL.value}, full fine-tuning, batch {TRAIN_BATCH.value}: data wait")


if __name__ == "__main__":
    app.run(main)
