"""The exact bytes of every token id.

Alignment uses neither `offset_mapping` (zero-width in some tokenizers, the same span for every piece of a character in
others) nor decoded strings (every broken piece of a character decodes to the same U+FFFD). The bytes come from the
tokenizer's own definition and are verified on text built to break them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from weakref import WeakKeyDictionary

import numpy as np

from sar_kd.tokenization.backends import (
    METASPACE,
    STOP_TOKENS,
    TURN_TOKENS,
    Vocabulary,
    called_ids,
    encode,
    is_byte_token,
    read_vocabulary,
    special_tokens,
    unnamed_end,
)

Ids = Sequence[int] | np.ndarray

CONTENT, SPECIAL, END, UNKNOWN, PADDED = range(5)
"""Kinds of ids: text, no text, ends a text, stands for unknown text, padding of the LM head without a token."""

PROBES = (
    "Hello world", "Hello  world ", " leading", "trailing ", "  two", "a", " ", "   ", "x" * 300, "ab " * 100,
    "\n", "\n\n\n", "\t", "\r\n", "\x00\x01\x7f", "a\x00b", "\\n \\u0041 %s {0} $x #! @ ~ ` ^ | & * = +",
    "line one\nline two\n\n    indented code(x, y):\n\t\treturn x[0] + 1\n", "word.word, word; (word) [word] {word}",
    "0 1 12 123 1234 12345.6789 1,000,000", "don't won't I'll CamelCase snake_case kebab-case UPPER",
    "na\u00efve caf\u00e9 \u00fcber stra\u00dfe \u0153uvre", "e\u0301 combining a\u0308\u0323",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0", "\u4e2d\u6587\u5b57\u7b26", "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7", "\U0010ffff\ue000",
    "\ufb01ligature \u2460 \u00bd \u2126 \u212b", "nbsp\u00a0here zero\u200bwidth \u2028line \ufefflate bom",
    "\u0120 \u2581 <0x41> </s> <s> <unk> <|endoftext|> [UNK] ##ing",
)  # fmt: skip
"""Text that some tokenizers change: spaces, line ends, marks, joiners, scripts, look-alikes of tokens."""

_FUZZ_RANGES = (
    (0x20, 0x7E), (0x20, 0x7E), (0x61, 0x7A), (0x30, 0x39), (0x00, 0x1F), (0xA0, 0x24F), (0x300, 0x36F),
    (0x391, 0x3C9), (0x400, 0x45F), (0x5D0, 0x5EA), (0x621, 0x652), (0x905, 0x94D), (0xE01, 0xE3A),
    (0x2010, 0x2027), (0x2190, 0x22FF), (0x3041, 0x3093), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xE000, 0xF8FF),
    (0xFB00, 0xFB06), (0xFF01, 0xFF5E), (0x1D400, 0x1D454), (0x1F300, 0x1F5FF), (0x100000, 0x10FFFD),
)  # fmt: skip

_FUZZ_PIECES = (
    " ", "  ", "       ", "\n", "\r\n", "\n\n", "\t", "\x00", "\u00a0", "\u200b", "\u200d", "\u200f", "\u2028",
    "\u2581", "\u2581\u2581", "\u0120", "\ufe0f", "\u0301", "\u0308\u0323", "\u1100\u1161", "\U0001f3fd", "\u3000",
    "\U0001f1eb", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "def f(x):\n    return x\n", "\t\tif x != 0:", " the",
    '{"a": [1, 2]}', "The ", "'s", " 1234567", "3.14", "...", "<0xE6>", "</s>", "<|im_end|>", "<unk>", "<s>", "://a.b?",
)  # fmt: skip


_PLACES = ("{}", "\n{}", "a{}", "{}a")
"""Where a text is tried to find which of several tokens of its bytes is written."""


@dataclass(frozen=True)
class TokenTable:
    """The bytes and the kind of each id of one tokenizer; V ids, the LM head's padding included."""

    pieces: list[bytes]
    """Exact bytes by id; b"" where the id adds none: special and unknown tokens, padding."""
    strings: list[str]
    """The vocabulary's own spelling by id; "" for padding."""
    kinds: np.ndarray = field(compare=False)
    """uint8 [V]: CONTENT, SPECIAL, END, UNKNOWN or PADDED by id."""
    end_id: int
    """Ends a document; predicted like any other token."""
    end_ids: tuple[int, ...]
    """Every id that ends a text or a turn of it, `end_id` among them, ascending."""
    start_id: int
    """First input of every block, and of every document inside one (`document_start`); never predicted."""
    dummy_prefix: bool
    """The tokenizer puts one space before the text, as Llama 2's does; some only where the text has none."""
    nfc: bool
    """The tokenizer normalises text to NFC."""
    metaspace: bool
    """U+2581 stands for a space."""
    change: str
    """The first change of text that verification found, such as "'A' becomes 'a'"; "" where text is kept."""
    unwritten: frozenset[int] = frozenset()
    """Ids that the tokenizer never writes, because it writes another id of the same bytes: "<0x61>" beside "a"."""

    @property
    def has_own_start(self) -> bool:
        """The start token does not also end texts."""
        return self.start_id not in self.end_ids

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [V]: bytes by id."""
        return np.fromiter(map(len, self.pieces), dtype=np.int64, count=len(self.pieces))

    def spell(self, ids: Iterable[int]) -> bytes:
        """The bytes of some tokens."""
        return b"".join([self.pieces[i] for i in ids])

    def as_written(self, ends: Sequence[int], written: Iterable[int] = ()) -> TokenTable:
        """The table in which tokens that are never written have no bytes and end no text.

        ends: those of `end_ids` that are written; written: ids that occur in a text, whatever `unwritten` says
        """
        never = self.unwritten.difference(written)
        pieces = [b"" if i in never else piece for i, piece in enumerate(self.pieces)]
        end = self.end_id if self.end_id in ends else ends[0]
        return dataclasses.replace(self, pieces=pieces, end_id=end, end_ids=tuple(ends))

    def canonical(self, text: str) -> str:
        """The text as this tokenizer sees it; both models read the same canonical text."""
        text = text.replace(METASPACE, " ") if self.metaspace else text
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def dummy_bytes(self, ids: Ids, text: str) -> int | None:
        """Bytes that the tokenizer put before a canonical text: 0, or 1 for a dummy space; None if it changes the text.

        ids: of `text`. Their bytes are compared one by one only for a tokenizer that is known to change text.
        """
        content = text.encode()
        dummy = int(self.lengths[ids].sum()) - len(content)
        if dummy not in (0, int(self.dummy_prefix)):
            return None
        return None if self.change and self.spell(ids) != b" " * dummy + content else dummy

    def describe_change(self, ids: Ids, text: str) -> str:
        """The first difference between `text` and the bytes of its `ids`: "'Hello' becomes 'hello'"."""
        decoded = self.spell(ids).decode("utf-8", "replace")
        if self.dummy_prefix and not text.startswith(" "):
            decoded = decoded.removeprefix(" ")
        pairs = enumerate(zip(text, decoded, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(text), len(decoded)))
        part = slice(max(0, first - 30), max(0, first - 30) + 40)
        return f"{text[part]!r} becomes {decoded[part]!r}"


@lru_cache(maxsize=1)
def fuzz_texts() -> tuple[str, ...]:
    """2000 short random texts, always the same: scripts, marks, joiners, spaces, controls, code, look-alikes."""
    draw = random.Random(0)
    return tuple("".join(_fuzz_piece(draw) for _ in range(draw.randint(1, 9))) for _ in range(2000))


def _fuzz_piece(draw: random.Random) -> str:
    if draw.random() < 0.4:
        return draw.choice(_FUZZ_PIECES)
    low, high = draw.choice(_FUZZ_RANGES)
    return "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 5)))


def same_tokenizer(a, b) -> bool:
    """Equal vocabularies that give the same ids for the probe texts."""
    return a.get_vocab() == b.get_vocab() and encode(a, list(PROBES)) == encode(b, list(PROBES))


def start_and_end(tokenizer) -> tuple[int, int]:
    """The ids that open a block and end a document.

    Raises: ValueError if the tokenizer has no end-of-text token
    """
    end = unnamed_end(tokenizer) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end is None:
        raise ValueError("has no end-of-text token (eos_token), which separates documents: save it with one")
    start = tokenizer.bos_token_id
    return (end if start is None else start), end


def check_vocab_size(tokenizer, vocab_size: int) -> None:
    """Check that text becomes ids below `vocab_size` only. Special tokens above it, such as an added padding, are fine.

    vocab_size: of the model's LM head
    Raises: ValueError if text, or a text's start or end, can become an id for which the model has no logit
    """
    special = special_tokens(tokenizer)
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    without = f"for which the model has no logits (its vocab_size is {vocab_size})"
    remedy = "resize the model's embeddings to the tokenizer, or use the tokenizer that the model was trained with"
    for name, index in zip(("start", "end"), start_and_end(tokenizer), strict=True):
        if index >= vocab_size:
            raise ValueError(f"has id {index} as the {name} of a text, {without}; {remedy}")
    text = [(i, token) for i, token in beyond if token not in special]
    if text:
        first, token = text[0]
        more = f" and {len(text) - 1} more" if text[1:] else ""
        raise ValueError(f"can turn text into {token!r} (id {first}{more}), {without}; {remedy}")


def document_start(tokenizer) -> tuple[int, ...]:
    """The id that each document begins with; none where the tokenizer's start token is an end or begins a chat turn.

    Raises: ValueError as `start_and_end`
    """
    start, end = start_and_end(tokenizer)
    is_other = start == end or tokenizer.bos_token in STOP_TOKENS | TURN_TOKENS
    return () if is_other else (start,)


def fingerprint(tokenizer) -> str:
    """A digest of a tokenizer: its definition, chat template and special tokens, and its ids of the probe texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    encoded = [[int(i) for i in ids] for ids in encode(tokenizer, [*PROBES, *fuzz_texts()])]
    parts = [type(tokenizer).__name__, backend.to_str() if backend else None, sorted(tokenizer.get_vocab().items())]
    parts += [
        encoded,
        getattr(tokenizer, "chat_template", None),
        sorted(map(str, tokenizer.special_tokens_map.items())),
    ]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()


