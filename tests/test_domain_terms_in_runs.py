"""Terms on two domains through the trainer: they train, resume bit-equal, and are one on eight devices and on one."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_domain_terms import NAMES
from walks import Crash, assert_close, crash_at, losses_on_one_batch, remains, take_walk, variables_of

from tl_jax import config as options
from tl_jax.core import files, trees
from tl_jax.methods import domain
from tl_jax.runtime import sharding
from tl_jax.tasks import METRICS
from tl_jax.training import build, settings, single
from tl_jax.training.terms import make_terms
from tl_jax.training.train import never, train

ROOT = pathlib.Path(__file__).resolve().parents[1]
BOTTLENECK = (("dense", {"features": 6}), ("batch_norm", {}), ("relu", {}))
# Small networks, thresholds that some answers pass at once, and the inputs themselves as the second view.
ARGUMENTS = {
    "dann": {"width": 12},
    "cdan": {"width": 12, "largest": 0, "random": 20},
    "jan": {"adversarial": True},
    "fixmatch": {"threshold": 0.26, "view": "table"},
    "self_ensembling": {"threshold": 0.26, "view": "table"},
    "mmd": {"estimate": "linear"},
}
NETWORKS = {
    "dann": {"discriminator"},
    "cdan": {"conditional_discriminator"},
    "jan": {"theta"},
    "mcd": {"second_head"},
    "mdd": {"adversarial_head"},
}
NAMES = [name for name in NAMES if name not in ("mcd_source", "mcd_discrepancy")]  # which take turns
FEW = ("cdan", "mcd", "self_ensembling")
TERMS = [name if name == "cdan" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Two source domains and a target of four classes, with seven columns, told apart by a shift and a scale."""
    folder = tmp_path_factory.mktemp("tables")
    for k, (name, rows) in enumerate({"one": 90, "two": 50, "target": 70}.items()):
        rng = np.random.default_rng(k)
        labels = np.arange(rows) % 4
        x = 1.5 * np.eye(4, 7)[labels] + rng.standard_normal((rows, 7)) * (1 + 0.2 * k) + 0.6 * k
        lines = [",".join(f"{v:.5f}" for v in row) + f",{'abcd'[c]}" for row, c in zip(x, labels, strict=True)]
        head = ",".join([*(f"x{c}" for c in range(7)), "label"])
        (folder / f"{name}.csv").write_text("\n".join([head, *lines]) + "\n")
    return folder


def config_of(tables, name, sizes=(12, 12), several=False, **changes):
    one, two, target = (f"table:{tables}/{part}.csv" for part in ("one", "two", "target"))
    terms = {name: ARGUMENTS.get(name, {})}
    return options.override(options.make(), {
        "model.name": "mlp_small", "model.head_init": "lecun", "model.head": BOTTLENECK, "data.labels": ("label",),
        "data.source": (one, two) if several else one, "data.train": "train[:60%]", "data.val": "train[60%:80%]",
        "data.test": "train[80%:]", "method.name": "full", "optimizer": "sgd", "optimizer_args": {"momentum": 0.9},
        "lr": 0.05, "batch_size": sizes[0], "total": (3.0, "steps"), "log_every": (1.0, "steps"),
        "eval_every": (2.0, "steps"), "resamples": 5, "terms": terms, "ema": 0.9 * (name == "self_ensembling"),
        "streams": {"target": {"source": target, "split": "train", "batch_size": sizes[1]}}, **changes,
    })  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_every_term_trains_its_networks_and_resumes_bit_equal_after_it_was_stopped(name, tables, tmp_path):
    """With an odd batch of the target, two source domains, and BatchNorm stream by stream."""
    config = config_of(tables, name, (12, 12 if name == "mmd" else 8), several=True, norm_batches="per_stream")
    for step in (1, 2):
        with pytest.raises(Crash):
            train(config, tmp_path / "w", verbose=False, stop_requested=crash_at(step))
    train(config, tmp_path / "w", verbose=False)
    train(config, tmp_path / "whole", verbose=False)
    assert remains(tmp_path / "w") == remains(tmp_path / "whole")
    odd = (10, 10) if name == "mmd" else (10, 7)
    walked = take_walk(config_of(tables, name, odd, several=True, norm_batches="per_stream"), 1, 2)
    hashes = [trees.leaf_hashes(variables_of(state)) for state in (walked.before, walked.after)]
    moved = {path for path in hashes[0] if hashes[0][path] != hashes[1][path]}
    groups = {path.split("/")[1] for path in moved if path.startswith("params/")}
    assert groups == {"backbone", "head", *NETWORKS.get(name, ())}
    report = walked.run.phases[0].audit
    assert {f"batch_stats/{row['path']}" for row in report["statistics"]} <= moved
    for row in walked.sums:
        assert all(np.isfinite(value) for value in row.values())
        assert {name, *(f"{name}/{log}" for log in domain.TERMS[name]().logs)} <= row.keys()
    if name == "cdan":  # the random maps are there after a resume, as they were drawn
        maps = [state.memory["cdan"] for state in (walked.before, walked.after)]
        assert maps[0]["features"].shape == (6, 20) and maps[0]["classes"].shape == (4, 20)
        assert trees.leaf_hashes(maps[0]) == trees.leaf_hashes(maps[1])


