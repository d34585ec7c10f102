"""Streams: pinned numbers of the old code, names, domains, balanced classes, views, and what stands in for views."""

import collections
import dataclasses
import hashlib
import pickle

import numpy as np
import pytest
from PIL import Image

from tl_jax.core.card import Card
from tl_jax.data import sources
from tl_jax.data.pipeline import View, eval_batches, train_batches

CARD = Card("m", 10, input_size=12, crop=0.75, interpolation="bilinear")
SAME = Card("m", 10, input_size=8, crop=1.0)
CUT = (("random_resized_crop", {"scale": (0.3, 1.0)}), ("flip", {}))
AUGMENT = (("random_resized_crop", {"scale": (0.3, 1.0)}), ("colour_jitter", {"brightness": 0.4}), ("flip", {}))
DOMAINS = ("digits", "digits:inverted")


@pytest.fixture(scope="module")
def digits():
    return sources.load("digits", "train[:101]")


@pytest.fixture(scope="module")
def both():
    """Two domains of 101 and of 30 examples."""
    one, other = sources.load(DOMAINS[0], "train[:101]"), sources.load(DOMAINS[1], "train[:30]")
    return sources.join_domains([one, other])


def sha256(batches, steps):
    digest = hashlib.sha256()
    for step in steps:
        batch = batches[step]
        digest.update(np.ascontiguousarray(batch["image"]))
        digest.update(batch["label"])
    return digest.hexdigest()


def column(batches, field, steps):
    return np.concatenate([batches[step][field] for step in range(steps)])


# Computed with the code of commit 8b1042f.


@pytest.mark.parametrize(
    ("augment", "hosts", "expected"),
    [
        (AUGMENT, {}, "3dbb523942a9aba11e87e599cbe0c3472958635441aa037aa7bf04e284429473"),
        ((), {}, "56c2f49f780e995b1744f13e065430738c99a0e4528be5a3ea28ff3de6e5e057"),
        (AUGMENT, {"process_index": 1, "process_count": 2},
         "0420bac2db4140f0713ca0bf89155a53d90b7675fb1bef41eb948ddb8ab693e5"),
    ],
)  # fmt: skip
def test_the_stream_train_has_the_numbers_of_before_there_were_streams(digits, augment, hosts, expected):
    batches = train_batches(digits, {"image": View(CARD, augment)}, 16, 3, **hosts)
    assert sha256(batches, (0, 6, 7, 40)) == expected


def test_evaluation_shots_and_fingerprints_are_those_of_before_there_were_streams(digits):
    batches = eval_batches(digits, {"image": View(CARD)}, 16)
    assert sha256(batches, range(7)) == "16a187eef40eae04358e97c82433db1ad17261769216c9f93f431bbc254d037b"
    ids = "\n".join(sources.load("digits", "train[20%:]", shots=3, seed=2, split_seed=1).ids)
    assert hashlib.sha256(ids.encode()).hexdigest().startswith("322bc4f6e2f98cb4f68cef706d0df4339b76214cccc6b37fc6ac2b")
    assert digits.fingerprint == "d8b71ba59ae85de9dea8a35e5e3e8b37cfec2d193bedbe5a977118cf3439c9e0"
    whole = sources.load("digits", "train").fingerprint
    assert whole == "1de09f491980bcb0434c80a567fdb2debf80b12059f098c9f791abb77807ff37"


# Names and fields


def test_streams_of_different_names_have_orders_and_draws_of_their_own(digits):
    views = {"image": View(CARD, AUGMENT)}
    streams = [train_batches(digits, views, 101, 3, name=name) for name in ("train", "target", "other")]
    orders = [stream[0]["index"].tolist() for stream in streams]
    assert len({tuple(order) for order in orders}) == 3 and all(sorted(o) == list(range(101)) for o in orders)
    images = [dict(zip(order, stream[0]["image"], strict=True)) for order, stream in zip(orders, streams, strict=True)]
    assert sum((images[0][i] != images[1][i]).any() for i in range(101)) > 95
    again = train_batches(digits, views, 101, 3, name="target")[5]
    np.testing.assert_array_equal(again["image"], streams[1][5]["image"])


