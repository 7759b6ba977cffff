"""What charts are drawn with: matplotlib's axes become pieces of SVG that take their colours from the page around them.

Colours are drawn as placeholders and replaced by CSS variables, so that one file reads on a light and on a dark
background. Charts are narrow, so that their text can be read on a phone; their titles are the page's text.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

WIDTH = 4.6
"""Inches"""

INK, _FAINT = "#010203", "#010204"

COLOURS = [f"#0102{10 + index}" for index in range(8)]

_VARIABLES = {INK: "var(--ink)", _FAINT: "var(--faint)"} | {c: f"var(--s{i})" for i, c in enumerate(COLOURS)}
"""The CSS variable of the page for each placeholder"""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "sar-kd", "font.size": 10.5, "font.family": "sans-serif",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": _FAINT, "xtick.color": INK, "ytick.color": INK,
    "grid.color": _FAINT, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.4,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "text.parse_math": False,
}  # fmt: skip

Draw = Callable[[Any], None]
"""Draws a chart into matplotlib axes"""


class Chart(NamedTuple):
    """A chart of a page."""

    title: str
    caption: str
    svg: str


def draw_chart(caption: str, draw: Draw, height: float = 2.6) -> Chart:
    """A chart, whose title is that of the axes. height: inches

    Raises: ModuleNotFoundError without matplotlib
    """
    title, svg = _svg(draw, height)
    return Chart(title, caption, svg)


def _svg(draw: Draw, height: float) -> tuple[str, str]:
    """The title and the drawing. height: inches"""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height))
        figure.subplots_adjust(left=0.72 / WIDTH, right=1 - 0.2 / WIDTH, top=1 - 0.27 / height, bottom=0.3 / height)
        axes = figure.subplots()
        draw(axes)
        title, file = axes.get_title(), io.StringIO()
        axes.set_title("")
        with warnings.catch_warnings():  # of a glyph that its own font lacks, and the reader's browser has
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
            FigureCanvasSVG(figure).print_svg(
                file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
            )
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # the same ids in every chart of a page
    return title, re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)


def add_legend(axes) -> None:
    """Above the axes, where no curve can run through it."""
    columns = 4 if len(axes.get_legend_handles_labels()[0]) > 3 else 3
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=columns, columnspacing=1.0, handlelength=1.4)


def use_log_scale(axes, ticks: str, base: int = 10) -> None:
    """A logarithmic axis with its numbers written out."""
    axes.set_yscale("log", base=base)
    low, high = axes.get_ylim()
    if base == 10 and high / max(low, 1e-300) < 10:  # too little for more than one number
        axes.set_yscale("linear")
        return
    if base == 10 and high / max(low, 1e-300) < 200:
        axes.yaxis.get_major_locator().set_params(subs=(1.0, 2.0, 5.0))
    axes.yaxis.set_major_formatter(ticks)
    axes.yaxis.set_minor_formatter("")
