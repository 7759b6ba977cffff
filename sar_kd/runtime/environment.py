"""Package versions, GPUs, memory, and whether this PyTorch build has kernels for a GPU.

A PyTorch build contains machine code for some GPU generations only. On another one it allocates, `is_available()` is
true, and the first operation fails. So each GPU's compute capability is compared with the build, and one real kernel is
run, before anything is loaded.

Source of the builds: the CUDA 12.6 wheels contain sm_50 to sm_90 and are published up to PyTorch 2.14 (pytorch issues
157517, 172352 and 190385); the others begin at sm_75 from PyTorch 2.11 on.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from sar_kd.errors import UsageError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

REQUIRED = {"torch": ((2, 6), (2, 15)), "transformers": ((5, 6), (6,))}
"""The lowest version, as in `pyproject.toml`; and the first one that was not tried, which a run says and goes on"""

_LAST_WITH_OLD_GPUS = (2, 14)
"""The last PyTorch with wheels for GPUs older than Turing, those of CUDA 12.6"""

_CU126 = range(50, 100)
"""The compute capabilities in these wheels, times 10"""

_CU126_INDEX = "https://download.pytorch.org/whl/cu126"


class Gpu(NamedTuple):
    """One GPU."""

    number: int
    name: str
    capability: tuple[int, int]
    memory: int
    """bytes"""


def versions() -> dict[str, str]:
    """The installed versions of the packages that matter, by name; 'missing' for those that are not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "tokenizers", "datasets", "matplotlib"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def is_installed(package: str) -> bool:
    """Could the package be imported? Does not import it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module put into sys.modules by hand
        return package in sys.modules


def require_packages(option: str, packages: Sequence[str]) -> None:
    """Raise UsageError with what to install, if a package is missing that an option needs."""
    if missing := [package for package in packages if not is_installed(package)]:
        raise UsageError(f"{option}: needs `pip install {' '.join(missing)}`")


def find_gpus() -> list[Gpu]:
    """The GPUs that this process sees."""
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory
        capability = torch.cuda.get_device_capability(index)
        gpus.append(Gpu(index, torch.cuda.get_device_name(index), capability, memory))
    return gpus


def resident_memory() -> int:
    """Bytes of this process in the machine's memory; 0 where the system does not report it."""
    return _bytes_in(Path("/proc/self/status"), "VmRSS:")


def peak_memory(device: torch.device) -> int:
    """Peak bytes allocated on the GPU, or of the whole process on a CPU; 0 where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process could still allocate on a device; None where the system does not report it.

    For a CPU the smaller of the machine's available memory and what the control group (a container) has left.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = [_bytes_in(Path("/proc/meminfo"), "MemAvailable:")]
    for folder, (limit_file, used_file, cached) in _CGROUPS.items():
        limit, used = (_bytes_in(folder / name) for name in (limit_file, used_file))
        if limit:
            left.append(max(1, limit - used + _bytes_in(folder / "memory.stat", cached)))
    return min(filter(None, left), default=None)


# Of cgroups version 2 and 1: the limit, the used bytes, and those of them that the system can reclaim.
_CGROUPS = {
    Path("/sys/fs/cgroup"): ("memory.max", "memory.current", "inactive_file"),
    Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _bytes_in(path: Path, name: str = "") -> int:
    """The number of bytes in a file, behind `name` if one is given; 0 if it is missing or no number ("max")."""
    lines = path.read_text().splitlines() if path.is_file() else []
    words = next((line.split() for line in lines if line.startswith(name)), [])
    words = words[1:] if name else words
    if not words or not words[0].isdecimal():
        return 0
    return int(words[0]) * (1024 if words[1:] == ["kB"] else 1)


def has_kernels_for(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Can code compiled for `archs` ('sm_75', 'compute_90', 'sm_90a') run on a GPU of this compute capability?

    sm_XY runs on X.Z with Z >= Y; compute_XY is compiled at load time for any GPU that is not older; a letter after it
    (sm_90a) allows X.Y only. A list without CUDA's names (ROCm's has gfx90a) counts as yes: the kernel run decides.
    """
    if not any(arch.startswith(("sm_", "compute_")) for arch in archs):
        return True
    for arch in archs:
        kind, _, digits = arch.partition("_")
        exact = digits[-1:].isalpha()
        number = int("".join(filter(str.isdigit, digits)) or -1)
        major, minor = divmod(number, 10)
        if kind == "sm" and major == capability[0] and (minor == capability[1] if exact else minor <= capability[1]):
            return True
        if kind == "compute" and not exact and (major, minor) <= capability:
            return True
    return False


def require_kernels(flag: str, device: torch.device) -> None:
    """Compare a GPU with the build's list, then run one real kernel, as lists can be wrong.

    flag: the option that chose the GPU, for the message
    Raises: UsageError with the cause and what to install
    """
    capability = torch.cuda.get_device_capability(device)
    name = f"{flag}: {torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    build, archs = f"PyTorch {torch.__version__}", torch.cuda.get_arch_list()
    if not has_kernels_for(archs, capability):
        known = f"the GPUs that {build} was built for ({' '.join(archs)})"
        raise UsageError(f"{name} is not among {known}; {_remedy(capability)}")
    try:
        (torch.ones(1, device=device) + 1).item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{name} cannot run {build} ({reason}); {_remedy(capability)}") from None


def require_versions(found: dict[str, str]) -> list[str]:
    """Notices about packages that are newer than those that this program was tested with.

    Raises: UsageError where one is too old, with the command that upgrades it
    """
    lines = []
    for package, (least, limit) in REQUIRED.items():
        version = _major_minor(found[package])
        command = f"pip install '{package}>={_dotted(least)},<{_dotted(limit)}'"
        if version < least:
            raise UsageError(f"{package} {found[package]}: too old for this program; run `{command}` and start again")
        if version >= limit:
            lines.append(f"{package} {found[package]} is newer than those this program was tested with (`{command}`)")
    return lines


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _remedy(capability: tuple[int, int]) -> str:
    number = 10 * capability[0] + capability[1]
    version = _major_minor(torch.__version__)
    if number not in _CU126:
        return "install the newest PyTorch, whose builds support newer GPUs, or use --device cpu"
    wanted = min(version, _LAST_WITH_OLD_GPUS)
    later = "" if wanted == version else f"builds for it end with PyTorch {_dotted(wanted)}; "
    command = f'pip install --force-reinstall "torch=={_dotted(wanted)}.*" --index-url {_CU126_INDEX}'
    return f"{later}run `{command}` and restart Python, or take a T4 instead (7.5, supported by all builds)"
