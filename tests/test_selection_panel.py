"""What choices are worth: the panel of selectors, and the arms of a comparison on the same examples."""

import numpy as np
import pytest
from candidate_runs import config_of, make_done, make_tables  # noqa: F401

from tl_jax import tasks
from tl_jax.core import files
from tl_jax.methods.selectors import SELECTORS
from tl_jax.studies import inprocess
from tl_jax.studies.report import alarm
from tl_jax.studies.report import selection as selection_report
from tl_jax.training import candidates, selection


@pytest.mark.slow
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


def test_the_table_names_the_base_options_and_counts_equal_choices():
    hits = [[1, 0, 0], [1, 1, 0]]
    scores = ([0, 1], [0, 1], [1, 0])
    units = [unit(["", "a"], [1, 1], hits, infomax=score) for score in scores]
    facts = {"test": "t", "judged_on": "j", "several": False}
    table = selection_report.table({**facts, "rows": selection.panel(units, resamples=5)})
    chosen = {row[0]: row[2] for row in table.rows}
    assert chosen["infomax"] == "a 1 (x2); base 1" and chosen["oracle"] == "a 1" and chosen["last"] == "-"
    assert "nothing to choose" not in table.caption
    one = selection.panel([unit([""], [4], hits[:1], infomax=[0])], resamples=5)
    table = selection_report.table({**facts, "steps": [4], "rows": one})
    assert "One candidate" in table.caption and {row[0]: row[2] for row in table.rows}["infomax"] == "4"


def test_few_labels_are_so_many_of_each_class_by_the_seed():
    labels = np.array([0] * 9 + [2] * 2 + [5] * 30)
    rows = selection.few_per_class(labels, 4)
    np.testing.assert_array_equal(np.unique(labels[rows], return_counts=True), [[0, 2, 5], [3, 2, 3]])
    assert len(set(rows.tolist())) == 8 and rows.tolist() == selection.few_per_class(labels, 4).tolist()
    assert rows.tolist() != selection.few_per_class(labels, 5).tolist()


# Arms
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
