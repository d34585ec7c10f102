"""Tiny runs of every kind of training, walks of a few steps, and what is compared of them: shared by tests of runs."""

import importlib
from typing import NamedTuple

import jax
import numpy as np
import pytest

from tl_jax import config as options
from tl_jax.core import trees
from tl_jax.runtime import sharding
from tl_jax.training import build, single, steps
from tl_jax.training.train import never, train

# Tables are the cheapest of inputs: the same trainer, a program that compiles in a second.
ROWS = {"source": 160, "target": 80}
LABELS = {
    "classification": ["label"],
    "regression": ["amount", "other"],
    "multilabel": ["even", "first"],
    "binary": ["even"],
}


@pytest.fixture(scope="module", name="tables")
def make_tables(tmp_path_factory):
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
    words = rng.choice([f"w{i}" for i in range(40)], (120, 30))
    rows = [(c, " ".join([*words[i][: 1 + 29 * i // 120], "abc"[c]])) for i, c in enumerate(rng.integers(0, 3, 120))]
    rows = [rows[i] for i in rng.permutation(120)]
    (folder / "texts.csv").write_text("label,text\n" + "\n".join(f"{c},{text}" for c, text in rows) + "\n")
    return folder


@pytest.fixture(scope="module", name="teacher")
def make_teacher(tables, tmp_path_factory):
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


KINDS = ("adaptation", "distillation", "regression", "multilabel", "binary", "texts", "features")


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
    own["features"] = {
        "networks": own["distillation"]["networks"],
        "terms": {"fitnet": {"strength": 1.0}, "rkd": {}, "crd": {"negatives": 64, "width": 8}},
    }
    own["texts"] = {
        "data.source": f"text:{tables}/texts.csv", "model.name": "word_average_16_8d", "model.tokenizer": "words",
    }  # fmt: skip
    task = kind if kind in LABELS else "classification"
    return config_of(task, tables, **{**own.get(kind, {}), **changes})


# Small runs of the configs themselves, with convolutions, BatchNorm and heads of several layers.
SHORT = {
    "total": (3.0, "steps"), "log_every": (1.0, "steps"), "eval_every": (2.0, "steps"), "patience": 0, "min_delta": 0.0,
    "batch_size": 8, "eval_batch_size": 64, "resamples": 5, "data.train": "train[:10%]", "data.val": "train[95%:]",
    "data.test": "test[:5%]",
}  # fmt: skip
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


# Walks.


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
    before, sums, compiled = jax.device_get(state), [], {}
    sets = program.batches(0, state, list(run.phases[0].plan.streams), never)
    for done, batch in enumerate(program.iterate(sets, 0, count or run.total_steps), 1):
        shapes = single.shapes_of(batch)
        if shapes not in compiled:
            compiled[shapes], _ = program.compile(0, state, batch)
        state = jax.block_until_ready(compiled[shapes](state, batch))
        state, line = program.take_line(0, state, done)
        sums.append(program.read_line(line)[0][0])
    return Walk(run, before, jax.device_get(state), sums)


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


# What is compared.


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


def remains(folder):
    """Everything that a run leaves and its seed determines."""
    with np.load(folder / "predictions.npz") as file:
        arrays = {name: file[name].tobytes() for name in file.files}
    names = ("metrics.jsonl", "result.json", "audit.json", "trained.safetensors", "config.json")
    return {"predictions": arrays, **{name: (folder / name).read_bytes() for name in names}}


# Interruptions.


class Crash(Exception):
    pass


def crash_at(step):
    def stop_requested(done):
        if done == step:
            raise Crash
        return False

    return stop_requested
