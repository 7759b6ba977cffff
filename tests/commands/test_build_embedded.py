"""Training the embedded models: into a folder that is named and new."""

import hashlib

import pytest

from sar_kd.commands import build_embedded
from sar_kd.commands.main import main
from sar_kd.embedded import STUDENT_DIR, TEACHER_DIR


def _digests() -> list[str]:
    return [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in (STUDENT_DIR, TEACHER_DIR)
    ]


@pytest.fixture
def never_trains(monkeypatch):
    """The models that ship stay what they are even where the command would go on."""
    built = []
    monkeypatch.setattr(build_embedded, "build", lambda *settings: built.append(settings))
    return built


def test_without_a_folder_nothing_is_trained(never_trains, capsys):
    before = _digests()
    assert main(["embedded"]) == 2
    assert "--output_dir '': give a folder" in capsys.readouterr().err
    assert never_trains == []
    assert _digests() == before


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_folder_with_models_is_not_replaced(never_trains, name, tmp_path, capsys):
    (tmp_path / name).mkdir()
    assert main(["embedded", "--output_dir", str(tmp_path)]) == 2
    assert f"it holds a folder {name}" in capsys.readouterr().err
    assert never_trains == []


def test_a_new_folder_is_taken(never_trains, tmp_path):
    assert main(["embedded", "--output_dir", str(tmp_path / "new"), "--teacher_steps", "1"]) == 0
    assert never_trains == [(tmp_path / "new", 1, 200, 0)]
