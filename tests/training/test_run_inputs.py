"""A resumed run reads what it read before: text, tokenizers and models; else it is refused, with what changed."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from sar_kd.errors import UsageError
from sar_kd.training.run_inputs import check_inputs
from tests.helpers.runs import argv_of, inputs, latest_checkpoint, read_json, run_script  # noqa: F401  # a fixture

TEXT, HELD_OUT = "the training text", "the held-out text"
STUDENT, TEACHER = "the student's files", "the teacher's files"


def test_each_input_that_differs_is_named():
    saved = {TEXT: "a", TEACHER: "b", STUDENT: "c"}
    assert check_inputs(saved, dict(saved), allow_changes=False) == []
    for found, names in (
        ({**saved, TEXT: "x"}, TEXT),
        ({**saved, TEXT: "x", STUDENT: "y"}, f"{TEXT}, {STUDENT}"),
        ({TEXT: "a", STUDENT: "c"}, TEACHER),
        ({**saved, "the teacher cache": "d"}, "the teacher cache"),
    ):
        with pytest.raises(UsageError) as error:
            check_inputs(saved, found, allow_changes=False)
        assert str(error.value).startswith(f"--resume: {names} changed since the run began; ")
        assert "--allow_changed_inputs" in str(error.value)
        (line,) = check_inputs(saved, found, allow_changes=True)
        assert line.startswith(f"--allow_changed_inputs: {names} changed")
    (line,) = check_inputs({}, saved, allow_changes=False)
    assert "not known" in line


@pytest.fixture(scope="module")
def interrupted(inputs, tmp_path_factory):  # noqa: F811
    """A run of one step, and a copy of all that it reads, which a test may change."""
    place = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(inputs, place / "inputs")
    # --overwrite is for the beginning alone: a run that began with it is resumed as any other
    assert run_script([*argv_of(place / "inputs", place / "run", steps=1), "--overwrite"])[0] == 0
    return place


@pytest.fixture
def place(interrupted):
    """The same, put back afterwards."""
    shutil.copytree(interrupted, interrupted.with_name("kept"))
    yield interrupted
    shutil.rmtree(interrupted)
    interrupted.with_name("kept").rename(interrupted)


def _resume(place, *more):
    code, out, err = run_script(["--resume", "--output_dir", str(place / "run"), "--train_steps", "2", *more])
    return code, [*out, *err]


def _another_text(inputs):  # noqa: F811
    path = inputs / "text.txt"
    path.write_text(path.read_text().replace(" the ", " teh ", 1))


def _another_teacher(inputs):  # noqa: F811
    path = inputs / "teacher" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["lm_head.weight"][0, 0] += 1e-3
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def _swapped_ids(inputs):  # noqa: F811
    path = inputs / "student" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    *_, a, b = vocabulary
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(tokenizer))


def _another_template(inputs):  # noqa: F811
    (inputs / "teacher" / "chat_template.jinja").write_text("{{ messages }}")


def _another_activation(inputs):  # noqa: F811
    path = inputs / "student" / "config.json"
    path.write_text(json.dumps(read_json(path) | {"hidden_act": "gelu"}))


def _edited_settings(inputs):  # noqa: F811
    path = inputs.parent / "run" / "config.json"
    values = read_json(path)
    values["optim"]["student_lr"] = 0.5
    path.write_text(json.dumps(values))


CHANGES = {
    "settings": (_edited_settings, "--resume: config.json changed"),
    "text": (_another_text, f"--resume: {TEXT} changed"),
    "teacher": (_another_teacher, f"--resume: {TEACHER} changed"),
    "swapped ids": (_swapped_ids, "--resume: the student's tokenizer changed"),
    "chat template": (_another_template, "--resume: the teacher's tokenizer changed"),
    "configuration": (_another_activation, f"--resume: {STUDENT} changed"),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", CHANGES)
def test_a_run_whose_inputs_changed_is_refused_and_goes_on_where_that_is_allowed(place, which):
    change, expected = CHANGES[which]
    change(place / "inputs")
    before = latest_checkpoint(place / "run").name
    code, lines = _resume(place)
    assert (code, lines[-1].removeprefix("error: ")[: len(expected)]) == (2, expected)
    assert latest_checkpoint(place / "run").name == before
    code, lines = _resume(place, "--allow_changed_inputs")
    assert code == 0
    assert any(line.startswith("--allow_changed_inputs: ") for line in lines)
    code, lines = _resume(place)  # the new inputs are the run's own now
    assert (code, [line for line in lines if "changed" in line]) == (0, [])


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(place):
    other = place / "other"
    assert run_script([*argv_of(place / "inputs", other, steps=1), "--seed", "5"])[0] == 0
    shutil.rmtree(place / "run" / "checkpoint")
    shutil.copytree(other / "checkpoint", place / "run" / "checkpoint")
    code, lines = _resume(place)
    assert (code, lines[-1].split(";")[0]) == (2, "error: --resume: config.json changed since the run began")


@pytest.mark.slow
def test_weights_of_the_student_that_the_checkpoint_replaces_may_change(place):
    path = place / "inputs" / "student" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(
        {name: torch.zeros_like(value) for name, value in weights.items()}, path, {"format": "pt"}
    )
    code, lines = _resume(place)
    assert (code, [line for line in lines if "changed" in line]) == (0, [])


@pytest.mark.slow
def test_a_run_that_has_made_more_steps_than_asked_for_is_refused_and_one_that_has_made_all_shows_it(place):
    code, lines = run_script(["--resume", "--output_dir", str(place / "run"), "--train_steps", "2"])[:2]
    assert code == 0
    code, _, (line,) = run_script(["--resume", "--output_dir", str(place / "run"), "--train_steps", "1"])
    assert code == 2
    assert line.startswith(f"error: --resume: the run in {place / 'run'} has made 2 steps, more than the 1 ")
    code, lines, _ = run_script(["--resume", "--output_dir", str(place / "run")])
    assert code == 0
    assert "All 2 steps are made already; a higher --train_steps goes on" in lines


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "", "{", "[1]"], ids=str)
def test_a_summary_that_is_missing_or_damaged_stops_no_resume(place, content):
    path = place / "run" / "summary.json"
    path.unlink() if content is None else path.write_text(content)
    assert _resume(place)[0] == 0
    assert read_json(path)["status"] == "finished"
