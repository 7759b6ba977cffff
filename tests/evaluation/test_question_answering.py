"""Question answering: the prompts, the counts, and that a batch gets the answers of one question at a time."""

import copy

import pytest
import torch
import transformers

from sar_kd.data import unit_questions
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files import sources
from sar_kd.data.files.samples import Conversation, Message
from sar_kd.data.unit_questions import Question
from sar_kd.evaluation.question_answering import AnswerScores, answer_questions
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

CPU = torch.device("cpu")
FLOAT32 = Precision(CPU, torch.float32, 1.0)


def _conversations(questions):
    return [
        Conversation(asked.text, (Message("user", asked.text, False), Message("assistant", asked.answer, True)), True)
        for asked in questions
    ]


@pytest.fixture
def questions():
    return unit_questions.questions("test", 7)


@pytest.fixture
def dataset(questions, sp_tokenizer):
    size = len(sp_tokenizer)
    pair = TokenizerPair(sp_tokenizer, sp_tokenizer, student_vocab_size=size, teacher_vocab_size=size, projects=False)
    return build_dataset(_conversations(questions), pair, 200, 200)


class Scripted(torch.nn.Module):
    """A model with scripted answers that records its prompts."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.weight, self.config = torch.nn.Parameter(torch.zeros(1)), transformers.LlamaConfig()
        self.tokenizer, self.answers, self.prompts = tokenizer, answers, []
        self.device, self.generation_config = CPU, transformers.GenerationConfig()

    def get_output_embeddings(self):
        return torch.nn.Linear(1, 1)

    def generate(self, input_ids, attention_mask, eos_token_id, pad_token_id, **how):
        assert not torch.is_grad_enabled()
        assert not self.training
        assert (how["do_sample"], how["num_beams"]) == (False, 1)
        self.prompts += [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        answers = [self.tokenizer(a, add_special_tokens=False)["input_ids"] + eos_token_id for a in self.answers]
        width = max(map(len, answers))
        padded = [ids + [pad_token_id] * (width - len(ids)) for ids in answers]
        return torch.cat([input_ids, torch.tensor(padded)], 1)


def test_every_answer_is_counted_once(questions, dataset, sp_tokenizer):
    answers = [asked.answer for asked in questions]
    answers[1], answers[2], answers[3] = "<answer>-1</answer>", "no tags 5", "<answer>x</answer>"
    model = Scripted(sp_tokenizer, answers).train()
    result = answer_questions(model, dataset, questions, FLOAT32)
    assert result == AnswerScores(num_right=4, num_answered=5, num_questions=7)
    assert (result.accuracy, result.answer_rate) == (4 / 7, 5 / 7)
    assert model.training  # as it was found
    assert result.line("x").startswith("benchmark_result.accuracy=0.571  benchmark_result.answer_rate=0.714")


def test_answers_that_end_at_logits_that_are_not_finite_are_counted(questions, dataset, sp_tokenizer, make_student):
    model = make_student(len(sp_tokenizer)).eval()
    fine = answer_questions(model, dataset, questions, FLOAT32)
    assert fine.num_nonfinite == 0
    assert "not finite" not in fine.line("x")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    result = answer_questions(model, dataset, questions, FLOAT32)
    assert (result.num_answered, result.num_nonfinite) == (0, 7)
    assert result.line("x").endswith("(x, 7 questions, 7 ended at logits that are not finite)")


def test_the_prompt_is_what_precedes_the_answer_in_training(questions, dataset, sp_tokenizer):
    model = Scripted(sp_tokenizer, [asked.answer for asked in questions])
    answer_questions(model, dataset, questions, FLOAT32)
    ids = [sp_tokenizer(asked.text, add_special_tokens=False)["input_ids"] for asked in questions]
    assert model.prompts == [[sp_tokenizer.bos_token_id, *prompt] for prompt in ids]


def test_a_skipped_question_counts_as_not_answered(questions, dataset, sp_tokenizer):
    model = Scripted(sp_tokenizer, [asked.answer for asked in questions])
    more = [*questions, Question("length", "skipped", "<answer>1</answer>", 1.0, "test")]
    assert answer_questions(model, dataset, more, FLOAT32) == AnswerScores(7, 7, 8)


def test_a_chat_templates_own_stop_token_ends_an_answer(questions, sp_tokenizer):
    chat = copy.deepcopy(sp_tokenizer)
    chat.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    chat.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    pair = TokenizerPair(chat, chat, student_vocab_size=len(chat), teacher_vocab_size=len(chat), projects=False)
    dataset = build_dataset(_conversations(questions), pair, 200, 200)
    stop = chat.convert_tokens_to_ids("<|im_end|>")

    class Stopping(Scripted):
        def generate(self, eos_token_id, **how):
            assert set(eos_token_id) == {stop, chat.eos_token_id}
            return super().generate(eos_token_id=eos_token_id, **how)

    result = answer_questions(Stopping(chat, [asked.answer for asked in questions]), dataset, questions, FLOAT32)
    assert result.accuracy == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_padded_batch_answers_as_one_question_at_a_time(make_student, sp_tokenizer, questions, dataset, dtype):
    """Real generation, in float16 under half weights too: padding on the left changes no answer."""
    model = make_student(len(sp_tokenizer)).eval()
    for value in model.parameters():
        value.data = value.data.to(dtype)
    precision = Precision(CPU, dtype, 1.0)
    answers = {}
    generate = model.generate

    def recording(input_ids, attention_mask, **how):
        out = generate(input_ids=input_ids, attention_mask=attention_mask, **how | {"max_new_tokens": 8})
        for ids, mask, answer in zip(input_ids, attention_mask, out[:, input_ids.shape[1] :], strict=True):
            answers.setdefault(tuple(ids[mask.bool()].tolist()), []).append(answer.tolist())
        return out

    model.generate = recording
    assert len({len(ids) for ids in (sp_tokenizer(q.text)["input_ids"] for q in questions)}) > 1
    answer_questions(model, dataset, questions, precision)
    for asked in questions:
        alone = build_dataset(_conversations([asked]), dataset.pair, 200, 200)
        answer_questions(model, alone, [asked], precision)
    assert all(together == alone for together, alone in answers.values())


def test_the_tasks_conversations_are_the_splits_of_the_generator():
    for split, count in unit_questions.COUNTS.items():
        found = sources.task_questions(split)
        assert len(found) == count
        assert [c.name for c in found[:5]] == [asked.text for asked in unit_questions.questions(split, 5)]
        assert all(c.messages[1].is_target and not c.messages[0].is_target for c in found[:5])
