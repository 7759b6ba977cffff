"""What float16 does to a distillation, and what this program does about it: each scenario on the real step and, for
comparison, on the loop that a tutorial would write. `python benchmarks/stress.py` makes the table of all of them.
"""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from sar_kd.config.command_line import parse
from sar_kd.config.presets import FP16_SAFE
from sar_kd.config.sections import LossConfig, OptimConfig
from sar_kd.errors import UsageError
from sar_kd.evaluation.perplexity import evaluate
from sar_kd.models.loading import Models, load_models
from sar_kd.preflight.clamp_checks import check_clamps
from sar_kd.training.nan_forensics import examine
from sar_kd.training.optimizer import build_optimizer, parameters_of
from tests.stress.harness import all_finite, break_forward, break_on_token, norm_of, same_bits, token_of

FREE = {"logit_clamp_style": "off", "loss_clamp_style": "off"}
NO_LIMIT = {"skip_grad_norm": 1e9, "max_grad_norm": 1e9}
HALF = torch.float16


class NaiveLoop:
    """Autocast, GradScaler, mean cross-entropy, clip, step; clamps and limits where one would first put them.

    logit_clamp  clamp(z, -c, c) before the loss; loss_cap: clamp(loss, max=cap)
    skip_above   no update if norm > skip_above; stop_after: gives up after so many refused updates in a row
    clip_first   clips before it unscales; scales: False leaves the GradScaler disabled
    kd           a function of the student's and the teacher's logits that is added to the loss
    """

    def __init__(
        self, run, *, lr=1e-3, logit_clamp=None, loss_cap=None, skip_above=None, stop_after=None, clip=0.5,
        clip_first=False, scales=True, scale=65536.0, kd=None, factor=1.0, optimizer=None,
    ):  # fmt: skip
        self.run, self.student, self.kd, self.factor = run, run.student, kd, factor
        self.logit_clamp, self.loss_cap, self.skip_above, self.clip = logit_clamp, loss_cap, skip_above, clip
        self.clip_first, self.stop_after = clip_first, stop_after
        self.optimizer = optimizer or torch.optim.AdamW(run.student.parameters(), lr=lr)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scales)
        self.loss = self.norm = math.nan
        self.bad_in_a_row, self.updates, self.shown = 0, 0, []

    @property
    def stopped(self) -> bool:
        return self.stop_after is not None and self.bad_in_a_row >= self.stop_after

    def micro_loss(self, batch):
        tokens = batch.student
        with self.run.precision.autocast():
            logits = self.student(input_ids=tokens.input_ids, use_cache=False).logits
            if self.logit_clamp:
                logits = logits.clamp(-self.logit_clamp, self.logit_clamp)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens.labels[:, 1:].flatten())
            if self.kd:
                with torch.no_grad():
                    teacher = self.run.teacher(input_ids=batch.teacher.input_ids, use_cache=False).logits
                loss = loss + self.kd(logits, teacher)
        return loss.clamp(max=self.loss_cap) if self.loss_cap else loss

    def step(self, batches) -> float:
        """One update; the loss that it would print."""
        losses = [self.micro_loss(batch) * self.factor for batch in batches]
        for loss in losses:
            self.scaler.scale(loss / len(losses)).backward()
        if not self.clip_first:
            self.scaler.unscale_(self.optimizer)
        self.norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.clip).item()
        moves = []
        if self.skip_above is None or not self.norm > self.skip_above:
            with self.optimizer.register_step_post_hook(lambda *_: moves.append(1)):
                self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.updates += len(moves)
        self.bad_in_a_row = 0 if moves else self.bad_in_a_row + 1
        self.loss = torch.stack(losses).mean().item()
        self.shown.append(self.loss)
        return self.loss

    def steps(self, count, batches):
        for _ in range(count):
            if self.stopped:
                break
            self.step(batches)
        return self

    @property
    def nan_share(self) -> float:
        """Share of the weights that are not finite."""
        weights = torch.cat([parameter.detach().flatten() for parameter in self.student.parameters()])
        return (~weights.isfinite()).float().mean().item()


def ce_of(run, batches) -> float:
    """The raw cross-entropy of some batches, nats per token."""
    return run._reference(batches)[0]


def _named(error) -> str:
    return f"{type(error).__name__}: {str(error).split('.')[0]}"


# 1 to 10: what the guards themselves do to learning


def test_01_a_fresh_student_learns_although_its_cross_entropy_exceeds_the_cap(make_run, row):
    naive = NaiveLoop(make_run(rows=2048), lr=1e-2, loss_cap=6.0)
    batches = naive.run.batches([0, 1], [2, 3])
    before = ce_of(naive.run, batches)
    naive.steps(12, batches)
    after = ce_of(naive.run, batches)
    assert (set(naive.shown), naive.norm) == ({6.0}, 0.0)
    assert after == pytest.approx(before, abs=0.01)

    run = make_run(rows=2048, lr=1e-2)
    totals = [run.objective(batch).total.item() / batch.num_target_tokens for batch in batches]
    reports = [run.step(batches) for _ in range(12)]
    assert reports[0].ce_loss > math.log(2000)
    assert all(0 < total <= 6.0 + 1e-5 for total in totals)
    assert reports[-1].ce_loss < reports[0].ce_loss - 1.0
    row(
        "fresh student, CE above the cap of 6",
        f"`clamp(loss, max=6)`: prints 6.000, gradient 0, CE {before:.2f} -> {after:.2f}",
        f"capped value, gradient kept: CE {reports[0].ce_loss:.2f} -> {reports[-1].ce_loss:.2f} in 12 steps",
    )


def _uncentred(run, offset=-35.0):
    """Give the student's head a bias, as some checkpoints have it in effect."""
    head = nn.Linear(run.student.lm_head.in_features, run.student.lm_head.out_features)
    head.weight.data.copy_(run.student.lm_head.weight.data)
    head.bias.data.fill_(offset)
    run.student.lm_head = head
    return run


def _rebuilt(run, **changes):
    """The same run after its student was changed."""
    settings = dataclasses.replace(run.loss, **changes)
    parts = run.dataset, run.student, run.teacher, run.precision, settings, run.guard.settings
    return type(run)(*parts, run.optim.student_lr)


def test_02_logits_without_a_centre_teach_and_a_literal_clamp_of_them_is_refused(make_run, row):
    naive = NaiveLoop(_uncentred(make_run(head=20.0)), logit_clamp=5.0)
    batches = naive.run.batches([0, 1])
    naive.step(batches)
    uniform = math.log(naive.student.config.vocab_size)
    assert naive.loss == pytest.approx(uniform, rel=1e-3)
    assert naive.norm == 0.0

    run = _rebuilt(_uncentred(make_run(lr=1e-2)))
    models = Models(run.teacher, run.student, run.dataset.pair, False)
    literal = LossConfig(logit_clamp_style="raw")
    with pytest.raises(UsageError, match="100% of the student's logits"):
        check_clamps(literal, models, run.dataset, run.precision, 6.0)
    bound = run.objective(*batches).total.item() / batches[0].num_target_tokens
    reports = run.steps(8, [0, 1])
    assert 0 < bound <= 6.0 + 1e-5
    assert reports[0].grad_norm > 0.1
    assert reports[-1].ce_loss < reports[0].ce_loss - 0.5
    row(
        "un-centred logits (-35), clamped to ±5",
        f"uniform: loss {naive.loss:.2f} = ln V, gradient 0",
        f"clamp after centring: CE {reports[0].ce_loss:.2f} -> {reports[-1].ce_loss:.2f} in 8 steps; the literal clamp "
        "is refused at the start (100% saturated)",
    )


