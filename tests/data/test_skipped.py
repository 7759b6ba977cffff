"""Documents that cannot be used: their reasons and remedies."""

import pytest

from sar_kd.data.skipped import TOO_LONG, by_reason, has_null, skipped_lines, unusable

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
        "empty, or changed by a tokenizer": ["a.txt (end)", "plain"],
        "the student's chat template refuses it: no (such) turns": ["b.jsonl:2", "b.jsonl:3"],
        TOO_LONG: ["a.jsonl:1"],
        "its 'messages' is null": ["c.jsonl:4"],
        "is no Unicode text": ["d"],
    }


def test_an_example_with_a_null_is_told_from_others():
    nulls = ["c:4 (its 'messages' is null)", "x (message 2 of its 'messages' has null as 'content')", "y (is null)"]
    assert all(map(has_null, nulls))
    others = ["null", "a (null)", "b (the student's chat template refuses it: null)", f"c ({TOO_LONG})"]
    assert not any(map(has_null, others))


def test_each_reason_has_a_line():
    assert skipped_lines(SKIPPED[:3]) == [
        f"Skipped 1 document, {TOO_LONG}: a.jsonl:1",
        "Skipped 1 document, empty, or changed by a tokenizer: a.txt (end)",
        "Skipped 1 document, the student's chat template refuses it: no (such) turns: b.jsonl:2",
    ]
    assert skipped_lines([]) == []


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
