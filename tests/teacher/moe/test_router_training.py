"""Routers that learn: their gradient, what a step changes and what it never changes, in both schedules."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from sar_kd.config.runs import RoutingConfig
from sar_kd.config.sections import GuardConfig, LossConfig, OptimConfig
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.losses.functional import GroupSums
from sar_kd.losses.objective import Objective
from sar_kd.models.memory_saving import recompute_activations_
from sar_kd.runtime.precision import Precision
from sar_kd.teacher.moe.discovery import Gate, find_routers
from sar_kd.teacher.moe.router_checkpoint import FrozenTeacherChanged, hash_frozen
from sar_kd.teacher.moe.router_training import (
    FROZEN_ROUTERS,
    RouterTrainer,
    entropy,
    load_balancing_loss,
    relative_change,
    router_probs,
)
from sar_kd.teacher.moe.routing_hooks import Routing
from sar_kd.tokenization.token_stream import Block
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.training.guards import StepGuard
from sar_kd.training.optimizer import build_optimizer, parameters_of
from sar_kd.training.step import StepContext, train_step

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
HALF_OR_FLOAT = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
SCHEDULES = pytest.mark.parametrize("schedule", ["two_stage", "joint"])
DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "reverse"])
SMOOTH = [("equal", "auto"), ("different", "auto"), ("coarser", "auto"), ("different", "strict")]
KINDS = pytest.mark.parametrize(("tokenizers", "alignment"), [*SMOOTH, ("different", "alm"), ("different", "uld")])


@pytest.fixture(scope="module")
def datasets(byte_tokenizer, sp_tokenizer, corpus_texts):
    documents = [Document(str(number), text) for number, text in enumerate(corpus_texts)]
    pairs = {
        "equal": (byte_tokenizer, byte_tokenizer),
        "different": (sp_tokenizer, byte_tokenizer),
        "coarser": (byte_tokenizer, sp_tokenizer),
    }
    return {name: _dataset(documents, *pair) for name, pair in pairs.items()}


def _dataset(documents, student, teacher):
    pair = TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher))
    return build_dataset(documents, pair, 24, 60)


@pytest.fixture
def make_run(datasets, make_student, make_teacher):
    """make_run(rule, dtype, tokenizers, ...): a step with a tiny mixture of experts; rule 'sar' or one of `Routing`."""
    opened = []

    def make(rule="sar", dtype=torch.float32, tokenizers="equal", scale=1024.0, dropout=0.0, loss=None, **routing):
        dataset = datasets[tokenizers]
        student = make_student(len(dataset.pair.student), num_hidden_layers=1, attention_dropout=dropout)
        teacher = make_teacher(len(dataset.pair.teacher), attention_dropout=0.5)  # which must never be on
        for model in (student, teacher):
            model.lm_head.weight.data.mul_(20.0)  # a fresh LM head is almost uniform
        generator = torch.Generator().manual_seed(6)
        for layer in teacher.model.layers:
            layer.mlp.gate.weight.data.normal_(std=0.5, generator=generator)
            layer.mlp.experts.down_proj.data.mul_(20.0)
        teacher.to(dtype)
        precision = Precision(CPU, dtype, scale)
        no_clamps = {"logit_clamp_style": "off", "loss_clamp_style": "off"}
        losses = LossConfig(**({"alpha_kd": 0.5, "alpha_ce": 0.5} | no_clamps | (loss or {})))
        settings = RoutingConfig(**({"router_lr": 1e-3} | routing))
        run = SimpleNamespace(dataset=dataset, student=student, teacher=teacher, precision=precision, settings=settings)
        run.objective = Objective(teacher, student, losses, dataset.aligner, precision)
        run.optimizer = build_optimizer(student, OptimConfig(student_lr=1e-3), run.objective.parameters())
        run.guard = StepGuard(GuardConfig(skip_grad_norm=1e9, skip_rule="fixed"))
        run.routing = Routing(teacher, find_routers(teacher), "all" if rule == "sar" else rule)
        run.routing.__enter__()
        opened.append(run.routing)
        run.routers = FROZEN_ROUTERS
        if rule == "sar":
            run.routers = RouterTrainer(run.objective, run.routing, settings, losses, dataset.aligner)
        run.step = lambda batches, clip=1e9: train_step(
            batches, StepContext(run.objective, run.optimizer, run.guard, run.precision, clip, run.routers)
        )
        return run

    torch.manual_seed(4)
    yield make
    for routing in opened:
        routing.__exit__()


def _batches(run, *groups):
    return [run.dataset.batch(list(group)) for group in groups]


def _bits(tensors):
    return [tensor.detach().clone().view(torch.int32) for tensor in tensors]


def _same(before, after):
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _everything(run):
    """Every weight that learns and every tensor of both optimizers."""
    tensors = [*run.student.parameters(), *run.routers.parameters.values()]
    for optimizer in (run.optimizer, run.routers.optimizer):
        tensors += [value for slots in optimizer.state.values() for value in slots.values()]
    return _bits(tensors)


def _router_loss(run, batch):
    """The routers' loss per target token and their gradients, by name."""
    outputs = run.objective.forward_models(batch, student_grad=False, teacher_grad=True)
    loss = run.routers.terms(batch, outputs).total / batch.num_target_tokens
    if loss.requires_grad:
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in run.routers.parameters.items()}
    for parameter in run.routers.parameters.values():
        parameter.grad = None
    return loss.item(), gradients


