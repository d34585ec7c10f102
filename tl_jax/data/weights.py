"""Weights of the training examples, from a file: importance weighting, or any other."""

import collections
import dataclasses
import logging
from pathlib import Path

import numpy as np

from tl_jax.core.checks import refuse
from tl_jax.data.examples import Source
from tl_jax.data.readers.arrays import read_file

log = logging.getLogger(__name__)


def with_weights(source: Source, path: str) -> Source:
    """The source with the weight of each example from an .npz file: `ids` text [N] and `weight` numbers >= 0 [N].

    The ids are those of the source (of several domains they begin with the name of the domain); the file may have
    further ones. Raises FileNotFoundError, or ValueError that lists ids without a weight, or with several.
    """
    file = Path(path).expanduser()
    arrays = read_file(file, "an .npz with ids and weight")
    ids, weight = arrays.get("ids", np.zeros(0)), arrays.get("weight", np.zeros(0))
    if ids.dtype.kind != "U" or weight.dtype.kind not in "fiu" or ids.ndim != 1 or weight.shape != ids.shape:
        found = ", ".join(f"{key} {array.dtype} {list(array.shape)}" for key, array in arrays.items()) or "nothing"
        raise ValueError(f"{file}: expected ids, text [N], and weight, numbers [N]; found {found}")
    names, values = ids.tolist(), weight.astype(np.float32)
    bad = [f"{names[i]}: {weight[i]}" for i in np.flatnonzero(~(np.isfinite(values) & (values >= 0)))]
    refuse(f"{file}: {len(bad)} weights are no finite numbers of at least 0", bad)
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    refuse(f"{file}: {len(twice)} ids occur more than once", twice)
    table = dict(zip(names, values.tolist(), strict=True))
    missing = [i for i in dict.fromkeys(source.ids) if i not in table]
    refuse(f"{file} has no weight of {len(missing)} of {len(source)} examples of {source.name}", missing)
    chosen = np.array([table[i] for i in source.ids], np.float32)
    if not chosen.any():
        raise ValueError(f"{file}: every example of {source.name} has the weight 0; expected about 1 on average")
    if not 0.9 < (mean := float(chosen.mean())) < 1.1:
        log.warning("%s: the mean weight of %s is %.3g, not 1: it scales the loss", file, source.name, mean)
    return dataclasses.replace(source, weights=chosen)
