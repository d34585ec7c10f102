"""Sources, split strings, slices and shots, and the messages of bad input."""

import importlib.util
import io
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from tl_jax.data import sources
from tl_jax.data.image import decode
from tl_jax.data.readers import glyphs
from tl_jax.data.readers.folder import natural_key


def write_image(path, colour=0, file_format="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Image.new("RGB", (6, 5), (colour, 0, 0)).save(file, file_format)


@pytest.fixture
def folder(tmp_path):
    """Two classes, train 3 + 2 and val 1 + 1 images."""
    for i, path in enumerate(["train/ant/a.png", "train/ant/b.png", "train/ant/more/c.png", "train/bee/d.png",
                              "train/bee/e.png", "val/ant/f.png", "val/bee/g.png"]):  # fmt: skip
        write_image(tmp_path / path, i)
    return tmp_path


# What is read


def test_digits_are_scikit_learns_digits_cut_between_two_writers():
    from sklearn.datasets import load_digits

    reference = load_digits()
    train, test = sources.load("digits", "train"), sources.load("digits", "test")
    assert (len(train), len(test)) == (1029, 768)
    images = np.concatenate([train.inputs, test.inputs])
    np.testing.assert_array_equal(images[..., 1], np.floor(reference.images * 255 / 16 + 0.5))
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), reference.target)
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 3) and train.labels.dtype == np.int32
    # Every form starts with 0 .. 9 three times over; the cut is such a start.
    np.testing.assert_array_equal(test.labels[:30], np.tile(np.arange(10), 3))


def test_folder_reads_classes_files_and_labels(folder):
    source = sources.load(f"folder:{folder}", "train")
    assert source.class_names == ("ant", "bee")
    assert source.ids == ("train/ant/a.png", "train/ant/b.png", "train/ant/more/c.png", "train/bee/d.png",
                          "train/bee/e.png")  # fmt: skip
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    example = source[4]
    assert example["label"] == 1 and decode.decode(example["image"])[0, 0, 0] == 4
    assert source.sizes.tolist() == [os.path.getsize(folder / i) for i in source.ids]


def test_class_folders_without_split_folders_are_the_train_split(tmp_path):
    for name in ("10", "2", "1"):
        write_image(tmp_path / name / "x.png", int(name))
    source = sources.load(f"folder:{tmp_path}", "train")
    assert source.class_names == ("1", "2", "10")  # by value, not by character
    assert [decode.decode(source[i]["image"])[0, 0, 0] for i in range(3)] == [1, 2, 10]
    with pytest.raises(ValueError, match=r"no split 'val'; it has train.*train\[80%:\]"):
        sources.load(f"folder:{tmp_path}", "val")


def test_natural_order_puts_numbers_by_value():
    assert sorted(["b2", "b10", "a", "B1", "10", "9"], key=natural_key) == ["9", "10", "a", "B1", "b2", "b10"]


MEDMNIST = [  # as published: pixels, labels, and the task that they are for
    ((28, 28), lambda rng, n: rng.integers(0, 11, (n, 1)).astype(np.uint8), "classification"),
    ((28, 28, 3), lambda rng, n: rng.integers(0, 8, (n, 1)), "classification"),
    ((28, 28), lambda rng, n: rng.integers(0, 2, (n, 1)).astype(np.uint8), "binary"),
    ((28, 28), lambda rng, n: rng.integers(0, 2, (n, 14)).astype(np.uint8), "multilabel"),
    ((64, 64, 3), lambda rng, n: rng.integers(0, 5, (n, 1)).astype(np.uint8), "classification"),
]


@pytest.mark.parametrize(("shape", "draw", "task"), MEDMNIST)
def test_medmnist_is_read_as_it_is_published(tmp_path, shape, draw, task):
    rng, arrays = np.random.default_rng(0), {}
    for split, n in {"train": 90, "val": 60, "test": 70}.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, *shape)).astype(np.uint8)
        arrays[f"{split}_labels"] = draw(rng, n)
    for named in (False, True):
        count = arrays["train_labels"].shape[1] if task == "multilabel" else int(arrays["train_labels"].max()) + 1
        names = tuple(f"finding {k}" if named else str(k) for k in range(count))
        np.savez(tmp_path / "medmnist.npz", **arrays, **({"classes": np.array(names)} if named else {}))
        for split in ("train", "val", "test"):
            found = sources.load(f"arrays:{tmp_path}/medmnist.npz", split, task=task)
            labels, pixels = arrays[f"{split}_labels"], arrays[f"{split}_images"]
            np.testing.assert_array_equal(found.labels, labels if task == "multilabel" else labels[:, 0])
            assert found.class_names == names
            image = pixels[7] if pixels.ndim == 4 else np.repeat(pixels[7][..., None], 3, -1)
            np.testing.assert_array_equal(found[7]["image"], image)


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_the_validation_folder_may_have_its_long_names(folder, name):
    (folder / "val").rename(folder / name)
    assert len(sources.load(f"folder:{folder}", "val")) == 2


