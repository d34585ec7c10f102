"""From the command line to a study under way: load it, plan it, and hand it to a launcher."""

import pathlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from tl_jax.studies import store
from tl_jax.studies import study as studies

# Each is a function (workdir, *, jobs, ...) -> exit code, imported when it is asked for. The local one also takes
# stop_requested; those that hand a study to a cluster take (settings, submit), and any command of ours instead.
LAUNCHERS = {
    "local": "tl_jax.studies.local:launch",
    "slurm": "tl_jax.studies.cluster.slurm:launch",
    "tpu": "tl_jax.studies.cluster.cloud:launch_tpu",
    "gke": "tl_jax.studies.cluster.cloud:launch_gke",
}


def start(
    text: str, workdir: str | pathlib.Path | None, *, launcher: str = "local", jobs: int = 0, settings: str = "",
    submit: bool = False, dry_run: bool = False, retry: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
) -> int:  # fmt: skip
    """Plans the study `experiments/NAME[:argument]` in its workdir (default: workdirs/NAME) and launches it.

    Returns the launcher's exit code; a dry run prints the grid and what it would cost, and writes nothing. Raises
    ValueError for an invalid study, or a workdir that holds something else.
    """
    own = _cluster_options(launcher, settings, submit) or {"stop_requested": stop_requested}
    name, question, study = studies.load(text)
    workdir = pathlib.Path(workdir or f"workdirs/{name}")
    if dry_run:
        from tl_jax.studies import estimate

        runs = studies.grid(study)
        store.check_workdir(workdir, name, runs)
        estimate.show(workdir, name, study, runs, jobs)
        return 0
    store.plan(workdir, name, question, study)
    if retry and (count := store.retry(workdir)):
        print(f"{count} failed run(s) will be tried again", flush=True)
    return pkgutil.resolve_name(LAUNCHERS[launcher])(workdir, jobs=jobs, **own)


def hand_over(command: Sequence[str], workdir: str | pathlib.Path, launcher: str, settings: str, submit: bool) -> int:
    """Gives `python COMMAND...`, which works in `workdir`, to a launcher of a cluster; returns its exit code."""
    return pkgutil.resolve_name(LAUNCHERS[launcher])(
        pathlib.Path(workdir), command=command, **_cluster_options(launcher, settings, submit)
    )


def _cluster_options(launcher: str, settings: str, submit: bool) -> dict[str, Any]:
    """What a launcher takes besides its jobs; ValueError where the local one is given anything."""
    if launcher != "local":
        return {"settings": settings, "submit": submit}
    if settings or submit:
        raise ValueError("--submit, --slurm and --cloud are for a cluster: add --launcher slurm, tpu or gke")
    return {}
