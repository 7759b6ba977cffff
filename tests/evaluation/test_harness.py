"""lm-evaluation-harness on models in memory: the shipped task scores as our own accuracy does. Skipped without it."""

import json

import pytest

pytest.importorskip("lm_eval", reason="needs `pip install lm-eval accelerate`")

import torch

from sar_kd.config.sections import DeviceConfig
from sar_kd.data.chat.encoding import DEFAULT_TEMPLATE
from sar_kd.data.unit_questions import questions
from sar_kd.evaluation import harness
from sar_kd.evaluation.harness import TASKS, evaluate_tasks, load_tasks
from sar_kd.evaluation.tasks.unit_conversion import load_questions, score
from sar_kd.runtime.precision import setup_precision

LOCAL = """
task: letters
custom_dataset: !function letters.load
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["a", "b"]
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
"""
LOADER = """
import datasets

def load(**options):
    return {"test": datasets.Dataset.from_list([{"text": "x " * n, "label": n % 2} for n in range(1, 9)])}
"""


@pytest.fixture
def precision():
    return setup_precision(DeviceConfig(device="cpu", model_dtype="float32"), 0)


def test_the_shipped_task_asks_the_test_questions_in_order():
    rows, own = load_questions()["test"], questions("test", 500)
    assert [row["question"] for row in rows] == [question.text for question in own]
    assert score(rows[3], [own[3].answer]) == {"accuracy": 1.0, "answer_rate": 1.0}
    assert score(rows[3], ["<answer>-1</answer>"]) == {"accuracy": 0.0, "answer_rate": 1.0}
    assert score(rows[3], ["none"]) == {"accuracy": 0.0, "answer_rate": 0.0}


def test_a_model_is_scored_with_a_standard_error(make_student, byte_tokenizer, precision, monkeypatch):
    """Every second answer is put into its mouth."""
    own = questions("test", 500)
    model = make_student(len(byte_tokenizer), num_hidden_layers=1).eval()
    tasks = load_tasks(["unit_conversion"])
    tokenizer = byte_tokenizer
    tokenizer.chat_template = DEFAULT_TEMPLATE
    asked = []

    def generate_until(self, requests, **options):
        asked.extend(request.args[0] for request in requests)
        return [own[request.doc_id].answer if request.doc_id % 2 else "?" for request in requests]

    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    scores = evaluate_tasks(model, tokenizer, tasks, precision, limit=8, apply_chat_template=True)
    tokenizer.chat_template = None
    found = {each.metric: each for each in scores}
    assert found["accuracy"].value == found["answer_rate"].value == 0.5
    assert found["accuracy"].stderr == pytest.approx((0.25 / 7) ** 0.5)
    assert found["accuracy"].num_questions == 8
    assert asked[2] == f"User:\n{own[2].text}\n\nAssistant:\n"


def test_the_start_token_is_put_before_each_prompt_once(byte_tokenizer, sp_tokenizer):
    for tokenizer in (byte_tokenizer, sp_tokenizer):
        own = harness._with_start_token(tokenizer)
        start = tokenizer.bos_token_id
        assert own.encode("a b") == [start, *tokenizer.encode("a b", add_special_tokens=False)]
        assert harness._with_start_token(own) is own
        assert tokenizer.encode("a b")[:1] != [start]


def test_a_local_task_file_needs_nothing_else(make_student, byte_tokenizer, precision, tmp_path):
    (tmp_path / "letters.yaml").write_text(LOCAL)
    (tmp_path / "letters.py").write_text(LOADER)
    model = make_student(len(byte_tokenizer), num_hidden_layers=1).eval()
    tasks = load_tasks([str(tmp_path / "letters.yaml")])
    (found,) = evaluate_tasks(model, byte_tokenizer, tasks, precision, batch_size=3)
    right = 0
    for n in range(1, 9):
        prompt, (a, b) = "x " * n, ([byte_tokenizer.encode(f" {c}", add_special_tokens=False)] for c in "ab")
        losses = []
        for choice in (a[0], b[0]):
            ids = byte_tokenizer.encode(prompt.rstrip(), add_special_tokens=False)
            logits = model(torch.tensor([[*ids, *choice]])).logits[0].double().log_softmax(1)
            losses.append(sum(logits[len(ids) - 1 + i, token].item() for i, token in enumerate(choice)))
        right += losses[n % 2] == max(losses)
    assert (found.task, found.metric, found.num_questions) == ("letters", "acc", 8)
    assert found.value == right / 8


@pytest.mark.parametrize(
    ("name", "message"), [("no_such_task", "no such task; see `lm-eval ls tasks`"), ("none.yaml", "no such file")]
)
def test_a_task_that_is_not_there_is_named(name, message):
    with pytest.raises(ValueError, match=f"--tasks {name}: {message}"):
        load_tasks([name])


def test_the_task_file_ships_with_its_code():
    assert {"unit_conversion.yaml", "unit_conversion.py"} <= {path.name for path in TASKS.iterdir()}
    assert json.dumps(sorted(load_tasks(["unit_conversion"]))) == '["unit_conversion"]'
