"""The folder of a run: one process at a time, one config."""

import contextlib
import pathlib
from collections.abc import Mapping
from typing import Any

from tl_jax import config
from tl_jax.core import files


def lock(workdir: pathlib.Path) -> contextlib.AbstractContextManager:
    """Locks the workdir until the block or the process ends; raises ValueError where another process has the lock."""
    workdir.mkdir(parents=True, exist_ok=True)
    busy = f"another process is running in {workdir}; wait, or choose another --workdir"
    return files.locked(workdir / ".lock", busy)


def check_options(workdir: pathlib.Path, options: Mapping[str, Any]) -> None:
    """Raises ValueError where the workdir has a result or checkpoints of other `{dotted option: value}`."""
    path = workdir / "config.json"
    if not path.exists() or not ((workdir / "result.json").exists() or any(workdir.glob("checkpoints/[0-9]*"))):
        return  # nothing to protect: a run that ended before its first checkpoint may be started with other options
    if changed := config.difference(files.read_json(path), options):
        wrong = f"{workdir} holds a run with other options; choose another --workdir (there -> now):"
        raise ValueError("\n".join([wrong, *changed]))
