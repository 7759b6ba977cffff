"""Low-rank adapters (LoRA) through `peft`: each linear layer gets a small trainable addition, the rest is frozen.

    y = W x + (alpha / rank) * B A x        A [rank, in], B [out, rank] in float32; W frozen

Source: Hu et al., 2021 (arXiv 2106.09685), section 4.1
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from sar_kd.config.sections import ALL_LINEAR, LoraConfig
from sar_kd.errors import UsageError


def add_adapter(student: nn.Module, config: LoraConfig) -> nn.Module:
    """The student with a trainable adapter and all else frozen; unchanged if `--lora_rank` is 0.

    Raises: UsageError if `peft` is missing or finds none of the layers
    """
    if not config.lora_rank:
        return student
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
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft imports a deprecated name
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2: peft sets it by itself
            return peft.get_peft_model(student, settings, autocast_adapter_dtype=True)
    except ValueError as error:
        names = " ".join(config.lora_targets)
        raise UsageError(f"--lora_targets {names}: {str(error).splitlines()[0]}") from None


def models_to_save(student: nn.Module) -> dict[str, nn.Module]:
    """The models that a run saves, by folder: `student`, whole; `adapter` too, where there is one, in peft's format."""
    if not hasattr(student, "peft_config"):
        return {"student": student}
    return {"student": merged_model(student), "adapter": student}


@torch.no_grad()
def merged_model(student: nn.Module) -> nn.Module:
    """A copy without an adapter, its product added to the weights, in float32 on the CPU.

    W + (alpha / rank) * B A

    The student is unchanged: merging in place and unmerging would not restore its weights bit for bit.
    """
    base: Any = student.get_base_model()  # type: ignore[operator]  # peft's
    weights = {name: value.cpu().float() for name, value in base.state_dict().items() if ".lora_" not in name}
    for name, module in base.named_modules():
        if hasattr(module, "get_delta_weight"):
            for adapter in module.active_adapters:
                delta = module.get_delta_weight(adapter).cpu().float()
                weights[f"{name}.base_layer.weight"] = weights[f"{name}.base_layer.weight"] + delta
    weights = {name.replace(".base_layer.", "."): value for name, value in weights.items()}
    with torch.device("meta"):
        merged = type(base)(copy.deepcopy(base.config))
    merged.load_state_dict(weights, assign=True)
    merged.tie_weights()
    merged.generation_config = base.generation_config
    return merged


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
    total = sum(value.numel() for value in student.parameters())
    frozen = {str(value.dtype).removeprefix("torch.") for value in student.parameters() if not value.requires_grad}
    rest = f"; the rest is frozen, in {', '.join(sorted(frozen))}" if frozen else ""
    return f"Trainable: {trainable:,} of {total:,} parameters, in float32{rest}"
