"""The same work in tl_jax and in timm/PyTorch: on one machine, taking turns, each in a process of its own.

python benchmarks/vs_torch.py [--models resnet18,resnet50,vit_small_patch16_224] [--ways "forward,head,last block,full"]
python benchmarks/vs_torch.py --device gpu --batch_size 128 --steps 20
python benchmarks/vs_torch.py --end_to_end --models deit_tiny_patch16_224 --weights FILE --data folder:PATH

Ours is the step that a run with these options takes: labels, clipping, logged gradient norm, frozen prefix. PyTorch has
the same weights, images, AdamW (fused), clip and frozen parts: what is frozen needs no gradient, and only what trains
is in train mode. It runs channels_last (all but ViTs) in float32 on a CPU, in bfloat16 and compiled on a GPU, where
ours is in bfloat16 too. Both take uint8 images of 224 pixels and normalise them. Before anything is timed, the losses
of the first step must be equal. Ours keeps its memory as under launch.py (runtime/malloc.py), PyTorch is as it comes;
--torch_memory gives it the same malloc.

--end_to_end: a linear probe from the weight file to its accuracy on test, each in a process of its own, from its start
to its end: `launch.py` with cached features, against a loop that decodes and resizes in two workers and runs the frozen
backbone in every epoch. Ours has an empty features cache; its compiled programs are kept from the first round on, as
they are for a user. --torch_epochs N times N epochs of the loop and scales them up.
"""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import common
from absl import app, flags

MODELS = flags.DEFINE_list("models", ["resnet18", "resnet50", "vit_small_patch16_224"], "Names that timm has too.")
WAYS = flags.DEFINE_list("ways", ["forward", "head", "last block", "full"], "What runs, or trains.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images of a step.")
STEPS = flags.DEFINE_integer("steps", 1, "Steps of a measurement, of which the last is waited for; 20 suits a GPU.")
END_TO_END = flags.DEFINE_bool("end_to_end", False, "Time a whole linear probe of the first of --models.")
WEIGHTS = flags.DEFINE_string("weights", "", "Its weight file, in timm's names.")
DATA = flags.DEFINE_string("data", "", "Its images, folder:PATH.")
TRAIN = flags.DEFINE_string("train", "train", "The split to train on.")
TEST = flags.DEFINE_string("test", "val", "The split to score.")
EPOCHS = flags.DEFINE_integer("epochs", 30, "Epochs of the probe.")
TORCH_EPOCHS = flags.DEFINE_integer("torch_epochs", 0, "Epochs that the loop is timed for; 0: all.")
TORCH_MEMORY = flags.DEFINE_bool("torch_memory", False, "Start PyTorch with our malloc too.")
SIDE = flags.DEFINE_enum("side", "", ["", "ours", "PyTorch"], "Used by the benchmark itself: be one of the two.")
MADE = flags.DEFINE_string("made", "", "Used by the benchmark itself: where weights, images and facts are handed over.")
LOOP = flags.DEFINE_string("loop", "", "Used by the benchmark itself: run the PyTorch loop, write its result here.")

METHODS = {"forward": {}, "head": {"method.name": "linear_probe"}, "full": {"method.name": "full"}}
METHODS["last block"] = {"method.name": "last_k", "method.k": 1}
LR, CLIP, PIXELS = 1e-3, 1.0, 224
WEIGHTS_FILE, BATCH_FILE, FACTS_FILE = "weights.safetensors", "batch.npz", "facts.json"


def make_images(folder: pathlib.Path) -> str:
    """A data source of made-up images."""
    import numpy as np

    rng, arrays = np.random.default_rng(0), {}
    for split in ("train", "val"):
        arrays[f"{split}_image"] = rng.integers(0, 256, (BATCH_SIZE.value, PIXELS, PIXELS, 3)).astype(np.uint8)
        arrays[f"{split}_label"] = np.arange(BATCH_SIZE.value, dtype=np.int32) % 10
    np.savez(folder / "images.npz", **arrays)
    return f"arrays:{folder / 'images.npz'}"


