"""Verdicts over plain numbers, and their counters."""

import json
import math
from statistics import median
from types import SimpleNamespace

import pytest

from sar_kd.config.presets import MODES
from sar_kd.config.sections import MIN_LOSS_SCALE, GuardConfig
from sar_kd.training.guards import CAUSES, StepGuard, nothing_applied, skips_in_words, verdict_messages

HEALTHY = {"num_targets": 100, "forward_finite": True, "grad_norm": 1.0, "loss_scale": 1024.0}
NAN_FORWARD = {**HEALTHY, "forward_finite": False}
NO_TEACHER = {**HEALTHY, "teacher_finite": False}
OVERFLOW = {**HEALTHY, "grad_norm": math.inf}
OVERFLOW_AT_FLOOR = {**OVERFLOW, "loss_scale": MIN_LOSS_SCALE}
LARGE = {**HEALTHY, "grad_norm": 2.6}
EMPTY = {**HEALTHY, "num_targets": 0, "grad_norm": 0.0}
ZERO_GRADIENT = {**HEALTHY, "grad_norm": 0.0}


def _guard(**settings) -> StepGuard:
    defaults = {"skip_grad_norm": 2.0, "skip_rule": "adaptive", "skip_factor": 4.0, "max_nan_batches": 10}
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
    guard = _guard(skip_rule="fixed")
    verdict = guard.judge(
        num_targets=num_targets, forward_finite=forward_finite, grad_norm=grad_norm, loss_scale=loss_scale
    )
    assert verdict.applied == (cause is None)
    assert verdict.cause == cause
    assert verdict.norm_limit == 2.0
    assert guard.applied == (cause is None)
    assert {cause: n for cause, n in guard.skipped.items() if n} == ({cause: 1} if cause else {})


@pytest.mark.parametrize("skip_rule", ["adaptive", "fixed"])
@pytest.mark.parametrize("grad_norm", [math.nan, math.inf])
def test_no_rule_applies_a_gradient_that_is_not_finite(skip_rule, grad_norm):
    guard = _guard(skip_rule=skip_rule, skip_grad_norm=math.inf)
    assert not guard.judge(**{**HEALTHY, "grad_norm": grad_norm}).applied


def test_every_cause_is_counted_apart():
    guard = _guard(skip_rule="fixed")
    attempts = HEALTHY, EMPTY, NAN_FORWARD, NO_TEACHER, OVERFLOW, OVERFLOW_AT_FLOOR, LARGE
    for times, attempt in enumerate(attempts, 1):
        _judge(guard, attempt, times)
    assert guard.applied == 1
    assert [guard.skipped[cause] for cause in CAUSES] == [2, 3, 4, 5, 6, 7]
    assert guard.attempts == 28
    assert guard.success_rate == pytest.approx(1 / 28)


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        ({}, "teacher"),
        ({"grad_norm": math.nan}, "teacher"),
        ({"grad_norm": 1e9}, "teacher"),
        ({"forward_finite": False}, "forward"),
        ({"num_targets": 0}, "no_targets"),
    ],
    ids=str,
)
def test_a_step_without_a_teacher_has_its_own_cause_before_every_cause_of_the_gradient(other, cause):
    guard = _guard()
    _judge(guard, HEALTHY, 10)
    assert guard.judge(**NO_TEACHER | other).cause == cause


def test_a_checkpoint_from_before_a_cause_was_known_counts_it_as_0():
    guard = _guard()
    state = guard.state_dict()
    del state["skipped"]["teacher"]
    state["skipped"]["norm"] = 3
    guard.load_state_dict(state)
    _judge(guard, NO_TEACHER)
    assert guard.skipped == dict.fromkeys(CAUSES, 0) | {"norm": 3, "teacher": 1}


def test_the_success_rate_is_one_before_the_first_attempt():
    assert _guard().success_rate == 1.0


# The emergency stop


@pytest.mark.parametrize("attempt", [NAN_FORWARD, NO_TEACHER, OVERFLOW_AT_FLOOR])
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


@pytest.mark.parametrize("between", [OVERFLOW, EMPTY])
def test_a_skip_without_a_finite_gradient_neither_counts_nor_resets_nan_batches(between):
    guard = _guard()
    _judge(guard, NAN_FORWARD, 9)
    assert not guard.judge(**between).emergency
    assert guard.consecutive_nan_batches == 9
    assert guard.judge(**NAN_FORWARD).emergency


