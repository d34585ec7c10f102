"""The report of a study says what its files say: the numbers, what is missing, and nothing that changes by itself."""

import base64
import csv
import functools
import hashlib
import html
import itertools
import json
import pathlib
import random
import re
import shutil

import matplotlib
import numpy as np
import pytest
from PIL import Image
from scipy import special, stats

from tl_jax import __main__ as command
from tl_jax import config as options
from tl_jax import tasks
from tl_jax.core import manifest
from tl_jax.core.files import read_json, write_json
from tl_jax.studies.report import analysis, charts, figures, report, tables
from tl_jax.studies.report.results import load
from tl_jax.training import finished

METHODS = {
    "full": {"method.name": "full"},
    "probe": {"method.name": "linear_probe"},
    "50%_a&b": {"method.name": "last_k", "method.last_k": 1},
}
SHOTS = {"5": {"data.shots": 5}, "50": {"data.shots": 50}}
SKILL = {"full": 2.0, "probe": 1.0, "50%_a&b": 2.4, "5": 0.0, "50": 1.0}
PARAMETERS = {"full": 1_000_000, "probe": 1_000, "50%_a&b": 50_000}
MARKDOWN = {"full": "full", "probe": "probe", "50%_a&b": r"50%\_a&b"}
FAILED, MISSING = ("probe", "5", 1), ("full", "50", 2)


@functools.cache
def outputs(skill, seed, count=60, classes=3):
    """Predictions and their summary; the examples of a seed are the same for every skill."""
    rng = np.random.default_rng(seed)
    names = tuple(f"class {k}" for k in range(classes)) if isinstance(classes, int) else classes
    classes = len(names)
    labels = rng.permutation(np.arange(count) % classes)
    logits = rng.normal(size=(count, classes)) + skill * np.eye(classes)[labels]
    spec = tasks.Spec(class_names=names)
    predictions = tasks.make_predictions({"logits": logits}, labels, np.arange(count), spec)
    return predictions, tasks.summarize(predictions, resamples=5)


