"""Evaluation batches of inputs that are mixed in pairs, for selectors that ask how stable answers are."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tl_jax.data.examples import Source
from tl_jax.data.pipeline import Batch, EvalBatches, eval_batches


class MixedBatches(NamedTuple):
    """Those of `first`, every input x in place of share x + (1 - share) x', x' that of `second` in the same place."""

    first: EvalBatches
    second: EvalBatches
    field: str
    share: float

    @property
    def source(self) -> Source:
        return self.first.source

    def mix(self, a: Batch, b: Batch) -> Batch:
        x, other = (batch[self.field] for batch in (a, b))
        mixed = self.share * x.astype(np.float32) + (1 - self.share) * other.astype(np.float32)
        return {**a, self.field: (np.rint(mixed) if x.dtype == np.uint8 else mixed).astype(x.dtype)}

    def __getitem__(self, step: int) -> Batch:
        return self.mix(self.first[step], self.second[step])

    def __iter__(self) -> Iterator[Batch]:
        return map(self.mix, self.first, self.second)


def mixed_batches(source: Source, views: dict, batch_size: int, share: float, **options) -> MixedBatches:
    """Mixes each example with its successor in one random order of all, the same in every run; never with itself.

    Of a single example it is the example. Raises as `eval_batches`.
    """
    order, partner = np.random.default_rng(0).permutation(len(source)), np.empty(len(source), np.int64)
    partner[order] = np.roll(order, -1)
    made = [eval_batches(each, views, batch_size, **options) for each in (source, source.select(partner))]
    return MixedBatches(*made, next(iter(views)), share)
