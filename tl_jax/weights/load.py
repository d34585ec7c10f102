"""Foreign weight files to variables and back: strict both ways, with the card that says how to feed them."""

import functools
import pathlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import models
from tl_jax.core import messages, trees
from tl_jax.core.card import Card
from tl_jax.models import conversion as tables
from tl_jax.models import fusion
from tl_jax.models import head as heads
from tl_jax.models.head import HEAD_INIT, Layers
from tl_jax.weights import formats, hub, nearest, other_inputs, published, text_inputs
from tl_jax.weights.text_inputs import NO_TEXT, Text

CARD_KEY = "tl_jax.card"
HEAD = ("params/head/", "batch_stats/head/")
RANDOM = ("new", "missing")  # origins of leaves that no file gave: wanted so, and those that a partial file lacks
LAYER = ("kernel", "bias", "scale", "mean", "var")  # the leaves that make a layer together
Tensors = Mapping[str, np.ndarray]  # of a file, by its keys


class Loaded(NamedTuple):
    """A model, its variables (float32), the card of its weights, and where they come from."""

    model: Any
    variables: dict[str, Any]
    card: Card
    origins: dict[str, str]  # {"params/backbone/...": source keys, or one of RANDOM} for every leaf of the variables
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
    partial: Sequence[str] = (),
    text: Text = NO_TEXT,
) -> Loaded:
    """Loads a weight file of any known layout into the named model, or initialises it at random where there is none.

    `name` "" takes the model that the file's card names. `path` is a file, the folder of a finished run,
    "builtin:NAME", "timm:NAME" or "hf://owner/name[/file]@revision"; "" or None: random from `seed`. `num_classes` None
    keeps the file's head, an integer makes a new one from `seed` with the layers `head` before the last dense one
    (`head_init`, a name of HEAD_INIT, is of the last), 0 makes none. `image_size`, a side or (height, width), rebuilds
    a model with position embeddings for another input, resampling them. `columns`: of a table, in the order in which
    the network reads them. `channels`: of images, and their `mean` and `std`, see other_inputs.py. `partial`: regexes
    of paths in the backbone that a file may lack, which begin from `seed`. `text`: text_inputs.py. "timm:NAME" also
    names the model; its row in published.py replaces fields of the card. A file whose publisher computes differently
    gives the model's flavour (`card.model`). ValueError: another hash than the name says; all that does not fit.
    """
    head = _check_arguments(path, head, head_init, partial)
    given = {"image_size": image_size, "columns": columns, "channels": channels, "mean": mean, "std": std}
    for_input = functools.partial(other_inputs.fit_card, path=path, **given)
    if not path:
        card = text_inputs.fit_card(for_input(models.get(name).card), text, path)
        card = card.replace(num_classes=card.num_classes if num_classes is None else num_classes)
        return new(card.replace(head=head if card.num_classes else ()), head_init, seed)
    tensors, layout, variant, card, sha256 = _read(name, path)
    text_inputs.know_parts(card, path)
    table = tables.with_native_head(variant.layouts[layout])
    dropped = [key for key in sorted(tensors) if num_classes is not None and tables.is_head(table, key)]
    kept = {key: value for key, value in tensors.items() if key not in dropped}
    own = tables.for_head(variant.layouts[layout], card.head, tensors)  # the file's own head
    made_for = _with_head(card, num_classes, head, own, tensors, path)
    card = text_inputs.fit_card(for_input(made_for), text, path)
    table = tables.for_head(variant.layouts[layout], card.head, kept)
    model = _make(variant.module, card, head_init)
    shapes, features = _shapes(model, card)
    changed = other_inputs.changed(table, shapes, kept, model, made_for, bool(image_size))
    wanted = {leaf: shape for leaf, shape in shapes.items() if num_classes is None or not leaf.startswith(HEAD)}
    kept |= {key: x for key, (x, _) in changed.items()}
    flat, origins, problems, lacking = _fill(table, wanted, kept, partial)
    if problems:
        raise ValueError(_message(name or card.model, path, layout, tensors, problems, nearest.cover(lacking, wanted)))
    if "missing" in origins.values():  # with the head
        flat = {**trees.flatten(_random(model, card, seed).variables), **flat}
    elif num_classes is not None:
        flat |= _new_head(model, features, seed)
    variables = trees.unflatten(jax.device_put({leaf: flat[leaf] for leaf in shapes}))
    told = {leaf: f"{keys} ({changed[keys][1]})" if keys in changed else keys for leaf, keys in origins.items()}
    return Loaded(model, variables, card, {x: told.get(x, "new") for x in shapes}, layout, tuple(dropped), sha256)


