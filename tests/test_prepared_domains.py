"""What the studies of digits and of ColoredMNIST are made from: disjoint splits, and the colours of the paper."""

import importlib.util
import io
import itertools
import pathlib

import numpy as np
import pytest
from PIL import Image

from tl_jax.data import sources

ROOT = pathlib.Path(__file__).resolve().parents[1]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """200 pictures, of which the first 160 lie on other grounds too; the first pixel is the number of the picture."""
    folder, rng = tmp_path_factory.mktemp("digits"), np.random.default_rng(0)
    image, label = rng.integers(0, 255, (200, 28, 28), np.uint8), rng.integers(0, 10, 200).astype(np.int32)
    image[:, 0, 0] = np.arange(200)
    files = []
    for picture in image[:160]:
        stream = io.BytesIO()
        colours = np.repeat(np.pad(picture, 2)[..., None], 3, axis=2)
        colours[:6, :6] = picture[0, 0]  # survives the resizing
        Image.fromarray(colours).save(stream, "PNG")
        files.append(stream.getvalue())
    np.savez(folder / "mnist_10k.npz", image=image, label=label)
    np.savez(folder / "usps.npz", image=rng.integers(0, 255, (90, 16, 16), np.uint8), label=rng.integers(0, 10, 90))
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(folder / "mnist_m_9k.npz", bytes=np.frombuffer(b"".join(files), np.uint8), offsets=offsets,
             labels=label[:160].astype(np.uint8))  # fmt: skip
    return folder


def test_the_domains_of_digits_have_disjoint_splits_and_blended_digits_those_of_the_plain(arrays, tmp_path):
    script("digits_domains").main(arrays, tmp_path)
    label, numbers = np.load(arrays / "mnist_10k.npz")["label"], {}
    for split in ("train", "val", "test"):
        plain, blended, usps = (sources.load(f"arrays:{tmp_path}/{x}.npz", split) for x in ("mnist", "mnist_m", "usps"))
        assert {x.inputs.shape[1:] for x in (plain, blended, usps)} == {(28, 28, 3)} and len(plain.class_names) == 10
        numbers[split], other = (x.inputs[:, 0, 0, 0].tolist() for x in (plain, blended))
        assert plain.labels.tolist() == label[numbers[split]].tolist() and set(other) <= set(numbers[split])
        assert blended.labels.tolist() == label[other].tolist()
    assert [len(x) for x in numbers.values()] == [140, 20, 40]
    assert sorted(itertools.chain(*numbers.values())) == list(range(200))


def test_blended_digits_of_another_order_are_refused(arrays, tmp_path):
    for name in ("mnist_10k", "usps", "mnist_m_9k"):
        found = dict(np.load(arrays / f"{name}.npz"))
        np.savez(
            tmp_path / f"{name}.npz", **found | ({"labels": found["labels"][::-1]} if name == "mnist_m_9k" else {})
        )
    with pytest.raises(ValueError, match="the labels of mnist_m_9k are not the first 160 of mnist_10k"):
        script("digits_domains").main(tmp_path, tmp_path / "out")


def check_coloured(folder, count, tolerance):
    shares = {"e10": (0.1, ("train", "val")), "e20": (0.2, ("train", "val")), "e90": (0.9, ("val", "test"))}
    total = 0
    for name, (share, splits) in shares.items():
        both = [sources.load(f"arrays:{folder}/{name}.npz", split, task="binary") for split in splits]
        images, labels = (np.concatenate([getattr(x, what) for x in both]) for what in ("inputs", "labels"))
        assert images.shape[1:] == (14, 14, 3) and not images[..., 2].any()
        red, green = (images[..., c].any(axis=(1, 2)) for c in (0, 1))
        assert (red ^ green).all() and both[0].class_names == ("5 to 9", "0 to 4")
        assert abs((green != labels).mean() - share) < tolerance
        assert len(both[0]) == round(len(images) * (0.2 if name == "e90" else 0.8))
        total += len(images)
        with pytest.raises(ValueError, match="it has " + ", ".join(splits)):
            sources.load(f"arrays:{folder}/{name}.npz", {"train": "test", "val": "train"}[splits[0]], task="binary")
    assert total == count


def test_colours_follow_the_labels_but_for_the_share_of_the_environment(arrays, tmp_path):
    script("colored_mnist").main(arrays, tmp_path)
    check_coloured(tmp_path, 200, 0.15)


def test_a_quarter_of_the_labels_contradicts_the_digit():
    images, digits = np.full((4000, 28, 28), 9, np.uint8), np.arange(4000) % 10
    coloured, labels = script("colored_mnist").colour(images, digits, 0.1, np.random.default_rng(0))
    assert abs((labels == (digits < 5)).mean() - 0.75) < 0.03
    green = coloured[..., 1].any(axis=(1, 2))
    assert abs((green != labels).mean() - 0.1) < 0.02
    wrong, other = labels != (digits < 5), green != labels
    assert abs((wrong & other).mean() - 0.025) < 0.012  # independent


@pytest.mark.slow
def test_the_genuine_digits_make_both(shared, tmp_path):
    digits = shared / "data/digits"
    script("colored_mnist").main(digits, tmp_path)
    check_coloured(tmp_path, 10_000, 0.02)
    script("digits_domains").main(digits, tmp_path)
    sizes = {"mnist": [7000, 1000, 2000], "usps": [6509, 929, 1860]}
    for name, expected in sizes.items():
        found = [sources.load(f"arrays:{tmp_path}/{name}.npz", split) for split in ("train", "val", "test")]
        assert [len(x) for x in found] == expected
        shares = np.stack([np.bincount(x.labels, minlength=10) / len(x) for x in found])
        assert np.ptp(shares, axis=0).max() < 0.01
