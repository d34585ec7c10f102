"""The terms of a config: made, given what they need of their own, and refused where that cannot be had."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tl_jax.core import checks
from tl_jax.core.messages import nearest
from tl_jax.core.trees import FROZEN
from tl_jax.methods import TERMS, schedules
from tl_jax.methods.term import AVERAGE, MAIN, MODEL, TASK, Network, Start, Term
from tl_jax.runtime.log import log
from tl_jax.training.settings import PhaseSettings, Settings, naming

# What a term may need, whether a run has it, and how to give it to it.
NEEDS: dict[str, tuple[Callable[[Settings], bool], str]] = {
    "classes": (lambda s: s.loop.task == "classification", "task = 'classification', found {!r}; leave it out"),
    "stochastic": (
        lambda s: any(
            (s.model.dropout, s.model.hidden_dropout, s.model.drop_path, *(p.method.stoch_norm for p in s.phases))
        ),
        "something random in the network: model.dropout, hidden_dropout, drop_path or method.stoch_norm above 0",
    ),
    "whole_batch": (
        lambda s: s.loop.accumulate == 1 and s.loop.parallel == "jit",
        "the whole batch at once: accumulate = 1 and parallel = 'jit'",
    ),
    "domains": (
        lambda s: s.data.labelled and not isinstance(s.data.source, str) and len(s.data.source) > 1,
        "several labelled domains: data.source = (SOURCE, SOURCE, ...), one for each",
    ),
    "turns": (
        lambda s: any(phase.turns for phase in s.phases),
        "turns that raise and lower it, as docs/domains.md gives them",
    ),
    "average": (lambda s: s.loop.ema > 0, "the moving average: ema above 0"),
}
Terms = Mapping[str, tuple[Callable, Term]]


def make_terms(settings: Settings) -> list[Terms]:
    """The terms of each phase with their weights, functions of the phase's progress; ValueError lists all problems.

    A phase has the task's own term with weight 1 unless it says otherwise, or has a term that replaces it; a term of
    weight 0 is left out.
    """
    own = {TASK: {}} if settings.data.labelled else {}
    problems, given = [], [{**own, **phase.terms} for phase in settings.phases]
    given = [{name: _apart(arguments) for name, arguments in terms.items()} for terms in given]
    for i, name, (weight, arguments) in ((i, *pair) for i, terms in enumerate(given) for pair in terms.items()):
        where = f"phases[{i}]: " if settings.table["phases"] else ""
        problems += schedules.problems(f"{where}terms.{name}.weight", weight)
        problems += [where + problem for problem in checks.call_problems("term", name, arguments, TERMS)]
    checks.refuse("the terms of the loss do not fit", problems)
    given = [{name: pair for name, pair in terms.items() if pair[0] != 0} for terms in given]
    made = [{name: (schedules.make(w), TERMS[name](**arguments)) for name, (w, arguments) in x.items()} for x in given]
    for phase, terms in zip(settings.phases, made, strict=True):
        if TASK not in phase.terms and any(term.replaces_task for _, term in terms.values()):
            terms.pop(TASK, None)
    problems = [problem for terms in made for problem in _problems(settings, terms)] + _unused(settings, made)
    checks.refuse("the terms of the loss do not fit", problems)
    return made


def warn(settings: Settings, phases: Sequence[Terms]) -> None:
    """Says which terms of the first phase go on with a trained network that is not there."""
    first = phases[0]
    eager = [] if TASK in first else [name for name, (_, term) in first.items() if term.trained]
    if eager and not (settings.model.weights and settings.model.keep_head):
        log(
            f"{', '.join(eager)}: this goes on with a network that answers already, but the first phase has a new "
            "head; set model.weights and model.keep_head=True, or train a phase on labels first"
        )


def weights_of(phase: PhaseSettings) -> dict[str, tuple[str, dict[str, Any]]]:
    """{term: (schedule, its numbers)} of the weights that a phase names."""
    return {name: schedules.parts(_apart(arguments)[0]) for name, arguments in phase.terms.items()}


def _apart(arguments: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The weight of a term, and its own arguments."""
    return arguments.get("weight", 1.0), {key: value for key, value in arguments.items() if key != "weight"}


