"""Files of comma-separated values, the labels of every task, built-in sources, and messages of what does not fit."""

import csv
import time

import numpy as np
import pytest
from PIL import Image

from tl_jax.core.card import Card
from tl_jax.data import sources
from tl_jax.data.image import decode
from tl_jax.data.image.augment import make_preprocess
from tl_jax.data.pipeline import View, eval_batches, train_batches
from tl_jax.data.readers import pack

HEADER = ["file", "split", "kind", "age", "wings", "stripes"]
ROWS = [
    ["one.png", "train", "bee", "1.5", "1", "1"],
    ["deep/two.png", "Training", "ant, red", "-2", "0", "0"],
    ["three.png", "valid", "wasp", "30", "1", "1"],
    ["four.png", "train", "bee", "4e1", "1", "0"],
]


def write(path, header, rows, **options):
    with path.open("w", newline="", encoding=options.get("encoding", "utf-8")) as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def insects(tmp_path):
    """Four images of colours 1 to 4, with columns for every task."""
    for i, row in enumerate(ROWS, 1):
        path = tmp_path / row[0]
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 5), (i, 0, 0)).save(path)
    write(tmp_path / "insects.csv", HEADER, ROWS, encoding="utf-8-sig")  # with the mark of a spreadsheet
    return f"csv:{tmp_path}/insects.csv"


@pytest.fixture
def numbers(tmp_path):
    header = ["Split", "name", "width", "height", "y", "z"]
    rows = [["test" if i % 3 == 2 else "train", f"n{i}", f"{i}", f"{i / 4}", f"{2 * i + 0.5}", f"{i % 2}"]
            for i in range(9)]  # fmt: skip
    write(tmp_path / "numbers.csv", header, rows)
    return f"table:{tmp_path}/numbers.csv"


# csv:


def test_a_csv_of_images_has_paths_beside_it_and_classes_of_all_its_splits(insects):
    train, val = (sources.load(insects, split, labels=("kind",)) for split in ("train", "val"))
    assert train.ids == ("one.png", "deep/two.png", "four.png") and val.ids == ("three.png",)
    assert train.class_names == val.class_names == ("ant, red", "bee", "wasp")
    assert train.labels.tolist() == [1, 0, 1] and val.labels.tolist() == [2] and train.labels.dtype == np.int32
    assert [decode.decode(train[i]["image"])[0, 0, 0] for i in range(3)] == [1, 2, 4]
    both = sources.load(insects, "train[:67%]+val", labels=("kind",))
    assert len(both) == 3 and both.ids[2] == "three.png"


def test_label_columns_make_the_labels_of_each_task(insects):
    binary = sources.load(insects, task="binary", labels=("wings",))
    assert binary.labels.tolist() == [1, 0, 1] and binary.class_names == ("0", "1")
    several = sources.load(insects, task="multilabel", labels=("wings", "stripes"))
    assert several.labels.tolist() == [[1, 1], [0, 0], [1, 0]] and several.labels.dtype == np.int32
    targets = sources.load(insects, task="regression", labels=("age", "wings"))
    assert targets.labels.tolist() == [[1.5, 1], [-2, 0], [40, 1]] and targets.labels.dtype == np.float32
    assert targets.class_names == ("age", "wings") and several.class_names == ("wings", "stripes")
    assert len({s.fingerprint for s in (binary, several, targets)}) == 3


def test_without_labels_all_other_columns_are_labels(tmp_path, insects):
    rows = [[row[0], *row[3:]] for row in ROWS]
    path = write(tmp_path / "plain.csv", ["Path", *HEADER[3:]], rows)
    source = sources.load(f"csv:{path}", task="regression")
    assert source.class_names == ("age", "wings", "stripes") and len(source) == 4  # no column split: all is train
    with pytest.raises(ValueError, match="takes one label column, found 3: age, wings, stripes"):
        sources.load(f"csv:{path}")


def test_number_classes_are_in_the_order_of_numbers(tmp_path):
    rows = [[value, "1"] for value in ("10", "-1", "2", "-3", "10")]
    source = sources.load(f"table:{write(tmp_path / 'x.csv', ['y', 'x'], rows)}")
    assert source.class_names == ("-3", "-1", "2", "10") and source.labels.tolist() == [3, 1, 2, 0, 3]


