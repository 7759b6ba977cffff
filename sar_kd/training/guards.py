"""When an update is refused, and when a run must stop: verdicts over plain numbers.

Nothing here touches a tensor: the step reads its metrics from the device once and asks `StepGuard`. Measuring is done
elsewhere and never acts. The counters live here and are part of a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import median

from sar_kd.config.sections import MIN_LOSS_SCALE, GuardConfig

CAUSES = ("no_targets", "forward", "overflow", "gradient", "norm")
"""Why an update was skipped, one cause each.

no_targets  the step's blocks hold no token to predict
forward     a student logit, or the loss, is not finite
overflow    the forward is finite, a gradient is not, and the loss scale can still be lowered: normal loss-scale search
gradient    a gradient is not finite although the loss scale is at its floor (or there is none)
norm        the gradient norm is finite and above the limit
"""

_NAN_CAUSES = ("forward", "gradient")

_WINDOW = 50
"""Attempts that the skip storm, the median norm and `frequent_nan` look back on."""

_STORM_SHARE = 0.8

_ADAPTIVE_WARMUP = 20

_ZERO_GRADIENT_ALARM = 10


@dataclass(frozen=True)
class Verdict:
    """The decision on one attempted update."""

    applied: bool
    cause: str | None
    """One of `CAUSES` if the update is skipped"""
    norm_limit: float
    """The gradient norm above which this attempt is skipped"""
    storm: bool = False
    """A skip storm was recognised at this attempt"""
    emergency: bool = False
    """The run must stop"""
    frequent_nan: bool = False
    """At this attempt, for the first time, `max_nan_batches` of the last 50 were NaN batches"""
    zero_gradient: bool = False
    """This is the tenth update in a row whose gradient is exactly 0: it was weight decay and nothing else"""


@dataclass(eq=False)
class StepGuard:
    """Judges every attempted update of a run, in order.

    skip_rule  'storm': skip above `skip_grad_norm` until 80 % of the last 50 attempts were skipped for a finite
               norm (an untrained student's norm stays there); from then on the limit is `skip_factor` times the median
               of the last 50 finite norms, never below `skip_grad_norm`.
               'adaptive': that median rule from the start; no limit before 20 norms are known.
               'fixed': `skip_grad_norm` throughout.
    """

    settings: GuardConfig
    applied: int = 0
    skipped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))
    consecutive_nan_batches: int = 0
    """NaN batches since the last applied step"""
    max_consecutive_nan_batches: int = 0
    in_storm: bool = False
    frequent_nan: bool = False
    zero_gradient_steps: int = 0
    """Applied steps whose gradient was exactly 0"""
    consecutive_zero_gradients: int = 0
    recent_nan: list[bool] = field(default_factory=list)
    """Of the last 50 attempts: was it a NaN batch?"""
    recent_norms: list[float] = field(default_factory=list)
    """The last 50 finite norms"""
    recent_norm_skips: list[bool] = field(default_factory=list)
    """Of the last 50 attempts: was it skipped for its norm?"""

    @property
    def attempts(self) -> int:
        return self.applied + sum(self.skipped.values())

    @property
    def success_rate(self) -> float:
        """Share of attempts that were applied; 1 before the first."""
        return self.applied / self.attempts if self.attempts else 1.0

    def judge(self, *, num_targets: int, forward_finite: bool, grad_norm: float, loss_scale: float) -> Verdict:
        """The verdict on one attempt; it is counted.

        num_targets     tokens to predict in the whole step, known before the forward
        forward_finite  every student logit and the loss are finite
        grad_norm       L2 norm after unscaling, before clipping
        loss_scale      the loss scale of this attempt's backward; 1 where there is no scaler
        """
        limit = self._norm_limit()
        cause = self._cause(num_targets, forward_finite, grad_norm, loss_scale, limit)
        if cause is None:
            self.applied += 1
            self.consecutive_nan_batches = 0
        else:
            self.skipped[cause] += 1
            self.consecutive_nan_batches += cause in _NAN_CAUSES
            self.max_consecutive_nan_batches = max(self.max_consecutive_nan_batches, self.consecutive_nan_batches)
        storm = self._detect_storm(cause, grad_norm)
        emergency = self.consecutive_nan_batches >= self.settings.max_nan_batches
        frequent_nan = self._detect_frequent_nan(cause in _NAN_CAUSES) and not emergency
        zero_gradient = self._detect_zero_gradient(cause is None and grad_norm == 0.0)
        return Verdict(cause is None, cause, limit, storm, emergency, frequent_nan, zero_gradient)

    def _cause(self, num_targets, forward_finite, grad_norm, loss_scale, limit) -> str | None:
        if num_targets == 0:
            return "no_targets"
        if not forward_finite:
            return "forward"
        if not math.isfinite(grad_norm):
            return "overflow" if loss_scale > MIN_LOSS_SCALE else "gradient"
        return None if grad_norm <= limit else "norm"

    def _norm_limit(self) -> float:
        settings = self.settings
        if settings.skip_rule == "fixed" or (settings.skip_rule == "storm" and not self.in_storm):
            return settings.skip_grad_norm
        if len(self.recent_norms) < _ADAPTIVE_WARMUP:
            return math.inf
        limit = settings.skip_factor * median(self.recent_norms)
        return limit if settings.skip_rule == "adaptive" else max(limit, settings.skip_grad_norm)

    def _detect_storm(self, cause: str | None, grad_norm: float) -> bool:
        """True at the attempt that reveals a skip storm."""
        _append(self.recent_norm_skips, cause == "norm")
        if cause in (None, "norm"):
            _append(self.recent_norms, grad_norm)
        if self.settings.skip_rule != "storm" or self.in_storm or len(self.recent_norm_skips) < _WINDOW:
            return False
        self.in_storm = sum(self.recent_norm_skips) >= _STORM_SHARE * _WINDOW
        return self.in_storm

    def _detect_frequent_nan(self, is_nan: bool) -> bool:
        """True once: when NaN batches with applied steps between them have become frequent."""
        _append(self.recent_nan, is_nan)
        if self.frequent_nan or sum(self.recent_nan) < self.settings.max_nan_batches:
            return False
        self.frequent_nan = True
        return True

    def _detect_zero_gradient(self, is_zero: bool) -> bool:
        """True at the tenth update in a row without a gradient."""
        self.zero_gradient_steps += is_zero
        self.consecutive_zero_gradients = self.consecutive_zero_gradients + 1 if is_zero else 0
        return self.consecutive_zero_gradients == _ZERO_GRADIENT_ALARM

    def state_dict(self) -> dict:
        state = asdict(self)
        del state["settings"]
        return state

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def _append(recent: list, value: float) -> None:
    """Append, and keep the last 50."""
    recent.append(value)
    del recent[:-_WINDOW]


def verdict_messages(
    step: int, verdict: Verdict, grad_norm: float, loss_scales: tuple[float, float], guards: GuardConfig
) -> list[str]:
    """Messages about a verdict, for the terminal; mostly none.

    loss_scales: before and after the step
    """
    messages = []
    if verdict.cause in ("forward", "gradient", "overflow"):
        before, after = loss_scales
        change = f", loss scale {before:.0f} -> {after:.0f}" if after != before else ""
        messages.append(f"Step {step}: skipped ({verdict.cause}{change})")
    if verdict.storm:
        messages.append(
            f"Step {step}: skip storm. 80 % of the last 50 steps were skipped for a gradient norm (now "
            f"{grad_norm:.2f}) above --skip_grad_norm {guards.skip_grad_norm:g}. From here on the limit is "
            f"{guards.skip_factor:g} times the median norm; --skip_rule fixed keeps it."
        )
    if verdict.frequent_nan:
        messages.append(
            f"Step {step}: {guards.max_nan_batches} of the last 50 steps were NaN batches, with applied steps between "
            "them. crash/crash.md describes the first."
        )
    if verdict.zero_gradient:
        messages.append(
            f"Step {step}: the last 10 updates had no gradient, so the weights only decay; look at the clamps "
            "(--loss_clamp_style, --logit_clamp_style) and the loss weights."
        )
    return messages
