"""The projection on code, against a reference that goes through the bytes of the text token by token in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from sar_kd.alignment import vocabulary_map
from sar_kd.alignment.aligner import Aligner
from sar_kd.alignment.segments import build_segments
from sar_kd.config.sections import LossConfig
from sar_kd.losses.distillation import ForwardOutputs
from sar_kd.losses.projection.joint import ContinuationPaths, add_continuation_paths
from sar_kd.losses.projection.loss import Projection
from sar_kd.losses.projection.marginals import continuing_log_probs, gather_logits
from sar_kd.tokenization.token_stream import Block, TokenStream
from tests.helpers.lm_heads import lazy_logits
from tests.helpers.vocabularies import TableTokenizer, encode_any, token_table

COARSE = [
    "\n", "\n  ", "\n    ", "\n        ", "    ", "  ", " ", "x", "xy", "xyz", "yz", "y", "z", " x", "=", " =", "(",
    "):", ")", "):\n", "):\n    ", ":", "</s>",
]  # fmt: skip
FINE = ["\n", "        ", "    ", "  ", " ", "x", "y", "z", "yz", "=", "(", ")", ":", "</s>"]
TEXT = "x(yz):\n        xy =x\n    x = xyz\n  yz\nxy(x):\n    z"
SIDES = pytest.mark.parametrize("teacher_is_coarser", [True, False], ids=["coarse_teacher", "coarse_student"])


@pytest.fixture
def make_case(monkeypatch):
    """make_case(teacher_is_coarser): the text in both tokenizations, with random logits."""
    monkeypatch.setattr(vocabulary_map, "encode", encode_any)

    def make(teacher_is_coarser, seed=0, spread=1.5, coarse=COARSE, fine=FINE, text=TEXT):
        fine, coarse = token_table(fine), token_table(coarse)
        tables = (fine, coarse) if teacher_is_coarser else (coarse, fine)
        tokenizers = [TableTokenizer(table) for table in tables]
        pair = SimpleNamespace(
            student=tokenizers[0], teacher=tokenizers[1], token_tables=tables, projects=True, equal=False,
            student_vocab_size=len(tables[0].pieces), teacher_vocab_size=len(tables[1].pieces),
            num_teacher_tokens=len(tables[1].pieces),
        )  # fmt: skip
        ids = [tokenizer.encode(text) for tokenizer in tokenizers]
        streams = [_stream(table, own) for table, own in zip(tables, ids, strict=True)]
        text = SimpleNamespace(
            student=streams[0], teacher=streams[1], names=["text"], conversations=[], num_tokens=lambda s: len(s.ids)
        )
        block = Block(0, len(ids[0]), 0, len(ids[1]))
        aligner = Aligner(pair, text, [block])
        assert aligner.teacher_is_coarser == teacher_is_coarser
        alignment = aligner.align([block], len(ids[0]) + 1, len(ids[1]) + 1)
        generator = torch.Generator().manual_seed(seed)
        logits = [
            torch.randn(len(own), len(table.pieces), generator=generator) * spread
            for own, table in zip(ids, tables, strict=True)
        ]
        return SimpleNamespace(aligner=aligner, alignment=alignment, tables=tables, ids=ids, logits=logits)

    return make


def _stream(table, ids: list[int]) -> TokenStream:
    none = np.zeros(len(ids), dtype=bool)
    return TokenStream(np.array(ids, dtype=np.int32), np.cumsum([len(table.pieces[i]) for i in ids]), none, ~none)


def _segments(case, limit=10**9):
    positions = torch.arange(len(case.ids[1]))
    return build_segments(case.alignment, len(case.ids[0]), positions, case.aligner.teacher_is_coarser, limit)


def _method(case, **settings) -> Projection:
    return Projection(LossConfig(**({"temperature": 1.0, "logit_clamp_style": "off"} | settings)), case.aligner)


def _run(case, grad_side="student", limit=10**9, **settings) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of one side's logits."""
    method, side = _method(case, **settings), int(grad_side == "teacher")
    leaves = [logits.clone().requires_grad_(i == side) for i, logits in enumerate(case.logits)]
    batch = SimpleNamespace(segments=_segments(case, limit))
    terms = method(batch, ForwardOutputs(*map(lazy_logits, leaves)))
    terms.loss.backward()
    return terms.loss.detach(), leaves[side].grad