def test_an_unlabelled_stream_has_no_label(digits):
    train = train_batches(digits, {"image": View(SAME)}, 8, 0, labelled=False)
    evaluated = eval_batches(digits, {"image": View(SAME)}, 8, labelled=False)
    assert set(train[0]) == {"image", "index"} and set(evaluated[0]) == {"image", "index", "mask"}
    with pytest.raises(KeyError):
        next(train.iterate(0, 1))["label"]


def test_the_index_says_which_example_a_row_is(digits):
    batch = train_batches(digits, {"image": View(SAME)}, 16, 0)[9]
    assert batch["index"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"], digits.inputs[batch["index"]])
    np.testing.assert_array_equal(batch["label"], digits.labels[batch["index"]])


@pytest.mark.parametrize("order", ["shuffled", "class_balanced"])
def test_each_permutation_is_drawn_once_in_an_epoch_whatever_the_number_of_seeds(digits, monkeypatch, order):
    drawn, real = collections.Counter(), np.random.default_rng

    def counted(seed=None):
        drawn[str(seed)] += 1
        return real(seed)

    monkeypatch.setattr(np.random, "default_rng", counted)
    streams = [train_batches(digits, {"image": View(SAME)}, 16, seed, order=order) for seed in range(8)]
    for step in range(13):  # two epochs and a bit, all seeds in turn, as replicas take them
        for stream in streams:
            stream[step]
    assert set(drawn.values()) == {1} and len(drawn) >= 24


# Balanced classes


def unbalanced(counts):
    source = sources.load("digits", "train")
    members = [np.flatnonzero(source.labels == c)[:n] for c, n in enumerate(counts)]
    part = source.select(np.concatenate(members))
    return dataclasses.replace(part, class_names=part.class_names[: len(counts)])


def test_every_round_of_a_balanced_stream_visits_each_class_once():
    source = unbalanced([50, 3, 17, 1])
    batches = train_batches(source, {"image": View(SAME)}, 6, 0, order="class_balanced")
    labels, index = column(batches, "label", 200), column(batches, "index", 200)
    rounds = labels.reshape(300, 4)
    assert (np.sort(rounds, axis=1) == np.arange(4)).all() and len({tuple(r) for r in rounds.tolist()}) == 24
    for c, n in enumerate([50, 3, 17, 1]):  # within a class, each example once in every epoch
        visits = index[labels == c][: 300 // n * n].reshape(-1, n)
        assert (np.sort(visits, axis=1) == np.flatnonzero(source.labels == c)).all()
        assert n < 3 or len({tuple(v) for v in visits.tolist()}) > 1


def test_a_balanced_stream_needs_examples_of_every_class():
    source = unbalanced([5, 0, 2, 0])
    with pytest.raises(ValueError, match="no examples of 1, 3"):
        train_batches(source, {"image": View(SAME)}, 8, 0, order="class_balanced")
    with pytest.raises(ValueError, match="needs the classes of examples, found an unlabelled stream"):
        train_batches(source, {"image": View(SAME)}, 8, 0, order="class_balanced", labelled=False)
    with pytest.raises(ValueError, match="needs the classes of examples, found targets"):
        ink = sources.load("digits:ink", task="regression")
        train_batches(ink, {"image": View(SAME)}, 8, 0, order="class_balanced")
    with pytest.raises(ValueError, match=r"no order 'class_balance' .did you mean 'class_balanced'"):
        train_batches(source, {"image": View(SAME)}, 8, 0, order="class_balance")


# Domains


def test_every_batch_holds_equal_parts_of_all_domains_in_their_order(both):
    batches = train_batches(both, {"image": View(SAME)}, 10, 0)
    assert (len(both), both.num_domains) == (131, 2)
    for step in range(30):
        batch = batches[step]
        assert batch["domain"].tolist() == [0] * 5 + [1] * 5 and batch["domain"].dtype == np.int32
        np.testing.assert_array_equal(both.domains[batch["index"]], batch["domain"])
        np.testing.assert_array_equal(both.labels[batch["index"]], batch["label"])
    index, domain = column(batches, "index", 60), column(batches, "domain", 60)
    for d, n in ((0, 101), (1, 30)):  # each over epochs of its own
        epochs = index[domain == d][: 300 // n * n].reshape(-1, n)
        assert (np.sort(epochs, axis=1) == np.flatnonzero(both.domains == d)).all()


def test_balanced_classes_compose_with_domains(both):
    batches = train_batches(both, {"image": View(SAME)}, 40, 0, order="class_balanced")
    for step in range(5):
        labels = batches[step]["label"].reshape(2, 20)
        assert all(np.bincount(part).tolist() == [2] * 10 for part in labels)


@pytest.mark.parametrize("order", ["shuffled", "class_balanced"])
def test_the_processes_share_every_domains_part_of_a_batch(both, order):
    options = {"views": {"image": View(CARD, AUGMENT)}, "batch_size": 16, "seed": 3, "order": order}
    whole = train_batches(both, **options)
    parts = [train_batches(both, **options, process_index=p, process_count=4) for p in range(4)]
    for step in (0, 7):
        slices = [part[step] for part in parts]
        for field in whole[step]:  # [process, domain, rows] -> domain by domain, as one process has them
            stacked = np.stack([s[field].reshape(2, 2, *s[field].shape[1:]) for s in slices], axis=1)
            np.testing.assert_array_equal(stacked.reshape(whole[step][field].shape), whole[step][field])


def test_a_domain_sees_the_same_whatever_the_batch_size(both):
    """So features that are computed with one batch size stand for training with another."""
    seen = []
    for size in (6, 20):
        batches = train_batches(both, {"image": View(CARD, AUGMENT)}, size, 0)
        rows = [column(batches, field, 120 // size) for field in ("domain", "index", "image")]
        seen.append([(field[rows[0] == d]) for field in rows for d in (0, 1)])
    for first, second in zip(*seen, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_batch_that_domains_and_processes_cannot_share_is_refused(both):
    with pytest.raises(ValueError, match=r"batch_size 9 for 2 domains in process 0 of 1: .* multiple of 2"):
        train_batches(both, {"image": View(SAME)}, 9, 0)
    with pytest.raises(ValueError, match=r"batch_size 6 for 2 domains in process 0 of 2: .* multiple of 4"):
        train_batches(both, {"image": View(SAME)}, 6, 0, process_count=2)


def test_evaluation_goes_through_all_domains_in_order(both):
    batches = list(eval_batches(both, {"image": View(SAME)}, 40))
    index, domain, mask = (np.concatenate([b[field] for b in batches]) for field in ("index", "domain", "mask"))
    np.testing.assert_array_equal(index[mask], np.arange(131))
    np.testing.assert_array_equal(domain[mask], both.domains)
    assert mask.sum() == 131 and not domain[~mask].any()


def test_a_source_of_several_domains_is_their_sources_side_by_side():
    source = sources.load(DOMAINS, "train[:20%]", shots=2, seed=1)
    singles = [sources.load(name, "train[:20%]", shots=2, seed=1) for name in DOMAINS]
    assert source.domain_names == DOMAINS and np.bincount(source.domains).tolist() == [20, 20]
    assert source.ids == tuple(f"{name}/{i}" for name, one in zip(DOMAINS, singles, strict=True) for i in one.ids)
    for i, (single, k) in enumerate((single, k) for single in singles for k in range(20)):
        np.testing.assert_array_equal(source[i]["image"], single[k]["image"])
    copy = pickle.loads(pickle.dumps(source))
    swapped = dataclasses.replace(source, domains=1 - source.domains)
    assert copy.fingerprint == source.fingerprint != swapped.fingerprint
    part = source.select(np.array([39, 0]))
    assert part.domains.tolist() == [1, 0] and part.ids == (source.ids[39], source.ids[0])


def test_sources_with_other_classes_are_no_domains_of_one():
    with pytest.raises(ValueError, match=r"(?s)different classes:.*digits.*\('0', .*digits:parity"):
        sources.load(("digits", "digits:parity"))
    with pytest.raises(ValueError, match="one source is given twice: digits, digits"):
        sources.load(("digits", "digits"))
    assert sources.load(("digits",)).domains is None


def test_overlap_is_of_the_same_examples_of_the_same_source():
    digits, inverted = (sources.load(name, "train[:50%]") for name in DOMAINS)
    joined, late = sources.load(DOMAINS, "train[:50%]"), sources.load("digits", "train[45%:]")
    shared = sources.overlap(digits, late)
    assert set(shared) == set(digits.ids) & set(late.ids) and len(shared) == 51
    assert sources.overlap(digits, inverted) == ()
    assert sources.overlap(joined, late) == tuple(f"digits/{i}" for i in shared)
    assert set(sources.overlap(late, joined)) == set(shared)
    assert sources.overlap(digits, sources.load("digits", "train[50%:]")) == ()


# Views


def test_views_with_equal_draws_see_the_same_crop_and_flip(tmp_path):
    """A smooth large picture: the same box at 8 and at 32 pixels is the same picture but for the resolution."""
    ramp = np.linspace(0, 255, 64)
    picture = np.stack([np.add.outer(ramp, ramp) / 2, *np.broadcast_arrays(ramp[:, None], ramp)], axis=-1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(picture.astype(np.uint8)).save(tmp_path / name / "x.png")
    large = SAME.replace(input_size=32)
    views = {"image": View(SAME, CUT), "image:large": View(large, CUT), "image:other": View(SAME, CUT, "strong")}
    batch = train_batches(sources.load(f"folder:{tmp_path}"), views, 32, 0)[0]
    shrunk = batch["image:large"].reshape(32, 8, 4, 8, 4, 3).mean(axis=(2, 4))
    assert np.abs(shrunk - batch["image"]).max() < 6
    assert np.median(np.abs(shrunk - batch["image:other"]).max(axis=(1, 2, 3))) > 20


def test_a_view_is_the_same_with_or_without_others(digits):
    alone = train_batches(digits, {"image": View(CARD, AUGMENT)}, 16, 0)[7]["image"]
    strong = View(CARD, (("rand_augment", {}),), "strong")
    views = {"image:strong": strong, "plain": View(SAME), "image": View(CARD, AUGMENT)}
    batch = train_batches(digits, views, 16, 0)[7]
    np.testing.assert_array_equal(batch["image"], alone)
    np.testing.assert_array_equal(batch["plain"], digits.inputs[batch["index"]])


@pytest.mark.parametrize("workers", [0, 1])
def test_several_views_come_through_shared_memory_as_they_are(both, workers):
    views = {"image": View(CARD, AUGMENT), "image:strong": View(SAME, AUGMENT, "s"), "image:frozen": View(SAME)}
    features = np.random.default_rng(0).normal(size=(3, 131, 5)).astype(np.float32)
    batches = train_batches(both, views, 10, 0)
    batches = dataclasses.replace(batches, prepared={**batches.prepared, "image:frozen": features})
    for step, batch in enumerate(batches.iterate(3, 9, workers), start=3):
        assert batch.keys() == batches[step].keys()
        for field in batch:
            np.testing.assert_array_equal(batch[field], batches[step][field])


def test_what_is_prepared_follows_the_epochs_of_each_example(both):
    """Row e % V in an example's epoch e, in every order: a balanced stream sees small classes more often."""
    rows = np.arange(3 * 131, dtype=np.float32).reshape(3, 131)
    for order in ("shuffled", "class_balanced"):
        batches = train_batches(both, {"image": View(CARD, AUGMENT)}, 20, 0, order=order)
        batches = dataclasses.replace(batches, prepared={"image": rows})
        steps, seen = batches.steps_of(3), collections.defaultdict(list)
        for step in range(steps):
            for index, value in zip(batches[step]["index"], batches[step]["image"], strict=True):
                seen[int(index)].append(int(value))
        for index in range(131):
            cycle = [view * 131 + index for view in range(3)] * (len(seen[index]) // 3 + 1)
            assert len(seen[index]) >= 3 and seen[index] == cycle[: len(seen[index])]


def test_views_that_do_not_fit_the_source_are_all_named(digits):
    table = Card("mlp", 1, input="table", columns=("a",), mean=(0.0,), std=(1.0,))
    with pytest.raises(ValueError, match=r"(?s)'index' is the name of another field.*table: the network mlp reads"):
        train_batches(digits, {"index": View(SAME), "table": View(table)}, 8, 0)
    with pytest.raises(ValueError, match="there is none"):
        eval_batches(digits, {}, 8)
