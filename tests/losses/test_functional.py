"""Every loss against its definition, written out in float64 with the probabilities formed explicitly."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sar_kd.data.batch import IGNORE_INDEX, MASKED_LOGIT, next_token_targets
from sar_kd.losses import tiled_loss
from sar_kd.losses.divergence import Divergence
from sar_kd.losses.functional import (
    GroupSums,
    LogitClamp,
    LossClamp,
    all_finite,
    chunk_likelihood,
    log1mexp,
    sorted_distance,
    state_distance,
)
from sar_kd.losses.projection.marginals import on_support
from tests.helpers.lm_heads import cross_entropy, lazy_logits

N, V = 7, 11
FORWARD, REVERSE, JSD = Divergence("forward"), Divergence("reverse"), Divergence("jsd", 0.3)
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", [FORWARD, REVERSE, JSD], ids=["forward", "reverse", "jsd"])


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return tiled_loss.target_log_probs(lazy_logits(logits), targets, 3)[0]


def _naive_softmax(row: Tensor, temperature: float = 1.0) -> Tensor:
    weights = torch.stack([(z / temperature).exp() for z in row])
    return weights / sum(weights)


def _naive_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return sum(-_naive_softmax(row)[target].log() for row, target in zip(logits, targets.tolist(), strict=True))


def _naive_kl(first: Tensor, second: Tensor, floor: float = -math.inf) -> Tensor:
    """KL(first || second) of two rows of probabilities."""
    pairs = zip(first, second, strict=True)
    return sum(a * (a.log().clamp_min(floor) - b.log().clamp_min(floor)) for a, b in pairs if a > 0)


def _naive_divergence(student: Tensor, teacher: Tensor, kind: Divergence, temperature: float = 1.0) -> Tensor:
    """From logits, row by row."""
    total, beta = torch.zeros((), dtype=torch.float64), kind.beta
    for z, y in zip(student, teacher, strict=True):
        p, t = _naive_softmax(z, temperature), _naive_softmax(y, temperature)
        if kind.direction == "forward":
            total = total + _naive_kl(t, p, kind.floor)
        elif kind.direction == "reverse":
            total = total + _naive_kl(p, t, kind.floor)
        else:
            m = beta * t + (1 - beta) * p
            total = total + beta * _naive_kl(t, m, kind.floor) + (1 - beta) * _naive_kl(p, m, kind.floor)
    return total


def _logits(seed: int = 0, rows: int = N, columns: int = V, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


def _targets(rows: int = N, columns: int = V) -> Tensor:
    return torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(2))


TEACHER = _logits(1, spread=2.0)


def _diverge(divergence: Divergence, teacher: Tensor = TEACHER, temperature: float = 1.0, keep=None):
    """The divergence as a function of the student's logits."""
    log_t = (teacher / temperature).log_softmax(-1)
    return lambda z: divergence((z / temperature).log_softmax(-1), log_t.to(z.dtype), keep)[0]


