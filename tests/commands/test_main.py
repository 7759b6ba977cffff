"""The installed command, and what `generate` shows."""

import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from sar_kd import embedded
from sar_kd.commands import generate
from sar_kd.commands.main import COMMANDS, main, start
from sar_kd.commands.main import run as exit_code
from sar_kd.config.installation import program_name
from sar_kd.config.sections import TrainConfig
from sar_kd.data.chat.encoding import DEFAULT_TEMPLATE
from sar_kd.runtime.run_folder import hold_run_folder
from sar_kd.version import __version__
from train_sar_kd_stable import main as train

ROOT = Path(__file__).parents[2]
SCRIPTS = ("train_sar_kd_stable.py", "train_sar_kd_fp16_safe.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus_texts):
    """A short run of the embedded pair."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("\n".join(corpus_texts), encoding="utf-8")
    argv = [
        "--train_file",
        folder / "text.txt",
        "--block_size",
        64,
        "--train_steps",
        2,
        "--output_dir",
        folder / "run",
    ]
    train([str(word) for word in argv])
    return folder / "run"


def test_every_command_is_listed(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{command} " in shown for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_shows_its_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_a_misspelt_command_is_answered_with_the_nearest(capsys):
    assert main(["preflihgt"]) == 2
    assert capsys.readouterr().err == "error: preflihgt: no such command; did you mean preflight?\n"
    assert main(["zzz"]) == 2
    assert "the commands are train, preflight" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sar-kd {__version__}\n"


@pytest.mark.parametrize(
    ("called", "shown"), [("/usr/bin/sar-kd", "sar-kd report"), ("x/__main__.py", "python -m sar_kd report")]
)
def test_the_usage_names_the_command_that_was_called(called, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called])
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert f"usage: {shown} RUN_DIR [RUN_DIR ...] [options]" in capsys.readouterr().out
    assert program_name() in shown
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert f"usage: {program_name()} {command} " in capsys.readouterr().out


def test_the_package_promises_its_types_and_installs_its_command():
    project = (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "sar_kd" / "py.typed").is_file()
    assert 'sar-kd = "sar_kd.commands.main:main"' in project
    for extra in ("hub", "report", "tensorboard", "wandb", "bench", "dev"):
        assert f"\n{extra} = [" in project


ANSWERED_AT_ONCE = [
    ["-m", "sar_kd"],
    *(["-m", "sar_kd", command, words] for command in COMMANDS for words in ("--help", "--zzz")),
    *([script, words] for script in SCRIPTS for words in ("--help", "--temprature 3", "--resume --overwrite")),
    ["-m", "sar_kd", "train", "--temperature warm"],
    ["-m", "sar_kd", "sft", "--train_file a.txt --task units"],
]


def test_help_and_mistakes_are_answered_without_torch_and_in_half_a_second():
    """In one process, as each would be in its own: what an earlier one imports, a later one would not."""
    code = """
import contextlib, io, json, os, resource, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words[1:] if words[0] == "-m" else words
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        run, name = (runpy.run_module, "sar_kd") if words[0] == "-m" else (runpy.run_path, words[0])
        run(name, run_name="__main__")
heavy = [name for name in ("torch", "transformers", "numpy", "tqdm") if name in sys.modules]
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([heavy, used.ru_utime + used.ru_stime]))
"""
    lines = json.dumps([[*words[:-1], *words[-1].split()] for words in ANSWERED_AT_ONCE])
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", code, lines], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    heavy, seconds = json.loads(done.stdout)
    assert not heavy
    assert seconds < 0.5 * len(ANSWERED_AT_ONCE)


@pytest.mark.slow
def test_garbage_is_not_collected_while_a_commands_modules_are_imported_and_is_afterwards(monkeypatch):
    seen = []

    def import_module(name):
        seen.append((name, gc.isenabled()))
        return SimpleNamespace(main=lambda config: {"status": "finished", "collects": gc.isenabled()})

    monkeypatch.setattr("sar_kd.commands.main.importlib", SimpleNamespace(import_module=import_module))
    assert start(COMMANDS["preflight"], [])["collects"]
    assert seen == [("sar_kd.commands.preflight", False)]


def test_generate_shows_the_three_models_one_after_another(run, capsys):
    assert main(["generate", str(run), "The default value", "--max_new_tokens", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Prompt: The default value"
    titles = [line for line in lines if line.startswith("-- ")]
    assert [title.split(" (")[0] for title in titles] == ["-- teacher", "-- student, before", "-- student, after"]
    assert all(title.endswith(" bits per byte)") for title in titles)


@pytest.mark.parametrize(
    ("text", "shown"), [("a\n   \nb   ", ["a", "", "b"]), ("", ["(nothing)"]), (" \n", ["(nothing)"])]
)
def test_no_line_of_generate_ends_with_spaces_and_an_empty_text_is_named(run, text, shown, capsys, monkeypatch):
    monkeypatch.setattr(generate, "_generate", lambda *arguments: text)
    assert main(["generate", str(run), "x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("-- student, after"))
    assert lines[first + 1 :] == shown


def test_generate_shows_the_text_that_the_saved_student_generates(run, capsys):
    greedy = ["--max_new_tokens", "12", "--sample_temperature", "0", "--repetition_penalty", "1", "--json"]
    assert main(["generate", str(run), "The default value", *greedy]) == 0
    shown = json.loads(capsys.readouterr().out)
    pipe = transformers.pipeline("text-generation", model=str(run / "student"))
    (generated,) = pipe("The default value", max_new_tokens=12, do_sample=False)
    assert generated["generated_text"] == "The default value" + shown["student, after"]
    assert shown.keys() == {"prompt", "teacher", "student, before", "student, after"}


def test_generate_takes_any_model(run, capsys):
    for name in (str(run / "student"), "embedded"):
        assert main(["generate", name, "The default value", "--max_new_tokens", "5"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == ["Prompt: The default value", "", f"-- {name}"]
        assert len(lines) > 3


def test_generate_goes_on_without_a_teacher_that_is_gone(run, capsys, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["models"]["teacher_model"] = "./gone"
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["generate", str(folder), "The", "--max_new_tokens", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "(left out: --teacher_model ./gone: no such directory)" in lines
    assert main(["generate", str(folder), "The", "--max_new_tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"teacher": "--teacher_model ./gone: no such directory"}


def test_models_of_a_chat_run_without_a_template_are_prompted_in_the_default_one(run, capsys, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    start, *steps = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [start | {"learns_chat": True}, *steps])) + "\n")
    (folder / "student" / "chat_template.jinja").write_text(DEFAULT_TEMPLATE)
    greedy = ["--chat", "--json", "--sample_temperature", "0", "--max_new_tokens", "5"]
    assert main(["generate", str(folder), "Hello", *greedy]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out).keys() == {"prompt", "teacher", "student, before", "student, after"}
    line = "embedded has no chat template, so its prompt is written as 'User: ... Assistant: ...'"
    assert shown.err.splitlines() == [line] * 2


def test_generate_ends_with_the_context_and_refuses_a_prompt_that_fills_it(run, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.TEACHER_DIR)
    context = json.loads((embedded.TEACHER_DIR / "config.json").read_text())["max_position_embeddings"]
    prompt = " the value" * (context // 4)
    while len(tokenizer(prompt)["input_ids"]) < context - 9:
        prompt += " the value"
    assert main(["generate", "embedded", prompt, "--max_new_tokens", "9999"]) == 0
    capsys.readouterr()
    assert main(["generate", "embedded", prompt * 2]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"generate: the prompt has \d.* tokens and embedded takes \d+, its answer included", line)


def test_the_same_seed_samples_the_same_text_and_another_samples_another(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        words = ["--sample_temperature", "1.5", "--seed", seed, "--max_new_tokens", "20", "--json"]
        main(["generate", str(run), "The", *words])
        texts.append(json.loads(capsys.readouterr().out)["student, after"])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["./nowhere", "x"], "generate ./nowhere: no such directory"),
        (["{run}"], "PROMPT: not given"),
        (["{run}", ""], "the prompt is empty"),
        (["{run}", "x", "--max_new_tokens", "0"], "--max_new_tokens 0"),
        (["{run}", "x", "--chat"], "has no chat template"),
        (["{run}", "x", "--device", "cuda:9"], "--device cuda:9"),
    ],
)
def test_an_error_of_generate_is_one_line(run, words, expected, capsys):
    assert main(["generate", *(word.format(run=run) for word in words)]) == 2
    assert expected in capsys.readouterr().err.splitlines()[0]


class OutOfMemoryError(RuntimeError):
    """As PyTorch's of a GPU is called."""


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "GPU memory"),
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (RuntimeError("can't start new thread"), "memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "memory"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_memory_that_ends_is_one_line_with_the_options_to_lower_and_what_is_saved(capsys, error, where, tmp_path):
    def main(argv):
        with hold_run_folder(TrainConfig(output_dir=str(tmp_path), overwrite=True)) if argv else nullcontext():
            raise error

    def line(argv):
        assert exit_code(main, argv) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"error: out of {where}; lower --per_device_batch_size or --block_size, ")
        assert line.count("\n") == 1
        return line

    assert line([]).endswith("shows what needs the memory\n")
    assert line(["run"]).endswith("memory; nothing was saved yet\n")
    (tmp_path / "config.json").write_text('{"mode": "balanced"}')
    assert line(["run"]).endswith("memory; no checkpoint was saved yet, so start again with --overwrite\n")
    for name in ("step-00000002", "step-00000010", ".step-00000011.partial"):
        (tmp_path / "checkpoint" / name).mkdir(parents=True)
    assert line(["run"]).endswith("memory; the checkpoint of step 10 is intact, --resume continues from it\n")


def test_an_error_of_the_program_is_no_lack_of_memory():
    def main(argv):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        exit_code(main, [])
