"""`sar-kd eval`: its results in the summary, the card and the report; what it refuses. The harness itself is a stub."""

import json
import math

import pytest
import torch
import yaml

from sar_kd.commands import evaluate, main
from sar_kd.evaluation import harness
from sar_kd.evaluation.harness import Score
from tests.helpers.runs import argv_of, inputs, read_json, run_script

_INPUTS = inputs


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    code, _, err = run_script(argv_of(inputs, folder, "--control", "--trust_remote_code"))
    assert code == 0, err
    return folder


@pytest.fixture
def asked(monkeypatch):
    """What the stub was asked; the value of the metric is the number of the question."""
    calls = []

    def scores(model, tokenizer, tasks, precision, **options):
        calls.append({"model": model, "dtype": precision.dtype, "tasks": list(tasks), **options})
        stderr = math.nan if "none" in tasks else 0.125
        return [Score(task, "accuracy", 0.25 * len(calls), stderr, 4) for task in tasks]

    monkeypatch.setattr(evaluate, "require_harness", lambda: None)
    monkeypatch.setattr(evaluate, "load_tasks", lambda names: dict.fromkeys(names))
    monkeypatch.setattr(evaluate, "evaluate_tasks", scores)
    return calls


def _eval(capsys, *argv) -> tuple[int, str, str]:
    code = main.main(["eval", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_model_of_a_run_is_evaluated_in_the_runs_dtype(run, inputs, asked, capsys):
    which = ("start", "control", "distilled", "teacher")
    code, out, err = _eval(capsys, run, "--which", *which, "--limit", 4, "--device", "cpu")
    assert code == 0, err
    assert [call["dtype"] for call in asked] == [torch.float16] * 4
    assert [call["model"].dtype for call in asked] == [torch.float32] * 3 + [torch.float16]
    assert [type(call["model"]).__name__ for call in asked] == ["LlamaForCausalLM"] * 3 + ["Qwen3MoeForCausalLM"]
    assert all(call["limit"] == 4 and not call["apply_chat_template"] for call in asked)
    found = read_json(run / "summary.json")["harness"]
    assert list(found) == list(which)
    entry = found["distilled"]["unit_conversion"]
    assert entry["metrics"] == {"accuracy": {"value": 0.75, "stderr": 0.125}}
    assert (entry["num_questions"], entry["dtype"], entry["limit"], entry["num_fewshot"]) == (4, "float16", 4, -1)
    assert out.splitlines()[3].split() == ["distilled", "unit_conversion", "accuracy", "0.7500", "+-", "0.1250", "4"]


def test_the_results_are_on_the_card_and_on_the_page(run, asked, capsys):
    assert _eval(capsys, run, "--tasks", "unit_conversion", "other.yaml", "--device", "cpu")[0] == 0
    card = (run / "student" / "README.md").read_text()
    _, metadata, body = card.split("---\n", 2)
    (model,) = yaml.safe_load(metadata)["model-index"]
    results = [(each["dataset"]["type"], each["metrics"][0]) for each in model["results"]]
    assert [name for name, _ in results] == ["unit_conversion", "other.yaml"]
    assert results[0][1]["value"] == 0.25
    assert results[0][1]["args"] == {"stderr": 0.125, "num_questions": 4}
    row = ["distilled", "unit_conversion", "accuracy", "0.2500 +- 0.1250", "4"]
    assert f"| {' | '.join(row)} |" in body
    page = (run / "report.html").read_text()
    assert "lm-evaluation-harness" in page
    assert all(f">{cell}</td>" in page for cell in row)


def test_earlier_results_stay_and_json_has_the_new_ones(run, asked, capsys):
    assert _eval(capsys, run, "--which", "start", "--tasks", "a", "--device", "cpu")[0] == 0
    code, out, err = _eval(capsys, run, "--which", "start", "--tasks", "none", "--json", "--device", "cpu")
    assert (code, err) == (0, "")
    assert json.loads(out)["start"]["none"]["metrics"] == {"accuracy": {"value": 0.5, "stderr": "nan"}}
    assert {"a", "none"} <= read_json(run / "summary.json")["harness"]["start"].keys()


def test_a_chat_template_is_asked_for_where_there_is_one(run, asked, capsys):
    code, _, err = _eval(capsys, run, "--apply_chat_template", "--device", "cpu")
    assert code == 2
    assert "--apply_chat_template: the tokenizer of" in err
    (run / "student" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert _eval(capsys, run, "--apply_chat_template", "--device", "cpu")[0] == 0
    assert asked[-1]["apply_chat_template"]
    (run / "student" / "chat_template.jinja").unlink()


def test_what_cannot_be_is_said_in_one_line(run, asked, tmp_path, capsys, monkeypatch, inputs):
    for argv, message in (
        ([tmp_path], "holds no run"),
        ([inputs / "student"], "holds no run"),
        ([run, "--which", "best"], "--which best: must be start, control, distilled, teacher"),
        ([run, "--limit", "-1"], "--limit -1: must be"),
    ):
        code, _, err = _eval(capsys, *argv)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1
    monkeypatch.undo()
    monkeypatch.setattr(harness, "is_installed", lambda name: name != "lm_eval")
    code, _, err = _eval(capsys, run)
    assert (code, err) == (2, "error: eval: needs `pip install lm-eval`\n")
