"""GPUs against builds: which code runs on which card, and the one line for a card that a build does not carry."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sar_kd.config.sections import PrecisionConfig
from sar_kd.errors import UsageError
from sar_kd.runtime import environment
from sar_kd.runtime.environment import REQUIRED, has_kernels_for, require_versions
from sar_kd.runtime.precision import choose_device, setup_precision

CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
P100, V100, T4, B200 = (6, 0), (7, 0), (7, 5), (10, 0)


@pytest.fixture
def machine(monkeypatch):
    """machine(capability, archs, version): this process sees one such GPU, whose kernels run on a CPU."""

    def make(capability, archs, version="2.10.0+cu128", kernel=None, name="Tesla P100-PCIE-16GB"):
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        properties = SimpleNamespace(total_memory=17_059_545_088)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch, "ones", kernel or (lambda *size, device: torch.full(size, 1.0)))

    return make


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (CU128, P100, False),
        (CU126, P100, True),
        (CU128, V100, True),
        (CU128, T4, True),
        (CU126, B200, False),
        (["sm_60"], (6, 1), True),  # a later minor of the same major
        (["sm_61"], (6, 0), False),
        (["compute_50"], (6, 0), True),  # compiled anew
        (["compute_70"], (6, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),  # bound to its own minor
        ([], (7, 5), True),
        (["gfx906", "gfx90a"], (9, 0), True),  # ROCm's names: the kernel that is run decides
    ],
)
def test_code_runs_on_its_own_major_from_its_minor_on_or_is_compiled_anew(archs, capability, runs):
    assert has_kernels_for(archs, capability) is runs


def test_a_p100_under_a_cu128_build_is_refused_with_cause_command_and_alternative(machine):
    machine(P100, CU128)
    with pytest.raises(UsageError) as caught:
        setup_precision(PrecisionConfig(), 0)
    line = str(caught.value)
    assert "\n" not in line
    assert "Tesla P100-PCIE-16GB (compute capability 6.0)" in line
    assert "PyTorch 2.10.0+cu128" in line
    assert '`pip install --force-reinstall "torch==2.10.*" --index-url https://download.pytorch.org/whl/cu126`' in line
    assert "T4" in line


def test_from_pytorch_2_15_on_the_last_version_with_kernels_for_a_p100_is_named(machine):
    machine(P100, ["sm_75", "sm_80", "sm_90"], version="2.15.1+cu130")
    with pytest.raises(UsageError, match=re.escape("builds for it end with PyTorch 2.14; run `pip install")):
        setup_precision(PrecisionConfig(), 0)


def test_a_card_newer_than_the_build_needs_a_newer_build(machine):
    machine(B200, CU126, name="B200")
    with pytest.raises(UsageError, match="newest PyTorch"):
        setup_precision(PrecisionConfig(), 0)


def test_a_card_whose_kernels_fail_although_the_list_has_it_is_refused(machine):
    def fails(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    machine(T4, CU128, kernel=fails, name="Tesla T4")
    with pytest.raises(UsageError, match=r"Tesla T4 .* cannot run .* no kernel image is available") as caught:
        setup_precision(PrecisionConfig(), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "dtype", "why"),
    [(T4, torch.float16, "has no bfloat16 units"), ((8, 0), torch.bfloat16, "has bfloat16 units")],
)
def test_the_dtype_follows_the_card_with_a_reason(machine, capability, dtype, why):
    machine(capability, CU128, name="card")
    device, chosen, reason = choose_device(PrecisionConfig())
    assert (device.type, chosen, reason) == ("cuda", dtype, f"card {why}")


def test_a_dtype_given_by_hand_is_the_reason():
    config = PrecisionConfig(device="cpu", model_dtype="float16")
    assert choose_device(config)[1:] == (torch.float16, "--model_dtype float16")


@pytest.mark.parametrize(("package", "old"), [("torch", "2.5.1"), ("transformers", "4.57.1")])
def test_a_package_that_is_too_old_is_refused_with_the_command(package, old):
    found = {"torch": "2.13.0+cpu", "transformers": "5.23.0", package: old}
    with pytest.raises(UsageError, match=f"{package} {old}: too old .*`pip install '{package}>="):
        require_versions(found)


def test_a_package_that_is_newer_than_tried_is_only_mentioned():
    assert require_versions({"torch": "2.13.0", "transformers": "5.23.0"}) == []
    (line,) = require_versions({"torch": "3.0.0", "transformers": "5.23.0"})
    assert "newer" in line


def test_the_lowest_versions_are_those_of_pyproject():
    listed = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for package, (least, _) in REQUIRED.items():
        assert re.search(rf'"{package}>={".".join(map(str, least))}[",]', listed)


def test_a_package_that_is_not_installed_is_called_missing(monkeypatch):
    monkeypatch.setattr(environment.metadata, "version", lambda name: _raise(name))
    found = environment.versions()
    assert found["torch"] == torch.__version__
    assert found["matplotlib"] == "missing"


def _raise(name):
    raise environment.metadata.PackageNotFoundError(name)
