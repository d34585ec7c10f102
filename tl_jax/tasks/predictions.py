"""predictions.npz: the outputs of a network for every example of a split, once, with what they mean."""

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tl_jax.core import files, npz
from tl_jax.core.messages import nearest
from tl_jax.core.options import LANGUAGE
from tl_jax.tasks.task import Spec, spec_problems

OUTPUT = {"classification": "logits", "binary": "logits", "multilabel": "logits", "regression": "values"}
OUTPUT |= dict.fromkeys(LANGUAGE, "tokens")


class Predictions(NamedTuple):
    """One model's outputs on one split, every example once."""

    outputs: dict[str, np.ndarray]  # "logits": float32 [N, K], binary [N]; or "values": float32 [N, T], in their unit
    # or "tokens": float32 [N, 3] of language modelling: the sum of -log p, the number of tokens, that of correct ones
    labels: np.ndarray | None  # int32 [N] classes, or 0 and 1; [N, K] 0 and 1; float32 [N, T]; None: still sealed
    ids: np.ndarray  # text [N]
    spec: Spec
    features: np.ndarray | None = None  # float32 [N, D], what the head reads
    groups: np.ndarray | None = None  # text [N], of data.group

    def select(self, index: np.ndarray) -> "Predictions":
        """The examples of an index, in its order."""
        rest = [None if x is None else x[index] for x in (self.labels, self.ids, self.features, self.groups)]
        return Predictions({name: x[index] for name, x in self.outputs.items()}, *rest[:2], self.spec, *rest[2:])

    @property
    def values(self) -> np.ndarray:
        """The one array of outputs."""
        return self.outputs[OUTPUT[self.spec.name]]


def make_predictions(outputs: Mapping, labels, ids, spec: Spec, features=None, groups=None) -> Predictions:
    """Checks and types the arrays; one ValueError for all that is wrong, FloatingPointError where outputs diverged."""
    if spec.name not in OUTPUT:
        raise ValueError(f"there is no task {spec.name!r}{nearest(spec.name, OUTPUT)}; known: {', '.join(OUTPUT)}")
    output = OUTPUT[spec.name]
    if set(outputs) != {output}:
        raise ValueError(f"predictions of a {spec.name} task have the output {output}, found {sorted(outputs)}")
    values, ids = np.asarray(outputs[output], np.float32), np.asarray(ids, str)
    labels = None if labels is None else np.asarray(labels)
    features = None if features is None else np.asarray(features, np.float32)
    groups = None if groups is None else np.asarray(groups, str)
    labels = labels[:, None] if spec.name == "regression" and labels is not None and labels.ndim == 1 else labels
    dimensions, least = 1 if spec.name == "binary" else 2, 2 if spec.name == "classification" else 1
    if values.ndim != dimensions or values.shape[0] == 0 or (dimensions == 2 and values.shape[1] < least):
        expected = "[N >= 1]" if dimensions == 1 else f"[N >= 1, K >= {least}]"
        raise ValueError(f"{output} have shape {values.shape}, expected {expected}")
    count = len(values)
    wrong = spec_problems(spec) + ([] if labels is None else _label_problems(values, labels, spec))
    if ids.shape != (count,) or len(np.unique(ids)) != count:
        wrong.append(f"{len(np.unique(ids))} different ids of shape {ids.shape}, expected {count}: each example once")
    if spec.name in LANGUAGE:
        wrong += [] if values.shape[1] == 3 else [f"{output} have shape {values.shape}, expected [{count}, 3]"]
    elif dimensions == 2 and len(spec.class_names) != values.shape[1]:
        wrong.append(f"{len(spec.class_names)} class names, expected {values.shape[1]}")
    if features is not None and (features.ndim != 2 or len(features) != count):
        wrong.append(f"features have shape {features.shape}, expected [{count}, D]")
    if groups is not None and groups.shape != (count,):
        wrong.append(f"groups have shape {groups.shape}, expected [{count}]")
    bad = np.flatnonzero(~np.isfinite(values.reshape(count, -1)).all(axis=1))
    diverged = f"{len(bad)} rows of {output} are not finite, first {bad[:5].tolist()}; did the training diverge?"
    if wrong:
        raise ValueError(f"predictions are inconsistent: {'; '.join([diverged, *wrong] if len(bad) else wrong)}")
    if len(bad):
        raise FloatingPointError(diverged)
    kind = np.float32 if spec.name == "regression" else np.int32
    labels = None if labels is None else labels.astype(kind)
    return Predictions({output: values}, labels, ids, spec, features, groups)


def _label_problems(values: np.ndarray, labels: np.ndarray, spec: Spec) -> list[str]:
    if spec.name in LANGUAGE:  # the labels are the tokens, and none is kept
        return []
    count, whole = len(values), spec.name != "regression"
    shape = (count,) if spec.name in ("classification", "binary") else values.shape
    if labels.shape != shape or labels.dtype.kind not in ("iu" if whole else "iuf"):
        expected = f"{'integers' if whole else 'numbers'} [{', '.join(map(str, shape))}]"
        return [f"labels are {labels.dtype} {labels.shape}, expected {expected}"]
    if not whole:
        bad = np.flatnonzero(~np.isfinite(labels).all(axis=1))
        return [f"{len(bad)} rows of labels are not finite, first {bad[:5].tolist()}"] if len(bad) else []
    classes = values.shape[1] if spec.name == "classification" else 2
    if labels.min() < 0 or labels.max() >= classes:
        of = f" for {classes} logits" if spec.name == "classification" else ""
        return [f"labels span {labels.min()}..{labels.max()}, expected 0..{classes - 1}{of}"]
    return []


def save_predictions(path, predictions: Predictions) -> None:
    """Writes checked predictions atomically; see `make_predictions` for the errors."""
    outputs, labels, ids, spec, *further = make_predictions(*predictions)
    if labels is None:
        raise ValueError(f"{path}: the labels are sealed, expected predictions with labels; open them first")
    rest = spec._asdict()
    arrays = {**outputs, "labels": labels, "ids": ids, "class_names": np.asarray(rest.pop("class_names"), str)}
    arrays |= {"task": np.asarray(json.dumps(rest))}
    arrays |= {name: x for name, x in zip(("features", "groups"), further, strict=True) if x is not None}
    with files.atomic_write(path) as file:
        np.savez(file, **arrays)


def load_predictions(path) -> Predictions:
    """Reads and checks a predictions.npz; errors name the file and what is wrong. Without `task`: a classification."""
    try:
        arrays = npz.read(path)
        table = json.loads(str(arrays["task"])) if "task" in arrays else {}
        table = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
        output = OUTPUT.get(table.get("name", Spec().name), "logits")
        expected = {output, "labels", "ids", "class_names"}
        if wrong := sorted(expected.symmetric_difference(arrays) - {"features", "groups", "task"}):
            raise ValueError(f"holds {[*arrays]}, expected {sorted(expected)}; missing or unknown: {wrong}")
        spec = Spec(**table, class_names=tuple(map(str, arrays["class_names"])))
        further = arrays.get("features"), arrays.get("groups")
        return make_predictions({output: arrays[output]}, arrays["labels"], arrays["ids"], spec, *further)
    except (ValueError, TypeError, AttributeError, FloatingPointError) as error:
        raise ValueError(f"{path}: no sound predictions.npz ({error})") from None
