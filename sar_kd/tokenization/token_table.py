"""The exact bytes of every token, for any tokenizer that can be shown to keep text as it is.

Alignment trusts neither `offset_mapping` (zero-width in some tokenizers, the same span for every piece of a
character in others) nor decoded strings (every broken piece of a character decodes to the same U+FFFD). It
reads the bytes out of the tokenizer's own definition and verifies them on text built to break them.
"""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from weakref import WeakKeyDictionary

import numpy as np

from sar_kd.tokenization.backends import METASPACE, STOP_TOKENS, Vocabulary, encode, read_vocabulary, unnamed_end

Ids = Sequence[int] | np.ndarray

CONTENT, SPECIAL, END, UNKNOWN, PADDED = range(5)
"""Kinds of ids: text, no text, ends a text, what the vocabulary lacks, a row of the head without a token."""

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
"""Text that tokenizers are known to change: spaces, line ends, marks, joiners, scripts, look-alikes of tokens."""

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


@dataclass(frozen=True)
class TokenTable:
    """What each id of one tokenizer adds to the text."""

    pieces: list[bytes]
    """Exact bytes by id; b"" where the id adds none: special tokens, unknown, rows of the head without a token."""
    strings: list[str]
    """The vocabulary's own spelling by id; "" for rows of the head without a token."""
    kinds: np.ndarray = field(compare=False)
    """uint8 [V]: CONTENT, SPECIAL, END, UNKNOWN or PADDED by id."""
    end_id: int
    """Ends a document; predicted like any other token."""
    end_ids: tuple[int, ...]
    """Every id that ends a text or a turn of it, `end_id` among them, ascending."""
    start_id: int
    """First input of every block, never predicted."""
    dummy_prefix: bool
    """The tokenizer puts one space before the text, as Llama 2's does; some only where the text has none."""
    nfc: bool
    metaspace: bool

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [V]: bytes by id."""
        return np.fromiter(map(len, self.pieces), dtype=np.int64, count=len(self.pieces))

    def spell(self, ids: Iterable[int]) -> bytes:
        """The bytes of some tokens."""
        return _spell(self.pieces, ids)

    def canonical(self, text: str) -> str:
        """The text as this tokenizer sees it; both models read the same canonical text."""
        text = text.replace(METASPACE, " ") if self.metaspace else text
        return unicodedata.normalize("NFC", text) if self.nfc else text


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
    """Equal vocabularies that cut the probe texts alike."""
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


def fingerprint(tokenizer) -> str:
    """A digest of what a tokenizer does: its definition, chat template and special tokens, and how it cuts text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cuts = [[int(i) for i in ids] for ids in encode(tokenizer, [*PROBES, *fuzz_texts()])]
    parts = [type(tokenizer).__name__, backend.to_str() if backend else None, sorted(tokenizer.get_vocab().items())]
    parts += [cuts, getattr(tokenizer, "chat_template", None), sorted(map(str, tokenizer.special_tokens_map.items()))]
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()


_TABLES: WeakKeyDictionary = WeakKeyDictionary()


def build_token_table(tokenizer, num_rows: int, stop_ids: tuple[int, ...] = ()) -> TokenTable:
    """The table of a transformers tokenizer, verified on `PROBES` and `fuzz_texts()`; built once and kept.

    num_rows: rows of the model's head; stop_ids: further ids that end a text, as a generation config names them
    Raises: ValueError with the reason and an example, if the tokenizer changes text or its bytes cannot be known
    """
    tables = _TABLES.setdefault(tokenizer, {})
    key = (num_rows, tuple(stop_ids), len(tokenizer))
    if key not in tables:
        start, end = start_and_end(tokenizer)
        table = _table_of(tokenizer, read_vocabulary(tokenizer), num_rows, start, end, stop_ids)
        _verify(tokenizer, table)
        tables[key] = table
    return tables[key]


def _table_of(tokenizer, vocabulary: Vocabulary, num_rows, start, end, stop_ids) -> TokenTable:
    ids = vocabulary.strings
    rows = range(max(num_rows, 1 + max(ids)))
    pieces, strings = [vocabulary.pieces.get(i, b"") for i in rows], [ids.get(i, "") for i in rows]
    pieces[start] = pieces[end] = b""
    known_stops = {i for i, string in ids.items() if string in STOP_TOKENS and not pieces[i]}
    end_ids = sorted({end} | known_stops | (set(stop_ids) & ids.keys()))
    kinds = np.full(len(rows), PADDED, dtype=np.uint8)
    kinds[list(ids)] = [CONTENT if pieces[i] else SPECIAL for i in ids]
    if tokenizer.unk_token_id in ids:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    kinds[end_ids] = END
    dummy_prefix = _spell(pieces, encode(tokenizer, ["a b"])[0]).startswith(b" a")
    nfc = _spell(pieces, _own_ids(tokenizer, "e\u0301")).strip() == "\u00e9".encode()
    return TokenTable(pieces, strings, kinds, end, tuple(end_ids), start, dummy_prefix, nfc, vocabulary.metaspace)


def _spell(pieces: list[bytes], ids: Iterable[int]) -> bytes:
    return b"".join([pieces[i] for i in ids])


def _own_ids(tokenizer, text: str) -> list[int]:
    """The ids that the tokenizer gives when it is called, after whatever it does to the text first."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _verify(tokenizer, table: TokenTable) -> None:
    texts = [table.canonical(text) for text in (*PROBES, *fuzz_texts())]
    encoded = encode(tokenizer, texts)
    for text, ids in zip(texts, encoded, strict=True):
        read = table.spell(ids)
        if read != text.encode() and not (table.dummy_prefix and read == b" " + text.encode()):
            shown = read.decode("utf-8", "replace")
            same = next((i for i, (a, b) in enumerate(zip(text, shown, strict=False)) if a != b), 0)
            part = slice(max(0, same - 30), max(0, same - 30) + 40)
            raise ValueError(f"does not keep text as it is: {text[part]!r} becomes {shown[part]!r}")
    own = [i for i in _own_ids(tokenizer, texts[0]) if table.pieces[i]]
    if own != [i for i in encoded[0] if table.pieces[i]]:
        raise ValueError(f"does not cut text as the encoding inside it does: {texts[0]!r} becomes {own[:10]}")
