"""What llama.cpp has to know of a tokenizer, read from its `tokenizer.json`.

A SentencePiece-like vocabulary needs the priority of each token as a score, which `tokenizer.model` holds and
`tokenizer.json` has as the order of its merges. A byte-level one needs the name by which llama.cpp knows how it splits
text before the merges: the converter finds it by a digest of some token ids, which only published vocabularies match,
so that of a vocabulary that was cut or trained anew is found here by its definition.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
)
_WORDS += r"|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}

PRE_TOKENIZERS: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt-2": (_byte_level(True), False),
    "smollm": ({"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(True)]}, False),
    "llama-bpe": (_split(_WORDS.format("{1,3}")), True),
    "qwen2": (_split(_WORDS.format("")), False),
}
"""llama.cpp's name -> the pre-tokenizer, and whether a piece that is a token is taken without its merges"""

_OF_NO_EFFECT = ("trim_offsets",)
"""Entries of a pre-tokenizer that change no token"""


def pre_tokenizer_name(definition: dict[str, Any]) -> str:
    """llama.cpp's name for how a `tokenizer.json` splits text; '' for one that is not among `PRE_TOKENIZERS`."""
    own = _plain(definition.get("pre_tokenizer")), bool(definition["model"].get("ignore_merges"))
    return next((name for name, (part, ignores) in PRE_TOKENIZERS.items() if (_plain(part), ignores) == own), "")


def _plain(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _plain(value) for key, value in part.items() if key not in _OF_NO_EFFECT}
    return [_plain(value) for value in part] if isinstance(part, list) else part


def read_definition(folder: Path) -> dict[str, Any]:
    """The content of `tokenizer.json`; {} where there is none."""
    path = folder / "tokenizer.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_sentencepiece_like(definition: dict[str, Any]) -> bool:
    """Does it merge characters, and fall back to the bytes of those that are no token?"""
    model = definition.get("model", {})
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def puts_space_first(definition: dict[str, Any]) -> bool:
    """Does it put a space before the text?"""
    parts = [*_parts(definition.get("normalizer"), "normalizers")]
    parts += _parts(definition.get("pre_tokenizer"), "pretokenizers")
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _parts(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    return [] if part is None else part[key] if part["type"] == "Sequence" else [part]


def sentencepiece_model(definition: dict[str, Any], vocab_size: int) -> bytes:
    """A `tokenizer.model` of a SentencePiece-like `tokenizer.json`.

    score = -rank of the first merge that makes the token; below all of them where none does
    vocab_size: V of the model; ids that are no token get a piece of their own that is never used
    """
    from sentencepiece import sentencepiece_model_pb2

    library: Any = sentencepiece_model_pb2
    tokens = {id_: token for token, id_ in definition["model"]["vocab"].items()}
    added = {token["id"]: token for token in definition.get("added_tokens", [])}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(definition["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    unknown = definition["model"].get("unk_token")
    proto = library.ModelProto()
    kinds = proto.SentencePiece
    for id_ in range(max(vocab_size, len(tokens))):
        token = added[id_]["content"] if id_ in added else tokens.get(id_, f"[PAD{id_}]")
        if id_ not in added and id_ not in tokens:
            kind = kinds.UNUSED
        elif token == unknown:
            kind = kinds.UNKNOWN
        elif id_ in added:
            kind = kinds.CONTROL if added[id_]["special"] else kinds.USER_DEFINED
        else:
            kind = kinds.BYTE if _BYTE.fullmatch(token) else kinds.NORMAL
        score = -float(ranks.get(token, len(ranks)))
        proto.pieces.add(piece=token, score=0.0 if kind != kinds.NORMAL else score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = puts_space_first(definition)
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()