def _value_and_grad(function, logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = function(leaf)
    value.backward()
    return value.detach(), leaf.grad


def _assert_matches(function, naive, logits: Tensor) -> None:
    value, grad = _value_and_grad(function, logits)
    wanted_value, wanted_grad = _value_and_grad(naive, logits.double())
    torch.testing.assert_close(value.double(), wanted_value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-4, atol=4e-6)


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
    logits, teacher, log_probs = _logits().half(), TEACHER.half(), _logits().log_softmax(-1)
    losses = [
        *cross_entropy(logits, _targets()),
        *FORWARD(log_probs, log_probs),
        chunk_likelihood(log_probs[:, 0], log_probs[:, 1]),
        sorted_distance(logits, teacher),
        state_distance(logits, teacher),
    ]
    for value in losses:
        assert (value.dtype, value.shape) == (torch.float32, ())


@pytest.mark.parametrize("seed", range(3))
def test_the_log_probability_of_a_target_matches_its_definition(seed):
    targets = _targets()
    logits = _logits(seed, spread=5.0)
    wanted = torch.stack([_naive_softmax(row)[y].log() for row, y in zip(logits.double(), targets, strict=True)])
    found = target_log_probs(logits.half().float(), targets)
    assert found.dtype is target_log_probs(logits.half(), targets).dtype is torch.float32
    assert torch.equal(found, target_log_probs(logits.half(), targets))
    torch.testing.assert_close(target_log_probs(logits, targets).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_log_probability_is_never_above_zero():
    certain = torch.zeros(200, V)
    certain[torch.arange(200), 3] = torch.linspace(0, 6e4, 200)
    assert target_log_probs(certain, torch.full((200,), 3)).max() <= 0


# Divergences


@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 4.0])
def test_a_divergence_matches_its_definition(divergence, temperature):
    _assert_matches(
        _diverge(divergence, temperature=temperature),
        lambda z: _naive_divergence(z, TEACHER.double(), divergence, temperature),
        _logits(),
    )


@EVERY_DIVERGENCE
def test_the_gradient_of_a_divergence_passes_gradcheck(divergence):
    logits = _logits(3, 3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(_diverge(divergence, _logits(4, 3, 5).double()), logits)


@EVERY_DIVERGENCE
def test_the_slope_takes_log_probabilities_that_need_not_sum_to_one(divergence):
    log_p = (_logits(3, 3, 5).double().log_softmax(-1) - 0.7).requires_grad_()
    log_t = _logits(4, 3, 5).double().log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: divergence(x, log_t)[0], log_p)


def _taught(divergence: Divergence, student: Tensor, temperature: float = 1.0, keep=None):
    """The divergence as a function of the teacher's logits."""
    log_p = (student / temperature).log_softmax(-1)
    return lambda y: divergence(log_p.to(y.dtype), (y / temperature).log_softmax(-1), keep)[0]


@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_teacher_that_learns_gets_the_gradient_of_the_definition(divergence, temperature):
    student = _logits()
    _assert_matches(
        _taught(divergence, student, temperature),
        lambda y: _naive_divergence(student.double(), y, divergence, temperature),
        TEACHER,
    )


@EVERY_DIVERGENCE
def test_the_teachers_gradient_passes_gradcheck(divergence):
    teacher, student = _logits(4, 3, 5).double().requires_grad_(), _logits(3, 3, 5).double()
    assert torch.autograd.gradcheck(_taught(divergence, student), teacher)
    free = (teacher.detach().log_softmax(-1) - 0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(student.log_softmax(-1), x)[0], free)


@EVERY_DIVERGENCE
def test_both_sides_may_learn_at_once_and_get_what_each_gets_alone(divergence):
    student, teacher = _logits().requires_grad_(), TEACHER.clone().requires_grad_()
    divergence(student.log_softmax(-1), teacher.log_softmax(-1))[0].backward()
    assert torch.equal(student.grad, _value_and_grad(_diverge(divergence), student.detach())[1])
    assert torch.equal(teacher.grad, _value_and_grad(_taught(divergence, student.detach()), TEACHER)[1])


@EVERY_DIVERGENCE
@pytest.mark.parametrize("floor", [-math.inf, -6.0])
def test_rows_that_are_not_kept_teach_the_teacher_nothing(divergence, floor):
    floored, student = Divergence(divergence.direction, divergence.beta, floor), _logits()
    keep = torch.tensor([True, False, True, True, False, True, False])
    grad = _value_and_grad(_taught(floored, student, keep=keep[:, None]), TEACHER)[1]
    alone = _value_and_grad(_taught(divergence, student[keep]), TEACHER[keep])[1]
    torch.testing.assert_close(grad[keep], alone)
    assert torch.equal(grad[~keep], torch.zeros(3, V))