def _check_arguments(path: str | pathlib.Path | None, head: Layers, head_init: str, partial: Sequence[str]) -> Layers:
    if head_init not in HEAD_INIT:
        raise ValueError(f"head_init={messages.brief(head_init)} is unknown; known: {', '.join(HEAD_INIT)}")
    if partial and not path:
        raise ValueError(f"partial={tuple(partial)} is about a weight file, and there is none: leave it out")
    return heads.check(head)


def _fill(table: tables.Layout, wanted: tables.Shapes, tensors: Tensors, partial: Sequence[str]):
    """`tables.fill` but for what `partial` excuses, which has no value and the origin "missing"; and all that lacks."""
    lacking = tables.lacking(table, wanted, tensors)
    missing, wrong = _excuse(partial, wanted, lacking)
    needed = {leaf: shape for leaf, shape in wanted.items() if leaf not in missing}
    flat, origins, problems = tables.fill(table, needed, tensors)
    return flat, origins | dict.fromkeys(missing, "missing"), wrong | problems, lacking


def _excuse(
    partial: Sequence[str], leaves: Iterable[str], lacking: Collection[str]
) -> tuple[set[str], dict[str, list[str]]]:
    """The `lacking` leaves that the regexes allow a file to lack, and what is wrong with the regexes, by kind."""
    paths = {leaf: leaf.split("/", 2)[2] for leaf in leaves if not leaf.startswith(HEAD)}
    matched = {regex: {leaf for leaf, path in paths.items() if re.fullmatch(regex, path)} for regex in partial}
    every = set().union(*matched.values())
    excused, layers, half = every & set(lacking), defaultdict(set), {}
    for leaf, path in paths.items():
        layer, _, name = path.rpartition("/")
        if name in LAYER:
            layers[layer].add(leaf)
    for layer, its in layers.items():
        if its & excused and not (its <= every or its <= set(lacking)):
            names = [sorted(x.rpartition("/")[2] for x in each) for each in (its - set(lacking), its & set(lacking))]
            half[layer] = "{}: the file has {} and lacks {}".format(layer, *map(", ".join, names))
    folders = {f"{path.rsplit('/', i)[0]}/.*" for path in paths.values() for i in range(1, path.count("/") + 1)}
    wrong = {
        "regexes of partial that match nothing in the backbone": [
            f"{regex!r}{trees.why_dead(regex, [*paths.values(), *folders])}"
            for regex, found in matched.items()
            if not found
        ],
        "regexes of partial for what the file has": [
            repr(regex) for regex, found in matched.items() if found and not found & excused
        ],
        "layers that the file half fills, of which partial must match all leaves": list(half.values()),
    }
    return excused, {kind: texts for kind, texts in wrong.items() if texts}


def _read(name: str, path: str | pathlib.Path) -> tuple[Tensors, str, models.Variant, Card, str]:
    """A file's tensors, layout, variant, card (its own, or the variant's with source and hash) and sha256.

    The row of a `timm:NAME` says the model, and its fields replace those of the card of the variant that the layout of
    the file gives.
    """
    row = published.find(path)
    if row and name and row.model not in (name, *models.get(name).flavours.values()):
        raise ValueError(f"{path} holds weights of {row.model!r}, asked for was {name!r}: give the first, or ''")
    name = row.model if row else name
    file = hub.resolve(path)
    tensors, metadata = formats.read(file)
    sha256 = hub.check_name(file)
    card = Card.from_json(metadata[CARD_KEY]) if CARD_KEY in metadata else None
    if card and card.model == f"{name}.mlm":  # whose head of masked tokens this network leaves out
        card = card.replace(model=name)
    if not (name or card):
        raise ValueError(f"{path} has no weight card that names its model: give the name{_looks_like(tensors)}")
    name = name or card.model
    layout, variant = _detect(name, path, tensors), models.get(name)
    if card and card.model not in (name, *variant.flavours.values()):
        raise ValueError(f"{path} holds weights of {card.model!r} according to its card, asked for was {name!r}")
    variant = models.get(card.model if card else variant.flavours.get(layout, name))
    pixels = tables.pixels_of(variant.layouts[layout], tensors)
    own = (row.card(variant.card) if row else variant.card).replace(**pixels)
    source = row.source(file) if row else str(path)
    return tensors, layout, variant, card or own.replace(source=source, sha256=sha256), sha256


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


