"""Checks of a loaded model: it has an LM head, it is causal, its weights are finite, its end tokens are ids of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.errors import UsageError
from sar_kd.models.lm_head import in_eval_mode
from sar_kd.models.placement import weights_of
from sar_kd.runtime.precision import MASKED_BELOW, Precision


def vocab_size_of(model: Any) -> int:
    """V of the logits, the rows of the LM head's weight; may exceed the tokenizer's size."""
    return model.get_output_embeddings().weight.shape[0]


def stop_ids_of(title: str, model: Any) -> tuple[int, ...]:
    """The end-of-text ids that the generation config adds to the tokenizer's own.

    Raises: UsageError if one is no id of the model; title: what the error begins with
    """
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stop_ids = tuple(ids) if isinstance(ids, list) else (() if ids is None else (ids,))
    vocab_size = vocab_size_of(model)
    for stop_id in stop_ids:
        if not isinstance(stop_id, int) or not 0 <= stop_id < vocab_size:
            raise UsageError(
                f"{title}: eos_token_id {stop_id!r} in generation_config.json, or config.json, is no id of the model, "
                f"which has {vocab_size:,}"
            )
    return stop_ids


def require_lm_head(title: str, model: Any) -> None:
    """Raise UsageError if the model, which may be on the meta device, has no LM head or is built to read both ways."""
    kind = type(model).__name__
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise UsageError(f"{title}: {kind} has no language-model head; use a causal language model")
    # BERT and its kin are causal where their config says is_decoder; their attention modules know it.
    causal = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if causal and not any(causal):
        raise _not_causal(title, kind)


@torch.no_grad()
def require_causal(title: str, model: Any, precision: Precision) -> None:
    """Raise UsageError if the logits of a position change with a later token.

    Two texts of 16 tokens that differ in the last 8 are run as one batch, as the first 8 positions have to be equal.
    """
    weight = model.get_input_embeddings().weight
    ids = torch.arange(16).repeat(2, 1)
    ids[1, 8:] += 8
    used = precision.on(weight.device)
    with in_eval_mode(model), contextlib.nullcontext() if weight.dtype is torch.float32 else used.autocast():
        out = model(input_ids=(ids % weight.shape[0]).to(weight.device), use_cache=False)
    first, second = out.logits[:, :8].float()
    if _differ(first, second, weight.dtype):
        raise _not_causal(title, type(model).__name__)


def _differ(first: Tensor, second: Tensor, dtype: torch.dtype) -> bool:
    """By more than rounding. Not where they are not finite, which other checks find; a token that is masked in both by
    -inf is equal.
    """
    is_masked = (first < MASKED_BELOW) & (second < MASKED_BELOW)
    first, second = (logits.masked_fill(is_masked, 0.0) for logits in (first, second))
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    difference, size = (first - second).abs().amax(), first.abs().amax()
    return bool(difference > tolerance * size)


def _not_causal(title: str, kind: str) -> UsageError:
    return UsageError(
        f"{title}: {kind} is not causal, its logits depend on tokens that come later; use a causal language model"
    )


def require_trainable(title: str, student: nn.Module) -> None:
    """Raise UsageError if every weight of the student, which may be one that was in memory, is frozen."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UsageError(f"{title}: all of its weights are frozen; call its requires_grad_(True) first")


def learn_pad_row_(title: str, student: Any, special_ids: Collection[int], precision: Precision) -> list[str]:
    """Let the embedding of the pad token learn, which is the end token in many models; the line about a row of zeros.

    `nn.Embedding` gives the row of its `padding_idx` no gradient. A batch's padding is read by no target, so it gives
    none either. A fresh model has zeros there: a norm multiplies their gradient by eps^-0.5, a thousand for 1e-6, in
    each layer.

    special_ids: the start and end tokens, which stand in the text
    """
    embedding = student.get_input_embeddings()
    pad_id = getattr(embedding, "padding_idx", None)
    if pad_id is not None:
        embedding.padding_idx = None
    if precision.dtype is not torch.float16 or pad_id not in special_ids or embedding.weight[pad_id].any():
        return []
    return [
        f"{title}: the embedding of token {pad_id}, which begins or ends a text, is all 0, as in a fresh model whose "
        "pad_token_id it is; its gradient can exceed float16: give it small random values"
    ]


def lm_head_bias_name(model: Any) -> str:
    """The name of the LM head's bias, '' without one."""
    bias = getattr(model.get_output_embeddings(), "bias", None)
    return next((name for name, values in model.named_parameters() if values is bias), "")


def is_finite_weight(values: Tensor, is_lm_head_bias: bool) -> bool:
    """Are all values of a weight finite? -inf in the LM head's bias masks a token."""
    return bool((values < math.inf).all() if is_lm_head_bias else values.isfinite().all())


def require_finite(title: str, model: nn.Module, dtype: torch.dtype) -> None:
    """Raise UsageError if a weight is not finite in the dtype that it was loaded in."""
    bias_name = lm_head_bias_name(model)
    for name, values in weights_of(model):
        if values.is_meta or values.is_inference():
            how = "on the meta device, without values" if values.is_meta else "made in torch.inference_mode()"
            raise UsageError(f"{title}: its weight {name} is {how}; load the model without that")
        if is_finite_weight(values, name == bias_name):
            continue
        if dtype is torch.float16 and not values.isnan().any():
            reason = "is beyond the range of float16; use --model_dtype float32"
        else:
            count = int((~values.isfinite()).sum())
            reason = f"holds {count:,} values that are not finite: its file is damaged; fetch it again"
        raise UsageError(f"{title}: its weight {name} {reason}")


def require_context(student: Any, block_size: int) -> None:
    """Raise UsageError if the student's context is shorter than a block."""
    context = context_length_of(student)
    if context and context < block_size:
        raise UsageError(f"--block_size {block_size}: the student takes {context} tokens at most; lower it")


def context_length_of(model: Any) -> int | None:
    """Most tokens of one input; None if the model states none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