# The terms


def _naive_load_balancing(probs, blocks):
    values = []
    for block in range(3):
        tokens = [token for token, b in zip(probs.tolist(), blocks, strict=True) if b == block]
        loads = [sum(token[e] for token in tokens) for e in range(4)]
        mean = sum(loads) / 4
        values.append(sum((load - mean) ** 2 for load in loads) / 4 / mean**2 if tokens else 0.0)
    return values


def test_load_balancing_loss_is_the_squared_coefficient_of_variation_of_each_block():
    probs = (torch.randn(7, 4, dtype=torch.float64) * 2).softmax(-1)
    blocks = [0, 0, 0, 2, 2, 2, 2]
    found = load_balancing_loss(probs, GroupSums(torch.tensor(blocks), 3))
    assert found.tolist() == pytest.approx(_naive_load_balancing(probs, blocks), rel=1e-12)


def test_load_balancing_loss_is_zero_with_zero_gradient_for_equal_shares_and_largest_for_one_expert():
    logits = torch.zeros(6, 4, requires_grad=True)
    one_block = GroupSums(torch.zeros(6, dtype=torch.int64), 1)
    value = load_balancing_loss(router_probs(Gate("softmax", True), logits), one_block)
    value.sum().backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad.abs().max() < 1e-6
    assert load_balancing_loss(torch.eye(4)[:1].expand(6, -1), one_block).item() == pytest.approx(3.0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_gradients_of_the_terms_pass_gradcheck(score):
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    blocks = GroupSums(torch.tensor([0, 0, 1, 1, 1]), 2)
    gate = Gate(score, False, scale=2.5)
    assert torch.autograd.gradcheck(lambda z: load_balancing_loss(router_probs(gate, z), blocks), logits)
    assert torch.autograd.gradcheck(lambda z: entropy(router_probs(gate, z)), logits)
    initial = torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w: relative_change(w, initial), logits)


def test_entropy_is_one_for_equal_probabilities_and_zero_for_one_expert():
    assert entropy(torch.full((2, 8), 1 / 8)).tolist() == pytest.approx([1.0, 1.0])
    assert entropy(torch.eye(4)).tolist() == [0.0] * 4
    probs = torch.tensor([[0.7, 0.2, 0.1, 0.0]], dtype=torch.float64)
    assert entropy(probs).item() == pytest.approx(-sum(p * math.log(p) for p in (0.7, 0.2, 0.1)) / math.log(4))


def test_the_relative_change_is_that_of_norms():
    initial = torch.randn(4, 8)
    assert relative_change(initial * 1.5, initial).item() == pytest.approx(0.25, rel=1e-5)
    assert relative_change(initial, initial).item() == 0.0


# The gradient that reaches the routers


