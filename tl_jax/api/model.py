"""Networks in use: answers, outputs and features for given inputs, and scores on labelled data, without training."""

import dataclasses
import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import tasks
from tl_jax.api import inputs, several
from tl_jax.core import console, trees
from tl_jax.core.card import Card
from tl_jax.core.messages import listed
from tl_jax.data.examples import Source
from tl_jax.data.image import decode
from tl_jax.data.image.augment import Preprocess, make_preprocess
from tl_jax.data.pipeline import THREADS
from tl_jax.data.text import tokenizer as tokenizers
from tl_jax.runtime import sharding
from tl_jax.runtime.compile_cache import keep_compiled_programs
from tl_jax.tasks import answers, trust
from tl_jax.training.steps import FEATURES, normalise
from tl_jax.weights import load as pretrained
from tl_jax.weights import parts as fusions
from tl_jax.weights import zero_shot as zero
from tl_jax.weights.text_inputs import Text


class Metrics(dict):
    """Metrics by name, each {"value", "low", "high"}, as `tasks.summarize` gives them; shown as a table."""

    def __repr__(self) -> str:
        return console.fitted(tasks.format_table(self), console.WIDE)


class Network:
    """What answers.

    weights: where they were read. parameters: {path: leaf}. origins: as in `weights.load.Loaded`, of "params/" + path.
    compiled: the devices, the variables on them and the function (variables, batch) -> outputs.
    """

    name: str  # of the architecture
    weights: str
    card: Card
    parameters: Mapping[str, Any]
    origins: Mapping[str, str]
    compiled: tuple[sharding.Parallel, Any, Callable]

    @property
    def spec(self) -> tasks.Spec:
        """What the outputs mean; classes without names are called "0", "1", ..."""
        spec = tasks.spec_of(self.card)
        count = 2 if spec.name == "binary" else self.card.num_classes
        return spec if spec.class_names else spec._replace(class_names=tuple(map(str, range(count))))


@dataclasses.dataclass(frozen=True, eq=False)
class Model(Network):
    """A network with its variables and the card that says how its input is made and what its outputs mean."""

    name: str  # of the architecture
    weights: str  # where they were read, "" for random ones
    module: Any
    variables: Mapping[str, Any]
    card: Card
    image_size: int | tuple[int, int] = 0  # as given to `load`
    channels: int = 0
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the leaves, as in `weights.load.Loaded`
    text_options: tuple[str, int, str] = ("", 0, "")  # tokenizer, max_length and pooling, as given to `load`
    head_init: str = "zeros"  # of the head with which `fit` begins
    parts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # of a fusion, as given to `load`
    fusion: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any]:
        return trees.flatten(self.variables["params"])

    def answer(self, variables: Any, x: jax.Array) -> dict[str, jax.Array]:
        """The outputs that the task keeps, and the features [B, D], of inputs as the card says, [B, *card.shape]."""
        keep = tasks.make(self.spec).keep if self.card.num_classes else lambda out: {}
        _, out = self.module.apply(variables, normalise(x, self.card), train=False)
        return {**keep(out), FEATURES: out["pre_logits"].astype(jnp.float32)}

    @functools.cached_property
    def compiled(self) -> tuple[sharding.Parallel, Any, Callable]:
        keep_compiled_programs()
        parallel = sharding.make_parallel()
        return parallel, parallel.place(self.variables), parallel.evaluate(self.answer)