def test_blood_cells_are_counted_from_a_genuine_file(shared):
    source = sources.load(f"csv:{shared}/data/bccd_320/labels.csv", "test", task="regression")
    assert source.class_names == ("red_cells", "white_cells", "platelets") and source.labels.shape == (72, 3)
    with (shared / "data/bccd_320/labels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    np.testing.assert_array_equal(source.labels, [[float(row[name]) for name in source.class_names] for row in rows])
    batch = eval_batches(source, {"image": View(Card("m", 3, input_size=16))}, 50)[1]
    assert batch["label"].dtype == np.float32 and batch["label"].shape == (50, 3) and not batch["label"][22:].any()


# table:


def test_a_table_reads_number_columns_in_float32(numbers, caplog):
    source = sources.load(numbers, task="regression", labels=("z", "y"))
    assert source.columns == ("width", "height") and source.class_names == ("z", "y")
    assert source.inputs.dtype == np.float32 and source.inputs.tolist() == [[i, i / 4] for i in (0, 1, 3, 4, 6, 7)]
    assert source.labels[:, 1].tolist() == [0.5, 2.5, 6.5, 8.5, 12.5, 14.5]
    assert source.ids[:3] == ("row/2", "row/3", "row/5") and "columns of text are not read: name" in caplog.text
    one = sources.load(numbers, "test", task="regression")  # the column y
    assert one.columns == ("width", "height", "z") and one.class_names == ("y",)
    assert one[1]["table"].tolist() == [5, 1.25, 1]


def test_batches_of_a_table_are_its_raw_rows(numbers):
    source = sources.load(numbers, "train+test", task="regression", labels=("y",))
    card = Card("mlp", 1, input="table", columns=("width", "height", "z"), mean=(9.0,) * 3, std=(2.0,) * 3)
    batches = train_batches(source, {"table": View(card)}, 4, 0)
    for step, batch in enumerate(batches.iterate(0, 5, num_workers=2)):
        assert batch["table"].dtype == np.float32
        np.testing.assert_array_equal(batch["table"], source.inputs[batches[step]["index"]])
        np.testing.assert_array_equal(batch["label"], source.labels[batch["index"]])
    last = eval_batches(source, {"table": View(card)}, 4)[2]
    assert last["table"].shape == (4, 3) and last["mask"].tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match=r"(?s)columns of mlp are not those.*height -> width"):
        other = Card("mlp", 1, input="table", columns=("height", "width", "z"), mean=(0.0,) * 3, std=(1.0,) * 3)
        train_batches(source, {"table": View(other)}, 4, 0)
    with pytest.raises(ValueError, match="reads an input 'image', found 'table'"):
        train_batches(source, {"image": View(Card("m", 1))}, 4, 0)
    with pytest.raises(ValueError, match="rows of a table have no augmentations"):
        train_batches(source, {"table": View(card, (("flip", {}),))}, 4, 0)


def test_tables_are_domains_too(tmp_path, numbers):
    second = write(tmp_path / "more.csv", ["width", "height", "y"], [["1", "2", "3"], ["4", "5", "6"]])
    with pytest.raises(ValueError, match="different columns"):
        sources.load((numbers, f"table:{second}"), task="regression", labels=("y",))
    third = write(tmp_path / "third.csv", ["width", "height", "y"], [["7", "8", "9"]])
    source = sources.load((f"table:{second}", f"table:{third}"), task="regression")
    assert source.domains.tolist() == [0, 0, 1] and source.inputs.tolist() == [[1, 2], [4, 5], [7, 8]]


def test_slices_of_targets_are_plain_permutations_and_shots_are_refused(numbers):
    first, second = (sources.load(numbers, f"train[{cut}]", task="regression", labels=("y",), split_seed=4)
                     for cut in (":50%", "50%:"))  # fmt: skip
    assert len(first) == len(second) == 3 and not set(first.ids) & set(second.ids)
    with pytest.raises(ValueError, match="shots=2: shots are examples of a class, and the task 'regression' has none"):
        sources.load(numbers, task="regression", shots=2)


@pytest.mark.slow
def test_two_hundred_thousand_rows_are_read_in_seconds(tmp_path):
    values = np.random.default_rng(0).normal(size=(200_000, 8)).round(4)
    path = write(tmp_path / "big.csv", [*"abcdefg", "y"], values.tolist())
    began = time.process_time()
    source = sources.load(f"table:{path}", "train[:90%]", task="regression")
    assert time.process_time() - began < 20 and source.inputs.shape == (180_000, 7)


# Built-in sources


