"""The data of a run: sources, checked against each other, and the streams of batches made of them."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tl_jax.core import checks, messages
from tl_jax.core.card import PIXELS, Card, Form
from tl_jax.data import duplicates, groups, pipeline, resample, sources, weights
from tl_jax.data.examples import FileImages, Source
from tl_jax.data.mixed import mixed_batches
from tl_jax.data.pipeline import EvalBatches, TrainBatches, View
from tl_jax.data.sealed import Ledger, canonical
from tl_jax.data.several import Several
from tl_jax.data.text.tokens import Texts, Tokens, describe
from tl_jax.methods.selectors import DOMINANT
from tl_jax.methods.term import MAIN
from tl_jax.runtime import distributed, sharding, wall
from tl_jax.runtime.log import log
from tl_jax.training.settings import DataSettings, Settings, StreamSettings, naming
from tl_jax.weights import load

SPLITS = ("train", "val", "test")
SAMPLE, MIXED = "sample of train", "mixed candidates"  # what else is predicted of a candidate
SAMPLED = 1000  # examples of the former


def form_of(settings: Settings) -> Form:
    """How images are read: as data.card and model.channels say, else as the card of the weights does."""
    model, card = settings.model, None
    part = model.parts.get("image", {"name": model.name, "weights": model.weights})
    with contextlib.suppress(Exception):  # loading the weights will say what is wrong with them
        card = load.card_of(part["name"], part.get("weights", ""))
    own = card.form if card and "image" in card.cards else Form()
    return Form(settings.data.card.get("pixels", own.pixels), model.channels or own.channels)


def load_sources(settings: Settings, form: Form | None = None) -> dict[str, Source]:
    """The sources of train, val, test, extra_eval and further streams, by name; ValueError where they do not fit.

    form: of the network that reads them, where it is loaded already.
    """
    data, loop = settings.data, settings.loop
    with naming(settings.table, "data.train", "data.val", "data.test"):
        _check_splits(data, loop.select != "last" or bool(loop.patience), settings.streams)
    common = {
        "task": settings.loop.task,
        "labels": data.labels,
        "text": data.text,
        "image": data.image,
        "columns": data.columns,
        "seed": loop.seed,
        "split_seed": data.split_seed,
    }
    common |= {"on_error": data.on_error, "data_dir": data.data_dir or None, "group": data.group}
    common |= {"sealed": sealed_sources(settings), "poison": data.poison, "form": form or form_of(settings)}

    def read(name, source, split, shots=0, labelled=True):
        with naming(settings.table, *_options_of(name, settings)):
            return sources.load(source, split, shots=shots, labelled=labelled, **common)

    found = {
        name: read(name, data.source, split, data.shots if name == MAIN else 0)
        for name in SPLITS
        if (split := getattr(data, name))
    }
    if data.resample:
        with naming(settings.table, "data.resample"):
            found |= _resample(found[MAIN], data.resample, data.split_seed)
    found |= {name: read(name, source, split) for name, source, split in data.extra_eval}
    if data.weights:
        with naming(settings.table, "data.weights"):
            found[MAIN] = weights.with_weights(found[MAIN], data.weights)
    for name, source, split in judged_on(data):
        found[name] = read(name, source, split, labelled=False)
    for name, stream in settings.streams.items():
        found[name] = read(name, stream.source, stream.split, stream.shots, stream.labelled)
    names = found[MAIN].class_names  # of what has no class folders
    found = {
        k: source if source.class_names else dataclasses.replace(source, class_names=names)
        for k, source in found.items()
    }
    _check_sources(found, settings)
    for source in found.values():
        if source.skipped:
            names = "\n  ".join(source.skipped[:5])
            log(f"{source.name}: skipped {len(source.skipped)} unreadable images:\n  {names}")
    return found


def _options_of(name: str, settings: Settings) -> tuple[str, ...]:
    """The options that say which examples a source has, for `naming`."""
    if name not in SPLITS:
        judged = name in (triple[0] for triple in judged_on(settings.data))
        return (f"streams.{name}" if name in settings.streams else f"data.{'candidates' if judged else 'extra_eval'}",)
    split = f"data.{name} = {messages.brief(getattr(settings.data, name))}"
    return "data.source", split, "data.group", "data.data_dir", "task", *(["data.shots"] if name == MAIN else [])


def _check_splits(data: DataSettings, chooses: bool, streams: Iterable[str]) -> None:
    """Raises ValueError where the names of splits do not make a run."""
    splits, resampled = {name: getattr(data, name) for name in SPLITS if getattr(data, name)}, bool(data.resample)
    if resampled and (data.test or data.shots):
        raise ValueError(
            f"data.resample={data.resample!r} cuts train and test out of data.train; expected data.test='' and "
            f"data.shots=0, found {data.test!r} and {data.shots}"
        )
    if MAIN not in splits or len(splits) + resampled < 2 or (chooses and "val" not in splits):
        raise ValueError(
            f"data names the splits {splits}: expected train, and val or test to score on; select='best_val' and "
            "patience need val"
        )
    names = [*SPLITS, SAMPLE, MIXED, *(name for name, *_ in (*data.extra_eval, *judged_on(data))), *streams]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"data.extra_eval, data.candidates and streams name {twice}, which are taken; choose other names"
        )


def _check_sources(found: Mapping[str, Source], settings: Settings) -> None:
    """Raises ValueError for classes that differ between splits, and for examples that are trained on and scored."""
    train, data = found[MAIN], settings.data
    classes = dict(enumerate(train.class_names))
    if settings.loop.task in ("classification", "binary") and len(classes) < 2:
        raise ValueError(
            f"data.source: {train.name} has the one class {classes[0]!r}; expected at least two to tell apart"
        )
    differ = {name: messages.unequal(train.class_names, source.class_names) for name, source in found.items()}
    which = [f"{_options_of(name, settings)[0]}, {found[name].name}: {text}" for name, text in differ.items() if text]
    fix = "what is partial or open needs a method made for it, and there is none; leave these classes out everywhere"
    checks.refuse(f"the classes of {len(which)} sources are not those of train ({train.name}); {fix}", which)
    held_out = [name for name in scored_names(found, settings) if name != "test" or data.resample != "loo"]
    for name in held_out if data.labelled else ():
        if shared := sources.overlap(train, found[name]):
            count = f"{len(shared)} of {len(found[name])} examples"
            raise ValueError(
                f"{', '.join(_options_of(name, settings)[:2])}: {count} of {name} ({found[name].name}) are also in "
                f"train ({train.name}), such as {min(shared)}; use splits that do not overlap"
            )
    lines = [
        f"{len(both)} groups of {stream} are in {name} too, such as {both[0]!r}"
        for stream in trained_names(settings)
        for name in held_out
        if (both := groups.shared(found[stream], found[name]))
    ]
    checks.refuse("data.group says what no split may cut; take slices of one split, which keep groups whole", lines)
    if (
        train.groups is not None and train.label_kind == "classes" and not train.sealed
    ):  # a group may hold all of a class
        lacking = [train.class_names[c] for c in set(range(len(train.class_names))) - set(train.labels.tolist())]
        checks.refuse(
            f"{train.name}, {len(set(train.groups.tolist()))} whole groups, has no example of {len(lacking)} classes; "
            "take a larger share, another data.split_seed, or smaller groups (data.group)", lacking,
        )  # fmt: skip
    if (shared := transductive(found, settings)) and not data.transductive:
        stream, name = next(iter(shared))
        raise ValueError(
            f"{_options_of(stream, settings)[0]}: {shared[stream, name]} of {len(found[name])} examples of {name}, "
            f"which is scored, are also in {'the training stream ' * (stream in settings.streams)}{stream!r}; use "
            "splits that do not overlap, or set data.transductive=True, which result.json then says"
        )


def judged_on(data: DataSettings) -> list[tuple[str, str, str]]:
    """The set (name, source, split) that candidates are judged on, if there is one."""
    return [tuple(data.candidates)] if data.candidates else []


def sealed_sources(settings: Settings) -> set[str | tuple[str, str]]:
    """The sources, by canonical name, whose labels nobody reads before every choice is made.

    Those that an unlabelled stream or data.candidates names, and no labelled one. Of a source that both name, (source,
    split) of the splits that only the former name.
    """
    data = settings.data
    streams = [(stream.source, stream.split, stream.labelled) for stream in settings.streams.values()]
    streams += [(data.source, split, data.labelled) for split in (data.train, data.val) if split]
    streams += [(source, split, False) for _, source, split in judged_on(data)]
    named: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    for source, split, labelled in streams:
        splits = {part.partition("[")[0].strip() for part in split.split("+")}
        names = [source] if isinstance(source, str) else source
        named[labelled] |= {(canonical(name), each) for name in names for each in splits}
    whole = {name for name, _ in named[False]} - {name for name, _ in named[True]}
    return whole | (named[False] - named[True])


def make_ledger(found: Mapping[str, Source], settings: Settings) -> Ledger:
    """The ledger of a run, with the label arrays that its sources bring along."""
    bare = [name for name, stream in settings.streams.items() if not stream.labelled]
    bare += [name for name, *_ in judged_on(settings.data)]
    why = "another stream has labels of its source, so that no leak test is possible"
    ledger = Ledger(
        [name for name, source in found.items() if source.sealed],
        {name: why for name in bare if not found[name].sealed},
    )
    readers = {**dict.fromkeys((MAIN, *settings.streams), "training"), "val": "evaluation on val"}
    for name, source in found.items():
        if not source.sealed and name not in bare:
            ledger.note(name, source.name, source.labels, readers.get(name, "the score at the end"), "load")
    return ledger


def facts_of(source: Source) -> dict[str, Any]:
    """What the audit tells of a source; its fingerprint tells whether a resumed run reads the same."""
    grouped = {} if source.groups is None else {"groups": len(set(source.groups.tolist()))}
    return {"name": source.name, "examples": len(source), **grouped, "fingerprint": source.fingerprint}


def identities(source: Source, kind: str) -> Sequence[str]:
    """What is one input of a kind, N texts: an equal text; of images the group of data.group, else the same file."""
    inputs = source.of_kind(kind).inputs
    if isinstance(inputs, Texts):
        return ["\0".join(row) + "." for row in inputs.rows]  # numpy cuts zeros off the end
    if kind == "image" and source.groups is not None:
        return source.groups.tolist()
    return inputs.paths if isinstance(inputs, FileImages) else source.ids


def numbered(source: Source, card: Card) -> np.ndarray:
    """The number of the input that a network reads of each example, int32 [N]; those of one identity have the same.

    Texts that a tokenizer reads as lower case are compared in lower case.
    """
    number: dict[str, int] = {}
    names = (each.lower() if card.lowercase else each for each in identities(source, card.input))
    return np.array([number.setdefault(name, len(number)) for name in names], np.int32)


def scored_names(found: Mapping[str, Source], settings: Settings) -> list[str]:
    """The names of the sources that are scored."""
    return [name for name in found if name != MAIN and name not in settings.streams]


def trained_names(settings: Settings) -> list[str]:
    """The names of the streams that may not hold what is scored: all but those that transductive training allows."""
    labelled = {MAIN: settings.data.labelled, **{name: stream.labelled for name, stream in settings.streams.items()}}
    return [name for name in labelled if labelled[name] or not settings.data.transductive]


def find_duplicates(found: Mapping[str, Source], settings: Settings) -> dict[str, Any]:
    """The duplicates of the run, for result.json; ValueError where examples that are scored have some in training.

    Rows of a table, or short texts, may be equal without being the same example: these are told, never refused.
    """
    trained = trained_names(settings)
    compared = {name: found[name] for name in [*trained, *scored_names(found, settings)]}
    with wall.timed("split audit"):
        table = distributed.from_first(lambda: duplicates.find(compared, trained))
    if (count := sum(table["across"].values())) and not settings.data.allow_duplicates and "image" in found[MAIN].kinds:
        fix = (
            "remove one of each pair, keep what belongs together in groups (data.group), or set "
            "data.allow_duplicates=True, which result.json then says"
        )
        lines = [f"{kind}: {a} = {b}" for kind, a, b in table["pairs"][:count]]
        checks.refuse(f"{count} examples are trained on and scored, under two names or as a near copy; {fix}", lines)
    return table


def transductive(found: Mapping[str, Source], settings: Settings) -> dict[tuple[str, str], int]:
    """{(stream besides a labelled train, or split that candidates are judged on; scored split): examples in both}."""
    judged = [*([] if settings.data.labelled else [MAIN]), *(name for name, *_ in judged_on(settings.data))]
    shared = {
        (stream, name): len(sources.overlap(found[stream], found[name]))
        for stream in (*settings.streams, *judged)
        for name in scored_names(found, settings)
        if name != stream
    }
    return {pair: count for pair, count in shared.items() if count}


def _resample(pool: Source, design: str, split_seed: int) -> dict[str, Source]:
    """Train and test of one fold of the pool; leave-one-out keeps all of it in both."""
    if design == "loo":
        return {"test": dataclasses.replace(pool, name=f"{pool.name}, leave-one-out")}
    train, held_out = resample.split(pool.labels, design, split_seed, pool.groups)
    return {
        MAIN: dataclasses.replace(pool.select(train), name=f"{pool.name}, {design}"),
        "test": dataclasses.replace(pool.select(held_out), name=f"{pool.name}, held out of {design}"),
    }


def field_of(network: str, card: Card, model_card: Card) -> str:
    """The field of a batch that a further network reads: the model's, where both see the same before normalisation."""
    device = ("mean", "std", "scale")
    same = all(getattr(card, name) == getattr(model_card, name) for name in PIXELS if name not in device)
    return model_card.input if same and card.form == model_card.form else f"{card.input}:{network}"


