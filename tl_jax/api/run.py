"""Runs from a notebook: `fit` adapts a network to data by the trainer of all runs; `Run` is what it leaves."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.api import calibration, inputs
from tl_jax.api import model as models
from tl_jax.api.model import Metrics, Model
from tl_jax.core import console, files, manifest
from tl_jax.core.messages import nearest
from tl_jax.methods import probes, recipes
from tl_jax.tasks import answers, trust
from tl_jax.training import artifacts, finished
from tl_jax.training import train as training
from tl_jax.weights import delta, hub
from tl_jax.weights import load as pretrained

LEFT_OUT = ("checkpoints", ".lock", "data-*.npz")  # of the folder of a run, where it is saved elsewhere
TASKS = {"classes": "classification", "multilabel": "multilabel", "targets": "regression"}


class Picture(NamedTuple):
    """A figure in a file, which a notebook shows."""

    path: pathlib.Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A finished run: its workdir, and where the base of its delta checkpoint lies now, if not where it lay."""

    folder: pathlib.Path
    weights: str | None = None

    def __repr__(self) -> str:
        return "{model}, {method}, on {data}".format(**self.result) + f" ({self.folder})\n{self.metrics!r}"

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """result.json: the metrics, and what was run."""
        return finished.read(self.folder)

    @property
    def metrics(self) -> Metrics:
        """Every metric with its 95 % interval, on test, or on val where there is no test."""
        return Metrics(self.result["metrics"])

    @property
    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """`{"train/loss": (steps, values), ...}`: the rows of metrics.jsonl."""
        rows = files.read_rows(self.folder / "metrics.jsonl")
        names = dict.fromkeys(name for row in rows for name in row if name != "step")
        known = {name: [row for row in rows if row.get(name) is not None] for name in names}
        return {name: ([row["step"] for row in at], [row[name] for row in at]) for name, at in known.items() if at}

    @functools.cached_property
    def options(self) -> dict[str, Any]:
        """config.json: every option of the run."""
        return options.flatten(options.read(self.folder / "config.json"))

    @property
    def cuts(self) -> dict[str, dict[str, Any]]:
        """{source: data.group and data.split_seed} of the run's own data, so that its slices are cut as they were."""
        names, cut = self.options["data.source"], {key: self.options[f"data.{key}"] for key in ("group", "split_seed")}
        return dict.fromkeys(names if isinstance(names, list) else [names], cut)

    @property
    def labels(self) -> list[str]:
        """The label columns that the run was trained on, of sources that have columns."""
        return self.options["data.labels"]

    @property
    def text(self) -> list[str]:
        """The columns of text that the run was trained on."""
        return self.options["data.text"]

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of image files and numbers that the run was trained on, of several inputs."""
        return {name: self.options[f"data.{name}"] for name in ("image", "columns")}

    @functools.cached_property
    def model(self) -> Model:
        """The adapted network: model.safetensors, or the delta checkpoint on its base."""
        name = self.options["model.name"]
        if (self.folder / hub.WHOLE).exists():
            loaded = pretrained.load(name, self.folder)
        elif (self.folder / "trained.safetensors").exists():
            loaded = delta.load(self.folder / "trained.safetensors", self.weights)
        else:
            method = self.result["method"]
            raise ValueError(f"{self.folder} holds no weights: a run by {method} leaves none, or they were removed")
        module = loaded.model.clone(dtype=jnp.dtype(self.options["model.dtype"]))
        return Model(name, str(self.folder), module, loaded.variables, loaded.card, origins=loaded.origins)

    @property
    def trust(self) -> trust.Trust | None:
        """What `calibrate` has left; None where it was not called."""
        path = self.folder / trust.FILE
        found = trust.load(path) if path.exists() else None
        if found and found.network != self.weights_sha256:
            raise ValueError(f"{path} was fitted for other weights than those of this run; calibrate again")
        return found

    @property
    def weights_sha256(self) -> str:
        """Of the weights that the run has left; "" where it left none."""
        hashes = files.read_json(self.folder / manifest.NAME)["sha256"]
        return next((hashes[name] for name in manifest.WEIGHTS if name in hashes), "")

    def calibrate(self, *, split: str = "val", coverage: float = 0.9, **options: Any) -> calibration.Report:
        """Fits on the run's own data what `predict` then adds to its rows; see `api.calibration.calibrate`."""
        return calibration.calibrate(self, split=split, coverage=coverage, **options)

    def predict(self, data: Any, *, batch_size: int = 128) -> list[answers.Row]:
        """One row for each input: a folder, files, or images; see `tl_jax.predict`."""
        return models.predict(self, data, batch_size=batch_size)

    def evaluate(self, data: Any, split: str = "") -> Metrics:
        """Every metric with its interval on other labelled data; see `tl_jax.evaluate`."""
        return models.evaluate(self, data, split)

    def save(self, path: str | os.PathLike) -> pathlib.Path:
        """Copies the network to a .safetensors file, or the run without its checkpoints to a new folder."""
        path = pathlib.Path(path)
        if path.suffix != ".safetensors":
            return pathlib.Path(shutil.copytree(self.folder, path, ignore=shutil.ignore_patterns(*LEFT_OUT)))
        if not (self.folder / hub.WHOLE).exists():
            raise ValueError(f"{self.folder} has no {hub.WHOLE}, as it is no plain network; save the run to a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        return pathlib.Path(shutil.copyfile(self.folder / hub.WHOLE, path))

    def plot(self, name: str = "learning_curves") -> Picture:
        """A figure of the run, which a notebook shows; ValueError lists those that there are."""
        path = self.folder / f"{name}.png"
        if not path.exists():
            artifacts.draw(self.folder, self.options["feature_map"])
        if not path.exists():
            there = sorted(figure.stem for figure in self.folder.glob("*.png"))
            raise ValueError(f"the run has no figure {name!r}{nearest(name, there)}; it has {', '.join(there)}")
        return Picture(path)


def load_run(path: str | os.PathLike, weights: str | os.PathLike | None = None) -> Run:
    """A finished run by its folder; weights: where the file that it began with lies now, for adapters and prompts."""
    folder = pathlib.Path(path)
    if not (folder / "result.json").exists():
        raise ValueError(f"{folder} is no folder of a finished run: there is no result.json in it")
    manifest.check(folder)
    return Run(folder, weights if weights is None else os.fspath(weights))


def fit(
    model: Model,
    data: Any,
    *,
    method: str = "linear_probe",
    epochs: float | None = None,
    batch_size: int = 32,
    task: str = "",
    workdir: str | os.PathLike | None = None,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    verbose: bool = True,
) -> Run:
    """Adapts a network, as `load` gives it, to data; the same trainer as on the command line, with its defaults.

    data: a source such as "folder:PATH" or its path, a pair (images [N, H, W, C], labels), a Dataset, or a table
    {split: pair or Dataset}. Without a split val a fifth of train takes its place; without test val is scored. method:
    one of `list_methods`. epochs: without it 20 of a linear probe, 10 of the others. task: that of the labels unless
    given. workdir: kept, and resumed where the same call was interrupted; None: a temporary folder that is removed with
    the Run. changes: {dotted option: value}, see tl_jax/core/options.py. Without verbose nothing is printed. Raises one
    ValueError for all that does not fit.
    """
    own = options.HEAD_ALONE if method == "linear_probe" else {"lr": recipes.LR, "total": (10.0, "epochs")}
    own = own if epochs is None else {**own, "total": (float(epochs), "epochs")}
    table = recipes.methods(*own["total"])
    task = task or (model.card.task if model.card.texts > 1 else "")
    if method not in table:
        raise ValueError(f"there is no method {method!r}{nearest(method, table)}; known: {', '.join(table)}")
    if getattr(model.module, "additions", ()):
        raise ValueError("a network with adapters or prompts cannot be adapted further; load its base, or merge LoRA")
    given = changes or {}
    if several := [name for name in ("seeds", "baseline", "replicas") if given.get(name)]:
        raise ValueError(f"changes sets {', '.join(several)}: these are several runs, see python -m tl_jax train")
    run = Run(pathlib.Path(workdir or tempfile.mkdtemp(prefix="tl_jax-")))
    if workdir is None:
        weakref.finalize(run, shutil.rmtree, run.folder, ignore_errors=True)
    named = {
        "model.name": model.name, "model.weights": model.weights, "model.image_size": model.image_size,
        "model.channels": model.channels, "model.head_init": model.head_init,
        "model.head": model.card.head if model.card.texts > 1 else (),
        **dict(zip(("model.tokenizer", "model.max_length", "model.pooling"), model.text_options, strict=True)),
        "model.parts": model.parts, "model.fusion": model.fusion, "seed": seed, "batch_size": batch_size, **own,
        **_data_options(data, task, run.folder, given, model.card.input), **table[method],
    }  # fmt: skip
    if model.channels:
        named["data.card"] = {"mean": model.card.mean, "std": model.card.std, **given.get("data.card", {})}
        given = {key: value for key, value in given.items() if key != "data.card"}
    with console.quiet(not verbose):
        training.train(options.override(options.make(), {**named, **given}), run.folder, verbose=verbose)
    return run


def _data_options(data: Any, task: str, folder: pathlib.Path, given: Mapping[str, Any], input: str) -> dict[str, Any]:
    """The options of the data: its source, its splits and its task."""
    if isinstance(data, str | os.PathLike):
        source, task = inputs.source_name(data, input), task or "classification"
        keys = ("labels", "text", "image", "columns")
        named = {key: given[f"data.{key}"] for key in keys if f"data.{key}" in given}
        found = inputs.splits_of(source, task, **named)
    else:
        found = inputs.by_split(data)
        text = "\n".join(f"{split} {source.fingerprint}" for split, source in found.items())
        path = folder.absolute() / f"data-{hashlib.sha256(text.encode()).hexdigest()[:12]}.npz"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            inputs.write_arrays(found, path)
        source, task = f"arrays:{path}", task or TASKS[next(iter(found.values())).label_kind]
    return {"task": task, "data.source": source, **inputs.options_of(found)}


def knn(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], *, k: int = 10, resamples: int = 1000
) -> Metrics:
    """Metrics on test of the k nearest neighbours in train by cosine similarity; each (features [N, D], labels [N])."""
    classes = int(max(train[1].max(), test[1].max())) + 1
    fitted = probes.fit("knn", train, None, classes, (k,))
    spec, ids = tasks.Spec(class_names=tuple(map(str, range(classes)))), np.arange(len(test[1]))
    predictions = tasks.make_predictions({"logits": fitted.predict(test[0])}, test[1], ids, spec)
    return Metrics(tasks.summarize(predictions, resamples=resamples))
