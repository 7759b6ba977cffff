"""Runs with each optimizer: they learn, and a resumed one is the same bit for bit."""

import pytest
import torch

from sar_kd.runtime.environment import is_installed
from sar_kd.training import trainer
from tests.helpers.runs import argv_of, assert_equal_runs, assert_refused, inputs, interrupting, read_json, run_script

__all__ = ["inputs"]  # a fixture
NEEDS_BITSANDBYTES = pytest.mark.skipif(not is_installed("bitsandbytes"), reason="needs bitsandbytes")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "rate"), [("adafactor", 3e-2), pytest.param("adamw8bit", 3e-3, marks=NEEDS_BITSANDBYTES)]
)
def test_a_resumed_run_equals_one_never_interrupted(inputs, tmp_path, monkeypatch, optimizer, rate):
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    more = ("--optimizer", optimizer, "--student_lr", rate)
    assert run_script(argv_of(inputs, straight, *more, steps=6))[0] == 0
    summary = read_json(straight / "summary.json")
    assert summary["applied"] == 6
    assert summary["val_ppl_final"] < 0.99 * summary["val_ppl_start"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupting(trainer.train_step, 3))
        assert run_script(argv_of(inputs, halved, *more, steps=6))[0] == 130
    torch.manual_seed(99)
    assert run_script(["--resume", "--output_dir", str(halved)])[0] == 0
    assert_equal_runs(straight, halved)
    assert_refused(["--resume", "--output_dir", halved, "--optimizer", "adamw"], f"the run to resume has '{optimizer}'")
