"""Every kind of distillation on real batches, against the definition written out row by row in float64."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

from sar_kd.alignment.batch_alignment import Continuations
from sar_kd.alignment.segments import build_segments
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import CachedTopK
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.samples import Document
from sar_kd.embedded import STUDENT_DIR, TEACHER_DIR, split_of
from sar_kd.losses.baselines import ChunkLikelihood, HiddenStates, SortedProbabilities, Strict
from sar_kd.losses.distillation import ForwardOutputs, TokenLevel
from sar_kd.losses.objective import build_distillation
from sar_kd.losses.projection.joint import ContinuationPaths, add_other_ways
from sar_kd.losses.projection.loss import Projection
from sar_kd.losses.projection.marginals import ClassMap, coarse_log_probs, read
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from tests.helpers.lm_heads import lazy_logits

DIFFERENT = ["sp_from_byte", "byte_from_sp", "dummy_from_byte", "byte_from_dummy"]
EQUAL = ["byte_from_byte", "sp_from_sp"]
EVERY_PAIR = pytest.mark.parametrize("name", DIFFERENT)
EVERY_DIRECTION = pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
KINDS = {"projection": Projection, "strict": Strict, "alm": ChunkLikelihood, "uld": SortedProbabilities}
EVERY_KIND = pytest.mark.parametrize("alignment", [*KINDS, "hidden"])
EVERY_PAIR_OF_TWO = pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_sp"])
EVERY_TERM = pytest.mark.parametrize(
    ("alignment", "direction", "top_k"),
    [(kind, d, k) for kind in ("projection", "strict") for d in ("forward", "reverse", "jsd") for k in (0, 8)]
    + [("alm", "forward", 0), ("uld", "forward", 0), ("uld", "forward", 8), ("hidden", "forward", 0)],
)
"""What knows neither a direction nor a cut comes once."""
FIRST_BLOCKS = (0, 17, 33, 48, 60)
STUDENT_WIDTH, TEACHER_WIDTH = 6, 9


@pytest.fixture(scope="module")
def corpora(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer, corpus_texts):
    """Corpora by "student_from_teacher"; equal tokenizers are aligned all the same."""
    tokenizers = {"byte": byte_tokenizer, "sp": sp_tokenizer, "dummy": dummy_prefix_tokenizer}
    documents = [Document(str(number), text) for number, text in enumerate(corpus_texts)]
    return {name: _corpus(documents, *map(tokenizers.get, name.split("_from_"))) for name in DIFFERENT + EQUAL}


def _corpus(documents, student, teacher, aligns=True) -> Dataset:
    pair = TokenizerPair(
        student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher), aligns=aligns
    )
    return build_dataset(documents, pair, 24, 60)


@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """What both models make of a batch, as logits."""

    student_logits: Tensor
    teacher_logits: Tensor
    student_states: Tensor | None = None
    teacher_states: Tensor | None = None

    def outputs(self) -> ForwardOutputs:
        readouts = map(lazy_logits, (self.student_logits, self.teacher_logits))
        return ForwardOutputs(*readouts, self.student_states, self.teacher_states)


@pytest.fixture(scope="module")
def make_case(corpora):
    """make_case(name, ...): a batch with outputs of either model, the same for the same arguments."""

    def make(name, blocks=FIRST_BLOCKS, seed=0, spread=2.0, corpus=None):
        corpus = corpus or corpora[name]
        batch = corpus.batch(list(blocks))
        generator = torch.Generator().manual_seed(seed)
        sizes = [len(tokenizer) for tokenizer in (corpus.pair.student, corpus.pair.teacher)]
        places = [ids.numel() for ids in (batch.student.input_ids, batch.teacher.input_ids)]
        logits = [
            torch.randn(rows, size, generator=generator) * spread
            for rows, size in zip((batch.num_target_tokens, places[1]), sizes, strict=True)
        ]
        states = [
            torch.randn(rows, width, generator=generator)
            for rows, width in zip(places, (STUDENT_WIDTH, TEACHER_WIDTH), strict=True)
        ]
        return SimpleNamespace(
            corpus=corpus, aligner=corpus.aligner, batch=batch, outputs=ModelOutputs(*logits, *states)
        )

    return make


def _cut(case, alignment, limit=10**9):
    """The case's batch with this alignment, in stretches of at most so many rows."""
    batch, aligner = case.batch, case.aligner
    coarser = aligner.teacher_is_coarser
    segments = build_segments(alignment, batch.num_target_tokens, batch.teacher.positions, coarser, limit)
    return dataclasses.replace(batch, alignment=alignment, segments=segments)


def _build(case, alignment, **settings):
    config = LossConfig(**({"temperature": 1.0, "logit_clamp_style": "off"} | settings))
    if alignment == "token":
        return TokenLevel(config, case.aligner)
    if alignment != "hidden":
        return KINDS[alignment](config, case.aligner)
    torch.manual_seed(5)
    return HiddenStates(config, case.aligner, STUDENT_WIDTH, TEACHER_WIDTH)


def _learned(case, alignment, **settings):
    """What is learned, and the gradient on the student's logits, or on its states."""
    return _learned_by(_build(case, alignment, **settings), case)


