"""Packed sources: the same images, labels and batches as the files; what is broken off, damaged or too small."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from tl_jax import __main__ as command
from tl_jax.core import files as stored
from tl_jax.core.card import Card
from tl_jax.data import pipeline, sources
from tl_jax.data.pipeline import View
from tl_jax.data.readers import pack, packed

CARD = Card("m", 2, input_size=16, crop=0.8, interpolation="bicubic")  # short side to 20
AUGMENT = (("random_resized_crop", {}), ("flip", {}))
VIEWS = {"image": View(CARD)}
QUIET = {"report": lambda text: None}


@pytest.fixture
def photos(tmp_path):
    """Train 8 + 5 and val 2 + 2 images, one turned by EXIF, one grey PNG, one smaller than the rest."""
    rng = np.random.default_rng(0)
    for split, counts in {"train": (8, 5), "val": (2, 2)}.items():
        for name, count in zip(("ant", "bee"), counts, strict=True):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = (12, 15) if (split, i) == ("train", 4) else (40 + i, 61)
                image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
                image = image.convert("L") if i == 1 else image
                exif = Image.Exif()
                exif[ExifTags.Base.Orientation] = 6 if i == 0 else 1
                path = tmp_path / "photos" / split / name / f"{i}.{'png' if i == 1 else 'jpg'}"
                image.save(path, exif=exif)
    return f"folder:{tmp_path}/photos"


def damage(photos, name):
    path = Path(photos.removeprefix("folder:")) / name
    path.write_bytes(path.read_bytes()[:700])


def same_batches(first, second):
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_packed_split_holds_what_the_folder_holds(photos, tmp_path):
    pack.pack(photos, str(tmp_path / "p"), ("train", "val"), size=20, **QUIET)
    for split in ("train", "val[:50%]"):
        of_files, of_pack = (sources.load(s, split, shots=1) for s in (photos, f"packed:{tmp_path}/p"))
        assert of_files.ids == of_pack.ids and of_files.class_names == of_pack.class_names
        np.testing.assert_array_equal(of_files.labels, of_pack.labels)
        assert of_pack.made_smaller == ((20, "bicubic"),) and not of_files.made_smaller
        assert of_pack.fingerprint != of_files.fingerprint
    assert packed.verify(str(tmp_path / "p")) == {"train": 13, "val": 4}


def test_evaluation_sees_equal_pixels_where_the_pack_is_resized_as_the_card_does(photos, tmp_path, caplog):
    pack.pack(photos, str(tmp_path / "p"), size=20, num_workers=1, **QUIET)
    of_files, of_pack = (sources.load(s) for s in (photos, f"packed:{tmp_path}/p"))
    same_batches(*(list(pipeline.eval_batches(s, VIEWS, 5)) for s in (of_files, of_pack)))
    assert not caplog.records
    pipeline.eval_batches(of_pack, {"image": View(CARD.replace(interpolation="bilinear"))}, 5)
    assert "packed with --size 20 --interpolation bilinear they are equal" in caplog.text


def test_training_sees_equal_pixels_where_no_image_was_made_smaller(photos, tmp_path):
    pack.pack(photos, str(tmp_path / "p"), size=100, **QUIET)
    streams = [
        pipeline.train_batches(sources.load(s), {"image": View(CARD, AUGMENT)}, 8, 1)
        for s in (photos, f"packed:{tmp_path}/p")
    ]
    same_batches(*([stream[step] for step in range(4)] for stream in streams))
    same_batches(streams[0].iterate(0, 4), streams[1].iterate(0, 4, num_workers=1))
    same_batches(*(pipeline.eval_batches(stream.source, VIEWS, 5) for stream in streams))


def test_a_card_that_needs_larger_images_is_refused(photos, tmp_path):
    pack.pack(photos, str(tmp_path / "p"), ("train", "val"), size=20, **QUIET)
    source, large = sources.load(f"packed:{tmp_path}/p", "train+val"), CARD.replace(input_size=24)
    for make in (lambda: pipeline.eval_batches(source, {"image": View(large)}, 4),
                 lambda: pipeline.train_batches(source, {"image": View(large, AUGMENT)}, 4, 0)):  # fmt: skip
        with pytest.raises(ValueError, match=r"packed with --size 20, but the card .*a short side of 30: .*--size 30"):
            make()


KILLED = """
import sys, time
from tl_jax.data.readers import pack
pack.FLUSH, pack.CHUNK = 0, 2
def report(text):
    print(text, flush=True)
    time.sleep(0.2 * ("images/s" in text))
