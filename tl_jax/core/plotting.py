"""What all figures share: a colour-blind-safe palette, a style, and the writing of a figure to .png or .svg."""

import contextlib
import contextvars
import pathlib

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from tl_jax.core import files

# Okabe and Ito 2008, with grey for their yellow (too faint on white); blue and vermilion carry the two-colour plots
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C", "#000000")
BLUE, VERMILION, GREY = PALETTE[0], PALETTE[1], "#6B6B6B"
BLUES = LinearSegmentedColormap.from_list("blues", ["#FFFFFF", "#9CCBE8", BLUE, "#00304D"])
MARKERS = "osD^v"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#222222",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "text.parse_math": False,  # class names may hold dollar signs
    "svg.fonttype": "none",
    "svg.hashsalt": "tl_jax",
}
_ABOVE = contextvars.ContextVar("above", default="")


@contextlib.contextmanager
def headed(text):
    """All figures that are made inside have this line above them, or the end of it."""
    token = _ABOVE.set(end_of(text, 60))
    try:
        yield
    finally:
        _ABOVE.reset(token)


def printable(name):
    """A name, of a folder for example, that need not be UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def short(name, limit=22):
    name = printable(name)
    return name if len(name) <= limit else name[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def end_of(name, limit):
    """The last characters of a path, as much as fits."""
    name = printable(name)
    return name if len(name) <= limit else "\N{HORIZONTAL ELLIPSIS}" + name[1 - limit :]


def _files(path) -> list[pathlib.Path]:
    path = pathlib.Path(path)
    if path.suffix not in (".png", ".svg", ""):
        raise ValueError(f"{path}: figures are written as .png or .svg, or both where there is no suffix")
    return [path] if path.suffix else [path.with_suffix(".png"), path.parent / "svg" / f"{path.name}.svg"]


@contextlib.contextmanager
def figure_at(path, size, rows=1, columns=1, ratios=None):
    """Yields a styled figure of `size` inches and its axes; on leaving, writes it whole to .png (150 dpi) or .svg.

    A path without suffix is written as both, PATH.png and svg/PATH.svg beside it.
    """
    paths = _files(path)
    grid = {"height_ratios" if rows > 1 else "width_ratios": ratios}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        if _ABOVE.get():
            figure.suptitle(_ABOVE.get(), x=0.01, ha="left", fontsize=8, color=GREY)
        yield figure, figure.subplots(rows, columns, squeeze=False, **grid).ravel()
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            with files.atomic_write(path) as file:
                metadata = {"Date": None} if path.suffix == ".svg" else None
                figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=metadata)
            figure.set_layout_engine("none")  # a second file is laid out as the first


def sheet(path, pictures, captions, columns=6, title=""):
    """Pictures side by side, each with the lines of its caption above it."""
    columns = min(len(pictures), columns)
    rows, lines = -(-len(pictures) // columns), max(len(caption) for caption in captions)
    with figure_at(path, (1.5 * columns, (1.42 + 0.11 * lines) * rows + 0.2), rows, columns) as (figure, axes):
        for axis in axes:
            axis.axis("off")
            axis.set_anchor("NW")  # captions side by side, whatever the sides of the pictures
        for axis, picture, caption in zip(axes, pictures, captions, strict=False):
            axis.imshow(picture)
            axis.set_title("\n".join(caption), fontsize=6, loc="left")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=8, color=GREY)
