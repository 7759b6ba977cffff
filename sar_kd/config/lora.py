"""The section of settings about low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass

from sar_kd.config.fields import Section, option, require
from sar_kd.errors import UsageError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """LoRA: train a low-rank adapter instead of all weights; needs `pip install peft`."""

    lora_rank: int = option(0, "rank of the adapter, for example 4; 0: train all weights", at_least=0)
    lora_alpha: float = option(16.0, "the adapter's output is multiplied by alpha / rank", positive=True)
    lora_dropout: float = option(0.0, "dropout on the adapter's input")
    lora_targets: tuple[str, ...] = option((ALL_LINEAR,), "names of the layers to adapt, or all-linear", metavar="NAME")
    lora_quantization: str = option(
        "off",
        "nf4: the frozen linear layers in 4 bits (QLoRA), through bitsandbytes (`pip install bitsandbytes accelerate`)",
        choices=("off", "nf4"),
    )
    adapter_only: bool = option(False, "save the adapter alone, without a student into which it is merged")

    def __post_init__(self):
        super().__post_init__()
        if self.lora_quantization != "off" and not self.lora_rank:
            raise UsageError(
                f"--lora_quantization {self.lora_quantization}: needs --lora_rank; weights in 4 bits cannot be trained"
            )
        require(0.0 <= self.lora_dropout < 1.0, "lora_dropout", self.lora_dropout, "must be at least 0 and below 1")

    @property
    def is_quantized(self) -> bool:
        """Are the weights behind the adapter in 4 bits?"""
        return self.lora_quantization != "off"

    def describe(self) -> str:
        """What is trained, in a few words."""
        frozen = f" over {self.lora_quantization} weights" if self.is_quantized else ""
        return f"LoRA of rank {self.lora_rank}{frozen}" if self.lora_rank else "all weights"
