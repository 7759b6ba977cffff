"""The loss computed in tiles against its definition on dense logits in float64."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sar_kd.alignment.segments import positions_per_tile, split_range
from sar_kd.config.sections import LossConfig
from sar_kd.losses.distillation import TokenLevel
from sar_kd.losses.functional import LogitClamp, LossClamp
from sar_kd.losses.tiled_loss import Tile, TiledLossSpec, target_log_probs, tiled_loss
from sar_kd.models import logit_tiles
from sar_kd.models.lm_head import LazyLogits, LMHead
from sar_kd.models.logit_tiles import padded_width
from sar_kd.runtime.precision import Precision
from tests.helpers.lm_heads import FLOAT32

N, V, D, D_T = 35, 37, 5, 7  # so many positions that a tile is padded (see `padded_width`)
HALF = Precision(torch.device("cpu"), torch.float16, 65536.0)
EVERY_DIRECTION = pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
TILE_SIZES = pytest.mark.parametrize("tile_size", [1, 4, N, 100])
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 2.0},
    "all": {"bias": True, "scale": 3.0, "softcap": 4.0},
}


def _inputs(seed=0, vocab=V, teacher_vocab=V, spread=1.0, bias=False, **head):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * spread

    own = LMHead(draw(vocab, D), draw(vocab) if bias else None, **head)
    targets = torch.randint(min(vocab, teacher_vocab), (N,), generator=generator)
    return SimpleNamespace(
        states=draw(N, D),
        head=own,
        targets=targets,
        teacher=draw(N, D_T),
        teacher_head=LMHead(draw(teacher_vocab, D_T)),
    )


def _naive_logits(states: Tensor, head: LMHead) -> Tensor:
    logits = states @ head.weight.T
    logits = head.scale * (logits if head.bias is None else logits + head.bias)
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def _naive_divergence(student: Tensor, teacher: Tensor, direction: str, beta: float) -> Tensor:
    p, t = student.softmax(-1), teacher.softmax(-1)
    if direction == "forward":
        return (t * (t.log() - p.log())).sum()
    if direction == "reverse":
        return (p * (p.log() - t.log())).sum()
    m = beta * t + (1 - beta) * p
    return (beta * t * (t.log() - m.log())).sum() + ((1 - beta) * p * (p.log() - m.log())).sum()


def _term(inputs, tile=N, **settings) -> TokenLevel:
    config = LossConfig(**({"temperature": 2.0, "logit_clamp_style": "off", "jsd_beta": 0.3} | settings))
    student, teacher = len(inputs.head.weight), len(inputs.teacher_head.weight)
    pair = SimpleNamespace(
        student_vocab_size=student, teacher_vocab_size=teacher, num_teacher_tokens=min(student, teacher)
    )
    term = TokenLevel(config, SimpleNamespace(pair=pair))
    term.positions_per_tile = tile
    return term


def _tiles(tile_size: int) -> list[Tile]:
    return [Tile(part, part, None, None) for part in split_range(N, tile_size)]


def _tiled(inputs, term, tile_size=N, ce=0.7, kd=0.6, ce_factor=None, grad_side="student"):
    """The sums, and the gradients of states, head and bias of `grad_side`."""
    sides = {"student": (inputs.states, inputs.head), "teacher": (inputs.teacher, inputs.teacher_head)}
    states, head = sides[grad_side]
    leaves = [None if x is None else x.clone().requires_grad_() for x in (states, head.weight, head.bias)]
    logits = {side: LazyLogits(*parts, FLOAT32) for side, parts in sides.items()}
    logits[grad_side] = LazyLogits(leaves[0], dataclasses.replace(head, weight=leaves[1], bias=leaves[2]), FLOAT32)
    loss_and_grad = term.loss_and_grad if kd else None
    targets = inputs.targets if grad_side == "student" else None
    spec = TiledLossSpec(_tiles(tile_size), targets, loss_and_grad, ce, kd, term.clamp, ce_factor, grad_side=grad_side)
    sums = tiled_loss(spec, *logits.values())
    sums.total.backward()
    return sums, [None if leaf is None else leaf.grad for leaf in leaves]


def _dense(inputs, direction="forward", ce=0.7, kd=0.6, temperature=2.0, grad_side="student", top_k=0):
    sides = {"student": (inputs.states, inputs.head), "teacher": (inputs.teacher, inputs.teacher_head)}
    tensors = {side: (states, head.weight, head.bias) for side, (states, head) in sides.items()}
    leaves = [None if x is None else x.double().requires_grad_() for x in tensors[grad_side]]
    logits = {}
    for side, (_, head) in sides.items():
        doubles = leaves if side == grad_side else [None if x is None else x.double() for x in tensors[side]]
        logits[side] = _naive_logits(doubles[0], dataclasses.replace(head, weight=doubles[1], bias=doubles[2]))
    shared = min(z.shape[1] for z in logits.values())
    ce_sum = -logits["student"].log_softmax(-1).gather(1, inputs.targets[:, None]).sum()
    pair = [z[:, :shared] / temperature for z in logits.values()]
    if top_k:
        top = pair[1].topk(top_k).indices
        tails = [
            (z / temperature).masked_fill(torch.zeros_like(z, dtype=torch.bool).scatter_(1, top, True), -torch.inf)
            for z in logits.values()
        ]
        pair = [
            torch.cat([z.gather(1, top), tail.logsumexp(1)[:, None]], 1) for z, tail in zip(pair, tails, strict=True)
        ]
    kd_sum = temperature**2 * _naive_divergence(*pair, direction, 0.3)
    total = (ce * ce_sum if grad_side == "student" else 0.0) + kd * kd_sum
    total.backward()
    return total.detach(), ce_sum.detach(), kd_sum.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def _assert_same(tiled, dense, rtol=1e-5):
    sums, gradients = tiled
    total, ce, kd, dense_gradients = dense
    for value, naive in ((sums.total, total), (sums.unclamped_ce, ce), (sums.unclamped_kd, kd)):
        torch.testing.assert_close(value.double(), naive, rtol=rtol, atol=1e-5)
    for gradient, naive in zip(gradients, dense_gradients, strict=True):
        assert (gradient is None) == (naive is None)
        if gradient is not None:
            torch.testing.assert_close(gradient.double(), naive, rtol=1e-4, atol=1e-5)


@EVERY_DIRECTION
@TILE_SIZES
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_are_those_of_dense_logits(direction, tile_size, head):
    inputs = _inputs(**HEADS[head])
    found = _tiled(inputs, _term(inputs, kd_direction=direction), tile_size)
    _assert_same(found, _dense(inputs, direction))


@EVERY_DIRECTION
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_several_blocks_of_the_vocabulary_give_the_same(monkeypatch, direction, side, head):
    monkeypatch.setitem(logit_tiles._BLOCK, "cpu", 5 * N)
    inputs = _inputs(**HEADS[head])
    assert len(list(logit_tiles.vocab_blocks(torch.empty(V, N)))) == 8
    ce = 0.7 if side == "student" else 0.0
    found = _tiled(inputs, _term(inputs, kd_direction=direction), ce=ce, grad_side=side)
    total, _, kd, expected = _dense(inputs, direction, ce=ce, grad_side=side)
    torch.testing.assert_close(found[0].total.double(), total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0].unclamped_kd.double(), kd, rtol=1e-5, atol=1e-5)
    for gradient, naive in zip(found[1][:2], expected[:2], strict=True):
        torch.testing.assert_close(gradient.double(), naive, rtol=1e-4, atol=1e-5)


@EVERY_DIRECTION
@pytest.mark.parametrize("sizes", [(V, V + 6), (V + 6, V)], ids=["teacher", "student"])
@pytest.mark.parametrize("top_k", [0, 5])
def test_heads_padded_to_different_sizes_share_their_tokens(direction, sizes, top_k):
    inputs = _inputs(vocab=sizes[0], teacher_vocab=sizes[1])
    found = _tiled(inputs, _term(inputs, kd_direction=direction, teacher_top_k=top_k), 4)
    _assert_same(found, _dense(inputs, direction, top_k=top_k))


@EVERY_DIRECTION
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_cross_entropy_is_at_temperature_one_whatever_the_divergence_has(direction, temperature):
    inputs = _inputs()
    found = _tiled(inputs, _term(inputs, kd_direction=direction, temperature=temperature), 5)
    _assert_same(found, _dense(inputs, direction, temperature=temperature))


@EVERY_DIRECTION
@TILE_SIZES
def test_the_same_tiles_give_the_teachers_gradient(direction, tile_size):
    inputs = _inputs()
    term = _term(inputs, kd_direction=direction)
    sums, gradients = _tiled(inputs, term, tile_size, grad_side="teacher")
    total, _, kd, expected = _dense(inputs, direction, grad_side="teacher")
    torch.testing.assert_close(sums.total.double(), total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.unclamped_kd.double(), kd, rtol=1e-5, atol=1e-5)
    for gradient, naive in zip(gradients[:2], expected[:2], strict=True):
        torch.testing.assert_close(gradient.double(), naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ce", "kd"), [(1.0, 0.0), (0.0, 1.0)])
def test_either_term_may_stand_alone(ce, kd):
    inputs = _inputs()
    sums, gradients = _tiled(inputs, _term(inputs), 4, ce=ce, kd=kd)
    total, *_, expected = _dense(inputs, ce=ce, kd=kd)
    torch.testing.assert_close(sums.total.double(), total, rtol=1e-5, atol=1e-5)
    for gradient, naive in zip(gradients[:2], expected[:2], strict=True):
        torch.testing.assert_close(gradient.double(), naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["scale", "hard", "off"])
@pytest.mark.parametrize("tile_size", [4, N])
def test_a_clamp_on_the_cross_entropy_reaches_its_gradient_alone(style, tile_size):
    inputs, clamp = _inputs(spread=2.0), LossClamp(style, 3.0)
    ce_factor = None if style == "off" else lambda ce: clamp.grad_factor(ce / N)
    sums, gradients = _tiled(inputs, _term(inputs), tile_size, ce_factor=ce_factor)
    assert sums.unclamped_ce / N > 4.0
    expected = {"scale": 3.0 / (sums.unclamped_ce / N).item(), "hard": 0.0, "off": 1.0}[style]
    *_, expected = _dense(inputs, ce=0.7 * expected)
    torch.testing.assert_close(gradients[0].double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1].double(), expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile_size", [3, N])
def test_a_position_outside_the_mask_adds_no_cross_entropy(tile_size):
    inputs = _inputs()
    counts = (torch.arange(N) % 3 > 0).float()
    tiles = [dataclasses.replace(tile, ce_mask=counts[tile.student]) for tile in _tiles(tile_size)]
    leaf = inputs.states.clone().requires_grad_()
    spec = TiledLossSpec(tiles, inputs.targets, None, 1.0, 0.0, LogitClamp())
    sums = tiled_loss(spec, LazyLogits(leaf, inputs.head, FLOAT32), None)
    sums.total.backward()
    nats = -_naive_logits(inputs.states.double(), _double(inputs.head)).log_softmax(-1)
    expected = (nats.gather(1, inputs.targets[:, None])[:, 0] * counts).sum()
    torch.testing.assert_close(sums.unclamped_ce.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal((leaf.grad != 0).any(1), counts > 0)


def _double(head: LMHead) -> LMHead:
    return dataclasses.replace(head, weight=head.weight.double())


def test_a_frozen_head_gets_no_gradient_and_its_states_do():
    inputs = _inputs()
    leaf = inputs.states.clone().requires_grad_()
    spec = TiledLossSpec(_tiles(4), inputs.targets, None, 1.0, 0.0, LogitClamp())
    tiled_loss(spec, LazyLogits(leaf, inputs.head, FLOAT32), None).total.backward()
    assert leaf.grad.any()
    assert inputs.head.weight.grad is None


@TILE_SIZES
@pytest.mark.parametrize("bound", [math.inf, 1.0])
def test_target_log_probs_match_their_definition(tile_size, bound):
    inputs = _inputs(bias=True)
    leaves = [x.clone().requires_grad_() for x in (inputs.states, inputs.head.weight, inputs.head.bias)]
    lazy = LazyLogits(leaves[0], LMHead(*leaves[1:]), FLOAT32)
    found, finite = target_log_probs(lazy, inputs.targets, tile_size, bound)
    weights = torch.linspace(-1.0, 2.0, N)
    (found * weights).sum().backward()
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = _naive_logits(doubles[0], LMHead(*doubles[1:])).clamp(-bound, bound)
    expected = logits.log_softmax(-1).gather(1, inputs.targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert finite.all()
    for leaf, naive in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(leaf.grad.double(), naive.grad, rtol=1e-4, atol=1e-5)


def test_nonfinite_positions_are_counted_in_every_tile():
    inputs = _inputs()
    inputs.states[[2, 9]] = torch.tensor([math.inf, math.nan])[:, None]
    sums, _ = _tiled(inputs, _term(inputs), 4)
    assert sums.nonfinite == 2
    assert sums.total.isnan()


# Masked tokens

MASKED = [3, 20, 36]


def _masked_inputs(**head):
    """Both models mask three tokens by the bias of their heads; no target is one of them."""
    inputs = _inputs(bias=True, **head)
    inputs.teacher_head.weight.mul_(0.5)
    inputs.teacher_head = dataclasses.replace(inputs.teacher_head, bias=torch.linspace(-1.0, 1.0, V))
    for own in (inputs.head, inputs.teacher_head):
        own.bias[MASKED] = -math.inf
    inputs.targets = torch.where(torch.isin(inputs.targets, torch.tensor(MASKED)), 5, inputs.targets)
    return inputs


def _without_masked(inputs):
    """The same over the other tokens alone."""
    kept = torch.tensor([v for v in range(V) if v not in MASKED])
    heads = (
        dataclasses.replace(own, weight=own.weight[kept], bias=own.bias[kept])
        for own in (inputs.head, inputs.teacher_head)
    )
    names = dict(zip(("head", "teacher_head"), heads, strict=True))
    return kept, SimpleNamespace(**{**vars(inputs), **names, "targets": torch.searchsorted(kept, inputs.targets)})


@EVERY_DIRECTION
@TILE_SIZES
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_masked_tokens_take_no_part_in_values_and_gradients(tile_size, direction, side, scale):
    inputs = _masked_inputs(scale=scale)
    kept, others = _without_masked(inputs)
    ce = 0.7 if side == "student" else 0.0
    term = _term(inputs, kd_direction=direction)
    sums, gradients = _tiled(inputs, term, tile_size, ce=ce, grad_side=side)
    total, ce_sum, kd_sum, naive = _dense(others, direction, ce=ce, grad_side=side)
    assert (sums.nonfinite, sums.dropped, sums.infinite) == (0, 0, 0)
    torch.testing.assert_close(sums.total.double(), total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.unclamped_kd.double(), kd_sum, rtol=1e-5, atol=1e-5)
    if side == "student":
        torch.testing.assert_close(sums.unclamped_ce.double(), ce_sum, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0].double(), naive[0], rtol=1e-4, atol=1e-5)
    for gradient, expected in zip(gradients[1:], naive[1:], strict=True):
        torch.testing.assert_close(gradient[kept].double(), expected, rtol=1e-4, atol=1e-5)
        assert not gradient[MASKED].any()


@pytest.mark.parametrize("style", ["off", "normalized", "raw"])
def test_a_masked_target_has_an_infinite_cross_entropy_and_its_position_counts_as_not_finite(style):
    inputs = _masked_inputs()
    inputs.targets[[4, 30]] = MASKED[0]
    term = _term(inputs, logit_clamp_style=style, logit_clamp=5.0)
    sums, _ = _tiled(inputs, term, 8)
    assert (sums.nonfinite, sums.unclamped_ce) == (2, math.inf)
    assert sums.kd.isfinite()
    sums, gradients = _tiled(inputs, term, 8, ce=0.0)  # where it is not learned, it is measured alone
    assert (sums.nonfinite, sums.unclamped_ce) == (0, math.inf)
    assert sums.total == 0.6 * sums.kd
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_cross_entropy_of_a_position_that_another_tile_holds_may_be_infinite():
    inputs = _masked_inputs()
    inputs.targets[4] = MASKED[0]
    tiles = [Tile(slice(None), slice(0), (torch.arange(N) != 4).float(), None)]
    spec = TiledLossSpec(tiles, inputs.targets, None, 1.0, 0.0, LogitClamp())
    sums = tiled_loss(spec, LazyLogits(inputs.states, inputs.head, FLOAT32), None)
    assert sums.nonfinite == 0
    expected = _naive_logits(inputs.states, inputs.head).log_softmax(-1).gather(1, inputs.targets[:, None])
    torch.testing.assert_close(sums.total, -expected[torch.arange(N) != 4].sum())


@pytest.mark.parametrize("precision", [FLOAT32, HALF], ids=["float32", "float16"])
def test_the_log_probability_of_a_masked_target_is_minus_infinity_and_no_other_is(precision):
    inputs = _masked_inputs()
    inputs.targets[[4, 30]] = MASKED[1]
    found, finite = target_log_probs(LazyLogits(inputs.states, inputs.head, precision), inputs.targets, 8)
    assert finite.all()
    assert (found == -math.inf).nonzero().flatten().tolist() == [4, 30]
    others = _naive_logits(inputs.states.double(), dataclasses.replace(inputs.head, weight=inputs.head.weight.double()))
    expected = others.log_softmax(-1).gather(1, inputs.targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if precision is FLOAT32 else 1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("bound", [math.inf, 5.0])
def test_a_position_of_which_every_token_is_masked_is_not_finite_as_one_with_nan_or_infinity(value, bound):
    logits, targets = torch.randn(6, V), torch.arange(6)
    logits[2] = -math.inf
    logits[4, 1 if value > -math.inf else slice(None)] = value
    lazy = LazyLogits(logits, None, FLOAT32)
    found, finite = target_log_probs(lazy, targets, 4, bound)
    assert finite.tolist() == [True, True, False, True, False, True]
    assert found.isnan().equal(~finite)
    spec = TiledLossSpec([Tile(slice(None), slice(0), None, None)], targets, None, 1.0, 0.0, LogitClamp())
    sums = tiled_loss(spec, lazy, None)
    assert sums.nonfinite == 2


def test_a_tile_fits_into_the_workspace_and_has_a_position_at_least():
    for workspace in (1, 8, 64, 256):
        for size in (97, 2048, 2 * 50257, 2 * 151936):
            count, limit = positions_per_tile(workspace, size), workspace * 2**20 / 4 / size
            assert padded_width(count) <= max(1, 1.02 * limit)
            assert count + 8 > limit
            assert count == padded_width(count)
    assert positions_per_tile(64, 151936, 151936) == 56
    assert positions_per_tile(0, 151936, 151936) == positions_per_tile(0, 262144, 262144) == 256
    assert positions_per_tile(0, 16000, 16000) == positions_per_tile(64, 16000, 16000) > 256
    assert positions_per_tile(1, 10**9) == 1


# float16


def _near(distance: float):
    """A student whose distribution is close to its teacher's, on 300 tokens of 16 features."""
    generator = torch.Generator().manual_seed(3)
    states, weight = torch.randn(64, 16, generator=generator), torch.randn(300, 16, generator=generator) * 0.5
    near = states + distance * torch.randn(64, 16, generator=generator)
    targets = torch.randint(300, (64,), generator=generator)
    inputs = SimpleNamespace(
        states=near, head=LMHead(weight), targets=targets, teacher=states, teacher_head=LMHead(weight)
    )
    for name in ("states", "teacher"):  # as a float16 forward returns them
        setattr(inputs, name, getattr(inputs, name).half().float())
    return inputs


