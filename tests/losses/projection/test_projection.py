"""Classes and continuations against their probabilities written out member by member in float64."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from sar_kd.alignment.batch_alignment import Continuations
from sar_kd.data.batch import MASKED_LOGIT
from sar_kd.losses.projection.joint import ContinuationPaths, add_continuation_paths
from sar_kd.losses.projection.marginals import ClassMap, coarse_log_probs, fine_log_probs, gather_logits

N, V, COUNT = 5, 12, 4
TOKENS = torch.tensor([0, 2, 3, 5, 6, 8, 9, 11])
CLASSES = torch.tensor([1, 0, 1, 3, 1, 2, 0, 3])
LEFT_OUT = [token for token in range(V) if token not in TOKENS.tolist()]


def _logits(seed: int = 0, spread: float = 3.0, rows: int = N) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * spread


def _weights(*shape: int) -> Tensor:
    """What comes back from the loss: of either sign."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def _value_and_grad(function, logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = function(leaf)
    (value * weights).sum().backward()
    return value.detach(), leaf.grad


# Classes


NONE = torch.tensor([], dtype=torch.int64)
NO_ENTRIES = torch.zeros(3, 0, dtype=torch.int64)
NO_ROWS = Continuations(NONE, NONE, NO_ENTRIES, NO_ENTRIES, NONE, NONE, NONE.bool(), 0)
FOLD = ClassMap(TOKENS, CLASSES, COUNT)


def _tile(logits: Tensor) -> Tensor:
    return logits.T.float().contiguous()


def _class_logits(logits: Tensor, temperature: float = 1.0, fold: ClassMap = FOLD) -> Tensor:
    return gather_logits(_tile(logits), fold, len(logits), 0, NO_ROWS, temperature).boundary.T


def _naive_class_logits(logits: Tensor, temperature: float) -> Tensor:
    rows = []
    for row in logits:
        weights = [(z / temperature).exp() for z in row]
        members = [TOKENS[k == CLASSES].tolist() for k in range(COUNT)]
        rows.append(torch.stack([sum(weights[v] for v in tokens).log() for tokens in members]))
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_class_logits_match_their_definition(temperature):
    weights = _weights(N, COUNT)
    value, grad = _value_and_grad(lambda z: _class_logits(z, temperature), _logits(), weights)
    naive = _value_and_grad(lambda z: _naive_class_logits(z, temperature), _logits().double(), weights.double())
    torch.testing.assert_close(value.double(), naive[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), naive[1], rtol=1e-4, atol=1e-6)


def test_tokens_without_a_class_have_exactly_no_gradient_and_are_not_read():
    logits = _logits()
    logits[:, LEFT_OUT] = math.nan
    value, grad = _value_and_grad(_class_logits, logits, _weights(N, COUNT))
    assert torch.equal(value, _class_logits(_logits()))
    assert torch.equal(grad[:, LEFT_OUT], torch.zeros(N, len(LEFT_OUT)))
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
    members = [TOKENS[k == CLASSES] for k in range(COUNT)]
    wanted = torch.stack([(logits.double() / temperature)[:, tokens].logsumexp(1) for tokens in members], dim=1)
    value, grad = _value_and_grad(lambda z: _class_logits(z, temperature), logits, _weights(N, COUNT))
    assert (value.dtype, grad.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=0.0)
    assert grad.isfinite().all()
    assert grad.abs().max() > 0.1


@pytest.mark.parametrize("distance", [50.0, 1e4])
def test_a_class_far_below_the_rows_maximum_keeps_its_exact_value_and_gradient(distance):
    """Beside the row's maximum its probability would be 0 in any float."""
    logits, high = _logits(), _logits()
    high[:, [0, 3, 6]] += distance  # class 1
    value, grad = _value_and_grad(_class_logits, logits, _weights(N, COUNT))
    far, far_grad = _value_and_grad(_class_logits, high, _weights(N, COUNT))
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


def test_no_rows_have_no_classes_and_no_gradient():
    none = torch.zeros(0, V, requires_grad=True)
    classes = _class_logits(none)
    classes.sum().backward()
    assert (classes.shape, none.grad.shape) == ((0, COUNT), (0, V))


def test_a_fold_of_more_rows_than_tokens_leaves_the_padding_alone():
    """Heads are padded: the last columns stand for no token."""
    padded = torch.cat([_logits(), torch.full((N, 3), 50.0)], dim=1)
    value, grad = _value_and_grad(_class_logits, padded, _weights(N, COUNT))
    assert torch.equal(value, _class_logits(_logits()))
    assert torch.equal(grad[:, V:], torch.zeros(N, 3))


# Continuations


