"""Where a run computes and in which dtype: device, autocast, loss scaling, random numbers.

Weights that receive updates are float32 always, so float16 and bfloat16 are compute dtypes and the GradScaler
is valid by construction.
"""

from __future__ import annotations

import contextlib
import random
import sys

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sar_kd.config.sections import MAX_LOSS_SCALE, MIN_LOSS_SCALE, PrecisionConfig
from sar_kd.errors import UsageError
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.environment import require_kernels

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# The ops that are rounded once, and how many of each one's outputs are; by name, as not every PyTorch has them all.
_ROUNDED = {
    "aten::mm": 1,
    "aten::addmm": 1,
    "aten::bmm": 1,
    "aten::baddbmm": 1,
    "aten::_grouped_mm": 1,
    "transformers::grouped_mm_fallback": 1,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 1,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}


class HalfProductsOnCpu(TorchDispatchMode):
    """Float16 matrix products on a CPU as a GPU does them: half inputs, float32 accumulation, half output.

    A CPU's own half kernels run many times slower than its float32 ones, so each product (and each grouped
    product of experts, and each fused attention) is computed in float32 and rounded to half once, at the end.
    That models what overflows and what underflows between two operations on a GPU. It does not model the order
    of a GPU's sums, the rounding of attention weights inside a GPU's fused kernel, or the ops that CUDA's
    autocast runs in float32 and a CPU's in half (softmax, layer_norm, exp, sum): there a CPU is the stricter.
    Other dtypes and devices pass through untouched.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = _ROUNDED.get(func.name())
        if values is None or args[1].dtype is not torch.float16 or args[1].device.type != "cpu":
            return func(*args, **kwargs)
        kwargs = {name: _cast(arg, torch.float16, torch.float32) for name, arg in kwargs.items()}  # a mask, for one
        wide = func(*(_cast(arg, torch.float16, torch.float32) for arg in args), **kwargs)
        if isinstance(wide, Tensor):
            return wide.half()
        # The other outputs are statistics, which a GPU keeps in float32 too.
        return tuple(_cast(out, torch.float32, torch.float16) for out in wide[:values]) + tuple(wide[values:])


def _cast(value, source: torch.dtype, target: torch.dtype):
    return value.to(target) if isinstance(value, Tensor) and value.dtype is source else value


class Precision:
    """The device, the compute dtype and the loss scale of a run."""

    def __init__(self, device: torch.device, dtype: torch.dtype, init_loss_scale: float):
        self.device = device
        self.dtype = dtype
        self.emulates = dtype is torch.float16 and device.type == "cpu"
        scales = dtype is torch.float16
        self._scaler = torch.amp.GradScaler(device.type, init_scale=init_loss_scale, enabled=scales)
        self._one = torch.ones((), device=device)
        self._scaler.scale(self._one)  # the scaler is made on its first use, and a first step may have no target

    @contextlib.contextmanager
    def autocast(self):
        """Compute in the run's dtype; wraps the forwards and, for a CPU's half products, the backward too."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.products())
            stack.enter_context(
                torch.amp.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)
            )
            yield

    def in_float32(self) -> Precision:
        """The same device, computing as the weights are; without a loss scale."""
        return self if self.dtype is torch.float32 else Precision(self.device, torch.float32, 1.0)

    def products(self) -> contextlib.AbstractContextManager:
        """Matrix products of operands in the run's dtype come out as on a GPU."""
        return HalfProductsOnCpu() if self.emulates else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, times the loss scale."""
        with self.products():
            self._scaler.scale(loss).backward()

    @contextlib.contextmanager
    def same_random(self):
        """Leave the random numbers that follow as if what happens inside had drawn none."""
        state = _random_state(self.device)
        yield
        _set_random_state(state, self.device)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the loss scale, once per step."""
        self._scaler.unscale_(optimizer)

    @property
    def loss_scale(self) -> Tensor:
        """The current factor as a scalar on the device (no host sync); 1 without a scaler."""
        return self._scaler.scale(self._one)

    def update_(self, cause: str | None, loss_scale: float) -> None:
        """Adapt the loss scale to a judged step, within its floor and ceiling.

        cause: why the step was skipped, None where it was applied
        loss_scale: the factor that the step used, as read with the step's other figures
        """
        if not self._scaler.is_enabled():
            return
        halves = cause in ("overflow", "gradient")
        at_floor = halves and loss_scale * self._scaler.get_backoff_factor() < MIN_LOSS_SCALE
        at_ceiling = not halves and loss_scale >= MAX_LOSS_SCALE
        # A forward that is not finite says nothing about the scale: lowering it would only hide the cause.
        keeps = cause in ("forward", "no_targets")
        fixed = MIN_LOSS_SCALE if at_floor else loss_scale if keeps or at_ceiling else None
        self._scaler.update(fixed)

    def state_dict(self) -> dict:
        return {"scaler": self._scaler.state_dict(), "rng": _random_state(self.device)}

    def load_state_dict(self, state: dict) -> None:
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        _set_random_state(state["rng"], self.device)


def setup(config: PrecisionConfig, seed: int, process_group: ProcessGroup = SINGLE_PROCESS) -> Precision:
    """Choose device and dtype, and seed every generator; of several processes each has its own.

    Raises: UsageError if the device is not there, or cannot compute in the dtype asked for
    """
    seed = process_group.seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return Precision(*choose(config, process_group)[:2], config.init_loss_scale)


def choose(
    config: PrecisionConfig, process_group: ProcessGroup = SINGLE_PROCESS
) -> tuple[torch.device, torch.dtype, str]:
    """The device, the compute dtype, and why it is that one. A GPU is tried with one kernel.

    Raises: UsageError as `setup`
    """
    device = _device(config.device, process_group)
    dtype = _dtype(config.model_dtype, device)
    if config.model_dtype != "auto":
        return device, dtype, f"--model_dtype {config.model_dtype}"
    if device.type == "cpu":
        return device, dtype, "it is no GPU" if torch.cuda.is_available() else "there is no GPU"
    units = "has" if dtype is torch.bfloat16 else "has no"
    return device, dtype, f"{torch.cuda.get_device_name(device)} {units} bfloat16 units"


def _device(name: str, process_group: ProcessGroup) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = process_group.device(torch.device(name))
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: this PyTorch sees {count} CUDA devices; use --device cpu")
        require_kernels(f"--device {name}", device)
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    # Ampere is the first generation with bf16 units; older cards emulate it, slowly.
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        name = "bfloat16" if has_bfloat16 else "float16" if device.type == "cuda" else "float32"
    if name == "bfloat16" and device.type == "cuda" and not has_bfloat16:
        card = torch.cuda.get_device_name(device)
        raise UsageError(f"--model_dtype bfloat16: {card} has no bfloat16 units; use --model_dtype float16")
    return _DTYPES[name]


def _random_state(device: torch.device) -> dict:
    state = {"torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def peak_memory(device: torch.device) -> int:
    """Peak bytes on the GPU, or of the whole process where there is none; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
