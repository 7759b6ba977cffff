"""The records of a cache from the answers of a server.

Each of the teacher's blocks is one prompt, as token ids where the server takes them, so that its model reads what a
loaded teacher reads; else as text. A token more is generated than is needed: some servers take 0 for no limit.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sar_kd.config.caching import ElsewhereConfig
from sar_kd.errors import UsageError
from sar_kd.runtime.console import format_share
from sar_kd.teacher.base import Teacher
from sar_kd.teacher.cache.builder import TeacherText
from sar_kd.teacher.cache.format import Shards, cache_error
from sar_kd.teacher.cache.logprobs import REASONS, Answer, BadAnswer, RecordReader, num_given, read_completion
from sar_kd.teacher.cache.server import Client, Refused
from sar_kd.tokenization.token_table import TokenTable

_SHARD_SIZE = 2**11
"""Records in a shard: a server may be slow"""

_MAX_CHANGE = 0.1
"""Mean difference between two answers about one text from which the model counts as another one, nats"""

_MAX_SPLIT = 0.05
"""The largest share of tokens at which the server may read others"""


class _Prompt(NamedTuple):
    """A block of the teacher's."""

    ids: list[int]
    """With the start token"""
    is_target: list[bool]


class ServerRecords:
    """The records that a server's answers make."""

    title = "Asking the server"

    def __init__(self, config: ElsewhereConfig, wanted_model: str, show: Callable[[str], object]):
        """wanted_model: '' for the only one

        Raises: UsageError if the server cannot be reached or has not this model
        """
        self._client, self._show = Client(config, show), show
        self._model, self.limit = self._choose_model(wanted_model)
        """limit: most tokens of a prompt, 0 if it is not stated"""
        self._answers_as = ""
        """The model that the answers name"""
        self._takes_ids, self._adds_start = True, False
        self.counts = Counter[str]()
        self._pending = Counter[str]()
        """Of the shard at hand"""

    def _choose_model(self, wanted: str) -> tuple[str, int]:
        try:
            entries = self._client.request("/models").get("data")
            found = {entry["id"]: entry.get("max_model_len") or 0 for entry in entries}  # type: ignore[union-attr]
        except Refused as refusal:
            if not wanted:
                raise self._client.error(f"does not list its models ({refusal}); give --teacher_model NAME") from None
            return wanted, 0
        except (TypeError, KeyError, AttributeError):
            raise self._client.error("its answer to /models lists none; is it an OpenAI-compatible server?") from None
        names = ", ".join(found)
        if (wanted and wanted not in found) or (not wanted and len(found) != 1):
            raise self._client.error(f"serves {names or 'no model'}; give one of them as --teacher_model")
        name = wanted or names
        return name, max(0, found[name] - 1) if isinstance(found[name], int) else 0

    def begin(self, texts: Sequence[TeacherText], table: TokenTable, k: int) -> dict:
        """Ask for the first block, in the form that the server takes; returns what that says for the metadata.

        Raises: UsageError if the answer does not fit
        """
        self._table, self._first = table, _prompt_of(texts[0], 0)
        self._probe = self._ask_first(k)
        given = num_given(self._probe)
        if not given:
            raise self._client.error("gives no log-probabilities of a prompt (echo, logprobs); vLLM's server does")
        if given < k:
            self._show(f"The server gives {given} tokens at a position, fewer than --teacher_top_k {k}; it is lowered")
        if not self._takes_ids:
            start = "adds its own start token" if self._adds_start else "gets the start token as text too"
            self._show(f"The server takes no token ids: each block is sent as text, and it {start}")
        source = {"served_model": self._answers_as}
        return {"source": source, "teacher_top_k": min(k, given), "shard_size": _SHARD_SIZE}

    def _ask_first(self, k: int) -> Answer:
        try:
            for _ in range(2):  # status 500 may mean that it takes no ids, and may pass
                with contextlib.suppress(Refused):
                    return self._ask([self._first], k, is_trial=True)[0]
                content = self._complete(self._text_of(self._first, with_start=False), k)
            self._takes_ids = False
            self._adds_start = _has_added_start(content, self._first, self._table)
            return self._ask([self._first], k)[0]
        except Refused as refusal:
            raise self._client.error(f"refuses a prompt ({refusal})") from None

    def start(self, folder, header: dict, texts: Sequence[TeacherText]) -> None:
        """Get ready to go on with a cache. Raises: UsageError if the server's model is not the one that is in it"""
        self._reader = RecordReader(header["metadata"], self._table)
        self.counts.update(header.get("counts", {}))
        shards = Shards(folder, header, "train")
        size = int(texts[0].block_sizes[0])
        if len(shards) >= size:
            found = self._records(self._first, self._probe, Counter())["target_log_prob"]
            if _is_other(found, shards.take(np.arange(size))["target_log_prob"]):
                raise cache_error(folder, "the server's log-probabilities are no longer those that are cached: it "
                                  "serves another model, or in another precision; name another folder")  # fmt: skip

    def records(self, name: str, text: TeacherText, firsts: Sequence[int], size: int) -> Iterator[np.ndarray]:
        """The records of `size` blocks from each of `firsts` on."""
        self._pending = Counter()
        for first in firsts:
            prompts = [_prompt_of(text, i) for i in range(first, min(first + size, len(text.dataset.blocks)))]
            lost = self._client.num_lost
            try:
                answers = self._ask(prompts, self._reader.k)
                if self._client.num_lost > lost:
                    self._check_same_model()
            except Refused as refusal:
                raise self._client.error(f"refuses a prompt ({refusal})") from None
            pairs = zip(prompts, answers, strict=True)
            yield np.concatenate([self._records(prompt, answer, self._pending) for prompt, answer in pairs])

    def check(self, records: np.ndarray, text: TeacherText, firsts: Sequence[int], size: int) -> None:
        """Count what the records of a shard lack. Raises: UsageError where it is too much"""
        missing = np.isnan(records["max_log_prob"]).mean()
        if missing > Teacher.max_nonfinite:
            reason = max(REASONS, key=lambda name: self._pending[name])
            remedy = "lower --teacher_top_k" if reason == "cut" else "is --teacher_tokenizer the served model's?"
            raise self._client.error(
                f"gives no log-probabilities that can be used at {format_share(missing)} of the tokens; {remedy}"
            )
        if self._pending["split"] > _MAX_SPLIT * len(records):
            share = format_share(self._pending["split"] / len(records))
            raise self._client.error(f"reads other tokens at {share} of the text; is --teacher_tokenizer the model's?")
        self.counts += self._pending

    def _check_same_model(self) -> None:
        """After a lost connection: does the same model answer?"""
        again = self._ask([self._first], self._reader.k)[0]
        found = [self._records(self._first, each, Counter())["target_log_prob"] for each in (again, self._probe)]
        if _is_other(*found):
            raise self._client.error("answers otherwise than before the connection was lost: its model has changed; "
                                     "with the same model the same command goes on")  # fmt: skip

    def _records(self, prompt: _Prompt, answer: Answer, counts: Counter) -> np.ndarray:
        part = slice(0, len(prompt.ids)) if self._takes_ids else self._whole_characters(prompt)
        before, after = sum(prompt.is_target[: part.start]), sum(prompt.is_target[part.stop :])
        counts["split"] += before + after
        try:
            records = self._reader.records(answer, *_part_of(prompt, part), counts)
        except BadAnswer as error:
            raise self._misfit(error) from None
        return np.concatenate([self._reader.empty_records(before), records, self._reader.empty_records(after)])

    def _whole_characters(self, prompt: _Prompt) -> slice:
        """The tokens of a prompt between the characters that it begins or ends inside of."""
        pieces = [self._table.pieces[i] for i in prompt.ids]
        start, stop = 1, len(pieces)
        while start < stop and (pieces[start] or b" ")[0] & 0xC0 == 0x80:
            start += 1
        while stop > start:
            try:
                b"".join(pieces[start:stop]).decode()
                break
            except UnicodeDecodeError:
                stop -= 1
        return slice(start, stop)

    def _text_of(self, prompt: _Prompt, with_start: bool) -> str:
        part = self._whole_characters(prompt)
        ids = [*prompt.ids[: int(with_start)], *prompt.ids[part]]
        return b"".join(self._table.pieces[i] or self._table.strings[i].encode() for i in ids).decode()

    def _misfit(self, error: BadAnswer) -> UsageError:
        return self._client.error(f"its answer does not fit the text: it {error}; is --teacher_tokenizer the model's?")

    def _ask(self, prompts: Sequence[_Prompt], k: int, is_trial: bool = False) -> list[Answer]:
        """Raises: Refused"""
        if self._takes_ids:
            ids = [prompt.ids for prompt in prompts]
            content = self._complete(ids, k, is_trial, return_tokens_as_token_ids=True)
            return self._answers_in(content, len(prompts))
        answers = list[Answer]()
        for prompt in prompts:
            text = self._text_of(prompt, with_start=not self._adds_start)
            answers += self._answers_in(self._complete(text, k), 1)
        return answers

    def _complete(self, prompt: Any, k: int, is_trial: bool = False, **more: Any) -> dict:
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": k, "temperature": 1.0,
            **more,
        }  # fmt: skip
        content = self._client.request("/completions", body, is_trial)
        answers_as = str(content.get("model", self._model))
        self._answers_as = self._answers_as or answers_as
        if answers_as != self._answers_as:
            raise self._client.error(f"its model has changed from {self._answers_as} to {answers_as}; with the first "
                                     "one the same command goes on")  # fmt: skip
        return content

    def _answers_in(self, content: dict, count: int) -> list[Answer]:
        try:
            choices = sorted(content["choices"], key=lambda choice: choice.get("index", 0))
            if len(choices) != count:
                raise BadAnswer(f"has {len(choices)} choices for {count} prompts")
            return [read_completion(choice["logprobs"]) for choice in choices]
        except KeyError as error:
            raise self._client.error(f"its answer has no {error}") from None
        except (TypeError, AttributeError):
            raise self._client.error("its answer has no list of choices with log-probabilities") from None
        except BadAnswer as error:
            raise self._misfit(error) from None


