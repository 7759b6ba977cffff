"""Ids of plain text and bytes of ids, from each kind of tokenizer.

The kind follows from the objects that a tokenizer holds, so that no package need be installed: a Rust backend
(byte-level or SentencePiece-like), a tiktoken encoding, a SentencePiece processor, mistral-common's wrapper of either,
or none. Bytes read here are a claim; `token_table.build_token_table` verifies them.
"""

from __future__ import annotations

import contextlib
import json
import re
import string
from collections.abc import Callable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

from sar_kd.errors import UsageError

METASPACE = "\u2581"

END_OF_TEXT = "<|endoftext|>"

STOP_TOKENS = frozenset(
    (
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|im_end|>",
        END_OF_TEXT,
        "</s>",
        "<end_of_turn>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|eot|>",
    )
)
"""Special tokens that are known to end a text or a turn of it."""

TURN_TOKENS = frozenset(("<|im_start|>",))
"""Special tokens that are known to begin a turn of a conversation; some tokenizers name one as their start token."""

_MAX_ID = 2**24
"""To copy or save a Rust tokenizer takes a look-up for each number up to its largest id"""

_SHORT_TEXTS = ("a", string.printable + "\u00e9\u0301\u65e5")

_MAX_GROWTH = 20
"""Characters from one; NFKD makes 18 of a ligature"""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def is_byte_token(string: str) -> bool:
    """Is this the spelling of a byte, "<0x61>"?"""
    return _BYTE_TOKEN.fullmatch(string) is not None


class Vocabulary(NamedTuple):
    """The ids of a tokenizer's definition; ids without a token are in neither dictionary."""

    strings: dict[int, str]
    """The vocabulary's own spelling."""
    pieces: dict[int, bytes]
    """Bytes; b"" for special tokens."""
    metaspace: bool
    """U+2581 stands for a space."""


class EncodingFailure(UsageError):
    """A tokenizer that cannot encode plain text, because of nonsense in its file."""

    def __init__(self, reason: str):
        super().__init__(f"a tokenizer {reason}; put back the tokenizer.json that its model was trained with")
        self.reason = reason
        """Behind 'its tokenizer'"""


@contextlib.contextmanager
def _rust_errors() -> Iterator[None]:
    """Turn what a Rust tokenizer raises into an EncodingFailure: a panic, or an Exception of no class of its own."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise EncodingFailure(f"fails on plain text ({str(error).strip().partition(chr(10))[0]})") from None


def encode(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text. No special token is added, and text that looks like a special token stays text."""
    backend = _backend_of(tokenizer)
    if backend is not None:
        encode_batch = getattr(backend, "encode_batch_fast", backend.encode_batch)  # without offsets, twice as fast
        with _rust_errors():
            return [encoding.ids for encoding in encode_batch(texts, add_special_tokens=False)]
    inner = _mistral_common(tokenizer)
    if inner is not None:
        return [inner.encode(text, bos=False, eos=False) for text in texts]
    model = _model_of(tokenizer)
    if hasattr(model, "encode_ordinary_batch"):
        return model.encode_ordinary_batch(texts)
    tokens = [tokenizer.tokenize(text, split_special_tokens=True) for text in texts]
    return [tokenizer.convert_tokens_to_ids(each) for each in tokens]


def called_ids(tokenizer, text: str, **options) -> list[int]:
    """The ids that calling the tokenizer gives; special tokens in the text are recognised."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = (backend.truncation, backend.padding) if backend else (None, None)
    with _rust_errors():
        ids = tokenizer(text, **options)["input_ids"]
    if backend is not None and truncation:  # which the call has switched off
        backend.enable_truncation(**truncation)
    if backend is not None and padding:
        backend.enable_padding(**padding)
    return ids


def added_tokens(tokenizer) -> dict:
    """The added tokens by id; none where the tokenizer has no dictionary of them, as mistral-common's has not."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    return added if isinstance(added, dict) else {}


def special_tokens(tokenizer) -> set[str]:
    """The spellings that stand for no text: special by the definition, named in a role, or known to end a text.

    A token that is only listed as special is text where the definition says so: transformers lists SentencePiece's
    user-defined pieces, such as "(" in Jurassic-2's, and text becomes them.
    """
    added = added_tokens(tokenizer).values()
    text = {token.content for token in added if not token.special}
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    return special - text | {*tokenizer.special_tokens_map.values(), *STOP_TOKENS}


