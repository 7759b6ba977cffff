"""Clamps, group sums, likelihoods and distances against their definitions in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

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
from sar_kd.runtime.precision import MASKED_LOGIT
from tests.helpers.lm_heads import cross_entropy, lazy_logits
from tests.helpers.losses import (
    N,
    V,
    assert_matches,
    half_log_probs,
    naive_softmax,
    random_logits,
    random_targets,
    value_and_grad,
)

TEACHER = random_logits(1, spread=2.0)


def target_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return tiled_loss.target_log_probs(lazy_logits(logits), targets, 3)[0]


def _naive_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return sum(-naive_softmax(z)[target].log() for z, target in zip(logits, targets.tolist(), strict=True))


# Cross-entropy


@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_matches_its_definition(seed):
    targets = random_targets()
    assert_matches(
        lambda z: cross_entropy(z, targets)[0],
        lambda z: _naive_cross_entropy(z, targets),
        random_logits(seed, spread=5.0),
    )


def test_cross_entropy_of_equal_logits_is_log_v_at_each_position():
    loss, _ = cross_entropy(torch.zeros(N, V), random_targets())
    assert loss.item() == pytest.approx(N * math.log(V), rel=1e-6)


def test_losses_are_float32_sums_whatever_the_logits_are():
    logits, teacher, log_probs = random_logits().half(), TEACHER.half(), random_logits().log_softmax(-1)
    losses = [
        *cross_entropy(logits, random_targets()),
        *Divergence()(log_probs, log_probs),
        chunk_likelihood(log_probs[:, 0], log_probs[:, 1]),
        sorted_distance(logits, teacher),
        state_distance(logits, teacher),
    ]
    for value in losses:
        assert (value.dtype, value.shape) == (torch.float32, ())


def test_a_loss_without_positions_is_zero():
    none = torch.zeros(0, V)
    for divergence in (Divergence("forward"), Divergence("reverse"), Divergence("jsd", 0.5, -10.0)):
        assert [value.item() for value in divergence(none, none)] == [0.0, 0.0]
    assert [value.item() for value in cross_entropy(none, torch.zeros(0, dtype=torch.int64))] == [0.0, 0.0]
    assert chunk_likelihood(none[:, 0], none[:, 0]).item() == 0.0
    assert sorted_distance(none, torch.zeros(0, 5)).item() == 0.0
    assert state_distance(none, none).item() == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_the_log_probability_of_a_target_matches_its_definition(seed):
    targets = random_targets()
    logits = random_logits(seed, spread=5.0)
    expected = torch.stack([naive_softmax(z)[y].log() for z, y in zip(logits.double(), targets, strict=True)])
    found = target_log_probs(logits.half().float(), targets)
    assert found.dtype is target_log_probs(logits.half(), targets).dtype is torch.float32
    assert torch.equal(found, target_log_probs(logits.half(), targets))
    torch.testing.assert_close(target_log_probs(logits, targets).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_log_probability_is_never_above_zero():
    certain = torch.zeros(200, V)
    certain[torch.arange(200), 3] = torch.linspace(0, 6e4, 200)
    assert target_log_probs(certain, torch.full((200,), 3)).max() <= 0


# Sums by group


def test_group_sums_and_logsumexp_match_their_definitions():
    index, values = torch.tensor([2, 0, 0, 1, 2, 2, 3]), random_logits()[0, :7]
    groups = GroupSums(index, 4)
    parts = [values[index == number].double() for number in range(4)]
    torch.testing.assert_close(groups.sum(values).double(), torch.stack([part.sum() for part in parts]))
    expected = torch.stack([part.exp().sum().log() for part in parts])
    torch.testing.assert_close(groups.logsumexp(values).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_groups_logsumexp_passes_gradcheck():
    groups = GroupSums(torch.tensor([1, 0, 1, 2, 1]), 3)
    assert torch.autograd.gradcheck(groups.logsumexp, random_logits()[0, :5].double().requires_grad_())


def test_an_empty_group_has_a_masked_logsumexp_and_no_gradient():
    groups, values = GroupSums(torch.tensor([0, 2, 2]), 4), torch.tensor([1.0, 2.0, 3.0])
    value, grad = value_and_grad(lambda x: (groups.logsumexp(x) * torch.tensor([1.0, 0.0, 0.0, 0.0])).sum(), values)
    assert groups.logsumexp(values)[[1, 3]].tolist() == pytest.approx([MASKED_LOGIT, MASKED_LOGIT])
    assert groups.logsumexp(values).log_softmax(0).exp()[[1, 3]].tolist() == [0.0, 0.0]
    assert (value.item(), grad.tolist()) == (1.0, [1.0, 0.0, 0.0])


def test_a_group_far_below_the_others_keeps_its_logsumexp_and_gradient():
    groups, values = GroupSums(torch.tensor([0, 0, 1, 1]), 2), torch.tensor([1e4, 1e4, -1e4, -1e4 + 1])
    found, grad = value_and_grad(lambda x: groups.logsumexp(x)[1], values)
    assert found.item() == pytest.approx(-1e4 + math.log(1 + math.e), rel=1e-6)
    share = 1 / (1 + math.e)
    assert grad.tolist() == pytest.approx([0.0, 0.0, share, 1 - share], rel=1e-5)


# Likelihoods of chunks


def test_log_of_one_minus_exp_is_accurate_in_value_and_gradient():
    x = -torch.logspace(-7, 1.9, 300)
    _, grad = value_and_grad(lambda a: log1mexp(a).sum(), x)
    wide = x.double()
    expected = torch.where(wide > -0.5, (-wide.expm1()).log(), (-wide.exp()).log1p())
    torch.testing.assert_close(log1mexp(x).double(), expected, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(grad.double(), wide.exp() / wide.expm1(), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("x", [-1e-30, -1e-9, -1e4])
def test_log_of_one_minus_exp_has_a_gradient_at_either_end(x):
    value, grad = value_and_grad(log1mexp, torch.tensor(x))
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
    assert_matches(
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
        value, grad = value_and_grad(lambda s, t=given_teacher: chunk_likelihood(s, t, tau), torch.tensor([student]))
        assert value.isfinite()
        assert grad.isfinite().all()
        assert value >= -1e-6
        if student == teacher:
            assert value == 0.0
            assert abs(grad.item()) < 1e-3
        elif max(student, teacher) >= -1.0 and min(student, teacher) < 2 * max(student, teacher) - 0.1:
            assert value > 1e-4
            assert (grad.item() < 0) == (student < teacher)


def test_a_chunk_certain_to_the_teacher_costs_the_students_log_probability():
    assert chunk_likelihood(torch.tensor([-3.0]), torch.tensor([0.0]), 1.0).item() == pytest.approx(3.0, rel=1e-3)


def test_tau_keeps_the_size_of_the_gradient_of_an_unlikely_chunk():
    grads = [value_and_grad(lambda s, t=tau: chunk_likelihood(s, torch.zeros(1), t), torch.tensor([-300.0]))[1].item()
             for tau in (1.0, 5.0, 100.0)]  # fmt: skip
    assert grads == pytest.approx([-1.0, -1.0, -1.0], rel=0.06)


# Sorted probabilities and hidden states


def _naive_sorted_distance(student: Tensor, teacher: Tensor, temperature: float, top: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for z, y in zip(student, teacher, strict=True):
        p = naive_softmax(z, temperature).sort(descending=True).values
        t = naive_softmax(y, temperature).sort(descending=True).values
        top = min(top, len(p), len(t))
        total = total + sum((a - b).abs() for a, b in zip(p[:top], t[:top], strict=True))
    return total


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("top", [1, 4, 200])
@pytest.mark.parametrize("vocab_size", [6, 17])
def test_sorted_distance_matches_its_definition(temperature, top, vocab_size):
    teacher = random_logits(1, N, vocab_size)
    assert_matches(
        lambda z: sorted_distance(z, teacher, temperature, top=top),
        lambda z: _naive_sorted_distance(z, teacher.double(), temperature, top),
        random_logits(),
    )


def test_sorted_distance_is_invariant_to_the_order_of_tokens():
    logits, teacher, order = random_logits(), random_logits(1, N, 9), torch.randperm(V)
    value, grad = value_and_grad(lambda z: sorted_distance(z, teacher), logits)
    mixed_value, mixed_grad = value_and_grad(
        lambda z: sorted_distance(z, teacher[:, torch.randperm(9)]), logits[:, order]
    )
    torch.testing.assert_close(mixed_value, value)
    torch.testing.assert_close(mixed_grad, grad[:, order])


def test_sorted_distance_leaves_masked_positions_out():
    keep, teacher = torch.tensor([True, False, True, False, True, True, True]), random_logits(1, N, 9)
    value, grad = value_and_grad(lambda z: sorted_distance(z, teacher, keep=keep), random_logits())
    torch.testing.assert_close(value, sorted_distance(random_logits()[keep], teacher[keep]))
    assert torch.equal(grad[~keep], torch.zeros(2, V))
    assert grad[keep].abs().max() > 1e-3


def _naive_state_distance(projected: Tensor, states: Tensor) -> Tensor:
    positions = zip(projected, states, strict=True)
    return sum(((g - h) ** 2).mean() / (h**2).mean() for g, h in positions)


def test_state_distance_matches_its_definition():
    states = random_logits(1)
    assert_matches(
        lambda g: state_distance(g, states), lambda g: _naive_state_distance(g, states.double()), random_logits()
    )


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_state_distance_is_invariant_to_the_scale_of_states(size):
    torch.testing.assert_close(
        state_distance(size * random_logits(), size * random_logits(1)),
        state_distance(random_logits(), random_logits(1)),
        rtol=1e-4,
        atol=0.0,
    )


def test_states_that_are_zero_do_not_divide_by_zero():
    value, grad = value_and_grad(lambda g: state_distance(g, torch.zeros(N, V)), 1e-3 * random_logits())
    assert value.isfinite()
    assert grad.isfinite().all()


def test_state_distance_leaves_masked_positions_out():
    keep = torch.tensor([True, False, True, False, True, True, True])
    value, grad = value_and_grad(lambda g: state_distance(g, random_logits(1), keep), random_logits())
    torch.testing.assert_close(value, state_distance(random_logits()[keep], random_logits(1)[keep]))
    assert torch.equal(grad[~keep], torch.zeros(2, V))


# Vectors that are not finite


@pytest.mark.parametrize("bad", [[math.inf], [-math.inf], [math.nan], [math.inf, -math.inf]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_all_finite_finds_every_vector_with_an_inf_or_nan(bad, dtype):
    logits = random_logits().to(dtype)
    logits[2, : len(bad)] = torch.tensor(bad, dtype=dtype)
    assert all_finite(logits).tolist() == [i != 2 for i in range(N)]


def test_all_finite_accepts_a_vector_whose_sum_overflows_float16():
    assert all_finite(torch.full((2, 1000), 65504.0, dtype=torch.float16)).all()


# The clamps


def _cross_entropy_with(clamp: LogitClamp):
    return lambda z: cross_entropy(z, random_targets(), clamp)[0]


def test_the_normalized_clamp_has_the_unclamped_gradient():
    logits = random_logits(spread=40.0)
    clamped, grad = value_and_grad(_cross_entropy_with(LogitClamp("normalized", 5.0)), logits)
    unclamped, unclamped_grad = value_and_grad(_cross_entropy_with(LogitClamp("off")), logits)
    assert clamped < unclamped
    assert torch.equal(grad, unclamped_grad)


def test_the_normalized_clamp_floors_log_probabilities_at_twice_the_bound():
    logits = torch.tensor([[0.0, -9.0, -50.0]])
    losses = [cross_entropy(logits, torch.tensor([y]), LogitClamp("normalized", 5.0))[0].item() for y in range(3)]
    assert losses == pytest.approx([1.234e-4, 9.0001234, 10.0], rel=1e-3)


def test_the_normalized_clamp_changes_nothing_within_its_bound():
    logits = random_logits(spread=1.0)
    clamped, grad = value_and_grad(_cross_entropy_with(LogitClamp("normalized", 5.0)), logits)
    unclamped, unclamped_grad = value_and_grad(_cross_entropy_with(LogitClamp("off")), logits)
    assert torch.equal(grad, unclamped_grad)
    torch.testing.assert_close(clamped, unclamped)


def test_the_raw_clamp_is_the_literal_clamp_with_its_gradient():
    logits = random_logits(spread=6.0)
    value, grad = value_and_grad(_cross_entropy_with(LogitClamp("raw", 5.0)), logits)
    expected, expected_grad = value_and_grad(lambda z: cross_entropy(z.clamp(-5, 5), random_targets())[0], logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)
    outside = logits.abs() > 5
    assert outside.any()
    assert torch.equal(grad[outside], torch.zeros(int(outside.sum())))


@pytest.mark.parametrize("style", ["off", "normalized"])
def test_cross_entropy_is_invariant_to_a_constant_added_at_a_position(style):
    losses = _cross_entropy_with(LogitClamp(style, 5.0))
    torch.testing.assert_close(losses(random_logits() + torch.linspace(-80, 80, N)[:, None]), losses(random_logits()))


@pytest.mark.parametrize("style", ["off", "normalized", "raw"])
def test_the_unclamped_cross_entropy_has_no_gradient(style):
    logits = random_logits(spread=40.0).requires_grad_()
    _, unclamped = cross_entropy(logits, random_targets(), LogitClamp(style, 5.0))
    torch.testing.assert_close(unclamped.double(), _naive_cross_entropy(logits.detach().double(), random_targets()))
    assert not unclamped.requires_grad


def test_a_scaled_loss_has_the_value_of_its_limit_and_keeps_the_direction_of_its_gradient():
    clamp, weights = LossClamp("scale", 6.0), torch.tensor([3.0, 4.0])
    value, grad = value_and_grad(lambda w: clamp((w**2).sum()), weights)
    assert value.item() == pytest.approx(6.0)
    torch.testing.assert_close(grad, 2 * weights * (6.0 / 25.0))


def test_a_hard_clamped_loss_has_the_value_of_its_limit_and_has_no_gradient():
    value, grad = value_and_grad(lambda w: LossClamp("hard", 6.0)((w**2).sum()), torch.tensor([3.0, 4.0]))
    assert value == 6.0
    assert torch.equal(grad, torch.zeros(2))


@pytest.mark.parametrize("style", ["scale", "hard", "off"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.4])
def test_a_loss_below_the_limit_is_unchanged(style, weight):
    value, grad = value_and_grad(lambda w: LossClamp(style, 6.0)(w**2), torch.tensor(weight))
    assert value.item() == pytest.approx(weight**2)
    assert grad.item() == pytest.approx(2 * weight)


def test_without_a_clamp_a_large_loss_is_unchanged():
    value, grad = value_and_grad(lambda w: LossClamp()(w**2), torch.tensor(100.0))
    assert (value.item(), grad.item()) == (10000.0, 200.0)


@pytest.mark.parametrize("style", ["scale", "hard", "off"])
def test_a_loss_that_is_nan_stays_nan(style):
    assert LossClamp(style, 6.0)(torch.tensor(math.nan)).isnan()


# float16


def test_float16_gives_finite_sorted_and_state_distances():
    logits = torch.where(random_logits() > 0, 6e4, -6e4).half().requires_grad_()
    (sorted_distance(logits, -logits.detach()) + state_distance(logits, -logits.detach())).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_cross_entropy_of_float16_logits_is_closer_than_float16_arithmetic(seed):
    logits, targets = random_logits(seed, 64, 500).half(), random_targets(64, 500)
    truth = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
    naive = -half_log_probs(logits).gather(1, targets[:, None]).sum()
    loss, _ = cross_entropy(logits, targets)
    assert abs(loss - truth) <= 1e-5 * truth
    assert abs(loss - truth) < abs(naive.double() - truth)
