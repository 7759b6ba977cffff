"""Every distillation method on real batches against its definition, position by position in float64."""

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

from sar_kd.alignment.batch_alignment import Continuations, TokensBefore
from sar_kd.alignment.segments import build_segments
from sar_kd.config.sections import LossConfig
from sar_kd.data.batch import CachedTopK
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.embedded import STUDENT_DIR, TEACHER_DIR, split_of
from sar_kd.losses.baselines import ChunkLikelihood, HiddenStates, SortedProbabilities, Strict
from sar_kd.losses.distillation import ForwardOutputs, TokenLevel
from sar_kd.losses.objective import build_distillation
from sar_kd.losses.projection.joint import ContinuationPaths, add_continuation_paths
from sar_kd.losses.projection.loss import Projection
from sar_kd.losses.projection.marginals import ClassMap, continuing_log_probs, gather_logits
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from tests.helpers.lm_heads import lazy_logits

DIFFERENT = ["sp_from_byte", "byte_from_sp", "dummy_from_byte", "byte_from_dummy"]
EQUAL = ["byte_from_byte", "sp_from_sp"]
EVERY_PAIR = pytest.mark.parametrize("name", DIFFERENT)
EVERY_DIRECTION = pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
METHODS = {"projection": Projection, "strict": Strict, "alm": ChunkLikelihood, "uld": SortedProbabilities}
EVERY_METHOD = pytest.mark.parametrize("alignment", [*METHODS, "hidden"])
EVERY_PAIR_OF_TWO = pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_sp"])
EVERY_METHOD_AND_DIRECTION = pytest.mark.parametrize(
    ("alignment", "direction", "top_k"),
    [(method, d, k) for method in ("projection", "strict") for d in ("forward", "reverse", "jsd") for k in (0, 8)]
    + [("alm", "forward", 0), ("uld", "forward", 0), ("uld", "forward", 8), ("hidden", "forward", 0)],
)
"""A method without a direction or a top k comes once."""
FIRST_BLOCKS = (0, 17, 33, 48, 60)
STUDENT_WIDTH, TEACHER_WIDTH = 6, 9


@pytest.fixture(scope="module")
def datasets(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer, corpus_texts):
    """Datasets by "student_from_teacher"; equal tokenizers are aligned too."""
    tokenizers = {"byte": byte_tokenizer, "sp": sp_tokenizer, "dummy": dummy_prefix_tokenizer}
    documents = [Document(str(number), text) for number, text in enumerate(corpus_texts)]
    return {name: _dataset(documents, *map(tokenizers.get, name.split("_from_"))) for name in DIFFERENT + EQUAL}


def _dataset(documents, student, teacher, aligns=True) -> Dataset:
    pair = TokenizerPair(
        student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher), aligns=aligns
    )
    return build_dataset(documents, pair, 24, 60)


@dataclasses.dataclass(frozen=True)
class DenseOutputs:
    """Dense logits and hidden states of both models on a batch."""

    student_logits: Tensor
    teacher_logits: Tensor
    student_states: Tensor | None = None
    teacher_states: Tensor | None = None

    def outputs(self) -> ForwardOutputs:
        logits = map(lazy_logits, (self.student_logits, self.teacher_logits))
        return ForwardOutputs(*logits, self.student_states, self.teacher_states)


@pytest.fixture(scope="module")
def make_case(datasets):
    """make_case(name, ...): a batch with random outputs of both models, the same for the same arguments."""

    def make(name, blocks=FIRST_BLOCKS, seed=0, spread=2.0, dataset=None):
        dataset = dataset or datasets[name]
        batch = dataset.batch(list(blocks))
        generator = torch.Generator().manual_seed(seed)
        sizes = [len(tokenizer) for tokenizer in (dataset.pair.student, dataset.pair.teacher)]
        counts = [ids.numel() for ids in (batch.student.input_ids, batch.teacher.input_ids)]
        logits = [
            torch.randn(count, size, generator=generator) * spread
            for count, size in zip((batch.num_target_tokens, counts[1]), sizes, strict=True)
        ]
        states = [
            torch.randn(count, width, generator=generator)
            for count, width in zip(counts, (STUDENT_WIDTH, TEACHER_WIDTH), strict=True)
        ]
        return SimpleNamespace(
            dataset=dataset,
            aligner=dataset.aligner,
            batch=batch,
            outputs=DenseOutputs(*logits, *states),
            infinite=[],
            unshared=[],
        )

    return make


def _with_alignment(case, alignment, limit=10**9):
    """The case's batch with this alignment, in segments of at most `limit` positions."""
    batch, aligner = case.batch, case.aligner
    coarser = aligner.teacher_is_coarser
    segments = build_segments(alignment, batch.num_target_tokens, batch.teacher.positions, coarser, limit)
    return dataclasses.replace(batch, alignment=alignment, segments=segments)


def _build(case, alignment, **settings):
    config = LossConfig(**({"temperature": 1.0, "logit_clamp_style": "off"} | settings))
    if alignment == "token":
        return TokenLevel(config, case.aligner)
    if alignment != "hidden":
        return METHODS[alignment](config, case.aligner)
    torch.manual_seed(5)
    return HiddenStates(config, case.aligner, STUDENT_WIDTH, TEACHER_WIDTH)


def _distill(case, alignment, **settings):
    """The loss, and the gradient of the student's logits, or of its hidden states."""
    return _run(_build(case, alignment, **settings), case)