def test_a_side_that_does_not_learn_keeps_nothing_for_backward():
    saved = []
    student, teacher = _logits().requires_grad_(), TEACHER
    log_p, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        FORWARD(log_p, log_t)
    assert len(saved) == 1


def test_forward_goes_from_the_teacher_to_the_student_and_reverse_back():
    teacher, student = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert FORWARD(student, teacher)[0].item() == pytest.approx(forward, rel=1e-5)
    assert REVERSE(student, teacher)[0].item() == pytest.approx(reverse, rel=1e-5)
    assert abs(forward - reverse) > 0.1


@pytest.mark.parametrize(("beta", "limit"), [(1e-5, FORWARD), (1 - 1e-5, REVERSE)], ids=["forward", "reverse"])
def test_jsd_tends_to_either_kl_at_the_ends_of_beta(beta, limit):
    logits, teacher, share = _logits(spread=1.0).double(), _logits(1, spread=1.0).double(), min(beta, 1 - beta)
    value, grad = _value_and_grad(_diverge(Divergence("jsd", beta), teacher), logits)
    wanted_value, wanted_grad = _value_and_grad(_diverge(limit, teacher), logits)
    torch.testing.assert_close(value / share, wanted_value, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(grad / share, wanted_grad, rtol=1e-2, atol=1e-3)


def test_jsd_with_equal_shares_is_symmetric_and_at_most_log_2():
    half, log_p, log_t = Divergence("jsd", 0.5), _logits(spread=50.0).log_softmax(-1), TEACHER.log_softmax(-1)
    torch.testing.assert_close(half(log_p, log_t)[0], half(log_t, log_p)[0])
    assert 0.1 < half(log_p, log_t)[0].item() <= N * math.log(2) + 1e-5


@EVERY_DIVERGENCE
@pytest.mark.parametrize("floor", [-math.inf, -10.0])
def test_a_divergence_of_equal_distributions_is_zero_with_zero_gradient(divergence, floor):
    logits, floored = _logits(spread=8.0), Divergence(divergence.direction, divergence.beta, floor)
    value, grad = _value_and_grad(_diverge(floored, logits), logits)
    assert abs(value) < 1e-5
    assert grad.abs().max() < 1e-5


@EVERY_DIVERGENCE
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**30), spread=st.floats(0.1, 30), teacher_spread=st.floats(0.1, 30))
def test_a_divergence_is_never_negative(divergence, seed, spread, teacher_spread):
    teacher = _logits(seed + 1, spread=teacher_spread)
    assert _diverge(divergence, teacher)(_logits(seed, spread=spread)) > -1e-4


@EVERY_DIVERGENCE
@pytest.mark.parametrize("floor", [-math.inf, -10.0])
def test_a_divergence_does_not_see_a_constant_added_to_a_row(divergence, floor):
    floored, offsets = Divergence(divergence.direction, divergence.beta, floor), torch.linspace(-80, 80, N)[:, None]
    value, grad = _value_and_grad(_diverge(floored), _logits())
    moved_value, moved_grad = _value_and_grad(_diverge(floored, TEACHER - offsets), _logits() + offsets)
    torch.testing.assert_close(moved_value, value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved_grad, grad, rtol=1e-3, atol=1e-5)


@EVERY_DIVERGENCE
def test_an_outcome_of_probability_zero_adds_nothing_on_the_side_that_is_summed(divergence):
    student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, -800.0, -900.0]])
    if divergence.direction == "reverse":
        student, teacher = teacher, student
    value, grad = _value_and_grad(_diverge(divergence, teacher), student)
    wanted = _naive_divergence(student.double(), teacher.double(), divergence)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0.0)
    assert grad.isfinite().all()


