"""The student without its adapter, as a teacher: no second copy of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from sar_kd.models.lm_head import backbone_of, in_eval_mode


class WithoutAdapter(nn.Module):
    """A student whose forwards run in eval mode and without its adapter; nothing of the student is changed by them.

    Its modules and weights are the student's, so neither is frozen, moved or put into another mode through it.
    """

    def __init__(self, student: Any):
        super().__init__()
        self.student = student
        self.base_model = _Part(student, backbone_of(student))
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with adapter_off(self.student):
            return self.student.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate` of the model without its adapter."""
        with adapter_off(self.student):
            return self.student.get_base_model().generate(*args, **kwargs)

    def train(self, mode: bool = True) -> WithoutAdapter:
        """Nothing: the mode is the student's own, and eval in every forward from here."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> WithoutAdapter:
        """Nothing: what is trained is the student's own."""
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            student: Any = super().__getattr__("student")
            return getattr(student.get_base_model(), name)


class _Part(nn.Module):
    """A part of a student, likewise."""

    def __init__(self, student: Any, part: nn.Module):
        super().__init__()
        self.student, self.part = student, part
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with adapter_off(self.student):
            return self.part(*args, **kwargs)


@contextlib.contextmanager
def adapter_off(student: nn.Module) -> Iterator[None]:
    """Run a student in eval mode and without its adapter.

    Not through peft's own switch, which also sets whether the adapter is trained, while a graph through it may exist.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(module, module._disable_adapters) for module in student.modules() if isinstance(module, BaseTunerLayer)]
    with in_eval_mode(student):
        for layer, _ in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, was_off in layers:
                layer._disable_adapters = was_off
