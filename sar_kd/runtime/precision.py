"""Device, compute dtype, autocast, loss scaling and random number generators of a run.

Trainable weights are always float32, so float16 and bfloat16 are compute dtypes only and a GradScaler is valid.
"""

from __future__ import annotations

import contextlib
import random

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sar_kd.config.sections import MAX_LOSS_SCALE, MIN_LOSS_SCALE, DeviceConfig, PrecisionConfig
from sar_kd.errors import UsageError
from sar_kd.runtime.distributed import SINGLE_PROCESS, ProcessGroup
from sar_kd.runtime.environment import require_kernels

# The emulated ops and how many of their outputs are rounded to float16; by name, as not every PyTorch has them all.
_ROUNDED_OUTPUTS = {
    "aten::mm": 1,
    "aten::addmm": 1,
    "aten::bmm": 1,
    "aten::baddbmm": 1,
    "aten::_grouped_mm": 1,
    "transformers::grouped_mm_fallback": 1,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 1,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}


MASKED_LOGIT = -1e30
"""Logit of a masked class or token, also where a model gives -inf: finite, so that 0 * MASKED_LOGIT is 0, and so low
that its probability is exactly 0."""

MASKED_BELOW = 1e-6 * MASKED_LOGIT
"""A logit or log-probability below it is masked."""


class Float16MatmulsOnCpu(TorchDispatchMode):
    """Float16 matmuls on a CPU as a GPU computes them: float16 inputs, float32 accumulation, float16 output.

    A CPU's own float16 kernels are many times slower than its float32 ones, so each matmul (each grouped matmul of
    experts and each fused attention too) is computed in float32 and rounded to float16 once, at the end.
    That models which values overflow and underflow between two operations on a GPU. It does not model the order of a
    GPU's sums, the rounding of attention weights inside a GPU's fused kernel, or the ops that CUDA's autocast runs in
    float32 and a CPU's in float16 (softmax, layer_norm, exp, sum): there the CPU is stricter.
    Other dtypes and devices pass through unchanged.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        num_rounded = _ROUNDED_OUTPUTS.get(func.name())
        if num_rounded is None or args[1].dtype is not torch.float16 or args[1].device.type != "cpu":
            return func(*args, **kwargs)
        kwargs = {name: _cast(arg, torch.float16, torch.float32) for name, arg in kwargs.items()}  # an attention mask
        out = func(*(_cast(arg, torch.float16, torch.float32) for arg in args), **kwargs)
        if isinstance(out, Tensor):
            return out.half()
        # The other outputs are statistics, which a GPU keeps in float32 too.
        return (*(_cast(part, torch.float32, torch.float16) for part in out[:num_rounded]), *out[num_rounded:])


def _cast(value, source: torch.dtype, target: torch.dtype):
    return value.to(target) if isinstance(value, Tensor) and value.dtype is source else value


def computes_in_float16(tensor: Tensor) -> bool:
    """Float16 autocast is on where this tensor is."""
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Operations inside have the dtype of their inputs, where this tensor is."""
    return torch.amp.autocast(tensor.device.type, enabled=False)


def same_device(a: torch.device, b: torch.device) -> bool:
    """Are they one device? cuda is cuda:0."""
    return a.type == b.type and (a.index or 0) == (b.index or 0)


