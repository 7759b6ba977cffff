"""`--task units` for the distillation scripts: the teacher, then the run and its control, and one table of all."""

import pytest

from sar_kd.commands import unit_task
from sar_kd.config.command_line import parse
from sar_kd.config.presets import STABLE
from sar_kd.data import unit_questions
from tests.helpers.runs import read_json, run_script

pytestmark = pytest.mark.slow


def _run(folder, *more):
    argv = [
        "--task", "units", "--output_dir", str(folder), "--train_steps", "4", "--task_teacher_steps", "3",
        "--per_device_batch_size", "2", "--eval_steps", "2", "--log_steps", "2", *map(str, more),
    ]  # fmt: skip
    return run_script(argv)


@pytest.fixture(scope="module")
def small():
    """A task of a few questions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_questions, "COUNTS", {"train": 40, "validation": 6, "test": 8})
        yield


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    code, out, err = _run(folder)
    assert (code, err) == (0, [])
    return folder, out


def test_teacher_and_control_are_runs_of_their_own_beside_it(done):
    folder, _ = done
    teacher, baseline = (read_json(f"{folder}-{name}/summary.json") for name in ("teacher", "control"))
    assert (teacher["status"], teacher["steps"]) == ("finished", 3)
    assert (baseline["status"], baseline["steps"]) == ("finished", 4)
    assert read_json(folder / "config.json")["models"]["teacher_model"] == f"{folder}-teacher/student"
    assert teacher["val_ppl_final"] < teacher["val_ppl_start"]


def test_each_part_begins_with_its_purpose(done):
    _, out = done
    starts = [i for i, line in enumerate(out) if line.startswith(("Fine-tuning ", "Distilling ", "Training embedded "))]
    assert len(starts) == 3
    assert out[starts[0] + 1].startswith("First the teacher learns --task units")
    assert out[starts[2] + 1].startswith("Control: the same student, start, batches and steps")


def test_accuracy_and_answer_rate_stand_beside_perplexity_for_all_four(done):
    folder, out = done
    summary = read_json(folder / "summary.json")
    assert summary["benchmark_result"].keys() == {"student_start", "student_end", "student", "teacher"}
    assert summary["control"].keys() >= {"val_ppl_best", "accuracy", "answer_rate"}
    header = max(i for i, line in enumerate(out) if "answer rate" in line and "perplexity" in line)  # the last run's
    rows = {line[:30].strip(): line[30:].split() for line in out[header + 1 : header + 6]}
    assert {name.split(" (")[0] for name in rows} == {
        "student, start", "student, end", "student, best", "control, best", "teacher"
    }  # fmt: skip
    assert all(len(metrics) == 4 for metrics in rows.values())


def test_the_same_command_uses_finished_runs_as_they_are(done, monkeypatch):
    folder, _ = done
    monkeypatch.setattr(unit_task, "fine_tune", lambda config: pytest.fail("trained again"))
    before = read_json(f"{folder}-teacher/summary.json")
    code, out, err = _run(folder)
    assert (code, out) == (2, [])
    assert "holds a run; --resume continues it" in err[0]
    assert read_json(f"{folder}-teacher/summary.json") == before


def test_without_a_task_nothing_comes_before(monkeypatch):
    monkeypatch.setattr(unit_task, "fine_tune", lambda config: pytest.fail("trained"))
    config = parse(STABLE, [])
    assert unit_task.prepare_task(config) is config
    assert unit_task.task_callbacks(config, None, (8, 8), None) == []


def test_skip_baseline_leaves_it_out(small, tmp_path):
    code, out, err = _run(tmp_path / "run", "--skip_baseline", "--task_teacher_steps", "0")
    assert (code, err) == (0, [])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    scores = read_json(tmp_path / "run" / "summary.json")["benchmark_result"]
    assert scores.keys() == {"student", "teacher", "student_start", "student_end"}
    assert not any("control" in line for line in out)