def test_other_forms_of_the_digits_are_made_of_the_digits():
    digits = sources.load("digits", "test")
    grey = digits.inputs[..., 0].astype(int)
    inverted = sources.load("digits:inverted", "test")
    np.testing.assert_array_equal(inverted.labels, digits.labels)
    difference = inverted.inputs[..., 1].astype(int) - (255 - grey)
    assert abs(difference).max() == 32 and abs(difference[(grey > 40) & (grey < 215)].mean()) < 1
    faded = sources.load("digits:faded", "test")
    np.testing.assert_array_equal(faded.labels, digits.labels)
    difference = faded.inputs[..., 1] - (80 + grey * 175 / 255)
    assert abs(difference).max() <= 49 and abs(difference[grey < 150].mean()) < 1
    parity = sources.load("digits:parity", "test", task="binary")
    assert parity.labels.tolist() == (digits.labels % 2).tolist() and parity.class_names == ("even", "odd")
    ink = sources.load("digits:ink", "test", task="regression")
    assert ink.labels[:, 0].tolist() == [sum(p > 127.5 for p in image.ravel()) for image in grey]
    assert ink.class_names == ("ink",) and ink.labels.dtype == np.float32
    for name, task in (("digits:inverted", "classification"), ("digits:pairs", "multilabel")):
        assert sources.load(name, task=task).fingerprint == sources.load(name, task=task).fingerprint


def test_pairs_hold_two_whole_digits_and_say_which():
    digits, pairs = sources.load("digits", "train"), sources.load("digits:pairs", "train", task="multilabel")
    by_pixels = {}
    for image, label in zip(digits.inputs, digits.labels, strict=True):
        by_pixels[image.tobytes()] = int(label)
    for image, occurs in zip(pairs.inputs[:200], pairs.labels, strict=False):
        halves = [np.ascontiguousarray(image[6:14, left : left + 8]).tobytes() for left in (2, 10)]
        assert np.flatnonzero(occurs).tolist() == sorted({by_pixels[half] for half in halves})
    assert pairs.labels.shape == (1029, 10) and set(pairs.labels.sum(axis=1)) == {1, 2}
    # The preprocessing of an ordinary card, crop 0.875, cuts off black pixels only.
    coloured = np.zeros((20, 20, 3), np.uint8)
    coloured[6:14, 2:18] = 255
    seen = make_preprocess(Card("m", 10, input_size=64, interpolation="nearest"))(coloured)
    assert not seen[:, 0].any() and not seen[:, -1].any() and seen[32].any()


def test_diabetes_is_scikit_learns_table_cut_once_for_all():
    from sklearn.datasets import load_diabetes

    reference = load_diabetes(scaled=False)
    train, test = (sources.load("table:diabetes", split, task="regression") for split in ("train", "test"))
    assert train.columns == tuple(reference.feature_names) and train.class_names == ("target",)
    kept = np.arange(442) % 4 != 3
    np.testing.assert_array_equal(train.inputs, reference.data[kept].astype(np.float32))
    np.testing.assert_array_equal(test.inputs, reference.data[~kept].astype(np.float32))
    np.testing.assert_array_equal(test.labels[:, 0], reference.target[~kept].astype(np.float32))
    assert len(train) == 332 and not sources.overlap(train, test)
    assert sources.load("table:diabetes", task="binary", labels=("sex",)).class_names == ("1", "2")


# Labels that do not fit


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("digits", "binary", r"'binary': it has 10 classes \(0, 1, .*\), expected one of two classes"),
        ("digits", "regression", "10 classes .* expected one or several numbers .* Use the task 'classification'"),
        ("digits", "multilabel", "expected 0 or 1 for each"),
        ("digits:pairs", "classification", "10 labels of 0 or 1 .* Use the task 'multilabel'"),
        ("digits:ink", "multilabel", r"1 targets \(ink\), expected 0 or 1 .* Use the task 'regression'"),
        ("digits", "regresion", "no task 'regresion' .did you mean 'regression'"),
    ],
)
def test_a_source_that_does_not_fit_the_task_is_refused(source, task, message):
    with pytest.raises(ValueError, match=message):
        sources.load(source, task=task)


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("binary", ("kind",), r"3 classes \(ant, red, bee, wasp\), expected one of two"),
        ("classification", ("age",), "column 'age' holds numbers with fractions, such as 1.5"),
        ("regression", ("kind",), r"(?s)3 cells of kind .*row 2: kind is 'bee', expected a number.*row 3.*row 5"),
        ("multilabel", ("age", "wings"), r"(?s)3 cells of age, wings .*row 2: age is '1.5', expected 0 or 1"),
        ("regression", ("ages",), r"no label column 'ages' \(did you mean 'age'\?\); expected"),
        ("regression", ("age", "age"), "label columns age, age; expected one or several different"),
    ],
)
def test_label_columns_that_do_not_fit_the_task_are_described(insects, task, labels, message):
    with pytest.raises(ValueError, match=message):
        sources.load(insects, task=task, labels=labels)


