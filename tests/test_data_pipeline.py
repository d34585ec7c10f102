"""Batches indexed by step: purity, epochs, process slices, exact evaluation, and workers that start and end cleanly."""

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from tl_jax.core import machine
from tl_jax.core.card import Card
from tl_jax.data import pipeline, sources, workers
from tl_jax.data.image import ops
from tl_jax.data.image.augment import make_preprocess
from tl_jax.data.image.decode import decode
from tl_jax.data.pipeline import eval_batches, train_batches

CARD = Card("m", 10, input_size=12, crop=0.75, interpolation="bilinear")
SAME = Card("m", 10, input_size=8, crop=1.0)  # digits enter as they are
AUGMENT = [("random_resized_crop", {"scale": (0.3, 1.0)}), ("colour_jitter", {"brightness": 0.4}), ("flip", {})]


def views(card, augment=()):
    return {"image": pipeline.View(card, tuple(augment))}


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", "train[:101]")


def turned(i):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = {3: 6, 7: 5}.get(i, 1)
    return exif


@pytest.fixture
def photos(tmp_path):
    """Nine small JPEGs in three classes, two of them to be turned by their EXIF orientation."""
    rng = np.random.default_rng(0)
    for i in range(9):
        path = tmp_path / "abc"[i % 3] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(path, exif=turned(i))
    return sources.load(f"folder:{tmp_path}")


def numbered(tmp_path, count):
    """A source whose image i has the colour i, so that a batch tells which examples it holds."""
    image = np.arange(count, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "n.npz", image=image, label=np.arange(count) % 3)
    return sources.load(f"arrays:{tmp_path}/n.npz")


