"""The launcher "slurm": a study as a job array, one run as a job; requeued when stopped with everything saved.

No text is put into the script: what differs from job to job is an argument of sbatch, so nothing needs quoting twice.
"""

import pathlib
import sys
from collections.abc import Sequence

from tl_jax.core.files import write_text
from tl_jax.runtime import preemption
from tl_jax.studies.cluster.submit import Plan, carry_out, open_runs, parse_settings, worker_arguments

LARGEST_ARRAY = 1000  # SLURM's default MaxArraySize is 1001
GRACE = 120  # seconds before the time limit at which a job is asked to save and end
WAIT = 12  # seconds that the tasks of a run may end apart: a suspended one never ends by itself
OURS = ("array", "chdir", "wrap", "requeue", "no-requeue")  # what a job depends on to be resumed

SCRIPT = f"""\
#!/bin/bash
# job.sh TASKS FIXED COMMAND... KEY...: runs COMMAND, which is FIXED words, and gives it every TASKS-th KEY.
# As a step, srun, because only steps are signalled; with as many tasks as the job has.
tasks=$1 fixed=$2
shift 2
command=("${{@:1:fixed}}")
keys=("${{@:fixed + 1}}")
for ((k = ${{SLURM_ARRAY_TASK_ID:-0}}; k < ${{#keys[@]}}; k += tasks)); do command+=("${{keys[k]}}"); done
trap : TERM  # the step saves and ends; this shell outlives it
# The tasks of a run end together, but not in the same second: the last ones must not be killed on their way out.
srun --kill-on-bad-exit=0 --wait={WAIT} "${{command[@]}}"
code=$?
# {preemption.EXIT_CODE}: stopped, with everything saved. A cancelled job is not running any more, and stays cancelled.
if [ "$code" = {preemption.EXIT_CODE} ] && [ "$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def launch(
    workdir: pathlib.Path,
    *,
    command: Sequence[str] = (),
    settings: str = "",
    jobs: int = 0,
    submit: bool = False,
) -> int:
    """Prints the sbatch command for a planned study, or for `python COMMAND...`; runs it with `submit`.

    settings: of `plan`. jobs: array tasks, each with its share of the runs; 0: one for each run.
    """
    if command:
        return carry_out(plan(command, (), settings, workdir), submit)
    if not (keys := open_runs(workdir)):
        print(f"{workdir}: nothing to do, see python -m tl_jax report {workdir}", flush=True)
        return 0
    code = carry_out(plan(worker_arguments(workdir), keys, settings, workdir, jobs), submit)
    print(f"# afterwards: python -m tl_jax report {workdir}", flush=True)
    return code


def plan(arguments: Sequence[str], keys: Sequence[str], settings: str, folder: pathlib.Path, workers: int = 0) -> Plan:
    """The sbatch command for `python ARGUMENTS... KEYS...`; writes its script to folder/slurm/job.sh.

    keys: of the runs of a study, shared among `workers` array tasks (0: one task for each, up to LARGEST_ARRAY); none
    for a single job. settings: "partition=gpu,time=2:00:00,gres=gpu:1", options of sbatch word for word, an empty value
    for one that takes none; with ntasks or nodes every run has several processes. Raises ValueError for options that
    the launcher decides.
    """
    options = parse_settings(settings)
    if taken := [name for name in options if name in OURS]:
        raise ValueError(f"--slurm sets {', '.join(taken)}, which the launcher decides; leave out: {', '.join(OURS)}")
    tasks = max(1, min(len(keys), workers or len(keys), LARGEST_ARRAY))
    place = folder.absolute() / "slurm"
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / "job.sh", SCRIPT)
    logs = str(place).replace("\\", "\\\\").replace("%", "%%")
    fixed = [sys.executable, *arguments]
    return Plan([
        "sbatch",
        f"--job-name={folder.absolute().name}",
        f"--chdir={pathlib.Path.cwd()}",
        f"--output={logs}/{'%A_%a' if keys else '%j'}.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{GRACE}",
        *([f"--array=0-{tasks - 1}"] if keys else []),
        *(f"--{name}={value}" if value else f"--{name}" for name, value in options.items()),
        str(place / "job.sh"),
        str(tasks),
        str(len(fixed)),
        *fixed,
        *keys,
    ])  # fmt: skip
