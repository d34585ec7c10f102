"""The proof of the design: adaptation, distillation, regression, several labels and two classes, by the same trainer.

Each of the configs that show them runs here in a few steps of a small network.
"""

import importlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from configs import distill_digits, ink_regression
from tl_jax import config as options
from tl_jax.core import files, trees
from tl_jax.methods import TERMS, distill, domain
from tl_jax.methods.term import MAIN, Context, Result, Term, reverse
from tl_jax.runtime import sharding
from tl_jax.training import build, replicas, single, steps
from tl_jax.training.settings import read
from tl_jax.training.train import never, train
from tl_jax.weights import formats, load

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHORT = {
    "total": (3.0, "steps"), "log_every": (1.0, "steps"), "eval_every": (2.0, "steps"), "patience": 0, "min_delta": 0.0,
    "batch_size": 8, "eval_batch_size": 64, "resamples": 5, "data.train": "train[:10%]", "data.val": "train[95%:]",
    "data.test": "test[:5%]",
}  # fmt: skip
TEACHER = {"name": "resnet8_cifar", "weights": "builtin:glyphs"}


# Tables are the cheapest of inputs: the same trainer, a program that compiles in a second.
ROWS = {"source": 160, "target": 80}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Two domains of three classes, told apart by a shift; and the same rows with numbers, labels and two classes."""
    folder, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    centres = rng.normal(0, 1.5, (3, 6))
    for name, rows in ROWS.items():
        label = rng.integers(0, 3, rows)
        x = centres[label] + rng.normal(0, 0.7, (rows, 6)) + (2.0 if name == "target" else 0.0)
        columns = {f"x{i}": x[:, i] for i in range(6)}
        columns |= {"label": np.array(["a", "b", "c"])[label], "even": label % 2, "first": label == 0}
        columns |= {"amount": 3 * x[:, 0] - x[:, 1], "other": x[:, 2] ** 2}
        names, cells = list(columns), zip(*columns.values(), strict=True)
        lines = [
            ",".join(names),
            *(",".join(str(int(c) if isinstance(c, np.bool_) else c) for c in row) for row in cells),
        ]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
        for task, labels in LABELS.items():  # a file for each task, so that no label of another one is an input
            keep = [i for i, column in enumerate(names) if column.startswith("x") or column in labels]
            table = [line.split(",") for line in lines]
            path = folder / f"{name}_{task}.csv"
            path.write_text("\n".join(",".join(row[i] for i in keep) for row in table) + "\n")
    return folder


LABELS = {
    "classification": ["label"],
    "regression": ["amount", "other"],
    "multilabel": ["even", "first"],
    "binary": ["even"],
}


@pytest.fixture(scope="module")
def teacher(tables, tmp_path_factory):
    """A network of another architecture with a weight file of its own, as a run leaves it."""
    folder = tmp_path_factory.mktemp("teacher") / "w"
    train(config_of("classification", tables, **{"model.name": "mlp_medium", "lr": 0.05}), folder, verbose=False)
    return folder


def config_of(task, tables, **changes):
    source = f"table:{tables}/source_{task}.csv"
    base = options.override(options.make(), {
        "model.name": "mlp_small", "model.head_init": "lecun", "data.source": source, "data.labels": LABELS[task],
        "data.train": "train[:60%]", "data.val": "train[60%:80%]", "data.test": "train[80%:]", "task": task,
        "method.name": "full", "optimizer": "sgd", "optimizer_args": {"momentum": 0.9}, "lr": 0.1, "batch_size": 16,
        "total": (4.0, "steps"), "log_every": (1.0, "steps"), "eval_every": (2.0, "steps"), "resamples": 5,
    })  # fmt: skip
    return options.override(base, changes)


def kind_of(kind, tables, teacher="", **changes):
    """A tiny config of each kind of training that the design is to carry."""
    target = {"source": f"table:{tables}/target_classification.csv", "split": "train", "batch_size": 8}
    own = {
        "adaptation": {"streams": {"target": target}, "terms": {"dann": {"width": 16, "strength": 0.5}}},
        "distillation": {
            "networks": {"teacher": {"name": "mlp_medium", "weights": str(teacher)}},
            "terms": {"task": {"weight": 0.1}, "kd": {"weight": 0.9}},
        },
    }
    task = kind if kind in LABELS else "classification"
    return config_of(task, tables, **{**own.get(kind, {}), **changes})


KINDS = ("adaptation", "distillation", "regression", "multilabel", "binary")


class Walk(NamedTuple):
    """A few steps of a run: its states before and behind them, on the host, and the sums of each step."""

    run: build.Run
    before: steps.TrainState
    after: steps.TrainState
    sums: list[dict[str, float]]


WALKS: dict[tuple, Walk] = {}


def walk(config, devices=1, count=None):
    """The walk of a config on so many devices, taken once."""
    key = options.fingerprint(config), devices, count
    if key not in WALKS:
        WALKS[key] = take_walk(config, devices, count)
    return WALKS[key]


def take_walk(config, devices, count):
    parallel = sharding.make_parallel("jit", jax.devices()[:devices])
    run = build.build(config, parallel)
    program = single.Single(run, parallel)
    state = program.initial(0)
    before, sums, step = jax.device_get(state), [], None
    sets = program.batches(0, state, list(run.phases[0].plan.streams), never)
    for done, batch in enumerate(program.iterate(sets, 0, count or run.total_steps), 1):
        if step is None:
            step, _ = program.compile(0, state, batch)
        state = jax.block_until_ready(step(state, batch))
        state, line = program.take_line(0, state, done)
        sums.append(program.read_line(line)[0][0])
    return Walk(run, before, jax.device_get(state), sums)


def variables_of(state):
    return trees.flatten({"params": state.params, "batch_stats": state.batch_stats})


def assert_close(left, right, atol=1e-5):
    left, right = trees.flatten(left), trees.flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_allclose(left[path], right[path], rtol=1e-5, atol=atol, err_msg=path)


def assert_same_training(left, right):
    """The same numbers to 1e-5: variables, optimizer values and what the log says of each step."""
    assert_close(variables_of(left.after), variables_of(right.after))
    assert_close(left.after.opt_state, right.after.opt_state)
    for one, other in zip(left.sums, right.sums, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


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
    further = {"adaptation": {"discriminator": "discriminator"}, "distillation": {"teacher": "frozen"}}.get(kind, {})
    assert groups == {"backbone": "backbone", "head": "head", **further}
    assert {path.split("/")[1] for path in updated} == ({"discriminator"} if kind == "adaptation" else set())


def test_a_teacher_is_the_network_of_its_file_and_no_part_of_what_is_counted(tables, teacher):
    run, before, _, _ = walk(kind_of("distillation", tables, teacher))
    loaded = load.load("mlp_medium", teacher)
    for path, leaf in trees.flatten(loaded.variables["params"]).items():
        np.testing.assert_array_equal(trees.flatten(before.params["teacher"])[path], leaf)
    report = run.phases[0].audit
    own = sum(x.size for path, x in trees.flatten(before.params).items() if not path.startswith("teacher/"))
    assert report["totals"]["parameters"] == report["totals"]["trainable"] == own
    rows = {row["path"]: row for row in report["parameters"]}
    assert rows["teacher/head/kernel"]["origin"] == str(teacher)
    assert rows["teacher/head/kernel"]["optimizer_values"] == 0


class Crash(Exception):
    pass


def crash_at(step):
    def stop_requested(done):
        if done == step:
            raise Crash
        return False

    return stop_requested


def remains(folder):
    """Everything that a run leaves and its seed determines."""
    with np.load(folder / "predictions.npz") as file:
        arrays = {name: file[name].tobytes() for name in file.files}
    names = ("metrics.jsonl", "result.json", "audit.json", "trained.safetensors", "config.json")
    return {"predictions": arrays, **{name: (folder / name).read_bytes() for name in names}}


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
    state, step, rows = program.initial(0), None, []
    sets = program.batches(0, state, list(program.runs[0].phases[0].plan.streams), never)
    for done, batch in enumerate(program.iterate(sets, 0, 4), 1):
        if step is None:
            step, _ = program.compile(0, state, batch)
        state, line = program.take_line(0, step(state, batch), done)
        rows.append(program.read_line(line))
    for j, config in enumerate(configs):
        alone = walk(config)
        assert_close(program.variables(state, j), variables_of(alone.after))
        for both, own in zip(rows, alone.sums, strict=True):
            assert both[j][0] == pytest.approx(own, rel=1e-5, abs=1e-5)


# The discriminator normalises over the part of the batch that it is given, so that adaptation is not among these.
@pytest.mark.parametrize(
    "kind", ["distillation", "regression", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[3:])]
)
def test_parts_of_a_batch_train_as_the_whole_where_nothing_is_normalised_over_it(kind, tables, teacher):
    whole, parts = (walk(kind_of(kind, tables, teacher, accumulate=n)) for n in (1, 2))
    assert_same_training(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("norm_batches", ["joint", pytest.param("per_stream", marks=pytest.mark.slow)])
def test_four_devices_adapt_as_one_does(norm_batches, tables):
    config = kind_of("adaptation", tables, norm_batches=norm_batches)
    assert_same_training(walk(config), walk(config, devices=4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
def test_four_devices_train_as_one_does(kind, tables, teacher):
    config = kind_of(kind, tables, teacher)
    assert_same_training(walk(config), walk(config, devices=4))


# The terms against what their papers say.


def context(outputs, forward, progress=0.5, **fields):
    empty = {name: {} for name in Context._fields}
    return Context(**{**empty, "outputs": outputs, "forward": forward, "progress": progress, "key": None, **fields})


def test_dann_is_the_mean_of_both_domains_cross_entropies():
    """The value of facts_domain_adaptation.md, with a linear discriminator; then of unequal batches, in numpy."""
    i, j = np.meshgrid(np.arange(60), np.arange(8), indexing="ij")
    features = np.sin(0.7 * i + 1.3 * j) + 0.5 * np.cos(0.11 * i * (j + 1)) + 0.3 * np.cos(2 * (i % 3) + j)
    w = 0.1 * (np.arange(8) + 1) * (-1.0) ** np.arange(8)

    def forward(network, f, *, train, key):
        assert network == "discriminator" and train
        return {"logits": (f @ jnp.asarray(w, jnp.float32))[:, None]}, {}

    def loss(source, target):
        outputs = {MAIN: {"embedding": jnp.asarray(source)}, "target": {"embedding": jnp.asarray(target)}}
        return domain.dann().loss(context(outputs, forward))

    assert float(loss(features[:30], features[30:]).loss) == pytest.approx(0.7413748042, rel=1e-6)
    found = loss(features[:20], features[20:])
    z = features @ w
    expected = (np.logaddexp(0, -z[:20]).mean() + np.logaddexp(0, z[20:]).mean()) / 2
    assert float(found.loss) == pytest.approx(expected, rel=1e-6)
    assert float(found.logs["accuracy"]) == pytest.approx(((z[:20] > 0).mean() + (z[20:] <= 0).mean()) / 2)
    assert float(found.logs["strength"]) == pytest.approx(2 / (1 + np.exp(-5)) - 1, rel=1e-6)


def test_reversal_is_the_identity_whose_gradient_is_turned_round():
    x = jnp.arange(4.0)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(reverse(x, 0.25) ** 2))(x)
    assert float(value) == 14.0
    np.testing.assert_array_equal(gradient, -0.25 * 2 * x)


def losses_on_one_batch(config, steps=4):
    """The losses of some steps on the same batch, which move by the parameters alone."""
    run = build.build(config, parallel := sharding.make_parallel("jit", jax.devices()[:1]))
    program = single.Single(run, parallel)
    state, losses = program.initial(0), []
    sets = program.batches(0, state, list(run.phases[0].plan.streams), never)
    batch = next(program.iterate(sets, 0, 1))
    step, _ = program.compile(0, state, batch)
    for done in range(1, steps + 1):
        state, line = program.take_line(0, step(state, batch), done)
        sums = program.read_line(line)[0][0]
        losses.append(sums["loss"] / sums["examples"])
    return losses


@pytest.mark.parametrize(("player", "sign"), [("discriminator", -1), ("backbone", 1)])
def test_the_discriminator_lowers_its_loss_and_the_backbone_raises_it(player, sign, tables):
    still = {group: {"lr_mult": 0.0} for group in {"discriminator", "backbone"} - {player}}
    terms = {"task": {"weight": 0.0}, "dann": {"width": 16, "strength": 0.5}}
    config = kind_of("adaptation", tables, terms=terms, groups=still, optimizer_args={}, lr=0.01, clip=0.0)
    losses = losses_on_one_batch(config)
    assert (sign * np.diff(losses) > 0).all(), losses


def test_distillation_is_the_divergence_of_softened_answers():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (2, 12, 5))
    found = distill.kd(temperature=4.0).loss(
        context({MAIN: {"logits": jnp.asarray(student)}}, lambda network, of: ({"logits": jnp.asarray(teacher)}, {}))
    )
    p, q = (scipy.special.log_softmax(x / 4.0, axis=-1) for x in (teacher, student))
    assert float(found.loss) == pytest.approx(16 * (np.exp(p) * (p - q)).sum(axis=-1).mean(), rel=1e-5)
    assert float(found.logs["agreement"]) == (student.argmax(axis=-1) == teacher.argmax(axis=-1)).mean()


def test_weights_of_classes_act_in_the_loss(tables):
    run, before, _, rows = walk(config_of("classification", tables, task_args={"class_weight": "balanced"}), count=1)
    batch, labels = run.material.streams[MAIN][0], run.material.data[MAIN].labels
    weight = len(labels) / (3 * np.bincount(labels))
    logits = run.material.model.apply(
        {"params": before.params}, steps.normalise(batch["table"], run.material.card), train=False
    )[0]
    expected = -scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)[np.arange(16), batch["label"]]
    expected = (weight[batch["label"]] * expected).mean()
    assert rows[0]["loss"] / rows[0]["examples"] == pytest.approx(expected, rel=1e-5)


# Streams and data through the trainer.


def test_a_term_that_reads_labels_of_the_unlabelled_stream_meets_a_key_error(tables, monkeypatch):
    def peek() -> Term:
        return Term(lambda context: Result(context.batch["target"]["label"].mean()), on=(MAIN, "target"))

    def peek_encoded() -> Term:
        return Term(lambda context: Result(context.encoded["target"].mean()), on=(MAIN, "target"))

    for name, term in {"peek": peek, "peek_encoded": peek_encoded}.items():
        monkeypatch.setitem(TERMS, name, term)
        with pytest.raises(KeyError, match="label" if name == "peek" else "target"):
            walk(kind_of("adaptation", tables, terms={name: {}}), count=1)


def test_poisoned_labels_of_the_target_change_no_number(tables, tmp_path):
    """The labels of the unlabelled stream turned round: training leaves the same weights, bit for bit."""
    lines = (tables / "target_classification.csv").read_text().splitlines()
    swap = str.maketrans("abc", "bca")
    (tmp_path / "target.csv").write_text("\n".join([lines[0], *(line.translate(swap) for line in lines[1:])]))
    target = {"source": f"table:{tmp_path}/target.csv", "split": "train", "batch_size": 8}
    config = kind_of("adaptation", tables)
    one, other = walk(config), walk(options.override(config, {"streams": {"target": target}}))
    assert not np.array_equal(*(each.run.material.data["target"].labels for each in (one, other)))
    assert trees.leaf_hashes(one.after) == trees.leaf_hashes(other.after)


def test_classes_are_balanced_and_domains_are_equal_parts_of_every_batch(tables):
    sources = tuple(f"table:{tables}/{name}_classification.csv" for name in ("source", "target"))
    changes = {"data.source": sources, "data.sampling": "class_balanced", "batch_size": 12, "total": (2.0, "steps")}
    run, *_, rows = walk(config_of("classification", tables, **changes))
    counts = np.zeros((2, 3), int)
    for step in range(5):
        batch = run.material.streams[MAIN][step]
        np.testing.assert_array_equal(np.bincount(batch["domain"]), [6, 6])
        for d, label in zip(batch["domain"], batch["label"], strict=True):
            counts[d, label] += 1
    np.testing.assert_array_equal(counts, 10)  # every class equally often, in each domain
    assert len(rows) == 2 and rows[0]["examples"] == 12


def test_training_on_what_is_scored_needs_leave_and_is_reported(tables, tmp_path, capsys):
    source = f"table:{tables}/target_classification.csv"
    changes = {"data.extra_eval": (("target_test", source, "train[50%:]"),)}
    with pytest.raises(
        ValueError, match=r"40 of 40 examples of target_test, which is scored, .*data.transductive=True"
    ):
        train(kind_of("adaptation", tables, **changes), tmp_path / "refused", verbose=False)
    result = train(kind_of("adaptation", tables, **changes, **{"data.transductive": True}), tmp_path / "w")
    assert "40 examples of target_test, which is scored, are in the training stream 'target'" in capsys.readouterr().out
    assert result["transductive"] == [{"stream": "target", "scored": "target_test", "examples": 40}]


def test_cached_answers_of_a_teacher_are_its_live_ones(tables, teacher, tmp_path):
    networks = {"teacher": {"name": "mlp_medium", "weights": str(teacher), "cache": "features"}}
    config = kind_of("distillation", tables, teacher, networks=networks, cache_dir=str(tmp_path))
    assert_same_training(walk(kind_of("distillation", tables, teacher)), walk(config))
    loaded, run = load.load("mlp_medium", teacher), walk(config).run
    program = single.Single(run, sharding.make_parallel("jit", jax.devices()[:1]))
    batch = program.batches(0, program.initial(0), [MAIN], never)[MAIN][0]
    x = steps.normalise(jnp.asarray(run.material.data[MAIN].inputs[batch["index"]]), loaded.card)
    expected = loaded.model.apply(loaded.variables, x, train=False)[0]
    np.testing.assert_allclose(batch["teacher"], expected, rtol=1e-5, atol=1e-5)


def test_a_teacher_of_another_size_sees_the_crop_of_the_student():
    config = options.override(distill_digits.get_config(), {
        **SHORT, "data.shots": 0, "model.image_size": 8, "networks": {"teacher": {**TEACHER, "image_size": 16}},
        "data.augment": (("random_resized_crop", {"scale": (0.2, 0.9)}), ("flip", {})),
    })  # fmt: skip
    material = build.prepare(read(config), sharding.make_parallel("jit", jax.devices()[:1]))
    assert material.readers["teacher"].field == "image:teacher" and material.readers["model"].field == "image"
    stream, pictures = material.streams[MAIN], set()
    for step in range(4):
        batch = stream[step]
        assert batch["image"].shape == (8, 8, 8, 3) and batch["image:teacher"].shape == (8, 16, 16, 3)
        halved = batch["image:teacher"].astype(float).reshape(8, 8, 2, 8, 2, 3).mean((2, 4))
        for small, large, other in zip(batch["image"], halved, np.roll(halved, 1, axis=0), strict=True):
            near, far = (np.abs(small - x).mean() for x in (large, other))
            assert near < 0.5 * far
            pictures.add(small.tobytes())
    assert len(pictures) == 32


def test_photos_with_columns_of_counts_are_a_regression(shared, tmp_path):
    """Blood smears and the counts of their cells, a file of comma-separated values, through the whole trainer."""
    config = options.override(ink_regression.get_config(), {
        **SHORT, "data.source": f"csv:{shared}/data/bccd_320/labels.csv", "data.labels": ("red_cells", "white_cells"),
        "data.train": "train[:20%]", "data.val": "val[:30%]", "data.test": "test[:20%]", "method.name": "linear_probe",
    })  # fmt: skip
    result = train(config, tmp_path / "w", verbose=False)
    assert result["task"] == "regression" and result["metrics"]["rmse"]["value"] > 0
    card = json.loads((tmp_path / "w" / "audit.json").read_text())["phases"][0]["card"]
    assert card["class_names"] == ["red_cells", "white_cells"] and len(card["target_mean"]) == 2
    assert [row["target"] for row in result["metrics"]["per_target"]] == ["red_cells", "white_cells"]


# The same in processes of their own, as users start them: with optimised programs, on other devices, and killed.
PROGRAM = """
import json, sys
from tl_jax import config
from tl_jax.training.train import train
train(config.from_flat(json.load(open(sys.argv[1]))), sys.argv[2], verbose=False)
"""


def start(config, folder, devices=1):
    """Begins a run in a process of its own."""
    path = folder.parent / f"{folder.name}.json"
    path.write_text(json.dumps(options.flatten(config)))
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(path), str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process):
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind if kind in KINDS[:2] else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in KINDS]
)
def test_a_run_killed_at_random_moments_ends_bit_equal_to_an_unbroken_one(kind, tables, teacher, tmp_path):
    config = kind_of(kind, tables, teacher, total=(60.0, "steps"), eval_every=(4.0, "steps"))
    finish(start(config, tmp_path / "whole"))
    folder, kills = tmp_path / "w", 0
    for rows in sorted(random.Random(0).sample(range(1, 10), 3)):  # evaluations, of 15, after which it is killed
        process = start(config, folder)
        while process.poll() is None and evaluations(folder) < rows:
            time.sleep(0.01)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    finish(start(config, folder))
    assert kills and remains(folder) == remains(tmp_path / "whole")


def evaluations(folder):
    """How many evaluations metrics.jsonl holds."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"val/loss"') if path.exists() else 0


