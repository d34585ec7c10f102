"""The runs of a study in files: what a plan writes, the states of a run, and what happens when a process dies."""

import subprocess
import sys
import threading

import pytest
from test_study import FACTORS, make_study

from tl_jax import config
from tl_jax.core.files import read_json, write_json
from tl_jax.studies import store
from tl_jax.studies.study import grid

RESULT = {"metrics": {"accuracy": {"value": 0.5}}, "extra_eval": {"rotated": {"accuracy": {"value": None}}}}


def plan(workdir, **changes):
    return store.plan(workdir, "depth", "How deep?", make_study(**changes))


def finish(workdir, *runs):
    for run in runs:
        write_json(store.run_folder(workdir, run.key) / "result.json", RESULT)


@pytest.fixture
def folder(tmp_path):
    """One planned run."""
    return store.run_folder(tmp_path, plan(tmp_path)[0].key)


def test_a_plan_holds_all_that_the_report_and_the_workers_need(tmp_path):
    runs = plan(tmp_path, base={"data.workers": 2}, seeds=(3, 1))
    table = read_json(tmp_path / "study.json")
    rows = table.pop("runs")
    assert table == {
        "name": "depth", "question": "How deep?", "factors": FACTORS, "baseline": {"trained": "head"}, "seeds": [3, 1],
        "metrics": ["accuracy"], "design": "holdout", "together": "heads",
    }  # fmt: skip
    assert [(row["key"], row["levels"], row["seed"], row["fold"]) for row in rows] == [
        (run.key, run.levels, run.seed, run.fold) for run in runs
    ]
    for run in runs:
        assert read_json(store.run_folder(tmp_path, run.key) / "config.json") == config.flatten(run.config)
    assert store.states(tmp_path) == {run.key: "todo" for run in runs}


