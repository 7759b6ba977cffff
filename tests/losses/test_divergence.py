"""Divergences against their definitions in float64, with the probabilities formed explicitly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sar_kd.losses.divergence import Divergence
from sar_kd.losses.functional import LogitClamp
from sar_kd.losses.projection.marginals import on_support
from sar_kd.runtime.precision import MASKED_LOGIT
from tests.helpers.lm_heads import cross_entropy
from tests.helpers.losses import (
    N,
    V,
    assert_matches,
    half_log_probs,
    naive_divergence,
    random_logits,
    random_targets,
    value_and_grad,
)

FORWARD, REVERSE, JSD = Divergence("forward"), Divergence("reverse"), Divergence("jsd", 0.3)
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", [FORWARD, REVERSE, JSD], ids=["forward", "reverse", "jsd"])
TEACHER = random_logits(1, spread=2.0)


def _of_student(divergence: Divergence, teacher: Tensor = TEACHER, temperature: float = 1.0, keep=None):
    """The divergence as a function of the student's logits."""
    log_t = (teacher / temperature).log_softmax(-1)
    return lambda z: divergence((z / temperature).log_softmax(-1), log_t.to(z.dtype), keep)[0]


@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 4.0])
def test_a_divergence_matches_its_definition(divergence, temperature):
    assert_matches(
        _of_student(divergence, temperature=temperature),
        lambda z: naive_divergence(z, TEACHER.double(), divergence, temperature),
        random_logits(),
    )


@EVERY_DIVERGENCE
def test_the_gradient_of_a_divergence_passes_gradcheck(divergence):
    logits = random_logits(3, 3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(_of_student(divergence, random_logits(4, 3, 5).double()), logits)


@EVERY_DIVERGENCE
def test_the_gradient_holds_for_probabilities_that_do_not_sum_to_one(divergence):
    log_p = (random_logits(3, 3, 5).double().log_softmax(-1) - 0.7).requires_grad_()
    log_t = random_logits(4, 3, 5).double().log_softmax(-1)
    assert torch.autograd.gradcheck(lambda x: divergence(x, log_t)[0], log_p)


def _of_teacher(divergence: Divergence, student: Tensor, temperature: float = 1.0, keep=None):
    """The divergence as a function of the teacher's logits."""
    log_p = (student / temperature).log_softmax(-1)
    return lambda y: divergence(log_p.to(y.dtype), (y / temperature).log_softmax(-1), keep)[0]


@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_teachers_gradient_matches_the_definition(divergence, temperature):
    student = random_logits()
    assert_matches(
        _of_teacher(divergence, student, temperature),
        lambda y: naive_divergence(student.double(), y, divergence, temperature),
        TEACHER,
    )


@EVERY_DIVERGENCE
def test_the_teachers_gradient_passes_gradcheck(divergence):
    teacher, student = random_logits(4, 3, 5).double().requires_grad_(), random_logits(3, 3, 5).double()
    assert torch.autograd.gradcheck(_of_teacher(divergence, student), teacher)
    independent = (teacher.detach().log_softmax(-1) - 0.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(student.log_softmax(-1), x)[0], independent)


@EVERY_DIVERGENCE
def test_gradients_of_both_sides_at_once_are_those_of_each_alone(divergence):
    student, teacher = random_logits().requires_grad_(), TEACHER.clone().requires_grad_()
    divergence(student.log_softmax(-1), teacher.log_softmax(-1))[0].backward()
    assert torch.equal(student.grad, value_and_grad(_of_student(divergence), student.detach())[1])
    assert torch.equal(teacher.grad, value_and_grad(_of_teacher(divergence, student.detach()), TEACHER)[1])


@EVERY_DIVERGENCE
@pytest.mark.parametrize("floor", [-math.inf, -6.0])
def test_masked_positions_give_the_teacher_no_gradient(divergence, floor):
    floored, student = Divergence(divergence.direction, divergence.beta, floor), random_logits()
    keep = torch.tensor([True, False, True, True, False, True, False])
    grad = value_and_grad(_of_teacher(floored, student, keep=keep[:, None]), TEACHER)[1]
    alone = value_and_grad(_of_teacher(divergence, student[keep]), TEACHER[keep])[1]
    torch.testing.assert_close(grad[keep], alone)
    assert torch.equal(grad[~keep], torch.zeros(3, V))


def test_only_a_side_with_a_gradient_saves_a_tensor_for_backward():
    saved = []
    student, teacher = random_logits().requires_grad_(), TEACHER
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
    logits, teacher, share = (
        random_logits(spread=1.0).double(),
        random_logits(1, spread=1.0).double(),
        min(beta, 1 - beta),
    )
    value, grad = value_and_grad(_of_student(Divergence("jsd", beta), teacher), logits)
    expected_value, expected_grad = value_and_grad(_of_student(limit, teacher), logits)
    torch.testing.assert_close(value / share, expected_value, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(grad / share, expected_grad, rtol=1e-2, atol=1e-3)


def test_jsd_with_equal_shares_is_symmetric_and_at_most_log_2():
    half, log_p, log_t = Divergence("jsd", 0.5), random_logits(spread=50.0).log_softmax(-1), TEACHER.log_softmax(-1)
    torch.testing.assert_close(half(log_p, log_t)[0], half(log_t, log_p)[0])
    assert 0.1 < half(log_p, log_t)[0].item() <= N * math.log(2) + 1e-5


@EVERY_DIVERGENCE
@pytest.mark.parametrize("floor", [-math.inf, -10.0])
def test_a_divergence_of_equal_distributions_is_zero_with_zero_gradient(divergence, floor):
    logits, floored = random_logits(spread=8.0), Divergence(divergence.direction, divergence.beta, floor)
    value, grad = value_and_grad(_of_student(floored, logits), logits)
    assert abs(value) < 1e-5
    assert grad.abs().max() < 1e-5


@EVERY_DIVERGENCE
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**30), spread=st.floats(0.1, 30), teacher_spread=st.floats(0.1, 30))
def test_a_divergence_is_never_negative(divergence, seed, spread, teacher_spread):
    teacher = random_logits(seed + 1, spread=teacher_spread)
    assert _of_student(divergence, teacher)(random_logits(seed, spread=spread)) > -1e-4


