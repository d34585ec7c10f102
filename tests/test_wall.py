"""The wall time of a run, by kind of work, adds up to what somebody with a watch measures."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from configs import quickstart
from tl_jax import config as options
from tl_jax.core import console
from tl_jax.runtime import wall
from tl_jax.runtime.preemption import Preempted
from tl_jax.training.train import train


def make_config(**changes):
    small = {"seeds": (), "baseline": (), "resamples": 20, "data.shots": 2, "data.val": "train[80%:85%]"}
    small |= {"data.test": "test[:5%]", "total": (12.0, "steps"), "eval_every": (4.0, "steps")}
    return options.override(quickstart.get_config(), {**small, "log_every": (4.0, "steps"), **changes})


def test_every_second_counts_once(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(wall.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(wall, "_clock", wall._Clock())

    def work(seconds):
        now[0] += seconds

    before = wall.seconds()
    wall.begin_run("w", before)
    work(1)
    with wall.timed("training"):
        work(10)
        with wall.timed("evaluation"):
            work(100)
            wall._compiled(wall.COMPILING[1], 40.0)  # as jax tells when a program is ready
        with pytest.raises(KeyError), wall.timed("evaluation"):
            work(5)
            raise KeyError
        work(1000)
    found = wall.of_run("w")
    assert found == {"other": 1, "training": 1010, "evaluation": 65, "compiling": 40}
    assert wall.in_words(found) == "1116.0 s: training 1010.0, evaluation 65.0, compiling 40.0, other 1.0"
    work(3)
    assert wall.of_run("w")["other"] == 3 and wall.of_run("other") == dict.fromkeys(found, 0)
    assert wall.whole({"wall_seconds": found}) == 1116 and wall.whole({"wall_seconds": None}) is None


def test_what_jax_compiles_is_counted_wherever_it_happens():
    before = wall.seconds().get("compiling", 0.0)
    with wall.timed("evaluation"):
        jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x) + 17.25)(jnp.ones((3, 3)))
    assert wall.seconds()["compiling"] > before


@pytest.mark.slow
def test_the_parts_of_a_run_add_up_to_its_wall_time_and_a_resumed_run_adds_to_them(tmp_path, capfd):
    began = time.perf_counter()
    with pytest.raises(Preempted):
        train(make_config(), tmp_path / "w", verbose=False, stop_requested=lambda step: step >= 6)
    first = time.perf_counter() - began
    half = json.loads((tmp_path / "w" / "cost.json").read_text())["wall_seconds"]
    assert 0.93 * first - 0.1 < sum(half.values()) <= first
    with console.quiet():
        train(make_config(), tmp_path / "w", verbose=False)
    whole = json.loads((tmp_path / "w" / "cost.json").read_text())["wall_seconds"]
    measured = time.perf_counter() - began  # hashing the files and closing the checkpoints come after cost.json
    assert 0.93 * measured - 0.1 < sum(whole.values()) <= measured
    expected = {"loading", "split audit", "compiling", "training", "evaluation", "checkpoints", "scoring"}
    assert expected <= set(whole) and all(whole[kind] >= seconds for kind, seconds in half.items())
    assert capfd.readouterr().out == ""  # quiet: not even that it resumed
    train(make_config(**{"method.name": "knn", "method.k": 0, "groups": {}}), tmp_path / "knn", verbose=False)
    cost = json.loads((tmp_path / "knn" / "cost.json").read_text())
    assert {"features", "fitting", "scoring"} <= set(cost["wall_seconds"])
    for name in ("result.json", "metrics.jsonl"):
        assert "seconds" not in (tmp_path / "w" / name).read_text()
