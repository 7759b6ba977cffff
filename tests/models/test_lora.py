"""LoRA: what is trained, what is saved, and that the merged model equals the unmerged."""

import sys

import peft
import pytest
import torch
import transformers

from sar_kd.config.lora import LoraConfig
from sar_kd.errors import UsageError
from sar_kd.models import lora
from sar_kd.models.half_precision import range_report
from sar_kd.models.lora import (
    add_adapter,
    describe_trainable,
    load_trainable,
    merged_model,
    models_to_save,
    save_trainable,
)
from sar_kd.models.memory_saving import recompute_activations_
from sar_kd.runtime.precision import Precision
from sar_kd.training import checkpoint

TOKENS = torch.arange(24)[None] % 20 + 1
FLOAT32 = Precision(torch.device("cpu"), torch.float32, 1.0)


def _student(make_student, dtype=torch.float32, tied=False, **settings):
    student = make_student(64, tie_word_embeddings=tied)
    for value in student.parameters():
        value.data = value.data.to(dtype)  # as loaded in `dtype`: the buffers of rotary positions stay float32
    return add_adapter(student, LoraConfig(lora_rank=4, **settings))


@torch.no_grad()
def _trained(student):
    """The adapter as it might be after training: its B starts at 0."""
    torch.manual_seed(3)
    for name, value in student.named_parameters():
        if "lora_" in name:
            value.copy_(0.3 * torch.randn_like(value))
    return student.eval()


@torch.no_grad()
def _logits(model):
    return model.float()(input_ids=TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_the_adapter_is_trainable_and_it_is_float32_whatever_the_rest_is(make_student, dtype):
    student = _student(make_student, dtype)
    trainable = {name: value.dtype for name, value in student.named_parameters() if value.requires_grad}
    assert set(trainable.values()) == {torch.float32}
    assert all("lora_" in name for name in trainable)
    assert student.get_input_embeddings().weight.dtype is dtype


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_moe", "mamba"])
def test_the_modules_that_are_kept_in_range_are_the_same_with_an_adapter_as_without(family):
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    before = range_report(model)
    assert range_report(add_adapter(model, LoraConfig(lora_rank=4))) == before


def test_every_linear_layer_but_the_head_gets_one(make_student):
    student = _student(make_student)
    adapted = {name.split(".")[-1] for name, module in student.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_named_targets_alone_get_one(make_student):
    student = _student(make_student, lora_targets=("q_proj", "v_proj"))
    adapted = {name.split(".")[-1] for name, module in student.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {"q_proj", "v_proj"}


def test_gpt2s_transposed_layers_get_one_without_a_warning(recwarn):
    sizes = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    student = _trained(add_adapter(transformers.GPT2LMHeadModel(sizes), LoraConfig(lora_rank=4)))
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]
    assert {name.split(".")[-1] for name, module in student.named_modules() if hasattr(module, "lora_A")} == {
        "c_attn", "c_proj", "c_fc"
    }  # fmt: skip
    torch.testing.assert_close(_logits(merged_model(student).eval()), _logits(student), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_equals_unmerged_and_leaves_the_student_unchanged(make_student, dtype, tied):
    student = _trained(_student(make_student, dtype, tied))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    whole = merged_model(student).eval()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert {value.dtype for value in whole.parameters()} == {torch.float32}
    difference = (_logits(whole) - _logits(student)).abs().max()
    assert difference < 1e-4
    assert (_logits(whole) - _logits(make_student(64, tie_word_embeddings=tied))).abs().max() > 0.1


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, pad_token_id=0
    ),
}


def _assert_saved_is_trained(student, folder):
    """What transformers loads from the saved student has the logits of the trained one, and the adapter learned."""
    trained, plain = _logits(student), None
    with student.disable_adapter():
        plain = _logits(student)
    assert (trained - plain).abs().max() > 0.01
    models_to_save(student, FLOAT32)["student"].save_pretrained(folder)
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (_logits(saved) - trained).abs().max() < 1e-4 * max(1.0, trained.abs().max())
    return saved


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_student_is_the_trained_one_in_every_family(family, tmp_path):
    base = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    student = _trained(add_adapter(base, LoraConfig(lora_rank=4)))
    _assert_saved_is_trained(student, tmp_path)


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens", "q_proj")])
@pytest.mark.parametrize("tied", [True, False])
def test_adapted_ends_of_a_tied_student_are_saved_as_two_tensors(make_student, targets, tied, tmp_path, recwarn):
    student = _trained(_student(make_student, tied=tied, lora_targets=targets))
    saved = _assert_saved_is_trained(student, tmp_path)
    assert saved.config.tie_word_embeddings is False
    assert saved.lm_head.weight is not saved.model.embed_tokens.weight
    assert student.get_base_model().config.tie_word_embeddings is tied
    assert not [warning for warning in recwarn if "tie" in str(warning.message)]


def test_every_part_of_stacked_experts_gets_one():
    base = transformers.AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"]())
    student = add_adapter(base, LoraConfig(lora_rank=4))
    adapted = {module.parameter_name for module in student.modules() if hasattr(module, "parameter_name")}
    assert {"gate_up_proj", "down_proj"} <= adapted
    with pytest.raises(UsageError, match=r"--lora_dropout 0.1: the student's experts are stacked in one tensor"):
        add_adapter(transformers.AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"]()), LoraConfig(
            lora_rank=4, lora_dropout=0.1
        ))  # fmt: skip


