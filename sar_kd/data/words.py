"""The words of a held-out text in the tokens of both models, so that their losses can be compared on each word.

An evaluation that sums the loss of each document sums that of each word in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sar_kd.tokenization.backends import read_vocabulary
from sar_kd.tokenization.token_stream import TokenCount, TokenizedText, TokenStream
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

FEWEST = 3
"""A word that occurs less often says nothing about the models."""

_MAX_WORDS = 2000

_MAX_BYTES = 2**21

_NO_TEXT = b"\xff"
"""For a byte that is no text, as a stop token has one, or a question's; UTF-8 never holds it"""

_JOINERS = "\u200c\u200d"
"""They shape the letters and emoji around them"""

_PIECE = re.compile(
    r"\udcff|\s+|[\u3040-\u30ff\u3400-\u9fff]|[\w\u0300-\u036f\u0590-\u1fff]+(?:['\u2019]\w+)*|[^\w\s\udcff]+"
)
"""White space, a word, or punctuation; of Chinese and Japanese a character. Combining marks belong to their word"""


@dataclass(frozen=True)
class Words:
    """The words that occur at least `FEWEST` times, the most frequent first."""

    names: list[str]
    counts: np.ndarray
    """int64 [W]"""
    num_bytes: int
    """Of the text's beginning, in which they were looked for"""
    of_tokens: dict[str, np.ndarray]
    """For each model, int64 [N + 1]: the word of each of the stream's first N tokens, and of all behind them; W where
    it is none of these words"""

    def of(self, which: str, tokens: np.ndarray) -> np.ndarray:
        """int64 [n]: the word of each of these tokens of one model's stream."""
        known = self.of_tokens[which]
        return known[np.minimum(tokens, len(known) - 1)]


def find_words(text: TokenizedText, pair: TokenizerPair, show: Callable[[str], None]) -> Words | None:
    """Cut the text into words, and find the tokens of each on both sides.

    The text is cut where a word, white space or punctuation begins, as far as a token ends there in both tokenizations:
    what lies between two such places is called a word here, however many it is. So no token is shared between two of
    them, nothing is shared out, and the losses of all words sum to that of the text. (A token that spans "of the"
    makes one word of both, in both models.) White space around a word is part of it, and left out of its name. Words
    of which a part is in no block are left out; of a large text the first 2 MB are read.

    Returns: None, and shows a line, where the tokenizers are equal and the bytes of their tokens are not known
    """
    streams = {"student": text.student, "teacher": text.teacher}
    if pair.tables is None:
        try:
            vocabulary = read_vocabulary(pair.student).pieces
        except ValueError as error:
            show(f"No losses by word: the tokenizer {error}")
            return None
        sides = dict.fromkeys(streams, _Side(text.student, vocabulary.get))
    else:
        tables = zip(streams.items(), pair.tables, strict=True)
        sides = {which: _Side(stream, table.pieces.__getitem__) for (which, stream), table in tables}
    spelled = sides["student"].spell().decode("utf-8", "surrogateescape")
    pieces = _PIECE.findall(spelled)
    sizes = map(len, pieces) if spelled.isascii() else (len(p.encode("utf-8", "surrogateescape")) for p in pieces)
    ends = np.cumsum(np.fromiter(sizes, dtype=np.int64, count=len(pieces)))
    is_cut = np.logical_and.reduce([np.isin(ends, side.ends) for side in sides.values()])
    cuts = ends[is_cut]
    is_usable = np.ones(len(cuts), dtype=bool)
    of_tokens = {}
    for column, (which, side) in enumerate(sides.items()):
        of_tokens[which] = found = np.append(np.searchsorted(cuts, side.ends - side.lengths, side="right"), len(cuts))
        is_used = np.asarray(streams[which].is_target[: len(found) - 1]).copy()
        num_targets = np.bincount(found[:-1][is_used], minlength=len(cuts) + 1)[:-1]
        for start, end in text.skipped_ranges.ranges[:, 2 * column : 2 * column + 2].tolist():
            is_used[start:end] = False
        is_usable &= (num_targets > 0) & (np.bincount(found[:-1][is_used], minlength=len(cuts) + 1)[:-1] == num_targets)
    chars = np.cumsum(np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces)))[is_cut].tolist()
    places: dict[str, list[int]] = {}
    for number, (first, last) in enumerate(zip([0, *chars], chars, strict=False)):
        if is_usable[number]:
            places.setdefault(_name(spelled[first:last]), []).append(number)
    ranked = sorted((item for item in places.items() if len(item[1]) >= FEWEST), key=lambda item: -len(item[1]))
    names, members = zip(*ranked[:_MAX_WORDS], strict=True) if ranked else ((), ())
    word_of = np.full(len(cuts) + 1, len(names), dtype=np.int64)
    for word, numbers in enumerate(members):
        word_of[numbers] = word
    counts = np.array(list(map(len, members)), dtype=np.int64)
    size = int(cuts[-1]) if len(cuts) else 0
    return Words(list(names), counts, size, {which: word_of[found] for which, found in of_tokens.items()})


class _Side:
    """The beginning of one model's stream, in bytes."""

    def __init__(self, stream: TokenStream, piece_of):
        """piece_of: gives the bytes of an id, or None"""
        count = min(len(stream.ids), _MAX_BYTES)
        if not isinstance(stream.ends, TokenCount):
            count = int(np.searchsorted(stream.ends, _MAX_BYTES, side="right"))
        self._pieces = [piece_of(i) or b"" for i in stream.ids[:count].tolist()]
        self._has_dummy, self._is_target = stream.has_dummy[:count].tolist(), stream.is_target[:count].tolist()
        if isinstance(stream.ends, TokenCount):  # which counts tokens: one without text that is predicted has a byte
            lengths = np.fromiter(map(len, self._pieces), dtype=np.int64, count=count)
            self.ends = np.cumsum(np.where(lengths == 0, stream.is_target[:count], lengths))
        else:
            self.ends = np.asarray(stream.ends[:count])
        self.lengths = np.diff(self.ends, prepend=0)
        """Bytes of each token"""

    def spell(self) -> bytes:
        """The text, with `_NO_TEXT` for each byte that is none, or is not predicted."""
        parts = zip(self._pieces, self.lengths.tolist(), self._has_dummy, self._is_target, strict=True)
        return b"".join([
            piece[has_dummy:] if is_target and len(piece) - has_dummy == length else _NO_TEXT * length
            for piece, length, has_dummy, is_target in parts
        ])  # fmt: skip


def _name(text: str) -> str:
    """A word as it is shown: without white space around it, which stands for itself only where it is alone.

    A character that nobody sees, or that turns the direction of writing, is shown by its number.
    """
    shown = text.strip() or text.encode("unicode_escape").decode().replace(" ", "\u2423")
    shown = shown.replace(_NO_TEXT.decode("utf-8", "surrogateescape"), "(end of text)")
    seen = any(map(str.isprintable, shown))
    return "".join(
        c if c.isprintable() or c.isspace() or (seen and c in _JOINERS) else f"U+{ord(c):04X}" for c in shown
    )
