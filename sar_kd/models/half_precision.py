"""Keep a model's activations in range while its matrix products are computed in float16.

Half ends at 65,504, and models trained in bfloat16 pass it: in the residual stream (Gemma 3 270M: 103,792), in the
product of gate and up projection, in attention scores. Here matrix products stay half, and what may grow is float32:
the residual stream, because it begins so; a product of two half tensors; and where such values enter a matrix product
again, each row is divided by a power of two, and the result, float32, multiplied by it. Where nothing grows that power
is 1, and the values are those of plain autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sar_kd.runtime.precision import computes_in_float16, without_autocast

_LARGEST_ROW = 128.0
"""L2 norm above which a row is scaled; its product with any column of norm below 511 is then within half's range"""


class RangeReport(NamedTuple):
    """What `compute_in_range_` does to a model."""

    family: str
    """The model type that its config states"""
    num_modules: int
    """Modules inside which products are formed in float32"""
    has_eager_attention: bool
    """The scores are formed in float32 here; a fused kernel does so by itself"""


def compute_in_range_(model: Any) -> None:
    """Prepare a model for float16 autocast; without autocast it computes as before. A second call changes nothing."""
    for module in _matrix_holders(model):
        _run_once_(module, _run_in_range)
    for module in model.modules():
        if hasattr(module, "is_causal"):  # attention with a fused kernel; with an eager one it holds matrices
            _run_once_(module, _run_fused_attention)
    _hook_once(model.get_input_embeddings(), _begin_in_float32)
    attention = [module for module in model.modules() if hasattr(module, "is_causal")]
    queries_and_keys = {norm for module in attention for norm in module.modules()}
    for module in model.modules():
        if "Norm" in type(module).__name__:
            _widen_(module)  # with half weights some cast the residual stream to half, and others refuse it
            _hook_once(module, _mark_normalised)
            if module not in queries_and_keys and _take_float32 not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_take_float32)  # a norm returns the dtype that it gets


def range_report(model: Any) -> RangeReport:
    """What `compute_in_range_` does to this model, which may be on the meta device."""
    config = model.config.get_text_config()
    return RangeReport(config.model_type, len(_matrix_holders(model)), _has_eager_attention(model))


def _matrix_holders(model: Any) -> list[nn.Module]:
    """The modules that are run with `_ProductsInRange`: a structural rule, not a list of classes.

    All that hold linear layers or stacked experts themselves, but for attention with a fused kernel, and for the whole
    model around the LM head, whose input is normalised.
    """
    is_eager, lm_head = _has_eager_attention(model), model.get_output_embeddings()
    holders = (module for module in model.modules() if _holds_matrices(module, lm_head))
    return [module for module in holders if is_eager or not hasattr(module, "is_causal")]


def _has_eager_attention(model: Any) -> bool:
    return getattr(model.config.get_text_config(), "_attn_implementation", None) == "eager"


def _holds_matrices(module: nn.Module, lm_head: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.modules.conv._ConvNd)) or hasattr(module, "base_layer"):
        return False  # a list; or the parts of an adapted layer, which is one layer of the module that holds it
    lists = (child for child in module.children() if isinstance(child, nn.ModuleList))
    children = [*module.children(), *(child for children in lists for child in children)]
    layers = (getattr(child, "base_layer", child) for child in children if child is not lm_head)
    has_linear = any(isinstance(layer, nn.Linear) for layer in layers)
    return has_linear or any(parameter.ndim > 2 for parameter in module.parameters(recurse=False))


def _widen_(norm: nn.Module) -> None:
    """Make its weights float32; by new ones, as those of a fake model cannot be changed."""
    for module in norm.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dtype is torch.float16:
                setattr(module, name, nn.Parameter(weight.detach().float(), requires_grad=weight.requires_grad))


def _run_once_(module: nn.Module, run: Callable) -> None:
    if not getattr(module, "_products_in_range", False):
        module._products_in_range = True  # type: ignore[assignment]
        module.forward = functools.partial(run, module.forward)


def _hook_once(module: nn.Module, hook: Callable) -> None:
    if hook not in module._forward_hooks.values():
        module.register_forward_hook(hook)


