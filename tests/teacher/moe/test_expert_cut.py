"""The check of a cut of experts: what the whole model says when its routers choose among the kept ones."""

import pytest
import torch
from torch import nn

from sar_kd.errors import UsageError
from sar_kd.teacher.moe.discovery import find_routers
from sar_kd.teacher.moe.expert_cut import keep_experts_, without_experts
from tests.helpers.cut_models import build_to_cut

IDS = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "qwen3_next"])
@torch.no_grad()
def test_masked_routers_say_what_the_cut_model_says_and_not_what_another_cut_does(name):
    model = build_to_cut(name, 60)
    specs = find_routers(model)
    kept = [torch.tensor([0, 2, 3]) if i % 2 else torch.tensor([1, 2, 3]) for i in range(len(specs))]
    whole = model(input_ids=IDS, use_cache=False).logits
    with without_experts("it", specs, kept):
        expected = model(input_ids=IDS, use_cache=False).logits
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, whole)  # as it was
    assert not torch.allclose(expected, whole, rtol=1e-3)
    keep_experts_("it", model, specs, kept)
    found = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    other = build_to_cut(name, 60)
    keep_experts_("it", other, find_routers(other), kept[1:] + kept[:1])
    assert not torch.allclose(other(input_ids=IDS, use_cache=False).logits, expected, rtol=1e-3)


def test_a_router_whose_logits_are_not_found_is_named():
    model = build_to_cut("mixtral", 60)
    specs = find_routers(model)
    for spec in specs:
        weight = nn.Parameter(spec.module.weight.detach().clone())
        spec.module.forward = lambda states, weight=weight: _route(
            torch.einsum("bd,ed->be", states.flatten(0, -2), weight)
        )
    kept = [torch.tensor([0, 1, 2])] * len(specs)
    message = "it: the logits of its MixtralTopKRouter are not found; leave out --experts"
    with pytest.raises(UsageError, match=message), without_experts("it", specs, kept), torch.no_grad():
        model(input_ids=IDS, use_cache=False)


def _route(logits):
    weights, indices = logits.softmax(-1).topk(2)
    return logits, weights / weights.sum(-1, keepdim=True), indices
