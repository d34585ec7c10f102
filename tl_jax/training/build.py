"""What a config stands for: data, network, rules and optimizer, checked against each other before the first step."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tl_jax import config as options
from tl_jax.core import messages, trees
from tl_jax.core.card import Card
from tl_jax.data import pipeline, resample, sources
from tl_jax.methods import Method, penalties, probes
from tl_jax.methods import rules as finetune
from tl_jax.models import peft
from tl_jax.models.layers import unfused
from tl_jax.runtime import sharding
from tl_jax.runtime.compile_cache import keep_compiled_programs
from tl_jax.runtime.log import say
from tl_jax.training import audit, optim, steps
from tl_jax.weights import load as pretrained


class Phase(NamedTuple):
    """A stretch of the training, steps `start` to `stop`, with one set of rules and one optimizer.

    labels: the group of each parameter path. audit: from audit.make_audit. prefix: what is frozen in front, if any.
    schedule is make_schedule(lr), tx is make_optimizer(schedule, groups); with a traced lr, and `values` as in
    optim.make_optimizer, they make those of other runs of the same form.
    """

    start: int
    stop: int
    model: peft.Adapted
    method: Method
    labels: dict[str, str]
    schedule: Any
    tx: Any
    audit: dict[str, Any]
    prefix: steps.Prefix | None
    lr: float
    warmup_steps: int
    groups: dict[str, optim.Group]
    ages: dict[str, int]
    make_schedule: Callable
    make_optimizer: Callable

    @property
    def length(self) -> int:
        """The number of steps."""
        return self.stop - self.start


class Run(NamedTuple):
    """Everything that one run is made of.

    data: the sources of train, of val or test or both, and of data.also. batches: of train, by step. eval_batches: of
    the others. model: as it is evaluated. variables: as loaded, with what the method adds. phases: in order, most runs
    have one. base: the weight file and its sha256. identity: what must be the same for a checkpoint to be of this run,
    as flat tables of plain JSON data.
    """

    data: dict[str, sources.Source]
    batches: pipeline.TrainBatches
    eval_batches: dict[str, pipeline.EvalBatches]
    model: peft.Adapted
    variables: Any
    card: Card
    phases: tuple[Phase, ...]
    base: dict[str, str]
    identity: dict[str, Any]

    @property
    def total_steps(self) -> int:
        """The steps of all phases."""
        return self.phases[-1].stop

    def phase_of(self, step: int) -> int:
        """The phase that leads to the state after `step` steps; its last state is still its own."""
        return next(i for i, phase in enumerate(self.phases) if step <= phase.stop)


class Material(NamedTuple):
    """What a run needs that neither lr, weight_decay nor groups decide; facts: of each split of the data."""

    data: dict[str, sources.Source]
    batches: pipeline.TrainBatches
    eval_batches: dict[str, pipeline.EvalBatches]
    model: peft.Adapted
    loaded: pretrained.Loaded
    card: Card
    facts: dict[str, dict[str, Any]]


def build(config: ConfigDict, parallel: sharding.Parallel) -> Run:
    """Loads and wires everything that a config names; raises ValueError for what does not fit together."""
    stretches = check(config, parallel)
    return assemble(config, stretches, prepare(config, stretches, parallel))


def check(config: ConfigDict, parallel: sharding.Parallel) -> list[ConfigDict]:
    """The config of each phase; raises ValueError for values that cannot be meant, before anything is loaded."""
    options.check(config)
    stretches = [options.override(config, dict(phase)) for phase in config.phases] or [config]
    for stretch in stretches:
        options.check(stretch)
    sharding.check_batch_size(config.batch_size, config.accumulate, parallel.mesh.size)
    return stretches


def prepare(config: ConfigDict, stretches: Sequence[ConfigDict], parallel: sharding.Parallel) -> Material:
    """Loads data and network."""
    keep_compiled_programs()
    data = load_data(config)
    class_names = data["train"].class_names
    loaded = load_network(config, class_names)
    card = loaded.card.override(config.data.card.to_dict(), allowed=config.data.override_card)
    card = card.replace(class_names=class_names, source=f"{card.source or 'random weights'} -> {data['train'].name}")
    batches, eval_batches = make_batches(config, data, card, parallel)
    model = peft.Adapted(
        loaded.model.clone(
            dtype=jnp.dtype(config.model.dtype),
            dropout=config.model.dropout,
            drop_path=config.model.drop_path,
            remat=config.model.remat,
            attention=config.model.attention,
            axis_name=parallel.axis_name,
        ),
        tuple(config.method.add),
    )
    size = loaded.model.width // loaded.model.heads if hasattr(loaded.model, "heads") else 8
    if config.model.attention == "cudnn" and (reason := unfused(jnp.dtype(config.model.dtype), size)):
        say(f"model.attention=cudnn: XLA computes the attention in its place, as {reason}")
    loaded = _with_parameters_beside(config, stretches, loaded, model, data["train"], card)
    facts = {split: {"name": s.name, "examples": len(s), "fingerprint": s.fingerprint} for split, s in data.items()}
    return Material(data, batches, eval_batches, model, loaded, card, facts)


def assemble(config: ConfigDict, stretches: Sequence[ConfigDict], material: Material) -> Run:
    """Rules, optimizers and audits of every phase, on what was loaded."""
    data, batches, eval_batches, model, loaded, card, facts = material
    phases: list[Phase] = []
    ages = None
    for stretch in stretches:
        phase, ages = _make_phase(stretch, loaded, model, card, facts, phases[-1] if phases else None, ages)
        phases.append(phase)
    _check_prefixes(config, stretches, phases)
    base = {"file": config.model.weights, "sha256": loaded.sha256}
    labels = [audit.labels_table(phase.audit) for phase in phases]
    tables = {
        "options": options.identity(config),
        "labels": {f"{i}: {path}" if i else path: row for i, table in enumerate(labels) for path, row in table.items()},
        "class_names": dict(enumerate(card.class_names)),
        "card": phases[0].audit["card"],
        "data": {split: fact["fingerprint"] for split, fact in facts.items()},
        "weights": base,
    }
    return Run(
        data, batches, eval_batches, model, loaded.variables, card, tuple(phases), base,
        identity=json.loads(json.dumps(tables)),
    )  # fmt: skip


def load_network(config: ConfigDict, class_names: Sequence[str]) -> pretrained.Loaded:
    """The network as a run begins: a new head or the file's own, random numbers in the parts of model.reinit."""
    keep, arguments = config.model.keep_head, {
        "image_size": config.model.image_size or None, "head_init": config.model.head_init, "seed": config.seed
    }  # fmt: skip
    loaded = pretrained.load_with_origins(
        config.model.name, config.model.weights, None if keep else len(class_names), **arguments
    )
    known = loaded.card.class_names or class_names
    if keep and (loaded.card.num_classes != len(class_names) or tuple(known) != tuple(class_names)):
        raise ValueError(
            f"model.keep_head=True, but the classifier of {config.model.weights or 'a random network'} knows "
            f"{loaded.card.num_classes} classes {list(known)[:5]} and the data has {len(class_names)} "
            f"{list(class_names)[:5]}; they must be the same in the same order, or take a new head"
        )
    if not config.model.reinit:
        return loaded
    rules = [(f"backbone/{part}/.*", "new") for part in config.model.reinit]
    flat = {path.partition("/")[2]: path for path in trees.flatten(loaded.variables)}
    matches = trees.match_rules(flat, [*rules, (".*", "kept")])
    random = pretrained.load_with_origins(config.model.name, "", loaded.card.num_classes, **arguments)
    drawn = {path for short, path in flat.items() if matches[short].value == "new"}
    fresh = {path: leaf for path, leaf in trees.flatten(random.variables).items() if path in drawn}
    variables = trees.merge(loaded.variables, fresh)
    return loaded._replace(variables=variables, origins={**loaded.origins, **dict.fromkeys(fresh, "new")})