def assert_same(left, right, logs=True):
    """Variables to 1e-5, and the means that the log shows: those of a kernel are differences of larger numbers."""
    assert_close(variables_of(left.after), variables_of(right.after))
    for one, other in zip(left.sums, right.sums, strict=True):
        names = [name for name in one if logs or "/" not in name]
        means = [np.array([row[name] for name in names]) / row["examples"] for row in (one, other)]
        np.testing.assert_allclose(*means, rtol=1e-5, atol=1e-5, err_msg=str(names))


@pytest.mark.slow
@pytest.mark.parametrize("norm_batches", ["joint", pytest.param("per_stream", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["mcd", *(pytest.param(name, marks=pytest.mark.slow) for name in FEW if name != "mcd")]
)
def test_four_devices_adapt_as_one_does(name, norm_batches, tables):
    config = config_of(tables, name, norm_batches=norm_batches)
    assert_same(take_walk(config, 1, 2), take_walk(config, 4, 2))


PROGRAM = """
import json, sys
sys.path.insert(0, "tests")
from test_domain_terms import NAMES
from test_domain_terms_in_runs import assert_same
from walks import take_walk
from tl_jax import config
for name, flat in json.load(open(sys.argv[1])).items():
    config_of_it = config.from_flat(flat)
    try:
        assert_same(take_walk(config_of_it, 1, 3), take_walk(config_of_it, 8, 3))
    except AssertionError as error:
        print(name, error)
"""


@pytest.mark.slow
@pytest.mark.exhaustive  # test_kills_and_devices.py adapts on eight devices in CI
@pytest.mark.parametrize("norm_batches", ["joint", "per_stream"])
def test_eight_devices_adapt_as_one_does(norm_batches, tables, tmp_path):
    configs = {}
    for name in NAMES:
        sizes = (16, 16) if name == "mmd" else (16, 24)
        config = config_of(tables, name, sizes, several=name != "mdd", norm_batches=norm_batches)
        configs[name] = options.flatten(config)
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "configs.json")]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert not found.stdout, found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "player", "sign"),
    [
        ("cdan", "conditional_discriminator", -1),
        pytest.param("cdan", "backbone", 1, marks=pytest.mark.slow),
        pytest.param("mdd", "adversarial_head", -1, marks=pytest.mark.slow),
        pytest.param("mdd", "backbone", 1, marks=pytest.mark.slow),
        pytest.param("jan", "theta", 1, marks=pytest.mark.slow),
        pytest.param("jan", "backbone", -1, marks=pytest.mark.slow),
    ],
)
def test_the_players_of_a_game_move_its_value_their_own_way(name, player, sign, tables):
    groups = {"backbone", "head", *NETWORKS[name]}
    own = {**ARGUMENTS.get(name, {}), **({} if name == "jan" else {"strength": 0.5})}
    changes = {
        "terms": {"task": {"weight": 0.0}, name: own}, "groups": {g: {"lr_mult": 0.0} for g in groups - {player}},
        "optimizer_args": {}, "lr": 0.003, "clip": 0.0, "weight_decay": 0.0,
    }  # fmt: skip
    moved = np.diff(losses_on_one_batch(config_of(tables, name, **changes)))
    assert (sign * moved > 0).all(), moved