def _learned_by(term, case):
    logits, states = (x.clone().requires_grad_() for x in (case.outputs.student_logits, case.outputs.student_states))
    given = dataclasses.replace(case.outputs, student_logits=logits, student_states=states)
    learned = term(case.batch, given.outputs())
    if learned.loss.requires_grad:
        learned.loss.backward()
    leaf = states if term.needs_states else logits
    return learned, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _assert_matches(case, alignment, naive, **settings):
    learned, grad = _learned(case, alignment, **settings)
    leaf = case.outputs.student_logits.double().requires_grad_()
    wanted = naive(leaf)
    wanted.backward()
    assert wanted > 0.1
    torch.testing.assert_close(learned.loss.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learned.unclamped.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert not learned.unclamped.requires_grad


# The definitions


def _divergence(p: Tensor, t: Tensor, direction: str, beta: float = 0.5, floor: float = -math.inf) -> Tensor:
    """Of two rows of probabilities."""

    def kl(a, b):
        a, b = a[a > 0], b[a > 0]
        return (a * (a.log().clamp_min(floor) - b.log().clamp_min(floor))).sum()

    if direction == "jsd":
        m = beta * t + (1 - beta) * p
        return beta * kl(t, m) + (1 - beta) * kl(p, m)
    return kl(t, p) if direction == "forward" else kl(p, t)


def _weights(row: Tensor, temperature: float) -> Tensor:
    """Unnormalised probabilities."""
    return ((row - row.detach().max()) / temperature).exp()


def _told(row: Tensor, top_k: int) -> Tensor:
    """Which tokens of the teacher's row take part."""
    told = torch.zeros(len(row), dtype=torch.bool)
    told[row.topk(top_k or len(row)).indices] = True
    return told


def _sums(weights: Tensor, tokens: Tensor, outcomes: Tensor, count: int) -> Tensor:
    return weights.new_zeros(count).index_add(0, outcomes, weights[tokens])


def _naive_projected(case, student: Tensor, temperature=1.0, top_k=0, **kind) -> Tensor:
    """What the coarser side goes on with where the finer starts a token; and what both start, by all ways to it.

    Of a teacher cut to its top k the others are one outcome more, or what ends a token. How it would go on is told by
    a row of which it says at least as much as it leaves unsaid.
    """
    alignment, classes, is_coarser = case.batch.alignment, case.aligner.shared_classes, case.aligner.teacher_is_coarser
    total, going_on, is_cut = student.new_zeros(()), {}, 0 < top_k < case.outputs.teacher_logits.shape[1]
    whole = [_weights(row, temperature) for row in case.outputs.teacher_logits.double()]
    teacher = [row * _told(row, top_k) for row in whole]
    rests = [(row - told).sum() if is_cut else row.new_zeros(()) for row, told in zip(whole, teacher, strict=True)]
    student = [_weights(row, temperature) for row in student]
    sound = case.outputs.teacher_logits.isfinite().all(1).tolist()

    def compared(p, t, counts):
        if is_cut and kind["direction"] == "reverse":
            p = torch.where(t > 0, p, 0.0)
        counts = counts and p.sum() > 0 and t.sum() > 0
        return _divergence(p / p.sum(), t / t.sum(), **kind) if counts else 0.0

    for rows, teacher_is_coarse in ((alignment.student_continuations, False), (alignment.teacher_continuations, True)):
        coarse_side, fine_side = (teacher, student) if teacher_is_coarse else (student, teacher)
        can_end, num_inside_classes = _can_end(rows), len(rows.fine_positions)
        for row, coarse_row in enumerate(rows.coarse_positions.tolist()):
            (own,) = (rows.class_continuations == row).nonzero(as_tuple=True)
            first, count = own.min(), len(own)
            _, tokens, outcomes = rows.coarse_entries[:, rows.coarse_entries[0] == row]
            coarse = _sums(coarse_side[coarse_row], tokens, outcomes - first, count)
            says_little = teacher_is_coarse and (coarse.sum() < rests[coarse_row] or coarse.sum() == 0)
            if says_little:  # as if it ended
                coarse = torch.arange(count).eq(count - 1).to(coarse)
            coarse = coarse / coarse.sum()
            if teacher_is_coarse == is_coarser:
                going_on |= dict(zip(own.tolist(), coarse, strict=True))
            if row < num_inside_classes:
                fine_row = rows.fine_positions[row].item()
                _, tokens, outcomes = rows.fine_entries[:, rows.fine_entries[0] == row]
                fine = _sums(fine_side[fine_row], tokens, outcomes - first, count)
                if can_end[row] or (teacher_is_coarse and kind["direction"] != "reverse"):
                    ended = fine_side[fine_row].clone()
                    ended[tokens] = 0.0
                    others = ended.sum() + (0.0 if teacher_is_coarse else rests[fine_row])
                    fine = torch.where(torch.arange(count) < count - 1, fine, others)
                fine = fine / fine.sum() if fine.sum() > 0 else fine
                p, t = (fine, coarse) if teacher_is_coarse else (coarse, fine)
                total = total + compared(p, t, sound[coarse_row if teacher_is_coarse else fine_row] and not says_little)
    coarser = alignment.teacher_continuations if is_coarser else alignment.student_continuations
    for place, (k, r) in enumerate(
        zip(alignment.student_positions.tolist(), alignment.teacher_positions.tolist(), strict=True)
    ):
        ended = alignment.token_end[place].item()
        counts = sound[r] and not (is_coarser and ended >= 0 and not sound[coarser.coarse_positions[ended]])
        if counts:
            t = _sums(teacher[r], classes.teacher_tokens, classes.teacher_classes, classes.count)
            p = _sums(student[k], classes.student_tokens, classes.student_classes, classes.count)
            rest, sides, coarse = rests[r], [p / p.sum(), t / (t.sum() + rests[r])], int(is_coarser)
            rest = rest / (t.sum() + rest)
            if ended >= 0:
                end = going_on[coarser.ends[ended].item()]
                sides[coarse], rest = sides[coarse] * end, rest * end if is_coarser else rest
                _, outcomes, ways = alignment.continuation_paths[:, alignment.continuation_paths[0] == place]
                more = torch.stack([going_on[way] for way in ways.tolist()]) if len(ways) else sides[coarse][:0]
                sides[coarse] = sides[coarse].index_add(0, outcomes, more)
            if is_cut:
                p, t = sides
                p, t = (torch.cat([x * (t > 0), y[None]]) for x, y in ((p, p[t == 0].sum()), (t, rest)))
                sides = [p / p.sum(), t / t.sum()]
            total = total + _divergence(*sides, **kind)
    return total * temperature**2


def _can_end(rows) -> list[bool]:
    """Of every row, whether the coarser side has a token that ends there."""
    return torch.isin(rows.end_classes, rows.coarse_entries[2]).tolist()


def _partners(case) -> dict[int, int]:
    """Student token by teacher token of the same bytes; of several the one that text becomes, and the ends."""
    found = []
    for table in case.aligner.pair.tables:
        by_bytes = {}
        for index, piece in enumerate(table.pieces):
            if piece and (piece not in by_bytes or table.strings[by_bytes[piece]].startswith("<0x")):
                by_bytes[piece] = index
        found.append(by_bytes)
    student, teacher = found
    ends = [table.end_id for table in case.aligner.pair.tables]
    return {v: student[piece] for piece, v in teacher.items() if piece in student} | {ends[1]: ends[0]}


def _naive_strict(case, student: Tensor, temperature=1.0, top_k=0, **kind) -> Tensor:
    """Where both write the same token: both softmaxes over the shared tokens among the teacher's top k."""
    alignment, partners = case.batch.alignment, _partners(case)
    total = student.new_zeros(())
    for k, r, strict in zip(
        alignment.student_positions, alignment.teacher_positions, alignment.strict.tolist(), strict=True
    ):
        row = case.outputs.teacher_logits[r].double()
        if strict and row.isfinite().all():
            weights = _weights(row, temperature) * _told(row, top_k)
            told = [v for v in _told(row, top_k).nonzero().squeeze(1).tolist() if v in partners]
            if weights[told].sum() >= 0.1 * weights.sum():
                p = _weights(student[k], temperature)[[partners[v] for v in told]]
                total = total + _divergence(p / p.sum(), weights[told] / weights[told].sum(), **kind)
    return total * temperature**2


def _naive_alm(case, student: Tensor, tau=5.0, floor=-math.inf) -> Tensor:
    """tau * the KL of the two verdicts on each chunk."""
    alignment, batch = case.batch.alignment, case.batch
    teacher = case.outputs.teacher_logits[batch.teacher.positions].double()
    teacher = torch.where(teacher.isfinite().all(1, keepdim=True), teacher, math.nan)
    sides = [
        [logits.log_softmax(-1)[row, y] for row, y in enumerate(tokens.targets.tolist())]
        for logits, tokens in ((student, batch.student), (teacher, batch.teacher))
    ]
    total = student.new_zeros(())
    for chunk in range(alignment.num_chunks):
        said = sum(sides[0][i].clamp_min(floor) for i in (alignment.student_chunks == chunk).nonzero())
        told = sum(sides[1][i] for i in (alignment.teacher_chunks == chunk).nonzero())
        if told.isfinite():
            a, b = told / tau - 1e-6, said / tau - 1e-6
            p, q = a.exp(), b.exp()
            total = total + tau * (p * (a - b) + (1 - p) * ((1 - p).log() - (1 - q).log()))
    return total


@EVERY_DIRECTION
@pytest.mark.parametrize(("name", "temperature"), [(name, 2.0) for name in DIFFERENT] + [("sp_from_byte", 1.0)])
def test_the_projection_matches_its_definition(make_case, name, direction, temperature):
    case = make_case(name)
    assert len(case.batch.alignment.student_positions) > 30
    assert (
        min(
            len(rows.end_classes)
            for rows in (case.batch.alignment.teacher_continuations, case.batch.alignment.student_continuations)
        )
        > 1
    )
    assert min(case.batch.alignment.continuation_paths.shape[1], int((case.batch.alignment.token_end >= 0).sum())) > 10
    settings = {"temperature": temperature, "kd_direction": direction}
    _assert_matches(
        case, "projection", lambda z: _naive_projected(case, z, temperature, direction=direction), **settings
    )


@EVERY_PAIR_OF_TWO
@EVERY_DIRECTION
@pytest.mark.parametrize("top_k", [0, 8])
def test_strict_matches_its_definition(make_case, name, direction, top_k):
    case, settings = make_case(name), {"temperature": 2.0, "kd_direction": direction, "teacher_top_k": top_k}
    assert 10 < case.batch.alignment.strict.sum() < len(case.batch.alignment.strict)
    _assert_matches(case, "strict", lambda z: _naive_strict(case, z, 2.0, top_k, direction=direction), **settings)


@pytest.mark.parametrize(("name", "tau"), [(name, 5.0) for name in DIFFERENT] + [("sp_from_byte", 1.0)])
def test_chunk_likelihood_matches_its_definition(make_case, name, tau):
    case = make_case(name)
    assert case.batch.alignment.num_chunks < len(case.batch.alignment.student_chunks)
    _assert_matches(case, "alm", lambda z: _naive_alm(case, z, tau), alm_tau=tau)


@EVERY_DIRECTION
@pytest.mark.parametrize(("name", "top_k"), [("byte_from_byte", 0), ("byte_from_byte", 8), ("sp_from_sp", 0)])
def test_the_token_level_divergence_matches_its_definition(make_case, name, direction, top_k):
    case = make_case(name)

    def naive(student):
        total = student.new_zeros(())
        for z, y in zip(student, case.outputs.teacher_logits[case.batch.teacher.positions].double(), strict=True):
            told = _told(y, top_k)
            sides = [(x / 2.0).softmax(-1) for x in (z, y)]
            total = total + _divergence(*(torch.cat([x[told], x[~told].sum()[None]]) for x in sides), direction)
        return 4.0 * total

    _assert_matches(case, "token", naive, temperature=2.0, kd_direction=direction, teacher_top_k=top_k)


@EVERY_PAIR
def test_sorted_probabilities_match_their_definition_where_both_start_a_token(make_case, name):
    case = make_case(name)
    alignment, teacher = case.batch.alignment, case.outputs.teacher_logits.double()

    def naive(student):
        total = student.new_zeros(())
        for k, r in zip(alignment.student_positions, alignment.teacher_positions, strict=True):
            p, t = ((row / 2.0).softmax(-1).sort(descending=True).values[:200] for row in (student[k], teacher[r]))
            total = total + (p - t).abs().sum()
        return total

    _assert_matches(case, "uld", naive, temperature=2.0)


@EVERY_PAIR
def test_hidden_states_match_their_definition_at_the_ends_of_chunks(make_case, name):
    case = make_case(name)
    learned, grad = _learned(case, "hidden")
    weight = _build(case, "hidden").projection.weight.detach().double()
    alignment, outputs = case.batch.alignment, case.outputs
    states = outputs.student_states.double().requires_grad_()
    total = states.new_zeros(())
    for s, t in zip(alignment.student_ends, alignment.teacher_ends, strict=True):
        wanted = outputs.teacher_states[t].double()
        total = total + ((weight @ states[s] - wanted) ** 2).sum() / (wanted**2).sum()
    total.backward()
    torch.testing.assert_close(learned.loss.double(), total.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), states.grad, rtol=1e-4, atol=1e-5)


