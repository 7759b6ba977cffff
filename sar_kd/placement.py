"""Where the student lies, as the step and the files see it: whole on one device; `several_devices` has the other ways.

A forward and the loss made of it run inside `Placement.forward`, whatever they call in there, and nothing else knows of
a wrapper: the student stays the model that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from sar_kd.data import Batch
from sar_kd.lora import load_learned
from sar_kd.world import ALONE


class Placement:
    """The student whole on one device, and no other process: nothing to do."""

    world = ALONE
    is_sharded = False

    def __init__(self, *lines: str):
        """lines: what to say at the start"""
        self.lines = lines

    def takes_part(self, batch: Batch) -> bool:
        """Is this micro-batch to be run? One without targets adds nothing."""
        return batch.num_target_tokens > 0

    def window(self, batches: list[Batch]) -> Iterator[Batch]:
        """The micro-batches of a window, each to be run forward and backward before the next is asked for. At the end
        every rank has the window's gradient.
        """
        return iter(batches)

    def forward(self, compute: Callable, batch: Batch, *args):
        """`compute(batch, *args)`: what is minimised, with its graph, and anything beside it."""
        return compute(batch, *args)

    def read(self, compute: Callable):
        """`compute()`, which runs the student outside a step and without a gradient."""
        return compute()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """L2 over all gradients, of the window of all ranks: a scalar."""
        return torch.nn.utils.get_total_norm(gradients)

    def weights(self) -> dict[str, Tensor] | None:
        """The student's weights by name, whole and on the CPU, if they are elsewhere in parts; else None."""
        return None

    def whole(self, state):
        """A nest of dicts and lists with every tensor in it whole."""
        return state

    def load_student_(self, student: nn.Module, path: Path) -> None:
        """Put the weights in a safetensors file back: all of them, or those that learn."""
        load_learned(student, path)

    def load_optimizer_(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Put back what `whole` made of its state."""
        optimizer.load_state_dict(state)

    def like(self, state, model):
        """What `whole` made whole, in parts again where `model`, a nest of the same form, has parts."""
        return state


WHOLE = Placement()
