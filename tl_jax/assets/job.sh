#!/bin/bash
# job.sh TASKS FIXED COMMAND... KEY...: runs COMMAND, which is FIXED words, and gives it every TASKS-th KEY.
# As a step, srun, because only steps are signalled; with as many tasks as the job has.
tasks=$1 fixed=$2
shift 2
command=("${@:1:fixed}")
keys=("${@:fixed + 1}")
for ((k = ${SLURM_ARRAY_TASK_ID:-0}; k < ${#keys[@]}; k += tasks)); do command+=("${keys[k]}"); done
trap : TERM  # the step saves and ends; this shell outlives it
# The tasks of a run end together, but not in the same second: the last ones must not be killed on their way out.
srun --kill-on-bad-exit=0 --wait=12 "${command[@]}"
code=$?
# 75: stopped, with everything saved. A cancelled job is not running any more, and stays cancelled.
if [ "$code" = 75 ] && [ "$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