def _central_difference(case, side: int, position: int, token: int, step=0.05, **settings) -> float:
    values = []
    for sign in (1.0, -1.0):
        logits = [each.clone() for each in case.logits]
        logits[side][position, token] += sign * step
        values.append(_run(SimpleNamespace(**(vars(case) | {"logits": logits})), **settings)[0].item())
    return (values[0] - values[1]) / (2 * step)


# The reference


class Reference:
    """Both sides' distributions at every byte at which a token starts, from the vocabularies and the text alone."""

    def __init__(self, case, logits: list[Tensor], temperature: float = 1.0):
        self.case, self.coarser = case, int(case.aligner.teacher_is_coarser)
        self.probs = [(side / temperature).softmax(1) for side in logits]
        self.pieces = [table.pieces for table in case.tables]
        self.starts = [np.cumsum([0] + [len(self.pieces[i][v]) for v in case.ids[i]])[:-1].tolist() for i in range(2)]
        classes = case.aligner.shared_classes
        lists = (classes.student_tokens, classes.student_classes), (classes.teacher_tokens, classes.teacher_classes)
        self.class_of = [dict(zip(a.tolist(), b.tolist(), strict=True)) for a, b in lists]

    def boundaries(self) -> list[tuple[str, Tensor, Tensor]]:
        """Kind, the student's and the teacher's probabilities of the same classes."""
        found = []
        for byte in sorted({*self.starts[0], *self.starts[1]}):
            does_start = [byte in starts for starts in self.starts]
            if all(does_start):
                found.append(("boundary", *(self._at_boundary(side, byte) for side in range(2))))
            else:
                continuing = does_start.index(False)
                sides = self._inside(continuing, byte)
                if sides is not None:
                    found.append((f"inside {continuing}", *(sides if continuing == 0 else sides[::-1])))
        return found

    def _row(self, side: int, byte: int) -> int:
        """The position of the token of a side that holds a byte."""
        return max(i for i, start in enumerate(self.starts[side]) if start <= byte)

    def _after(self, side: int, prefix: bytes) -> dict[int, int]:
        """The next token of the other side in every token of `side` that it splits after `prefix`."""
        table = self.case.aligner._maps[side].after_prefix(prefix)
        pairs = [] if table is None else zip(table.coarse_tokens.tolist(), table.coarse_classes.tolist(), strict=True)
        return {v: int(table.representatives[c]) for v, c in pairs if c < table.num_classes - 1}

    def _at_boundary(self, side: int, byte: int) -> Tensor:
        row, class_of = self._row(side, byte), self.class_of[side]
        weights = self.probs[side].new_zeros(self.case.aligner.shared_classes.num_classes)
        for token, class_ in class_of.items():
            weights = weights.index_add(0, torch.tensor([class_]), self.probs[side][row, token][None])
        weights = weights / weights.sum()
        if side != self.coarser or byte == 0:
            return weights
        before, last = self.probs[side][row - 1], self.case.ids[side][row - 1]
        joint = before[last] * weights
        for token, following in self._after(side, self.pieces[side][last]).items():
            class_ = self.class_of[1 - side][following]
            joint = joint.index_add(0, torch.tensor([class_]), before[token][None])
        return joint / joint.sum()

    def _inside(self, side: int, byte: int) -> tuple[Tensor, Tensor] | None:
        """The continuing side's probabilities and the starting side's: the classes after the prefix, then the end."""
        row, pieces = self._row(side, byte), self.pieces[side]
        prefix = pieces[self.case.ids[side][row]][: byte - self.starts[side][row]]
        table = self.case.aligner._maps[side].after_prefix(prefix)
        if table is None:
            return None
        class_of = dict(zip(table.fine_tokens.tolist(), table.fine_classes.tolist(), strict=True))
        end = table.num_classes - 1
        weights = self.probs[side].new_zeros(end + 1)
        for token, probability in enumerate(self.probs[side][row]):
            following = self._after(side, prefix)
            if token in following or pieces[token] == prefix:
                class_ = end if pieces[token] == prefix else class_of[following[token]]
                weights = weights.index_add(0, torch.tensor([class_]), probability[None])
        if side == 1 and row > 0:
            before, last = self.probs[side][row - 1], self.case.ids[side][row - 1]
            both, weights = pieces[last] + prefix, before[last] * weights
            following = self._after(side, both)
            for token, probability in enumerate(before):
                if token in following or pieces[token] == both:
                    class_ = class_of.get(following.get(token), end)
                    weights = weights.index_add(0, torch.tensor([class_]), probability[None])
        other = self.probs[1 - side][self._row(1 - side, byte)]
        classes = torch.tensor([class_of.get(token, end) for token in range(len(other))])
        return weights / weights.sum(), other.new_zeros(end + 1).index_add(0, classes, other)

    def loss(self, direction: str, beta: float = 0.5) -> Tensor:
        """In nats; times T^2 is the caller's."""
        total = torch.zeros((), dtype=torch.float64)
        for kind, p, t in self.boundaries():
            if kind == "inside 0" or direction == "reverse":  # what the continuing side cannot do takes no part
                support = (p if kind == "inside 0" else t) > 0
                p, t = (torch.where(support, x, 0.0) for x in (p, t))
                p, t = p / p.sum(), t / t.sum()
            total = total + _divergence(p, t, direction, beta)
        return total