# What takes part, by the bytes of the text


def _starts(case, side: str) -> list[tuple[int, int, int]]:
    """Block, first byte and id of each token that a side predicts, in the order of its rows."""
    tokens, table = getattr(case.batch, side), case.aligner.pair.tables[side == "teacher"]
    found, at, block = [], 0, -1
    for row, y in zip(tokens.positions.tolist(), tokens.targets.tolist(), strict=True):
        at, block = (at, block) if row // tokens.input_ids.shape[1] == block else (0, row // tokens.input_ids.shape[1])
        found.append((block, at, y))
        at += max(1, len(table.pieces[y]))
    return found


@EVERY_PAIR_OF_TWO
def test_an_open_row_is_where_both_start_a_token_and_the_rows_predict_those_tokens(make_case, name):
    case = make_case(name)
    student, teacher = _starts(case, "student"), _starts(case, "teacher")
    place_of = {r: i for i, r in enumerate(case.batch.teacher.positions.tolist())}
    met = {place[:2] for place in student} & {place[:2] for place in teacher}
    alignment = case.batch.alignment
    pairs = list(zip(alignment.student_positions.tolist(), alignment.teacher_positions.tolist(), strict=True))
    assert {student[k][:2] for k, _ in pairs} == met
    assert all(student[k][:2] == teacher[place_of[r]][:2] for k, r in pairs)


def _rows_that_ended(case, coarse: int, first: int) -> list[int]:
    """The finer side's row of each continuation that does not go on, one for an open row; the coarser side's only."""
    found = case.batch.alignment
    if case.aligner.teacher_is_coarser != coarse:
        return []
    places = (found.token_end >= 0).nonzero().squeeze(1)
    assert found.token_end[places].sort().values.tolist() == list(range(first, first + len(places)))
    rows = found.student_positions if coarse else found.teacher_positions
    return rows[places[found.token_end[places].argsort()]].tolist()


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("coarse", [0, 1], ids=["student_continuations", "teacher_continuations"])
def test_a_continuation_is_conditioned_on_exactly_the_bytes_that_are_written(make_case, name, coarse):
    case = make_case(name)
    sides, tables = (_starts(case, "student"), _starts(case, "teacher")), case.aligner.pair.tables
    place_of = {r: i for i, r in enumerate(case.batch.teacher.positions.tolist())}
    rows = (case.batch.alignment.student_continuations, case.batch.alignment.teacher_continuations)[coarse]
    assert len(rows.end_classes) > 1
    num_inside_classes, can_end = len(rows.fine_positions), _can_end(rows)
    assert can_end[:num_inside_classes] == rows.can_end.tolist()
    assert (rows.class_continuations < num_inside_classes).sum() == rows.num_inside_classes
    fine_positions = rows.fine_positions.tolist() + _rows_that_ended(case, coarse, num_inside_classes)
    for row, pair in enumerate(zip(rows.coarse_positions.tolist(), fine_positions, strict=True)):
        own, begun = (
            sides[side][k if side == 0 else place_of[k]] for side, k in zip((coarse, 1 - coarse), pair, strict=True)
        )
        prefix = tables[coarse].pieces[own[2]][: begun[1] - own[1]]
        assert own[0] == begun[0]
        last_byte = own[1] + len(tables[coarse].pieces[own[2]])
        assert own[1] < begun[1] < last_byte if row < num_inside_classes else begun[1] == last_byte
        _, tokens, outcomes = rows.coarse_entries[:, rows.coarse_entries[0] == row]
        last = outcomes == rows.end_classes[row]
        assert all(tables[coarse].pieces[v] == prefix for v in tokens[last].tolist())
        going_on = [tables[coarse].pieces[v] for v in tokens[~last].tolist()]
        assert all(piece.startswith(prefix) and len(piece) > len(prefix) for piece in going_on)
        assert can_end[row] == last.any() == (prefix in tables[coarse].pieces)
        assert own[2] in tokens or case.aligner.teacher_is_coarser != coarse or begun[1] > own[1]


# Equal tokenizers


def _silenced(case, *partnerless: list[int]):
    """The case in which either side gives some of its tokens no probability."""
    outputs = case.outputs
    student, teacher = outputs.student_logits.clone(), outputs.teacher_logits.clone()
    for logits, tokens in zip((student, teacher), partnerless, strict=True):
        logits[:, tokens] = -1e4
    outputs = dataclasses.replace(outputs, student_logits=student, teacher_logits=teacher)
    return SimpleNamespace(**{**vars(case), "outputs": outputs})


def _assert_same(case, alignment, other, order=None, rows=slice(None), **settings):
    """Two terms teach the same, to 1e-6 of a nat for each token."""
    count = case.batch.num_target_tokens
    learned, grad = _learned(case, alignment, **settings)
    wanted, wanted_grad = _learned(other, "token", **settings)
    assert wanted.loss > 0.1
    torch.testing.assert_close(learned.loss / count, wanted.loss / count, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(learned.unclamped / count, wanted.unclamped / count, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, wanted_grad if order is None else wanted_grad[:, order], rtol=1e-5, atol=1e-6)


@EVERY_DIRECTION
@pytest.mark.parametrize(
    ("name", "style"), [(EQUAL[0], "off"), (EQUAL[1], "off"), (EQUAL[0], "normalized"), (EQUAL[1], "raw")]
)
def test_with_equal_tokenizers_the_projection_is_the_token_level_divergence(make_case, name, direction, style):
    case = make_case(name)
    settings = {"temperature": 2.0, "kd_direction": direction, "logit_clamp_style": style, "logit_clamp": 3.0}
    _assert_same(case, "projection", case, **settings)


@EVERY_DIRECTION
@pytest.mark.parametrize("name", EQUAL)
def test_with_equal_tokenizers_strict_is_the_token_level_divergence(make_case, name, direction):
    case = make_case(name)
    (partnerless,) = (case.aligner.same_token < 0).nonzero(as_tuple=True)
    case = _silenced(case, partnerless.tolist(), partnerless.tolist())
    _assert_same(case, "strict", case, temperature=2.0, kd_direction=direction)


@pytest.fixture(scope="module")
def permuted(byte_tokenizer, corpus_texts):
    """A student whose tokenizer is the teacher's with other ids, and the id that each of the teacher's has there."""
    size = len(byte_tokenizer)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3)).tolist()
    definition = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    vocab = definition["model"]["vocab"]
    definition["model"]["vocab"] = {token: order[index] for token, index in vocab.items()}
    for token in definition["added_tokens"]:
        token["id"] = order[token["id"]]
    ends = {"bos_token": byte_tokenizer.bos_token, "eos_token": byte_tokenizer.eos_token}
    student = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), clean_up_tokenization_spaces=False, **ends
    )
    documents = [Document(str(number), text) for number, text in enumerate(corpus_texts)]
    return _corpus(documents, student, byte_tokenizer, aligns=False), order


