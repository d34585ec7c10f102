"""Labels that nobody may read yet, and the ledger of every opening of a label array."""

import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_jax.core import checks, files

FILE = "ledger.json"
FIELDS = {"starts": checks.integer(0), "openings": checks.sequence(checks.TABLE, "a list of openings")}
POISONS = ("permuted", "none")  # what may stand in place of sealed labels, to prove that nobody reads them


class Sealed(ValueError):
    """Sealed labels were read before they were opened."""


class SealedLabels:
    """The labels of N examples, in place of their array, until `open`: whatever reads one of them raises `Sealed`.

    Their number and kind ("classes", "multilabel" or "targets") are no secret. poison: "permuted", or "none": all -1.
    """

    def __init__(self, values: np.ndarray, poison: str = ""):
        self.kind = kind_of(values)
        if poison:
            values = np.random.default_rng(0).permutation(values) if poison == "permuted" else np.full_like(values, -1)
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def select(self, indices: np.ndarray) -> "SealedLabels":
        return SealedLabels(self._values[indices])

    def open(self) -> np.ndarray:
        """The array; -1, which no class has, is given as class 0: the scores of a poisoned run mean nothing."""
        return self._values if self.kind == "targets" else np.maximum(self._values, 0)

    def _refuse(self, *_, **__):
        raise Sealed(
            f"the {len(self)} labels of an unlabelled domain are read before they are opened; expected no reader of "
            "them until every selector has written its choice. See docs/domains.md on sealed labels"
        )

    astype = tolist = max = min = _refuse
    __getitem__ = __array__ = __iter__ = __eq__ = __ne__ = __contains__ = _refuse
    __hash__ = None

    @property
    def dtype(self):
        return self._refuse()

    shape = ndim = dtype


def kind_of(labels: "np.ndarray | SealedLabels") -> str:
    """ "classes", "multilabel" or "targets"."""
    if isinstance(labels, SealedLabels):
        return labels.kind
    return "targets" if labels.dtype.kind == "f" else "classes" if labels.ndim == 1 else "multilabel"


def select(labels: "np.ndarray | SealedLabels", indices: np.ndarray) -> "np.ndarray | SealedLabels":
    return labels.select(indices) if isinstance(labels, SealedLabels) else labels[indices]


def join(parts: Sequence) -> "np.ndarray | SealedLabels":
    """Labels end to end, sealed where some are."""
    if not any(isinstance(part, SealedLabels) for part in parts):
        return np.concatenate(parts)
    return SealedLabels(np.concatenate([p._values if isinstance(p, SealedLabels) else p for p in parts]))


def canonical(source: str) -> str:
    """The name by which a source is sealed: paths to one place are one, and a corrupted source is the clean one."""
    while source.startswith("corrupt:") and source.count(":") > 2:  # corrupt:NAME:SEVERITY:SOURCE
        source = source.split(":", 3)[-1]
    kind, _, path = source.partition(":")
    there = os.path.expanduser(path)
    return f"{kind}:{os.path.realpath(there)}" if path and os.path.exists(there) else source


class Ledger:
    """Which label arrays were opened by whom, and when: `ledger.json` of each run that shares them.

    sealed: names of the streams and sets whose labels are sealed. unsealed: {name: why} of unlabelled ones that cannot
    be. A row: stream, data, examples, sha256 of the labels, by, phase ("load", "score" or "selection"), step, and
    `start`, which counts the starts of the run; those of earlier starts stay.
    """

    def __init__(self, sealed: Sequence[str] = (), unsealed: dict[str, str] | None = None):
        self.sealed, self.unsealed = tuple(sealed), unsealed or {}
        self.rows: list[dict[str, Any]] = []
        self._earlier: dict[pathlib.Path, dict[str, Any]] = {}  # what earlier starts wrote

    def begin(self, folder: pathlib.Path) -> None:
        """Writes into a run's folder from now on, after the rows of its earlier starts."""
        path = folder / FILE
        self._earlier[path] = files.read_json(path, FIELDS) if path.exists() else {"starts": 0, "openings": []}
        self._write(path)

    def open(self, stream: str, source: Any, by: str, phase: str, step: int) -> np.ndarray:
        """The labels of a source, after the opening was written down."""
        labels = source.labels.open() if isinstance(source.labels, SealedLabels) else source.labels
        self.note(stream, source.name, labels, by, phase, step)
        return labels

    def note(self, stream: str, data: str, labels: np.ndarray, by: str, phase: str, step: int = 0) -> None:
        sha256 = hashlib.sha256(np.ascontiguousarray(labels)).hexdigest()
        row = {"stream": stream, "data": data, "examples": len(labels), "sha256": sha256, "by": by, "phase": phase}
        if (row := {**row, "step": step}) not in self.rows:
            self.rows.append(row)
            self._write()

    def _write(self, *paths: pathlib.Path) -> None:
        for path in paths or self._earlier:
            earlier = self._earlier[path]
            start = earlier["starts"]
            rows = [*earlier["openings"], *({**row, "start": start} for row in self.rows)]
            told = {"sealed": self.sealed, "unsealed": self.unsealed, "starts": start + 1, "openings": rows}
            files.write_json(path, told)
