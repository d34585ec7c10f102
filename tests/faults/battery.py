"""Runs classes of faults, many of each, and counts: python tests/faults/battery.py [CLASS ...] [--write]

Without a class all of them, which takes hours. --write puts the counts into the table of
docs/reliability.md. The exit code is 1 where something was not survived.
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
FAULTS = "tests/faults/test_"
CLASSES = {  # what is tried, and the tests
    "kills": ("SIGKILL at calls that change files, and at any moment, in 12 commands", f"{FAULTS}kills.py"),
    "signals": ("SIGTERM and SIGINT at any moment, in 12 commands", f"{FAULTS}signals.py"),
    "disk": ("ENOSPC, EIO and EROFS of such calls, and disks that are too small", f"{FAULTS}disk.py"),
    "clock": ("jumps by an hour or a year", f"{FAULTS}clock.py"),
    "flips": ("a flipped bit in any kind of file that is left", f"{FAULTS}flips.py"),
    "files": ("damaged files of 25 formats, weights, data, images and configs", f"{FAULTS}readers.py"),
    "properties": ("inputs that hypothesis looks for, 3,000 of each property", f"{FAULTS}properties.py"),
    "devices": ("saved on n devices, restored on m, of 1, 2, 4, 8", f"{FAULTS}devices.py"),
    "processes": ("SIGKILL and SIGTERM to either of two processes, at four moments", f"{FAULTS}processes.py"),
    "mutants": ("planted faults that a test has to notice", f"{FAULTS}mutants.py"),
}
OTHERS = {  # classes whose tests lie elsewhere and always try the same
    "meetings": ("processes that do not come, are lost or are foreign", "tests/test_distributed.py"),
    "launchers": ("two launchers and many workers at one study", "tests/test_study_launch.py tests/test_study.py"),
    "options": ("wrong options, arguments and names", "tests/test_wrong_options.py tests/test_wrong_arguments.py"),
    "numbers": (
        "NaN, infinities, empty and odd sizes",
        "tests/test_steps.py tests/test_metrics.py tests/test_train.py",
    ),
}
HEAD = ("| class | what is tried | tried | what became of it | date, commit |", "| --- | --- | ---: | --- | --- |")


def run(name: str) -> tuple[int, collections.Counter]:
    """(exit code, {outcome: count}) of a class."""
    tests = (CLASSES | OTHERS)[name][1].split()
    mark = {"mutants": "mutants"}.get(name, "battery" if name in CLASSES else "")
    with tempfile.TemporaryDirectory() as folder:
        counts = pathlib.Path(folder) / "counts"
        report = pathlib.Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-m", mark, "--dist", "worksteal", f"--junitxml={report}", *tests]
        code = subprocess.run(words, cwd=ROOT, env={**os.environ, "BATTERY": str(counts)}).returncode
        rows = [json.loads(line) for line in counts.read_text().splitlines()] if counts.exists() else []
        found = re.search(r'errors="(\d+)" failures="(\d+)" skipped="(\d+)" tests="(\d+)"', report.read_text())
    errors, failures, skipped, count = map(int, found.groups())
    outcomes = collections.Counter()
    for row in rows:
        outcomes[row["outcome"]] += row["count"]
    if not rows:
        outcomes = collections.Counter({"passed": count - errors - failures - skipped, "FAILED": errors + failures})
    return code, +outcomes


def row_of(name: str, outcomes: collections.Counter, commit: str) -> str:
    what, told = (CLASSES | OTHERS)[name][0], ", ".join(f"{n:,} {outcome}" for outcome, n in outcomes.most_common())
    return f"| {name} | {what} | {outcomes.total():,} | {told} | {datetime.date.today()}, {commit} |"


def write(name: str, row: str) -> None:
    """Puts the row of a class into the table of the page."""
    text = PAGE.read_text()
    start = text.index(HEAD[0])
    end = text.index("\n\n", start)
    known = {line.split("|")[1].strip(): line for line in text[start:end].splitlines()[2:]} | {name: row}
    lines = [known[each] for each in (*CLASSES, *OTHERS) if each in known]
    PAGE.write_text(text[:start] + "\n".join([*HEAD, *lines]) + text[end:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", metavar="CLASS", help=f"of {', '.join((*CLASSES, *OTHERS))}")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if unknown := [name for name in args.classes if name not in CLASSES | OTHERS]:
        parser.error(f"no class {', '.join(unknown)}; there are {', '.join((*CLASSES, *OTHERS))}")
    describe = ["git", "describe", "--always", "--dirty=+"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    codes, rows = [], []
    for name in args.classes or (*CLASSES, *OTHERS):
        code, outcomes = run(name)
        codes.append(code)
        rows.append(row_of(name, outcomes, commit))
        if args.write:
            write(name, rows[-1])
    print("\n".join([*HEAD, *rows]))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
