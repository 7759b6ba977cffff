"""The student's own text behind a prompt, as both models read it.

A prompt is the beginning of a block: all before a conversation's last response, or of a block of plain text the part
before a place, drawn at random, at which both models end a token. What the student writes behind it keeps the student's
own tokens; the teacher reads the same bytes in its own. Where that cannot be exact, the response is cut or left out,
and counted.
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
from sar_kd.data.dataset import Dataset
from sar_kd.data.tokenized_text import within
from sar_kd.models.generation import Generation
from sar_kd.tokenization.long_text import encode_inside
from sar_kd.tokenization.token_stream import (
    RESPONSE,
    STOP,
    TEMPLATE,
    Block,
    Blocks,
    Part,
    TokenStream,
    concatenate_spans,
)
from sar_kd.tokenization.token_table import CONTENT, Ids, TokenTable, build_token_table


class Prompt(NamedTuple):
    """The beginning of a block."""

    block: int
    student: int
    """Tokens of the block that belong to it, of the student's"""
    teacher: int


class Response(NamedTuple):
    """What the student wrote behind a prompt, in its own tokens."""

    prompt: Prompt
    ids: list[int]
    stop: int | None


class Rollouts:
    """Makes batches of prompts and responses."""

    def __init__(self, train: Dataset, max_student: int, max_teacher: int):
        """max_student, max_teacher: most tokens that a block may hold for each model, start token included"""
        self.train, self.pair = train, train.pair
        student, teacher = train.pair.tables or (None, None)
        self._tables = (student, teacher) if student and teacher else None
        self._limits = max_student - 1, max_teacher - 1
        self._num_plain = len(train.blocks) - len(train.text.conversations)

    def prompt_of(self, block: int, random: np.random.Generator) -> Prompt:
        """The beginning of a block. A plain block of a single token has none but the start token."""
        cut = self.train.blocks[block]
        sides = [self._part(cut, side) for side in range(2)]
        places = self._starts(sides) if block >= self._num_plain else self._joints(sides)
        place = -1 if block >= self._num_plain else random.integers(len(places))
        return Prompt(block, *places[place])

    def _part(self, cut: Block, side: int) -> TokenStream:
        stream = self.train.text.teacher if side else self.train.text.student
        start, end = cut[2 * side : 2 * side + 2]
        before = stream.ends[start - 1] if start else 0
        return TokenStream(
            stream.ids[start:end],
            stream.ends[start:end] - before,
            stream.has_dummy[start:end],
            stream.is_target[start:end],
        )

    def _starts(self, sides: list[TokenStream]) -> list[tuple[int, int]]:
        """Where a response begins, on both sides at the same byte."""
        found = []
        for side in sides:
            starts = np.flatnonzero(np.diff(side.is_target.astype(np.int8), prepend=0) > 0)
            found.append({int(side.ends[start - 1]) if start else 0: int(start) for start in starts})
        return [(found[0][byte], found[1][byte]) for byte in sorted(found[0].keys() & found[1].keys())] or [(0, 0)]

    def _joints(self, sides: list[TokenStream]) -> list[tuple[int, int]]:
        """Where both sides end a token inside of the block."""
        student, teacher = (np.asarray(side.ends) for side in sides)
        joints = np.flatnonzero(ends_on_both(student, teacher) & (student < student[-1]))
        of_teacher = np.searchsorted(teacher, student[joints], side="right")
        return list(zip((joints + 1).tolist(), of_teacher.tolist(), strict=True)) or [(0, 0)]

    def ids_of(self, prompt: Prompt) -> list[int]:
        """The student's tokens of a prompt, start token first."""
        start = self.train.blocks[prompt.block].student_start
        return [self.pair.student_start, *self.train.text.student.ids[start : start + prompt.student].tolist()]

    def room_of(self, prompt: Prompt, most: int) -> int:
        """How many tokens the student may write behind it, of `most`."""
        return max(1, min(most, self._limits[0] - prompt.student))

    def stops(self) -> list[int]:
        """The tokens that end a response."""
        table = self._tables[0] if self._tables else None
        if table is None and len(self.train.text.conversations):
            table = build_token_table(self.pair.student, len(self.pair.student))
        return sorted({self.pair.student_end, *(table.end_ids if table else ())})

    def usable(self, written: Iterable[tuple[Prompt, Generation]]) -> tuple[list[Response], Counter]:
        """What of it both models can read, and what was wrong, by `writing.ISSUES`."""
        faults: Counter = Counter()
        kept = []
        for prompt, each in written:
            faults["nonfinite"] += not each.is_finite
            parts, response = self._parts(Response(prompt, each.ids, each.stop), faults)
            if parts is not None:
                kept.append(response)
        return kept, faults

    def batch(self, responses: Sequence[Response]) -> Batch:
        """What both models read of responses that are usable; only they are predicted."""
        whole = [parts for parts, _ in (self._parts(response, Counter()) for response in responses)]
        tables = self._tables or (None,)
        laid = [concatenate_spans(parts, table) for parts, table in zip(zip(*whole, strict=True), tables, strict=True)]
        (student, firsts), (teacher, others) = laid[0], laid[-1]
        ranges = np.stack([firsts[:-1], firsts[1:], others[:-1], others[1:]], axis=1).astype(np.int64)
        text = dataclasses.replace(self.train.text, student=student, teacher=teacher)
        corpus = copy.copy(self.train)
        corpus.text, corpus.blocks, corpus.aligner = text, Blocks(ranges), self.train.aligner.over(text)
        batch = corpus.batch(list(range(len(responses))))
        blocks = tuple(response.prompt.block for response in responses)
        return dataclasses.replace(batch, blocks=blocks, is_on_policy=True)

    def _parts(self, response: Response, faults: Counter) -> tuple[list[list[Part]] | None, Response]:
        """A response with its prompt on each side, None if it has to be left out; and what is kept of it."""
        prompt, cut = response.prompt, self.train.blocks[response.prompt.block]
        response = self._cut_to_text(response, faults)
        if not response.ids and response.stop is None:
            faults["nothing"] += 1
            return None, response
        opening = self._part(cut, 0).ids[: prompt.student]
        whole = [_side(opening, response.ids, [response.stop] if response.stop is not None else [])]
        if self._tables is None:
            return [whole[0]], response
        text = self._tables[0].spell(response.ids).decode()
        ids = encode_inside(self.pair.teacher, self._tables[1], text) if text else []
        if ids is None:
            faults["unrepresentable"] += 1
            return None, response
        teacher = self._part(cut, 1)
        stop = self._stop_of(teacher, self._tables[1]) if response.stop is not None else []
        whole.append(_side(teacher.ids[: prompt.teacher], ids, stop))
        kept = within(whole, list(self._tables), self._limits)
        if kept is not whole:
            faults["too_long"] += 1
            if kept is None or all(part.kind == TEMPLATE for part in kept[0]):
                return None, response
            num_kept = sum(len(part.ids) for part in kept[0] if part.kind == RESPONSE)
            # Its tokens are those of the text that is left, which is cut anew in the teacher's.
            return self._parts(Response(prompt, response.ids[:num_kept], None), Counter())
        return whole, response

    def _cut_to_text(self, response: Response, faults: Counter) -> Response:
        """What is text of a response, from its beginning on; all of it, where the teacher reads the same tokens."""
        if self._tables is None:
            return response
        table = self._tables[0]
        special = next((i for i, token in enumerate(response.ids) if table.kinds[token] != CONTENT), None)
        ids, stop = response.ids[:special], response.stop
        if special is not None:
            faults["special"] += 1
            stop = None
        spelt = table.spell(ids)
        try:
            spelt.decode()
        except UnicodeDecodeError as error:
            faults["broken_utf8"] += 1
            stop = None
            ends = np.cumsum([len(table.pieces[token]) for token in ids])
            num_kept = int(np.searchsorted(ends, error.start, side="right"))
            while num_kept and spelt[ends[num_kept - 1]] & 0xC0 == 0x80:  # the token ends inside of a character
                num_kept -= 1
            ids = ids[:num_kept]
        return response._replace(ids=ids, stop=stop)

    def _stop_of(self, block: TokenStream, table: TokenTable) -> list[int]:
        """The teacher's tokens that end a response: those of this block, if it has some, else its end of text."""
        targets = np.flatnonzero(block.is_target)
        last = int(targets[-1]) if len(targets) else -1
        if last < 0 or table.kinds[block.ids[last]] == CONTENT:
            return [self.pair.teacher_end]
        widths = np.diff(block.ends, prepend=0)
        first = last
        while first > 0 and block.is_target[first - 1] and not widths[first - 1]:
            first -= 1
        return block.ids[first : last + 1].tolist()


def _side(opening: Ids, ids: Ids, stop: Ids) -> list[Part]:
    """A block in parts. The prompt counts no bytes: the same ones stand before the response on both sides."""
    kinds = ((opening, TEMPLATE), (ids, RESPONSE), (stop, STOP))
    return [Part(list(own), kind) for own, kind in kinds if len(own)]
