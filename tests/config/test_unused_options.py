"""Options that are given and change nothing are named with the reason, each once."""

import pytest

from sar_kd.config.command_line import parse
from sar_kd.config.commands import CACHE, COMMANDS, SFT
from sar_kd.config.fields import options_of
from sar_kd.config.presets import STABLE
from sar_kd.config.unused_options import _RULES
from sar_kd.errors import UsageError

ALWAYS = {
    # models, text, devices, lengths, files: every value of the others leaves them an effect
    "template_date", "teacher_tokenizer",
    "teacher_model", "student_model", "model", "train_file", "validation_file", "dataset_name", "dataset_config_name",
    "dataset_split", "task", "block_size", "token_cache", "teacher_cache", "alpha_kd", "alpha_ce", "routing", "recipe",
    "keep_last",
    "optimizer", "on_policy_fraction", "weight_decay", "warmup_steps", "lr_schedule", "student_lr", "model_dtype",
    "device", "control",
    "gradient_checkpointing", "teacher_device", "teacher_device_map", "teacher_quantization",
    "max_grad_norm", "skip_grad_norm", "skip_rule",
    "max_nan_batches", "on_divergence", "train_steps", "per_device_batch_size", "grad_accum_steps", "eval_steps",
    "keep_checkpoints", "time_limit", "tensorboard", "wandb", "output_dir", "resume", "loss_workspace_mb",
    "logit_clamp_style", "loss_clamp_style", "max_steps", "save_strategy", "lora_rank", "teacher_top_k",
    "lora_quantization",
    "temperatures", "json", "verbose", "quiet", "runs", "output", "run", "prompt", "chat", "log", "teacher_steps",
    "from_logprobs", "teacher_url",
    "layers", "layer_choice", "intermediate", "experts", "vocab_size", "heal_steps", "iterative", "calibration_chars",
    "eval_chars", "keep", "fit", "gguf", "push_to_hub",
    "which", "tasks", "limit", "num_fewshot", "apply_chat_template", "add_bos_token",
    "prompts", "samples", "prompt_tokens", "keep_unfinished", "repeat_limit",
    "student_steps", "repetition_penalty", "alignment", "save_steps", "log_steps", "seed",
    # permissions: they have an effect where something would be refused without them
    "trust_remote_code", "force", "overwrite", "allow_changed_inputs",
}  # fmt: skip


