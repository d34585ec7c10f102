"""A step of one network from its parts, without a config: shared by the tests of steps."""

import optax

from tl_jax import tasks
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.methods import mixing, schedules
from tl_jax.methods import rules as finetune
from tl_jax.methods.term import MAIN, MODEL, TASK, Method, make_task_term
from tl_jax.training import audit, optim, steps


def make_card(classes, mean=(0.5,) * 3, std=(0.25,) * 3):
    return Card("test", classes, 16, mean, std)


def make_reader(model, classes):
    """The model as a step runs it, on the field "image"."""
    return steps.Reader(model, make_card(classes), "image")


def make_plan(
    model, variables, parallel, classes, method="full", last_k=0, rules=(), terms=None, smoothing=0.0, mixup=0.0,
    cutmix=0.0, **fields,
):  # fmt: skip
    """The plan of a classification with a named method; terms: in place of the task's own, {name: term}."""
    paths = list(trees.flatten(variables["params"]))
    found = trees.match_rules(paths, finetune.make_rules(method, paths, model.cuts, last_k, (), rules))
    labels = {path: match.value for path, match in found.items()}
    policies = audit.norm_policies(variables.get("batch_stats", {}), labels, ())
    frozen = tuple(path for path, policy in policies.items() if policy == trees.FROZEN)
    model = model.clone(frozen_norms=frozen, axis_name=parallel.axis_name)
    weighed = {name: (schedules.make(1.0), term) for name, term in (terms or {TASK: make_task_term()}).items()}
    task = tasks.make(tasks.Spec(class_names=tuple(map(str, range(classes)))), label_smoothing=smoothing)
    return steps.Plan(
        {MODEL: make_reader(model, classes)}, Method(weighed, mixing.make_mix(mixup, cutmix)), task, labels, frozen,
        devices=parallel.mesh.size, axis_name=parallel.axis_name, whole=parallel.whole,
        sums=(*steps.SUMS, "accuracy"), **fields,
    )  # fmt: skip


def make_tx(plan, group, rate=0.05, clip=1.0):
    """The optimizer of all that the plan trains, at a constant learning rate."""
    groups = optim.make_groups(plan.labels, group, {})
    return optim.make_optimizer(plan.labels, groups, optax.constant_schedule(rate), clip)


def as_batch(image, label):
    return {MAIN: {"image": image, "label": label}}
