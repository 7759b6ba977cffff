"""What is installed and what can compute: versions, GPUs, and whether this PyTorch carries kernels for them.

A PyTorch build carries machine code for some GPU generations only. On another one it allocates, `is_available()` is
true, and the first operation fails; so each GPU's compute capability is held against the build, and one real kernel is
run, before anything is loaded.

Source of the builds: the CUDA 12.6 wheels carry sm_50 to sm_90 and are published up to PyTorch 2.14 (pytorch issues
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

REQUIRED = {"torch": ((2, 6), (2, 14)), "transformers": ((5, 6), (6,))}
"""From which version on, and below which, as `pyproject.toml` says it for pip."""

# The last PyTorch for which wheels are published that carry what came before Turing (CUDA 12.6), and what they carry.
_LAST_WITH_OLD_CARDS = (2, 14)

_CU126 = range(50, 100)

_CU126_INDEX = "https://download.pytorch.org/whl/cu126"


class Card(NamedTuple):
    """One GPU."""

    number: int
    name: str
    capability: tuple[int, int]
    memory: int
    """bytes"""


def versions() -> dict[str, str]:
    """What is installed of the packages that matter, by name; 'missing' for what is not."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "tokenizers", "datasets", "matplotlib"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def is_installed(package: str) -> bool:
    """Could the package be imported? It is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module put into sys.modules by hand
        return package in sys.modules


def find_cards() -> list[Card]:
    """The GPUs that this process sees."""
    if not torch.cuda.is_available():
        return []
    cards = []
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory
        capability = torch.cuda.get_device_capability(index)
        cards.append(Card(index, torch.cuda.get_device_name(index), capability, memory))
    return cards


def held_memory() -> int:
    """Bytes that this process holds in the machine's memory; 0 where the system does not tell."""
    return _bytes_in(Path("/proc/self/status"), "VmRSS:")


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process could still take on a device; None where the system does not tell.

    Of the machine's own memory the least of what is available and what the control group (a container) has left.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = [_bytes_in(Path("/proc/meminfo"), "MemAvailable:")]
    for folder, (limit, used, cached) in _CGROUPS.items():
        most, taken = (_bytes_in(folder / name) for name in (limit, used))
        if most:
            left.append(max(1, most - taken + _bytes_in(folder / "memory.stat", cached)))
    return min(filter(None, left), default=None)


# Of the second version and the first: the limit, what is used, and what of it the system takes back when it wants it.
_CGROUPS = {
    Path("/sys/fs/cgroup"): ("memory.max", "memory.current", "inactive_file"),
    Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _bytes_in(path: Path, name: str = "") -> int:
    """The figure in a file, behind this name if one is given; 0 if it is not there, or no number ("max")."""
    lines = path.read_text().splitlines() if path.is_file() else []
    words = next((line.split() for line in lines if line.startswith(name)), [])
    words = words[1:] if name else words
    if not words or not words[0].isdecimal():
        return 0
    return int(words[0]) * (1024 if words[1:] == ["kB"] else 1)


def carries(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Can code compiled for `archs` ('sm_75', 'compute_90', 'sm_90a') run on a GPU of this compute capability?

    sm_XY runs on X.Z with Z >= Y; compute_XY is compiled anew for whatever is not older; a letter binds it to X.Y. A
    list without CUDA's names (ROCm's has gfx90a) says nothing, which is a yes: the kernel that is run decides.
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
    """Hold a GPU against the build, then run one real kernel: lists can be wrong.

    flag: how the user asked for it, for the message
    Raises: UsageError with the cause and what to install
    """
    capability = torch.cuda.get_device_capability(device)
    name = f"{flag}: {torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    build, archs = f"PyTorch {torch.__version__}", torch.cuda.get_arch_list()
    if not carries(archs, capability):
        raise UsageError(f"{name} is not among what {build} was built for ({' '.join(archs)}); {_remedy(capability)}")
    try:
        (torch.ones(1, device=device) + 1).item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{name} cannot run {build} ({reason}); {_remedy(capability)}") from None


def require_versions(found: dict[str, str]) -> list[str]:
    """Lines about packages that are newer than what this program was tried with.

    Raises: UsageError where one is too old, with the command that mends it
    """
    lines = []
    for package, (least, limit) in REQUIRED.items():
        version = _numbers(found[package])
        wanted = f"pip install '{package}>={_dotted(least)},<{_dotted(limit)}'"
        if version < least:
            raise UsageError(f"{package} {found[package]}: too old for this program; run `{wanted}` and start anew")
        if version >= limit:
            lines.append(f"{package} {found[package]} is newer than what this program was tried with (`{wanted}`)")
    return lines


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _remedy(capability: tuple[int, int]) -> str:
    number = 10 * capability[0] + capability[1]
    version = _numbers(torch.__version__)
    if number not in _CU126:
        return "install the newest PyTorch, whose builds carry newer GPUs, or use --device cpu"
    wanted = min(version, _LAST_WITH_OLD_CARDS)
    later = "" if wanted == version else f"builds for it end with PyTorch {_dotted(wanted)}; "
    command = f'pip install --force-reinstall "torch=={_dotted(wanted)}.*" --index-url {_CU126_INDEX}'
    return f"{later}run `{command}` and start Python anew, or take a T4 instead (7.5, carried by all builds)"
