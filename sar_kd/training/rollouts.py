"""Rollouts: prompts taken from the training text, and batches of the student's responses to them for both models.

A prompt is the beginning of a block: all before a conversation's last response, or the part of a block of plain text
before a random position at which both models end a token. A response keeps the student's own tokens; the teacher gets
the same bytes in its own. Where that cannot be exact, the response is truncated or dropped, and the issue counted.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from sar_kd.alignment.byte_alignment import ends_on_both
from sar_kd.data.batch import Batch
from sar_kd.data.blocks import skip_start_tokens
from sar_kd.data.chat.encoding import truncate_conversation
from sar_kd.data.dataset import Dataset
from sar_kd.models.generation import Generation
from sar_kd.tokenization.long_text import encode_inside
from sar_kd.tokenization.token_stream import (
    RESPONSE,
    STOP,
    TEMPLATE,
    Block,
    Blocks,
    Span,
    TokenStream,
    concatenate_spans,
)
from sar_kd.tokenization.token_table import CONTENT, Ids, TokenTable, build_token_table


class Prompt(NamedTuple):
    """The beginning of a block."""

    block: int
    num_student_tokens: int
    """Tokens of the prompt, in the student's; likewise the teacher's"""
    num_teacher_tokens: int


class Response(NamedTuple):
    """The student's continuation of a prompt, in its own tokens."""

    prompt: Prompt
    ids: list[int]
    stop: int | None


