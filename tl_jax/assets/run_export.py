"""Runs the exported network of this folder with jax alone (pip install jax flatbuffers).

`python run.py` compares the outputs for golden.npz with those at export; `from run import predict` is for your code.
"""

import hashlib
import json
import pathlib

import jax
import numpy as np
from jax import export

HERE = pathlib.Path(__file__).resolve().parent
TABLE = json.loads((HERE / "export.json").read_text())  # the card, the class names, the shape of inputs, the programs
PLATFORM = "cpu" if jax.default_backend() == "cpu" else "accelerator"
for name, sha256 in TABLE["sha256"].items():
    if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"{name} is not as it was exported: copy the folder again")

data = (HERE / "weights.safetensors").read_bytes()
start = 8 + int.from_bytes(data[:8], "little")
types = {"F32": "float32", "BF16": "bfloat16", "I8": "int8"}
stored = {
    name: np.frombuffer(data[start:][slice(*at["data_offsets"])], jax.numpy.dtype(types[at["dtype"]])).reshape(
        at["shape"]
    )
    for name, at in json.loads(data[8:start]).items()
    if name != "__metadata__"
}
weights = {
    name: jax.numpy.asarray(x.astype("float32") * stored.get(f"{name}:scale", np.float32(1)))
    for name, x in stored.items()
    if not name.endswith(":scale")
}
program = export.deserialize(bytearray((HERE / TABLE["programs"][PLATFORM]["any"]).read_bytes()))
call = jax.jit(program.call, compiler_options=TABLE["compiler_options"].get(PLATFORM))


def predict(inputs):
    """Outputs of inputs [B, ...] as TABLE["input"] says: pixels that are resized and not normalised."""
    return {name: np.asarray(x) for name, x in call(weights, inputs).items()}


if __name__ == "__main__":
    golden = np.load(HERE / "golden.npz")
    for name, found in predict(golden["inputs"]).items():
        error = np.abs(found - golden[name]).max() / np.abs(golden[name]).max()
        print(f"{name} {found.shape}: largest difference {error:.1e} of the largest value")
