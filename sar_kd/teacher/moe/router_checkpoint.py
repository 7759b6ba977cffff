"""`router_update.safetensors`: trained router weights, and digests that prove the rest of the model unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from sar_kd.errors import TrainingDiverged, UsageError
from sar_kd.runtime.files import atomic_write

FILE = "router_update.safetensors"

_FORMAT = "sar_kd router update 1"


class FrozenTeacherChanged(TrainingDiverged):
    """A frozen tensor of the teacher has changed."""


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_frozen(model: nn.Module, routers: Iterable[str]) -> str:
    """SHA-256 of every parameter and persistent buffer of `model` except those named in `routers`."""
    excluded = set(routers)
    return hash_tensors({name: tensor for name, tensor in model.state_dict().items() if name not in excluded})


def hash_routers(values: Mapping[str, Tensor]) -> str:
    """SHA-256 of router weights in float32, so that it does not depend on the dtype they are stored in."""
    return hash_tensors({name: tensor.detach().float() for name, tensor in values.items()})


def save_router_update(path: Path, routers: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write router weights in float32 under their full names, and the metadata; atomic.

    metadata: at least `base_model`, `dtype`, `frozen_sha256` and `initial_sha256`; JSON-compatible values
    """
    values = {name: tensor.detach().float().cpu().contiguous() for name, tensor in routers.items()}
    header = {"format": _FORMAT, **{key: json.dumps(value) for key, value in metadata.items()}}
    atomic_write(path, safetensors.torch.save(values, header))


def read_router_update(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the metadata of a router update.

    Raises: UsageError if the file cannot be read, or is something else
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
    """Load trained routers, in place, into the model that they were trained in; nothing else of it changes.

    `teacher` keeps its dtypes and stays an ordinary transformers model. The routers were trained with every expert
    active unless the returned metadata's `sar_routing` is 'native'.

    Returns: the metadata
    Raises: UsageError if `teacher` is not the model that the update was made for; it is then left unchanged
    """
    values, metadata = read_router_update(path)
    parameters = dict(teacher.named_parameters())
    for name, value in values.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise UsageError(f"router update {path}: the teacher has no router {name} of that shape")
    if hash_frozen(teacher, values) != metadata["frozen_sha256"]:
        raise UsageError(
            f"router update {path}: was made for another teacher; load {metadata['base_model']} in {metadata['dtype']}"
        )
    if hash_routers({name: parameters[name] for name in values}) != metadata["initial_sha256"]:
        raise UsageError(f"router update {path}: the teacher's routers are not those that it began with")
    for name, value in values.items():
        parameters[name].copy_(value)
    return metadata