@EVERY_DIVERGENCE
@pytest.mark.parametrize("floor", [-math.inf, -10.0])
def test_a_divergence_is_invariant_to_a_constant_added_at_a_position(divergence, floor):
    floored, offsets = Divergence(divergence.direction, divergence.beta, floor), torch.linspace(-80, 80, N)[:, None]
    value, grad = value_and_grad(_of_student(floored), random_logits())
    moved_value, moved_grad = value_and_grad(_of_student(floored, TEACHER - offsets), random_logits() + offsets)
    torch.testing.assert_close(moved_value, value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved_grad, grad, rtol=1e-3, atol=1e-5)


@EVERY_DIVERGENCE
def test_a_class_of_probability_zero_adds_nothing_on_the_side_of_the_expectation(divergence):
    student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.0, -800.0, -900.0]])
    if divergence.direction == "reverse":
        student, teacher = teacher, student
    value, grad = value_and_grad(_of_student(divergence, teacher), student)
    expected = naive_divergence(student.double(), teacher.double(), divergence)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0.0)
    assert grad.isfinite().all()


@EVERY_DIVERGENCE
@pytest.mark.parametrize("floor", [-math.inf, -6.0])
def test_masked_positions_add_neither_value_nor_gradient(divergence, floor):
    floored, logits = Divergence(divergence.direction, divergence.beta, floor), random_logits()
    keep = torch.tensor([True, False, True, True, False, True, False])
    value, grad = value_and_grad(_of_student(floored, keep=keep[:, None]), logits)
    expected_value, expected_grad = value_and_grad(_of_student(floored, TEACHER[keep]), logits[keep])
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(grad[keep], expected_grad)
    assert torch.equal(grad[~keep], torch.zeros(3, V))
    unclamped = floored(logits.log_softmax(-1), TEACHER.log_softmax(-1), keep[:, None])[1]
    torch.testing.assert_close(unclamped, floored(logits[keep].log_softmax(-1), TEACHER[keep].log_softmax(-1))[1])


@EVERY_DIVERGENCE
def test_single_classes_can_be_masked(divergence):
    log_p, log_t = random_logits(vocab_size=4).log_softmax(-1), random_logits(1, vocab_size=4).log_softmax(-1)
    keep = torch.tensor([True, False, True, False])
    torch.testing.assert_close(divergence(log_p, log_t, keep)[0], divergence(log_p[:, keep], log_t[:, keep])[0])


@EVERY_DIVERGENCE
def test_the_floor_acts_on_both_sides_of_the_value(divergence):
    floored = Divergence(divergence.direction, divergence.beta, -6.0)
    logits, teacher = random_logits(spread=20.0), random_logits(1, spread=20.0)
    value, unclamped = floored(logits.log_softmax(-1), teacher.log_softmax(-1))
    expected = naive_divergence(logits.double(), teacher.double(), floored)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert abs(value - unclamped) > 1e-4


