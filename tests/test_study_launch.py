"""Studies as they run: workers that share the runs, failures, kills and restarts, and the front door."""

import contextlib
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading

import pytest
from test_store import RESULT, finish, plan
from test_train import remains

from tl_jax.core.files import read_json, write_json
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import launchers, local, store, worker

ROOT = pathlib.Path(__file__).resolve().parents[1]
STUDY = '''"""How many shots?"""

from configs import smoke
from tl_jax.studies.study import Study


def get_study(arg=""):
    factors = {"rate": {"low": {}, "high": {"lr": 1e-2}, "unreadable": {"data.source": "arrays:nowhere.npz"}}}
    return Study(smoke.get_config(arg), factors, baseline={"rate": "low"}, seeds=(0, 1))
'''


def runs_done(workdir, word="done"):
    return [key for key, state in store.states(workdir).items() if state == word]


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that take no time; gives the list of those that were done, in order."""
    done = []

    def train_run(folder, stop_requested):
        done.append(folder.name)
        write_json(folder / "result.json", RESULT)
        return RESULT

    monkeypatch.setattr(worker, "train_run", train_run)
    return done


def test_workers_that_share_a_study_do_each_run_exactly_once(tmp_path, fake_runs, monkeypatch):
    runs = plan(tmp_path, seeds=range(8))
    # Output is turned for a whole process, and here the workers are threads of one.
    monkeypatch.setattr(worker, "output_into", lambda path: contextlib.nullcontext())
    workers = [threading.Thread(target=worker.work, args=(tmp_path,)) for _ in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert sorted(fake_runs) == sorted(run.key for run in runs) and runs_done(tmp_path) == [run.key for run in runs]


def test_a_worker_takes_what_nobody_tried_before_what_died(tmp_path, fake_runs):
    runs = plan(tmp_path)
    write_json(store.run_folder(tmp_path, runs[0].key) / "claim.json", {"pid": 1, "attempts": 1, "step": -1})
    worker.work(tmp_path)
    assert fake_runs == [run.key for run in (*runs[1:], runs[0])]


def test_only_the_runs_that_were_asked_for_are_taken(tmp_path, fake_runs):
    runs = plan(tmp_path)
    worker.work(tmp_path, only=[runs[2].key])
    assert fake_runs == [runs[2].key]
    with pytest.raises(ValueError, match="has no run abc; its study has 8 runs"):
        worker.work(tmp_path, only=["abc"])


def test_a_failing_run_stops_no_other_and_is_told_with_the_end_of_its_log(tmp_path, monkeypatch, capfd):
    runs = plan(tmp_path)

    def train_run(folder, stop_requested):
        if folder.name == runs[1].key:
            for i in range(30):
                os.write(1 + i % 2, f"line {i}\n".encode())  # as a library would, past Python's sys.stdout
            print("the end")
            raise FloatingPointError("not finite")
        write_json(folder / "result.json", RESULT)
        return RESULT

    monkeypatch.setattr(worker, "train_run", train_run)
    worker.work(tmp_path)
    assert len(runs_done(tmp_path)) == 7 and runs_done(tmp_path, "failed") == [runs[1].key]
    failure = read_json(store.run_folder(tmp_path, runs[1].key) / "failed.json")
    assert failure["error"] == "FloatingPointError: not finite" and failure["attempts"] == 1
    place = failure["log"].index("the end")
    assert failure["log"][:place] == [f"line {i}" for i in range(30 - place, 30)] and len(failure["log"]) == 20
    assert failure["log"][-1] == "FloatingPointError: not finite"  # of the traceback
    shown = capfd.readouterr().out
    assert "[2/8] trained=head, shots=4, seed 0: failed: FloatingPointError: not finite\n" in shown
    assert re.search(r"\[8/8\] trained=last, shots=4, seed 1: accuracy 0.500 \(\d+\.\d s\)\n", shown)
    assert "line 29" not in shown
    local.tell_failures(tmp_path)
    told = capfd.readouterr().out
    assert "failed: FloatingPointError: not finite\n  trained=head, shots=4, seed 0: " in told
    assert "    | line 29\n    | the end\n    | Traceback" in told


def test_a_stopped_worker_gives_its_run_back(tmp_path, monkeypatch):
    runs = plan(tmp_path)

    def train_run(folder, stop_requested):
        assert store.state(folder) == "running" and not stop_requested()
        raise Preempted("stopped after step 2 of 4")

    monkeypatch.setattr(worker, "train_run", train_run)
    with pytest.raises(Preempted):
        worker.work(tmp_path)
    assert store.states(tmp_path) == {run.key: "todo" for run in runs}
    with pytest.raises(Preempted, match="between two runs"):
        worker.work(tmp_path, stop_requested=lambda *_: True)


def start_script(monkeypatch, script):
    """Workers that are this script; gives the list of their processes."""
    started = []

    def start_worker(workdir, slot):
        started.append(subprocess.Popen([sys.executable, "-c", script, str(workdir)]))
        return started[-1]

    monkeypatch.setattr(local, "start_worker", start_worker)
    return started


@pytest.mark.parametrize(("code", "starts"), [(3, local.EMPTY_HANDED), (2, 1)])
def test_workers_that_cannot_start_or_say_what_they_need_are_given_up(tmp_path, monkeypatch, capsys, code, starts):
    plan(tmp_path)
    started = start_script(monkeypatch, f"raise SystemExit({code})")
    assert local.launch(tmp_path, jobs=2) == 1
    assert len(started) == 2 * starts
    assert f"a worker ended with code {code}" in capsys.readouterr().out


def test_a_worker_that_died_is_started_again_while_there_are_runs(tmp_path, monkeypatch, capsys):
    """Each of these workers does one run and is killed in the next; the last run is marked as failed by its fourth."""
    runs = plan(tmp_path)
    monkeypatch.setattr(local, "tell_answer", lambda workdir: None)
    script = """
