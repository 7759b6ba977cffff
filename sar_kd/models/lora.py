"""Low-rank adapters (LoRA) through `peft`: each linear layer gets a small trainable addition, the rest is frozen.

    y = W x + (alpha / rank) * B A x        A [rank, in], B [out, rank] in float32; W frozen

Source: Hu et al., 2021 (arXiv 2106.09685), section 4.1
"""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from sar_kd.config.lora import ALL_LINEAR, LoraConfig
from sar_kd.errors import UsageError
from sar_kd.models.lm_head import in_eval_mode
from sar_kd.models.memory_saving import dequantized_weight, quantized_layers
from sar_kd.runtime.precision import MASKED_BELOW, Precision


def add_adapter(student: nn.Module, config: LoraConfig) -> nn.Module:
    """The student with a trainable adapter and all else frozen; unchanged if `--lora_rank` is 0.

    Raises: UsageError if `peft` is missing or finds none of the layers
    """
    if not config.lora_rank:
        return student
    if hasattr(student, "peft_config"):
        raise UsageError(
            f"--lora_rank {config.lora_rank}: the student has an adapter already; leave the option out to train that "
            "one, or give the model that its merge_and_unload() returns"
        )
    try:
        import peft
    except ImportError:
        raise UsageError(f"--lora_rank {config.lora_rank}: needs `pip install peft`") from None
    targets = ALL_LINEAR if config.lora_targets == (ALL_LINEAR,) else list(config.lora_targets)
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=_untrainable(student) if targets == ALL_LINEAR else None,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GPT-2's layers, ties and experts, all of which are handled here
            return peft.get_peft_model(student, settings, autocast_adapter_dtype=True)
    except ValueError as error:
        if "lora_dropout" in str(error):
            raise UsageError(
                f"--lora_dropout {config.lora_dropout:g}: the student's experts are stacked in one tensor, and its "
                "adapter takes no dropout; leave it out"
            ) from None
        names = " ".join(config.lora_targets)
        raise UsageError(f"--lora_targets {names}: {str(error).splitlines()[0]}") from None


def _untrainable(student: nn.Module) -> list[str] | None:
    """The layers of a state-space model whose weights are read past an adapter, so that it would not learn."""
    mixers = (module for module in student.modules() if hasattr(module, "A_log"))
    names = {name for mixer in mixers for name in ("conv1d", "dt_proj", "out_proj") if hasattr(mixer, name)}
    return sorted(names) or None


def models_to_save(student: nn.Module, precision: Precision, adapter_only: bool = False) -> dict[str, nn.Module]:
    """The models that a run saves, by folder: `student`, whole; `adapter` too, where there is one, in peft's format.

    precision: in which the student computes; adapter_only: no whole student beside its adapter
    Raises: UsageError if the merged student is not the trained one
    """
    if not hasattr(student, "peft_config"):
        return {"student": student}
    if adapter_only:
        return {"adapter": student}
    whole = merged_model(student)
    require_equal_logits(student, whole, precision)
    return {"student": whole, "adapter": student}


@torch.no_grad()
def merged_model(student: nn.Module) -> nn.Module:
    """A copy without an adapter, its product added to the weights, in float32 on the CPU.

    W + (alpha / rank) * B A, W dequantized where it is in 4 bits: as the student was trained

    Where only one of a tied LM head and embedding has an adapter, they differ in the copy, and its config says so. The
    student is unchanged: merging in place and unmerging would not restore its weights bit for bit.
    """
    base: Any = student.get_base_model()  # type: ignore[operator]  # peft's
    quantized = {f"{name}.weight": layer for name, layer in quantized_layers(base).items()}
    weights = {
        _plain(name): (dequantized_weight(quantized[name]) if name in quantized else value).cpu().float()
        for name, value in base.state_dict().items()
        if ".lora_" not in name and name.partition(".weight.")[0] + ".weight" not in quantized  # a scale, say
    }
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            # peft adapts a linear layer's weight, or, of experts stacked in one tensor, the parameter that it names.
            key = f"{_plain(name)}.{getattr(module, 'parameter_name', 'weight')}"
            for adapter in module.active_adapters:
                weights[key] = weights[key] + module.get_delta_weight(adapter).cpu().float()
    config = copy.deepcopy(base.config)
    if quantized:
        del config.quantization_config
    names = {module: _plain(name) for name, module in base.named_modules()}
    ends = base.get_output_embeddings(), base.get_input_embeddings()
    if not torch.equal(*(weights[f"{names[module]}.weight"] for module in ends)):
        untie_config_(config)
    with torch.device("meta"):
        merged = type(base)(config)
    merged.load_state_dict(weights, assign=True)
    merged.tie_weights()
    for name, buffer in base.named_buffers():  # those that are saved in no file, such as rotary frequencies
        parent, _, leaf = _plain(name).rpartition(".")
        merged.get_submodule(parent)._buffers[leaf] = buffer.cpu()
    merged.generation_config = base.generation_config
    return merged.eval()