_COPIES: WeakKeyDictionary = WeakKeyDictionary()


@_rust_errors()
def _backend_of(tokenizer):
    """A copy of the Rust tokenizer, without special tokens in text, truncation and padding; None if there is none.

    The tokenizer itself is saved with a student, and stays as it was given.
    """
    given = getattr(tokenizer, "backend_tokenizer", None)
    if given is None:
        return None
    size, backend = _COPIES.get(tokenizer, (0, None))
    if size != len(tokenizer):
        _require_bounded(given)
        # Some definitions forget to mark a token as special (Phi-3's "</s>"); it would be found inside the text.
        names = special_tokens(tokenizer)
        backend = type(given).from_str(given.to_str())
        added = backend.get_added_tokens_decoder().values()
        backend.add_special_tokens([token for token in added if not token.special and token.content in names])
        if type(backend.model).__name__ == "Unigram":
            backend = _split_look_alikes(backend)
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        _COPIES[tokenizer] = len(tokenizer), backend
    return backend


def _require_bounded(backend) -> None:
    """Raise EncodingFailure for a Rust tokenizer that would take minutes: by its ids, or by what it makes of a text."""
    if (largest := max(backend.get_vocab(with_added_tokens=False).values(), default=0)) > _MAX_ID:
        raise EncodingFailure(f"has id {largest:,} in its vocabulary, and no model has as many")
    for text in _SHORT_TEXTS:
        normalized = text
        for step in _steps(backend.normalizer):
            normalized = step.normalize_str(normalized)
            if len(normalized) > _MAX_GROWTH * len(text):
                raise EncodingFailure(f"makes {len(normalized):,} characters of {len(text)} (its normalizer)")


def _steps(normalizer) -> list:
    """The parts of a Rust tokenizer's normalizer, sequences flattened."""
    if type(normalizer).__name__ != "Sequence":
        return [] if normalizer is None else [normalizer]
    return [step for i in range(len(normalizer)) for step in _steps(normalizer[i])]


