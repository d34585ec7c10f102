"""No reader of files crashes, hangs or takes memory at a damaged file: what readers.py finds."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from faults import effort, readers

pytestmark = pytest.mark.battery
PROGRAM = pathlib.Path(readers.__file__)


def run(*words):
    """(what became of the files of each reader, what is wrong)"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, env=environment)
    assert done.returncode in (0, 1), done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith("INFO: ")]  # of atheris
    return json.loads(done.stdout), "\n".join(told).strip()


def test_damaged_files_are_read_or_refused_by_every_reader():
    table, wrong = run("--count", str(effort.amount(20, 100_000)), "--seed", str(effort.amount(1, 0)))
    for name, outcomes in table.items():
        for outcome, count in outcomes.items():
            effort.tried(f"files: {name}", outcome, count)
    assert not wrong and len(table) == len([*readers.readers()])
    assert all(sum(outcomes.values()) >= 1 for outcomes in table.values())


@pytest.mark.slow
def test_files_that_reach_further_code_are_read_or_refused_too():
    pytest.importorskip("atheris", reason="it is in requirements-dev.txt, for Linux")
    table, wrong = run("--guided", "--count", str(effort.amount(300, 100_000)))
    for name, outcomes in table.items():
        for outcome, count in outcomes.items():
            effort.tried(f"guided files: {name}", outcome, count)
    assert not wrong and len(table) == len([*readers.readers()])


def test_what_a_reader_does_wrong_is_told():
    """Of readers that are wrong on purpose."""

    def outcome(read, named=True):
        return readers.attempt(readers.Reader({}, read, named=named), pathlib.Path("given"), 10)[0]

    def fail(error):
        raise error

    assert outcome(lambda _: None) == "read"
    assert outcome(lambda _: fail(ValueError("given/a is damaged"))) == "refused"
    assert outcome(lambda _: fail(ValueError("damaged"))) == "NOT NAMED"
    assert outcome(lambda _: fail(ValueError("damaged")), named=False) == "refused"
    assert outcome(lambda _: fail(KeyError("a"))) == "CRASH"
    assert outcome(lambda _: bytearray(2**30)) == "TOO MUCH MEMORY"
    assert outcome(lambda _: list(range(10**8))) in ("TOO SLOW", "TOO MUCH MEMORY")
