"""The training loss in one pass over hidden states: cross-entropy and distillation, value and gradient, tile by tile.

Gradients are formed in forward, while a tile's logits are there, so that each head product is made once. They carry
the loss scale when they are rounded to half, as they would in a backward of their own; what is known only afterwards, a
clamp's factor, comes in backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sar_kd.columns import blocks_of, column_logsumexp, finite_columns
from sar_kd.losses import LogitClamp
from sar_kd.readout import Gradients, Readout, Rows


class Tile(NamedTuple):
    """Rows of both models that are compared together."""

    student: Rows
    """Rows of the student's readout"""
    teacher: Rows | None
    """Rows of the teacher's; None where nothing is distilled"""
    counts: Tensor | None
    """float32 [n]: 1 where the row's cross-entropy counts in this tile, else 0; None if it does in all"""
    part: object
    """What the comparison wants to know about the rows"""


class Slopes(NamedTuple):
    """d loss / d logits of a tile [V, n], in parts that add up."""

    pieces: tuple[tuple[int, Tensor], ...]
    """The first column of each, and float32 [V', k] of the first V' rows"""
    places: Tensor | None = None
    """int64 [E]: single places in the flattened tile"""
    values: Tensor | None = None
    """float32 [E]: what these get"""

    def add_to_(self, tile: Tensor, weight: Tensor, block: slice = slice(None)) -> None:
        """Add `weight` times the pieces to a block of the tile."""
        for first, piece in self.pieces:
            part = piece[block]
            tile[block][: len(part), first : first + part.shape[1]].addcmul_(part, weight)

    def add_places_to_(self, tile: Tensor, weight: Tensor) -> None:
        """Add `weight` times what single places get."""
        if self.places is not None:
            tile.view(-1).index_add_(0, self.places, self.values * weight)


NOTHING = Slopes(())


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
    compare: Callable[[Tensor, Tensor, object, str], Compared] | None
    """compare(student tile, teacher tile, tile.part, learner); None where nothing is distilled"""
    ce_weight: float
    kd_weight: float
    clamp: LogitClamp
    ce_factor: Callable[[Tensor], Tensor] | None = None
    """From the sum of the cross-entropy under the clamp to what its gradient is multiplied by; None for 1"""
    scale: Tensor | float = 1.0
    """What the loss will be multiplied by before its backward: gradients are rounded with it"""
    learner: str = "student"


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


def tiled_loss(loss: Loss, student: Readout, teacher: Readout | None) -> Sums:
    """The sums of a batch; `minimised` has gradients for the learner's states, and for the head if it takes one."""
    learner = student if loss.learner == "student" else teacher
    head = learner.head
    inputs = learner.states, head and head.weight, head and head.bias
    return Sums(*_TiledLoss.apply(loss, student, teacher, *inputs))


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Loss, student: Readout, teacher: Readout | None, *inputs: Tensor | None):
        learner = student if loss.learner == "student" else teacher
        wanted = [needed and (loss.ce_weight > 0 or loss.compare is not None) for needed in ctx.needs_input_grad[3:]]
        gradients = Gradients(learner, wanted) if any(wanted) else None
        ctx.scale = loss.scale
        sums, ctx.gradients = _sums(loss, student, teacher, gradients), gradients
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *((None,) * 3 if gradients is None else gradients.times(grad / ctx.scale))


