"""One attempted update: what it adds up, what it refuses, what it leaves alone, and how a model is measured."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sar_kd.config.sections import GuardConfig, LossConfig, OptimConfig
from sar_kd.data.batch import CachedTopK
from sar_kd.data.dataset import Dataset, build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.evaluation.perplexity import Evaluation, evaluate
from sar_kd.losses.objective import Objective
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.token_stream import Block
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer, learning_rate_at, parameters_of
from sar_kd.training.step import StepContext, train_step

CPU = torch.device("cpu")
HALF_OR_FLOAT = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
NO_CLAMPS = {"logit_clamp_style": "off", "loss_clamp_style": "off"}
NO_LIMIT = 1e9
EVERY_KIND = pytest.mark.parametrize(
    ("tokenizers", "alignment"),
    [
        ("equal", "auto"), ("different", "auto"), ("coarser", "auto"), ("aligned", "projection"),
        ("different", "strict"), ("different", "alm"), ("different", "uld"), ("coarser", "hidden"),
    ],
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_pairs(byte_tokenizer, sp_tokenizer):
    return {
        "equal": (byte_tokenizer, byte_tokenizer),
        "aligned": (byte_tokenizer, byte_tokenizer, True),
        "different": (sp_tokenizer, byte_tokenizer),
        "coarser": (byte_tokenizer, sp_tokenizer),
    }


@pytest.fixture(scope="module")
def datasets(tokenizer_pairs, corpus_texts):
    documents = [Document(str(number), text) for number, text in enumerate(corpus_texts)]
    return {name: _corpus(documents, *pair) for name, pair in tokenizer_pairs.items()}


def _corpus(documents, student, teacher, aligns=False) -> Dataset:
    pair = TokenizerPair(
        student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher), aligns=aligns
    )
    return build_dataset(documents, pair, 24, 60)


@pytest.fixture
def make_run(datasets, make_student):
    """make_run(dtype, tokenizers, ...): the parts of a step over tiny dense models."""

    def make(dtype=torch.float32, tokenizers="equal", skip=NO_LIMIT, clip=NO_LIMIT, scale=1024.0, **loss):
        dataset = datasets[tokenizers]
        student = make_student(len(dataset.pair.student), num_hidden_layers=1)
        teacher = make_student(len(dataset.pair.teacher), num_hidden_layers=1, hidden_size=16, intermediate_size=32)
        for model in (student, teacher):
            model.lm_head.weight.data.mul_(20.0)  # opinions: a fresh head is all but uniform
        teacher.requires_grad_(False).eval().to(dtype)
        precision = Precision(CPU, dtype, scale)
        settings = LossConfig(**({"alpha_kd": 0.5, "alpha_ce": 0.5} | NO_CLAMPS | loss))
        run = SimpleNamespace(dataset=dataset, student=student, teacher=teacher, precision=precision, clip=clip)
        torch.manual_seed(2)
        run.objective = Objective(teacher, student, settings, dataset.aligner, precision)
        run.optimizer = build_optimizer(student, OptimConfig(student_lr=1e-3), run.objective.parameters())
        run.guard = StepGuard(GuardConfig(skip_grad_norm=skip, skip_rule="fixed"))
        run.step = lambda batches: train_step(
            batches, StepContext(run.objective, run.optimizer, run.guard, run.precision, run.clip)
        )
        run.gradients = []
        run.optimizer.register_step_pre_hook(
            lambda *_: run.gradients.append(
                [p.grad.clone() for p in parameters_of(run.optimizer) if p.grad is not None]
            )
        )
        return run

    return make


def _batches(run, *groups):
    return [run.dataset.batch(list(group)) for group in groups]


def _norm(tensors) -> float:
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm().item()


def _bits(run) -> list[torch.Tensor]:
    """Every weight and every tensor of the optimizer's state, as integers, so that NaN equals NaN."""
    state = [value for slots in run.optimizer.state.values() for value in slots.values()]
    return [tensor.detach().clone().view(torch.int32) for tensor in [*run.student.parameters(), *state]]


def _unchanged(before, after) -> bool:
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _poison(run, block, others=()):
    """Make NaN the embedding of a token that `block` holds and the other blocks do not."""
    own, *rest = (set(run.dataset.batch([i]).student.input_ids[0].tolist()) for i in (block, *others))
    run.student.get_input_embeddings().weight.data[min(own.difference(*rest))] = math.nan


# Accumulation


