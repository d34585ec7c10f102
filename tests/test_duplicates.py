"""The split audit: planted copies are found, different images are not, and what is scored is never trained on."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter

from tests.test_run import load_data, make_config
from tl_jax import config as options
from tl_jax.data import duplicates, sources
from tl_jax.data.readers import pack
from tl_jax.data.readers.arrays import array_source
from tl_jax.training import inputs, settings
from tl_jax.training.train import train

CHANGES = {
    "copy": lambda image: image,
    "reencoded": lambda image: image,
    "smaller": lambda image: image.resize((image.width * 2 // 3, image.height * 2 // 3)),
    "larger": lambda image: image.resize((image.width * 2, image.height * 2)),
    "squared": lambda image: image.resize((96, 96)),
    "brighter": lambda image: image.point(lambda value: min(255, int(value * 1.15))),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "mirrored": ImageOps.mirror,
    "mirrored smaller": lambda image: ImageOps.mirror(image).resize((90, 70)),
}


def photo(seed, width=130, height=100):
    """Smooth colours with details of several sizes, as photographs have."""
    rng = np.random.default_rng(seed)
    layers = [gaussian_filter(rng.normal(size=(height, width, 3)), (s, s, 0)) * s * 60 for s in (2, 6, 15)]
    return Image.fromarray(np.clip(128 + sum(layers), 0, 255).astype(np.uint8))


def save(image, path, quality=92):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=quality) if path.suffix == ".jpg" else image.save(path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Train and val of two classes, 20 photographs each, all different."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(40):
        save(photo(i), root / ("train", "val")[i % 2] / ("a", "b")[i // 2 % 2] / f"{i}.jpg")
    return root


def found_in(root, val="val"):
    splits = {"train": sources.load(f"folder:{root}", "train"), "val": sources.load(f"folder:{root}", val)}
    return duplicates.find(splits, ["train"])


def test_different_photographs_are_no_duplicates(photos):
    table = found_in(photos)
    none = {"exact": 0, "near": 0, "mirrored": 0}
    expected = {"compared": {"exact": 40, "near": 40}, "across": none, "within": none, "other_label": 0, "pairs": []}
    assert json.loads(json.dumps(table)) == expected
    assert "no duplicates" in duplicates.summary(table)


@pytest.mark.thin(9)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_planted_copy_is_found_and_named(photos, tmp_path, change, split):
    root = shutil.copytree(photos, tmp_path / "photos")
    original = root / "train" / "a" / "4.jpg"
    planted = root / split / "b" / "planted.jpg"
    if change == "copy":
        shutil.copy(original, planted)
    else:
        save(CHANGES[change](Image.open(original)), planted, quality=40)
    table = found_in(root)
    kind = "exact" if change == "copy" else "mirrored" if "mirrored" in change else "near"
    where, other = ("across", "within") if split == "val" else ("within", "across")
    assert table[where][kind] == sum(table[where].values()) == 1 and not sum(table[other].values())
    assert table["other_label"] == 1
    (pair,) = table["pairs"]
    assert pair[0] == kind and {pair[1], pair[2]} == {"train: train/a/4.jpg", f"{split}: {split}/b/planted.jpg"}
    assert "1 differ in their label" in duplicates.summary(table)


def test_every_copy_of_several_is_named(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    for i in range(3):
        shutil.copy(root / "train" / "a" / "4.jpg", root / "val" / "a" / f"copy{i}.jpg")
    table = found_in(root)
    assert table["across"]["exact"] == 3 and table["within"]["exact"] == 2


def test_small_images_and_rows_are_compared_for_equality_alone():
    first, second = (np.random.default_rng(i).integers(0, 256, (30, 28, 28, 3), np.uint8) for i in range(2))
    second[7] = first[3]
    second[8] = first[4]
    second[8, 0, 0, 0] ^= 1
    labels = np.zeros(30, int)
    one, two = (
        dataclasses.replace(array_source(name, "train", images, labels, ("x",)), domain_names=(name,))
        for name, images in (("one", first), ("two", second))
    )
    table = duplicates.find({"train": one, "test": two}, ["train"])
    assert table["compared"] == {"exact": 60, "near": 0}
    assert table["pairs"] == [["exact", "train: train/3", "test: train/7"]]


@pytest.mark.parametrize("source", ["digits", pytest.param("glyphs", marks=pytest.mark.slow)])
def test_the_images_that_come_with_the_package_have_no_duplicates(source):
    splits = {name: sources.load(source, cut) for name, cut in (("train", "train[:50%]"), ("val", "train[50%:]"))}
    assert duplicates.find(splits, ["train"])["pairs"] == []


def test_flat_images_are_no_copies_of_each_other(tmp_path):
    for i in range(6):
        save(
            Image.new("RGB", (90, 80), (i * 40,) * 3),
            tmp_path / ("train", "val")[i % 2] / "ab"[i // 2 % 2] / f"{i}.png",
        )
    assert found_in(tmp_path)["pairs"] == []


def test_a_source_of_packed_images_is_searched_as_its_files(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    save(ImageOps.mirror(Image.open(root / "train" / "a" / "4.jpg")), root / "val" / "a" / "x.jpg")
    pack.pack(f"folder:{root}", str(tmp_path / "pack"), ["train", "val"], size=80, num_workers=0)
    splits = {name: sources.load(f"packed:{tmp_path / 'pack'}", name) for name in ("train", "val")}
    assert duplicates.find(splits, ["train"])["pairs"] == found_in(root)["pairs"]


def test_damaged_images_are_named_all_at_once_before_training(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    for name in ("4", "8"):
        path = root / "train" / "a" / f"{name}.jpg"
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"(?s)2 of 40 images .*a/4.jpg.*a/8.jpg"):
        found_in(root)


def test_looks_are_kept_and_damage_of_what_is_kept_is_no_matter(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "FOLDER", tmp_path / "kept")
    table = found_in(photos)
    (kept,) = (tmp_path / "kept").glob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "_look", None)  # nothing is read again
        assert found_in(photos) == table
    for damage in (lambda text: text[:-7], lambda text: text[:500] + b"x" + text[501:], lambda text: b""):
        kept.write_bytes(damage(kept.read_bytes()))
        assert found_in(photos) == table
    monkeypatch.setattr(duplicates, "KEPT", kept.stat().st_size)
    found_in(photos, "train")  # of fewer images: there is no room for both
    assert kept not in (left := list((tmp_path / "kept").glob("*.npz"))) and len(left) == 1


def test_a_home_that_cannot_be_written_costs_time_only(photos, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(duplicates, "FOLDER", tmp_path / "file" / "kept")  # as root writes to every folder
    assert found_in(photos)["pairs"] == []


def run_config(root, **changes):
    changes = {"data.source": f"folder:{root}", "data.train": "train", "data.test": "", "data.val": "val", **changes}
    return make_config(**changes)


def audit(config):
    return inputs.find_duplicates(load_data(config), settings.read(config))


@pytest.mark.parametrize("split", ["val", "test", "extra_eval", "slice", "kfold", "loo", "stream"])
def test_no_split_that_is_scored_may_have_copies_of_what_is_trained_on(photos, tmp_path, split):
    root = shutil.copytree(photos, tmp_path / "photos")
    shutil.move(root / "val", root / "test")
    copies = "test" if split in ("val", "test", "extra_eval", "stream") else "train"
    for i in range(3):
        save(ImageOps.mirror(photo(2 * i)), root / copies / "a" / f"copy{i}.jpg")
    sets = {
        "val": {"data.val": "test"},
        "test": {"data.val": "", "data.test": "test"},
        "extra_eval": {"data.val": "train[80%:]", "data.train": "train[:80%]",
                       "data.extra_eval": (("other", f"folder:{root}", "test"),)},
        "slice": {"data.train": "train[:60%]", "data.val": "train[60%:]", "data.split_seed": 1},
        "kfold": {"data.val": "", "data.resample": "kfold:5:1"},
        "loo": {"data.val": "", "data.resample": "loo", "method.name": "ridge", "method.grid": (1.0,)},
        "stream": {"data.val": "test", "data.train": "train[:10%]", "streams": {
            "more": {"source": f"folder:{root}", "split": "train", "batch_size": 4, "labelled": True}}},
    }[split]  # fmt: skip
    config = run_config(root, **{"data.source": f"folder:{root}", **sets})
    with pytest.raises(ValueError, match="trained on and scored, under two names or as a near copy") as error:
        audit(config)
    assert "data.allow_duplicates=True" in str(error.value) and "copy" in str(error.value)
    table = audit(options.override(config, {"data.allow_duplicates": True}))
    assert sum(table["across"].values()) >= 1


def test_an_unlabelled_stream_may_hold_copies_where_training_is_transductive(photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    stream = {"source": f"folder:{shutil.copytree(photos, tmp_path / 'other')}", "split": "val", "batch_size": 4}
    config = run_config(root, streams={"target": stream})
    with pytest.raises(ValueError, match="20 examples are trained on and scored"):
        audit(config)
    assert audit(options.override(config, {"data.transductive": True}))["pairs"] == []


def test_equal_rows_of_a_table_are_told_and_not_refused(tmp_path):
    rows = [f"{i % 10},{i % 7 == 0:d},{'train' if i % 3 else 'test'}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["x,label,split", *rows]) + "\n")
    config = make_config(**{"data.source": f"table:{tmp_path / 't.csv'}", "data.train": "train", "data.test": "test"})
    assert audit(config)["across"]["exact"] > 5


@pytest.mark.parametrize("allowed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_says_what_it_found(photos, tmp_path, capsys, allowed):
    root = shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(root / "train" / "b" / "2.jpg", root / "val" / "b" / "again.jpg")
    config = run_config(root, **{"total": (1, "steps"), "data.allow_duplicates": allowed})
    if not allowed:
        with pytest.raises(ValueError, match=r"(?s)1 examples .*exact: .*b/2.jpg.*b/again.jpg"):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run" / "result.json").exists()
        return
    train(config, tmp_path / "run")
    assert "split audit: 41 examples compared" in capsys.readouterr().out
    told = json.loads((tmp_path / "run" / "result.json").read_text())["duplicates"]
    assert told["across"] == {"exact": 1, "near": 0, "mirrored": 0} and told["pairs"][0][0] == "exact"


@pytest.mark.slow
def test_thirty_planted_copies_among_the_splits_of_hymenoptera(shared, tmp_path):
    root = shutil.copytree(shared / "data" / "hymenoptera_256", tmp_path / "h")
    assert found_in(root)["pairs"] == []  # none without those that are planted
    rng, planted = np.random.default_rng(5), set()
    for i, path in enumerate(rng.permutation(sorted(root.glob("train/*/*.jpg")))[:30]):
        change = list(CHANGES)[i % len(CHANGES)]
        to = root / ("train", "val")[i % 2] / ("ants", "bees")[i // 2 % 2] / f"planted{i}.jpg"
        if change == "copy":
            shutil.copy(path, to)
        else:
            save(CHANGES[change](Image.open(path).convert("RGB")), to, quality=(30, 60, 90)[i % 3])
        planted.add(frozenset(str(name.relative_to(root)) for name in (path, to)))
    pairs = found_in(root)["pairs"]
    assert {frozenset(name.partition(": ")[2] for name in pair[1:]) for pair in pairs} == planted


def test_leave_one_out_sees_copies_in_other_groups_behind_those_of_the_own(photos, tmp_path):
    root = shutil.copytree(photos / "train", tmp_path / "p")
    image = Image.open(root / "a" / "4.jpg")
    for name, quality in (("p0_a", 95), ("p0_b", 90)):
        save(image, root / "a" / f"{name}.jpg", quality)
    save(image.resize((90, 70)), root / "b" / "p1_c.jpg", 40)
    (root / "a" / "4.jpg").unlink()
    loo = {"data.val": "", "data.train": "train", "data.resample": "loo", "method.name": "ridge", "method.grid": (1.0,)}
    config = run_config(root, **{**loo, "data.group": r"p\d|\d+(?=\.)"})
    with pytest.raises(ValueError, match=r"trained on and scored[\s\S]*p1_c"):
        audit(config)


def test_what_all_images_have_in_common_makes_no_copies(tmp_path):
    y, x = np.mgrid[:100, :130]
    outside = (y - 50) ** 2 + (x - 65) ** 2 > 45**2
    for i in range(40):
        pixels = 60 + np.asarray(photo(i)) * 0.3
        pixels[outside] = 0  # a round field of view
        save(
            Image.fromarray(pixels.astype(np.uint8)), tmp_path / ("train", "val")[i % 2] / "ab"[i // 2 % 2] / f"{i}.png"
        )
    assert found_in(tmp_path)["pairs"] == []
    shutil.copy(tmp_path / "train" / "a" / "0.png", tmp_path / "val" / "a" / "copy.png")
    save(Image.open(tmp_path / "train" / "a" / "4.png"), tmp_path / "val" / "b" / "m.jpg", quality=60)
    assert sorted(pair[0] for pair in found_in(tmp_path)["pairs"]) == ["exact", "near"]


def test_looks_follow_the_files_and_serve_every_cut_of_them(tmp_path, monkeypatch):
    root, read, look = tmp_path / "photos", [], duplicates._look
    for i in range(20):  # without compression, so that all files have one size
        save(photo(i), root / "ab"[i % 2] / f"{i}.bmp")
    monkeypatch.setattr(duplicates, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(duplicates, "_look", lambda source, i: read.append(i) or look(source, i))

    def fold(number):
        changes = {"data.val": "", "data.resample": f"kfold:5:{number}", "data.allow_duplicates": True}
        return audit(run_config(root, **changes))["pairs"]

    assert [fold(number) for number in range(3)] == [[]] * 3 and len(read) == 20  # once for all folds
    for i in (0, 4):
        shutil.copyfile(root / "b" / f"{i + 1}.bmp", root / "a" / f"{i}.bmp")
    assert len(fold(0)) == 2 and len(read) == 40


def test_parts_of_any_size_give_the_same_pairs(photos, tmp_path, monkeypatch):
    root = shutil.copytree(photos, tmp_path / "photos")
    for i in range(4):
        save(ImageOps.mirror(photo(2 * i)), root / "val" / "a" / f"copy{i}.jpg")
    table = found_in(root)
    monkeypatch.setattr(duplicates, "PART", 7)
    monkeypatch.setattr(duplicates, "BLOCK", 100)
    assert found_in(root) == table and table["across"]["mirrored"] == 4
