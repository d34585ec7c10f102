"""Unfinished feature caches that were damaged: what is computed from them has the right numbers, or nothing has."""

import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from faults.test_flips import Kept, go_on

from configs import smoke
from tl_jax import config as options
from tl_jax.core import files
from tl_jax.runtime import sharding
from tl_jax.runtime.preemption import Preempted
from tl_jax.training import build, feature_cache, frozen_columns
from tl_jax.training.single import Single

VIEWS, SIZE = 3, 8  # views of 40 examples in batches of 8: 15 steps
KEY = {"format": frozen_columns.FORMAT, "weights": "none"}


@pytest.fixture(scope="module")
def compute():
    """compute(folder, stop after so many steps, key) -> the features."""
    changes = {"data.augment": (("rotation", {"degrees": 20.0}),), "method.name": "linear_probe"}
    parallel = sharding.make_parallel()
    material = build.build(options.override(smoke.get_config(), changes), parallel).material
    sets = {"train": material.streams["train"]}

    def run(folder, stop=None, key="cut"):
        def means(variables, x):
            return jnp.mean(x.astype(jnp.float32), axis=(1, 2)) + len(key)

        column = frozen_columns.Column("image", "image", means, {**KEY, "cut": key}, "of nothing")
        asked = []
        about = {"batch_size": SIZE, "views": VIEWS, "folder": str(folder)}
        about["stop_requested"] = lambda step: asked.append(step) or len(asked) == stop
        return np.array(feature_cache.fill(sets, column, {}, parallel, **about)["train"])

    return run


@pytest.fixture(scope="module")
def unfinished(compute, tmp_path_factory):
    """Folders of a set that was stopped after 6 and after 12 of 15 steps, of another set, and the right features."""
    folder = tmp_path_factory.mktemp("caches")
    for steps in (6, 12):
        with pytest.raises(Preempted, match=f"features of {steps * SIZE} of 120 examples"):
            compute(folder / str(steps), steps)
    with pytest.raises(Preempted):
        compute(folder / "other", 12, "other cut")
    return folder, compute(folder / "whole")


def flip(draw, path):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(draw, path):
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def longer(path):
    path.write_bytes(path.read_bytes() + b"more")


def change(path, **entries):
    files.write_json(path, {**files.read_json(path), **entries})


def swap(draw, path):
    """Two rows of different places change their places."""
    rows = np.fromfile(path, np.float32).reshape(VIEWS * 40, -1)
    one, other = draw.sample([i for i, row in enumerate(rows) if row.any()], 2)
    rows[[one, other]] = rows[[other, one]]
    rows.tofile(path)


DAMAGES = {
    "features: bit": lambda draw, at: flip(draw, at / "features.bin"),
    "features: cut": lambda draw, at: cut(draw, at / "features.bin"),
    "features: zeros": lambda draw, at: (at / "features.bin").write_bytes(bytes((at / "features.bin").stat().st_size)),
    "features: gone": lambda draw, at: (at / "features.bin").unlink(),
    "features: longer": lambda draw, at: longer(at / "features.bin"),
    "features: rows swapped": lambda draw, at: swap(draw, at / "features.bin"),
    "features: as earlier": lambda draw, at: shutil.copy(next(at.parents[1].glob("6/*/features.bin")), at),
    "features: of another": lambda draw, at: shutil.copy(next(at.parents[1].glob("other/*/features.bin")), at),
    "progress: bit": lambda draw, at: flip(draw, at / "progress.json"),
    "progress: cut": lambda draw, at: cut(draw, at / "progress.json"),
    "progress: gone": lambda draw, at: (at / "progress.json").unlink(),
    "progress: nested": lambda draw, at: (at / "progress.json").write_text("[" * 100_000),
    "progress: as earlier": lambda draw, at: shutil.copy(next(at.parents[1].glob("6/*/progress.json")), at),
    "progress: done raised": lambda draw, at: change(at / "progress.json", done=draw.randint(13, 15)),
    "progress: done beyond": lambda draw, at: change(at / "progress.json", done=draw.choice([16, 2**62, 10**40])),
    "progress: done lowered": lambda draw, at: change(at / "progress.json", done=draw.randint(-3, 11)),
    "progress: done is no count": lambda draw, at: change(
        at / "progress.json", done=draw.choice([None, True, 12.0, "12", [12], {}])
    ),
    "progress: other batches": lambda draw, at: change(
        at / "progress.json", batch_size=draw.choice([4, 16, None, "8"])
    ),
    "all: of another": lambda draw, at: shutil.copytree(next(at.parents[1].glob("other/*")), at, dirs_exist_ok=True),
}  # fmt: skip


@pytest.mark.thin(9)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_unfinished_cache_ends_in_the_right_numbers(compute, unfinished, tmp_path, damage):
    """Two seeded trials of each of 19 kinds of damage."""
    caches, right = unfinished
    for trial in range(2):
        root = tmp_path / f"{trial}"
        for name in ("6", "12", "other"):
            shutil.copytree(caches / name, root / name)
        (victim,) = (root / "12").iterdir()
        DAMAGES[damage](random.Random(f"{damage} {trial}"), victim)
        np.testing.assert_array_equal(compute(root / "12"), right, err_msg=f"trial {trial}")
        assert sorted(path.name for path in victim.iterdir()) == [".lock", "features.bin", "meta.json"]
        (whole,) = (caches / "whole").glob("*/meta.json")
        assert (victim / "meta.json").read_text() == whole.read_text()