def load(
    name: str,
    weights: str | os.PathLike = "",
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] = 0,
    channels: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    seed: int = 0,
    partial: Sequence[str] = (),
    tokenizer: str | os.PathLike = "",
    max_length: int = 0,
    pooling: str = "",
    parts: Mapping[str, Mapping[str, Any]] | None = None,
    fusion: Mapping[str, Any] | None = None,
    columns: Sequence[str] = (),
    similarity: bool = False,
) -> Model:
    """Loads a weight file of any known layout into the named model; without a file its weights are random.

    name "" takes the model that the file's card names. weights: a file, the folder of a finished run, "builtin:NAME",
    "timm:NAME", which names the model too, or "hf://owner/name[/file]@revision". num_classes: of a new head; 0 loads a
    file that has none. image_size: a side or (height, width), resamples position embeddings. channels: of the images,
    where it is another number than the weights have, with the mean and std of these channels where they do not follow
    from the card; the kernel of the stem is summed or repeated. partial: regexes of what the file may lack, such as
    ("stage4/.*",); that is random, from `seed`. tokenizer: of a network of text, a tokenizer.json that does not lie
    beside the weights; max_length and pooling: as its card says unless given. similarity: the network takes pairs of
    texts and answers the cosine of their features, as a regression of one value. parts, fusion: of the name "fusion",
    as the options model.parts and model.fusion; columns: of its part for a table, of arrays x0, x1, ... Raises one
    ValueError that lists every tensor that does not fit.
    """
    weights = os.fspath(weights)
    how = {"image_size": image_size or None, "channels": channels, "mean": mean, "std": std, "seed": seed}
    given = os.fspath(tokenizer)
    made = given.partition(":")[0] in tokenizers.MADE  # of the training texts, which are not known yet
    text = Text(tokenizers.read(given) if given and not made else None, max_length, pooling)
    asked, joined = (given, max_length, pooling), {"parts": parts or {}, "fusion": fusion or {}}
    if similarity:
        if num_classes is not None:
            raise ValueError(f"num_classes={num_classes}: the similarity of two texts is one number; leave it out")
        num_classes, how["head"] = 1, (("cosine", {}),)
    if parts:
        if similarity:
            raise ValueError("similarity compares two texts, and a fusion reads several inputs: leave one of them out")
        own = {"columns": columns, "text": text, "channels": channels, "seed": seed}
        loaded = fusions.load(joined["parts"], joined["fusion"], num_classes or 0, **own)
    else:
        loaded = pretrained.load(name, weights, num_classes, partial=partial, text=text, **how)
    if similarity:
        card = loaded.card.replace(task="regression", target_mean=(0.0,), target_std=(1.0,))
        made = {path: COSINE for path in loaded.origins if path.startswith(pretrained.HEAD)}
        loaded = loaded._replace(card=card, origins=loaded.origins | made)
    return Model(
        name or loaded.card.model, weights, loaded.model, loaded.variables, loaded.card, image_size, channels,
        loaded.origins, asked, **joined,
    )  # fmt: skip


def zero_shot(
    name: str,
    weights: str | os.PathLike,
    class_names: Sequence[str],
    *,
    templates: str = zero.NAME,
    image_size: int | tuple[int, int] = 0,
) -> Model:
    """An image tower of CLIP or SigLIP that tells classes apart by their names, without training.

    weights: a file with both towers, beside which its tokenizer.json lies. templates: texts with {} in the place of a
    name, separated by |, or a name of `weights.zero_shot.SETS`. `fit` goes on from this head with the classes of its
    data. Radford et al. 2021, section 3.1.4. Raises ValueError for networks and files without a text tower.
    """
    weights = os.fspath(weights)
    loaded = zero.load_zero_shot(name, weights, class_names, templates, image_size=image_size or None)
    made = Model(name, weights, loaded.model, loaded.variables, loaded.card, image_size, origins=loaded.origins)
    return dataclasses.replace(made, head_init=f"names:{templates}")


def read_input(item: Any, card: Card, preprocess: Preprocess) -> np.ndarray:
    """An image (a path, encoded bytes, an array) or the values of a row, as the network takes it, [*card.shape].

    Raises ValueError or OSError for what cannot be read.
    """
    if card.input == "table":
        return np.asarray(item, np.float32)
    with decode.reading(item.read_bytes() if isinstance(item, pathlib.Path) else item, card.form) as image:
        return np.asarray(preprocess(image))


Answered = Iterator[tuple[list[tuple[str, str | None]], dict]]
COSINE = "the cosine itself"  # the origin of a head that was not trained and is not random


def _text_batches(model: Network, names: Sequence[str], items: Sequence[tuple[str, ...]], batch_size: int) -> Answered:
    parallel, variables, apply = model.compiled
    size = parallel.round_up(min(batch_size, len(names)))
    tokens = tokenizers.known(model.card).encode(items, model.card.max_length, model.card.texts)
    with console.bar("predict", len(names), stderr=True) as tick:
        for start in range(0, len(names), size):
            rows = np.arange(start, min(start + size, len(names)))
            batch = tokens.batch(np.concatenate([rows, np.full(size - len(rows), -1)]), tokens.length_of(rows))
            outputs = jax.device_get(apply(variables, parallel.put_batch(batch)))
            tick(start + len(rows))
            yield [(names[i], None) for i in rows], {name: x[: len(rows)] for name, x in outputs.items()}