import json, os, pathlib, signal, sys
place = pathlib.Path(sys.argv[1])
left = [row["key"] for row in json.loads((place / "study.json").read_text())["runs"]
        if not (place / "runs" / row["key"] / "result.json").exists()]
(place / "runs" / left[0] / "claim.json").unlink(missing_ok=True)
(place / "runs" / left[0] / "result.json").write_text("{}")
if left[1:]:
    claim = {"host": "", "pid": os.getpid(), "attempts": 1, "step": -1}
    (place / "runs" / left[1] / "claim.json").write_text(json.dumps(claim))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    started = start_script(monkeypatch, script)
    assert local.launch(tmp_path, jobs=1) == 0
    assert [process.returncode for process in started] == [-9] * 7 + [0] and len(runs_done(tmp_path)) == len(runs)
    assert "a worker ended with code -9 in trained=head, shots=4, seed 0" in capsys.readouterr().out


def test_a_request_to_stop_is_passed_on_to_the_workers(tmp_path, monkeypatch, capsys):
    plan(tmp_path)
    started = start_script(monkeypatch, "import signal; signal.sigwait({signal.SIGTERM}); raise SystemExit(75)")
    # The signal may come before the script waits for it: then it ends by the signal, which is as good.
    assert local.launch(tmp_path, jobs=2, stop_requested=lambda: len(started) == 2) == 75
    assert {process.returncode for process in started} <= {75, -15}
    assert "the same command goes on from there" in capsys.readouterr().out


def test_no_more_workers_are_started_than_there_are_runs_to_do(tmp_path, monkeypatch):
    runs = plan(tmp_path)
    finish(tmp_path, *runs[:-1])
    started = start_script(monkeypatch, "raise SystemExit(75)")
    assert local.launch(tmp_path, jobs=5) == 75 and len(started) == 1


def test_cores_and_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr(local.machine, "cores", lambda: (2, 3, 4, 5, 6))
    assert [slot.cores for slot in local.divide(2, {"JAX_PLATFORMS": "cpu"})] == [(2, 3), (4, 5, 6)]
    several = [slot.cores for slot in local.divide(10, {"JAX_PLATFORMS": "cpu"})]
    assert several == [(core,) for core in (2, 2, 3, 3, 4, 4, 5, 5, 6, 6)]
    slots = [slot.environment for slot in local.divide(3, {"CUDA_VISIBLE_DEVICES": "4,7"})]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["4", "7", "4"]
    memory = [slot.get("XLA_PYTHON_CLIENT_MEM_FRACTION") for slot in slots]
    assert memory == ["0.450", None, "0.450"]
    assert [slot.environment for slot in local.divide(1, {"CUDA_VISIBLE_DEVICES": "0", "JAX_PLATFORMS": "cpu"})] == [{}]


def start(*args, **environment):
    """launch.py in a process of its own, with one device and quick compilation."""
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "launch.py", *map(str, args)], cwd=ROOT, env={**os.environ, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1,
    )  # fmt: skip


def launch(*args, **environment):
    process = start(*args, **environment)
    output, _ = process.communicate()
    return process.returncode, output


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--study", "experiments/freeze_dept"], "did you mean 'experiments/freeze_depth'"),
        (["--study", "experiments/freeze_depth:lrr=1"], "did you mean 'lr'"),
        (["--study", "experiments/freeze_depth", "--config", "configs/smoke.py"], "two things to run"),
        (["--config", "configs/smoke.py", "--retry"], "--retry: only a study has these"),
        (["--study", "experiments/freeze_depth", "--jobs", "-1"], "jobs"),
        (["--study", "experiments/freeze_depth", "--submit"], "add --launcher slurm"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path, args, message):
    code, output = launch(*args, "--workdir", tmp_path / "w")
    assert code == 2 and message in output and "Traceback" not in output and len(output.splitlines()) < 8, output
    assert not (tmp_path / "w").exists()


