"""Sample texts of a run: both models continue held-out text, and what cannot generate does not end the run."""

import json
from types import SimpleNamespace

import pytest
import torch

from sar_kd.config.sections import PrecisionConfig, TrainConfig
from sar_kd.data.files.samples import Document
from sar_kd.models.loading import Models
from sar_kd.runtime.precision import setup_precision
from sar_kd.training.sample_texts import SampleTexts


@pytest.fixture
def build(make_student, make_teacher, sp_tokenizer, byte_tokenizer):
    def build(steps=20, texts=("The loss scale is " + "halved " * 30, "one two", "three", "four")):
        student = make_student(len(sp_tokenizer), num_hidden_layers=1).train()
        teacher = make_teacher(len(byte_tokenizer), num_hidden_layers=1)
        tokenizers = SimpleNamespace(student=sp_tokenizer, teacher=byte_tokenizer)
        models = Models(teacher, student, tokenizers, False)
        precision = setup_precision(PrecisionConfig(device="cpu"), 0)
        held_out = [Document(f"{i}", text) for i, text in enumerate(texts)]
        return SampleTexts(models, held_out, precision, TrainConfig(train_steps=steps)), student

    return build


def test_both_models_continue_three_beginnings_and_nothing_else_changes(build, tmp_path):
    samples, student = build()
    before = torch.get_rng_state()
    assert samples.on_train_begin() == []
    assert samples.on_train_end(tmp_path / "student") == []
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training
    found = json.loads((tmp_path / "samples.json").read_text())
    assert [sample.keys() for sample in found] == [{"text", "student, before", "teacher", "student, after"}] * 3
    assert len(found[0]["text"]) <= 100
    assert found[0]["text"].endswith("halved")
    assert found[1]["text"] == "one"
    assert found[0]["student, before"] == found[0]["student, after"]  # it was not trained


def test_a_short_run_and_one_without_plain_text_write_none(build, tmp_path):
    for samples, _ in (build(steps=19), build(texts=())):
        assert samples.on_train_begin() == samples.on_train_end(tmp_path / "student") == []
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_generate_is_a_line(build, tmp_path):
    samples, student = build()
    student.generate = None
    (line,) = samples.on_train_begin()
    assert line.startswith("Warning: no sample texts of the student, before (TypeError: 'NoneType' object is not")
    (line,) = samples.on_train_end(tmp_path / "student")
    assert "student, after" in line
    assert json.loads((tmp_path / "samples.json").read_text())[0].keys() == {"text", "teacher"}
