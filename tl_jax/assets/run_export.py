"""Runs the exported network of this folder with jax alone (pip install jax flatbuffers).

`python run.py` compares the outputs for golden.npz with those at export; `from run import predict` is for your code.
"""

import functools
import hashlib
import json
import pathlib

import jax
import numpy as np

HERE, BACKEND = pathlib.Path(__file__).resolve().parent, jax.default_backend()
TABLE = json.loads((HERE / "export.json").read_text())  # the card, the class names, the shape of inputs, the programs
PROGRAMS = TABLE["programs"]["cpu" if BACKEND == "cpu" else "accelerator"]
for file, sha256 in TABLE["sha256"].items():
    if hashlib.sha256((HERE / file).read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{file} is not as it was exported: copy the folder again")

data = (HERE / "weights.safetensors").read_bytes()
start, kinds = 8 + int.from_bytes(data[:8], "little"), {"F32": "float32", "BF16": "bfloat16", "I8": "int8"}
stored = {}
for name, at in json.loads(data[8:start]).items():
    if name != "__metadata__":
        values = data[start + at["data_offsets"][0] : start + at["data_offsets"][1]]
        stored[name] = np.frombuffer(values, jax.numpy.dtype(kinds[at["dtype"]])).reshape(at["shape"]).astype("float32")
scales = {name: stored.pop(name) for name in list(stored) if name.endswith(":scale")}
WEIGHTS = {name: jax.numpy.asarray(x * scales.get(f"{name}:scale", np.float32(1))) for name, x in stored.items()}


@functools.cache
def program(file):
    call = jax.export.deserialize(bytearray((HERE / file).read_bytes())).call
    return jax.jit(call, compiler_options=TABLE["compiler_options"].get(BACKEND))


def predict(inputs):
    """Outputs of inputs [B, ...] as TABLE["input"] says: pixels that are resized and not normalised."""
    call = program(PROGRAMS.get(str(len(inputs)), PROGRAMS["any"]))
    return {name: np.asarray(x) for name, x in call(WEIGHTS, inputs).items()}


if __name__ == "__main__":
    golden = np.load(HERE / "golden.npz")
    for name, found in predict(golden["inputs"]).items():
        error = np.abs(found - golden[name]).max() / np.abs(golden[name]).max()
        print(f"{name} {found.shape}: largest difference {error:.1e} of the largest value")
        if not error <= TABLE["limits"][BACKEND]:
            raise SystemExit(f"the outputs are not those of the export (limit {TABLE['limits'][BACKEND]:g})")
