"""Foreign weight files to variables and back: strict both ways, with the card that says how to feed them."""

import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import models
from tl_jax.core import messages, trees
from tl_jax.core.card import Card, sides, size_text
from tl_jax.models import conversion as tables
from tl_jax.models import head as heads
from tl_jax.models.head import HEAD_INIT, Layers
from tl_jax.weights import formats, hub

CARD_KEY = "tl_jax.card"
HEAD = ("params/head/", "batch_stats/head/")
POS_EMBED = "params/backbone/stem/pos_embed"
Tensors = Mapping[str, np.ndarray]  # of a file, by its keys
Changed = dict[str, tuple[np.ndarray, str]]  # what stands in the place of some of them, and why


class Loaded(NamedTuple):
    """A model, its variables (float32), the card of its weights, and where they come from."""

    model: Any
    variables: dict[str, Any]
    card: Card
    origins: dict[str, str]  # {"params/backbone/...": source keys, or "new"} for every leaf of the variables
    layout: str  # the conversion table that fitted; "" for a random initialisation
    dropped: tuple[str, ...]  # keys of the file's classifier which a new head (or none) replaced
    sha256: str  # of the file that was read, whatever its card says; "" for a random initialisation


def load(
    name: str,
    path: str | pathlib.Path | None = "",
    num_classes: int | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    head_init: str = "zeros",
    seed: int = 0,
    head: Layers = (),
    columns: Sequence[str] = (),
    channels: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Loaded:
    """Loads a weight file of any known layout into the named model, or initialises it at random where there is none.

    `name` "" takes the model that the file's card names. `path` is a file, the folder of a finished run, "builtin:NAME"
    or "hf://owner/name[/file]@revision"; "" or None: random numbers from `seed`. `num_classes` None keeps the file's
    head, an integer makes a new one from `seed` with the layers `head` before the last dense one (`head_init`, a name
    of HEAD_INIT, is of the last), 0 makes none. `image_size`, a side or (height, width), rebuilds a model with position
    embeddings for another input, resampling them. `columns`: of a table, in the order in which the network reads them.
    `channels`: of images, where the card of the weights has another number: a stem for three is summed for one,
    otherwise repeated and scaled by 3 / channels, as in timm. `mean`, `std`: of these; without them one channel has the
    means of the card's, equal ones are repeated, others asked for.
    A file whose publisher computes or preprocesses differently gives the model's flavour (`card.model` names it).
    Raises ValueError for a file whose bytes have another hash than its name says, and one that lists every unused key,
    unfilled leaf, wrong shape, non-finite value and negative variance.
    """
    if head_init not in HEAD_INIT:
        raise ValueError(f"head_init={messages.brief(head_init)} is unknown; known: {', '.join(HEAD_INIT)}")
    head = heads.check(head)
    image_size = _side_or_sides(image_size) if image_size else None
    if not path:
        card = _with_channels(_with_columns(models.get(name).card, columns, path), channels, mean, std)
        classes = card.num_classes if num_classes is None else num_classes
        card = card.replace(num_classes=classes, input_size=image_size or card.input_size, head=head if classes else ())
        model = _make(models.get(name).module, card, head_init)
        variables = jax.jit(lambda key: model.init(key, example_input(card)))(jax.random.key(seed))
        return Loaded(model, variables, card, dict.fromkeys(trees.flatten(variables), "new"), "", (), "")
    tensors, layout, variant, card, sha256 = _read(name, path)
    table = tables.with_native_head(variant.layouts[layout])
    dropped = [key for key in sorted(tensors) if num_classes is not None and tables.is_head(table, key)]
    kept = {key: value for key, value in tensors.items() if key not in dropped}
    own = tables.for_head(variant.layouts[layout], card.head)  # the file's own head
    made_for = _with_columns(_with_head(card, num_classes, head, own, tensors, path), columns, path)
    card = _with_channels(made_for, channels, mean, std).replace(input_size=image_size or made_for.input_size)
    table = tables.for_head(variant.layouts[layout], card.head)
    model = _make(variant.module, card, head_init)
    shapes, features = _shapes(model, card)
    changed = _resample(table, shapes, kept, model, made_for.input_size) if image_size else {}
    changed |= _adapt_stem(table, shapes, kept, model, made_for) if len(card.mean) != len(made_for.mean) else {}
    wanted = {leaf: shape for leaf, shape in shapes.items() if num_classes is None or not leaf.startswith(HEAD)}
    flat, origins, problems = tables.fill(table, wanted, kept | {key: x for key, (x, _) in changed.items()})
    if problems:
        raise ValueError(_message(name or card.model, path, layout, tensors, problems))
    if num_classes:
        flat |= _new_head(model, features, seed)
    variables = trees.unflatten(jax.device_put({leaf: flat[leaf] for leaf in shapes}))
    told = {leaf: f"{keys} ({changed[keys][1]})" if keys in changed else keys for leaf, keys in origins.items()}
    return Loaded(model, variables, card, {x: told.get(x, "new") for x in shapes}, layout, tuple(dropped), sha256)


def _read(name: str, path: str | pathlib.Path) -> tuple[Tensors, str, models.Variant, Card, str]:
    """A file's tensors, layout, variant, card (its own, or the variant's with source and hash) and sha256."""
    file = hub.resolve(path)
    tensors, metadata = formats.read(file)
    sha256 = hub.check_name(file)
    card = Card.from_json(metadata[CARD_KEY]) if CARD_KEY in metadata else None
    if not (name or card):
        raise ValueError(f"{path} has no weight card that names its model: give the name{_looks_like(tensors)}")
    name = name or card.model
    layout, variant = _detect(name, path, tensors), models.get(name)
    if card and card.model not in (name, *variant.flavours.values()):
        raise ValueError(f"{path} holds weights of {card.model!r} according to its card, asked for was {name!r}")
    variant = models.get(card.model if card else variant.flavours.get(layout, name))
    return tensors, layout, variant, card or variant.card.replace(source=str(path), sha256=sha256), sha256


def _with_head(
    card: Card, num_classes: int | None, head: Layers, table: tables.Layout, tensors: Tensors, path: Any
) -> Card:
    """The card of a file with the head that its network gets."""
    if num_classes is not None:
        card = card.replace(task="classification", target_mean=(), target_std=(), threshold=None)
        return card.replace(num_classes=num_classes, class_names=(), head=head if num_classes else ())
    if head and head != card.head:
        own = f"{path} keeps its own head, whose layers are {card.head}"
        raise ValueError(f"{own}, and asked for were {head}: give num_classes for a new head, or no layers")
    out = f"params/head/{'out/' if card.head else ''}"
    bias = tables.sources_of(table, f"{out}bias")[0]  # a projection has none
    kernel = tables.sources_of(table, f"{out}kernel")
    found = {tables.canonical(table, key): value for key, value in tensors.items()}
    sizes = [found[key].size for key in bias if key in found]
    sizes = sizes or [kernel[1].load(found[key]).shape[-1] for key in kernel[0] if not bias and key in found]
    return card.replace(num_classes=sizes[0] if sizes else card.num_classes)  # without one it is reported unfilled


def _with_columns(card: Card, columns: Sequence[str], path: Any) -> Card:
    """The card with the columns that the network reads; means and deviations are 0 and 1 until data gives them."""
    columns = tuple(columns)
    given = f"given were {len(columns)} {columns[:5]}"
    if card.input != "table" and columns:
        raise ValueError(f"{card.model} reads an {card.input} and no columns; {given}")
    if card.input == "table" and not (columns or card.columns):
        raise ValueError(f"{card.model} reads a table: give its columns")
    if card.columns and columns not in ((), card.columns):
        own = f"{path} reads {len(card.columns)} columns {card.columns[:5]} according to its card"
        raise ValueError(f"{own}, {given}; they must be the same in the same order")
    if card.columns or not columns:
        return card
    return card.replace(columns=columns, mean=(0.0,) * len(columns), std=(1.0,) * len(columns))


def _side_or_sides(size: int | tuple[int, int]) -> int | tuple[int, int]:
    return sides(size)[0] if len(set(sides(size))) == 1 else sides(size)


def _with_channels(card: Card, channels: int, mean: Sequence[float], std: Sequence[float]) -> Card:
    """The card of a network for images of another number of channels; ValueError where their statistics are unknown."""
    if channels in (0, len(card.mean)):
        return card
    if card.input != "image":
        raise ValueError(f"channels={channels}: {card.model} reads a table, which has columns")
    found = {}
    for name, given, own in (("mean", mean, card.mean), ("std", std, card.std)):
        if given:
            found[name] = tuple(given)
        elif channels == 1 or len(set(own)) == 1:
            found[name] = (sum(own) / len(own),) * channels if len(set(own)) > 1 else own[:1] * channels
    wrong = [name for name in ("mean", "std") if len(found.get(name, ())) != channels]
    if wrong:
        known = f"the card of {card.model} has mean {card.mean} and std {card.std}, which say nothing of others"
        fix = f"give {' and '.join(wrong)} with {channels} numbers, such as those of the training images over the scale"
        raise ValueError(f"channels={channels}: {known}; {fix} (in a config: data.card)")
    return card.replace(**found)


def card_of(name: str, path: str | pathlib.Path | None) -> Card:
    """The card with which `load` begins, read without the tensors, which are not checked."""
    metadata = formats.read_metadata(hub.resolve(path)) if path else {}
    return Card.from_json(metadata[CARD_KEY]) if CARD_KEY in metadata else models.get(name).card


def source_head(name: str, path: str | pathlib.Path) -> dict[str, jax.Array] | None:
    """A weight file's classifier {"kernel" [D, K], "bias" [K]} on pre_logits; None: it has none, or further layers."""
    if not path:
        return None
    tensors, layout, variant, card, _ = _read(name, path)
    if card.head or not any(tables.is_head(variant.layouts[layout], key) for key in tensors):
        return None
    return load(name, path).variables["params"]["head"]


def export(
    variables: Mapping[str, Any], name: str, path: str | pathlib.Path, *, card: Card, layout: str | None = None
) -> None:
    """Writes variables as safetensors with the names of `layout` (timm's by default) and the card in the metadata.

    timm and torchvision load the file with their strict `load_state_dict`; a head with layers lies under this package's
    names, which they do not know. Raises one ValueError for a card of another model, and for missing, surplus,
    misshapen or non-finite leaves, and negative variances.
    """
    variant = models.get(name)
    if card.model not in (name, *variant.flavours.values()):
        raise ValueError(f"the card belongs to {card.model!r}, not to {name!r}: pass the one the weights came with")
    variant = models.get(card.model)  # the flavour, whose leaves may be others
    layout = layout or next(iter(variant.layouts))
    if layout not in variant.layouts:
        raise ValueError(f"{name} has no layout {layout!r}; it has {', '.join(variant.layouts)}")
    plain = variant.card.replace(num_classes=card.num_classes, input_size=card.input_size, head=card.head)
    plain = _with_columns(plain, card.columns, path).replace(mean=card.mean, std=card.std)
    shapes = _network_shapes(variant.module, plain.to_json())
    flat = {leaf: np.asarray(value) for leaf, value in trees.flatten(variables).items()}
    found = {leaf: value.shape for leaf, value in flat.items()}
    problems = {
        "missing leaves": sorted(shapes.keys() - found.keys()),
        "surplus leaves": sorted(found.keys() - shapes.keys()),
        "wrong shapes": [f"{x} is {s}, expected {shapes[x]}" for x, s in found.items() if shapes.get(x, s) != s],
        "non-finite values": [leaf for leaf, value in flat.items() if not np.isfinite(value.astype(np.float32)).all()],
        "negative variances": [leaf for leaf, value in flat.items() if leaf.endswith("/var") and (value < 0).any()],
    }
    if any(problems.values()):
        raise ValueError(f"cannot export these variables as {name}: {tables.listing(problems)}")
    tensors, table = {}, tables.for_head(variant.layouts[layout], card.head)
    for leaf, value in flat.items():
        keys, transform = tables.sources_of(table, leaf)
        tensors |= zip(keys, transform.export(value.astype(np.float32)), strict=True)
    formats.write_safetensors(path, tensors, {CARD_KEY: card.to_json()})


def _make(module: Any, card: Card, head_init: str) -> Any:
    model = module(num_classes=card.num_classes, head_init=head_init, head=card.head)
    # Only a model with position embeddings is built for one input size.
    return model.clone(image_size=card.input_size) if hasattr(model, "image_size") else model


def example_input(card: Card) -> jax.Array:
    """One example of zeros as the network of a card takes it: [1, H, W, C], or [1, columns]."""
    return jnp.zeros((1, *card.shape))


def _shapes(model: Any, card: Card) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """The shape of every leaf, and of what the head reads of one example; nothing is computed, the key neither."""
    (_, out), tree = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), example_input(card)))
    return {leaf: value.shape for leaf, value in trees.flatten(tree).items()}, out[heads.reads(model)].shape


