"""The selection panel as a table, and over the option sets and seeds of a study."""

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tl_jax import tasks
from tl_jax.core import files
from tl_jax.methods.selectors import SELECTORS
from tl_jax.studies.report.tables import Table
from tl_jax.training import candidates, selection

HEADERS = ("selector", "reads", "chosen", "accuracy", "minus last [95 %]", "regret", "rho")


def table(found: Mapping[str, Any]) -> Table:
    """The panel of a result or a study; found: its entry "selection"."""
    rows, named = [], any(c.get("options") for row in found["rows"] for c in row["chosen"])
    for row in found["rows"]:
        gained, order = row["difference"], row["spearman"]
        span = "" if gained["low"] is None else f" [{gained['low']:+.3f}, {gained['high']:+.3f}]"
        own = (f"{c['options'] or 'base' * named} {c['step']}".strip() if c else "-" for c in row["chosen"])
        told = [x if n in (1, len(row["chosen"])) else f"{x} (x{n})" for x, n in Counter(own).items()]
        mark = " (train-val)" if found["several"] and row["selector"] == "source_risk" else ""
        numbers = f"{row['accuracy']:.3f}", f"{gained['value']:+.3f}{span}", f"{row['regret']:.3f}"
        name = f"{row['selector'].partition(':')[0]}{mark}", row["reads"], "; ".join(told)
        rows.append((*name, *numbers, "-" if order is None else f"{order:+.2f}"))
    caption = (
        f"What each selector's choice (options, step) is worth on {found['test']}, judged on {found['judged_on']}. "
        f"reads: whose labels. rho: weighted Spearman correlation of scores and accuracies. {selection.ORACLE}."
    )
    caption += " One candidate: there was nothing to choose." if len(found.get("steps", ())) == 1 else ""
    return Table(caption, HEADERS, rows, 3)


def over_runs(
    units: Mapping[str, Sequence[tuple[str, pathlib.Path]]], folder: pathlib.Path, resamples: int = 1000
) -> dict[str, Any] | str | None:
    """The panel over the candidates of several finished runs, {seed or fold: (options, folder of a run)}.

    Every selector's choice is written into `folder/choices.json` first; only then are the runs' target labels read.
    None where no run has candidates, or a sentence that says why their panels cannot be joined.
    """
    results = {path: files.read_json(path / "result.json") for runs in units.values() for _, path in runs}
    configs = {path: files.read_json(path / "config.json") for path in results}
    everything = units
    units = {unit: [run for run in runs if "selection" in results[run[1]]] for unit, runs in units.items()}
    units = {unit: runs for unit, runs in units.items() if runs}
    panels = {path: results[path]["selection"] for runs in units.values() for _, path in runs}
    if not panels:
        return None
    first = next(iter(panels.values()))
    if any(panel[name] != first[name] for panel in panels.values() for name in ("test", "judged_on", "several")):
        return "The runs were judged or tested on sets of different names, so that no selector chooses among them all."
    scored = {unit: _scores(runs) for unit, runs in units.items()}
    for unit, (places, scores) in scored.items() if first["several"] else ():
        score = {options: _left_out(path, [p for _, p in everything[unit]], configs, results)
                 for options, path in units[unit]}  # fmt: skip
        end = {options: panels[path]["steps"][-1] for options, path in units[unit]}
        if None not in score.values():
            scores[selection.LEFT_OUT] = [score[p["options"]] * (p["step"] == end[p["options"]]) for p in places]
    choices = {
        unit: {name: {"reads": selection.READS[name], **places[int(np.argmax(scores[name]))]} for name in scores}
        for unit, (places, scores) in scored.items()
    }
    files.write_json(folder / candidates.CHOICES, {"units": choices})
    made = [_unit(units[unit], *scored[unit], panels) for unit in units]
    if len({unit.hits.shape[1] for unit in made}) > 1:
        return "The target's test differs between seeds or folds, so that there is no panel over them."
    rows = selection.panel(made, resamples=resamples, several=first["several"])
    return {**{name: first[name] for name in ("test", "judged_on", "several")}, "rows": rows}


def _scores(runs: Sequence[tuple[str, pathlib.Path]]) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """(options and step of each candidate, scores of the selectors that all runs have); no labels are read."""
    places, scores, pool = [], {}, []
    for options, path in runs:
        own = files.read_json(path / candidates.CHOICES)
        places += [{"options": options, "step": step} for step in own["steps"]]
        for name, row in own["choices"].items():
            scores.setdefault(name, []).extend(row["scores"])
        files_of = [candidates.path_of(path, step) for step in own["steps"]]
        read = (candidates.read(each, own["sha256"].get(each.name, "")) for each in files_of)
        pool += [candidates.make({"target_logits": arrays["target_logits"]}) for arrays in read]
    scores |= {name: selector.scores(pool) for name, selector in SELECTORS.items() if selector.pool}
    return places, {name: scores[name] for name in SELECTORS if len(scores.get(name, ())) == len(places)}


def _left_out(path: pathlib.Path, others: Sequence[pathlib.Path], configs: Mapping, results: Mapping) -> float | None:
    """DomainBed's leave-one-domain-out score of a run (Gulrajani and Lopez-Paz 2021); None where a run lacks for it.

    It is the mean over its source domains of the accuracy on one, a set of data.extra_eval, of the run that has the
    same options and was trained on the others.
    """

    def parts(config):
        source = config["data.source"]
        rest = {key: x for key, x in config.items() if key not in ("data.source", "data.extra_eval", "data.candidates")}
        return {source} if isinstance(source, str) else set(source), rest

    (domains, options), found = parts(configs[path]), {}
    for other in others:
        fewer, same = parts(configs[other])
        for name, source, _ in configs[other].get("data.extra_eval", ()) if same == options else ():
            if source in domains and fewer == domains - {source}:
                found[source] = results[other]["extra_eval"][name]["accuracy"]["value"]
    return float(np.mean(list(found.values()))) if len(found) == len(domains) else None


def _unit(runs, places, scores, panels: Mapping[pathlib.Path, Mapping[str, Any]]) -> selection.Unit:
    """The candidates of all runs of a seed, with what target labels say of them."""
    hits, few, held_out = [], [], []
    for _, path in runs:
        panel = panels[path]
        labels = tasks.load_predictions(path / f"predictions-{panel['test']}.npz").labels
        read = (candidates.read(candidates.path_of(path, step)) for step in panel["steps"])
        hits += [arrays["test_logits"].argmax(1) == labels for arrays in read]
        few, held_out = few + panel["few"], held_out + panel["held_out"]
    columns = ([place[name] for place in places] for name in ("options", "step"))
    return selection.Unit(*columns, scores, np.array(hits), few, held_out)
