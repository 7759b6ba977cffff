"""Every loss against its definition, written out in float64 with the probabilities formed explicitly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sar_kd.losses import (
    IGNORE_INDEX,
    LogitClamp,
    LossClamp,
    Projection,
    cross_entropy,
    finite_rows,
    forward_kl,
    next_token_targets,
    teacher_probs,
)

N, V = 7, 11


def _naive_softmax(row: Tensor, temperature: float = 1.0) -> Tensor:
    weights = torch.stack([(z / temperature).exp() for z in row])
    return weights / sum(weights)


def _naive_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return sum(-_naive_softmax(row)[target].log() for row, target in zip(logits, targets.tolist(), strict=True))


def _naive_forward_kl(student: Tensor, target_probs: Tensor, temperature: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, wanted in zip(student, target_probs, strict=True):
        given_probs = _naive_softmax(row, temperature)
        for p, q in zip(wanted, given_probs, strict=True):
            if p > 0:
                total = total + p * (p.log() - q.log())
    return total * temperature**2


def _logits(seed: int = 0, rows: int = N, columns: int = V, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


def _probs(seed: int = 1, rows: int = N, columns: int = V) -> Tensor:
    return _logits(seed, rows, columns, spread=2.0).softmax(-1)


def _targets(rows: int = N, columns: int = V) -> Tensor:
    return torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(2))


def _value_and_grad(function, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = function(leaf)
    value.backward()
    return value.detach(), leaf.grad


def _assert_matches(function, naive, logits: Tensor) -> None:
    value, grad = _value_and_grad(function, logits)
    wanted_value, wanted_grad = _value_and_grad(naive, logits.double())
    torch.testing.assert_close(value.double(), wanted_value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-4, atol=1e-6)


# The label shift


def test_the_row_of_a_position_predicts_the_label_after_it():
    labels = torch.tensor([[IGNORE_INDEX, 5, 6, 7], [IGNORE_INDEX, 8, IGNORE_INDEX, 9]])
    rows, targets = next_token_targets(labels)
    assert rows.tolist() == [0, 1, 2, 4, 6]
    assert targets.tolist() == [5, 6, 7, 8, 9]


def test_the_shift_does_not_wrap_into_the_next_sequence():
    rows, targets = next_token_targets(torch.tensor([[1, 2], [3, 4]]))
    assert (rows.tolist(), targets.tolist()) == ([0, 2], [2, 4])


def test_labels_without_a_target_give_no_rows():
    rows, targets = next_token_targets(torch.full((2, 3), IGNORE_INDEX))
    assert len(rows) == len(targets) == 0


@pytest.mark.parametrize(("ahead", "is_near_zero"), [(0, False), (1, True), (2, False)])
def test_only_a_model_wired_to_the_next_token_scores_near_zero(ahead, is_near_zero):
    ids = torch.stack([torch.randperm(V) for _ in range(4)])
    logits = torch.zeros(*ids.shape, V)
    for t in range(ids.shape[1] - ahead):
        logits[torch.arange(4), t, ids[:, t + ahead]] = 30.0
    rows, targets = next_token_targets(ids)
    loss = cross_entropy(logits.flatten(0, 1)[rows], targets)[0] / len(rows)
    assert (loss < 1e-6) == is_near_zero


# Cross-entropy


@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_matches_its_definition(seed):
    targets = _targets()
    _assert_matches(
        lambda z: cross_entropy(z, targets)[0], lambda z: _naive_cross_entropy(z, targets), _logits(seed, spread=5.0)
    )


def test_cross_entropy_of_equal_logits_is_log_v_for_each_row():
    loss, _ = cross_entropy(torch.zeros(N, V), _targets())
    assert loss.item() == pytest.approx(N * math.log(V), rel=1e-6)


def test_losses_are_float32_sums_whatever_the_logits_are():
    logits, probs = _logits().half(), _probs()
    for value in (*cross_entropy(logits, _targets()), *forward_kl(logits, probs)):
        assert (value.dtype, value.shape) == (torch.float32, ())


# Forward KL


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 4.0])
def test_forward_kl_matches_its_definition(temperature):
    probs = _probs()
    _assert_matches(
        lambda z: forward_kl(z, probs, temperature)[0],
        lambda z: _naive_forward_kl(z, probs.double(), temperature),
        _logits(),
    )


def test_forward_kl_is_taken_from_the_teacher_to_the_student():
    teacher, student = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    loss, _ = forward_kl(student.log(), teacher)
    assert loss.item() == pytest.approx(forward, rel=1e-5)
    assert abs(forward - reverse) > 0.1


def test_forward_kl_takes_a_target_of_probability_zero():
    loss, _ = forward_kl(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    assert loss.item() == pytest.approx(math.log(math.exp(2) + math.exp(1) + 1) - 2, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("style", ["off", "normalized"])
def test_forward_kl_of_equal_distributions_is_zero_with_zero_gradient(temperature, style):
    logits = _logits(spread=8.0)
    targets, _ = teacher_probs(logits, V, temperature)
    value, grad = _value_and_grad(lambda z: forward_kl(z, targets, temperature, LogitClamp(style, 5.0))[0], logits)
    assert abs(value) < 1e-5
    assert grad.abs().max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**30), spread=st.floats(0.1, 30), temperature=st.floats(0.3, 5))
def test_forward_kl_is_never_negative(seed, spread, temperature):
    loss, _ = forward_kl(_logits(seed, spread=spread), _probs(seed + 1), temperature)
    assert loss > -1e-4


@pytest.mark.parametrize("style", ["off", "normalized"])
def test_losses_do_not_see_a_constant_added_to_a_row(style):
    clamp, logits, probs = LogitClamp(style, 5.0), _logits(), _probs()
    shifted = logits + torch.linspace(-80, 80, N)[:, None]
    torch.testing.assert_close(forward_kl(shifted, probs, 2.0, clamp)[0], forward_kl(logits, probs, 2.0, clamp)[0])
    torch.testing.assert_close(
        cross_entropy(shifted, _targets(), clamp)[0], cross_entropy(logits, _targets(), clamp)[0]
    )


# The teacher's rows


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_teacher_probs_are_the_softmax_at_the_temperature(temperature):
    probs, dropped = teacher_probs(_logits(), V, temperature)
    wanted = torch.stack([_naive_softmax(row, temperature) for row in _logits().double()])
    torch.testing.assert_close(probs.double(), wanted, rtol=1e-5, atol=1e-7)
    assert dropped == 0


def test_rows_of_a_padded_teacher_head_take_no_part():
    padded = torch.cat([_logits(), torch.full((N, 3), 50.0)], dim=1)
    torch.testing.assert_close(teacher_probs(padded, V)[0], teacher_probs(_logits(), V)[0])


def test_only_the_raw_clamp_changes_the_teacher():
    logits = _logits(spread=9.0)
    raw, _ = teacher_probs(logits, V, 2.0, LogitClamp("raw", 5.0))
    torch.testing.assert_close(raw, teacher_probs(logits.clamp(-5, 5), V, 2.0)[0])
    assert torch.equal(
        teacher_probs(logits, V, 2.0, LogitClamp("normalized", 5.0))[0], teacher_probs(logits, V, 2.0)[0]
    )


TEACHER = [b"a", b"ab", b"abc", b"b", b"", b"abcd", b"bd", b"c", b"cab", b"d"]
STUDENT = [b"", b"a", b"b", b"c", b"d", b"bc", b"ca"]
# Of the emitted bytes of each row, open rows first. Row 3: what may follow "a" is b, bc, bcd.
PREFIXES = [b"", b"", b"", b"a", b"c", b"ab", b"a", b"b"]


def _phi(remainder: bytes) -> int:
    """The longest student token that begins the remainder."""
    return max(
        (u for u, piece in enumerate(STUDENT) if piece and remainder.startswith(piece)), key=lambda u: len(STUDENT[u])
    )


def _extensions(prefix: bytes) -> list[int]:
    return [v for v, piece in enumerate(TEACHER) if piece.startswith(prefix) and len(piece) > len(prefix)]


def _projection() -> Projection:
    entries = []
    for row, prefix in enumerate(PREFIXES[3:]):
        entries += [(row, v, _phi(TEACHER[v][len(prefix) :])) for v in _extensions(prefix)]
    columns = _extensions(b"")
    tensors = [columns, [_phi(TEACHER[v]) for v in columns], *zip(*entries, strict=True)]
    return Projection(3, *map(torch.tensor, tensors))


def _naive_projected(logits: Tensor, temperature: float) -> Tensor:
    rows = []
    for row, prefix in zip(logits, PREFIXES, strict=True):
        probs = [0.0] * len(STUDENT)
        allowed = _extensions(prefix)
        total = sum((row[v] / temperature).exp() for v in allowed)
        for v in allowed:
            probs[_phi(TEACHER[v][len(prefix) :])] += (row[v] / temperature).exp() / total
        rows.append(torch.stack([torch.as_tensor(p, dtype=torch.float64) for p in probs]))
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_projected_rows_match_their_definition(temperature):
    logits = _logits(3, len(PREFIXES), len(TEACHER))
    probs, dropped = teacher_probs(logits, len(STUDENT), temperature, projection=_projection())
    torch.testing.assert_close(probs.double(), _naive_projected(logits.double(), temperature), rtol=1e-5, atol=1e-7)
    assert dropped == 0


def test_the_divergence_from_projected_rows_matches_its_definition():
    teacher_logits, projection = _logits(3, len(PREFIXES), len(TEACHER)), _projection()
    wanted = _naive_projected(teacher_logits.double(), 2.0)
    targets, _ = teacher_probs(teacher_logits, len(STUDENT), 2.0, projection=projection)
    _assert_matches(
        lambda z: forward_kl(z, targets, 2.0)[0],
        lambda z: _naive_forward_kl(z, wanted, 2.0),
        _logits(4, len(PREFIXES), len(STUDENT)),
    )


def test_an_emitted_prefix_of_vanishing_probability_still_gives_a_distribution():
    logits = _logits(3, len(PREFIXES), len(TEACHER))
    certain = logits.clone()
    certain[:, TEACHER.index(b"d")] = 1e4  # extends no prefix but the empty one
    probs, _ = teacher_probs(certain, len(STUDENT), projection=_projection())
    wanted, _ = teacher_probs(logits, len(STUDENT), projection=_projection())
    torch.testing.assert_close(probs[3:], wanted[3:])


def test_the_raw_clamp_acts_on_the_teacher_before_the_projection():
    logits = _logits(3, len(PREFIXES), len(TEACHER), spread=9.0)
    clamped, _ = teacher_probs(logits, len(STUDENT), 2.0, LogitClamp("raw", 5.0), _projection())
    wanted, _ = teacher_probs(logits.clamp(-5, 5), len(STUDENT), 2.0, projection=_projection())
    torch.testing.assert_close(clamped, wanted)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("projected", [False, True])
def test_teacher_rows_not_finite_become_zero_rows_and_are_counted(bad, projected):
    projection, columns = (_projection(), len(STUDENT)) if projected else (None, len(TEACHER))
    logits = _logits(3, len(PREFIXES), len(TEACHER))
    healthy, _ = teacher_probs(logits, columns, 1.5, projection=projection)
    logits[1, 2] = logits[5, 5] = bad
    probs, dropped = teacher_probs(logits, columns, 1.5, projection=projection)
    kept = [0, 2, 3, 4, 6, 7]
    assert dropped == 2
    assert torch.equal(probs[[1, 5]], torch.zeros(2, columns))
    torch.testing.assert_close(probs[kept], healthy[kept])


@pytest.mark.parametrize("style", ["off", "normalized", "raw"])
def test_a_dropped_teacher_row_adds_neither_value_nor_gradient(style):
    clamp, probs, logits = LogitClamp(style, 5.0), _probs(), _logits()
    kept = [i for i in range(N) if i != 3]
    wanted, wanted_grad = _value_and_grad(lambda z: forward_kl(z, probs[kept], 2.0, clamp)[0], logits[kept])
    probs[3] = 0.0
    value, grad = _value_and_grad(lambda z: forward_kl(z, probs, 2.0, clamp)[0], logits)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(grad[kept], wanted_grad)
    assert torch.equal(grad[3], torch.zeros(V))


@pytest.mark.parametrize("bad", [[math.inf], [-math.inf], [math.nan], [math.inf, -math.inf]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finite_rows_finds_every_row_with_a_number_that_is_not_finite(bad, dtype):
    logits = _logits().to(dtype)
    logits[2, : len(bad)] = torch.tensor(bad, dtype=dtype)
    assert finite_rows(logits).tolist() == [row != 2 for row in range(N)]


def test_finite_rows_accepts_rows_whose_sum_overflows_float16():
    assert finite_rows(torch.full((2, 1000), 65504.0, dtype=torch.float16)).all()


# The clamps


def _cross_entropy_with(clamp: LogitClamp):
    return lambda z: cross_entropy(z, _targets(), clamp)[0]


def _forward_kl_with(clamp: LogitClamp):
    return lambda z: forward_kl(z, _probs(), 2.0, clamp)[0]


BOTH_LOSSES = pytest.mark.parametrize("loss_with", [_cross_entropy_with, _forward_kl_with])


@BOTH_LOSSES
def test_the_normalized_clamp_has_the_gradient_of_no_clamp(loss_with):
    logits = _logits(spread=40.0)
    bounded, grad = _value_and_grad(loss_with(LogitClamp("normalized", 5.0)), logits)
    free, free_grad = _value_and_grad(loss_with(LogitClamp("off")), logits)
    assert bounded < free
    assert torch.equal(grad, free_grad)


def test_the_normalized_clamp_floors_log_probabilities_at_twice_the_bound():
    logits = torch.tensor([[0.0, -9.0, -50.0]])
    losses = [cross_entropy(logits, torch.tensor([y]), LogitClamp("normalized", 5.0))[0].item() for y in range(3)]
    assert losses == pytest.approx([1.234e-4, 9.0001234, 10.0], rel=1e-3)


def test_the_normalized_clamp_floors_both_sides_of_the_divergence():
    teacher = torch.tensor([[1.0 - 1e-6, 1e-6, 0.0]])
    student = torch.tensor([[-40.0, 0.0, -40.0]])
    loss, raw = forward_kl(student, teacher, clamp=LogitClamp("normalized", 5.0))
    assert loss.item() == pytest.approx((1 - 1e-6) * 10.0 + 1e-6 * -10.0, rel=1e-5)
    assert raw.item() == pytest.approx(40.0, rel=1e-4)


@BOTH_LOSSES
def test_the_normalized_clamp_is_no_clamp_within_its_bound(loss_with):
    logits = _logits(spread=1.0)
    assert torch.equal(
        *(_value_and_grad(loss_with(LogitClamp(style, 5.0)), logits)[1] for style in ("normalized", "off"))
    )
    torch.testing.assert_close(loss_with(LogitClamp("normalized", 5.0))(logits), loss_with(LogitClamp("off"))(logits))


@BOTH_LOSSES
def test_the_raw_clamp_is_the_literal_clamp_with_its_gradient(loss_with):
    logits = _logits(spread=6.0)
    value, grad = _value_and_grad(loss_with(LogitClamp("raw", 5.0)), logits)
    wanted, wanted_grad = _value_and_grad(lambda z: loss_with(LogitClamp("off"))(z.clamp(-5, 5)), logits)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(grad, wanted_grad)
    outside = logits.abs() > 5
    assert outside.any()
    assert torch.equal(grad[outside], torch.zeros(int(outside.sum())))


@pytest.mark.parametrize("style", ["off", "normalized", "raw"])
def test_the_loss_reported_beside_the_cross_entropy_knows_no_clamp_and_has_no_gradient(style):
    logits = _logits(spread=40.0).requires_grad_()
    _, reported = cross_entropy(logits, _targets(), LogitClamp(style, 5.0))
    torch.testing.assert_close(reported.double(), _naive_cross_entropy(logits.detach().double(), _targets()))
    assert not reported.requires_grad


def test_the_divergence_reported_beside_the_floored_one_has_no_floor_and_no_gradient():
    logits = _logits(spread=40.0).requires_grad_()
    loss, reported = forward_kl(logits, _probs(), 2.0, LogitClamp("normalized", 5.0))
    wanted = _naive_forward_kl(logits.detach().double(), _probs().double(), 2.0)
    torch.testing.assert_close(reported.double(), wanted, rtol=1e-5, atol=1e-5)
    assert loss < reported
    assert not reported.requires_grad


def test_a_scaled_loss_counts_its_limit_and_keeps_the_direction_of_its_gradient():
    clamp, weights = LossClamp("scale", 6.0), torch.tensor([3.0, 4.0])
    value, grad = _value_and_grad(lambda w: clamp((w**2).sum()), weights)
    assert value.item() == pytest.approx(6.0)
    torch.testing.assert_close(grad, 2 * weights * (6.0 / 25.0))


def test_a_hard_clamped_loss_counts_its_limit_and_has_no_gradient():
    value, grad = _value_and_grad(lambda w: LossClamp("hard", 6.0)((w**2).sum()), torch.tensor([3.0, 4.0]))
    assert value == 6.0
    assert torch.equal(grad, torch.zeros(2))


@pytest.mark.parametrize("style", ["scale", "hard", "off"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.4])
def test_a_loss_below_the_limit_is_left_as_it_is(style, weight):
    value, grad = _value_and_grad(lambda w: LossClamp(style, 6.0)(w**2), torch.tensor(weight))
    assert value.item() == pytest.approx(weight**2)
    assert grad.item() == pytest.approx(2 * weight)


def test_no_loss_clamp_leaves_a_large_loss_as_it_is():
    value, grad = _value_and_grad(lambda w: LossClamp()(w**2), torch.tensor(100.0))
    assert (value.item(), grad.item()) == (10000.0, 200.0)


@pytest.mark.parametrize("style", ["scale", "hard", "off"])
def test_a_loss_that_is_nan_stays_nan(style):
    assert LossClamp(style, 6.0)(torch.tensor(math.nan)).isnan()


# float16


@pytest.mark.parametrize("style", ["off", "normalized", "raw"])
def test_the_largest_float16_logits_give_finite_losses_and_gradients(style):
    logits = torch.where(_logits() > 0, 6e4, -6e4).half().requires_grad_()
    clamp = LogitClamp(style, 5.0)
    targets, dropped = teacher_probs(-logits.detach(), V, 2.0, clamp)
    ce, _ = cross_entropy(logits, _targets(), clamp)
    kd, _ = forward_kl(logits, targets, 2.0, clamp)
    (ce + kd).backward()
    assert dropped == 0
    assert targets.isfinite().all()
    assert ce.isfinite()
    assert kd.isfinite()
    assert logits.grad.isfinite().all()


def _half_log_probs(logits: Tensor) -> Tensor:
    """What code that stays in float16 computes."""
    shifted = logits - logits.max(-1, keepdim=True).values
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


@pytest.mark.parametrize("seed", range(5))
def test_float16_logits_cost_less_than_float16_arithmetic(seed):
    logits, targets = _logits(seed, 64, 500).half(), _targets(64, 500)
    truth = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    naive = -_half_log_probs(logits).gather(1, targets[:, None]).sum()
    loss, _ = cross_entropy(logits, targets)
    assert abs(loss - truth) <= 1e-5 * truth
    assert abs(loss - truth) < abs(naive.double() - truth)


@pytest.mark.parametrize("seed", range(5))
def test_a_divergence_from_float16_logits_costs_less_than_float16_arithmetic(seed):
    student, teacher = _logits(seed, 64, 500).half(), _logits(seed + 9, 64, 500).half()
    log_p, log_q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    truth = (log_p.exp() * (log_p - log_q)).sum()
    half_p = _half_log_probs(teacher)
    naive = (half_p.exp() * (half_p - _half_log_probs(student))).sum()
    loss, _ = forward_kl(student, teacher_probs(teacher, 500)[0])
    assert abs(loss - truth) <= 1e-5 * truth
    assert abs(loss - truth) < abs(naive.double() - truth)
