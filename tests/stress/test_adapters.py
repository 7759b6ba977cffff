"""LoRA under the guards in true float16: its gradient is that of the definition, a refused step leaves every bit."""

import copy
import math

import pytest
import torch

from sar_kd.models.lora import merged_model
from tests.stress.harness import break_forward, norm_of, same_bits

pytest.importorskip("peft")

RANK = 4
PLAIN = {"logit_clamp_style": "off", "loss_clamp_style": "off", "alpha_kd": 0.6, "alpha_ce": 0.4, "temperature": 1.5}
NO_LIMITS = {"max_grad_norm": 1e9, "skip_grad_norm": 1e9}


def _adapters(run) -> dict:
    """Each adapted layer by the name of its weight in the merged model."""
    modules = run.student.get_base_model().named_modules()
    return {f"{name}.weight": module for name, module in modules if hasattr(module, "lora_A")}


@torch.no_grad()
def _begin_trained_(run) -> None:
    """B starts at 0, where A has no gradient."""
    torch.manual_seed(7)
    for layer in _adapters(run).values():
        layer.lora_B["default"].weight.normal_(std=0.05)


def _whole_gradients(run, batch) -> dict:
    """d loss / d (W + s B A) for every weight of the merged student, in float64, from the definition of the loss."""
    whole, teacher = merged_model(run.student).double(), copy.deepcopy(run.teacher).double()
    logits = whole(input_ids=batch.student.input_ids, use_cache=False).logits.flatten(0, 1)[batch.student.positions]
    with torch.no_grad():
        read = teacher(input_ids=batch.teacher.input_ids, use_cache=False).logits.flatten(0, 1)
        t = (read[batch.alignment.teacher_positions] / PLAIN["temperature"]).log_softmax(-1)
    s = (logits / PLAIN["temperature"]).log_softmax(-1)
    kd = PLAIN["temperature"] ** 2 * (t.exp() * (t - s)).sum(-1).mean()
    ce = torch.nn.functional.cross_entropy(logits, batch.student.targets)
    (PLAIN["alpha_kd"] * kd + PLAIN["alpha_ce"] * ce).backward()
    return {name: parameter.grad for name, parameter in whole.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_the_gradient_of_an_adapter_is_the_whole_gradient_projected(make_run, dtype, tolerance):
    run = make_run(dtype=dtype, rank=RANK, loss=PLAIN, guards=NO_LIMITS)
    _begin_trained_(run)
    (batch,) = run.batches([0, 1, 2])
    expected, layers = _whole_gradients(run, batch), _adapters(run)
    before = {name: [layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone()]
              for name, layer in layers.items()}  # fmt: skip
    found = {}
    hook = run.optimizer.register_step_pre_hook(
        lambda *_: found.update(
            {n: [each["default"].weight.grad.clone() for each in (x.lora_A, x.lora_B)] for n, x in layers.items()}
        )
    )
    with hook:
        assert run.step([batch]).verdict.applied
    assert found.keys() == before.keys()
    assert len(found) == 7
    for name, (grad_a, grad_b) in found.items():
        (a, b), whole, scaling = (v.double() for v in before[name]), expected[name], layers[name].scaling["default"]
        for grad, reference in ((grad_a, scaling * b.T @ whole), (grad_b, scaling * whole @ a.T)):
            assert grad.dtype is torch.float32
            assert norm_of([grad.double() - reference]) <= tolerance * norm_of([reference]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_applied_step_changes_every_adapter_and_nothing_else(make_run, dtype):
    run = make_run(dtype=dtype, rank=RANK)
    _begin_trained_(run)
    before = {name: value.clone() for name, value in run.student.named_parameters()}
    run.steps(2, [0, 1])
    changed = {name for name, value in run.student.named_parameters() if not torch.equal(before[name], value)}
    assert changed == {name for name in before if "lora_" in name}
    frozen = [value for name, value in run.student.named_parameters() if name not in changed and value.ndim > 1]
    assert {value.dtype for value in frozen} == {dtype}


def _nan(run):
    return break_forward(run.student.get_base_model().model.layers[0].mlp.down_proj, value=math.nan)


def _half_overflow(run):
    return break_forward(run.student.get_base_model().model.layers[0].mlp.down_proj, value=math.inf)


@pytest.mark.parametrize("broken", [_nan, _half_overflow])
def test_a_forward_that_is_not_finite_leaves_adapters_and_optimizer_bit_for_bit(make_run, broken):
    run = make_run(rank=RANK)
    run.steps(2, [0, 1])
    before, scale = run.tensors(), run.scale
    with broken(run):
        report = run.step(run.batches([2, 3]))
    assert report.verdict.cause == "forward"
    assert same_bits(before, run.tensors())
    assert run.scale == scale
    assert run.step(run.batches([2, 3])).verdict.applied


def test_ten_nan_batches_in_a_row_are_an_emergency_and_leave_the_adapters(make_run):
    run = make_run(rank=RANK)
    run.steps(1, [0, 1])
    before = run.tensors()
    with _nan(run):
        reports = run.steps(10, [0, 1])
    assert [report.verdict.emergency for report in reports] == [False] * 9 + [True]
    assert same_bits(before, run.tensors())


def test_a_scale_that_overflows_the_adapters_gradient_is_halved_until_it_fits(make_run):
    run = make_run(rank=RANK, head=20.0, scale=2.0**24, loss=PLAIN)
    _begin_trained_(run)
    reports = run.steps(16, [0, 1])
    causes = [report.verdict.cause for report in reports]
    assert causes[0] == "overflow"
    assert causes[-1] is None
    assert run.scale < 2.0**24


def test_a_norm_above_the_limit_is_refused_and_below_it_clipped(make_run):
    run = make_run(rank=RANK, loss=PLAIN, guards={"skip_grad_norm": 1e-6, "skip_rule": "fixed"})
    assert {report.verdict.cause for report in run.steps(3, [0, 1])} == {"norm"}
    run = make_run(rank=RANK, loss=PLAIN, guards={"max_grad_norm": 1e-3})
    assert run.steps(1, [0, 1])[0].grad_norm > 1e-3
    assert norm_of(run.applied_gradients) == pytest.approx(1e-3, rel=1e-3)