class Rollouts:
    """Makes prompts, and batches of prompts with responses."""

    def __init__(self, train: Dataset, max_student: int, max_teacher: int):
        """max_student, max_teacher: most tokens of a block for each model, start token included"""
        self.train, self.pair = train, train.pair
        self._tables = train.pair.tables
        if self._tables is None:  # both models read the same tokens
            max_student = max_teacher = min(max_student, max_teacher)
        self._limits = max_student - 1, max_teacher - 1
        self._num_plain = len(train.blocks) - len(train.text.conversations)

    def sample_prompt(self, block: int, rng: np.random.Generator) -> Prompt:
        """The beginning of a block. A plain block of a single token has no prompt but the start token."""
        streams = [self._stream(self.train.blocks[block], side) for side in range(2)]
        if block >= self._num_plain:
            return Prompt(block, *self._response_starts(streams)[-1])
        positions = self._common_ends(streams)
        return Prompt(block, *positions[rng.integers(len(positions))])

    def _stream(self, block: Block, side: int) -> TokenStream:
        """A block in the student's tokens (side 0) or the teacher's (1)."""
        stream = self.train.text.teacher if side else self.train.text.student
        start, end = block[2 * side : 2 * side + 2]
        ends = stream.ends[start:end] - (stream.ends[start - 1] if start else 0)
        return TokenStream(stream.ids[start:end], ends, stream.has_dummy[start:end], stream.is_target[start:end])

    def _response_starts(self, streams: list[TokenStream]) -> list[tuple[int, int]]:
        """Where responses begin, at the same byte on both sides; tokens before it, student's and teacher's."""
        found = []
        for stream in streams:
            starts = np.flatnonzero(np.diff(stream.is_target.astype(np.int8), prepend=0) > 0)
            if self._tables:  # behind what only this model's template writes first
                has_bytes = np.flatnonzero(np.diff(stream.ends, prepend=0) > 0)
                places = np.searchsorted(has_bytes, starts)
                starts = has_bytes[places[places < len(has_bytes)]]
            found.append({int(stream.ends[start - 1]) if start else 0: int(start) for start in starts})
        return [(found[0][byte], found[1][byte]) for byte in sorted(found[0].keys() & found[1].keys())] or [(0, 0)]

    def _common_ends(self, streams: list[TokenStream]) -> list[tuple[int, int]]:
        """Where both sides end a token inside the block; tokens before it, student's and teacher's.

        The start token of the document that begins there, which is never predicted, comes before it too.
        """
        student, teacher = (np.asarray(stream.ends) for stream in streams)
        is_predicted = np.append(streams[0].is_target[1:], False)  # the token behind each
        last_tokens = np.flatnonzero(ends_on_both(student, teacher) & (student < student[-1]) & is_predicted)
        num_teacher = np.searchsorted(teacher, student[last_tokens], side="right")
        return list(zip((last_tokens + 1).tolist(), num_teacher.tolist(), strict=True)) or [(0, 0)]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The student's tokens of a prompt, start token first."""
        block = self.train.blocks[prompt.block]
        start = block.student_start
        ids = self.train.text.student.ids[start : start + prompt.num_student_tokens].tolist()
        return [self.train.start_of(block, "student"), *ids]

    def max_new_tokens(self, prompt: Prompt, limit: int) -> int:
        """The most tokens of a response: `limit`, or as many as fit into the block."""
        return max(1, min(limit, self._limits[0] - prompt.num_student_tokens))

    def stop_token_ids(self) -> list[int]:
        """The student's tokens that end a response."""
        table = self._tables[0] if self._tables else None
        if table is None and len(self.train.text.conversations):
            table = build_token_table(self.pair.student, self.pair.student_vocab_size)
        text = self.train.text
        ends = {self.pair.student_end, *(table.end_ids if table else ()), *text.stop_ids[0]}
        return sorted(ends.difference(text.inner_ids[0]) or ends)

    def keep_usable(self, generations: Iterable[tuple[Prompt, Generation]]) -> tuple[list[Response], Counter]:
        """The part of the generations that both models can represent, and a count of `generation.ISSUES`."""
        issues: Counter = Counter()
        usable = []
        for prompt, generation in generations:
            issues["nonfinite"] += not generation.is_finite
            spans, response = self._to_spans(Response(prompt, generation.ids, generation.stop), issues)
            if spans is not None:
                usable.append(response)
        return usable, issues

    def batch(self, responses: Sequence[Response], is_learned: bool = True) -> Batch:
        """A batch of usable responses behind their prompts; only the responses are targets.

        is_learned: false: nothing is a target
        """
        spans = [self._with_start(response) for response in responses]
        if not is_learned:
            spans = [[[span._replace(kind=TEMPLATE) for span in side] for side in sides] for sides in spans]
        tables = self._tables or (None,)
        sides = [concatenate_spans(own, table) for own, table in zip(zip(*spans, strict=True), tables, strict=True)]
        (student, student_bounds), (teacher, teacher_bounds) = sides[0], sides[-1]
        bounds = [student_bounds[:-1], student_bounds[1:], teacher_bounds[:-1], teacher_bounds[1:]]
        ranges = Blocks(np.stack(bounds, axis=1).astype(np.int64))
        text = dataclasses.replace(self.train.text, student=student, teacher=teacher, conversations=ranges)
        dataset = copy.copy(self.train)
        dataset.text, dataset.blocks = text, skip_start_tokens(ranges, text)
        dataset.aligner = self.train.aligner.for_text(text)
        starts = zip(responses, dataset.blocks, strict=True)
        dataset.plain_starts = frozenset(b.teacher_start for r, b in starts if r.prompt.block < self._num_plain)
        batch = dataset.batch(list(range(len(responses))))
        blocks = tuple(response.prompt.block for response in responses)
        return dataclasses.replace(batch, blocks=blocks, is_on_policy=True)

    def _with_start(self, response: Response) -> list[list[Span]]:
        """The spans of a usable response for each model, behind the input before its block."""
        spans, _ = self._to_spans(response, Counter())
        assert spans is not None
        block = self.train.blocks[response.prompt.block]
        starts = [self.train.start_of(block, which) for which in ("student", "teacher")]
        return [[Span([start], TEMPLATE), *own] for start, own in zip(starts, spans, strict=False)]

    def _to_spans(self, response: Response, issues: Counter) -> tuple[list[list[Span]] | None, Response]:
        """Prompt and response as spans for each model, None if it must be dropped; and the response as truncated."""
        prompt, block = response.prompt, self.train.blocks[response.prompt.block]
        response = self._truncate_to_text(response, issues)
        if not response.ids and response.stop is None:
            issues["nothing"] += 1
            return None, response
        stop_ids = [response.stop] if response.stop is not None else []
        student = _spans(self._stream(block, 0).ids[: prompt.num_student_tokens], response.ids, stop_ids)
        if self._tables is None:
            return [student], response
        text = self._tables[0].spell(response.ids).decode()
        ids = encode_inside(self.pair.teacher, self._tables[1], text) if text else []
        if ids is None:
            issues["unrepresentable"] += 1
            return None, response
        stream = self._stream(block, 1)
        stop_ids = self._teacher_stop_ids(stream, self._tables[1]) if response.stop is not None else []
        spans = [student, _spans(stream.ids[: prompt.num_teacher_tokens], ids, stop_ids)]
        kept = truncate_conversation(spans, list(self._tables), self._limits)
        if kept is spans:
            return spans, response
        issues["too_long"] += 1
        if kept is None or all(span.kind == TEMPLATE for span in kept[0]):
            return None, response
        num_kept = sum(len(span.ids) for span in kept[0] if span.kind == RESPONSE)
        # The teacher's tokens of the shorter text may be others, so it is encoded again.
        return self._to_spans(Response(prompt, response.ids[:num_kept], None), Counter())

    def _truncate_to_text(self, response: Response, issues: Counter) -> Response:
        """The response up to its first special token or byte that is no UTF-8; all of it for equal tokenizers."""
        if self._tables is None:
            return response
        table = self._tables[0]
        special = next((i for i, token in enumerate(response.ids) if table.kinds[token] != CONTENT), None)
        ids, stop = response.ids[:special], response.stop
        if special is not None:
            issues["special"] += 1
            stop = None
        spelled = table.spell(ids)
        try:
            spelled.decode()
        except UnicodeDecodeError as error:
            issues["broken_utf8"] += 1
            stop = None
            ends = np.cumsum([len(table.pieces[token]) for token in ids])
            num_kept = int(np.searchsorted(ends, error.start, side="right"))
            while num_kept and spelled[ends[num_kept - 1]] & 0xC0 == 0x80:  # the token ends inside a character
                num_kept -= 1
            ids = ids[:num_kept]
        return response._replace(ids=ids, stop=stop)

    def _teacher_stop_ids(self, stream: TokenStream, table: TokenTable) -> list[int]:
        """The teacher's tokens that end a response: those of this block, if it has some, else its end of text."""
        targets = np.flatnonzero(stream.is_target)
        last = int(targets[-1]) if len(targets) else -1
        if last < 0 or table.kinds[stream.ids[last]] == CONTENT:
            return [self.pair.teacher_end]
        widths = np.diff(stream.ends, prepend=0)

        def is_blank(token: int) -> bool:  # as before Llama 2's stop token; not what else a template writes there
            return table.kinds[token] == CONTENT and not table.pieces[token].strip()

        first = last
        while first and stream.is_target[first - 1] and not widths[first - 1] and is_blank(stream.ids[first - 1]):
            first -= 1
        return stream.ids[first : last + 1].tolist()


def _spans(prompt: Ids, response: Ids, stop: Ids) -> list[Span]:
    """The spans of a block. The prompt counts no bytes: the same ones precede the response on both sides."""
    kinds = ((prompt, TEMPLATE), (response, RESPONSE), (stop, STOP))
    return [Span(list(ids), kind) for ids, kind in kinds if len(ids)]