def test_hidden_files_and_folders_and_litter_are_ignored_and_links_followed_once(folder):
    write_image(folder / "train/.cache/x.png")
    (folder / "train/ant/.DS_Store").write_bytes(b"junk")
    (folder / "train/ant/Thumbs.db").write_bytes(b"junk")
    (folder / "train/ant/more/loop").symlink_to(folder / "train/ant", target_is_directory=True)
    (folder / "train/bee/linked.png").symlink_to(folder / "train/ant/a.png")
    source = sources.load(f"folder:{folder}", "train")
    assert source.class_names == ("ant", "bee") and np.bincount(source.labels).tolist() == [3, 3]


def test_a_file_is_read_by_its_content_and_not_by_its_name(folder):
    write_image(folder / "train/ant/gif.jpg", 8, "GIF")
    source = sources.load(f"folder:{folder}", "train")
    assert decode.decode(source[source.ids.index("train/ant/gif.jpg")]["image"])[0, 0, 0] == 8


def jpeg(colour):
    stream = io.BytesIO()
    Image.new("RGB", (6, 5), (colour, colour, colour)).save(stream, "PNG")
    return stream.getvalue()


def test_arrays_of_pixels_and_of_encoded_images_hold_the_same(tmp_path):
    grey, labels = np.arange(4, dtype=np.uint8)[:, None, None].repeat(5, 1).repeat(6, 2), np.array([0, 1, 1, 0])
    files = [jpeg(colour) for colour in range(4)]
    offsets = np.cumsum([0] + [len(f) for f in files])
    np.savez(tmp_path / "a.npz", image=grey, label=labels)
    np.savez(tmp_path / "b.npz", bytes=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=labels,
             classes=np.array(["x", "y"]))  # fmt: skip
    pixels, coded = sources.load(f"arrays:{tmp_path}/a.npz"), sources.load(f"arrays:{tmp_path}/b.npz")
    assert pixels.class_names == ("0", "1") and coded.class_names == ("x", "y")
    for i in range(4):
        np.testing.assert_array_equal(pixels[i]["image"], grey[i][..., None].repeat(3, 2))
        np.testing.assert_array_equal(decode.decode(coded[i]["image"]), pixels[i]["image"])
        assert pixels[i]["label"] == coded[i]["label"] == labels[i]


def test_one_array_file_may_hold_several_splits_and_a_folder_one_file_each(tmp_path):
    image = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "both.npz", train_image=image, train_label=[0, 1, 0], test_image=image[:1], test_label=[1])
    np.savez(tmp_path / "test.npz", image=image[:2], label=[0, 1])
    assert len(sources.load(f"arrays:{tmp_path}/both.npz", "test")) == 1
    assert len(sources.load(f"arrays:{tmp_path}", "test")) == 2
    with pytest.raises(ValueError, match="no split 'val'; it has train, test"):
        sources.load(f"arrays:{tmp_path}/both.npz", "val")
    with pytest.raises(FileNotFoundError, match=r"no file .*train\.npz.*both\.npz, test\.npz"):
        sources.load(f"arrays:{tmp_path}", "train")


def test_glyphs_are_deterministic_balanced_and_hold_no_digits():
    source = sources.load("glyphs", "val")
    assert source.inputs.shape == (2000, 8, 8, 3) and len(source.class_names) == 37
    assert not any(c.isdigit() for name in source.class_names for c in name)
    assert sorted("".join(source.class_names).lower()) == sorted("".join(c * 2 for c in "abcdefghijklmnopqrstuvwxyz"))
    assert np.ptp(np.bincount(source.labels)) <= 1
    glyphs._render.cache_clear()
    np.testing.assert_array_equal(sources.load("glyphs", "val").inputs, source.inputs)
    digits = sources.load("digits", "train").inputs
    assert abs(source.inputs.mean() / digits.mean() - 1) < 0.15 and abs(source.inputs.std() / digits.std() - 1) < 0.1
    assert set(np.unique(source.inputs)) <= set(np.rint(np.arange(17) * 255 / 16).astype(int))