@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["projection", "strict"])
def test_a_student_with_permuted_ids_learns_the_same(make_case, permuted, alignment, direction):
    corpus, order = permuted
    assert not corpus.pair.equal
    case = make_case(None, corpus=corpus)
    plain = make_case("byte_from_byte")
    settings = {"temperature": 2.0, "kd_direction": direction}
    outputs = dataclasses.replace(case.outputs, student_logits=case.outputs.student_logits[:, order])
    same = SimpleNamespace(batch=plain.batch, outputs=outputs, aligner=plain.aligner)
    back = torch.tensor(order).argsort()
    _assert_same(case, alignment, same, order=back, **settings)


# The chain rule


def _implied(case) -> Tensor:
    """What the teacher says of each of the student's tokens, by the projection; NaN where it says nothing of it."""
    found, classes, outputs = case.batch.alignment, case.aligner.shared_classes, case.outputs
    rows, targets = found.teacher_continuations, case.batch.student.targets
    fold = ClassMap(classes.teacher_tokens, classes.teacher_classes, classes.count)
    (whole,) = _cut(case, found).segments
    tile, inside = (
        outputs.teacher_logits[whole.teacher_positions].T.contiguous(),
        len(whole.student_continuations.fine_positions),
    )
    told = read(tile, fold, whole.num_pairs, inside, whole.teacher_continuations, 1.0)
    going_on = coarse_log_probs(told.entries, rows)
    ways = ContinuationPaths(going_on, going_on[rows.end_classes], found.token_end, found.continuation_paths)
    both = add_other_ways(told.open.log_softmax(0), ways).T
    class_of = torch.full((len(case.aligner.pair.student),), -1)
    class_of[classes.student_tokens] = classes.student_classes
    own = class_of[targets[found.student_positions]]
    said = torch.full((len(targets),), math.nan, dtype=torch.float64)
    said[found.student_positions] = torch.where(own < 0, math.nan, both[torch.arange(len(own)), own].double())
    row, token, outcome = rows.fine_entries
    written = token == targets[rows.fine_positions[row]]
    assert said[rows.fine_positions].isnan().all()  # a token is either open or inside one of the teacher's
    said[rows.fine_positions[row[written]]] = going_on[outcome[written]].double()
    return said


def _own(case) -> Tensor:
    """What the teacher says of each of its own tokens."""
    tokens = case.batch.teacher
    rows = case.outputs.teacher_logits[tokens.positions].double().log_softmax(-1)
    return rows.gather(1, tokens.targets[:, None]).squeeze(1)


@pytest.fixture(scope="module")
def embedded_case():
    """A few blocks of the embedded text, with what the embedded teacher makes of them."""
    tokenizers = [transformers.AutoTokenizer.from_pretrained(path) for path in (STUDENT_DIR, TEACHER_DIR)]
    teacher = transformers.AutoModelForCausalLM.from_pretrained(TEACHER_DIR, dtype=torch.float32).eval()
    # The first of `read_text("transfer")`, without parsing the standard library.
    topics = sorted(pytest.importorskip("pydoc_data.topics").topics.items())
    documents = [Document(name, text) for name, text in topics if split_of(f"topic:{name}") == "transfer"][:20]
    pair = TokenizerPair(*tokenizers, student_vocab_size=len(tokenizers[0]), teacher_vocab_size=len(tokenizers[1]))
    corpus = build_dataset(documents, pair, 256, 1024)
    batch = corpus.batch([0, 1, 2, 3, *range(100, 104)])
    with torch.no_grad():
        logits = teacher(input_ids=batch.teacher.input_ids).logits.flatten(0, 1)
    return SimpleNamespace(aligner=corpus.aligner, batch=batch, outputs=ModelOutputs(None, logits))


def test_the_teachers_likelihood_of_the_text_in_the_students_tokens_is_its_own(embedded_case):
    """Summed over the batch, so over the same bytes. A token of which nothing is said counts for a uniform guess."""
    assert embedded_case.aligner.teacher_is_coarser
    said, own = _implied(embedded_case), _own(embedded_case).sum()
    unsaid = said.isnan()
    guess = math.log(len(embedded_case.aligner.pair.teacher))
    assert len(embedded_case.batch.alignment.teacher_continuations.fine_positions) > 0.15 * len(said)
    assert unsaid.float().mean() < 0.005
    assert own > 0.6 * -guess * len(_own(embedded_case))  # the teacher is far from uniform
    assert (said[~unsaid].sum() - guess * unsaid.sum()).item() == pytest.approx(own.item(), rel=0.03)
    assert said[~unsaid].max() <= 1e-4


@pytest.mark.parametrize("name", EQUAL)
def test_with_equal_tokenizers_the_implied_likelihood_is_the_teachers_own_token_by_token(make_case, name):
    case = make_case(name)
    torch.testing.assert_close(_implied(case), _own(case), rtol=1e-5, atol=1e-5)


# Stretches


@EVERY_PAIR
@pytest.mark.parametrize("limit", [1, 7, 30, 77])
def test_stretches_hold_every_row_once_and_ask_for_one_row_of_the_former(make_case, name, limit):
    case = make_case(name)
    segments = _cut(case, case.batch.alignment, limit).segments
    assert len(segments) > 1
    owned = torch.cat([part.student_positions[part.counts > 0] for part in segments])
    assert torch.equal(owned.sort().values, torch.arange(case.batch.num_target_tokens))
    assert [int((part.counts == 0).sum()) <= 1 for part in segments] == [True] * len(segments)
    pairs = torch.cat([part.student_positions[: part.num_pairs] for part in segments])
    assert torch.equal(pairs, case.batch.alignment.student_positions)
    if limit >= 30:
        assert max(len(part.student_positions) for part in segments) <= limit
        assert max(len(part.teacher_positions) for part in segments) <= limit


@EVERY_PAIR
@EVERY_DIRECTION
@pytest.mark.parametrize("limit", [1, 7, 30])
@pytest.mark.parametrize("top_k", [0, 8])
def test_a_batch_teaches_the_same_in_stretches_of_any_length(make_case, name, direction, limit, top_k):
    case, settings = make_case(name), {"temperature": 2.0, "kd_direction": direction, "teacher_top_k": top_k}
    whole, whole_grad = _learned(case, "projection", **settings)
    case.batch = _cut(case, case.batch.alignment, limit)
    learned, grad = _learned(case, "projection", **settings)
    torch.testing.assert_close(learned.loss, whole.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learned.unclamped, whole.unclamped, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-4, atol=1e-5)


# Batches


def _joined(cases, batch) -> ModelOutputs:
    """The outputs of several batches as those of one, NaN wherever that one is padded."""

    def padded(name, side):
        rows = []
        for case in cases:
            part, width = getattr(case.outputs, name), getattr(batch, side).input_ids.shape[1]
            rows += [part, part.new_full((width - len(part), part.shape[1]), math.nan)]
        return torch.cat(rows)

    student = torch.cat([case.outputs.student_logits for case in cases])
    return ModelOutputs(
        student,
        padded("teacher_logits", "teacher"),
        padded("student_states", "student"),
        padded("teacher_states", "teacher"),
    )


@EVERY_KIND
@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_dummy"])
def test_a_batch_teaches_what_its_blocks_teach_alone_and_never_reads_padding(make_case, corpora, alignment, name):
    blocks = (*FIRST_BLOCKS, len(corpora[name]) - 1)  # the last one is shorter
    cases = [make_case(name, (block,), seed=block) for block in blocks]
    joined = make_case(name, blocks)
    joined.outputs = _joined(cases, joined.batch)
    assert joined.outputs.teacher_logits.isnan().any()
    learned, grad = _learned(joined, alignment, temperature=2.0)
    alone = [_learned(case, alignment, temperature=2.0) for case in cases]
    assert learned.dropped == 0
    torch.testing.assert_close(learned.loss, sum(single.loss for single, _ in alone), rtol=1e-6, atol=1e-6)
    grads = [single for _, single in alone]
    if alignment == "hidden":
        width = joined.batch.student.input_ids.shape[1]
        grads = [torch.nn.functional.pad(single, (0, 0, 0, width - len(single))) for single in grads]
    torch.testing.assert_close(grad, torch.cat(grads), rtol=1e-5, atol=1e-6)


# The shift