# Outcomes 0, 1 and the end 2 of one row; 3 and the end 4 of another, behind which no token of the coarser side ends;
# 5, 6 and the end 7 of a third that ended in the text, of which only the coarser side is asked.
ROWS = Continuations(
    coarse_positions=torch.tensor([0, 1, 2]),
    fine_positions=torch.tensor([0, 1]),
    coarse_entries=torch.tensor(
        [[0, 0, 0, 0, 1, 1, 2, 2, 2, 2], [1, 3, 7, 9, 3, 5, 0, 2, 6, 8], [1, 0, 0, 2, 3, 3, 6, 5, 5, 7]]
    ),
    fine_entries=torch.tensor([[0, 0, 0, 1, 1], [0, 4, 6, 2, 8], [0, 1, 1, 3, 3]]),
    class_continuations=torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]),
    end_classes=torch.tensor([2, 4, 7]),
    can_end=torch.tensor([True, False]),
    num_inside_classes=5,
)
RICH, POOR = 3, 2


def _coarse(logits: Tensor, rows: Continuations, temperature: float) -> Tensor:
    return coarse_log_probs(gather_logits(_tile(logits), FOLD, 0, 0, rows, temperature).entries, rows)


def _fine(logits: Tensor, rows: Continuations, temperature: float, must_end: bool) -> Tensor:
    return fine_log_probs(
        gather_logits(_tile(logits), FOLD, 0, len(logits), NO_ROWS, temperature).inside, rows, must_end
    )


MUST_END = pytest.mark.parametrize("must_end", [True, False])