def test_03_norms_above_the_limit_from_the_first_step_are_recognised_and_learned_from(make_run, row):
    naive = NaiveLoop(make_run(head=6.0), skip_above=2.0)
    batches = naive.run.batches([0])
    before = ce_of(naive.run, batches)
    naive.steps(30, batches)
    assert (naive.updates, ce_of(naive.run, batches)) == (0, before)

    run = make_run(head=6.0, lr=1e-2)
    reports = run.steps(20, [0])
    assert reports[0].grad_norm > 2.0
    assert {report.verdict.cause for report in reports} == {None}
    assert reports[-1].ce_loss < reports[0].ce_loss - 0.5
    spikes = make_run(head=6.0)
    spikes.guard.load_state_dict(run.guard.state_dict())
    spikes.attempts = run.attempts
    for parameter in spikes.student.parameters():
        parameter.register_hook(lambda gradient: gradient * 1e3)
    refused, judged_alike, rising = spikes.steps(3, [0])
    assert refused.verdict.cause == "norm"
    assert judged_alike.verdict.applied  # the same norm again is the weights', not the batch's
    assert rising.verdict.norm_limit > 10 * refused.verdict.norm_limit
    row(
        "gradient norm above 2.0 from the start",
        "`if norm > 2: skip`: 30 of 30 skipped, CE unchanged",
        f"no step skipped, the limit follows the median: CE {reports[0].ce_loss:.2f} -> "
        f"{reports[-1].ce_loss:.2f} in 20 steps; a thousandfold spike is still refused",
    )


def test_04_logits_that_overflow_are_seen_before_any_clamp_hides_them(make_run, row):
    naive = NaiveLoop(make_run(head=3e5), logit_clamp=5.0)
    batches = naive.run.batches([0])
    naive.step(batches)
    assert math.isfinite(naive.loss)
    assert naive.norm == 0.0

    for style in ("raw", "normalized", "off"):
        run = make_run(head=3e5, loss={"logit_clamp_style": style})
        assert run.steps(1, [0])[0].verdict.cause == "forward"
    found = examine(run.student, batches[0], run.precision)
    assert (found["first_bad_module"]["name"], found["verdict"]) == ("lm_head", "fp16 range")
    row(
        "logits overflow (a head 3e5 times too large)",
        f"clamped to ±5: loss {naive.loss:.2f}, gradient 0, no warning",
        "refused as `forward`, whatever the clamp; `lm_head` named, float32 finite",
    )


def test_a_masked_token_is_no_bad_forward_and_a_masked_target_is_one(make_run, row):
    """Probability 0: of a token that is no target it is a value like any other, of a target its loss is infinite."""

    def masking(is_target):
        run = make_run(loss={"alpha_kd": 0.0})
        (batch,) = run.batches([0])
        targets = set(batch.student.targets.tolist())
        token = next(i for i in range(3, 99) if (i in targets) == is_target)

        def mask(module, inputs, output):
            return output.index_fill(-1, torch.tensor([token]), -math.inf)

        run.student.lm_head.register_forward_hook(mask)
        return run, batch

    run, batch = masking(is_target=True)
    naive = NaiveLoop(run, kd=None)
    naive.step([batch])
    assert naive.loss == math.inf

    run, batch = masking(is_target=True)
    assert run.step([batch]).verdict.cause == "forward"
    run, batch = masking(is_target=False)
    report = run.step([batch])
    assert report.verdict.applied
    assert math.isfinite(report.ce_loss)
    row(
        "one token's logit is -inf, cross-entropy alone",
        f"loss {naive.loss:.2f} where it is a target",
        "refused as `forward` where it is a target, applied where it is none",
    )


def test_a_logit_that_overflows_where_a_raw_clamp_hides_it_is_a_bad_forward(make_run, row):
    def overflowing():
        run = make_run(loss={"alpha_kd": 0.0, "logit_clamp_style": "raw"})
        (batch,) = run.batches([0])
        token = next(i for i in range(3, 99) if i not in batch.student.targets)

        def overflow(module, inputs, output):
            return output.index_fill(-1, torch.tensor([token]), math.inf)

        run.student.lm_head.register_forward_hook(overflow)
        return run, batch

    run, batch = overflowing()
    naive = NaiveLoop(run, logit_clamp=5.0, kd=None)
    naive.step([batch])
    assert math.isfinite(naive.loss)

    run, batch = overflowing()
    assert run.step([batch]).verdict.cause == "forward"
    row(
        "one token's logit is +inf, clamped to ±5, cross-entropy alone",
        f"loss {naive.loss:.2f}, the overflow is not seen",
        "refused as `forward`: logits are checked before the clamp",
    )


def test_05_one_batch_that_overflows_costs_one_step_and_no_loss_scale(make_run, row):
    def spoiled():
        run = make_run()
        break_on_token(run.student, token_of(run, 0, 1, 2))
        return run

    naive = NaiveLoop(spoiled(), scale=16384.0)
    for block in (1, 0, 2):
        naive.step(naive.run.batches([block]))
    mean = sum(naive.shown) / 3
    assert math.isnan(mean)
    assert naive.scaler.get_scale() == 8192.0

    run = spoiled()
    causes = [run.steps(1, [block])[0].verdict.cause for block in (1, 0, 2)]
    assert causes == [None, "forward", None]
    assert (run.scale, run.guard.consecutive_nan_batches, run.guard.max_consecutive_nan_batches) == (16384.0, 0, 1)
    row(
        "one batch with an activation of inf",
        "mean loss nan for the rest of the epoch, loss scale halved for no overflow of the gradient",
        "one skip (`forward`), loss scale kept, the count of NaN batches back at 0",
    )


def test_06_an_overflow_of_the_gradients_alone_is_calibration_and_never_an_emergency(make_run, row):
    naive = NaiveLoop(make_run(), factor=1e5, stop_after=10)
    naive.steps(30, naive.run.batches([0]))
    assert (naive.stopped, naive.updates) == (True, 0)
    assert math.isfinite(naive.loss)

    run = make_run(scale=65536.0, loss=FREE | {"alpha_ce": 1e5}, guards=NO_LIMIT)
    verdicts = [report.verdict for report in run.steps(24, [0])]
    overflows = run.guard.skipped["overflow"]
    assert overflows > 10
    assert [verdict.cause for verdict in verdicts] == ["overflow"] * overflows + [None] * (24 - overflows)
    assert (run.guard.max_consecutive_nan_batches, any(verdict.emergency for verdict in verdicts)) == (0, False)
    assert 65536.0 / run.scale == 2.0**overflows
    row(
        "only the gradients overflow (loss x 1e5)",
        "counted as NaN: stopped after 10 steps without an update",
        f"{overflows} skips named `overflow`, scale {run.scale:g}, then every step applied",
    )