@EVERY_KIND
def test_accumulation_matches_one_large_batch(make_run, tokenizers, alignment):
    large, small = (make_run(tokenizers=tokenizers, alignment=alignment) for _ in range(2))
    for run in (large, small):
        run.dataset = _ragged(run.dataset)
    one = large.step(_batches(large, range(8)))
    many = small.step(_batches(small, *([block] for block in range(8))))
    assert many.num_target_tokens == one.num_target_tokens
    assert many.loss == pytest.approx(one.loss, rel=1e-6)
    differences = [(a - b).abs().max().item() for a, b in zip(large.gradients[0], small.gradients[0], strict=True)]
    assert max(differences) <= 1e-6 < max(a.abs().max().item() for a in large.gradients[0])


def _ragged(dataset) -> Dataset:
    """The same dataset in which every second block has grown by its neighbour."""
    ragged, blocks = copy.copy(dataset), dataset.blocks
    ragged.blocks = []
    for first in range(0, 12, 3):
        a, b, c = blocks[first : first + 3]
        ragged.blocks += [Block(a.student_start, b.student_end, a.teacher_start, b.teacher_end), c]
    widths = {block.student_end - block.student_start for block in ragged.blocks}
    assert len(ragged.blocks) == 8
    assert len(widths) > 1
    return ragged


def test_a_block_counts_by_its_tokens_not_as_one_of_n(make_run):
    run = make_run(alpha_kd=0.0, alpha_ce=1.0)
    run.dataset = _ragged(run.dataset)
    batches = _batches(run, [0], [1])
    report = run.step(batches)
    run = make_run(alpha_kd=0.0, alpha_ce=1.0)
    nats = [run.objective(batch).ce.item() for batch in batches]
    assert report.ce_loss == pytest.approx(sum(nats) / sum(batch.num_target_tokens for batch in batches), rel=1e-6)


@HALF_OR_FLOAT
def test_a_batch_without_targets_adds_nothing(make_run, dtype, without_targets):
    with_empty, without = make_run(dtype), make_run(dtype)
    (batch,) = _batches(without, [0, 1])
    with_empty.step([without_targets(batch), batch])
    without.step([batch])
    assert all(torch.equal(a, b) for a, b in zip(with_empty.gradients[0], without.gradients[0], strict=True))


# Verdicts


@HALF_OR_FLOAT
def test_a_good_step_changes_the_weights(make_run, dtype):
    run = make_run(dtype)
    before = _bits(run)
    assert run.step(_batches(run, [0, 1])).verdict.applied
    assert not _unchanged(before, _bits(run))


def test_bfloat16_runs_a_step_on_a_cpu(make_run):
    run = make_run(torch.bfloat16)
    report = run.step(_batches(run, [0, 1]))
    assert report.verdict.applied
    assert report.loss_scale == 1.0


@HALF_OR_FLOAT
@pytest.mark.parametrize("bad", [[0, 1, 2], [2, 0, 1]], ids=["first", "last"])
def test_a_nan_micro_batch_leaves_every_bit(make_run, dtype, bad):
    run = make_run(dtype)
    run.step(_batches(run, [3]))
    _poison(run, bad[0], bad[1:])
    before, scale = _bits(run), run.precision.loss_scale.item()
    report = run.step(_batches(run, [0], [1], [2]))
    assert report.verdict.cause == "forward"
    assert {cause: n for cause, n in run.guard.skipped.items() if n} == {"forward": 1}
    assert _unchanged(before, _bits(run))
    assert run.precision.loss_scale.item() == scale


@HALF_OR_FLOAT
def test_a_nan_batch_spoils_no_later_step(make_run, dtype):
    run, clean = make_run(dtype), make_run(dtype)
    _poison(run, 0, [1])
    run.step(_batches(run, [0]))
    run.step(_batches(run, [1]))
    clean.step(_batches(clean, [1]))
    assert all(torch.equal(a, b) for a, b in zip(run.gradients[-1], clean.gradients[-1], strict=True))


def test_masked_tokens_of_a_student_that_is_not_finite_are_not_counted(make_run):
    """In float16 a logit of -inf may be an overflow; such a step has a cause of its own."""
    for is_target, cause in (
        (True, "forward"),
        (False, "teacher"),
    ):  # the teacher masks nothing: forward KL is infinite
        run = make_run()
        (batch,) = _batches(run, [0])
        targets = set(batch.student.targets.tolist())
        token = torch.tensor([next(i for i in range(3, 99) if (i in targets) == is_target)])
        run.student.lm_head.register_forward_hook(
            lambda module, inputs, output, token=token: output.index_fill(-1, token, -math.inf)
        )
        report = run.step([batch])
        assert report.verdict.cause == cause
        found = report.teacher_rows_infinite, report.teacher_rows_dropped
        assert found == ((0, 0) if is_target else (report.teacher_positions,) * 2)