def _run(method, case):
    logits, states = (x.clone().requires_grad_() for x in (case.outputs.student_logits, case.outputs.student_states))
    outputs = dataclasses.replace(case.outputs, student_logits=logits, student_states=states)
    terms = method(case.batch, outputs.outputs())
    if terms.loss.requires_grad:
        terms.loss.backward()
    leaf = states if method.needs_states else logits
    return terms, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _assert_matches(case, alignment, naive, **settings):
    terms, grad = _distill(case, alignment, **settings)
    leaf = case.outputs.student_logits.double().requires_grad_()
    case.unshared.clear()
    expected = naive(leaf)
    expected.backward()
    assert expected > 0.1
    torch.testing.assert_close(terms.loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.unclamped.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert not terms.unclamped.requires_grad
    assert terms.unshared == len(case.unshared)


# The definitions


def _is_finite(logits: Tensor) -> Tensor:
    """Which positions have neither NaN nor +inf, and a token that is not masked by -inf: bool [N]."""
    return (logits < math.inf).all(1) & (logits > -math.inf).any(1)


def _add_finite(case, total: Tensor, value: Tensor) -> Tensor:
    """The sum; a value that is infinite is counted instead."""
    if value < math.inf:
        return total + value
    case.infinite.append(value)
    return total


def _divergence(p: Tensor, t: Tensor, direction: str, beta: float = 0.5, floor: float = -math.inf) -> Tensor:
    """Of two distributions; infinite, with any floor, where the second has no probability and the first has."""

    def kl(a, b):
        a, b = a[a > 0], b[a > 0]
        if not (b > 0).all():
            return torch.tensor(math.inf)
        return (a * (a.log().clamp_min(floor) - b.log().clamp_min(floor))).sum()

    if direction == "jsd":
        m = beta * t + (1 - beta) * p
        return beta * kl(t, m) + (1 - beta) * kl(p, m)
    return kl(t, p) if direction == "forward" else kl(p, t)


def _weights(logits: Tensor, temperature: float) -> Tensor:
    """Unnormalised probabilities."""
    return ((logits - logits.detach().max()) / temperature).exp()


def _top_mask(logits: Tensor, top_k: int) -> Tensor:
    """The top k tokens of a position, or all if top_k is 0: bool [V]."""
    mask = torch.zeros(len(logits), dtype=torch.bool)
    mask[logits.topk(top_k or len(logits)).indices] = True
    return mask


def _sums(weights: Tensor, tokens: Tensor, classes: Tensor, count: int) -> Tensor:
    return weights.new_zeros(count).index_add(0, classes, weights[tokens])


def _naive_projected(case, student: Tensor, temperature=1.0, top_k=0, **divergence) -> Tensor:
    """Inside a token of the coarser side, its continuations; at a common boundary, all paths to each shared class.

    The tail of a truncated teacher is one class more, or counts for the end of a token. A continuation of a truncated
    teacher counts if its top k holds at least as much of it as the tail. A teacher's token that ended in the text and
    is not among the k is as likely as the k-th, or as the tail if that is less.
    """
    alignment, classes, is_coarser = case.batch.alignment, case.aligner.shared_classes, case.aligner.teacher_is_coarser
    total, continued, is_truncated = student.new_zeros(()), {}, 0 < top_k < case.outputs.teacher_logits.shape[1]
    whole = [_weights(logits, temperature) for logits in case.outputs.teacher_logits.double()]
    teacher = [weights * _top_mask(weights, top_k) for weights in whole]
    tails = [(a - b).sum() if is_truncated else a.new_zeros(()) for a, b in zip(whole, teacher, strict=True)]
    student = [_weights(logits, temperature) for logits in student]
    is_finite = _is_finite(case.outputs.teacher_logits).tolist()

    def most_likely(row):
        return torch.minimum(teacher[row][teacher[row] > 0].min(), tails[row])

    def compared(p, t, counts, is_known):
        if is_truncated and divergence["direction"] == "reverse":
            p = torch.where(t > 0, p, 0.0)
        is_known = is_known and p.sum() > 0 and t.sum() > 0
        case.unshared += [True] * (is_truncated and counts and not is_known)
        counts = counts and is_known
        return _divergence(p / p.sum(), t / t.sum(), **divergence) if counts else student[0].new_zeros(())

    for record, teacher_is_coarse in (
        (alignment.student_continuations, False),
        (alignment.teacher_continuations, True),
    ):
        coarse_side, fine_side = (teacher, student) if teacher_is_coarse else (student, teacher)
        can_end, num_inside = _can_end(record), len(record.starting_positions)
        for i, coarse_position in enumerate(record.continuing_positions.tolist()):
            (own,) = (record.class_continuations == i).nonzero(as_tuple=True)
            first, count = own.min(), len(own)
            _, tokens, ids = record.continuing_entries[:, record.continuing_entries[0] == i]
            coarse = _sums(coarse_side[coarse_position], tokens, ids - first, count)
            is_unknown = teacher_is_coarse and (coarse.sum() < tails[coarse_position] or coarse.sum() == 0)
            is_before_finite = True
            if is_unknown:  # as if the token ended
                coarse = torch.arange(count).eq(count - 1).to(coarse)
            elif teacher_is_coarse and is_truncated and i >= num_inside and coarse[-1] == 0.0:
                coarse = torch.cat([coarse[:-1], most_likely(coarse_position)[None]])
            if teacher_is_coarse and i in record.before.continuations:  # the token before did not end
                b = record.before.continuations.tolist().index(i)
                row, last = record.before.positions[b].item(), record.before.tokens[b]
                has_ended = teacher[row][last] if teacher[row][last] > 0 else most_likely(row)
                _, tokens, ids = record.before.entries[:, record.before.entries[0] == b]
                coarse = coarse * has_ended / (teacher[coarse_position].sum() + tails[coarse_position])
                coarse = coarse + _sums(teacher[row], tokens, ids - first, count)
                is_before_finite = is_finite[row]
            coarse = coarse / coarse.sum()
            if teacher_is_coarse == is_coarser:
                continued |= dict(zip(own.tolist(), coarse, strict=True))
            if i < num_inside:
                fine_position = record.starting_positions[i].item()
                _, tokens, ids = record.starting_entries[:, record.starting_entries[0] == i]
                fine = _sums(fine_side[fine_position], tokens, ids - first, count)
                if can_end[i] or (teacher_is_coarse and divergence["direction"] != "reverse"):
                    end = fine_side[fine_position].clone()
                    end[tokens] = 0.0
                    others = end.sum() + (0.0 if teacher_is_coarse else tails[fine_position])
                    fine = torch.where(torch.arange(count) < count - 1, fine, others)
                fine = fine / fine.sum() if fine.sum() > 0 else fine
                p, t = (fine, coarse) if teacher_is_coarse else (coarse, fine)
                teacher_position = coarse_position if teacher_is_coarse else fine_position
                value = compared(p, t, is_finite[teacher_position] and is_before_finite, not is_unknown)
                total = _add_finite(case, total, value)
    coarser = alignment.teacher_continuations if is_coarser else alignment.student_continuations
    for pair, (k, r) in enumerate(
        zip(alignment.student_positions.tolist(), alignment.teacher_positions.tolist(), strict=True)
    ):
        ended = alignment.token_end[pair].item()
        counts = is_finite[r] and not (is_coarser and ended >= 0 and not is_finite[coarser.continuing_positions[ended]])
        if counts:
            t = _sums(teacher[r], classes.teacher_tokens, classes.teacher_classes, classes.num_classes)
            p = _sums(student[k], classes.student_tokens, classes.student_classes, classes.num_classes)
            tail, sides, coarse = tails[r], [p / p.sum(), t / (t.sum() + tails[r])], int(is_coarser)
            tail = tail / (t.sum() + tail)
            if ended >= 0:
                end = continued[coarser.end_classes[ended].item()]
                sides[coarse], tail = sides[coarse] * end, tail * end if is_coarser else tail
                _, shared, paths = alignment.continuation_paths[:, alignment.continuation_paths[0] == pair]
                more = torch.stack([continued[path] for path in paths.tolist()]) if len(paths) else sides[coarse][:0]
                sides[coarse] = sides[coarse].index_add(0, shared, more)
            if is_truncated:
                p, t = sides
                p, t = (torch.cat([x * (t > 0), y[None]]) for x, y in ((p, p[t == 0].sum()), (t, tail)))
                sides = [p / p.sum(), t / t.sum()]
            total = _add_finite(case, total, _divergence(*sides, **divergence))
    return total * temperature**2


def _can_end(record) -> list[bool]:
    """For each continuation, whether the coarser side has a token that ends there."""
    before = record.before.entries[2] if record.before else record.end_classes[:0]
    return torch.isin(record.end_classes, torch.cat([record.continuing_entries[2], before])).tolist()


def _partners(case) -> dict[int, int]:
    """Teacher token to student token of the same bytes, not a byte fallback if there is another; and the end tokens."""
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


def _naive_strict(case, student: Tensor, temperature=1.0, top_k=0, **divergence) -> Tensor:
    """Where both predict the same token: both softmaxes over the shared tokens among the teacher's top k."""
    alignment, partners = case.batch.alignment, _partners(case)
    total = student.new_zeros(())
    for k, r, strict in zip(
        alignment.student_positions, alignment.teacher_positions, alignment.strict.tolist(), strict=True
    ):
        logits = case.outputs.teacher_logits[r].double()
        if strict and _is_finite(logits[None]):
            mask = _top_mask(logits, top_k)
            weights = _weights(logits, temperature) * mask
            shared = [v for v in (mask & (logits > -math.inf)).nonzero().squeeze(1).tolist() if v in partners]
            if weights[shared].sum() >= 0.1 * weights.sum():
                p = _weights(student[k], temperature)[[partners[v] for v in shared]]
                value = _divergence(p / p.sum(), weights[shared] / weights[shared].sum(), **divergence)
                total = _add_finite(case, total, value)
            else:
                case.unshared.append(True)
    return total * temperature**2


def _naive_alm(case, student: Tensor, tau=5.0, floor=-math.inf) -> Tensor:
    """tau * the KL of the two Bernoulli distributions of each chunk."""
    alignment, batch = case.batch.alignment, case.batch
    teacher = case.outputs.teacher_logits[batch.teacher.positions].double()
    teacher = torch.where(_is_finite(teacher)[:, None], teacher, math.nan)
    sides = [
        [logits.log_softmax(-1)[i, y] for i, y in enumerate(tokens.targets.tolist())]
        for logits, tokens in ((student, batch.student), (teacher, batch.teacher))
    ]
    total = student.new_zeros(())
    for chunk in range(alignment.num_chunks):
        student_sum = sum(sides[0][i].clamp_min(floor) for i in (alignment.student_chunks == chunk).nonzero())
        teacher_sum = sum(sides[1][i] for i in (alignment.teacher_chunks == chunk).nonzero())
        if not teacher_sum.isnan():
            a, b = teacher_sum / tau - 1e-6, student_sum / tau - 1e-6
            p, q = a.exp(), b.exp()
            comes = p * (a - b) if p > 0 else 0.0
            total = _add_finite(case, total, tau * (comes + (1 - p) * ((1 - p).log() - (1 - q).log())))
    return total


@EVERY_DIRECTION
@pytest.mark.parametrize(("name", "temperature"), [(name, 2.0) for name in DIFFERENT] + [("sp_from_byte", 1.0)])
def test_the_projection_matches_its_definition(make_case, name, direction, temperature):
    case = make_case(name)
    alignment = case.batch.alignment
    assert len(alignment.student_positions) > 30
    records = alignment.teacher_continuations, alignment.student_continuations
    assert min(len(record.end_classes) for record in records) > 0
    assert min(alignment.continuation_paths.shape[1], int((alignment.token_end >= 0).sum())) > 10
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
            top = _top_mask(y, top_k)
            sides = [(x / 2.0).softmax(-1) for x in (z, y)]
            total = total + _divergence(*(torch.cat([x[top], x[~top].sum()[None]]) for x in sides), direction)
        return 4.0 * total

    _assert_matches(case, "token", naive, temperature=2.0, kd_direction=direction, teacher_top_k=top_k)


@EVERY_PAIR
def test_sorted_probabilities_match_their_definition_at_common_boundaries(make_case, name):
    case = make_case(name)
    alignment, teacher = case.batch.alignment, case.outputs.teacher_logits.double()

    def naive(student):
        total = student.new_zeros(())
        for k, r in zip(alignment.student_positions, alignment.teacher_positions, strict=True):
            p, t = ((z / 2.0).softmax(-1).sort(descending=True).values[:200] for z in (student[k], teacher[r]))
            total = total + (p - t).abs().sum()
        return total

    _assert_matches(case, "uld", naive, temperature=2.0)


@EVERY_PAIR
def test_hidden_states_match_their_definition_at_the_ends_of_chunks(make_case, name):
    case = make_case(name)
    terms, grad = _distill(case, "hidden")
    weight = _build(case, "hidden").projection.weight.detach().double()
    alignment, outputs = case.batch.alignment, case.outputs
    states = outputs.student_states.double().requires_grad_()
    total = states.new_zeros(())
    for s, t in zip(alignment.student_ends, alignment.teacher_ends, strict=True):
        target = outputs.teacher_states[t].double()
        total = total + ((weight @ states[s] - target) ** 2).sum() / (target**2).sum()
    total.backward()
    torch.testing.assert_close(terms.loss.double(), total.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), states.grad, rtol=1e-4, atol=1e-5)


# Which positions take part, by the bytes of the text


def _starts(case, side: str) -> list[tuple[int, int, int]]:
    """Block, first byte and id of each target of a side, in the order of its positions."""
    tokens, table = getattr(case.batch, side), case.aligner.pair.tables[side == "teacher"]
    found, at, block = [], 0, -1
    for position, y in zip(tokens.positions.tolist(), tokens.targets.tolist(), strict=True):
        own_block = position // tokens.input_ids.shape[1]
        at, block = (at, block) if own_block == block else (0, own_block)
        found.append((block, at, y))
        at += max(1, len(table.pieces[y]))
    return found


@EVERY_PAIR_OF_TWO
def test_pairs_are_the_positions_whose_targets_start_at_the_same_byte(make_case, name):
    case = make_case(name)
    student, teacher = _starts(case, "student"), _starts(case, "teacher")
    index_of = {r: i for i, r in enumerate(case.batch.teacher.positions.tolist())}
    shared = {start[:2] for start in student} & {start[:2] for start in teacher}
    alignment = case.batch.alignment
    pairs = list(zip(alignment.student_positions.tolist(), alignment.teacher_positions.tolist(), strict=True))
    assert {student[k][:2] for k, _ in pairs} == shared
    assert all(student[k][:2] == teacher[index_of[r]][:2] for k, r in pairs)


