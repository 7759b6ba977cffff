"""A teacher whose linear layers take 4 bits a weight, through bitsandbytes; it does not learn, so it may be rounded.

NF4: each 64 weights share a scale, and each weight is one of 16 values, the quantiles of a normal distribution.

Source: Dettmers et al., 2023 (arXiv 2305.14314), section 3
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from sar_kd.environment import is_installed
from sar_kd.precision import Precision
from sar_kd.settings import UsageError

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
