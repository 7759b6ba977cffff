"""The training loss in one pass over hidden states: cross-entropy and distillation, value and gradient, tile by tile.

Gradients are formed in forward, while a tile's logits are there, so that each head product is made once. They carry
the loss scale when they are rounded to half, as they would in a backward of their own; what is known only afterwards, a
clamp's factor, comes in backward.

How likely a model finds the text that is there, token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sar_kd.data.batch import CachedTopK, TopKLogits
from sar_kd.losses.functional import LogitClamp
from sar_kd.models.lm_head import Gradients, LazyLogits, PositionIndex
from sar_kd.models.logit_tiles import blocks_of, column_logsumexp, exp_, finite_columns, flat

Teacher = LazyLogits | CachedTopK
"""What tiles of the teacher's logits, or of the likeliest of them, come from"""


class Tile(NamedTuple):
    """Rows of both models that are compared together."""

    student: PositionIndex
    """Rows of the student's readout"""
    teacher: PositionIndex = slice(0)
    """Rows of the teacher's; none where nothing is distilled"""
    counts: Tensor | None = None
    """float32 [n]: 1 where the row's cross-entropy counts in this tile, else 0; None if it does in all"""
    part: Any = None
    """What the comparison wants to know about the rows"""


class Single(NamedTuple):
    """Slopes of single places of a tile."""

    places: Tensor
    """int64 [E]: in the tile as `flat` lays it out"""
    values: Tensor
    """float32 [E]"""


class Slopes(NamedTuple):
    """d loss / d logits of a tile [V, n], in parts that add up."""

    pieces: tuple[tuple[int, Tensor], ...] = ()
    """The first column of each, and float32 [V', k] of the first V' rows"""
    single: Single | None = None

    def add_to_(self, tile: Tensor, weight: Tensor, block: slice = slice(None)) -> None:
        """Add `weight` times the pieces to a block of the tile."""
        for first, piece in self.pieces:
            part = piece[block]
            tile[block][: len(part), first : first + part.shape[1]].addcmul_(part, weight)

    def add_single_to_(self, tile: Tensor, weight: Tensor) -> None:
        """Add `weight` times what single places get."""
        if self.single is not None:
            flat(tile).index_add_(0, self.single.places, self.single.values * weight)


class Compared(NamedTuple):
    """Two tiles of logits, compared: sums over their rows, nats."""

    loss: Tensor
    """What is minimised"""
    raw: Tensor
    """The same as it is: no floor"""
    dropped: Tensor
    """Teacher rows left out because they are not finite"""
    slopes: Slopes | None
    """d loss / d logits of the side that learns; None if none does"""


@dataclass(frozen=True)
class Loss:
    """What is minimised: ce_weight * factor(CE) * CE + kd_weight * KD, over the rows of `tiles`."""

    tiles: Sequence[Tile]
    targets: Tensor | None
    """int64 [N]: what the student's rows predict; None without cross-entropy"""
    compare: Callable[[Tensor, Tensor | TopKLogits, Any, str | None], Compared] | None
    """compare(student tile, teacher tile, tile.part, learner); None where nothing is distilled"""
    ce_weight: float
    kd_weight: float
    clamp: LogitClamp
    ce_factor: Callable[[Tensor], Tensor] | None = None
    """From the sum of the cross-entropy under the clamp to what its gradient is multiplied by; None for 1"""
    scale: Tensor | float = 1.0
    """What the loss will be multiplied by before its backward: gradients are rounded with it"""
    learner: str = "student"

    def learns(self, student: LazyLogits, teacher: Teacher | None) -> LazyLogits:
        """The learner's readout."""
        if self.learner == "student":
            return student
        assert isinstance(teacher, LazyLogits), "what is stored learns nothing"
        return teacher


class Sums(NamedTuple):
    """fp32 scalars; all but the first without a gradient."""

    minimised: Tensor
    ce: Tensor
    """Under the clamp"""
    raw_ce: Tensor
    kd: Tensor
    raw_kd: Tensor
    nonfinite: Tensor
    """Rows of student logits that are not finite"""
    dropped: Tensor


