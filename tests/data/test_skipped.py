"""Documents that cannot be used: their reasons and remedies."""

from types import SimpleNamespace

import pytest

from sar_kd.data.skipped import NO_COMMON_END, TOO_LONG, by_reason, is_incomplete, skipped_lines, unusable

SKIPPED = [
    f"a.jsonl:1 ({TOO_LONG})",
    "a.txt (end)",
    "b.jsonl:2 (the student's chat template refuses it: no (such) turns)",
    "b.jsonl:3 (the student's chat template refuses it: no (such) turns)",
    "c.jsonl:4 (its 'messages' is null)",
    "plain",
    "d (is no Unicode text)",
]


def test_names_are_told_from_reasons():
    assert by_reason(SKIPPED) == {
        "empty, or no Unicode text": ["a.txt (end)", "plain"],
        "the student's chat template refuses it: no (such) turns": ["b.jsonl:2", "b.jsonl:3"],
        TOO_LONG: ["a.jsonl:1"],
        "its 'messages' is null": ["c.jsonl:4"],
        "is no Unicode text": ["d"],
    }


def test_an_incomplete_example_is_told_from_others():
    nulls = ["c:4 (its 'messages' is null)", "x (message 2 of its 'messages' has null as 'content')", "y (is null)",
             "z:1 (its 'completion' holds nothing to learn)"]  # fmt: skip
    assert all(map(is_incomplete, nulls))
    others = ["null", "a (null)", "b (the student's chat template refuses it: null)", f"c ({TOO_LONG})"]
    assert not any(map(is_incomplete, others))


def _text(documents=(), passages=(), skipped_bytes=0, num_bytes=1000):
    return SimpleNamespace(
        skipped_documents=documents, skipped_passages=passages, skipped_bytes=skipped_bytes, num_bytes=num_bytes
    )


def test_each_reason_has_a_line():
    passages = [f"a.txt ({NO_COMMON_END})", "b (b) (the student's tokenizer changes it)", f"a.txt ({NO_COMMON_END})"]
    assert skipped_lines(_text(SKIPPED[:3], passages, 50, 1950), _text([], [], 10, 1990)) == [
        f"Skipped 1 document, {TOO_LONG}: a.jsonl:1",
        "Skipped 1 document, empty, or no Unicode text: a.txt (end)",
        "Skipped 1 document, the student's chat template refuses it: no (such) turns: b.jsonl:2",
        f"Skipped 2 passages, {NO_COMMON_END}: a.txt",
        "Skipped 1 passage, the student's tokenizer changes it: b (b)",
        "Skipped because of the tokenizers: 60 bytes, 1.50% of the text",
    ]
    assert skipped_lines(_text()) == []


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        (TOO_LONG, "raise --block_size, or shorten the prompts"),
        ("the teacher's chat template drops a part of the answer", "leave reasoning and tool calls out of the text"),
        ("the student's chat template refuses it: System role not supported", "leave the system messages out"),
        ("the student's chat template refuses it: x", "change the text to what the template takes"),
        ("the student's tokenizer changes its text", "use another model"),
        ("its 'prompt' is null", "correct these examples"),
    ],
)
def test_each_reason_has_its_remedy(reason, remedy):
    message = str(unusable("--train_file a", [f"x ({reason})", f"y ({reason})", "z"], 9))
    assert message.startswith("--train_file a: 3 of its 9 documents cannot be used (1 other for other reasons): ")
    assert f"{reason}: x, y; {remedy}" in message
