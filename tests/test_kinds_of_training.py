"""The proof of the design: adaptation, distillation, regression, several labels and two classes, by the same trainer.

Each moves what it trains and nothing else, resumes bit-equal, and is the same as a replica and in parts of a batch.
"""

import jax
import numpy as np
import pytest
from walks import (
    IMAGES,
    KINDS,
    Crash,
    assert_close,
    assert_same_training,
    crash_at,
    image_config,
    kind_of,
    make_tables,  # noqa: F401
    make_teacher,  # noqa: F401
    remains,
    variables_of,
    walk,
)

from tl_jax.core import trees
from tl_jax.runtime import sharding
from tl_jax.training import replicas, single
from tl_jax.training.settings import read
from tl_jax.training.train import never, train


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_moves_and_nothing_else(kind, tables, teacher):
    run, before, after, rows = walk(kind_of(kind, tables, teacher))
    hashes = [trees.leaf_hashes(variables_of(state)) for state in (before, after)]
    moved = {path for path in hashes[0] if hashes[0][path] != hashes[1][path]}
    report = run.phases[0].audit
    trained = {f"params/{row['path']}" for row in report["parameters"] if row["trainable"]}
    updated = {f"batch_stats/{row['path']}" for row in report["statistics"] if row["policy"] == "update"}
    assert moved == trained | updated and all(np.isfinite(row["loss"]) for row in rows)
    groups = {path.split("/")[0]: run.phases[0].plan.labels[path] for path in trees.flatten(before.params)}
    further = {"adaptation": {"discriminator": "discriminator"}, "distillation": {"teacher": "frozen"}}
    further["features"] = {"teacher": "frozen", "fitnet": "fitnet", "crd": "crd"}
    assert groups == {"backbone": "backbone", "head": "head", **further.get(kind, {})}
    assert {path.split("/")[1] for path in updated} == ({"discriminator"} if kind == "adaptation" else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_the_configs_move_what_they_train_and_nothing_else(name):
    rate = {"lr": 0.3} if name == "distill_digits" else {}  # what a zero scale hides at first must move visibly
    walked = walk(image_config(name, **rate))
    hashes = [trees.leaf_hashes(variables_of(state)) for state in (walked.before, walked.after)]
    report = walked.run.phases[0].audit
    trained = {f"params/{row['path']}" for row in report["parameters"] if row["trainable"]}
    updated = {f"batch_stats/{row['path']}" for row in report["statistics"] if row["policy"] == "update"}
    assert {path for path in hashes[0] if hashes[0][path] != hashes[1][path]} == trained | updated
    assert not any(path.split("/")[1] == "teacher" for path in trained | updated)
    if name == "dann_digits":
        assert {path for path in updated if path.startswith("batch_stats/discriminator/")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adaptation", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_run_that_crashed_twice_ends_bit_equal_to_an_unbroken_one(kind, tables, teacher, tmp_path):
    config = kind_of(kind, tables, teacher, total=(5.0, "steps"))
    for step in (1, 3):
        with pytest.raises(Crash):
            train(config, tmp_path / "w", verbose=False, stop_requested=crash_at(step))
    train(config, tmp_path / "w", verbose=False)
    assert "transductive" not in train(config, tmp_path / "whole", verbose=False)
    assert remains(tmp_path / "w") == remains(tmp_path / "whole")


RATES = (1e-1, 2e-2)


@pytest.mark.parametrize("kind", ["adaptation", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
@pytest.mark.slow
def test_replicas_of_two_rates_are_the_runs_by_themselves(kind, tables, teacher):
    parallel = sharding.make_parallel("jit", jax.devices()[:1])
    configs = [kind_of(kind, tables, teacher, lr=lr) for lr in RATES]
    program = replicas.make([read(config) for config in configs], parallel)
    state, compiled, rows = program.initial(0), {}, []
    sets = program.batches(0, state, list(program.runs[0].phases[0].plan.streams), never)
    for done, batch in enumerate(program.iterate(sets, 0, 4), 1):
        shapes = single.shapes_of(batch)
        if shapes not in compiled:
            compiled[shapes], _ = program.compile(0, state, batch)
        state, line = program.take_line(0, compiled[shapes](state, batch), done)
        rows.append(program.read_line(line))
    for j, config in enumerate(configs):
        alone = walk(config)
        assert_close(program.variables(state, j), variables_of(alone.after))
        for both, own in zip(rows, alone.sums, strict=True):
            assert both[j][0] == pytest.approx(own, rel=1e-5, abs=1e-5)


@pytest.mark.thin(1)
# The discriminator normalises over the part of the batch that it is given, and relations are of the whole batch, so
# that adaptation and features are not among these.
@pytest.mark.parametrize(
    "kind", ["distillation", "regression", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[3:-1])]
)
def test_parts_of_a_batch_train_as_the_whole_where_nothing_is_normalised_over_it(kind, tables, teacher):
    whole, parts = (walk(kind_of(kind, tables, teacher, accumulate=n)) for n in (1, 2))
    assert_same_training(whole, parts)