def test_missing_labels_and_inputs_are_named_by_their_rows(tmp_path):
    rows = [["1", "a", "5"], ["", "b", "6"], ["3", "", "NaN"], ["4", "a", "x"]]
    path = write(tmp_path / "x.csv", ["width", "kind", "y"], rows)
    with pytest.raises(ValueError, match=r"(?s)2 cells of y .*row 4: y is missing.*row 5: y is 'x', expected a number"):
        sources.load(f"table:{write(tmp_path / 'y.csv', ['w', 'y'], [['1', row[2]] for row in rows])}",
                     task="regression")  # fmt: skip
    with pytest.raises(ValueError, match=r"(?s)1 cells of kind .*row 4: kind is missing"):
        sources.load(f"table:{write(tmp_path / 'k.csv', ['w', 'kind'], [['1', row[1]] for row in rows])}",
                     labels=("kind",))  # fmt: skip
    with pytest.raises(ValueError, match=r"(?s)3 cells of the input columns .*row 3: width is missing\n.*row 4: y"):
        sources.load(f"table:{path}", labels=("kind",))
    write(tmp_path / "t.csv", ["w", "y", "split"], [["1", "2", "train"], ["2", "", "test"]])
    assert len(sources.load(f"table:{tmp_path}/t.csv", task="regression")) == 1  # a test split may lack its labels


def test_labels_belong_to_sources_with_columns():
    known = "csv:, table:, text:, several:, tfds:"
    with pytest.raises(ValueError, match=rf"data.labels=\('x',\) names columns of sources {known}; digits has"):
        sources.load("digits", labels=("x",))


# Files that cannot be read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "has 0 rows; expected a header and at least one row"),
        (b"file,y\n", "has 1 rows"),
        (b"file;y\na.png;1\n", "one column 'file;y'; expected commas, found ';'"),
        (b"file,y,y,\na.png,1,2,3\n", r"(?s)column 4 has no name\n  column 'y' occurs 2 times"),
        (
            b"file,y\na.png,1\nb,c.png,2\nd.png\n",
            r"(?s)2 rows do not have the 2 values .*row 3: 3 values\n  row 4: 1 val",
        ),
        (b"file,y\n\xff\xfe,1\n", "not UTF-8 text"),
        (b"photo,y\na.png,1\n", "no column of image files; found photo, y, expected one of file, image, .*table:"),
        (b"file,y\na.png,1\n\na.png,2\n,3\n", r"(?s)row 4: a.png was already in row 2\n  row 5: file is missing"),
        (
            b"file,split,y\na.png,holdout,1\n",
            "(?s)1 rows have no known split, expected one of.*:\n  row 2: 'holdout'",
        ),
        (b"file,split,y\na.png,test,1\n", r"no split 'train'; it has test. Take a slice"),
        (b"file\na.png\n", "has no label column; expected one or several different ones of none"),
        (
            b"file,y\nnowhere.png,1\n",
            "(?s)1 of 1 files .* are not images that can be read; .*:\n  nowhere.png: .*No such",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, message):
    (tmp_path / "x.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        sources.load(f"csv:{tmp_path}/x.csv")


def test_a_table_without_inputs_or_labels_is_described(tmp_path, insects):
    path = write(tmp_path / "t.csv", ["name", "y"], [["a", "1"], ["b", "2"]])
    with pytest.raises(ValueError, match="no column of numbers beside the labels y; found name, y"):
        sources.load(f"table:{path}")
    path = write(tmp_path / "u.csv", ["a", "b"], [["1", "1"]])
    with pytest.raises(ValueError, match=r"no label column; expected .* of a, b"):
        sources.load(f"table:{path}")
    with pytest.raises(ValueError, match="lists image files in 'file'; use csv:"):
        sources.load(insects.replace("csv:", "table:", 1), labels=("age",))
    with pytest.raises(FileNotFoundError, match=r"no file .*insect\.csv; \.csv files there: insects\.csv"):
        sources.load(insects.replace("insects.csv", "insect.csv"))


def test_a_column_of_numbers_with_some_text_is_not_left_out(tmp_path):
    path = write(tmp_path / "t.csv", ["a", "y"], [["1", "1"], ["2", "2"], ["three", "3"]])
    with pytest.raises(ValueError, match="row 4: a is 'three', expected a number"):
        sources.load(f"table:{path}", task="regression")


def test_skip_drops_the_missing_images_of_a_csv(insects, tmp_path):
    (tmp_path / "deep/two.png").unlink()
    source = sources.load(insects, task="regression", labels=("age",), on_error="skip")
    assert source.ids == ("one.png", "four.png") and source.labels.tolist() == [[1.5], [40]]
    assert len(source.skipped) == 1 and "deep/two.png" in source.skipped[0]


def test_only_images_with_classes_are_packed(tmp_path, numbers):
    for source, message in ((numbers, "rows of a table"), ("digits:pairs", "does not fit the task 'classification'")):
        with pytest.raises(ValueError, match=message):
            pack.pack(source, str(tmp_path / "p"), report=lambda text: None)
