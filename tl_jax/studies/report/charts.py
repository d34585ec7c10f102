"""Charts of plain numbers. order: all names that share the colours, so that each keeps its own in every figure.

Those of a report return their points, see `_places`, so that a page can tell what is under the pointer.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator

from tl_jax.core.plotting import BLUE, GREY, MARKERS, PALETTE, figure_at, short
from tl_jax.studies.report.statistics import UNBOUNDED, mean_interval

INK = "#222222"
LINES = len(PALETTE)  # more than its colours cannot be told apart
NAMED = 16  # names of a Pareto figure that are all shown; of more, those of the Pareto front
WHITE_EDGE = {"markeredgecolor": "white", "markeredgewidth": 0.6}
TOLD = 100  # points of a line that are told, spread evenly over those it has

Places = list[tuple[float, float, str]]


def look(name: str, order: Sequence[str]) -> dict:
    """Colour and marker of a name among all those that it is told apart from."""
    place = order.index(name)
    return {"color": PALETTE[place % LINES], "marker": MARKERS[place % len(MARKERS)]}


def _legend(figure, axes, title, names=()):
    """The lines of the axes, each once, those of `names` first."""
    handles = dict.fromkeys(names)
    for axis in reversed(axes):
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    found = [(handle, label) for label, handle in handles.items() if handle]
    style = {"loc": "outside right upper", "fontsize": 8, "title_fontsize": 8}
    figure.legend(*zip(*found, strict=True), title=title or None, **style)


def _places(figure, told: Sequence[tuple]) -> Places:
    """Where the points (axis, x, y, *lines of text) of a figure that was written lie: (right, down, text).

    right and down are shares of its width and height, from the top left.
    """
    found = []
    for axis, x, y, *texts in told:
        right, up = axis.transData.transform((x, y)) / figure.bbox.size
        lines = (" ".join(short(text, 200).split()) for text in texts)
        if np.isfinite([right, up]).all():
            found.append((round(float(right), 4), round(1 - float(up), 4), "\n".join(filter(None, lines))))
    return found


def _value(mark: Mapping) -> str:
    form = ".4f" if abs(mark["mean"]) < 1e4 else ".4g"
    interval = "" if mark.get("low") is None else f", 95 % interval {mark['low']:{form}} to {mark['high']:{form}}"
    return f"{mark['mean']:{form}}{interval}"


def dots(path, rows: Sequence[str], series: Mapping[str, Sequence[dict]], label: str, *, order: Sequence[str] = (),
         legend="", reference=None, paired: tuple[Sequence[dict], str] | None = None) -> Places:  # fmt: skip
    """A row of marks {"mean", "low", "high", "values", "sure", "text"} each; `series` stand side by side.

    Not `sure` is hollow, and `text` stands where there is no mean. `reference`: x of a vertical line. `paired`: further
    marks of the rows and their label, differences from 0 in a panel of their own.
    """
    several, told = len(series) > 1, []
    height = min(0.9 + len(rows) * (0.14 + max(0.2 * len(series), 0.24)), 40)
    panels = [(series, label, reference), *([({"": paired[0]}, paired[1], 0)] if paired else [])]
    width = 9.6 if paired else 6.4 if several else 7.0
    with figure_at(path, (width, height), columns=len(panels)) as (figure, axes):
        for axis, (shown, text, at) in zip(axes, panels, strict=True):
            told += _dot_panel(axis, rows, shown, text, order, legend, at)
        if paired:
            axes[1].set_yticks([])
        if several:
            _legend(figure, axes[:1], legend)
    return _places(figure, told)


def _dot_panel(axis, rows, series, label, order, legend, reference) -> list[tuple]:
    several, step, told = len(series) > 1, 0.8 / len(series), []
    if reference is not None:
        axis.axvline(reference, color=GREY, linewidth=1)
    for i, (name, marks) in enumerate(series.items()):
        style = look(name, order or list(series)) if several else {"color": BLUE, "marker": "o"}
        for row, mark in enumerate(marks):
            y = row + (i - (len(series) - 1) / 2) * step
            _dot(axis, y, mark, style, step, written=not several)
            if mark["mean"] is not None:
                names = rows[row], f"{legend}={name}" if several else "", label.removesuffix(", 95 % interval")
                told.append((axis, mark["mean"], y, *names, _value(mark)))
        axis.plot([], [], linestyle="", **style, markersize=6, label=short(name, 30))
    axis.set_yticks(range(len(rows)), [short(name, 40) for name in rows])
    axis.set(xlabel=label, ylim=(len(rows) - 0.45, -0.55))
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.grid(True, axis="x")
    axis.spines["left"].set_visible(False)
    for row in range(1, len(rows)) if several else ():
        axis.axhline(row - 0.5, color="#E6E6E6", linewidth=0.6)
    return told


def _dot(axis, y, mark, style, step, written):
    at_edge = {"transform": axis.get_yaxis_transform(), "va": "center"}
    if mark["mean"] is None:
        axis.text(0.01, y, mark["text"], fontsize=7.5, color=GREY, **at_edge)
        return
    text, colour = f"{mark['mean']:.4f}", style["color"]
    if mark["low"] is not None:
        axis.plot([mark["low"], mark["high"]], [y, y], color=colour, linewidth=2, solid_capstyle="round")
        text += f"  [{mark['low']:.4f}, {mark['high']:.4f}]"
    if len(mark["values"]) > 1:
        below = [y + 0.3 * step] * len(mark["values"])
        axis.plot(mark["values"], below, "o", color=colour, markersize=2.6, alpha=0.45, markeredgewidth=0)
    edge = WHITE_EDGE if mark.get("sure", True) else {"markeredgecolor": colour, "markeredgewidth": 1.3}
    face = colour if mark.get("sure", True) else "white"
    axis.plot(mark["mean"], y, style["marker"], color=face, markersize=6.5, zorder=3, **edge)
    if written:
        axis.text(1.01, y, f" {text}{mark['text']}", fontsize=8, **at_edge)


def comparison(path, named: Mapping[str, Sequence[float] | Mapping], label: str, bounds=UNBOUNDED,
               difference: Mapping | None = None) -> None:  # fmt: skip
    """A row for each name: a list of numbers, one per seed, or {"value", "low", "high"} of `tasks.summarize`.

    bounds: the ends of the scale, for the intervals over seeds. difference: the paired one of the two names, {"mean",
    "low", "high", "values"}; it stands beside them.
    """
    if not named:
        raise ValueError("nothing to compare: expected at least one name with its numbers")
    marks = []
    for name, entry in named.items():
        if isinstance(entry, Mapping):
            if None in entry.values():
                raise ValueError(f"{name!r}: the metric is undefined there, found {entry}")
            marks.append({**entry, "mean": entry["value"], "values": (), "text": ""})
        elif np.ndim(entry) != 1 or not len(entry) or not np.isfinite(entry).all():
            raise ValueError(f"{name!r}: expected a list of finite numbers, found {entry!r}")
        else:
            marks.append({**mean_interval(entry, bounds=bounds), "values": entry, "text": ""})
    paired = None
    if difference:
        paired = [{**difference, "text": ""}, {"mean": None, "text": ""}], f"{' - '.join(named)}, paired, 95 % interval"
    dots(path, list(named), {"": marks}, f"{label}, 95 % interval", paired=paired)


def lines(path, panels: Mapping[str, Mapping[str, dict]], x_label: str | Sequence[str], y_label: str, *,
          order: Sequence[str], legend="", log=False, ticks=None, bars=False) -> Places:  # fmt: skip
    """Lines of means with their intervals, a panel each for {title: {line: {"x", "mean", "low", "high"}}}.

    x_label: of the panels at the bottom, or one for each. A line may have "circle", a point (x, y) to mark. ticks: [(x,
    text)]. bars: intervals as bars, the lines set apart a little, instead of bands.
    """
    columns, told = 2 if len(panels) == 4 else min(len(panels), 3), []
    rows, several = -(-len(panels) // columns), len(order) > 1
    labels = [""] * (len(panels) - columns) + [x_label] * columns if isinstance(x_label, str) else x_label
    width, height = (5.2, 3.5) if len(panels) == 1 else (2.5 * columns, 2.3 * rows + 0.2)
    with figure_at(path, (width + 1.5 * several, height), rows=rows, columns=columns) as (figure, axes):
        shown = axes[: len(panels)]
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, panel), text in zip(shown, panels.items(), labels, strict=True):
            for name, line in panel.items():
                at, names = _line(axis, name, order, line, bars), (title, f"{legend}={name}" if legend else name)
                told += _points(axis, at, names, line, (text or x_label, y_label), ticks)
            axis.set_title(short(title, 34), fontsize=9)
            axis.grid(True)
            if log:
                axis.set_xscale("log")
                axis.minorticks_off()
            if ticks:
                axis.set_xticks([x for x, _ in ticks], [short(text, 16) for _, text in ticks])
        low, high = zip(*(axis.get_ylim() for axis in shown), strict=True)
        for i, axis in enumerate(shown):
            axis.set(ylim=(min(low), max(high)), xlabel=labels[i], ylabel=y_label if i % columns == 0 else "")
        if several:
            _legend(figure, shown, legend, [short(name, 30) for name in order])
    return _places(figure, told)


def _points(axis, at, names, line, labels, ticks=()) -> list[tuple]:
    """What is told of the points of a line whose points lie at x `at`; labels: of x and y."""
    told, count = [], len(at)
    for i in np.unique(np.linspace(0, count - 1, min(count, TOLD)).astype(int)):
        mark = {name: line[name][i] for name in ("mean", "low", "high") if name in line}
        x = dict(ticks or ()).get(line["x"][i], f"{line['x'][i]:g}")
        examples = f"{line['count'][i]:,.0f} examples" if "count" in line else ""
        numbers = f"{labels[0]}: {x}", f"{labels[1]}: {_value(mark)}", examples
        told.append((axis, at[i], mark["mean"], *names, *numbers))
    return told


def rate_ticks(rates: Sequence[float]) -> list[tuple[float, str]]:
    """The powers of ten among rates, or the rates themselves where these are few."""
    low, high = (math.log10(end(rates)) for end in (min, max))
    powers = [10.0**e for e in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
    return [(x, f"{x:g}") for x in (sorted({*rates}) if len({*rates}) <= 5 else powers)]


def _line(axis, name, order, line, bars=False) -> np.ndarray:
    """Returns x of the points as they lie, apart where intervals are bars."""
    style, numbers = look(name, order), {key: np.asarray(values, float) for key, values in line.items()}
    x = numbers["x"]
    if bars:
        x = x + (order.index(name) - (len(order) - 1) / 2) * min(0.06, 0.4 / len(order))
        axis.vlines(x, numbers["low"], numbers["high"], color=style["color"], linewidth=1.5, alpha=0.7)
    elif "low" in line:
        axis.fill_between(x, numbers["low"], numbers["high"], color=style["color"], alpha=0.16, linewidth=0)
    style |= {"marker": ""} if len(x) > 15 and "circle" not in line else {}
    axis.plot(x, numbers["mean"], **style, **WHITE_EDGE, linewidth=1.5, markersize=5.5, label=short(name, 30))
    if "circle" in line:
        axis.plot(*numbers["circle"], "o", color=INK, markersize=12, fillstyle="none")
    return x


def pareto(
    path, points: Sequence[dict], best: Sequence[int], labels: tuple[str, str], *, order: Sequence[str], legend=""
) -> Places:
    """Score against a cost (log); the points of the Pareto set `best` are joined and named. labels: of x and y.

    A point is {"x", "mean", "low", "high", "name", "group"}; those of a group share a colour. Those of a name are
    joined by a dotted line, and the cheapest has the name. x may be 0.
    """
    positive, several = [point["x"] for point in points if point["x"] > 0], len(order) > 1
    at_zero = min(positive) / 4
    points = [{**point, "x": point["x"] or at_zero, "cost": point["x"]} for point in points]
    joined, named = [points[i] for i in best], {}
    for point in sorted(points, key=lambda point: point["x"]):
        named.setdefault(point["name"], []).append(point)
    with figure_at(path, (6.8 if several else 5.6, 3.9)) as (figure, (axis,)):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if max(positive) < 12 * min(positive):  # hardly a power of ten between them
            axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axis.xaxis.set_minor_formatter(EngFormatter(sep=""))
            axis.tick_params(axis="x", which="minor", labelsize=7)
        axis.step([point["x"] for point in joined], [point["mean"] for point in joined], where="post",
                  color="#B8B8B8", linewidth=1.4, zorder=1, label="Pareto front")  # fmt: skip
        for point in points:
            style, x = look(point["group"], order), point["x"]
            if point["low"] is not None:
                axis.plot([x, x], [point["low"], point["high"]], color=style["color"], linewidth=1.6, alpha=0.55)
            axis.plot(x, point["mean"], linestyle="", **style, markersize=6.5, markeredgecolor="white", zorder=3)
        for group in order if several else ():
            axis.plot([], [], linestyle="", **look(group, order), label=short(group, 30))
        middle = math.sqrt(min(point["x"] for point in points) * max(point["x"] for point in points))
        for its in named.values():
            axis.plot([point["x"] for point in its], [point["mean"] for point in its], ":", color=GREY, linewidth=0.9)
        cheapest = [its[0] for its in named.values()]
        for point in cheapest if len(cheapest) <= NAMED else joined:
            side = {"xytext": (6, 5), "ha": "left"} if point["x"] < middle else {"xytext": (-6, 5), "ha": "right"}
            style = {"fontsize": 7.5, "color": INK, "textcoords": "offset points", **side}
            axis.annotate(short(point["name"], 34), (point["x"], point["mean"]), **style)
        if len(positive) < len(points):
            axis.axvspan(at_zero / 1.6, at_zero * 1.6, color="#F2F2F2", zorder=0)
            axis.text(at_zero, 0.02, "0", transform=axis.get_xaxis_transform(), ha="center", color=GREY)
        axis.set(xlabel=labels[0], ylabel=labels[1])
        axis.margins(x=0.12, y=0.12)
        axis.grid(True)
        if several:
            _legend(figure, [axis], legend)
    told = []
    for point in points:
        names = (
            f"{legend}={point['group']}" if point["group"] else "",
            point["name"],
            f"{labels[0]}: {point['cost']:,.6g}",
        )
        told.append((axis, point["x"], point["mean"], *names, f"{labels[1]}: {_value(point)}"))
    return _places(figure, told)


def reliability(path, series: Mapping[str, dict], *, axes: tuple[str, str], order: Sequence[str], legend="") -> Places:
    """Observed against expected share, called `axes`, a line each for {"count", "observed", "expected"} of bins."""
    told = []
    with figure_at(path, (5.6 if len(series) > 1 else 4.0, 3.8)) as (figure, (axis,)):
        axis.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        for name, bins in series.items():
            seen = bins["count"] >= max(1, 0.005 * bins["count"].sum())  # a bin of a few examples is noise
            line = {"x": bins["expected"][seen], "mean": bins["observed"][seen], "count": bins["count"][seen]}
            told += _points(axis, _line(axis, name, order, line), [f"{legend}={name}"], line, axes[::-1])
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel=axes[1], ylabel=axes[0])
        axis.grid(True)
        if len(series) > 1:
            _legend(figure, [axis], legend)
    return _places(figure, told)


def ranks(path, names: Sequence[str], mean_ranks: Sequence[float], distance: float, groups: Sequence[tuple]) -> Places:
    """A critical-difference diagram (Demsar 2006, figure 1): the best rank stands left, bars join the alike."""
    count, order = len(names), np.argsort(mean_ranks, kind="stable").tolist()
    left, levels = -(-count // 2), 0.5 + 0.28 * len(groups)
    depth = levels + 0.45 * left
    with figure_at(path, (6.8, 0.85 + 0.42 * depth)) as (figure, (axis,)):
        axis.axis("off")
        axis.set(xlim=(1 - 0.35 * (count - 1), count + 0.35 * (count - 1)), ylim=(-depth - 0.2, 1.35))
        line, above = {"color": INK, "linewidth": 1}, {"ha": "center", "va": "bottom", "fontsize": 8}
        axis.plot([1, count], [0, 0], **line)
        for rank in range(1, count + 1):
            axis.plot([rank, rank], [0, 0.14], **line)
            axis.text(rank, 0.22, str(rank), color=GREY, **above)
        end = min(1 + distance, axis.get_xlim()[1])
        axis.plot([1, end], [0.95, 0.95], color=GREY, linewidth=1.6)
        axis.text((1 + end) / 2, 1.02, f"critical difference {distance:.2f}", **above)
        for place, index in enumerate(order):
            near = place < left
            y = -levels - 0.45 * (place if near else count - 1 - place)
            x, edge = mean_ranks[index], (1 - 0.05 * (count - 1) if near else count + 0.05 * (count - 1))
            axis.plot([x, x, edge], [0, y, y], **line)
            text = f"{short(names[index], 26)}  {x:.2f} " if near else f" {x:.2f}  {short(names[index], 26)}"
            axis.text(edge, y, text, ha="right" if near else "left", va="center")
        for depth_of, group in enumerate(groups):
            ends = [mean_ranks[index] for index in group]
            y, slack = -0.28 * (depth_of + 1), 0.02 * (count - 1)
            axis.plot([min(ends) - slack, max(ends) + slack], [y, y], color=BLUE, linewidth=4, solid_capstyle="round")
    told = zip(mean_ranks, names, strict=True)
    return _places(figure, [(axis, rank, 0, name, f"mean rank: {rank:.3f}") for rank, name in told])