def _naive_half(inputs, scale: float) -> list[Tensor]:
    """Gradients of the usual code: products of half operands to half logits, float32 losses, one backward."""
    leaves = [inputs.states.clone().requires_grad_(), inputs.head.weight.clone().requires_grad_()]
    with HALF.autocast():
        student = torch.nn.functional.linear(leaves[0], leaves[1])
        teacher = torch.nn.functional.linear(inputs.teacher, inputs.teacher_head.weight)
    log_p, log_t = ((z.float() / 2.0).log_softmax(-1) for z in (student, teacher))
    with HALF.matmul_context():
        (scale * 4.0 * (log_t.exp() * (log_t - log_p)).sum() / len(inputs.targets)).backward()
    return [leaf.grad / scale for leaf in leaves]


def _error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("distance", [0.01, 0.5], ids=["near", "far"])
def test_float16_gradients_are_as_close_to_the_exact_ones_as_those_of_the_usual_code(distance):
    inputs, scale = _near(distance), 65536.0
    count = len(inputs.targets)
    half = SimpleNamespace(**vars(inputs))
    half.head = half.teacher_head = LMHead(inputs.head.weight.half().float())
    *_, truth = _dense_near(half)
    naive = _naive_half(inputs, scale)
    leaves = [inputs.states.clone().requires_grad_(), inputs.head.weight.clone().requires_grad_()]
    logits = LazyLogits(leaves[0], LMHead(leaves[1]), HALF), LazyLogits(inputs.teacher, inputs.teacher_head, HALF)
    tiles = [Tile(part, part, None, None) for part in split_range(count, 20)]
    term = _term(inputs)
    spec = TiledLossSpec(tiles, None, term.loss_and_grad, 0.0, 1.0, term.clamp, grad_scale=torch.tensor(scale / count))
    sums = tiled_loss(spec, *logits)
    (sums.total * scale / count).backward()
    for leaf, usual, exact in zip(leaves, naive, truth, strict=True):
        assert _error(leaf.grad / scale, exact) <= 1.05 * _error(usual, exact)
        assert _error(usual, exact) < 0.1


