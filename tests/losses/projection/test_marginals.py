"""Class logits and continuations against their probabilities written out token by token in float64."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import Continuations
from sar_kd.losses.projection.marginals import ClassMap, continuing_log_probs, gather_logits, starting_log_probs
from sar_kd.runtime.precision import MASKED_LOGIT

N, V, NUM_CLASSES = 5, 12, 4
TOKENS = torch.tensor([0, 2, 3, 5, 6, 8, 9, 11])
CLASSES = torch.tensor([1, 0, 1, 3, 1, 2, 0, 3])
UNCLASSED = [token for token in range(V) if token not in TOKENS.tolist()]


def _logits(seed: int = 0, spread: float = 3.0, positions: int = N) -> Tensor:
    return torch.randn(positions, V, generator=torch.Generator().manual_seed(seed)) * spread


def _weights(*shape: int) -> Tensor:
    """A gradient from the loss, of either sign."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def _value_and_grad(function, logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = function(leaf)
    (value * weights).sum().backward()
    return value.detach(), leaf.grad


# Classes


NONE = torch.tensor([], dtype=torch.int64)
NO_ENTRIES = torch.zeros(3, 0, dtype=torch.int64)
NO_CONTINUATIONS = Continuations(NONE, NONE, NO_ENTRIES, NO_ENTRIES, NONE, NONE, NONE.bool(), 0)
CLASS_MAP = ClassMap(TOKENS, CLASSES, NUM_CLASSES)


def _tile(logits: Tensor) -> Tensor:
    return logits.T.float().contiguous()


def _class_logits(logits: Tensor, temperature: float = 1.0, class_map: ClassMap = CLASS_MAP) -> Tensor:
    return gather_logits(_tile(logits), class_map, len(logits), 0, NO_CONTINUATIONS, temperature).boundary.T


def _naive_class_logits(logits: Tensor, temperature: float) -> Tensor:
    found = []
    for position in logits:
        weights = [(z / temperature).exp() for z in position]
        members = [TOKENS[k == CLASSES].tolist() for k in range(NUM_CLASSES)]
        found.append(torch.stack([sum(weights[v] for v in tokens).log() for tokens in members]))
    return torch.stack(found)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_class_logits_match_their_definition(temperature):
    weights = _weights(N, NUM_CLASSES)
    value, grad = _value_and_grad(lambda z: _class_logits(z, temperature), _logits(), weights)
    naive = _value_and_grad(lambda z: _naive_class_logits(z, temperature), _logits().double(), weights.double())
    torch.testing.assert_close(value.double(), naive[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), naive[1], rtol=1e-4, atol=1e-6)