def _oracle(case, ahead=0):
    """Both models put p = 1 on the token of the text, or on the one `ahead` of it."""
    for side, logits in (("student", case.outputs.student_logits), ("teacher", case.outputs.teacher_logits)):
        tokens = getattr(case.batch, side)
        rows = torch.arange(len(tokens.targets)) if side == "student" else tokens.positions
        logits.zero_()
        logits[rows, tokens.targets.roll(-ahead if side == "teacher" else 0)] = 40.0
    return case


@EVERY_PAIR
def test_models_certain_of_the_text_have_a_chunk_likelihood_loss_of_exactly_zero(make_case, name):
    learned, grad = _learned(_oracle(make_case(name)), "alm")
    assert learned.loss == learned.unclamped == 0.0
    assert grad.abs().max() < 1e-6


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("alignment", ["projection", "strict", "alm"])
@pytest.mark.parametrize("ahead", [1, -1])
def test_only_a_teacher_wired_to_the_token_that_follows_agrees_with_such_a_student(make_case, name, alignment, ahead):
    agreed = _learned(_oracle(make_case(name)), alignment)[0].loss
    assert agreed < 0.1 * _learned(_oracle(make_case(name), ahead), alignment)[0].loss


def _shared_open_terms(case) -> set[tuple[int, int]]:
    """Student rows whose open term also reads what the student could have gone on with, and the row of the latter."""
    found = case.batch.alignment
    if case.aligner.teacher_is_coarser:
        return set()
    there = found.token_end >= 0
    before = found.student_continuations.coarse_positions[found.token_end[there]]
    return set(zip(found.student_positions[there].tolist(), before.tolist(), strict=True))


def _changed(before: Tensor, after: Tensor) -> set[int]:
    return set((before != after).any(1).nonzero().squeeze(1).tolist())


def _spoken_about(case, alignment, teacher_row: int) -> set[int]:
    """Student rows about which a teacher row speaks."""
    found, chunks = case.batch.alignment, case.batch.alignment.teacher_chunks
    if alignment == "alm":
        chunk = chunks[case.batch.teacher.positions == teacher_row].item()
        return set() if chunk < 0 else set((found.student_chunks == chunk).nonzero().squeeze(1).tolist())
    rows = found.student_positions[found.teacher_positions == teacher_row].tolist()
    if alignment == "strict":
        return set(found.student_positions[(found.teacher_positions == teacher_row) & found.strict].tolist())
    rows += [before for row, before in _shared_open_terms(case) if row in rows]
    for teacher_is_coarse, record in ((True, found.teacher_continuations), (False, found.student_continuations)):
        size = len(record.fine_positions)
        can_be = (
            record.class_continuations.bincount(minlength=len(record.end_classes))
            - (~torch.tensor(_can_end(record))).long()
        )
        told = can_be > 1  # of one outcome nothing is to be said
        here = (
            told & (record.coarse_positions == teacher_row)
            if teacher_is_coarse
            else told[:size] & (record.fine_positions == teacher_row)
        )
        rows += (record.fine_positions if teacher_is_coarse else record.coarse_positions[:size])[here[:size]].tolist()
        if teacher_is_coarse and case.aligner.teacher_is_coarser:  # what else it could have written there
            rows += found.student_positions[torch.isin(found.token_end, here.nonzero().squeeze(1))].tolist()
    return set(rows)


def _student_rows_going_on(case) -> set[int]:
    """Student rows that a continuation reads, or whose open row is weighted by one."""
    found = case.batch.alignment
    weighted = found.student_positions[found.token_end >= 0].tolist()
    return {
        *found.teacher_continuations.fine_positions.tolist(),
        *found.student_continuations.coarse_positions.tolist(),
        *weighted,
    }


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("alignment", ["projection", "strict", "alm"])
def test_a_teacher_row_changes_only_what_is_learned_where_it_speaks(make_case, name, alignment):
    case, settings = make_case(name), {"temperature": 2.0}
    _, before = _learned(case, alignment, **settings)
    teacher, found = case.outputs.teacher_logits, []
    for row in case.batch.teacher.positions[::8].tolist():
        kept = teacher[row].clone()
        teacher[row] = kept.roll(1)
        found.append((_changed(before, _learned(case, alignment, **settings)[1]), _spoken_about(case, alignment, row)))
        teacher[row] = kept
    assert [changed for changed, _ in found] == [wanted for _, wanted in found]
    assert sum(bool(wanted) for _, wanted in found) > 3


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("alignment", ["projection", "strict", "alm"])
def test_a_student_row_changes_only_the_terms_of_the_token_it_predicts(make_case, name, alignment):
    case, chunks = make_case(name), make_case(name).batch.alignment.student_chunks
    before_loss, before = _learned(case, alignment)
    student = case.outputs.student_logits
    for row in range(0, len(student), 9):
        kept = student[row].clone()
        student[row] = kept.roll(1)
        changed = _changed(before, _learned(case, alignment)[1])
        student[row] = kept
        terms = {row}.union(*(pair for pair in _shared_open_terms(case) if row in pair))
        if alignment == "alm":
            terms = set((chunks == chunks[row]).nonzero().squeeze(1).tolist()) if chunks[row] >= 0 else set()
        assert changed <= terms
        assert changed or not before[row].any()
    assert before_loss.loss > 0


# Nothing is pushed down for want of a word


def _only_the_student_has(case) -> list[int]:
    """Student tokens of several bytes that the teacher's vocabulary lacks."""
    student, teacher = (table.pieces for table in case.aligner.pair.tables)
    return [u for u, piece in enumerate(student) if len(piece) > 1 and piece not in set(teacher)]


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize(("direction", "top_k"), [("forward", 0), ("reverse", 8), ("jsd", 8)])
def test_a_step_of_strict_leaves_the_logit_of_a_token_that_only_the_student_has(make_case, name, direction, top_k):
    case = make_case(name)
    lacking = _only_the_student_has(case)
    case.outputs.student_logits[:, lacking[7]] += 9.0  # the student's favourite everywhere
    _, grad = _learned(case, "strict", temperature=2.0, kd_direction=direction, teacher_top_k=top_k)
    assert len(lacking) > 20
    assert torch.equal((case.outputs.student_logits - 0.1 * grad)[:, lacking], case.outputs.student_logits[:, lacking])
    assert grad.abs().max() > 0.01


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("top_k", [0, 8])
def test_the_gradient_of_strict_is_zero_outside_its_support_and_sums_to_zero_inside(make_case, name, top_k):
    case = make_case(name)
    _, grad = _learned(case, "strict", teacher_top_k=top_k)
    alignment, partners = case.batch.alignment, _partners(case)
    support = torch.zeros_like(grad, dtype=torch.bool)
    for k, r, strict in zip(
        alignment.student_positions, alignment.teacher_positions, alignment.strict.tolist(), strict=True
    ):
        told = _told(case.outputs.teacher_logits[r], top_k).nonzero().squeeze(1).tolist()
        support[k, [partners[v] for v in told if strict and v in partners]] = True
    assert torch.equal(grad[~support], torch.zeros(int((~support).sum())))
    assert grad.sum(1).abs().max() < 1e-5


@EVERY_PAIR_OF_TWO
def test_the_projection_lowers_a_token_only_where_the_teacher_gives_its_outcome_less(make_case, name):
    case = make_case(name)
    lacking, classes, alignment = _only_the_student_has(case), case.aligner.shared_classes, case.batch.alignment
    class_of = dict(zip(classes.student_tokens.tolist(), classes.student_classes.tolist(), strict=True))
    _, grad = _learned(case, "projection")
    with_class = [u for u in lacking if u in class_of]
    assert len(with_class) > 20
    inside = _student_rows_going_on(case)
    raised = lowered = 0
    for k, r in zip(alignment.student_positions.tolist(), alignment.teacher_positions.tolist(), strict=True):
        if k in inside:
            continue
        own, other = case.outputs.student_logits[k].double().exp(), case.outputs.teacher_logits[r].double().exp()
        p = _sums(own, classes.student_tokens, classes.student_classes, classes.count)
        t = _sums(other, classes.teacher_tokens, classes.teacher_classes, classes.count)
        excess = (p / p.sum() - t / t.sum())[[class_of[u] for u in with_class]]
        share = own[with_class] / p[[class_of[u] for u in with_class]]
        torch.testing.assert_close(grad[k, with_class].double(), share * excess, rtol=1e-3, atol=1e-6)
        raised += int((excess < 0).sum())
        lowered += int((excess > 0).sum())
        assert not grad[k, [u for u in lacking if u not in class_of]].any()
    assert min(raised, lowered) > 100


