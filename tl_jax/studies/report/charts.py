"""Charts of plain numbers in the palette of the plots: dots with intervals, lines with bands, a front, mean ranks."""

from collections.abc import Mapping, Sequence

import numpy as np

from tl_jax.core.plotting import BLUE, GREY, MARKERS, PALETTE, figure_at, short

INK = "#222222"
LINES = len(PALETTE)  # more than its colours cannot be told apart


def dots(path, rows: Sequence[str], series: Mapping[str, Sequence[dict]], label: str, *, order: Sequence[str] = (),
         legend="", reference=None):  # fmt: skip
    """A mean with its interval and its single values, a row each, and several `series` side by side in a row.

    A mark is {"mean", "low", "high", "values", "sure", "text"}: not `sure` is drawn hollow, and `text` stands where
    there is no mean. `order`: all names that share the colours, so that one keeps its own in every figure.
    `reference`: x of a vertical line. One series has its numbers written beside it.
    """
    several = len(series) > 1
    step = 0.8 / len(series)
    height = min(0.9 + len(rows) * (0.14 + max(0.2 * len(series), 0.24)), 40)
    with figure_at(path, (6.4 if several else 7.0, height)) as (figure, (axis,)):
        if reference is not None:
            axis.axvline(reference, color=GREY, linewidth=1)
        for i, (name, marks) in enumerate(series.items()):
            colour, marker = look(name, order or list(series)) if several else (BLUE, "o")
            for row, mark in enumerate(marks):
                y = row + (i - (len(series) - 1) / 2) * step
                _dot(axis, y, mark, colour, marker, step, written=not several)
            axis.plot([], [], marker, color=colour, markersize=6, label=short(name, 30))
        axis.set_yticks(range(len(rows)), [short(name, 40) for name in rows])
        axis.set(xlabel=label, ylim=(len(rows) - 0.45, -0.55))
        axis.tick_params(axis="y", length=0, labelcolor=INK)
        axis.grid(True, axis="x")
        axis.spines["left"].set_visible(False)
        for row in range(1, len(rows)) if several else ():
            axis.axhline(row - 0.5, color="#E6E6E6", linewidth=0.6)
        if several:
            _legend(figure, axis, legend)