def _starting_positions_at_token_ends(case, coarse: int, first: int) -> list[int]:
    """The finer side's position for each continuation whose token ends at a pair; of the coarser side only."""
    alignment = case.batch.alignment
    if case.aligner.teacher_is_coarser != coarse:
        return []
    pairs = (alignment.token_end >= 0).nonzero().squeeze(1)
    assert alignment.token_end[pairs].sort().values.tolist() == list(range(first, first + len(pairs)))
    positions = alignment.student_positions if coarse else alignment.teacher_positions
    return positions[pairs[alignment.token_end[pairs].argsort()]].tolist()


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("coarse", [0, 1], ids=["student_continuations", "teacher_continuations"])
def test_a_continuation_is_conditioned_on_exactly_the_bytes_of_its_prefix(make_case, name, coarse):
    case = make_case(name)
    sides, tables = (_starts(case, "student"), _starts(case, "teacher")), case.aligner.pair.tables
    index_of = {r: i for i, r in enumerate(case.batch.teacher.positions.tolist())}
    record = (case.batch.alignment.student_continuations, case.batch.alignment.teacher_continuations)[coarse]
    assert len(record.end_classes) > 1
    num_inside, can_end = len(record.starting_positions), _can_end(record)
    assert can_end[:num_inside] == record.can_end.tolist()
    assert (record.class_continuations < num_inside).sum() == record.num_inside_classes
    starting_positions = record.starting_positions.tolist() + _starting_positions_at_token_ends(
        case, coarse, num_inside
    )
    for i, pair in enumerate(zip(record.continuing_positions.tolist(), starting_positions, strict=True)):
        own, other = (
            sides[side][k if side == 0 else index_of[k]] for side, k in zip((coarse, 1 - coarse), pair, strict=True)
        )
        prefix = tables[coarse].pieces[own[2]][: other[1] - own[1]]
        assert own[0] == other[0]
        last_byte = own[1] + len(tables[coarse].pieces[own[2]])
        assert own[1] < other[1] < last_byte if i < num_inside else other[1] == last_byte
        _, tokens, classes = record.continuing_entries[:, record.continuing_entries[0] == i]
        last = classes == record.end_classes[i]
        assert all(tables[coarse].pieces[v] == prefix for v in tokens[last].tolist())
        longer = [tables[coarse].pieces[v] for v in tokens[~last].tolist()]
        assert all(piece.startswith(prefix) and len(piece) > len(prefix) for piece in longer)
        assert can_end[i] == last.any() == (prefix in tables[coarse].pieces)
        assert own[2] in tokens or case.aligner.teacher_is_coarser != coarse or other[1] > own[1]


# Equal tokenizers


def _without_tokens(case, *excluded: list[int]):
    """The case in which each side gives some of its tokens no probability."""
    outputs = case.outputs
    student, teacher = outputs.student_logits.clone(), outputs.teacher_logits.clone()
    for logits, tokens in zip((student, teacher), excluded, strict=True):
        logits[:, tokens] = -1e4
    outputs = dataclasses.replace(outputs, student_logits=student, teacher_logits=teacher)
    return SimpleNamespace(**{**vars(case), "outputs": outputs})


def _assert_same(case, alignment, other, order=None, **settings):
    """A method has the loss and gradient of the token-level method on `other`, to 1e-6 nats per token."""
    count = case.batch.num_target_tokens
    terms, grad = _distill(case, alignment, **settings)
    expected, expected_grad = _distill(other, "token", **settings)
    assert expected.loss > 0.1
    torch.testing.assert_close(terms.loss / count, expected.loss / count, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms.unclamped / count, expected.unclamped / count, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad if order is None else expected_grad[:, order], rtol=1e-5, atol=1e-6)


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
    (unmapped,) = (case.aligner.same_token < 0).nonzero(as_tuple=True)
    case = _without_tokens(case, unmapped.tolist(), unmapped.tolist())
    _assert_same(case, "strict", case, temperature=2.0, kd_direction=direction)


@pytest.fixture(scope="module")
def permuted(byte_tokenizer, corpus_texts):
    """A student whose tokenizer is the teacher's with permuted ids, and the student's id of each teacher id."""
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
    return _dataset(documents, student, byte_tokenizer, aligns=False), order


@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["projection", "strict"])
def test_permuted_student_ids_change_neither_loss_nor_gradient(make_case, permuted, alignment, direction):
    dataset, order = permuted
    assert not dataset.pair.equal
    case = make_case(None, dataset=dataset)
    plain = make_case("byte_from_byte")
    settings = {"temperature": 2.0, "kd_direction": direction}
    outputs = dataclasses.replace(case.outputs, student_logits=case.outputs.student_logits[:, order])
    same = SimpleNamespace(batch=plain.batch, outputs=outputs, aligner=plain.aligner)
    back = torch.tensor(order).argsort()
    _assert_same(case, alignment, same, order=back, **settings)


# The chain rule


def _implied(case) -> Tensor:
    """The teacher's log-probability of each of the student's targets, by the projection; NaN where it has none."""
    alignment, classes, outputs = case.batch.alignment, case.aligner.shared_classes, case.outputs
    record, targets = alignment.teacher_continuations, case.batch.student.targets
    class_map = ClassMap(classes.teacher_tokens, classes.teacher_classes, classes.num_classes)
    (segment,) = _with_alignment(case, alignment).segments
    tile = outputs.teacher_logits[segment.teacher_positions].T.contiguous()
    num_inside = len(segment.student_continuations.starting_positions)
    gathered = gather_logits(tile, class_map, segment.num_pairs, num_inside, segment.teacher_continuations, 1.0)
    inside = continuing_log_probs(gathered.entries, record)
    paths = ContinuationPaths(inside, inside[record.end_classes], alignment.token_end, alignment.continuation_paths)
    joint = add_continuation_paths(gathered.boundary.log_softmax(0), paths).T
    class_of = torch.full((len(case.aligner.pair.student),), -1)
    class_of[classes.student_tokens] = classes.student_classes
    own = class_of[targets[alignment.student_positions]]
    implied = torch.full((len(targets),), math.nan, dtype=torch.float64)
    implied[alignment.student_positions] = torch.where(own < 0, math.nan, joint[torch.arange(len(own)), own].double())
    index, token, in_class = record.starting_entries
    is_target = token == targets[record.starting_positions[index]]
    assert implied[record.starting_positions].isnan().all()  # a target starts at a pair or inside a teacher token
    implied[record.starting_positions[index[is_target]]] = inside[in_class[is_target]].double()
    return implied


def _own(case) -> Tensor:
    """The teacher's log-probability of each of its own targets."""
    tokens = case.batch.teacher
    log_probs = case.outputs.teacher_logits[tokens.positions].double().log_softmax(-1)
    return log_probs.gather(1, tokens.targets[:, None]).squeeze(1)


@pytest.fixture(scope="module")
def embedded_case():
    """A few blocks of the embedded text with the embedded teacher's logits."""
    tokenizers = [transformers.AutoTokenizer.from_pretrained(path) for path in (STUDENT_DIR, TEACHER_DIR)]
    teacher = transformers.AutoModelForCausalLM.from_pretrained(TEACHER_DIR, dtype=torch.float32).eval()
    # The first of `read_text("transfer")`, without parsing the standard library.
    topics = sorted(pytest.importorskip("pydoc_data.topics").topics.items())
    documents = [Document(name, text) for name, text in topics if split_of(f"topic:{name}") == "transfer"][:20]
    pair = TokenizerPair(*tokenizers, student_vocab_size=len(tokenizers[0]), teacher_vocab_size=len(tokenizers[1]))
    dataset = build_dataset(documents, pair, 256, 1024)
    batch = dataset.batch([0, 1, 2, 3, *range(100, 104)])
    with torch.no_grad():
        logits = teacher(input_ids=batch.teacher.input_ids).logits.flatten(0, 1)
    return SimpleNamespace(aligner=dataset.aligner, batch=batch, outputs=DenseOutputs(None, logits))


def test_the_teachers_likelihood_of_the_text_in_the_students_tokens_is_its_own(embedded_case):
    """Summed over the batch, so over the same bytes. A target without an implied probability counts as uniform."""
    assert embedded_case.aligner.teacher_is_coarser
    implied, own = _implied(embedded_case), _own(embedded_case).sum()
    missing = implied.isnan()
    uniform = math.log(len(embedded_case.aligner.pair.teacher))
    assert len(embedded_case.batch.alignment.teacher_continuations.starting_positions) > 0.15 * len(implied)
    assert missing.float().mean() < 0.005
    assert own > 0.6 * -uniform * len(_own(embedded_case))  # the teacher is far from uniform
    assert (implied[~missing].sum() - uniform * missing.sum()).item() == pytest.approx(own.item(), rel=0.03)
    assert implied[~missing].max() <= 1e-4


@pytest.mark.parametrize("name", EQUAL)
def test_with_equal_tokenizers_the_implied_likelihood_is_the_teachers_own_token_by_token(make_case, name):
    case = make_case(name)
    torch.testing.assert_close(_implied(case), _own(case), rtol=1e-5, atol=1e-5)


# Segments


@EVERY_PAIR
@pytest.mark.parametrize("limit", [1, 7, 30, 77])
def test_segments_hold_every_position_once_and_share_one_with_the_former(make_case, name, limit):
    case = make_case(name)
    segments = _with_alignment(case, case.batch.alignment, limit).segments
    assert len(segments) > 1
    owned = torch.cat([part.student_positions[part.ce_mask > 0] for part in segments])
    assert torch.equal(owned.sort().values, torch.arange(case.batch.num_target_tokens))
    assert [int((part.ce_mask == 0).sum()) <= 1 for part in segments] == [True] * len(segments)
    pairs = torch.cat([part.student_positions[: part.num_pairs] for part in segments])
    assert torch.equal(pairs, case.batch.alignment.student_positions)
    if limit >= 30:
        assert max(len(part.student_positions) for part in segments) <= limit
        assert max(len(part.teacher_positions) for part in segments) <= limit


