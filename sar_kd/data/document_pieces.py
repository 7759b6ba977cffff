"""Plain documents in pieces, encoded by both tokenizers; and without the lines that one of them changes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence

from sar_kd.data.files.samples import Conversation, Sample
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.long_text import TextPiece, encode_pieces, split_text
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

_LINE = re.compile(r"[^\n]*\n|[^\n]+")


def pieces_of(samples: Iterable[Sample], pair: TokenizerPair) -> Iterator[TextPiece]:
    """All plain documents, in order, in pieces."""
    encoders = [functools.partial(encode, tokenizer) for tokenizer in pair.tokenizers]
    for sample in samples:
        if isinstance(sample, Conversation):
            continue
        is_first, last = True, TextPiece("", "")
        try:
            pieces = split_text(_encodable(sample.chunks()), encoders, pair.canonical)
            last = next(pieces, last)
            for piece in pieces:
                yield last._replace(document=sample.name, is_first=is_first, is_last=False)
                is_first, last = False, piece
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and no encoding can
            last = TextPiece("", "")
        yield last._replace(document=sample.name, is_first=is_first)


def _encodable(chunks: Iterable[str]) -> Iterator[str]:
    for chunk in chunks:
        chunk.encode()
        yield chunk


def encode_chunk(pieces: Sequence[TextPiece], pair: TokenizerPair) -> Iterator[tuple]:
    """Each piece; by stream, its int32 ids [N]; and by stream, its `TokenTable.dummy_bytes`."""
    ids = [encode_pieces(functools.partial(encode, tokenizer), pieces) for tokenizer in pair.tokenizers]
    dummies: list[list] = [[0] * len(pieces)]
    if pair.tables is not None:
        dummies = [
            [table.dummy_bytes(own, piece.text) for own, piece in zip(side, pieces, strict=True)]
            for table, side in zip(pair.tables, ids, strict=True)
        ]
    return zip(pieces, zip(*ids, strict=True), zip(*dummies, strict=True), strict=True)


def without_changed_lines(piece: TextPiece, pair: TokenizerPair) -> tuple[tuple, list[int]]:
    """A piece without the lines that a tokenizer changes, as `encode_chunk` gives it; of each such line, the side.

    If what is left is changed too, nothing is left.
    """
    kept, sides = "", []
    for line, _, dummies in encode_chunk([TextPiece(text, "") for text in _LINE.findall(piece.text)], pair):
        kept += "" if None in dummies else line.text
        sides += [dummies.index(None)] if None in dummies else []
    (found,) = encode_chunk([piece._replace(text=kept, before=piece.before if kept else "")], pair)
    if None in found[2]:
        sides.append(found[2].index(None))
        (found,) = encode_chunk([piece._replace(text="", before="")], pair)
    return found, sides