pack.pack(sys.argv[1], sys.argv[2], ("train",), size=20, report=report)
"""


def test_a_packing_that_was_killed_goes_on_and_ends_with_the_same_bytes(photos, tmp_path, monkeypatch):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, photos, str(tmp_path / "p")], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1],
    ) as process:  # fmt: skip
        while "6 of 13 images" not in process.stdout.readline():
            pass
        with pytest.raises(ValueError, match="another process is packing into"):
            pack.pack(photos, str(tmp_path / "p"), size=20, **QUIET)
        process.kill()
    with pytest.raises(FileNotFoundError, match="train was begun, start its command again"):
        sources.load(f"packed:{tmp_path}/p")
    journal = tmp_path / "p/.train.partial/journal"
    lines = journal.read_bytes().splitlines()
    lines[0] = lines[0].replace(b"[0, [", b"[8, [")  # a damaged line: its piece is done again
    journal.write_bytes(b"\n".join([*lines, b'[10, [["4']))  # and one cut short, as by a power cut
    monkeypatch.setattr(pack, "CHUNK", 2)
    said = []
    pack.pack(photos, str(tmp_path / "p"), size=20, report=said.append)
    assert "4 of 13 images were packed before" in said
    pack.pack(photos, str(tmp_path / "whole"), size=20, **QUIET)
    assert files(tmp_path / "p") == files(tmp_path / "whole")


def test_damage_is_named(photos, tmp_path):
    pack.pack(photos, str(tmp_path / "p"), ("train", "val"), size=20, **QUIET)
    for split, name in (("train", "ant/3.jpg"), ("val", "bee/0.jpg")):
        store = packed.open_split(tmp_path / "p" / split)
        at = int(store.offsets[store.meta["ids"].index(f"{split}/{name}")])
        with (tmp_path / "p" / split / "pixels.bin").open("rb+") as file:
            file.seek(at + 5)
            byte = file.read(1)[0]
            file.seek(at + 5)
            file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match=r"2 problems.*\n.*train/ant/3\.jpg differ.*\n.*val/bee/0\.jpg differ"):
        packed.verify(str(tmp_path / "p"))
    meta = tmp_path / "p/train/meta.json"
    stored.write_json(meta, stored.read_json(meta) | {"bytes": 7, "examples": 9})
    packed._opened.cache_clear()
    with pytest.raises(ValueError, match=r"damaged; .*:\n  pixels.bin: bytes \d+, expected 7\n  .* 13, expected 9"):
        sources.load(f"packed:{tmp_path}/p")


def flipped(path, at, bit):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_every_bit_flip_of_the_meta_data_is_found_when_a_pack_is_opened(photos, tmp_path):
    pack.pack(photos, str(tmp_path / "p"), ("val",), size=20, **QUIET)
    meta, split = tmp_path / "p/val/meta.json", tmp_path / "p/val"
    sound = meta.read_bytes()
    for at, bit in np.ndindex(len(sound), 8):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << bit
        meta.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"are damaged; .*\n.*meta\.json is damaged"):
            packed.open_split(split)
    for text in ("[]", "", "7", '{"format": "tl_jax packed 2"}'):
        meta.write_text(text)
        for call in (lambda: packed.verify(str(tmp_path / "p")), lambda: sources.load(f"packed:{tmp_path}/p", "val"),
                     lambda: pack.pack(photos, str(tmp_path / "p"), ("val",), size=20, **QUIET)):  # fmt: skip
            with pytest.raises(
                ValueError, match=r"meta\.json is damaged|'tl_jax packed 2', expected|holds another packing"
            ):
                call()


def test_every_bit_flip_of_the_pixels_is_found_where_its_image_is_read(photos, tmp_path):
    pack.pack(photos, str(tmp_path / "p"), ("val",), size=20, **QUIET)
    pixels, rng = tmp_path / "p/val/pixels.bin", np.random.default_rng(0)
    for _ in range(200):
        at, bit = int(rng.integers(pixels.stat().st_size)), int(rng.integers(8))
        flipped(pixels, at, bit)
        store, damaged = packed.open_split(pixels.parent), []
        for index in range(4):
            try:
                store.image(index)
            except OSError as error:
                assert store.meta["ids"][index] in str(error)
                damaged.append(index)
        assert damaged == [int(np.searchsorted(store.offsets, at, "right")) - 1]
        flipped(pixels, at, bit)
    flipped(pixels, 0, 0)
    packed._opened.cache_clear()
    batches = pipeline.eval_batches(sources.load(f"packed:{tmp_path}/p", "val"), VIEWS, 4)
    with pytest.raises(OSError, match=r"cannot read val/ant/0\.jpg of packed:.* are not those that were packed"):
        batches[0]


def test_all_images_that_cannot_be_decoded_are_listed_and_can_be_left_out(photos, tmp_path):
    arguments = photos, str(tmp_path / "p"), ("train", "val")
    for name in ("train/ant/2.jpg", "train/bee/3.jpg", "val/ant/0.jpg"):
        damage(photos, name)
    with pytest.raises(ValueError, match=r"(?s)3 of 17 images .*--on_error skip.*train/ant/2.*train/bee/3.*val/ant/0"):
        pack.pack(*arguments, size=20, **QUIET)
    pack.pack(*arguments, size=20, on_error="skip", **QUIET)
    of_files, of_pack = (sources.load(s, on_error="skip") for s in (photos, f"packed:{tmp_path}/p"))
    assert of_files.ids == of_pack.ids and of_files.skipped == of_pack.skipped and len(of_pack) == 11
    assert packed.verify(str(tmp_path / "p")) == {"train": 11, "val": 3}


def test_what_cannot_be_packed_is_said_before_anything_is_written(photos, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        code = command.main(["pack", photos, str(tmp_path / "p"), "--size", "20", "--workers", "0", *arguments])
        return code, capsys.readouterr().err

    assert run("--split", "train,test")[0] == 2 and not (tmp_path / "p").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 9_000))
    code, error = run()
    assert code == 2 and "9,000 bytes free" in error and "are needed" in error
    assert not (tmp_path / "p/.train.partial/pixels.bin").exists()
    monkeypatch.undo()
    assert run()[0] == 0 and run() == (0, "")
    code, error = run("--interpolation", "bilinear")
    assert code == 2 and "holds another packing" in error and "'bicubic' -> 'bilinear'" in error
    with pytest.raises(ValueError, match="pack the source that it was packed from"):
        pack.pack(f"packed:{tmp_path}/p", str(tmp_path / "q"), **QUIET)
    assert command.main(["verify", str(tmp_path / "p")]) == 0