def look(name: str, order: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a name among all those that it is told apart from."""
    place = order.index(name)
    return PALETTE[place % LINES], MARKERS[place % len(MARKERS)]


def _dot(axis, y, mark, colour, marker, step, written):
    if mark["mean"] is None:
        axis.text(0.01, y, mark["text"], transform=axis.get_yaxis_transform(), va="center", fontsize=7.5, color=GREY)
        return
    text = f"{mark['mean']:.4f}"
    if mark["low"] is not None:
        axis.plot([mark["low"], mark["high"]], [y, y], color=colour, linewidth=2, solid_capstyle="round")
        text += f"  [{mark['low']:.4f}, {mark['high']:.4f}]"
    if len(mark["values"]) > 1:
        below = [y + 0.3 * step] * len(mark["values"])
        axis.plot(mark["values"], below, "o", color=colour, markersize=2.6, alpha=0.45, markeredgewidth=0)
    sure = mark.get("sure", True)
    edge = {"markeredgecolor": "white" if sure else colour, "markeredgewidth": 0.6 if sure else 1.3}
    axis.plot(mark["mean"], y, marker, color=colour if sure else "white", markersize=6.5, zorder=3, **edge)
    if written:
        axis.text(1.01, y, f" {text}{mark['text']}", transform=axis.get_yaxis_transform(), va="center", fontsize=8)


def _legend(figure, axis, title):
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, title=title or None, loc="outside right upper", fontsize=8, title_fontsize=8)


def lines(path, panels: Mapping[str, Mapping[str, dict]], x_label: str, y_label: str, *, order: Sequence[str],
          legend="", log=False, ticks=None, bars=False):  # fmt: skip
    """Lines of means with their intervals, a panel each for {title: {line: {"x", "mean", "low", "high"}}}.

    order: all names of lines, for their colours. ticks: [(x, text)], which a logarithmic axis needs. bars: intervals as
    bars, the lines set apart a little, instead of bands.
    """
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    several = len(order) > 1
    size = (5.2, 3.5) if len(panels) == 1 else (2.5 * columns, 2.3 * rows + 0.2)
    with figure_at(path, (size[0] + 1.5 * several, size[1]), rows=rows, columns=columns) as (figure, axes):
        for axis, (title, panel) in zip(axes, panels.items(), strict=False):
            for name, line in panel.items():
                _line(axis, name, order, line, bars)
            axis.set_title(short(title, 34), fontsize=9)
            axis.grid(True)
            if log:
                axis.set_xscale("log")
                axis.minorticks_off()
            if ticks:
                axis.set_xticks([x for x, _ in ticks], [short(text, 16) for _, text in ticks])
        shown = axes[: len(panels)]
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        low, high = (pick(axis.get_ylim()[end] for axis in shown) for end, pick in ((0, min), (1, max)))
        for i, axis in enumerate(shown):
            axis.set(ylim=(low, high), xlabel=x_label if i + columns >= len(panels) else "")
            axis.set_ylabel(y_label if i % columns == 0 else "")
        if several:
            _all_handles(figure, shown, order, legend)


def _line(axis, name, order, line, bars):
    colour, marker = look(name, order)
    x, mean = np.asarray(line["x"], float), np.asarray(line["mean"], float)
    low, high = (np.array(line[end], dtype=float) for end in ("low", "high"))
    style = {"color": colour, "linewidth": 1.5, "label": short(name, 30), "marker": marker, "markersize": 5.5}
    if len(x) > 15:
        style["marker"] = ""
    if bars:
        x = x + (order.index(name) - (len(order) - 1) / 2) * min(0.06, 0.4 / len(order))
        axis.vlines(x, low, high, color=colour, linewidth=1.5, alpha=0.7)
    else:
        axis.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    axis.plot(x, mean, **style, markeredgecolor="white", markeredgewidth=0.6)


def _all_handles(figure, axes, names, title):
    """A legend of every line that occurs in some panel, in the order of their colours."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = [label for label in dict.fromkeys(short(name, 30) for name in names) if label in found]
    handles = [found[label] for label in labels]
    figure.legend(handles, labels, title=title or None, loc="outside right upper", fontsize=8, title_fontsize=8)


def front(path, points: Sequence[dict], on_front: Sequence[int], label: str, *, order: Sequence[str], legend=""):
    """Score against trainable parameters (log); the points of the Pareto front are joined and named.

    A point is {"x", "mean", "low", "high", "name", "group"}; those of a group share a colour, by their place in
    `order`. Zero parameters have their own place at the left end.
    """
    positive = [point["x"] for point in points if point["x"] > 0]
    at_zero = min(positive) / 4
    several = len(order) > 1
    with figure_at(path, (6.8 if several else 5.6, 3.9)) as (figure, (axis,)):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(_compact)
        if max(positive) < 12 * min(positive):  # hardly a power of ten between them
            axis.xaxis.set_minor_formatter(_compact)
            axis.tick_params(axis="x", which="minor", labelsize=7)
        best = [points[i] for i in on_front]
        axis.step([point["x"] or at_zero for point in best], [point["mean"] for point in best], where="post",
                  color="#B8B8B8", linewidth=1.4, zorder=1, label="Pareto front")  # fmt: skip
        for point in points:
            (colour, marker), x = look(point["group"], order), point["x"] or at_zero
            if point["low"] is not None:
                axis.plot([x, x], [point["low"], point["high"]], color=colour, linewidth=1.6, alpha=0.55)
            axis.plot(x, point["mean"], marker, color=colour, markersize=6.5, markeredgecolor="white", zorder=3)
        for group in order if several else ():
            colour, marker = look(group, order)
            axis.plot([], [], marker, color=colour, label=short(group, 30))
        named = points if len(points) <= 8 else best
        for i, point in enumerate(named):
            right = i < len(named) / 2
            axis.annotate(
                short(point["name"], 34),
                (point["x"] or at_zero, point["mean"]),
                fontsize=7.5,
                color=INK,
                xytext=(6 if right else -6, 5),
                textcoords="offset points",
                ha="left" if right else "right",
            )
        if len(positive) < len(points):
            axis.axvspan(at_zero / 1.6, at_zero * 1.6, color="#F2F2F2", zorder=0)
            axis.text(at_zero, 0.02, "0", transform=axis.get_xaxis_transform(), ha="center", color=GREY)
        axis.set(xlabel="trainable parameters", ylabel=label)
        axis.margins(x=0.12, y=0.12)
        axis.grid(True)
        if several:
            _legend(figure, axis, legend)


def _compact(value: float, _=None) -> str:
    """Round numbers as 10k, 2M."""
    power = next((power for power in (9, 6, 3) if value >= 10**power), 0)
    return f"{value / 10**power:g}{' kMG'[power // 3].strip()}"


def reliability(path, series: Mapping[str, dict], *, axes: tuple[str, str], order: Sequence[str], legend="") -> None:
    """Observed against expected share, a line each for {"count", "observed", "expected"} of equal bins.

    axes: what the two shares are called.
    """
    with figure_at(path, (5.6 if len(series) > 1 else 4.0, 3.8)) as (figure, (axis,)):
        axis.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        for name, bins in series.items():
            seen = bins["count"] >= max(1, 0.005 * bins["count"].sum())  # a bin of a few examples is noise
            colour, marker = look(name, order)
            style = {"color": colour, "marker": marker, "markersize": 5.5, "linewidth": 1.5}
            axis.plot(bins["expected"][seen], bins["observed"][seen], **style, markeredgecolor="white",
                      markeredgewidth=0.6, label=short(name, 30))  # fmt: skip
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel=axes[1], ylabel=axes[0])
        axis.grid(True)
        if len(series) > 1:
            _legend(figure, axis, legend)


