"""Long text is cut where that changes no token, and is kept or skipped as a whole."""

import dataclasses
import json

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sar_kd.data import tokenized_text
from sar_kd.data.dataset import build_dataset
from sar_kd.data.files import samples
from sar_kd.data.files.samples import Conversation, Document, Message
from sar_kd.data.tokenized_text import tokenize
from sar_kd.tokenization import long_text
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.long_text import encode_after, encode_texts, split_text
from sar_kd.tokenization.token_stream import TokenizedText
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

KINDS = ("byte", "sp", "dummy_prefix", "unigram")
TEXTS = {
    "lines": "A student reads what the teacher wrote.\nIt learns slowly, 12.5% a day.\n\n" * 40,
    "one line": "She said \"don't\", and he didn't; they'll see what we've done in 1969. " * 40,
    "code": "def add(a, b):\n    if a:\n\t\treturn a + b\n\n\nclass X:\n    y = {'a': [1, 2]}  # three\n" * 30,
    "no space": "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3067\u3059\u3002\u4eca\u5929\u5929\u6c14\u5f88\u597d" * 120,
    "one character": "x" * 3000,
    "spaces": ("word" + " " * 37 + "\n" * 5 + "\t \t") * 60,
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1eb\U0001f1f7 e\u0301\u0308 " * 120,
    "line ends": "a\rb\r\nc\x0b\x0c\u2028" * 300,
}


@pytest.fixture(scope="module")
def tokenizers(byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer, corpus_texts):
    words = {part for text in corpus_texts for word in text.split() for part in (word, f"\u2581{word}")}
    letters = {letter for text in [*corpus_texts, *TEXTS.values()] for letter in text} - {" "}
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary += [(piece, -9.0) for piece in sorted(words | letters | {"\u2581"}) if len(piece) < 20]
    unigram = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    unigram.decoder = decoders.Sequence(parts)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="</s>", unk_token="<unk>")
    return dict(zip(KINDS, (byte_tokenizer, sp_tokenizer, dummy_prefix_tokenizer, made), strict=True))


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(long_text, "PIECE", 300)
    monkeypatch.setattr(long_text, "_CONTEXT", 64)
    monkeypatch.setattr(tokenized_text, "_CHUNK", 1000)


def _chunks(text, size=777):
    return (text[first : first + size] for first in range(0, len(text), size))


# Pieces


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_the_pieces_are_those_of_the_whole(tokenizers, small_pieces, kind, name):
    tokenizer, text = tokenizers[kind], TEXTS[name]
    (found,), (whole,) = encode_texts(tokenizer, [text]), encode(tokenizer, [text])
    assert len(list(split_text(_chunks(text), [lambda texts: encode(tokenizer, texts)]))) > 3
    assert np.array_equal(found, whole)


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_lose_nothing_and_none_is_long(tokenizers, small_pieces, name):
    cut = list(split_text(_chunks(TEXTS[name]), [lambda texts: encode(tokenizers["byte"], texts)]))
    assert "".join(piece.text for piece in cut) == TEXTS[name]
    assert max(len(piece.text) for piece in cut) <= 300 + 64
    assert min(len(piece.text) for piece in cut[:-1]) >= 150
    assert [piece.before for piece in cut] == ["", *(piece.text[-1] for piece in cut[:-1])]


def test_text_is_cut_behind_a_line_end_else_before_a_word(tokenizers, small_pieces):
    encoders = [lambda texts: encode(tokenizers["byte"], texts)]
    assert {piece.text[-1] for piece in [*split_text([TEXTS["lines"]], encoders)][:-1]} == {"\n"}
    assert {piece.text[0] for piece in [*split_text([TEXTS["one line"]], encoders)][1:]} == {" "}


def _merging(byte_tokenizer, pair):
    """A tokenizer of single bytes and one merge."""
    definition = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    vocab = {token: i for token, i in definition["model"]["vocab"].items() if len(token) == 1 or "|" in token}
    vocab = {token: i for i, token in enumerate([*sorted(vocab, key=vocab.get), "".join(pair)])}
    definition["model"] |= {"vocab": vocab, "merges": [list(pair)]}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), eos_token="<|endoftext|>"
    )


