"""A sweep of replicas is shown best first, and as a figure of the score against the rate."""

import numpy as np
import pytest
from scipy import special, stats

from tl_jax.studies.report import charts, sweep


def row(number, accuracy, error=None, **options):
    val = None if accuracy is None else {"accuracy": accuracy, "loss": 1 - accuracy, "low": 0.0, "high": 1.0}
    return {"name": f"{number:02}-x", "options": options, "error": error, "step": None if error else 9, "val": val}


ROWS = [
    row(0, 0.5, lr=0.01, weight_decay=0.0),
    row(1, None, "not finite", lr=10.0, weight_decay=0.0),
    row(2, 0.75, lr=0.1, weight_decay=0.0),
    row(3, 0.625, lr=0.01, weight_decay=0.5),
    row(4, 0.75, lr=0.1, weight_decay=0.5),
]


@pytest.fixture
def drawn(monkeypatch):
    calls = []
    monkeypatch.setattr(charts, "lines", lambda *args, **style: calls.append((args, style)))
    return calls


def test_the_best_comes_first_the_earlier_among_equals_and_what_diverged_last():
    table = sweep.table("classification", ROWS)
    assert [cells[0] for cells in table.rows] == ["02", "04", "03", "00", "01"]
    assert table.headers[:4] == ("replica", "lr", "weight_decay", "val accuracy") and table.text_columns == 3
    assert table.rows[0][:4] == ("02", "0.1", "0.0", "0.7500") and table.rows[-1][3] == "diverged"
    assert "the best by val first" in table.caption
    without = sweep.table("classification", [row(0, None, lr=1.0), row(1, None, lr=2.0)])
    assert "no val" in without.caption and [cells[0] for cells in without.rows] == ["00", "01"]


def test_a_line_for_each_decay_holds_the_scores_at_rising_rates_and_the_best_is_circled(drawn, tmp_path):
    sweep.draw("classification", ROWS, tmp_path)
    (path, panels, x_label, y_label), style = drawn[0]
    assert (path.name, x_label, y_label) == ("replicas.png", "learning rate", "val accuracy") and len(drawn) == 2
    (lines,) = panels.values()
    assert list(lines) == style["order"] == ["0.0", "0.5"] and style["log"]
    assert (lines["0.0"]["x"], lines["0.0"]["mean"]) == ([0.01, 0.1], [0.5, 0.75])
    assert lines["0.0"]["circle"] == (0.1, 0.75) and "circle" not in lines["0.5"]


def test_seeds_are_averaged_and_a_third_option_makes_panels(drawn, tmp_path):
    values = np.random.default_rng(0).uniform(0.8, 0.9, (2, 2, 3)).round(4)
    rows = [
        row(0, values[i, k, seed], lr=lr, seed=seed, **{"data.shots": shots})
        for i, lr in enumerate((0.1, 0.2)) for k, shots in enumerate((5, 25)) for seed in range(3)
    ]  # fmt: skip
    sweep.draw("classification", rows, tmp_path)
    (_, panels, *_), style = drawn[0]
    line = panels[""]["25"]
    assert style["legend"] == "data.shots" and line["x"] == [0.1, 0.2]
    np.testing.assert_allclose(line["mean"], values[:, 1].mean(axis=1))
    mean, error = values[0, 1].mean(), stats.sem(values[0, 1])
    expected = special.expit(stats.t.interval(0.95, 2, special.logit(mean), error / (mean * (1 - mean))))
    np.testing.assert_allclose((line["low"][0], line["high"][0]), expected)
    several = [{**each, "options": {**each["options"], "weight_decay": d}} for each in rows for d in (0.0, 0.1)]
    sweep.draw("classification", several, tmp_path)
    assert list(drawn[-1][0][1]) == ["weight_decay=0.0", "weight_decay=0.1"]


def test_without_numbers_to_compare_there_is_no_figure_and_with_them_there_are_files(drawn, monkeypatch, tmp_path):
    sweep.draw("classification", [row(0, 0.5, seed=0), row(1, 0.6, seed=1)], tmp_path)
    sweep.draw("classification", [row(0, None, lr=0.1), row(1, None, lr=1.0)], tmp_path)
    assert not drawn
    monkeypatch.undo()
    sweep.draw("classification", ROWS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"replicas.png", "replicas.svg"}


def test_ticks_are_powers_of_ten_or_the_few_rates_themselves():
    assert charts.rate_ticks([0.003, 0.02]) == [(0.003, "0.003"), (0.02, "0.02")]
    many = [1e-5, 2e-5, 1e-4, 5e-4, 1e-3, 0.02]
    assert [text for _, text in charts.rate_ticks(many)] == ["1e-05", "0.0001", "0.001", "0.01"]
