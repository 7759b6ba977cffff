"""Names that a command line is forgiven, names that it is told, and what the help shows."""

import re

import pytest

from sar_kd.config.command_line import configure, parse
from sar_kd.config.commands import COMMANDS, GENERATE, PREFLIGHT, SFT, TRAIN
from sar_kd.config.fields import options_of
from sar_kd.config.option_parser import _KNOWN_ELSEWHERE, build_parser
from sar_kd.config.presets import FP16_SAFE, STABLE
from sar_kd.errors import UsageError

COMMAND = pytest.mark.parametrize(
    "command", [*COMMANDS.values(), STABLE, FP16_SAFE], ids=lambda c: c.name or c.run_name
)


def _message(command, line: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(command, line.split())
    return str(caught.value)


@pytest.mark.parametrize("command", [STABLE, SFT, PREFLIGHT])
@pytest.mark.parametrize("name", ["--student_lr", "--learning_rate", "--student-lr", "--learning-rate"])
def test_the_learning_rate_has_one_name_in_every_command_and_the_other_as_alias(command, name):
    assert parse(command, [name, "3e-4"]).optim.student_lr == 3e-4
    assert parse(command, [f"{name}=3e-4"]).optim.student_lr == 3e-4
    assert _message(command, f"{name} warm") == "--student_lr: 'warm' is not a number"


def test_an_alias_counts_in_python_too():
    assert configure(STABLE, {"learning_rate": 3e-4}).optim.student_lr == 3e-4


def test_hyphens_stand_for_underscores_in_names_and_not_in_values():
    config = parse(STABLE, ["--train-file", "a-b.txt", "--mode", "ultra-conservative", "--gradient-checkpointing"])
    assert config.data.train_file == ("a-b.txt",)
    assert config.mode == "ultra-conservative"
    assert config.memory.gradient_checkpointing


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        (STABLE, "--lr", "--student_lr"),
        (SFT, "--lr", "--student_lr"),
        (STABLE, "--batch_size", "--per_device_batch_size"),
        (STABLE, "--batch-size", "--per_device_batch_size"),
        (STABLE, "--epochs", "--train_steps, which counts updates"),
        (STABLE, "--num_train_epochs", "--train_steps, which counts updates"),
        (SFT, "--num_train_epochs", "--epochs"),
        (STABLE, "--fp16", "--model_dtype float16"),
        (STABLE, "--bf16", "--model_dtype bfloat16"),
        (STABLE, "--teacher", "--teacher_model"),
        (SFT, "--model", "--student_model"),
        (STABLE, "--gradient_accumulation_steps", "--grad_accum_steps"),
        (STABLE, "--max-seq-length", "--block_size"),
        (STABLE, "--top_p", "--sample_top_p"),
        (GENERATE, "--temperature", "--sample_temperature"),
        (STABLE, "--temprature", "--temperature"),
        (STABLE, "-o", "--output_dir"),
        (STABLE, "--lr=1e-4", "--student_lr"),
        (STABLE, "--quantize", "--teacher_quantization nf4"),
        (STABLE, "--load_in_4bit", "--lora_quantization nf4"),
    ],
)
def test_a_name_from_another_program_is_answered_with_the_one_here(command, typed, meant):
    line = {GENERATE.name: "run prompt "}.get(command.name, "")
    assert _message(command, f"{line}{typed} 1") == f"{typed}: no such option; did you mean {meant}?"


@pytest.mark.parametrize(
    ("command", "typed", "owner"),
    [
        (STABLE, "--save_strategy", "sft"),
        (TRAIN, "--save-strategy", "sft"),
        (SFT, "--alpha_kd", "train"),
        (STABLE, "--chat", "generate"),
    ],
)
def test_an_option_of_another_command_is_answered_with_that_command(command, typed, owner):
    message = _message(command, f"{typed} 1")
    assert message.startswith(f"{typed}: no such option here; it is one of `")
    assert message.endswith(f" {owner}`")


@pytest.mark.slow
@COMMAND
def test_every_name_from_elsewhere_is_answered_with_an_option_of_the_command_or_none(command):
    names = {item.name for item, _ in options_of(command.sections.values())}
    options = {name for action in build_parser(command)._actions for name in action.option_strings}
    for theirs in {name for others in _KNOWN_ELSEWHERE.values() for name in others} - names - {"learning_rate"}:
        words = [
            item.metadata["metavar"] for item, _ in options_of(command.sections.values()) if item.metadata["positional"]
        ]
        meant = re.search(r"did you mean (--\w+)", _message(command, " ".join([*words, f"--{theirs}"])))
        assert meant is None or meant[1] in options


@COMMAND
def test_help_shows_every_default_that_is_a_number_and_no_empty_choice(command):
    text = " ".join(build_parser(command).format_help().split())
    assert "{," not in text
    defaults = dict(command.defaults)
    defaults |= command.presets.get("mode", {}).get(defaults.get("mode"), {})
    for item, kind in options_of(command.sections.values()):
        value = defaults.get(item.name, item.default)
        if kind in (int, float) and not item.metadata["positional"]:
            assert f"({value:g})" in text or f"({value})" in text


def test_a_command_shows_no_option_that_it_does_not_use():
    text = {name: build_parser(command).format_help() for name, command in COMMANDS.items()}
    for name in ("sft", "cache", "audit"):
        assert "task_teacher_steps" not in text[name]
        assert "skip_baseline" not in text[name]
    assert "teacher_cache" not in text["audit"]
    assert "init_loss_scale" not in text["cache"]
    assert "task_teacher_steps" in text["train"]


def test_help_names_commands_and_packages_that_are_there(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_sar_kd_stable.py"])
    text = " ".join(build_parser(STABLE).format_help().split())
    assert "`sar-kd " not in text
    assert "sar-kd[" not in text
    assert "python -m sar_kd cache`" in text
    monkeypatch.setattr("sys.argv", ["/usr/bin/sar-kd"])
    assert "`sar-kd cache`" in " ".join(build_parser(TRAIN).format_help().split())


def test_a_choice_that_is_not_there_is_answered_with_those_that_are():
    message = _message(STABLE, "--task unit")
    assert message.startswith("--task: invalid choice: 'unit'")
    assert "''" not in message
    with pytest.raises(UsageError, match="--task 'unit': must be units"):
        configure(STABLE, {"task": "unit"})
