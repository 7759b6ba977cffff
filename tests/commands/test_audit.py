"""How two tokenizations of a text meet: counted byte by byte, printed by `audit` and at the start of a run."""

import json
import math
import re

import pytest
import transformers
from tokenizers import Tokenizer

from sar_kd.commands.main import main
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files.samples import Conversation, Document, Message
from sar_kd.evaluation.tokenizer_coverage import measure_coverage
from sar_kd.tokenization.tokenizer_pair import TokenizerPair


def _dataset(student, teacher, documents, **how) -> Dataset:
    how = {"aligns": True, **how}
    pair = TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher), **how)
    return build_dataset(documents, pair, 64, 512)


def _spans(table, ids) -> list[tuple[int, int]]:
    at, spans = 0, []
    for token in ids:
        spans.append((at, at + len(table.pieces[token])))
        at = spans[-1][1]
    return spans


def test_shares_are_those_of_a_count_by_hand(sp_tokenizer, byte_tokenizer, corpus_texts):
    text = "\n".join(corpus_texts)
    dataset = _dataset(sp_tokenizer, byte_tokenizer, [Document("all", text)])
    found = measure_coverage(dataset)
    tables, streams = dataset.pair.tables, (dataset.text.student, dataset.text.teacher)
    # Without the start token before the text, which is no target, and the end behind it.
    ids = [stream.ids[stream.is_target][:-1] for stream in streams]
    student, teacher = (_spans(table, own) for table, own in zip(tables, ids, strict=True))
    total = len(student) + 1  # and the end of the text, which both have
    same, starts, student_starts = set(teacher), {a for a, _ in teacher}, {a for a, _ in student}
    assert found.num_tokens == total
    assert found.strict == pytest.approx((sum(span in same for span in student) + 1) / total)
    assert found.both_start == pytest.approx((sum(a in starts for a, _ in student) + 1) / total)
    assert found.inside_teacher == pytest.approx(sum(a not in starts for a, _ in student) / total)
    assert found.inside_student == pytest.approx(sum(a not in student_starts for a, _ in teacher) / total)
    digits = [span for span, token in zip(student, ids[0], strict=True) if _has_digit(tables[0], token)]
    assert found.strict_by_class["digits"] == pytest.approx(sum(span in same for span in digits) / len(digits))
    ends = {b for _, b in student} & {b for _, b in teacher}
    assert found.chunks_per_token == pytest.approx((len(ends) + 1) / total)
    starts, same = f"{found.both_start:.0%}", f"{found.strict:.0%}"
    line = f"Alignment: {starts} of the student's tokens start where a teacher's does, {same} are equal"
    assert found.summary() == line
    for alignment, share in (("strict", found.strict), ("uld", found.both_start)):
        rest = f"--alignment {alignment} leaves the other {1 - share:.0%} to the text alone"
        assert found.summary(alignment) == f"{line}; {rest}"


def _has_digit(table, token: int) -> bool:
    return any(48 <= byte <= 57 for byte in table.pieces[token])


def test_equal_tokenizers_are_covered_completely(byte_tokenizer, corpus_texts):
    documents = [Document(str(i), text) for i, text in enumerate(corpus_texts)]
    found = measure_coverage(_dataset(byte_tokenizer, byte_tokenizer, documents))
    assert (found.strict, found.both_start, found.chunks_per_token) == (1.0, 1.0, 1.0)
    assert (found.inside_teacher, found.inside_student, found.overlapping) == (0.0, 0.0, 0.0)
    assert "token by token" in found.auto_alignment


def test_only_the_target_tokens_of_a_conversation_count(sp_tokenizer, byte_tokenizer):
    conversation = Conversation(
        "talk", (Message("user", "1 2 3 4 5 6", False), Message("assistant", "seven", True)), False
    )
    found = measure_coverage(_dataset(sp_tokenizer, byte_tokenizer, [conversation]))
    assert math.isnan(found.strict_by_class["digits"])
    assert found.chunks_per_token <= 1.0


@pytest.mark.slow
def test_the_command_prints_lines_for_people_and_json_for_programs(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("A short text, of 12 lines.\n" * 12)
    assert main(["audit", "--train_file", str(tmp_path / "text.txt")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"Vocabularies: teacher 2,048 tokens, student 1,024; \d{3} have the same bytes", shown)
    assert "--alignment auto: projection of the teacher's tokens onto the student's" in shown
    assert main(["audit", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert 500 < record["shared_tokens"] < 1024
    assert 0.4 < record["strict"] < record["both_start"] < 1
    assert record["both_start"] + record["inside_teacher"] == pytest.approx(1)
    assert set(record["strict_by_class"]) == {"digits", "whitespace", "non-ASCII"}


def test_the_bytes_that_a_vocabulary_lacks_and_what_they_cost_are_shown(
    capsys, tmp_path, make_student, byte_tokenizer, sp_tokenizer
):
    """A byte-level vocabulary without some control characters, as SmolLM2's, on a text that holds one of them."""
    definition = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    lacking = [chr(0x100 + byte) for byte in (0x04, 0x13)] + ["\xf1"]  # as byte-level BPE spells these bytes
    vocab = [token for token in definition["model"]["vocab"] if not set(token) & set(lacking)]
    definition["model"]["vocab"] = {token: i for i, token in enumerate(vocab)}
    lossy = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), eos_token="<|endoftext|>"
    )
    for name, tokenizer in (("student", lossy), ("teacher", sp_tokenizer)):
        make_student(len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    models = [f"--{name}_model={tmp_path / name}" for name in ("student", "teacher")]
    text = tmp_path / "text.txt"
    text.write_text("a line of words\n" * 60 + "a torn \x13 line\n" + "a line of words\n" * 39, encoding="utf-8")
    assert main(["audit", *models, "--train_file", str(text)]) == 0
    shown = capsys.readouterr().out
    assert "Bytes that no token of the student's vocabulary holds: 04 13 f1\n" in shown
    assert "the teacher's vocabulary holds" not in shown
    assert f"Skipped 1 passage, the student's tokenizer changes it: {text.name}\n" in shown
    assert re.search(r"Skipped because of the tokenizers: 14 bytes, 0.9\d% of the text\n", shown)
    assert main(["audit", *models, "--train_file", str(text), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["student_lacks"], record["teacher_lacks"], record["skipped_bytes"]) == ([4, 0x13, 0xF1], [], 14)
    assert 0.009 < record["skipped_share"] < 0.01
    text.write_text("a line of words\n" * 9 + "a torn \x13 line\n" * 9, encoding="utf-8")
    assert main(["audit", *models, "--train_file", str(text)]) == 2
    assert re.search(r"error: --student_model: .*\\x13.*% of the bytes would be skipped", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--student_model=./absent", "--teacher_model=./absent", f"--train_file={__file__}"],
            "error: --student_model ./absent: no such directory",
        ),
        (["--train_file", "absent.txt"], "error: --train_file absent.txt: cannot be read"),
        (["--alpha_kd", "1"], "error: --alpha_kd: no such option"),
    ],
)
def test_the_command_refuses_a_mistake_in_one_line(capsys, flags, line):
    assert main(["audit", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1