def test_07_a_forward_that_is_never_finite_stops_the_run_with_the_last_good_weights(make_run, row):
    naive = NaiveLoop(make_run())
    bad = [True]
    break_forward(naive.student.lm_head, lambda: bad[0], math.nan)
    batches = naive.run.batches([0])
    naive.steps(166, batches)
    scale, bad[0] = naive.scaler.get_scale(), False
    naive.step(batches)
    assert scale == 0.0
    assert naive.nan_share > 0.5

    run, bad = make_run(), [False]
    break_forward(run.student.lm_head, lambda: bad[0], math.nan)
    run.steps(1, [0])
    good, bad[0] = run.tensors(), True
    verdicts = [report.verdict for report in run.steps(10, [0])]
    assert [verdict.emergency for verdict in verdicts] == [False] * 9 + [True]
    assert {verdict.cause for verdict in verdicts} == {"forward"}
    assert same_bits(good, run.tensors())
    assert run.scale == 16384.0
    row(
        "every forward is NaN",
        f"166 batches halve the scale to {scale:g}; the next sound batch makes {naive.nan_share:.0%} of the weights "
        "NaN",
        "stops at the 10th (exit code 3), weights and scale as after the last good step",
    )


def test_08_nine_nan_batches_are_forgiven_by_a_good_one_and_reported_when_they_are_frequent(make_run, row):
    pattern = [True] * 9 + [False] + [True] * 9
    naive, bad = NaiveLoop(make_run()), [False]
    break_forward(naive.student.lm_head, lambda: bad[0], math.nan)
    batches = naive.run.batches([0])
    for bad[0] in pattern:
        naive.step(batches)
    assert naive.scaler.get_scale() == 65536.0 / 2**18

    run, bad = make_run(), [False]
    break_forward(run.student.lm_head, lambda: bad[0], math.nan)
    verdicts = []
    for bad[0] in pattern:
        verdicts += [run.step(batches).verdict]
    assert not any(verdict.emergency for verdict in verdicts)
    assert [i for i, verdict in enumerate(verdicts) if verdict.frequent_nan] == [10]
    assert (run.guard.applied, run.guard.max_consecutive_nan_batches, run.scale) == (1, 9, 16384.0)
    row(
        "9 NaN batches, 1 good, 9 NaN",
        f"silent; loss scale 65536 -> {naive.scaler.get_scale():g}",
        "no stop, the 10th within 50 is reported; loss scale kept",
    )


def test_09_a_batch_without_a_target_is_no_nan_batch(make_run, row, without_targets):
    naive = NaiveLoop(make_run())
    (batch,) = naive.run.batches([0])
    naive.step([without_targets(batch)])
    assert math.isnan(naive.loss)

    run = make_run()
    report = run.step([without_targets(batch)])
    assert (report.verdict.cause, report.loss, run.guard.max_consecutive_nan_batches) == ("no_targets", 0.0, 0)
    row("all labels masked", "loss nan", "skipped as `no_targets`, no NaN batch, loss 0 of 0 tokens")


def test_10_a_micro_batch_without_a_target_leaves_the_step_as_it_is_without_it(make_run, row, without_targets):
    naive = NaiveLoop(make_run())
    batch, other = naive.run.batches([0], [1])
    naive.step([batch, without_targets(batch), other])
    assert math.isnan(naive.loss)

    run, without = make_run(), make_run()
    reports = run.step([batch, without_targets(batch), other]), without.step([batch, other])
    assert reports[0] == reports[1]
    assert same_bits(run.applied_gradients, without.applied_gradients)
    row("all labels masked in 1 of 3 micro-batches", "loss of the step nan", "the step's gradient, bit for bit")


# 11 to 20: what half precision does to sums, masks, weights and targets


def test_11_one_nan_micro_batch_of_four_refuses_the_step_and_spoils_no_later_one(make_run, row):
    naive = NaiveLoop(make_run(), scales=False)
    break_on_token(naive.student, token_of(naive.run, 0, 1, 2, 3), math.nan)
    naive.step(naive.run.batches([1], [2], [0], [3]))
    assert naive.nan_share > 0.5

    run, clean = make_run(), make_run()
    break_on_token(run.student, token_of(run, 0, 1, 2, 3), math.nan)
    report = run.steps(1, [1], [2], [0], [3])[0]
    assert report.verdict.cause == "forward"
    assert run.scale == 16384.0
    for each in (run, clean):
        each.steps(1, [1], [2], [3])
    assert same_bits(run.applied_gradients, clean.applied_gradients)
    row(
        "1 NaN micro-batch of 4",
        f"without a GradScaler {naive.nan_share:.0%} of the weights NaN after one step",
        "step refused before any weight changes; the next step's gradient bit for bit that of a clean run",
    )


def _padded_left(tokens, pads, minimum, dtype):
    """Tokens behind `pads` padding positions, and an additive mask [1, 1, T, T] that hides the padding."""
    ids = F.pad(tokens.input_ids, (pads, 0))
    width = ids.shape[1]
    hidden = torch.ones(width, width, dtype=torch.bool).triu(1)
    mask = torch.zeros(width, width).masked_fill(hidden, minimum).to(dtype)
    mask = mask + torch.zeros(width).masked_fill(torch.arange(width) < pads, minimum).to(dtype)
    return ids, mask[None, None]


def test_12_padding_is_read_by_no_position_and_changes_no_loss(make_run, row):
    run = make_run(config={"num_hidden_layers": 2, "attn_implementation": "eager"})
    (batch,) = run.batches([0])
    ids, mask = _padded_left(batch.student, 3, -math.inf, torch.float32)
    with torch.no_grad(), run.precision.autocast():
        naive = run.student(input_ids=ids, attention_mask=mask, use_cache=False).logits
    share = naive.isnan().any(-1).float().mean().item()
    assert share == 1.0

    shortest, longest = sorted(range(len(run.dataset)), key=lambda i: len(run.dataset.batch([i]).student.targets))[::68]
    (batch,) = run.batches([shortest, longest])
    width = len(run.dataset.batch([shortest]).student.targets) + 1
    assert width < batch.student.input_ids.shape[1]
    noise = batch.student.input_ids.clone()
    noise[0, width:] = torch.randint(5, 500, noise[0, width:].shape)
    other = make_run(config={"num_hidden_layers": 2, "attn_implementation": "eager"})
    one = run.step([batch])
    tokens = dataclasses.replace(batch.student, input_ids=noise)
    two = other.step([dataclasses.replace(batch, student=tokens, teacher=tokens)])
    assert one.verdict.applied
    assert one == two
    row(
        "rows of padding, eager attention",
        f"left padding, mask of -inf: {share:.0%} of the positions NaN after two layers",
        "right padding and no mask: what stands in the padding changes no bit",
    )


