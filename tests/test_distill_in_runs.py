"""Distillation through the trainer: cached teachers, crops, unlabelled streams, families, averages, and its cost."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from walks import (
    SGD,
    SHORT,
    assert_close,
    assert_same_training,
    kind_of,
    make_tables,  # noqa: F401
    make_teacher,  # noqa: F401
    variables_of,
    walk,
)

from configs import distill_digits
from tl_jax import config as options
from tl_jax.core import trees
from tl_jax.core.card import Card
from tl_jax.data import sources
from tl_jax.data.pipeline import View, train_batches
from tl_jax.runtime import sharding
from tl_jax.training import build, single, steps
from tl_jax.training.train import never, train
from tl_jax.weights import load

AUGMENT = (("random_resized_crop", {"scale": (0.3, 0.9)}), ("flip", {}))
RESNET, VIT = "resnet8_cifar", "vit_l2_h24_a3_p4_16"
EVERY = {name: {"weight": 0.1} for name in ("task", "kd", "dkd", "dist", "hard", "fitnet", "at", "rkd")}


def digits(terms, teacher="resnet8_cifar", **changes):
    """A run of a few steps on a few digits; the teacher is random, which changes nothing here."""
    networks = {"teacher": {"name": teacher, "weights": ""}}
    return options.override(distill_digits.get_config(), {
        **SHORT, **SGD, "data.shots": 0, "networks": networks, "terms": terms, **changes
    })  # fmt: skip


def program_of(config, devices=1):
    parallel = sharding.make_parallel("jit", jax.devices()[:devices])
    run = build.build(config, parallel)
    program = single.Single(run, parallel)
    state = program.initial(0)
    return run, program, state, program.batches(0, state, list(run.phases[0].plan.fed), never)


def cached(config, folder, **given):
    networks = {name: {**network, **given, "cache": "features"} for name, network in config.networks.to_dict().items()}
    return options.override(config, {"networks": networks, "cache_dir": str(folder)})


# Cached teachers.


@pytest.mark.slow
def test_what_terms_read_of_a_teacher_is_cached_and_trains_as_it_does_live(tables, teacher, tmp_path):
    config = kind_of("features", tables, teacher)
    terms = {**config.terms.to_dict(), "kd": {}, "dist": {"weight": 0.1}}
    config = options.override(config, {"terms": terms})
    both = walk(config), walk(cached(config, tmp_path))
    assert_same_training(*both)
    columns = both[1].run.material.readers["teacher"].columns
    last = both[1].run.material.networks["teacher"].module.cuts[-2]
    assert columns == {last: f"teacher:{last}", "pre_logits": "teacher:pre_logits", "logits": "teacher"}
    _, _, _, sets = program_of(cached(config, tmp_path))
    assert set(sets["train"][0]) == {"table", "index", "label", *columns.values()}
    assert len(list(tmp_path.glob("*/meta.json"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, pytest.param(16, marks=pytest.mark.slow)])
def test_with_a_cached_teacher_every_epoch_has_the_crops_that_its_answers_are_to(size, tmp_path):
    """Also in the epochs behind the views that are kept; the student's pictures have 16 pixels."""
    networks = {"teacher": {"name": "resnet8_cifar", "weights": "", "image_size": size}}
    changes = {"data.augment": AUGMENT, "views": 2, "total": (5.0, "epochs"), "networks": networks, "batch_size": 20}
    run, _, _, sets = program_of(cached(digits({"kd": {}}, **changes, **{"data.train": "train[:3%]"}), tmp_path))
    teacher, live, count = (
        run.material.networks["teacher"],
        run.material.streams["train"],
        len(run.material.data["train"]),
    )
    answer = jax.jit(
        lambda x: teacher.module.apply(teacher.variables, steps.normalise(x, teacher.card), train=False)[0]
    )
    pictures, answers = {}, {}
    for step in range(2 * count // 20):
        batch, rows = live[step], live.rows(step)
        found = answer(batch["image:teacher" if size == 32 else "image"])
        for row, place in enumerate(zip(rows.index.tolist(), rows.epoch.tolist(), strict=True)):
            pictures[place], answers[place] = batch["image"][row], found[row]
    assert len({x.tobytes() for x in pictures.values()}) > 0.95 * len(pictures)
    stream = sets["train"]
    assert set(stream.renders) == {"image"}  # the teacher's own pictures are made no more
    for step in range(5 * count // 20):
        batch, rows = stream[step], stream.rows(step)
        for row, (index, epoch) in enumerate(zip(rows.index.tolist(), rows.epoch.tolist(), strict=True)):
            if place := (index, epoch % 2) if (index, epoch % 2) in pictures else None:
                np.testing.assert_array_equal(batch["image"][row], pictures[place])
                np.testing.assert_allclose(batch["teacher"][row], answers[place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["shuffled", "class_balanced"])
def test_an_epoch_behind_the_views_looks_as_one_of_them(order):
    """Of two domains and in balanced order, where epochs of examples are not those of batches."""
    both = sources.join_domains([sources.load(name, "train[:60]") for name in ("digits", "digits:inverted")])
    views = {"image": View(Card("m", 10, input_size=8, crop=1.0), AUGMENT)}
    plain = train_batches(both, views, 12, 0, order=order)
    seen = {}
    for step in range(12 * 40 // 12):
        batch, rows = plain[step], plain.rows(step)
        for row, place in enumerate(zip(rows.index.tolist(), rows.epoch.tolist(), strict=True)):
            seen[place] = batch["image"][row]
    repeated = dataclasses.replace(plain, views=2)
    for step in range(60):
        batch, rows = repeated[step], repeated.rows(step)
        np.testing.assert_array_equal(rows.index, plain.rows(step).index)
        for row, (index, epoch) in enumerate(zip(rows.index.tolist(), rows.epoch.tolist(), strict=True)):
            np.testing.assert_array_equal(batch["image"][row], seen[index, epoch % 2])


# What a frozen teacher costs.


def flops(config):
    _, program, state, sets = program_of(config)
    return program.compile(0, state, next(program.iterate(sets, 0, 1)))[1]["flops_per_step"]


@pytest.mark.slow
def test_a_step_with_a_cached_teacher_costs_what_the_student_costs(tmp_path):
    config = digits({"kd": {}}, "resnet20_cifar")
    alone = flops(options.override(config, {"networks": {}, "terms": {}}))
    live, kept = flops(config), flops(cached(config, tmp_path))
    assert alone < kept < 1.002 * alone
    assert live > 1.5 * alone


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["", "features"])
def test_a_frozen_teacher_adds_no_gradient_moment_or_checkpoint_bytes(cache, tables, teacher, tmp_path):
    config = kind_of("distillation", tables, teacher)
    config = cached(config, tmp_path / "cache") if cache else config
    alone = options.override(config, {"networks": {}, "terms": {}, "cache_dir": ""})
    walked = walk(config)
    assert jax.tree.map(np.shape, walked.after.opt_state) == jax.tree.map(np.shape, walk(alone).after.opt_state)
    for path, leaf in trees.flatten(walked.before.params["teacher"]).items():
        np.testing.assert_array_equal(leaf, trees.flatten(walked.after.params["teacher"])[path])
    size = {}
    for name, each in {"taught": config, "alone": alone}.items():
        train(each, tmp_path / name, verbose=False)
        files = (tmp_path / name / "checkpoints").rglob("*")
        size[name] = sum(path.stat().st_size for path in files if "index" not in path.name)
    teachers = sum(leaf.nbytes for leaf in jax.tree.leaves(walked.before.params["teacher"]))
    assert size["taught"] - size["alone"] < 0.05 * teachers, (size, teachers)


# Combinations.


@pytest.mark.slow
@pytest.mark.parametrize("student, teacher", [(RESNET, VIT), (VIT, RESNET)])
def test_every_term_at_once_across_families(student, teacher, tmp_path):
    made = load.load(teacher, "", 10, head_init="lecun")
    load.export(made.variables, teacher, tmp_path / "teacher.safetensors", card=made.card)
    networks = {"teacher": {"name": teacher, "weights": str(tmp_path / "teacher.safetensors")}}
    terms = EVERY | {"crd": {"weight": 0.1, "negatives": 64, "width": 8}}
    config = digits(terms, **{"model.name": student, "networks": networks})
    _, before, after, rows = walk(config, count=2)
    assert {*EVERY, "crd", "loss", "fitnet"} < rows[0].keys()
    assert all(np.isfinite(value) for row in rows for value in row.values())
    kernels = [trees.flatten(state.params["fitnet"])["hint0/kernel"] for state in (before, after)]
    widths = {RESNET: 64, VIT: 24}
    assert kernels[0].shape == (widths[student], widths[teacher]) and not np.array_equal(*kernels)


@pytest.mark.slow
def test_unlabelled_examples_of_a_further_stream_teach_beside_those_of_train():
    more = {"more": {"source": "digits:faded", "split": "train[:20%]", "batch_size": 4}}
    both = ("train", "more")
    terms = {"kd": {"streams": both}, "at": {"streams": both}, "rkd": {"streams": both}, "hard": {"streams": ("more",)}}
    run, before, _, rows = walk(digits(terms, streams=more), count=1)
    batches = {name: run.material.streams[name][0] for name in both}
    assert "label" not in batches["more"]
    teacher, student = run.material.networks["teacher"], run.material.model
    x = np.concatenate([batches[name]["image"] for name in both])
    own = {"params": before.params, "batch_stats": before.batch_stats}
    taught, _ = student.apply(own, steps.normalise(x, run.material.card), train=True, mutable=["batch_stats"])
    known = teacher.module.apply(teacher.variables, steps.normalise(x, teacher.card), train=False)
    answers = [np.float64(logits) for logits in (known[0], taught[0])]
    p, q = (log_softmax(x / 4.0, axis=1) for x in answers)
    expected = 16 * (np.exp(p) * (p - q)).sum(axis=1).mean()
    assert rows[0]["kd"] / rows[0]["examples"] == pytest.approx(expected, rel=1e-4)


def test_the_moving_average_is_a_teacher(tables):
    config = kind_of("classification", tables, ema=0.5, terms={"kd": {"teacher": "average"}, "task": {}})
    _, _, _, rows = walk(config)
    losses = [row["kd"] / row["examples"] for row in rows]
    assert losses[0] == 0 and all(x > 0 for x in losses[1:])


@pytest.mark.slow
def test_several_teachers_one_of_them_cached(tables, teacher, tmp_path):
    networks = {name: {"name": "mlp_medium", "weights": str(teacher)} for name in ("one", "two")}
    config = kind_of("distillation", tables, teacher)
    one = walk(config)
    terms = {"task": {"weight": 0.1}, "kd": {"weight": 0.9, "teacher": ("one", "two")}}
    networks["two"]["cache"] = "features"
    both = walk(options.override(config, {"networks": networks, "terms": terms, "cache_dir": str(tmp_path)}))
    models = ("backbone", "head")
    own = [{path: x for path, x in variables_of(each.after).items() if path.split("/")[1] in models}
           for each in (one, both)]  # fmt: skip
    assert_close(*own)  # the mean of two equal teachers


@pytest.mark.slow
def test_four_devices_with_a_cached_teacher_train_as_one_does_with_a_live_one(tables, teacher, tmp_path):
    config = kind_of("features", tables, teacher)
    assert_same_training(walk(config), walk(cached(config, tmp_path), devices=4))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"terms": {"kd": {}}, "networks": {}}, "terms.kd reads the networks .*add networks.teacher"),
        ({"terms": {"kd": {"teacher": "average"}}, "networks": {}}, "kd needs the moving average: ema above 0"),
        ({"terms": {"kd": {"teacher": ()}}}, "teacher = .*expected a string, or different names"),
        ({"terms": {"crd": {}}, "accumulate": 2}, "crd needs the whole batch at once"),
        ({"terms": {"rkd": {"teacher": "average"}}}, "teacher = 'average', expected the name of a network"),
        ({"terms": {"at": {}}}, "at compares places, and one map has a single one"),
        ({"terms": {"kd": {"streams": ("train", "more")}}}, "kd is on the stream 'more'.*add streams.more"),
        (
            {"networks": {"teacher": {"name": "mlp_medium", "weights": "", "cache": "features", "group": "text"}}},
            "networks.teacher trains, group = 'text': leave out its cache",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, tables, teacher):
    with pytest.raises(ValueError, match=message):
        build.build(
            kind_of("distillation", tables, teacher, **changes), sharding.make_parallel("jit", jax.devices()[:1])
        )
