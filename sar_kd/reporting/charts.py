"""The pictures of a report, drawn with matplotlib: each a piece of SVG that takes its colours from the page around it.

Colours are written as placeholders and replaced by CSS variables, so that one file reads on a light and on a dark
background. Long runs are drawn in bins: the line is a bin's mean, the band its smallest and largest value.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from sar_kd.reporting.history import History
from sar_kd.runtime.files import number_of

SERIES = 6
"""Colours that the page defines: --s0 and so on."""

_BINS = 300

_INK, _FAINT = "#010203", "#010204"

_COLOURS = [f"#0102{10 + index}" for index in range(SERIES)]

_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)"} | {c: f"var(--s{i})" for i, c in enumerate(_COLOURS)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "sar-kd", "font.size": 9, "font.family": "sans-serif",
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _FAINT, "xtick.color": _INK, "ytick.color": _INK,
    "grid.color": _FAINT, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.4, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip

_ABOUT_LOSS = "Training loss by step, nats per token, as it is before any clamp."

_ABOUT_BITS = "On held-out text. Compares across tokenizers; lower is better."

_ABOUT_PERPLEXITY = "On held-out text, in each model's own tokens; lower is better."

_ABOUT_NORM = "L2 norm of the gradients, loss scale taken out, before clipping."

_ABOUT_SCALE = "The factor that lifts small gradients into float16's range; halved by an overflow."

_ABOUT_OWN_TEXT = " A step on the student's own text has no ce."

_ABOUT_ENDS = "Of what the student wrote itself, the share that it ended before it ran out of room."

_ABOUT_LENGTH = "Of what the student wrote itself, tokens on average."

_ABOUT_ENTROPY = "How evenly the teacher's routers spread tokens: 1 is evenly, 0 all to one expert."

Draw = Callable[[Any], None]


def charts_of(runs: Sequence[History]) -> list[tuple[str, str]]:
    """What each picture shows, and the picture as SVG; of one run, or of several in the same axes.

    Raises: ModuleNotFoundError without matplotlib
    """
    plans = _plans_of_one(runs[0]) if len(runs) == 1 else _plans_of_several(runs)
    return [(caption, _svg(draw)) for caption, draw in plans]


def _plans_of_one(run: History) -> list[tuple[str, Draw]]:
    writes = any(record.get("responses") for record in run.steps)
    plans = [
        (_ABOUT_LOSS + _ABOUT_OWN_TEXT * writes, lambda axes: _losses(axes, run)),
        (_ABOUT_BITS, lambda axes: _bits(axes, [run])),
        (_ABOUT_PERPLEXITY, lambda axes: _perplexity(axes, [run])),
        (_ABOUT_NORM, lambda axes: _norms(axes, run)),
        (_ABOUT_SCALE, lambda axes: _scales(axes, [run])),
        ("Updates that a guard refused, by cause.", lambda axes: _skips(axes, run)),
    ]
    if writes:
        plans.append((_ABOUT_ENDS, lambda axes: _responses(axes, run, "response_end_rate", "Responses that end")))
        plans.append((_ABOUT_LENGTH, lambda axes: _responses(axes, run, "response_length", "Length of responses")))
    if any("router_entropy" in record for record in run.evaluations):
        plans.append((_ABOUT_ENTROPY, lambda axes: _entropy(axes, [run])))
        plans.append(("Share of each expert in the routers' choices, last validation.", lambda axes: _usage(axes, run)))
    return plans


def _plans_of_several(runs: Sequence[History]) -> list[tuple[str, Draw]]:
    plans: list[tuple[str, Draw]] = [
        (_ABOUT_BITS, lambda axes: _bits(axes, runs)),
        (_ABOUT_PERPLEXITY, lambda axes: _perplexity(axes, runs)),
        (_ABOUT_LOSS, lambda axes: _compare(axes, runs, "loss", "Loss")),
        (_ABOUT_NORM, lambda axes: _compare(axes, runs, "grad_norm", "Gradient norm")),
        (_ABOUT_SCALE, lambda axes: _scales(axes, runs)),
    ]
    if any("router_entropy" in record for run in runs for record in run.evaluations):
        plans.append((_ABOUT_ENTROPY, lambda axes: _entropy(axes, runs)))
    return plans


def _svg(draw: Draw) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.0, 2.9))
        figure.subplots_adjust(left=0.11, right=0.955, top=0.9, bottom=0.11)
        draw(figure.subplots())
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    return re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)


def _binned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float], list[float], list[float]]:
    """At most `_BINS` places along the run; mean, smallest and largest of the finite values there, nan for none."""
    size = max(1, math.ceil(len(steps) / _BINS))
    places, means, lows, highs = [], [], [], []
    for first in range(0, len(steps), size):
        finite = [value for value in values[first : first + size] if math.isfinite(value)]
        covered = steps[first : first + size]
        places.append(sum(covered) / len(covered))
        means.append(sum(finite) / len(finite) if finite else math.nan)
        lows.append(min(finite, default=math.nan))
        highs.append(max(finite, default=math.nan))
    return places, means, lows, highs


def _curve(axes, run: History, key: str, colour: str, label: str, band: bool = True) -> None:
    """Over the steps that have the figure: a step on the student's own text, say, has no cross-entropy."""
    records = [record for record in run.steps if record.get(key) is not None]
    if not records:
        return
    places, means, lows, highs = _binned(*run.column(records, key))
    axes.plot(places, means, color=colour, label=label, marker="." if len(places) == 1 else None)
    if band and len(places) < len(records):
        axes.fill_between(places, lows, highs, color=colour, alpha=0.18, linewidth=0)