@EVERY_DIVERGENCE
@pytest.mark.parametrize("floor", [-math.inf, -6.0])
def test_rows_that_are_not_kept_add_neither_value_nor_gradient(divergence, floor):
    floored, logits = Divergence(divergence.direction, divergence.beta, floor), _logits()
    keep = torch.tensor([True, False, True, True, False, True, False])
    value, grad = _value_and_grad(_diverge(floored, keep=keep[:, None]), logits)
    wanted_value, wanted_grad = _value_and_grad(_diverge(floored, TEACHER[keep]), logits[keep])
    torch.testing.assert_close(value, wanted_value)
    torch.testing.assert_close(grad[keep], wanted_grad)
    assert torch.equal(grad[~keep], torch.zeros(3, V))
    raw = floored(logits.log_softmax(-1), TEACHER.log_softmax(-1), keep[:, None])[1]
    torch.testing.assert_close(raw, floored(logits[keep].log_softmax(-1), TEACHER[keep].log_softmax(-1))[1])


@EVERY_DIVERGENCE
def test_single_outcomes_can_be_left_out(divergence):
    log_p, log_t = _logits(columns=4).log_softmax(-1), _logits(1, columns=4).log_softmax(-1)
    keep = torch.tensor([True, False, True, False])
    torch.testing.assert_close(divergence(log_p, log_t, keep)[0], divergence(log_p[:, keep], log_t[:, keep])[0])


@EVERY_DIVERGENCE
def test_the_floor_acts_on_both_sides_of_the_value(divergence):
    floored = Divergence(divergence.direction, divergence.beta, -6.0)
    logits, teacher = _logits(spread=20.0), _logits(1, spread=20.0)
    value, raw = floored(logits.log_softmax(-1), teacher.log_softmax(-1))
    wanted = _naive_divergence(logits.double(), teacher.double(), floored)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    assert abs(value - raw) > 1e-4


@EVERY_DIVERGENCE
def test_the_floor_leaves_the_gradient_untouched(divergence):
    floored, logits = Divergence(divergence.direction, divergence.beta, -6.0), _logits(spread=20.0)
    grads = [_value_and_grad(_diverge(kind), logits)[1] for kind in (floored, divergence)]
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 1e-2


@EVERY_DIVERGENCE
@pytest.mark.parametrize("floor", [-math.inf, -6.0])
def test_the_divergence_reported_beside_the_loss_has_no_floor_and_no_gradient(divergence, floor):
    floored, logits = Divergence(divergence.direction, divergence.beta, floor), _logits(spread=20.0)
    loss, raw = floored(logits.requires_grad_().log_softmax(-1), TEACHER.log_softmax(-1))
    wanted = _naive_divergence(logits.detach().double(), TEACHER.double(), divergence)
    torch.testing.assert_close(raw.double(), wanted, rtol=1e-5, atol=1e-5)
    assert loss.requires_grad
    assert not raw.requires_grad


def test_a_loss_without_rows_is_zero():
    none = torch.zeros(0, V)
    for divergence in (FORWARD, REVERSE, JSD, Divergence("jsd", 0.5, -10.0)):
        assert [value.item() for value in divergence(none, none)] == [0.0, 0.0]
    assert [value.item() for value in cross_entropy(none, torch.zeros(0, dtype=torch.int64))] == [0.0, 0.0]
    assert chunk_likelihood(none[:, 0], none[:, 0]).item() == 0.0
    assert sorted_distance(none, torch.zeros(0, 5)).item() == 0.0
    assert state_distance(none, none).item() == 0.0


# Segments


