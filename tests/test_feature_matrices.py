"""Feature matrices as sources: MATLAB files and arrays, read as rows of a table, and as domains."""

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from tl_jax.core.card import Card
from tl_jax.data import sources
from tl_jax.data.pipeline import View, train_batches
from tl_jax.data.readers import pack

RNG = np.random.default_rng(0)
X = RNG.integers(0, 9, (11, 4)).astype(float)
Y = np.array([1, 2, 3, 1, 2, 3, 1, 2, 3, 3, 3])


def save(path, **variables):
    scipy.io.savemat(path, variables, do_compression=True)
    return f"mat:{path}"


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    ("features", "labels", "transform"),
    [("fts", "labels", np.uint8), ("feas", "label", np.float32), ("features", "Y", scipy.sparse.csc_matrix),
     ("X", "gnd", np.transpose), ("SURF", "targets", np.asarray)],
)  # fmt: skip
def test_a_matrix_and_its_labels_are_found_by_name_and_shape(tmp_path, features, labels, transform):
    """Beside them lie a text, a cell, a scalar and a matrix of another size."""
    others = {"note": "hello", "cells": np.array([["a", 1]], object), "k": 3.0, "other": np.zeros((5, 6))}
    source = sources.load(save(tmp_path / "a.mat", **{features: transform(X), labels: Y[:, None]}, **others))
    assert source.inputs.dtype == np.float32 and source.columns == ("x0", "x1", "x2", "x3")
    np.testing.assert_array_equal(source.inputs, X)
    assert source.class_names == ("1", "2", "3") and source.labels.tolist() == (Y - 1).tolist()
    assert source.labels.dtype == np.int32 and source.ids[10] == "train/10" and source.input == "table"


def test_labels_may_count_from_zero_lie_in_a_row_and_be_numbers(tmp_path):
    zero = sources.load(save(tmp_path / "a.mat", fts=X, labels=(Y - 1)[None]))
    assert zero.class_names == ("0", "1", "2") and zero.labels.tolist() == (Y - 1).tolist()
    targets = sources.load(save(tmp_path / "b.mat", fts=X, y=Y + 0.5), task="regression")
    assert targets.labels[:3].tolist() == [[1.5], [2.5], [3.5]]


def test_a_square_matrix_has_its_examples_in_rows(tmp_path):
    square = RNG.normal(size=(11, 11))
    found = sources.load(save(tmp_path / "a.mat", fts=square, labels=Y)).inputs
    np.testing.assert_array_equal(found, square.astype(np.float32))


@pytest.mark.thin(4)
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"fts": X, "note": "hello"}, r"no vector of labels; expected .*found fts double \[11 x 4\], note char \[1\]"),
        ({"fts": X.T[:, :7], "labels": Y}, r"no matrix of features of 11 examples; .*labels int64 \[1 x 11\]"),
        ({"X": X, "fts": X, "labels": Y}, r"2 variables that may be the matrix .*: X, fts"),
        ({"fts": X, "y": Y, "label": Y}, r"2 variables that may be the vector of labels: y, label"),
        ({"fts": X, "labels": Y + (Y == 3)}, r"labels has the classes 1, 2, 4; number them .* without gaps"),
        ({"fts": X, "labels": Y - 2}, r"labels has the classes -1, 0, 1"),
        ({"fts": np.where(X[2, 1] == X, np.nan, X), "labels": Y}, r"no finite float32 numbers.*\n.*row \d+, column"),
        ({"fts": X + 1j, "labels": Y}, r"features must be numbers \[N, D\]; found complex128 \(11, 4\)"),
    ],
)  # fmt: skip
def test_what_a_mat_file_lacks_is_said(tmp_path, variables, message):
    with pytest.raises(ValueError, match=message):
        sources.load(save(tmp_path / "a.mat", **variables))


