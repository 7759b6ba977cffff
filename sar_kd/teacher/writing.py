"""The teacher's own text: prompts in its tokens, its continuations, and which of them can be learned from.

Sequence-level distillation trains a student on what its teacher writes (Kim and Rush, 2016, arXiv 1606.07947).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sar_kd.config.writing import WriteConfig
from sar_kd.data.chat.encoding import ChatTemplate, render
from sar_kd.data.files.samples import Conversation, Document, LongDocument, Sample
from sar_kd.errors import UsageError
from sar_kd.models.generation import Generation, generate
from sar_kd.models.loading import TeacherInfo
from sar_kd.runtime.precision import Precision
from sar_kd.tokenization.backends import TURN_TOKENS, encode
from sar_kd.tokenization.token_stream import FORMAT, RESPONSE, STOP
from sar_kd.tokenization.token_table import CONTENT, build_token_table

REASONS = ("nonfinite", "special", "broken_utf8", "empty", "repeated", "unfinished")
"""Why an answer is dropped, the first that holds. nonfinite: the teacher's logits were not finite; special: a token
without text in the middle; broken_utf8: bytes that are no text; empty: no text; repeated: its end is a phrase again and
again; unfinished: no stop token within `--max_new_tokens`."""

_CHARS_PER_TOKEN = 64
"""Of a document, so many characters are read for each token of its beginning."""

_OPEN_TAG = re.compile(r"<think>\s*\Z")
"""Some generation prompts begin the reasoning, which belongs to the answer."""


class Prompt(NamedTuple):
    """A prompt in the teacher's tokens."""

    ids: list[int]
    beginning: str
    """What the row has before the text that is written: the beginning of a document, or an open tag"""
    format_ids: list[int]
    """What the chat template itself writes before an answer's text"""
    stop_ids: frozenset[int] = frozenset()
    """The chat template's tokens behind an answer"""
    is_document: bool = False
    is_chat: bool = False
    """A chat template writes what stands around the answer, so space at its sides is none of it"""


class Answer(NamedTuple):
    """What the teacher wrote behind one prompt."""

    reason: str
    """One of `REASONS`; '' for an answer that is kept"""
    text: str = ""
    num_tokens: int = 0
    is_cut_off: bool = False
    """It ends at `--max_new_tokens`, without a stop token"""


