"""Where a causal language model's last hidden states become logits, found and tried, never assumed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sar_kd.precision import Precision

_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""What configurations call a factor of the logits, and to which power it acts."""


@dataclass(frozen=True)
class Head:
    """Logits from hidden states: z = cap(scale * (h W^T + b)), with cap(x) = softcap * tanh(x / softcap), if any."""

    weight: Tensor
    """float [V, D]"""
    bias: Tensor | None = None
    """float [V]"""
    scale: float = 1.0
    softcap: float = 0.0

    def detach(self) -> Head:
        """The same without a graph."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def after_product(self, products: Tensor) -> Tensor:
        """Logits from h W^T + b."""
        logits = products * self.scale if self.scale != 1.0 else products
        return self.softcap * (logits / self.softcap).tanh() if self.softcap else logits


def body_of(model: Any) -> nn.Module:
    """The model without its head, which gives hidden states."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters around a model
    return getattr(inner, "base_model", inner)


def text_config_of(model: Any) -> Any:
    """What transformers knows about a model, or about the part of it that reads text."""
    return model.config.get_text_config()


def _output_module(model: Any) -> nn.Module:
    return model.get_output_embeddings()


class _Form(NamedTuple):
    """How logits come from a head's products. See `Head`."""

    scale: float
    softcap: float

    def head(self, module: nn.Module) -> Head:
        """A module of this form, with the weights that it has now."""
        parameters = dict(module.named_parameters())
        return Head(parameters["weight"], parameters.get("bias"), self.scale, self.softcap)


class Heads:
    """The heads of models, each tried once."""

    def __init__(self, precision: Precision):
        self.precision = precision
        self._forms: WeakKeyDictionary[nn.Module, _Form | None] = WeakKeyDictionary()

    def of(self, model: nn.Module) -> Head | None:
        """The head of a model as it computes now; None if its logits come about in another way.

        The first call for a head runs the model and reads the device.
        """
        module = _output_module(model)
        if module not in self._forms:
            self._forms[module] = _find_form(model, module, self.precision)
        form = self._forms[module]
        if form is None or module._forward_hooks or module._forward_pre_hooks:  # who waits for its output is to get it
            return None
        return form.head(module)

    def assume(self, model: nn.Module) -> None:
        """Take it that the head is what the configuration says; for a model without numbers, which cannot be tried."""
        module = _output_module(model)
        self._forms[module] = _candidates(model)[0] if _may_be_plain(model, module) else None


def _may_be_plain(model: nn.Module, module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters()}
    return body_of(model) is not model and names in ({"weight"}, {"weight", "bias"})


@torch.no_grad()
def _find_form(model: nn.Module, module: nn.Module, precision: Precision) -> _Form | None:
    """The form of a head, None if it is another kind of head.

    Tried on a few tokens: what the head is given must be what the body returns, and what it makes of that, scaled and
    capped as the configuration says, must be the model's logits.
    """
    if not _may_be_plain(model, module):
        return None
    body = body_of(model)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    was_training = model.training
    model.eval()
    input_ids = torch.arange(4, device=next(module.parameters()).device)[None]
    try:
        with precision.same_random(), precision.autocast():
            logits = model(input_ids=input_ids, use_cache=False).logits
            states = getattr(body(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    finally:
        hook.remove()
        model.train(was_training)
    if len(seen) != 1 or states is None or not torch.equal(seen[0][0], states):
        return None
    products = seen[0][1]
    for form in _candidates(model):
        found = form.head(module)
        with contextlib.suppress(RuntimeError):  # another shape
            if _close(found.after_product(products), logits) and _close(_product(states, found, precision), products):
                return form
    return None


def _candidates(model: nn.Module) -> list[_Form]:
    config = text_config_of(model)
    scales = [float(value) ** power for name, power in _SCALES.items() if (value := getattr(config, name, None))]
    caps = [float(getattr(config, "final_logit_softcapping", None) or 0.0), 0.0]
    return [_Form(scale, cap) for cap in caps for scale in (*scales, 1.0)]


def _product(states: Tensor, head: Head, precision: Precision) -> Tensor:
    with precision.autocast():
        return nn.functional.linear(states, head.weight, head.bias)


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for the last bits of the dtype."""
    both = found.float(), wanted.float()
    return torch.allclose(*both, rtol=4 * torch.finfo(wanted.dtype).eps, atol=1e-6 * wanted.float().abs().max().item())
