"""What a config stands for: data, networks, rules, terms and optimizer, checked against each other before any step."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tl_jax import models, tasks
from tl_jax.core import trees
from tl_jax.core.card import STORED, Card
from tl_jax.core.options import LANGUAGE
from tl_jax.core.trees import FROZEN
from tl_jax.data.examples import Source
from tl_jax.data.several import Several
from tl_jax.data.text import tokenizer
from tl_jax.methods import probes
from tl_jax.methods.term import MAIN, MODEL, Network, Start, StreamFacts
from tl_jax.models import peft
from tl_jax.models.attention import unfused
from tl_jax.runtime import sharding
from tl_jax.runtime.compile_cache import keep_compiled_programs
from tl_jax.runtime.log import log
from tl_jax.tasks import Spec
from tl_jax.training import audit, inputs, language, optim, steps, terms, texts
from tl_jax.training.phases import Material, Phase, check_prefixes, make_phase
from tl_jax.training.settings import Settings, naming, read
from tl_jax.weights import hub, load, parts, sanity, zero_shot
from tl_jax.weights.text_inputs import NO_TEXT, Text

MODEL_OPTIONS = ("name", "parts", "fusion", "weights", "partial", "image_size", "channels", "reinit", "head",
                 "head_init", "tokenizer", "vectors", "max_length", "pooling")  # fmt: skip


class Run(NamedTuple):
    """Everything that one run is made of.

    phases: in order, most runs have one. identity: what must be the same for a checkpoint to be of this run, as flat
    tables of plain JSON data.
    """

    settings: Settings
    material: Material
    phases: tuple[Phase, ...]
    identity: dict[str, Any]

    @property
    def total_steps(self) -> int:
        return self.phases[-1].stop

    def phase_of(self, step: int) -> int:
        """The phase that leads to the state after `step` steps; its last state is still its own."""
        return next(i for i, phase in enumerate(self.phases) if step <= phase.stop)

    @property
    def task(self) -> tasks.Task:
        """The task as it is scored."""
        return self.phases[-1].plan.task


def build(config: ConfigDict, parallel: sharding.Parallel) -> Run:
    """Loads and wires everything that a config names; raises ValueError for what does not fit together.

    Reads no example: what trains takes `prepare`, which compares them all, and `assemble`.
    """
    settings = read(config)
    return assemble(settings, prepare(settings, parallel, compare=False), parallel)


def prepare(settings: Settings, parallel: sharding.Parallel, *, compare: bool = True) -> Material:
    """Loads data and networks. compare: look for duplicates, and refuse those of scored examples in training."""
    language.check(settings)
    made = terms.make_terms(settings)
    terms.warn(settings, made)
    sharding.check_batch_size(settings.loop.batch_size, settings.loop.accumulate, parallel.mesh.size)
    check_hashes(settings)
    keep_compiled_programs()
    data, table = inputs.load_sources(settings), settings.table
    train = data[MAIN]
    with naming(table, "task", "data.source"):
        shares = [name for name, _ in settings.model.head[:1]] == ["cosine"]
        spec = tasks.fit_spec(settings.loop.task, train.labels, train.class_names, shares=shares)
    with naming(table, *(f"model.{name}" for name in MODEL_OPTIONS)):
        text = texts.text_of(settings.model, train)
        loaded = load_model(settings, tasks.make(spec).outputs, train.class_names, _columns(settings, train), text)
        language.check_network(spec.name, settings.model.name, loaded.model)
        if settings.model.vectors:
            loaded = texts.with_vectors(loaded, settings.model.vectors, train, settings.loop.seed)
    with naming(table, "model.name", "data.source", "data.card"):
        card = _finish_card(settings, loaded.card.replace(sha256=loaded.sha256), spec, train)
    data = language.with_pieces(data, card)
    with naming(table, "method.add"):
        model = _configure(settings, loaded, parallel)
        added = peft.init(model.model, loaded.variables, model.additions, jax.random.key(settings.loop.seed))
    variables = {"batch_stats": {}, **loaded.variables, "params": {**loaded.variables["params"], **added}}
    start = _make_start(settings, model, variables, card, tasks.make(spec), data)
    given = {name: _load_network(settings, name) for name in settings.networks}
    cards = {MODEL: card, **{name: network.card for name, network in given.items()}}
    start = start._replace(
        widths={name: _width(network) for name, network in given.items()},
        numbered=lambda name: inputs.numbered(train, cards[name]),
    )
    networks, memory = terms.initialise(made, start, given)
    variables, origins = _join(variables, loaded.origins, networks)
    fields = {name: inputs.field_of(name, network.card, card) for name, network in given.items()}
    further = {field: given[name].card for name, field in fields.items() if field not in card.cards}
    streams, eval_batches = inputs.make_streams(data, settings, card.cards, further, parallel)
    readers = {MODEL: steps.Reader(model, card, card.field)}
    for name, network in networks.items():
        column = name if name in given and settings.networks[name].cache else ""
        own_card = card if network.module is model else network.card
        readers[name] = steps.Reader(network.module, own_card, fields.get(name, card.field), column)
    facts = {name: inputs.facts_of(source) for name, source in data.items()}
    base = {"file": settings.model.weights, "sha256": loaded.sha256}
    files = {MODEL: (loaded.variables, loaded.origins)}
    files |= {name: (network.variables, {}) for name, network in given.items() if settings.networks[name].weights}
    looked = {name: found for name, each in files.items() if (found := _examine(*each))}
    return Material(
        data, streams, eval_batches, model, variables, origins, memory, networks, readers,
        start._replace(variables=variables), spec, card, base, looked, facts, inputs.transductive(data, settings),
        inputs.find_duplicates(data, settings) if compare else {}, inputs.make_ledger(data, settings),
    )  # fmt: skip


def assemble(settings: Settings, material: Material, parallel: sharding.Parallel) -> Run:
    """Rules, terms, optimizers and audits of every phase, on what was loaded."""
    phases: list[Phase] = []
    for phase_settings, phase_terms in zip(settings.phases, terms.make_terms(settings), strict=True):
        previous = phases[-1] if phases else None
        with naming({}, *([f"phases[{len(phases)}]"] if settings.table["phases"] else [])):
            phases.append(make_phase(settings, phase_settings, phase_terms, material, parallel, previous))
    check_prefixes(settings, phases)
    labels = [audit.labels_table(phase.audit) for phase in phases]
    tables = {
        "options": settings.identity,
        "labels": {f"{i}: {path}" if i else path: row for i, table in enumerate(labels) for path, row in table.items()},
        "class_names": dict(enumerate(material.card.class_names)),
        "card": phases[0].audit["card"],
        "data": {split: fact["fingerprint"] for split, fact in material.facts.items()},
        "weights": material.base,
    }
    run = Run(settings, material, tuple(phases), json.loads(json.dumps(tables)))
    intervals(run)
    return run


def check_hashes(settings: Settings) -> None:
    """Raises one ValueError for all weight files that have not the sha256 that the config gives."""
    given = {"model.weights_sha256": (settings.model.weights, settings.model.weights_sha256)}
    given |= {f"networks.{name}.sha256": (each.weights, each.sha256) for name, each in settings.networks.items()}
    own = settings.model.parts.items()
    given |= {f"model.parts.{kind}.sha256": (x.get("weights"), x.get("sha256")) for kind, x in own}
    hub.check({option: pair for option, pair in given.items() if all(pair)})


def _examine(variables: Mapping[str, Any], origins: Mapping[str, str]) -> dict[str, Any]:
    """What `sanity.examine` finds in the leaves of a network that a file gave; {} where none did."""
    flat = {
        path: np.asarray(leaf)
        for path, leaf in trees.flatten(variables).items()
        if origins.get(path) not in load.RANDOM
    }
    return sanity.examine(flat) if flat else {}


def load_model(
    settings: Settings, outputs: int, class_names: Sequence[str], columns: Sequence[str] = (), text: Text = NO_TEXT
) -> load.Loaded:
    """The network with a new head, or with the file's own, and random numbers in the parts of model.reinit."""
    model = settings.model
    arguments = {"image_size": model.image_size or None, "head_init": model.head_init, "seed": settings.loop.seed}
    arguments |= {"head": model.head, "columns": tuple(columns), "channels": model.channels, "partial": model.partial}
    if model.parts:
        own = {name: arguments[name] for name in ("head", "head_init", "seed", "columns", "channels")}
        return parts.load(model.parts, model.fusion, outputs, text=text, **own)
    arguments |= {name: settings.data.card.get(name, ()) for name in ("mean", "std")} | {"text": text}
    if model.head_init.startswith(zero_shot.WAYS):
        if model.keep_head or model.head or model.reinit or outputs != len(class_names):
            raise ValueError(f"model.head_init={model.head_init!r} makes the whole head, of classes: leave out "
                             "model.keep_head, model.head, model.reinit, and other tasks")  # fmt: skip
        loaded = zero_shot.load_named(model.name, model.weights, class_names, **arguments)
    else:
        keeps = model.keep_head or (not outputs and load.has_token_head(model.name, model.weights))
        loaded = load.load(model.name, model.weights, None if keeps else outputs, **arguments)
    known = loaded.card.class_names or class_names
    if model.keep_head and (loaded.card.num_classes != outputs or tuple(known) != tuple(class_names)):
        raise ValueError(
            f"model.keep_head=True, but the classifier of {model.weights or 'a random network'} knows "
            f"{loaded.card.num_classes} classes {list(known)[:5]} and the data has {len(class_names)} "
            f"{list(class_names)[:5]}; they must be the same in the same order, or take a new head"
        )
    _check_probe(settings.phases[0].method.name, loaded)
    if not model.reinit:
        return loaded
    short = {path: path.partition("/")[2] for path in trees.flatten(loaded.variables)}
    new = [(f"backbone/{part}/.*", "new") for part in model.reinit]
    matches = trees.match_rules(dict.fromkeys(short.values()), [*new, (".*", "kept")])
    random = trees.flatten(load.load(model.name, "", loaded.card.num_classes, **arguments).variables)
    fresh = {path: random[path] for path in short if matches[short[path]].value == "new"}
    variables = trees.merge(loaded.variables, fresh)
    return loaded._replace(variables=variables, origins={**loaded.origins, **dict.fromkeys(fresh, "new")})


