"""The trained part as a file: small, complete, and bound to the weights that it was trained on."""

import json
import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest
from test_pretrained import TINY_VIT, add_variants, random_variables

from configs import smoke
from tl_jax import config as options
from tl_jax import models
from tl_jax.core import messages, trees
from tl_jax.models import peft, vit
from tl_jax.models.mlp import MLP
from tl_jax.runtime import sharding
from tl_jax.training import audit
from tl_jax.training import build as run
from tl_jax.weights import delta, formats, load

SLOW = pytest.mark.slow
GLYPHS = "tl_jax/assets/glyphs.safetensors"


class Saved(NamedTuple):
    """A part on disk, what was built for it, and the variables that it is of."""

    path: object
    run: run.Material  # what a run was built of
    trainable: int
    variables: dict


def save_part(tmp_path, further=None, **changes):
    """A part as a run leaves it; what training would have moved has random numbers added.

    further: networks beside the model, {name: its variables}.
    """
    config = options.override(smoke.get_config(), {"method.name": "last_k", "method.k": 1, **changes})
    whole = run.build(config, sharding.make_parallel())
    built, (report,) = whole.material, (phase.audit for phase in whole.phases)
    rng, frozen = np.random.default_rng(0), audit.frozen_hashes(built.variables, [report])
    moved = {
        path: np.asarray(leaf) + rng.uniform(0.1, 0.3, leaf.shape).astype(np.float32)
        for path, leaf in trees.flatten(built.variables).items()
        if path not in frozen
    }
    variables = trees.merge(built.variables, moved)
    for name, theirs in (further or {}).items():
        variables = {kind: {**tree, name: theirs[kind]} for kind, tree in variables.items()}
    path, config_seed = tmp_path / "trained.safetensors", config.seed
    delta.save(
        path, variables, audit.prove([report], built.variables, variables), built.card,
        model=config.model.name, weights=built.base, seed=config_seed, additions=built.model.additions,
    )  # fmt: skip
    return Saved(path, built, report["totals"]["trainable"], variables)


def logits_of(model, variables, size):
    x = np.random.default_rng(1).standard_normal((3, size, size, 3)).astype(np.float32)
    return np.asarray(jax.jit(lambda v: model.apply(v, x, train=False)[0])(variables))


def network_of(saved):
    """The variables of the model with its added parameters."""
    own = (*peft.MODEL, *(name for name, _ in saved.run.model.additions))
    return {kind: {k: v for k, v in tree.items() if k in own} for kind, tree in saved.variables.items()}


def check_same(loaded, saved):
    expected, found = (trees.leaf_hashes(jax.device_get(v)) for v in (network_of(saved), loaded.variables))
    assert messages.difference(expected, found) == []
    size = loaded.card.input_size
    np.testing.assert_array_equal(
        logits_of(loaded.model, loaded.variables, size), logits_of(saved.run.model, saved.variables, size)
    )
    assert loaded.card == saved.run.card


@pytest.fixture
def tiny_vit(monkeypatch, tmp_path):
    """The options of a small transformer with a weight file of its own."""
    name = add_variants(monkeypatch, vit.vit_variants("small_vit", TINY_VIT, 3, 48))
    path = tmp_path / "vit.safetensors"
    load.export(random_variables(name), name, path, card=models.get(name).card)
    return {"model.name": name, "model.weights": str(path), "method.name": "linear_probe", "method.k": 0}


def test_part_and_base_are_the_trained_network_wherever_the_base_lies(tmp_path):
    shutil.copy(GLYPHS, tmp_path / "then.safetensors")
    saved = save_part(tmp_path, **{"model.weights": str(tmp_path / "then.safetensors")})
    check_same(delta.load(saved.path), saved)
    (tmp_path / "then.safetensors").rename(tmp_path / "now.safetensors")
    check_same(delta.load(saved.path, weights=tmp_path / "now.safetensors"), saved)
    with pytest.raises(FileNotFoundError, match=r"then\.safetensors"):
        delta.load(saved.path)


def test_another_base_is_refused_with_both_hashes(tmp_path):
    saved = save_part(tmp_path)
    tensors, metadata = formats.read(GLYPHS)
    tensors["conv1.weight"][0, 0, 0, 0] = np.nextafter(tensors["conv1.weight"][0, 0, 0, 0], np.float32(9))
    other = tmp_path / "other.safetensors"
    formats.write_safetensors(other, tensors, metadata)
    with pytest.raises(ValueError, match="Give the file that it was trained on") as error:
        delta.load(saved.path, weights=other)
    assert formats.sha256(GLYPHS) in str(error.value) and formats.sha256(other) in str(error.value)
    with pytest.raises(ValueError, match="has none: random weights"):
        delta.load(saved.path, weights="")


