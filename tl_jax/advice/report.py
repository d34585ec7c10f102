"""What a race found: printed, and as advice.md with the figure of its rounds."""

from collections.abc import Mapping
from typing import Any

from tl_jax import config as options
from tl_jax import tasks
from tl_jax.api.rank import Ranking
from tl_jax.core import console, files, plotting
from tl_jax.core.console import Table, plain
from tl_jax.studies.report import tables
from tl_jax.studies.report.tables import Picture

LEVEL = 0.95


def write(race: Any) -> None:
    """Writes W/advice.md and W/figures/rounds.png of a race that is over, and prints the first."""
    state, metric = race.state, race.metric[0]
    rounds = [race.runs(f"round{i}") for i in range(len(state["rounds"]))]
    with plotting.headed(state["asked"]["data"]):
        _draw(race, rounds)
    title = f"Advice for {state['asked']['data']}"
    found = sections(race, rounds, metric)
    files.write_text(race.folder / "advice.md", tables.to_markdown(title, found))
    for heading, blocks in found.items():
        console.show(f"\n{heading}", style="bold")
        for block in blocks:
            if not isinstance(block, Picture):
                console.show("\n".join(block) if isinstance(block, list) else block)


def sections(race: Any, rounds: list[Mapping[str, Any]], metric: str) -> tables.Sections:
    """The report, see studies/report/tables.py."""
    state, chosen = race.state, race.state["chosen"]
    cost = (lambda x: f"{x / 60:.1f} min") if race.budget.timed else (lambda x: tables.scaled(x, 1000, "FLOP"))
    steps = state["candidates"][chosen][1] not in options.WITHOUT_STEPS
    trained = f" after {state['rounds'][-1]['epochs']:g} epochs" if steps else ""
    final = {name: tasks.load_predictions(run.folder / "predictions.npz") for name, run in race.runs("final").items()}
    score = tasks.summarize(final[chosen])[metric]
    val, others = rounds[-1][chosen].scores[metric], [name for name in final if name != chosen]
    where = f"{state['splits']['data.test']} ({len(final[chosen].labels):,} examples)"
    told = [
        f"Take {chosen}{trained}: {metric} {score['value']:.3f} "
        f"({score['low']:.3f} .. {score['high']:.3f}, {LEVEL:.0%}) on {where}, which no choice has seen.",
        f"On the val that chose it, of {len(state['candidates'])} candidates, it is {val:.3f}.",
        f"It is the run of {race.folder / 'chosen.json'}: python launch.py --config {race.folder / 'chosen.json'}",
        f"The race took {cost(race.spent())} of {cost(race.budget.amount)}.",
    ]
    return {
        "Chosen": [*told, _beaten(final, chosen, others, metric, where)],
        "Rounds": [_rounds(race, rounds, metric), Picture("rounds", f"{metric} on val by round"), *_failed(race)],
        "Networks": [*Ranking(state["ranking"]).tables, *state["ranking"]["notes"]],
    }


def _beaten(final: Mapping[str, Any], chosen: str, others: list[str], metric: str, where: str) -> Table | str:
    """The chosen candidate against the others on the same examples, with intervals that hold together."""
    if not others:
        return "No other candidate was left to compare it with."
    level, side, rows = 1 - (1 - LEVEL) / len(others), tasks.direction(metric), []
    for name in others:
        found = tasks.paired_difference(final[chosen], final[name], metric=metric, level=level)
        low, high = sorted(side * found[end] for end in ("low", "high"))
        word = "better" if low > 0 else "worse" if high < 0 else "not clear"
        rows.append((name, f"{found['value']:+.3f}", f"{found['low']:+.3f} .. {found['high']:+.3f}", word))
    caption = (
        f"{metric} of {chosen} minus that of others on {where}; {level:.1%} intervals, Bonferroni's for {len(others)}"
    )
    return Table(caption, ("other", "difference", "interval", "it is"), rows)


def _rounds(race: Any, rounds: list[Mapping[str, Any]], metric: str) -> Table:
    """Every candidate with its score on val in each round, the last to leave first."""
    heads = [f"{row['epochs']:g} epochs" for row in race.state["rounds"]]
    scores = {name: [run.scores.get(metric) for each in rounds if (run := each.get(name))] for name in rounds[0]}
    order = {name: i for number in range(len(rounds)) for i, name in enumerate(race.order(number))}
    names = sorted(scores, key=lambda name: (-len(scores[name]), order.get(name, len(scores))))
    rows = []
    for name in names:
        cells = ["-" if x is None else f"{x:.3f}" for x in scores[name]]
        rows.append((name, *cells, *[""] * (len(rounds) - len(cells))))
    return Table(f"{metric} on val", ("candidate", *heads), rows)


def _failed(race: Any) -> list[str]:
    """Sentences on the candidates that failed."""
    found = []
    for number in range(len(race.state["rounds"])):
        runs = race.runs(f"round{number}")
        found += [f"{name} failed: {plain(run.error)}" for name, run in runs.items() if run.state == "failed"]
    return found


def _draw(race: Any, rounds: list[Mapping[str, Any]]) -> None:
    """Score on val against epochs, a line for each candidate; those of the last round in colour."""
    metric, epochs = race.metric[0], [row["epochs"] for row in race.state["rounds"]]
    path = race.folder / "figures" / "rounds"
    path.parent.mkdir(exist_ok=True)
    with plotting.figure_at(path, (6.0, 3.6)) as (_, (axis,)):
        colours = dict(zip(race.order(len(rounds) - 1), plotting.PALETTE, strict=False))
        for name in sorted(rounds[0], key=lambda name: name in colours):
            known = [(e, each[name].scores.get(metric)) for e, each in zip(epochs, rounds, strict=True) if name in each]
            points = [(e, value) for e, value in known if value is not None]
            style = {"color": colours.get(name, "#C8C8C8"), "marker": "o", "markersize": 4, "linewidth": 1.2}
            style |= {"label": plotting.short(name, 44)} if name in colours else {}
            if points:
                axis.plot(*zip(*points, strict=True), **style)
        axis.set_xscale("log")
        axis.set_xticks(epochs, [f"{e:g}" for e in epochs])
        axis.minorticks_off()
        axis.set(xlabel="epochs", ylabel=f"{metric} on val")
        axis.legend(loc="best", fontsize=7)
