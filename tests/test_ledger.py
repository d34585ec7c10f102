"""The ledger: verdicts, what is run and what is kept, a planted wrong claim, and the claims of the experiments."""

import csv
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from tl_jax.studies import ledger
from tl_jax.studies.report import results

CLAIMS = """
import json
from tl_jax.studies.ledger import Claim

def measure(out):
    return {arm: tuple(x) for arm, x in json.loads((out / "stdout.txt").read_text()).items()}

NUMBERS = {"a": [0.80, 0.78, 0.82], "b": [0.70, 0.69, 0.71]}
COMMAND = ("-c", f"import json; print(json.dumps({NUMBERS!r}))")
def claim(name, published, command=COMMAND, needs=()):
    return Claim(name, "A. Uthor 1999, table 1", "a is so good.", published, 0.005, "", (command,), needs, measure)

CLAIMS = (
    claim("right", {"a": 0.79}),
    claim("both", {"a": 0.80, "b": 0.70}),
    claim("order", {"a": 0.90, "b": 0.60}),
    claim("wrong", {"a": 0.50}),
    claim("reversed", {"a": 0.60, "b": 0.90}),
    claim("absent", {"a": 0.80}, ("-c", "print('never')"), needs=("data/gone",)),
    claim("broken", {"a": 0.80}, ("-c", "raise SystemExit(3)")),
)
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "experiments" / "made_up").mkdir(parents=True)
    (tmp_path / "experiments/made_up/claims.py").write_text(CLAIMS)
    return tmp_path


def verdicts(rows):
    return {row["claim"].partition("/")[2]: row["verdict"] for row in rows}


def test_a_wrong_claim_is_not_reproduced_and_each_verdict_is_what_was_measured(root, tmp_path):
    rows = ledger.run(root / "w", str(tmp_path), out=root / "docs", measure=True, root=root)
    expected = {"right": 0, "both": 0, "order": 1, "wrong": 2, "reversed": 2, "absent": 3, "broken": 4}
    assert verdicts(rows) == {name: ledger.VERDICTS[i] for name, i in expected.items()}
    table = {row["claim"]: row for row in csv.DictReader((root / "docs/ledger.csv").read_text().splitlines())}
    assert table["made_up/wrong"]["why"] == "a 0.8, published 0.5" and "data/gone" in table["made_up/absent"]["why"]
    assert "not seen: b > a" in table["made_up/reversed"]["why"]
    assert table["made_up/right"]["measured"] == "a 0.8 (0.78 .. 0.82)"
    assert table["made_up/both"]["measured"] == "a 0.8 (0.78 .. 0.82); b 0.7 (0.69 .. 0.71)"
    text = (root / "docs/ledger.md").read_text()
    assert "2 reproduced, 1 order only, 2 not reproduced, 1 cannot be run here, 1 not run yet" in text
    assert len([*(root / "w").glob("*/measured.json")]) == 1  # one command answered five claims


def test_what_was_measured_stays_until_its_command_is_another(root, tmp_path):
    first = ledger.run(root / "w", str(tmp_path), out=root / "docs", measure=True, only="right|wrong", root=root)
    assert verdicts(first)["right"] == "reproduced" and verdicts(first)["broken"] == "not run yet"
    kept = ledger.run(root / "elsewhere", "", out=root / "docs", root=root)
    assert [row["measured"] for row in kept] == [row["measured"] for row in first]
    assert not (root / "elsewhere").exists()
    path = root / "experiments/made_up/claims.py"
    path.write_text(CLAIMS.replace("0.80, 0.78", "0.81, 0.78"))
    assert verdicts(ledger.run(root / "elsewhere", "", out=root / "docs", root=root))["right"] == "not run yet"


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ({"a": (0.8, 0.6, 0.9), "b": (0.75, 0.6, 0.9)}, "not reproduced"),
        ({"a": (0.8, 0.6, 0.9), "b": (0.75, 0.6, 0.9), "a - b": (0.05, 0.01, 0.09)}, "order only"),
        ({"a": (0.8, 0.6, 0.9), "b": (0.75, 0.6, 0.9), "b - a": (-0.05, -0.09, 0.01)}, "not reproduced"),
        ({"a": (0.95, 0.9, 1.0), "b": (0.4, 0.3, 0.51)}, "reproduced"),
    ],
)
def test_an_order_needs_an_interval_that_says_so(measured, verdict):
    claim = ledger.Claim("x", "p", "s", {"a": 0.99, "b": 0.5}, 0.02, "", (("-c", ""),), (), lambda out: measured)
    assert ledger.judge(claim, measured)[0] == verdict


def test_an_order_alone_is_reproduced_where_every_difference_is_clear():
    measured = {"a": (0.8, 0.7, 0.9), "b": (0.7, 0.6, 0.8), "c": (0.1, 0.0, 0.2), "a - b": (0.1, 0.01, 0.2)}
    claim = ledger.Claim("x", "p", "s.", {}, 0.0, "", (("-c", ""),), (), lambda out: measured, (("a", "b"), ("b", "c")))
    assert ledger.judge(claim, measured) == ("reproduced", "") and claim.claimed == "a > b; b > c"
    assert claim.arms == ["a", "b", "c", "a - b", "b - c"]
    unclear = measured | {"a - b": (0.1, -0.01, 0.2)}
    assert ledger.judge(claim, unclear) == ("not reproduced", "not seen: a > b")


def test_the_arms_of_a_study_are_means_over_seeds_and_paired_differences(monkeypatch):
    rng = np.random.default_rng(0)
    known = {name: {(seed, ""): x for seed, x in enumerate(rng.normal(0.5, 0.1, 6))} for name in "ab"}
    grid = {(name,): {unit: results.Run("", (name,), unit, "done", None, scores={"accuracy": x})
                      for unit, x in runs.items()} for name, runs in known.items()}  # fmt: skip
    study = results.Results("s", "q", {"f": {"a": {}, "b": {}}}, {}, range(6), ("accuracy",), "holdout", grid)
    monkeypatch.setattr(results, "load", lambda folder: study)
    found = ledger.of_study(None, {"first": {"f": "a"}, "second": {"f": "b"}})
    a, b = (np.array([*known[name].values()]) * 100 for name in "ab")
    low, high = stats.t.interval(0.95, 5, (a - b).mean(), stats.sem(a - b))
    np.testing.assert_allclose(found["first - second"], ((a - b).mean(), low, high))
    np.testing.assert_allclose(found["second"][0], b.mean())
    grid[("b",)] = {(9, ""): grid[("b",)][(0, "")]}
    with pytest.raises(ValueError, match="first and second have 0 finished seeds in common"):
        ledger.of_study(None, {"first": {"f": "a"}, "second": {"f": "b"}})


def test_files_and_claims_that_do_not_fit_are_all_named(root):
    (root / "experiments/other").mkdir()
    (root / "experiments/other/claims.py").write_text("import nothing_like_this")
    path = root / "experiments/made_up/claims.py"
    path.write_text(CLAIMS.replace('"right"', '"wrong"').replace("A. Uthor 1999, table 1", ""))
    with pytest.raises(ValueError, match=r"(?s)made_up/wrong: its name is taken.*paper is empty.*nothing_like_this"):
        ledger.load(root)


def test_the_claims_of_the_experiments_are_whole():
    claims = ledger.load()
    assert len(claims) >= 16
    for name, claim in claims.items():
        assert claim.says.endswith(".") and (claim.tolerance > 0 or claim.above), name
        assert all(words[0] == "-m" or (ledger.ROOT / words[0]).exists() for words in claim.commands), name


def test_the_command_shows_the_table(tmp_path):
    argv = [sys.executable, "launch.py", "--ledger", f"--workdir={tmp_path / 'w'}", f"--out={tmp_path / 'docs'}"]
    found = subprocess.run(argv, capture_output=True, text=True, cwd=ledger.ROOT)
    assert found.returncode == 0 and "office_caltech/gfk" in found.stdout and (tmp_path / "docs/ledger.md").exists()