def _with_parameters_beside(
    config: ConfigDict,
    stretches: Sequence[ConfigDict],
    loaded: pretrained.Loaded,
    model: peft.Adapted,
    train: sources.Source,
    card: Card,
) -> pretrained.Loaded:
    """`loaded` with added parameters, and with what the regularisers of any phase need (a reference, a source head)."""
    params, batch_stats = loaded.variables["params"], loaded.variables.get("batch_stats", {})
    beside = trees.flatten(peft.init(model.model, loaded.variables, model.additions, jax.random.key(config.seed)))
    pairs = {json.dumps([name, args], sort_keys=True): (name, args) for c in stretches for name, args in _penalties(c)}
    image = {"mean": card.mean, "std": card.std}

    def apply(params, batch_stats, x, start=None):
        x = x if start else steps.normalise(x, **image)
        return model.apply({"params": params, "batch_stats": batch_stats}, x, train=False, start=start)

    def batches():
        size = min(config.eval_batch_size, len(train))
        for batch in pipeline.eval_batches(train, card=card, batch_size=size):
            yield batch["image"][batch["mask"]], batch["label"][batch["mask"]]

    needs_head = any(name == "co_tuning" for name, _ in pairs.values())
    source_head = pretrained.source_head(config.model.name, config.model.weights) if needs_head else None
    at_start = trees.merge(params, beside)
    start = penalties.Start(at_start, batch_stats, source_head, apply, model.cuts, batches, len(train.class_names))
    for regularizer in (made for pair in pairs.values() for made in penalties.make([pair])):
        beside |= trees.flatten(regularizer.init(start))
    copied = ("reference/", "source_head/")
    origins = {f"params/{path}": "copy" if path.startswith(copied) else "new" for path in beside}
    variables = {**loaded.variables, "params": trees.merge(params, {p: jnp.asarray(x) for p, x in beside.items()})}
    return loaded._replace(variables=variables, origins={**loaded.origins, **origins})