def make_ours(name: str, way: str, folder: pathlib.Path) -> tuple[Callable[[], object], dict]:
    """A call that runs --steps steps, and the facts PyTorch's side needs or is held against; writes the weights."""
    import jax
    import numpy as np

    from configs import transfer
    from tl_jax import config as options
    from tl_jax.runtime import sharding
    from tl_jax.training import single, steps
    from tl_jax.training.build import build
    from tl_jax.weights import load

    config = options.override(
        transfer.get_config(f"model={name},data={make_images(folder)}"),
        {"data.train": "train", "data.val": "val", "batch_size": BATCH_SIZE.value, "model.head_init": "lecun",
         "model.dtype": "bfloat16" if common.DEVICE.value == "gpu" else "float32", "total": (1000, "steps"),
         "model.image_size": PIXELS,
         "schedule.name": "constant", "lr": LR, "clip": CLIP, **METHODS[way]},
    )  # fmt: skip
    parallel = sharding.make_parallel()
    run = build(config, parallel)
    card, program = run.material.card, single.Single(run, parallel)
    facts = {"num_classes": card.num_classes, "mean": list(card.mean), "std": list(card.std)}
    load.export(run.material.variables, name, folder / WEIGHTS_FILE, card=card, layout="timm")
    host_batch = run.material.streams["train"][0]
    np.savez(folder / BATCH_FILE, image=host_batch["image"], label=host_batch["label"])
    batch, kept = parallel.put_batch({"train": host_batch}), [program.initial(0)]
    if way == "forward":
        variables, images = single.current_variables(kept.pop()), batch["train"]["image"]
        traced = parallel.evaluate(steps.make_eval_step(run.material.readers["model"], run.task)).trace(
            variables, images
        )
        compiled = traced.lower().compile()

        def call():
            for _ in range(STEPS.value):
                outputs = compiled(variables, images)
            return jax.block_until_ready(outputs)

        logits = jax.numpy.asarray(call()["logits"])
        loss = float(-jax.nn.log_softmax(logits)[jax.numpy.arange(len(logits)), host_batch["label"]].mean())
        flops = parallel.cost(compiled, traced.jaxpr)["flops_per_step"]
        return call, {**facts, "loss": loss, "trained": 0, "flops": flops}
    step, cost = program.compile(0, kept[0], batch)
    kept[0] = step(kept[0], batch)
    loss = float(kept[0].sums["loss"]) / BATCH_SIZE.value

    def call():
        for _ in range(STEPS.value):
            kept[0] = step(kept[0], batch)
        return jax.block_until_ready(kept[0])

    trained = run.phases[0].audit["totals"]["trainable"]
    return call, {**facts, "loss": loss, "trained": trained, "flops": cost["flops_per_step"]}


def make_torch(name: str, way: str, folder: pathlib.Path) -> tuple[Callable[[], object], dict]:
    """The same of PyTorch's, from what `make_ours` left in `folder`."""
    import numpy as np

    torch, timm = common.import_timm()
    from safetensors.torch import load_file

    gpu = common.DEVICE.value == "gpu"
    place = torch.device("cuda" if gpu else "cpu")
    vit = name.startswith(("vit", "deit"))
    layout = torch.contiguous_format if vit else torch.channels_last
    facts, batch = json.loads((folder / FACTS_FILE).read_text()), np.load(folder / BATCH_FILE)
    size = {"img_size": PIXELS} if vit else {}
    model = timm.create_model(name, num_classes=facts["num_classes"], **size)
    model.load_state_dict(load_file(folder / WEIGHTS_FILE), strict=True)
    model = model.to(place, memory_format=layout).eval().requires_grad_(False)
    trained = {"forward": [], "full": [model], "head": [model.get_classifier()]}
    trained["last block"] = [model.get_classifier(), *last_block(model)]
    for module in trained[way]:
        module.train().requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=0.0, fused=True) if parameters else None
    images = torch.from_numpy(batch["image"]).to(place).permute(0, 3, 1, 2)
    labels = torch.from_numpy(batch["label"]).long().to(place)
    mean, std = (torch.tensor(facts[x], device=place).view(1, 3, 1, 1) * 255 for x in ("mean", "std"))
    network = torch.compile(model) if gpu else model

    def step():
        x = ((images.float() - mean) / std).contiguous(memory_format=layout)
        with torch.set_grad_enabled(bool(parameters)), torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            loss = torch.nn.functional.cross_entropy(network(x).float(), labels)
        if parameters:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
        return loss.detach()

    def call():
        for _ in range(STEPS.value):
            step()
        if gpu:
            torch.cuda.synchronize()

    return call, {"loss": float(step()), "trained": sum(parameter.numel() for parameter in parameters)}


def last_block(model) -> list:
    """The modules of timm's network that METHODS["last block"] trains, besides the head."""
    family = type(model).__name__
    if family == "ResNet":
        return [model.layer4[-1]]
    if family == "EfficientNet":  # MobileNets too
        return [model.blocks[-1][-1], model.conv_head, model.bn2]
    if family == "ConvNeXt":
        return [model.stages[-1].blocks[-1], model.head.norm]
    if family == "VGG":
        return [[layer for layer in model.features if hasattr(layer, "weight")][-1], model.pre_logits]
    return [model.blocks[-1], model.norm]


