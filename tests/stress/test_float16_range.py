"""Families that pass float16's range: tiny models of the real classes, each driven beyond 65,504 in one place.

With `compute_in_range_` every scenario is near float32; plain autocast is not finite, so that none of them is idle.
"""

import pytest
import torch

from sar_kd.models.half_precision import compute_in_range_
from sar_kd.runtime.precision import Precision
from tests.helpers.float16_families import build_family, exceed_

CPU = torch.device("cpu")
FLOAT32, FLOAT16 = (Precision(CPU, dtype, 1.0) for dtype in (torch.float32, torch.float16))
IDS = torch.arange(3, 51).reshape(2, 24)

MAX_KL = 2e-3
"""Nats, of the position that differs most from float32"""

MAX_GRADIENT_ERROR = 0.05
"""L2 norm of the difference from float32's gradient, over that of the gradient"""

PRODUCTS = ("gemma3", "gemma3n", "gemma4", "qwen3_5", "qwen3_moe", "glm4_moe", "llama")
READ_RESIDUAL = ("gemma3n", "gemma4", "olmo2")  # their layers read the residual stream itself, without a norm


def _logits(model, precision):
    with precision.autocast():
        return model(input_ids=IDS, use_cache=False).logits.float()


def _largest_kl(true, found) -> float:
    true, found = true.double().log_softmax(-1), found.double().log_softmax(-1)
    return (true.exp() * (true - found)).sum(-1).max().item()


def _gradient(model, precision):
    """Of the cross-entropy, all of it in one vector, without the loss scale."""
    loss = torch.nn.functional.cross_entropy(_logits(model, precision)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    precision.backward(loss)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return gradient.double() / precision.loss_scale.item()


def _gradient_at_a_finite_scale(model):
    """From the loss scale with which a run starts downwards, as its steps search it; None if none is finite."""
    for exponent in range(16, -1, -1):
        gradient = _gradient(model, Precision(CPU, torch.float16, 2.0**exponent))
        if gradient.isfinite().all():
            return gradient
    return None


@pytest.mark.parametrize(
    ("name", "place"),
    [*((name, "product") for name in PRODUCTS), *((name, "residual") for name in READ_RESIDUAL),
     ("gemma3", "residual"), ("gpt_neox", "residual"), ("gpt_oss", "scores")],
)  # fmt: skip
@torch.no_grad()
def test_a_half_teacher_beyond_the_range_of_half_says_what_it_says_in_float32(name, place):
    teacher = build_family(name)
    exceed_(teacher, place)
    true = _logits(teacher, FLOAT32)
    assert not _logits(teacher.half(), FLOAT16).isfinite().all()
    compute_in_range_(teacher)
    assert _largest_kl(true, _logits(teacher, FLOAT16)) < MAX_KL


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, "product") for name in PRODUCTS),
        *((name, "residual") for name in READ_RESIDUAL),
        ("gpt_oss", "scores"),
    ],
)
def test_a_student_beyond_the_range_of_half_has_the_logits_and_the_gradient_of_float32(name, place):
    student = build_family(name)
    exceed_(student, place)
    true, true_gradient = _logits(student, FLOAT32).detach(), _gradient(student, FLOAT32)
    # The experts of a student are multiplied in float32 even so: a grouped product is no part of autocast.
    assert _logits(student, FLOAT16).isfinite().all() == (name == "qwen3_moe")
    compute_in_range_(student)
    assert _largest_kl(true, _logits(student, FLOAT16).detach()) < MAX_KL
    gradient = _gradient_at_a_finite_scale(student)
    assert gradient is not None
    assert (gradient - true_gradient).norm() < MAX_GRADIENT_ERROR * true_gradient.norm()


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe", "glm4_moe"])
def test_where_only_the_backward_passes_the_range_a_lower_loss_scale_is_enough(name):
    student = build_family(name)
    exceed_(student, "gradient")
    compute_in_range_(student)
    true_gradient = _gradient(student, FLOAT32)
    assert _logits(student, FLOAT16).isfinite().all()
    assert not _gradient(student, Precision(CPU, torch.float16, 65536.0)).isfinite().all()
    gradient = _gradient_at_a_finite_scale(student)
    assert gradient is not None
    assert (gradient - true_gradient).norm() < MAX_GRADIENT_ERROR * true_gradient.norm()