def tiled_loss(loss: Loss, student: LazyLogits, teacher: Teacher | None) -> Sums:
    """The sums of a batch; `minimised` has gradients for the learner's states, and for the head if it takes one."""
    return Sums(*_TiledLoss.apply(loss, student, teacher, *loss.learns(student, teacher).tensors))


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Loss, student: LazyLogits, teacher: Teacher | None, *inputs: Tensor | None):
        wanted = [needed and (loss.ce_weight > 0 or loss.compare is not None) for needed in ctx.needs_input_grad[3:]]
        gradients = Gradients(loss.learns(student, teacher), wanted) if any(wanted) else None
        ctx.scale = loss.scale
        sums, ctx.gradients = _sums(loss, student, teacher, gradients), gradients
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *((None,) * 3 if gradients is None else gradients.times(grad / ctx.scale))


def _sums(loss: Loss, student: LazyLogits, teacher: Teacher | None, gradients: Gradients | None) -> Sums:
    zero = torch.zeros((), device=student.states.device)
    kd = raw_kd = dropped = zero
    text = None if loss.targets is None else _Text(loss, loss.targets, zero)
    # A clamp's factor is that of the whole sum, which has to be known before anything is learned from a part of it.
    reads_first = len(loss.tiles) > 1 and loss.ce_factor is not None
    if text is not None and reads_first:
        for number, tile in enumerate(loss.tiles):
            text.read(number, student.tile(tile.student))
    for number in range(len(loss.tiles)) if gradients or loss.compare or not reads_first else ():
        compared = _learn_from(number, loss, student, teacher, text, not reads_first, gradients)
        if compared is not None:
            kd, raw_kd, dropped = kd + compared.loss, raw_kd + compared.raw, dropped + compared.dropped
    ce, raw_ce, nonfinite, factor = (text.ce, text.raw, text.nonfinite, text.factor) if text else (zero,) * 4
    return Sums(loss.ce_weight * factor * ce + loss.kd_weight * kd, ce, raw_ce, kd, raw_kd, nonfinite, dropped)


def _learn_from(
    number: int,
    loss: Loss,
    student: LazyLogits,
    teacher: Teacher | None,
    text: _Text | None,
    reads: bool,
    gradients: Gradients | None,
) -> Compared | None:
    """Make one tile of both models' logits, compare them, and add what is learned to `gradients`. Nothing of the tile
    outlives the call.

    reads: the text has not read it yet
    Returns: sums alone; None where nothing is compared
    """
    tile, is_own = loss.tiles[number], loss.learner == "student"
    own = student.tile(tile.student)
    others = None if loss.compare is None or teacher is None else teacher.tile(tile.teacher)
    if text and reads:
        text.read(number, own)
    learned = own if is_own else others
    assert isinstance(learned, Tensor), "what is stored learns nothing"
    chain = gradients.readout.logit_transform_grad(learned, loss.clamp.raw_bound) if gradients else None
    compared = _compared(loss, own, others, tile.part, loss.learner if gradients else None)
    if gradients is not None:
        slopes = Slopes() if compared is None or compared.slopes is None else compared.slopes
        weight = loss.kd_weight * loss.scale * torch.ones_like(own[0, :1])
        if text and loss.ce_weight:
            text.become_slopes_(number, own, slopes, weight)
        else:
            slopes.add_to_(learned.zero_(), weight)
        slopes.add_single_to_(learned, weight)
        gradients.add_(tile.student if is_own else tile.teacher, learned if chain is None else learned.mul_(chain))
    return compared and compared._replace(slopes=None)


def _compared(
    loss: Loss, own: Tensor, others: Tensor | TopKLogits | None, part: Any, learner: str | None
) -> Compared | None:
    """Both tiles, held within the clamp's bound and compared; `raw` is of the logits as they are."""
    bound = loss.clamp.raw_bound
    if loss.compare is None or others is None:
        _clamp_(bound, own)
        return None
    if bound == math.inf:
        return loss.compare(own, others, part, learner)
    assert isinstance(others, Tensor), "what is stored holds no logits to clamp"
    plain = loss.compare(own.clone(), others.clone(), part, None).raw
    _clamp_(bound, own, others)
    return loss.compare(own, others, part, learner)._replace(raw=plain)


def _clamp_(bound: float, *tiles: Tensor) -> None:
    """Hold logits within [-bound, bound]; a column that is not finite stays so, of which a clamp would make numbers."""
    for tile in tiles if bound < math.inf else ():
        tile.masked_fill_(~finite_columns(tile), math.nan).clamp_(-bound, bound)