def card_of(name: str, path: str | pathlib.Path | None) -> Card:
    """The card with which `load` begins, read without the tensors, which are not checked."""
    metadata = formats.read_metadata(hub.resolve(path)) if path else {}
    return Card.from_json(metadata[CARD_KEY]) if CARD_KEY in metadata else models.get(name).card


def source_head(name: str, path: str | pathlib.Path, partial: Sequence[str] = ()) -> dict[str, jax.Array] | None:
    """A weight file's classifier {"kernel" [D, K], "bias" [K]} on pre_logits; None: it has none, or more."""
    if not path:
        return None
    tensors, layout, variant, card, _ = _read(name, path)
    if card.head or not any(tables.is_head(variant.layouts[layout], key) for key in tensors):
        return None
    head = load(name, path, partial=partial).variables["params"]["head"]
    return None if "dist" in head else head


def has_token_head(name: str, path: str | pathlib.Path) -> bool:
    """Whether the named network has a head of masked tokens, and the weight file too."""
    if not path:
        return False
    name = name or card_of(name, path).model
    variant = models.get(name)
    if not getattr(variant.module(num_classes=0), "token_head", False):
        return False
    tensors, layout, *_ = _read(name, path)
    head = {leaf: shape for leaf, shape in default_shapes(name).items() if leaf.startswith(HEAD)}
    return not tables.lacking(variant.layouts[layout], head, tensors)


def export(
    variables: Mapping[str, Any], name: str, path: str | pathlib.Path, *, card: Card, layout: str | None = None
) -> None:
    """Writes variables as safetensors with the names of `layout` (timm's by default) and the card in the metadata.

    timm and torchvision load the file with their strict `load_state_dict`. A path that ends in .h5 gives a file of
    Keras, with the card too, which `load_weights` reads into the same network of keras.applications. A head with layers
    lies under this package's names, which none of them knows. Raises one ValueError for a card of another model, and
    for missing, surplus, misshapen or non-finite leaves, and negative variances.
    """
    variant = models.get(name)
    if card.model not in (name, *variant.flavours.values()):
        raise ValueError(f"the card belongs to {card.model!r}, not to {name!r}: pass the one the weights came with")
    variant = models.get(card.model)  # the flavour, whose leaves may be others
    keras = pathlib.Path(path).suffix.lower() in formats.KERAS
    own = [name for name in variant.layouts if name.startswith("keras")] or ["keras"]
    usual, layout = not layout, layout or (own[-1] if keras else next(iter(variant.layouts)))
    if layout not in variant.layouts:
        raise ValueError(f"{name} has no layout {layout!r}; it has {', '.join(variant.layouts)}")
    if keras and not layout.startswith("keras"):
        raise ValueError(f"{path} would be a file of Keras, and the layout is {layout!r}: give another name or layout")
    if layout.startswith("keras") and layout in variant.flavours:
        own = f"Keras' network is {variant.flavours[layout]}, which computes or preprocesses differently"
        raise ValueError(f"{path} cannot be a file of Keras for {card.model}: {own}; give another layout")
    same = ("num_classes", "input_size", "head", "vocab", "max_length", "pooling", "parts", "fusion")
    plain = variant.card.replace(**{name: getattr(card, name) for name in same})
    plain = other_inputs.with_columns(plain, card.columns, path).replace(mean=card.mean, std=card.std)
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
    table = tables.for_head(variant.layouts[layout], card.head)
    if usual and tables.lacks_bias(table, flat):  # of GPT-2: transformers has none
        table = tables.with_native_head(table)
    tensors = dict(table.pixels.export(card.mean, card.std))
    for leaf, value in flat.items():
        keys, transform = tables.sources_of(table, leaf)
        tensors |= zip(keys, transform.export(value.astype(np.float32)), strict=True)
    place = {module: i for i, module in enumerate(table.modules)}
    ordered = sorted(tensors, key=lambda key: place.get(tables.module_of(key), len(place)))
    formats.write(path, {key: tensors[key] for key in ordered}, {CARD_KEY: card.to_json()})


