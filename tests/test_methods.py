"""Every named method through the trainer: exactly what it says moves, and what it leaves computes what it scored."""

import json
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from test_pretrained import TINY_VIT, add_variants

from configs import methods, smoke
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import trees
from tl_jax.data import pipeline, sources
from tl_jax.methods import probes
from tl_jax.models import vit
from tl_jax.runtime import sharding
from tl_jax.runtime.checkpoint import Checkpoints
from tl_jax.tasks import load_predictions
from tl_jax.training import build, optim, single, steps
from tl_jax.training.train import train
from tl_jax.weights import delta, formats, load

STEPS = 4
EVERY = "backbone/.*"
LAST_BLOCKS = r"backbone/stage[23]/block0/.*"
# The backbone parameters that move; what stands beside the network is named where a method has it.
MOVES = {
    "linear_probe": "",
    "full": EVERY,
    "last_k": LAST_BLOCKS,
    "first_k": "backbone/(stem|stage1/block0)/.*",
    "bitfit": "backbone/.*/bias",
    "norm_only": r"backbone/.*norm\d?/(scale|bias)",
    "layer_decay": EVERY,
    "auto_rgn": EVERY,
    "lp_ft": EVERY,
    "head_then_last": LAST_BLOCKS,
    "gradual": EVERY,
    "l2_sp": EVERY,
    "delta": EVERY,
    "bss": EVERY,
    "co_tuning": f"{EVERY}|source_head/.*",
    "stoch_norm": EVERY,
    "r_drop": EVERY,
    "l1": EVERY,
    "lora": "lora/.*",
    "adapter": "adapter/.*",
    "prompt": "prompt/.*",
    "prompt_deep": "prompt/.*",
    "ssf": "ssf/.*",
    "knn": None,
    "logistic": None,
    "ridge": None,
}
FAST = ("lora",)
VITS = {"adapter": "vit_tiny_patch16_224", "prompt": "small_vit", "prompt_deep": "small_vit"}


class Trained(NamedTuple):
    """A run that has ended: what was built, the last state, and the folder."""

    config: object
    run: build.Run
    state: dict
    opt_state: object
    result: dict
    folder: object


def make_config(name, **changes):
    config = smoke.get_config()
    transformer = {"model.name": VITS.get(name), "model.weights": "", "model.image_size": 32}
    config = options.override(config, {
        # A zero head would give the backbone no gradient at first.
        "model.image_size": 16, "model.head_init": "lecun",
        "data.train": "train[:5%]", "data.val": "", "data.test": "test[:8%]", "data.shots": 0, "select": "last",
        "batch_size": 8, "eval_batch_size": 64, "log_every": (1.0, "steps"), "eval_every": (1.0, "epochs"), "lr": 3e-3,
        "total": (float(STEPS), "steps"), "resamples": 10, **(transformer if name in VITS else {}), **changes,
    })  # fmt: skip
    return options.override(config, methods.methods(STEPS, "steps")[name])


def run_method(name, folder, monkeypatch, **changes):
    """Trains; the run built once more, and the last state as its checkpoint has it."""
    add_variants(monkeypatch, vit.vit_variants("small_vit", TINY_VIT, 3, 48))
    config, parallel = make_config(name, **changes), sharding.make_parallel()
    result = train(config, folder, verbose=False)
    run = build.build(config, parallel)
    if name in probes.NAMES:
        return Trained(config, run, {}, None, result, folder)
    program = single.Single(run, parallel)
    with Checkpoints(folder / "checkpoints", program.constant_hashes()) as checkpoints:
        state = checkpoints.restore(run.total_steps, program.initial(len(run.phases) - 1))
    return Trained(config, run, jax.device_get(single.current_variables(state)), state.opt_state, result, folder)


def flat(variables):
    return {path: np.asarray(leaf) for path, leaf in trees.flatten(variables).items()}


def moved_leaves(trained):
    """The leaves whose bytes are not those that were loaded."""
    before, after = trees.leaf_hashes(trained.run.material.variables), trees.leaf_hashes(trained.state)
    assert before.keys() == after.keys()
    return {path for path in before if before[path] != after[path]}


def logits_of(model, variables, card):
    """The logits of the run's test images, without the code that scored them."""
    source = sources.load("digits", "test[:8%]")
    batches = pipeline.eval_batches(source, {"image": pipeline.View(card)}, len(source))
    task = tasks.make(tasks.Spec(class_names=source.class_names))
    step = jax.jit(steps.make_eval_step(steps.Reader(model, card, "image"), task))
    return np.asarray(step(variables, batches[0]["image"])["logits"])


def read(trained, name):
    return json.loads((trained.folder / name).read_text())


def check_what_moved(name, trained):
    """The leaves that moved are those that the method names, and the audit says so leaf by leaf."""
    moved = moved_leaves(trained)
    pattern = re.compile(f"head/.*|{MOVES[name]}")
    paths = list(trees.flatten(trained.run.material.variables["params"]))
    intended = {path for path in paths if pattern.fullmatch(path)}
    assert len(intended) > 2 or name == "linear_probe"
    assert {path.removeprefix("params/") for path in moved if path.startswith("params/")} == intended
    report = read(trained, "audit.json")
    phases = report["phases"]
    assert {row["path"] for phase in phases for row in phase["parameters"] if row["trainable"]} == intended
    updated = {row["path"] for phase in phases for row in phase["statistics"] if row["policy"] == "update"}
    assert {path.removeprefix("batch_stats/") for path in moved if path.startswith("batch_stats/")} == updated
    hashes = trees.leaf_hashes(trained.state)
    assert report["proof"]["hashes"] == {path: hash for path, hash in hashes.items() if path not in moved}
    return moved, intended


