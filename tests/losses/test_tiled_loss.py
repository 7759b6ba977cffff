"""The loss formed in tiles against the one formed from all logits at once, in float64, from the definition."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sar_kd.alignment.segments import positions_per_tile
from sar_kd.config.sections import LossConfig
from sar_kd.losses.distillation import TokenLevel
from sar_kd.losses.functional import LogitClamp, LossClamp
from sar_kd.losses.tiled_loss import Tile, TiledLossSpec, split_range, target_log_probs, tiled_loss
from sar_kd.models.lm_head import LazyLogits, LMHead
from sar_kd.models.logit_tiles import exp_, flat_view, logsumexp_per_position, padded_width
from sar_kd.runtime.precision import Precision
from tests.helpers.lm_heads import FLOAT32

N, V, D, D_T = 35, 37, 5, 7  # more rows than a tile has room for just as many (see `padded_width`)
HALF = Precision(torch.device("cpu"), torch.float16, 65536.0)
EVERY_DIRECTION = pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
TILE_ROWS = pytest.mark.parametrize("rows", [1, 4, N, 100])
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 2.0},
    "all": {"bias": True, "scale": 3.0, "softcap": 4.0},
}


def _given(seed=0, vocab=V, teacher_vocab=V, spread=1.0, bias=False, **head):
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


def _term(given, tile=N, **settings) -> TokenLevel:
    config = LossConfig(**({"temperature": 2.0, "logit_clamp_style": "off", "jsd_beta": 0.3} | settings))
    rows = len(given.head.weight), len(given.teacher_head.weight)
    sizes = SimpleNamespace(student_vocab_size=rows[0], teacher_vocab_size=rows[1], num_teacher_tokens=min(rows))
    term = TokenLevel(config, SimpleNamespace(pair=sizes))
    term.positions_per_tile = tile
    return term


def _tiles(rows: int) -> list[Tile]:
    return [Tile(part, part, None, None) for part in split_range(N, rows)]


def _found(given, term, rows=N, ce=0.7, kd=0.6, precision=FLOAT32, scale=1.0, factor=None, learner="student"):
    """The sums, and the gradients of the learner's states, head and bias."""
    sides = {"student": (given.states, given.head), "teacher": (given.teacher, given.teacher_head)}
    states, head = sides[learner]
    leaves = [None if x is None else x.clone().requires_grad_() for x in (states, head.weight, head.bias)]
    readouts = {side: LazyLogits(*parts, precision) for side, parts in sides.items()}
    readouts[learner] = LazyLogits(leaves[0], dataclasses.replace(head, weight=leaves[1], bias=leaves[2]), precision)
    compare = term.loss_and_grad if kd else None
    targets = given.targets if learner == "student" else None
    loss = TiledLossSpec(_tiles(rows), targets, compare, ce, kd, term.clamp, factor, scale, learner)
    sums = tiled_loss(loss, *readouts.values())
    (sums.total * scale).backward()
    return sums, [None if leaf is None else leaf.grad for leaf in leaves]


def _wanted(given, direction="forward", ce=0.7, kd=0.6, temperature=2.0, learner="student", top_k=0):
    sides = {"student": (given.states, given.head), "teacher": (given.teacher, given.teacher_head)}
    leaves = [
        None if x is None else x.double().requires_grad_() for x in (sides[learner][0], *_tensors(sides[learner][1]))
    ]
    logits = {}
    for side, (states, head) in sides.items():
        doubles = leaves if side == learner else [None if x is None else x.double() for x in (states, *_tensors(head))]
        logits[side] = _naive_logits(doubles[0], dataclasses.replace(head, weight=doubles[1], bias=doubles[2]))
    shared = min(z.shape[1] for z in logits.values())
    said = -logits["student"].log_softmax(-1).gather(1, given.targets[:, None]).sum()
    pair = [z[:, :shared] / temperature for z in logits.values()]
    if top_k:
        best, (own, other) = pair[1].topk(top_k).indices, logits.values()
        told = [torch.zeros_like(z, dtype=torch.bool).scatter_(1, best, True) for z in (own, other)]
        rests = [
            (z / temperature).masked_fill(out, -torch.inf).logsumexp(1)
            for z, out in zip(logits.values(), told, strict=True)
        ]
        pair = [torch.cat([z.gather(1, best), rest[:, None]], 1) for z, rest in zip(pair, rests, strict=True)]
    apart = temperature**2 * _naive_divergence(*pair, direction, 0.3)
    total = (ce * said if learner == "student" else 0.0) + kd * apart
    total.backward()
    return total.detach(), said.detach(), apart.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def _tensors(head: LMHead):
    return head.weight, head.bias


