"""`shrink --heal_steps`: cut and distilled by one command, in one round or several."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from sar_kd.commands import healing
from sar_kd.commands.main import main
from sar_kd.commands.unit_task import prepare_task
from sar_kd.config.command_line import parse
from sar_kd.config.commands import SHRINK
from sar_kd.errors import TrainingDiverged, UsageError
from sar_kd.models.pretrained import silence_transformers
from tests.helpers.cut_models import build_to_cut

TEXT = "Every token of the text is predicted exactly once in an epoch. The loss scale is lowered after an overflow.\n"


@pytest.fixture
def shrink(tmp_path, byte_tokenizer):
    """shrink(words): the exit code; cuts a Llama of six layers in `whole` into `small`."""
    silence_transformers()
    build_to_cut("llama", len(byte_tokenizer)).save_pretrained(tmp_path / "whole")
    byte_tokenizer.save_pretrained(tmp_path / "whole")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 10, encoding="utf-8")

    def shrink(words):
        texts = ["--train_file", str(text), "--validation_file", str(text), "--block_size", "32", "--device", "cpu"]
        given = ["--model", str(tmp_path / "whole"), "--output_dir", str(tmp_path / "small"), "--eval_chars", "5000"]
        return main(["shrink", *given, *texts, *words.split()])

    return shrink


def _load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _perplexities(text):
    """The row of the printed table, by column; the run above it has its own lines."""
    lines = [line.split() for line in text.splitlines()]
    first = next(at for at, words in enumerate(lines) if words[:1] == ["before"])
    row = next(words for words in lines[first:] if words[0] == "perplexity")
    return dict(zip(lines[first], row[1:], strict=True))


def test_one_command_cuts_and_distils(shrink, tmp_path, capsys):
    assert shrink("--layers 4 --heal_steps 3 --student_lr 1e-3") == 0, capsys.readouterr().err
    shown, small = capsys.readouterr().out, tmp_path / "small"
    summary = json.loads((small / "healing" / "summary.json").read_text())
    settings = json.loads((small / "healing" / "config.json").read_text())
    assert (summary["status"], summary["applied"]) == ("finished", 3)
    assert settings["models"]["teacher_model"] == str(tmp_path / "whole")
    assert settings["models"]["student_model"] == str(small)
    assert settings["optim"]["student_lr"] == 1e-3
    assert settings["data"]["train_file"] == [str(tmp_path / "text.txt")]
    # The cut model stays as it was cut; the student is another one.
    whole, cut, student = (_load(each) for each in (tmp_path / "whole", small, small / "healing" / "student"))
    assert torch.equal(cut.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(cut.model.layers[0].mlp.up_proj.weight, student.model.layers[0].mlp.up_proj.weight)
    table = _perplexities(shown)
    assert list(table) == ["before", "cut", "distilled"]
    found = {name: float(value.replace(",", "")) for name, value in table.items()}
    assert found["cut"] == pytest.approx(summary["val_ppl_start"], rel=1e-3)
    assert found["distilled"] == pytest.approx(summary["val_ppl_best"], rel=1e-3)
    assert found["distilled"] < found["cut"]
    assert f"Distilled: {small / 'healing' / 'student'}" in shown
    card, page = ((small / name).read_text() for name in ("README.md", "shrink.html"))
    assert "what was distilled from it is in `healing/student`" in card
    assert "| | before | cut | distilled |\n|---|---:|---:|---:|\n| parameters |" in card
    assert table["distilled"] in card
    assert table["distilled"] in page


def test_a_task_is_distilled_from_the_whole_model_and_starts_no_run_of_its_own(tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(healing, "train", lambda config: configs.append(config) or {"status": "finished"})
    given = ["--output_dir", str(tmp_path), "--layers", "3", "--task", "units", "--heal_steps", "7"]
    assert healing.heal(parse(SHRINK, given), tmp_path) == "finished"
    (config,) = configs
    assert (config.models.teacher_model, config.has_control) == ("embedded", False)
    assert prepare_task(config) is config


def test_several_processes_are_refused(shrink, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sar_kd.commands.shrink.join_process_group", lambda: SimpleNamespace(size=2))
    assert shrink("--layers 4") == 2
    assert capsys.readouterr().err == "error: shrink: one process cuts; start it without torchrun\n"
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(UsageError("--x 1: no"), 2), (TrainingDiverged("it diverged"), 3), (KeyboardInterrupt(), 130)]
)
def test_a_distillation_that_fails_leaves_the_cut_model_and_says_so(shrink, tmp_path, capsys, monkeypatch, error, code):
    def fail(config):
        raise error

    monkeypatch.setattr(healing, "train", fail)
    assert shrink("--layers 4 --heal_steps 3") == code
    assert (
        f"The distillation has not finished; the cut model in {tmp_path / 'small'} is intact" in capsys.readouterr().err
    )
    assert _load(tmp_path / "small").config.num_hidden_layers == 4
    assert "| | before | after |" in (tmp_path / "small" / "README.md").read_text()


def test_an_interrupted_distillation_ends_the_rounds(shrink, tmp_path, capsys, monkeypatch):
    first = tmp_path / "small" / "round_1"

    def stop(config):
        (first / "healing" / "checkpoint").mkdir(parents=True)
        return {"status": "interrupted"}

    monkeypatch.setattr(healing, "train", stop)
    assert shrink("--layers 4 --heal_steps 3 --iterative 2") == 130
    error = capsys.readouterr().err
    assert f"the cut model in {first} is intact; to go on: " in error
    assert f"train --resume --output_dir {first / 'healing'}" in error
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["round_1"]


@pytest.mark.slow
def test_each_round_cuts_what_the_one_before_has_distilled(shrink, tmp_path, capsys):
    assert shrink("--layers 2 --intermediate 0.5 --heal_steps 2 --iterative 2 --json") == 0, capsys.readouterr().err
    record, small = json.loads(capsys.readouterr().out), tmp_path / "small"
    rounds = [small / "round_1", small]
    sizes = [(model.config.num_hidden_layers, model.config.intermediate_size) for model in map(_load, rounds)]
    assert sizes == [(4, 36), (2, 24)]
    for folder in rounds:
        settings = json.loads((folder / "healing" / "config.json").read_text())
        assert settings["models"]["teacher_model"] == str(tmp_path / "whole")
    before, after = _load(small / "round_1" / "healing" / "student"), _load(small)
    kept = [i for i in range(4) if i not in record["dropped_layers"]]
    for new, old in enumerate(kept):
        expected = before.model.layers[old].self_attn.q_proj.weight
        assert torch.equal(after.model.layers[new].self_attn.q_proj.weight, expected)
    assert [line.split(" kept")[0] for line in record["cuts"]] == [
        "Round 1: Layers: 4 of 6", "Round 1: Feed-forward: 36 of 48 channels", "Round 2: Layers: 2 of 4",
        "Round 2: Feed-forward: 24 of 36 channels",
    ]  # fmt: skip
    summary = json.loads((small / "round_1" / "healing" / "summary.json").read_text())
    assert record["rounds"][0][1]["perplexity"] == pytest.approx(summary["val_ppl_best"], rel=1e-3)
    assert "| | before | cut 1 | distilled 1 | cut 2 | distilled 2 |" in (small / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--layers 4 --iterative 2", "--iterative 2: distils between the cuts; give --heal_steps too"),
        ("--layer_choice 0-3 --heal_steps 1 --iterative 2", "--iterative 2: needs --layers, not a list of them"),
        ("--layers 5 --heal_steps 1 --iterative 3", "--layers 5: cuts 1 of 6, too few for --iterative 3"),
        ("--vocab_size 200 --heal_steps 1 --iterative 2", "--vocab_size 200: 257 tokens stay in any case (bytes, "),
        ("--layers 5 --heal_steps -1", "--heal_steps -1: must be a number of at least 0"),
    ],
)
def test_a_wrong_option_is_one_line(shrink, tmp_path, capsys, words, message):
    assert shrink(words) == 2
    error = capsys.readouterr().err
    assert f"error: {message}" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "small").exists()


def test_an_option_of_the_run_without_one_is_named(shrink, capsys):
    assert shrink("--layers 6 --student_lr 1e-3") == 2
    assert "--student_lr: has no effect without --heal_steps" in capsys.readouterr().err