def test_an_untouched_one_goes_on_where_it_was_and_a_damaged_one_says_why_not(
    compute, unfinished, tmp_path, monkeypatch, capsys
):
    (start, begun), kinds = ([], feature_cache._finished), []
    monkeypatch.setattr(feature_cache, "_finished", lambda *a: start.append(begun(*a)) or start[-1])
    for name, kind in (("12", None), ("12", "done raised"), ("12", "done beyond"), ("12", "bit")):
        folder = tmp_path / str(kind)
        shutil.copytree(unfinished[0] / name, folder)
        (victim,) = folder.iterdir()
        if kind == "bit":
            data = bytearray((victim / "features.bin").read_bytes())
            data[0] ^= 1
            (victim / "features.bin").write_bytes(data)
        elif kind:
            change(victim / "progress.json", done=13 if kind == "done raised" else 16)
        compute(folder)
        kinds += capsys.readouterr().out.replace("\n", " ").split("unfinished ")[1:]
    assert [done for done, _ in start] == [12, 0, 0, 0]
    assert (
        "has other rows than were written" in kinds[0]
        and "has done = 16 batches of 8, 1440 bytes; expected done = 1 .. 15" in kinds[1]
    )
    assert len(kinds) == 3


def test_a_row_that_changes_while_others_are_computed_is_never_called_sound(compute, unfinished, tmp_path, monkeypatch):
    def write(path, value):
        with path.with_name("features.bin").open("r+b") as file:
            file.write(b"\1")
        return real(path, value)

    real = files.write_json
    monkeypatch.setattr(files, "write_json", write)
    with pytest.raises(OSError, match="has other rows than were written; check the disk"):
        compute(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*/*.json"))
    np.testing.assert_array_equal(compute(tmp_path), unfinished[1])


def test_a_stop_is_answered_while_what_is_on_disk_is_checked(compute, unfinished, tmp_path):
    for name in ("12", "whole"):
        shutil.copytree(unfinished[0] / name, tmp_path / name)
        for stop in (1, 5) if name == "12" else (1,):  # when it goes on, and after the last three steps
            with pytest.raises(Preempted, match="while the features on disk were checked"):
                compute(tmp_path / name, stop)
        np.testing.assert_array_equal(compute(tmp_path / name), unfinished[1])


FINISHED = {
    "features: bit": DAMAGES["features: bit"],
    "features: cut": DAMAGES["features: cut"],
    "features: longer": DAMAGES["features: longer"],
    "features: gone": DAMAGES["features: gone"],
    "meta: bit": lambda draw, at: flip(draw, at / "meta.json"),
    "meta: cut": lambda draw, at: cut(draw, at / "meta.json"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on cached features: its cache, stopped half-way and finished, what it ends in, and how to run it."""
    root = tmp_path_factory.mktemp("runs")
    changes = {
        "data.augment": (("rotation", {"degrees": 20.0}),), "cache": "features", "cache_dir": str(root / "12"),
        "views": VIEWS, "batch_size": SIZE, "total": (15.0, "steps"), "eval_every": (15.0, "steps"), "resamples": 5,
    }  # fmt: skip
    config = options.override(smoke.get_config(), changes)
    parallel = sharding.make_parallel()
    program = Kept(Single(build.build(config, parallel), parallel))

    def run(stop=None):
        shutil.rmtree(root / "w", ignore_errors=True)
        asked = []
        return go_on(root, config, program, lambda step: asked.append(step) or len(asked) == stop)

    for name, steps in (("6", 6), ("other", 9), ("half", 12)):
        with pytest.raises(Preempted, match=f"features of {steps * SIZE} of 120 examples"):
            run(steps)
        (root / "12").rename(root / name)
    right = run()
    (root / "12").rename(root / "finished")
    return root, right, run


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, *(pytest.param(i, marks=pytest.mark.exhaustive) for i in range(10, 50, 10))])
def test_a_whole_run_on_a_damaged_cache_ends_in_the_numbers_of_a_sound_one_or_is_refused(trained, start):
    """50 seeded trials: 38 of unfinished caches, two of each kind of damage, and 12 of finished ones."""
    root, right, run = trained
    trials = [("half", DAMAGES[name]) for name in DAMAGES] * 2 + [("finished", FINISHED[name]) for name in FINISHED] * 2
    assert len(trials) == 50
    for number, (name, damage) in enumerate(trials[start : start + 10], start):
        shutil.rmtree(root / "12", ignore_errors=True)
        shutil.copytree(root / name, root / "12")
        victims = [path for path in sorted((root / "12").iterdir()) if (path / "features.bin").exists()]
        damage(random.Random(number), victims[number % len(victims)])
        try:
            assert run() == right, f"trial {number}"
        except (ValueError, OSError) as error:
            assert "features" in str(error), f"trial {number}: {error}"
