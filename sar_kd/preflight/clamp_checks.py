"""Clamps taken to the letter: what they would leave to learn, in figures, and a refusal where that is nothing."""

from __future__ import annotations

import math

import torch

from sar_kd.alignment.segments import positions_per_tile
from sar_kd.config.sections import LossConfig
from sar_kd.data.dataset import Dataset
from sar_kd.errors import UsageError
from sar_kd.losses.tiled_loss import stretches_of
from sar_kd.models.lm_head import LMHeads, forward_to_lm_head
from sar_kd.models.loading import Models, num_rows
from sar_kd.runtime.precision import Precision


def clamp_lines(loss: LossConfig, student_vocab: int, teacher_vocab: int) -> tuple[list[str], dict]:
    """What the clamps do to these vocabularies, in lines and in figures."""
    floor = raw_clamp_perplexity_floor(student_vocab, loss.logit_clamp)
    largest = raw_clamp_largest_probability(teacher_vocab, loss.logit_clamp, loss.temperature)
    letter = f"perplexity {floor:.2f} or more, teacher at most p = {largest:.2g}"
    bound, fresh = f"Logits in [-{loss.logit_clamp:g}, {loss.logit_clamp:g}]", math.log(student_vocab)
    of_logits = {
        "raw": f"{bound} to the letter: {letter}",
        "normalized": f"{bound}, normalized: no probability is capped (raw: {letter})",
        "off": "Logits are not clamped",
    }
    of_loss = {
        "hard": f"Loss above {loss.loss_clamp:g} has no gradient; a fresh student starts at ln V = {fresh:.2f}",
        "scale": f"Loss above {loss.loss_clamp:g} is scaled down to it, its gradient's direction kept",
        "off": "The loss is not clamped",
    }
    figures = {"raw_perplexity_floor": floor, "raw_largest_teacher_probability": largest}
    return [of_logits[loss.logit_clamp_style], of_loss[loss.loss_clamp_style]], figures


def check_clamps(
    loss: LossConfig,
    models: Models,
    validation: Dataset,
    precision: Precision,
    start_loss: float,
    heads: LMHeads | None = None,
) -> list[str]:
    """Lines to show about clamps taken to the letter; none for the default styles.

    start_loss: the student's validation loss before the first step, nats per token
    heads: of models that have been tried already
    Raises: UsageError with the figures, where a clamp leaves nothing to learn and `--force` is not given
    """
    raw, hard = loss.logit_clamp_style == "raw", loss.loss_clamp_style == "hard"
    if not (raw or hard):
        return []
    student_vocab, teacher_vocab = num_rows(models.student), num_rows(models.teacher or models.student)
    reasons = reasons_not_to_learn(
        logit_clamp=loss.logit_clamp if raw else None,
        loss_clamp=loss.loss_clamp if hard else None,
        temperature=loss.temperature,
        distils=loss.alpha_kd > 0,
        student_vocab=student_vocab,
        teacher_vocab=teacher_vocab,
        start_loss=start_loss,
        saturated=_saturated_share(models, validation, precision, loss, heads) if raw else 0.0,
    )
    if reasons and not loss.force:
        raise UsageError(f"{reasons[0]}, or --force to try all the same")
    notices = [f"Forced: {reason}" for reason in reasons]
    if raw:
        floor = raw_clamp_perplexity_floor(student_vocab, loss.logit_clamp)
        largest = raw_clamp_largest_probability(teacher_vocab, loss.logit_clamp, loss.temperature)
        notices.append(
            f"Raw logit clamp: no training perplexity below {floor:.4f}, no teacher probability above {largest:.4f}"
        )
    return notices


def reasons_not_to_learn(
    *,
    logit_clamp: float | None,
    loss_clamp: float | None,
    temperature: float,
    distils: bool,
    student_vocab: int,
    teacher_vocab: int,
    start_loss: float,
    saturated: float,
) -> list[str]:
    """Why clamps taken to the letter would leave this student nothing to learn; empty if they do not.

    logit_clamp  the bound of a raw logit clamp, None if the clamp has another style
    loss_clamp   the bound of a hard loss clamp, None likewise
    start_loss   the student's validation loss before the first step, nats per token
    saturated    share of the student's logits outside the clamp on held-out text
    """
    reasons = []
    if loss_clamp is not None and start_loss > loss_clamp:
        reasons.append(
            f"--loss_clamp_style hard: the student starts at {start_loss:.2f} nats per token (ln V = "
            f"{math.log(student_vocab):.2f}), above --loss_clamp {loss_clamp:g}, where a hard clamp has zero gradient; "
            "use --loss_clamp_style scale"
        )
    if logit_clamp is not None:
        floor = raw_clamp_perplexity_floor(student_vocab, logit_clamp)
        if floor > 1.5:
            reasons.append(
                f"--logit_clamp_style raw: with V = {student_vocab} and --logit_clamp {logit_clamp:g} no training "
                f"perplexity below {floor:.2f} can be expressed; use --logit_clamp_style normalized"
            )
        largest = raw_clamp_largest_probability(teacher_vocab, logit_clamp, temperature)
        if distils and largest < 0.1:
            reasons.append(
                f"--logit_clamp_style raw: with V = {teacher_vocab} and --temperature {temperature:g} the teacher can "
                f"give no token more than p = {largest:.4f}; use --logit_clamp_style normalized"
            )
        if saturated > 0.5:
            reasons.append(
                f"--logit_clamp_style raw: {saturated:.0%} of the student's logits lie outside "
                f"[-{logit_clamp:g}, {logit_clamp:g}] and would have no gradient; use --logit_clamp_style normalized"
            )
    return reasons


@torch.no_grad()
def _saturated_share(
    models: Models, validation: Dataset, precision: Precision, loss: LossConfig, heads: LMHeads | None
) -> float:
    batch = next(validation.token_batches("student", 1)).to(precision.device)
    head = (heads or LMHeads(precision)).of(models.student)
    readout, _ = forward_to_lm_head(models.student, head, batch.input_ids, precision)
    outside = torch.zeros((), dtype=torch.int64, device=precision.device)
    for rows in stretches_of(len(readout), positions_per_tile(loss.loss_workspace_mb, readout.vocab_size)):
        outside += (readout.tile(rows).abs() > loss.logit_clamp).sum()
    return outside.item() / (len(readout) * readout.vocab_size)


def raw_clamp_perplexity_floor(vocab_size: int, clamp: float) -> float:
    """Lowest perplexity that logits in [-clamp, clamp] can express.

    1 + (V - 1) * exp(-2 * clamp): the target at +clamp, every other token at -clamp
    """
    return 1.0 + (vocab_size - 1) * math.exp(-2.0 * clamp)


def raw_clamp_largest_probability(vocab_size: int, clamp: float, temperature: float) -> float:
    """Largest probability that a softmax at `temperature` of logits in [-clamp, clamp] can give one token.

    1 / (1 + (V - 1) * exp(-2 * clamp / T))
    """
    return 1.0 / (1.0 + (vocab_size - 1) * math.exp(-2.0 * clamp / temperature))