def _divergence(p: Tensor, t: Tensor, direction: str, beta: float) -> Tensor:
    def kl(a, b):
        return (a[a > 0] * (a[a > 0] / b[a > 0]).log()).sum()

    m = beta * t + (1 - beta) * p
    return {"forward": lambda: kl(t, p), "reverse": lambda: kl(p, t)}.get(
        direction, lambda: beta * kl(t, m) + (1 - beta) * kl(p, m)
    )()


# Values and gradients


@SIDES
@pytest.mark.parametrize("grad_side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("direction", "temperature"), [("forward", 1.0), ("forward", 2.0), ("reverse", 2.0), ("jsd", 1.0)]
)
def test_value_and_gradient_match_the_reference(make_case, teacher_is_coarser, grad_side, direction, temperature):
    case, side = make_case(teacher_is_coarser), int(grad_side == "teacher")
    leaves = [logits.double().requires_grad_() for logits in case.logits]
    reference = Reference(case, leaves, temperature)
    kinds = [kind for kind, *_ in reference.boundaries()]
    assert kinds.count("boundary") > 15
    assert kinds.count(f"inside {int(teacher_is_coarser)}") > 5
    wanted = temperature**2 * reference.loss(direction)
    wanted.backward()
    loss, grad = _run(case, grad_side, temperature=temperature, kd_direction=direction)
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), leaves[side].grad, rtol=1e-4, atol=1e-5)


@SIDES
@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_the_gradient_is_that_of_the_value(make_case, teacher_is_coarser, direction):
    """Central differences at the positions of the line ends, whose tokens could have continued in several ways."""
    case = make_case(teacher_is_coarser)
    for side, grad_side in enumerate(("student", "teacher")):
        grad = _run(case, grad_side, kd_direction=direction)[1]
        for position in [i for i, v in enumerate(case.ids[side]) if b"\n" in case.tables[side].pieces[v]][:3]:
            for token in grad[position].abs().topk(2).indices.tolist():
                found = _central_difference(case, side, position, token, kd_direction=direction)
                assert found == pytest.approx(grad[position, token].item(), rel=0.02, abs=2e-3)