def test_13_the_mask_of_a_half_precision_teacher_is_in_its_range(make_run, row):
    run = make_run(config={"attn_implementation": "eager"}, dtype=HALF)
    run.teacher.set_attn_implementation("eager")
    (batch,) = run.batches([0, 1])
    lowest = torch.finfo(torch.float32).min
    ids, mask = _padded_left(batch.teacher, 3, lowest, HALF)
    with torch.no_grad(), run.precision.autocast():
        naive = run.teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits
    share = naive.isnan().any(-1).float().mean().item()
    assert torch.tensor(lowest).half().item() == -math.inf
    assert share > 0.1

    report = run.step([batch])
    assert (report.verdict.applied, report.teacher_rows_dropped) == (True, 0)
    row(
        "mask of finfo(float32).min in half",
        f"-inf, {share:.0%} of the teacher's positions NaN",
        "the models make their own mask in their own dtype: no row dropped",
    )


class _WrittenByHand(nn.Module):
    """An RMSNorm as one writes it: in the dtype that it is handed."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.data.clone())

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)


def _with_handwritten_norms(run, size):
    model = run.student.model
    model.norm = _WrittenByHand(model.norm.weight)
    layer = model.layers[0]
    layer.input_layernorm = _WrittenByHand(layer.input_layernorm.weight)
    layer.post_attention_layernorm = _WrittenByHand(layer.post_attention_layernorm.weight)
    embeddings = run.student.get_input_embeddings().weight.data
    embeddings.mul_(size / embeddings.std())
    return _rebuilt(run)


@pytest.mark.parametrize("size", [300.0, 1e-4])
def test_14_a_handwritten_norm_is_handed_float32(make_run, row, size):
    run = _with_handwritten_norms(make_run(guards=NO_LIMIT, scale=64.0), size)
    (batch,) = run.batches([0])
    half = copy.deepcopy(run.student).half()
    normed = half.model.norm(half.get_input_embeddings()(batch.student.input_ids))
    naive = "output 0, silently" if size > 1 else "output inf"
    assert (normed.abs().max().item() == 0.0) if size > 1 else not all_finite([normed])

    reports = run.steps(3, [0])
    assert all(report.verdict.applied for report in reports)
    assert all(gradient.abs().max() > 0 for gradient in run.applied_gradients if gradient.ndim > 1)
    row(
        f"RMSNorm written by hand, inputs of {size:g}",
        f"half weights: {naive}",
        "the residual stream is float32 (weights float32, autocast): every matrix has a finite gradient",
    )


@pytest.fixture(scope="module")
def half_on_disk(tmp_path_factory, make_student, make_teacher, byte_tokenizer):
    """A student and a teacher saved in float16, as hubs hold them."""
    folder = tmp_path_factory.mktemp("half")
    for name, make in (("student", make_student), ("teacher", make_teacher)):
        make(len(byte_tokenizer), num_hidden_layers=1).half().save_pretrained(folder / name)
        byte_tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def loaded(half_on_disk, make_run):
    """A run whose student was read by `load_models` from the half precision files."""
    argv = ["--student_model", str(half_on_disk / "student"), "--teacher_model", str(half_on_disk / "teacher")]
    run = make_run(lr=5e-6)
    models = load_models(parse(FP16_SAFE, argv), run.precision)
    run.student, run.teacher = models.student, models.teacher
    return _rebuilt(run)


def _naive_half(make_run, lr=1e-3, **how):
    run = make_run()
    run.student.half()
    return NaiveLoop(run, lr=lr, **how)


def test_15_a_student_saved_in_half_precision_trains_in_float32(make_run, loaded, row):
    naive = _naive_half(make_run)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients") as error:
        naive.step(naive.run.batches([0]))

    assert {parameter.dtype for parameter in loaded.student.parameters()} == {torch.float32}
    matrices = [parameter for parameter in loaded.teacher.parameters() if parameter.ndim > 1]
    assert {parameter.dtype for parameter in matrices} == {HALF}
    assert loaded.steps(1, [0])[0].verdict.applied
    row("float16 student from disk", f"`{_named(error.value)}`", "float32 weights from the first moment, step applied")


def test_16_adam_in_half_weights_is_refused_and_float32_weights_stay_finite(make_run, loaded, row):
    naive = _naive_half(make_run, scales=False)
    frozen = naive.student.model.layers[0].mlp.up_proj.weight
    frozen.register_hook(torch.zeros_like)  # a weight that this batch does not reach
    naive.step(naive.run.batches([0]))
    share = naive.nan_share
    assert share > 0

    with pytest.raises(AssertionError, match="float32, always"):
        build_optimizer(copy.deepcopy(loaded.student).half(), OptimConfig())
    assert all(report.verdict.applied for report in loaded.steps(3, [0]))
    row(
        "AdamW with eps 1e-8 on half weights",
        f"eps is 0: {share:.0%} of the weights not finite after one step",
        "half weights are refused by the optimizer's builder; loaded ones are float32 and finite",
    )


def test_17_a_small_rate_moves_every_tensor(make_run, loaded, row):
    naive = _naive_half(make_run, scales=False)
    naive.optimizer = torch.optim.AdamW(naive.student.parameters(), lr=5e-6, eps=1e-4)
    norms = [p for p in naive.student.parameters() if p.ndim == 1]
    before = [p.detach().clone() for p in norms]
    naive.steps(12, naive.run.batches([0]))
    moved = sum((a != b).sum().item() for a, b in zip(before, norms, strict=True))
    assert moved == 0

    before = [p.detach().clone() for p in loaded.student.parameters()]
    loaded.steps(2, [0])
    assert all(not torch.equal(a, b) for a, b in zip(before, loaded.student.parameters(), strict=True))
    row(
        "learning rate 5e-6",
        "half weights: after 12 steps 0 of the norms' weights have moved",
        "every trainable tensor moves in 2 steps",
    )


def _peaky(run, deviation):
    """Scale the teacher's head so that its logits have this standard deviation."""
    (batch,) = run.batches([0])
    logits = run._read(run.teacher, batch.teacher)
    run.teacher.lm_head.weight.data.mul_(deviation / logits.std().item())
    return run