def test_files_of_other_versions_and_damaged_ones_are_named(tmp_path):
    path = tmp_path / "a.mat"
    save(path, fts=X, labels=Y)
    whole = path.read_bytes()
    for head in (
        b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + b"\x89HDF\r\n\x1a\n",
        b"\x89HDF\r\n\x1a\n" * 80,
    ):
        path.write_bytes(head)
        with pytest.raises(ValueError, match=r"a\.mat is a MATLAB file of version 7\.3 .* save\(\.\.\., '-v7'\)"):
            sources.load(f"mat:{path}")
    path.write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ValueError, match="is no MATLAB file of version 5"):
        sources.load(f"mat:{path}")
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"cannot read .*a\.mat: .*it may be damaged"):
        sources.load(f"mat:{path}")
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.mat; \.mat files there: a\.mat"):
        sources.load(f"mat:{tmp_path}/b.mat")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"no split 'test'; it has train"):
        sources.load(f"mat:{path}", "test")


@pytest.mark.slow
def test_office_caltech_has_its_four_domains(shared):
    folder = shared / "data/office_caltech10_surf"
    names = tuple(f"mat:{folder}/{name}_SURF_L10.mat" for name in ("amazon", "caltech", "dslr", "webcam"))
    source = sources.load(names)
    assert np.bincount(source.domains).tolist() == [958, 1123, 157, 295] and source.inputs.shape == (2533, 800)
    assert source.class_names == tuple(str(i) for i in range(1, 11)) and source.domain_names == names
    amazon = scipy.io.loadmat(folder / "amazon_SURF_L10.mat")
    np.testing.assert_array_equal(source.inputs[:958], amazon["fts"])
    np.testing.assert_array_equal(source.labels[:958], amazon["labels"][:, 0].astype(int) - 1)


def test_arrays_of_features_are_tables_with_splits_groups_and_domains(tmp_path):
    rows = {split: RNG.normal(size=(n, 3)) for split, n in (("train", 8), ("test", 5))}
    arrays = {f"{split}_features": x.astype(np.float64) for split, x in rows.items()}
    arrays |= {f"{split}_label": np.arange(len(x)) % 2 for split, x in rows.items()}
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", **arrays, train_who=np.arange(8) // 2, classes=np.array(["no", "yes"]))
    a, b = (f"arrays:{tmp_path}/{name}.npz" for name in ("a", "b"))
    test = sources.load(a, "test")
    np.testing.assert_array_equal(test.inputs, rows["test"].astype(np.float32))
    assert test.class_names == ("no", "yes") and test.columns == ("x0", "x1", "x2") and test.ids[4] == "test/4"
    assert sources.load(a, "train[:50%]", group="who").groups.tolist() in ([x, x, y, y] for x in "0123" for y in "0123")
    card = Card("mlp", 2, input="table", columns=test.columns, mean=(0.0,) * 3, std=(1.0,) * 3)
    batch = train_batches(sources.load((a, b)), {"table": View(card)}, 6, 0)[3]
    assert batch["domain"].tolist() == [0, 0, 0, 1, 1, 1] and batch["table"].dtype == np.float32
    np.testing.assert_array_equal(batch["table"], np.tile(rows["train"], (2, 1)).astype(np.float32)[batch["index"]])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": X, "bytes": np.zeros(11, np.uint8), "offsets": np.arange(12)}, "expected label and one of image"),
        ({"features": X[:, 0]}, "features has 1 dimensions, expected"),
        ({"features": X[:5]}, r"expected integer labels \[5\].*found int64 \(11,\)"),
        ({"features": X + np.inf}, r"44 features are no finite float32 numbers"),
        ({"features": X.astype(str)}, r"features must be numbers \[N, D\]; found <U"),
        ({"features": X[:, :0]}, r"features must be numbers \[N, D\]; found float64 \(11, 0\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_arrays_of_features_is_said(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays, label=Y - 1)
    with pytest.raises(ValueError, match=message):
        sources.load(f"arrays:{tmp_path}/a.npz")


def test_feature_matrices_are_not_packed(tmp_path):
    np.savez(tmp_path / "a.npz", features=X, label=Y - 1)
    for name in (f"arrays:{tmp_path}/a.npz", save(tmp_path / "a.mat", fts=X, labels=Y)):
        with pytest.raises(ValueError, match="holds rows of a table; only images are packed"):
            pack.pack(name, str(tmp_path / "packed"))
