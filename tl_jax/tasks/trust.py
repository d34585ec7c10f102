"""How far an answer can be trusted: calibrated probabilities, prediction sets, out-of-distribution flags, abstention.

`fit` reads labelled examples that the network was not trained on; `judge` adds what it found to the answers. Sets are
split conformal (Vovk et al. 2005): for a new example that is exchangeable with those of `fit`, the set holds the truth
with at least the stated coverage. They are made of the network's own probabilities, not of the calibrated ones, as the
temperature has seen the same labels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy  # loads its parts when they are used

from tl_jax.core import checks, files, npz
from tl_jax.tasks import outliers
from tl_jax.tasks.binary import threshold_of
from tl_jax.tasks.predictions import OUTPUT, Predictions
from tl_jax.tasks.task import Spec

FILE = "trust.npz"
SETS, REASONS = ("lac", "aps"), ("ood", "set")
ANSWERED = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)  # of the examples that are answered, in the risk-coverage curve
WARMEST = 100.0  # the highest temperature, and 1 / the lowest
ROUNDING = 1e-9  # of scores, so that an equal one computed elsewhere is equal
SHARE = checks.number(0, 1, above=True, below=True)


class Trust(NamedTuple):
    """What `fit` found. The arrays and numbers are those of `save`.

    quantile: float64 [1], the largest score of a class in the set; of a regression [T], half an interval, in the unit
    of the target. threshold: an example with a larger score is out of distribution. curve: float64 [R, 2], the share of
    examples that are answered, the most confident first, and their accuracy; no rows of a regression.
    """

    task: str
    class_names: tuple[str, ...]
    count: int  # of examples that it was fitted on
    coverage: float
    sets: str  # one of SETS
    abstain: tuple[str, ...]  # some of REASONS
    keep: float  # the share of the examples in distribution that the threshold keeps
    temperature: float
    quantile: np.ndarray
    threshold: float
    curve: np.ndarray
    reference: outliers.Reference
    network: str = ""  # the sha256 of the weights it belongs to; "": not known
    split: str = ""  # the name of the examples that it was fitted on; "": not known


class Verdict(NamedTuple):
    """What a Trust says of N examples.

    probabilities: float64 [N, K], calibrated; binary [N, 2]; None of a regression. member: bool [N, K], what the sets
    hold; of a regression float64 [N, T, 2], the intervals. alone: bool [N], whether the set is the answer and nothing
    else. score: float64 [N]. ood, abstain: bool [N].
    """

    probabilities: np.ndarray | None
    member: np.ndarray
    alone: np.ndarray
    score: np.ndarray
    ood: np.ndarray
    abstain: np.ndarray


def fit(
    val: Predictions,
    train: Predictions | None = None,
    *,
    coverage: float = 0.9,
    sets: str = "lac",
    ood: str = "mahalanobis",
    keep: float = 0.95,
    abstain: Sequence[str] = REASONS,
) -> Trust:
    """Fits temperature, sets, threshold and risk-coverage curve on val, and the score's reference on train.

    sets: "lac", the answer and all classes of at least some probability, which makes the smallest sets (Sadinle, Lei
    and Wasserman 2019); "aps", classes from the most probable on, randomised at the last, even where that is the answer
    (Romano, Sesia and Candes 2020): larger sets for harder examples, and a coverage that is exact also where the
    network is right more often. Of a multilabel task a set holds all labels that are present, with that
    coverage; a regression has intervals, for each target by itself. ood: see tasks/outliers.py. abstain: "ood", where
    the example is out of distribution; "set", where the set is not the answer alone. Raises one ValueError for all
    arguments that do not fit, for too few examples, and for features that are missing.
    """
    check(val.spec, len(val.values), coverage=coverage, sets=sets, ood=ood, keep=keep, abstain=abstain)
    if val.labels is None:
        raise ValueError("trust cannot be fitted: the labels are sealed, expected predictions with labels")
    reference = outliers.fit(ood, train)
    names, unknown = tuple(val.spec.class_names), np.zeros((0, 2))
    start = Trust(
        val.spec.name, names, 0, float(coverage), sets, tuple(abstain), float(keep), 1.0, unknown[:, 0], math.inf,
        unknown, reference,
    )  # fmt: skip
    return fit_on(start, val, outliers.score(reference, val.values, val.features))


def check(spec: Spec, count: int, *, coverage: float, sets: str, ood: str, keep: float, abstain: Sequence[str]) -> None:
    """Raises the ValueError of `fit` for arguments that do not fit, or not as many examples."""
    reasons = tuple(abstain)
    levels = {"coverage": coverage} | ({} if ood == "none" else {"keep": keep})
    least = max(least_for(level) if SHARE.fits(level) else 0 for level in levels.values())
    few = f"{count} examples, at least {least} are needed for {', '.join(f'{k}={x}' for k, x in levels.items())}"
    several, one, regression = (spec.name == name for name in ("classification", "binary", "regression"))
    problems = {
        **{f"{name}={level!r}: expected {SHARE.expected}": not SHARE.fits(level) for name, level in levels.items()},
        f"sets={sets!r}: expected one of {', '.join(SETS)}": sets not in SETS,
        f"sets='aps' is of classes; this task is {spec.name}": sets == "aps" and not (several or one),
        f"ood={ood!r}: expected one of {', '.join(outliers.SCORES)}": ood not in outliers.SCORES,
        f"ood='energy' is of the logits of classes; this task is {spec.name}": ood == "energy" and not several,
        f"abstain={abstain!r}: expected some of {', '.join(REASONS)}": not {*reasons} <= {*REASONS},
        f"abstain={abstain!r}: a regression has no sets; expected 'ood' too": regression and reasons == ("set",),
        f"{few}; give more, or ask for less": count < least,
    }
    checks.refuse("trust cannot be fitted", [text for text, wrong in problems.items() if wrong])


def fit_on(trust: Trust, val: Predictions, score: np.ndarray) -> Trust:
    """The same Trust with everything that val decides fitted on these predictions, whose scores [N] are known."""
    found = trust._replace(
        count=len(score),
        quantile=np.atleast_1d(_quantile(_nonconformity(trust, val), trust.coverage)),
        threshold=math.inf if trust.reference.name == "none" else float(_quantile(score, trust.keep)),
    )
    if trust.task == "regression":
        return found
    found = found._replace(temperature=fit_temperature(val))
    order = np.argsort(-_confidence(found, val.values, val.spec), kind="stable")
    right = correct(val)[order]
    curve = [(share, right[: math.ceil(share * len(right))].mean()) for share in ANSWERED]
    return found._replace(curve=np.array(curve))


def least_for(level: float) -> int:
    """The least number of examples whose quantile exists: ceil((n + 1) level) <= n."""
    return math.ceil(level / (1 - level) - ROUNDING)


def _quantile(values: np.ndarray, level: float) -> np.ndarray:
    """The ceil((n + 1) level)-th smallest of n values [n, ...] along the first axis."""
    rank = max(math.ceil((len(values) + 1) * level - ROUNDING), 1) - 1
    return np.partition(values, rank, axis=0)[rank]


def as_logits(values: np.ndarray, name: str) -> np.ndarray:
    """float64 [N, K]; of a binary task the logits of both classes, 0 and its one logit."""
    values = np.asarray(values, np.float64)
    return np.stack([np.zeros_like(values), values], axis=1) if name == "binary" else values


def probabilities(values: np.ndarray, name: str, temperature: float = 1.0) -> np.ndarray:
    """float64 [N, K] of classes, which sum to 1 (binary: of both), or of labels, each by itself."""
    logits = as_logits(values, name) / temperature
    return scipy.special.expit(logits) if name == "multilabel" else scipy.special.softmax(logits, axis=1)


def correct(predictions: Predictions) -> np.ndarray:
    """bool [N]: whether the answer is right; of a multilabel task, all of it."""
    answer = _answers(predictions.values, predictions.spec)
    return (answer == truth_of(predictions)).all(axis=1)


def _answers(values: np.ndarray, spec: Spec) -> np.ndarray:
    """bool [N, K]: the class or the labels that `answers` gives."""
    if spec.name == "multilabel":
        return values >= 0
    positive = spec.name == "binary" and probabilities(values, "binary")[:, 1] >= threshold_of(spec)
    chosen = positive.astype(int) if spec.name == "binary" else values.argmax(axis=1)
    return np.arange(len(spec.class_names)) == chosen[:, None]


def truth_of(predictions: Predictions) -> np.ndarray:
    """bool [N, K]: the classes or labels that an example has."""
    labels = predictions.labels
    return labels == 1 if labels.ndim > 1 else np.arange(len(predictions.spec.class_names)) == labels[:, None]


def fit_temperature(val: Predictions) -> float:
    """The temperature of the logits of the lowest nll on val (Guo et al. 2017), one for all classes or labels.

    The nll is convex in 1 / temperature, so that its derivative has one root. It has none within 1 / 100 .. 100
    where val holds no mistake, or the logits tell nothing of its labels; the temperature is 1 then.
    """
    logits, truth, name = as_logits(val.values, val.spec.name), truth_of(val), val.spec.name

    def slope(log_t: float) -> float:
        return float(((probabilities(val.values, name, math.exp(log_t)) - truth) * logits).sum(axis=1).mean())

    low, high = -math.log(WARMEST), math.log(WARMEST)
    if not (slope(high) < -ROUNDING and slope(low) > ROUNDING):
        return 1.0
    return math.exp(scipy.optimize.brentq(slope, low, high, xtol=1e-10))


def _class_scores(trust: Trust, values: np.ndarray) -> np.ndarray:
    """float64 [N, K]: how little each class conforms; a set holds those of at most the quantile."""
    p = probabilities(values, trust.task)
    if trust.sets == "lac":
        return 1 - p
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=1)
    found = np.empty_like(p)
    np.put_along_axis(found, order, np.cumsum(ranked, axis=1) - _uniform(values)[:, None] * ranked, axis=1)
    return found


def _uniform(values: np.ndarray) -> np.ndarray:
    """A number in [0, 1] of each row, a continuous function of its outputs: an example has the same set again.

    It is a triangle wave of their projection on a fixed direction. Outputs that differ by rounding, of 1e-6, move it by
    0.002; those of two examples differ by many waves.
    """
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    direction = np.random.default_rng(0).normal(size=values.shape[1])
    return np.abs(2 * np.modf(np.abs(1000 * values @ (direction / np.linalg.norm(direction))))[0] - 1)


def _nonconformity(trust: Trust, val: Predictions) -> np.ndarray:
    """The score of the truth [N]: of a multilabel task that of the label that conforms the least; residuals [N, T]."""
    if trust.task == "regression":
        return np.abs(val.values.astype(np.float64) - val.labels)
    return np.where(truth_of(val), _class_scores(trust, val.values), 0.0).max(axis=1)


def _confidence(trust: Trust, values: np.ndarray, spec: Spec) -> np.ndarray:
    """The calibrated probability [N] that the answer is right; of a multilabel task the product over its labels."""
    p, answer = probabilities(values, trust.task, trust.temperature), _answers(values, spec)
    return np.where(answer, p, 1 - p).prod(axis=1) if trust.task == "multilabel" else p[answer]


def consider(trust: Trust, values: np.ndarray, score: np.ndarray, spec: Spec) -> Verdict:
    """The verdict on outputs as in `Predictions.values`, whose out-of-distribution scores [N] are known."""
    ood = ~(score <= trust.threshold)
    if trust.task == "regression":
        ends = np.asarray(values, np.float64)[..., None] + trust.quantile[:, None] * np.array([-1.0, 1.0])
        p, member, alone = None, ends, np.ones(len(values), bool)
    else:
        p, answer = probabilities(values, trust.task, trust.temperature), _answers(values, spec)
        member = _class_scores(trust, values) <= trust.quantile + ROUNDING
        member |= answer & (trust.sets == "lac")
        alone = (member == answer).all(axis=1)
    abstain = (ood & ("ood" in trust.abstain)) | (~alone & ("set" in trust.abstain))
    return Verdict(p, member, alone, score, ood, abstain)


def judge(
    trust: Trust, outputs: Mapping[str, np.ndarray], features: np.ndarray | None, spec: Spec
) -> list[dict[str, Any]]:
    """What to add to each row of `answers.answers`, as plain JSON data; outputs and features as in `Predictions`.

    calibrated: the probability of the class (binary: of `positive`; multilabel: of each label) after the temperature.
    set: the classes or labels in it, the most probable first. interval: of a regression, [low, high] by target.
    ood_score and ood, unless the score is "none". abstain: whether to leave the example to somebody else. Raises
    ValueError for outputs of another task or other classes.
    """
    if (trust.task, trust.class_names) != (spec.name, tuple(spec.class_names)):
        found = f"{spec.name} of {', '.join(spec.class_names[:5])}"
        raise ValueError(f"trust was fitted for {trust.task} of {', '.join(trust.class_names[:5])}, found {found}")
    values, names = np.asarray(outputs[OUTPUT[spec.name]]), np.array(trust.class_names, object)
    found = consider(trust, values, outliers.score(trust.reference, values, features), spec)
    if trust.task == "regression":
        rows = [{"interval": dict(zip(names, row, strict=True))} for row in found.member.tolist()]
    else:
        p, answer = found.probabilities, _answers(values, spec)
        if trust.task == "multilabel":
            own = [dict(zip(names, row, strict=True)) for row in p.tolist()]
        else:
            own = (p[:, 1] if trust.task == "binary" else p[answer]).tolist()
        order = np.argsort(-p, axis=1, kind="stable")
        held = [each[mask[each]] for each, mask in zip(order, found.member, strict=True)]
        rows = [{"calibrated": x, "set": names[each].tolist()} for x, each in zip(own, held, strict=True)]
    if trust.reference.name != "none":
        flags = zip(rows, found.score.tolist(), found.ood.tolist(), strict=True)
        rows = [row | {"ood_score": x, "ood": flag} for row, x, flag in flags]
    return [row | {"abstain": flag} for row, flag in zip(rows, found.abstain.tolist(), strict=True)]


def save(path: Any, trust: Trust) -> None:
    """Writes one .npz file, atomically; the zip has a checksum of each array."""
    table = trust._asdict() | {f"ood_{name}": x for name, x in trust.reference._asdict().items()}
    del table["reference"]
    with files.atomic_write(path) as file:
        np.savez(file, **{name: np.asarray(x, str) if isinstance(x, str | tuple) else x for name, x in table.items()})


def load(path: Any) -> Trust:
    """Reads what `save` wrote; ValueError that names the file where it is damaged."""
    try:
        found = npz.read(path)
        plain = {name: x.item() for name, x in found.items() if x.ndim == 0}
        texts = {name: tuple(x.tolist()) for name, x in found.items() if name in ("class_names", "abstain")}
        found |= plain | texts
        reference = outliers.Reference(*(found.pop(f"ood_{name}") for name in outliers.Reference._fields))
        return Trust(**found, reference=reference)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: no sound {FILE} ({error}); calibrate again") from None
