"""Texts of prepared tfds data sets: read without TensorFlow, as those of files are."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

import tl_jax
from tl_jax import __main__ as command
from tl_jax.data import sources

tfds = pytest.importorskip("tensorflow_datasets")
F = tfds.features
CLASSES = ("zeta", "1.5", "mu")  # in no order of names


def example(split, i):
    """Of validation the third class is not there, and of test the label is not known; train/5 is Latin-1."""
    label = -1 if split == "test" else i % 2 if split == "validation" else i % 3
    words = f" {split} 这家酒店 {i}\n"
    return {
        "text": words, "label": label, "sentence1": f"one {i}", "sentence2": f"two\t{i}", "rating": i / 10, "stars": i,
        "fine": i % 2 == 0, "raw": b"caf\xe9" if i == 5 else b"plain", "author": f"author {i % 4}", "split": "odd",
        "tags": ["a", "b"], "vector": [0.5, i],
    }  # fmt: skip


def prepare(folder, name, features, examples):
    """examples: {split: (key, example) pairs}."""

    def splits(self, manager):
        return {split: iter(rows) for split, rows in examples.items()}

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict(features))

    body = {"VERSION": tfds.core.Version("1.0.0"), "_info": info, "_split_generators": splits,
            "_generate_examples": None, "__module__": __name__}  # fmt: skip
    made = type(name, (tfds.core.GeneratorBasedBuilder,), body)
    made(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    features = {
        "text": F.Text(), "label": F.ClassLabel(names=CLASSES), "sentence1": F.Text(), "sentence2": F.Text(),
        "rating": np.float32, "stars": np.int64, "fine": np.bool_, "raw": F.Text(), "author": F.Text(),
        "split": F.Text(), "tags": F.Sequence(F.Text()), "vector": F.Tensor(shape=(2,), dtype=np.float32),
    }  # fmt: skip
    counts = {"train": 30, "validation": 8, "test": 4}
    rows = {split: [(i, example(split, i)) for i in range(count)] for split, count in counts.items()}
    prepare(folder, "HotelTexts", features, rows)
    image = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image, "PNG")
    both = {"image": F.Image(shape=(None, None, 3)), "caption": F.Text(), "label": F.ClassLabel(names=("a", "b"))}
    pictures = [(i, {"image": io.BytesIO(image.getvalue()), "caption": f"c{i}", "label": i % 2}) for i in range(4)]
    prepare(folder, "CaptionedImages", both, {"train": pictures})
    prepare(folder, "OnlyNumbers", {"x": np.int64}, {"train": [(0, {"x": 1})]})
    return str(folder)


def load(folder, split="train", name="hotel_texts", **how):
    return sources.load(f"tfds:{name}", split, data_dir=folder, **how)


def test_splits_and_slices_have_the_texts_and_the_classes_of_the_data_set(folder):
    for split, known, count in (("train", "train", 30), ("val", "validation", 8)):
        found = load(folder, split, text=("text",))
        assert len(found) == count and found.input == "text" and found.class_names == CLASSES
        assert found.ids == tuple(f"row/{split}/{i}" for i in range(count))
        place = [int(row[0].split()[-1]) for row in found.inputs.rows]  # tfds shuffles
        assert sorted(place) == list(range(count))
        for i, row, label in zip(place, found.inputs.rows, found.labels, strict=True):
            own = example(known, i)
            assert row == (own["text"].strip(),) and label == own["label"]
    first, second = (load(folder, f"train[{cut}]", text=("text",), split_seed=3) for cut in (":60%", "60%:"))
    assert {*first.ids, *second.ids} == set(load(folder, text=("text",)).ids) and len(first) + len(second) == 30
    assert not sources.overlap(first, second) and not sources.overlap(first, load(folder, "val", text=("text",)))
    assert np.bincount(first.labels).tolist() == [6, 6, 6] and "tensorflow" not in sys.modules


def test_pairs_are_the_default_and_other_columns_are_labels_and_groups(folder):
    found = load(folder, task="regression", labels=("rating", "stars"), group="author")
    number = np.array([int(a.split()[-1]) for a, _ in found.inputs.rows])
    assert found.inputs.rows == tuple((f"one {i}", f"two\t{i}") for i in number)
    np.testing.assert_allclose(found.labels, np.stack([number / 10, number], 1).astype(np.float32), rtol=1e-6)
    assert found.groups.tolist() == [f"author {i % 4}" for i in number]
    yes = load(folder, labels=("fine",), task="multilabel")
    assert yes.labels[:, 0].tolist() == (number % 2 == 0).astype(int).tolist()
    by_author = load(folder, labels=("author",))
    assert by_author.class_names == tuple(f"author {i}" for i in range(4))
    assert by_author.labels.tolist() == (number % 4).tolist()
    assert load(folder, "test", task="next_token", text=("text",)).labels.tolist() == [-1] * 4
    assert set(load(folder, group=r"(\d)$").groups) == set("0123456789")


def test_images_stay_the_default_where_there_are_both(folder):
    images = load(folder, name="captioned_images")
    assert images.input == "image" and images[0]["image"][:4] == b"\x89PNG"
    texts = load(folder, name="captioned_images", text=("caption",))
    assert sorted(texts.inputs.rows) == [(f"c{i}",) for i in range(4)] and texts.class_names == ("a", "b")
    assert [f"c{i}" for i in range(4) if i % 2] == sorted(
        row[0] for row, y in zip(texts.inputs.rows, texts.labels, strict=True) if y
    )


COLUMNS = "author, fine, label, rating, raw, sentence1, sentence2, stars, text"
WRONG = {
    rf"no columns 'txt' \(did you mean 'text'\?\) in tfds:hotel_texts; expected .* of {COLUMNS}": {
        "text": ("txt",)
    },
    r"1 texts are not UTF-8.*\n  train/\d+: raw has byte 0xe9 at 3$": {"text": ("text", "raw")},
    r"no label column 'lable' .*; expected .* of author, fine, label, rating": {"labels": ("lable",)},
    r"4 cells of label do not fit.*\n  row test/0: label is missing": {"split": "test"},
    r"row train/\d+: author is 'author \d', expected a number": {"labels": ("author",), "task": "regression"},
    r"no split 'dev'; it has": {"split": "dev"},
    r"data.labels=\('label',\) names columns, and tfds:captioned_images is read as images": {
        "name": "captioned_images", "labels": ("label",)
    },
    r"no classification of images: images \[\], class labels \[\], and it has no texts": {"name": "only_numbers"},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_read_is_one_message(message, folder):
    with pytest.raises(ValueError, match=message):
        load(folder, **WRONG[message])


@pytest.mark.slow
def test_a_run_reads_them_by_its_options(folder, tmp_path):
    config = "configs/transfer.py:model=word_average_8_4d,method=full,data=tfds:hotel_texts"
    options = [f"--config.data.data_dir={folder}", "--config.data.text=('text',)", "--config.model.tokenizer=words",
               "--config.data.train=train", "--config.data.val=val", "--config.total=(3, 'steps')"]  # fmt: skip
    assert command.main(["train", config, *options, "--workdir", str(tmp_path / "w")]) == 0
    run = tl_jax.load_run(tmp_path / "w")
    assert run.model.card.class_names == CLASSES and run.model.card.lowercase
    assert len(run.predict(["这家酒店 3"])) == 1
