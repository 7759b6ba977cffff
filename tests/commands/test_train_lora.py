"""Distillation of an adapter (LoRA): whole runs of every kind, what they save, and that a resumed one is the same."""

import math

import peft
import pytest
import torch
import transformers

import sar_kd
from sar_kd.models.loading import load_for_generation
from sar_kd.training import trainer
from tests.helpers.runs import (
    argv_of,
    assert_equal_runs,
    assert_refused,
    equal_weights,
    inputs,
    interrupting,
    latest_checkpoint,
    load_script,
    read_json,
    read_metrics,
    read_weights,
    run_script,
)

__all__ = ["inputs"]  # a fixture
TOKENS = torch.arange(5, 25)[None]
LORA = ("--lora_rank", 4, "--student_lr", 3e-2, "--lr_schedule", "constant")


@torch.no_grad()
def _logits(model):
    return model.eval().float()(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """Four steps in float16, between different tokenizers; the folder, and the lines on stdout."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    code, out, err = run_script(argv_of(inputs, folder, *LORA, "--lora_dropout", 0.1, steps=4))
    assert (code, err) == (0, [])
    return folder, out


@pytest.mark.slow
def test_the_first_lines_tell_what_is_trained(finished):
    _, out = finished
    assert ", LoRA of rank 4, mode balanced; run folder " in out[0]
    (line,) = (line for line in out if line.startswith("Trainable: "))
    assert line.endswith("parameters, in float32; the rest is frozen, in float16, float32")  # norms are never half


def test_adapter_and_merged_student_are_one_model_which_has_learned(finished, inputs):
    folder, _ = finished
    summary = read_json(folder / "summary.json")
    assert summary["applied"] == 4
    assert summary["val_ppl_final"] < summary["val_ppl_start"]
    student, base = (
        transformers.AutoModelForCausalLM.from_pretrained(path) for path in (folder / "student", inputs / "student")
    )
    assert {value.dtype for value in student.parameters()} == {torch.float32}
    before = _logits(base)
    adapted = peft.PeftModel.from_pretrained(base.half(), folder / "adapter")
    assert (_logits(adapted) - _logits(student)).abs().max() < 1e-4
    assert (before - _logits(student)).abs().max() > 0.01


def test_the_checkpoint_holds_the_adapter_alone(finished):
    weights = read_weights(latest_checkpoint(finished[0]) / "student.safetensors")
    assert weights
    assert all("lora_" in name and value.dtype is torch.float32 for name, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--alignment", "strict"),
        ("--alignment", "hidden"),
        ("--alignment", "alm"),
        ("--alignment", "uld", "--gradient_checkpointing"),
        ("--teacher_model", "equal_teacher", "--model_dtype", "float32"),
        ("--on_policy_fraction", 0.5, "--max_new_tokens", 8),
        ("--routing", "sar"),
        ("--routing", "sar", "--sar_schedule", "two_stage", "--lora_targets", "q_proj", "down_proj"),
    ],
    ids=lambda more: " ".join(map(str, more)),
)
def test_in_a_run_of_every_kind_each_adapter_learns(inputs, tmp_path, more):
    more = [inputs / word if word == "equal_teacher" else word for word in more]
    argv = argv_of(inputs, tmp_path / "run", *LORA, "--alpha_kd", 0.5, "--alpha_ce", 0.5, *more, "--eval_steps", 100)
    code, _, err = run_script(argv)
    assert (code, err) == (0, [])
    summary, steps = read_json(tmp_path / "run" / "summary.json"), read_metrics(tmp_path / "run", "step")
    assert summary["applied"] == 3
    weights = read_weights(latest_checkpoint(tmp_path / "run") / "student.safetensors")
    assert all(value.abs().max() > 1e-3 for name, value in weights.items() if "lora_B" in name)  # 0 at first
    assert all(0 < record["kd_loss"] < math.inf for record in steps)


@pytest.mark.slow
def test_a_teacher_cache_teaches_an_adapter(inputs, tmp_path):
    teacher, student = str(inputs / "dense_teacher"), str(inputs / "student")
    options = {"folder": tmp_path / "cache", "student_model": student, "block_size": 32, "device": "cpu"}
    folder = sar_kd.cache(teacher, inputs / "text.txt", **options)
    argv = argv_of(inputs, tmp_path / "run", *LORA, "--teacher_model", teacher, "--teacher_cache", folder)
    code, _, err = run_script(argv)
    assert (code, err) == (0, [])
    assert read_json(tmp_path / "run" / "summary.json")["applied"] == 3


@pytest.mark.slow
def test_a_resumed_run_equals_one_never_interrupted(inputs, tmp_path, monkeypatch):
    straight, halved = tmp_path / "straight", tmp_path / "halved"
    more = (*LORA, "--lora_dropout", 0.1, "--alignment", "hidden")
    assert run_script(argv_of(inputs, straight, *more, steps=6))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupting(trainer.train_step, 3))
        assert run_script(argv_of(inputs, halved, *more, steps=6))[0] == 130
    torch.manual_seed(99)
    assert run_script(["--resume", "--output_dir", str(halved)])[0] == 0
    assert_equal_runs(straight, halved)
    adapters = [read_weights(run / "adapter" / "adapter_model.safetensors") for run in (straight, halved)]
    assert equal_weights(*adapters)
    assert_refused(["--resume", "--output_dir", halved, "--lora_rank", 8], "the run to resume has '4'")


@pytest.mark.slow
def test_an_emergency_stop_leaves_the_last_good_adapter(inputs, tmp_path, monkeypatch):
    good, bad, calls = tmp_path / "good", tmp_path / "bad", []
    assert run_script(argv_of(inputs, good, *LORA, steps=2))[0] == 0
    train_step = trainer.train_step

    def overflowing(micro_batches, context):
        calls.append(1)
        layer = context.objective.student.get_base_model().model.layers[0].self_attn.o_proj
        with layer.register_forward_hook(lambda m, i, out: out * math.inf if len(calls) > 2 else out):
            return train_step(micro_batches, context)

    monkeypatch.setattr(trainer, "train_step", overflowing)
    code, _, err = run_script(argv_of(inputs, bad, *LORA, steps=50))
    assert code == 3
    assert "emergency stop after 10 consecutive NaN batches" in err[-1]
    for name in ("adapter/adapter_model.safetensors", "student/model.safetensors"):
        assert equal_weights(read_weights(bad / name), read_weights(good / name))
    of_runs = [read_weights(latest_checkpoint(run) / "student.safetensors") for run in (good, bad)]
    assert equal_weights(*of_runs)


# The adapter alone


@pytest.mark.slow
def test_with_adapter_only_the_adapter_is_the_student_everywhere(inputs, tmp_path, capsys):
    out = tmp_path / "run"
    options = {"lora_rank": 4, "adapter_only": True, "student_lr": 3e-2, "train_steps": 2, "per_device_batch_size": 2,
               "block_size": 32, "device": "cpu", "quiet": True}  # fmt: skip
    result = sar_kd.distill(
        str(inputs / "teacher"), str(inputs / "student"), inputs / "text.txt", output_dir=out, **options
    )
    assert not (out / "student").exists()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {
        path.name for path in (out / "adapter").iterdir()
    }
    assert (out / "adapter" / "README.md").read_text().count("SAR-KD") > 0  # our card, not peft's
    base, _ = load_for_generation("student_model", str(inputs / "student"), False)
    adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
    torch.testing.assert_close(_logits(result.student), _logits(adapted))
    capsys.readouterr()
    assert load_script().main is not None
    assert sar_kd.commands.main.main(["generate", str(out), "The river", "--device", "cpu"]) == 0
    assert "student, after" in capsys.readouterr().out
    assert_refused(argv_of(inputs, tmp_path / "next", student=out), "give the student in it", "run/adapter")


def test_an_adapter_that_would_name_another_base_is_refused(inputs, tmp_path, make_student, sp_tokenizer, finished):
    line = "the base model that the adapter names would not be this student"
    adapter = finished[0] / "adapter"
    assert_refused(argv_of(inputs, tmp_path / "a", *LORA, "--adapter_only", "--student_model", adapter), line)
    pair = make_student(len(sp_tokenizer)), sp_tokenizer
    with pytest.raises(ValueError, match="it is in memory"):
        sar_kd.distill(
            str(inputs / "teacher"), pair, inputs / "text.txt", lora_rank=4, adapter_only=True, device="cpu",
            output_dir=tmp_path / "b", block_size=32,
        )  # fmt: skip


def test_a_sharded_student_and_a_missing_rank_are_answered_in_one_line(inputs, tmp_path):
    assert_refused(argv_of(inputs, tmp_path / "run", *LORA, "--parallel", "fsdp"), "--lora_rank 4", "--parallel ddp")
    code, out, _ = run_script(argv_of(inputs, tmp_path / "run", "--adapter_only", "--lora_alpha", 8, steps=1))
    assert code == 0
    assert "--lora_alpha, --adapter_only: have no effect without --lora_rank above 0" in out
