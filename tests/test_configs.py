"""Every config builds and trains a step on data made up for it."""

import importlib
import pathlib

import numpy as np
import pytest

from configs import probe_sweep, transfer
from tl_jax import config as options
from tl_jax import models
from tl_jax.data import sources
from tl_jax.studies import command, inprocess
from tl_jax.training.train import train
from tl_jax.weights import load

NAMES = sorted(path.stem for path in pathlib.Path("configs").glob("*.py"))


def make_up(path):
    """Two classes of random images in three splits."""
    rng, arrays = np.random.default_rng(0), {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_image"] = rng.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
        arrays[f"{split}_label"] = np.arange(16, dtype=np.int32) % 2
    np.savez(path, **arrays)
    return f"arrays:{path}"


def make_up_weights(name, path):
    """A network of random weights that tells the two classes apart."""
    _, variables, card, *_ = load.load(name, "", 2)
    load.export(variables, name, path, card=card)
    return str(path)


FAST = ("quickstart", "methods", "diabetes")


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_every_config_trains_one_step_on_made_up_data(name, tmp_path):
    source = make_up(tmp_path / "made_up.npz")
    get_config = importlib.import_module(f"configs.{name}").get_config
    config, small = get_config(), {"batch_size": 8, "eval_batch_size": 16, "resamples": 20}
    own = config.task != "classification" or config.data.source == "docstrings"  # data that comes with the package
    config = config if own else get_config(f"data={source}")
    if not own:
        small |= {"data.train": "train", "data.val": "val", "data.test": "test"}
        small |= {"data.shots": min(config.data.shots, 2)}
        # The networks of the data sets are large: a small one of the same family stands in.
        if not config.model.weights:
            deit = config.model.name.startswith("deit")
            small["model.name"] = "deit_tiny_patch16_224" if deit else "resnet8_cifar"
            small["model.image_size"] = 32
    small["networks"] = {
        key: {**network, "weights": make_up_weights(network["name"], tmp_path / f"{key}.safetensors")}
        for key, network in config.networks.items()
    }
    small["streams"] = {key: {**stream, "source": source, "batch_size": 8} for key, stream in config.streams.items()}
    small["data.candidates"] = tuple(config.data.candidates) and (config.data.candidates[0], source, "val")
    small["data.extra_eval"] = tuple((key, source, split) for key, _, split in config.data.extra_eval)
    small |= {"total": (1.0, "steps"), "schedule.warmup": (0.0, "steps"), "seeds": (), "baseline": ()}
    small |= {"data.workers": 0, "data.transductive": bool(config.streams), "replicas": config.replicas[::17]}
    if any("cache" in network for network in small["networks"].values()):
        small["cache_dir"] = str(tmp_path / "cache")
    config = options.override(config, small)
    if config.replicas:
        table = inprocess.run(config, tmp_path / "w")["replicas"]
        assert table["best"] in [row["name"] for row in table["replicas"]]
        return
    result = train(config, tmp_path / "w")
    assert result["split"] == "test"
    assert result["metrics"]["count"] == (len(scored_source(config)) if own else 16)


@pytest.mark.parametrize(
    ("there", "given", "wanted"),
    [
        (("train", "val"), "", ("train", "val", "")),
        (("train",), "", ("train[:80%]", "train[80%:]", "")),
        (("train", "test"), "", ("train[:80%]", "train[80%:]", "test")),
        (("train", "val", "test"), ",data.test=", ("train", "val", "")),
    ],
)
def test_a_sweep_takes_the_splits_that_the_source_has(tmp_path, there, given, wanted):
    arrays = {f"{split}_image": np.zeros((4, 8, 8), np.uint8) for split in there}
    np.savez(tmp_path / "x.npz", **arrays, **{f"{split}_label": np.arange(4) % 2 for split in there})
    data = probe_sweep.get_config(f"data=arrays:{tmp_path}/x.npz{given}").data
    assert (data.train, data.val, data.test) == wanted


def scored_source(config):
    return sources.load(config.data.source, config.data.test, task=config.task)


def test_the_models_that_configs_name_exist():
    for name in NAMES:
        models.get(importlib.import_module(f"configs.{name}").get_config().model.name)


def test_unknown_arguments_come_together_with_their_nearest_neighbours():
    with pytest.raises(ValueError) as error:
        transfer.get_config("metod=full,data.shotts=3,model")
    for part in ("did you mean 'method'", "did you mean 'data.shots'", "'model' is not key=value"):
        assert part in str(error.value)


def test_a_misspelt_option_in_a_config_file_is_refused():
    config = transfer.get_config()
    with pytest.raises((AttributeError, KeyError), match="weight_decay"):
        config.weigth_decay = 1.0


def test_arguments_take_the_type_of_the_default():
    config = transfer.get_config("model=resnet50,lr=0.5,batch_size=64,total=(3,'epochs'),data.shots=5")
    assert (config.lr, config.batch_size, config.total, config.data.shots) == (0.5, 64, (3, "epochs"), 5)


def test_flags_set_options_of_every_kind():
    given = {
        "data.shots": "10", "lr": "0.5", "clip": "2", "total": "(3, 'steps')",
        "data.source": "('folder:a', 'folder:b')",
        "terms": "{'l2_sp': {'weight': 1.0}}", "model.keep_head": "true", "schedule.name": "linear",
    }  # fmt: skip
    config = command.read_config("configs/smoke.py", [f"{key}={value}" for key, value in given.items()])
    assert (config.data.shots, config.lr, config.total, config.schedule.name) == (10, 0.5, (3, "steps"), "linear")
    assert config.data.source == ("folder:a", "folder:b") and config.model.keep_head is True
    assert config.clip == 2.0 and config.terms.to_dict() == {"l2_sp": {"weight": 1.0}}
    options.check(config)
    assert options.identity(config)["terms"] == {"l2_sp": {"weight": 1.0}}
    assert command.read_config("configs/smoke.py", ["data.source=folder:photos"]).data.source == "folder:photos"
