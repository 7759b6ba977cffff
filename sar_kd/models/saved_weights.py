"""The weights of a saved model in another dtype: rounded to the nearest, and refused where one would overflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sar_kd.errors import UsageError
from sar_kd.runtime.files import atomic_rename, atomic_write


def require_in_range(title: str, model: nn.Module, dtype: torch.dtype) -> None:
    """Raise UsageError, which begins with the title, if a weight of the model would overflow in this dtype."""
    for name, weight in model.state_dict().items():
        require_fits(title, name, weight, dtype)


def require_fits(title: str, name: str, weight: Tensor, dtype: torch.dtype) -> None:
    """Raise UsageError, which begins with the title, if a finite weight would overflow in this dtype.

    An infinite one, such as the bias that masks a token, is the same in every dtype.
    """
    if not weight.is_floating_point():
        return
    overflows = weight.isfinite() & ~weight.to(dtype).isfinite()
    if overflows.any():
        value = weight[overflows].abs().max().item()
        sign = "" if (weight[overflows] == value).any() else "-"
        limit = f"{torch.finfo(dtype).max:,.0f}" if dtype is torch.float16 else f"{torch.finfo(dtype).max:.3g}"
        raise UsageError(
            f"{title}: {name} holds {sign}{value:,.0f}, beyond what {_name(dtype)} can ({limit}); use "
            f"{'bfloat16 or ' if dtype is torch.float16 else ''}float32"
        )


@torch.no_grad()
def convert_saved(title: str, folder: Path, dtype: torch.dtype) -> int:
    """Round the float32 weights of a saved model; returns how many became 0 of those that were not.

    All is checked before the first file is replaced, each as a whole.
    Raises: UsageError, which begins with the title, if a weight would overflow; the files are then as they were
    """
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        for name, weight in _read(path):
            require_fits(title, name, weight, dtype)
    num_zeros = 0
    for path in files:
        rounded = {}
        for name, weight in _read(path):
            rounded[name] = weight.to(dtype) if weight.is_floating_point() else weight
            num_zeros += int(((rounded[name] == 0) & (weight != 0)).sum())
        partial = path.with_name(f".{path.name}.partial")
        safetensors.torch.save_file(rounded, str(partial), metadata={"format": "pt"})
        atomic_rename(partial, path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"]["total_size"] = sum(w.numel() * w.element_size() for p in files for _, w in _read(p))
        atomic_write(index, json.dumps(content, indent=2) + "\n")
    config = folder / "config.json"
    content = _with_dtype(json.loads(config.read_text(encoding="utf-8")), _name(dtype))
    atomic_write(config, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return num_zeros


def _read(path: Path) -> list[tuple[str, Tensor]]:
    return sorted(safetensors.torch.load_file(str(path)).items())


def _with_dtype(config: Any, name: str) -> Any:
    """A config with another `dtype`, in its parts too."""
    if not isinstance(config, dict):
        return config
    return {key: name if key == "dtype" and value else _with_dtype(value, name) for key, value in config.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
