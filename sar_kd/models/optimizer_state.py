"""What an optimizer keeps for each trained weight from one update to the next, for the memory plan and for the check of
a checkpoint.

    adamw      8 bytes a weight   two moments in float32
    adamw8bit  2 bytes a weight   two moments in 8 bits, and a scale for each 256 (bitsandbytes)
    adafactor  next to none       of a matrix [n, m] the n row means and m column means of its squared gradient

Sources: Loshchilov and Hutter, 2019 (arXiv 1711.05101); Dettmers et al., 2022 (arXiv 2110.02861); Shazeer and Stern,
2018 (arXiv 1804.04235)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by the name that the optimizer's state dict has"""

_BLOCK = 256
"""Weights that share a scale in bitsandbytes' 8-bit state"""

_FEWEST_IN_8_BITS = 4096
"""A smaller tensor has its moments in float32 there"""


def state_of(parameter: Tensor, optimizer: str) -> Shapes:
    """The tensors that an optimizer keeps for a parameter, beside the number of its steps.

    optimizer: the value of `--optimizer`
    """
    shape, size = tuple(parameter.shape), parameter.numel()
    if optimizer == "adafactor":
        if len(shape) < 2:
            return {"variance": (shape, torch.float32)}
        row, column = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
        return {"row_var": (row, torch.float32), "col_var": (column, torch.float32)}
    if optimizer == "adamw":
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), (shape, torch.float32))
    if size < _FEWEST_IN_8_BITS:
        return dict.fromkeys(("state1", "state2"), (shape, torch.float32))
    scales = ((math.ceil(size / _BLOCK),), torch.float32)
    moments: Shapes = dict.fromkeys(("state1", "state2"), (shape, torch.uint8))
    return (
        moments
        | dict.fromkeys(("absmax1", "absmax2"), scales)
        | dict.fromkeys(("qmap1", "qmap2"), ((_BLOCK,), torch.float32))
    )


def state_bytes(parameter: Tensor, optimizer: str) -> int:
    """The bytes of `state_of`."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in state_of(parameter, optimizer).values())


def update_bytes(parameters: Sequence[Tensor], optimizer: str) -> int:
    """Bytes that an update holds for a moment: float32 tensors of the size of one parameter at a time.

    Adafactor has one, the update; bitsandbytes has none on a GPU, on a CPU five: moments, gradient, root, denominator.
    """
    copies = {"adafactor": 1, "adamw8bit": 5 if any(p.device.type == "cpu" for p in parameters) else 0}
    return 4 * copies.get(optimizer, 0) * max((parameter.numel() for parameter in parameters), default=0)
