"""Honest selection: sealed labels, their ledger, candidates, choices before labels are opened, and the leak test."""

import dataclasses
import json
import pathlib
import pickle

import numpy as np
import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import files
from tl_jax.core.options import SELECTORS as SINGLE
from tl_jax.data import order, pipeline, sealed, sources
from tl_jax.methods.selectors import SELECTORS
from tl_jax.runtime import sharding
from tl_jax.studies import command, inprocess, leak
from tl_jax.studies.report import alarm
from tl_jax.training import artifacts, build, candidates, inputs, loop, selection, settings
from tl_jax.training.train import train

CLASSES, SIZES = 4, {"source": 210, "other": 90, "target": 170}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Three domains of four classes, rows of five numbers; the target is shifted."""
    folder, rng = tmp_path_factory.mktemp("domains"), np.random.default_rng(3)
    centres = rng.normal(0, 1.2, (CLASSES, 5))
    for name, rows in SIZES.items():
        label = rng.integers(0, CLASSES, rows)
        x = centres[label] + rng.normal(0, 1, (rows, 5)) + {"source": 0, "other": -0.5, "target": 0.8}[name]
        cells = [",".join(f"{v:.5f}" for v in row) + f",{'abcd'[k]}" for row, k in zip(x, label, strict=True)]
        (folder / f"{name}.csv").write_text("x0,x1,x2,x3,x4,label\n" + "\n".join(cells) + "\n")
    return folder


def config_of(tables, **changes):
    target = f"table:{tables}/target.csv"
    base = options.override(options.make(), {
        "model.name": "mlp_small", "model.head_init": "lecun", "data.source": f"table:{tables}/source.csv",
        "data.labels": ("label",), "data.train": "train[:70%]", "data.val": "train[70%:]",
        "streams": {"target": {"source": target, "split": "train[:50%]", "batch_size": 8}},
        "data.candidates": ("held_out", target, "train[50%:75%]"),
        "data.extra_eval": (("target_test", target, "train[75%:]"),), "terms": {"dann": {"width": 8, "strength": 0.5}},
        "method.name": "full", "optimizer": "sgd", "lr": 0.1, "batch_size": 12, "total": (6.0, "steps"),
        "log_every": (3.0, "steps"), "eval_every": (2.0, "steps"), "resamples": 50,
    })  # fmt: skip
    return options.override(base, changes)


@pytest.fixture(scope="module")
def done(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "w"
    return folder, train(config_of(tables), folder, verbose=False)


# Sealed labels


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


def load(tables, split, seal=True, **more):
    name = f"table:{tables}/target.csv"
    return sources.load(name, split, labels=("label",), sealed=[sealed.canonical(name)] if seal else [], **more)


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
    with pytest.raises(ValueError, match="ledger.json.*no starts"):
        sealed.Ledger().begin(tmp_path)



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
        config.data.source, config.data.train, config.data.val, config.data.test = "digits:inverted", "train[:80%]", "train[80%:]", ""
        config.streams.target = {"source": "corrupt:contrast:3:digits", "split": "train"}
        config.data.extra_eval = (("clean", "digits", "test"), ("other", "corrupt:brightness:5:digits", "test"))
        config.select = "last"

    def sealed_names(**changes):
        found = inputs.load_sources(settings.read(options.override(config, changes)))
        return {name for name, source in found.items() if source.sealed}

    assert sealed_names() == {"target", "clean", "other"}
    # A labelled stream of the clean images has these labels: what it names is cut as it is, and not sealed.
    own = {"data.source": "digits", "data.train": "train[:40%]", "data.val": "train[40%:50%]", "streams.target.split": "train[50%:]"}
    assert sealed_names(**own) == set()
    assert sealed_names(**own | {"streams.target.split": "test", "data.transductive": True}) == {"target", "clean", "other"}



@pytest.mark.slow
def test_nothing_is_proved_where_nothing_is_sealed(tables, tmp_path):
    plain = {"streams": {}, "terms": {}, "data.candidates": (), "data.extra_eval": (), "total": (1.0, "steps")}
    with pytest.raises(ValueError, match="has no sealed labels, so that nothing can be proved"):
        leak.prove(config_of(tables, **plain), tmp_path / "w", verbose=False)


# Candidates


def test_a_candidate_holds_no_target_label_and_what_selectors_need(done, tables):
    folder, _ = done
    assert candidates.steps_of(folder) == [2, 4, 6]
    arrays = candidates.read(candidates.path_of(folder, 4))
    held_out, test = (len(load(tables, f"train[{part}]")) for part in ("50%:75%", "75%:"))
    assert {name: x.shape for name, x in arrays.items()} == {
        "source_logits": (63, 4), "source_features": (63, 64), "source_labels": (63,), "train_features": (147, 64),
        "target_logits": (held_out, 4), "target_features": (held_out, 64), "mixed_logits": (held_out, 4),
        "test_logits": (test, 4),
    }  # fmt: skip
    assert all(x.dtype == np.float32 for name, x in arrays.items() if name != "source_labels")
    with np.load(folder / "predictions-target_test.npz") as final:
        last = candidates.read(candidates.path_of(folder, 6))
        np.testing.assert_array_equal(final["logits"], last["test_logits"])


def test_choices_are_the_argmax_of_scores_and_the_earliest_of_equals(done):
    folder, _ = done
    choices = files.read_json(folder / "choices.json")
    assert list(choices["choices"]) == list(SELECTORS) and choices["steps"] == [2, 4, 6]
    read = [candidates.make(candidates.read(candidates.path_of(folder, step))) for step in choices["steps"]]
    for name, row in choices["choices"].items():
        assert row["scores"] == SELECTORS[name].scores(read)
        best = max(row["scores"])
        assert row["step"] == choices["steps"][row["scores"].index(best)]
    for step in choices["steps"]:
        path = candidates.path_of(folder, step)
        assert choices["sha256"][path.name] == files.sha256(path)


def test_mixed_inputs_are_each_example_with_another_one(tables):
    run = build.build(config_of(tables), sharding.make_parallel("jit"))
    mixed = run.material.eval_batches["mixed candidates"]
    source = run.material.data["held_out"]
    rows = np.concatenate([batch["table"][batch["mask"]] for batch in mixed])
    partners = (rows - 0.55 * source.inputs) / 0.45
    nearest = np.abs(partners[:, None] - source.inputs[None]).sum(-1)
    assert sorted(nearest.argmin(1)) == list(range(len(source))) and nearest.min(1).max() < 1e-4
    assert (nearest.argmin(1) != np.arange(len(source))).all()
    np.testing.assert_array_equal(mixed[0]["table"], next(iter(mixed))["table"])


@pytest.mark.slow
@pytest.mark.parametrize("select", ["infomax", pytest.param("dev", marks=pytest.mark.slow)])
def test_a_selector_can_choose_the_checkpoint_of_the_run(select, tables, done, tmp_path):
    config = config_of(tables, select=select, total=(5.0, "steps"), eval_every=(1.0, "steps"), lr=0.5)
    result = train(config, tmp_path / "w", verbose=False)
    row = files.read_json(tmp_path / "w" / "choices.json")["choices"][select]
    assert result["step"] == row["step"] and result["select"] == select
    rows = files.read_rows(tmp_path / "w" / "metrics.jsonl")
    assert [r[f"val/{select}"] for r in rows if f"val/{select}" in r] == row["scores"]
    with np.load(tmp_path / "w" / "predictions-target_test.npz") as final:
        chosen = candidates.read(candidates.path_of(tmp_path / "w", result["step"]))
        np.testing.assert_array_equal(final["logits"], chosen["test_logits"])


def test_the_names_that_select_takes_are_the_selectors_of_one_candidate():
    assert tuple(name for name, selector in SELECTORS.items() if not selector.pool) == SINGLE


@pytest.mark.slow
def test_replicas_write_the_candidates_of_the_runs_by_themselves(tables, tmp_path):
    config = config_of(tables, replicas=((("lr", 0.1),), (("lr", 0.02),)), select="snd")
    inprocess.run(config, tmp_path / "w")
    alone = train(config_of(tables, lr=0.02, select="snd"), tmp_path / "alone", verbose=False)
    folder = tmp_path / "w" / "replicas" / "01-lr=0.02"
    for step in (2, 4, 6):
        one, other = (candidates.read(candidates.path_of(each, step)) for each in (folder, tmp_path / "alone"))
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)
    assert files.read_json(folder / "result.json")["selection"]["rows"][0]["accuracy"] == pytest.approx(
        alone["selection"]["rows"][0]["accuracy"], abs=0.05
    )
    target = [row["stream"] for row in files.read_json(folder / "ledger.json")["openings"] if row["phase"] != "load"]
    assert target == ["target_test", "held_out"]
    table = files.read_json(tmp_path / "w" / "replicas.json")["selection"]
    options_chosen = {c["options"] for row in table["rows"] for c in row["chosen"] if c}
    assert options_chosen <= {"lr=0.1", "lr=0.02"}
    assert files.read_json(tmp_path / "w" / "choices.json")["units"]["seed 0"].keys() == SELECTORS.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.candidates": ("held_out", "digits")}, "data.candidates = .*expected a triple"),
        ({"data.val": "", "data.test": "train[70%:]"}, "data.candidates = .*data.val is ''"),
        ({"data.candidates": (), "select": "infomax"}, "select = 'infomax' judges data.candidates, which is"),
        ({"select": "infomx"}, "select = 'infomx': expected one of last, best_val, source_risk"),
        ({"task": "binary"}, "data.candidates = .*classes of a classification"),
        ({"data.candidates": ("held_out", "T", "train[45%:75%]")},
         "streams.target: 9 of 52 examples of held_out, .* in the training stream 'target'"),
        ({"data.candidates": ("held_out", "T", "train[60%:80%]")}, "data.candidates: 8 of 42 examples of target_test"),
        ({"data.candidates": ("target_test", "T", "train[50%:75%]")}, r"name \['target_test'\], which are taken"),
        ({"data.candidates": ("val", "T", "train[50%:75%]")}, r"name \['val'\], which are taken"),
    ],
)  # fmt: skip
def test_candidates_that_do_not_fit_are_refused_by_name(changes, message, tables, tmp_path):
    changes = json.loads(json.dumps(changes).replace('"T"', f'"table:{tables}/target.csv"'))
    changes = {key: tuple(x) if isinstance(x, list) else x for key, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        train(config_of(tables, **changes), tmp_path / "w", verbose=False)


def test_overlapping_target_splits_make_a_transductive_result(done, tables):
    assert done[1]["setting"] == "inductive" and done[1]["leak_test"] == "not done"
    triple = ("held_out", f"table:{tables}/target.csv", "train[:50%]")
    changes = {"data.candidates": triple, "data.transductive": True}
    run = build.build(config_of(tables, **changes), sharding.make_parallel("jit"))
    assert artifacts._openness(run)["setting"] == "transductive"
    assert run.material.shared == {("target", "held_out"): 85}


@pytest.mark.slow
def test_candidates_of_cached_features_are_those_of_live_ones_without_mixed_inputs(tmp_path):
    base = options.override(options.make(), {
        "model.name": "resnet8_cifar", "model.weights": "builtin:glyphs", "data.train": "train[:60]",
        "data.val": "train[95%:]", "data.candidates": ("held_out", "digits:faded", "train[:41]"),
        "data.extra_eval": (("target_test", "digits:faded", "test[:37]"),), "batch_size": 12, "resamples": 5,
        "total": (4.0, "steps"), "eval_every": (2.0, "steps"), "log_every": (2.0, "steps"), "eval_batch_size": 64,
        "select": "bnm",
    })  # fmt: skip
    found = {}
    for cache in ("", "features"):
        config = options.override(base, {"cache": cache, "cache_dir": str(tmp_path / "c") if cache else ""})
        found[cache] = train(config, tmp_path / f"w{cache}", verbose=False)
    live, cached = (candidates.read(candidates.path_of(tmp_path / f"w{cache}", 4)) for cache in found)
    assert set(live) - set(cached) == {"mixed_logits"}
    for name, values in cached.items():
        np.testing.assert_allclose(values, live[name], rtol=1e-4, atol=1e-4)
    names = [[row["selector"] for row in result["selection"]["rows"]] for result in found.values()]
    assert [name for name in names[0] if name not in names[1]] == ["mixval"]


# Arms, domains, and no labelled source at all


SOURCE_ONLY = (("terms", {}), ("streams", {}))


@pytest.mark.slow
def test_a_source_only_arm_with_the_same_candidates_is_scored_on_the_same_examples(tables, tmp_path, capsys):
    config = config_of(tables, baseline=SOURCE_ONLY, total=(2.0, "steps"))
    found = inprocess.run(config, tmp_path / "w")
    inprocess.show(found, config, tmp_path / "w")
    assert "What each selector's choice (options, step) is worth on target_test" in capsys.readouterr().out
    folders = [tmp_path / "w", tmp_path / "w" / "runs" / "baseline-seed0"]
    ids = [tasks.load_predictions(folder / "predictions-target_test.npz").ids.tolist() for folder in folders]
    assert ids[0] == ids[1] and candidates.steps_of(folders[1]) == [2]
    report = files.read_json(tmp_path / "w" / "comparison.json")["negative_transfer"]
    assert set(report) == {"predictions.npz", "predictions-target_test.npz"}
    errors = [np.mean(tasks.load_predictions(f / "predictions-target_test.npz").values.argmax(1)
              != tasks.load_predictions(f / "predictions-target_test.npz").labels) for f in folders]  # fmt: skip
    assert report["predictions-target_test.npz"]["value"] == pytest.approx(errors[0] - errors[1])


def test_arms_with_other_examples_are_said_to_be_incomparable(tables, tmp_path):
    one, other = tmp_path / "a", tmp_path / "b"
    for folder, rows, terms in ((one, range(30), {"dann": {}}), (other, range(1, 31), {})):
        made = tasks.make_predictions(
            {"logits": np.eye(3)[[0] * 30]}, [0] * 30, list(rows), tasks.Spec(class_names=tuple("abc"))
        )
        folder.mkdir()
        tasks.save_predictions(folder / "predictions-t.npz", made)
        files.write_json(folder / "config.json", {"terms": terms})
    (line,) = alarm.sentences("dann", "erm", alarm.of_folders([(one, other)]))
    assert line.startswith("dann cannot be compared with erm on t: the examples differ")


@pytest.mark.slow
def test_several_source_domains_are_judged_by_the_rules_of_generalisation(tables, tmp_path):
    names = tuple(f"table:{tables}/{name}.csv" for name in ("source", "other"))
    config = config_of(tables, **{"data.source": names, "streams": {}, "terms": {}, "total": (2.0, "steps")})
    result = train(config, tmp_path / "w", verbose=False)
    arrays = candidates.read(candidates.path_of(tmp_path / "w", 2))
    hit = arrays["source_logits"].argmax(1) == arrays["source_labels"]
    assert set(arrays["source_domains"]) == {0, 1}
    (score,) = files.read_json(tmp_path / "w" / "choices.json")["choices"]["source_risk"]["scores"]
    assert score == pytest.approx(np.mean([hit[arrays["source_domains"] == d].mean() for d in (0, 1)]))
    assert result["selection"]["several"] and result["setting"] == "inductive"
    assert [row["selector"] for row in result["selection"]["rows"]][-2:] == [selection.LAST_ORACLE, selection.ORACLE]
    assert files.read_json(tmp_path / "w" / "ledger.json")["sealed"] == ["target_test", "held_out"]


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


# The panel


def test_the_panel_is_its_rows_written_out(done):
    folder, result = done
    found, choices = result["selection"], files.read_json(folder / "choices.json")
    with np.load(folder / "predictions-target_test.npz") as final:
        labels = final["labels"]
    hits = np.array(
        [candidates.read(candidates.path_of(folder, s))["test_logits"].argmax(1) == labels for s in (2, 4, 6)]
    )
    accuracy, rows = hits.mean(1), {row["selector"]: row for row in found["rows"]}
    assert list(rows) == [*SELECTORS, "last", "random candidate", "3 labels per class", selection.ORACLE]
    for name, row in rows.items():
        assert row["regret"] == pytest.approx(accuracy.max() - row["accuracy"])
        assert row["difference"]["value"] == pytest.approx(row["accuracy"] - accuracy[-1], abs=1e-12)
        assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]
        if name in SELECTORS:
            step = choices["choices"][name]["step"]
            assert row["chosen"] == [{"options": "", "step": step}]
            assert row["accuracy"] == pytest.approx(accuracy[[2, 4, 6].index(step)])
    assert rows["last"]["accuracy"] == pytest.approx(accuracy[-1]) and rows["last"]["difference"]["high"] == 0
    assert rows["random candidate"]["accuracy"] == pytest.approx(accuracy.mean())
    assert rows["random candidate"]["chosen"] == [{}]
    assert rows[selection.ORACLE]["accuracy"] == accuracy.max() and rows[selection.ORACLE]["regret"] == 0
    assert result["extra_eval"]["target_test"]["accuracy"]["value"] == pytest.approx(accuracy[-1])


def unit(options, steps, hits, **scores):
    hits = np.array(hits, bool)
    return selection.Unit(options, steps, scores, hits, hits[:, :2].mean(1), hits.mean(1))


def test_the_panel_of_several_options_and_seeds_chooses_among_both():
    hits = [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    units = [
        unit(["a", "a", "b", "b"], [1, 2, 1, 2], hits, infomax=[0, 1, 2, 3]),
        unit(["a", "a", "b", "b"], [1, 2, 1, 2], hits, infomax=[9, 1, 2, 3]),
    ]
    rows = {row["selector"]: row for row in selection.panel(units, resamples=20, several=True)}
    assert rows["infomax"]["chosen"] == [{"options": "b", "step": 2}, {"options": "a", "step": 1}]
    assert rows["infomax"]["accuracy"] == pytest.approx((0.8 + 0.4) / 2)
    assert rows["last"]["accuracy"] == pytest.approx((0.6 + 0.8) / 2)  # of both options, as none is chosen
    assert rows["random candidate"]["accuracy"] == pytest.approx(np.mean(hits))
    assert rows[selection.LAST_ORACLE]["chosen"][0] == {"options": "b", "step": 2}
    assert rows[selection.ORACLE]["regret"] == 0


def test_few_labels_are_so_many_of_each_class_by_the_seed():
    labels = np.array([0] * 9 + [2] * 2 + [5] * 30)
    rows = selection.few_per_class(labels, 4)
    np.testing.assert_array_equal(np.unique(labels[rows], return_counts=True), [[0, 2, 5], [3, 2, 3]])
    assert len(set(rows.tolist())) == 8 and rows.tolist() == selection.few_per_class(labels, 4).tolist()
    assert rows.tolist() != selection.few_per_class(labels, 5).tolist()


# The leak test


def test_the_poison_proof_passes_and_the_result_says_so(tables, tmp_path):
    _, differences = leak.prove(config_of(tables, select="infomax"), tmp_path / "w", verbose=False)
    assert differences == []
    result = files.read_json(tmp_path / "w" / "result.json")
    assert result["leak_test"] == "passed"
    poisoned = files.read_json(tmp_path / "w" / "poison" / "none" / "result.json")
    assert poisoned["poison"] == "none"
    scored = [found["extra_eval"]["target_test"]["accuracy"]["value"] for found in (result, poisoned)]
    assert scored[0] != scored[1]  # the poison was there
    rows = files.read_json(tmp_path / "w" / "poison" / "permuted" / "ledger.json")["openings"]
    clean = files.read_json(tmp_path / "w" / "ledger.json")["openings"]
    differ = [a["stream"] for a, b in zip(rows, clean, strict=True) if a["sha256"] != b["sha256"]]
    assert differ == ["target_test", "held_out"]
    assert {"metrics.jsonl", "choices.json", "trained.safetensors"} <= set(leak.decided(tmp_path / "w"))
    assert any(what.startswith("checkpoints/6: ") for what in leak.decided(tmp_path / "w"))
    again, _ = leak.prove(config_of(tables, select="infomax"), tmp_path / "w", verbose=False)
    assert again["result"]["leak_test"] == "passed"


def plant_stratified(monkeypatch):
    real = sources._permutation
    monkeypatch.setattr(sources, "_permutation", lambda source, seed: real(source.opened(), seed))


def plant_choice(monkeypatch):
    def best(run, rows):
        labels = run.material.data["target_test"].opened().labels
        folder = FOLDERS[-1] if FOLDERS else None
        steps = [row["step"] for row in rows if "val/accuracy" in row]
        hits = {
            s: (candidates.read(candidates.path_of(folder, s))["test_logits"].argmax(1) == labels).mean() for s in steps
        }
        return min(hits, key=lambda s: (-hits[s], s)) if hits else None

    real = candidates.write
    monkeypatch.setattr(candidates, "write", lambda folder, *rest: (FOLDERS.append(folder), real(folder, *rest))[1])
    monkeypatch.setattr(loop, "best_step", best)
    monkeypatch.setattr("tl_jax.training.train.best_step", best)


FOLDERS: list[pathlib.Path] = []


def plant_selector(monkeypatch):
    real = candidates.scores_of

    def scores(paths):
        found = real(paths)
        labels = load(TABLES[-1], "train[75%:]", poison=POISON[-1]).opened().labels
        hits = [(candidates.read(path)["test_logits"].argmax(1) == labels).mean() for path in paths]
        return found | {"entropy": [float(hit) for hit in hits]}

    real_choose = candidates.choose
    monkeypatch.setattr(
        candidates, "choose", lambda run, *rest: (POISON.append(run.settings.data.poison), real_choose(run, *rest))[1]
    )
    monkeypatch.setattr(candidates, "scores_of", scores)


TABLES: list[pathlib.Path] = []
POISON: list[str] = []


def plant_term(monkeypatch):
    """A stream that leaks its labels into what is trained on: the first column of its inputs."""
    real = pipeline.Batches.index

    def index(self, step):
        batch = real(self, step)
        if self.source.sealed and "mask" not in batch and not hasattr(self, "num_workers"):
            labels = self.source.labels.open()[batch["index"]]
            batch["table"] = batch["table"] + 0.1 * labels[:, None].astype(np.float32)
        return batch

    monkeypatch.setattr(pipeline.Batches, "index", index)


PLANTS = {
    "slices": (plant_stratified, "fingerprint of target"),
    "term": (plant_term, "trained.safetensors"),
    "selector": (plant_selector, "choices.json"),
    "checkpoint": (plant_choice, "selected step"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant", ["selector", *(pytest.param(p, marks=pytest.mark.slow) for p in ("slices", "term", "checkpoint"))]
)
def test_a_planted_leak_fails_the_test_and_is_named(plant, tables, tmp_path, monkeypatch):
    TABLES.append(tables)
    make, named = PLANTS[plant]
    make(monkeypatch)
    select = "best_val" if plant == "checkpoint" else "last"
    steps = 2.0 if plant == "selector" else 8.0
    config = config_of(tables, select=select, lr=0.4, eval_every=(1.0, "steps"), total=(steps, "steps"))
    _, differences = leak.prove(config, tmp_path / "w", verbose=False)
    assert any(named in line for line in differences), differences
    assert files.read_json(tmp_path / "w" / "result.json")["leak_test"].startswith("failed: ")


@pytest.mark.slow
def test_the_command_proves_and_fails_where_labels_decide(tables, tmp_path, monkeypatch, capsys):
    config = config_of(tables, total=(2.0, "steps"))
    monkeypatch.setattr(command, "read_config", lambda *_: config)
    argv = ["--config", "c.py", "--workdir", str(tmp_path / "w"), "--prove-no-leak"]
    assert command.main(argv) == 0
    assert "leak test: passed" in capsys.readouterr().out
    plant_stratified(monkeypatch)
    argv[3] = str(tmp_path / "leaky")
    assert command.main(argv) == 1
    assert "leak test: FAILED" in (error := capsys.readouterr().err) and "fingerprint of target" in error
    assert command.main(["--study", "s", "--prove-no-leak"]) == 2