def _sums(loss: Loss, student: Readout, teacher: Readout | None, gradients: Gradients | None) -> Sums:
    zero = torch.zeros((), device=student.states.device)
    kd = raw_kd = dropped = zero
    bound = loss.clamp.bound if loss.clamp.style == "raw" else math.inf
    text = _Text(loss, zero) if loss.targets is not None else None
    # A clamp's factor is that of the whole sum, which has to be known before anything is learned from a part of it.
    reads_first = text is not None and len(loss.tiles) > 1 and loss.ce_factor is not None
    if reads_first:
        for number, tile in enumerate(loss.tiles):
            text.read(number, student.tile(tile.student))
    for number, tile in enumerate(loss.tiles if gradients or loss.compare or not reads_first else ()):
        own = student.tile(tile.student)
        others = teacher.tile(tile.teacher) if loss.compare else None
        if text and not reads_first:
            text.read(number, own)
        of_student, of_teacher = (student, tile.student, own), (teacher, tile.teacher, others)
        learner, rows, learned = of_student if loss.learner == "student" else of_teacher
        chain = _chain(learner, learned, bound) if gradients else None
        if loss.compare:
            plain = loss.compare(own.clone(), others.clone(), tile.part, None).raw if bound < math.inf else None
            _clamp_(bound, own, others)
            compared = loss.compare(own, others, tile.part, loss.learner if gradients else None)
            kd, dropped = kd + compared.loss, dropped + compared.dropped
            raw_kd = raw_kd + (compared.raw if plain is None else plain)
        else:
            _clamp_(bound, own)
        if gradients is None:
            continue
        weight = zero + loss.kd_weight * loss.scale
        slopes = compared.slopes if loss.compare else NOTHING
        if text and loss.ce_weight:
            text.become_slopes_(number, own, slopes, weight)
        else:
            slopes.add_to_(learned.zero_(), weight)
        slopes.add_places_to_(learned, weight)
        gradients.add_(rows, learned if chain is None else learned.mul_(chain))
    ce, raw_ce, nonfinite, factor = (text.ce, text.raw, text.nonfinite, text.factor) if text else (zero,) * 4
    return Sums(loss.ce_weight * factor * ce + loss.kd_weight * kd, ce, raw_ce, kd, raw_kd, nonfinite, dropped)


def _clamp_(bound: float, *tiles: Tensor) -> None:
    """Hold logits within [-bound, bound]; a column that is not finite stays so, of which a clamp would make numbers."""
    for tile in tiles if bound < math.inf else ():
        tile.masked_fill_(~finite_columns(tile), math.nan).clamp_(-bound, bound)


def _chain(readout: Readout, tile: Tensor, bound: float) -> Tensor | None:
    """What the slopes of a tile's logits are multiplied by on their way to the head's own product; None for 1."""
    chain = readout.inner_slopes(tile)
    if bound < math.inf:
        inside = tile.abs() <= bound
        return inside if chain is None else chain.mul_(inside)
    return chain


class _Text:
    """The cross-entropy of a batch's text: its sums, and what its slopes need, tile by tile."""

    def __init__(self, loss: Loss, zero: Tensor):
        self.loss, self.factor = loss, zero + 1.0
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
            tile[block].sub_(normaliser).exp_().mul_(mine)
            slopes.add_to_(tile, weight, block)
        tile.scatter_add_(0, targets[None], -mine[None])

    def _targets(self, number: int) -> Tensor:
        return self.loss.targets[self.loss.tiles[number].student]


def target_log_probs(
    readout: Readout, targets: Tensor, tile_rows: int, bound: float = math.inf
) -> tuple[Tensor, Tensor]:
    """log softmax(z_n)[y_n] of each row, of logits within [-bound, bound], and whether the row's logits are finite.

    targets: int64 [N]
    Returns: float32 [N], nats, with a gradient for states and head; bool [N]
    """
    head = readout.head
    return _TargetLogProbs.apply(
        readout, targets, tile_rows, bound, readout.states, head and head.weight, head and head.bias
    )


class _TargetLogProbs(torch.autograd.Function):
    """d log p[y] / d z[v] = [v = y] - p[v]. What comes back is another number for each row, so tiles are made again."""

    @staticmethod
    def forward(ctx, readout: Readout, targets: Tensor, tile_rows: int, bound: float, *inputs: Tensor | None):
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
            chain = _chain(readout, tile, bound)
            tile.sub_(column_logsumexp(tile.clamp_(-bound, bound))).exp_().mul_(-grad[rows])
            tile.scatter_add_(0, targets[None, rows], grad[None, rows])
            gradients.add_(rows, tile if chain is None else tile.mul_(chain))
        return None, None, None, None, *gradients.times(torch.ones((), device=grad.device))


def tile_rows(workspace_mb: int, *vocab_sizes: int) -> int:
    """How many rows a tile may have for the logits of these vocabularies to fit into the workspace; at least one."""
    return max(1, workspace_mb * 2**20 // (4 * sum(vocab_sizes)))


def stretches_of(count: int, size: int) -> list[slice]:
    """`count` rows in stretches of at most `size`."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]
