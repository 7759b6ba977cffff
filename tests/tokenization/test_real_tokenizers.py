"""Published vocabularies: GPT-2's, and Mistral's of both kinds. Skipped where the packages that ship them are absent.

`pip install "mistral-common==1.13.1" sentencepiece tiktoken` and `pip install --no-deps openai-whisper==20250625`
bring them; none of them is needed to use SAR-KD.
"""

import base64
import importlib.util
import json
import time
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sar_kd.data.dataset import build_dataset
from sar_kd.data.files.samples import Document
from sar_kd.evaluation.tokenizer_coverage import measure_coverage
from sar_kd.tokenization.backends import encode
from sar_kd.tokenization.token_table import (
    CONTENT,
    PADDED,
    build_token_table,
    fuzz_texts,
    same_tokenizer,
    start_and_end,
)
from sar_kd.tokenization.tokenizer_pair import TokenizerPair

MISTRAL_FILES = {
    "mistral_v1": "tokenizer.model.v1",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_v7": "mistral_instruct_tokenizer_241114.model.v7",
    "tekken": "tekken_240718.json",
    "tekken_2": "tekken_240911.json",
}
SENTENCEPIECE = ("mistral_v1", "mistral_v3", "mistral_v7")
TEKKEN = ("tekken", "tekken_2")
GPT2 = ("gpt2", "gpt2_tiktoken")
EVERY_ONE = pytest.mark.parametrize("name", [*GPT2, *SENTENCEPIECE, *TEKKEN])
PYTHON = "def f(x):\n    if x != 0:\n        return [i ** 2 for i in range(x)]\n\treturn None\n"
MAX_SECONDS = 1.5
"""For a vocabulary of 131 072 on one core."""


def _mistral(name: str):
    pytest.importorskip("mistral_common")
    pytest.importorskip("tiktoken" if name in TEKKEN else "sentencepiece")
    return transformers.MistralCommonBackend(_mistral_path(name))


def _mistral_path(name: str) -> Path:
    path = Path(str(resources.files("mistral_common") / "data" / MISTRAL_FILES[name]))
    if not path.is_file():
        pytest.skip(f"this mistral-common ships no {path.name}")
    return path


@pytest.fixture(scope="session")
def gpt2_ranks() -> dict[bytes, int]:
    """The 50256 tokens of GPT-2 in the order of their merges, as openai-whisper ships them."""
    whisper = importlib.util.find_spec("whisper")  # not imported: it would load torch and numba
    path = Path(whisper.origin).parent / "assets" / "gpt2.tiktoken" if whisper and whisper.origin else Path("absent")
    if not path.is_file():
        pytest.skip("openai-whisper, which ships GPT-2's vocabulary, is not installed")
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@pytest.fixture(scope="session")
def gpt2(gpt2_ranks):
    """GPT-2's tokenizer as transformers loads it: byte-level strings and merges."""
    letters = bytes_to_unicode()
    strings = {token: "".join(letters[byte] for byte in token) for token in gpt2_ranks}
    # Every way to cut a token into two earlier ones is a merge of its rank; the real one is among them.
    merges = [
        (rank, strings[token[:i]], strings[token[i:]])
        for token, rank in gpt2_ranks.items()
        for i in range(1, len(token))
        if gpt2_ranks.get(token[:i], rank) < rank and gpt2_ranks.get(token[i:], rank) < rank
    ]
    merges.sort(key=lambda merge: merge[0])
    vocab = {strings[token]: rank for token, rank in gpt2_ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab, [(left, right) for _, left, right in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="session")
def gpt2_tiktoken(gpt2_ranks):
    """The same vocabulary in a slow tokenizer that holds a tiktoken encoding, as remote code has it."""
    tiktoken = pytest.importorskip("tiktoken")
    words = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

    class GPT2Tiktoken(transformers.PreTrainedTokenizer):
        def __init__(self):
            special = {"<|endoftext|>": len(gpt2_ranks)}
            self.encoder = tiktoken.Encoding("gpt2", pat_str=words, mergeable_ranks=gpt2_ranks, special_tokens=special)
            super().__init__(eos_token="<|endoftext|>")

        def __len__(self):
            return self.encoder.n_vocab

        def get_vocab(self):
            return dict(gpt2_ranks)

        def tokenize(self, text, **kwargs):
            return self.encoder.decode_tokens_bytes(self.encoder.encode(text, allowed_special="all"))

        def convert_tokens_to_ids(self, tokens):
            if isinstance(tokens, (bytes, str)):
                return self.encoder.encode_single_token(tokens)
            return [self.encoder.encode_single_token(token) for token in tokens]

    return GPT2Tiktoken()


@pytest.fixture(scope="session")
def mistral_v1():
    """Llama 2's kind: 32 000 SentencePiece tokens, byte fallback, dummy prefix."""
    return _mistral("mistral_v1")


@pytest.fixture(scope="session")
def mistral_v3():
    """32 768 SentencePiece tokens, of which 768 are control tokens."""
    return _mistral("mistral_v3")


@pytest.fixture(scope="session")
def mistral_v7():
    """As v3, with other control tokens."""
    return _mistral("mistral_v7")


@pytest.fixture(scope="session")
def tekken():
    """131 072 byte-level tokens, of which the first 1000 are special."""
    return _mistral("tekken")


@pytest.fixture(scope="session")
def tekken_2():
    """Tekken of a later date."""
    return _mistral("tekken_2")


@pytest.fixture
def tokenizer(name, request):
    return request.getfixturevalue(name)


@pytest.fixture
def table(tokenizer):
    return build_token_table(tokenizer, len(tokenizer))


def _read(table, ids) -> bytes:
    return b"".join(table.pieces[i] for i in ids)


@EVERY_ONE
@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80))
def test_the_pieces_of_any_canonical_text_are_its_bytes(request, name, text):
    tokenizer = request.getfixturevalue(name)
    table = build_token_table(tokenizer, len(tokenizer))
    text = table.canonical(text)
    (ids,) = encode(tokenizer, [text])
    prefix = b" " if name in SENTENCEPIECE and text else b""
    assert _read(table, ids) == prefix + text.encode()