def _plain(name: str) -> str:
    """A name in the model without an adapter."""
    return name.replace(".base_layer", "")


def untie_config_(config: Any) -> None:
    """Let a transformers config say that LM head and embeddings are two tensors."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest relative difference of logits by the dtype of the products"""


@torch.no_grad()
def require_equal_logits(student: nn.Module, whole: nn.Module, precision: Precision) -> None:
    """Raise UsageError if the logits of two models differ: the median over positions of |z - z'|, over that of |z|.

    Of the median, because in half a router may choose another expert at a position or two.
    """
    device = next(student.parameters()).device
    input_ids = torch.arange(16)[None] % student.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    with in_eval_mode(student), precision.autocast():
        trained = student(input_ids=input_ids.to(device), use_cache=False).logits[0].cpu().double()
    saved = whole(input_ids=input_ids, use_cache=False).logits[0].double()
    is_masked = (trained < MASKED_BELOW) & (saved < MASKED_BELOW)  # a token, by -inf
    trained, saved = (logits.masked_fill(is_masked, 0.0) for logits in (trained, saved))
    comparable = trained.isfinite().all(1)  # a student whose logits are not finite is saved as it is
    if not comparable.any():
        return
    difference, size = ((z[comparable].norm(dim=1).median()) for z in (saved - trained, trained))
    if not difference <= _TOLERANCE[precision.dtype] * size:
        raise UsageError(
            f"--lora_targets: the merged student's logits differ from the trained one's by {difference / size:.1%}; "
            "nothing was saved, the adapter is in the run's checkpoint; give other --lora_targets, such as all-linear"
        )


def merge_adapter(base: Any, folder: str) -> nn.Module:
    """The model with an adapter of peft's format in its weights, of any kind that peft can merge.

    Where only one of a tied LM head and embedding has an adapter, they are two tensors afterwards.
    Raises: whatever peft raises for an adapter that does not fit
    """
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(base, folder)
        head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
        if head is not None and any(hasattr(module, "base_layer") for module in (head, embeddings)):
            head = getattr(head, "base_layer", head)
            head.weight = nn.Parameter(head.weight.detach().clone())
        return adapted.merge_and_unload(safe_merge=True).requires_grad_(True)


def save_trainable(student: nn.Module, path: Path) -> None:
    """Write the trainable weights: all of a student, or its adapter."""
    if all(parameter.requires_grad for parameter in student.parameters()):
        safetensors.torch.save_model(student, str(path))
    else:
        weights = {name: value.detach().contiguous() for name, value in _trainable(student).items()}
        safetensors.torch.save_file(weights, str(path))


@torch.no_grad()
def load_trainable(student: nn.Module, path: Path) -> None:
    """Load the weights that `save_trainable` wrote.

    Raises: ValueError or RuntimeError if the file holds other weights
    """
    if all(parameter.requires_grad for parameter in student.parameters()):
        safetensors.torch.load_model(student, str(path))
        return
    saved, trainable = safetensors.torch.load_file(str(path)), _trainable(student)
    if saved.keys() != trainable.keys():
        raise ValueError("it holds another adapter")
    for name, value in trainable.items():
        value.copy_(saved[name])


def _trainable(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in student.named_parameters() if value.requires_grad}


def describe_trainable(student: nn.Module) -> str:
    """A line that counts the student's trainable parameters."""
    trainable = sum(value.numel() for value in _trainable(student).values())
    total, frozen = 0, set()
    for value in student.parameters():
        state = getattr(value, "quant_state", None)  # two weights are in a byte
        total += value.numel() if state is None else math.prod(state.shape)
        if not value.requires_grad:
            frozen.add(str(value.dtype).removeprefix("torch.") if state is None else state.quant_type)
    rest = f"; the rest is frozen, in {', '.join(sorted(frozen))}" if frozen else ""
    return f"Trainable: {trainable:,} of {total:,} parameters, in float32{rest}"
