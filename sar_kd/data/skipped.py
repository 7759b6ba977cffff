"""Documents that cannot be used: what is shown of them, and the remedy for each reason.

A name in `TokenizedText.skipped_documents` is followed by its reason in brackets, except where a plain document is
empty or changed by a tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sar_kd.errors import UsageError
from sar_kd.runtime.console import count_of, first_few

TOO_LONG = "no response begins within a block"

_PLAIN = "empty, or changed by a tokenizer"

_NAME_AND_REASON = re.compile(
    rf"(.*?) \(((?:the (?:student|teacher)'s |its '|message [0-9]|is null|is no Unicode|{TOO_LONG}).*)\)", re.DOTALL
)

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


def has_null(entry: str) -> bool:
    """Is a skipped document an example with a null where something must stand?"""
    match = _NAME_AND_REASON.fullmatch(entry)
    return match is not None and bool(re.search(r"\bnull\b", match[2])) and " template " not in match[2]


def skipped_lines(skipped: Sequence[str]) -> list[str]:
    """A line for each reason."""
    return [
        f"Skipped {count_of(len(names), 'document')}, {reason}: {first_few(names)}"
        for reason, names in by_reason(skipped).items()
    ]


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