@pytest.mark.parametrize(("top_k", "some"), [(2, True), (1 << 20, False)])
def test_positions_of_which_a_cut_teacher_tells_too_little_are_counted(make_run, top_k, some):
    run = make_run(tokenizers="different", teacher_top_k=top_k)
    batches = _batches(run, [0, 1])
    wanted = sum(int(run.objective(batch).unshared_positions) for batch in batches)
    report = run.step(batches)
    assert report.teacher_rows_unshared == wanted
    assert (0 < wanted < report.teacher_positions) is some
    assert report.teacher_rows_dropped == 0


def test_an_overflow_is_calibrated_away_without_touching_a_weight(make_run):
    run = make_run(torch.float16, scale=2.0**24)
    before = _bits(run)
    report = run.step(_batches(run, [0]))
    assert (report.verdict.cause, report.loss_scale) == ("overflow", 2.0**24)
    assert _unchanged(before, _bits(run))
    reports = [run.step(_batches(run, [0])) for _ in range(16)]
    assert reports[0].loss_scale == 2.0**23
    assert reports[-1].verdict.applied


@HALF_OR_FLOAT
def test_a_norm_above_the_limit_is_skipped_with_the_state_untouched(make_run, dtype):
    run = make_run(dtype)
    norm = run.step(_batches(run, [0])).grad_norm
    run.guard.settings = dataclasses.replace(run.guard.settings, skip_grad_norm=norm / 100)
    before = _bits(run)
    report = run.step(_batches(run, [0]))
    assert report.verdict.cause == "norm"
    assert _unchanged(before, _bits(run))


@HALF_OR_FLOAT
@pytest.mark.parametrize("skip", [1e-6, NO_LIMIT], ids=["skipped", "applied"])
def test_no_gradient_outlives_its_step(make_run, dtype, skip):
    run = make_run(dtype, skip=skip)
    run.step(_batches(run, [0]))
    assert all(parameter.grad is None for parameter in run.student.parameters())


@HALF_OR_FLOAT
def test_a_step_without_targets_is_skipped_as_such(make_run, dtype, without_targets):
    run = make_run(dtype)
    before, scale = _bits(run), run.precision.loss_scale.item()
    (batch,) = _batches(run, [0])
    report = run.step([without_targets(batch)])
    assert (report.verdict.cause, report.num_target_tokens, report.loss) == ("no_targets", 0, 0.0)
    assert _unchanged(before, _bits(run))
    assert run.precision.loss_scale.item() == scale


@HALF_OR_FLOAT
def test_a_run_may_begin_with_a_step_without_targets(make_run, dtype, without_targets):
    run = make_run(dtype)
    (batch,) = _batches(run, [0])
    assert run.step([without_targets(batch)]).verdict.cause == "no_targets"


# The norm, and the one read


@HALF_OR_FLOAT
def test_the_norm_is_that_of_the_unscaled_gradient(make_run, dtype):
    run = make_run(dtype, clip=NO_LIMIT)
    report = run.step(_batches(run, [0, 1]))
    assert report.grad_norm == pytest.approx(_norm(run.gradients[0]), rel=1e-5)


def test_the_norm_is_over_the_optimizers_own_parameters(make_run):
    run, whole = make_run(), make_run()
    head = run.student.get_output_embeddings()
    run.optimizer = build_optimizer(head, OptimConfig())
    whole.step(_batches(whole, [0]))
    index = next(i for i, p in enumerate(parameters_of(whole.optimizer)) if p is whole.student.lm_head.weight)
    report = run.step(_batches(run, [0]))
    assert report.grad_norm == pytest.approx(_norm([whole.gradients[0][index]]), rel=1e-5)
    assert report.grad_norm < 0.99 * _norm(whole.gradients[0])


@HALF_OR_FLOAT
def test_the_applied_gradient_is_clipped_to_the_limit(make_run, dtype):
    run = make_run(dtype, clip=0.5)
    report = run.step(_batches(run, [0, 1]))
    assert report.grad_norm > 0.55
    assert _norm(run.gradients[0]) == pytest.approx(0.5, rel=1e-4)


