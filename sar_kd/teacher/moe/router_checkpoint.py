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


def hash_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, sorted by name; of floating-point ones in `dtype`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_frozen(model: nn.Module, routers: Iterable[str], dtype: torch.dtype | None = None) -> str:
    """SHA-256 of every parameter and persistent buffer of `model` except those named in `routers`, in `dtype`."""
    excluded, own = set(routers), next(model.parameters()).dtype
    tensors = {name: _as_loaded(tensor, own) for name, tensor in model.state_dict().items() if name not in excluded}
    return hash_tensors(tensors, dtype)


def _as_loaded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 tensor of a half teacher in half where that loses nothing: float16 runs have float32 norms."""
    if tensor.dtype is not torch.float32 or dtype is not torch.float16:
        return tensor
    narrowed = tensor.to(dtype)
    return narrowed if torch.equal(narrowed.float(), tensor) else tensor


def hash_routers(values: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 of router weights, rounded to `dtype`, in float32: it does not depend on the dtype they are stored in."""
    rounded = {name: tensor.detach() if dtype is None else tensor.detach().to(dtype) for name, tensor in values.items()}
    return hash_tensors({name: tensor.float() for name, tensor in rounded.items()})


def hash_rounded(model: nn.Module, initial: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For a float32 teacher: both hashes as of the same teacher loaded in half precision, by dtype; else none.

    initial: the routers' weights before the run
    """
    if next(model.parameters()).dtype is not torch.float32:
        return {}
    halves = (torch.float16, torch.bfloat16)
    return {_name(dtype): [hash_frozen(model, initial, dtype), hash_routers(initial, dtype)] for dtype in halves}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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

    `teacher` may be loaded in another dtype than the run's. It keeps its dtypes and stays an ordinary transformers
    model. The routers were trained with every expert active unless the returned metadata's `sar_routing` is 'native'.

    Returns: the metadata
    Raises: UsageError if `teacher` is not the model that the update was made for; it is then left unchanged
    """
    values, metadata = read_router_update(path)
    parameters = dict(teacher.named_parameters())
    for name, value in values.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise UsageError(f"router update {path}: the teacher has no router {name} of that shape")
    _check_teacher(teacher, {name: parameters[name] for name in values}, metadata, path)
    for name, value in values.items():
        parameters[name].copy_(value)
    return metadata


def _check_teacher(teacher: nn.Module, routers: Mapping[str, Tensor], metadata: dict, path: Path | str) -> None:
    """Raise UsageError unless this is the teacher of the update, in the run's dtype or in another one that shows it."""
    own = next(value for name, value in teacher.named_parameters() if name not in routers).dtype
    saved, rounded = metadata["dtype"], metadata.get("rounded_sha256", {})
    expected, cast = [metadata["frozen_sha256"], metadata["initial_sha256"]], None
    if _name(own) in rounded:  # the run's float32, loaded in half
        expected = rounded[_name(own)]
        cast = own
    elif own is torch.float32 and saved != "float32":  # the run's half, loaded in float32
        cast = getattr(torch, saved)
    elif _name(own) != saved:
        raise UsageError(
            f"router update {path}: was made in {saved}, with which a teacher in {_name(own)} cannot be compared; load "
            f"{metadata['base_model']} in {saved} or float32"
        )
    if hash_frozen(teacher, routers, cast) != expected[0]:
        raise UsageError(f"router update {path}: was made for another teacher; load {metadata['base_model']}")
    if hash_routers(routers, cast) != expected[1]:
        raise UsageError(f"router update {path}: the teacher's routers are not those that it began with")