@functools.lru_cache(maxsize=256)  # a study writes many files of one network
def _network_shapes(module: Any, card: str) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of the network that `module` makes for a card, given as JSON."""
    card = Card.from_json(card)
    return _shapes(_make(module, card, "zeros"), card)[0]


def _default_shapes(name: str) -> dict[str, tuple[int, ...]]:
    variant = models.get(name)
    card = _with_columns(variant.card, ("x",), "") if variant.card.input == "table" else variant.card
    return _network_shapes(variant.module, card.to_json())


def _flavour(name: str, layout: str) -> str:
    """The name of the network that files of a layout give, whose leaves may be others."""
    return models.get(name).flavours.get(layout, name)


def _backbone_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {leaf: shape for leaf, shape in _default_shapes(name).items() if not leaf.startswith(HEAD)}


def _detect(name: str, path: Any, tensors: Tensors) -> str:
    """The layout whose table reads most of the file's keys; ties go to the first."""
    layouts = models.get(name).layouts
    leaves = {key: _default_shapes(_flavour(name, key)) for key in layouts}
    counts = {key: tables.coverage(table, leaves[key], tensors) for key, table in layouts.items()}
    best = max(counts, key=counts.get)
    if counts[best] == 0:
        hint = f"its keys begin {', '.join(sorted(tensors)[:5])}{_looks_like(tensors)}"
        raise ValueError(f"{path} has no key that {name} knows (layouts tried: {', '.join(layouts)}); {hint}")
    return best


