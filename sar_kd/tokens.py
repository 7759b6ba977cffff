"""The exact bytes of every token, for any tokenizer that can be shown to keep text as it is.

Alignment trusts neither `offset_mapping` (zero-width in some tokenizers, the same span for every piece of a
character in others) nor decoded strings (every broken piece of a character decodes to the same U+FFFD). It
reads the bytes out of the tokenizer's own definition and verifies them on text built to break them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"

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


@dataclass(frozen=True)
class TokenTable:
    """What each id of one tokenizer adds to the text."""

    pieces: list[bytes]
    """Exact bytes by id; b"" where the id adds none: special tokens, unknown, rows of the head without a token."""
    strings: list[str]
    """The vocabulary's own spelling by id; "" for rows of the head without a token."""
    end_id: int
    """Ends a document; predicted like any other token."""
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

    def canonical(self, text: str) -> str:
        """The text as this tokenizer sees it; both models read the same canonical text."""
        text = text.replace(_METASPACE, " ") if self.metaspace else text
        return unicodedata.normalize("NFC", text) if self.nfc else text


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text: no special token added, and text that looks like a special token stays text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def same_tokenizer(a, b) -> bool:
    """Equal vocabularies that cut the probe texts alike."""
    return a.get_vocab() == b.get_vocab() and encode(a, list(PROBES)) == encode(b, list(PROBES))


def start_and_end(tokenizer) -> tuple[int, int]:
    """The ids that open a block and end a document.

    Raises: ValueError if the tokenizer has no end-of-text token
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("has no end-of-text token (eos_token), which separates documents")
    start = tokenizer.bos_token_id
    return (end if start is None else start), end


def build_token_table(tokenizer, num_rows: int) -> TokenTable:
    """The table of a transformers tokenizer whose model has a head of `num_rows` rows, verified on `PROBES`.

    Raises: ValueError with the reason and an example, if the tokenizer changes text or its bytes cannot be known
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    start, end = start_and_end(tokenizer)
    to_bytes, metaspace = _reader_of(definition)
    vocab = tokenizer.get_vocab()
    num_rows = max(num_rows, 1 + max(vocab.values()))
    pieces, strings = [b""] * num_rows, [""] * num_rows
    for string, index in vocab.items():
        pieces[index], strings[index] = to_bytes(string), string
    for token in definition["added_tokens"]:
        pieces[token["id"]] = b"" if token["special"] else token["content"].encode()
    unknown = tokenizer.unk_token_id
    if unknown is not None:
        pieces[unknown] = b""
    nfc = "NFC" in _kinds(definition["normalizer"])
    table = TokenTable(pieces, strings, end, start, _has_dummy_prefix(tokenizer, pieces), nfc, metaspace)
    _verify(tokenizer, table)
    return table


def _kinds(part: dict | None) -> list[str]:
    """The type names in one part of a tokenizer's definition, sequences flattened."""
    if part is None:
        return []
    nested = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    return [part["type"]] if nested is None else [kind for inner in nested for kind in _kinds(inner)]


def _reader_of(definition: dict):
    """How a vocabulary string becomes bytes, and whether U+2581 stands for a space."""
    decoders = _kinds(definition["decoder"])
    if "ByteLevel" in decoders or "ByteLevel" in _kinds(definition["pre_tokenizer"]):
        bytes_of = _byte_level_alphabet()
        return lambda string: bytes(bytes_of[c] for c in string) if all(c in bytes_of for c in string) else b"", False
    if {"Metaspace", "ByteFallback", "Replace"} & set(decoders):
        has_byte_tokens = "ByteFallback" in decoders

        def piece(string: str) -> bytes:
            byte = _BYTE_TOKEN.fullmatch(string) if has_byte_tokens else None
            return bytes([int(byte[1], 16)]) if byte else string.replace(_METASPACE, " ").encode("utf-8", "replace")

        return piece, True
    model = definition["model"]["type"]
    raise ValueError(f"is a {model} tokenizer without byte-level or SentencePiece decoding, so its bytes are unknown")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, inverted.

    Source: Radford et al., 2019 (GPT-2), whose published encoder defines the table
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _has_dummy_prefix(tokenizer, pieces: list[bytes]) -> bool:
    (ids,) = encode(tokenizer, ["a b"])
    return b"".join(pieces[i] for i in ids) == b" a b"


def _verify(tokenizer, table: TokenTable) -> None:
    texts = [table.canonical(probe) for probe in PROBES]
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        read = b"".join(table.pieces[i] for i in ids)
        if read != text.encode() and not (table.dummy_prefix and read == b" " + text.encode()):
            shown = read.decode("utf-8", "replace")
            raise ValueError(f"does not keep text as it is: {text[:40]!r} becomes {shown[:40]!r}")
