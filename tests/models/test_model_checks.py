"""Models that read later tokens are refused, before and after their weights are loaded; causal ones never."""

import pytest
import torch
import transformers

from sar_kd.errors import UsageError
from sar_kd.models.model_checks import (
    learn_pad_row_,
    require_causal,
    require_finite,
    require_lm_head,
    require_trainable,
    stop_ids_of,
)
from sar_kd.runtime.precision import Precision

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
BOTH_WAYS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.RobertaConfig(**SIZES),
    "electra": lambda: transformers.ElectraConfig(**SIZES, embedding_size=32),
}
CAUSAL = {
    "bert as a decoder": lambda: transformers.BertConfig(**SIZES, is_decoder=True),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=32),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "bloom": lambda: transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=2),
    "mistral": lambda: transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16, sliding_window=4),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **EXPERTS),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, **EXPERTS, head_dim=16, sliding_window=4),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=60, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0
    ),
}


def _model(settings, dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(settings()).to(dtype)


def _precision(dtype):
    return Precision(torch.device("cpu"), dtype, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", BOTH_WAYS)
def test_a_model_that_reads_later_tokens_is_refused(family, dtype):
    model = _model(BOTH_WAYS[family], dtype)
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)  # as large as trained ones
    with pytest.raises(
        UsageError, match=r"--student_model x: \w+ is not causal, its logits depend on tokens that come"
    ):
        require_causal("--student_model x", model, _precision(dtype))
    with pytest.raises(UsageError, match="is not causal"):
        require_lm_head("--student_model x", model.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_model_passes_in_either_dtype(family, dtype):
    model = _model(CAUSAL[family], dtype).train()
    require_causal("x", model, _precision(dtype))
    assert model.training
    require_lm_head("x", model.to("meta"))


def test_attention_over_the_whole_text_is_noticed_by_the_logits_alone():
    model = _model(CAUSAL["llama"])
    forward = model.model.forward

    def leaking(**inputs):
        out = forward(**inputs)
        out.last_hidden_state = out.last_hidden_state + 0.01 * out.last_hidden_state.mean(1, keepdim=True)
        return out

    model.model.forward = leaking
    require_lm_head("x", model)
    with pytest.raises(UsageError, match="is not causal"):
        require_causal("x", model, _precision(torch.float32))


def test_the_check_changes_no_random_state():
    model, state = _model(CAUSAL["mixtral"]), torch.get_rng_state()
    require_causal("x", model, _precision(torch.float16))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (float("nan"), torch.float16, "holds 1 values that are not finite: its file is damaged"),
        (float("inf"), torch.float32, "holds 1 values that are not finite: its file is damaged"),
        (1e5, torch.float16, "is beyond the range of float16; use --model_dtype float32"),
    ],
)
def test_a_weight_that_is_not_finite_is_named_with_its_cause(value, dtype, expected):
    model = _model(CAUSAL["llama"])
    require_finite("x", model, torch.float32)
    model.model.norm.weight.data[3] = value
    with pytest.raises(UsageError, match=f"x: its weight model.norm.weight {expected}"):
        require_finite("x", model.to(dtype), dtype)


def _masking(value=-float("inf")):
    """A model with a bias in its LM head, which masks a token."""
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES))
    model.lm_head.bias.data[7] = value
    return model


def test_minus_infinity_masks_a_token_in_the_heads_bias_and_is_damage_anywhere_else():
    require_finite("x", _masking(), torch.float32)
    for value in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"weight lm_head\.bias holds 1 values"):
            require_finite("x", _masking(value), torch.float32)
    model = _masking()
    model.model.layers[0].mlp.fc1.bias.data[3] = -float("inf")
    with pytest.raises(UsageError, match=r"weight model\.layers\.0\.mlp\.fc1\.bias holds 1 values"):
        require_finite("x", model, torch.float32)


def test_a_model_that_masks_a_token_is_checked_for_causality_by_the_others():
    model = _masking()
    require_causal("x", model, _precision(torch.float32))
    forward = model.model.forward

    def leaking(**inputs):
        out = forward(**inputs)
        out.last_hidden_state = out.last_hidden_state + 0.01 * out.last_hidden_state.mean(1, keepdim=True)
        return out

    model.model.forward = leaking
    with pytest.raises(UsageError, match="is not causal"):
        require_causal("x", model, _precision(torch.float32))


@pytest.mark.parametrize("ids", [[2, 60], -5, "x", [None]])
def test_an_end_token_that_is_no_id_of_the_model_is_refused(ids):
    model = _model(CAUSAL["llama"])
    assert stop_ids_of("x", model) == (2,)
    model.generation_config.eos_token_id = ids
    with pytest.raises(UsageError, match=r"x: eos_token_id .* is no id of the model, which has 60"):
        stop_ids_of("x", model)


def test_a_model_without_values_is_named():
    with pytest.raises(UsageError, match="is on the meta device, without values"):
        require_finite("x", _model(CAUSAL["llama"]).to("meta"), torch.float32)
    with torch.inference_mode():
        model = _model(CAUSAL["llama"])
    with pytest.raises(UsageError, match=r"is made in torch.inference_mode\(\)"):
        require_finite("x", model, torch.float32)


def test_a_student_that_is_frozen_as_a_whole_is_refused():
    student = _model(CAUSAL["llama"])
    student.model.requires_grad_(False)
    require_trainable("x", student)
    student.requires_grad_(False)
    with pytest.raises(UsageError, match="x: all of its weights are frozen"):
        require_trainable("x", student)


def test_a_pad_token_that_ends_the_text_learns_and_a_row_of_zeros_is_named_in_float16():
    settings = transformers.LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=2
    )
    student, ids = transformers.LlamaForCausalLM(settings), torch.tensor([[2, 5, 6]])
    assert not student.get_input_embeddings().weight[2].any()  # as transformers makes it
    half, single = _precision(torch.float16), _precision(torch.float32)
    (line,) = learn_pad_row_("S", student, (2,), half)
    assert line.startswith("S: the embedding of token 2, which begins or ends a text, is all 0")
    student(input_ids=ids, labels=ids).loss.backward()
    assert student.get_input_embeddings().weight.grad[2].any()
    assert learn_pad_row_("S", student, (2,), half) == []  # it is no longer the pad token's alone
    for special_ids, precision in (((1,), half), ((2,), single)):
        assert learn_pad_row_("S", transformers.LlamaForCausalLM(settings), special_ids, precision) == []
    trained = transformers.LlamaForCausalLM(settings)
    trained.get_input_embeddings().weight.data[2] = 0.1
    assert learn_pad_row_("S", trained, (2,), half) == []


def test_a_module_of_another_kind_has_no_head():
    with pytest.raises(UsageError, match="Linear has no language-model head"):
        require_lm_head("x", torch.nn.Linear(2, 2))
