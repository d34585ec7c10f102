"""What a study is: a question, factors with levels, and the grid of runs that answers it."""

import importlib.util
import inspect
import itertools
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import messages
from tl_jax.data import resample

SHARED = ("seed", "seeds", "baseline", "replicas", "data.resample")  # the study's own: no level may set them
TOGETHER = ("heads", "cached", "all", "none")
KEY = 12  # hex digits of the hash of its options, which name a run
SHOWN = 20  # offenders in one message


class Study(NamedTuple):
    """A grid of runs: the product of all factors, with every seed, in every fold of the design.

    base: a full config. factors: `{factor: {level: {dotted option: value}}}`; a value replaces the option whole.
    baseline: `{factor: level}`, what the other levels of that factor are compared with, the other factors being equal.
    metrics: the first decides; "NAME/METRIC" is that of a set of data.extra_eval; (): what the base's task monitors.
    design: holdout | kfold:K | kfold:KxR | loo | bootstrap:N, see tl_jax/data/resample.py.
    together: which runs are trained in one program, see tl_jax/studies/together.py: heads | cached | all | none.
    """

    base: ConfigDict
    factors: Mapping[str, Mapping[str, Mapping[str, Any]]]
    baseline: Mapping[str, str] = {}
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    metrics: Sequence[str] = ()
    design: str = "holdout"
    together: str = "heads"


class RunSpec(NamedTuple):
    """One run of a study; key: the first KEY hex digits of the hash of its options, and the name of its folder."""

    levels: dict[str, str]
    seed: int
    fold: str
    config: ConfigDict
    key: str


def metrics_of(study: Study) -> tuple[str, ...]:
    """The metrics of a study, by default the one that its base config's task monitors."""
    return tuple(study.metrics) or (tasks.METRICS[study.base.task].monitor[0][0],)


def title(levels: Mapping[str, str], seed: int | None = None, fold: str = "") -> str:
    """How messages name a cell, or a run of it: `unfrozen=1, shots=5, seed 2`."""
    parts = [f"{factor}={level}" for factor, level in levels.items()]
    return ", ".join(filter(None, [*parts, "" if seed is None else f"seed {seed}", fold]))


def load(text: str) -> tuple[str, str, Study]:
    """Name, question (the docstring) and study (by get_study) of `experiments/NAME[:argument]`, a folder or file."""
    place, _, argument = text.partition(":")
    path = pathlib.Path(place)
    file = path if path.suffix == ".py" else path / "study.py"
    if not file.is_file():
        folders = {path.parent, pathlib.Path("experiments")}
        known = sorted(str(study.parent) for folder in folders for study in folder.glob("*/study.py"))
        raise ValueError(f"there is no study {file}{messages.nearest(place, known)}; studies there: {known or 'none'}")
    spec = importlib.util.spec_from_file_location(f"study_of_{file.parent.name}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError, NameError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} cannot be loaded: {type(error).__name__}: {error}") from error
    question, make = inspect.getdoc(module), getattr(module, "get_study", None)
    needed = {"a docstring, which is the question": question, "a function get_study(arg)": callable(make)}
    if lacking := [what for what, found in needed.items() if not found]:
        raise ValueError(f"{file} lacks {' and '.join(lacking)}")
    study = make(argument)
    if not isinstance(study, Study):
        raise ValueError(f"get_study of {file} gave a {type(study).__name__}, expected a tl_jax.studies.study.Study")
    return file.resolve().parent.name, question, study