@pytest.mark.parametrize(
    ("tokenizers", "alignment", "direction"),
    [
        *((*kind, direction) for kind in SMOOTH for direction in ("forward", "reverse", "jsd")),
        ("different", "alm", "forward"),
    ],
)
def test_the_routers_gradient_equals_finite_differences(make_run, tokenizers, alignment, direction):
    loss = {"alignment": alignment, "temperature": 1.0}
    run = make_run(tokenizers=tokenizers, loss=loss, router_direction=direction, router_beta=0.0, router_anchor=0.0)
    (batch,) = _batches(run, range(4))
    _, gradients = _router_loss(run, batch)
    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    assert norm > 1e-5
    epsilon, values = 3e-3, []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for name, parameter in run.routers.parameters.items():
                parameter.add_(sign * epsilon * (gradients[name] / norm).float())
            values.append(_router_loss(run, batch)[0])
            for name, parameter in run.routers.parameters.items():
                parameter.sub_(sign * epsilon * (gradients[name] / norm).float())
    slope = (values[0] - values[1]) / (2 * epsilon)
    assert slope == pytest.approx(norm.item(), rel=2e-3)


@DIRECTIONS
def test_the_gradient_of_the_whole_loss_equals_finite_differences_too(make_run, direction):
    run = make_run(tokenizers="different", router_direction=direction, router_beta=0.3, router_anchor=0.3)
    for name, parameter in run.routers.parameters.items():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
        assert not torch.equal(parameter, run.routers._initial[name])
    (batch,) = _batches(run, range(4))
    _, gradients = _router_loss(run, batch)
    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    values = []
    for step in (3e-3, -6e-3):
        for name, parameter in run.routers.parameters.items():
            parameter.data.add_(step * (gradients[name] / norm).float())
        with torch.no_grad():
            values.append(_router_loss(run, batch)[0])
    assert (values[0] - values[1]) / 6e-3 == pytest.approx(norm.item(), rel=2e-3)


def test_the_routers_loss_is_forward_kl_of_the_whole_teacher_whatever_the_students_is(make_run):
    run = make_run(loss={"kd_direction": "reverse", "teacher_top_k": 3, "logit_clamp_style": "raw", "temperature": 2.0})
    (batch,) = _batches(run, range(3))
    with torch.no_grad():
        outputs = run.objective.forward_models(batch)
        found = run.routers.terms(batch, outputs).divergence.item()
    t, p = (
        (logits.double() / 2.0).log_softmax(-1)
        for logits in (
            outputs.teacher.tile(slice(None)).T[batch.alignment.teacher_positions],
            outputs.student.tile(slice(None)).T,
        )
    )
    assert found == pytest.approx(4.0 * (t.exp() * (t - p)).sum().item(), rel=1e-5)


