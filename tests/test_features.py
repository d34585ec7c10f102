"""Cached features of what is frozen: the numbers of live training, checked when read, never computed twice."""

import collections
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import add_counted
from plans import make_reader

from configs import smoke
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.methods import rules
from tl_jax.models import MODELS, peft
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import build, feature_cache, single, steps
from tl_jax.training.train import train
from tl_jax.weights import formats

AUGMENT = (("rotation", {"degrees": 20.0}),)
LAST = {"method.name": "last_k", "method.k": 1}
PROBE = {"method.name": "linear_probe", "method.k": 0}
WAYS = {
    "head": PROBE,
    "last block": LAST,
    "two phases": {
        **PROBE,
        "phases": (
            (("total", (2, "steps")),),
            (("total", (2, "steps")), ("method.name", "last_k"), ("method.k", 1), ("lr", 1e-4)),
            (("total", (1, "steps")), ("method.name", "full"), ("method.mixup", 0.2)),
        ),
    },
    "lora behind a frozen stem": {
        **PROBE,
        "method.add": (("lora", {"rank": 2, "targets": "backbone/stage[23]/.*conv1/kernel"}),),
    },
    "moving average": {**LAST, "ema": 0.9},
}


def make_config(changes=(), **more):
    return options.override(smoke.get_config(), {"data.augment": AUGMENT, **dict(changes), **more})


def cached(changes, folder, **more):
    return make_config(changes, cache="features", cache_dir=str(folder), **more)


