"""The numbers of the worked example in `sar_kd.losses.projection`, from the code."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sar_kd.alignment import vocabulary_map
from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.segments import build_segments
from sar_kd.config.sections import LossConfig
from sar_kd.losses import projection
from sar_kd.losses.distillation import top_k_of
from sar_kd.losses.projection.joint import ContinuationPaths, add_continuation_paths
from sar_kd.losses.projection.loss import Projection
from sar_kd.losses.projection.marginals import continuing_log_probs, gather_logits, starting_log_probs
from sar_kd.losses.projection.truncated import known_classes, known_entries
from sar_kd.runtime.precision import MASKED_LOGIT
from sar_kd.tokenization.token_stream import Block, TokenStream
from tests.helpers.vocabularies import TableTokenizer, encode_any, token_table

STUDENT = token_table(["low", "er", "s", "!", "</s>"])
TEACHER = token_table(["low", "lower", "lowers", "s", "!", "</s>"])
STUDENT_PROBS = [[0.6, 0.2, 0.1, 0.1, 0.0], [0.1, 0.6, 0.1, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4, 0.0]]
TEACHER_PROBS = [[0.2, 0.4, 0.1, 0.1, 0.2, 0.0], [0.1, 0.1, 0.05, 0.25, 0.5, 0.0]]
"""At each position; the positions at which the text ends are left out."""


def _stream(table, tokens: list[str]) -> TokenStream:
    ids = np.array([table.strings.index(token) for token in tokens], dtype=np.int32)
    none = np.zeros(len(ids), dtype=bool)
    return TokenStream(ids, np.cumsum([len(token) for token in tokens]), none, ~none)


def _logits(probs) -> torch.Tensor:
    """A tile [V, n]."""
    return torch.tensor(probs).log().clamp_min(MASKED_LOGIT).T.contiguous()


@pytest.fixture
def example(monkeypatch):
    """The aligner, and the one segment of the text."""
    monkeypatch.setattr(vocabulary_map, "encode", encode_any)
    pair = SimpleNamespace(
        student=TableTokenizer(STUDENT), teacher=TableTokenizer(TEACHER), token_tables=(STUDENT, TEACHER),
        student_vocab_size=5, teacher_vocab_size=6, num_teacher_tokens=6, projects=True, equal=False,
    )  # fmt: skip
    student, teacher = _stream(STUDENT, ["low", "er", "!"]), _stream(TEACHER, ["lower", "!"])
    block = Block(0, 3, 0, 2)
    text = SimpleNamespace(
        student=student, teacher=teacher, names=["text"], conversations=[], num_tokens=lambda stream: len(stream.ids)
    )
    aligner = Aligner(pair, text, [block])
    alignment = aligner.align([block], student_width=4, teacher_width=3)
    (segment,) = build_segments(alignment, 3, torch.tensor([0, 1]), aligner.teacher_is_coarser, 10**9)
    assert aligner.teacher_is_coarser
    assert segment.student_positions.tolist() == [0, 2, 1]  # the pairs first
    assert segment.teacher_positions.tolist() == [0, 1]
    return SimpleNamespace(aligner=aligner, segment=segment)


def _term(example, **settings) -> Projection:
    return Projection(LossConfig(temperature=1.0, logit_clamp_style="off", **settings), example.aligner)


def _tiles() -> tuple[torch.Tensor, torch.Tensor]:
    """The student's tile in the order of the segment's positions, and the teacher's."""
    return _logits([STUDENT_PROBS[0], STUDENT_PROBS[2], STUDENT_PROBS[1]]), _logits(TEACHER_PROBS)


def _close(log_probs: torch.Tensor, probs: list[float]) -> None:
    torch.testing.assert_close(log_probs.exp(), torch.tensor(probs), rtol=0.0, atol=1e-3)


