"""The slurm launcher: what sbatch gets, and what its script does, with recorders in place of SLURM's programs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tl_jax.studies import launchers

HOSTILE = ["a b", "it's", '"quoted"', "$(touch /tmp/never)", "`id`", "line\nbreak", "%j", "*", "\\", "--flag=x y", ""]
STEP = ["--kill-on-bad-exit=0", "--wait=12"]  # of srun
RECORDER = """#!{python}
import json, os, pathlib, sys
name = pathlib.Path(sys.argv[0]).name
with open({log!r}, "a") as file:
    stdin = "" if sys.stdin.isatty() else sys.stdin.read()
    file.write(json.dumps([name, *sys.argv[1:], {{"stdin": stdin}}]) + "\\n")
print(os.environ.get("ANSWER_" + name, ""))
sys.exit(int(os.environ.get("CODE_" + name, 0)))
"""


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """Puts programs first on PATH that write down how they were called; returns what was written."""
    folder, log = tmp_path / "programs", tmp_path / "calls"
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "scontrol", "gcloud", "kubectl", "python3"):
        (folder / name).write_text(RECORDER.format(python=sys.executable, log=str(log)))
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def calls():
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return calls


def make_study(workdir, states):
    """A planned study as the launcher sees it: `{key: a file in the run's folder}`."""
    for key, name in states.items():
        (workdir / "runs" / key).mkdir(parents=True)
        (workdir / "runs" / key / name).write_text("{}")
    rows = [{"key": key, "levels": {"run": key}, "seed": 0, "fold": ""} for key in states]
    plan = {"name": "x", "question": "", "baseline": {}, "seeds": [0], "metrics": ["accuracy"], "design": "holdout"}
    plan |= {"factors": {"run": {key: {} for key in states}}, "runs": rows}
    (workdir / "study.json").write_text(json.dumps(plan))
    return workdir


def words_of(call):
    return call[1:-1]


def test_a_study_is_printed_as_one_command_and_runs_nothing(tmp_path, recorder, capfd):
    workdir = make_study(
        tmp_path / "w", {"k0": "config.json", "k1": "result.json", "k2": "claim.json", "k3": "failed.json"}
    )
    assert launchers.hand_out("slurm", workdir, settings="partition=gpu,gres=gpu:a:1,nodelist=n1,n2,exclusive=") == 0
    printed = capfd.readouterr().out
    assert recorder() == [] and "add --submit" in printed
    subprocess.run(["bash", "-c", printed], check=True)
    (call,) = recorder()
    assert words_of(call) == [
        "--job-name=w", f"--chdir={pathlib.Path.cwd()}", f"--output={workdir}/slurm/%A_%a.log", "--open-mode=append",
        "--requeue", "--signal=TERM@120", "--array=0-1", "--partition=gpu", "--gres=gpu:a:1", "--nodelist=n1,n2",
        "--exclusive", f"{workdir}/slurm/job.sh", "2", "5", sys.executable, "-m", "tl_jax.studies.worker", str(workdir),
        "--only", "k0", "k2",
    ]  # fmt: skip


def test_submitting_runs_sbatch_and_gives_its_exit_code(tmp_path, recorder, monkeypatch):
    workdir = make_study(tmp_path / "w", {"k0": "config.json", "k1": "config.json"})
    monkeypatch.setenv("CODE_sbatch", "3")
    assert launchers.hand_out("slurm", workdir, jobs=1, submit=True) == 3
    (call,) = recorder()
    assert call[0] == "sbatch" and "--array=0-0" in call and words_of(call)[-2:] == ["k0", "k1"]


def test_nothing_to_do_submits_nothing(tmp_path, recorder, capfd):
    assert launchers.hand_out("slurm", make_study(tmp_path / "w", {"k0": "result.json"}), submit=True) == 0
    assert recorder() == [] and "nothing to do" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["a b", "it's", "$(x)", "50%", "back\\slash", "line\nbreak"])
def test_hostile_names_reach_the_program_as_they_are(tmp_path, recorder, capfd, name):
    workdir = tmp_path / name
    assert launchers.hand_out("slurm", workdir, command=["launch.py", *HOSTILE], settings=f"comment={name}") == 0
    subprocess.run(["bash", "-c", capfd.readouterr().out], check=True)
    (call,) = recorder()
    words = words_of(call)
    assert f"--comment={name}" in words and "--array=0-0" not in words
    script = words.index(f"{workdir}/slurm/job.sh")
    assert words[script + 1 :] == ["1", str(2 + len(HOSTILE)), sys.executable, "launch.py", *HOSTILE]
    log = next(word for word in words if word.startswith("--output="))
    assert log.replace("%%", "%").replace("\\\\", "\\") == f"--output={workdir}/slurm/%j.log"
    subprocess.run(["bash", *words[script:]], check=True, stdin=subprocess.DEVNULL)  # the script, as sbatch would
    (call,) = recorder()
    assert call[0] == "srun" and words_of(call) == [*STEP, sys.executable, "launch.py", *HOSTILE]
    assert not pathlib.Path("/tmp/never").exists()


@pytest.mark.parametrize(("runs", "jobs"), [(1, 0), (5, 0), (5, 2), (5, 9), (2500, 0)])
def test_every_run_belongs_to_exactly_one_task(tmp_path, recorder, runs, jobs):
    keys = [f"k{i}" for i in range(runs)]
    words = launchers.slurm(["worker"], keys, "", tmp_path, jobs)[0]
    tasks = int(next(word for word in words if word.startswith("--array=0-")).removeprefix("--array=0-")) + 1
    assert tasks == min(runs, jobs or runs, 1000)
    taken = []
    for task in range(tasks) if tasks < 10 else (0, 499, 999):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
        script = words[words.index(f"{tmp_path}/slurm/job.sh") :]
        subprocess.run(["bash", *script], check=True, env=environment, stdin=subprocess.DEVNULL)
        (call,) = recorder()
        assert words_of(call)[:4] == [*STEP, sys.executable, "worker"]
        taken += words_of(call)[4:]
    assert sorted(taken) == sorted(keys if tasks < 10 else [key for i in (0, 499, 999) for key in keys[i::1000]])


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [(0, "RUNNING", False), (75, "RUNNING", True), (75, "CANCELLED", False), (1, "RUNNING", False)],
)
def test_only_a_job_that_was_stopped_and_not_cancelled_is_requeued(tmp_path, recorder, code, state, requeued):
    words = launchers.slurm(["x"], (), "", tmp_path)[0]
    environment = {**os.environ, "CODE_srun": str(code), "ANSWER_squeue": state, "SLURM_JOB_ID": "7"}
    job = subprocess.run(
        ["bash", *words[words.index(f"{tmp_path}/slurm/job.sh") :]], env=environment, stdin=subprocess.DEVNULL
    )
    calls = [call[:-1] for call in recorder()]
    assert (["scontrol", "requeue", "7"] in calls) == requeued
    assert job.returncode == (0 if requeued else code)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("array=0-3", "--slurm sets array, which the launcher decides"),
        ("chdir=/x,wrap=y", "sets chdir, wrap"),
        ("gpu", "these are not: .'gpu'."),
    ],
)
def test_options_that_the_launcher_decides_or_cannot_read_are_an_error(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        launchers.slurm(["x"], (), settings, tmp_path)


def test_without_the_scheduler_submitting_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no program 'sbatch' here"):
        launchers.hand_out("slurm", tmp_path, command=["launch.py"], submit=True)


def test_the_command_that_is_handed_over_has_no_flags_of_the_handing_over():
    argv = [
        "launch.py",
        "--launcher",
        "slurm",
        "--config=c.py",
        "--slurm=a=b",
        "--submit",
        "--cloud",
        "x=y",
        "--workdir",
        "w",
    ]
    assert launchers.own_arguments(argv) == ["launch.py", "--config=c.py", "--workdir", "w"]
