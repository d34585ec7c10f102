"""What holds for every input: hypothesis looks for one that it does not hold for.

The default suite tries a few inputs of each, `pytest -m battery` thousands.
"""

import contextlib
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import transfer
from tl_jax import config, models
from tl_jax.core import trees
from tl_jax.data import order, resample, sources
from tl_jax.data.readers import pack
from tl_jax.data.text import tokens
from tl_jax.models import conversion
from tl_jax.training import optim
from tl_jax.weights import load, nearest

pytestmark = pytest.mark.battery
BOUNDS = st.one_of(st.integers(0, 70).map(str), st.floats(0, 100).map(lambda x: f"{x:.1f}%"))
LABELS = st.lists(st.integers(0, 2), min_size=1, max_size=60)
WORDS = st.text(max_size=30)
PATHS = st.lists(st.text("ab/", min_size=1, max_size=4), min_size=1, max_size=6, unique=True)
RULES = st.lists(st.tuples(st.text("ab/.*", max_size=4), st.sampled_from(("new", "frozen"))), max_size=4)
OPTIONS = sorted(config.flatten(config.make()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def examples(folder, labels, split):
    """The indices of the examples of a split; None where it is refused."""
    path = folder / "made.npz"
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
    np.savez(path, train_image=images, train_label=np.array(labels, np.int32), classes=np.array(["a", "b", "c"]))
    with contextlib.suppress(ValueError):
        return [int(name.rpartition("/")[2]) for name in sources.load(f"arrays:{path}", split).ids]


@given(LABELS, BOUNDS)
def test_what_lies_before_a_bound_and_behind_it_is_everything_once(folder, labels, bound):
    found = [examples(folder, labels, split) for split in (f"train[:{bound}]", f"train[{bound}:]")]
    everything = [*range(len(labels))]
    if None not in found:
        assert sorted(found[0] + found[1]) == everything and found[0] and found[1]
        assert examples(folder, labels, f"train[:{bound}]+train[{bound}:]") in (found[0] + found[1], everything)
    else:  # one would be empty, or the bound lies beyond the end
        whole = [x for x in found if x is not None]
        assert whole in ([everything], []) and (whole or int(bound) > len(labels))


@given(st.one_of(WORDS, st.text("train[]:%+.0123456789 ", max_size=20)))
def test_any_text_is_a_split_or_refused(text):
    with contextlib.suppress(ValueError):
        found = sources.parse_split(text)
        assert "+".join(f"{x.split}[{x.start}:{x.stop}]" for x in found) and len(found) == text.count("+") + 1


@given(PATHS, RULES)
def test_every_path_has_the_first_rule_that_matches_it_and_every_rule_a_path(paths, rules):
    def matches(pattern, path):
        with contextlib.suppress(re.error):
            return re.fullmatch(pattern, path) is not None

    first = {path: next((rule for rule in rules if matches(rule[0], path)), None) for path in paths}
    used = all(rule in first.values() for rule in rules)
    try:
        found = trees.match_rules(paths, rules)
    except ValueError:
        assert None in first.values() or not used or any(matches(pattern, "") is None for pattern, _ in rules)
    else:
        assert {path: tuple(match) for path, match in found.items()} == first and used


@given(st.sampled_from(sorted(optim.SCHEDULES)), st.floats(1e-8, 10), st.integers(1, 10**6), st.data())
def test_a_rate_rises_to_its_peak_and_is_never_above_it_or_negative(name, peak, total, data):
    warmup = data.draw(st.integers(0, total - 1))
    schedule = optim.make_schedule(name, peak, total_steps=total, warmup_steps=warmup)
    steps = sorted({0, warmup // 2, max(warmup - 1, 0), warmup, (warmup + total) // 2, total - 1})
    rates = np.array([schedule(step) for step in steps], np.float64)
    assert np.isfinite(rates).all() and (rates >= 0).all() and (rates <= peak * (1 + 1e-6)).all()
    rising = [rate for step, rate in zip(steps, rates, strict=True) if step <= warmup]
    assert rising == sorted(rising) and rising[-1] == pytest.approx(peak, rel=1e-6)


@given(st.lists(st.tuples(st.sampled_from(OPTIONS), WORDS), max_size=3))
@example([("lr", "nan")])
@example([("total", "(1e999, 'steps')")])
def test_any_text_is_an_option_that_can_be_written_and_read_again_or_refused(pairs):
    base = transfer.get_config("")
    with contextlib.suppress(ValueError):
        made = config.parse(base, [f"{key}={text}" for key, text in pairs])
        config.check(made)
        flat = config.flatten(made)
        assert config.flatten(config.override(config.make(), flat)) == flat


@given(st.integers(1, 200), st.integers(0, 2**31), st.integers(0, 10**9))
def test_every_epoch_of_a_shuffle_has_every_number_once_wherever_it_is_looked_at(n, seed, epoch):
    counters = np.arange(epoch * n, (epoch + 1) * n)
    numbers, epochs = order.Shuffle(n, seed)(counters)
    assert sorted(numbers.tolist()) == [*range(n)] and set(epochs.tolist()) == {epoch}
    assert order.Shuffle(n, seed)(counters[-1:])[0] == numbers[-1]


@given(LABELS.map(np.array), st.sampled_from(("kfold:2", "kfold:3", "kfold:3x2", "bootstrap:2")), st.integers(0, 99))
def test_folds_hold_out_each_example_once_and_train_on_none_of_them(labels, design, seed):
    held = []
    for fold, repeat in resample.folds(design):
        try:
            train, test = resample.split(labels, fold, seed + repeat)
        except ValueError:
            return
        assert not set(train) & set(test) and len(test) and set(labels[train]) == set(labels)
        held += test.tolist()
    if design.startswith("kfold"):
        times = len(resample.folds(design)) // int(design[6])
        assert sorted(held) == sorted([*range(len(labels))] * times)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=3).map(tuple), max_size=8))
def test_texts_come_back_from_the_arrays_they_are_kept_in(rows):
    found = tokens.part_texts(*tokens.join_texts(rows).values())
    assert list(found.rows) == rows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 99))