def test_clipping_keeps_the_direction_and_never_lengthens(make_run):
    free, clipped = make_run(clip=1e3), make_run(clip=0.5)
    norm = free.step(_batches(free, [0])).grad_norm
    clipped.step(_batches(clipped, [0]))
    assert _norm(free.gradients[0]) == pytest.approx(norm, rel=1e-5)
    for long, short in zip(free.gradients[0], clipped.gradients[0], strict=True):
        torch.testing.assert_close(short, long * (0.5 / norm), rtol=1e-4, atol=1e-8)


def _enlarge_gradients(run, factor):
    for parameter in run.student.parameters():
        parameter.register_hook(lambda gradient: gradient * factor)


@HALF_OR_FLOAT
@pytest.mark.parametrize("skip_rule", ["adaptive", "fixed"])
def test_a_finite_gradient_whose_norm_exceeds_float32_is_finite(make_run, dtype, skip_rule):
    usual, large = make_run(dtype, clip=0.5), make_run(dtype, clip=0.5)
    large.guard = StepGuard(GuardConfig(skip_rule=skip_rule))
    _enlarge_gradients(large, 2.0**90)
    usual_report = usual.step(_batches(usual, [0, 1]))
    before, scale = _bits(large), large.precision.loss_scale.item()
    report = large.step(_batches(large, [0, 1]))
    assert report.grad_norm == pytest.approx(usual_report.grad_norm * 2.0**90, rel=1e-4)
    assert large.precision.loss_scale.item() == scale
    if skip_rule == "fixed":
        assert report.verdict.cause == "norm"
        assert _unchanged(before, _bits(large))
        return
    assert report.verdict.applied  # among the first five norms, so it is clipped
    assert _norm(large.gradients[0]) == pytest.approx(0.5, rel=1e-4)
    for clipped, reference in zip(large.gradients[0], usual.gradients[0], strict=True):
        torch.testing.assert_close(clipped, reference, rtol=1e-3, atol=1e-7)


def test_every_overflow_lowers_the_loss_scale_also_one_that_the_scaler_does_not_see(make_run):
    run = make_run(torch.float16, scale=1024.0)
    run.precision.backward(run.student.lm_head.weight.sum())
    run.precision.unscale_(run.optimizer)
    run.precision.update_("overflow", 1024.0)
    assert run.precision.loss_scale.item() == 512.0


class _HostReads(TorchDispatchMode):
    """Operations whose result the host has to wait for on a GPU."""

    OPS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.OPS:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "skip"), [(torch.float16, NO_LIMIT), (torch.float32, 1e-6)], ids=["applied", "skipped"]
)
@EVERY_KIND
def test_a_step_reads_the_device_once(make_run, monkeypatch, dtype, tokenizers, alignment, skip):
    settings = {"alignment": alignment, "logit_clamp_style": "normalized", "loss_clamp_style": "scale"}
    run = make_run(dtype, tokenizers, skip=skip, kd_direction="jsd", teacher_top_k=16, **settings)
    batches = _batches(run, [0], [1])
    reads = []
    # transformers looks for packed sequences in position ids that it made itself, a read for every forward.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, _counted(getattr(torch.Tensor, name), name, reads))
    with _HostReads() as mode:
        run.step(batches)
    monkeypatch.undo()
    assert reads + mode.seen == ["tolist"]


def _counted(method, name, reads):
    def count(self, *args, **kwargs):
        reads.append(name)
        return method(self, *args, **kwargs)

    return count


# The objective


@EVERY_KIND
def test_the_total_is_the_weighted_sum_of_its_terms(make_run, tokenizers, alignment):
    run = make_run(tokenizers=tokenizers, alignment=alignment, alpha_kd=0.3, alpha_ce=0.6)
    terms = run.objective(*_batches(run, [0, 1]))
    assert min(terms.ce.item(), terms.kd.item()) > 0.1
    assert terms.total.item() == pytest.approx(0.6 * terms.ce.item() + 0.3 * terms.kd.item(), rel=1e-6)


def test_the_report_states_means_whose_weighted_sum_is_the_loss(make_run):
    run = make_run(alpha_kd=0.3, alpha_ce=0.6)
    batches = _batches(run, [0], [1, 2])
    terms = [run.objective(batch) for batch in batches]
    report = run.step(batches)
    count = sum(batch.num_target_tokens for batch in batches)
    assert report.ce_loss == pytest.approx(sum(t.ce.item() for t in terms) / count, rel=1e-6)
    assert report.kd_loss == pytest.approx(sum(t.kd.item() for t in terms) / count, rel=1e-6)
    assert report.loss == pytest.approx(0.6 * report.ce_loss + 0.3 * report.kd_loss, rel=1e-12)