_TABLES: WeakKeyDictionary = WeakKeyDictionary()


def build_token_table(tokenizer, vocab_size: int, stop_ids: tuple[int, ...] = ()) -> TokenTable:
    """The table of a transformers tokenizer, verified on `PROBES` and `fuzz_texts()`; built once and cached.

    vocab_size: of the model's LM head; stop_ids: further ids that end a text, as a generation config names them
    Raises: ValueError with the reason, if the tokens' bytes cannot be known, the tokenizer has no end-of-text token, or
        text can become ids above the model's
    """
    tables = _TABLES.setdefault(tokenizer, {})
    key = (vocab_size, tuple(stop_ids), len(tokenizer))
    if key not in tables:
        check_vocab_size(tokenizer, vocab_size)
        start, end = start_and_end(tokenizer)
        table = _table_of(tokenizer, read_vocabulary(tokenizer), vocab_size, start, end, stop_ids)
        tables[key] = dataclasses.replace(table, change=_find_change(tokenizer, table))
    return tables[key]


def _table_of(tokenizer, vocabulary: Vocabulary, vocab_size, start, end, stop_ids) -> TokenTable:
    spellings = {i: string for i, string in vocabulary.strings.items() if i < vocab_size}
    ids = range(vocab_size)
    pieces, strings = [vocabulary.pieces.get(i, b"") for i in ids], [spellings.get(i, "") for i in ids]
    pieces[start] = pieces[end] = b""
    known_stops = {i for i, string in spellings.items() if string in STOP_TOKENS and not pieces[i]}
    end_ids = sorted({end} | known_stops | (set(stop_ids) & spellings.keys()))
    kinds = np.full(len(ids), PADDED, dtype=np.uint8)
    kinds[list(spellings)] = [CONTENT if pieces[i] else SPECIAL for i in spellings]
    if tokenizer.unk_token_id in spellings:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    kinds[end_ids] = END
    table = TokenTable(
        pieces, strings, kinds, end, tuple(end_ids), start,
        dummy_prefix=False, nfc=False, metaspace=vocabulary.metaspace, change="",
    )  # fmt: skip
    return dataclasses.replace(
        table,
        dummy_prefix=table.spell(encode(tokenizer, ["a b"])[0]).startswith(b" a"),
        nfc=table.spell(called_ids(tokenizer, "e\u0301", add_special_tokens=False)).strip() == "\u00e9".encode(),
        unwritten=_find_unwritten(tokenizer, pieces, strings),
    )


