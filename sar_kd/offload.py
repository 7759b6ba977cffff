"""A teacher that lies in the CPU's memory while the student learns.

It never leaves between a forward and its backward: it has no backward. It reads all of a step's text in one visit,
and what the student is compared with afterwards is its last hidden states, which are small, and its head, which stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_CPU = torch.device("cpu")


class Offload:
    """The teacher's weights at home, and on the device while it reads. Whoever runs the teacher finds it there."""

    def __init__(self, teacher: nn.Module, body: nn.Module, device: torch.device, home: torch.device = _CPU):
        """body: what every reading of the teacher runs; device: where it reads; home: where it lies otherwise"""
        self.device, self.is_here, self.visits = device, True, 0
        self._home: dict[nn.Parameter, Tensor] = {}
        for parameter in travelling(teacher):
            at_home = parameter.detach().to(home, copy=True)
            # Out of pinned memory a GPU fetches by itself.
            self._home[parameter] = at_home.pin_memory() if device.type == "cuda" and home.type == "cpu" else at_home
        body.register_forward_pre_hook(lambda *_: self.come())

    @property
    def num_bytes(self) -> int:
        """What travels."""
        return sum(tensor.nbytes for tensor in self._home.values())

    def come(self) -> None:
        """Bring the weights onto the device, if they are not there."""
        if not self.is_here:
            for parameter, at_home in self._home.items():
                parameter.data = at_home.to(self.device, non_blocking=True, copy=True)
            self.is_here = True
            self.visits += 1

    def leave(self) -> None:
        """Give the device's memory back; the weights at home are what they were, for they do not learn."""
        for parameter, at_home in self._home.items():
            parameter.data = at_home
        self.is_here = False


def travelling(teacher: Any) -> list[nn.Parameter]:
    """The weights that come and go: all but the head's, of which the loss makes logits while the student learns.

    A head that is tied keeps the embeddings with it.
    """
    stays = {id(parameter) for parameter in teacher.get_output_embeddings().parameters()}
    return [parameter for parameter in teacher.parameters() if id(parameter) not in stays]
