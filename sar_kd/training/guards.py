"""When an update is refused, and when a run must stop: verdicts over plain numbers.

Nothing here touches a tensor: the step reads its metrics from the device once and asks `StepGuard`. Measuring is done
elsewhere and never acts. The counters live here and are part of a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from statistics import median

from sar_kd.config.sections import MIN_LOSS_SCALE, GuardConfig

CAUSES = ("no_targets", "forward", "teacher", "overflow", "gradient", "norm")
"""Why an update was skipped, one cause each.

no_targets  the step's blocks hold no token to predict
forward     a student logit, or the loss, is not finite
teacher     the teacher is left out at every position of the step, as its logits are not finite or KL is infinite; of
            routers that learn: their loss is not finite, or their gradient while some teacher logits are not
overflow    the forward is finite, a gradient is not, and the loss scale can still be lowered: normal loss-scale search
gradient    a gradient is not finite although the loss scale is at its floor (or there is none)
norm        the gradient norm is finite and above the limit
"""

NAN_CAUSES = ("forward", "teacher", "gradient")
"""The causes of a NaN batch"""

_WINDOW = 50
"""Attempts that the median norm and `frequent_nan` look back on."""

_NORMS_NEEDED = 5
"""Finite norms before the limit can follow them; these first updates are clipped and applied"""

_ZERO_GRADIENT_ALARM = 10


@dataclass(frozen=True)
class Verdict:
    """The decision on one attempted update."""

    applied: bool
    cause: str | None
    """One of `CAUSES` if the update is skipped"""
    norm_limit: float
    """The gradient norm above which this attempt is skipped"""
    first_norm_skip: bool = False
    """This is the first attempt of the run that is skipped for its norm"""
    emergency: bool = False
    """The run must stop"""
    frequent_nan: bool = False
    """At this attempt, for the first time, `max_nan_batches` of the last 50 were NaN batches"""
    zero_gradient: bool = False
    """This is the tenth update in a row whose gradient is exactly 0: it was weight decay and nothing else"""


@dataclass(eq=False)
class StepGuard:
    """Judges every attempted update of a run, in order.

    skip_rule  'adaptive': the limit follows the run: `skip_factor` times the median of the last 50 finite norms, never
               below `skip_grad_norm`; no limit before five norms are known.
               'fixed': `skip_grad_norm` throughout.

    An update that was refused has left the weights as they were. If the next batch has a norm above the limit too, the
    weights are its cause and not one batch, and to refuse that again would change nothing: up to `skip_factor` times
    the refused norm it is clipped and applied, and the median then starts again from these two norms.
    """

    settings: GuardConfig
    applied: int = 0
    skipped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))
    consecutive_nan_batches: int = 0
    """NaN batches since the last applied step"""
    max_consecutive_nan_batches: int = 0
    frequent_nan: bool = False
    zero_gradient_steps: int = 0
    """Applied steps whose gradient was exactly 0"""
    consecutive_zero_gradients: int = 0
    recent_nan: list[bool] = field(default_factory=list)
    """Of the last 50 attempts: was it a NaN batch?"""
    recent_norms: list[float] = field(default_factory=list)
    """The last 50 finite norms, or those since the norms changed for good"""
    refused_norm: float | None = None
    """The norm of the last attempt with a finite norm, if it was refused"""

    @property
    def attempts(self) -> int:
        return self.applied + sum(self.skipped.values())

    @property
    def success_rate(self) -> float:
        """Share of attempts that were applied; 1 before the first."""
        return self.applied / self.attempts if self.attempts else 1.0

    def judge(
        self,
        *,
        num_targets: int,
        forward_finite: bool,
        teacher_finite: bool = True,
        grad_norm: float,
        loss_scale: float,
    ) -> Verdict:
        """The verdict on one attempt; it is counted.

        num_targets     tokens to predict in the whole step, known before the forward
        forward_finite  every student logit and the loss are finite
        teacher_finite  the teacher can be learned from, see `CAUSES`
        grad_norm       L2 norm after unscaling, before clipping; not finite if a gradient is not
        loss_scale      the loss scale of this attempt's backward; 1 where there is no scaler
        """
        limit = self._norm_limit()
        cause = self._cause(num_targets, forward_finite, teacher_finite, grad_norm, loss_scale, limit)
        if cause is None:
            self.applied += 1
        else:
            self.skipped[cause] += 1
        if cause in NAN_CAUSES:
            self.consecutive_nan_batches += 1
            self.max_consecutive_nan_batches = max(self.max_consecutive_nan_batches, self.consecutive_nan_batches)
        elif cause in (None, "norm"):  # the forward and the gradient are finite
            self.consecutive_nan_batches = 0
            self._record_norm(grad_norm, is_refused=cause == "norm")
        emergency = self.consecutive_nan_batches >= self.settings.max_nan_batches
        frequent_nan = self._detect_frequent_nan(cause in NAN_CAUSES) and not emergency
        zero_gradient = self._detect_zero_gradient(cause is None and grad_norm == 0.0)
        first_norm_skip = cause == "norm" and self.skipped["norm"] == 1
        return Verdict(cause is None, cause, limit, first_norm_skip, emergency, frequent_nan, zero_gradient)

    def _cause(self, num_targets, forward_finite, teacher_finite, grad_norm, loss_scale, limit) -> str | None:
        if num_targets == 0:
            return "no_targets"
        if not forward_finite:
            return "forward"
        if not teacher_finite:
            return "teacher"
        if not math.isfinite(grad_norm):
            return "overflow" if loss_scale > MIN_LOSS_SCALE else "gradient"
        return None if grad_norm <= limit else "norm"

    def _norm_limit(self) -> float:
        limit = self._usual_limit()
        if self.refused_norm is None or self.settings.skip_rule == "fixed":
            return limit
        return max(limit, self.settings.skip_factor * self.refused_norm)

    def _usual_limit(self) -> float:
        """The limit behind an update that was applied."""
        settings = self.settings
        if settings.skip_rule == "fixed":
            return settings.skip_grad_norm
        if self.applied + self.skipped["norm"] < _NORMS_NEEDED:
            return math.inf
        return max(settings.skip_grad_norm, settings.skip_factor * median(self.recent_norms))

    def _record_norm(self, grad_norm: float, is_refused: bool) -> None:
        """Keep a finite norm. After one that was refused, another above the usual limit shows that norms have changed
        for good: those before them no longer count.
        """
        if self.refused_norm is not None and not is_refused and grad_norm > self._usual_limit():
            self.recent_norms = [self.refused_norm]
        _append(self.recent_norms, grad_norm)
        self.refused_norm = grad_norm if is_refused else None

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
        """Restore the counters. A cause that the state does not know has not occurred."""
        vars(self).update(state, skipped=dict.fromkeys(CAUSES, 0) | state["skipped"])


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
    if verdict.cause in (*NAN_CAUSES, "overflow"):
        before, after = loss_scales
        change = f", loss scale {before:.0f} -> {after:.0f}" if after != before else ""
        messages.append(f"Step {step}: skipped ({verdict.cause}{change})")
    if verdict.first_norm_skip:
        rule = f"{guards.skip_factor:g} times the median, never below --skip_grad_norm {guards.skip_grad_norm:g}"
        if guards.skip_rule == "fixed":
            rule = "--skip_rule fixed; adaptive lets it follow the run"
        messages.append(
            f"Step {step}: skipped (norm), its gradient norm {grad_norm:.4g} is above the limit of "
            f"{verdict.norm_limit:.4g} ({rule}). Further skips for a norm are counted and not shown."
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


_IN_WORDS = {
    "no_targets": "no token to predict",
    "forward": "a forward that was not finite",
    "teacher": "a teacher that was left out at every position",
    "overflow": "an overflow while the loss scale was being found",
    "gradient": "a gradient that was not finite at the lowest loss scale",
    "norm": "a gradient norm above the limit",
}
"""What a cause of `CAUSES` means"""

_NOTHING_APPLIED = {
    "no_targets": "look at the text and at --block_size",
    "forward": "crash/crash.md names the module",
    "teacher": "crash/crash.md says why",
    "overflow": "the loss scale needs more --train_steps, or a lower --init_loss_scale",
    "gradient": "crash/crash.md names the module",
    "norm": "--skip_rule adaptive lets the limit follow the run, or raise --skip_grad_norm",
}
"""What to try where this cause is why no update was applied"""


def skips_in_words(guard: StepGuard) -> str:
    """How many of the run's steps were skipped, and why; '' if none was."""
    counts = sorted(((count, cause) for cause, count in guard.skipped.items() if count), reverse=True)
    if not counts:
        return ""
    causes = ", ".join(f"{count} for {_IN_WORDS[cause]}" for count, cause in counts)
    return f"{sum(guard.skipped.values())} of {guard.attempts} steps were skipped: {causes}"


def nothing_applied(guard: StepGuard) -> str:
    """Why a run that ends without one applied update has failed, and what to try; '' if it has one."""
    if guard.applied or not guard.attempts:
        return ""
    most_frequent = max(CAUSES, key=lambda cause: guard.skipped[cause])
    return f"no update was applied ({skips_in_words(guard)}): {_NOTHING_APPLIED[most_frequent]}"