class Precision:
    """The device, the compute dtype and the loss scale of a run."""

    def __init__(self, device: torch.device, dtype: torch.dtype, init_loss_scale: float):
        self.device = device
        self.dtype = dtype
        is_float16 = dtype is torch.float16
        self.emulates_float16 = is_float16 and device.type == "cpu"
        self._scaler = torch.amp.GradScaler(device.type, init_scale=init_loss_scale, enabled=is_float16)
        self._one = torch.ones((), device=device)
        self._scaler.scale(self._one)  # its first use creates its tensors, and a first step may have no target
        self._elsewhere: dict[torch.device, Precision] = {}

    @contextlib.contextmanager
    def autocast(self):
        """Compute in the run's dtype. Wraps the forward; where float16 matmuls are emulated the backward too."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.matmul_context())
            stack.enter_context(
                torch.amp.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)
            )
            yield

    def on(self, device: torch.device) -> Precision:
        """The same dtype where a model computes on another device; itself on its own."""
        if same_device(device, self.device):
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Precision(device, self.dtype, 1.0)
        return self._elsewhere[device]

    def as_float32(self) -> Precision:
        """The same device in float32: no autocast, no loss scale."""
        return self if self.dtype is torch.float32 else Precision(self.device, torch.float32, 1.0)

    def matmul_context(self) -> contextlib.AbstractContextManager:
        """Emulates a GPU's float16 matmuls where this device is a CPU; does nothing elsewhere."""
        return Float16MatmulsOnCpu() if self.emulates_float16 else contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss` times the loss scale."""
        with self.matmul_context():
            self._scaler.scale(loss).backward()

    def fork_rng(self) -> contextlib.AbstractContextManager:
        """Random numbers drawn inside do not change those that are drawn after it."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the loss scale, once per step."""
        self._scaler.unscale_(optimizer)

    @property
    def loss_scale(self) -> Tensor:
        """The current loss scale, a scalar on the device (no host sync); 1 without a scaler."""
        return self._scaler.scale(self._one)

    def update_(self, cause: str | None, loss_scale: float) -> None:
        """Adapt the loss scale after a step, between `MIN_LOSS_SCALE` and `MAX_LOSS_SCALE`.

        cause: why the step was skipped, None where it was applied
        loss_scale: the one that the step used, as read with the step's other metrics (no host read here)
        """
        if not self._scaler.is_enabled():
            return
        halves = cause in ("overflow", "gradient")
        at_floor = halves and loss_scale * self._scaler.get_backoff_factor() < MIN_LOSS_SCALE
        at_ceiling = not halves and loss_scale >= MAX_LOSS_SCALE
        # A forward that is not finite does not depend on the scale: a lower one would only hide the cause.
        keeps = cause in ("forward", "teacher", "no_targets")
        fixed = MIN_LOSS_SCALE if at_floor else loss_scale if keeps or at_ceiling else None
        self._scaler.update(fixed)
        if cause == "overflow" and self._scaler.get_scale() >= loss_scale:  # a host read, only after an overflow
            # The norm is not finite and no gradient that the scaler has seen is: the routers', or a sum that overflows.
            self._scaler.update(max(MIN_LOSS_SCALE, loss_scale * self._scaler.get_backoff_factor()))

    def state_dict(self) -> dict:
        return {"scaler": self._scaler.state_dict(), "rng": _rng_state(self.device)}

    def load_state_dict(self, state: dict) -> None:
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        _set_rng_state(state["rng"], self.device)


def setup_precision(config: DeviceConfig, seed: int, process_group: ProcessGroup = SINGLE_PROCESS) -> Precision:
    """Choose device and dtype, and seed all random number generators, each rank with its own seed.

    Raises: UsageError if the device is not there, or cannot compute in the dtype asked for
    """
    seed = process_group.seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    init_loss_scale = config.init_loss_scale if isinstance(config, PrecisionConfig) else 1.0  # without, nothing trains
    return Precision(*choose_device(config, process_group)[:2], init_loss_scale)


def choose_device(
    config: DeviceConfig, process_group: ProcessGroup = SINGLE_PROCESS
) -> tuple[torch.device, torch.dtype, str]:
    """The device, the compute dtype, and the reason for it. Runs one kernel where the device is a GPU.

    Raises: UsageError as `setup_precision`
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
    # Ampere is the first generation with bfloat16 units; older GPUs emulate it, slowly.
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        name = "bfloat16" if has_bfloat16 else "float16" if device.type == "cuda" else "float32"
    if name == "bfloat16" and device.type == "cuda" and not has_bfloat16:
        name = torch.cuda.get_device_name(device)
        raise UsageError(f"--model_dtype bfloat16: {name} has no bfloat16 units; use --model_dtype float16")
    return getattr(torch, name)


def _rng_state(device: torch.device) -> dict:
    state = {"torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_rng_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