def _find_unwritten(tokenizer, pieces: list[bytes], strings: list[str]) -> frozenset[int]:
    """Of ids that share their bytes, those that the tokenizer does not write for these bytes in any of four places."""
    twins: dict[bytes, list[int]] = {}
    for index, piece in enumerate(pieces):
        if piece:
            twins.setdefault(piece, []).append(index)
    groups = [(piece.decode("utf-8", "replace"), ids) for piece, ids in twins.items() if len(ids) > 1]
    texts = [form.format(text) for text, _ in groups for form in _PLACES]
    encoded = encode(tokenizer, texts) if texts else []
    unwritten: set[int] = set()
    for number, (_, ids) in enumerate(groups):
        places = encoded[len(_PLACES) * number : len(_PLACES) * (number + 1)]
        written = set(ids).intersection(chain.from_iterable(places))
        written = written or {i for i in ids if not is_byte_token(strings[i])} or set(ids)
        unwritten |= set(ids) - written
    return frozenset(unwritten)


def _find_change(tokenizer, table: TokenTable) -> str:
    """The first change of a probe or fuzz text; "" for none.

    Raises: ValueError if calling the tokenizer gives other ids than the encoding inside it
    """
    texts = [table.canonical(text) for text in (*PROBES, *fuzz_texts())]
    encoded = encode(tokenizer, texts)
    called = [i for i in called_ids(tokenizer, texts[0], add_special_tokens=False) if table.pieces[i]]
    if called != [i for i in encoded[0] if table.pieces[i]]:
        raise ValueError(f"does not encode text as the encoding inside it does: {texts[0]!r} becomes {called[:10]}")
    for text, ids in zip(texts, encoded, strict=True):
        decoded, content = table.spell(ids), text.encode()
        if decoded != content and not (table.dummy_prefix and decoded == b" " + content):
            return table.describe_change(ids, text)
    return ""