@EVERY_PAIR
@EVERY_DIRECTION
@pytest.mark.parametrize("limit", [1, 7, 30])
@pytest.mark.parametrize("top_k", [0, 8])
def test_segments_of_any_length_give_the_same_loss_and_gradient(make_case, name, direction, limit, top_k):
    case, settings = make_case(name), {"temperature": 2.0, "kd_direction": direction, "teacher_top_k": top_k}
    whole, whole_grad = _distill(case, "projection", **settings)
    case.batch = _with_alignment(case, case.batch.alignment, limit)
    terms, grad = _distill(case, "projection", **settings)
    torch.testing.assert_close(terms.loss, whole.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(terms.unclamped, whole.unclamped, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-4, atol=1e-5)


# Batches


def _joined(cases, batch) -> DenseOutputs:
    """The outputs of several batches as those of one, NaN in its padding."""

    def padded(name, side):
        parts = []
        for case in cases:
            part, width = getattr(case.outputs, name), getattr(batch, side).input_ids.shape[1]
            parts += [part, part.new_full((width - len(part), part.shape[1]), math.nan)]
        return torch.cat(parts)

    student = torch.cat([case.outputs.student_logits for case in cases])
    return DenseOutputs(
        student,
        padded("teacher_logits", "teacher"),
        padded("student_states", "student"),
        padded("teacher_states", "teacher"),
    )


@EVERY_METHOD
@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_dummy"])
def test_the_loss_of_a_batch_is_the_sum_over_its_blocks_and_ignores_padding(make_case, datasets, alignment, name):
    blocks = (*FIRST_BLOCKS, len(datasets[name]) - 1)  # the last one is shorter
    cases = [make_case(name, (block,), seed=block) for block in blocks]
    joined = make_case(name, blocks)
    joined.outputs = _joined(cases, joined.batch)
    assert joined.outputs.teacher_logits.isnan().any()
    terms, grad = _distill(joined, alignment, temperature=2.0)
    alone = [_distill(case, alignment, temperature=2.0) for case in cases]
    assert terms.dropped == 0
    torch.testing.assert_close(terms.loss, sum(single.loss for single, _ in alone), rtol=1e-6, atol=1e-6)
    grads = [single for _, single in alone]
    if alignment == "hidden":
        width = joined.batch.student.input_ids.shape[1]
        grads = [torch.nn.functional.pad(single, (0, 0, 0, width - len(single))) for single in grads]
    torch.testing.assert_close(grad, torch.cat(grads), rtol=1e-5, atol=1e-6)


# The shift


def _oracle(case, ahead=0):
    """Both models put p = 1 on the target; the teacher on the target `ahead` of it."""
    for side, logits in (("student", case.outputs.student_logits), ("teacher", case.outputs.teacher_logits)):
        tokens = getattr(case.batch, side)
        positions = torch.arange(len(tokens.targets)) if side == "student" else tokens.positions
        logits.zero_()
        logits[positions, tokens.targets.roll(-ahead if side == "teacher" else 0)] = 40.0
    return case


@EVERY_PAIR
def test_models_certain_of_the_text_have_a_chunk_likelihood_loss_of_exactly_zero(make_case, name):
    terms, grad = _distill(_oracle(make_case(name)), "alm")
    assert terms.loss == terms.unclamped == 0.0
    assert grad.abs().max() < 1e-6


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("alignment", ["projection", "strict", "alm"])
@pytest.mark.parametrize("ahead", [1, -1])
def test_only_a_teacher_certain_of_the_same_token_agrees_with_a_certain_student(make_case, name, alignment, ahead):
    agreed = _distill(_oracle(make_case(name)), alignment)[0].loss
    assert agreed < 0.1 * _distill(_oracle(make_case(name), ahead), alignment)[0].loss


def _pairs_with_paths(case) -> set[tuple[int, int]]:
    """Student positions of pairs at which a continuation of the student ends, and the position of the continuation."""
    alignment = case.batch.alignment
    if case.aligner.teacher_is_coarser:
        return set()
    has_path = alignment.token_end >= 0
    before = alignment.student_continuations.continuing_positions[alignment.token_end[has_path]]
    return set(zip(alignment.student_positions[has_path].tolist(), before.tolist(), strict=True))


def _changed(before: Tensor, after: Tensor) -> set[int]:
    return set((before != after).any(1).nonzero().squeeze(1).tolist())


def _affected(case, method, teacher_position: int) -> set[int]:
    """Student positions whose gradient depends on a teacher position."""
    alignment = case.batch.alignment
    if method == "alm":
        chunk = alignment.teacher_chunks[case.batch.teacher.positions == teacher_position].item()
        return set() if chunk < 0 else set((alignment.student_chunks == chunk).nonzero().squeeze(1).tolist())
    is_paired = alignment.teacher_positions == teacher_position
    if method == "strict":
        return set(alignment.student_positions[is_paired & alignment.strict].tolist())
    positions = alignment.student_positions[is_paired].tolist()
    positions += [before for position, before in _pairs_with_paths(case) if position in positions]
    records = (True, alignment.teacher_continuations), (False, alignment.student_continuations)
    for teacher_is_coarse, record in records:
        size = len(record.starting_positions)
        num_classes = record.class_continuations.bincount(minlength=len(record.end_classes))
        can_differ = num_classes - (~torch.tensor(_can_end(record))).long() > 1  # a single class has probability 1
        here = (
            can_differ & (record.continuing_positions == teacher_position)
            if teacher_is_coarse
            else can_differ[:size] & (record.starting_positions == teacher_position)
        )
        others = record.starting_positions if teacher_is_coarse else record.continuing_positions[:size]
        if teacher_is_coarse:  # the token before may go on
            is_before = record.before.positions == teacher_position
            positions += others[
                record.before.continuations[is_before & can_differ[record.before.continuations]]
            ].tolist()
        positions += others[here[:size]].tolist()
        if teacher_is_coarse and case.aligner.teacher_is_coarser:  # pairs at which this continuation ends
            positions += alignment.student_positions[
                torch.isin(alignment.token_end, here.nonzero().squeeze(1))
            ].tolist()
    return set(positions)


def _continuation_positions(case) -> set[int]:
    """Student positions of a continuation, or of a pair at which one ends."""
    alignment = case.batch.alignment
    return {
        *alignment.teacher_continuations.starting_positions.tolist(),
        *alignment.student_continuations.continuing_positions.tolist(),
        *alignment.student_positions[alignment.token_end >= 0].tolist(),
    }


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("alignment", ["projection", "strict", "alm"])
def test_a_teacher_position_changes_only_the_gradients_that_depend_on_it(make_case, name, alignment):
    case, settings = make_case(name), {"temperature": 2.0}
    _, before = _distill(case, alignment, **settings)
    teacher, found = case.outputs.teacher_logits, []
    for position in case.batch.teacher.positions[::8].tolist():
        original = teacher[position].clone()
        teacher[position] = original.roll(1)
        changed = _changed(before, _distill(case, alignment, **settings)[1])
        found.append((changed, _affected(case, alignment, position)))
        teacher[position] = original
    assert [changed for changed, _ in found] == [expected for _, expected in found]
    assert sum(bool(expected) for _, expected in found) > 3


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("alignment", ["projection", "strict", "alm"])
def test_a_student_position_changes_only_the_gradients_that_depend_on_it(make_case, name, alignment):
    case, chunks = make_case(name), make_case(name).batch.alignment.student_chunks
    before_terms, before = _distill(case, alignment)
    student = case.outputs.student_logits
    for position in range(0, len(student), 9):
        original = student[position].clone()
        student[position] = original.roll(1)
        changed = _changed(before, _distill(case, alignment)[1])
        student[position] = original
        affected = {position}.union(*(pair for pair in _pairs_with_paths(case) if position in pair))
        if alignment == "alm":
            chunk = chunks[position]
            affected = set((chunks == chunk).nonzero().squeeze(1).tolist()) if chunk >= 0 else set()
        assert changed <= affected
        assert changed or not before[position].any()
    assert before_terms.loss > 0


# A token that the teacher lacks is not lowered for it


def _only_the_student_has(case) -> list[int]:
    """Student tokens of several bytes that the teacher's vocabulary lacks."""
    student, teacher = (table.pieces for table in case.aligner.pair.tables)
    return [u for u, piece in enumerate(student) if len(piece) > 1 and piece not in set(teacher)]


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize(("direction", "top_k"), [("forward", 0), ("reverse", 8), ("jsd", 8)])
def test_strict_gives_no_gradient_to_a_token_that_only_the_student_has(make_case, name, direction, top_k):
    case = make_case(name)
    lacking = _only_the_student_has(case)
    case.outputs.student_logits[:, lacking[7]] += 9.0  # the student's most likely token everywhere
    _, grad = _distill(case, "strict", temperature=2.0, kd_direction=direction, teacher_top_k=top_k)
    assert len(lacking) > 20
    assert torch.equal((case.outputs.student_logits - 0.1 * grad)[:, lacking], case.outputs.student_logits[:, lacking])
    assert grad.abs().max() > 0.01


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("top_k", [0, 8])
def test_the_gradient_of_strict_is_zero_outside_its_support_and_sums_to_zero_inside(make_case, name, top_k):
    case = make_case(name)
    _, grad = _distill(case, "strict", teacher_top_k=top_k)
    alignment, partners = case.batch.alignment, _partners(case)
    support = torch.zeros_like(grad, dtype=torch.bool)
    for k, r, strict in zip(
        alignment.student_positions, alignment.teacher_positions, alignment.strict.tolist(), strict=True
    ):
        top = _top_mask(case.outputs.teacher_logits[r], top_k).nonzero().squeeze(1).tolist()
        support[k, [partners[v] for v in top if strict and v in partners]] = True
    assert torch.equal(grad[~support], torch.zeros(int((~support).sum())))
    assert grad.sum(1).abs().max() < 1e-5


@EVERY_PAIR_OF_TWO
def test_the_projection_lowers_a_token_only_where_its_class_is_less_likely_to_the_teacher(make_case, name):
    case = make_case(name)
    lacking, classes, alignment = _only_the_student_has(case), case.aligner.shared_classes, case.batch.alignment
    class_of = dict(zip(classes.student_tokens.tolist(), classes.student_classes.tolist(), strict=True))
    _, grad = _distill(case, "projection")
    with_class = [u for u in lacking if u in class_of]
    assert len(with_class) > 20
    inside = _continuation_positions(case)
    raised = lowered = 0
    for k, r in zip(alignment.student_positions.tolist(), alignment.teacher_positions.tolist(), strict=True):
        if k in inside:
            continue
        own, other = case.outputs.student_logits[k].double().exp(), case.outputs.teacher_logits[r].double().exp()
        p = _sums(own, classes.student_tokens, classes.student_classes, classes.num_classes)
        t = _sums(other, classes.teacher_tokens, classes.teacher_classes, classes.num_classes)
        excess = (p / p.sum() - t / t.sum())[[class_of[u] for u in with_class]]
        share = own[with_class] / p[[class_of[u] for u in with_class]]
        torch.testing.assert_close(grad[k, with_class].double(), share * excess, rtol=1e-3, atol=1e-6)
        raised += int((excess < 0).sum())
        lowered += int((excess > 0).sum())
        assert not grad[k, [u for u in lacking if u not in class_of]].any()
    assert min(raised, lowered) > 100


@EVERY_PAIR
def test_the_projection_does_not_lower_a_likely_token_whose_class_is_likelier_to_the_teacher(make_case, name):
    case = make_case(name)
    classes, alignment = case.aligner.shared_classes, case.batch.alignment
    class_of = dict(zip(classes.student_tokens.tolist(), classes.student_classes.tolist(), strict=True))
    likely = [u for u in _only_the_student_has(case) if u in class_of][5]
    members = classes.teacher_tokens[classes.teacher_classes == class_of[likely]]
    case.outputs.student_logits[:, likely] = 8.0
    case.outputs.teacher_logits[:, members[0]] = 20.0
    _, grad = _distill(case, "projection")
    positions = sorted(set(alignment.student_positions.tolist()) - _continuation_positions(case))
    assert len(positions) > 5
    after = case.outputs.student_logits - 0.1 * grad
    assert (after[positions, likely] >= case.outputs.student_logits[positions, likely]).all()
    assert (grad[positions] != 0).any(1).all()


def test_strict_skips_a_position_whose_shared_tokens_hold_little_of_the_teachers_mass(make_case):
    case = make_case("sp_from_byte")
    alignment = case.batch.alignment
    pair = alignment.strict.nonzero()[4].item()
    (unmapped,) = (case.aligner.same_token < 0).nonzero(as_tuple=True)
    logits, lacking = case.outputs.teacher_logits[alignment.teacher_positions[pair]], unmapped[0]
    logits[unmapped] = -1e4
    _, before = _distill(case, "strict")
    for share, counts in ((0.85, True), (0.95, False)):
        logits[lacking] = -math.inf
        logits[lacking] = logits.logsumexp(0) + math.log(share / (1 - share))
        _, after = _distill(case, "strict")
        assert after[alignment.student_positions[pair]].any() == counts
    assert before[alignment.student_positions[pair]].any()


# float16, and logits that are not finite


@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["token", "projection"])
def test_logits_of_ten_thousand_keep_three_digits_of_the_gradient(make_case, alignment, direction):
    """The log of a sum is lost beside them: a rounding of 5e-4, times a divergence of 2e4 nats."""
    case = make_case("byte_from_byte")
    for logits in (case.outputs.student_logits, case.outputs.teacher_logits):
        logits.copy_(torch.where(logits > 0, 1e4, -1e4) + 0.5 * logits)
    terms, grad = _distill(case, alignment, kd_direction=direction)
    leaf = case.outputs.student_logits.double().requires_grad_()
    log_p = leaf.log_softmax(-1)
    log_t = case.outputs.teacher_logits[case.batch.teacher.positions].double().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_t) - math.log(2.0)
    pairs = {"forward": [(log_t, log_p)], "reverse": [(log_p, log_t)], "jsd": [(log_t, log_m), (log_p, log_m)]}
    expected = sum((a.exp() * (a - b)).sum() for a, b in pairs[direction]) / len(pairs[direction])
    expected.backward()
    torch.testing.assert_close(terms.loss.double(), expected.detach(), rtol=1e-3, atol=0.0)
    assert (grad - leaf.grad).norm() < 5e-3 * leaf.grad.norm()