def _assert_same(found, wanted, rtol=1e-5):
    sums, gradients = found
    total, ce, kd, wanted_gradients = wanted
    for value, naive in ((sums.total, total), (sums.unclamped_ce, ce), (sums.unclamped_kd, kd)):
        torch.testing.assert_close(value.double(), naive, rtol=rtol, atol=1e-5)
    for gradient, naive in zip(gradients, wanted_gradients, strict=True):
        assert (gradient is None) == (naive is None)
        if gradient is not None:
            torch.testing.assert_close(gradient.double(), naive, rtol=1e-4, atol=1e-5)


@EVERY_DIRECTION
@TILE_ROWS
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_are_those_of_the_whole_logits(direction, rows, head):
    given = _given(**HEADS[head])
    found = _found(given, _term(given, kd_direction=direction), rows)
    _assert_same(found, _wanted(given, direction))


@EVERY_DIRECTION
@pytest.mark.parametrize("sizes", [(V, V + 6), (V + 6, V)], ids=["teacher", "student"])
@pytest.mark.parametrize("top_k", [0, 5])
def test_heads_padded_to_different_sizes_share_their_tokens(direction, sizes, top_k):
    given = _given(vocab=sizes[0], teacher_vocab=sizes[1])
    found = _found(given, _term(given, kd_direction=direction, teacher_top_k=top_k), 4)
    _assert_same(found, _wanted(given, direction, top_k=top_k))


@EVERY_DIRECTION
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_cross_entropy_is_at_temperature_one_whatever_the_divergence_has(direction, temperature):
    given = _given()
    found = _found(given, _term(given, kd_direction=direction, temperature=temperature), 5)
    _assert_same(found, _wanted(given, direction, temperature=temperature))


@EVERY_DIRECTION
@TILE_ROWS
def test_a_teacher_learns_from_the_same_tiles(direction, rows):
    given = _given()
    term = _term(given, kd_direction=direction)
    sums, gradients = _found(given, term, rows, learner="teacher")
    total, _, kd, wanted = _wanted(given, direction, learner="teacher")
    torch.testing.assert_close(sums.total.double(), total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.unclamped_kd.double(), kd, rtol=1e-5, atol=1e-5)
    for gradient, naive in zip(gradients[:2], wanted[:2], strict=True):
        torch.testing.assert_close(gradient.double(), naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ce", "kd"), [(1.0, 0.0), (0.0, 1.0)])
def test_either_term_may_stand_alone(ce, kd):
    given = _given()
    sums, gradients = _found(given, _term(given), 4, ce=ce, kd=kd)
    total, *_, wanted = _wanted(given, ce=ce, kd=kd)
    torch.testing.assert_close(sums.total.double(), total, rtol=1e-5, atol=1e-5)
    for gradient, naive in zip(gradients[:2], wanted[:2], strict=True):
        torch.testing.assert_close(gradient.double(), naive, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["scale", "hard", "off"])
@pytest.mark.parametrize("rows", [4, N])
def test_a_clamp_on_the_cross_entropy_reaches_its_gradient_alone(style, rows):
    given, clamp = _given(spread=2.0), LossClamp(style, 3.0)
    factor = None if style == "off" else lambda ce: clamp.grad_factor(ce / N)
    sums, gradients = _found(given, _term(given), rows, factor=factor)
    assert sums.unclamped_ce / N > 4.0
    expected = {"scale": 3.0 / (sums.unclamped_ce / N).item(), "hard": 0.0, "off": 1.0}[style]
    *_, wanted = _wanted(given, ce=0.7 * expected)
    torch.testing.assert_close(gradients[0].double(), wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1].double(), wanted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [3, N])
