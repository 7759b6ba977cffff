"""A prompt that only the teacher sees: a conversation's system message, and the beginning of a block of plain text.

    teacher's input = start token, prompt, text        student's input = start token, text

Nothing of it is predicted, and what is compared are the positions of the text that both read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sar_kd.data.chat.encoding import chat_templates
from sar_kd.data.chat.layout import SkippedConversation
from sar_kd.errors import UsageError
from sar_kd.tokenization.backends import EncodingFailure, encode
from sar_kd.tokenization.token_stream import Block, TokenizedText
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

_OPTION = "--teacher_system_prompt"


@dataclass(frozen=True)
class TeacherPrompt:
    """The teacher's tokens before each block."""

    plain: list[int]
    """Of plain text: start token and prompt"""
    heads: tuple[tuple[list[int], list[int]], ...]
    """How conversations begin without a system message, up to the user's text, and with the prompt as one; several
    where the tokens at their end depend on that text"""
    fault: str = ""
    """Why it cannot be put into a conversation"""

    @property
    def num_tokens(self) -> int:
        """The most that it adds to a block."""
        return max(len(self.plain) - 1, *(len(new) - len(old) for old, new in self.heads), 0)

    def begin(self, text: TokenizedText, block: Block, start: int, is_conversation: bool) -> tuple[list[int], int]:
        """The tokens before a block of the teacher's, whose own first input is `start`; and how many of the block's
        tokens they replace.

        Raises: UsageError for a conversation that begins in another way
        """
        if not is_conversation:
            return self.plain, 0
        ids = text.teacher.ids
        for old, new in self.heads:
            first = block.teacher_start
            if [start, *np.asarray(ids[first : first + len(old) - 1]).tolist()] == old:
                return new, len(old) - 1
        reason = self.fault or "has a system message or tools of its own, or does not begin with the user"
        at = int(np.searchsorted(text.conversations.ranges[:, 2], block.teacher_start, side="right")) - 1
        num_plain = len(text.names) - len(text.conversations)
        raise UsageError(f"{_OPTION}: {text.names[num_plain + at]} {reason}; leave it out of the text, or the option")


def read_prompt(value: str) -> str:
    """The text of `--teacher_system_prompt`, which may be @FILE. Raises: UsageError if the file cannot be read"""
    if not value.startswith("@"):
        return value
    try:
        text = Path(value[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "") or "it is no UTF-8 text"
        raise UsageError(f"{_OPTION} {value}: cannot be read ({reason})") from None
    if not text:
        raise UsageError(f"{_OPTION} {value}: is empty")
    return text


def build_teacher_prompt(value: str, pair: TokenizerPair, limit: int, block_size: int) -> TeacherPrompt | None:
    """The prompt in the teacher's tokens; None without one.

    value: of the option; limit: most tokens of the teacher's input; block_size: the student's tokens in a block
    Raises: UsageError if the prompt cannot be encoded, or leaves no room for text
    """
    prompt = read_prompt(value)
    if not prompt:
        return None
    try:
        (ids,) = encode(pair.teacher, [f"{prompt}\n\n"])
    except EncodingFailure as error:
        raise UsageError(f"{_OPTION}: the teacher's tokenizer {error.reason}") from None
    heads: tuple[tuple[list[int], list[int]], ...] = ()
    fault = ""
    try:
        heads = tuple(chat_templates(pair)[-1].beginnings(prompt))
    except SkippedConversation as reason:
        fault = f"cannot have it: {reason}"
    found = TeacherPrompt([pair.teacher_start, *map(int, ids)], heads, fault)
    if limit - found.num_tokens < min(block_size, 32):
        raise UsageError(f"{_OPTION}: has {found.num_tokens} tokens, and the teacher takes {limit} at most; shorten it")
    return found


def shifts_of(beginnings: Sequence[tuple[list[int], int]]) -> np.ndarray:
    """By how many places each block's tokens stand later in the teacher's input than without a prompt: int64 [B]."""
    return np.array([len(tokens) - 1 - replaced for tokens, replaced in beginnings], dtype=np.int64)
