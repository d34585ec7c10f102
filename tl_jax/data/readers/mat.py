"""Feature matrices in MATLAB files (mat:FILE.mat, versions 5 to 7.2), as published for classic transfer learning."""

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tl_jax.core import npz
from tl_jax.core.messages import shorten
from tl_jax.data.examples import Source, check_split
from tl_jax.data.readers.arrays import check_arrays
from tl_jax.data.readers.folder import check_file

FEATURES = ("fts", "feas", "fea", "feat", "feature", "features", "x", "data")  # names of matrices, in any case
LABELS = ("label", "labels", "y", "gnd", "class", "classes")
INTEGERS = (f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
NUMBERS = ("double", "single", "sparse", "logical", *INTEGERS)
# A damaged file can take scipy's reader down, with a signal: it reads in a process of its own. With names, it writes an
# .npz of these variables in their order; without, what there is.
PROGRAM = """
import io, json, sys
import numpy as np, scipy.io
file, names, made = sys.argv[1], json.load(sys.stdin), io.BytesIO()
try:
    if names:
        found = scipy.io.loadmat(file, variable_names=names, spmatrix=False)
        np.savez(made, *(x.toarray() if hasattr(x := found[name], "toarray") else np.asarray(x) for name in names))
    else:
        made.write(json.dumps(scipy.io.whosmat(file)).encode())
except Exception as error:  # on damaged files scipy raises almost any type
    sys.exit(f"{type(error).__name__}: {error}")
sys.stdout.buffer.write(made.getvalue())
"""
HDF5 = b"\x89HDF\r\n\x1a\n"


def load_mat(path: str, split: str) -> Source:
    """The one split `train` of a file with a matrix [N, D] or [D, N], dense or sparse, and a vector of N labels.

    Each is the one variable that has a usual name, such as fts and labels, or else the only one whose shape fits.
    Classes are whole numbers from 0 or from 1 without gaps, named as the file numbers them; other numbers are targets.
    Nothing else of the file is read. Raises FileNotFoundError, or ValueError that lists what the file has.
    """
    file = Path(path).expanduser()
    check_file(file, ".mat")
    check_split(file, split, ["train"])
    with file.open("rb") as stream:
        head = stream.read(520)
    if HDF5 in (head[:8], head[512:]) or head.startswith(b"MATLAB 7.3"):
        fix = "Save it in MATLAB with save(..., '-v7'), or convert it to arrays:FILE.npz with h5py"
        raise ValueError(f"{file} is a MATLAB file of version 7.3 (HDF5), expected version 5 to 7.2. {fix}")
    if not head.startswith(b"MATLAB 5.0"):
        raise ValueError(f"{file} is no MATLAB file of version 5 to 7.2; it begins with {head[:20]!r}")
    labels, features = _choose(file, json.loads(_read(file)))
    found = npz.read(io.BytesIO(_read(file, labels, features)), npz.NUMBERS + "c")
    y, x = found["arr_0"].reshape(-1), found["arr_1"]
    classes, count = None, len(y)
    if (np.abs(y) < 2**31).all() and (y == np.rint(y)).all():
        present = np.unique(y.astype(np.int64))
        first = min(1, present[0])
        if present[0] < 0 or len(present) <= present[-1] - first:
            shown = ", ".join(shorten(present.astype(str).tolist(), 10))
            raise ValueError(f"{file}: {labels} has the classes {shown}; number them from 0 or from 1 without gaps")
        y, classes = y.astype(np.int64) - first, present.astype(str)
    found = {"features": x if len(x) == count else x.T, "label": y}
    return check_arrays(file, f"mat:{path}", split, found, classes)


def _read(file: Path, *names: str) -> bytes:
    """What PROGRAM gives for a file."""
    words = [sys.executable, "-P", "-c", PROGRAM, str(file)]  # no module of the folder that it is started in
    done = subprocess.run(words, capture_output=True, input=json.dumps(names).encode())
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"cannot read {file}: {told or f'code {done.returncode}'}; it may be damaged")
    return done.stdout


def _choose(file: Path, there: Sequence[tuple[str, tuple[int, ...], str]]) -> tuple[str, str]:
    """The names of the labels and of the features; there: name, shape and class of each variable."""

    def only(usual: Sequence[str], candidates: Sequence[str], what: str) -> str:
        """The one candidate with a usual name, or else the only one."""
        named = [name for name in candidates if name.lower() in usual] or candidates
        if len(named) == 1:
            return named[0]
        listing = ", ".join(f"{name} {kind} [{' x '.join(map(str, shape))}]" for name, shape, kind in there)
        problem = f"{len(named)} variables that may be the {what}: {', '.join(named)}" if named else f"no {what}"
        expected = "a matrix of features [N, D] and a vector of N labels, such as fts and labels"
        raise ValueError(f"{file} has {problem}; expected {expected}, found {listing or 'nothing'}")

    usable = {name: shape for name, shape, kind in there if kind in NUMBERS and len(shape) == 2 and min(shape) > 0}
    labels = only(LABELS, [name for name, shape in usable.items() if min(shape) == 1 < max(shape)], "vector of labels")
    count = max(usable[labels])
    fitting = [name for name, shape in usable.items() if name != labels and count in shape]
    return labels, only(FEATURES, fitting, f"matrix of features of {count} examples")