def _batches(
    model: Network, data: Any, batch_size: int, text: Sequence[str] = (), columns: Mapping[str, Any] | None = None
) -> Answered:
    """Yields pairs (name of an input, why it cannot be read, else None), and the outputs for those that can be read.

    text, columns: where a file has them, as the options data.text, data.image and data.columns.
    """
    if model.card.parts:
        yield from several.batches(model, several.source_of(data, model.card, text, **(columns or {})), batch_size)
        return
    names, items = inputs.list_inputs(data, model.card, text)
    if model.card.input == "text":
        yield from _text_batches(model, names, items, batch_size)
        return
    parallel, variables, apply = model.compiled
    size, preprocess = parallel.round_up(min(batch_size, len(names))), make_preprocess(model.card)

    def read(i: int) -> np.ndarray | str:
        try:
            return read_input(items[i], model.card, preprocess)
        except (ValueError, OSError) as error:
            return str(error)

    chunks = [range(start, min(start + size, len(names))) for start in range(0, len(names), size)]
    with ThreadPoolExecutor(THREADS) as pool, console.bar("predict", len(names), stderr=True) as tick:
        ahead = pool.map(read, chunks[0])
        for chunk, following in zip(chunks, [*chunks[1:], ()], strict=True):
            found, ahead = list(ahead), pool.map(read, following)
            rows = [x for x in found if not isinstance(x, str)]
            outputs = {}
            if rows:
                batch = np.stack(rows + [np.zeros_like(rows[0])] * (size - len(rows)))
                outputs = jax.device_get(apply(variables, parallel.put_batch(batch)))
            named = [(names[i], x if isinstance(x, str) else None) for i, x in zip(chunk, found, strict=True)]
            tick(chunk.stop)
            yield named, {name: x[: len(rows)] for name, x in outputs.items()}


def stream(model: Any, data: Any, batch_size: int = 128) -> Iterator[answers.Row]:
    """What `predict` gives, row by row; only one batch is held."""
    own, fitted = _model(model), getattr(model, "trust", None)
    for found, outputs in _batches(own, data, batch_size, getattr(model, "text", ()), getattr(model, "columns", {})):
        read = outputs.pop(FEATURES, None)
        rows = answers.answers(own.spec, outputs) if outputs else []
        further = trust.judge(fitted, outputs, read, own.spec) if fitted and outputs else [{} for _ in rows]
        rows = iter([row | more for row, more in zip(rows, further, strict=True)])
        yield from ({"file": name, **(next(rows) if bad is None else {"error": bad})} for name, bad in found)


def predict(model: Any, data: Any, *, batch_size: int = 128) -> list[answers.Row]:
    """One row {"file", "class", "probability", "top5"} for each input; see `tasks.answers` for the other tasks.

    model: a Model or a Run. data: a folder, a file or a sequence of them, images [N, H, W, C] or a list of them,
    or a Dataset; of a network that reads a table, a .csv file or rows [N, F]; of text, a file or folder of texts, or a
    sequence of texts or pairs of texts; of several inputs, a mapping {"image": images, "text": texts, "table": rows},
    where None is missing, or of a Run a file with its columns. What cannot be read has a row {"file", "error"}, but
    with several inputs is an error. Of a Run that was calibrated the rows have what `tasks.trust.judge` adds.
    """
    return list(stream(model, data, batch_size))


def outputs(model: Any, data: Any, *, batch_size: int = 128) -> np.ndarray:
    """Logits float32 [N, K], [N] of a binary task, or values [N, T] of a regression, for inputs as in `predict`."""
    found = _whole(_model(model), data, batch_size)
    return next(array for name, array in found.items() if name != FEATURES)


def features(model: Any, data: Any, *, batch_size: int = 128) -> np.ndarray:
    """What the network's head reads, float32 [N, D], for inputs as in `predict`; ValueError names the unreadable."""
    return _whole(_model(model, head=False), data, batch_size)[FEATURES]


def observe(model: Any, data: Any, *, batch_size: int = 128) -> tasks.Predictions:
    """Outputs and features for inputs as in `predict`, without labels; ValueError names the unreadable."""
    own = _model(model)
    if own.card.parts:
        raise ValueError(f"{own.card.model} reads several inputs, which cannot be observed for drift yet")
    names, found = inputs.list_inputs(data, own.card)[0], _whole(own, data, batch_size)
    read = found.pop(FEATURES)
    return tasks.make_predictions(found, None, names, own.spec, read)


def _whole(model: Network, data: Any, batch_size: int) -> dict[str, np.ndarray]:
    found, batches = zip(*_batches(model, data, batch_size), strict=True)
    every = list(itertools.chain(*found))
    if bad := [f"{name}: {reason}" for name, reason in every if reason is not None]:
        raise ValueError(f"{len(bad)} of {len(every)} inputs cannot be read:\n{listed(bad)}")
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def parts(model: Network) -> list[tuple[str, int, str]]:
    """Triples (part, parameters, origin): backbone, head and what was added, from the file or at random."""
    rows: dict[tuple[str, str], int] = {}
    for path, leaf in model.parameters.items():
        found = model.origins.get(f"params/{path}", "")
        random = f"RANDOM ({found})" if found in pretrained.RANDOM else "from the file"
        origin = found if found == COSINE else random
        key = path.split("/")[0], origin
        rows[key] = rows.get(key, 0) + leaf.size
    return [(part, count, origin) for (part, origin), count in rows.items()]


