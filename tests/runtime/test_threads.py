"""CPU threads: they sleep while they wait, small models take one, and a user's own settings stay."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sar_kd.runtime.threads import limit_threads

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
SCRIPTS = ("train_sar_kd_fp16_safe", "train_sar_kd_stable", "sar_kd.commands.main")


def _in_a_process(code: str, **settings: str) -> str:
    """What a new process prints in which the user has made these settings."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    return done.stdout.strip()


@pytest.fixture
def threads(monkeypatch):
    """Two threads and no setting of a user."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_no_torch_before_the_wait_policy_is_set(script):
    assert _in_a_process(f"import sys, {script}; print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize(
    ("settings", "policy"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "100"}, "None")],
)
def test_threads_sleep_while_they_wait_unless_the_user_said_otherwise(settings, policy):
    code = "import os; from sar_kd.commands.main import run; run(lambda argv: {'status': 'finished'}); "
    assert _in_a_process(code + "print(os.environ.get('OMP_WAIT_POLICY'))", **settings) == policy


def test_the_policy_is_not_set_where_torch_has_read_it_already():
    code = "import os, torch; from sar_kd.runtime.threads import set_wait_policy; set_wait_policy(); "
    assert _in_a_process(code + "print(os.environ.get('OMP_WAIT_POLICY'))") == "None"


def test_small_models_on_a_cpu_take_one_thread_and_a_line_says_so(threads):
    (line,) = limit_threads(5_000_000, CPU)
    assert torch.get_num_threads() == 1
    assert "OMP_NUM_THREADS" in line
    assert limit_threads(5_000_000, CPU) == []


def test_large_models_and_models_on_a_gpu_keep_all_threads(threads):
    assert limit_threads(135_000_000, CPU) == limit_threads(5_000_000, torch.device("cuda")) == []
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_that_the_user_has_set_stays(threads, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert limit_threads(5_000_000, CPU) == []
    assert torch.get_num_threads() == 2