def write_run(folder, levels, seed, seconds, classes=3):
    skill = sum(SKILL.get(level, 1.5) for level in levels.values())
    predictions, summary = outputs(skill, seed, classes=classes)
    parameters = PARAMETERS.get(levels.get("method"), 7)
    tasks.save_predictions(folder / "predictions.npz", predictions)
    shifted, other = outputs(skill / 2, seed)
    tasks.save_predictions(folder / "predictions-shifted.npz", shifted)
    result = {"metrics": summary, "extra_eval": {"shifted": other}, "trainable_parameters": parameters}
    result |= {"split": "test", "data": "made up test"}
    cost = {
        "trainable_parameters": parameters,
        "flops_per_step": 3e9,
        "flops": 1e9 * parameters,
        "memory_bytes": 2**28,
        "seconds": seconds,
        "wall_seconds": {"training": seconds, "loading": 2.5},
    }
    write_json(folder / "cost.json", {**cost, "steps": 40, "device": "cpu"})
    rows = [{"step": step, "val/loss": 1.0, "val/accuracy": 0.5 + skill / 10 - 1 / step} for step in (10, 20, 30, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest.write(folder, "result.json", result)


def make_study(
    workdir, factors, baseline, seeds=(0, 1, 2), *, unfinished=(), names=("accuracy", "nll", "shifted/accuracy"),
    design="holdout", folds=("",), order=0, seconds=12.5, question="Which method wins?", classes=3, in_configs=False,
):  # fmt: skip
    """A study's files; `order` shuffles their creation. Runs in `unfinished`, (*levels, seed), fail or stay to do."""
    runs, configs = [], {}
    for seed, fold, *cell in itertools.product(seeds, folds, *factors.values()):
        levels = dict(zip(factors, cell, strict=True))
        config = {"model.weights": repr((levels, seed, fold)), "data.extra_eval": (("shifted", "other", "far"),)}
        for factor, level in levels.items():
            config |= factors[factor][level] if in_configs else {}
        configs[key := options.fingerprint(options.from_flat(config))[:12]] = config
        runs.append({"key": key, "levels": levels, "seed": seed, "fold": fold})
    plan = {"name": "made_up", "question": question, "factors": factors, "baseline": baseline, "seeds": list(seeds)}
    workdir.mkdir()
    write_json(workdir / "study.json", {**plan, "metrics": list(names), "design": design, "runs": runs})
    for i, run in random.Random(order).sample(list(enumerate(runs)), len(runs)):
        folder = workdir / "runs" / run["key"]
        folder.mkdir(parents=True)
        write_json(folder / "config.json", configs[run["key"]])
        place = (*run["levels"].values(), run["seed"])
        if place == FAILED and place in unfinished:
            error = f"Traceback\n  File\nValueError: {workdir}/runs/{run['key']} has nan | at step 3"
            write_json(folder / "failed.json", {"error": error, "log": ["..."], "attempts": 2})
        elif place not in unfinished:
            data_seed = run["seed"] + 100 * folds.index(run["fold"])
            write_run(folder, run["levels"], data_seed, seconds + i, classes)
    return workdir


def two_factors(workdir, **changes):
    changes = {"unfinished": (FAILED, MISSING), **changes}
    return make_study(workdir, {"method": METHODS, "shots": SHOTS}, {"method": "full"}, **changes)


def contents(workdir):
    files = [path for path in workdir.rglob("*") if path.is_file() and "runs" not in path.relative_to(workdir).parts]
    return {path.relative_to(workdir).as_posix(): path.read_bytes() for path in files}


def accuracy(method, shots, seed):
    predictions, _ = outputs(SKILL[method] + SKILL[shots], seed)
    return float(np.mean(predictions.values.argmax(1) == predictions.labels))


def section(text, title):
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)[1]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    workdir = two_factors(tmp_path_factory.mktemp("study") / "w")
    return workdir, report.write(workdir), (workdir / "report.md").read_text()


@pytest.fixture
def no_figures(monkeypatch):
    """For the tests of words and numbers: figures take most of a report's time."""
    monkeypatch.setattr(figures, "MAKERS", ())


def test_means_and_intervals_are_students_over_the_seeds_that_finished(study):
    _, summary, text = study
    for method, shots in itertools.product(METHODS, SHOTS):
        seeds = [seed for seed in (0, 1, 2) if (method, shots, seed) not in (FAILED, MISSING)]
        values = [accuracy(method, shots, seed) for seed in seeds]
        slope = 1 / (np.mean(values) * (1 - np.mean(values)))  # of the logit
        logit = {"loc": special.logit(np.mean(values)), "scale": slope * stats.sem(values)}
        low, high = special.expit(stats.t.interval(0.95, len(values) - 1, **logit))
        cell = f"{np.mean(values):.4f} [{low:.4f}, {high:.4f}]" + (" (n = 2 of 3)" if len(seeds) == 2 else "")
        row = next(line for line in section(text, "Results").splitlines() if line.startswith(f"| {MARKDOWN[method]} |"))
        assert row.split(" | ")[1 + list(SHOTS).index(shots)].removesuffix(" |") == cell
        entry = next(
            row
            for row in summary["metrics"]["accuracy"]["cells"]
            if row["levels"] == {"method": method, "shots": shots}
        )
        assert entry["mean"] == pytest.approx(np.mean(values), rel=1e-12) and entry["n"] == len(seeds)


def test_differences_are_paired_by_seed_and_holm_covers_all_comparisons_of_the_metric(study):
    _, summary, text = study
    rows, p_values = summary["metrics"]["accuracy"]["differences"], []
    for row in rows:
        method, shots = row["cell"]
        both = [s for s in (0, 1, 2) if not {(method, shots, s), ("full", shots, s)} & {FAILED, MISSING}]
        a, b = ([accuracy(name, shots, seed) for seed in both] for name in (method, "full"))
        test = stats.ttest_rel(a, b)
        assert (row["mean"], row["p"]) == pytest.approx((np.mean(a) - np.mean(b), test.pvalue), rel=1e-9)
        assert row["n"] == len(both) and row["better"] == sum(x > y for x, y in zip(a, b, strict=True))
        p_values.append(test.pvalue)
        numbers = f"{row['mean']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} |"
        line = f"| method={MARKDOWN[method]}, shots={shots} | full | {numbers}"
        assert line in section(text, "Differences from the baseline")
    order, running = np.argsort(p_values), 0.0
    for place, index in enumerate(order):
        running = max(running, min(1, (4 - place) * p_values[index]))
        assert rows[index]["adjusted"] == pytest.approx(running, rel=1e-9)
    assert len(rows) == 4


def test_less_is_better_for_a_loss(study):
    for row in study[1]["metrics"]["nll"]["differences"]:
        assert row["better"] == row["losses"] and row["worse"] == row["wins"] and row["n"] > 0


def test_no_run_is_dropped_silently(study):
    workdir, summary, text = study
    assert summary["runs"] == {"done": 16, "failed": 1, "missing": 1}
    assert "18 runs planned: 16 done, 1 failed, 1 missing." in text
    unfinished = section(text, "Failed and missing runs")
    assert re.search(
        r"method=probe, shots=5 \| failed \| seed 1 \| ValueError: runs/\w+ has nan \\\| at step 3", unfinished
    )
    assert "| method=full, shots=50 | missing | seed 2 | - |" in unfinished
    assert str(workdir) not in text


def test_csv_has_a_row_for_every_run_with_unrounded_numbers(study):
    workdir, _, _ = study
    rows = list(csv.DictReader((workdir / "report.csv").read_text().splitlines()))
    assert len(rows) == 18 and [row["state"] for row in rows].count("done") == 16
    for row in rows:
        if row["state"] == "done":
            assert float(row["accuracy"]) == accuracy(row["method"], row["shots"], int(row["seed"]))
            assert float(row["ece"]) >= 0 and float(row["shifted/accuracy"]) > 0
            assert float(row["trainable_parameters"]) == PARAMETERS[row["method"]]
        else:
            assert row["accuracy"] == row["seconds"] == ""


def test_effects_use_the_seeds_that_every_cell_has_and_say_so(study, tmp_path, no_figures):
    assert "accuracy: not computed, because one seed" in section(study[2], "Main effects and interactions")
    workdir = two_factors(tmp_path / "w", unfinished=(MISSING,))
    effects = report.write(workdir)["metrics"]["accuracy"]["effects"]
    table = np.array([[[accuracy(m, s, seed) for seed in (0, 1)] for s in SHOTS] for m in METHODS])
    shots = stats.ttest_rel(*table.mean(axis=0))
    assert effects[1]["effect"] == ("shots",) and effects[1]["F"] == pytest.approx(shots.statistic**2, rel=1e-6)
    assert "over 2 seeds of 3: those that every cell has" in (workdir / "report.md").read_text()


def test_same_files_give_the_same_bytes_whatever_the_order_they_were_made_in(tmp_path, no_figures):
    first, second = two_factors(tmp_path / "a"), two_factors(tmp_path / "b", order=7)
    for workdir in (first, second):
        report.write(workdir)
    before = contents(first)
    assert before == contents(second) and len(before) == 5
    report.write(first)
    assert contents(first) == before


@pytest.mark.slow
@pytest.mark.exhaustive
def test_times_stand_in_their_own_columns_alone(study, tmp_path):
    workdir, _, text = study
    other = two_factors(tmp_path / "slow", seconds=70.0, order=7)
    report.write(other)
    slow, ours = contents(other), contents(workdir)
    assert {name for name in ours if ours[name] != slow[name]} == {f"report.{x}" for x in ("md", "html", "tex", "csv")}
    lines = zip(text.splitlines(), (other / "report.md").read_text().splitlines(), strict=True)
    cost = section(text, "Cost")
    assert all(a in cost for a, b in lines if a != b)
    rows = (csv.DictReader((place / "report.csv").read_text().splitlines()) for place in (workdir, other))
    for a, b in zip(*rows, strict=True):
        assert {**a, "seconds": "", "wall_seconds": ""} == {**b, "seconds": "", "wall_seconds": ""}


def test_latex_is_escaped_and_balanced(study):
    text = (study[0] / "report.tex").read_text()
    assert r"50\%\_a\&b" in text and not re.search(r"(?<!\\)[%&_](?=_?a)", text.split("\n", 1)[1])
    assert text.count(r"\begin{tabular}") == text.count(r"\bottomrule") == text.count(r"\end{table}") > 4
    for spec, body in re.findall(r"\\begin\{tabular\}\{([^\n]+)\}\n(.+?)\\end\{tabular\}", text, re.S):
        columns = len(re.sub(r">\{.*?\}p\{.*?\}", "l", spec))
        assert {line.count(" & ") for line in body.splitlines() if line.endswith(r"\\")} == {columns - 1}
    labels = re.findall(r"\\label\{(.*)\}", text)
    assert len({*labels}) == len(labels)
    assert tables.latex(r"a\b{c}$d#e^f~g<h") == (
        r"a\textbackslash{}b\{c\}\$d\#e\textasciicircum{}f\textasciitilde{}g$<$h"
    )
    assert tables.latex("-0.5 [-1, 2] last-k 1-2") == "$-$0.5 [$-$1, 2] last-k 1-2" and tables.latex("[1]") == "{[}1]"


def typeset(text, points=8.5):
    """The width of LaTeX's text in points, by the widths of Computer Modern's characters (matplotlib has them)."""
    path = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "afm" / "cmr10.afm"
    letters = re.findall(r"^C (\d+) ; WX ([\d.]+) ;", path.read_text(), re.M)
    width = {chr(int(code)): float(size) * points / 1000 for code, size in letters} | {" ": 333 * points / 1000}
    plain = re.sub(r"\$([-<>])\$", r"\1", re.sub(r"\\text(\w+)\{\}", "x", text)).replace("{[}", "[").replace("\\", "")
    return sum(width.get(letter, points * 0.78) for letter in plain)


def test_latex_tables_stay_on_their_page(study, tmp_path):
    """Measured: an article's line has 345 pt and its page 550, \\footnotesize a line of 9.5 pt and an em of 8.5 pt."""
    numbers = ("0.1234 [0.1111, 0.2222]", "1,234,567", "12.3 G", "<0.0001")
    wide = tables.Table(
        "wide", ("cell", *("a long header" for _ in range(14))), [("method=last_k, shots=25", *(numbers * 4)[:14])] * 95
    )
    prose = tables.Table("prose", ("a", "b", "n"), [("many words of prose " * 9, "0-lr=0.1 " * 15, "0.5")] * 30, 2)
    text = (study[0] / "report.tex").read_text() + tables.to_latex({"wide": wide, "prose": prose})
    found = re.findall(r"\\begin\{tabular\}\{([^\n]+)\}\n(.+?)\\end\{tabular\}", text, re.S)
    for spec, body in found:
        kinds = re.findall(r"p\{([\d.]+)em\}|([lr])", re.sub(r">\{\S*?\}p", "p", spec))
        rows = [line.strip().removesuffix(r"\\").split(" & ") for line in body.splitlines() if line.endswith(r"\\")]
        sizes = [
            float(em) * 8.5 if em else max(typeset(row[i].strip()) for row in rows) for i, (em, _) in enumerate(kinds)
        ]
        assert sum(sizes) + 6 * len(sizes) <= 345
        deep = [max(-(-typeset(cell) // size) for cell, size in zip(row, sizes, strict=True) if size) for row in rows]
        assert 9.5 * sum(deep) < 500  # with the caption
    shown = [row for _, body in found for row in body.splitlines() if "1,234,567" in row]
    assert len(shown) >= 95 and text.count("(Part 1 of ") == 2 + study[0].joinpath("report.tex").read_text().count(
        "(Part 1 of "
    )


def test_html_needs_nothing_else_and_holds_every_figure(study):
    workdir, summary, text = study
    page = (workdir / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:|//|file:)|@import|<script[^>]|<link""", page)
    script, policy = re.findall(r"<script>(.*?)</script>", page, re.S), re.search(r'Policy" content="(.*?)">', page)[1]
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1 and "default-src 'none'; " in policy and f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and not re.search(r"<[^>]* (on\w+|style)=", page)
    assert page.count("<img ") == len(summary["figures"]) == len(list((workdir / "figures").glob("*.svg")))
    for name in summary["figures"]:
        assert f'id="figure-{name}"' in page and f"(figures/{name}.png)" in text
    assert "50%_a&amp;b" in page and "<td>50%_a&b" not in page
    expected = {"cells", "budget", "differences", "interaction", "parameters", "learning", "calibration", "classes"}
    assert expected | {"training"} <= set(summary["figures"])


def places_of(page):
    found = re.findall(r'<figure id="figure-(.*?)">\n<div class="plot" data-places="(.*?)">', page)
    return {html.unescape(name): json.loads(html.unescape(text)) for name, text in found}


def test_every_point_that_a_figure_tells_lies_on_a_mark_of_its_colour(study):
    workdir, summary, _ = study
    found = places_of((workdir / "report.html").read_text())
    colours = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in charts.PALETTE]
    methods, right_colour = list(METHODS), []
    assert set(found) == set(summary["figures"]) and all(found.values())
    for name, places in found.items():
        with Image.open(workdir / "figures" / f"{name}.png") as image:
            for right, down, text in places:
                method = re.search(r"^method=(.+)$", text, re.M)
                if method and name != "differences":  # there a mark is hollow where nothing is sure
                    pixel = image.convert("RGB").getpixel((int(right * image.width), int(down * image.height)))
                    right_colour.append(max(np.abs(np.subtract(pixel, colours[methods.index(method[1])]))) < 60)
                    assert min(pixel) < 200, (name, text)
    assert len(right_colour) > 40 and np.mean(right_colour) > 0.9  # few marks lie under others
    cell = next(row for row in summary["metrics"]["accuracy"]["cells"] if row["levels"]["method"] == "probe")
    told = f"shots=5\nmethod=probe\naccuracy on test\n{cell['mean']:.4f}, 95 % interval {cell['low']:.4f} to "
    assert any(text == f"{told}{cell['high']:.4f}" for _, _, text in found["cells"])
    assert [text.split("\n")[2] for *_, text in found["learning"][:4]] == [f"step: {i}" for i in (10, 20, 30, 40)]


def test_figures_of_outputs_are_of_the_set_that_decides_and_name_it(tmp_path, monkeypatch):
    """Calibration and changes by class of a study that decides by a further set are of that set."""
    monkeypatch.setattr(figures, "MAKERS", (figures.calibration, figures.classes, figures.cells))
    made = {}
    for names in (("accuracy", "shifted/accuracy"), ("shifted/accuracy", "accuracy")):
        folder = tmp_path / names[0].replace("/", "-")
        results = load(make_study(folder, {"method": METHODS}, {"method": "full"}, names=names))
        outputs, _ = figures.read.read_outputs(results)
        for run in results.runs():  # numpy by itself, on the file of the set
            saved = tasks.load_predictions(run.folder / f"predictions{'-shifted' * (names[0][0] == 's')}.npz")
            right = saved.values.argmax(1) == saved.labels
            assert outputs[run.key].observed.sum() == right.sum()
            assert outputs[run.key].recall.tolist() == [right[saved.labels == k].mean() for k in range(3)]
        numbers = {metric: report.analyse(results, metric) for metric in names}
        makers = figures.calibration, figures.classes, figures.cells
        drawn = [figure for maker in makers for figure in maker(results, numbers, outputs)]
        captions = " ".join(caption for _, caption, _ in drawn)
        assert (
            f"accuracy on {results.where} by confidence" in captions and f"recall on {results.where} from" in captions
        )
        assert "accuracy on test of each cell" in captions and "shifted/accuracy of each cell" in captions
        lines = report._design(results)[1]
        assert "test is made up test" in lines and "shifted is other far" in lines
        made[results.where] = {name for name, *_ in drawn}
    assert {"calibration-ece", "cells-shifted-accuracy"} <= made["test"]
    assert {"calibration-shifted-ece", "cells-accuracy"} <= made["shifted"]


def test_markdown_shows_names_as_they_are():
    block = tables.Table("a|b", ("x", "y"), [("p|q", "*r*"), ("last_k", "_s_ <b>")])
    text = tables.to_markdown("t", {"": [block]})
    assert r"| p\|q | \*r\* |" in text and r"| last_k | \_s\_ \<b> |" in text


def test_a_clear_difference_is_told_with_its_direction_and_an_unclear_one_as_not_seen(
    tmp_path, no_figures, monkeypatch
):
    monkeypatch.setattr(finished, "read", lambda folder: read_json(folder / "result.json"))  # values made up below
    factors = {"method": {"full": {}, "probe": {}, "same": {}}}
    workdir = make_study(tmp_path / "w", factors, {"method": "full"}, seeds=range(8), names=("accuracy", "nll"))
    rows = {(run.cell, run.unit): run for run in load(workdir).runs()}
    for ((level,), (seed, _)), run in rows.items():
        result = json.loads((run.folder / "result.json").read_text())
        noise = np.random.default_rng([seed, len(level)]).normal() / 100
        result["metrics"]["accuracy"]["value"] = {"full": 0.8, "probe": 0.6, "same": 0.8}[level] + noise
        result["metrics"]["nll"]["value"] = {"full": 0.5, "probe": 0.9, "same": 0.5}[level] + noise
        write_json(run.folder / "result.json", result)
    clear, unclear = report.write(workdir)["reading"]
    assert clear.startswith("probe has a lower accuracy than full (-0.") and "lower with 8 of 8 seeds" in clear
    assert unclear.startswith("No difference in accuracy can be seen between same and full")
    results = load(workdir)
    worse, _ = analysis.reading(results, "nll", analysis.differences(results, "nll"))
    assert "probe has a higher (worse) nll than full" in worse


def test_balanced_studies_have_effects_and_enough_blocks_have_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MAKERS", (figures.ranks,))
    summary = report.write(two_factors(tmp_path / "w", unfinished=()))
    effects = summary["metrics"]["accuracy"]["effects"]
    assert [row["effect"] for row in effects] == [("method",), ("shots",), ("method", "shots")]
    table = np.array([[[accuracy(m, s, seed) for seed in range(3)] for s in SHOTS] for m in METHODS])
    shots = stats.ttest_rel(table.mean(axis=0)[0], table.mean(axis=0)[1])
    assert effects[1]["F"] == pytest.approx(shots.statistic**2, rel=1e-6)
    blocks = table.reshape(3, -1)
    expected = stats.rankdata(-blocks, axis=0).mean(axis=1)
    ranks = summary["metrics"]["accuracy"]["ranks"]["method"]
    assert ranks["ranks"] == pytest.approx(expected.tolist()) and ranks["n"] == 6
    assert "ranks-method" in summary["figures"]


def test_folds_are_paired_and_their_intervals_know_that_they_overlap(tmp_path, no_figures):
    folds = tuple(f"kfold:4:{i}" for i in range(4))
    factors = {"method": {name: METHODS[name] for name in ("full", "probe")}}
    workdir = make_study(tmp_path / "w", factors, {"method": "full"}, seeds=(0,), design="kfold:4", folds=folds)
    row = report.write(workdir)["metrics"]["accuracy"]["differences"][0]
    values = [
        float(np.mean(p.values.argmax(1) == p.labels))
        for skill in (1.0, 2.0)
        for p in [outputs(skill, 100 * fold)[0] for fold in range(4)]
    ]
    change = np.subtract(values[:4], values[4:])
    error = change.std(ddof=1) * np.sqrt(1 / 4 + 1 / 3)
    assert row["n"] == 4 and row["p"] == pytest.approx(2 * stats.t.sf(abs(change.mean()) / error, 3), rel=1e-9)
    text = (workdir / "report.md").read_text()
    assert "n_test / n_train = 0.333" in text and "mean over folds" in text


@pytest.mark.slow
def test_one_seed_gives_no_interval_and_says_so(tmp_path):
    workdir = two_factors(tmp_path / "w", seeds=(0,), unfinished=(), names=("accuracy",))
    summary = report.write(workdir)
    text = (workdir / "report.md").read_text()
    assert "One seed in each cell: there are no intervals, and nothing can be tested." in text
    assert all(row["low"] is None and row["adjusted"] is None for row in summary["metrics"]["accuracy"]["differences"])
    assert "no test is possible in 2" in text and "not computed, because one seed" in text
    assert f"| {accuracy('full', '5', 0):.4f} |" in text


@pytest.mark.slow
def test_a_study_without_baseline_is_not_compared_and_says_so(tmp_path):
    workdir = make_study(tmp_path / "w", {"method": METHODS}, {}, names=("accuracy",))
    summary = report.write(workdir)
    text = (workdir / "report.md").read_text()
    assert summary["reading"] == [
        "The study names no baseline level, so its cells are shown side by side and not compared."
    ]
    assert "## Differences" not in text and " ratio " not in text and "| full |" in text
    assert not {"differences", "classes"} & set(summary["figures"])


@pytest.mark.parametrize("baseline", [{}, {"method": "full"}])
def test_a_study_before_its_first_run_says_that_nothing_can_be_said(tmp_path, baseline):
    everything = [(*cell, seed) for cell in itertools.product(METHODS, SHOTS) for seed in (0, 1, 2)]
    workdir = make_study(tmp_path / "w", {"method": METHODS, "shots": SHOTS}, baseline, unfinished=everything[1:])
    shutil.rmtree(workdir / "runs")
    summary = report.write(workdir)
    text = (workdir / "report.md").read_text()
    assert summary["reading"] == ["No run has a value of accuracy, so nothing can be said."]
    assert summary["runs"] == {"done": 0, "failed": 0, "missing": 18} and summary["figures"] == []
    assert "| full | missing | missing |" in text and "accuracy per cell: no run has a value" in text


def test_runs_whose_result_or_predictions_were_changed_are_failed_runs(tmp_path, no_figures):
    workdir = make_study(tmp_path / "w", {"method": METHODS}, {"method": "full"})
    first, second, third, *_ = load(workdir).runs()
    (first.folder / "result.json").write_text("{")
    (second.folder / "predictions.npz").write_bytes(b"PK")
    (third.folder / "predictions.npz").write_bytes(b"PK")
    manifest.write(third.folder)
    summary = report.write(workdir)
    text = (workdir / "report.md").read_text()
    assert summary["runs"] == {"done": 6, "failed": 3, "missing": 0}
    for run, name in ((first, "result.json"), (second, "predictions.npz")):
        assert re.search(rf"runs/{run.key} is not as its run left it.*: {name} .found ", text)
    assert f"runs/{third.key}/predictions.npz: no sound predictions.npz" in section(text, "Failed and missing runs")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_three_factors_many_levels_and_one_level_can_be_reported(tmp_path, monkeypatch):
    factors = {"method": METHODS, "rate": {"slow": {"lr": 0.01}, "fast": {"lr": 0.1}}, "shots": SHOTS}
    baseline, names = {"method": "full", "rate": "slow"}, ("accuracy",)
    summary = report.write(make_study(tmp_path / "v", factors, baseline, seeds=(0, 1), names=names))
    assert {"differences-method", "differences-rate", "learning", "budget", "rates"} <= set(summary["figures"])
    many = {f"level {i}": {"lr": i} for i in range(9)}
    factors = {"method": {"full": {}}, "rate": many}
    monkeypatch.setattr(figures, "MAKERS", (figures.cells, figures.differences, figures.learning))
    workdir = make_study(tmp_path / "w", factors, {"rate": "level 0"}, seeds=(0,), names=names)
    assert report.write(workdir)["figures"] == ["cells", "differences"]
    assert "too many to read" in section((workdir / "report.md").read_text(), "Figures left out")


def test_the_command_line_writes_the_report_or_names_what_is_missing(tmp_path, capsys, no_figures):
    workdir = make_study(tmp_path / "w", {"method": METHODS}, {"method": "full"})
    assert command.main(["report", str(workdir)]) == 0
    assert "this rests on 3 seeds alone" in capsys.readouterr().out and (workdir / "report.html").exists()
    assert command.main(["report", str(tmp_path)]) == 2 and "study.json" in capsys.readouterr().err
    write_json(tmp_path / "study.json", {"name": "x"})
    assert command.main(["report", str(tmp_path)]) == 2 and "it has no question, no factors" in capsys.readouterr().err


def test_numbers_are_scaled_by_the_prefixes_of_their_unit():
    assert [tables.scaled(x, 1000) for x in (None, 0.0, 999.0, 1234.0, 3.4e9, 7e18)] == [
        "-", "0", "999", "1.2 k", "3.4 G", "7000 P",
    ]  # fmt: skip
    assert tables.scaled(2.0**28, 1024) == "256 Mi" and tables.scaled(1536.0, 1024) == "1.5 Ki"


@pytest.mark.parametrize("count", [3, 4, 7])
def test_critical_difference_diagrams_name_every_treatment(tmp_path, count):
    names = [f"treatment {i}" for i in range(count)]
    charts.ranks(tmp_path / "a.svg", names, list(np.linspace(1.2, count - 0.2, count)), 1.1, [(0, 1), (1, 2)])
    text = (tmp_path / "a.svg").read_text()
    assert all(name in text for name in names) and "critical difference 1.10" in text


def test_a_harmed_class_whose_name_is_not_utf8_is_reported(tmp_path, no_figures, monkeypatch):
    monkeypatch.setitem(SKILL, "full", -3.0)
    factors = {"method": {name: {"method.name": METHODS[name]["method.name"]} for name in ("full", "probe")}}
    changes = {"classes": ("cat", "no\udcff", "dog"), "in_configs": True}
    workdir = make_study(tmp_path / "w", factors, {"method": "probe"}, **changes)
    assert any("no\udcff +" in told for told in report.write(workdir)["alarms"])
    assert r"no\udcff +" in (workdir / "report.html").read_text() and "udcff" in (workdir / "report.md").read_text()