@EVERY_PAIR
def test_a_step_of_the_projection_does_not_lower_a_favourite_whose_outcome_the_teacher_favours_more(make_case, name):
    case = make_case(name)
    classes, alignment = case.aligner.shared_classes, case.batch.alignment
    class_of = dict(zip(classes.student_tokens.tolist(), classes.student_classes.tolist(), strict=True))
    favourite = [u for u in _only_the_student_has(case) if u in class_of][5]
    members = classes.teacher_tokens[classes.teacher_classes == class_of[favourite]]
    case.outputs.student_logits[:, favourite] = 8.0
    case.outputs.teacher_logits[:, members[0]] = 20.0
    _, grad = _learned(case, "projection")
    rows = sorted(set(alignment.student_positions.tolist()) - _student_rows_going_on(case))
    assert len(rows) > 5
    after = case.outputs.student_logits - 0.1 * grad
    assert (after[rows, favourite] >= case.outputs.student_logits[rows, favourite]).all()
    assert (grad[rows] != 0).any(1).all()


def test_a_strict_row_does_not_count_where_the_shared_tokens_hold_little_of_the_teacher(make_case):
    case = make_case("sp_from_byte")
    alignment = case.batch.alignment
    row = alignment.strict.nonzero()[4].item()
    lacking = next(v for v in range(len(case.aligner.same_token)) if case.aligner.same_token[v] < 0)
    _, before = _learned(case, "strict")
    weights = case.outputs.teacher_logits[alignment.teacher_positions[row]]
    for share, counts in ((0.85, True), (0.95, False)):
        weights[lacking] = -math.inf
        weights[lacking] = weights.logsumexp(0) + math.log(share / (1 - share))
        _, after = _learned(case, "strict")
        assert after[alignment.student_positions[row]].any() == counts
    assert before[alignment.student_positions[row]].any()


# float16, and what is not finite


@EVERY_TERM
@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_dummy"])
def test_the_largest_float16_logits_give_finite_losses_and_gradients(make_case, alignment, direction, top_k, name):
    case = make_case(name, spread=1.0)
    outputs = {key: (3e4 * value).clamp(-6e4, 6e4).half() for key, value in vars(case.outputs).items()}
    case.outputs = ModelOutputs(**outputs)
    for temperature in (0.5, 2.0):
        settings = {"temperature": temperature, "kd_direction": direction, "teacher_top_k": top_k}
        learned, grad = _learned(case, alignment, **settings)
        assert learned.loss.dtype is torch.float32
        assert learned.loss.isfinite()
        assert learned.unclamped.isfinite()
        assert learned.dropped == 0
        assert grad.dtype is torch.float16
        assert grad.isfinite().all()
        assert grad.any() or direction != "forward"  # by the others a student that is certain learns nothing


def _dropped_rows(case, alignment) -> Tensor:
    """Every teacher row that a kind reads, as often as it does."""
    found = case.batch.alignment
    return {
        "projection": lambda: torch.cat(
            [
                found.teacher_positions,
                found.teacher_continuations.coarse_positions[: len(found.teacher_continuations.fine_positions)],
                found.student_continuations.fine_positions,
            ]
        ),
        "alm": lambda: case.batch.teacher.positions,
        "hidden": lambda: found.teacher_ends,
    }.get(alignment, lambda: found.teacher_positions)()


@EVERY_KIND
@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_dummy"])
@pytest.mark.parametrize("style", ["off", "raw"])
def test_teacher_rows_that_are_not_finite_are_counted_and_teach_nothing(make_case, alignment, name, style):
    case = make_case(name)
    settings = {"temperature": 2.0, "kd_direction": "jsd", "logit_clamp_style": style, "logit_clamp": 30.0}
    whole, whole_grad = _learned(case, alignment, **settings)
    bad = case.batch.teacher.positions[2::7]
    outputs = case.outputs.teacher_states if alignment == "hidden" else case.outputs.teacher_logits
    outputs[bad, torch.arange(len(bad)) % 5] = torch.tensor([math.inf, -math.inf, math.nan]).repeat(99)[: len(bad)]
    learned, grad = _learned(case, alignment, **settings)
    assert learned.dropped == torch.isin(_dropped_rows(case, alignment), bad).sum() > 3
    assert 0 < learned.loss < whole.loss
    assert grad.isfinite().all()
    silent = (whole_grad != 0).any(1) & (grad == 0).all(1)
    naive = {
        "projection": lambda z: _naive_projected(case, z, 2.0, direction="jsd"),
        "strict": lambda z: _naive_strict(case, z, 2.0, direction="jsd"),
        "alm": lambda z: _naive_alm(case, z),
    }
    if alignment in naive:
        _assert_matches(case, alignment, naive[alignment], **settings)
    else:
        heard = ~silent & (whole_grad != 0).any(1)
        assert torch.equal(grad[heard], whole_grad[heard])
        assert silent.sum() == learned.dropped


@EVERY_DIRECTION
def test_an_open_row_is_left_out_where_it_is_not_known_whether_the_teacher_was_done(make_case, direction):
    case = make_case("sp_from_byte")
    found = case.batch.alignment
    place = int((found.token_end >= 0).nonzero()[3])
    row, before = found.student_positions[place], found.teacher_continuations.coarse_positions[found.token_end[place]]
    whole, whole_grad = _learned(case, "projection", kd_direction=direction)
    case.outputs.teacher_logits[before, 0] = math.nan
    learned, grad = _learned(case, "projection", kd_direction=direction)
    assert whole_grad[row].any()
    assert not grad[row].any()
    assert 0 < learned.loss < whole.loss
    # It counts by the rows that are not finite themselves, and this one's own row is finite.
    assert found.teacher_positions[place] != before
    assert learned.dropped == (_dropped_rows(case, "projection") == before).sum() > 0


@EVERY_KIND
def test_a_teacher_that_is_nowhere_finite_teaches_nothing(make_case, alignment):
    case = make_case("sp_from_byte")
    case.outputs.teacher_logits[:, 3] = case.outputs.teacher_states[:, 3] = math.nan
    learned, grad = _learned(case, alignment)
    assert learned.loss == learned.unclamped == 0.0
    assert not grad.any()
    assert learned.dropped == len(_dropped_rows(case, alignment))


def _without_rows(case, *fields: str):
    """The case in which a part of the alignment is empty."""
    alignment = case.batch.alignment
    none = {}
    for side in ("teacher_continuations", "student_continuations"):
        arrays = {k: v[..., :0] for k, v in vars(getattr(alignment, side)).items() if k != "num_inside_classes"}
        none[side] = Continuations(**arrays, num_inside_classes=0)
    rows = {
        name: getattr(alignment, name)[:0] for name in ("student_positions", "teacher_positions", "strict", "token_end")
    }
    no_ways = {"continuation_paths": alignment.continuation_paths[:, :0]}
    empty = {
        "student_continuations": {"student_continuations": none["student_continuations"]},
        "teacher_continuations": {
            "teacher_continuations": none["teacher_continuations"],
            "token_end": torch.full_like(alignment.token_end, -1),
            **no_ways,
        },
        "going_on": {**none, "token_end": torch.full_like(alignment.token_end, -1), **no_ways},
        "open": {**rows, **no_ways},
        "chunks": {
            "student_chunks": torch.full_like(alignment.student_chunks, -1),
            "teacher_chunks": torch.full_like(alignment.teacher_chunks, -1),
            "num_chunks": 0,
            "student_ends": alignment.student_ends[:0],
            "teacher_ends": alignment.teacher_ends[:0],
        },
    }
    # "open" comes behind "teacher_continuations", whose rows it has none of.
    changes = {key: value for name in sorted(fields) for key, value in empty[name].items()}
    batch = _cut(case, dataclasses.replace(alignment, **changes))
    return SimpleNamespace(**{**vars(case), "batch": batch})


@EVERY_TERM
def test_an_empty_alignment_teaches_nothing(make_case, alignment, direction, top_k):
    case = _without_rows(make_case("sp_from_byte"), "going_on", "open", "chunks")
    learned, grad = _learned(case, alignment, kd_direction=direction, teacher_top_k=top_k)
    assert learned.loss == learned.unclamped == learned.dropped == 0
    assert not grad.any()


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("missing", ["open", "going_on"])
def test_the_projection_of_a_batch_without_one_kind_of_row_is_that_of_the_other(make_case, missing, name):
    part = _without_rows(make_case(name), missing)
    _assert_matches(part, "projection", lambda z: _naive_projected(part, z, direction="forward"))


