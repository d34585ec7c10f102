"""What docs/clusters.md promises of SLURM, proved on a running one; started by slurm.sh, in an empty folder."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tl_jax.studies import launchers  # noqa: E402

RUN = ["launch.py", "--config", "configs/smoke.py", "--config.method.name=full", "--config.total=(20,'steps')"]
RUN += ["--config.eval_every=(10,'steps')"]
LONG = [*RUN[:-2], "--config.total=(100000,'steps')", "--config.eval_every=(50000,'steps')"]
TINY = '''"""Does SLURM carry a study?"""

from configs import smoke
from tl_jax.studies.study import Study


def get_study(arg=""):
    levels = {name: {"method.name": name} for name in ("linear_probe", "full")}
    return Study(base=smoke.get_config(), factors={"method": levels}, seeds=(0, 1))
'''


def run(*words):
    """The output of a command that must succeed."""
    done = subprocess.run([str(word) for word in words], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def until(condition, what, seconds=240):
    """Waits, and returns what the condition gave when it was true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.2)
    return value


def text_of(path):
    return path.read_text() if path.exists() else ""


def submit(folder, command, settings):
    """Hands a run to SLURM as the launcher does; returns the job and its log."""
    words, _ = launchers.slurm(command, (), settings, folder)
    job = run(words[0], "--parsable", *words[1:]).strip()
    return job, folder / "slurm" / f"{job}.log"


def has_ended(job):
    return lambda: (
        not run("squeue", "--noheader", f"--job={job}", "--states=all", "--format=%T").strip()
        or (state_of(job) in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"))
    )


def says(job, log, words):
    """Waits for words in the log of a job, which must not end before."""
    until(lambda: words in text_of(log) or has_ended(job)(), words)
    assert words in text_of(log), text_of(log)


def state_of(job):
    return re.search(r"JobState=(\w+)", run("scontrol", "show", "job", job))[1]


def process_of(job, index):
    """The PID of a task of a job, by the environment that SLURM gave it."""
    mine = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={index}", "SLURM_STEP_NUM_TASKS=2"}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if (
                mine <= set((path / "environ").read_text().split("\0"))
                and "launch.py" in (path / "cmdline").read_text()
            ):
                return int(path.name)
        except OSError:
            continue  # it ended meanwhile
    raise AssertionError(f"job {job} has no process {index}")


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row.get("train/loss", row.get("val/loss")) for row in rows]


def study_as_a_job_array(place):
    (place / "tiny").mkdir()
    (place / "tiny" / "study.py").write_text(TINY)
    workdir = place / "a study's $(workdir) 50%"
    front = [sys.executable, "launch.py", "--study", place / "tiny", "--workdir", workdir, "--launcher", "slurm"]
    output = run(*front, "--slurm", "cpus-per-task=1", "--submit")
    job = re.search(r"Submitted batch job (\d+)", output)[1]
    until(has_ended(job), "the array")
    results = list(workdir.glob("runs/*/result.json"))
    logs = "\n".join(path.read_text() for path in workdir.glob("slurm/*.log"))
    assert len(results) == 4, logs
    assert len(list(workdir.glob("slurm/*.log"))) == 4
    run(sys.executable, "-m", "tl_jax", "report", workdir)
    return "4 runs, 4 array tasks, one report"


def a_run_inside_an_allocation_is_one_process(place):
    output = run("salloc", "--ntasks=2", sys.executable, *RUN, "--workdir", place / "one")
    assert "Gloo" not in output and (place / "one" / "result.json").exists()
    return "salloc -n2 without srun connects to nobody"


def two_processes_give_the_losses_of_one(place):
    output = run("srun", "--ntasks=2", sys.executable, *RUN, "--workdir", place / "two")
    assert "Gloo" in output and output.count("step 20/20  loss") == 1
    pairs = list(zip(losses(place / "one"), losses(place / "two"), strict=True))
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    assert worst < 1e-5, pairs
    return f"{len(pairs)} losses, largest relative difference {worst:.1e}"


def a_stopped_job_is_requeued_and_ends_bit_equal(place):
    job, log = submit(place / "stopped", [*RUN, "--workdir", str(place / "stopped")], "ntasks=2")
    says(job, log, "transfer audit")  # before the first step, as twenty of them take a moment
    run("scancel", "--signal=TERM", job)
    until(has_ended(job), "its end, requeued in between")
    text = log.read_text()
    assert state_of(job) == "COMPLETED" and "Restarts=1" in run("scontrol", "show", "job", job), text
    stopped, resumed = (int(re.search(rf"{word} after step (\d+)", text)[1]) for word in ("stopped", "resumed"))
    seen = max(map(int, re.findall(r"step (\d+)/20  loss", text.partition("stopped")[0])), default=0)
    assert seen <= stopped == resumed < 20, text
    for name in ("metrics.jsonl", "result.json", "audit.json", "model.safetensors"):
        assert (place / "stopped" / name).read_bytes() == (place / "two" / name).read_bytes(), name
    return f"stopped and resumed after step {stopped}, {seen} seen; all files bit-equal"


def a_cancelled_job_stays_cancelled(place):
    job, log = submit(place / "cancelled", [*LONG, "--workdir", str(place / "cancelled")], "ntasks=2")
    says(job, log, "step 5/")
    run("scancel", job)
    until(has_ended(job), "its end")
    assert state_of(job) == "CANCELLED" and "stopped after step" in log.read_text()
    return "plain scancel: everything saved, no requeue"


def lost(place, number, words):
    """Sends a signal to process 1 of a job of two; returns how long the job lived on."""
    folder = place / f"lost{number}"
    job, log = submit(folder, [*LONG, "--workdir", str(folder)], "ntasks=2")
    says(job, log, "step 5/")
    pid = process_of(job, 1)
    os.kill(pid, number)
    began = time.monotonic()
    until(has_ended(job), "its end", 60)
    seconds = time.monotonic() - began
    text = log.read_text()
    (line,) = re.findall(r"error: process 0 of 2 .*", text)
    assert f"because process 1 of 2 ({os.uname().nodename}, pid {pid}) {words}" in line, text
    assert seconds <= 40 and state_of(job) == "FAILED"
    return f"{seconds:.0f} s: {line[7:]}"


def a_killed_process_ends_the_job_and_is_named(place):
    return lost(place, signal.SIGKILL, "was killed or crashed")


def a_suspended_process_ends_the_job_and_is_named(place):
    return lost(place, signal.SIGSTOP, "was not heard of for 20 s")


CHECKS = [
    study_as_a_job_array,
    a_run_inside_an_allocation_is_one_process,
    two_processes_give_the_losses_of_one,
    a_stopped_job_is_requeued_and_ends_bit_equal,
    a_cancelled_job_stays_cancelled,
    a_killed_process_ends_the_job_and_is_named,
    a_suspended_process_ends_the_job_and_is_named,
]


def main(place):
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    rows = []
    for check in CHECKS:
        began = time.monotonic()
        try:
            word, text = "passed", check(place)
        except Exception as error:  # the other checks do not depend on it
            word, text = "FAILED", f"{type(error).__name__}: {error}"
        rows.append((word, check.__name__.replace("_", " "), f"{time.monotonic() - began:.0f} s", text))
        print(f"{rows[-1][0]}: {rows[-1][1]} ({rows[-1][2]})", flush=True)
    print()
    for word, name, seconds, text in rows:
        print(f"{word}  {name:<48}{seconds:>6}  {text}")
    return int(any(row[0] == "FAILED" for row in rows))


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