def _check_trained(model: Network) -> None:
    """Raises ValueError for a head that is random: its scores would be chance."""
    if any(part == "head" and origin.startswith("RANDOM") for part, _, origin in parts(model)):
        given = f"{model.weights} gives it none for these classes" if model.weights else "no weight file is given"
        fix = "give weights with their own head, or train one: python -m tl_jax train configs/transfer.py:..."
        raise ValueError(f"the head of {model.name} is untrained, {given}: there is nothing to evaluate; {fix}")


def score(
    model: Any,
    data: Any,
    split: str = "",
    *,
    labels: Sequence[str] = (),
    text: Sequence[str] = (),
    batch_size: int = 128,
    tell: Callable[[str], None] = lambda line: None,
) -> tasks.Predictions:
    """The outputs of a network for labelled data, with the labels in the order of its own classes; see `evaluate`.

    tell: takes a line on what is scored and one on the network, before it begins.
    """
    own = _model(model)
    _check_trained(own)
    known = {"labels": labels or getattr(model, "labels", ()), "cuts": getattr(model, "cuts", None)}
    known |= {"text": text or getattr(model, "text", ()), "columns": getattr(model, "columns", {})}
    source = inputs.load_labelled(data, split, own.card, **known)
    if text and source.input != "text":
        raise ValueError(f"text={','.join(text)}: {source.name} has no texts, leave it out")
    rows = parts(own)
    tell(f"scored: {source.name}, {len(source):,} examples; nothing trains")
    shown = ", ".join(f"{part} {count:,} {origin}" for part, count, origin in rows)
    whole = sum(count for _, count, _ in rows)
    tell(f"network: {own.name}, {own.weights}; all {whole:,} parameters are frozen: {shown}")
    found = _whole(own, source, batch_size)
    matched = None if source.sealed else match_labels(source, own.spec, named=bool(own.card.class_names))
    read = found.pop(FEATURES)
    return tasks.make_predictions(found, matched, source.ids, own.spec, read, source.groups)


def evaluate(
    model: Any,
    data: Any,
    split: str = "",
    *,
    labels: Sequence[str] = (),
    text: Sequence[str] = (),
    batch_size: int = 128,
    resamples: int = 1000,
) -> Metrics:
    """Every metric with its 95 % interval on labelled data, each example once; nothing is trained.

    model: a Model or a Run. data: as for `fit`. split: without it test, else val, else train. labels, text: the columns
    of labels and texts of csv:, table: and text: sources. Classes are matched by name; by position, with a note, where
    the card or the data name none. Raises ValueError where they do not fit, and for a head that is untrained.
    """
    predictions = score(model, data, split, labels=labels, text=text, batch_size=batch_size)
    return Metrics(tasks.summarize(predictions, resamples=resamples))


def match_labels(source: Source, spec: tasks.Spec, named: bool) -> np.ndarray:
    """The labels of a source as a network with these outputs counts them; named: whether its card names them."""
    theirs, ours = source.class_names, spec.class_names
    if theirs == ours:
        return source.labels
    subset = source.label_kind == "classes" and set(theirs) <= set(ours)
    if not subset and (len(theirs) != len(ours) or (named and theirs != tuple(map(str, range(len(theirs)))))):
        found = f"{len(theirs)} classes, labels or targets ({', '.join(theirs[:5])}, ...)"
        own = f"the network {len(ours)} ({', '.join(ours[:5])}, ...)"
        raise ValueError(f"{source.name} has {found}, {own}; expected the same names")
    if not (subset and named):
        without, order = ("the data name", "the card names") if named else ("the card names", "the data name")
        shown = ", ".join((ours if named else theirs)[:10]) + (", ..." if len(theirs) > 10 else "")
        print(f"{without} no classes: outputs are taken by position, as {order} them: {shown}", file=sys.stderr)
    return np.array([ours.index(name) for name in theirs], np.int32)[source.labels] if subset else source.labels


def _model(given: Any, head: bool = True) -> Network:
    """The network of a Run, or the network itself; ValueError for others, and for one that lacks the head it needs."""
    found = getattr(given, "model", given)
    if not isinstance(found, Network):
        expected = "a model, as `load` gives it, a run, as `fit` and `load_run` do, or what `load_export` gives"
        raise ValueError(f"expected {expected}; found {given!r}")
    if head:
        tasks.refuse_language(found.card.task, found.weights or found.name)
    if head and not found.card.num_classes:
        raise ValueError(f"{found.card.model} was loaded without a head: it has features, and no outputs")
    return found