class Writer:
    """A teacher that continues prompts."""

    def __init__(
        self,
        config: WriteConfig,
        teacher: nn.Module,
        tokenizer: Any,
        info: TeacherInfo,
        date: str,
        precision: Precision,
    ):
        """date: that its chat template may write, in ISO format

        Raises: UsageError if the bytes of its tokens cannot be known
        """
        self.config, self.teacher, self.tokenizer, self.precision = config, teacher, tokenizer, precision
        try:
            self.table = build_token_table(tokenizer, info.vocab_size, info.stop_ids)
        except ValueError as error:
            raise UsageError(f"--teacher_model {config.teacher_model}: its tokenizer {error}") from None
        self.template = ChatTemplate("teacher", tokenizer, self.table, datetime.fromisoformat(date))
        self._limit = info.limit

    # Prompts

    def encode(self, prompts: Sequence[Sample]) -> list[Prompt | str]:
        """Each prompt in tokens, or why it cannot be answered."""
        conversations = [
            prompt._replace(name=str(i)) for i, prompt in enumerate(prompts) if isinstance(prompt, Conversation)
        ]
        rendered = render(conversations, [self.template])
        spans = dict(zip(rendered.names, rendered.sides[0], strict=True))
        reasons = dict(line.split(" ", 1) for line in rendered.skipped_documents)
        found: list[Prompt | str] = []
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, Conversation):
                found.append(self._document_prompt(prompt))
            elif str(i) in spans:
                found.append(self._chat_prompt(prompt, spans[str(i)]))
            else:
                found.append(reasons[str(i)][1:-1])
        return [self._within_context(each) for each in found]

    def _within_context(self, prompt: Prompt | str) -> Prompt | str:
        if isinstance(prompt, str) or not self._limit or len(prompt.ids) < self._limit:
            return prompt
        return f"it has {len(prompt.ids):,} tokens, and the teacher takes {self._limit:,}, its answer included"

    def _chat_prompt(self, prompt: Conversation, spans: list) -> Prompt:
        """All tokens before the first that is predicted."""
        first = next(i for i, span in enumerate(spans) if span.kind >= RESPONSE)
        text = next(i for i, span in enumerate(spans) if span.kind == RESPONSE)
        ids = [int(token) for span in spans[:first] for token in span.ids]
        format_ids = [int(token) for span in spans[first:text] for token in span.ids if span.kind == FORMAT]
        lasts = {int(span.ids[-1]) for span in spans if span.kind == STOP and len(span.ids)}
        stops = frozenset(token for token in lasts if self.table.kinds[token] != CONTENT)
        is_chat = bool(getattr(self.tokenizer, "chat_template", None)) or not prompt.plain
        tag = _OPEN_TAG.search(self.table.spell(ids[-8:]).decode("utf-8", "replace")) if is_chat else None
        return Prompt(ids, tag[0] if tag else "", format_ids, stops, is_chat=is_chat)

    def _document_prompt(self, document: Document | LongDocument) -> Prompt | str:
        """The first tokens of a document, as many of them as end with a character."""
        size = self.config.prompt_tokens
        given = next(document.chunks(), "")[: _CHARS_PER_TOKEN * (size + 16)]
        text = self.table.canonical(given)
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
            return "is no Unicode text"
        (ids,) = encode(self.tokenizer, [text])
        dummy = self.table.dummy_bytes(ids, text)
        if dummy is None:
            return "the teacher's tokenizer changes its text"
        for count in range(min(size, len(ids)), 0, -1):
            spelled = self.table.spell(ids[:count])[dummy:]
            if _decoded(spelled):
                start = () if self.tokenizer.bos_token in TURN_TOKENS else (self.table.start_id,)
                return Prompt([*start, *map(int, ids[:count])], spelled.decode(), [], is_document=True)
        return f"its first {size} tokens are no whole character"

    # Answers

    def write(self, prompts: Sequence[Prompt], numbers: Sequence[tuple[int, int]]) -> list[Answer]:
        """The answers to some prompts, written together.

        numbers: of each prompt and of its answer; with the seed they decide what is drawn
        """
        config = self.config
        inner = {token for prompt in prompts for token in prompt.format_ids}
        stops = set(self.table.end_ids).union(*(prompt.stop_ids for prompt in prompts))
        limits = [min(config.max_new_tokens, (self._limit or 2**31) - len(prompt.ids)) for prompt in prompts]
        draws = [np.random.default_rng([config.seed, *own]).random(config.max_new_tokens) for own in numbers]
        with self.precision.autocast():
            generations = generate(
                self.teacher,
                [prompt.ids for prompt in prompts],
                stop_token_ids=sorted(stops - inner or stops),
                max_new_tokens=limits,
                temperature=config.sample_temperature,
                top_p=config.sample_top_p,
                draws=torch.from_numpy(np.stack(draws)),
            )
        return [self._judge(prompt, generation) for prompt, generation in zip(prompts, generations, strict=True)]

    def _judge(self, prompt: Prompt, generation: Generation) -> Answer:
        """The text of a continuation, or the first reason against it."""
        ids, is_cut_off = generation.ids, generation.stop is None
        if not generation.is_finite:
            return Answer("nonfinite")
        if prompt.format_ids and ids[: len(prompt.format_ids)] == prompt.format_ids:
            ids = ids[len(prompt.format_ids) :]
        if any(self.table.kinds[token] != CONTENT for token in ids):
            return Answer("special")
        spelled = self.table.spell(ids)
        if is_cut_off:  # perhaps inside a character
            spelled = next(
                (part for part in (spelled[: len(spelled) - k] for k in range(4)) if _decoded(part)), spelled
            )
        text = _decoded(spelled)
        if text is None:
            return Answer("broken_utf8")
        if not text.strip():
            return Answer("empty")
        if repeats_itself(ids, self.config.repeat_limit):
            return Answer("repeated")
        if is_cut_off and not (self.config.keep_unfinished or prompt.is_document):
            return Answer("unfinished")
        return Answer("", text.strip() if prompt.is_chat else text, len(ids), is_cut_off)


def repeats_itself(ids: Sequence[int], limit: int) -> bool:
    """Does it end with a phrase of two tokens or more, at least `limit` times in a row? limit: 0 for no.

    Source: Holtzman et al., 2020 (arXiv 1904.09751), whose limit is 3
    """
    sizes = range(2, len(ids) // limit + 1) if limit else ()
    return any(all(ids[-size:] == ids[-(k + 1) * size : -k * size] for k in range(1, limit)) for size in sizes)


def _decoded(spelled: bytes) -> str | None:
    """The text of some bytes; None if they are no whole characters."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return None
