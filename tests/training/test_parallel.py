"""Steps of two processes on a CPU beside one process with the joined batch: gradients, verdicts, collectives."""

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sar_kd.config.lora import LoraConfig
from sar_kd.config.runs import OnPolicyConfig
from sar_kd.config.sections import GuardConfig, LossConfig, OptimConfig, TrainConfig
from sar_kd.data.batch import IGNORE_INDEX, Batch, TokenBatch, next_token_targets
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.errors import UsageError
from sar_kd.evaluation.perplexity import shard_batches
from sar_kd.losses.objective import Objective
from sar_kd.models.generation import Generation
from sar_kd.models.lora import add_adapter
from sar_kd.runtime.distributed import SINGLE_PROCESS, join_process_group, sum_and_max
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.tokenizer_pair import TokenizerPair
from sar_kd.training.guards import StepGuard
from sar_kd.training.on_policy import OnPolicy
from sar_kd.training.optimizer import build_optimizer, parameters_of
from sar_kd.training.parallel import SINGLE_DEVICE, build_strategy
from sar_kd.training.rollouts import Prompt
from sar_kd.training.step import StepContext, train_step
from tests.helpers import ranks

CPU = torch.device("cpu")
FLOAT, HALF = torch.float32, torch.float16
RANK = 4
TOLERANCE = {FLOAT: 1e-6, HALF: 1e-5}


def build(process_group, dataset, student, teacher, dtype=FLOAT, parallel="ddp", scale=1024.0, rank=0, **loss):
    """The parts of a step, from the same models and text on every rank; rank: of an adapter."""
    run = SimpleNamespace(dataset=dataset, student=_made_anew(student), precision=Precision(CPU, dtype, scale))
    if rank:
        run.student = add_adapter(run.student.to(dtype), LoraConfig(lora_rank=rank))
    teacher = _made_anew(teacher).requires_grad_(False).eval().to(dtype)
    off = {"logit_clamp_style": "off", "loss_clamp_style": "off"}
    settings = LossConfig(**({"alpha_kd": 0.5, "alpha_ce": 0.5} | off | loss))
    torch.manual_seed(2)
    run.objective = Objective(teacher, run.student, settings, dataset.aligner, run.precision)
    run.strategy = build_strategy(run.objective, TrainConfig(parallel=parallel), process_group)
    run.optimizer = build_optimizer(run.student, OptimConfig(student_lr=1e-3), run.objective.parameters())
    run.guard = StepGuard(GuardConfig(skip_grad_norm=1e9, skip_rule="fixed"))
    run.gradients = []
    run.optimizer.register_step_pre_hook(lambda *_: run.gradients.append(_gradients(run)))
    run.step = lambda batches, clip=1e9: train_step(
        batches,
        StepContext(run.objective, run.optimizer, run.guard, run.precision, clip, strategy=run.strategy),
    )
    return run


def _made_anew(model):
    """A copy; transformers does not know a model that came to this process in a pickle."""
    made = type(model)(model.config)
    for name, part in model.named_modules():
        if isinstance(part, _Experts):
            made.set_submodule(name, copy.deepcopy(part))
    made.load_state_dict(model.state_dict())
    return made


def _gradients(run):
    """Whole gradients; None stays None."""
    return [None if p.grad is None else _full(p.grad) for p in parameters_of(run.optimizer)]


def _full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def _weights(run):
    return [_full(parameter) for parameter in parameters_of(run.optimizer)]


def _state(run):
    return [_full(value) for slots in run.optimizer.state.values() for value in slots.values()]


def _figures(report):
    figures = dataclasses.asdict(report)
    return {**figures, "verdict": report.verdict}


def without_targets(batch):
    none = torch.zeros(0, dtype=torch.int64)
    student = dataclasses.replace(
        batch.student, labels=torch.full_like(batch.student.labels, IGNORE_INDEX), positions=none, targets=none
    )
    return dataclasses.replace(batch, student=student)


def ragged(dataset, blocks, rank):
    """A batch in which only some of the targets count, another share of them on every rank."""
    batch = dataset.batch(blocks)
    labels = batch.student.labels.clone()
    for row in range(len(labels)):
        labels[row, 1 + row + 3 * rank :: 2 + rank] = IGNORE_INDEX
    student = TokenBatch(batch.student.input_ids, labels, *next_token_targets(labels))
    return Batch(student, student, dataset.aligner.align_equal(student.positions), batch.blocks)


