"""Classic transfer on features: one call behind all methods, for features of a frozen network or from files."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tl_jax.core import checks
from tl_jax.core.messages import brief, nearest
from tl_jax.methods.classic import features, instances
from tl_jax.methods.classic.classifiers import CLASSIFIERS, WEIGHTED, Predict
from tl_jax.methods.classic.features import SCALINGS, Data, Found

METHODS: dict[str, Callable[..., Found]] = {**features.METHODS, **instances.METHODS}
WEIGHTING = ("kmm", "kliep", "density_ratio")  # from the features of both domains alone


class Adapted(NamedTuple):
    """A source made alike to a target, and the classifier of the two.

    source [N_s, d], target [N_t, d]: features after the method. weights: of the source [N_s], mean 1; None: all equal.
    predict: rows of the target's domain [N, D], scaled like those given, -> labels [N]. facts: of the fit, JSON-able.
    """

    source: np.ndarray
    target: np.ndarray
    weights: np.ndarray | None
    predict: Predict
    facts: dict[str, Any]


def adapt(
    name: str,
    source: np.ndarray,
    labels: np.ndarray,
    target: np.ndarray,
    *,
    classifier: str = "1nn",
    shots: tuple[np.ndarray, np.ndarray] | None = None,
    **arguments: Any,
) -> Adapted:
    """Adapts labelled source features [N_s, D] to unlabelled target features [N_t, D] by one of METHODS.

    labels: integers [N_s]. classifier: one of CLASSIFIERS; methods that weight need one of WEIGHTED. shots: a few
    labelled target examples, features [M, D] and labels [M], for tradaboost alone; no other method can see a label of
    the target. arguments: those of the method, see its docstring. All is computed in float64. Raises one ValueError
    that lists all that is wrong.
    """
    source, target, labels = np.asarray(source), np.asarray(target), np.asarray(labels)
    problems = call_problems(name, classifier, arguments)
    problems += [*_array_problems("source", source, labels, source), *_array_problems("target", target, None, source)]
    if (shots is not None) != (name == "tradaboost"):
        expected = "needs shots = (features [M, D], labels [M]) of the target" if shots is None else "takes no shots"
        problems.append(f"{name} {expected}; tradaboost alone reads labels of the target")
    elif shots is not None:
        shots = tuple(np.asarray(each) for each in shots)
        problems += _array_problems("shots", *shots, source) if len(shots) == 2 else ["shots is no pair of arrays"]
    checks.refuse(f"{name} cannot adapt", problems)
    source, target = source.astype(np.float64), target.astype(np.float64)
    shots = None if shots is None else (shots[0].astype(np.float64), shots[1])
    fit = CLASSIFIERS[classifier]
    found = METHODS[name](Data(source, labels, target, fit, shots), **arguments)
    ours = source if found.source is None else found.source
    move = found.transform or (lambda rows: rows)
    own = found.predict or fit(ours, labels, found.weights)

    def predict(rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows, np.float64)
        if rows.ndim != 2 or rows.shape[1] != source.shape[1]:
            raise ValueError(f"expected rows [N, {source.shape[1]}] of the target's domain, found {list(rows.shape)}")
        return own(move(rows))

    return Adapted(ours, move(target), found.weights, predict, found.facts)


def call_problems(name: str, classifier: str, arguments: dict[str, Any]) -> list[str]:
    """What is wrong with a method, its classifier and its arguments."""
    problems = checks.call_problems("classic method", name, arguments, METHODS)
    if classifier not in CLASSIFIERS:
        known = ", ".join(CLASSIFIERS)
        problems.append(f"no classifier {brief(classifier)}{nearest(str(classifier), CLASSIFIERS)}; known: {known}")
    elif name in instances.METHODS and classifier not in WEIGHTED:
        problems.append(f"{name} weights examples, which {classifier} cannot use; take {' or '.join(WEIGHTED)}")
    return problems


def scale(x: np.ndarray, steps: tuple[str, ...]) -> np.ndarray:
    """The rows of one domain [N, D] after SCALINGS in turn, float64; row_sum, then zscore is the SURF protocol."""
    unknown = [f"no scaling {brief(s)}{nearest(str(s), SCALINGS)}" for s in steps if s not in SCALINGS]
    checks.refuse(f"features cannot be scaled; known: {', '.join(SCALINGS)}", unknown)
    x = np.asarray(x, np.float64)
    for step in steps:
        x = SCALINGS[step](x)
    return x


def _array_problems(what: str, x: np.ndarray, labels: np.ndarray | None, source: np.ndarray) -> list[str]:
    if x.ndim != 2 or 0 in x.shape or x.dtype.kind not in "fiu":
        return [f"{what} is {x.dtype} {list(x.shape)}, expected numbers [N >= 1, D >= 1]"]
    problems = []
    if bad := int((~np.isfinite(x)).any(axis=1).sum()):
        problems.append(f"{bad} of {len(x)} rows of {what} are not finite")
    if source.ndim == 2 and x.shape[1] != source.shape[1]:
        problems.append(f"{what} has {x.shape[1]} columns, source {source.shape[1]}; expected the same features")
    if labels is not None and (labels.shape != (len(x),) or labels.dtype.kind not in "iu"):
        problems.append(f"labels of {what} are {labels.dtype} {list(labels.shape)}, expected integers [{len(x)}]")
    return problems
