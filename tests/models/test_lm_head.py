"""LM heads verified by running the model, and models whose logits are computed in another way."""

import math

import pytest
import torch
import transformers
from torch import nn

from sar_kd.models.lm_head import LazyLogits, LMHead, LMHeads, backbone_of
from sar_kd.runtime.precision import MASKED_BELOW, MASKED_LOGIT, Precision
from tests.helpers.lm_heads import FLOAT32

SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, intermediate_size=24)),
    "tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, intermediate_size=24, tie_word_embeddings=True)
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL, intermediate_size=24)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=32)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **SMALL, intermediate_size=24, head_dim=8, num_key_value_heads=1, final_logit_softcapping=3.0
        )
    ),
    "granite": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SMALL, intermediate_size=24, logits_scaling=8.0)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**SMALL, intermediate_size=24, logit_scale=0.0625)
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **SMALL, intermediate_size=24, moe_intermediate_size=8, head_dim=8, num_key_value_heads=2, num_experts=4,
            num_experts_per_tok=2,
        )
    ),
}  # fmt: skip
INPUT_IDS = torch.arange(30).view(2, 15)


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # large enough for a softcap or a scale to matter
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            head.bias.normal_()
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_tile_computed_from_hidden_states_is_the_models_logits(name):
    model = _model(name)
    head = LMHeads(FLOAT32).of(model)
    assert head is not None
    expected = model(input_ids=INPUT_IDS, use_cache=False).logits.flatten(0, 1)
    states = backbone_of(model)(input_ids=INPUT_IDS, use_cache=False).last_hidden_state.flatten(0, 1)
    logits = LazyLogits(states, head, FLOAT32)
    torch.testing.assert_close(logits.tile(slice(None)).T, expected, rtol=1e-5, atol=1e-5)
    assert logits.vocab_size == expected.shape[1]


def test_scale_softcap_and_bias_of_a_head_are_found():
    found = {name: LMHeads(FLOAT32).of(_model(name)) for name in ("llama", "gemma2", "granite", "cohere", "phi")}
    assert {name: head.scale for name, head in found.items() if head.scale != 1.0} == {
        "granite": 0.125,
        "cohere": 0.0625,
    }
    assert {name: head.softcap for name, head in found.items() if head.softcap} == {"gemma2": 3.0}
    assert [name for name, head in found.items() if head.bias is not None] == ["phi"]


def test_a_tied_head_is_the_embedding_itself():
    model = _model("tied")
    assert LMHeads(FLOAT32).of(model).weight is model.get_input_embeddings().weight


def test_a_head_with_a_forward_hook_is_not_used():
    model, heads = _model("llama"), LMHeads(FLOAT32)
    assert heads.of(model) is not None
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out)
    assert heads.of(model) is None
    handle.remove()
    assert heads.of(model) is not None


class _Adapted(nn.Module):
    """A head with a low-rank adapter, which is zero at first."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(16, 2, bias=False), nn.Linear(2, 60, bias=False)
        self.up.weight.data.zero_()

    @property
    def weight(self):
        return self.base.weight

    def forward(self, states):
        return self.base(states) + self.up(self.down(states))


def test_a_head_with_more_than_a_weight_and_a_bias_is_not_used():
    model = _model("llama")
    model.lm_head = _Adapted(model.lm_head)
    assert LMHeads(FLOAT32).of(model) is None


@pytest.mark.parametrize(
    "change", [lambda z: z * 1.5, lambda z: z.roll(1, -1), lambda z: z + 0.5], ids=["x", "roll", "+"]
)
def test_a_model_that_changes_its_logits_after_the_head_is_noticed(change):
    model = _model("llama")
    forward = model.forward

    def changed(**inputs):
        out = forward(**inputs)
        out.logits = change(out.logits)
        return out

    model.forward = changed
    assert LMHeads(FLOAT32).of(model) is None


HALF = Precision(torch.device("cpu"), torch.float16, 1.0)


@pytest.mark.parametrize("precision", [FLOAT32, HALF], ids=["float32", "float16"])
@torch.no_grad()
def test_minus_infinity_in_a_heads_bias_is_a_masked_logit_of_its_tile(precision):
    model = _model("phi")
    model.lm_head.bias[[3, 50]] = -math.inf
    head = LMHeads(precision).of(model)
    with precision.autocast():
        expected = model(input_ids=INPUT_IDS, use_cache=False).logits.flatten(0, 1)
        states = backbone_of(model)(input_ids=INPUT_IDS, use_cache=False).last_hidden_state.flatten(0, 1)
    assert (expected[:, [3, 50]] == -math.inf).all()
    tolerance = 1e-5 if precision is FLOAT32 else 2e-2
    for logits in (LazyLogits(states, head, precision), LazyLogits(expected, None, precision)):
        tile = logits.tile(slice(None))
        assert ((tile < MASKED_BELOW) & (tile > 1.1 * MASKED_LOGIT)).any(1).nonzero().flatten().tolist() == [3, 50]
        torch.testing.assert_close(
            tile.T.where(tile.T > MASKED_BELOW, -math.inf), expected.float(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("change", [lambda z: z * 1.5, lambda z: z.roll(1, -1)], ids=["x", "roll"])
def test_a_head_that_masks_a_token_is_verified_on_the_others(change):
    model = _model("phi")
    model.lm_head.bias.data[3] = -math.inf
    assert LMHeads(FLOAT32).of(model) is not None
    forward = model.forward

    def changed(**inputs):
        out = forward(**inputs)
        out.logits = change(out.logits)
        return out

    model.forward = changed
    assert LMHeads(FLOAT32).of(model) is None


def test_a_softcap_makes_a_masked_token_one_of_the_lowest_logit():
    states, weight = torch.randn(4, 8), torch.randn(20, 8)
    bias = torch.zeros(20).index_fill_(0, torch.tensor([7]), -math.inf)
    tile = LazyLogits(states, LMHead(weight, bias, 0.5, 3.0), FLOAT32).tile(slice(None))
    expected = 3.0 * torch.tanh(0.5 * (states @ weight.T + bias) / 3.0)
    torch.testing.assert_close(tile.T, expected)
    assert (tile[7] == -3.0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 5])
def test_whole_logits_are_masked_in_the_tile_alone(dtype, count):
    """Also by the lowest number of float32, which some models use for it."""
    logits = torch.randn(count, 60).to(dtype)
    logits[:, 7] = -math.inf
    logits[:, 9] = torch.finfo(dtype).min
    former = logits.clone()
    tile = LazyLogits(logits, None, FLOAT32).tile(slice(None))
    assert (tile[7] == MASKED_LOGIT).all()
    assert (tile[9] == (-65504.0 if dtype is torch.float16 else MASKED_LOGIT)).all()
    tile.zero_()
    assert torch.equal(logits, former)


def test_a_logit_below_the_range_of_half_is_masked():
    states, weight = torch.full((2, 8), 300.0), torch.full((20, 8), -100.0)
    weight[1:] = torch.randn(19, 8)
    tile = LazyLogits(states, LMHead(weight), HALF).tile(slice(None))
    assert (tile[0] == MASKED_LOGIT).all()
    assert (tile[1:].abs() < 65504).all()


def test_a_model_that_changes_its_states_before_the_head_is_noticed():
    model = _model("llama")
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    assert LMHeads(FLOAT32).of(model) is None


def test_verifying_a_head_keeps_the_random_state_and_the_training_mode():
    model = _model("gpt2").train()
    state = torch.get_rng_state()
    assert LMHeads(FLOAT32).of(model) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