def test_nan_batches_with_finite_updates_between_them_that_were_refused_are_not_consecutive():
    guard = _guard(skip_rule="fixed")
    verdicts = [guard.judge(**attempt) for _ in range(30) for attempt in (NAN_FORWARD, LARGE)]
    assert {verdict.cause for verdict in verdicts} == {"forward", "norm"}
    assert not any(verdict.emergency for verdict in verdicts)
    assert guard.max_consecutive_nan_batches == 1
    assert sum(verdict.frequent_nan for verdict in verdicts) == 1


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


def _norms(guard: StepGuard, *norms: float) -> list:
    return [guard.judge(**{**HEALTHY, "grad_norm": norm}) for norm in norms]


NOISE = [0.8 + 0.1 * (i * 7 % 5) for i in range(60)]
"""Factors of a norm, from 0.8 to 1.2, whose median is 1"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", [0.01, 2.7, 4.7, 300.0])
def test_a_run_whose_norms_stay_at_any_level_loses_no_step(mode, level):
    names = ("skip_grad_norm", "skip_rule", "skip_factor", "max_nan_batches")
    guard = _guard(**{name: MODES[mode][name] for name in names})
    assert all(verdict.applied for verdict in _norms(guard, *(level * factor for factor in NOISE)))


def test_the_first_five_norms_have_no_limit_and_the_sixth_has_one():
    verdicts = _norms(_guard(), 3.0, 2000.0, 2.8, 3.2, 3.0, 30.0)
    assert [verdict.norm_limit for verdict in verdicts[:5]] == [math.inf] * 5
    assert all(verdict.applied for verdict in verdicts[:5])
    assert (verdicts[5].cause, verdicts[5].norm_limit) == ("norm", pytest.approx(12.0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", [0.5, 3.0, 40.0])
@pytest.mark.parametrize("position", range(5, 45, 2))
def test_a_spike_of_ten_times_the_median_is_refused_wherever_it_comes(mode, level, position):
    names = ("skip_grad_norm", "skip_rule", "skip_factor", "max_nan_batches")
    guard = _guard(**{name: MODES[mode][name] for name in names})
    norms = [level * factor for factor in NOISE]
    norms[position] = 10 * level
    assert [i for i, verdict in enumerate(_norms(guard, *norms)) if not verdict.applied] == [position]


def test_twenty_spikes_in_one_run_are_all_refused():
    norms = [3.0 * factor for factor in NOISE]
    norms[6:46:2] = [30.0] * 20
    verdicts = _norms(_guard(), *norms)
    assert [i for i, verdict in enumerate(verdicts) if not verdict.applied] == list(range(6, 46, 2))


def test_norms_that_rise_for_good_cost_one_step():
    verdicts = _norms(_guard(), *[0.4] * 20, *[14.0 * factor for factor in NOISE])
    assert [i for i, verdict in enumerate(verdicts) if not verdict.applied] == [20]
    assert verdicts[21].norm_limit == pytest.approx(4 * 14.0 * 0.8)


def test_behind_a_refused_norm_a_larger_spike_is_still_refused():
    verdicts = _norms(_guard(), *[3.0] * 10, 30.0, 130.0, 3.0, 13.0)
    assert [verdict.applied for verdict in verdicts[10:]] == [False, False, True, False]


@pytest.mark.parametrize("between", [NAN_FORWARD, OVERFLOW, EMPTY])
def test_a_refused_norm_is_remembered_until_the_next_finite_norm(between):
    guard = _guard()
    _norms(guard, *[3.0] * 10, 30.0)
    _judge(guard, between, 3)
    assert _norms(guard, 30.0)[0].applied


def test_after_norms_have_risen_for_good_the_limit_follows_them_down_again():
    guard = _guard()
    _norms(guard, *[0.4] * 20, 14.0, 14.0, *[1.0] * 5)
    assert _norms(guard, 10.0)[0].cause == "norm"


def test_the_limit_is_the_factor_times_the_median_of_the_last_fifty_finite_norms():
    guard = _guard(skip_factor=3.0)
    norms = [2.0 + 0.001 * (i * 7 % 50) ** 2 for i in range(80)]
    for norm in norms:
        _norms(guard, norm)
        _judge(guard, OVERFLOW)
    assert guard.judge(**HEALTHY).norm_limit == pytest.approx(3.0 * median(norms[-50:]))


def test_the_limit_does_not_fall_below_the_setting():
    verdicts = _norms(_guard(), *[0.01] * 60, 1.99, 2.01)
    assert verdicts[-2].norm_limit == 2.0
    assert [verdict.applied for verdict in verdicts[-2:]] == [True, False]


def test_the_fixed_rule_never_adapts():
    verdicts = _judge(_guard(skip_rule="fixed"), LARGE, 200)
    assert not any(verdict.applied for verdict in verdicts)
    assert {verdict.norm_limit for verdict in verdicts} == {2.0}


@pytest.mark.parametrize(("skip_rule", "remedy"), [("adaptive", "4 times the median"), ("fixed", "adaptive lets it")])
def test_the_first_skip_for_a_norm_is_shown_at_once_with_norm_and_limit_and_the_next_ones_are_not(skip_rule, remedy):
    guard = _guard(skip_rule=skip_rule)
    norms = [1.0] * 6 + [7.5, 1.0, 7.5]
    shown = [
        verdict_messages(step, verdict, norm, (1.0, 1.0), guard.settings)
        for step, (norm, verdict) in enumerate(zip(norms, _norms(guard, *norms), strict=True), 1)
    ]
    (line,) = shown[6]
    limit = "4" if skip_rule == "adaptive" else "2"
    assert line.startswith(f"Step 7: skipped (norm), its gradient norm 7.5 is above the limit of {limit} (")
    assert remedy in line
    assert guard.skipped["norm"] == 2
    assert not any(shown[:6] + shown[7:])


def test_skips_are_counted_in_words():
    guard = _guard(skip_rule="fixed")
    assert skips_in_words(guard) == ""
    for times, attempt in ((5, HEALTHY), (3, LARGE), (1, OVERFLOW)):
        _judge(guard, attempt, times)
    assert skips_in_words(guard) == (
        "4 of 9 steps were skipped: 3 for a gradient norm above the limit, 1 for an overflow while the loss scale was "
        "being found"
    )
    assert nothing_applied(guard) == ""


@pytest.mark.parametrize(
    ("attempt", "remedy"),
    [(LARGE, "--skip_rule adaptive"), (OVERFLOW, "--init_loss_scale"), (EMPTY, "--block_size"), (NAN_FORWARD, "crash")],
)
def test_a_run_without_an_applied_update_has_a_reason_and_a_remedy(attempt, remedy):
    guard = _guard(skip_rule="fixed")
    assert nothing_applied(guard) == ""
    _judge(guard, attempt, 4)
    assert nothing_applied(guard).startswith("no update was applied (4 of 4 steps were skipped: 4 for ")
    assert remedy in nothing_applied(guard)


def test_norms_that_are_not_finite_do_not_enter_the_median():
    guard = _guard()
    _judge(guard, {**HEALTHY, "grad_norm": 3.0}, 20)
    for attempt in (OVERFLOW, OVERFLOW_AT_FLOOR, {**NAN_FORWARD, "grad_norm": math.nan}, EMPTY):
        _judge(guard, attempt, 5)
    assert guard.judge(**HEALTHY).norm_limit == 12.0


def test_the_settings_of_every_mode_make_a_guard():
    names = ("max_grad_norm", "skip_grad_norm", "skip_rule", "skip_factor", "max_nan_batches")
    for values in MODES.values():
        guard = StepGuard(GuardConfig(**{name: values[name] for name in names}))
        assert guard.judge(**HEALTHY).applied
        assert guard.settings.max_nan_batches == 10


# A resumed run


def _history(length: int) -> list[dict]:
    kinds = (*[LARGE] * 5, OVERFLOW, *[LARGE] * 4, NAN_FORWARD, LARGE)
    attempts = [{**kinds[i % len(kinds)]} | {"loss_scale": 2.0 ** (i % 5)} for i in range(length)]
    for i in (29, 50, 51, 90, 91):  # spikes; from the second of two the norms have risen for good
        attempts[i] = {**LARGE, "grad_norm": 40.0}
    return attempts


@pytest.mark.parametrize("skip_rule", ["adaptive", "fixed"])
@pytest.mark.parametrize("interrupted_at", [1, 4, 30, 50, 51, 91])
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
