"""Streams for several domains: strong views, weights, the order of a source, label spaces, and runs on such sources."""

import os

import numpy as np
import pytest
import scipy.io
from PIL import Image

from configs import smoke
from tl_jax import config as options
from tl_jax.core.card import Card
from tl_jax.data import sources
from tl_jax.data.pipeline import View, train_batches
from tl_jax.data.weights import with_weights
from tl_jax.runtime import sharding
from tl_jax.training import build, inputs, train
from tl_jax.training.settings import read

SAME = Card("m", 10, input_size=8, crop=1.0)
WEAK = (("translation", {"fraction": 0.2}), ("flip", {}))
STRONG = (*WEAK, ("rand_augment", {"magnitude": 10}), ("random_erasing", {"probability": 1.0}))
TARGET = {"source": "digits:inverted", "split": "train[:30%]", "batch_size": 12, "augment": WEAK}


def config_of(**changes):
    return options.override(smoke.get_config(), {key.replace("__", "."): value for key, value in changes.items()})


def streams_of(settings, card=SAME):
    return inputs.make_streams(inputs.load_sources(settings), settings, {"image": card}, {}, sharding.make_parallel())[
        0
    ]


# Strong views


def test_a_strong_view_is_of_the_same_examples_with_draws_of_its_own():
    plain = streams_of(read(config_of(streams={"target": TARGET})))
    strong = streams_of(read(config_of(streams={"target": TARGET | {"strong": STRONG}})))
    same = streams_of(read(config_of(streams={"target": TARGET | {"strong": WEAK}})))["target"]
    assert "image:strong" not in {**plain["target"][0], **plain["train"][0], **strong["train"][0]}
    for step in (0, 5, 40):
        batch, again, other = strong["target"][step], same[step], plain["target"][step]
        assert batch.keys() == {"image", "image:strong", "index"}
        for field in other:  # the weak view is what it was
            np.testing.assert_array_equal(batch[field], other[field])
        assert (batch["image:strong"] != batch["image"]).any(axis=(1, 2, 3)).all()
        assert (again["image:strong"] != again["image"]).any(axis=(1, 2, 3)).sum() > 6  # equal ops, other draws
    untouched = (("flip", {"probability": 0.0}),)
    settings = read(config_of(streams={"target": TARGET | {"strong": untouched}}))
    batch, source = streams_of(settings)["target"][7], inputs.load_sources(settings)["target"]
    np.testing.assert_array_equal(batch["image:strong"], source.inputs[batch["index"]])


def test_strong_views_are_the_same_from_workers_processes_and_after_a_resume():
    source, views = sources.load("digits"), {"image": View(SAME, WEAK), "image:strong": View(SAME, STRONG, "strong")}
    whole = train_batches(source, views, 12, 0, name="target", labelled=False)
    halves = [train_batches(source, views, 12, 0, name="target", process_index=p, process_count=2) for p in (0, 1)]
    for step, batch in enumerate(whole.iterate(90, 94, num_workers=1), start=90):  # across the end of an epoch
        for field in batch:
            np.testing.assert_array_equal(batch[field], whole[step][field])
            np.testing.assert_array_equal(batch[field], np.concatenate([half[step][field] for half in halves]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": {"target": TARGET | {"strong": (("flp", {}),)}}}, r"streams\.target.*no augmentation 'flp'"),
        ({"streams": {"target": TARGET | {"strong": "rand_augment"}}}, r"streams\.target: strong = 'rand_augment'"),
    ],
)
def test_a_strong_view_that_cannot_be_made_is_named(changes, message):
    with pytest.raises(ValueError, match=r"(?s)" + message):
        streams_of(read(config_of(**changes)))


# The order of the source


