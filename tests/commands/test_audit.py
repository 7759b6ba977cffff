"""What two tokenizers have in common: counted byte by byte, printed by the verb and at the start of a run."""

import json
import math

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.trainers import WordPieceTrainer

from sar_kd.commands.main import main
from sar_kd.data.batch import IGNORE_INDEX
from sar_kd.data.dataset import Dataset
from sar_kd.data.samples import Conversation, Document, Message
from sar_kd.errors import UsageError
from sar_kd.evaluation.tokenizer_coverage import measure_coverage
from sar_kd.tokenization.backends import encode_by_characters
from sar_kd.tokenization.tokenizer_pair import TokenizerPair, UnfitTokenizer


def _corpus(student, teacher, documents, **how) -> Dataset:
    how = {"aligns": True, **how}
    pair = TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher), **how)
    return Dataset(documents, pair, 64, 512)


def _spans(table, ids) -> list[tuple[int, int]]:
    at, spans = 0, []
    for token in ids:
        spans.append((at, at + len(table.pieces[token])))
        at = spans[-1][1]
    return spans


def test_shares_are_those_of_a_count_by_hand(sp_tokenizer, byte_tokenizer, corpus_texts):
    text = "\n".join(corpus_texts)
    corpus = _corpus(sp_tokenizer, byte_tokenizer, [Document("all", text)])
    found = measure_coverage(corpus)
    tables, streams = corpus.pair.tables, (corpus.text.student, corpus.text.teacher)
    student, teacher = (_spans(table, stream.ids[:-1]) for table, stream in zip(tables, streams, strict=True))
    total = len(student) + 1  # and the end of the text, which both have
    same, starts, student_starts = set(teacher), {a for a, _ in teacher}, {a for a, _ in student}
    assert found.num_tokens == total
    assert found.strict == pytest.approx((sum(span in same for span in student) + 1) / total)
    assert found.both_start == pytest.approx((sum(a in starts for a, _ in student) + 1) / total)
    assert found.inside_teacher == pytest.approx(sum(a not in starts for a, _ in student) / total)
    assert found.inside_student == pytest.approx(sum(a not in student_starts for a, _ in teacher) / total)
    digits = [span for span, token in zip(student, streams[0].ids, strict=False) if _has_digit(tables[0], token)]
    assert found.strict_by_class["digits"] == pytest.approx(sum(span in same for span in digits) / len(digits))
    ends = {b for _, b in student} & {b for _, b in teacher}
    assert found.chunks_per_token == pytest.approx((len(ends) + 1) / total)


def _has_digit(table, token: int) -> bool:
    return any(48 <= byte <= 57 for byte in table.pieces[token])


def test_equal_tokenizers_are_covered_wholly(byte_tokenizer, corpus_texts):
    documents = [Document(str(i), text) for i, text in enumerate(corpus_texts)]
    found = measure_coverage(_corpus(byte_tokenizer, byte_tokenizer, documents))
    assert (found.strict, found.both_start, found.chunks_per_token) == (1.0, 1.0, 1.0)
    assert (found.inside_teacher, found.inside_student, found.straddling) == (0.0, 0.0, 0.0)
    assert "token by token" in found.mix


def test_of_a_conversation_only_what_is_learned_counts(sp_tokenizer, byte_tokenizer):
    talk = Conversation("talk", (Message("user", "1 2 3 4 5 6", False), Message("assistant", "seven", True)), False)
    found = measure_coverage(_corpus(sp_tokenizer, byte_tokenizer, [talk]))
    assert math.isnan(found.strict_by_class["digits"])
    assert found.chunks_per_token <= 1.0


def test_the_verb_prints_the_mix_for_people_and_the_figures_for_programs(capsys):
    assert main(["audit"]) == 0
    shown = capsys.readouterr().out
    assert "895 tokens of the same bytes" in shown
    assert "--alignment auto: projection of the teacher's tokens onto the student's" in shown
    assert main(["audit", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["shared_tokens"] == 895
    assert 0.4 < figures["strict"] < figures["both_start"] < 1
    assert figures["both_start"] + figures["inside_teacher"] == pytest.approx(1)
    assert set(figures["strict_by_class"]) == {"digits", "whitespace", "non-ASCII"}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--student_model", "./absent"], "error: --student_model ./absent: no such directory"),
        (["--train_file", "absent.txt"], "error: --train_file absent.txt: cannot be read"),
        (["--alpha_kd", "1"], "error: --alpha_kd: no such option"),
    ],
)
def test_the_verb_says_what_is_wrong_in_one_line(capsys, flags, line):
    assert main(["audit", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1


def test_a_conversation_needs_tokenizers_that_keep_text(wordpiece, byte_tokenizer):
    talk = Conversation("talk", (Message("user", "one", False), Message("assistant", "two", True)), False)
    with pytest.raises(UsageError, match="plain text only"):
        _corpus(wordpiece, byte_tokenizer, [talk], tolerant=True)


# Tokenizers that change text


@pytest.fixture(scope="module")
def wordpiece(corpus_texts):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(corpus_texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[SEP]")


def test_a_tokenizer_that_changes_text_is_refused_unless_it_is_tolerated(wordpiece, byte_tokenizer):
    with pytest.raises(UnfitTokenizer, match="WordPiece"):
        _corpus(wordpiece, byte_tokenizer, [Document("a", "Text")])
    assert not _corpus(wordpiece, byte_tokenizer, [Document("a", "Text")], tolerant=True).pair.is_exact


def test_its_tokens_end_where_their_characters_do(wordpiece):
    text = "The caf\u00e9 SAID \U0001f600 no  "
    ((ids, ends),) = encode_by_characters(wordpiece, [text])
    words = ["The", "The caf\u00e9", "The caf\u00e9 SAID", "The caf\u00e9 SAID \U0001f600", text]
    assert {len(word.encode()) for word in words} <= set(ends)
    assert ends == sorted(ends)
    assert len(ids) == len(ends)


def test_blocks_of_such_a_tokenizer_hold_the_same_text_on_both_sides(wordpiece, byte_tokenizer, corpus_texts):
    documents = [Document(str(i), text) for i, text in enumerate(corpus_texts)]
    corpus = _corpus(wordpiece, byte_tokenizer, documents, tolerant=True, projects=False)
    for block in corpus.blocks:
        ends = corpus.text.student.ends[block.student_end - 1], corpus.text.teacher.ends[block.teacher_end - 1]
        assert ends[0] == ends[1]
    batch = corpus.batch([0, 1])
    alignment = batch.alignment
    assert 0 < len(alignment.student_positions) < len(batch.student.targets)
    labels = batch.teacher.labels.flatten()
    assert torch.all(labels[alignment.teacher_positions + 1] != IGNORE_INDEX)
    assert alignment.teacher_continuations is None
