"""The blocks of a model that follow one another, and how each may be computed twice instead of kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer


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
