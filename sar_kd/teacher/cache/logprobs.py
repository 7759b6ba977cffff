"""Log-probabilities that another program computed, as records of a teacher cache.

Two forms are read: vLLM's `prompt_logprobs` (for each token of a text a list {token id: {logprob, rank,
decoded_token}}, the first one null) and the `logprobs` of an OpenAI-compatible /v1/completions with `echo` (tokens,
token_logprobs, top_logprobs). The second one names tokens by their text, which several may share, or as "token_id:5".

A record holds the k most likely tokens, so there is one only where all of these have a name that is theirs alone. The
mass of the other tokens at temperature 1 is 1 minus the sum of their probabilities.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from sar_kd.teacher.cache.format import record_dtype
from sar_kd.tokenization.token_table import TokenTable

SMALLEST_TAIL = 1e-6
"""Mass of all other tokens that float32 log-probabilities of the top k leave known; a smaller one is taken as this"""

_TOLERANCE = 1e-3
"""Of a sum of probabilities above 1, and between two statements of one log-probability, nats"""

_MASKED = -9999.0
"""What vLLM writes for -inf, which JSON has not"""

_TOKEN_ID, _BYTES = re.compile(r"token_id:(\d{1,9})"), re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")

_MIN_SHIFT_TOKENS = 32

REASONS = {
    "first": "behind no start token, where no log-probability is given",
    "split": "where other tokens were read",
    "special": "special tokens that were not read",
    "cut": "where a token of the top k is not given, or has no name of its own",
    "document": "in documents that were not given",
}
"""Why there is no record, by the name in a header's counts"""

SMALL_TAIL = "small_tail"
"""In a header's counts: records whose tail is `SMALLEST_TAIL`"""


class BadAnswer(ValueError):
    """Log-probabilities that are none, or not of this text; the message says what is wrong."""


class Answer(NamedTuple):
    """The log-probabilities of the tokens of one text. A token is its id, or its name where no id is given."""

    tokens: list[int | str | None]
    """None: not given"""
    log_probs: list[float | None]
    """Of each token given those before it, nats; None where it is not given"""
    tops: list[list[tuple[int | str, float]]]
    """Of each position tokens with their log-probabilities, the most likely first; empty where not given"""


def read_prompt_logprobs(entries: Any, ids: Sequence[int] | None = None) -> Answer:
    """An answer in vLLM's form. ids: of the text's tokens; by default the first of each position, which is its own

    Raises: BadAnswer
    """
    try:
        values = [[(int(token), _log_prob(each)) for token, each in (entry or {}).items()] for entry in entries]
        if ids is None:
            tokens: list = [entry[0][0] if entry else None for entry in values]
        else:
            tokens = [int(token) for token in ids]
        own = [dict(entry).get(token) for token, entry in zip(tokens, values, strict=True)]
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise BadAnswer(f"is not of vLLM's form ({error})") from None
    if any(entry and log_prob is None for entry, log_prob in zip(values, own, strict=True)):
        raise BadAnswer("has a token of the text without a log-probability")
    return Answer(tokens, own, [_sorted(entry) for entry in values])