def _penalties(config: ConfigDict) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, dict(args)) for name, args in config.method.regularize if name != "stoch_norm"]


def _make_phase(
    config: ConfigDict,
    loaded: pretrained.Loaded,
    model: peft.Adapted,
    card: Card,
    facts: Mapping[str, Any],
    before: Phase | None,
    ages_before: Any,
) -> tuple[Phase, Any]:
    """One phase behind the one before it, and what the next one must know for the optimizer's values to go on."""
    params = loaded.variables["params"]
    paths = list(trees.flatten(params))
    method = config.method
    name = "linear_probe" if method.name in probes.NAMES else method.name
    rules = finetune.make_rules(name, paths, model.cuts, method.k, method.blocks, method.rules)
    matches = trees.match_rules(paths, finetune.beside(paths) + rules)
    labels = {path: match.value for path, match in matches.items()}
    policies = audit.norm_policies(loaded.variables.get("batch_stats", {}), labels, method.norm)
    frozen_norms = tuple(path for path, policy in policies.items() if policy == trees.FROZEN)
    loss = finetune.make_method(
        num_classes=len(card.class_names), regularizers=penalties.make(_penalties(config)),
        **{name: method[name] for name in ("label_smoothing", "mixup", "cutmix")},
    )  # fmt: skip

    in_steps = {"batch_size": config.batch_size, "train_size": facts["train"]["examples"]}
    length, warmup_steps = (optim.to_steps(d, **in_steps) for d in (config.total, config.schedule.warmup))
    default = optim.Group(
        config.optimizer, tuple(config.optimizer_args.items()), weight_decay=config.weight_decay, decay=config.decay
    )
    groups = optim.make_groups(labels, default, config.groups.to_dict())
    ages = optim.ages_after(ages_before, labels, groups)
    multipliers = finetune.layer_multipliers(paths, model.cuts, config.layer_decay) if config.layer_decay < 1 else {}
    blocks = finetune.parts(path for path, label in labels.items() if label != trees.FROZEN) if method.auto_rgn else {}
    shape = {"total_steps": length, "warmup_steps": warmup_steps, "args": config.schedule.args.to_dict()}

    def make_schedule(lr):
        return optim.make_schedule(config.schedule.name, lr, **shape)

    def make_optimizer(schedule, groups, values=None):
        more = {"multipliers": multipliers, "ages": ages, "blocks": blocks, "values": values}
        return optim.make_optimizer(labels, groups, schedule, config.clip, **more)

    schedule = make_schedule(config.lr)
    tx = make_optimizer(schedule, groups)
    opt_state = jax.eval_shape(tx.init, trees.split(params, labels)[0])
    report = audit.make_audit(
        loaded.variables, loaded.origins, matches, groups, policies, opt_state, card, facts, multipliers
    )
    report["weights"] = {"file": config.model.weights, "sha256": loaded.sha256}
    start = before.stop if before else 0
    model = dataclasses.replace(model, stoch_norm=_stoch_norm(method.regularize, frozen_norms, policies))
    model = model.clone(frozen_norms=frozen_norms)
    phase = Phase(
        start, start + length, model, loss, labels, schedule, tx, report,
        _make_prefix(config, model, labels, policies),
        config.lr, warmup_steps, groups, ages, make_schedule, make_optimizer,
    )  # fmt: skip
    return phase, (labels, groups, ages, length)