def new(card: Card, head_init: str = "zeros", seed: int = 0) -> Loaded:
    """The network of a card, with random numbers from `seed`; ValueError for a head that cannot be made."""
    card = card.replace(head=_check_arguments("", card.head, head_init, ()))
    return _random(_make(models.get(card.model).module, card, head_init), card, seed)


def _random(model: Any, card: Card, seed: int) -> Loaded:
    variables = jax.jit(lambda key: model.init(key, example_input(card)))(jax.random.key(seed))
    return Loaded(model, variables, card, dict.fromkeys(trees.flatten(variables), "new"), "", (), "")


def _make(module: Any, card: Card, head_init: str) -> Any:
    model = module(num_classes=card.num_classes, head_init=head_init, head=card.head)
    if card.parts:
        parts = [fusion.part_of(each.input, _make(models.get(each.model).module, each, "zeros")) for each in card.parts]
        return model.clone(parts=tuple(parts), **dict(card.fusion))
    if card.input == "text":
        return model.clone(vocab_size=card.vocab, pooling=card.pooling)
    # Only a model with position embeddings is built for one input size.
    return model.clone(image_size=card.input_size) if hasattr(model, "image_size") else model


def example_input(card: Card) -> Any:
    """One example of zeros as the network of a card takes it: [1, H, W, C], [1, columns], [1, L, 2] tokens, or several.

    Those are {kind: one of them}.
    """
    if card.parts:
        return {kind: example_input(part) for kind, part in card.cards.items()}
    if card.input == "text":
        return jnp.zeros((1, card.texts * min(8, card.max_length), 2), jnp.int32)
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


def default_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of the named network as its card has it."""
    if known := nearest.known_shapes().get(name):
        return known
    variant = models.get(name)
    card = other_inputs.with_columns(variant.card, ("x",), "") if variant.card.input == "table" else variant.card
    return _network_shapes(variant.module, card.to_json())


def _flavour(name: str, layout: str) -> str:
    """The name of the network that files of a layout give, whose leaves may be others."""
    return models.get(name).flavours.get(layout, name)


def _detect(name: str, path: Any, tensors: Tensors) -> str:
    """The layout whose table reads most of the file's keys; ties go to the first."""
    layouts = models.get(name).layouts
    if len(layouts) == 1:  # what does not fit is named by the leaves; a fusion is what its card says
        return next(iter(layouts))
    leaves = {key: default_shapes(_flavour(name, key)) for key in layouts}
    counts = {key: tables.coverage(table, leaves[key], tensors) for key, table in layouts.items()}
    best = max(counts, key=counts.get)
    if counts[best] == 0:
        hint = f"its keys begin {', '.join(sorted(tensors)[:5])}{_looks_like(tensors)}"
        raise ValueError(f"{path} has no key that {name} knows (layouts tried: {', '.join(layouts)}); {hint}")
    return best


def _new_head(model: Any, features: tuple[int, ...], seed: int) -> dict[str, jax.Array]:
    """Initialises the head alone, with the numbers that a random initialisation from the same seed gives it."""
    init = jax.jit(lambda key: model.init(key, jnp.zeros(features), start=heads.reads(model)))
    return {leaf: x for leaf, x in trees.flatten(init(jax.random.key(seed))).items() if leaf.startswith(HEAD)}


def _message(name: str, path: Any, layout: str, tensors: Tensors, problems: Mapping[str, Any], parts: tuple) -> str:
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
        if not hint and parts and not others and kind == "unfilled leaves":
            hint = f"; if it is known to lack them: partial={parts}"
    return f"{path} does not fit {name} (best layout: {layout}): {tables.listing(problems)}{hint}"


def _looks_like(tensors: Tensors) -> str:
    names = [f"{name} (layout {layout})" for name, layout in candidates(tensors)]
    return f"; the file looks like {' or '.join(names)}" if names else ""


def candidates(tensors: Tensors) -> list[tuple[str, str]]:
    """The (model, layout) pairs whose backbone the tensors fill, judged by names and shapes; flavours left out."""
    return [(each.name, each.layout) for each in nearest.matches(tensors, default_shapes) if not each.differs]