@EVERY_ONE
def test_the_pieces_of_the_fuzz_set_are_its_bytes(name, tokenizer, table):
    texts = [table.canonical(text) for text in fuzz_texts()]
    prefix = b" " if name in SENTENCEPIECE else b""
    assert [_read(table, ids) for ids in encode(tokenizer, texts)] == [prefix + text.encode() for text in texts]


@EVERY_ONE
def test_plain_text_and_code_are_cut_as_the_tokenizer_itself_cuts_them(name, tokenizer):
    texts = ["Hello world, it's 1969.", PYTHON, "\u65e5\u672c\u8a9e \U0001f600 na\u00efve", "  two  spaces \n\n"]
    assert encode(tokenizer, texts) == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("name", GPT2)
def test_gpt2s_bytes_are_its_ranks(name, table, gpt2_ranks):
    assert table.pieces == [*sorted(gpt2_ranks, key=gpt2_ranks.get), b""]
    assert table.end_ids == (50256,)


def test_both_forms_of_gpt2_cut_every_text_alike(gpt2, gpt2_tiktoken):
    texts = [*fuzz_texts(), PYTHON, "don't 12345  x"]
    assert encode(gpt2, texts) == encode(gpt2_tiktoken, texts)


def test_gpt2s_known_ids(gpt2):
    assert encode(gpt2, ["Hello world", " the", "<|endoftext|>"]) == [
        [15496, 995],
        [262],
        [27, 91, 437, 1659, 5239, 91, 29],
    ]


@pytest.mark.parametrize("name", TEKKEN)
def test_tekkens_bytes_are_those_of_its_file(name, table):
    definition = json.loads(_mistral_path(name).read_text(encoding="utf-8"))
    first, size = (definition["config"][key] for key in ("default_num_special_tokens", "default_vocab_size"))
    ranks = {token["rank"]: base64.b64decode(token["token_bytes"]) for token in definition["vocab"]}
    assert table.pieces == [b""] * first + [ranks[rank] for rank in range(size - first)]


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_bytes_are_what_the_pieces_decode_to(name, tokenizer, table):
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(_mistral_path(name)))
    content = (table.kinds == CONTENT).nonzero()[0].tolist()
    anchor = processor.piece_to_id("a")  # the first piece of a text loses its space
    whole = [i for i in content if not processor.is_byte(i)]
    assert [table.pieces[i] for i in whole] == [processor.decode([anchor, i])[1:].encode() for i in whole]
    of_bytes = [i for i in content if processor.is_byte(i)]
    assert [table.pieces[i] for i in of_bytes] == [bytes([byte]) for byte in range(256)]
    assert all(processor.is_control(i) or processor.is_unknown(i) for i in set(range(len(tokenizer))) - set(content))


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_byte_tokens_double_ordinary_ones(name, table):
    pieces, counts = np.unique(np.array([piece for piece in table.pieces if piece], dtype=object), return_counts=True)
    doubled = [piece for piece, count in zip(pieces, counts, strict=True) if count > 1]
    assert len(doubled) > 90
    assert {len(piece) for piece in doubled} == {1}