def test_batches_by_length_have_each_example_once_an_epoch(sizes, batch, seed):
    sizes = np.array(sizes)
    shuffle = order.Shuffle(len(sizes), seed, arrange=order.by_length(sizes, batch))
    for epoch in range(3):
        numbers, _ = shuffle(np.arange(epoch * len(sizes), (epoch + 1) * len(sizes)))
        assert sorted(numbers.tolist()) == [*range(len(sizes))]


FEWER = settings().max_examples // 10  # of what takes longer
NAMES = st.one_of(
    st.sampled_from(sorted(name for name in models.list_models() if name in nearest.known_shapes())),
    st.builds("vit_l{}_h{}_a2_p4_16".format, st.integers(1, 14), st.sampled_from((32, 64, 128))),
    st.builds("bert_l{}_h{}_a2".format, st.integers(1, 14), st.sampled_from((32, 64, 128))),
)


@settings(max_examples=FEWER)
@given(NAMES, st.data())
def test_every_leaf_has_keys_of_its_own_in_a_layout_and_comes_back_bit_by_bit(name, data):
    layout = models.get(name).layouts[data.draw(st.sampled_from(sorted(models.get(name).layouts)))]
    shapes, owners, rng = load.default_shapes(name), {}, np.random.default_rng(0)
    for path, shape in shapes.items():
        try:
            keys, transform = conversion.sources_of(layout, path)
        except KeyError:
            continue  # a leaf of another flavour of the network
        for key in keys:
            assert owners.setdefault(key, path) == path
        if keys and np.prod(shape) < 10_000:
            array = rng.random(shape).astype(np.float32)
            parts = transform.export(array)
            assert len(parts) == len(keys)
            assert [part.shape for part in parts] == conversion.source_shapes(transform, shape)
            read = [x for key, x in zip(keys, parts, strict=True) if not re.fullmatch(layout.ignore, key)]
            np.testing.assert_array_equal(transform.load(*(read or parts)).reshape(shape), array)
    assert owners


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=FEWER)
@given(st.lists(SIZES, min_size=1, max_size=6), st.sampled_from(("PNG", "BMP", "TIFF")), st.integers(0, 2**31))
def test_a_pack_has_the_pixels_and_labels_of_what_was_packed(tmp_path_factory, sizes, kind, seed):
    folder, rng = tmp_path_factory.mktemp("pack"), np.random.default_rng(seed)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    for i, image in enumerate(images):
        path = folder / "photos" / "train" / "ab"[i % 2] / f"{i}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    whole = sources.load(f"folder:{folder / 'photos'}", "train")
    pack.pack(f"folder:{folder / 'photos'}", str(folder / "packed"), ("train",), num_workers=0, report=lambda _: None)
    found = sources.load(f"packed:{folder / 'packed'}", "train")
    assert found.ids == whole.ids and found.labels.tolist() == whole.labels.tolist()
    for name, pixels in zip(found.ids, (found.inputs[i] for i in range(len(found))), strict=True):
        number = int(re.search(r"(\d+)\.\w+$", name)[1])
        np.testing.assert_array_equal(pixels, images[number])


@given(st.lists(st.integers(0, 40), min_size=2, max_size=30), st.integers(1, 2), st.data())
def test_a_batch_has_the_tokens_of_its_examples_and_padding_behind_them(counts, texts, data):
    counts = counts[: len(counts) // texts * texts]
    rows = [np.stack([np.arange(n), np.full(n, i)], axis=1).astype(np.int32) for i, n in enumerate(counts)]
    made = tokens.ragged(rows, 40, texts=texts)
    chosen = np.array(data.draw(st.lists(st.integers(-1, len(counts) // texts - 1), min_size=1, max_size=8)))
    length = made.length_of(chosen)
    batch = made.batch(chosen, length).reshape(len(chosen), texts, length, 2)
    for row, i in zip(batch, chosen.tolist(), strict=True):
        for k in range(texts):
            own = rows[i * texts + k] if i >= 0 else np.zeros((0, 2), np.int32)
            np.testing.assert_array_equal(row[k, : len(own)], own)
            assert (row[k, len(own) :, 0] == (tokens.PADDING if i >= 0 else 0)).all()
