"""`router_update.safetensors`: what routers have learned, and the proof that nothing else of the model has changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from sar_kd.errors import TrainingDiverged, UsageError

FILE = "router_update.safetensors"

_FORMAT = "sar_kd router update 1"


class FrozenTeacherChanged(TrainingDiverged):
    """A tensor of the teacher that must never change has changed."""


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_frozen(model: nn.Module, routers: Iterable[str]) -> str:
    """SHA-256 of every parameter and saved buffer of `model` but those named `routers`."""
    named = set(routers)
    return hash_tensors({name: tensor for name, tensor in model.state_dict().items() if name not in named})


def hash_routers(values: Mapping[str, Tensor]) -> str:
    """SHA-256 of routers' values in float32, so that it does not depend on the dtype they are kept in."""
    return hash_tensors({name: tensor.detach().float() for name, tensor in values.items()})


def save_router_update(path: Path, routers: Mapping[str, Tensor], about: Mapping[str, object]) -> None:
    """Write the routers' tensors in float32, by their full names, and `about` as metadata. Whole or not at all.

    about: `base_model`, `frozen_sha256` and `initial_sha256` at least; plain values
    """
    partial = path.with_name(f".{path.name}.partial")
    metadata = {"format": _FORMAT, **{key: json.dumps(value) for key, value in about.items()}}
    values = {name: tensor.detach().float().cpu().contiguous() for name, tensor in routers.items()}
    safetensors.torch.save_file(values, str(partial), metadata)
    os.replace(partial, path)


def read_router_update(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the metadata of a router update.

    Raises: UsageError if the file is none, or cannot be read
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"router update {path}: cannot be read ({str(error).splitlines()[0]})") from None
    if metadata.pop("format", None) != _FORMAT:
        raise UsageError(f"router update {path}: is no router update of this program")
    return values, {key: json.loads(value) for key, value in metadata.items()}


@torch.no_grad()
def load_router_update(teacher: nn.Module, path: Path | str) -> dict:
    """Put learned routers into the model that they were learned in, in place; nothing else of it changes.

    `teacher` keeps its dtypes, and works and saves in transformers as before. The routers were learned with every
    expert active unless the returned metadata's `sar_routing` says 'native'.

    Returns: the metadata
    Raises: UsageError if `teacher` is not the very model that the update was made for; it is then left as it was
    """
    values, about = read_router_update(path)
    own = dict(teacher.named_parameters())
    strange = [name for name, value in values.items() if name not in own or own[name].shape != value.shape]
    if strange:
        raise UsageError(f"router update {path}: the teacher has no router {strange[0]} of that shape")
    if hash_frozen(teacher, values) != about["frozen_sha256"]:
        raise UsageError(
            f"router update {path}: was made for another teacher; load {about['base_model']} in {about['dtype']}"
        )
    if hash_routers({name: own[name] for name in values}) != about["initial_sha256"]:
        raise UsageError(f"router update {path}: the teacher's routers are not those that it began with")
    for name, value in values.items():
        own[name].copy_(value)
    return about
