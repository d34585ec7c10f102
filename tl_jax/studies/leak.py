"""The leak test: trains and chooses again with poisoned target labels, and shows that nothing that was decided differs.

What is bit-identical with permuted labels and with labels of -1 cannot depend on them.
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from tl_jax import config as options
from tl_jax.core import files, manifest, messages
from tl_jax.data.sealed import FILE, POISONS
from tl_jax.runtime import distributed, leaves
from tl_jax.runtime.log import log
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import inprocess
from tl_jax.training.train import Stop, never

FOLDER = "poison"
DECIDED = ("metrics.jsonl", "choices.json", "trained.safetensors", "candidates/*.npz")


def prove(
    config: ConfigDict, workdir: pathlib.Path, stop_requested: Stop = never, *, verbose: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Runs a config in its workdir, and poisoned in `workdir/poison/*`: (what `inprocess.run` returns, differences).

    Compared are the fingerprints of the data, the leaves of all checkpoints, metrics.jsonl, candidates, choices, the
    selected step and the weights. Every result.json says "leak_test": "passed", or "failed" and where. Raises
    ValueError where no label is sealed, and as `inprocess.run`.
    """
    found = inprocess.run(config, workdir, stop_requested, verbose=verbose)
    if not any(files.read_json(path)["sealed"] for path in _of(workdir, FILE)):
        raise ValueError(
            f"{workdir} has no sealed labels, so that nothing can be proved; expected an unlabelled stream (streams.X) "
            "or data.candidates of a source that no labelled stream names"
        )
    expected, differences = decided(workdir), []
    for poison in POISONS:
        log(f"\nleak test: all again, with {'permuted target labels' if poison == 'permuted' else 'labels of -1'}")
        home = workdir / FOLDER / poison
        try:
            inprocess.run(options.override(config, {"data.poison": poison}), home, stop_requested, verbose=False)
        except (Preempted, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever a label of -1 brings about
            differences.append(f"{poison}: the run failed, {type(error).__name__}: {error}")
            continue
        other = decided(home)
        differences += [
            f"{poison}: {what}" for what in sorted({*expected, *other}) if expected.get(what) != other.get(what)
        ]
    told = "; ".join(messages.shorten(differences, 5))
    if distributed.is_first():
        _tell(workdir, f"failed: {told}" if differences else "passed")
    return found, differences


def decided(home: pathlib.Path) -> dict[str, str]:
    """{what: sha256 or value} of all that runs in a folder have decided before sealed labels were opened."""
    table = {str(path.relative_to(home)): files.sha256(path) for name in DECIDED for path in _of(home, name)}
    for path in _of(home, "audit.json"):
        where = path.parent.relative_to(home)
        for phase in files.read_json(path)["phases"]:
            table |= {f"{where}: fingerprint of {name}": x["fingerprint"] for name, x in phase["data"].items()}
        table[f"{where}: selected step"] = files.read_json(path.parent / "result.json")["step"]
    for path in _of(home, "checkpoints/*/state"):
        where = path.parent.relative_to(home)
        table |= {f"{where}: {leaf}": row["sha256"] for leaf, row in leaves.read_index(path).leaves.items()}
    return table


def _of(home: pathlib.Path, name: str) -> list[pathlib.Path]:
    """The files of this name of all runs in a folder, without those of its poisoned ones."""
    return [path for path in sorted(home.rglob(name)) if FOLDER not in path.relative_to(home).parts]


def _tell(workdir: pathlib.Path, told: str) -> None:
    """Writes the outcome into every result, which a killed process leaves as a run that has still to end."""
    for path in _of(workdir, "result.json"):
        result = files.read_json(path)
        if result.get("leak_test") in (None, told) or result["leak_test"].endswith("possible"):
            continue
        path.unlink()
        manifest.write(path.parent, path.name, result | {"leak_test": told})