def test_the_file_is_as_large_as_what_was_trained(tmp_path):
    saved = save_part(tmp_path)
    tensors, _ = formats.read(saved.path)
    assert {path.split("/")[1] + "/" + path.split("/")[2] for path in tensors} == {
        "backbone/stage3", "head/kernel", "head/bias",
    }  # fmt: skip
    assert {path.split("/")[0] for path in tensors} == {"params", "batch_stats"}
    content = saved.path.read_bytes()
    values = sum(tensor.size for tensor in tensors.values())
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + 4 * values
    trainable = saved.trainable
    statistics = sum(t.size for path, t in tensors.items() if path.startswith("batch_stats/"))
    assert values == trainable + statistics < sum(leaf.size for leaf in jax.tree.leaves(saved.variables))


@pytest.mark.slow
@pytest.mark.parametrize(
    "add",
    [
        (("adapter", {"bottleneck": 3}),),
        pytest.param((("prompt", {"tokens": 2, "deep": True}), ("lora", {"rank": 2, "alpha": 3.0})), marks=SLOW),
    ],
)
def test_added_parameters_come_back_around_the_network(tmp_path, tiny_vit, add):
    saved = save_part(tmp_path, **tiny_vit, **{"method.add": add})
    loaded = delta.load(saved.path)
    assert isinstance(loaded.model, peft.Adapted)
    assert [(name, dict(args)) for name, args in loaded.model.additions] == [(name, args) for name, args in add]
    check_same(loaded, saved)
    kinds = {path.split("/")[1] for path in formats.read(saved.path)[0]}
    assert kinds == {"head", *(name for name, _ in add)}


@SLOW
def test_what_only_penalties_look_at_stays_behind(tmp_path):
    saved = save_part(tmp_path, **{"terms": {"l2_sp": {}, "co_tuning": {}}})
    assert {"reference", "source_head"} & set(saved.variables["params"])
    check_same(delta.load(saved.path), saved)
    assert not any(path.startswith(("params/reference", "params/source_head")) for path in formats.read(saved.path)[0])


@pytest.mark.slow
def test_further_networks_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    theirs = MLP(num_classes=1, widths=(8,), norm=True).init(jax.random.key(0), rng.random((1, 64)))
    further = {"discriminator": theirs, "teacher": jax.tree.map(lambda x: x + 1, theirs)}
    saved = save_part(tmp_path, further)
    check_same(delta.load(saved.path), saved)
    assert {path.split("/")[1] for path in formats.read(saved.path)[0]} == {"backbone", "head"}


HEAD_RESTS = {"method.name": "rules", "method.k": 0, "method.rules": (("backbone/stage3/.*", "x"), (".*", "frozen"))}


@pytest.mark.parametrize(
    "changes",
    [
        {"model.reinit": ("stage1", "stage3"), "method.name": "linear_probe", "method.k": 0},
        {"model.head_init": "lecun", **HEAD_RESTS},
        pytest.param({"model.weights": "", "seed": 3}, marks=SLOW),
    ],
)
def test_what_no_file_gives_back_comes_back_all_the_same(tmp_path, changes):
    saved = save_part(tmp_path, **changes)
    check_same(delta.load(saved.path), saved)


def test_a_kept_head_that_rests_comes_back(tmp_path):
    first = save_part(tmp_path)
    whole = tmp_path / "model.safetensors"
    load.export(first.variables, "resnet8_cifar", whole, card=first.run.card)
    second = save_part(tmp_path, **{"model.weights": str(whole), "model.keep_head": True, **HEAD_RESTS})
    np.testing.assert_array_equal(second.variables["params"]["head"]["bias"], first.variables["params"]["head"]["bias"])
    check_same(delta.load(second.path), second)


def test_a_foreign_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"glyphs.safetensors is no delta checkpoint .*trained\.safetensors"):
        delta.load(GLYPHS)
    saved = save_part(tmp_path)
    content = saved.path.read_bytes()
    saved.path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        delta.load(saved.path)
    with pytest.raises(FileNotFoundError):
        delta.load(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("params/head/kernel"), "the frozen parameters differ"),
        (
            lambda tensors: tensors.update({"params/backbone/stage9/x": np.zeros(2, np.float32)}),
            r"stage9/x \(2,\)'.*lacks",
        ),
        (
            lambda tensors: tensors.update({"params/head/kernel": np.zeros((64, 9), np.float32)}),
            r"head/kernel \(64, 9\)'.*lacks",
        ),
    ],
)
def test_a_part_that_does_not_fill_the_network_is_refused(tmp_path, change, message):
    saved = save_part(tmp_path)
    tensors, metadata = formats.read(saved.path)
    change(tensors)
    formats.write_safetensors(saved.path, tensors, metadata)
    with pytest.raises(ValueError, match=message):
        delta.load(saved.path)


def test_the_card_and_the_base_stand_in_the_file(tmp_path):
    saved = save_part(tmp_path)
    about = json.loads(formats.read(saved.path)[1][delta.KEY])
    assert (about["model"], about["weights"]) == (
        "resnet8_cifar", {"file": "builtin:glyphs", "sha256": formats.sha256(GLYPHS)},
    )  # fmt: skip
    assert delta.load(saved.path).card.class_names == tuple("0123456789")
