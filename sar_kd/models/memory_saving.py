"""Less memory for more time: activation checkpointing, a teacher offloaded to the CPU, a 4-bit teacher."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from sar_kd.errors import UsageError
from sar_kd.runtime.environment import is_installed
from sar_kd.runtime.precision import Precision

BYTES_PER_WEIGHT = 0.5 + 4 / 64
"""Of an NF4 weight: 4 bits, and a float32 scale for each 64 weights"""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The consecutive decoder layers of `model`, each from hidden states to hidden states."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_activations_(model: nn.Module, same_dropout: bool = False) -> int:
    """Let each layer of `model` recompute its activations in backward instead of storing them; the number of layers.

    It wraps the layers' own `forward`, so no module has to be in training mode: transformers' own switch has no effect
    in eval mode, and training mode would switch on dropout and the routers' noise.
    same_dropout: repeat the forward's random draws, for a model in training mode
    """
    layers = layers_of(model)
    for layer in layers:
        if getattr(layer.forward, "func", None) is not _recomputed:  # a model may come from a former run
            layer.forward = functools.partial(_recomputed, layer.forward, same_dropout)
    return len(layers)


def _recomputed(forward, same_dropout: bool, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=same_dropout, **kwargs)


@contextlib.contextmanager
def assume_unpacked_sequences() -> Iterator[None]:
    """For fake tensors: tell transformers that no sequence of a batch holds several packed texts.

    It detects packing from the values of the position ids; without values it builds a mask that a real run has not.
    """
    name = "find_packed_sequence_indices"
    patched = mock.patch.object(masking_utils, name, return_value=None)
    with patched if hasattr(masking_utils, name) else contextlib.nullcontext():
        yield


class Offload:
    """Keeps a frozen teacher's weights on the CPU except during its forwards.

    The teacher runs on all of a step's text at once and has no backward; its last hidden states, which are small, and
    its LM head stay on the device for the loss. A forward moves the weights to the device by itself.
    """

    def __init__(self, teacher: nn.Module, backbone: nn.Module, device: torch.device):
        """backbone: a module that every forward of the teacher runs; device: where it runs"""
        self.device, self.is_on_device, self.num_transfers = device, True, 0
        self._on_cpu: dict[nn.Parameter, Tensor] = {}
        for parameter in offloaded_parameters(teacher):
            copy = parameter.detach().to("cpu", copy=True)
            # A GPU copies from pinned memory asynchronously.
            self._on_cpu[parameter] = copy.pin_memory() if device.type == "cuda" else copy
        backbone.register_forward_pre_hook(lambda *_: self.to_device_())

    def to_device_(self) -> None:
        """Copy the weights to the device, if they are not there."""
        if not self.is_on_device:
            for parameter, copy in self._on_cpu.items():
                parameter.data = copy.to(self.device, non_blocking=True, copy=True)
            self.is_on_device = True
            self.num_transfers += 1

    def to_cpu_(self) -> None:
        """Free the device's copy; frozen weights need no copy back."""
        for parameter, copy in self._on_cpu.items():
            parameter.data = copy
        self.is_on_device = False


def offloaded_parameters(teacher: Any) -> list[nn.Parameter]:
    """All parameters but the LM head's, from which the loss forms logits; a tied head keeps the embeddings too."""
    head = {id(parameter) for parameter in teacher.get_output_embeddings().parameters()}
    return [parameter for parameter in teacher.parameters() if id(parameter) not in head]


_BLOCK = 64
"""Weights that share a scale"""


def quantization_options(kind: str, precision: Precision, option: str = "teacher_quantization") -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize a model's linear layers while it loads; {} for 'off'.

    NF4 (bitsandbytes): each weight is one of 16 values, the quantiles of a normal distribution; 64 weights share a
    scale. Only for frozen weights.

    option: that asked for it
    Raises: UsageError as `require_quantization_packages`
    Source: Dettmers et al., 2023 (arXiv 2305.14314), section 3
    """
    if kind == "off":
        return {}
    require_quantization_packages(kind, option)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=precision.dtype
    )
    return {"quantization_config": config, "device_map": {"": precision.device}}


def require_quantization_packages(kind: str, option: str = "teacher_quantization") -> None:
    """Raise UsageError if a package is missing that `--OPTION KIND` needs."""
    for package in ("bitsandbytes", "accelerate") if kind != "off" else ():
        if not is_installed(package):
            raise UsageError(f"--{option} {kind}: needs `pip install bitsandbytes accelerate`")


def quantizable_layers(model: Any) -> list[nn.Linear]:
    """The layers that are quantized: linear ones but the LM head and an adapter's. Stacked experts are not linear."""
    head = model.get_output_embeddings()
    adapters = {id(layer) for name, layer in model.named_modules() if ".lora_" in name}
    layers = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return [layer for layer in layers if id(layer) not in adapters]


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a loaded model whose weights are in 4 bits, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(_weight_of(module), "quant_state")}


def prepare_quantized_(title: str, model: nn.Module) -> None:
    """Let the quantized layers compute with the weights that were loaded.

    On a CPU with bfloat16 instructions bitsandbytes would pack them anew in the first forward without gradients, with
    scales rounded to bfloat16 for the rest of the run.

    Raises: UsageError, which begins with the title, for a width whose weights bitsandbytes dequantizes wrongly on a CPU
    """
    for name, layer in quantized_layers(model).items():
        width = layer.in_features
        if _weight_of(layer).device.type == "cpu" and width % _BLOCK:  # as seen with 0.50
            raise UsageError(
                f"{title}: {name} has {width} inputs, and on a CPU bitsandbytes reads 4 bits rightly only of multiples "
                f"of {_BLOCK}; leave the quantization out"
            )
        layer.support_avx512bf16_for_cpu = False


def _weight_of(module: nn.Module) -> Any:
    return module._parameters.get("weight")


@torch.no_grad()
def dequantized_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a quantized layer as it computes: scale times one of the 16 values, [out, in]."""
    from bitsandbytes.functional import dequantize_4bit

    weight = _weight_of(layer)
    return dequantize_4bit(weight.data, weight.quant_state)