def test_segments_sum_and_logsumexp_match_their_definitions():
    index, values = torch.tensor([2, 0, 0, 1, 2, 2, 3]), _logits()[0, :7]
    segments = GroupSums(index, 4)
    parts = [values[index == number].double() for number in range(4)]
    torch.testing.assert_close(segments.sum(values).double(), torch.stack([part.sum() for part in parts]))
    wanted = torch.stack([part.exp().sum().log() for part in parts])
    torch.testing.assert_close(segments.logsumexp(values).double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_segments_logsumexp_passes_gradcheck():
    segments = GroupSums(torch.tensor([1, 0, 1, 2, 1]), 3)
    assert torch.autograd.gradcheck(segments.logsumexp, _logits()[0, :5].double().requires_grad_())


def test_a_segment_without_elements_has_an_absent_logsumexp_and_no_gradient():
    segments, values = GroupSums(torch.tensor([0, 2, 2]), 4), torch.tensor([1.0, 2.0, 3.0])
    value, grad = _value_and_grad(lambda x: (segments.logsumexp(x) * torch.tensor([1.0, 0.0, 0.0, 0.0])).sum(), values)
    assert segments.logsumexp(values)[[1, 3]].tolist() == pytest.approx([MASKED_LOGIT, MASKED_LOGIT])
    assert segments.logsumexp(values).log_softmax(0).exp()[[1, 3]].tolist() == [0.0, 0.0]
    assert (value.item(), grad.tolist()) == (1.0, [1.0, 0.0, 0.0])


def test_a_segment_far_below_the_others_keeps_its_logsumexp_and_gradient():
    segments, values = GroupSums(torch.tensor([0, 0, 1, 1]), 2), torch.tensor([1e4, 1e4, -1e4, -1e4 + 1])
    found, grad = _value_and_grad(lambda x: segments.logsumexp(x)[1], values)
    assert found.item() == pytest.approx(-1e4 + math.log(1 + math.e), rel=1e-6)
    share = 1 / (1 + math.e)
    assert grad.tolist() == pytest.approx([0.0, 0.0, share, 1 - share], rel=1e-5)


# A teacher that says nothing of some outcomes


def _cut(teacher: Tensor, told: Tensor) -> Tensor:
    return torch.where(told, teacher, MASKED_LOGIT)


TOLD = torch.rand(N, V, generator=torch.Generator().manual_seed(5)) > 0.5


@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_both_sides_are_renormalised_on_what_the_teacher_tells(divergence, temperature):
    teacher = _cut(TEACHER, TOLD)

    def found(z):
        return _diverge(divergence, teacher, temperature)(on_support(z, teacher))

    def naive(z):
        rows = zip(z, TEACHER.double(), TOLD, strict=True)
        return sum(_naive_divergence(a[None, k], b[None, k], divergence, temperature) for a, b, k in rows)

    assert TOLD.any(1).all()
    _assert_matches(found, naive, _logits())
    assert torch.equal(_value_and_grad(found, _logits())[1][~TOLD], torch.zeros(int((~TOLD).sum())))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_an_absent_outcome_has_probability_exactly_zero(temperature):
    teacher = _cut(TEACHER, TOLD)
    for logits in (teacher, on_support(_logits(), teacher), on_support(_logits() - 6e4, teacher)):
        probs = (logits / temperature).softmax(-1)
        assert torch.equal(probs[~TOLD], torch.zeros(int((~TOLD).sum())))
        torch.testing.assert_close(probs.sum(-1), torch.ones(N))


@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_row_of_which_nothing_is_told_adds_neither_value_nor_gradient(divergence, temperature):
    told = TOLD.clone()
    told[[1, 4]] = False
    teacher, others = _cut(TEACHER, told), [0, 2, 3, 5, 6]
    value, grad = _value_and_grad(
        lambda z: _diverge(divergence, teacher, temperature)(on_support(z, teacher)), _logits()
    )
    wanted = _diverge(divergence, teacher[others], temperature)(on_support(_logits()[others], teacher[others]))
    torch.testing.assert_close(value, wanted)
    assert torch.equal(grad[[1, 4]], torch.zeros(2, V))


def test_a_teacher_that_tells_everything_leaves_the_student_as_it_is():
    logits = _logits(spread=3e4)
    assert torch.equal(on_support(logits, torch.full_like(logits, -6e4)), logits)


# Likelihoods of chunks


def test_log_of_one_minus_exp_keeps_its_digits_in_value_and_gradient():
    x = -torch.logspace(-7, 1.9, 300)
    _, grad = _value_and_grad(lambda a: log1mexp(a).sum(), x)
    wide = x.double()
    wanted = torch.where(wide > -0.5, (-wide.expm1()).log(), (-wide.exp()).log1p())
    torch.testing.assert_close(log1mexp(x).double(), wanted, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(grad.double(), wide.exp() / wide.expm1(), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("x", [-1e-30, -1e-9, -1e4])
def test_log_of_one_minus_exp_has_a_gradient_at_either_end(x):
    value, grad = _value_and_grad(log1mexp, torch.tensor(x))
    assert value.isfinite()
    assert grad.isfinite()


def _naive_chunk_likelihood(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b, a in zip(student / tau - 1e-6, teacher / tau - 1e-6, strict=True):
        p, q = a.exp(), b.exp()
        total = total + p * (a - b) + (1 - p) * ((1 - p).log() - (1 - q).log())
    return tau * total


CHUNKS = [0.0, -1e-8, -1e-6, -1e-4, -0.01, -0.3, -0.6931, -0.7, -1.0, -5.0, -30.0, -200.0, -1000.0]
EVERY_TAU = pytest.mark.parametrize("tau", [1.0, 5.0, 100.0])


@EVERY_TAU
def test_chunk_likelihood_matches_its_definition(tau):
    pairs = torch.tensor(list(itertools.product([-0.01, -0.3, -0.6931, -0.7, -1.0, -5.0, -30.0], repeat=2)))
    teacher = pairs[:, 1].contiguous()
    _assert_matches(
        lambda s: chunk_likelihood(s, teacher, tau),
        lambda s: _naive_chunk_likelihood(s, teacher.double(), tau),
        pairs[:, 0].contiguous(),
    )


@EVERY_TAU
def test_the_gradient_of_chunk_likelihood_passes_gradcheck(tau):
    pairs = torch.tensor(list(itertools.product([-0.05, -0.5, -0.9, -4.0], repeat=2))).double()
    student, teacher = pairs[:, 0].clone().requires_grad_(), pairs[:, 1].clone()
    assert torch.autograd.gradcheck(lambda s: chunk_likelihood(s, teacher, tau), student)


@EVERY_TAU
@pytest.mark.parametrize("teacher", CHUNKS)
def test_chunk_likelihood_is_finite_and_never_negative_and_zero_where_equal(tau, teacher):
    for student in CHUNKS:
        given_teacher = torch.tensor([teacher])
        value, grad = _value_and_grad(lambda s, t=given_teacher: chunk_likelihood(s, t, tau), torch.tensor([student]))
        assert value.isfinite()
        assert grad.isfinite().all()
        assert value >= -1e-6
        if student == teacher:
            assert value == 0.0
            assert abs(grad.item()) < 1e-3
        elif max(student, teacher) >= -1.0 and min(student, teacher) < 2 * max(student, teacher) - 0.1:
            assert value > 1e-4
            assert (grad.item() < 0) == (student < teacher)


def test_a_certain_chunk_that_the_student_doubts_costs_its_log_probability():
    assert chunk_likelihood(torch.tensor([-3.0]), torch.tensor([0.0]), 1.0).item() == pytest.approx(3.0, rel=1e-3)


def test_tau_keeps_the_gradient_of_a_doubted_chunk():
    grads = [_value_and_grad(lambda s, t=tau: chunk_likelihood(s, torch.zeros(1), t), torch.tensor([-300.0]))[1].item()
             for tau in (1.0, 5.0, 100.0)]  # fmt: skip
    assert grads == pytest.approx([-1.0, -1.0, -1.0], rel=0.06)


# Sorted probabilities and hidden states


def _naive_sorted_distance(student: Tensor, teacher: Tensor, temperature: float, top: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for z, y in zip(student, teacher, strict=True):
        p = _naive_softmax(z, temperature).sort(descending=True).values
        t = _naive_softmax(y, temperature).sort(descending=True).values
        top = min(top, len(p), len(t))
        total = total + sum((a - b).abs() for a, b in zip(p[:top], t[:top], strict=True))
    return total


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("top", [1, 4, 200])
@pytest.mark.parametrize("columns", [6, 17])
def test_sorted_distance_matches_its_definition(temperature, top, columns):
    teacher = _logits(1, N, columns)
    _assert_matches(
        lambda z: sorted_distance(z, teacher, temperature, top=top),
        lambda z: _naive_sorted_distance(z, teacher.double(), temperature, top),
        _logits(),
    )


def test_sorted_distance_does_not_see_the_order_of_tokens():
    logits, teacher, order = _logits(), _logits(1, N, 9), torch.randperm(V)
    value, grad = _value_and_grad(lambda z: sorted_distance(z, teacher), logits)
    mixed_value, mixed_grad = _value_and_grad(
        lambda z: sorted_distance(z, teacher[:, torch.randperm(9)]), logits[:, order]
    )
    torch.testing.assert_close(mixed_value, value)
    torch.testing.assert_close(mixed_grad, grad[:, order])


def test_sorted_distance_leaves_rows_out():
    keep, teacher = torch.tensor([True, False, True, False, True, True, True]), _logits(1, N, 9)
    value, grad = _value_and_grad(lambda z: sorted_distance(z, teacher, keep=keep), _logits())
    torch.testing.assert_close(value, sorted_distance(_logits()[keep], teacher[keep]))
    assert torch.equal(grad[~keep], torch.zeros(2, V))
    assert grad[keep].abs().max() > 1e-3


def _naive_state_distance(projected: Tensor, states: Tensor) -> Tensor:
    rows = zip(projected, states, strict=True)
    return sum(((g - h) ** 2).mean() / (h**2).mean() for g, h in rows)


def test_state_distance_matches_its_definition():
    states = _logits(1)
    _assert_matches(lambda g: state_distance(g, states), lambda g: _naive_state_distance(g, states.double()), _logits())


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_state_distance_does_not_see_the_size_of_states(size):
    torch.testing.assert_close(
        state_distance(size * _logits(), size * _logits(1)), state_distance(_logits(), _logits(1)), rtol=1e-4, atol=0.0
    )


def test_states_that_are_zero_do_not_divide_by_zero():
    value, grad = _value_and_grad(lambda g: state_distance(g, torch.zeros(N, V)), 1e-3 * _logits())
    assert value.isfinite()
    assert grad.isfinite().all()


def test_state_distance_leaves_rows_out():
    keep = torch.tensor([True, False, True, False, True, True, True])
    value, grad = _value_and_grad(lambda g: state_distance(g, _logits(1), keep), _logits())
    torch.testing.assert_close(value, state_distance(_logits()[keep], _logits(1)[keep]))
    assert torch.equal(grad[~keep], torch.zeros(2, V))


# Rows that are not finite


@pytest.mark.parametrize("bad", [[math.inf], [-math.inf], [math.nan], [math.inf, -math.inf]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finite_rows_finds_every_row_with_a_number_that_is_not_finite(bad, dtype):
    logits = _logits().to(dtype)
    logits[2, : len(bad)] = torch.tensor(bad, dtype=dtype)
    assert all_finite(logits).tolist() == [row != 2 for row in range(N)]


def test_finite_rows_accepts_rows_whose_sum_overflows_float16():
    assert all_finite(torch.full((2, 1000), 65504.0, dtype=torch.float16)).all()


# The clamps


def _cross_entropy_with(clamp: LogitClamp):
    return lambda z: cross_entropy(z, _targets(), clamp)[0]


def test_the_normalized_clamp_has_the_gradient_of_no_clamp():
    logits = _logits(spread=40.0)
    bounded, grad = _value_and_grad(_cross_entropy_with(LogitClamp("normalized", 5.0)), logits)
    free, free_grad = _value_and_grad(_cross_entropy_with(LogitClamp("off")), logits)
    assert bounded < free
    assert torch.equal(grad, free_grad)


def test_the_normalized_clamp_floors_log_probabilities_at_twice_the_bound():
    logits = torch.tensor([[0.0, -9.0, -50.0]])
    losses = [cross_entropy(logits, torch.tensor([y]), LogitClamp("normalized", 5.0))[0].item() for y in range(3)]
    assert losses == pytest.approx([1.234e-4, 9.0001234, 10.0], rel=1e-3)


def test_the_normalized_clamp_is_no_clamp_within_its_bound():
    logits = _logits(spread=1.0)
    bounded, grad = _value_and_grad(_cross_entropy_with(LogitClamp("normalized", 5.0)), logits)
    free, free_grad = _value_and_grad(_cross_entropy_with(LogitClamp("off")), logits)
    assert torch.equal(grad, free_grad)
    torch.testing.assert_close(bounded, free)


def test_the_raw_clamp_is_the_literal_clamp_with_its_gradient():
    logits = _logits(spread=6.0)
    value, grad = _value_and_grad(_cross_entropy_with(LogitClamp("raw", 5.0)), logits)
    wanted, wanted_grad = _value_and_grad(lambda z: cross_entropy(z.clamp(-5, 5), _targets())[0], logits)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(grad, wanted_grad)
    outside = logits.abs() > 5
    assert outside.any()
    assert torch.equal(grad[outside], torch.zeros(int(outside.sum())))


@pytest.mark.parametrize("style", ["off", "normalized"])
def test_cross_entropy_does_not_see_a_constant_added_to_a_row(style):
    losses = _cross_entropy_with(LogitClamp(style, 5.0))
    torch.testing.assert_close(losses(_logits() + torch.linspace(-80, 80, N)[:, None]), losses(_logits()))


@pytest.mark.parametrize("style", ["off", "normalized", "raw"])
def test_the_loss_reported_beside_the_cross_entropy_knows_no_clamp_and_has_no_gradient(style):
    logits = _logits(spread=40.0).requires_grad_()
    _, reported = cross_entropy(logits, _targets(), LogitClamp(style, 5.0))
    torch.testing.assert_close(reported.double(), _naive_cross_entropy(logits.detach().double(), _targets()))
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


@EVERY_DIVERGENCE
@pytest.mark.parametrize("style", ["off", "normalized", "raw"])
def test_the_largest_float16_logits_give_finite_losses_and_gradients(divergence, style):
    logits = torch.where(_logits() > 0, 6e4, -6e4).half().requires_grad_()
    clamp = LogitClamp(style, 5.0)
    floored = Divergence(divergence.direction, divergence.beta, -10.0 if style == "normalized" else -math.inf)
    ce, _ = cross_entropy(logits, _targets(), clamp)
    bounded = logits.float().clamp(-5.0, 5.0) if style == "raw" else logits.float()
    kd, raw = floored((bounded / 2.0).log_softmax(-1), (-bounded.detach() / 2.0).log_softmax(-1))
    (ce + kd).backward()
    assert ce.isfinite()
    assert kd.isfinite()
    assert raw.isfinite()
    assert logits.grad.dtype is torch.float16
    assert logits.grad.isfinite().all()


def test_float16_gives_finite_sorted_and_state_distances():
    logits = torch.where(_logits() > 0, 6e4, -6e4).half().requires_grad_()
    (sorted_distance(logits, -logits.detach()) + state_distance(logits, -logits.detach())).backward()
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
    loss, _ = FORWARD(student.float().log_softmax(-1), teacher.float().log_softmax(-1))
    assert abs(loss - truth) <= 1e-5 * truth
    assert abs(loss - truth) < abs(naive.double() - truth)