class _Text:
    """The cross-entropy of a batch's text: its sums, and what its slopes need, tile by tile."""

    def __init__(self, loss: Loss, targets: Tensor, zero: Tensor):
        self.loss, self.targets, self.factor = loss, targets, zero + 1.0
        self.ce = self.raw = self.nonfinite = zero
        self._normalisers: dict[int, Tensor] = {}

    def read(self, number: int, tile: Tensor) -> None:
        """Take in a tile of the student's logits, as they are: float32 [V, n]."""
        clamp, counts, targets = self.loss.clamp, self.loss.tiles[number].counts, self._targets(number)
        normaliser = column_logsumexp(tile)
        own = tile.gather(0, targets[None])[0]
        plain = said = own - normaliser
        if clamp.style == "raw":
            normaliser = column_logsumexp(tile, bound=clamp.bound)
            said = own.clamp(-clamp.bound, clamp.bound) - normaliser
        said, finite = clamp.log_probs(said), finite_columns(tile)
        if counts is not None:
            plain, said, finite = plain * counts, said * counts, finite | (counts == 0)
        self.raw, self.ce = self.raw - plain.sum(), self.ce - said.sum()
        self.nonfinite = self.nonfinite + (~finite).sum()
        self._normalisers[number] = normaliser
        if self.loss.ce_factor is not None:
            self.factor = self.loss.ce_factor(self.ce)

    def become_slopes_(self, number: int, tile: Tensor, slopes: Slopes, weight: Tensor) -> None:
        """Turn a tile's logits into the slopes that the loss has from the text, and `weight` times these pieces."""
        counts, targets = self.loss.tiles[number].counts, self._targets(number)
        mine = self.loss.ce_weight * self.factor * self.loss.scale
        mine = mine.expand(len(targets)) if counts is None else mine * counts
        normaliser = self._normalisers[number]
        for block in blocks_of(tile):
            exp_(tile[block].sub_(normaliser)).mul_(mine)
            slopes.add_to_(tile, weight, block)
        tile.scatter_add_(0, targets[None], -mine[None])

    def _targets(self, number: int) -> Tensor:
        return self.targets[self.loss.tiles[number].student]


def stretches_of(count: int, size: int) -> list[slice]:
    """`count` rows in segments of at most `size`."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def target_log_probs(
    readout: LazyLogits, targets: Tensor, tile_rows: int, bound: float = math.inf
) -> tuple[Tensor, Tensor]:
    """log softmax(z_n)[y_n] of each row, of logits within [-bound, bound], and whether the row's logits are finite.

    targets: int64 [N]
    Returns: float32 [N], nats, with a gradient for states and head; bool [N]
    """
    return _TargetLogProbs.apply(readout, targets, tile_rows, bound, *readout.tensors)


class _TargetLogProbs(torch.autograd.Function):
    """d log p[y] / d z[v] = [v = y] - p[v]. What comes back is another number for each row, so tiles are made again."""

    @staticmethod
    def forward(ctx, readout: LazyLogits, targets: Tensor, tile_rows: int, bound: float, *inputs: Tensor | None):
        ctx.of = readout, targets, tile_rows, bound
        found = [torch.zeros(0, device=targets.device)], [torch.zeros(0, dtype=torch.bool, device=targets.device)]
        for rows in stretches_of(len(targets), tile_rows):
            tile = readout.tile(rows)
            own = tile.gather(0, targets[None, rows])[0].clamp(-bound, bound)
            found[0].append(own - column_logsumexp(tile, bound=bound))
            found[1].append(finite_columns(tile))
        log_probs, finite = map(torch.cat, found)
        ctx.mark_non_differentiable(finite)
        return log_probs, finite

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        readout, targets, tile_rows, bound = ctx.of
        gradients = Gradients(readout, ctx.needs_input_grad[4:])
        for rows in stretches_of(len(targets), tile_rows):
            tile = readout.tile(rows)
            chain = readout.logit_transform_grad(tile, bound)
            exp_(tile.sub_(column_logsumexp(tile.clamp_(-bound, bound)))).mul_(-grad[rows])
            tile.scatter_add_(0, targets[None, rows], grad[None, rows])
            gradients.add_(rows, tile if chain is None else tile.mul_(chain))
        return None, None, None, None, *gradients.times(torch.ones((), device=grad.device))