def same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def plainly(batches, step):
    """The images of a batch, each decoded whole into an array that is then cut, resized, mirrored and stacked."""
    images = []
    for c in range(step * batches.batch_size, (step + 1) * batches.batch_size):
        rng = np.random.Generator(np.random.Philox(key=(batches.seed, c)))
        n = len(batches.source)
        index = np.random.default_rng([batches.seed, c // n]).permutation(n)[c % n]
        image = np.asarray(
            ImageOps.exif_transpose(Image.open(io.BytesIO(batches.source[index]["image"]))).convert("RGB")
        )
        images.append(batches.renders["image"].preprocess(image, rng))
    return np.stack(images)


def test_a_batch_is_a_function_of_seed_and_step_alone(digits):
    def make(seed):
        return train_batches(digits, views(CARD, AUGMENT), 16, seed)

    first, second = make(0), make(0)
    late = first[40]
    for step in (3, 0, 40, 17):
        same(first[step], second[step])
    same(first[40], late)
    assert first[3]["image"].shape == (16, 12, 12, 3) and first[3]["image"].dtype == np.uint8
    assert first[3]["label"].dtype == np.int32
    assert (first[3]["image"] != make(1)[3]["image"]).any() and (first[3]["image"] != first[4]["image"]).any()


def test_every_epoch_holds_every_example_once_in_a_new_order(tmp_path):
    source = numbered(tmp_path, 30)
    batches = train_batches(source, views(SAME, []), 12, 0)
    seen = np.concatenate([batches[step]["image"][:, 0, 0, 0] for step in range(10)]).reshape(4, 30)
    assert all(sorted(epoch) == list(range(30)) for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == 4
    labels = np.concatenate([batches[step]["label"] for step in range(10)])
    np.testing.assert_array_equal(labels, seen.reshape(-1) % 3)


def test_a_source_smaller_than_the_batch_repeats(tmp_path):
    batches = train_batches(numbered(tmp_path, 5), views(SAME, []), 20, 0)
    assert np.bincount(batches[7]["image"][:, 0, 0, 0]).tolist() == [4] * 5


def test_an_example_is_augmented_anew_in_every_epoch_and_under_every_seed(tmp_path):
    augment = [("random_erasing", {"probability": 1.0})]
    runs = [train_batches(numbered(tmp_path, 1), views(SAME, augment), 4, s) for s in (0, 1)]
    images = {batches[step]["image"][row].tobytes() for batches in runs for step in range(10) for row in range(4)}
    assert len(images) == 80


@pytest.mark.parametrize("processes", [2, 4])
def test_the_slices_of_all_processes_are_the_batch_of_one(digits, processes):
    options = {"views": views(CARD, AUGMENT), "batch_size": 16, "seed": 3}
    whole = train_batches(digits, **options)
    parts = [train_batches(digits, **options, process_index=p, process_count=processes) for p in range(processes)]
    for step in (0, 6, 7):  # step 6 crosses from the first epoch into the second
        slices = [part[step] for part in parts]
        same({key: np.concatenate([s[key] for s in slices]) for key in whole[step]}, whole[step])


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("count", [1, 23, 24, 25, 49])
def test_evaluation_holds_every_example_once_on_any_number_of_processes(tmp_path, count, processes):
    source = numbered(tmp_path, count)
    parts = [eval_batches(source, views(SAME), 12, process_index=p, process_count=processes)
             for p in range(processes)]  # fmt: skip
    assert {len(part) for part in parts} == {-(-count // 12)}
    seen = []
    for batches in zip(*parts, strict=True):
        for batch in batches:
            real = batch["mask"]
            assert batch["image"].shape == (12 // processes, 8, 8, 3) and batch["index"].dtype == np.int32
            assert (batch["index"][~real] == -1).all() and not batch["image"][~real].any()
            np.testing.assert_array_equal(batch["image"][real][:, 3, 3, 1], batch["index"][real])
            np.testing.assert_array_equal(batch["label"][real], source.labels[batch["index"][real]])
            seen += batch["index"][real].tolist()
    assert seen == list(range(count))


def test_evaluation_pixels_are_the_cards_preprocessing(photos, digits):
    for source in (photos, digits):
        preprocess = make_preprocess(CARD)
        for batch in eval_batches(source, views(CARD), 7):
            for row in np.flatnonzero(batch["mask"]):
                image = source[batch["index"][row]]["image"]
                image = decode(image) if isinstance(image, bytes) else image
                np.testing.assert_array_equal(batch["image"][row], preprocess(image))


def test_training_without_augmentation_sees_the_evaluation_pixels(digits):
    train = train_batches(digits, views(CARD, []), 101, 0)[0]
    evaluated = next(iter(eval_batches(digits, views(CARD), 101)))
    pairs = [sorted((b["image"][i].tobytes(), int(b["label"][i])) for i in range(101)) for b in (train, evaluated)]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize("augment", [
    [],
    [("random_resized_crop", {}), ("flip", {})],
    [("random_resized_crop", {"interpolation": "bicubic"}), ("flip", {"probability": 1.0})],
    [("flip", {}), ("random_resized_crop", {"scale": (0.3, 1.0)})],
    [("resize", {}), ("random_crop", {}), ("flip", {})],
    [("resize", {}), ("random_crop", {"padding": 2}), ("colour_jitter", {"hue": 0.1}), ("flip", {})],
])  # fmt: skip
def test_pixels_are_those_of_the_plain_path(photos, size, augment):
    batches = train_batches(photos, views(CARD.replace(input_size=size), augment), 8, 1)
    for step in range(3):
        np.testing.assert_array_equal(batches[step]["image"], plainly(batches, step))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [8, 12, 64])
def test_a_row_of_a_batch_is_the_image_cut_from_a_larger_one(size, mirrored):
    large = np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)
    image = large[3 : 3 + size, 7 : 7 + size][:, :: -1 if mirrored else 1]
    rows = np.zeros((3, size, size, 3), np.uint8)
    ops.put(rows[1], image)
    np.testing.assert_array_equal(rows[1], image)
    assert not rows[0].any() and not rows[2].any()
    whole = np.ascontiguousarray(image)[:, ::-1]
    before = whole.copy()
    ops.put(rows[1], whole)
    np.testing.assert_array_equal(rows[1], before)
    np.testing.assert_array_equal(whole, before)


def test_batches_in_shared_memory_stay_as_they_are_while_they_are_held(photos):
    batches = train_batches(photos, views(CARD, AUGMENT), 4, 0)
    iterator = batches.iterate(0, 40, 1)
    held = [batch["image"][1:] for batch in iterator]  # more than there are slots
    for step, images in enumerate(held):
        np.testing.assert_array_equal(images, batches[step]["image"][1:])


def test_a_slot_is_free_when_the_last_view_of_it_is_gone():
    slots = workers.Slots(2, {"a": ((2, 3), "uint8"), "b": ((5,), "float32")})
    assert sorted((slots.take(), slots.take())) == [0, 1] and slots.take() is None
    view = slots.view(1)
    row = view["b"].reshape(-1)[2:4]
    del view
    assert slots.take() is None
    del row
    assert slots.take() == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_do_not_change_a_bit(photos, workers):
    batches = train_batches(photos, views(CARD, AUGMENT), 4, 0)
    for step, batch in enumerate(batches.iterate(5, 17, workers), start=5):
        same(batch, batches[step])
    assert step == 16 and not multiprocessing.active_children()


def test_threads_do_not_change_a_bit(digits):
    batches = train_batches(digits, views(CARD, AUGMENT), 16, 0)
    produced = list(batches.iterate(2, 30))
    assert len(produced) == 28 and list(batches.iterate(3, 3)) == []
    for step, batch in enumerate(produced, start=2):
        same(batch, batches[step])


def test_evaluation_with_workers_is_the_same(photos, monkeypatch):
    monkeypatch.setattr(pipeline, "WORTH_WORKERS", 0)
    plain = list(eval_batches(photos, views(CARD), 4))
    for first, second in zip(plain, eval_batches(photos, views(CARD), 4, num_workers=2), strict=True):
        same(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopping_early_ends_the_workers(photos, workers):
    batches = train_batches(photos, views(CARD, AUGMENT), 4, 0)
    with contextlib.suppress(KeyError), contextlib.closing(batches.iterate(0, 10**9, workers)) as iterator:
        for _ in iterator:
            raise KeyError("the consumer fails")
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_where_its_batch_is_due(photos, tmp_path, workers):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "JPEG")
    (tmp_path / "b" / "4.jpg").write_bytes(stream.getvalue()[:1500])
    batches = train_batches(photos, views(CARD, AUGMENT), 3, 0)
    with pytest.raises(ValueError, match=r"cannot read b/4\.jpg of folder:.*damaged JPEG.*on_error='skip'"):
        for _ in batches.iterate(0, 4, workers):
            pass
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_one_clear_error(photos):
    batches = train_batches(photos, views(CARD, AUGMENT), 4, 0)
    iterator = batches.iterate(0, 10**9, 1)
    next(iterator)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a data worker process died"):
        for _ in iterator:
            pass
    assert not multiprocessing.active_children()


SCRIPT = """
    import os, signal, sys
    from absl import app
    from tl_jax.core.card import Card
    from tl_jax.data import pipeline, sources

    def main(_):
        source = sources.load("digits")
        view = pipeline.View(Card("m", 10, input_size=8), (("flip", {}),))
        batches = pipeline.train_batches(source, {"image": view}, 8, 0)
        iterator = batches.iterate(0, 10**9, 2)
        next(iterator)
        ACTION

    if __name__ == "__main__":
        app.run(main)
"""


def run_script(tmp_path, action):
    script = tmp_path / "launch.py"
    script.write_text(textwrap.dedent(SCRIPT).replace("ACTION", action))
    command = [sys.executable, "-W", "error", str(script)]
    # The workers hold the pipes open: communicate() returns only when the last of them has ended.
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = dict(os.environ, PYTHONPATH=root)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as process:
        output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@pytest.mark.slow
def test_an_iterator_left_open_at_exit_neither_hangs_nor_complains(tmp_path):
    assert run_script(tmp_path, "globals()['kept'] = iterator; print('left')") == (0, "left\n", "")


@pytest.mark.slow
def test_workers_end_when_the_main_process_is_killed(tmp_path):
    assert run_script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")[:2] == (-signal.SIGKILL, "")


@pytest.mark.slow
def test_a_terminated_process_group_can_still_finish_its_steps(tmp_path):
    action = "signal.signal(15, lambda *_: print('caught')); os.killpg(0, 15); [next(iterator) for _ in range(20)]"
    assert run_script(tmp_path, action + "; iterator.close(); print('saved')") == (0, "caught\nsaved\n", "")


def test_sizes_that_the_processes_cannot_share_are_refused(digits):
    with pytest.raises(ValueError, match="batch_size 10 for 1 domains in process 0 of 4"):
        train_batches(digits, views(CARD, []), 10, 0, process_count=4)
    with pytest.raises(ValueError, match="process 2 of 2"):
        eval_batches(digits, views(CARD), 8, process_index=2, process_count=2)
    with pytest.raises(ValueError, match="seed must be"):
        train_batches(digits, views(CARD, []), 8, -1)
    with pytest.raises(IndexError, match="at least 0"):
        train_batches(digits, views(CARD, []), 8, 0)[-1]
    with pytest.raises(IndexError, match=r"0 \.\. 12"):
        eval_batches(digits, views(CARD), 8)[13]


def test_batches_that_the_machine_cannot_hold_are_refused_before_they_are_made(digits):
    for make in (
        lambda: train_batches(digits, views(SAME), 10**12, 0),
        lambda: eval_batches(digits, views(CARD), 10**12),
    ):
        with pytest.raises(ValueError, match=r"batch_size 1000000000000 of digits .* GB of memory; choose a smaller"):
            make()


def test_a_file_that_is_gone_is_named_where_its_batch_is_due(photos, tmp_path):
    (tmp_path / "b" / "4.jpg").unlink()
    with pytest.raises(OSError, match=r"cannot read b/4\.jpg of folder:.*No such file"):
        list(eval_batches(photos, views(CARD), 3))


def test_an_image_too_small_for_its_crop_is_named(digits):
    batches = train_batches(digits, views(CARD, [("random_crop", {})]), 8, 0)
    with pytest.raises(ValueError, match=r"train/\d+ of digits .*random_crop of 12 pixels .* 8 x 8"):
        batches[0]


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    whole = machine.memory()
    (tmp_path / "none").write_text("max\n")
    (tmp_path / "limit").write_text("1000000\n")
    monkeypatch.setattr(machine, "CGROUPS", (str(tmp_path / "none"), str(tmp_path / "absent")))
    assert whole <= machine.memory() <= 2**50
    monkeypatch.setattr(machine, "CGROUPS", (str(tmp_path / "none"), str(tmp_path / "limit")))
    with pytest.raises(ValueError, match=r"batch_size 4096 of digits train: the . batches made ahead take .* of 0 GB"):
        train_batches(sources.load("digits", "train"), {"image": pipeline.View(CARD)}, 4096, 0)