def serve(folder: pathlib.Path, ours: Callable = make_ours, torch: Callable = make_torch) -> None:
    """One side: says its facts, then runs its call whenever it gets a line, and says when it is done."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    call, facts = {"ours": ours, "PyTorch": torch}[SIDE.value](MODELS.value[0], WAYS.value[0], folder)
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:
        call()
        print("done", file=answers, flush=True)


class Side:
    """One of the two, in a process that sleeps while the other works: no thread of one waits on the other's cores."""

    def __init__(self, side: str, name: str, way: str, folder: pathlib.Path):
        own = [f"--side={side}", f"--models={name}", f"--ways={way}", f"--made={folder}"]
        environment = dict(os.environ) if side == "ours" or TORCH_MEMORY.value else common.plain_environment()
        command = [sys.executable, *sys.argv, *own]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.facts = json.loads(self.answer())

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} ended with {self.process.wait()}")
        return line

    def __call__(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(name: str, way: str, unit: str = "images", size: int = 1) -> dict:
    """The row of a model and a way; raises AssertionError where the two do not do the same work.

    unit: what is counted, `size` of an example.
    """
    sides = []
    with tempfile.TemporaryDirectory() as made:
        try:
            ours = Side("ours", name, way, pathlib.Path(made))
            sides.append(ours)
            pathlib.Path(made, FACTS_FILE).write_text(json.dumps(ours.facts))
            theirs = Side("PyTorch", name, way, pathlib.Path(made))
            sides.append(theirs)
            tolerance = 1e-2 if common.DEVICE.value == "gpu" else 1e-4  # bfloat16 has three digits
            losses, trained = ([side.facts[fact] for side in sides] for fact in ("loss", "trained"))
            if trained[0] != trained[1] or not math.isclose(*losses, rel_tol=tolerance):
                raise AssertionError(f"{name}, {way}: losses {losses}, trained {trained}")
            seconds = common.take_turns({"ours": ours, "PyTorch": theirs}, common.ROUNDS.value)
        finally:
            for side in sides:
                side.close()
    count = BATCH_SIZE.value * STEPS.value * size
    return {
        "case": f"{name}, {way}", f"{unit}/s": count / common.summary(seconds["ours"])["median"],
        "PyTorch": count / common.summary(seconds["PyTorch"])["median"],
        **common.ratios(seconds["PyTorch"], seconds["ours"]),
        "loss": losses[0], "its loss": losses[1], "GFLOP": (ours.facts["flops"] or math.nan) / 1e9, "seconds": seconds,
    }  # fmt: skip


def loop(result: pathlib.Path) -> None:
    """The linear probe as a plain PyTorch program: accuracy on test, seconds of every epoch."""
    torch, timm = common.import_timm()
    from PIL import Image

    from tl_jax import models

    name, root, card = MODELS.value[0], pathlib.Path(DATA.value.partition(":")[2]), models.get(MODELS.value[0]).card
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) * 255 for x in (card.mean, card.std))

    class Folder(torch.utils.data.Dataset):
        def __init__(self, split):
            self.classes = sorted(path.name for path in (root / TRAIN.value).iterdir())
            self.files = [
                (path, i) for i, c in enumerate(self.classes) for path in sorted((root / split / c).iterdir())
            ]

        def __len__(self):
            return len(self.files)

        def __getitem__(self, i):
            path, label = self.files[i]
            image, short = Image.open(path).convert("RGB"), int(card.input_size / card.crop)
            scale = short / min(image.size)
            width, height = (round(side * scale) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            left, top = (round((side - card.input_size) / 2) for side in (width, height))
            image = image.crop((left, top, left + card.input_size, top + card.input_size))
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            return pixels.view(card.input_size, card.input_size, 3).permute(2, 0, 1), label

    def batches(split, shuffle):
        return torch.utils.data.DataLoader(
            Folder(split), BATCH_SIZE.value, shuffle, num_workers=2, persistent_workers=shuffle
        )

    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = timm.create_model(name)
    model.load_state_dict(load_file(WEIGHTS.value))
    model.reset_classifier(len(Folder(TRAIN.value).classes))
    head = model.get_classifier()
    torch.nn.init.zeros_(head.weight)
    model.eval().requires_grad_(False)
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), LR, weight_decay=0.0, fused=True)
    train = batches(TRAIN.value, True)
    total = EPOCHS.value * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))

    def features(images):
        with torch.no_grad():
            return model.forward_head(model.forward_features((images.float() - mean) / std), pre_logits=True)

    epochs = []
    for _ in range(TORCH_EPOCHS.value or EPOCHS.value):
        began = time.perf_counter()
        for images, labels in train:
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(head(features(images)), labels).backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), CLIP)
            optimizer.step()
            schedule.step()
        epochs.append(time.perf_counter() - began)
    hits = sum(int((head(features(x)).argmax(1) == y).sum()) for x, y in batches(TEST.value, False))
    result.write_text(json.dumps({"epochs": epochs, "hits": hits, "of": len(Folder(TEST.value))}))