@EVERY_METHOD_AND_DIRECTION
@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_dummy"])
def test_the_largest_float16_logits_give_finite_losses_and_gradients(make_case, alignment, direction, top_k, name):
    case = make_case(name, spread=1.0)
    outputs = {key: (3e4 * value).clamp(-6e4, 6e4).half() for key, value in vars(case.outputs).items()}
    case.outputs = DenseOutputs(**outputs)
    for temperature in (0.5, 2.0):
        settings = {"temperature": temperature, "kd_direction": direction, "teacher_top_k": top_k}
        terms, grad = _distill(case, alignment, **settings)
        assert terms.loss.dtype is torch.float32
        assert terms.loss.isfinite()
        assert terms.unclamped.isfinite()
        assert terms.dropped == 0
        assert grad.dtype is torch.float16
        assert grad.isfinite().all()
        assert grad.any() or direction != "forward"  # the others give a certain student no gradient


def _teacher_positions(case, method) -> Tensor:
    """The teacher positions that a method uses, each as often as it does."""
    alignment = case.batch.alignment
    return {
        "projection": lambda: torch.cat(
            [
                alignment.teacher_positions,
                alignment.teacher_continuations.continuing_positions[
                    : len(alignment.teacher_continuations.starting_positions)
                ],
                alignment.student_continuations.starting_positions,
            ]
        ),
        "alm": lambda: case.batch.teacher.positions,
        "hidden": lambda: alignment.teacher_ends,
    }.get(method, lambda: alignment.teacher_positions)()


@EVERY_METHOD
@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_dummy"])
@pytest.mark.parametrize("style", ["off", "raw"])
def test_nonfinite_teacher_positions_are_counted_and_add_nothing(make_case, alignment, name, style):
    case = make_case(name)
    settings = {"temperature": 2.0, "kd_direction": "jsd", "logit_clamp_style": style, "logit_clamp": 30.0}
    whole, whole_grad = _distill(case, alignment, **settings)
    bad = case.batch.teacher.positions[2::7]
    outputs = case.outputs.teacher_states if alignment == "hidden" else case.outputs.teacher_logits
    outputs[bad, torch.arange(len(bad)) % 5] = torch.tensor([math.inf, math.nan]).repeat(99)[: len(bad)]
    outputs[bad[0]] = -math.inf
    terms, grad = _distill(case, alignment, **settings)
    assert terms.dropped == torch.isin(_teacher_positions(case, alignment), bad).sum() > 3
    assert 0 < terms.loss < whole.loss
    assert grad.isfinite().all()
    dropped = (whole_grad != 0).any(1) & (grad == 0).all(1)
    naive = {
        "projection": lambda z: _naive_projected(case, z, 2.0, direction="jsd"),
        "strict": lambda z: _naive_strict(case, z, 2.0, direction="jsd"),
        "alm": lambda z: _naive_alm(case, z),
    }
    if alignment in naive:
        _assert_matches(case, alignment, naive[alignment], **settings)
    else:
        others = ~dropped & (whole_grad != 0).any(1)
        assert torch.equal(grad[others], whole_grad[others])
        assert dropped.sum() == terms.dropped


@EVERY_DIRECTION
def test_a_pair_is_left_out_where_the_teachers_end_of_token_is_not_finite(make_case, direction):
    case = make_case("sp_from_byte")
    alignment = case.batch.alignment
    pair = int((alignment.token_end >= 0).nonzero()[3])
    position = alignment.student_positions[pair]
    before = alignment.teacher_continuations.continuing_positions[alignment.token_end[pair]]
    whole, whole_grad = _distill(case, "projection", kd_direction=direction)
    case.outputs.teacher_logits[before, 0] = math.nan
    terms, grad = _distill(case, "projection", kd_direction=direction)
    assert whole_grad[position].any()
    assert not grad[position].any()
    assert 0 < terms.loss < whole.loss
    # Only positions that are not finite themselves are counted, and the pair's own position is finite.
    assert alignment.teacher_positions[pair] != before
    assert terms.dropped == (_teacher_positions(case, "projection") == before).sum() > 0


@EVERY_METHOD
def test_a_teacher_that_is_nowhere_finite_gives_no_loss(make_case, alignment):
    case = make_case("sp_from_byte")
    case.outputs.teacher_logits[:, 3] = case.outputs.teacher_states[:, 3] = math.nan
    terms, grad = _distill(case, alignment)
    assert terms.loss == terms.unclamped == 0.0
    assert not grad.any()
    assert terms.dropped == len(_teacher_positions(case, alignment))


def _without(case, *parts: str):
    """The case in which these parts of the alignment are empty."""
    alignment = case.batch.alignment
    none = {}
    for side in ("teacher_continuations", "student_continuations"):
        arrays = {k: v[..., :0] for k, v in vars(getattr(alignment, side)).items() if isinstance(v, Tensor)}
        no_before = TokensBefore(*[v[..., :0] for v in vars(alignment.teacher_continuations.before).values()])
        none[side] = Continuations(**arrays, num_inside_classes=0, before=no_before)
    no_ends = {
        "token_end": torch.full_like(alignment.token_end, -1),
        "continuation_paths": alignment.continuation_paths[:, :0],
    }
    of_pairs = ("student_positions", "teacher_positions", "strict", "token_end")
    empty = {
        "student_continuations": {"student_continuations": none["student_continuations"]},
        "teacher_continuations": {"teacher_continuations": none["teacher_continuations"], **no_ends},
        "continuations": {**none, **no_ends},
        "pairs": {**no_ends, **{name: getattr(alignment, name)[:0] for name in of_pairs}},
        "chunks": {
            "student_chunks": torch.full_like(alignment.student_chunks, -1),
            "teacher_chunks": torch.full_like(alignment.teacher_chunks, -1),
            "num_chunks": 0,
            "student_ends": alignment.student_ends[:0],
            "teacher_ends": alignment.teacher_ends[:0],
        },
    }
    # "pairs" comes after the continuations, because without pairs there is no token end either.
    changes = {key: value for name in empty if name in parts for key, value in empty[name].items()}
    batch = _with_alignment(case, dataclasses.replace(alignment, **changes))
    return SimpleNamespace(**{**vars(case), "batch": batch})