def test_the_shared_classes_are_those_of_the_example(example):
    shared = example.aligner.shared_classes
    classes = [
        (
            [STUDENT.strings[i] for i in shared.student_tokens[shared.student_classes == c]],
            [TEACHER.strings[i] for i in shared.teacher_tokens[shared.teacher_classes == c]],
        )
        for c in range(shared.num_classes)
    ]
    assert classes == [(["low"], ["low", "lower", "lowers"]), (["s"], ["s"]), (["!"], ["!"]), (["</s>"], ["</s>"])]


def test_the_distributions_are_those_of_the_example(example):
    term, segment, (student, teacher) = _term(example), example.segment, _tiles()
    record = segment.teacher_continuations
    of_teacher = gather_logits(teacher, term.teacher_map, 2, 0, record, 1.0)
    of_student = gather_logits(student, term.student_map, 2, 1, segment.student_continuations, 1.0)
    _close(of_teacher.boundary.log_softmax(0)[:, 0], [0.7, 0.1, 0.2, 0.0])
    _close(of_student.boundary.log_softmax(0)[:, 0], [0.75, 0.125, 0.125, 0.0])

    continuations = continuing_log_probs(of_teacher.entries, record)
    assert record.class_continuations.tolist() == [0, 0, 1, 1]  # inside lower; where it ended
    _close(continuations, [0.714, 0.286, 0.2, 0.8])
    _close(starting_log_probs(of_student.inside, record, masks_impossible_end=False), [0.6, 0.4])

    assert segment.token_end.tolist() == [-1, 1]
    ends = continuations[record.end_classes]
    paths = ContinuationPaths(continuations, ends, segment.token_end, segment.continuation_paths)
    joint = add_continuation_paths(of_teacher.boundary.log_softmax(0), paths)
    _close(joint[:, 1], [0.2, 0.4, 0.4, 0.0])
    _close(of_student.boundary.log_softmax(0)[:, 1], [0.125, 0.375, 0.5, 0.0])


def test_the_loss_is_that_of_the_example(example):
    def kl(t: list[float], p: list[float]) -> float:
        t, p = torch.tensor(t, dtype=torch.float64), torch.tensor(p, dtype=torch.float64)
        return (t * (t / p).log()).sum().item()

    losses = [
        kl([0.7, 0.1, 0.2], [0.75, 0.125, 0.125]),
        kl([0.5 / 0.7, 0.2 / 0.7], [0.6, 0.4]),
        kl([0.2, 0.4, 0.4], [0.125, 0.375, 0.5]),
    ]
    assert " + ".join(f"{loss:.4f}"[1:] for loss in losses) + " nats" in projection.__doc__
    found = _term(example).loss_and_grad(*_tiles(), example.segment, None)
    assert found.loss.item() == pytest.approx(sum(losses), abs=1e-6)
    assert found.dropped == found.unshared == 0


def test_a_teacher_truncated_to_its_top_1_knows_one_class_and_the_tail(example):
    term, (student, teacher), record = _term(example), _tiles(), example.segment.teacher_continuations
    top = top_k_of(teacher, 1, 6, 1.0)
    known = known_classes(top.slice(0, 1), term.teacher_map, 1.0)
    assert known.classes.tolist() == [0]
    _close(known.log_probs, [0.4])
    _close(known.tail, [0.6])
    _, counts = known_entries(top, record, 6, 1.0)
    assert not counts[0]
    # Byte 0: lower and the tail. Byte 5: "!" and the tail.
    probs = [((0.4, 0.75), (0.6, 0.25)), ((0.5, 0.5), (0.5, 0.5))]
    wanted = sum(t * np.log(t / p) for classes in probs for t, p in classes)
    found = _term(example, teacher_top_k=1).loss_and_grad(student, teacher, example.segment, None)
    assert found.loss.item() == pytest.approx(wanted, abs=1e-6)
    assert (found.dropped, found.unshared) == (0, 1)  # the position inside the teacher's token
