"""Dtypes and the loss scale: float16 matmuls on a CPU, the scaler's floor and ceiling, float32 weights."""

import functools
import random
import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sar_kd.config.sections import MAX_LOSS_SCALE, OptimConfig, PrecisionConfig
from sar_kd.errors import UsageError
from sar_kd.runtime.precision import Float16MatmulsOnCpu, Precision, setup_precision
from sar_kd.training.guards import Verdict
from sar_kd.training.optimizer import build_optimizer

CPU = torch.device("cpu")
APPLIED = Verdict(True, None, 2.0)


def _float16_tensor(*shape):
    return torch.randn(shape).half()


# Functions and the shapes of their operands: `addmm` and `baddbmm` add their first operand to the product.
MATMULS = {
    "mm": (torch.mm, ((5, 300), (300, 7))),
    "addmm": (torch.addmm, ((5, 7), (5, 300), (300, 7))),
    "bmm": (torch.bmm, ((3, 5, 300), (3, 300, 7))),
    "baddbmm": (torch.baddbmm, ((3, 5, 7), (3, 5, 300), (3, 300, 7))),
}
EVERY_MATMUL = pytest.mark.parametrize(("matmul", "shapes"), MATMULS.values(), ids=MATMULS.keys())


def _skipped(cause):
    return Verdict(False, cause, 2.0)


def _float16(scale=1024.0):
    return Precision(CPU, torch.float16, scale)


def _attempt(precision, verdict):
    """One step's worth of calls on a scalar weight, then `update_`; the loss scale that follows."""
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    bad = verdict.cause in ("forward", "overflow", "gradient")
    precision.backward(weight * (torch.inf if bad else 1.0))
    precision.unscale_(optimizer)
    precision.update_(verdict.cause, precision.loss_scale.item())
    return precision.loss_scale.item()


@EVERY_MATMUL
def test_a_float16_matmul_is_the_float32_matmul_rounded_once(matmul, shapes):
    operands = [_float16_tensor(*shape) for shape in shapes]
    with Float16MatmulsOnCpu():
        result = matmul(*operands)
    assert result.dtype is torch.float16
    assert torch.equal(result, matmul(*(operand.float() for operand in operands)).half())


@EVERY_MATMUL
def test_its_gradients_are_matmuls_rounded_once_too(matmul, shapes):
    halves = [_float16_tensor(*shape).requires_grad_() for shape in shapes]
    floats = [half.detach().float().requires_grad_() for half in halves]
    with Float16MatmulsOnCpu():
        result = matmul(*halves)
        seed = torch.randn_like(result)
        result.backward(seed)
    matmul(*floats).backward(seed.float())
    assert all(torch.equal(half.grad, full.grad.half()) for half, full in zip(halves, floats, strict=True))


def test_scaled_matmuls_keep_their_factors():
    operands = [_float16_tensor(5, 7), _float16_tensor(5, 300), _float16_tensor(300, 7)]
    with Float16MatmulsOnCpu():
        result = torch.addmm(*operands, beta=0.5, alpha=0.125)
    assert torch.equal(result, torch.addmm(*(o.float() for o in operands), beta=0.5, alpha=0.125).half())


def test_a_float16_matmul_overflows_where_a_gpus_does():
    with Float16MatmulsOnCpu():
        result = torch.mm(torch.full((1, 2), 300.0).half(), torch.full((2, 1), 300.0).half())
    assert result.item() == torch.inf


def test_a_sum_may_leave_the_range_of_float16_on_its_way_as_on_a_gpu():
    with Float16MatmulsOnCpu():
        result = torch.mm(torch.tensor([[300.0, -300.0, 1.0]]).half(), torch.tensor([[300.0], [300.0], [7.0]]).half())
    assert result.item() == 7.0


def test_float16_attention_is_the_float32_attention_rounded_once():
    q, k, v = (_float16_tensor(1, 2, 9, 16).requires_grad_() for _ in range(3))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    with Float16MatmulsOnCpu():
        result = attention(q, k, v)
        result.sum().backward()
    expected = attention(*wide)
    expected.sum().backward()
    assert torch.equal(result, expected.half())
    for half, float32 in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(half.grad.float(), float32.grad, rtol=5e-3, atol=5e-3)


