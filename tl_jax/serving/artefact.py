"""An exported network: a folder with programs, weights and all that answering takes; a changed one is refused."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from tl_jax.api import calibration
from tl_jax.api import model as models
from tl_jax.api.model import Model, Network
from tl_jax.api.run import Run, load_run
from tl_jax.core import files, npz, trees
from tl_jax.core.card import Card
from tl_jax.core.checks import refuse
from tl_jax.data.text import tokenizer
from tl_jax.data.text.tokens import PADDING
from tl_jax.runtime import sharding
from tl_jax.runtime.compile_cache import keep_compiled_programs
from tl_jax.serving import neighbours, onnx_file, program
from tl_jax.tasks import Predictions, load_predictions, refuse_language, save_predictions, trust
from tl_jax.weights import formats, quantize

TABLE, WEIGHTS, GOLDEN, RUN = "export.json", "weights.safetensors", "golden.npz", "run.py"
ONNX, EXAMPLES, REFERENCE = "model.onnx", "examples.npz", "reference.npz"
OBSERVED = 2000
ASSET = pathlib.Path(__file__).parents[1] / "assets/run_export.py"
FORMAT = 2
LIMITS = {"cpu": 1e-4, "gpu": 2e-2, "tpu": 5e-2}  # of the largest value; accelerators multiply with fewer digits
HALF = {**LIMITS, "cpu": 2e-2}  # of networks that compute in half precision


@dataclasses.dataclass(frozen=True, eq=False)
class Exported(Network):
    """An exported network, which `predict`, `outputs`, `features` and `evaluate` take as they take a run or a model."""

    folder: pathlib.Path
    table: dict[str, Any]  # export.json
    card: Card
    variables: dict[str, np.ndarray]  # {path: float32 array}
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)  # none is random

    @property
    def name(self) -> str:
        return self.card.model

    @property
    def weights(self) -> str:
        return str(self.folder)

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        return {path.removeprefix("params/"): x for path, x in self.variables.items() if path.startswith("params/")}

    @functools.cached_property
    def trust(self) -> trust.Trust | None:
        """What `calibrate` had left of the run; None where it was not called."""
        path = self.folder / trust.FILE
        return trust.load(path) if path.exists() else None

    @functools.cached_property
    def reference(self) -> Predictions | None:
        """Predictions on examples that the run was scored by; None for a network that comes of no run."""
        path = self.folder / REFERENCE
        return load_predictions(path) if path.exists() else None

    @functools.cached_property
    def compiled(self) -> tuple[sharding.Parallel, Any, Callable]:
        """As of a Model, on one device."""
        keep_compiled_programs()
        parallel, backend = sharding.make_parallel(devices=jax.devices()[:1]), jax.default_backend()
        platform = "cpu" if backend == "cpu" else "accelerator"
        names = self.table["programs"][platform]
        data = {batch: (self.folder / name).read_bytes() for batch, name in names.items()}
        return parallel, parallel.place(self.variables), program.compile_for(data, backend)


def export(
    network: Model | Run, out: str | os.PathLike, *, precision: str = "float32", onnx: bool = False, examples: int = 0
) -> pathlib.Path:
    """Writes a network into a new folder that runs it without this package.

    program-*.stablehlo: uint8 pixels (or the rows of a table) in, normalisation inside, logits or values and features
    out; for a CPU, and for CUDA and TPU; for any batch. weights.safetensors: what they take, in `precision`, one of
    `quantize.PRECISIONS`; the programs compute with them as float32. export.json: card, class names, the sha256 of all
    files. golden.npz: inputs and their outputs, which `load` compares. run.py: runs it with jax alone. Of a run, what
    `calibrate` has left comes along, and reference.npz, OBSERVED of the predictions that it was scored by, with which
    drift is found. LoRA is merged. Later versions of jax read programs for six months at least.
    onnx: model.onnx too, which holds the weights as float32 numbers of that precision. examples: how many examples of
    the training data are packed with small pictures and features, of which the server shows the nearest.
    """
    out = pathlib.Path(out)
    model = _checked(network, out, onnx, examples)
    packed = quantize.pack({path: np.asarray(x) for path, x in trees.flatten(model.variables).items()}, precision)
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        part.mkdir()
        formats.write_safetensors(part / WEIGHTS, packed, {"precision": precision})
        shutil.copyfile(ASSET, part / RUN)
        if model.card.input == "text":
            tokenizer.known(model.card).save(part)
        table = {
            "format": FORMAT,
            "jax": jax.__version__,
            "card": json.loads(model.card.replace(class_names=model.spec.class_names).to_json()),
            "input": _input(model.card),
            "precision": precision,
            "limits": HALF if np.dtype(model.module.dtype).itemsize < 4 else LIMITS,
            "programs": _write_programs(part, model),
            "compiler_options": sharding.OPTIONS,
            "run": _facts(network) if isinstance(network, Run) else {},
        }
        stored = quantize.unpack(packed)
        inputs, outputs = _write_golden(part, Exported(part, table, _card(table), stored))
        if onnx:
            onnx_file.write(dataclasses.replace(model, variables=trees.unflatten(stored)), part / ONNX, inputs, outputs)
        if isinstance(network, Run):
            reduced = None if precision == "float32" else dataclasses.replace(model, variables=trees.unflatten(stored))
            _write_companions(part, network, examples, reduced)
        files.write_json(part / TABLE, {**table, "sha256": _hashes(part)})
        with files.writing(out):
            os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _checked(network: Model | Run, out: pathlib.Path, onnx: bool, examples: int) -> Model:
    """The network that is exported; ValueError, before any work, for what cannot be."""
    if onnx:
        onnx_file.check_installed()
    problems = {
        f"{out} exists: remove it, or name another folder": out.exists(),
        f"there is no folder {out.parent} to write to": not out.parent.is_dir(),
        f"--examples {examples}: they are of the data of a run, and a weight file has none": examples
        and isinstance(network, Model),
    }
    refuse("nothing is exported", [text for text, wrong in problems.items() if wrong])
    model = getattr(network, "model", network)
    refuse_language(model.card.task, model.weights or model.name)
    if not model.card.num_classes:
        raise ValueError(f"{model.name} was loaded without a head: there is nothing to answer with")
    if model.card.parts:
        raise ValueError(f"{model.name} reads several inputs, and exported programs read one: use the run itself")
    return model


def _write_programs(folder: pathlib.Path, model: Model) -> dict[str, dict[str, str]]:
    """{platform: {batch: name of the file}}."""
    names: dict[str, dict[str, str]] = {}
    for platform, programs in program.trace(model).items():
        names[platform] = {batch: f"program-{platform}-{batch}.stablehlo" for batch in programs}
        for batch, data in programs.items():
            (folder / names[platform][batch]).write_bytes(data)
    return names


def _write_companions(folder: pathlib.Path, run: Run, examples: int, reduced: Model | None) -> None:
    """What a run knows beyond its network: trust, predictions to find drift with, examples of its training data.

    reduced: the network with weights of fewer bits, on whose own outputs all of it is then found again.
    """
    if run.trust and reduced:
        trust.save(folder / trust.FILE, calibration.refit(run, reduced))
    elif run.trust:
        shutil.copyfile(run.folder / trust.FILE, folder / trust.FILE)
    if (path := run.folder / "predictions.npz").exists():
        found = load_predictions(path)
        if reduced:
            found = models.score(reduced, calibration.splits_of(run)[run.result["split"]])
        some = np.sort(np.random.default_rng(0).permutation(len(found.values))[:OBSERVED])
        ids = np.arange(len(some)).astype(str)  # names of files are nobody's business
        save_predictions(folder / REFERENCE, found.select(some)._replace(ids=ids))
    if examples:
        neighbours.save(folder / EXAMPLES, neighbours.collect(run, reduced or run, examples))


def _facts(run: Run) -> dict[str, Any]:
    """What the folder says of the run that it comes from."""
    result = run.result
    kept = ("model", "method", "data", "split", "step", "weights_sha256", "metrics")  # of float32 weights
    return {"folder": run.folder.name, **{key: result[key] for key in kept if key in result}}


def _hashes(folder: pathlib.Path) -> dict[str, str]:
    return {path.name: files.sha256(path) for path in sorted(folder.iterdir()) if path.name != TABLE}


def _card(table: Mapping[str, Any]) -> Card:
    return Card.from_json(json.dumps(table["card"]))


def _input(card: Card) -> dict[str, Any]:
    """What the programs take; of texts, tokens as models/tokens.py has them, of any length up to the card's."""
    tokens = "tokens" if card.texts == 1 else "2 tokens"
    shape = [tokens, 2] if card.input == "text" else list(card.shape)
    return {"shape": ["batch", *shape], "type": program.input_type(card).name}