def _prompt_of(text: TeacherText, number: int) -> _Prompt:
    block, dataset = text.dataset.blocks[number], text.dataset
    part, stream = slice(block.teacher_start, block.teacher_end), text.dataset.text.teacher
    ids = [dataset.start_of(block, "teacher"), *stream.ids[part].tolist()]
    return _Prompt(ids, [False, *stream.is_target[part].tolist()])


def _part_of(prompt: _Prompt, part: slice) -> _Prompt:
    """A part of a block, behind the same start token."""
    if part.start == 0:
        return prompt
    return _Prompt([prompt.ids[0], *prompt.ids[part]], [False, *prompt.is_target[part]])


def _has_added_start(content: dict, prompt: _Prompt, table: TokenTable) -> bool:
    """Has the server put a start token before a prompt without one? Some count it, and leave it out of the tokens."""
    try:
        names, usage = content["choices"][0]["logprobs"]["tokens"], content.get("usage") or {}
        return names[0] == table.strings[prompt.ids[0]] or usage.get("prompt_tokens") == len(prompt.ids)
    except (KeyError, IndexError, TypeError, AttributeError):
        return False  # no log-probabilities, which the next answer will show


def _is_other(log_probs: np.ndarray, others: np.ndarray) -> bool:
    """Do two answers about one text differ by more than rounding?"""
    differences = np.abs(log_probs.astype(np.float64) - others)
    return bool(differences[np.isfinite(differences)].mean() > _MAX_CHANGE)
