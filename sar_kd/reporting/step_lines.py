"""The lines of a running training: one about the steps since the last one, one about a validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sar_kd.runtime.console import format_clock, format_perplexity, format_share
from sar_kd.runtime.files import as_float


class Pace(NamedTuple):
    """How far a run is, and how fast."""

    step: int
    total: int
    success_rate: float
    tokens_per_second: float
    elapsed: float
    """Seconds since the first step, or since the run was resumed"""
    left: float
    """Seconds that the rest takes at the speed so far, validations included"""

    def clock(self) -> str:
        """'20% in 0:31, 2:04 left'."""
        return f"{self.step / self.total:.0%} in {format_clock(self.elapsed)}, {format_clock(self.left)} left"


def step_parts(records: Sequence[dict], pace: Pace) -> list[str]:
    """The parts of a line about these steps, the most important first: means over those whose loss is finite."""
    finite = [r for r in records if math.isfinite(r["loss"])]
    loss, kd = (_mean([r[key] for r in finite]) for key in ("loss", "kd_loss"))
    ce_losses = [r["ce_loss"] for r in finite if r["ce_loss"] is not None]  # None on on-policy text
    ce = f", ce={_mean(ce_losses):.4f}" if ce_losses or not finite else ""
    num_bad = len(records) - len(finite)
    bad = f" not_finite={num_bad}" if num_bad else ""
    teacher = f" teacher_dropped={format_share(share)}" if (share := dropped_share(records)) else ""
    router_kls = [r["router_kl"] for r in finite if "router_kl" in r]
    routers = f" router_kl={_mean(router_kls):.4f}" if router_kls else ""
    norm = _mean([r["grad_norm"] for r in records if math.isfinite(r["grad_norm"])])
    success = f"success_rate={pace.success_rate:.0%}"
    rate = f"{records[-1]['learning_rate']:.1e}"
    return [
        f"Step {pace.step}: avg_loss={loss:.4f} (kd={kd:.4f}{ce}){teacher}{routers}{bad}",
        f"lr={rate} grad_norm={norm:.2f}",
        success,
        f"{pace.tokens_per_second:,.0f} tokens/s",
        pace.clock(),
    ]


def dropped_share(records: Iterable[dict]) -> float:
    """Of the teacher's positions in these steps, or in a summary, the share that was left out of distillation.

    A version that did not count the positions compared about as many as there were targets.
    """
    dropped = positions = 0.0
    for record in records:
        dropped += as_float(record.get("teacher_rows_dropped", 0))
        positions += as_float(record.get("teacher_positions", record.get("num_target_tokens", 0)))
    return min(1.0, dropped / positions) if dropped > 0 and positions > 0 else 0.0


def unshared_share(record: dict) -> float:
    """Of the teacher's positions in a summary, the share at which too little of its distribution could be compared."""
    positions = as_float(record.get("teacher_positions", 0))
    return as_float(record.get("teacher_rows_unshared", 0)) / positions if positions > 0 else 0.0


_NOT_FINITE = (
    "its logits are not finite, or not in its cache",
    "--model_dtype float32, or bfloat16 on a card that has it",
)

_INFINITE = "KL is infinite (masked tokens)", "--kd_direction jsd"


def why_dropped(records: Iterable[dict]) -> tuple[str, str]:
    """Why positions were left out, in words, and what to try. records: as of `dropped_share`"""
    counts = [
        (as_float(r.get("teacher_rows_dropped", 0)), as_float(r.get("teacher_rows_infinite", 0))) for r in records
    ]
    dropped, infinite = map(sum, zip(*counts, strict=True))
    reasons = [_NOT_FINITE] * (not dropped <= infinite) + [_INFINITE] * (infinite > 0)
    why, remedies = zip(*reasons, strict=True)
    return ", or ".join(why), "; ".join(remedies)


def fit(parts: Sequence[str], columns: float) -> str:
    """As many of the parts as fit into the columns, each whole; the first in any case."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 1 + len(part) >= columns:
            break
        line += f" {part}"
    return line


def sft_line(records: Sequence[dict], pace: Pace) -> str:
    """{'loss': 2.27, 'grad_norm': 1.55, 'learning_rate': 0.0002, 'epoch': 0.31, 'step': '10/500', ...}

    The loss is the mean since the last line, nan if one of them was; the other metrics are those of this step.
    """
    last = records[-1]
    losses = [record["loss"] for record in records if record["num_target_tokens"]]
    # A mean of all steps, finite or not, and nan instead of 0 where there is none: a bad step must show.
    metrics = {"loss": sum(losses) / len(losses) if losses else math.nan}
    metrics |= {name: last[name] for name in ("grad_norm", "learning_rate")}
    rounded = {name: float(f"{value:.4g}") for name, value in metrics.items()}
    progress = {"step": f"{pace.step}/{pace.total}", "tokens_per_second": round(pace.tokens_per_second)}
    times = {"elapsed": format_clock(pace.elapsed), "left": format_clock(pace.left)}
    return str({**rounded, "epoch": round(last["epoch"], 2), **progress, **times})


def start_line(start: dict, teacher: dict, same_tokenizer: bool) -> str:
    """The validation of student and, where there is one, teacher before the first step."""
    line = f"Start: Validation PPL = {format_perplexity(start['val_ppl'])}"
    line += f", bits per byte {start['val_bits_per_byte']:.4f}{_nonfinite(start)}"
    if not teacher:
        return line
    perplexity = f"{format_perplexity(teacher['val_ppl'])}, " if same_tokenizer else ""
    return line + f"; teacher: {perplexity}{teacher['val_bits_per_byte']:.4f}{_nonfinite(teacher)}"


def evaluation_line(record: dict, is_best: bool, same_tokenizer: bool) -> str:
    """One validation of the student, and of a teacher whose routers learn."""
    line = f"Step {record['step']}: Validation PPL = {format_perplexity(record['val_ppl'])}"
    line += f", bits per byte {record['val_bits_per_byte']:.4f}{_nonfinite(record)}"
    if "router_entropy" in record:
        native, routed = (record[f"teacher_val_ppl_{how}"] for how in ("native", "routed"))
        every = "" if routed == native else f", {routed:.2f} with every expert"
        own = "" if same_tokenizer else " in its own tokens"
        line += f"; teacher PPL {native:.2f}{every}{own}, router entropy {record['router_entropy']:.3f}"
    return line + (" (best so far)" if is_best else "")


def _nonfinite(metrics: dict) -> str:
    shares = {"not finite": metrics.get("val_nonfinite"), "masked": metrics.get("val_masked")}
    return "".join(f" ({what} at {format_share(share)} of the text)" for what, share in shares.items() if share)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
