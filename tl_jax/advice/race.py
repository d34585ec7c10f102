"""Which network and which way of adapting it suit a data set, found under a budget: a race in rounds.

1. Transferability scores rank the networks (`api.rank`).
2. Every way of adapting the best of them trains for a short time, a third of these for longer, and so on (successive
   halving, Jamieson & Talwalkar 2016, arXiv:1502.07943). Val decides.
3. What is left is scored once, on examples that no choice has seen.

W/advice.json holds each decision before it is carried out, and each round is a study, W/round0, W/round1, ..., W/final:
so the same command goes on wherever it was stopped.
"""

import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tl_jax import config as options
from tl_jax import models, tasks
from tl_jax.advice import report
from tl_jax.api import inputs, rank
from tl_jax.core import checks, files, messages
from tl_jax.core.console import show
from tl_jax.methods import recipes
from tl_jax.runtime import preemption
from tl_jax.studies import estimate, local, store
from tl_jax.studies.report import results
from tl_jax.studies.study import Study

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15}
RATES = (2e-3, 1e-2)  # of new parts; that of the backbone is a share of it, see recipes
NETWORKS = 3  # that are raced at most
KEEP, FINALISTS = 3, 2  # one of three candidates goes on to the next round, until two are left
PROBES = ("linear_probe", "logistic", "ridge")
NO_FILE = ("knn", "adapter", "prompt", "prompt_deep")  # ways that leave no weight file of a plain network to score
CACHED = (*PROBES, "last_k", "head_then_last")
OTHERS = 3  # candidates that the winner is compared with at most, and the best probe
SHORTEST, LONGEST = 0.2, 30.0  # epochs, of the first round and of any
LAST = 0.05  # of the budget, kept for the score at the end
OVERHEAD = 8.0  # seconds of a run besides its steps, until some are measured
EFFICIENCY = 0.4  # of training, where a matrix product has 1; until it is measured
DECIDED = ("data.source", "data.train", "data.val", "data.test", "total", "eval_every", "lr", "model.name", "groups",
           "model.weights", "method.name", "phases", "cache", "seeds", "baseline", "replicas")  # fmt: skip
Stop = Callable[..., bool]


class Budget(NamedTuple):
    """What a race may cost: seconds of its runs, or their floating-point operations."""

    amount: float
    timed: bool

    def total(self, cost: Mapping[str, Any]) -> float:
        """What a run took of it, by its cost.json."""
        return sum((cost.get("wall_seconds") or {}).values()) if self.timed else cost.get("flops") or 0.0

    def split(self, cost: Mapping[str, Any]) -> tuple[float, float]:
        """What a run like it takes besides its steps, and what its steps took.

        Cached features are on the disk by then, which saves time; operations are counted again.
        """
        phases, wall = cost.get("phases") or (), cost.get("wall_seconds") or {}
        if self.timed:
            steps = wall.get("training", 0.0) if phases else 0.0
            return self.total(cost) - steps - wall.get("features", 0.0), steps
        features = sum(phase.get("flops_of_features") or 0.0 for phase in phases)
        return (features, self.total(cost) - features) if phases else (self.total(cost), 0.0)


def read_budget(text: str) -> Budget:
    """10min, 600s or 2h of time, 3PFLOP of operations; ValueError otherwise."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})", text)
    if not found or float(found[1]) == 0:
        raise ValueError(f"--budget {text!r}: expected a number above 0 and one of {', '.join(UNITS)}, such as 10min")
    return Budget(float(found[1]) * UNITS[found[2]], not found[2].endswith("FLOP"))


def splits(known: Sequence[str]) -> dict[str, str]:
    """The splits of a race, of those that a source has: test is the source's test, else val, else a fifth of train."""
    if "test" in known:
        return inputs.options_of(known)
    if "val" in known:
        return {"data.train": "train[:80%]", "data.val": "train[80%:]", "data.test": "val"}
    return {"data.train": "train[:64%]", "data.val": "train[64%:80%]", "data.test": "train[80%:]"}