@KINDS
def test_neither_loss_gives_the_other_side_a_gradient(make_run, tokenizers, alignment):
    run = make_run(tokenizers=tokenizers, loss={"alignment": alignment})
    (batch,) = _batches(run, range(3))
    outputs = run.objective.forward_models(batch, teacher_grad=True)
    run.objective(batch, outputs).total.backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in run.teacher.parameters())
    assert all(parameter.grad is not None for parameter in run.student.parameters())
    run.student.zero_grad()
    run.routers.terms(batch, outputs).total.backward()
    assert all(parameter.grad is None for parameter in run.student.parameters())
    with_gradient = {name for name, parameter in run.teacher.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(run.routers.parameters)
    assert all(parameter.grad.abs().max() > 0 for parameter in run.routers.parameters.values())


@pytest.mark.parametrize("term", ["router_beta", "router_anchor"])
def test_each_regulariser_adds_its_own_gradient(make_run, term):
    gradients = []
    for weight in (0.0, 10.0):
        run = make_run(**{"router_beta": 0.0, "router_anchor": 0.0, term: weight})
        for parameter in run.routers.parameters.values():
            parameter.data.add_(0.05 * torch.ones_like(parameter))
        gradients.append(_router_loss(run, _batches(run, range(3))[0])[1])
    for name in gradients[0]:
        assert (gradients[1][name] - gradients[0][name]).abs().max() > 1e-4


# One step


@SCHEDULES
@pytest.mark.parametrize("tokenizers", ["equal", "different", "coarser"])
@DIRECTIONS
def test_a_router_step_lowers_the_routers_own_divergence_on_the_same_text(make_run, schedule, tokenizers, direction):
    run = make_run(tokenizers=tokenizers, sar_schedule=schedule, router_direction=direction, router_beta=0.0)
    run.routers.measures_effect = True
    for group in range(4):
        effect = run.step(_batches(run, [2 * group, 2 * group + 1])).routers.router_effect
        assert effect[f"{direction}_kl_after"] < effect[f"{direction}_kl_before"]


@SCHEDULES
def test_with_the_sign_of_the_loss_turned_the_same_step_raises_it(make_run, schedule, monkeypatch):
    run = make_run(sar_schedule=schedule, router_beta=0.0, router_anchor=0.0)
    run.routers.measures_effect = True
    plain = RouterTrainer.terms
    turned = lambda self, *args: (t := plain(self, *args)) and dataclasses.replace(t, total=-t.total)  # noqa: E731
    monkeypatch.setattr(RouterTrainer, "terms", turned)
    effect = run.step(_batches(run, [0, 1])).routers.router_effect
    assert effect["forward_kl_after"] > effect["forward_kl_before"]


@SCHEDULES
@HALF_OR_FLOAT
@pytest.mark.parametrize("tokenizers", ["equal", "different"])
def test_with_a_rate_of_zero_the_student_learns_what_it_learns_from_all(make_run, schedule, dtype, tokenizers):
    learned = []
    for rule in ("sar", "all"):
        run = make_run(rule, dtype, tokenizers, router_lr=0.0, sar_schedule=schedule, dropout=0.1)
        torch.manual_seed(11)
        reports = [run.step(_batches(run, [step], [step + 1])) for step in range(3)]
        learned.append((_bits(run.student.parameters()), [(r.loss, r.grad_norm) for r in reports]))
    assert _same(learned[0][0], learned[1][0])
    assert learned[0][1] == learned[1][1]


@HALF_OR_FLOAT
def test_two_stage_distils_from_the_updated_routers_and_joint_with_those_before(make_run, dtype):
    losses = {}
    for schedule in ("two_stage", "joint"):
        run = make_run(dtype=dtype, sar_schedule=schedule, router_lr=0.1)
        losses[schedule] = run.step(_batches(run, [0, 1])).kd_loss
    frozen = make_run("all", dtype)
    losses["all"] = frozen.step(_batches(frozen, [0, 1])).kd_loss
    assert losses["joint"] == losses["all"]
    assert losses["two_stage"] < losses["all"] - 1e-3


@SCHEDULES
def test_only_the_routers_of_the_teacher_move_and_the_hash_shows_it(make_run, schedule):
    run = make_run(sar_schedule=schedule, tokenizers="different")
    before = {name: value.clone() for name, value in run.teacher.state_dict().items()}
    for step in range(50):
        assert run.step(_batches(run, [step % 8])).verdict.applied
    run.routers.check_frozen()
    for name, value in run.teacher.state_dict().items():
        assert torch.equal(value, before[name]) != (name in run.routers.parameters)
    assert {id(p) for p in parameters_of(run.routers.optimizer)} == {id(p) for p in run.routers.parameters.values()}


def test_a_frozen_tensor_that_changed_is_detected(make_run):
    run = make_run()
    run.teacher.model.norm.weight.data[0] += 1e-6
    with pytest.raises(FrozenTeacherChanged):
        run.routers.check_frozen()


def test_the_hash_excludes_the_routers(make_run):
    run = make_run()
    before = hash_frozen(run.teacher, run.routers.parameters)
    for parameter in run.routers.parameters.values():
        parameter.data.add_(1.0)
    assert hash_frozen(run.teacher, run.routers.parameters) == before


@HALF_OR_FLOAT
def test_routers_are_float32_in_a_teacher_of_any_dtype_and_small_steps_move_them(make_run, dtype):
    run = make_run(dtype=dtype, router_lr=1e-5)
    before = [parameter.clone() for parameter in run.routers.parameters.values()]
    assert run.step(_batches(run, [0, 1])).verdict.applied
    assert next(run.teacher.parameters()).dtype is dtype
    for parameter, former in zip(run.routers.parameters.values(), before, strict=True):
        assert parameter.dtype is torch.float32
        moved = (parameter - former).abs()
        assert ((moved > 0).float().mean() > 0.95) & (moved.max() < 2e-5)


def test_the_teacher_stays_in_eval_mode_and_its_dropout_off(make_run):
    run, again = make_run(), make_run()
    reports = [r.step(_batches(r, [0, 1])) for r in (run, again)]
    assert reports[0] == reports[1]
    assert not any(module.training for module in run.teacher.modules())


# Accumulation and padding


def _ragged(dataset):
    """The same dataset in which every second block has grown by its neighbour."""
    ragged, blocks = copy.copy(dataset), dataset.blocks
    ragged.blocks = []
    for first in range(0, 12, 3):
        a, b, c = blocks[first : first + 3]
        ragged.blocks += [Block(a.student_start, b.student_end, a.teacher_start, b.teacher_end), c]
    return ragged


@SCHEDULES
@pytest.mark.parametrize("tokenizers", ["equal", "different", "coarser"])
def test_accumulation_and_padding_change_nothing(make_run, schedule, tokenizers):
    """Blocks of two lengths: together the short ones are padded, one by one nothing is."""
    moves, reports = [], []
    for groups in ([range(8)], [[block] for block in range(8)]):
        run = make_run(tokenizers=tokenizers, sar_schedule=schedule, router_beta=0.5, router_anchor=0.5)
        run.dataset = _ragged(run.dataset)
        for parameter in run.routers.parameters.values():
            parameter.data.add_(0.01)
        gradients = []
        run.routers.optimizer.register_step_pre_hook(
            lambda *_, run=run, kept=gradients: kept.extend(p.grad.clone() for p in run.routers.parameters.values())
        )
        reports.append(run.step(_batches(run, *groups)).routers)
        moves.append(gradients)
    assert max((a - b).abs().max().item() for a, b in zip(*moves, strict=True)) <= 1e-6
    assert max(gradient.abs().max().item() for gradient in moves[0]) > 1e-4
    one, many = (dataclasses.asdict(report) for report in reports)
    del one["router_effect"], many["router_effect"]
    assert one == pytest.approx(many, rel=1e-5)


# One verdict for both


def _poison_student(run, block, other):
    own, rest = (set(run.dataset.batch([i]).student.input_ids[0].tolist()) for i in (block, other))
    run.student.get_input_embeddings().weight.data[min(own - rest)] = math.nan


@SCHEDULES
@HALF_OR_FLOAT
@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later"])
def test_a_bad_student_leaves_every_bit_of_the_routers_too(make_run, schedule, dtype, warm):
    run = make_run(dtype=dtype, sar_schedule=schedule)
    if warm:
        run.step(_batches(run, [3]))
    _poison_student(run, 0, 3)
    before = _everything(run)
    assert run.step(_batches(run, [3], [0])).verdict.cause == "forward"
    assert _same(before, _everything(run))
    assert all(parameter.grad is None for parameter in run.routers.parameters.values())


@SCHEDULES
@HALF_OR_FLOAT
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_teacher_that_is_not_finite_in_one_token_refuses_both_as_such_and_leaves_the_scale(
    make_run, schedule, dtype, value
):
    """The student could learn from the rest; the routers' gradient is not finite at any loss scale."""
    run = make_run(dtype=dtype, sar_schedule=schedule)
    run.step(_batches(run, [3]))
    own, rest = (set(run.dataset.batch([i]).teacher.input_ids[0].tolist()) for i in (0, 3))
    run.teacher.get_input_embeddings().weight.data[min(own - rest)] = value
    before, scale = _everything(run), run.precision.loss_scale.item()
    report = run.step(_batches(run, [3], [0]))
    assert report.verdict.cause == "teacher"
    # In two stages the update that is undone has made all of the teacher NaN before it is compared.
    assert 0 < report.teacher_rows_dropped < report.teacher_positions + (schedule == "two_stage")
    assert _same(before, _everything(run))
    assert run.precision.loss_scale.item() == scale
    assert run.step(_batches(run, [3])).verdict.applied


@SCHEDULES
@HALF_OR_FLOAT
def test_a_norm_above_the_limit_rolls_the_routers_update_back(make_run, schedule, dtype):
    run = make_run(dtype=dtype, sar_schedule=schedule)
    run.step(_batches(run, [3]))
    run.guard.settings = dataclasses.replace(run.guard.settings, skip_grad_norm=1e-9)
    before = _everything(run)
    assert run.step(_batches(run, [0])).verdict.cause == "norm"
    assert _same(before, _everything(run))


@SCHEDULES
def test_an_overflow_of_the_routers_gradient_alone_refuses_both_and_lowers_the_scale(make_run, schedule):
    run = make_run(dtype=torch.float16, sar_schedule=schedule, router_anchor=0.1)
    run.step(_batches(run, [3]))
    before, scale = _everything(run), run.precision.loss_scale.item()
    for parameter in run.routers.parameters.values():
        parameter.register_hook(lambda grad: grad * math.inf)
    report = run.step(_batches(run, [0], [1]))
    assert report.verdict.cause == "overflow"
    assert _same(before, _everything(run))
    assert run.precision.loss_scale.item() == scale / 2


@SCHEDULES
def test_a_scale_that_is_too_large_is_calibrated_away_without_touching_a_weight(make_run, schedule):
    run = make_run(dtype=torch.float16, sar_schedule=schedule, scale=2.0**24)
    before = _everything(run)
    reports = [run.step(_batches(run, [0]))]
    assert reports[0].verdict.cause == "overflow"
    assert _same(before, _everything(run))
    reports += [run.step(_batches(run, [0])) for _ in range(16)]
    assert reports[-1].verdict.applied
    run.routers.check_frozen()


@SCHEDULES
def test_a_step_without_targets_moves_nothing(make_run, schedule):
    run = make_run(dtype=torch.float16, sar_schedule=schedule)
    run.step(_batches(run, [3]))
    before = _everything(run)
    assert run.step([]).verdict.cause == "no_targets"
    assert _same(before, _everything(run))


@SCHEDULES
def test_the_routers_gradient_is_clipped_by_its_own_norm(make_run, schedule):
    run = make_run(sar_schedule=schedule, router_max_grad_norm=1e-3)
    norms = []
    run.routers.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in run.routers.parameters.values()]).norm().item())
    )
    report = run.step(_batches(run, [0, 1]), clip=1e9)
    assert report.routers.router_grad_norm > 2e-3
    assert norms == [pytest.approx(1e-3, rel=1e-4)]