def _check_probe(name: str, loaded: load.Loaded) -> None:
    """Raises ValueError for a head on which a method without gradient cannot build."""
    layers = loaded.model.head
    if name in probes.NAMES and layers:
        raise ValueError(
            f"model.keep_head or model.head_init keeps a head with the layers {layers}, and method.name = {name!r} "
            "fits a linear classifier on pre_logits; leave them out"
        )
    if name == "tip_adapter" and not (layers and layers[-1][0] == "l2_norm"):
        raise ValueError(
            f"method.name = 'tip_adapter' adds to a head of normalised embeddings; the head's layers are {layers}: set "
            "model.head_init = 'names:a photo of a {}.'"
        )
    if name == "none" and any(loaded.origins[x] in load.RANDOM for x in loaded.origins if x.startswith(load.HEAD)):
        raise ValueError(
            "method.name = 'none' scores the network as it is loaded, and its head is random: set model.keep_head = "
            "True for a file's own, or model.head_init = 'names:a photo of a {}.'"
        )


def _finish_card(settings: Settings, card: Card, spec: Spec, train: Source) -> Card:
    """The card of the network that is trained: overrides, the task and its names, and the table's columns."""
    data = settings.data
    card = card.override(dict(data.card), allowed=data.override_card)
    if lacking := [kind for kind in card.cards if kind not in train.kinds]:
        names = {"table": "rows of a table", "text": "texts", "image": "images"}
        found = " and ".join(names[kind] for kind in train.kinds)
        raise ValueError(f"{card.model} takes an input of kind {' and '.join(map(repr, lacking))}, and {train.name} "
                         f"has {found}")  # fmt: skip
    if "text" in card.cards:
        tokenizer.known(card.cards["text"])
    if card.parts:
        weights = {kind: part.get("weights", "") for kind, part in settings.model.parts.items()}
        given = {kind: weights.get(kind, settings.model.weights) for kind in card.cards}
        card = card.replace(parts=tuple(_of_columns(part, train, given[part.input]) for part in card.parts))
    card = _of_columns(card, train, settings.model.weights)
    return card.replace(
        class_names=train.class_names, task=spec.name, target_mean=spec.target_mean, target_std=spec.target_std,
        source=f"{card.source or 'random weights'} -> {train.name}",
    )  # fmt: skip


