"""The blocks of a model that follow one another, and how each may be computed twice instead of kept.

A teacher that lies in the CPU's memory while the student learns.

It never leaves between a forward and its backward: it has no backward. It reads all of a step's text in one visit,
and what the student is compared with afterwards is its last hidden states, which are small, and its head, which stays.

A teacher whose linear layers take 4 bits a weight, through bitsandbytes; it does not learn, so it may be rounded.

NF4: each 64 weights share a scale, and each weight is one of 16 values, the quantiles of a normal distribution.

Source: Dettmers et al., 2023 (arXiv 2305.14314), section 3
"""

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


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that follow one another in `model`, each of which takes and returns hidden states."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_activations_(model: nn.Module, same_dropout: bool = False) -> int:
    """Let each layer of `model` compute its activations anew in backward instead of keeping them; how many do.

    Around the layers' own `forward`, so that nothing has to be in training mode: transformers' own switch does nothing
    in eval mode, and in training mode dropout and the routers' noise would come with it.
    same_dropout: draw again what the forward drew, for a model in training mode
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
def one_text_a_row() -> Iterator[None]:
    """Where tensors hold no numbers: say that no row holds several texts, as the numbers would.

    Whether one does, transformers reads from the positions; where it cannot, it makes a mask that a run does not have.
    """
    name = "find_packed_sequence_indices"
    patched = mock.patch.object(masking_utils, name, return_value=None)
    with patched if hasattr(masking_utils, name) else contextlib.nullcontext():
        yield


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


BYTES_A_WEIGHT = 0.5 + 4 / 64
"""4 bits, and a float32 for each 64 weights"""


def require_quantisation(word: str) -> None:
    """Raise UsageError where a package is missing that `--teacher_quantization WORD` needs."""
    for package in ("bitsandbytes", "accelerate") if word != "off" else ():
        if not is_installed(package):
            raise UsageError(f"--teacher_quantization {word}: needs `pip install bitsandbytes accelerate`")


def quantised(word: str, precision: Precision) -> dict[str, Any]:
    """What `from_pretrained` is told so that a model's linear layers are rounded as they are read; {} for 'off'.

    Raises: UsageError as `require_quantisation`
    """
    if word == "off":
        return {}
    require_quantisation(word)
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=word, bnb_4bit_compute_dtype=precision.dtype
    )
    return {"quantization_config": how, "device_map": {"": precision.device}}


def roundable(model: Any) -> list[nn.Linear]:
    """The layers that are rounded: all linear ones but the head. Experts that are stacked in one tensor are none."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