def test_no_place_is_taken_that_would_part_a_token(byte_tokenizer, small_pieces):
    tokenizer, text = _merging(byte_tokenizer, ("a", "b")), "xx" + "ab" * 1000
    cut = list(split_text([text], [lambda texts: encode(tokenizer, texts)]))
    assert {piece.text[0] for piece in cut[1:]} == {"a"}


def test_a_place_must_suit_every_tokenizer(byte_tokenizer, small_pieces):
    first, second = (_merging(byte_tokenizer, pair) for pair in (("a", "b"), ("b", "c")))
    text = "xx" + "abc" * 800
    cut = list(split_text([text], [lambda texts: encode(first, texts), lambda texts: encode(second, texts)]))
    assert len(cut) > 3
    assert {piece.text[0] for piece in cut[1:]} == {"a"}


def test_where_no_place_suits_the_text_is_still_cut(small_pieces):
    def encoder(texts):
        return [[len(text)] for text in texts]  # no cut leaves the tokens as they were

    cut = list(split_text([TEXTS["one line"]], [encoder]))
    assert "".join(piece.text for piece in cut) == TEXTS["one line"]
    assert len(cut) > 3


def test_a_normaliser_is_not_cut_in_the_middle(tokenizers, small_pieces):
    import unicodedata

    text = "x" + "e\u0301" * 2000

    def canonical(part):
        return unicodedata.normalize("NFC", part)

    for encoder in (lambda texts: encode(tokenizers["byte"], texts), lambda texts: [[len(text)] for text in texts]):
        cut = list(split_text([text], [encoder], canonical))
        assert len(cut) > 3
        assert "".join(piece.text for piece in cut) == canonical(text)


def test_a_long_text_behind_an_anchor_has_no_space_before_it(tokenizers, small_pieces):
    tokenizer, text = tokenizers["dummy_prefix"], TEXTS["one line"]
    opening, whole = encode(tokenizer, ["\n", "\n" + text])
    assert np.array_equal(encode_after(tokenizer, "\n", text), whole[len(opening) :])


# Corpora of pieces


def _pair(student, teacher, **how) -> TokenizerPair:
    return TokenizerPair(student, teacher, student_vocab_size=len(student), teacher_vocab_size=len(teacher), **how)


def _fields(text: TokenizedText) -> list:
    """All fields of a text as plain values."""
    streams = [getattr(side, name) for side in (text.student, text.teacher) for name in ("ids", "ends", "has_dummy")]
    arrays = [np.asarray(array).tolist() for array in [*streams, text.student.is_target, text.starts]]
    others = [getattr(text, field.name) for field in dataclasses.fields(text)[2:] if field.name != "starts"]
    return [*arrays, *(list(other) if hasattr(other, "__getitem__") else other for other in others)]


MIXED = [
    Document("first", TEXTS["one line"]),
    Document("empty", ""),
    Document("short", "a word"),
    Document("torn", TEXTS["lines"] + "\ud800" + TEXTS["lines"]),
    Conversation("talk", (Message("user", "hello", False), Message("assistant", TEXTS["code"], True)), False),
    Document("last", TEXTS["no space"] + TEXTS["spaces"]),
]


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_a_text_in_pieces_and_chunks_is_the_text_at_once(tokenizers, student, teacher, monkeypatch):
    pair = _pair(tokenizers[student], tokenizers[teacher])
    monkeypatch.setattr(long_text, "PIECE", 10**6)
    at_once = tokenize(MIXED, pair)
    monkeypatch.setattr(long_text, "PIECE", 300)
    monkeypatch.setattr(long_text, "_CONTEXT", 64)
    monkeypatch.setattr(tokenized_text, "_CHUNK", 1000)
    assert _fields(tokenize(MIXED, pair)) == _fields(at_once)
    assert list(at_once.skipped_documents) == ["empty", "torn"]