@pytest.mark.parametrize("processes", [1, 3])
def test_a_sequential_stream_is_the_source_in_order_epoch_after_epoch(processes):
    source = sources.load("digits", "train[:49]")
    how = {"order": "sequential", "name": "target", "labelled": False, "process_count": processes}
    parts = [train_batches(source, {"image": View(SAME)}, 12, 5, process_index=p, **how) for p in range(processes)]
    index = np.concatenate([part[step]["index"] for step in range(13) for part in parts])
    np.testing.assert_array_equal(index, np.arange(13 * 12) % 49)
    assert parts[0].steps_of(2) == -(-98 // 12)


def test_each_domain_of_a_sequential_stream_is_in_order_whatever_the_seed():
    source = sources.join_domains([sources.load("digits", "train[:31]"), sources.load("digits:faded", "train[:7]")])
    for seed in (0, 1):
        batches = train_batches(source, {"image": View(SAME, WEAK)}, 10, seed, order="sequential")
        index = np.stack([batches[step]["index"] for step in range(20)]).reshape(20, 2, 5)
        np.testing.assert_array_equal(index[:, 0].reshape(-1), np.arange(100) % 31)
        np.testing.assert_array_equal(index[:, 1].reshape(-1), 31 + np.arange(100) % 7)
    with pytest.raises(ValueError, match=r"streams\.a: sampling = 'sorted', expected one of .*, sequential"):
        read(config_of(streams={"a": TARGET | {"sampling": "sorted"}}))


# Weights


def write_weights(path, ids, weight):
    np.savez(path, ids=np.array(ids), weight=np.asarray(weight))
    return str(path)


def test_weights_come_with_the_batches_of_train_alone(tmp_path):
    source, rng = sources.load("digits", "train[:50%]", shots=4), np.random.default_rng(0)
    weight = dict(zip(source.ids, rng.gamma(2, 0.5, len(source)), strict=True)) | {"train/9999": 7.0}
    ids = rng.permutation(list(weight))
    path = write_weights(tmp_path / "w.npz", ids, [weight[i] for i in ids])
    settings = read(config_of(data__weights=path, streams={"target": TARGET}))
    plain = streams_of(read(config_of(streams={"target": TARGET})))
    streams = streams_of(settings)
    assert "weight" not in {**streams["target"][0], **plain["train"][0]}
    for step in (0, 9):
        batch, other = streams["train"][step], plain["train"][step]
        assert batch["weight"].dtype == np.float32 and batch.keys() - other.keys() == {"weight"}
        np.testing.assert_array_equal(batch["weight"], np.float32([weight[source.ids[i]] for i in batch["index"]]))
        np.testing.assert_array_equal(batch["index"], other["index"])
    weighted = inputs.load_sources(settings)["train"]
    assert weighted.fingerprint != source.fingerprint
    assert weighted.select(np.array([3])).weights.tolist() == [np.float32(weight[source.ids[3]])]


def test_weights_of_several_domains_are_told_by_the_ids_with_their_domain(tmp_path):
    source = sources.load(("digits", "digits:faded"), "train[:20]")
    path = write_weights(tmp_path / "w.npz", source.ids, np.arange(40) / 19.5)
    batch = train_batches(with_weights(source, path), {"image": View(SAME)}, 8, 0)[2]
    np.testing.assert_array_equal(batch["weight"], (batch["index"] / 19.5).astype(np.float32))


IDS = [f"train/{i}" for i in range(1029)]


@pytest.mark.parametrize(
    ("ids", "weight", "message"),
    [
        (IDS[:1000], np.ones(1000), r"(?s)data\.weights.*no weight of \d+ of 40 examples of digits.*\n  train/10"),
        (IDS, -np.ones(1029), r"1029 weights are no finite numbers of at least 0:\n  train/0: -1.0"),
        (IDS, np.full(1029, np.inf), "1029 weights are no finite numbers"),
        ([*IDS, "train/5"], np.ones(1030), r"1 ids occur more than once:\n  train/5"),
        (IDS, np.zeros(1029), "has the weight 0; expected about 1 on average"),
        (IDS, np.ones(5), r"expected ids, text \[N\], .*; found ids <U10 \[1029\], weight float64 \[5\]"),
        (np.arange(3), np.ones(3), r"found ids int64 \[3\]"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(tmp_path, ids, weight, message):
    path = write_weights(tmp_path / "w.npz", ids, weight)
    with pytest.raises(ValueError, match=message):
        inputs.load_sources(read(config_of(data__weights=path)))


def test_weights_need_a_file_a_mean_of_about_one_and_a_method_with_steps(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match=r"data\.weights = .*no file .*w\.npz"):
        inputs.load_sources(read(config_of(data__weights=str(tmp_path / "w.npz"))))
    with_weights(sources.load("digits"), write_weights(tmp_path / "v.npz", IDS, np.full(1029, 3)))
    assert "the mean weight of digits train is 3, not 1" in caplog.text
    with pytest.raises(ValueError, match=r"data\.weights = 'w\.npz': method\.name = 'logistic' takes no steps"):
        read(config_of(data__weights="w.npz", method__name="logistic", select="last"))


# Label spaces


def write_images(root, names, count=3, shift=0):
    """Images of noise, 8 x 8, in each of the named folders."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng([i, shift, *str(name).encode()])
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(root / name / f"{i}.png")
    return f"folder:{root}"


def domains(tmp_path, target, **fields):
    source = write_images(tmp_path / "photo", ("cat", "dog", "emu"), 5)
    stream = {"source": target, "split": "train", "batch_size": 8, **fields}
    given = {"data.source": source, "data.train": "train[:60%]", "data.val": "train[60%:]", "data.test": "",
             "data.shots": 0, "streams": {"target": stream}, "terms": {"dann": {"width": 8}},
             "batch_size": 8}  # fmt: skip
    return options.override(smoke.get_config(), given)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat", "dog"), r"streams\.target, folder:.*art train: missing emu$"),
        (("cat", "dog", "emu", "fox", "owl"), r"streams\.target, folder:.*: additional fox, owl$"),
        (("cat", "fox"), r"streams\.target, folder:.*: missing dog, emu; additional fox$"),
    ],
)
def test_partial_and_open_label_spaces_are_refused_with_the_classes_that_differ(tmp_path, classes, message):
    config = domains(tmp_path, write_images(tmp_path / "art", classes, shift=1))
    with pytest.raises(ValueError, match=message) as error:
        inputs.load_sources(read(config))
    assert "partial or open needs a method made for it, and there is none" in str(error.value)
    with pytest.raises(ValueError, match=r"(?s)different classes:.*photo.*'emu'.*art train: (missing|additional) "):
        sources.load((f"folder:{tmp_path}/photo", f"folder:{tmp_path}/art"))


def test_all_sources_whose_classes_differ_are_named_at_once(tmp_path):
    config = domains(tmp_path, write_images(tmp_path / "art", ("cat", "dog")))
    with config.unlocked():
        config.data.extra_eval = (("other", write_images(tmp_path / "clip", ("ant", "cat", "dog", "emu")), "train"),)
    with pytest.raises(
        ValueError, match=r"(?s)2 sources .*data\.extra_eval.*additional ant.*streams\.target.*missing emu"
    ):
        inputs.load_sources(read(config))


# Runs


@pytest.mark.slow
def test_a_target_may_be_a_folder_of_images_without_classes(tmp_path):
    flat = write_images(tmp_path, ("art",), 7, shift=1)
    config = domains(tmp_path, f"{flat}/art", strong=(("rand_augment", {}),))
    (tmp_path / "art" / ".hidden").write_bytes(b"x")
    found = inputs.load_sources(read(config))["target"]
    assert found.ids == tuple(f"{i}.png" for i in range(7)) and found.class_names == ("cat", "dog", "emu")
    assert len(sources.load(f"{flat}/art", "train[:3]", labelled=False)) == 3
    result = train.train(config, tmp_path / "run", verbose=False)
    assert result["step"] == 4 and 0 <= result["metrics"]["accuracy"]["value"] <= 1
    for wrong in ({"labelled": True}, {"shots": 1}):
        with pytest.raises(ValueError, match=r"streams\.target.*no class folders in .*art train, only 7 files"):
            inputs.load_sources(read(domains(tmp_path, f"{flat}/art", **wrong)))
    with pytest.raises(ValueError, match=r"data\.source.*no class folders.*expected folder:.*art/CLASS/IMAGE"):
        inputs.load_sources(read(options.override(domains(tmp_path, "digits"), {"data.source": f"{flat}/art"})))


@pytest.mark.slow
def test_networks_train_on_feature_matrices_with_domains_and_a_target(tmp_path):
    rng, names = np.random.default_rng(0), []
    for name in ("a", "b", "t"):
        y = np.arange(48) % 3
        x = rng.normal(size=(48, 5)) + 3 * np.eye(3, 5)[y] + rng.normal(size=5)
        scipy.io.savemat(tmp_path / f"{name}.mat", {"fts": x, "labels": y[:, None] + 1})
        names.append(f"mat:{tmp_path}/{name}.mat")
    np.savez(tmp_path / "t.npz", features=x, label=y, classes=np.array(["1", "2", "3"]))
    for target in (names[2], f"arrays:{tmp_path}/t.npz"):
        config = domains(tmp_path, target, batch_size=12)
        given = {"model.name": "mlp_small", "model.weights": "", "data.source": tuple(names[:2]), "batch_size": 12,
                 "method.name": "full", "total": (12.0, "steps"), "eval_every": (12.0, "steps"), "lr": 0.03,
                 "data.extra_eval": (("target_test", target, "train[:50%]"),), "data.transductive": True}  # fmt: skip
        run = build.build(options.override(config, given), sharding.make_parallel())
        batch = run.material.streams["train"][0]
        assert batch["table"].shape == (12, 5) and batch["domain"].tolist() == [0] * 6 + [1] * 6
        assert run.material.streams["target"][0].keys() == {"table", "index"}
    result = train.train(options.override(config, given), tmp_path / "run", verbose=False)
    assert result["metrics"]["accuracy"]["value"] > 0.8 and "target_test" in result["extra_eval"]


def test_no_run_trains_on_images_whose_corrupted_copies_it_scores(tmp_path):
    root = write_images(tmp_path / "photo", ("cat", "dog", "emu"), 5)
    shifted = f"corrupt:contrast:4:{root}"
    clean = options.override(domains(tmp_path, root), {"streams": {}, "terms": {}})

    def scoring(split, **changes):
        extra = {"data.extra_eval": (("shifted", shifted, split),)}
        return inputs.load_sources(read(options.override(clean, {**extra, **changes})))

    assert len(scoring("train[60%:]")["shifted"]) == 6
    with pytest.raises(ValueError, match=r"data\.extra_eval: 9 of 15 examples of shifted .* are also in train"):
        scoring("train")
    stream = {"streams": {"target": {"source": shifted, "split": "train", "batch_size": 6}}, "terms": {"dann": {}}}
    with pytest.raises(ValueError, match=r"streams\.target: 6 of 6 examples of val, which is scored"):
        scoring("train[60%:]", **stream)
    stream["streams"]["target"] |= {"split": "train[:60%]", "labelled": True}  # unlabelled ones are not stratified
    assert len(scoring("train[60%:]", **stream)["target"]) == 9


def test_the_domains_of_pacs_are_one_stream_in_equal_parts(shared):
    folders = sorted(path.name for path in (shared / "data/pacs_40").iterdir())
    names = tuple(f"folder:{shared}/data/pacs_40/{name}" for name in folders)
    source = sources.load(names, "train[:50%]")
    assert source.num_domains == 4 and np.bincount(source.domains).tolist() == [140] * 4
    assert len(source.class_names) == 7 and np.bincount(source.labels).tolist() == [80] * 7
    batch = train_batches(source, {"image": View(SAME.replace(input_size=32))}, 20, 0)[3]
    assert batch["domain"].tolist() == sorted([0, 1, 2, 3] * 5)
    for index, domain in zip(batch["index"], batch["domain"], strict=True):
        assert source.ids[index].startswith(names[domain] + os.sep)
