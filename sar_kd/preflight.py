"""Before training: what the settings leave to learn, in figures."""

from __future__ import annotations

import math

import torch

from sar_kd.config import LossConfig, UsageError
from sar_kd.coverage import measure_coverage, name_left_out
from sar_kd.data import Corpus
from sar_kd.guards import raw_clamp_largest_probability, raw_clamp_perplexity_floor
from sar_kd.metrics import few
from sar_kd.models import Models, num_rows
from sar_kd.precision import Precision


def describe(train: Corpus, validation: Corpus, precision: Precision) -> list[str]:
    """What the run is made of, as it was found: device and dtype, text, tokenizers, what had to be left out."""
    rounded = ", each product rounded to half" if precision.emulates else ""
    lines = [
        f"Computing in {str(precision.dtype).removeprefix('torch.')} on {precision.device}{rounded}; "
        "trainable weights are float32",
        f"Text: {train.text.num_bytes / 1e3:,.1f} kB, {train.num_tokens:,} tokens in {len(train)} blocks; "
        f"held out: {validation.text.num_bytes / 1e3:,.1f} kB, {validation.num_tokens:,} tokens",
    ]
    if train.pair.is_exact:
        lines += measure_coverage(train).lines()
    elif train.pair.tables is not None:
        lines.append("A tokenizer changes text: its tokens are placed by characters, and compared by rank alone (uld)")
    sides = ("student",) if train.pair.teacher is train.pair.student else ("student", "teacher")  # or no teacher at all
    for side in (side for side in sides if side in train.text.without_template):
        lines.append(f"The {side}'s tokenizer has no chat template: its conversations read 'User: ... Assistant: ...'")
    truncated = [*train.text.truncated, *validation.text.truncated]
    if truncated:
        lost = train.text.dropped_tokens + validation.text.dropped_tokens
        lines.append(
            f"Cut short {len(truncated)} conversations that exceed a block, by {lost:,} tokens: {few(truncated)}"
        )
    return lines + name_left_out([*train.text.left_out, *validation.text.left_out])


def check_clamps(
    loss: LossConfig, models: Models, validation: Corpus, precision: Precision, start_loss: float
) -> list[str]:
    """Lines to show about clamps taken to the letter; none for the default styles.

    start_loss: the student's validation loss before the first step, nats per token
    Raises: UsageError with the figures, where a clamp leaves nothing to learn and `--force` is not given
    """
    raw, hard = loss.logit_clamp_style == "raw", loss.loss_clamp_style == "hard"
    if not (raw or hard):
        return []
    student_vocab, teacher_vocab = num_rows(models.student), num_rows(models.teacher)
    reasons = reasons_not_to_learn(
        logit_clamp=loss.logit_clamp if raw else None,
        loss_clamp=loss.loss_clamp if hard else None,
        temperature=loss.temperature,
        distils=loss.alpha_kd > 0,
        student_vocab=student_vocab,
        teacher_vocab=teacher_vocab,
        start_loss=start_loss,
        saturated=_saturated_share(models, validation, precision, loss.logit_clamp) if raw else 0.0,
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
def _saturated_share(models: Models, validation: Corpus, precision: Precision, bound: float) -> float:
    batch = next(validation.token_batches("student", 1)).to(precision.device)
    with precision.autocast():
        logits = models.student(input_ids=batch.input_ids, use_cache=False).logits
    return (logits.abs() > bound).float().mean().item()