def _dense_near(inputs):
    leaves = [inputs.states.double().requires_grad_(), inputs.head.weight.double().requires_grad_()]
    student, teacher = leaves[0] @ leaves[1].T, inputs.teacher.double() @ inputs.teacher_head.weight.double().T
    loss = 4.0 * _naive_divergence(student / 2.0, teacher / 2.0, "forward", 0.3) / len(inputs.targets)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def test_gradients_below_the_half_range_survive_because_they_are_rounded_with_the_loss_scale():
    inputs = _near(0.01)
    term, count = _term(inputs), len(inputs.targets)
    norms = []
    for scale in (1.0, 65536.0):
        leaf = inputs.states.clone().requires_grad_()
        logits = LazyLogits(leaf, inputs.head, HALF), LazyLogits(inputs.teacher, inputs.teacher_head, HALF)
        spec = TiledLossSpec(
            [Tile(slice(None), slice(None), None, None)], None, term.loss_and_grad, 0.0, 1e-5, term.clamp
        )
        spec = dataclasses.replace(spec, grad_scale=torch.tensor(scale / count))
        (tiled_loss(spec, *logits).total * scale / count).backward()
        norms.append((leaf.grad / scale).norm())
    assert norms[1] > 0
    assert norms[0] < 0.5 * norms[1]