@pytest.mark.slow
def test_a_second_head_has_the_layers_of_the_first_and_other_numbers(tables):
    own = (("dense", {"features": 5}), ("relu", {}))
    for name, changes, expected in (
        ("mcd", {}, {"head/dense0", "head/norm1", "head/out"}),
        ("mcd", {"terms": {"mcd": {"layers": own}}}, {"head/dense0", "head/out"}),
        ("mdd", {"terms": {"mdd": {"features": "embedding"}}}, {"head"}),
    ):
        run = build.build(config_of(tables, name, **changes), sharding.make_parallel("jit", jax.devices()[:1]))
        (network,) = NETWORKS[name]
        params = trees.flatten(run.material.variables["params"])
        made = {path.partition("/")[2]: x for path, x in params.items() if path.startswith(f"{network}/")}
        assert {path.rpartition("/")[0] for path in made} == expected
        for path, leaf in made.items():
            if path.endswith("kernel") and not changes:
                assert leaf.shape == params[path].shape and not np.array_equal(leaf, params[path])
        inputs = {"mcd": 64, "mdd": 6}[name]
        assert made["head/kernel" if name == "mdd" else "head/dense0/kernel"].shape[0] == inputs


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["pool", "flatten"])
def test_a_second_head_on_the_feature_map_is_refused(layer, tables):
    head = ((layer, {}), ("dense", {"features": 8}))
    changes = {"model.name": "resnet8_cifar", "model.head": head, "data.source": "digits", "data.labels": ()}
    changes["streams"] = {"target": {"source": "digits:faded", "split": "train[:10%]"}}
    with pytest.raises(ValueError, match=rf"terms.mcd.*model.head begins with '{layer}', which reads the feature map"):
        build.build(config_of(tables, "mcd", **changes), sharding.make_parallel("jit", jax.devices()[:1]))


