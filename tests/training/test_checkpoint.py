"""Checkpoints and the saved student: written whole or not at all, refused if damaged or of another format."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from sar_kd.config.sections import GuardConfig, OptimConfig
from sar_kd.errors import UsageError
from sar_kd.runtime.files import atomic_write, file_digest
from sar_kd.runtime.precision import Precision
from sar_kd.training import checkpoint
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer
from sar_kd.training.step import StepContext
from sar_kd.version import RUN_FORMAT
from tests.helpers.runs import equal_weights

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saving(request, tmp_path, make_student):
    """A folder with a checkpoint after step 1, and a state that has moved on since."""
    student = make_student(64, num_hidden_layers=1, tie_word_embeddings=request.param)
    learned, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)  # stand-ins that have a state
    objective = SimpleNamespace(student=student, state_dict=learned.state_dict, load_state_dict=learned.load_state_dict)
    precision = Precision(CPU, torch.float16, 1024.0)
    optimizer = build_optimizer(student, OptimConfig())
    context = StepContext(objective, optimizer, StepGuard(GuardConfig()), precision, 1.0)
    checkpoint.save_checkpoint(tmp_path / "checkpoint", context, teacher, checkpoint.TrainerState(step=1))
    learned = [*student.parameters(), *learned.parameters(), *teacher.parameters()]
    former = [parameter.detach().clone() for parameter in learned]
    for parameter in learned:
        parameter.data.add_(1.0)
    return SimpleNamespace(folder=tmp_path / "checkpoint", parts=(context, teacher), former=former, learned=learned)


class Killed(Exception):
    pass


def _raise(*args, **kwargs):
    raise Killed


def _raise_after_half_a_file(model, path):
    Path(path).write_bytes(b"half")
    raise Killed


@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("safetensors.torch.save_model", _raise_after_half_a_file),
        ("torch.save", _raise),
        ("os.fsync", _raise),
        ("os.rename", _raise),
        ("os.replace", _raise),
    ],
)
def test_a_checkpoint_killed_half_way_leaves_the_former_one(saving, monkeypatch, place, how):
    with monkeypatch.context() as patch:
        patch.setattr(place, how)
        with pytest.raises(Killed):
            checkpoint.save_checkpoint(saving.folder, *saving.parts, checkpoint.TrainerState(step=2))
    assert checkpoint.load_checkpoint(saving.folder, *saving.parts).step == 1
    assert equal_weights([p.data for p in saving.learned], saving.former)


def test_a_checkpoint_killed_while_clearing_up_is_the_new_one(saving, monkeypatch):
    moved = [parameter.detach().clone() for parameter in saving.learned]
    remove = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **how: remove(path, **how) if "ignore_errors" in how else _raise())
        with pytest.raises(Killed):
            checkpoint.save_checkpoint(saving.folder, *saving.parts, checkpoint.TrainerState(step=2), keep=1)
    assert checkpoint.load_checkpoint(saving.folder, *saving.parts).step == 2
    assert equal_weights([p.data for p in saving.learned], moved)


def test_what_a_kill_left_is_cleared_away_by_the_next_checkpoint(saving):
    for name in (".step-00000002.partial", ".step-00000007.partial", "step-00000009"):
        (saving.folder / name).mkdir()
        (saving.folder / name / "student.safetensors").write_bytes(b"half")
    assert checkpoint.load_checkpoint(saving.folder, *saving.parts).step == 1
    checkpoint.save_checkpoint(saving.folder, *saving.parts, checkpoint.TrainerState(step=2))
    assert {path.name for path in saving.folder.iterdir()} == {"latest", "step-00000001", "step-00000002"}


def test_no_checkpoint_at_all_is_a_usage_error(saving, tmp_path):
    with pytest.raises(UsageError, match="no checkpoint"):
        checkpoint.load_checkpoint(tmp_path / "elsewhere", *saving.parts)


@pytest.mark.parametrize("found", [None, 1, RUN_FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused_in_one_line_that_names_the_remedy(saving, found):
    path = saving.folder / "step-00000001"
    counters = json.loads((path / "progress.json").read_text())
    assert counters.pop("format") == RUN_FORMAT
    counters |= {} if found is None else {"format": found}
    (path / "progress.json").write_text(json.dumps(counters))
    digests = json.loads((path / "digests.json").read_text())
    digests["progress.json"] = file_digest(path / "progress.json")
    (path / "digests.json").write_text(json.dumps(digests))
    with pytest.raises(UsageError) as error:
        checkpoint.load_checkpoint(saving.folder, *saving.parts)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"--resume: {path} has format {found or 1} and this version reads format {RUN_FORMAT}")
    assert "--overwrite" in message
    assert not equal_weights([p.data for p in saving.learned], saving.former)  # nothing was loaded


def test_a_text_killed_half_way_leaves_the_former_one(tmp_path, monkeypatch):
    atomic_write(tmp_path / "summary.json", "old")
    monkeypatch.setattr("os.replace", _raise)
    with pytest.raises(Killed):
        atomic_write(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"


# The saved student


@pytest.mark.parametrize("templates", ["{{ messages }}", {"default": "{{ messages }}", "tool_use": "{{ tools }}"}])
def test_a_student_is_saved_again_whatever_its_chat_templates(tmp_path, templates, make_student, byte_tokenizer):
    student = make_student(64, num_hidden_layers=1)
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template = templates
    for _ in range(2):
        checkpoint.save_student(student, tokenizer, tmp_path / "student")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    assert again.chat_template == templates
    assert not list(tmp_path.glob(".student*"))


@pytest.mark.parametrize("eos", [None, 2])
def test_a_generation_config_that_is_not_consistent_is_saved_all_the_same(tmp_path, make_student, eos):
    student = make_student(64, num_hidden_layers=1)
    student.generation_config = transformers.GenerationConfig(eos_token_id=eos)
    student.generation_config.temperature = 0.6
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=None, save_pretrained=lambda folder: None)
    checkpoint.save_student(student, tokenizer, tmp_path / "student")
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "student")
    assert (saved.temperature, saved.do_sample, saved.eos_token_id, saved.pad_token_id) == (0.6, True, eos or 1, 1)
