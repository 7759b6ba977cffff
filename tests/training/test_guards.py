"""Verdicts over plain numbers, and their counters."""

import json
import math
from statistics import median
from types import SimpleNamespace

import pytest

from sar_kd.config.presets import MODES
from sar_kd.config.sections import MIN_LOSS_SCALE, GuardConfig
from sar_kd.training.guards import CAUSES, StepGuard

HEALTHY = {"num_targets": 100, "forward_finite": True, "grad_norm": 1.0, "loss_scale": 1024.0}
NAN_FORWARD = {**HEALTHY, "forward_finite": False}
OVERFLOW = {**HEALTHY, "grad_norm": math.inf}
OVERFLOW_AT_FLOOR = {**OVERFLOW, "loss_scale": MIN_LOSS_SCALE}
LARGE = {**HEALTHY, "grad_norm": 2.6}
EMPTY = {**HEALTHY, "num_targets": 0, "grad_norm": 0.0}
ZERO_GRADIENT = {**HEALTHY, "grad_norm": 0.0}


def _guard(**settings) -> StepGuard:
    defaults = {"skip_grad_norm": 2.0, "skip_rule": "storm", "skip_factor": 2.0, "max_nan_batches": 10}
    return StepGuard(SimpleNamespace(**{**defaults, **settings}))


def _judge(guard: StepGuard, attempt: dict, times: int = 1) -> list:
    return [guard.judge(**attempt) for _ in range(times)]


@pytest.mark.parametrize(
    ("num_targets", "forward_finite", "grad_norm", "loss_scale", "cause"),
    [
        (100, True, 0.0, 1024.0, None),
        (100, True, 2.0, 1024.0, None),
        (1, True, 1.0, 1.0, None),
        (100, True, math.nextafter(2.0, 3.0), 1024.0, "norm"),
        (100, True, 1e30, 1.0, "norm"),
        (100, True, math.inf, 2.0, "overflow"),
        (100, True, math.nan, 2.0, "overflow"),
        (100, True, math.inf, 1.0, "gradient"),
        (100, True, math.nan, 1.0, "gradient"),
        (100, False, 1.0, 1024.0, "forward"),
        (100, False, math.nan, 1024.0, "forward"),
        (100, False, math.inf, 1.0, "forward"),
        (0, True, 0.0, 1024.0, "no_targets"),
        (0, False, math.nan, 1.0, "no_targets"),
    ],
)
def test_every_attempt_has_one_verdict(num_targets, forward_finite, grad_norm, loss_scale, cause):
    guard = _guard()
    verdict = guard.judge(
        num_targets=num_targets, forward_finite=forward_finite, grad_norm=grad_norm, loss_scale=loss_scale
    )
    assert verdict.applied == (cause is None)
    assert verdict.cause == cause
    assert verdict.norm_limit == 2.0
    assert guard.applied == (cause is None)
    assert {cause: n for cause, n in guard.skipped.items() if n} == ({cause: 1} if cause else {})


@pytest.mark.parametrize("skip_rule", ["storm", "adaptive", "fixed"])
@pytest.mark.parametrize("grad_norm", [math.nan, math.inf])
def test_no_rule_applies_a_gradient_that_is_not_finite(skip_rule, grad_norm):
    guard = _guard(skip_rule=skip_rule, skip_grad_norm=math.inf)
    assert not guard.judge(**{**HEALTHY, "grad_norm": grad_norm}).applied


def test_every_cause_is_counted_apart():
    guard = _guard()
    for times, attempt in enumerate((HEALTHY, EMPTY, NAN_FORWARD, OVERFLOW, OVERFLOW_AT_FLOOR, LARGE), 1):
        _judge(guard, attempt, times)
    assert guard.applied == 1
    assert [guard.skipped[cause] for cause in CAUSES] == [2, 3, 4, 5, 6]
    assert guard.attempts == 21
    assert guard.success_rate == pytest.approx(1 / 21)


def test_the_success_rate_is_one_before_the_first_attempt():
    assert _guard().success_rate == 1.0


# The emergency stop


@pytest.mark.parametrize("attempt", [NAN_FORWARD, OVERFLOW_AT_FLOOR])
def test_the_tenth_consecutive_nan_batch_is_an_emergency(attempt):
    verdicts = _judge(_guard(), attempt, 10)
    assert [verdict.emergency for verdict in verdicts] == [False] * 9 + [True]


def test_an_applied_step_starts_the_count_of_nan_batches_again():
    guard = _guard()
    verdicts = _judge(guard, NAN_FORWARD, 9) + _judge(guard, HEALTHY) + _judge(guard, NAN_FORWARD, 9)
    assert not any(verdict.emergency for verdict in verdicts)
    assert guard.judge(**NAN_FORWARD).emergency