@EVERY_METHOD_AND_DIRECTION
def test_an_empty_alignment_gives_no_loss(make_case, alignment, direction, top_k):
    case = _without(make_case("sp_from_byte"), "continuations", "pairs", "chunks")
    terms, grad = _distill(case, alignment, kd_direction=direction, teacher_top_k=top_k)
    assert terms.loss == terms.unclamped == terms.dropped == 0
    assert not grad.any()


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("missing", ["pairs", "continuations"])
def test_the_projection_without_pairs_is_that_of_continuations_and_vice_versa(make_case, missing, name):
    part = _without(make_case(name), missing)
    _assert_matches(part, "projection", lambda z: _naive_projected(part, z, direction="forward"))


# A teacher truncated to its top k


@EVERY_PAIR_OF_TWO
@EVERY_DIRECTION
@pytest.mark.parametrize("top_k", [1, 50])
def test_the_projection_of_a_truncated_teacher_has_losses_and_gradients_of_the_usual_size(
    make_case, name, direction, top_k
):
    case, settings = make_case(name), {"kd_direction": direction, "temperature": 2.0}
    _, whole = _distill(case, "projection", **settings)
    terms, grad = _distill(case, "projection", **settings, teacher_top_k=top_k)
    assert 0 <= terms.loss < 50 * case.batch.num_target_tokens
    assert grad.abs().max() < 20 * whole.abs().max()


@EVERY_DIRECTION
@pytest.mark.parametrize(
    ("name", "top_k"),
    [("sp_from_byte", 2), ("sp_from_byte", 8), ("byte_from_sp", 2), ("byte_from_sp", 8), ("byte_from_dummy", 50)],
)
def test_the_projection_of_a_truncated_teacher_matches_its_definition(make_case, name, direction, top_k):
    case, settings = make_case(name), {"kd_direction": direction, "temperature": 2.0, "teacher_top_k": top_k}
    _assert_matches(
        case, "projection", lambda z: _naive_projected(case, z, 2.0, top_k=top_k, direction=direction), **settings
    )


@EVERY_DIRECTION
@pytest.mark.parametrize("cached", [False, True])
def test_a_token_that_ended_outside_the_top_k_while_longer_ones_are_in_it_is_as_likely_as_the_tail_lets_it(
    make_case, direction, cached
):
    """Else it would be impossible, with every class behind it, and the reverse KL without a bound."""
    case, k = make_case("sp_from_byte"), 4
    record, num_ended = case.batch.alignment.teacher_continuations, 0
    for i, position in enumerate(record.continuing_positions.tolist()):
        continuation, tokens, classes = record.continuing_entries
        own = continuation == i
        ends, longer = (
            tokens[own & (classes == record.end_classes[i])],
            tokens[own & (classes != record.end_classes[i])],
        )
        if i >= record.num_inside:
            case.outputs.teacher_logits[position, ends] = -9.0
            case.outputs.teacher_logits[position, longer] += 14.0
            num_ended += len(longer) > 0
    assert num_ended > 10
    settings = {"temperature": 2.0, "kd_direction": direction, "teacher_top_k": k}
    terms, grad = (
        _distill_from_cache(case, "projection", 32, **settings) if cached else _distill(case, "projection", **settings)
    )
    leaf = case.outputs.student_logits.double().requires_grad_()
    expected = _naive_projected(case, leaf, 2.0, top_k=k, direction=direction)
    expected.backward()
    assert 0.1 < expected < 30 * case.batch.num_target_tokens
    torch.testing.assert_close(terms.loss.double(), expected.detach(), rtol=1e-3 if cached else 1e-5, atol=1e-5)
    assert (grad - leaf.grad).norm() < (1e-3 if cached else 1e-5) * leaf.grad.norm()


@EVERY_PAIR_OF_TWO
@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["projection", "token"])
def test_a_truncated_teacher_is_never_further_from_the_student(make_case, name, direction, alignment):
    """Merging classes can only lower a divergence; the fewer are merged, the closer it is."""
    case = make_case(name if alignment == "projection" else "byte_from_byte")
    case = case if alignment == "token" else _without(case, "continuations")
    found = [_distill(case, alignment, kd_direction=direction, teacher_top_k=k)[0].loss for k in (1, 4, 32, 256, 0)]
    assert found[0] > 0.0
    if alignment == "token":
        assert all(a <= b + 1e-3 for a, b in itertools.pairwise(found))


@EVERY_DIRECTION
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("sp_from_byte", "teacher_continuations"), ("byte_from_sp", "teacher_continuations"), ("byte_from_sp", "pairs"),
        ("byte_from_sp", "student_continuations"),
    ],
)  # fmt: skip
def test_a_position_without_a_known_class_in_the_teachers_top_k_gives_no_loss(make_case, name, part, direction):
    case = make_case(name)
    case = _without(case, *({"teacher_continuations", "student_continuations", "pairs"} - {part}))
    record = getattr(case.batch.alignment, part, None)
    known = {
        "teacher_continuations": lambda: record.continuing_entries[1],
        "student_continuations": lambda: record.starting_entries[1],
        "pairs": lambda: case.aligner.shared_classes.teacher_tokens,
    }[part]()
    unknown = next(v for v in range(case.outputs.teacher_logits.shape[1]) if v not in known)
    case.outputs.teacher_logits[:, unknown] = 50.0
    _, whole_grad = _distill(case, "projection", kd_direction="jsd")
    if part == "student_continuations":  # any other token counts for the end of the student's token, where it can end
        assert not record.can_end.all()
        case.outputs.teacher_logits[record.starting_positions[record.can_end]] = math.nan
    terms, grad = _distill(case, "projection", kd_direction=direction, teacher_top_k=1)
    assert whole_grad.any()
    assert abs(terms.loss) == abs(terms.unclamped) < 1e-6
    assert grad.abs().max() < 1e-6


@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["projection", "strict", "uld"])
@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_sp"])
def test_a_top_k_of_the_whole_vocabulary_changes_nothing(make_case, alignment, direction, name):
    case = make_case(name)
    size = case.outputs.teacher_logits.shape[1]
    whole, grad = _distill(case, alignment, kd_direction=direction)
    for top_k in (size, 10 * size):
        truncated, truncated_grad = _distill(case, alignment, kd_direction=direction, teacher_top_k=top_k)
        torch.testing.assert_close(truncated.loss, whole.loss)
        torch.testing.assert_close(truncated_grad, grad, rtol=1e-4, atol=1e-6)


@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["projection", "strict", "token"])
def test_with_equal_tokenizers_the_tail_moves_all_other_tokens_alike(make_case, alignment, direction):
    """In proportion to the student's probabilities; strict has no tail and gives them no gradient."""
    case = make_case("byte_from_byte")
    _, grad = _distill(case, alignment, kd_direction=direction, teacher_top_k=3)
    top = case.outputs.teacher_logits[case.batch.teacher.positions].topk(3).indices
    top = torch.zeros_like(grad, dtype=torch.bool).scatter_(1, top, True)
    assert (grad[top] != 0).float().mean() > 0.99
    if alignment == "strict":
        assert not grad[~top].any()
        return
    ratio = (grad / case.outputs.student_logits.softmax(-1)).masked_fill(top | (grad == 0), math.nan)
    median = ratio.nanmedian(1, keepdim=True).values
    assert ((ratio - median).abs() <= 1e-3 * median.abs() + 1e-4)[~ratio.isnan()].all()


# Cached logits


def _cached(case, k: int, temperature: float) -> CachedTopK:
    """The case's teacher as a cache holds it, computed in float64."""
    tokens, logits = case.batch.teacher, case.outputs.teacher_logits.double()
    log_probs = logits[tokens.positions].log_softmax(-1)
    top = log_probs.topk(k)
    record_index = torch.zeros(len(logits), dtype=torch.int64)
    record_index[tokens.positions] = torch.arange(len(tokens.positions))
    largest = top.values[:, :1]
    others = log_probs.scatter(1, top.indices, -math.inf)
    tail_log_ratios = (others / temperature).logsumexp(1) - (top.values / temperature).logsumexp(1)
    return CachedTopK(
        record_index=record_index,
        ids=top.indices.int(),
        max_log_probs=largest[:, 0].float(),
        log_prob_gaps=(top.values - largest).half(),
        target_log_probs=log_probs.gather(1, tokens.targets[:, None])[:, 0].float(),
        tail_log_ratios=tail_log_ratios.half(),
        temperature=temperature,
    )


def _distill_from_cache(case, alignment, k, **settings):
    method, logits = _build(case, alignment, **settings), case.outputs.student_logits.clone().requires_grad_()
    terms = method(case.batch, ForwardOutputs(lazy_logits(logits), _cached(case, k, method.temperature)))
    terms.loss.backward()
    return terms, logits.grad


