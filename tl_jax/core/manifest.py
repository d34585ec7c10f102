"""MANIFEST.json: the sha256 of every file that a run leaves, so that no number is read that the run did not write.

It does not list what changes later by intent (figures, log.txt, comparison.json), nor checkpoints: these have hashes.
"""

import fnmatch
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from tl_jax.core import files

NAME = "MANIFEST.json"
WEIGHTS = ("model.safetensors", "trained.safetensors")  # checked when they are read; they may be removed
LISTED = (
    "config.json", "audit.json", "cost.json", "result.json", "replicas.json", "ledger.json", "choices.json", "*.jsonl",
    "predictions*.npz", "tokenizer.json",
)  # fmt: skip


def write(folder: pathlib.Path, last: str = "", table: Mapping[str, Any] | None = None) -> None:
    """Writes the manifest of a folder and then the file `last`, which says that the run is complete.

    Without `last` the files are listed as they lie there: that is to trust them.
    """
    hashes = {name: files.sha256(folder / name) for name in _present(folder, (*LISTED, *WEIGHTS))}
    text = json.dumps(table, indent=1) + "\n"
    if last:
        hashes[last] = hashlib.sha256(text.encode()).hexdigest()
    files.write_json(folder / NAME, {"sha256": hashes})
    if last:
        files.write_text(folder / last, text)


def check(folder: pathlib.Path, names: Iterable[str] = ()) -> None:
    """Raises one ValueError for all files that are not as the run left them: of `names`, or all but the weights."""
    fix = "restore them, or move the folder away and run again"
    if not (folder / NAME).exists():
        older = "a run of an older version that you trust gets it by tl_jax.core.manifest.write(pathlib.Path(...))"
        raise ValueError(f"{folder} has no {NAME}, expected with every finished run; {fix}; {older}")
    hashes, wrong = files.read_json(folder / NAME).get("sha256", {}), []
    for name in names or sorted({*hashes, *_present(folder, LISTED)}.difference(WEIGHTS)):
        found = files.sha256(folder / name) if (folder / name).is_file() else "no file"
        if found != (expected := hashes.get(name, "no entry")):
            wrong.append(f"{name} (found {found[:12]}, expected {expected[:12]})")
    if wrong:
        raise ValueError(f"{folder} is not as its run left it, by the sha256 in {NAME}: {', '.join(wrong)}; {fix}")


def check_weights(path: pathlib.Path) -> None:
    """`check` of a weight file, where it lies in the folder of a finished run."""
    if path.name in WEIGHTS and (path.parent / NAME).exists():
        check(path.parent, [path.name])


def _present(folder: pathlib.Path, patterns: Iterable[str]) -> list[str]:
    return sorted({path.name for path in folder.iterdir() for p in patterns if fnmatch.fnmatchcase(path.name, p)})