@pytest.fixture(scope="module")
def parts(byte_tokenizer, corpus_texts, make_student):
    """Text, student and teacher; equal tokenizers."""
    size = len(byte_tokenizer)
    pair = TokenizerPair(byte_tokenizer, byte_tokenizer, student_vocab_size=size, teacher_vocab_size=size, aligns=False)
    dataset = build_dataset([Document(str(i), text) for i, text in enumerate(corpus_texts)], pair, 24, 60)
    student = make_student(size, num_hidden_layers=2)
    teacher = make_student(size, num_hidden_layers=1, hidden_size=16, intermediate_size=32)
    for model in (student, teacher):
        model.lm_head.weight.data.mul_(20.0)
    return dataset, student, teacher.requires_grad_(False).eval()


def micro_batches(dataset, rank, count=2):
    """Ragged micro-batches of one rank."""
    return [ragged(dataset, [4 * micro + 2 * rank, 4 * micro + 2 * rank + 1], rank) for micro in range(count)]


# The two processes: one pair of them for all the tests below


def _scenarios(rank, dataset, student, teacher):
    process_group, found = join_process_group(), {"collectives": _process_group(join_process_group())}
    parts = dataset, student, teacher
    for parallel in ("ddp", "fsdp"):
        for dtype in (FLOAT, HALF):
            key = f"{parallel} {dtype}"
            run = build(process_group, *parts, dtype, parallel)
            report = run.step(micro_batches(dataset, rank))
            found[f"plain {key}"] = (
                _figures(report),
                run.gradients[:1],
                _weights(run),
                run.precision.state_dict()["scaler"],
            )
            found[f"nan {key}"] = _one_sided_nan(run, rank)
            found[f"overflow {key}"] = _one_sided_overflow(run, rank)
            for name, batches in _with_less(dataset, rank).items():
                run = build(process_group, *parts, dtype, parallel)
                report = run.step(batches)
                found[f"{name} {key}"] = _figures(report), run.gradients[:1], _weights(run)
        for alignment in ("hidden", "uld"):
            run = build(process_group, *parts, FLOAT, parallel, alignment=alignment)
            run.step(micro_batches(dataset, rank))
            found[f"{alignment} {parallel}"] = run.gradients[0]
        run = build(process_group, *parts, FLOAT, parallel)
        run.step(micro_batches(dataset, rank), clip=0.01)
        found[f"clipped {parallel}"] = run.gradients[0]
        run = build(process_group, *parts, FLOAT, parallel)
        found[f"on-policy {parallel}"] = _on_policy_steps(run, [rank])
        for name, usable in RESPONSES.items():
            run = build(process_group, *parts, FLOAT, parallel)
            found[f"{name} {parallel}"] = _step_on_fixed_responses(run, [usable[rank]], rank)
        run = build(process_group, *parts, FLOAT, parallel)
        policy = _on_policy(run, sample_temperature=1.0)
        policy.rollouts.sample_prompt = _only_start
        policy.micro_batches(0, [[0, 1]])
        found[f"sampled {parallel}"] = policy._next["responses"]["0"], torch.get_rng_state()
    torch.manual_seed(rank)  # each rank draws another adapter, of which the first one counts
    run = build(process_group, dataset, student, teacher, HALF, rank=RANK)
    report = run.step(micro_batches(dataset, rank))
    found["adapter"] = _figures(report), run.gradients[0], _weights(run)
    run = build(process_group, dataset, _with_experts(student), teacher)
    run.step(micro_batches(dataset, rank))
    found["experts"] = run.gradients[0]
    with pytest.raises(UsageError, match="--parallel ddp"):
        build(process_group, dataset, _with_experts(student), teacher, parallel="fsdp")
    return found


def _on_policy(run, **settings):
    config = OnPolicyConfig(**{"on_policy_fraction": 1.0, "sample_temperature": 0.0, "max_new_tokens": 23} | settings)
    models = SimpleNamespace(student=run.student)
    return OnPolicy(config, models, run.dataset, (24, 60), run.precision, 0, run.strategy)