def _problems(settings: Settings, terms: Terms) -> list[str]:
    """What the terms of a phase need and the run has not."""
    streams, problems = {MAIN, *settings.streams}, []
    if not terms:
        why = "" if settings.data.labelled else ", and data.labelled = False leaves out that of the task"
        problems.append(f"no term has a weight above 0{why}: there is nothing to minimise")
    for name, (_, term) in terms.items():
        needs = [NEEDS[need] for need in sorted(term.needs)]
        problems += [f"{name} needs {text.format(settings.loop.task)}" for had, text in needs if not had(settings)]
        if name == TASK and not settings.data.labelled:
            problems.append(
                "task is on the stream train, which data.labelled=False leaves without labels: leave it out"
            )
        places = (*term.on, *term.feeds)
        if len(set(places)) < len(places):
            problems.append(f"{name} compares the stream {places[-1]!r} with itself: give it another one as its target")
        for stream in places:
            if stream not in streams:
                problems.append(f"{name} is on the stream {stream!r}{nearest(stream, streams)}: add streams.{stream}")
        if term.pairs and settings.model.name == "fusion":
            problems.append(f"{name} holds one input against another, and a fusion reads both: name a network of one")
        if settings.loop.parallel == "pmap" and (term.on != (MAIN,) or term.reads):
            problems.append(f"{name} has a further stream or network: parallel = 'pmap' runs one of each, use 'jit'")
        for network in term.reads:
            if (given := settings.networks.get(network)) and given.cache and given.group:
                problems.append(f"networks.{network} trains, group = {given.group!r}: leave out its cache")
            cached = network in settings.networks and settings.networks[network].cache
            if settings.loop.cache and not cached:
                hint = f", or set networks.{network}.cache" if network in settings.networks else ""
                problems.append(f"{name} runs {network!r} on the inputs, which cache replaces: leave out cache{hint}")
    if settings.networks and settings.loop.parallel == "pmap":
        problems.append("parallel = 'pmap' runs one network: use 'jit', or leave out networks")
    return problems


def _unused(settings: Settings, phases: Sequence[Terms]) -> list[str]:
    """Streams and networks of the config that no term of any phase uses."""
    terms = [term for phase in phases for _, term in phase.values()]
    on = {stream for term in terms for stream in (*term.on, *term.feeds)}
    read = {name for term in terms for name in term.reads}
    where = " of the phases" if settings.table["phases"] else ""
    problems = [f"streams.{name} feeds no term{where}" for name in settings.streams if name not in on]
    return problems + [f"networks.{name} is read by no term{where}" for name in settings.networks if name not in read]


def groups_of(networks: Mapping[str, Network], terms: Terms) -> dict[str, str]:
    """The group of every further network in a phase: its own where a term of it made or reads it, else frozen."""
    read = {name for _, term in terms.values() for name in term.reads}
    used = {name for name, network in networks.items() if name in read or terms.keys() & set(network.made_by)}
    return {name: network.group if name in used else FROZEN for name, network in networks.items()}


def outputs_read(phases: Sequence[Terms], model: Any, networks: Mapping[str, Network]) -> dict[str, tuple[str, ...]]:
    """{network: the outputs that the terms of any phase read of it}, of these networks."""
    found: dict[str, dict[str, None]] = {}
    for term in (term for terms in phases for _, term in terms.values()):
        for name in (name for name in term.reads if name in networks):
            found.setdefault(name, {}).update(dict.fromkeys(term.takes(model, networks[name].module)))
    return {name: tuple(outputs) for name, outputs in found.items()}


def initialise(
    phases: Sequence[Terms], start: Start, given: Mapping[str, Network]
) -> tuple[dict[str, Network], dict[str, Any]]:
    """The networks and the memory of all terms; given: the networks of the config, which a term may read."""
    networks, memory = dict(given), {}
    for name, term in {name: term for terms in phases for name, (_, term) in terms.items()}.items():
        with naming({}, f"terms.{name}"):
            made, kept = term.init(start)
        for network, value in made.items():
            known = networks.get(network, value)
            both = known.variables, value.variables
            variables = {kind: {**both[0].get(kind, {}), **both[1].get(kind, {})} for kind in {**both[0], **both[1]}}
            networks[network] = value._replace(variables=variables, made_by=(*known.made_by, name))
        if kept is not None:
            memory[name] = kept
        if unknown := [network for network in term.reads if network not in {MODEL, AVERAGE, *networks}]:
            raise ValueError(
                f"terms.{name} reads the networks {unknown}, which are not there: add networks.{unknown[0]}"
                f"{nearest(unknown[0], networks)}"
            )
    return networks, memory