def _finish(axes, title: str, legend: bool = True) -> None:
    axes.set_title(title)
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=7)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if not axes.has_data():
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center")
    elif legend:
        _legend(axes)


def _legend(axes) -> None:
    """Above the axes, where no curve can run through it."""
    columns = 4 if len(axes.get_legend_handles_labels()[0]) > 3 else 3
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=columns, columnspacing=1.0, handlelength=1.4)


def _losses(axes, run: History) -> None:
    alphas = [number_of(run.setting(name)) for name in ("alpha_ce", "alpha_kd")]
    _curve(axes, run, "loss", _COLOURS[0], "loss")
    _curve(axes, run, "ce_loss", _COLOURS[1], "ce", band=False)
    if alphas[1] > 0:
        _curve(axes, run, "kd_loss", _COLOURS[2], "kd", band=False)
    _finish(axes, f"Loss = {alphas[0]:g} ce + {alphas[1]:g} kd")


def _validation(axes, runs: Sequence[History], key: str, title: str) -> None:
    for index, run in enumerate(runs):
        colour = _COLOURS[index % SERIES]
        steps, values = run.column(run.validations(), key)
        axes.plot(
            steps, values, color=colour, marker="o", markersize=3, label="student" if len(runs) == 1 else _short(run)
        )
    teachers = {number_of(run.start.get(f"teacher_{key}")) for run in runs} - {math.nan}
    for index, value in enumerate(sorted(value for value in teachers if math.isfinite(value))):
        axes.axhline(value, color=_INK, linestyle="--", linewidth=1.1, label="teacher" if index == 0 else None)
    _finish(axes, title)


def _bits(axes, runs: Sequence[History]) -> None:
    _validation(axes, runs, "val_bits_per_byte", "Bits per byte")


def _perplexity(axes, runs: Sequence[History]) -> None:
    _validation(axes, runs, "val_ppl", "Perplexity")


def _short(run: History) -> str:
    """A name that leaves room for others in a legend."""
    return run.name if len(run.name) <= 22 else f"{run.name[:10]}..{run.name[-10:]}"


def _log_scale(axes, ticks: str, base: int = 10) -> None:
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