def _of_columns(card: Card, train: Source, weights: str) -> Card:
    """The card of a network for a table that begins without weights, with the means and deviations of its columns."""
    if card.input != "table" or weights:
        return card
    rows, whole = train.of_kind("table").inputs, train.inputs
    rows = rows[whole.present["table"]] if isinstance(whole, Several) else rows
    mean, std = (f(rows, axis=0, dtype="float64") for f in (np.mean, np.std))
    return card.replace(columns=train.columns, mean=tuple(mean.tolist()), std=tuple((std + (std == 0)).tolist()))


def _columns(settings: Settings, train: Source) -> tuple[str, ...]:
    """The columns of the network that is loaded: none where it leaves those of several inputs alone."""
    model = settings.model
    alone = train.input == "several" and not model.parts and models.get(model.name).card.input != "table"
    return () if alone else train.columns


def _configure(settings: Settings, loaded: load.Loaded, parallel: sharding.Parallel) -> peft.Adapted:
    """The module with the options of the run, and the parameters that the method adds."""
    model, dtype = settings.model, jnp.dtype(settings.model.dtype)
    size = loaded.model.width // loaded.model.heads if hasattr(loaded.model, "heads") else 8
    if model.attention == "cudnn" and (reason := unfused(dtype, size)):
        log(f"model.attention=cudnn: XLA computes the attention in its place, as {reason}")
    elif model.attention == "cudnn" and model.hidden_dropout:
        log("model.attention=cudnn: in training XLA computes the attention in its place, as model.hidden_dropout drops "
            "probabilities, which cuDNN's kernel cannot")  # fmt: skip
    same = {name: getattr(model, name) for name in ("dropout", "hidden_dropout", "drop_path", "remat", "attention")}
    same |= {"decodes": True} if settings.loop.task in LANGUAGE else {}
    module = loaded.model.clone(dtype=dtype, axis_name=parallel.axis_name, **same)
    return peft.Adapted(module, tuple(settings.phases[0].method.add))


