"""The ledger: what papers claim, and what this code measures of it. experiments/*/claims.py hold the claims as data.

python launch.py --ledger [--run] [--material FOLDER] [--only REGEX] [--workdir W] [--out docs]

A command is run once for all claims that it answers, into W/KEY, and never again where its measurement is there.
"""

import argparse
import csv
import datetime
import importlib.util
import io
import itertools
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tl_jax.core import files, machine, messages
from tl_jax.core.console import Table, show
from tl_jax.runtime import preemption
from tl_jax.studies.report import results, statistics, tables

VERDICTS = ("reproduced", "order only", "not reproduced", "cannot be run here", "not run yet")
COLUMNS = ("claim", "paper", "says", "published", "tolerance", "measured", "verdict", "why", "differs", "date",
           "commit", "machine", "seconds", "command", "key")  # fmt: skip
ROOT = pathlib.Path(__file__).resolve().parents[2]
Measured = Mapping[str, tuple[float, float, float]]  # {arm: (value, low, high)}, and {"a - b": paired difference}


class Claim(NamedTuple):
    """One published statement about numbers, and the commands that measure them.

    name: in lower case, once in its file. paper: with table, figure or page. says: in a sentence. published: {arm:
    number}; {} where the claim is an order alone. tolerance: how far a measured number may be from it, in its units.
    differs: how what is run differs from the paper's protocol; "" for not at all. commands: each the words behind
    python, from the root of the repository; {out} is a folder of their own, whose stdout.txt keeps what is printed,
    {material} the folder of data and weights. needs: paths in that. measure: out -> Measured, of every arm, with 95 %
    intervals (three equal numbers where nothing is random). above: pairs (arm, an arm that is below it).
    """

    name: str
    paper: str
    says: str
    published: Mapping[str, float]
    tolerance: float
    differs: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...]
    measure: Callable[[pathlib.Path], Measured]
    above: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """What a measurement belongs to: other commands, another measurement."""
        return messages.fingerprint({str(i): list(words) for i, words in enumerate(self.commands)})[:12]

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Arms of which the first is claimed to be above the second: as given, or by their published numbers."""
        known = self.published
        return self.above or tuple((a, b) for a in known for b in known if known[a] - known[b] > self.tolerance)

    @property
    def arms(self) -> list[str]:
        """What is shown of a measurement: the arms that the claim names, and the differences of its pairs."""
        return [
            *dict.fromkeys([*self.published, *itertools.chain(*self.pairs)]),
            *(f"{a} - {b}" for a, b in self.pairs),
        ]

    @property
    def claimed(self) -> str:
        """The numbers, or the order."""
        order = "; ".join(f"{a} > {b}" for a, b in self.above)
        return _joined({arm: f"{value:g}" for arm, value in self.published.items()}) or order


def judge(claim: Claim, measured: Measured) -> tuple[str, str]:
    """(verdict, why) of a claim.

    reproduced: each published number lies in the measured interval, widened by the tolerance. order only: numbers
    differ, and each pair of arms whose published numbers differ by more than the tolerance has the same order, with an
    interval of the difference that excludes 0, or intervals that do not overlap. A claim of an order alone is
    reproduced where each of its pairs has it so.
    """
    unclear = [f"{a} > {b}" for a, b in claim.pairs if not _above(measured, a, b)]
    if not claim.published:
        return ("not reproduced", f"not seen: {', '.join(unclear)}") if unclear else ("reproduced", "")
    off = [arm for arm, value in claim.published.items() if not _covers(measured[arm], value, claim.tolerance)]
    if not off:
        return "reproduced", ""
    told = ", ".join(f"{arm or 'measured'} {measured[arm][0]:.4g}, published {claim.published[arm]:.4g}" for arm in off)
    if claim.pairs and not unclear:
        return "order only", told
    return "not reproduced", told + (f"; not seen: {', '.join(unclear)}" if unclear else "")


def _covers(found: tuple[float, float, float], value: float, tolerance: float) -> bool:
    return found[1] - tolerance <= value <= found[2] + tolerance


def _above(measured: Measured, a: str, b: str) -> bool:
    """Whether arm a is above arm b with certainty."""
    if f"{a} - {b}" in measured:
        return measured[f"{a} - {b}"][1] > 0
    if f"{b} - {a}" in measured:
        return measured[f"{b} - {a}"][2] < 0
    return measured[a][1] > measured[b][2]


def of_study(folder: pathlib.Path, arms: Mapping[str, Mapping[str, str]], metric: str = "accuracy") -> Measured:
    """The means over seeds of cells of a study, {arm: {factor: level}}, in percent, and their paired differences.

    Student's intervals over the seeds that both arms have; ValueError where these are fewer than two.
    """
    found, scores = results.load(folder), {}
    for arm, levels in arms.items():
        (cell,) = found.cells_where(levels)
        scores[arm] = {unit: 100 * value for unit, value in found.scores(cell, metric).items()}
    values = {arm: found.interval(list(known.values())) for arm, known in scores.items()}
    for a, b in itertools.permutations(scores, 2):
        both = [(scores[a][unit], scores[b][unit]) for unit in scores[a] if unit in scores[b]]
        if len(both) < 2:
            raise ValueError(f"{a} and {b} have {len(both)} finished seeds in common; expected two or more")
        values[f"{a} - {b}"] = statistics.paired(*zip(*both, strict=True))
    return {name: (row["mean"], row["low"], row["high"]) for name, row in values.items()}


def load(root: pathlib.Path = ROOT) -> dict[str, Claim]:
    """{EXPERIMENT/NAME: claim} of all experiments; ValueError lists all files and claims that are not as expected."""
    found, problems = {}, []
    for path in sorted(root.glob("experiments/*/claims.py")):
        spec = importlib.util.spec_from_file_location(f"claims_of_{path.parent.name}", path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            claims = module.CLAIMS
        except Exception as error:  # of any kind: it is somebody's file
            problems.append(f"{path}: {type(error).__name__}: {error}")
            continue
        for claim in claims:
            name = f"{path.parent.name}/{claim.name}"
            twice = ["its name is taken"] if name in found else []
            empty = [field for field in ("paper", "says", "claimed", "commands") if not getattr(claim, field)]
            problems += [f"{name}: {text}" for text in [*twice, *(f"{field} is empty" for field in empty)]]
            found[name] = claim
    if problems:
        raise ValueError("\n  ".join(["the ledger's claims do not fit:", *problems]))
    return found


def run(
    workdir: pathlib.Path, material: str = "", *, out: pathlib.Path, measure: bool = False, only: str = "",
    root: pathlib.Path = ROOT, stop_requested: Callable[[], bool] = lambda: False,
) -> list[dict[str, str]]:  # fmt: skip
    """Writes out/ledger.md and out/ledger.csv, and returns the rows.

    measure: run the commands whose measurements are missing, of the claims whose names match the regex `only`. A row
    that is not measured in this workdir stays as out/ledger.csv has it, if its command is the same.
    """
    claims, known = load(root), _known_rows(out / "ledger.csv")
    for name, claim in claims.items() if measure else ():
        lacking = _lacking(claim, material)
        if re.search(only, name) and not lacking and not (workdir / claim.key / "measured.json").exists():
            if stop_requested():
                break
            show(f"{name}: {_told(claim)}")
            _carry_out(claim, workdir, material, root)
    rows = [_row(name, claim, workdir, material, known.get(name)) for name, claim in claims.items()]
    out.mkdir(parents=True, exist_ok=True)
    _write(rows, out)
    return rows


def _told(claim: Claim) -> str:
    return " && ".join(" ".join(["python", *words]) for words in claim.commands)


def _lacking(claim: Claim, material: str) -> str:
    """Why a claim cannot be run here; "" where it can."""
    if claim.needs and not material:
        return f"no --material, which has {', '.join(claim.needs)}"
    missing = [path for path in claim.needs if not pathlib.Path(material, path).exists()]
    return f"the material lacks {', '.join(missing)}" if missing else ""


def _carry_out(claim: Claim, workdir: pathlib.Path, material: str, root: pathlib.Path) -> None:
    """Runs the commands of a claim; what they print and how they ended is in its folder. A later call begins again."""
    folder = workdir / claim.key
    folder.mkdir(parents=True, exist_ok=True)
    folders = {"{out}": str(folder.absolute()), "{material}": str(pathlib.Path(material).absolute())}
    began, path = time.monotonic(), os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    for name in ("stdout.txt", "stderr.txt"):
        (folder / name).unlink(missing_ok=True)
    for words in claim.commands:
        words = [re.sub(r"\{(out|material)\}", lambda found: folders[found[0]], word) for word in words]
        with (folder / "stdout.txt").open("a") as out, (folder / "stderr.txt").open("a") as errors:
            how = {"cwd": root, "stdout": out, "stderr": errors, "env": {**os.environ, "PYTHONPATH": path}}
            code = subprocess.run([sys.executable, *words], **how).returncode
        if code:
            show(f"it ended with code {code}, see {folder / 'stderr.txt'}")
            return
    facts = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(root),
        "machine": f"{len(machine.cores())} cores, {platform.machine()}",
    }
    files.write_json(folder / "measured.json", {**facts, "seconds": round(time.monotonic() - began, 1)})


def _commit(root: pathlib.Path) -> str:
    """The commit of the working tree, with a + where it has changes; "unknown" outside of a repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _row(
    name: str, claim: Claim, workdir: pathlib.Path, material: str, known: Mapping[str, str] | None
) -> dict[str, str]:
    """The row of a claim: as measured in this workdir, else as it was known, else why there is none."""
    row = dict.fromkeys(COLUMNS, "") | {
        "claim": name, "paper": claim.paper, "says": claim.says, "published": claim.claimed,
        "tolerance": f"{claim.tolerance:g}", "differs": claim.differs, "key": claim.key,
        "command": _told(claim),
    }  # fmt: skip
    folder = workdir / claim.key
    if (folder / "measured.json").exists():
        facts = files.read_json(folder / "measured.json")
        try:
            measured = claim.measure(folder)
        except Exception as error:  # of any kind: it is somebody's file
            raise ValueError(f"{name}: what its command left in {folder} cannot be read: {error!r}") from error
        verdict, why = judge(claim, measured)
        shown = {arm: f"{value:.4g}" + (f" ({low:.4g} .. {high:.4g})" if high > low else "")
                 for arm, (value, low, high) in measured.items() if arm in claim.arms}  # fmt: skip
        own = {key: str(facts[key]) for key in ("date", "commit", "machine", "seconds")}
        return row | own | {"verdict": verdict, "why": why, "measured": _joined(shown)}
    if known and known.get("measured") and all(known.get(key) == row[key] for key in ("key", "published", "tolerance")):
        return row | {key: known[key] for key in ("measured", "verdict", "why", "date", "commit", "machine", "seconds")}
    lacking = _lacking(claim, material)
    return row | {"verdict": VERDICTS[3] if lacking else VERDICTS[4], "why": lacking}