def _only_start(block, rng):
    """A prompt of no token but the start."""
    return Prompt(block, 0, 0)


def _on_policy_steps(run, ranks_here):
    """Two greedy steps, the second one with the weights of the first; ranks_here: whose prompts this process has."""
    policy, forwards, counts = _on_policy(run, replay_size=4), [], []
    handle = run.student.get_input_embeddings().register_forward_hook(lambda *_: forwards.append(1))
    for step in range(2):
        made = [[8 * step + 4 * micro + 2 * r + i for r in ranks_here for i in range(2)] for micro in range(2)]
        before = len(forwards)
        batches = policy.micro_batches(step, made)
        counts.append(len(forwards) - before)
        run.step(batches)
        policy.on_step_end(step, None, None)
    handle.remove()
    state = {name: value for name, value in policy.state.items() if name != "sampling_seconds"}
    return state, counts, run.gradients, _weights(run), policy.metrics()


# Of a micro-batch with two prompts on each rank: which of the four responses can be used.
RESPONSES = {
    "three": ((True, True), (False, True)),
    "one": ((False, False), (True, False)),
    "no": ((False, False), (False, False)),
}


def _step_on_fixed_responses(run, usable, rank):
    """A step of one micro-batch whose responses are the same text, as far as they are usable."""
    policy, num_prompts = _on_policy(run), 2 * len(usable)
    policy.rollouts.sample_prompt = _only_start
    first = 2 * rank

    def generate(step, prompts):
        ids = [run.dataset.text.student.ids[40 * p.block : 40 * p.block + 5 + 3 * p.block].tolist() for p in prompts]
        flags = [flag for flags in usable for flag in flags]
        return [Generation(own if flag else [], None, flag) for own, flag in zip(ids, flags, strict=True)]

    policy._generate = generate
    batches = policy.micro_batches(0, [list(range(first, first + num_prompts))])
    report = run.step(batches)
    of_ranks = (
        policy.batches([list(range(2 * r, 2 * r + num_prompts))], r) for r in range(run.strategy.process_group.size)
    )
    targets = [batch.student.targets.tolist() for (batch,) in of_ranks]
    return _figures(report), run.gradients[0], targets, len(batches[0].student.targets)


def _with_less(dataset, rank):
    """Windows in which rank 1 has no target in one micro-batch, or in none, or nobody has any."""
    mine = micro_batches(dataset, rank)
    nothing = list(map(without_targets, mine))
    less = [mine[0], nothing[1]]
    return {"less": less if rank else mine, "idle": nothing if rank else mine, "none": nothing}


def _one_sided_nan(run, rank):
    """A step in which a token that only rank 1 reads has a NaN for an embedding."""
    own, other = (
        set(batch.student.input_ids.flatten().tolist()) for batch in (run.dataset.batch([9]), run.dataset.batch([8]))
    )
    token, before, state = min(own - other), _weights(run), _state(run)
    scale = run.precision.loss_scale.item()
    handle = run.student.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: torch.where((inputs[0] == token)[..., None], math.nan, output)
    )
    report = run.step([run.dataset.batch([8 + rank])])
    handle.remove()
    same = all(map(torch.equal, before, _weights(run))) and all(map(torch.equal, state, _state(run)))
    return _figures(report), same, run.precision.loss_scale.item() == scale


def _one_sided_overflow(run, rank):
    """A step in which a gradient of rank 1 alone is infinite."""

    def overflow(module, inputs, output):
        output.register_hook(lambda grad: grad * math.inf)

    before, scale = _weights(run), run.precision.loss_scale.item()
    handle = run.student.model.norm.register_forward_hook(overflow) if rank else None
    report = run.step(micro_batches(run.dataset, rank))
    if handle is not None:
        handle.remove()
    is_unchanged, after = all(map(torch.equal, before, _weights(run))), run.precision.loss_scale.item()
    good = run.step(micro_batches(run.dataset, rank))
    return _figures(report), is_unchanged, scale, after, _figures(good)


class _Experts(nn.Module):
    """One of three experts for a whole batch, by its first token; the third for none."""

    def __init__(self, width):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, states):
        return self.experts[int(states.detach().sum() > 0)](states)


