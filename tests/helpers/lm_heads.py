"""Losses of plain logits, for tests that have no model."""

import torch
from torch import Tensor

from sar_kd.losses.functional import NO_CLAMP, LogitClamp
from sar_kd.losses.tiled_loss import Loss, Tile, tiled_loss
from sar_kd.models.lm_head import LazyLogits
from sar_kd.runtime.precision import Precision

FLOAT32 = Precision(torch.device("cpu"), torch.float32, 1.0)


def readout_of(logits: Tensor) -> LazyLogits:
    """A model whose last hidden states are its logits already."""
    return LazyLogits(logits, None, FLOAT32)


def cross_entropy(logits: Tensor, targets: Tensor, clamp: LogitClamp = NO_CLAMP) -> tuple[Tensor, Tensor]:
    """The sum under the clamp, with a gradient, and the sum as it is."""
    tiles = [Tile(slice(None))]
    sums = tiled_loss(Loss(tiles, targets, None, 1.0, 0.0, clamp), readout_of(logits), None)
    return sums.minimised, sums.raw_ce