def probe(folder: pathlib.Path) -> list[dict]:
    """The rows of a whole linear probe: ours, PyTorch's, and the ratio."""
    cache, seconds, hits = pathlib.Path(tempfile.mkdtemp()), {"ours": [], "PyTorch": []}, {}
    ours_config = f"configs/transfer.py:model={MODELS.value[0]},weights={WEIGHTS.value},data={DATA.value}"
    given = {
        "data.train": TRAIN.value, "data.val": "", "data.test": TEST.value, "cache": "features", "lr": LR, "clip": CLIP,
        "total": f"({EPOCHS.value}, 'epochs')", "batch_size": BATCH_SIZE.value,
    }  # fmt: skip
    try:
        for round_ in range(common.ROUNDS.value):
            work = cache / str(round_)
            more = {**given, "cache_dir": work / "features"}
            command = ["launch.py", "--config", ours_config, *(f"--config.{k}={v}" for k, v in more.items())]
            began = time.perf_counter()
            subprocess.run([sys.executable, *command, "--workdir", str(work / "run")], check=True, cwd=common.ROOT,
                           env={**common.plain_environment(), "HOME": str(cache)})  # fmt: skip
            seconds["ours"].append(time.perf_counter() - began)
            scored = json.loads((work / "run" / "result.json").read_text())
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, *sys.argv, f"--loop={cache / 'loop.json'}"], check=True,
                env=dict(os.environ) if TORCH_MEMORY.value else common.plain_environment(),
            )  # fmt: skip
            spent, done = time.perf_counter() - began, json.loads((cache / "loop.json").read_text())
            # The first epoch starts the workers; the others are what more epochs would cost.
            later = done["epochs"][1:] or done["epochs"]
            seconds["PyTorch"].append(spent + (EPOCHS.value - len(done["epochs"])) * sum(later) / len(later))
            hits = {"ours": (scored, EPOCHS.value), "PyTorch": (done, len(done["epochs"]))}
    finally:
        shutil.rmtree(cache)
    return summarise(seconds, hits)


def summarise(seconds, hits) -> list[dict]:
    of = hits["PyTorch"][0]["of"]
    accuracy = hits["ours"][0]["metrics"]["accuracy"]
    counted = {"ours": round(accuracy["value"] * of), "PyTorch": hits["PyTorch"][0]["hits"]}
    rows = []
    for way, times in seconds.items():
        low, high = wilson(counted[way], of)
        rows.append({
            "case": way, **common.summary(times), "epochs timed": hits[way][1], "accuracy": counted[way] / of,
            "from": low, "to": high, "seconds": times,
        })  # fmt: skip
    return [*rows, {"case": "times as fast", **common.ratios(seconds["PyTorch"], seconds["ours"])}]


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    centre, half = (hits + z * z / 2) / (n + z * z), z * math.sqrt(hits * (n - hits) / n + z * z / 4) / (n + z * z)
    return centre - half, centre + half


def main(argv: list[str]) -> None:
    del argv
    if LOOP.value:
        return loop(pathlib.Path(LOOP.value))
    if SIDE.value:
        return serve(pathlib.Path(MADE.value))
    if common.DEVICE.value == "gpu":
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.4")  # the other half is PyTorch's
    folder = common.start("vs_torch")
    if END_TO_END.value:
        rows = probe(folder)
        title = f"{MODELS.value[0]}, linear probe of {EPOCHS.value} epochs, batch {BATCH_SIZE.value}: seconds"
        if 0 < TORCH_EPOCHS.value < EPOCHS.value:
            title += f"; {TORCH_EPOCHS.value} epochs of PyTorch timed, scaled up to {EPOCHS.value}"
        columns = ("case", "median", "low", "high", "epochs timed", "accuracy", "from", "to")
        return common.report(folder, rows, title, bars=("case", "median", "seconds"), columns=columns)
    rows = [measure(name, way) for name in MODELS.value for way in WAYS.value]
    title = f"batch {BATCH_SIZE.value}, {'bfloat16' if common.DEVICE.value == 'gpu' else 'float32'}: images/s"
    title += ", and how many times as fast as PyTorch"
    columns = ("case", "images/s", "PyTorch", "median", "low", "high", "loss", "its loss", "GFLOP")
    common.report(folder, rows, title, bars=("case", "median", "times as fast as PyTorch"), columns=columns)


if __name__ == "__main__":
    app.run(main)
