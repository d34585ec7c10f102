"""Delta checkpoints: what trained of a model, with the hash of the weights that it belongs on; small files."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tl_jax.core import messages, trees
from tl_jax.core.card import Card
from tl_jax.data.text import tokenizer as tokenizers
from tl_jax.models import peft
from tl_jax.weights import formats
from tl_jax.weights import load as pretrained
from tl_jax.weights.text_inputs import NO_TEXT, Text

KEY = "tl_jax.delta"


def save(
    path: str | pathlib.Path,
    variables: Mapping[str, Any],
    report: Mapping[str, Any],
    card: Card,
    *,
    model: str,
    weights: Mapping[str, str],
    seed: int,
    partial: Sequence[str] = (),
    additions: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> None:
    """Writes what trained of the model and of its added parameters as safetensors under this package's paths.

    The head and what is new in a model from a file are written whether they trained or not. report: the proved audit,
    which says what was frozen. weights: {"file", "sha256"} of what was loaded, partial: what that may lack; seed: of
    what no file filled.
    """
    tables = {"params": "parameters", "batch_stats": "statistics"}
    rows = {f"{kind}/{row['path']}": row for kind in tables for row in report["phases"][0][tables[kind]]}
    new = {path for path, row in rows.items() if row["origin"] in pretrained.RANDOM and weights["file"]}
    model_paths = tuple(f"{kind}/{name}/" for kind in variables for name in peft.MODEL)
    hashes = {path: sha256 for path, sha256 in report["proof"]["hashes"].items() if path.startswith(model_paths)}
    frozen = {path: x for path, x in hashes.items() if not path.startswith(pretrained.HEAD) and path not in new}
    kinds = (*peft.MODEL, *(name for name, _ in additions))
    flat = {p: x for p, x in trees.flatten(variables).items() if p.split("/")[1] in kinds}
    about = {"model": model, "weights": dict(weights), "seed": seed}
    about |= {"additions": [[name, dict(args)] for name, args in additions], "rested": messages.fingerprint(frozen)}
    about |= {"partial": list(partial)} if partial else {}
    tensors = {path: np.asarray(leaf) for path, leaf in flat.items() if path not in frozen}
    formats.write_safetensors(path, tensors, {pretrained.CARD_KEY: card.to_json(), KEY: json.dumps(about)})


def load(path: str | pathlib.Path, weights: str | pathlib.Path | None = None) -> pretrained.Loaded:
    """The adapted model: the weights that the delta was trained on, with the delta in its place.

    weights: where these lie now; None takes the place that the delta names. The model is a `peft.Adapted`. Raises
    ValueError where the file is no delta, the weights are not those it was trained on, or the two do not fit.
    """
    tensors, metadata = formats.read(path)
    if KEY not in metadata:
        raise ValueError(f"{path} is no delta checkpoint such as a run's trained.safetensors")
    about, card = json.loads(metadata[KEY]), Card.from_json(metadata[pretrained.CARD_KEY])
    if card.parts:
        raise ValueError(f"{path} is a delta of a fusion, whose parts lie in several files: load model.safetensors")
    file = about["weights"]["file"] if weights is None else weights
    text = Text(tokenizers.find_for(path), card.max_length, card.pooling) if card.input == "text" else NO_TEXT
    base = pretrained.load(
        about["model"], file, card.num_classes,
        image_size=card.input_size, seed=about["seed"], head=card.head, columns=card.columns,
        channels=card.form.channels if card.input == "image" else 0, mean=card.mean, std=card.std,
        partial=about.get("partial", ()), text=text,
    )  # fmt: skip
    if base.sha256 != about["weights"]["sha256"]:
        then, now = "{file} with sha256 {sha256}".format(**about["weights"]), base.sha256 or "none: random weights"
        raise ValueError(f"{path} was trained on {then}; {file} has {now}. Give the file that it was trained on")
    additions = tuple((name, args) for name, args in about["additions"])
    flat = trees.flatten(base.variables)
    frozen = {p: h for p, h in trees.leaf_hashes(base.variables).items() if p not in tensors}
    shapes, added = {p: x.shape for p, x in flat.items()}, dict(additions)
    own = {p: x.shape for p, x in tensors.items() if p.split("/")[1] not in added}
    surplus = [f"{p} {shape}" for p, shape in own.items() if shape != shapes.get(p)]
    if surplus or messages.fingerprint(frozen) != about["rested"]:
        wrong = f"it holds {surplus[:5]}, which the network lacks" if surplus else "the frozen parameters differ"
        raise ValueError(f"{path} does not fit {about['model']} from {file}: {wrong}")
    variables = trees.unflatten({**flat, **{p: jnp.asarray(x) for p, x in tensors.items()}})
    origins = base.origins | {p: p for p in tensors}
    return base._replace(model=peft.Adapted(base.model, additions), variables=variables, card=card, origins=origins)
