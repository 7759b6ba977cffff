"""Arithmetic on logit tiles against its definition in float64."""

import math

import pytest
import torch

from sar_kd.models import logit_tiles
from sar_kd.models.lm_head import LazyLogits, LMHead
from sar_kd.models.logit_tiles import exp_, flat_view, logsumexp_per_position, padded_width
from sar_kd.runtime.precision import MASKED_LOGIT
from tests.helpers.lm_heads import FLOAT32


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_logsumexp_of_the_largest_float16_logits_is_exact(temperature):
    tile = torch.where(torch.randn(37, 35) > 0, 6e4, -6e4)
    expected = (tile.double() / temperature).logsumexp(0)
    torch.testing.assert_close(logsumexp_per_position(tile, temperature).double(), expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("bound", [5.0, math.inf])
def test_the_logsumexp_over_blocks_is_that_of_the_whole_vocabulary(monkeypatch, temperature, bound):
    """The largest logit comes first, in the middle or last, and a whole block may be masked."""
    monkeypatch.setitem(logit_tiles._BLOCK, "cpu", 4 * 6)
    tile = 20.0 * torch.randn(21, 6, generator=torch.Generator().manual_seed(0))
    tile[0, 0], tile[9, 1], tile[20, 2] = 90.0, 90.0, 90.0
    tile[:8, 3] = tile[:, 4] = MASKED_LOGIT
    tile[17, 5] = math.nan
    expected = (tile.double().clamp(-bound, bound) / temperature).logsumexp(0)
    found = logsumexp_per_position(tile, temperature, bound)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("count", [1, 31, 33, 40])
def test_a_padded_tile_holds_the_logits_and_flat_view_addresses_them(count):
    states = torch.randn(count, 24)
    weight, bias = torch.randn(50, states.shape[1]), torch.randn(50)
    tile = LazyLogits(states, LMHead(weight, bias), FLOAT32).tile(slice(None))
    torch.testing.assert_close(tile, (states @ weight.T + bias).T)
    assert tile.stride(0) == padded_width(count)
    flat_view(tile)[7 * tile.stride(0) + count - 1] = 5.0
    assert tile[7, count - 1] == 5.0


def test_exp_is_exact_zero_where_it_would_be_no_normal_number():
    values = torch.cat([torch.linspace(-86, 80, 999), torch.tensor([-88.0, -1e30, -math.inf, math.inf, math.nan])])
    found, expected = exp_(values.clone()), values.double().exp()
    torch.testing.assert_close(found[:999].double(), expected[:999], rtol=1e-6, atol=0)
    assert found[999:1002].tolist() == [0.0, 0.0, 0.0]
    assert found[1002] == math.inf
    assert found[1003].isnan()