@pytest.mark.parametrize("style", ["scale", "hard"])
def test_the_loss_clamp_bounds_what_is_minimised_and_not_what_is_logged(make_run, style):
    plain, clamped = make_run(alpha_ce=2.0), make_run(alpha_ce=2.0, loss_clamp=1.0, loss_clamp_style=style)
    (batch,) = _batches(plain, [0, 1])
    free, bound = plain.objective(batch), clamped.objective(batch)
    assert bound.total.item() / batch.num_target_tokens == pytest.approx(1.0, rel=1e-6)
    assert bound.ce.item() == free.ce.item() > 1.0 * batch.num_target_tokens


@pytest.mark.parametrize("style", ["normalized", "raw"])
@pytest.mark.parametrize(("alpha_kd", "alpha_ce"), [(1.0, 0.0), (0.0, 1.0)], ids=["kd", "ce"])
def test_the_logit_clamp_bounds_both_terms_and_not_the_logged_text_loss(make_run, style, alpha_kd, alpha_ce):
    weights = {"alpha_kd": alpha_kd, "alpha_ce": alpha_ce}
    plain, clamped = make_run(**weights), make_run(**weights, logit_clamp=0.01, logit_clamp_style=style)
    (batch,) = _batches(plain, [0, 1])
    free, bound = plain.objective(batch), clamped.objective(batch)
    assert bound.ce.item() == pytest.approx(free.ce.item(), rel=1e-6)
    assert abs(bound.total.item() - free.total.item()) > 0.05 * free.total.item()


@HALF_OR_FLOAT
@pytest.mark.parametrize("tokenizers", ["equal", "different"])
def test_a_step_with_a_teacher_of_which_nothing_is_finite_is_refused_for_that(make_run, dtype, tokenizers):
    run = make_run(dtype, tokenizers)
    run.teacher.lm_head.weight.data.fill_(math.inf)
    (batch,) = _batches(run, [0, 1])
    before, scale = [p.detach().clone() for p in run.student.parameters()], run.precision.loss_scale.item()
    report = run.step([batch])
    assert report.verdict.cause == "teacher"
    assert all(torch.equal(a, b) for a, b in zip(before, run.student.parameters(), strict=True))
    assert run.precision.loss_scale.item() == scale
    records = [batch.alignment.teacher_continuations, batch.alignment.student_continuations]
    going_on = sum(0 if record is None else len(record.starting_positions) for record in records)
    assert (going_on > 0) == (tokenizers == "different")
    assert report.teacher_rows_dropped == len(batch.alignment.teacher_positions) + going_on
    assert report.teacher_positions == report.teacher_rows_dropped
    assert report.kd_loss == 0.0


@HALF_OR_FLOAT
@pytest.mark.parametrize("tokenizers", ["equal", "different"])
def test_a_micro_batch_without_a_teacher_beside_one_with_it_learns_its_text(make_run, dtype, tokenizers):
    def is_bad(module, inputs, output):
        same = inputs[0].shape == bad.shape and torch.equal(inputs[0], bad)
        return output * math.inf if same else output

    whole, text, parts = make_run(dtype, tokenizers), make_run(dtype, tokenizers), make_run(dtype, tokenizers)
    batches = _batches(whole, [0, 1], [2, 3])
    bad = batches[0].teacher.input_ids
    whole.teacher.get_input_embeddings().register_forward_hook(is_bad)
    report = whole.step(batches)
    assert report.verdict.applied
    assert 0 < report.teacher_rows_dropped < report.teacher_positions
    assert report.teacher_rows_dropped == whole.objective.num_teacher_positions(batches[0])[0]
    # The same gradient from cross-entropy alone on the first micro-batch, and the whole loss on the second.
    text.objective.distillation = None
    text.step(batches[:1])
    parts.step(batches[1:])
    counts = [batch.num_target_tokens for batch in batches]
    for a, b, c in zip(whole.gradients[0], text.gradients[0], parts.gradients[0], strict=True):
        expected = (counts[0] * b + counts[1] * c) / sum(counts)
        assert (a - expected).norm() <= (2e-2 if dtype is torch.float16 else 1e-4) * expected.norm()


