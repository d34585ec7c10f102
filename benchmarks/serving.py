"""An exported network against our own jit, ONNX Runtime and PyTorch: the same answers, and how soon.

python benchmarks/serving.py --model deit_tiny_patch16_224 --weights FILE [--data FOLDER --examples 1000] [--server]

Each way runs in a process of its own that lives as long as the benchmark and waits for its turn. Latency is that of
one batch of uint8 images in memory; p50 and p99 are over all calls of all rounds. PyTorch (timm) has random weights,
its images are normalised before, and CNNs run channels_last. --data: the answers for files of a folder are compared
before anything is timed. --server: what a request of one JPEG takes over HTTP, less decoding and answering it in this
process.
"""

import dataclasses
import http.client
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import common
import numpy as np
from absl import app, flags

MODEL = flags.DEFINE_string("model", "deit_tiny_patch16_224", "A name that timm has too.")
WEIGHTS = flags.DEFINE_string("weights", "", "Its weight file; without one its weights are random.")
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Images of a batch.")
CALLS = flags.DEFINE_integer("calls", 20, "Calls of a way in a round.")
DATA = flags.DEFINE_string("data", "", "A folder of images whose answers are compared.")
EXAMPLES = flags.DEFINE_integer("examples", 1000, "Of --data, at most; fewer files are read again, mirrored.")
SERVER = flags.DEFINE_bool("server", False, "Time requests over HTTP too.")
WAY = flags.DEFINE_string("way", "", "Used by the benchmark itself: be one of WAYS.")
FOLDER = flags.DEFINE_string("folder", "", "Used by the benchmark itself: the exported folder.")
WAYS = ("our jit", "exported", "ONNX Runtime", "torch eager", "torch.compile")


def network(folder):
    """The network itself, from the weights of its export."""
    import tl_jax
    from tl_jax.core import trees

    exported = tl_jax.load_export(folder)
    model = tl_jax.load(MODEL.value, WEIGHTS.value)
    return exported, dataclasses.replace(model, variables=trees.unflatten(exported.variables))


def make_call(way, folder):
    """The function of uint8 images [B, H, W, C] -> logits of a way."""
    if way in ("our jit", "exported"):
        from tl_jax.serving import artefact

        chosen = network(folder)[way == "our jit"]
        return lambda x: artefact.run(chosen, x)["logits"]
    if way == "ONNX Runtime":
        import onnxruntime

        session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
        return lambda x: session.run(["logits"], {"inputs": x})[0]
    torch, timm = common.import_timm()
    model = timm.create_model(MODEL.value.split(".")[0]).eval()
    layout = torch.contiguous_format if "vit" in MODEL.value or "deit" in MODEL.value else torch.channels_last
    model = model.to(memory_format=layout)
    model = torch.compile(model) if way == "torch.compile" else model

    def call(x):
        with torch.inference_mode():
            pixels = (
                torch.from_numpy(x).permute(0, 3, 1, 2).to(torch.float32).div_(255).contiguous(memory_format=layout)
            )
            return model(pixels).numpy()

    return call


def be(way):
    """One way: for every line, a batch size, the times of CALLS calls."""
    table = json.loads(pathlib.Path(FOLDER.value, "export.json").read_text())
    call, shape = make_call(way, FOLDER.value), table["input"]["shape"]
    for line in sys.stdin:
        x = np.random.default_rng(0).integers(0, 256, (int(line), *shape[1:]), np.uint8)
        for _ in range(3):
            call(x)
        times = []
        for _ in range(CALLS.value):
            began = time.perf_counter()
            call(x)
            times.append(time.perf_counter() - began)
        print(json.dumps(times), flush=True)


def images():
    return sorted(path for path in pathlib.Path(DATA.value).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


def compare(folder):
    """Prints the largest difference of logits from our jit, of the largest logit, and the share of equal top-1."""
    from tl_jax.api.model import read_input
    from tl_jax.data.image.augment import make_preprocess

    card = network(folder)[0].card
    preprocess, files = make_preprocess(card), images()
    pixels = np.stack([read_input(path, card, preprocess) for path in files[: EXAMPLES.value]])
    pixels = np.concatenate([pixels, pixels[:, :, ::-1], pixels[:, ::-1], pixels[:, ::-1, ::-1]])[: EXAMPLES.value]
    batches = np.array_split(pixels, -(-len(pixels) // 32))
    own = None
    for way in WAYS[:3]:
        found = np.concatenate([*map(make_call(way, folder), batches)])
        own = found if own is None else own
        off, same = np.abs(found - own).max() / np.abs(own).max(), (found.argmax(1) == own.argmax(1)).mean()
        print(f"{way:14} {len(pixels):,} images: largest difference {off:.1e}, the same class {same:.2%}")


def time_server(folder):
    """Seconds of requests over HTTP, and of the same work in this process, in turns."""
    from tl_jax.api.model import read_input
    from tl_jax.data.image.augment import make_preprocess
    from tl_jax.serving import artefact

    exported = artefact.load(folder)
    picture, preprocess = images()[0].read_bytes(), make_preprocess(exported.card)
    command = [sys.executable, "-m", "tl_jax", "serve", folder, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=common.ROOT)
    port = next(int(found[1]) for line in server.stdout if (found := re.match(r"ready: .*:(\d+)", line)))
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def over_http():
        connection.request("POST", "/predict", picture, {"Content-Type": "image/jpeg"})
        assert connection.getresponse().read()

    def in_process():
        artefact.run(exported, read_input(picture, exported.card, preprocess)[None])

    times = {"over HTTP": [], "in process": []}
    for i in range(CALLS.value * common.ROUNDS.value):
        for way, call in (("over HTTP", over_http), ("in process", in_process)):
            began = time.perf_counter()
            call()
            times[way] += [time.perf_counter() - began] if i >= 5 else []
    server.terminate()
    server.wait()
    return [{"way": way, "batch": 1, **summary(its)} for way, its in times.items()]


def summary(times):
    ordered = sorted(times)
    return {"p50": statistics.median(times), "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}


def main(argv):
    if WAY.value:
        return be(WAY.value)
    folder = common.start("serving")
    with tempfile.TemporaryDirectory() as scratch:
        import tl_jax

        out = f"{scratch}/out"
        tl_jax.export(tl_jax.load(MODEL.value, WEIGHTS.value), out, onnx=True)
        if DATA.value:
            compare(out)
        started = {}
        for way in WAYS:
            command = [sys.executable, __file__, f"--way={way}", f"--folder={out}", f"--model={MODEL.value}",
                       f"--weights={WEIGHTS.value}", f"--calls={CALLS.value}"]  # fmt: skip
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
            started[way] = subprocess.Popen(command, **pipes)
        times = {(way, batch): [] for batch in BATCHES.value for way in WAYS}
        for i in range(common.ROUNDS.value + 1):
            for way, batch in times:
                started[way].stdin.write(f"{batch}\n")
                started[way].stdin.flush()
                answer = started[way].stdout.readline()
                times[way, batch] += json.loads(answer) if i else []
        for process in started.values():
            process.stdin.close()
            process.wait()
        rows = [{"way": way, "batch": int(batch), **summary(its)} for (way, batch), its in times.items()]
        own = {row["batch"]: row["p50"] for row in rows if row["way"] == WAYS[0]}
        rows = [{**row, "of our jit": row["p50"] / own[row["batch"]]} for row in rows]
        if SERVER.value:
            rows += time_server(out)
        shutil.rmtree(out)
    common.report(folder, rows, title=f"serving {MODEL.value}", bars=("way", "p50", "seconds"))


if __name__ == "__main__":
    app.run(main)
