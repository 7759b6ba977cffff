"""How llama.cpp cuts text by the entries of a GGUF file: its two algorithms, in Python, for a sample text.

- llama (SentencePiece): characters, of which the two neighbours whose union is the token of the highest score are
  joined, the first such pair of several; what is no token at the end becomes bytes.
- gpt2 (byte-level BPE): the text split as `tokenizer.ggml.pre` says, then the merges in their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from sar_kd.models.gguf.vocabulary import PRE_TOKENIZERS

_CONTROL, _USER_DEFINED = 3, 4
"""Kinds of tokens in `tokenizer.ggml.token_type`"""


def cut_as_llama(path: Path, text: str) -> list[int] | None:
    """The tokens of a text, without a start token; None where the file names another algorithm, or a pre-tokenizer that
    is not among `PRE_TOKENIZERS`.
    """
    import gguf

    entries = _Entries(gguf.GGUFReader(path).fields)
    kind, name = entries.text("model"), entries.text("pre")
    if kind == "llama":
        kinds, tokens = entries.numbers("token_type"), entries.texts("tokens")
        own = [token for token, each in zip(tokens, kinds, strict=True) if each == _USER_DEFINED]
        puts_space = entries.numbers("add_space_prefix") or [1]
        return cut_by_scores(text, tokens, entries.numbers("scores"), own, bool(puts_space[0]))
    return _cut_by_merges(text, entries, name) if kind == "gpt2" and name in PRE_TOKENIZERS else None


class _Entries:
    def __init__(self, fields: Any):
        self._fields = fields

    def text(self, key: str) -> str:
        return next(iter(self.texts(key)), "")

    def texts(self, key: str) -> list[str]:
        field = self._fields.get(f"tokenizer.ggml.{key}")
        return [] if field is None else [bytes(field.parts[i]).decode() for i in field.data]

    def numbers(self, key: str) -> list[float]:
        field = self._fields.get(f"tokenizer.ggml.{key}")
        return [] if field is None else [field.parts[i].tolist()[0] for i in field.data]


def cut_by_scores(
    text: str, tokens: Sequence[str], scores: Sequence[float], user_defined: Sequence[str], puts_space: bool
) -> list[int]:
    """The tokens of a text in a SentencePiece vocabulary.

    user_defined: tokens that are found in the text before all else; puts_space: before the text, if it begins with none
    """
    ids, space = {token: i for i, token in enumerate(tokens)}, "\u2581"
    own = sorted(user_defined, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, own))})", text) if own else [text]
    found: list[int] = []
    for number, part in enumerate(parts):
        if number % 2:
            found.append(ids[part] if part in ids else ids[part.replace(" ", space)])
            continue
        if part and puts_space and number == 0:
            part = " " + part
        for symbol in _merge(list(part.replace(" ", space)), ids, scores):
            if symbol in ids:
                found.append(ids[symbol])
            else:
                found += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


def _merge(symbols: list[str], ids: dict[str, int], scores: Sequence[float]) -> list[str]:
    while True:
        pairs = [(ids.get(a + b, -1), i) for i, (a, b) in enumerate(pairwise(symbols))]
        joined = [(-scores[token], i) for token, i in pairs if token >= 0]
        if not joined:
            return symbols
        _, i = min(joined)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def _cut_by_merges(text: str, entries: _Entries, name: str) -> list[int]:
    tokens, kinds = entries.texts("tokens"), entries.numbers("token_type")
    pre_tokenizer, ignore_merges = PRE_TOKENIZERS[name]
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind == _CONTROL}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    model: dict[str, Any] = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "ignore_merges": ignore_merges,
    }
    model["merges"] = [pair.split(" ") for pair in entries.texts("merges")]
    definition: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": pre_tokenizer,
        "model": model,
    }
    definition |= dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    return list(tokenizers.Tokenizer.from_str(json.dumps(definition)).encode(text, add_special_tokens=False).ids)