@pytest.mark.parametrize("alignment", ["auto", "strict", "alm", "uld", "hidden"])
def test_every_method_counts_the_positions_that_it_compares(make_run, alignment):
    run = make_run(tokenizers="different", alignment=alignment)
    (batch,) = _batches(run, [0, 1])
    assert run.step([batch]).teacher_rows_dropped == 0
    run.teacher.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * math.nan)
    report = run.step([batch])
    assert report.verdict.cause == "teacher"
    assert report.teacher_rows_dropped == report.teacher_positions > 0


def test_text_that_a_cache_does_not_hold_is_learned_without_a_teacher(make_run):
    run = make_run()
    (batch,) = _batches(run, [0, 1])
    count = batch.num_target_tokens
    none = torch.full((count,), math.nan)
    index = torch.zeros(batch.teacher.input_ids.numel(), dtype=torch.int64)
    index[batch.teacher.positions] = torch.arange(count)
    cached = CachedTopK(
        record_index=index,
        ids=torch.zeros(count, 4, dtype=torch.int32),
        max_log_probs=none,
        log_prob_gaps=torch.zeros(count, 4).half(),
        target_log_probs=none,
        tail_log_ratios=none.half(),
        temperature=2.0,
    )
    run.objective.distillation.top_k = 4
    report = run.step([dataclasses.replace(batch, cached_logits=cached)])  # records that are not finite
    assert report.verdict.cause == "teacher"
    missing = dataclasses.replace(batch, cached_logits=dataclasses.replace(cached, is_missing=True))
    report = run.step([missing])
    assert report.verdict.applied
    assert report.teacher_rows_dropped == report.teacher_positions == count


@pytest.mark.parametrize(("alignment", "learns"), [("auto", True), ("strict", False)])
def test_a_batch_in_which_nowhere_both_start_a_token_teaches_what_there_is(make_run, alignment, learns):
    run = make_run(tokenizers="different", alignment=alignment)
    (batch,) = _batches(run, [0, 1])
    rows = {
        name: getattr(batch.alignment, name)[:0]
        for name in ("student_positions", "teacher_positions", "strict", "token_end")
    }
    rows["continuation_paths"] = batch.alignment.continuation_paths[:, :0]
    report = run.step([dataclasses.replace(batch, alignment=dataclasses.replace(batch.alignment, **rows))])
    assert report.verdict.applied
    assert (report.kd_loss > 0) == learns


def test_only_the_teacher_positions_that_are_not_finite_are_dropped(make_run):
    run = make_run()
    (batch,) = _batches(run, [0, 1])
    run.teacher.get_input_embeddings().weight.data[batch.teacher.input_ids[0, 5]] = math.inf
    logits = run.teacher(input_ids=batch.teacher.input_ids).logits.flatten(0, 1)[batch.teacher.positions]
    bad = (~logits.isfinite().all(1)).sum().item()
    report = run.step([batch])
    assert 0 < bad < len(batch.teacher.positions)
    assert (report.teacher_rows_dropped, report.teacher_positions) == (bad, len(batch.teacher.positions))
    assert report.verdict.applied
    assert report.kd_loss > 0


def test_alpha_kd_0_never_calls_the_teacher(make_run, monkeypatch):
    run = make_run(alpha_kd=0.0)
    calls = []
    run.teacher.register_forward_hook(lambda *_: calls.append(1))
    report = run.step(_batches(run, [0]))
    assert (calls, report.kd_loss) == ([], 0.0)
    assert report.loss == pytest.approx(0.5 * report.ce_loss)


