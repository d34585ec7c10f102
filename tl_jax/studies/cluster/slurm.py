"""The launcher "slurm": a study as a job array, one run as a job; requeued when stopped with everything saved.

The script, assets/job.sh, is the same for all: what differs are arguments of sbatch, so nothing is quoted twice.
"""

import functools
import pathlib
import sys
from collections.abc import Sequence

from tl_jax.core.files import write_text
from tl_jax.studies.cluster.launchers import Plan, hand_out, parse_settings

LARGEST_ARRAY = 1000  # SLURM's default MaxArraySize is 1001
GRACE = 120  # seconds before the time limit at which a job is asked to save and end
OURS = ("array", "chdir", "wrap", "requeue", "no-requeue")  # what a job depends on to be resumed


def plan(arguments: Sequence[str], keys: Sequence[str], settings: str, workdir: pathlib.Path, jobs: int = 0) -> Plan:
    """The sbatch command for `python ARGUMENTS... KEYS...`; writes its script to workdir/slurm/job.sh.

    keys: of the runs of a study, shared among `jobs` array tasks (0: one task for each, up to LARGEST_ARRAY); none for
    a single job. settings: "partition=gpu,time=2:00:00", options of sbatch word for word, an empty value for one that
    takes none; with ntasks or nodes every run has several processes. ValueError for options that the launcher decides.
    """
    options = parse_settings(settings)
    if taken := [name for name in options if name in OURS]:
        raise ValueError(f"--slurm sets {', '.join(taken)}, which the launcher decides; leave out: {', '.join(OURS)}")
    tasks = max(1, min(len(keys), jobs or len(keys), LARGEST_ARRAY))
    place = workdir.absolute() / "slurm"
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / "job.sh", (pathlib.Path(__file__).parents[2] / "assets" / "job.sh").read_text())
    logs = str(place).replace("\\", "\\\\").replace("%", "%%")
    fixed = [sys.executable, *arguments]
    return Plan([
        "sbatch", f"--job-name={workdir.absolute().name}", f"--chdir={pathlib.Path.cwd()}",
        f"--output={logs}/{'%A_%a' if keys else '%j'}.log", "--open-mode=append", "--requeue", f"--signal=TERM@{GRACE}",
        *([f"--array=0-{tasks - 1}"] if keys else []),
        *(f"--{name}={value}" if value else f"--{name}" for name, value in options.items()),
        str(place / "job.sh"), str(tasks), str(len(fixed)), *fixed, *keys,
    ])  # fmt: skip


launch = functools.partial(hand_out, plan)