def _check_present(found: Mapping[str, Source], own: Mapping[str, Card], further: Mapping[str, Card]) -> None:
    """Raises ValueError where a network of one input lacks it in some examples of several inputs, and tells what no
    network reads."""
    alone = [card.input for card in (*further.values(), *(own.values() if len(own) == 1 else ()))]
    several = {source.name: source.inputs for source in found.values() if isinstance(source.inputs, Several)}
    lines = [
        f"{name}: {count} without {kind}" for name, x in several.items() for kind, count in x.missing(alone).items()
    ]
    fix = "leave these rows out, or take model.name='fusion', which has a learned vector in their place"
    checks.refuse(f"a network of one input reads {' and '.join(alone)}, and examples lack it; {fix}", lines)
    read = {card.input for card in (*own.values(), *further.values())}
    if unread := [kind for kind in found[MAIN].kinds if kind not in read]:
        log(f"{found[MAIN].name}: no network reads {' and '.join(unread)}")


def make_streams(
    found: Mapping[str, Source],
    settings: Settings,
    own: Mapping[str, Card],
    further: Mapping[str, Card],
    parallel: sharding.Parallel,
) -> tuple[dict[str, TrainBatches], dict[str, EvalBatches]]:
    """Training batches by stream and step, and batches of all that is scored, in order.

    own, further: the cards of what each field of a batch holds, of the model and of further networks.
    """
    _check_present(found, own, further)
    cards = {**own, **further}
    data, loop = settings.data, settings.loop
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    main = StreamSettings(data.source, data.train, loop.batch_size, data.augment, data.labelled, data.sampling)
    streams, first = {}, next(iter(cards))
    if (strong := f"{first}:strong") in cards and any(stream.strong for stream in settings.streams.values()):
        raise ValueError(f"networks.strong reads the field {strong!r}, which streams with `strong` need; rename it")
    for name, stream in {MAIN: main, **settings.streams}.items():
        pictures = {field for field, card in cards.items() if card.input == "image"} or set(cards)
        augment = {field: tuple(stream.augment) if field in pictures else () for field in cards}
        views = {field: View(card, augment[field]) for field, card in cards.items()}
        if stream.strong:
            views[strong] = View(cards[first], tuple(stream.strong), "strong")
        keys = [f"streams.{name}"] if name in settings.streams else ["batch_size", "data.augment", "data.sampling"]
        with naming(settings.table, *keys):
            sharding.check_batch_size(stream.batch_size, loop.accumulate, parallel.mesh.size)
            streams[name] = pipeline.train_batches(
                found[name], views, stream.batch_size, loop.seed, name=name, order=stream.sampling,
                labelled=stream.labelled, **processes,
            )  # fmt: skip
    for name, batches in streams.items():
        for tokens in (x for x in batches.prepared.values() if isinstance(x, Tokens)):
            parts = (batches.rows(step).index for step in range(min(50, batches.steps_of(1))))
            log(f"{name}: {describe(tokens, parts)}")
    scored = {name: source for name, source in found.items() if name not in streams}
    # One size for all, so that one program serves them; it pads val, which is scored often, the least.
    count = len(found.get("val", found.get("test")))
    size = parallel.round_up(-(-count // -(-count // loop.eval_batch_size)))
    views = {field: View(card) for field, card in own.items()}
    with naming(settings.table, "eval_batch_size", "data.source"):
        how = {"num_workers": data.workers, **processes}
        if judged := judged_on(data):
            rows = np.random.default_rng(0).permutation(len(found[MAIN]))[:SAMPLED]
            scored[SAMPLE] = found[MAIN].select(np.sort(rows))
        made = {name: pipeline.eval_batches(source, views, size, **how) for name, source in scored.items()}
        if judged and not loop.cache:  # there are no inputs behind what is cached
            made[MIXED] = mixed_batches(found[judged[0][0]], views, size, DOMINANT, **how)
        return streams, made
