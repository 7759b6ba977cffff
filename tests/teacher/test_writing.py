"""The prompts that a teacher gets, its answers against transformers' own generation, and the filters."""

import itertools
import json

import numpy as np
import pytest
import torch

from sar_kd.config.sections import DeviceConfig
from sar_kd.config.writing import WriteConfig
from sar_kd.data.files.prompts import read_prompts
from sar_kd.models.generation import Generation
from sar_kd.models.loading import TeacherInfo
from sar_kd.runtime.precision import setup_precision
from sar_kd.teacher import writing
from sar_kd.teacher.writing import Answer, Writer, repeats_itself
from sar_kd.tokenization.backends import encode
from tests.helpers.writing_models import CHATML, build_writer, with_template

THINKING = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
BEGUN = THINKING.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
TURNS = [{"role": "user", "content": "Add 1 and 1."}]


@pytest.fixture
def prompts_of(tmp_path):
    """prompts_of(*rows): as they are read from a file."""

    def read(*rows):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_prompts((str(path),), "text", pytest.fail)

    return read


def _writer(tokenizer, limit=128, model=None, **options):
    config = WriteConfig(prompts=("-",), output="x.jsonl", **{"sample_temperature": 0.0, **options})
    precision = setup_precision(DeviceConfig(device="cpu", model_dtype="float32"), 0)
    model = model or build_writer(tokenizer)
    info = TeacherInfo(len(tokenizer), (tokenizer.eos_token_id,), limit)
    return Writer(config, model, tokenizer, info, "2026-01-31", precision)


@pytest.fixture
def chat_tokenizer(byte_tokenizer):
    return with_template(byte_tokenizer, CHATML)


def _generated(model, ids, stops, limit):
    """What transformers writes behind one prompt, greedily."""
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=limit, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]
    )
    new = out[0, len(ids) :].tolist()
    end = next((i for i, token in enumerate(new) if token in stops), None)
    return new[:end], end is None


@pytest.mark.parametrize("stop_bias", [-50.0, 2.0])
def test_greedy_answers_are_those_of_transformers_generate(chat_tokenizer, prompts_of, stop_bias):
    model = build_writer(chat_tokenizer, stop_bias)
    writer = _writer(chat_tokenizer, model=model, max_new_tokens=24, keep_unfinished=True, repeat_limit=0)
    prompts = prompts_of({"messages": TURNS}, {"prompt": "Name a colour"}, {"text": "The museum opens at nine, and"})
    encoded = writer.encode(prompts)
    answers = writer.write(encoded, [(i, 0) for i in range(3)])
    stops = sorted({*writer.table.end_ids})
    for turns, prompt, answer in zip(
        [TURNS, [{"role": "user", "content": "Name a colour"}], None], encoded, answers, strict=True
    ):
        if turns:
            ids = chat_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        else:
            ids = [chat_tokenizer.bos_token_id, *encode(chat_tokenizer, ["The museum opens at nine, and"])[0][:32]]
        assert prompt.ids == ids
        new, is_cut_off = _generated(model, ids, stops, 24)
        text = chat_tokenizer.decode(new)
        assert (answer.reason, answer.is_cut_off) == ("", is_cut_off)
        assert answer.text == (text.strip() if turns else text)
        assert len(answer.text) > 3 or stop_bias > 0


def test_an_answer_depends_on_its_own_seed_and_not_on_what_is_written_with_it(chat_tokenizer, prompts_of):
    writer = _writer(chat_tokenizer, sample_temperature=1.0, keep_unfinished=True, repeat_limit=0, max_new_tokens=16)
    first, second = writer.encode(prompts_of({"messages": TURNS}, {"prompt": "Name a colour, any of them"}))
    (alone,) = writer.write([first], [(0, 0)])
    together = writer.write([second, first, first, first], [(1, 0), (0, 0), (0, 1), (5, 0)])
    assert together[1] == alone
    assert len({answer.text for answer in together}) == 4


def test_half_precision_writes_too(chat_tokenizer, prompts_of):
    model = build_writer(chat_tokenizer)
    writer = _writer(chat_tokenizer, model=model.half(), keep_unfinished=True, repeat_limit=0, max_new_tokens=8)
    writer.precision = setup_precision(DeviceConfig(device="cpu", model_dtype="float16"), 0)
    (answer,) = writer.write(writer.encode(prompts_of({"messages": TURNS})), [(0, 0)])
    assert answer.text


@pytest.mark.parametrize("tokenizer", ["byte_tokenizer", "sp_tokenizer", "dummy_prefix_tokenizer"])
def test_the_beginning_of_a_document_ends_with_a_character(request, prompts_of, tokenizer):
    tokenizer = request.getfixturevalue(tokenizer)
    text = "na\u00efve \u65e5\u672c\u8a9e\u306e\u6587\u7ae0 \U0001f600 and so on"
    for size in range(1, 12):
        writer = _writer(tokenizer, prompt_tokens=size)
        (prompt,) = writer.encode(prompts_of({"text": text}))
        assert not isinstance(prompt, str)
        assert prompt.beginning
        assert text.startswith(prompt.beginning)
        *start, last = (len(encode(tokenizer, [prompt.beginning])[0]), size)
        assert start[0] <= last
        assert prompt.ids[0] == writer.table.start_id
        assert prompt.ids[1:] == encode(tokenizer, [text])[0][: len(prompt.ids) - 1]


