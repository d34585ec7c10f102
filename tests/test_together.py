"""Runs of a study that are trained together: which ones, and that they end as runs by themselves, killed or not."""

import errno
import pathlib
import subprocess
import sys
import time

import pytest
from test_replicas import assert_same_run, make_config, remains

from tl_jax import config
from tl_jax.core.files import no_room, read_json, write_json
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import store, together, worker
from tl_jax.studies.report import results
from tl_jax.studies.study import Study

ROOT = pathlib.Path(__file__).resolve().parents[1]
RATES = {
    "high": {"lr": 1e-2},
    "low": {"lr": 1e-3, "weight_decay": 0.1},
    "grouped": {"groups": {"head": {"lr_mult": 2.0}}},
}
OTHERS = {
    "more": {"batch_size": 16},
    "last": {"method.name": "last_k", "method.k": 1},
    "cached": {"method.name": "last_k", "method.k": 1, "cache": "features"},
    "cached, slow": {"method.name": "last_k", "method.k": 1, "cache": "features", "lr": 0.02},
    "ridge": {"method.name": "ridge", "select": "last"},
}


def plan(workdir, levels=RATES, seeds=(0, 1), which="heads", **changes):
    base = make_config(changes, replicas=(), resamples=2)
    study = Study(base, {"rate": levels}, seeds=seeds, together=which)
    return store.plan(workdir, "rates", "Which rate?", study)


def keys_of(runs, *levels, seeds=(0, 1)):
    return [run.key for run in runs if run.levels["rate"] in levels and run.seed in seeds]


def test_what_trains_a_head_alone_and_differs_in_rates_is_one_set(tmp_path):
    runs = plan(tmp_path, {**RATES, **OTHERS})
    found = together.sets(tmp_path, [run.key for run in runs], "heads")
    rates = [keys_of(runs, *RATES, seeds=(seed,)) for seed in (0, 1)]
    assert [keys for keys in found if len(keys) > 1] == rates and len(found) == 12
    rates += [keys_of(runs, "cached", "cached, slow", seeds=(seed,)) for seed in (0, 1)]
    found = together.sets(tmp_path, [run.key for run in runs], "cached")
    assert sorted(keys for keys in found if len(keys) > 1) == sorted(rates)
    assert together.sets(tmp_path, [run.key for run in runs], "all")[0] == keys_of(runs, *RATES)
    assert all(len(keys) == 1 for keys in together.sets(tmp_path, [run.key for run in runs], "none"))


def test_shots_are_one_set_only_where_no_duration_counts_epochs(tmp_path):
    flats = [config.flatten(config.override(make_config(replicas=()), {"data.shots": shots})) for shots in (2, 3)]
    assert len({together.form_of(flat, "all") for flat in flats}) == 1
    assert len({together.form_of({**flat, "eval_every": [1.0, "epochs"]}, "all") for flat in flats}) == 2


def test_a_set_that_was_begun_stays_as_it_is_and_can_be_parted(tmp_path):
    runs = plan(tmp_path, seeds=(0,))
    keys, home = together.members(tmp_path, runs[0].key)
    assert keys == [run.key for run in runs] and home.parent == tmp_path / "together"
    more = plan(tmp_path, {**RATES, "higher": {"lr": 0.1}}, seeds=(0,))
    assert together.members(tmp_path, runs[1].key) == (keys, home)
    assert together.members(tmp_path, more[3].key) == ([more[3].key], None)
    together.separate(home, "too large")
    assert together.members(tmp_path, runs[1].key) == ([runs[1].key], None)


@pytest.mark.parametrize("which", ["heads", "none"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "faulty", "a.json"), no_room("a checkpoint needs more")])
def test_a_disk_that_fails_is_no_failure_of_a_run_and_parts_no_set(tmp_path, monkeypatch, capsys, which, error):
    runs = plan(tmp_path, seeds=(0,), which=which)

    def fail(*_):
        raise error

    monkeypatch.setattr(worker, "train_run", fail)
    monkeypatch.setattr(worker, "train_runs", fail)
    assert worker.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"
    assert set(store.states(tmp_path).values()) == {"todo"}
    assert which == "none" or together.members(tmp_path, runs[0].key)[0] == [run.key for run in runs]


@pytest.mark.slow
def test_a_study_does_its_sets_as_it_does_runs_one_by_one(tmp_path, capsys):
    runs = plan(tmp_path / "w", seeds=(0,))
    with pytest.raises(Preempted):
        worker.work(tmp_path / "w", stop_requested=stopper(1))
    assert set(store.states(tmp_path / "w").values()) == {"todo"}
    worker.work(tmp_path / "w")
    assert set(store.states(tmp_path / "w").values()) == {"done"}
    assert "[3/3] rate=high, seed 0: accuracy" in capsys.readouterr().out
    plan(tmp_path / "alone", seeds=(0,), which="none")
    worker.work(tmp_path / "alone", only=[runs[1].key])
    assert_same_run(*(store.run_folder(tmp_path / name, runs[1].key) for name in ("w", "alone")))
    assert [run.state for run in results.load(tmp_path / "w").runs()] == ["done"] * 3


