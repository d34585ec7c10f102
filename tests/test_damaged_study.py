"""A damaged study.json, config.json, failed.json or runs.json ends in one message with the file's name."""

import copy
import json

import pytest
from test_report import METHODS, make_study

from tl_jax import config as options
from tl_jax.core.files import write_json
from tl_jax.studies import local, store, together, worker
from tl_jax.studies.report import figures, report

WRONG = (
    None, 0, -1, 1.5, True, "", "x", "kfold:99999999999x99999999", [], [1], [None], ["x", 1], {}, {"x": 1}, {"x": {}},
    {"x": {"y": 1}}, {"x": {"y": {}}}, [{}], [{"key": "x"}], [[]],
)  # fmt: skip
GONE = object()


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MAKERS", ())
    return make_study(tmp_path / "w", {"method": METHODS}, {"method": "full"}, seeds=(0,))


def places(table):
    """Where a plan can be damaged: its fields, and those of its first run."""
    yield from ((name,) for name in store.PLAN)
    yield from (("runs", 0, name) for name in store.ROW)
    yield from (("runs", 0, "levels", "method"), ("factors", "method"), ("factors", "method", "full"), ("seeds", 0))


def damaged(table):
    """The plan with each of WRONG in each of its places, and with each place gone."""
    for place in places(table):
        for value in (*WRONG, GONE):
            changed = copy.deepcopy(table)
            node = changed
            for step in place[:-1]:
                node = node[step]
            if value is GONE:
                del node[place[-1]]
            else:
                node[place[-1]] = value
            yield place, value, changed


def test_what_is_no_plan_is_named_by_all_that_read_it(workdir):
    path = workdir / "study.json"
    whole = path.read_text()
    for text in ("", "[]", "3", "null", "{", "\x00", '{"runs": []}', "[" * 10_000, whole[: len(whole) // 2]):
        path.write_text(text)
        for use in (report.write, worker.work, store.states, store.open_runs, store.retry):
            with pytest.raises(ValueError, match=r"study\.json"):
                use(workdir)


@pytest.mark.slow
def test_a_damaged_plan_is_refused_in_one_line_or_can_be_reported(workdir):
    """What is not refused when the plan is read does not fail later on."""
    path, faults, refused = workdir / "study.json", [], 0
    for place, value, table in damaged(json.loads(path.read_text())):
        write_json(path, table)
        try:
            store.read_plan(workdir)
            report.write(workdir)
        except ValueError as error:
            refused += 1
            if str(path) not in str(error) or "\n" in str(error) or len(str(error)) > 2000:
                faults.append((place, value, str(error)))
        except Exception as error:
            faults.append((place, value, repr(error)))
    assert not faults, "\n".join(map(str, faults))
    assert refused > 200


@pytest.mark.parametrize("table", [{}, {"error": 1, "log": [], "attempts": 1}, {"error": "x", "log": 1, "attempts": 1}])
def test_a_damaged_failure_is_named(workdir, capsys, table):
    folder = store.run_folder(workdir, store.read_plan(workdir)["runs"][0]["key"])
    (folder / "result.json").unlink()
    write_json(folder / "failed.json", table)
    with pytest.raises(ValueError, match=r"failed\.json is damaged"):
        local.tell_failures(workdir)
    assert report.write(workdir)["runs"]["failed"] == 1


def test_a_damaged_set_is_chosen_anew(workdir, monkeypatch, capsys):
    key = store.read_plan(workdir)["runs"][0]["key"]
    monkeypatch.setattr(store, "open_runs", lambda workdir: [key])
    path = workdir / "together" / "x" / "runs.json"
    path.parent.mkdir(parents=True)
    for table in ({}, {"runs": 3, "alone": ""}, {"runs": [], "alone": None}):
        write_json(path, table)
        assert together.members(workdir, key) == ([key], None) and not path.exists()
        assert "runs.json is damaged" in capsys.readouterr().out


def test_an_unknown_option_may_have_any_name_and_a_deep_one_is_refused(tmp_path):
    write_json(tmp_path / "config.json", {".": 1, "x.y": 2, "x-": 3, "x.z": 4})
    assert options.read(tmp_path / "config.json").x.z == 4
    write_json(tmp_path / "config.json", {"x." * 20_000: 1})
    with pytest.raises(ValueError, match=r"config\.json: .*recursion"):
        options.read(tmp_path / "config.json")


@pytest.mark.parametrize("table", [{"model": 1}, {"model.name.x": 1}, {"": 1}, {"data": {"source": "x"}}, {"lr.x": 1},
                                   {"x": 1, "x.y": 2}, {"x.y": 1, "x.y.z.u": 2, "x-": 3}])  # fmt: skip
def test_a_config_with_sections_in_the_wrong_place_is_named(tmp_path, table):
    write_json(tmp_path / "config.json", table)
    with pytest.raises(ValueError, match=r"config\.json: .* cannot be an option"):
        options.read(tmp_path / "config.json")