def check_files(trained, moved):
    """trained.safetensors holds the moved leaves bit for bit; with the base they compute what was scored."""
    state, (tensors, _) = flat(trained.state), formats.read(trained.folder / "trained.safetensors")
    assert set(tensors) == {path for path in moved if not path.startswith("params/source_head/")}
    for path, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, state[path], err_msg=path)
    scored = load_predictions(trained.folder / "predictions.npz").values
    loaded = delta.load(trained.folder / "trained.safetensors")
    np.testing.assert_allclose(logits_of(loaded.model, loaded.variables, loaded.card), scored, atol=1e-5)
    exported, added = trained.folder / "model.safetensors", {name for name, _ in trained.config.method.add}
    assert exported.exists() == (not added & {"adapter", "prompt"})
    if exported.exists():
        model, variables, card, *_ = load.load(trained.config.model.name, exported)
        np.testing.assert_allclose(logits_of(model, variables, card), scored, atol=1e-5)
        if not added:
            for path, leaf in flat(variables).items():
                np.testing.assert_array_equal(leaf, state[path], err_msg=path)


def check_cost(trained, intended):
    cost, state = read(trained, "cost.json"), flat(trained.state)
    assert cost["trainable_parameters"] == sum(state[f"params/{path}"].size for path in intended)
    assert cost["trainable_parameters"] == trained.result["trainable_parameters"]
    assert cost["steps"] == STEPS == sum(phase["steps"] for phase in cost["phases"]) and cost["seconds"] > 0
    # At least a multiplication and an addition for each weight of a forward pass.
    assert cost["flops_per_step"] > 2 * 8 * sum(
        leaf.size for path, leaf in state.items() if path.startswith("params/backbone") and path.endswith("kernel")
    )
    assert cost["memory_bytes"] > sum(leaf.nbytes for leaf in state.values())


def check_method(name, trained):
    """What a method adds to plain steps has reached them."""
    rows = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    added, keys = set(trained.config.terms), {key for row in rows for key in row if key.startswith("train/")}
    assert all(any(row.get(f"train/{term}", 0.0) > 0 for row in rows) for term in added)
    plain = {"train/loss", "train/accuracy", "train/grad_norm", "train/lr"}
    assert keys == plain | {f"train/{term}" for term in added | ({"task"} if added else set())}
    assert trained.run.phases[-1].plan.readers["model"].module.stoch_norm == (0.5 if name == "stoch_norm" else 0.0)
    ratios = [x for x in jax.tree.leaves(trained.opt_state, is_leaf=is_auto_rgn) if is_auto_rgn(x)]
    assert [sorted(state.ratios) for state in ratios] == ([PARTS] if name == "auto_rgn" else [])
    rates = {row["lr_mult"] for row in read(trained, "audit.json")["phases"][-1]["parameters"] if row["trainable"]}
    if name == "layer_decay":
        assert sorted(rates) == pytest.approx([0.03 * 0.75**i for i in (4, 3, 2, 1)] + [1.0])
    assert len(trained.run.phases) == {"lp_ft": 2, "head_then_last": 2, "gradual": 4}.get(name, 1)


PARTS = ["stage1/block0", "stage2/block0", "stage3/block0", "stem"]


def is_auto_rgn(state):
    return isinstance(state, optim.RelativeGradientNorm)


def test_every_method_is_in_the_table():
    assert set(MOVES) == set(methods.METHODS)


SLOW = [name for name in MOVES if MOVES[name] is not None and name not in FAST]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_exactly_what_the_method_names_moves_and_its_files_compute_what_it_scored(name, tmp_path, monkeypatch):
    trained = run_method(name, tmp_path / "w", monkeypatch)
    moved, intended = check_what_moved(name, trained)
    check_files(trained, moved)
    check_cost(trained, intended)
    check_method(name, trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MOVES if MOVES[name] is None])
def test_a_probe_without_gradient_changes_the_head_alone(name, tmp_path, monkeypatch):
    trained = run_method(name, tmp_path / "w", monkeypatch, **{"data.val": "train[80%:]"})
    loaded, cost = flat(trained.run.material.variables), read(trained, "cost.json")
    assert (tmp_path / "w" / "model.safetensors").exists() == (name != "knn")
    assert cost["steps"] == 0 and cost["trainable_parameters"] == (0 if name == "knn" else 650)
    assert read(trained, "audit.json")["proof"]["hashes"] == {
        path: hash for path, hash in trees.leaf_hashes(loaded).items() if not path.startswith("params/head/")
    }
    if name != "knn":
        model, variables, card, *_ = load.load("resnet8_cifar", tmp_path / "w" / "model.safetensors")
        differ = {path for path, leaf in flat(variables).items() if not np.array_equal(leaf, loaded[path])}
        assert differ == {"params/head/kernel", "params/head/bias"}
        scored = load_predictions(tmp_path / "w" / "predictions.npz").values
        np.testing.assert_allclose(logits_of(model, variables, card), scored, atol=1e-4)