def grid(study: Study, free: Collection[str] = ()) -> list[RunSpec]:
    """Every run, seed by seed, so that the first results are of all cells.

    free: options of SHARED that levels may set all the same, as replicas do their seed. Raises one ValueError that
    lists all invalid options, levels, baselines, seeds, metrics and equal cells.
    """
    _refuse([*_problems_of_study(study), *_problems_of_levels(study, [key for key in SHARED if key not in free])])
    runs: dict[str, RunSpec] = {}
    problems = []
    cells = itertools.product(*study.factors.values())
    for seed, (fold, repeat), cell in itertools.product(study.seeds, resample.folds(study.design), cells):
        levels = dict(zip(study.factors, cell, strict=True))
        changes = {"seed": seed, "data.split_seed": study.base.data.split_seed + repeat}
        changes |= {"data.resample": fold} if fold else {}
        for factor, level in levels.items():
            changes |= study.factors[factor][level]
        config = options.override(study.base, changes)
        problems += _problems_of_run(study, levels, config)
        name = f"{fold}, repeat {repeat}" if repeat else fold
        run = RunSpec(levels, config.seed, name, config, options.fingerprint(config)[:KEY])
        if (same := runs.setdefault(run.key, run)) is not run:
            problems.append(f"{title(same.levels)} and {title(levels)} are the same run: no option differs")
    _refuse(problems)
    return list(runs.values())


def _refuse(problems: Iterable[str]) -> None:
    if found := list(dict.fromkeys(problems)):
        raise ValueError("\n  ".join(["invalid study:", *messages.shorten(found, SHOWN)]))


def _problems_of_study(study: Study) -> Iterator[str]:
    if not study.factors or not all(isinstance(levels, Mapping) and levels for levels in study.factors.values()):
        yield "factors: expected {factor: {level: {option: value}}}, with at least one level each"
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        yield f"seeds={tuple(study.seeds)}: expected at least one, and none twice"
    for factor, level in study.baseline.items():
        if factor not in study.factors:
            yield f"baseline names the factor {factor!r}{messages.nearest(factor, study.factors)}"
        elif level not in study.factors[factor]:
            near = messages.nearest(str(level), map(str, study.factors[factor]))
            yield f"baseline names the level {level!r} of {factor}{near}"
    if arms := [name for name in ("seeds", "baseline", "replicas") if study.base.get(name)]:
        yield f"the base config sets {' and '.join(arms)}: here they are the study's"
    if study.together not in TOGETHER:
        yield f"together={study.together!r}: expected one of {', '.join(TOGETHER)}"
    known = tasks.scalar_names(study.base.get("task", tasks.Spec().name))
    for metric in study.metrics:
        name = metric.rpartition("/")[2]
        if name not in known:
            yield f"metric {metric!r} is unknown{messages.nearest(name, known)}; known: {', '.join(known)}"
    if len(set(study.metrics)) < len(study.metrics):
        yield f"metrics={tuple(study.metrics)}: expected none twice"


def _problems_of_levels(study: Study, shared: Collection[str]) -> Iterator[str]:
    owner: dict[str, str] = {}
    for factor, levels in study.factors.items():
        for level, changes in levels.items() if isinstance(levels, Mapping) else ():
            if not isinstance(level, str) or not isinstance(changes, Mapping):
                yield f"{factor}: level {level!r} should be a string, with a table {{option: value}}"
                continue
            if taken := [option for option in changes if option in shared]:
                yield f"{factor}={level} sets {', '.join(taken)}, which the study decides for all runs"
            try:
                options.override(study.base, {key: value for key, value in changes.items() if key not in shared})
            except ValueError as error:
                yield f"{factor}={level}: {error}"
            for option, (other, owned) in itertools.product(changes, owner.items()):
                if owned != factor and (f"{option}.".startswith(f"{other}.") or f"{other}.".startswith(f"{option}.")):
                    yield f"{option} of {factor} and {other} of {owned}: one would overwrite the other"
            owner |= {option: owner.get(option, factor) for option in changes}


def _problems_of_run(study: Study, levels: Mapping[str, str], config: ConfigDict) -> Iterator[str]:
    try:
        options.check(config)
    except ValueError as error:
        yield f"{title(levels)}: {error}"
    phases, sets = config.get("phases", ()), [name for name, *_ in config.data.extra_eval]
    for factor, level in levels.items():
        for option in study.factors[factor][level]:
            if phases and all(option in dict(phase) for phase in phases):
                every = f"so does every phase of {title(levels)}: the level would be without effect"
                yield f"{factor}={level} sets {option}, and {every}"
    for metric in study.metrics:
        if "/" in metric and (name := metric.rpartition("/")[0]) not in sets:
            yield f"metric {metric!r}: data.extra_eval has no set {name!r}, only {sets}"