def _resample(
    table: tables.Layout, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors, model: Any, made_for: Any
) -> Changed:
    """The file's position embedding on the model's grid; {} where it needs no resampling.

    made_for: the image size on the card of the file.
    """
    if POS_EMBED not in shapes:
        return {}
    (source,), transform = tables.sources_of(table, POS_EMBED)
    found = {}
    for key, x in tensors.items():
        if tables.canonical(table, key) == source and (old := transform.load(x)) is not (
            new := model.resampled(old, made_for)
        ):
            (tensor,) = transform.export(new)
            found[key] = tensor, f"resampled from {x.shape[-2]} to {new.shape[1]} tokens"
    return found


def _adapt_stem(
    table: tables.Layout, shapes: Mapping[str, tuple[int, ...]], tensors: Tensors, model: Any, made_for: Card
) -> Changed:
    """The file's kernels of three channels for as many as the model has.

    These are the kernels whose shapes differ between the model and one for `made_for`, the card of the file.
    """
    size = getattr(model, "image_size", made_for.input_size)
    there, found = _shapes(model, made_for.replace(input_size=size))[0], {}
    keys = {tables.canonical(table, key): key for key in tensors}
    for leaf in (leaf for leaf, shape in shapes.items() if len(shape) == 4 and shape != there[leaf]):
        sources, transform = tables.sources_of(table, leaf)
        (key,) = (keys.get(source) for source in sources)
        if key and (kernel := transform.load(tensors[key])).shape[2] == 3:
            kernel, channels = kernel.astype(np.float32), shapes[leaf][2]
            repeated = np.tile(kernel, (1, 1, -(-channels // 3), 1))[:, :, :channels] * np.float32(3 / channels)
            (tensor,) = transform.export(kernel.sum(2, keepdims=True) if channels == 1 else repeated)
            found[key] = tensor, f"resampled from 3 to {channels} channels"
    return found


def _new_head(model: Any, features: tuple[int, ...], seed: int) -> dict[str, jax.Array]:
    """Initialises the head alone, with the numbers that a random initialisation from the same seed gives it."""
    init = jax.jit(lambda key: model.init(key, jnp.zeros(features), start=heads.reads(model)))
    return {leaf: x for leaf, x in trees.flatten(init(jax.random.key(seed))).items() if leaf.startswith(HEAD)}


def _message(name: str, path: Any, layout: str, tensors: Tensors, problems: Mapping[str, Any]) -> str:
    (kind, texts), *others = problems.items()
    if not others and kind == "unfilled leaves" and all(text.startswith(HEAD) for text in texts):
        hint = "; the file has no head: give num_classes for a new one, or 0 for none"
    else:
        grid = not others and kind == "wrong shapes" and len(texts) == 1 and "pos" in texts[0]
        hint = "; give image_size to resample the position embedding" if grid else ""
        other = r"is \((\d+), (\d+), (\d+), (\d+)\), expected \(\1, \d+, \3, \4\)$"
        if stem := re.search(other, texts[0] if len(texts) == 1 and not others else ""):
            hint = f"; for images of {stem[2]} channels give channels={stem[2]} (in a config: model.channels)"
        hint += _looks_like(tensors)
    return f"{path} does not fit {name} (best layout: {layout}): {tables.listing(problems)}{hint}"


def _looks_like(tensors: Tensors) -> str:
    names = [f"{name} (layout {layout})" for name, layout in candidates(tensors)]
    return f"; the file looks like {' or '.join(names)}" if names else ""


def candidates(tensors: Tensors) -> list[tuple[str, str]]:
    """The (model, layout) pairs whose backbone the tensors fill, judged by names and shapes; flavours left out."""
    found, related, modules = [], {}, {key.rpartition(".")[0] for key in tensors}
    for name, variant in models.MODELS.items():
        layouts = variant.layouts.items() if "." not in name else ()
        for layout, table in ((layout, table) for layout, table in layouts if table.modules <= modules):
            family = (variant.module.func, table)  # one member tells whether the family's table knows any key
            if family not in related:
                known = tables.may_know(table, tensors)
                shapes = _backbone_shapes(_flavour(name, layout)) if known else {}
                related[family] = known and tables.coverage(table, shapes, tensors) > 0
            native = tables.with_native_head(table)
            if related[family] and tables.shapes_match(native, _backbone_shapes(_flavour(name, layout)), tensors):
                found.append((name, layout))
    return found


def inspect(path: str | pathlib.Path) -> str:
    """A table of a weight file's keys, the models and layouts it fits, and its card."""
    tensors, metadata = formats.read(hub.resolve(path))
    width = max(map(len, tensors))
    lines = [f"{key:<{width}}  {value.dtype!s:<8}  {list(value.shape)}" for key, value in tensors.items()]
    lines += [f"{len(tensors)} tensors, {sum(value.size for value in tensors.values()):,} numbers"]
    if CARD_KEY in metadata:
        return "\n".join([*lines, f"card {metadata[CARD_KEY]}"])
    for name, layout in (fits := candidates(tensors)):
        card = models.get(name).card
        lines.append(
            f"fits {name} (layout {layout}): {size_text(card.input_size)} px with mean {card.mean}, std {card.std}"
        )
    return "\n".join([*lines, "no card" if fits else "fits no known model; no card"])
