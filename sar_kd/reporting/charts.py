"""The charts of a report, drawn with matplotlib: pieces of SVG that take their colours from the page around them.

Colours are drawn as placeholders and replaced by CSS variables, so that one file reads on a light and on a dark
background. Long runs are drawn in bins: the line is a bin's mean, the band its smallest and largest value.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from sar_kd.reporting.history import RunHistory
from sar_kd.runtime.files import as_float

_MAX_BINS = 300

_INK, _FAINT = "#010203", "#010204"

_COLOURS = [f"#0102{10 + index}" for index in range(8)]

_DASHES = ("-", "--", "-.", ":")
"""Of the first eight runs, the next eight, and so on"""

_LARGEST = 1e30
"""A larger value is not drawn: the arithmetic of the axes would overflow"""

_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)"} | {c: f"var(--s{i})" for i, c in enumerate(_COLOURS)}
"""The CSS variable of the page for each placeholder"""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "sar-kd", "font.size": 9, "font.family": "sans-serif",
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _FAINT, "xtick.color": _INK, "ytick.color": _INK,
    "grid.color": _FAINT, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.4, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "text.parse_math": False,
}  # fmt: skip

_LOSS = "Training loss by step, nats per token, unclamped."

_BITS = "On held-out text, by step. It compares across tokenizers; lower is better."

_PERPLEXITY = "On held-out text, in each model's own tokens; lower is better."

_NORM = "L2 norm of the gradients, loss scale taken out, before clipping."

_RATE = "Peak of the schedule is --student_lr; a run that diverged goes on at half of it."

_SCALE = "The factor that lifts small gradients into float16's range; halved by an overflow."

_ENTROPY = "How evenly the teacher's routers spread tokens: 1 is evenly, 0 all to one expert."

Draw = Callable[[Any], None]
"""Draws a chart into matplotlib axes"""


def build_charts(runs: Sequence[RunHistory]) -> list[tuple[str, str]]:
    """The caption of each chart and the chart as SVG; of one run, or of several in the same axes.

    Raises: ModuleNotFoundError without matplotlib
    """
    charts = _charts_of_one(runs[0]) if len(runs) == 1 else _charts_of_several(runs)
    return [(caption, _svg(draw)) for caption, draw in charts]


def build_lead_chart(run: RunHistory) -> tuple[str, str]:
    """The caption and the chart of the student's way from its start towards the teacher, beside its control if there
    is one.

    Raises: ModuleNotFoundError without matplotlib
    """
    control = run.control

    def draw(axes) -> None:
        if control is not None:
            steps, values = control.series(control.validations(), "val_bits_per_byte")
            axes.plot(steps, _drawable(values), color=_COLOURS[1], marker="o", markersize=3, label="control")
        label = "distilled" if control is not None else "student"
        _validation(axes, [run], "val_bits_per_byte", "Bits per byte", label=label)

    beside = " Control: the same student, start and batches, by cross-entropy alone." if control is not None else ""
    return _BITS + beside, _svg(draw, size=(5.6, 2.8))


def _charts_of_one(run: RunHistory) -> list[tuple[str, Draw]]:
    has_responses = any(record.get("responses") for record in run.steps)
    charts = [
        (_LOSS + " A step on on-policy text has no ce." * has_responses, lambda axes: _losses(axes, run)),
        (_PERPLEXITY, lambda axes: _validation(axes, [run], "val_ppl", "Perplexity")),
        (_NORM, lambda axes: _norms(axes, run)),
        (_RATE, lambda axes: _rates(axes, [run])),
        *([(_SCALE, lambda axes: _scales(axes, [run]))] if _has_scaler([run]) else []),
        ("Updates that a guard refused, by cause.", lambda axes: _skips(axes, run)),
    ]
    if has_responses:
        charts += [
            (
                "Of the student's responses, the share that it ended before the limit of new tokens.",
                lambda axes: _responses(axes, run, "response_end_rate", "Responses that end"),
            ),
            (
                "Tokens in a response of the student, on average.",
                lambda axes: _responses(axes, run, "response_length", "Length of responses"),
            ),
        ]
    if any("router_entropy" in record for record in run.evaluations):
        charts.append((_ENTROPY, lambda axes: _entropy(axes, [run])))
    if _usage_of(run):
        charts.append(
            (
                "Share of each expert in the routers' choices, last validation.",
                lambda axes: _usage(axes, _usage_of(run)),
            )
        )
    return charts


def _charts_of_several(runs: Sequence[RunHistory]) -> list[tuple[str, Draw]]:
    charts: list[tuple[str, Draw]] = [
        (_BITS, lambda axes: _validation(axes, runs, "val_bits_per_byte", "Bits per byte")),
        (_PERPLEXITY, lambda axes: _validation(axes, runs, "val_ppl", "Perplexity")),
        (_LOSS, lambda axes: _compare(axes, runs, "loss", "Loss")),
        (_NORM, lambda axes: _compare(axes, runs, "grad_norm", "Gradient norm")),
        (_RATE, lambda axes: _rates(axes, runs)),
        *([(_SCALE, lambda axes: _scales(axes, runs))] if _has_scaler(runs) else []),
    ]
    if any("router_entropy" in record for run in runs for record in run.evaluations):
        charts.append((_ENTROPY, lambda axes: _entropy(axes, runs)))
    return charts


def build_influence_chart(influence: Sequence[float], dropped: Collection[int]) -> tuple[str, str]:
    """The caption and the chart of each layer's influence, the dropped layers in another colour.

    Raises: ModuleNotFoundError without matplotlib
    """

    def draw(axes) -> None:
        for label, colour, is_dropped in (("kept", _COLOURS[0], False), ("cut", _COLOURS[3], True)):
            bars = [index for index in range(len(influence)) if (index in dropped) == is_dropped]
            if bars:
                axes.bar(bars, [influence[index] for index in bars], width=0.8, color=colour, label=label)
        _log_scale(axes, "{x:g}")
        axes.set_title("Influence by layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)

    caption = "1 - cosine of a layer's input and output, mean over tokens: how much it changes the hidden states."
    return caption, _svg(draw)


def _svg(draw: Draw, size: tuple[float, float] = (6.0, 2.9)) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure, width = Figure(figsize=size), size[0]
        figure.subplots_adjust(left=0.66 / width, right=1 - 0.27 / width, top=0.9, bottom=0.11)
        draw(figure.subplots())
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])  # the same ids in every chart of a page
    return re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)


def _has_scaler(runs: Sequence[RunHistory]) -> bool:
    """Does the loss scale of one of them differ from 1? In float32 and bfloat16 there is none."""
    return any(as_float(record.get("loss_scale", 1.0)) != 1.0 for run in runs for record in run.steps)


def _losses(axes, run: RunHistory) -> None:
    alpha_ce, alpha_kd = (as_float(run.setting(name)) for name in ("alpha_ce", "alpha_kd"))
    _curve(axes, run, "loss", _COLOURS[0], "loss")
    _curve(axes, run, "ce_loss", _COLOURS[1], "ce", band=False)
    if alpha_kd > 0:
        _curve(axes, run, "kd_loss", _COLOURS[2], "kd", band=False)
    left_out = sum(not math.isfinite(as_float(record.get("loss"))) for record in run.steps)
    _finish(axes, f"Loss = {alpha_ce:g} ce + {alpha_kd:g} kd" + (f"; not finite: {left_out}" if left_out else ""))


def _curve(axes, run: RunHistory, key: str, colour: str, label: str, band: bool = True) -> None:
    """A metric over the steps that have it: a step on on-policy text, for example, has no cross-entropy."""
    records = [record for record in run.steps if record.get(key) is not None]
    if not records:
        return
    steps, means, lows, highs = _binned(*run.series(records, key))
    axes.plot(steps, means, color=colour, label=label, marker="." if len(steps) == 1 else None)
    if band and len(steps) < len(records):
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0)


def _binned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], ...]:
    """At most `_MAX_BINS` bins: mean step; mean, smallest and largest of the finite values, nan where there is none."""
    size = max(1, math.ceil(len(steps) / _MAX_BINS))
    centres, means, lows, highs = [], [], [], []
    for first in range(0, len(steps), size):
        finite = [value for value in values[first : first + size] if abs(value) <= _LARGEST]
        covered = steps[first : first + size]
        centres.append(sum(covered) / len(covered))
        means.append(sum(finite) / len(finite) if finite else math.nan)
        lows.append(min(finite, default=math.nan))
        highs.append(max(finite, default=math.nan))
    return centres, means, lows, highs


def _finish(axes, title: str, legend: bool = True) -> None:
    axes.set_title(title)
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=7)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if not _is_drawn(axes):
        why = "no finite value" if axes.has_data() else "nothing yet"
        axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center")
        axes.set(xticks=[], yticks=[])
    elif legend:
        _legend(axes)


def _is_drawn(axes) -> bool:
    """Is there a finite value in one of the lines that follow the steps?"""
    return any(
        math.isfinite(y)
        for line in axes.lines
        if line.get_transform() == axes.transData
        for y in map(float, line.get_ydata())
    )


def _legend(axes) -> None:
    """Above the axes, where no curve can run through it."""
    columns = 4 if len(axes.get_legend_handles_labels()[0]) > 3 else 3
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=columns, columnspacing=1.0, handlelength=1.4)


def _drawable(values: Sequence[float]) -> list[float]:
    return [value if abs(value) <= _LARGEST else math.nan for value in values]


def _validation(axes, runs: Sequence[RunHistory], key: str, title: str, label: str = "student") -> None:
    for run, style in _styled(runs):
        steps, values = run.series(run.validations(), key)
        axes.plot(steps, _drawable(values), **style, marker="o", markersize=3, label=label)
    teachers = {as_float(run.start.get(f"teacher_{key}")) for run in runs} if _compares(runs, key) else set()
    for index, value in enumerate(sorted(filter(math.isfinite, teachers))):
        axes.axhline(value, color=_INK, linestyle="--", linewidth=1.1, label="teacher" if index == 0 else None)
    _finish(axes, title, legend=len(runs) == 1)


def _compares(runs: Sequence[RunHistory], key: str) -> bool:
    """May the teacher's value stand in the students' axes? Perplexities of other tokens may not."""
    return key != "val_ppl" or all(run.start.get("same_tokenizer", True) for run in runs)


def _styled(runs: Sequence[RunHistory]) -> list[tuple[RunHistory, dict]]:
    """Each run with colour and dashes of its lines; the page has their legend."""
    styles = [(colour, dash) for dash in _DASHES for colour in _COLOURS]
    return [
        (run, {"color": styles[index % len(styles)][0], "linestyle": styles[index % len(styles)][1]})
        for index, run in enumerate(runs)
    ]


def _norms(axes, run: RunHistory) -> None:
    _curve(axes, run, "grad_norm", _COLOURS[0], "gradient norm")
    steps, limits, _, _ = _binned(*run.series(run.steps, "norm_limit"))
    if any(map(math.isfinite, limits)):
        axes.plot(steps, limits, color=_COLOURS[3], linestyle="--", label="limit")
    axes.axhline(as_float(run.setting("max_grad_norm")), color=_INK, linestyle=":", label="clip")
    skipped_steps, norms = run.series((r for r in run.steps if r.get("cause") == "norm"), "grad_norm")
    if skipped_steps:
        axes.plot(skipped_steps, norms, "x", color=_COLOURS[3], markersize=4, label="skipped")
    if _is_drawn(axes):
        _log_scale(axes, "{x:g}")
    _finish(axes, "Gradient norm")


def _rates(axes, runs: Sequence[RunHistory]) -> None:
    for run, style in _styled(runs):
        steps, means, _, _ = _binned(*run.series(run.steps, "learning_rate"))
        axes.plot(steps, means, **style)
    axes.yaxis.set_major_formatter("{x:g}")
    _finish(axes, "Learning rate", legend=False)


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


def _scales(axes, runs: Sequence[RunHistory]) -> None:
    for run, style in _styled(runs):
        steps, scales = run.series(run.steps, "loss_scale")
        scales = [scale if 0 < scale <= _LARGEST else math.nan for scale in scales]
        ends = (0, len(steps) - 1)
        changes = [i for i in range(len(steps)) if i in ends or len(set(scales[i - 1 : i + 2])) > 1]
        axes.step([steps[i] for i in changes], [scales[i] for i in changes], **style)
    if _is_drawn(axes):
        _log_scale(axes, "{x:,.0f}", base=2)
    _finish(axes, "Loss scale", legend=False)


def _skips(axes, run: RunHistory) -> None:
    last = max((record["step"] for record in run.steps), default=1)
    width = max(1, math.ceil(last / 60))
    counts = Counter(((step - 1) // width, cause) for step, cause in run.skipped)
    bars = range(math.ceil(last / width))
    centres = [1 + bar * width + (width - 1) / 2 for bar in bars]
    bottom = [0] * len(bars)
    for index, cause in enumerate(dict.fromkeys(cause for _, cause in run.skipped)):
        heights = [counts[bar, cause] for bar in bars]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.bar(centres, heights, width=0.9 * width, bottom=bottom, color=colour, label=cause)
        bottom = [low + count for low, count in zip(bottom, heights, strict=True)]
    axes.set_xlim(0, last + 1)
    axes.set_ylim(0, max([*bottom, 1]) * 1.15)
    if any(bottom):
        axes.set_title("Skipped updates" if width == 1 else f"Skipped updates, of {width:,} a bar")
        _legend(axes)
    else:
        axes.set_title("Skipped updates")
        axes.text(0.5, 0.5, "no update was skipped", transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])


def _responses(axes, run: RunHistory, key: str, title: str) -> None:
    _curve(axes, run, key, _COLOURS[0], title)
    axes.set_ylim(bottom=0)
    _finish(axes, title, legend=False)


def _entropy(axes, runs: Sequence[RunHistory]) -> None:
    for run, style in _styled(runs):
        steps, values = run.series(run.evaluations, "router_entropy")
        axes.plot(steps, values, **style, marker="o", markersize=3)
    axes.set_ylim(0, 1.02)
    _finish(axes, "Router entropy", legend=False)


def _usage_of(run: RunHistory) -> list[list[float]]:
    """The share of each expert of each router at the last validation that has one."""
    usages = [record["router_usage"] for record in run.evaluations if record.get("router_usage")]
    routers = usages[-1].values() if usages else ()
    return [[as_float(share) for share in router] for router in routers if router]


def _usage(axes, shares: list[list[float]]) -> None:
    num_experts = max(map(len, shares))
    cells = [router + [math.nan] * (num_experts - len(router)) for router in shares]
    mesh = axes.pcolormesh(cells, cmap="viridis", vmin=0.0, edgecolors="none")
    axes.figure.colorbar(mesh, ax=axes, label="share of the tokens' choices")
    axes.invert_yaxis()
    axes.set(xlabel="expert", ylabel="router", xticks=[], yticks=[])
    axes.grid(False)
    axes.set_title("Expert usage")


def _compare(axes, runs: Sequence[RunHistory], key: str, title: str) -> None:
    for run, style in _styled(runs):
        steps, means, _, _ = _binned(*run.series((r for r in run.steps if r.get(key) is not None), key))
        axes.plot(steps, means, **style, marker="." if len(steps) == 1 else None)
    _finish(axes, title, legend=False)
