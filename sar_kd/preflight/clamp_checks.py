"""Refuses clamp settings under which nothing can be learned, and describes the effect of the others."""

from __future__ import annotations

import math

import torch

from sar_kd.alignment.segments import positions_per_tile, split_range
from sar_kd.config.sections import LossConfig
from sar_kd.data.dataset import Dataset
from sar_kd.errors import UsageError
from sar_kd.models.lm_head import LMHeads, forward_to_lm_head
from sar_kd.models.loading import Models, vocab_size_of
from sar_kd.runtime.precision import Precision


def clamp_lines(loss: LossConfig, student_vocab_size: int, teacher_vocab_size: int) -> tuple[list[str], dict]:
    """The effect of the clamps for these vocabularies, as lines and as a record."""
    floor = raw_clamp_perplexity_floor(student_vocab_size, loss.logit_clamp)
    largest = raw_clamp_largest_probability(teacher_vocab_size, loss.logit_clamp, loss.temperature)
    clamp, limit = loss.logit_clamp, loss.loss_clamp
    of_logits = {
        "raw": f"Logits are cut to [-{clamp:g}, {clamp:g}]: training perplexity stays above {floor:.2f}, the teacher's "
        f"largest probability below {largest:.2g}",
        "normalized": f"No log-probability counts for less than {-2 * clamp:g} in the loss; gradients are not changed",
        "off": "Logits are not clamped",
    }
    of_loss = {
        "hard": f"A loss above {limit:g} has no gradient; that of an untrained student is about "
        f"{math.log(student_vocab_size):.2f}",
        "scale": f"A loss above {limit:g} is scaled down to {limit:g}, and its gradient with it",
        "off": "The loss is not clamped",
    }
    record = {"raw_perplexity_floor": floor, "raw_largest_teacher_probability": largest}
    return [of_logits[loss.logit_clamp_style], of_loss[loss.loss_clamp_style]], record


def check_clamps(
    loss: LossConfig,
    models: Models,
    validation: Dataset,
    precision: Precision,
    start_loss: float,
    heads: LMHeads | None = None,
) -> list[str]:
    """Lines about raw and hard clamps; none for the default styles.

    start_loss: the student's validation loss before the first step, nats per token
    heads: LM heads verified earlier
    Raises: UsageError if a clamp leaves nothing to learn and `--force` is not given
    """
    raw = loss.logit_clamp_style == "raw"
    if not raw and loss.loss_clamp_style != "hard":
        return []
    student, teacher = vocab_size_of(models.student), vocab_size_of(models.teacher or models.student)
    saturated = _saturated_share(models, validation, precision, loss, heads) if raw else 0.0
    lines = [f"Forced: {reason}" for reason in require_learnable(loss, student, teacher, start_loss, saturated)]
    if raw:
        floor = raw_clamp_perplexity_floor(student, loss.logit_clamp)
        largest = raw_clamp_largest_probability(teacher, loss.logit_clamp, loss.temperature)
        lines.append(
            f"Raw logit clamp: no training perplexity below {floor:.4f}, no teacher probability above {largest:.4f}"
        )
    return lines


def require_learnable(
    loss: LossConfig,
    student_vocab_size: int,
    teacher_vocab_size: int,
    start_loss: float = 0.0,
    saturated: float = 0.0,
) -> list[str]:
    """The reasons why raw and hard clamps would leave this student nothing to learn; none for other styles.

    start_loss: the student's validation loss before the first step, nats per token
    saturated: share of the student's logits outside the clamp on held-out text
    Raises: UsageError with the first reason, unless `--force` is given
    """
    reasons = []
    if loss.loss_clamp_style == "hard" and start_loss > loss.loss_clamp:
        reasons.append(
            f"--loss_clamp_style hard: the student starts at {start_loss:.2f} nats per token (ln V = "
            f"{math.log(student_vocab_size):.2f}), above --loss_clamp {loss.loss_clamp:g}, where a hard clamp has zero "
            "gradient; use --loss_clamp_style scale"
        )
    if loss.logit_clamp_style == "raw":
        clamp, option, remedy = loss.logit_clamp, "--logit_clamp_style raw:", "; use --logit_clamp_style normalized"
        floor = raw_clamp_perplexity_floor(student_vocab_size, clamp)
        if floor > 1.5:
            reasons.append(
                f"{option} with V = {student_vocab_size} and --logit_clamp {clamp:g} no training perplexity below "
                f"{floor:.2f} can be expressed{remedy}"
            )
        largest = raw_clamp_largest_probability(teacher_vocab_size, clamp, loss.temperature)
        if loss.alpha_kd > 0 and largest < 0.1:
            reasons.append(
                f"{option} with V = {teacher_vocab_size} and --temperature {loss.temperature:g} no teacher "
                f"probability can exceed p = {largest:.4f}{remedy}"
            )
        if saturated > 0.5:
            reasons.append(
                f"{option} {saturated:.0%} of the student's logits lie outside [-{clamp:g}, {clamp:g}] and would have "
                f"no gradient{remedy}"
            )
    if reasons and not loss.force:
        raise UsageError(f"{reasons[0]}, or --force to run anyway")
    return reasons


@torch.no_grad()
def _saturated_share(
    models: Models, validation: Dataset, precision: Precision, loss: LossConfig, heads: LMHeads | None
) -> float:
    """Share of the student's logits outside the clamp, on one held-out block."""
    batch = next(validation.token_batches("student", 1)).to(precision.device)
    head = (heads or LMHeads(precision)).of(models.student)
    logits, _ = forward_to_lm_head(models.student, head, batch.input_ids, precision)
    outside = torch.zeros((), dtype=torch.int64, device=precision.device)
    for positions in split_range(len(logits), positions_per_tile(loss.loss_workspace_mb, logits.vocab_size)):
        outside += (logits.tile(positions).abs() > loss.logit_clamp).sum()
    return outside.item() / (len(logits) * logits.vocab_size)


def raw_clamp_perplexity_floor(vocab_size: int, clamp: float) -> float:
    """Lowest perplexity that logits in [-clamp, clamp] can express.

    1 + (V - 1) * exp(-2 * clamp): the target at +clamp, every other token at -clamp
    """
    return 1.0 + (vocab_size - 1) * math.exp(-2.0 * clamp)


def raw_clamp_largest_probability(vocab_size: int, clamp: float, temperature: float) -> float:
    """Largest probability of one token under softmax at `temperature` of logits in [-clamp, clamp].

    1 / (1 + (V - 1) * exp(-2 * clamp / T))
    """
    return 1.0 / (1.0 + (vocab_size - 1) * math.exp(-2.0 * clamp / temperature))
