"""The order of training: which example a counter stands for, as a pure function of (seed, counter)."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tl_jax.core.checks import refuse
from tl_jax.data.examples import Source

ORDERS = ("shuffled", "class_balanced", "sequential", "by_length")
TOGETHER = 50  # batches that are sorted by length together
Arrange = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
RECENT = 4  # permutations that each shuffle keeps: batches made ahead cross from one epoch into the next


def derive(seed: int, name: str) -> int:
    """A seed of its own for each (seed, name), from 0 to 2**63 - 1, by sha256."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1


class Shuffle:
    """The numbers 0 .. n - 1 epoch after epoch, in a new order in each epoch; without a seed always in their own.

    together: how many epochs are sampled at once, where n is so small that each by itself would take too long.
    arrange: (numbers of an epoch in their order, the epoch, generator) -> the order in its place.
    """

    def __init__(self, n: int, seed: int | None, together: int = 1, arrange: Arrange | None = None):
        self.n, self.together = n, together

        def numbers(block: int) -> np.ndarray:
            if seed is None:
                return np.tile(np.arange(n), together)
            rng = np.random.default_rng([seed, block])
            if together == 1:
                numbers = rng.permutation(n)
                return arrange(numbers, block, rng) if arrange else numbers
            return rng.permuted(np.tile(np.arange(n), (together, 1)), axis=1).reshape(-1)

        self._numbers = functools.lru_cache(RECENT)(numbers)

    def __call__(self, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number, epoch) of each counter."""
        blocks, places = np.divmod(counters, self.n * self.together)
        numbers = np.empty(len(counters), np.int64)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            numbers[here] = self._numbers(block)[places[here]]
        return numbers, counters // self.n


class Order(NamedTuple):
    """Every round of as many counters as there are groups visits each group once, in an order shuffled anew.

    groups: indices of the examples of each. rounds: the order of the groups. within: of the members of each group,
    shuffled epoch by epoch. One group of all examples is the plain shuffled order.
    """

    groups: tuple[np.ndarray, ...]
    rounds: Shuffle
    within: tuple[Shuffle, ...]

    def __call__(self, counters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(index, epoch) of each counter: the example, and how often it came before."""
        chosen, visits = self.rounds(counters)
        indices, epochs = np.empty_like(visits), np.empty_like(visits)
        for group in np.unique(chosen).tolist():
            here = chosen == group
            numbers, epochs[here] = self.within[group](visits[here])
            indices[here] = self.groups[group][numbers]
        return indices, epochs


def by_length(sizes: np.ndarray, batch: int) -> Arrange:
    """Batches of examples of similar size: of TOGETHER batches at a time, sorted by size, which then change places."""

    def arrange(numbers: np.ndarray, epoch: int, rng: np.random.Generator) -> np.ndarray:
        first = -epoch * len(numbers) % batch  # examples that end the last batch of the epoch before
        parts = [numbers[:first]]
        for start in range(first, len(numbers), TOGETHER * batch):
            chunk = numbers[start : start + TOGETHER * batch]
            chunk = chunk[np.argsort(sizes[chunk], kind="stable")]
            whole = len(chunk) // batch
            parts += [chunk[i * batch : (i + 1) * batch] for i in rng.permutation(whole)]
            parts.append(chunk[whole * batch :])
        return np.concatenate(parts)

    return arrange


def _make_order(groups: Sequence[np.ndarray], seed: int, shuffled: bool, arrange: Arrange | None) -> Order:
    seeds = [seed] if len(groups) == 1 else [derive(seed, f"group {number}") for number in range(len(groups))]
    seeds = seeds if shuffled else [None] * len(groups)
    within = tuple(Shuffle(len(group), own, arrange=arrange) for group, own in zip(groups, seeds, strict=True))
    rounds = Shuffle(len(groups), derive(seed, "rounds"), together=max(1, 4096 // len(groups)))
    return Order(tuple(groups), rounds, within)


def seeds_of(source: Source, seed: int) -> tuple[int, ...]:
    """The seed of each domain of a source; of one without domains the seed itself."""
    return (seed,) if source.domains is None else tuple(derive(seed, f"domain {d}") for d in range(source.num_domains))


def make_orders(source: Source, order: str, seed: int, batch: int = 1) -> tuple[Order, ...]:
    """The order of each domain of a source, for batches with `batch` examples of each.

    Raises ValueError that lists domains and classes without examples.
    """
    domains = np.zeros(len(source), int) if source.domains is None else source.domains
    made, problems = [], []
    for d, own in enumerate(seeds_of(source, seed)):
        groups = [members := np.flatnonzero(domains == d)]
        if order == "class_balanced":
            groups = [members[source.labels[members] == c] for c in range(len(source.class_names))]
        if all(map(len, groups)):
            arrange = by_length(source.sizes[members], batch) if order == "by_length" else None
            made.append(_make_order(groups, own, order != "sequential", arrange))
            continue
        where = f"{source.domain_names[d]}: " if source.domains is not None else ""
        empty = [name for name, group in zip(source.class_names, groups, strict=False) if not len(group)]
        problems.append(f"{where}no examples" + (f" of {', '.join(empty)}" if len(members) else ""))
    refuse(f"the order {order!r} of {source.name} visits every class and domain", problems)
    return tuple(made)