def _split_look_alikes(backend):
    """The same, but "</s>" and "<0x41>" are split in two, because a Unigram model takes them for its pieces."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    heads = [f"{re.escape(string[0])}(?={re.escape(string[1:])})" for string in sorted(special) if string[1:]]
    pattern = {"Regex": "|".join([*heads, "<(?=0x[0-9A-F]{2}>)"])}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    definition = json.loads(backend.to_str())
    own = [definition["pre_tokenizer"]] if definition["pre_tokenizer"] else []
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*own, split]}
    return type(backend).from_str(json.dumps(definition))


def _mistral_common(tokenizer):
    """mistral-common's own tokenizer, where transformers wraps one; else None."""
    return getattr(getattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer", None), "tokenizer", None)


def _model_of(tokenizer):
    """The tiktoken encoding or SentencePiece processor that a tokenizer without a Rust backend holds; else None."""
    inner = _mistral_common(tokenizer)
    attributes = vars(tokenizer).values() if inner is None else [inner._model]
    return next((x for x in attributes if hasattr(x, "encode_ordinary_batch") or hasattr(x, "piece_to_id")), None)


def unnamed_end(tokenizer) -> int | None:
    """The end-of-text id that only the tiktoken encoding inside names, as in Qwen's first tokenizer; else None."""
    model = _model_of(tokenizer) if _backend_of(tokenizer) is None else None
    if model is None or END_OF_TEXT not in getattr(model, "special_tokens_set", ()):
        return None
    return model.encode_single_token(END_OF_TEXT)


def read_vocabulary(tokenizer) -> Vocabulary:
    """Spelling and bytes of every id by the tokenizer's definition; special tokens have no bytes.

    Raises: ValueError if the definition does not give the bytes
    """
    vocabulary, names = _read_model(tokenizer), special_tokens(tokenizer)
    special = {*tokenizer.all_special_ids, tokenizer.unk_token_id} & vocabulary.strings.keys()
    vocabulary.pieces.update(dict.fromkeys(special, b""))
    for index, token in added_tokens(tokenizer).items():
        text = token.content.replace(METASPACE, " ") if vocabulary.metaspace else token.content
        vocabulary.strings[index] = token.content
        vocabulary.pieces[index] = b"" if token.content in names else text.encode()
    return vocabulary


def _read_model(tokenizer) -> Vocabulary:
    backend = _backend_of(tokenizer)
    model = _model_of(tokenizer) if backend is None else None
    if hasattr(model, "encode_ordinary_batch"):
        return _read_tiktoken(model, tokenizer)
    if backend is not None:
        to_bytes, metaspace = _backend_reader(backend)
    elif model is not None:
        to_bytes, metaspace = _sentencepiece_reader(model), True
    elif hasattr(tokenizer, "byte_decoder"):  # GPT-2's kind, written in Python
        to_bytes, metaspace = _byte_level_reader(), False
    elif hasattr(tokenizer, "_utf_vocab_size"):  # ByT5's kind: each byte is the character of its number
        to_bytes, metaspace = lambda string: string.encode("latin-1") if len(string) == 1 else b"", False
    else:
        raise ValueError(f"is a {type(tokenizer).__name__} without a definition that its bytes can be read from")
    vocab = tokenizer.get_vocab()
    pieces = {index: to_bytes(string) for string, index in vocab.items()}
    return Vocabulary({index: string for string, index in vocab.items()}, pieces, metaspace)


def _read_tiktoken(encoding, tokenizer) -> Vocabulary:
    """A tiktoken encoding's ids; a token that is not UTF-8 is spelled with escapes."""
    inner = _mistral_common(tokenizer)
    first = 0 if inner is None else inner.num_special_tokens  # Tekken's special tokens come before the encoding's
    strings = dict(enumerate(tokenizer.convert_ids_to_tokens(list(range(first)))))
    pieces = dict.fromkeys(strings, b"")
    special = {encoding.encode_single_token(string): string for string in encoding.special_tokens_set}
    for index in range(encoding.n_vocab):
        try:
            piece = encoding.decode_single_token_bytes(index)
        except KeyError:  # a gap between the ranks and the special tokens
            continue
        strings[first + index] = piece.decode("utf-8", "backslashreplace")
        pieces[first + index] = b"" if index in special else piece
    return Vocabulary(strings, pieces, metaspace=False)


def _backend_reader(backend) -> tuple[Callable[[str], bytes], bool]:
    """How a vocabulary string of a Rust tokenizer becomes bytes, and whether U+2581 stands for a space."""
    decoders = _kinds(backend.decoder)
    if "ByteLevel" in decoders or "ByteLevel" in _kinds(backend.pre_tokenizer):
        return _byte_level_reader(), False
    if {"Metaspace", "ByteFallback", "Replace"} & set(decoders):
        has_byte_tokens = "ByteFallback" in decoders or getattr(backend.model, "byte_fallback", False)

        def piece(string: str) -> bytes:
            byte = _BYTE_TOKEN.fullmatch(string) if has_byte_tokens else None
            return bytes([int(byte[1], 16)]) if byte else string.replace(METASPACE, " ").encode("utf-8", "replace")

        return piece, True
    model = type(backend.model).__name__
    raise ValueError(f"is a {model} tokenizer without byte-level or SentencePiece decoding, so its bytes are unknown")


def _kinds(part) -> list[str]:
    """The type names in one part of a Rust tokenizer, sequences flattened."""

    def names(definition: dict) -> list[str]:
        nested = next((definition[key] for key in ("pretokenizers", "decoders") if key in definition), None)
        return [definition["type"]] if nested is None else [name for inner in nested for name in names(inner)]

    return [] if part is None else names(json.loads(part.__getstate__()))


def _byte_level_reader() -> Callable[[str], bytes]:
    """The inverse of byte-level BPE's table from bytes to printable characters.

    Source: Radford et al., 2019 (GPT-2), whose published encoder defines the table
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    bytes_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def piece(string: str) -> bytes:
        try:
            return bytes([bytes_of[c] for c in string])
        except KeyError:  # not spelled in this alphabet, so no text becomes it
            return b""

    return piece


def _sentencepiece_reader(model) -> Callable[[str], bytes]:
    def piece(string: str) -> bytes:
        index = model.piece_to_id(string)
        if model.is_control(index) or model.is_unknown(index) or model.is_unused(index):
            return b""
        return bytes([int(string[3:5], 16)]) if model.is_byte(index) else string.replace(METASPACE, " ").encode()

    return piece