def _with_experts(student):
    student = copy.deepcopy(student)
    torch.manual_seed(5)
    student.model.layers[1].mlp = _Experts(student.config.hidden_size)
    return student


def _process_group(process_group):
    first = process_group.on_rank_zero(lambda: [process_group.rank])
    try:
        process_group.on_rank_zero(_refuse)
    except UsageError as error:
        refused = str(error)
    return {
        "sum": process_group.all_reduce_sum([process_group.rank + 1, 0.1]),
        "any": [
            process_group.any_rank(False),
            process_group.any_rank(process_group.rank == 1),
            process_group.any_rank(True),
        ],
        "rows": process_group.all_gather(torch.tensor([float(process_group.rank), 2.0])).tolist(),
        "gather": process_group.all_gather_object(f"rank {process_group.rank}"),
        "shared": process_group.broadcast(process_group.rank),
        "first": first,
        "refused": refused,
        "seed": process_group.seed(7),
    }


def _refuse():
    raise UsageError("--flag: no")


@pytest.fixture(scope="module")
def both(parts, tmp_path_factory):
    """What `_scenarios` found on rank 0 and on rank 1."""
    ended = ranks.run(tmp_path_factory.mktemp("scenarios"), _scenarios, *parts)
    assert [end.code for end in ended] == [0, 0], "\n".join(ended[1].err)
    return [end.result for end in ended]


EVERY = pytest.mark.parametrize(
    ("parallel", "dtype"), [(p, d) for p in ("ddp", "fsdp") for d in (FLOAT, HALF)], ids=lambda v: str(v)
)


def _assert_close(gradients, reference, tolerance):
    assert len(gradients) == len(reference)
    for own, alone in zip(gradients, reference, strict=True):
        assert (own is None) == (alone is None)
        if own is not None:
            assert (own - alone).abs().max().item() <= tolerance
    assert max(gradient.abs().max().item() for gradient in reference if gradient is not None) > 10 * tolerance


def joined_micro_batches(dataset):
    return [batch for rank in range(2) for batch in micro_batches(dataset, rank)]


@EVERY
@pytest.mark.slow
def test_the_gradient_is_that_of_one_process_with_the_joined_batch(parts, both, parallel, dtype):
    alone = build(SINGLE_PROCESS, *parts, dtype)
    expected = alone.step(joined_micro_batches(parts[0]))
    for own, gradients, weights, _ in (end[f"plain {parallel} {dtype}"] for end in both):
        _assert_close(gradients[0], alone.gradients[0], TOLERANCE[dtype])
        assert own["num_target_tokens"] == expected.num_target_tokens
        for name in ("loss", "ce_loss", "kd_loss", "grad_norm"):
            assert own[name] == pytest.approx(getattr(expected, name), rel=TOLERANCE[dtype])
        if dtype is FLOAT:
            differences = [(a - b).abs().max().item() for a, b in zip(weights, _weights(alone), strict=True)]
            assert max(differences) <= 1e-5


def test_the_two_ranks_have_a_different_number_of_targets(parts):
    counts = [sum(batch.num_target_tokens for batch in micro_batches(parts[0], rank)) for rank in range(2)]
    assert 0 < counts[0] != counts[1] > 0


@EVERY
def test_both_ranks_have_the_same_weights_and_loss_scale_bit_for_bit(both, parallel, dtype):
    first, second = (end[f"plain {parallel} {dtype}"] for end in both)
    assert all(map(torch.equal, first[2], second[2]))
    assert first[0] == second[0]
    assert first[3] == second[3]


@EVERY
@pytest.mark.parametrize("less", ["less", "idle"])
@pytest.mark.slow
def test_a_rank_without_targets_adds_nothing_and_hangs_nobody(parts, both, parallel, dtype, less):
    alone = build(SINGLE_PROCESS, *parts, dtype)
    expected = alone.step([batch for rank in range(2) for batch in _with_less(parts[0], rank)[less]])
    for own, gradients, _ in (end[f"{less} {parallel} {dtype}"] for end in both):
        _assert_close(gradients[0], alone.gradients[0], TOLERANCE[dtype])
        assert own["num_target_tokens"] == expected.num_target_tokens
        assert own["loss"] == pytest.approx(expected.loss, rel=TOLERANCE[dtype])
    assert all(map(torch.equal, *(end[f"{less} {parallel} {dtype}"][2] for end in both)))