def _begin_in_float32(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float() if computes_in_float16(output) else output


def _take_float32(module: nn.Module, args: tuple) -> tuple:
    is_half = bool(args) and _is_half(args[0]) and computes_in_float16(args[0])
    return (args[0].float(), *args[1:]) if is_half else args


def _mark_normalised(module: nn.Module, args: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        output.is_normalised = True  # type: ignore[attr-defined]


def _run_in_range(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    with _ProductsInRange(_RULES):
        return forward(*args, **kwargs)


def _run_fused_attention(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    states = args[0] if args else kwargs.get("hidden_states")
    if not (isinstance(states, Tensor) and _may_exceed_half(states)):
        return forward(*args, **kwargs)
    with _ProductsInRange(_FUSED_ATTENTION_RULES):
        return forward(*args, **kwargs)


class _ProductsInRange(TorchFunctionMode):
    """While float16 autocast is on: products of half tensors are float32, matrix products take any float32 value."""

    def __init__(self, rules: dict):
        super().__init__()
        self._rules = rules

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rule = self._rules.get(getattr(func, "_qualified_op_name", func))
        if rule is None or not (args and isinstance(args[0], Tensor) and computes_in_float16(args[0])):
            return func(*args, **(kwargs or {}))
        return rule(func, *args, **(kwargs or {}))


def _multiply(func: Callable, a: Any, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs or not (_is_half(a) and _is_half(*args)):
        return func(a, *args, **kwargs)
    (b,) = args
    return _Product.apply(a, b) if a.shape == b.shape else func(a.float(), b.float())


def _square(func: Callable, a: Tensor) -> Tensor:
    return _Product.apply(a, a) if _is_half(a) else func(a)


def _keep_float32(func: Callable, a: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Leave out a cast to half of what may exceed it."""
    if not _may_exceed_half(a):
        return func(a, *args, **kwargs)
    if args and _is_half(args[0]):
        return a
    args = tuple(torch.float32 if arg is torch.float16 else arg for arg in args)
    return func(a, *args, **{name: torch.float32 if arg is torch.float16 else arg for name, arg in kwargs.items()})


def _linear(func: Callable, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _may_exceed_half(states):
        return func(states, weight, bias)
    rows, scale = _Scaled.apply(states, -1)
    out = func(rows, weight) * scale
    return out if bias is None else out + bias


def _grouped(func: Callable, states: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not (_may_exceed_half(states) and _is_half(weight)):  # no autocast here: float32 weights are multiplied as such
        return func(states, weight, *args, **kwargs)
    rows, scale = _Scaled.apply(states, -1)
    return func(rows, weight, *args, **kwargs) * scale


def _matmul(func: Callable, a: Tensor, b: Tensor) -> Tensor:
    if min(a.ndim, b.ndim) > 3:  # activations on both sides; a softmax of half scores would see their rounding alone
        with without_autocast(a):
            return func(a.float(), b.float())
    scales = []
    if _may_exceed_half(a):
        a, scale = _Scaled.apply(a, -1)
        scales.append(scale)
    if _may_exceed_half(b) and b.ndim > 2:
        b, scale = _Scaled.apply(b, -2)
        scales.append(scale)
    return functools.reduce(torch.mul, scales, func(a, b))


def _attention(func: Callable, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In float32, as its values come from a residual stream without a norm."""
    with without_autocast(value):
        kwargs = {name: arg.float() if _is_half(arg) else arg for name, arg in kwargs.items()}
        return func(query.float(), key.float(), value.float(), *args, **kwargs)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float16


def _may_exceed_half(tensor: Tensor) -> bool:
    return (
        tensor.dtype is torch.float32 and not isinstance(tensor, nn.Parameter) and not hasattr(tensor, "is_normalised")
    )


class _Product(torch.autograd.Function):
    """The product of two half tensors in float32, which keeps no float32 copy of them for backward."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a.float().mul_(b)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return (grad * b).to(a.dtype), (grad * a).to(b.dtype)


class _Scaled(torch.autograd.Function):
    """x / s in half, and s in float32: for each row the lowest power of two, from 1 on, that keeps it in range."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        scale = torch.exp2(torch.frexp(norm / _LARGEST_ROW).exponent.clamp_(min=0))
        ctx.save_for_backward(scale)
        ctx.mark_non_differentiable(scale)
        return torch.div(x, scale, out=torch.empty_like(x, dtype=torch.float16)), scale

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad / scale, None


_RULES: dict[Any, Callable] = {
    torch.mul: _multiply,
    torch.multiply: _multiply,
    torch.Tensor.mul: _multiply,
    torch.square: _square,
    torch.Tensor.square: _square,
    torch.Tensor.to: _keep_float32,
    torch.Tensor.type_as: _keep_float32,
    functional.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.bmm: _matmul,
    torch._grouped_mm: _grouped,
    "transformers::grouped_mm_fallback": _grouped,  # registered when it is first used
}

_FUSED_ATTENTION_RULES: dict[Any, Callable] = {
    functional.linear: _linear,
    functional.scaled_dot_product_attention: _attention,
}
"""Of attention whose input no norm precedes; a fused kernel forms the scores in float32 by itself"""