def wait_and_kill(workdir, pattern):
    """Starts a worker and kills it as soon as a path is there."""
    process = subprocess.Popen([sys.executable, "-m", "tl_jax.studies.worker", str(workdir)], cwd=ROOT)
    while not list(workdir.glob(pattern)) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_set_whose_worker_is_killed_twice_ends_bit_equal_to_an_unbroken_one(tmp_path):
    for name in ("w", "unbroken"):
        plan(tmp_path / name, seeds=(0,), total=(60.0, "steps"), eval_every=(10.0, "steps"))
    wait_and_kill(tmp_path / "w", "together/*/checkpoints/20")
    assert set(store.states(tmp_path / "w").values()) == {"stale"}
    wait_and_kill(tmp_path / "w", "runs/*/result.json")
    assert "done" in store.states(tmp_path / "w").values()
    for name in ("w", "unbroken"):
        subprocess.run([sys.executable, "-m", "tl_jax.studies.worker", str(tmp_path / name)], cwd=ROOT, check=True)
    assert set(store.states(tmp_path / "w").values()) == {"done"}
    assert remains(tmp_path / "w" / "runs") == remains(tmp_path / "unbroken" / "runs")


def stopper(steps):
    """Asks to stop once that many steps were asked about."""
    asked = []

    def stop_requested(*step):
        asked.extend(step)
        return len(asked) >= steps

    return stop_requested


@pytest.fixture
def outcomes(monkeypatch):
    """Sets that take no time: a function of the folders that gives their outcomes, by default a result each."""
    made = {"function": lambda folders: [{"metrics": {"accuracy": {"value": 0.5}}, "extra_eval": {}} for _ in folders]}

    def train_runs(folders, wanted, home, stop_requested):
        found = [outcome if folder else None for outcome, folder in zip(made["function"](folders), wanted, strict=True)]
        for folder, outcome in zip(wanted, found, strict=True):
            if isinstance(outcome, dict):
                write_json(folder / "result.json", outcome)
        return found

    def train_run(folder, stop_requested):
        made.setdefault("alone", []).append(folder.name)
        raise ValueError("does not fit")

    monkeypatch.setattr(worker, "train_runs", train_runs)
    monkeypatch.setattr(worker, "train_run", train_run)
    return made


def fail(folders):
    raise ValueError("does not fit")


def test_a_run_that_diverges_fails_and_the_others_are_done(tmp_path, outcomes):
    runs, result = plan(tmp_path, seeds=(0,)), {"metrics": {"accuracy": {"value": 0.5}}, "extra_eval": {}}
    outcomes["function"] = lambda folders: [result, FloatingPointError("not finite"), result]
    worker.work(tmp_path)
    assert list(store.states(tmp_path).values()) == ["done", "failed", "done"]
    failure = read_json(store.run_folder(tmp_path, runs[1].key) / "failed.json")
    assert failure["error"] == "FloatingPointError: not finite" and "together" in failure["log"][-1]
    assert store.retry(tmp_path) == 1 and "alone" not in outcomes


def test_a_set_that_cannot_be_trained_is_done_one_by_one(tmp_path, outcomes, capsys):
    runs = plan(tmp_path, seeds=(0,))
    outcomes["function"] = fail
    worker.work(tmp_path)
    assert outcomes["alone"] == [run.key for run in runs]
    assert "and 2 runs with it are done one by one: does not fit" in capsys.readouterr().out
    assert set(store.states(tmp_path).values()) == {"failed"}  # each with its own error


def test_a_set_whose_process_keeps_dying_is_done_one_by_one(tmp_path, outcomes):
    runs = plan(tmp_path, seeds=(0,))
    together.members(tmp_path, runs[0].key)
    for run in runs:
        write_json(store.run_folder(tmp_path, run.key) / "claim.json", {"pid": 1, "attempts": 2, "step": -1})
    worker.work(tmp_path)
    assert outcomes["alone"] == [run.key for run in runs]


def test_only_the_runs_that_were_asked_for_are_claimed(tmp_path, outcomes):
    runs = plan(tmp_path, seeds=(0,))
    together.members(tmp_path, runs[0].key)
    worker.work(tmp_path, only=[run.key for run in runs[:2]])
    assert list(store.states(tmp_path).values()) == ["done", "done", "todo"]
    worker.work(tmp_path)
    assert list(store.states(tmp_path).values()) == ["done", "done", "done"]
