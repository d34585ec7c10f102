"""Advice under a budget: splits, lengths of rounds, errors; a race that is killed five times gives the same report."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tl_jax import config as options
from tl_jax.advice import command, race
from tl_jax.data import sources
from tl_jax.studies.study import grid, load

WAYS = ["logistic", "last_k"]


@pytest.mark.parametrize(
    ("text", "amount", "timed"),
    [("10min", 600, True), ("1.5 h", 5400, True), ("90s", 90, True), ("3PFLOP", 3e15, False), ("20GFLOP", 2e10, False)],
)
def test_a_budget_is_time_or_operations(text, amount, timed):
    assert race.read_budget(text) == (amount, timed)


@pytest.mark.parametrize("text", ["", "10", "min", "0min", "-3h", "10 minutes", "nan s", "1e3s"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match="expected a number above 0 and one of s, min, h"):
        race.read_budget(text)


@pytest.mark.parametrize("known", [["train"], ["train", "val"], ["train", "test"], ["train", "val", "test"]])
def test_train_val_and_test_never_overlap(known, tmp_path):
    rows = "".join(f"{i},{i % 3}\n" for i in range(300))
    for split in known:
        (tmp_path / f"{split}.csv").write_text("text,label\n" + rows.replace(",", f" {split},"))
    found = race.splits(known)
    ids = {key: {*sources.load(f"text:{tmp_path}", split).ids} for key, split in found.items()}
    assert not any(a & b for a, b in itertools.combinations(ids.values(), 2)) and all(ids.values())
    assert ("test" in known) <= (found["data.test"] == "test") and ("val" in known) <= ("val" in found.values())


@pytest.mark.parametrize("name", ["resnet8_cifar", "vit_tiny_patch16_224", "bert_l2_h16_a2", "mobilenetv2_100"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_every_way_is_a_valid_config(name, task):
    found = race.ways(name, task, 2.5)
    assert len(found) == 9 and any(
        way.startswith("lora" if "_a2" in name or "vit" in name else "norm") for way in found
    )
    for changes in found.values():
        config = options.override(options.make(), {"model.name": name, "task": task, **changes})
        options.check(config)
        lengths = [dict(phase)["total"] for phase in config.phases] or [(2.5, "epochs")]
        assert sum(amount for amount, _ in lengths) == pytest.approx(2.5)


@pytest.mark.parametrize("count", [2, 3, 9, 18, 27, 100])
@pytest.mark.parametrize("fixed", [0.0, 8.0])
def test_rounds_fill_the_budget_where_costs_are_as_expected(count, fixed):
    counts, left, lengths = race.sizes(count), 4000.0 + 12 * count * fixed, []
    assert counts[0] == count and counts[-1] == 2 and all(a > b for a, b in itertools.pairwise(counts))
    for i, n in enumerate(counts):
        costs = [(fixed, 3.0)] * n
        lengths.append(race.length(left, costs, counts[i:]))
        left -= sum(cost[0] + cost[1] * lengths[-1] for cost in costs)
    assert lengths == sorted(lengths) and (abs(left) < 1e-6 or lengths[-1] == race.LONGEST)


def test_what_does_not_fit_is_one_message_before_any_work(tmp_path, capsys):
    def told(*more, data="digits", weights="resnet8_cifar=", budget="10min"):
        argv = [
            "--advise",
            f"--data={data}",
            f"--weights={weights}",
            f"--budget={budget}",
            f"--workdir={tmp_path}",
            *more,
        ]
        assert command.main(argv) == 2
        assert not [*tmp_path.iterdir()]
        return capsys.readouterr().err

    assert "--budget '10'" in told(budget="10")
    assert "did you mean 'full'" in told("--methods=fulll,logistic")
    assert "knn" in told("--methods=knn")
    assert "decides these options" in told("--config.lr=0.1", "--config.data.val=val")
    assert "no flags" in told("--stuff")
    assert "resnet9_cifar" in told(weights="resnet9_cifar=,builtin:glyphs")
    assert "nowhere" in told(data="folder:nowhere")


def test_the_study_of_a_race_trains_each_candidate_for_the_longest_and_scores_the_test_of_the_race(tmp_path):
    asked = {"data": "digits", "weights": [], "budget": "1min", "options": ["seed=3"], "methods": []}
    over, label = race.open_race(asked, tmp_path), "resnet8_cifar"
    networks = {label: {"name": label, "weights": "builtin:glyphs"}}
    candidates = {f"{label}, {way}": [label, way] for way in race.ways(label, "classification", 1.0)}
    over.decide(networks=networks, candidates=candidates)
    study = load(f"experiments/advice:race={tmp_path}")[2]
    configs = [run.config for run in grid(study)]
    assert len(configs) == len(candidates) == 9 and {config.seed for config in configs} == {3}
    assert {config.data.extra_eval for config in configs} == {(("unseen", "digits", "test"),)}
    assert not any(config.data.test for config in configs)
    lengths = [[dict(phase)["total"] for phase in config.phases] or [config.total] for config in configs]
    assert [sum(amount for amount, _ in each) for each in lengths] == pytest.approx([race.LONGEST] * 9)
    with pytest.raises(ValueError, match="expected race=W"):
        load("experiments/advice")


@pytest.mark.slow
def test_what_is_frozen_is_not_paid_for_in_the_first_plan(tmp_path):
    asked = {"data": "digits", "weights": [], "budget": "1TFLOP", "options": ["data.shots=4"], "methods": []}
    over, label = race.open_race(asked, tmp_path), "resnet8_cifar"
    over.decide(networks={label: {"name": label, "weights": "builtin:glyphs"}})
    costs = race._first_costs(over, label)
    features, (none, whole) = costs["logistic"], costs["full 0.01"]
    assert none == features[1] == 0 and features[0] == pytest.approx(whole / 3)
    assert costs["last_k 0.01"][0] == features[0] and 0 < costs["last_k 0.01"][1] < 0.7 * whole
    assert costs["full 0.01"] == costs["full 0.002"] and 0 < costs["lp_ft 0.01"][1] < whole


@pytest.mark.parametrize(("budget", "others"), [("1GFLOP", 1), ("1PFLOP", 9)])
def test_a_network_that_the_budget_cannot_race_has_its_probe_in_it(tmp_path, monkeypatch, budget, others):
    asked = {"data": "digits", "weights": [], "budget": budget, "options": [], "methods": []}
    over, labels = race.open_race(asked, tmp_path), ["resnet8_cifar", "resnet20_cifar"]
    networks = {label: {"name": label, "weights": ""} for label in labels}
    over.decide(ranking={"networks": [{"network": label} for label in labels], "seconds": 0.0}, networks=networks)
    monkeypatch.setattr(race, "_first_costs", lambda over, label: dict.fromkeys(over.ways(label), (0.0, 1e8)))
    race._enter(over)
    ways = [[way for network, way in over.state["candidates"].values() if network == label] for label in labels]
    assert len(ways[0]) == 9 and len(ways[1]) == others and ways[1][0] == "logistic"


def start(folder):
    argv = [sys.executable, "launch.py", "--advise", "--data=digits", "--weights=builtin:glyphs,resnet8_cifar=",
            "--budget=90GFLOP", f"--methods={','.join(WAYS)}", f"--workdir={folder}"]  # fmt: skip
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)


def finish(folder):
    assert start(folder).wait() == 0, folder.with_suffix(".log").read_text()


def report_of(folder):
    """The report without what may differ: where it lies, and how fast features were computed."""
    text = (folder / "advice.md").read_text().replace(str(folder), "W")
    return re.sub(r"(cached|[\d.,]+) \|$", "", text, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(2,), (1, 4), (0, 1, 3, 4, 6)])  # after so many of its seven runs
def test_a_race_that_is_killed_gives_the_report_of_an_unbroken_one(kills, tmp_path):
    whole, broken, rng = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    finish(whole)
    for finished in kills:
        process = start(broken)
        while len([*broken.glob("*/runs/*/result.json")]) < finished and process.poll() is None:
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 3))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finish(broken)
    assert report_of(whole) == report_of(broken)
    states = [json.loads((folder / "advice.json").read_text()) for folder in (whole, broken)]
    assert all(states[0][key] == states[1][key] for key in ("splits", "candidates", "rounds", "chosen"))
    opened = {path.parts[-4][:5]: "digits test" in path.read_text() for path in whole.glob("*/runs/*/ledger.json")}
    assert opened == {"round": False, "final": True}  # which labels the runs read
    before = (whole / "advice.json").stat().st_mtime_ns
    finish(whole)
    assert (whole / "advice.json").stat().st_mtime_ns == before  # shown again without a run
