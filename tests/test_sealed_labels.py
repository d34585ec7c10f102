"""Sealed labels: nothing reads them before they are opened, what is sealed, and the ledger of every opening."""

import dataclasses
import pickle

import numpy as np
import pytest
from candidate_runs import SIZES, config_of, load, make_done, make_tables  # noqa: F401

from configs import smoke
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import files
from tl_jax.data import order, pipeline, sealed
from tl_jax.runtime import sharding
from tl_jax.studies import leak
from tl_jax.training import artifacts, build, inputs, settings
from tl_jax.training.train import train


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0], np.asarray, list, lambda x: x == 1, lambda x: x.shape, lambda x: x.dtype, np.unique, len,
        lambda x: 1 in x, lambda x: x.astype(int), lambda x: x.max(), np.bincount, lambda x: np.where(x, 1, 0),
    ],
)  # fmt: skip
def test_nothing_but_the_number_of_sealed_labels_can_be_read(read):
    labels = sealed.SealedLabels(np.arange(5))
    if read is len:
        assert read(labels) == 5
    else:
        with pytest.raises(sealed.Sealed, match="5 labels of an unlabelled domain are read before they are opened"):
            read(labels)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(labels)).open(), np.arange(5))


def test_predictions_without_labels_are_checked_and_not_saved(tmp_path):
    made = tasks.make_predictions({"logits": np.eye(3)}, None, range(3), tasks.Spec(class_names=tuple("abc")))
    assert made.labels is None and made.values.dtype == np.float32
    with pytest.raises(ValueError, match=r"p\.npz: the labels are sealed"):
        tasks.save_predictions(tmp_path / "p.npz", made)
    with pytest.raises(ValueError, match="2 different ids"):
        tasks.make_predictions({"logits": np.eye(3)}, None, [0, 1, 1], tasks.Spec(class_names=tuple("abc")))


def test_a_sealed_source_is_cut_and_fingerprinted_without_its_labels(tables):
    clean = load(tables, "train[:37%]")
    for poison in sealed.POISONS:
        other = load(tables, "train[:37%]", poison=poison)
        assert other.ids == clean.ids and other.fingerprint == clean.fingerprint
        assert (other.opened().labels != clean.opened().labels).any()
    stratified = load(tables, "train[:37%]", seal=False)
    assert stratified.ids != clean.ids and stratified.fingerprint != clean.fingerprint
    open_twin = dataclasses.replace(clean, labels=clean.labels.open())
    assert open_twin.fingerprint != clean.fingerprint
    whole = load(tables, "train", seal=False)
    of_id = dict(zip(whole.ids, whole.labels.tolist(), strict=True))
    assert clean.opened().labels.tolist() == [of_id[i] for i in clean.ids]


def test_slices_of_a_sealed_source_are_disjoint_and_together_the_whole(tables):
    parts = [load(tables, f"train[{a}:{b}]") for a, b in (("", "37%"), ("37%", "60%"), ("60%", ""))]
    ids = [i for part in parts for i in part.ids]
    assert len(ids) == len(set(ids)) == SIZES["target"]
    joined = load(tables, "train[:37%]+train[60%:]")
    assert joined.sealed and joined.label_kind == "classes" and len(joined) == len(parts[0]) + len(parts[2])


def test_a_sealed_source_has_no_shots_no_balanced_order_and_no_label_in_batches(tables):
    with pytest.raises(ValueError, match=r"3 shots of .*target\.csv train: its labels are sealed"):
        load(tables, "train", shots=3)
    source = load(tables, "train")
    with pytest.raises(sealed.Sealed):
        order.make_orders(source, "class_balanced", 0)
    with pytest.raises(sealed.Sealed):
        source[0]
    from tl_jax.core.card import Card

    card = Card("m", 4, columns=source.columns, mean=(0.0,) * 5, std=(1.0,) * 5, input="table")
    batches = pipeline.eval_batches(source, {"table": pipeline.View(card)}, 32)
    assert set(batches[0]) == {"table", "index", "mask"}


# What is sealed


def test_paths_that_lead_to_one_place_are_one_source(tables, monkeypatch):
    monkeypatch.chdir(tables)
    names = (
        f"table:{tables}/target.csv",
        "table:target.csv",
        "table:./target.csv",
        f"table:{tables}/../{tables.name}/target.csv",
    )
    assert len({sealed.canonical(name) for name in names}) == 1
    assert sealed.canonical("digits:inverted") == "digits:inverted"
    corrupted = {sealed.canonical(f"corrupt:blur:3:table:{path}") for path in ("target.csv", "./target.csv")}
    assert corrupted == {sealed.canonical("corrupt:blur:2:corrupt:contrast:1:table:target.csv")}


def test_a_source_that_is_labelled_too_is_not_sealed_and_the_result_says_so(tables):
    own = {"source": f"table:{tables}/source.csv", "split": "train[20%:70%]", "batch_size": 8}
    changes = {"streams": {"target": own}, "data.train": "train[:20%]", "data.candidates": (), "data.extra_eval": ()}
    config = config_of(tables, **changes, total=(2.0, "steps"))
    run = build.build(config, sharding.make_parallel("jit"))
    assert not run.material.data["target"].sealed and run.material.ledger.sealed == ()
    assert "label" not in run.material.streams["target"][0]
    assert not set(run.material.data["target"].ids) & set(run.material.data["train"].ids)  # one cut for both
    told = artifacts._openness(run)["leak_test"]
    assert told.startswith("target: another stream has labels of its source")