def test_18_a_teacher_sure_of_itself_is_compared_in_log_space_in_float32(make_run, row):
    def by_the_book(student, teacher):
        p, q = teacher.softmax(-1), student.softmax(-1)
        return (p * (p.log() - q.log())).sum(-1).mean()

    naive = NaiveLoop(_peaky(make_run(rows=4096), 6.0), kd=by_the_book)
    batches = naive.run.batches([0, 1])
    naive.step(batches)
    teacher_probs = naive.run._read(naive.run.teacher, batches[0].teacher).half().softmax(-1)
    zeros = (teacher_probs == 0).float().mean().item()
    assert math.isnan(naive.loss)
    assert zeros > 0.3

    settings = {"temperature": 1.0, "alpha_kd": 1.0, "alpha_ce": 0.0}
    run = _peaky(make_run(rows=4096, loss=settings, guards=NO_LIMIT), 6.0)
    report = run.step(batches)  # I6 holds it to the float64 reference
    assert report.verdict.applied
    twin = make_run(rows=4096, loss=settings, head=20.0)
    twin.objective.teacher = twin.teacher = copy.deepcopy(twin.student).eval()
    assert twin.step(batches).kd_loss == pytest.approx(0.0, abs=1e-6)
    row(
        "peaky teacher (logits of deviation 6)",
        f"softmax in half: {zeros:.0%} of the probabilities 0, loss nan",
        f"KL {report.kd_loss:.4f} as in float64; KL of a model with itself below 1e-6",
    )


def test_19_the_divergence_is_per_token_whatever_the_shape_of_the_batch(make_run, row):
    seen = []

    def batchmean(student, teacher):
        seen.append(F.kl_div(student.float().log_softmax(-1), teacher.float().softmax(-1), reduction="batchmean"))
        return seen[-1]

    naive = NaiveLoop(make_run(), kd=batchmean)
    batches = naive.run.batches([0, 1, 2, 3])
    naive.step(batches)
    positions = batches[0].student.input_ids.shape[1]

    settings = {"temperature": 1.0}
    reports = [make_run(loss=settings).step(batches), make_run(loss=settings).steps(1, [0], [1], [2], [3])[0]]
    assert reports[0].kd_loss == pytest.approx(reports[1].kd_loss, rel=1e-4)
    ratio = seen[0].item() / reports[0].kd_loss
    assert ratio > 0.9 * positions
    row(
        "KL by `batchmean` on [B, S, V]",
        f"{seen[0].item():.1f}, {ratio:.0f} times too much",
        f"{reports[0].kd_loss:.3f} per target token, the same in one batch and in four",
    )


def _gradients_of_logits(run, grads):
    """While it is in force, the gradients that reach the half precision logits are added to `grads`."""

    def hook(module, inputs, output):
        if output.requires_grad:
            output.register_hook(grads.append)

    return run.student.lm_head.register_forward_hook(hook)


def _zero_share(grads, batch) -> float:
    """Share of exact zeros in the rows that predict something."""
    assert grads[0].dtype is HALF
    return (grads[0].flatten(0, 1)[batch.student.positions] == 0).float().mean().item()


def test_20_the_loss_scale_keeps_the_teachers_gradient_above_zero(make_run, row):
    def divergence(student, teacher):
        s, t = (z[:, :-1].flatten(0, 1).float().log_softmax(-1) for z in (student, teacher))
        return F.kl_div(s, t, log_target=True, reduction="batchmean")

    blocks, sure = list(range(20)), {"head": 20.0, "teacher_head": 60.0}
    naive = NaiveLoop(make_run(rows=4096, **sure), kd=divergence, scales=False)
    batches, grads = naive.run.batches(blocks), []
    with _gradients_of_logits(naive.run, grads):
        naive.step(batches)
    lost = _zero_share(grads, batches[0])
    assert lost > 0.3

    run = make_run(rows=4096, **sure, scale=65536.0, loss={"alpha_kd": 1.0, "alpha_ce": 0.0}, guards=NO_LIMIT)
    grads.clear()
    with _gradients_of_logits(run, grads):
        report = run.step(batches)
    kept = _zero_share(grads, batches[0])
    assert report.verdict.applied
    assert kept < 1e-3
    row(
        "KD gradient at the half precision logits",
        f"unscaled: {lost:.1%} exact zeros",
        f"loss scale 65536: {kept:.3%}",
    )


# 21 to 30: the order of things


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_21_a_norm_that_is_nan_is_refused(make_run, row, dtype):
    def spoil(run):
        run.student.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
        return run

    naive = NaiveLoop(spoil(make_run(dtype=dtype)), skip_above=2.0, scales=False)
    naive.step(naive.run.batches([0]))
    assert naive.nan_share > 0.5

    run = spoil(make_run(dtype=dtype))
    report = run.steps(1, [0])[0]
    assert math.isnan(report.grad_norm)
    assert report.verdict.cause == ("overflow" if dtype is HALF else "gradient")
    row(
        f"norm of nan ({str(dtype).removeprefix('torch.')})",
        f"`nan > 2.0` is False: stepped, {naive.nan_share:.0%} of the weights NaN",
        f"skipped as `{report.verdict.cause}`",
    )


def test_22_the_norm_is_taken_after_unscaling_over_the_optimizers_parameters(make_run, row):
    naive = NaiveLoop(make_run(), clip_first=True)
    applied = []
    naive.optimizer.register_step_pre_hook(
        lambda *_: applied.append(norm_of([p.grad for p in parameters_of(naive.optimizer)]))
    )
    naive.step(naive.run.batches([0, 1]))
    assert naive.norm > 1e3
    assert applied[0] < 1e-4

    run, exact = make_run(), make_run(dtype=torch.float32)
    stray = nn.Parameter(torch.ones(3))
    run.student.register_parameter("stray", stray)  # not the optimizer's
    stray.grad = torch.full((3,), 1e6)
    reports = [each.steps(1, [0, 1])[0] for each in (run, exact)]
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=0.01)
    assert norm_of(run.applied_gradients) == pytest.approx(min(0.5, reports[0].grad_norm), rel=1e-3)
    assert reports[0].grad_norm > 0.5
    row(
        "clip before unscale",
        f"norm seen {naive.norm:.0f}, norm applied {applied[0]:.1e}",
        f"norm {reports[0].grad_norm:.4f} (float32: {reports[1].grad_norm:.4f}), clipped to 0.5",
    )


def test_23_every_kind_of_skip_leaves_the_scaler_ready_for_the_next_step(make_run, row, without_targets):
    naive = NaiveLoop(make_run())
    naive.scaler.scale(naive.micro_loss(*naive.run.batches([0]))).backward()
    with pytest.raises(AssertionError) as no_checks:
        naive.scaler.update()
    naive.scaler.unscale_(naive.optimizer)  # skipped, without update()
    with pytest.raises(RuntimeError) as twice:
        naive.scaler.unscale_(naive.optimizer)

    run, bad = make_run(), {"forward": False, "gradient": False}
    break_forward(run.student.lm_head, lambda: bad["forward"])
    run.student.lm_head.weight.register_hook(lambda gradient: gradient * (math.inf if bad["gradient"] else 1.0))
    (batch,) = run.batches([0])
    causes = []
    for kind in ("no_targets", "forward", "overflow", None, "norm", "forward", "no_targets", None):
        bad |= {"forward": kind == "forward", "gradient": kind == "overflow"}
        run.guard.settings = dataclasses.replace(
            run.guard.settings, skip_grad_norm=1e-9 if kind == "norm" else 2.0, skip_rule="fixed"
        )
        causes.append(run.step([without_targets(batch) if kind == "no_targets" else batch]).verdict.cause)
    assert causes == ["no_targets", "forward", "overflow", None, "norm", "forward", "no_targets", None]
    assert run.scale == 8192.0
    assert all(parameter.grad is None for parameter in run.student.parameters())
    row(
        "update() without unscale_(); skip without update()",
        f"`{_named(no_checks.value)}`; `{_named(twice.value)}`",
        "8 steps of every kind in a row: each skip is judged, the next step works",
    )