def _make_prefix(
    config: ConfigDict, model: peft.Adapted, labels: Mapping[str, str], policies: Mapping[str, str]
) -> steps.Prefix | None:
    """The longest front of the network in which nothing moves and nothing is drawn at random."""
    moving = [path for path, value in {**labels, **policies}.items() if value != trees.FROZEN]
    length = finetune.frozen_cuts(moving, model.cuts, config.model.drop_path)
    if not length:
        return None
    dtype = config.model.prefix_dtype or config.model.dtype
    return steps.Prefix(model.clone(dtype=jnp.dtype(dtype), remat=""), model.cuts[length - 1], bool(config.cache))


def _check_prefixes(config: ConfigDict, stretches: Sequence[ConfigDict], phases: Sequence[Phase]) -> None:
    """Raises one ValueError for options of the frozen front that come to nothing, or that would change numbers."""
    problems, fronts = [], [phase.prefix for phase in phases]
    about_it = {"cache": config.cache, "model.prefix_dtype": config.model.prefix_dtype}
    if any(about_it.values()) and not any(fronts):
        problems.append(
            f"{about_it} is about what is frozen in front, but in every phase the stem trains, or its statistics "
            "move; freeze from the front on (linear_probe, last_k), or leave it out"
        )
    if config.views > 1 and not config.data.augment:
        problems.append(f"views={config.views}, but data.augment is empty: all views would be the same; expected 1")
    for i, (stretch, front) in enumerate(zip(stretches, fronts, strict=True)):
        mixing = {name: stretch.method[name] for name in ("mixup", "cutmix") if stretch.method[name]}
        if config.cache and front and mixing:
            problems.append(f"phase {i} mixes images, {mixing}: cached features are of single images; leave it out")
        if config.cache and front and any(name == "delta" for name, _ in stretch.method.regularize):
            problems.append(
                f"phase {i} has the penalty delta, which runs a second network on the images; leave out cache"
            )
    if problems:
        raise ValueError("the frozen front of the network does not go with:\n  " + "\n  ".join(problems))


def _stoch_norm(pairs: Sequence, frozen_norms: Sequence[str], policies: Mapping[str, str]) -> float:
    """The probability of ("stoch_norm", {"p": 0.5}); 0 where it is not asked for."""
    args = {key: value for name, given in pairs if name == "stoch_norm" for key, value in {"p": 0.5, **given}.items()}
    if unknown := sorted(set(args) - {"p"}):
        raise ValueError(f"stoch_norm has no parameter {unknown}; it has p, the probability of the running statistics")
    if args and len(frozen_norms) == len(policies):
        raise ValueError(
            "stoch_norm draws between batch and running statistics, but no BatchNorm layer is in train mode "
            f"({len(policies)} in the network, all frozen); train their blocks, or set method.norm"
        )
    return args.get("p", 0.0)


