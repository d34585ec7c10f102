"""Candidates and choices: what a candidate holds, how selectors choose among them, and which candidates are refused."""

import json
import pathlib
import time

import numpy as np
import pytest
from candidate_runs import config_of, load, make_done, make_tables  # noqa: F401
from test_distributed import finish, launch

from tl_jax import config as options
from tl_jax.core import files
from tl_jax.core.options import SELECTORS as SINGLE
from tl_jax.methods.selectors import SELECTORS
from tl_jax.runtime import sharding
from tl_jax.studies import inprocess, leak
from tl_jax.training import artifacts, build, candidates, selection
from tl_jax.training.train import train


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.candidates": ("held_out", "digits")}, "data.candidates = .*expected a triple"),
        ({"data.val": "", "data.test": "train[70%:]"}, "data.candidates = .*data.val is ''"),
        ({"data.candidates": (), "select": "infomax"}, "select = 'infomax' judges data.candidates, which is"),
        ({"select": "infomx"}, "select = 'infomx': expected one of last, best_val, source_risk"),
        ({"task": "binary"}, "data.candidates = .*task = 'classification'; found 'binary', leave it out"),
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


# In every kind of run


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
    # Of runs that are trained together no discriminator is scored on held-out examples, and the result says so.
    said = files.read_json(folder / "result.json")["domains"]["diagnosis"]
    assert said == ["dann: by this step its discriminator has no accuracy on train or held out examples"]  # step 2 of 3
    assert files.read_json(tmp_path / "w" / "choices.json")["units"]["seed 0"].keys() == SELECTORS.keys()


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


WATCHED = """
import json, os, pathlib, sys
sys.path.insert(0, "tests")
from candidate_runs import config_of
from tl_jax.data.sealed import SealedLabels

folder, first, opened = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1]), sys.argv[-1] != "1", SealedLabels.open

def open_seen(self):
    with open(f"{folder}.opened", "a") as file:
        print(json.dumps([first, (folder / "choices.json").exists()]), file=file)
    return opened(self)

def writes(event, found):
    writing = event == "open" and found[2] & (os.O_WRONLY | os.O_RDWR)
    if writing and not first and str(found[0]).startswith(f"{folder}/"):
        raise PermissionError(f"process 1 writes {found[0]}")

SealedLabels.open = open_seen
sys.addaudithook(writes)

def get_config():
    return config_of(TABLES, total=(8.0, "steps"), log_every=(1.0, "steps"), select="infomax")
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_processes_choose_as_one_and_resume_bit_equal_after_both_were_killed(tables, tmp_path):
    """Process 1 writes no file, and neither opens a sealed label before the choices are there."""
    config, (one, two, killed) = tmp_path / "config.py", (tmp_path / name for name in ("one", "two", "killed"))
    config.write_text(WATCHED.replace("TABLES", repr(str(tables))))
    finish(launch(1, one, config=config))
    outputs = finish(launch(2, two, config=config))
    assert all("Gloo" in line for line in outputs[1].splitlines()) and (two / "domain_map.png").exists()
    for step in (0, 2, 4, 6, 8):
        arrays, others = (candidates.read(candidates.path_of(folder, step)) for folder in (one, two))
        assert arrays.keys() == others.keys()
        for name in arrays:
            np.testing.assert_allclose(others[name], arrays[name], rtol=1e-5, atol=1e-5, err_msg=name)
    chosen, others = (files.read_json(folder / "choices.json")["choices"] for folder in (one, two))
    assert {name: row["step"] for name, row in chosen.items()} == {name: row["step"] for name, row in others.items()}
    for name, row in chosen.items():
        assert others[name]["scores"] == pytest.approx(row["scores"], rel=1e-5, abs=1e-5), name
    rows, others = (files.read_rows(folder / "metrics.jsonl") for folder in (one, two))
    assert [row.keys() for row in rows] == [row.keys() for row in others] and "val/dann/accuracy" in rows[-1]
    assert [list(row.values()) for row in others] == [pytest.approx(list(row.values()), rel=1e-5) for row in rows]
    results = [files.read_json(folder / "result.json") for folder in (one, two)]
    assert results[0]["selection"] == results[1]["selection"] and results[0]["domains"] == results[1]["domains"]
    assert files.read_json(one / "ledger.json") == files.read_json(two / "ledger.json")

    processes = launch(2, killed, config=config)
    while not candidates.path_of(killed, 4).exists() and processes[0].poll() is None:
        time.sleep(0.01)
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    assert candidates.steps_of(killed) and not (killed / "choices.json").exists()
    finish(launch(2, killed, config=config))
    assert leak.decided(killed) == leak.decided(two)
    assert (killed / "result.json").read_bytes() == (two / "result.json").read_bytes()
    opened = files.read_json(killed / "ledger.json")["openings"]
    assert [(row["stream"], row["start"]) for row in opened if row["phase"] != "load"] == [
        ("target_test", 1), ("held_out", 1)
    ]  # fmt: skip
    for folder in (two, killed):
        seen = [tuple(json.loads(line)) for line in pathlib.Path(f"{folder}.opened").read_text().splitlines()]
        assert sorted(seen) == [(False, True), (True, True), (True, True)]