def test_24_the_objectives_parameters_are_updated_with_the_student_or_not_at_all(make_run, row):
    naive = NaiveLoop(make_run())
    head = nn.Linear(8, 8)
    second = torch.optim.AdamW(head.parameters(), lr=1e-3)
    before = head.weight.detach().clone()
    naive.student.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    loss = naive.micro_loss(*naive.run.batches([0])) + head(torch.ones(8)).sum()
    naive.scaler.scale(loss).backward()
    for optimizer in (naive.optimizer, second):
        naive.scaler.step(optimizer)
    naive.scaler.update()
    assert not torch.equal(before, head.weight)

    run = make_run(kind="different", loss={"alignment": "hidden", "alpha_kd": 0.5})
    (projection,) = run.objective.parameters()
    projection.register_hook(lambda gradient: gradient * math.inf)
    assert run.steps(1, [0])[0].verdict.cause == "overflow"  # I2: neither has moved
    row(
        "two sets of weights, the gradients of one overflow",
        "two optimizers: one steps, the other does not",
        "one optimizer and one verdict: neither moves",
    )


def test_25_a_restored_loss_scale_goes_on_where_it_was(make_run, row):
    settings = {"scale": 65536.0, "loss": FREE | {"alpha_ce": 1e3}, "guards": NO_LIMIT}
    straight, restored = make_run(**settings), make_run(**settings)
    naive = NaiveLoop(make_run(), factor=1e3)
    naive.steps(10, naive.run.batches([0]))
    calibrated = naive.scaler.get_scale()
    again = NaiveLoop(naive.run, factor=1e3, optimizer=naive.optimizer)
    again.steps(10, naive.run.batches([0]))
    wasted = 10 - again.updates
    assert calibrated < 65536.0
    assert wasted > 0

    straight.steps(10, [0])
    for part in ("student", "optimizer", "precision", "guard"):
        getattr(restored, part).load_state_dict(copy.deepcopy(getattr(straight, part).state_dict()))
    restored.attempts = straight.attempts
    assert restored.scale == straight.scale < 65536.0
    assert straight.steps(4, [1]) == restored.steps(4, [1])
    assert restored.precision.state_dict()["scaler"] == straight.precision.state_dict()["scaler"]
    assert same_bits(straight.tensors(), restored.tensors())
    row(
        "resumed run",
        f"scale {calibrated:g} forgotten: {wasted} steps wasted on finding it again",
        "scale, growth count, weights and the next losses bit for bit",
    )


def _evaluate(run, groups):
    batches = [run.dataset.batch(list(group)).student for group in groups]
    return evaluate(run.student, batches, 1000, run.precision)


def test_26_perplexity_weighs_tokens_and_may_be_nan_or_inf(make_run, row):
    run = make_run(head=20.0)
    lengths = sorted(range(len(run.dataset)), key=lambda i: len(run.dataset.batch([i]).student.targets))
    groups = [[lengths[0]], lengths[-4:]]
    means = [ce_of(run, run.batches(group)) for group in groups]
    by_batch = math.exp(sum(means) / 2)
    found = _evaluate(run, groups)
    counts = [run.dataset.batch(group).num_target_tokens for group in groups]
    true = math.exp(sum(m * n for m, n in zip(means, counts, strict=True)) / sum(counts))
    assert found.perplexity == pytest.approx(true, rel=0.01)
    assert abs(by_batch / true - 1) > 0.02

    run.student.lm_head.weight.data.mul_(1e4)
    assert _evaluate(run, groups).perplexity == math.inf
    with pytest.raises(OverflowError):
        math.exp(_evaluate(run, groups).loss)
    break_on_token(run.student, token_of(run, groups[0][0], *groups[1]), math.nan)
    assert math.isnan(_evaluate(run, groups).perplexity)
    row(
        "perplexity: unequal batches, nan, CE above 709",
        f"mean over batches {by_batch:.1f}; `math.exp`: OverflowError",
        f"token-weighted {true:.1f}; `nan` as soon as one token is; `inf`",
    )


def test_27_evaluation_is_never_clamped(make_run, row):
    run = make_run(rows=4096, lr=1e-2, loss=FREE, guards=NO_LIMIT)
    run.steps(40, [0])
    (batch,) = run.batches([0])
    with torch.no_grad():
        logits = run.student(input_ids=batch.student.input_ids).logits.flatten(0, 1)[batch.student.positions]
    clamped = F.cross_entropy(logits.clamp(-5, 5), batch.student.targets).exp().item()
    found = _evaluate(run, [[0]]).perplexity
    assert found == pytest.approx(F.cross_entropy(logits.double(), batch.student.targets).exp().item(), rel=1e-6)
    assert clamped > 1.05 * found
    row("perplexity under the ±5 clamp", f"{clamped:.3f}", f"{found:.3f}, from unclamped float32 logits")


def test_28_sums_over_many_tokens_are_exact(make_run, row):
    run = make_run(loss={"alpha_kd": 0.0})
    blocks = [*range(66)] * 8
    batches = run.batches(*(blocks[i : i + 66] for i in range(0, len(blocks), 66)))
    count = sum(batch.num_target_tokens for batch in batches)
    nats = torch.full((count,), 6.4, dtype=HALF)
    naive = _sum_in_half(nats)
    counted = torch.tensor(2048.0).half() + torch.tensor(1.0).half()
    assert (naive, counted.item()) == (math.inf, 2048.0)

    report = run.step(batches)  # I6 holds it to the float64 sum
    assert report.num_target_tokens == count > 10_240
    assert report.verdict.applied
    row(
        f"sum over {count:,} tokens",
        "in half: inf; 2048 + 1 = 2048",
        f"CE {report.ce_loss:.4f} as in float64, {report.num_target_tokens:,} tokens counted",
    )


def _sum_in_half(values) -> float:
    """As an accumulator of that dtype gives it."""
    total = torch.zeros((), dtype=HALF)
    for part in values.split(512):
        total += part.sum()
    return total.item()


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=["inf", "nan"])
@pytest.mark.parametrize("kind", ["equal", "different"])
def test_29_a_teacher_position_that_is_not_finite_is_dropped_and_the_text_still_teaches(make_run, row, kind, value):
    def where_finite(student, teacher):
        s, t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        terms = (t.exp() * (t - s)).sum(-1)
        return torch.where(terms.isfinite(), terms, 0.0).mean()

    def deaf(run):
        own, other = (set(run.dataset.batch([i]).teacher.input_ids[0].tolist()) for i in (0, 1))
        break_on_token(run.teacher, min(own - other), value)
        return run

    naive = NaiveLoop(deaf(make_run()), kd=where_finite, scales=False)
    naive.step(naive.run.batches([0, 1]))
    assert math.isfinite(naive.loss)
    assert naive.nan_share > 0.5

    run = deaf(make_run(kind=kind))
    report = run.steps(1, [0, 1])[0]
    assert report.verdict.applied
    assert 0 < report.teacher_rows_dropped < report.num_target_tokens
    assert report.kd_loss > 0
    row(
        f"{value} in one of the teacher's rows, {kind} tokenizers",
        f"`where(isfinite(kd), kd, 0)`: finite loss, {naive.nan_share:.0%} of the weights NaN",
        f"{report.teacher_rows_dropped} of {report.num_target_tokens} rows left out and counted, step applied",
    )


