"""One phase of a run: what it trains, what a step of it computes, its optimizer and its audit."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tl_jax import tasks
from tl_jax.core import checks, trees
from tl_jax.core.card import Card
from tl_jax.core.messages import nearest
from tl_jax.data.examples import Source
from tl_jax.data.pipeline import EvalBatches, TrainBatches
from tl_jax.data.sealed import Ledger
from tl_jax.methods import mixing, probes, rules
from tl_jax.methods.term import MAIN, MODEL, Method, Network, Start
from tl_jax.models import peft
from tl_jax.models.head import reads
from tl_jax.runtime import sharding
from tl_jax.tasks import Spec
from tl_jax.training import audit, optim, steps, terms
from tl_jax.training.settings import LoopSettings, MethodSettings, PhaseSettings, Settings, naming, phase_table

MIXES = ("mixup", "cutmix", "mix_domains")  # of method: inputs


class Material(NamedTuple):
    """What a run needs that neither lr, weight_decay nor groups decide.

    data: the sources by name. streams: of training, by step. eval_batches: of all that is scored. model: as it is
    evaluated. variables, origins, memory: as training begins. networks: the further ones, readers: all of them. start:
    what the terms are told. sanity: of each network that a file gave, by weights/sanity.py. shared: examples that are
    trained on without labels and scored; duplicates: from `inputs.find_duplicates`; both for result.json. ledger: of
    the openings of label arrays.
    """

    data: dict[str, Source]
    streams: dict[str, TrainBatches]
    eval_batches: dict[str, EvalBatches]
    model: peft.Adapted
    variables: dict[str, Any]
    origins: dict[str, str]
    memory: dict[str, Any]
    networks: dict[str, Network]
    readers: dict[str, steps.Reader]
    start: Start
    spec: Spec
    card: Card
    base: dict[str, str]
    sanity: dict[str, dict[str, Any]]
    facts: dict[str, dict[str, Any]]
    shared: dict[tuple[str, str], int]
    duplicates: dict[str, Any]
    ledger: Ledger


class Phase(NamedTuple):
    """A span of the training, steps `start` to `stop`, with one set of rules, terms and one optimizer.

    plan: what a step computes. audit: from audit.make_audit. schedule is make_schedule(lr), tx is
    make_optimizer(schedule, groups); with a traced lr, and `values` as in optim.make_optimizer, they make those of
    other runs of the same form. offsets: the steps that each path has been trained for before.
    """

    start: int
    stop: int
    plan: steps.Plan
    schedule: Any
    tx: Any
    audit: dict[str, Any]
    lr: float
    warmup_steps: int
    groups: dict[str, optim.Group]
    offsets: dict[str, int]
    make_schedule: Callable
    make_optimizer: Callable

    @property
    def length(self) -> int:
        return self.stop - self.start


def make_phase(
    settings: Settings,
    phase: PhaseSettings,
    phase_terms: terms.Terms,
    material: Material,
    parallel: sharding.Parallel,
    previous: Phase | None,
) -> Phase:
    """One phase after the previous one."""
    networks, variables, method, table = material.networks, material.variables, phase.method, phase_table(phase)
    params = variables["params"]
    paths = list(trees.flatten(params))
    own = [path for path in paths if path.split("/")[0] not in networks]
    name = "linear_probe" if method.name in probes.WITHOUT_STEPS else method.name
    cuts = material.model.cuts
    groups_of = terms.groups_of(networks, phase_terms)
    with naming(table, "method.name", "method.k", "method.blocks", "method.rules"):
        own_rules = rules.make_rules(name, own, cuts, method.k, method.blocks, method.rules)
        matches = trees.match_rules(paths, rules.auxiliary(paths, groups_of) + own_rules)
    labels = {path: match.value for path, match in matches.items()}
    with naming(table, "method.norm"):
        policies = _norm_policies(variables["batch_stats"], labels, networks, method.norm)
    anew = any(term.statistics for _, term in phase_terms.values())
    policies |= {path: "computed anew" for path in policies if anew and path.split("/")[0] not in networks}
    groups, offsets, lengths = _make_groups(settings.loop, phase, labels, material.facts, previous, anew)
    with naming(table, "turns", "terms"):
        turns = _make_turns(phase, phase_terms, groups)
    parts = getattr(material.model.model, "networks", None)
    multipliers = rules.layer_multipliers(own, cuts, phase.layer_decay, parts) if phase.layer_decay < 1 else {}
    trained = (path for path in own if labels[path] != trees.FROZEN)
    blocks = rules.parts(trained) if method.auto_rgn else {}
    apart = tuple(name for name, group in groups_of.items() if group == name)

    def make_schedule(lr):
        args = dict(phase.schedule_args)
        return optim.make_schedule(phase.schedule_name, lr, total_steps=lengths[0], warmup_steps=lengths[1], args=args)

    def make_optimizer(schedule, groups, values=None):
        more = {"multipliers": multipliers, "offsets": offsets, "blocks": blocks, "values": values, "apart": apart}
        more["times"] = Counter(name for turn in turns for name in turn.groups)
        return optim.make_optimizer(labels, groups, schedule, phase.clip, **more)

    with naming(table, "schedule.name", "schedule.args", "schedule.warmup", "total"):
        schedule = make_schedule(phase.lr)
    tx = make_optimizer(schedule, groups)
    opt_state = jax.eval_shape(tx.init, trees.split(params, labels)[0])
    report = audit.make_audit(
        variables, material.origins, matches, groups, policies, opt_state, material.card, material.facts, multipliers,
        auxiliary=tuple(networks),
    )  # fmt: skip
    report = audit.without_steps(report, method.name) if method.name in probes.WITHOUT_STEPS else report
    report["weights"] = material.base
    report |= {} if previous else {"sanity": material.sanity}
    start = previous.stop if previous else 0
    plan = _make_plan(settings, phase, phase_terms, material, parallel, labels, policies)
    return Phase(
        start, start + lengths[0], plan._replace(start=start, length=lengths[0], turns=turns), schedule, tx, report,
        phase.lr, lengths[1], groups, offsets, make_schedule, make_optimizer,
    )  # fmt: skip


def _norm_policies(batch_stats: Any, labels: Mapping[str, str], networks, norm: Sequence) -> dict[str, str]:
    """The policy of every BatchNorm layer; method.norm is about the model, further networks follow their parameters."""
    further = {name: tree for name, tree in batch_stats.items() if name in networks}
    own = {name: tree for name, tree in batch_stats.items() if name not in networks}
    return audit.norm_policies(own, labels, norm) | audit.norm_policies(further, labels, ())


def _make_groups(loop: LoopSettings, phase: PhaseSettings, labels, facts, previous: Phase | None, idle: bool):
    """The optimizer groups, the steps that each path has been trained for, and (length, warm-up) in steps.

    idle: nothing need be trained.
    """
    sizes = {"batch_size": loop.batch_size, "train_size": facts[MAIN]["examples"]}
    table = phase_table(phase)
    with naming(table, "total", "schedule.warmup"):
        lengths = tuple(optim.to_steps(duration, **sizes) for duration in (phase.total, phase.schedule_warmup))
    default = optim.Group(
        phase.optimizer, tuple(phase.optimizer_args.items()), weight_decay=phase.weight_decay, decay=phase.decay
    )
    with naming(table, "method.name", "groups", "optimizer", "optimizer_args", "weight_decay", "decay"):
        groups = optim.make_groups(labels, default, phase.groups) if not idle or _trains(labels) else {}
    anew = phase.restart or phase.turns or (previous and previous.plan.turns)  # counts of turns are not those of steps
    known = None if anew else previous and (previous.plan.labels, previous.groups, previous.offsets, previous.length)
    return groups, optim.offsets_after(known, labels, groups), lengths


def _trains(labels: Mapping[str, str]) -> bool:
    return any(label != trees.FROZEN for label in labels.values())


def _make_turns(phase: PhaseSettings, phase_terms: terms.Terms, groups: Mapping[str, Any]) -> tuple[steps.Turn, ...]:
    """The turns of a phase; ValueError lists groups and terms that are not there, or that no turn names."""
    turns = tuple(steps.Turn(tuple(names), dict(factors)) for names, factors in phase.turns)
    if not turns:
        return ()
    problems = ["method.auto_rgn compares the gradients of all blocks in one update: leave it out, or turns"]
    problems = problems if phase.method.auto_rgn else []
    for what, known, places in (("group", groups, 0), ("term", phase_terms, 1)):
        named = dict.fromkeys(name for turn in turns for name in turn[places])
        problems += [
            f"there is no {what} {x!r}{nearest(x, known)}; it has: {', '.join(known)}" for x in named.keys() - known
        ]
        problems += [f"no turn names the {what} {name!r}" for name in known if name not in named]
    problems += [
        f"a turn names a group twice: {turn.groups}" for turn in turns if len(set(turn.groups)) < len(turn.groups)
    ]
    checks.refuse("the turns do not fit", sorted(problems))
    return turns


def _make_plan(
    settings: Settings, phase: PhaseSettings, phase_terms: terms.Terms, material: Material, parallel, labels, policies
) -> steps.Plan:
    """What a step of the phase computes."""
    loop, method = settings.loop, phase.method
    frozen_norms = tuple(path for path, policy in policies.items() if policy != "update")
    if method.stoch_norm and len(frozen_norms) == len(policies):
        raise ValueError(
            "method.stoch_norm samples batch or running statistics, but no BatchNorm layer is in train mode "
            f"({len(policies)} in the network, all frozen); train their blocks, or set method.norm"
        )
    model = dataclasses.replace(material.model, stoch_norm=method.stoch_norm).clone(frozen_norms=frozen_norms)
    readers = {**material.readers, MODEL: material.readers[MODEL]._replace(module=model)}
    task_args = _task_args(settings, material)
    with naming(settings.table | phase_table(phase), "task_args", "method.label_smoothing"):
        task = tasks.make(material.spec, label_smoothing=method.label_smoothing, **task_args)
    running = {}
    if material.streams[MAIN].labelled and any(MAIN in term.on for _, term in phase_terms.values()):
        labels_of_one = jnp.asarray(material.data[MAIN].labels[:1])
        running = jax.eval_shape(task.running, {"logits": jnp.zeros((1, task.outputs))}, labels_of_one)
    named = [log for name, (_, term) in phase_terms.items() for log in (name, *(f"{name}/{x}" for x in term.logs))]
    return steps.Plan(
        readers=readers,
        method=Method(phase_terms, _make_mix(settings, method, material)),
        task=task,
        labels=labels,
        frozen_norms=frozen_norms,
        prefix=_make_prefix(settings, model, labels, policies, material.networks),
        joint=loop.norm_batches == "joint",
        devices=parallel.mesh.size,
        accumulate=loop.accumulate,
        ema=loop.ema,
        axis_name=parallel.axis_name,
        whole=parallel.whole,
        facts=material.start.facts,
        sums=(*steps.SUMS, *running, *(named if len(named) > 1 else ())),
    )


def _make_mix(settings: Settings, method: MethodSettings, material: Material) -> Callable | None:
    """What mixes the batches; ValueError lists what MixStyle and mixing across domains do not go with."""
    model, shapes, domains = material.model, material.start.shapes, material.start.facts[MAIN].domains
    loop, alpha, several = settings.loop, method.mix_domains, "several domains, data.source = (SOURCE, SOURCE, ...)"
    problems = [f"method.mix_domains = {alpha} needs {several}"] if alpha and domains < 2 else []
    if material.card.input in ("text", "several") and (alpha or method.mixup or method.cutmix):
        what = "texts have neither" if material.card.input == "text" else "several inputs have more than these"
        problems.append(f"method.mixup, method.cutmix and method.mix_domains mix pixels or numbers: {what}")
    if alpha and (loop.accumulate > 1 or loop.parallel != "jit"):
        problems.append(f"method.mix_domains = {alpha} needs the whole batch at once: accumulate = 1, parallel = 'jit'")
    if alpha and (method.mixup or method.cutmix):
        problems.append(f"method.mix_domains = {alpha} takes the place of method.mixup and method.cutmix: expected 0")
    if model.mixes_domains and domains < 2 and not settings.streams:
        problems.append(f"method.add: mixstyle with partner = 'other_domain' needs {several}, or a further stream")
    flat = [cut for cut in model.styled if len(shapes[cut]) < 3]
    problems += [f"method.add: mixstyle after = {cut!r}, whose output {shapes[cut]} has no positions" for cut in flat]
    checks.refuse("what is mixed does not fit", problems)
    return mixing.make_mix(method.mixup, method.cutmix, alpha, domains)


def _task_args(settings: Settings, material: Material) -> dict[str, tuple[float, ...]]:
    """The arguments of the task as numbers; "balanced" weighs a class by N / (K N_class), 1 on average."""
    found = {}
    for name, value in settings.loop.task_args.items():
        if value == "balanced":
            counts = np.bincount(material.data[MAIN].labels, minlength=len(material.spec.class_names))
            value = tuple((counts.sum() / (len(counts) * np.maximum(counts, 1))).tolist())
        found[name] = value if isinstance(value, tuple) else (value,)
    return found


def _make_prefix(
    settings: Settings, model: peft.Adapted, labels: Mapping[str, str], policies: Mapping[str, str], networks
) -> steps.Prefix | None:
    """The longest prefix of the network in which nothing is trained and nothing is random."""
    changing = [path for path, value in {**labels, **policies}.items() if value != trees.FROZEN]
    own = [path for path in changing if path.split("/")[0] not in networks]
    cuts, read = model.cuts, reads(model.model)
    length = rules.frozen_cuts(own, cuts)
    length = min(length, len(model.model.deterministic_cuts), *(cuts.index(x) + 1 for x in (read, *model.styled)))
    if not length:
        return None
    dtype = settings.model.prefix_dtype or settings.model.dtype
    cached = bool(settings.loop.cache)
    return steps.Prefix(model.clone(dtype=jnp.dtype(dtype), remat=""), cuts[length - 1], cached)


def check_prefixes(settings: Settings, phases: Sequence[Phase]) -> None:
    """Raises one ValueError for options of the frozen prefix that come to nothing, or that would change numbers."""
    problems, loop, prefixes = [], settings.loop, [phase.plan.prefix for phase in phases]
    about_it = {"cache": loop.cache, "model.prefix_dtype": settings.model.prefix_dtype}
    if any(about_it.values()) and not any(prefixes):
        problems.append(
            f"{about_it} is about the frozen prefix, but in every phase the stem trains, its statistics are "
            "updated, or its output is random (model.hidden_dropout); freeze from the stem on (linear_probe, last_k), "
            "or leave it out"
        )
    if loop.views > 1 and not settings.data.augment:
        problems.append(f"views={loop.views}, but data.augment is empty: all views would be the same; expected 1")
    columns = [name for name, network in settings.networks.items() if network.cache]
    for i, (phase, prefix) in enumerate(zip(settings.phases, prefixes, strict=True)):
        mixing = {name: getattr(phase.method, name) for name in MIXES if getattr(phase.method, name)}
        if mixing and (columns or (loop.cache and prefix)):
            problems.append(f"phase {i} mixes inputs, {mixing}: cached outputs are of single examples; leave it out")
    if problems:
        raise ValueError("the frozen prefix of the network does not go with:\n  " + "\n  ".join(problems))
