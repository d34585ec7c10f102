"""Language modelling: what a run of it cannot have, and long texts in pieces."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tl_jax.core.card import Card
from tl_jax.core.checks import refuse
from tl_jax.core.options import LANGUAGE
from tl_jax.data.examples import Source
from tl_jax.data.text import language, tokenizer
from tl_jax.data.text.tokens import Texts
from tl_jax.methods.term import TASK
from tl_jax.runtime.log import log
from tl_jax.training.settings import Settings

TERMS = (TASK, "l2_sp", "l1", "bss")  # which read no classes


def check(settings: Settings) -> None:
    """Raises one ValueError for all options of a run of language modelling that it cannot have."""
    task = settings.loop.task
    if task not in LANGUAGE:
        return
    model, data, loop = settings.model, settings.data, settings.loop
    named = dict.fromkeys(name for phase in settings.phases for name in phase.terms if name not in TERMS)
    added = dict.fromkeys(name for phase in settings.phases for name, _ in phase.method.add)
    rows = {
        "model.head and model.head_init are of classes": bool(model.head) or model.head_init != "zeros",
        "cache keeps the outputs of whole texts, and labels are made of each batch": bool(loop.cache),
        "parallel = 'pmap' takes means by example, and batches differ in tokens: use 'jit'": loop.parallel == "pmap",
        "data.labelled = False: the labels are the tokens, which are there": not data.labelled,
        "data.sampling = 'class_balanced' needs classes": data.sampling == "class_balanced",
        "data.resample: score val or test instead": bool(data.resample),
        "streams and networks are of tasks with classes": bool(settings.streams or settings.networks),
        f"terms {', '.join(named)}: there is the task's own, and {', '.join(TERMS[1:])}": bool(named),
        "method.add: prompts are tokens without a label, mixstyle is of maps": bool({"prompt", "mixstyle"} & {*added}),
    }
    refuse(f"task = {task!r} cannot have this", [text for text, wrong in rows.items() if wrong])


def check_network(task: str, name: str, module: Any) -> None:
    """Raises ValueError for a network that cannot tell tokens."""
    has = {"masked_lm": getattr(module, "token_head", False), "next_token": getattr(module, "next_token", False)}
    if not has.get(task, True):
        other = next((each for each, there in has.items() if there), "")
        fix = f"it can be trained as {other!r}" if other else "a network such as bert_tiny.mlm, or gpt2, can"
        fix = f"{name}.mlm has the head for it" if _is_encoder(module) and task == "masked_lm" and not other else fix
        raise ValueError(f"task = {task!r}: {name} does not predict tokens in this way; {fix}")


def _is_encoder(module: Any) -> bool:
    return hasattr(module, "token_head") and not module.causal


def in_pieces(source: Source, card: Card) -> Source:
    """The source with every text that is longer than the network takes in pieces, which are a group; pairs are kept."""
    own, rows, index = tokenizer.known(card), [], []
    for i, row in enumerate(source.inputs.rows):
        cut = [row] if len(row) > 1 else [(each,) for each in language.pieces(own, row[0], card.max_length)]
        rows += cut
        index += [i] * len(cut)
    if len(rows) == len(source):
        return source
    log(f"{source.name}: {len(source):,} texts, {len(rows):,} pieces of at most {card.max_length} tokens")
    place = np.array(index)
    numbers = np.arange(len(place)) - np.searchsorted(place, place)
    ids = tuple(f"{source.ids[i]}#{number}" for i, number in zip(index, numbers.tolist(), strict=True))
    found = source.select(place)
    groups = np.array([source.ids[i] for i in index]) if source.groups is None else found.groups
    sizes = np.array([sum(len(text.encode(errors="replace")) for text in row) for row in rows], np.int64)
    return dataclasses.replace(found, inputs=Texts(tuple(rows)), ids=ids, sizes=sizes, groups=groups)


def with_pieces(data: Mapping[str, Source], card: Card) -> dict[str, Source]:
    """The sources of a run, in pieces where its task is of language."""
    return {name: in_pieces(source, card) if card.task in LANGUAGE else source for name, source in data.items()}