def _joined(numbers: Mapping[str, str]) -> str:
    return "; ".join(f"{arm} {text}".strip() for arm, text in numbers.items())


def _known_rows(path: pathlib.Path) -> dict[str, dict[str, str]]:
    return {row["claim"]: row for row in csv.DictReader(io.StringIO(path.read_text()))} if path.exists() else {}


def summary(rows: Sequence[Mapping[str, str]]) -> Table:
    """The rows in short, for a console."""
    cells = [(row["claim"], row["verdict"], row["published"], row["measured"] or row["why"]) for row in rows]
    return Table("the ledger", ("claim", "verdict", "published", "measured"), cells, 4)


def _write(rows: Sequence[Mapping[str, str]], out: pathlib.Path) -> None:
    """ledger.csv with all columns, and ledger.md, which a reader can follow."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(out / "ledger.csv", text.getvalue())
    counts = [f"{sum(row['verdict'] == verdict for row in rows)} {verdict}" for verdict in VERDICTS]
    about = [
        f"{len(rows)} claims: {', '.join(counts)}. python launch.py --ledger --run --material FOLDER measures what "
        "is missing and writes this page; nothing in it is written by hand.",
        "Reproduced: each published number lies in the measured 95 % interval, widened by the tolerance; of a claim "
        "without numbers, each difference has the published sign, and its 95 % interval excludes 0. Order only: the "
        "numbers differ, and so much holds of the differences.",
    ]
    heads = ("claim", "verdict", "published", "measured", "how ours differs, and why")
    cells = []
    for row in rows:
        bound = f" ± {row['tolerance']}" if row["tolerance"] != "0" else ""
        how = "; ".join(filter(None, (row["differs"], row["why"])))
        cells.append((row["claim"], row["verdict"], row["published"] + bound, row["measured"], how))
    sources = [f"{row['claim']}: {row['paper']}. {row['says']} {row['command']}" for row in rows]
    cost = ("date", "commit", "machine", "seconds")
    costs = Table("when and where", ("claim", *cost), [tuple(row[key] for key in ("claim", *cost)) for row in rows], 4)
    sections = {
        "": [*about, Table("published and measured", heads, cells, 5)],
        "Papers and commands": [sources],
        "Measurements": [costs],
    }
    files.write_text(out / "ledger.md", tables.to_markdown("Ledger", sections))


def main(argv: Sequence[str]) -> int:
    """Runs a command line with --ledger; returns 0, 2 for bad input, 75 where it was stopped between two commands."""
    stop_requested = preemption.watch()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ledger", action="store_true", required=True, help="compare published claims with measurements")
    add("--run", action="store_true", help="run the commands whose measurements are missing")
    add("--material", default="", help="a folder of data/ and weights/, of which each claim names what it needs")
    add("--only", default="", help="run claims whose names match this regex")
    add("--workdir", default="workdirs/ledger", type=pathlib.Path, help="where commands write and measurements stay")
    add("--out", default="docs", type=pathlib.Path, help="where ledger.md and ledger.csv are written; default: docs")
    args = parser.parse_args(argv)
    try:
        rows = run(
            args.workdir, args.material, out=args.out, measure=args.run, only=args.only, stop_requested=stop_requested
        )
    except (ValueError, OSError) as error:
        show(f"error: {error}", stderr=True)
        return 2
    show(summary(rows))
    return preemption.EXIT_CODE if stop_requested() else 0
