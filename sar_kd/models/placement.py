"""Where a teacher is: on the student's device, on another one, or spread layer by layer over several and the disk.

Embeddings, LM head and all else outside the layers are on the run's device. Layers fill the GPUs, then CPU memory, then
the disk. A layer that is not on a GPU (of a run on a CPU: that is on the disk) is copied for its forward by accelerate,
tensor by tensor, and is not kept.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sar_kd.config.placement import TeacherPlacementConfig
from sar_kd.errors import UsageError
from sar_kd.models.memory_saving import layers_of
from sar_kd.runtime import environment
from sar_kd.runtime.console import format_bytes
from sar_kd.runtime.distributed import current_process_group
from sar_kd.runtime.precision import Precision

DeviceMap = dict[str, int | str]
"""By the name of a module or parameter: the index of a GPU, 'cpu' or 'disk'"""

_GPU_SHARE, _CPU_SHARE = 0.9, 0.8
"""Of the free memory of a GPU and of the machine, what a spread teacher may take if `--teacher_max_memory` is silent"""

_UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def device_of_teacher(config: TeacherPlacementConfig, device: torch.device) -> torch.device:
    """Where the teacher computes. device: the run's

    Raises: UsageError if the device is not there
    """
    if not config.teacher_device:
        return device
    found = torch.device(config.teacher_device)
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise UsageError(
                f"--teacher_device {config.teacher_device}: this PyTorch sees {count} CUDA devices; give cpu, or leave "
                "it out"
            )
        environment.require_kernels(f"--teacher_device {config.teacher_device}", found)
    return found


def limits_of(config: TeacherPlacementConfig) -> dict[int | str, int]:
    """`--teacher_max_memory` in bytes, by the index of a GPU or 'cpu'."""
    return {
        device if device == "cpu" else int(device.removeprefix("cuda:")): int(float(size) * _UNITS[unit.upper()])
        for device, size, unit in (
            re.split("=|(?<=[0-9])(?=[a-z])", each.lower()) for each in config.teacher_max_memory
        )
    }


def spread_over_devices(
    model: nn.Module,
    config: TeacherPlacementConfig,
    device: torch.device,
    dtype: torch.dtype,
    has_student: bool,
) -> DeviceMap:
    """The device of every layer of a model, and of everything outside the layers.

    model: may be on the meta device; device: the run's
    has_student: a student is trained on `device`, which then gets no layer unless `--teacher_max_memory` names it
    Each of several processes uses its own GPU alone, and its share of the machine's memory.

    Raises: UsageError if accelerate is missing, the model has no layers, or a limit is below what is outside them
    """
    environment.require_packages(config.placement(), ("accelerate",))
    units = {name: (unit, is_layer) for name, unit, is_layer in _units(model)}
    layers = {name: unit for name, (unit, is_layer) in units.items() if is_layer}
    if not layers:
        raise UsageError("--teacher_device_map auto: the teacher's layers are not known; leave it out")
    home = place_of(device)
    rest = _num_bytes((unit for unit, is_layer in units.values() if not is_layer), dtype)
    space = _free_space(config, home, has_student, current_process_group().size)
    if home in limits_of(config) and space[home] < rest:
        raise UsageError(
            f"--teacher_max_memory {' '.join(config.teacher_max_memory)}: the teacher's embeddings and LM head, which "
            f"are on {device}, take {format_bytes(rest)}; give more"
        )
    space[home] -= rest
    found, remaining = dict.fromkeys(units, home), [*space]
    for name, layer in layers.items():
        size = _num_bytes([layer], dtype)
        while remaining and space[remaining[0]] < size:  # layers stay in order, so that few of them change the device
            remaining.pop(0)
        found[name] = remaining[0] if remaining else "disk"
        if remaining:
            space[remaining[0]] -= size
    return found


def place_of(device: torch.device) -> int | str:
    """A device as a `DeviceMap` names it."""
    return "cpu" if device.type == "cpu" else device.index or 0


def _free_space(
    config: TeacherPlacementConfig, home: int | str, has_student: bool, num_processes: int
) -> dict[int | str, float]:
    """Bytes for the teacher on each device, in the order in which they are filled."""
    given, space = limits_of(config), dict[int | str, float]()
    gpus: list[int] = [] if home == "cpu" else [gpu.number for gpu in environment.find_gpus()]
    if isinstance(home, int):
        gpus = [home] if num_processes > 1 else sorted(gpus, key=lambda number: number != home)
    for number in gpus:
        free = environment.free_memory(torch.device("cuda", number)) or 0
        space[number] = given.get(number, 0 if has_student and number == home else _GPU_SHARE * free)
    free = environment.free_memory(torch.device("cpu")) or 0
    space["cpu"] = given.get("cpu", _CPU_SHARE * free / num_processes)
    return space


def _units(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module | Tensor, bool]]:
    """The layers, and the largest modules and the parameters that hold none of them: name, unit, is it a layer."""
    layers = {id(layer) for layer in layers_of(model)}
    if not layers or id(model) in layers:
        yield name, model, bool(layers)
        return
    prefix = f"{name}." if name else ""
    for own, parameter in model.named_parameters(recurse=False):
        yield prefix + own, parameter, False
    for own, child in model.named_children():
        yield from _units(child, prefix + own)


def _num_bytes(units: Iterable[nn.Module | Tensor], dtype: torch.dtype) -> int:
    """Of parameters; one that two units share counts once."""
    lists = ([unit] if isinstance(unit, Tensor) else unit.parameters() for unit in units)
    return sum(parameter.numel() for parameter in set(chain.from_iterable(lists))) * dtype.itemsize


def spreading_options(
    model: nn.Module, config: TeacherPlacementConfig, precision: Precision, has_student: bool, notes: list[str]
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that spread a model as `spread_over_devices` says. notes: gets a line about it

    Weights of the disk stay in the model's own files, but for those that it converts while it loads: they are in a
    temporary folder, which is removed when the process ends.
    """
    device_map = spread_over_devices(model, config, precision.device, precision.dtype, has_student)
    notes.append(describe_spread(model, device_map))
    folder = tempfile.mkdtemp(prefix="sar_kd-teacher-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"device_map": device_map, "offload_folder": folder}


def describe_spread(model: nn.Module, device_map: DeviceMap) -> str:
    """A line about where the layers of a model are."""
    where = [device_map[name] for name, _, is_layer in _units(model) if is_layer]
    names = {"cpu": "in CPU memory", "disk": "on the disk"}
    counts = {names.get(str(device), f"on cuda:{device}"): where.count(device) for device in where}
    parts = ", ".join(f"{count} {place}" for place, count in counts.items())
    return f"Teacher: of its {len(where)} layers {parts} (--teacher_device_map)"


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name; one that is not loaded now is read for this, and not kept."""
    for name, parameter in model.named_parameters():
        module_name, _, own = name.rpartition(".")
        hook: Any = getattr(model.get_submodule(module_name), "_hf_hook", None)
        weights = getattr(hook, "weights_map", None)
        if parameter.is_meta and weights is not None:
            yield name, weights[own]
        else:
            yield name, parameter


def is_offloaded(model: nn.Module) -> bool:
    """Are there weights that are loaded only while they are used?"""
    return any(parameter.is_meta for parameter in model.parameters())


def load_outside_modes_(model: nn.Module) -> None:
    """Let offloaded weights be loaded and freed as they are: `half_precision` replaces casts to half inside a module's
    forward, where accelerate does so.
    """
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward, hook.post_forward = map(_without_modes, (hook.pre_forward, hook.post_forward))


def _without_modes(function: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return run
