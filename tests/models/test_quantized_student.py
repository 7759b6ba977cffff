"""An adapter over a base in 4 bits (QLoRA): gradients, the saved student, resuming, the plan of its memory."""

import pytest
import torch
import transformers

from sar_kd.config.command_line import parse
from sar_kd.config.presets import STABLE
from sar_kd.errors import UsageError
from sar_kd.models.loading import LoadedModels, load_models
from sar_kd.models.lora import add_adapter, describe_trainable
from sar_kd.models.memory_saving import dequantized_weight, quantized_layers
from sar_kd.runtime.environment import is_installed
from sar_kd.runtime.precision import setup_precision
from sar_kd.training import trainer
from tests.helpers.runs import assert_equal_runs, interrupting, read_metrics, read_weights
from train_sar_kd_stable import main as train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed("bitsandbytes"), reason="bitsandbytes is an extra"),
]

IDS = torch.arange(3, 43)[None]
NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123,
    0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
"""Dettmers et al., 2023 (arXiv 2305.14314), appendix E"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, make_student, sp_tokenizer, corpus_texts):
    """A student whose widths are multiples of 64, one that is not, a teacher, and a text."""
    folder = tmp_path_factory.mktemp("quantized")
    for name, width in (("student", 128), ("narrow", 96), ("teacher", 32)):
        make_student(len(sp_tokenizer), hidden_size=width).save_pretrained(folder / name)
        sp_tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(corpus_texts), encoding="utf-8")
    return folder


def _argv(inputs, out, *more, dtype="float16"):
    words = [
        "--teacher_model", inputs / "teacher", "--student_model", inputs / "student", "--train_file",
        inputs / "text.txt", "--block_size", 32, "--train_steps", 4, "--eval_steps", 2, "--save_steps", 2,
        "--student_lr", 1e-2, "--warmup_steps", 1, "--model_dtype", dtype, "--device", "cpu", "--output_dir", out,
        "--lora_rank", 4, "--lora_quantization", "nf4", *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def _loaded(inputs, tmp_path, dtype="float32"):
    config = parse(STABLE, _argv(inputs, tmp_path, dtype=dtype))
    return config, load_models(config, setup_precision(config.precision, 0)).student


def test_gradients_are_those_of_an_adapter_over_the_rounded_weights(inputs, tmp_path):
    config, student = _loaded(inputs, tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(inputs / "student", dtype=torch.float32)
    for name, layer in quantized_layers(student.get_base_model()).items():
        plain.get_submodule(name.removesuffix(".base_layer")).weight.data = dequantized_weight(layer)
    plain = add_adapter(plain, config.lora)
    own, expected = (
        {name: value for name, value in model.named_parameters() if value.requires_grad} for model in (student, plain)
    )
    torch.manual_seed(1)
    for name, value in own.items():
        value.data = expected[name].data = 0.1 * torch.randn_like(value)
    for model in (student.eval(), plain.eval()):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert own.keys() == expected.keys()
    for name, value in own.items():
        torch.testing.assert_close(value.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_saved_student_is_the_rounded_one_with_its_adapter(inputs, tmp_path, dtype):
    out = tmp_path / "run"
    summary = train(_argv(inputs, out, dtype=dtype))
    assert summary["applied"] == 4
    assert summary["val_ppl_best"] < read_metrics(out, "start")[0]["val_ppl"]
    student, plain = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (out / "student", inputs / "student")
    )
    assert getattr(student.config, "quantization_config", None) is None
    adapter = read_weights(out / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    rounded = (student.get_submodule(name).weight.double() - 16 / 4 * b @ a).reshape(-1, 64)
    exact = plain.get_submodule(name).weight.to(getattr(torch, dtype)).double().reshape(-1, 64)
    scale = exact.abs().amax(1, keepdim=True)
    values = torch.tensor(NF4, dtype=torch.float64)
    nearest = values[(exact / scale)[..., None].sub(values).abs().argmin(-1)] * scale
    torch.testing.assert_close(rounded, nearest, rtol=1e-3, atol=1e-6)


def test_a_resumed_run_equals_one_never_interrupted(inputs, tmp_path, monkeypatch):
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(_argv(inputs, whole))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupting(trainer.train_step, 3))
        train(_argv(inputs, again))
    train(["--resume", "--output_dir", str(again)])
    assert_equal_runs(whole, again)


def test_a_validation_leaves_the_quantized_weights_as_they_were(inputs, tmp_path):
    _, student = _loaded(inputs, tmp_path)
    before = {name: dequantized_weight(layer) for name, layer in quantized_layers(student).items()}
    assert len(before) == 2 * 7
    with torch.no_grad():
        student.eval()(input_ids=IDS)
    assert all(torch.equal(before[name], dequantized_weight(x)) for name, x in quantized_layers(student).items())


def test_parameters_in_4_bits_are_counted_one_by_one(inputs, tmp_path):
    _, student = _loaded(inputs, tmp_path, "float16")
    whole = transformers.AutoModelForCausalLM.from_pretrained(inputs / "student")
    trained = sum(value.numel() for value in student.parameters() if value.requires_grad)
    count = trained + sum(value.numel() for value in whole.parameters())
    line = describe_trainable(student)
    assert line.startswith(f"Trainable: {trained:,} of {count:,} parameters")
    assert line.endswith("nf4")


def test_a_student_in_memory_is_not_quantized(inputs, tmp_path, make_student, sp_tokenizer):
    config = parse(STABLE, _argv(inputs, tmp_path))
    loaded = LoadedModels({"student_model": (make_student(len(sp_tokenizer)), sp_tokenizer)})
    with pytest.raises(UsageError, match="--lora_quantization nf4: the student is in memory already"):
        load_models(config, setup_precision(config.precision, 0), loaded=loaded)


def test_widths_that_bitsandbytes_reads_back_wrongly_on_a_cpu_are_refused(inputs, tmp_path):
    config = parse(STABLE, _argv(inputs, tmp_path, "--student_model", inputs / "narrow"))
    with pytest.raises(UsageError, match=r"--student_model .*narrow: .*q_proj has 96 inputs, .* multiples of 64"):
        load_models(config, setup_precision(config.precision, 0))