def test_30_updates_without_a_gradient_are_counted_and_reported(make_run, row):
    naive = NaiveLoop(make_run(rows=2048), loss_cap=6.0, lr=1e-2)
    naive.optimizer = torch.optim.AdamW(naive.student.parameters(), lr=1e-2, weight_decay=0.1)
    weights = list(naive.student.parameters())
    before = norm_of(weights)
    naive.steps(20, naive.run.batches([0]))
    shrunk = norm_of(weights) / before
    assert shrunk < 0.99

    run = make_run(rows=2048, loss={"loss_clamp_style": "hard", "alpha_kd": 0.0}, lr=1e-2)
    verdicts = [report.verdict for report in run.steps(12, [0])]
    assert [i for i, verdict in enumerate(verdicts) if verdict.zero_gradient] == [9]
    assert run.guard.zero_gradient_steps == 12
    row(
        "gradient exactly 0 (a hard clamp)",
        f"silent; weight decay shrinks the weights to {shrunk:.1%} in 20 steps",
        "reported at the 10th in a row, counted in `summary.json` (`zero_gradient_steps`)",
    )


# What users of other programs have reported, as far as a tiny model shows it


def test_report_a_feed_forward_layer_that_overflows_is_named(make_run, row):
    """T5's `wo`, Gemma's and Qwen's `down_proj`."""

    def loud(run):
        run.student.model.layers[0].mlp.down_proj.weight.data.mul_(1e8)
        return run

    naive = NaiveLoop(loud(make_run()))
    naive.steps(20, naive.run.batches([0]))
    assert (naive.updates, math.isfinite(naive.loss)) == (0, False)

    run = loud(make_run())
    report = run.steps(1, [0])[0]
    found = examine(run.student, *run.batches([0]), run.precision)
    assert report.verdict.cause == "forward"
    assert found["first_bad_module"]["name"] == "model.layers.0.mlp.down_proj"
    assert (found["verdict"], found["finite_in_float32"]) == ("fp16 range", True)
    row(
        "T5-like overflow of the feed-forward output",
        f"loss nan, 20 steps without an update or a word, scale {naive.scaler.get_scale():g}",
        "`forward`; names `mlp.down_proj`, float32 finite, remedy: float32 or bfloat16",
    )


def test_report_gpt2_logits_far_below_zero_are_learned_from(make_run, row):
    def lowered(run):
        """A common direction of all embeddings, along which the last norm's bias points away: logits near -80."""
        run.student.transformer.wte.weight.data[:, 0] = 1.0
        run.student.transformer.ln_f.bias.data[0] = -80.0
        return run

    naive = NaiveLoop(lowered(make_run(gpt2=True)), logit_clamp=5.0)
    batches = naive.run.batches([0])
    logits = naive.run._read(naive.student, batches[0].student)
    naive.steps(4, batches)
    assert logits.max() < -60
    assert naive.shown == pytest.approx([math.log(600)] * 4, rel=1e-3)

    run = lowered(make_run(gpt2=True, lr=1e-2, guards={"skip_rule": "adaptive"}))
    reports = run.steps(12, [0])
    assert reports[-1].ce_loss < reports[0].ce_loss - 0.5
    row(
        f"GPT-2 with logits around {logits.mean().item():.0f}",
        f"clamped to ±5: {naive.loss:.3f} = ln V for ever",
        f"CE {reports[0].ce_loss:.2f} -> {reports[-1].ce_loss:.2f} in 12 steps",
    )


def _bf16_pretrained(model):
    """Gemma's kind: a residual stream of 2e5, which every layer's norm takes back."""
    embeddings = model.get_input_embeddings().weight.data
    embeddings.mul_(2e5 / embeddings.std())
    return model


def test_report_activations_of_a_bf16_model_beyond_65504_pass_in_a_float32_residual_stream(make_run, row):
    naive = make_run()
    (batch,) = naive.batches([0])
    half = _bf16_pretrained(naive.student).half()
    with torch.no_grad():
        logits = half(input_ids=batch.student.input_ids).logits
    share = (~logits.isfinite().all(-1)).float().mean().item()
    assert share == 1.0

    run = make_run(loss={"alpha_kd": 0.0})
    _bf16_pretrained(run.student)
    assert all(report.verdict.applied for report in run.steps(3, [0]))
    row(
        "bf16-pretrained, residual stream of 2e5",
        f"`model.half()`: {share:.0%} of the positions not finite",
        "student: float32 residual stream, trains",
    )


def test_report_a_teacher_of_which_nothing_is_finite_stops_the_run(make_run, row):
    """What a half teacher does whose residual stream leaves half's range."""

    def where_finite(student, teacher):
        s, t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        terms = (t.exp() * (t - s)).sum(-1)
        return torch.where(terms.isfinite(), terms, 0.0).mean()

    def silent(run):
        break_forward(run.teacher.model.layers[0], value=math.nan)
        return run

    naive = NaiveLoop(silent(make_run()), kd=where_finite, scales=False)
    naive.step(naive.run.batches([0]))
    assert naive.nan_share > 0.5

    run = silent(make_run())
    before, scale = run.tensors(), run.scale
    reports = run.steps(10, [0])
    assert [report.verdict.cause for report in reports] == ["teacher"] * 10
    assert [report.verdict.emergency for report in reports] == [False] * 9 + [True]
    assert all(report.teacher_rows_dropped == report.teacher_positions > 0 for report in reports)
    assert same_bits(before, run.tensors())
    assert run.scale == scale
    found = examine(run.teacher, *run.batches([0]), run.precision, "teacher")
    row(
        "nothing of the teacher is finite",
        f"`where(isfinite(kd), kd, 0)`: {naive.nan_share:.0%} of the weights NaN after one step",
        f"refused as `teacher`, stops at the 10th, weights as they were; names `{found['first_bad_module']['name']}`",
    )


def test_report_one_step_without_a_teacher_is_no_emergency(make_run):
    bad = {"on": True}
    run = make_run()
    break_forward(run.teacher.model.layers[0], lambda: bad["on"], math.nan)
    causes = []
    for on in [True] * 9 + [False] + [True] * 9:
        bad["on"] = on
        (report,) = run.steps(1, [0])
        causes.append(report.verdict.cause)
        assert not report.verdict.emergency
    assert causes == ["teacher"] * 9 + [None] + ["teacher"] * 9


