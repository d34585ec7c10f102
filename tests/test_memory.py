"""Another malloc: the program starts over once, with its own arguments, where one is installed."""

import os
import pathlib
import subprocess
import sys

import pytest

from tl_jax.__main__ import main
from tl_jax.runtime import malloc

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = """
import os, pathlib, sys
from tl_jax.runtime import malloc
print("begun", flush=True)
malloc.FOLDERS = (sys.argv[1] + "/",)
malloc.keep_memory()
print(os.environ["LD_PRELOAD"], sys.argv[2:], os.getpid(), sep="|")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is of Linux")
@pytest.mark.parametrize(
    ("installed", "given", "begun", "left"),
    [
        (["libtcmalloc_minimal.so.4"], "", 2, "{folder}/libtcmalloc_minimal.so.4"),
        (["libtcmalloc.so.4"], "", 2, "{folder}/libtcmalloc.so.4"),
        (["libtcmalloc.so.4", "libtcmalloc_minimal.so.4"], "", 2, "{folder}/libtcmalloc_minimal.so.4"),
        (["libtcmalloc_minimal.so.4"], "libm.so.6", 1, "libm.so.6"),
        (["libtcmalloc_minimal_debug.so.4"], "", 1, ""),
        ([], "", 1, ""),
    ],
)
def test_a_program_starts_over_once_with_its_arguments_and_its_number(tmp_path, installed, given, begun, left):
    mapped = [line.split()[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines()]
    library = next(path for path in mapped if "/libc.so" in path or "/libc-" in path)  # any that can be loaded
    for name in installed:
        (tmp_path / name).symlink_to(library)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "--x", "a b"], text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": given},
    )  # fmt: skip
    output, _ = process.communicate()
    *starts, end = output.splitlines()
    assert process.returncode == 0 and starts == ["begun"] * begun
    assert end == f"{left.format(folder=tmp_path)}|['--x', 'a b']|{process.pid}"


def test_who_calls_main_with_arguments_is_not_started_over(monkeypatch, capsys):
    monkeypatch.setattr(malloc, "keep_memory", lambda: pytest.fail("the caller's process would start over"))
    assert main(["train", "nowhere.py"]) == 2
    assert "there is no config nowhere.py" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "begun"), [("train", ["train"]), ("inspect", [])])
def test_training_as_a_program_of_its_own_keeps_its_memory(command, begun, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(sys, "argv", ["tl_jax", command, "nowhere.py"])
    monkeypatch.setattr(malloc, "keep_memory", lambda: called.append(command))
    assert main() == 2 and called == begun
    assert "nowhere" in capsys.readouterr().err
