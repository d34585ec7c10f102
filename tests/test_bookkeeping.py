"""Files that keep the books of a run: damaged ones stop no run from ending, and what they told is not made up."""

import json
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from configs import smoke
from tl_jax import config as options
from tl_jax.core import files
from tl_jax.runtime import log as runtime_log
from tl_jax.runtime.preemption import Preempted
from tl_jax.studies import store
from tl_jax.training.train import train


def config():
    changes = {"model.image_size": 8, "data.test": "", "batch_size": 8, "resamples": 10, "total": (6.0, "steps")}
    return options.override(smoke.get_config(), {**changes, "eval_every": (3.0, "steps"), "log_every": (1.0, "steps")})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after four of six steps, and the metrics of one that was not."""
    folder = tmp_path_factory.mktemp("runs")
    whole = train(config(), folder / "whole", verbose=False)
    with pytest.raises(Preempted):
        train(config(), folder / "stopped", verbose=False, stop_requested=lambda step: step >= 4)
    return folder / "stopped", whole["metrics"]


def flipped(data):
    draw, data = random.Random(len(data)), bytearray(data)
    for place in draw.sample(range(len(data)), 40):
        data[place] ^= 1 << draw.randrange(8)
    return bytes(data)


def first_line(data, line):
    return line + b"\n" + data.split(b"\n", 1)[1]


TIMING = {  # name: what becomes of the file
    "flips": flipped,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one line is none": lambda data: first_line(data, b"\xff\xfe{"),
    "a number is a word": lambda data: first_line(data, b'{"step": 1, "seconds": "long", "mfu": []}'),
    "not finite": lambda data: first_line(data, b'{"step": 1, "seconds": NaN}'),
    "nested": lambda data: first_line(data, b"[" * 100_000),
}
COST = {
    "flips": flipped,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "a list": lambda data: b"[]",
    "no phases": lambda data: b"{}",
    "phases are a number": lambda data: b'{"phases": 1}',
    "phases are words": lambda data: b'{"phases": ["none"]}',
    "numbers are words": lambda data: data.replace(b'"steps": 6', b'"steps": "six"'),
}


@pytest.mark.slow
@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "name, damage",
    [
        pytest.param(name, kind, marks=() if kind in ("flips", "half") else pytest.mark.slow)
        for name, kinds in (("timing.jsonl", TIMING), ("cost.json", COST))
        for kind in kinds
    ],
)
def test_a_run_whose_books_are_damaged_ends_with_its_numbers(stopped, tmp_path, name, damage):
    shutil.copytree(stopped[0], tmp_path / "w")
    path = tmp_path / "w" / name
    path.write_bytes((TIMING if name == "timing.jsonl" else COST)[damage](path.read_bytes()))
    assert train(config(), tmp_path / "w", verbose=False)["metrics"] == stopped[1]
    cost = files.read_json(tmp_path / "w" / "cost.json")
    assert cost["flops_per_step"] > 0  # of the one phase, which was compiled anew
    assert (cost["seconds"] is None) == (cost["data_wait_seconds"] is None) == (name == "timing.jsonl")


@pytest.mark.slow
def test_a_run_whose_books_are_damaged_at_the_very_end_ends_too(stopped, tmp_path, capsys):
    def stop(step):
        if step == 6:
            for path in (folder / "cost.json", folder / "timing.jsonl"):
                path.write_bytes(b"\0" + path.read_bytes())
        return False

    folder = tmp_path / "w"
    assert train(config(), folder, verbose=False, stop_requested=stop)["metrics"] == stopped[1]
    cost, text = files.read_json(folder / "cost.json"), capsys.readouterr().out.replace("\n", "")
    assert cost["seconds"] is None and cost["flops_per_step"] is None
    assert "timing.jsonl is damaged, 1 lines" in text and "cost.json is damaged" in text


def test_the_seconds_of_a_sound_run_are_of_all_starts_and_a_line_that_a_kill_cut_goes(stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "w")
    path = tmp_path / "w" / "timing.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "sec')
    train(config(), tmp_path / "w", verbose=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    seconds = files.read_json(tmp_path / "w" / "cost.json")["seconds"]
    assert seconds == pytest.approx(sum(row["seconds"] for row in rows), abs=1e-3)


def test_rows_that_are_needed_are_refused_with_the_numbers_of_the_damaged_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\n[2]\n{"step": 4}\n{"cut')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: expected .* found none in 2, 3; "):
        files.read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": 1, "attempts": "two", "step": 0}', "[" * 100_000])
def test_a_damaged_claim_stops_no_study(tmp_path, text):
    (tmp_path / "claim.json").write_text(text)
    assert store.read_claim(tmp_path)["attempts"] == 0
    with store.claim(tmp_path) as attempts:
        assert attempts == 1 and store.read_claim(tmp_path)["attempts"] == 1


KILLED = """
import os, pathlib, signal, sys
from tl_jax.core import files
with files.atomic_write(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_half_written_goes_with_the_next_writing(tmp_path):
    path = tmp_path / "matrix [a].png"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -signal.SIGKILL
    (tmp_path / f".{path.name}.4711.tmp").write_bytes(b"of an earlier version")
    (tmp_path / ".other.png.4711.tmp").write_bytes(b"of another file")
    assert len(list(tmp_path.iterdir())) == 3
    files.write_text(path, "whole")
    assert {file.name for file in tmp_path.iterdir()} == {path.name, ".other.png.4711.tmp"}


def test_writers_of_one_file_do_not_take_each_other_for_killed(tmp_path):
    with files.atomic_write(tmp_path / "a.json") as slow:
        slow.write(b"slow")
        files.write_text(tmp_path / "a.json", "fast")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: files.write_text(tmp_path / "a.json", f"{i}"), range(400)))
        assert (tmp_path / "a.json").read_text().isdigit()
    assert (tmp_path / "a.json").read_text() == "slow" and len(list(tmp_path.iterdir())) == 1


def test_the_console_shows_every_term_of_the_loss_before_their_own_numbers(tmp_path, capsys):
    row = {"train/loss": 6.0, "train/grad_norm": 1.0, "train/task": 1.0, "train/dann": 2.0, "train/dann/accuracy": 0.5}
    row |= {"train/mmd": 3.0, "train/mmd/mean_distance": 0.25, "train/coral": 4.0, "train/lr": 0.1}
    with runtime_log.RunLog(tmp_path, [], 0, 4) as found:
        found.progress(2, row, 8.0)
    shown = capsys.readouterr().out
    assert "loss 6  task 1  dann 2  mmd 3  coral 4  " in shown and "accuracy" not in shown and "lr" not in shown
