"""A model that is loaded to be cut: with the dtypes of its files, which it gets back before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sar_kd.errors import UsageError
from sar_kd.models.lm_head import in_eval_mode
from sar_kd.models.loading import load_tokenizer_of
from sar_kd.models.model_checks import (
    context_length_of,
    require_causal,
    require_finite,
    require_lm_head,
    stop_ids_of,
    vocab_size_of,
)
from sar_kd.models.model_files import ModelFiles, find_model
from sar_kd.models.pretrained import load_config, load_model
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.tokenizer_pair import TokenizerPair, UnfitTokenizer


@dataclass
class WholeModel:
    """A causal language model in float32 and eval mode, its tokenizer, and the dtypes that its files have."""

    title: str
    """The option and its value, with which an error begins"""
    files: ModelFiles
    model: Any
    tokenizer: Any
    pair: TokenizerPair
    """The tokenizer that was loaded stands for both"""
    dtypes: WeakKeyDictionary[nn.Module, dict[str, torch.dtype]]
    """By module, and name of a parameter or a buffer in it: a cut changes the names of modules"""

    def restore_dtypes_(self) -> None:
        """Give every tensor the dtype of its file again; their values are unchanged."""
        for module in self.model.modules():
            for name, tensor in _tensors(module).items():
                tensor.data = tensor.data.to(self.dtypes[module][name])

    @property
    def num_bytes(self) -> int:
        """Of the weights, in the dtypes of their files; tied weights count once."""
        own = {tensor: self.dtypes[module][name] for module in self.model.modules()
               for name, tensor in module.named_parameters(recurse=False)}  # fmt: skip
        return sum(tensor.numel() * dtype.itemsize for tensor, dtype in own.items())

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.model.parameters())


def load_whole(
    name: str, trust_remote_code: bool, precision: Precision, template_date: str = "", title: str = ""
) -> WholeModel:
    """`--model` and its tokenizer.

    template_date: as of `TokenizerPair`; title: what an error begins with, where that is not the option

    Raises: UsageError if it cannot be used, or its weights are quantized
    """
    title = title or f"--model {name}"
    files = find_model("model", name, title)
    config = load_config(files, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None and not files.gguf_file:
        raise UsageError(f"{title}: its weights are quantized; cut the model before quantization")
    stored = getattr(config, "dtype", None) or torch.float32
    model, _ = load_model(files, stored, trust_remote_code)
    require_lm_head(title, model)
    require_finite(title, model, stored)
    dtypes = WeakKeyDictionary[nn.Module, dict[str, torch.dtype]]()
    for module in model.modules():
        dtypes[module] = {key: tensor.dtype for key, tensor in _tensors(module).items()}
    model = model.float().requires_grad_(False).eval().to(precision.device)
    require_causal(title, model, precision)
    tokenizer, stop_ids = load_tokenizer_of("model", name, trust_remote_code, model), stop_ids_of(title, model)
    size = vocab_size_of(model)
    try:
        pair = TokenizerPair(
            tokenizer, tokenizer, student_vocab_size=size, teacher_vocab_size=size, projects=False,
            stop_ids=(stop_ids, stop_ids), template_date=template_date,
        )  # fmt: skip
    except UnfitTokenizer as error:
        raise UsageError(f"{title}: its tokenizer {error.reason}; use another model") from None
    return WholeModel(title, files, model, tokenizer, pair, dtypes)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the module alone."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


@torch.no_grad()
def probe_logits(model: Any, precision: Precision, tokens: Sequence[int] = ()) -> Tensor:
    """The logits of a fixed text, float32 [T, V] on the CPU: 32 tokens, or as many as the model takes.

    tokens: ids of the model that stand for its vocabulary, in the text and in the logits; none for all of them
    """
    kept = torch.tensor(tokens or range(vocab_size_of(model)))
    length = min(32, context_length_of(model) or 32)
    step = 7 + len(kept) // length  # over all of the vocabulary
    input_ids = kept[step * torch.arange(length) % len(kept)][None].to(precision.device)
    with in_eval_mode(model):
        return model(input_ids=input_ids, use_cache=False).logits[0].float().cpu()[:, kept]


def check_equal(title: str, found: Tensor, expected: Tensor) -> None:
    """Raise UsageError unless the logits of what was written are those of what was cut, up to float32's rounding."""
    size = expected[expected.isfinite()].abs().max()
    difference = (found - expected)[expected.isfinite()].abs().max()
    if not difference <= 1e-4 * size:
        raise UsageError(
            f"{title}: what its files would hold is not what was cut (logits differ by {difference:.3g} of "
            f"{size:.3g}); make another cut"
        )
