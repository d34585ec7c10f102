"""What a config stands for: data, network, rules and optimizer, checked against each other before the first step."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tl_jax import audit, optim, options, pretrained, sharding, trees
from tl_jax.card import Card
from tl_jax.data import pipeline, sources
from tl_jax.logging import say
from tl_jax.methods import Method, finetune


class Run(NamedTuple):
    """Everything that one run is made of.

    data: the sources of train, and of val or test or both. batches: of train, by step. eval_batches: of val and test.
    variables: as loaded. labels: the group of each parameter path. audit: from audit.make_audit. identity: what must be
    the same for a checkpoint to be of this run, as flat tables of plain JSON data.
    """

    data: dict[str, sources.Source]
    batches: pipeline.TrainBatches
    eval_batches: dict[str, pipeline.EvalBatches]
    model: Any
    variables: Any
    card: Card
    labels: dict[str, str]
    method: Method
    schedule: Any
    tx: Any
    total_steps: int
    audit: dict[str, Any]
    identity: dict[str, Any]


def build(config: ConfigDict, parallel: sharding.Parallel) -> Run:
    """Loads and wires everything that a config names; raises ValueError for what does not fit together."""
    options.check(config)
    sharding.check_batch_size(config.batch_size, config.accumulate, parallel.mesh.size)
    data = load_data(config)
    class_names = data["train"].class_names
    loaded = pretrained.load_with_origins(
        config.model.name, config.model.weights, len(class_names),
        image_size=config.model.image_size or None, head_init=config.model.head_init, seed=config.seed,
    )  # fmt: skip
    card = loaded.card.override(config.data.card.to_dict(), allowed=config.data.override_card)
    card = card.replace(class_names=class_names, source=f"{card.source or 'random weights'} -> {data['train'].name}")
    batches, eval_batches = make_batches(config, data, card, parallel)

    paths = list(trees.flatten(loaded.variables["params"]))
    rules = finetune.make_rules(config.method.name, paths, config.method.last_k, config.method.rules)
    mixing = {name: config.method[name] for name in ("label_smoothing", "mixup", "cutmix")}
    method = finetune.make_method(rules, num_classes=len(class_names), **mixing)
    matches = trees.match_rules(paths, method.rules)
    labels = {path: match.value for path, match in matches.items()}
    policies = audit.norm_policies(loaded.variables.get("batch_stats", {}), labels, config.method.norm)
    model = loaded.model.clone(
        dtype=jnp.dtype(config.model.dtype),
        dropout=config.model.dropout,
        drop_path=config.model.drop_path,
        remat=config.model.remat,
        frozen_norms=tuple(path for path, policy in policies.items() if policy == trees.FROZEN),
        axis_name=parallel.axis_name,
    )

    in_steps = {"batch_size": config.batch_size, "train_size": len(data["train"])}
    total_steps, warmup_steps = (optim.to_steps(d, **in_steps) for d in (config.total, config.schedule.warmup))
    schedule = optim.make_schedule(
        config.schedule.name, config.lr, total_steps=total_steps, warmup_steps=warmup_steps, args=config.schedule.args
    )
    default = optim.Group(
        config.optimizer, tuple(config.optimizer_args.items()), weight_decay=config.weight_decay, decay=config.decay
    )
    groups = optim.make_groups(labels, default, config.groups.to_dict())
    tx = optim.make_optimizer(labels, groups, schedule, config.clip)
    opt_state = jax.eval_shape(tx.init, trees.split(loaded.variables["params"], labels)[0])
    facts = {split: {"name": s.name, "examples": len(s), "fingerprint": s.fingerprint} for split, s in data.items()}
    report = audit.make_audit(loaded.variables, loaded.origins, matches, groups, policies, opt_state, card, facts)
    report["weights"] = {"file": config.model.weights, "sha256": loaded.sha256}
    tables = {
        "options": options.identity(config),
        "labels": audit.labels_table(report),
        "class_names": dict(enumerate(class_names)),
        "card": report["card"],
        "data": {split: fact["fingerprint"] for split, fact in facts.items()},
        "weights": report["weights"],
    }
    return Run(
        data, batches, eval_batches, model, loaded.variables, card, labels, method, schedule, tx, total_steps, report,
        identity=json.loads(json.dumps(tables)),
    )  # fmt: skip


def load_data(config: ConfigDict) -> dict[str, sources.Source]:
    """The sources that the config names, of train, val and test; raises ValueError where they do not fit together."""
    splits = {name: config.data[name] for name in ("train", "val", "test") if config.data[name]}
    if "train" not in splits or len(splits) < 2 or (config.select == "best_val" and "val" not in splits):
        raise ValueError(
            f"data names the splits {splits}, with select={config.select!r}: expected train, and val or test to score "
            "on; best_val needs val"
        )
    data = {
        name: sources.load(
            config.data.source, split, shots=config.data.shots if name == "train" else 0, seed=config.seed,
            split_seed=config.data.split_seed, on_error=config.data.on_error, data_dir=config.data.data_dir or None,
        )
        for name, split in splits.items()
    }  # fmt: skip
    classes = dict(enumerate(data["train"].class_names))
    if len(classes) < 2:
        raise ValueError(f"{data['train'].name} has the one class {classes[0]!r}; expected at least two to tell apart")
    for name, source in data.items():
        if changed := trees.difference(classes, dict(enumerate(source.class_names))):
            raise ValueError(f"the classes of train and {name} differ (train -> {name}):\n" + "\n".join(changed))
        if name != "train" and (shared := {*data["train"].ids} & {*source.ids}):
            raise ValueError(
                f"{len(shared)} of {len(source)} examples of {name} ({splits[name]!r}) are also in train "
                f"({splits['train']!r}), such as {min(shared)}; use splits that do not overlap"
            )
        if source.skipped:
            say(
                f"{source.name}: skipped {len(source.skipped)} unreadable images:\n  " + "\n  ".join(source.skipped[:5])
            )
    return data


def make_batches(
    config: ConfigDict, data: dict[str, sources.Source], card: Card, parallel: sharding.Parallel
) -> tuple[pipeline.TrainBatches, dict[str, pipeline.EvalBatches]]:
    """Batches of train by step, and of val and test in order."""
    hosts = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = pipeline.train_batches(
        data["train"], card=card, augment=config.data.augment, batch_size=config.batch_size, seed=config.seed, **hosts
    )
    # One size for val and test, so that one program serves both; it pads val, which is scored often, the least.
    count = len(data.get("val", data.get("test")))
    size = parallel.round_up(-(-count // -(-count // config.eval_batch_size)))
    scored = {split: source for split, source in data.items() if split != "train"}
    workers = config.data.workers
    return batches, {
        split: pipeline.eval_batches(source, card=card, batch_size=size, num_workers=workers, **hosts)
        for split, source in scored.items()
    }