def _lines(line: str, command=STABLE) -> list[str]:
    return [notice for notice in parse(command, line.split()).notices if "no effect" in notice]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--replay_size 8", "--replay_size: has no effect without --on_policy_fraction above 0"),
        ("--router_lr 1e-4", "--router_lr: has no effect without --routing sar or auto"),
        ("--router_lr 1e-4 --routing ka --sar_schedule joint",
         "--sar_schedule, --router_lr: have no effect without --routing sar or auto"),
        ("--ka_lambda 0.1 --routing sar", "--ka_lambda: has no effect without --routing ka"),
        ("--router_patterns gate", "--router_patterns: has no effect with --routing native"),
        ("--jsd_beta 0.5", "--jsd_beta: has no effect without --kd_direction jsd"),
        ("--alm_tau 2", "--alm_tau: has no effect without --alignment alm"),
        ("--kd_direction reverse --alignment uld", "--kd_direction: has no effect with --alignment uld or alm"),
        ("--alpha_kd 0 --temperature 3 --kd_direction jsd --jsd_beta 0.1",
         "--temperature, --kd_direction, --jsd_beta: have no effect where --alpha_kd is 0"),
        ("--mode precise --logit_clamp 4", "--logit_clamp: has no effect with --logit_clamp_style off"),
        ("--loss_clamp_style off --loss_clamp 4", "--loss_clamp: has no effect with --loss_clamp_style off"),
        ("--text_field body", "--text_field: has no effect without --train_file or --dataset_name"),
        ("--skip_baseline --task_teacher_steps 3",
         "--task_teacher_steps, --skip_baseline: have no effect without --task"),
        ("--task units --task_teacher_steps 3 --teacher_model elsewhere",
         "--task_teacher_steps: has no effect without the embedded teacher"),
        ("--model_dtype float32 --init_loss_scale 2", "--init_loss_scale: has no effect without float16"),
        ("--skip_rule fixed --skip_factor 3", "--skip_factor: has no effect with --skip_rule fixed"),
        ("--device cpu --offload_teacher_to_cpu", "--offload_teacher_to_cpu: has no effect with --device cpu"),
        ("--teacher_max_memory cpu=1GB", "--teacher_max_memory: has no effect without --teacher_device_map"),
        ("--on_policy_fraction 0.5 --replay_fraction 0.2", "--replay_fraction: has no effect without --replay_size"),
        ("--on_policy_fraction 0.5 --sample_top_p 0.2 --sample_temperature 0",
         "--sample_top_p: has no effect with --sample_temperature 0"),
        ("--parallel ddp", "--parallel: has no effect on one process; start several with torchrun --nproc_per_node N"),
    ],
)  # fmt: skip
def test_an_option_that_changes_nothing_is_named_once_with_the_reason(line, expected):
    (found,) = _lines(line)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--lora_alpha 8 --lora_targets q_proj", "--lora_alpha, --lora_targets: have no effect without --lora_rank"),
        ("--epochs 2 --train_steps 5", "--epochs: has no effect beside --train_steps"),
        ("--save_steps 2", "--save_steps: has no effect without --save_strategy steps"),
        ("--max_steps 2 --log_steps 5", "--log_steps: has no effect with --max_steps"),
        ("--parallel fsdp", "--parallel: has no effect on fine-tuning"),
    ],
)
def test_so_is_one_of_fine_tuning(line, expected):
    (found,) = _lines(line, SFT)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--temperature 3 --kd_direction jsd --jsd_beta 0.1 --teacher_top_k 8",
        "--routing sar --router_lr 1e-4 --router_patterns gate --router_direction jsd --jsd_beta 0.1",
        "--on_policy_fraction 0.5 --replay_size 8 --replay_fraction 0.2 --sample_top_p 0.9 --max_new_tokens 4",
        "--train_file a.txt --text_field body --seed 3 --save_steps 5 --log_steps 2",
        "--recipe sar-paper --max_new_tokens 8 --router_beta 0.1",
    ],
)
def test_an_option_that_has_an_effect_is_not_named(line):
    assert not _lines(line)


def test_a_seed_has_no_effect_where_nothing_is_drawn():
    (found,) = _lines("--keep topk --seed 3", CACHE)
    assert found.startswith("--seed: has no effect with --keep topk")
    assert not _lines("--keep mixed --seed 3", CACHE)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--from_logprobs a.jsonl --teacher_tokenizer t --teacher_model m",
         "--teacher_model: has no effect with --from_logprobs"),
        ("--from_logprobs a.jsonl --teacher_tokenizer t --per_device_batch_size 2",
         "--per_device_batch_size: has no effect with --from_logprobs"),
        ("--teacher_url http://h/v1 --teacher_tokenizer t --model_dtype float16 --teacher_device cpu",
         "--model_dtype, --teacher_device: have no effect where another program runs the teacher"),
        ("--server_timeout 9", "--server_timeout: has no effect without --teacher_url"),
    ],
)  # fmt: skip
def test_of_a_cache_options_for_another_teacher_are_named(line, expected):
    (found,) = _lines(line, CACHE)
    assert found.startswith(expected)
    assert not _lines("--teacher_url http://h/v1 --teacher_tokenizer t --server_timeout 9 --teacher_model m", CACHE)


def test_a_tokenizer_of_a_teacher_elsewhere_alone_is_refused():
    with pytest.raises(
        UsageError, match="--teacher_tokenizer t: is that of a teacher elsewhere; give --teacher_url or"
    ):
        parse(CACHE, ["--teacher_tokenizer", "t"])


def test_with_several_processes_parallel_has_an_effect(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not _lines("--parallel fsdp")
    assert _lines("--parallel fsdp", SFT)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_option_has_a_rule_or_always_an_effect(command):
    ruled = {name for rule in _RULES for name in rule.options}
    names = {item.name for item, _ in options_of(command.sections.values())}
    assert names <= ruled | ALWAYS
