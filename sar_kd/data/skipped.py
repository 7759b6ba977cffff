"""Documents, and passages of them, that cannot be used: what is shown of them, and the remedy for each reason.

A name in `TokenizedText.skipped_documents` or `skipped_passages` is followed by its reason in brackets, except where a
plain document is empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sar_kd.errors import UsageError
from sar_kd.runtime.console import count_of, first_few
from sar_kd.tokenization.token_stream import TokenizedText

TOO_LONG = "no response begins within a block"

NO_COMMON_END = "the two tokenizers end no token at the same place within a block"

MAX_SKIPPED_SHARE = 0.05
"""Most of a text's bytes that may be skipped because of the tokenizers."""

_PLAIN = "empty, or no Unicode text"

_REASONS = f"the (?:student|teacher)'s |its '|message [0-9]|is null|is no Unicode|{TOO_LONG}|{NO_COMMON_END}"

_NAME_AND_REASON = re.compile(rf"(.*?) \(((?:{_REASONS}).*)\)", re.DOTALL)

_REMEDIES = (
    ("within a block", "raise --block_size, or shorten the prompts"),
    ("drops a part", "leave reasoning and tool calls out of the text, or use a model whose template writes them"),
    ("ystem", "leave the system messages out, or use a model whose chat template takes them"),
    ("chat template", "change the text to what the template takes, or use a model with another template"),
    ("tokenizer changes", "use another model"),
    ("null", "correct these examples"),
    ("nothing to learn", "correct these examples"),
)


def by_reason(skipped: Iterable[str]) -> dict[str, list[str]]:
    """The names of skipped documents by reason, the most frequent reason first."""
    found: dict[str, list[str]] = {}
    for entry in skipped:
        match = _NAME_AND_REASON.fullmatch(entry)
        name, reason = match.groups() if match else (entry, _PLAIN)
        found.setdefault(reason, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def is_incomplete(entry: str) -> bool:
    """Is a skipped document an example with a null where something must stand, or without an answer?"""
    match = _NAME_AND_REASON.fullmatch(entry)
    found = match and re.search(r"\bnull\b|holds nothing to learn", match[2])
    return match is not None and bool(found) and " template " not in match[2]


def skipped_lines(*texts: TokenizedText) -> list[str]:
    """A line for each reason, and one for the bytes that are skipped because of the tokenizers."""
    documents = by_reason(name for text in texts for name in text.skipped_documents)
    passages = by_reason(name for text in texts for name in text.skipped_passages)
    lines = [
        f"Skipped {count_of(len(names), noun)}, {reason}: {first_few(list(dict.fromkeys(names)))}"
        for noun, found in (("document", documents), ("passage", passages))
        for reason, names in found.items()
    ]
    num_bytes = sum(text.skipped_bytes for text in texts)
    share = num_bytes / max(1, num_bytes + sum(text.num_bytes for text in texts))
    total = f"Skipped because of the tokenizers: {count_of(num_bytes, 'byte')}, {share:.2%} of the text"
    return [*lines, total] if num_bytes else lines


def unusable(option: str, skipped: Sequence[str], num_documents: int) -> UsageError:
    """The error for a text of which too many documents, or all, cannot be used.

    option: that names the text, with its value; num_documents: of the whole text
    """
    reason, names = next(iter(by_reason(skipped).items()))
    remedy = next((remedy for part, remedy in _REMEDIES if part in reason), "give other text")
    others = len(skipped) - len(names)
    more = f" ({count_of(others, 'other')} for other reasons)" if others else ""
    count = f"{len(skipped)} of its {count_of(num_documents, 'document')} cannot be used"
    return UsageError(f"{option}: {count}{more}: {reason}: {first_few(names)}; {remedy}")