@pytest.mark.parametrize("style", ["off", "normalized", "raw"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(make_run, style):
    run = make_run(alpha_kd=1.0, alpha_ce=0.0, logit_clamp_style=style)
    run.objective.teacher = copy.deepcopy(run.student).eval()
    report = run.step(_batches(run, [0, 1]))
    assert report.kd_loss == pytest.approx(0.0, abs=1e-6)
    assert _norm(run.gradients[0]) < 1e-6


def test_a_teacher_of_its_own_does_move_the_student(make_run):
    run = make_run(alpha_kd=1.0, alpha_ce=0.0)
    assert run.step(_batches(run, [0, 1])).kd_loss > 1e-3
    assert _norm(run.gradients[0]) > 1e-3


def test_heads_padded_to_different_sizes_share_their_tokens(make_run, make_student):
    run = make_run()
    vocab = len(run.dataset.pair.teacher)
    run.objective.teacher = make_student(vocab + 40, num_hidden_layers=1).eval()
    assert run.step(_batches(run, [0])).verdict.applied
    assert 0 < run.objective(*_batches(run, [0])).kd.item() < math.inf


@EVERY_KIND
def test_float16_gradients_point_where_float32_ones_do(make_run, tokenizers, alignment):
    half, single = (make_run(dtype, tokenizers, alignment=alignment) for dtype in (torch.float16, torch.float32))
    for run in (half, single):
        run.step(_batches(run, [0, 1]))
    a, b = (torch.cat([g.flatten() for g in run.gradients[0]]) for run in (half, single))
    assert torch.cosine_similarity(a, b, dim=0).item() > 0.9999


@HALF_OR_FLOAT
def test_twenty_steps_lower_the_loss(make_run, dtype):
    run = make_run(dtype)
    losses = [run.step(_batches(run, [0, 1])).loss for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


@EVERY_KIND
def test_eight_steps_of_distillation_alone_lower_it(make_run, tokenizers, alignment):
    run = make_run(torch.float32, tokenizers, alignment=alignment, alpha_kd=1.0, alpha_ce=0.0)
    losses = [run.step(_batches(run, [0, 1])).kd_loss for _ in range(8)]
    assert losses[-1] < 0.97 * losses[0]


# What is learned beside the student


def test_the_projection_of_hidden_states_is_trained_and_decays_like_a_matrix(make_run):
    run = make_run(alignment="hidden")
    (weight,) = run.objective.parameters()
    before = weight.detach().clone()
    assert weight.shape == (16, 32)
    assert [p is weight for p in parameters_of(run.optimizer)].count(True) == 1
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert decay[id(weight)] > 0
    assert run.step(_batches(run, [0, 1])).verdict.applied
    assert not torch.equal(weight, before)


def test_the_norm_counts_the_projection_of_hidden_states(make_run):
    run = make_run(alignment="hidden")
    report = run.step(_batches(run, [0, 1]))
    own = run.gradients[0][[p is run.objective.parameters()[0] for p in parameters_of(run.optimizer)].index(True)]
    assert own.norm() > 0
    assert report.grad_norm == pytest.approx(_norm(run.gradients[0]), rel=1e-5)


@HALF_OR_FLOAT
def test_a_nan_batch_leaves_the_projection_of_hidden_states_as_it_was(make_run, dtype):
    run = make_run(dtype, alignment="hidden")
    _poison(run, 0, [1])
    before = [p.detach().clone() for p in run.objective.parameters()]
    assert run.step(_batches(run, [0])).verdict.cause == "forward"
    assert _unchanged(before, list(run.objective.parameters()))


@pytest.mark.parametrize("alignment", ["auto", "strict", "alm", "uld"])
def test_no_other_alignment_has_parameters_of_its_own(make_run, alignment):
    run = make_run(tokenizers="different", alignment=alignment)
    assert run.objective.parameters() == []
    assert len(parameters_of(run.optimizer)) == len(list(run.student.parameters()))


def test_the_state_of_the_objective_is_its_parameters(make_run):
    run, other = make_run(alignment="hidden"), make_run(alignment="hidden")
    run.step(_batches(run, [0, 1]))
    saved = run.objective.state_dict()
    assert not torch.equal(*(r.objective.parameters()[0] for r in (run, other)))
    other.objective.load_state_dict(saved)
    assert torch.equal(*(r.objective.parameters()[0] for r in (run, other)))
    assert make_run(tokenizers="different").objective.state_dict() == {}


# Evaluation


def _evaluate(run, batch_size=3, precision=None) -> Evaluation:
    batches = run.dataset.token_batches("student", batch_size)
    return evaluate(run.student, batches, run.dataset.text.num_bytes, precision or run.precision)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary(make_run):
    run = make_run()
    run.student.lm_head.weight.data.zero_()
    assert _evaluate(run).perplexity == pytest.approx(run.student.config.vocab_size, rel=1e-6)


@pytest.mark.parametrize("tokenizers", ["equal", "different"])
def test_perplexity_does_not_depend_on_the_batch_size(make_run, tokenizers):
    run = make_run(tokenizers=tokenizers)
    evaluations = [_evaluate(run, batch_size) for batch_size in (1, 3, 1000)]
    assert [e.perplexity for e in evaluations] == pytest.approx([evaluations[0].perplexity] * 3, rel=1e-6)
    assert {e.num_tokens for e in evaluations} == {run.dataset.num_tokens}


def test_nan_logits_give_nan_perplexity(make_run):
    run = make_run()
    _poison(run, 2)
    evaluation = _evaluate(run)
    assert math.isnan(evaluation.perplexity)
    assert math.isnan(evaluation.bits_per_byte)


def test_perplexity_and_bits_per_byte_are_what_they_are_defined_as():
    evaluation = Evaluation(nats=6.0, num_tokens=3, num_bytes=12)
    assert evaluation.perplexity == math.exp(2.0)
    assert evaluation.bits_per_byte == pytest.approx(6.0 / math.log(2) / 12)


def test_a_perplexity_beyond_a_float_is_inf():
    assert Evaluation(nats=3000.0, num_tokens=3, num_bytes=12).perplexity == math.inf


def test_perplexity_is_exp_of_the_mean_cross_entropy_of_the_text(make_run):
    run = make_run(alpha_kd=0.0)
    terms = [run.objective(run.dataset.batch([block])) for block in range(len(run.dataset))]
    nats = sum(term.ce.item() for term in terms)
    assert _evaluate(run).nats == pytest.approx(nats, rel=1e-6)


def test_a_float32_student_is_evaluated_in_float32_whatever_the_run_computes_in(make_run):
    run = make_run(torch.float16)
    assert _evaluate(run).nats == _evaluate(run, precision=Precision(CPU, torch.float32, 1.0)).nats


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_mode_and_weights_as_they_were(make_run, training):
    run = make_run()
    run.student.train(training)
    before = _bits(run)
    _evaluate(run)
    assert run.student.training is training
    assert _unchanged(before, _bits(run))


# The optimizer


def test_the_learning_rate_rises_linearly_to_its_peak_and_falls_to_a_tenth():
    config = OptimConfig(student_lr=2e-4, warmup_steps=10)
    rates = [learning_rate_at(step, 100, config, config.student_lr) for step in range(100)]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[9] == rates[10] == pytest.approx(2e-4)
    assert rates[55] == pytest.approx(2e-4 * 0.55)
    assert rates[99] == pytest.approx(2e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * 89 / 90)) / 2))
    assert 2e-5 <= rates[99] < 2.1e-5
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_a_constant_learning_rate_stays_at_its_peak():
    config = OptimConfig(student_lr=2e-4, warmup_steps=10, lr_schedule="constant")
    assert learning_rate_at(0, 100, config, config.student_lr) == pytest.approx(2e-5)
    assert {learning_rate_at(step, 100, config, config.student_lr) for step in range(10, 100)} == {2e-4}