def _load_network(settings: Settings, name: str) -> Network:
    """A further network of the config: of its group or frozen, with the classes of its weight file, in eval mode."""
    given = settings.networks[name]
    with naming({}, f"networks.{name}"):
        loaded = load.load(given.name, given.weights, None, image_size=given.image_size or None)
    module = peft.Adapted(loaded.model.clone(dtype=jnp.dtype(settings.model.dtype)))
    held = {name: value for name, value in settings.data.card.items() if name in STORED}
    card = loaded.card.replace(**held)
    return Network(module, card, loaded.variables, given.group or FROZEN, origin=given.weights or "new")


def _width(network: Network) -> int:
    """Of the features that a network gives."""
    example = load.example_input(network.card)
    return jax.eval_shape(lambda: network.module.apply(network.variables, example)[1])["pre_logits"].shape[-1]


def _make_start(
    settings: Settings, model: peft.Adapted, variables: Any, card: Card, task: tasks.Task, data: Mapping[str, Source]
) -> Start:
    """What the terms are told before the first step."""
    example = load.example_input(card)
    outputs = jax.eval_shape(lambda: model.apply(variables, example, train=False)[1])
    shapes = {name: leaf.shape for name, leaf in outputs.items()}

    def apply(network, variables, x, start=None, stop=None):
        x = x if start else steps.normalise(x, card)
        return model.apply(steps.subtree(variables, network), x, train=False, start=start, stop=stop)[1]

    def batch_statistics(variables, x):
        still = model.clone(dropout=0.0, hidden_dropout=0.0, drop_path=0.0, norm_momentum=0.0)  # of the batch alone
        x, rngs = steps.normalise(x, card), {"dropout": jax.random.key(0)}
        _, found = still.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)
        return trees.flatten(found.get("batch_stats", {}))

    source_head = functools.partial(
        load.source_head, settings.model.name, settings.model.weights, settings.model.partial
    )
    facts = {name: StreamFacts(len(data[name]), data[name].num_domains) for name in (MAIN, *settings.streams)}
    key = jax.random.key(settings.loop.seed)
    return Start(variables, None, task, model, facts, shapes, None, apply, batch_statistics, source_head, key)


def _join(
    variables: Mapping[str, Any], origins: Mapping[str, str], networks: Mapping[str, Network]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The variables of all networks as one tree, and where each leaf comes from."""
    joined = {kind: dict(tree) for kind, tree in variables.items()}
    origins = {**dict.fromkeys(trees.flatten(variables), "new"), **origins}  # new: added parameters
    for name, network in networks.items():
        for kind, tree in network.variables.items():
            if tree:
                joined[kind][name] = jax.tree.map(jnp.asarray, tree)
                origins |= {f"{kind}/{name}/{path}": network.origin for path in trees.flatten(tree)}
    return joined, origins


def intervals(run: Run) -> tuple[int, int]:
    """log_every and eval_every in steps."""
    loop = run.settings.loop
    sizes = {"batch_size": loop.batch_size, "train_size": len(run.material.data[MAIN])}
    with naming(run.settings.table, "log_every", "eval_every"):
        return optim.to_steps(loop.log_every, **sizes), optim.to_steps(loop.eval_every, **sizes)


def scored_splits(run: Run) -> list[str]:
    """The splits that are scored at the end: the run's own first, then those of data.extra_eval."""
    own = "test" if "test" in run.material.data else "val"
    return [own, *(name for name, *_ in run.settings.data.extra_eval)]