def test_the_largest_number_of_consecutive_nan_batches_is_kept():
    guard = _guard()
    _judge(guard, NAN_FORWARD, 7)
    _judge(guard, HEALTHY)
    _judge(guard, NAN_FORWARD, 3)
    assert (guard.consecutive_nan_batches, guard.max_consecutive_nan_batches) == (3, 7)


@pytest.mark.parametrize("between", [OVERFLOW, LARGE, EMPTY])
def test_a_skip_of_another_cause_neither_counts_nor_resets_nan_batches(between):
    guard = _guard()
    _judge(guard, NAN_FORWARD, 9)
    assert not guard.judge(**between).emergency
    assert guard.consecutive_nan_batches == 9
    assert guard.judge(**NAN_FORWARD).emergency


def test_calibration_of_the_loss_scale_is_never_an_emergency():
    guard = _guard()
    verdicts = [guard.judge(**{**OVERFLOW, "loss_scale": 2.0**power}) for power in range(20, 0, -1)]
    assert {verdict.cause for verdict in verdicts} == {"overflow"}
    assert not any(verdict.emergency for verdict in verdicts)
    assert guard.max_consecutive_nan_batches == 0


def test_the_number_of_nan_batches_allowed_is_a_setting():
    verdicts = _judge(_guard(max_nan_batches=3), NAN_FORWARD, 3)
    assert [verdict.emergency for verdict in verdicts] == [False, False, True]


# Alarms, which change nothing


def test_ten_nan_batches_among_fifty_attempts_are_reported_once():
    guard = _guard()
    verdicts = [guard.judge(**attempt) for attempt in [*[NAN_FORWARD] * 9, HEALTHY, *[NAN_FORWARD] * 9, HEALTHY] * 3]
    assert [verdict.frequent_nan for verdict in verdicts].index(True) == 10
    assert sum(verdict.frequent_nan for verdict in verdicts) == 1
    assert not any(verdict.emergency for verdict in verdicts)


def test_an_emergency_is_not_also_an_alarm():
    assert [verdict.frequent_nan for verdict in _judge(_guard(), NAN_FORWARD, 10)] == [False] * 10


def test_ten_nan_batches_in_a_long_run_are_no_alarm():
    guard = _guard()
    assert not any(
        verdict.frequent_nan for _ in range(40) for verdict in [*_judge(guard, HEALTHY, 9), guard.judge(**NAN_FORWARD)]
    )


def test_the_tenth_update_without_a_gradient_is_reported_and_all_are_counted():
    guard = _guard()
    verdicts = _judge(guard, ZERO_GRADIENT, 12) + _judge(guard, HEALTHY) + _judge(guard, ZERO_GRADIENT, 9)
    assert [i for i, verdict in enumerate(verdicts) if verdict.zero_gradient] == [9]
    assert guard.zero_gradient_steps == 21
    assert all(verdict.applied for verdict in verdicts)


# The norm limit


def test_a_skip_storm_is_reported_once_and_the_limit_then_follows_the_median():
    guard = _guard()
    verdicts = _judge(guard, LARGE, 52)
    assert [i for i, verdict in enumerate(verdicts) if verdict.storm] == [49]
    assert not verdicts[49].applied
    assert [verdict.applied for verdict in verdicts[50:]] == [True, True]
    assert verdicts[51].norm_limit == pytest.approx(2 * 2.6)


@pytest.mark.parametrize(("num_skipped", "is_storm"), [(39, False), (40, True)])
def test_a_storm_is_four_fifths_of_fifty_attempts(num_skipped, is_storm):
    guard = _guard()
    verdicts = _judge(guard, LARGE, num_skipped) + _judge(guard, HEALTHY, 50 - num_skipped)
    assert verdicts[-1].storm == is_storm
    assert not any(verdict.storm for verdict in verdicts[:-1])


def test_a_storm_is_recognised_in_the_last_fifty_attempts_of_a_long_run():
    guard = _guard()
    verdicts = _judge(guard, HEALTHY, 200) + _judge(guard, LARGE, 60)
    assert [i for i, verdict in enumerate(verdicts) if verdict.storm] == [239]


def test_many_skips_among_as_many_updates_are_no_storm():
    guard = _guard()
    verdicts = [verdict for _ in range(10) for verdict in _judge(guard, LARGE, 10) + _judge(guard, HEALTHY, 10)]
    assert not any(verdict.storm for verdict in verdicts)


def test_skips_of_other_causes_are_no_storm():
    verdicts = _judge(_guard(max_nan_batches=1000), OVERFLOW, 60)
    assert not any(verdict.storm for verdict in verdicts)


def test_after_a_storm_the_limit_is_the_factor_times_the_median_of_the_last_fifty_finite_norms():
    guard = _guard(skip_factor=3.0)
    _judge(guard, LARGE, 50)
    norms = [2.0 + 0.001 * (i * 7 % 50) ** 2 for i in range(80)]
    for norm in norms:
        _judge(guard, {**HEALTHY, "grad_norm": norm})
        _judge(guard, OVERFLOW)
    assert guard.judge(**HEALTHY).norm_limit == pytest.approx(3.0 * median(norms[-50:]))


