"""Vocabularies made by hand, and tokenizers of them."""

import numpy as np

from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_table import CONTENT, END, SPECIAL, TokenTable


class TableTokenizer:
    """A tokenizer of a table that takes the longest match, from the left or from the right; it stops where none is."""

    def __init__(self, table: TokenTable, from_right: bool = False):
        self.from_right, self._dummy = from_right, table.dummy_prefix
        self._ids = {}
        for index, piece in enumerate(table.pieces):
            if piece and (piece not in self._ids or is_byte_token(table.strings[self._ids[piece]])):
                self._ids[piece] = index

    def encode(self, text: str) -> list[int]:
        rest, ids = b" " * self._dummy + text.encode(), []
        while rest:
            tails = [rest[start:] for start in range(len(rest))]
            heads = [rest[:end] for end in range(len(rest), 0, -1)]
            piece = next((piece for piece in (tails if self.from_right else heads) if piece in self._ids), None)
            if piece is None:
                break
            ids.append(self._ids[piece])
            rest = rest[: -len(piece)] if self.from_right else rest[len(piece) :]
        return ids[::-1] if self.from_right else ids


def encode_any(tokenizer, texts):
    """`backends.encode`, also for a `TableTokenizer`."""
    is_table = isinstance(tokenizer, TableTokenizer)
    return [tokenizer.encode(text) for text in texts] if is_table else encode(tokenizer, texts)


def is_byte_token(string: str) -> bool:
    return string.startswith("<0x")


def token_table(strings: list[str], start: str = "</s>", dummy_prefix: bool = False) -> TokenTable:
    """A table of these tokens: "<0x61>" is a byte, "</s>" the end, "<...>" no text, anything else its own spelling."""
    pieces = []
    for string in strings:
        is_text = not string.startswith("<")
        byte = bytes([int(string[3:5], 16)]) if is_byte_token(string) else b""
        pieces.append(string.encode() if is_text else byte)
    end = strings.index("</s>")
    kinds = np.array([CONTENT if piece else SPECIAL for piece in pieces], dtype=np.uint8)
    kinds[end] = END
    return TokenTable(
        pieces,
        strings,
        kinds,
        end_id=end,
        end_ids=(end,),
        start_id=strings.index(start),
        dummy_prefix=dummy_prefix,
        nfc=False,
        metaspace=True,
        change="",
        unwritten=frozenset(
            i for i, string in enumerate(strings) if is_byte_token(string) and pieces.count(pieces[i]) > 1
        ),
    )