def test_what_is_made_of_a_sealed_source_by_corruption_is_sealed_and_so_is_what_it_was_made_of():
    config = smoke.get_config()
    with config.unlocked():
        config.data.source, config.data.test = "digits:inverted", ""
        config.data.train, config.data.val = "train[:80%]", "train[80%:]"
        config.streams.target = {"source": "corrupt:contrast:3:digits", "split": "train"}
        config.data.extra_eval = (("clean", "digits", "test"), ("other", "corrupt:brightness:5:digits", "test"))
        config.select = "last"

    def sealed_names(**changes):
        found = inputs.load_sources(settings.read(options.override(config, changes)))
        return {name for name, source in found.items() if source.sealed}

    assert sealed_names() == {"target", "clean", "other"}
    # A labelled stream of the clean images has these labels: what it names is cut as it is, and not sealed.
    own = {"data.source": "digits", "data.train": "train[:40%]", "data.val": "train[40%:50%]"}
    assert sealed_names(**own, **{"streams.target.split": "train[50%:]"}) == set()
    tested = {"streams.target.split": "test", "data.transductive": True}
    assert sealed_names(**own, **tested) == {"target", "clean", "other"}


@pytest.mark.slow
def test_without_a_labelled_source_everything_of_the_target_is_sealed(tables, tmp_path):
    changes = {
        "data.source": f"table:{tables}/target.csv",
        "data.labelled": False,
        "streams": {},
        "data.candidates": (),
    }
    changes |= {
        "data.train": "train[:50%]",
        "data.val": "train[50%:75%]",
        "data.extra_eval": (),
        "terms": {"entropy": {"target": "train"}},
    }
    config = config_of(tables, **changes, total=(2.0, "steps"))
    _, differences = leak.prove(config, tmp_path / "w", verbose=False)
    assert differences == []
    ledger = files.read_json(tmp_path / "w" / "ledger.json")
    assert ledger["sealed"] == ["train", "val"]
    assert [(row["stream"], row["phase"]) for row in ledger["openings"]] == [("val", "score")]
    assert not any(key.startswith("val/") for row in files.read_rows(tmp_path / "w" / "metrics.jsonl") for key in row)
    for wrong in ({"select": "best_val"}, {"patience": 2}):
        with pytest.raises(ValueError, match=r"data\.labelled = False leaves val without labels too"):
            train(options.override(config, wrong), tmp_path / "v", verbose=False)


# The ledger


def test_no_target_label_is_opened_before_every_selector_has_chosen(done, monkeypatch, tables, tmp_path):
    folder, _ = done
    ledger = files.read_json(folder / "ledger.json")
    assert ledger["sealed"] == ["target_test", "held_out", "target"] and ledger["unsealed"] == {}
    assert {row["stream"] for row in ledger["openings"] if row["phase"] == "load"} == {"train", "val"}
    target = [row for row in ledger["openings"] if row["stream"] in ledger["sealed"]]
    assert [(row["stream"], row["phase"], row["step"], row["start"]) for row in target] == [
        ("target_test", "score", 6, 0), ("held_out", "selection", 6, 0)
    ]  # fmt: skip
    assert all(len(row["sha256"]) == 64 and row["by"] and row["examples"] for row in ledger["openings"])
    hashes = files.read_json(folder / "MANIFEST.json")["sha256"]
    assert {"ledger.json", "choices.json"} <= set(hashes)

    events, real_open, real_write = [], sealed.SealedLabels.open, files.write_json
    monkeypatch.setattr(sealed.SealedLabels, "open", lambda self: (events.append("open"), real_open(self))[1])
    monkeypatch.setattr(files, "write_json", lambda path, value: (events.append(path.name), real_write(path, value))[1])
    train(config_of(tables), tmp_path / "w", verbose=False)
    assert "open" not in events[: events.index("choices.json")] and events.count("open") == 2
    first = events.index("open")  # written down before anything else happens
    assert events[first + 1] == "ledger.json"


@pytest.mark.slow
def test_a_resumed_run_appends_to_its_ledger_and_is_bit_equal(done, tables, tmp_path):
    folder, _ = done

    class Crash(Exception):
        pass

    for step in (1, 3, 4):

        def crash(done, step=step):
            if done == step:
                raise Crash
            return False

        with pytest.raises(Crash):
            train(config_of(tables), tmp_path / "w", verbose=False, stop_requested=crash)
    (tmp_path / "w" / "candidates" / "step_000006.npz").write_bytes(b"of a start that went further")
    train(config_of(tables), tmp_path / "w", verbose=False)
    names = ["choices.json", "metrics.jsonl", "result.json", "trained.safetensors"]
    names += [f"candidates/step_00000{step}.npz" for step in (2, 4, 6)]
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "w" / name).read_bytes(), name
    rows = files.read_json(tmp_path / "w" / "ledger.json")["openings"]
    assert [row["start"] for row in rows if row["stream"] == "val"] == [0, 1, 2, 3]
    assert [row["start"] for row in rows if row["stream"] == "target_test"] == [3]


def test_a_ledger_that_lacks_its_count_of_starts_is_named(tmp_path):
    (tmp_path / sealed.FILE).write_text('{"openings": []}')
    with pytest.raises(ValueError, match=r"ledger\.json.*no starts"):
        sealed.Ledger().begin(tmp_path)
