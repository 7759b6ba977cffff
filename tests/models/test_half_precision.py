"""Activations beyond 65,504 while matrix products are half: each rule against float64, and where it applies."""

import copy

import pytest
import torch
import transformers
from torch import nn

from sar_kd.config.command_line import parse
from sar_kd.config.presets import STABLE
from sar_kd.models.half_precision import compute_in_range_, range_report
from sar_kd.models.loading import LoadedModels, load_models
from sar_kd.models.memory_saving import recompute_activations_
from sar_kd.runtime.precision import Precision, setup_precision
from tests.helpers.float16_families import build_family, exceed_

FLOAT16 = Precision(torch.device("cpu"), torch.float16, 1.0)
IDS = torch.arange(3, 27)[None]


class Gated(nn.Module):
    """down(gate(n) * up(n)), n the normalised x, as feed-forward layers have it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.norm(x)
        return self.down(self.gate(x) * self.up(x))


class Model(nn.Module):
    """The parts of a transformers model that are looked at."""

    def __init__(self, block):
        super().__init__()
        self.embeddings, self.block, self.head = nn.Embedding(4, 8), block, nn.Linear(8, 4)
        self.config = transformers.LlamaConfig()

    def get_input_embeddings(self):
        return self.embeddings

    def get_output_embeddings(self):
        return self.head


def _gated(size: float) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    block = Gated()
    for layer in (block.gate, block.up):
        layer.weight.data.mul_(size)
    for parameter in block.parameters():  # the same numbers in half
        parameter.data = parameter.data.half().float()
    compute_in_range_(Model(block))
    return block, torch.randn(5, 8).half().float()


@pytest.mark.parametrize("size", [1.0, 3000.0])
def test_a_gated_product_beyond_half_and_its_gradients_are_those_of_float64(size):
    block, x = _gated(size)
    exact = copy.deepcopy(block).double()
    exact.forward = Gated.forward.__get__(exact)
    x, x64 = x.requires_grad_(), x.detach().double().requires_grad_()
    with FLOAT16.autocast():
        out = block(x)
    out64 = exact(x64)
    assert out.dtype is torch.float32
    assert (out64.abs().max() > 65504) == (size > 1)
    assert torch.allclose(out.double(), out64, rtol=0, atol=2e-3 * out64.abs().max().item())
    weights = torch.randn_like(out) / out64.abs().max().item()
    FLOAT16.backward((out * weights).sum())
    (out64 * weights.double()).sum().backward()
    pairs = [(x, x64), *zip(block.parameters(), exact.parameters(), strict=True)]
    for ours, true in pairs:
        assert torch.allclose(ours.grad.double(), true.grad, rtol=0, atol=4e-3 * true.grad.abs().max().item())


def test_where_nothing_grows_the_values_are_those_of_plain_autocast_bit_for_bit():
    block, x = _gated(1.0)
    plain = copy.deepcopy(block)
    plain.forward = Gated.forward.__get__(plain)
    plain.down.bias.data.zero_()
    block.down.bias.data.zero_()  # which is added in float32, not before the rounding
    with FLOAT16.autocast():
        assert torch.equal(block(x), plain(x).float())


def test_rows_are_scaled_each_by_its_own_power_of_two():
    block, x = _gated(3000.0)
    with FLOAT16.autocast():
        together = block(x)
        alone = torch.cat([block(row) for row in x.split(1)])
    assert torch.equal(together, alone)


def test_outside_autocast_and_in_bfloat16_a_prepared_model_computes_as_before():
    model, before = build_family("llama"), build_family("llama")
    compute_in_range_(model)
    assert torch.equal(model(IDS).logits, before(IDS).logits)
    half, half_before = copy.deepcopy(model).bfloat16(), copy.deepcopy(before).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half(IDS).logits, half_before(IDS).logits)


def test_a_second_call_changes_nothing():
    model = build_family("gemma3")
    compute_in_range_(model)
    forwards = {name: module.forward for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    compute_in_range_(model)
    assert {name: module.forward for name, module in model.named_modules()} == forwards
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks


@pytest.mark.parametrize("name", ["gemma4", "qwen3_moe"])
def test_recomputed_activations_give_the_same_gradients(name):
    gradients = []
    for recomputes in (False, True):
        model = build_family(name)
        exceed_(model, "product")
        compute_in_range_(model)
        if recomputes:
            recompute_activations_(model)
        with FLOAT16.autocast():
            loss = model(IDS).logits.float().log_softmax(-1).square().mean()
        FLOAT16.backward(loss)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_no_float32_copy_of_the_factors_is_kept_for_backward():
    block, x = _gated(1.0)
    kept = []
    with FLOAT16.autocast(), torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        block(x.requires_grad_())
    wide = [tensor for tensor in kept if tensor.dtype is torch.float32 and tensor.shape[-1] == 16]
    assert wide == []


@pytest.mark.parametrize(
    ("name", "family", "num_modules", "eager"),
    [("llama", "llama", 3, False), ("gemma4", "gemma4_text", 7, False), ("qwen3_moe", "qwen3_moe", 3, False),
     ("gpt_oss", "gpt_oss", 6, True)],
)  # fmt: skip
def test_the_report_counts_the_modules_and_works_on_the_meta_device(name, family, num_modules, eager):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(build_family(name).config)
    assert range_report(model) == (family, num_modules, eager)


@torch.no_grad()
def test_a_half_teacher_with_layer_norms_takes_a_float32_residual_stream():
    config = transformers.GPTNeoXConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = transformers.GPTNeoXForCausalLM(config).eval()
    true = model(IDS).logits
    compute_in_range_(model.half())
    with FLOAT16.autocast():
        found = model(IDS, output_hidden_states=True)
    assert {states.dtype for states in found.hidden_states} == {torch.float32}
    assert torch.allclose(found.logits.float(), true, atol=2e-3)


def test_both_models_of_a_float16_run_are_prepared_and_those_of_a_float32_run_are_not(byte_tokenizer, make_student):
    for dtype in ("float16", "float32"):
        config = parse(STABLE, ["--model_dtype", dtype, "--device", "cpu"])
        pairs = {
            f"{role}_model": (make_student(len(byte_tokenizer)), byte_tokenizer) for role in ("teacher", "student")
        }
        precision = setup_precision(config.precision, 0)
        models = load_models(config, precision, loaded=LoadedModels(pairs))
        for model in (models.teacher, models.student):
            with precision.autocast():
                states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
            assert {value.dtype for value in states} == {torch.float32}
            prepared = any(hasattr(module, "_products_in_range") for module in model.modules())
            assert prepared == (dtype == "float16")
