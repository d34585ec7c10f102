"""The training examples whose features are nearest to those of a request, with small pictures of them."""

import base64
import io
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from tl_jax.api import calibration
from tl_jax.api import model as models
from tl_jax.api.run import Run
from tl_jax.core import files, npz
from tl_jax.core.card import Card
from tl_jax.data.image import decode
from tl_jax.methods.term import MAIN
from tl_jax.tasks import Spec

SIDE, EXCERPT = 96, 200  # pixels of a picture, characters of a text


class Examples(NamedTuple):
    """Some examples of a training set. features: float32 [N, D], of length 1. pictures: JPEG files, or empty."""

    features: np.ndarray
    names: tuple[str, ...]
    labels: tuple[str, ...]  # in words
    pictures: tuple[bytes, ...]


def collect(run: Run, network: Any, count: int, seed: int = 0) -> Examples:
    """`count` examples of the data that the run was trained on, or all of them, as the network sees them."""
    card, source = run.model.card, calibration.splits_of(run)[MAIN]
    _, once = np.unique(source.ids, return_index=True)  # a bootstrap repeats some
    source = source.select(np.sort(np.random.default_rng(seed).permutation(once)[:count]))
    features = models.features(network, source)
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    labels = tuple(in_words(run.model.spec, label) for label in source.labels)
    pictures = tuple(_picture(source.inputs[i], card) for i in range(len(source)))
    names = [" / ".join(row)[:EXCERPT] for row in source.inputs.rows] if card.input == "text" else source.ids
    return Examples(
        features, tuple(map(os.path.basename, names)) if card.input == "image" else tuple(names), labels, pictures
    )


def in_words(spec: Spec, label: np.ndarray) -> str:
    """A label of a task: the class, the labels that an example has, or the targets."""
    if spec.name in ("classification", "binary"):
        return spec.class_names[int(label)]
    if spec.name == "multilabel":
        return ", ".join(name for name, there in zip(spec.class_names, label, strict=True) if there)
    return ", ".join(f"{name} {x:.4g}" for name, x in zip(spec.class_names, np.atleast_1d(label), strict=True))


def _picture(item: Any, card: Card) -> bytes:
    if card.input != "image":
        return b""
    decode.thumbnail(item, card.form, SIDE).save(file := io.BytesIO(), "JPEG", quality=80)
    return file.getvalue()


def nearest(examples: Examples, features: np.ndarray, count: int) -> list[dict[str, Any]]:
    """Rows {"file", "label", "similarity", "image": a data URI or None} by cosine similarity, the nearest first."""
    similarity = examples.features @ (features / max(float(np.linalg.norm(features)), 1e-12))
    rows = []
    for i in np.argsort(-similarity, kind="stable")[:count]:
        data = base64.b64encode(examples.pictures[i]).decode()
        image = f"data:image/jpeg;base64,{data}" if data else None
        row = {"file": examples.names[i], "label": examples.labels[i]}
        rows.append(row | {"similarity": float(similarity[i]), "image": image})
    return rows


def save(path: pathlib.Path, examples: Examples) -> None:
    ends = np.cumsum([len(x) for x in examples.pictures])
    with files.atomic_write(path) as file:
        np.savez(
            file, features=examples.features, names=np.array(examples.names, str),
            labels=np.array(examples.labels, str), ends=ends,
            pictures=np.frombuffer(b"".join(examples.pictures), np.uint8),
        )  # fmt: skip


def load(path: pathlib.Path) -> Examples:
    """Reads what `save` wrote; ValueError names a damaged file."""
    try:
        arrays = npz.read(path)
        data, ends = arrays["pictures"].tobytes(), arrays["ends"]
        pictures = tuple(data[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True))
        return Examples(arrays["features"], tuple(arrays["names"]), tuple(arrays["labels"]), pictures)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); export the run again") from None
