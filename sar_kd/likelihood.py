"""How likely a model finds the text that is there, token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sar_kd.columns import column_logsumexp, finite_columns
from sar_kd.divergence import exp_
from sar_kd.readout import Gradients, Readout
from sar_kd.tiled import stretches_of


def target_log_probs(
    readout: Readout, targets: Tensor, tile_rows: int, bound: float = math.inf
) -> tuple[Tensor, Tensor]:
    """log softmax(z_n)[y_n] of each row, of logits within [-bound, bound], and whether the row's logits are finite.

    targets: int64 [N]
    Returns: float32 [N], nats, with a gradient for states and head; bool [N]
    """
    return _TargetLogProbs.apply(readout, targets, tile_rows, bound, *readout.tensors)


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
            chain = readout.inner_slopes(tile, bound)
            exp_(tile.sub_(column_logsumexp(tile.clamp_(-bound, bound)))).mul_(-grad[rows])
            tile.scatter_add_(0, targets[None, rows], grad[None, rows])
            gradients.add_(rows, tile if chain is None else tile.mul_(chain))
        return None, None, None, None, *gradients.times(torch.ones((), device=grad.device))