def test_tokens_without_a_class_have_exactly_no_gradient_and_no_effect():
    logits = _logits()
    logits[:, UNCLASSED] = math.nan
    value, grad = _value_and_grad(_class_logits, logits, _weights(N, NUM_CLASSES))
    assert torch.equal(value, _class_logits(_logits()))
    assert torch.equal(grad[:, UNCLASSED], torch.zeros(N, len(UNCLASSED)))
    assert (grad[:, TOKENS] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_classes_of_one_token_are_the_tokens_own_logits(dtype):
    logits, order = _logits().to(dtype), torch.randperm(V)
    tokens, weights = torch.arange(V), _weights(N, V)
    value, grad = _value_and_grad(lambda z: _class_logits(z, 2.0, ClassMap(tokens, order, V)), logits, weights)
    assert torch.equal(value, (logits.float() / 2.0)[:, order.argsort()])
    torch.testing.assert_close(grad, (weights[:, order] / 2.0).to(dtype))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_largest_float16_logits_keep_value_and_gradient_of_classes_finite(temperature):
    logits = torch.where(_logits() > 0, 6e4, -6e4).half()
    members = [TOKENS[k == CLASSES] for k in range(NUM_CLASSES)]
    wanted = torch.stack([(logits.double() / temperature)[:, tokens].logsumexp(1) for tokens in members], dim=1)
    value, grad = _value_and_grad(lambda z: _class_logits(z, temperature), logits, _weights(N, NUM_CLASSES))
    assert (value.dtype, grad.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=0.0)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0.1


@pytest.mark.parametrize("distance", [50.0, 1e4])
def test_a_class_far_below_the_positions_maximum_keeps_its_exact_value_and_gradient(distance):
    """Beside the position's maximum its probability would be 0 in any float."""
    logits, high = _logits(), _logits()
    high[:, [0, 3, 6]] += distance  # class 1
    value, grad = _value_and_grad(_class_logits, logits, _weights(N, NUM_CLASSES))
    far, far_grad = _value_and_grad(_class_logits, high, _weights(N, NUM_CLASSES))
    assert torch.equal(far[:, [0, 2, 3]], value[:, [0, 2, 3]])
    assert torch.equal(far_grad[:, [2, 5, 8, 9, 11]], grad[:, [2, 5, 8, 9, 11]])
    torch.testing.assert_close(far_grad, grad, rtol=1e-2, atol=1e-4)
    assert (far[:, 1] > far[:, 0] + 0.5 * distance).all()


def test_members_of_one_class_far_apart_share_its_gradient_by_their_weight():
    logits = torch.zeros(1, V)
    logits[0, [0, 3, 6]] = torch.tensor([-1e4, 0.0, math.log(3.0)])
    value, grad = _value_and_grad(lambda z: _class_logits(z)[:, 1], logits, torch.ones(1))
    assert value.item() == pytest.approx(math.log(4.0))
    assert grad[0].tolist() == pytest.approx([0, 0, 0, 0.25, 0, 0, 0.75, 0, 0, 0, 0, 0])


def test_no_positions_have_no_classes_and_no_gradient():
    none = torch.zeros(0, V, requires_grad=True)
    classes = _class_logits(none)
    classes.sum().backward()
    assert (classes.shape, none.grad.shape) == ((0, NUM_CLASSES), (0, V))


def test_the_padding_of_an_lm_head_has_no_gradient():
    """LM heads are padded: the last logits belong to no token."""
    padded = torch.cat([_logits(), torch.full((N, 3), 50.0)], dim=1)
    value, grad = _value_and_grad(_class_logits, padded, _weights(N, NUM_CLASSES))
    assert torch.equal(value, _class_logits(_logits()))
    assert torch.equal(grad[:, V:], torch.zeros(N, 3))


# Continuations


# Classes 0, 1 and the end 2 of one continuation; 3 and the end 4 of another, where no coarse token ends; 5, 6 and the
# end 7 of a third whose token ended in the text, which has a coarse side only.
CONTINUATIONS = Continuations(
    continuing_positions=torch.tensor([0, 1, 2]),
    starting_positions=torch.tensor([0, 1]),
    continuing_entries=torch.tensor(
        [[0, 0, 0, 0, 1, 1, 2, 2, 2, 2], [1, 3, 7, 9, 3, 5, 0, 2, 6, 8], [1, 0, 0, 2, 3, 3, 6, 5, 5, 7]]
    ),
    starting_entries=torch.tensor([[0, 0, 0, 1, 1], [0, 4, 6, 2, 8], [0, 1, 1, 3, 3]]),
    class_continuations=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]),
    end_classes=torch.tensor([2, 4, 7]),
    can_end=torch.tensor([True, False]),
    num_inside_classes=5,
)
NUM_COARSE, NUM_FINE = 3, 2


def _coarse(logits: Tensor, continuations: Continuations, temperature: float) -> Tensor:
    return continuing_log_probs(
        gather_logits(_tile(logits), CLASS_MAP, 0, 0, continuations, temperature).entries, continuations
    )


def _fine(logits: Tensor, continuations: Continuations, temperature: float, masks_end: bool) -> Tensor:
    gathered = gather_logits(_tile(logits), CLASS_MAP, 0, len(logits), NO_CONTINUATIONS, temperature)
    return starting_log_probs(gathered.inside, continuations, masks_end)


MASKS_END = pytest.mark.parametrize("masks_end", [True, False])


