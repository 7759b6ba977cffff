"""`sar-kd preflight` and the start of a run: what is checked before weights are loaded, and what is refused."""

import json
import os
import re
from collections import namedtuple

import pytest
import torch

from sar_kd.commands import unit_task
from sar_kd.commands.main import main, run
from sar_kd.config.command_line import parse
from sar_kd.config.presets import FP16_SAFE
from sar_kd.embedded import STUDENT_DIR
from sar_kd.errors import UsageError
from sar_kd.models import loading
from sar_kd.preflight import checks
from sar_kd.runtime import environment, files
from sar_kd.training import trainer
from train_sar_kd_stable import main as train

SECTIONS = {
    "ok", "versions", "packages", "files", "folder", "device", "hub", "models", "context", "routing", "teacher_cache",
    "clamps", "disk", "memory", "alignment",
}  # fmt: skip


@pytest.fixture
def text(tmp_path, corpus_texts):
    """A small text file."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(corpus_texts), encoding="utf-8")
    return path


def _preflight(capsys, *argv):
    """Exit code, stdout and stderr."""
    code = main(["preflight", *map(str, argv)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_preflight_prints_every_check_and_trains_nothing(text, tmp_path, capsys):
    flags = ("--train_file", text, "--output_dir", tmp_path / "run", "--block_size", 64, "--mode", "ultra-conservative")
    code, out, err = _preflight(capsys, *flags, "--logit_clamp_style", "raw")
    assert (code, err) == (0, "")
    assert f"PyTorch {torch.__version__}" in out
    assert "Teacher: Qwen3MoeForCausalLM, 4.53 M parameters, vocabulary 2,048" in out
    # 1 + 1023 e^-10; 1 / (1 + 2047 e^(-10/1.5))
    assert "stays above 1.05, the teacher's largest probability below 0.28" in out
    assert "\nAlignment: " in out
    assert out.endswith("Ready: nothing stands in the way of this run\n")
    assert not (tmp_path / "run").exists()


def test_preflight_in_json_is_one_object_with_every_section(text, tmp_path, capsys):
    code, out, _ = _preflight(capsys, "--train_file", text, "--output_dir", tmp_path / "run", "--json")
    record = json.loads(out)
    assert code == 0
    assert record.keys() == SECTIONS
    assert record["ok"] is True
    assert record["models"]["student"] == {"class": "LlamaForCausalLM", "parameters": 430752, "vocabulary": 1024}
    assert record["hub"]["models"] == {"teacher": "shipped with the package", "student": "shipped with the package"}
    assert record["alignment"]["equal"] is False
    assert record["clamps"]["raw_perplexity_floor"] == pytest.approx(1 + 1023 * 2.718281828**-10, rel=1e-6)


@pytest.mark.slow
def test_in_float16_preflight_names_each_family_and_what_is_float32(text, tmp_path, capsys):
    flags = ("--train_file", text, "--output_dir", tmp_path / "run", "--device", "cpu")
    out = _preflight(capsys, *flags, "--model_dtype", "float16")[1]
    line = "in float16: matrix products are half; float32 are the residual stream, and other products in"
    assert f"Teacher (qwen3_moe) {line} 4 modules" in out
    assert f"Student (llama) {line} 3 modules" in out
    assert "Memory: up to " in out
    assert line not in _preflight(capsys, *flags, "--model_dtype", "float32")[1]


def test_a_refusal_is_exit_code_2_with_one_line_and_a_record_of_the_error(capsys):
    code, out, err = _preflight(capsys, "--teacher_model", "./nowhere", "--json")
    assert code == 2
    assert err == "error: --teacher_model ./nowhere: no such directory\n"
    record = json.loads(out)
    assert record["ok"] is False
    assert record["error"] == "--teacher_model ./nowhere: no such directory"
    assert record["device"]["device"]


REFUSED = {
    "--train_file {tmp}/no.txt": "--train_file {tmp}/no.txt: cannot be read (No such file or directory)",
    "--train_file {text} --validation_file {tmp}/no.txt": "--validation_file {tmp}/no.txt: cannot be read",
    "--train_file {tmp}": "--train_file {tmp}: is a folder",
    "--train_file {tmp}/pipe.txt": "--train_file {tmp}/pipe.txt: is a pipe",
    "--train_file {tmp}/bad.jsonl": "--train_file {tmp}/bad.jsonl: line 1 is not JSON",
    "--train_file {text} --block_size 2048": "--block_size 2048: the student takes 1024 tokens at most",
    "--train_file {text} --student_model {tmp}/empty": "--student_model {tmp}/empty: ",
    "--train_file {text} --teacher_model {tmp}/empty": "--teacher_model {tmp}/empty: ",
    "--parallel fsdp --routing sar": "--routing sar: with --parallel fsdp no device has the whole student",
    "--alignment hidden --routing sar": "--routing sar: --alignment hidden compares no probabilities",
    "--offload_teacher_to_cpu --routing sar": "--routing sar: --offload_teacher_to_cpu removes the teacher",
    "--alpha_kd 0 --routing all": "--routing all: distillation is off",
    "--train_file {text} --routing all --teacher_model {student}": "--routing all: the teacher is dense",
    "--train_file {text} --teacher_cache {tmp}": "--teacher_cache {tmp}: ",
    "--task units --teacher_cache {tmp}": "--teacher_cache {tmp}: --task first fine-tunes the embedded teacher",
    "--dataset_name some/dataset": "--dataset_name: needs `pip install datasets`",
    "--wandb": "--wandb: needs `pip install wandb`",
    "--lora_rank 4 --lora_quantization nf4": "--lora_quantization nf4: needs `pip install bitsandbytes accelerate`",
    "--teacher_quantization nf4": "--teacher_quantization nf4: needs `pip install bitsandbytes accelerate`",
    "--optimizer adamw8bit --fit": "--optimizer adamw8bit: needs `pip install bitsandbytes`",
    "--optimizer adamw8bit --per_device_batch_size auto": "--optimizer adamw8bit: needs `pip install bitsandbytes`",
    "--tensorboard": "--tensorboard: needs `pip install tensorboard`",
    "--output_dir {text}/run": "--output_dir {text}/run: cannot be written",
    "--output_dir {tmp}": "--output_dir {tmp}: holds no run, and is not empty",
    "--output_dir {tmp}/former": "--output_dir {tmp}/former: holds a run; --resume continues it",
}
"""Options -> the beginning of what is said about them, by `preflight` and by a run"""


@pytest.mark.parametrize("line", REFUSED)
def test_preflight_and_a_run_refuse_the_same_before_a_weight_is_loaded(line, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("weights were read"))
    monkeypatch.setattr(environment, "is_installed", lambda package: package == "matplotlib")
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "bad.jsonl").write_text("{")
    for name, content in (("empty", {"model_type": "llama"}), ("former", {"mode": "balanced"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    names = {"tmp": tmp_path, "text": text, "student": STUDENT_DIR}
    argv, expected = line.format(**names).split(), REFUSED[line].format(**names)
    for command in ("preflight", "train"):
        assert main([command, *argv]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"error: {expected}"), command
        assert err.count("\n") == 1
        assert not ("needs `pip" in err and "parameters" in out)  # a package is missed before a model is described


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--lora_rank 4", "--lora_rank: needs `pip install peft`"),
        ("--block_size 2048", "--block_size 2048: the student"),
    ],
)
def test_so_does_fine_tuning(line, expected, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("weights were read"))
    monkeypatch.setattr(environment, "is_installed", lambda package: package == "matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["sft", "--train_file", str(text), *line.split()]) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")


@pytest.mark.parametrize("command", ["cache", "sft", "audit"])
def test_every_command_looks_at_its_files_before_it_loads_weights(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    assert main([command, "--train_file", "pipe.txt"]) == 2
    assert capsys.readouterr().err == (
        "error: --train_file pipe.txt: is a pipe, which can be read only once; write it into a file first\n"
    )


def test_a_task_is_refused_before_its_teacher_is_fine_tuned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(unit_task, "fine_tune", lambda *a: pytest.fail("the teacher was fine-tuned"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--task", "units", "--block_size", "2048"]) == 2
    assert capsys.readouterr().err.startswith("error: --block_size 2048: the student takes 1024 tokens")


@pytest.mark.slow
def test_preflight_warns_about_text_as_a_run_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("hello world")
    flags = ["--train_file", "short.txt", "--validation_file", "short.txt", "--train_steps", "1"]
    assert main(["preflight", *flags]) == 0
    expected = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: ")]
    assert len(expected) == 3
    assert main(["train", *flags, "--output_dir", "run"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: ")] == expected


def test_preflight_shows_the_options_that_change_nothing(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["preflight", "--train_file", str(text), "--jsd_beta", "0.3"]) == 0
    assert "--jsd_beta: has no effect without --kd_direction jsd\n" in capsys.readouterr().out


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_refused_before_weights_are_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("weights were read"))
    assert run(train, ["--output_dir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: --output_dir {tmp_path / 'run'}: no room for the run's files (")
    assert line.endswith("; free some, or lower --keep_checkpoints\n")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--keep_last",), ("--lora_rank", "8"), ("--lora_rank", "8", "--adapter_only")])
def test_the_disk_space_asked_for_is_what_a_run_takes(text, tmp_path, more):
    """Two checkpoints and a student on the disk; one more of each while they are replaced."""
    flags = ["--train_file", str(text), "--block_size", "64", "--train_steps", "2", "--save_steps", "1", *more]
    config = parse(FP16_SAFE, [*flags, "--output_dir", str(tmp_path / "run")])
    finding = checks._check_disk(checks.MetaModels(config))
    train([*flags, "--output_dir", str(tmp_path / "run"), "--eval_steps", "2"])
    taken = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    taken += sum(path.stat().st_size for path in (tmp_path / "run").rglob("state.pt"))
    student, adapter = 4 * 430752, 4 * 43776
    saved = {0: student, 1: student, 2: student + adapter, 3: adapter}[len(more)]
    at_most = taken + saved + 3 * (adapter if "--lora_rank" in more else student)
    assert finding.record["needed_bytes"] == pytest.approx(at_most, rel=0.05)


@pytest.mark.slow
def test_a_run_starts_with_the_same_lines(text, tmp_path, capsys):
    flags = [
        "--train_file",
        str(text),
        "--block_size",
        "64",
        "--train_steps",
        "1",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    config = parse(FP16_SAFE, flags)
    expected: list[str] = []
    checks.preflight(config, expected.append)
    train([*flags, "--mode", "ultra-conservative", "--model_dtype", "float16"])
    # The memory of the process and the free memory change all the time.
    expected = [re.sub(r"[\d,.]+ [GM]B", "...", line) for line in expected]
    shown = [re.sub(r"[\d,.]+ [GM]B", "...", line) for line in capsys.readouterr().out.splitlines()]
    assert len(expected) >= 4
    assert [line for line in shown if line in expected] == expected


def test_a_raw_clamp_that_leaves_nothing_to_learn_is_refused_before_weights_are_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("weights were read"))
    flags = ["--logit_clamp_style", "raw", "--temperature", "4", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(UsageError, match="use --logit_clamp_style normalized, or --force"):
        train(flags)


@pytest.mark.slow
def test_two_ctrl_c_end_a_run_at_once_with_130(text, tmp_path, monkeypatch, capsys):
    import signal

    def interrupted(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    flags = ["--train_file", str(text), "--block_size", "64"]
    for way, start in enumerate((lambda words: run(train, words), lambda words: main(["train", *words]))):
        assert start([*flags, "--output_dir", str(tmp_path / str(way))]) == 130
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("interrupted at once; --resume continues")


def test_a_wrong_text_field_is_one_line_with_the_fields_of_the_file(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"body": "some text", "id": 1}\n')
    assert main(["preflight", "--train_file", str(tmp_path / "rows.jsonl")]) == 2
    assert "it has: body, id" in capsys.readouterr().err