def read_completion(logprobs: Any) -> Answer:
    """An answer in the form of /v1/completions. Raises: BadAnswer"""
    try:
        tokens: list[int | str | None] = [_token_of(name) for name in logprobs["tokens"]]
        own = [None if value is None else _log_prob(value) for value in logprobs["token_logprobs"]]
        tops = [
            [(_token_of(name), _log_prob(value)) for name, value in (entry or {}).items()]
            for entry in logprobs["top_logprobs"] or [{}] * len(tokens)
        ]
        if not len(tokens) == len(own) == len(tops):
            raise ValueError("its lists differ in length")
    except KeyError as error:
        raise BadAnswer(f"has no {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise BadAnswer(f"has no log-probabilities of the text ({error})") from None
    return Answer(tokens, own, [_sorted(entry) for entry in tops])


def _token_of(name: str) -> int | str:
    found = _TOKEN_ID.fullmatch(name)
    return int(found[1]) if found else name


def _log_prob(value: Any) -> float:
    value = value["logprob"] if isinstance(value, dict) else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value > _TOLERANCE:
        raise ValueError(f"{value!r} is no log-probability")
    return -math.inf if value <= _MASKED else float(value)


def _sorted(entry: list[tuple[Any, float]]) -> list[tuple[Any, float]]:
    return sorted(entry, key=lambda pair: -pair[1])


def num_given(answer: Answer) -> int:
    """The tokens that are given at a position, without the text's own where it is the least likely of all."""
    return max((len(top) - (top[-1][1] == own) for top, own in zip(answer.tops, answer.log_probs, strict=True) if top),
               default=0)  # fmt: skip


class RecordReader:
    """Makes records of answers, each token of a text found by its bytes."""

    def __init__(self, metadata: dict, table: TokenTable):
        """table: of the teacher's tokenizer"""
        self.dtype, self.table = record_dtype(metadata), table
        self.k, self.num_tokens = metadata["teacher_top_k"], metadata["num_tokens"]

    def records(self, answer: Answer, ids: Sequence[int], is_target: Sequence[bool], counts: Counter) -> np.ndarray:
        """The records of the tokens that are targets; counts: gets those without one, by their reason

        ids: of the text, start token included; the answer may go on behind it
        Raises: BadAnswer if it is not of these tokens
        """
        found = self.find_tokens(answer.tokens, ids)
        _check_positions(answer, found)
        records = self.empty_records(sum(map(bool, is_target)))
        targets = (i for i, is_one in enumerate(is_target) if is_one)
        for record, i in zip(records, targets, strict=True):
            place = found[i]
            own = None if place < 0 else answer.log_probs[place]
            if own is None:
                is_text = bool(self.table.pieces[ids[i]])
                counts["first" if place >= 0 else "split" if is_text else "special"] += 1
                continue
            record["target_log_prob"] = own
            if not self._write_top_k(record, answer.tops[place], answer.tokens[place], counts):
                counts["cut"] += 1
        return records

    def empty_records(self, count: int) -> np.ndarray:
        """Records without log-probabilities."""
        records = np.zeros(count, dtype=self.dtype)
        records["max_log_prob"] = records["target_log_prob"] = np.nan
        return records

    def _write_top_k(self, record: Any, top: list[tuple[int | str, float]], own: Any, counts: Counter) -> bool:
        """Whether the k most likely tokens are known, and written."""
        if len(top) == self.k and top[-1][0] == own and isinstance(own, str):
            return False  # the k-th may be another token that shared a name, beside which the text's own was added
        known = [(self._id_of(token), value) for token, value in top if value > -math.inf]
        kept = [(token, value) for token, value in known if token < self.num_tokens][: self.k]
        ids, values = [token for token, _ in kept], np.array([value for _, value in kept])
        if len(kept) < self.k or min(ids) < 0 or len(set(ids)) < self.k:
            return False
        mass = math.fsum(np.exp(values))
        if mass > 1.0 + _TOLERANCE:
            raise BadAnswer(f"has probabilities with the sum {mass:.3f} at one position")
        counts[SMALL_TAIL] += 1.0 - mass < SMALLEST_TAIL
        record["max_log_prob"], record["ids"], record["log_prob_gaps"] = values[0], ids, values - values[0]
        record["tail_log_ratios"] = math.log(max(1.0 - mass, SMALLEST_TAIL) / mass)
        return True

    def find_tokens(self, tokens: Sequence[int | str | None], ids: Sequence[int]) -> list[int]:
        """For each token of a text its place in an answer, -1 where the answer has other tokens or none of it.

        Start tokens and other special ones that only one of them has are left out.
        Raises: BadAnswer, naming the place, where the bytes of the two differ
        """
        pieces = self.table.pieces
        content, found = self.table.spell(ids), [-1] * len(ids)
        starts = np.cumsum([0, *(len(pieces[i]) for i in ids)]).tolist()
        place = at = 0  # in the text's tokens, and in its bytes
        for j, token in enumerate(tokens):
            while place < len(ids) and starts[place] < at:
                place += 1
            same = place if starts[place] == at else len(ids)
            while same < len(ids) and not pieces[ids[same]] and not self._is_named(token, ids[same], j):
                same += 1  # a special token that the answer lacks
            if same < len(ids) and self._is_named(token, ids[same], j):
                found[same], at, place = j, starts[same + 1], same + 1
            elif not self._adds_nothing(token):
                if at == len(content):
                    break  # the answer goes on
                size = self._size_of(token, content, at)
                if not size:
                    raise BadAnswer(self._difference(token, content, at))
                at += size
        if at < len(content):
            raise BadAnswer(f"ends after {at:,} of {len(content):,} bytes of the text")
        return found

    def _is_named(self, token: int | str | None, index: int, place: int) -> bool:
        """May a token of an answer be the one with this id?"""
        if isinstance(token, int):
            return token == index
        return (token is None and place == 0) or token in self._names_of(index)

    def _names_of(self, index: int) -> set[str]:
        piece = self.table.pieces[index]
        if not piece:
            return {"", self.table.strings[index]}
        names = {piece.decode("utf-8", how) for how in ("replace", "ignore")}
        names.add("bytes:" + "".join(f"\\x{byte:02x}" for byte in piece))
        return names | {name.removeprefix(" ") for name in names if self.table.dummy_prefix}

    def _adds_nothing(self, token: int | str | None) -> bool:
        """Is it a special token, which has no bytes of the text?"""
        if isinstance(token, int):
            return token >= len(self.table.pieces) or not self.table.pieces[token]
        return token is None or token in self._special_names

    @cached_property
    def _special_names(self) -> set[str]:
        pairs = zip(self.table.pieces, self.table.strings, strict=True)
        return {string for piece, string in pairs if not piece and string}

    def _size_of(self, token: int | str | None, content: bytes, at: int) -> int:
        """Bytes of the text that a token stands for which is not the text's own there; 0 if for none."""
        if isinstance(token, int):
            piece = self.table.pieces[token]
        else:
            found = _BYTES.fullmatch(token or "")
            piece = bytes.fromhex(found[1].replace("\\x", "")) if found else (token or "").encode()
        return len(piece) if content.startswith(piece, at) else 0

    def _difference(self, token: int | str | None, content: bytes, at: int) -> str:
        shown = self.table.spell([token]).decode("utf-8", "replace") if isinstance(token, int) else token
        rest = content[at : at + 30].decode("utf-8", "replace")
        return f"has {shown!r} where the text goes on with {rest!r}"

    def _id_of(self, token: int | str) -> int:
        """The id of a token of an answer, -1 for a name that several tokens share or none has."""
        return token if isinstance(token, int) else self._ids_by_name.get(token, -1)

    @cached_property
    def _ids_by_name(self) -> dict[str, int]:
        ids: dict[str, int] = {}
        for index in range(self.num_tokens):
            is_text = bool(self.table.pieces[index])
            if index in self.table.unwritten or (not is_text and not self.table.strings[index]):
                continue
            for name in self._names_of(index):
                ids[name] = index if name and ids.get(name, index) == index else -1
        return ids


def _check_positions(answer: Answer, found: Iterable[int]) -> None:
    """Compare the text's own log-probabilities with the top ones, and with those of the next position.

    Raises: BadAnswer if a position has two log-probabilities of its token, or they belong to the token behind it
    """
    places = [place for place in found if place >= 0 and answer.tops[place]]
    here = ahead = 0
    for place in places:
        top, token, own = answer.tops[place], answer.tokens[place], answer.log_probs[place]
        stated = next((value for other, value in top if other == token), own)
        if isinstance(token, int) and not (
            own is None or stated is None or math.isclose(own, stated, abs_tol=_TOLERANCE)
        ):
            raise BadAnswer("has two log-probabilities of one token")
        here += top[0][0] == token
        ahead += place + 1 < len(answer.tokens) and top[0][0] == answer.tokens[place + 1]
    if len(places) >= _MIN_SHIFT_TOKENS and ahead > 0.1 * len(places) + 2 * here:
        raise BadAnswer("has at each token the log-probabilities of the one behind it")


def count_lines(counts: dict[str, int], num_tokens: int) -> list[str]:
    """What the records of a text lack, in lines."""
    lines = [f"{counts[name]:,} of {num_tokens:,} tokens {why}" for name, why in REASONS.items() if counts.get(name)]
    if lines:
        lines = [f"Warning: no log-probabilities, so a student learns these from the text alone: {'; '.join(lines)}"]
    if small := counts.get(SMALL_TAIL):
        lines.append(
            f"The mass of all other tokens is below {SMALLEST_TAIL:g}, and stored as that, at {small:,} of "
            f"{num_tokens:,} tokens"
        )
    return lines
