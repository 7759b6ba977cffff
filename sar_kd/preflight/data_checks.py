"""Warnings about text from which little can be learned, or by which little can be judged; each with its number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from sar_kd.config.fields import RunConfig
from sar_kd.config.sections import LossConfig, TrainConfig
from sar_kd.data.dataset import Dataset
from sar_kd.errors import UsageError
from sar_kd.reporting.comparison import FEWEST_DOCUMENTS
from sar_kd.runtime.console import count_of, first_few
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

_FEW_TOKENS = 1000
"""With a spread of 3 nats a token, the mean of this many is uncertain by 0.1 nats, a tenth of a perplexity."""

_LARGE_OVERLAP = 0.2
"""Share of the held-out text; less than that may be headers and licences that many documents have"""

_MANY_PASSES = 50

_MAX_PASSES_IN_STEP = 1000
"""A text that is repeated within a step adds nothing to its gradient; such a step may take days."""

_WINDOW = 16
"""Tokens in a row that count as the same text; a power of two"""

_MAX_TOKENS = 2**23
"""Training tokens that are compared with the held-out ones: a second's work"""


def text_warnings(
    train: Dataset,
    validation: Dataset,
    settings: TrainConfig,
    num_ranks: int = 1,
    share: float = 1.0,
    is_generated: bool = False,
    has_control: bool = False,
) -> list[str]:
    """A line for each reason why a run with this text teaches or shows little.

    num_ranks: processes, each with micro-batches of its own; share: of the training text that is in `train`
    is_generated: a task made both texts; its held-out questions are new, although answers of one form end alike
    has_control: the run is judged by the held-out documents
    Raises: UsageError if a step reads the training text more than a thousand times
    """
    lines = []
    for what, data, remedy in (
        ("training", train, "there is next to nothing to learn"),
        ("held-out", validation, "its perplexity is uncertain; give more with --validation_file"),
    ):
        if data.num_tokens < _FEW_TOKENS:
            lines.append(f"Warning: the {what} text has only {count_of(data.num_tokens, 'token')}: {remedy}")
    known = 0.0 if is_generated else overlap(train, validation)
    if known >= _LARGE_OVERLAP:
        lines.append(
            f"Warning: {known:.0%} of the held-out text is in the training text too: its perplexity shows what was "
            "memorized; name other text with --validation_file"
        )
    elif repeated := [] if is_generated else repeated_documents(train, validation):
        number, count = len(repeated), count_of(len(validation.text.names), "held-out document")
        lines.append(
            f"Warning: {number} of {count} {'is' if number == 1 else 'are'} in the training text too, word for word "
            f"({first_few(repeated)}): they show what was memorized; leave them out"
        )
    num_documents = len(validation.text.names)
    if has_control and num_documents < FEWEST_DOCUMENTS:
        lines.append(
            f"Warning: {count_of(num_documents, 'held-out document')} cannot show whether the student and its control "
            f"differ by chance; it takes at least {FEWEST_DOCUMENTS}: give more with --validation_file, such as a "
            ".jsonl file, in which each line is a document"
        )
    blocks = settings.per_device_batch_size * settings.grad_accum_steps * num_ranks
    num_blocks = max(1, round(len(train) / share))
    passes = settings.train_steps * blocks / num_blocks
    found = f"the training text has {count_of(num_blocks, 'block')}, and an update takes {blocks:,}"
    if blocks > _MAX_PASSES_IN_STEP * num_blocks:
        option = max(("grad_accum_steps", "per_device_batch_size"), key=lambda name: getattr(settings, name))
        raise UsageError(f"--{option} {getattr(settings, option)}: {found}, the gradient of one pass; lower it")
    if num_blocks < blocks:
        lines.append(
            f"Warning: {found}: each update repeats text; lower --block_size, --per_device_batch_size or "
            "--grad_accum_steps"
        )
    elif passes > _MANY_PASSES:
        steps = count_of(settings.train_steps, "step")
        remedy = "lower --train_steps, or give more text"
        lines.append(f"Warning: {steps} read the training text {passes:,.0f} times; {remedy}")
    return lines


def how_text_is_used(config: RunConfig) -> dict[str, bool]:
    """The last arguments of `text_warnings` for a run."""
    return {"is_generated": bool(config.data.task), "has_control": bool(getattr(config, "has_control", False))}


def alignment_warnings(pair: TokenizerPair, loss: LossConfig) -> list[str]:
    """Lines where the student would not be taught how to spell what the teacher knows, and where all of the teacher's
    tokens are among its top k.
    """
    lines, num_tokens = list[str](), pair.num_teacher_tokens
    if loss.teacher_top_k >= num_tokens and loss.alpha_kd > 0 and loss.alignment != "hidden":
        lines.append(f"--teacher_top_k {loss.teacher_top_k}: has no effect, as the teacher has {num_tokens:,} tokens")
    if pair.equal or loss.alpha_ce > 0 or loss.alignment not in ("auto", "projection"):
        return lines
    return [
        *lines,
        "Warning: --alpha_ce 0 between different tokenizers: of several student tokens that begin with one token of "
        "the teacher ('.' and '.t') only their sum is taught, so the student may write any of them; give --alpha_ce "
        "some weight, such as 0.1",
    ]


def learns_chat(train: Dataset) -> bool:
    """Are there conversations in the text, and a chat template that the student is saved with?"""
    has_template = getattr(train.pair.student, "chat_template", None) or "student" in train.text.without_template
    return bool(len(train.text.conversations) and has_template)


def overlap(train: Dataset, validation: Dataset) -> float:
    """Share of the held-out target tokens which the training text has too, behind the same 15 tokens, in 0 to 1.

    A prompt or a system message that all examples have is no target, and a short answer to another question does not
    count. Of a large text the first eight million tokens are compared.
    """
    held_out, known = (np.asarray(data.text.student.ids[:_MAX_TOKENS]) for data in (validation, train))
    if min(len(held_out), len(known)) < _WINDOW:
        return 0.0
    is_target = np.asarray(validation.text.student.is_target[:_MAX_TOKENS])
    is_known = np.isin(_window_hashes(held_out), _window_hashes(known))
    return float((is_known & is_target[_WINDOW - 1 :]).sum() / max(1, is_target.sum()))


def repeated_documents(train: Dataset, validation: Dataset) -> list[str]:
    """Names of the held-out documents of 16 tokens or more that the training text has too, token for token.

    Of a large text the documents within the first eight million tokens are compared.
    """
    known = {digest for _, digest in _document_digests(train)}
    return [validation.text.names[number] for number, digest in _document_digests(validation) if digest in known]


def _document_digests(data: Dataset) -> Iterator[tuple[int, bytes]]:
    """The number and a digest of each document that is long enough."""
    ids = np.asarray(data.text.student.ids[:_MAX_TOKENS])
    firsts = data.text.first_tokens("student")
    ends = np.append(firsts[1:], len(data.text.student.ids))
    for number in np.flatnonzero((ends - firsts >= _WINDOW) & (ends <= len(ids))).tolist():
        yield number, hashlib.blake2b(ids[firsts[number] : ends[number]].tobytes(), digest_size=16).digest()


def _window_hashes(ids: np.ndarray) -> np.ndarray:
    """uint64 [n - 15]: a hash of each window of 16 ids; the powers of a large odd number, modulo 2^64."""
    hashes, power, size = ids.astype(np.uint64) + np.uint64(1), np.uint64(0x9E3779B97F4A7C15), 1
    with np.errstate(over="ignore"):
        while size < _WINDOW:
            hashes = hashes[:-size] * power + hashes[size:]
            power, size = power * power, 2 * size
    return hashes
