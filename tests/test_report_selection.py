"""The selection panel and the alarm of negative transfer, over the runs of a study and of replicas."""

import json

import numpy as np
import pytest

from tests import test_report
from tl_jax import tasks
from tl_jax.core import files, manifest
from tl_jax.core.console import WIDE, fitted
from tl_jax.methods.selectors import SELECTORS
from tl_jax.studies import local
from tl_jax.studies.report import alarm, report, selection, tables
from tl_jax.training import candidates
from tl_jax.training.selection import LAST_ORACLE, ORACLE, Unit, panel

CLASSES, JUDGED, TESTED = 5, 23, 61
METHODS = {"source-only": {"terms": {}}, "dann": {"terms": {"dann": {}}}, "mcc": {"terms": {"mcc": {}}}}
SKILL = {"source-only": 1.0, "dann": 3.0, "mcc": -1.0}


def outputs(rng, labels, skill):
    return (rng.normal(size=(len(labels), CLASSES)) + skill * np.eye(CLASSES)[labels]).astype(np.float32)


def add_candidates(folder, method, seed):
    """What a finished run of a method has besides: candidates at three steps, its choices and its panel."""
    rng, truth = np.random.default_rng([seed, *method.encode()]), np.random.default_rng(7)
    labels = {"target": truth.integers(0, CLASSES, JUDGED), "test": truth.integers(0, CLASSES, TESTED)}
    steps, accuracy = [10, 20, 30], []
    (folder / "candidates").mkdir()
    for step in steps:
        arrays = {f"{name}_logits": outputs(rng, y, SKILL[method] * step / 30) for name, y in labels.items()}
        arrays |= {"target_features": rng.normal(size=(JUDGED, 6)).astype(np.float32)}
        np.savez(candidates.path_of(folder, step), **arrays)
        accuracy.append(float((arrays["target_logits"].argmax(1) == labels["target"]).mean()))
    paths = [candidates.path_of(folder, step) for step in steps]
    scores = candidates.scores_of(paths)
    choices = {name: {"reads": "no labels", "step": 10, "scores": found} for name, found in scores.items()}
    hashes = {path.name: files.sha256(path) for path in paths}
    files.write_json(folder / "choices.json", {"steps": steps, "sha256": hashes, "choices": choices})
    spec = tasks.Spec(class_names=tuple("abcde"))
    logits = candidates.read(paths[-1])["test_logits"]
    final = tasks.make_predictions({"logits": logits}, labels["test"], np.arange(TESTED), spec)
    tasks.save_predictions(folder / "predictions-target_test.npz", final)
    result = files.read_json(folder / "result.json")
    result["extra_eval"]["target_test"] = tasks.summarize(final, resamples=3)
    facts = {"test": "target_test", "judged_on": "held_out", "several": False, "steps": steps}
    result["selection"] = {**facts, "few": accuracy, "held_out": accuracy, "rows": []}
    (folder / "result.json").unlink()
    manifest.write(folder, "result.json", result)
    return [float((candidates.read(p)["test_logits"].argmax(1) == labels["test"]).mean()) for p in paths]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(folder, {(method, seed): accuracies of the steps}) of three methods and two seeds."""
    folder = tmp_path_factory.mktemp("study") / "w"
    test_report.make_study(folder, {"method": METHODS}, {"method": "source-only"}, seeds=(0, 4), in_configs=True)
    found = {}
    for row in json.loads((folder / "study.json").read_text())["runs"]:
        run, method = folder / "runs" / row["key"], row["levels"]["method"]
        found[method, row["seed"]] = add_candidates(run, method, row["seed"])
    return folder, found, report.write(folder)


@pytest.mark.slow
def test_a_study_has_one_panel_over_options_steps_and_seeds(study):
    folder, accuracy, summary = study
    rows = {row["selector"]: row for row in summary["selection"]["rows"]}
    lacking = {"source_risk", "iwcv", "dev", "mixval"}  # whose input these candidates do not have
    assert set(rows) == {*SELECTORS} - lacking | {"last", "random candidate", "3 labels per class", ORACLE}
    table = {seed: np.array([accuracy[m, seed] for m in METHODS]) for seed in (0, 4)}
    assert rows[ORACLE]["accuracy"] == pytest.approx(np.mean([t.max() for t in table.values()]))
    assert rows["last"]["accuracy"] == pytest.approx(np.mean([t[:, -1].mean() for t in table.values()]))
    assert rows["random candidate"]["accuracy"] == pytest.approx(np.mean([t.mean() for t in table.values()]))
    places = [(m, s) for m in METHODS for s in (10, 20, 30)]
    for name in set(rows) & set(SELECTORS) - {"ensv"}:
        for place, seed in zip(rows[name]["chosen"], (0, 4), strict=True):
            keys = {row["levels"]["method"]: row["key"] for row in plan(folder) if row["seed"] == seed}
            own = [files.read_json(folder / "runs" / keys[m] / "choices.json")["choices"] for m in METHODS]
            scores = [score for run in own for score in run[name]["scores"]]
            assert (place["options"], place["step"]) == places[int(np.argmax(scores))]
    infomax = [
        accuracy[c["options"], s][[10, 20, 30].index(c["step"])]
        for c, s in zip(rows["infomax"]["chosen"], (0, 4), strict=True)
    ]
    assert rows["infomax"]["accuracy"] == pytest.approx(np.mean(infomax))


def plan(folder):
    return json.loads((folder / "study.json").read_text())["runs"]


def test_choices_of_a_study_are_written_before_target_labels_are_read(study, monkeypatch):
    folder, _, summary = study
    choices = files.read_json(folder / "choices.json")["units"]
    chosen = {row["selector"]: row["chosen"] for row in summary["selection"]["rows"]}
    for i, unit in enumerate(("seed 0", "seed 4")):
        for name, row in choices[unit].items():
            assert {key: row[key] for key in ("options", "step")} == chosen[name][i]
    events, load = [], tasks.load_predictions
    monkeypatch.setattr(tasks, "load_predictions", lambda path: (events.append("labels"), load(path))[1])
    write = files.write_json
    monkeypatch.setattr(files, "write_json", lambda path, value: (events.append(path.name), write(path, value))[1])
    units = {f"seed {r['seed']}": [("a", folder / "runs" / r["key"])] for r in plan(folder)}
    selection.over_runs(units, folder)
    assert events[0] == "choices.json" and set(events[1:]) == {"labels"}


def test_the_panel_is_in_every_form_of_the_report(study):
    folder, _, summary = study
    row = next(row for row in summary["selection"]["rows"] if row["selector"] == "rankme")
    for name in ("report.md", "report.html", "report.tex", "selection.csv"):
        text = (folder / name).read_text().replace(r"\_", "_")
        assert f"{row['accuracy']:.3f}" in text and "oracle" in text, name
        assert name.endswith(".csv") or "oracle: upper bound, never a result." in text, name
    assert (folder / "selection.csv").read_text().splitlines()[0] == ",".join(selection.HEADERS)


@pytest.mark.slow
def test_runs_without_candidates_have_no_panel_and_different_sets_are_told_apart(study, tmp_path):
    folder, _, _ = study
    bare = test_report.two_factors(tmp_path / "w")
    assert report.write(bare)["selection"] is None and not (bare / "selection.csv").exists()
    keys = [row["key"] for row in plan(folder)][:2]
    runs = [("a", folder / "runs" / keys[0]), ("b", folder / "runs" / keys[1])]
    before = files.read_json(runs[1][1] / "result.json")
    files.write_json(runs[1][1] / "result.json", {**before, "selection": {**before["selection"], "test": "other"}})
    assert "different names" in selection.over_runs({"seed 0": runs}, tmp_path)
    (runs[1][1] / "result.json").unlink()
    manifest.write(runs[1][1], "result.json", before)


@pytest.mark.slow
def test_a_candidate_that_was_changed_is_named_in_place_of_a_panel(study):
    folder, _, _ = study
    path = folder / "runs" / plan(folder)[3]["key"] / "candidates" / "step_000020.npz"
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "target_logits": arrays["target_logits"] + 1})
    told = report.write(folder)["selection"]
    assert told.startswith("There is no panel: ") and "step_000020.npz is damaged" in told
    path.write_bytes(whole)


def test_leave_one_domain_out_is_the_mean_of_runs_that_were_trained_without_each():
    def config(sources, left="", **more):
        return {"data.source": sources, "data.extra_eval": [["left", left, "train"]] if left else [], **more}

    def result(value):
        return {"extra_eval": {"left": {"accuracy": {"value": value}}}}

    configs = {
        "abc": config(["a", "b", "c"], lr=1),
        "bc": config(["b", "c"], "a", lr=1),
        "ac": config(["a", "c"], "b", lr=1),
    }
    configs |= {
        "ab": config(["a", "b"], "c", lr=1),
        "other": config(["a", "b"], "c", lr=2),
        "far": config(["a", "b"], "d", lr=1),
    }
    results = dict(zip(configs, map(result, (0, 0.2, 0.4, 0.9, 1.0, 1.0)), strict=True))
    assert selection._left_out("abc", list(configs), configs, results) == pytest.approx(0.5)
    assert selection._left_out("abc", ["bc", "ac", "other", "far"], configs, results) is None
    configs["pair"], configs["a"], configs["b"] = config(["a", "b"]), config("a", "b"), config(["b"], "a")
    results |= {"a": result(0.1), "b": result(0.3), "pair": result(0)}
    assert selection._left_out("pair", list(configs), configs, results) == pytest.approx(0.2)


def test_the_rule_of_left_out_domains_chooses_among_last_steps(study, tmp_path, monkeypatch):
    folder, _, _ = study
    keys = {row["levels"]["method"]: row["key"] for row in plan(folder) if row["seed"] == 0}
    runs = [(method, folder / "runs" / key) for method, key in keys.items()]
    score = {path: value for (_, path), value in zip(runs, (0.3, 0.6, 0.5), strict=True)}
    monkeypatch.setattr(selection, "_left_out", lambda path, *_: score[path])
    real = files.read_json

    def several(path, *rest):
        found = real(path, *rest)
        return {**found, "selection": {**found["selection"], "several": True}} if path.name == "result.json" else found

    monkeypatch.setattr(files, "read_json", several)
    rows = {row["selector"]: row for row in selection.over_runs({"seed 0": runs}, tmp_path)["rows"]}
    assert rows["leave-one-domain-out"]["chosen"] == [{"options": "dann", "step": 30}]
    assert list(rows)[-2:] == [LAST_ORACLE, ORACLE] and rows["leave-one-domain-out"]["reads"] == "source"


# The alarm


def predictions(labels, answers, ids=None):
    logits = np.eye(3)[np.array(answers)]
    spec = tasks.Spec(class_names=("x", "y", "z"))
    return tasks.make_predictions({"logits": logits}, np.array(labels), ids or np.arange(len(labels)), spec)


LABELS = [0] * 40 + [1] * 40 + [2] * 20


def test_the_alarm_rises_where_the_interval_is_above_zero_overall_and_by_class():
    good, bad = list(LABELS), list(LABELS)
    bad[:15] = [2] * 15  # of class x; worse by 0.15
    found = alarm.negative_transfer([(predictions(LABELS, bad), predictions(LABELS, good))])
    assert found["value"] == pytest.approx(0.15) and 0 < found["low"] < 0.15 < found["high"] and found["alarm"]
    assert list(found["classes"]) == ["x"] and found["classes"]["x"]["value"] == pytest.approx(15 / 40)
    swapped = alarm.negative_transfer([(predictions(LABELS, good), predictions(LABELS, bad))])
    assert not swapped["alarm"] and swapped["high"] < 0 and swapped["classes"] == {}


def test_a_class_can_lose_where_the_whole_gains():
    arm, base = list(LABELS), list(LABELS)
    arm[80:90], base[:30] = [0] * 10, [1] * 30
    found = alarm.negative_transfer([(predictions(LABELS, arm), predictions(LABELS, base))])
    assert not found["alarm"] and list(found["classes"]) == ["z"]
    (line,) = alarm.sentences("dann", "source-only", {"predictions-t.npz": found})
    assert line.startswith("NEGATIVE TRANSFER: dann is worse than source-only on t: in class z +0.500 [")


def test_seeds_are_averaged_by_example_whatever_their_order():
    bad, order = list(LABELS), np.random.default_rng(0).permutation(100)
    bad[:20] = [1] * 20
    base = predictions([LABELS[i] for i in order], [LABELS[i] for i in order], order.tolist())
    pairs = [(predictions(LABELS, bad), base), (predictions(LABELS, LABELS), base)]
    assert alarm.negative_transfer(pairs)["value"] == pytest.approx(0.1)


def test_five_examples_are_too_few_for_an_alarm_and_equal_arms_raise_none():
    bad = list(LABELS)
    bad[80:85] = [0] * 5
    pair = predictions(LABELS, bad), predictions(LABELS, LABELS)
    assert not alarm.negative_transfer([pair])["alarm"]
    assert not alarm.negative_transfer([pair[:1] * 2])["alarm"]


def test_numbers_and_several_labels_have_losses_too():
    spec = tasks.Spec("regression", ("t",), (0.0,), (1.0,))
    made = tasks.make_predictions({"values": np.array([[1.0], [3.0]])}, np.array([[0.0], [1.0]]), [0, 1], spec)
    np.testing.assert_allclose(alarm.losses(made), [1, 4])
    spec = tasks.Spec("multilabel", ("a", "b"))
    made = tasks.make_predictions({"logits": np.array([[1.0, -1], [1, 1]])}, np.array([[1, 0], [0, 1]]), [0, 1], spec)
    np.testing.assert_allclose(alarm.losses(made), [0, 0.5])


@pytest.mark.parametrize(
    ("arm", "base", "expected"),
    [
        ({"terms": {"dann": {}}}, {}, True), ({}, {"terms": {"dann": {}}}, False), ({"lr": 0.1}, {}, False),
        ({"model.weights": "w"}, {}, True), ({"streams": {"t": {"source": "s", "split": "train"}}}, {}, True),
        ({"method.name": "full"}, {"method.name": "knn"}, True),
        ({"method.name": "knn"}, {"method.name": "full"}, False),
        ({"data.labelled": False}, {}, True), ({"streams": {"t": {"labelled": True}}}, {}, False),
        ({"method.name": "full", "model.weights": "w"}, {"method.name": "full", "model.weights": "w"}, False),
    ],
)  # fmt: skip
def test_an_arm_is_watched_where_it_transfers_what_its_baseline_does_not(arm, base, expected):
    assert alarm.transfers(arm, base) is expected


@pytest.mark.slow
def test_a_study_shows_negative_transfer_in_red(study, capsys):
    folder, _, summary = study
    local.tell_answer(folder)
    shown = capsys.readouterr().out
    assert "NEGATIVE TRANSFER: mcc is worse" in shown and "rankme" in shown
    harm = {row["arm"]: row["sets"]["predictions-target_test.npz"]["alarm"] for row in summary["negative_transfer"]}
    assert harm == {"dann": False, "mcc": True}
    line = "NEGATIVE TRANSFER: mcc is worse than source-only on target_test: error +"
    assert f'<p class="alarm">{line}' in (folder / "report.html").read_text()
    assert f"**{line}" in (folder / "report.md").read_text().replace(r"\_", "_")
    assert ".alarm" in (folder / "report.html").read_text()
    assert "NEGATIVE TRANSFER: dann is worse than source-only on target_test:" not in (folder / "report.md").read_text()
    assert tables.to_markdown("t", {"": [tables.Alarm("seen")]}).endswith("**seen**\n")


@pytest.mark.parametrize("width", [80, WIDE])
def test_no_row_of_a_runs_panel_is_broken_on_a_console_of_80_columns_or_in_a_pipe(width):
    rng = np.random.default_rng(0)
    scores = {name: rng.random(2) for name in SELECTORS}
    unit = Unit(["", ""], [500, 10000], scores, rng.random((2, 50)) < 0.4, [0, 1], [0, 1])
    found = {"rows": panel([unit]), "test": "t", "judged_on": "v", "several": False}
    table = selection.table(found)
    head, rule, *rows = fitted(table._replace(caption=""), width).splitlines()
    assert [row.split()[0] for row in rows] == [name.split()[0] for name, *_ in table.rows]
    assert max(map(len, (head, rule, *rows))) <= width
