"""The optimizer, and a learning rate that is a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from sar_kd.config.sections import OptimConfig
from sar_kd.errors import UsageError

_FINAL_LR_RATIO = 0.1

_BETAS = 0.9, 0.95

_NOT_RUN = (RuntimeError, NotImplementedError, AttributeError, OSError)
"""What bitsandbytes may raise where it has no kernel for a device"""


def build_optimizer(
    student: nn.Module, config: OptimConfig, others: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The one that `--optimizer` names, over the student's trainable parameters and `others`; decay on matrices, none
    on norms and biases.

    Raises: UsageError if bitsandbytes is missing, or cannot run on this device
    """
    trainable = [parameter for parameter in (*student.parameters(), *others) if parameter.requires_grad]
    assert all(parameter.dtype is torch.float32 for parameter in trainable), "trainable weights are float32, always"
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.student_lr)
    if config.optimizer == "adamw8bit":
        return _adamw_8bit(groups, config.student_lr)
    return torch.optim.AdamW(groups, lr=config.student_lr, betas=_BETAS, fused=True)


def _adamw_8bit(groups: list[dict], learning_rate: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW, after a step of it on a tensor that no run has."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UsageError("--optimizer adamw8bit: needs `pip install bitsandbytes`") from None
    device = next(parameter.device for group in groups for parameter in group["params"])
    probe = nn.Parameter(torch.zeros(64, 64, device=device))
    probe.grad = torch.zeros_like(probe)
    try:
        AdamW8bit([probe]).step()
    except _NOT_RUN as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"--optimizer adamw8bit: this bitsandbytes cannot run on {device.type} ({reason}); use adamw or adafactor"
        ) from None
    return AdamW8bit(groups, lr=learning_rate, betas=_BETAS)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Every parameter of the optimizer: the gradient norm is taken over these, and over nothing else."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def learning_rate_at(step: int, train_steps: int, config: OptimConfig, peak: float) -> float:
    """The learning rate of attempt `step`, counted from 0.

    peak * min(1, (step + 1) / warmup) * (0.1 + 0.9 * (1 + cos(pi * progress)) / 2), the last factor 1 if constant
    """
    warmup = min(config.warmup_steps, train_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, train_steps - warmup)
    return peak * (_FINAL_LR_RATIO + (1 - _FINAL_LR_RATIO) * (1 + math.cos(math.pi * progress)) / 2)


def set_learning_rate_(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