def _norms(axes, run: History) -> None:
    _curve(axes, run, "grad_norm", _COLOURS[0], "gradient norm")
    places, limits, _, _ = _binned(*run.column(run.steps, "norm_limit"))
    if any(map(math.isfinite, limits)):
        axes.plot(places, limits, color=_COLOURS[3], linestyle="--", label="limit")
    axes.axhline(number_of(run.setting("max_grad_norm")), color=_INK, linestyle=":", label="clip")
    steps, norms = run.column((r for r in run.steps if r.get("cause") == "norm"), "grad_norm")
    if steps:
        axes.plot(steps, norms, "x", color=_COLOURS[3], markersize=4, label="skipped")
    _log_scale(axes, "{x:g}")
    _finish(axes, "Gradient norm")


def _scales(axes, runs: Sequence[History]) -> None:
    for index, run in enumerate(runs):
        steps, scales = run.column(run.steps, "loss_scale")
        kept = [i for i in range(len(steps)) if i in (0, len(steps) - 1) or len(set(scales[i - 1 : i + 2])) > 1]
        axes.step(
            [steps[i] for i in kept], [scales[i] for i in kept], color=_COLOURS[index % SERIES], label=_short(run)
        )
    _log_scale(axes, "{x:,.0f}", base=2)
    _finish(axes, "Loss scale", legend=len(runs) > 1)


def _skips(axes, run: History) -> None:
    width = max(1, math.ceil(len(run.steps) / 60))
    base = [0] * math.ceil(len(run.steps) / width)
    places = [run.steps[i]["step"] + (width - 1) / 2 for i in range(0, len(run.steps), width)]
    causes = dict.fromkeys(record["cause"] for record in run.steps if record.get("cause"))
    for index, cause in enumerate(causes):
        counts = [
            sum(record.get("cause") == cause for record in run.steps[first : first + width])
            for first in range(0, len(run.steps), width)
        ]
        if any(counts):
            axes.bar(places, counts, width=0.9 * width, bottom=base, color=_COLOURS[index % SERIES], label=cause)
            base = [low + count for low, count in zip(base, counts, strict=True)]
    if not any(base):
        axes.text(0.5, 0.5, "no update was skipped", transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
    axes.set_xlim(0, max((record["step"] for record in run.steps), default=1) + 1)
    axes.set_ylim(0, max([*base, 1]) * 1.15)
    axes.set_title("Skipped updates" if width == 1 or not any(base) else f"Skipped updates, of {width} a bar")
    if any(base):
        _legend(axes)


def _responses(axes, run: History, key: str, title: str) -> None:
    _curve(axes, run, key, _COLOURS[0], title)
    axes.set_ylim(bottom=0)
    _finish(axes, title, legend=False)


def _entropy(axes, runs: Sequence[History]) -> None:
    for index, run in enumerate(runs):
        steps, values = run.column(run.evaluations, "router_entropy")
        axes.plot(steps, values, color=_COLOURS[index % SERIES], marker="o", markersize=3, label=_short(run))
    axes.set_ylim(0, 1.02)
    _finish(axes, "Router entropy", legend=len(runs) > 1)


def _usage(axes, run: History) -> None:
    usage = next(record["router_usage"] for record in reversed(run.evaluations) if "router_usage" in record)
    rows = [[number_of(share) for share in shares] for shares in usage.values()]
    width = max(map(len, rows))
    cells = [row + [math.nan] * (width - len(row)) for row in rows]
    mesh = axes.pcolormesh(cells, cmap="viridis", vmin=0.0, edgecolors="none")
    axes.figure.colorbar(mesh, ax=axes, label="share of the tokens' choices")
    axes.invert_yaxis()
    axes.set(xlabel="expert", ylabel="router", xticks=[], yticks=[])
    axes.grid(False)
    axes.set_title("Expert usage")


def _compare(axes, runs: Sequence[History], key: str, title: str) -> None:
    for index, run in enumerate(runs):
        _curve(axes, run, key, _COLOURS[index % SERIES], _short(run), band=False)
    _finish(axes, title)