def numbers(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with np.load(folder / "predictions.npz") as file:
        arrays = {name: file[name] for name in ("logits", "features", "labels")}
    return rows, arrays, formats.read(folder / "model.safetensors")[0]


COMPUTING = "computing the features of"  # what is logged before features are computed


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [way if way == "last block" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_cached_training_has_the_numbers_of_live_training(tmp_path, way):
    views = 40  # more than the epochs: what is seen is what a live run sees
    train(make_config(WAYS[way]), tmp_path / "live", verbose=False)
    train(cached(WAYS[way], tmp_path / "cache", views=views), tmp_path / "cached", verbose=False)
    (rows, arrays, weights), (rows_live, arrays_live, weights_live) = (
        numbers(tmp_path / name) for name in ("cached", "live")
    )
    assert [sorted(row) for row in rows] == [sorted(row) for row in rows_live]
    for row, live in zip(rows, rows_live, strict=True):
        assert row == pytest.approx(live, rel=1e-5, abs=1e-5)
    for name, values in arrays.items():
        np.testing.assert_allclose(values, arrays_live[name], rtol=1e-4, atol=1e-5)
    assert weights.keys() == weights_live.keys()
    for name, values in weights.items():
        np.testing.assert_allclose(values, weights_live[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A cache that a linear probe has filled, and what that run left."""
    folder = tmp_path_factory.mktemp("cache")
    train(cached(PROBE, folder), folder / "run", verbose=False)
    return folder, numbers(folder / "run")


def test_the_same_features_are_never_computed_twice_and_counted_in_every_run(store, tmp_path, capsys):
    train(cached(PROBE, store[0], lr=1e-4), tmp_path / "w", verbose=False)
    assert COMPUTING not in capsys.readouterr().out
    cost, first = (json.loads((folder / "cost.json").read_text()) for folder in (tmp_path / "w", store[0] / "run"))
    assert cost["flops"] == first["flops"] > cost["flops_per_step"] * cost["steps"]


@pytest.mark.parametrize(("augment", "views", "epochs"), [(AUGMENT, 3, 3), (AUGMENT, 9, 4), ((), 1, 1)])
def test_features_count_once_for_every_example_and_view(augment, views, epochs):
    changes = {"data.augment": augment, "views": views, "total": (4.0, "epochs")}
    run = build.build(cached(PROBE, "", **changes), sharding.make_parallel())
    reader, variables = run.material.readers["model"], run.material.variables
    x = feature_cache.example(run.material.streams["train"], reader.field)
    live = jax.jit(steps.make_eval_step(reader, run.task, None)).lower(variables, x).cost_analysis()["flops"]
    each = single.flops_of_features(run, 0)["train"]
    assert 0.9 * live < each <= live  # all but the head
    assert single.kept(run, "train") == epochs * len(run.material.data["train"])


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},  # draws other shots, and augments otherwise
        {"data.train": "train[10%:60%]"},
        {"data.augment": ()},
        {"method.name": "last_k", "method.k": 1},
        {"model.prefix_dtype": "bfloat16"},
        {"model.weights": ""},
        {"data.card": {"mean": (0.5, 0.5, 0.5)}, "data.override_card": True},
    ],
    ids=str,
)
def test_whatever_the_features_depend_on_makes_others(store, tmp_path, capsys, change):
    shutil.copytree(store[0], tmp_path / "cache", ignore=shutil.ignore_patterns("run"))
    with pytest.raises(Preempted, match="stopped after the features of"):
        config = cached({**PROBE, **change}, tmp_path / "cache")
        train(config, tmp_path / "w", verbose=False, stop_requested=lambda step: True)
    assert COMPUTING in capsys.readouterr().out


@pytest.mark.slow
def test_weights_that_differ_in_their_values_alone_make_other_features(store, tmp_path, capsys):
    """A fine-tuned file has the card of the one it began with; features of it depend on what moved."""
    train(make_config(**{"method.name": "full", "total": (1, "steps")}), tmp_path / "tuned", verbose=False)
    shutil.copytree(store[0], tmp_path / "cache", ignore=shutil.ignore_patterns("run"))
    config = cached({**PROBE, "model.weights": str(tmp_path / "tuned" / "model.safetensors")}, tmp_path / "cache")
    with pytest.raises(Preempted, match="stopped after the features of"):
        train(config, tmp_path / "w", verbose=False, stop_requested=lambda step: True)
    assert COMPUTING in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.thin(2)
@pytest.mark.parametrize("damage", ["flip", "cut", "other key", "no file"])
def test_damaged_features_are_computed_anew(store, tmp_path, capsys, damage):
    folder = tmp_path / "cache"
    shutil.copytree(store[0], folder, ignore=shutil.ignore_patterns("run"))
    victim = max(folder.glob("*/features.bin"), key=lambda path: path.stat().st_size)
    if damage == "flip":
        with victim.open("r+b") as file:
            file.seek(100)
            byte = file.read(1)[0]
            file.seek(100)
            file.write(bytes([byte ^ 1]))
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "no file":
        victim.unlink()
    else:
        meta = victim.with_name("meta.json")
        meta.write_text(meta.read_text().replace("pre_logits", "stage1"))
    train(cached(PROBE, folder), tmp_path / "w", verbose=False)
    assert "are damaged; they are computed anew" in capsys.readouterr().out
    rows, arrays, weights = numbers(tmp_path / "w")
    assert rows == store[1][0] and all(np.array_equal(weights[name], store[1][2][name]) for name in weights)
    np.testing.assert_array_equal(arrays["logits"], store[1][1]["logits"])


@pytest.mark.slow
def test_a_computation_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    """Of the 40 images in batches of 16 the first two batches are there, and are not read again."""
    reads, asked = add_counted(monkeypatch), []

    def stop(step):
        asked.append(step)
        return len(asked) == 2

    def config(folder):
        return cached(PROBE, tmp_path / folder, **{"data.source": "counted", "eval_batch_size": 16})

    with pytest.raises(Preempted, match=r"after the features of 32 of 40 examples"):
        train(config("cache"), tmp_path / "w", verbose=False, stop_requested=stop)
    assert not list((tmp_path / "cache").glob("*/meta.json"))
    reads.clear()
    train(config("cache"), tmp_path / "w", verbose=False)
    resumed = collections.Counter(reads)
    reads.clear()
    train(config("other"), tmp_path / "whole", verbose=False)
    assert (collections.Counter(reads) - resumed).total() == 32 == len(reads) - resumed.total()
    assert numbers(tmp_path / "w")[0] == numbers(tmp_path / "whole")[0]


def test_what_is_on_disk_is_taken_without_reading_an_image(tmp_path, monkeypatch):
    reads = add_counted(monkeypatch)
    config = cached(PROBE, tmp_path / "cache", **{"data.source": "counted"})
    train(config, tmp_path / "w", verbose=False)
    assert {split for split, _ in reads} == {"train", "test"}
    reads.clear()
    train(config, tmp_path / "again", verbose=False)
    assert not reads


def test_views_repeat_after_the_last_one(tmp_path):
    train(cached(PROBE, tmp_path / "cache", views=2), tmp_path / "w", verbose=False)
    metas = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*/meta.json")]
    assert sorted(meta["shape"] for meta in metas) == [[1, 103, 64], [1, 154, 64], [2, 40, 64]]
    values = np.arange(2 * 40, dtype=np.float32).reshape(2, 40, 1)
    batches = build.build(make_config(PROBE), sharding.make_parallel()).material.streams["train"]
    batches = dataclasses.replace(batches, prepared={"image": values})
    seen = np.concatenate([batches[step]["image"] for step in range(10)])[:, 0]
    index = np.concatenate([batches[step]["index"] for step in range(10)])
    for epoch in range(4):
        counters = slice(epoch * 40, (epoch + 1) * 40)
        np.testing.assert_array_equal(seen[counters], epoch % 2 * 40 + index[counters])


def test_no_room_is_said_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 5_000))
    with pytest.raises(OSError, match=r"they need 36,608 bytes, 5,000 are free.*cache_dir") as caught:
        train(cached(PROBE, tmp_path / "cache"), tmp_path / "w", verbose=False)
    assert "train: 40 examples x 64, float32, 10,240 bytes" in str(caught.value)
    assert COMPUTING not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method.name": "full", "method.k": 0, "cache": "features"}, r"'cache': 'features'.*the stem trains"),
        ({"method.name": "full", "method.k": 0, "model.prefix_dtype": "bfloat16"}, r"the stem trains"),
        ({"cache": "features", "method.mixup": 0.2}, r"phase 0 mixes inputs, {'mixup': 0.2}"),
        ({"cache": "features", "terms": {"delta": {}}}, r"delta runs 'reference' on the inputs, which cache replaces"),
        ({"cache": "features", "views": 3, "data.augment": ()}, r"views=3, but data.augment is empty"),
        ({"views": 3}, r"views = 3.* belong to cache = 'features'"),
        ({"cache": "feature"}, r"cache = 'feature': expected one of '', features"),
    ],
)
def test_what_cannot_be_cached_is_refused_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        train(make_config(LAST, **changes), tmp_path / "w", verbose=False)
    assert not list(tmp_path.glob("w/checkpoints*"))


@pytest.mark.slow
@pytest.mark.thin(1)
@pytest.mark.parametrize("name", ["knn", "logistic"])
def test_probes_without_gradient_read_the_same_features(tmp_path, capsys, name):
    form = {"method.name": name, "method.k": 0, "select": "last", "data.augment": ()}
    live = train(make_config(form), tmp_path / "live", verbose=False)
    held = train(cached(form, tmp_path / "cache"), tmp_path / "held", verbose=False)
    assert COMPUTING in capsys.readouterr().out
    again = train(cached(form, tmp_path / "cache", seed=0), tmp_path / "again", verbose=False)
    assert COMPUTING not in capsys.readouterr().out
    assert live["metrics"] == held["metrics"] == again["metrics"]
    for way in ("held", "again"):
        with np.load(tmp_path / way / "predictions.npz") as ours, np.load(tmp_path / "live/predictions.npz") as theirs:
            np.testing.assert_allclose(ours["features"], theirs["features"], rtol=1e-5, atol=1e-6)


CUTS = ("stem", "stage1/block0", "stage1", "stage2", "pre_logits")  # stage1 ends with block1, stage2 with block0


@pytest.mark.parametrize(
    "trained, frozen",
    [
        ([], 5),
        (["head/kernel"], 5),
        (["backbone/norm/scale"], 4),
        (["backbone/stage2/block0/norm1"], 3),
        (["lora/backbone/stage1/block1/x/a", "backbone/norm/scale"], 2),
        (["backbone/stem/norm"], 0),
    ],
)
def test_the_frozen_prefix_ends_where_something_trains(trained, frozen):
    assert rules.frozen_cuts(trained, CUTS) == frozen


@pytest.mark.parametrize(
    "changes, cut",
    [
        (PROBE, "pre_logits"),
        (LAST, "stage2"),
        ({**PROBE, "model.drop_path": 0.1}, "stage1"),  # the rate of the first block is 0
        ({"method.name": "full", "method.k": 0, "model.drop_path": 0.1}, None),
    ],
)
def test_the_frozen_prefix_of_a_run_ends_where_something_trains_or_is_random(changes, cut):
    (phase,) = build.build(make_config(changes), sharding.make_parallel()).phases
    assert (phase.plan.prefix and phase.plan.prefix.cut) == cut


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8_cifar", pytest.param("vit_tiny_patch16_224", marks=pytest.mark.slow)])
def test_a_bfloat16_prefix_computes_in_bfloat16_and_the_rest_does_not(name):
    make = MODELS[name].module
    model = peft.Adapted(make(num_classes=3, **({"image_size": 32, "depth": 2} if "vit" in name else {})))
    image = jnp.zeros((2, 32, 32, 3), jnp.uint8)
    variables = model.model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    prefix = steps.Prefix(model.clone(dtype=jnp.bfloat16), model.cuts[-3])
    step = steps.make_eval_step(make_reader(model, 3), tasks.make(tasks.Spec(class_names=("a", "b", "c"))), prefix)
    kinds = [
        str(equation.invars[0].aval.dtype)
        for equation in jax.make_jaxpr(step)(variables, image).eqns
        if equation.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    switch = kinds.index("float32")
    assert switch > 1 and set(kinds[:switch]) == {"bfloat16"} and set(kinds[switch:]) == {"float32"}


class Recorded:
    """A network that notes the type of what enters it behind a cut."""

    def __init__(self, module, seen):
        self.module, self.seen = module, seen

    def apply(self, variables, x, **arguments):
        self.seen.append((arguments.get("start"), x.dtype.name))
        return self.module.apply(variables, x, **arguments)


@pytest.mark.slow
def test_cached_bfloat16_features_enter_the_rest_of_the_network_as_live_ones_do(tmp_path):
    """In one type: float32 in its place would add a residual branch to numbers that live training has rounded."""
    entered = {}
    for way, config in (
        ("live", make_config(LAST, **{"model.dtype": "bfloat16"})),
        ("cached", cached(LAST, tmp_path / "cache", **{"model.dtype": "bfloat16", "views": 40})),
    ):
        parallel = sharding.make_parallel()
        run = build.build(config, parallel)
        (phase,), program = run.phases, single.Single(run, parallel)
        state = program.initial(0)
        sets = program.batches(0, state, ["train"], lambda step: False)
        batch, seen = next(program.iterate(sets, 0, 1)), []
        readers = {name: r._replace(module=Recorded(r.module, seen)) for name, r in phase.plan.readers.items()}
        step = steps.make_train_step(phase.plan._replace(readers=readers), phase.tx)
        after = jax.device_get(parallel.train(step)(state, batch))
        entered[way] = seen, after.sums, batch["train"]["image"].dtype.name
    assert entered["live"][0] == entered["cached"][0] == [("stage2", "bfloat16")]
    assert (entered["live"][2], entered["cached"][2]) == ("uint8", "bfloat16")
    for name, value in entered["live"][1].items():
        np.testing.assert_allclose(entered["cached"][1][name], value, rtol=1e-5, err_msg=name)