def test_no_layer_of_a_state_space_model_gets_one_that_its_forward_does_not_call():
    student = add_adapter(transformers.MambaForCausalLM(FAMILIES["mamba"]()), LoraConfig(lora_rank=4))
    student(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    grads = {name: value.grad for name, value in student.named_parameters() if "lora_B" in name}
    assert len(grads) == 4
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_merged_student_that_is_not_the_trained_one_is_never_saved(make_student, dtype, monkeypatch):
    student = _trained(_student(make_student, dtype, tied=True, lora_targets=("lm_head", "q_proj")))
    precision = Precision(torch.device("cpu"), dtype, 1.0)
    models_to_save(student, precision)
    monkeypatch.setattr(lora, "untie_config_", lambda config: None)  # the head goes the way of the embeddings
    with pytest.raises(UsageError, match=r"--lora_targets: the merged student's logits differ .* nothing was saved"):
        models_to_save(student, precision)
    assert not student.training


def test_transformers_loads_the_whole_and_peft_the_adapter(make_student, sp_tokenizer, tmp_path):
    student = _trained(add_adapter(make_student(len(sp_tokenizer)), LoraConfig(lora_rank=4, lora_alpha=8)))
    for name, model in models_to_save(student, FLOAT32).items():
        checkpoint.save_student(model, sp_tokenizer, tmp_path / name)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    base = make_student(len(sp_tokenizer))
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (_logits(whole) - _logits(student)).abs().max() < 1e-4
    assert torch.equal(_logits(adapted), _logits(student))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


def test_a_student_without_an_adapter_is_saved_as_it_is(make_student):
    student = make_student(64)
    assert models_to_save(student, FLOAT32) == {"student": student}


def test_trainable_weights_are_saved_and_loaded_bit_for_bit(make_student, tmp_path):
    student = _trained(_student(make_student))
    save_trainable(student, tmp_path / "trainable.safetensors")
    other = _student(make_student)
    load_trainable(other, tmp_path / "trainable.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))
    whole = sum(value.numel() for value in student.parameters()) * 4
    assert (tmp_path / "trainable.safetensors").stat().st_size < whole / 2


def test_another_adapter_is_not_loaded(make_student, tmp_path):
    save_trainable(_student(make_student), tmp_path / "trainable.safetensors")
    other = _student(make_student, lora_targets=("q_proj",))
    with pytest.raises(ValueError, match="another adapter"):
        load_trainable(other, tmp_path / "trainable.safetensors")


def test_a_line_counts_the_trainable_parameters(make_student):
    line = describe_trainable(_student(make_student, torch.float16))
    assert line.startswith("Trainable: ")
    assert line.endswith("in float32; the rest is frozen, in float16")
    assert describe_trainable(make_student(64)).endswith("parameters, in float32")


def test_without_peft_there_is_one_line(make_student, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"--lora_rank 4: needs `pip install peft`"):
        _student(make_student)


def test_layers_that_are_not_there_are_named(make_student):
    with pytest.raises(UsageError, match=r"--lora_targets nowhere: Target modules"):
        _student(make_student, lora_targets=("nowhere",))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lora_rank": -1}, "--lora_rank -1"),
        ({"lora_alpha": 0.0}, "--lora_alpha 0"),
        ({"lora_dropout": 1.0}, "--lora_dropout 1.0"),
        ({"lora_quantization": "nf4"}, "--lora_quantization nf4: needs --lora_rank"),
    ],
)
def test_settings_out_of_range_are_named(settings, line):
    with pytest.raises(UsageError, match=line):
        LoraConfig(**settings)


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointed_gradients_equal_plain_ones_with_dropout_too(make_student, rank):
    def gradients(checkpoints):
        student = make_student(64, attention_dropout=0.2)
        if checkpoints:
            assert recompute_activations_(student, same_dropout=True) == 2
        student = add_adapter(student.train(), LoraConfig(lora_rank=rank, lora_dropout=0.2)).train()
        torch.manual_seed(5)
        student(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return {name: value.grad for name, value in student.named_parameters() if value.requires_grad}

    torch.manual_seed(1)
    plain = gradients(False)
    torch.manual_seed(1)
    again = gradients(True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert any(value.abs().max() > 0 for value in plain.values())