@pytest.fixture
def study(tmp_path):
    (tmp_path / "shots").mkdir()
    (tmp_path / "shots" / "study.py").write_text(STUDY)
    return ["--study", tmp_path / "shots", "--workdir", tmp_path / "w"]


@pytest.mark.slow
def test_a_study_runs_to_its_report_although_some_of_its_runs_fail(tmp_path, study):
    code, output = launch(*study, "--jobs", "2", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    assert code == 1, output
    done = re.findall(r"\] (rate=.*): accuracy", output)
    assert sorted(done) == [f"rate={rate}, seed {seed}" for rate in ("high", "low") for seed in (0, 1)]
    assert output.count("failed: FileNotFoundError") == 3
    assert re.search(r"    \| FileNotFoundError: data.source = .*: no file", output)
    assert re.search(r"\n *high +0\.\d{3} ", output) and (tmp_path / "w" / "report.md").exists()
    assert sorted(store.states(tmp_path / "w").values()) == ["done"] * 4 + ["failed"] * 2


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_study_that_is_stopped_goes_on_with_the_same_command(study):
    process, first = start(*study, "--jobs", "2"), ""
    for line in process.stdout:
        if ": accuracy" in line:
            first = line
            process.send_signal(signal.SIGTERM)
            break
    output = first + process.communicate()[0]
    assert process.returncode == 75 and "the same command goes on from there" in output, output
    code, rest = launch(*study, "--jobs", "2")
    assert code == 1, rest
    assert len(set(re.findall(r"\] (rate=.*): accuracy", output + rest))) == 4
    assert len(re.findall(r"\] (rate=.*): accuracy", output + rest)) == 4


def test_a_dry_run_checks_every_cell_and_writes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "study.py").write_text(STUDY.replace(', "unreadable": {"data.source": "arrays:nowhere.npz"}', ""))
    assert launchers.start(str(tmp_path), tmp_path / "w", dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "4 runs in 2 cells" in shown and "to do: 4 runs, 16 steps, 256 examples" in shown and "at least" in shown
    assert not (tmp_path / "w").exists()
    (tmp_path / "study.py").write_text(STUDY)
    with pytest.raises(ValueError, match=r"rate=unreadable: (.|\n)*nowhere.npz"):
        launchers.start(str(tmp_path), tmp_path / "w", dry_run=True)


def test_a_dry_run_estimates_the_rest_from_what_is_finished(tmp_path, capsys):
    (tmp_path / "study.py").write_text(STUDY.replace(', "unreadable": {"data.source": "arrays:nowhere.npz"}', ""))
    name, question, study = launchers.studies.load(str(tmp_path))
    runs = store.plan(tmp_path / "w", name, question, study)
    finish(tmp_path / "w", *runs[:2])
    for run, seconds in zip(runs[:2], (30.0, 60.0), strict=True):  # one of each cell
        write_json(store.run_folder(tmp_path / "w", run.key) / "cost.json", {"seconds": seconds})
    assert launchers.start(str(tmp_path), tmp_path / "w", jobs=1, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "to do: 2 runs, 8 steps, 128 examples" in shown
    assert "about 90 s with 1 at once, by the 2 finished runs here" in shown


def children(pid):
    """The processes that this one has started, as the kernel lists them."""
    with contextlib.suppress(FileNotFoundError):
        return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def everything(workdir):
    """What the seed determines of every finished run; a worker whose launcher dies may leave a checkpoint more."""
    left = {key: remains(store.run_folder(workdir, key)) for key in runs_done(workdir)}
    return {key: {name: file for name, file in files.items() if name != "checkpoints"} for key, files in left.items()}


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_a_study_killed_at_random_moments_gives_the_results_of_an_unbroken_one(tmp_path, times):
    """SIGKILL to the launcher or to one of its workers, at any moment; the same command goes on, --retry at the end."""
    (tmp_path / "study.py").write_text(STUDY.replace(', "unreadable": {"data.source": "arrays:nowhere.npz"}', ""))
    study = ["--study", tmp_path, "--jobs", "2", "--retry"]
    code, output = launch(*study, "--workdir", tmp_path / "whole")
    assert code == 0, output
    whole, draw, kills, finished = everything(tmp_path / "whole"), random.Random(0), 0, 0
    while kills < times or not finished:
        target = tmp_path / f"killed{finished}"
        process = start(*study, "--workdir", target)
        if kills < times:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=draw.uniform(1.0, 9.0))
            workers = children(process.pid)
            victim = process.pid if draw.random() < 0.5 or not workers else draw.choice(workers)
            if process.poll() is None:
                os.kill(victim, signal.SIGKILL)
                kills += 1
        output = process.communicate()[0]  # ends when the workers have seen that their launcher is gone
        assert process.returncode in (0, -signal.SIGKILL), output
        if process.returncode == 0:
            assert everything(target) == whole and len(whole) == 4
            finished += 1
