"""Every optimizer under the seven invariants, in true float16: what is refused leaves every bit of its state."""

import math

import pytest
import torch

from sar_kd.runtime.environment import is_installed
from tests.stress.harness import break_forward, norm_of, same_bits

NEEDS_BITSANDBYTES = pytest.mark.skipif(not is_installed("bitsandbytes"), reason="needs bitsandbytes")
OPTIMIZER = pytest.mark.parametrize(
    ("optimizer", "lr"), [("adafactor", 3e-2), pytest.param("adamw8bit", 1e-3, marks=NEEDS_BITSANDBYTES)]
)
PLAIN = {"logit_clamp_style": "off", "loss_clamp_style": "off"}


@OPTIMIZER
def test_a_nan_batch_leaves_weights_and_state_bit_for_bit_and_counts_as_no_step(make_run, optimizer, lr):
    run = make_run(optimizer=optimizer, lr=lr)
    run.steps(2, [0, 1])
    before, scale = run.tensors(), run.scale
    with break_forward(run.student.model.layers[0].mlp.down_proj, value=math.nan):
        assert run.step(run.batches([2, 3])).verdict.cause == "forward"
    assert same_bits(before, run.tensors())
    assert run.scale == scale
    assert run.step(run.batches([2, 3])).verdict.applied
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {3}


@OPTIMIZER
def test_a_scale_that_overflows_is_halved_until_it_fits(make_run, optimizer, lr):
    run = make_run(optimizer=optimizer, lr=lr, head=20.0, scale=2.0**24, loss=PLAIN)
    reports = run.steps(16, [0, 1])
    assert reports[0].verdict.cause == "overflow"
    assert reports[-1].verdict.applied
    assert run.scale < 2.0**24


@OPTIMIZER
def test_the_update_does_not_depend_on_the_loss_scale(make_run, optimizer, lr):
    runs = [make_run(optimizer=optimizer, lr=lr, scale=scale, loss=PLAIN) for scale in (2.0**10, 2.0**15)]
    for run in runs:
        assert run.step(run.batches([0, 1])).verdict.applied
    first, second = (run.applied_gradients for run in runs)
    assert norm_of([a - b for a, b in zip(first, second, strict=True)]) < 1e-3 * norm_of(first)


@OPTIMIZER
def test_a_norm_above_the_limit_is_refused(make_run, optimizer, lr):
    run = make_run(optimizer=optimizer, lr=lr, loss=PLAIN, guards={"skip_grad_norm": 1e-6, "skip_rule": "fixed"})
    assert {report.verdict.cause for report in run.steps(3, [0, 1])} == {"norm"}
    assert not run.optimizer.state


@OPTIMIZER
def test_steps_lower_the_loss(make_run, optimizer, lr):
    run = make_run(dtype=torch.float16, optimizer=optimizer, lr=lr, loss=PLAIN)
    reports = run.steps(12, [0, 1])
    assert reports[-1].loss < 0.98 * reports[0].loss
