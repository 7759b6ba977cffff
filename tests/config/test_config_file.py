"""`--config FILE`: the options of a file, those of a run's own config.json among them."""

import json

import pytest

from sar_kd.config.command_line import parse
from sar_kd.config.commands import AUDIT, CACHE, PREFLIGHT, SFT, TRAIN
from sar_kd.config.presets import FP16_SAFE, STABLE
from sar_kd.errors import UsageError


@pytest.fixture
def write(tmp_path):
    """Write a file, text or an object as JSON; its name."""

    def write(content, name="options.yaml"):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    return write


def _parse(command, *words):
    return parse(command, [str(word) for word in words])


def _message(command, *words):
    with pytest.raises(UsageError) as caught:
        _parse(command, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _settings(config):
    return {
        name: value
        for name, section in config.to_dict().items()
        if isinstance(section, dict)
        for name, value in section.items()
        if name not in ("output_dir", "json", "resume", "overwrite", "allow_changed_inputs")
    }


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (STABLE, "--mode precise --train_file a.txt b.jsonl --temperature 3 --seed 7 --routing auto"),
        (FP16_SAFE, "--student_model elsewhere --per_device_batch_size auto --time_limit 1h"),
        (SFT, "--task units --lora_rank 4 --lora_targets q_proj v_proj --student_lr 1e-3"),
        (PREFLIGHT, "--block_size 64 --json"),
        (CACHE, "--temperatures 1 2.5 --teacher_top_k 8"),
        (AUDIT, "--teacher_model elsewhere"),
    ],
)
def test_what_config_json_writes_gives_the_same_settings(write, command, line):
    first = _parse(command, *line.split())
    content = first.to_dict() | {"environment": {"torch": "2.6.0", "device": "Tesla T4", "command": "typed"}}
    again = _parse(command, "--config", write(content, "config.json"))
    assert _settings(again) == _settings(first)
    assert again.mode == first.mode


def test_a_runs_file_brings_no_folder_and_no_rate_that_is_multiplied_twice(write):
    first = _parse(STABLE, "--output_dir", "somewhere", "--overwrite")
    path = write(first.to_dict(), "config.json")
    again = _parse(TRAIN, "--config", path)
    assert again.train.output_dir != "somewhere"
    assert not again.train.overwrite
    assert again.optim.student_lr == first.optim.student_lr
    (line,) = again.notices
    assert line.startswith(f"--config {path}: ")
    assert line.endswith("; output_dir, resume, overwrite are not taken over")


def test_a_file_by_hand_holds_what_it_holds_in_sections_or_not(write):
    flat = "# a comment\nmode: precise\nstudent_lr: 1e-5\ntrain-file: text.txt\noutput_dir: out\ntemperature: 2\n"
    sections = "mode: precise\noptim:\n  learning_rate: 0.00001\ndata: {train_file: [text.txt]}\n"
    sections += "train:\n  output_dir: out\nloss: {temperature: 2.0}\n"
    words = "--mode precise --student_lr 1e-5 --train_file text.txt --output_dir out --temperature 2"
    expected = _parse(STABLE, *words.split())
    for text in (flat, sections):
        assert _parse(STABLE, "--config", write(text)) == expected


def test_the_command_line_wins_over_the_file_and_the_file_over_the_script(write):
    options = {"mode": "balanced", "temperature": 3.0, "student_lr": 1e-4, "model_dtype": "float32"}
    path = write(options, "options.json")
    config = _parse(FP16_SAFE, "--config", path, "--student_lr", "2e-4")
    assert (config.mode, config.precision.model_dtype) == ("balanced", "float32")
    assert (config.loss.temperature, config.optim.student_lr) == (3.0, 2e-4)
    # A mode on the command line is a set of values on the command line.
    assert _parse(FP16_SAFE, "--config", path, "--mode", "precise").loss.temperature == 1.0


@pytest.mark.parametrize(
    ("content", "name", "parts"),
    [
        ("temprature: 2", "a.yaml", ("temprature: no such option; did you mean temperature?",)),
        ("lr: 2", "a.yaml", ("did you mean student_lr?",)),
        ("temperature: warm", "a.yaml", ("temperature 'warm': must be a number",)),
        ("temperature: -1", "a.yaml", ("--temperature -1",)),
        ("train_steps: 2.5", "a.yaml", ("train_steps 2.5: must be a whole number",)),
        ("train_steps: true", "a.yaml", ("must be a whole number",)),
        ("train_steps:", "a.yaml", ("train_steps None",)),
        ("routing: maybe", "a.yaml", ("routing 'maybe': must be auto or native",)),
        ("mode: careful", "a.yaml", ("must be ultra-conservative or balanced",)),
        ("mode: [precise]", "a.yaml", ("mode ['precise']: must be ultra-conservative or balanced",)),
        ('train_file: ["a\\0.txt"]', "a.yaml", ("--train_file 'a\\x00.txt': holds a null character",)),
        ("task: ''\nmodes: precise", "a.yaml", ("did you mean mode?",)),
        ("student_lr: 1\nlearning_rate: 2", "a.yaml", ("student_lr: given twice",)),
        ("output: {json: true}", "a.yaml", ("section output", "json")),
        ("- a\n- b", "a.yaml", ("holds no options",)),
        ("", "a.yaml", ("holds no options",)),
        ("a: [", "a.yaml", ("cannot be read", "in line 1, column 5")),
        ("{", "a.json", ("cannot be read",)),
        ("[" * 100_000, "a.json", ("cannot be read",)),
        ("a: 1", "a.toml", ("must be a .json or .yaml file",)),
    ],
)
def test_a_wrong_file_is_one_line_with_its_name(write, content, name, parts):
    message = _message(STABLE, "--config", write(content, name))
    assert message.startswith(("--config", "--temperature", "--train_file"))
    assert all(part in message for part in parts)


def test_a_file_that_is_not_there_and_a_folder_are_told_apart(tmp_path):
    assert _message(STABLE, "--config", tmp_path / "no.yaml").endswith("no such file")
    (tmp_path / "folder.yaml").mkdir()
    assert _message(STABLE, "--config", tmp_path / "folder.yaml").endswith("is not a file")


def test_resume_takes_its_own_options(write, tmp_path):
    message = _message(STABLE, "--resume", "--output_dir", tmp_path, "--config", write("seed: 1"))
    assert "--resume takes the options of the run itself" in message