@SIDES
def test_the_probabilities_of_every_boundary_add_up_to_one(make_case, teacher_is_coarser):
    case = make_case(teacher_is_coarser)
    method, (segment,) = _method(case), _segments(case)
    tiles = [
        logits[positions].T.contiguous()
        for logits, positions in zip(case.logits, (segment.student_positions, segment.teacher_positions), strict=True)
    ]
    coarser, both = method.coarser_side, (segment.student_continuations, segment.teacher_continuations)
    of_coarser = gather_logits(
        tiles[coarser], (method.student_map, method.teacher_map)[coarser], segment.num_pairs, 0, both[coarser], 1.0
    )
    log_probs = continuing_log_probs(of_coarser.entries, both[coarser])
    ends = log_probs[both[coarser].end_classes]
    paths = ContinuationPaths(log_probs, ends, segment.token_end, segment.continuation_paths)
    joint = add_continuation_paths(of_coarser.boundary.log_softmax(0), paths)
    torch.testing.assert_close(joint.logsumexp(0), torch.zeros(segment.num_pairs), rtol=0.0, atol=1e-5)
    # 4 and 8 spaces behind a line end are of one class, because the coarser tokenizer starts no token of 8.
    _, shared, _ = segment.continuation_paths
    num_continuing = [len(each) for each in both[coarser].continuing_entries[1].split(1)]
    assert len(num_continuing) > len(shared) + segment.num_pairs


# The exact marginal


def _byte_marginals(probs: Tensor, pieces: list[bytes], text: bytes) -> tuple[Tensor, Tensor]:
    """The weights of all tokenizations of each prefix of the text, by dynamic programming over its bytes.

    The next token's probability p does not depend on the tokens before:

    ended[b]       = sum over e < b, tokens v = text[e:b], of ended[e] * p(v)
    going_on[b, x] = sum over e < b, tokens v that begin with text[e:b] and byte x, of ended[e] * p(v)
    """
    ended = torch.zeros(len(text) + 1, dtype=torch.float64)
    going_on = torch.zeros(len(text) + 1, 256, dtype=torch.float64)
    ended[0] = 1.0
    for byte in range(1, len(text) + 1):
        for start in range(byte):
            before = text[start:byte]
            for token, piece in enumerate(pieces):
                weight = ended[start] * probs[token]
                if piece == before:
                    ended[byte] += weight
                elif piece.startswith(before):
                    going_on[byte, piece[len(before)]] += weight
    return going_on, ended


def test_targets_are_the_exact_marginals_where_the_two_last_tokens_hold_every_way_to_split_the_text(make_case):
    coarse, fine = ["ab", "abcd", "abce", "abcg", "c", "cd", "ce", "cf", "</s>"], [*"abcdefg", "</s>"]
    text, letters = "abcfabcf", torch.arange(ord("a"), ord("g") + 1)
    case = make_case(True, coarse=coarse, fine=fine, text=text)
    pieces = case.tables[1].pieces
    assert [pieces[v] for v in case.ids[1]] == [b"ab", b"cf", b"ab", b"cf"]
    case.logits[1] = case.logits[1][:1].repeat(4, 1)
    probs = case.logits[1][0].double().softmax(0)
    going_on, ended = _byte_marginals(probs, pieces, text.encode())
    begins = torch.tensor([sum(probs[v] for v, piece in enumerate(pieces) if piece[:1] == bytes([x])) for x in letters])
    wanted = torch.zeros((), dtype=torch.float64)
    for byte in range(len(text)):
        student, letter_weights = case.logits[0][byte].double().softmax(0), going_on[byte, letters]
        if byte % 2 == 0:  # a common boundary: any next letter, or the end of the text
            teacher = torch.cat([letter_weights + ended[byte] * begins, ended[byte] * probs[-1:]])
            keep = torch.cat([begins > 0, torch.tensor([True])])  # the others have no class
            student, teacher = student[keep], teacher[keep]
        else:  # inside the teacher's token: one goes on with a letter, or neither that nor the token before does
            prefix = text[byte - 1 : byte]
            is_next = torch.tensor(
                [any(piece.startswith((prefix + chr(x)).encode()) for piece in pieces) for x in letters]
            )
            teacher = torch.cat([letter_weights[is_next], (ended[byte] + letter_weights[~is_next].sum())[None]])
            student = student[: len(letters)][is_next]
            student = torch.cat([student, 1.0 - student.sum()[None]])
        wanted += _divergence(student / student.sum(), teacher / teacher.sum(), "forward", 0.5)
    loss, _ = _run(case, kd_direction="forward")
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