def test_tfds_reads_a_mocked_data_set():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=30):
        source = sources.load("tfds:cifar10", "train[:50%]", split_seed=3)
        assert len(source) == 15 and len(source.class_names) == 10 and source.labels.dtype == np.int32
        assert source[3]["image"].shape == (32, 32, 3) and source[3]["label"] == source.labels[3]


def test_tfds_reads_a_prepared_data_set_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    image, label = tfds.features.Image(shape=(None, None, 3)), tfds.features.ClassLabel(names=["a", "b"])
    features = {"image": image, "label": label}

    class TinyShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(), "validation": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                yield i, {"image": io.BytesIO(jpeg(i)), "label": i % 2}

    with pytest.raises(FileNotFoundError, match=r"is not prepared.*array_record.*download_and_prepare\(\)"):
        sources.load("tfds:tiny_shapes", "train", data_dir=str(tmp_path))
    if importlib.util.find_spec("tensorflow") is None:  # the table in docs/data.md
        with pytest.raises(ModuleNotFoundError, match="tensorflow"):
            TinyShapes(data_dir=tmp_path / "tfrecord", file_format="tfrecord").download_and_prepare()
    TinyShapes(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = sources.load("tfds:tiny_shapes:1.0.0", "val", data_dir=str(tmp_path), on_error="skip")
    assert source.class_names == ("a", "b") and source.ids[2] == "val/2"
    pixels = [int(decode.decode(source[i]["image"])[0, 0, 0]) for i in range(6)]
    assert sorted(pixels) == list(range(6)) and [p % 2 for p in pixels] == source.labels.tolist()
    assert "tensorflow" not in sys.modules
    shutil.copytree(tmp_path / "tiny_shapes", tmp_path / "other" / "tiny_shapes")
    about = tmp_path / "other" / "tiny_shapes" / "1.0.0" / "dataset_info.json"  # as if TensorFlow had written it
    about.write_text(about.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(FileNotFoundError, match=r"is prepared as tfrecord, which TensorFlow alone reads.*array_record"):
        sources.load("tfds:tiny_shapes", "train", data_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="no split 'test'; it has train, val"):
        sources.load("tfds:tiny_shapes", "test", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"knows no data set 'cifer10' .did you mean 'cifar10"):
        sources.load("tfds:cifer10", "train")


def test_the_data_package_imports_neither_jax_nor_tensorflow():
    script = (
        "import sys, tl_jax.data.sources, tl_jax.data.pipeline\n"
        "print({'jax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "set()"


def test_sources_pickle(folder):
    for name, split in ((f"folder:{folder}", "train+val"), ("digits", "test[:10]")):
        source = sources.load(name, split)
        copy = pickle.loads(pickle.dumps(source))
        assert copy.fingerprint == source.fingerprint
        with decode.reading(copy[1]["image"]) as found, decode.reading(source[1]["image"]) as image:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(image))


def test_the_fingerprint_follows_names_labels_ids_and_sizes(folder):
    first = sources.load(f"folder:{folder}", "train").fingerprint
    assert sources.load(f"folder:{folder}", "train").fingerprint == first
    (folder / "train/ant/a.png").rename(folder / "train/ant/z.png")
    renamed = sources.load(f"folder:{folder}", "train").fingerprint
    write_image(folder / "train/ant/z.png", 0, "GIF")
    resized = sources.load(f"folder:{folder}", "train").fingerprint
    assert len({first, renamed, resized}) == 3


# Slices and shots


def test_complementary_slices_are_disjoint_exhaustive_and_mixed():
    whole = sources.load("digits", "train")
    first, second = (sources.load("digits", f"train[{cut}]", split_seed=5) for cut in (":80%", "80%:"))
    assert not set(first.ids) & set(second.ids) and set(first.ids) | set(second.ids) == set(whole.ids)
    for part in (first, second):
        share = np.bincount(part.labels) / len(part)
        np.testing.assert_allclose(share, np.bincount(whole.labels) / len(whole), atol=1.01 / len(part))
    np.testing.assert_array_equal(first.inputs[7], whole.inputs[whole.ids.index(first.ids[7])])


def test_every_prefix_of_the_stratified_order_has_the_class_proportions():
    labels = np.random.default_rng(0).choice(5, 700, p=[0.5, 0.3, 0.15, 0.04, 0.01])
    order = sources.stratified_order(labels, seed=1)
    assert sorted(order) == list(range(700))
    taken = np.cumsum(np.eye(5)[labels[order]], 0)
    expected = np.arange(1, 701)[:, None] * np.bincount(labels) / 700
    assert np.abs(taken - expected).max() < 2
    assert (order != sources.stratified_order(labels, seed=2)).any()
    np.testing.assert_array_equal(order, sources.stratified_order(labels, seed=1))


def test_slices_by_count_and_sums_of_splits(folder):
    assert len(sources.load("digits", "train[100:200]")) == 100
    parts = [sources.load("digits", f"train[{cut}]").ids for cut in (":100", "100:200", "200:")]
    assert sorted(i for part in parts for i in part) == sorted(sources.load("digits", "train").ids)
    both = sources.load(f"folder:{folder}", "train[:40%]+val")
    assert len(both) == 4 and both.ids[2:] == ("val/ant/f.png", "val/bee/g.png")
    assert decode.decode(both[3]["image"])[0, 0, 0] == 6
    with pytest.raises(ValueError, match="occur twice"):
        sources.load("digits", "train[:50%]+train[40%:]")


@pytest.mark.parametrize("split", ["", "train[", "train[-5:]", "train[:50%", "train+", "train[a:b]", "train[1:2:3]"])
def test_a_split_that_cannot_be_read_is_an_error(split):
    with pytest.raises(ValueError, match="cannot read split"):
        sources.load("digits", split)


@pytest.mark.parametrize("cut", [":5000", "50%:50%", "200:100", "0:101%"])
def test_an_empty_or_too_long_slice_is_an_error(cut):
    with pytest.raises(ValueError, match="empty or beyond its 1029 examples"):
        sources.load("digits", f"train[{cut}]")


def test_shots_are_balanced_nested_and_seeded():
    draws = {k: sources.load("digits", "train[:80%]", shots=k, seed=4) for k in (5, 10)}
    assert np.bincount(draws[5].labels).tolist() == [5] * 10 and set(draws[5].ids) < set(draws[10].ids)
    assert set(draws[5].ids) <= set(sources.load("digits", "train[:80%]").ids)
    assert set(sources.load("digits", "train[:80%]", shots=5, seed=5).ids) != set(draws[5].ids)


def test_too_many_shots_list_every_class_that_lacks_them(folder):
    with pytest.raises(ValueError, match=r"(?s)3 shots .* 1 classes have fewer examples:\n  bee: 2"):
        sources.load(f"folder:{folder}", "train", shots=3)


# Bad input


@pytest.mark.parametrize(
    ("source", "hint"),
    [("digit", "mean 'digits'"), ("folders:x", "'folder:PATH'"), ("folder", "folder:PATH"), ("digits:x", "digits")],
)
def test_an_unknown_source_names_its_neighbour(source, hint):
    with pytest.raises(ValueError, match="unknown source") as error:
        sources.load(source)
    assert hint in str(error.value)


@pytest.mark.parametrize("source", ["digits", "glyphs"])
def test_an_unknown_split_is_an_error(source):
    with pytest.raises(ValueError, match="no split 'dev'; it has train"):
        sources.load(source, "dev")


def test_a_missing_folder_names_its_neighbours(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image folder at .*flower/x; near it: .*flowers"):
        sources.load(f"folder:{tmp_path}/flower/x")


def test_a_folder_without_classes_is_an_error(tmp_path):
    write_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no class folders in .* only 1 files; expected .*CLASS/IMAGE"):
        sources.load(f"folder:{tmp_path}")


def test_all_empty_classes_are_listed(folder):
    for name in ("wasp", "fly"):
        (folder / "train" / name).mkdir()
    with pytest.raises(ValueError, match=r"(?s)2 of 4 class folders .* are empty; .*:\n  fly\n  wasp"):
        sources.load(f"folder:{folder}", "train")


def test_classes_that_differ_from_trains_are_an_error(folder):
    write_image(folder / "val/wasp/x.png")
    (folder / "val/bee").rename(folder / "val/Bee")
    with pytest.raises(ValueError, match=r"missing \['bee'\], not in train \['Bee', 'wasp'\]"):
        sources.load(f"folder:{folder}", "val")


def test_one_split_under_two_names_is_an_error(folder):
    write_image(folder / "valid/ant/x.png")
    with pytest.raises(ValueError, match="names one split twice: val, valid"):
        sources.load(f"folder:{folder}", "train")


def damage(folder):
    (folder / "train/ant/broken.jpg").write_bytes(b"no image")
    (folder / "train/ant/empty.png").write_bytes(b"")
    (folder / "train/bee/gone.png").symlink_to(folder / "nowhere")


def test_all_unreadable_files_are_named_at_once(folder):
    damage(folder)
    with pytest.raises(ValueError, match="3 of 8 files") as error:
        sources.load(f"folder:{folder}", "train")
    for part in ("broken.jpg", "empty.png", "gone.png", "on_error='skip'"):
        assert part in str(error.value)


def test_skip_drops_every_undecodable_image_and_says_which(folder, caplog):
    damage(folder)
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "JPEG")
    (folder / "train/bee/cut.jpg").write_bytes(stream.getvalue()[:1500])  # a good header: only decoding finds it out
    source = sources.load(f"folder:{folder}", "train", on_error="skip")
    assert source.ids == ("train/ant/a.png", "train/ant/b.png", "train/ant/more/c.png", "train/bee/d.png",
                          "train/bee/e.png")  # fmt: skip
    assert len(source.skipped) == 4 and any("cut.jpg: damaged JPEG" in text for text in source.skipped)
    assert "skipped 4 of 9" in caplog.text


def test_skip_refuses_to_lose_a_whole_class(folder):
    for name in ("d", "e"):
        (folder / f"train/bee/{name}.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"(?s)no readable image is left of 1 classes .*\n  bee"):
        sources.load(f"folder:{folder}", "train", on_error="skip")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((2, 4, 4), np.float32), "label": [0, 1]}, "pixels are float32, expected uint8; say what"),
        ({"image": np.zeros((2, 4, 4), np.uint8), "label": [0]}, r"integer labels \[2\]"),
        ({"image": np.zeros((2, 4, 4), np.uint8), "label": [0.0, 1.0]}, "one class for each example"),
        ({"image": np.zeros((2, 4, 4), np.uint8), "label": [1, 2], "classes": ["a", "b"]}, r"outside 0 \.\. 1"),
        ({"image": np.zeros((2, 4, 4), np.uint8)}, "expected label and one of image, features, text, or bytes"),
        ({"bytes": np.zeros(4, np.uint8), "offsets": [0, 9], "label": [0]}, "offsets must rise within the 4 bytes"),
        ({"image": np.zeros((0, 4, 4), np.uint8), "label": np.zeros(0, int)}, "holds no examples"),
        ({"image": np.array([None, 1], object), "label": [0, 1]}, "it holds Python objects; expected .* plain arrays"),
        ({"image": np.zeros((4, 4, 4), np.uint8), "label": [0, 9, 1, 2]}, r"\(0, 1, 2, 9\) stand for 10 classes .*`cl"),
        ({"image": np.zeros((2, 4, 4), np.uint8), "label": [0, 2**40]}, "2 different labels .* 1099511627777 classes"),
        ({"image": np.zeros((2, 4, 4), np.uint8), "label": [0, 1], "classes": ["a", "a"]}, "more than once.*\n  'a'"),
        ({"image": np.zeros((2, 4, 4), np.uint8), "label": [-1, 2**40]}, "1 different labels .* 1099511627777 classes"),
        ({"image": np.zeros((2, 0, 0), np.uint8), "label": [0, 1]}, "An image needs pixels"),
        (
            {"bytes": np.zeros(9, np.uint8), "offsets": [0, 3.7, 9], "label": [0, 1]},
            "offsets must be integers, .*float64",
        ),
        (
            {"bytes": np.zeros((9, 9), np.uint8), "offsets": [0, 9], "label": [0]},
            r"bytes has 2 dimensions, expected \[1\]",
        ),
        (
            {"image": np.uint8(3), "label": 1, "classes": "ab"},
            r"(?s)3 arrays .*image has 0 .*\(3, 4\)\n  label has 0 .*\(1, 2\)\n  classes has 0",
        ),
        ({"bytes": np.zeros(9, np.uint8), "offsets": 3, "label": [0]}, r"offsets has 0 dimensions, expected \[1\]"),
    ],
)
def test_wrong_arrays_are_described(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        sources.load(f"arrays:{tmp_path}/x.npz")


def test_a_file_that_is_no_archive_is_described(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(ValueError, match=r"cannot read .*x\.npz"):
        sources.load(f"arrays:{tmp_path}/x.npz")


def test_classes_without_an_example_are_said_where_the_split_is_not_train(tmp_path, caplog):
    arrays = {"train_image": np.zeros((3, 4, 4), np.uint8), "train_label": [0, 1, 2]}
    np.savez(tmp_path / "x.npz", **arrays, val_image=np.zeros((2, 4, 4), np.uint8), val_label=[0, 2])
    assert sources.load(f"arrays:{tmp_path}/x.npz", "val").class_names == ("0", "1", "2")
    assert "2 different labels (0, 2) stand for 3 classes in val; the others have no example" in caplog.text
    np.savez(tmp_path / "y.npz", **arrays, val_image=np.zeros((2, 4, 4), np.uint8), val_label=[0, 2**40])
    with pytest.raises(ValueError, match="1099511627777 classes in val"):
        sources.load(f"arrays:{tmp_path}/y.npz", "val")


@pytest.mark.parametrize("shape", ["(True,)}", "(" * 9000, "(-1,)}", "(10**17,)}", "(99999999999999999,)}"])
def test_hostile_headers_of_arrays_are_one_message(tmp_path, shape):
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}\n".encode()
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("label.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8))
    with pytest.raises(ValueError, match=r"cannot read .*x\.npz: .*expected an \.npz of plain arrays"):
        sources.load(f"arrays:{tmp_path}/x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_bit_flips_of_an_array_file_are_found_or_change_nothing(tmp_path, save):
    rng = np.random.default_rng(0)
    save(tmp_path / "x.npz", image=rng.integers(0, 4, (6, 8, 8), np.uint8), label=np.arange(6) % 3, classes=list("abc"))
    sound, expected = (tmp_path / "x.npz").read_bytes(), sources.load(f"arrays:{tmp_path}/x.npz").fingerprint
    for at in range(len(sound)):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "x.npz").write_bytes(damaged)
        try:
            assert sources.load(f"arrays:{tmp_path}/x.npz").fingerprint == expected
        except ValueError as error:
            assert "x.npz" in str(error) and "allow_pickle" not in str(error)


def test_a_pickle_is_refused_without_advice_to_load_it(tmp_path):
    (tmp_path / "x.npz").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match=r"x\.npz: it is no \.npz archive; expected an \.npz of plain arrays"):
        sources.load(f"arrays:{tmp_path}/x.npz")


def test_pipes_among_the_images_are_all_named_and_never_opened(folder):
    os.mkfifo(folder / "train/ant/pipe.png")
    os.mkfifo(folder / "train/bee/pipe.png")
    (folder / "x.csv").write_text("file,label\ntrain/ant/a.png,0\ntrain/ant/pipe.png,1\ntrain/bee/pipe.png,1\n")
    for source in (f"folder:{folder}", f"csv:{folder}/x.csv"):
        with pytest.raises(ValueError, match=r"(?s)2 of . files are pipes.*remove them:.*ant/pipe\.png.*bee/pipe\.png"):
            sources.load(source, on_error="skip")


def test_an_unknown_error_policy_is_refused():
    with pytest.raises(ValueError, match="'fail' or 'skip', found 'ignore'"):
        sources.load("digits", on_error="ignore")


def test_genuine_photos_load(shared):
    source = sources.load(f"folder:{shared}/data/hymenoptera_256", "val")
    assert (len(source), source.class_names) == (153, ("ants", "bees"))
    cifar = sources.load(f"arrays:{shared}/data/cifar10_jpeg", "test")
    assert len(cifar) == 10_000 and decode.decode(cifar[0]["image"]).shape == (32, 32, 3)