@EVERY
def test_a_step_in_which_no_rank_has_a_target_is_skipped_as_such_by_all(parts, both, parallel, dtype):
    for own, gradients, weights in (end[f"none {parallel} {dtype}"] for end in both):
        assert own["verdict"].cause == "no_targets"
        assert gradients == []
        assert all(map(torch.equal, weights, _weights(build(SINGLE_PROCESS, *parts, dtype))))


@EVERY
def test_a_nan_on_one_rank_is_skipped_by_both_for_the_same_cause_and_changes_no_bit(both, parallel, dtype):
    for report, is_unchanged, keeps_scale in (end[f"nan {parallel} {dtype}"] for end in both):
        assert report["verdict"].cause == "forward"
        assert report["first_nonfinite_rank"] == 1
        assert is_unchanged
        assert keeps_scale


@EVERY
def test_an_infinite_gradient_on_one_rank_is_skipped_by_both_and_lowers_both_loss_scales(both, parallel, dtype):
    for report, is_unchanged, before, after, next_report in (end[f"overflow {parallel} {dtype}"] for end in both):
        assert report["verdict"].cause == ("overflow" if dtype is HALF else "gradient")
        assert is_unchanged
        assert after == (before / 2 if dtype is HALF else 1.0)
        assert next_report["verdict"].applied


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("alignment", ["hidden", "uld"])
def test_every_alignment_has_the_joined_gradient_the_projection_of_hidden_states_too(parts, both, alignment, parallel):
    alone = build(SINGLE_PROCESS, *parts, FLOAT, alignment=alignment)
    alone.step(joined_micro_batches(parts[0]))
    assert len(alone.gradients[0]) == len(list(parts[1].parameters())) + (alignment == "hidden")
    for end in both:
        _assert_close(end[f"{alignment} {parallel}"], alone.gradients[0], 1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_joined_gradient_is_what_is_clipped(both, parallel):
    for end in both:
        norm = torch.stack([gradient.norm() for gradient in end[f"clipped {parallel}"]]).norm().item()
        assert norm == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_on_policy_steps_of_two_ranks_are_those_of_one_process_with_the_joined_batch(parts, both, parallel):
    state, counts, gradients, weights, metrics = _on_policy_steps(build(SINGLE_PROCESS, *parts), [0, 1])
    ended = [end[f"on-policy {parallel}"] for end in both]
    assert ended[0][1] != ended[1][1]  # the ranks have run another number of forwards
    assert max(ended[0][1][0], ended[1][1][0]) == counts[0] > 5
    for own_state, _, own_gradients, own_weights, own_metrics in ended:
        assert own_state == state
        assert own_metrics == metrics
        for own, alone in zip(own_gradients, gradients, strict=True):
            _assert_close(own, alone, 1e-6)
        assert max((a - b).abs().max().item() for a, b in zip(own_weights, weights, strict=True)) <= 1e-5
    assert all(map(torch.equal, ended[0][3], ended[1][3]))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", RESPONSES)
def test_fixed_responses_have_the_joined_gradient_however_few_can_be_used(parts, both, name, parallel):
    expected, gradients, (targets,), _ = _step_on_fixed_responses(build(SINGLE_PROCESS, *parts), RESPONSES[name], 0)
    ended = [end[f"{name} {parallel}"] for end in both]
    for figures, own_gradients, own_targets, _ in ended:
        assert figures["num_target_tokens"] == expected["num_target_tokens"] == len(targets)
        assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert list(itertools.chain(*own_targets)) == targets
        _assert_close(own_gradients, gradients, 1e-6)
    assert [num_targets == 0 for *_, num_targets in ended] == [name == "one", False]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_sample_other_responses_to_equal_prompts_and_all_know_all_of_them(both, parallel):
    (first, state), (second, other_state) = (end[f"sampled {parallel}"] for end in both)
    assert first == second
    assert len(first) == 4
    assert first[0][:1] == first[2][:1]  # the prompt
    assert first[:2] != first[2:]
    assert torch.equal(state, other_state)  # neither has drawn from the generator of training


def test_ranks_train_the_adapter_that_the_first_one_drew_with_the_joined_gradient(parts, both):
    torch.manual_seed(0)
    alone = build(SINGLE_PROCESS, *parts, HALF, rank=RANK)
    expected = alone.step(joined_micro_batches(parts[0]))
    for figures, gradients, weights in (end["adapter"] for end in both):
        assert figures["loss"] == pytest.approx(expected.loss, rel=1e-5)
        _assert_close(gradients, alone.gradients[0], TOLERANCE[HALF])
        assert all(map(torch.equal, weights, both[0]["adapter"][2]))


def test_an_expert_that_one_rank_uses_has_its_gradient_and_one_that_none_uses_has_none(parts, both):
    alone = build(SINGLE_PROCESS, parts[0], _with_experts(parts[1]), parts[2])
    alone.step(joined_micro_batches(parts[0]))
    for end in both:
        _assert_close(end["experts"], alone.gradients[0], 1e-5)
    names = [name for name, _ in alone.student.named_parameters()]
    by_optimizer = {id(p): g for p, g in zip(parameters_of(alone.optimizer), alone.gradients[0], strict=True)}
    used = {name for name, p in alone.student.named_parameters() if by_optimizer[id(p)] is not None}
    assert {name for name in names if "experts.2" in name} == set(names) - used


def test_the_collectives_give_the_same_on_every_rank(both):
    results = [end["collectives"] for end in both]
    assert [result["first"] for result in results] == [[0], None]
    assert {result["refused"] for result in results} == {"--flag: no"}
    for result in results:
        assert result["sum"] == [3.0, 0.2]
        assert result["any"] == [False, True, True]
        assert result["rows"] == [[0.0, 2.0], [1.0, 2.0]]
        assert result["gather"] == ["rank 0", "rank 1"]
        assert result["shared"] == 0
    assert results[0]["seed"] == 7 != results[1]["seed"]


def test_metrics_are_summed_or_their_maximum_is_taken():
    rows = [[1.0, 2.0, 5.0, 3.0], [0.5, math.nan, 7.0, math.inf]]
    sums, largest = sum_and_max(rows, 2)
    assert sums[0] == 1.5
    assert math.isnan(sums[1])
    assert largest == [7.0, math.inf]
    assert sum_and_max([[-0.0, 4.0]], 1) == ([-0.0], [4.0])
    assert math.isnan(sum_and_max([[1.0], [math.nan]], 0)[1][0])


@pytest.mark.parametrize("step", [0, 1, 5])
def test_two_ranks_read_the_blocks_of_one_process_with_twice_the_batch(parts, step):
    dataset = parts[0]
    alone = [batch.blocks for batch in dataset.micro_batches(step, 4, 3, seed=1)]
    by_rank = [[b.blocks for b in dataset.micro_batches(step, 2, 3, seed=1, rank=r, ranks=2)] for r in range(2)]
    assert [first + second for first, second in zip(*by_rank, strict=True)] == alone


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shards_of_an_evaluation_are_equally_many_and_count_every_batch_once(parts, size):
    batches = list(parts[0].token_batches("student", 5))
    groups = [SimpleNamespace(rank=rank, size=size) for rank in range(size)]
    shares = [list(shard_batches(iter(batches), process_group)) for process_group in groups]
    assert {len(part) for part in shares} == {math.ceil(len(batches) / size)}
    targets = sorted(tuple(batch.targets.tolist()) for part in shares for batch in part if len(batch.targets))
    assert targets == sorted(tuple(batch.targets.tolist()) for batch in batches)
    assert all(len(batch.input_ids) for part in shares for batch in part)


def test_one_process_has_a_group_and_a_strategy_that_do_nothing(parts, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert join_process_group() is SINGLE_PROCESS
    assert build(SINGLE_PROCESS, *parts).strategy is SINGLE_DEVICE
    assert build(SINGLE_PROCESS, *parts, parallel="fsdp").strategy is SINGLE_DEVICE
    figures = torch.ones(3)
    assert SINGLE_PROCESS.all_gather(figures).data_ptr() == figures.data_ptr()
    batches = micro_batches(parts[0], 0)
    assert list(SINGLE_DEVICE.accumulate(batches)) == batches
