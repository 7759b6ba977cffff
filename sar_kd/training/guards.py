"""When an update is refused, and when a run must stop: verdicts over plain numbers.

Nothing here touches a tensor. The step reads a handful of figures from the device once and asks `StepGuard`;
measuring is done elsewhere and never acts. Counters live here so that a checkpoint can carry them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from statistics import median

from sar_kd.config.sections import MIN_LOSS_SCALE, GuardConfig

CAUSES = ("no_targets", "forward", "overflow", "gradient", "norm")
"""Why an update was skipped, one cause each.

no_targets  the step's blocks hold no token to predict
forward     a student logit, or the loss, is not finite
overflow    the forward is finite, a gradient is not, and the loss scale can still be lowered: calibration
gradient    a gradient is not finite although the loss scale is at its floor (or there is none)
norm        the gradient norm is finite and above the limit
"""

_NAN_CAUSES = ("forward", "gradient")

_STORM_ATTEMPTS = 50

_STORM_SHARE = 0.8

_ADAPTIVE_WARMUP = 20

_DEAD_STEPS = 10


@dataclass(frozen=True)
class Verdict:
    """What is to happen with one attempted update."""

    applied: bool
    cause: str | None
    """One of `CAUSES` where the update is skipped."""
    norm_limit: float
    """The gradient norm above which this attempt was to be skipped."""
    storm: bool = False
    """This attempt is the one at which a skip storm was recognised."""
    emergency: bool = False
    """The run must stop."""
    often_nan: bool = False
    """This attempt is the one at which, for the first time, `max_nan_batches` of the last 50 were NaN batches."""
    dead: bool = False
    """This attempt is the tenth in a row whose gradient is exactly 0: the update was weight decay and nothing else."""


class StepGuard:
    """Judges every attempted update of a run, in order.

    skip_rule  'storm': skip above `skip_grad_norm` until 80 % of the last 50 attempts were skipped for a finite
               norm (a fresh student's norm sits there, and would for ever); from then on the limit is
               `skip_factor` times the median of the last 50 finite norms, never below `skip_grad_norm`.
               'adaptive': that median rule from the start; no limit before 20 norms are known.
               'fixed': `skip_grad_norm` whatever happens.
    """

    def __init__(self, settings):
        """settings: `skip_grad_norm`, `skip_rule`, `skip_factor` and `max_nan_batches`, as in `config.GuardConfig`"""
        self.skip_grad_norm: float = settings.skip_grad_norm
        self.skip_rule: str = settings.skip_rule
        self.skip_factor: float = settings.skip_factor
        self.max_nan_batches: int = settings.max_nan_batches
        self.applied = 0
        self.skipped: Counter[str] = Counter()
        self.nan_batches = 0
        self.nan_batches_max = 0
        self.in_storm = False
        self.often_nan = False
        self.dead_steps = 0
        self._dead_in_a_row = 0
        self._were_nan: deque[bool] = deque(maxlen=_STORM_ATTEMPTS)
        self._norms: deque[float] = deque(maxlen=_STORM_ATTEMPTS)
        self._skipped_for_norm: deque[bool] = deque(maxlen=_STORM_ATTEMPTS)

    @property
    def attempts(self) -> int:
        return self.applied + sum(self.skipped.values())

    @property
    def success_rate(self) -> float:
        """Share of attempts that were applied; 1 before the first."""
        return self.applied / self.attempts if self.attempts else 1.0

    def judge(self, *, num_targets: int, forward_finite: bool, grad_norm: float, loss_scale: float) -> Verdict:
        """The verdict on one attempt, and its entry into the counters.

        num_targets     tokens to predict in the whole window; known before the forward
        forward_finite  every student logit and the loss are finite
        grad_norm       L2 norm after unscaling, before clipping
        loss_scale      the factor this attempt's backward used; 1 where there is no scaler
        """
        limit = self._norm_limit()
        cause = self._cause(num_targets, forward_finite, grad_norm, loss_scale, limit)
        if cause is None:
            self.applied += 1
            self.nan_batches = 0
        else:
            self.skipped[cause] += 1
            self.nan_batches += cause in _NAN_CAUSES
            self.nan_batches_max = max(self.nan_batches_max, self.nan_batches)
        storm = self._remember(cause, grad_norm)
        emergency = self.nan_batches >= self.max_nan_batches
        often_nan = self._count_nan(cause in _NAN_CAUSES) and not emergency
        dead = self._count_dead(cause is None and grad_norm == 0.0)
        return Verdict(cause is None, cause, limit, storm, emergency, often_nan, dead)

    def _cause(self, num_targets, forward_finite, grad_norm, loss_scale, limit) -> str | None:
        if num_targets == 0:
            return "no_targets"
        if not forward_finite:
            return "forward"
        if not math.isfinite(grad_norm):
            return "overflow" if loss_scale > MIN_LOSS_SCALE else "gradient"
        return None if grad_norm <= limit else "norm"

    def _norm_limit(self) -> float:
        if self.skip_rule == "fixed" or (self.skip_rule == "storm" and not self.in_storm):
            return self.skip_grad_norm
        if len(self._norms) < _ADAPTIVE_WARMUP:
            return math.inf
        limit = self.skip_factor * median(self._norms)
        return limit if self.skip_rule == "adaptive" else max(limit, self.skip_grad_norm)

    def _remember(self, cause: str | None, grad_norm: float) -> bool:
        """Enter the attempt into the windows; true if it is the one that reveals a skip storm."""
        self._skipped_for_norm.append(cause == "norm")
        if cause in (None, "norm"):
            self._norms.append(grad_norm)
        if self.skip_rule != "storm" or self.in_storm or len(self._skipped_for_norm) < _STORM_ATTEMPTS:
            return False
        self.in_storm = sum(self._skipped_for_norm) >= _STORM_SHARE * _STORM_ATTEMPTS
        return self.in_storm

    def _count_nan(self, is_nan: bool) -> bool:
        """Enter the attempt; true once, where NaN batches that good steps keep forgiving have become frequent."""
        self._were_nan.append(is_nan)
        if self.often_nan or sum(self._were_nan) < self.max_nan_batches:
            return False
        self.often_nan = True
        return True

    def _count_dead(self, is_dead: bool) -> bool:
        """Enter the attempt; true where it completes a row of updates without a gradient."""
        self.dead_steps += is_dead
        self._dead_in_a_row = self._dead_in_a_row + 1 if is_dead else 0
        return self._dead_in_a_row == _DEAD_STEPS

    def state_dict(self) -> dict:
        return {
            "applied": self.applied,
            "skipped": dict(self.skipped),
            "nan_batches": self.nan_batches,
            "nan_batches_max": self.nan_batches_max,
            "in_storm": self.in_storm,
            "often_nan": self.often_nan,
            "dead_steps": self.dead_steps,
            "dead_in_a_row": self._dead_in_a_row,
            "were_nan": list(self._were_nan),
            "norms": list(self._norms),
            "skipped_for_norm": list(self._skipped_for_norm),
        }

    def load_state_dict(self, state: dict) -> None:
        self.applied = state["applied"]
        self.skipped = Counter(state["skipped"])
        self.nan_batches = state["nan_batches"]
        self.nan_batches_max = state["nan_batches_max"]
        self.in_storm = state["in_storm"]
        self.often_nan = state["often_nan"]
        self.dead_steps = state["dead_steps"]
        self._dead_in_a_row = state["dead_in_a_row"]
        self._were_nan = deque(state["were_nan"], maxlen=_STORM_ATTEMPTS)
        self._norms = deque(state["norms"], maxlen=_STORM_ATTEMPTS)
        self._skipped_for_norm = deque(state["skipped_for_norm"], maxlen=_STORM_ATTEMPTS)


def notices_of(
    step: int, verdict: Verdict, grad_norm: float, scales: tuple[float, float], guards: GuardConfig
) -> list[str]:
    """What a verdict gives to say beside its figures; mostly nothing.

    scales: the loss scale before the step and after it
    """
    lines = []
    if verdict.cause in ("forward", "gradient", "overflow"):
        before, after = scales
        scale = f", loss scale {before:.0f} -> {after:.0f}" if after != before else ""
        lines.append(f"Step {step}: skipped ({verdict.cause}{scale})")
    if verdict.storm:
        lines.append(
            f"Step {step}: skip storm. 80 % of the last 50 steps were skipped for a gradient norm (now "
            f"{grad_norm:.2f}) above --skip_grad_norm {guards.skip_grad_norm:g}. From here on the limit is "
            f"{guards.skip_factor:g} times the median norm; --skip_rule fixed keeps it."
        )
    if verdict.often_nan:
        lines.append(
            f"Step {step}: {guards.max_nan_batches} of the last 50 steps were NaN batches; good ones in between kept "
            "the run going. crash/crash.md is about the first."
        )
    if verdict.dead:
        lines.append(
            f"Step {step}: the last 10 updates had no gradient, so the weights only decay; look at the clamps "
            "(--loss_clamp_style, --logit_clamp_style) and the loss weights."
        )
    return lines
