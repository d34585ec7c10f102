"""How far apart domains are in the features of a network, and what a discriminator's accuracy means."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

MOST = 2000  # examples of each domain
ALIGNED, APART, OVERFIT = 0.6, 0.9, 0.15  # accuracies of a discriminator; the gap between its train and held-out ones


class Separation(NamedTuple):
    """Of a linear classifier of the domains. confusion: shares [D, D], rows are true domains, columns predicted ones.

    proxy_a_distance: {domain: 2 (1 - 2 e)} for the error e of telling it from the last domain, the target.
    """

    domains: tuple[str, ...]
    confusion: np.ndarray
    proxy_a_distance: dict[str, float]


def separation(features: Mapping[str, np.ndarray], seed: int = 0) -> Separation:
    """Fits on one half of each domain, and measures on the other (Ben-David et al. 2007, section 4).

    features: {domain: [N, D]}, the target last; at most MOST of each take part, and as many of every domain. The
    distance is 0 where the domains cannot be told apart, 2 where they always can. ValueError for fewer than 4 examples.
    """
    count = min(MOST, *map(len, features.values())) // 2
    if count < 2:
        sizes = {name: len(x) for name, x in features.items()}
        raise ValueError(f"the domains have {sizes} examples; expected 4 or more of each, for two halves")
    rng, halves = np.random.default_rng(seed), []
    for x in features.values():
        chosen = np.asarray(x, np.float64)[rng.permutation(len(x))[: 2 * count]]
        halves.append((chosen[:count], chosen[count:]))
    *sources, _ = names = tuple(features)
    confusion = _confusion(halves)
    pairs = {name: _confusion([halves[i], halves[-1]]) for i, name in enumerate(sources)}
    distances = {name: 2 * (1 - 2 * (1 - np.trace(pair) / 2)) for name, pair in pairs.items()}
    return Separation(names, confusion, {name: max(0.0, float(d)) for name, d in distances.items()})


def _confusion(halves: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Shares [D, D] of a logistic regression (C = 1) on standardised features."""
    import threadpoolctl  # scikit-learn brings it
    from sklearn.linear_model import LogisticRegression  # slow to import

    (seen, y), (unseen, true) = (
        (np.concatenate(side), np.repeat(np.arange(len(side)), len(side[0]))) for side in zip(*halves, strict=True)
    )
    mean, std = seen.mean(axis=0), seen.std(axis=0)
    std[std == 0] = 1.0
    with threadpoolctl.threadpool_limits(1):  # the same sums on any number of cores, and no wait for each other
        model = LogisticRegression(max_iter=2000).fit((seen - mean) / std, y)
    table = np.zeros((len(halves),) * 2)
    np.add.at(table, (true, model.predict((unseen - mean) / std)), 1)
    return table / table.sum(axis=1, keepdims=True)


def diagnosis(name: str, train: float, held_out: float, distance: float) -> str:
    """One sentence on a discriminator: its accuracy on training and on held-out examples, and the proxy A-distance."""
    numbers = f"{name}: accuracy {train:.2f} in training and {held_out:.2f} held out, proxy A-distance {distance:.2f}; "
    if train - held_out > OVERFIT:
        said = "the discriminator knows its training examples, not the domains: give it less width, or more target data"
    elif held_out >= APART:
        said = (
            "it tells the domains apart, so that the features are not aligned: raise the strength of the reversal or "
            "the weight of the term, or lower its learning rate. The target may have gained all the same"
        )
    elif distance > 1:
        said = (
            "a linear classifier still tells domains apart that it cannot: the features are aligned as far as it sees; "
            "raise its learning rate or width, or lower the strength. The target may have gained all the same"
        )
    elif max(held_out, (2 + distance) / 4) > ALIGNED:  # its own accuracy, and that of the linear classifier
        said = "the features are aligned in part"
    else:
        said = "the features are aligned as wholes; whether class by class, only target labels can tell"
    return numbers + said