def test_levels_and_seeds_can_be_added_and_finished_runs_stay(tmp_path):
    runs = plan(tmp_path)
    finish(tmp_path, *runs[:3])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/config.json")}
    factors = {**FACTORS, "shots": {**FACTORS["shots"], "1": {"data.shots": 1}}}
    more = plan(tmp_path, factors=factors, seeds=(0, 1, 2), metrics=("nll",))
    words = store.states(tmp_path)
    assert len(more) == 18 and {run.key for run in runs} < set(words)
    assert {key for key, word in words.items() if word == "done"} == {run.key for run in runs[:3]}
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("width", {}, "holds the study 'depth', this is 'width'"),
        ("depth", {"base": {"lr": 0.5}}, r"3 finished or running run\(s\)(.|\n)*lr: 0.001 -> 0.5"),
        ("depth", {"seeds": (1, 2)}, "trained=head, shots=2, seed 0: not in this grid"),
        ("depth", {"factors": {**FACTORS, "shots": {"4": {}}}}, "trained=last, shots=2, seed 0: not in this grid"),
        ("depth", {"factors": {**FACTORS, "shots": {"2": {"data.shots": 3}, "4": {}}}}, "data.shots: 2 -> 3"),
    ],
)
def test_a_plan_that_would_lose_finished_runs_is_refused(tmp_path, name, changes, message):
    finish(tmp_path, *plan(tmp_path)[:3])
    before = (tmp_path / "study.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        store.plan(tmp_path, name, "How deep?", make_study(**changes))
    assert (tmp_path / "study.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_whose_config_json_lacks_an_option_goes_on(tmp_path):
    """As where the study is older than the option: the plan finds its runs again, done or not."""
    runs = plan(tmp_path)
    finish(tmp_path, runs[0])
    path, other = (store.run_folder(tmp_path, run.key) / "config.json" for run in runs[:2])
    now, full = config.identity(runs[0].config), read_json(path)
    for option in full.keys() - now.keys():
        for file in (path, other):
            write_json(file, {key: value for key, value in read_json(file).items() if key != option})
        assert [run.key for run in plan(tmp_path)] == [run.key for run in runs]
        assert option not in read_json(path) and option in read_json(other)
        assert config.fingerprint(config.from_flat(read_json(path)))[:12] == runs[0].key
        write_json(path, full)
    # Where the grid no longer has a finished run, the differences named are real ones.
    write_json(path, now)
    with pytest.raises(ValueError, match="lr: ") as error:
        plan(tmp_path, base={"lr": 0.5})
    assert len(str(error.value).splitlines()) == 2


def test_the_speed_of_runs_that_are_not_done_may_change(tmp_path):
    runs = plan(tmp_path)
    finish(tmp_path, runs[0])
    assert plan(tmp_path, base={"data.workers": 2})[0].key == runs[0].key
    files = [store.run_folder(tmp_path, run.key) / "config.json" for run in runs]
    assert [read_json(file)["data.workers"] for file in files] == [0] + [2] * (len(runs) - 1)


def test_a_study_of_which_nothing_is_done_may_change(tmp_path):
    plan(tmp_path)
    changed = plan(tmp_path, base={"lr": 0.5})
    assert list(store.states(tmp_path)) == [run.key for run in changed]


def test_the_workdir_of_a_run_by_itself_is_refused(tmp_path):
    write_json(tmp_path / "config.json", {})
    with pytest.raises(ValueError, match=r"holds a run by itself .config.json."):
        plan(tmp_path)
    with pytest.raises(ValueError, match="plan a study first"):
        store.read_plan(tmp_path)


def test_a_run_goes_through_its_states(folder):
    assert store.state(folder) == "todo"
    with store.claim(folder) as attempt:
        assert attempt == 1 and store.state(folder) == "running"
        with store.claim(folder) as second:
            assert second is None
    assert store.state(folder) == "todo"  # given back, as after a request to stop
    with store.claim(folder) as attempt:
        assert attempt == 1
        store.fail(folder, "ValueError: no", attempt)
    assert store.state(folder) == "failed"
    with store.claim(folder) as attempt:
        assert attempt is None
    assert store.retry(folder.parents[1]) == 1 and store.state(folder) == "todo"
    write_json(folder / "result.json", RESULT)
    assert store.state(folder) == "done"
    with store.claim(folder) as attempt:
        assert attempt is None


def test_an_exception_gives_the_run_back(folder):
    with pytest.raises(KeyboardInterrupt), store.claim(folder):
        raise KeyboardInterrupt
    assert store.state(folder) == "todo"


DIE = """
import pathlib, sys
from tl_jax.studies import store
with store.claim(pathlib.Path(sys.argv[1])) as attempt:
    print("attempt", attempt, flush=True)
    sys.stdin.read()
"""


def test_a_run_whose_process_was_killed_is_stale_and_resumed_at_most_twice(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", DIE, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "attempt 1\n" and store.state(folder) == "running"
    process.kill()
    process.communicate()
    assert store.state(folder) == "stale"
    claim = read_json(folder / "claim.json")
    assert claim["pid"] == process.pid and claim["attempts"] == 1
    (folder / "log.txt").write_text("".join(f"line {i}\n" for i in range(30)))
    with store.claim(folder) as attempt:
        assert attempt == 2
        left = (folder / "claim.json").read_text()
    (folder / "claim.json").write_text(left)  # as if this process had been killed, too
    with store.claim(folder) as attempt:
        assert attempt == 3
        left = (folder / "claim.json").read_text()
    (folder / "claim.json").write_text(left)
    with store.claim(folder) as attempt:
        assert attempt is None
    assert store.state(folder) == "failed" and not (folder / "claim.json").exists()
    assert read_json(folder / "failed.json") == {
        "error": "its process died 3 times", "log": [f"line {i}" for i in range(10, 30)], "attempts": 3,
    }  # fmt: skip


def test_a_death_does_not_count_where_the_run_had_come_further(folder):
    write_json(folder / "claim.json", {"host": "a", "pid": 1, "attempts": 3, "step": 20})
    (folder / "checkpoints" / "30").mkdir(parents=True)
    with store.claim(folder) as attempt:
        assert attempt == 1 and read_json(folder / "claim.json")["step"] == 30


@pytest.mark.slow
def test_whoever_looks_at_the_states_takes_no_run_away(folder):
    done = threading.Event()

    def look():
        while not done.is_set():
            store.state(folder)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(300):
            with store.claim(folder) as attempt:
                assert attempt == 1
    finally:
        done.set()
        for looker in lookers:
            looker.join()


def test_metrics_of_further_sets_are_found_by_their_name():
    assert store.score(RESULT, "accuracy") == 0.5 and store.score(RESULT, "rotated/accuracy") is None


def test_plans_of_equal_grids_are_equal_byte_by_byte(tmp_path):
    for name in ("a", "b"):
        plan(tmp_path / name)
    files = [sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.json")) for name in "ab"]
    assert files[0] == files[1] and len(files[0]) == 1 + len(grid(make_study()))
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files[0])
