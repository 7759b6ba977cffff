"""Losses of dense logits, for tests that have no model."""

import torch
from torch import Tensor

from sar_kd.losses.functional import LogitClamp
from sar_kd.losses.tiled_loss import Tile, TiledLossSpec, tiled_loss
from sar_kd.models.lm_head import LazyLogits
from sar_kd.runtime.precision import Precision

FLOAT32 = Precision(torch.device("cpu"), torch.float32, 1.0)
NO_CLAMP = LogitClamp()


def lazy_logits(logits: Tensor) -> LazyLogits:
    """A model whose last hidden states are its logits."""
    return LazyLogits(logits, None, FLOAT32)


def cross_entropy(logits: Tensor, targets: Tensor, clamp: LogitClamp = NO_CLAMP) -> tuple[Tensor, Tensor]:
    """The clamped sum, with a gradient, and the unclamped sum."""
    tiles = [Tile(slice(None), slice(0), None, None)]
    sums = tiled_loss(TiledLossSpec(tiles, targets, None, 1.0, 0.0, clamp), lazy_logits(logits), None)
    return sums.total, sums.unclamped_ce