@EVERY_ONE
def test_the_look_alike_of_a_space(name, tokenizer, table):
    kept = "a b\u2581" if name not in SENTENCEPIECE else "a b "
    assert table.canonical("a b\u2581") == kept
    assert _read(table, encode(tokenizer, [kept])[0]).removeprefix(b" ") == kept.encode()


@EVERY_ONE
def test_what_opens_and_ends_a_text(name, tokenizer, table):
    assert start_and_end(tokenizer) == ((50256, 50256) if name in GPT2 else (1, 2))
    assert table.end_ids == (table.end_id,)
    assert table.pieces[table.start_id] == b""


@EVERY_ONE
def test_text_that_looks_like_a_special_token_stays_text(name, tokenizer, table):
    text = "a</s> <s>[INST] <unk><|endoftext|>"
    (ids,) = encode(tokenizer, [text])
    assert set(table.kinds[ids]) == {CONTENT}
    assert _read(table, ids).removeprefix(b" ") == text.encode()


@EVERY_ONE
def test_only_itself_is_the_same_tokenizer(name, tokenizer, gpt2, mistral_v1):
    assert same_tokenizer(tokenizer, tokenizer)
    assert not same_tokenizer(tokenizer, mistral_v1 if name in GPT2 else gpt2)


@EVERY_ONE
def test_the_table_is_built_quickly(name, tokenizer):
    vocab_size = len(tokenizer) + 64  # of an LM head of another size, so that no earlier table is found
    fuzz_texts()
    start = time.perf_counter()
    table = build_token_table(tokenizer, vocab_size)
    seconds = time.perf_counter() - start
    assert len(table.pieces) == vocab_size
    assert set(table.kinds[-64:]) == {PADDED}
    assert seconds < MAX_SECONDS


# Coverage

ENGLISH = (
    "Many people believe that the oldest bridges are the ones which were built of stone. In fact some of the longest "
    "lasting ones were made of wood, and repaired every few years by the families who lived beside them. When the "
    "river rose, everybody came out to help, carried what they could to higher ground and waited for the water to go. "
) * 3
DEVANAGARI = (
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0906\u091c "
    "\u092e\u094c\u0938\u092e \u0905\u091a\u094d\u091b\u093e \u0939\u0948 "
)
CODE = PYTHON * 5


def _measured(student, teacher, text: str) -> tuple[float, float, float]:
    """Strict share of the student's tokens, chunks per student token, share of chunks in which tokens overlap."""
    pair = TokenizerPair(student, teacher, student_vocab_size=0, teacher_vocab_size=0, aligns=True)
    dataset = build_dataset([Document("text", text)], pair, 4096, 8192)
    found = measure_coverage(dataset)
    return found.strict, found.chunks_per_token, found.overlapping


def _by_hand(student, teacher, text: str) -> tuple[float, float]:
    """Strict share and chunks per token, from sets of spans; the end of the text is a span of its own."""
    spans = []
    for tokenizer in (student, teacher):
        table, at, own = build_token_table(tokenizer, 0), 0, []
        for token in encode(tokenizer, [text])[0]:
            own.append((at, at + len(table.pieces[token])))
            at = own[-1][1]
        shift = at - len(text.encode())  # a dummy space
        spans.append([(max(0, a - shift), b - shift) for a, b in own])
    shared = {b for _, b in spans[0]} & {b for _, b in spans[1]}
    total = len(spans[0]) + 1
    return (len(set(spans[0]) & set(spans[1])) + 1) / total, (len(shared - {0}) + 1) / total


@pytest.mark.parametrize("text", [ENGLISH, CODE, DEVANAGARI * 5], ids=["English", "code", "Devanagari"])
@pytest.mark.parametrize(("teacher", "student"), [("tekken", "gpt2"), ("mistral_v1", "gpt2"), ("tekken", "mistral_v1")])
def test_coverage_is_that_of_a_count_by_hand(teacher, student, text, request):
    teacher, student = request.getfixturevalue(teacher), request.getfixturevalue(student)
    strict, chunks, _ = _measured(student, teacher, text)
    # A dummy space may be a token of its own, which the count by hand takes for text.
    assert (strict, chunks) == pytest.approx(_by_hand(student, teacher, text), abs=0.01)


def test_two_versions_of_the_same_pieces_cover_one_another_wholly(mistral_v1, mistral_v3):
    assert _measured(mistral_v3, mistral_v1, ENGLISH) == (1.0, 1.0, 0.0)


def test_coverage_falls_from_english_to_code_to_other_scripts(gpt2, tekken):
    english, code, other = (_measured(gpt2, tekken, text)[0] for text in (ENGLISH, CODE, DEVANAGARI * 5))
    assert english > 0.8 > 0.6 > code > 0.3 > other