def _naive_coarse(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities."""
    z = (logits / temperature).exp()
    only = z[1, 3] + z[1, 5]
    first = torch.stack([z[0, 3] + z[0, 7], z[0, 1], z[0, 9]])
    second = torch.stack([only, torch.zeros_like(only)])
    third = torch.stack([z[2, 2] + z[2, 6], z[2, 0], z[2, 8]])
    return torch.cat([row / row.sum() for row in (first, second, third)])


def _naive_fine(logits: Tensor, temperature: float, must_end: bool) -> Tensor:
    """Probabilities."""
    z = (logits / temperature).exp()
    own, only = [z[0, 0], z[0, 4] + z[0, 6]], z[1, 2] + z[1, 8]
    first = torch.stack([*own, z[0].sum() - sum(own)])
    second = torch.stack([only, torch.zeros_like(only) if must_end else z[1].sum() - only])
    return torch.cat([row / row.sum() for row in (first, second)])


def _assert_probs(log_probs: Tensor, probs: Tensor, *sizes: int) -> None:
    assert log_probs.dtype is torch.float32
    torch.testing.assert_close(log_probs.exp().double(), probs, rtol=1e-5, atol=1e-7)
    assert torch.equal(log_probs.exp()[probs == 0], torch.zeros(int((probs == 0).sum())))
    for row in log_probs.exp().split(sizes):
        torch.testing.assert_close(row.sum(), torch.ones(()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_of_the_coarser_side_match_their_definition_and_sum_to_one(temperature):
    logits = _logits(0, 1.0, RICH)
    _assert_probs(_coarse(logits, ROWS, temperature), _naive_coarse(logits.double(), temperature), 3, 2, 3)


@MUST_END
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_probabilities_of_the_poorer_side_match_their_definition_and_sum_to_one(temperature, must_end):
    """Of the rows that go on in the text, and of no other."""
    logits = _logits(1, 1.0, POOR)
    wanted = _naive_fine(logits.double(), temperature, must_end)
    _assert_probs(_fine(logits, ROWS, temperature, must_end), wanted, 3, 2)


@pytest.mark.parametrize("side", ["coarse", "fine_must_end", "fine"])
def test_gradients_of_continuations_match_their_definition(side):
    if side == "coarse":
        logits, function, naive = _logits(0, 1.0, RICH), _coarse, _naive_coarse
    else:
        must_end = side == "fine_must_end"
        logits, function, naive = _logits(1, 1.0, POOR), _fine, lambda z, t: _naive_fine(z, t, must_end)
    arguments = (ROWS, 2.0) if side == "coarse" else (ROWS, 2.0, must_end)

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
def test_written_bytes_of_vanishing_probability_still_give_a_distribution(distance):
    logits, high = _logits(0, 1.0, RICH), _logits(0, 1.0, RICH)
    for row in range(RICH):  # tokens that do not extend them
        extending = ROWS.coarse_entries[1, ROWS.coarse_entries[0] == row].tolist()
        high[row, [token for token in range(V) if token not in extending]] += distance
    assert torch.equal(_coarse(logits, ROWS, 1.0), _coarse(high, ROWS, 1.0))


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_a_row_of_which_a_cut_left_nothing_counts_as_one_that_ends(temperature):
    logits = _logits(0, 1.0, RICH)
    cut = torch.full_like(logits, MASKED_LOGIT)
    cut[:2, [0, 2, 11]] = logits[:2, [0, 2, 11]]  # tokens that extend nothing of these rows
    cut[2, [2, 8]] = logits[2, [2, 8]]
    found = _coarse(cut, ROWS, temperature)
    assert found[[2, 4]].tolist() == [0.0, 0.0]
    assert (found[[0, 1, 3, 6]] < 1e-6 * MASKED_LOGIT).all()
    assert found.isfinite().all()
    torch.testing.assert_close(found[[5, 7]], (logits[2, [2, 8]] / temperature).log_softmax(0))


@MUST_END
def test_the_largest_float16_logits_give_finite_continuations(must_end):
    leaves = [torch.where(_logits(i, 1.0, rows) > 0, 6e4, -6e4).half() for i, rows in enumerate((RICH, POOR))]
    for leaf, function in zip(
        leaves, (lambda z: _coarse(z, ROWS, 0.5), lambda z: _fine(z, ROWS, 0.5, must_end)), strict=True
    ):
        log_probs = function(leaf.requires_grad_())
        (log_probs.clamp_min(-1e6) * _weights(len(log_probs))).sum().backward()
        assert log_probs.dtype is torch.float32
        assert log_probs.isfinite().all()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("lead", [5.0, 12.0, 25.0, 40.0, 60.0])
def test_a_student_all_but_certain_to_go_on_is_still_told_to_end(lead, temperature):
    """log(1 - p) by way of p has neither digits nor gradient where p rounds to 1."""
    fine = _logits(4, 1.0, POOR)
    fine[0, 4] = lead * temperature
    value, grad = _value_and_grad(lambda z: _fine(z, ROWS, temperature, True)[2], fine, torch.ones(()))
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


def test_no_continuations_have_no_outcomes():
    none = {name: value[..., :0] for name, value in vars(ROWS).items() if name != "num_inside_classes"}
    none = Continuations(**none, num_inside_classes=0)
    for function, more in ((_coarse, ()), (_fine, (True,))):
        leaf = torch.zeros(0, V, requires_grad=True)
        found = function(leaf, none, 1.0, *more)
        found.sum().backward()
        assert (found.shape, leaf.grad.shape) == ((0,), (0, V))


def test_rows_that_all_ended_ask_the_coarser_side_only():
    ended = Continuations(
        coarse_positions=torch.tensor([0]),
        fine_positions=torch.tensor([], dtype=torch.int64),
        coarse_entries=torch.tensor([[0, 0], [1, 3], [0, 1]]),
        fine_entries=torch.zeros(3, 0, dtype=torch.int64),
        class_continuations=torch.tensor([0, 0]),
        end_classes=torch.tensor([1]),
        can_end=torch.tensor([], dtype=torch.bool),
        num_inside_classes=0,
    )
    logits = _logits(0, 1.0, 1)
    torch.testing.assert_close(_coarse(logits, ended, 1.0), logits[0, [1, 3]].log_softmax(0))
    assert _fine(logits[:0], ended, 1.0, True).shape == (0,)


def test_a_reading_adds_up_all_that_comes_back_to_a_column():
    """One column may be open, or stand whole, and lend single logits."""
    num_pairs, rows = 3, dataclasses.replace(ROWS, coarse_positions=torch.tensor([0, 4, 1]))

    def found(z):
        return torch.cat(
            [part.t().flatten() for part in gather_logits(_tile(z), FOLD, num_pairs, N - num_pairs, rows, 2.0)]
        )

    def wanted(z):
        entries = z[rows.coarse_positions[rows.coarse_entries[0]], rows.coarse_entries[1]]
        return torch.cat([_naive_class_logits(z[:3], 2.0).flatten(), z[3:].flatten() / 2.0, entries / 2.0])

    logits = _logits()
    weights = _weights(len(found(logits)))
    naive, naive_grad = _value_and_grad(wanted, logits.double(), weights.double())
    value, grad = _value_and_grad(found, logits, weights)
    torch.testing.assert_close(value.double(), naive, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), naive_grad, rtol=1e-4, atol=1e-6)
    assert grad[4].all()


# All ways to an open outcome


def test_other_ways_add_probabilities_and_their_gradients():
    ended, going_on = _logits(0, 1.0, 3)[:, :4].log_softmax(-1), _weights(5).log_softmax(0)
    rows, ends = torch.tensor([1, -1, 0]), going_on[[2, 4]]
    ways = torch.tensor([[0, 0, 2], [3, 1, 0], [3, 0, 1]])
    found = add_continuation_paths(ended.T, ContinuationPaths(going_on, ends, rows, ways)).T
    wanted = torch.stack([ends[1].exp() * ended[0].exp(), ended[1].exp(), ends[0].exp() * ended[2].exp()])
    for k, c, way in ways.T.tolist():
        wanted[k, c] += going_on[way].exp()
    torch.testing.assert_close(found.exp(), wanted)
    inputs = [x.double().requires_grad_() for x in (ended, going_on, ends)]
    assert torch.autograd.gradcheck(
        lambda a, b, c: add_continuation_paths(a.T, ContinuationPaths(b, c, rows, ways)), inputs
    )


def test_without_continuations_the_open_outcomes_stay_as_they_are():
    ended, none = _logits(0, 1.0, 3).log_softmax(-1), torch.zeros(0)
    ways = torch.zeros(3, 0, dtype=torch.int64)
    assert torch.equal(
        add_continuation_paths(ended.T, ContinuationPaths(none, none, torch.full((3,), -1), ways)), ended.T
    )
