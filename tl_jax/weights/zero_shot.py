"""Zero-shot classification (Radford et al. 2021, arXiv:2103.00020, section 3.1.4): a head made of the names of classes.

The network is an ordinary one: image tower, projection (of CLIP), L2 norm, and a last dense layer. Column k of its
kernel is exp(logit_scale) times the mean over templates of the normalised embeddings of the texts about class k,
normalised again. Its bias is SigLIP's logit_bias (Zhai et al. 2023, arXiv:2303.15343, section 3.2), or zero.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tl_jax.core import trees
from tl_jax.core.messages import brief
from tl_jax.data.text import tokenizer
from tl_jax.models.clip_text import TOWERS
from tl_jax.weights import formats, hub, load
from tl_jax.weights.load import Loaded

WAYS = ("names:", "prompts:")  # how model.head_init begins
NAME = "a photo of a {}."
SETS = {
    "photos": (
        NAME, "a blurry photo of a {}.", "a close photo of a {}.", "a photo of one {}.", "a photo of a large {}.",
        "a photo of a small {}.", "a dark photo of a {}.", "a drawing of a {}.",
    ),
}  # fmt: skip
BATCH = 64


def templates_of(text: str) -> tuple[str, ...]:
    """The templates of "a photo of a {}.|a drawing of a {}.", or of a name of SETS; ValueError."""
    found = SETS.get(text) or tuple(part.strip() for part in text.split("|"))
    if wrong := [part for part in found if part.count("{}") != 1]:
        sets = ", ".join(SETS)
        raise ValueError(f"templates {wrong}: expected one {{}} in each, the place of the name, or one of {sets}")
    return found


def load_named(
    name: str, path: str | pathlib.Path, class_names: Sequence[str], *, head_init: str, seed: int, **how: Any
) -> Loaded:
    """The network whose head `head_init` makes of the names of the classes: "names:TEMPLATES" or "prompts:CONTEXT"."""
    way, _, text = head_init.partition(":")
    make = {"names": load_zero_shot, "prompts": load_prompts}[way]
    return make(name, path, class_names, text, seed=seed, **how)


def load_zero_shot(
    name: str, path: str | pathlib.Path, class_names: Sequence[str], templates: str = NAME, **how: Any
) -> Loaded:
    """An image tower of CLIP or SigLIP with the head that its text tower, in the same file, makes of class names.

    The tokenizer.json lies beside the file. templates: as `templates_of` takes them; an underscore of a name becomes a
    space. how: arguments of `load.load`. Raises ValueError for other networks, and a file without a text tower.
    """
    text, tensors = load_text(name, path), formats.read(hub.resolve(path))[0]
    classes = [each.replace("_", " ") for each in class_names]
    prompts = [template.replace("{}", each) for each in classes for template in templates_of(templates)]
    each = embed(text, prompts).reshape(len(classes), -1, text.card.num_classes)
    kernel = unit(each.mean(axis=1)).T * np.exp(scalar(tensors, "logit_scale", path))
    bias = scalar(tensors, "logit_bias", path) if "logit_bias" in tensors else 0.0
    out = {"kernel": kernel.astype(np.float32), "bias": np.full(len(classes), bias, np.float32)}
    return with_head(name, path, class_names, None, dict.fromkeys(out, f"names: {templates}"), out, **how)


def load_prompts(
    name: str, path: str | pathlib.Path, class_names: Sequence[str], context: str = "16", seed: int = 0, **how: Any
) -> Loaded:
    """An image tower with a head of learned prompts, models/clip_text.py: Prompts, in which all but
    head/prompts{i}/context is to stay frozen.

    context: how many vectors there are before the name of a class, normal with deviation 0.02 from `seed`, or a text
    whose tokens they begin as. A full stop follows the name. Otherwise as `load_zero_shot`.
    """
    text, tensors = load_text(name, path), formats.read(hub.resolve(path))[0]
    stem, card = text.variables["params"]["backbone"]["stem"], text.card
    read, table = tokenizer.known(card), np.asarray(stem["tok_embed"]["embedding"])
    first = len(read.encode([("",)], card.max_length).flat) - 1  # a token may begin every text, one ends it
    if first not in (0, 1):
        raise ValueError(
            f"the tokenizer beside {path} puts {first + 1} tokens around a text; expected an end, or both ends"
        )
    if context.isdecimal():
        vectors = np.random.default_rng(seed).normal(0, 0.02, (int(context), table.shape[1]))
    else:
        vectors = table[read.encode([(context,)], card.max_length).flat[first:-1, 0]]
    count = len(vectors)
    if not 0 < count <= card.max_length - first - 3:
        raise ValueError(f"{count} learned vectors, and a text has {card.max_length} tokens with a name in it")
    rows = [(f"{each.replace('_', ' ')}.",) for each in class_names]
    tokens = read.encode(rows, card.max_length - count)
    x = tokens.longest.batch(np.arange(len(rows)), int(tokens.counts.max()))
    gap = np.zeros((len(rows), count, 2), np.int32)
    x = np.concatenate([x[:, :first], gap, x[:, first:]], axis=1)
    classes = np.array(text.model.apply(text.variables, x, stop="stem")[0])
    classes[:, first : first + count, :-1] = stem["pos_embed"][first : first + count]
    layer = {"tower": card.model, "context": count, "first": first, "length": classes.shape[1]}
    behind = {key: leaf for key, leaf in trees.flatten(text.variables["params"]).items() if "/stem/" not in key}
    leaves = {key.removeprefix("backbone/"): leaf for key, leaf in behind.items()}
    leaves |= {"classes": classes, "context": vectors.astype(np.float32)}
    leaves |= {"logit_scale": np.float32(scalar(tensors, "logit_scale", path))}
    leaves |= {"logit_bias": np.float32(scalar(tensors, "logit_bias", path) if "logit_bias" in tensors else 0)}
    origins = dict.fromkeys(leaves, "text tower of the file")
    origins["context"] = "new" if context.isdecimal() else f"prompts: {context}"
    return with_head(name, path, class_names, ("prompts", layer), origins, leaves, seed=seed, **how)


def load_text(name: str, path: str | pathlib.Path) -> Loaded:
    """The text tower in the file of an image tower."""
    if not path:
        raise ValueError(f"{name} without a weight file: the text tower that reads the names of the classes is in one")
    if (tower := TOWERS.get(name.partition(".")[0])) is None:
        raise ValueError(f"{name!r} has no text tower to read names of classes; these have: {', '.join(TOWERS)}")
    return load.load(tower, path)


def with_head(
    name: str,
    path: str | pathlib.Path,
    class_names: Sequence[str],
    layer: tuple[str, Mapping[str, Any]] | None,
    origins: Mapping[str, str],
    leaves: Mapping[str, Any],
    **how: Any,
) -> Loaded:
    """The image tower with the file's projection, L2 norm, and a last layer of the head, None for the dense one, whose
    leaves are given; origins: what the audit says of each."""
    projection = load.source_head(name, path, how.get("partial", ()))
    layers = (("dense", {"features": projection["bias"].shape[0]}),) if projection else ()
    layers += (("l2_norm", {}), *([layer] if layer else []))
    loaded = load.load(name, path, len(class_names), **{**how, "head": layers})
    own = f"params/head/{layer[0]}{len(layers) - 1}" if layer else "params/head/out"
    made = {f"params/head/dense0/{key}": leaf for key, leaf in (projection or {}).items()}
    told = dict.fromkeys(made, "projection of the file") | {f"{own}/{key}": text for key, text in origins.items()}
    made |= {f"{own}/{key}": leaf for key, leaf in leaves.items()}
    variables = trees.unflatten({**trees.flatten(loaded.variables), **jax.device_put(made)})
    card = loaded.card.replace(class_names=tuple(class_names))
    return loaded._replace(variables=variables, card=card, origins={**loaded.origins, **told})


def embed(text: Loaded, prompts: Sequence[str]) -> np.ndarray:
    """The normalised embeddings of texts, float64 [N, E]."""
    read, apply = tokenizer.known(text.card), jax.jit(text.model.apply)
    tokens = read.encode([(prompt,) for prompt in prompts], text.card.max_length)
    found = []
    for start in range(0, len(prompts), BATCH):
        rows = np.arange(start, start + BATCH)
        rows[rows >= len(prompts)] = -1
        found.append(np.asarray(apply(text.variables, tokens.batch(rows, tokens.lengths[-1]))[0], np.float64))
    return unit(np.concatenate(found)[: len(prompts)])


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def scalar(tensors: Mapping[str, np.ndarray], key: str, path: Any) -> float:
    """A number of a file, of shape () or (1,)."""
    if key not in tensors or tensors[key].size != 1:
        raise ValueError(f"{brief(str(path))} has no number {key}, by which logits of image and text are scaled")
    return float(tensors[key].item())
