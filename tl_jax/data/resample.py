"""Evaluation designs beyond one held-out split: k-fold, repeated k-fold, bootstrap, leave-one-out."""

import re

import numpy as np

from tl_jax.core.messages import shorten
from tl_jax.data.groups import numbered, per_class

DESIGNS = "holdout, kfold:K, kfold:KxR, bootstrap:N, loo"
FOLDS = "kfold:K:FOLD, bootstrap:NUMBER"
REDRAWS = 1000

Split = tuple[np.ndarray, np.ndarray]


def folds(design: str) -> list[tuple[str, int]]:
    """The runs of a design as (resample, repeat); repeat r is split with `split_seed + r`.

    "holdout" -> ("", 0), no resampling. "kfold:5" -> ("kfold:5:0", 0) ... ("kfold:5:4", 0); "kfold:5x2" repeats these
    as repeat 1. "bootstrap:3" -> ("bootstrap:0", 0) ... ("bootstrap:2", 0). "loo" -> ("loo", 0).
    """
    if design in ("", "holdout", "loo"):
        return [("loo" if design == "loo" else "", 0)]
    if match := re.fullmatch(r"kfold:(\d{1,4})(?:x(\d{1,3}))?", design):
        count, repeats = int(match[1]), int(match[2] or 1)
        if count >= 2 and repeats >= 1:
            return [(f"kfold:{count}:{fold}", repeat) for repeat in range(repeats) for fold in range(count)]
    if (match := re.fullmatch(r"bootstrap:(\d{1,6})", design)) and int(match[1]) >= 1:
        return [(f"bootstrap:{number}", 0) for number in range(int(match[1]))]
    raise ValueError(f"unknown design {design!r}; known: {DESIGNS}, with K of at least 2 and R and N of at least 1")


def split(labels: np.ndarray, resample: str, split_seed: int, groups: np.ndarray | None = None) -> Split:
    """(train indices, held-out indices) of one fold of a pool with these labels [N, ...], both ascending.

    "kfold:5:0": fold 0 of 5, stratified and shuffled by split_seed. "bootstrap:3": train is sample number 3 of N
    examples with replacement; held out is what it lacks (out of bag). A sample that misses a class, or lacks nothing,
    is taken again, deterministically. Multi-label labels and targets are not stratified. With groups [N] what is cut or
    drawn are the groups, whole.
    """
    labels = np.asarray(labels)
    if labels.ndim > 1 or labels.dtype.kind == "f":
        labels = np.zeros(len(labels), np.int32)  # as one class of all examples
    if match := re.fullmatch(r"kfold:(\d+):(\d+)", resample):
        return _kfold(labels, int(match[1]), int(match[2]), split_seed, groups)
    if match := re.fullmatch(r"bootstrap:(\d+)", resample):
        return _bootstrap(labels, int(match[1]), split_seed, groups)
    hint = "; loo has no single fold, probes predict each example by all others" if resample == "loo" else ""
    raise ValueError(f"unknown fold {resample!r}; known: {FOLDS}{hint}")


def leave_one_out(labels: np.ndarray, groups: np.ndarray | None = None) -> list[Split]:
    """(train indices, held-out indices) of every example, or group, of a pool with these classes [N]."""
    _check_members(labels, 2, "leave-one-out", groups)
    member = numbered(groups, len(labels))
    order, ends = np.argsort(member, kind="stable"), np.bincount(member).cumsum()[:-1]
    return [(np.delete(np.arange(len(labels)), held), held) for held in np.split(order, ends)]


def _kfold(labels: np.ndarray, count: int, fold: int, split_seed: int, groups: np.ndarray | None) -> Split:
    from sklearn import model_selection  # here: it takes a second that others need not pay

    if count < 2 or fold >= count:
        raise ValueError(f"kfold:{count}:{fold}: expected at least 2 folds, and a fold from 0 to {count - 1}")
    _check_members(labels, count, f"{count} folds", groups)
    kind = model_selection.StratifiedKFold if groups is None else model_selection.StratifiedGroupKFold
    splitter = kind(count, shuffle=True, random_state=split_seed)
    train, held_out = list(splitter.split(np.zeros(len(labels)), labels, groups))[fold]
    if (missing := np.setdiff1d(labels, labels[train])).size or not held_out.size:  # groups may be large
        found = f"train without the classes {missing.tolist()}" if missing.size else "nothing held out"
        raise ValueError(f"kfold:{count}:{fold} of whole groups has {found}; use fewer folds or another split_seed")
    return train, held_out


def _bootstrap(labels: np.ndarray, number: int, split_seed: int, groups: np.ndarray | None) -> Split:
    _check_members(labels, 2, "a bootstrap", groups)
    classes, member = np.unique(labels), numbered(groups, len(labels))
    order, sizes = np.argsort(member, kind="stable"), np.bincount(member)
    members = np.split(order, sizes.cumsum()[:-1])
    for attempt in range(REDRAWS):
        rng = np.random.default_rng([split_seed, 0x626F6F74, number, attempt])  # a stream of its own
        train = np.sort(np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))]))
        held_out = np.setdiff1d(np.arange(len(labels)), train)
        if len(held_out) and len(np.unique(labels[train])) == len(classes):
            return train, held_out
    found = f"none of {REDRAWS} draws of {len(labels)} examples held all {len(classes)} classes"
    raise ValueError(f"bootstrap:{number}: {found}; the classes are too small, use kfold")


def _check_members(labels: np.ndarray, least: int, what: str, groups: np.ndarray | None) -> None:
    if small := [f"class {c} has {n}" for c, n in enumerate(per_class(labels, groups)) if 0 < n < least]:
        found, fix = ", ".join(shorten(small, 10)), "use fewer folds, or merge or drop the classes"
        of = "examples" if groups is None else "groups with examples"
        raise ValueError(f"{what} need at least {least} {of} of every class: {found}; {fix}")