class _Recorder(TorchDispatchMode):
    """The dtypes in which matmuls and attentions reach their kernels."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if re.search(r"mm\b|grouped_mm|attention", func.name()):
            dtypes = {arg.dtype for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()}
            self.seen.setdefault(func.name(), set()).update(dtypes)
        return func(*args, **(kwargs or {}))


def test_no_matmul_of_a_mixture_of_experts_reaches_a_cpus_float16_kernels(make_teacher):
    model = make_teacher(64, num_hidden_layers=1).half().requires_grad_()
    precision, recorder = _float16(), _Recorder()
    with recorder:
        with precision.autocast():
            logits = model(input_ids=torch.arange(12)[None], use_cache=False).logits
        precision.backward(logits.float().logsumexp(-1).mean())
    assert logits.dtype is torch.float16
    assert {"aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= recorder.seen.keys()
    assert any("grouped_mm" in name for name in recorder.seen)
    assert not {name for name, dtypes in recorder.seen.items() if torch.float16 in dtypes}


@EVERY_MATMUL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matmuls_of_other_dtypes_are_left_alone(matmul, shapes, dtype):
    operands = [torch.randn(shape).to(dtype) for shape in shapes]
    expected = matmul(*operands)
    with Float16MatmulsOnCpu():
        result = matmul(*operands)
    assert result.dtype is dtype
    assert torch.equal(result, expected)


def test_outside_the_context_torch_is_as_it_was():
    a, b = _float16_tensor(5, 300), _float16_tensor(300, 7)
    before = a @ b
    with Float16MatmulsOnCpu():
        a @ b
    assert torch.equal(a @ b, before)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_the_context_ends_with_an_error_inside_it():
    with pytest.raises(ZeroDivisionError), _float16().autocast():
        _ = 1 / 0
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_autocast_computes_in_the_runs_dtype(dtype):
    layer = torch.nn.Linear(4, 4)
    with Precision(CPU, dtype, 1.0).autocast():
        assert layer(torch.ones(1, 4)).dtype is dtype


@pytest.mark.parametrize("cause", ["overflow", "gradient"])
def test_an_overflow_halves_the_loss_scale(cause):
    assert _attempt(_float16(1024.0), _skipped(cause)) == 512.0


@pytest.mark.parametrize("cause", ["overflow", "gradient"])
def test_the_loss_scale_never_falls_below_1(cause):
    assert _attempt(_float16(1.0), _skipped(cause)) == 1.0


def test_a_scale_between_1_and_2_falls_to_1():
    assert _attempt(_float16(1.5), _skipped("overflow")) == 1.0


@pytest.mark.parametrize("cause", ["forward", "no_targets"])
def test_a_skip_that_does_not_depend_on_the_scale_leaves_it(cause):
    assert _attempt(_float16(1024.0), _skipped(cause)) == 1024.0


@pytest.mark.parametrize("verdict", [APPLIED, _skipped("norm")], ids=["applied", "norm"])
def test_the_scale_doubles_after_enough_finite_gradients(verdict):
    precision = _float16(1024.0)
    scales = [_attempt(precision, verdict) for _ in range(2000)]
    assert scales[1998:] == [1024.0, 2048.0]


def test_the_loss_scale_never_rises_above_its_ceiling():
    precision = _float16(MAX_LOSS_SCALE)
    assert {_attempt(precision, APPLIED) for _ in range(2001)} == {MAX_LOSS_SCALE}


def test_the_scale_falls_from_its_ceiling_on_an_overflow():
    assert _attempt(_float16(MAX_LOSS_SCALE), _skipped("overflow")) == MAX_LOSS_SCALE / 2


def test_gradients_are_scaled_in_backward_and_unscaled_once():
    precision, weight = _float16(1024.0), torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight])
    precision.backward(weight * 3.0)
    assert weight.grad.item() == 3.0 * 1024.0
    precision.unscale_(optimizer)
    assert weight.grad.item() == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_float16_scales_the_loss(dtype):
    precision, weight = Precision(CPU, dtype, 1024.0), torch.nn.Parameter(torch.ones(()))
    precision.backward(weight * 3.0)
    assert weight.grad.item() == 3.0
    assert precision.loss_scale.item() == 1.0
    assert _attempt(precision, _skipped("gradient")) == 1.0


def test_the_scale_and_its_growth_survive_a_checkpoint():
    precision, other = _float16(1024.0), _float16(4.0)
    for _ in range(1999):
        _attempt(precision, APPLIED)
    other.load_state_dict(precision.state_dict())
    assert other.loss_scale.item() == 1024.0
    assert _attempt(other, APPLIED) == 2048.0


def test_random_numbers_go_on_after_a_checkpoint():
    precision = _float16()
    state = precision.state_dict()
    expected = torch.rand(3)
    torch.manual_seed(99)
    precision.load_state_dict(state)
    assert torch.equal(torch.rand(3), expected)


def test_random_numbers_drawn_in_a_fork_change_none_that_follow_even_after_an_error():
    def draw_and_fail():
        with _float16().fork_rng():
            torch.rand(3)
            raise ZeroDivisionError

    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_fixes_every_generator():
    def draw():
        setup_precision(PrecisionConfig(device="cpu"), 5)
        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draw() == draw()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("auto", torch.float32), ("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_a_cpu_computes_in_float32_by_default(name, dtype):
    assert setup_precision(PrecisionConfig(device="cpu", model_dtype=name), 0).dtype is dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UsageError, match=f"^--device {name}: .*--device cpu"):
        setup_precision(PrecisionConfig(device=name), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stay_float32_through_a_step(dtype, make_student):
    student, precision = make_student(64, num_hidden_layers=1), Precision(CPU, dtype, 1024.0)
    optimizer = build_optimizer(student, OptimConfig())
    before = [parameter.detach().clone() for parameter in student.parameters()]
    with precision.autocast():
        logits = student(input_ids=torch.arange(8)[None], use_cache=False).logits
    assert logits.dtype is dtype
    precision.backward(logits.float().logsumexp(-1).mean())
    precision.unscale_(optimizer)
    optimizer.step()
    assert all(p.dtype is torch.float32 and p.grad.dtype is torch.float32 for p in student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_float16_weights_are_not_optimised(make_student):
    with pytest.raises(AssertionError, match="float32"):
        build_optimizer(make_student(64, num_hidden_layers=1).half(), OptimConfig())