def test_a_document_within_its_first_character_is_skipped(byte_tokenizer, prompts_of):
    (reason,) = _writer(byte_tokenizer, prompt_tokens=1).encode(prompts_of({"text": "\U0001f600"}))
    assert reason == "its first 1 tokens are no whole character"


def test_what_cannot_be_answered_is_skipped_with_its_reason(chat_tokenizer, prompts_of):
    rows = [{"text": "\ud800 half"}, {"prompt": "\ud800"}, {"prompt": None}, {"prompt": "a " * 200}, {"prompt": "fine"}]
    encoded = _writer(chat_tokenizer).encode(prompts_of(*rows))
    assert encoded[:3] == ["is no Unicode text", "is no Unicode text", "its 'prompt' is null"]
    assert "the teacher takes 128" in encoded[3]
    assert not isinstance(encoded[4], str)


@pytest.fixture
def judge(monkeypatch, chat_tokenizer, prompts_of):
    """judge(text, ...): the answer where the teacher writes this text, or these ids."""

    def judged(written, stop=0, is_finite=True, template=CHATML, row=None, **options):
        tokenizer = with_template(chat_tokenizer, template)
        writer = _writer(tokenizer, **options)
        ids = encode(tokenizer, [written])[0] if isinstance(written, str) else written(tokenizer)
        monkeypatch.setattr(writing, "generate", lambda *args, **how: [Generation(ids, stop, is_finite)])
        encoded = writer.encode(prompts_of(row or {"messages": TURNS}))
        return writer.write(encoded, [(0, 0)])[0], encoded[0]

    return judged


@pytest.mark.parametrize(
    ("written", "how", "reason"),
    [
        ("It is 2.", {"is_finite": False}, "nonfinite"),
        (lambda t: encode(t, ["It"])[0] + [t.convert_tokens_to_ids("<|im_start|>")], {}, "special"),
        (lambda t: encode(t, ["\u65e5"])[0][:1], {}, "broken_utf8"),
        ("", {}, "empty"),
        (" \n ", {}, "empty"),
        ("Yes: so it is, so it is, so it is,", {}, "repeated"),
        ("Yes: so it is, so it is, so it is,", {"repeat_limit": 4}, ""),
        ("Yes: so it is, so it is, so it is,", {"repeat_limit": 0}, ""),
        ("It is", {"stop": None}, "unfinished"),
        ("It is", {"stop": None, "keep_unfinished": True}, ""),
        ("It is", {"stop": None, "row": {"text": "The sum of 1 and 1."}}, ""),
        ("It is 2.", {}, ""),
    ],
)
def test_an_answer_is_dropped_for_the_first_reason_that_holds(judge, written, how, reason):
    answer, _ = judge(written, **how)
    assert answer.reason == reason
    if not reason:
        assert answer.text.strip() == written
        assert answer.is_cut_off == ("stop" in how)


def test_a_text_that_is_cut_off_inside_a_character_ends_before_it(judge):
    answer, _ = judge(lambda t: encode(t, ["It is \u65e5"])[0][:-1], stop=None, keep_unfinished=True)
    assert answer == Answer("", "It is", answer.num_tokens, True)


def test_what_the_template_writes_itself_is_no_part_of_the_answer(judge):
    begin = "<think>\n\n</think>\n\n"
    for text, wanted in ((f"{begin}It is 2.\n", "It is 2."), ("It is 2.", "It is 2."), ("<think>\nx", "<think>\nx")):
        answer, prompt = judge(text, template=THINKING)
        assert answer.text == wanted
        assert prompt.beginning == ""


def test_reasoning_that_the_generation_prompt_begins_belongs_to_the_answer(judge):
    answer, prompt = judge("1 + 1\n</think>\n\nIt is 2.", template=BEGUN)
    assert prompt.beginning + answer.text == "<think>\n1 + 1\n</think>\n\nIt is 2."


def test_repetition_is_a_phrase_of_two_tokens_or_more_at_the_end():
    def by_definition(ids, limit):
        for size in range(2, len(ids) + 1):
            phrase, count = ids[-size:], 0
            while len(ids) >= (count + 1) * size and ids[len(ids) - (count + 1) * size :][:size] == phrase:
                count += 1
            if count >= limit:
                return True
        return False

    found = set()
    for length in range(9):
        for ids in itertools.product((1, 2), repeat=length):
            for limit in (2, 3, 4):
                assert repeats_itself(list(ids), limit) == by_definition(list(ids), limit)
                found.add(repeats_itself(list(ids), limit))
            assert not repeats_itself(list(ids), 0)
    assert found == {True, False}
    rng = np.random.default_rng(0)
    phrase = rng.integers(0, 9, 50).tolist()
    assert repeats_itself([7, 7, *phrase * 3], 3)
    assert not repeats_itself([*phrase * 3, 10], 3)
    assert not repeats_itself([1, 2, 3, 4, 4, 4], 3)