@pytest.mark.parametrize("warmup", [0, 3, 50])
def test_every_length_of_run_has_a_learning_rate(warmup):
    config = OptimConfig(student_lr=2e-4, warmup_steps=warmup)
    rates = [
        learning_rate_at(step, steps, config, config.student_lr) for steps in (1, 2, 3, 4) for step in range(steps)
    ]
    assert all(0 < rate <= 2e-4 for rate in rates)


def test_every_trainable_parameter_is_in_exactly_one_group(make_run):
    run = make_run()
    own = [id(parameter) for parameter in parameters_of(run.optimizer)]
    assert sorted(own) == sorted(id(parameter) for parameter in run.student.parameters())


def test_tied_weights_are_updated_once(make_student):
    student = make_student(64, num_hidden_layers=1, tie_word_embeddings=True)
    own = [id(parameter) for parameter in parameters_of(build_optimizer(student, OptimConfig()))]
    assert own.count(id(student.lm_head.weight)) == 1


def test_frozen_parameters_are_not_optimised(make_student):
    student = make_student(64, num_hidden_layers=1)
    student.lm_head.requires_grad_(False)
    own = [id(parameter) for parameter in parameters_of(build_optimizer(student, OptimConfig()))]
    assert id(student.lm_head.weight) not in own


def test_norms_and_biases_do_not_decay_and_matrices_do(make_student):
    student = make_student(64, num_hidden_layers=1, attention_bias=True)
    optimizer = build_optimizer(student, OptimConfig(weight_decay=0.125))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    small = {name: decay[id(p)] for name, p in student.named_parameters() if "norm" in name or "bias" in name}
    large = {name: decay[id(p)] for name, p in student.named_parameters() if name not in small}
    assert any("norm" in name for name in small)
    assert any("bias" in name for name in small)
    assert set(small.values()) == {0.0}
    assert set(large.values()) == {0.125}
