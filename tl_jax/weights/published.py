"""Weights by name: the table of published files behind `timm:NAME[@REVISION]`, and what they were when first used."""

import csv
import difflib
import functools
import os
import pathlib
import re
from typing import NamedTuple

import filelock

from tl_jax import models
from tl_jax.core import files
from tl_jax.core.card import PIXELS, Card
from tl_jax.core.console import Table, fitted
from tl_jax.core.messages import shorten

PREFIX = "timm:"
TABLE = pathlib.Path(__file__).with_name("published.csv")  # written by tests/make_published.py
RECORDS = "tl_jax_weights.txt"  # beside the hub's cache
SECONDS = 60  # that another process may hold the lock of the records
COMMIT = re.compile("[0-9a-f]{40}")


class File(NamedTuple):
    """One row of the table: a published file and what timm says about it."""

    name: str  # timm's: architecture.tag
    repo: str
    file: str
    model: str  # of ours; a layout of another publisher gives its flavour
    num_classes: int
    input_size: int  # pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop: float
    crop_mode: str  # center, squash or border
    licence: str

    def card(self, own: Card) -> Card:
        """A variant's card, of which every field that the table has is replaced; the others stay."""
        fields = {key: value for key, value in self._asdict().items() if key in ("num_classes", "licence", *PIXELS)}
        return own.replace(**fields)

    def source(self, file: pathlib.Path) -> str:
        """The spec of exactly these bytes; file: as it lies in the hub's cache, in a folder of its commit."""
        return f"hf://{self.repo}/{self.file}@{file.parent.name}"

    def bring(self, revision: str, cache: pathlib.Path) -> str:
        """What to do without a network: the file's place in the hub's cache, or a path and what the table would say."""
        folder = cache / f"models--{self.repo.replace('/', '--')}"
        commit = revision if COMMIT.fullmatch(revision) else "COMMIT"
        place = f"bring {self.file} of the repository {self.repo} to {folder}/snapshots/{commit}/{self.file}"
        if commit != revision:
            place += f" (COMMIT: its revision, 40 hex digits, which {folder}/refs/{revision} must hold as well)"
        default = models.get(self.model).card
        card = self.card(default)
        other = {key: getattr(card, key) for key in PIXELS if getattr(card, key) != getattr(default, key)}
        told = f", data.override_card=True and data.card={other}" if other else ""
        return f"{place}; or put it anywhere and give weights=PATH with model.name={self.model}{told}"


@functools.cache
def table() -> dict[str, File]:
    """All rows by name."""
    with TABLE.open(newline="") as file:
        return {row["name"]: _parse(row) for row in csv.DictReader(file)}


def _parse(row):
    kinds = {"num_classes": int, "input_size": int, "crop": float}
    kinds |= dict.fromkeys(("mean", "std"), lambda text: tuple(map(float, text.split())))
    return File(**{key: kinds.get(key, str)(text) for key, text in row.items()})


def find(spec: str | os.PathLike) -> File | None:
    """The row of a spec `timm:NAME[@REVISION]`, None for a spec of another kind; ValueError names the nearest."""
    text = os.fspath(spec).partition("#")[0]
    if not text.startswith(PREFIX):
        return None
    name = text.removeprefix(PREFIX).partition("@")[0]
    if name not in table():
        alike = [known for known in table() if known.startswith(f"{name.partition('.')[0]}.")]
        near = list(dict.fromkeys([*difflib.get_close_matches(name, table(), n=5, cutoff=0.5), *alike]))
        every = f"`python -m tl_jax inspect {PREFIX}` lists all {len(table())}"
        raise ValueError(f"{spec}: no known file of timm; nearest: {', '.join(shorten(near, 25)) or 'none'}; {every}")
    return table()[name]


def listing(width: int) -> str:
    """All rows for people, in so many columns."""
    rows = [(x.name, x.licence or "unknown", f"{x.input_size}", f"{x.num_classes:,}") for x in table().values()]
    lines = fitted(Table("", ("file", "licence", "pixels", "classes"), rows, 2), width)
    return f"{lines}\n{len(rows)} files; take one as weights={PREFIX}NAME"


class Record(NamedTuple):
    """What a spec was when it was first used."""

    revision: str  # the commit
    sha256: str


def recorded(spec: str, path: pathlib.Path) -> Record | None:
    """The record of a spec in the file of records, None where there is none; ValueError for a damaged line."""
    return next((Record(*rest) for own, *rest in map(str.split, _lines(path)) if own == spec), None)


def _lines(path):
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not re.fullmatch(r"\S+ \S+ [0-9a-f]{64}", line):
            raise ValueError(f"{path}: line {number} is damaged, expected SPEC REVISION SHA256; remove it")
    return lines


def check(spec: str, found: Record, path: pathlib.Path) -> None:
    """Records what a spec is, the first time; ValueError where the record says something else. Safe with processes."""
    known = recorded(spec, path)
    try:
        if not known:
            with filelock.FileLock(f"{path}.lock", timeout=SECONDS):
                known = recorded(spec, path) or found
                others = [line for line in _lines(path) if line.split()[0] != spec]
                files.write_text(path, "".join(f"{line}\n" for line in [*others, " ".join((spec, *known))]))
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        fix = f"let HF_HUB_CACHE be in a folder of yours, or append #sha256={found.sha256}"
        raise OSError(f"{spec}: what it is cannot be recorded ({error}); {fix}") from None
    if known != found:
        raise changed(spec, known, f"revision {found.revision} with sha256 {found.sha256}", path)


def changed(spec: str, known: Record, found: str, path: pathlib.Path) -> ValueError:
    """The error for a spec that is no longer what its record says."""
    expected = f"expected revision {known.revision} with sha256 {known.sha256}, as {path} recorded at its first use"
    stay = "" if "@" in spec else f"; the one that was recorded is {spec}@{known.revision}"
    return ValueError(f"{spec}: found {found}, {expected}. To accept the new one, remove its line there{stay}")
