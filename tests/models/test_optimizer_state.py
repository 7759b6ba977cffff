"""What the plan and a checkpoint's check take for an optimizer's state is what the optimizer has after a step."""

import pytest
import torch
from torch import nn

from sar_kd.config.sections import OptimConfig
from sar_kd.models.optimizer_state import state_bytes, state_of, update_bytes
from sar_kd.runtime.environment import is_installed
from sar_kd.training.optimizer import build_optimizer

NEEDS_BITSANDBYTES = pytest.mark.skipif(not is_installed("bitsandbytes"), reason="needs bitsandbytes")
SHAPES = [(70, 60), (5, 7), (9,), (5000,), (3, 40, 50)]


@pytest.mark.parametrize("name", ["adamw", "adafactor", pytest.param("adamw8bit", marks=NEEDS_BITSANDBYTES)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_state_of_every_shape_is_the_optimizers_own(name, shape):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape))
    module.weight.grad = torch.randn(shape)
    optimizer = build_optimizer(module, OptimConfig(optimizer=name))
    optimizer.step()
    own = {key: value for key, value in optimizer.state[module.weight].items() if key != "step"}
    assert {key: (tuple(value.shape), value.dtype) for key, value in own.items()} == state_of(module.weight, name)
    assert state_bytes(module.weight, name) == sum(value.nbytes for value in own.values())


@pytest.mark.parametrize(("name", "expected"), [("adamw", 8.0), ("adamw8bit", 2.0 + 8 / 256), ("adafactor", 0.0)])
def test_the_bytes_of_a_weight_are_those_of_the_page(name, expected):
    weight = torch.empty(4096, 4096, device="meta")
    assert state_bytes(weight, name) / weight.numel() == pytest.approx(expected, abs=2.5e-3)


def test_an_update_holds_tensors_of_the_largest_parameter():
    for device, expected in (("meta", 0), ("cpu", 20_000)):
        parameters = [torch.empty(4, 4, device=device), torch.empty(100, 10, device=device)]
        assert update_bytes(parameters, "adafactor") == 4000
        assert update_bytes(parameters, "adamw") == 0
        assert update_bytes(parameters, "adamw8bit") == expected
