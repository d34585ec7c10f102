"""Groups of examples that belong together, such as the images of one patient: no slice and no fold cuts one."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from tl_jax.core.checks import refuse
from tl_jax.data.examples import Source, uncorrupted


def with_groups(source: Source, groups: Sequence[str]) -> Source:
    """The source with the group of each example; ValueError where some have none, or no two have the same."""
    missing = [i for i, group in zip(source.ids, groups, strict=True) if not group]
    refuse(f"data.group: {len(missing)} of {len(source)} examples of {source.name} have no group", missing)
    if len(set(groups)) == len(groups) > 1:
        found = f"each of the {len(groups)} examples of {source.name} has a group of its own, such as {groups[0]!r}"
        raise ValueError(f"data.group: {found}; expected groups of several, or no data.group")
    return dataclasses.replace(source, groups=np.array(groups, str))


def by_pattern(source: Source, pattern: str) -> Source:
    """The source with groups told by its ids: what the one (...) of a regular expression finds, or all that it finds.

    Raises ValueError where it is none, or finds nothing in some ids.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"data.group={pattern!r} is no regular expression ({error})") from None
    if compiled.groups > 1:
        raise ValueError(f"data.group={pattern!r} has {compiled.groups} (...); expected one, and (?:...) for others")
    found = [compiled.search(i) for i in source.ids]
    missing = [i for i, match in zip(source.ids, found, strict=True) if match is None]
    refuse(f"data.group={pattern!r} is not found in {len(missing)} of {len(source)} ids of {source.name}", missing)
    return with_groups(source, [match[compiled.groups] or "" for match in found])


def numbered(groups: np.ndarray | None, count: int) -> np.ndarray:
    """The number of each example's group [N]; without groups each example is one."""
    return np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]


def per_class(labels: np.ndarray, groups: np.ndarray | None, classes: int = 0) -> np.ndarray:
    """How many examples, or groups with examples, each class has: [classes], or up to the highest. labels int [N]."""
    pairs = np.unique(np.stack([labels, numbered(groups, len(labels))]), axis=1)
    return np.bincount(pairs[0], minlength=classes)


def majority(classes: np.ndarray, member: np.ndarray) -> np.ndarray:
    """The most frequent class of each group, the lowest of equals. classes int [N]; member int [N], from 0."""
    table = np.zeros((member.max() + 1, classes.max() + 1), np.int64)
    np.add.at(table, (member, classes), 1)
    return table.argmax(axis=1)


def shared(a: Source, b: Source) -> list[str]:
    """The groups that have examples in both sources, by name, in whatever file; each domain has its own."""
    if a.groups is None or b.groups is None:
        return []
    return sorted(set(named(a, b.domains is not None)) & set(named(b, a.domains is not None)))


def named(source: Source, domains: bool) -> list[str]:
    """The groups; domains: after the name of their source, as those of several domains are already."""
    names = source.groups.tolist()
    if source.domains is not None or not domains:
        return names
    return [f"{uncorrupted(''.join(source.domain_names))}: {name}" for name in names]
