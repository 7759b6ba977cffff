"""Warnings about text that teaches or shows little, each with its number."""

import random

import pytest

from sar_kd.config.sections import LossConfig, TrainConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Conversation, Document, Message
from sar_kd.errors import UsageError
from sar_kd.preflight.checks import describe_text
from sar_kd.preflight.data_checks import alignment_warnings, learns_chat, overlap, repeated_documents, text_warnings
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

BLOCK = 32


@pytest.fixture(scope="module")
def build(byte_tokenizer):
    """A dataset of these texts or conversations, a token a byte."""
    size = len(byte_tokenizer)
    pair = TokenizerPair(byte_tokenizer, byte_tokenizer, student_vocab_size=size, teacher_vocab_size=size)

    def build(*texts, block=BLOCK):
        documents = [Document(str(i), text) if isinstance(text, str) else text for i, text in enumerate(texts)]
        return build_dataset(documents, pair, block, block)

    return build


def _text(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz ", k=length))


def _naive_overlap(train: list[int], held_out: list[int]) -> float:
    """By definition: of the held-out tokens, those that end 16 tokens which are also in the training tokens."""
    windows = {tuple(train[i : i + 16]) for i in range(len(train) - 15)}
    return sum(tuple(held_out[i - 15 : i + 1]) in windows for i in range(15, len(held_out))) / len(held_out)


def test_the_overlap_is_that_of_the_definition(build):
    shared = _text(0, 300)
    train, held_out = build(_text(1, 500) + shared, _text(2, 200)), build(_text(3, 700), shared[50:250])
    expected = _naive_overlap(train.text.student.ids[:].tolist(), held_out.text.student.ids[:].tolist())
    assert 0.1 < expected < 0.5
    assert overlap(train, held_out) == pytest.approx(expected, abs=1e-12)


def test_held_out_documents_that_are_trained_on_are_named_however_few(build):
    texts = [_text(seed, 200) for seed in range(40)]
    train, held_out = build(*texts[:30]), build(*texts[30:], texts[3], texts[7][:-1], "a short one", block=BLOCK)
    settings = TrainConfig(train_steps=1)
    assert repeated_documents(train, held_out) == ["10"]
    assert overlap(train, held_out) < 0.2
    (line,) = text_warnings(train, held_out, settings)
    assert line == (
        "Warning: 1 of 13 held-out documents is in the training text too, word for word (10): they show what was "
        "memorized; leave them out"
    )
    assert text_warnings(build("a short one", *texts[:30]), build(*texts[30:], "a short one"), settings) == []
    talk = Conversation("talk", (Message("user", _text(50, 40), False), Message("assistant", "yes", True)), plain=True)
    train, held_out = build(talk, texts[0], block=200), build(texts[1], talk, talk, block=200)
    assert repeated_documents(train, held_out) == ["talk", "talk"]


def test_held_out_documents_too_few_for_a_verdict_are_told_where_one_is_asked_for(build):
    train, few, enough = (build(*(_text(seed, 200) for seed in range(*seeds))) for seeds in ((0, 9), (9, 28), (9, 29)))
    settings = TrainConfig(train_steps=1)
    (line,) = text_warnings(train, few, settings, has_control=True)
    assert line.startswith("Warning: 19 held-out documents cannot show whether the student and its control differ by")
    assert text_warnings(train, few, settings) == text_warnings(train, enough, settings, has_control=True) == []


@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_a_text_of_a_few_tokens_is_compared_too(build, length):
    text = _text(0, length)
    found, count = overlap(build(text), build(text)), len(build(text).text.student.ids)
    assert found == pytest.approx(max(0, count - 15) / count)


def test_questions_of_one_form_with_short_answers_are_no_held_out_text_that_was_trained_on(build):
    def question(i):
        asked = Message("user", f"Of these two numbers, which one is the larger one: {i} or {i + 1}?", False)
        return Conversation(str(i), (asked, Message("assistant", " the second one", True)), plain=True)

    line = describe_text(build(question(1), block=128), build("some text"), "a.jsonl")[0][0]
    assert line.startswith(f"Text: a.jsonl, {len(' the second one')} bytes to learn, ")
    assert " to learn" not in describe_text(build("some text"), build("some text"), "a.txt")[0][0]
    train, others = [question(i) for i in range(100, 500)], [question(i) for i in range(500, 600)]
    assert overlap(build(*train, block=128), build(*others, block=128)) < 0.2
    assert overlap(build(*train, block=128), build(*train[:100], block=128)) > 0.9


def test_a_student_without_cross_entropy_is_warned_where_the_tokenizers_differ(byte_tokenizer, sp_tokenizer):
    def pair(teacher):
        sizes = {"student_vocab_size": len(sp_tokenizer), "teacher_vocab_size": len(teacher)}
        return TokenizerPair(sp_tokenizer, teacher, aligns=True, **sizes)

    without = LossConfig(alpha_ce=0.0, alpha_kd=1.0)
    (line,) = alignment_warnings(pair(byte_tokenizer), without)
    assert line.startswith("Warning: --alpha_ce 0 between different tokenizers")
    assert alignment_warnings(pair(sp_tokenizer), without) == []
    assert alignment_warnings(pair(byte_tokenizer), LossConfig(alpha_ce=0.1, alpha_kd=0.9)) == []
    assert alignment_warnings(pair(byte_tokenizer), LossConfig(alpha_ce=0.0, alpha_kd=1.0, alignment="uld")) == []


def test_a_run_learns_chat_where_its_student_gets_a_chat_template(build):
    turns = Message("user", "a", False), Message("assistant", "b", True)
    assert learns_chat(build(Conversation("0", turns, plain=False)))
    assert not learns_chat(build(Conversation("0", turns, plain=True)))
    assert not learns_chat(build("some text"))


def test_healthy_text_is_not_warned_about(build):
    settings = TrainConfig(train_steps=10, per_device_batch_size=2)
    assert text_warnings(build(_text(1, 3000)), build(_text(2, 1500)), settings) == []


def test_held_out_text_that_is_training_text_is_shown_with_its_share(build):
    text = _text(1, 3000)
    (line,) = text_warnings(build(text), build(text), TrainConfig(train_steps=1))
    assert line.startswith("Warning: 99% of the held-out text is in the training text too")
    (line,) = text_warnings(build(text), build(text[:1000] + _text(5, 1000)), TrainConfig(train_steps=1))
    assert line.startswith("Warning: 49% of the held-out text")
    assert text_warnings(build(text), build(text), TrainConfig(train_steps=1), is_generated=True) == []


def test_text_of_a_few_bytes_is_shown_with_its_tokens(build):
    lines = text_warnings(build("ab"), build("c"), TrainConfig(train_steps=1, per_device_batch_size=1))
    count = build("ab").num_tokens
    assert lines[0] == f"Warning: the training text has only {count} tokens: there is next to nothing to learn"
    assert lines[1].startswith("Warning: the held-out text has only")
    assert "--validation_file" in lines[1]


@pytest.mark.parametrize(("ranks", "blocks"), [(1, 256), (4, 1024)])
def test_fewer_blocks_than_an_update_takes_are_shown_with_both_numbers(build, ranks, blocks):
    train = build(_text(1, 3000))
    settings = TrainConfig(train_steps=1, per_device_batch_size=64, grad_accum_steps=4)
    (line,) = text_warnings(train, build(_text(2, 1500)), settings, ranks)
    assert f"has {len(train)} blocks, and an update takes {blocks:,}: each" in line
    assert text_warnings(train, build(_text(2, 1500)), settings, ranks, share=len(train) / blocks) == []


@pytest.mark.parametrize("option", ["grad_accum_steps", "per_device_batch_size"])
def test_a_step_that_would_not_end_is_refused(build, option):
    train = build(_text(1, 3000))
    settings = TrainConfig(train_steps=1, **{"per_device_batch_size": 1, option: 1000 * len(train)})
    assert len(text_warnings(train, build(_text(2, 1500)), settings)) == 1
    with pytest.raises(
        UsageError, match=f"^--{option} 100000000: .* {len(train)} blocks, and an update takes 100,000,000"
    ):
        text_warnings(train, build(_text(2, 1500)), TrainConfig(**{"per_device_batch_size": 1, option: 10**8}))


def test_a_teacher_top_k_of_the_whole_vocabulary_is_said_to_have_no_effect(byte_tokenizer):
    size = len(byte_tokenizer)
    pair = TokenizerPair(byte_tokenizer, byte_tokenizer, student_vocab_size=size, teacher_vocab_size=size)
    assert alignment_warnings(pair, LossConfig(teacher_top_k=size - 1)) == []
    (line,) = alignment_warnings(pair, LossConfig(teacher_top_k=size))
    assert line == f"--teacher_top_k {size}: has no effect, as the teacher has {size} tokens"
    assert alignment_warnings(pair, LossConfig(teacher_top_k=size, alpha_kd=0.0)) == []


def test_many_passes_are_shown_with_their_number(build):
    train = build(_text(1, 3000))
    settings = TrainConfig(train_steps=60 * len(train), per_device_batch_size=1)
    (line,) = text_warnings(train, build(_text(2, 1500)), settings)
    assert "read the training text 60 times" in line
