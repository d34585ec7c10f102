"""The figure of two arms over the same seeds: both, and their paired difference with its interval."""

from collections.abc import Mapping, Sequence

from tl_jax.core.plotting import BLUE, GREY, VERMILION, figure_at, short

INK = {"markeredgecolor": "white", "markeredgewidth": 0.6, "markersize": 7, "zorder": 3}


def draw(path, arms: Mapping[str, Mapping], seeds: Sequence[int], label: str, difference: Mapping | None = None):
    """arms: {name: {"values", "mean", "low", "high"}}, a value for each seed; difference: of the two.

    Left the arms, a line for each seed; right the difference of each seed, which tells more than the overlap of the
    intervals of the arms, as what a seed makes hard for both cancels. low and high are None where there is one seed.
    """
    panels = 2 if difference else 1
    width = 1.4 + 1.1 * len(arms)
    size, grid = (width + 2.4 * (panels - 1), 3.4), {"columns": 2, "ratios": [width, 2.2]} if panels > 1 else {}
    with figure_at(path, size, **grid) as (figure, (left, *right)):
        values = [arm["values"] for arm in arms.values()]
        for row in zip(*values, strict=True):
            left.plot(range(len(arms)), row, color=GREY, linewidth=0.8, alpha=0.5, marker="o", markersize=2.5)
        for x, (arm, style) in enumerate(zip(arms.values(), ((BLUE, "o"), (VERMILION, "s")), strict=False)):
            _mark(left, x, 1 if x else -1, arm, *style)
        left.set(xlim=(-0.75, len(arms) - 0.25), ylabel=label)
        left.set_xticks(range(len(arms)), [short(name) for name in arms])
        for axis in right:
            axis.axhline(0, color=GREY, linewidth=1, linestyle="--")
            axis.plot([0] * len(seeds), difference["values"], "o", color=GREY, markersize=2.5, alpha=0.7)
            _mark(axis, 0, 1, difference, "black", "D")
            first, second = (short(name, 16) for name in list(arms)[:2])
            axis.set(xlim=(-0.5, 1.2), xticks=[], ylabel=f"{first} - {second}")
        for axis in (left, *right):
            axis.grid(True, axis="y")
        figure.supxlabel("dots: seeds; marks: mean with its 95 % interval" * (len(seeds) > 1), fontsize=7.5, color=GREY)


def _mark(axis, x: float, side: int, arm: Mapping, colour: str, marker: str) -> None:
    """Mean and interval beside the dots at x, with their numbers; side: 1 on the right, -1 on the left."""
    text, x = f"{arm['mean']:.4f}", x + 0.14 * side
    if arm["low"] is not None:
        axis.plot([x, x], [arm["low"], arm["high"]], color=colour, linewidth=2, solid_capstyle="round")
        text += f"\n[{arm['low']:.4f},\n {arm['high']:.4f}]"
    axis.plot(x, arm["mean"], marker, color=colour, **INK)
    place = {"textcoords": "offset points", "va": "center", "ha": "left" if side > 0 else "right", "fontsize": 7.5}
    axis.annotate(text, (x, arm["mean"]), (7 * side, 0), **place)