def load_data(config: ConfigDict) -> dict[str, sources.Source]:
    """The sources that the config names: train, val, test and data.also; raises ValueError where they do not fit."""
    splits = {name: config.data[name] for name in ("train", "val", "test") if config.data[name]}
    resampled = bool(config.data.resample)
    if resampled and (config.data.test or config.data.shots):
        raise ValueError(
            f"data.resample={config.data.resample!r} cuts train and test out of data.train; expected data.test='' and "
            f"data.shots=0, found {config.data.test!r} and {config.data.shots}"
        )
    if "train" not in splits or len(splits) + resampled < 2 or (config.select == "best_val" and "val" not in splits):
        raise ValueError(
            f"data names the splits {splits}, with select={config.select!r}: expected train, and val or test to score "
            "on; best_val needs val"
        )
    load = {
        "seed": config.seed, "split_seed": config.data.split_seed, "on_error": config.data.on_error,
        "data_dir": config.data.data_dir or None,
    }  # fmt: skip
    data = {
        name: sources.load(config.data.source, split, shots=config.data.shots if name == "train" else 0, **load)
        for name, split in splits.items()
    }
    if resampled:
        data |= _resample(data["train"], config.data.resample, config.data.split_seed)
    if taken := sorted({name for name, *_ in config.data.also} & {"train", "val", "test"}):
        raise ValueError(f"data.also names {taken}; choose other names, these are the run's own splits")
    data |= {name: sources.load(source, split, **load) for name, source, split in config.data.also}
    classes = dict(enumerate(data["train"].class_names))
    if len(classes) < 2:
        raise ValueError(f"{data['train'].name} has the one class {classes[0]!r}; expected at least two to tell apart")
    own = {"val", "test"} | {name for name, source, _ in config.data.also if source == config.data.source}
    for name, source in data.items():
        if changed := messages.difference(classes, dict(enumerate(source.class_names))):
            raise ValueError(f"the classes of train and {name} differ (train -> {name}):\n" + "\n".join(changed))
        left_out_in_turn = name == "test" and config.data.resample == "loo"
        if name in own and not left_out_in_turn and (shared := {*data["train"].ids} & {*source.ids}):
            raise ValueError(
                f"{len(shared)} of {len(source)} examples of {name} ({source.name}) are also in train "
                f"({data['train'].name}), such as {min(shared)}; use splits that do not overlap"
            )
        if source.skipped:
            say(
                f"{source.name}: skipped {len(source.skipped)} unreadable images:\n  " + "\n  ".join(source.skipped[:5])
            )
    return data


def _resample(pool: sources.Source, design: str, split_seed: int) -> dict[str, sources.Source]:
    """Train and test of one fold of the pool; leave-one-out, which a closed form does at once, keeps all of it."""
    if design == "loo":
        return {"test": dataclasses.replace(pool, name=f"{pool.name}, leave-one-out")}
    train, held_out = resample.split(pool.labels, design, split_seed)
    return {
        "train": dataclasses.replace(pool.select(train), name=f"{pool.name}, {design}"),
        "test": dataclasses.replace(pool.select(held_out), name=f"{pool.name}, held out of {design}"),
    }


def make_batches(
    config: ConfigDict, data: dict[str, sources.Source], card: Card, parallel: sharding.Parallel
) -> tuple[pipeline.TrainBatches, dict[str, pipeline.EvalBatches]]:
    """Batches of train by step, and of the other sources in order."""
    hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = pipeline.train_batches(
        data["train"], card=card, augment=config.data.augment, batch_size=config.batch_size, seed=config.seed, **hosts
    )
    # One size for all, so that one program serves them; it pads val, which is scored often, the least.
    count = len(data.get("val", data.get("test")))
    size = parallel.round_up(-(-count // -(-count // config.eval_batch_size)))
    scored = {split: source for split, source in data.items() if split != "train"}
    workers = config.data.workers
    return batches, {
        split: pipeline.eval_batches(source, card=card, batch_size=size, num_workers=workers, **hosts)
        for split, source in scored.items()
    }