def _write_golden(folder: pathlib.Path, exported: Exported) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Writes and gives two inputs of noise, no example of anybody's data, and their outputs."""
    shape, rng = (2, *exported.card.shape), np.random.default_rng(0)
    kind = program.input_type(exported.card)
    if exported.card.input == "text":  # one of them shorter than the other
        shape = (2, exported.card.texts * min(16, exported.card.max_length), 2)
    noise = rng.integers(0, 256, shape, np.uint8) if kind == np.uint8 else rng.random(shape, np.float32)
    inputs = noise * np.float32(exported.card.divisor) if kind != np.uint8 else noise
    if exported.card.input == "text":
        inputs = np.stack([rng.integers(0, exported.card.vocab, shape[:2]), np.zeros(shape[:2], int)], -1)
        inputs[1, shape[1] // 2 :, 0] = PADDING
        inputs = inputs.astype(np.int32)
    outputs = run(exported, inputs)
    bad = [f"{name}: {np.sum(~np.isfinite(x))} of {x.size}" for name, x in outputs.items() if not np.isfinite(x).all()]
    refuse("outputs of the exported network that are not finite", bad)
    with files.atomic_write(folder / GOLDEN) as file:
        np.savez(file, inputs=inputs, **outputs)
    return inputs, outputs


def run(exported: Exported, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs and features of one batch of inputs, [B, *card.shape]."""
    parallel, variables, apply = exported.compiled
    return jax.device_get(apply(variables, parallel.put_batch(inputs)))


def is_export(folder: str | os.PathLike) -> bool:
    """Whether a folder is one that `export` wrote."""
    return (pathlib.Path(folder) / TABLE).is_file()


def open_network(folder: str | os.PathLike, weights: str | None = None) -> "Exported | Run":
    """An exported network, or a finished run; weights: see `load_run`."""
    return load(folder) if is_export(folder) else load_run(folder, weights)


def load(folder: str | os.PathLike) -> Exported:
    """Loads what `export` wrote; one ValueError for all that is not as it was exported, by hash or by golden output."""
    folder = pathlib.Path(folder)
    if not is_export(folder):
        raise ValueError(f"{folder} is no exported network: there is no {TABLE} in it")
    table = files.read_json(folder / TABLE)
    if table.get("format") != FORMAT:
        raise ValueError(f"{folder / TABLE} has format {table.get('format')}, expected {FORMAT}: export the run again")
    there, wrong = {path.name for path in folder.iterdir() if path.is_file()}, []
    for name, expected in table["sha256"].items():
        found = files.sha256(folder / name) if name in there else "no file"
        if found != expected:
            wrong.append(f"{name}: found {found[:12]}, expected {expected[:12]}")
    companions = there.intersection({trust.FILE, REFERENCE, EXAMPLES})
    wrong += [f"{name}: not of the export" for name in sorted(companions.difference(table["sha256"]))]
    refuse(f"{folder} is not as it was exported, by the sha256 in {TABLE}; copy it again", wrong)
    tensors, _ = formats.read(folder / WEIGHTS)
    exported = Exported(folder, table, _card(table), quantize.unpack(tensors))
    if exported.card.input == "text" and tokenizer.read(folder).sha256 != exported.card.tokenizer:
        raise ValueError(f"{folder / tokenizer.FILE} is not the tokenizer of the card; export the run again")
    _check_golden(exported)
    return exported


def _check_golden(exported: Exported) -> None:
    try:
        arrays = npz.read(exported.folder / GOLDEN)
    except (ValueError, OSError) as error:
        raise ValueError(f"{exported.folder / GOLDEN} is damaged ({error}); copy the folder again") from None
    limit = exported.table["limits"][jax.default_backend()]
    wrong = program.differences(run(exported, arrays.pop("inputs")), arrays, limit)
    refuse(f"{exported.folder} computes other outputs here than where it was exported (limit {limit:g})", wrong)