# Small runs of the configs themselves, with convolutions, BatchNorm and heads of several layers.
SGD = {"optimizer": "sgd", "optimizer_args": {"momentum": 0.9}, "lr": 1e-2}
IMAGES = {
    "dann_digits": {
        "streams": {"target": {"source": "digits:faded", "split": "train[:20%]"}},
        "terms": {"dann": {"width": 16, "strength": 0.5}},
    },
    "distill_digits": {"data.shots": 0, "networks": {"teacher": {"name": "resnet8_cifar", "weights": ""}}},
    "ink_regression": {},
    "digit_pairs": {},
    "parity": {},
}


def image_config(name, **changes):
    config = importlib.import_module(f"configs.{name}").get_config()
    return options.override(config, {**SHORT, **SGD, **IMAGES[name], **changes})


@pytest.mark.slow
@pytest.mark.parametrize("norm_batches", ["joint", pytest.param("per_stream", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", IMAGES)
def test_eight_devices_train_the_configs_as_one_does(name, norm_batches, tmp_path):
    if norm_batches == "per_stream" and name != "dann_digits":
        pytest.skip("one stream")
    config = image_config(name, norm_batches=norm_batches)
    folders = {devices: tmp_path / f"{devices}" for devices in (1, 8)}
    for devices, folder in folders.items():
        finish(start(config, folder, devices))
    rows = [files.read_rows(folder / "metrics.jsonl") for folder in folders.values()]
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    weights = [formats.read(folder / "trained.safetensors")[0] for folder in folders.values()]
    assert weights[0].keys() == weights[1].keys()
    for path, leaf in weights[0].items():
        np.testing.assert_allclose(leaf, weights[1][path], rtol=1e-5, atol=1e-5, err_msg=path)
    results = [files.read_json(folder / "result.json")["metrics"]["count"] for folder in folders.values()]
    assert results[0] == results[1]


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