@SCHEDULES
def test_a_router_that_learns_still_costs_one_host_read(make_run, schedule, monkeypatch):
    run = make_run(sar_schedule=schedule, tokenizers="different")
    batches = _batches(run, [0], [1])
    run.teacher.set_experts_implementation("grouped_mm")
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    reads = []
    for name in ("tolist", "item", "cpu", "__bool__", "__float__"):
        plain = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, plain=plain, name=name, **k: reads.append(name) or plain(self, *a, **k)
        )
    run.step(batches)
    monkeypatch.undo()
    assert reads == ["tolist"]


# Recomputed activations


def _saved_bytes(run, batch):
    """Bytes that the teacher's graph saves for the backward, with the inputs of recomputed layers."""
    kept = {}

    def keep(tensor):
        if not any(tensor.data_ptr() == p.data_ptr() for p in run.teacher.parameters()):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def keep_input(module, args):
        keep(args[0])

    inputs = [layer.register_forward_pre_hook(keep_input) for layer in run.teacher.model.layers]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run.teacher.model(input_ids=batch.teacher.input_ids, use_cache=False)
    for handle in inputs:
        handle.remove()
    assert output.last_hidden_state.requires_grad
    return sum(kept.values())


@SCHEDULES
@HALF_OR_FLOAT
def test_recomputed_activations_give_the_same_step_in_a_fraction_of_the_memory(make_run, schedule, dtype):
    plain, anew = (make_run(dtype=dtype, sar_schedule=schedule, tokenizers="different") for _ in range(2))
    assert recompute_activations_(anew.teacher) == 2
    reports = [run.step(_batches(run, [0], [1])) for run in (plain, anew)]
    assert reports[0] == reports[1]
    assert _same(_everything(plain), _everything(anew))
    assert not any(module.training for module in anew.teacher.modules())


def test_recomputation_saves_less_than_a_quarter_for_the_backward(make_run):
    plain, anew = make_run(tokenizers="different"), make_run(tokenizers="different")
    recompute_activations_(anew.teacher)
    (batch,) = _batches(plain, range(8))
    assert 0 < _saved_bytes(anew, batch) < _saved_bytes(plain, batch) / 4