def ways(name: str, task: str, epochs: float, methods: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """{way, with its rate: the options it changes} of a network; methods: of `recipes`, a choice of these without."""
    table, attends = recipes.methods(epochs), hasattr(models.get(name).module(num_classes=0), "heads")
    probe = "logistic" if task == "classification" else "linear_probe"
    found = {}
    for way in methods or (probe, "last_k", "lora" if attends else "norm_only", "full", "lp_ft"):
        own = table[way] | ({"cache": "features"} if way in CACHED else {})
        if way in PROBES:
            found[way] = own | {"lr": options.HEAD_ALONE["lr"]}
        else:
            found |= {f"{way} {rate:g}": own | {"lr": rate} for rate in RATES}
    return found


def sizes(count: int) -> list[int]:
    """How many candidates each round has."""
    found = [count]
    while found[-1] > FINALISTS:
        found.append(max(FINALISTS, math.ceil(found[-1] / KEEP)))
    return found


class Race(NamedTuple):
    """A race in its folder.

    base: the options of all candidates. state: advice.json; what is there is decided for good: asked, splits, ranking,
    networks {label: {name, weights}}, candidates {name: [network, way]}, rounds [{epochs, candidates}], chosen.
    """

    folder: pathlib.Path
    budget: Budget
    base: Any
    state: dict[str, Any]
    jobs: int
    stop_requested: Stop

    def decide(self, **decisions: Any) -> None:
        self.state.update(decisions)
        files.write_json(self.folder / "advice.json", self.state)

    @property
    def metric(self) -> tuple[str, str]:
        """What val decides by, and "max" or "min"."""
        return tasks.METRICS[self.base.task].monitor[0]

    def ways(self, network: str, epochs: float = 1.0) -> dict[str, dict[str, Any]]:
        """`ways` of a network of the race by its label."""
        name, asked = self.state["networks"][network]["name"], self.state["asked"]
        return ways(name, self.base.task, epochs, asked["methods"])

    def options_of(self, candidate: str, epochs: float) -> dict[str, Any]:
        """The options of a candidate that trains for so many epochs."""
        return self.options(*self.state["candidates"][candidate], epochs)

    def options(self, network: str, way: str, epochs: float) -> dict[str, Any]:
        """Those of a way of a network."""
        row, found = self.state["networks"][network], self.ways(network, epochs)
        own = {"model.name": row["name"], "model.weights": row["weights"], "eval_every": (epochs, "epochs")}
        return own | ({} if "phases" in found[way] else {"total": (epochs, "epochs")}) | found[way]

    def runs(self, stage: str) -> dict[str, results.Run]:
        """{candidate: its run} of a round, or of the final."""
        return {cell[0]: next(iter(units.values())) for cell, units in results.load(self.folder / stage).grid.items()}

    def order(self, number: int) -> list[str]:
        """The candidates of a round that finished, the best on val first, of equal ones the cheapest."""
        metric, side = self.metric
        runs = {name: run for name, run in self.runs(f"round{number}").items() if run.scores.get(metric) is not None}
        if not runs:
            raise ValueError(f"no candidate of {self.folder / f'round{number}'} finished: see runs/*/log.txt there")
        sign = -1 if side == "max" else 1
        return sorted(runs, key=lambda name: (sign * runs[name].scores[metric], runs[name].cost.get("flops") or 0.0))

    def spent(self) -> float:
        """Of the budget, by what the finished runs say of themselves; the ranking counts in a budget of time."""
        folders = [path.parent for path in sorted(self.folder.glob("*/runs/*/result.json"))]
        known = sum(self.budget.total(files.read_json(path / "cost.json")) for path in folders)
        return known / self.jobs + self.state["ranking"]["seconds"] if self.budget.timed else known


def run(
    data: str, weights: Sequence[str], budget: str, workdir: pathlib.Path, items: Sequence[str] = (), *,
    methods: Sequence[str] = (), jobs: int = 0, stop_requested: Stop = lambda *_: False,
) -> dict[str, Any]:  # fmt: skip
    """Runs a race, or goes on with it, and writes its report; returns what advice.json holds.

    data: a source or its path. weights: as of `api.rank.rank`. budget: as of `read_budget`. items: "option=value" for
    all candidates, such as task, data.labels or seed. methods: of `recipes`, to race these alone. jobs: runs at once;
    0: one, or one a GPU. Raises one ValueError for what does not fit; Preempted, with everything saved, soon after
    `stop_requested()` has become true.
    """
    asked = {"data": data, "weights": [*weights], "budget": budget, "options": [*items], "methods": [*methods]}
    race = open_race(asked, workdir, jobs, stop_requested)
    if "ranking" not in race.state:
        _rank(race)
    if "candidates" not in race.state:
        _enter(race)
    for number in range(len(sizes(len(race.state["candidates"])))):
        if len(race.state["rounds"]) == number and not _plan(race, number):
            break
        planned = race.state["rounds"][number]
        levels = {name: race.options_of(name, planned["epochs"]) for name in planned["candidates"]}
        _carry_out(race, f"round{number}", levels)
    if "chosen" not in race.state:
        race.decide(chosen=race.order(len(race.state["rounds"]) - 1)[0])
    _score(race)
    report.write(race)
    return race.state


def open_race(
    asked: dict[str, Any], workdir: pathlib.Path, jobs: int = 0, stop_requested: Stop = lambda *_: False
) -> Race:
    """The race with what it has decided so far; asked: as advice.json has it.

    ValueError where the folder is another one's, or something is wrong.
    """
    budget, path = read_budget(asked["budget"]), workdir / "advice.json"
    given = {item.partition("=")[0] for item in asked["options"]}
    known = [name for name in recipes.list_methods() if name not in NO_FILE]
    unknown = [f"{name}{messages.nearest(name, known)}" for name in asked["methods"] if name not in known]
    checks.refuse(f"--methods are some of {', '.join(known)}", unknown)
    checks.refuse("the race decides these options for each candidate; leave them out", sorted(given & {*DECIDED}))
    base = options.parse(options.make(), asked["options"])
    source = inputs.source_name(asked["data"])
    columns = {key: base.data[key] for key in ("text", "image", "columns") if base.data[key]}
    chosen = splits(inputs.splits_of(source, base.task, base.data.labels, **columns))
    base = options.override(base, {"data.source": source, **chosen, "data.test": ""})
    state = files.read_json(path) if path.exists() else {"asked": asked, "splits": chosen, "rounds": []}
    if lines := messages.difference(*({key: str(x) for key, x in each.items()} for each in (state["asked"], asked))):
        what = f"{workdir} holds advice on another question; choose another --workdir (there -> now):"
        raise ValueError("\n".join([what, *lines]))
    workdir.mkdir(parents=True, exist_ok=True)
    return Race(workdir, budget, base, state, jobs or max(1, len(local.gpus(os.environ))), stop_requested)


def _rank(race: Race) -> None:
    """Ranks the networks by the features of what candidates train on."""
    data, asked = race.base.data, race.state["asked"]
    began = time.monotonic()
    found = rank.rank(data.source, asked["weights"], split=data.train, task=race.base.task, labels=data.labels,
                      text=data.text, image_size=race.base.model.image_size, seed=race.base.seed,
                      cache_dir=race.base.cache_dir)  # fmt: skip
    found["seconds"] = time.monotonic() - began
    networks = {row["network"]: {"name": row["name"], "weights": row["weights"]} for row in found["networks"]}
    race.decide(ranking=dict(found), networks=networks)


def _enter(race: Race) -> None:
    """The candidates: every way of adapting as many of the best networks as the first round can afford.

    Of the others the probe alone, which reads the features that ranking has computed.
    """
    names: dict[str, list[str]] = {}
    costs: dict[str, tuple[float, float]] = {}
    for row in race.state["ranking"]["networks"][:NETWORKS]:
        label = row["network"]
        found = {f"{label}, {way}": [label, way] for way in race.ways(label)}
        costs |= {f"{label}, {way}": cost for way, cost in _first_costs(race, label).items()}
        tried = [costs[name] for name in names | found]
        if names and length(_left(race), tried, sizes(len(tried))) < 1.0:  # epoch in the first round
            found = {name: pair for name, pair in found.items() if pair[1] in PROBES}
        names |= found
    race.decide(candidates=names, first_costs={name: costs[name] for name in names})


def _first_costs(race: Race, label: str) -> dict[str, tuple[float, float]]:
    """{way: (besides its steps, of an epoch of steps)} of a network, before any run was measured.

    Ways that differ in their rate cost the same. Features are a forward pass, a third of a step of the whole network.
    """
    rate = 1 / (EFFICIENCY * estimate.matmul_rate()) if race.budget.timed else 1.0
    known: dict[str, tuple[float, float]] = {}

    def flops(changes: Mapping[str, Any]) -> float:
        return estimate.trace(options.override(race.base, changes)).flops or 0.0

    row = race.state["networks"][label]
    whole = {
        "model.name": row["name"],
        "model.weights": row["weights"],
        "method.name": "full",
        "total": (1.0, "epochs"),
    }
    features, ways = flops(whole) / 3, race.ways(label)
    for way in ways:
        name = way.partition(" ")[0]
        if name not in known:
            steps = 0.0 if name in PROBES else flops(race.options(label, way, 1.0))
            besides = features if name in CACHED else 0.0
            known[name] = besides * rate + OVERHEAD * race.budget.timed, steps * rate
    return {way: known[way.partition(" ")[0]] for way in ways}


def length(left: float, costs: Sequence[tuple[float, float]], counts: Sequence[int]) -> float:
    """The epochs of a round of candidates with these costs (of a run besides its steps, of an epoch of its steps).

    counts: of runs in this round and those behind it. What is left, less what all these runs take besides their steps,
    is shared evenly by the rounds.
    """
    fixed, steps = sum(cost[0] for cost in costs) / len(costs), sum(cost[1] for cost in costs)
    share = (left - fixed * sum(counts)) / len(counts)
    return min(share / steps, LONGEST) if steps else LONGEST


def _left(race: Race) -> float:
    """What the rounds to come may cost together; of time, the sum over the runs at once."""
    left = race.budget.amount * (1 - LAST) - race.spent()
    return left * (race.jobs if race.budget.timed else 1)


def _plan(race: Race, number: int) -> bool:
    """Decides who takes part in a round, and its length; False where that would be no longer than the one before.

    A candidate costs what it cost in the round before; its cached features are on the disk by then.
    """
    counts = sizes(len(race.state["candidates"]))[number:]
    if number:
        before, least = race.runs(f"round{number - 1}"), race.state["rounds"][-1]["epochs"]
        chosen = race.order(number - 1)[: counts[0]]
        parts = [race.budget.split(files.read_json(before[name].folder / "cost.json")) for name in chosen]
        costs = [(besides, steps / least) for besides, steps in parts]
    else:
        chosen, least, costs = list(race.state["candidates"]), SHORTEST, [*race.state["first_costs"].values()]
    epochs = length(_left(race), costs, counts)
    if epochs > least:
        race.decide(rounds=[*race.state["rounds"], {"epochs": float(f"{epochs:.3g}"), "candidates": chosen}])
    elif not number:
        asked = race.state["asked"]["budget"]
        raise ValueError(f"--budget {asked} is too little to race {len(chosen)} ways of one network; give more, or "
                         "fewer --methods, with another --workdir")  # fmt: skip
    return epochs > least


def _carry_out(race: Race, stage: str, levels: Mapping[str, Mapping[str, Any]]) -> None:
    """Runs one round, or the final, as a study."""
    folder = race.folder / stage
    study = Study(race.base, {"candidate": levels}, seeds=(race.base.seed,), together="cached")
    store.plan(folder, stage, f"{stage} of the race in {race.folder}", study)
    if not (open_runs := store.open_runs(folder)):
        return
    show(f"{stage}: {len(open_runs)} runs")
    slots = local.divide(min(race.jobs, len(open_runs)), os.environ)
    if local.supervise(folder, slots, race.stop_requested):
        raise preemption.Preempted(f"stopped in {stage}")
    local.tell_failures(folder)


def _score(race: Race) -> None:
    """Scores the finalists, and the best probe for comparison, on what no choice has seen; and writes chosen.json."""
    rounds, test = race.state["rounds"], race.state["splits"]["data.test"]
    probes = [name for name in race.order(0) if race.state["candidates"][name][1] in PROBES]
    levels = {}
    for name in dict.fromkeys([*race.order(len(rounds) - 1)[: OTHERS + 1], *probes[:1]]):
        last = max(i for i, each in enumerate(rounds) if name in each["candidates"])
        weights = race.runs(f"round{last}")[name].folder.absolute()
        network = race.state["networks"][race.state["candidates"][name][0]]["name"]
        levels[name] = {"model.name": network, "model.weights": str(weights), "model.keep_head": True,
                        "method.name": "none", "data.test": test}  # fmt: skip
    _carry_out(race, "final", levels)
    changes = race.options_of(race.state["chosen"], rounds[-1]["epochs"]) | {"data.test": test}
    files.write_json(race.folder / "chosen.json", options.flatten(options.override(race.base, changes)))
