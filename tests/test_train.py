"""One run, end to end: what it leaves, that it resumes bit for bit, and what it refuses."""

import json
import pathlib

import numpy as np
import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax.core import manifest
from tl_jax.runtime import sharding, workdir
from tl_jax.runtime.checkpoint import Checkpoints
from tl_jax.runtime.preemption import Preempted
from tl_jax.training.build import build
from tl_jax.training.loop import best_step
from tl_jax.training.train import train
from tl_jax.weights import formats

FILES = {
    "mistakes.png",
    "svg",
    ".lock",
    "config.json",
    "cost.json",
    "audit.json",
    "ledger.json",
    "metrics.jsonl",
    "timing.jsonl",
    "result.json",
    "MANIFEST.json",
    "predictions.npz",
    "model.safetensors",
    "trained.safetensors",
    "checkpoints",
    "learning_curves.png",
    "confusion_matrix.png",
    "reliability.png",
    "feature_map.png",
}


def make_config(arg="", **changes):
    random = {"ema": 0.9, "method.mixup": 0.2, "model.dropout": 0.1}
    random["data.augment"] = (("rotation", {"degrees": 20.0}),)
    return options.override(smoke.get_config(arg), {**random, **changes})


def remains(workdir: pathlib.Path) -> dict:
    """Everything that a run leaves and its seed determines, as bytes or hashes."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        hashes = {step: checkpoints.meta(step)["hashes"] for step in checkpoints.steps()}
    with np.load(workdir / "predictions.npz") as file:
        arrays = {name: file[name].tobytes() for name in file.files}
    files = ("metrics.jsonl", "result.json", "audit.json", "model.safetensors", "config.json")
    return {"checkpoints": hashes, "predictions": arrays, **{name: (workdir / name).read_bytes() for name in files}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "w"
    return workdir, train(make_config(), workdir)


def test_a_run_leaves_what_the_readme_promises(finished):
    workdir, result = finished
    assert {path.name for path in workdir.iterdir()} == FILES
    assert json.loads((workdir / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["split"] == "test" and result["metrics"]["count"] == len(
        np.load(workdir / "predictions.npz")["labels"]
    )
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    assert {"train/loss", "train/accuracy", "train/lr", "train/grad_norm"} < rows[0].keys()
    assert {"val/loss", "val/accuracy"} < rows[2].keys()


def test_the_audit_proves_that_nothing_frozen_moved(finished):
    workdir, result = finished
    report = json.loads((workdir / "audit.json").read_text())
    rows = {row["path"]: row for row in report["phases"][0]["parameters"]}
    assert rows["head/kernel"]["origin"] == "new" and rows["head/kernel"]["trainable"]
    assert rows["head/kernel"]["optimizer_values"] == 2 * 64 * 10
    stem = rows["backbone/stem/conv/kernel"]
    assert stem["origin"] == "conv1.weight" and not stem["trainable"] and stem["optimizer_values"] == 0
    assert report["phases"][0]["weights"] == {
        "file": "builtin:glyphs",
        "sha256": formats.sha256("tl_jax/assets/glyphs.safetensors"),
    }
    assert report["totals"]["trainable"] == 650 == result["trainable_parameters"]
    assert report["proof"]["bit_equal"] and f"params/{stem['path']}" in report["proof"]["hashes"]
    assert all(row["policy"] == "frozen" for row in report["phases"][0]["statistics"])
    loaded, _ = formats.read("tl_jax/assets/glyphs.safetensors")
    trained, _ = formats.read(workdir / "model.safetensors")
    assert set(loaded) == set(trained)
    for key, value in loaded.items():
        if not key.startswith("linear."):
            np.testing.assert_array_equal(trained[key], value)


class Crash(Exception):
    pass


def crash_after(step):
    """A `stop_requested` that raises once a step is done, before anything is saved of it."""

    def crash(done):
        if done == step:
            raise Crash
        return False

    return crash


def crashed(config, folder, step):
    """A run in `folder` that crashed after a step."""
    with pytest.raises(Crash):
        train(config, folder, stop_requested=crash_after(step))


def test_a_finished_run_is_shown_again_without_a_step_or_a_look_at_its_data(tmp_path):
    weights, _ = swap_weights(tmp_path)
    data, _ = swap_data(tmp_path)
    config = make_config(**{"model.weights": str(weights), **of_arrays(data)})
    result = train(config, tmp_path / "w", verbose=False)
    weights.unlink(), data.unlink()
    assert train(config, tmp_path / "w", stop_requested=lambda done: 1 / 0) == json.loads(json.dumps(result))


@pytest.mark.slow
def test_a_run_that_crashed_three_times_ends_bit_equal_to_an_unbroken_one(finished, tmp_path):
    for step in (1, 2, 3):  # step 2 is evaluated and saved only after the crash
        crashed(make_config(), tmp_path / "w", step)
    train(make_config(), tmp_path / "w")
    assert remains(tmp_path / "w") == remains(finished[0])


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4))])
def test_a_request_to_stop_saves_the_step_and_the_same_command_goes_on(finished, tmp_path, step):
    with pytest.raises(Preempted, match=f"after step {step} of 4"):
        train(make_config(), tmp_path / "w", stop_requested=lambda done: done == step)
    with Checkpoints(tmp_path / "w" / "checkpoints") as checkpoints:
        assert checkpoints.steps()[-1] == step
    train(make_config(), tmp_path / "w")
    ours, reference = remains(tmp_path / "w"), remains(finished[0])
    ours.pop("checkpoints"), reference.pop("checkpoints")  # there may be one more; the rest must be equal
    assert ours == reference


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_may_start_over_with_other_options(tmp_path):
    crashed(make_config(), tmp_path / "w", 1)
    assert train(make_config(lr=0.5), tmp_path / "w")["step"] in (2, 4)


@pytest.mark.slow
def test_worker_processes_change_the_speed_and_nothing_else(finished, tmp_path):
    train(make_config(**{"data.workers": 2}), tmp_path / "w")
    ours, reference = remains(tmp_path / "w"), remains(finished[0])
    ours.pop("config.json"), reference.pop("config.json"), ours.pop("checkpoints"), reference.pop("checkpoints")
    assert ours == reference


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["jit", pytest.param("pmap", marks=pytest.mark.slow)])
def test_evaluation_counts_do_not_depend_on_devices_or_mode(tmp_path, parallel):
    config = make_config(
        **{"parallel": parallel, "data.test": "test[:37]", "eval_batch_size": 10, "total": (1.0, "steps")}
    )
    assert train(config, tmp_path / "w")["metrics"]["count"] == 37


@pytest.mark.slow
def test_metrics_come_back_from_the_checkpoint_whatever_became_of_their_file(finished, tmp_path):
    crashed(make_config(), tmp_path / "w", 3)
    (tmp_path / "w" / "metrics.jsonl").write_bytes(b'{"step": 1, "val/accuracy": 9}\n\xff{"st')
    train(make_config(), tmp_path / "w")
    assert remains(tmp_path / "w") == remains(finished[0])


def test_a_workdir_is_held_by_one_process_at_a_time(tmp_path):
    with workdir.lock(tmp_path / "w"), pytest.raises(ValueError, match="another process is running in"):
        train(make_config(), tmp_path / "w")


def swap_weights(tmp_path):
    """The embedded weights at a path of their own, and the same file with one number changed."""
    tensors, metadata = formats.read("tl_jax/assets/glyphs.safetensors")
    path = tmp_path / "weights.safetensors"
    formats.write_safetensors(path, tensors, metadata)
    return path, lambda: formats.write_safetensors(
        path, {**tensors, "conv1.weight": tensors["conv1.weight"] + 1}, metadata
    )


def swap_data(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "data.npz"

    def write(values):
        np.savez(
            path,
            train_image=values,
            train_label=np.arange(40) % 4,
            test_image=255 - values[:8],
            test_label=np.arange(8) % 4,
        )

    write(rng.integers(0, 256, (40, 8, 8, 3), np.uint8))
    return path, lambda: write(rng.integers(0, 256, (40, 8, 8, 3), np.uint8))


def of_arrays(path):
    """The options of a run on the data of `swap_data`."""
    splits = {"data.train": "train[:80%]", "data.val": "train[80%:]", "data.test": "test"}
    return {"data.source": f"arrays:{path}", **splits}


@pytest.mark.thin(1)
@pytest.mark.parametrize(("swap", "option"), [(swap_weights, "model.weights"), (swap_data, "data.source")])
def test_other_bytes_under_the_same_path_are_refused_on_resume(tmp_path, swap, option):
    path, exchange = swap(tmp_path)
    changes = of_arrays(path) if option == "data.source" else {option: str(path)}
    crashed(make_config(**changes), tmp_path / "w", 3)
    exchange()
    with pytest.raises(ValueError, match=r"another run[\s\S]*(weights|data) \(saved -> now\)"):
        train(make_config(**changes), tmp_path / "w")


def test_another_config_in_the_workdir_is_refused_with_the_difference(finished):
    with pytest.raises(ValueError, match=r"other options.*\n  lr: 0.001 -> 0.5"):
        train(make_config(lr=0.5), finished[0])


def test_checkpoints_of_another_freeze_or_class_list_are_refused(tmp_path):
    crashed(make_config(), tmp_path / "w", 3)
    (tmp_path / "w" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"another run.*") as error:
        train(make_config(**{"method.name": "last_k", "method.k": 1}), tmp_path / "w")
    assert "labels (saved -> now)" in str(error.value) and "method.k: 0 -> 1" in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    config = make_config(lr=1e38, clip=0.0, optimizer="sgd", log_every=(2.0, "steps"))
    with pytest.raises(FloatingPointError, match=r"at step [01] .*seen after step 2"):
        train(config, tmp_path / "w")


@pytest.mark.slow
def test_parameters_that_the_last_update_made_infinite_are_a_divergence(tmp_path):
    """No step sees them, and no evaluation on val: only the scored outputs do."""
    changes = {"lr": 1e38, "clip": 0.0, "optimizer": "sgd", "schedule.name": "constant", "select": "last"}
    config = make_config(**changes, **{"data.val": "", "total": (1.0, "steps"), "ema": 0.0})
    for _ in range(2):  # what is saved of it does not make a result of it
        with pytest.raises(FloatingPointError, match=r"at step 0 .*seen after step 1; its outputs are not: "):
            train(config, tmp_path / "w", verbose=False)
    assert not (tmp_path / "w" / "result.json").exists()


@pytest.mark.slow
def test_a_config_json_without_an_option_that_came_later_is_of_the_same_run(finished, tmp_path):
    def remove(option):
        path = tmp_path / "w" / "config.json"
        table = json.loads(path.read_text())
        del table[option]
        table.pop("seal", None)  # which came later, too
        path.write_text(json.dumps(table))

    for step, option in ((1, "task"), (2, "streams"), (3, "min_delta")):
        with pytest.raises(Preempted):
            train(make_config(), tmp_path / "w", stop_requested=lambda done, step=step: done == step)
        remove(option)
    train(make_config(), tmp_path / "w")
    ours, reference = remains(tmp_path / "w"), remains(finished[0])
    ours.pop("checkpoints"), reference.pop("checkpoints")
    assert ours == reference
    remove("data.resample")
    manifest.write(tmp_path / "w")  # as the older version would have
    assert train(make_config(), tmp_path / "w") == json.loads(json.dumps(finished[1]))
    remove("select")  # of a value that it did not have at first: as if it had been left at that
    with pytest.raises(ValueError, match=r"other options.*\n  select: 'last' -> 'best_val'$"):
        train(make_config(), tmp_path / "w")


def test_best_val_takes_the_highest_accuracy_then_the_lowest_loss_then_the_earliest():
    run = build(make_config(), sharding.make_parallel())
    rows = [
        {"step": s, "val/accuracy": a, "val/loss": v}
        for s, a, v in [(1, 0.5, 1.0), (2, 0.9, 0.5), (3, 0.9, 0.4), (4, 0.9, 0.4)]
    ]
    assert best_step(run, [{"step": 9, "train/loss": 0.1}, *rows]) == 3
    assert best_step(run, []) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "resnet21_cifar"}, "resnet20_cifar"),
        ({"model.weights": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"data.source": "folder:/nowhere"}, "/nowhere"),
        ({"data.card": {"mean": (0.5, 0.5, 0.5)}}, "contradicts the weight card"),
        ({"data.card": {"maen": 1}}, r"data.card has no parameter 'maen' \(did you mean 'mean'"),
        ({"method.name": "rules", "method.rules": (("haed/.*", "head"), (".*", "frozen"))}, "haed"),
        ({"select": "best"}, "expected one of last, best_val"),
        ({"batch_size": 30}, "use a multiple of 4"),
        ({"batch_size": 0, "clip": -1.0, "ema": 1.5}, r"batch_size = 0[\s\S]*clip = -1.0"),
        ({"total": (5,)}, "total = .5.: expected .amount > 0, one of epochs, steps, examples"),
        ({"model.dtype": "bfloat"}, "expected one of float32, bfloat16"),
        ({"method.rules": ("head/.*", "head")}, "expected pairs of strings"),
        ({"data.data_dir": "/x"}, "belongs to tfds sources"),
        ({"schedule.name": "cosin"}, "did you mean 'cosine'"),
        ({"data.val": "", "data.test": ""}, "to score on"),
        ({"method.norm": (("backbone/.*", "froze"),)}, "known: frozen, update"),
        ({"groups": {"haed": {"lr_mult": 2.0}}}, "did you mean 'head'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error_before_any_training(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(make_config(**changes), tmp_path / "w")
    assert not (tmp_path / "w" / "checkpoints").exists()