def _with_normalizer(byte_tokenizer, normalizer):
    definition = json.loads(byte_tokenizer.backend_tokenizer.to_str()) | {"normalizer": normalizer}
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize("kind", ["sp", "byte"])
def test_a_tokenizer_that_changes_text_skips_the_same_lines_in_pieces(
    tokenizers, byte_tokenizer, small_pieces, monkeypatch, kind
):
    monkeypatch.setattr(tokenized_text, "MAX_SKIPPED_SHARE", 1)
    upper, lower = "A teacher wrote.\n", "a student reads what the teacher wrote.\n"
    documents = [
        *MIXED[1:-1],
        Document("first and last", upper + 30 * lower + upper),
        Document("whole pieces", 10 * lower + 60 * upper + 10 * lower),
        Document("all but the last", 60 * upper + lower),
        Document("all but the first", lower + 60 * upper),
        Document("all", 60 * upper),
        *(Document(name, TEXTS[name].lower()) for name in TEXTS),
    ]
    pair = _pair(tokenizers[kind], _with_normalizer(byte_tokenizer, {"type": "Lowercase"}))
    found = tokenize(documents, pair)
    monkeypatch.setattr(long_text, "PIECE", 10**6)
    assert _fields(found) == _fields(tokenize(documents, pair))
    partly = {"first and last": 2, "whole pieces": 60, "all but the last": 60, "all but the first": 60}
    assert list(found.names) == ["short", *partly, *TEXTS]
    reason = "the teacher's tokenizer changes"
    assert list(found.skipped_passages) == [f"{name} ({reason} it)" for name, n in partly.items() for _ in range(n)]
    assert list(found.skipped_documents) == ["empty", "torn", f"all ({reason} its text)", f"talk ({reason} its text)"]
    kept = [len(text.lower().encode()) for text in TEXTS.values()]
    assert found.num_bytes == len("a word") + 52 * len(lower) + sum(kept)
    assert found.skipped_bytes == 242 * len(upper) + len(TEXTS["code"])


def test_what_is_skipped_late_leaves_no_trace(byte_tokenizer, sp_tokenizer, small_pieces, monkeypatch):
    monkeypatch.setattr(tokenized_text, "MAX_SKIPPED_SHARE", 1)
    replace = {"type": "Replace", "pattern": {"String": "colour"}, "content": "color"}
    pair, plain = _pair(sp_tokenizer, _with_normalizer(byte_tokenizer, replace)), TEXTS["lines"]
    documents = [Document("a", "first"), Document("uk", plain + "colour\n" + plain), Document("b", plain)]
    found, without = tokenize(documents, pair), [documents[0], Document("uk", plain * 2), documents[2]]
    assert _fields(found)[:9] == _fields(tokenize(without, pair))[:9]
    assert list(found.names) == ["a", "uk", "b"]
    assert list(found.skipped_passages) == ["uk (the teacher's tokenizer changes it)"]
    assert (found.num_bytes, found.skipped_bytes) == (len("first" + plain * 3), len("colour\n"))
    monkeypatch.setattr(samples, "CHUNK", 700)  # so that the torn character is found late
    torn = Document("torn", "colour\n" + plain + "colour\n\ud800" + plain)
    found = tokenize([documents[0], torn, documents[2]], pair)
    assert _fields(found)[:9] == _fields(tokenize([documents[0], documents[2]], pair))[:9]
    assert (list(found.skipped_documents), list(found.skipped_passages)) == (["torn"], [])
    assert (found.num_bytes, found.skipped_bytes) == (len("first" + plain), 0)


def test_blocks_of_a_long_document_name_it(tokenizers, small_pieces):
    dataset = build_dataset(
        [Document("a", "x"), Document("long", TEXTS["lines"])], _pair(*[tokenizers["sp"]] * 2), 24, 24
    )
    assert dataset.documents_of(0) == ["a", "long"]
    assert dataset.documents_of(len(dataset) - 1) == ["long"]