def test_after_a_storm_the_limit_does_not_fall_below_the_setting():
    guard = _guard()
    _judge(guard, LARGE, 50)
    verdicts = _judge(guard, {**HEALTHY, "grad_norm": 0.01}, 60)
    assert verdicts[-1].norm_limit == 2.0


def test_after_a_storm_a_spike_is_still_refused():
    guard = _guard()
    _judge(guard, LARGE, 55)
    assert guard.judge(**{**HEALTHY, "grad_norm": 5.3}).cause == "norm"
    assert guard.judge(**{**HEALTHY, "grad_norm": 5.1}).applied


def test_the_fixed_rule_never_adapts():
    verdicts = _judge(_guard(skip_rule="fixed"), LARGE, 200)
    assert not any(verdict.applied or verdict.storm for verdict in verdicts)
    assert {verdict.norm_limit for verdict in verdicts} == {2.0}


def test_the_adaptive_rule_has_no_limit_before_twenty_norms():
    guard = _guard(skip_rule="adaptive", skip_factor=4.0)
    verdicts = _judge(guard, {**HEALTHY, "grad_norm": 30.0}, 20)
    assert all(verdict.applied and verdict.norm_limit == math.inf for verdict in verdicts)
    assert guard.judge(**{**HEALTHY, "grad_norm": 120.1}).cause == "norm"
    assert guard.judge(**{**HEALTHY, "grad_norm": 119.9}).applied


def test_the_adaptive_rule_may_fall_below_the_setting_and_knows_no_storm():
    guard = _guard(skip_rule="adaptive")
    verdicts = _judge(guard, {**HEALTHY, "grad_norm": 0.1}, 21) + _judge(guard, {**HEALTHY, "grad_norm": 0.3})
    assert verdicts[-1].cause == "norm"
    assert not any(verdict.storm for verdict in verdicts)


def test_norms_that_are_not_finite_do_not_enter_the_median():
    guard = _guard(skip_rule="adaptive")
    _judge(guard, {**HEALTHY, "grad_norm": 3.0}, 20)
    for attempt in (OVERFLOW, OVERFLOW_AT_FLOOR, {**NAN_FORWARD, "grad_norm": math.nan}, EMPTY):
        _judge(guard, attempt, 5)
    assert guard.judge(**HEALTHY).norm_limit == 6.0


def test_the_settings_of_every_mode_make_a_guard():
    names = ("max_grad_norm", "skip_grad_norm", "skip_rule", "skip_factor", "max_nan_batches")
    for values in MODES.values():
        guard = StepGuard(GuardConfig(**{name: values[name] for name in names}))
        assert guard.judge(**HEALTHY).applied
        assert guard.settings.max_nan_batches == 10


# A resumed run


def _history(length: int) -> list[dict]:
    kinds = (*[LARGE] * 5, OVERFLOW, *[LARGE] * 4, NAN_FORWARD, LARGE)  # a storm at the 50th attempt
    return [{**kinds[i % len(kinds)]} | {"loss_scale": 2.0 ** (i % 5)} for i in range(length)]


@pytest.mark.parametrize("skip_rule", ["storm", "adaptive", "fixed"])
@pytest.mark.parametrize("interrupted_at", [1, 30, 49, 50, 90])
def test_a_guard_restored_from_json_gives_the_same_verdicts(skip_rule, interrupted_at):
    guard, restored = _guard(skip_rule=skip_rule), _guard(skip_rule=skip_rule)
    history = _history(150)
    for attempt in history[:interrupted_at]:
        guard.judge(**attempt)
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    rest = history[interrupted_at:]
    assert [guard.judge(**attempt) for attempt in rest] == [restored.judge(**attempt) for attempt in rest]
    assert guard.state_dict() == restored.state_dict()


@pytest.mark.parametrize(
    ("history", "last", "alarm"),
    [
        ([*[NAN_FORWARD] * 9, HEALTHY], NAN_FORWARD, "frequent_nan"),
        ([ZERO_GRADIENT] * 9, ZERO_GRADIENT, "zero_gradient"),
    ],
    ids=["frequent_nan", "zero_gradient"],
)
def test_alarms_survive_a_restart(history, last, alarm):
    guard, restored = _guard(), _guard()
    for attempt in history:
        guard.judge(**attempt)
    restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert getattr(restored.judge(**last), alarm)


def test_the_count_of_nan_batches_survives_a_restart():
    guard, restored = _guard(), _guard()
    _judge(guard, NAN_FORWARD, 9)
    restored.load_state_dict(guard.state_dict())
    assert restored.judge(**NAN_FORWARD).emergency
    assert restored.max_consecutive_nan_batches == 10