@EVERY_DIVERGENCE
def test_the_floor_leaves_the_gradient_untouched(divergence):
    floored, logits = Divergence(divergence.direction, divergence.beta, -6.0), random_logits(spread=20.0)
    grads = [value_and_grad(_of_student(each), logits)[1] for each in (floored, divergence)]
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 1e-2


@EVERY_DIVERGENCE
@pytest.mark.parametrize("floor", [-math.inf, -6.0])
def test_the_unclamped_divergence_has_no_floor_and_no_gradient(divergence, floor):
    floored, logits = Divergence(divergence.direction, divergence.beta, floor), random_logits(spread=20.0)
    loss, unclamped = floored(logits.requires_grad_().log_softmax(-1), TEACHER.log_softmax(-1))
    expected = naive_divergence(logits.detach().double(), TEACHER.double(), divergence)
    torch.testing.assert_close(unclamped.double(), expected, rtol=1e-5, atol=1e-5)
    assert loss.requires_grad
    assert not unclamped.requires_grad


# A truncated teacher


def _masked(teacher: Tensor, top: Tensor) -> Tensor:
    return torch.where(top, teacher, MASKED_LOGIT)


TOP = torch.rand(N, V, generator=torch.Generator().manual_seed(5)) > 0.5


@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_both_sides_are_renormalised_over_the_teachers_top_tokens(divergence, temperature):
    teacher = _masked(TEACHER, TOP)

    def found(z):
        return _of_student(divergence, teacher, temperature)(on_support(z, teacher))

    def naive(z):
        positions = zip(z, TEACHER.double(), TOP, strict=True)
        return sum(naive_divergence(a[None, k], b[None, k], divergence, temperature) for a, b, k in positions)

    assert TOP.any(1).all()
    assert_matches(found, naive, random_logits())
    assert torch.equal(value_and_grad(found, random_logits())[1][~TOP], torch.zeros(int((~TOP).sum())))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_a_masked_class_has_probability_exactly_zero(temperature):
    teacher = _masked(TEACHER, TOP)
    for logits in (teacher, on_support(random_logits(), teacher), on_support(random_logits() - 6e4, teacher)):
        probs = (logits / temperature).softmax(-1)
        assert torch.equal(probs[~TOP], torch.zeros(int((~TOP).sum())))
        torch.testing.assert_close(probs.sum(-1), torch.ones(N))


@EVERY_DIVERGENCE
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_position_with_all_classes_masked_adds_neither_value_nor_gradient(divergence, temperature):
    top = TOP.clone()
    top[[1, 4]] = False
    teacher, others = _masked(TEACHER, top), [0, 2, 3, 5, 6]
    value, grad = value_and_grad(
        lambda z: _of_student(divergence, teacher, temperature)(on_support(z, teacher)), random_logits()
    )
    expected = _of_student(divergence, teacher[others], temperature)(
        on_support(random_logits()[others], teacher[others])
    )
    torch.testing.assert_close(value, expected)
    assert torch.equal(grad[[1, 4]], torch.zeros(2, V))


def test_a_teacher_without_masked_classes_leaves_the_student_unchanged():
    logits = random_logits(spread=3e4)
    assert torch.equal(on_support(logits, torch.full_like(logits, -6e4)), logits)


# float16


@EVERY_DIVERGENCE
@pytest.mark.parametrize("style", ["off", "normalized", "raw"])
def test_the_largest_float16_logits_give_finite_losses_and_gradients(divergence, style):
    logits = torch.where(random_logits() > 0, 6e4, -6e4).half().requires_grad_()
    clamp = LogitClamp(style, 5.0)
    floored = Divergence(divergence.direction, divergence.beta, -10.0 if style == "normalized" else -math.inf)
    ce, _ = cross_entropy(logits, random_targets(), clamp)
    bounded = logits.float().clamp(-5.0, 5.0) if style == "raw" else logits.float()
    kd, unclamped = floored((bounded / 2.0).log_softmax(-1), (-bounded.detach() / 2.0).log_softmax(-1))
    (ce + kd).backward()
    assert ce.isfinite()
    assert kd.isfinite()
    assert unclamped.isfinite()
    assert logits.grad.dtype is torch.float16
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_a_divergence_of_float16_logits_is_closer_than_float16_arithmetic(seed):
    student, teacher = random_logits(seed, 64, 500).half(), random_logits(seed + 9, 64, 500).half()
    log_p, log_q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    truth = (log_p.exp() * (log_p - log_q)).sum()
    half_p = half_log_probs(teacher)
    naive = (half_p.exp() * (half_p - half_log_probs(student))).sum()
    loss, _ = FORWARD(student.float().log_softmax(-1), teacher.float().log_softmax(-1))
    assert abs(loss - truth) <= 1e-5 * truth
    assert abs(loss - truth) < abs(naive.double() - truth)