def test_a_row_that_counts_in_no_tile_teaches_no_text(rows):
    given = _given()
    counts = (torch.arange(N) % 3 > 0).float()
    tiles = [dataclasses.replace(tile, ce_mask=counts[tile.student]) for tile in _tiles(rows)]
    leaf = given.states.clone().requires_grad_()
    loss = TiledLossSpec(tiles, given.targets, None, 1.0, 0.0, LogitClamp())
    sums = tiled_loss(loss, LazyLogits(leaf, given.head, FLOAT32), None)
    sums.total.backward()
    said = -_naive_logits(given.states.double(), _double(given.head)).log_softmax(-1)
    wanted = (said.gather(1, given.targets[:, None])[:, 0] * counts).sum()
    torch.testing.assert_close(sums.unclamped_ce.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal((leaf.grad != 0).any(1), counts > 0)


def _double(head: LMHead) -> LMHead:
    return dataclasses.replace(head, weight=head.weight.double())


def test_a_head_that_does_not_learn_gets_no_gradient_and_its_states_do():
    given = _given()
    leaf, loss = (
        given.states.clone().requires_grad_(),
        TiledLossSpec(_tiles(4), given.targets, None, 1.0, 0.0, LogitClamp()),
    )
    tiled_loss(loss, LazyLogits(leaf, given.head, FLOAT32), None).total.backward()
    assert leaf.grad.any()
    assert given.head.weight.grad is None


@TILE_ROWS
@pytest.mark.parametrize("bound", [math.inf, 1.0])
def test_probabilities_of_the_text_match_their_definition(rows, bound):
    given = _given(bias=True)
    leaves = [x.clone().requires_grad_() for x in (given.states, given.head.weight, given.head.bias)]
    readout = LazyLogits(leaves[0], LMHead(*leaves[1:]), FLOAT32)
    found, finite = target_log_probs(readout, given.targets, rows, bound)
    weights = torch.linspace(-1.0, 2.0, N)
    (found * weights).sum().backward()
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = _naive_logits(doubles[0], LMHead(*doubles[1:])).clamp(-bound, bound)
    wanted = logits.log_softmax(-1).gather(1, given.targets[:, None])[:, 0]
    (wanted * weights).sum().backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert finite.all()
    for leaf, naive in zip(leaves, doubles, strict=True):
        torch.testing.assert_close(leaf.grad.double(), naive.grad, rtol=1e-4, atol=1e-5)


def test_rows_that_are_not_finite_are_counted_wherever_they_are():
    given = _given()
    given.states[[2, 9]] = torch.tensor([math.inf, math.nan])[:, None]
    sums, _ = _found(given, _term(given), 4)
    assert sums.nonfinite == 2
    assert sums.total.isnan()


def test_a_tile_fits_into_the_workspace_and_has_a_row_at_least():
    for workspace in (1, 8, 64, 256):
        for size in (97, 2048, 2 * 50257, 2 * 151936):
            rows, room = positions_per_tile(workspace, size), workspace * 2**20 / 4 / size
            assert padded_width(rows) <= max(1, 1.02 * room)
            assert rows + 8 > room
            assert rows == padded_width(rows)
    assert positions_per_tile(64, 151936, 151936) == 56
    assert positions_per_tile(1, 10**9) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_normaliser_of_the_largest_float16_logits_is_exact(temperature):
    tile = torch.where(torch.randn(V, N) > 0, 6e4, -6e4)
    wanted = (tile.double() / temperature).logsumexp(0)
    torch.testing.assert_close(logsumexp_per_position(tile, temperature).double(), wanted, rtol=1e-6, atol=0.0)


# float16


def _near(distance: float):
    """A student whose distribution is close to its teacher's, on 300 tokens of 16 features."""
    generator = torch.Generator().manual_seed(3)
    states, weight = torch.randn(64, 16, generator=generator), torch.randn(300, 16, generator=generator) * 0.5
    near = states + distance * torch.randn(64, 16, generator=generator)
    targets = torch.randint(300, (64,), generator=generator)
    given = SimpleNamespace(
        states=near, head=LMHead(weight), targets=targets, teacher=states, teacher_head=LMHead(weight)
    )
    for name in ("states", "teacher"):  # what a float16 forward hands over
        setattr(given, name, getattr(given, name).half().float())
    return given


def _naive_half(given, scale: float) -> list[Tensor]:
    """Gradients of the usual code: products of half operands to half logits, float32 losses, one backward."""
    leaves = [given.states.clone().requires_grad_(), given.head.weight.clone().requires_grad_()]
    with HALF.autocast():
        student = torch.nn.functional.linear(leaves[0], leaves[1])
        teacher = torch.nn.functional.linear(given.teacher, given.teacher_head.weight)
    log_p, log_t = ((z.float() / 2.0).log_softmax(-1) for z in (student, teacher))
    with HALF.matmul_context():
        (scale * 4.0 * (log_t.exp() * (log_t - log_p)).sum() / len(given.targets)).backward()
    return [leaf.grad / scale for leaf in leaves]


def _error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("distance", [0.01, 0.5], ids=["near", "far"])
def test_float16_gradients_are_no_further_from_the_truth_than_those_of_the_usual_code(distance):
    given, scale = _near(distance), 65536.0
    rows = len(given.targets)
    half = SimpleNamespace(**vars(given))
    half.head = half.teacher_head = LMHead(given.head.weight.half().float())
    *_, truth = _wanted_near(half)
    naive = _naive_half(given, scale)
    leaves = [given.states.clone().requires_grad_(), given.head.weight.clone().requires_grad_()]
    readouts = LazyLogits(leaves[0], LMHead(leaves[1]), HALF), LazyLogits(given.teacher, given.teacher_head, HALF)
    tiles = [Tile(part, part, None, None) for part in split_range(rows, 20)]
    term = _term(given)
    loss = TiledLossSpec(tiles, None, term.loss_and_grad, 0.0, 1.0, term.clamp, grad_scale=torch.tensor(scale / rows))
    sums = tiled_loss(loss, *readouts)
    (sums.total * scale / rows).backward()
    for leaf, usual, exact in zip(leaves, naive, truth, strict=True):
        assert _error(leaf.grad / scale, exact) <= 1.05 * _error(usual, exact)
        assert _error(usual, exact) < 0.1


def _wanted_near(given):
    leaves = [given.states.double().requires_grad_(), given.head.weight.double().requires_grad_()]
    student, teacher = leaves[0] @ leaves[1].T, given.teacher.double() @ given.teacher_head.weight.double().T
    loss = 4.0 * _naive_divergence(student / 2.0, teacher / 2.0, "forward", 0.3) / len(given.targets)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def test_gradients_too_small_for_half_survive_because_the_scale_is_in_them_when_they_are_rounded():
    given = _near(0.01)
    term, rows = _term(given), len(given.targets)
    norms = []
    for scale in (1.0, 65536.0):
        leaf = given.states.clone().requires_grad_()
        readouts = LazyLogits(leaf, given.head, HALF), LazyLogits(given.teacher, given.teacher_head, HALF)
        loss = TiledLossSpec(
            [Tile(slice(None), slice(None), None, None)], None, term.loss_and_grad, 0.0, 1e-5, term.clamp
        )
        loss = dataclasses.replace(loss, grad_scale=torch.tensor(scale / rows))
        (tiled_loss(loss, *readouts).total * scale / rows).backward()
        norms.append((leaf.grad / scale).norm())
    assert norms[1] > 0
    assert norms[0] < 0.5 * norms[1]


@pytest.mark.parametrize("count", [1, 31, 33, 40])
def test_a_tile_with_room_for_more_columns_holds_the_logits_and_is_written_to_by_place(count):
    states = torch.randn(count, 24)
    weight, bias = torch.randn(50, states.shape[1]), torch.randn(50)
    tile = LazyLogits(states, LMHead(weight, bias), FLOAT32).tile(slice(None))
    torch.testing.assert_close(tile, (states @ weight.T + bias).T)
    assert tile.stride(0) == padded_width(count)
    flat_view(tile)[7 * tile.stride(0) + count - 1] = 5.0
    assert tile[7, count - 1] == 5.0


def test_exp_is_exact_zero_where_it_would_be_no_normal_number():
    values = torch.cat([torch.linspace(-86, 80, 999), torch.tensor([-88.0, -1e30, -math.inf, math.inf, math.nan])])
    found, expected = exp_(values.clone()), values.double().exp()
    torch.testing.assert_close(found[:999].double(), expected[:999], rtol=1e-6, atol=0)
    assert found[999:1002].tolist() == [0.0, 0.0, 0.0]
    assert found[1002] == math.inf
    assert found[1003].isnan()