@pytest.mark.parametrize("name", ["mmd", "coral", "mcc", "bnm", "bsp", "infomax", "balance", "dann", "mcd", "mdd"])
def test_losses_that_are_no_means_over_examples_refuse_parts_of_a_batch(name, tables):
    with pytest.raises(ValueError, match=f"{name} needs the whole batch at once: accumulate = 1"):
        build.build(config_of(tables, name, accumulate=2), sharding.make_parallel("jit", jax.devices()[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["entropy", "afn"])
def test_means_over_examples_are_the_same_in_parts(name, tables):
    configs = [config_of(tables, name, accumulate=n, **{"model.head": ()}) for n in (1, 2)]
    assert_same(*(take_walk(config, 1, 2) for config in configs), logs=False)


@pytest.mark.slow
def test_a_second_view_moves_the_statistics_after_the_training_pass(tables):
    """Source, target, and the target again as its own second view: each moves them by a tenth, in this order."""
    found = {}
    for name, terms in {"source": {}, "both": {"entropy": {}}, "again": {"fixmatch": {"view": "table"}}}.items():
        streams = {"streams": {}} if name == "source" else {}
        config = config_of(tables, name, norm_batches="per_stream", terms=terms, **streams)
        found[name] = trees.flatten(take_walk(config, 1, 1).after.batch_stats)
    for path, again in found["again"].items():
        expected = 1.9 * found["both"][path] - 0.9 * found["source"][path]
        np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-5, err_msg=path)
        assert not np.allclose(again, found["both"][path], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fixmatch", "self_ensembling"])
def test_a_strong_view_of_images_is_what_the_term_reads(name, tables):
    target = {"source": "digits:faded", "split": "train[:10%]", "batch_size": 8}
    target["strong"] = (("rand_augment", {}),) if name == "fixmatch" else (("flip", {}),)
    changes = {"model.name": "resnet8_cifar", "model.head": (), "data.source": "digits", "data.labels": ()}
    changes |= {"data.train": "train[:20%]", "data.val": "train[90%:]", "streams": {"target": target}}
    changes["terms"] = {name: {"threshold": 0.05}}
    walked = take_walk(config_of(tables, name, **changes), 1, 2)
    for row in walked.sums:
        assert row[f"{name}/confident"] == row["examples"] and np.isfinite(row["loss"])
    batch = walked.run.material.streams["target"][0]
    assert batch["image:strong"].shape == batch["image"].shape
    assert not np.array_equal(batch["image:strong"], batch["image"])


LABELS = {
    "binary": lambda a, b: "ny"[a > 0],
    "multilabel": lambda a, b: f"{int(a > 0)},{int(b > 0)}",
    "regression": lambda a, b: f"{a:.3f},{b + 9:.3f}",
}
NO_CLASSES = [name for name, make in domain.TERMS.items() if "classes" not in make().needs]


def config_of_task(tables, folder, task, **changes):
    """The tables with labels of a task, made of their first two columns, in place of classes."""
    for path in tables.glob("*.csv"):
        head, *rows = (line.split(",")[:-1] for line in path.read_text().splitlines())
        labels = [LABELS[task](*map(float, row[:2])) for row in rows]
        names = [f"y{i}" for i in range(labels[0].count(",") + 1)]
        lines = [head + names, *(row + [label] for row, label in zip(rows, labels, strict=True))]
        (folder / path.name).write_text("".join(",".join(line) + "\n" for line in lines))
    target = f"table:{folder}/target.csv"
    changes |= {"task": task, "data.labels": tuple(names), "data.extra_eval": (("scored", target, "train[60%:]"),)}
    changes |= {"streams": {"target": {"source": target, "split": "train[:60%]", "batch_size": 12}}}
    return config_of(folder, "task", several=True, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("task", LABELS)
def test_what_needs_no_classes_adapts_every_task(task, tables, tmp_path):
    """All terms in one program, whose loss is their sum; the target's labels are opened for its score alone."""
    made = {name: {"width": 12} if name in ("dann", "adda", "mdan") else {} for name in ("task", *NO_CLASSES)}
    config = config_of_task(tables, tmp_path, task, terms=made, select="best_val")
    result = train(config, tmp_path / "w", verbose=False)
    rows = files.read_rows(tmp_path / "w" / "metrics.jsonl")
    assert {f"train/{name}" for name in made} <= rows[0].keys()
    assert None not in (value for row in rows for value in row.values())
    assert np.isfinite(result["extra_eval"]["scored"][METRICS[task].monitor[0][0]]["value"])
    ledger = files.read_json(tmp_path / "w" / "ledger.json")
    assert ledger["sealed"] == ["scored", "target"]
    assert [r["stream"] for r in ledger["openings"] if r["phase"] == "score"] == ["scored"]


@pytest.mark.parametrize("task", LABELS)
def test_what_needs_classes_refuses_other_tasks_by_name_before_anything_is_loaded(task, tables, tmp_path):
    names = sorted(set(domain.TERMS) - set(NO_CLASSES))
    config = config_of_task(tables, tmp_path, task, terms={name: {} for name in names})
    with pytest.raises(ValueError) as error:
        make_terms(settings.read(config))
    for name in names:
        assert f"\n  {name} needs task = 'classification', found '{task}'; leave it out" in str(error.value)


def flops(config):
    parallel = sharding.make_parallel("jit", jax.devices()[:1])
    run = build.build(config, parallel)
    program = single.Single(run, parallel)
    state = program.initial(0)
    batch = next(program.iterate(program.batches(0, state, list(run.phases[0].plan.streams), never), 0, 1))
    return program.compile(0, state, batch)[1]["flops_per_step"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_step_of_dann_costs_little_more_than_a_supervised_one_of_as_many_examples(tables):
    """At 64 pixels, where the discriminator is a larger part of the step than at 224."""
    changes = {"model.name": "resnet18", "model.image_size": 64, "model.head": (), "data.source": "digits"}
    changes |= {"data.labels": (), "data.train": "train[:20%]", "data.val": "train[90%:]"}
    target = {"target": {"source": "digits:faded", "split": "train[:20%]", "batch_size": 8}}
    adapted = flops(config_of(tables, "dann", (8, 8), **changes, terms={"dann": {}}, streams=target))
    supervised = flops(config_of(tables, "dann", (16, 8), **changes, terms={}, streams={}))
    assert 1.0 < adapted / supervised <= 1.10
