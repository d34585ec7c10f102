"""Penalties in runs: what they compute from the data, when, and that a resumed run has it from its checkpoint."""

import jax
import numpy as np
import pytest
import scipy.special
from counting import add_counted

from configs import smoke
from tl_jax import config as options
from tl_jax.data import pipeline
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import estimate
from tl_jax.training import build, single, steps
from tl_jax.training.train import train
from tl_jax.weights import load

BOTH = {"terms": {"delta": {"examples": 8}, "co_tuning": {"approach": "direct"}}}


def make_config(**changes):
    return options.override(smoke.get_config(), {
        "data.source": "counted", "data.train": "train[:2%]", "data.shots": 0, "data.val": "", "data.test": "test[:4%]",
        "select": "last", "resamples": 10, "model.image_size": 16, "method.name": "full", "method.k": 0,
        "batch_size": 8, "total": (3.0, "steps"), **changes,
    })  # fmt: skip


def never(step):
    return False


@pytest.mark.slow
def test_building_a_run_reads_no_image_and_a_dry_run_those_of_one_batch_as_without_penalties(monkeypatch):
    reads = add_counted(monkeypatch)
    run = build.build(make_config(**BOTH), sharding.make_parallel())
    assert not reads and run.material.memory.keys() == {"delta", "co_tuning"}
    estimate.trace(make_config())
    plain = sorted(reads)
    reads.clear()
    estimate.trace(make_config(**BOTH))
    assert sorted(reads) == plain and len(plain) == 8


def test_what_terms_compute_is_due_where_a_phase_begins_alone_and_reads_each_image_once_for_each(monkeypatch):
    reads, phases = add_counted(monkeypatch), ({"total": (2, "steps")}, {"total": (3, "steps"), **BOTH})
    parallel = sharding.make_parallel()
    run = build.build(make_config(phases=tuple(tuple(phase.items()) for phase in phases)), parallel)
    assert [single.due(run, 0, step) for step in (0, 1)] == [[], []]
    assert [sorted(single.due(run, 1, step)) for step in (2, 3, 4)] == [["co_tuning", "delta"], [], []]
    variables, memory = run.material.variables, run.material.memory
    one_by_one = []
    for name in ("delta", "co_tuning"):
        reads.clear()
        memory, _ = single.refreshed(run, 1, variables, memory, [name], never)
        one_by_one.append(sorted(reads))
    train = run.material.data["train"]
    assert one_by_one == [sorted(("train", int(number)) for number in train.inputs.numbers)] * 2
    assert float(memory["delta"]["stage3"].sum()) == pytest.approx(1.0, rel=1e-5)
    reads.clear()
    again, _ = single.refreshed(run, 1, variables, memory, ["co_tuning"], never)
    np.testing.assert_array_equal(again["co_tuning"], memory["co_tuning"])


@pytest.mark.slow
def test_the_relationship_of_co_tuning_is_that_of_the_network_as_it_was_loaded(monkeypatch):
    """In a later phase too, before which the network has moved; in float64 from the features of the weight file."""
    add_counted(monkeypatch)
    run = build.build(make_config(**BOTH), sharding.make_parallel())
    moved = jax.tree.map(lambda x: x + 0.1, run.material.variables)
    rows = single.refreshed(run, 0, moved, run.material.memory, ["co_tuning"], never)[0]["co_tuning"]
    model, loaded, card, *_ = load.load("resnet8_cifar", "builtin:glyphs", image_size=16)
    data = run.material.data["train"]
    batch = pipeline.eval_batches(data, {"image": pipeline.View(card)}, len(data))[0]
    logits = np.asarray(model.apply(loaded, steps.normalise(batch["image"], card))[0], np.float64)
    probabilities = scipy.special.softmax(logits, axis=1)
    for target in np.unique(data.labels):
        expected = probabilities[data.labels == target].mean(axis=0)
        np.testing.assert_allclose(rows[target], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_that_resumes_inside_a_phase_computes_nothing_from_the_data_again(tmp_path, monkeypatch):
    reads, seen = add_counted(monkeypatch), {}
    for name, changes in {"first": {}, "plain": {}, "both": BOTH}.items():  # the first looks for duplicates too
        with pytest.raises(Preempted):
            train(make_config(**changes), tmp_path / name, verbose=False, stop_requested=lambda step: step == 1)
        first = list(reads)
        reads.clear()
        train(make_config(**changes), tmp_path / name, verbose=False)
        seen[name] = len(first), sorted(reads)
        reads.clear()
    assert seen["both"][1] == seen["plain"][1]
    assert seen["both"][0] > seen["plain"][0]


@pytest.mark.slow
def test_a_run_that_resumes_inside_a_phase_has_the_numbers_of_one_that_does_not(tmp_path, monkeypatch):
    add_counted(monkeypatch)
    train(make_config(**BOTH), tmp_path / "whole", verbose=False)
    with pytest.raises(Preempted):
        train(make_config(**BOTH), tmp_path / "broken", verbose=False, stop_requested=lambda step: step == 1)
    train(make_config(**BOTH), tmp_path / "broken", verbose=False)
    for name in ("metrics.jsonl", "result.json", "trained.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
