"""The table of mistakes of a run on texts: any text is one line of it, and the surest mistake is the first."""

import numpy as np
import pytest

import tl_jax
from tl_jax import tasks
from tl_jax.data.examples import Source
from tl_jax.data.readers.tables import read_table
from tl_jax.data.text.tokens import Texts
from tl_jax.tasks import mistakes
from tl_jax.training import plots

LONG = "很长的评论。" * 1000
ODD = {
    "tab\tand | pipe": r"tab\tand | pipe",
    "two\nlines\r\n, a page\f": r"two\nlines\r\n, a page\x0c",
    "这家酒店\u3000很好\u2028。": "这家酒店\u3000很好\\u2028。",
    "bell\x07 zero\x00 escape\x1b[31m next\x85": r"bell\x07 zero\x00 escape\x1b[31m next\x85",
    'a "quoted" text, <b>&amp;</b> 👩‍🔬 \ud800': 'a "quoted" text, <b>&amp;</b> 👩‍🔬 \\ud800',
    LONG: LONG[:1000] + "… (1,000 of 6,000 characters)",
    "": "",
}


def source_of(rows):
    """Texts whose labels no table reads."""
    ids, count = tuple(f"row/{i}" for i in range(len(rows))), len(rows)
    return Source("x", Texts(tuple(rows)), np.zeros(count, np.int32), ("a", "b"), ids, np.zeros(count, np.int64))


def made(kind, values, labels, names=("bad", "good"), **fields):
    output = "values" if kind == "regression" else "logits"
    ids = [f"row/{i}" for i in range(len(values))]
    return tasks.make_predictions({output: np.array(values)}, np.array(labels), ids, tasks.Spec(kind, names, **fields))


def read(folder, predictions, rows):
    plots.gallery(predictions, source_of(rows), folder / "mistakes", "test")
    assert [path.name for path in folder.iterdir()] == ["mistakes.tsv"]
    header, *lines = (folder / "mistakes.tsv").read_bytes().decode().removesuffix("\n").split("\n")
    return header.split("\t"), [line.split("\t") for line in lines]


def test_any_text_is_one_line_and_the_surest_mistake_is_the_first(tmp_path):
    p = np.linspace(0.6, 0.9, len(ODD) + 1)
    logits = np.log(np.stack([1 - p, p], 1))
    labels = [0] * len(ODD) + [1]  # the last is right
    rows = [(text,) for text in (*ODD, "right")]
    header, lines = read(tmp_path, made("classification", logits, labels), rows)
    assert header == ["id", "text", "label", "answer", "probability"]
    order = np.argsort(-p[:-1])
    assert lines == [[f"row/{i}", [*ODD.values()][i], "bad", "good", f"{p[i]:.3f}"] for i in order]
    table = read_table(str(tmp_path / "mistakes.tsv"))  # texts that a run can read
    assert [x.strip() for x in np.array(lines)[:, 1]] == list(table.columns["text"])


def test_pairs_and_every_task_have_their_own_columns(tmp_path):
    rows = [("one\n", "two"), ("three", "four"), ("five", "six")]
    logit = lambda p: np.log(p) - np.log1p(-np.array(p))  # noqa: E731
    expected = {
        "binary": (
            made("binary", logit([0.3, 0.1, 0.9]), [0, 1, 1], threshold=0.2),
            [["row/1", "three", "four", "good", "bad", "0.900"], ["row/0", "one\\n", "two", "bad", "good", "0.300"]],
        ),
        "multilabel": (
            made("multilabel", logit([[0.9, 0.3], [0.4, 0.7], [0.2, 0.1]]), [[0, 0], [0, 1], [1, 0]], ("u", "v\t")),
            [["row/0", "one\\n", "two", "u: no", "u: yes", "0.900"],
             ["row/2", "five", "six", "u: yes", "u: no", "0.800"]],
        ),
        "regression": (
            made("regression", [[1.5], [3.0], [0.0]], [[1.0], [1.0], [0.0]], ("score",), target_mean=(0.0,),
                 target_std=(2.0,)),
            [["row/1", "three", "four", "1", "3", "1.000"], ["row/0", "one\\n", "two", "1", "1.5", "0.250"],
             ["row/2", "five", "six", "0", "0", "0.000"]],
        ),
    }  # fmt: skip
    for kind, (predictions, lines) in expected.items():
        (tmp_path / kind).mkdir()
        last = "deviations" if kind == "regression" else "probability"
        assert read(tmp_path / kind, predictions, rows) == (["id", "text1", "text2", "label", "answer", last], lines)


def test_nothing_is_left_where_nothing_is_wrong_and_of_many_mistakes_the_surest(tmp_path):
    right = made("classification", [[2.0, 1.0], [1.0, 2.0]], [0, 1])
    plots.gallery(right, source_of([("a",), ("b",)]), tmp_path / "mistakes", "test")
    assert not list(tmp_path.iterdir())
    size = np.linspace(0.1, 3, 250)
    many = made("classification", np.stack([0 * size, size], 1), [0] * 250)
    _, lines = read(tmp_path, many, [(f"t{i}",) for i in range(250)])
    assert [line[0] for line in lines] == [f"row/{i}" for i in range(249, 149, -1)]


@pytest.mark.figures
@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_run_on_texts_leaves_the_table_of_its_scored_split(task, tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["good", "bad", "so"], 6)) + "\n" for _ in range(90)]
    labels = rng.integers(0, 2, 90).astype(np.float32 if task == "regression" else np.int32)
    data = {"train": (texts[:60], labels[:60]), "test": (texts[60:], labels[60:])}
    network = tl_jax.load("word_average_8_4d", tokenizer="words")
    run = tl_jax.fit(
        network, data, task=task, method="full", epochs=1, workdir=tmp_path / "w", changes={"resamples": 9}
    )
    saved = tasks.load_predictions(run.folder / "predictions.npz")
    found = mistakes.said(saved)
    lines = [line.split("\t") for line in (run.folder / "mistakes.tsv").read_text().splitlines()[1:]]
    assert [line[0] for line in lines] == [str(saved.ids[i]) for i in mistakes.worst(found, 100)]
    place = {name: k for k, name in enumerate(saved.ids.tolist())}
    assert all(line[1] == texts[60 + place[line[0]]].replace("\n", "\\n") for line in lines) and len(lines) > 5
    assert not (run.folder / "mistakes.png").exists()