CACHED = {
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
def test_cached_logits_match_the_definition_to_1e_3(make_case, name, alignment, direction, temperature):
    case, settings = make_case(name), {"temperature": temperature, "kd_direction": direction, "teacher_top_k": 8}
    terms, grad = _distill_from_cache(case, alignment, 32, **settings)
    leaf = case.outputs.student_logits.double().requires_grad_()
    expected = CACHED[alignment](case, leaf, temperature, top_k=8, direction=direction)
    expected.backward()
    assert expected > 0.1
    torch.testing.assert_close(terms.loss.double(), expected.detach(), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(terms.unclamped.double(), expected.detach(), rtol=1e-3, atol=0.0)
    assert (grad - leaf.grad).norm() < 1e-3 * leaf.grad.norm()


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize(("alignment", "k"), [("alm", 1), ("uld", 8)])
def test_cached_logits_serve_the_methods_that_compare_no_tokens(make_case, name, alignment, k):
    case, settings = make_case(name), {"temperature": 2.0, "teacher_top_k": k}
    live, live_grad = _distill(case, alignment, **settings)
    terms, grad = _distill_from_cache(case, alignment, k, **settings)
    assert live.loss > 0.1
    torch.testing.assert_close(terms.loss, live.loss, rtol=1e-3, atol=0.0)
    assert (grad - live_grad).norm() < 1e-3 * live_grad.norm()


@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("alignment", ["projection", "strict", "alm", "uld"])
def test_a_cached_position_that_is_not_finite_is_dropped_and_counted(make_case, name, alignment):
    case, settings = make_case(name), {"temperature": 2.0, "teacher_top_k": 8}
    bad = case.batch.alignment.teacher_positions[::3]
    case.outputs.teacher_logits[bad, 5] = math.nan
    live, live_grad = _distill(case, alignment, **settings)
    terms, grad = _distill_from_cache(case, alignment, 8, **settings)
    assert terms.dropped == live.dropped > 0
    torch.testing.assert_close(terms.loss, live.loss, rtol=1e-3, atol=0.0)
    assert (grad - live_grad).norm() < 1e-3 * live_grad.norm()


@EVERY_DIRECTION
def test_the_floor_of_the_normalized_clamp_holds_for_cached_logits_too(make_case, direction):
    case = make_case("sp_from_byte", spread=8.0)
    settings = {"temperature": 2.0, "kd_direction": direction, "teacher_top_k": 8, "logit_clamp": 2.0}
    unclamped, _ = _distill_from_cache(case, "projection", 8, **settings)
    terms, grad = _distill_from_cache(case, "projection", 8, **settings, logit_clamp_style="normalized")
    live, live_grad = _distill(case, "projection", **settings, logit_clamp_style="normalized")
    assert abs(terms.loss - unclamped.loss) > 0.01
    torch.testing.assert_close(terms.loss, live.loss, rtol=1e-3, atol=0.0)
    assert (grad - live_grad).norm() < 1e-3 * live_grad.norm()


# The clamps


@EVERY_PAIR_OF_TWO
@EVERY_DIRECTION
@pytest.mark.parametrize("alignment", ["projection", "strict"])
def test_the_normalized_clamp_floors_the_value_and_leaves_the_gradient(make_case, name, direction, alignment):
    case, naive = make_case(name, spread=8.0), _naive_projected if alignment == "projection" else _naive_strict
    settings = {"temperature": 2.0, "kd_direction": direction, "logit_clamp": 2.0}
    unclamped, unclamped_grad = _distill(case, alignment, **settings)
    floored, grad = _distill(case, alignment, **settings, logit_clamp_style="normalized")
    expected = naive(case, case.outputs.student_logits.double(), 2.0, direction=direction, floor=-4.0)
    torch.testing.assert_close(floored.loss.double(), expected, rtol=1e-5, atol=1e-4)
    assert abs(floored.loss - unclamped.loss) > 0.1
    assert torch.equal(floored.unclamped, unclamped.unclamped)
    assert torch.equal(grad, unclamped_grad)


@EVERY_PAIR_OF_TWO
def test_the_normalized_clamp_floors_the_students_log_probability_of_each_token_of_a_chunk(make_case, name):
    case, settings = make_case(name, spread=6.0), {"logit_clamp": 5.0}
    unclamped, _ = _distill(case, "alm", **settings)
    floored, grad = _distill(case, "alm", **settings, logit_clamp_style="normalized")
    expected = _naive_alm(case, case.outputs.student_logits.double(), floor=-10.0)
    torch.testing.assert_close(floored.loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert abs(floored.loss - unclamped.loss) > 0.1
    assert torch.equal(floored.unclamped, unclamped.unclamped)
    assert grad.isfinite().all()
    assert (grad != 0).any(1).all()


@pytest.mark.parametrize(
    ("alignment", "direction", "top_k"),
    [(method, d, 8) for method in ("projection", "token") for d in ("forward", "reverse", "jsd")]
    + [("projection", "forward", 0), ("strict", "forward", 8), ("alm", "forward", 0), ("uld", "forward", 0)],
)
def test_the_raw_clamp_is_the_loss_of_both_models_clamped_logits(make_case, alignment, direction, top_k):
    case = make_case("byte_from_byte" if alignment == "token" else "sp_from_byte", spread=4.0)
    settings = {"temperature": 2.0, "kd_direction": direction, "teacher_top_k": top_k, "logit_clamp": 10.0}
    terms, grad = _distill(case, alignment, **settings, logit_clamp_style="raw")
    student, teacher = (x.clamp(-10.0, 10.0) for x in (case.outputs.student_logits, case.outputs.teacher_logits))
    clamped = SimpleNamespace(
        **{**vars(case), "outputs": DenseOutputs(student, teacher, *[case.outputs.student_states] * 2)}
    )
    expected, expected_grad = _distill(clamped, alignment, **settings)
    outside = case.outputs.student_logits.abs() > 10.0
    unclamped, _ = _distill(case, alignment, **settings)
    torch.testing.assert_close(terms.loss, expected.loss)
    torch.testing.assert_close(terms.unclamped, unclamped.unclamped)
    torch.testing.assert_close(grad, expected_grad.masked_fill(outside, 0.0))
    assert abs(unclamped.unclamped - expected.unclamped) > 1e-3
    assert outside.any()
    assert expected.loss > 0.1


# Properties of single methods


@EVERY_PAIR_OF_TWO
@EVERY_METHOD_AND_DIRECTION
def test_no_loss_is_ever_negative(make_case, name, direction, alignment, top_k):
    for seed in range(2):
        case = make_case(name, seed=seed, spread=8.0 * seed + 0.1)
        settings = {"kd_direction": direction, "teacher_top_k": top_k, "temperature": 1.5}
        assert _distill(case, alignment, **settings)[0].loss >= -1e-4


def test_a_student_equal_to_its_teacher_has_no_loss(make_case):
    for alignment in [*METHODS, "token"]:
        case = make_case("byte_from_byte")
        case.outputs.student_logits.copy_(case.outputs.teacher_logits[case.batch.teacher.positions])
        terms, grad = _distill(case, alignment, temperature=2.0)
        assert abs(terms.loss) < 1e-4
        assert grad.abs().max() < 1e-5


def test_the_temperature_keeps_the_size_of_the_gradient(make_case):
    case = make_case("byte_from_byte", spread=0.01)
    norms = [_distill(case, "projection", temperature=t, kd_direction="reverse")[1].norm() for t in (1.0, 2.0, 4.0)]
    torch.testing.assert_close(norms[1] / norms[0], torch.tensor(1.0), rtol=0.05, atol=0.0)
    torch.testing.assert_close(norms[2] / norms[0], torch.tensor(1.0), rtol=0.05, atol=0.0)


def test_jsd_beta_reaches_the_divergence(make_case):
    case = make_case("sp_from_byte")
    _assert_matches(
        case,
        "projection",
        lambda z: _naive_projected(case, z, direction="jsd", beta=0.1),
        kd_direction="jsd",
        jsd_beta=0.1,
    )


def test_hidden_states_ignore_logits(make_case):
    case = make_case("sp_from_byte")
    first = _distill(case, "hidden")[0].loss
    case.outputs.student_logits.mul_(3.0)
    assert torch.equal(_distill(case, "hidden")[0].loss, first)


# Which method is built


@pytest.mark.parametrize(
    ("alignment", "name", "method"),
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
def test_the_option_names_the_method(datasets, make_student, alignment, name, method):
    student, teacher = make_student(64, hidden_size=16, num_hidden_layers=1), make_student(64, num_hidden_layers=1)
    built = build_distillation(LossConfig(alignment=alignment), datasets[name].aligner, student, teacher)
    assert type(built) is method
    assert [tuple(p.shape) for p in built.parameters()] == ([(32, 16)] if method is HiddenStates else [])


def test_auto_takes_the_token_level_method_for_equal_tokenizers(datasets, make_student, byte_tokenizer, corpus_texts):
    dataset = _dataset([Document("0", corpus_texts[0])], byte_tokenizer, byte_tokenizer, aligns=False)
    student = make_student(64, num_hidden_layers=1)
    assert type(build_distillation(LossConfig(), dataset.aligner, student, student)) is TokenLevel


@pytest.mark.parametrize("name", ["sp_from_byte", "byte_from_byte"])
def test_only_different_tokenizers_have_continuations(make_case, datasets, name):
    case = make_case(name)
    alignment = case.batch.alignment
    counts = [len(record.end_classes) for record in (alignment.teacher_continuations, alignment.student_continuations)]
    assert counts == [0, 0] if datasets[name].pair.equal else min(counts) > 1


# Masked tokens


def _mask_tokens(case, sides: str) -> None:
    """Give -inf to tokens that are not in the text, in both models those of the same bytes; more at some positions.

    Where one model alone masks them, at every second position, because most divergences there are infinite.
    """
    generator = torch.Generator().manual_seed(7)
    logits = {"student": case.outputs.student_logits, "teacher": case.outputs.teacher_logits}
    pieces = {side: _pieces(case, side) for side in logits}
    in_text = {
        pieces[side][v] for side in logits for v in getattr(case.batch, side).targets.tolist()
    }  # of either tokenizer
    others = sorted({piece for each in pieces.values() for piece in each} - in_text)
    chosen = {others[i] for i in torch.randperm(len(others), generator=generator)[: len(others) // 5].tolist()}
    for side in sides.split():
        masked = torch.tensor([v for v, piece in enumerate(pieces[side]) if piece in chosen])
        assert len(masked) > 3
        rows = torch.arange(0, len(logits[side]), 1 if " " in sides else 2)
        logits[side][rows[:, None], masked] = -math.inf
    logits[side][3::5, torch.randint(logits[side].shape[1], (2,), generator=generator)] = -math.inf


def _pieces(case, side: str) -> list[bytes]:
    """The bytes of each token; of equal tokenizers its id, as bytes."""
    if case.aligner.pair.tables is None:
        return [str(v).encode() for v in range(case.outputs.student_logits.shape[1])]
    return [piece or b"" for piece in case.aligner.pair.tables[side == "teacher"].pieces]


def _masked_case(make_case, name, sides):
    case = make_case(name)
    _mask_tokens(case, sides)
    return case


def _naive_token(case, student, temperature, top_k, **divergence):
    total = student.new_zeros(())
    for z, y in zip(student, case.outputs.teacher_logits[case.batch.teacher.positions].double(), strict=True):
        top = _top_mask(y, top_k)
        sides = [(x / temperature).softmax(-1) for x in (z, y)]
        value = _divergence(*(torch.cat([x[top], x[~top].sum()[None]]) for x in sides), **divergence)
        total = _add_finite(case, total, value)
    return temperature**2 * total


EVERY_MASK = pytest.mark.parametrize("sides", ["teacher", "student", "student teacher"])


@EVERY_MASK
@EVERY_DIRECTION
@pytest.mark.parametrize("top_k", [0, 8])
@pytest.mark.parametrize(
    ("name", "alignment"),
    [("byte_from_byte", "token"), ("byte_from_sp", "strict"), *((name, "projection") for name in DIFFERENT)],
)
def test_masked_tokens_have_probability_0_and_infinite_positions_are_left_out(
    make_case, name, alignment, sides, direction, top_k
):
    case = _masked_case(make_case, name, sides)
    naive = {"token": _naive_token, "strict": _naive_strict, "projection": _naive_projected}[alignment]
    settings = {"temperature": 2.0, "kd_direction": direction, "teacher_top_k": top_k}
    _assert_matches(case, alignment, lambda z: naive(case, z, 2.0, top_k, direction=direction), **settings)
    terms, _ = _distill(case, alignment, **settings)
    assert terms.infinite == terms.dropped == len(case.infinite)


@EVERY_MASK
@EVERY_DIRECTION
@pytest.mark.parametrize(
    ("name", "alignment"), [("byte_from_byte", "token"), ("sp_from_byte", "projection"), ("byte_from_sp", "projection")]
)
def test_masked_tokens_of_a_cached_teacher_have_probability_0(make_case, name, alignment, sides, direction):
    case, settings = _masked_case(make_case, name, sides), {"temperature": 2.0, "kd_direction": direction}
    for k in (8, case.outputs.teacher_logits.shape[1] - 1):  # all but one: masked tokens are among the k
        live, live_grad = _distill(case, alignment, **settings, teacher_top_k=k)
        terms, grad = _distill_from_cache(case, alignment, k, **settings, teacher_top_k=k)
        torch.testing.assert_close(terms.loss, live.loss, rtol=2e-3, atol=0.0)
        assert (grad - live_grad).norm() < 2e-3 * live_grad.norm()
        assert (terms.dropped, terms.infinite) == (live.dropped, live.infinite)


@EVERY_MASK
@EVERY_PAIR_OF_TWO
def test_chunks_that_the_student_alone_masks_are_left_out(make_case, name, sides):
    """The text's own tokens are masked here."""
    case = make_case(name)
    for side in sides.split():
        tokens, logits = getattr(case.batch, side), getattr(case.outputs, f"{side}_logits")
        rows = slice(1, None, 3) if side == "student" else tokens.positions[1::3]
        logits[rows, tokens.targets[1::3]] = -math.inf
    _assert_matches(case, "alm", lambda z: _naive_alm(case, z))
    terms, _ = _distill(case, "alm")
    assert len(case.infinite) <= terms.infinite == terms.dropped
    assert bool(case.infinite) == ("student" in sides)


@EVERY_MASK
@EVERY_PAIR_OF_TWO
@pytest.mark.parametrize("alignment", ["uld", "hidden"])
def test_masks_do_not_concern_methods_without_a_ratio_of_probabilities(make_case, name, alignment, sides):
    case = _masked_case(make_case, name, sides)
    terms, grad = _distill(case, alignment, temperature=2.0)
    assert terms.dropped == terms.infinite == 0
    case.outputs.student_logits.clamp_(min=-1e4)  # a probability of 0 as well
    case.outputs.teacher_logits.clamp_(min=-1e4)
    expected, expected_grad = _distill(case, alignment, temperature=2.0)
    assert torch.equal(terms.loss, expected.loss)
    assert torch.equal(grad, expected_grad)


@EVERY_MASK
@EVERY_DIRECTION
@pytest.mark.parametrize(("name", "alignment"), [("byte_from_byte", "token"), ("sp_from_byte", "projection")])
def test_the_floor_holds_for_masked_tokens_at_the_positions_that_stay(make_case, name, alignment, sides, direction):
    case, floor = _masked_case(make_case, name, sides), {"logit_clamp_style": "normalized", "logit_clamp": 2.0}
    settings = {"kd_direction": direction, "temperature": 1.0}
    terms, grad = _distill(case, alignment, **settings, **floor)
    whole, whole_grad = _distill(case, alignment, **settings)
    assert torch.equal(grad, whole_grad)
    assert torch.equal(terms.unclamped, whole.loss)
    assert terms.infinite == whole.infinite
    naive = _naive_token if alignment == "token" else _naive_projected
    expected = naive(case, case.outputs.student_logits.double(), 1.0, 0, direction=direction, floor=-4.0)
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert terms.infinite == len(case.infinite)


@EVERY_MASK
@EVERY_DIRECTION
@pytest.mark.parametrize(("name", "alignment"), [("byte_from_byte", "token"), ("sp_from_byte", "projection")])
def test_a_raw_clamp_takes_a_masked_logit_as_its_bound(make_case, name, alignment, sides, direction):
    case, settings = _masked_case(make_case, name, sides), {"kd_direction": direction, "temperature": 1.0}
    terms, grad = _distill(case, alignment, **settings, logit_clamp_style="raw", logit_clamp=5.0)
    unclamped = _distill(case, alignment, **settings)[0]
    torch.testing.assert_close(terms.unclamped, unclamped.loss)
    assert (terms.infinite, terms.dropped) == (unclamped.infinite, 0)
    is_masked = case.outputs.student_logits == -math.inf
    case.outputs.student_logits.clamp_(-5.0, 5.0)
    case.outputs.teacher_logits.clamp_(-5.0, 5.0)
    expected, expected_grad = _distill(case, alignment, **settings)
    torch.testing.assert_close(terms.loss, expected.loss)
    assert not grad[is_masked].any()
    inside = case.outputs.student_logits.abs() < 5.0
    torch.testing.assert_close(grad[inside], expected_grad[inside])


@EVERY_DIRECTION
@pytest.mark.parametrize(("name", "alignment"), [("byte_from_byte", "token"), ("byte_from_sp", "projection")])
def test_the_teachers_gradient_leaves_infinite_positions_out(make_case, name, alignment, direction):
    case = _masked_case(make_case, name, "student teacher")
    naive = {"token": _naive_token, "projection": _naive_projected}[alignment]
    leaf = case.outputs.teacher_logits.clone().requires_grad_()
    outputs = dataclasses.replace(case.outputs, teacher_logits=leaf)
    terms = _build(case, alignment, temperature=2.0, kd_direction=direction)(case.batch, outputs.outputs())
    terms.loss.backward()
    exact = case.outputs.teacher_logits.double().requires_grad_()
    case.outputs = dataclasses.replace(case.outputs, teacher_logits=exact)
    expected = naive(case, case.outputs.student_logits.double(), 2.0, 0, direction=direction)
    expected.backward()
    torch.testing.assert_close(terms.loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert terms.infinite == len(case.infinite)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("mass", [1e-4, 1e-12, 1e-17, 1e-19, 1e-30, 1e-38, 0.0])
def test_a_probability_below_1e_18_beside_a_mask_counts_as_0(make_case, direction, mass):
    """A float32 weight times a mask of -1e30 would be any number."""
    case = make_case("byte_from_byte")
    first, second = case.outputs.teacher_logits[case.batch.teacher.positions], case.outputs.student_logits
    first, second = (first, second) if direction == "forward" else (second, first)
    second[:, 7] = -math.inf
    first[:, 7] = -math.inf
    without = first.logsumexp(1)
    first[:, 7] = without + (math.log(mass) if mass else -math.inf)
    if direction == "forward":
        case.outputs.teacher_logits[case.batch.teacher.positions] = first
    else:
        case.outputs.teacher_logits[case.batch.teacher.positions] = second
    terms, grad = _distill(case, "token", kd_direction=direction)
    if mass > 1e-18:
        assert terms.infinite == terms.dropped == len(first)
        assert terms.loss == 0.0
        assert not grad.any()
        return
    assert terms.infinite == terms.dropped == 0
    first[:, 7] = -math.inf
    case.outputs.teacher_logits[case.batch.teacher.positions] = first if direction == "forward" else second
    expected, expected_grad = _distill(case, "token", kd_direction=direction)
    torch.testing.assert_close(terms.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad)


@EVERY_MASK
@EVERY_METHOD_AND_DIRECTION
@EVERY_PAIR_OF_TWO
def test_losses_and_gradients_are_finite_whatever_is_masked(make_case, name, alignment, direction, top_k, sides):
    """Half of all logits, and the text's own tokens at every fourth position."""
    case, generator = make_case(name), torch.Generator().manual_seed(3)
    for side in sides.split():
        logits, tokens = getattr(case.outputs, f"{side}_logits"), getattr(case.batch, side)
        logits[torch.rand(logits.shape, generator=generator) < 0.5] = -math.inf
        rows = slice(0, None, 4) if side == "student" else tokens.positions[::4]
        logits[rows, tokens.targets[::4]] = -math.inf
    for style in ("off", "normalized", "raw"):
        settings = {"kd_direction": direction, "teacher_top_k": top_k, "logit_clamp_style": style}
        terms, grad = _distill(case, alignment, temperature=2.0, logit_clamp=5.0, **settings)
        assert all(term.isfinite() for term in terms)
        assert 0 <= terms.unclamped < 1e5
        assert grad.isfinite().all()
