"""The charts of a report. Long runs are drawn in bins: the line is a bin's mean, the band its smallest and largest
value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

from sar_kd.reporting.drawing import COLOURS, INK, WIDTH, Chart, Draw, add_legend, draw_chart, use_log_scale
from sar_kd.reporting.history import RunHistory
from sar_kd.reporting.word_gaps import WordGaps
from sar_kd.runtime.files import as_float

_MAX_BINS = 300

_DASHES = ("-", "--", "-.", ":")
"""Of the first eight runs, the next eight, and so on"""

_LARGEST = 1e30
"""A larger value is not drawn: the arithmetic of the axes would overflow"""

_LOSS = "Training loss by step, nats per token, unclamped."

_BITS = "On held-out text, by step. It compares across tokenizers; lower is better."

_PERPLEXITY = "On held-out text, in each model's own tokens; lower is better."

_NORM = "L2 norm of the gradients, loss scale taken out, before clipping."

_RATE = "Peak of the schedule is --student_lr; a run that diverged goes on at half of it."

_SCALE = "The factor that lifts small gradients into float16's range; halved by an overflow."

_ENTROPY = "How evenly the teacher's routers spread tokens: 1 is evenly, 0 all to one expert."


def build_charts(runs: Sequence[RunHistory]) -> list[Chart]:
    """The charts of one run, or of several in the same axes.

    Raises: ModuleNotFoundError without matplotlib
    """
    charts = _charts_of_one(runs[0]) if len(runs) == 1 else _charts_of_several(runs)
    return [draw_chart(caption, draw) for caption, draw in charts]


def build_lead_chart(run: RunHistory) -> Chart:
    """The student's way from its start towards the teacher, beside its control if there is one.

    Raises: ModuleNotFoundError without matplotlib
    """
    control = run.control

    def draw(axes) -> None:
        if control is not None:
            steps, values = control.series(control.validations(), "val_bits_per_byte")
            axes.plot(steps, _drawable(values), color=COLOURS[1], marker="o", markersize=3, label="control")
        label = "distilled" if control is not None else "student"
        _validation(axes, [run], "val_bits_per_byte", "Bits per byte", label=label)

    beside = " Control: the same student, start and batches, by cross-entropy alone." if control is not None else ""
    return draw_chart(_BITS + beside, draw)


def build_word_chart(gaps: WordGaps) -> Chart:
    """The words on which student and teacher differ most, a bar for each.

    Raises: ModuleNotFoundError without matplotlib
    """
    words = [*gaps.behind, *reversed(gaps.ahead)]

    def draw(axes) -> None:
        groups = ("worse", COLOURS[1], gaps.behind), ("better", COLOURS[2], gaps.ahead[::-1])
        for label, colour, group in groups:
            if group:
                first = 0 if group is gaps.behind else len(gaps.behind)
                axes.barh(range(first, first + len(group)), [word.gap for word in group], color=colour, label=label)
        names = [word.word if len(word.word) <= 16 else word.word[:13] + "..." for word in words]
        axes.set_yticks(range(len(words)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(y=0.02)
        axes.set_title("Nats beyond the teacher's")
        axes.figure.subplots_adjust(left=(0.3 + 0.085 * max(map(len, names))) / WIDTH)
        add_legend(axes)

    caption = "What the student loses more than the teacher on all occurrences of a word; left of 0 it loses less."
    return draw_chart(caption, draw, 0.6 + 0.21 * len(words))


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


def build_influence_chart(influence: Sequence[float], dropped: Collection[int]) -> Chart:
    """Each layer's influence, the dropped layers in another colour.

    Raises: ModuleNotFoundError without matplotlib
    """

    def draw(axes) -> None:
        for label, colour, is_dropped in (("kept", COLOURS[0], False), ("cut", COLOURS[3], True)):
            bars = [index for index in range(len(influence)) if (index in dropped) == is_dropped]
            if bars:
                axes.bar(bars, [influence[index] for index in bars], width=0.8, color=colour, label=label)
        use_log_scale(axes, "{x:g}")
        axes.set_title("Influence by layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        add_legend(axes)

    caption = "1 - cosine of a layer's input and output, mean over tokens: how much it changes the hidden states."
    return draw_chart(caption, draw)


def _has_scaler(runs: Sequence[RunHistory]) -> bool:
    """Does the loss scale of one of them differ from 1? In float32 and bfloat16 there is none."""
    return any(as_float(record.get("loss_scale", 1.0)) != 1.0 for run in runs for record in run.steps)


def _losses(axes, run: RunHistory) -> None:
    alpha_ce, alpha_kd = (as_float(run.setting(name)) for name in ("alpha_ce", "alpha_kd"))
    _curve(axes, run, "loss", COLOURS[0], "loss")
    _curve(axes, run, "ce_loss", COLOURS[1], "ce", band=False)
    if alpha_kd > 0:
        _curve(axes, run, "kd_loss", COLOURS[2], "kd", band=False)
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
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if not _is_drawn(axes):
        why = "no finite value" if axes.has_data() else "nothing yet"
        axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center")
        axes.set(xticks=[], yticks=[])
    elif legend:
        add_legend(axes)


def _is_drawn(axes) -> bool:
    """Is there a finite value in one of the lines that follow the steps?"""
    return any(
        math.isfinite(y)
        for line in axes.lines
        if line.get_transform() == axes.transData
        for y in map(float, line.get_ydata())
    )


def _drawable(values: Sequence[float]) -> list[float]:
    return [value if abs(value) <= _LARGEST else math.nan for value in values]


def _validation(axes, runs: Sequence[RunHistory], key: str, title: str, label: str = "student") -> None:
    for run, style in _styled(runs):
        steps, values = run.series(run.validations(), key)
        axes.plot(steps, _drawable(values), **style, marker="o", markersize=3, label=label)
    teachers = {as_float(run.start.get(f"teacher_{key}")) for run in runs} if _compares(runs, key) else set()
    for index, value in enumerate(sorted(filter(math.isfinite, teachers))):
        axes.axhline(value, color=INK, linestyle="--", linewidth=1.1, label="teacher" if index == 0 else None)
    _finish(axes, title, legend=len(runs) == 1)


def _compares(runs: Sequence[RunHistory], key: str) -> bool:
    """May the teacher's value stand in the students' axes? Perplexities of other tokens may not."""
    return key != "val_ppl" or all(run.start.get("same_tokenizer", True) for run in runs)


def _styled(runs: Sequence[RunHistory]) -> list[tuple[RunHistory, dict]]:
    """Each run with colour and dashes of its lines; the page has their legend."""
    styles = [(colour, dash) for dash in _DASHES for colour in COLOURS]
    return [
        (run, {"color": styles[index % len(styles)][0], "linestyle": styles[index % len(styles)][1]})
        for index, run in enumerate(runs)
    ]


def _norms(axes, run: RunHistory) -> None:
    _curve(axes, run, "grad_norm", COLOURS[0], "gradient norm")
    steps, limits, _, _ = _binned(*run.series(run.steps, "norm_limit"))
    if any(map(math.isfinite, limits)):
        axes.plot(steps, limits, color=COLOURS[3], linestyle="--", label="limit")
    axes.axhline(as_float(run.setting("max_grad_norm")), color=INK, linestyle=":", label="clip")
    skipped_steps, norms = run.series((r for r in run.steps if r.get("cause") == "norm"), "grad_norm")
    if skipped_steps:
        axes.plot(skipped_steps, norms, "x", color=COLOURS[3], markersize=4, label="skipped")
    if _is_drawn(axes):
        use_log_scale(axes, "{x:g}")
    _finish(axes, "Gradient norm")


def _rates(axes, runs: Sequence[RunHistory]) -> None:
    for run, style in _styled(runs):
        steps, means, _, _ = _binned(*run.series(run.steps, "learning_rate"))
        axes.plot(steps, means, **style)
    axes.yaxis.set_major_formatter("{x:g}")
    _finish(axes, "Learning rate", legend=False)


def _scales(axes, runs: Sequence[RunHistory]) -> None:
    for run, style in _styled(runs):
        steps, scales = run.series(run.steps, "loss_scale")
        scales = [scale if 0 < scale <= _LARGEST else math.nan for scale in scales]
        ends = (0, len(steps) - 1)
        changes = [i for i in range(len(steps)) if i in ends or len(set(scales[i - 1 : i + 2])) > 1]
        axes.step([steps[i] for i in changes], [scales[i] for i in changes], **style)
    if _is_drawn(axes):
        use_log_scale(axes, "{x:,.0f}", base=2)
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
        colour = COLOURS[index % len(COLOURS)]
        axes.bar(centres, heights, width=0.9 * width, bottom=bottom, color=colour, label=cause)
        bottom = [low + count for low, count in zip(bottom, heights, strict=True)]
    axes.set_xlim(0, last + 1)
    axes.set_ylim(0, max([*bottom, 1]) * 1.15)
    if any(bottom):
        axes.set_title("Skipped updates" if width == 1 else f"Skipped updates, of {width:,} a bar")
        add_legend(axes)
    else:
        axes.set_title("Skipped updates")
        axes.text(0.5, 0.5, "no update was skipped", transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])


def _responses(axes, run: RunHistory, key: str, title: str) -> None:
    _curve(axes, run, key, COLOURS[0], title)
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
