"""Runs of a study that are one program: they differ in their rates alone and share what is frozen.

Study.together: heads, runs that train nothing but a head and differ in RATES; cached, these and runs of last_k behind
cached features; all, any that take steps and differ in config.REPLICABLE; none, every run by itself. A set that was
begun is W/together/KEY: runs.json names its runs, and the reason where it cannot be trained and they are done one by
one; checkpoints/ is what it has saved.
"""

import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from tl_jax import config
from tl_jax.core import checks, messages
from tl_jax.core.files import read_json, write_json
from tl_jax.studies import store

SET = {"runs": checks.TEXTS, "alone": checks.TEXT}  # what runs.json has
LARGEST = 64  # runs in one program
RATES = ("lr", "weight_decay", "groups")
DURATIONS = ("total", "log_every", "eval_every", "schedule.warmup")


def members(workdir: pathlib.Path, key: str, only: Collection[str] = ()) -> tuple[list[str], pathlib.Path | None]:
    """The runs to train together with a run, and the set's folder; ([key], None): by itself. A set once begun stays."""
    plan = store.read_plan(workdir)
    begun = {}
    for path in sorted(workdir.glob("together/*/runs.json")):
        try:
            begun[path.parent] = read_json(path, SET)
        except ValueError as error:  # the same runs, chosen again, make the same folder and go on from what it saved
            print(f"a set of runs is chosen anew: {error}", flush=True)
            path.unlink()
    for home, table in begun.items():
        if key in table["runs"]:
            return ([key], None) if table["alone"] else (table["runs"], home)
    taken = {other for table in begun.values() for other in table["runs"]}
    choice = [other for other in store.open_runs(workdir) if other not in taken and (not only or other in only)]
    found = next(runs for runs in sets(workdir, choice, plan.get("together", "none")) if key in runs)
    if len(found) == 1:
        return found, None
    home = workdir / "together" / messages.fingerprint(dict.fromkeys(found))[:12]
    home.mkdir(parents=True, exist_ok=True)
    write_json(home / "runs.json", {"runs": found, "alone": ""})
    return found, home


def separate(home: pathlib.Path, reason: str) -> None:
    """Lets the runs of a set be done one by one."""
    write_json(home / "runs.json", {**read_json(home / "runs.json"), "alone": reason})


def sets(workdir: pathlib.Path, keys: Collection[str], which: str) -> list[list[str]]:
    """The keys in sets that are one program each, of at most LARGEST; most are by themselves."""
    paths = {key: store.run_folder(workdir, key) / "config.json" for key in keys}
    return group({key: {**config.INITIAL, **read_json(path)} for key, path in paths.items()}, which)


def group(flats: Mapping[str, Mapping[str, Any]], which: str) -> list[list[str]]:
    """The keys of `{key: options}` in sets."""
    alike: dict[str, list[str]] = {}
    for key, flat in flats.items():
        alike.setdefault(form_of(flat, which) or key, []).append(key)
    return [runs[i : i + LARGEST] for runs in alike.values() for i in range(0, len(runs), LARGEST)]


def form_of(flat: Mapping[str, Any], which: str) -> str | None:
    """What two runs must have alike in their options to be one program; None for a run that has to be by itself.

    What depends on data and network is checked in tl_jax/training/replicas.py.
    """
    plain = not flat["method.add"] and not flat["phases"]
    heads = plain and flat["method.name"] == "linear_probe"
    cached = heads or (plain and flat["method.name"] == "last_k" and flat["cache"] == "features")
    fits = {"none": False, "heads": heads, "cached": cached, "all": True}[which]
    stepping = flat["method.name"] not in config.WITHOUT_STEPS and flat["parallel"] == "jit"
    if not (fits and stepping):
        return None
    free = set(config.REPLICABLE if which == "all" else RATES)
    spans = [flat[name] for name in DURATIONS]
    spans += [value for phase in flat["phases"] for name, value in phase if name in DURATIONS]
    if any(amount and unit == "epochs" for amount, unit in spans):
        free.discard("data.shots")  # an epoch is as long as there are examples
    alike = {key: value for key, value in flat.items() if key not in free}
    alike["terms"] = config.forms_of(flat["terms"]) if "terms" in free else flat["terms"]
    kinds = [(group, field, value) for group, fields in flat["groups"].items() for field, value in fields.items()
             if field not in ("lr_mult", "weight_decay")]  # fmt: skip
    return json.dumps([alike, sorted(kinds)], sort_keys=True)