# The top of the teacher's probabilities


@EVERY_PAIR_OF_TWO
@EVERY_DIRECTION
@pytest.mark.parametrize("top_k", [1, 50])
def test_a_projected_teacher_cut_to_its_top_gives_losses_and_gradients_of_their_usual_size(
    make_case, name, direction, top_k
):
    case, settings = make_case(name), {"kd_direction": direction, "temperature": 2.0}
    _, whole = _learned(case, "projection", **settings)
    learned, grad = _learned(case, "projection", **settings, teacher_top_k=top_k)
    assert 0 <= learned.loss < 50 * case.batch.num_target_tokens
    assert grad.abs().max() < 20 * whole.abs().max()


@EVERY_DIRECTION
@pytest.mark.parametrize(
    ("name", "top_k"),
    [("sp_from_byte", 2), ("sp_from_byte", 8), ("byte_from_sp", 2), ("byte_from_sp", 8), ("byte_from_dummy", 50)],
)
def test_the_projection_of_a_cut_teacher_matches_its_definition(make_case, name, direction, top_k):
    """Both sides are restricted to what the teacher says, and renormalised."""
    case, settings = make_case(name), {"kd_direction": direction, "temperature": 2.0, "teacher_top_k": top_k}
    _assert_matches(
        case, "projection", lambda z: _naive_projected(case, z, 2.0, top_k=top_k, direction=direction), **settings
    )


@EVERY_PAIR_OF_TWO
@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["projection", "token"])
def test_a_cut_teacher_is_never_further_from_the_student_than_the_whole_one(make_case, name, direction, alignment):
    """Where outcomes are joined a divergence can but fall; and the more are told apart, the nearer it is."""
    case = make_case(name if alignment == "projection" else "byte_from_byte")
    case = case if alignment == "token" else _without_rows(case, "going_on")
    found = [_learned(case, alignment, kd_direction=direction, teacher_top_k=k)[0].loss for k in (1, 4, 32, 256, 0)]
    assert found[0] > 0.0
    if alignment == "token":
        assert all(a <= b + 1e-3 for a, b in itertools.pairwise(found))


@EVERY_DIRECTION
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("sp_from_byte", "teacher_continuations"), ("byte_from_sp", "teacher_continuations"), ("byte_from_sp", "open"),
        ("byte_from_sp", "student_continuations"),
    ],
)  # fmt: skip
def test_a_row_of_which_the_teachers_top_tells_nothing_teaches_nothing(make_case, name, kept, direction):
    case = make_case(name)
    case = _without_rows(case, *({"teacher_continuations", "student_continuations", "open"} - {kept}))
    rows = getattr(case.batch.alignment, kept, None)
    told = {
        "teacher_continuations": lambda: rows.coarse_entries[1],
        "student_continuations": lambda: rows.fine_entries[1],
        "open": lambda: case.aligner.shared_classes.teacher_tokens,
    }[kept]()
    silent = next(v for v in range(case.outputs.teacher_logits.shape[1]) if v not in told)
    case.outputs.teacher_logits[:, silent] = 50.0
    _, whole_grad = _learned(case, "projection", kd_direction="jsd")
    if (
        kept == "student_continuations"
    ):  # by every other token the teacher tells that the student's token ends, where one can
        assert not rows.can_end.all()
        case.outputs.teacher_logits[rows.fine_positions[rows.can_end]] = math.nan
    learned, grad = _learned(case, "projection", kd_direction=direction, teacher_top_k=1)
    assert whole_grad.any()
    assert abs(learned.loss) == abs(learned.unclamped) < 1e-6
    assert grad.abs().max() < 1e-6


@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["projection", "strict", "uld"])
@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_sp"])
def test_the_top_of_the_whole_vocabulary_is_no_cut(make_case, alignment, direction, name):
    case = make_case(name)
    size = case.outputs.teacher_logits.shape[1]
    whole, grad = _learned(case, alignment, kd_direction=direction)
    for top_k in (size, 10 * size):
        cut, cut_grad = _learned(case, alignment, kd_direction=direction, teacher_top_k=top_k)
        torch.testing.assert_close(cut.loss, whole.loss)
        torch.testing.assert_close(cut_grad, grad, rtol=1e-4, atol=1e-6)


@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["projection", "strict", "token"])
def test_with_equal_tokenizers_the_teachers_rest_moves_all_other_tokens_alike(make_case, alignment, direction):
    """In proportion to what the student gives them; strict, which knows no rest, leaves them."""
    case = make_case("byte_from_byte")
    _, grad = _learned(case, alignment, kd_direction=direction, teacher_top_k=3)
    best = case.outputs.teacher_logits[case.batch.teacher.positions].topk(3).indices
    told = torch.zeros_like(grad, dtype=torch.bool).scatter_(1, best, True)
    assert (grad[told] != 0).float().mean() > 0.99
    if alignment == "strict":
        assert not grad[~told].any()
        return
    ratio = (grad / case.outputs.student_logits.softmax(-1)).masked_fill(told | (grad == 0), math.nan)
    middle = ratio.nanmedian(1, keepdim=True).values
    assert ((ratio - middle).abs() <= 1e-3 * middle.abs() + 1e-4)[~ratio.isnan()].all()


# Rows that were stored before


def _stored(case, k: int, temperature: float) -> CachedTopK:
    """What a cache keeps of the case's teacher, made from its logits in float64."""
    tokens, logits = case.batch.teacher, case.outputs.teacher_logits.double()
    log_probs = logits[tokens.positions].log_softmax(-1)
    best = log_probs.topk(k)
    places = torch.zeros(len(logits), dtype=torch.int64)
    places[tokens.positions] = torch.arange(len(tokens.positions))
    peaks, own = best.values[:, 0], log_probs.gather(1, tokens.targets[:, None])[:, 0]
    gaps = (best.values - peaks[:, None]).half()
    others = log_probs.scatter(1, best.indices, -math.inf)
    rests = (others / temperature).logsumexp(1) - (best.values / temperature).logsumexp(1)
    return CachedTopK(places, best.indices.int(), peaks.float(), gaps, own.float(), rests.half(), temperature)


def _learned_from_stored(case, alignment, k, **settings):
    term, logits = _build(case, alignment, **settings), case.outputs.student_logits.clone().requires_grad_()
    learned = term(case.batch, ForwardOutputs(lazy_logits(logits), _stored(case, k, term.temperature)))
    learned.loss.backward()
    return learned, logits.grad


STORED = {
    "token": _naive_projected,  # of equal vocabularies every class is a token
    "projection": _naive_projected,
    "strict": _naive_strict,
}