def ranks(path, names: Sequence[str], mean_ranks: Sequence[float], distance: float, groups: Sequence[tuple]) -> None:
    """A critical-difference diagram (Demsar 2006, figure 1): the best rank stands left, bars join the alike."""
    count = len(names)
    order = np.argsort(mean_ranks, kind="stable").tolist()
    left, levels = -(-count // 2), 0.5 + 0.28 * len(groups)
    depth = levels + 0.45 * left
    with figure_at(path, (6.8, 0.85 + 0.42 * depth)) as (_, (axis,)):
        axis.axis("off")
        axis.set(xlim=(1 - 0.35 * (count - 1), count + 0.35 * (count - 1)), ylim=(-depth - 0.2, 1.35))
        line = {"color": INK, "linewidth": 1}
        axis.plot([1, count], [0, 0], **line)
        for rank in range(1, count + 1):
            axis.plot([rank, rank], [0, 0.14], **line)
            axis.text(rank, 0.22, str(rank), ha="center", va="bottom", fontsize=8, color=GREY)
        end = min(1 + distance, axis.get_xlim()[1])
        axis.plot([1, end], [0.95, 0.95], color=GREY, linewidth=1.6)
        axis.text((1 + end) / 2, 1.02, f"critical difference {distance:.2f}", ha="center", va="bottom", fontsize=8)
        for place, index in enumerate(order):
            near = place < left
            y = -levels - 0.45 * (place if near else count - 1 - place)
            x, edge = mean_ranks[index], (1 - 0.05 * (count - 1) if near else count + 0.05 * (count - 1))
            axis.plot([x, x, edge], [0, y, y], **line)
            text = f"{short(names[index], 26)}  {x:.2f}" if near else f"{x:.2f}  {short(names[index], 26)}"
            axis.text(edge, y, f"{text} " if near else f" {text}", ha="right" if near else "left", va="center")
        for depth_of, group in enumerate(groups):
            ends = [mean_ranks[index] for index in group]
            y, slack = -0.28 * (depth_of + 1), 0.02 * (count - 1)
            axis.plot([min(ends) - slack, max(ends) + slack], [y, y], color=BLUE, linewidth=4, solid_capstyle="round")