def test_report_reverse_kl_with_vanishing_targets_is_finite(make_run, row):
    def reverse(student, teacher):
        p = student.softmax(-1)
        return (p * (p.log() - teacher.softmax(-1).log())).sum(-1).mean()

    naive = NaiveLoop(_peaky(make_run(rows=2048, head=20.0), 8.0), kd=reverse, scales=False)
    batches = naive.run.batches([0])
    naive.step(batches)
    assert naive.nan_share > 0.5

    settings = {"kd_direction": "reverse", "temperature": 1.0, "alpha_kd": 1.0, "alpha_ce": 0.0}
    run = _peaky(make_run(rows=2048, head=20.0, loss=settings | FREE, guards=NO_LIMIT, lr=1e-2, scale=256.0), 8.0)
    with torch.no_grad():
        t, s = (
            run._read(model, batches[0].student)[batches[0].student.positions].log_softmax(-1)
            for model in (run.teacher, run.student)
        )
    true = (s.exp() * (s - t)).sum(-1).mean().item()
    reports = run.steps(8, [0])
    assert reports[0].kd_loss == pytest.approx(true, rel=1e-4)
    assert all(report.verdict.applied for report in reports)
    assert reports[-1].kd_loss < 0.9 * true
    row(
        "reverse KL, the teacher's probabilities underflow",
        f"loss {naive.loss:g}, {naive.nan_share:.0%} of the weights NaN after one step",
        f"{reports[0].kd_loss:.3f} as in float64, -> {reports[-1].kd_loss:.3f} in 8 steps",
    )


def test_report_an_epsilon_that_is_zero_in_half_is_needed_nowhere(make_run, row):
    def guarded(student, teacher):
        p, q = teacher.softmax(-1), student.softmax(-1)
        return (p * ((p + 1e-8).log() - (q + 1e-8).log())).sum(-1).mean()

    naive = NaiveLoop(_peaky(make_run(rows=2048, head=60.0), 8.0), kd=guarded, scales=False)
    batches = naive.run.batches([0])
    naive.step(batches)
    assert torch.tensor(1e-8).half().item() == 0.0
    assert naive.nan_share > 0.5

    run = _peaky(
        make_run(rows=2048, head=60.0, loss={"temperature": 1.0, "alpha_kd": 1.0}, guards=NO_LIMIT, scale=64.0), 8.0
    )
    report = run.step(batches)
    assert report.verdict.applied
    row(
        "log(p + 1e-8) in half",
        f"1e-8 is 0: {naive.nan_share:.0%} of the weights NaN after one step",
        f"log-softmax in float32, no epsilon: KL {report.kd_loss:.3f} as in float64",
    )


def test_report_a_teacher_with_a_padded_head_teaches_the_shared_tokens(make_run, make_student, row):
    run = make_run()
    (batch,) = run.batches([0])
    wide = make_student(run.student.config.vocab_size + 40, num_hidden_layers=1).half().eval()
    naive = NaiveLoop(run, kd=lambda s, t: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"))
    run.teacher = wide
    with pytest.raises(RuntimeError) as error:
        naive.step([batch])

    run = make_run()
    run.objective.teacher = run.teacher = wide
    report = run.step([batch])
    assert report.verdict.applied
    assert report.kd_loss > 0

    narrow = run.student.config.vocab_size
    run = make_run(rows=narrow + 40)
    run.objective.teacher = run.teacher = make_student(narrow, num_hidden_layers=1).half().eval()
    report = run.step([batch])
    assert report.verdict.applied
    assert report.kd_loss > 0
    row(
        "teacher's head padded by 40 rows, and the student's",
        f"`{_named(error.value)[:60]}`",
        "the shared rows are compared",
    )


# The loss scale's range, and what a loss that overflows by itself is


def test_gradients_that_overflow_at_every_scale_stop_the_run_at_the_floor(make_run, row):
    def spoil(run):
        run.student.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
        return run

    naive = NaiveLoop(spoil(make_run()))
    naive.steps(40, naive.run.batches([0]))
    assert naive.scaler.get_scale() < 1e-6

    run = spoil(make_run(scale=16.0))
    verdicts = [report.verdict for report in run.steps(14, [0])]
    assert [verdict.cause for verdict in verdicts] == ["overflow"] * 4 + ["gradient"] * 10
    assert verdicts[-1].emergency
    assert run.scale == 1.0
    row(
        "gradients overflow at every scale",
        f"scale {naive.scaler.get_scale():.0e} after 40 steps, on its way to 0",
        "scale stays at 1; from there on it counts as `gradient`, emergency stop at the 10th",
    )


def test_the_loss_scale_stops_growing_at_its_ceiling(make_run, row):
    def calm(run):
        for parameter in run.student.parameters():
            parameter.register_hook(torch.zeros_like)
        return run

    naive = NaiveLoop(calm(make_run()), scale=2.0**23)
    naive.scaler.set_growth_interval(1)
    naive.steps(12, naive.run.batches([0]))
    assert naive.scaler.get_scale() > 2.0**30

    run = calm(make_run(scale=2.0**23))
    run.precision._scaler.set_growth_interval(1)
    run.steps(6, [0])
    assert run.scale == 2.0**24
    row(
        "no overflow for very long",
        f"scale {naive.scaler.get_scale():.0e} and growing",
        "scale stays at 2^24",
    )


def test_a_loss_that_is_infinite_over_finite_logits_is_a_bad_forward_and_no_calibration(make_run, row):
    naive = NaiveLoop(make_run(), factor=1e38)
    naive.steps(10, naive.run.batches([0]))
    assert naive.loss == math.inf

    run = make_run(loss=FREE)
    object.__setattr__(run.loss, "alpha_ce", 1e38)  # more than the command line takes
    run.objective.alpha_ce = run.loss.alpha_ce
    report = run.step(run.batches([0, 1]))
    assert report.verdict.cause == "forward"
    assert run.scale == 16384.0
    row(
        "a loss of inf over finite logits",
        f"taken for an overflow: scale 65536 -> {naive.scaler.get_scale():g}",
        "refused as `forward`, scale kept",
    )


def test_a_target_that_the_model_thinks_impossible_counts_as_no_more_than_ten_nats(make_run, row):
    run = make_run(
        head=3e3, scale=4.0, loss={"loss_clamp_style": "off", "alpha_kd": 0.0, "alpha_ce": 1.0}, guards=NO_LIMIT
    )
    naive = NaiveLoop(make_run(head=3e3))
    batches = run.batches([0])
    naive.step(batches)
    assert naive.loss > 20

    total = run.objective(*batches).total.item() / batches[0].num_target_tokens
    report = run.step(batches)
    assert report.ce_loss > 20
    assert 0 < total <= 10.0 + 1e-4
    assert report.grad_norm > 1
    row(
        "targets that the student thinks impossible",
        f"loss {naive.loss:.0f}",
        f"counts as {total:.2f} (log-probability at least -10), reported as {report.ce_loss:.0f}, gradient kept",
    )