@EVERY_DIRECTION
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("name", "alignment"),
    [("byte_from_byte", "token"), ("sp_from_byte", "projection"), ("byte_from_sp", "projection"),
     ("byte_from_dummy", "projection"), ("sp_from_byte", "strict")],
)  # fmt: skip
def test_stored_rows_teach_what_the_definition_says_to_1e_3(make_case, name, alignment, direction, temperature):
    case, settings = make_case(name), {"temperature": temperature, "kd_direction": direction, "teacher_top_k": 8}
    learned, grad = _learned_from_stored(case, alignment, 32, **settings)
    leaf = case.outputs.student_logits.double().requires_grad_()
    wanted = STORED[alignment](case, leaf, temperature, top_k=8, direction=direction)
    wanted.backward()
    assert wanted > 0.1
    torch.testing.assert_close(learned.loss.double(), wanted.detach(), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(learned.unclamped.double(), wanted.detach(), rtol=1e-3, atol=0.0)
    assert (grad - leaf.grad).norm() < 1e-3 * leaf.grad.norm()


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize(("alignment", "k"), [("alm", 1), ("uld", 8)])
def test_stored_rows_serve_the_terms_that_compare_no_tokens(make_case, name, alignment, k):
    case, settings = make_case(name), {"temperature": 2.0, "teacher_top_k": k}
    live, live_grad = _learned(case, alignment, **settings)
    learned, grad = _learned_from_stored(case, alignment, k, **settings)
    assert live.loss > 0.1
    torch.testing.assert_close(learned.loss, live.loss, rtol=1e-3, atol=0.0)
    assert (grad - live_grad).norm() < 1e-3 * live_grad.norm()


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("alignment", ["projection", "strict", "alm", "uld"])
def test_a_stored_row_that_was_not_finite_is_dropped_and_counted_as_a_live_one(make_case, name, alignment):
    case, settings = make_case(name), {"temperature": 2.0, "teacher_top_k": 8}
    bad = case.batch.alignment.teacher_positions[::3]
    case.outputs.teacher_logits[bad, 5] = math.nan
    live, live_grad = _learned(case, alignment, **settings)
    learned, grad = _learned_from_stored(case, alignment, 8, **settings)
    assert learned.dropped == live.dropped > 0
    torch.testing.assert_close(learned.loss, live.loss, rtol=1e-3, atol=0.0)
    assert (grad - live_grad).norm() < 1e-3 * live_grad.norm()


@EVERY_DIRECTION
def test_the_floor_of_the_normalized_clamp_counts_for_stored_rows_too(make_case, direction):
    case = make_case("sp_from_byte", spread=8.0)
    settings = {"temperature": 2.0, "kd_direction": direction, "teacher_top_k": 8, "logit_clamp": 2.0}
    free, _ = _learned_from_stored(case, "projection", 8, **settings)
    learned, grad = _learned_from_stored(case, "projection", 8, **settings, logit_clamp_style="normalized")
    live, live_grad = _learned(case, "projection", **settings, logit_clamp_style="normalized")
    assert abs(learned.loss - free.loss) > 0.01
    torch.testing.assert_close(learned.loss, live.loss, rtol=1e-3, atol=0.0)
    assert (grad - live_grad).norm() < 1e-3 * live_grad.norm()


# The clamps


@EVERY_PAIR_OF_TWO
@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["projection", "strict"])
def test_the_normalized_clamp_floors_the_value_and_leaves_the_gradient(make_case, name, direction, alignment):
    case, naive = make_case(name, spread=8.0), _naive_projected if alignment == "projection" else _naive_strict
    settings = {"temperature": 2.0, "kd_direction": direction, "logit_clamp": 2.0}
    free, free_grad = _learned(case, alignment, **settings)
    floored, grad = _learned(case, alignment, **settings, logit_clamp_style="normalized")
    wanted = naive(case, case.outputs.student_logits.double(), 2.0, direction=direction, floor=-4.0)
    torch.testing.assert_close(floored.loss.double(), wanted, rtol=1e-5, atol=1e-4)
    assert abs(floored.loss - free.loss) > 0.1
    assert torch.equal(floored.unclamped, free.unclamped)
    assert torch.equal(grad, free_grad)


@EVERY_PAIR_OF_TWO
def test_the_normalized_clamp_floors_what_the_student_says_of_each_token_of_a_chunk(make_case, name):
    case, settings = make_case(name, spread=6.0), {"logit_clamp": 5.0}
    free, _ = _learned(case, "alm", **settings)
    floored, grad = _learned(case, "alm", **settings, logit_clamp_style="normalized")
    wanted = _naive_alm(case, case.outputs.student_logits.double(), floor=-10.0)
    torch.testing.assert_close(floored.loss.double(), wanted, rtol=1e-5, atol=1e-5)
    assert abs(floored.loss - free.loss) > 0.1
    assert torch.equal(floored.unclamped, free.unclamped)
    assert grad.isfinite().all()
    assert (grad != 0).any(1).all()


@pytest.mark.parametrize(
    ("alignment", "direction", "top_k"),
    [(kind, d, 8) for kind in ("projection", "token") for d in ("forward", "reverse", "jsd")]
    + [("projection", "forward", 0), ("strict", "forward", 8), ("alm", "forward", 0), ("uld", "forward", 0)],
)
def test_the_raw_clamp_is_no_clamp_of_the_clamped_logits_of_both(make_case, alignment, direction, top_k):
    case = make_case("byte_from_byte" if alignment == "token" else "sp_from_byte", spread=4.0)
    settings = {"temperature": 2.0, "kd_direction": direction, "teacher_top_k": top_k, "logit_clamp": 10.0}
    learned, grad = _learned(case, alignment, **settings, logit_clamp_style="raw")
    student, teacher = (x.clamp(-10.0, 10.0) for x in (case.outputs.student_logits, case.outputs.teacher_logits))
    clamped = SimpleNamespace(
        **{**vars(case), "outputs": ModelOutputs(student, teacher, *[case.outputs.student_states] * 2)}
    )
    wanted, wanted_grad = _learned(clamped, alignment, **settings)
    outside = case.outputs.student_logits.abs() > 10.0
    free, _ = _learned(case, alignment, **settings)
    torch.testing.assert_close(learned.loss, wanted.loss)
    torch.testing.assert_close(learned.unclamped, free.unclamped)
    torch.testing.assert_close(grad, wanted_grad.masked_fill(outside, 0.0))
    assert abs(free.unclamped - wanted.unclamped) > 1e-3
    assert outside.any()
    assert wanted.loss > 0.1


# Properties of the single kinds


@EVERY_PAIR_OF_TWO
@EVERY_TERM
def test_no_term_is_ever_negative(make_case, name, direction, alignment, top_k):
    for seed in range(2):
        case = make_case(name, seed=seed, spread=8.0 * seed + 0.1)
        settings = {"kd_direction": direction, "teacher_top_k": top_k, "temperature": 1.5}
        assert _learned(case, alignment, **settings)[0].loss >= -1e-4


def test_a_student_that_is_its_teacher_has_nothing_to_learn(make_case):
    for alignment in [*KINDS, "token"]:
        case = make_case("byte_from_byte")
        case.outputs.student_logits.copy_(case.outputs.teacher_logits[case.batch.teacher.positions])
        learned, grad = _learned(case, alignment, temperature=2.0)
        assert abs(learned.loss) < 1e-4
        assert grad.abs().max() < 1e-5


def test_the_temperature_keeps_the_size_of_the_gradient(make_case):
    case = make_case("byte_from_byte", spread=0.01)
    norms = [_learned(case, "projection", temperature=t, kd_direction="reverse")[1].norm() for t in (1.0, 2.0, 4.0)]
    torch.testing.assert_close(norms[1] / norms[0], torch.tensor(1.0), rtol=0.05, atol=0.0)
    torch.testing.assert_close(norms[2] / norms[0], torch.tensor(1.0), rtol=0.05, atol=0.0)


def test_the_share_of_the_mixture_reaches_the_divergence(make_case):
    case = make_case("sp_from_byte")
    _assert_matches(
        case,
        "projection",
        lambda z: _naive_projected(case, z, direction="jsd", beta=0.1),
        kd_direction="jsd",
        jsd_beta=0.1,
    )


def test_hidden_states_take_no_notice_of_logits(make_case):
    case = make_case("sp_from_byte")
    first = _learned(case, "hidden")[0].loss
    case.outputs.student_logits.mul_(3.0)
    assert torch.equal(_learned(case, "hidden")[0].loss, first)


# Which kind is built


@pytest.mark.parametrize(
    ("alignment", "name", "kind"),
    [
        ("auto", "sp_from_byte", Projection),
        ("projection", "sp_from_byte", Projection),
        ("projection", "byte_from_byte", Projection),
        ("strict", "byte_from_byte", Strict),
        ("strict", "sp_from_byte", Strict),
        ("alm", "sp_from_byte", ChunkLikelihood),
        ("uld", "byte_from_byte", SortedProbabilities),
        ("hidden", "sp_from_byte", HiddenStates),
    ],
)
def test_the_flag_names_the_kind(corpora, make_student, alignment, name, kind):
    student, teacher = make_student(64, hidden_size=16, num_hidden_layers=1), make_student(64, num_hidden_layers=1)
    term = build_distillation(LossConfig(alignment=alignment), corpora[name].aligner, student, teacher)
    assert type(term) is kind
    assert [tuple(p.shape) for p in term.parameters()] == ([(32, 16)] if kind is HiddenStates else [])


def test_equal_tokenizers_are_compared_token_by_token(corpora, make_student, byte_tokenizer, corpus_texts):
    corpus = _corpus([Document("0", corpus_texts[0])], byte_tokenizer, byte_tokenizer, aligns=False)
    student = make_student(64, num_hidden_layers=1)
    assert type(build_distillation(LossConfig(), corpus.aligner, student, student)) is TokenLevel


@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_byte"])
def test_only_different_tokenizers_have_continuations(make_case, corpora, name):
    case = make_case(name)
    alignment = case.batch.alignment
    numbers = [len(record.end_classes) for record in (alignment.teacher_continuations, alignment.student_continuations)]
    assert numbers == [0, 0] if corpora[name].pair.equal else min(numbers) > 1