def _naive_coarse(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities."""
    z = (logits / temperature).exp()
    only = z[1, 3] + z[1, 5]
    first = torch.stack([z[0, 3] + z[0, 7], z[0, 1], z[0, 9]])
    second = torch.stack([only, torch.zeros_like(only)])
    third = torch.stack([z[2, 2] + z[2, 6], z[2, 0], z[2, 8]])
    return torch.cat([weights / weights.sum() for weights in (first, second, third)])


def _naive_fine(logits: Tensor, temperature: float, masks_end: bool) -> Tensor:
    """Probabilities."""
    z = (logits / temperature).exp()
    own, only = [z[0, 0], z[0, 4] + z[0, 6]], z[1, 2] + z[1, 8]
    first = torch.stack([*own, z[0].sum() - sum(own)])
    second = torch.stack([only, torch.zeros_like(only) if masks_end else z[1].sum() - only])
    return torch.cat([weights / weights.sum() for weights in (first, second)])


def _assert_probs(log_probs: Tensor, probs: Tensor, *sizes: int) -> None:
    assert log_probs.dtype is torch.float32
    torch.testing.assert_close(log_probs.exp().double(), probs, rtol=1e-5, atol=1e-7)
    assert torch.equal(log_probs.exp()[probs == 0], torch.zeros(int((probs == 0).sum())))
    for each in log_probs.exp().split(sizes):
        torch.testing.assert_close(each.sum(), torch.ones(()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_of_the_coarse_side_match_their_definition_and_sum_to_one(temperature):
    logits = _logits(0, 1.0, NUM_COARSE)
    _assert_probs(_coarse(logits, CONTINUATIONS, temperature), _naive_coarse(logits.double(), temperature), 3, 2, 3)


@MASKS_END
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_of_the_fine_side_match_their_definition_and_sum_to_one(temperature, masks_end):
    """Of the continuations inside a token, and of no other."""
    logits = _logits(1, 1.0, NUM_FINE)
    wanted = _naive_fine(logits.double(), temperature, masks_end)
    _assert_probs(_fine(logits, CONTINUATIONS, temperature, masks_end), wanted, 3, 2)


@pytest.mark.parametrize("side", ["coarse", "fine_masks_end", "fine"])
def test_gradients_of_continuations_match_their_definition(side):
    if side == "coarse":
        logits, function, naive = _logits(0, 1.0, NUM_COARSE), _coarse, _naive_coarse
    else:
        masks_end = side == "fine_masks_end"
        logits, function, naive = _logits(1, 1.0, NUM_FINE), _fine, lambda z, t: _naive_fine(z, t, masks_end)
    arguments = (CONTINUATIONS, 2.0) if side == "coarse" else (CONTINUATIONS, 2.0, masks_end)

    def found(z):
        log_probs = function(z, *arguments)
        return torch.where(log_probs > 1e-6 * MASKED_LOGIT, log_probs, 0.0)

    def wanted(z):
        probs = naive(z, 2.0)
        return torch.where(probs > 0, probs, 1.0).log()

    weights = _weights(len(found(logits)))
    _, grad = _value_and_grad(found, logits, weights)
    _, naive_grad = _value_and_grad(wanted, logits.double(), weights.double())
    torch.testing.assert_close(grad.double(), naive_grad, rtol=1e-4, atol=1e-6)
    assert grad.abs().max() > 0.01


@pytest.mark.parametrize("distance", [50.0, 1e4])
def test_a_prefix_of_vanishing_probability_still_gives_a_distribution(distance):
    logits, high = _logits(0, 1.0, NUM_COARSE), _logits(0, 1.0, NUM_COARSE)
    for i in range(NUM_COARSE):  # tokens that do not extend the prefix
        extending = CONTINUATIONS.continuing_entries[1, CONTINUATIONS.continuing_entries[0] == i].tolist()
        high[i, [token for token in range(V) if token not in extending]] += distance
    assert torch.equal(_coarse(logits, CONTINUATIONS, 1.0), _coarse(high, CONTINUATIONS, 1.0))


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_a_continuation_without_a_token_in_the_top_k_counts_as_one_that_ends(temperature):
    logits = _logits(0, 1.0, NUM_COARSE)
    top = torch.full_like(logits, MASKED_LOGIT)
    top[:2, [0, 2, 11]] = logits[:2, [0, 2, 11]]  # tokens that extend neither prefix
    top[2, [2, 8]] = logits[2, [2, 8]]
    found = _coarse(top, CONTINUATIONS, temperature)
    assert found[[2, 4]].tolist() == [0.0, 0.0]
    assert (found[[0, 1, 3, 6]] < 1e-6 * MASKED_LOGIT).all()
    assert found.isfinite().all()
    torch.testing.assert_close(found[[5, 7]], (logits[2, [2, 8]] / temperature).log_softmax(0))


@MASKS_END
def test_the_largest_float16_logits_give_finite_continuations(masks_end):
    leaves = [
        torch.where(_logits(i, 1.0, positions) > 0, 6e4, -6e4).half()
        for i, positions in enumerate((NUM_COARSE, NUM_FINE))
    ]
    for leaf, function in zip(
        leaves,
        (lambda z: _coarse(z, CONTINUATIONS, 0.5), lambda z: _fine(z, CONTINUATIONS, 0.5, masks_end)),
        strict=True,
    ):
        log_probs = function(leaf.requires_grad_())
        (log_probs.clamp_min(-1e6) * _weights(len(log_probs))).sum().backward()
        assert log_probs.dtype is torch.float32
        assert log_probs.isfinite().all()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("lead", [5.0, 12.0, 25.0, 40.0, 60.0])
def test_a_student_all_but_certain_to_continue_still_has_a_gradient_of_the_end(lead, temperature):
    """log(1 - p) by way of p has neither digits nor gradient where p rounds to 1."""
    fine = _logits(4, 1.0, NUM_FINE)
    fine[0, 4] = lead * temperature
    value, grad = _value_and_grad(lambda z: _fine(z, CONTINUATIONS, temperature, True)[2], fine, torch.ones(()))
    leaf = fine[0].double().requires_grad_()
    others = [v for v in range(V) if v not in (0, 4, 6)]
    wanted = (leaf / temperature)[others].logsumexp(0) - (leaf / temperature).logsumexp(0)
    wanted.backward()
    assert wanted < 3.5 - lead
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    torch.testing.assert_close(grad[0].double(), leaf.grad, rtol=1e-5, atol=1e-12)
    assert grad[0, 4] < -0.8 / temperature
    assert grad[0, others].sum() > 0.8 / temperature
    assert not grad[1].any()


def test_no_continuations_have_no_classes():
    none = {name: value[..., :0] for name, value in vars(CONTINUATIONS).items() if isinstance(value, Tensor)}
    none = Continuations(**none, num_inside_classes=0)
    for function, more in ((_coarse, ()), (_fine, (True,))):
        leaf = torch.zeros(0, V, requires_grad=True)
        found = function(leaf, none, 1.0, *more)
        found.sum().backward()
        assert (found.shape, leaf.grad.shape) == ((0,), (0, V))


def test_continuations_that_all_ended_have_a_coarse_side_only():
    ended = Continuations(
        continuing_positions=torch.tensor([0]),
        starting_positions=torch.tensor([], dtype=torch.int64),
        continuing_entries=torch.tensor([[0, 0], [1, 3], [0, 1]]),
        starting_entries=torch.zeros(3, 0, dtype=torch.int64),
        class_continuations=torch.tensor([0, 0]),
        end_classes=torch.tensor([1]),
        can_end=torch.tensor([], dtype=torch.bool),
        num_inside_classes=0,
    )
    logits = _logits(0, 1.0, 1)
    torch.testing.assert_close(_coarse(logits, ended, 1.0), logits[0, [1, 3]].log_softmax(0))
    assert _fine(logits[:0], ended, 1.0, True).shape == (0,)


def test_the_gradients_of_gathered_logits_add_up_at_a_position():
    """A position at a common boundary, or inside a token, may also have single logits gathered."""
    num_pairs, continuations = 3, dataclasses.replace(CONTINUATIONS, continuing_positions=torch.tensor([0, 4, 1]))

    def found(z):
        gathered = gather_logits(_tile(z), CLASS_MAP, num_pairs, N - num_pairs, continuations, 2.0)
        return torch.cat([part.t().flatten() for part in gathered])

    def wanted(z):
        entries = z[
            continuations.continuing_positions[continuations.continuing_entries[0]], continuations.continuing_entries[1]
        ]
        return torch.cat([_naive_class_logits(z[:3], 2.0).flatten(), z[3:].flatten() / 2.0, entries / 2.0])

    logits = _logits()
    weights = _weights(len(found(logits)))
    naive, naive_grad = _value_and_grad(wanted, logits.double(), weights.double())
    value, grad = _value_and_grad(found, logits, weights)
    torch.testing.assert_close(value.double(), naive, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), naive_grad, rtol=1e-4, atol=1e-6)
    assert grad[4].all()
