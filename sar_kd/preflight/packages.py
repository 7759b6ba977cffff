"""Whether the packages that a run's options need are installed; known before a model is described."""

from __future__ import annotations

from typing import Any

from sar_kd.runtime import environment

QUANTIZATION = ("bitsandbytes", "accelerate")
"""Those that put weights into 4 bits"""


def check_packages(config: Any) -> list[str]:
    """The packages that the options of a run need.

    Raises: UsageError with what to install, and the option that needs it
    """
    memory, lora, train = config.memory, config.lora, config.train
    quantization = getattr(memory, "teacher_quantization", "off")
    needed = {
        "dataset_name": ("datasets",) if config.data.dataset_name else (),
        "teacher_device_map": ("accelerate",) if getattr(memory, "teacher_device_map", "") else (),
        f"teacher_quantization {quantization}": QUANTIZATION if quantization != "off" else (),
        "optimizer adamw8bit": ("bitsandbytes",) if config.optim.optimizer == "adamw8bit" else (),
        f"lora_quantization {lora.lora_quantization}": QUANTIZATION if lora.is_quantized else (),
        "lora_rank": ("peft",) if lora.lora_rank else (),
        "tensorboard": ("tensorboard",) if train.tensorboard else (),
        "wandb": ("wandb",) if train.wandb else (),
    }
    for option, packages in needed.items():
        environment.require_packages(f"--{option}", packages)
    return [name for packages in needed.values() for name in packages]
