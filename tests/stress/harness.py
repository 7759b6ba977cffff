"""What the stress suite runs: the real step with seven invariants watched around it, on tiny models, in true float16.

I1  weights and optimizer state are finite after every step, unless the scenario itself put what is not finite there
I2  a refused step leaves every bit of weights and optimizer state
I3  every refused step has exactly one cause, of those that exist
I4  applied + refused = attempts
I5  the learning rate is a function of the attempt's number alone, whatever was refused before
I6  the reported losses are the unclamped ones: a float64 reference, written from the definition, agrees
I7  the loss scale is within [1, 2^24]
"""

import math

import torch
import transformers

from sar_kd.config.sections import MAX_LOSS_SCALE, MIN_LOSS_SCALE, OptimConfig
from sar_kd.losses.objective import Objective
from sar_kd.training.guards import CAUSES, StepGuard
from sar_kd.training.optimizer import build_optimizer, learning_rate_at, parameters_of, set_learning_rate_
from sar_kd.training.step import StepContext, StepReport, train_step

CPU = torch.device("cpu")
PLANNED_STEPS = 400


class Run:
    """The parts of a real step; `step` attempts one update and asserts the seven invariants."""

    def __init__(self, dataset, student, teacher, precision, loss, guards, lr, optimizer="adamw"):
        self.dataset, self.student, self.teacher, self.precision = dataset, student, teacher, precision
        self.loss, self.clip = loss, guards.max_grad_norm
        torch.manual_seed(2)  # the projection of hidden states, where there is one
        self.objective = Objective(teacher, student, loss, dataset.aligner, precision)
        self.optim = OptimConfig(student_lr=lr, warmup_steps=4, optimizer=optimizer)
        self.optimizer = build_optimizer(student, self.optim, self.objective.parameters())
        self.guard = StepGuard(guards)
        self.attempts, self.applied_gradients = 0, []
        self.optimizer.register_step_pre_hook(self._keep_gradients)

    def _keep_gradients(self, *_):
        self.applied_gradients = [parameter.grad.clone() for parameter in parameters_of(self.optimizer)]

    def batches(self, *groups):
        """A micro-batch of each group of blocks."""
        return [self.dataset.batch(list(group)) for group in groups]

    def tensors(self) -> list[torch.Tensor]:
        """Weights, those of a frozen base too, and optimizer state, copied."""
        weights = dict.fromkeys((*self.student.parameters(), *parameters_of(self.optimizer)))
        state = [torch.as_tensor(value) for slots in self.optimizer.state.values() for value in slots.values()]
        return [tensor.detach().clone() for tensor in [*weights, *state]]

    @property
    def scale(self) -> float:
        return self.precision.loss_scale.item()

    def steps(self, count, *groups) -> list[StepReport]:
        batches = self.batches(*groups)
        return [self.step(batches) for _ in range(count)]

    def step(self, batches) -> StepReport:
        before, reference, skipped = self.tensors(), self._reference(batches), dict(self.guard.skipped)
        rate = learning_rate_at(self.attempts, PLANNED_STEPS, self.optim, self.optim.student_lr)
        set_learning_rate_(self.optimizer, rate)
        context = StepContext(self.objective, self.optimizer, self.guard, self.precision, self.clip)
        report = train_step(batches, context)
        self.attempts += 1
        after = self.tensors()
        if all_finite(before):
            assert all_finite(after), "I1: an update made a weight or the optimizer's state not finite"
        if not report.verdict.applied:
            assert same_bits(before, after), "I2: a refused step changed something"
            assert report.verdict.cause in CAUSES, "I3: a refused step has no known cause"
            grown = {cause: n - skipped.get(cause, 0) for cause, n in self.guard.skipped.items()}
            assert [c for c, n in grown.items() if n] == [report.verdict.cause], "I3: not counted under its cause"
        assert self.guard.applied + sum(self.guard.skipped.values()) == self.attempts, "I4: an attempt is missing"
        assert {group["lr"] for group in self.optimizer.param_groups} == {rate}, "I5: the rate left its course"
        self._assert_raw(report, *reference)
        assert MIN_LOSS_SCALE <= self.scale <= MAX_LOSS_SCALE, "I7: the loss scale left its range"
        return report

    @torch.no_grad()
    def _reference(self, batches) -> tuple[float, float | None]:
        """Cross-entropy and forward KL of the raw logits per target token, in float64; None for another divergence."""
        nats = divergence = torch.zeros((), dtype=torch.float64)
        count = sum(len(batch.student.targets) for batch in batches)
        known = self.loss.kd_direction == "forward" and self.loss.alignment == "auto"
        known &= self.loss.logit_clamp_style != "raw" and self.dataset.pair.tables is None
        for batch in batches:
            if not len(batch.student.targets):
                continue
            student = self._read(self.student, batch.student)[batch.student.positions]
            nats = nats + torch.nn.functional.cross_entropy(student, batch.student.targets, reduction="sum")
            if known and self.loss.alpha_kd:
                teacher = self._read(self.teacher, batch.teacher)[batch.alignment.teacher_positions]
                is_finite = teacher.isfinite().all(1)
                teacher, student = teacher[is_finite], student[is_finite]
                shared = min(teacher.shape[1], student.shape[1])
                t, s = ((z[:, :shared] / self.loss.temperature).log_softmax(-1) for z in (teacher, student))
                divergence = divergence + self.loss.temperature**2 * (t.exp() * (t - s)).sum()
        count = max(1, count)
        return nats.item() / count, divergence.item() / count if known else None

    def _read(self, model, tokens):
        with self.precision.autocast():
            return model(input_ids=tokens.input_ids, use_cache=False).logits.flatten(0, 1).double()

    def _assert_raw(self, report, ce, kd):
        weighed = self.loss.alpha_ce * report.ce_loss + self.loss.alpha_kd * report.kd_loss
        pairs = [(report.ce_loss, ce), (report.loss, weighed)] + ([] if kd is None else [(report.kd_loss, kd)])
        for reported, true in pairs:
            both_bad = not math.isfinite(reported) and not math.isfinite(true)
            assert both_bad or math.isclose(reported, true, rel_tol=1e-4, abs_tol=2e-6), f"I6: {reported}, not {true}"


def all_finite(tensors) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def same_bits(before, after) -> bool:
    """NaN equals NaN: compared as integers."""
    return len(before) == len(after) and all(
        torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
        for a, b in zip(before, after, strict=True)
    )


def norm_of(tensors) -> float:
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm().item()


def build_gpt2(vocab_size: int, **overrides):
    """A tiny GPT-2 with tied embeddings and no dropout, the same weights for the same arguments."""
    settings = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
    settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab_size, **settings | overrides))


def break_forward(module, is_bad=lambda: True, value=math.inf):
    """While `is_bad()`, the module's output is not finite: a fault without touching a weight."""
    return module.register_forward_hook(lambda m, i, out: out * value if is_bad() else out)


def break_on_token(student, token: int, value=math.inf):
    """Reading `token` gives an embedding of `value`."""

    def hook(module, inputs, output):
        return output.masked_fill((inputs[0] == token)[..., None], value)

    return student.get_input_embeddings().register_forward_hook(hook)


def token_of(run, block: int, *others: int) -> int:
    """A token that `block` holds and the other blocks do not."""
    own, *rest = (set(run.dataset.batch([i]).student.input_ids[0].tolist()) for i in (block, *others))
    return min(own.difference(*rest))
